"""A file in MCAP, read in bounded memory.

The records are the mcap library's. Its readers are not used: they hold whole files in memory where there is no index, do
not notice what is cut off within a chunk, and give nothing of a damaged file.
"""
from __future__ import annotations

import os
import struct
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import zstandard
from lz4.frame import LZ4FrameDecompressor
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Channel, ChunkIndex, Footer, MessageIndex, Metadata, MetadataIndex, Schema, Statistics

from il_policies.bags.storage import LARGEST, STAMPS, Damaged, Raw, Topic, is_plain, merged, plain
from il_policies.data.errors import BagError

MAGIC = b'\x89MCAP0\r\n'
RUN = 256 << 10
"""Messages outside of chunks are read in runs of about this size [bytes]."""
_HEAD = struct.Struct('<BQ')  # of every record: opcode, length of what follows
_MESSAGE = struct.Struct('<HIQQ')  # of a message: channel, sequence, stamps of receipt and publishing
_CHUNK = struct.Struct('<QQQII')  # of a chunk: first and last stamp, size and checksum when decompressed, length of a word
_LENGTH = struct.Struct('<Q')
_INDEX = struct.Struct('<HI')  # of the index of a chunk: channel, length of what follows
_FOOTER_SIZE = 9 + 20
_DATA = {Opcode.SCHEMA, Opcode.CHANNEL, Opcode.MESSAGE, Opcode.CHUNK, Opcode.MESSAGE_INDEX, Opcode.ATTACHMENT,
         Opcode.METADATA, Opcode.DATA_END}
"""The records between header and summary."""


