"""Is an episode fit to learn from? What was measured, a verdict, and the reasons for it in words.

`assess` judges a recording and the rows cut from it, `assess_rows` a dataset's rows alone. A report is JSON: times in [s]
since the start of the episode's part of the recording, null where there is nothing to measure.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from il_policies.contract import Contract, Joint, Stream, from_dict
from il_policies.data.align import MAX_REPEATED, SECOND, Rows, typical_period
from il_policies.data.recording import Recording, StreamRecord
from il_policies.data.store import DatasetInfo

PASS, WARN, FAIL = VERDICTS = ('PASS', 'WARN', 'FAIL')

FILLED_WARN, FILLED_FAIL = 0.01, 0.05
"""Share of rows in which something had to be repeated; one gap that may be repeated is no FAIL in a short episode."""
LOST_WARN, LOST_FAST_WARN = 0.01, 0.05
"""Share of a stream's messages that are missing; the second of streams so fast that a row has two of them."""
GAP_FAIL = 0.5
"""A stream may be silent this long, or as long as its max age allows [s]."""
FROZEN_FAIL = 0.5
"""Identical images for this long while the arm moves are a gap that nobody flagged [s]."""
COPIES_WARN = 0.05
"""Share of images that are identical to the one before while the arm moves."""
JITTER_WARN = 0.5
"""95 % of a stream's steps deviate by less than this share of its period."""
RATE_WARN = 0.05
"""A stream may be this much slower than declared."""
RATE_TOLERANCE = 0.15
"""With a rate further than this from the declared one, as a share of it, recording does not begin."""
DISORDER_WARN = 0.01
"""Share of stamps that are doubled, go back, or are ahead of their arrival by more than a row."""
SKEW_WARN, SKEW_FRAMES_WARN = 0.5, 1.25
"""Images of a row may be apart by this share of a row's period, or by so many frames of the slowest camera."""
DRIFT_WARN = 0.5
"""A clock may move against the arrival by this share of a row's period."""
CLOCK_FAIL = 1.0
"""Stamps and times of arrival further apart than this are two different clocks [s]."""
CLOCK_AHEAD_WARN = 0.01
"""A sample cannot arrive before it was taken; clocks may differ by this much [s]."""
CLOCK_AHEAD_FAIL = 0.05
"""Ahead by more than this, or than a row's period if that is longer, samples belong to other rows [s]."""
UNUSED_WARN = 1.0
"""Beginning or end of a recording that gives no rows [s]."""
STILL = 0.01
"""An arm stands still while no joint is commanded faster than this share of its range per second."""
STILL_WINDOW_S = 0.2
"""Over which that speed is measured [s]."""
HEAD_WARN, TAIL_WARN, PAUSE_WARN = 1.0, 2.0, 5.0
"""How long the arm may stand still at the beginning, at the end and in between [s]."""
LAG_WARN = -0.02, 0.3
"""The measured motion follows the commands by this much [s]."""
LAG_SEARCHED = 0.3, 1.0
"""How far before and after the commands motion is looked for [s]."""
LAG_CORRELATION_WARN = 0.5
"""Motion that correlates less with the commands does not follow them."""
SPEED_WARN, JUMP_WARN = 1.1, 2.0
"""Commanded and measured speed from row to row, in units of the contract's limit."""
LONGEST = 50
"""So many gaps and frozen stretches are listed, the longest ones."""

NOTHING = {'rows': 0, 'filled': 0, 'filled_share': 0.0, 'success': None, 'duration_s': 0.0, 'head_s': 0.0, 'warnings': []}
"""Facts of an episode without rows."""

Faults = list[tuple[str, str]]
"""(WARN or FAIL, reason)."""


