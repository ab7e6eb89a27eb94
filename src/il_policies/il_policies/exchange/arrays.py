"""Datasets from other people's arrays: .npz files, and the zarr replay buffers of Diffusion Policy and UMI."""
from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from il_policies import durable
from il_policies.contract import from_dict, load_yaml
from il_policies.data.decode import encode_jpeg
from il_policies.data.errors import DataError
from il_policies.data.quality import assess_rows
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, require_new, write_episode

STRICT = {'extra': 'forbid'}


@dataclass(frozen=True)
class ArrayMapping:
    """One or several arrays of the file, as one column of the dataset."""

    __pydantic_config__ = STRICT

    array: str | tuple[str, ...]
    """Name in the file, or several to be joined; the first axis counts rows, the others are flattened."""
    columns: tuple[int, ...] = ()
    """Columns to take after flattening and joining, in this order; empty: all."""
    sin_cos: tuple[int, ...] = ()
    """Of these columns, the angles [rad]: each becomes its sine and cosine."""
    names: tuple[str, ...] = ()
    """Names of the entries that this gives."""
    image: bool = False
    """The array holds RGB images (N, h, w, 3) of whole numbers from 0 to 255."""

    def __post_init__(self):
        if self.image and (self.columns or self.sin_cos or self.names or not isinstance(self.array, str)):
            raise ValueError(f'{self.array}: an image is one array, without columns, sin_cos and names')

    def read(self, arrays: dict, where: str) -> np.ndarray:
        """The column, (N, D) float32. Raises DataError."""
        parts = []
        for name in (self.array,) if isinstance(self.array, str) else self.array:
            values = _rows(_array(arrays, name, where), 0, None, f'{where}: {name}')
            parts.append(values.reshape(len(values), -1).astype(np.float64))
        if len({len(part) for part in parts}) > 1:
            raise DataError(f'{where}: {", ".join(self.array)} have {[len(part) for part in parts]} rows; '
                            'arrays to be joined must have the same', 'E402')
        values = np.concatenate(parts, axis=1)
        chosen = self.columns or tuple(range(values.shape[1]))
        for key, given, valid in (('columns', self.columns, range(values.shape[1])), ('sin_cos', self.sin_cos, chosen)):
            bad = [column for column in given if column not in valid]
            if bad:
                raise DataError(f'{where}: {key} names columns {bad} of {self.array}; valid: {list(valid)}', 'E402')
        entries = []
        for column in chosen:
            angle = values[:, column]
            entries += [np.sin(angle), np.cos(angle)] if column in self.sin_cos else [angle]
        with np.errstate(over='ignore'):  # beyond float32 becomes infinite, which the store refuses
            values = np.stack(entries, axis=1).astype(np.float32)
        if self.names and len(self.names) != values.shape[1]:
            raise DataError(f'{where}: {self.array} has {values.shape[1]} entries, but names lists {list(self.names)}', 'E402')
        return values


@dataclass(frozen=True)
class ImportMapping:
    """What the arrays of a file mean."""

    __pydantic_config__ = STRICT

    fps: float
    """Rows per second [Hz]."""
    episode_ends: str
    """Name of the array of exclusive end rows, one per episode."""
    action: ArrayMapping
    """The action."""
    observations: dict[str, ArrayMapping]
    """Feature name → array."""
    action_offset: float = 0.0
    """Time from the observation to the action of the same row [s]."""
    action_next: bool = False
    """The action of a row is what its arrays hold one row later, such as the next pose; the last row of each episode has
    none and is dropped. `action_offset` then counts from that later row."""
    task: str = ''
    """What is done, in words."""

    def __post_init__(self):
        if not self.fps > 0:
            raise ValueError(f'fps is {self.fps}, must be > 0')
        if self.action.image:
            raise ValueError('action: an image is no action')


EXAMPLE = '''fps: 10
episode_ends: episode_ends
action: {array: action, names: [x, y]}
observations:
  pose: {array: state, sin_cos: [4]}
  camera: {array: img, image: true}'''


def load_mapping(path: str | Path) -> ImportMapping:
    """Read a mapping from YAML. Raises ContractError."""
    return from_dict(ImportMapping, load_yaml(path), str(path))


def import_npz(source: str | Path, out: str | Path, mapping: ImportMapping | None,
               progress: Callable[[float], None] | None = None) -> Dataset:
    """Make a dataset at `out` from the arrays of an .npz file; all of it or, on an error, nothing.

    progress is called with the share that is done. Raises DataError if the file or the mapping is unusable, without a
    mapping, or if `out` exists.
    """
    source = Path(source)
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f'{source}: no such file', 'E401') from None
    except (ValueError, OSError, EOFError, AttributeError, TypeError, MemoryError, zipfile.BadZipFile) as error:
        raise DataError(f'{source}: not readable as .npz without pickled objects: {error}', 'E401') from None
    return _import(source, arrays, out, mapping, progress)


