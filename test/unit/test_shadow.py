from __future__ import annotations

import re

import numpy as np
import pytest

from il_policies.contract import load_contract
from il_runtime.core.controller import Controller
from il_runtime.core.ensembling import Chunk, Ensembler
from il_runtime.core.mode import Mode
from il_runtime.core.shadow import COMMANDED, MEASURED, Comparison, Track

PERIOD = 0.02
JOINTS = ('a', 'b')


# --- the controller as a shadow ------------------------------------------------------------------------------------------
class Shadow:
    """A shadow beside an arm that somebody else moves; only joint 0 does."""

    def __init__(self, root):
        self.contract = load_contract(root / 'config/robots/so101.yaml')
        ensembler = Ensembler([j.tracking_tolerance for j in self.contract.action_joints])
        self.controller = Controller(self.contract, ensembler, shadow=True)
        self.t, self.modes, self.reasons, self.sent = 0.0, [], [], []

    def run(self, seconds, arm=0.0):
        """arm: where the arm is, a number or a function of time; None: it is not heard of."""
        for _ in range(round(seconds / PERIOD)):
            self.t += PERIOD
            if arm is not None:
                measured = np.zeros(6)
                measured[0] = arm(self.t) if callable(arm) else arm
                self.controller.joint_state(self.t, measured, self.t)
            command = self.controller.tick(self.t)
            if command is not None:
                self.sent.append(command[0])
            self.modes.append(self.controller.mode)
            self.reasons.append(self.controller.reason)

    def plan(self, values, sequence=0, period=0.1):
        positions = np.zeros((len(values), 6))
        positions[:, 0] = values
        self.controller.add_chunk(Chunk(self.t, period, positions, self.controller.epoch, sequence, self.t), self.t)


@pytest.fixture
def shadow(root):
    return Shadow(root)


def test_a_controller_does_not_arm_itself(root):
    contract = load_contract(root / 'config/robots/so101.yaml')
    controller = Controller(contract, Ensembler(np.ones(6)))
    controller.joint_state(0.02, np.zeros(6), 0.02)
    assert controller.tick(0.02) is None and controller.mode == Mode.INACTIVE


def test_a_shadow_arms_itself_once_joint_states_come(shadow):
    shadow.run(0.2, arm=None)
    assert set(shadow.modes) == {Mode.INACTIVE} and not shadow.sent
    assert shadow.reasons[-1] == 'arms itself when it can: no fresh joint states'
    epoch = shadow.controller.epoch
    shadow.run(0.02)
    assert shadow.modes[-1] == Mode.HOLD and shadow.controller.epoch == epoch + 1
    assert shadow.reasons[-1].startswith('armed by itself; before: ')


def test_at_rest_it_stands_where_the_arm_is_and_the_policy_begins_there(shadow):
    shadow.run(2.0, arm=lambda t: 0.6 * t)  # nobody plans; a human moves the arm four tolerances away
    assert shadow.modes[-1] == Mode.HOLD and shadow.controller.gate.position[0] == pytest.approx(1.2)
    assert shadow.controller.begun_anew == 0 and shadow.controller.would_fault == 0
    shadow.plan(1.2 + np.linspace(0, 0.3, 16))
    shadow.run(0.1, arm=1.2)
    assert shadow.modes[-1] == Mode.POLICY


def test_a_first_command_far_from_the_arm_is_refused_as_it_would_be(shadow):
    shadow.run(0.1)
    shadow.plan(np.full(16, 0.5))
    shadow.run(0.5)
    assert set(shadow.modes) == {Mode.HOLD} and shadow.reasons[-1].startswith('first command refused: shoulder_pan')


def test_when_the_arm_goes_another_way_it_begins_anew_there_and_says_so(shadow):
    shadow.run(0.1)
    shadow.plan(np.linspace(0, 1.5, 16))
    shadow.run(1.0)  # the arm stays: the policy is 1 rad further, the tolerance is 0.3
    said = [(mode, reason) for mode, reason in zip(shadow.modes, shadow.reasons) if 'begun anew' in reason]
    assert said == [(Mode.HOLD, "begun anew at the measured pose: the arm has gone another way: ('shoulder_pan',)")]
    assert shadow.controller.begun_anew == 1 and Mode.FAULT not in shadow.modes
    assert 0.3 < max(shadow.sent) < 0.36 and shadow.sent[-1] == 0.0
    shadow.plan(np.linspace(0, 0.2, 16), sequence=1)  # planned from where the arm is: the policy goes on
    shadow.run(0.2)
    assert shadow.modes[-1] == Mode.POLICY


def test_it_never_faults_for_an_arm_that_does_not_follow(shadow):
    """Ten seconds of a policy that wants to go where the arm never is."""
    shadow.run(0.1)
    for sequence in range(25):
        shadow.plan(np.linspace(0, 1.5, 16), sequence)
        shadow.run(0.4)
    assert Mode.FAULT not in shadow.modes and shadow.controller.would_fault == 0
    assert shadow.controller.begun_anew > 10 and shadow.modes.count(Mode.POLICY) > 100


