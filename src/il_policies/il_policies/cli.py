"""The `il` command: convert, train, evaluate, import npz.

Each command imports what it needs when it runs, so that `il --help` is quick. Errors are one line on stderr and exit
code 2.
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro


def convert(bags: Annotated[Path, tyro.conf.Positional], out: Annotated[Path, tyro.conf.Positional],
            contract: Path) -> None:
    """Turn recorded bags into a dataset, one episode each; bags that cannot be used are named with the reason.

    Args:
        bags: Folder of rosbag2 bags (mcap), or one bag.
        out: Dataset to make; bags already in it are not converted again.
        contract: Contract of the robot that was recorded: config/robots/<robot>.yaml.
    """
    from il_policies.contract import load_contract
    from il_policies.data.convert import convert, summary_line

    def show(done: int, total: int, report) -> None:
        if report.refused:
            print(f'refused: {" ".join(report.refused.split())}', file=sys.stderr)
        elif sys.stderr.isatty():
            print(f'\r{done}/{total} bags', end='\n' if done == total else '', file=sys.stderr, flush=True)

    reports = convert(bags, load_contract(contract), out, show)
    print(f'{out}: {summary_line(reports)}')
    if all(report.refused for report in reports):
        raise SystemExit(2)


def import_npz(source: Annotated[Path, tyro.conf.Positional], out: Annotated[Path, tyro.conf.Positional],
               mapping: Path | None = None) -> None:
    """Turn the arrays of an .npz file into a dataset.

    Args:
        source: The .npz file: arrays with one row per step, and the ends of the episodes.
        out: Dataset to make.
        mapping: YAML file that says what the arrays mean, such as config/imports/pusht.yaml; without it the arrays in
            the file are listed.
    """
    from il_policies.data.importers import import_npz, load_mapping

    dataset = import_npz(source, out, load_mapping(mapping) if mapping else None)
    rows = sum(meta['length'] for meta in dataset.episodes)
    print(f'{out}: {len(dataset)} episodes, {rows} rows at {dataset.info.fps:g} Hz, features '
          f'{", ".join(dataset.info.features)}')


def train(argv: list[str]) -> None:
    """Train a policy on a dataset (a function of the arguments: a preset changes the defaults of the others)."""
    from il_policies.contract import from_dict, load_yaml
    from il_policies.data.store import Dataset
    from il_policies.train import TrainCommand, TrainConfig, train

    preset = next((value for flag, value in zip(argv, argv[1:]) if flag == '--preset'), None)
    preset = preset or next((arg.partition('=')[2] for arg in argv if arg.startswith('--preset=')), None)
    config = from_dict(TrainConfig, load_yaml(preset), preset) if preset else TrainConfig()
    arguments = tyro.cli(TrainCommand, args=argv, prog='il train',
                         default=TrainCommand(tyro.MISSING, tyro.MISSING, config, Path(preset) if preset else None))
    policy = train(Dataset(arguments.dataset), arguments.config, arguments.output)
    facts = policy.extra['training']
    print(f'{arguments.output}: {policy.kind} {policy.hash}, {facts["parameters"]} parameters, {facts["steps"]} steps '
          f'in {facts["seconds"]:.0f} s on {facts["episodes"]} episodes, loss {facts["loss"]:.4f}')


def evaluate(checkpoint: Annotated[Path, tyro.conf.Positional], task: str, episodes: int | None = None,
             seed: int | None = None, stride: int | None = None, threads: int = 1, output: Path | None = None) -> None:
    """Run a checkpoint in closed loop in a simulated task, without ROS, and print the score.

    Args:
        checkpoint: Checkpoint folder.
        task: pusht or reach_around.
        episodes: Number of starts; none: the task's own.
        seed: Seed of the first start, the others follow; none: the task's own.
        stride: Steps of each chunk that are executed before the next one is planned; none: the task's own.
        threads: CPU threads.
        output: JSON file for the full result.
    """
    import torch

    from il_policies.checkpoint import load
    from il_policies.evaluate import evaluate

    torch.set_num_threads(threads)
    given = {'episodes': episodes, 'seed': seed, 'stride': stride}
    result = evaluate(load(checkpoint), task, progress=_percent, **{k: v for k, v in given.items() if v is not None})
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1))
    print('\n'.join(f'{key}: {value:.3f}' if isinstance(value, float) else f'{key}: {value}'
                    for key, value in result.items() if not isinstance(value, (list, dict))))


def _percent(fraction: float) -> None:
    if sys.stderr.isatty():
        print(f'\r{100 * fraction:3.0f} %', end='\n' if fraction >= 1.0 else '', file=sys.stderr, flush=True)


COMMANDS: dict[str, tuple[Callable, str]] = {
    'convert': (convert, 'recorded bags → dataset'),
    'import npz': (import_npz, 'arrays of an .npz file → dataset'),
    'train': (train, 'dataset → checkpoint'),
    'evaluate': (evaluate, 'checkpoint → score in a simulated task'),
}
HELP = ('usage: il COMMAND [--help] …\n\n'
        + ''.join(f'  il {name:<12} {what}\n' for name, (_, what) in COMMANDS.items())
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
    function(rest) if function is train else tyro.cli(function, args=rest, prog=f'il {name}')


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `il`: 0 done, 2 wrong input, 130 interrupted."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print('il: interrupted', file=sys.stderr)
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
