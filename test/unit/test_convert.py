from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from il_policies import cli
from il_policies.data.align import buffers, observation_at
from il_policies.data.convert import convert, dataset_info, summary_line
from il_policies.data.convert_bag import Options
from il_policies.data.decode import decode, stamp_of
from il_policies.data.errors import BagError, DataError
from il_policies.data.store import Dataset
from recordings import (
    CONTAINERS,
    MS,
    START,
    compressed,
    contract,
    joint_state,
    jpeg,
    picture,
    positions,
    recording,
    text,
    write_as,
    write_bag,
)

GOOD = {'success': 'true', 'task': 'reach'}


def single(tmp_path, messages, robot, options=None, **kwargs):
    """Convert one bag; the dataset and the report."""
    write_bag(tmp_path / 'bags' / 'one', messages, **{'custom': GOOD, **kwargs})
    (report,) = convert(tmp_path / 'bags', robot, tmp_path / 'out', options)
    return Dataset(tmp_path / 'out'), report


def seconds(table) -> np.ndarray:
    """Stamps of the rows, since START [s]."""
    return (table['stamp'] - START) / 1e9


@pytest.mark.parametrize('camera_rate', [10.0, 30.0, None])
def test_every_value_is_the_one_of_its_time(tmp_path, camera_rate):
    dataset, report = single(tmp_path, recording(3.0, rate=camera_rate or 10.0), contract(camera_rate=camera_rate))
    assert report.refused == '' and report.details['filled'] == 0
    table = dataset.lowdim(0)
    t = seconds(table)
    np.testing.assert_allclose(t, np.arange(30) / 10, atol=1e-9)
    np.testing.assert_allclose(table['joints'], positions(np.round(t, 6)), atol=1e-6)
    np.testing.assert_allclose(table['goal'], np.stack([0 * t + 0.25, t], 1), atol=1e-6)
    # command: first at or after the tick, 10 ms later here; columns in the order of the contract, b before a
    np.testing.assert_allclose(table['action'], np.stack([-(t + 0.01), t + 0.01], 1), atol=1e-6)
    episode = dataset.episodes[0]
    assert (episode['success'], episode['task'], episode['source'], episode['damage']) == (True, 'reach', 'one', [])
    if camera_rate:
        k = round(camera_rate / 10)
        for row in (0, 7, 29):
            np.testing.assert_allclose(dataset.image(0, 'front', row), 5 * k * row % 256, atol=1)


def test_labels(tmp_path):
    held, _ = single(tmp_path / 'hold', recording(2.0), contract('command_hold'))
    table = held.lowdim(0)
    assert seconds(table)[0] == pytest.approx(0.1)  # at 0 s nothing had been commanded
    np.testing.assert_allclose(table['action'][:, 1], seconds(table) - 0.01, atol=1e-6)
    following, _ = single(tmp_path / 'next', recording(2.0), contract('next_state'))
    table = following.lowdim(0)
    assert following.info.action.offset == pytest.approx(0.1) and len(table['stamp']) == 19
    np.testing.assert_allclose(table['action'][:-1, ::-1], table['joints'][1:], atol=1e-7)


def test_the_past_only(tmp_path):
    """Nothing sampled later than a tick may reach its observation: change the future, the row stays."""
    messages = recording(2.0)
    changed = [(topic, stamp, joint_state(stamp, ['a', 'b'], [7.0, 7.0])
                if topic == 'joint_states' and stamp > START + 1000 * MS else message) for topic, stamp, message in messages]
    a, _ = single(tmp_path / 'a', messages, contract())
    b, _ = single(tmp_path / 'b', changed, contract())
    np.testing.assert_array_equal(a.lowdim(0)['joints'][:11], b.lowdim(0)['joints'][:11])
    assert np.all(b.lowdim(0)['joints'][11:] == 7.0)


def test_live_buffers_give_the_same(tmp_path):
    """One alignment for both sides, down to what is stored, with history and on jittered frames."""
    robot = contract()
    frames = [START + i * 100 * MS + int(d) for i, d in enumerate(np.random.default_rng(0).integers(-2 * MS, 2 * MS, 30))]
    messages = recording(3.0, camera=frames)
    dataset, _ = single(tmp_path, messages, robot)
    table = dataset.lowdim(0)
    live = buffers(robot)
    first, row = None, 0
    for topic, _, message in messages:
        for name, stream in robot.observations.items():
            if stream.topic == topic:
                live[name].add(stamp_of(message, stream, None, None), decode(message, stream))
        if topic != 'camera/compressed' or live['front'].newest < table['stamp'][0]:
            continue
        now = live['front'].newest
        first = now if first is None else first
        got = observation_at(live, now, 3, 100 * MS, start=first, anchor='front')
        assert now == table['stamp'][row] and got.complete
        rows = [max(row + k, 0) for k in (-2, -1, 0)]
        np.testing.assert_array_equal(got.data['joints'].astype(np.float32), table['joints'][rows])
        np.testing.assert_array_equal(got.data['goal'].astype(np.float32), table['goal'][rows])
        np.testing.assert_array_equal(got.data['front'], [dataset.image(0, 'front', r) for r in rows])
        row += 1
    assert row == len(table['stamp'])


