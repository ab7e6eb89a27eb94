"""Two ways round an obstacle, in the plane: what averages is invalid.

A point goes from a start at the left to a goal at the right; half of the demonstrations pass the disc between them above, half
below. A chunk is the whole way. It is valid if it keeps off the disc and ends at the goal. Each policy is trained twice: on one
side only, where all must succeed, and on both.
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from il_policies.bench import COLORS, BenchError, publish, require_known
from il_policies.policies import Policy, PolicySpec
from il_policies.policies.act import ACT, ACTConfig
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.diffusion import Diffusion, DiffusionConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from il_policies.policies.unet import UNetConfig

HORIZON = 16
DISC, RADIUS = (0.5, 0.0), 0.15
DETOUR = 0.3
"""How far from the straight way the demonstrations pass."""
TOLERANCE = 0.05
"""Largest distance of the last step from the goal."""
SPREAD = 0.02
"""Standard deviation of a demonstration's detour."""
UNET = UNetConfig(down_dims=(32, 64), time_size=32)
KL_WEIGHTS = (0.01, 0.1, 1.0, 10.0)
"""β of ACT that are tried; the best one is reported as 'act'."""
SPEC = PolicySpec({'ends': (4,)}, ('x', 'y'), HORIZON, 1, 0.1, 0.0)
POLICIES = ('bc', 'act', 'diffusion', 'flow')