def test_a_command_that_lags_is_told_and_no_fault(shadow):
    shadow.run(0.1)
    shadow.plan(np.r_[0.0, np.linspace(0.3, 12, 15)])  # 8 rad/s: the limit is 2.5
    shadow.run(1.0, arm=lambda t: shadow.controller.gate.position[0])  # an arm that follows
    told = [reason for reason in shadow.reasons if reason.startswith('begun anew')]
    assert told and told[0] == ('begun anew at the measured pose: a controller would have faulted: the command lags behind what '
                                "is asked for: ('shoulder_pan',)")
    assert shadow.controller.would_fault == 1 and Mode.FAULT not in shadow.modes


def test_blind_it_stops_says_so_and_goes_on_by_itself_when_it_sees_again(shadow):
    shadow.run(0.1)
    shadow.plan(np.linspace(0, 0.2, 16))
    shadow.run(0.2)
    assert shadow.modes[-1] == Mode.POLICY
    epoch = shadow.controller.epoch
    shadow.run(3.0, arm=None)
    assert shadow.modes[-1] == Mode.FAULT and shadow.reasons[-1] == 'joint states older than 0.100 s'
    assert shadow.controller.would_fault == 1
    shadow.run(0.02, arm=0.7)
    assert shadow.modes[-1] == Mode.HOLD and shadow.controller.gate.position[0] == 0.7 and shadow.controller.epoch == epoch + 1
    assert 'joint states older than 0.100 s' in shadow.reasons[-1]


def test_a_fault_is_shown_for_a_second(shadow):
    shadow.run(0.1)
    shadow.controller.fault('bad numbers')
    shadow.run(0.98)
    assert set(shadow.modes[5:]) == {Mode.FAULT} and shadow.controller.begun_anew == 0
    shadow.run(0.1)
    assert shadow.modes[-1] == Mode.HOLD and shadow.controller.would_fault == 1


def test_a_fault_far_from_the_arm_is_no_new_beginning(shadow):
    shadow.run(0.1)
    shadow.controller.fault('bad numbers')
    shadow.run(0.5, arm=1.0)
    assert set(shadow.modes[5:]) == {Mode.FAULT} and shadow.controller.begun_anew == 0


@pytest.mark.parametrize('tell', ['stop', 'hold'])
def test_told_to_stop_or_hold_it_waits_to_be_armed(shadow, tell):
    shadow.run(0.1)
    assert getattr(shadow.controller, tell)()[0]
    shadow.run(0.5)
    shadow.run(2.0, arm=None)  # a held one faults, and stays there
    shadow.run(1.5)
    assert shadow.modes[-1] == (Mode.INACTIVE if tell == 'stop' else Mode.FAULT)
    if tell == 'hold':
        assert shadow.controller.reset_fault()[0]
    assert shadow.controller.arm(shadow.t)[0]
    shadow.run(0.5, arm=None)
    shadow.run(1.5)
    assert shadow.modes[-1] == Mode.HOLD, 'armed, it looks after itself again'


# --- comparison ----------------------------------------------------------------------------------------------------------
def comparison(max_state_age=0.1) -> Comparison:
    return Comparison(JOINTS, np.array([0.5, 0.1]), PERIOD, max_state_age)


def plan(start, function, steps=16, period=0.1, observed=None) -> Chunk:
    times = start + period * np.arange(steps)
    positions = np.stack([function(times), np.zeros(steps)], axis=1)
    return Chunk(start, period, positions, 1, 0, start if observed is None else observed)


def test_a_prediction_is_compared_with_where_the_arm_then_is():
    """A policy that wants 0.2 rad/s beside a human at 0.5 rad/s: after h seconds they are 0.3·h apart."""
    c = comparison()
    for k in range(11):
        c.chunk(plan(0.1 * k, lambda t, k=k: 0.05 * k + 0.2 * (t - 0.1 * k)))
    for i in range(300):
        c.measured(0.007 + 0.01 * i, np.array([0.5 * (0.007 + 0.01 * i), 0.02]))
    new = c.settle()
    for horizon in (0.1, 0.2, 0.5, 1.0):
        error = c.errors[f'in {horizon:g} s']
        assert error.count == 11
        np.testing.assert_allclose(error.rms, [0.3 * horizon, 0.02], atol=1e-12)
        np.testing.assert_allclose(error.worst, [0.3 * horizon, 0.02], atol=1e-12)
        assert all(e[0] < 0 for _, e in new[f'in {horizon:g} s']), 'the policy is behind'
    assert c.errors['in 2 s'].count == 0, 'beyond the chunk'
    assert c.in_tolerances('in 0.5 s') == (pytest.approx(0.3), pytest.approx(0.3), 'a')
    assert c.in_tolerances('in 0.1 s') == (pytest.approx(0.2), pytest.approx(0.2), 'b'), 'in units of the joint, not in radians'


