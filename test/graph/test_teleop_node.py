from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest

from il_policies.contract import load_contract
from il_policies.kinematics import Kinematics
from support import ROOT, call, patient_contract, wait_for

CONTRACT = ROOT / 'config/robots/so101.yaml'
INACTIVE, HOLD, TELEOP = 0, 1, 3


class Arm:
    """Simulator and controller, with what they and the teleoperation publish."""

    def __init__(self, nodes, node, folder):
        from il_msgs.msg import ControllerStatus, TaskStatus
        from sensor_msgs.msg import JointState

        from il_runtime.ros import STATUS_QOS
        self.node, self.contract = node, patient_contract(folder)
        self.robot = load_contract(self.contract)
        self.kinematics = Kinematics(self.robot)
        self.status, self.commands, self.targets, self.tasks = [], [], [], []
        for kind, topic, kept, qos in ((ControllerStatus, 'controller/status', self.status, STATUS_QOS),
                                       (JointState, 'command', self.commands, 100), (JointState, 'teleop', self.targets, 100),
                                       (TaskStatus, 'task_status', self.tasks, 100)):
            node.create_subscription(kind, topic, kept.append, qos)
        nodes.start('simulator_node', contract=self.contract, camera=False)
        # A shared machine pauses processes for longer than a human may be silent.
        nodes.start('controller_node', contract=self.contract, teleop_timeout=0.5)

    def arm(self) -> None:
        from il_msgs.srv import Arm
        wait_for(lambda: call(self.node, Arm, 'controller/arm').success, what='arming')
        wait_for(lambda: self.commands, what='commands')

    def stop(self) -> None:
        from std_srvs.srv import Trigger
        assert call(self.node, Trigger, 'controller/stop').success

    @property
    def mode(self) -> int:
        return self.status[-1].mode if self.status else -1

    @property
    def tip(self) -> np.ndarray:
        """Where the tip is commanded to be."""
        return self.kinematics.pose(self.commands[-1].position)[0]

    def rest(self) -> np.ndarray:
        """Wait until the command stands; the tip there."""
        wait_for(lambda: len(self.commands) > 20 and np.ptp([m.position for m in self.commands[-10:]], axis=0).max() < 1e-6,
                 what='a command that stands')
        return self.tip


class Pad:
    """A gamepad whose driver repeats its state at 50 Hz, until it is unplugged."""

    def __init__(self, node):
        from sensor_msgs.msg import Joy
        self.axes, self.buttons, self.plugged = [0.0] * 8, set(), True
        publisher = node.create_publisher(Joy, 'joy', 10)
        last_breath = []

        def repeat():
            if self.plugged:
                publisher.publish(Joy(axes=self.axes, buttons=[int(i in self.buttons) for i in range(11)]))
                last_breath[:] = [Joy(axes=[0.0] * 8, buttons=[0] * 11)]
            elif last_breath:  # as SDL does
                publisher.publish(last_breath.pop())

        node.create_timer(0.02, repeat)


def holding(arm: Arm, switch, condition=lambda: True, what: str = 'a human in charge') -> None:
    """Wait for a condition while in charge: let go and take hold anew where a shared machine has paused a process.

    switch(held) operates the dead-man switch.
    """
    def reached():
        if arm.mode != TELEOP:
            switch(False)
            time.sleep(0.3)
            if not arm.status[-1].follows_chunks:  # somebody fell silent
                arm.arm()
            switch(True)
            deadline = time.monotonic() + 2.0
            while arm.mode != TELEOP and time.monotonic() < deadline:
                time.sleep(0.02)
        return arm.mode == TELEOP and condition()

    wait_for(reached, 40.0, what)


@pytest.fixture
def arm(nodes, node, tmp_path) -> Arm:
    return Arm(nodes, node, tmp_path)


