"""One fault at a time is put into a clean episode: the report must name it and nothing else."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from il_policies.contract import Stream
from il_policies.data import quality
from il_policies.data.align import Rows
from il_policies.data.recording import Recording, Span, StreamRecord
from il_policies.data.store import ActionInfo, DatasetInfo, Feature
from recordings import START, contract

SECONDS, FPS, LAG = 20.0, 10.0, 0.08
MS = 1_000_000
CAMERA = Stream(topic='wrist/compressed', type='sensor_msgs/msg/CompressedImage', rate=30.0, max_age=0.15, image_size=(8, 12))
CONTRACT = contract(camera_rate=30.0, fps=FPS)
CONTRACT = replace(CONTRACT, observations={**CONTRACT.observations, 'wrist': CAMERA})


def nanoseconds(seconds) -> np.ndarray:
    return np.round(np.asarray(seconds) * 1e9).astype(np.int64)


def motion(t) -> np.ndarray:
    """Commanded joints b, a: a second of rest, then both swing, then a second of rest. Shape (N, 2)."""
    t = np.clip(np.asarray(t) - 0.9, 0.0, SECONDS - 2.0)
    return np.stack([0.4 * np.sin(1.7 * t), 0.3 * np.sin(2.3 * t)], axis=-1)


def stream(name: str, stamps: np.ndarray, samples=None, latency=0.003, digests=None, undecodable=0) -> StreamRecord:
    """A record of stamps [s]; images all differ unless digests are given."""
    declared = CONTRACT.observations.get(name) or Stream(topic='command', type='sensor_msgs/msg/JointState', field='position',
                                                         names=('b', 'a'), rate=50.0, max_age=0.1)
    if samples is None and digests is None:
        digests = np.arange(len(stamps), dtype=np.uint32)
    return StreamRecord(declared, '/' + declared.topic, START + nanoseconds(stamps), START + nanoseconds(stamps + latency),
                        samples, digests, undecodable)


def clean() -> dict[str, StreamRecord]:
    """Joints at 100 Hz (a, b, following the commands by LAG), goal at 10, cameras at 30, commands at 50 Hz."""
    joints, goal, frames, commands = (np.arange(round(SECONDS * rate)) / rate for rate in (100, 10, 30, 50))
    return {'joints': stream('joints', joints, motion(joints - LAG)[:, ::-1]),
            'goal': stream('goal', goal, np.tile((0.25, 0.1), (len(goal), 1))),
            'front': stream('front', frames, latency=0.02), 'wrist': stream('wrist', frames + 0.004, latency=0.025),
            'action': stream('action', commands, motion(commands))}


def rows_of(streams: dict[str, StreamRecord], **changes) -> Rows:
    """Rows at FPS as plainly as can be: of each stream the newest sample not later than the tick."""
    ticks = START + nanoseconds(0.1 + np.arange(round((SECONDS - 0.2) * FPS)) / FPS)
    places = {name: np.searchsorted(np.sort(record.stamps), ticks, side='right') - 1 for name, record in streams.items()}
    taken = {name: np.argsort(record.stamps, kind='stable')[places[name]] for name, record in streams.items()}
    values = {name: record.samples[taken[name]] for name, record in streams.items() if record.samples is not None}
    action = values.pop('action', motion(0.1 + np.arange(len(ticks)) / FPS))
    ages = {name: (ticks - record.stamps[taken[name]]) / 1e9 for name, record in streams.items()}
    rows = Rows(stamps=ticks, filled=np.zeros(len(ticks), bool), lowdim=values, action=action, ages=ages,
                frames={name: taken[name] for name in ('front', 'wrist')}, first=START,
                last=START + nanoseconds(SECONDS), task='', success=True, warnings=())
    return replace(rows, **changes)


NO_ROWS = object()


def judge(streams: dict | None = None, about: dict | None = None, damage=(), contract=CONTRACT, rows=None, **changes) -> dict:
    """The report of a clean episode with these streams exchanged, or these rows."""
    streams = {**clean(), **(streams or {})}
    recording = Recording(None, contract, streams, about or {}, tuple(damage), (Span(),))
    report = quality.assess(recording, None if rows is NO_ROWS else rows or rows_of(streams, **changes))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report['verdict'] == max([reason.split()[0] for reason in report['reasons']], default='PASS',
                                    key=quality.VERDICTS.index)
    return report


def only(report: dict, verdict: str, *words: str) -> None:
    """The report has this verdict for one reason, which has all the words in it."""
    assert report['verdict'] == verdict and len(report['reasons']) == 1, report['reasons']
    assert all(word in report['reasons'][0] for word in words), report['reasons']


def without(record: StreamRecord, chosen: np.ndarray) -> StreamRecord:
    """A record less the chosen messages (N,) bool."""
    kept = ~chosen
    return replace(record, stamps=record.stamps[kept], received=record.received[kept],
                   samples=None if record.samples is None else record.samples[kept],
                   digests=None if record.digests is None else record.digests[kept])


def between(record: StreamRecord, begin: float, end: float) -> np.ndarray:
    """Which messages are stamped in [begin, end) [s]."""
    return (record.stamps >= START + nanoseconds(begin)) & (record.stamps < START + nanoseconds(end))


def test_a_clean_episode_passes():
    report = judge()
    assert report['verdict'] == 'PASS' and report['reasons'] == []
    front, joints, action = (report['streams'][name] for name in ('front', 'joints', 'action'))
    # The rows lie between 0.1 and 19.8 s; what was recorded a period before and after them counts.
    assert (front['n'], front['gaps'], front['lost'], front['duplicate'], front['backward']) == (598, 0, 0, 0, 0)
    assert front['rate_hz'] == pytest.approx(30, rel=1e-6) and joints['rate_hz'] == pytest.approx(100, rel=1e-6)
    assert front['latency_p50_s'] == pytest.approx(0.02) and front['drift_ppm'] == pytest.approx(0, abs=1e-3)
    assert (front['copies'], front['frozen_s']) == (0, 0.0)
    assert action['topic'] == '/command' and action['declared_hz'] == 50.0
    assert report['features']['wrist']['age_max_s'] == pytest.approx(0.1 / 3 - 0.004, abs=1e-3)
    episode = report['episode']
    # The motion begins at 0.9 s, the first row is at 0.1 s; it is seen up to a window of 0.2 s early.
    assert 0.6 <= episode['static_head_s'] <= 0.8 and 0.7 <= episode['static_tail_s'] <= 1.0
    assert episode['lag_s'] == pytest.approx(LAG, abs=0.003) and episode['lag_correlation'] > 0.98
    assert episode['skew_p50_s'] == pytest.approx(0.1 / 3 - 0.004, abs=1e-3)
    assert (report['rows'], report['filled'], report['success'], report['head_s']) == (198, 0, True, pytest.approx(0.1))


@pytest.mark.parametrize('name, rate, every', [('joints', 100, 15), ('goal', 10, 40), ('front', 30, 15), ('action', 50, 15)])
def test_lost_messages(name, rate, every):
    record = clean()[name]
    lost = np.zeros(len(record.stamps), bool)
    lost[20:round(19.5 * rate):every] = True
    report = judge({name: without(record, lost)}, rows=rows_of(clean()))
    only(report, 'WARN', f'{name}: {lost.sum()} of {report["streams"][name]["n"] + lost.sum()} messages lost', 'longest gap')
    assert report['streams'][name]['gaps'] == report['streams'][name]['lost'] == lost.sum()
    at, length = report['streams'][name]['gaps_at'][0]
    assert at == pytest.approx(19 / rate, abs=1e-6) and length == pytest.approx(2 / rate, abs=1e-6)


def test_of_a_fast_stream_some_may_be_lost():
    joints = clean()['joints']
    lost = np.arange(len(joints.stamps)) % 40 == 20
    assert judge({'joints': without(joints, lost)}, rows=rows_of(clean()))['reasons'] == []


def test_a_long_gap():
    front = clean()['front']
    report = judge({'front': without(front, between(front, 12.4, 13.2))}, rows=rows_of(clean()))
    only(report, 'FAIL', 'front: silent for 0.83 s at 12.4 s, allowed 0.50 s')


def test_a_long_max_age_allows_a_long_gap():
    goal = clean()['goal']
    streams = {'goal': replace(without(goal, between(goal, 4.95, 5.55)), stream=replace(goal.stream, max_age=2.0))}
    only(judge(streams, rows=rows_of(clean())), 'WARN', 'goal: 6 of 200 messages lost')


def test_jitter_is_no_loss():
    rng = np.random.default_rng(0)
    frames = np.arange(600) / 30 + rng.uniform(-0.004, 0.004, 600)
    report = judge({'front': stream('front', frames, latency=0.02)})
    assert report['reasons'] == [] and report['streams']['front']['lost'] == 0
    assert 0.004 < report['streams']['front']['jitter_s'] < 0.008


def test_bursts_are_no_loss():
    i = np.arange(600)
    only(judge({'wrist': stream('wrist', i // 3 * 0.1 + i % 3 * 0.001, latency=0.02)}, rows=rows_of(clean())), 'WARN',
         'wrist: steps vary by 32 ms around 33 ms: messages come in bursts')


def test_a_slow_stream():
    goal = np.arange(round(SECONDS * 8)) / 8
    slow = stream('goal', goal, np.tile((0.25, 0.1), (len(goal), 1)))
    only(judge({'goal': slow}), 'WARN', 'goal: runs at 8 Hz, expected are 10')


def test_a_fast_stream_and_a_slower_command_are_fine():
    joints, commands = np.arange(round(SECONDS * 250)) / 250, np.arange(round(SECONDS * 20)) / 20
    report = judge({'joints': stream('joints', joints, motion(joints - LAG)[:, ::-1]),
                    'action': stream('action', commands, motion(commands))})
    assert report['reasons'] == [] and report['streams']['joints']['rate_hz'] == pytest.approx(250)


def test_doubled_stamps():
    joints = clean()['joints']
    stamps = joints.stamps.copy()
    stamps[50::50] = stamps[49::50][:len(stamps[50::50])]
    report = judge({'joints': replace(joints, stamps=stamps)}, rows=rows_of(clean()))
    only(report, 'WARN', 'joints: 39 of 1991 stamps are doubled')


def test_stamps_that_go_back():
    joints = clean()['joints']
    order = np.arange(len(joints.stamps))
    order[50::50], order[51::50] = order[51::50].copy(), order[50::50].copy()
    report = judge({'joints': replace(joints, stamps=joints.stamps[order], samples=joints.samples[order])})
    only(report, 'WARN', 'joints: 39 of 1991 stamps go back')


@pytest.mark.parametrize('seconds', [3612, -3612])
def test_a_clock_an_hour_off(seconds):
    wrist = clean()['wrist']
    report = judge({'wrist': replace(wrist, stamps=wrist.stamps + nanoseconds(seconds))}, rows=NO_ROWS)
    only(report, 'FAIL', f'wrist: its stamps are {seconds:+} s off the time of arrival', 'set the clock')


def test_one_clock_for_all_may_be_off():
    """Simulated time, recorded at wall time and at half speed: every stamp is off, none against the others."""
    streams = {name: replace(record, received=START * 2 + 2 * (record.stamps - START)) for name, record in clean().items()}
    report = judge(streams)
    assert report['reasons'] == [] and report['episode']['clock_offset_s'] == pytest.approx(START / 1e9, rel=1e-3)
    assert 'latency_p50_s' not in report['streams']['front']
    streams['wrist'] = replace(streams['wrist'], stamps=streams['wrist'].stamps + nanoseconds(60))
    only(judge(streams, rows=NO_ROWS), 'FAIL', 'wrist: its stamps are +60', 'other clocks')


def test_a_latched_message_may_be_alone_and_old():
    """Latched before the recording began, by 40 s, and delivered when the recorder subscribed."""
    goal = clean()['goal']
    latched = replace(goal, stamps=goal.stamps[:1] - nanoseconds(40), received=goal.received[:1], samples=goal.samples[:1],
                      stream=replace(goal.stream, max_age=120.0))
    assert judge({'goal': latched})['reasons'] == judge({'goal': latched}, rows=NO_ROWS)['reasons'] == []


def test_a_clock_that_is_ahead():
    wrist = clean()['wrist']
    only(judge({'wrist': replace(wrist, received=wrist.stamps - 15 * MS)}), 'WARN', 'wrist: stamps are 15 ms ahead')


@pytest.mark.parametrize('name', ['action', 'joints', 'wrist'])
def test_stamps_so_far_ahead_that_labels_are_of_other_rows(name):
    """Rows are 0.1 s apart."""
    record = clean()[name]
    for ahead, verdict, words in ((90, 'WARN', '90 ms'), (110, 'FAIL', '0.11 s'), (900, 'FAIL', '0.90 s')):
        report = judge({name: replace(record, received=record.stamps - ahead * MS)})
        only(report, verdict, f'{name}: stamps are {words} ahead of the arrival')


def test_a_few_stamps_that_are_ahead():
    record = clean()['action']
    for few, found in ((2, False), (20, True)):
        received = record.received - np.where(np.isin(np.arange(len(record.stamps)), np.arange(300, 300 + few)), 303 * MS, 0)
        report = judge({'action': replace(record, received=received)})
        if found:
            only(report, 'WARN', 'action: 20 of 996 stamps are up to 0.30 s ahead of the arrival')
        else:
            assert report['verdict'] == 'PASS'


def test_a_stream_that_arrives_too_late_to_be_used_live():
    wrist = clean()['wrist']
    only(judge({'wrist': replace(wrist, received=wrist.stamps + 200 * MS)}), 'WARN', 'wrist: arrives 0.20 s late', '0.15 s')


def test_a_drifting_clock():
    wrist = clean()['wrist']
    rng = np.random.default_rng(0)
    for ppm, found in ((1000, False), (5000, True)):
        delay = (wrist.stamps - START) * ppm * 1e-6 + 20 * MS + rng.exponential(2 * MS, len(wrist.stamps))
        report = judge({'wrist': replace(wrist, received=wrist.stamps + delay.astype(np.int64))})
        assert report['streams']['wrist']['drift_ppm'] == pytest.approx(ppm, rel=0.05)
        if found:
            only(report, 'WARN', 'wrist: from the first to the last third its stamps lose 67 ms', '(+5.06e+03 ppm)')
        else:
            assert report['reasons'] == []


def test_a_clock_that_is_adjusted():
    wrist = clean()['wrist']
    moved = wrist.stamps - np.where(np.arange(600) > 300, 70 * MS, 0)
    report = judge({'wrist': replace(wrist, stamps=moved)}, rows=rows_of(clean()))
    only(report, 'WARN', 'wrist: from the first to the last third its stamps lose 70 ms')


def test_queues_are_no_drift():
    wrist = clean()['wrist']
    late = np.where(np.arange(600) > 300, np.random.default_rng(0).exponential(30 * MS, 600), 0).astype(np.int64)
    report = judge({'wrist': replace(wrist, received=wrist.received + late)})
    assert report['reasons'] == [] and report['streams']['wrist']['latency_change_s'] < 0.012


def test_frozen_images():
    def frozen(begin, end, **changes):
        front = clean()['front']
        digests = front.digests.copy()
        digests[between(front, begin, end)] = 7
        return judge({'front': replace(front, digests=digests)}, **changes)

    report = frozen(8.0, 8.7)
    only(report, 'FAIL', 'front: the image stands still for 0.6', 'at 8.00 s while the arm moves')
    (at, length), = report['streams']['front']['frozen_at']
    assert at == pytest.approx(8.0, abs=0.01) and length == pytest.approx(0.667, abs=0.01)
    assert frozen(8.0, 8.3)['reasons'] == [] and frozen(8.0, 8.3)['streams']['front']['copies'] == 8
    resting = frozen(SECONDS - 0.9, SECONDS)
    assert resting['reasons'] == [] and resting['streams']['front']['copies'] > 20, 'the arm rests: so does the image'
    only(frozen(8.0, 8.7, contract=replace(CONTRACT, tried_on='simulation')), 'WARN', 'front: the image stands still')


def test_a_camera_that_publishes_every_image_twice():
    only(judge({'wrist': stream('wrist', np.arange(600) / 30 + 0.004, digests=(np.arange(600) // 2).astype(np.uint32))}),
         'WARN', 'wrist: 50 % of the images are copies')


def test_undecodable_images():
    only(judge({'wrist': replace(clean()['wrist'], undecodable=3)}), 'WARN', 'wrist: 3 messages cannot be decoded')


@pytest.mark.parametrize('count, verdict', [(1, 'PASS'), (6, 'WARN'), (12, 'FAIL')])
def test_filled_rows(count, verdict):
    filled = np.zeros(198, bool)
    filled[40:40 + count] = True
    report = judge(filled=filled)
    assert report['verdict'] == verdict and report['filled'] == count
    if count > 1:
        only(report, verdict, f'{count} of 198 rows repeat', 'at 4.10 s')


def test_cameras_that_are_apart():
    """Half a row is 50 ms here, a frame 33 ms."""
    rows = rows_of(clean())
    for older, found in ((0.0, False), (0.015, False), (0.06, True)):
        ages = {**rows.ages, 'wrist': rows.ages['wrist'] + older}
        report = judge(ages=ages)
        apart = np.percentile(np.abs(ages['wrist'] - ages['front']), 95)
        assert report['episode']['skew_p95_s'] == pytest.approx(apart, abs=1e-6) and report['episode']['skew_allowed_s'] == 0.05
        if found:
            only(report, 'WARN', 'images of a row are up to 89 ms apart, allowed 50 ms; the oldest is of wrist')
        else:
            assert report['reasons'] == []


def test_cameras_that_run_freely_are_up_to_a_frame_apart():
    fast = replace(CONTRACT, policy_rate=30.0)
    ages = rows_of(clean()).ages
    assert judge(contract=fast, ages={**ages, 'wrist': ages['front'] + 0.032})['reasons'] == []
    only(judge(contract=fast, ages={**ages, 'wrist': ages['front'] + 0.05}), 'WARN', 'allowed 42 ms')


def test_a_still_beginning_and_end():
    def with_rest(head, tail):
        times = 0.1 + np.arange(198) / FPS
        return judge(action=motion(np.clip(times, head + 0.9, SECONDS - tail)))['reasons']

    assert with_rest(0.0, 0.0) == []
    head, = with_rest(1.5, 0.0)
    assert head.startswith('WARN the arm stands still for 2.') and 'at the beginning' in head
    tail, = with_rest(0.0, 4.0)
    assert tail.startswith('WARN the arm stands still for 3.') and 'at the end' in tail


def test_a_long_pause():
    times = 0.1 + np.arange(198) / FPS
    paused = np.where(times < 6, times, np.where(times < 12.5, 6, times))
    report = judge(action=motion(paused) - motion(6) * (times >= 12.5)[:, None] * 0)
    pause = [reason for reason in report['reasons'] if 'in between' in reason]
    assert len(pause) == 1 and report['episode']['longest_pause_s'] == pytest.approx(6.5, abs=0.3)


def test_no_action():
    only(judge(action=np.zeros((198, 2))), 'FAIL', 'the action never changes')


def test_a_stream_that_begins_late():
    goal = clean()['goal']
    only(judge({'goal': without(goal, between(goal, 0, 3))}, rows=rows_of(clean())), 'WARN', 'goal: begins 3.00 s after joints')


def test_what_is_unused():
    rows = rows_of(clean())
    later = {key: value[30:] for key, value in rows.lowdim.items()}
    report = judge(rows=replace(rows, stamps=rows.stamps[30:], filled=rows.filled[30:], lowdim=later, action=rows.action[30:],
                                ages={key: value[30:] for key, value in rows.ages.items()}))
    only(report, 'WARN', 'the first 3.10 s of the recording gave no rows')
    assert report['head_s'] == pytest.approx(3.1)


def test_limits():
    a, b = CONTRACT.joints
    narrow = replace(CONTRACT, joints=(replace(a, position=(-0.2, 1.0)), b))
    commanded = rows_of(clean()).action[:, 1]
    report = judge(contract=narrow)
    below = int(np.sum(commanded < -0.212))
    only(report, 'WARN', f'action: a reaches -0.3 rad, outside its limits -0.2 … 1 ({below} rows)')
    assert report['features']['action']['out_of_limits'] == {'a': below}
    assert set(report['features']['joints']['out_of_limits']) == {'a'}


def test_speed():
    fast = rows_of(clean()).action.copy()
    fast[100:, 0] += 0.2  # joint b, in one row of 0.1 s; the limit is 1 rad/s
    report = judge(action=fast)
    only(report, 'WARN', 'action: b moves at', 'at 10.0 s, its limit is 1 (1 rows)')
    assert report['features']['action']['too_fast'] == {'b': 1}


def test_a_glitch_of_an_encoder():
    lowdim = rows_of(clean()).lowdim
    joints = lowdim['joints'].copy()
    joints[60, 0] += 1.5
    report = judge(lowdim={**lowdim, 'joints': joints})
    only(report, 'WARN', 'joints: a moves at', 'its limit is 1 (2 rows)')
    assert report['features']['joints']['steps_over_6_sigma'] == 2


def test_not_finite():
    lowdim = rows_of(clean()).lowdim
    goal = lowdim['goal'].copy()
    goal[3, 1] = np.nan
    only(judge(lowdim={**lowdim, 'goal': goal}), 'FAIL', 'goal: 1 values are not finite')


@pytest.mark.parametrize('lag, words', [(0.5, 'the arm moves 0.50 s after its commands'),
                                        (-0.1, 'the arm moves 0.10 s before its commands'), (0.25, '')])
def test_lag(lag, words):
    joints = clean()['joints']
    times = (joints.stamps - START) / 1e9
    noise = np.random.default_rng(0).normal(0, 5e-4, (len(times), 2))
    report = judge({'joints': replace(joints, samples=motion(times - lag)[:, ::-1] + noise)})
    assert report['episode']['lag_s'] == pytest.approx(lag, abs=0.005)
    if words:
        only(report, 'WARN', words)
    else:
        assert report['reasons'] == []


def test_motion_that_does_not_follow():
    joints = clean()['joints']
    times = (joints.stamps - START) / 1e9
    wrong = np.stack([0.3 * np.sin(0.9 * times), 0.4 * np.cos(3.1 * times + 1)], axis=-1)
    only(judge({'joints': replace(joints, samples=wrong)}), 'WARN', 'does not follow the commands')


def test_without_commands():
    """Under next_state the action is the measured motion, and no command need be recorded."""
    streams = clean()
    del streams['action']
    action = streams['joints'].samples[10:1980:10, ::-1]
    rows = rows_of(streams, action=np.concatenate([action, action[-1:]]))
    measured = replace(CONTRACT, action=replace(CONTRACT.action, label='next_state'))
    report = quality.assess(Recording(None, measured, streams, {}, (), (Span(),)), rows)
    assert report['reasons'] == [] and 'lag_s' not in report['episode'] and 'action' not in report['streams']


def test_facts_of_the_recording():
    only(judge(damage=['front.mcap ends at byte 17']), 'WARN', 'salvaged: front.mcap ends at byte 17')
    only(judge(about={'interrupted': 'true'}), 'WARN', 'interrupted')
    other = judge(about={'contract_hash': 'beef'})
    assert other['reasons'] == [] and other['contract_differs'], 'a fact, no fault'
    assert not judge(about={'contract_hash': CONTRACT.hash})['contract_differs']
    only(judge(warnings=('ticks are uneven',)), 'WARN', 'ticks are uneven')


def test_a_recording_that_gives_no_rows_is_judged_too():
    streams = clean()
    streams['wrist'] = without(streams['wrist'], np.ones(600, bool))
    report = quality.assess(Recording(None, CONTRACT, streams, {}, (), (Span(),)), None, 'E202 bag: silent')
    assert report['verdict'] == 'FAIL' and report['reasons'][0] == 'FAIL E202 bag: silent'
    assert report['reasons'][1] == 'FAIL wrist: no messages on /wrist/compressed' and report['rows'] == 0
    assert report['streams']['front']['rate_hz'] == pytest.approx(30)
    json.dumps(report, allow_nan=False)


def test_only_the_episodes_part_of_the_recording_counts():
    """Two episodes in one bag: what is wrong with the other one is not this one's."""
    front = clean()['front']
    streams = {'front': without(front, between(front, 12.4, 13.4))}
    rows = rows_of(clean())
    k = 100
    half = replace(rows, stamps=rows.stamps[:k], filled=rows.filled[:k], action=rows.action[:k], last=START + nanoseconds(10.5),
                   lowdim={name: values[:k] for name, values in rows.lowdim.items()},
                   ages={name: values[:k] for name, values in rows.ages.items()})
    assert judge(streams, rows=half)['reasons'] == []
    assert judge(streams, rows=half)['streams']['front']['n'] == 304


