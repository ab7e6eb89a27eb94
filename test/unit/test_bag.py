from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from mcap.exceptions import EndOfFile
from mcap.reader import make_reader
from mcap.stream_reader import StreamReader
from rosbags.highlevel import AnyReader

from il_policies.data.bag import bag_info, find_bags, read_bag, topic_types
from il_policies.data.bag_writer import BagWriter, add_definitions, qos, standard_types
from il_policies.data.errors import BagError
from recordings import MS, START, TYPES, joint_state, recording, write_bag


def test_round_trip_with_both_stamps(tmp_path):
    messages = recording(1.0)
    path = write_bag(tmp_path / 'bag', messages, custom={'task': 'reach'})
    read = list(read_bag(path))
    assert [(topic, kind, received, published) for topic, kind, received, published, _ in read] == [
        ('/' + topic, message.__msgtype__, stamp + 2 * MS, stamp + MS) for topic, stamp, message in messages
    ]
    for (_, _, written), (*_, message) in zip(messages, read, strict=True):
        assert (
            message.header.stamp.sec == written.header.stamp.sec
            and message.header.stamp.nanosec == written.header.stamp.nanosec
        )
        if hasattr(written, 'position'):
            np.testing.assert_array_equal(message.position, written.position)
            assert message.name == written.name
        if hasattr(written, 'data'):
            np.testing.assert_array_equal(message.data, written.data)
    assert {topic for topic, *_ in read_bag(path, ['/goal'])} == {'/goal'}
    assert not path.with_name('bag.part').exists()


def test_rosbags_reads_it(tmp_path):
    """Another library, which checks metadata, QoS, type hashes and definitions against each other."""
    messages = recording(1.0)
    path = write_bag(tmp_path / 'bag', messages, custom={'task': 'reach'})
    with AnyReader([path]) as reader:
        assert reader.message_count == len(messages)
        assert {c.topic: c.msgtype for c in reader.connections} == topic_types(path)
        read = [(c.topic, t, reader.deserialize(data, c.msgtype)) for c, t, data in reader.messages()]
    assert [(topic, t) for topic, t, _ in read] == [('/' + topic, stamp + 2 * MS) for topic, stamp, _ in messages]
    assert [m.position.tolist() for topic, _, m in read if topic == '/command'] == [
        m.position.tolist() for topic, _, m in messages if topic == 'command'
    ]


def test_own_message_types(tmp_path, root):
    types = standard_types()
    for name in ('ActionChunk', 'ControllerStatus', 'TaskStatus'):
        add_definitions(types, f'il_msgs/msg/{name}', lambda package: root / 'src' / package / 'msg')
    kind = types.types['il_msgs/msg/TaskStatus']
    header, point = joint_state(START, [], []).header, TYPES.types['geometry_msgs/msg/Point'](1.0, 2.0, 3.0)
    writer = BagWriter(tmp_path / 'bag', types)
    writer.add_topic('/task_status', 'il_msgs/msg/TaskStatus')
    writer.write(
        '/task_status',
        types.serialize_cdr(kind(header, 3, 1.5, True, False, point, point), 'il_msgs/msg/TaskStatus'),
        START,
        START,
    )
    ((_, _, _, _, message),) = read_bag(writer.close())
    assert (message.episode, message.elapsed, message.reached, message.tip.z) == (3, 1.5, True, 3.0)
    with pytest.raises(BagError, match='il_msgs/msg/Nope: no definition'):
        add_definitions(types, 'il_msgs/msg/Nope', lambda package: root / 'src' / package / 'msg')


