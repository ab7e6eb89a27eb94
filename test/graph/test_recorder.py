from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import yaml
from mcap.exceptions import EndOfFile
from mcap.records import Message, Metadata
from mcap.stream_reader import StreamReader
from rosbags.highlevel import AnyReader

from il_policies.bags.reader import Bag
from il_policies.contract import load_contract
from il_policies.data.store import Dataset
from robot import SIM_START, Robot, stamp_of
from support import ROOT, call, wait_for

CONTRACT = ROOT / 'config/robots/so101.yaml'
S = 10**9
NOT_REQUIRED = {'/teleop', '/forward_position_controller/commands', '/chunks', '/task_status', '/controller/status', '/command'}


@pytest.fixture
def robot(node):
    robots = []

    def make(contract=CONTRACT, **settings):
        robots.append(Robot(node, contract, **settings))
        return robots[-1]

    yield make
    for robot in robots:
        robot.stop()


def start(node, name='', task='reach the goal', recorder='recorder'):
    from il_msgs.srv import StartEpisode

    return call(node, StartEpisode, f'{recorder}/start_episode', StartEpisode.Request(name=name, task=task))


def stop(node, discard=False, succeeded=True):
    from il_msgs.srv import StopEpisode

    return call(node, StopEpisode, 'recorder/stop_episode', StopEpisode.Request(discard=discard, task_succeeded=succeeded))


def started(node, name='', recorder='recorder'):
    """An episode begun as soon as every stream comes at its rate."""
    def begun():
        answer = start(node, name, recorder=recorder)
        print(answer.message)  # why not, if that is how it ends
        return answer.success and answer

    return wait_for(begun, what='a recording')


def record(node, seconds: float):
    answer = started(node)
    begin = time.monotonic()
    time.sleep(seconds)
    end = stop(node)
    assert end.success and end.path == answer.path
    return answer.path, time.monotonic() - begin


def information(path) -> dict:
    """What metadata.yaml says."""
    return yaml.safe_load((path / 'metadata.yaml').read_text())['rosbag2_bagfile_information']


def marks(node) -> list[str]:
    """What the recorder says on `episode`, as it comes."""
    from std_msgs.msg import String
    said = []
    node.create_subscription(String, 'episode', lambda message: said.append(message.data), 10)
    return said


def assert_tells_of_interruption(path, cause: str) -> dict:
    """A bag that another library reads, and that says how it ended; its custom_data."""
    with AnyReader([path]) as reader:
        assert reader.message_count == sum(1 for _ in reader.messages()) > 50
    custom = information(path)['custom_data']
    assert (custom['interrupted'], custom['success'], custom['task']) == ('true', 'unknown', 'reach the goal')
    assert cause in custom['interruption']
    return custom


def test_records_what_was_sent_and_converts(nodes, node, robot, tmp_path):
    robot, said = robot(), marks(node)
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    path, _ = record(node, 2.5)
    messages = list(Bag(path).messages())
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
    assert path.endswith('episode_000000') and said == ['start reach the goal', 'success']
    told = information(tmp_path / 'bags/episode_000000')
    assert told['custom_data']['contract_hash'] == load_contract(CONTRACT).hash
    assert (told['custom_data']['success'], told['custom_data']['task']) == ('true', 'reach the goal')
    # what rosbag2 would have noted: the hash and the QoS on offer
    for entry in told['topics_with_message_count']:
        about = entry['topic_metadata']
        for offered in node.get_publishers_info_by_topic(about['name']):
            assert str(offered.topic_type_hash) == about['type_description_hash']
        if about['name'] == '/joint_states':
            assert [p['reliability'] for p in about['offered_qos_profiles']] == ['best_effort']
    with AnyReader([tmp_path / 'bags/episode_000000']) as reader:
        assert reader.message_count == len(messages)

    # With the contract that is inside.
    command = ['convert', tmp_path / 'bags', '--out', tmp_path / 'dataset']
    converted = subprocess.run([sys.executable, '-m', 'il_policies.cli', *command], capture_output=True, text=True)
    assert converted.returncode == 0, converted.stderr
    dataset = Dataset(tmp_path / 'dataset')
    assert dataset.info.contract_hash == load_contract(CONTRACT).hash
    table = dataset.lowdim(0)
    assert len(table['stamp']) >= 22
    answered = table['stamp'] + (table['action'][:, 0] - table['joint_positions'][:, 0]) / 1e-3 * 5e6
    assert np.all(np.abs(answered - table['stamp']) < 60e6), 'commands answer their observation'


