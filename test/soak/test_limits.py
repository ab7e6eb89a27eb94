"""A million seeded ticks of the gate, and a storm over the whole controller, judged by the commands alone."""
from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from il_policies.contract import load_contract
from il_policies.sim.trajectory import TrajectoryFollower
from il_runtime.core.controller import MAX_MISSED, MAX_PAUSE, SOURCES, Controller
from il_runtime.core.ensembling import MODES, Blending, Chunk, ChunkError, Ensembler
from il_runtime.core.mode import TRANSITIONS, Mode
from support import ROOT
from test_safety import assert_within_limits, drive

PERIOD = 0.02
LEGAL = {(before, after) for (before, _), after in TRANSITIONS.items() if before != after}


def in_two_processes(work: Callable, seeds: range) -> list:
    """work(seed) of every seed; what is raised there is raised here."""
    with ProcessPoolExecutor(2, get_context('spawn')) as pool:
        return list(pool.map(work, seeds))


def drive_the_gate(seed: int) -> None:
    assert_within_limits(drive(seed, 100_000))


@pytest.mark.timeout(1200)
def test_a_million_ticks_of_the_gate(show):
    in_two_processes(drive_the_gate, range(100, 110))
    show('1,000,000 seeded random ticks, stops, limits and bounds near included',
         '0 violations of position, velocity, acceleration', '0')


class Watched(Controller):
    """A controller whose mode may change only as the table says, and in which nothing may break."""

    def __init__(self, *arguments):
        self.seen, self._mode = Counter(), Mode.INACTIVE
        self.was_inactive = True
        super().__init__(*arguments)

    @property
    def mode(self) -> Mode:
        """As the controller's own."""
        return self._mode

    @mode.setter
    def mode(self, after: Mode) -> None:
        if after != self._mode:
            assert (self._mode, after) in LEGAL
            self.seen[self._mode, after] += 1
        self.was_inactive |= after == Mode.INACTIVE
        self._mode = after

    def fault(self, reason: str) -> None:
        """As the controller's own."""
        assert 'internal error' not in reason, reason
        super().fault(reason)