def test_rms_and_worst_are_those_of_all_comparisons():
    rng = np.random.default_rng(0)
    wanted, done = rng.normal(size=(2, 200, 2))
    c = comparison()
    for i in range(200):
        c.target(PERIOD * i, wanted[i])
        c.commanded(PERIOD * i, done[i])
    c.settle()
    error = c.errors[COMMANDED]
    np.testing.assert_allclose(error.rms, np.sqrt(((wanted - done) ** 2).mean(axis=0)))
    np.testing.assert_allclose(error.worst, np.abs(wanted - done).max(axis=0))


def test_commands_of_another_process_fall_between_ticks():
    """Targets every 20 ms, commands 7 ms later: compared at the command's own time, whichever arrives first."""
    first, last = comparison(), comparison()
    commands = [(PERIOD * i + 0.007, np.array([np.sin(PERIOD * i + 0.007), 0.0])) for i in range(99)]
    targets = [(PERIOD * i, np.array([np.sin(PERIOD * i) + 0.1, 0.0])) for i in range(100)]
    for command in commands:
        first.commanded(*command)
    assert first.settle() == {}, 'nothing to compare with yet'
    for target in targets:
        for c in (first, last):
            c.target(*target)
    for command in commands:
        last.commanded(*command)
    for c in (first, last):
        new = c.settle()[COMMANDED]
        assert [t for t, _ in new] == [t for t, _ in commands]
        np.testing.assert_allclose([e for _, e in new], np.tile([0.1, 0.0], (99, 1)), atol=1e-4)
        assert c.settle() == {}, 'once'


def test_what_no_chunk_covers_and_what_nobody_saw_is_not_compared():
    c = comparison()
    for i in range(10):
        c.target(PERIOD * i, None if i == 5 else np.zeros(2))
    c.target(1.0, np.zeros(2))
    for t in (-0.01, 0.09, 0.10, 0.11, 0.5):  # before all, beside a tick without target, on it, and in a gap
        c.commanded(t, np.ones(2))
    assert c.settle() == {} and c.errors[COMMANDED].count == 0
    c.chunk(plan(0.0, np.zeros_like))
    c.measured(0.05, np.zeros(2))
    c.measured(0.55, np.zeros(2))  # half a second of silence: 0.1 s is allowed
    c.measured(1.02, np.zeros(2))
    assert not any(name.startswith('in ') for name in c.settle())


def test_a_chunk_counts_only_where_it_reaches():
    c = comparison()
    c.chunk(plan(0.3, np.ones_like, steps=3, observed=0.0))  # 0.3 to 0.5 s after its observation
    for i in range(300):
        c.measured(0.01 * i, np.zeros(2))
    assert {name: len(errors) for name, errors in c.settle().items()} == {'in 0.5 s': 1}


def test_after_a_jump_of_the_clock_nothing_old_is_compared_and_the_errors_stay():
    c = comparison()
    c.target(9.0, np.ones(2))
    c.measured(9.0, np.zeros(2))
    c.settle()
    c.chunk(plan(9.0, np.ones_like))
    c.forget()
    for i in range(300):
        c.measured(0.01 * i, np.zeros(2))
    assert c.settle() == {} and c.errors[MEASURED].count == 1


def test_memory_is_bounded():
    c, track = comparison(), Track(0.1)
    for i in range(20_000):
        c.chunk(plan(PERIOD * i, np.ones_like))
        c.commanded(PERIOD * i, np.zeros(2))
        track.add(PERIOD * i, np.zeros(2))
    assert max(len(waiting) for waiting in c._waiting.values()) <= 2000
    assert len(track._times) == len(track._positions) <= 501
    assert track.at(PERIOD * 19_999) is not None and track.at(PERIOD * 10) is None


def test_a_track_ignores_what_is_not_newer():
    track = Track(0.1)
    for t, x in ((0.0, 0.0), (0.05, 1.0), (0.02, 9.0), (0.05, 9.0), (0.1, 2.0)):
        track.add(t, np.array([x]))
    assert [track.at(t)[0] for t in (0.0, 0.025, 0.05, 0.075)] == [0.0, 0.5, 1.0, 1.5]


def test_the_report_is_a_table_of_what_was_compared():
    c = comparison()
    assert c.report() == ['nothing to compare: no chunk covered a time for which joint states or commands are known']
    for i in range(3):
        c.target(PERIOD * i, np.array([0.1, -0.02]))
        c.commanded(PERIOD * i, np.zeros(2))
    c.settle()
    rows = [re.split(r'  +', line) for line in c.report()]
    assert rows == [['RMS / worst', COMMANDED], ['a', '0.1000 / 0.1000'], ['b', '0.0200 / 0.0200'],
                    ['in tolerances', '0.20 / 0.20'], ['compared', '3']]
