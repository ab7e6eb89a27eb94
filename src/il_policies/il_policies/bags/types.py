"""Message types without ROS: as a bag defines them itself, else from .msg files, else the standard ones."""
from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.base import TypesysError
from rosbags.typesys.store import Typestore

from il_policies.bags.writer import add_definitions
from il_policies.data.errors import BagError

IDL_FILE = re.compile(r'^={80}\nIDL: .*\n', re.MULTILINE)
"""What rosbag2 writes before each of the IDL files that make a definition."""
IDL_INCLUDE = re.compile(r'^#include .*$', re.MULTILINE)
"""What rosbags does not parse; the file included is another part of the definition."""


def _parse_idl(text: str, name: str) -> dict:
    files = (file for file in IDL_FILE.split(IDL_INCLUDE.sub('', text)) if file.strip())
    return {kind: fields for file in files for kind, fields in get_types_from_idl(file).items()}


LANGUAGES = {'ros2msg': get_types_from_msg, 'ros2idl': _parse_idl}


def type_store(name: str, definitions: Collection[tuple[str, str]], msg_paths: Sequence[Path], distro: str) -> Typestore:
    """The types needed for messages of type `name`.

    definitions: (language, text) of every definition of it in the bag; other languages than ros2msg and ros2idl are not
    definitions. msg_paths: .msg files, packages or folders of them, for a type that is not defined there.
    distro: the ROS distribution whose standard types are meant then.
    Raises BagError E104 if it is nowhere defined, or in two ways.
    """
    if name.count('/') != 2:
        raise BagError(f'{name!r} is no message type of ROS 2', 'E104')
    usable = sorted({entry for entry in definitions if entry[0] in LANGUAGES and entry[1].strip()})
    if not usable:
        return _from_files(name, tuple(msg_paths), distro)
    first, *others = [_from_definition(name, *entry) for entry in usable]
    if any(_layout(other) != _layout(first) for other in others):
        raise BagError(f'the bag defines {name} in two ways; convert its files apart from each other', 'E104')
    return first


@lru_cache(maxsize=256)
def _from_definition(name: str, language: str, text: str) -> Typestore:
    types = get_typestore(Stores.EMPTY)
    try:
        types.register(LANGUAGES[language](text, name))
        types.get_msgdef(name)  # finds out about types within it that are not defined
    except (TypesysError, KeyError, SyntaxError, RecursionError) as error:
        reason = ' '.join(str(error).split())
        raise BagError(f'the bag defines {name} unreadably: {reason[:80]}', 'E104') from None
    return types


def _layout(types: Typestore) -> dict:
    return {name: fields for name, (_, fields) in types.fielddefs.items()}


@lru_cache(maxsize=256)
def _from_files(name: str, msg_paths: tuple[Path, ...], distro: str) -> Typestore:
    types = get_typestore(getattr(Stores, f'ROS2_{distro.upper()}', Stores.ROS2_KILTED))
    packages = _packages(msg_paths)

    def folder_of(package: str) -> Path:
        if package not in packages:
            raise BagError(f'{package} is not a standard package' + (f' and not below {", ".join(map(str, msg_paths))}' if
                           msg_paths else ''))
        return packages[package]

    try:
        add_definitions(types, name, folder_of)
    except (BagError, ValueError, RecursionError) as error:
        raise BagError(f'the bag does not define {name}, {error}; pass --msg-path with its .msg files', 'E104') from None
    return types


@lru_cache(maxsize=16)
def _packages(msg_paths: tuple[Path, ...]) -> dict[str, Path]:
    """Package → folder of its .msg files."""
    packages: dict[str, Path] = {}
    for path in msg_paths:
        files = sorted(path.rglob('*.msg')) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise BagError(f'{path}: no .msg files here', 'E104')
        for file in files:
            packages.setdefault(_package(file), file.parent)
    return packages


def _package(file: Path) -> str:
    """The package of a .msg file: what its package.xml says, else the folder's name."""
    folder = file.parent.parent if file.parent.name == 'msg' else file.parent
    try:
        return ElementTree.parse(folder / 'package.xml').findtext('name', folder.name).strip()
    except (OSError, ElementTree.ParseError):
        return folder.resolve().name
