from __future__ import annotations

import signal
import time

import numpy as np
import pytest

from support import FollowingArm, call, patient_contract, wait_for


@pytest.fixture
def arm(nodes, node, tmp_path):
    nodes.start('controller_node', contract=patient_contract(tmp_path))
    return FollowingArm(node)


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
    arm.assert_within_limits()


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
    arm.assert_within_limits()


def test_joint_states_fall_silent(arm):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    arm.send(epoch, np.linspace(0, 1.6, 16))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY and arm.position[0] > 0.2)
    arm.silent = True
    wait_for(lambda: arm.mode == ControllerStatus.FAULT, timeout=2, what='FAULT')
    assert 'joint states older' in arm.statuses[-1].reason
    arm.assert_within_limits()


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
    # Configured anew it is the only one on its topics.
    for transition in (Transition.TRANSITION_CLEANUP, Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
        change(transition)
    epoch = arm.arm()
    arm.send(epoch, np.linspace(0, 0.5, 16))
    wait_for(lambda: arm.position[0] > 0.1, what='motion')
    assert len(node.get_publishers_info_by_topic('/command')) == 1
    change(Transition.TRANSITION_ACTIVE_SHUTDOWN)
    wait_for(lambda: arm.mode == ControllerStatus.INACTIVE, what='a stop on shutdown')
    arm.assert_within_limits()


# --- outputs -------------------------------------------------------------------------------------------------------------
def test_every_output_type_gets_the_same_command(nodes, node, tmp_path):
    arm_joints = ['shoulder_pan', 'shoulder_lift', 'elbow_flex']
    contract = patient_contract(tmp_path, outputs=[
        {'topic': 'arm_controller/joint_trajectory', 'type': 'trajectory_msgs/msg/JointTrajectory', 'joints': arm_joints},
        {'topic': 'wrist', 'type': 'sensor_msgs/msg/JointState', 'joints': ['wrist_roll', 'wrist_flex']},
        {'topic': 'gripper_controller/commands', 'type': 'std_msgs/msg/Float64MultiArray', 'joints': ['gripper']}])
    nodes.start('controller_node', contract=contract)
    arm = FollowingArm(node, contract)
    epoch = arm.arm()
    for sequence, joint in enumerate(('shoulder_pan', 'wrist_flex', 'gripper')):
        arm.send(epoch, arm.position[arm.names.index(joint)] + np.linspace(0, 0.4, 9), sequence=sequence, joint=joint)
        time.sleep(0.4)
    wait_for(lambda: len(arm.raw) > 150)
    by_type = {}
    for _, message in arm.raw:
        by_type.setdefault(type(message).__name__, []).append(message)
    commands = {tuple(m.position) for m in arm.commands}
    for trajectory in by_type['JointTrajectory']:
        assert list(trajectory.joint_names) == arm_joints
        assert not any(trajectory.points[-1].velocities), 'a controller that dies leaves an arm that comes to rest'
        times = [p.time_from_start.sec * 10**9 + p.time_from_start.nanosec for p in trajectory.points]
        assert times[0] == 20_000_000 and all(b - a >= 500_000 for a, b in zip(times, times[1:]))
    assert max(len(t.points) for t in by_type['JointTrajectory']) > 2
    assert {tuple(t.points[0].positions) for t in by_type['JointTrajectory']} <= {c[:3] for c in commands}
    assert all(list(m.name) == ['wrist_roll', 'wrist_flex'] for m in by_type['JointState'])
    assert {tuple(m.position) for m in by_type['JointState']} <= {(c[4], c[3]) for c in commands}
    assert {m.data[0] for m in by_type['Float64MultiArray']} <= {c[5] for c in commands}
    assert max(c[0] for c in commands) > 0.1 and max(c[3] for c in commands) > 0.1 and max(c[5] for c in commands) > 0.1


def test_two_arms_in_two_namespaces_and_fourteen_joints(nodes, node, tmp_path, show):
    contract = patient_contract(tmp_path, arms=2)
    arms = {}
    for side in ('left', 'right'):
        nodes.start('controller_node', namespace=side, contract=contract)
        arms[side] = FollowingArm(node, contract, f'{side}/')
    epochs = {side: arm.arm() for side, arm in arms.items()}
    before = {side: arm.statuses[-1].ticks for side, arm in arms.items()}
    began = time.monotonic()
    for sequence in range(10):
        for side, column, joint, way in (('left', 3, 'left_wrist_flex', 0.8), ('right', 13, 'right_wrist_yaw', -0.8)):
            arms[side].send(epochs[side], arms[side].position[column] + np.linspace(0, way, 16), sequence, joint=joint)
        time.sleep(0.2)
    wait_for(lambda: all(arm.statuses[-1].live_chunks > 1 for arm in arms.values()))
    rates = [(arm.statuses[-1].ticks - before[side]) / (time.monotonic() - began) for side, arm in arms.items()]
    assert arms['left'].position[3] > 0.3 and not np.delete(arms['left'].position, 3).any()
    assert arms['right'].position[13] < -0.3 and not np.delete(arms['right'].position, 13).any()
    for arm in arms.values():
        arm.assert_within_limits()
    assert all(45 < rate < 55 for rate in rates)
    show('two arms in two namespaces, 14 joints each', 'both at 50 Hz, each moves its own',
         f'{rates[0]:.1f} and {rates[1]:.1f} Hz')


# --- services and parameters ---------------------------------------------------------------------------------------------
def set_parameter(arm, name, value):
    from rcl_interfaces.srv import SetParameters
    from rclpy.parameter import Parameter
    request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
    return call(arm.node, SetParameters, 'controller/set_parameters', request).results[0]


def test_modes_weights_and_speed_change_in_motion_the_rest_does_not(arm, nodes, tmp_path):
    from il_msgs.msg import ControllerStatus
    assert set_parameter(arm, 'blend_time', 0.1).successful
    epoch = arm.arm()
    arm.send(epoch, np.linspace(0, 1.5, 31))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY)
    assert set_parameter(arm, 'ensembling', 'latest').successful and set_parameter(arm, 'm', 0.1).successful
    wait_for(lambda: arm.statuses[-1].ensembling == 'latest')
    assert set_parameter(arm, 'speed_scale', 20.0).successful
    wait_for(lambda: abs(arm.statuses[-1].speed_scale - 20) < 1e-6)
    for name, value, reason in (('ensembling', 'newest', "ensembling is 'newest', valid: newest_first"),
                                ('speed_scale', 101.0, 'range'), ('blend_time', 0.3, 'read-only while armed; stop first'),
                                ('contract', 'other.yaml', 'read-only')):
        result = set_parameter(arm, name, value)
        assert not result.successful and reason in result.reason, result.reason
    assert arm.mode == ControllerStatus.POLICY
    arm.assert_within_limits()


