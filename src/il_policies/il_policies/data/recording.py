"""One bag under a contract: when every sample was taken, and the samples themselves except images.

This is the first of two passes over a bag. What it keeps is small, whatever the bag's size: of an image a stamp and a
checksum. The rows of a dataset are decided from it (`align`), and its quality judged (`quality`); only then are images
read.
"""
from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from il_policies.contract import Contract, Stream
from il_policies.data.decode import decode, stamp_of
from il_policies.data.errors import DataError

if TYPE_CHECKING:  # the live side aligns, too, and reads no bags
    from il_policies.bags.reader import Bag
    from il_policies.bags.storage import Raw

SECOND = 1_000_000_000
BATCH, BATCH_SIZE = 64, 2**20
"""So many messages, or bytes, are read ahead."""


@dataclass(frozen=True)
class StreamRecord:
    """What was recorded of one stream of the contract: N messages, in order of arrival."""

    stream: Stream
    """The stream as the contract declares it."""
    topic: str
    """Its topic in the bag."""
    stamps: np.ndarray
    """(N,) int64 [ns]: when each sample was taken, by the contract's clock less the latency."""
    received: np.ndarray
    """(N,) int64 [ns]: when each message arrived."""
    samples: np.ndarray | None
    """(N, D) float64; None for images."""
    digests: np.ndarray | None
    """(N,) uint32, CRC-32 of each image's bytes: frozen images have equal ones; None for low-dimensional streams."""
    undecodable: int = 0
    """Images among those needed that could not be decoded; they count as lost. (Other streams must decode.)"""


@dataclass(frozen=True)
class Span:
    """One episode of a bag, from mark to mark."""

    begin: int | None = None
    """[ns] when the mark that began it arrived; None: with the bag."""
    end: int | None = None
    """[ns] when the mark that ended it arrived; None: with the bag."""
    task: str = ''
    """What was done, in words."""
    success: bool | None = None
    """Whether it succeeded; None if nobody said."""
    warnings: tuple[str, ...] = ()
    """What is odd about its marks."""


@dataclass(frozen=True)
class Recording:
    """What one bag holds of a contract's streams."""

    bag: Bag
    """Where it was read from."""
    contract: Contract
    """What it was read under."""
    streams: dict[str, StreamRecord]
    """The observations by name, then `action`, the commands (absent under next_state if none were recorded)."""
    about: dict[str, str]
    """What the recorder noted: task, success, contract_hash, … ({} for foreign bags)."""
    damage: tuple[str, ...]
    """What was salvaged, for people; () if the bag is whole."""
    spans: tuple[Span, ...]
    """Its episodes: one, or those that the marks made."""


def streams_of(contract: Contract) -> dict[str, Stream]:
    """Everything a recording under this contract consists of: the observations, then `action`, the commands."""
    action = contract.action
    return {**contract.observations,
            'action': Stream(topic=action.topic, type='sensor_msgs/msg/JointState', field='position', names=action.joints,
                             rate=contract.control_rate, max_age=action.max_age)}


def read_recording(bag: Bag, contract: Contract, markers: str = '') -> Recording:
    """Read a bag once, in bounded memory: a few bytes a message.

    markers: topic (std_msgs/String) of marks that cut the bag into episodes, see `spans_of`; '': the bag is one episode.
    Raises DataError, naming bag, time and topic: a topic absent, ambiguous or of another type (E201), a sample that
    cannot be decoded (E203, E105), is not finite (E205) or has no stamp (E204), marks that make no episode (E210), a
    damaged bag (E101).
    """
    streams = streams_of(contract)
    topics = match_topics(bag, contract, streams)
    whole = Span(task=bag.about.get('task', ''), success={'true': True, 'false': False}.get(bag.about.get('success', '')))
    marks: list[tuple[int, str]] = []
    if markers:
        markers = _match_topic(bag, 'marks', markers, 'std_msgs/msg/String')
    growing = {name: _Growing(streams[name]) for name in topics}
    of_topic: dict[str, list[_Growing]] = {}
    for name, topic in topics.items():
        of_topic.setdefault(topic, []).append(growing[name])
    begin = None
    for raw in _read_ahead(bag.raw([*of_topic, *([markers] if markers else [])])):
        begin = raw.receive_ns if begin is None else begin
        message = bag.deserialize(raw.topic, raw.data)
        if raw.topic == markers:
            marks.append((raw.receive_ns, message.data))
        for stream in of_topic.get(raw.topic, ()):
            try:
                stream.add(message, raw.receive_ns, raw.publish_ns)
            except DataError as error:
                raise error.at(f'{bag.path} at {(raw.receive_ns - begin) / SECOND:.2f} s') from None
    try:
        spans = spans_of(marks, whole, begin or 0) if markers else (whole,)
    except DataError as error:
        raise error.at(f'{bag.path}: {markers}') from None
    return Recording(bag, contract, {name: growing[name].record(topic) for name, topic in topics.items()}, bag.about,
                     bag.damage, spans)


