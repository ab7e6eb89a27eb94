"""Contracts, datasets and checkpoints against each other: do they mean the same by what the policy sees and does?"""
from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from il_policies.check.findings import FAIL, NOTE, PASS, WARN, Finding
from il_policies.contract import Contract, ContractError, Stream, from_dict

if TYPE_CHECKING:
    from il_policies.data.store import Dataset, DatasetInfo
    from il_policies.policies import Policy

MEANING = re.compile(r'observations\.[^.]+(\.(names|fields|image_size|depth)|$)|action\.(joints|label)|policy_rate')
"""Fields of a contract that `compare` judges, one by one and by what they do."""
MISREAD = re.compile(r'observations\.[^.]+\.field$|joints\.[^.]+\.unit$')
"""Fields that change what a number means."""
BEHAVIOUR = re.compile(r'joints\.[^.]+\.(position|velocity|acceleration)|observations\.[^.]+\.(clock|latency)|action\.max_age|'
                       r'control_rate')
"""Fields that change what was demonstrated, or when it seems to have happened."""
LISTED = 12
"""So many fields that do no harm are named."""
LEAST_RANGE = 0.05
"""An entry that moved less than this is taken to have moved so much [rad or m]: it may be anywhere near."""


@dataclass(frozen=True)
class Interface:
    """What a policy sees and does, by a contract, a dataset or a checkpoint."""

    name: str
    """Of the file or folder."""
    redo: str
    """A command that makes it anew, with CONTRACT for that of the robot; '' for a contract, which is edited."""
    step_period: float
    """Time between policy steps [s]."""
    features: dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
    """Feature → shape of a sample, and names of its entries (() if unknown)."""
    joints: tuple[str, ...]
    """Of the action, in its order."""
    offset: float
    """Time from an observation to its action [s]."""


def of_contract(name: str, contract: Contract) -> Interface:
    """By a contract."""
    features = {key: (stream.shape, _entries(stream)) for key, stream in contract.observations.items()}
    return Interface(name, '', contract.step_period, features, contract.action.joints, contract.action_offset)


def of_dataset(name: str, info: DatasetInfo) -> Interface:
    """By a dataset."""
    features = {key: (feature.shape, feature.names) for key, feature in info.features.items()}
    return Interface(name, f'il convert BAGS --contract CONTRACT --out {name}', 1 / info.fps, features, info.action.names,
                     info.action.offset)


def of_policy(name: str, policy: Policy) -> Interface:
    """By a checkpoint; the names of entries are those of the contract that it carries, if this version reads it."""
    spec, observed = policy.spec, {}
    with suppress(ContractError):
        if carried := policy.extra.get('contract'):
            observed = from_dict(Contract, carried, name).observations
    features = {key: (tuple(shape), _entries(observed[key]) if key in observed else ()) for key, shape in spec.features.items()}
    return Interface(name, f'il train DATASET --out {name}', spec.step_period, features, tuple(spec.action_names),
                     spec.action_offset)


def _entries(stream: Stream) -> tuple[str, ...]:
    return () if stream.is_image else stream.names or stream.fields


def compare(reference: Interface, other: Interface) -> list[Finding]:
    """Can what `reference` observes be fed to `other`, and are its actions understood there?

    Features that `other` does not look at are a NOTE.
    """
    findings, again = [], other.redo.replace('CONTRACT', reference.name)

    def differ(level: str, code: str, place: str, expected, found, fix: str) -> None:
        # What was measured cannot be edited, a contract can.
        fix = again if reference.redo else f'{fix}; or make {other.name} anew: {again}'
        findings.append(Finding(level, place, str(found), code, f'{expected} ({reference.name})', fix))

    ours, theirs = reference.joints, other.joints
    if ours != theirs:
        if sorted(ours) == sorted(theirs):
            words = 'the same joints in another order: each column would drive another joint'
        else:
            absent, more = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
            words = '; '.join([f'without {", ".join(absent)}'] * bool(absent) + [f'with {", ".join(more)} instead'] * bool(more))
        differ(FAIL, 'E512', 'action.joints', f'joints {list(ours)}', f'{list(theirs)}: {words}',
               f'action.joints: [{", ".join(theirs)}] in {reference.name}')
    if abs(reference.step_period - other.step_period) > 1e-9:
        differ(FAIL, 'E510', 'policy_rate', f'step period {reference.step_period:g} s, {1 / reference.step_period:g} Hz',
               f'{other.step_period:g} s, {1 / other.step_period:g} Hz', f'policy_rate: {1 / other.step_period:g} in '
               f'{reference.name}')
    if abs(reference.offset - other.offset) > 1e-9:
        label = 'next_state' if other.offset else 'command'
        differ(WARN, 'E513', 'action.label', f'actions {reference.offset:g} s after their observation',
               f'{other.offset:g} s after, as of label {label}', f'action.label: {label} in {reference.name}')
    for name, (shape, entries) in other.features.items():
        place = f'observations.{name}'
        if name not in reference.features:
            differ(FAIL, 'E511', place, f'one of {", ".join(reference.features)}', name,
                   f'add {place} to {reference.name}, or give a feature its name')
            continue
        wanted, names = reference.features[name]
        if shape != wanted:
            key = 'image_size' if len(shape) == 3 else 'names'
            differ(FAIL, 'E511', place, f'shape {_shape(wanted)}', _shape(shape),
                   f'{place}.{key}: {f"[{shape[0]}, {shape[1]}]" if len(shape) == 3 else f"{shape[0]} of them"} in '
                   f'{reference.name}')
        elif names and entries and names != entries:
            words = 'the same in another order: ' if sorted(names) == sorted(entries) else ''
            differ(FAIL, 'E511', f'{place}.names', list(names), f'{words}{list(entries)}',
                   f'{place}.names: [{", ".join(entries)}] in {reference.name}')
    unused = [name for name in reference.features if name not in other.features]
    if unused:
        findings.append(Finding(NOTE, 'observations', f'{", ".join(unused)} of {reference.name} not in {other.name}'))
    if all(finding.level == NOTE for finding in findings):
        findings.append(Finding(PASS, 'observations and action', f'{", ".join(other.features)}; {len(theirs)} joints in the same '
                                f'order; {1 / other.step_period:g} Hz'))
    return findings


