"""A file in SQLite, read in bounded memory."""
from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import weakref
from array import array
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np

from il_policies.bags.storage import STAMPS, Damaged, Raw, Topic, plain

MAGIC = b'SQLite format 3\0'
FAILURES = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises of a damaged file; its message about it need not be text."""


class SqliteFile:
    """A file in SQLite. It keeps no stamps of publishing."""

    damage: tuple[str, ...]
    """What could not be read, for people; () of a whole file."""
    topics: list[Topic]
    counts: dict[str, int]
    """Topic → messages."""
    span: tuple[int, int] | None
    """First and last stamp of receipt [ns]; None of a file without messages."""
    notes: dict[str, dict[str, str]]
    """What the recorder wrote about the bag, as in MCAP: `rosbag2` with the metadata as YAML."""

    def __init__(self, path: Path, salvage: bool):
        """Raises Damaged, OSError."""
        self._ids: np.ndarray | None = None
        self.damage = ()
        try:
            self._connect(path)
            self._declare()
            self._count(self._connection.execute('SELECT topic_id, count(*), min(timestamp), max(timestamp) '
                                                 'FROM messages NOT INDEXED GROUP BY topic_id'))
            if salvage:
                for _ in self.read():
                    pass
        except (Damaged, *FAILURES) as error:
            if not salvage:
                raise Damaged(str(error)) from None
            try:
                self._salvage(path)
            except FAILURES:
                raise Damaged(str(error)) from None

    def _connect(self, path: Path) -> None:
        """Open the file, or a copy in which SQLite has brought home the journal of a crash. Raises FAILURES, OSError."""
        journals = [file for suffix in ('-wal', '-journal') if (file := path.with_name(path.name + suffix)).exists()]
        if not journals:
            return self._open(path)
        with tempfile.TemporaryDirectory(prefix='il_bag_') as folder:
            for file in (path, *journals):
                shutil.copyfile(file, Path(folder, file.name))
            with contextlib.closing(sqlite3.connect(Path(folder, path.name))) as connection:
                connection.execute('PRAGMA journal_mode = DELETE')
            self._open(Path(folder, path.name))

    def _open(self, path: Path) -> None:
        """Open a file as it is: without locks, and without need of a writable folder."""
        self._connection = sqlite3.connect(f'file:{quote(str(path.absolute()))}?mode=ro&immutable=1', uri=True,
                                           check_same_thread=False)
        weakref.finalize(self, self._connection.close)
        self._connection.text_factory = lambda text: text.decode('utf-8', 'replace')
        with contextlib.suppress(*FAILURES):
            self._connection.execute('PRAGMA schema_version')  # from here on its name may go

    def read(self, topics: Collection[str] | None = None) -> Iterator[Raw]:
        """The messages of these topics (None: all) in order of receipt. Raises Damaged."""
        wanted = {i: topic for i, topic in self._names.items() if topics is None or topic in topics}
        found, before = dict.fromkeys(wanted.values(), 0), 0
        try:
            for i, stamp, data in self._rows(wanted):
                if i in wanted:
                    if stamp < before:
                        raise Damaged(f'a message at {stamp} ns after one at {before} ns')
                    before = stamp
                    found[wanted[i]] += 1
                    yield Raw(wanted[i], data, stamp, None)
        except FAILURES as error:
            raise Damaged(str(error)) from None
        for topic, count in found.items():
            if count != self.counts[topic]:
                raise Damaged(f'{count} messages on {topic}, where {self.counts[topic]} were recorded')

    def _rows(self, wanted: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """(topic, stamp, data), in order of stamps; of a salvaged file also other topics'. Raises FAILURES, Damaged."""
        if self._ids is None:
            ids = ', '.join(map(str, wanted))
            rows = self._connection.execute('SELECT topic_id, timestamp, data FROM messages '
                                            f'WHERE topic_id IN ({ids}) ORDER BY timestamp, id')
            return (self._checked(row) for row in rows)
        return (self._row(int(i)) for i in self._ids)

    def _row(self, i: int) -> tuple[int, int, bytes]:
        """Message number i: (topic, stamp, data). Raises FAILURES, Damaged."""
        rows = self._connection.execute('SELECT topic_id, timestamp, data FROM messages WHERE id = ?', (i,))
        return self._checked(rows.fetchone())

    def _checked(self, row: tuple | None) -> tuple[int, int, bytes]:
        topic, stamp, data = row or (None, None, None)
        if topic not in self._names or not _is_stamp(stamp) or not isinstance(data, bytes):
            raise Damaged(f'an impossible message: topic {topic} at {stamp} ns')
        return topic, stamp, plain(data)

    def _declare(self) -> None:
        """Read what the file says about topics and itself. Raises FAILURES, Damaged."""
        query = self._connection.execute
        tables = {name for name, in query("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables >= {'topics', 'messages'}:
            raise Damaged(f'no bag: a database of the tables {", ".join(sorted(tables)) or "(none)"}')
        definitions = {}
        if 'message_definitions' in tables:  # since Iron
            definitions = {name: content for name, *content in query(
                'SELECT topic_type, encoding, encoded_message_definition FROM message_definitions')}
        self._names, self.topics = {}, []
        for i, *said in query('SELECT id, name, type, serialization_format FROM topics'):
            topic = Topic(*said, *definitions.get(said[1], ('', '')))
            if not all(isinstance(text, str) for text in topic):
                raise Damaged(f'an impossible topic: {said}')
            self._names[i] = topic.name
            self.topics.append(topic)
        self.notes = {}
        if 'metadata' in tables:
            for text, in query('SELECT metadata FROM metadata ORDER BY id DESC LIMIT 1'):
                self.notes['rosbag2'] = {'serialized_metadata': str(text)}

    def _count(self, rows: Iterable[tuple[int, int, int, int]]) -> None:
        """Take (topic, messages, first stamp, last stamp) of each topic. Raises Damaged."""
        rows = list(rows)
        self.counts = dict.fromkeys(self._names.values(), 0)
        for i, count, first, last in rows:
            if i not in self._names or not _is_stamp(first) or not _is_stamp(last):
                raise Damaged(f'messages of topic {i} from {first} to {last} ns')
            self.counts[self._names[i]] += count
        self.span = (min(row[2] for row in rows), max(row[3] for row in rows)) if rows else None

    def _salvage(self, path: Path) -> None:
        """Find the messages that can be read. Raises FAILURES, Damaged if there are none, OSError."""
        if surplus := _beyond_pages(path):  # SQLite would fill the last page with zeros, and messages in it
            with tempfile.NamedTemporaryFile(prefix='il_bag_') as copy:
                with open(path, 'rb') as stream:
                    shutil.copyfileobj(stream, copy)
                copy.truncate(copy.tell() - surplus)
                self._open(Path(copy.name))
        else:
            self._open(path)
        self._connection.execute('PRAGMA writable_schema = ON')  # takes a file that is shorter than its header says
        self._declare()
        numbers, fault = array('q'), 'some of them are unreadable'
        for direction in ('ASC', 'DESC'):  # from both ends towards what is unreadable
            try:
                for i, in self._connection.execute(f'SELECT id FROM messages NOT INDEXED ORDER BY id {direction}'):
                    numbers.append(i)
                break
            except FAILURES as error:
                fault = str(error)
        ids, stamps, topics = (array('q') for _ in range(3))
        for i in map(int, np.unique(np.array(numbers, np.int64))):
            try:
                topic, stamp, data = self._row(i)
            except (Damaged, *FAILURES):
                continue
            ids.append(i), stamps.append(stamp), topics.append(topic)
        if not ids:
            raise Damaged(fault)
        ids, stamps, topics = (np.array(column, np.int64) for column in (ids, stamps, topics))
        self._ids = ids[np.lexsort((ids, stamps))]
        self._count((int(i), len(of_topic), int(of_topic.min()), int(of_topic.max()))
                    for i in np.unique(topics) for of_topic in [stamps[topics == i]])
        self.damage = (f'{len(ids)} messages read, of numbers {ids.min()} to {ids.max()}: {fault}',)


def _beyond_pages(path: Path) -> int:
    """Bytes after the last whole page."""
    with open(path, 'rb') as stream:
        size = int.from_bytes(stream.read(18)[16:], 'big')
    return path.stat().st_size % (65536 if size == 1 else max(size, 512))


def _is_stamp(value: object) -> bool:
    return isinstance(value, int) and value in STAMPS
