"""LeRobot's dataset format v3.0, written and read without its package.

    meta/info.json                              rate, features, totals, paths
    meta/stats.json                             min, max, mean, std, count and quantiles of every feature
    meta/tasks.parquet                          task in words → task_index
    meta/episodes/chunk-000/file-000.parquet    of each episode: its files, rows and frames, its own statistics
    data/chunk-000/file-000.parquet             one row a frame, one row group an episode
    videos/<camera>/chunk-000/file-000.mp4      one frame a row
    meta/il_policies/                           ours: description and reports of the episodes, true stamps of the rows;
                                                not read by LeRobot

Many episodes share a file. Where the frames of one begin is counted in frames, and only then divided by the rate.
"""
from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from il_policies import durable
from il_policies.contract import ContractError, from_dict
from il_policies.data.decode import encode_jpeg, jpeg_size
from il_policies.data.errors import DataError
from il_policies.data.store import RESERVED, ActionInfo, Dataset, DatasetInfo, Feature, create, require_new, write_episode
from il_policies.exchange.video import VideoReader, VideoWriter, encode, frame_rate

VERSION = 'v3.0'
FILES_PER_CHUNK = 1000
MB = 1024**2
VIDEO_SECONDS = 1000
"""LeRobot compares times as float32 within 0.1 ms, which they resolve only up to 1024 s."""
PLACE = 'chunk-{chunk_index:03d}/file-{file_index:03d}'
DATA, VIDEO, EPISODES = f'data/{PLACE}.parquet', f'videos/{{video_key}}/{PLACE}.mp4', f'meta/episodes/{PLACE}.parquet'
OURS = 'meta/il_policies'
COUNTERS = {'timestamp': 'float32', 'frame_index': 'int64', 'episode_index': 'int64', 'index': 'int64', 'task_index': 'int64'}
"""Columns that every dataset has, and their types."""
QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)
PNG = b'\x89PNG\r\n\x1a\n'


@dataclass(frozen=True)
class ExportConfig:
    """How a dataset is written for LeRobot."""

    images: Literal['h264', 'av1', 'jpeg'] = 'h264'
    """Cameras as H.264 or AV1 video, or the stored JPEG files unchanged inside the data files. Depth is never video."""
    crf: int | None = None
    """Constant rate factor of the video, lower is better; none: 18 for h264, 30 for av1."""
    state: tuple[str, ...] | None = None
    """Features joined to observation.state, the one that LeRobot's policies read; none: all low-dimensional ones. Others
    become observation.<name>."""
    data_file_mb: int = 100
    """Largest data file, unless one episode is larger [MiB]."""
    video_file_mb: int = 200
    """Largest video file, unless one episode is larger [MiB]."""
    jobs: int | None = None
    """Threads that encode images; none: as many as there are cores."""

    def __post_init__(self):
        best = {'h264': 51, 'av1': 63, 'jpeg': None}[self.images]
        if self.crf is not None and (best is None or not 0 <= self.crf <= best):
            raise DataError(f'crf is {self.crf}; valid: ' + (f'0 to {best} for {self.images}' if best else 'none for jpeg'))
        for key in ('data_file_mb', 'video_file_mb', 'jobs'):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise DataError(f'{key} is {getattr(self, key)}, must be at least 1')