def assess(recording: Recording, rows: Rows | None, refused: str = '') -> dict:
    """The report of one episode. rows None: there are none, for the reason `refused`; the streams are judged all the same.

    Keys: verdict, reasons (each begins with WARN or FAIL, worst first), facts of the episode, `streams` and `features` by
    name (also action) and `episode`. See docs/data.md.
    """
    contract = recording.contract
    faults: Faults = [(FAIL, refused)] if refused else []
    about, more = _about(recording)
    faults += more
    if rows is None:
        stamps = np.concatenate([np.zeros(0, np.int64), *(record.stamps for record in recording.streams.values())])
        begin, end = (int(stamps.min()), int(stamps.max())) if len(stamps) else (0, 0)
        origin, facts = begin, dict(NOTHING)
        features, episode, moving = {}, {}, np.zeros(0, bool)
    else:
        origin, period = rows.first, round(SECOND / contract.policy_rate)
        # What the rows were made of: other parts of the recording are not this episode's.
        begin, end = max(origin, int(rows.stamps[0]) - period), min(rows.last, int(rows.stamps[-1]) + period)
        facts, more = _facts(rows)
        faults += more
        times = (rows.stamps - origin) / SECOND
        commanded = times - rows.ages['action'] if 'action' in rows.ages else times
        features, episode, moving, more = _rows_report(contract, contract.policy_rate, times, rows.filled, rows.lowdim,
                                                       rows.action, commanded)
        faults += more
        for name, ages in rows.ages.items():
            features.setdefault(name, {}).update({f'age_{key}_s': value for key, value in _spread(ages).items()})
        for measured, more in (_skew(contract, rows), _recorded_lag(recording, rows, begin, end)):
            episode |= measured
            faults += more
    streams, offset, more = _streams_report(recording, begin, end, origin, rows, moving)
    faults += more
    for name, stream in streams.items():
        stream['max_age_s'] = features.get(name, {}).get('age_max_s') or 0.0
    episode['clock_offset_s'] = offset
    facts |= {'first_ns': origin, 'span_s': [_number((begin - origin) / SECOND), _number((end - origin) / SECOND)]}
    return _verdict(faults) | about | facts | {'streams': streams, 'features': features, 'episode': episode}


def refusal(reason: str) -> dict:
    """The report of a recording that cannot be read at all."""
    return _verdict([(FAIL, reason)]) | NOTHING | {'interrupted': False, 'contract_differs': False, 'first_ns': 0,
                                                   'span_s': [0.0, 0.0], 'streams': {}, 'features': {}, 'episode': {}}


def assess_rows(info: DatasetInfo, lowdim: dict[str, np.ndarray]) -> dict:
    """What can be said from the table of an episode alone (`Dataset.lowdim`), as of imported data: a report without streams.

    Raises ContractError if the dataset's contract is not valid.
    """
    contract = from_dict(Contract, info.contract, 'contract of the dataset') if info.contract else None
    stamps, filled = lowdim['stamp'], lowdim['filled']
    times = (stamps - stamps[0]) / SECOND
    tables = {name: lowdim[name] for name in info.lowdim}
    features, episode, _, faults = _rows_report(contract, info.fps, times, filled, tables, lowdim['action'], times)
    state = state_of(info, lowdim)
    if state is not None and info.label != 'next_state':
        lag, more = _lag(times, lowdim['action'], times, state, _scale(lowdim['action'], contract and contract.action_joints))
        episode |= lag
        faults += more
    uneven = np.abs(np.diff(times) * info.fps - 1) > 0.5
    if uneven.any():
        faults.append((WARN, f'{int(uneven.sum())} steps differ by more than half a row from {1 / info.fps:.3g} s, '
                             f'the first at {duration(times[int(np.argmax(uneven))])}'))
    return _verdict(faults) | {
        'rows': len(stamps), 'filled': int(filled.sum()), 'filled_share': _number(filled.mean()),
        'duration_s': _number(times[-1]), 'first_ns': int(stamps[0]), 'span_s': [0.0, _number(times[-1])], 'streams': {},
        'features': features, 'episode': episode}


def state_of(info: DatasetInfo, lowdim: dict[str, np.ndarray]) -> np.ndarray | None:
    """The measured counterpart of the action, (T, A).

    The contract's joint_state, else the first feature that has an entry of every action's name, else None.
    """
    names = [info.contract['joint_state']] if info.contract else info.lowdim
    for name in names:
        entries = info.features[name].names
        if set(info.action.names) <= set(entries):
            return lowdim[name][:, [entries.index(entry) for entry in info.action.names]]
    return None


# --- the recording as a whole ------------------------------------------------------------------------------------------

