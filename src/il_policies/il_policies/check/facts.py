"""What streams are like, message by message, and who publishes and listens: measured alike live and from a bag, not judged."""
from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from il_policies.contract import Stream
from il_policies.data import quality
from il_policies.data.decode import decode, jpeg_size, stamp_of
from il_policies.data.errors import DataError
from il_policies.data.recording import StreamRecord

SECOND = 1_000_000_000
DECODED = 30
"""Of images, whose decoding takes long, the first and every so many-th are decoded."""


@dataclass(frozen=True)
class Measured:
    """A stream as it came."""

    topic: str
    """Resolved topic, or that in the bag."""
    n: int
    """Messages."""
    rate: float = 0.0
    """[Hz]; 0 for fewer than two messages."""
    jitter: float = 0.0
    """95 % of the steps between messages differ by less from the period [s]."""
    longest: float = 0.0
    """Longest step between messages [s]."""
    latency: tuple[float, float] | None = None
    """From stamp to arrival, median and 95 % [s]; None without stamps."""
    stamped: float | None = None
    """Median of the stamps on their own clock [s]; None without stamps."""
    orders: tuple[tuple[str, ...], ...] = ()
    """JointState: the lists of names that came, each once."""
    low: dict[str, float] = field(default_factory=dict)
    """Joint or entry → lowest value that came."""
    high: dict[str, float] = field(default_factory=dict)
    """Joint or entry → highest value that came."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Images: heights and widths that came, each once [px]."""
    encodings: tuple[str, ...] = ()
    """Images: encodings or formats that came, each once."""
    faults: dict[str, str] = field(default_factory=dict)
    """Code → the first fault of that code, in words, and how many messages had it."""


@dataclass(frozen=True)
class Endpoint:
    """A publisher or a subscription."""

    node: str
    """Full name of the node."""
    type: str
    """Message type."""
    qos: str
    """Reliability and durability."""
    incompatible: str = ''
    """Why it and ours do not match; '' if they do."""


@dataclass(frozen=True)
class Graph:
    """A running system, seen for a while by a node in one namespace."""

    namespace: str
    """Of that node, as of those that will run: '/' or '/left'."""
    seconds: float
    """How long it listened [s]."""
    sim_time: bool
    """/clock is published: times are simulated ones."""
    resolved: dict[str, str]
    """Topic as in the contract → topic here."""
    topics: dict[str, tuple[str, ...]]
    """Every topic that somebody publishes → its types."""
    publishers: dict[str, tuple[Endpoint, ...]]
    """Topic of the contract, resolved → who publishes it."""
    listeners: dict[str, tuple[Endpoint, ...]]
    """Output of the contract, resolved, and every other topic of such a type → who listens, recorders left out."""
    streams: dict[str, Measured]
    """Observations by name, `action`, and `teleop`."""


class Observed:
    """Gathers what a stream is like; messages are rclpy's or those of a bag."""

    def __init__(self, stream: Stream, topic: str):
        self.stream, self.topic = stream, topic
        self._received, self._stamps, self._delays = array('q'), array('q'), array('q')
        self._orders: dict[tuple[str, ...], None] = {}
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self._sizes: dict[tuple[int, int], None] = {}
        self._encodings: dict[str, None] = {}
        self._faults: dict[str, list] = {}

    def add(self, message, received_ns: int, published_ns: int | None) -> None:
        """A message has arrived."""
        place = len(self._received)
        self._received.append(received_ns)
        try:
            stamp = stamp_of(message, self.stream, published_ns, received_ns)
        except DataError as error:
            self._fault(error)
        else:
            self._stamps.append(stamp)
            self._delays.append(received_ns - stamp)
        if self.stream.is_image:
            self._encodings[getattr(message, 'encoding', None) or message.format] = None
            if size := _size(message):
                self._sizes[size] = None
        values = {}
        if self.stream.field:
            self._orders[tuple(message.name)] = None
            values = dict(zip(message.name, getattr(message, self.stream.field)))
        if not self.stream.is_image or place % DECODED == 0:
            try:
                sample = decode(message, self.stream)
            except DataError as error:
                self._fault(error)
            else:
                if self.stream.fields:
                    values = dict(zip(self.stream.names or self.stream.fields, sample))
        for name, value in values.items():
            if np.isfinite(value):
                self._low[name] = min(self._low.get(name, value), float(value))
                self._high[name] = max(self._high.get(name, value), float(value))

    def _fault(self, error: DataError) -> None:
        self._faults.setdefault(error.code, [error.message.removeprefix(f'{self.stream.topic}: '), 0])[1] += 1

    def measured(self) -> Measured:
        """What came until now."""
        n, stamps = len(self._received), np.frombuffer(self._stamps, np.int64)
        times = stamps if len(stamps) == n else np.frombuffer(self._received, np.int64)
        report, _ = quality.stream_report('', StreamRecord(self.stream, self.topic, times, times, None, None), times, 0, 1.0, 0.0)
        latency, stamped = None, None
        if len(stamps):
            stamped = float(np.median(stamps)) / SECOND
            if self.stream.clock != 'receive':
                delays = np.percentile(np.frombuffer(self._delays, np.int64) / SECOND, (50, 95))
                latency = round(float(delays[0]), 6), round(float(delays[1]), 6)
        return Measured(self.topic, n, report['rate_hz'], report['jitter_s'], report['dt_max_s'], latency, stamped,
                        tuple(self._orders), self._low, self._high, tuple(self._sizes), tuple(self._encodings),
                        {code: f'{text} ({count} of {n} messages)' for code, (text, count) in self._faults.items()})


def _size(message) -> tuple[int, int] | None:
    """Height and width of an image message [px]; None if its file does not say."""
    if not hasattr(message, 'format'):
        return int(message.height), int(message.width)
    data = bytes(message.data)
    data = data[12:] if 'compressedDepth' in message.format else data
    if data[1:4] == b'PNG':
        return int.from_bytes(data[20:24], 'big'), int.from_bytes(data[16:20], 'big')
    return jpeg_size(data)
