"""Guards of the core that no other test would miss (test/soak/test_guard_removal.py removes them in turn)."""
from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from il_runtime.core.controller import Controller
from il_runtime.core.ensembling import Blending, Chunk, ChunkError, Ensembler, arrange
from il_runtime.core.mode import Mode
from il_runtime.core.teleop import Choice, Gamepad, Layout, Speeds
from test_controller import PERIOD, Arm, pan
from test_safety import UPPER, gate, moving


@pytest.fixture
def arm(root):
    return Arm(root)


def velocity(arm) -> np.ndarray:
    """Of joint 0, from the commands sent [rad/s]."""
    return np.diff([command[0] for _, command in arm.sent]) / PERIOD


# --- gate ----------------------------------------------------------------------------------------------------------------
def test_a_stop_leaves_the_direction_where_keeping_it_would_leave_the_limits():
    g = gate()
    g.position, g.velocity = np.array([1.65, 0.0, 0.05]), np.array([2.5, 1.0, 0.0])  # 0.21 and 0.17 rad if each brakes hard,
    ramp = g.stop_ramp(0.0)  # 0.42 rad for joint 0 in the time that joint 1 needs
    assert (ramp.at(ramp.end) <= UPPER).all()
    np.testing.assert_allclose(ramp.at(ramp.end)[:2], [1.65 + 2.5**2 / 30, 1 / 6], atol=1e-9)


@pytest.mark.parametrize('speed', [0.0, 1e-6])  # refused by Ruckig, and longer than Ruckig can count
def test_a_motion_that_cannot_be_planned_is_an_error(speed):
    with pytest.raises(RuntimeError, match='no motion planned'):
        gate().approach_ramp(0.0, np.zeros(3), speed)


def test_a_stop_is_followed_from_where_the_arm_is_not_from_what_it_lagged_behind():
    g = moving([1.9, 0.7, 0.1], 8)
    ramp = g.stop_ramp(0.0)
    for i in range(1, 5):
        g.step(ramp.at(i * PERIOD))
        np.testing.assert_allclose(g.position, ramp.at(i * PERIOD), atol=1e-9)


def test_a_request_that_comes_back_from_beyond_a_bound_is_met_without_overshoot():
    g = moving([9.0, 0.1, 0.05], 120)
    g.step(np.array([1.898, 0.1, 0.05]))
    assert g.position[0] >= 1.898 - 1e-9


def test_running_out_from_the_tick_on_which_full_speed_is_reached_keeps_to_it():
    velocities = moving([9.0, 0.1, 0.05], 9).run_out()[2]
    assert velocities.max() == 2.5


def test_running_out_from_the_last_tick_of_a_stop_does_not_turn_round():
    g = moving([9.0, 0.1, 0.05], 9)
    for _ in range(8):
        g.step(None)
    assert 0 < g.velocity[0] < 0.15
    assert (g.run_out()[2] >= 0).all()


# --- chunks --------------------------------------------------------------------------------------------------------------
def chunk(start, values, sequence=0, period=0.1) -> Chunk:
    return Chunk(start, period, np.asarray(values, float)[:, None], 1, sequence, start)


def ensembler(**options) -> Ensembler:
    made = Ensembler([1.0], Blending(**options))
    made.reset(1)
    return made


@pytest.mark.parametrize(('names', 'message'), [(['a', 'b', 'a'], r"doubled \['a'\]"), (['a', 'b', 'c'], r"unknown \['c'\]")])
def test_more_names_than_joints_are_refused(names, message):
    with pytest.raises(ChunkError, match=message):
        arrange(names, [1, 2, 3], 1, 0.1, ('a', 'b'))


def test_a_chunk_is_held_at_both_ends_and_counts_only_between():
    early = chunk(1.0, [5.0, 6.0, 7.0])
    assert (early.at(0.5), early.at(9.0)) == (5.0, 7.0)
    blend = ensembler()
    blend.add(early, now=0.9)
    assert blend.at(0.98) is None
    assert blend.at(1.0).positions == 5.0


def test_a_chunk_alone_counts_in_full_from_receipt_to_its_very_end():
    blend = ensembler()
    blend.add(chunk(0.0, [3.0, 3.0]), now=0.0)
    assert blend.at(0.0).positions == 3.0 == blend.at(0.1).positions


def test_chunks_that_agree_with_the_newest_are_not_faded_out_with_those_that_do_not():
    blend = ensembler(m=0.0, max_disagreement=1.0)
    blend.add(chunk(0.0, [-1.0] * 16), now=-1.0)
    blend.add(chunk(0.2, [1.0] * 16, sequence=1), now=0.2)
    blend.at(0.2)
    blend.add(chunk(0.22, [1.2] * 16, sequence=2), now=0.22)
    for t in np.arange(0.22, 0.5, 0.02):
        last = blend.at(t)
    assert last.positions == pytest.approx(1.1)