@dataclass(frozen=True)
class Columns:
    """Which of LeRobot's columns holds what."""

    state: tuple[str, ...]
    """Features joined to observation.state."""
    others: dict[str, str]
    """The other low-dimensional features → column."""
    cameras: dict[str, str]
    """Image features → column."""
    videos: tuple[str, ...]
    """Those image features that are video."""

    @classmethod
    def choose(cls, info: DatasetInfo, config: ExportConfig, where: str) -> Columns:
        """The columns for a dataset. Raises DataError for a state that it does not have."""
        state = tuple(info.lowdim) if config.state is None else config.state
        unknown = [name for name in state if name not in info.lowdim]
        if unknown or len(set(state)) != len(state):
            raise DataError(f'{where}: state is {list(state)}; valid: {", ".join(info.lowdim) or "nothing"}, each once', 'E303')
        depth = [name for name in info.images if info.features[name].kind == 'depth']
        others = {name: f'observation.{name}' for name in info.lowdim if name not in state}
        cameras = {name: f'observation.{"depth" if name in depth else "images"}.{name}' for name in info.images}
        keys = [*(['observation.state'] if state else []), *others.values(), *cameras.values()]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        if doubled:
            raise DataError(f'{where}: several features would be {", ".join(doubled)}; choose another state', 'E303')
        return cls(state, others, cameras, tuple(name for name in cameras if name not in depth and config.images != 'jpeg'))

    def rows(self, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Column → (T, D) float32, of the low-dimensional data of an episode."""
        rows = {'observation.state': np.concatenate([table[name] for name in self.state], axis=1)} if self.state else {}
        return rows | {key: table[name] for name, key in self.others.items()} | {'action': table['action']}

    def split(self, info: DatasetInfo, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The reverse of `rows`."""
        ends = np.cumsum([info.features[name].shape[0] for name in self.state])
        parts = np.split(rows['observation.state'], ends[:-1], axis=1) if self.state else []
        return dict(zip(self.state, parts)) | {name: rows[key] for name, key in self.others.items()} | {'action': rows['action']}

    def describe(self, info: DatasetInfo, config: ExportConfig, pix_fmt: dict[str, str], fps: float) -> dict[str, dict]:
        """`features` of info.json. pix_fmt: of the videos."""
        def entries(name: str) -> list[str]:
            D = info.features[name].shape[0]
            return list(info.features[name].names) or [f'{name}_{d}' if D > 1 else name for d in range(D)]

        features = {}
        if self.state:
            names = [(f'{name}.{entry}' if len(self.state) > 1 and info.features[name].names else entry)
                     for name in self.state for entry in entries(name)]
            features['observation.state'] = {'dtype': 'float32', 'shape': [len(names)], 'names': names}
        for name, key in self.others.items():
            features[key] = {'dtype': 'float32', 'shape': list(info.features[name].shape), 'names': entries(name)}
        for name, key in self.cameras.items():
            feature = info.features[name]
            features[key] = {'dtype': 'video' if name in self.videos else 'image', 'shape': list(feature.shape),
                             'names': ['height', 'width', 'channels']}
            if name in self.videos:
                features[key]['info'] = {
                    'video.height': feature.shape[0], 'video.width': feature.shape[1], 'video.codec': config.images,
                    'video.pix_fmt': pix_fmt[name], 'video.is_depth_map': False, 'video.fps': fps, 'video.channels': 3,
                    'has_audio': False}
            elif feature.kind == 'depth':
                features[key]['info'] = {'is_depth_map': True, 'depth_unit': 'mm'}
        features['action'] = {'dtype': 'float32', 'shape': [len(info.action.names)], 'names': list(info.action.names)}
        return features | {key: {'dtype': dtype, 'shape': [1], 'names': None} for key, dtype in COUNTERS.items()}


def export_lerobot(dataset: Dataset, out: str | Path, config: ExportConfig = ExportConfig(),
                   progress: Callable[[float], None] | None = None) -> dict:
    """Write a dataset in LeRobot's format at `out`; all of it or, on an error, nothing. Returns the content of info.json.

    progress is called with the share that is done.
    Raises DataError if `out` exists, the dataset is empty or damaged, or the configuration does not fit it.
    """
    if not dataset.episodes:
        raise DataError(f'{dataset.path}: no episodes to export', 'E302')
    columns = Columns.choose(dataset.info, config, str(dataset.path))
    require_new(out)
    for i in range(len(dataset)):
        dataset.verify(i)
    with durable.new_folder(require_new(out)) as root:
        description = _Export(dataset, root, config, columns).run(progress or (lambda share: None))
        for folder, _, files in os.walk(root, topdown=False):
            for name in (*files, '.'):
                durable.sync(Path(folder) / name)
    return description


def import_lerobot(source: str | Path, out: str | Path,
                   progress: Callable[[float], None] | None = None) -> tuple[Dataset, list[str]]:
    """Make a dataset at `out` from one in LeRobot's format; all of it or, on an error, nothing.

    What `export_lerobot` wrote becomes what it was: rows bit by bit, stamps, tasks, labels, reports and contract; images
    too, if they were exported as jpeg. Of other datasets the stamps count from 0 in each episode.
    progress is called with the share that is done. Returns the dataset and the columns that were left out.
    Raises DataError if the source is no such dataset, of another version, damaged or inconsistent, or if `out` exists.
    """
    source, out = Path(source), require_new(out)
    try:
        reader = _Import(source)
        with durable.new_folder(out) as temporary:
            reader.run(temporary, progress or (lambda share: None))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f'{source}: its metadata is not as version 3.0 has it: {type(error).__name__} {error}', 'E403') from None
    return Dataset(out), reader.ignored


