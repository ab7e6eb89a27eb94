"""Synthetic recordings for the tests: a two-joint robot whose every signal is a known function of time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from il_policies.contract import Contract, from_dict
from il_policies.data.bag_writer import BagWriter, standard_types

TYPES = standard_types()
START = 1_700_000_000_000_000_000
MS = 1_000_000


def contract(
    label: str = 'command',
    camera_rate: float | None = 10.0,
    fps: float = 10.0,
    size=(8, 12),
    clock='header',
    latency: float = 0.0,
) -> Contract:
    """Joints a and b, a goal, and, unless its rate is None, a camera."""
    observations = {
        'joints': {
            'topic': 'joint_states',
            'type': 'sensor_msgs/msg/JointState',
            'field': 'position',
            'names': ('a', 'b'),
            'rate': 100.0,
            'max_age': 0.05,
        },
        'goal': {
            'topic': 'goal',
            'type': 'geometry_msgs/msg/PointStamped',
            'fields': ('point.x', 'point.y'),
            'rate': 10.0,
            'max_age': 0.25,
        },
    }
    if camera_rate:
        observations['front'] = {
            'topic': 'camera/compressed',
            'type': 'sensor_msgs/msg/CompressedImage',
            'image_size': size,
            'rate': camera_rate,
            'max_age': 0.15,
            'clock': clock,
            'latency': latency,
        }
    joint = {
        'position': (-3.0, 3.0),
        'velocity': 1.0,
        'acceleration': 1.0,
        'first_command_tolerance': 0.1,
        'tracking_tolerance': 0.1,
    }
    return from_dict(
        Contract,
        {
            'robot': 'two',
            'tried_on': 'checked',
            'description': '',
            'control_rate': 50.0,
            'policy_rate': fps,
            'joints': ({'name': 'a', **joint}, {'name': 'b', **joint}),
            'observations': observations,
            'joint_state': 'joints',
            'action': {
                'joints': ('b', 'a'),
                'topic': 'command',
                'outputs': [{'topic': 'out', 'type': 'std_msgs/msg/Float64MultiArray'}],
                'label': label,
                'max_age': 0.1,
            },
        },
        'test',
    )


def header(stamp: int):
    """A header of a stamp [ns]."""
    time = TYPES.types['builtin_interfaces/msg/Time'](stamp // 10**9, stamp % 10**9)
    return TYPES.types['std_msgs/msg/Header'](time, '')


def joint_state(stamp: int, names: list[str], positions) -> object:
    """A JointState with positions only."""
    return TYPES.types['sensor_msgs/msg/JointState'](
        header(stamp), names, np.asarray(positions, np.float64), np.zeros(0), np.zeros(0)
    )


def point(stamp: int, x: float, y: float) -> object:
    """A PointStamped."""
    return TYPES.types['geometry_msgs/msg/PointStamped'](
        header(stamp), TYPES.types['geometry_msgs/msg/Point'](x, y, 0.0)
    )


def picture(value: int, size=(8, 12)) -> np.ndarray:
    """A flat grey image; a JPEG keeps its value."""
    return np.full((*size, 3), value, np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    """JPEG file of an RGB image."""
    return cv2.imencode('.jpg', image[:, :, ::-1])[1].tobytes()


def compressed(stamp: int, image: np.ndarray) -> object:
    """A CompressedImage."""
    return TYPES.types['sensor_msgs/msg/CompressedImage'](header(stamp), 'jpeg', np.frombuffer(jpeg(image), np.uint8))


def positions(t) -> np.ndarray:
    """Joints a, b at time t [s] since START."""
    return np.stack([np.sin(np.asarray(t)), np.cos(np.asarray(t))], axis=-1)


def recording(
    seconds: float = 3.0, camera: list[int] | None = None, rate: float = 10.0
) -> list[tuple[str, int, object]]:
    """(topic, stamp [ns], message) of every message: joints at 100 Hz, commands at 50 Hz (10 ms later), goal at 10 Hz
    and a camera of this rate, or with frames at the stamps `camera`. Frame i is flat grey of value 5·i; commands carry
    their time.
    """
    messages = []
    for i in range(round(seconds * 100)):
        stamp = START + i * 10 * MS
        messages.append(
            (
                'joint_states',
                stamp,
                joint_state(stamp, ['b', 'x', 'a'], [positions(i * 0.01)[1], 9.0, positions(i * 0.01)[0]]),
            )
        )
    for i in range(round(seconds * 50)):
        stamp = START + i * 20 * MS + 10 * MS
        messages.append(
            ('command', stamp, joint_state(stamp, ['a', 'b'], [(stamp - START) / 1e9, -(stamp - START) / 1e9]))
        )
    for i in range(round(seconds * 10)):
        messages.append(('goal', START + i * 100 * MS, point(START + i * 100 * MS, 0.25, i / 10)))
    frames = [START + round(i * 1000 * MS / rate) for i in range(round(seconds * rate))] if camera is None else camera
    messages += [
        ('camera/compressed', stamp, compressed(stamp, picture(5 * i % 256))) for i, stamp in enumerate(frames)
    ]
    return sorted(messages, key=lambda entry: entry[1])


def write_bag(
    path: Path,
    messages: list[tuple[str, int, object]],
    prefix: str = '/',
    custom: dict | None = None,
    keep: Callable[[str, int], bool] = lambda topic, stamp: True,
    delay: int = 2 * MS,
) -> Path:
    """A bag of the messages for which keep(topic, time since START [ns]) holds, published 1 ms after it."""
    writer = BagWriter(path, TYPES)
    declared = set()
    for topic, stamp, message in messages:
        name, kind = prefix + topic, message.__msgtype__
        if name not in declared:
            writer.add_topic(name, kind)
            declared.add(name)
        if keep(topic, stamp - START):
            writer.write(name, TYPES.serialize_cdr(message, kind), stamp + delay, stamp + MS)
    return writer.close(custom)
