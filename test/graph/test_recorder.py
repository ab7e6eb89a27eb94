from __future__ import annotations

import signal
import struct
import time

import numpy as np
import pytest
import yaml
from mcap.exceptions import EndOfFile
from mcap.stream_reader import StreamReader
from rosbags.highlevel import AnyReader

from il_policies.contract import load_contract
from il_policies.data.bag import bag_info, read_bag
from il_policies.data.convert import convert
from il_policies.data.store import Dataset
from robot import SIM_START, Robot, stamp_of
from support import ROOT, call, wait_for

CONTRACT = ROOT / 'config/robots/so101.yaml'


@pytest.fixture
def robot(node):
    robots = []
    yield lambda speed=None: robots.append(Robot(node, CONTRACT, speed)) or robots[-1]
    for robot in robots:
        robot.stop()


def start(node, name='', task='reach the goal'):
    from il_msgs.srv import StartEpisode

    return call(node, StartEpisode, 'recorder/start_episode', StartEpisode.Request(name=name, task=task))


def stop(node, discard=False, succeeded=True):
    from il_msgs.srv import StopEpisode

    return call(
        node, StopEpisode, 'recorder/stop_episode', StopEpisode.Request(discard=discard, task_succeeded=succeeded)
    )


def started(node, name=''):
    """An episode begun as soon as the recorder has seen every stream."""
    return wait_for(lambda: (answer := start(node, name)).success and answer, what='a recording')


def record(node, seconds: float):
    answer = started(node)
    begin = time.monotonic()
    time.sleep(seconds)
    end = stop(node)
    assert end.success and end.path == answer.path
    return answer.path, time.monotonic() - begin


def test_records_what_was_sent_and_converts(nodes, node, robot, tmp_path):
    robot = robot()
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    path, _ = record(node, 2.5)
    messages = list(read_bag(path))
    for topic, sent in robot.sent.items():
        # sorted: a reliable message that was sent again arrives after its successors
        stamps = sorted(stamp_of(m) for name, _, _, _, m in messages if name == topic)
        assert len(stamps) > 20
        assert stamps == [s for s in sent if stamps[0] <= s <= stamps[-1]], f'{topic}: nothing lost, nothing twice'
    # source before receipt, both on the clock of the stamps
    delays = 1e-9 * np.array(
        [(published - stamp_of(m), received - published) for _, _, received, published, m in messages]
    )
    assert delays.min() > -1e-3 and np.median(delays) < 0.01 and delays.max() < 0.5
    information = bag_info(path)
    assert path.endswith('episode_000000')
    assert information['custom_data']['contract_hash'] == load_contract(CONTRACT).hash
    assert (information['custom_data']['success'], information['custom_data']['task']) == ('true', 'reach the goal')
    # what rosbag2 would have noted: the hash and the QoS on offer
    for entry in information['topics_with_message_count']:
        about = entry['topic_metadata']
        for offered in node.get_publishers_info_by_topic(about['name']):
            assert str(offered.topic_type_hash) == about['type_description_hash']
        if about['name'] == '/joint_states':
            assert [p['reliability'] for p in about['offered_qos_profiles']] == ['best_effort']
    with AnyReader([tmp_path / 'bags/episode_000000']) as reader:
        assert reader.message_count == len(messages)

    (report,) = convert(tmp_path / 'bags', load_contract(CONTRACT), tmp_path / 'dataset')
    assert not report.refused, report.refused
    table = Dataset(tmp_path / 'dataset').lowdim(0)
    assert len(table['stamp']) >= 22
    answered = table['stamp'] + (table['action'][:, 0] - table['joint_positions'][:, 0]) / 1e-3 * 5e6
    assert np.all(np.abs(answered - table['stamp']) < 60e6), 'commands answer their observation'


def test_simulated_time_four_times_as_fast(nodes, node, robot, tmp_path):
    robot = robot(speed=4.0)
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags', use_sim_time=True)
    path, wall = record(node, 1.5)
    for _, _, received, published, message in read_bag(path):
        age = received - stamp_of(message)
        assert published == received and received > SIM_START and abs(age) < 2e9, 'one clock, the simulated one'
    stamps = {topic: sorted(stamp_of(m) for _, _, _, _, m in read_bag(path, [topic])) for topic in robot.sent}
    for topic, kept in stamps.items():
        assert kept == [s for s in robot.sent[topic] if kept[0] <= s <= kept[-1]], f'{topic}: nothing lost'
    span = (stamps['/joint_states'][-1] - stamps['/joint_states'][0]) / 1e9
    assert span > 2.5 * wall, 'ran faster than real time'


def test_refusals(nodes, node, robot, tmp_path):
    robot = robot()
    not_required = {'/teleop', '/forward_position_controller/commands', '/chunks', '/task_status', '/controller/status'}
    robot.silent = {'/goal', *not_required}
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    answer = wait_for(
        lambda: (a := start(node)).message.startswith('silent: /goal (') and a, what='only the goal to be silent'
    )
    assert 'never seen, 1 publishers' in answer.message and not answer.success
    assert not stop(node).success
    robot.silent = not_required
    started(node, 'first')
    assert start(node, 'second').message == 'first is being recorded; stop it first'
    assert stop(node).success
    assert 'exists already' in start(node, 'first').message
    for name in ('../up', 'a/b', 'x.part'):
        assert 'is no name for a bag' in start(node, name).message
    started(node, 'dropped')
    assert stop(node, discard=True).message == 'discarded'
    started(node, 'failed')
    stop(node, succeeded=False)
    assert sorted(p.name for p in (tmp_path / 'bags').iterdir()) == ['failed', 'first']
    assert (
        yaml.safe_load((tmp_path / 'bags/failed/metadata.yaml').read_text())['rosbag2_bagfile_information'][
            'custom_data'
        ]['success']
        == 'false'
    )


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_it_completes_the_bag(nodes, node, robot, tmp_path, number):
    robot()
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    path = started(node).path
    time.sleep(0.5)
    assert nodes.stop('recorder_node', number) == 0
    custom = bag_info(path)['custom_data']
    assert (custom['interrupted'], custom['success']) == ('true', 'unknown')
    assert len(list(read_bag(path))) > 50


def test_killed_it_leaves_readable_chunks(nodes, node, robot, tmp_path):
    robot()
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    started(node, 'killed')
    time.sleep(2.5)
    nodes.stop('recorder_node', signal.SIGKILL)
    read = 0
    with open(tmp_path / 'bags/killed.part/killed_0.mcap', 'rb') as file:
        with pytest.raises((EndOfFile, struct.error)):
            for record in StreamReader(file, validate_crcs=True).records:
                read += type(record).__name__ == 'Message'
    assert read > 100


def test_what_cannot_be_used_is_one_clear_line(nodes, tmp_path):
    for contract, output, words in (
        ('nowhere.yaml', tmp_path / 'bags', 'nowhere.yaml: no such file'),
        (CONTRACT, '/proc/none', '/proc/none'),
    ):
        assert nodes.start('recorder_node', contract=contract, output=output).wait(20) == 2
        log = nodes.log('recorder_node')
        assert words in log and 'Traceback' not in log