class _Export:
    """One export: the episodes go through in their order, their images are encoded a little ahead by threads."""

    def __init__(self, dataset: Dataset, root: Path, config: ExportConfig, columns: Columns):
        self.dataset, self.root, self.config, self.columns = dataset, root, config, columns
        self.rate = frame_rate(dataset.info.fps)
        self.tasks: dict[str, int] = {}
        self.frames = 0                                      # rows written so far
        self.episodes: list[dict] = []                       # rows of meta/episodes
        self.rows: dict[str, list[np.ndarray]] = {}          # all numbers of all episodes, for the statistics
        self.pixels: dict[str, np.ndarray] = {}              # how often each value occurs in each channel, likewise
        self.data = _DataFiles(root, config.data_file_mb * MB)
        self.videos = {name: _VideoFiles(root, columns.cameras[name], self.rate, config.video_file_mb * MB)
                       for name in columns.videos}

    def run(self, progress: Callable[[float], None]) -> dict:
        info, total = self.dataset.info, sum(meta['length'] for meta in self.dataset.episodes)
        jobs = self.config.jobs or os.cpu_count() or 1
        with ThreadPoolExecutor(jobs) as pool:
            tasks = ((i, name) for i in range(len(self.dataset)) for name in info.images)
            encoded = _in_order(pool, self._images, tasks, jobs)
            try:
                for i in range(len(self.dataset)):
                    self._episode(i, {name: next(encoded) for name in info.images})
                    progress(self.frames / total)
            finally:
                pool.shutdown(cancel_futures=True)
                pix_fmt = {name: files.close() for name, files in self.videos.items()}
                self.data.close()
        fps = int(self.rate) if self.rate.denominator == 1 else float(self.rate)
        description = {
            'codebase_version': VERSION, 'robot_type': (info.contract or {}).get('robot'),
            'total_episodes': len(self.episodes), 'total_frames': self.frames, 'total_tasks': len(self.tasks),
            'chunks_size': FILES_PER_CHUNK, 'data_files_size_in_mb': self.config.data_file_mb,
            'video_files_size_in_mb': self.config.video_file_mb, 'fps': fps, 'splits': {'train': f'0:{len(self.episodes)}'},
            'data_path': DATA, 'video_path': VIDEO if self.videos else None,
            'features': self.columns.describe(info, self.config, pix_fmt, fps)}
        self._write_meta(description)
        return description

    def _images(self, i: int, name: str) -> tuple[bytes | list[bytes], np.ndarray]:
        """The images of an episode as one clip, or one by one; and how often each value occurs, (channels, values) int64."""
        meta, feature = self.dataset.episodes[i], self.dataset.info.features[name]
        values = np.iinfo(feature.dtype).max + 1
        counts = np.zeros((feature.shape[2], values), np.int64)
        files: list[bytes] = []

        def images() -> Iterator[np.ndarray]:
            for t in range(meta['length']):
                image = self.dataset.image(i, name, t)
                for channel, row in enumerate(counts):
                    row += cv2.calcHist([image], [channel], None, [values], [0, values]).ravel().astype(np.int64)
                if name not in self.videos:
                    data = self.dataset.encoded(i, name, t)
                    fits = feature.kind == 'depth' or _file_size(data) == feature.shape[:2]
                    files.append(data if fits else encode_jpeg(image))
                yield image

        if name in self.videos:
            return encode(images(), self.rate, self.config.images, self.config.crf), counts
        for _ in images():
            pass
        return files, counts

    def _episode(self, i: int, encoded: dict[str, tuple[bytes | list[bytes], np.ndarray]]) -> None:
        """Append an episode to the files. encoded: image feature → result of `_images`."""
        meta, table = self.dataset.episodes[i], self.dataset.lowdim(i)
        T, e = meta['length'], len(self.episodes)
        task = self.tasks.setdefault(meta['task'], len(self.tasks))
        frame = np.arange(T)
        rows = self.columns.rows(table) | {
            'timestamp': (frame / float(self.rate)).astype(np.float32), 'frame_index': frame,
            'episode_index': np.full(T, e), 'index': self.frames + frame, 'task_index': np.full(T, task)}
        episode = {'episode_index': e, 'tasks': [meta['task']], 'length': T,
                   'dataset_from_index': self.frames, 'dataset_to_index': self.frames + T}
        statistics = {key: _statistics(values) for key, values in rows.items()}
        content = {key: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
                   if values.ndim == 2 and values.shape[1] > 1 else pa.array(values.ravel()) for key, values in rows.items()}
        for name, (images, counts) in encoded.items():
            key = self.columns.cameras[name]
            statistics[key] = _image_statistics(counts, T)
            self.pixels[key] = self.pixels.get(key, 0) + counts
            if name in self.videos:
                chunk, file, first = self.videos[name].append(images, T)
                episode |= {f'videos/{key}/chunk_index': chunk, f'videos/{key}/file_index': file,
                            f'videos/{key}/from_timestamp': float(first / self.rate),
                            f'videos/{key}/to_timestamp': float((first + T) / self.rate)}
            else:
                content[key] = pa.StructArray.from_arrays([pa.array(images, pa.binary()), pa.nulls(T, pa.string())],
                                                          ['bytes', 'path'])
        episode['data/chunk_index'], episode['data/file_index'] = self.data.append(pa.table(content))
        episode |= {f'stats/{key}/{name}': value for key, values in statistics.items() for name, value in values.items()}
        self.episodes.append(episode)
        for key, values in {**rows, 'stamp': table['stamp'], 'filled': table['filled']}.items():
            self.rows.setdefault(key, []).append(values)
        self.frames += T

    def _write_meta(self, description: dict) -> None:
        rows = {key: np.concatenate(values) for key, values in self.rows.items()}
        ours = {key: pa.array(rows.pop(key)) for key in ('stamp', 'filled')}
        statistics = {key: _statistics(values) for key, values in rows.items()}
        statistics |= {key: _image_statistics(counts, self.frames) for key, counts in self.pixels.items()}
        _write_json(self.root / 'meta/info.json', description)
        _write_json(self.root / 'meta/stats.json', statistics)
        pq.write_table(_tasks_table(self.tasks), self.root / 'meta/tasks.parquet')
        table = pa.Table.from_pylist(self.episodes)
        files = -(-table.nbytes // (self.config.data_file_mb * MB))
        size = -(-len(table) // files)
        for number, first in enumerate(range(0, len(table), size)):
            part = table.slice(first, size)
            places = dict(zip(('chunk_index', 'file_index'), divmod(number, FILES_PER_CHUNK)))
            for key, place in places.items():
                part = part.append_column(f'meta/episodes/{key}', pa.array(np.full(len(part), place)))
            file = self.root / EPISODES.format(**places)
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(part, file)
        (self.root / OURS).mkdir()
        pq.write_table(pa.table(ours), self.root / OURS / 'rows.parquet')
        dataset = self.dataset
        _write_json(self.root / OURS / 'dataset.json', {
            'dataset': {key: value for key, value in dataset.info.to_dict().items() if key != 'format'},
            'columns': {'state': self.columns.state, 'others': self.columns.others, 'cameras': self.columns.cameras,
                        'videos': self.columns.videos},
            'episodes': [{'meta': meta, 'report': dataset.report(i)} for i, meta in enumerate(dataset.episodes)]})


class _Files:
    """Files of one kind, numbered: chunk-000/file-000 to file-999, then chunk-001."""

    def __init__(self, limit: int):
        self.limit, self.count, self.open = limit, 0, None

    def next(self) -> dict[str, int]:
        """Close the open file and number the next one."""
        self.close()
        self.count += 1
        return self.place

    @property
    def place(self) -> dict[str, int]:
        """Number of the open file."""
        return dict(zip(('chunk_index', 'file_index'), divmod(self.count - 1, FILES_PER_CHUNK)))

    def close(self) -> None:
        """Finish the open file."""
        if self.open is not None:
            self.open.close()


class _DataFiles(_Files):
    """The data files."""

    def __init__(self, root: Path, limit: int):
        super().__init__(limit)
        self.root, self.size = root, 0

    def append(self, table: pa.Table) -> tuple[int, int]:
        """Write an episode as a row group; returns chunk and file."""
        if self.open is None or self.size and self.size + table.nbytes > self.limit:
            file = self.root / DATA.format(**self.next())
            file.parent.mkdir(parents=True, exist_ok=True)
            # Measured numbers hardly repeat: a dictionary of them would only make the file larger than the table.
            repeated = ['episode_index', 'task_index']
            self.open, self.size = pq.ParquetWriter(file, _described(table.schema), use_dictionary=repeated), 0
        self.open.write_table(table, row_group_size=len(table))
        self.size += table.nbytes
        return tuple(self.place.values())


class _VideoFiles(_Files):
    """The video files of one camera."""

    def __init__(self, root: Path, key: str, rate, limit: int):
        super().__init__(limit)
        self.root, self.key, self.rate = root, key, rate

    def append(self, clip: bytes, frames: int) -> tuple[int, int, int]:
        """Write the clip of an episode; returns chunk, file and the place of its first frame there."""
        if self.open is None or self.open.frames and (self.open.size + len(clip) > self.limit
                                                      or self.open.frames + frames > VIDEO_SECONDS * self.rate):
            self.open = VideoWriter(self.root / VIDEO.format(video_key=self.key, **self.next()), self.rate)
        first = self.open.frames
        self.open.append(clip)
        if self.open.frames != first + frames:
            raise DataError(f'{self.key}: the encoder made {self.open.frames - first} frames of {frames}; try another codec',
                            'E208')
        return *self.place.values(), first

    def close(self) -> str:
        """Finish the open file; returns its pixel format."""
        super().close()
        return self.open.pix_fmt if self.open is not None else ''


class _Import:
    """One dataset in LeRobot's format, opened for reading."""

    def __init__(self, source: Path):
        self.source = source
        file = source / 'meta/info.json'
        if not file.exists():
            raise DataError(f'{source}: no LeRobot dataset here (meta/info.json is absent)', 'E403')
        self.description = _read_json(file)
        version = str(self.description.get('codebase_version'))
        if not re.fullmatch(r'v3\.\d+', version):
            raise DataError(f'{source}: LeRobot dataset of version {version}; valid: v3.0. Older ones are converted by LeRobot: '
                            'python -m lerobot.scripts.convert_dataset_v21_to_v30 (until 0.4: '
                            'lerobot.datasets.v30.convert_dataset_v21_to_v30)', 'E403')
        self.features: dict[str, dict] = self.description['features']
        self.fps = float(self.description['fps'])
        self.episodes = self._read_episodes()
        self.tasks = self._read_tasks()
        self.info, self.columns, self.ours = self._read_ours() if (source / OURS).is_dir() else self._foreign()
        used = {*COUNTERS, 'observation.state', 'action', *self.columns.others.values(), *self.columns.cameras.values()}
        self.ignored = [key for key in self.features if key not in used]
        """Columns that have no place in our dataset."""
        self.rows = _DataReader(source, self.description.get('data_path') or DATA,
                                ['episode_index', 'frame_index', 'timestamp', 'task_index', *self._keys(),
                                 *(key for name, key in self.columns.cameras.items() if name not in self.columns.videos)])
        self.videos = {name: VideoReader() for name in self.columns.videos}

    def run(self, out: Path, progress: Callable[[float], None]) -> None:
        create(out, self.info)
        total, done = sum(episode['length'] for episode in self.episodes), 0
        try:
            for e, episode in enumerate(self.episodes):
                self._episode(out, e, episode)
                done += episode['length']
                progress(done / total)
        finally:
            for video in self.videos.values():
                video.close()

    def _episode(self, out: Path, e: int, episode: dict) -> None:
        table, where = self.rows.episode(episode)
        T = len(table)
        if not np.array_equal(table['frame_index'].to_numpy(), np.arange(T)):
            raise DataError(f'{where}: frame_index does not count from 0 to {T - 1}', 'E403')
        times = table['timestamp'].to_numpy().astype(np.float64)
        nominal = np.arange(T) / self.fps
        if np.allclose(times, nominal, rtol=2.0**-23, atol=1e-4):
            times = nominal  # the same, without what float32 rounds off
        table_rows = {key: _matrix(table[key], self.features[key]['shape'][0], f'{where}: {key}') for key in self._keys()}
        columns = self.columns.split(self.info, table_rows)
        if self.ours is None:
            tasks = dict.fromkeys(self.tasks[index] for index in table['task_index'].to_pylist())
            stamps, filled = np.round(times * 1e9).astype(np.int64), np.zeros(T, bool)
            meta, report = {'task': '; '.join(tasks), 'source': f'{self.source.name}[{e}]'}, {}
        else:
            span = slice(episode['dataset_from_index'], episode['dataset_to_index'])
            stamps, filled = (self.ours[key].to_numpy()[span] for key in ('stamp', 'filled'))
            meta, report = {**self.ours['episodes'][e]['meta']}, self.ours['episodes'][e]['report']
        if self.videos:
            meta.pop('conversion', None)  # images out of a video are not those that a conversion of the bag makes
        images = {name: self._frames(name, key, episode, times) if name in self.videos
                  else _embedded(table[key], f'{where}: {key}') for name, key in self.columns.cameras.items()}
        index = meta.pop('index', e)
        if type(index) is not int or index < 0:
            raise DataError(f'{where}: index {index!r} of an episode; must be 0 or more', 'E403')
        write_episode(out, index, {name: columns[name] for name in self.info.lowdim}, columns['action'], stamps, filled,
                      images, meta, report)

    def _keys(self) -> list[str]:
        """Columns of low-dimensional data."""
        return [*(['observation.state'] if self.columns.state else []), *self.columns.others.values(), 'action']

    def _frames(self, name: str, key: str, episode: dict, times: np.ndarray) -> Iterator[bytes]:
        """The frames of an episode, as JPEG files."""
        file = _place(self.source, self.description['video_path'], video_key=key,
                      chunk_index=episode[f'videos/{key}/chunk_index'], file_index=episode[f'videos/{key}/file_index'])
        shape = self.info.features[name].shape
        for image in self.videos[name].frames(file, episode[f'videos/{key}/from_timestamp'] + times, 0.25 / self.fps):
            if image.shape != shape:
                raise DataError(f'{file}: frames of shape {image.shape}, but info.json says {list(shape)}', 'E403')
            yield encode_jpeg(image)

    def _read_episodes(self) -> list[dict]:
        """The rows of meta/episodes without their statistics, in order."""
        episodes = []
        for file in sorted((self.source / 'meta/episodes').glob('*/*.parquet')):
            with _reading(file):
                names = [name for name in pq.read_schema(file).names if not name.startswith('stats/')]
                episodes += pq.read_table(file, columns=names).to_pylist()
        episodes.sort(key=lambda episode: episode['episode_index'])
        wanted = self.description['total_episodes']
        rows = [(episode['episode_index'], episode['dataset_to_index'] - episode['dataset_from_index']) for episode in episodes]
        lengths = [episode['length'] for episode in episodes]
        if not episodes or rows != list(enumerate(lengths)) or len(rows) != wanted:
            raise DataError(f'{self.source}: meta/episodes describes {len(rows)} episodes, not all of 0 to {wanted - 1} with as '
                            'many rows as their length; copy it again whole', 'E403')
        if sum(lengths) != self.description['total_frames']:
            raise DataError(f'{self.source}: meta/episodes counts {sum(lengths)} rows, info.json '
                            f'{self.description["total_frames"]}; copy it again whole', 'E403')
        return episodes

    def _read_tasks(self) -> dict[int, str]:
        """task_index → task. The text is the index of a pandas table, named or not."""
        file = self.source / 'meta/tasks.parquet'
        with _reading(file):
            table = pq.read_table(file)
        text = next(name for name in table.column_names if name != 'task_index')
        return dict(zip(table['task_index'].to_pylist(), table[text].to_pylist()))

    def _read_ours(self) -> tuple[DatasetInfo, Columns, dict]:
        """What `export_lerobot` left."""
        folder = self.source / OURS
        ours = _read_json(folder / 'dataset.json')
        try:
            info = from_dict(DatasetInfo, ours['dataset'], str(folder / 'dataset.json'))
            columns = from_dict(Columns, ours['columns'], str(folder / 'dataset.json'))
        except ContractError as error:
            raise DataError(str(error), 'E403') from None
        with _reading(folder / 'rows.parquet'):
            rows = pq.read_table(folder / 'rows.parquet')
        lengths = [episode['meta']['length'] for episode in ours['episodes']]
        if lengths != [episode['length'] for episode in self.episodes] or sum(lengths) != len(rows):
            raise DataError(f'{folder}: describes other episodes than meta/episodes, which was changed since the export; '
                            'remove this folder to import without it', 'E403')
        return info, columns, {**ours, 'stamp': rows['stamp'], 'filled': rows['filled']}

    def _foreign(self) -> tuple[DatasetInfo, Columns, None]:
        """How a dataset of others becomes ours: observation.state → state, observation.images.top → top, …"""
        features: dict[str, Feature] = {}
        others, cameras, videos = {}, {}, []
        if 'action' not in self.features or not _is_vector(self.features['action']):
            raise DataError(f'{self.source}: no column action of numbers; there are: {", ".join(self.features)}', 'E403')
        for key, feature in self.features.items():
            short = key.removeprefix('observation.')
            name = re.sub(r'[^A-Za-z0-9_.-]', '_', short.removeprefix('images.'))
            while name in features or name in RESERVED:
                name += '_'
            if feature['dtype'] in ('video', 'image') and _image_shape(feature)[2] == 3:
                features[name] = Feature(_image_shape(feature), 'image')
                cameras[name] = key
                videos += [name] if feature['dtype'] == 'video' else []
            elif short != key and _is_vector(feature):
                features[name] = Feature(tuple(feature['shape']), 'lowdim', _names(feature))
                others[name] = key
        action = self.features['action']
        names = _names(action) or tuple(f'action_{d}' for d in range(action['shape'][0]))
        info = DatasetInfo(fps=self.fps, features=features, action=ActionInfo(names), label='imported')
        return info, Columns((), others, cameras, tuple(videos)), None


def _place(root: Path, template: str, **fields: str | int) -> Path:
    """The file that a template of info.json names. Raises DataError if it would be outside of the dataset, or names no file."""
    for _, field, form, conversion in Formatter().parse(template):
        if field is not None and (field not in fields or conversion or not re.fullmatch(r'(0?\dd)?', form)):
            raise DataError(f'{root}: info.json names files by {template!r}; valid there: {", ".join(fields)}, as in {DATA}',
                            'E403')
    place = template.format(**fields)
    if os.path.isabs(place) or '..' in Path(place).parts or '\0' in place:
        raise DataError(f'{root}: info.json names a file outside of the dataset: {place!r}', 'E403')
    return root / place


class _DataReader:
    """Rows of one episode after the other from the data files."""

    def __init__(self, root: Path, template: str, columns: list[str]):
        self.root, self.template, self.columns = root, template, columns
        self.file: Path | None = None

    def episode(self, episode: dict) -> tuple[pa.Table, str]:
        """The rows of an episode, and what errors name. Raises DataError if they are not there."""
        e, T = episode['episode_index'], episode['length']
        file = _place(self.root, self.template, chunk_index=episode['data/chunk_index'], file_index=episode['data/file_index'])
        where = f'{file}, episode {e}'
        with _reading(file):
            if file != self.file:
                self._open(file)
            found = np.flatnonzero(self.index == e)
            if len(found) != T or T == 0 or found[-1] - found[0] != T - 1:
                raise DataError(f'{where}: {len(found)} rows, not the {T} in a row that meta/episodes says', 'E403')
            first, last = np.searchsorted(self.ends, [found[0], found[-1]], side='right').tolist()
            if (first, last) != self.groups:  # others keep many episodes in a row group
                self.table, self.groups = self.parquet.read_row_groups(range(first, last + 1), self.columns), (first, last)
        begin = self.ends[first - 1] if first else 0
        return self.table.slice(found[0] - begin, T), where

    def _open(self, file: Path) -> None:
        self.parquet = pq.ParquetFile(file)
        absent = [name for name in self.columns if name not in self.parquet.schema_arrow.names]
        if absent:
            raise DataError(f'{file}: no columns {absent}, which info.json lists', 'E403')
        self.index = self.parquet.read(['episode_index'])['episode_index'].to_numpy()
        groups = [self.parquet.metadata.row_group(group).num_rows for group in range(self.parquet.num_row_groups)]
        self.file, self.ends, self.groups = file, np.cumsum(groups), None


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What goes wrong while a parquet file is read becomes a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f'{file}: no such file; copy the dataset again whole', 'E403') from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f'{file}: not readable: {error}; a recording that was interrupted leaves files without their end, '
                        'which cannot be recovered', 'E403') from None


