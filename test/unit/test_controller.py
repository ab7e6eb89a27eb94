from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from il_policies.contract import load_contract
from il_runtime.core.controller import Controller, Settings
from il_runtime.core.ensembling import Blending, Chunk, ChunkError, Ensembler
from il_runtime.core.mode import Mode

PERIOD = 0.02


class Arm:
    """A controller with an arm that follows perfectly, and the commands it sent."""

    def __init__(self, root, **settings):
        self.contract = load_contract(root / 'config/robots/so101.yaml')
        ensembler = Ensembler([j.tracking_tolerance for j in self.contract.action_joints])
        self.controller = Controller(self.contract, ensembler, settings=Settings(**settings))
        self.t, self.measured, self.sent = 0.0, np.zeros(6), []

    def run(self, seconds, joint_states=True, human=None):
        """human: a teleop command, or a function of time that gives one, sent before every tick."""
        for _ in range(round(seconds / PERIOD)):
            self.t += PERIOD
            if joint_states:
                self.controller.joint_state(self.t, self.measured, self.t)
            if human is not None:
                self.controller.teleop(self.t, human(self.t) if callable(human) else human, self.t)
            command = self.controller.tick(self.t)
            if command is not None:
                self.sent.append((self.t, command.copy()))
                self.measured = command.copy()

    def arm(self, approach=False):
        self.run(0.1)
        return self.controller.arm(self.t, approach)

    def follow(self, values=None, seconds=0.4):
        """Arm and follow a chunk for a while."""
        self.arm()
        self.controller.add_chunk(self.chunk(np.linspace(0, 1.5, 16) if values is None else values), self.t)
        self.run(seconds)
        assert self.mode == Mode.POLICY

    @property
    def mode(self):
        return self.controller.mode

    def assert_within_limits(self):
        velocity = np.diff([command for _, command in self.sent], axis=0) / PERIOD
        assert np.abs(velocity).max() <= 2.5 * (1 + 1e-9)
        assert np.abs(np.diff(velocity, axis=0) / PERIOD).max() <= 15 * (1 + 1e-6)

    def chunk(self, values, sequence=0, epoch=None, start=None, policy='one'):
        start = self.t if start is None else start
        positions = np.zeros((len(values), 6))
        positions[:, 0] = values
        return Chunk(start, 0.1, positions, self.controller.epoch if epoch is None else epoch, sequence, start,
                     policy)


@pytest.fixture
def arm(root):
    return Arm(root)


def test_nothing_moves_before_arming(arm):
    with pytest.raises(ChunkError):
        arm.controller.add_chunk(arm.chunk([0.0, 0.5]), arm.t)
    arm.run(1.0)
    assert arm.sent == [] and arm.controller.mode == Mode.INACTIVE


def test_arming_needs_joint_states(arm):
    assert arm.controller.arm(0.0) == (False, 'no fresh joint states')
    ok, message = arm.arm()
    assert ok and 'epoch 2' in message
    arm.controller.fault('told to')
    assert arm.controller.arm(arm.t)[0] is False


def test_follows_a_chunk_then_stops_within_its_horizon(arm):
    arm.arm()
    values = np.linspace(0, 1.2, 16)  # 0.8 rad/s until the very end: the stop must begin before
    arm.controller.add_chunk(arm.chunk(values), arm.t)
    end = arm.t + 1.5
    arm.run(0.8)
    assert arm.controller.mode == Mode.POLICY
    np.testing.assert_allclose(arm.sent[-1][1][0], 0.8 * 0.8, atol=1e-6)
    arm.run(2.0)
    assert arm.controller.mode == Mode.HOLD and arm.controller.reason == 'no fresh chunk'
    rest = [t for t, command in arm.sent if np.allclose(command, arm.sent[-1][1], atol=1e-12)][0]
    assert rest <= end + PERIOD, 'at rest when the horizon ends'
    velocity = np.diff([command for _, command in arm.sent], axis=0) / PERIOD
    assert np.abs(np.diff(velocity, axis=0) / PERIOD).max() <= 15 * (1 + 1e-6)


def test_a_planner_that_counts_anew_is_followed_after_the_stop(arm):
    arm.arm()
    arm.controller.add_chunk(arm.chunk(np.linspace(0, 0.5, 8), sequence=0), arm.t)
    arm.run(2.0)
    assert arm.controller.mode == Mode.HOLD and arm.controller.reason == 'no fresh chunk'
    here = arm.measured[0]
    arm.controller.add_chunk(arm.chunk(np.linspace(here, here + 0.3, 8), sequence=0), arm.t)
    arm.run(0.3)
    assert arm.controller.mode == Mode.POLICY and arm.measured[0] > here + 0.05


def test_first_command_far_from_the_pose_is_refused(arm):
    arm.arm()
    arm.controller.add_chunk(arm.chunk([0.4] * 16), arm.t)
    arm.run(0.5)
    assert arm.controller.mode == Mode.HOLD
    assert 'shoulder_pan is 0.400 off, tolerance 0.150' in arm.controller.reason
    assert all(np.array_equal(command, np.zeros(6)) for _, command in arm.sent)


