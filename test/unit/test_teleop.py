from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from il_policies.contract import load_contract
from il_runtime.core.mode import Mode
from il_runtime.core.teleop import (
    PATIENCE_S,
    RELEASES,
    Act,
    Choice,
    Clutch,
    Deadman,
    Follow,
    Gamepad,
    Jog,
    Keys,
    Layout,
    Motion,
    Speeds,
    find_gripper,
)

DT = 0.02
SPEEDS = Speeds(linear=0.1, angular=0.5, joint=0.4)
STILL = Motion(np.zeros(6), np.zeros(6))


@pytest.fixture
def contract(root):
    return load_contract(root / 'config/robots/so101.yaml')


class Human:
    """A clutch at 50 Hz with a controller that is well unless told otherwise."""

    def __init__(self, mode: Mode = Mode.HOLD):
        self.clutch, self.mode, self.reason, self.alive, self.now = Clutch(), mode, 'armed', True, 100.0
        self.do(False)

    def do(self, held: bool, seconds: float = DT, lost: str = '') -> list[Act]:
        """What happens while the switch is held or not, and the controller follows whoever publishes."""
        acts = []
        for _ in range(round(seconds / DT)):
            self.now += DT
            if self.alive:
                self.clutch.status(self.now, self.mode, self.reason)
                self.clutch.commanded(self.now, np.zeros(6))
            acts.append(self.clutch.tick(self.now, held, lost))
            if acts[-1] in (Act.BEGIN, Act.DRIVE) and self.mode in (Mode.HOLD, Mode.POLICY) and self.reason == 'armed':
                self.mode = Mode.TELEOP
            elif acts[-1] == Act.RELEASE:
                self.mode = Mode.HOLD
        return acts

    def told(self) -> str:
        remarks, self.clutch.remarks = self.clutch.remarks, []
        return '\n'.join(remarks)


def test_targets_while_held_and_a_release_when_let_go():
    human = Human(Mode.POLICY)
    assert human.do(False, 0.1) == [Act.NOTHING] * 5
    assert human.do(True, 0.1) == [Act.BEGIN] + [Act.DRIVE] * 4
    assert human.do(False, 0.1) == [Act.RELEASE] * RELEASES + [Act.NOTHING] * (5 - RELEASES)
    assert human.told() == 'in charge\nhanded back'
    assert human.do(True) == [Act.BEGIN]


def test_a_switch_that_is_held_from_the_start_was_not_pressed():
    clutch = Clutch()
    clutch.status(0.0, Mode.HOLD, '')
    clutch.commanded(0.0, np.zeros(6))
    assert [clutch.tick(i * DT, True) for i in range(5)] == [Act.NOTHING] * 5


@pytest.mark.parametrize(('mode', 'said'), [(Mode.INACTIVE, 'services: arm'), (Mode.FAULT, 'reset_fault and arm')])
def test_nobody_drives_a_controller_that_is_not_armed_and_that_is_said_once(mode, said):
    human = Human(mode)
    assert human.do(True, 1.0) == [Act.NOTHING] * 50
    assert said in (told := human.told()) and told.count('not armed') == 1
    human.mode = Mode.HOLD
    assert human.do(True, 0.1) == [Act.NOTHING] * 5  # arming moves nothing: take hold again
    assert human.do(False, 0.1) == [Act.NOTHING] * 5  # nor is anything released that was not held
    assert human.do(True) == [Act.BEGIN]


def test_taking_hold_while_a_stop_ends_waits_for_it():
    human = Human()
    human.do(True, 0.1)
    human.do(False, 0.02)
    human.mode, human.reason = Mode.STOPPING, 'released by the human'
    assert human.do(True, 0.2) == [Act.NOTHING] * 10  # and the release is not repeated under the new hold
    human.mode, human.reason = Mode.HOLD, 'armed'
    assert human.do(True, 0.04) == [Act.BEGIN, Act.DRIVE]


