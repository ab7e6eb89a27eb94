"""Teleoperation without ROS: when a human is in charge, and what a leader arm, a gamepad or keys ask of the arm.

Times are seconds of one monotonic clock.
"""
from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from il_policies.contract import Contract
from il_runtime.core.mode import Mode

SILENT_S = 0.5
"""Controller status and command are this old at most: they come at 10 Hz and at the control rate [s]."""
PAUSE_S = 0.15
"""Whoever publishes nothing for longer has lost control: the controller's own time-out [s]."""
PATIENCE_S = 1.0
"""How long a human who took hold waits for a stop to end, or for the controller to follow, before being told [s]."""
RELEASES = 3
"""A release is published so many times: who misses it holds still until armed again."""
CONFIRM_S = 0.03
"""A dead-man button is let go when the gamepad says so again after this long: one that is unplugged, or whose battery dies,
lets go of all its buttons and then falls silent [s]."""
KEY_REPEAT_S = 0.15
"""A key that repeats is held until it has not come for so long [s]."""


class Act(Enum):
    """What to publish now."""

    NOTHING = 'nothing'
    BEGIN = 'the first target'
    DRIVE = 'the next target'
    RELEASE = 'a release'


class Grip(Enum):
    """How far a human's hold on the arm has come."""

    OPEN = 'the dead-man switch is not held'
    WAITING = 'held, but the controller cannot follow yet'
    DRIVING = 'held, and targets are published'
    LOST = 'held, but something broke: it must be let go first'


class Clutch:
    """The dead-man switch: targets while it is held and all is well, a release when it is let go, silence when things break.

    Silence makes the controller stop and hold; only a hand that lets go gives the arm back to the policy.
    """

    def __init__(self):
        self.remarks: list[str] = []
        """What to tell the human; whoever says it takes it out."""
        self.command: np.ndarray | None = None
        """The newest command of the controller, shape (D,) in action order."""
        self._commanded = self._heard = self._ticked = self._since = -np.inf
        self._mode, self._reason = Mode.INACTIVE, ''
        self._grip = Grip.OPEN
        self._held = True  # what is held from the start was not pressed
        self._published = self._followed = self._told = False
        self._releases = 0

    def status(self, now: float, mode: Mode, reason: str) -> None:
        """The controller's status came."""
        self._heard, self._mode, self._reason = now, mode, reason

    def commanded(self, now: float, positions: np.ndarray) -> None:
        """The controller's command came, shape (D,) in action order."""
        self._commanded, self.command = now, positions

    def tick(self, now: float, held: bool, lost: str = '') -> Act:
        """Call at the control rate. held: the dead-man switch; lost: why switch or motion cannot be relied on, or ''."""
        pause, self._ticked = now - self._ticked, now
        pressed, self._held = held and not self._held, held
        if not held:
            return self._let_go(lost)
        if pressed:
            self._grip, self._since, self._releases = Grip.WAITING, now, 0
        if self._grip == Grip.WAITING:
            return self._wait(now, lost or self._unready(now))
        if self._grip == Grip.DRIVING:
            paused = f'teleoperation was paused for {pause:.2f} s' if pause > PAUSE_S else ''
            return self._drive(now, lost or paused or self._unready(now))
        return Act.NOTHING

    def _let_go(self, lost: str) -> Act:
        if self._grip != Grip.OPEN:
            others = self._grip == Grip.LOST and self._mode == Mode.TELEOP  # somebody else took over meanwhile
            if lost:
                self.remarks.append(lost)
            elif self._published and not others:
                self.remarks.append('handed back')
                self._releases = RELEASES
            self._grip, self._published = Grip.OPEN, False
        if not self._releases:
            return Act.NOTHING
        self._releases -= 1
        return Act.RELEASE

    def _wait(self, now: float, problem: str) -> Act:
        if not problem and self._mode not in (Mode.HOLD, Mode.POLICY):
            if now - self._since < PATIENCE_S:
                return Act.NOTHING  # a stop, perhaps that of the last release, is about to end
            problem = f'the controller is busy: {self._mode.name}, {self._reason}'
        if problem:
            return self._lose(problem)
        self._grip, self._since, self._published = Grip.DRIVING, now, True
        self._followed = self._told = False
        return Act.BEGIN

    def _drive(self, now: float, problem: str) -> Act:
        in_charge = self._mode in (Mode.TELEOP, Mode.APPROACH)
        if self._followed and not in_charge:
            problem = problem or f'the controller went to {self._mode.name}: {self._reason}'
        if problem:
            return self._lose(problem)
        if in_charge and not self._followed:
            self.remarks.append('in charge')
        self._followed |= in_charge
        if not self._followed and not self._told and now - self._since > PATIENCE_S:
            self.remarks.append(f'the controller does not follow: {self._mode.name}, {self._reason}')
            self._told = True
        return Act.DRIVE

    def _lose(self, problem: str) -> Act:
        self._grip = Grip.LOST
        self.remarks.append(f'{problem}; let go, then take hold again')
        return Act.NOTHING

    def _unready(self, now: float) -> str:
        """Why the controller cannot follow anybody, or ''."""
        if now - self._heard > SILENT_S:
            return 'no controller: nothing comes on controller/status'
        if self._mode in (Mode.INACTIVE, Mode.FAULT):
            how = 'reset_fault and arm' if self._mode == Mode.FAULT else 'arm'
            return f'the controller is not armed: {self._mode.name}, {self._reason} (services: {how})'
        if now - self._commanded > SILENT_S:
            return 'the controller publishes no command'
        return ''


