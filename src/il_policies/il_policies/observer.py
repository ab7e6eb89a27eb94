"""What a running policy sees: messages as they come in, an observation when one is asked for.

The same code live, in the policy node, and offline, where a bag is played through it (`replay`).
"""
from __future__ import annotations

from collections.abc import Iterable

from il_policies.contract import Contract
from il_policies.data.align import Observation, buffers, observation_at
from il_policies.data.decode import Convert, DecodeError, decode, stamp_of
from il_policies.data.recording import SECOND

AHEAD = 0.1
"""A stamp further ahead of now is of another clock [s]; a sample is never used before its time."""


class Observer:
    """Buffers of the features a policy observes. Not thread-safe. Times are int64 [ns] on the clock of the stamps."""

    def __init__(self, contract: Contract, features: Iterable[str], history: int, step_period: float):
        """A policy's features (in the contract), its history and the time between its steps [s]."""
        self.contract, self.history = contract, history
        self.period = round(step_period * SECOND)
        self.streams = buffers(contract, list(features), max(5.0, 2.0 * history * step_period))
        cameras = [name for name, buffer in self.streams.items() if buffer.stream.is_image]
        self.anchor = cameras[0] if cameras else None
        """The camera whose newest frame is the time of an observation."""
        self.refusals: dict[str, tuple[int, str]] = {}
        """Feature → when a message of it was last refused [ns], and why."""
        self.refused = dict.fromkeys(self.streams, 0)
        """Feature → messages refused."""

    def take(self, name: str, message, published: int | None, now: int, convert: Convert | None = None) -> int:
        """Decode and keep a message of a feature that has arrived at `now`; its stamp.

        Raises DecodeError, and keeps nothing, if it is no sample of its stream or stamped ahead of now.
        """
        stream = self.streams[name].stream
        try:
            sample = decode(message, stream, convert)
            stamp = stamp_of(message, stream, published, now)
            if stamp > now + AHEAD * SECOND:
                raise DecodeError(f'{stream.topic}: stamped {(stamp - now) / SECOND:.3f} s ahead of now; set the clocks', 'E204')
        except DecodeError as error:
            self.refusals[name] = now, str(error)
            self.refused[name] += 1
            raise
        newest = self.streams[name].newest
        if newest is not None and newest > now + AHEAD * SECOND:
            self.clear()  # the clock has gone back
        self.streams[name].add(stamp, sample)
        return stamp

    def clear(self) -> None:
        """Forget all samples, as after a jump of the clock."""
        for buffer in self.streams.values():
            buffer.clear()

    def time(self, now: int) -> int:
        """When an observation made now would be taken: at the newest frame, or now without cameras (or frames)."""
        if self.anchor is None:
            return now
        frames = self.streams[self.anchor]
        place = frames.place_at(now)
        return frames.stamps[place] if place >= 0 else now

    def observe(self, now: int, began: int | None = None) -> tuple[int, Observation]:
        """The observation to plan from now, and its time; what is missing or too old is named, with what was refused of it.

        began: time of the first observation of the episode, None if this is the first.
        """
        t = self.time(now)
        observation = observation_at(self.streams, t, self.history, self.period, t if began is None else began, self.anchor)
        # Measured against itself the newest frame is never old: a camera that has died shows against now.
        observation.problems.update(self.problems(now, [self.anchor] if self.anchor else []))
        return t, Observation(observation.data, observation.ages, self._explained(observation.problems, now))

    def problems(self, now: int, names: Iterable[str] | None = None) -> dict[str, str]:
        """Feature → what is wrong with its stream now, history apart: nothing received, too old, and what was refused of it."""
        found = {}
        for name in self.streams if names is None else names:
            buffer = self.streams[name]
            place = buffer.place_at(now)
            if place < 0:
                found[name] = f'nothing received on {buffer.stream.topic}'
            elif (age := now - buffer.stamps[place]) > buffer.max_age:
                found[name] = (f'{buffer.stream.topic}: newest sample is {age / SECOND:.3f} s old, '
                               f'allowed {buffer.stream.max_age:g} s')
        return self._explained(found, now)

    def _explained(self, problems: dict[str, str], now: int) -> dict[str, str]:
        """With the reason for which messages were refused in the last second."""
        recent = {name: why for name, (when, why) in self.refusals.items() if abs(now - when) < SECOND}
        return {name: f'{problem}; refused: {recent[name]}' if name in recent and recent[name] not in problem else problem
                for name, problem in problems.items()}
