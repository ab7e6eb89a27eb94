"""The quick start with images: where the goal is, only the camera shows."""
from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.table import Table

from il_policies.sim.reach_around import REACH_TOLERANCE, Scene
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

DEMONSTRATIONS = 120
EPISODES_DDS, EPISODES_LOCKSTEP = 20, 50
GOALS = 'wide'
STRIDE = 4
"""Half the quick start's: what was seen of the goal is corrected more often."""


def lockstep(out: Path, chosen: list[Scene]) -> dict[str, dict]:
    """The same starts and goals twice without DDS: with the right camera images, and with those of other episodes."""
    from il_runtime.demo.rollouts import in_lockstep
    results: dict[str, dict] = {}
    # Spawned: a forked torch may hang on the threads of its parent.
    with ProcessPoolExecutor(2, mp_context=get_context('spawn')) as pool, bar('lock-step studies', 2) as advance:
        futures = {pool.submit(in_lockstep, out / 'checkpoints' / 'flow', chosen, SCENES_SEED, {'stride': STRIDE},
                               out / 'rollouts' / f'{name}.npz', shuffled=name == 'shuffled'): name
                   for name in ('flow', 'shuffled')}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            advance(len(results), futures[future])
    return results


def ended_at_shown(out: Path) -> int:
    """How many runs with images of the next episode ended within tolerance of the goal in them."""
    with np.load(out / 'rollouts' / 'shuffled.npz') as saved:
        ends, goals = saved['tips'][saved['ends'] - 1, :2], np.roll(saved['goals'], -1, axis=0)
    return int((np.linalg.norm(ends - goals, axis=1) < REACH_TOLERANCE).sum())


def chance(scenes: list[Scene]) -> float:
    """Share of pairs of different scenes whose goals are so near to each other that who goes to one reaches the other."""
    goals = np.array([scene.goal for scene in scenes])
    near = np.linalg.norm(goals[:, None] - goals, axis=-1) < REACH_TOLERANCE
    return float(near[~np.eye(len(goals), dtype=bool)].mean())


def show(results: dict) -> None:
    """The table in the terminal."""
    table = Table(title='reach_around: the goal is seen by the camera only, on an arc of 20 cm')
    for column in ('Flow sees', 'goal reached in time', 'pillar contacts'):
        table.add_column(column, justify='left' if column == 'Flow sees' else 'right')
    flow, shuffled = results['flow'], results['shuffled']
    for name, counts in (('over DDS, real time', results['dds']), ('in lock-step', flow),
                         ('in lock-step, images of other episodes', shuffled)):
        table.add_row(name, f'{counts["successes"]}/{counts["episodes"]}', str(counts['touched']))
    console.print(table)
    console.print(f'     Chance: {100 * results["chance"]:.0f} % of goals lie within tolerance of another episode\'s\n'
                  f'     {loop_line(results["controller"])}')


def demo_images(out: Path, config: Path, setup_s: float) -> None:
    """All stages. Raises DemoError, DataError, OSError."""
    from il_policies.lockstep import scenes
    contract = config / 'robots' / 'so101.yaml'
    stages = Stages(6, setup_s)
    with stages.stage(f'{DEMONSTRATIONS} demonstrations over DDS, goals on an arc of 20 cm → bags'):
        record(out, contract, DEMONSTRATIONS, GOALS)
    with stages.stage('bags → dataset'):
        usable, quality = to_dataset(out, contract)
    with stages.stage('training: Flow sees joint positions and the camera, not the goal'):
        facts = train(out, {'flow': ['--preset', config / 'policies' / 'flow_images.yaml']})
    with stages.stage('closed loop: camera → planner → chunks → 50 Hz controller → simulator'):
        dds = closed_loop(out, contract, ['flow'], scenes(EPISODES_DDS, SCENES_SEED, GOALS), STRIDE)
        chosen = scenes(EPISODES_LOCKSTEP, SCENES_SEED, GOALS)
        steps = lockstep(out, chosen)
    names = ('successes', 'episodes', 'touched')
    results = {'demonstrations': usable, 'dds': {key: dds['flow'][key] for key in names},
               **{name: {key: result[key] for key in names} for name, result in steps.items()},
               'chance': round(chance(chosen), 4), 'controller': loop_facts(out, dds, steps), 'training': facts,
               'machine': machine(), 'dataset': quality}
    results['shuffled']['at_shown'] = ended_at_shown(out)
    with stages.stage('report'):
        from il_runtime.demo import report_images
        results |= {'stages': stages.times, 'setup_s': setup_s, 'wall_s': stages.wall_s}
        write_json(out / 'results.json', results)
        report_images.write(out)
    results['wall_s'] = stages.wall_s
    write_json(out / 'results.json', results)
    show(results)
    console.print(f'\n[bold]{out / "report.html"}[/bold]   (numbers: {out / "results.json"}; {results["wall_s"]:.0f} s in all)')
