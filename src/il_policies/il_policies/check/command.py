"""Opens what is to be compared, each thing told by its content, and judges it all."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from il_policies.bags.reader import Bag, find_bags
from il_policies.check import agreement, robot, streams
from il_policies.check.facts import Graph, Measured, Observed
from il_policies.check.findings import FAIL, NOTE, PASS, WARN, Finding, Report, Section, merged, section
from il_policies.contract import Contract, ContractError, from_dict, load_contract
from il_policies.data.errors import DataError
from il_policies.data.recording import match_topics, streams_of
from il_policies.data.store import Dataset
from il_policies.probe import ask

LOOKED_AT_S = 10.0
"""Of each bag so much is looked at, from its beginning [s]."""
MOST_BAGS = 30
"""Of more bags, so many are looked at, evenly chosen."""


class CheckError(ValueError):
    """A check that cannot begin; the message says why and what helps."""


@dataclass
class _Opened:
    """What was given, by kind: name → what it is."""

    contracts: dict[str, Contract] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    policies: dict[str, object] = field(default_factory=dict)
    bags: dict[str, Bag] = field(default_factory=dict)
    left_out: int = 0
    """Bags that are not looked at."""
    refused: list[tuple[str, Exception]] = field(default_factory=list)
    """Names of what cannot be opened, with the error."""


def check(things: Sequence[Path], listen: Callable[[Contract], Graph] | None = None,
          progress: Callable[[float], None] = lambda share: None) -> Report:
    """Compare contracts (YAML files), datasets, checkpoints, bags or folders of bags, and with `listen` what runs now.

    The reference is the contract given, else the one that a dataset, a checkpoint or a bag carries, else a dataset. Raises
    CheckError, or the error of what cannot be opened, if there is nothing to compare.
    """
    opened = _open(things)
    if not (opened.contracts or opened.datasets or opened.policies or opened.bags):
        raise opened.refused[0][1] if opened.refused else CheckError(
            'nothing to compare: give a contract (config/robots/<robot>.yaml), bags, a dataset, a checkpoint, --live')
    if len(opened.contracts) > 1:
        raise CheckError(f'{len(opened.contracts)} contracts: {", ".join(opened.contracts)}; compare things with one at a time')
    name, contract = _reference(opened)
    if contract is None and not (opened.datasets and opened.policies and listen is None and not opened.bags):
        raise CheckError(f'none of {", ".join(map(str, things))} carries a contract; give one: --contract '
                         'config/robots/<robot>.yaml')
    sections = [section(path, [Finding(FAIL, 'cannot be opened', getattr(error, 'message', str(error)),
                                       getattr(error, 'code', ''))]) for path, error in opened.refused]
    if contract is not None:
        reference = agreement.of_contract(name, contract)
        sections.append(section(f'contract {name}: {contract.robot}, hash {contract.hash}',
                                robot.check_contract(contract) + robot.check_description(contract)))
    else:
        name = next(iter(opened.datasets))
        reference = agreement.of_dataset(name, opened.datasets[name].info)
    ranges = {path: agreement.ranges_of(dataset) for path, dataset in opened.datasets.items()}
    for path, dataset in opened.datasets.items():
        sections.append(_dataset(path, dataset, ranges[path], reference, contract))
    recorded: dict[str, Measured] = {}
    if opened.bags:
        part, recorded = _bags(opened, name, contract, progress)
        sections.append(part)
    graph = listen(contract) if listen else None
    for path, policy in opened.policies.items():
        sections.append(_checkpoint(path, policy, opened.datasets, ranges, reference, contract,
                                    {'live': graph.streams} if graph else {'recorded': recorded} if recorded else {}))
    if graph is not None:
        findings = streams.check_graph(contract, graph) + streams.check_streams(contract, graph.streams, graph.sim_time)
        if recorded:
            findings += streams.compare_streams(contract, recorded, graph.streams)
        sections.append(section(f'live, {graph.seconds:g} s in {graph.namespace}', findings))
    return Report(tuple(sections))


def _open(things: Sequence[Path]) -> _Opened:
    """Raises CheckError or ContractError for a path that is not there or a contract that cannot be used."""
    opened = _Opened()
    for path in things:
        name = str(path)
        try:
            if not path.exists():
                raise CheckError(f'{path}: no such file or folder')
            if path.suffix in ('.yaml', '.yml'):
                opened.contracts[name] = load_contract(path)
            elif (path / 'dataset.json').exists():
                opened.datasets[name] = Dataset(path)
            elif (path / 'policy.json').exists():
                from il_policies import checkpoint  # torch, which takes seconds
                try:
                    opened.policies[name] = checkpoint.load(path)
                except checkpoint.CheckpointError as error:
                    opened.refused.append((name, error))
            else:
                found = find_bags(path)
                chosen = np.unique(np.linspace(0, len(found) - 1, min(len(found), MOST_BAGS)).astype(int))
                opened.left_out += len(found) - len(chosen)
                for bag in (found[i] for i in chosen):
                    try:
                        opened.bags[str(bag)] = Bag(bag)
                    except DataError as error:
                        opened.refused.append((str(bag), error))
        except DataError as error:
            opened.refused.append((name, error))
    return opened


def _reference(opened: _Opened) -> tuple[str, Contract | None]:
    """The contract that all are compared with, and the name of what has it."""
    for name, contract in opened.contracts.items():
        return name, contract
    carrying = {**{path: dataset.info.contract for path, dataset in opened.datasets.items()},
                **{path: policy.extra.get('contract') for path, policy in opened.policies.items()},
                **{path: bag.contract for path, bag in opened.bags.items()}}
    for name, carried in carrying.items():
        if carried:
            return name, from_dict(Contract, carried, f'contract in {name}')
    return '', None


def _dataset(path: str, dataset: Dataset, ranges: dict, reference: agreement.Interface, contract: Contract | None) -> Section:
    info = dataset.info
    findings = []
    if reference.name != path:
        mine = agreement.of_dataset(path, info)
        findings += agreement.compare(reference, mine)
        findings += _carried(path, info.contract, reference.name, contract, mine.redo.replace('CONTRACT', reference.name))
    findings += _in_limits(ranges, contract)
    verdicts = [dataset.report(i).get('verdict') for i in range(len(dataset))]
    if verdicts.count(FAIL):
        findings.append(Finding(NOTE, 'quality', f'{verdicts.count(FAIL)} of {len(dataset)} episodes are FAIL', '', '',
                                f'il inspect {path}'))
    if not len(dataset):
        findings.append(Finding(FAIL, 'episodes', 'none', 'E302', 'at least one', f'il convert BAGS --out {path}'))
    return section(f'dataset {path}: {len(dataset)} episodes at {info.fps:g} Hz, hash {dataset.hash}', findings)


def _carried(path: str, carried: dict | None, name: str, contract: Contract | None, redo: str,
             recorded: bool = False) -> list[Finding]:
    """The contract that a thing at `path` carries, against the one that `name` has."""
    if contract is None or not carried:
        return [Finding(NOTE, 'contract', 'it carries none: names and units of what it observes are unknown')]
    try:
        theirs = from_dict(Contract, carried, f'contract in {path}')
    except ContractError as error:
        return [Finding(WARN, 'contract', str(error), 'E509', 'a contract that this version reads', redo)]
    return agreement.compare_contracts(contract, theirs, (name, path), redo, recorded)


def _in_limits(ranges: dict[str, agreement.Ranges], contract: Contract | None) -> list[Finding]:
    """The ranges of action and measured joints against the contract's limits."""
    findings, looked_at = [], [name for name in ('action', contract.joint_state) if name in ranges] if contract else []
    for name in looked_at:
        findings += streams.check_units(name, *ranges[name], contract.joints)
    if looked_at and not findings:
        findings.append(Finding(PASS, ', '.join(looked_at), 'values within the limits'))
    return findings


