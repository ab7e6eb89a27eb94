"""rosbag2 bags, read without ROS: folders or single files, MCAP or SQLite, whole or, if asked, what is left of them."""
from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import yaml
import zstandard
from rosbags.serde import SerdeError
from rosbags.typesys.store import Typestore

from il_policies.bags import mcap_file, sqlite_file
from il_policies.bags.mcap_file import McapFile
from il_policies.bags.sqlite_file import SqliteFile
from il_policies.bags.storage import ZSTD_MAGIC, Damaged, Raw, Topic, merged
from il_policies.bags.types import type_store
from il_policies.bags.writer import ABOUT, CONTRACT
from il_policies.data.errors import BagError
from il_policies.yaml_file import parse

RECORDING = re.compile(r'(.+)\.(mcap|db3)(\.zstd)?')
"""Names of the files of bags."""
PART = '.part'
ENDS = 64 * 1024
"""Of each end of a file this much tells it from another [bytes]."""


class Message(NamedTuple):
    """A message with its stamps."""

    topic: str
    type: str
    receive_ns: int
    publish_ns: int | None
    """None where the storage keeps none (SQLite)."""
    message: object


def find_bags(path: str | Path, salvage: bool = False) -> list[Path]:
    """The bags below a folder, or the folder or file itself, in natural order of their names (demo_2 before demo_10).

    A bag is a folder with metadata.yaml, or with files named after it (demo/demo_0.mcap), or else a single file. Links are
    followed; a folder that several names lead to counts once. Bags that were cut short while being recorded (demo.part)
    count only if they are to be salvaged.
    Raises BagError if there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = set()
    for folder in _folders(path):
        if (folder / 'metadata.yaml').exists():
            found.add(folder)
            continue
        name = folder.absolute().name.removesuffix(PART)
        for file in folder.iterdir():
            if (match := RECORDING.fullmatch(file.name)) and file.is_file():
                found.add(folder if re.fullmatch(re.escape(name) + r'(_\d+)?', match[1]) else file)
    bags = sorted(found, key=lambda bag: natural(str(bag)))
    part = [bag for bag in bags if any(name.endswith(PART) for name in (path.name, *bag.relative_to(path).parts))]
    if not salvage:
        bags = [bag for bag in bags if bag not in part]
    if not bags and part:
        names = ', '.join(bag.name for bag in part)
        raise BagError(f'{path}: only bags that were cut short: {names}; rerun with --salvage', 'E101')
    if not bags:
        raise BagError(f'{path}: {"no bag here" if path.exists() else "no such file or folder"}; '
                       'a bag is a folder with metadata.yaml or a file .mcap or .db3', 'E102')
    return bags


def _folders(path: Path) -> Iterator[Path]:
    """The folder and all below it that can be listed, each once: by its own name, else by that of a link to it."""
    seen, pending = set(), deque([path])
    while pending:
        folder = pending.popleft()
        if (place := folder.resolve()) in seen:  # also where links make a circle
            continue
        seen.add(place)
        try:
            below = sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: natural(entry.name))
        except OSError:  # absent, or not ours to read, as lost+found
            continue
        yield folder
        for entry in reversed(below):
            (pending.append if entry.is_symlink() else pending.appendleft)(entry)


def natural(name: str) -> list:
    """Sorts names with numbers in them by the numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


