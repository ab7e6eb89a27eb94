"""Planning that takes time: what a chunk is worth that is there only some steps after its observation.

An SO-101 goes round the pillar to a goal that slides along its arc, in lock-step, so that the delay is exact. Every policy draws
new noise for every chunk, but where a method says otherwise: two chunks may choose different ways, which shows at the seam. Who
drives smoothly into the pillar has gained nothing: smoothness stands beside success.

synchronous    the arm waits at its last target while the network thinks
naive          the newest chunk takes over as soon as it is there
ensembling     overlapping chunks are averaged; the best of BLENDS, chosen on other episodes
warm_start     naive, but the previous chunk enters the sampler half-way
rtc            naive, guided to continue the previous chunk (https://arxiv.org/abs/2506.07339), with β = 5 as there
rtc_20         the same with β = 20
training_rtc   naive, continuing the committed steps as trained (https://arxiv.org/abs/2512.05964), with PREFIX_NOISE
"""
from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from il_policies import checkpoint, parallel
from il_policies.bench import BenchError, publish, require_known
from il_policies.contract import Contract, load_contract
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode
from il_policies.lockstep import Episode, Execution, run_episodes, scenes
from il_policies.policies.flow import FlowConfig
from il_policies.policies.transformer import TransformerConfig
from il_policies.sim.reach_around import CONTROL_PERIOD, JOINTS, TASK, ReachAround, Scene, expert
from il_policies.train import TrainConfig, train

HORIZON = 16
STRIDE = 4
"""Steps between plans, or the delay, if that is longer."""
SYNCHRONOUS_STRIDE = 8
"""Steps that are executed before a synchronous planner is asked again."""
STEP_TICKS = 5
"""Control periods of a policy step."""
GOAL_SPEED = 0.06
"""About the shoulder [rad/s]: 1.5 cm/s."""
ACTION_NOISE = 0.003
"""Of the servos' targets, in demonstrations and episodes [rad]."""
PATH_NOISE = 0.003
"""Smooth deviation of the demonstrations' way [m]."""
BLENDS = (('newest_first', 0.1), ('newest_first', 0.5), ('oldest_first', 0.01), ('crossfade', 0.0))
"""Mode and m of the ensembling."""
TRANSFORMER = TransformerConfig(width=64, layers=3)
MAX_DELAY = HORIZON // 2
PREFIX_NOISE = 0.15
"""Of training-time RTC, see `FlowConfig`; 0 as published."""
BATCH = 32
"""Windows of a training step: on a CPU time is short, and more steps are worth more than less noise."""
METHODS = {
    'synchronous': Execution(SYNCHRONOUS_STRIDE, 'per_chunk', ensembling='latest', waits=True),
    'naive': Execution(STRIDE, 'per_chunk', ensembling='latest'),
    'ensembling': Execution(STRIDE, 'per_chunk'),
    'warm_start': Execution(STRIDE, 'warm_start', ensembling='latest'),
    'rtc': Execution(STRIDE, 'per_chunk', ensembling='latest', rtc='vjp'),
    'rtc_20': Execution(STRIDE, 'per_chunk', ensembling='latest', rtc='vjp', beta=20.0),
    'training_rtc': Execution(STRIDE, 'per_chunk', ensembling='latest', rtc='prefix'),
}
COLORS = dict(zip(METHODS, ('#8c8c8c', '#c44e52', '#dd8452', '#8172b3', '#4c72b0', '#64b5cd', '#55a868')))
RESAMPLES = 2000
"""Of the bootstrap."""


def moving(chosen: list[Scene], seed: int) -> list[Scene]:
    """The same scenes, whose goals slide, half of them first to the left."""
    turns = np.random.default_rng([seed, 2]).choice((-GOAL_SPEED, GOAL_SPEED), len(chosen))
    return [replace(scene, goal_speed=float(turn)) for scene, turn in zip(chosen, turns)]


