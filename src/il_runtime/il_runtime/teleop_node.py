"""A human drives the arm: with a leader arm, a gamepad, or the keyboard of a terminal.

Publishes `teleop` while, and only while, the dead-man switch is held. When it is let go, a release gives the arm back; when
anything breaks, or the node ends, silence makes the controller stop and hold.
"""
from __future__ import annotations

import sys
import time

import numpy as np
from il_msgs.msg import ControllerStatus
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import JointState, Joy
from std_srvs.srv import SetBool, Trigger

from il_policies.contract import Contract, ContractError, Stream, load_contract
from il_policies.data.decode import DecodeError, decode
from il_policies.kinematics import Kinematics
from il_runtime.core.mode import Mode
from il_runtime.core.teleop import Act, Choice, Clutch, Deadman, Follow, Gamepad, Jog, Keys, Layout, Speeds, find_gripper
from il_runtime.ros import STATUS_QOS, Terminal, declare, run

LEADER_SILENT_S = 0.1
"""A leader arm whose pose is older is not followed [s]."""
JOY_SILENT_S = 0.2
"""A gamepad that was last heard of longer ago was unplugged: joy nodes repeat at 20 Hz whatever happens [s]."""


class Keyboard:
    """The terminal's keys: space takes hold and lets go, x and Esc stop the controller, others are for whoever reads them."""

    HELP = 'space         take hold, let go\nx, Esc        stop the controller\nCtrl-C        end'

    def __init__(self, node: Node):
        """Raises ValueError without a terminal."""
        self._terminal = Terminal()
        self._stop = node.create_client(Trigger, 'controller/stop')

    def read(self, held: bool) -> tuple[bool, str, str]:
        """held as the keys since the last call change it; the other keys; and why the arm cannot go on being driven, or ''."""
        keys, others = self._terminal.read(), ''
        if keys is None:
            return held, '', 'the terminal is gone'
        for key in keys:
            if key in 'x\x1b':
                self._stop.call_async(Trigger.Request())
                return False, '', 'stopping the controller'
            if key == ' ':
                held = not held
            else:
                others += key
        return held, others, ''


class Joystick:
    """A gamepad or pedal on `joy`."""

    def __init__(self, node: Node, deadman: Deadman):
        self.node, self.deadman = node, deadman
        self._heard = -np.inf
        node.create_subscription(Joy, 'joy', self._on_joy, qos_profile_sensor_data)

    def _on_joy(self, message: Joy) -> None:
        now = time.monotonic()
        try:
            self.deadman.read(now, message.axes, message.buttons)
        except ValueError as error:
            self.node.get_logger().warning(f'joy ignored: {error}', throttle_duration_sec=5.0)
            return
        self._heard = now

    def switch(self, now: float) -> tuple[bool, str]:
        """Whether the dead-man switch is held, and why that cannot be relied on, or ''."""
        silent = now - self._heard > JOY_SILENT_S
        return self.deadman.held, f'{self.node.resolve_topic_name("joy")} is silent' if silent else ''