def demonstrations(n: int, rng: np.random.Generator, sides: tuple[int, ...] = (-1, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Starts and goals (n, 4), and ways (n, HORIZON, 2), by turns on each of the sides (-1 below, 1 above)."""
    start = np.stack([rng.uniform(-0.02, 0.02, n), rng.uniform(-0.05, 0.05, n)], axis=1)
    goal = np.stack([rng.uniform(0.98, 1.02, n), rng.uniform(-0.05, 0.05, n)], axis=1)
    part = np.linspace(0.0, 1.0, HORIZON)[None, :, None]
    side = np.resize(sides, n) * (DETOUR + SPREAD * rng.standard_normal(n))
    ways = start[:, None] + part * (goal - start)[:, None]
    ways[..., 1] += side[:, None] * np.sin(math.pi * part[..., 0])
    return np.hstack([start, goal]), ways


def judge(ends: np.ndarray, ways: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which ways are valid, (n,) bool, and on which side they pass the disc, (n,) of -1 and 1.

    Straight lines between the steps count too.
    """
    fine = np.linspace(0.0, HORIZON - 1.0, 10 * HORIZON)
    dense = np.stack([[np.interp(fine, np.arange(HORIZON), way[:, i]) for i in (0, 1)] for way in ways]).transpose(0, 2, 1)
    clear = (np.linalg.norm(dense - DISC, axis=-1) > RADIUS).all(axis=1)
    arrived = np.linalg.norm(ways[:, -1] - ends[:, 2:], axis=-1) <= TOLERANCE
    middle = dense[np.arange(len(ways)), np.abs(dense[..., 0] - DISC[0]).argmin(axis=1), 1]
    return clear & arrived, np.where(middle > DISC[1], 1, -1)


def make(kind: str, normalizer: Normalizer, kl_weight: float) -> Policy:
    """An untrained policy of its benchmark's size: the same network for all but ACT, which has its own."""
    if kind == 'act':
        return ACT(SPEC, ACTConfig(width=64, heads=4, feedforward=256, encoder_layers=2, vae_layers=2, latent=4, dropout=0.0,
                                   kl_weight=kl_weight, latent_sampling='normal'), normalizer)
    policy, config = {'bc': (BC, BCConfig), 'diffusion': (Diffusion, DiffusionConfig), 'flow': (Flow, FlowConfig)}[kind]
    return policy(SPEC, config(unet=UNET), normalizer)


def fit(kind: str, sides: tuple[int, ...], steps: int, seed: int, kl_weight: float = 10.0) -> Policy:
    """A policy trained on demonstrations of these sides, drawn anew for every step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    ends, ways = demonstrations(4096, rng, sides)
    normalizer = Normalizer.fit({'ends': ends, 'action': ways.reshape(-1, 2)})
    policy = make(kind, normalizer, kl_weight)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    valid = torch.ones(128, HORIZON, dtype=torch.bool)
    for _ in range(steps):
        ends, ways = demonstrations(128, rng, sides)
        batch = {'observation': {'ends': torch.tensor(ends, dtype=torch.float32)[:, None]},
                 'action': torch.tensor(ways, dtype=torch.float32), 'valid': valid}
        loss = policy.loss(batch)['loss']
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return policy.eval()


def sample(policy: Policy, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and goals (n, 4) not trained on, and the policy's ways (n, HORIZON, 2), one noise each."""
    ends, _ = demonstrations(n, np.random.default_rng([seed, 1]))
    noise = torch.randn((n, HORIZON, 2), generator=torch.Generator().manual_seed(seed))
    return ends, policy.predict({'ends': torch.tensor(ends, dtype=torch.float32)[:, None]}, noise=noise).double().numpy()


def run(out: Path = Path('bench_out'), policies: tuple[str, ...] = POLICIES, steps: int = 3000, samples: int = 1000,
        seed: int = 0) -> dict:
    """Who averages two equally good ways: share of invalid samples, and of each way.

    Args:
        out: Folder for multimodal.json and multimodal.png.
        policies: Which of bc, act, diffusion and flow.
        steps: Optimiser steps of each training, batches of 128.
        samples: Chunks drawn from each policy.
        seed: Seed of data, weights and noise.
    """
    require_known(policies, POLICIES, 'policies')
    if steps < 50 or samples < 1:
        raise BenchError(f'steps is {steps}, must be at least 50; samples is {samples}, must be at least 1')
    rows, ways, sweep = [], {}, []
    for kind in policies:
        tried = []
        for beta in KL_WEIGHTS if kind == 'act' else (10.0,):
            ends, drawn = sample(fit(kind, (-1, 1), steps, seed, beta), samples, seed)
            valid, side = judge(ends, drawn)
            tried.append(({'policy': kind, 'invalid_%': 100.0 * float((~valid).mean()),
                           'above_%': 100.0 * float((valid & (side > 0)).mean()),
                           'below_%': 100.0 * float((valid & (side < 0)).mean())}, beta, drawn, valid))
        best = min(tried, key=lambda entry: entry[0]['invalid_%'])
        if kind == 'act':
            sweep = [{**row, 'kl_weight': beta} for row, beta, _, _ in tried]
        alone, _ = judge(*sample(fit(kind, (1,), steps, seed, best[1]), samples, seed))
        rows.append({**best[0], 'valid_one_side_%': 100.0 * float(alone.mean()),
                     'kl_weight': best[1] if kind == 'act' else None})
        ways[kind] = best[2], best[3]
    return publish('multimodal', f'{samples} samples, {steps} steps of 128 demonstrations', rows, out, _plot(ways, rows),
                   seed=seed, act_sweep=sweep)


def _plot(ways: dict[str, tuple[np.ndarray, np.ndarray]], rows: list[dict]):
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    figure = Figure(figsize=(3.2 * len(ways), 3.0), layout='constrained')
    for axes, row, (kind, (drawn, valid)) in zip(figure.subplots(1, len(ways), squeeze=False)[0], rows, ways.items()):
        axes.add_patch(Circle(DISC, RADIUS, color='0.75', zorder=0))
        for way, fine in zip(drawn[:150], valid[:150]):
            axes.plot(*way.T, color=COLORS[kind] if fine else '0.25', alpha=0.25, linewidth=0.8)
        axes.set(title=f'{kind}: {row["invalid_%"]:.1f} % invalid', xlim=(-0.1, 1.1), ylim=(-0.5, 0.5), aspect='equal')
    return figure
