from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from il_policies.bags.reader import Bag
from il_policies.data.errors import DataError
from il_policies.data.recording import Span, read_recording, spans_of, streams_of
from recordings import MS, START, compressed, contract, joint_state, picture, point, positions, recording, text, write_bag


def read(tmp_path, messages, robot=None, markers='', **kwargs):
    """The recording of a bag of these messages."""
    return read_recording(Bag(write_bag(tmp_path / 'bag', messages, **kwargs)), robot or contract(), markers)


def test_every_stream_as_it_arrived(tmp_path):
    messages = recording(1.0)
    got = read(tmp_path, messages, custom={'task': 'reach', 'success': 'true'})
    assert list(got.streams) == ['joints', 'goal', 'front', 'action']
    for name, record in got.streams.items():
        sent = [(stamp, message) for topic, stamp, message in messages if '/' + topic == record.topic]
        assert record.stream == streams_of(contract())[name]
        assert record.stamps.tolist() == [stamp for stamp, _ in sent]
        assert record.received.tolist() == [stamp + 2 * MS for stamp, _ in sent]
        assert record.undecodable == 0
        if name == 'front':
            assert record.samples is None
            assert record.digests.tolist() == [zlib.crc32(bytes(message.data)) for _, message in sent]
        else:
            assert record.digests is None and record.samples.dtype == np.float64
    np.testing.assert_array_equal(got.streams['joints'].samples, [positions(i * 0.01) for i in range(100)])
    np.testing.assert_array_equal(got.streams['action'].samples[:, 1], -got.streams['action'].samples[:, 0])
    assert (got.about['task'], got.damage, got.spans) == ('reach', (), (Span(task='reach', success=True),))