def test_where_another_human_is_in_charge_nobody_takes_over():
    human = Human(Mode.TELEOP)
    assert set(human.do(True, PATIENCE_S + 0.1)) == {Act.NOTHING}
    assert 'busy: TELEOP' in human.told()
    assert set(human.do(False, 0.2)) == {Act.NOTHING}  # above all, nothing of theirs is released


@pytest.mark.parametrize('mode', [Mode.STOPPING, Mode.HOLD, Mode.FAULT, Mode.INACTIVE, Mode.POLICY])
def test_when_the_controller_stops_following_nothing_more_is_sent(mode):
    human = Human()
    human.do(True, 0.2)
    human.mode, human.reason = mode, 'somebody said so'
    assert set(human.do(True, 0.5)) == {Act.NOTHING}
    told = human.told()
    assert mode.name in told and 'somebody said so' in told and told.endswith('; let go, then take hold again')
    assert human.do(False)[0] == Act.RELEASE  # the hand that was on it lets go, whatever happened meanwhile


def test_somebody_elses_hold_is_not_released_by_one_that_was_lost():
    human = Human()
    human.do(True, 0.2)
    human.do(True, 0.2, 'joy is silent')
    assert set(human.do(False, 0.2)) == {Act.NOTHING}


@pytest.mark.parametrize('before', [0.0, 0.2])
def test_lost_inputs_are_silence_never_a_release(before):
    human = Human()
    human.do(True, before)
    assert set(human.do(True, 0.2, 'joy is silent')) == {Act.NOTHING}
    assert human.told().count('joy is silent') == 1
    human.mode = Mode.HOLD
    assert set(human.do(True, 0.2)) == {Act.NOTHING}  # back again, but the switch was not let go
    assert set(human.do(False, 0.2, 'joy is silent')) == {Act.NOTHING}
    assert human.do(True) == [Act.BEGIN]


def test_a_dead_controller_and_a_paused_process_lose_the_hold():
    human = Human()
    human.do(True, 0.2)
    human.alive = False
    acts = human.do(True, 1.0)
    assert acts[:20] == [Act.DRIVE] * 20 and acts[-1] == Act.NOTHING and 'controller/status' in human.told()

    human = Human()
    human.do(True, 0.2)
    human.now += 0.3
    assert human.do(True) == [Act.NOTHING] and 'paused for 0.32 s' in human.told()


def test_a_first_command_that_is_refused_goes_on_until_it_is_near_and_the_reason_is_said_once():
    human = Human()
    human.reason = 'first command refused: elbow is 0.9 off'
    assert human.do(True, 3.0) == [Act.BEGIN] + [Act.DRIVE] * 149
    assert human.told().count('elbow is 0.9 off') == 1
    human.reason = 'armed'
    human.do(True, 0.1)
    assert human.told() == 'in charge'


def test_without_commands_there_is_nothing_to_begin_from():
    clutch = Clutch()
    clutch.tick(0.0, False)
    clutch.status(0.0, Mode.HOLD, '')
    assert clutch.tick(DT, True) == Act.NOTHING and 'no command' in clutch.remarks[0]


def test_a_leader_is_followed_from_where_the_arm_is_or_absolutely(contract):
    command, leader = np.array([0.5, 0.1, 0.0, 0.0, 0.0, 1.0]), np.array([-0.2, 0.3, 0.0, 0.0, 0.0, 0.0])
    moved = leader + [0.1, 0, 0, 0, 0, -9]
    relative, absolute = Follow(contract, relative=True), Follow(contract, relative=False)
    for follow in (relative, absolute):
        follow.begin(command, leader)
    np.testing.assert_allclose(relative.target(leader), command)
    np.testing.assert_allclose(relative.target(moved), [0.6, 0.1, 0, 0, 0, -0.17])  # within the limits
    np.testing.assert_allclose(absolute.target(moved), [-0.1, 0.3, 0, 0, 0, -0.17])


class Slides:
    """Kinematics of three crossed sliders: the truth is trivial."""

    def jog(self, q, twist, dt):
        return q + dt * np.concatenate([twist[:3], np.zeros(3)])