class McapFile:
    """A file in MCAP."""

    damage: tuple[str, ...]
    """What could not be read, for people; () of a whole file."""
    topics: list[Topic]
    counts: dict[str, int]
    """Topic → messages."""
    span: tuple[int, int] | None
    """First and last stamp of receipt [ns]; None of a file without messages."""
    notes: dict[str, dict[str, str]]
    """The metadata records by name."""

    def __init__(self, path: Path, salvage: bool):
        """Raises Damaged, BagError, OSError."""
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size
        self._tolerant = False
        self.damage = ()
        self._end: int | None = None  # where the data end by the footer
        index = None
        try:
            index = self._summary()
            self._index = index or self._walked()
            if salvage:
                for _ in self.read():
                    pass
        except (Damaged, BagError) as error:
            if not salvage:
                raise
            self._tolerant = True
            self._index = self._built(index.declarations(), index.blocks()) if index else self._walked()
            self.damage = self.damage or (str(error),)
        index = self._index
        self.notes = index.notes
        self.topics, self.counts = [], {}
        for channel in index.channels.values():
            schema = index.schemas.get(channel.schema_id) or Schema(0, b'', '', '')
            self.topics.append(Topic(channel.topic, schema.name, channel.message_encoding, schema.encoding,
                                     schema.data.decode('utf-8', 'replace')))
            self.counts[channel.topic] = self.counts.get(channel.topic, 0) + index.counts[channel.id]
        self.span = (min(index.starts), max(index.ends)) if index.starts else None

    def read(self, topics: Collection[str] | None = None) -> Iterator[Raw]:
        """The messages of these topics (None: all) in order of receipt. Raises Damaged, BagError."""
        index = self._index
        wanted = {channel.id: channel.topic for channel in index.channels.values()
                  if topics is None or channel.topic in topics}
        blocks = array('Q', (i for i, members in enumerate(index.members) if not members.isdisjoint(wanted)))
        found: Counter[int] = Counter()
        yield from merged(array('Q', (index.starts[i] for i in blocks)),
                          lambda k: self._read_block(blocks[k], wanted, found))
        for channel, topic in wanted.items():
            if found[channel] != index.counts[channel]:
                raise Damaged(f'{found[channel]} messages on {topic}, where {index.counts[channel]} were recorded')

    def _read_block(self, i: int, wanted: dict[int, str], found: Counter[int]) -> Iterator[Raw]:
        """The messages of a block in order of receipt. wanted: channel → topic. found: counts them by channel."""
        index = self._index
        content, messages = self._load(index, index.offsets[i], index.lengths[i], cut=i == index.cut)
        if not messages or (messages[0].receive_ns, messages[-1].receive_ns) != (index.starts[i], index.ends[i]):
            raise Damaged(f'the stamps of the chunk at byte {index.offsets[i]} are not those of its index')
        for message in messages:
            topic = wanted.get(message.channel)
            if topic is None:
                continue
            try:
                data = plain(bytes(content[message.start:message.stop]))
            except Damaged:
                if self._tolerant:
                    continue
                raise
            found[message.channel] += 1
            yield Raw(topic, data, message.receive_ns, message.publish_ns or None)

    def _summary(self) -> _Index | None:
        """The index at the end of the file; None if the writer left out what we need. Raises Damaged if it has no end."""
        end = self._size - _FOOTER_SIZE - len(MAGIC)
        tail = self._pread(end, _FOOTER_SIZE + len(MAGIC)) if end > 0 else b''
        if not tail.startswith(_HEAD.pack(Opcode.FOOTER, 20)) or not tail.endswith(MAGIC):
            raise Damaged(f'no end mark at byte {self._size}: cut off, damaged or still being recorded')
        footer = _parse(Footer, tail[9:29])
        self._end = end
        if not footer.summary_start:
            return None
        if not len(MAGIC) < footer.summary_start <= end:
            raise Damaged('its end mark is damaged')
        self._end = footer.summary_start
        summary = self._pread(footer.summary_start, end - footer.summary_start)
        if footer.summary_crc and zlib.crc32(summary + tail[:25]) != footer.summary_crc:
            raise Damaged('the checksum of its summary does not match')
        index, statistics, chunks = _Index(), None, 0
        for opcode, start, stop in _records(summary):
            if opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                index.declare(opcode, summary[start:stop])
            elif opcode == Opcode.CHUNK_INDEX:
                chunk = _parse(ChunkIndex, summary[start:stop])
                chunks += 1
                if chunk.message_end_time:  # else there are no messages in it
                    index.add(chunk.chunk_start_offset, chunk.chunk_length, chunk.message_start_time, chunk.message_end_time,
                              chunk.message_index_offsets)
            elif opcode == Opcode.METADATA_INDEX:
                place = _parse(MetadataIndex, summary[start:stop])
                index.declare(Opcode.METADATA, self._pread(place.offset, place.length)[9:])
            elif opcode == Opcode.STATISTICS:
                statistics = _parse(Statistics, summary[start:stop])
                index.counts.update(statistics.channel_message_counts)
        if (statistics and statistics.chunk_count == chunks and all(index.members)
                and statistics.message_count == sum(index.counts.values())
                and set(+index.counts) == set().union(*index.members) <= set(index.channels)
                and {channel.schema_id for channel in index.channels.values()} <= {0, *index.schemas}):
            return index
        return None

    def _walked(self) -> _Index:
        """The index made by reading the file from its beginning. Raises Damaged, BagError."""
        index = _Index()
        return self._built(index, self._walk(index))

    def _walk(self, index: _Index) -> Iterator[tuple[int, int, bool]]:
        """Every block of the file: (offset, length, cut off). What is declared outside of blocks is entered in `index`.

        Raises Damaged where it does not go on.
        """
        position, run, before = len(MAGIC), 0, 0
        opcode, length = _HEAD.unpack(self._pread(position, 9))
        if opcode != Opcode.HEADER:
            raise Damaged('its header is damaged')
        position += 9 + length
        while True:
            opcode, length = _HEAD.unpack(self._pread(position, 9)) if position + 9 <= self._size else (0, 0)
            following = position + 9 + length
            if run and (opcode != Opcode.MESSAGE or following > self._size or position - run > RUN):
                yield run, position - run, False
                run = 0
            if following > self._size and opcode == Opcode.CHUNK and self._tolerant:
                yield position, self._size - position, True
            # Besides what is cut off: what cannot stand here, an index without its chunk or of a wrong length, an end before the
            # end. A record that is skipped because its kind is damaged would be lost without a word.
            if (following > self._size or opcode not in _DATA
                    or opcode == Opcode.MESSAGE_INDEX and (before not in (Opcode.CHUNK, Opcode.MESSAGE_INDEX)
                                                           or _INDEX.unpack(self._pread(position + 9, 6))[1] != length - 6)
                    or opcode == Opcode.DATA_END and self._end not in (None, following)):
                raise Damaged(f'cut off or damaged in the record at byte {position} of {self._size}')
            if opcode == Opcode.DATA_END:
                return
            if opcode == Opcode.CHUNK:
                yield position, 9 + length, False
            elif opcode == Opcode.MESSAGE:
                run = run or position
            elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.METADATA):
                index.declare(opcode, self._pread(position + 9, length))
            position, before = following, opcode

    def _built(self, index: _Index, blocks: Iterator[tuple[int, int, bool]]) -> _Index:
        """Enter these blocks in the index, which takes reading them. If tolerant, what cannot be read is left out."""
        left_out, spoiled, end = [], 0, ''
        try:
            for offset, length, cut in blocks:
                try:
                    content, messages = self._load(index, offset, length, cut)
                except (Damaged, BagError) as error:
                    if not self._tolerant:
                        raise
                    left_out.append(str(error))
                    continue
                if not messages:
                    continue
                if cut:
                    index.cut = len(index.offsets)
                index.add(offset, length, messages[0].receive_ns, messages[-1].receive_ns, {m.channel for m in messages})
                whole = [m for m in messages if not self._tolerant or is_plain(bytes(content[m.start:m.stop]))]
                index.counts.update(m.channel for m in whole)
                spoiled += len(messages) - len(whole)
        except Damaged as error:
            if not self._tolerant:
                raise
            end = str(error)
        self.damage = tuple(text for text in (
            f'{len(left_out)} chunks left out, first: {left_out[0]}' if left_out else '',
            f'{spoiled} messages left out that cannot be decompressed' if spoiled else '',
            end) if text)
        return index

    def _load(self, index: _Index, offset: int, length: int, cut: bool) -> tuple[memoryview, list[_Message]]:
        """The records of a chunk, or of a run of messages, and where its messages lie in them, in order of receipt.

        cut: take what there is. Raises Damaged, BagError.
        """
        opcode, size = _HEAD.unpack(self._pread(offset, 9))
        if opcode == Opcode.MESSAGE:
            content, indexed, checked = memoryview(self._pread(offset, length)), None, False
        else:
            if opcode != Opcode.CHUNK or (size != length - 9 and not cut) or length > LARGEST:
                raise Damaged(f'no chunk of {length} bytes at byte {offset}')
            try:
                content, checked = _decompressed(self._pread(offset + 9, length - 9), cut)
            except Damaged as error:
                raise Damaged(f'the chunk at byte {offset} {error}') from None
            # rosbag2 writes no checksums unless asked; then the messages are held against their index.
            indexed = None if cut or checked else self._indexed(offset + length)
        messages = []
        try:
            for opcode, start, stop in _records(content):
                if opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                    index.declare(opcode, bytes(content[start:stop]))
                elif opcode == Opcode.MESSAGE:
                    if stop - start < _MESSAGE.size:
                        raise Damaged('a message too short to be one')
                    channel, _, receive_ns, publish_ns = _MESSAGE.unpack_from(content, start)
                    if channel not in index.channels or receive_ns not in STAMPS:
                        raise Damaged(f'a message of channel {channel} at {receive_ns} ns')
                    messages.append(_Message(receive_ns, publish_ns, channel, start + _MESSAGE.size, stop))
                elif not checked:
                    raise Damaged(f'a record of kind {opcode}')
        except Damaged as error:
            if not cut:
                raise Damaged(f'the chunk at byte {offset} holds {error}') from None
        if indexed is not None and indexed != {(m.channel, m.receive_ns, m.start - _MESSAGE.size - 9) for m in messages}:
            raise Damaged(f'the messages of the chunk at byte {offset} are not those of its index')
        messages.sort(key=attrgetter('receive_ns'))
        return content, messages

    def _indexed(self, position: int) -> set[tuple[int, int, int]] | None:
        """(channel, receive stamp, place) of each message by the indices after a chunk; None if there are none."""
        indexed = None
        try:
            while True:
                opcode, length = _HEAD.unpack(self._pread(position, 9))
                if opcode != Opcode.MESSAGE_INDEX:
                    return indexed
                entry = _parse(MessageIndex, self._pread(position + 9, length))
                indexed = (indexed or set()) | {(entry.channel_id, *record) for record in entry.records}
                position += 9 + length
        except Damaged:  # cut off here: the messages before are whole
            return None

    def _pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Raises Damaged if the file has not that many."""
        if offset + length > self._size:
            raise Damaged(f'nothing at byte {offset} of {self._size}')
        return os.pread(self._file, length, offset)


class _Message(NamedTuple):
    """Where a message lies in the content of its block."""

    receive_ns: int
    publish_ns: int
    channel: int
    start: int
    stop: int


class _Index:
    """What an MCAP file holds, in a few bytes a block: bags are long."""

    def __init__(self):
        self.schemas: dict[int, Schema] = {}
        self.channels: dict[int, Channel] = {}
        self.notes: dict[str, dict[str, str]] = {}
        self.counts: Counter[int] = Counter()  # channel → messages
        # Of each block: its place in the file, its first and last stamp of receipt, its channels.
        self.offsets, self.lengths, self.starts, self.ends = (array('Q') for _ in range(4))
        self.members: list[frozenset[int]] = []
        self.cut: int | None = None  # the block that is not whole
        self._known: dict[frozenset[int], frozenset[int]] = {}

    def declare(self, opcode: int, content: bytes) -> None:
        """Enter a schema, channel or metadata record; the first two stand in the data and in the summary. Raises Damaged."""
        if opcode == Opcode.METADATA:
            metadata = _parse(Metadata, content)
            self.notes[metadata.name] = metadata.metadata
            return
        kind, known = (Schema, self.schemas) if opcode == Opcode.SCHEMA else (Channel, self.channels)
        record = _parse(kind, content)
        if known.setdefault(record.id, record) != record:
            raise Damaged(f'{kind.__name__} {record.id} in two ways')

    def add(self, offset: int, length: int, start: int, end: int, members: Iterable[int]) -> None:
        """Enter a block."""
        for column, value in zip((self.offsets, self.lengths, self.starts, self.ends), (offset, length, start, end)):
            column.append(value)
        members = frozenset(members)
        self.members.append(self._known.setdefault(members, members))

    def declarations(self) -> _Index:
        """The same without blocks."""
        index = _Index()
        index.schemas, index.channels, index.notes = self.schemas, self.channels, self.notes
        return index

    def blocks(self) -> Iterator[tuple[int, int, bool]]:
        """Every block as (offset, length, cut off)."""
        return ((offset, length, False) for offset, length in zip(self.offsets, self.lengths))


def _records(content: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """(opcode, start, stop) of every MCAP record in a row of them. Raises Damaged where it does not go on.

    Not the library's loop, which takes a record that is cut off for a shorter one.
    """
    position, end = 0, len(content)
    while position < end:
        start = position + _HEAD.size
        if start > end:
            raise Damaged('a record that is cut off')
        opcode, length = _HEAD.unpack_from(content, position)
        position = start + length
        if position > end or not opcode:
            raise Damaged('a record that is cut off')
        yield opcode, start, position


def _parse(kind: type, content: bytes):
    """An MCAP record from its content. Raises Damaged."""
    try:
        return kind.read(ReadDataStream(BytesIO(content)))
    except (McapError, struct.error, UnicodeDecodeError):
        raise Damaged(f'an unreadable {kind.__name__} record') from None


def _decompressed(record: bytes, cut: bool) -> tuple[memoryview, bool]:
    """The content of a chunk record, as far as it goes if it is cut off, and whether its checksum says that it is right.

    Raises Damaged, BagError.
    """
    try:
        _, _, size, checksum, word = _CHUNK.unpack_from(record)
        start = _CHUNK.size + word + _LENGTH.size
        (length,) = _LENGTH.unpack_from(record, start - _LENGTH.size)
        compression = record[_CHUNK.size:start - _LENGTH.size].decode()
        data = memoryview(record)[start:]
        if size > LARGEST or length != len(data) and not cut:
            raise Damaged('is not as large as it says')
        if not compression:
            content = data
        elif compression == 'zstd':
            content = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read(size + 1)
        elif compression == 'lz4':
            content = LZ4FrameDecompressor().decompress(data, max_length=size + 1)
        else:
            raise BagError(f'a chunk is compressed as {compression!r}; valid: none, lz4, zstd', 'E103')
    except (struct.error, UnicodeDecodeError, zstandard.ZstdError, RuntimeError, EOFError, MemoryError) as error:
        raise Damaged(f'cannot be decompressed: {error}') from None
    if not cut and len(content) != size:
        raise Damaged(f'holds {len(content)} bytes, not {size}')
    if not cut and checksum and zlib.crc32(content) != checksum:
        raise Damaged('does not match its checksum')
    return memoryview(content), checksum != 0
