from __future__ import annotations

import signal
import time

import numpy as np
import pytest

from il_policies.contract import load_contract
from support import ROOT, call, patient_contract, wait_for

CONTRACT = ROOT / 'config/robots/so101.yaml'


class FollowingArm:
    """An arm that is where it was told to be: real joint states at 100 Hz from the last command received."""

    def __init__(self, node):
        from il_msgs.msg import ActionChunk, ControllerStatus
        from sensor_msgs.msg import JointState
        from std_msgs.msg import Float64MultiArray

        from il_runtime.ros import STATUS_QOS, chunk_qos
        self.node, self.contract = node, load_contract(CONTRACT)
        self.names = list(self.contract.action.joints)
        self.position, self.silent = np.zeros(6), False
        self.commands, self.statuses = [], []
        self.states = node.create_publisher(JointState, 'joint_states', 10)
        self.chunks = node.create_publisher(ActionChunk, 'chunks', chunk_qos(2.0))
        node.create_subscription(JointState, 'command', lambda m: self.commands.append(m), 100)
        node.create_subscription(Float64MultiArray, 'forward_position_controller/commands', self._obey, 10)
        node.create_subscription(ControllerStatus, 'controller/status', lambda m: self.statuses.append(m), STATUS_QOS)
        node.create_timer(0.01, self._report)

    def _obey(self, message):
        self.position = np.array(message.data)

    def _report(self):
        from sensor_msgs.msg import JointState
        if not self.silent:
            message = JointState(name=self.names, position=self.position)
            message.header.stamp = self.node.get_clock().now().to_msg()
            self.states.publish(message)

    @property
    def mode(self):
        return self.statuses[-1].mode if self.statuses else None

    def arm(self) -> int:
        from il_msgs.srv import Arm
        wait_for(lambda: self.statuses, what='controller status')
        answer = wait_for(lambda: (a := call(self.node, Arm, 'controller/arm')).success and a, what='arming')
        wait_for(lambda: self.statuses[-1].epoch == answer.epoch, what='the new epoch')
        return answer.epoch

    def send(self, epoch, values, sequence=0, names=None, offset=0.0):
        """A chunk that moves shoulder_pan through `values`, 0.1 s apart, from now."""
        from il_msgs.msg import ActionChunk

        from il_runtime.ros import to_stamp
        now = self.node.get_clock().now().nanoseconds + round(offset * 1e9)
        names = names or self.names
        positions = np.zeros((len(values), len(names)), dtype=np.float32)
        positions[:, names.index('shoulder_pan')] = values
        message = ActionChunk(step_period=0.1, joint_names=names, horizon=len(values), positions=positions.ravel(),
                              epoch=epoch, sequence=sequence, policy='test')
        message.header.stamp = message.start = to_stamp(now)
        self.chunks.publish(message)

    def motion(self):
        """Stamps [s] and positions of the commands so far."""
        stamps = np.array([m.header.stamp.sec + m.header.stamp.nanosec * 1e-9 for m in self.commands])
        return stamps, np.array([m.position for m in self.commands])


@pytest.fixture
def arm(nodes, node, tmp_path):
    nodes.start('controller_node', contract=patient_contract(tmp_path))
    return FollowingArm(node)


def assert_within_limits(arm):
    stamps, positions = arm.motion()
    dt = np.diff(stamps)[:, None]
    velocity = np.diff(positions, axis=0) / dt
    acceleration = np.diff(velocity, axis=0) / ((dt[1:] + dt[:-1]) / 2)
    assert np.abs(velocity).max() <= 2.5 * 1.001
    assert np.abs(acceleration).max() <= 15 * 1.01


