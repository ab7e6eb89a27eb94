"""What is in a bag or a dataset, and is it any good: gathered here, shown in the terminal here, as a page in `inspect_page`."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from il_policies.bags.reader import Bag
from il_policies.contract import Contract, ContractError, from_dict
from il_policies.data import quality
from il_policies.data.align import SECOND, Rows, align_recording
from il_policies.data.convert import WORK_PER_PROCESS
from il_policies.data.convert_bag import Options
from il_policies.data.decode import decode
from il_policies.data.errors import BagError, DataError
from il_policies.data.quality import FAIL, PASS, VERDICTS, WARN, duration
from il_policies.data.recording import Recording, read_recording
from il_policies.data.store import Dataset
from il_policies.parallel import WorkerDied, run

THUMBNAIL = 160
"""Height of the images that are shown [px]."""
COLOURS = {PASS: 'green', WARN: 'yellow', FAIL: 'bold red'}


@dataclass(frozen=True)
class Axis:
    """One joint, or one entry, of the action."""

    name: str
    """Name of the joint."""
    unit: str = ''
    """rad, m, or nothing if unknown."""
    limits: tuple[float, float] | None = None
    """Of its position, from the contract."""


@dataclass(frozen=True)
class Episode:
    """One episode as it is shown."""

    name: str
    """Of the bag or, in a dataset, its index and what it was made from."""
    task: str
    """What was done, in words."""
    report: dict
    """What `quality` says."""
    axes: tuple[Axis, ...] = ()
    """The A entries of the action."""
    times: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(T,) of the rows, as the times in the report [s]."""
    filled: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """(T,) bool."""
    action: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """(T, A)."""
    state: np.ndarray | None = None
    """(T, A), what was measured of the same joints; None if it is not known."""
    frames: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """Camera → first and last image as JPEG files."""

    @property
    def verdict(self) -> str:
        """PASS, WARN or FAIL."""
        return self.report['verdict']

    @property
    def worst(self) -> dict[str, float | None]:
        """The figures by which episodes compare, of the worst of their streams; None where nothing was measured."""
        streams, episode = self.report['streams'].values(), self.report['episode']

        def of(key: str, only: str = 'n') -> float | None:
            """Of the streams that have the key, the largest; 0 for those of which `only` is zero."""
            return max((abs(stream[key]) if stream[only] else 0.0 for stream in streams if stream.get(key) is not None),
                       default=None)

        rows = bool(self.report['rows'])
        return {'length': self.report['duration_s'] if rows else None, 'filled': self.report['filled_share'] if rows else None,
                'lost': of('lost_share'), 'gap': of('dt_max_s', only='gaps'), 'frozen': of('frozen_s'),
                'latency': of('latency_p95_s'), 'clock': of('latency_change_s'), 'skew': episode.get('skew_p95_s'),
                'lag': episode.get('lag_s'), 'head': episode.get('static_head_s'), 'tail': episode.get('static_tail_s'),
                'pause': episode.get('longest_pause_s')}


@dataclass(frozen=True)
class Inspection:
    """Bags or a dataset, looked at."""

    name: str
    """What was given."""
    robot: str
    """Name of the robot; '' if unknown."""
    contract_hash: str
    """Hash of its contract; '' if there is none."""
    fps: float | None
    """Rows per second [Hz]; None if no bag could be read."""
    episodes: list[Episode]
    """At least one."""

    def count(self, verdict: str) -> int:
        """How many episodes have this verdict."""
        return sum(episode.verdict == verdict for episode in self.episodes)

    def to_dict(self) -> dict:
        """All reports, in JSON types."""
        return {'name': self.name, 'robot': self.robot, 'contract_hash': self.contract_hash, 'fps': self.fps,
                **{verdict: self.count(verdict) for verdict in VERDICTS},
                'episodes': [{'name': episode.name, 'task': episode.task, **episode.report} for episode in self.episodes]}


# --- datasets ---------------------------------------------------------------------------------------------------------

