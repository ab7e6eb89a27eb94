"""The quick start: demonstrations, dataset, training, closed loop, report; each stage reuses what is already there."""
from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from rich.table import Table

from il_policies.data.errors import DataError
from il_policies.sim.reach_around import TASK, Scene
from il_runtime.demo.images import demo_images
from il_runtime.demo.processes import DemoError, terminate_like_interrupt
from il_runtime.demo.stages import (
    SCENES_SEED,
    Stages,
    bar,
    closed_loop,
    console,
    loop_facts,
    loop_line,
    machine,
    record,
    to_dataset,
    train,
    write_json,
)

DEMONSTRATIONS = 60
EPISODES_DDS, EPISODES_LOCKSTEP, DRAWS = 20, 100, 50
ONE_START = Scene()
STRIDE = 8
MADE = ('bags', 'dataset', 'checkpoints', 'rollouts', 'logs')
"""Folders that starting over removes."""


def lockstep(out: Path) -> dict[str, dict]:
    """Without DDS: many starts, the one-sided control, many draws from one start, and what noise and averaging do."""
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
    names = ('successes', 'episodes', 'touched')
    one = steps['flow_one_start']
    return {
        'policies': {name: {**{key: dds[name][key] for key in names},
                            **{f'lockstep_{key}': steps[name][key] for key in names}} for name in dds},
        'studies': {
            'bc_left': {key: steps['bc_left'][key] for key in names},
            'flow_one_start': {'left': one['left'], 'right': one['episodes'] - one['left'], 'episodes': one['episodes'],
                               'successes': one['successes']},
            **{name: {key: steps[name][key] for key in (*names, 'jerk_rms')} for name in ('fresh_average', 'warm_start')}},
        'controller': loop_facts(out, dds, steps),
        'training': facts,
        'machine': machine(),
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
    fresh, warm = results['studies']['fresh_average'], results['studies']['warm_start']
    console.print(f'     Flow from one start, {one["episodes"]} draws: {one["left"]} left, {one["right"]} right\n'
                  f'     Averaged chunks: fresh noise {fresh["successes"]}/{fresh["episodes"]}, '
                  f'warm start {warm["successes"]}/{warm["episodes"]}\n'
                  f'     {loop_line(results["controller"])}')


def demo(out: Path, config: Path, setup_s: float) -> None:
    """All stages. Raises DemoError, DataError, OSError."""
    from il_policies.lockstep import scenes
    contract = config / 'robots' / 'so101.yaml'
    stages = Stages(6, setup_s)
    with stages.stage(f'{DEMONSTRATIONS} demonstrations over DDS → bags'):
        record(out, contract, DEMONSTRATIONS)
    with stages.stage('bags → dataset'):
        usable, quality = to_dataset(out, contract)
    with stages.stage('training: BC and Flow, same data, same network, same budget'):
        flow, bc = (['--preset', config / 'policies' / f'{name}.yaml', '--threads', 1] for name in ('flow', 'bc'))
        # The one-sided control sees only the demonstrations round the left.
        left = [*bc, '--where', 'task=' + TASK.format(side='left')]
        facts = train(out, {'flow': flow, 'bc': bc, 'bc_left': left}, at_once=2)
    with stages.stage('closed loop: planner → chunks → 50 Hz controller → simulator'):
        dds = closed_loop(out, contract, ['bc', 'flow'], scenes(EPISODES_DDS, SCENES_SEED), STRIDE)
        results = summarise(out, dds, lockstep(out), facts)
    with stages.stage('report'):
        from il_runtime.demo import report
        results = {'demonstrations': usable, **results, 'dataset': quality, 'stages': stages.times, 'setup_s': setup_s,
                   'wall_s': stages.wall_s}
        write_json(out / 'results.json', results)
        report.write(out)
    results['wall_s'] = stages.wall_s
    write_json(out / 'results.json', results)
    show(results)
    console.print(f'\n[bold]{out / "report.html"}[/bold]   (numbers: {out / "results.json"}; {results["wall_s"]:.0f} s in all)')


def main() -> int:
    """Entry point; 0 done, 1 failed, 130 interrupted."""
    parser = argparse.ArgumentParser(prog='make demo', description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('demo_out'), help='folder for everything made (default: %(default)s)')
    parser.add_argument('--config', type=Path, default=Path('config'), help='configuration folder (default: %(default)s)')
    parser.add_argument('--images', action='store_true', help='the goal is seen by the camera only; into OUT/images')
    parser.add_argument('--fresh', action='store_true', help='start over')
    parser.add_argument('--setup-seconds', type=float, default=0.0, help='what setting up took, for the report [s]')
    arguments = parser.parse_args()
    # A graph of its own, on this machine only.
    os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    say: Callable[[str], None] = lambda text: print(f'demo: {text}', file=sys.stderr)  # noqa: E731
    try:
        with terminate_like_interrupt():
            out = arguments.out / 'images' if arguments.images else arguments.out
            for folder in MADE if arguments.fresh else ():
                shutil.rmtree(out / folder, ignore_errors=True)
            out.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(out).free < 1e9:
                raise DemoError(f'less than 1 GB of disk is free at {out.absolute()}')
            (demo_images if arguments.images else demo)(out, arguments.config, arguments.setup_seconds)
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
