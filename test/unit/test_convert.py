from __future__ import annotations

import re

import numpy as np
import pytest

from il_policies.data.align import buffers, observation_at
from il_policies.data.convert import convert, dataset_info, summary_line
from il_policies.data.decode import decode, stamp_of
from il_policies.data.errors import BagError, DataError
from il_policies.data.store import Dataset
from recordings import MS, START, compressed, contract, joint_state, picture, point, positions, recording, write_bag

GOOD = {'success': 'true', 'task': 'reach'}


def single(tmp_path, messages, robot, **kwargs):
    """Convert one bag; the dataset and the report."""
    write_bag(tmp_path / 'bags' / 'one', messages, **{'custom': GOOD, **kwargs})
    (report,) = convert(tmp_path / 'bags', robot, tmp_path / 'out')
    return Dataset(tmp_path / 'out'), report


@pytest.mark.parametrize('camera_rate', [10.0, 30.0, None])
def test_every_value_is_the_one_of_its_time(tmp_path, camera_rate):
    dataset, report = single(tmp_path, recording(3.0, rate=camera_rate or 10.0), contract(camera_rate=camera_rate))
    assert report.refused == '' and report.details['filled'] == 0
    table = dataset.lowdim(0)
    t = (table['stamp'] - START) / 1e9
    np.testing.assert_allclose(t, np.arange(30) / 10, atol=1e-9)
    np.testing.assert_allclose(table['joints'], positions(np.round(t, 6)), atol=1e-6)
    np.testing.assert_allclose(table['goal'], np.stack([0 * t + 0.25, t], 1), atol=1e-6)
    # command: first at or after the tick, 10 ms later here; columns in the order of the contract, b before a
    np.testing.assert_allclose(table['action'], np.stack([-(t + 0.01), t + 0.01], 1), atol=1e-6)
    assert (
        dataset.episodes[0]['success'] is True
        and dataset.episodes[0]['task'] == 'reach'
        and dataset.episodes[0]['source'] == 'one'
    )
    if camera_rate:
        k = round(camera_rate / 10)
        for row in (0, 7, 29):
            np.testing.assert_allclose(dataset.image(0, 'front', row), 5 * k * row % 256, atol=1)


def test_labels(tmp_path):
    held, _ = single(tmp_path / 'hold', recording(2.0), contract('command_hold'))
    table = held.lowdim(0)
    t = (table['stamp'] - START) / 1e9
    assert t[0] == pytest.approx(0.1)  # at 0 s nothing had been commanded
    np.testing.assert_allclose(table['action'][:, 1], t - 0.01, atol=1e-6)
    following, _ = single(tmp_path / 'next', recording(2.0), contract('next_state'))
    table = following.lowdim(0)
    assert following.info.action.offset == pytest.approx(0.1) and len(table['stamp']) == 19
    np.testing.assert_allclose(table['action'][:-1, ::-1], table['joints'][1:], atol=1e-7)


def test_the_past_only(tmp_path):
    """Nothing sampled later than a tick may reach its observation: change the future, the row stays."""
    messages = recording(2.0)
    changed = [
        (
            topic,
            stamp,
            joint_state(stamp, ['a', 'b'], [7.0, 7.0])
            if topic == 'joint_states' and stamp > START + 1000 * MS
            else message,
        )
        for topic, stamp, message in messages
    ]
    a, _ = single(tmp_path / 'a', messages, contract())
    b, _ = single(tmp_path / 'b', changed, contract())
    np.testing.assert_array_equal(a.lowdim(0)['joints'][:11], b.lowdim(0)['joints'][:11])
    assert np.all(b.lowdim(0)['joints'][11:] == 7.0)


def test_live_buffers_give_the_same(tmp_path):
    """The bag replayed in the order of arrival through the live code, history included, against the dataset's rows."""
    robot = contract()
    frames = [
        START + i * 100 * MS + int(d) for i, d in enumerate(np.random.default_rng(0).integers(-2 * MS, 2 * MS, 30))
    ]
    messages = recording(3.0, camera=frames)
    dataset, _ = single(tmp_path, messages, robot)
    table = dataset.lowdim(0)
    live = buffers(robot)
    first, row = None, 0
    for topic, _, message in messages:
        for name, stream in robot.observations.items():
            if stream.topic == topic:
                live[name].add(stamp_of(message, stream, None, None), decode(message, stream))
        if topic != 'camera/compressed' or live['front'].newest < table['stamp'][0]:
            continue
        now = live['front'].newest
        first = now if first is None else first
        got = observation_at(live, now, 3, 100 * MS, start=first, anchor='front')
        assert now == table['stamp'][row] and got.complete
        rows = [max(row + k, 0) for k in (-2, -1, 0)]
        np.testing.assert_array_equal(got.data['joints'].astype(np.float32), table['joints'][rows])
        np.testing.assert_array_equal(got.data['goal'].astype(np.float32), table['goal'][rows])
        np.testing.assert_array_equal(got.data['front'], [dataset.image(0, 'front', r) for r in rows])
        row += 1
    assert row == len(table['stamp'])


