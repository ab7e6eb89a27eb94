"""Training: how long an optimiser step takes, of each preset, in float32 and with bfloat16 autocast."""
from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from il_policies.bench import BenchError, publish
from il_policies.checkpoint import POLICIES
from il_policies.policies import PolicySpec
from il_policies.policies.normalize import Normalizer
from il_policies.train import autocast, load_preset, make_optimizer

STATE, IMAGE = (14,), (96, 96, 3)
"""What the presets' observations stand for here: numbers, or images of the camera 'front'."""


def run(presets: tuple[Path, ...] = tuple(Path(f'config/policies/{kind}.yaml') for kind in POLICIES),
        out: Path = Path('bench_out'), rounds: int = 10, threads: int = 2) -> dict:
    """How long an optimiser step takes with each preset, on random data of 14 numbers, cameras of 96 by 96, and 14 joints.

    Args:
        presets: YAML files, such as those in config/policies.
        out: Folder for training.json and training.png.
        rounds: Steps of each preset and precision, in turn.
        threads: CPU threads.
    """
    if not presets or rounds < 3:
        raise BenchError(f'presets are {list(map(str, presets))}, must not be empty; rounds is {rounds}, must be at least 3')
    torch.set_num_threads(threads)
    rows = []
    for preset in presets:
        with Console(stderr=True).status(str(preset)):
            rows += _timed(preset, rounds)
    return publish('training', f'median of {rounds} steps, {threads} threads', rows, out, _plot(rows))


def _timed(preset: Path, rounds: int) -> list[dict]:
    config = load_preset(preset)
    policy_type, _ = POLICIES[config.kind]
    spec = PolicySpec({name: IMAGE if name == 'front' else STATE for name in config.observations or ('state',)},
                      tuple(f'joint_{i}' for i in range(STATE[0])), config.horizon, config.history, 0.1, 0.0)
    rng, B = np.random.default_rng(0), config.batch_size
    torch.manual_seed(0)
    normalizer = Normalizer.fit({name: rng.uniform(-1.0, 1.0, (100, *STATE)) for name in [*spec.lowdim, 'action']})
    policy = policy_type(spec, config.policy, normalizer)
    batch = {'observation': {name: torch.randint(0, 256, (B, spec.history, *shape), dtype=torch.uint8) if name in spec.images
                             else torch.rand(B, spec.history, *shape) for name, shape in spec.features.items()},
             'action': torch.rand(B, spec.horizon, *STATE), 'valid': torch.ones(B, spec.horizon, dtype=torch.bool)}
    optimizer = make_optimizer(policy, config)
    took: dict[str, list[float]] = {'fp32': [], 'bf16': []}
    for i in range(rounds + 2):  # two rounds to warm up
        for precision, values in took.items():
            began = time.perf_counter()
            with autocast(replace(config, precision=precision), torch.device('cpu')):
                loss = policy.loss(batch)['loss']
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if i >= 2:
                values.append(1e3 * (time.perf_counter() - began))
    return [{'preset': preset.stem, 'precision': precision, 'median_ms': float(np.median(values)), 'batch': B,
             'samples_per_s': 1e3 * B / float(np.median(values)),
             'parameters_k': sum(p.numel() for p in policy.parameters()) / 1e3}
            for precision, values in took.items()]


def _plot(rows: list[dict]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 0.6 + 0.33 * len(rows)), layout='constrained')
    axes = figure.subplots()
    axes.barh([f'{row["preset"]}, {row["precision"]}' for row in rows], [row['median_ms'] for row in rows],
              color=['#4c72b0' if row['precision'] == 'fp32' else '#55a868' for row in rows])
    axes.set(xlabel='an optimiser step [ms]')
    axes.invert_yaxis()
    return figure