@pytest.mark.parametrize('clock, shift', [('header', 0), ('publish', MS), ('receive', 2 * MS)])
def test_clocks_and_latency(tmp_path, clock, shift):
    record = read(tmp_path, recording(0.5), contract(clock=clock, latency=0.0005)).streams['front']
    assert ((record.stamps - START) % (100 * MS)).tolist() == [(shift - MS // 2) % (100 * MS)] * 5
    assert ((record.received - START) % (100 * MS)).tolist() == [2 * MS] * 5


def test_frozen_images_have_equal_digests(tmp_path):
    messages = [(topic, stamp, compressed(stamp, picture(9 if stamp > START + 400 * MS else 7)) if 'camera' in topic else message)
                for topic, stamp, message in recording(1.0)]
    digests = read(tmp_path, messages).streams['front'].digests
    assert len(set(digests[:5].tolist())) == len(set(digests[5:].tolist())) == 1 and digests[4] != digests[5]


def test_two_features_of_one_topic(tmp_path):
    robot = contract(camera_rate=None)
    robot = replace(robot, observations={**robot.observations, 'only_a': replace(robot.observations['joints'], names=('a',))})
    got = read(tmp_path, recording(0.5), robot)
    np.testing.assert_array_equal(got.streams['only_a'].samples[:, 0], got.streams['joints'].samples[:, 0])


def test_a_bag_without_commands(tmp_path):
    messages = [message for message in recording(0.5) if message[0] != 'command']
    assert 'action' not in read(tmp_path / 'a', messages, contract('next_state')).streams
    assert 'action' in read(tmp_path / 'b', recording(0.5), contract('next_state')).streams
    with pytest.raises(DataError, match=r'E201 .*bag: no topics for command \(action\); there are: /camera/compressed, /goal'):
        read(tmp_path / 'c', messages)


def test_a_topic_without_messages_is_an_empty_stream(tmp_path):
    record = read(tmp_path, recording(0.5), keep=lambda topic, t: topic != 'goal').streams['goal']
    assert len(record.stamps) == 0 and record.samples.shape == (0, 2)


def test_topics_in_a_namespace_or_remapped(tmp_path):
    messages = recording(0.5)
    got = read(tmp_path / 'a', messages, prefix='/left/')
    assert got.streams['goal'].topic == '/left/goal'
    renamed = [(topic.replace('goal', 'target'), stamp, message) for topic, stamp, message in messages]
    custom = {'topics': '{"goal": "/left/target"}'}
    assert read(tmp_path / 'b', renamed, prefix='/left/', custom=custom).streams['goal'].topic == '/left/target'
    with pytest.raises(DataError, match=r'no topics for /elsewhere \(goal\); there are: /camera/compressed, /command, /goal'):
        read(tmp_path / 'c', messages, custom={'topics': '{"goal": "/elsewhere"}'})


def test_all_topics_are_of_one_namespace(tmp_path):
    def moved(**namespaces):
        """The recording with each topic in these namespaces, '' the root; camera/compressed as `camera`."""
        return [(f'{namespace}/{topic}'.lstrip('/'), stamp, message) for topic, stamp, message in recording(0.3)
                for namespace in namespaces.get(topic.partition('/')[0], namespaces['others'])]

    def topics(name, robot=None, custom=None, **namespaces):
        streams = read(tmp_path / name, moved(**namespaces), robot, custom=custom).streams
        return [record.topic for record in streams.values()]

    def in_left():
        return ['/left/joint_states', '/left/goal', '/left/camera/compressed', '/left/command']

    robot = contract()
    mixed = {'others': ['left'], 'command': ['right']}
    with pytest.raises(DataError, match=r'E201 .*bag: no namespace has all topics: /left lacks command; /right lacks '
                                        r'joint_states, goal, camera/compressed; name each `topic` of the contract in full \(as '
                                        r'/left/joint_states\), in a contract per arm'):
        topics('a', **mixed)
    with pytest.raises(DataError, match=r'E201 .*no namespace has all topics: / lacks command; /gripper lacks joint_states'):
        topics('b', others=[''], command=['gripper'])
    with pytest.raises(DataError, match=r'E201 .*: 2 namespaces have all topics: /left, /right; name each `topic` .* in full'):
        topics('c', others=['left', 'right'])
    # The root before any namespace, and of several namespaces the only one that has all.
    assert topics('d', others=['', 'left']) == ['/joint_states', '/goal', '/camera/compressed', '/command']
    assert topics('e', others=['left'], command=['left', 'left/gripper']) == in_left()
    assert topics('f', others=['left', 'right'], camera=['left']) == in_left()
    # In full, by the contract or by the recorder, topics of two namespaces belong together.
    across = replace(robot, action=replace(robot.action, topic='/right/command'))
    assert topics('g', across, **mixed) == [*in_left()[:3], '/right/command']
    assert topics('h', custom={'topics': '{"command": "/right/command"}'}, **mixed) == [*in_left()[:3], '/right/command']
    full = {name: replace(stream, topic='/right/' + stream.topic) for name, stream in robot.observations.items()}
    assert topics('i', replace(across, observations=full), others=['left', 'right']) == [
        topic.replace('left', 'right') for topic in in_left()]
    # Without labels from commands, those of the other arm are no commands.
    assert topics('j', contract('next_state'), **mixed) == in_left()[:3]


def test_wrong_messages_are_named(tmp_path):
    def changed(name, make):
        return [(topic, stamp, make(stamp) if topic == name and stamp > START + 300 * MS else message)
                for topic, stamp, message in recording(0.5)]

    with pytest.raises(DataError, match=r"E203 .*bag at 0\.31 s: joint_states: no joints \['b'\]; the message has \['a', 'c'\]"):
        read(tmp_path / 'a', changed('joint_states', lambda stamp: joint_state(stamp, ['a', 'c'], [0, 0])))
    with pytest.raises(DataError, match=r'E205 .*bag at 0\.40 s: goal: not finite: point\.x = nan'):
        read(tmp_path / 'b', changed('goal', lambda stamp: point(stamp, np.nan, 0)))
    with pytest.raises(DataError, match=r'E204 .*bag at 0\.40 s: goal: clock is header, but the message carries no such stamp'):
        read(tmp_path / 'c', changed('goal', lambda stamp: point(0, 0, 0)))
    strings = [(topic, stamp, text('x') if topic == 'goal' else message) for topic, stamp, message in recording(0.5)]
    with pytest.raises(DataError, match=r'E201 .*bag: /goal is std_msgs/msg/String, must be geometry_msgs/msg/PointStamped'):
        read(tmp_path / 'd', strings)


@pytest.mark.parametrize('marks, spans', [
    ('start pick it up|success', [(1, 2, 'pick it up', True)]),
    ('start|failure|start b|success', [(1, 2, 'task', False), (3, 4, 'b', True)]),
    ('start|stop|start|stop', [(1, 2, 'task', None), (3, 4, 'task', None)]),
    ('start|discard|start|success', [(3, 4, 'task', True)]),
    ('start|stop|failure|start|success|discard', [(1, 2, 'task', False)]),
    ('start|success|stop', [(1, 2, 'task', True)]),
    ('start|discard|success|start|success', [(4, 5, 'task', True)]),
    ('success|start|failure', [(None, 1, 'task', True), (2, 3, 'task', False)]),
    ('start a|start b|success', [(1, 2, 'a', None), (2, 3, 'b', True)]),
    ('start a|success|start b', [(1, 2, 'a', True), (3, None, 'b', None)]),
    (' start  two words |success ', [(1, 2, 'two words', True)]),
])
def test_marks(marks, spans):
    got = spans_of(list(enumerate(marks.split('|'), 1)), Span(task='task', success=True), 0)
    assert [(span.begin, span.end, span.task, span.success) for span in got] == spans
    for span in got:
        cut = marks.startswith('start a|start') and span.task == 'a' or span.end is None
        assert bool(span.warnings) == cut, 'an end that nobody marked is told'


@pytest.mark.parametrize('marks, words', [
    ('start|sucess', r"E210 unknown mark 'sucess' at 0\.20 s; valid: start \[task\], success, failure, discard, stop"),
    ('', r"E210 unknown mark ''"),
    ('start|discard|start|discard', 'E210 no episode: all 2 were discarded'),
])
def test_marks_that_make_no_episode(marks, words):
    with pytest.raises(DataError, match=words):
        spans_of([(i * 100 * MS, mark) for i, mark in enumerate(marks.split('|'), 1)], Span(), 0)
    with pytest.raises(DataError, match='E210 no episode: no marks'):
        spans_of([], Span(), 0)


def test_marks_of_a_bag(tmp_path):
    marks = [(0.1, 'start pick'), (0.25, 'success'), (0.3, 'start place'), (0.45, 'failure')]
    messages = recording(0.5) + [('episode', START + round(t * 1000) * MS, text(mark)) for t, mark in marks]
    messages.sort(key=lambda entry: entry[1])
    got = read(tmp_path / 'a', messages, markers='episode')
    assert got.spans == (Span(START + 102 * MS, START + 252 * MS, 'pick', True),
                         Span(START + 302 * MS, START + 452 * MS, 'place', False))
    with pytest.raises(DataError, match=r'E210 .*bag: /episode: unknown mark'):
        read(tmp_path / 'b', [*messages, ('episode', START + 600 * MS, text('done'))], markers='episode')
    with pytest.raises(DataError, match=r'E201 .*bag: no topics for marks \(marks\)'):
        read(tmp_path / 'c', messages, markers='marks')
    with pytest.raises(DataError, match=r'E201 .*bag: /goal is .*, must be std_msgs/msg/String \(marks\)'):
        read(tmp_path / 'd', messages, markers='goal')
    both = [*messages, ('left/marks', START, text('start')), ('right/marks', START, text('start'))]
    with pytest.raises(DataError, match=r'E201 .*: 2 topics for marks \(marks\): /left/marks, /right/marks; name one in full'):
        read(tmp_path / 'e', sorted(both, key=lambda entry: entry[1]), markers='marks')