class Follow:
    """Targets from a leader arm with the joints of the follower."""

    def __init__(self, contract: Contract, relative: bool):
        """relative: the leader's pose when taking hold corresponds to the follower's; else both have the same positions."""
        self.low, self.high = np.array([joint.position for joint in contract.action_joints]).T
        self.relative = relative

    def begin(self, command: np.ndarray, leader: np.ndarray) -> None:
        """The human takes hold. Positions in action order, shape (D,)."""
        self._offset = command - leader if self.relative else np.zeros_like(leader)

    def target(self, leader: np.ndarray) -> np.ndarray:
        """Where the follower shall be, within its position limits. Shape (D,)."""
        return np.clip(leader + self._offset, self.low, self.high)


@dataclass(frozen=True)
class Motion:
    """What a human asks of the arm now."""

    twist: np.ndarray
    """Velocity [m/s] and angular velocity [rad/s] of the end effector along the base's axes. Shape (6,)."""
    joints: np.ndarray
    """Joint velocities on top of it [rad/s or m/s]. Shape (D,)."""


@dataclass(frozen=True)
class Speeds:
    """How fast full deflection of a stick, or a key, moves."""

    linear: float
    """[m/s], also of sliding joints."""
    angular: float
    """[rad/s], of the end effector."""
    joint: float
    """[rad/s], of turning joints."""

    @property
    def twist(self) -> np.ndarray:
        """Of the six directions. Shape (6,)."""
        return np.array([self.linear] * 3 + [self.angular] * 3)

    def joints(self, contract: Contract) -> np.ndarray:
        """Of the action's joints. Shape (D,)."""
        return np.array([self.linear if joint.unit == 'm' else self.joint for joint in contract.action_joints])


class Choice:
    """The joint that is moved on its own, chosen one step at a time."""

    def __init__(self, contract: Contract, announce):
        """announce: called with the name of a joint when it is chosen."""
        self._names, self._announce = contract.action.joints, announce
        self.index = 0
        """Its place in the action."""

    def step(self, by: int) -> None:
        """Choose the joint so many places further; 0 changes nothing."""
        if by:
            self.index = (self.index + by) % len(self._names)
            self._announce(self._names[self.index])


