"""A policy in the shadow of a human: a real controller that sends nothing, beside the one that moves the simulated arm."""
from __future__ import annotations

import re
import signal
import threading
import time

import numpy as np
import pytest

from il_policies.contract import load_contract
from scripted_planner import AMPLITUDE, HORIZON, RATE, STEP
from support import ROOT, call, patient_contract, wait_for

HORIZONS = (0.1, 0.2, 0.5, 1.0)
APART = ['-r', '__node:=shadow', '-p', 'shadow:=true']


def seconds(stamp) -> float:
    return stamp.sec + stamp.nanosec * 1e-9


class Human:
    """Drives the arm with teleop commands, a swing of joint 0, and keeps what everybody says."""

    def __init__(self, node, contract):
        from diagnostic_msgs.msg import DiagnosticArray
        from il_msgs.msg import ActionChunk, ControllerStatus
        from sensor_msgs.msg import JointState

        from il_runtime.ros import STATUS_QOS
        self.node, self.names = node, list(load_contract(contract).action.joints)
        self.states, self.commands, self.chunks, self.errors, self.shadow_commands = [], [], [], [], []
        self.statuses, self.shadows, self.diagnostics = [], [], []
        self.teleop = node.create_publisher(JointState, 'teleop', 10)
        for topic, kept in (('joint_states', self.states), ('command', self.commands), ('shadow/error', self.errors),
                            ('shadow/command', self.shadow_commands)):
            node.create_subscription(JointState, topic, kept.append, 1000)  # on a busy machine this process falls behind
        node.create_subscription(ActionChunk, 'shadow/chunks', self.chunks.append, 1000)
        node.create_subscription(ControllerStatus, 'controller/status', self.statuses.append, STATUS_QOS)
        node.create_subscription(ControllerStatus, 'shadow/status', self.shadows.append, STATUS_QOS)
        node.create_subscription(DiagnosticArray, '/diagnostics', self.diagnostics.append, 10)

    def drive(self, duration: float, motion) -> None:
        """Ask for joint 0 at motion(seconds since now), 50 times a second, then let go."""
        from sensor_msgs.msg import JointState
        pose, began = np.array(self.states[-1].position), time.monotonic()
        while (t := time.monotonic() - began) < duration:
            pose[0] = motion(t)
            message = JointState(name=self.names, position=pose)
            message.header.stamp = self.node.get_clock().now().to_msg()
            self.teleop.publish(message)
            time.sleep(0.02)
        message = JointState()
        message.header.stamp = self.node.get_clock().now().to_msg()
        self.teleop.publish(message)

    def said(self) -> dict[str, str]:
        """What the shadow's diagnostics say about the comparison."""
        for array in reversed(self.diagnostics):
            for status in array.status:
                if status.name == '/shadow: against what is done':
                    return {pair.key: pair.value for pair in status.values}
        return {}

    def joint_0(self, messages) -> tuple[np.ndarray, np.ndarray]:
        """Stamps [s] and positions of joint 0."""
        messages = list(messages)
        return (np.array([seconds(message.header.stamp) for message in messages]),
                np.array([message.position[list(message.name).index(self.names[0])] for message in messages]))


@pytest.fixture
def scene(nodes, node, tmp_path):
    """Simulator, armed controller, shadow with its own planner, and the human."""
    from il_msgs.srv import Arm
    contract = patient_contract(tmp_path)
    human = Human(node, contract)
    nodes.start('simulator_node', contract=contract, camera='false')
    nodes.start('controller_node', contract=contract)
    nodes.run('shadow', '-m', 'il_runtime.controller_node', '--ros-args', *APART, '-p', f'contract:={contract}')
    wait_for(lambda: human.states and human.statuses and human.shadows, 40.0, 'simulator, controller and shadow')
    wait_for(lambda: call(node, Arm, 'controller/arm').success, 40.0, 'arming')
    nodes.run('planner', ROOT / 'test/graph/scripted_planner.py', '0.1', '--ros-args', '-r', 'controller/status:=shadow/status',
              '-r', 'chunks:=shadow/chunks')
    return human


