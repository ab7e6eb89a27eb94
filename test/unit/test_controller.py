from __future__ import annotations

import numpy as np
import pytest

from il_policies.contract import load_contract
from il_runtime.core.controller import Controller
from il_runtime.core.ensembling import Chunk, ChunkError, Ensembler
from il_runtime.core.mode import TRANSITIONS, Mode

PERIOD = 0.02


class Arm:
    """A controller with an arm that follows perfectly, and the commands it sent."""

    def __init__(self, root):
        self.contract = load_contract(root / 'config/robots/so101.yaml')
        self.controller = Controller(self.contract, Ensembler([j.tracking_tolerance for j in self.contract.action_joints]))
        self.t, self.measured, self.sent = 0.0, np.zeros(6), []

    def run(self, seconds, joint_states=True):
        for _ in range(round(seconds / PERIOD)):
            self.t += PERIOD
            if joint_states:
                self.controller.joint_state(self.t, self.measured)
            command = self.controller.tick(self.t)
            if command is not None:
                self.sent.append((self.t, command.copy()))
                self.measured = command.copy()

    def arm(self):
        self.run(0.1)
        return self.controller.arm(self.t)

    def chunk(self, values, sequence=0, epoch=None, start=None):
        start = self.t if start is None else start
        positions = np.zeros((len(values), 6))
        positions[:, 0] = values
        return Chunk(start, 0.1, positions, self.controller.epoch if epoch is None else epoch, sequence, start)


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
    arm.controller.disarm()
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
    arm.controller.disarm('told to')
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
    assert fault - silent <= 0.1 + 2 * PERIOD + 1e-9
    arm.run(1.0)
    assert arm.controller.mode == Mode.FAULT, 'latched though the states are back'
    assert 'FAULT' in arm.controller.arm(arm.t)[1]
    arm.controller.disarm()
    assert arm.controller.mode == Mode.INACTIVE and arm.arm()[0]


def test_non_finite_joint_states_count_as_silence(arm):
    arm.arm()
    arm.measured = np.full(6, np.nan)
    for _ in range(10):
        arm.t += PERIOD
        arm.controller.joint_state(arm.t, np.full(6, np.nan))
        assert np.isfinite(arm.controller.tick(arm.t)).all()
    assert arm.controller.mode == Mode.FAULT


def test_an_arm_that_does_not_follow_faults(arm):
    arm.arm()
    for i in range(60):
        arm.t += PERIOD
        arm.controller.joint_state(arm.t, np.zeros(6))  # stuck
        if i == 0:
            arm.controller.add_chunk(arm.chunk(np.linspace(0, 1.5, 16)), arm.t)
        arm.controller.tick(arm.t)
    assert arm.controller.mode == Mode.FAULT and 'shoulder_pan' in arm.controller.reason


def test_missed_ticks_are_made_up_for_and_long_pauses_are_not(arm):
    arm.arm()
    arm.controller.add_chunk(arm.chunk(np.linspace(0, 1.5, 32)), arm.t)
    arm.run(0.5)
    arm.t += 3 * PERIOD
    arm.controller.joint_state(arm.t, arm.measured)
    before = arm.sent[-1][1][0]
    command = arm.controller.tick(arm.t, elapsed=3)
    speed = 1.5 / 3.1
    assert command[0] - before == pytest.approx(3 * PERIOD * speed, rel=1e-3)
    arm.t += 0.4
    arm.controller.joint_state(arm.t, command)
    jumped = arm.controller.tick(arm.t, elapsed=20)
    assert jumped[0] - command[0] <= (speed + 15 * PERIOD) * PERIOD + 1e-9


def test_transitions_lead_everywhere_and_back():
    assert {mode for mode, _ in TRANSITIONS} == set(Mode) == set(TRANSITIONS.values())