def _about(recording: Recording) -> tuple[dict, Faults]:
    """What the recorder noted, and streams that began late."""
    about, contract = recording.about, recording.contract
    report = {'interrupted': about.get('interrupted') == 'true',
              'contract_differs': about.get('contract_hash') not in (None, '', contract.hash)}
    faults = [(WARN, f'salvaged: {"; ".join(recording.damage)}')] if recording.damage else []
    if report['interrupted']:
        faults.append((WARN, 'the recording was interrupted'))
    begins = {name: int(record.received.min()) for name, record in recording.streams.items()
              if name != 'action' and len(record.received)}
    if begins and recording.spans[0].begin is None:
        latest, earliest = max(begins, key=begins.get), min(begins, key=begins.get)
        late = (begins[latest] - begins[earliest]) / SECOND
        if late > UNUSED_WARN:
            faults.append((WARN, f'{latest}: begins {duration(late)} after {earliest}; what was recorded before is unused'))
    return report, faults


def _facts(rows: Rows) -> tuple[dict, Faults]:
    """Rows, times and labels of an episode."""
    head, tail = (int(rows.stamps[0]) - rows.first) / SECOND, (rows.last - int(rows.stamps[-1])) / SECOND
    faults = [(WARN, warning) for warning in rows.warnings]
    faults += [(WARN, f'the {where} {duration(unused)} of the recording gave no rows')
               for unused, where in ((head, 'first'), (tail, 'last')) if unused > UNUSED_WARN]
    return {'rows': len(rows.stamps), 'filled': int(rows.filled.sum()), 'filled_share': _number(rows.filled.mean()),
            'success': rows.success, 'duration_s': _number((int(rows.stamps[-1]) - int(rows.stamps[0])) / SECOND),
            'head_s': _number(max(head, 0.0)), 'warnings': list(rows.warnings)}, faults


def _skew(contract: Contract, rows: Rows) -> tuple[dict, Faults]:
    """How far apart the images of a row were taken."""
    if len(contract.cameras) < 2:
        return {}, []
    ages = np.array([rows.ages[name] for name in contract.cameras])
    skew = _spread(np.ptp(ages, axis=0))
    # Cameras that run freely are up to a frame apart: no fault of the episode.
    frame = max(1 / contract.observations[name].rate for name in contract.cameras)
    allowed = max(SKEW_WARN / contract.policy_rate, SKEW_FRAMES_WARN * frame)
    report = {**{f'skew_{key}_s': value for key, value in skew.items()}, 'skew_allowed_s': _number(allowed)}
    if skew['p95'] <= allowed:
        return report, []
    oldest = contract.cameras[int(np.argmax(np.median(ages, axis=1)))]
    return report, [(WARN, f'images of a row are up to {duration(skew["p95"])} apart, allowed {duration(allowed)}; the oldest '
                           f'is of {oldest}')]


def _recorded_lag(recording: Recording, rows: Rows, begin: int, end: int) -> tuple[dict, Faults]:
    """By how much the measured joints follow the recorded commands."""
    contract = recording.contract
    if 'action' not in recording.streams:
        return {}, []
    state = recording.streams[contract.joint_state]
    columns = [state.stream.names.index(joint) for joint in contract.action.joints]
    command_times, commands = _samples(recording.streams['action'], begin, end)
    state_times, positions = _samples(state, begin, end)
    return _lag(command_times, commands, state_times, positions[:, columns], _scale(rows.action, contract.action_joints))


# --- rows -------------------------------------------------------------------------------------------------------------

