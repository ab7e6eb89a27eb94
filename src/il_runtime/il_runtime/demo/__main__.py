"""The quick start: demonstrations, dataset, training, closed loop, report; each stage reuses what is already there."""
from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from il_policies.contract import load_contract
from il_policies.data.convert import convert, summary_line
from il_policies.data.errors import DataError
from il_policies.sim.reach_around import TASK, Scene
from il_runtime.demo.processes import DemoError, Processes, terminate_like_interrupt

DEMONSTRATIONS, LEAST_DEMONSTRATIONS = 60, 40
RECORDING_SPEED = 4.0
EPISODES_DDS, EPISODES_LOCKSTEP, DRAWS = 20, 100, 50
SCENES_SEED = 1000
"""Starts and goals of the evaluation; demonstrations have other seeds."""
ONE_START = Scene()
STRIDE = 8

console = Console(highlight=False)


class Stages:
    """Numbered stages with their times."""

    def __init__(self, total: int):
        self.total, self.times = total, []

    @contextmanager
    def stage(self, title: str):
        """Announce a stage and time it."""
        console.print(f'[bold]{len(self.times) + 1}/{self.total}  {title}[/bold]')
        started = time.monotonic()
        yield
        self.times.append((title, round(time.monotonic() - started, 1)))
        console.print(f'     [dim]{self.times[-1][1]:.0f} s[/dim]')


@contextmanager
def bar(label: str, total: int):
    """A progress bar; where there is no terminal, a line every tenth."""
    columns = (TextColumn('     {task.description}'), BarColumn(), TextColumn('{task.completed:g}/{task.total:g}'),
               TimeElapsedColumn(), TextColumn('{task.fields[note]}'))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total, note='')
        told = 0

        def advance(done: int, note: str = '') -> None:
            nonlocal told
            progress.update(task, completed=done, note=note)
            if not console.is_terminal and 10 * done // total > told:
                told = 10 * done // total
                console.print(f'     {label} {done}/{total} {note}')

        yield advance


def record(out: Path, contract: Path) -> None:
    """Stage 2: a scripted expert demonstrates, four processes over DDS, faster than real time."""
    bags = out / 'bags'
    if len(finished_bags(bags)) >= DEMONSTRATIONS:
        console.print(f'     {DEMONSTRATIONS} demonstrations are there')
        return
    shutil.rmtree(bags, ignore_errors=True)
    with Processes(out / 'logs') as processes:
        common = {'contract': contract, 'use_sim_time': True}
        processes.node('simulator_node', contract=contract, real_time_factor=RECORDING_SPEED, publish_clock=True)
        processes.node('controller_node', **common)
        processes.node('recorder_node', output=bags, **common)
        expert = processes.node('expert_node', stdout=subprocess.PIPE, demonstrations=DEMONSTRATIONS, **common)
        with bar('demonstrations', DEMONSTRATIONS) as advance:
            for line in expert.stdout:
                if found := re.match(r'demonstration (\d+)/\d+ (\w+) reached', line):
                    advance(int(found[1]), f'round the {found[2]}')
        if expert.wait() != 0:
            raise DemoError(f'the demonstrations failed: {processes.last_words("expert_node")}')


def finished_bags(bags: Path) -> list[Path]:
    """Complete recordings below a folder."""
    return sorted(path.parent for path in bags.glob('*/metadata.yaml') if not path.parent.name.endswith('.part'))


def train(out: Path, config: Path) -> dict[str, dict]:
    """Stage 4: BC and Flow on the same data, BC also on one side only; two at a time, a core each. Their training facts."""
    jobs = {name: out / 'checkpoints' / name for name in ('flow', 'bc', 'bc_left')}
    waiting = {name: path for name, path in jobs.items() if not (path / 'policy.json').exists()}
    with Processes(out / 'logs') as processes, bar('trainings', len(waiting) or 1) as advance:
        running: dict[str, subprocess.Popen] = {}
        queue, done = list(waiting), 0
        while queue or running:
            while queue and len(running) < 2:
                name = queue.pop(0)
                running[name] = start_training(processes, name, out, config, waiting[name])
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode != 0:
                        raise DemoError(f'training {name} failed: {processes.last_words(f"train_{name}")}')
                    done += 1
            advance(done, ', '.join(f'{name} {percent(out / "logs" / f"train_{name}.log")}' for name in running))
            time.sleep(0.2)
    facts = {name: json.loads((path / 'policy.json').read_text())['extra']['training'] for name, path in jobs.items()}
    for name, fact in facts.items():
        console.print(f'     {name:<8} {fact["parameters"]} parameters, {fact["steps"]} steps on {fact["episodes"]} '
                      f'demonstrations in {fact["seconds"]:.0f} s, loss {fact["loss"]:.4f}')
    told = ('steps', 'seconds', 'loss', 'episodes', 'parameters')
    return {name: {key: fact[key] for key in told} for name, fact in facts.items()}