def inspect_dataset(dataset: Dataset, progress: Callable[[float], None] = lambda share: None) -> Inspection:
    """Every episode of a dataset, by the reports it was made with; imported episodes without one are judged by their rows.

    An episode that is damaged is a FAIL. progress is called with the share that is done. Raises DataError if the dataset
    cannot be opened or there is no episode, ContractError if its contract is not valid.
    """
    if not len(dataset):
        raise DataError(f'{dataset.path}: no episodes to look at', 'E302')
    contract = from_dict(Contract, dataset.info.contract, str(dataset.path)) if dataset.info.contract else None
    axes = _axes(contract) if contract else tuple(Axis(name) for name in dataset.info.action.names)
    episodes = []
    for i, meta in enumerate(dataset.episodes):
        name = f'{meta["index"]} {meta["source"]}'.strip()
        try:
            dataset.verify(i)
            lowdim, report = dataset.lowdim(i), dataset.report(i)
            if 'verdict' not in report:
                report = report | quality.assess_rows(dataset.info, lowdim)
            frames = {camera: tuple(_thumbnail(dataset.image(i, camera, t)) for t in (0, len(lowdim['stamp']) - 1))
                      for camera in dataset.info.images}
            episodes.append(Episode(
                name, meta['task'], {'success': meta['success'], **report}, axes,
                (lowdim['stamp'] - report['first_ns']) / SECOND, lowdim['filled'], lowdim['action'],
                quality.state_of(dataset.info, lowdim), frames))
        except DataError as error:
            refused = quality.refusal(_without(dataset.folders[i], error))
            episodes.append(Episode(name, meta['task'], {'success': meta['success'], **refused}))
        progress((i + 1) / len(dataset))
    return Inspection(dataset.path.resolve().name, contract.robot if contract else '', dataset.info.contract_hash or '',
                      dataset.info.fps, episodes)


# --- bags -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Job:
    """One bag to look at."""

    path: Path
    contract: Contract | None
    options: Options


@dataclass(frozen=True)
class _Seen:
    """What was found in a bag: its episodes, or one that says why there are none, and then the error."""

    episodes: list[Episode]
    contract: Contract | None = None
    error: DataError | ContractError | None = None