def _rows_report(contract: Contract | None, fps: float, times: np.ndarray, filled: np.ndarray, lowdim: dict[str, np.ndarray],
                 action: np.ndarray, commanded: np.ndarray) -> tuple[dict, dict, np.ndarray, Faults]:
    """Features, episode, whether the arm is moving from each row on (T,), faults. commanded: time of each action [s] (T,)."""
    faults: Faults = []
    features = {}
    for name, values in {**lowdim, 'action': action}.items():
        features[name] = {'not_finite': int(np.sum(~np.isfinite(values))), 'steps_over_6_sigma': _outliers(values)}
        if features[name]['not_finite']:
            faults.append((FAIL, f'{name}: {features[name]["not_finite"]} values are not finite'))
    share = float(filled.mean())
    if share > FILLED_WARN:
        faults.append((FAIL if share > FILLED_FAIL and filled.sum() > MAX_REPEATED else WARN,
                       f'{int(filled.sum())} of {len(filled)} rows repeat something that was missing ({100 * share:.2g} %, '
                       f'the first at {duration(times[int(np.argmax(filled))])})'))
    if contract:
        joints = contract.action_joints
        features['action'] |= _limits('action', joints, commanded, action, SPEED_WARN, faults)
        if contract.joint_state in lowdim:
            columns = [contract.observations[contract.joint_state].names.index(joint.name) for joint in joints]
            more: Faults = []
            features[contract.joint_state] |= _limits(contract.joint_state, joints, times,
                                                      lowdim[contract.joint_state][:, columns], JUMP_WARN, more)
            # Joints that are commanded beyond a limit get there: that is one fault.
            faults += [] if features['action']['out_of_limits'] or features['action']['too_fast'] else more
    still, moving = _stillness(times, action, _scale(action, contract and contract.action_joints), fps)
    if len(action) > 1 and not np.ptp(action, axis=0).any():
        faults.append((FAIL, 'the action never changes'))
    else:
        for key, where, allowed in (('static_head_s', 'at the beginning', HEAD_WARN), ('static_tail_s', 'at the end', TAIL_WARN),
                                    ('longest_pause_s', 'in between', PAUSE_WARN)):
            if (still[key] or 0.0) > allowed:
                faults.append((WARN, f'the arm stands still for {duration(still[key])} {where}: more than {allowed:g} s teach '
                                     'waiting'))
    return features, still, moving, faults


def _limits(name: str, joints: Sequence[Joint], times: np.ndarray, values: np.ndarray, speed: float, faults: Faults) -> dict:
    """How often the joints of values (T, D) at times (T,) leave the contract's limits; adds to faults."""
    report: dict = {'out_of_limits': {}, 'too_fast': {}}
    steps = np.diff(times)
    for joint, column in zip(joints, values.T):
        low, high = joint.position
        # A measurement at a limit is noisy, a command has been rounded to float32.
        margin = 0.01 * (high - low)
        outside = np.maximum(low - margin - column, column - high - margin) > 0
        if outside.any():
            report['out_of_limits'][joint.name] = int(outside.sum())
            worst = column[np.argmax(np.maximum(low - column, column - high))]
            faults.append((WARN, f'{name}: {joint.name} reaches {worst:.3g} {joint.unit}, outside its limits {low:g} … {high:g} '
                                 f'({int(outside.sum())} rows)'))
        # A command that answers two rows makes no step.
        rates = np.divide(np.abs(np.diff(column)), steps, out=np.zeros(len(steps)), where=steps > 0)
        fast = rates > speed * joint.velocity
        if fast.any():
            report['too_fast'][joint.name] = int(fast.sum())
            at = int(np.argmax(rates))
            faults.append((WARN, f'{name}: {joint.name} moves at {rates[at]:.3g} {joint.unit}/s at {duration(times[at])}, its '
                                 f'limit is {joint.velocity:g} ({int(fast.sum())} rows)'))
    return report


def _outliers(values: np.ndarray) -> int:
    """Steps from row to row beyond six standard deviations of their column's steps."""
    steps = np.diff(values, axis=0)
    deviation = np.abs(steps - steps.mean(axis=0)) if len(steps) else steps
    return int(np.sum(deviation > 6 * deviation.std(axis=0))) if len(steps) else 0


def _scale(action: np.ndarray, joints: Sequence[Joint] | None) -> np.ndarray:
    """Range of each action's column (D,): the contract's, else the widest one that the episode uses."""
    if joints:
        return np.array([joint.position[1] - joint.position[0] for joint in joints])
    return np.full(action.shape[1], np.ptp(action, axis=0).max() or 1.0)


