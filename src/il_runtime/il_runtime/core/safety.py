"""The last stage before the wire: whatever is asked for, the command stays within the limits of every joint.

Clamping position, velocity and acceleration tick by tick is not enough: a joint that is fast when it meets its bound cannot
stop. Here a velocity is only allowed if a full stop at the acceleration limit still fits before the bound, in discrete time.
"""
from __future__ import annotations

import numpy as np
from ruckig import ControlInterface, InputParameter, Result, Ruckig, RuckigError, Synchronization, Trajectory

from il_policies.contract import Contract


def stopping_speed(distance: np.ndarray, acceleration: np.ndarray, period: float) -> np.ndarray:
    """Largest speed for the next tick after which a stop still fits within ``distance``. Same shape, >= 0.

    |v| ≤ √(2·a·distance), discretised: with ticks of length P, the v that solves v·P + v²/(2a) = distance, so that after the
    tick even a stop in continuous time fits (a robot that hears nothing more brakes so). Braking by a·P a tick keeps it true.
    distance [rad or m], acceleration [rad/s² or m/s²], period [s].
    """
    per_tick = acceleration * period
    return np.sqrt(per_tick**2 + 2.0 * acceleration * np.maximum(distance, 0.0)) - per_tick


class Ramp:
    """A planned motion to rest: where D joints shall be at a time."""

    def __init__(self, began: float, trajectory: Trajectory):
        """began: time at which the trajectory starts [s]."""
        self._began, self._trajectory = began, trajectory
        self.end = began + trajectory.duration

    def at(self, t: float) -> np.ndarray:
        """Positions at time t [s], held beyond both ends. Shape (D,)."""
        return np.array(self._trajectory.at_time(min(max(t - self._began, 0.0), self._trajectory.duration))[0])