class LeaderSource:
    """Follows the joints of a leader arm, on `leader/joint_states`. Without a joystick, hold is taken by key or service."""

    def __init__(self, node: Node, contract: Contract):
        """Raises ValueError for wrong parameters."""
        button = declare(node, 'deadman_button', -1, 'button on joy that is held while driving, of a gamepad or pedal; '
                         '-1: space in the terminal, or the service ~/engage', -1, 255)
        mapping = declare(node, 'mapping', 'relative', "relative: the leader's pose when taking hold corresponds to the arm's; "
                          'absolute: both have the same joint positions, and must be near each other when taking hold')
        if mapping not in ('relative', 'absolute'):
            raise ValueError(f'mapping is {mapping!r}, valid: relative, absolute')
        self.node = node
        self.follow = Follow(contract, mapping == 'relative')
        self.stream = _joint_positions('leader/joint_states', contract)
        self.pose: np.ndarray | None = None
        self._heard, self._fault = -np.inf, ''
        self.held = False
        self.joystick = self.keyboard = None
        node.create_subscription(JointState, self.stream.topic, self._on_pose, qos_profile_sensor_data)
        if button >= 0:
            self.joystick = Joystick(node, Deadman(button))
            return
        node.create_service(SetBool, '~/engage', self._on_engage)
        if sys.stdin.isatty():
            self.keyboard = Keyboard(node)
            print(Keyboard.HELP)
        else:
            node.get_logger().info('no terminal and no deadman_button: take hold and let go with the service ~/engage')

    def _on_pose(self, message: JointState) -> None:
        try:
            self.pose = decode(message, self.stream)
        except DecodeError as error:
            self._fault = f': {error}'
            return
        self._heard, self._fault = time.monotonic(), ''

    def _on_engage(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self.held = request.data
        response.success, response.message = True, 'taking hold; watch controller/status' if request.data else 'letting go'
        return response

    def switch(self, now: float) -> tuple[bool, str]:
        """Whether the dead-man switch is held, and why it or the leader cannot be relied on, or ''."""
        lost = ''
        if self.joystick:
            self.held, lost = self.joystick.switch(now)
        elif self.keyboard:
            self.held, _, lost = self.keyboard.read(self.held)
        if not lost and now - self._heard > LEADER_SILENT_S:
            lost = f'{self.node.resolve_topic_name(self.stream.topic)} is silent{self._fault}'
        return self.held, lost

    def begin(self, command: np.ndarray) -> None:
        """Take hold of an arm that is commanded to be here, shape (D,)."""
        self.follow.begin(command, self.pose)
        self._target = command

    def target(self, _now: float, _command: np.ndarray) -> np.ndarray:
        """Where the arm shall be, shape (D,); it stays there from the moment the button is let go."""
        if self.joystick is None or self.joystick.deadman.pressed:
            self._target = self.follow.target(self.pose)
        return self._target


class GamepadSource:
    """Moves the end effector, or one joint after the other, at the velocity that sticks and buttons ask for."""

    def __init__(self, node: Node, contract: Contract):
        """Raises ValueError for wrong parameters."""
        # Indices as joy_node and joy_linux_node number an Xbox pad.
        space = declare(node, 'space', 'cartesian', 'cartesian: sticks move the end effector; joint: one of them a chosen joint')
        deadman = declare(node, 'deadman_button', 4, 'button held while driving: LB; with game_controller_node 9', 0, 255)
        axes = declare(node, 'axes', [1, 0, 4, 6, 7, 3], 'cartesian: axes that move along x, y, z and turn about x, y, z, -1 for '
                       'none: sticks and cross; with game_controller_node [1, 0, 3, -1, -1, 2]')
        signs = declare(node, 'axis_signs', [1.0, 1.0, 1.0, -1.0, 1.0, 1.0], 'of these axes; negative turns one round')
        joint_axis = declare(node, 'joint_axis', 1, 'joint: axis that moves the chosen joint: left stick', -1, 255)
        joint_buttons = declare(node, 'joint_buttons', [2, 3], 'joint: buttons that choose the joint before and after: X, Y')
        gripper_buttons = declare(node, 'gripper_buttons', [0, 1], 'buttons that close and open the gripper: A, B')
        dead_zone = declare(node, 'dead_zone', 0.1, 'deflection of an axis that counts as none', 0.0, 0.9)
        speeds = _declare_speeds(node, Speeds(linear=0.1, angular=0.6, joint=0.6))
        gripper = _declare_gripper(node, contract)
        layouts = {'cartesian': {'axes': tuple(axes), 'signs': tuple(signs)},
                   'joint': {'joint_axis': joint_axis, 'joint_buttons': tuple(joint_buttons)}}
        if space not in layouts:
            raise ValueError(f'space is {space!r}, valid: {", ".join(layouts)}')
        if space == 'cartesian' and not contract.end_effector:
            raise ContractError(f'{contract.robot}: the contract names no end_effector to move; valid: space:=joint')
        layout = Layout(**layouts[space], gripper_buttons=tuple(gripper_buttons), dead_zone=dead_zone)
        self.gamepad = Gamepad(contract, deadman, layout, speeds, gripper, _choice(node, contract))
        self.jog = Jog(contract, Kinematics(contract) if space == 'cartesian' else None)
        self.switch = Joystick(node, self.gamepad).switch
        self.begin = self.jog.begin

    def target(self, _now: float, command: np.ndarray) -> np.ndarray:
        """Where the arm shall be, shape (D,)."""
        return self.jog.target(self.gamepad.motion, command)


class KeyboardSource:
    """Moves the end effector or a joint while a key repeats."""

    def __init__(self, node: Node, contract: Contract):
        """Raises ValueError for wrong parameters, or without a terminal."""
        delay = declare(node, 'repeat_delay', 0.6, 'a key that was just pressed moves the arm for so long, until it repeats [s]: '
                        "the keyboard's delay and a little", 0.05, 2.0)
        speeds = _declare_speeds(node, Speeds(linear=0.05, angular=0.3, joint=0.3))
        gripper = _declare_gripper(node, contract)
        cartesian = bool(contract.end_effector)
        self.held = False
        self.keys = Keys(contract, speeds, gripper, _choice(node, contract), cartesian, delay)
        self.jog = Jog(contract, Kinematics(contract) if cartesian else None)
        self.begin = self.jog.begin
        self.keyboard = Keyboard(node)
        print(f'{Keyboard.HELP}\n{self.keys.help()}')

    def switch(self, now: float) -> tuple[bool, str]:
        """Whether the human has hold of the arm, and why that cannot go on, or ''."""
        self.held, keys, lost = self.keyboard.read(self.held)
        for key in keys:
            self.keys.press(now, key)
        return self.held, lost

    def target(self, now: float, command: np.ndarray) -> np.ndarray:
        """Where the arm shall be, shape (D,)."""
        return self.jog.target(self.keys.motion(now), command)


SOURCES = {'leader': LeaderSource, 'gamepad': GamepadSource, 'keyboard': KeyboardSource}


class TeleopNode(Node):
    """One human, one source, one arm."""

    def __init__(self):
        """Raises ContractError, DescriptionError or ValueError for what cannot be driven like this."""
        super().__init__('teleop')
        path = declare(self, 'contract', '', "the robot's contract, a YAML file")
        source = declare(self, 'source', 'gamepad', f'what the human has in hand: {", ".join(SOURCES)}')
        if source not in SOURCES:
            raise ValueError(f'source is {source!r}, valid: {", ".join(SOURCES)}')
        contract = load_contract(path)
        self.joints = contract.action.joints
        self.clutch = Clutch()
        self.source = SOURCES[source](self, contract)
        self.commands = _joint_positions(contract.action.topic, contract)
        self.targets = self.create_publisher(JointState, 'teleop', QoSProfile(depth=1))
        self.create_subscription(ControllerStatus, 'controller/status', self._on_status, STATUS_QOS)
        self.create_subscription(JointState, contract.action.topic, self._on_command, qos_profile_sensor_data)
        # Steady: a step of the wall clock, or a /clock that stalls, must not keep a human from letting go.
        self.create_timer(1.0 / contract.control_rate, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.get_logger().info(f'{contract.robot}: ready, by {source}')

    def _on_status(self, message: ControllerStatus) -> None:
        self.clutch.status(time.monotonic(), Mode(message.mode), message.reason)

    def _on_command(self, message: JointState) -> None:
        try:
            self.clutch.commanded(time.monotonic(), decode(message, self.commands))
        except DecodeError as error:
            self.get_logger().warning(f'command ignored: {error}', throttle_duration_sec=5.0)

    def _tick(self) -> None:
        now = time.monotonic()
        act = self.clutch.tick(now, *self.source.switch(now))
        if act == Act.BEGIN:
            self.source.begin(self.clutch.command)
        if act in (Act.BEGIN, Act.DRIVE):
            self._publish(self.joints, self.source.target(now, self.clutch.command))
        elif act == Act.RELEASE:
            self._publish([], [])
        while self.clutch.remarks:
            self.get_logger().info(self.clutch.remarks.pop(0))

    def _publish(self, names, positions) -> None:
        message = JointState(name=names, position=positions)
        message.header.stamp = self.get_clock().now().to_msg()
        self.targets.publish(message)


def _joint_positions(topic: str, contract: Contract) -> Stream:
    """The action's joints on a topic, matched by name."""
    return Stream(topic, 'sensor_msgs/msg/JointState', contract.control_rate, LEADER_SILENT_S, field='position',
                  names=contract.action.joints)


def _choice(node: Node, contract: Contract) -> Choice:
    """The first joint, until another is chosen, which is said."""
    return Choice(contract, lambda name: node.get_logger().info(f'joint {name}'))


def _declare_speeds(node: Node, default: Speeds) -> Speeds:
    """What sticks and keys move at."""
    return Speeds(declare(node, 'linear_speed', default.linear, 'of the end effector and of sliding joints [m/s]', 0.001, 2.0),
                  declare(node, 'angular_speed', default.angular, 'of the end effector [rad/s]', 0.01, 10.0),
                  declare(node, 'joint_speed', default.joint, 'of turning joints [rad/s]', 0.01, 10.0))


def _declare_gripper(node: Node, contract: Contract) -> int | None:
    """The gripper's place in the action. Raises ValueError for an unknown joint."""
    return find_gripper(contract, declare(node, 'gripper', '', "the gripper's joint; empty: the one with 'gripper' in its name"))


def main() -> None:
    """Entry point."""
    run(TeleopNode)


if __name__ == '__main__':
    main()