def _stillness(times: np.ndarray, action: np.ndarray, scale: np.ndarray, fps: float) -> tuple[dict, np.ndarray]:
    """How long the commands rest at the beginning, at the end, in between; whether they move from each row on (T,)."""
    T, w = len(times), max(1, round(STILL_WINDOW_S * fps))
    moving = np.zeros(T, bool)
    if T > w:
        speed = np.abs(action[w:] - action[:-w]) / (times[w:] - times[:-w])[:, None]
        moving[:T - w] = (speed > STILL * scale).any(axis=1)
    if not moving.any():
        rest = _number(times[-1] - times[0])
        return {'static_head_s': rest, 'static_tail_s': rest, 'longest_pause_s': None}, moving
    places = np.flatnonzero(moving)
    # Motion was seen somewhere in the window that begins at a place.
    pauses = times[places[1:]] - times[np.minimum(places[:-1] + w, T - 1)]
    return {'static_head_s': _number(times[places[0]] - times[0]), 'static_tail_s': _number(times[-1] - times[places[-1] + w]),
            'longest_pause_s': _number(max(0.0, pauses.max(initial=0.0)))}, moving


def _lag(command_times: np.ndarray, commands: np.ndarray, state_times: np.ndarray, states: np.ndarray,
         scale: np.ndarray) -> tuple[dict, Faults]:
    """By how much the measured motion follows the commanded one, and how well.

    Velocities, smoothed over 0.1 s, of the joints that move, in units of their scale (D,), are shifted against each other
    until they correlate best; times [s] (N,), commands (N, D), times (M,), states (M, D), by time. Empty where nothing
    moves, or for too short a while.
    """
    if min(len(command_times), len(state_times)) < 2:
        return {}, []
    begin, end = max(command_times[0], state_times[0]), min(command_times[-1], state_times[-1])
    step = max(0.005, (end - begin) / 20_000)
    grid = np.arange(begin, end, step)
    width = max(1, round(0.1 / step))
    if len(grid) < 4 * width:
        return {}, []
    kernel = np.ones(width) / width
    command, state = (np.stack([np.convolve(np.diff(np.interp(grid, times, column)), kernel, 'valid') for column in values.T])
                      / (step * scale[:, None]) for times, values in ((command_times, commands), (state_times, states)))
    # A joint at rest would contribute its noise.
    chosen = np.abs(command).max(axis=1) > STILL
    if not chosen.any():
        return {}, []
    command, state = (velocity[chosen] / np.linalg.norm(command[chosen], axis=1)[:, None] for velocity in (command, state))
    farthest = command.shape[1] // 3
    shifts = np.arange(-min(round(LAG_SEARCHED[0] / step), farthest), min(round(LAG_SEARCHED[1] / step), farthest) + 1)
    correlations = np.array([_correlation(command, state, shift) for shift in shifts])
    best = int(np.argmax(correlations))
    fine = 0.0
    if 0 < best < len(shifts) - 1:
        before, at, after = correlations[best - 1:best + 2]
        bend = before - 2 * at + after
        fine = 0.5 * (before - after) / bend if bend < 0 else 0.0
    lag, correlation = (shifts[best] + fine) * step, float(correlations[best])
    report = {'lag_s': _number(lag), 'lag_correlation': _number(correlation)}
    if correlation < LAG_CORRELATION_WARN:
        return report, [(WARN, f'the measured motion does not follow the commands (correlation {correlation:.2f}); '
                               'are joints, signs and units right?')]
    if lag < LAG_WARN[0]:
        return report, [(WARN, f'the arm moves {duration(-lag)} before its commands: their stamps disagree')]
    if lag > LAG_WARN[1]:
        return report, [(WARN, f'the arm moves {duration(lag)} after its commands')]
    return report, []


