"""Temporal ensembling: overlapping action chunks blended by time, never by count.

ACT (Zhao et al. 2023, https://arxiv.org/abs/2304.13705, section IV-B) averages the predictions of overlapping chunks for
the same step; here chunks carry stamps, so that they may come late, early, doubled or in disorder.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MODES = ('newest_first', 'oldest_first', 'latest', 'crossfade')


class ChunkError(ValueError):
    """A chunk that must be refused whole; the message says why."""


@dataclass(frozen=True)
class Chunk:
    """H joint targets, ``period`` apart, beginning at ``start`` on the controller's clock."""

    start: float
    """Time of positions[0] [s]."""
    period: float
    """Time between steps [s]."""
    positions: np.ndarray
    """Absolute targets in the controller's joint order [rad or m]. Shape (H, D)."""
    epoch: int
    """Epoch the planner copied from the controller's status."""
    sequence: int
    """Rises by one per chunk within an epoch."""
    observed: float
    """When the observation behind it was taken [s]."""

    @property
    def end(self) -> float:
        """Time of the last target [s]."""
        return self.start + (len(self.positions) - 1) * self.period

    def at(self, t: float) -> np.ndarray:
        """Target at time t [s], linear between steps, held beyond both ends. Shape (D,)."""
        x = min(max((t - self.start) / self.period, 0.0), len(self.positions) - 1.0)
        i = min(int(x), len(self.positions) - 2) if len(self.positions) > 1 else 0
        if i == x:
            return self.positions[i]
        return self.positions[i] + (x - i) * (self.positions[i + 1] - self.positions[i])


def arrange(joint_names, positions, horizon: int, step_period: float, joints: tuple[str, ...]) -> np.ndarray:
    """Check a flat row-major chunk and put its columns into the order of ``joints``. Shape (H, D), float64.

    Raises ChunkError for missing, unknown or doubled names, wrong sizes, a bad period or non-finite values.
    """
    names = list(joint_names)
    if sorted(names) != sorted(joints):
        missing = [n for n in joints if n not in names]
        unknown = [n for n in names if n not in joints]
        doubled = sorted({n for n in names if names.count(n) > 1})
        raise ChunkError(f'joint_names: missing {missing}, unknown {unknown}, doubled {doubled}; expected {list(joints)}')
    if not (np.isfinite(step_period) and step_period > 0):
        raise ChunkError(f'step_period is {step_period}, must be finite and > 0')
    positions = np.asarray(positions, dtype=np.float64)
    if horizon < 1 or positions.size != horizon * len(names):
        raise ChunkError(f'{positions.size} positions, expected horizon {horizon} × {len(names)} joints')
    if not np.isfinite(positions).all():
        raise ChunkError('positions hold NaN or infinity')
    return positions.reshape(horizon, len(names))[:, [names.index(name) for name in joints]]


@dataclass
class _Member:
    """A chunk and the moments that shape its weight."""

    chunk: Chunk
    since: float
    """When it was received [s]: its weight ramps in from here."""
    retired: float = np.inf
    """When a disagreement began to fade it out [s]."""


@dataclass(frozen=True)
class Blend:
    """What the live chunks say for one moment."""

    positions: np.ndarray
    """Ensembled target [rad or m]. Shape (D,)."""
    live: int
    """Chunks that cover the moment."""
    age: float
    """Time since the newest live chunk's observation [s]."""
    disagreement: float
    """Largest joint distance between live chunks, in units of the joint's tolerance."""


