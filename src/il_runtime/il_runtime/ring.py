"""The last messages, bounded in time and in memory. Pure: no ROS, the clock is an argument."""
from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import NamedTuple

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
    """When it was published by the wall clock, whatever the clock of the bag [ns]."""


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
