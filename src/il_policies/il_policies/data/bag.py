"""rosbag2 bags in mcap, read without ROS."""
from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path

import yaml
from mcap.exceptions import McapError
from mcap.reader import SeekingReader
from mcap.stream_reader import CRCValidationError
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.base import TypesysError
from rosbags.typesys.store import Typestore

from il_policies.data.errors import BagError


def find_bags(path: str | Path) -> list[Path]:
    """The bag folders below a folder (or the folder itself), by name. Raises BagError if there is none."""
    path = Path(path)
    bags = sorted(file.parent for file in path.rglob('metadata.yaml') if not file.parent.name.endswith('.part'))
    if not bags:
        raise BagError(f'{path}: no bag here (a bag is a folder with metadata.yaml)')
    return bags


def bag_info(path: str | Path) -> dict:
    """What metadata.yaml says: the content of rosbag2_bagfile_information. Raises BagError."""
    file = Path(path) / 'metadata.yaml'
    try:
        information = yaml.safe_load(file.read_text())['rosbag2_bagfile_information']
        if information['storage_identifier'] != 'mcap':
            raise BagError(f'{path}: storage is {information["storage_identifier"]!r}; valid: mcap')
        information['relative_file_paths'], information['topics_with_message_count']
    except (OSError, yaml.YAMLError) as error:
        raise BagError(f'{file}: not readable: {" ".join(str(error).split())}') from None
    except (KeyError, TypeError):
        raise BagError(f'{file}: no rosbag2 metadata') from None
    return information


def topic_types(path: str | Path) -> dict[str, str]:
    """Topic → type of every topic of a bag, including silent ones."""
    return {entry['topic_metadata']['name']: entry['topic_metadata']['type']
            for entry in bag_info(path)['topics_with_message_count']}


def read_bag(path: str | Path, topics: Collection[str] | None = None) -> Iterator[tuple[str, str, int, int, object]]:
    """Messages in the order received: (topic, type, receive stamp [ns], publish stamp [ns], message).

    topics: only these (None: all). Types come from the definitions in the bag. Checksums are verified.
    Raises BagError naming the file if it is absent, damaged, or its types are not defined.
    """
    for name in bag_info(path)['relative_file_paths']:
        file = Path(path) / name
        try:
            stream = open(file, 'rb')
        except OSError as error:
            raise BagError(f'{file}: cannot be read: {error.strerror}') from None
        try:
            with stream:
                for schema, channel, message in SeekingReader(stream, validate_crcs=True).iter_messages(topics):
                    if channel.message_encoding != 'cdr' or schema is None:
                        raise BagError(f'{file}: {channel.topic} is encoded as {channel.message_encoding!r}; '
                                       'valid: cdr with schema')
                    try:
                        types = _types_of(schema.name, schema.encoding, schema.data)
                        content = types.deserialize_cdr(message.data, schema.name)
                    except (TypesysError, SerdeError, UnicodeDecodeError) as error:
                        raise BagError(f'{file}: {channel.topic} is unreadable as {schema.name}: {error}') from None
                    yield channel.topic, schema.name, message.log_time, message.publish_time, content
        except BagError:
            raise
        except (McapError, CRCValidationError, struct.error, ValueError, OSError) as error:
            raise BagError(f'{file}: damaged: {" ".join(str(error).split()) or type(error).__name__}') from None


@lru_cache(maxsize=256)
def _types_of(name: str, encoding: str, definition: bytes) -> Typestore:
    """The types of one schema, generated once."""
    if encoding not in ('ros2msg', 'ros2idl'):
        raise TypesysError(f'its definition is in {encoding!r}; valid: ros2msg, ros2idl')
    types = get_typestore(Stores.EMPTY)
    text = definition.decode()
    types.register(get_types_from_msg(text, name) if encoding == 'ros2msg' else get_types_from_idl(text))
    return types
