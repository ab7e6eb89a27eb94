"""Bags to a dataset.

Bags are converted in parallel into OUT/.converting (`convert_bag`), and their episodes then renamed into the dataset in
the order of the bags: the result depends on the bags alone, not on what finished first, nor on how often a run was killed
before. An episode notes in its description what it was made from, so that what is there already, in the dataset or half-way
to it, tells itself whether it can stay; nothing else need be kept in step with it.
"""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from il_policies.bags.reader import Bag, find_bags
from il_policies.contract import Contract, ContractError, from_dict
from il_policies.data.convert_bag import Job, Options, convert_bag
from il_policies.data.errors import BagError, DataError
from il_policies.data.quality import VERDICTS
from il_policies.data.store import (
    ActionInfo,
    DatasetInfo,
    Feature,
    create,
    episode_folders,
    place_episode,
    read_episode,
    remove_episode,
    verify_episode,
)
from il_policies.parallel import WorkerDied, run

VERSION = 1
"""Raised when the same bag gives another episode than before: those made before are then made anew."""
ORIGIN = {'key': str, 'place': str, 'part': int, 'parts': int, 'refused': list}
"""What an episode notes of its conversion (`Job.origin` and its number), and the types."""
WORK_PER_PROCESS = 64 * 2**20
"""Bytes of bags that take about as long as starting a process for them."""


@dataclass(frozen=True)
class ConvertCommand:
    """Turn recorded bags into a dataset. Bags already in it are not converted again; a run that was interrupted goes on.

    Exit code 0: all converted; 1: some refused, each named with the reason; 2: none converted.
    """

    bags: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar='BAG [BAG …]', help_behavior_hint='(required)')]
    """Bags (folders, or single .mcap or .db3 files), or folders of bags."""
    out: Path
    """Dataset to make or to bring up to date."""
    conversion: tyro.conf.OmitArgPrefixes[Options]
    """What is made of the bags."""
    contract: Path | None = None
    """Contract of the robot that was recorded: config/robots/<robot>.yaml. None: the one the recorder left in the bags."""
    jobs: int = 0
    """Bags converted at a time, each by a process of its own. 0: one per CPU core, fewer for little work."""
    prune: tyro.conf.FlagCreatePairsOff[bool] = False
    """Remove episodes of bags that are not given, or cannot be used any more."""


@dataclass(frozen=True)
class Report:
    """What became of one episode, or of a bag that gave none."""

    bag: str
    """Path of the bag."""
    index: int | None
    """Index of the episode; None if it was refused."""
    kept: bool
    """True if the episode was there already."""
    refused: str
    """Why there is no episode; empty if there is one."""
    details: dict
    """Its quality, see `quality.assess`; {} if it was refused."""


def dataset_info(contract: Contract) -> DatasetInfo:
    """The description of a dataset recorded under a contract."""
    return DatasetInfo(
        fps=contract.policy_rate,
        features={name: Feature(stream.shape, stream.kind, () if stream.is_image else tuple(stream.names or stream.fields))
                  for name, stream in contract.observations.items()},
        action=ActionInfo(contract.action.joints, contract.action_offset),
        label=contract.action.label, contract=contract.to_dict(), contract_hash=contract.hash)


