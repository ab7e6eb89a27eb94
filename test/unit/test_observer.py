from __future__ import annotations

import numpy as np
import pytest

from il_policies.data.decode import DecodeError
from il_policies.observer import Observer
from recordings import MS, START, compressed, contract, joint_state, picture, point, positions, recording

STREAM_OF = {'joint_states': 'joints', 'goal': 'goal', 'camera/compressed': 'front'}


def make_observer(features=('joints', 'goal', 'front'), history=2):
    return Observer(contract(), features, history, 0.1)


def feed(observer, until: float, delay: int = 2 * MS):
    """The synthetic recording as it arrives, up to `until` [s]."""
    for topic, stamp, message in recording(until):
        if (name := STREAM_OF.get(topic)) in observer.streams:
            observer.take(name, message, stamp + MS, stamp + delay)


def at(seconds: float) -> int:
    return START + round(seconds * 1000) * MS


def test_what_is_seen_is_what_was_known_at_the_newest_frame():
    observer = make_observer()
    feed(observer, 2.0)
    t, observation = observer.observe(at(1.96), at(0.0))
    assert t == at(1.9) and not observation.problems
    np.testing.assert_allclose(observation.data['joints'], positions([1.8, 1.9]))
    np.testing.assert_allclose(observation.data['goal'], [[0.25, 1.8], [0.25, 1.9]])
    assert [int(image[0, 0, 0]) for image in observation.data['front']] == [5 * 18, 5 * 19]
    t, first = observer.observe(at(1.96))
    np.testing.assert_allclose(first.data['joints'], positions([1.9, 1.9]), err_msg='an episode begins anew')
    t, _ = make_observer(('joints', 'goal')).observe(at(1.96))
    assert t == at(1.96), 'without cameras it is now'


def test_a_dead_camera_shows_against_now():
    observer = make_observer()
    feed(observer, 2.0)
    assert not observer.problems(at(2.0))
    _, observation = observer.observe(at(2.0) + 60 * MS, at(0.0))
    assert observation.problems['front'] == 'camera/compressed: newest sample is 0.160 s old, allowed 0.15 s'
    assert observer.problems(at(5.0)).keys() == {'joints', 'goal', 'front'}
    assert make_observer().problems(at(0.0))['goal'] == 'nothing received on goal'


@pytest.mark.parametrize(('message', 'name', 'words'), [
    (joint_state(at(2.0), ['a', 'b'], [np.nan, 0.0]), 'joints', 'not finite: a = nan'),
    (joint_state(at(2.0), ['a', 'x'], [0.0, 0.0]), 'joints', "no joints ['b']"),
    (joint_state(at(2.2), ['a', 'b'], [0.0, 0.0]), 'joints', 'stamped 0.200 s ahead of now'),
    (joint_state(0, ['a', 'b'], [0.0, 0.0]), 'joints', 'carries no such stamp'),
    (point(at(2.0), np.inf, 0.0), 'goal', 'not finite: point.x = inf'),
    (compressed(at(2.0), b'\xff\xd8 no picture'), 'front', 'no whole JPEG')])
def test_what_is_no_sample_is_refused_and_named_as_long_as_it_is_missed(message, name, words):
    observer = make_observer()
    feed(observer, 2.0)
    kept = list(observer.streams[name].stamps)
    with pytest.raises(DecodeError):
        observer.take(name, message, None, at(2.0))
    assert list(observer.streams[name].stamps) == kept and observer.refused[name] == 1
    assert not observer.problems(at(2.0)), 'one is not missed'
    assert words in observer.problems(at(2.5))[name]
    assert words not in observer.problems(at(3.5))[name]


def test_a_stamp_a_little_ahead_waits_for_its_time():
    observer = make_observer(('joints',), history=1)
    observer.take('joints', joint_state(at(1.0), ['a', 'b'], [1.0, 1.0]), None, at(1.0))
    observer.take('joints', joint_state(at(1.05), ['a', 'b'], [2.0, 2.0]), None, at(1.0))
    assert observer.observe(at(1.02))[1].data['joints'][0, 0] == 1.0
    assert observer.observe(at(1.06))[1].data['joints'][0, 0] == 2.0


def test_a_clock_that_goes_back_empties_the_buffers():
    observer = make_observer()
    feed(observer, 3.0)
    observer.take('joints', joint_state(at(0.5), ['a', 'b'], [0.0, 0.0]), None, at(0.5))
    assert len(observer.streams['joints'].stamps) == 1 and observer.streams['front'].newest is None
    observer.take('front', compressed(at(0.5), picture(7)), None, at(0.5))
    assert observer.time(at(0.52)) == at(0.5)


def test_buffers_are_long_enough_for_any_history_and_no_longer():
    observer = Observer(contract(), ('joints',), 200, 0.1)
    for i in range(10_000):
        observer.take('joints', joint_state(at(0.01 * (i + 1)), ['a', 'b'], [0.01 * (i + 1), 0.0]), None, at(0.01 * (i + 1)))
    _, observation = observer.observe(at(100.0), at(0.0))
    np.testing.assert_allclose(observation.data['joints'][:, 0], 100.0 - 0.1 * np.arange(199, -1, -1))
    assert len(observer.streams['joints'].stamps) <= 2 * (4000 + 8)
