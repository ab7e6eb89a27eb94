"""What was known when: one alignment for the running policy and for the converter.

`observation_at` reads stream buffers at a time t and never looks past it. Live, t is now or the newest camera frame;
offline, `align_recording` lets t run over ticks and adds the actions. All times are int64 [ns] on the clock of the
streams' stamps.
"""
from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from il_policies.contract import Contract, Stream
from il_policies.data.errors import DataError
from il_policies.data.recording import SECOND, Recording, Span, StreamRecord

MAX_REPEATED = 2
"""A stream may be silent for this many ticks, which repeat its last sample, flagged; longer gaps end the episode."""
MIN_ROWS = 2
"""Fewer make no episode."""
FOLLOWED = 0.1
"""Share of a frame's deviation by which the next tick's time follows it: a clock 1 % off is followed, jitter averaged out."""
SAME_RATE = 0.01
"""A camera is as fast as the rows, or k times so, if its rate is off by less than this share."""
CLOCKS_APART = 1.0
"""Streams whose stamps differ by more from their arrivals, one from another, run on different clocks [s]."""


class StreamBuffer:
    """Samples of one stream, sorted by stamp, however they arrive. Not thread-safe."""

    def __init__(self, stream: Stream, capacity: int | None = None):
        """Keep the newest `capacity` samples, or all."""
        self.stream = stream
        self.max_age = round(stream.max_age * SECOND)
        self.capacity = capacity
        self.stamps: list[int] | memoryview = []
        self.samples: Sequence = []

    @classmethod
    def of(cls, record: StreamRecord, without: Collection[int] = ()) -> StreamBuffer:
        """What adding a whole recording one by one would give; samples are their places in it, `without` left out."""
        places = np.argsort(record.stamps, kind='stable')
        if without:
            places = places[~np.isin(places, list(without))]
        stamps = record.stamps[places]
        newest = np.append(stamps[1:] > stamps[:-1], True)[:len(stamps)]  # of equal stamps the last to arrive
        buffer = cls(record.stream)
        buffer.stamps, buffer.samples = memoryview(stamps[newest]), places[newest]
        return buffer

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
    k = max(1, min(6, (len(stamps) - 1) // 4))  # of a few stamps most must not span the one that was lost
    return float(np.percentile(stamps[k:] - stamps[:-k], 50, method='lower')) / k


def camera_ticks(frames: np.ndarray, fps: float, rate: float) -> Ticks:
    """Ticks on the frames of a camera declared at `rate` [Hz]; frames: (N,) sorted stamps [ns].

    A tick takes the first frame from half a frame before it is due, and the next is due one period later, or, when the
    frame came late, one period after it less half a frame: jitter does not accumulate. A tick whose window ends without a
    frame (where the next one's window begins) is a gap, and time goes on: dropping it would compress time. A camera within
    1 % of fps gives a tick per frame, one within 1 % of k·fps a tick every k-th frame: what is due follows its clock.
    """
    frames = np.asarray(frames, np.int64)
    if len(frames) == 0:
        return Ticks(frames, np.zeros(0, bool))
    period, frame = SECOND / fps, SECOND / rate
    measured = SECOND / typical_period(frames) if len(frames) > 1 else rate
    every = abs(measured / fps - 1) <= SAME_RATE
    multiple = abs(measured / fps / max(round(measured / fps), 1) - 1) <= SAME_RATE
    warnings = []
    if abs(measured / rate - 1) > 0.05:
        warnings.append(f'camera declared at {rate:g} Hz runs at {measured:.4g} Hz')
    if not multiple:
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
            follow = FOLLOWED * (frames[i] - due) if multiple else 0.0
            due = max(due + follow, frames[i] - frame / 2) + period
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


@dataclass(frozen=True)
class Rows:
    """One episode, decided: which samples each of its T rows holds."""

    stamps: np.ndarray
    """(T,) int64 [ns], rising: the ticks."""
    filled: np.ndarray
    """(T,) bool: something in the row is older than it may be, or no frame belonged to its tick."""
    lowdim: dict[str, np.ndarray]
    """Feature → (T, D) float64."""
    action: np.ndarray
    """(T, A) float64."""
    ages: dict[str, np.ndarray]
    """Feature, and `action`, → (T,): age at the tick of what the row holds [s]; negative for what came after it."""
    frames: dict[str, np.ndarray]
    """Image feature → (T,) places in its stream's record."""
    first: int
    """[ns] when the recording it was cut from begins: all observations have begun, and its mark has been set."""
    last: int
    """[ns] when that recording ends."""
    task: str
    """What was done, in words."""
    success: bool | None
    """Whether it succeeded; None if nobody said."""
    warnings: tuple[str, ...]
    """What is odd about its marks, rates and gaps."""


def align_recording(recording: Recording, span: Span | None = None, gaps: Literal['refuse', 'split'] = 'refuse',
                    broken: Mapping[str, Collection[int]] | None = None) -> list[Rows]:
    """The rows of one episode of a recording: ticks from the first to the last at which everything is known.

    In between, what is missing is repeated for up to MAX_REPEATED ticks in a row and the rows are flagged; a longer gap
    refuses the episode, or, with gaps='split', ends it, and another begins after the gap.
    span: the episode's marks (None: the recording's first). broken: image feature → places of frames that count as lost.
    Raises DataError naming the bag: a silent stream (E202), clocks that disagree (E204), a gap (E206), too few rows
    (E207), no command (E209).
    """
    span = span or recording.spans[0]
    try:
        return _align(recording, span, gaps, broken or {})
    except DataError as error:
        where = str(recording.bag.path)
        if span.begin is not None:
            begin = min(int(record.received[0]) for record in recording.streams.values() if len(record.received))
            where += f', episode marked at {(span.begin - begin) / SECOND:.2f} s'
        raise error.at(where) from None


def _align(recording: Recording, span: Span, gaps: str, broken: Mapping[str, Collection[int]]) -> list[Rows]:
    contract = recording.contract
    buffers = {name: StreamBuffer.of(record, broken.get(name, ())) for name, record in recording.streams.items()}
    observed = {name: buffers[name] for name in contract.observations}
    labelled = contract.action.label != 'next_state'
    silent = [buffer.stream.topic for name, buffer in buffers.items() if not buffer.stamps and (name != 'action' or labelled)]
    if silent:
        raise DataError(f'no messages on {", ".join(silent)}', 'E202')
    _check_clocks(recording)
    first, last = _bounds(recording, observed, span)
    # Longer than a gap that is repeated, whatever the stream's phase: what follows its last sample would be left out unseen.
    quiet = [f'{buffer.stream.topic} falls silent for the last {(last - newest) / SECOND:.2f} s' for buffer in observed.values()
             if (newest := buffer.stamps[max(buffer.place_at(last), 0)]) < last - SECOND * (
                 MAX_REPEATED / contract.policy_rate + buffer.stream.max_age + 1 / buffer.stream.rate)]
    if quiet and gaps == 'refuse':
        raise DataError(f'{"; ".join(quiet)}; what is whole remains with --gaps split', 'E202')

    if contract.cameras:
        camera = observed[contract.cameras[0]]
        frames = np.frombuffer(camera.stamps, np.int64)
        ticks = camera_ticks(frames[(first <= frames) & (frames <= last)], contract.policy_rate, camera.stream.rate)
    else:
        ticks = grid_ticks(first, last, contract.policy_rate)
    found = _places(observed, ticks)
    if labelled:
        commands = buffers['action']
        place, _ = labels(ticks.stamps, contract.action.label, np.frombuffer(commands.stamps, np.int64), contract.policy_rate,
                          contract.action.max_age)
        found['action'] = np.where(place < 0, -1, commands.samples[place])
    known = {name: places >= 0 for name, places in found.items()}
    for name in contract.cameras[:1]:
        known[name] &= ~ticks.gap  # an older frame may be young enough to be used, but none belongs to this tick
    whole = np.flatnonzero(np.all(list(known.values()), axis=0))
    if len(whole) < MIN_ROWS:
        raise _too_few(recording, ticks, known)
    parts, cuts = _parts(known, whole)
    silences = [(buffers[name], _gap(buffers[name], ticks.stamps[begin - 1], ticks.stamps[end])) for name, begin, end in cuts]
    described = [f'gap of {length / SECOND:.2f} s on {buffer.stream.topic} at {(begin - first) / SECOND:.2f} s'
                 for buffer, (begin, length) in silences]
    if cuts and gaps == 'refuse':
        raise DataError(f'{described[0]}, more than the {MAX_REPEATED} ticks that may be repeated; '
                        '--gaps split makes two episodes of it', 'E206')
    warnings = (*span.warnings, *ticks.warnings, *quiet, *described)
    # The last row of next_state lends its positions to the one before, and is dropped.
    episodes = [_rows(recording, ticks.stamps[begin:end], {name: places[begin:end] for name, places in found.items()},
                      {name: there[begin:end] for name, there in known.items()}, (first, last), span, warnings)
                for begin, end in parts if end - begin - (not labelled) >= MIN_ROWS]
    if not episodes:
        raise _too_few(recording, ticks, known)
    return episodes


def _check_clocks(recording: Recording) -> None:
    """A stream on another clock than the others would be taken from another time, or never."""
    ahead = {name: float(np.median(record.stamps - record.received)) / SECOND
             for name, record in recording.streams.items() if len(record.stamps)}
    common = min(ahead.values(), key=abs)
    for name, seconds in ahead.items():
        record = recording.streams[name]
        # A latched message may be as old as the stream allows when it arrives.
        if not -CLOCKS_APART - record.stream.max_age <= seconds - common <= CLOCKS_APART:
            raise DataError(f'{record.topic}: {record.stream.clock} stamps are {seconds:+.3f} s from arrival, those of others '
                            f'{common:+.3f} s; set the clock of its host, or take another clock in the contract (publish, '
                            'receive)', 'E204')


def _bounds(recording: Recording, observed: dict[str, StreamBuffer], span: Span) -> tuple[int, int]:
    """From when all observations have begun and the episode's mark was set, to when the last one or the mark ends it [ns].

    Of a mark only the arrival is known; in stamps it is where the stream that ticks follow was when it arrived.
    """
    first = max(buffer.stamps[0] for buffer in observed.values())
    last = max(buffer.stamps[-1] for buffer in observed.values())
    leading = recording.streams[next(iter(recording.contract.cameras), recording.contract.joint_state)]
    begin, end = leading.received[0] if span.begin is None else span.begin, span.end
    inside = leading.stamps[(leading.received >= begin) & (leading.received <= (leading.received[-1] if end is None else end))]
    if not len(inside):
        raise DataError(f'nothing on {leading.topic} between the marks', 'E202')
    return (first if span.begin is None else max(first, int(inside[0])), last if end is None else min(last, int(inside[-1])))


def _places(observed: dict[str, StreamBuffer], ticks: Ticks) -> dict[str, np.ndarray]:
    """Feature → (T,) place of what `observation_at` finds at each tick, -1 where there is nothing it may use."""
    found = {name: np.full(len(ticks.stamps), -1) for name in observed}
    for k, t in enumerate(ticks.stamps.tolist()):
        for name, (place,) in observation_at(observed, t).data.items():
            found[name][k] = place
    return found


def _parts(known: dict[str, np.ndarray], whole: np.ndarray) -> tuple[list[tuple[int, int]], list[tuple[str, int, int]]]:
    """Runs of ticks [begin, end) from whole row to whole row, and the long gaps (feature, begin, end) between them.

    known: feature → (T,) bool. whole: the ticks at which everything is, rising, at least one.
    """
    gaps = []
    for name, there in known.items():
        ticks = np.flatnonzero(there)
        ticks = ticks[(whole[0] <= ticks) & (ticks <= whole[-1])]
        gaps += [(name, int(ticks[i]) + 1, int(ticks[i + 1])) for i in np.flatnonzero(np.diff(ticks) > MAX_REPEATED + 1)]
    gaps.sort(key=lambda gap: gap[1])
    parts, begin, after = [], 0, int(whole[-1]) + 1
    for _, start, end in [*gaps, ('', after, after)]:
        inside = whole[(begin <= whole) & (whole < start)]
        if len(inside):
            parts.append((int(inside[0]), int(inside[-1]) + 1))
        begin = max(begin, end)
    return parts, gaps


def _gap(buffer: StreamBuffer, before: int, after: int) -> tuple[int, int]:
    """Where (stamp [ns]) the longest silence of a stream between two ticks begins, and its length [ns]."""
    near = np.array(buffer.stamps[max(buffer.place_at(before), 0):buffer.place_at(after) + 2])
    longest = int(np.argmax(np.diff(near)))
    return int(near[longest]), int(near[longest + 1] - near[longest])


def _too_few(recording: Recording, ticks: Ticks, known: dict[str, np.ndarray]) -> DataError:
    """Why there is no episode."""
    T = len(ticks.stamps)
    if T and 'action' in known and not np.any(known['action']):
        action = recording.contract.action
        return DataError(f'no command on {action.topic} at any of {T} ticks, nor in the {action.max_age:g} s before one; '
                         'was the robot moved by another topic?', 'E209')
    counts = ', '.join(f'{recording.streams[name].topic} at {np.sum(there)}' for name, there in known.items())
    return DataError(f'fewer than {MIN_ROWS} rows in a sequence are complete; of {T} ticks there is a sample young enough of '
                     f'{counts}', 'E207')


def _rows(recording: Recording, stamps: np.ndarray, found: dict[str, np.ndarray], known: dict[str, np.ndarray],
          bounds: tuple[int, int], span: Span, warnings: tuple[str, ...]) -> Rows:
    """The rows of ticks `stamps` (T,), the first of which is complete.

    found: name → (T,) places, -1 where the row repeats the one before; known: name → (T,) bool, False where the row is
    flagged for it.
    """
    contract, streams = recording.contract, recording.streams
    filled = ~np.all(list(known.values()), axis=0)
    # Each row holds its own sample, or that of the last row that has one.
    places = {name: place[np.maximum.accumulate(np.where(place < 0, 0, np.arange(len(stamps))))] for name, place in found.items()}
    taken = {name: streams[name].stamps[place] for name, place in places.items()}
    lowdim = {name: streams[name].samples[places[name]] for name in contract.observations if name not in contract.cameras}
    if contract.action.label == 'next_state':
        columns = [contract.observations[contract.joint_state].names.index(joint) for joint in contract.action.joints]
        action = next_state(lowdim[contract.joint_state][:, columns])
        filled = filled[:-1] | ~known[contract.joint_state][1:]
        taken['action'] = np.append(taken[contract.joint_state][1:], 0)
    else:
        action = streams['action'].samples[places['action']]
    T = len(action)
    return Rows(stamps[:T], filled, {name: values[:T] for name, values in lowdim.items()}, action,
                {name: (stamps[:T] - when[:T]) / SECOND for name, when in taken.items()},
                {name: places[name][:T] for name in contract.cameras}, *bounds, span.task, span.success, warnings)
