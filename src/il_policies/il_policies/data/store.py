"""The episode store: one folder an episode, committed whole or not at all.

    DATASET/dataset.json                       rate, features, action, contract
            episodes/000000/lowdim.parquet     stamp (int64 [ns]), features and action (float32 lists), filled (bool),
                                               of each image feature the bytes [begin, end) of a row's image in its file
                            images/<feature>.mjpeg   one JPEG a row, end to end (ffplay plays it)
                            images/<feature>.png     depth: one 16-bit PNG a row [mm], end to end
                            episode.json       length, task, success, source, content hash, …
                            report.json        quality of the recording
            cache/                             decoded images (`il_policies.data.windows`), may be deleted at any time

An episode is written into a temporary folder, synced to disk and renamed, so that a crash leaves whole episodes only.
Its index is the name of its folder and nothing else: a folder can be written first and be given its place later.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from il_policies import durable
from il_policies.contract import ContractError, from_dict
from il_policies.data.decode import decode_frame
from il_policies.data.errors import DataError

FORMAT = 2
SUFFIX = {'image': '.mjpeg', 'depth': '.png'}
RESERVED = ('stamp', 'action', 'filled')
STRICT = {'extra': 'forbid'}


@dataclass(frozen=True)
class Feature:
    """One observed quantity."""

    __pydantic_config__ = STRICT

    shape: tuple[int, ...]
    """Shape of one sample: (D,), for images (height, width, 3), for depth (height, width, 1)."""
    kind: Literal['lowdim', 'image', 'depth']
    """lowdim: float32 columns in the table. image: an encoded image a row, read as uint8 RGB in this shape whatever its
    own size. depth: a PNG a row, read as uint16 [mm], 0 where unknown."""
    names: tuple[str, ...] = ()
    """Names of the D entries of a low-dimensional feature."""

    def __post_init__(self):
        last = {'lowdim': (), 'image': (3,), 'depth': (1,)}[self.kind]
        if len(self.shape) != (3 if last else 1) or last and self.shape[2:] != last:
            raise ValueError(f'a {self.kind} feature cannot have shape {self.shape}; '
                             'valid: (D,) for lowdim, (h, w, 3) for image, (h, w, 1) for depth')
        if any(size < 1 for size in self.shape) or self.names and len(self.names) != self.shape[0]:
            raise ValueError(f'shape {self.shape} with {len(self.names)} names')

    @property
    def dtype(self) -> type[np.generic]:
        """Type of the values as they are read."""
        return {'lowdim': np.float32, 'image': np.uint8, 'depth': np.uint16}[self.kind]


@dataclass(frozen=True)
class ActionInfo:
    """The action column."""

    __pydantic_config__ = STRICT

    names: tuple[str, ...]
    """Names of the D entries."""
    offset: float = 0.0
    """Time from the observation to the action of the same row [s]."""


@dataclass(frozen=True)
class DatasetInfo:
    """What all episodes of a dataset share: the content of dataset.json."""

    __pydantic_config__ = STRICT

    fps: float
    """Rows per second [Hz]."""
    features: dict[str, Feature]
    """Feature name → shape, kind, names."""
    action: ActionInfo
    """The action column."""
    label: str
    """How actions were obtained: command, command_hold, next_state, or imported."""
    contract: dict | None = None
    """The contract of the robot, as plain data; null for imported data."""
    contract_hash: str | None = None
    """Hash of that contract."""
    format: int = FORMAT
    """Version of this layout."""

    def __post_init__(self):
        if self.format != FORMAT:
            raise ValueError(f'dataset format is {self.format}; this version reads {FORMAT}: convert the bags again, '
                             'or read it with the version that wrote it')
        if not self.fps > 0:
            raise ValueError(f'fps is {self.fps}, must be > 0')
        if not self.action.names:
            raise ValueError('action.names is empty')
        for name in self.features:
            if name in RESERVED or not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*', name):
                raise ValueError(f'{name!r} is no feature name; valid: letters, digits, _ . -, '
                                 f'except {", ".join(RESERVED)}')

    @property
    def images(self) -> list[str]:
        """Names of the features stored as encoded images: cameras and depth."""
        return [name for name, feature in self.features.items() if feature.kind != 'lowdim']

    @property
    def lowdim(self) -> list[str]:
        """Names of the low-dimensional features."""
        return [name for name, feature in self.features.items() if feature.kind == 'lowdim']

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def create(path: str | Path, info: DatasetInfo) -> None:
    """Make an empty dataset, or open the same one for writing: what a killed writer left in between is put right.

    A dataset without episodes gives way to another one, of another contract for example.
    Raises DataError if the folder holds another dataset or other files.
    """
    path = Path(path)
    if (path / 'dataset.json').exists():
        present = _read_info(path).to_dict()
        wanted = info.to_dict()
        other = [key for key in wanted if wanted[key] != present[key]]
        if other and (episode_folders(path) or any((path / 'episodes').glob('.*.old'))):
            raise DataError(f'{path}: holds a dataset with another {", ".join(other)}; give another folder', 'E301')
        if other:
            durable.replace(path / 'dataset.json', json.dumps(wanted, indent=1).encode())
        _recover(path / 'episodes')
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f'{path}: exists and is no dataset; give a new or empty folder', 'E301')
    (path / 'episodes').mkdir(parents=True)
    durable.replace(path / 'dataset.json', json.dumps(info.to_dict(), indent=1).encode())


def require_new(out: str | Path) -> Path:
    """The path, if nothing is there but an empty folder. Raises DataError."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f'{out}: exists already; remove it or give another folder', 'E301')
    if out.resolve() == Path.cwd():  # who is in it would stay in the folder that was there before
        raise DataError(f'{out}: is the folder you are in, and would be replaced; give a new folder', 'E301')
    return out


