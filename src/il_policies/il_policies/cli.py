"""The `il` command: recordings and other people's data → datasets → checkpoints → scores.

Each command imports what it needs when it runs, so that `il --help` is quick. Exit code 0: done; 1: done in part, the rest
named on stderr; 2: nothing done, one line on stderr says why.
"""
from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro


def convert(argv: list[str]) -> None:
    """Turn recorded bags into a dataset."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    from il_policies.bags.reader import find_bags
    from il_policies.contract import load_contract
    from il_policies.data.convert import ConvertCommand, convert, summary_line

    arguments = tyro.cli(ConvertCommand, args=argv, prog='il convert')
    contract = load_contract(arguments.contract) if arguments.contract else None
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress('converting', BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as bar:
        task = bar.add_task('', total=1.0)

        def show(share: float, refused: tuple[str, ...]) -> None:
            bar.update(task, completed=share)
            for reason in refused:
                bar.console.print('refused:', *reason.split(), markup=False)

        reports = convert(arguments.bags, contract, arguments.out, arguments.conversion, arguments.jobs, arguments.prune, show)
    for report in reports:
        for reason in report.details.get('reasons', ()):
            console.print(f'episode {report.index} ({report.bag}): {reason}', markup=False)
    if not arguments.conversion.salvage:
        short = {part for bags in arguments.bags for part in find_bags(bags, salvage=True)}
        short -= {bag for bags in arguments.bags for bag in find_bags(bags)}
        if short:
            names = ', '.join(sorted(map(str, short)))
            console.print(f'left out, cut short while being recorded: {names}; use them with --salvage', markup=False)
    print(f'{arguments.out}: {summary_line(reports)}')
    refused = [report for report in reports if report.refused]
    if refused:
        raise SystemExit(2 if len(refused) == len(reports) else 1)


def import_npz(source: Annotated[Path, tyro.conf.Positional], out: Path,
               mapping: Path | None = None) -> None:
    """Turn the arrays of an .npz file into a dataset.

    Args:
        source: The .npz file: arrays with one row per step, and the ends of the episodes.
        out: Dataset to make.
        mapping: YAML file that says what the arrays mean, such as config/imports/pusht.yaml; without it the arrays in
            the file are listed.
    """
    from il_policies.exchange.arrays import import_npz, load_mapping

    with _bar('importing') as progress:
        dataset = import_npz(source, out, load_mapping(mapping) if mapping else None, progress)
    _describe(dataset)


def import_zarr(source: Annotated[Path, tyro.conf.Positional], out: Path,
                mapping: Path | None = None) -> None:
    """Turn a zarr replay buffer of Diffusion Policy or UMI into a dataset.

    Args:
        source: A .zarr folder or .zarr.zip file with groups data and meta.
        out: Dataset to make.
        mapping: YAML file that says what the arrays mean, such as config/imports/umi.yaml; without it the arrays in the
            file are listed.
    """
    from il_policies.exchange.arrays import import_zarr, load_mapping

    with _bar('importing') as progress:
        dataset = import_zarr(source, out, load_mapping(mapping) if mapping else None, progress)
    _describe(dataset)


def import_lerobot(source: Annotated[Path, tyro.conf.Positional], out: Path) -> None:
    """Turn a LeRobot dataset of version 3.0 into a dataset; what il export lerobot wrote becomes what it was.

    Args:
        source: Folder of the LeRobot dataset, with meta/info.json.
        out: Dataset to make.
    """
    from il_policies.exchange.lerobot import import_lerobot

    with _bar('importing') as progress:
        dataset, left_out = import_lerobot(source, out, progress)
    _describe(dataset)
    if left_out:
        print(f'left out, being neither observation nor action: {", ".join(left_out)}')


def export_lerobot(dataset: Annotated[Path, tyro.conf.Positional], out: Path,
                   images: Literal['h264', 'av1', 'jpeg'] = 'h264', crf: int | None = None,
                   state: tuple[str, ...] | None = None, data_file_mb: int = 100, video_file_mb: int = 200,
                   jobs: int | None = None) -> None:
    """Turn a dataset into a LeRobot dataset of version 3.0.

    Args:
        dataset: Dataset to export.
        out: Folder of the LeRobot dataset to make.
        images: Cameras as H.264 or AV1 video, or, larger but exact, as the stored JPEG files. Depth is never video.
        crf: Quality of the video, lower is better; none: 18 for h264, 30 for av1.
        state: Features to join to observation.state, which LeRobot's policies read; none: all low-dimensional ones.
        data_file_mb: Largest data file, unless one episode is larger [MiB].
        video_file_mb: Largest video file, unless one episode is larger [MiB].
        jobs: Threads that encode images; none: as many as there are cores.
    """
    from il_policies.data.store import Dataset
    from il_policies.exchange.lerobot import ExportConfig, export_lerobot

    source = Dataset(dataset)
    with _bar('exporting') as progress:
        info = export_lerobot(source, out, ExportConfig(images, crf, state, data_file_mb, video_file_mb, jobs), progress)
    print(f'{out}: LeRobot {info["codebase_version"]}, {info["total_episodes"]} episodes, {info["total_frames"]} frames at '
          f'{info["fps"]:g} Hz, {info["total_tasks"]} task{"s" if info["total_tasks"] > 1 else ""}')
    for name, feature in info['features'].items():
        if name == 'action' or name.startswith('observation.'):
            kind = feature.get('info', {}).get('video.codec') or feature['dtype']
            print(f'  {name:<28} {"×".join(map(str, feature["shape"]))} {kind}')
    for what, count in (('labelled a failure', sum(meta['success'] is False for meta in source.episodes)),
                        ('judged FAIL', sum(source.report(i).get('verdict') == 'FAIL' for i in range(len(source))))):
        if count:
            print(f'il: {count} of {len(source)} episodes are {what}, for which LeRobot has no place; il split takes them out',
                  file=sys.stderr)


def export_onnx(checkpoint: Annotated[Path, tyro.conf.Positional]) -> None:
    """Export the networks of a checkpoint for fast inference: into its folder onnx/, which policy_node and il evaluate then use.

    Args:
        checkpoint: Checkpoint folder. What comes out is compared with PyTorch before anything is written.
    """
    from rich.console import Console

    from il_policies.deploy import FOLDER, export

    with Console(stderr=True).status('exporting'):
        description = export(checkpoint)
    errors = ', '.join(f'{error:.1g} ({engine})' for engine, error in description['max_error'].items())
    print(f'{checkpoint / FOLDER}: {", ".join(description["files"])} of policy {description["policy"]}; '
          f'normalised actions off by at most {errors}')


@contextmanager
def _bar(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal, to be called with the share that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as bar:
        task = bar.add_task('', total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _describe(dataset) -> None:
    rows = sum(meta['length'] for meta in dataset.episodes)
    print(f'{dataset.path}: {len(dataset)} episodes, {rows} rows at {dataset.info.fps:g} Hz, features '
          f'{", ".join(dataset.info.features)}')


def merge(datasets: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path) -> None:
    """Make one dataset of several; an episode that occurs in more than one of them is taken once.

    Args:
        datasets: Datasets with the same rate, features, action and contract.
        out: Dataset to make. Its files are shared with the others by hard links where possible.
    """
    from il_policies.data.edit import merge

    dataset, left_out = merge(datasets, out)
    rows = sum(meta['length'] for meta in dataset.episodes)
    print(f'{out}: {len(dataset)} episodes, {rows} rows, hash {dataset.hash}')
    if left_out:
        print(f'left out, being the same as one before: {", ".join(left_out)}')


def split(dataset: Annotated[Path, tyro.conf.Positional],
          parts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar='NAME=WHAT …')], out: Path,
          seed: int = 0) -> None:
    """Divide the episodes of a dataset among new ones.

    Args:
        dataset: Dataset to divide; it stays as it is.
        parts: NAME=WHAT for each: a share drawn at random (train=0.9), episodes by index (bad=3,17 or first=0-49) or by what
            is known of them (bad=verdict:FAIL, failed=success:False, left=side:left), or all that is left (val=rest).
        out: Folder to make, with one dataset NAME for each part.
        seed: Seed of the draw.
    """
    from il_policies.data.edit import split
    from il_policies.data.store import Dataset

    made = split(dataset, out, parts, seed)
    for part in made.values():
        print(f'{part.path}: {len(part)} episodes, {sum(meta["length"] for meta in part.episodes)} rows, hash {part.hash}')
    left = len(Dataset(dataset)) - sum(map(len, made.values()))
    if left:
        print(f'{left} episodes are in no part')


def inspect(source: Annotated[tuple[Path, ...], tyro.conf.Positional,
                              tyro.conf.arg(metavar='BAG|DATASET [BAG …]', help_behavior_hint='(required)')],
            contract: Path | None = None, html: Path | None = None,
            json_file: Annotated[Path | None, tyro.conf.arg(name='json')] = None, gaps: Literal['refuse', 'split'] = 'refuse',
            markers: str = '', salvage: tyro.conf.FlagCreatePairsOff[bool] = False,
            msg_path: tyro.conf.UseAppendAction[tuple[Path, ...]] = (), jobs: int = 0) -> None:
    """Judge every episode of bags or of a dataset: PASS, WARN or FAIL, and why.

    Exit code 0: no FAIL; 1: some; 2: nothing there that can be looked at.

    Args:
        source: Bags, folders of bags, or one dataset.
        contract: Contract of the robot: config/robots/<robot>.yaml. None: the one inside the bag or dataset.
        html: Page to write: of every episode first and last images, streams over time, command and measurement of joints.
        json_file: File to write: all reports as JSON.
        gaps: Bags: what a gap too long to be repeated does: refuse the episode, or end it and begin another one after the gap.
        markers: Bags: topic (std_msgs/String) whose marks cut a bag into episodes, as for il convert.
        salvage: Bags: look at what is left of damaged ones and of recordings that were cut short (.part).
        msg_path: Bags: package, .msg file, or folder of them, for bags without type definitions; may be repeated.
        jobs: Bags: how many at a time. 0: one per CPU core, fewer for little work.
    """
    from rich.console import Console

    from il_policies.bags.reader import find_bags
    from il_policies.contract import load_contract
    from il_policies.data.convert_bag import Options
    from il_policies.data.errors import DataError
    from il_policies.data.inspect import inspect_bags, inspect_dataset, show
    from il_policies.data.inspect_page import page
    from il_policies.data.store import Dataset

    with _bar('inspecting') as progress:
        if not source:
            raise DataError('no bags and no dataset given', 'E102')
        if any((path / 'dataset.json').exists() for path in source):
            if len(source) > 1 or contract:
                raise DataError(f'{source[0]}: a dataset is looked at alone, and has its own contract')
            found = inspect_dataset(Dataset(source[0]), progress)
        else:
            bags = list(dict.fromkeys(bag for path in source for bag in find_bags(path, salvage)))
            options = Options(gaps=gaps, markers=markers, salvage=salvage, msg_path=msg_path)
            found = inspect_bags(bags, load_contract(contract) if contract else None, options, jobs, progress)
    for file, text in ((html, lambda: page(found)), (json_file, lambda: json.dumps(found.to_dict(), indent=1))):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text(), encoding='utf-8')
    show(found, Console(highlight=False))
    if found.count('FAIL'):
        raise SystemExit(1)


def check(things: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar='CONTRACT|BAG|DATASET|CHECKPOINT …')],
          contract: Path | None = None, bag: tyro.conf.UseAppendAction[tuple[Path, ...]] = (), dataset: Path | None = None,
          checkpoint: Path | None = None, live: tyro.conf.FlagCreatePairsOff[bool] = False, seconds: float = 5.0,
          namespace: str = '/', json_file: Annotated[Path | None, tyro.conf.arg(name='json')] = None) -> None:
    """Do contract, robot, bags, dataset and checkpoint fit together? Every mismatch is explained, with its fix.

    il check config/robots/my_arm.yaml --live; il check my_arm.yaml bags my_dataset my_policy --live. All is compared with the
    contract; where none is given, with the one that dataset, checkpoint or bag carries. Exit code 0: no FAIL; 1: some; 2:
    nothing that can be looked at.

    Args:
        things: What to compare: a contract, bags or folders of bags, datasets, checkpoints, in any order.
        contract: Contract of the robot: config/robots/<robot>.yaml.
        bag: Bag or folder of bags; may be repeated.
        dataset: Dataset.
        checkpoint: Checkpoint.
        live: Listen to what runs now: topics, types, QoS, rates, stamps, names, units (needs ROS 2; moves nothing).
        seconds: Live: how long to listen [s].
        namespace: Live: namespace in which the nodes will run, such as /left.
        json_file: File to write: all findings as JSON.
    """
    from rich.console import Console

    from il_policies.check import command
    from il_policies.check.findings import show

    if not 0.5 <= seconds <= 3600.0:
        raise command.CheckError(f'seconds is {seconds:g}, must be 0.5 to 3600')
    given = [*([contract] if contract else []), *things, *bag, *([dataset] if dataset else []),
             *([checkpoint] if checkpoint else [])]
    with Console(stderr=True).status('reading') as status:
        def listen(robot):
            status.update(f'listening for {seconds:g} s')
            return command.listen(robot, seconds, namespace)

        report = command.check(given, listen if live else None, lambda share: status.update(f'bags: {share:.0%}'))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.to_dict(), indent=1), encoding='utf-8')
    show(report, Console(highlight=False))
    if report.count('FAIL'):
        raise SystemExit(1)


def train(argv: list[str]) -> None:
    """Train a policy on a dataset (a function of the arguments: a preset changes the defaults of the others)."""
    from il_policies.data.store import Dataset
    from il_policies.train import TrainCommand, TrainError, load_preset, train

    def given(flag: str) -> str | None:
        separate = next((value for argument, value in zip(argv, argv[1:]) if argument == flag), None)
        return separate or next((a.partition('=')[2] for a in argv if a.startswith(f'{flag}=')), None)

    preset = given('--preset')
    config = load_preset(preset, given('--policy'))
    defaults = TrainCommand(tyro.MISSING, tyro.MISSING, config, config.kind, Path(preset) if preset else None)
    try:
        arguments = tyro.cli(TrainCommand, args=argv, prog='il train', config=(tyro.conf.AvoidSubcommands,), default=defaults)
    except ValueError as error:  # a number that is out of range
        raise TrainError(str(error)) from None
    policy = train(Dataset(arguments.dataset), arguments.config, arguments.out, resume=arguments.resume,
                   overwrite=arguments.overwrite)
    facts = policy.extra['training']
    if not policy.hash:  # the first of several processes saves and tells
        return
    print(f'{arguments.out}: {policy.kind} {policy.hash}, {facts["parameters"]} parameters, {facts["steps"]} steps '
          f'in {facts["seconds"]:.0f} s on {facts["episodes"]} of {facts["of_episodes"]} episodes, loss {facts["loss"]:.4f}')


def evaluate(checkpoint: Annotated[Path, tyro.conf.Positional], task: str, episodes: int | None = None,
             seed: int | None = None, stride: int | None = None, shuffled: bool = False, threads: int = 1,
             backend: Literal['auto', 'torch', 'onnxruntime', 'openvino'] = 'auto', out: Path | None = None) -> None:
    """Run a checkpoint in closed loop in a simulated task, without ROS, and print the score.

    Args:
        checkpoint: Checkpoint folder.
        task: pusht, reach_around, or reach_around_wide, whose goals lie on an arc of 0.2 m.
        episodes: Number of starts; none: the task's own.
        seed: Seed of the first start, the others follow; none: the task's own.
        stride: Steps of each chunk that are executed before the next one is planned; none: the task's own.
        shuffled: Show a policy the camera images of other episodes: what it then achieves is chance.
        threads: CPU threads.
        backend: What runs the networks; auto: the fastest that the checkpoint was exported for (il export onnx), or torch.
        out: JSON file for the full result.
    """
    from il_policies.deploy import load
    from il_policies.evaluate import evaluate

    given = {'episodes': episodes, 'seed': seed, 'stride': stride, 'shuffled': shuffled or None}
    result = evaluate(load(checkpoint, backend, threads), task, progress=_percent,
                      **{k: v for k, v in given.items() if v is not None})
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1))
    print('\n'.join(f'{key}: {value:.3f}' if isinstance(value, float) else f'{key}: {value}'
                    for key, value in result.items() if not isinstance(value, (list, dict))))


def replay(bag: Annotated[Path, tyro.conf.Positional], policy: Path, contract: Path | None = None, stride: int = 8, seed: int = 0,
           threads: int = 1, out: Path | None = None, plot: Path | None = None) -> None:
    """Play a bag through a policy's live buffers, without ROS: how far is what it plans from what was done?

    Bags of demonstrations and of the flight recorder. Chunks are compared with the actions that il convert would label their
    times with; the errors, RMS / worst over all chunks, grow with the time ahead.

    Args:
        bag: Bag to play.
        policy: Checkpoint folder.
        contract: Contract of the robot: config/robots/<robot>.yaml. None: the one inside the checkpoint, else the bag.
        stride: Policy steps from one plan to the next.
        seed: Seed of the sampler's noise.
        threads: CPU threads.
        out: JSON file for all errors, by joint and step.
        plot: PNG file: what was done with the chunks over it, and the error against the time ahead.
    """
    from rich.console import Console
    from rich.table import Table

    from il_policies.bags.reader import Bag
    from il_policies.contract import load_contract
    from il_policies.deploy import load
    from il_policies.replay import contract_for, table
    from il_policies.replay import plot as draw
    from il_policies.replay import replay as play

    recording, loaded = Bag(bag), load(policy, 'torch', threads)
    with Console(stderr=True).status('replaying'):
        result = play(recording, loaded, load_contract(contract) if contract else contract_for(recording, loaded), stride, seed)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result.to_dict(), indent=1))
    if plot is not None:
        draw(result, plot)
    heading, *rows = table(result)
    shown = Table(*heading, title=f'{result.bag}, {len(result.starts)} chunks of {loaded.kind} {loaded.hash}: error, RMS / worst')
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False).print(shown)
    for what, counts in (('kept it from planning', result.not_planned), ('messages that are no samples', result.refused)):
        if counts:
            print(f'il: {what}: {", ".join(f"{name} {count}" for name, count in counts.items())}', file=sys.stderr)


BENCHMARKS = {
    'multimodal': 'two equally good ways: who averages them',
    'methods': 'the four policies on reach_around: same data, same budget',
    'pusht': "human demonstrations, Diffusion Policy's protocol, scores against sampler steps",
    'training': 'time of an optimiser step of each preset, fp32 and bf16',
    'delay': 'chunks that come late: ways of switching to them, on a goal that moves',
    'inference': 'time of a chunk by PyTorch, ONNX Runtime, OpenVINO',
    'latency': 'from capture to first command through running nodes, stage by stage (needs ROS 2)',
}


def bench(argv: list[str]) -> None:
    """Run a benchmark: a table, JSON and a plot."""
    if not argv or argv[0] in ('-h', '--help'):
        print('usage: il bench NAME [--help] …\n\n' + '\n'.join(f'  {name:<12} {what}' for name, what in BENCHMARKS.items()))
        raise SystemExit(0 if argv else 2)
    if argv[0] not in BENCHMARKS:
        print(f'il: no benchmark {argv[0]!r}; valid: {", ".join(BENCHMARKS)}', file=sys.stderr)
        raise SystemExit(2)
    module = importlib.import_module(f'il_policies.bench.{argv[0]}')
    tyro.cli(module.run, args=argv[1:], prog=f'il bench {argv[0]}')


def urdf(contract: Annotated[Path, tyro.conf.Positional]) -> None:
    """Print the description of a robot, as robot_state_publisher wants it.

    Args:
        contract: The robot's contract, a YAML file.
    """
    from il_policies.contract import load_contract
    from il_policies.description import resolve

    print(resolve(load_contract(contract).description).read_text())


def _percent(fraction: float) -> None:
    if sys.stderr.isatty():
        print(f'\r{100 * fraction:3.0f} %', end='\n' if fraction >= 1.0 else '', file=sys.stderr, flush=True)


COMMANDS: dict[str, tuple[Callable, str]] = {
    'convert': (convert, 'recorded bags → dataset'),
    'import npz': (import_npz, 'arrays of an .npz file → dataset'),
    'import zarr': (import_zarr, 'replay buffer of Diffusion Policy or UMI → dataset'),
    'import lerobot': (import_lerobot, 'LeRobot dataset (v3.0) → dataset'),
    'export lerobot': (export_lerobot, 'dataset → LeRobot dataset (v3.0)'),
    'export onnx': (export_onnx, 'checkpoint → fast networks for deployment, inside it'),
    'inspect': (inspect, 'bags or dataset → what is in it and whether it is any good'),
    'check': (check, 'contract, robot, bags, dataset, checkpoint → do they fit, and what to do where not'),
    'merge': (merge, 'datasets → one dataset'),
    'split': (split, 'dataset → several, by share or by episode'),
    'train': (train, 'dataset → checkpoint'),
    'evaluate': (evaluate, 'checkpoint → score in a simulated task'),
    'replay': (replay, 'bag, checkpoint → how far what it would have planned is from what was done'),
    'bench': (bench, 'benchmarks of the policies: tables, JSON, plots'),
    'urdf': (urdf, 'contract → description of the robot, for robot_state_publisher'),
}
HELP = ('usage: il COMMAND [--help] …\n\n'
        + ''.join(f'  il {name:<16} {what}\n' for name, (_, what) in COMMANDS.items())
        + '\nil COMMAND --help shows its arguments with units and defaults.')


def run(argv: Sequence[str]) -> None:
    """Run the command that argv names. Raises SystemExit for help and wrong arguments, else what the command raises."""
    if not argv or argv[0] in ('-h', '--help'):
        print(HELP)
        raise SystemExit(0 if argv else 2)
    for words in (1, 2):
        name, rest = ' '.join(argv[:words]), list(argv[words:])
        if name in COMMANDS:
            break
    else:
        print(f'il: no command {" ".join(argv[:2])!r}; valid: {", ".join(COMMANDS)}', file=sys.stderr)
        raise SystemExit(2)
    function = COMMANDS[name][0]
    function(rest) if function in (convert, train, bench) else tyro.cli(function, args=rest, prog=f'il {name}')


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `il`: 0 done, 2 wrong input, 130 interrupted."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as interrupt:
        print(f'il: {interrupt if str(interrupt) else "interrupted"}', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f'il: {error}', file=sys.stderr)
        sys.exit(2)


def _is_ours(error: Exception) -> bool:
    """True for the errors that our own modules raise to be read by people: their message says it all."""
    return isinstance(error, OSError) or type(error).__module__.startswith('il_policies.')


if __name__ == '__main__':
    main()