class Ensembler:
    """Blend of the live chunks of one epoch.

    newest_first: w = exp(−m·a), a = age against the newest live chunk in policy steps (a real number).
    oldest_first: w = exp(−m·b), b = age of the chunk against the oldest (ACT, m = 0.01).
    crossfade: each chunk is faded over its predecessors, linearly over ``seam`` seconds.
    latest: crossfade over the two-tick ramp.
    Weights ramp in from receipt and out towards the chunk's end over ``ramp``, so that neither entry nor expiry is a step.
    Averaging chunks of different modes commands something between the modes, which no demonstration did: when live chunks
    differ by more than ``max_disagreement``, all but the newest are faded out over ``seam``.
    """

    def __init__(self, tolerance, mode: str = 'newest_first', m: float = 0.5, ramp: float = 0.04, seam: float = 0.1,
                 max_disagreement: float = np.inf):
        """Tolerance: the distance per joint that counts as 1 disagreement [rad or m], shape (D,). Raises ValueError."""
        if mode not in MODES:
            raise ValueError(f'ensembling mode {mode!r}, valid: {", ".join(MODES)}')
        if not (np.isfinite(m) and m >= 0):
            raise ValueError(f'm is {m}, must be finite and >= 0')
        self.tolerance = np.asarray(tolerance, dtype=np.float64)
        self.mode, self.m, self.ramp, self.max_disagreement = mode, m, ramp, max_disagreement
        self.seam = ramp if mode == 'latest' else seam
        self._epoch = -1
        self._members: dict[int, _Member] = {}
        self._seen: set[int] = set()

    def reset(self, epoch: int) -> None:
        """Forget everything; from now on only chunks of this epoch count."""
        self._epoch = epoch
        self._members.clear()
        self._seen.clear()

    def clear(self) -> None:
        """Drop all chunks but keep the epoch. Their sequences may be used again: a planner that restarted counts anew."""
        self._members.clear()
        self._seen.clear()

    def add(self, chunk: Chunk, now: float) -> None:
        """Take a chunk received at ``now`` [s]; a doubled one changes nothing. Raises ChunkError for another epoch."""
        if chunk.epoch != self._epoch:
            raise ChunkError(f'epoch {chunk.epoch}, the current one is {self._epoch}')
        if chunk.sequence not in self._seen and chunk.end >= now:
            self._seen.add(chunk.sequence)
            self._members[chunk.sequence] = _Member(chunk, now)

    @property
    def end(self) -> float:
        """Until when any chunk covers [s]; −inf without chunks."""
        return max((member.chunk.end for member in self._members.values()), default=-np.inf)

    def at(self, t: float) -> Blend | None:
        """The blend at time t [s] (t never goes back within an epoch), or None where no chunk covers t."""
        for sequence, member in list(self._members.items()):
            if member.chunk.end < t or member.retired + self.seam <= t:
                del self._members[sequence]
        live = [m for _, m in sorted(self._members.items()) if m.chunk.start <= t]  # oldest to newest
        if not live:
            return None
        newest = live[-1]
        points = np.stack([member.chunk.at(t) for member in live])
        disagreement = np.max(np.ptp(points, axis=0) / self.tolerance)
        standing = [i for i, member in enumerate(live) if member.retired > t]
        if np.max(np.ptp(points[standing], axis=0) / self.tolerance) > self.max_disagreement:
            for member in live[:-1]:
                member.retired = min(member.retired, t)
        weights = self._weights(live, t)
        positions = weights @ points / weights.sum()
        return Blend(positions, len(live), t - newest.chunk.observed, float(disagreement))

    def _weights(self, live: list[_Member], t: float) -> np.ndarray:
        newest, oldest = live[-1].chunk, live[0].chunk
        if self.mode == 'newest_first':
            base = [np.exp(-self.m * (newest.start - member.chunk.start) / newest.period) for member in live]
        elif self.mode == 'oldest_first':
            base = [np.exp(-self.m * (member.chunk.start - oldest.start) / newest.period) for member in live]
        else:
            base, below = [0.0] * len(live), 1.0
            for i in range(len(live) - 1, -1, -1):
                shown = min(max((t - live[i].since) / self.seam, 0.0), 1.0) if i else 1.0
                base[i], below = shown * below, (1.0 - shown) * below
        base = np.asarray(base)
        faded = base * [self._fade(member, t) for member in live]
        # A chunk alone, on its first or last tick, has nothing to fade against.
        return faded if faded.sum() > 1e-9 * base.sum() else base

    def _fade(self, member: _Member, t: float) -> float:
        entering = (t - member.since) / self.ramp if self.mode in ('newest_first', 'oldest_first') else 1.0
        leaving = (member.chunk.end - t) / self.ramp
        retiring = 1.0 - (t - member.retired) / self.seam if t > member.retired else 1.0
        return min(max(min(entering, leaving, 1.0), 0.0), 1.0) * max(retiring, 0.0)
