"""The contract of one robot: joints, observation streams, action, rates.

One YAML file (``config/robots/<robot>.yaml``) is read by the recorder, the converter, the policy node, the controller and
the simulator; datasets and checkpoints carry it and its hash. Pure data: no ROS, no torch.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from il_policies.yaml_file import parse

STRICT = {'extra': 'forbid'}


class ContractError(ValueError):
    """A contract that cannot be used; the message says where, what was found and what is valid."""


@dataclass(frozen=True)
class Joint:
    """One commanded joint and the limits the controller guarantees for it."""

    __pydantic_config__ = STRICT

    name: str
    """Name as in the URDF and in JointState messages."""
    position: tuple[float, float]
    """Lowest and highest commanded position [rad or m]."""
    velocity: float
    """Largest commanded speed [rad/s or m/s]."""
    acceleration: float
    """Largest commanded acceleration [rad/s² or m/s²]."""
    first_command_tolerance: float
    """A policy's first command may be at most this far from the measured pose [rad or m]."""
    tracking_tolerance: float
    """Largest distance between command and measurement before the controller faults [rad or m]."""
    unit: Literal['rad', 'm'] = 'rad'
    """Unit of the position."""

    def __post_init__(self):
        low, high = self.position
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f'joint {self.name}: position limits {self.position} must be finite with low < high')
        for key in ('velocity', 'acceleration', 'first_command_tolerance', 'tracking_tolerance'):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f'joint {self.name}: {key} is {value}, must be finite and > 0')


@dataclass(frozen=True)
class Stream:
    """One observation stream: where it comes from and how old it may get."""

    __pydantic_config__ = STRICT

    topic: str
    """Topic, relative to the node's namespace."""
    type: str
    """ROS type, such as sensor_msgs/msg/JointState."""
    rate: float
    """Declared rate [Hz]."""
    max_age: float
    """A sample older than this is not used [s]."""
    field: str = ''
    """JointState: position, velocity or effort, read by joint name for every name in `names`."""
    names: tuple[str, ...] = ()
    """JointState: the joints, in the order of the feature. Other types: names of the feature's entries."""
    fields: tuple[str, ...] = ()
    """Other low-dimensional types: attribute paths, such as point.x, in the order of the feature."""
    image_size: tuple[int, int] | None = None
    """Images: height and width stored and shown to the policy [px]."""
    depth: bool = False
    """Images: distances, stored and shown to the policy as uint16 [mm], 0 where unknown; false: colour."""
    clock: Literal['header', 'publish', 'receive'] = 'header'
    """Which stamp tells when a sample was taken."""
    latency: float = 0.0
    """Subtracted from the stamp: sensor delay not in the stamp [s]."""

    def __post_init__(self):
        for key in ('rate', 'max_age'):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise ValueError(f'stream on {self.topic}: {key} is {getattr(self, key)}, must be finite and > 0')
        kinds = [self.image_size is not None, bool(self.field), bool(self.fields)]
        if sum(kinds) != 1:
            raise ValueError(f'stream on {self.topic}: give exactly one of image_size (an image), field (a JointState array) '
                             'or fields (attribute paths of another message)')
        if self.field and self.field not in ('position', 'velocity', 'effort'):
            raise ValueError(f'stream on {self.topic}: field is {self.field!r}, valid: position, velocity, effort')
        if self.field and not self.names:
            raise ValueError(f'stream on {self.topic}: names must list the joints of {self.field}')
        if self.fields and self.names and len(self.fields) != len(self.names):
            raise ValueError(f'stream on {self.topic}: {len(self.fields)} fields but {len(self.names)} names')
        if self.depth and not self.is_image:
            raise ValueError(f'stream on {self.topic}: depth needs image_size')
        if len(set(self.names)) != len(self.names):
            raise ValueError(f'stream on {self.topic}: doubled names in {list(self.names)}')

    @property
    def is_image(self) -> bool:
        """True for images."""
        return self.image_size is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (D,) if low-dimensional, (height, width, 3) for images, (height, width, 1) for depth."""
        return (*self.image_size, 1 if self.depth else 3) if self.is_image else (len(self.names or self.fields),)

    @property
    def kind(self) -> Literal['lowdim', 'image', 'depth']:
        """How a dataset keeps it."""
        return ('depth' if self.depth else 'image') if self.is_image else 'lowdim'


@dataclass(frozen=True)
class Output:
    """A topic on which a part of the robot listens: the whole arm, one arm of two, or a gripper."""

    __pydantic_config__ = STRICT

    topic: str
    """Topic, relative to the node's namespace."""
    type: Literal['std_msgs/msg/Float64MultiArray', 'trajectory_msgs/msg/JointTrajectory', 'sensor_msgs/msg/JointState']
    """Float64MultiArray for a forward_command_controller, JointTrajectory (next set-points and a ramp to rest) for a
    joint_trajectory_controller, JointState for drivers that take one."""
    joints: tuple[str, ...] = ()
    """Joints it commands, in its order; empty: all joints of the action."""


