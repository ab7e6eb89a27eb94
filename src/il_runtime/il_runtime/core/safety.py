"""The last stage before the wire: whatever is asked for, the command stays within the limits of every joint.

Clamping position, velocity and acceleration tick by tick is not enough: a joint that is fast when it meets its bound cannot
stop. Here a velocity is only allowed if a full stop at the acceleration limit still fits before the bound, in discrete time.
"""
from __future__ import annotations

import numpy as np

from il_policies.contract import Contract


def stopping_speed(distance: np.ndarray, acceleration: np.ndarray, period: float) -> np.ndarray:
    """Largest speed for the next tick after which a stop still fits within ``distance``. Same shape, >= 0.

    With ticks of length P and deceleration a, a joint at speed v = (n + f)·a·P (n whole, 0 <= f < 1) travels
    P·((n + 1)·v − a·P·n·(n + 1)/2) until rest, this tick included. The inverse of that piecewise linear function.
    distance [rad or m], acceleration [rad/s² or m/s²], period [s].
    """
    distance = np.maximum(distance, 0.0)
    quantum = acceleration * period * period
    n = np.floor((np.sqrt(1.0 + 8.0 * distance / quantum) - 1.0) / 2.0)
    return (distance / period + acceleration * period * n * (n + 1.0) / 2.0) / (n + 1.0)


class Gate:
    """Commanded motion of D joints, advanced one tick at a time within position, velocity and acceleration limits.

    Velocity and acceleration are those of the commanded positions: differences over one tick.
    """

    def __init__(self, lower, upper, velocity, acceleration, period: float):
        """Limits per joint, shape (D,) each [rad, rad/s, rad/s², or m]; period of a tick [s]."""
        self.lower, self.upper = np.asarray(lower, float), np.asarray(upper, float)
        self.max_velocity, self.max_acceleration = np.asarray(velocity, float), np.asarray(acceleration, float)
        self.period = period
        self.rest((self.lower + self.upper) / 2)

    def rest(self, positions) -> None:
        """Start anew, at rest at these positions, shape (D,). Raises ValueError if they are not finite or out of limits."""
        positions = np.array(positions, dtype=np.float64)
        if not np.isfinite(positions).all() or (positions < self.lower).any() or (positions > self.upper).any():
            raise ValueError(f'cannot rest at {positions}: not finite or outside [{self.lower}, {self.upper}]')
        self.position, self.velocity = positions, np.zeros_like(positions)
        self._target = positions

    def step(self, target: np.ndarray | None) -> bool:
        """Move one tick towards ``target``, shape (D,), or stop if None. True if a limit held the command back.

        A target that moves within the limits is followed without lag; after a jump the joint approaches it at the largest
        speed from which it can still meet the target's own motion. Raises ValueError for a non-finite target.
        """
        if target is None:
            wanted, self._target = np.zeros_like(self.velocity), None
        else:
            target = np.asarray(target, dtype=np.float64)
            if not np.isfinite(target).all():  # np.clip would pass NaN on
                raise ValueError(f'target is not finite: {target}')
            asked, target = target, np.clip(target, self.lower, self.upper)
            before = target if self._target is None else self._target
            feed_forward = np.clip((target - before) / self.period, -self.max_velocity, self.max_velocity)
            gap = target - self.position - feed_forward * self.period
            wanted = feed_forward + np.sign(gap) * stopping_speed(np.abs(gap), self.max_acceleration, self.period)
            self._target = target
        change = self.max_acceleration * self.period
        low = np.maximum(self.velocity - change, -self.max_velocity)
        high = np.minimum(self.velocity + change, self.max_velocity)
        low = np.maximum(low, -stopping_speed(self.position - self.lower, self.max_acceleration, self.period))
        high = np.minimum(high, stopping_speed(self.upper - self.position, self.max_acceleration, self.period))
        velocity = np.minimum(np.maximum(wanted, low), high)
        position = self.position + velocity * self.period
        # Rounding may carry the last bit over the bound; the bound is exact.
        self.position = np.minimum(np.maximum(position, self.lower), self.upper)
        self.velocity = velocity
        if target is None:
            return False
        return bool(np.any(np.abs(self.position - asked) > 1e-9))

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