class Storm:
    """Everything that can happen to a controller, drawn at random; odd seeds have an arm behind a trajectory controller.

    `paths`: what it commanded, (time, positions), each from where the arm was by then: time counts the ticks, whatever the
    clocks show.
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        contract = load_contract(ROOT / 'config/robots/so101.yaml')
        self.arm = TrajectoryFollower(np.zeros(6)) if seed % 2 else None
        if self.arm is not None:
            output = dataclasses.replace(contract.action.outputs[0], type='trajectory_msgs/msg/JointTrajectory')
            contract = dataclasses.replace(contract, action=dataclasses.replace(contract.action, outputs=(output,)))
        self.joints = contract.action_joints
        self.lower, self.upper = np.array([joint.position for joint in self.joints]).T
        tolerance = [joint.tracking_tolerance for joint in self.joints]
        self.c = Watched(contract, Ensembler(tolerance, Blending(max_disagreement=1.0)))
        self.now, self.time, self.sequence = 0.0, 0.0, 0
        self.measured, self.taken = np.zeros(6), 0.0
        self.human: np.ndarray | None = None
        self.blind_until = self.stuck_until = -np.inf
        self.paths: list[list[tuple[float, np.ndarray]]] = []

    def chance(self, p: float) -> bool:
        """True with this probability."""
        return self.rng.random() < p

    def somewhere(self) -> np.ndarray:
        """Mostly near the command, or anywhere, also out of bounds. Shape (6,)."""
        if self.chance(0.9):
            return self.c.gate.position + self.rng.normal(size=6) * self.rng.choice([0.0, 0.02, 0.1])
        return self.rng.uniform(self.lower - 0.5, self.upper + 0.5)

    def tick(self) -> None:
        """One control period, or several if the loop was paused."""
        c = self.c
        elapsed = 1 if self.chance(0.995) else int(self.rng.integers(2, 12))
        self.now, self.time = self.now + elapsed * PERIOD, self.time + elapsed * PERIOD
        for happens in (self.services, self.clocks, self.joint_states, self.teleop, self.chunks):
            happens()
        paused = elapsed - 1 > max(MAX_MISSED, MAX_PAUSE / PERIOD)
        if paused:
            self.taken = self.now  # what is on its way is not missed yet
        stands = c.gate.position.copy()
        if not c.was_inactive:
            np.testing.assert_array_equal(stands, self.paths[-1][-1][1], 'between ticks nothing moves')
        command = c.tick(self.now, elapsed)
        if command is not None:
            if c.was_inactive or paused:
                self.begin_path(self.time - (PERIOD if paused else elapsed * PERIOD), stands, c.was_inactive)
            self.paths[-1].append((self.time, command.copy()))
            c.was_inactive = c.mode == Mode.INACTIVE
            if self.arm is not None:
                times, positions, velocities = c.gate.run_out()
                self.arm.follow(self.time, self.time + times, positions, velocities)
            if self.time > self.stuck_until:
                self.measured = command.copy()
        if c.mode not in (Mode.INACTIVE, Mode.FAULT):
            assert self.now - self.taken <= c.max_state_age + 1e-9, 'blind'
        assert c.follows_chunks or c.mode != Mode.POLICY

    def begin_path(self, time: float, stands: np.ndarray, at_rest: bool) -> None:
        """Two set-points that nobody sent: where the arm went by itself since the last one, or stood."""
        before = after = stands
        if self.arm is not None and at_rest:
            self.arm.rest(stands)
        elif self.arm is not None:
            before, after = (self.arm.at(t)[0] for t in (time, time + PERIOD))
        self.paths.append([(time - PERIOD, before), (time, after)])

    def services(self) -> None:
        """Calls and parameters."""
        c = self.c
        if self.chance(0.05 if c.mode == Mode.INACTIVE else 0.002):
            c.arm(self.now, approach=self.chance(0.5))
        for call, p in ((c.hold, 0.001), (c.stop, 0.001), (c.reset_fault, 0.02), (lambda: c.fault('told to'), 0.0005)):
            if self.chance(p):
                call()
        if self.chance(0.005):
            c.speed_scale = self.rng.choice([0.0, 0.2, 0.5, 1.0])
        if self.chance(0.005):
            c.ensembler.switch(Blending(self.rng.choice(MODES), self.rng.uniform(0, 2), self.rng.uniform(0.02, 0.5),
                                        self.rng.choice([1.0, 1e9])), self.now)
        if self.chance(0.002):
            c.reject(self.rng.choice(SOURCES), non_finite=True)

    def clocks(self) -> None:
        """A /clock that stalls or jumps back."""
        if self.chance(0.001):
            self.c.clock_stalled()
        if self.chance(0.001):
            self.now -= self.rng.uniform(0.0, 3.0)
            self.blind_until = self.stuck_until = -np.inf
            self.taken = self.now
            self.c.clock_jumped(self.now)

    def joint_states(self) -> None:
        """Noisy and late, sometimes none, or stuck; while nothing is commanded somebody moves the arm."""
        if self.chance(0.0005):
            self.blind_until = self.now + 0.2
        if self.chance(0.0005):
            self.stuck_until = self.time + 1.0
        if self.now < self.blind_until:
            return
        if self.c.mode == Mode.INACTIVE and self.chance(0.01):
            self.measured = self.rng.uniform(self.lower - 0.2, self.upper + 0.2)
        self.taken = self.now - self.rng.uniform(0.0, 0.04)
        self.c.joint_state(self.taken, self.measured + self.rng.normal(size=6) * 0.003, self.now)

    def teleop(self) -> None:
        """A human comes, moves, jumps, lets go or falls silent."""
        if self.human is None:
            self.human = self.somewhere() if self.chance(0.003) else None
        elif self.chance(0.01):
            self.human = None
            if self.chance(0.7):
                self.c.release()
        else:
            self.human = self.somewhere() if self.chance(0.02) else self.human + self.rng.normal(size=6) * 0.02
            self.c.teleop(self.now, self.human, self.now)

    def chunks(self) -> None:
        """Of this epoch or another; early, late, doubled, short, wild."""
        if not self.chance(0.15):
            return
        rng = self.rng
        steps = np.cumsum(rng.normal(size=(rng.integers(1, 17), 6)) * rng.choice([0.0, 0.02, 0.1]) + rng.normal(size=6) * 0.05,
                          axis=0)
        self.sequence += rng.integers(0, 2)
        chunk = Chunk(self.now + rng.choice([0.0, rng.uniform(-0.5, 0.5)]), rng.choice([0.1, 0.05]), self.somewhere() + steps,
                      self.c.epoch - self.chance(0.05), self.sequence, self.now - 0.05)
        try:
            self.c.add_chunk(chunk, self.now)
        except ChunkError:
            self.c.reject('chunks', non_finite=False)

    def violations(self) -> int:
        """Commands beyond a limit; a joint that was armed outside its bounds may come back."""
        velocity, acceleration = np.array([(joint.velocity, joint.acceleration) for joint in self.joints]).T
        count = 0
        for path in self.paths:
            t, q = np.array([t for t, _ in path]), np.array([q for _, q in path])
            bad = (q < np.minimum(self.lower, q[0])) | (q > np.maximum(self.upper, q[0]))
            v = np.diff(q, axis=0) / np.diff(t)[:, None]
            bad[1:] |= np.abs(v) > velocity * (1 + 1e-6)
            slack = np.full(len(t) - 2, 1e-6)
            if self.arm is not None:
                slack[:2] = 0.05  # the whole milliseconds of a ramp to rest: up to 0.4 mrad off where the arm went by itself
            bad[2:] |= np.abs(np.diff(v, axis=0)) / ((t[2:] - t[:-2]) / 2)[:, None] > acceleration * (1 + slack[:, None])
            count += int(bad.any(axis=1).sum())
        return count


def raise_a_storm(seed: int) -> tuple[Counter, int]:
    """Transitions seen and commands sent in 25,000 ticks, none of which may break a limit."""
    storm = Storm(seed)
    for _ in range(25_000):
        storm.tick()
    assert storm.violations() == 0, f'seed {seed}'
    return storm.c.seen, sum(len(path) - 2 for path in storm.paths)


@pytest.mark.timeout(1200)
def test_a_storm_over_the_whole_controller(show):
    seen, commands = zip(*in_two_processes(raise_a_storm, range(8)), strict=True)
    assert set().union(*seen) == LEGAL, 'the storm must show every transition'
    show('200,000 seeded random ticks of the whole controller: chunks, human, services, clocks, pauses',
         '0 violations, every transition as in the table', f'0 in {sum(commands):,} commands; all {len(LEGAL)} transitions seen')
