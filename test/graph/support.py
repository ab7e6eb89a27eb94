"""Waiting for what other processes do."""
from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from il_policies.contract import load_contract

ROOT = Path(__file__).parents[2]


CONTRACT = ROOT / 'config/robots/so101.yaml'


def patient_contract(folder: Path, max_age: float = 0.5, outputs: list[dict] | None = None, arms: int = 1) -> Path:
    """The SO-101's contract, but joint states may be half a second old.

    A shared machine pauses processes for longer than an arm may be moved blindly.

    max_age of joint states [s]; outputs instead of the contract's own; arms > 1: as many sets of joints, named left_… and right_…
    """
    contract = yaml.safe_load(CONTRACT.read_text())
    if arms == 2:
        # 14 joints as of a bimanual robot with six joints and a gripper each.
        arm = [*contract['joints'], {**contract['joints'][4], 'name': 'wrist_yaw'}]
        contract['joints'] = [{**joint, 'name': f'{side}_{joint["name"]}'} for side in ('left', 'right') for joint in arm]
        contract['action']['joints'] = [joint['name'] for joint in contract['joints']]
        contract['observations'] = {'joint_positions': {**contract['observations']['joint_positions'],
                                                        'names': contract['action']['joints']}}
    contract['observations']['joint_positions']['max_age'] = max_age
    if outputs is not None:
        contract['action']['outputs'] = outputs
    path = folder / 'patient.yaml'
    path.write_text(yaml.safe_dump(contract))
    return path


def wait_for(condition, timeout: float = 20.0, what: str = 'condition'):
    """The first true value of condition(); fails the test after `timeout` [s]."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    pytest.fail(f'{what}: not within {timeout} s')


def call(node, service_type, name: str, request=None, timeout: float = 20.0):
    """Call a service and wait for its answer."""
    client = node.create_client(service_type, name)
    assert client.wait_for_service(timeout), f'{name} is not there'
    future = client.call_async(request or service_type.Request())
    wait_for(future.done, timeout, name)
    node.destroy_client(client)
    return future.result()


class FollowingArm:
    """An arm that is where it was told to be: real joint states at 100 Hz from the last command received."""

    def __init__(self, node, contract: Path = CONTRACT, namespace: str = '', plans: bool = True):
        """plans: `send` will be used; else there is no publisher of chunks, which would count as a planner."""
        from diagnostic_msgs.msg import DiagnosticArray
        from il_msgs.msg import ActionChunk, ControllerStatus
        from sensor_msgs.msg import JointState

        from il_runtime.outputs import OUTPUT_TYPES
        from il_runtime.ros import STATUS_QOS, chunk_qos
        self.node, self.contract, self.prefix = node, load_contract(contract), namespace
        self.names = list(self.contract.action.joints)
        self.position, self.silent = np.zeros(len(self.names)), False
        self.report = lambda position: position
        """Changes what the joint states say."""
        self.commands, self.received, self.statuses, self.diagnostics, self.raw = [], [], [], [], []
        self.states = node.create_publisher(JointState, f'{namespace}joint_states', 10)
        self.chunks = node.create_publisher(ActionChunk, f'{namespace}chunks', chunk_qos(2.0)) if plans else None
        self.teleop = node.create_publisher(JointState, f'{namespace}teleop', 10)
        node.create_subscription(JointState, f'{namespace}command', self._on_command, 100)
        for output in self.contract.action.outputs:
            joints = output.joints or self.names
            columns = [self.names.index(name) for name in joints]
            node.create_subscription(OUTPUT_TYPES[output.type], f'{namespace}{output.topic}',
                                     lambda message, columns=columns: self._obey(message, columns), 10)
        node.create_subscription(ControllerStatus, f'{namespace}controller/status', self.statuses.append, STATUS_QOS)
        node.create_subscription(DiagnosticArray, '/diagnostics', self.diagnostics.append, 10)
        node.create_timer(0.01, self._report)

    def _on_command(self, message):
        self.received.append(time.monotonic())
        self.commands.append(message)

    def _obey(self, message, columns):
        self.raw.append((time.monotonic(), message))
        values = (message.points[0].positions if hasattr(message, 'points') else
                  message.position if hasattr(message, 'position') else message.data)
        position = self.position.copy()
        position[columns] = values
        self.position = position

    def _report(self):
        from sensor_msgs.msg import JointState
        if not self.silent:
            message = JointState(name=self.names, position=self.report(self.position))
            message.header.stamp = self.node.get_clock().now().to_msg()
            self.states.publish(message)

    @property
    def mode(self):
        return self.statuses[-1].mode if self.statuses else None

    def arm(self, approach=False) -> int:
        """Arm; the epoch, once the status shows it."""
        from il_msgs.srv import Arm
        request, service = Arm.Request(approach=approach), f'{self.prefix}controller/arm'
        wait_for(lambda: self.statuses, what='controller status')
        # As soon as there are fresh joint states, and a dead controller has left the graph.
        answer = wait_for(lambda: (a := call(self.node, Arm, service, request)).success and a, 40.0, 'arming')
        wait_for(lambda: self.statuses[-1].epoch >= answer.epoch, what='the new epoch')
        return answer.epoch

    def ask(self, service: str):
        """Call one of the controller's Trigger services."""
        from std_srvs.srv import Trigger
        return call(self.node, Trigger, f'{self.prefix}controller/{service}')

    def send(self, epoch, values, sequence=0, names=None, offset=0.0, joint='shoulder_pan', period=0.1):
        """A chunk that moves one joint through `values`, `period` apart, from now; the others stay where they are."""
        names = names or self.names
        positions = np.tile([self.position[self.names.index(name)] if name in self.names else 0.0 for name in names],
                            (len(values), 1))
        positions[:, names.index(joint)] = values
        self.send_rows(epoch, positions, sequence, names, offset, period)

    def send_rows(self, epoch, rows, sequence=0, names=None, offset=0.0, period=0.1):
        """A chunk of rows (H, D), `period` apart, from now."""
        from il_msgs.msg import ActionChunk

        from il_runtime.ros import to_stamp
        now = self.node.get_clock().now().nanoseconds + round(offset * 1e9)
        message = ActionChunk(step_period=period, joint_names=names or self.names, horizon=len(rows), policy='test',
                              positions=np.asarray(rows, dtype=np.float32).ravel(), epoch=epoch, sequence=sequence)
        message.header.stamp = message.start = to_stamp(now)
        self.chunks.publish(message)

    def guide(self, positions=None):
        """One teleop command (None: release)."""
        from sensor_msgs.msg import JointState
        message = JointState() if positions is None else JointState(name=self.names, position=positions)
        message.header.stamp = self.node.get_clock().now().to_msg()
        self.teleop.publish(message)

    def motion(self):
        """Stamps [s] and positions (N, D) of the commands so far."""
        messages = list(self.commands)
        stamps = np.array([m.header.stamp.sec + m.header.stamp.nanosec * 1e-9 for m in messages])
        return stamps, np.array([m.position for m in messages])

    def assert_within_limits(self):
        """Velocity and acceleration of all commands so far, recomputed from their stamps."""
        stamps, positions = self.motion()
        dt = np.diff(stamps)[:, None]
        assert (dt > 0.015).all(), 'no burst'
        velocity = np.diff(positions, axis=0) / dt
        acceleration = np.diff(velocity, axis=0) / ((dt[1:] + dt[:-1]) / 2)
        joints = self.contract.action_joints
        assert (np.abs(velocity) <= np.array([joint.velocity for joint in joints]) * 1.001).all()
        assert (np.abs(acceleration) <= np.array([joint.acceleration for joint in joints]) * 1.01).all()
