"""Synthetic recordings for the tests: a two-joint robot whose every signal is a known function of time."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import yaml
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin
from rosbags.rosbag2 import Writer as RosbagsWriter

from il_policies.bags.writer import BagWriter, standard_types
from il_policies.contract import Contract, from_dict

TYPES = standard_types()
START = 1_700_000_000_000_000_000
MS = 1_000_000


def contract(label: str = 'command', camera_rate: float | None = 10.0, fps: float = 10.0, size=(8, 12), clock='header',
             latency: float = 0.0) -> Contract:
    """Joints a and b, a goal, and, unless its rate is None, a camera."""
    observations = {
        'joints': {'topic': 'joint_states', 'type': 'sensor_msgs/msg/JointState', 'field': 'position', 'names': ('a', 'b'),
                   'rate': 100.0, 'max_age': 0.05},
        'goal': {'topic': 'goal', 'type': 'geometry_msgs/msg/PointStamped', 'fields': ('point.x', 'point.y'), 'rate': 10.0,
                 'max_age': 0.25}}
    if camera_rate:
        observations['front'] = {'topic': 'camera/compressed', 'type': 'sensor_msgs/msg/CompressedImage', 'image_size': size,
                                 'rate': camera_rate, 'max_age': 0.15, 'clock': clock, 'latency': latency}
    joint = {'position': (-3.0, 3.0), 'velocity': 1.0, 'acceleration': 1.0, 'first_command_tolerance': 0.1,
             'tracking_tolerance': 0.1}
    return from_dict(Contract, {
        'robot': 'two', 'tried_on': 'checked', 'description': '', 'control_rate': 50.0, 'policy_rate': fps,
        'joints': ({'name': 'a', **joint}, {'name': 'b', **joint}), 'observations': observations, 'joint_state': 'joints',
        'action': {'joints': ('b', 'a'), 'topic': 'command', 'label': label, 'max_age': 0.1,
                   'outputs': [{'topic': 'out', 'type': 'std_msgs/msg/Float64MultiArray'}]}}, 'test')


def header(stamp: int):
    """A header of a stamp [ns]."""
    time = TYPES.types['builtin_interfaces/msg/Time'](stamp // 10**9, stamp % 10**9)
    return TYPES.types['std_msgs/msg/Header'](time, '')


def joint_state(stamp: int, names: list[str], positions) -> object:
    """A JointState with positions only."""
    return TYPES.types['sensor_msgs/msg/JointState'](header(stamp), names, np.asarray(positions, np.float64), np.zeros(0),
                                                     np.zeros(0))


def point(stamp: int, x: float, y: float) -> object:
    """A PointStamped."""
    return TYPES.types['geometry_msgs/msg/PointStamped'](header(stamp), TYPES.types['geometry_msgs/msg/Point'](x, y, 0.0))


def text(content: str) -> object:
    """A String."""
    return TYPES.types['std_msgs/msg/String'](content)


def picture(value: int, size=(8, 12)) -> np.ndarray:
    """A flat grey image; a JPEG keeps its value."""
    return np.full((*size, 3), value, np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    """JPEG file of an RGB image."""
    return cv2.imencode('.jpg', image[:, :, ::-1])[1].tobytes()


def compressed(stamp: int, image: np.ndarray | bytes) -> object:
    """A CompressedImage of an image, or of a file."""
    data = image if isinstance(image, bytes) else jpeg(image)
    return TYPES.types['sensor_msgs/msg/CompressedImage'](header(stamp), 'jpeg', np.frombuffer(data, np.uint8))


def positions(t) -> np.ndarray:
    """Joints a, b at time t [s] since START."""
    return np.stack([np.sin(np.asarray(t)), np.cos(np.asarray(t))], axis=-1)


def recording(seconds: float = 3.0, camera: list[int] | None = None, rate: float = 10.0) -> list[tuple[str, int, object]]:
    """(topic, stamp [ns], message) of every message.

    Joints at 100 Hz, commands at 50 Hz (10 ms later), goal at 10 Hz and a camera of this rate, or with frames at the stamps
    `camera`. Frame i is flat grey of value 5·i; commands carry
    their time.
    """
    messages = []
    for i in range(round(seconds * 100)):
        stamp = START + i * 10 * MS
        a, b = positions(i * 0.01)
        messages.append(('joint_states', stamp, joint_state(stamp, ['b', 'x', 'a'], [b, 9.0, a])))
    for i in range(round(seconds * 50)):
        stamp = START + i * 20 * MS + 10 * MS
        messages.append(('command', stamp, joint_state(stamp, ['a', 'b'], [(stamp - START) / 1e9, -(stamp - START) / 1e9])))
    for i in range(round(seconds * 10)):
        messages.append(('goal', START + i * 100 * MS, point(START + i * 100 * MS, 0.25, i / 10)))
    frames = [START + round(i * 1000 * MS / rate) for i in range(round(seconds * rate))] if camera is None else camera
    messages += [('camera/compressed', stamp, compressed(stamp, picture(5 * i % 256))) for i, stamp in enumerate(frames)]
    return sorted(messages, key=lambda entry: entry[1])


def write_bag(path: Path, messages: list[tuple[str, int, object]], prefix: str = '/', custom: dict | None = None,
              keep: Callable[[str, int], bool] = lambda topic, stamp: True, delay: int = 2 * MS,
              about: dict | None = None) -> Path:
    """A bag of the messages for which keep(topic, time since START [ns]) holds, published 1 ms after it."""
    writer = BagWriter(path, TYPES, about)
    declared = set()
    for topic, stamp, message in messages:
        name, kind = prefix + topic, message.__msgtype__
        if name not in declared:
            writer.add_topic(name, kind)
            declared.add(name)
        if keep(topic, stamp - START):
            writer.write(name, TYPES.serialize_cdr(message, kind), stamp + delay, stamp + MS)
    return writer.close(custom)


CONTAINERS = ('mcap', 'mcap lz4', 'mcap zstd', 'splits', 'mcap file-zstd', 'mcap message-zstd', 'db3', 'db3 file-zstd',
              'db3 message-zstd')
"""What `write_as` writes."""


def write_as(container: str, path: Path, messages: list[tuple[str, int, object]], delay: int = 2 * MS) -> Path:
    """The messages as a bag in one of CONTAINERS, written by other libraries. SQLite keeps times of receipt only."""
    storage, _, how = container.partition(' ')
    if storage == 'splits':
        return _write_splits(path, messages, delay)
    if how in ('', 'lz4', 'zstd') and storage == 'mcap':
        path.mkdir(parents=True)
        _write_mcap(path / f'{path.name}_0.mcap', messages, CompressionType[how.upper() or 'NONE'], delay)
        return path
    writer = RosbagsWriter(path, version=9, storage_plugin=StoragePlugin.MCAP if storage == 'mcap' else StoragePlugin.SQLITE3)
    if how:
        writer.set_compression(CompressionMode.FILE if how == 'file-zstd' else CompressionMode.MESSAGE, CompressionFormat.ZSTD)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writer:
        connections = {}
        for topic, stamp, message in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection('/' + topic, message.__msgtype__, typestore=TYPES)
            writer.write(connections[topic], stamp + delay, TYPES.serialize_cdr(message, message.__msgtype__))
    return path


def _write_mcap(file: Path, messages: list[tuple[str, int, object]], compression: CompressionType, delay: int) -> None:
    with open(file, 'wb') as stream:
        writer = McapWriter(stream, chunk_size=4096, compression=compression)
        writer.start(profile='ros2', library='test')
        channels = {}
        for topic, stamp, message in messages:
            kind = message.__msgtype__
            if topic not in channels:
                definition = TYPES.generate_msgdef(kind, ros_version=2)[0].encode()
                channels[topic] = writer.register_channel('/' + topic, 'cdr', writer.register_schema(kind, 'ros2msg', definition))
            writer.add_message(channels[topic], stamp + delay, TYPES.serialize_cdr(message, kind), stamp + MS)
        writer.finish()


def _write_splits(path: Path, messages: list[tuple[str, int, object]], delay: int) -> Path:
    """Three files, each with messages of the whole time, listed in another order than they were written."""
    path.mkdir(parents=True)
    part = np.random.default_rng(0).integers(0, 3, len(messages))
    names = [f'{path.name}_{i}.mcap' for i in range(3)]
    for i, name in enumerate(names):
        _write_mcap(path / name, [m for m, p in zip(messages, part) if p == i], CompressionType.NONE, delay)
    topics = [{'topic_metadata': {'name': f'/{topic}', 'type': kind, 'serialization_format': 'cdr', 'offered_qos_profiles': ''},
               'message_count': sum(m[0] == topic for m in messages)}
              for topic, kind in sorted({(topic, message.__msgtype__) for topic, _, message in messages})]
    (path / 'metadata.yaml').write_text(yaml.safe_dump({'rosbag2_bagfile_information': {
        'version': 5, 'storage_identifier': 'mcap', 'relative_file_paths': [names[i] for i in (2, 0, 1)],
        'duration': {'nanoseconds': messages[-1][1] - messages[0][1]},
        'starting_time': {'nanoseconds_since_epoch': messages[0][1] + delay}, 'message_count': len(messages),
        'topics_with_message_count': topics, 'compression_format': '', 'compression_mode': ''}}))
    return path
