"""What fails around the controller, with real processes: each test leaves a row for docs/safety.md."""
from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from support import FollowingArm, call, patient_contract, wait_for

PLANNER = Path(__file__).with_name('scripted_planner.py')


@pytest.fixture
def arm(nodes, node, tmp_path):
    nodes.start('controller_node', contract=patient_contract(tmp_path))
    return FollowingArm(node)


def swinging(arm, nodes, period=0.1) -> int:
    """An arm that a planner in another process swings fast; the epoch."""
    from il_msgs.msg import ControllerStatus
    nodes.run('planner', PLANNER, period)
    epoch = arm.arm()
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, what='POLICY')
    wait_for(lambda: speed(arm) > 1.5, what='speed')
    return epoch


def speed(arm) -> float:
    """Of the fastest joint in the newest command [rad/s]."""
    return float(np.abs(arm.commands[-1].velocity).max()) if arm.commands else 0.0


def first_status(arm, since: int, mode: int):
    """The first status after the `since`-th that shows a mode, waited for."""
    return wait_for(lambda: next((s for s in arm.statuses[since:] if s.mode == mode), None), what=f'mode {mode}')


def seconds(stamp) -> float:
    return stamp.sec + stamp.nanosec * 1e-9


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_planner_dies_or_freezes(arm, nodes, node, show, number):
    from il_msgs.msg import ActionChunk, ControllerStatus

    from il_runtime.ros import chunk_qos
    ends = []
    node.create_subscription(ActionChunk, 'chunks', lambda m: ends.append(seconds(m.start) + (m.horizon - 1) * m.step_period),
                             chunk_qos())
    swinging(arm, nodes)
    nodes.processes['planner'].send_signal(number)
    killed, since = time.time(), len(arm.statuses)
    stopping = first_status(arm, since, ControllerStatus.STOPPING)
    wait_for(lambda: arm.mode == ControllerStatus.HOLD, what='HOLD')
    stamps, positions = arm.motion()
    moving = np.abs(np.diff(positions, axis=0)).max(axis=1) > 0
    at_rest = stamps[1:][moving][-1] + 0.02
    assert stopping.reason == 'no fresh chunk'
    assert at_rest <= ends[-1] + 0.04, 'at rest when the horizon ends'
    assert seconds(stopping.header.stamp) < ends[-1]
    arm.assert_within_limits()
    name = signal.Signals(number).name
    show(f'planner {name}', 'bounded stop starts while the remaining horizon still covers it; at rest within limits',
         f'stop began {ends[-1] - seconds(stopping.header.stamp):.2f} s before the horizon ended, '
         f'{seconds(stopping.header.stamp) - killed:.2f} s after the signal; at rest {ends[-1] - at_rest:+.2f} s before its end')
    if number == signal.SIGSTOP:
        nodes.processes['planner'].send_signal(signal.SIGCONT)
        wait_for(lambda: arm.mode == ControllerStatus.POLICY, what='the planner is followed again')
        arm.assert_within_limits()


def test_planner_is_restarted_in_motion(arm, nodes, show):
    from il_msgs.msg import ControllerStatus
    swinging(arm, nodes)
    nodes.stop('planner', signal.SIGKILL)
    nodes.run('planner', PLANNER, 0.1)  # counts its chunks anew, under the same epoch
    since = len(arm.statuses)
    wait_for(lambda: arm.statuses[-1].live_chunks <= 4, what='chunks run out')
    wait_for(lambda: arm.statuses[-1].chunk_age < 0.2, what='a fresh chunk')
    # A Python process takes longer to start than a chunk lasts on a slow machine; then it is followed from HOLD.
    modes = {status.mode for status in arm.statuses[since:]}
    assert modes <= {ControllerStatus.POLICY, ControllerStatus.STOPPING, ControllerStatus.HOLD}
    wait_for(lambda: arm.mode == ControllerStatus.POLICY)
    arm.assert_within_limits()
    stopped = 'after a stop' if ControllerStatus.STOPPING in modes else 'without a stop'
    show('planner restarted in motion', 'works at once', f'its first chunk was followed, {stopped}')


