"""Bags as other programs leave them, also incomplete and odd ones: written by the mcap library and by SQLite itself."""
from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
import zstandard
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter

from recordings import MS, TYPES, recording

QOS = [{'history': 'keep_last', 'depth': 5, 'reliability': 'reliable', 'durability': 'volatile'}]


class Entry(NamedTuple):
    """A message of a bag."""

    topic: str
    type: str
    receive_ns: int
    publish_ns: int
    data: bytes


def entries(seconds: float = 1.0) -> list[Entry]:
    """The synthetic recording as it arrives: 2 ms after each stamp, published 1 ms after it."""
    return [Entry(f'/{topic}', m.__msgtype__, stamp + 2 * MS, stamp + MS, bytes(TYPES.serialize_cdr(m, m.__msgtype__)))
            for topic, stamp, m in recording(seconds)]


def definition(kind: str) -> str:
    """As rosbag2 embeds it."""
    return TYPES.generate_msgdef(kind, ros_version=2)[0]


def write_mcap(file: Path, messages: Sequence[Entry], compression: str = 'NONE', crc: bool = True, index: bool = True,
               summary: bool = True, chunks: bool = True, schema: str = 'ros2msg', encoding: str = 'cdr',
               chunk_size: int = 4096, notes: dict[str, dict[str, str]] | None = None) -> Path:
    """Everything but the messages.

    crc: of chunks; rosbag2 leaves it out unless asked. index: of the messages of chunks. summary: at the end of the file.
    schema: what the definitions are said to be in; they are empty but for ros2msg. notes: metadata records at the beginning.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    options = {} if summary else {'repeat_channels': False, 'repeat_schemas': False, 'use_statistics': False,
                                  'use_summary_offsets': False}
    index_types = IndexType.ALL if summary and index else IndexType.MESSAGE if index else IndexType.NONE
    with open(file, 'wb') as stream:
        writer = McapWriter(stream, chunk_size=chunk_size, compression=CompressionType[compression], enable_crcs=crc,
                            use_chunking=chunks, index_types=index_types, **options)
        writer.start(profile='ros2', library='test')
        for name, note in (notes or {}).items():
            writer.add_metadata(name, note)
        channels: dict[str, int] = {}
        schemas: dict[str, int] = {}
        for topic, kind, receive_ns, publish_ns, data in messages:
            if kind not in schemas:
                schemas[kind] = writer.register_schema(kind, schema, definition(kind).encode() if schema == 'ros2msg' else b'')
            if topic not in channels:
                channels[topic] = writer.register_channel(topic, encoding, schemas[kind])
            writer.add_message(channels[topic], receive_ns, data, publish_ns)
        writer.finish()
    return file


def write_sqlite(file: Path, messages: Sequence[Entry], wal_from: int | None = None) -> Path:
    """A file as rosbag2 of Humble writes it, without definitions.

    wal_from: messages from this one on stay in the write-ahead log, as after a crash under the preset `resilient`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(file)
    connection.executescript("""
        CREATE TABLE schema(schema_version INTEGER PRIMARY KEY, ros_distro TEXT NOT NULL);
        CREATE TABLE metadata(id INTEGER PRIMARY KEY, metadata_version INTEGER NOT NULL, metadata TEXT NOT NULL);
        CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL,
                            serialization_format TEXT NOT NULL, offered_qos_profiles TEXT NOT NULL);
        CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL, timestamp INTEGER NOT NULL,
                              data BLOB NOT NULL);
        CREATE INDEX timestamp_idx ON messages (timestamp ASC);
        INSERT INTO schema VALUES (3, 'humble');""")
    topics: dict[str, int] = {}
    for i, (topic, kind, receive_ns, _, data) in enumerate(messages):
        if i == wal_from:
            connection.commit()
            connection.execute('PRAGMA journal_mode = WAL')
            connection.execute('PRAGMA wal_autocheckpoint = 0')
        if topic not in topics:
            topics[topic] = len(topics) + 1
            connection.execute('INSERT INTO topics VALUES (?, ?, ?, ?, ?)', (topics[topic], topic, kind, 'cdr', ''))
        connection.execute('INSERT INTO messages(topic_id, timestamp, data) VALUES (?, ?, ?)', (topics[topic], receive_ns, data))
    connection.commit()
    left = {path: path.read_bytes() for path in file.parent.glob(f'{file.name}*') if not path.name.endswith('-shm')}
    connection.close()  # which would bring the log home
    for path, content in left.items():
        path.write_bytes(content)
    return file


def write_metadata(folder: Path, messages: Sequence[Entry], files: Sequence[str], **changes) -> Path:
    """The metadata.yaml of a bag of these messages and files."""
    kinds = {entry.topic: entry.type for entry in messages}
    stamps = [entry.receive_ns for entry in messages]
    topics = [{'topic_metadata': {'name': topic, 'type': kind, 'serialization_format': 'cdr', 'offered_qos_profiles': QOS,
                                  'type_description_hash': 'RIHS01_' + 64 * '0'},
               'message_count': sum(entry.topic == topic for entry in messages)} for topic, kind in kinds.items()]
    information = {'version': 9, 'storage_identifier': 'mcap', 'duration': {'nanoseconds': max(stamps) - min(stamps)},
                   'starting_time': {'nanoseconds_since_epoch': min(stamps)}, 'message_count': len(messages),
                   'topics_with_message_count': topics, 'compression_format': '', 'compression_mode': '',
                   'relative_file_paths': list(files), 'custom_data': None, 'ros_distro': 'jazzy'} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metadata.yaml').write_text(yaml.safe_dump({'rosbag2_bagfile_information': information}))
    return folder


def write_splits(folder: Path, messages: Sequence[Entry], order: Sequence[int]) -> Path:
    """As many files as `order` is long, one after the other in time, and listed in that order."""
    names = [f'{folder.name}_{i}.mcap' for i in range(len(order))]
    ends = [i * len(messages) // len(order) for i in range(len(order) + 1)]
    for name, start, stop in zip(names, ends, ends[1:]):
        write_mcap(folder / name, messages[start:stop])
    return write_metadata(folder, messages, [names[i] for i in order])


def compress(file: Path) -> Path:
    """Replace a file by the same, compressed as a whole."""
    packed = file.with_name(f'{file.name}.zstd')
    packed.write_bytes(zstandard.compress(file.read_bytes()))
    file.unlink()
    return packed