def test_jogging_moves_at_the_speed_that_is_asked_for(contract):
    jog, command = Jog(contract, Slides()), np.full(6, 0.2)
    jog.begin(command)
    asked = Motion(np.array([0.1, 0, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 0, -0.4]))
    for _ in range(50):
        command = jog.target(asked, command)
    np.testing.assert_allclose(command, [0.3, 0.2, 0.2, 0.2, 0.2, -0.17], atol=1e-9)  # the gripper's limit
    np.testing.assert_array_equal(jog.target(STILL, command), command)


def test_targets_wait_for_an_arm_that_is_held_back_and_keep_their_direction(contract):
    jog, command = Jog(contract, Slides()), np.zeros(6)
    jog.begin(command)
    for _ in range(500):
        target = jog.target(Motion(np.array([0.4, 0.2, 0, 0, 0, 0]), np.zeros(6)), command)
    np.testing.assert_allclose(target, [0.075, 0.0375, 0, 0, 0, 0])  # half the first-command tolerance
    jog.begin(np.full(6, 5.0))
    assert (jog.target(STILL, np.full(6, 5.0)) <= [joint.position[1] + 5 for joint in contract.action_joints]).all()


def test_the_gripper_is_found_or_named(contract):
    assert find_gripper(contract, '') == 5 and find_gripper(contract, 'wrist_roll') == 4
    with pytest.raises(ValueError, match="gripper is 'claw'; joints of the action: shoulder_pan"):
        find_gripper(contract, 'claw')
    def renamed(names):
        joints = tuple(replace(j, name=n) for j, n in zip(contract.joints, names))
        stream = replace(contract.observations['joint_positions'], names=names)
        return replace(contract, joints=joints, observations={'joint_positions': stream},
                       action=replace(contract.action, joints=names))
    assert find_gripper(renamed(tuple('abcdef')), '') is None
    assert find_gripper(renamed(('a', 'b', 'c', 'd', 'left_gripper', 'right_gripper')), '') is None


def test_letting_go_is_believed_when_it_is_said_again():
    deadman = Deadman(1)
    held = []
    for now, button in ((0.0, 0), (0.05, 1), (0.10, 1), (0.15, 0), (0.151, 0), (0.20, 0)):
        deadman.read(now, [], [0, button])
        held.append((deadman.pressed, deadman.held))
    assert held == [(False, False), (True, True), (True, True), (False, True), (False, True), (False, False)]
    with pytest.raises(ValueError, match='there are 1 buttons'):
        deadman.read(0.3, [], [0])
    with pytest.raises(ValueError, match='at least 0'):
        Deadman(-1)


@pytest.fixture
def pad(contract):
    """A gamepad in cartesian space; its announcements of joints are in pad.said."""
    said = []
    layout = Layout(axes=(1, 0, 4, 6, 7, 3), signs=(1, 1, 1, -1, 1, 1), gripper_buttons=(0, 1), dead_zone=0.2)
    pad = Gamepad(contract, 4, layout, SPEEDS, 5, Choice(contract, said.append))
    pad.said = said
    return pad


def joy(buttons=(4,), **axes) -> tuple[list[float], list[int]]:
    """Axes and buttons of an Xbox pad; x3=0.5 sets axis 3."""
    return [axes.get(f'x{i}', 0.0) for i in range(8)], [int(i in buttons) for i in range(11)]


def test_sticks_move_the_end_effector_beyond_the_dead_zone(pad):
    pad.read(0.0, *joy(x1=1.0, x0=-1.0, x4=0.6, x6=1.0, x3=-2.0))
    np.testing.assert_allclose(pad.motion.twist, [0.1, -0.1, 0.05, -0.5, 0, -0.5])
    pad.read(0.0, *joy((4, 1), x1=0.2, x0=-0.19))
    np.testing.assert_allclose(pad.motion.twist, 0)
    np.testing.assert_allclose(pad.motion.joints, [0, 0, 0, 0, 0, 0.4])
    pad.read(0.0, *joy((4, 0, 1)))
    np.testing.assert_allclose(pad.motion.joints, 0)
    pad.read(0.1, *joy((0,), x1=1.0))
    assert pad.held and not pad.motion.twist.any() and not pad.motion.joints.any()  # let go, not yet confirmed