class Jog:
    """Targets that move at a velocity, from the command on which the human took hold, and never run away from the command."""

    def __init__(self, contract: Contract, kinematics=None):
        """kinematics: what turns twists into joint motion, an il_policies.kinematics.Kinematics; None: joints only."""
        self.kinematics = kinematics
        self.period = 1.0 / contract.control_rate
        self.low, self.high = np.array([joint.position for joint in contract.action_joints]).T
        self.leash = 0.5 * np.array([joint.first_command_tolerance for joint in contract.action_joints])

    def begin(self, command: np.ndarray) -> None:
        """The human takes hold of an arm that is commanded to be here, shape (D,)."""
        self._target = np.clip(command, self.low, self.high)

    def target(self, motion: Motion, command: np.ndarray) -> np.ndarray:
        """The target one control period later, shape (D,), given the newest command, shape (D,).

        It leads the command by at most half the first-command tolerance: whatever holds the arm back, the target waits.
        """
        target = self._target
        if self.kinematics is not None and motion.twist.any():
            target = self.kinematics.jog(target, motion.twist, self.period)
        target = np.clip(target + motion.joints * self.period, self.low, self.high)
        lead = target - command
        self._target = command + lead / max(1.0, np.max(np.abs(lead) / self.leash))
        return self._target


def find_gripper(contract: Contract, name: str) -> int | None:
    """Index in the action of the joint of this name; of the only one with 'gripper' in its name if none is given.

    Raises ValueError for an unknown name.
    """
    if name:
        if name not in contract.action.joints:
            raise ValueError(f'gripper is {name!r}; joints of the action: {", ".join(contract.action.joints)}')
        return contract.action.joints.index(name)
    found = [i for i, joint in enumerate(contract.action.joints) if 'gripper' in joint]
    return found[0] if len(found) == 1 else None


class Deadman:
    """The dead-man switch on a gamepad or pedal."""

    def __init__(self, button: int):
        """button: its index in the buttons of sensor_msgs/Joy. Raises ValueError below 0."""
        if button < 0:
            raise ValueError(f'the dead-man switch is button {button}, must be at least 0')
        self.button = button
        self.pressed = False
        """The button."""
        self.held = False
        """The switch: let go only when the gamepad has said so again, see CONFIRM_S."""
        self._up_since = -np.inf

    def read(self, now: float, axes, buttons) -> None:
        """Take a state of axes, -1 to 1, and buttons, 0 or 1. Raises ValueError if it is not of such a gamepad."""
        if len(buttons) <= self.button:
            raise ValueError(f'there are {len(buttons)} buttons, the dead-man switch is button {self.button}')
        pressed = bool(buttons[self.button])
        if self.pressed and not pressed:
            self._up_since = now
        self.pressed = pressed
        self.held = pressed or now - self._up_since < CONFIRM_S


@dataclass(frozen=True)
class Layout:
    """Where things are on a gamepad: indices into axes and buttons of sensor_msgs/Joy, -1 for none."""

    axes: tuple[int, ...] = (-1,) * 6
    """Axes for motion along x, y, z and about x, y, z."""
    signs: tuple[float, ...] = (1.0,) * 6
    """Of these axes; a negative one turns its axis round."""
    joint_axis: int = -1
    """Axis that moves the chosen joint."""
    joint_buttons: tuple[int, ...] = (-1, -1)
    """Choose the previous and the next joint."""
    gripper_buttons: tuple[int, ...] = (-1, -1)
    """Close and open the gripper."""
    dead_zone: float = 0.1
    """Deflection that counts as none, 0 to 1."""

    def __post_init__(self):
        for name, length in (('axes', 6), ('signs', 6), ('joint_buttons', 2), ('gripper_buttons', 2)):
            if len(getattr(self, name)) != length:
                raise ValueError(f'{name} is {list(getattr(self, name))}, must have {length} entries')