def import_zarr(source: str | Path, out: str | Path, mapping: ImportMapping | None,
                progress: Callable[[float], None] | None = None) -> Dataset:
    """Make a dataset at `out` from a replay buffer; all of it or, on an error, nothing.

    The buffer is a .zarr folder or .zarr.zip file with groups data and meta.
    Arrays are named without their group: action, episode_ends. Images are read chunk by chunk.
    progress is called with the share that is done. Raises DataError if the file or the mapping is unusable, without a
    mapping, or if `out` exists.
    """
    import zarr  # takes a second, which other imports need not wait for

    source = Path(source)
    if not source.exists():
        raise DataError(f'{source}: no such file or folder', 'E401')
    try:
        from imagecodecs.numcodecs import register_codecs
        register_codecs()
    except ImportError:
        pass  # needed for UMI's images only
    try:
        store = zarr.storage.ZipStore(str(source), mode='r') if source.is_file() else str(source)
        group = zarr.open_group(store, mode='r')
        found = [(inner, name, array) for inner, members in group.groups() for name, array in members.arrays()]
    except Exception as error:  # zarr 2 and 3, numcodecs and zipfile raise each their own
        if 'imagecodecs' in str(error):
            raise DataError(f'{source}: {error}; JPEG-XL images need the package imagecodecs: pip install imagecodecs',
                            'E401') from None
        raise DataError(f'{source}: not readable as zarr: {" ".join(str(error).split())}', 'E401') from None
    doubled = {name for _, name, _ in found if sum(other == name for _, other, _ in found) > 1}
    arrays = {f'{inner}/{name}' if name in doubled else name: array for inner, name, array in found}
    if not arrays:
        raise DataError(f'{source}: no arrays in groups, as in data/action; there are: '
                        f'{", ".join(name for name, _ in group.arrays()) or "none"}', 'E401')
    return _import(source, arrays, out, mapping, progress)


def _import(source: Path, arrays: dict, out: str | Path, mapping: ImportMapping | None,
            progress: Callable[[float], None] | None) -> Dataset:
    """The dataset of arrays of numpy or zarr, name → array."""
    where = str(source)
    if mapping is None:
        present = '\n'.join(f'  {name}: {array.dtype}, shape {tuple(array.shape)}' for name, array in arrays.items())
        raise DataError(f'{where}: a mapping is needed. Arrays in the file:\n{present}\n'
                        f'A mapping is a YAML file like\n{EXAMPLE}', 'E402')
    action = mapping.action.read(arrays, where)
    N = len(action)
    lowdim = {name: part.read(arrays, where) for name, part in mapping.observations.items() if not part.image}
    images = {name: _image_array(arrays, part.array, where) for name, part in mapping.observations.items() if part.image}
    for name, values in {**lowdim, **images}.items():
        if values.shape[0] != N:
            raise DataError(f'{where}: {name} has {values.shape[0]} rows, the action {N}', 'E402')
    ends = _rows(_array(arrays, mapping.episode_ends, where), 0, None, f'{where}: {mapping.episode_ends}')
    lengths = np.diff(ends.astype(np.int64), prepend=0) if ends.ndim == 1 and ends.dtype.kind in 'iu' else np.zeros(0)
    if len(lengths) == 0 or lengths.min() <= 0 or ends[-1] != N:
        raise DataError(f'{where}: {mapping.episode_ends} must be rising integers ending at the number of rows, {N}', 'E402')
    later = int(mapping.action_next)
    if lengths.min() <= later:
        raise DataError(f'{where}: episode {int(lengths.argmin())} has one row and action_next is set; give episodes of two '
                        'rows or more', 'E207')
    begins = np.cumsum(lengths) - lengths

    names = mapping.action.names or tuple(f'action_{d}' for d in range(action.shape[1]))
    try:
        features = {name: Feature((lowdim[name].shape[1],), 'lowdim', part.names) if name in lowdim
                    else Feature(tuple(images[name].shape[1:]), 'image') for name, part in mapping.observations.items()}
        info = DatasetInfo(fps=mapping.fps, features=features, label='imported',
                           action=ActionInfo(names, mapping.action_offset + later / mapping.fps))
    except ValueError as error:
        raise DataError(f'{where}: the mapping does not do: {error}', 'E402') from None
    out = require_new(out)
    with durable.new_folder(out) as temporary:
        create(temporary, info)
        for index, (begin, end) in enumerate(zip(begins.tolist(), (begins + lengths - later).tolist())):
            T = end - begin
            stamps = np.round(np.arange(T) * (1e9 / mapping.fps)).astype(np.int64)
            rows = {name: values[begin:end] for name, values in lowdim.items()}
            table = {'stamp': stamps, 'filled': np.zeros(T, bool), 'action': action[begin + later:end + later]}
            write_episode(temporary, index, rows, table['action'], stamps, table['filled'],
                          {name: _jpegs(values, begin, end, f'{where}: {mapping.observations[name].array}')
                           for name, values in images.items()},
                          {'task': mapping.task, 'source': f'{source.name}[{begin}:{end}]'}, assess_rows(info, table | rows))
            if progress:
                progress(end / N)
    return Dataset(out)


