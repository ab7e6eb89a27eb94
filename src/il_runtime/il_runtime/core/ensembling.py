"""Temporal ensembling: overlapping action chunks blended by time, never by count.

ACT (Zhao et al. 2023, https://arxiv.org/abs/2304.13705, section IV-B) averages the predictions of overlapping chunks for
the same step; here chunks carry stamps, so that they may come late, early, doubled or in disorder.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MODES = ('newest_first', 'oldest_first', 'latest', 'crossfade')
MAX_MAGNITUDE = 1e4
"""No joint is there [rad or m]: a larger number is an overflow or garbage."""
MAX_LENGTH = 30.0
"""A chunk that covers more time would be followed long after its planner has died [s]."""


class ChunkError(ValueError):
    """A chunk that must be refused whole; the message says why."""


class NonFiniteError(ChunkError):
    """NaN, infinity, or a number no joint can have."""


def check_finite(positions: np.ndarray) -> None:
    """Raises NonFiniteError if any of the positions is NaN, infinite or absurd."""
    if not (np.abs(positions) <= MAX_MAGNITUDE).all():  # NaN compares false
        raise NonFiniteError(f'positions hold NaN, infinity or a number beyond ±{MAX_MAGNITUDE:g}')


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
    policy: str = ''
    """Who planned it."""

    @property
    def end(self) -> float:
        """Time of the last target [s]."""
        return self.start + (len(self.positions) - 1) * self.period

    def at(self, t: float) -> np.ndarray:
        """Target at time t [s], linear between steps, held beyond both ends. Shape (D,)."""
        positions = self.positions
        x = min(max((t - self.start) / self.period, 0.0), len(positions) - 1.0)
        i = int(x)
        return positions[i] if i == x else positions[i] + (x - i) * (positions[i + 1] - positions[i])


def arrange(joint_names, positions, horizon: int, step_period: float, joints: tuple[str, ...]) -> np.ndarray:
    """Check a flat row-major chunk and put its columns into the order of ``joints``. Shape (H, D), float64.

    Raises ChunkError for missing, unknown or doubled names, wrong sizes or a bad period; NonFiniteError for values.
    """
    names = list(joint_names)
    if sorted(names) != sorted(joints):
        missing = [n for n in joints if n not in names]
        unknown = [n for n in names if n not in joints]
        doubled = sorted({n for n in names if names.count(n) > 1})
        raise ChunkError(f'joint_names: missing {missing}, unknown {unknown}, doubled {doubled}; expected {list(joints)}')
    if not (np.isfinite(step_period) and step_period > 0):
        raise ChunkError(f'step_period is {step_period}, must be finite and > 0')
    if (horizon - 1) * step_period > MAX_LENGTH:
        raise ChunkError(f'{horizon} steps of {step_period:g} s, must cover at most {MAX_LENGTH:g} s')
    positions = np.asarray(positions, dtype=np.float64)
    if horizon < 1 or positions.size != horizon * len(names):
        raise ChunkError(f'{positions.size} positions, expected horizon {horizon} × {len(names)} joints')
    check_finite(positions)
    return positions.reshape(horizon, len(names))[:, [names.index(name) for name in joints]]


@dataclass
class _Member:
    """A chunk and the moments that shape its weight."""

    chunk: Chunk
    since: float
    """When it was received [s]: its weight ramps in from here."""
    delay: float
    """By how much slowed-down playback was behind when the chunk starts [s]."""
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
    newest: tuple[float, int]
    """Which chunk that is: its start [s] and sequence."""
    disagreement: float
    """Largest joint distance between live chunks, in units of the joint's tolerance."""
    crossfading: bool
    """True while chunks that disagree with the newest still have weight."""