class Bag:
    """One recording. Reading it twice gives the same, and so does another container of the same messages."""

    path: Path
    name: str
    """Of its folder or file, without endings."""
    topics: dict[str, str]
    """Topic → type, by name; also those nothing was recorded of."""
    about: dict[str, str]
    """What the recorder noted (custom_data of metadata.yaml): task, success, …; {} if nothing."""
    damage: tuple[str, ...]
    """What could not be read, for people; () of a whole bag."""

    def __init__(self, path: str | Path, msg_paths: Sequence[str | Path] = (), salvage: bool = False):
        """Open a folder, or a single .mcap or .db3 file, compressed or not; metadata.yaml is not needed.

        msg_paths: .msg files, packages or folders of them, for types the bag does not define.
        salvage: take what can be read of a damaged bag, which is refused otherwise: here, or where reading finds out.
        Raises BagError: E101 damaged, E102 no bag, E103 of a kind that is not read.
        """
        self.path = Path(path)
        self.name = RECORDING.sub(r'\1', self.path.absolute().name.removesuffix(PART))
        self._msg_paths = tuple(Path(msg_path) for msg_path in msg_paths)
        self._types: dict[str, tuple[Typestore, str]] = {}
        damage: list[str] = []
        try:
            information = _information(self.path) if (self.path / 'metadata.yaml').exists() else {}
        except BagError as error:
            if not salvage:
                raise
            information = {}
            damage.append(error.message)
        self._paths = _paths(self.path, information)
        self._files: list[tuple[Path, McapFile | SqliteFile]] = []
        for place in self._paths:
            try:
                file = _open(place, salvage)
            except BagError as error:
                raise error.at(place) from None
            except (Damaged, OSError) as error:
                fault = error.strerror if isinstance(error, OSError) else str(error)
                if not salvage:
                    raise self._refused(place, fault) from None
                damage.append(f'{place.name}: nothing usable: {fault}')
            else:
                damage += [f'{place.name}: {fault}' for fault in file.damage]
                self._files.append((place, file))
        if not self._files:
            raise BagError(f'{self.path}: nothing in it can be read: {"; ".join(damage)}', 'E101')

        self.topics = {}
        recorded = sum((Counter(file.counts) for _, file in self._files), Counter())
        missing = []
        for topic, kind, count in _promised(information):
            self.topics[topic] = kind
            if recorded[topic] < count:
                missing.append(f'{count - recorded[topic]} of {count} messages on {topic}')
        if missing:
            fault = f'missing by metadata.yaml: {", ".join(missing)}'
            if not salvage:
                raise self._refused(self.path, fault)
            damage.append(fault)
        self._declared: dict[str, set[Topic]] = {}
        for _, file in self._files:
            for topic in file.topics:
                self._declared.setdefault(topic.name, set()).add(topic)
        self.topics |= {name: min(declared).type for name, declared in self._declared.items()}
        self.topics = dict(sorted(self.topics.items()))
        self.damage = tuple(damage)

        notes = {name: note for _, file in reversed(self._files) for name, note in file.notes.items()}
        self._note = notes.get(ABOUT, {})
        about = information.get('custom_data') or _custom_data(notes.get('rosbag2', {})) or self._note
        self.about = {str(key): str(value) for key, value in about.items() if key != CONTRACT}
        # Definitions stand in bags since Iron, the distribution in their metadata since Jazzy.
        self._distro = information.get('ros_distro') or 'humble'

    @property
    def contract(self) -> dict | None:
        """The contract under which it was recorded, as plain data, if the recorder put it in. Raises BagError E102."""
        if CONTRACT not in self._note:
            return None
        try:
            return json.loads(self._note[CONTRACT])
        except ValueError:
            raise BagError(f'{self.path}: the contract in it is unreadable; pass --contract', 'E102') from None

    @cached_property
    def fingerprint(self) -> list:
        """Tells this recording from another one, or from a later state of itself, without reading all of it. Plain data."""
        ends = []
        for path in self._paths:
            for file in (path, path.with_name(f'{path.name}-wal')):
                if file.exists():
                    size = file.stat().st_size
                    with open(file, 'rb') as stream:
                        check = zlib.crc32(stream.read(ENDS))
                        stream.seek(max(size - ENDS, 0))
                        ends.append([file.name, size, zlib.crc32(stream.read(ENDS), check)])
        return [self.name, sorted(map(list, self.about.items())), sorted(ends)]

    def raw(self, topics: Collection[str] | None = None) -> Iterator[Raw]:
        """The messages of these topics (None: all) as recorded, in order of receipt; at equal stamps as they were written.

        Raises BagError if one of the topics is not there (E201), or the bag proves damaged (E101).
        """
        for topic in self.topics if topics is None else topics:
            if topic not in self.topics:
                raise BagError(f'{self.path}: no topic {topic}; there are: {", ".join(self.topics) or "none"}', 'E201')
            types = sorted({declared.type for declared in self._declared.get(topic, ())})
            if len(types) > 1:
                raise BagError(f'{self.path}: {topic} was recorded as {" and as ".join(types)}; a topic has one type', 'E201')
        sources = [(path, file) for path, file in self._files if file.span]
        return merged([file.span[0] for _, file in sources], lambda i: self._read(*sources[i], topics))

    def messages(self, topics: Collection[str] | None = None) -> Iterator[Message]:
        """As `raw`, deserialised. Raises BagError as that and `deserialize` do."""
        for topic, data, receive_ns, publish_ns in self.raw(topics):
            yield Message(topic, self.topics[topic], receive_ns, publish_ns, self.deserialize(topic, data))

    def deserialize(self, topic: str, data: bytes) -> object:
        """A message of a topic. Raises BagError: no CDR (E103), type not defined (E104), data not of that type (E105)."""
        if topic not in self._types:
            self._types[topic] = self._types_of(topic), self.topics[topic]
        types, name = self._types[topic]
        try:
            return types.deserialize_cdr(data, name)
        except (SerdeError, ValueError, IndexError, OverflowError, MemoryError, struct.error) as error:
            raise BagError(f'{self.path}: a message on {topic} is unreadable as {name}: {error}', 'E105') from None

    def _read(self, path: Path, file: McapFile | SqliteFile, topics: Collection[str] | None) -> Iterator[Raw]:
        try:
            yield from file.read(topics)
        except Damaged as error:
            raise self._refused(path, str(error)) from None
        except BagError as error:
            raise error.at(path) from None

    def _types_of(self, topic: str) -> Typestore:
        declared = self._declared.get(topic, ())
        for encoding in {entry.encoding for entry in declared} - {'cdr'}:
            raise BagError(f'{self.path}: {topic} is encoded as {encoding!r}; valid: cdr', 'E103')
        definitions = {(entry.language, entry.definition) for entries in self._declared.values() for entry in entries
                       if entry.type == self.topics[topic]}
        try:
            return type_store(self.topics[topic], definitions, self._msg_paths, self._distro)
        except BagError as error:
            raise error.at(f'{self.path}: {topic}') from None

    def _refused(self, place: Path, fault: str) -> BagError:
        """The error of a damaged bag: what is wrong, what could be had of it all the same, and how."""
        try:
            rest = Bag(self.path, salvage=True)
            spans = [file.span for _, file in rest._files if file.span]
            count = sum(sum(file.counts.values()) for _, file in rest._files)
        except BagError:
            count = 0
        if not count:
            return BagError(f'{place}: {fault}; nothing in it is usable', 'E101')
        seconds = (max(last for _, last in spans) - min(first for first, _ in spans)) / 1e9
        return BagError(f'{place}: {fault}; {count} messages, {seconds:.1f} s are usable: rerun with --salvage', 'E101')


