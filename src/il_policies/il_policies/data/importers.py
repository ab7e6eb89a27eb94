"""Datasets from other people's files."""
from __future__ import annotations

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from il_policies.contract import from_dict, load_yaml
from il_policies.data.errors import DataError
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode

STRICT = {'extra': 'forbid'}


@dataclass(frozen=True)
class ArrayMapping:
    """One array of the file, as one column of the dataset."""

    __pydantic_config__ = STRICT

    array: str
    """Name in the file; its first axis counts rows, the others are flattened."""
    names: tuple[str, ...] = ()
    """Names of the entries after flattening and `sin_cos`."""
    sin_cos: tuple[int, ...] = ()
    """Columns that are angles [rad], each replaced by its sine and cosine."""

    def read(self, arrays: dict[str, np.ndarray], where: str) -> np.ndarray:
        """The column, (N, D) float32. Raises DataError."""
        if self.array not in arrays:
            raise DataError(f'{where}: no array {self.array!r}; there are: {", ".join(arrays)}')
        values = arrays[self.array]
        if values.ndim == 0 or values.dtype.kind not in 'fiub':
            raise DataError(f'{where}: {self.array} is {values.dtype} of shape {values.shape}; need rows of numbers')
        values = values.reshape(len(values), -1).astype(np.float64)
        bad = [column for column in self.sin_cos if not 0 <= column < values.shape[1]]
        if bad:
            raise DataError(f'{where}: sin_cos names columns {bad} of {self.array}, which has {values.shape[1]}')
        parts = []
        for column in range(values.shape[1]):
            angle = values[:, column]
            parts += [np.sin(angle), np.cos(angle)] if column in self.sin_cos else [angle]
        values = np.stack(parts, axis=1).astype(np.float32)
        if self.names and len(self.names) != values.shape[1]:
            raise DataError(f'{where}: {self.array} has {values.shape[1]} entries, but names lists {list(self.names)}')
        return values


@dataclass(frozen=True)
class NpzMapping:
    """What the arrays of an .npz file mean."""

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
    task: str = ''
    """What is done, in words."""


EXAMPLE = '''fps: 10
episode_ends: episode_ends
action: {array: action, names: [x, y]}
observations:
  pose: {array: state, sin_cos: [4]}'''


def load_mapping(path: str | Path) -> NpzMapping:
    """Read a mapping from YAML. Raises ContractError."""
    return from_dict(NpzMapping, load_yaml(path), str(path))


def import_npz(source: str | Path, out: str | Path, mapping: NpzMapping | None) -> Dataset:
    """Make a dataset at `out` from the arrays of `source`; all of it or, on an error, nothing.

    Raises DataError if the file or the mapping is unusable, without a mapping, or if `out` exists.
    """
    source, out = Path(source), Path(out)
    arrays = _read_arrays(source)
    if mapping is None:
        present = '\n'.join(f'  {name}: {values.dtype}, shape {values.shape}' for name, values in arrays.items())
        raise DataError(f'{source}: a mapping is needed. Arrays in the file:\n{present}\n'
                        f'A mapping is a YAML file like\n{EXAMPLE}')
    if out.exists():
        raise DataError(f'{out}: exists already; remove it or give another folder')
    action = mapping.action.read(arrays, str(source))
    columns = {name: part.read(arrays, str(source)) for name, part in mapping.observations.items()}
    N = len(action)
    for name, values in columns.items():
        if len(values) != N:
            raise DataError(f'{source}: {name} has {len(values)} rows, the action {N}')
    if mapping.episode_ends not in arrays:
        raise DataError(f'{source}: no array {mapping.episode_ends!r} for episode_ends; there are: {", ".join(arrays)}')
    ends = arrays[mapping.episode_ends]
    if (ends.ndim != 1 or ends.dtype.kind not in 'iu' or len(ends) == 0 or ends[-1] != N
            or np.any(np.diff(ends, prepend=0) <= 0)):
        raise DataError(f'{source}: {mapping.episode_ends} must be rising integers ending at the number of rows, {N}')

    info = DatasetInfo(
        fps=mapping.fps,
        features={name: Feature((values.shape[1],), 'lowdim', mapping.observations[name].names)
                  for name, values in columns.items()},
        action=ActionInfo(mapping.action.names or tuple(f'{mapping.action.array}_{d}' for d in range(action.shape[1])),
                          mapping.action_offset),
        label='imported')
    temporary = out.with_name(f'.{out.name}.new')
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        create(temporary, info)
        begin = 0
        for index, end in enumerate(ends.tolist()):
            rows = slice(begin, end)
            T = end - begin
            stamps = np.round(np.arange(T) * (1e9 / mapping.fps)).astype(np.int64)
            write_episode(temporary, index, {name: values[rows] for name, values in columns.items()}, action[rows],
                          stamps, np.zeros(T, bool), {},
                          {'task': mapping.task, 'source': f'{source.name}[{begin}:{end}]'}, {})
            begin = end
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Dataset(out)


def _read_arrays(source: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(source, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f'{source}: no such file') from None
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f'{source}: not readable as .npz without pickled objects: {error}') from None
