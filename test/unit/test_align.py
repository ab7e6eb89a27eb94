from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from il_policies.contract import Stream
from il_policies.data.align import (
    StreamBuffer,
    align_recording,
    buffers,
    camera_ticks,
    grid_ticks,
    history_times,
    labels,
    next_state,
    observation_at,
    typical_period,
)
from il_policies.data.errors import DataError
from il_policies.data.recording import Recording, Span, StreamRecord, streams_of
from recordings import MS, START, contract

P = 100 * MS


def stream(max_age: float = 0.1, rate: float = 10.0) -> Stream:
    return Stream(topic='x', type='t', rate=rate, max_age=max_age, fields=('data',))


def filled(stamps, capacity=None, max_age=0.1, rate=10.0) -> StreamBuffer:
    """A buffer whose samples are their stamps."""
    buffer = StreamBuffer(stream(max_age, rate), capacity)
    for stamp in stamps:
        buffer.add(stamp, np.array([float(stamp)]))
    return buffer


@settings(max_examples=100, deadline=None)
@given(stamps=st.lists(st.integers(0, 50), max_size=60), t=st.integers(-5, 60), capacity=st.integers(60, 80))
def test_buffer_against_brute_force(stamps, t, capacity):
    buffer = filled(stamps, capacity)
    assert buffer.stamps == sorted(set(stamps))
    assert [float(sample[0]) for sample in buffer.samples] == buffer.stamps
    place = buffer.place_at(t)
    earlier = [stamp for stamp in set(stamps) if stamp <= t]
    assert (buffer.stamps[place] if place >= 0 else None) == max(earlier, default=None)