def _in_order(pool: ThreadPoolExecutor, function: Callable, arguments: Iterable[tuple], ahead: int) -> Iterator:
    """Results of a function in the order of its arguments, computed up to `ahead` before they are asked for."""
    waiting: deque = deque()
    for given in arguments:
        waiting.append(pool.submit(function, *given))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _statistics(values: np.ndarray) -> dict[str, list]:
    """LeRobot's statistics of rows (N, D) or (N,)."""
    values = values.reshape(len(values), -1).astype(np.float64)
    result = {'min': values.min(axis=0), 'max': values.max(axis=0), 'mean': values.mean(axis=0), 'std': values.std(axis=0),
              **{f'q{round(100 * q):02d}': value for q, value in zip(QUANTILES, np.quantile(values, QUANTILES, axis=0))}}
    return {'count': [len(values)], **{key: value.tolist() for key, value in result.items()}}


def _image_statistics(counts: np.ndarray, frames: int) -> dict[str, list]:
    """The same of all pixels of N images, from how often each value occurs, (channels, values).

    Of shape (channels, 1, 1); colours in [0, 1], depth in [mm].
    """
    channels, values = counts.shape
    value = np.arange(values) / (255 if channels == 3 else 1)
    number = counts.sum(axis=1, keepdims=True)                          # (channels, 1)
    mean = (counts * value).sum(axis=1, keepdims=True) / number
    deviation = np.sqrt((counts * (value - mean)**2).sum(axis=1) / number[:, 0])
    below = np.cumsum(counts, axis=1)
    places = {'min': (below > 0).argmax(axis=1), 'max': (below == number).argmax(axis=1),
              **{f'q{round(100 * q):02d}': (below >= q * number).argmax(axis=1) for q in QUANTILES}}
    result = {'mean': mean[:, 0], 'std': deviation, **{key: value[place] for key, place in places.items()}}
    return {'count': [frames], **{key: part.reshape(channels, 1, 1).tolist() for key, part in result.items()}}