def episode_folders(path: str | Path) -> list[Path]:
    """Folders of the episodes of a dataset, by their numbers. Other names, such as those of backups, are no episodes."""
    folders = [folder for folder in (Path(path) / 'episodes').glob('[0-9]*') if folder.name.isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name))


def write_episode(path: str | Path, index: int, lowdim: dict[str, np.ndarray], action: np.ndarray,
                  stamps: np.ndarray, filled: np.ndarray, images: dict[str, Iterable[bytes]], meta: dict,
                  report: dict) -> None:
    """Write one episode of T rows into a dataset, replacing one of the same index.

    This is `write_episode_folder`, then `place_episode`.
    """
    path = Path(path)
    temporary = path / 'episodes' / f'.{index:06d}.new'
    write_episode_folder(temporary, _read_info(path), lowdim, action, stamps, filled, images, meta, report,
                         where=f'{path.name} episode {index}')
    place_episode(path, temporary, index)


def write_episode_folder(folder: str | Path, info: DatasetInfo, lowdim: dict[str, np.ndarray], action: np.ndarray,
                         stamps: np.ndarray, filled: np.ndarray, images: dict[str, Iterable[bytes]], meta: dict,
                         report: dict, where: str = '') -> dict:
    """Write one episode of T rows as a folder, whole and synced to disk, for `place_episode`; returns its description.

    lowdim: feature → (T, D). action: (T, A). stamps: (T,) [ns]. filled: (T,) bool, rows with something repeated.
    images: feature → T encoded images, read row by row, of each row one of every feature, so that one pass over a bag
    can feed them all. meta and report: JSON types. where: what errors name, instead of the folder.
    Whatever was at `folder` is replaced; on an error nothing is left there.
    Raises DataError if anything does not fit the dataset, is not finite, or goes back in time.
    """
    folder = Path(folder)
    where = where or str(folder)
    T = len(stamps)
    stamps = np.asarray(stamps, np.int64)
    filled = np.asarray(filled, bool)
    if T == 0 or filled.shape != (T,):
        raise DataError(f'{where}: {T} stamps, {len(filled)} filled flags; need at least one row and as many of each', 'E303')
    if np.any(np.diff(stamps) <= 0):
        raise DataError(f'{where}: stamps must rise; row {int(np.argmax(np.diff(stamps) <= 0)) + 1} does not', 'E303')
    for what, given, valid in (('low-dimensional', lowdim, info.lowdim), ('image', images, info.images)):
        if set(given) != set(valid):
            raise DataError(f'{where}: {what} features are {sorted(given)}, must be {sorted(valid)}', 'E303')
    columns = {name: (lowdim[name], info.features[name].shape[0]) for name in info.lowdim}
    columns['action'] = (action, len(info.action.names))
    stored = {'stamp': stamps, 'filled': filled}
    table = {'stamp': pa.array(stamps)}
    for name, (values, D) in columns.items():
        with np.errstate(over='ignore'):  # beyond float32 becomes infinite and is refused below
            values = np.ascontiguousarray(values, dtype=np.float32)
        if values.shape != (T, D):
            raise DataError(f'{where}: {name} has shape {values.shape}, must be ({T}, {D})', 'E303')
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values).all(axis=1)))
            raise DataError(f'{where}: {name} is not finite in row {row}', 'E205')
        table[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), D)
        stored[name] = values
    table['filled'] = pa.array(filled)

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        digests = {}
        if info.images:
            (folder / 'images').mkdir()
            for name, (spans, digest) in _write_images(folder / 'images', info, images, T, where).items():
                table[name] = pa.FixedSizeListArray.from_arrays(pa.array(spans.ravel()), 2)
                digests[name] = digest
            durable.sync(folder / 'images')
        # Measurements hardly repeat: dictionaries of them cost memory, and a quarter more on disk.
        pq.write_table(pa.table(table), folder / 'lowdim.parquet', use_dictionary=False, row_group_size=1000)
        durable.sync(folder / 'lowdim.parquet')
        meta = {'task': '', 'success': None, 'source': '', **meta, 'length': T}
        meta['content'] = _content(info, stored, digests, meta)
        durable.write(folder / 'report.json', json.dumps(report, indent=1).encode())
        durable.write(folder / 'episode.json', json.dumps(meta, indent=1).encode())
        durable.sync(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return meta


def _content(info: DatasetInfo, table: dict[str, np.ndarray], digests: dict[str, bytes], meta: dict) -> str:
    """SHA-256 of all that makes an episode. table: as of `Dataset.lowdim`. digests: image feature → SHA-256 of its file."""
    content = hashlib.sha256()
    for name in (*info.lowdim, 'action'):
        content.update(name.encode() + table[name].tobytes())
    content.update(table['stamp'].tobytes() + table['filled'].tobytes())
    for name in info.images:
        content.update(name.encode() + digests[name])
    content.update(json.dumps([meta['task'], meta['success']]).encode())
    return content.hexdigest()


def _write_images(folder: Path, info: DatasetInfo, images: dict[str, Iterable[bytes]], T: int,
                  where: str) -> dict[str, tuple[np.ndarray, bytes]]:
    """One file a feature; returns feature → ([begin, end) of each row (T, 2) int64, SHA-256 of the file)."""
    sources = {name: iter(images[name]) for name in info.images}
    spans = {name: np.zeros((T, 2), np.int64) for name in sources}
    digests = {name: hashlib.sha256() for name in sources}
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f'{name}{SUFFIX[info.features[name].kind]}', 'wb'))
                 for name in sources}
        for t in range(T):
            for name, source in sources.items():
                data = next(source, None)
                if not data:
                    what = f'the image of row {t} is empty in' if data is not None else f'{t} images of'
                    raise DataError(f'{where}: {what} {name} for {T} rows', 'E303')
                begin = spans[name][t - 1, 1] if t else 0
                spans[name][t] = begin, begin + len(data)
                files[name].write(data)
                digests[name].update(data)
        for name, source in sources.items():
            if next(source, None) is not None:
                raise DataError(f'{where}: more images of {name} than its {T} rows', 'E303')
            durable.flush(files[name])
    return {name: (spans[name], digests[name].digest()) for name in sources}