def test_every_arming_is_a_new_epoch(arm):
    arm.arm()
    old = arm.chunk(np.linspace(0, 1, 16))
    arm.controller.stop()
    arm.run(0.1)
    assert arm.controller.mode == Mode.INACTIVE
    arm.arm()
    with pytest.raises(ChunkError, match='epoch'):
        arm.controller.add_chunk(old, arm.t)


def test_disarm_in_motion_is_a_bounded_stop(arm):
    arm.arm()
    arm.controller.add_chunk(arm.chunk(np.linspace(0, 1.5, 8)), arm.t)
    arm.run(0.4)
    assert arm.controller.mode == Mode.POLICY and arm.controller.gate.velocity[0] > 1.5
    arm.controller.stop('told to')
    assert arm.controller.mode == Mode.STOPPING
    arm.run(1.0)
    assert arm.controller.mode == Mode.INACTIVE and arm.controller.reason == 'told to'
    velocity = np.diff([command[0] for _, command in arm.sent]) / PERIOD
    assert np.abs(np.diff(velocity) / PERIOD).max() <= 15 * (1 + 1e-6) and abs(velocity[-1]) <= 15 * PERIOD


def test_silent_joint_states_latch_a_fault(arm):
    arm.arm()
    arm.controller.add_chunk(arm.chunk(np.linspace(0, 1, 16)), arm.t)
    arm.run(0.5)
    silent = arm.t
    fault = None
    while fault is None and arm.t < silent + 1:
        arm.run(PERIOD, joint_states=False)
        fault = arm.t if arm.controller.mode == Mode.FAULT else None
    assert fault - silent <= 0.1 + PERIOD + 1e-9
    arm.run(1.0)
    assert arm.controller.mode == Mode.FAULT, 'latched though the states are back'
    assert 'FAULT: joint states older' in arm.controller.arm(arm.t)[1]
    arm.controller.stop()
    arm.run(0.1)
    assert arm.mode == Mode.FAULT, 'nor is it left by stopping'
    assert arm.controller.reset_fault()[0] and arm.mode == Mode.INACTIVE and arm.arm()[0]


def test_an_arm_that_does_not_follow_faults(arm):
    arm.arm()
    for i in range(60):
        arm.t += PERIOD
        arm.controller.joint_state(arm.t, np.zeros(6), arm.t)  # stuck
        if i == 0:
            arm.controller.add_chunk(arm.chunk(np.linspace(0, 1.5, 16)), arm.t)
        arm.controller.tick(arm.t)
    assert arm.controller.mode == Mode.FAULT and 'shoulder_pan' in arm.controller.reason


def test_missed_ticks_are_made_up_for_and_long_pauses_are_not(arm):
    arm.arm()
    arm.controller.add_chunk(arm.chunk(np.linspace(0, 1.5, 32)), arm.t)
    arm.run(0.5)
    arm.t += 3 * PERIOD
    arm.controller.joint_state(arm.t, arm.measured, arm.t)
    before = arm.sent[-1][1][0]
    command = arm.controller.tick(arm.t, elapsed=3)
    speed = 1.5 / 3.1
    assert command[0] - before == pytest.approx(3 * PERIOD * speed, rel=1e-3)
    arm.t += 0.4
    arm.controller.joint_state(arm.t, command, arm.t)
    jumped = arm.controller.tick(arm.t, elapsed=20)
    np.testing.assert_array_equal(jumped, command)
    assert arm.mode == Mode.HOLD and arm.controller.reason == 'the loop was paused', 'the arm stands: it begins anew'
    arm.run(0.5)
    np.testing.assert_array_equal(arm.sent[-1][1], command)


@pytest.mark.parametrize('paused', [4, 5, 7, 9, 12, 50])
@pytest.mark.parametrize('seconds', [0.1, 0.4])
def test_after_a_pause_a_trajectory_controller_s_arm_goes_on_from_its_ramp(root, paused, seconds):
    arm = Arm(root)
    output = dataclasses.replace(arm.contract.action.outputs[0], type='trajectory_msgs/msg/JointTrajectory')
    contract = dataclasses.replace(arm.contract, action=dataclasses.replace(arm.contract.action, outputs=(output,)))
    arm.controller = Controller(contract, arm.controller.ensembler)
    arm.follow(np.linspace(0, 1.5, 8), seconds)
    times, positions, velocities = arm.controller.gate.run_out()

    def robot(t):  # that has heard nothing since: the second point is a period after the first
        i = min(max(int(np.searchsorted(times, t)) - 1, 0), len(times) - 2)
        h, s = times[i + 1] - times[i], min((t - times[i]) / (times[i + 1] - times[i]), 1.0)
        return ((2 * s**3 - 3 * s**2 + 1) * positions[i] + (s**3 - 2 * s**2 + s) * h * velocities[i]
                + (3 * s**2 - 2 * s**3) * positions[i + 1] + (s**3 - s**2) * h * velocities[i + 1])

    arm.t += paused * PERIOD
    arm.controller.joint_state(arm.t, robot(paused * PERIOD), arm.t)
    command = arm.controller.tick(arm.t, elapsed=paused)
    # Of where the robot will be when it gets there, this is no more than the braking of a tick off.
    np.testing.assert_allclose(command, robot((paused + 1) * PERIOD), atol=15 * PERIOD**2)
    path = [robot(paused * PERIOD), command]
    arm.measured = command.copy()
    for _ in range(20):
        arm.run(PERIOD)
        path.append(arm.sent[-1][1])
    velocity = np.diff(path, axis=0) / PERIOD
    assert np.abs(velocity).max() <= 2.5 * (1 + 1e-9)
    assert np.abs(np.diff(velocity, axis=0)).max() / PERIOD <= 15 * 1.05, 'but for the whole milliseconds of its ramp'
    assert arm.mode == Mode.HOLD