def refusal(*parameters: str) -> str:
    """The line with which the node refuses to start."""
    arguments = [part for parameter in (f'contract:={CONTRACT}', *parameters) for part in ('-p', parameter)]
    ended = subprocess.run([sys.executable, '-m', 'il_runtime.teleop_node', '--ros-args', *arguments], timeout=60,
                           stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ended.returncode == 2
    return ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(('parameters', 'line'), [
    (['source:=mouse'], "source is 'mouse', valid: leader, gamepad, keyboard"),
    (['source:=keyboard'], 'stdin is no terminal'),
    (['source:=leader', 'mapping:=mirror'], "mapping is 'mirror', valid: relative, absolute"),
    (['space:=tool'], "space is 'tool', valid: cartesian, joint"),
    (['axes:=[1, 2]'], 'axes is [1, 2], must have 6 entries'),
    (['gripper:=claw'], "gripper is 'claw'; joints of the action: shoulder_pan"),
])
def test_parameters_that_mean_nothing_are_refused(parameters, line):
    assert line in refusal(*parameters)


def test_a_gamepad_moves_the_tip_hands_back_and_holds_when_unplugged(nodes, node, arm):
    pad = Pad(node)

    def switch(held: bool) -> None:
        pad.buttons = {4} if held else set()

    switch(True)
    nodes.start('teleop_node', contract=arm.contract)
    wait_for(lambda: 'ready' in nodes.log('teleop_node'))
    arm.arm()
    time.sleep(0.5)
    assert not arm.targets  # a switch that was held from the start was not pressed
    holding(arm, switch)
    assert list(arm.targets[-1].name) == list(arm.robot.action.joints)
    before = arm.rest()
    pad.axes[1] = 1.0
    holding(arm, switch, lambda: arm.tip[0] > before[0] + 0.05, 'the tip 5 cm ahead')
    pad.axes[1] = 0.0
    after = arm.rest()
    assert abs(after[1] - before[1]) < 3e-3 and abs(after[2] - before[2]) < 3e-3

    before = np.array(arm.commands[-1].position)
    while arm.commands[-1].position[5] < before[5] + 0.2:
        holding(arm, switch)
        pad.buttons |= {1}
        time.sleep(0.1)
    pad.buttons -= {1}
    arm.rest()
    np.testing.assert_allclose(arm.commands[-1].position[:5], before[:5], atol=1e-6)

    holding(arm, switch)
    epoch, count = arm.status[-1].epoch, len(arm.targets)
    switch(False)
    wait_for(lambda: arm.mode == HOLD and arm.status[-1].epoch > epoch, what='a new epoch')
    assert arm.status[-1].follows_chunks and 'released' in arm.status[-1].reason
    wait_for(lambda: 1 <= sum(not m.name for m in arm.targets[count:]) <= 3, what='releases')

    holding(arm, switch)
    count = sum(not m.name for m in arm.targets)
    pad.plugged = False
    wait_for(lambda: arm.mode == HOLD, what='a stop')
    assert not arm.status[-1].follows_chunks and 'silent' in arm.status[-1].reason
    assert '/joy is silent; let go, then take hold again' in nodes.log('teleop_node')
    assert sum(not m.name for m in arm.targets) == count
    count = len(arm.targets)
    pad.plugged = True
    time.sleep(0.5)
    assert len(arm.targets) == count  # the button is still pressed, but has to be let go first

    holding(arm, switch)
    count = sum(not m.name for m in arm.targets)
    assert nodes.stop('teleop_node') == 0
    wait_for(lambda: arm.mode == HOLD and not arm.status[-1].follows_chunks, what='a stop')
    assert sum(not m.name for m in arm.targets) == count  # Ctrl-C is silence, not a release


def test_a_gamepad_jogs_joints_and_says_why_nothing_moves(nodes, node, arm):
    pad = Pad(node)

    def switch(held: bool) -> None:
        pad.buttons = {5} if held else set()

    nodes.start('teleop_node', contract=arm.contract, space='joint', deadman_button=5)
    wait_for(lambda: arm.mode == INACTIVE and 'ready' in nodes.log('teleop_node'))

    def told() -> bool:  # taken hold again: the teleoperation may not have found the controller yet
        for held in (False, True):
            switch(held)
            time.sleep(0.3)
        return 'not armed: INACTIVE' in nodes.log('teleop_node')

    wait_for(told, what='a reason')
    assert not arm.targets
    arm.arm()
    holding(arm, switch)
    before = np.array(arm.commands[-1].position)
    pad.buttons |= {2}
    wait_for(lambda: 'joint gripper' in nodes.log('teleop_node'), what='a choice')
    pad.axes[1] = 1.0
    holding(arm, switch, lambda: arm.commands[-1].position[5] > before[5] + 0.3, 'the joint')
    np.testing.assert_allclose(arm.commands[-1].position[:5], before[:5], atol=1e-6)
    arm.stop()
    wait_for(lambda: 'told to stop' in nodes.log('teleop_node'), what='the reason')


def test_a_leader_arm_is_followed_from_where_the_arm_is(nodes, node, arm):
    from sensor_msgs.msg import JointState
    from std_srvs.srv import SetBool
    names = list(arm.robot.action.joints)[::-1]
    leader = {'position': np.full(6, 0.4), 'name': names}
    publisher = node.create_publisher(JointState, 'leader/joint_states', 10)
    node.create_timer(0.01, lambda: publisher.publish(JointState(**leader)))
    nodes.start('teleop_node', contract=arm.contract, source='leader')
    arm.arm()

    def switch(held: bool) -> None:
        assert call(node, SetBool, 'teleop/engage', SetBool.Request(data=held)).success

    def followed() -> bool:
        holding(arm, switch)
        before = np.array(arm.commands[-1].position)
        for _ in range(25):  # a hand, not a jump
            leader['position'] = leader['position'] + [0, 0, 0, 0, 0, 0.01]  # the last of theirs is our first
            time.sleep(0.02)
        arm.rest()
        return np.allclose(np.array(arm.commands[-1].position) - before, [0.25, 0, 0, 0, 0, 0], atol=1e-3)

    wait_for(followed, 60.0, 'a follower')
    leader['name'] = ['a', *names[1:]]
    wait_for(lambda: arm.mode == HOLD, what='a stop')
    assert not arm.status[-1].follows_chunks
    assert ("/leader/joint_states is silent: E203 leader/joint_states: no joints ['gripper']; the message has ['a',"
            in nodes.log('teleop_node'))
    leader['name'] = names
    holding(arm, switch)
    switch(False)
    wait_for(lambda: arm.mode == HOLD and arm.status[-1].reason == 'released by the human', what='the release')
    arm.stop()


def test_the_keyboard_moves_the_tip_stops_the_arm_and_gives_the_terminal_back(nodes, node, arm):
    keys, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    nodes.processes['teleop_node'] = process = subprocess.Popen(
        [sys.executable, '-m', 'il_runtime.teleop_node', '--ros-args', '-p', f'contract:={arm.contract}',
         '-p', 'source:=keyboard'], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    log = open(nodes.folder / 'teleop_node.log', 'w', buffering=1)

    def listen():
        while process.poll() is None:
            try:
                log.write(os.read(keys, 4096).decode())
            except OSError:
                return

    threading.Thread(target=listen, daemon=True).start()
    wait_for(lambda: 'w/s a/d r/f   along x, y, z' in nodes.log('teleop_node'), what='help')
    arm.arm()

    def press(key: str) -> None:
        os.write(keys, key.encode())

    held = False

    def switch(wanted: bool) -> None:
        nonlocal held
        if wanted != held:
            press(' ')
        held = wanted

    def ahead() -> bool:
        press('w')
        time.sleep(0.03)
        return arm.tip[0] > start[0] + 0.04

    holding(arm, switch)
    start = arm.rest()
    holding(arm, switch, ahead, 'the tip 4 cm ahead')
    end = arm.rest()  # the key does not repeat any more
    assert abs(end[1] - start[1]) < 3e-3 and abs(end[2] - start[2]) < 3e-3
    press('\x1b[A')  # an arrow is not Esc
    holding(arm, switch)
    switch(False)
    wait_for(lambda: arm.mode == HOLD and arm.status[-1].follows_chunks, what='the release')
    holding(arm, switch)
    press('\x1b')
    wait_for(lambda: arm.mode == INACTIVE and arm.status[-1].reason == 'told to stop', what='the stop')
    assert nodes.stop('teleop_node') == 0
    assert termios.tcgetattr(terminal) == before