def spans_of(marks: Sequence[tuple[int, str]], whole: Span, begin: int) -> tuple[Span, ...]:
    """The episodes that marks (arrival [ns], text) make, in their order.

    `start [task]` begins an episode; `success`, `failure`, `discard` or `stop` ends it, and after its end the first three
    still say how it went. Before any start, the episode began with the bag. An episode without an end mark is kept,
    unlabelled and with a warning. whole: the bag as one episode; its task is that of marks without one. begin: start of
    the bag [ns], for messages. Raises DataError (E210) for another word, or if no episode remains.
    """
    success = {'success': True, 'failure': False, 'discard': None, 'stop': None}
    spans: list[Span | None] = []  # None: discarded
    current: Span | None = Span(task=whole.task)
    for time, text in marks:
        word, _, task = text.strip().partition(' ')
        if word == 'start':
            if current and current.begin is not None:
                spans.append(replace(current, end=time, warnings=('no mark ended it before the next start',)))
            current = Span(begin=time, task=task.strip() or whole.task)
        elif word not in success:
            raise DataError(f'unknown mark {text!r} at {(time - begin) / SECOND:.2f} s; '
                            f'valid: start [task], {", ".join(success)}', 'E210')
        elif current:
            spans.append(None if word == 'discard' else replace(current, end=time, success=success[word]))
            current = None
        elif word == 'discard':
            spans[-1] = None
        elif word != 'stop' and spans[-1]:
            spans[-1] = replace(spans[-1], success=success[word])
    if current and current.begin is not None:
        spans.append(replace(current, warnings=('no mark ended it before the bag ended',)))
    kept = tuple(span for span in spans if span)
    if not kept:
        raise DataError(f'no episode: {f"all {len(spans)} were discarded" if spans else "no marks"}', 'E210')
    return kept


def _read_ahead(messages: Iterator[Raw]) -> Iterator[Raw]:
    """The same messages, read by a thread a batch ahead: files are read and checked without holding the interpreter."""
    def batch() -> list[Raw]:
        read, size = [], 0
        for raw in messages:
            read.append(raw)
            size += len(raw.data)
            if len(read) >= BATCH or size >= BATCH_SIZE:
                break
        return read

    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(batch)
        while read := following.result():
            following = reader.submit(batch)
            yield from read