def test_buffer_keeps_the_newest():
    buffer = filled(range(1000), capacity=10)
    assert 10 <= len(buffer.stamps) < 20 and buffer.newest == 999
    assert buffers(contract(), ['joints'])['joints'].capacity == 508
    buffer.clear()
    assert buffer.newest is None and buffer.place_at(5000) == -1


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_observation_against_brute_force(data):
    ages = {'a': 30, 'b': 7}
    stamps = {name: data.draw(st.lists(st.integers(0, 100), max_size=20)) for name in ages}
    t, history, period = data.draw(st.integers(0, 120)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    start = data.draw(st.none() | st.integers(0, 120))
    streams = {name: filled(stamps[name], max_age=age * 1e-9) for name, age in ages.items()}
    got = observation_at(streams, t, history, period, start)
    for name, age in ages.items():
        wanted = []
        for k in reversed(range(history)):
            time = t - k * period
            if start is not None:
                time = max(time, min(start, t))
            usable = [s for s in stamps[name] if time - age <= s <= time]
            wanted.append(max(usable, default=None))
        if None in wanted:
            assert name in got.problems and name not in got.data
        else:
            assert name not in got.problems and got.data[name][:, 0].tolist() == wanted
            assert got.ages[name] == pytest.approx((t - wanted[-1]) * 1e-9, abs=1e-15)
    assert got.complete == (set(got.data) == set(ages))


def test_problems_are_named():
    streams = {'never': filled([]), 'late': filled([160 * MS]), 'old': filled([0]), 'fine': filled([100 * MS])}
    got = observation_at(streams, 150 * MS, 1)
    assert list(got.data) == ['fine'] and not got.complete
    assert got.problems == {
        'never': 'nothing received on x',
        'late': 'x: no sample until 0.000 s before now',
        'old': 'x: newest sample is 0.150 s old, allowed 0.1 s',
    }


def test_history_before_the_start_repeats_the_first_step():
    """As training windows do, which repeat an episode's first row."""
    buffer = filled([0, P, 2 * P])
    assert not observation_at({'x': buffer}, P, 3, P).complete
    assert observation_at({'x': buffer}, P, 3, P, start=0).data['x'][:, 0].tolist() == [0, 0, P]
    assert observation_at({'x': buffer}, 2 * P, 3, P, start=2 * P).data['x'][:, 0].tolist() == [2 * P] * 3
    assert observation_at({'x': buffer}, 2 * P, 3, P, start=9 * P).data['x'][:, 0].tolist() == [2 * P] * 3


def test_history_follows_the_jitter_of_the_camera():
    """Steps exactly k·P before a jittered frame would miss the frame before by a hair and take the one before that."""
    random = np.random.default_rng(0)
    frames = (np.arange(200) * P + random.integers(-2 * MS, 2 * MS, 200)).tolist()
    camera = filled(frames, max_age=0.25)
    for i in range(3, 200):
        got = observation_at({'front': camera}, frames[i], 4, P, anchor='front')
        assert got.data['front'][:, 0].tolist() == frames[i - 3 : i + 1]
    exact = [
        observation_at({'front': camera}, frames[i], 2, P).data['front'][0, 0] == frames[i - 1] for i in range(2, 200)
    ]
    assert np.mean(exact) < 0.7
    # a frame that was lost is not replaced by a distant one
    assert history_times(2 * P, 2, P, anchor=filled([0, 2 * P])) == [P, 2 * P]


def test_grid():
    ticks = grid_ticks(START, START + 10 * P, 10.0)
    assert ticks.stamps.tolist() == [START + k * P for k in range(11)] and not ticks.gap.any()
    thirds = grid_ticks(0, 10**9, 30.0).stamps
    assert len(thirds) == 31 and thirds[-1] == 10**9
    assert len(grid_ticks(5, 4, 10.0).stamps) == 0


@pytest.mark.parametrize('rate', [10, 20, 30, 50, 60, 100])
@pytest.mark.parametrize('jitter', [0, 1])
def test_every_kth_frame_despite_jitter(rate, jitter):
    random = np.random.default_rng(rate)
    frames = np.round(np.arange(60 * rate) * 1e9 / rate).astype(np.int64) + jitter * random.integers(-MS, MS, 60 * rate)
    ticks = camera_ticks(frames, 10.0, rate)
    assert ticks.stamps.tolist() == frames[:: rate // 10].tolist()
    assert not ticks.gap.any() and ticks.warnings == ()


@pytest.mark.parametrize('rate, declared', [(29.0, 30), (31.0, 30), (9.93, 10), (10.07, 10), (14.0, 15), (50.0, 50)])
def test_number_of_ticks_keeps_time(rate, declared):
    """Over a minute the rows neither stretch nor compress time, whatever the true rate."""
    fps = 20.0 if declared == 50 else 10.0
    ticks = camera_ticks(np.round(np.arange(60 * rate) * 1e9 / rate).astype(np.int64), fps, declared)
    expected = 60 * (rate if abs(rate / fps - 1) <= 0.01 else fps)
    assert abs(len(ticks.stamps) - expected) <= 0.06 * expected
    assert np.all(np.diff(ticks.stamps) > 0)
    assert bool(ticks.warnings) == (declared in (50, 15) or rate == 29.0 or rate == 31.0)


@pytest.mark.parametrize('rate', [10, 30])
@pytest.mark.parametrize('lost', [1, 2, 4])
def test_lost_frames_leave_gap_ticks_where_they_were_due(rate, lost):
    """Dropping those ticks instead would compress time."""
    k = rate // 10
    frames = np.round(np.arange(6 * rate) * 1e9 / rate).astype(np.int64)
    cut = slice(20 * k - (k - 1), (20 + lost - 1) * k + k)  # every frame that could serve ticks 20 … 20+lost-1
    ticks = camera_ticks(np.delete(frames, np.arange(*cut.indices(len(frames)))), 10.0, rate)
    assert len(ticks.stamps) == 60 and np.flatnonzero(ticks.gap).tolist() == list(range(20, 20 + lost))
    np.testing.assert_allclose(ticks.stamps, frames[::k], atol=2)


def test_rates_on_a_coarse_clock_and_with_losses():
    alternating = np.arange(200) * 10 * MS // (4 * MS) * (4 * MS)  # steps of 8 and 12 ms
    assert typical_period(alternating) == 10 * MS
    assert typical_period(np.delete(np.arange(100) * P, [20, 21, 50, 70])) == P
    assert typical_period(np.array([3, 10])) == 7
    frames = np.arange(50) * P + np.arange(50) % 2 * 4 * MS
    ticks = camera_ticks(frames, 10.0, 10.0)
    assert ticks.stamps.tolist() == frames.tolist() and ticks.warnings == ()


def test_a_late_frame_is_no_gap():
    frames = np.arange(30) * P
    frames[10] += 60 * MS
    ticks = camera_ticks(frames, 10.0, 10.0)
    assert ticks.stamps.tolist() == frames.tolist() and not ticks.gap.any()


def test_rates_that_do_not_fit_are_warned_about():
    frames = np.arange(100) * 20 * MS
    assert 'no multiple of 20 Hz' in camera_ticks(frames, 20.0, 50.0).warnings[0]
    assert 'declared at 30 Hz runs at 50 Hz' in camera_ticks(frames, 10.0, 30.0).warnings[0]
    assert len(camera_ticks(np.array([]), 10.0, 10.0).stamps) == 0
    assert camera_ticks(np.array([7]), 10.0, 10.0).stamps.tolist() == [7]


@settings(max_examples=200, deadline=None)
@given(
    stamps=st.lists(st.integers(0, 100), unique=True, max_size=40), first=st.integers(0, 40), count=st.integers(1, 6)
)
def test_labels_against_brute_force(stamps, first, count):
    period, max_age = 10, 15
    stamps = np.array(sorted(stamps), np.int64)
    ticks = first + period * np.arange(count)
    hold, hold_age = labels(ticks, 'command_hold', stamps, 1e9 / period, max_age * 1e-9)
    command, age = labels(ticks, 'command', stamps, 1e9 / period, max_age * 1e-9)
    for k, t in enumerate(ticks):
        before = [i for i, s in enumerate(stamps) if t - max_age <= s <= t]
        within = [i for i, s in enumerate(stamps) if t <= s < t + period]
        assert hold[k] == max(before, default=-1)
        assert command[k] == (min(within) if within else max(before, default=-1))
        if command[k] >= 0:
            assert age[k] == pytest.approx((t - stamps[command[k]]) * 1e-9)


def test_label_names():
    with pytest.raises(DataError, match="label is 'nearest'"):
        labels(np.arange(3), 'nearest', np.arange(3), 10.0, 1.0)
    assert next_state(np.arange(4)[:, None])[:, 0].tolist() == [1, 2, 3]


# Whole recordings, decided


def recorded(robot, streams: dict, delay=MS) -> Recording:
    """A recording of streams: name → stamps [ns since START] in order of arrival.

    Every sample is its place, in all columns; each arrives `delay` after the newest stamp before it.
    """
    records = {}
    for name, stamps in streams.items():
        stream = streams_of(robot)[name]
        stamps = START + np.array(stamps, np.int64)
        samples = None if stream.is_image else np.tile(np.arange(float(len(stamps)))[:, None], stream.shape)
        records[name] = StreamRecord(stream, '/' + stream.topic, stamps, np.maximum.accumulate(stamps) + delay, samples,
                                     np.arange(len(stamps), dtype=np.uint32) if stream.is_image else None)
    return Recording(SimpleNamespace(path=Path('bag')), robot, records, {}, (), (Span(),))


def every(milliseconds: int, begin=0, end=2000) -> list[int]:
    """Stamps at a regular distance [ms], in [ns]."""
    return [t * MS for t in range(begin, end, milliseconds)]


def column(rows, name) -> list[int]:
    """Which samples the rows hold of a feature."""
    return (rows.action if name == 'action' else rows.lowdim[name])[:, 0].astype(int).tolist()


def test_ties_ages_and_commands_by_hand():
    """Ticks at 0, 100, 200 … ms; joints may be 50 ms old, the goal 250, commands 100."""
    # a sample of the tick's own time counts, one a nanosecond later does not, and of two with one stamp the last to arrive
    joints = [0, 100 * MS, 200 * MS + 1, 190 * MS, 300 * MS, 300 * MS, 400 * MS]
    goal = [0, 50 * MS, 400 * MS]
    # 0: the first command in [0, 100). 1: one at its tick. 2: none in [200, 300), the last before is 100 ms old.
    # 3: none, and the last is too old by a nanosecond. 4: the first in [400, 500).
    action = [30 * MS, 20 * MS, 100 * MS, 200 * MS - 1, 450 * MS]
    (rows,) = align_recording(recorded(contract(camera_rate=None), {'joints': joints, 'goal': goal, 'action': action}))
    assert ((rows.stamps - START) // MS).tolist() == [0, 100, 200, 300, 400]
    assert column(rows, 'joints') == [0, 1, 3, 5, 6]
    assert column(rows, 'goal') == [0, 1, 1, 1, 2]
    assert column(rows, 'action') == [1, 2, 3, 3, 4]
    assert rows.filled.tolist() == [False, False, False, True, False]
    np.testing.assert_allclose(rows.ages['joints'], [0, 0, 0.01, 0, 0], atol=1e-12)
    np.testing.assert_allclose(rows.ages['goal'], [0, 0.05, 0.15, 0.25, 0], atol=1e-12)
    np.testing.assert_allclose(rows.ages['action'], [-0.02, 0, 0, 0.1, -0.05], atol=2e-9)
    assert (rows.first, rows.last) == (START, START + 400 * MS)


def test_command_hold_and_next_state_by_hand():
    streams = {'joints': every(50, 0, 450), 'goal': every(100, 0, 450), 'action': [10 * MS, 90 * MS, 100 * MS, 250 * MS]}
    (held,) = align_recording(recorded(contract('command_hold', camera_rate=None), streams))
    assert ((held.stamps - START) // MS).tolist() == [100, 200, 300] and column(held, 'action') == [2, 2, 3]
    (rows,) = align_recording(recorded(contract('next_state', camera_rate=None), streams))
    assert column(rows, 'joints') == [0, 2, 4, 6] and column(rows, 'action') == [2, 4, 6, 8]
    np.testing.assert_allclose(rows.ages['action'], -0.1, atol=1e-12)
    del streams['action']  # nobody commanded: an arm guided by hand
    (same,) = align_recording(recorded(contract('next_state', camera_rate=None), streams))
    np.testing.assert_array_equal(same.action, rows.action)
    # where positions are missing, the row before has no next state, either
    streams['joints'] = [t for t in streams['joints'] if t not in (150 * MS, 200 * MS)]
    (rows,) = align_recording(recorded(contract('next_state', camera_rate=None), streams))
    assert rows.filled.tolist() == [False, True, True, False]


def brute_force(streams: dict, robot) -> list[tuple] | None:
    """Rows of a recording without camera, in plain loops: (tick, joints, goal, action, filled); None if it is refused."""
    period = 100 * MS
    begin = max(min(streams[name]) for name in ('joints', 'goal'))
    end = max(max(streams[name]) for name in ('joints', 'goal'))
    ages = {'joints': 50 * MS, 'goal': 250 * MS, 'action': 100 * MS}

    def newest(name, low, high):
        """Place of the newest stamp in [low, high], the last to arrive of equal ones; -1 for none."""
        best = -1
        for place, stamp in enumerate(streams[name]):
            if low <= stamp <= high and (best < 0 or stamp >= streams[name][best]):
                best = place
        return best

    table = []
    tick = begin
    while tick <= end:
        row = {name: newest(name, tick - ages[name], tick) for name in streams}
        if robot.action.label == 'command':
            following = [stamp for stamp in streams['action'] if tick <= stamp < tick + period]
            if following:
                row['action'] = newest('action', min(following), min(following))
        table.append((tick, row))
        tick += period
    while table and -1 in table[0][1].values():
        table.pop(0)
    while table and -1 in table[-1][1].values():
        table.pop()
    for name in streams:
        marks = ''.join('x' if row[name] < 0 else '.' for _, row in table)
        if 'xxx' in marks:
            return None
    rows, last = [], {}
    for tick, row in table:
        last = {name: place if place >= 0 else last[name] for name, place in row.items()}
        rows.append((tick, last['joints'], last['goal'], last['action'], -1 in row.values()))
    return rows if len(rows) >= 2 else None


@pytest.mark.parametrize('label', ['command', 'command_hold'])
def test_rows_against_brute_force(label):
    robot = contract(label, camera_rate=None)
    refused = flagged = 0
    for seed in range(150):
        random = np.random.default_rng(seed)
        streams = {}
        for name, step in (('joints', 20), ('goal', 100), ('action', 40)):
            stamps = np.arange(0, 1500, step) * MS
            stamps = stamps[random.random(len(stamps)) > random.choice([0, 0.1, 0.3, 0.6])]
            stamps = stamps + random.integers(-2, 3, len(stamps)) * step * MS // 2  # disorder, and equal stamps
            streams[name] = stamps.tolist()
        expected = brute_force(streams, robot)
        try:
            (rows,) = align_recording(recorded(robot, streams))
        except DataError as error:
            assert error.code in ('E202', 'E206', 'E207', 'E209')
            if error.code == 'E202':  # what is refused for its silent end may have a whole beginning
                assert max(streams[name][-1] for name in ('joints', 'goal')) > 1000 * MS
            else:
                assert expected is None, f'seed {seed}: {error}'
            refused += 1
            continue
        got = list(zip((rows.stamps - START).tolist(), column(rows, 'joints'), column(rows, 'goal'), column(rows, 'action'),
                       rows.filled.tolist(), strict=True))
        assert got == expected, f'seed {seed}'
        flagged += sum(rows.filled)
    assert refused >= 20 and flagged >= 20, 'the cases are varied'


@settings(max_examples=100, deadline=None)
@given(stamps=st.lists(st.integers(0, 30), max_size=40), data=st.data())
def test_a_whole_recording_is_the_same_as_one_by_one(stamps, data):
    without = data.draw(st.sets(st.sampled_from(range(len(stamps))))) if stamps else set()
    one_by_one = StreamBuffer(stream())
    for place, stamp in enumerate(stamps):
        if place not in without:
            one_by_one.add(stamp, place)
    record = StreamRecord(stream(), '/x', np.array(stamps, np.int64), np.array(stamps, np.int64), None, None)
    at_once = StreamBuffer.of(record, without)
    assert (list(at_once.stamps), list(at_once.samples)) == (one_by_one.stamps, one_by_one.samples)


@pytest.mark.parametrize('rate, fps', [(60, 30), (30, 15), (20, 10), (30, 30)])
def test_rates_with_a_millisecond_of_jitter(rate, fps):
    """Each k-th frame, over five minutes; intervals within 6 % of the period."""
    random = np.random.default_rng(rate)
    count = 300 * rate
    frames = np.round(np.arange(count) * 1e9 / rate).astype(np.int64) + random.integers(-MS, MS, count)
    streams = {'joints': every(10, 0, 2000), 'goal': every(100), 'front': frames - frames[0] + 100 * MS, 'action': every(20)}
    ticks = camera_ticks(frames, fps, rate)
    assert ticks.stamps.tolist() == frames[::rate // fps].tolist() and not ticks.gap.any() and ticks.warnings == ()
    np.testing.assert_allclose(np.diff(ticks.stamps), 1e9 / fps, rtol=0.06 if rate <= 30 and fps <= 15 or rate == 60 else 0.061)
    robot = contract(fps=float(fps), camera_rate=float(rate))
    streams['front'] = streams['front'][streams['front'] < 2000 * MS]
    (rows,) = align_recording(recorded(robot, streams))
    assert rows.frames['front'].tolist() == list(range(0, len(streams['front']), rate // fps))
    assert not rows.filled.any() and not rows.ages['front'].any()


@pytest.mark.parametrize('true, declared, fps', [(29.97, 30, 30), (30.03, 30, 30), (59.94, 60, 30), (60.5, 60, 30),
                                                 (30.003, 30, 10), (29.8, 30, 15)])
@pytest.mark.parametrize('jitter', [0, MS])
def test_a_clock_that_drifts_loses_and_doubles_nothing(true, declared, fps, jitter):
    """Over five minutes 30.03 Hz makes nine frames more than 30 Hz does; a grid of 30 Hz would double or drop them."""
    random = np.random.default_rng(0)
    count = round(300 * true)
    frames = np.round(np.arange(count) * 1e9 / true).astype(np.int64) + random.integers(-jitter, jitter + 1, count)
    ticks = camera_ticks(frames, fps, declared)
    assert ticks.stamps.tolist() == frames[::declared // fps].tolist() and not ticks.gap.any() and ticks.warnings == ()
    np.testing.assert_allclose(np.diff(ticks.stamps), declared // fps * 1e9 / true, atol=2 * jitter + 1)


def test_latencies_of_cameras_and_what_was_lost():
    """The first camera gives the ticks; the other one is 30 ms behind it, and loses two frames."""
    robot = contract()
    other = replace(robot.observations['front'], topic='wrist/compressed')
    robot = replace(robot, observations={**robot.observations, 'wrist': other})
    wrist = [t - 30 * MS for t in every(100, 100, 2100) if t not in (1000 * MS, 1100 * MS)]
    streams = {'joints': every(10, 0, 2100), 'goal': every(100), 'front': every(100), 'wrist': wrist, 'action': every(20)}
    (rows,) = align_recording(recorded(robot, streams))
    assert ((rows.stamps - START) // MS).tolist() == list(range(100, 2000, 100))
    assert rows.frames['front'].tolist() == list(range(1, 20))
    assert rows.frames['wrist'].tolist() == [*range(9), 8, 8, *range(9, 17)]
    # a frame may be 150 ms old: the first of those lost is covered by the one before, the second is not
    assert np.flatnonzero(rows.filled).tolist() == [10]
    assert rows.ages['wrist'].max() == pytest.approx(0.23) and np.median(rows.ages['wrist']) == pytest.approx(0.03)


def test_broken_frames_count_as_lost():
    streams = {'joints': every(10), 'goal': every(100), 'front': every(100), 'action': every(20)}
    (rows,) = align_recording(recorded(contract(), streams), broken={'front': {7, 8}})
    assert rows.frames['front'].tolist() == [*range(7), 6, 6, *range(9, 20)] and np.flatnonzero(rows.filled).tolist() == [7, 8]
    with pytest.raises(DataError, match='E206 bag: gap of 0.40 s on camera/compressed at 0.60 s'):
        align_recording(recorded(contract(), streams), broken={'front': {7, 8, 9}})


def without(stamps: list[int], begin: int, end: int) -> list[int]:
    """All but those in [begin, end) [ms]."""
    return [t for t in stamps if not begin * MS <= t < end * MS]


def test_long_gaps_refuse_or_split():
    streams = {'joints': without(every(10), 605, 1105), 'goal': every(100), 'action': without(every(20), 1405, 1999)}
    recording = recorded(contract(camera_rate=None), streams)
    with pytest.raises(DataError, match=r'E206 bag: gap of 0.51 s on joint_states at 0.60 s, more than the 2 ticks'):
        align_recording(recording)
    first, second = align_recording(recording, gaps='split')
    assert ((first.stamps - START) // MS).tolist() == list(range(0, 700, 100))
    assert ((second.stamps - START) // MS).tolist() == list(range(1200, 1600, 100))
    assert column(second, 'joints') == [streams['joints'].index(t * MS) for t in range(1200, 1600, 100)]
    assert not first.filled.any() and not second.filled.any()
    assert first.warnings == second.warnings == ('gap of 0.51 s on joint_states at 0.60 s',)
    assert (first.first, first.last) == (second.first, second.last) == (START, START + 1990 * MS)


def test_two_gaps_at_once_and_what_is_between_them():
    streams = {'joints': without(every(10), 405, 805), 'goal': without(every(100), 600, 1500), 'action': every(20)}
    parts = align_recording(recorded(contract(camera_rate=None), streams), gaps='split')
    spans = [((part.stamps[[0, -1]] - START) // MS).tolist() for part in parts]
    assert spans == [[0, 400], [1500, 1900]], 'goal is known until 750 ms, joints from 810 on'
    one_row = {'joints': [t * MS for t in (0, 100, 700, 1300, 1400)], 'goal': every(100, 0, 1500), 'action': every(20, 0, 1500)}
    parts = align_recording(recorded(contract(camera_rate=None), one_row), gaps='split')
    assert [len(part.stamps) for part in parts] == [2, 2], 'a single row is no episode'


@pytest.mark.parametrize('label', ['command', 'next_state'])
def test_a_stream_that_ends_early(label):
    streams = {'joints': every(10), 'goal': every(100, 0, 1200), 'action': every(20)}
    recording = recorded(contract(label, camera_rate=None), streams)
    with pytest.raises(DataError, match='E202 bag: goal falls silent for the last 0.89 s; what is whole remains with --gaps'):
        align_recording(recording)
    (rows,) = align_recording(recording, gaps='split')
    last = 1300 if label == 'command' else 1200  # whose next state is that of 1300 ms
    assert rows.stamps[-1] == START + last * MS and rows.warnings == ('goal falls silent for the last 0.89 s',)


@pytest.mark.parametrize('change, code, words', [
    ({'goal': []}, 'E202', 'no messages on goal'),
    ({'action': []}, 'E202', 'no messages on command'),
    ({'action': every(20, 5000, 6000)}, 'E209', 'no command on command at any of 20 ticks, nor in the 0.1 s before one'),
    ({'joints': [t - 3612 * 1000 * MS for t in every(10)]}, 'E202', 'joint_states falls silent'),
    ({'joints': every(10, 1990, 2000), 'goal': [1900 * MS]}, 'E207',
     'of 1 ticks there is a sample young enough of /joint_states at 1, /goal at 1, /command at 1'),
])
def test_what_makes_no_episode(change, code, words):
    streams = {'joints': every(10), 'goal': every(100), 'action': every(20), **change}
    with pytest.raises(DataError, match=re.escape(words)) as error:
        align_recording(recorded(contract(camera_rate=None), streams))
    assert error.value.code == code and str(error.value).startswith(f'{code} bag: ')


@pytest.mark.parametrize('seconds, fails', [(3612.0, True), (-3612.0, True), (1.3, True), (-1.0, False), (0.9, False)])
def test_clocks_that_disagree(seconds, fails):
    """The goal may be 0.25 s old when it arrives, besides a second for the network."""
    recording = recorded(contract(camera_rate=None), {'joints': every(10), 'goal': every(100), 'action': every(20)})
    record = recording.streams['goal']
    moved = replace(record, stamps=record.stamps + round(seconds * 1e9))
    recording = replace(recording, streams={**recording.streams, 'goal': moved})
    if fails:
        words = f'E204 bag: /goal: header stamps are {seconds - 0.001:+.3f} s from arrival, those of others -0.001 s'
        with pytest.raises(DataError, match=re.escape(words)):
            align_recording(recording)
    else:
        align_recording(recording, gaps='split')


def test_simulated_time_in_headers_is_no_disagreement():
    recording = recorded(contract(camera_rate=None), {'joints': every(10), 'goal': every(100), 'action': every(20)},
                         delay=50_000 * 1000 * MS)
    (rows,) = align_recording(recording)
    assert len(rows.stamps) == 20


def test_marks_cut_by_arrival():
    """Camera frames arrive 1 ms after their stamps: marks at 500 and 1200 ms include the frames of 500 to 1100 ms."""
    streams = {'joints': every(10), 'goal': [0, 450 * MS], 'front': every(100), 'action': every(20)}
    robot = contract()
    robot = replace(robot, observations={**robot.observations, 'goal': replace(robot.observations['goal'], max_age=10.0)})
    recording = recorded(robot, streams)
    span = Span(START + 500 * MS, START + 1200 * MS, 'pick', True, ('odd',))
    (rows,) = align_recording(recording, span)
    assert ((rows.stamps - START) // MS).tolist() == list(range(500, 1200, 100))
    assert column(rows, 'goal') == [1] * 7, 'what was known before the mark still is'
    assert (rows.task, rows.success, rows.warnings) == ('pick', True, ('odd',))
    assert (rows.first, rows.last) == (START + 500 * MS, START + 1100 * MS)
    with pytest.raises(DataError, match='E202 bag, episode marked at 0.51 s: nothing on /camera/compressed between the marks'):
        align_recording(recording, Span(START + 510 * MS, START + 590 * MS))
    (rows,) = align_recording(recording, Span(begin=START + 1500 * MS))
    assert rows.stamps[0] == START + 1500 * MS and rows.stamps[-1] == START + 1900 * MS


@pytest.mark.parametrize('seed', range(5))
def test_live_buffers_give_what_the_rows_hold(seed):
    """Bit for bit, whatever the jitter, latency and losses of the streams: one function serves both."""
    random = np.random.default_rng(seed)
    robot = contract(camera_rate=30.0)
    streams = {}
    for name, step in (('joints', 10), ('goal', 100), ('front', 33), ('action', 20)):
        stamps = np.array(every(step, 0, 3000)) + random.integers(-MS, MS, len(every(step, 0, 3000)))
        streams[name] = stamps[random.random(len(stamps)) > 0.03]
    recording = recorded(robot, streams)
    samples = {name: random.normal(size=record.samples.shape) for name, record in recording.streams.items()
               if record.samples is not None}
    recording = replace(recording, streams={name: replace(record, samples=samples.get(name))
                                            for name, record in recording.streams.items()})
    for rows in align_recording(recording, gaps='split'):
        live = buffers(robot)
        arrivals = sorted((record.received[i], name, i) for name, record in recording.streams.items() if name in live
                          for i in range(len(record.stamps)))
        for t, filled, *row in zip(rows.stamps, rows.filled, rows.lowdim['joints'], rows.lowdim['goal'], rows.frames['front'],
                                   strict=True):
            while arrivals and arrivals[0][0] <= t + 100 * MS:  # live, a policy is asked after the frame has arrived
                _, name, i = arrivals.pop(0)
                record = recording.streams[name]
                live[name].add(int(record.stamps[i]), np.array(i) if record.samples is None else record.samples[i])
            got = observation_at(live, int(t))
            if not filled:
                assert got.complete
                for name, value in zip(('joints', 'goal', 'front'), row, strict=True):
                    np.testing.assert_array_equal(got.data[name][0], value)
