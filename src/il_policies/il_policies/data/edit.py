"""Datasets made of others, episode by episode: joined (`merge`) and divided (`split`).

Files are shared with the source by hard links where the file system can, which costs no time and no space; nobody ever
writes into an episode's files, they are only replaced.
"""
from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from il_policies import durable
from il_policies.contract import Contract, from_dict
from il_policies.data.errors import DataError
from il_policies.data.store import Dataset, DatasetInfo, create, require_new

PARTS = 'valid: NAME=0.9 (a share), NAME=0-49,60 (episodes), NAME=verdict:FAIL (what is known of them), NAME=rest'


def merge(sources: Sequence[str | Path], out: str | Path) -> tuple[Dataset, list[str]]:
    """Make a dataset of all episodes of others, numbered in the order given.

    An episode that occurs several times is taken once, and of its copies one that is not damaged. Returns the dataset and
    the folders of those left out. Raises DataError if the datasets differ in more than their episodes, one is damaged and
    has no whole copy, or `out` exists; then nothing is written.
    """
    datasets, out = [Dataset(source) for source in sources], Path(out)
    if not datasets:
        raise DataError('no datasets given', 'E302')
    for dataset in datasets[1:]:
        _require_equal(dataset, datasets[0])
    taken: dict[str, Path | DataError] = {}
    left_out = []
    for dataset in datasets:
        for i, (folder, meta) in enumerate(zip(dataset.folders, dataset.episodes)):
            if isinstance(taken.get(meta['content']), Path):
                left_out.append(str(folder))
                continue
            try:
                dataset.verify(i)
                taken[meta['content']] = folder
            except DataError as error:
                taken.setdefault(meta['content'], error)
                left_out.append(str(folder))
    for damaged in taken.values():
        if isinstance(damaged, DataError):
            raise damaged
    with durable.new_folder(require_new(out)) as folder:
        _fill(folder, datasets[0].info, list(taken.values()), f'merging to {out}')
    return Dataset(out), left_out


def split(source: str | Path, out: str | Path, parts: Sequence[str], seed: int = 0) -> dict[str, Dataset]:
    """Make one dataset OUT/NAME for each part of a dataset, given as NAME=WHAT.

    WHAT is a share, such as 0.9, drawn at random by `seed` from the episodes that no part names; indices of episodes, such
    as 0-49,60; FIELD:VALUE, such as success:False or verdict:FAIL, of those not taken by a part before; or `rest`: all that
    is left. Each part numbers its episodes from 0, in their order.
    Raises DataError if a part is unclear, empty, names an episode of another or one that is damaged, or `out` exists; then
    nothing is written.
    """
    dataset, out = Dataset(source), require_new(out)
    chosen = choose_parts(dataset, parts, seed)
    for i in sorted(place for places in chosen.values() for place in places):
        dataset.verify(i)
    with durable.new_folder(out) as folder:
        for name, places in chosen.items():
            _fill(folder / name, dataset.info, [dataset.folders[i] for i in places], f'splitting to {out / name}')
    return {name: Dataset(out / name) for name in chosen}


def choose_parts(dataset: Dataset, parts: Sequence[str], seed: int = 0) -> dict[str, list[int]]:
    """Name of each part of `split` → places of its episodes in `dataset.episodes`, rising. Raises DataError."""
    what = {}
    for part in parts:
        name, _, value = part.partition('=')
        if not re.fullmatch(r'[A-Za-z0-9_-]+', name) or not value or name in what:
            raise DataError(f'part {part!r}: {"given twice" if name in what else "not understood"}; {PARTS}', 'E303')
        what[name] = value
    if not what:
        raise DataError(f'no parts given; {PARTS}', 'E303')
    free = {meta['index']: i for i, meta in enumerate(dataset.episodes)}
    chosen: dict[str, list[int]] = dict.fromkeys(what, [])
    shares: dict[str, float] = {}
    for name, value in what.items():
        if re.fullmatch(r'\d+(-\d+)?(,\d+(-\d+)?)*', value):
            chosen[name] = [place for named in value.split(',') for place in _take(dataset, free, name, named)]
        elif ':' in value:
            chosen[name] = _matching(dataset, free, name, value)
        elif value != 'rest':
            shares[name] = _share(name, value)
    if sum(shares.values()) > 1 + 1e-9:
        raise DataError(f'the shares {" ".join(f"{k}={v:g}" for k, v in shares.items())} are more than 1 together', 'E303')
    drawn = np.random.default_rng(seed).permutation(list(free.values())).tolist()
    # Rounding the cumulated shares gives every part its size within one episode, and all episodes when they add up to 1.
    ends = [round(len(drawn) * end) for end in np.cumsum(list(shares.values())).tolist()]
    for name, begin, end in zip(shares, [0, *ends], ends):
        chosen[name] = drawn[begin:end]
    rest = [name for name, value in what.items() if value == 'rest']
    if len(rest) > 1:
        raise DataError(f'{" and ".join(rest)} are both the rest', 'E303')
    for name in rest:
        chosen[name] = drawn[ends[-1] if ends else 0:]
    empty = [name for name, places in chosen.items() if not places]
    if empty:
        raise DataError(f'{dataset.path}: no episodes for {", ".join(empty)}; there are {len(dataset)}', 'E303')
    return {name: sorted(places) for name, places in chosen.items()}