def test_controller_is_frozen_for_two_seconds(arm, nodes, show):
    from il_msgs.msg import ControllerStatus
    swinging(arm, nodes)
    nodes.processes['controller_node'].send_signal(signal.SIGSTOP)
    time.sleep(0.1)  # what was on the wire
    count, last = len(arm.commands), np.array(arm.commands[-1].position)
    time.sleep(2.0)
    assert len(arm.commands) == count
    nodes.processes['controller_node'].send_signal(signal.SIGCONT)
    wait_for(lambda: len(arm.commands) > count + 50)
    first = np.array(arm.commands[count].position)
    gaps = np.diff(arm.received[count:count + 50])
    assert np.abs(first - last).max() <= 2.5 * 0.02 * 1.01, 'no jump'
    assert (np.array(arm.received[count:]) - arm.received[count] < 0.2).sum() <= 12, 'no burst'
    assert any(s.reason == 'the loop was paused' and s.mode == ControllerStatus.HOLD for s in arm.statuses)
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, what='the planner is followed again')
    arm.assert_within_limits()
    show('controller SIGSTOP 2 s, SIGCONT', 'no burst, no old command',
         f'first command {np.abs(first - last).max() * 1e3:.1f} mrad from the last; then {np.median(gaps) * 1e3:.1f} ms apart '
         '(median); motion began anew from rest')


def test_controller_is_killed_at_full_speed_behind_a_trajectory_controller(nodes, node, tmp_path, show):
    from il_msgs.msg import ControllerStatus
    from sensor_msgs.msg import JointState
    contract = patient_contract(tmp_path, outputs=[{'topic': 'arm_controller/joint_trajectory',
                                                    'type': 'trajectory_msgs/msg/JointTrajectory'}])
    nodes.start('simulator_node', contract=contract, camera='false', nice=0)
    nodes.start('controller_node', contract=contract)
    arm = FollowingArm(node, contract)
    arm.silent = True  # the simulator is the robot
    states = []
    node.create_subscription(JointState, 'joint_states', lambda m: states.append((time.monotonic(), m)), 100)
    wait_for(lambda: states)
    epoch = arm.arm()
    roll = arm.names.index('wrist_roll')
    column = list(states[-1][1].name).index('wrist_roll')
    arm.position = np.array([dict(zip(states[-1][1].name, states[-1][1].position))[name] for name in arm.names])
    arm.send(epoch, arm.position[roll] + np.linspace(0, 2.4, 11), joint='wrist_roll')
    wait_for(lambda: arm.mode == ControllerStatus.POLICY and speed(arm) > 2.3, what='full speed')
    time.sleep(0.2)
    nodes.stop('controller_node', signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(1.0)
    heard, trajectory = arm.raw[-1]
    velocity = np.array(trajectory.points[0].velocities)
    assert np.abs(velocity).max() > 2.3
    end = trajectory.points[-1].time_from_start
    ended = heard + end.sec + end.nanosec * 1e-9 - killed
    allowed = 0.04 + np.abs(velocity).max() / 15
    assert ended <= allowed + 0.005
    # The arm itself: at rest, where the ramp ended.
    positions = np.array([m.position[column] for t, m in states if t > killed + ended + 0.3])
    assert np.ptp(positions) < 0.02 and positions[-1] == pytest.approx(trajectory.points[-1].positions[roll], abs=0.05)
    show('controller SIGKILL at full speed, JointTrajectory output', 'commanded motion ends ≤ 40 ms + v/a later',
         f'{ended * 1e3:.0f} ms after the kill at {np.abs(velocity).max():.2f} rad/s, allowed {allowed * 1e3:.0f} ms')


def test_controller_is_restarted_in_motion(arm, nodes, tmp_path, show):
    from il_msgs.msg import ControllerStatus
    swinging(arm, nodes)
    nodes.stop('controller_node', signal.SIGKILL)
    count, since = len(arm.commands), len(arm.statuses)
    nodes.start('controller_node', contract=patient_contract(tmp_path))
    wait_for(lambda: len(arm.statuses) > since + 10, what='the new controller')
    assert {s.mode for s in arm.statuses[since + 1:]} == {ControllerStatus.INACTIVE}
    assert len(arm.commands) <= count + 2, 'nothing is commanded before it is armed'
    began = time.monotonic()
    arm.arm()  # refused as long as the dead one is still in the graph
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, what='the planner follows the new epoch')
    show('controller restarted in motion', 'starts inactive',
         f'INACTIVE, 0 commands until armed; could be armed {time.monotonic() - began:.1f} s later')