def start_training(processes: Processes, name: str, out: Path, config: Path, checkpoint: Path) -> subprocess.Popen:
    """Start `il train` for one policy; the one-sided control sees only the demonstrations round the left."""
    kind, _, side = name.partition('_')
    where = ['--where', 'task=' + TASK.format(side=side)] if side else []
    return processes.start(f'train_{name}', [
        sys.executable, '-m', 'il_policies.cli', 'train', str(out / 'dataset'), '--output', str(checkpoint), '--preset',
        str(config / 'policies' / f'{kind}.yaml'), '--threads', '1', *where])


def percent(log: Path) -> str:
    """How far a training is, from its log."""
    found = re.findall(r'(\d+)%', log.read_text()) if log.exists() else []
    return f'{found[-1]} %' if found else '0 %'


def closed_loop(out: Path, contract_path: Path) -> dict[str, dict]:
    """Stage 5: real time over DDS, simulator, planner and controller a process each."""
    import rclpy

    from il_policies.lockstep import scenes
    from il_runtime.demo.rollouts import over_dds
    from il_runtime.session import SessionError
    contract, results = load_contract(contract_path), {}
    for name in ('bc', 'flow'):
        with Processes(out / 'logs') as processes:
            processes.node('simulator_node', contract=contract_path)
            processes.node('controller_node', contract=contract_path)
            processes.node('policy_node', contract=contract_path, checkpoint=out / 'checkpoints' / name, stride=STRIDE)
            rclpy.init()
            try:
                with bar(f'{name} over DDS', EPISODES_DDS) as advance:
                    results[name] = over_dds(contract, scenes(EPISODES_DDS, SCENES_SEED), out / 'rollouts' / f'{name}_dds.npz',
                                             processes.check, advance)
            except SessionError as error:
                processes.check()
                raise DemoError(f'{name} over DDS: {error}') from None
            finally:
                rclpy.try_shutdown()
    return results