def table(T=200, fps=10.0) -> dict[str, np.ndarray]:
    """Rows of an imported episode: the action, and a state that follows it by a row."""
    times = np.arange(T) / fps
    action = motion(times).astype(np.float32)
    return {'stamp': nanoseconds(times), 'filled': np.zeros(T, bool), 'action': action,
            'pose': np.concatenate([action[:1], action[:-1]])}


INFO = DatasetInfo(10.0, {'pose': Feature((2,), 'lowdim', ('x', 'y'))}, ActionInfo(('x', 'y')), 'imported')


def test_rows_alone():
    report = quality.assess_rows(INFO, table())
    assert (report['verdict'], report['reasons'], report['streams']) == ('PASS', [], {})
    assert report['episode']['lag_s'] == pytest.approx(0.1, abs=0.01)
    json.dumps(report, allow_nan=False)
    only(quality.assess_rows(INFO, {**table(), 'filled': np.arange(200) > 180}), 'FAIL', '19 of 200 rows repeat')
    only(quality.assess_rows(INFO, {**table(), 'action': np.ones((200, 2))}), 'FAIL', 'the action never changes')
    stamps = table()['stamp'].copy()
    stamps[100:] += 3 * 10**8
    only(quality.assess_rows(INFO, {**table(), 'stamp': stamps}), 'WARN', '1 steps differ', 'at 9.90 s')
    nameless = replace(INFO, features={'pose': Feature((2,), 'lowdim')})
    assert quality.assess_rows(nameless, table())['episode'].get('lag_s') is None


def test_the_state_is_the_joints_positions():
    """Velocities have the same names."""
    features = {'velocity': Feature((2,), 'lowdim', ('a', 'b')), 'joints': Feature((2,), 'lowdim', ('a', 'b'))}
    values = {'velocity': np.zeros((3, 2)), 'joints': np.tile((1.0, 2.0), (3, 1))}
    info = DatasetInfo(10.0, features, ActionInfo(('b', 'a')), 'command', CONTRACT.to_dict(), CONTRACT.hash)
    np.testing.assert_array_equal(quality.state_of(info, values), np.tile((2.0, 1.0), (3, 1)))


def test_a_single_row_and_a_short_episode():
    for T in (1, 2, 5):
        short = {name: values[:T] for name, values in table().items()}
        json.dumps(quality.assess_rows(INFO, short), allow_nan=False)