def test_sensors_are_fresh_by_their_stamps_and_a_clock_ahead_keeps_no_dead_one_alive(arm):
    arm.follow()
    for _ in range(20):  # a driver that repeats an old sample
        arm.t += PERIOD
        arm.controller.joint_state(arm.t - 0.11, arm.measured, arm.t)
        arm.controller.tick(arm.t)
    assert arm.mode == Mode.FAULT and arm.controller.reason == 'joint states older than 0.100 s'
    arm.controller.reset_fault()
    arm.arm()
    arm.controller.joint_state(arm.t + 0.9, arm.measured, arm.t)  # stamped ahead, then silent
    arm.run(0.2, joint_states=False)
    assert arm.mode == Mode.FAULT


def test_arming_names_the_age_of_stale_joint_states(arm):
    arm.run(0.1)
    assert arm.controller.arm(arm.t + 0.5) == (False, 'no fresh joint states: the newest was taken 0.500 s ago')


def test_three_non_finite_inputs_in_a_row_latch_a_fault(arm):
    arm.follow()
    for source in ('chunks', 'joint_states', 'teleop'):
        arm.controller.reject(source, non_finite=True)
        arm.controller.reject(source, non_finite=True)
        arm.controller.reject(source, non_finite=False)
    arm.controller.add_chunk(arm.chunk([0.1] * 4, sequence=3), arm.t)
    arm.controller.joint_state(arm.t, arm.measured, arm.t)
    for source in ('chunks', 'joint_states'):
        arm.controller.reject(source, non_finite=True)
    assert arm.mode == Mode.POLICY, 'a good one in between begins the row anew'
    arm.controller.reject('teleop', non_finite=True)
    assert arm.mode == Mode.FAULT and arm.controller.reason == 'teleop: 3 non-finite messages in a row'
    assert arm.controller.rejected == {'chunks': 4, 'joint_states': 4, 'teleop': 4}
    arm.run(1.0)
    arm.assert_within_limits()


def test_a_policy_that_asks_for_the_impossible_faults(arm):
    arm.follow(np.concatenate([np.linspace(0, 0.4, 5), [2.5] * 40]), seconds=0.9)  # 0.6 rad beyond the bound
    arm.run(2.5)
    assert arm.mode == Mode.FAULT and "lags behind what is asked for: ('shoulder_pan',)" in arm.controller.reason
    arm.assert_within_limits()


def test_whatever_breaks_inside_the_arm_comes_to_a_bounded_stop(arm, monkeypatch):
    arm.follow()
    monkeypatch.setattr(arm.controller.ensembler, 'at', lambda *_: 1 / 0)
    arm.run(1.0)
    assert arm.mode == Mode.FAULT and 'ZeroDivisionError' in arm.controller.reason
    assert arm.controller.gate.at_rest
    arm.assert_within_limits()


# --- arming, holding, stopping -------------------------------------------------------------------------------------------
def test_approach_goes_slowly_to_a_far_first_command_and_then_follows(arm):
    arm.arm(approach=True)
    for i in range(400):
        if i % 20 == 0:
            arm.controller.add_chunk(arm.chunk([0.4] * 16, sequence=i), arm.t)
        arm.run(PERIOD)
        if i == 3:
            assert arm.mode == Mode.APPROACH and 'slowly to a first command 0.400 off at shoulder_pan' in arm.controller.reason
    assert arm.mode == Mode.POLICY
    np.testing.assert_allclose(arm.measured[0], 0.4, atol=1e-6)
    velocity = np.diff([command[0] for _, command in arm.sent]) / PERIOD
    assert 0.2 < velocity.max() <= 0.25 * (1 + 1e-6), 'a tenth of the limit'
    # What was allowed was this approach, not any later one.
    arm.run(3.0)
    arm.controller.add_chunk(arm.chunk([0.9] * 16, sequence=999), arm.t)
    arm.run(0.1)
    assert arm.mode == Mode.HOLD and 'refused' in arm.controller.reason