def place_episode(path: str | Path, folder: str | Path, index: int) -> None:
    """Rename a folder of `write_episode_folder` into the dataset as episode `index`, replacing one that is there.

    Both are on the same file system.
    """
    final = Path(path) / 'episodes' / f'{index:06d}'
    replaced = final.with_name(f'.{final.name}.old')
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.rename(final, replaced)
    os.rename(folder, final)
    durable.sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_episode(path: str | Path, index: int) -> None:
    """Remove an episode, whole: it is renamed before its files go."""
    folder = Path(path) / 'episodes' / f'{index:06d}'
    removed = folder.with_name(f'.{folder.name}.removed')
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(folder, removed)
    shutil.rmtree(removed)


def verify_episode(folder: str | Path, info: DatasetInfo) -> dict:
    """Read all files of an episode, wherever it lies, and compare them with the hash of what was written.

    Returns its description. Raises DataError (E302) naming what is damaged.
    """
    folder = Path(folder)
    meta = read_episode(folder)
    _read_json(folder / 'report.json')
    table = _read_table(folder, meta, ('stamp', 'filled', 'action', *info.lowdim, *info.images))
    digests = {}
    for name in info.images:
        file = folder / 'images' / f'{name}{SUFFIX[info.features[name].kind]}'
        digest, size = hashlib.sha256(), 0
        try:
            with open(file, 'rb') as stream:
                while block := stream.read(2**20):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            raise DataError(f'{file}: not readable: {error.strerror}; convert its bag again', 'E302') from None
        ends = table[name].ravel().tolist()  # end to end: each image begins where the one before it ends
        if ends[0] != 0 or ends[1:-1:2] != ends[2::2]:
            raise DataError(f'{folder / "lowdim.parquet"}: the places of the images of {name} are damaged; '
                            'convert its bag again', 'E302')
        if size != ends[-1]:
            raise DataError(f'{file}: {size} bytes, not the {ends[-1]} of its images; convert its bag again', 'E302')
        digests[name] = digest.digest()
    if _content(info, table, digests, meta) != meta['content']:
        files = ['lowdim.parquet', *(f'images/{name}{SUFFIX[info.features[name].kind]}' for name in info.images)]
        raise DataError(f'{folder}: not what was written; {" or ".join(files)} or episode.json is damaged; '
                        'convert its bag again', 'E302')
    return meta