def test_hold_stop_and_fault_by_service(arm, node):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    assert not arm.ask('reset_fault').success
    arm.send(epoch, np.linspace(0, 1.5, 16))
    wait_for(lambda: arm.position[0] > 0.3)
    assert arm.ask('hold').success
    wait_for(lambda: arm.mode == ControllerStatus.HOLD and not arm.statuses[-1].follows_chunks, what='HOLD')
    held = arm.position[0]
    arm.send(epoch, held + np.linspace(0, 1, 16), sequence=1)
    time.sleep(0.3)
    assert arm.position[0] == held
    epoch = arm.arm()
    arm.send(epoch, held + np.linspace(0, 1, 16))
    wait_for(lambda: arm.position[0] > held + 0.1)
    assert arm.ask('stop').success
    wait_for(lambda: arm.mode == ControllerStatus.INACTIVE, what='INACTIVE')
    arm.assert_within_limits()


def test_a_human_takes_over_and_hands_back(arm):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    arm.send(epoch, np.linspace(0, 1.5, 16))
    wait_for(lambda: arm.position[0] > 0.3)
    target = arm.position.copy()
    for _ in range(50):
        target[0] += 0.002
        arm.guide(target)
        time.sleep(0.02)
    assert arm.mode == ControllerStatus.TELEOP and arm.statuses[-1].reason == 'a human took over'
    np.testing.assert_allclose(arm.position, target, atol=0.02)
    arm.guide(None)
    wait_for(lambda: arm.mode == ControllerStatus.HOLD and arm.statuses[-1].epoch > epoch, what='hand-back')
    arm.send(arm.statuses[-1].epoch, arm.position[0] + np.linspace(0, 0.5, 16))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, what='the policy goes on')
    modes = [status.mode for status in arm.statuses]
    assert ControllerStatus.TELEOP in modes, 'the status says who was in charge'
    arm.assert_within_limits()


def test_diagnostics_say_what_is_wrong(arm):
    from diagnostic_msgs.msg import DiagnosticStatus

    def last():
        return arm.diagnostics[-1].status[0] if arm.diagnostics else None

    arm.arm()
    status = wait_for(lambda: last() and last().level == DiagnosticStatus.OK and 'HOLD' in last().message and last())
    assert status.name == '/controller: control loop' and status.hardware_id == 'so101'
    arm.silent = True
    status = wait_for(lambda: last().level == DiagnosticStatus.ERROR and last(), what='ERROR')
    assert 'FAULT: joint states older than 0.500 s' in status.message
    values = {pair.key: pair.value for pair in status.values}
    assert values['mode'] == 'FAULT' and {'lateness p99 [ms]', 'missed ticks', 'rejected chunks', 'scheduler'} <= set(values)