def _information(path: Path) -> dict:
    """What metadata.yaml says: the content of rosbag2_bagfile_information. Raises BagError E102."""
    file = path / 'metadata.yaml'
    try:
        information = parse(file.read_text())['rosbag2_bagfile_information']
        [Path(name) for name in information['relative_file_paths']], _promised(information)
        dict(information.get('custom_data') or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BagError(f'{file}: not readable: {" ".join(str(error).split())}', 'E102') from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BagError(f'{file}: no metadata of rosbag2; remove it to read the bag without', 'E102') from None
    return information


def _promised(information: dict) -> list[tuple[str, str, int]]:
    """(topic, type, messages) of every topic by metadata.yaml."""
    return [(entry['topic_metadata']['name'], entry['topic_metadata']['type'], int(entry['message_count']))
            for entry in information.get('topics_with_message_count', ())]


def _paths(path: Path, information: dict) -> list[Path]:
    """The files of a bag in natural order: as metadata.yaml says, else all in the folder. Raises BagError E102."""
    if not path.exists():
        raise BagError(f'{path}: no such file or folder', 'E102')
    if not path.is_dir():
        return [path]
    # Before version 4 the names began with the folder's.
    files = ([path / Path(name).name for name in information.get('relative_file_paths', ())]
             or [file for file in path.iterdir() if RECORDING.fullmatch(file.name)])
    if not files:
        raise BagError(f'{path}: no bag: no metadata.yaml, no .mcap or .db3 file', 'E102')
    return sorted(files, key=lambda file: natural(file.name))


def _open(path: Path, salvage: bool) -> McapFile | SqliteFile:
    """Open a file of a bag, whatever its name says. A compressed one is unpacked into a temporary file without a name.

    salvage: give what can be read of a damaged file, and say so in `damage`.
    Raises Damaged, BagError if this is no file of a bag, OSError if it cannot be opened.
    """
    with open(path, 'rb') as stream:
        magic = stream.read(16)
    if magic.startswith(ZSTD_MAGIC):
        with tempfile.NamedTemporaryFile(prefix='il_bag_', suffix=Path(path.stem).suffix) as unpacked:
            fault = _unpack(path, unpacked.name)
            if fault and not salvage:
                raise Damaged(fault)
            file = _open(Path(unpacked.name), salvage)  # it stays open when the name is gone
        file.damage = (*([fault] if fault else []), *file.damage)
        return file
    if magic.startswith(mcap_file.MAGIC):
        return McapFile(path, salvage)
    if magic == sqlite_file.MAGIC:
        return SqliteFile(path, salvage)
    if magic.startswith(b'#ROSBAG V'):
        raise BagError('a bag of ROS 1; convert it with rosbags-convert', 'E103')
    if not RECORDING.fullmatch(path.name):
        raise BagError('no bag: neither MCAP nor SQLite', 'E102')
    raise Damaged('it does not begin as MCAP or SQLite do' if magic else 'it is empty')


def _unpack(path: Path, unpacked: str) -> str:
    """Unpack a file compressed with zstd as far as it goes; what stopped it, if anything did. Raises BagError."""
    try:
        with (open(path, 'rb') as packed, open(unpacked, 'wb') as stream,
              zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as reader):
            shutil.copyfileobj(reader, stream, 1 << 20)
    except zstandard.ZstdError as error:
        return f'cannot be decompressed further: {error}'
    except OSError as error:
        raise BagError(f'cannot be unpacked to {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a folder with room',
                       'E103') from None
    return ''


def _custom_data(note: dict[str, str]) -> dict:
    """custom_data of the metadata that rosbag2 keeps inside a file, too."""
    try:
        return dict(parse(note.get('serialized_metadata', '')).get('custom_data') or {})
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):
        return {}
