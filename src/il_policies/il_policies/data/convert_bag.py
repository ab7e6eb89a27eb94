"""One bag to the episodes it holds, staged in a folder."""
from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import tyro

from il_policies import durable
from il_policies.bags.reader import Bag
from il_policies.bags.storage import Raw
from il_policies.contract import Contract
from il_policies.data.align import Rows, align_recording
from il_policies.data.decode import encode_frame
from il_policies.data.errors import BagError, DataError
from il_policies.data.quality import assess
from il_policies.data.recording import Recording, read_recording
from il_policies.data.store import DatasetInfo, write_episode_folder


@dataclass(frozen=True)
class Options:
    """What is made of bags."""

    images: Literal['jpeg95', 'passthrough'] = 'jpeg95'
    """jpeg95: JPEG at the contract's size, small and quick to train from. passthrough: compressed images as recorded, at
    their own size. Depth is PNG [mm] in both."""
    gaps: Literal['refuse', 'split'] = 'refuse'
    """What a gap too long to be repeated does: refuse the episode, or end it and begin another one after the gap."""
    markers: str = ''
    """Topic (std_msgs/String) whose marks cut a bag into episodes: start [task], success, failure, stop, discard. Empty:
    each bag is one episode."""
    salvage: tyro.conf.FlagCreatePairsOff[bool] = False
    """Use what is left of damaged bags and of recordings that were cut short (.part); such episodes are labelled."""
    msg_path: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Package, .msg file, or folder of them, for bags without type definitions; may be repeated."""


@dataclass(frozen=True)
class Job:
    """One bag to convert."""

    path: Path
    """The bag."""
    contract: Contract
    """Read under this contract."""
    info: DatasetInfo
    """Description of the dataset that its episodes are for."""
    options: Options
    """What to make of it."""
    staging: Path
    """Where to make a folder for its episodes, on the file system of the dataset."""
    origin: dict[str, str]
    """Noted in each episode, with its number among those of the bag."""
    threads: int = 1
    """For images."""


@dataclass(frozen=True)
class Made:
    """What became of one bag."""

    folder: Path | None
    """A folder `made-…` of complete episode folders 0, 1, …; None if there is no episode."""
    refused: tuple[str, ...]
    """Why an episode, or the whole bag, was refused."""


def convert_bag(job: Job, tell: Callable[[float], None]) -> Made:
    """Convert a bag; tell is called with the share done. Raises OSError if the disk refuses to store the episodes."""
    cv2.setNumThreads(1)  # images are worked on in parallel, each by one thread
    work = Path(tempfile.mkdtemp(prefix='work-', dir=job.staging))
    try:
        refused = _write_episodes(job, work, tell)
        if not any(work.iterdir()):
            return Made(None, refused)
        durable.sync(work)
        made = work.with_name(work.name.replace('work-', 'made-', 1))
        os.rename(work, made)
        durable.sync(job.staging)
        return Made(made, refused)
    except DataError as error:
        return Made(None, (str(error),))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_episodes(job: Job, work: Path, tell: Callable[[float], None]) -> tuple[str, ...]:
    """Write the episodes of a bag as work/0, work/1, …; returns why others were refused."""
    bag = Bag(job.path, job.options.msg_path, job.options.salvage)
    recording = read_recording(bag, job.contract, job.options.markers)
    broken: dict[str, dict[int, DataError]] = {name: {} for name in job.contract.cameras}
    while True:
        episodes: list[Rows] = []
        refused: list[str] = []
        for span in recording.spans:
            try:
                episodes += align_recording(recording, span, job.options.gaps, broken)
            except DataError as error:
                refused.append(str(error))
        streams = {name: dataclasses.replace(record, undecodable=len(broken.get(name, ())))
                   for name, record in recording.streams.items()}
        recording = dataclasses.replace(recording, streams=streams)
        with _Frames(recording, episodes, job.options.images, job.threads, tell) as frames:
            for number, rows in enumerate(episodes):
                meta = {'task': rows.task, 'success': rows.success, 'source': bag.name, 'damage': list(recording.damage),
                        'conversion': {**job.origin, 'part': number, 'parts': len(episodes), 'refused': refused}}
                write_episode_folder(work / str(number), job.info, rows.lowdim, rows.action, rows.stamps, rows.filled,
                                     {name: frames.of(name, places) for name, places in rows.frames.items()}, meta,
                                     assess(recording, rows), where=str(job.path))
        if not any(frames.broken.values()):
            return tuple(refused)
        # What cannot be decoded was not seen in the first pass: it counts as lost, and the rows are decided anew.
        shutil.rmtree(work)
        work.mkdir()
        for name, errors in frames.broken.items():
            if len(errors) == frames.tried[name]:
                raise next(iter(errors.values())).at(job.path)
            broken[name] |= errors


class _Frames:
    """The second pass over a bag: its images, encoded by threads a little ahead of their use."""

    BROKEN = b'broken'
    """Stands for an image that cannot be decoded, in an episode that will not stay."""

    def __init__(self, recording: Recording, episodes: Sequence[Rows], images: Literal['jpeg95', 'passthrough'], threads: int,
                 tell: Callable[[float], None]):
        self.recording, self.images, self.tell = recording, images, tell
        cameras = {name: recording.streams[name] for name in recording.contract.cameras}
        self.uses = {name: np.zeros(len(record.stamps), np.int64) for name, record in cameras.items()}
        for rows in episodes:
            for name, places in rows.frames.items():
                np.add.at(self.uses[name], places, 1)
        self.tried = {name: np.count_nonzero(uses) for name, uses in self.uses.items()}
        self.broken: dict[str, dict[int, DataError]] = {name: {} for name in cameras}
        self.names: dict[str, list[str]] = {}  # topic → its features
        for name, record in cameras.items():
            self.names.setdefault(record.topic, []).append(name)
        self.seen = dict.fromkeys(cameras, 0)
        self.encoded: dict[tuple[str, int], Future] = {}
        self.ahead = 3 * threads + len(cameras)
        self.left = self.total = sum(int(uses.sum()) for uses in self.uses.values())
        self.told = time.monotonic()
        self.pool = ThreadPoolExecutor(threads)
        self.messages = recording.bag.raw(self.names)

    def __enter__(self) -> _Frames:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def of(self, name: str, places: np.ndarray) -> Iterator[bytes]:
        """The images of a feature at these places, which nearly rise and may repeat."""
        for place in places:
            yield self._take(name, int(place))

    def _take(self, name: str, place: int) -> bytes:
        while len(self.encoded) < self.ahead and self._read():
            pass
        while (name, place) not in self.encoded:
            if not self._read():
                raise BagError(f'{self.recording.bag.path}: ends earlier than when it was first read; is it being written?',
                               'E101')
        image = self.encoded[name, place]
        self.uses[name][place] -= 1
        if not self.uses[name][place]:
            del self.encoded[name, place]
        self.left -= 1
        if time.monotonic() > self.told + 0.2:
            self.told = time.monotonic()
            self.tell(1 - self.left / self.total)
        try:
            return image.result()
        except DataError as error:
            self.broken[name][place] = error
            return self.BROKEN

    def _read(self) -> bool:
        """Read the next message, and have it encoded if it is needed; False at the end of the bag."""
        raw = next(self.messages, None)
        if raw is None:
            return False
        for name in self.names[raw.topic]:
            place = self.seen[name]
            self.seen[name] += 1
            if place < len(self.uses[name]) and self.uses[name][place]:
                self.encoded[name, place] = self.pool.submit(self._encode, name, raw)
        return True

    def _encode(self, name: str, raw: Raw) -> bytes:
        stream = self.recording.streams[name].stream
        return encode_frame(self.recording.bag.deserialize(raw.topic, raw.data), stream, self.images)
