"""Files that are whole after a crash: written, synced to disk, and only then renamed into place."""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write(file: Path, data: bytes) -> None:
    """Write a file and sync it to disk."""
    with open(file, 'wb') as stream:
        stream.write(data)
        flush(stream)


def replace(file: Path, data: bytes) -> None:
    """Write a file in place of an older one: after a crash there is the one or the other, whole."""
    temporary = file.with_name(f'.{file.name}.new')
    write(temporary, data)
    os.replace(temporary, file)
    sync(file.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to be filled, which becomes `path` at the end of the block, or on an error goes without a trace.

    What is written into it must be synced by who writes it. Raises OSError if `path` exists and is not an empty folder.
    """
    path = path.resolve()  # a link to an empty folder stays, and `..` gets a name
    temporary = path.with_name(f'.{path.name}.new')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(stream: BinaryIO) -> None:
    """Sync what was written to an open file to disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