def _take(dataset: Dataset, free: dict[int, int], name: str, named: str) -> list[int]:
    """Places of the episodes of an index, or of those there are between two.

    They then are no longer in `free`, which is index → place.
    """
    first, _, last = named.partition('-')
    present = [meta['index'] for meta in dataset.episodes if int(first) <= meta['index'] <= int(last or first)]
    if not present:
        raise DataError(f'{dataset.path}: part {name}: no episode {named}; there are '
                        f'{", ".join(str(meta["index"]) for meta in dataset.episodes[:20]) or "none"}'
                        + (', …' if len(dataset) > 20 else ''), 'E303')
    twice = [index for index in present if index not in free]
    if twice:
        raise DataError(f'{dataset.path}: part {name}: episode {twice[0]} is named twice', 'E303')
    return [free.pop(index) for index in present]


def _matching(dataset: Dataset, free: dict[int, int], name: str, value: str) -> list[int]:
    """Places of the free episodes of which a field of episode.json, or the verdict of the report, has a value."""
    field, _, wanted = value.partition(':')
    known = [{'verdict': dataset.report(i).get('verdict'), **meta} for i, meta in enumerate(dataset.episodes)]
    if not any(field in meta for meta in known):
        fields = sorted({field for meta in known for field in meta})
        raise DataError(f'{dataset.path}: part {name}: no episode has {field!r}; there are: {", ".join(fields)}', 'E303')
    fits = [index for index, i in free.items() if str(known[i].get(field)).lower() == wanted.lower()]
    if not fits:
        found = sorted({str(meta.get(field)) for meta in known})
        raise DataError(f'{dataset.path}: part {name}: no episode is left with {field} {wanted}; {field} is one of: '
                        f'{", ".join(found[:10])}', 'E303')
    return [free.pop(index) for index in fits]


def _share(name: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise DataError(f'part {name}={value}: not understood; {PARTS}', 'E303')
    return share


def _fill(path: Path, info: DatasetInfo, folders: Sequence[Path], label: str) -> None:
    """A new dataset at `path` with these episodes."""
    create(path, info)
    console = Console(stderr=True)
    for index, source in enumerate(track(folders, label, console=console, disable=not console.is_terminal)):
        folder = path / 'episodes' / f'{index:06d}'
        shutil.copytree(source, folder, copy_function=_link)
        for inner in (*(f for f in folder.rglob('*') if f.is_dir()), folder):
            durable.sync(inner)
    durable.sync(path / 'episodes')


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
        durable.sync(Path(target))


def _require_equal(dataset: Dataset, first: Dataset) -> None:
    """Raises DataError with every difference between the descriptions of two datasets."""
    ours, theirs = dataset.info.to_dict(), first.info.to_dict()
    lines = [f'{key}: {ours[key]} ≠ {theirs[key]}' for key in ours
             if ours[key] != theirs[key] and key not in ('contract', 'contract_hash')]
    if not lines and ours['contract_hash'] != theirs['contract_hash']:
        if None in (ours['contract'], theirs['contract']):
            lines = ['only one of them has a contract']
        else:
            mine, other = (from_dict(Contract, plain['contract'], str(which.path / 'dataset.json'))
                           for plain, which in ((ours, dataset), (theirs, first)))
            lines = [f'contract: {line}' for line in mine.differences(other)]
    if lines:
        raise DataError(f'{dataset.path}: differs from {first.path} in\n  ' + '\n  '.join(lines)
                        + '\nconvert their bags under one contract', 'E303')