def _tasks_table(tasks: dict[str, int]) -> pa.Table:
    """task → task_index as a pandas table indexed by the task, which is how LeRobot looks tasks up."""
    def column(name: str | None, kind: str, numpy_type: str, metadata=None) -> dict:
        return {'name': name, 'field_name': name, 'pandas_type': kind, 'numpy_type': numpy_type, 'metadata': metadata}

    pandas = {'index_columns': ['task'], 'column_indexes': [column(None, 'unicode', 'object', {'encoding': 'UTF-8'})],
              'columns': [column('task_index', 'int64', 'int64'), column('task', 'unicode', 'object')],
              'creator': {'library': 'pyarrow', 'version': pa.__version__}, 'pandas_version': '2.0.0'}
    table = pa.table({'task_index': pa.array(list(tasks.values()), pa.int64()), 'task': pa.array(list(tasks), pa.string())})
    return table.replace_schema_metadata({'pandas': json.dumps(pandas)})


def _described(schema: pa.Schema) -> pa.Schema:
    """A schema with the types of Hugging Face datasets, which show embedded images only if they are told."""
    def kind(field: pa.DataType) -> dict:
        if pa.types.is_struct(field):
            return {'_type': 'Image'}
        if pa.types.is_fixed_size_list(field):
            return {'feature': kind(field.value_type), 'length': field.list_size, '_type': 'Sequence'}
        return {'dtype': str({'float': 'float32'}.get(str(field), field)), '_type': 'Value'}

    features = {field.name: kind(field.type) for field in schema}
    return schema.with_metadata({'huggingface': json.dumps({'info': {'features': features}})})


