"""Bags to a dataset: one bag, one episode.

First pass: low-dimensional samples, commands and the stamps of images, from which the rows are decided. Second pass:
the images of those rows, streamed straight into the episode's folder.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from il_policies.contract import Contract, Stream
from il_policies.data.align import (
    SECOND,
    StreamBuffer,
    Ticks,
    camera_ticks,
    grid_ticks,
    labels,
    next_state,
    observation_at,
    typical_period,
)
from il_policies.data.bag import bag_info, find_bags, read_bag, topic_types
from il_policies.data.decode import decode, decode_jpeg, stamp_of
from il_policies.data.errors import BagError, DataError
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, remove_episode, write_episode

MAX_REPEATED = 2
"""A stream may be silent for this many ticks, which repeat its last sample, flagged; longer gaps refuse the bag."""


@dataclass(frozen=True)
class Report:
    """What became of one bag."""

    bag: str
    """Path of the bag."""
    index: int | None
    """Index of its episode; None if it was refused."""
    kept: bool
    """True if the episode was there already."""
    refused: str
    """Why there is no episode; empty if there is one."""
    details: dict
    """Quality: rows, filled, success, per stream n, rate_hz, gaps, lost, max_age_s, out_of_order, …"""


def dataset_info(contract: Contract) -> DatasetInfo:
    """The description of a dataset recorded under a contract."""
    return DatasetInfo(
        fps=contract.policy_rate,
        features={name: Feature(stream.shape, 'image' if stream.is_image else 'lowdim',
                                () if stream.is_image else tuple(stream.names or stream.fields))
                  for name, stream in contract.observations.items()},
        action=ActionInfo(contract.action.joints, contract.action_offset),
        label=contract.action.label, contract=contract.to_dict(), contract_hash=contract.hash)


def convert(bags: str | Path | Sequence[str | Path], contract: Contract, out: str | Path,
            progress: Callable[[int, int, Report], None] | None = None) -> list[Report]:
    """Convert bags (a folder of them, or a list) to the dataset `out`, one episode each, numbered in the given order.

    An episode already made from the same bag under the same contract is kept; one of a bag that is not given any more
    is removed. A bag that cannot be used gives a report with `refused`, and no episode; bags labelled as failures are
    converted, with their label. progress is called with (bags done, bags in all, report) after each.
    Raises DataError if there is no bag, or `out` holds something else.
    """
    bags = find_bags(bags) if isinstance(bags, (str, Path)) else [Path(bag) for bag in bags]
    if not bags:
        raise BagError('no bags given')
    out = Path(out)
    create(out, dataset_info(contract))
    dataset = Dataset(out)
    present = {meta['index']: (meta, i) for i, meta in enumerate(dataset.episodes)}
    reports = []
    for index, bag in enumerate(bags):
        try:
            fingerprint = _fingerprint(bag)
            if index in present and present[index][0].get('fingerprint') == fingerprint:
                report = Report(str(bag), index, True, '', dataset.report(present[index][1]))
            else:
                report = Report(str(bag), index, False, '', _convert_bag(bag, contract, out, index, fingerprint))
        except DataError as error:
            report = Report(str(bag), None, False, str(error), {})
        reports.append(report)
        if progress:
            progress(len(reports), len(bags), report)
    for index in set(present) - {report.index for report in reports}:
        remove_episode(out, index)
    return reports


def summary_line(reports: Sequence[Report]) -> str:
    """The quality of a conversion in one line."""
    good = [report.details for report in reports if not report.refused]
    rows = sum(details['rows'] for details in good)
    parts = [f'{len(good)} episodes, {rows} rows']
    if rows:
        streams = [stream for details in good for stream in details['streams'].values()]
        share = 100 * sum(details['filled'] for details in good) / rows
        parts += [f'{share:.2g} % filled', f'{sum(stream["lost"] for stream in streams)} messages lost',
                  f'{sum(stream["gaps"] for stream in streams)} gaps',
                  f'oldest sample {1e3 * max(stream["max_age_s"] for stream in streams):.0f} ms',
                  f'{sum(details["success"] is not True for details in good)} not labelled a success']
    refused = len(reports) - len(good)
    return ', '.join(parts + [f'{refused} refused'])


def _fingerprint(bag: Path) -> list:
    """Tells one recording from another without reading it: its metadata and the sizes of its files."""
    information = bag_info(bag)
    try:
        sizes = [os.stat(bag / name).st_size for name in information['relative_file_paths']]
    except OSError as error:
        raise BagError(f'{bag}: {error.filename}: {error.strerror}') from None
    custom = information.get('custom_data') or {}
    return [bag.name, information['starting_time']['nanoseconds_since_epoch'], information['message_count'], *sizes,
            custom.get('task', ''), custom.get('success', '')]


def _convert_bag(bag: Path, contract: Contract, out: Path, index: int, fingerprint: list) -> dict:
    """Write the episode of one bag; returns its report. Raises DataError."""
    custom = bag_info(bag).get('custom_data') or {}
    action = contract.action
    command = Stream(topic=action.topic, type='sensor_msgs/msg/JointState', field='position', names=action.joints,
                     rate=contract.control_rate, max_age=action.max_age)
    streams = dict(contract.observations)
    if action.label != 'next_state':
        streams['action'] = command
    topic_of = _match_topics(bag, streams, json.loads(custom.get('topics', '{}')))

    recorded = {name: StreamBuffer(stream) for name, stream in streams.items()}
    arrivals: dict[str, list[int]] = {name: [] for name in streams}
    names_of: dict[str, list[str]] = {}
    for name, topic in topic_of.items():
        names_of.setdefault(topic, []).append(name)
    for topic, _, receive_ns, publish_ns, message in read_bag(bag, names_of):
        for name in names_of[topic]:
            try:
                stamp = stamp_of(message, streams[name], publish_ns, receive_ns)
                # Of an image only its place in the stream is kept; the second pass fetches those that are needed.
                sample = np.array(len(arrivals[name])) if streams[name].is_image else decode(message, streams[name])
            except DataError as error:
                raise DataError(f'{bag}: {error}') from None
            arrivals[name].append(stamp)
            recorded[name].add(stamp, sample)
    silent = [streams[name].topic for name in streams if not recorded[name].stamps]
    if silent:
        raise DataError(f'{bag}: no messages on {", ".join(silent)}')

    observed = {name: recorded[name] for name in contract.observations}
    first = max(buffer.stamps[0] for buffer in observed.values())
    last = max(buffer.stamps[-1] for buffer in observed.values())
    for buffer in observed.values():
        silence = (last - buffer.stamps[-1]) / SECOND
        if silence > MAX_REPEATED / contract.policy_rate + buffer.stream.max_age + 1 / buffer.stream.rate:
            raise DataError(f'{bag}: {buffer.stream.topic} falls silent for the last {silence:.2f} s')
    if contract.cameras:
        camera = recorded[contract.cameras[0]]
        frames = np.array([stamp for stamp in camera.stamps if first <= stamp <= last])
        ticks = camera_ticks(frames, contract.policy_rate, camera.stream.rate)
    else:
        ticks = grid_ticks(first, last, contract.policy_rate)

    if action.label == 'next_state':
        command_place = np.zeros(len(ticks.stamps), np.int64)
    else:
        stamps = np.array(recorded['action'].stamps)
        command_place, command_age = labels(ticks.stamps, action.label, stamps, contract.policy_rate, action.max_age)
    rows, filled, oldest = _rows(bag, observed, ticks, command_place, contract)
    lowdim = {name: np.stack([row[name] for row in rows['data']]) for name in observed if not streams[name].is_image}
    frames = {name: [int(row[name]) for row in rows['data']] for name in contract.cameras}
    stamps = ticks.stamps[rows['ticks']]
    if action.label == 'next_state':
        columns = [contract.observations[contract.joint_state].names.index(joint) for joint in action.joints]
        actions = next_state(lowdim[contract.joint_state][:, columns])
        stamps, filled = stamps[:-1], filled[:-1]
        lowdim = {name: values[:-1] for name, values in lowdim.items()}
        frames = {name: places[:-1] for name, places in frames.items()}
    else:
        actions = np.stack(recorded['action'].samples)[rows['command']]
        oldest['action'] = float(np.max(command_age[command_place >= 0]))
    if len(stamps) < 2:
        raise DataError(f'{bag}: {len(stamps)} usable rows')

    success = {'true': True, 'false': False}.get(custom.get('success'))
    report = {
        'rows': len(stamps), 'filled': int(filled.sum()), 'filled_share': float(filled.mean()), 'success': success,
        'interrupted': custom.get('interrupted') == 'true', 'duration_s': (int(stamps[-1]) - int(stamps[0])) / SECOND,
        'head_s': max(0.0, (int(stamps[0]) - first) / SECOND), 'warnings': list(ticks.warnings),
        'contract_differs': custom.get('contract_hash') not in (None, contract.hash),
        'streams': {name: {**_rate_report(arrivals[name], stream.rate), 'max_age_s': oldest.get(name, 0.0)}
                    for name, stream in streams.items()}}
    write_episode(out, index, lowdim, actions, stamps, filled,
                  {name: _jpegs(bag, topic_of[name], streams[name], places) for name, places in frames.items()},
                  {'task': custom.get('task', ''), 'success': success, 'source': bag.name, 'fingerprint': fingerprint},
                  report)
    return report


def _rows(bag: Path, observed: dict[str, StreamBuffer], ticks: Ticks, command_place: np.ndarray,
          contract: Contract) -> tuple[dict, np.ndarray, dict[str, float]]:
    """The rows of the episode: ticks from the first to the last at which everything is known.

    In between, what is missing is repeated for up to MAX_REPEATED ticks in a row and the rows are flagged.
    Returns ({'ticks': (T,), 'command': (T,), 'data': T rows}, flags (T,), oldest sample of each feature [s]).
    """
    found = [observation_at(observed, int(t)) for t in ticks.stamps]
    missing = [dict(observation.problems) for observation in found]
    for k in range(len(found)):
        if command_place[k] < 0:
            missing[k]['action'] = f'{contract.action.topic}: no command within {contract.action.max_age:g} s'
        if ticks.gap[k]:
            for name in contract.cameras[:1]:
                missing[k].setdefault(name, f'{contract.observations[name].topic}: no frame')
    whole = [k for k, problems in enumerate(missing) if not problems]
    if not whole:
        problems = '; '.join(sorted({text for problems in missing for text in problems.values()})[:3])
        raise DataError(f'{bag}: no tick at which everything is known: {problems or "no ticks"}')
    kept = range(whole[0], whole[-1] + 1)
    previous: dict[str, np.ndarray] = {}
    repeated: dict[str, int] = {}
    data, commands, filled = [], [], []
    oldest = dict.fromkeys(observed, 0.0)
    for k in kept:
        for name, problem in missing[k].items():
            repeated[name] = repeated.get(name, 0) + 1
            if repeated[name] > MAX_REPEATED:
                since = (int(ticks.stamps[k - MAX_REPEATED]) - int(ticks.stamps[kept[0]])) / SECOND
                raise DataError(f'{bag}: gap of more than {MAX_REPEATED} ticks at {since:.2f} s: {problem}')
        repeated = {name: repeated[name] for name in missing[k]}
        for name in observed:
            if name not in missing[k]:
                previous[name] = found[k].data[name][0]
                oldest[name] = max(oldest[name], found[k].ages[name])
        data.append(dict(previous))
        commands.append(command_place[k] if 'action' not in missing[k] else commands[-1])
        filled.append(bool(missing[k]))
    return {'ticks': np.array(kept), 'command': np.array(commands), 'data': data}, np.array(filled), oldest


def _match_topics(bag: Path, streams: dict[str, Stream], recorded_as: dict[str, str]) -> dict[str, str]:
    """Stream name → topic in the bag: as the recorder noted it, else the only topic that ends with the contract's."""
    types = topic_types(bag)
    topics = {}
    for name, stream in streams.items():
        wanted = '/' + stream.topic.strip('/')
        found = [recorded_as[stream.topic]] if stream.topic in recorded_as else [t for t in types if t == wanted]
        found = found or [topic for topic in types if topic.endswith(wanted)]
        if len(found) != 1 or found[0] not in types:
            raise DataError(f'{bag}: {len(found) or "no"} topics for {stream.topic}; '
                            f'there are: {", ".join(sorted(types))}')
        if types[found[0]] != stream.type:
            raise DataError(f'{bag}: {found[0]} is {types[found[0]]}, the contract says {stream.type}')
        topics[name] = found[0]
    return topics


