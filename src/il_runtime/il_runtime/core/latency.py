"""How long things take, over the last while, in fixed memory: maxima over a whole run are poisoned by one warm-up."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

QUANTILES = (0.5, 0.9, 0.99, 1.0)
"""What diagnostics show; 1 is the largest."""


class Window:
    """The durations of the last `seconds`, at most `capacity` of them. One thread may add while others read."""

    def __init__(self, seconds: float = 30.0, capacity: int = 1024):
        """Raises ValueError for a window that holds nothing."""
        if not seconds > 0 or capacity < 1:
            raise ValueError(f'seconds is {seconds}, must be > 0; capacity is {capacity}, must be at least 1')
        self.seconds = seconds
        self._entries = np.full((capacity, 2), np.nan)  # when, and how long
        self._count = 0

    def add(self, now: float, duration: float) -> None:
        """A duration [s] that was measured at `now` [s]. What was measured before a clock has gone back is forgotten."""
        if now < self._entries[(self._count - 1) % len(self._entries), 0]:
            self._entries[:] = np.nan
        self._entries[self._count % len(self._entries)] = now, duration
        self._count += 1

    def values(self, now: float) -> np.ndarray:
        """The durations that lie in the window at `now`, in no particular order. Shape (N,), [s]."""
        entries = self._entries.copy()
        return entries[entries[:, 0] > now - self.seconds, 1]

    def quantiles(self, now: float, shares: Sequence[float] = QUANTILES) -> np.ndarray | None:
        """Quantiles of what lies in the window at `now`, each a duration that occurred; None if nothing does. Shape as shares."""
        values = self.values(now)
        return np.quantile(values, shares, method='higher') if len(values) else None

    def words(self, now: float) -> str:
        """For diagnostics: p50, p90, p99 and maximum [ms], and of how many."""
        values = self.values(now)
        if not len(values):
            return f'none for {self.seconds:g} s'
        shown = ' / '.join(f'{1e3 * value:.1f}' for value in np.quantile(values, QUANTILES, method='higher'))
        return f'{shown} ms of {len(values)}'