def test_a_pose_outside_the_limits_is_refused_or_approached_from(arm):
    arm.measured[0] = 2.2
    ok, message = arm.arm()
    assert not ok and "outside the position limits: ('shoulder_pan',); arm with approach" in message
    assert arm.arm(approach=True)[0] and arm.mode == Mode.APPROACH
    arm.run(0.02)
    assert abs(arm.sent[0][1][0] - 2.2) < 1e-3, 'from where it is, without a jump'
    arm.run(4.0)
    assert arm.mode == Mode.HOLD
    np.testing.assert_allclose(arm.measured[0], 1.91, atol=1e-9)
    assert np.abs(np.diff([c[0] for _, c in arm.sent])).max() / PERIOD <= 0.25 * (1 + 1e-6)


def test_hold_stops_and_follows_nothing_until_armed_again(arm):
    arm.follow()
    assert arm.controller.hold()[0] and arm.mode == Mode.STOPPING
    arm.run(0.5)
    here = arm.measured.copy()
    assert arm.mode == Mode.HOLD and arm.controller.reason == 'told to hold'
    arm.controller.add_chunk(arm.chunk(np.linspace(here[0], here[0] + 0.5, 16), sequence=7), arm.t)
    arm.run(0.5)
    np.testing.assert_array_equal(arm.measured, here)
    epoch = arm.controller.epoch
    assert arm.controller.arm(arm.t)[0] and arm.controller.epoch == epoch + 1
    arm.controller.add_chunk(arm.chunk(np.linspace(here[0], here[0] + 0.5, 16)), arm.t)
    arm.run(0.5)
    assert arm.mode == Mode.POLICY and arm.measured[0] > here[0] + 0.05
    arm.assert_within_limits()
    arm.controller.stop()
    arm.run(0.5)
    assert arm.mode == Mode.INACTIVE and arm.controller.hold()[0] is False


def test_a_fault_is_reset_only_at_rest(arm):
    arm.follow()
    assert arm.controller.reset_fault() == (False, 'there is no fault, the mode is POLICY')
    arm.controller.fault('told to')
    assert arm.controller.reset_fault() == (False, 'the arm is still stopping')
    arm.run(0.5)
    assert arm.controller.reset_fault()[0]


# --- time ----------------------------------------------------------------------------------------------------------------
def test_a_stalled_clock_ends_in_hold_when_it_goes_on(arm):
    arm.follow()
    arm.controller.clock_stalled()
    assert arm.mode == Mode.STOPPING and arm.controller.reason == '/clock stands still'
    arm.run(0.5)
    assert arm.mode == Mode.HOLD
    arm.assert_within_limits()


@pytest.mark.parametrize('during', ['POLICY', 'STOPPING', 'HOLD'])
def test_a_clock_that_jumps_back_flushes_and_holds_under_a_new_epoch(arm, during):
    arm.follow()
    if during != 'POLICY':
        arm.controller.hold()
        arm.run(0.04 if during == 'STOPPING' else 1.0)
    old, epoch = arm.chunk(np.linspace(0, 1.5, 16), sequence=5), arm.controller.epoch
    arm.t -= 3.0
    arm.controller.clock_jumped(arm.t)
    assert arm.controller.epoch == epoch + 1
    with pytest.raises(ChunkError, match='epoch'):
        arm.controller.add_chunk(old, arm.t)
    arm.run(0.5)
    assert arm.mode == Mode.HOLD and arm.controller.gate.at_rest
    arm.assert_within_limits()


@pytest.mark.parametrize('percent', [20, 50])
def test_speed_scale_plays_chunks_slowly_and_never_stale(arm, percent):
    arm.controller.speed_scale = arm.controller.scale = percent / 100
    arm.arm()
    for i in range(10):  # a planner that looks at the arm every 0.4 s and wants 0.8 rad/s from there
        arm.controller.add_chunk(arm.chunk(arm.measured[0] + 0.08 * np.arange(16), sequence=i), arm.t)
        arm.run(0.4)
    velocity = np.diff([command[0] for _, command in arm.sent]) / PERIOD
    np.testing.assert_allclose(np.median(velocity), 0.8 * percent / 100, rtol=0.02)
    assert velocity[15:].max() <= 0.8 * percent / 100 * 1.01
    assert velocity.max() <= 0.8 * percent / 100 * 1.75, 'fading in catches up'
    arm.run(1.2)
    assert arm.mode == Mode.HOLD and arm.controller.reason == 'no fresh chunk', 'slow, but gone when it would be at full speed'
    assert arm.measured[0] < 0.8 * percent / 100 * 5.5