def _jpegs(bag: Path, topic: str, stream: Stream, places: Sequence[int]) -> Iterator[bytes]:
    """The images at the given places of a topic, in the order of `places`, which may repeat and need not quite rise."""
    messages = enumerate(read_bag(bag, [topic]))
    last_use = {place: row for row, place in enumerate(places)}
    ahead: dict[int, bytes] = {}  # read before its turn, because stamps and arrivals differ in order
    for row, place in enumerate(places):
        while place not in ahead:
            i, (*_, message) = next(messages)
            if i in last_use:
                try:
                    ahead[i] = decode_jpeg(message, stream)
                except DataError as error:
                    raise DataError(f'{bag}: {error}') from None
        yield ahead[place] if last_use[place] > row else ahead.pop(place)


def _rate_report(stamps: Sequence[int], rate: float) -> dict:
    """One stream as it arrived: rates, steps, gaps (> 1.5 periods), an estimate of what was lost, disorder."""
    report = {'n': len(stamps), 'declared_hz': rate, 'rate_hz': 0.0, 'dt_median_s': 0.0, 'dt_max_s': 0.0, 'gaps': 0,
              'lost': 0, 'out_of_order': int(np.sum(np.diff(stamps) <= 0))}
    distinct = np.unique(stamps)
    if len(distinct) > 1:
        steps, period = np.diff(distinct) / SECOND, typical_period(distinct) / SECOND
        report |= {'rate_hz': 1 / period, 'dt_median_s': float(np.median(steps)), 'dt_max_s': float(steps.max()),
                   'gaps': int(np.sum(steps > 1.5 * period)),
                   'lost': int(np.sum(np.maximum(np.round(steps / period) - 1, 0)))}
    return report