def test_a_shadow_beside_a_human_moves_nothing_and_tells_how_far_they_are_apart(scene, nodes, node):
    from il_msgs.msg import ControllerStatus
    human, modes = scene, (ControllerStatus.POLICY, ControllerStatus.HOLD)
    wait_for(lambda: human.shadows[-1].mode == ControllerStatus.POLICY, what='the shadow follows its planner, armed by nobody')
    assert human.statuses[-1].mode == ControllerStatus.HOLD, human.statuses[-1].reason  # it does not hear those chunks
    # A human who is half as fast as the policy, so that both part and meet again.
    start = human.states[-1].position[0]
    driving = threading.Thread(target=human.drive, args=(8.0, lambda t: start + 0.6 * np.sin(0.8 * t)))
    driving.start()
    wait_for(lambda: human.statuses[-1].mode == ControllerStatus.TELEOP, what='the human drives')
    for topic in ('/command', '/forward_position_controller/commands'):
        assert [info.node_name for info in node.get_publishers_info_by_topic(topic)] == ['controller']
    ours = {name for name, _ in node.get_publisher_names_and_types_by_node('shadow', '/')}
    assert {name for name in ours if not name.startswith('/shadow/')} <= {'/diagnostics', '/rosout', '/parameter_events'}
    driving.join()
    time.sleep(0.3)
    assert nodes.stop('shadow') == 0

    assert not [status.reason for status in human.statuses if status.mode == ControllerStatus.FAULT]
    assert {status.mode for status in human.shadows} <= {*modes, ControllerStatus.STOPPING, ControllerStatus.INACTIVE}
    anew = [status for status in human.shadows if status.reason.startswith('begun anew at the measured pose')]
    assert anew and anew[0].mode == ControllerStatus.HOLD, 'the arm has gone another way, and the status says so'
    (t, x), (when, shown) = human.joint_0(human.states), human.joint_0(human.shadow_commands)
    assert np.abs(x - start).max() < 0.65 and np.abs(shown - np.interp(when, t, x)).max() > 0.25, 'moved by the human alone'

    # Predictions against the arm, by hand from the topics.
    log = nodes.log('shadow')
    table = [re.split(r'  +', line.strip()) for line in log.splitlines() if '/' in line]
    heading = next(row for row in table if row[0] == 'RMS / worst')
    row = next(row for row in table if row[0] == human.names[0])
    for horizon in HORIZONS:
        apart = []
        for chunk in human.chunks:
            at = seconds(chunk.start) + horizon
            if t[0] < at < t[-1]:
                column = list(chunk.joint_names).index(human.names[0])
                steps = np.array(chunk.positions).reshape(HORIZON, -1)[:, column]
                apart.append(np.interp(horizon, STEP * np.arange(HORIZON), steps) - np.interp(at, t, x))
        rms, worst = map(float, row[heading.index(f'in {horizon:g} s')].split(' / '))
        assert len(apart) > 60
        assert rms == pytest.approx(np.sqrt(np.mean(np.square(apart))), abs=0.01), horizon
        assert worst == pytest.approx(np.abs(apart).max(), abs=0.02), horizon
    assert len(human.chunks) - 3 <= int(re.search(r'(\d+) chunks', log)[1]) <= len(human.chunks), 'the last may come too late'
    # Targets against commands: all chunks are one swing, so that what they are ensembled to is known.
    assert {message.header.frame_id for message in human.errors[-100:]} == {'target - command'}
    began = seconds(human.chunks[0].start) - np.arcsin(np.clip(human.chunks[0].positions[0] / AMPLITUDE, -1, 1)) / RATE
    stamps, commands = human.joint_0(human.commands)
    when, errors = human.joint_0([message for message in human.errors if message.header.frame_id == 'target - command'])
    swing = seconds(human.chunks[-1].start)
    inside = (when > stamps[0]) & (when < min(stamps[-1], swing))
    wanted = AMPLITUDE * np.sin(RATE * (when - began)) - np.interp(when, stamps, commands)
    assert inside.sum() > 250
    assert np.quantile(np.abs(errors - wanted)[inside], 0.95) < 0.02, 'linear between the steps of a chunk: up to 4 mrad'
    assert int(re.search(r'begun anew (\d+) times', log)[1]) >= len({status.header.stamp.sec for status in anew})
    said = human.said()
    assert int(said['begun anew']) >= 1
    assert {'in 0.1 s [tolerances]', 'target - command [tolerances]', 'target - arm [tolerances]'} <= set(said)


def test_killed_a_shadow_leaves_the_human_alone(scene, nodes):
    from il_msgs.msg import ControllerStatus
    human = scene
    start = human.states[-1].position[0]
    driving = threading.Thread(target=human.drive, args=(4.0, lambda t: start + 0.5 * np.sin(t)))
    driving.start()
    wait_for(lambda: human.statuses[-1].mode == ControllerStatus.TELEOP and human.shadow_commands, what='both at work')
    nodes.stop('shadow', signal.SIGKILL)
    commands = len(human.commands)
    driving.join()
    assert len(human.commands) - commands > 100
    assert not {ControllerStatus.FAULT, ControllerStatus.STOPPING} & {status.mode for status in human.statuses[:-5]}


def test_stopped_and_held_by_service_it_waits_to_be_armed(scene, node):
    from il_msgs.msg import ControllerStatus
    from il_msgs.srv import Arm
    from std_srvs.srv import Trigger
    human = scene
    for service, mode in (('hold', ControllerStatus.HOLD), ('stop', ControllerStatus.INACTIVE)):
        wait_for(lambda: human.shadows[-1].mode == ControllerStatus.POLICY, what='POLICY')
        assert call(node, Trigger, f'shadow/{service}').success
        time.sleep(1.0)
        assert human.shadows[-1].mode == mode
        refused = call(node, Arm, 'shadow/arm', Arm.Request(approach=True))
        assert not refused.success and 'cannot approach' in refused.message
        assert call(node, Arm, 'shadow/arm').success
    assert human.statuses[-1].mode == ControllerStatus.HOLD and human.statuses[-1].epoch != human.shadows[-1].epoch


def test_a_shadow_needs_a_name_of_its_own(nodes, tmp_path):
    process = nodes.start('controller_node', contract=patient_contract(tmp_path), shadow='true')
    assert process.wait(20) == 2
    assert '-r __node:=shadow' in nodes.log('controller_node') and 'Traceback' not in nodes.log('controller_node')