def differences(reference: Interface, other: Interface) -> list[str]:
    """Why they do not fit, in lines."""
    return [finding.words for finding in compare(reference, other) if finding.level == FAIL]


def _shape(shape: tuple[int, ...]) -> str:
    return '×'.join(map(str, shape))


def compare_contracts(reference: Contract, carried: Contract, names: tuple[str, str], redo: str,
                      recorded: bool = False) -> list[Finding]:
    """The rest in which the contract that something carries differs.

    A line a field for what changes the meaning of numbers (FAIL) or the demonstrations (WARN), one together for what does not
    matter to data. names: of reference and of the other; redo: the command that makes the other anew. recorded: it is a bag,
    whose content is judged by itself.
    """
    if reference.hash == carried.hash:
        return [Finding(PASS, 'contract', f'the same, hash {carried.hash}')]
    findings, harmless = [], []
    for path, (mine, theirs) in reference.differing(carried).items():
        level = FAIL if MISREAD.match(path) else WARN if BEHAVIOUR.match(path) else ''
        if level:
            findings.append(Finding(level, path, str(theirs), 'E509', f'{mine} ({names[0]})',
                                    f'{path}: {theirs} in {names[0]}, if that was right; else {redo}'))
        elif recorded or not MEANING.match(path):
            harmless.append(path)
    if harmless:
        more = f' and {len(harmless) - LISTED} more' if len(harmless) > LISTED else ''
        findings.append(Finding(NOTE, 'contract', f'{names[1]} carries {carried.hash}, not {reference.hash}; of no effect on the '
                                f'data: {", ".join(harmless[:LISTED])}{more}', 'E509'))
    return findings


Ranges = tuple[dict[str, float], dict[str, float]]
"""Entry → lowest, and highest value."""


def check_values(seen: Ranges, trained_on: Ranges, place: str, who: str, level: str, fix: str) -> list[Finding]:
    """Values against those a policy was trained on.

    Further off than these are wide apart, they have another scale, or lie where nothing was demonstrated.
    """
    far = []
    for name, least in trained_on[0].items():
        most = trained_on[1][name]
        if name in seen[0] and max(least - seen[0][name], seen[1][name] - most) > max(most - least, LEAST_RANGE):
            far.append(f'{name} {seen[0][name]:.3g} … {seen[1][name]:.3g} (trained on {least:.3g} … {most:.3g})')
    return [Finding(level, place, ', '.join(far), 'E515', f'values like those that {who} was trained on', fix)] if far else []


def ranges_of(dataset: Dataset, most: int = 200) -> dict[str, Ranges]:
    """Lowest and highest value of every entry of features and action. Raises DataError.

    Over all episodes or, of more, an even choice of `most`.
    """
    names = {**{name: dataset.info.features[name].names for name in dataset.info.lowdim}, 'action': dataset.info.action.names}
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), most)).astype(int)) if len(dataset) else []
    tables = [dataset.lowdim(i) for i in chosen]
    found = {}
    for name, entries in names.items():
        if tables:
            values = np.concatenate([table[name] for table in tables])
            entries = entries or tuple(map(str, range(values.shape[1])))
            found[name] = tuple(dict(zip(entries, extreme.astype(float).tolist())) for extreme in
                                (values.min(axis=0), values.max(axis=0)))
    return found