class Dataset:
    """A dataset opened for reading. Episodes are addressed by their place in `episodes`. Safe to use from threads."""

    def __init__(self, path: str | Path):
        """Read the descriptions. Raises DataError if there is no dataset, or an episode has none."""
        self.path = Path(path)
        self.info = _read_info(self.path)
        self.folders = episode_folders(self.path)
        """Folder of each episode."""
        self.episodes: list[dict] = [read_episode(folder) for folder in self.folders]
        """What is known about each episode (index, length, task, success, source, content, …), sorted by index."""
        self._images: dict[tuple[int, str], tuple[str, np.ndarray]] = {}

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def lowdim(self, i: int) -> dict[str, np.ndarray]:
        """Table of episode i: stamp (T,) int64 [ns], filled (T,) bool, action and low-dimensional features (T, D)."""
        return self._table(i, ('stamp', 'filled', 'action', *self.info.lowdim))

    def image(self, i: int, feature: str, t: int) -> np.ndarray:
        """Image of row t of episode i: (h, w, 3) uint8 RGB, or depth as (h, w, 1) uint16 [mm], 0 where unknown."""
        data = self.encoded(i, feature, t)
        return decode_frame(data, self.info.features[feature].shape, f'{self._images[i, feature][0]}, row {t}')

    def encoded(self, i: int, feature: str, t: int) -> bytes:
        """That image as it is stored: a JPEG file (or whatever was recorded), of depth a PNG file."""
        if (i, feature) not in self._images:
            self._images[i, feature] = self._find_images(i, feature)
        file, spans = self._images[i, feature]
        if not 0 <= t < len(spans):
            raise DataError(f'{file}: no row {t}, there are {len(spans)}', 'E302')
        begin, end = spans[t].tolist()
        try:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                if not 0 <= begin <= end <= os.fstat(descriptor).st_size:
                    raise DataError(f'{file}: ends before the image of row {t}; convert its bag again', 'E302')
                data = os.pread(descriptor, end - begin, begin)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(f'{file}: not readable: {error.strerror}', 'E302') from None
        return data

    def report(self, i: int) -> dict:
        """Quality report of episode i."""
        return _read_json(self.folders[i] / 'report.json')

    def verify(self, i: int) -> None:
        """Compare all of episode i with what was written. Raises DataError (E302) naming what is damaged."""
        verify_episode(self.folders[i], self.info)

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of all content; the same wherever and whenever it was written."""
        content = [self.info.to_dict(), [[meta['index'], meta['content']] for meta in self.episodes]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _find_images(self, i: int, feature: str) -> tuple[str, np.ndarray]:
        """The file of images of a feature, and where in it the image of each row is: [begin, end), (T, 2)."""
        if feature not in self.info.images:
            raise DataError(f'{self.path}: no images {feature!r}; there are: {", ".join(self.info.images) or "none"}', 'E302')
        file = self.folders[i] / 'images' / f'{feature}{SUFFIX[self.info.features[feature].kind]}'
        return str(file), self._table(i, (feature,))[feature]

    def _table(self, i: int, names: Iterable[str]) -> dict[str, np.ndarray]:
        return _read_table(self.folders[i], self.episodes[i], names)


def _recover(episodes: Path) -> None:
    """Finish what `place_episode` and `remove_episode` were killed in.

    An episode that was to be replaced and is not comes back, and what is half removed goes.
    """
    for left in episodes.glob('.*.old'):
        final = left.with_name(left.name[1:-len('.old')])
        if final.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.rename(left, final)
    for left in episodes.glob('.*.removed'):
        shutil.rmtree(left, ignore_errors=True)


def _read_info(path: Path) -> DatasetInfo:
    if not (path / 'dataset.json').exists():
        raise DataError(f'{path}: no dataset here (dataset.json is absent)', 'E302')
    try:
        return from_dict(DatasetInfo, _read_json(path / 'dataset.json'), str(path / 'dataset.json'))
    except ContractError as error:
        raise DataError(str(error), 'E302') from None


def read_episode(folder: Path) -> dict:
    """What is known about an episode: its index, and the content of episode.json. Raises DataError (E302)."""
    file = folder / 'episode.json'
    if not file.exists():
        raise DataError(f'{folder}: no whole episode (episode.json is absent); convert its bag again, or remove the folder',
                        'E302')
    meta = _read_json(file)
    missing = [key for key in ('length', 'content') if key not in meta]
    if missing:
        raise DataError(f'{file}: no {", ".join(missing)}; convert its bag again', 'E302')
    if type(meta['length']) is not int or meta['length'] < 1 or not isinstance(meta['content'], str):
        raise DataError(f'{file}: length {meta["length"]!r} with content {meta["content"]!r}; convert its bag again', 'E302')
    return {'index': int(folder.name), 'task': '', 'success': None, 'source': '', **meta}


def _read_table(folder: Path, meta: dict, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Columns of an episode: (T,), or (T, D) for lists."""
    file = folder / 'lowdim.parquet'
    try:
        table = pq.read_table(file, columns=list(names))
        columns = {name: table[name].combine_chunks() for name in names}
        if len(table) != meta['length']:
            raise DataError(f'{file}: {len(table)} rows, but episode.json says {meta["length"]}; convert its bag again', 'E302')
        return {name: (column.flatten().to_numpy().reshape(len(table), -1) if pa.types.is_fixed_size_list(column.type)
                       else column.to_numpy(zero_copy_only=False)) for name, column in columns.items()}
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException, KeyError) as error:
        raise DataError(f'{file}: not readable: {error}; convert its bag again', 'E302') from None


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f'{file}: not readable: {error}', 'E302') from None
    if not isinstance(content, dict):
        raise DataError(f'{file}: not readable: holds no JSON object', 'E302')
    return content