@dataclass(frozen=True)
class Action:
    """What the policy commands, and how the command reaches the robot."""

    __pydantic_config__ = STRICT

    joints: tuple[str, ...]
    """Commanded joints, the order of action columns."""
    topic: str
    """Topic of the stamped, named command (sensor_msgs/JointState), which is recorded and learnt from."""
    outputs: tuple[Output, ...]
    """Where the robot listens: every joint of the action in exactly one output."""
    label: Literal['command', 'command_hold', 'next_state'] = 'command'
    """How the action of a tick t_k is read from a recording: the first command in [t_k, t_k+1), the last at or before t_k,
    or the measured joint positions of the next tick."""
    max_age: float = 0.2
    """A command older than this is no label [s]."""

    def __post_init__(self):
        commanded = [name for output in self.outputs for name in output.joints or self.joints]
        if sorted(commanded) != sorted(self.joints):
            raise ValueError(f'outputs must command every joint of {list(self.joints)} exactly once, they command {commanded}')
        topics = [self.topic, *(output.topic for output in self.outputs)]
        if len(set(topics)) != len(topics):
            raise ValueError(f'topic and outputs must differ from each other, they are {topics}')


@dataclass(frozen=True)
class Contract:
    """Everything the parts must agree on about one robot."""

    __pydantic_config__ = STRICT

    robot: str
    """Name of the robot."""
    tried_on: Literal['hardware', 'simulation', 'checked']
    """What this file has been run on."""
    description: str
    """URDF, as package://<package>/<path>."""
    control_rate: float
    """Rate of the controller [Hz]."""
    policy_rate: float
    """Rate of policy steps and dataset ticks [Hz]."""
    joints: tuple[Joint, ...]
    """Every commanded joint with its limits."""
    observations: dict[str, Stream]
    """Feature name → stream."""
    action: Action
    """The action."""
    joint_state: str = 'joint_positions'
    """The feature that holds the measured positions of the action's joints, used by the controller."""
    end_effector: str = ''
    """Link of the description that teleoperation jogs; empty: joints only."""

    def __post_init__(self):
        names = [joint.name for joint in self.joints]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f'joints: doubled names {doubled}')
        unknown = [name for name in self.action.joints if name not in names]
        if unknown or not self.action.joints or len(set(self.action.joints)) != len(self.action.joints):
            raise ValueError(f'action.joints {list(self.action.joints)} must name joints once each; there are: {names}')
        if self.joint_state not in self.observations:
            raise ValueError(f'joint_state is {self.joint_state!r}; there are observations: {list(self.observations)}')
        state = self.observations[self.joint_state]
        missing = [name for name in self.action.joints if name not in state.names]
        if state.field != 'position' or missing:
            raise ValueError(f'observations.{self.joint_state} must be JointState positions of all action joints; '
                             f'field is {state.field!r}, missing joints: {missing}')
        observed = {stream.topic for stream in self.observations.values()}
        for topic in (self.action.topic, *(output.topic for output in self.action.outputs)):
            if topic in observed:
                raise ValueError(f'action: {topic} is also the topic of an observation')
        if self.control_rate < self.policy_rate or self.policy_rate <= 0:
            raise ValueError(f'control_rate {self.control_rate} must be at least policy_rate {self.policy_rate}, both > 0')

    @property
    def step_period(self) -> float:
        """Time between policy steps [s]."""
        return 1.0 / self.policy_rate

    @property
    def action_offset(self) -> float:
        """Time from an observation to the first action predicted from it [s]: 0 for commands, one step for `next_state`."""
        return self.step_period if self.action.label == 'next_state' else 0.0

    @property
    def action_joints(self) -> tuple[Joint, ...]:
        """The joints in action order."""
        by_name = {joint.name: joint for joint in self.joints}
        return tuple(by_name[name] for name in self.action.joints)

    @property
    def cameras(self) -> list[str]:
        """Names of the image features."""
        return [name for name, stream in self.observations.items() if stream.is_image]

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical content; independent of comments and key order in the file."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def differing(self, other: Contract) -> dict[str, tuple]:
        """Every field in which the two differ: dotted path → (mine, theirs).

        Joints go by their names (joints.elbow.velocity); None is a field, or a joint, that one of them does not have.
        """
        found: dict[str, tuple] = {}

        def compare(path: str, mine, theirs):
            if isinstance(mine, dict) and isinstance(theirs, dict):
                for key in sorted({*mine, *theirs}):
                    compare(f'{path}.{key}' if path else key, mine.get(key), theirs.get(key))
            elif mine != theirs:
                found[path] = mine, theirs

        compare('', *({**data, 'joints': {joint['name']: joint for joint in data['joints']}}
                      for data in (self.to_dict(), other.to_dict())))
        if not found and self.hash != other.hash:
            found['joints'] = tuple([joint.name for joint in contract.joints] for contract in (self, other))
        return found

    def differences(self, other: Contract) -> list[str]:
        """Those fields, one line each: ``path: mine ≠ theirs``."""
        return [f'{path}: {mine!r} ≠ {theirs!r}' for path, (mine, theirs) in self.differing(other).items()]


