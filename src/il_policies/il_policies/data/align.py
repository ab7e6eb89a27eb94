"""What was known when: one alignment for the running policy and for the converter.

`observation_at` reads stream buffers at a time t and never looks past it. Live, t is now or the newest camera frame;
offline, t runs over ticks, and `labels` adds the actions. All times are int64 [ns] on the clock of the streams' stamps.
"""
from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import numpy as np

from il_policies.contract import Contract, Stream
from il_policies.data.errors import DataError

SECOND = 1_000_000_000


class StreamBuffer:
    """Samples of one stream, sorted by stamp, however they arrive. Not thread-safe."""

    def __init__(self, stream: Stream, capacity: int | None = None):
        """Keep the newest `capacity` samples, or all."""
        self.stream = stream
        self.max_age = round(stream.max_age * SECOND)
        self.capacity = capacity
        self.stamps: list[int] = []
        self.samples: list = []

    def add(self, stamp: int, sample) -> None:
        """Insert a sample; one of the same stamp is replaced."""
        stamps = self.stamps
        if not stamps or stamp > stamps[-1]:
            stamps.append(stamp)
            self.samples.append(sample)
        else:
            place = bisect_left(stamps, stamp)
            if stamps[place] == stamp:
                self.samples[place] = sample
            else:
                stamps.insert(place, stamp)
                self.samples.insert(place, sample)
        # Dropping half at a time keeps the cost per sample constant.
        if self.capacity and len(stamps) >= 2 * self.capacity:
            del stamps[:-self.capacity], self.samples[:-self.capacity]

    def place_at(self, t: int) -> int:
        """Place of the newest sample with stamp ≤ t, or -1."""
        return bisect_right(self.stamps, t) - 1

    def clear(self) -> None:
        """Forget everything, as after a jump of the clock."""
        self.stamps.clear()
        self.samples.clear()

    @property
    def newest(self) -> int | None:
        """Stamp of the newest sample [ns]."""
        return self.stamps[-1] if self.stamps else None


def buffers(contract: Contract, names: list[str] | None = None, seconds: float = 5.0) -> dict[str, StreamBuffer]:
    """One buffer per named observation (None: all), each long enough for `seconds` at its declared rate."""
    return {name: StreamBuffer(contract.observations[name], math.ceil(seconds * contract.observations[name].rate) + 8)
            for name in (contract.observations if names is None else names)}


@dataclass(frozen=True)
class Observation:
    """What `observation_at` found."""

    data: dict[str, np.ndarray]
    """Feature → (To, *shape), oldest first; only features without problem."""
    ages: dict[str, float] = field(default_factory=dict)
    """Feature → age of its newest step at t [s]."""
    problems: dict[str, str] = field(default_factory=dict)
    """Feature → why it cannot be used at t."""

    @property
    def complete(self) -> bool:
        """True if every feature was found."""
        return not self.problems


def history_times(t: int, history: int, period: int, start: int | None = None,
                  anchor: StreamBuffer | None = None) -> list[int]:
    """The times t - k·period of an observation's steps, oldest first [ns].

    start: time of the first observation of the episode; earlier steps repeat it, as training windows repeat the first
    row of an episode. anchor: the camera that t follows; each earlier step is taken at its frame nearest to
    t - k·period if one lies within half a frame of it: the ticks learnt from follow the frames and their jitter too.
    """
    times = []
    for k in range(history - 1, -1, -1):
        time = t - k * period
        if anchor is not None and k and anchor.stamps:
            place = bisect_left(anchor.stamps, time)
            near = min(anchor.stamps[max(place - 1, 0):place + 1], key=lambda stamp: abs(stamp - time))
            if abs(near - time) <= 0.5 * SECOND / anchor.stream.rate:
                time = near
        times.append(time if start is None else min(t, max(time, start)))
    return times


def observation_at(streams: dict[str, StreamBuffer], t: int, history: int = 1, period: int = 0,
                   start: int | None = None, anchor: str | None = None) -> Observation:
    """For each stream and each history step, the newest sample not later than the step and not older than its max age.

    t and period in [ns]; history times, start and anchor (a name in `streams`) as in `history_times`.
    Nothing is ever taken from the future, interpolated or filled with zeros: what is missing is named.
    """
    times = history_times(t, history, period, start, streams[anchor] if anchor else None)
    data, ages, problems = {}, {}, {}
    for name, buffer in streams.items():
        samples = []
        for time in times:
            place = buffer.place_at(time)
            if place < 0:
                newest = buffer.newest
                problems[name] = (f'nothing received on {buffer.stream.topic}' if newest is None else
                                  f'{buffer.stream.topic}: no sample until {(t - time) / SECOND:.3f} s before now')
                break
            age = time - buffer.stamps[place]
            if age > buffer.max_age:
                problems[name] = (f'{buffer.stream.topic}: newest sample is {age / SECOND:.3f} s old, '
                                  f'allowed {buffer.stream.max_age:g} s')
                break
            samples.append(buffer.samples[place])
        else:
            data[name] = np.stack(samples)
            ages[name] = age / SECOND
    return Observation(data, ages, problems)


