"""Joint trajectories as a robot follows them: the semantics of ros2_controllers' joint_trajectory_controller, without ROS.

That controller is meant with `interpolate_from_desired_state: true`: a new trajectory goes on from the commanded state, not
from the measured one. One that began in the past is joined from there too, as its manual says; its code jumps onto it.
Unlike that controller, values that are not finite are refused.

Times in [s] on whatever clock the caller keeps, positions in [rad or m], velocities in [rad/s or m/s].
"""
from __future__ import annotations

from bisect import bisect_right

import numpy as np

MAX_MAGNITUDE = 1e4
"""No joint is there, nor that fast: larger numbers are refused, so that no polynomial overflows."""
SAME_TIME = 0.5e-9
"""Half of the nanosecond that messages count in: closer times are one and the same [s]."""
REST_SPEED = float(np.finfo(np.float32).eps)
"""A last point faster than this is refused, as the joint_trajectory_controller does."""
AT_REST = np.eye(4)[None, :, :1]
"""Times a position: the cubic that stays there. Shape (1, 4, 1)."""


class TrajectoryError(ValueError):
    """A command that must be refused whole; the message says what was received and what is valid."""


def arranged(rows, names, joints) -> np.ndarray:
    """Rows of one value for each of `names`, put into the order of `joints`. Shape (N, D).

    Raises TrajectoryError for unknown, missing or doubled names and for rows of another length.
    """
    names = list(names)
    if sorted(names) != sorted(joints):
        raise TrajectoryError(f'joints {names}, must be each of {list(joints)} once')
    wrong = sorted({len(row) for row in rows} - {len(names)})
    if wrong:
        raise TrajectoryError(f'rows of {wrong} values for {len(names)} joints, must be one each')
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))[:, [names.index(joint) for joint in joints]]


class TrajectoryFollower:
    """The commanded motion of D joints; one thread may ask for it while another replaces it."""

    def __init__(self, positions):
        """At rest at `positions`, shape (D,). Raises TrajectoryError if they are not finite."""
        self.joints = len(positions)
        self.rest(positions)

    def rest(self, positions) -> None:
        """Be at `positions`, shape (D,), from now on. Raises TrajectoryError, and changes nothing, unless D finite values."""
        self._path = [0.0], AT_REST * self._checked('positions', [positions])

    def follow(self, now: float, times, positions, velocities=None) -> None:
        """Replace the motion: from its state at `now` through the points, each at its time, then rest at the last one.

        times (N,), absolute; positions (N, D); velocities (N, D), or None. With velocities the motion between points is
        cubic, and continuous in velocity, without it is linear. Points that are not after `now` are skipped.
        Raises TrajectoryError, and changes nothing, for no points, times that do not increase or are over, wrong sizes,
        values that are not finite, and a last point that does not rest.
        """
        times = np.array(times, dtype=np.float64)
        if not len(times):
            raise TrajectoryError('no points, must be at least one')
        if not np.isfinite(times).all() or (np.diff(times) < SAME_TIME).any():
            raise TrajectoryError(f'points at {np.round(times - now, 9).tolist()} s from now, must be one after the other')
        if times[-1] < now:
            raise TrajectoryError(f'ended {now - times[-1]:.3f} s ago, must end in the future')
        positions = self._checked('positions', positions, len(times))
        position, velocity = self.at(now)
        future = times > now + SAME_TIME
        knots = np.concatenate([[now], times[future]])  # (S + 1,)
        p = np.vstack([position, positions[future]])  # (S + 1, D)
        h = np.diff(knots)[:, None]  # (S, 1)
        slope = np.diff(p, axis=0) / h  # (S, D)
        v0 = v1 = slope  # which makes the cubic a straight line
        if velocities is not None:
            velocities = self._checked('velocities', velocities, len(times))
            if (np.abs(velocities[-1]) > REST_SPEED).any():
                raise TrajectoryError(f'velocities {velocities[-1].tolist()} at the last point, must be 0')
            v = np.vstack([velocity, velocities[future]])
            v0, v1 = v[:-1], v[1:]
        cubics = np.stack([p[:-1], v0, (3 * slope - 2 * v0 - v1) / h, (v0 + v1 - 2 * slope) / h**2], axis=1)  # (S, 4, D)
        # One assignment: whoever asks meanwhile gets the old motion or the new one, never a mixture.
        self._path = knots.tolist(), np.concatenate([cubics, AT_REST * positions[-1]])

    def at(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        """Commanded positions and velocities at a time that is not before the last replacement. Shape (D,) each."""
        knots, cubics = self._path
        k = max(bisect_right(knots, now) - 1, 0)
        u = max(now - knots[k], 0.0)
        position, velocity = np.dot([[1.0, u, u * u, u * u * u], [0.0, 1.0, 2 * u, 3 * u * u]], cubics[k])
        return position, velocity

    def _checked(self, what: str, rows, points: int = 1) -> np.ndarray:
        """The rows as an array of shape (points, D). Raises TrajectoryError for wrong sizes or values."""
        rows = np.array(rows, dtype=np.float64)
        if rows.shape != (points, self.joints):
            raise TrajectoryError(f'{what} of shape {rows.shape}, must be ({points}, {self.joints})')
        bad = rows[~(np.abs(rows) <= MAX_MAGNITUDE)]  # NaN compares false
        if len(bad):
            raise TrajectoryError(f'{what} hold {bad.tolist()}, must be finite and within ±{MAX_MAGNITUDE:g}')
        return rows
