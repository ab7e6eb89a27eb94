"""rosbag2 bags in mcap, written without ROS.

A bag is a folder, written under the name <bag>.part and renamed when closed: one that keeps that name was cut short. What it
is about stands at the beginning of the file, so that this is known of one that was cut short, too.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.base import TypesysError
from rosbags.typesys.store import Typestore

from il_policies import durable
from il_policies.data.errors import BagError

DISTRO = 'kilted'
METADATA_VERSION = 9
CHUNK_SIZE = 512 * 1024
RESERVE = 4 * 1024 * 1024
"""Held back on the disk [bytes]: on a full one, the last chunk, the index and metadata.yaml still find room."""
ABOUT = 'il_policies'
"""Metadata record at the beginning of the file: what the bag is about."""
CONTRACT = 'contract'
"""Its key for the contract as JSON, which is left out of metadata.yaml: that one is for people."""
INFINITE = {'sec': 9223372036, 'nsec': 854775807}


def qos(reliability: str = 'reliable', durability: str = 'volatile', depth: int = 10) -> dict:
    """A QoS profile as rosbag2 writes it, without deadline, lifespan or lease."""
    return {'history': 'keep_last', 'depth': depth, 'reliability': reliability, 'durability': durability,
            'deadline': dict(INFINITE), 'lifespan': dict(INFINITE), 'liveliness': 'automatic',
            'liveliness_lease_duration': dict(INFINITE), 'avoid_ros_namespace_conventions': False}


def standard_types() -> Typestore:
    """Definitions of the common interfaces, as of the oldest distribution supported."""
    return get_typestore(Stores.ROS2_JAZZY)


def add_definitions(types: Typestore, type_name: str, folder_of: Callable[[str], Path]) -> None:
    """Add a type and everything it contains to `types`, reading .msg files where they are not known yet.

    type_name: such as il_msgs/msg/ActionChunk. folder_of: package → folder of its .msg files.
    Raises BagError if a definition is absent or unreadable.
    """
    if type_name not in types.fielddefs:
        package, _, name = type_name.split('/')
        file = folder_of(package) / f'{name}.msg'
        try:
            types.register(get_types_from_msg(file.read_text(), type_name))
        except (OSError, TypesysError) as error:
            raise BagError(f'{type_name}: no definition: {error}', 'E104') from None
    for _, (kind, content) in types.fielddefs[type_name][1]:
        if kind in (Nodetype.ARRAY, Nodetype.SEQUENCE):
            kind, content = content[0]
        if kind == Nodetype.NAME:
            add_definitions(types, content, folder_of)


def cut_short(folder: Path) -> list[Path]:
    """The bags in a folder that were never closed, by name."""
    return sorted(path for path in folder.glob('*.part') if path.is_dir())


class _Whole:
    """A file to which everything since the last flush is added, or nothing: a full disk leaves no half record behind."""

    def __init__(self, path: Path):
        self._file = open(path, 'xb', buffering=0)
        self._size = 0
        self.pending = bytearray()
        """Written since the last flush."""

    def tell(self) -> int:
        return self._size + len(self.pending)

    def write(self, data: bytes) -> None:
        self.pending += data

    def flush(self) -> None:
        """Hand what is pending to the system; it stays pending if that fails. Raises OSError."""
        written = 0
        try:
            with memoryview(self.pending) as view:
                while written < len(view):
                    written += self._file.write(view[written:])
        except OSError:
            self._file.seek(self._size)
            self._file.truncate()
            raise
        self._size += written
        self.pending.clear()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


class BagWriter:
    """Writes one bag, message by message, as they come serialised from the middleware."""

    def __init__(self, path: str | Path, types: Typestore, about: dict[str, str] | None = None):
        """Open <path>.part for writing, with what the bag is `about`. Raises BagError if `path` exists or cannot be made."""
        self.path = Path(path)
        self.part = self.path.with_name(f'{self.path.name}.part')
        for taken in (self.path, self.part):
            if taken.exists():
                raise BagError(f'{taken}: exists already; choose another name, or remove it', 'E301')
        self._types, self._about = types, about or {}
        self._reserve = self.part / 'reserve'
        try:
            self.part.mkdir(parents=True)
            with open(self._reserve, 'xb') as reserve:
                os.posix_fallocate(reserve.fileno(), 0, RESERVE)
            self._stream = _Whole(self.part / f'{self.path.name}_0.mcap')
            self._writer = McapWriter(self._stream, chunk_size=CHUNK_SIZE, compression=CompressionType.NONE)
            self._writer.start(profile='ros2', library='il_policies')
            if self._about:
                self._writer.add_metadata(ABOUT, self._about)
            self._stream.flush()
        except OSError as error:
            shutil.rmtree(self.part, ignore_errors=True)
            raise BagError(f'{self.path}: cannot be written: {error.strerror}', 'E305') from None
        self._schemas: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self._topics: dict[str, dict] = {}  # topic → what metadata.yaml says about it
        self._first: int | None = None
        self._last = 0

    def add_topic(self, topic: str, type_name: str, profiles: list[dict] | None = None) -> None:
        """Declare a topic with the QoS profiles its publishers offer. Raises BagError for an unknown type."""
        try:
            definition, _ = self._types.generate_msgdef(type_name, ros_version=2)
            type_hash = self._types.hash_rihs01(type_name)
        except (TypesysError, KeyError):
            raise BagError(f'{topic}: no definition of {type_name}', 'E104') from None
        profiles = [qos()] if profiles is None else profiles
        if type_name not in self._schemas:
            self._schemas[type_name] = self._writer.register_schema(type_name, 'ros2msg', definition.encode())
        self._channels[topic] = self._writer.register_channel(topic, 'cdr', self._schemas[type_name], {
            'offered_qos_profiles': yaml.safe_dump(profiles, sort_keys=False).strip(), 'topic_type_hash': type_hash})
        self._topics[topic] = {'topic_metadata': {'name': topic, 'type': type_name, 'serialization_format': 'cdr',
                                                  'offered_qos_profiles': profiles, 'type_description_hash': type_hash},
                               'message_count': 0}

    def write(self, topic: str, data: bytes, receive_ns: int, publish_ns: int) -> None:
        """Append a message serialised as CDR. Raises BagError for an undeclared topic.

        Raises OSError if the disk refuses: nothing is lost then, and `close` has what was held back to complete the bag with.
        """
        if topic not in self._channels:
            raise BagError(f'{self.path}: {topic} was not declared; there are: {", ".join(self._channels)}')
        about = self._topics[topic]
        self._writer.add_message(self._channels[topic], receive_ns, data, publish_ns, about['message_count'])
        about['message_count'] += 1
        self._first = receive_ns if self._first is None else min(self._first, receive_ns)
        self._last = max(self._last, receive_ns)
        if self._stream.pending:  # a chunk is full
            self._stream.flush()

    def flush(self) -> None:
        """Hand everything to the system, from which a process that dies takes nothing back. Raises OSError."""
        self._writer.flush()

    @property
    def counts(self) -> dict[str, int]:
        """Topic → messages written."""
        return {topic: about['message_count'] for topic, about in self._topics.items()}

    def close(self, custom_data: dict[str, str] | None = None) -> Path:
        """Finish the file, write metadata.yaml, and give the bag its name. Returns its path.

        custom_data: what metadata.yaml says besides what the bag is about. Raises OSError, and leaves <path>.part.
        """
        self._reserve.unlink(missing_ok=True)
        about = {key: value for key, value in self._about.items() if key != CONTRACT}
        name = f'{self.path.name}_0.mcap'
        span = {'duration': {'nanoseconds': self._last - (self._first or 0)},
                'starting_time': {'nanoseconds_since_epoch': self._first or 0}}
        count = sum(self.counts.values())
        information = {
            'version': METADATA_VERSION, 'storage_identifier': 'mcap', **span, 'message_count': count,
            'topics_with_message_count': list(self._topics.values()), 'compression_format': '', 'compression_mode': '',
            'relative_file_paths': [name],
            'files': [{'path': name, 'starting_time': span['starting_time'], 'duration': span['duration'],
                       'message_count': count}],
            'custom_data': {**about, **(custom_data or {})} or None, 'ros_distro': DISTRO}
        self._writer.add_metadata('rosbag2', {'serialized_metadata': _dump(information)})
        self._writer.finish()
        durable.flush(self._stream)
        self._stream.close()
        durable.write(self.part / 'metadata.yaml', _dump({'rosbag2_bagfile_information': information}).encode())
        os.rename(self.part, self.path)
        durable.sync(self.path.parent)
        return self.path

    def discard(self) -> None:
        """Drop the recording, also one that the disk refuses."""
        self._stream.close()
        shutil.rmtree(self.part)


class _Dumper(yaml.SafeDumper):
    """Block style without aliases, which other YAML readers of rosbag2 files do not expect."""

    def ignore_aliases(self, data):
        return True


def _dump(data) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False)