@dataclass(frozen=True)
class Ticks:
    """The times at which a recording is sampled."""

    stamps: np.ndarray
    """(T,) int64 [ns], rising."""
    gap: np.ndarray
    """(T,) bool: no frame belongs to this tick; its stamp is where one was due."""
    warnings: tuple[str, ...] = ()
    """What is odd about the rates."""


def grid_ticks(first: int, last: int, fps: float) -> Ticks:
    """Ticks without cameras: first, first + 1/fps, … up to last."""
    count = int((last - first) * fps / SECOND + 1e-6) + 1 if last >= first else 0
    return Ticks(first + np.round(np.arange(count) * (SECOND / fps)).astype(np.int64), np.zeros(count, bool))


def typical_period(stamps: np.ndarray) -> float:
    """Period of sorted stamps [ns], at least two: the lower median over six steps at a time.

    The median step would be off where a coarse clock makes steps alternate, the mean where something was lost.
    """
    k = min(6, len(stamps) - 1)
    return float(np.percentile(stamps[k:] - stamps[:-k], 50, method='lower')) / k


def camera_ticks(frames: np.ndarray, fps: float, rate: float) -> Ticks:
    """Ticks on the frames of a camera declared at `rate` [Hz]; frames: (N,) sorted stamps [ns].

    A tick takes the first frame from half a frame before it is due, and the next is due one period later, or, when the
    frame came late, one period after it less half a frame: neither jitter nor a slightly different rate accumulates.
    A tick whose window ends without a frame (where the next one's window begins) is a gap, and time goes on: dropping
    it would compress time. A camera within 1 % of fps gives a tick per frame.
    """
    frames = np.asarray(frames, np.int64)
    if len(frames) == 0:
        return Ticks(frames, np.zeros(0, bool))
    period, frame = SECOND / fps, SECOND / rate
    measured = SECOND / typical_period(frames) if len(frames) > 1 else rate
    every = abs(measured / fps - 1) <= 0.01
    warnings = []
    if abs(measured / rate - 1) > 0.05:
        warnings.append(f'camera declared at {rate:g} Hz runs at {measured:.4g} Hz')
    if not every and abs(measured / fps / max(round(measured / fps), 1) - 1) > 0.01:
        warnings.append(f'camera at {measured:.4g} Hz is no multiple of {fps:g} Hz: ticks are uneven')

    stamps, gap = [int(frames[0])], [False]
    due = frames[0] + period
    i = 1
    while i < len(frames):
        if every:
            # A frame may be late and the next early: only a step that clearly spans another frame is a gap.
            due = stamps[-1] + period
            closes = due + 0.75 * period
        else:
            if frames[i] < due - frame / 2:
                i += 1
                continue
            closes = due + max(period - frame / 2, frame / 2)
        if frames[i] < closes:
            stamps.append(int(frames[i]))
            gap.append(False)
            due = max(due + period, frames[i] + period - frame / 2)
            i += 1
        else:
            stamps.append(round(due))
            gap.append(True)
            due += period
    return Ticks(np.array(stamps, np.int64), np.array(gap), tuple(warnings))


def labels(ticks: np.ndarray, label: str, stamps: np.ndarray, fps: float,
           max_age: float) -> tuple[np.ndarray, np.ndarray]:
    """Which commands answer the ticks (T,) [ns], of commands with sorted stamps (N,) [ns].

    command: the first stamped in [t_k, t_k+1), else the last before t_k; command_hold: the last at or before t_k;
    neither older than max_age [s] at t_k. Returns the place of each tick's command (T,), -1 where there is none, and
    its age at the tick [s] (T,), negative when it came after. For next_state see `next_state`.
    Raises DataError for another label.
    """
    if label not in ('command', 'command_hold'):
        raise DataError(f'label is {label!r}; valid here: command, command_hold')
    ticks = np.asarray(ticks, np.int64)
    if len(stamps) == 0:
        return np.full(len(ticks), -1), np.full(len(ticks), np.nan)
    place = np.searchsorted(stamps, ticks, side='right') - 1  # the last at or before
    if label == 'command':
        following = np.append(ticks[1:], ticks[-1:] + round(SECOND / fps))
        first = np.searchsorted(stamps, ticks, side='left')
        inside = (first < len(stamps)) & (stamps[np.minimum(first, len(stamps) - 1)] < following)
        place = np.where(inside, first, place)
    age = np.where(place >= 0, (ticks - stamps[np.maximum(place, 0)]) / SECOND, np.nan)
    place = np.where(age <= max_age, place, -1)
    return place, age


def next_state(positions: np.ndarray) -> np.ndarray:
    """The label next_state: row k's action is the joint positions of row k+1; (T, D) → (T-1, D)."""
    return positions[1:]