@dataclass(frozen=True)
class Blending:
    """How overlapping chunks become one command. Raises ValueError for what is not valid."""

    mode: str = 'newest_first'
    """newest_first: w = exp(−m·a), a = age against the newest live chunk in policy steps (a real number).
    oldest_first: w = exp(−m·b), b = age of the chunk against the oldest (ACT, m = 0.01).
    crossfade: each chunk is faded over its predecessors, linearly over `seam` seconds.
    latest: crossfade over the two-tick ramp."""
    m: float = 0.5
    """Weight exp(−m·age) of a chunk, age in policy steps."""
    seam: float = 0.1
    """Length of a crossfade [s]."""
    max_disagreement: float = np.inf
    """Above this distance between live chunks, in tolerances, the newest takes over instead of being averaged."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f'ensembling is {self.mode!r}, valid: {", ".join(MODES)}')
        if not (np.isfinite(self.m) and self.m >= 0):
            raise ValueError(f'm is {self.m}, must be finite and >= 0')
        if not (np.isfinite(self.seam) and self.seam > 0):
            raise ValueError(f'seam is {self.seam}, must be finite and > 0 [s]')
        if not self.max_disagreement > 0:
            raise ValueError(f'max_disagreement is {self.max_disagreement}, must be > 0')


class Ensembler:
    """Blend of the live chunks of one epoch, ordered by the time they start, never by the order of arrival.

    Weights ramp in from receipt and out towards the chunk's end over ``ramp``, so that neither entry nor expiry is a step.
    Averaging chunks of different modes commands something between the modes, which no demonstration did: when live chunks
    differ by more than ``max_disagreement``, all but the newest are faded out over ``seam``.
    """

    def __init__(self, tolerance, blending: Blending = Blending(), ramp: float = 0.04):  # noqa: B008
        """Tolerance: the distance per joint that counts as 1 disagreement [rad or m], shape (D,); ramp [s]."""
        self.tolerance = np.asarray(tolerance, dtype=np.float64)
        self.blending, self.ramp = blending, ramp
        self._before, self._switched = blending, -np.inf
        self.epoch = -1
        """The only one whose chunks are taken."""
        self._members: dict[tuple[float, int], _Member] = {}  # by start and sequence
        self._seen: dict[tuple[float, int], float] = {}  # keys of chunks that have not ended yet → their end

    def switch(self, blending: Blending, now: float) -> None:
        """Blend otherwise from ``now`` [s] on; the old way fades out over the new seam."""
        self._before, self._switched, self.blending = self.blending, now, blending

    def reset(self, epoch: int) -> None:
        """Forget everything; from now on only chunks of this epoch count."""
        self.epoch, self._switched = epoch, -np.inf
        self.clear()

    def clear(self) -> None:
        """Drop all chunks but keep the epoch."""
        self._members.clear()
        self._seen.clear()

    def add(self, chunk: Chunk, now: float, delay: float = 0.0) -> None:
        """Take a chunk received at ``now`` [s]; a doubled one changes nothing. Raises ChunkError for another epoch.

        delay: by how much slowed-down playback is behind at the chunk's start, see `at` [s].
        """
        if chunk.epoch != self.epoch:
            raise ChunkError(f'epoch {chunk.epoch}, the current one is {self.epoch}')
        key = (chunk.start, chunk.sequence)
        if key not in self._seen and chunk.end >= now:
            self._seen = {known: end for known, end in self._seen.items() if end >= now}
            self._members = {known: member for known, member in self._members.items() if member.chunk.end >= now}
            self._seen[key] = chunk.end
            self._members[key] = _Member(chunk, now, delay)

    def covers_until(self, now: float) -> float:
        """Until when the chunks cover without a gap [s]; ``now`` if none covers it."""
        until = now
        for _, member in sorted(self._members.items(), key=lambda item: item[0]):
            if member.chunk.start <= until:
                until = max(until, member.chunk.end)
        return until

    def at(self, t: float, delay: float = 0.0) -> Blend | None:
        """The blend at time t [s] (t never goes back within an epoch), or None where no chunk covers t.

        delay: by how much slowed-down playback is behind at t [s]. A chunk is followed as far as its own delay allows, but
        it expires when it would at full speed: slow is never stale.
        """
        seam = self._seam(self.blending)
        for key, member in list(self._members.items()):
            if member.chunk.end < t or member.retired + seam <= t:
                del self._members[key]
        live = [m for _, m in sorted(self._members.items(), key=lambda item: item[0]) if m.chunk.start <= t]
        if not live:
            return None
        newest = live[-1]
        newest.retired = np.inf  # what was newer and disagreed with it has ended
        points = np.array([member.chunk.at(t - (delay - member.delay)) for member in live])
        disagreement = self._disagreement(points)
        if disagreement > self.blending.max_disagreement:
            standing = [i for i, member in enumerate(live) if member.retired > t]
            if self._disagreement(points[standing]) > self.blending.max_disagreement:
                for member in live[:-1]:
                    member.retired = min(member.retired, t)
        positions = self._weights(self.blending, live, t) @ points
        fraction = max((t - self._switched) / seam, 0.0)
        if fraction < 1:
            positions = fraction * positions + (1 - fraction) * (self._weights(self._before, live, t) @ points)
        return Blend(positions, len(live), t - newest.chunk.observed, (newest.chunk.start, newest.chunk.sequence), disagreement,
                     any(member.retired < np.inf for member in live))

    def _disagreement(self, points: np.ndarray) -> float:
        """Largest joint distance between points, shape (number of chunks, D), in tolerances."""
        return float(((points.max(axis=0) - points.min(axis=0)) / self.tolerance).max())

    def _seam(self, blending: Blending) -> float:
        return self.ramp if blending.mode == 'latest' else blending.seam

    def _weights(self, blending: Blending, live: list[_Member], t: float) -> np.ndarray:
        """Weights of the live chunks, oldest to newest, summing to 1. Shape (number of live chunks,)."""
        newest, oldest = live[-1].chunk, live[0].chunk
        if blending.mode == 'newest_first':
            base = [math.exp(-blending.m * (newest.start - member.chunk.start) / newest.period) for member in live]
        elif blending.mode == 'oldest_first':
            base = [math.exp(-blending.m * (member.chunk.start - oldest.start) / newest.period) for member in live]
        else:
            base, below, seam = [0.0] * len(live), 1.0, self._seam(blending)
            for i in range(len(live) - 1, -1, -1):
                shown = min(max((t - live[i].since) / seam, 0.0), 1.0) if i else 1.0
                base[i], below = shown * below, (1.0 - shown) * below
        base = np.asarray(base)
        faded = base * [self._fade(blending, member, t) for member in live]
        # A chunk alone, on its first or last tick, has nothing to fade against.
        weights = faded if faded.sum() > 1e-9 * base.sum() else base
        return weights / weights.sum()

    def _fade(self, blending: Blending, member: _Member, t: float) -> float:
        # What is fading out does not go on fading in: an older chunk that comes late and disagrees never counts.
        entering = (min(t, member.retired) - member.since) / self.ramp if blending.mode in MODES[:2] else 1.0
        leaving = (member.chunk.end - t) / self.ramp
        retiring = 1.0 - (t - member.retired) / self._seam(blending) if t > member.retired else 1.0
        return min(max(min(entering, leaving, 1.0), 0.0), 1.0) * max(retiring, 0.0)
