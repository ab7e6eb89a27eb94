"""Decoded images of a dataset, kept as .npy files from which training reads ten times as fast as it decodes JPEG.

    DATASET/cache/<content of the episode>.<feature>.<h>x<w>x<c>.npy    (T, h, w, c), uint8 RGB or uint16 depth [mm]

A file is named by what it was made from, so that it cannot be stale, and is whole if it is there. The folder may be deleted
at any time, also while it is read; what the dataset no longer holds is removed from it when something is added.
"""
from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from il_policies import durable
from il_policies.data.store import Dataset

GIB = 1 << 30
RESERVE = GIB
"""The cache leaves this much of the disk free [bytes]."""
CHUNK = 32
"""Images decoded at a time, which bounds the memory."""


class CachedFrames:
    """The decoded images of one feature of one episode.

    They are read, not mapped into memory: a mapping holds a file descriptor, of which there are too few for many episodes,
    and turns a failing disk into a signal that kills the process. Reading costs 5 µs more.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: np.dtype):
        """Open the file of images (T, h, w, c). Raises OSError or ValueError if it is absent, not whole, or another one."""
        with open(file, 'rb') as stream:
            np.lib.format.read_magic(stream)
            if np.lib.format.read_array_header_1_0(stream) != (shape, False, dtype):
                raise ValueError(f'{file}: holds something else')
            self._offset = stream.tell()
            self._frame_bytes = int(np.prod(shape[1:])) * dtype.itemsize
            if os.fstat(stream.fileno()).st_size != self._offset + shape[0] * self._frame_bytes:
                raise ValueError(f'{file}: is not whole')
        self._file = str(file)

    def read(self, t: int, image: np.ndarray) -> bool:
        """Read the image of row t into `image` (h, w, c), contiguous; False if the file has gone."""
        try:
            descriptor = os.open(self._file, os.O_RDONLY)
            try:
                return os.preadv(descriptor, [image.data], self._offset + t * self._frame_bytes) == self._frame_bytes
            finally:
                os.close(descriptor)
        except OSError:
            return False


def open_cache(dataset: Dataset, episodes: Sequence[int], features: Sequence[str]) -> dict[tuple[int, str], CachedFrames]:
    """(episode, feature) → its decoded images; those not there yet are decoded first, with a progress bar.

    What cannot be cached, because the disk is full or read-only, is not in the result, and a line on stderr says so.
    Raises DataError if an image cannot be decoded.
    """
    wanted = [(i, feature) for i in episodes for feature in features]
    cached = {key: frames for key in wanted if (frames := _open(dataset, *key)) is not None}
    missing = [key for key in wanted if key not in cached]
    if not missing:
        return cached
    folder = dataset.path / 'cache'
    try:
        folder.mkdir(exist_ok=True)
        with open(folder / '.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process that does the same is waited for, and its files used
            _clean(dataset, folder)
            size, free = sum(_bytes(dataset, *key) for key in missing), shutil.disk_usage(folder).free
            if size + RESERVE > free:
                _say(f'{folder}: {size / GIB:.2f} GiB of decoded images do not fit into {free / GIB:.2f} GiB, of which '
                     f'{RESERVE / GIB:g} stays free')
                return cached
            rows = sum(dataset.episodes[i]['length'] for i, _ in missing)
            with _progress(f'{size / GIB:.2f} GiB of images to {folder}', rows) as advance:
                for key in missing:
                    frames = _open(dataset, *key)
                    if frames is None:
                        _build(dataset, *key, advance)
                        frames = _open(dataset, *key)
                    cached[key] = frames
    except OSError as error:
        _say(f'{folder}: {error.strerror or error}')
    return cached


def _say(reason: str) -> None:
    print(f'il: {reason}; images are decoded for every batch instead, which is ten times as slow', file=sys.stderr)


def _file(dataset: Dataset, i: int, feature: str) -> Path:
    shape = 'x'.join(str(size) for size in dataset.info.features[feature].shape)
    return dataset.path / 'cache' / f'{dataset.episodes[i]["content"][:32]}.{feature}.{shape}.npy'


def _array(dataset: Dataset, i: int, feature: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape (T, h, w, c) and type of the decoded images."""
    about = dataset.info.features[feature]
    return (dataset.episodes[i]['length'], *about.shape), np.dtype(about.dtype).newbyteorder('<')


def _bytes(dataset: Dataset, i: int, feature: str) -> int:
    shape, dtype = _array(dataset, i, feature)
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _open(dataset: Dataset, i: int, feature: str) -> CachedFrames | None:
    try:
        return CachedFrames(_file(dataset, i, feature), *_array(dataset, i, feature))
    except (OSError, ValueError):
        return None


def _clean(dataset: Dataset, folder: Path) -> None:
    """Remove what is left of interrupted builds and of episodes that have been replaced."""
    valid = {_file(dataset, i, feature).name for i in range(len(dataset)) for feature in dataset.info.images}
    for file in folder.iterdir():
        if file.name.endswith(('.npy', '.npy.new')) and file.name not in valid:
            file.unlink(missing_ok=True)


def _build(dataset: Dataset, i: int, feature: str, advance: Callable[[int], None]) -> None:
    """Write the file of one feature of one episode, whole or not at all."""
    file, (shape, dtype) = _file(dataset, i, feature), _array(dataset, i, feature)
    temporary = file.with_name(f'.{file.name}.new')
    try:
        with open(temporary, 'wb') as stream, ThreadPoolExecutor(os.cpu_count(), 'decode') as pool:
            np.lib.format.write_array_header_1_0(stream, {'descr': dtype.str, 'fortran_order': False, 'shape': shape})
            for begin in range(0, shape[0], CHUNK):
                rows = range(begin, min(begin + CHUNK, shape[0]))
                for image in pool.map(lambda t: dataset.image(i, feature, t), rows):
                    stream.write(np.ascontiguousarray(image, dtype).data)
                advance(len(rows))
            durable.flush(stream)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else one line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f'il: decoding {what}', file=sys.stderr, flush=True)
    with Progress(TextColumn(f'decoding {what}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                  console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task('', total=total)
        yield lambda rows: bar.advance(task, rows)