def test_speed_scale_changes_smoothly_and_0_stands_still(arm):
    arm.arm()
    for i in range(60):
        if i % 5 == 0:
            arm.controller.add_chunk(arm.chunk(arm.measured[0] + 0.08 * np.arange(16), sequence=i), arm.t)
        arm.controller.speed_scale = 0.0 if i > 20 else 1.0
        arm.run(0.1)
        if i == 40:
            stands = arm.measured[0]
    assert arm.measured[0] == pytest.approx(stands, abs=1e-9) and arm.mode == Mode.POLICY
    velocity = np.diff([command[0] for _, command in arm.sent]) / PERIOD
    assert np.abs(np.diff(velocity[100:])).max() / PERIOD < 5.0, 'slowed down over half a second, not at the limit of 15'


# --- teleop --------------------------------------------------------------------------------------------------------------
def pan(value) -> np.ndarray:
    return np.array([value, 0, 0, 0, 0, 0.0])


def test_a_human_takes_over_in_motion_and_hands_back_under_a_new_epoch(arm):
    arm.follow()
    here, epoch = arm.measured[0], arm.controller.epoch
    arm.run(1.0, human=lambda t: pan(here + 0.05))
    assert arm.mode == Mode.TELEOP and arm.controller.reason == 'a human took over'
    np.testing.assert_allclose(arm.measured[0], here + 0.05, atol=1e-9)
    arm.controller.add_chunk(arm.chunk([9.0] * 16, sequence=50), arm.t)  # planned before the hand-back
    arm.controller.release()
    arm.run(0.1)
    assert arm.mode == Mode.HOLD and arm.controller.epoch == epoch + 1 and arm.controller.follows_chunks
    arm.controller.add_chunk(arm.chunk(arm.measured[0] + 0.08 * np.arange(16)), arm.t)
    arm.run(0.5)
    assert arm.mode == Mode.POLICY and arm.measured[0] > here + 0.2
    arm.assert_within_limits()


def test_takeover_blends_instead_of_snapping(arm):
    arm.arm()
    arm.run(0.5, human=pan(0.14))
    velocity = np.diff([command[0] for _, command in arm.sent]) / PERIOD
    assert arm.measured[0] == pytest.approx(0.14) and velocity.max() < 1.1  # at the limits it would be 1.4 rad/s
    assert np.sum(velocity > 0.1) * PERIOD > 0.15


def test_a_silent_human_leaves_the_arm_held_until_armed(arm):
    arm.arm()
    arm.run(0.5, human=lambda t: pan(0.5 * (t - 0.1)))
    assert arm.mode == Mode.TELEOP
    arm.run(0.5)
    assert arm.mode == Mode.HOLD and not arm.controller.follows_chunks and 'arm to go on' in arm.controller.reason
    here = arm.measured[0]
    arm.controller.add_chunk(arm.chunk(here + 0.08 * np.arange(16)), arm.t)
    arm.run(0.3)
    assert arm.measured[0] == here
    arm.run(0.1, human=pan(here))
    assert arm.mode == Mode.TELEOP, 'the human may go on'
    arm.assert_within_limits()


def test_a_takeover_that_is_too_far_away_stops_the_policy_all_the_same(arm):
    arm.follow()
    arm.run(0.5, human=pan(-0.5))
    assert arm.mode == Mode.HOLD and 'first command refused: shoulder_pan' in arm.controller.reason
    here = arm.measured[0]
    arm.controller.add_chunk(arm.chunk(here + 0.08 * np.arange(16), sequence=9), arm.t)
    arm.run(0.2, human=pan(-0.5))
    assert arm.measured[0] == here
    arm.controller.release()
    arm.controller.add_chunk(arm.chunk(here + 0.08 * np.arange(16), sequence=10), arm.t)
    arm.run(0.3)
    assert arm.mode == Mode.POLICY
    arm.assert_within_limits()


def test_a_held_arm_is_nobody_s_until_it_is_armed_again(arm):
    arm.arm()
    arm.run(0.3, human=pan(0.05))
    arm.controller.hold()
    arm.run(0.3, human=pan(0.05))
    arm.controller.release()
    arm.run(0.1, human=pan(0.05))
    assert arm.mode == Mode.HOLD
    arm.controller.arm(arm.t)
    arm.run(0.1, human=pan(0.05))
    assert arm.mode == Mode.TELEOP


def test_a_human_beyond_the_limits_is_not_followed_for_long(arm):
    arm.arm()
    arm.run(4.0, human=lambda t: pan(t - 0.1))  # to 4 rad; the joint ends at 1.91
    assert arm.mode == Mode.HOLD and 'lags behind' in arm.controller.reason
    assert arm.measured[0] <= 1.91
    arm.assert_within_limits()


def test_teleop_commands_that_are_old_on_arrival_move_nothing(arm):
    arm.arm()
    for _ in range(10):
        arm.controller.teleop(arm.t - 0.3, pan(0.05), arm.t)
        arm.run(PERIOD)
    assert arm.mode == Mode.HOLD and arm.measured[0] == 0.0


def test_a_chunk_is_used_at_the_next_tick(arm):
    arm.arm()
    arm.controller.add_chunk(arm.chunk([0.0] * 16), arm.t)
    arm.run(0.5)
    arm.controller.add_chunk(arm.chunk([0.02] * 16, sequence=1), arm.t + 0.7 * PERIOD)
    arm.run(PERIOD)
    assert arm.measured[0] > 1e-4


