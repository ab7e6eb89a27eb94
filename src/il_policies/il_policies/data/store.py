"""The episode store: one folder an episode, committed whole or not at all.

    DATASET/dataset.json                      rate, features, action, contract
            episodes/000000/lowdim.parquet    stamp (int64 [ns]), features and action (float32 lists), filled (bool)
                            images/<feature>/000000.jpg
                            episode.json      index, length, task, success, source, content hash, …
                            report.json       quality of the recording

An episode is written into a temporary folder, synced to disk and renamed, so that a crash leaves whole episodes only.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from il_policies import durable
from il_policies.contract import ContractError, from_dict
from il_policies.data.errors import DataError

FORMAT = 1
RESERVED = ('stamp', 'action', 'filled')
STRICT = {'extra': 'forbid'}


@dataclass(frozen=True)
class Feature:
    """One observed quantity."""

    __pydantic_config__ = STRICT

    shape: tuple[int, ...]
    """Shape of one sample: (D,) or, for images, (height, width, 3)."""
    kind: Literal['lowdim', 'image']
    """lowdim: float32 columns in the table. image: one JPEG a row."""
    names: tuple[str, ...] = ()
    """Names of the D entries of a low-dimensional feature."""

    def __post_init__(self):
        fits = len(self.shape) == 1 if self.kind == 'lowdim' else len(self.shape) == 3 and self.shape[2] == 3
        if not fits:
            raise ValueError(f'a {self.kind} feature cannot have shape {self.shape}; '
                             'valid: (D,) for lowdim, (h, w, 3) for image')
        if any(size < 1 for size in self.shape) or self.names and len(self.names) != self.shape[0]:
            raise ValueError(f'shape {self.shape} with {len(self.names)} names')


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
            raise ValueError(f'dataset format is {self.format}; this version reads {FORMAT}')
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
        """Names of the image features."""
        return [name for name, feature in self.features.items() if feature.kind == 'image']

    @property
    def lowdim(self) -> list[str]:
        """Names of the low-dimensional features."""
        return [name for name, feature in self.features.items() if feature.kind == 'lowdim']

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def create(path: str | Path, info: DatasetInfo) -> None:
    """Make an empty dataset, or do nothing if the same one is there already.

    Raises DataError if the folder holds another dataset or other files.
    """
    path = Path(path)
    if (path / 'dataset.json').exists():
        present = _read_info(path).to_dict()
        wanted = info.to_dict()
        other = [key for key in wanted if wanted[key] != present[key]]
        if other:
            raise DataError(f'{path}: holds a dataset with another {", ".join(other)}; give another folder')
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f'{path}: exists and is no dataset; give a new or empty folder')
    (path / 'episodes').mkdir(parents=True)
    temporary = path / '.dataset.json'
    durable.write(temporary, json.dumps(info.to_dict(), indent=1).encode())
    os.replace(temporary, path / 'dataset.json')
    durable.sync(path)


def write_episode(path: str | Path, index: int, lowdim: dict[str, np.ndarray], action: np.ndarray,
                  stamps: np.ndarray, filled: np.ndarray, images: dict[str, Iterable[bytes]], meta: dict,
                  report: dict) -> None:
    """Write one episode of T rows, replacing one of the same index.

    lowdim: feature → (T, D). action: (T, A). stamps: (T,) [ns]. filled: (T,) bool, rows with something repeated.
    images: feature → T JPEG files as bytes, read one at a time. meta and report: JSON types.
    Raises DataError if anything does not fit the dataset, is not finite, or goes back in time.
    """
    path = Path(path)
    info = _read_info(path)
    where = f'{path.name} episode {index}'
    T = len(stamps)
    stamps = np.asarray(stamps, np.int64)
    filled = np.asarray(filled, bool)
    if T == 0 or filled.shape != (T,):
        raise DataError(f'{where}: {T} stamps, {len(filled)} filled flags; need at least one row and as many of each')
    if np.any(np.diff(stamps) <= 0):
        raise DataError(f'{where}: stamps must rise; row {int(np.argmax(np.diff(stamps) <= 0)) + 1} does not')
    for what, given, valid in (('low-dimensional', lowdim, info.lowdim), ('image', images, info.images)):
        if set(given) != set(valid):
            raise DataError(f'{where}: {what} features are {sorted(given)}, must be {sorted(valid)}')
    columns = {name: (lowdim[name], info.features[name].shape[0]) for name in info.lowdim}
    columns['action'] = (action, len(info.action.names))
    content = hashlib.sha256()
    table = {'stamp': pa.array(stamps)}
    for name, (values, D) in columns.items():
        values = np.ascontiguousarray(values, dtype=np.float32)
        if values.shape != (T, D):
            raise DataError(f'{where}: {name} has shape {values.shape}, must be ({T}, {D})')
        if not np.isfinite(values).all():
            raise DataError(f'{where}: {name} is not finite in row {int(np.argmin(np.isfinite(values).all(axis=1)))}')
        table[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), D)
        content.update(name.encode() + values.tobytes())
    table['filled'] = pa.array(filled)
    content.update(stamps.tobytes() + filled.tobytes())

    final = path / 'episodes' / f'{index:06d}'
    temporary = final.with_name(f'.{final.name}.new')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        pq.write_table(pa.table(table), temporary / 'lowdim.parquet')
        durable.sync(temporary / 'lowdim.parquet')
        for name in info.images:
            folder = temporary / 'images' / name
            folder.mkdir(parents=True)
            count = 0
            for data in images[name]:
                durable.write(folder / f'{count:06d}.jpg', data)
                content.update(data)
                count += 1
            if count != T:
                raise DataError(f'{where}: {count} images of {name} for {T} rows')
            durable.sync(folder)
        meta = {'task': '', 'success': None, 'source': '', **meta, 'index': index, 'length': T}
        content.update(json.dumps([meta['task'], meta['success']]).encode())
        meta['content'] = content.hexdigest()
        durable.write(temporary / 'report.json', json.dumps(report, indent=1).encode())
        durable.write(temporary / 'episode.json', json.dumps(meta, indent=1).encode())
        durable.sync(temporary)
        if final.exists():
            replaced = final.with_name(f'.{final.name}.old')
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
            os.rename(temporary, final)
            shutil.rmtree(replaced)
        else:
            os.rename(temporary, final)
        durable.sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_episode(path: str | Path, index: int) -> None:
    """Remove an episode, whole: it is renamed before its files go."""
    folder = Path(path) / 'episodes' / f'{index:06d}'
    removed = folder.with_name(f'.{folder.name}.old')
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(folder, removed)
    shutil.rmtree(removed)


class Dataset:
    """A dataset opened for reading. Episodes are addressed by their place in `episodes`."""

    def __init__(self, path: str | Path):
        """Read the descriptions. Raises DataError if there is no dataset."""
        self.path = Path(path)
        self.info = _read_info(self.path)
        folders = sorted(p for p in (self.path / 'episodes').glob('[0-9]*') if (p / 'episode.json').exists())
        self.episodes: list[dict] = [_read_json(folder / 'episode.json') for folder in folders]
        """What is known about each episode (index, length, task, success, source, content, …), sorted by index."""
        self._folders = folders

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def lowdim(self, i: int) -> dict[str, np.ndarray]:
        """Table of episode i: stamp (T,) int64 [ns], filled (T,) bool, action and low-dimensional features (T, D)."""
        file = self._folders[i] / 'lowdim.parquet'
        try:
            table = pq.read_table(file)
            columns = {name: table[name].combine_chunks() for name in ('stamp', 'filled', 'action', *self.info.lowdim)}
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(f'{file}: not readable: {error}') from None
        arrays = {}
        for name, column in columns.items():
            if name in ('stamp', 'filled'):
                arrays[name] = column.to_numpy(zero_copy_only=False)
            else:
                arrays[name] = column.flatten().to_numpy().reshape(len(table), -1)
        return arrays

    def image(self, i: int, feature: str, t: int) -> np.ndarray:
        """Image of row t of episode i, (h, w, 3) uint8 RGB."""
        file = self._folders[i] / 'images' / feature / f'{t:06d}.jpg'
        image = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if image is None:
            raise DataError(f'{file}: absent or not a JPEG image')
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def report(self, i: int) -> dict:
        """Quality report of episode i."""
        return _read_json(self._folders[i] / 'report.json')

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of all content; the same wherever and whenever it was written."""
        content = [self.info.to_dict(), [[meta['index'], meta['content']] for meta in self.episodes]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read_info(path: Path) -> DatasetInfo:
    if not (path / 'dataset.json').exists():
        raise DataError(f'{path}: no dataset here (dataset.json is absent)')
    try:
        return from_dict(DatasetInfo, _read_json(path / 'dataset.json'), str(path / 'dataset.json'))
    except ContractError as error:
        raise DataError(str(error)) from None


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f'{file}: not readable: {error}') from None

