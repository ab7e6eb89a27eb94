"""Definitions from where they may stand, held against the types that rosbags ships."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from bags import definition
from il_policies.bags.types import type_store
from il_policies.data.errors import BagError
from recordings import START, TYPES, joint_state

JOINT_STATE = 'sensor_msgs/msg/JointState'
CDR = TYPES.serialize_cdr(joint_state(START, ['a'], [0.5]), JOINT_STATE)


def idl(*names: str) -> str:
    """IDL definitions, joined as rosbag2 joins them; the files are those of the ROS 2 in the environment."""
    folders = [Path(prefix) / 'share' for prefix in os.environ['AMENT_PREFIX_PATH'].split(':')]
    texts = []
    for name in names:
        (file,) = [file for folder in folders if (file := folder / f'{name}.idl').exists()][:1]
        texts.append(f'{80 * "="}\nIDL: {name}\n{file.read_text()}')
    return '\n'.join(texts)


def test_definitions_in_the_bag():
    chain = ('sensor_msgs/msg/JointState', 'std_msgs/msg/Header', 'builtin_interfaces/msg/Time')
    for language, text in (('ros2msg', definition(JOINT_STATE)), ('ros2idl', idl(*chain))):
        types = type_store(JOINT_STATE, {(language, text), ('unknown', ''), ('', ''), ('ros2msg', ' ')}, (), 'humble')
        message = types.deserialize_cdr(CDR, JOINT_STATE)
        assert message.name == ['a'] and message.position.tolist() == [0.5] and message.header.stamp.sec == START // 10**9
    both = {('ros2msg', definition(JOINT_STATE)), ('ros2idl', idl(*chain))}
    assert type_store(JOINT_STATE, both, (), 'humble').deserialize_cdr(CDR, JOINT_STATE).name == ['a']


def test_definitions_that_are_none():
    other = definition(JOINT_STATE).replace('float64[] effort', 'float64[] torque')
    with pytest.raises(BagError, match='E104 the bag defines sensor_msgs/msg/JointState in two ways'):
        type_store(JOINT_STATE, {('ros2msg', definition(JOINT_STATE)), ('ros2msg', other)}, (), '')
    for text in ('float64[ x', 'a/B c', 'Nowhere c'):
        with pytest.raises(BagError, match='E104 the bag defines a/msg/T unreadably'):
            type_store('a/msg/T', {('ros2msg', text)}, (), '')
    with pytest.raises(BagError, match="E104 'T' is no message type of ROS 2"):
        type_store('T', set(), (), '')


def test_standard_types_are_those_of_the_distribution():
    fields = {distro: [name for name, _ in type_store('sensor_msgs/msg/Range', set(), (), distro).fielddefs[
        'sensor_msgs/msg/Range'][1]] for distro in ('humble', 'jazzy', 'distant_future')}
    assert 'variance' not in fields['humble'] and 'variance' in fields['jazzy'] == fields['distant_future']


def test_types_from_files(tmp_path):
    """A package with package.xml in a folder of another name, a bare one, a single file."""
    (tmp_path / 'checkout/msg').mkdir(parents=True)
    (tmp_path / 'checkout/package.xml').write_text('<package><name> robot_msgs </name></package>')
    (tmp_path / 'checkout/msg/State.msg').write_text('std_msgs/Header header\nWheel[2] wheels\nparts/Box box\n')
    (tmp_path / 'checkout/msg/Wheel.msg').write_text('float32 speed\n')
    (tmp_path / 'parts/msg').mkdir(parents=True)
    (tmp_path / 'parts/msg/Box.msg').write_text('uint8 lid\n')
    with pytest.raises(BagError, match='does not define robot_msgs/msg/State, robot_msgs is not a standard package; pass --msg'):
        type_store('robot_msgs/msg/State', set(), (), 'humble')
    with pytest.raises(BagError, match='parts is not a standard package and not below .*checkout'):
        type_store('robot_msgs/msg/State', set(), (tmp_path / 'checkout',), 'humble')
    for paths in ((tmp_path,), (tmp_path / 'checkout', tmp_path / 'parts/msg/Box.msg')):
        fields = type_store('robot_msgs/msg/State', set(), paths, 'humble').fielddefs['robot_msgs/msg/State'][1]
        assert [name for name, _ in fields] == ['header', 'wheels', 'box']
    with pytest.raises(BagError, match='E104 the bag does not define robot_msgs/msg/Nope'):
        type_store('robot_msgs/msg/Nope', set(), (tmp_path,), 'humble')
    for path in (tmp_path / 'empty', tmp_path / 'absent.msg'):
        with pytest.raises(BagError, match='no .msg files here'):
            type_store('robot_msgs/msg/State', set(), (path,), 'humble')