def _array(arrays: dict, name: str, where: str):
    """An array by its name. Raises DataError if it is absent, holds no numbers, or not all of them."""
    if name not in arrays:
        raise DataError(f'{where}: no array {name!r}; there are: {", ".join(arrays)}', 'E402')
    array = arrays[name]
    if len(array.shape) == 0 or array.dtype.kind not in 'fiub':
        raise DataError(f'{where}: {name} is {array.dtype} of shape {tuple(array.shape)}; need rows of numbers', 'E402')
    if hasattr(array, 'nchunks'):
        _require_whole(array, Path(where) / array.path, f'{where}: {name}')
    return array


def _require_whole(array, folder: Path, where: str) -> None:
    """Raises DataError for what zarr reads without a word.

    Pickles it unpickles. Absent chunks it reads as zeros, truncated ones of Blosc as whatever is behind them in memory.
    """
    compressors = array.compressors if hasattr(array, 'compressors') else (array.compressor,)  # zarr 3, zarr 2
    for codec in (*compressors, *(array.filters or ())):
        if getattr(codec, 'codec_id', '') == 'pickle':  # numcodecs runs what is in it; zarr 3 refuses by itself
            raise DataError(f'{where} is pickled; write it with another codec', 'E401')
    absent = array.nchunks - array.nchunks_initialized
    if absent:
        raise DataError(f'{where} lacks {absent} of {array.nchunks} chunks; copy it again whole, or, if they hold nothing but '
                        'zeros, write them with write_empty_chunks', 'E401')
    sharded = getattr(array, 'shards', None) is not None
    if sharded or not any(type(compressor).__name__.startswith('Blosc') for compressor in compressors):
        return
    for file in folder.rglob('*'):  # a .zip has checksums
        if file.is_file() and not file.name.startswith('.') and file.suffix != '.json':
            with open(file, 'rb') as stream:
                header, size = stream.read(16), os.fstat(stream.fileno()).st_size
            if not header or int.from_bytes(header[12:], 'little') != size:
                raise DataError(f'{where}: {file.relative_to(folder)} is truncated; copy it again whole', 'E401')


def _image_array(arrays: dict, name: str, where: str):
    """An array of RGB images (N, h, w, 3). Raises DataError if it is another."""
    array = _array(arrays, name, where)
    if len(array.shape) != 4 or array.shape[3] != 3:
        raise DataError(f'{where}: {name} has shape {tuple(array.shape)}; images must be (N, h, w, 3)', 'E402')
    return array


def _rows(array, begin: int, end: int | None, where: str) -> np.ndarray:
    """Rows begin to end - 1 of an array, or all from begin on."""
    try:
        return np.asarray(array[begin:end])
    except Exception as error:  # damaged chunks: each codec raises its own
        raise DataError(f'{where}: not readable: {" ".join(str(error).split())}; copy it again whole', 'E401') from None


def _jpegs(array, begin: int, end: int, where: str) -> Iterator[bytes]:
    """Rows begin to end - 1 of an array of images as JPEG files; about 16, or a chunk of the array, in memory at a time."""
    chunk = array.chunks[0] if hasattr(array, 'chunks') else 1
    chunk *= max(1, 16 // chunk)
    for low in range(begin - begin % chunk, end, chunk):
        first = max(low, begin)
        block = _rows(array, first, min(low + chunk, end), where)
        with np.errstate(invalid='ignore'):
            pixels = block.astype(np.uint8)
        if block.dtype != np.uint8 and not np.array_equal(pixels, block):
            row = first + int(np.argmax((pixels != block).any(axis=(1, 2, 3))))
            raise DataError(f'{where}: row {row} holds values that are no whole numbers from 0 to 255; images must be uint8',
                            'E402')
        yield from map(encode_jpeg, pixels)