# --- found in review -----------------------------------------------------------------------------------------------------
def test_a_stop_survives_a_pause_with_a_human_at_the_arm(arm):
    arm.arm()
    arm.run(0.5, human=lambda t: pan(0.5 * (t - 0.1)))
    arm.controller.stop()
    arm.t += 5 * PERIOD
    arm.controller.joint_state(arm.t, arm.measured, arm.t)
    arm.controller.teleop(arm.t, arm.measured, arm.t)
    arm.controller.tick(arm.t, elapsed=5)
    arm.run(0.5, human=lambda t: arm.measured)
    assert arm.mode == Mode.INACTIVE


def test_a_human_whose_commands_come_late_stops_the_policy(arm):
    arm.follow()
    for _ in range(5):
        arm.controller.teleop(arm.t - 0.3, arm.measured, arm.t)
        arm.run(PERIOD)
    assert arm.mode in (Mode.STOPPING, Mode.HOLD) and 'newest command is 0.3' in arm.controller.reason


def test_a_human_ends_the_approach_of_a_policy(arm):
    arm.arm(approach=True)
    arm.controller.add_chunk(arm.chunk([0.8] * 60), arm.t)
    arm.run(0.5)
    assert arm.mode == Mode.APPROACH
    here = arm.measured
    arm.run(0.5, human=here)
    assert arm.mode == Mode.TELEOP
    arm.assert_within_limits()


def test_a_far_human_is_approached_if_that_was_allowed(arm):
    arm.arm(approach=True)
    arm.run(1.0, human=pan(0.5))
    assert arm.mode == Mode.APPROACH and arm.measured[0] > 0.01
    arm.run(0.3)
    assert arm.mode == Mode.HOLD, 'let go, or lost'
    arm.controller.arm(arm.t, approach=True)
    arm.run(6.0, human=pan(0.5))
    assert arm.mode == Mode.TELEOP
    np.testing.assert_allclose(arm.measured[0], 0.5, atol=1e-9)


def test_an_approach_ends_with_what_it_approaches(arm):
    arm.arm(approach=True)
    arm.controller.add_chunk(arm.chunk([0.8] * 6), arm.t)
    arm.run(1.0)
    assert arm.mode == Mode.HOLD and 'no fresh chunk' in arm.controller.reason and arm.measured[0] < 0.2


def test_an_approach_stays_slow_when_the_speed_scale_comes_back(arm):
    arm.arm(approach=True)
    for i in range(60):
        arm.controller.add_chunk(arm.chunk([0.8] * 16, sequence=i), arm.t)
        arm.controller.speed_scale = 0.0 if 5 < i < 25 else 1.0
        arm.run(0.1)
    velocity = np.diff([command[0] for _, command in arm.sent]) / PERIOD
    assert velocity.max() <= 0.25 * (1 + 1e-6)


def test_what_cannot_be_approached_is_refused_with_the_reason(arm):
    arm.measured[0] = 5000.0  # degrees, or ticks
    ok, message = arm.arm(approach=True)
    assert not ok and 'no slow way back' in message and arm.mode == Mode.INACTIVE
    arm.measured[0] = 2.2
    arm.controller.speed_scale = 0.0
    assert 'speed_scale is 0 %, too slow to approach' in arm.arm(approach=True)[1]
    assert arm.mode == Mode.INACTIVE


def test_a_human_of_an_earlier_arming_does_not_count(arm):
    arm.arm()
    arm.run(0.3, human=pan(0.02))
    arm.controller.stop()
    arm.run(5.0)
    assert arm.arm()[0]
    arm.run(0.1)
    assert arm.controller.follows_chunks and arm.mode == Mode.HOLD


def test_pauses_do_not_keep_a_dead_sensor_alive(arm):
    arm.follow()
    for _ in range(10):
        arm.run(4 * PERIOD, joint_states=False)
        arm.t += 4 * PERIOD
        arm.controller.tick(arm.t, elapsed=4)
    assert arm.mode == Mode.FAULT and 'joint states older' in arm.controller.reason


def test_the_command_that_comes_to_rest_is_sent(arm):
    arm.follow()
    arm.controller.stop()
    while arm.mode != Mode.INACTIVE:
        arm.run(PERIOD)
    np.testing.assert_array_equal(arm.sent[-1][1], arm.controller.gate.position)
    count = len(arm.sent)
    arm.run(0.1)
    assert len(arm.sent) == count


def test_chunks_with_a_gap_between_them_cover_until_the_gap(arm):
    arm.follow(np.linspace(0, 1.5, 11))
    arm.controller.add_chunk(arm.chunk(np.linspace(1.5, 1.6, 8), sequence=9, start=arm.t + 0.9), arm.t)
    arm.run(1.0)
    assert arm.mode in (Mode.STOPPING, Mode.HOLD) and arm.controller.reason == 'no fresh chunk'
    arm.assert_within_limits()