def test_joint_states_stop(nodes, node, tmp_path, show):
    from il_msgs.msg import ControllerStatus
    nodes.start('controller_node', contract=patient_contract(tmp_path, max_age=0.1))
    arm = FollowingArm(node)
    waits = []
    for attempt in range(5):
        epoch = arm.arm()
        arm.send(epoch, arm.position[0] + np.linspace(0, 0.5 * (-1) ** attempt, 16))
        wait_for(lambda: arm.mode == ControllerStatus.POLICY)
        time.sleep(0.3)
        since, last = len(arm.statuses), node.get_clock().now().nanoseconds * 1e-9
        arm.silent = True
        fault = first_status(arm, since, ControllerStatus.FAULT)
        assert 'joint states older than 0.100 s' in fault.reason
        waits.append(seconds(fault.header.stamp) - last)
        arm.silent = False
        wait_for(lambda: arm.ask('reset_fault').success, what='reset')
    # The last sample is up to 10 ms older than the moment at which the sensor fell silent.
    assert min(waits) <= 0.12 and max(waits) <= 0.12 + 0.02, waits
    arm.assert_within_limits()
    show('joint states stop', 'FAULT within max age (100 ms) + 1 tick (20 ms)',
         f'{min(waits) * 1e3:.0f} to {max(waits) * 1e3:.0f} ms after the sensor fell silent, 5 times')


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e308])
def test_bad_numbers_from_every_side(arm, show, bad):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    arm.send(epoch, np.linspace(0, 0.6, 16))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY)
    before = arm.statuses[-1]
    # Two of each: a third in a row would be a fault.
    with np.errstate(over='ignore'):
        for sequence in (1, 2):
            arm.send(epoch, np.where(np.arange(16) == 5 + sequence, bad, 0.3), sequence=sequence)
    for joint in (0, 3):
        wrong = arm.position.copy()
        wrong[joint] = bad
        arm.guide(wrong)
    once = iter([True, True])
    arm.report = lambda position: np.where(np.arange(6) == 2, bad, position) if next(once, False) else position
    wait_for(lambda: (s := arm.statuses[-1]).rejected_chunks == before.rejected_chunks + 2
             and s.rejected_teleop == before.rejected_teleop + 2
             and s.rejected_joint_states >= before.rejected_joint_states + 1, what='all refused')
    assert arm.mode == ControllerStatus.POLICY, 'the rest is followed'
    arm.report = lambda position: np.full(6, bad)
    fault = first_status(arm, len(arm.statuses), ControllerStatus.FAULT)
    assert fault.reason == 'joint_states: 3 non-finite messages in a row' or 'older' in fault.reason
    _, positions = arm.motion()
    assert np.isfinite(positions).all()
    arm.assert_within_limits()
    show('NaN, ±Inf, 1e308 in a chunk, joint state, teleop command', 'whole message rejected, 0 non-finite commands, counted',
         f'all refused and counted (every index of each in unit tests), {len(positions)} commands finite; '
         'the third in a row is a FAULT')


def test_somebody_else_commands_the_arm(arm, node, show):
    from il_msgs.msg import ControllerStatus
    from il_msgs.srv import Arm
    from std_msgs.msg import Float64MultiArray
    epoch = arm.arm()
    arm.send(epoch, np.linspace(0, 1, 16))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY)
    began = time.monotonic()
    other = node.create_publisher(Float64MultiArray, 'forward_position_controller/commands', 1)
    fault = first_status(arm, len(arm.statuses) - 1, ControllerStatus.FAULT)
    took = time.monotonic() - began
    assert '2 publishers on /forward_position_controller/commands: /controller, /test' in fault.reason and took < 2.0
    wait_for(lambda: arm.ask('reset_fault').success)
    assert 'somebody else commands this arm' in call(node, Arm, 'controller/arm').message
    node.destroy_publisher(other)
    arm.arm()
    show('a second publisher on the command topic', 'noticed, latches', f'FAULT after {took:.1f} s, naming both nodes')


def test_arming_off_the_pose(arm, show):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    arm.send(epoch, np.full(16, 0.5))
    wait_for(lambda: 'first command refused: shoulder_pan is 0.500 off, tolerance 0.150' in arm.statuses[-1].reason)
    assert arm.mode == ControllerStatus.HOLD and not arm.position.any()
    assert arm.ask('stop').success
    wait_for(lambda: arm.mode == ControllerStatus.INACTIVE)
    epoch = arm.arm(approach=True)
    for sequence in range(60):
        arm.send(epoch, np.full(16, 0.5), sequence=sequence)
        if arm.mode == ControllerStatus.POLICY:
            break
        time.sleep(0.1)
    assert arm.mode == ControllerStatus.POLICY and any(s.mode == ControllerStatus.APPROACH for s in arm.statuses)
    wait_for(lambda: abs(arm.position[0] - 0.5) < 1e-6)
    stamps, positions = arm.motion()
    fastest = np.abs(np.diff(positions[:, 0]) / np.diff(stamps)).max()
    assert fastest <= 0.25 * 1.01
    show('first command off the measured pose', 'refused; with `approach` a slow bounded approach',
         f'0.5 rad off: refused; approached at {fastest:.2f} rad/s at most (limit 2.5)')