def demonstrate(path: Path, contract: Contract, count: int, seed: int) -> Dataset:
    """A dataset of demonstrations made in lock-step, each scene round both sides; those that fail are left out."""
    features = {'joint_positions': Feature((6,), 'lowdim', JOINTS), 'goal': Feature((2,), 'lowdim', ('x', 'y'))}
    create(path, DatasetInfo(contract.policy_rate, features, ActionInfo(contract.action.joints), 'command', contract.to_dict(),
                             contract.hash))
    order = [JOINTS.index(name) for name in contract.action.joints]
    simulation, kept = ReachAround(camera=False), 0
    for i, scene in enumerate(moving(scenes((count + 1) // 2, seed, 'wide'), seed)):
        for side, word in ((1, 'left'), (-1, 'right')):
            targets = expert(scene, side, PATH_NOISE, np.random.default_rng([seed, i, 1]))
            slips = np.random.default_rng([seed, i, 3])
            simulation.reset(scene)
            seen = []
            for tick, target in enumerate(targets):
                if tick % STEP_TICKS == 0:
                    seen.append(simulation.observation())
                    slip = ACTION_NOISE * slips.standard_normal(6)
                simulation.step(target + slip)
            if simulation.reached and not simulation.touched:
                stamps = np.arange(len(seen)) * round(1e9 / contract.policy_rate)
                write_episode(path, kept, {name: np.array([row[name] for row in seen]) for name in features},
                              targets[::STEP_TICKS, order], stamps, np.zeros(len(seen), bool), {},
                              {'task': TASK.format(side=word), 'side': word}, {})
                kept += 1
    if kept < count // 2:
        raise BenchError(f'only {kept} of {count} demonstrations reached the goal')
    return Dataset(path)


def training(trained: str, minutes: float, seed: int, threads: int) -> TrainConfig:
    """How the policy of that name is trained: plain, or training_rtc."""
    options = {'rtc_max_delay': MAX_DELAY, 'rtc_prefix_noise': PREFIX_NOISE} if trained == 'training_rtc' else {}
    policy = FlowConfig(backbone='transformer', transformer=TRANSFORMER, **options)
    return TrainConfig(policy, horizon=HORIZON, batch_size=BATCH, minutes=minutes, seed=seed, threads=threads)


def execution_of(method: str, delay: int, blend: tuple[str, float] | None = None) -> Execution:
    """How a method is executed under a delay of so many policy steps; blend: mode and m of an ensembling."""
    base = METHODS[method]
    changed = {} if blend is None else {'ensembling': blend[0], 'm': blend[1]}
    return replace(base, delay=delay, stride=base.stride if base.waits else max(base.stride, delay), action_noise=ACTION_NOISE,
                   **changed)


def seam_jumps(targets: np.ndarray, arrivals: list[int]) -> np.ndarray:
    """How abruptly each new chunk but the first takes over, one number a seam [rad/s]. Shape (at most len(arrivals) - 1,).

    The largest change, of any joint, between the velocity of the targets (N, D) with which the seam is reached and those within
    one policy step after it, from control period to control period. A seam at the very end counts as far as it is seen.
    """
    velocity = np.diff(targets, axis=0) / CONTROL_PERIOD  # row k: from k to k + 1
    jumps = [np.abs(velocity[tick:tick + STEP_TICKS] - velocity[tick - 1]).max() for tick in arrivals[1:] if tick < len(velocity)]
    return np.array(jumps)


def rms_jerk(path: np.ndarray) -> float:
    """Root mean square of the third difference of a path (N, D) from policy step to policy step, in its unit/s³, or NaN.

    path: one row a control period. Between the steps targets are joined by straight lines; their corners, which whoever follows
    chunks has alike, make a jerk from control period to control period in which seams would not show: that of the demonstrations
    at 10 Hz is nine tenths of that of naive switching.
    """
    thirds = np.diff(path[::STEP_TICKS], n=3, axis=0) / (STEP_TICKS * CONTROL_PERIOD) ** 3
    return float(np.sqrt(np.mean(thirds ** 2))) if thirds.size else float('nan')


def measure(episode: Episode) -> dict[str, float]:
    """An episode in numbers."""
    jumps = seam_jumps(episode.targets, episode.arrivals)
    return {'success': float(episode.success), 'touched': float(episode.touched),
            'time': episode.duration if episode.success else float('nan'),
            'seam': jumps.max() if len(jumps) else float('nan'), 'jerk': rms_jerk(episode.commands),
            'tip_jerk': rms_jerk(episode.tips)}


@dataclass(frozen=True)
class Job:
    """A method under a delay."""

    folder: Path
    """Checkpoint."""
    execution: Execution
    scenes: list[Scene]
    seed: int


def work(job: Job, tell: parallel.Tell) -> dict[str, np.ndarray]:
    """The numbers of each episode, by name, (number of scenes,)."""
    torch.set_num_threads(1)
    rows = [measure(episode) for episode in run_episodes(checkpoint.load(job.folder), job.scenes, job.seed, job.execution, tell)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def run_jobs(jobs: list[Job], processes: int, what: str) -> list[dict[str, np.ndarray]]:
    """Their results, in their order. Raises BenchError if a process dies."""
    results = {}
    for i, result in parallel.run(work, jobs, processes, lambda i, share: None):
        if isinstance(result, parallel.WorkerDied):
            raise BenchError(f'{what}: {result}')
        results[i] = result
        print(f'{what}: {len(results)} of {len(jobs)}', flush=True)
    return [results[i] for i in range(len(jobs))]


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, 1927)."""
    p, zz = successes / n, z * z / n
    half = z * np.sqrt(p * (1.0 - p) / n + zz / (4.0 * n))
    return float((p + zz / 2.0 - half) / (1.0 + zz)), float((p + zz / 2.0 + half) / (1.0 + zz))


def bootstrap(statistic, *values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """statistic of the values, (n,) each, and its 95 % interval when the n are drawn anew, the same for all values.

    statistic: takes arrays (..., n) and gives (...). NaN where it cannot be told.
    """
    draws = np.random.default_rng(seed).integers(len(values[0]), size=(RESAMPLES, len(values[0])))
    drawn = statistic(*(value[draws] for value in values))
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (np.nan, np.nan)
    return float(statistic(*values)), float(low), float(high)


def mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is there; NaN if nothing is."""
    there = np.isfinite(values)
    return np.where(there, values, 0.0).sum(axis=-1) / np.where(there.any(axis=-1), there.sum(axis=-1), np.nan)


def ratio(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of the means of paired values, over the pairs of which both are there."""
    there = np.isfinite(values) & np.isfinite(reference)
    below = mean(np.where(there, reference, np.nan))
    return mean(np.where(there, values, np.nan)) / np.where(below == 0.0, np.nan, below)


def difference(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of the means of paired values."""
    return mean(values) - mean(reference)


def best_blend(tried: dict[tuple[str, float], dict[str, np.ndarray]]) -> tuple[str, float]:
    """The mode and m with the most successes; among equals the one with the smallest jump at the seams."""
    return max(tried, key=lambda blend: (tried[blend]['success'].sum(), -np.nan_to_num(mean(tried[blend]['seam']), nan=np.inf)))


def verdict(cells: dict[tuple[int, str], dict[str, np.ndarray]], delay: int, method: str = 'rtc') -> dict:
    """Is the method at most half as rough as naive switching, outside the confidence interval, and as successful as the best?"""
    own, naive = cells[delay, method], cells[delay, 'naive']
    best = max((name for d, name in cells if d == delay), key=lambda name: cells[delay, name]['success'].mean())
    seam, jerk = (bootstrap(ratio, own[name], naive[name]) for name in ('seam', 'jerk'))
    lost = bootstrap(difference, own['success'], cells[delay, best]['success'])
    return {'delay': delay, 'method': method, 'seam_ratio': seam, 'jerk_ratio': jerk, 'seam_halved': seam[2] <= 0.5,
            'jerk_halved': jerk[2] <= 0.5, 'best_success': best, 'success_difference': lost, 'no_worse': lost[2] >= 0.0}


def run(out: Path = Path('bench_out'), methods: tuple[str, ...] = tuple(METHODS), delays: tuple[int, ...] = (0, 4, 8),
        episodes: int = 100, minutes: float = 2.0, demonstrations: int = 200, seed: int = 0, processes: int = 1,
        threads: int = 2, contract: Path = Path('config/robots/so101.yaml')) -> dict:
    """Planning under delay: jump at the seams, jerk and success of the ways to switch from chunk to chunk.

    Args:
        out: Folder for delay.json, delay.png and the checkpoints, which are used again.
        methods: Which of synchronous, naive, ensembling, warm_start, rtc, rtc_20 and training_rtc; naive must be among them, for
            the others are compared to it.
        delays: Policy steps from an observation until its chunk is there, at most half a chunk.
        episodes: Starts and goals, the same for all.
        minutes: Training time of each of the two policies [min].
        demonstrations: How many to train on, made in the simulator.
        seed: Seed of demonstrations, training, starts and noise.
        processes: Processes for the episodes.
        threads: CPU threads of the training.
        contract: The simulated robot.
    """
    require_known(methods, tuple(METHODS), 'methods')
    if 'naive' not in methods:
        raise BenchError(f'methods are {", ".join(methods)}, must have naive')
    if not delays or not all(0 <= delay <= MAX_DELAY for delay in delays):
        raise BenchError(f'delays are {", ".join(map(str, delays)) or "none"}, must be from 0 to {MAX_DELAY}')
    if not minutes > 0.0 or episodes < 2 or demonstrations < 2 or processes < 1:
        raise BenchError(f'minutes is {minutes:g}, must be > 0; episodes is {episodes} and demonstrations {demonstrations}, must '
                         f'be at least 2; processes is {processes}, must be at least 1')
    folders = {trained: out / 'checkpoints' / f'delay_{trained}' for trained in ('plain', 'training_rtc')
               if (trained == 'training_rtc') in {method == 'training_rtc' for method in methods}}
    with tempfile.TemporaryDirectory() as scratch:
        data = demonstrate(Path(scratch) / 'demonstrations', load_contract(contract), demonstrations, seed)
        made = len(data)
        for trained, folder in folders.items():
            train(data, training(trained, minutes, seed, threads), folder, resume=True)

    def job(method: str, delay: int, chosen: list[Scene], job_seed: int, blend: tuple[str, float] | None = None) -> Job:
        return Job(folders['training_rtc' if method == 'training_rtc' else 'plain'], execution_of(method, delay, blend), chosen,
                   job_seed)

    blends = {}
    if 'ensembling' in methods:
        others = moving(scenes(max(2, episodes // 4), 2000 + seed, 'wide'), 2000 + seed)
        places = [(delay, blend) for delay in delays for blend in BLENDS]
        tried = run_jobs([job('ensembling', delay, others, 2000 + seed, blend) for delay, blend in places], processes,
                         'choosing the ensembling')
        for delay in delays:
            blends[delay] = best_blend({blend: result for (d, blend), result in zip(places, tried) if d == delay})
    chosen = moving(scenes(episodes, 1000 + seed, 'wide'), 1000 + seed)
    places = [(delay, method) for delay in delays for method in methods]
    cells = dict(zip(places, run_jobs([job(method, delay, chosen, 1000 + seed, blends[delay] if method == 'ensembling' else None)
                                       for delay, method in places], processes, 'delay')))

    rows = [_row(delay, method, cells[delay, method], cells[delay, 'naive'],
                 '{} m={:g}'.format(*blends[delay]) if method == 'ensembling' else '') for delay, method in places]
    verdicts = [verdict(cells, delay, method) for delay, method in places if delay and METHODS[method].rtc != 'off']
    budget = (f'{made} demonstrations, {minutes:g} min of training each, {episodes} paired starts and noises a cell, '
              f'H = {HORIZON}, steps of 0.1 s')
    numbers = {f'{delay} {method}': {name: _plain(values) for name, values in cell.items()}
               for (delay, method), cell in cells.items()}
    plain = [{name: _plain(value) if isinstance(value, tuple) else value for name, value in found.items()} for found in verdicts]
    result = publish('delay', budget, rows, out, _plot(cells, delays, methods), seed=seed, verdicts=plain, episodes=numbers)
    for found in verdicts:
        print(_words(found))
    return result


def _row(delay: int, method: str, cell: dict[str, np.ndarray], naive: dict[str, np.ndarray], how: str) -> dict:
    n = len(cell['success'])
    low, high = wilson(cell['success'].sum(), n)

    def against(name: str) -> str | None:
        return None if cell is naive else '{:.2f} [{:.2f}, {:.2f}]'.format(*bootstrap(ratio, cell[name], naive[name]))

    gained = bootstrap(difference, cell['success'], naive['success'])
    time = float(mean(cell['time']))
    return {'method': f'{method} {how}'.strip(), 'delay': delay,
            'success_%': f'{100 * cell["success"].mean():.0f} [{100 * low:.0f}, {100 * high:.0f}]',
            'over_naive_%': None if cell is naive else '{:+.0f} [{:+.0f}, {:+.0f}]'.format(*(100 * x for x in gained)),
            'touched_%': 100.0 * float(cell['touched'].mean()), 'time_s': None if np.isnan(time) else time,
            'seam_rad/s': '{:.2f} [{:.2f}, {:.2f}]'.format(*bootstrap(mean, cell['seam'])), 'seam_to_naive': against('seam'),
            'jerk_rad/s3': '{:.0f} [{:.0f}, {:.0f}]'.format(*bootstrap(mean, cell['jerk'])), 'jerk_to_naive': against('jerk')}


def _plain(values) -> list[float | None]:
    """For JSON, which knows no NaN."""
    return [None if np.isnan(x) else float(x) for x in values]


def _words(found: dict) -> str:
    return ('d = {delay}, {method}: seam jump {:.2f} [{:.2f}, {:.2f}] and jerk {:.2f} [{:.2f}, {:.2f}] of naive switching; '
            'success {:+.0f} % [{:+.0f}, {:+.0f}] against the best, {best_success}').format(
                *found['seam_ratio'], *found['jerk_ratio'], *(100 * x for x in found['success_difference']), **found)


def _plot(cells: dict[tuple[int, str], dict[str, np.ndarray]], delays: tuple[int, ...], methods: tuple[str, ...]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 3.6), layout='constrained')
    panels = figure.subplots(1, 3)
    width = 0.8 / len(methods)
    for k, method in enumerate(methods):
        at = np.arange(len(delays)) + (k - (len(methods) - 1) / 2) * width
        here = [cells[delay, method] for delay in delays]
        success = [100.0 * np.array((cell['success'].mean(), *wilson(cell['success'].sum(), len(cell['success']))))
                   for cell in here]
        seam, jerk = ([bootstrap(mean, cell[name]) for cell in here] for name in ('seam', 'jerk'))
        for axes, values in zip(panels, (success, seam, jerk)):
            middle, low, high = np.array(values).T
            axes.bar(at, middle, width, yerr=np.maximum(0.0, (middle - low, high - middle)), color=COLORS[method], label=method,
                     error_kw={'elinewidth': 0.8, 'ecolor': '0.2'})
    for axes, title in zip(panels, ('goal reached [%]', 'jump at the worst seam [rad/s]', 'jerk of the commands [rad/s³]')):
        axes.set(title=title, xticks=range(len(delays)), xticklabels=delays, xlabel='delay [steps of 0.1 s]')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=len(methods), frameon=False)
    return figure
