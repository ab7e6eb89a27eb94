"""PushT from human demonstrations under Diffusion Policy's protocol, and the score against the number of sampler steps."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro
from rich.console import Console

from il_policies.bench import COLORS, BenchError, publish, require_known
from il_policies.data.store import Dataset
from il_policies.evaluate import evaluate_pusht
from il_policies.policies import Policy
from il_policies.train import load_preset, train

POLICIES = ('bc', 'act', 'diffusion', 'flow')
SAMPLER_STEPS = {'flow': ('euler_steps', (1, 2, 5, 10)), 'diffusion': ('inference_steps', (4, 8, 16, 100))}
"""Sampling policy → the option that says how many steps a chunk takes, and those tried."""


def run(dataset: tyro.conf.Positional[Path], out: Path = Path('bench_out'),
        policies: tuple[str, ...] = ('diffusion', 'flow'), minutes: float = 15.0, episodes: int = 50,
        seed: int = 0, threads: int = 2, presets: Path = Path('config/policies')) -> dict:
    """PushT, seen as keypoints: the score of Diffusion Policy's protocol for each policy and number of sampler steps.

    Args:
        dataset: Dataset of PushT: il import npz or il import zarr of Diffusion Policy's data.
        out: Folder for pusht.json, pusht.png and the checkpoints; those already trained this way are used again.
        policies: Which of bc, act, diffusion and flow.
        minutes: Training time of each [min]; 15 minutes on 2 cores are 30 CPU minutes.
        episodes: Starts, the same for all.
        seed: Seed of training; the starts are the protocol's own.
        threads: CPU threads.
        presets: Folder with the presets diffusion_pusht.yaml, flow_pusht.yaml, …
    """
    require_known(policies, POLICIES, 'policies')
    if not minutes > 0.0 or episodes < 1:
        raise BenchError(f'minutes is {minutes:g}, must be > 0; episodes is {episodes}, must be at least 1')
    data, rows = Dataset(dataset), []
    for kind in policies:
        config = replace(load_preset(presets / f'{kind}_pusht.yaml'), minutes=minutes, steps=None, seed=seed, threads=threads)
        policy = train(data, config, out / 'checkpoints' / f'{kind}_pusht', resume=True)
        facts = policy.extra['training']
        for sampler in _samplers(policy):
            with Console(stderr=True).status(f'{kind}: {episodes} episodes with {sampler[0]} sampler steps'):
                result = evaluate_pusht(sampler[1], episodes)
            rows.append({'policy': kind, 'sampler_steps': sampler[0], 'score': result['score'],
                         'above_0.95_coverage': result['above_095_coverage'], 'steps': facts['steps'],
                         'parameters_k': facts['parameters'] / 1e3, 'training_s': facts['seconds']})
    return publish('pusht', f'{minutes:g} min of training each; {result["protocol"]}', rows, out, _plot(rows), seed=seed,
                   dataset=data.hash)


def _samplers(policy: Policy):
    """The policy with each number of sampler steps, its own training's among them."""
    if policy.kind not in SAMPLER_STEPS:
        yield 1, policy
        return
    option, numbers = SAMPLER_STEPS[policy.kind]
    config = policy.config
    for n in sorted({*numbers, getattr(config, option)}):
        policy.config = replace(config, **{option: n})
        yield n, policy
    policy.config = config


def _plot(rows: list[dict]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout='constrained')
    axes = figure.subplots()
    for kind in dict.fromkeys(row['policy'] for row in rows):
        mine = [row for row in rows if row['policy'] == kind]
        axes.plot([row['sampler_steps'] for row in mine], [row['score'] for row in mine], 'o-', color=COLORS[kind], label=kind)
    axes.set(xscale='log', xlabel='steps of the sampler a chunk', ylabel='score', ylim=(0.0, 1.0))
    axes.legend()
    return figure
