"""Inference: how long a chunk takes, of each policy at sizes that others publish, by each backend.

Weights are random: time does not depend on them. The backends take turns, so that a noisy machine is noisy for all.
"""
from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console

from il_policies import checkpoint, deploy
from il_policies.bench import BenchError, publish, require_known
from il_policies.policies import Policy, PolicySpec
from il_policies.policies.act import ACT, ACTConfig
from il_policies.policies.diffusion import Diffusion, DiffusionConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from il_policies.policies.unet import UNetConfig


def _unet(*down_dims: int) -> UNetConfig:
    return UNetConfig(down_dims=down_dims, blocks=2, time_size=128)


PUSHT = PolicySpec({'state': (18,)}, ('x', 'y'), 16, 2, 0.1, 0.0)
ALOHA = PolicySpec({'state': (14,)}, tuple(f'joint_{i}' for i in range(14)), 100, 1, 0.02, 0.0)
CASES: dict[str, tuple[Callable, PolicySpec, object, float | None]] = {
    'act-512': (ACT, ALOHA, ACTConfig(), 21.0),
    'diffusion-64-ddim-10': (Diffusion, PUSHT, DiffusionConfig(_unet(64, 128, 256)), 58.0),
    'diffusion-64-ddpm-100': (Diffusion, PUSHT, DiffusionConfig(_unet(64, 128, 256), 100, 'ddpm'), 594.0),
    'diffusion-256-ddim-10': (Diffusion, PUSHT, DiffusionConfig(_unet(256, 512, 1024)), 490.0),
    'flow-64-euler-5': (Flow, PUSHT, FlowConfig(_unet(64, 128, 256), 5), None),
}
"""Case → policy, what it sees and gives, its configuration, and what LeRobot 0.4.4 took for it on two cores of a machine such as
the project's own [ms]."""


def run(out: Path = Path('bench_out'), cases: tuple[str, ...] = tuple(CASES), rounds: int = 20, threads: int = 2,
        backends: tuple[Literal['torch', 'onnxruntime', 'openvino'], ...] = ()) -> dict:
    """How long a chunk takes, one at a time, by PyTorch, ONNX Runtime and, where installed, OpenVINO.

    Args:
        out: Folder for inference.json and inference.png.
        cases: Policies and sizes.
        rounds: Chunks of each backend, in turn.
        threads: CPU threads.
        backends: Backends; none: all that are installed.
    """
    require_known(cases, tuple(CASES), 'cases')
    if rounds < 3:
        raise BenchError(f'rounds is {rounds}, must be at least 3')
    backends = backends or ('torch', *filter(deploy.installed, deploy.ENGINES))
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder, Console(stderr=True).status(case):
            policies = _prepared(case, Path(folder), backends, threads)
            rows += _timed(case, policies, rounds)
    return publish('inference', f'batch 1, {threads} threads, median of {rounds} rounds', rows, out, _plot(rows))


def _prepared(case: str, folder: Path, backends: tuple[str, ...], threads: int) -> dict[str, Policy]:
    policy_type, spec, config, _ = CASES[case]
    torch.manual_seed(0)
    numbers = {**{name: shape[0] for name, shape in spec.features.items()}, 'action': len(spec.action_names)}
    rng = np.random.default_rng(0)
    normalizer = Normalizer.fit({name: rng.uniform(-1.0, 1.0, (100, size)) for name, size in numbers.items()})
    checkpoint.save(folder / 'policy', policy_type(spec, config, normalizer), {})
    if set(backends) - {'torch'}:
        deploy.export(folder / 'policy')
    return {backend: deploy.load(folder / 'policy', backend, threads) for backend in backends}


def _timed(case: str, policies: dict[str, Policy], rounds: int) -> list[dict]:
    spec, lerobot = CASES[case][1], CASES[case][3]
    generator = torch.Generator().manual_seed(0)
    observation = {name: torch.rand((1, spec.history, *shape), generator=generator) for name, shape in spec.features.items()}
    noise = torch.randn((1, spec.horizon, len(spec.action_names)), generator=generator)
    took: dict[str, list[float]] = {backend: [] for backend in policies}
    chunks = {}
    for i in range(rounds + 1):
        for backend, policy in policies.items():
            # Not the first pass of a turn: the other backends, which no robot runs besides, pushed its weights out of the caches.
            for again in range(2):
                torch.manual_seed(0)  # DDPM draws at every step
                began = time.perf_counter()
                chunks[backend] = policy.predict(observation, noise=noise)
                if i and again:
                    took[backend].append(1e3 * (time.perf_counter() - began))
    median = {backend: float(np.median(values)) for backend, values in took.items()}
    reference = chunks.get('torch')
    return [{'case': case, 'backend': backend, 'median_ms': median[backend], 'p10_ms': float(np.quantile(took[backend], 0.1)),
             'p90_ms': float(np.quantile(took[backend], 0.9)),
             'times_torch': median['torch'] / median[backend] if 'torch' in median else None,
             'LeRobot_0.4.4_ms': lerobot, 'times_LeRobot': lerobot / median[backend] if lerobot else None,
             'off_torch': float((chunks[backend] - reference).abs().max()) if reference is not None else None}
            for backend in policies]


def _plot(rows: list[dict]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 0.5 + 0.33 * len(rows)), layout='constrained')
    axes = figure.subplots()
    labels = [f'{row["case"]}, {row["backend"]}' for row in rows]
    colours = {'torch': '0.6', 'onnxruntime': '#4c72b0', 'openvino': '#55a868'}
    axes.barh(labels, [row['median_ms'] for row in rows], color=[colours[row['backend']] for row in rows])
    for i, row in enumerate(rows):
        if row['LeRobot_0.4.4_ms']:
            axes.plot([row['LeRobot_0.4.4_ms']] * 2, [i - 0.4, i + 0.4], color='#c44e52')
    axes.set(xscale='log', xlabel='a chunk, batch 1 [ms]; red: LeRobot 0.4.4, elsewhere')
    axes.invert_yaxis()
    return figure