def test_simulated_time_four_times_as_fast(nodes, node, robot, tmp_path):
    robot = robot(speed=4.0)
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags', use_sim_time=True)
    path, wall = record(node, 1.5)
    for _, _, received, published, message in Bag(path).messages():
        age = received - stamp_of(message)
        assert published == received and received > SIM_START and abs(age) < 2e9, 'one clock, the simulated one'
    stamps = {topic: sorted(stamp_of(m) for _, _, _, _, m in Bag(path).messages([topic])) for topic in robot.sent}
    for topic, kept in stamps.items():
        assert kept == [s for s in robot.sent[topic] if kept[0] <= s <= kept[-1]], f'{topic}: nothing lost'
    span = (stamps['/joint_states'][-1] - stamps['/joint_states'][0]) / 1e9
    assert span > 2.5 * wall, 'ran faster than real time'


SHIFTED_CLOCK = r'''
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) {
        now->tv_nsec += atol(getenv("SHIFT_MS")) % 1000 * 1000000;
        now->tv_sec += atol(getenv("SHIFT_MS")) / 1000 + (now->tv_nsec >= 1000000000);
        now->tv_nsec %= 1000000000;
    }
    return result;
}
'''
PUBLISHER = '''
import importlib, sys, time, rclpy
topic, module, kind = sys.argv[1:]
rclpy.init()
node = rclpy.create_node('shifted_' + kind.lower())
kind = getattr(importlib.import_module(module), kind)
publisher = node.create_publisher(kind, topic, 10)
begin, k = time.monotonic(), 0
while True:  # a timer would wait by the shifted clock
    message = kind()
    message.header.stamp = node.get_clock().now().to_msg()
    publisher.publish(message)
    k += 1
    time.sleep(max(begin + 0.1 * k - time.monotonic(), 0.0))
'''


def test_hosts_whose_clocks_differ(nodes, node, robot, tmp_path):
    """A camera 3 s behind and a goal 0.6 s ahead, by the clock that their processes see."""
    (tmp_path / 'clock.c').write_text(SHIFTED_CLOCK)
    if not shutil.which('cc'):
        pytest.skip('no C compiler here')
    subprocess.run(['cc', '-shared', '-fPIC', '-o', tmp_path / 'clock.so', tmp_path / 'clock.c'], check=True)
    shifts = {'/camera/image/compressed': ('sensor_msgs.msg', 'CompressedImage', -3000),
              '/goal': ('geometry_msgs.msg', 'PointStamped', 600)}
    robot().silent = set(shifts)
    for topic, (module, kind, shift) in shifts.items():
        nodes.processes[topic] = subprocess.Popen(
            [sys.executable, '-c', PUBLISHER, topic, module, kind],
            env={**os.environ, 'LD_PRELOAD': str(tmp_path / 'clock.so'), 'SHIFT_MS': str(shift)})
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    path, begun = started(node).path, time.time_ns()
    time.sleep(2.0)
    ended = time.time_ns()
    assert stop(node).success
    for topic, (_, _, shift) in shifts.items():
        found = list(Bag(path).messages([topic]))
        delays = np.array([message.receive_ns - message.publish_ns for message in found])
        assert abs(np.median(delays) * 1e-6 + shift) < 20.0, 'the shifted clock is the one by which the middleware stamps'
        sent = np.array([stamp_of(message) - shift * 10**6 for *_, message in found])
        received = np.array([message.receive_ns for message in found])
        assert abs(sent[0] - begun) < 3e8 and abs(sent[-1] - ended) < 3e8, f'{topic}: another span'
        assert np.all(np.abs(np.diff(sent) - 1e8) < 5e7), f'{topic}: nothing lost'
        assert np.median(np.abs(received - sent)) < 2e7, 'the clock was shifted'


