"""The loop's clock, and how the stamps of messages get onto it: once, on receipt."""
from __future__ import annotations

from collections.abc import Callable

MAX_STAMP_OFFSET = 1.0
"""A message whose stamp is further than this from now was stamped by another clock [s]."""
SLEW = 0.001, 0.05
"""Differences between two clocks that are followed at once: while nothing moves, and while something does [s]."""


class StampError(ValueError):
    """A stamp of another clock; the message says by how much it is off."""


class LoopClock:
    """Loop time is monotonic [s], stamps are those of messages [ns]; with simulated time both are one clock.

    What has been converted stays where it is: a step of the wall clock changes only what is stamped after it.
    """

    def __init__(self, loop_ns: Callable[[], int], stamp_ns: Callable[[], int]):
        """Two clocks that tell the time in nanoseconds: the loop's, and the one that messages are stamped with."""
        self._loop_ns, self._stamp_ns = loop_ns, stamp_ns
        self._offset = stamp_ns() - loop_ns()

    def now(self) -> float:
        """Loop time [s]."""
        return self._loop_ns() * 1e-9

    def convert(self, *stamps: int) -> list[float]:
        """Stamps [ns] of one message as loop time [s]. Raises StampError if one is too far from now."""
        now, wall = self._loop_ns(), self._stamp_ns()
        for stamp in stamps:
            age = (wall - stamp) * 1e-9
            if abs(age) > MAX_STAMP_OFFSET:
                raise StampError(f'stamp is {age:+.3f} s old, allowed ±{MAX_STAMP_OFFSET:g} s: set the clocks')
        return [(now + stamp - wall) * 1e-9 for stamp in stamps]

    def stamp(self, time: float, moving: bool) -> int:
        """The stamp [ns] of a loop time [s].

        While something moves, stamps are as even as the commands they name, whatever slews the wall clock by a little.
        """
        before = self._loop_ns()
        offset = self._stamp_ns() - before
        undisturbed = self._loop_ns() - before < 200_000  # else this thread was paused between the two readings
        if undisturbed and abs(offset - self._offset) > SLEW[moving] * 1e9:
            self._offset = offset
        return round(time * 1e9) + self._offset