def lockstep(out: Path) -> dict[str, dict]:
    """Stage 5, without DDS: many starts, the one-sided control, many draws from one start, and what noise and averaging do."""
    from il_policies.lockstep import scenes
    from il_runtime.demo.rollouts import in_lockstep
    many, one = scenes(EPISODES_LOCKSTEP, SCENES_SEED), [ONE_START] * DRAWS
    often = {'stride': STRIDE // 2, 'm': 0.0}
    jobs = {
        'flow': ('flow', many, {'stride': STRIDE}), 'bc': ('bc', many, {'stride': STRIDE}),
        'bc_left': ('bc_left', many, {'stride': STRIDE}), 'flow_one_start': ('flow', one, {'stride': STRIDE}),
        'fresh_average': ('flow', many[:DRAWS], {**often, 'noise': 'per_chunk', 'max_disagreement': float('inf')}),
        'warm_start': ('flow', many[:DRAWS], {**often, 'noise': 'warm_start', 'max_disagreement': float('inf')}),
    }
    results: dict[str, dict] = {}
    # Spawned: a forked torch may hang on the threads of its parent.
    with ProcessPoolExecutor(2, mp_context=get_context('spawn')) as pool, bar('lock-step studies', len(jobs)) as advance:
        futures = {pool.submit(in_lockstep, out / 'checkpoints' / policy, chosen, SCENES_SEED, execution,
                               out / 'rollouts' / f'{name}.npz'): name for name, (policy, chosen, execution) in jobs.items()}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            advance(len(results), futures[future])
    return results


def summarise(out: Path, dds: dict, steps: dict, facts: dict) -> dict:
    """The content of results.json, but for what stages and set-up took."""
    lateness = np.concatenate([np.load(out / 'rollouts' / f'{name}_dds.npz')['lateness'] for name in dds]) * 1e3
    names = ('successes', 'episodes', 'touched')
    scheduler = re.search(r'scheduler (.*)', (out / 'logs' / 'controller_node.log').read_text())
    one = steps['flow_one_start']
    return {
        'policies': {name: {**{key: dds[name][key] for key in names},
                            **{f'lockstep_{key}': steps[name][key] for key in names}} for name in dds},
        'studies': {
            'bc_left': {key: steps['bc_left'][key] for key in names},
            'flow_one_start': {'left': one['left'], 'right': one['episodes'] - one['left'], 'episodes': one['episodes'],
                               'successes': one['successes']},
            **{name: {key: steps[name][key] for key in (*names, 'jerk_rms')} for name in ('fresh_average', 'warm_start')}},
        'controller': {
            'rate_hz': 50.0,
            **{f'lateness_p{q}_ms': round(float(np.percentile(lateness, q)), 3) for q in (50, 99)},
            'lateness_max_ms': round(float(lateness.max()), 3),
            'missed_ticks': sum(d['missed_ticks'] for d in dds.values()), 'ticks': sum(d['ticks'] for d in dds.values()),
            'faults': [reason for d in dds.values() for reason in d['faults']],
            'limit_violations': sum(d['limit_violations'] for d in (*dds.values(), *steps.values())),
            'scheduler': scheduler[1].strip() if scheduler else 'unknown'},
        'training': facts,
        'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}',
    }


def show(results: dict) -> None:
    """The table in the terminal."""
    table = Table(title='reach_around: goal reached in time, pillar not touched')
    for column in ('policy', 'over DDS, real time', 'lock-step', 'of which pillar contacts'):
        table.add_column(column, justify='left' if column == 'policy' else 'right')
    for name, result in results['policies'].items():
        table.add_row({'bc': 'BC (MSE)', 'flow': 'Flow'}[name], f'{result["successes"]}/{result["episodes"]}',
                      f'{result["lockstep_successes"]}/{result["lockstep_episodes"]}',
                      f'{result["touched"]} + {result["lockstep_touched"]}')
    left, one = results['studies']['bc_left'], results['studies']['flow_one_start']
    table.add_row('BC, one side only', '', f'{left["successes"]}/{left["episodes"]}', str(left['touched']))
    console.print(table)
    fresh, warm, loop = results['studies']['fresh_average'], results['studies']['warm_start'], results['controller']
    console.print(f'     Flow from one start, {one["episodes"]} draws: {one["left"]} left, {one["right"]} right\n'
                  f'     Averaged chunks: fresh noise {fresh["successes"]}/{fresh["episodes"]}, '
                  f'warm start {warm["successes"]}/{warm["episodes"]}\n'
                  f'     50 Hz loop ({loop["scheduler"]}): lateness p50 {loop["lateness_p50_ms"]} ms, '
                  f'p99 {loop["lateness_p99_ms"]} ms, max {loop["lateness_max_ms"]} ms; '
                  f'{loop["missed_ticks"]} of {loop["ticks"]} ticks missed; {loop["limit_violations"]} limit violations')


def demo(out: Path, config: Path, setup_s: float) -> None:
    """All stages. Raises DemoError, DataError, OSError."""
    started = time.monotonic()
    contract = config / 'robots' / 'so101.yaml'
    stages = Stages(6)
    stages.times.append(('set-up', setup_s))
    console.print(f'[bold]1/6  set-up[/bold]\n     [dim]{setup_s:.0f} s[/dim]')
    with stages.stage(f'{DEMONSTRATIONS} demonstrations over DDS → bags'):
        record(out, contract)
    with stages.stage('bags → dataset'):
        reports = convert(out / 'bags', load_contract(contract), out / 'dataset')
        quality = summary_line(reports)
        console.print(f'     {quality}')
        for report in reports:
            if report.refused:
                console.print(f'     refused: {report.refused}')
        usable = sum(not report.refused for report in reports)
        if usable < LEAST_DEMONSTRATIONS:
            raise DemoError(f'only {usable} of {len(reports)} recordings are usable; is the machine busy? make demo FRESH=1 '
                            'records again')
    with stages.stage('training: BC and Flow, same data, same network, same budget'):
        facts = train(out, config)
    with stages.stage('closed loop: planner → chunks → 50 Hz controller → simulator'):
        results = summarise(out, closed_loop(out, contract), lockstep(out), facts)
    with stages.stage('report'):
        from il_runtime.demo import report
        results = {'demonstrations': usable, **results, 'dataset': quality, 'stages': stages.times, 'setup_s': setup_s,
                   'wall_s': round(time.monotonic() - started + setup_s, 1)}
        write_json(out / 'results.json', results)
        report.write(out)
    results['wall_s'] = round(time.monotonic() - started + setup_s, 1)
    write_json(out / 'results.json', results)
    show(results)
    console.print(f'\n[bold]{out / "report.html"}[/bold]   (numbers: {out / "results.json"}; {results["wall_s"]:.0f} s in all)')


def write_json(path: Path, data: dict) -> None:
    """Write whole or not at all."""
    part = path.with_suffix('.part')
    part.write_text(json.dumps(data, indent=1))
    part.replace(path)


def main() -> int:
    """Entry point; 0 done, 1 failed, 130 interrupted."""
    parser = argparse.ArgumentParser(prog='make demo', description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('demo_out'), help='folder for everything made (default: %(default)s)')
    parser.add_argument('--config', type=Path, default=Path('config'), help='configuration folder (default: %(default)s)')
    parser.add_argument('--fresh', action='store_true', help='start over')
    parser.add_argument('--setup-seconds', type=float, default=0.0, help='what setting up took, for the report [s]')
    arguments = parser.parse_args()
    # A graph of its own, on this machine only.
    os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    say: Callable[[str], None] = lambda text: print(f'demo: {text}', file=sys.stderr)  # noqa: E731
    try:
        with terminate_like_interrupt():
            if arguments.fresh:
                shutil.rmtree(arguments.out, ignore_errors=True)
            arguments.out.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(arguments.out).free < 1e9:
                raise DemoError(f'less than 1 GB of disk is free at {arguments.out.absolute()}')
            demo(arguments.out, arguments.config, arguments.setup_seconds)
    except KeyboardInterrupt:
        say('interrupted; run it again, it goes on from the last finished stage')
        return 130
    except (DemoError, DataError) as error:
        say(str(error))
        return 1
    except OSError as error:
        say('the disk is full' if error.errno == errno.ENOSPC else str(error))
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