def test_a_clock_that_jumps_back_after_a_switch_extrapolates_nothing(arm):
    arm.follow()
    arm.controller.ensembler.switch(Blending('latest'), arm.t)
    arm.t -= 0.5
    arm.controller.clock_jumped(arm.t)
    arm.run(0.4)
    for i, value in enumerate((0.0, 0.1)):
        arm.controller.add_chunk(arm.chunk([arm.measured[0] + value] * 16, sequence=i), arm.t)
    here = arm.measured[0]
    arm.run(0.5)
    assert here - 1e-9 <= arm.measured[0] <= here + 0.1 + 1e-9


# --- another policy ---------------------------------------------------------------------------------------------------
def test_another_policy_takes_over_in_motion_and_no_command_mixes_the_two(arm):
    """Every target is of chunks of one policy, before and after, and the arm goes on within limits, without a stop."""
    arm.follow()
    old, epoch = arm.chunk(arm.measured[0] + 0.3 * np.arange(16) * 0.1, 1), arm.controller.epoch
    arm.controller.add_chunk(old, arm.t)
    arm.run(0.2)
    with pytest.raises(ChunkError, match=f"planned by 'two', the epoch is that of 'one': {epoch + 1} begins"):
        arm.controller.add_chunk(arm.chunk(np.full(16, 0.2), 2, policy='two'), arm.t)
    assert arm.controller.epoch == epoch + 1
    with pytest.raises(ChunkError, match='epoch'):
        arm.controller.add_chunk(arm.chunk(np.full(16, 9.0), 3, epoch), arm.t)
    arm.run(0.3)
    assert arm.mode == Mode.POLICY and arm.controller.blend.newest[1] == 1, 'the old ones go on'
    new = arm.chunk(arm.measured[0] + 0.05 - 0.02 * np.arange(16), policy='two', start=arm.t + 0.07)
    arm.controller.add_chunk(new, arm.t)
    seen, clamped = [], arm.controller.clamped_ticks
    for _ in range(50):
        arm.run(PERIOD)
        assert arm.mode == Mode.POLICY
        blend = arm.controller.blend
        seen.append('two' if abs(blend.positions - new.at(arm.t)).max() < 1e-12 and arm.t >= new.start else 'one')
        assert blend.newest[1] == (0 if seen[-1] == 'two' else 1) and blend.live <= 2
    assert seen == ['one'] * 3 + ['two'] * 47, 'as soon as it covers now'
    assert arm.controller.clamped_ticks == clamped, 'faded in, not held back by limits'
    assert arm.measured[0] == pytest.approx(new.at(arm.t)[0], abs=1e-6)
    arm.assert_within_limits()


@pytest.mark.parametrize('seed', range(20))
def test_policies_that_change_all_the_time_keep_the_limits(arm, seed):
    rng, sequence, policy = np.random.default_rng(seed), 0, 'one'
    arm.follow(seconds=0.1)
    for _ in range(40):
        arm.run(float(rng.uniform(0.02, 0.2)))
        if rng.random() < 0.4:
            policy = str(rng.integers(3))
        sequence += 1
        start = arm.t + float(rng.uniform(-0.1, 0.1))
        values = arm.measured[0] + rng.uniform(-0.3, 0.3) + np.cumsum(rng.normal(0, 0.05, 16))
        try:
            arm.controller.add_chunk(arm.chunk(values, sequence, start=start, policy=policy), arm.t)
        except ChunkError:
            pass
    arm.run(3.0)
    assert arm.mode == Mode.HOLD
    arm.assert_within_limits()


def test_a_policy_that_wants_to_be_elsewhere_stops_the_arm(arm):
    arm.follow()
    for _ in range(2):
        chunk = arm.chunk(np.full(16, arm.measured[0] + 1.0), 5, policy='two')
        try:
            arm.controller.add_chunk(chunk, arm.t)
        except ChunkError:
            pass
    arm.run(0.04)
    assert arm.mode == Mode.STOPPING and 'wants to be elsewhere' in arm.controller.reason
    arm.run(1.0)
    assert arm.mode == Mode.HOLD and 'first command refused' in arm.controller.reason
    arm.assert_within_limits()


def test_a_new_policy_that_never_comes_is_a_starved_arm(arm):
    arm.follow()
    with pytest.raises(ChunkError):
        arm.controller.add_chunk(arm.chunk(np.zeros(16), 1, policy='two'), arm.t)
    arm.run(3.0)
    assert arm.mode == Mode.HOLD and arm.controller.reason == 'no fresh chunk'
    arm.assert_within_limits()
    arm.controller.add_chunk(arm.chunk(np.full(16, arm.measured[0]), policy='two'), arm.t)
    arm.run(0.1)
    assert arm.mode == Mode.POLICY