class _Growing:
    """A stream being read, in flat arrays: an object per sample would be ten times the memory."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.stamps, self.received = array('q'), array('q')
        self.samples, self.digests = array('d'), array('I')

    def add(self, message, receive_ns: int, publish_ns: int | None) -> None:
        self.stamps.append(stamp_of(message, self.stream, publish_ns, receive_ns))
        self.received.append(receive_ns)
        if self.stream.is_image:
            self.digests.append(zlib.crc32(message.data))
        else:
            self.samples.frombytes(decode(message, self.stream).tobytes())

    def record(self, topic: str) -> StreamRecord:
        samples = None if self.stream.is_image else np.frombuffer(self.samples).reshape(len(self.stamps), *self.stream.shape)
        digests = np.frombuffer(self.digests, np.uint32) if self.stream.is_image else None
        return StreamRecord(self.stream, topic, np.frombuffer(self.stamps, np.int64), np.frombuffer(self.received, np.int64),
                            samples, digests)


def match_topics(bag: Bag, contract: Contract, streams: dict[str, Stream]) -> dict[str, str]:
    """Stream name → topic in the bag: as the recorder noted it or as the contract names it in full, all others in one namespace.

    Suffixes matched one by one would pair the observations of one arm with the commands of another.
    """
    try:
        recorded_as = dict(json.loads(bag.about.get('topics', '{}')))
    except (ValueError, TypeError):  # not from our recorder
        recorded_as = {}
    wanted = {name: str(recorded_as.get(stream.topic, stream.topic)) for name, stream in streams.items()}
    topics = {name: topic for name, topic in wanted.items() if topic.startswith('/') and topic in bag.topics}
    namespaces = {name: _namespaces(bag, topic) for name, topic in wanted.items() if name not in topics}
    optional = 'action' if contract.action.label == 'next_state' else ''
    required = [name for name in namespaces if name != optional] or [name for name, found in namespaces.items() if found]
    namespace = _one_namespace(bag, {name: wanted[name] for name in required}, namespaces)
    topics |= {name: _in(namespace, wanted[name]) for name, found in namespaces.items() if namespace in found}
    for name, topic in topics.items():
        _check_type(bag, name, topic, streams[name].type)
    return {name: topics[name] for name in streams if name in topics}


def _namespaces(bag: Bag, topic: str) -> set[str]:
    """The namespaces in which the bag has a topic; '' is the root."""
    ending = _in('', topic)
    return {name.removesuffix(ending) for name in bag.topics if name.endswith(ending)}


def _in(namespace: str, topic: str) -> str:
    return f'{namespace}/{topic.strip("/")}'


def _one_namespace(bag: Bag, wanted: dict[str, str], namespaces: dict[str, set[str]]) -> str:
    """The namespace that has all topics wanted (by stream): the root if it has, else the only one that does."""
    for name, topic in wanted.items():
        if not namespaces[name]:
            raise _none_of(bag, name, topic)
    lacking = {namespace: [topic for name, topic in wanted.items() if namespace not in namespaces[name]]
               for namespace in sorted(set().union(*(namespaces[name] for name in wanted)))}
    complete = [namespace for namespace, topics in lacking.items() if not topics]
    if '' in complete or not wanted:
        return ''
    if len(complete) == 1:
        return complete[0]
    if complete:
        fault = f'{len(complete)} namespaces have all topics: {", ".join(complete)}'
    else:
        fault = 'no namespace has all topics: ' + '; '.join(f'{namespace or "/"} lacks {", ".join(dict.fromkeys(topics))}'
                                                            for namespace, topics in lacking.items())
    example = next(iter(wanted.values()))
    full = _in(sorted(namespaces[next(iter(wanted))])[0], example)
    raise DataError(f'{bag.path}: {fault}; name each `topic` of the contract in full (as {full}), in a contract per arm', 'E201')


def _match_topic(bag: Bag, name: str, topic: str, kind: str) -> str:
    """The one topic in the bag that `topic` means, of the right type: the topic itself, else the only one in a namespace."""
    found = _namespaces(bag, topic)
    if not found:
        raise _none_of(bag, name, topic)
    if '' not in found and len(found) > 1:
        names = ', '.join(_in(namespace, topic) for namespace in sorted(found))
        raise DataError(f'{bag.path}: {len(found)} topics for {topic} ({name}): {names}; name one in full', 'E201')
    match = _in('' if '' in found else found.pop(), topic)
    _check_type(bag, name, match, kind)
    return match


def _none_of(bag: Bag, name: str, topic: str) -> DataError:
    return DataError(f'{bag.path}: no topics for {topic} ({name}); there are: {", ".join(sorted(bag.topics)) or "none"}', 'E201')


def _check_type(bag: Bag, name: str, topic: str, kind: str) -> None:
    if bag.topics[topic] != kind:
        raise DataError(f'{bag.path}: {topic} is {bag.topics[topic]}, must be {kind} ({name})', 'E201')
