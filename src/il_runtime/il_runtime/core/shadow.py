"""What a policy would have done against what was done: a shadow's predictions and targets beside the human's motion."""
from __future__ import annotations

from bisect import bisect_left
from collections import deque

import numpy as np

from il_runtime.core.ensembling import Chunk

HORIZONS = (0.1, 0.2, 0.5, 1.0, 2.0)
"""So long after its observation a chunk is compared with where the arm then is [s], as far as it reaches."""
REMEMBERED = 5.0
"""What is older cannot be compared any more [s]."""
COMMANDED, MEASURED = 'target - command', 'target - arm'
"""The ensembled target against what the human's system commands at the same moment, and against where the arm is."""


class Track:
    """A motion of the last seconds: D joints at times that rise."""

    def __init__(self, max_gap: float):
        """Samples further apart than `max_gap` [s] say nothing about the time between them."""
        self._max_gap = max_gap
        self._times: list[float] = []
        self._positions: list[np.ndarray] = []

    def add(self, t: float, positions: np.ndarray) -> None:
        """Positions at time t [s], shape (D,); NaN where there are none. What is not newer than the last is ignored."""
        if self._times and t <= self._times[-1]:
            return
        self._times.append(t)
        self._positions.append(positions)
        if self._times[0] < t - 2 * REMEMBERED:  # half of it at a time, which keeps the cost of a sample constant
            keep = bisect_left(self._times, t - REMEMBERED)
            del self._times[:keep], self._positions[:keep]

    def reaches(self, t: float) -> bool:
        """True once `at` can tell about time t [s]."""
        return bool(self._times) and self._times[-1] >= t

    def at(self, t: float) -> np.ndarray | None:
        """Positions at time t [s], linear between samples, shape (D,); None in a gap, before the first, beyond the last."""
        i = bisect_left(self._times, t)
        if i == len(self._times):
            return None
        if self._times[i] == t:
            found = self._positions[i]
        elif i == 0 or self._times[i] - self._times[i - 1] > self._max_gap:
            return None
        else:
            share = (t - self._times[i - 1]) / (self._times[i] - self._times[i - 1])
            found = (1 - share) * self._positions[i - 1] + share * self._positions[i]
        return found if np.isfinite(found).all() else None


class Error:
    """Errors of D joints, summed up."""

    def __init__(self, joints: int):
        self.count = 0
        self.worst = np.zeros(joints)
        """Largest distance so far [rad or m]. Shape (D,)."""
        self._squares = np.zeros(joints)

    def add(self, error: np.ndarray) -> None:
        """Count an error, shape (D,)."""
        self.count += 1
        self._squares += error**2
        self.worst = np.maximum(self.worst, np.abs(error))

    @property
    def rms(self) -> np.ndarray:
        """Root of the mean square [rad or m]. Shape (D,); 0 before the first."""
        return np.sqrt(self._squares / max(self.count, 1))


class Comparison:
    """Chunks, targets, commands and joint positions in, as they come; errors out. Times are seconds of one clock.

    Positive: the policy would have gone further than was gone. Not thread-safe.
    """

    def __init__(self, joints: tuple[str, ...], tolerance: np.ndarray, period: float, max_state_age: float):
        """Joints are compared in units of tolerance [rad or m], shape (D,); period of targets [s].

        Joint positions further apart than `max_state_age` [s] say nothing about the time between them.
        """
        self.joints, self.tolerance = joints, tolerance
        self.chunks = 0
        self.errors: dict[str, Error] = {COMMANDED: Error(len(joints)), MEASURED: Error(len(joints)),
                                         **{_name(horizon): Error(len(joints)) for horizon in HORIZONS}}
        self._gaps = 2.5 * period, max_state_age
        self.forget()

    def forget(self) -> None:
        """Drop what is not compared yet, as after a jump of the clock; the errors stay."""
        self._targets, self._arm = (Track(gap) for gap in self._gaps)
        # Bounded: who is never answered, because the arm or the policy has fallen silent, is not kept.
        self._waiting: dict[str, deque] = {name: deque(maxlen=2000) for name in self.errors}

    def chunk(self, chunk: Chunk) -> None:
        """A chunk the shadow follows: where the arm will be is what it is compared with."""
        self.chunks += 1
        for horizon in HORIZONS:
            t = chunk.observed + horizon
            if chunk.start - 1e-9 <= t <= chunk.end + 1e-9:
                self._waiting[_name(horizon)].append((t, chunk.at(t)))

    def target(self, t: float, positions: np.ndarray | None) -> None:
        """The ensembled target at time t [s], shape (D,); None where no chunk covers it."""
        self._targets.add(t, np.full(len(self.joints), np.nan) if positions is None else positions)

    def measured(self, t: float, positions: np.ndarray) -> None:
        """Where the arm was at time t [s], shape (D,)."""
        self._arm.add(t, positions)
        self._waiting[MEASURED].append((t, positions))

    def commanded(self, t: float, positions: np.ndarray) -> None:
        """What the human's system commanded at time t [s], shape (D,)."""
        self._waiting[COMMANDED].append((t, positions))

    def settle(self) -> dict[str, list[tuple[float, np.ndarray]]]:
        """Compare what can be compared by now: name of the comparison → times [s] and errors (D,)."""
        new: dict[str, list[tuple[float, np.ndarray]]] = {}
        for name, waiting in self._waiting.items():
            predicted = name not in (COMMANDED, MEASURED)
            track = self._arm if predicted else self._targets
            still = []
            for t, positions in waiting:
                if not track.reaches(t):
                    still.append((t, positions))
                elif (there := track.at(t)) is not None:
                    error = positions - there if predicted else there - positions
                    self.errors[name].add(error)
                    new.setdefault(name, []).append((t, error))
            waiting.clear()
            waiting.extend(still)
        return new

    def in_tolerances(self, name: str) -> tuple[float, float, str]:
        """Of a comparison: largest RMS and worst error of a joint, in tolerances, and the joint of the worst."""
        error = self.errors[name]
        worst = error.worst / self.tolerance
        return float((error.rms / self.tolerance).max()), float(worst.max()), self.joints[int(worst.argmax())]

    def report(self) -> list[str]:
        """A table of all comparisons that were made: RMS / worst error, by joint and in tolerances."""
        made = [name for name, error in self.errors.items() if error.count]
        if not made:
            return ['nothing to compare: no chunk covered a time for which joint states or commands are known']
        rows = [['RMS / worst', *made]]
        rows += [[joint, *(f'{self.errors[name].rms[i]:.4f} / {self.errors[name].worst[i]:.4f}' for name in made)]
                 for i, joint in enumerate(self.joints)]
        rows.append(['in tolerances', *('{:.2f} / {:.2f}'.format(*self.in_tolerances(name)) for name in made)])
        rows.append(['compared', *(str(self.errors[name].count) for name in made)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return ['  '.join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
                for row in rows]


def _name(horizon: float) -> str:
    return f'in {horizon:g} s'