def _file_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG or PNG file, from its header."""
    if data.startswith(PNG):
        return int.from_bytes(data[20:24], 'big'), int.from_bytes(data[16:20], 'big')
    return jpeg_size(data)


def _embedded(column: pa.ChunkedArray, where: str) -> Iterator[bytes]:
    """Image files inside a data file."""
    for row, cell in enumerate(column):
        image = cell.as_py()
        data = image.get('bytes') if isinstance(image, dict) else None
        if not data or _file_size(data) is None:
            raise DataError(f'{where}: row {row} holds no JPEG or PNG file', 'E403')
        yield data


def _matrix(column: pa.ChunkedArray, D: int, where: str) -> np.ndarray:
    """A column of numbers or of lists of D numbers, as (T, D)."""
    values = pa.concat_arrays(column.chunks)
    T = len(values)
    if values.null_count:
        raise DataError(f'{where}: {values.null_count} of {T} rows are empty', 'E205')
    if hasattr(values, 'flatten'):
        values = values.flatten()
    values = values.to_numpy(zero_copy_only=False)
    if len(values) != T * D:
        raise DataError(f'{where}: {len(values)} numbers in {T} rows, but info.json says {D} a row', 'E403')
    return values.reshape(T, D)


def _is_vector(feature: dict) -> bool:
    return len(feature['shape']) == 1 and bool(re.fullmatch('float.*|u?int.*|bool', feature['dtype']))


def _image_shape(feature: dict) -> tuple[int, int, int]:
    """(height, width, channels), which some write as (3, height, width); 1 channel is depth."""
    first, second, last = feature['shape']
    return (second, last, first) if first == 3 and last != 3 else (first, second, last)


def _names(feature: dict) -> tuple[str, ...]:
    """Names of the entries, which LeRobot keeps as a list, {'motors': list} or {name: place}; () if they do not fit."""
    names = feature.get('names') or []
    while isinstance(names, dict):
        parts = list(names.values())
        names = parts[0] if len(parts) == 1 and isinstance(parts[0], (list, dict)) else list(names)
    fit = len(set(map(str, names))) == len(names) == feature['shape'][0]
    return tuple(map(str, names)) if fit else ()


def _write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=4))


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f'{file}: not readable: {error}', 'E403') from None
    if not isinstance(content, dict):
        raise DataError(f'{file}: not readable: holds no JSON object', 'E403')
    return content