@pytest.mark.parametrize('how', ['SIGINT', 'SIGTERM', 'deactivate'])
def test_told_to_end_at_full_speed(arm, nodes, node, show, how):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    arm.send(epoch, np.linspace(0, 1.7, 8))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY and speed(arm) > 2.3, what='full speed')
    if how == 'deactivate':
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState
        request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_DEACTIVATE))
        assert call(node, ChangeState, 'controller/change_state', request).success
        assert nodes.stop('controller_node') == 0
    else:
        assert nodes.stop('controller_node', getattr(signal, how)) == 0
    wait_for(lambda: arm.mode == ControllerStatus.INACTIVE, what='the last status')
    _, positions = arm.motion()
    assert positions[-1, 0] < 1.65, 'stopped, not run to the end'
    assert abs(positions[-1, 0] - positions[-2, 0]) <= 15 * 0.02 * 0.02 * 1.01
    arm.assert_within_limits()
    show(f'{how} at full speed', 'bounded stop, then exit 0', 'at rest within limits, exit 0')


def test_simulated_time_stalls_and_jumps_back(nodes, node, tmp_path, show):
    from il_msgs.msg import ControllerStatus
    from rosgraph_msgs.msg import Clock
    from sensor_msgs.msg import JointState

    from il_runtime.ros import to_stamp
    nodes.start('controller_node', contract=patient_contract(tmp_path), use_sim_time='true')
    arm = FollowingArm(node)
    arm.silent = True
    clock = node.create_publisher(Clock, '/clock', 10)
    now = [100.0]
    running = [True]

    def advance():
        if running[0]:
            now[0] += 0.005
            stamp = to_stamp(round(now[0] * 1e9))
            clock.publish(Clock(clock=stamp))
            message = JointState(name=arm.names, position=arm.position)
            message.header.stamp = stamp
            arm.states.publish(message)

    node.create_timer(0.005, advance)

    def send(epoch, values, sequence):
        from il_msgs.msg import ActionChunk
        positions = np.zeros((len(values), 6), dtype=np.float32)
        positions[:, 0] = values
        message = ActionChunk(step_period=0.1, joint_names=arm.names, horizon=len(values), positions=positions.ravel(),
                              epoch=epoch, sequence=sequence)
        message.header.stamp = message.start = to_stamp(round(now[0] * 1e9))
        arm.chunks.publish(message)

    epoch = arm.arm()
    send(epoch, np.linspace(0, 1.5, 31), 0)
    wait_for(lambda: arm.mode == ControllerStatus.POLICY and arm.position[0] > 0.2, what='motion')
    running[0] = False
    stalled = first_status(arm, len(arm.statuses), ControllerStatus.STOPPING)
    assert stalled.reason == '/clock stands still'
    count = len(arm.commands)
    time.sleep(0.5)
    assert len(arm.commands) == count, 'no time, no commands'
    running[0] = True
    wait_for(lambda: arm.mode == ControllerStatus.HOLD, what='HOLD once it goes on')
    arm.assert_within_limits()
    send(epoch, arm.position[0] + np.linspace(0, 1.0, 31), 1)
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, what='motion again')
    time.sleep(0.3)
    arm.commands.clear()
    now[0] -= 50.0
    wait_for(lambda: arm.statuses[-1].epoch > epoch and arm.mode == ControllerStatus.HOLD, what='new epoch and HOLD')
    assert arm.mode != ControllerStatus.FAULT
    running[0] = False
    time.sleep(0.8)
    began = time.monotonic()
    assert nodes.stop('controller_node') == 0 and time.monotonic() - began < 3.0, 'a dead clock does not keep it from ending'
    show('`/clock` stalls, jumps back', 'hold; flush and new epoch', 'STOPPING → HOLD; new epoch, HOLD')


def first_use(arm, since: int, value: float) -> int:
    """Index of the first command from the `since`-th on in which shoulder_pan is no longer at a value; waited for."""
    def used():
        return next((i for i in range(since, len(arm.commands)) if arm.commands[i].position[0] != value), None)

    return wait_for(used, what='the chunk is used')


def test_chunk_to_command_latency(arm, show):
    from il_msgs.msg import ControllerStatus
    epoch = arm.arm()
    waits = []
    arm.send(epoch, np.zeros(50))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY)
    for i in range(1, 41):
        time.sleep(0.3 + 0.001 * (i * 7 % 20))  # at any phase of the loop
        since, value = len(arm.commands), arm.commands[-1].position[0]
        sent = time.monotonic()
        arm.send(epoch, np.full(50, value + 0.02 * (-1) ** i), sequence=i)
        waits.append(arm.received[first_use(arm, since, value)] - sent)
    p99, median = np.percentile(waits, 99) * 1e3, np.median(waits) * 1e3
    show('chunk received → first command that uses it, p99', '≤ 25 ms',
         f'{p99:.1f} ms (median {median:.1f}), measured outside: both ways over DDS included')
    assert median < 25