def test_metadata_as_rosbag2_writes_it(tmp_path):
    path = write_bag(tmp_path / 'bag', recording(1.0), custom={'success': 'true', 'contract_hash': '0123'})
    text = (path / 'metadata.yaml').read_text()
    information = yaml.safe_load(text)['rosbag2_bagfile_information']
    assert list(information) == [
        'version',
        'storage_identifier',
        'duration',
        'starting_time',
        'message_count',
        'topics_with_message_count',
        'compression_format',
        'compression_mode',
        'relative_file_paths',
        'files',
        'custom_data',
        'ros_distro',
    ]
    assert '&' not in text and '*' not in text  # YAML aliases
    assert information['version'] == 9 and information['relative_file_paths'] == ['bag_0.mcap']
    assert information['custom_data'] == {'success': 'true', 'contract_hash': '0123'}
    assert information['starting_time']['nanoseconds_since_epoch'] == START + 2 * MS
    assert information['duration']['nanoseconds'] == 990 * MS
    topics = {entry['topic_metadata']['name']: entry for entry in information['topics_with_message_count']}
    assert topics['/joint_states']['message_count'] == 100
    about = topics['/joint_states']['topic_metadata']
    # as published by ROS 2 for sensor_msgs/msg/JointState
    assert about['type_description_hash'] == 'RIHS01_a13ee3a330e346c9d87b5aa18d24e11690752bd33a0350f11c5882bc9179260e'
    assert about['offered_qos_profiles'] == [qos()]
    with open(path / 'bag_0.mcap', 'rb') as file:
        reader = make_reader(file, validate_crcs=True)
        assert reader.get_header().profile == 'ros2'
        for channel in reader.get_summary().channels.values():
            assert yaml.safe_load(channel.metadata['offered_qos_profiles']) == [qos()]
            assert (
                channel.metadata['topic_type_hash'] == topics[channel.topic]['topic_metadata']['type_description_hash']
            )
        (record,) = reader.iter_metadata()
        assert yaml.safe_load(record.metadata['serialized_metadata']) == information


def unfinished(path: Path, count: int) -> BagWriter:
    """A bag that is being written."""
    writer = BagWriter(path, TYPES)
    writer.add_topic('/j', 'sensor_msgs/msg/JointState')
    data = TYPES.serialize_cdr(joint_state(START, ['a'] * 50, np.zeros(50)), 'sensor_msgs/msg/JointState')
    for i in range(count):
        writer.write('/j', data, START + i, START + i)
    return writer


def test_a_killed_recording_is_readable_up_to_the_last_chunk(tmp_path):
    writer = unfinished(tmp_path / 'bag', 2000)
    assert not (tmp_path / 'bag').exists()
    read = 0
    with open(writer.part / 'bag_0.mcap', 'rb') as file:
        with pytest.raises((EndOfFile, struct.error)):
            for record in StreamReader(file, validate_crcs=True).records:
                read += type(record).__name__ == 'Message'
    assert read > 1600
    with pytest.raises(BagError, match='no bag here'):
        find_bags(tmp_path)


def test_discard_and_names(tmp_path):
    unfinished(tmp_path / 'bag', 3).discard()
    assert list(tmp_path.iterdir()) == []
    unfinished(tmp_path / 'bag', 3).close()
    with pytest.raises(BagError, match='exists already'):
        BagWriter(tmp_path / 'bag', TYPES)
    writer = BagWriter(tmp_path / 'empty', TYPES)
    with pytest.raises(BagError, match='/x was not declared'):
        writer.write('/x', b'', 0, 0)
    with pytest.raises(BagError, match='no definition of a/msg/B'):
        writer.add_topic('/x', 'a/msg/B')
    writer.close()
    assert list(read_bag(tmp_path / 'empty')) == []
    assert [path.name for path in find_bags(tmp_path)] == ['bag', 'empty']
    (tmp_path / 'file').touch()
    with pytest.raises(BagError, match='cannot be written'):
        BagWriter(tmp_path / 'file' / 'bag', TYPES)


def test_damage_is_named(tmp_path):
    path = write_bag(tmp_path / 'bag', recording(1.0))
    file = path / 'bag_0.mcap'
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for content in (bytes(flipped), whole[: len(whole) * 7 // 10], whole[:10], b''):
        file.write_bytes(content)
        with pytest.raises(BagError, match='bag_0.mcap: damaged'):
            list(read_bag(path))
    file.unlink()
    with pytest.raises(BagError, match='bag_0.mcap: cannot be read: No such file'):
        list(read_bag(path))
    (path / 'metadata.yaml').write_text('rosbag2_bagfile_information: {storage_identifier: sqlite3}')
    with pytest.raises(BagError, match="storage is 'sqlite3'; valid: mcap"):
        bag_info(path)
    (path / 'metadata.yaml').write_text('a: 1')
    with pytest.raises(BagError, match='no rosbag2 metadata'):
        bag_info(path)