class Gamepad(Deadman):
    """What a gamepad asks for."""

    def __init__(self, contract: Contract, button: int, layout: Layout, speeds: Speeds, gripper: int | None, choice: Choice):
        """button: the dead-man switch; gripper: its place in the action, if it has one."""
        super().__init__(button)
        self.layout, self.gripper, self.choice = layout, gripper, choice
        self.twist_speeds, self.joint_speeds = speeds.twist, speeds.joints(contract)
        self.motion = Motion(np.zeros(6), np.zeros_like(self.joint_speeds))
        """What is asked for; nothing while the dead-man button is not pressed."""
        self._stepped = 0

    def read(self, now: float, axes, buttons) -> None:
        """As that of Deadman, and take what sticks and buttons ask for."""
        layout = self.layout
        axis, button = max(*layout.axes, layout.joint_axis), max(*layout.joint_buttons, *layout.gripper_buttons)
        if len(axes) <= axis or len(buttons) <= button or not np.isfinite(axes).all():
            raise ValueError(f'axes are {list(axes)} and there are {len(buttons)} buttons; axis {axis} and button {button} are '
                             'wanted, all finite')
        super().read(now, axes, buttons)

        def deflection(axis: int) -> float:
            value = np.clip(axes[axis], -1.0, 1.0) if axis >= 0 else 0.0
            return np.sign(value) * max(abs(value) - layout.dead_zone, 0.0) / (1.0 - layout.dead_zone)

        def direction(pair: tuple[int, ...]) -> int:  # -1, 0 or +1
            minus, plus = (int(button >= 0 and buttons[button] > 0) for button in pair)
            return plus - minus

        stepped, self._stepped = self._stepped, direction(layout.joint_buttons)
        if self._stepped != stepped:
            self.choice.step(self._stepped)
        twist = np.sign(layout.signs) * [deflection(axis) for axis in layout.axes]
        joints = np.zeros_like(self.joint_speeds)
        joints[self.choice.index] += deflection(layout.joint_axis)
        if self.gripper is not None:
            joints[self.gripper] += direction(layout.gripper_buttons)
        self.motion = Motion(self.pressed * twist * self.twist_speeds, self.pressed * joints * self.joint_speeds)


class Keys:
    """What a keyboard asks for through a terminal, which tells that a key goes down or repeats, never that it goes up."""

    TWIST = {'w': (0, 1), 's': (0, -1), 'a': (1, 1), 'd': (1, -1), 'r': (2, 1), 'f': (2, -1),
             'l': (3, 1), 'j': (3, -1), 'i': (4, 1), 'k': (4, -1), 'q': (5, 1), 'e': (5, -1)}
    JOINT = {'+': 1, '=': 1, '-': -1}
    CHOOSE = {',': -1, '.': 1}
    GRIPPER = {'o': 1, 'c': -1}

    def __init__(self, contract: Contract, speeds: Speeds, gripper: int | None, choice: Choice, cartesian: bool,
                 repeat_delay: float):
        """No key is held at first.

        gripper: its place in the action, if it has one; cartesian: whether there are keys that move the end effector;
        repeat_delay: a key that was just pressed counts as held for so long [s], until it begins to repeat.
        """
        self.gripper, self.choice, self.repeat_delay = gripper, choice, repeat_delay
        self.twist_speeds, self.joint_speeds = speeds.twist, speeds.joints(contract)
        self.moves = {*self.JOINT, *(self.TWIST if cartesian else ()), *(self.GRIPPER if gripper is not None else ())}
        self._key, self._pressed, self._until = '', -np.inf, -np.inf

    def press(self, now: float, key: str) -> None:
        """A key came. One that moves nothing makes the arm stand still."""
        self.choice.step(self.CHOOSE.get(key, 0))
        repeats = key == self._key and now - self._pressed < self.repeat_delay
        self._key, self._pressed = key if key in self.moves else '', now
        self._until = now + (KEY_REPEAT_S if repeats else self.repeat_delay)

    def motion(self, now: float) -> Motion:
        """What the key that is held asks for."""
        twist, joints = np.zeros(6), np.zeros_like(self.joint_speeds)
        key = self._key if now < self._until else ''
        if key in self.TWIST:
            axis, sign = self.TWIST[key]
            twist[axis] = sign * self.twist_speeds[axis]
        elif key in self.JOINT:
            joints[self.choice.index] = self.JOINT[key] * self.joint_speeds[self.choice.index]
        elif key in self.GRIPPER:
            joints[self.gripper] = self.GRIPPER[key] * self.joint_speeds[self.gripper]
        return Motion(twist, joints)

    def help(self) -> str:
        """The keys that move, a line each."""
        lines = []
        if 'w' in self.moves:
            lines += ['w/s a/d r/f   along x, y, z of the base', 'l/j i/k q/e   about x, y, z of the base']
        lines += [', .           choose the joint before, after', '+/-           move it']
        if self.gripper is not None:
            lines += ['o/c           open, close the gripper']
        return '\n'.join(lines)