def test_when_a_newer_chunk_that_disagreed_has_ended_the_older_one_counts_again():
    blend = ensembler(m=0.0, max_disagreement=1.0)
    blend.add(chunk(0.0, [-1.0] * 16), now=-1.0)
    blend.add(chunk(0.2, [1.0, 1.0], sequence=1, period=0.05), now=0.2)
    for t in np.arange(0.2, 0.5, 0.02):
        last = blend.at(t)
    assert last.positions == -1.0


# --- controller: arming, stopping, faults -----------------------------------------------------------------------------------
def test_stopping_what_is_not_armed_does_not_end_the_next_arming(arm):
    arm.controller.stop()
    arm.arm()
    arm.run(0.5)
    assert arm.mode == Mode.HOLD


@pytest.mark.parametrize('mode', [Mode.HOLD, Mode.STOPPING])
def test_blind_means_fault_whether_held_or_stopping(arm, mode):
    arm.follow()
    arm.controller.hold()
    arm.run(0.02 if mode == Mode.STOPPING else 0.5)
    assert arm.mode == mode
    arm.controller._measured = (arm.t - 0.2, arm.measured)
    arm.run(PERIOD, joint_states=False)
    assert arm.mode == Mode.FAULT


def test_a_fault_keeps_its_reason_when_told_to_stop(arm):
    arm.follow()
    arm.controller.fault('what was wrong')
    arm.controller.stop()
    assert arm.controller.reason == 'what was wrong'


def test_a_stop_keeps_the_direction_of_the_motion(arm):
    arm.arm()
    positions = np.zeros((16, 6))
    positions[:, 0], positions[:, 1] = np.linspace(0, 1.5, 16), np.linspace(0, 0.5, 16)
    arm.controller.add_chunk(Chunk(arm.t, 0.1, positions, arm.controller.epoch, 0, arm.t), arm.t)
    arm.run(0.5)
    arm.controller.hold()
    arm.run(0.3)
    path = np.array([command for _, command in arm.sent])[20:]
    np.testing.assert_allclose(path[:, 1], path[:, 0] / 3, atol=1e-9)


def test_an_approach_is_stopped_at_once(arm):
    arm.measured[0] = 2.2
    arm.arm(approach=True)
    arm.run(0.5)
    assert arm.mode == Mode.APPROACH
    arm.controller.hold()
    arm.run(0.1)
    assert arm.mode == Mode.HOLD and arm.measured[0] > 2.08


def test_a_stop_that_cannot_be_planned_is_one_all_the_same(arm, monkeypatch):
    def fail(_now):
        raise RuntimeError('no motion planned')

    arm.follow()
    monkeypatch.setattr(arm.controller.gate, 'stop_ramp', fail)
    arm.controller.hold()
    arm.run(0.3)
    assert arm.mode == Mode.HOLD and arm.controller.gate.at_rest
    arm.assert_within_limits()


def test_approaches_heed_the_speed_scale_and_need_one(arm):
    arm.controller.speed_scale = arm.controller.scale = 0.0
    arm.arm(approach=True)
    arm.controller.add_chunk(arm.chunk([0.4] * 16), arm.t)
    arm.run(0.2)
    assert arm.mode == Mode.HOLD and 'refused' in arm.controller.reason
    arm.controller.speed_scale = arm.controller.scale = 0.2
    arm.run(1.0)
    assert arm.mode == Mode.APPROACH
    assert velocity(arm).max() == pytest.approx(0.1 * 0.2 * 2.5)
    assert np.diff(velocity(arm)).max() / PERIOD <= 0.1 * 0.2 * 15 * (1 + 1e-6)


def test_letting_go_ends_the_approach_to_a_human_and_no_other(arm):
    arm.arm(approach=True)
    arm.run(0.2, human=pan(0.5))
    assert arm.mode == Mode.APPROACH
    arm.controller.release()
    arm.run(0.1)
    assert arm.mode == Mode.HOLD and arm.measured[0] < 0.1
    arm.controller.arm(arm.t, approach=True)
    arm.controller.add_chunk(arm.chunk([0.5] * 16), arm.t)
    arm.run(0.1)
    arm.controller.release()
    assert arm.mode == Mode.APPROACH