def test_buttons_choose_a_joint_and_a_stick_moves_it(contract):
    said = []
    layout = Layout(joint_axis=1, joint_buttons=(2, 3))
    pad = Gamepad(contract, 4, layout, SPEEDS, None, Choice(contract, said.append))
    for buttons in ((4,), (4, 2), (4, 2), (4,), (4, 2), (4,), (4, 3), (4,)):
        pad.read(0.0, *joy(buttons, x1=-1.0))
    assert said == ['gripper', 'wrist_roll', 'gripper']
    np.testing.assert_allclose(pad.motion.joints, [0, 0, 0, 0, 0, -0.4])
    assert not pad.motion.twist.any()


@pytest.mark.parametrize(('axes', 'buttons'), [([], []), ([0.0] * 4, [1] * 11), ([0.0] * 8, [1] * 4), ([np.nan] * 8, [1] * 11)])
def test_states_of_another_gamepad_are_refused(pad, axes, buttons):
    pad.read(0.0, *joy(x1=1.0))
    with pytest.raises(ValueError, match='axis 7|button 4'):
        pad.read(0.1, axes, buttons)
    assert pad.held


def test_layouts_that_mean_nothing_are_refused():
    for wrong in ({'axes': (1, 2)}, {'signs': (1.0,) * 5}, {'joint_buttons': (1,)}, {'gripper_buttons': ()}):
        with pytest.raises(ValueError, match=f'{next(iter(wrong))} is'):
            Layout(**wrong)


@pytest.fixture
def keys(contract):
    said = []
    keys = Keys(contract, SPEEDS, 5, Choice(contract, said.append), cartesian=True, repeat_delay=0.6)
    keys.said = said
    return keys


def test_a_key_moves_through_the_repeat_delay_and_stops_soon_after_its_last_repeat(keys):
    keys.press(0.0, 'w')
    repeats = list(np.arange(0.5, 1.0, 0.033))
    moving = []
    for now in np.arange(0.0, 1.6, 0.01):
        while repeats and repeats[0] <= now:
            keys.press(repeats.pop(0), 'w')
        moving.append(keys.motion(now).twist[0] > 0)
    assert all(moving[:100]) and not any(moving[120:])


def test_a_tap_moves_for_the_delay_and_any_other_key_stops_it(keys):
    keys.press(0.0, 'a')
    np.testing.assert_allclose(keys.motion(0.59).twist, [0, 0.1, 0, 0, 0, 0])
    assert not keys.motion(0.61).twist.any()
    keys.press(1.0, 'e')
    np.testing.assert_allclose(keys.motion(1.1).twist, [0, 0, 0, 0, 0, -0.5])
    keys.press(1.1, 'h')
    assert not keys.motion(1.1).twist.any()


def test_keys_choose_and_move_joints_and_the_gripper(keys, contract):
    for key in ',..':
        keys.press(0.0, key)
    assert keys.said == ['gripper', 'shoulder_pan', 'shoulder_lift']
    keys.press(0.0, '-')
    np.testing.assert_allclose(keys.motion(0.1).joints, [0, -0.4, 0, 0, 0, 0])
    keys.press(1.0, 'o')
    np.testing.assert_allclose(keys.motion(1.1).joints, [0, 0, 0, 0, 0, 0.4])
    plain = Keys(contract, SPEEDS, None, Choice(contract, print), cartesian=False, repeat_delay=0.6)
    for key in 'wo':
        plain.press(0.0, key)
        assert not plain.motion(0.1).twist.any() and not plain.motion(0.1).joints.any()
    assert 'w/s' in keys.help() and 'o/c' in keys.help()
    assert 'w/s' not in plain.help() and 'o/c' not in plain.help()


def test_sliding_joints_move_in_metres(contract):
    joints = (replace(contract.joints[0], unit='m'), *contract.joints[1:])
    np.testing.assert_allclose(SPEEDS.joints(replace(contract, joints=joints)), [0.1] + [0.4] * 5)