def _checkpoint(path: str, policy, datasets: dict[str, Dataset], ranges: dict[str, dict], reference: agreement.Interface,
                contract: Contract | None, seen: dict[str, dict[str, Measured]]) -> Section:
    spec, extra = policy.spec, policy.extra
    mine = agreement.of_policy(path, policy)
    findings = []
    if reference.name != path:
        findings += agreement.compare(reference, mine)
        findings += _carried(path, extra.get('contract'), reference.name, contract, mine.redo)
    entries = {name: mine.features[name][1] or tuple(map(str, range(mine.features[name][0][0]))) for name in spec.lowdim}
    trained_on = {name: tuple(dict(zip(names, policy.normalizer.statistics[name][end])) for end in ('min', 'max'))
                  for name, names in {**entries, 'action': mine.joints}.items()}
    findings += _in_limits(trained_on, contract)
    for name, dataset in datasets.items():
        retrain = mine.redo.replace('DATASET', name)
        if extra.get('dataset_hash') == dataset.hash:
            findings.append(Finding(PASS, 'dataset', f'trained on exactly {name}, hash {dataset.hash}'))
            continue
        findings.append(Finding(WARN, 'dataset', f'trained on {extra.get("dataset_hash") or "unknown data"}', 'E514',
                                f'{dataset.hash} ({name})', retrain))
        for feature in trained_on.keys() & ranges[name].keys():
            findings += agreement.check_values(ranges[name][feature], trained_on[feature], f'{feature} in {name}', path, FAIL,
                                               f'{retrain}; if a unit changed, convert all bags again first')
    for where, measured in seen.items():
        off = []
        compared = [name for name in trained_on if name in measured and measured[name].low]
        for name in compared:
            off += agreement.check_values((measured[name].low, measured[name].high), trained_on[name], f'{name}, {where}', path,
                                          WARN, 'begin where the demonstrations did, demonstrate from here too, or correct the '
                                          'unit')
        findings += off
        if compared and not off:
            findings.append(Finding(PASS, ', '.join(compared), f'{where} values are like those it was trained on'))
    kind = f'{policy.kind}, {len(mine.joints)} joints, {spec.horizon} steps of {spec.step_period:g} s'
    return section(f'checkpoint {path}: {kind}, hash {policy.hash}', findings)