def test_an_approach_that_would_take_hours_breaks_nothing(arm):
    slow = tuple(dataclasses.replace(joint, velocity=0.1) for joint in arm.contract.joints)
    arm.controller = Controller(dataclasses.replace(arm.contract, joints=slow), arm.controller.ensembler)
    arm.controller.speed_scale = arm.controller.scale = 0.0
    arm.measured[0] = 2.2  # 0.3 rad outside, at a thousandth of a tenth of 0.1 rad/s
    arm.arm(approach=True)
    arm.run(0.2)
    assert 'internal error' not in arm.controller.reason


# --- controller: chunks with a gap ------------------------------------------------------------------------------------------
def test_before_a_gap_between_chunks_the_arm_stops_and_what_comes_after_it_is_not_followed(arm):
    arm.arm()
    begin = arm.t
    arm.controller.add_chunk(arm.chunk(np.linspace(0, 0.4, 6)), begin)
    arm.controller.add_chunk(arm.chunk([0.4] * 6, sequence=1, start=begin + 0.8), begin)
    arm.run(0.5 + PERIOD)
    assert arm.mode == Mode.HOLD and arm.controller.reason == 'no fresh chunk', 'at rest when the horizon ends'
    arm.run(0.6)
    assert arm.mode == Mode.HOLD
    arm.assert_within_limits()


# --- controller: clocks and pauses --------------------------------------------------------------------------------------------
def test_a_clock_that_jumps_back_takes_the_arm_from_a_human_who_is_no_longer_there(arm):
    arm.arm()
    arm.run(0.5, human=lambda t: pan(0.5 * (t - 0.1)))
    assert arm.mode == Mode.TELEOP
    arm.t -= 3.0
    arm.controller.clock_jumped(arm.t)
    assert arm.mode == Mode.STOPPING and arm.controller.reason == '/clock jumped back'
    arm.run(0.3)
    assert arm.mode == Mode.HOLD
    arm.controller.add_chunk(arm.chunk(arm.measured[0] + 0.08 * np.arange(16)), arm.t)
    arm.run(0.3)
    assert arm.mode == Mode.POLICY
    arm.assert_within_limits()


def test_a_stop_goes_on_when_the_clock_jumps_back(arm):
    arm.follow()
    arm.controller.hold()
    arm.run(0.04)
    arm.t -= 3.0
    arm.controller.clock_jumped(arm.t)
    arm.run(0.5)
    assert (velocity(arm) >= 0).all(), 'not back to where the stop began'


def test_after_a_jump_back_slow_playback_is_where_it_was(arm):
    arm.controller.speed_scale = arm.controller.scale = 0.5
    arm.arm()
    arm.run(2.0)
    arm.t -= 1.0
    arm.controller.clock_jumped(arm.t)
    arm.run(0.1)
    arm.controller.add_chunk(arm.chunk(0.08 * np.arange(16), start=arm.t - PERIOD), arm.t)
    arm.run(0.5)
    assert arm.measured[0] == pytest.approx(0.8 * 0.5 * 0.52, rel=0.01)


def test_after_a_pause_what_was_planned_before_it_is_not_followed_though_it_is_near(arm):
    arm.follow(np.linspace(0, 0.3, 32))
    arm.t += 10 * PERIOD
    arm.controller.joint_state(arm.t, arm.measured, arm.t)
    arm.controller.tick(arm.t, elapsed=10)
    arm.run(0.5)
    assert arm.mode == Mode.HOLD


def test_an_arm_that_stood_during_a_pause_stays_where_it_is_after_a_fault(arm):
    arm.follow(np.linspace(0, 1.61, 8))  # 2.3 rad/s: a stop takes 8 ticks
    arm.controller.fault('told to')
    arm.run(PERIOD)
    arm.t += 4 * PERIOD
    arm.controller.joint_state(arm.t, arm.measured, arm.t)
    np.testing.assert_array_equal(arm.controller.tick(arm.t, elapsed=4), arm.measured)
    before = arm.measured.copy()
    arm.run(0.3)
    np.testing.assert_array_equal(arm.measured, before)


# --- controller: the human ----------------------------------------------------------------------------------------------------
def test_a_command_stamped_ahead_keeps_no_silent_human_in_charge(arm):
    arm.arm()
    arm.controller.teleop(arm.t + 0.9, pan(0.0), arm.t)
    arm.run(0.1)
    assert arm.mode == Mode.TELEOP
    arm.run(0.2)
    assert arm.mode == Mode.HOLD


# --- gamepad --------------------------------------------------------------------------------------------------------------------
def test_a_gamepad_without_the_buttons_of_the_layout_is_refused(arm):
    choice = Choice(arm.contract, print)
    pad = Gamepad(arm.contract, 0, Layout(gripper_buttons=(1, 2)), Speeds(0.1, 0.5, 0.5), 5, choice)
    with pytest.raises(ValueError, match='button 2 are wanted'):
        pad.read(0.0, [], [1, 0])