def inspect_bags(bags: Sequence[Path], contract: Contract | None, options: Options, jobs: int = 0,
                 progress: Callable[[float], None] = lambda share: None) -> Inspection:
    """Every episode of bags, judged as the converter would with these options; one that it would refuse is a FAIL.

    contract: None takes the one inside each bag. jobs: how many bags at a time, each by a process of its own (0: one per
    core, fewer for little work). progress is called with the share that is done. Raises DataError or ContractError if not
    a single bag can be read.
    """
    size = sum(file.stat().st_size for bag in bags for file in ([bag] if bag.is_file() else bag.iterdir()) if file.is_file())
    processes = min(len(bags), jobs or min(len(os.sched_getaffinity(0)), size // WORK_PER_PROCESS + 1))
    seen: list[_Seen | None] = [None] * len(bags)
    for done, (place, result) in enumerate(run(_look_at_bag, [_Job(bag, contract, options) for bag in bags], processes,
                                               lambda place, share: None), start=1):
        if isinstance(result, WorkerDied):
            result = _unusable(bags[place], BagError(f'{bags[place]}: {result}; was memory short? rerun, with fewer jobs'))
        seen[place] = result
        progress(done / len(bags))
    used = next((result.contract for result in seen if result.contract), None)
    if used is None:
        raise seen[0].error
    name = bags[0].name if len(bags) == 1 else Path(os.path.commonpath([bag.resolve() for bag in bags])).name
    episodes = [episode for result in seen for episode in result.episodes]
    return Inspection(name, used.robot, used.hash, used.policy_rate, episodes)


def _unusable(path: Path, error: DataError | ContractError) -> _Seen:
    return _Seen([Episode(path.name, '', quality.refusal(_without(path, error)))], error=error)


def _without(path: Path, error: DataError | ContractError) -> str:
    """An error in words, without the name of the bag, beside which it will stand."""
    return ' '.join(str(error).split()).replace(f'{path}: ', '', 1).replace(f'{path}/', '', 1)


def _look_at_bag(job: _Job, tell: Callable[[float], None]) -> _Seen:
    options, contract = job.options, job.contract
    try:
        bag = Bag(job.path, options.msg_path, options.salvage)
        if contract is None:
            if bag.contract is None:
                raise DataError(f'{job.path}: no contract inside; give one with --contract', 'E212')
            contract = from_dict(Contract, bag.contract, f'{job.path}: contract')
        recording = read_recording(bag, contract, options.markers)
    except (DataError, ContractError) as error:
        return _unusable(job.path, error)
    parts: list[tuple[str, Rows | None, dict]] = []
    for span in recording.spans:
        try:
            cut = align_recording(recording, span, options.gaps)
            parts += [(rows.task, rows, quality.assess(recording, rows)) for rows in cut]
        except DataError as error:
            parts.append((span.task, None, quality.assess(recording, None, _without(job.path, error))))
    images = _images(recording, [rows for _, rows, _ in parts if rows])
    episodes = []
    for i, (task, rows, report) in enumerate(parts):
        name = bag.name if len(parts) == 1 else f'{bag.name} #{i}'
        if rows is None:
            episodes.append(Episode(name, task, report))
            continue
        names = contract.observations[contract.joint_state].names
        state = rows.lowdim[contract.joint_state][:, [names.index(joint) for joint in contract.action.joints]]
        frames = {camera: tuple(images[camera][places[edge]] for edge in (0, -1)) for camera, places in rows.frames.items()
                  if all(places[edge] in images[camera] for edge in (0, -1))}
        episodes.append(Episode(name, task, report, _axes(contract), (rows.stamps - report['first_ns']) / SECOND, rows.filled,
                                rows.action, state, frames))
    return _Seen(episodes, contract)


def _images(recording: Recording, cut: list[Rows]) -> dict[str, dict[int, bytes]]:
    """Camera → place in its stream → thumbnail, of the first and last row of each episode; without those not decodable."""
    wanted = {name: {int(rows.frames[name][edge]) for rows in cut for edge in (0, -1)} for name in recording.contract.cameras}
    names: dict[str, list[str]] = {}
    for name in recording.contract.cameras:
        names.setdefault(recording.streams[name].topic, []).append(name)
    found: dict[str, dict[int, bytes]] = {name: {} for name in wanted}
    if not any(wanted.values()):
        return found
    seen = dict.fromkeys(names, 0)
    for raw in recording.bag.raw(list(names)):
        place = seen[raw.topic]
        seen[raw.topic] += 1
        for name in names[raw.topic]:
            if place in wanted[name]:
                message = recording.bag.deserialize(raw.topic, raw.data)
                try:
                    found[name][place] = _thumbnail(decode(message, recording.streams[name].stream))
                except DataError:
                    pass  # the report counts it
    return found


def _axes(contract: Contract) -> tuple[Axis, ...]:
    return tuple(Axis(joint.name, joint.unit, joint.position) for joint in contract.action_joints)


def _thumbnail(image: np.ndarray) -> bytes:
    """JPEG file of (h, w, 3) uint8 RGB, or of depth (h, w, 1) uint16 [mm], the nearer the brighter."""
    if image.dtype == np.uint16:
        known = image[image > 0]
        near, far = np.percentile(known, (2, 98)) if known.size else (0, 1)
        grey = np.clip((far - image) / max(far - near, 1) * 200 + 55, 55, 255) * (image > 0)
        image = np.repeat(grey.astype(np.uint8), 3, axis=2)
    height, width = image.shape[:2]
    if height > THUMBNAIL:
        image = cv2.resize(image, (max(1, round(width * THUMBNAIL / height)), THUMBNAIL), interpolation=cv2.INTER_AREA)
    return cv2.imencode('.jpg', image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


# --- in the terminal --------------------------------------------------------------------------------------------------

def show(inspection: Inspection, console: Console) -> None:
    """Print a table of the episodes, the streams of up to three, and the reasons for what is not a PASS."""
    space = 2 if console.width >= 100 else 1
    console.print(_episodes(inspection.episodes, space))
    if len(inspection.episodes) <= 3:
        for episode in inspection.episodes:
            if episode.report['streams']:
                console.print(_streams(episode, space, titled=len(inspection.episodes) > 1))
    for episode in inspection.episodes:
        if episode.report['reasons']:
            reasons = [_reason(reason) for reason in episode.report['reasons']]
            console.print(Group(Text(episode.name, 'bold'), *(Padding(reason, (0, 0, 0, 2)) for reason in reasons)))
    console.print(_summary(inspection))


def _summary(inspection: Inspection) -> Text:
    episodes = inspection.episodes
    seconds = sum(episode.report['duration_s'] for episode in episodes)
    parts = [f'{len(episodes)} episode{"s" * (len(episodes) > 1)}', long_duration(seconds)]
    parts += [f'{sum(episode.report["rows"] for episode in episodes)} rows at {inspection.fps:g} Hz']
    parts += [f'robot {inspection.robot}, contract {inspection.contract_hash}'] if inspection.robot else []
    counts = [Text(f'{inspection.count(verdict)} {verdict}', COLOURS[verdict] if inspection.count(verdict) else 'dim')
              for verdict in VERDICTS]
    return Text(f'\n{inspection.name}: ', 'bold') + Text(', ').join([*(Text(part, 'not bold') for part in parts), *counts])


def _reason(reason: str) -> Text:
    level, _, words = reason.partition(' ')
    return Text.assemble((level, COLOURS[level]), ' ', words)


def _table(columns: Sequence[str], rows: Iterator[Sequence[str | Text]], space: int) -> Table:
    """A table with `space` between its columns, whose first one gives way where there is little room."""
    table = Table(box=None, pad_edge=False, header_style='dim', padding=(0, space, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify='right' if i else 'left', no_wrap=i > 0, overflow='fold')
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def _episodes(episodes: Sequence[Episode], space: int) -> Table:
    worst = [episode.worst for episode in episodes]
    # Figures that say nothing here are left out.
    shown = [(key, text) for key, text in (('filled', percent), ('lost', percent), ('gap', interval), ('frozen', interval),
                                           ('skew', interval), ('lag', interval))
             if any(figure[key] for figure in worst) or key in ('filled', 'lost')]

    def rows() -> Iterator[Sequence[str | Text]]:
        for episode, figure in zip(episodes, worst):
            name = Text.assemble((f'{episode.verdict} ', COLOURS[episode.verdict]), episode.name)
            rest = '–' if figure['head'] is None else f'{interval(figure["head"])} + {interval(figure["tail"])}'
            yield [name, interval(figure['length']), *(text(figure[key]) for key, text in shown), rest]

    return _table(['episode', 'length', *(key for key, _ in shown), 'still'], rows(), space)


def _streams(episode: Episode, space: int, titled: bool) -> Group:
    def rows() -> Iterator[Sequence[str | Text]]:
        for name, _, *cells in stream_cells(episode.report):
            yield [Text(name, 'bold'), *cells]

    table = _table(['stream', *(title for title, _ in STREAM_COLUMNS)], rows(), space)
    return Group('', *([Text(episode.name, 'bold')] if titled else []), table)


STREAM_COLUMNS = (
    ('n', 'messages during the episode'),
    ('Hz', 'rate, measured of declared'),
    ('jitter', '95 % of the steps differ by less from the period'),
    ('lost', 'estimate of messages that are missing'),
    ('max dt', 'longest step from one message to the next'),
    ('latency', 'from stamp to arrival, median and 95 %'),
    ('drift', 'change of the latency from the first to the last third'),
    ('oldest', 'greatest age of a sample at its row'),
    ('copies', 'images identical to the one before'),
)
"""Title and meaning of the columns about a stream."""


def stream_cells(report: dict) -> Iterator[list[str]]:
    """Of each stream its name and topic, and a text for each of STREAM_COLUMNS."""
    for name, stream in report['streams'].items():
        rate = f'{stream["rate_hz"]:.4g}' if stream['rate_hz'] else '–'
        latency = ', '.join(interval(stream[key]) for key in ('latency_p50_s', 'latency_p95_s') if key in stream) or '–'
        yield [name, stream['topic'], str(stream['n']), f'{rate}/{stream["declared_hz"]:g}', interval(stream['jitter_s']),
               percent(stream['lost_share']), interval(stream['dt_max_s']), latency, interval(stream.get('latency_change_s')),
               interval(stream['max_age_s']), str(stream.get('copies', '–'))]


def long_duration(seconds: float) -> str:
    """12.4 s, 3.5 min, 1.2 h."""
    return f'{seconds:.1f} s' if seconds < 90 else f'{seconds / 60:.1f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def percent(share: float | None) -> str:
    """A share for a table: – if unknown, 0, or two digits."""
    return '–' if share is None else '0' if not share else f'{100 * share:.2g} %'


def interval(seconds: float | None) -> str:
    """A time for a table: – if unknown, 0 below half a millisecond, else as `duration`."""
    return '–' if seconds is None else '0' if abs(seconds) < 5e-4 else duration(seconds)