def test_another_policy_while_held_is_followed_under_its_epoch(arm):
    arm.arm()
    arm.controller.add_chunk(arm.chunk(np.full(16, 2.0)), arm.t)
    arm.run(0.1)
    assert arm.mode == Mode.HOLD
    with pytest.raises(ChunkError):
        arm.controller.add_chunk(arm.chunk(np.zeros(16), 1, policy='two'), arm.t)
    arm.controller.add_chunk(arm.chunk(np.zeros(16), policy='two'), arm.t)
    arm.run(0.1)
    assert arm.mode == Mode.POLICY and arm.controller.blend.live == 1


@pytest.mark.parametrize('ends', ['starved', 'released', 'armed', 'alone'])
def test_two_planners_cannot_take_turns(arm, ends):
    """Both answer every epoch at once, as they do; the one in charge stays it, the arm goes on, and no epoch begins.

    Nor does the other one get the arm after a stop, or when a human hands it back: only once it is armed anew, or the other
    planner has left.
    """
    arm.follow(0.02 * np.arange(16), seconds=0.1)
    epoch, clamped = arm.controller.epoch, arm.controller.clamped_ticks
    for i in range(100):
        for policy in ('two', 'one') if i % 2 else ('one', 'two'):
            if policy == 'one':
                values = arm.measured[0] + 0.02 * np.arange(16)
                arm.controller.add_chunk(arm.chunk(values, i + 1), arm.t, lambda: 2)
            else:
                with pytest.raises(ChunkError, match="planned by 'two', the epoch is that of 'one', which stays.* 2 planners"):
                    arm.controller.add_chunk(arm.chunk(np.full(16, -0.5), i + 1, policy='two'), arm.t, lambda: 2)
        arm.run(PERIOD)
        assert arm.mode == Mode.POLICY and arm.controller.epoch == epoch
    assert arm.measured[0] > 0.2 and arm.controller.clamped_ticks == clamped
    if ends == 'released':
        arm.run(0.2, human=arm.measured)
        arm.controller.release()
        epoch += 1
    arm.run(2.0)
    assert arm.mode == Mode.HOLD
    if ends == 'armed':
        arm.controller.arm(arm.t)
        arm.controller.add_chunk(arm.chunk(np.full(16, arm.measured[0]), policy='two'), arm.t, lambda: 2)
        epoch += 1
    else:
        alone = ends == 'alone'
        with pytest.raises(ChunkError, match=f'{epoch + 1} begins' if alone else 'which stays'):
            arm.controller.add_chunk(arm.chunk(np.full(16, arm.measured[0]), policy='two'), arm.t, lambda: 1 if alone else 2)
        epoch += alone
    arm.run(0.1)
    assert arm.controller.epoch == epoch and arm.mode == (Mode.POLICY if ends == 'armed' else Mode.HOLD)
    arm.assert_within_limits()


def test_a_chunk_that_has_ended_begins_no_epoch(arm):
    arm.follow()
    epoch = arm.controller.epoch
    with pytest.raises(ChunkError, match='it has ended'):
        arm.controller.add_chunk(arm.chunk(np.zeros(3), start=arm.t - 0.3, policy='two'), arm.t)
    assert arm.controller.epoch == epoch and arm.mode == Mode.POLICY


def test_a_new_policy_is_not_driven_out_before_its_first_chunk_is_followed(arm):
    """The planner of before answers the new epoch first, while the new one still thinks."""
    arm.follow()
    with pytest.raises(ChunkError, match='begins'):
        arm.controller.add_chunk(arm.chunk(np.full(16, arm.measured[0]), 1, policy='two'), arm.t)
    epoch = arm.controller.epoch
    with pytest.raises(ChunkError, match='stays as long as there are 2'):
        arm.controller.add_chunk(arm.chunk(np.full(16, arm.measured[0])), arm.t, lambda: 2)
    arm.controller.add_chunk(arm.chunk(np.full(16, arm.measured[0]), policy='two'), arm.t, lambda: 2)
    arm.run(0.1)
    assert arm.mode == Mode.POLICY and arm.controller.epoch == epoch and arm.controller.reason.endswith('another policy')


@pytest.mark.parametrize('happens', [lambda arm: arm.controller.clock_stalled(),
                                     lambda arm: arm.controller.tick(arm.t + 5 * PERIOD, 5)])
def test_what_was_planned_before_a_pause_is_not_followed_after_it_by_another_policy_either(arm, happens):
    arm.follow()
    for sequence in range(2):
        chunk = arm.chunk(np.full(16, arm.measured[0] + 0.05), sequence, start=arm.t + 0.2, policy='two')
        try:
            arm.controller.add_chunk(chunk, arm.t)
        except ChunkError:
            pass
    happens(arm)
    arm.t += 5 * PERIOD
    arm.run(1.0)
    assert arm.mode == Mode.HOLD, 'nothing has been planned since'
    arm.controller.add_chunk(arm.chunk(np.full(16, arm.measured[0]), 2, policy='two'), arm.t)
    arm.run(0.1)
    assert arm.mode == Mode.POLICY