def test_refusals(nodes, node, robot, tmp_path):
    from geometry_msgs.msg import PointStamped, PoseStamped
    contract = yaml.safe_load(CONTRACT.read_text())
    contract['observations']['wrist'] = {'topic': 'wrist', 'type': 'geometry_msgs/msg/PoseStamped', 'fields': ['pose.position.x'],
                                         'rate': 20.0, 'max_age': 0.5}
    (tmp_path / 'wrist.yaml').write_text(yaml.safe_dump(contract))
    robot = robot()
    robot.silent = {'/goal', *NOT_REQUIRED}
    another = node.create_publisher(PointStamped, 'wrist', 10)
    nodes.start('recorder_node', contract=tmp_path / 'wrist.yaml', output=tmp_path / 'bags')

    def refused(*lines: str) -> bool:
        answer = start(node)
        return not answer.success and re.fullmatch(r' \| '.join(lines), answer.message)

    offer = '/test offers reliable, volatile'
    wait_for(lambda: refused(
        f'E202 /goal: never seen, declared 10 Hz; {offer}',
        f'E202 /wrist: never seen, declared 20 Hz; {offer}, but of type geometry_msgs/msg/PointStamped: the contract says '
        'geometry_msgs/msg/PoseStamped'), what='only these to be silent')
    assert not stop(node).success
    node.destroy_publisher(another)
    robot.silent, robot.every['/goal'] = NOT_REQUIRED, 40
    wait_for(lambda: refused(
        rf'E211 /goal: (4\.\d+|5(\.\d+)?) Hz, declared 10 Hz; {offer}; correct its driver, or `rate` in the contract',
        'E202 /wrist: never seen, declared 20 Hz; nobody publishes it: start its driver, or correct `topic` in the contract'),
        what='the goal to be slow')
    wrist = node.create_publisher(PoseStamped, 'wrist', 10)
    node.create_timer(0.05, lambda: wrist.publish(PoseStamped()))
    robot.every['/goal'] = 20
    started(node, 'first')
    assert start(node, 'second').message == 'first is being recorded; stop it first'
    time.sleep(0.5)
    assert re.fullmatch(r'success: \d+ messages, /command: no command was recorded', stop(node).message)
    assert 'exists already' in start(node, 'first').message
    for name in ('../up', 'a/b', 'x.part'):
        assert 'is no name for a bag' in start(node, name).message
    started(node, 'dropped')
    assert stop(node, discard=True).message == 'discarded'
    assert stop(node).message == 'nothing is being recorded'
    started(node, 'failed')
    stop(node, succeeded=False)
    assert sorted(p.name for p in (tmp_path / 'bags').iterdir()) == ['failed', 'first']
    assert information(tmp_path / 'bags/failed')['custom_data']['success'] == 'false'


def test_a_stream_that_falters_is_named_and_noted(nodes, node, robot, tmp_path):
    robot = robot()
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    path = tmp_path / 'bags' / started(node).path
    time.sleep(0.5)
    robot.silent = {'/goal'}
    words = r'episode_000000: /goal: \d(\.\d+)? Hz, declared 10 Hz, after \d'
    wait_for(lambda: re.search(words, nodes.log('recorder_node')), what='a warning')
    robot.silent = set()
    assert 'Hz, declared 10 Hz, after' in stop(node).message
    (warning,) = json.loads(information(path)['custom_data']['warnings'])
    assert warning.startswith('/goal: ') and nodes.log('recorder_node').count('/goal') == 1, 'once'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_it_completes_the_bag(nodes, node, robot, tmp_path, number):
    robot()
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    path = tmp_path / 'bags' / started(node).path
    time.sleep(0.5)
    assert nodes.stop('recorder_node', number) == 0
    assert_tells_of_interruption(path, 'told to end')


def test_keys(nodes, node, robot, tmp_path):
    """In a terminal of its own, which is closed in the end."""
    robot()
    said = marks(node)
    keys, terminal = pty.openpty()

    def in_a_shell() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    nodes.processes['recorder_node'] = process = subprocess.Popen(
        [sys.executable, '-m', 'il_runtime.recorder_node', '--ros-args', '-p', f'contract:={CONTRACT}', '-p',
         f'output:={tmp_path / "bags"}', '-p', 'task:=reach the goal'], stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True, preexec_fn=in_a_shell)
    screen = ''

    def listen():
        nonlocal screen
        while True:
            try:
                screen += os.read(keys, 4096).decode()
            except OSError:
                return

    threading.Thread(target=listen, daemon=True).start()

    def press(key: str, answer: str) -> None:
        """Press a key until it is answered like this."""
        def answered() -> bool:
            seen = len(screen)
            os.write(keys, key.encode())
            time.sleep(0.3)
            return re.search(answer, screen[seen:])

        wait_for(answered, what=answer)

    wait_for(lambda: 's  start an episode' in screen and '○ ready' in screen, what='help')
    os.write(keys, b'\x1b[Dx')  # an arrow, and a key that means nothing
    press('y', 'nothing is being recorded')
    for i, (key, word) in enumerate({'y': 'success', 'n': 'failure', 'd': 'discard'}.items()):
        name = 'episode_000002' if word == 'discard' else f'episode_00000{i}'
        press('s', f'{name}: recording')
        status = rf'● {name}   0\.[3-9] s   \d+ messages   \[y success'
        wait_for(lambda status=status: re.search(status, screen), what='the status line')
        press(key, rf'{name}: ({word}: \d+ messages|discarded)')
    press('s', 'episode_000002: recording')
    time.sleep(0.5)
    assert said == ['start reach the goal', 'success', 'start reach the goal', 'failure', 'start reach the goal', 'discard',
                    'start reach the goal']
    os.close(terminal)
    os.close(keys)  # the window is closed: SIGHUP
    assert process.wait(10) == 0
    del nodes.processes['recorder_node']
    assert sorted(p.name for p in (tmp_path / 'bags').iterdir()) == [f'episode_00000{i}' for i in range(3)]
    labels = [information(tmp_path / f'bags/episode_00000{i}')['custom_data']['success'] for i in range(2)]
    assert labels == ['true', 'false']
    assert_tells_of_interruption(tmp_path / 'bags/episode_000002', 'told to end')