class Gate:
    """Commanded motion of D joints, advanced one tick at a time within position, velocity and acceleration limits.

    Velocity and acceleration are those of the commanded positions: differences over one tick.
    """

    def __init__(self, lower, upper, velocity, acceleration, period: float):
        """Limits per joint, shape (D,) each [rad, rad/s, rad/s², or m]; period of a tick [s]."""
        self.lower, self.upper = np.asarray(lower, float), np.asarray(upper, float)
        self.max_velocity, self.max_acceleration = np.asarray(velocity, float), np.asarray(acceleration, float)
        self.period = period
        self._change = self.max_acceleration * period
        self._planner, self._motion = Ruckig(len(self.lower)), InputParameter(len(self.lower))
        self._motion.max_jerk = [np.inf] * len(self.lower)
        self.rest((self.lower + self.upper) / 2)

    def rest(self, positions) -> None:
        """Start anew, at rest at these positions, shape (D,). Raises ValueError if they are not finite.

        A joint that starts beyond a limit is never pushed: it may only move back.
        """
        positions = np.array(positions, dtype=np.float64)
        if not np.isfinite(positions).all():
            raise ValueError(f'cannot rest at {positions}: not finite')
        self.position, self.velocity = positions, np.zeros_like(positions)
        self._change_of_velocity = np.zeros_like(positions)
        self.clamped = np.zeros(len(positions), dtype=bool)
        self.lag = np.zeros_like(positions)
        self._target = positions

    def step(self, target: np.ndarray | None, speed: float = 1.0) -> np.ndarray:
        """Move one tick towards ``target``, shape (D,), or stop if None; the new position, shape (D,).

        speed: share of the velocity limits that may be used, 0 to 1. Afterwards `clamped` tells which joints a limit held
        back, and `lag` by how much. A target that moves within the limits is followed without lag; after a jump the joint
        approaches it at the largest speed from which it can still meet the target's own motion.
        Raises ValueError for a non-finite target; the gate then stays as it is.
        """
        lowest, highest = np.minimum(self.lower, self.position), np.maximum(self.upper, self.position)
        if target is None:
            wanted, asked, self._target = np.zeros_like(self.velocity), None, None
        else:
            asked = np.asarray(target, dtype=np.float64)
            if not np.isfinite(asked).all():  # minimum and maximum would pass NaN on
                raise ValueError(f'target is not finite: {asked}')
            target = np.minimum(np.maximum(asked, lowest), highest)
            before = target if self._target is None else self._target
            feed_forward = np.minimum(np.maximum((target - before) / self.period, -self.max_velocity), self.max_velocity)
            gap = target - self.position - feed_forward * self.period
            wanted = feed_forward + np.sign(gap) * stopping_speed(np.abs(gap), self.max_acceleration, self.period)
            self._target = target
        change = self._change
        # A lower speed is reached by braking, not at once.
        most = np.maximum(self.max_velocity * speed, np.abs(self.velocity) - change)
        low, high = np.maximum(self.velocity - change, -most), np.minimum(self.velocity + change, most)
        low = np.maximum(low, -stopping_speed(self.position - self.lower, self.max_acceleration, self.period))
        high = np.minimum(high, stopping_speed(self.upper - self.position, self.max_acceleration, self.period))
        before = self.velocity
        self.velocity = np.minimum(np.maximum(wanted, low), high)
        self._change_of_velocity = self.velocity - before
        # Rounding may carry the last bit over the bound; the bound is exact.
        self.position = position = np.minimum(np.maximum(self.position + self.velocity * self.period, lowest), highest)
        self.lag = np.zeros_like(position) if asked is None else np.abs(asked - self.position)
        self.clamped = self.lag > 1e-9
        return self.position

    def stop_ramp(self, now: float) -> Ramp:
        """A stop from where the command stands at ``now`` [s].

        All joints come to rest together, which keeps the direction of the motion, unless one would leave its limits; then each
        brakes as hard as it may. As every ramp it is a target for `step`, which has the last word. Raises RuntimeError if Ruckig
        finds none.
        """
        self._motion.control_interface = ControlInterface.Velocity
        self._motion.synchronization = Synchronization.Phase
        ramp = self._plan(now, self.max_velocity, self.max_acceleration)
        rest = ramp.at(ramp.end)
        if (rest < self.lower).any() or (rest > self.upper).any():
            self._motion.synchronization = Synchronization.No
            ramp = self._plan(now, self.max_velocity, self.max_acceleration)
        return ramp

    def approach_ramp(self, now: float, goal: np.ndarray, speed: float) -> Ramp:
        """A straight way in joint space to ``goal``, shape (D,), clipped to the limits.

        At a share ``speed`` of the velocity and acceleration limits, from ``now`` [s]. Raises RuntimeError if Ruckig finds none.
        """
        self._motion.control_interface, self._motion.synchronization = ControlInterface.Position, Synchronization.Phase
        self._motion.target_position = np.clip(goal, self.lower, self.upper)
        return self._plan(now, self.max_velocity * speed, self.max_acceleration * speed)

    def _plan(self, now: float, velocity: np.ndarray, acceleration: np.ndarray) -> Ramp:
        motion, trajectory = self._motion, Trajectory(len(self.lower))
        motion.current_position, motion.current_velocity = self.position, self.velocity
        motion.target_velocity = np.zeros_like(self.velocity)
        motion.max_velocity, motion.max_acceleration = velocity, acceleration
        try:
            result = self._planner.calculate(motion, trajectory)
        except (RuckigError, ValueError) as error:  # its binding does not know all results
            raise RuntimeError(f'no motion planned: {error}') from None
        if result not in (Result.Working, Result.Finished):
            raise RuntimeError(f'no motion planned: {result}')
        self._target = self.position  # the ramp starts here, whatever was asked for before
        return Ramp(now, trajectory)

    def run_out(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a robot shall do that hears nothing more: this set-point, one tick at its velocity, a ramp to rest.

        Times from now [s], shape (N,), strictly rising; positions and velocities, shape (N, D). Exact for cubic
        interpolation: between the moments at which joints come to rest all accelerations are constant.
        """
        velocity = self._velocity_at_set_point()
        if not velocity.any():
            return np.array([self.period]), self.position[None], np.zeros((1, len(velocity)))
        braking = np.abs(velocity) / self.max_acceleration
        # In whole milliseconds, since stamps must rise, and upwards, since a joint must be at rest where its ramp ends.
        knots = np.unique(np.ceil(braking[braking > 0] * 1e3) * 1e-3)
        positions, velocities = self._braking(velocity, knots[:, None])
        velocities[-1] = 0.0
        times = np.concatenate([[self.period, 2 * self.period], 2 * self.period + knots])
        return (times, np.vstack([self.position, self.position + velocity * self.period, positions]),
                np.vstack([velocity, velocity, velocities]))

    def pause(self, ticks: int, runs_out: np.ndarray) -> None:
        """The robot has heard nothing for so many ticks (two or more).

        Joints in `runs_out`, shape (D,), have gone on as `run_out` said, the others stand where they were told to be.
        """
        velocity = self._velocity_at_set_point()
        since = (ticks - 1) * self.period  # of the two ticks before the ramp begins one passes as a set-point is reached
        after, _ = self._braking(velocity, since)
        before, _ = self._braking(velocity, max(since - self.period, 0.0))
        self._change_of_velocity = np.zeros_like(velocity)
        self.velocity = np.where(runs_out, (after - before) / self.period, 0.0)
        self.position = np.where(runs_out, after, self.position)

    def _velocity_at_set_point(self) -> np.ndarray:
        """Velocity at the very moment of the set-point, where `velocity` is the mean of the tick before it. Shape (D,)."""
        low = -stopping_speed(self.position - self.lower, self.max_acceleration, self.period)
        high = stopping_speed(self.upper - self.position, self.max_acceleration, self.period)
        velocity = self.velocity + 0.5 * self._change_of_velocity
        velocity[velocity * self.velocity <= 0] = 0.0  # it comes to rest within the tick, and does not turn round
        most = self.max_velocity
        return np.minimum(np.maximum(velocity, np.maximum(low, -most)), np.minimum(high, most))

    def _braking(self, velocity: np.ndarray, since) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities after a tick at this velocity and `since` [s] of braking."""
        braking = np.maximum(np.abs(velocity) / self.max_acceleration, 1e-12)
        passed = np.minimum(since, braking)
        return (self.position + velocity * (self.period + passed * (1.0 - 0.5 * passed / braking)),
                velocity * (1.0 - passed / braking))

    @property
    def stopping_time(self) -> float:
        """Time a stop from here takes at the acceleration limits [s]."""
        return float(np.max(np.abs(self.velocity) / self.max_acceleration)) + self.period

    @property
    def at_rest(self) -> bool:
        """True when no joint is commanded to move."""
        return not self.velocity.any()


def limit_violations(contract: Contract, commands: np.ndarray, stamps: np.ndarray | None = None) -> int:
    """Commands beyond a limit, judged by their differences alone, whoever made them; for tests and reports.

    commands: (N, D) in action order. stamps: (N,) [s], or None for one control period apart; a command that came a period
    late is judged by the time it took. A relative 1e-6 is let pass for rounding.
    """
    if len(commands) < 1:
        return 0
    joints = contract.action_joints
    dt = np.full(len(commands) - 1, 1.0 / contract.control_rate) if stamps is None else np.diff(stamps)
    low, high = np.array([joint.position for joint in joints]).T
    bad = (commands < low) | (commands > high)
    velocity = np.diff(commands, axis=0) / dt[:, None]
    bad[1:] |= np.abs(velocity) > np.array([joint.velocity for joint in joints]) * (1 + 1e-6)
    between = ((dt[1:] + dt[:-1]) / 2)[:, None]
    bad[2:] |= np.abs(np.diff(velocity, axis=0) / between) > np.array([joint.acceleration for joint in joints]) * (1 + 1e-6)
    return int(bad.any(axis=1).sum())
