"""The four policies on the same demonstrations with the same budget, in closed loop on reach_around.

All see the same observations, plan at the same stride and are executed by the same controller. Smoothness is shown beside success
only: who drives straight through the pillar is smooth too.
"""
from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console

from il_policies import deploy
from il_policies.bench import COLORS, BenchError, publish, require_known
from il_policies.data.store import Dataset
from il_policies.lockstep import Episode, Execution, run_episodes, scenes
from il_policies.policies import Policy
from il_policies.train import load_preset, train

POLICIES = ('bc', 'act', 'diffusion', 'flow')


def run(dataset: tyro.conf.Positional[Path], out: Path = Path('bench_out'), policies: tuple[str, ...] = POLICIES,
        minutes: float = 3.0, episodes: int = 100, stride: int = 4, seed: int = 0, threads: int = 2,
        presets: Path = Path('config/policies')) -> dict:
    """BC, ACT, Diffusion Policy and Flow on reach_around: same demonstrations, same training time, same starts.

    Args:
        dataset: Demonstrations of reach_around, such as demo_out/dataset of make demo.
        out: Folder for methods.json, methods.png and the checkpoints; those already trained this way are used again.
        policies: Which of bc, act, diffusion and flow.
        minutes: Training time of each [min].
        episodes: Starts and goals, the same for all.
        stride: Policy steps between plans.
        seed: Seed of training, starts and noise.
        threads: CPU threads.
        presets: Folder with the presets bc.yaml, act.yaml, diffusion.yaml and flow.yaml.
    """
    require_known(policies, POLICIES, 'policies')
    if not minutes > 0.0 or episodes < 1:
        raise BenchError(f'minutes is {minutes:g}, must be > 0; episodes is {episodes}, must be at least 1')
    data, chosen = Dataset(dataset), scenes(episodes, 1000 + seed)
    rows, paths = [], {}
    for kind in policies:
        folder = out / 'checkpoints' / kind
        config = replace(load_preset(presets / f'{kind}.yaml'), minutes=minutes, steps=None, seed=seed, threads=threads)
        trained = train(data, config, folder, resume=True)
        if not (folder / deploy.FOLDER).exists():
            deploy.export(folder)
        policy = deploy.load(folder, 'auto', threads)
        with Console(stderr=True).status(f'{kind}: {episodes} episodes'):
            done = run_episodes(policy, chosen, seed, Execution(stride=stride))
        facts = trained.extra['training']
        rows.append({'policy': kind, 'success_%': 100.0 * float(np.mean([episode.success for episode in done])),
                     'touched_%': 100.0 * float(np.mean([episode.touched for episode in done])),
                     'parameters_k': facts['parameters'] / 1e3, 'steps': facts['steps'], 'training_s': facts['seconds'],
                     'chunk_ms': _latency(policy), 'jerk_rad/s3': _jerk(done)})
        paths[kind] = done
    budget = f'{len(data)} demonstrations, {minutes:g} min of training each, {episodes} starts, a plan every {stride} steps'
    return publish('methods', budget, rows, out, _plot(paths, rows), seed=seed, dataset=data.hash)


def _latency(policy: Policy, rounds: int = 30) -> float:
    """Median time of a chunk [ms], of one observation at a time."""
    spec, took = policy.spec, []
    observation = {name: torch.zeros((1, spec.history, *shape), dtype=torch.uint8 if name in spec.images else torch.float32)
                   for name, shape in spec.features.items()}
    for _ in range(rounds):
        began = time.perf_counter()
        policy.predict(observation)
        took.append(1e3 * (time.perf_counter() - began))
    return float(np.median(took))


def _jerk(done: list[Episode]) -> float:
    """Root mean square of the third difference of commands at 50 Hz, over all joints and successful episodes [rad/s³]."""
    thirds = [np.diff(episode.commands, n=3, axis=0).ravel() / 0.02 ** 3 for episode in done if episode.success]
    return float(np.sqrt(np.mean(np.concatenate(thirds) ** 2))) if thirds else float('nan')


def _plot(paths: dict[str, list[Episode]], rows: list[dict]):
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    from il_policies.sim.reach_around import PILLAR, PILLAR_RADIUS

    figure = Figure(figsize=(3.1 * len(paths), 3.4), layout='constrained')
    for axes, row, (kind, done) in zip(figure.subplots(1, len(paths), squeeze=False)[0], rows, paths.items()):
        axes.add_patch(Circle(PILLAR[::-1], PILLAR_RADIUS, color='0.75', zorder=0))
        for episode in done:
            axes.plot(episode.tips[:, 1], episode.tips[:, 0], color=COLORS[kind] if episode.success else '0.25', alpha=0.4,
                      linewidth=0.8)
        axes.set(title=f'{kind}: {row["success_%"]:.0f} % reach the goal', xlim=(0.15, -0.15), ylim=(0.07, 0.32), aspect='equal',
                 xlabel='y [m]', ylabel='x [m]')
    return figure