def salvaged(path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Of a bag without an end: receive stamps [ns] by topic, and what it says it is about, by mcap's streaming reader."""
    topics, stamps, about = {}, {}, {}
    (file,) = path.glob('*.mcap')
    with open(file, 'rb') as stream, pytest.raises((EndOfFile, struct.error)):
        for record in StreamReader(stream, validate_crcs=True).records:
            if isinstance(record, Message):
                stamps.setdefault(topics[record.channel_id], []).append(record.log_time)
            elif isinstance(record, Metadata) and record.name == 'il_policies':
                about = record.metadata
            elif hasattr(record, 'topic'):
                topics[record.id] = record.topic
    return stamps, about


def assert_at_most_a_second_was_lost(path, killed: int, sent: dict[str, list[int]]) -> None:
    """Everything that was sent until a second before it was killed [ns] is there, and the bag says what it is."""
    stamps, about = salvaged(path)
    for topic, times in sent.items():
        if topic in stamps:
            expected = [time for time in times if stamps[topic][0] < time < killed - S]
            kept = [time for time in stamps[topic] if time < killed]
            assert len(kept) >= len(expected) > 3, topic
            assert killed - kept[-1] < S
    assert {'/joint_states', '/goal', '/camera/image/compressed'} <= set(stamps)
    assert about['task'] == 'reach the goal' and about['contract_hash'] == load_contract(CONTRACT).hash
    assert json.loads(about['contract']) == load_contract(CONTRACT).to_dict()


def test_killed_it_leaves_all_but_a_moment_and_its_successor_says_so(nodes, node, robot, tmp_path):
    robot = robot()
    nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    started(node, 'killed')
    time.sleep(2.0)
    killed = robot.now
    nodes.stop('recorder_node', signal.SIGKILL)
    bags = tmp_path / 'bags'
    assert_at_most_a_second_was_lost(bags / 'killed.part', killed, robot.sent)
    nodes.start('recorder_node', contract=CONTRACT, output=bags)
    advice = f'E101 {bags}: cut short: killed.part; recover what is there with `il convert {bags} --salvage --out'
    wait_for(lambda: advice in nodes.log('recorder_node'), what='a word about it')


@contextmanager
def small_disk(folder, mebibytes: int):
    """A disk of this size, mounted on a folder."""
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={mebibytes}m', 'tmpfs', folder]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f'no small disk here: {mounted.stderr.strip()}')
    try:
        yield folder
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


@pytest.mark.parametrize('min_free, cause', [(0.0, 'No space left on device'), (0.003, 'less than min_free, 0.003 GiB')])
def test_a_full_disk(nodes, node, robot, tmp_path, min_free, cause):
    robot, said = robot(jpeg=bytes(200_000)), marks(node)  # 2 MB/s
    with small_disk(tmp_path / 'disk', 12) as disk:
        process = nodes.start('recorder_node', contract=CONTRACT, output=disk, min_free=min_free)
        path = disk / started(node).path
        assert process.wait(20) == 1
        ended = robot.now
        del nodes.processes['recorder_node']
        assert 'interrupted' in nodes.log('recorder_node') and 'Traceback' not in nodes.log('recorder_node')
        assert f'E305 {path}: ' in nodes.log('recorder_node') and cause in nodes.log('recorder_node')
        assert_tells_of_interruption(path, cause)
        for topic, sent in robot.sent.items():
            stamps = sorted(stamp_of(message) for *_, message in Bag(path).messages([topic]))
            assert stamps == [stamp for stamp in sent if stamps[0] <= stamp <= stamps[-1]], f'{topic}: nothing lost'
            assert ended - stamps[-1] < 3 * S
        wait_for(lambda: said == ['start reach the goal', 'stop'], what='marks')
        if min_free:
            (disk / 'other').write_bytes(bytes(6 * 2**20))
            nodes.start('recorder_node', contract=CONTRACT, output=disk, min_free=min_free)
            assert re.match(rf'E305 {disk}: 0.00\d+ GiB free, less than min_free, 0.003 GiB; make room', start(node).message)


def test_what_cannot_be_used_is_one_clear_line(nodes, tmp_path):
    for contract, output, words in (
        ('nowhere.yaml', tmp_path / 'bags', 'nowhere.yaml: no such file'),
        (CONTRACT, '/proc/none', '/proc/none'),
    ):
        assert nodes.start('recorder_node', contract=contract, output=output).wait(20) == 2
        log = nodes.log('recorder_node')
        assert words in log and 'Traceback' not in log