def test_the_same_messages_in_any_container(tmp_path):
    """Written by other libraries; stamps from headers, since SQLite keeps no others that are independent of it."""
    messages = recording(1.0)
    wanted = write_bag(tmp_path / 'ours', messages)
    (report,) = convert(wanted, contract(), tmp_path / 'out')
    assert not report.refused
    expected = Dataset(tmp_path / 'out')
    for container in CONTAINERS:
        name = container.replace(' ', '_')
        (report,) = convert(write_as(container, tmp_path / name, messages), contract(), tmp_path / f'out_{name}')
        assert not report.refused, f'{container}: {report.refused}'
        dataset = Dataset(tmp_path / f'out_{name}')
        assert dataset.hash == expected.hash, container
        assert (dataset.episodes[0]['success'], dataset.episodes[0]['task']) == (None, '')


@pytest.mark.parametrize('clock, shift', [('header', 0), ('publish', MS), ('receive', 2 * MS)])
def test_the_declared_clock_and_latency_count(tmp_path, clock, shift):
    dataset, _ = single(tmp_path, recording(2.0), contract(clock=clock, latency=0.0005))
    offset = (dataset.lowdim(0)['stamp'] - START) % (100 * MS)
    assert set(offset.tolist()) == {(shift - MS // 2) % (100 * MS)}


def test_a_clock_that_was_not_recorded_is_an_error(tmp_path):
    bag = write_as('db3', tmp_path / 'bag', recording(0.5))
    (report,) = convert(bag, contract(clock='publish'), tmp_path / 'out')
    assert re.match(r'E204 .*camera/compressed: clock is publish, but the message carries no such stamp', report.refused)


def between(topic, begin, end):
    """Drop a topic in a span [s]."""
    return lambda name, t: name != topic or not begin * 1e9 <= t < end * 1e9


@pytest.mark.parametrize('topic, begin, end, rows', [
    ('joint_states', 1.05, 1.25, [11, 12]),  # 0.05 s of age allowed, the last sample is of 1.04 s
    ('camera/compressed', 1.05, 1.25, [11, 12]),  # two frames lost
    ('command', 1.05, 1.35, [12]),  # 0.1 s allowed, the last command is of 1.03 s, the next of 1.35 s
])
def test_short_gaps_are_repeated_and_flagged(tmp_path, topic, begin, end, rows):
    dataset, report = single(tmp_path, recording(3.0), contract(), keep=between(topic, begin, end))
    table = dataset.lowdim(0)
    assert report.refused == ''
    assert np.flatnonzero(table['filled']).tolist() == rows
    np.testing.assert_allclose(np.diff(table['stamp']), 100 * MS, atol=5)  # time is not compressed
    if topic == 'camera/compressed':
        for row, frame in ((10, 10), (11, 10), (12, 10), (13, 13)):
            np.testing.assert_allclose(dataset.image(0, 'front', row), 5 * frame, atol=1)
    if topic == 'joint_states':
        np.testing.assert_array_equal(table['joints'][12], table['joints'][11])


@pytest.mark.parametrize('topic, begin, end, words', [
    ('joint_states', 1.05, 1.65, 'E206 .*one: gap of 0.61 s on joint_states at 1.04 s, more than the 2 ticks'),
    ('camera/compressed', 1.05, 1.35, 'E206 .*one: gap of 0.40 s on camera/compressed at 1.00 s'),
    ('command', 1.05, 1.75, 'E206 .*one: gap of 0.72 s on command at 1.03 s'),
    ('joint_states', 2.0, 9.0, r'E202 .*one: joint_states falls silent for the last 0.9\d s'),
    ('goal', 0.0, 9.0, 'E202 .*one: no messages on goal'),
])
def test_long_gaps_refuse_the_episode(tmp_path, topic, begin, end, words):
    dataset, report = single(tmp_path, recording(3.0), contract(), keep=between(topic, begin, end))
    assert len(dataset) == 0 and report.index is None
    assert re.match(words, report.refused), report.refused


def test_long_gaps_split_the_episode(tmp_path):
    write_bag(tmp_path / 'bags/one', recording(3.0), custom=GOOD, keep=between('camera/compressed', 1.05, 1.65))
    reports = convert(tmp_path / 'bags', contract(), tmp_path / 'out', Options(gaps='split'))
    dataset = Dataset(tmp_path / 'out')
    assert [(report.index, report.refused) for report in reports] == [(0, ''), (1, '')]
    assert [seconds(dataset.lowdim(i))[[0, -1]].round(6).tolist() for i in (0, 1)] == [[0.0, 1.0], [1.7, 2.9]]
    np.testing.assert_allclose(dataset.image(1, 'front', 0), 5 * 17, atol=1)
    assert [episode['task'] for episode in dataset.episodes] == ['reach', 'reach']
    assert all('gap of 0.70 s on camera/compressed at 1.00 s' in report.details['warnings'] for report in reports)
    again = convert(tmp_path / 'bags', contract(), tmp_path / 'out', Options(gaps='split'))
    assert [report.kept for report in again] == [True, True] and Dataset(tmp_path / 'out').hash == dataset.hash


def test_marks_make_the_episodes(tmp_path):
    marks = [(0.5, 'start pick'), (1.2, 'success'), (1.4, 'start pick'), (1.6, 'discard'), (1.7, 'start place'), (2.6, 'failure')]
    messages = recording(3.0) + [('episode', START + round(t * 1000) * MS, text(mark)) for t, mark in marks]
    messages.sort(key=lambda entry: entry[1])
    write_bag(tmp_path / 'bags/one', messages, keep=between('joint_states', 1.35, 1.68))
    renamed = [(topic, t, text('start grasp') if message == text('start pick') else message) for topic, t, message in messages]
    write_bag(tmp_path / 'bags/two', renamed, keep=between('joint_states', 2.0, 2.5))
    reports = convert(tmp_path / 'bags', contract(), tmp_path / 'out', Options(markers='episode'))
    dataset = Dataset(tmp_path / 'out')
    assert [(r.index, os.path.basename(r.bag)) for r in reports] == [(0, 'one'), (1, 'one'), (2, 'two'), (None, 'two')]
    assert [(e['task'], e['success']) for e in dataset.episodes] == [('pick', True), ('place', False), ('grasp', True)]
    assert [seconds(dataset.lowdim(i))[[0, -1]].round(6).tolist() for i in range(3)] == [[0.5, 1.2], [1.7, 2.6], [0.5, 1.2]]
    assert re.match(r'E206 .*two, episode marked at 1\.70 s: gap of 0\.51 s on joint_states at 0\.29 s', reports[3].refused)
    again = convert(tmp_path / 'bags', contract(), tmp_path / 'out', Options(markers='episode'))
    assert [(r.kept, r.refused) for r in again] == [(True, '')] * 3 + [(False, reports[3].refused)], 'it is told again'


def test_what_precedes_and_follows_the_commands_is_left_out(tmp_path):
    dataset, report = single(tmp_path, recording(3.0), contract(),
                             keep=lambda topic, t: topic != 'command' or 0.95e9 < t < 2.05e9)
    assert seconds(dataset.lowdim(0))[[0, -1]].tolist() == pytest.approx([0.9, 2.1])
    assert report.details['head_s'] == pytest.approx(0.9)


def test_frames_out_of_order(tmp_path):
    messages = recording(2.0)
    frames = [i for i, (topic, *_) in enumerate(messages) if topic == 'camera/compressed']
    a, b = frames[4], frames[5]
    messages[a], messages[b] = messages[b], messages[a]
    # the bag sorts by arrival, so the later of the two stamps must arrive first
    messages = [(topic, START + i * 4 * MS, message) for i, (topic, _, message) in enumerate(messages)]
    dataset, report = single(tmp_path, messages, contract())
    assert report.details['streams']['front']['out_of_order'] == 1
    for row in range(20):
        np.testing.assert_allclose(dataset.image(0, 'front', row), 5 * row, atol=1)


def camera_files(messages, files):
    """The recording with frame i replaced by the file files(i, its own), if that is not None."""
    changed, i = [], 0
    for topic, stamp, message in messages:
        if topic == 'camera/compressed':
            data = files(i, bytes(message.data))
            message, i = (message if data is None else compressed(stamp, data)), i + 1
        changed.append((topic, stamp, message))
    return changed


@pytest.mark.parametrize('rate, broken, filled', [(10.0, {4}, [4]), (10.0, {4, 5, 17}, [4, 5, 17]), (30.0, {12, 29}, []),
                                                  (30.0, set(range(11, 15)), [4])])
def test_frames_that_cannot_be_decoded_count_as_lost(tmp_path, rate, broken, filled):
    """At 30 Hz another frame serves the tick, unless it is broken, too; at 10 Hz the one before is repeated, flagged."""
    messages = camera_files(recording(2.0, rate=rate), lambda i, data: data[:len(data) // 2] if i in broken else None)
    dataset, report = single(tmp_path, messages, contract(camera_rate=rate))
    assert report.refused == '' and len(dataset.lowdim(0)['stamp']) == 20
    assert np.flatnonzero(dataset.lowdim(0)['filled']).tolist() == filled
    assert 0 < report.details['streams']['front']['undecodable'] <= len(broken)
    k = round(rate / 10)
    for row, t in enumerate(dataset.lowdim(0)['stamp'].tolist()):
        usable = [i for i in range(row * k + 2) if i not in broken and START + round(i * 1000 * MS / rate) <= t]
        np.testing.assert_allclose(dataset.image(0, 'front', row), 5 * usable[-1] % 256, atol=1)


def test_a_camera_without_usable_frames_is_refused(tmp_path):
    _, report = single(tmp_path / 'a', camera_files(recording(1.0), lambda i, data: b'no image'), contract())
    assert re.match("E208 .*one: camera/compressed, format 'jpeg': 8 bytes", report.refused), report.refused
    _, report = single(tmp_path / 'b', camera_files(recording(1.0), lambda i, data: b'' if 2 < i < 6 else None), contract())
    assert 'E206' in report.refused and 'gap of 0.40 s on camera/compressed at 0.20 s' in report.refused
    assert list((tmp_path / 'b/out').iterdir()) == [tmp_path / 'b/out/dataset.json', tmp_path / 'b/out/episodes']


@pytest.mark.parametrize('images', ['jpeg95', 'passthrough'])
def test_images_of_another_size(tmp_path, images):
    large = jpeg(picture(90, (30, 50)))
    dataset, _ = single(tmp_path, camera_files(recording(1.0), lambda i, data: large), contract(), Options(images=images))
    assert dataset.image(0, 'front', 3).shape == (8, 12, 3)
    np.testing.assert_allclose(dataset.image(0, 'front', 3), 90, atol=1)
    assert (dataset.encoded(0, 'front', 3) == large) == (images == 'passthrough')


def test_resumes_and_keeps_the_order_of_the_bags(tmp_path):
    for name in ('bag_1', 'bag_2', 'bag_10'):
        write_bag(tmp_path / 'bags' / name, recording(0.8), custom={**GOOD, 'task': name})
    shares = []
    first = convert(tmp_path / 'bags', contract(), tmp_path / 'out', progress=lambda share, refused: shares.append(share))
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares) and len(shares) >= 4
    assert [e['source'] for e in Dataset(tmp_path / 'out').episodes] == ['bag_1', 'bag_2', 'bag_10']
    again = convert(tmp_path / 'bags', contract(), tmp_path / 'out')
    assert [r.kept for r in again] == [True] * 3 and [r.details for r in again] == [r.details for r in first]
    # one more, labelled otherwise, in between; the others move, and are not converted again
    write_bag(tmp_path / 'bags' / 'bag_5', recording(0.8), custom={'success': 'false'})
    more = convert(tmp_path / 'bags', contract(), tmp_path / 'out')
    assert [(r.index, r.kept) for r in more] == [(0, True), (1, True), (2, False), (3, True)]
    dataset = Dataset(tmp_path / 'out')
    assert [(e['source'], e['success']) for e in dataset.episodes] == [('bag_1', True), ('bag_2', True), ('bag_5', False),
                                                                       ('bag_10', True)]
    fresh = convert(tmp_path / 'bags', contract(), tmp_path / 'fresh')
    assert Dataset(tmp_path / 'fresh').hash == dataset.hash and len(fresh) == 4
    # fewer: nothing is removed unless asked for
    given = [tmp_path / 'bags' / name for name in ('bag_10', 'bag_1', 'bag_2')]
    with pytest.raises(DataError, match=r'E301 .*out: holds episodes of other bags \(bag_5\); .* --prune'):
        convert(given, contract(), tmp_path / 'out')
    assert Dataset(tmp_path / 'out').hash == dataset.hash
    last = convert(given, contract(), tmp_path / 'out', prune=True)
    assert [r.kept for r in last] == [True] * 3
    assert [e['source'] for e in Dataset(tmp_path / 'out').episodes] == ['bag_10', 'bag_1', 'bag_2']
    convert(given, contract(), tmp_path / 'three')
    assert Dataset(tmp_path / 'out').hash == Dataset(tmp_path / 'three').hash
    # another day's bag of the same name is another bag
    write_bag(tmp_path / 'day_2/bag_1', recording(0.9))
    with pytest.raises(DataError, match=r'holds episodes of other bags \(bag_1, bag_10, bag_2\)'):
        convert(tmp_path / 'day_2', contract(), tmp_path / 'out')
    # the same bags elsewhere are the same bags
    os.rename(tmp_path / 'bags', tmp_path / 'moved')
    assert [r.kept for r in convert([tmp_path / 'moved' / bag.name for bag in given], contract(), tmp_path / 'out')] == [True] * 3
    with pytest.raises(DataError, match='another contract'):
        convert(tmp_path / 'moved', contract(latency=0.01), tmp_path / 'out')
    with pytest.raises(BagError, match='E102 no bags given'):
        convert([], contract(), tmp_path / 'out')


def test_what_changes_an_episode_makes_it_anew(tmp_path):
    bag = write_bag(tmp_path / 'bags/one', recording(0.8), custom=GOOD)

    def kept(**options) -> bool:
        (report,) = convert(bag, contract(), tmp_path / 'out', Options(**options))
        return report.kept

    assert [kept(), kept(), kept(salvage=True), kept(images='passthrough'), kept(images='passthrough')] == [
        False, True, True, False, True]
    metadata = bag / 'metadata.yaml'
    metadata.write_text(metadata.read_text().replace("success: 'true'", "success: 'false'"))
    assert not kept(images='passthrough') and Dataset(tmp_path / 'out').episodes[0]['success'] is False
    shutil.rmtree(bag)
    write_bag(bag, recording(0.9), custom=GOOD)  # the same name, recorded again
    assert not kept() and len(Dataset(tmp_path / 'out').lowdim(0)['stamp']) == 9


@pytest.mark.parametrize('state', ['moved aside', 'made, not placed', 'in the midst', 'a part of a bag'])
def test_goes_on_after_a_crash(tmp_path, state):
    """Whatever a crash leaves: nothing is lost, done twice, or left over."""
    for name in ('a', 'b', 'c'):
        write_bag(tmp_path / 'bags' / name, recording(1.2), custom={**GOOD, 'task': name},
                  keep=between('camera/compressed', 0.35, 0.75))
    options = Options(gaps='split')
    convert(tmp_path / 'bags', contract(), tmp_path / 'out', options)
    expected = Dataset(tmp_path / 'out')
    assert len(expected) == 6
    episodes, staging = tmp_path / 'out/episodes', tmp_path / 'out/.converting'
    (staging / 'made-x').mkdir(parents=True)
    kept = 6
    if state == 'moved aside':
        os.rename(episodes / '000000', staging / 'made-x/0')
    elif state == 'made, not placed':
        os.rename(episodes / '000005', staging / 'made-x/1')
        os.rename(episodes / '000004', staging / 'made-x/0')
    elif state == 'in the midst':
        shutil.copytree(episodes / '000005', staging / 'work-x/0')
        (staging / 'work-x/0/episode.json').unlink()
        shutil.copytree(episodes / '000005', staging / 'made-x/0')  # made twice
    else:
        shutil.rmtree(episodes / '000003')
        kept = 4
    reports = convert(tmp_path / 'bags', contract(), tmp_path / 'out', options)
    dataset = Dataset(tmp_path / 'out')
    assert dataset.hash == expected.hash and [e['source'] for e in dataset.episodes] == list('aabbcc')
    assert sum(report.kept for report in reports) == kept and [report.index for report in reports] == list(range(6))
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['dataset.json', 'episodes']
    assert sorted(path.name for path in episodes.iterdir()) == [f'{i:06d}' for i in range(6)]


def test_a_bag_that_cannot_be_read_today_costs_nothing(tmp_path):
    for name in ('a', 'b'):
        write_bag(tmp_path / 'bags' / name, recording(0.8), custom={**GOOD, 'task': name})
    convert(tmp_path / 'bags', contract(), tmp_path / 'out')
    before = Dataset(tmp_path / 'out')
    file = tmp_path / 'bags/a/a_0.mcap'
    whole = file.read_bytes()
    file.write_bytes(whole[:-3000])
    refused, kept = convert(tmp_path / 'bags', contract(), tmp_path / 'out')
    assert re.match(r'E101 .*a_0\.mcap.*\(what an earlier run made of it stays\)$', refused.refused), refused.refused
    assert (kept.index, kept.kept) == (1, True) and Dataset(tmp_path / 'out').hash == before.hash
    refused, kept = convert(tmp_path / 'bags', contract(), tmp_path / 'out', prune=True)
    assert 'earlier' not in refused.refused and (kept.index, len(Dataset(tmp_path / 'out'))) == (0, 1)


def test_damaged_bags_are_used_only_if_asked_and_labelled(tmp_path):
    bag = write_bag(tmp_path / 'bags/one', recording(2.0), custom=GOOD)
    file = bag / 'one_0.mcap'
    file.write_bytes(file.read_bytes()[:-15000])
    write_bag(tmp_path / 'bags/two', recording(0.8), custom=GOOD)
    os.rename(tmp_path / 'bags/two', tmp_path / 'bags/two.part')
    (tmp_path / 'bags/two.part/metadata.yaml').unlink()
    (report,) = convert(tmp_path / 'bags', contract(), tmp_path / 'out')
    assert re.match(r'E101 .*one_0\.mcap: .* usable: rerun with --salvage', report.refused), report.refused
    one, two = convert(tmp_path / 'bags', contract(), tmp_path / 'out', Options(salvage=True))
    dataset = Dataset(tmp_path / 'out')
    assert not one.refused and not two.refused and two.bag.endswith('two.part')
    assert dataset.episodes[0]['damage'] and dataset.episodes[1]['source'] == 'two'
    assert one.details['verdict'] != 'PASS' and any('salvaged' in reason for reason in one.details['reasons'])
    t = seconds(dataset.lowdim(0))
    assert 5 < len(t) < 20
    np.testing.assert_allclose(dataset.lowdim(0)['joints'], positions(np.round(t, 6)), atol=1e-6)
    (report,) = convert(tmp_path / 'bags/one', contract(), tmp_path / 'out', prune=True)
    assert report.refused and len(Dataset(tmp_path / 'out')) == 0, 'without --salvage it is not used'


def test_the_same_recording_twice_is_used_once(tmp_path):
    write_bag(tmp_path / 'a/one', recording(0.8))
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    reports = convert([tmp_path / 'a', tmp_path / 'b', tmp_path / 'a/one'], contract(), tmp_path / 'out')
    assert len(reports) == 2 and not reports[0].refused
    assert reports[1].refused == f'E303 {tmp_path / "b/one"}: the same recording as {tmp_path / "a/one"}'


def test_a_copy_under_another_name_is_refused(tmp_path):
    messages = recording(0.8)
    for name in ('one', 'two'):
        write_bag(tmp_path / 'bags' / name, messages)
    told = []
    reports = convert(tmp_path / 'bags', contract(), tmp_path / 'out', progress=lambda share, refused: told.extend(refused))
    reason = f'E303 {tmp_path / "bags/two"}: the same recording as {tmp_path / "bags/one"}'
    assert [report.refused for report in reports] == ['', reason] and told == [reason]
    assert [meta['source'] for meta in Dataset(tmp_path / 'out').episodes] == ['one']


def flip(file) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def change_value(file) -> None:
    table = pq.read_table(file)
    column = table.column_names.index('filled')
    pq.write_table(table.set_column(column, 'filled', [pc.invert(table['filled'])]), file)


@pytest.mark.parametrize('name, damage', [
    ('images/front.mjpeg', flip), ('images/front.mjpeg', lambda file: file.write_bytes(file.read_bytes()[:-1])),
    ('images/front.mjpeg', os.remove), ('lowdim.parquet', change_value),
    ('lowdim.parquet', lambda file: file.write_bytes(b'PAR1')),
    ('report.json', lambda file: file.write_text('{')), ('episode.json', os.remove),
    ('episode.json', lambda file: file.write_text(file.read_text().replace('"length": 8', '"length": "8"'))),
    ('episode.json', lambda file: file.write_text(file.read_text().replace('"key"', '"other"')))])
def test_damaged_episodes_are_made_anew(tmp_path, name, damage):
    bag = write_bag(tmp_path / 'one', recording(0.8), custom=GOOD)
    convert(bag, contract(), tmp_path / 'out')
    before, file = Dataset(tmp_path / 'out').hash, tmp_path / 'out/episodes/000000' / name
    whole = file.read_bytes()
    damage(file)
    assert not file.exists() or file.read_bytes() != whole
    (report,) = convert(bag, contract(), tmp_path / 'out', prune=True)
    assert not report.refused and not report.kept
    assert Dataset(tmp_path / 'out').hash == before and file.read_bytes()[:4] == whole[:4]
    Dataset(tmp_path / 'out').verify(0)


def test_backups_beside_the_episodes_are_left_alone(tmp_path):
    bag = write_bag(tmp_path / 'one', recording(0.8), custom=GOOD)
    convert(bag, contract(), tmp_path / 'out')
    for name in ('000001_backup', '7backup'):
        shutil.copytree(tmp_path / 'out/episodes/000000', tmp_path / 'out/episodes' / name)
    (report,) = convert(bag, contract(), tmp_path / 'out')
    assert report.kept and len(Dataset(tmp_path / 'out')) == 1
    assert (tmp_path / 'out/episodes/7backup').is_dir()


def test_a_wrong_contract_does_not_block_the_right_one(tmp_path):
    bag = write_bag(tmp_path / 'one', recording(0.8, rate=30.0), custom=GOOD, keep=lambda topic, t: topic != 'goal')
    (refused,) = convert(bag, contract(), tmp_path / 'out')
    assert refused.refused
    (again,) = convert(bag, contract(latency=0.01), tmp_path / 'out')
    assert again.refused and Dataset(tmp_path / 'out').info == dataset_info(contract(latency=0.01))


def test_the_contract_inside(tmp_path):
    robot, other = contract(camera_rate=None), contract(camera_rate=None, fps=20.0)
    write_bag(tmp_path / 'bags/a', recording(0.8), about={'contract': json.dumps(robot.to_dict())})
    (report,) = convert(tmp_path / 'bags', None, tmp_path / 'out')
    assert not report.refused and Dataset(tmp_path / 'out').info.contract_hash == robot.hash
    write_bag(tmp_path / 'bags/b', recording(0.8), about={'contract': json.dumps(other.to_dict())})
    with pytest.raises(DataError, match=r'E212 .*a and .*b were recorded under different contracts \(policy_rate: 10.0 ≠ 20.0\)'):
        convert(tmp_path / 'bags', None, tmp_path / 'out')
    write_bag(tmp_path / 'none/c', recording(0.8))
    with pytest.raises(DataError, match='E212 .*c: no contract inside; give one with --contract'):
        convert(tmp_path / 'none', None, tmp_path / 'out')
    write_bag(tmp_path / 'old/d', recording(0.8), about={'contract': json.dumps({**robot.to_dict(), 'rate': 3})})
    with pytest.raises(DataError, match='E212 contract in .*d: rate is not a known key'):
        convert(tmp_path / 'old', None, tmp_path / 'out')


def test_two_at_a_time_are_refused(tmp_path):
    bag = write_bag(tmp_path / 'one', recording(0.8))
    convert(bag, contract(), tmp_path / 'out')
    descriptor = os.open(tmp_path / 'out', os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    aside = tmp_path / 'out/episodes/.000000.old'  # what the other one is just replacing
    os.rename(tmp_path / 'out/episodes/000000', aside)
    with pytest.raises(DataError, match='E301 .*out: is being written by another il convert'):
        convert(bag, contract(), tmp_path / 'out')
    assert aside.is_dir()
    os.close(descriptor)
    convert(bag, contract(), tmp_path / 'out')


def test_a_disk_that_refuses_is_no_bad_bag(tmp_path):
    """A limit on the size of files stands for a full disk: the conversion ends, and goes on when there is room."""
    bag = write_bag(tmp_path / 'one', recording(2.0), custom=GOOD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match='File too large'):
            convert(bag, contract(), tmp_path / 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(Dataset(tmp_path / 'out')) == 0
    (report,) = convert(bag, contract(), tmp_path / 'out')
    assert not report.refused and len(Dataset(tmp_path / 'out')) == 1


@pytest.fixture
def il(tmp_path, capsys):
    """il(*arguments) → exit code, stdout, stderr, with the contract in a file."""
    (tmp_path / 'robot.yaml').write_text(json.dumps(contract().to_dict()))

    def run(*arguments):
        try:
            cli.main([str(argument) for argument in (*arguments, '--contract', tmp_path / 'robot.yaml')])
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return run


def test_exit_codes_and_output(il, tmp_path):
    out = tmp_path / 'out'
    write_bag(tmp_path / 'bags/a', recording(1.0), custom=GOOD)
    write_bag(tmp_path / 'bags/b', recording(1.0), custom={'success': 'false'}, keep=between('camera/compressed', 0.45, 0.55))
    code, stdout, stderr = il('convert', tmp_path / 'bags/a', tmp_path / 'bags/b', '--out', out)
    assert code == 0 and stdout == f'{out}: {summary_line(convert(tmp_path / "bags", contract(), out))}\n'
    assert re.search(rf'^episode 1 \({tmp_path}/bags/b\): WARN .*10 %', stderr, re.M), stderr
    write_bag(tmp_path / 'bags/c', recording(1.0), custom=GOOD, keep=between('goal', 0, 9))
    code, stdout, stderr = il('convert', tmp_path / 'bags', '--out', out)
    assert code == 1 and stdout.endswith('1 refused\n')
    assert re.search(rf'^refused: E202 {tmp_path}/bags/c: no messages on goal$', stderr, re.M), stderr
    code, _, stderr = il('convert', tmp_path / 'bags/c', '--out', tmp_path / 'new')
    assert code == 2 and 'refused' in stderr
    os.rename(tmp_path / 'bags/c', tmp_path / 'bags/c.part')
    code, _, stderr = il('convert', tmp_path / 'bags', '--out', out)
    assert code == 0 and f'left out, cut short while being recorded: {tmp_path}/bags/c.part; use them with --salvage' in stderr
    for arguments, words in (((tmp_path / 'absent', '--out', out), 'il: E102 .*absent: no such file'),
                             ((tmp_path / 'bags', '--out', tmp_path), 'il: .*exists and is no dataset'),
                             ((tmp_path / 'bags/a', '--out', out), 'il: E301 .*holds episodes of other bags')):
        code, stdout, stderr = il('convert', *arguments)
        assert code == 2 and stdout == '' and re.match(words, stderr) and len(stderr.splitlines()) == 1, stderr


def test_summary(tmp_path):
    write_bag(tmp_path / 'bags/a', recording(2.0), custom=GOOD)
    write_bag(tmp_path / 'bags/b', recording(2.0), custom={'success': 'false'}, keep=between('camera/compressed', 1.05, 1.25))
    write_bag(tmp_path / 'bags/c', recording(2.0), custom=GOOD, keep=between('goal', 0, 9))
    reports = convert(tmp_path / 'bags', contract(), tmp_path / 'out')
    verdicts = [report.details['verdict'] for report in reports[:2]]
    assert reports[1].details['filled_share'] == pytest.approx(0.1)
    assert summary_line(reports[1:]) == (
        '1 episodes, 20 rows, 10 % filled, 2 messages lost, 1 gaps, oldest sample 200 ms, 1 not labelled a success, '
        f'1 {verdicts[1]}, 1 refused')
    assert summary_line(reports).startswith('2 episodes, 40 rows, 5 % filled, 2 messages lost, 1 gaps')
    allowed = json.loads(json.dumps(reports[1].details))
    for stream in allowed['streams'].values():
        stream['lost_allowed'] = 0.5
    assert ', 0 messages lost, 0 gaps,' in summary_line([replace(reports[1], details=allowed)])
    assert summary_line([]) == '0 episodes, 0 rows, 0 refused'
    details = reports[0].details['streams']['joints']
    assert details['n'] == 200 and details['rate_hz'] == pytest.approx(100.0) and details['gaps'] == 0
    assert dataset_info(contract()).features['joints'].names == ('a', 'b')


def test_in_parallel(tmp_path):
    """As a user runs it: the order is that of the bags though the first is the longest, and one is refused.

    A worker that is killed costs its bag, no more.
    """
    (tmp_path / 'robot.yaml').write_text(json.dumps(contract().to_dict()))
    for name, length in (('a', 20.0), ('b', 0.8), ('c', 0.9), ('d', 1.0)):
        write_bag(tmp_path / 'bags' / name, recording(length), custom=GOOD,
                  keep=between('goal', 0, 9) if name == 'c' else lambda *_: True)
    arguments = [tmp_path / 'bags', '--contract', tmp_path / 'robot.yaml', '--out', tmp_path / 'out', '--jobs', 2]
    result = subprocess.run([sys.executable, '-m', 'il_policies.cli', 'convert', *map(str, arguments)], capture_output=True,
                            text=True, timeout=60)
    assert result.returncode == 1 and 'E202' in result.stderr and 'Traceback' not in result.stderr, result.stderr
    reports = convert(tmp_path / 'bags', contract(), tmp_path / 'one', jobs=1)
    dataset = Dataset(tmp_path / 'out')
    assert [e['source'] for e in dataset.episodes] == ['a', 'b', 'd'] and dataset.hash == Dataset(tmp_path / 'one').hash
    assert [dataset.report(i) for i in range(3)] == [report.details for report in reports if not report.refused]