@pytest.mark.parametrize('clock, shift', [('header', 0), ('publish', MS), ('receive', 2 * MS)])
def test_the_declared_clock_and_latency_count(tmp_path, clock, shift):
    dataset, _ = single(tmp_path, recording(2.0), contract(clock=clock, latency=0.0005))
    offset = (dataset.lowdim(0)['stamp'] - START) % (100 * MS)
    assert set(offset.tolist()) == {(shift - MS // 2) % (100 * MS)}


def between(topic, begin, end):
    """Drop a topic in a span [s]."""
    return lambda name, t: name != topic or not begin * 1e9 <= t < end * 1e9


@pytest.mark.parametrize(
    'topic, begin, end, rows',
    [
        ('joint_states', 1.05, 1.25, [11, 12]),  # 0.05 s of age allowed, the last sample is of 1.04 s
        ('camera/compressed', 1.05, 1.25, [11, 12]),  # two frames lost
        ('command', 1.05, 1.35, [12]),
    ],
)  # 0.1 s allowed, the last command is of 1.03 s, the next of 1.35 s
def test_short_gaps_are_repeated_and_flagged(tmp_path, topic, begin, end, rows):
    dataset, report = single(tmp_path, recording(3.0), contract(), keep=between(topic, begin, end))
    table = dataset.lowdim(0)
    assert report.refused == ''
    assert np.flatnonzero(table['filled']).tolist() == rows
    np.testing.assert_allclose(np.diff(table['stamp']), 100 * MS, atol=5)  # time is not compressed
    if topic == 'camera/compressed':
        for row, frame in ((10, 10), (11, 10), (12, 10), (13, 13)):
            np.testing.assert_allclose(dataset.image(0, 'front', row), 5 * (frame if frame < 11 else 13), atol=1)
    if topic == 'joint_states':
        np.testing.assert_array_equal(table['joints'][12], table['joints'][11])


@pytest.mark.parametrize(
    'topic, begin, end, words',
    [
        ('joint_states', 1.05, 1.65, r'one: gap of more than 2 ticks at 1.10 s: joint_states: newest sample is'),
        ('camera/compressed', 1.05, 1.35, r'one: gap of more than 2 ticks at 1.10 s: camera/compressed'),
        ('command', 1.05, 1.75, r'gap of more than 2 ticks at 1.20 s: command: no command within 0.1 s'),
        ('joint_states', 2.0, 9.0, r'one: joint_states falls silent for the last 0.9\d s'),
        ('goal', 0.0, 9.0, r'no messages on goal'),
    ],
)
def test_long_gaps_refuse_the_episode(tmp_path, topic, begin, end, words):
    dataset, report = single(tmp_path, recording(3.0), contract(), keep=between(topic, begin, end))
    assert len(dataset) == 0 and report.index is None
    assert re.search(words, report.refused), report.refused


def test_what_precedes_and_follows_the_commands_is_left_out(tmp_path):
    dataset, report = single(
        tmp_path, recording(3.0), contract(), keep=lambda topic, t: topic != 'command' or 0.95e9 < t < 2.05e9
    )
    t = (dataset.lowdim(0)['stamp'] - START) / 1e9
    assert t[0] == pytest.approx(0.9) and t[-1] == pytest.approx(2.1)
    assert report.details['head_s'] == pytest.approx(0.9)


def test_frames_out_of_order(tmp_path):
    messages = recording(2.0)
    frames = [i for i, (topic, *_) in enumerate(messages) if topic == 'camera/compressed']
    a, b = frames[4], frames[5]
    messages[a], messages[b] = messages[b], messages[a]
    # the bag sorts by arrival, so the later of the two stamps must arrive first
    messages = [(topic, START + i * 4 * MS, message) for i, (topic, _, message) in enumerate(messages)]
    dataset, report = single(tmp_path, messages, contract())
    assert report.details['streams']['front']['out_of_order'] == 1
    for row in range(20):
        np.testing.assert_allclose(dataset.image(0, 'front', row), 5 * row, atol=1)


def test_resumes_and_replaces(tmp_path):
    for name in ('a', 'b', 'c'):
        write_bag(tmp_path / 'bags' / name, recording(1.0), custom=GOOD)
    seen = []
    first = convert(
        tmp_path / 'bags',
        contract(),
        tmp_path / 'out',
        lambda done, total, report: seen.append((done, total, report.kept)),
    )
    assert seen == [(1, 3, False), (2, 3, False), (3, 3, False)]
    before = Dataset(tmp_path / 'out').hash
    again = convert(tmp_path / 'bags', contract(), tmp_path / 'out')
    assert [r.kept for r in again] == [True] * 3 and [r.details for r in again] == [r.details for r in first]
    write_bag(tmp_path / 'bags' / 'd', recording(1.0), custom={'success': 'false'})
    last = convert([tmp_path / 'bags' / name for name in ('a', 'd')], contract(), tmp_path / 'out')
    assert [r.kept for r in last] == [True, False]
    assert [(e['source'], e['success']) for e in Dataset(tmp_path / 'out').episodes] == [('a', True), ('d', False)]
    assert Dataset(tmp_path / 'out').hash != before
    with pytest.raises(DataError, match='another contract'):
        convert(tmp_path / 'bags', contract(latency=0.01), tmp_path / 'out')


def test_topics_in_a_namespace_or_remapped(tmp_path):
    messages = recording(1.0)
    assert single(tmp_path / 'a', messages, contract(), prefix='/left/')[1].refused == ''
    write_bag(tmp_path / 'b/bags/one', messages, custom={'topics': '{"joint_states": "/elsewhere"}'})
    (report,) = convert(tmp_path / 'b/bags', contract(), tmp_path / 'b/out')
    assert 'topics for joint_states; there are: /camera/compressed, /command, /goal, /joint_states' in report.refused
    both = messages + [
        ('right/joint_states', stamp, message) for topic, stamp, message in messages if topic == 'joint_states'
    ]
    _, report = single(tmp_path / 'c', both, contract(), prefix='/left/')
    assert '2 topics for joint_states' in report.refused


def test_wrong_messages_are_named(tmp_path):
    messages = recording(1.0)
    bad = [
        (topic, stamp, joint_state(stamp, ['a', 'c'], [0, 0]) if topic == 'joint_states' else m)
        for topic, stamp, m in messages
    ]
    assert "no joints ['b']; the message has ['a', 'c']" in single(tmp_path / 'a', bad, contract())[1].refused
    bad = [(topic, stamp, point(stamp, 0, 0) if topic == 'joint_states' else m) for topic, stamp, m in messages]
    assert (
        '/joint_states is geometry_msgs/msg/PointStamped, the contract says sensor_msgs'
        in single(tmp_path / 'b', bad, contract())[1].refused
    )
    bad = [(topic, stamp, point(stamp, np.nan, 0) if topic == 'goal' else m) for topic, stamp, m in messages]
    assert 'goal: not finite: point.x = nan' in single(tmp_path / 'c', bad, contract())[1].refused
    bag = write_bag(tmp_path / 'd/bags/one', messages)
    file = bag / 'one_0.mcap'
    file.write_bytes(file.read_bytes()[:-3000])
    (report,) = convert(tmp_path / 'd/bags', contract(), tmp_path / 'd/out')
    assert 'one_0.mcap: damaged' in report.refused
    with pytest.raises(BagError, match='no bag here'):
        convert(tmp_path / 'none', contract(), tmp_path / 'out')


def test_images_of_another_size_are_resized(tmp_path):
    messages = [
        (topic, stamp, compressed(stamp, picture(90, (30, 50))) if topic == 'camera/compressed' else m)
        for topic, stamp, m in recording(1.0)
    ]
    dataset, _ = single(tmp_path, messages, contract())
    assert dataset.image(0, 'front', 3).shape == (8, 12, 3)
    np.testing.assert_allclose(dataset.image(0, 'front', 3), 90, atol=1)


def test_summary(tmp_path):
    write_bag(tmp_path / 'bags/a', recording(2.0), custom=GOOD)
    write_bag(
        tmp_path / 'bags/b', recording(2.0), custom={'success': 'false'}, keep=between('camera/compressed', 1.05, 1.25)
    )
    write_bag(tmp_path / 'bags/c', recording(2.0), custom=GOOD, keep=between('goal', 0, 9))
    reports = convert(tmp_path / 'bags', contract(), tmp_path / 'out')
    line = summary_line(reports)
    assert line == (
        '2 episodes, 40 rows, 5 % filled, 2 messages lost, 1 gaps, oldest sample 0 ms, '
        '1 not labelled a success, 1 refused'
    )
    assert summary_line([]) == '0 episodes, 0 rows, 0 refused'
    details = reports[0].details['streams']['joints']
    assert details['n'] == 200 and details['rate_hz'] == pytest.approx(100.0) and details['gaps'] == 0
    assert dataset_info(contract()).features['joints'].names == ('a', 'b')