# --- bags -------------------------------------------------------------------------------------------------------------

def _bags(opened: _Opened, name: str, contract: Contract,
          progress: Callable[[float], None]) -> tuple[Section, dict[str, Measured]]:
    """All bags, and the streams of the first whose streams are all there."""
    findings: dict[str, list[Finding]] = {}
    first: dict[str, Measured] = {}
    paths = list(opened.bags)
    where = paths[0] if len(paths) == 1 else os.path.commonpath([Path(path).absolute() for path in paths])
    for done, (path, bag) in enumerate(opened.bags.items(), start=1):
        measured, found = observe_bag(bag, contract)
        found += streams.check_streams(contract, measured)
        if bag.contract and path != name:
            found += _carried(bag.name, bag.contract, name, contract, f'il convert {path} --contract {name}', recorded=True)
        findings[os.path.relpath(path, where)] = found
        first = first or (measured if all(part.n for part in measured.values()) else {})
        progress(done / len(paths))
    found = [*merged(findings), Finding(NOTE, 'quality', 'is each episode any good? il inspect tells', fix=f'il inspect {where}')]
    rest = f', {opened.left_out} more not looked at' if opened.left_out else ''
    kind, each = (f'{len(paths)} bags', ' of each') if len(paths) > 1 else ('bag', '')
    return section(f'{kind} {where}: the first {LOOKED_AT_S:g} s{each}{rest}', found), first


def observe_bag(bag: Bag, contract: Contract) -> tuple[dict[str, Measured], list[Finding]]:
    """What the streams of a contract are like at the beginning of a bag, by name, and which of them are not there."""
    declared, findings = streams_of(contract), []
    try:
        topics = match_topics(bag, contract, declared)
    except DataError as error:
        topics = {}
        for name, stream in declared.items():
            ending = '/' + stream.topic.strip('/')
            found = [topic for topic in bag.topics if topic.endswith(ending)]
            fits = [topic for topic in found if bag.topics[topic] == stream.type]
            key = f'observations.{name}' if name != 'action' else 'action'
            alike = [topic for topic, kind in bag.topics.items() if kind == stream.type and topic not in found]
            if len(fits) == 1:
                topics[name] = fits[0]
            elif found and not fits:
                kind = bag.topics[found[0]]
                findings.append(Finding(FAIL, f'{name} ({found[0]})', kind, error.code, stream.type,
                                        f'{key}.type: {kind}' if stream.is_image else f'{key}.topic: a topic of this type'))
            elif not found and (name != 'action' or contract.action.label != 'next_state'):
                findings.append(Finding(FAIL, f'{name} ({ending})', 'not in the bag', error.code, stream.type,
                                        f'{key}.topic: {" or ".join(alike)}' if alike else 'record it: it cannot be made up for; '
                                        'or take it out of the contract'))
        if not findings:
            findings.append(Finding(FAIL, 'topics', error.message.removeprefix(f'{bag.path}: '), error.code))
    observed = {name: Observed(declared[name], topic) for name, topic in topics.items()}
    begin = None
    try:
        for raw in bag.raw(list(dict.fromkeys(topics.values()))) if topics else ():
            begin = raw.receive_ns if begin is None else begin
            if raw.receive_ns - begin > LOOKED_AT_S * 1e9:
                break
            message = bag.deserialize(raw.topic, raw.data)
            for name, topic in topics.items():
                if topic == raw.topic:
                    observed[name].add(message, raw.receive_ns, raw.publish_ns)
    except DataError as error:
        findings.append(Finding(FAIL, 'messages', error.message.removeprefix(f'{bag.path}: '), error.code))
    measured = {name: part.measured() for name, part in observed.items()}
    for name, part in measured.items():
        if not part.n and (name != 'action' or contract.action.label != 'next_state'):
            findings.append(Finding(FAIL, f'{name} ({part.topic})', 'no message', 'E209' if name == 'action' else 'E202',
                                    f'{declared[name].rate:g} Hz', 'start its driver before recording' if name != 'action' else
                                    'record commands, or action.label: next_state'))
    return measured, findings


# --- live -------------------------------------------------------------------------------------------------------------

def listen(contract: Contract, seconds: float, namespace: str) -> Graph:
    """What runs now, as il_runtime's probe_node sees it from a namespace in so many seconds. Raises ProbeError."""
    with tempfile.NamedTemporaryFile('w', prefix='il_check_', suffix='.yaml') as file:
        yaml.safe_dump(contract.to_dict(), file)
        file.flush()
        seen = ask('probe_node', {'contract': file.name, 'seconds': float(seconds)}, seconds, namespace)
    return from_dict(Graph, seen, 'probe_node')
