"""The last messages, bounded in time and in memory, those of a span of time, and how often they come.

Pure: no ROS, the clock is an argument.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import NamedTuple

SECOND = 1_000_000_000
OVERHEAD = 350
"""What a message takes in memory beside its content, measured on CPython 3.11 [bytes]."""


class Message(NamedTuple):
    """A message as it came from the middleware."""

    topic: str
    """Resolved topic."""
    data: bytes
    """Content, serialised as CDR."""
    received: int
    """When it arrived, on the clock of the bag [ns]."""
    published: int
    """When it was published, on the clock of the bag [ns]."""
    sent: int
    """When it was published by the publisher's wall clock, whatever the clock of the bag [ns]."""


class Span:
    """Which messages belong to a span of time on this machine's clock: what arrived in it, and what was sent in it but came late.

    A publisher's clock may be seconds off this machine's. The least that a topic's messages took, its offset included, tells
    when a message that comes after the end would have come, had nothing delayed it.
    """

    def __init__(self, since: int):
        self.since = since
        """What arrived before is not in it [ns]."""
        self.until: int | None = None
        """What would have arrived after is not in it [ns]; None while it goes on."""
        self._least: dict[str, int] = {}  # topic → least of arrival less sending [ns]

    def place(self, topic: str, arrived: int, sent: int) -> int:
        """Where a message lies: -1 before, 0 in, 1 after. It arrived by this clock and was sent by its publisher's [ns]."""
        if arrived < self.since:
            return -1
        if self.until is None or arrived <= self.until:
            self._least[topic] = min(self._least.get(topic, arrived - sent), arrived - sent)
            return 0
        return int(topic not in self._least or sent + self._least[topic] > self.until)


class Meter:
    """How often a stream comes: over the last three seconds, or five periods of what is declared."""

    def __init__(self, declared: float):
        self.declared = declared
        """Rate that the stream should have [Hz]."""
        self._window = round(max(3.0, 5.0 / declared) * SECOND)
        self._began: int | None = None
        self._arrivals: deque[int] = deque()

    def add(self, received: int) -> None:
        """A message has arrived [ns]; a time long before the last one's means that time has begun again."""
        if self._arrivals and received < self._arrivals[-1] - SECOND:
            self._arrivals.clear()
            self._began = None
        self._began = received if self._began is None else self._began
        self._arrivals.append(received)
        self._forget(received)

    def _forget(self, now: int) -> None:
        while self._arrivals and self._arrivals[0] < now - self._window:
            self._arrivals.popleft()

    def known(self, now: int) -> float:
        """The share of the window, up to `now` [ns], since the stream began; 1 from then on."""
        return 0.0 if self._began is None else min((now - self._began) / self._window, 1.0)

    def rate(self, now: int) -> float:
        """Messages per second in the window up to `now` [ns]; a silence of more than two periods counts. 0 for fewer than two."""
        self._forget(now)
        if len(self._arrivals) < 2:
            return 0.0
        first, last = self._arrivals[0], self._arrivals[-1]
        end = now if now - last > 2 * SECOND / self.declared else last
        return (len(self._arrivals) - 1) * SECOND / max(end - first, 1)

    def off(self, now: int, tolerance: float) -> str:
        """Both rates in words, if they differ by more than this share of the declared one, else ''."""
        rate = self.rate(now)
        return f'{rate:.3g} Hz, declared {self.declared:g} Hz' if abs(rate / self.declared - 1.0) > tolerance else ''


class Ring:
    """Messages of the last `seconds` that fit into `max_bytes`, the oldest go first.

    Of `latched` topics, whose last message holds until the next one, the newest that has gone is held besides.
    """

    def __init__(self, seconds: float, max_bytes: int, latched: Collection[str] = ()):
        self.seconds, self.max_bytes, self.latched = seconds, max_bytes, latched
        self.full = False
        """Whether memory, rather than time, has ever bounded the window."""
        self._entries: deque[tuple[float, Message]] = deque()
        self._bytes = 0
        self._held: dict[str, Message] = {}

    def add(self, now: float, message: Message) -> None:
        """Append a message at the time `now` [s]; what is too old then, or too much, goes.

        A time before that of the last message means that simulated time has begun again: everything before it goes.
        """
        if self._entries and now < self._entries[-1][0]:
            while self._entries:
                self._drop()
        self._entries.append((now, message))
        self._bytes += OVERHEAD + len(message.data)
        while now - self._entries[0][0] > self.seconds:
            self._drop()
        while self._bytes > self.max_bytes:
            self._drop()
            self.full = True

    def _drop(self) -> None:
        _, message = self._entries.popleft()
        self._bytes -= OVERHEAD + len(message.data)
        if message.topic in self.latched:
            self._held[message.topic] = message

    @property
    def span(self) -> float:
        """Time between the oldest and the newest message [s]; 0 without any."""
        return self._entries[-1][0] - self._entries[0][0] if self._entries else 0.0

    def messages(self) -> list[Message]:
        """The messages in the order of receipt, those held first.

        What is held counts as received when the window opens, as a late subscriber would have received it.
        """
        window = sorted((message for _, message in self._entries), key=lambda message: message.received)
        held = sorted(self._held.values(), key=lambda message: message.received)
        return [message._replace(received=window[0].received) for message in held] + window if window else held