def convert(bags: str | Path | Sequence[str | Path], contract: Contract | None, out: str | Path,
            options: Options | None = None, jobs: int = 0, prune: bool = False,
            progress: Callable[[float, tuple[str, ...]], None] = lambda share, refused: None) -> list[Report]:
    """Convert bags (files, folders, folders of them) to the dataset `out`, its episodes numbered in the order of the bags.

    Episodes already made from the same bags under the same contract and options are kept, unless they are damaged. A bag
    that cannot be used gives a report with `refused`, and leaves there what an earlier run made of it. Of equal
    recordings the first is used. contract: None takes the one that the recorder left in the bags. jobs: bags at a time,
    each in a process; 0: one per core, fewer for little work. prune: remove episodes of bags that are not given or are
    refused. progress is called with the share done and what was refused since.
    Raises DataError if there is no bag (E102), no contract (E212), or `out` holds something else, episodes of other bags, or
    is being written (E301); OSError if the disk is full. Processes import the main module: guard it by `__name__`.
    """
    options = options or Options()
    sources = _sources(bags, options)
    contract = contract or _contract_inside([source for source in sources.values() if isinstance(source, _Source)])
    info = dataset_info(contract)
    out = Path(out)
    if not out.exists():
        out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        create(out, info)
        plan = _Plan({path: source if isinstance(source, BagError) else _key(source, contract, options)
                      for path, source in sources.items()}, out, info, options.salvage, prune)
        todo = [Job(path, contract, info, options, plan.staging, origin) for path, origin in plan.todo.items()]
        cores = len(os.sched_getaffinity(0))
        processes = jobs or min(cores, 1 + sum(_size(job.path) for job in todo) // WORK_PER_PROCESS)
        processes = max(1, min(processes, len(todo)))
        todo = [replace(job, threads=max(1, cores // processes)) for job in todo]
        shares = [0.0] * len(todo)

        def tell(i: int, share: float, refused: tuple[str, ...] = ()) -> None:
            shares[i] = share
            progress(1 - (len(todo) - sum(shares)) / len(sources), refused)

        progress(1 - len(todo) / len(sources), sum(plan.refused.values(), ()))
        for i, made in run(convert_bag, todo, processes, tell):
            path = todo[i].path
            if isinstance(made, WorkerDied):
                plan.refused[path] = (f'{path}: {made}; was memory short? rerun, with fewer jobs',)
            else:
                plan.refused[path] = made.refused
                if made.folder:
                    (plan.groups[path],) = _groups(made.folder.iterdir())
            tell(i, 1.0, plan.refused[path])
        copies = plan.refuse_copies()
        if copies:
            progress(1.0, copies)
        return plan.finish()


def summary_line(reports: Sequence[Report]) -> str:
    """The quality of a conversion in one line."""
    good = [report.details for report in reports if not report.refused]
    rows = sum(details['rows'] for details in good)
    parts = [f'{len(good)} episodes, {rows} rows']
    if rows:
        streams = [stream for details in good for stream in details['streams'].values()]
        # What a stream may lose, such as the ticks a controller skips by design, would only alarm.
        poor = [stream for stream in streams
                if stream['lost_share'] > stream['lost_allowed'] or stream['dt_max_s'] > stream['dt_allowed_s']]
        share = 100 * sum(details['filled'] for details in good) / rows
        verdicts = {verdict: sum(details['verdict'] == verdict for details in good) for verdict in VERDICTS}
        parts += [f'{share:.2g} % filled', f'{sum(stream["lost"] for stream in poor)} messages lost',
                  f'{sum(stream["gaps"] for stream in poor)} gaps',
                  f'oldest sample {1e3 * max(stream["max_age_s"] for stream in streams):.0f} ms',
                  f'{sum(details["success"] is not True for details in good)} not labelled a success',
                  *(f'{count} {verdict}' for verdict, count in verdicts.items() if count)]
    refused = len(reports) - len(good)
    return ', '.join(parts + [f'{refused} refused'])


@dataclass(frozen=True)
class _Source:
    """A bag that can be read, known without keeping it open."""

    path: Path
    fingerprint: list
    contract: dict | None


def _sources(bags: str | Path | Sequence[str | Path], options: Options) -> dict[Path, _Source | BagError]:
    """Path → the bag, or why it cannot be read; in the given order, those of a folder by name, each once."""
    paths: dict[Path, Path] = {}
    for given in [bags] if isinstance(bags, (str, Path)) else bags:
        for path in find_bags(given, options.salvage):
            paths.setdefault(path.resolve(), path)
    if not paths:
        raise BagError('no bags given', 'E102')
    sources: dict[Path, _Source | BagError] = {}
    for path in paths.values():
        try:
            bag = Bag(path, options.msg_path, options.salvage)
            sources[path] = _Source(path, bag.fingerprint, bag.contract)
        except BagError as error:
            sources[path] = error
    return sources


def _contract_inside(sources: Sequence[_Source]) -> Contract:
    """The contract that the recorder left in the bags."""
    found: dict[str, tuple[Path, Contract]] = {}
    for source in sources:
        if source.contract is not None:
            try:
                contract = from_dict(Contract, source.contract, f'contract in {source.path}')
            except ContractError as error:
                raise DataError(f'{error}; give one with --contract', 'E212') from None
            found.setdefault(contract.hash, (source.path, contract))
    if not found:
        raise DataError(f'{sources[0].path if sources else "no readable bag"}: no contract inside; give one with --contract',
                        'E212')
    if len(found) > 1:
        (path, contract), (other_path, other) = list(found.values())[:2]
        raise DataError(f'{path} and {other_path} were recorded under different contracts '
                        f'({contract.differences(other)[0]}); choose one with --contract', 'E212')
    return next(iter(found.values()))[1]


def _key(source: _Source, contract: Contract, options: Options) -> str:
    """Equal for conversions that give the same episodes."""
    return _digest([VERSION, source.fingerprint, contract.hash, options.images, options.gaps, options.markers])


def _digest(data) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One conversion at a time; the lock goes with the process, however it ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f'{out}: is being written by another il convert; wait for it, or give another folder',
                            'E301') from None
        yield
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    """Bytes of a bag."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


@dataclass
class _Group:
    """The episodes made from one bag."""

    key: str
    """See `_key`."""
    place: str
    """Digest of the bag's path."""
    source: str
    """Name of the bag."""
    parts: dict[int, Path]
    """Number → folder, wherever it lies."""
    count: int
    """How many parts there should be."""
    damaged: bool
    """Salvaged from a damaged bag."""
    refused: tuple[str, ...]
    """Why other episodes of the bag were refused."""

    @property
    def folders(self) -> list[Path]:
        return [self.parts[number] for number in sorted(self.parts)]


def _groups(folders: Iterable[Path]) -> list[_Group]:
    """The episodes of these folders, by the bag they were made from; folders that are no episode are left out."""
    groups: dict[str, _Group] = {}
    for folder in folders:
        try:
            meta = read_episode(folder)
        except DataError:
            continue
        made = meta.get('conversion')
        if not isinstance(made, dict) or not all(isinstance(made.get(key), kind) for key, kind in ORIGIN.items()):
            made = {'key': str(folder), 'place': '', 'part': 0, 'parts': 1, 'refused': []}
        group = groups.setdefault(made['key'], _Group(made['key'], made['place'], meta['source'] or str(folder), {},
                                                      made['parts'], bool(meta.get('damage')), tuple(made['refused'])))
        group.parts[made['part']] = folder
    return list(groups.values())


def _whole(group: _Group, info: DatasetInfo) -> bool:
    """Whether all files of its episodes are what was written."""
    try:
        for folder in group.folders:
            verify_episode(folder, info)
    except DataError:
        return False
    return True


class _Plan:
    """Which episodes make the dataset: those that are there, and those that are still to be made."""

    def __init__(self, bags: dict[Path, str | BagError], out: Path, info: DatasetInfo, salvage: bool, prune: bool):
        """bags: path → key, or why it cannot be read.

        Raises DataError if the dataset holds episodes of other bags that are not to be removed.
        """
        self.out, self.prune = out, prune
        self.staging, self.episodes = out / '.converting', out / 'episodes'
        self.places = {path: _digest(str(path.resolve())) for path in bags}
        self.groups: dict[Path, _Group] = {}
        self.refused: dict[Path, tuple[str, ...]] = {}
        self.todo: dict[Path, dict[str, str]] = {}
        staged = [folder for folder in self.staging.glob('*/*') if folder.name.isdecimal()]
        present = _groups([*episode_folders(out), *staged])
        others = sorted({group.source for group in present
                         if group.key not in bags.values() and group.place not in self.places.values()})
        if others and not prune:
            raise DataError(f'{out}: holds episodes of other bags ({", ".join(others[:3])}{", …" if len(others) > 3 else ""}); '
                            'give those bags too, remove the episodes with --prune, or give another folder', 'E301')
        usable = {group.key: group for group in present if group.key in bags.values()
                  and len(group.parts) == group.count and (salvage or not group.damaged) and _whole(group, info)}
        first: dict[str, Path] = {}
        for path, key in bags.items():
            if isinstance(key, BagError):
                self.refused[path] = (str(key),)
            elif first.setdefault(key, path) != path:
                self.refused[path] = (f'E303 {path}: the same recording as {first[key]}',)
            elif key in usable:
                self.groups[path], self.refused[path] = usable[key], usable[key].refused
            else:
                self.todo[path] = {'key': key, 'place': self.places[path]}
        self.earlier = {group.place: group for group in present if group not in self.groups.values()}
        self.staging.mkdir(exist_ok=True)
        for unfinished in self.staging.glob('work-*'):
            shutil.rmtree(unfinished)

    def refuse_copies(self) -> tuple[str, ...]:
        """Leave out what another bag gave already, as a copy under another name does; returns why."""
        first: dict[str, Path] = {}
        reasons = []
        for path in self.places:
            group, copied = self.groups.get(path), {}
            for number, folder in group.parts.items() if group else ():
                other = first.setdefault(read_episode(folder)['content'], path)
                if other != path:
                    copied[number] = other
            for other in dict.fromkeys(copied.values()):
                reasons.append(f'E303 {path}: the same recording as {other}')
                self.refused[path] = (*self.refused[path], reasons[-1])
            for number in copied:
                del group.parts[number]
        return tuple(reasons)

    def finish(self) -> list[Report]:
        """Number the episodes in the order of the bags, and remove all others."""
        folders: list[Path] = []
        reports: list[Report] = []
        for path, place in self.places.items():
            group, refused = self.groups.get(path), self.refused[path]
            if group is None and place in self.earlier and not self.prune:
                # Hours of work are not thrown away because a bag cannot be read today.
                group = self.earlier[place]
                refused = tuple(f'{reason} (what an earlier run made of it stays)' for reason in refused)
            for folder in group.folders if group else ():
                if path in self.groups:
                    details = json.loads((folder / 'report.json').read_text())
                    reports.append(Report(str(path), len(folders), path not in self.todo, '', details))
                folders.append(folder)
            reports += [Report(str(path), None, False, reason, {}) for reason in refused]
        self._number(folders)
        shutil.rmtree(self.staging)
        return reports

    def _number(self, folders: list[Path]) -> None:
        """Make these folders the episodes 0, 1, … of the dataset, only by renaming: a crash in between loses none."""
        for i, folder in enumerate(folders):
            if folder.parent == self.episodes and int(folder.name) != i:
                folders[i] = Path(tempfile.mkdtemp(prefix='moved-', dir=self.staging)) / '0'
                os.rename(folder, folders[i])
        for folder in set(episode_folders(self.out)) - set(folders):
            remove_episode(self.out, int(folder.name))
        for i, folder in enumerate(folders):
            if folder.parent != self.episodes:
                place_episode(self.out, folder, i)