def test_nothing_before_arming_then_follows_then_rests(arm):
    from il_msgs.msg import ControllerStatus
    wait_for(lambda: arm.statuses)
    arm.send(arm.statuses[-1].epoch, np.linspace(0, 1, 16))
    assert arm.mode == ControllerStatus.INACTIVE and not arm.commands
    epoch = arm.arm()
    # Permuted names mean the same motion.
    arm.send(epoch, np.linspace(0, 1.2, 16), names=arm.names[::-1])
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, what='POLICY')
    wait_for(lambda: arm.mode == ControllerStatus.HOLD, what='rest after the chunk')
    assert arm.statuses[-1].reason == 'no fresh chunk'
    stamps, positions = arm.motion()
    assert positions[:, 0].max() > 1.0 and np.abs(positions[:, 1:]).max() == 0
    assert np.median(np.diff(stamps)) == pytest.approx(0.02, abs=1e-5)
    assert_within_limits(arm)


def test_bad_chunks_move_nothing_and_are_counted(arm):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    values = np.linspace(0, 1, 16)
    arm.send(epoch, np.where(np.arange(16) == 7, np.nan, values))
    arm.send(epoch, np.where(np.arange(16) == 7, np.inf, values), sequence=1)
    arm.send(epoch - 1, values, sequence=2)
    arm.send(epoch, values, sequence=3, names=['shoulder_pan', 'shoulder_pan'])
    arm.send(epoch, values, sequence=4, offset=-3600)
    wait_for(lambda: arm.statuses[-1].rejected_chunks == 5, what='five refusals')
    assert arm.mode == ControllerStatus.HOLD
    assert not arm.motion()[1].any()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_in_motion_it_stops_within_limits_and_exits_0(arm, nodes, number):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    arm.send(epoch, np.linspace(0, 1.6, 9))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY and arm.position[0] > 0.6)
    assert nodes.stop('controller_node', number) == 0
    wait_for(lambda: arm.mode == ControllerStatus.INACTIVE, what='the last status')
    _, positions = arm.motion()
    assert positions[-1, 0] < 1.5, 'stopped, not run to the end'
    assert abs(positions[-1, 0] - positions[-2, 0]) <= 15 * 0.02 * 0.02 * 1.01
    assert_within_limits(arm)


def test_joint_states_fall_silent(arm):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    arm.send(epoch, np.linspace(0, 1.6, 16))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY and arm.position[0] > 0.2)
    arm.silent = True
    wait_for(lambda: arm.mode == ControllerStatus.FAULT, timeout=2, what='FAULT')
    assert 'joint states older' in arm.statuses[-1].reason
    assert_within_limits(arm)


def test_a_contract_that_cannot_be_used_is_one_clear_line(nodes):
    process = nodes.start('controller_node', contract='nowhere/so102.yaml')
    assert process.wait(20) == 2
    assert 'nowhere/so102.yaml: no such file' in nodes.log('controller_node')
    assert 'Traceback' not in nodes.log('controller_node')


def test_a_refused_arming_does_not_come_true_later(nodes, node, tmp_path):
    from il_msgs.msg import ControllerStatus
    from il_msgs.srv import Arm
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState
    nodes.start('controller_node', contract=patient_contract(tmp_path), autostart='false')
    arm = FollowingArm(node)

    def change(transition: int):
        request = ChangeState.Request(transition=Transition(id=transition))
        assert call(node, ChangeState, 'controller/change_state', request).success

    change(Transition.TRANSITION_CONFIGURE)
    wait_for(lambda: arm.statuses, what='controller status')
    asked = time.monotonic()
    answer = call(node, Arm, 'controller/arm')
    assert not answer.success and 'activate the node' in answer.message
    assert time.monotonic() - asked < 0.8, 'refused at once, not left to a loop that may start later'
    change(Transition.TRANSITION_ACTIVATE)
    time.sleep(0.5)
    assert arm.mode == ControllerStatus.INACTIVE and not arm.commands
    arm.arm()
    change(Transition.TRANSITION_DEACTIVATE)
    wait_for(lambda: arm.mode == ControllerStatus.INACTIVE, what='INACTIVE after deactivation')
    assert not call(node, Arm, 'controller/arm').success
