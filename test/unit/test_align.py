from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from il_policies.contract import Stream
from il_policies.data.align import (
    StreamBuffer,
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