def from_dict(cls, data, where: str):
    """Build a (nested) dataclass from plain data, refusing unknown keys and wrong types.

    Raises ContractError with one line per fault: its place, what was received and what is valid.
    """
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            place = '.'.join(str(part) for part in fault['loc'])
            received = '' if fault['type'] in ('missing', 'value_error') else f', received {fault["input"]!r}'
            reason = {'missing': 'is missing', 'unexpected_keyword_argument': 'is not a known key'}.get(
                fault['type'], fault['msg'].removeprefix('Value error, '))
            valid = ''
            if fault['type'] == 'unexpected_keyword_argument' and len(fault['loc']) == 1 and dataclasses.is_dataclass(cls):
                valid = f'; valid: {", ".join(f.name for f in dataclasses.fields(cls))}'
            lines.append(f'{where}: {place + " " if place else ""}{reason}{received}{valid}')
        raise ContractError('\n'.join(lines)) from None


def load_yaml(path: str | Path) -> dict:
    """A YAML mapping from a file. Raises ContractError if the file is absent, no YAML, or no mapping."""
    path = Path(path)
    try:
        data = parse(path.read_text())
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob('*.yaml')) if path.parent.is_dir() else []
        raise ContractError(f'{path}: no such file' + (f'; beside it: {", ".join(beside)}' if beside else '')) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ContractError(f'{path}: not readable as YAML: {" ".join(str(error).split())}') from None
    if not isinstance(data, dict):
        raise ContractError(f'{path}: must be a mapping, is {type(data).__name__}')
    return data


def load_contract(path: str | Path) -> Contract:
    """Read and validate a contract. Raises ContractError."""
    return from_dict(Contract, load_yaml(path), str(path))