def _samples(record: StreamRecord, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Times [s] (N,) and samples (N, D) stamped between two times [ns], by time."""
    order = np.argsort(record.stamps, kind='stable')
    order = order[(begin <= record.stamps[order]) & (record.stamps[order] <= end)]
    return (record.stamps[order] - begin) / SECOND, record.samples[order]


def _correlation(command: np.ndarray, state: np.ndarray, shift: int) -> float:
    """Of (D, N) velocities, the state taken `shift` steps later."""
    N = command.shape[1]
    a, b = command[:, max(0, -shift):N - max(0, shift)], state[:, max(0, shift):N - max(0, -shift)]
    both, of_a, of_b = (float(np.einsum('ij,ij->', first, second)) for first, second in ((a, b), (a, a), (b, b)))
    return both / math.sqrt(max(of_a * of_b, 1e-30))


# --- streams ----------------------------------------------------------------------------------------------------------

def _streams_report(recording: Recording, begin: int, end: int, origin: int, rows: Rows | None,
                    moving: np.ndarray) -> tuple[dict, float | None, Faults]:
    """Every stream as it was between two times [ns], and the offset of all clocks; the other arguments as below."""
    contract, records = recording.contract, recording.streams
    latencies = {name: (record.received - record.stamps) / SECOND for name, record in records.items()
                 if record.stream.clock != 'receive' and len(record.stamps)}
    offset = clock_offset(latencies, len(latencies) < len(records))
    streams: dict[str, dict] = {}
    faults: Faults = []
    for name, record in records.items():
        if rows is None and not len(record.stamps):
            faults.append((FAIL, f'{name}: no messages on {record.topic}'))
        inside = (begin <= record.stamps) & (record.stamps <= end)
        # Of the camera that gives the ticks the alignment itself says that it runs at another rate.
        judged = rows is None or name not in contract.cameras[:1]
        slowest = contract.policy_rate if name == 'action' else record.stream.rate
        parts = [stream_report(name, record, record.stamps[inside], origin, contract.policy_rate, slowest if judged else 0.0)]
        if name in latencies:
            parts.append(_clock_report(name, record.stream, record.stamps[inside], latencies[name][inside], offset,
                                       contract.policy_rate))
        if record.digests is not None and rows is not None:
            parts.append(_frozen_report(name, record.stamps[inside], record.digests[inside], origin, rows.stamps, moving,
                                        noiseless=contract.tried_on == 'simulation'))
        streams[name] = {}
        for measured, more in parts:
            streams[name] |= measured
            faults += more
    return streams, offset, faults


def stream_report(name: str, record: StreamRecord, stamps: np.ndarray, origin: int, fps: float,
                   slowest: float) -> tuple[dict, Faults]:
    """Of the stamps (N,) [ns] in order of arrival: rate, steps, gaps, an estimate of what was lost, disorder.

    origin: where the report's time begins [ns]. fps: rate of the rows [Hz]. slowest: warn below this rate [Hz].
    """
    stream, n = record.stream, len(stamps)
    distinct = np.unique(stamps)
    order = np.diff(stamps)
    report = {'topic': record.topic, 'n': n, 'declared_hz': stream.rate, 'rate_hz': 0.0, 'dt_median_s': 0.0, 'dt_p95_s': 0.0,
              'dt_max_s': 0.0, 'dt_allowed_s': max(GAP_FAIL, stream.max_age), 'jitter_s': 0.0, 'gaps': 0, 'gaps_at': [],
              'lost': 0, 'lost_share': 0.0, 'lost_allowed': LOST_WARN, 'duplicate': n - len(distinct),
              'backward': int(np.sum(order < 0)), 'out_of_order': int(np.sum(order <= 0)), 'undecodable': record.undecodable}
    faults: Faults = []
    if record.undecodable:
        faults.append((WARN, f'{name}: {record.undecodable} messages cannot be decoded'))
    if len(distinct) < 2:
        return report, faults  # a latched message says all there is to say

    steps, period = np.diff(distinct) / SECOND, typical_period(distinct) / SECOND
    gaps = steps > 1.5 * period
    # Bursts leave gaps in which nothing is missing: the whole must be too short as well.
    expected = (int(distinct[-1]) - int(distinct[0])) / SECOND / period + 1
    lost = int(min(np.sum(np.maximum(np.round(steps / period) - 1, 0)), max(0.0, np.round(expected) - n)))
    allowed = LOST_FAST_WARN if 1 / period > 1.9 * fps else LOST_WARN
    jitter = np.percentile(np.abs(steps[~gaps] - period), 95) if not gaps.all() else 0.0
    longest = int(np.argmax(steps))
    report |= {'rate_hz': _number(1 / period), 'dt_median_s': _number(np.median(steps)),
               'dt_p95_s': _number(np.percentile(steps, 95)), 'dt_max_s': _number(steps[longest]), 'jitter_s': _number(jitter),
               'gaps': int(gaps.sum()), 'gaps_at': _longest((distinct[:-1][gaps] - origin) / SECOND, steps[gaps]),
               'lost': lost, 'lost_share': _number(lost / (lost + n)), 'lost_allowed': allowed}
    at = duration((int(distinct[longest]) - origin) / SECOND)
    if steps[longest] > report['dt_allowed_s']:
        faults.append((FAIL, f'{name}: silent for {duration(steps[longest])} at {at}, allowed '
                             f'{duration(report["dt_allowed_s"])}'))
    elif report['lost_share'] > allowed:
        faults.append((WARN, f'{name}: {lost} of {lost + n} messages lost ({100 * report["lost_share"]:.2g} %), the '
                             f'longest gap {duration(steps[longest])} at {at}'))
    if jitter > JITTER_WARN * period:
        faults.append((WARN, f'{name}: steps vary by {duration(jitter)} around {duration(period)}: messages come in bursts'))
    if 1 / period < (1 - RATE_WARN) * slowest:
        faults.append((WARN, f'{name}: runs at {1 / period:.4g} Hz, expected are {slowest:g}'))
    if report['duplicate'] > DISORDER_WARN * n:
        faults.append((WARN, f'{name}: {report["duplicate"]} of {n} stamps are doubled; of two samples one is used'))
    if report['backward'] > DISORDER_WARN * n:
        faults.append((WARN, f'{name}: {report["backward"]} of {n} stamps go back'))
    return report, faults


def clock_offset(latencies: dict[str, np.ndarray], arrival_counts: bool) -> float | None:
    """By how much all stamps lie behind the time of arrival [s] if that is a clock of its own, as with simulated time.

    arrival_counts: some stream is stamped by its arrival, so that all must be on that clock.
    """
    middles = [float(np.median(latency)) for latency in latencies.values()]
    if arrival_counts or not middles or min(abs(middle) for middle in middles) <= CLOCK_FAIL:
        return None
    return _number(np.median(middles))


def _clock_report(name: str, stream: Stream, stamps: np.ndarray, latency: np.ndarray, offset: float | None,
                  fps: float) -> tuple[dict, Faults]:
    """From stamps (N,) [ns] to arrivals: latency (N,) [s], and how the clock of the stamps drifts against the recorder's."""
    if not len(latency):
        return {}, []
    middle = float(np.median(latency)) - (offset or 0.0)
    # A latched message may be as old as the stream allows when it arrives.
    if not -CLOCK_FAIL <= middle <= CLOCK_FAIL + stream.max_age:
        return {'latency_p50_s': _number(middle)}, [(FAIL, f'{name}: its stamps are {-middle:+.4g} s off the '
                                                           f'{"other clocks" if offset else "time of arrival"}; set the clock '
                                                           'of its sender')]
    if offset is not None:
        return {}, []  # how long a message took cannot be told from clocks that tick apart
    report = {'latency_p50_s': _number(middle), 'latency_p95_s': _number(np.percentile(latency, 95))}
    faults: Faults = []
    ahead_allowed = max(CLOCK_AHEAD_FAIL, 1 / fps)
    far_ahead = int(np.sum(latency < -ahead_allowed))
    if middle < -CLOCK_AHEAD_WARN:
        faults.append((FAIL if middle < -ahead_allowed else WARN,
                       f'{name}: stamps are {duration(-middle)} ahead of the arrival; set the clock of its sender, or correct '
                       '`latency` in the contract'))
    elif far_ahead > DISORDER_WARN * len(latency):
        faults.append((WARN, f'{name}: {far_ahead} of {len(latency)} stamps are up to {duration(-latency.min())} ahead of the '
                             'arrival'))
    elif report['latency_p95_s'] > stream.max_age:
        faults.append((WARN, f'{name}: arrives {duration(report["latency_p95_s"])} late; when the policy runs, nothing older '
                             f'than {duration(stream.max_age)} is used'))
    if len(latency) >= 10:
        # The quicker quarter of a while hardly waited in queues: it tells how the clocks are apart.
        thirds = np.array_split(np.argsort(stamps, kind='stable'), 3)
        begin, _, end = (np.percentile(latency[third], 25) for third in thirds)
        seconds = (stamps[thirds[2]].mean() - stamps[thirds[0]].mean()) / SECOND
        report |= {'latency_change_s': _number(end - begin), 'drift_ppm': _number(1e6 * (end - begin) / seconds)}
        if abs(end - begin) > DRIFT_WARN / fps:
            faults.append((WARN, f'{name}: from the first to the last third its stamps lose {duration(end - begin)} against the '
                                 f'arrival ({report["drift_ppm"]:+.3g} ppm): a clock that is adjusted or drifts, or a queue'))
    return report, faults


def _frozen_report(name: str, stamps: np.ndarray, digests: np.ndarray, origin: int, ticks: np.ndarray, moving: np.ndarray,
                   noiseless: bool) -> tuple[dict, Faults]:
    """Images (N,) identical to the one before, and how long they stand still while the arm moves; ticks (T,), moving (T,).

    noiseless: a simulated camera that does not see the motion repeats its image to the bit.
    """
    order = np.argsort(stamps, kind='stable')
    stamps, digests = stamps[order], digests[order]
    if len(stamps) < 2:
        return {}, []
    same = digests[1:] == digests[:-1]
    row = np.searchsorted(ticks, stamps[:-1], side='right') - 1
    while_moving = (row >= 0) & moving[np.maximum(row, 0)]
    frozen = same & while_moving
    runs = np.cumsum(~frozen)  # the steps of a frozen stretch and the one before it share a number
    lengths = np.bincount(runs, weights=np.where(frozen, np.diff(stamps) / SECOND, 0.0))
    begins = np.zeros(len(lengths), np.int64)
    begins[runs[frozen][::-1]] = np.flatnonzero(frozen)[::-1]
    share = float(frozen.sum() / max(while_moving.sum(), 1))
    longest = int(np.argmax(lengths))
    listed = lengths > 0
    report = {'copies': int(same.sum()), 'copies_while_moving': int(frozen.sum()), 'frozen_s': _number(lengths[longest]),
              'frozen_at': _longest((stamps[begins[listed]] - origin) / SECOND, lengths[listed])}
    if lengths[longest] > FROZEN_FAIL:
        return report, [(WARN if noiseless else FAIL,
                         f'{name}: the image stands still for {duration(lengths[longest])} at '
                         f'{duration((int(stamps[begins[longest]]) - origin) / SECOND)} while the arm moves')]
    if share > COPIES_WARN:
        return report, [(WARN, f'{name}: {100 * share:.2g} % of the images are copies of the one before; does the camera run '
                               'slower than it publishes?')]
    return report, []


# --- words and numbers ------------------------------------------------------------------------------------------------

def _verdict(faults: Faults) -> dict:
    """The worst of the faults, and all of them, worst first."""
    ordered = sorted(faults, key=lambda fault: -VERDICTS.index(fault[0]))
    return {'verdict': ordered[0][0] if ordered else PASS, 'reasons': [f'{level} {reason}' for level, reason in ordered]}


def _longest(at: np.ndarray, lengths: np.ndarray) -> list[list[float]]:
    """[begin, length] of the longest stretches [s], in the order of time."""
    places = np.sort(np.argsort(-lengths, kind='stable')[:LONGEST])
    return [[_number(at[place]), _number(lengths[place])] for place in places]


def _spread(values: np.ndarray) -> dict[str, float | None]:
    """p50, p95 and max of what is finite."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {'p50': None, 'p95': None, 'max': None}
    return {'p50': _number(np.median(values)), 'p95': _number(np.percentile(values, 95)), 'max': _number(values.max())}


def _number(value: float) -> float:
    """As written into a report: microseconds are the finest that matters."""
    return round(float(value), 6)


def duration(seconds: float) -> str:
    """For people: 2.8 ms, 28 ms, 0.83 s, 12.4 s."""
    if abs(seconds) < 0.0995:
        milliseconds = 1e3 * seconds
        return f'{milliseconds:.0f} ms' if abs(milliseconds) >= 9.95 else f'{milliseconds:.2g} ms'
    return f'{seconds:.2f} s' if abs(seconds) < 9.995 else f'{seconds:.1f} s'
