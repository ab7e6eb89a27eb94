from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from il_msgs.msg import ControllerStatus
from rosbags.highlevel import AnyReader
from std_srvs.srv import Trigger

from il_policies.bags.reader import Bag, find_bags
from il_policies.bags.writer import BagWriter, standard_types
from il_policies.contract import load_contract
from il_policies.data.convert import convert
from il_policies.policies import PolicySpec
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.normalize import Normalizer
from il_policies.policies.unet import UNetConfig
from il_policies.policies.vision import VisionConfig
from il_policies.replay import replay
from il_runtime.flight_recorder_node import remove_oldest
from robot import SIM_START, Robot, stamp_of
from support import ROOT, call, wait_for

CONTRACT = ROOT / 'config/robots/so101.yaml'
SECONDS, AFTER = 2.0, 0.5
MODES = {'fault': ControllerStatus.FAULT, 'takeover': ControllerStatus.TELEOP}
S = 10**9


class Recorder:
    """The node under test, and what it has written."""

    def __init__(self, nodes, node, folder):
        self.nodes, self.node, self.folder = nodes, node, folder

    def start(self, **parameters):
        given = {'contract': CONTRACT, 'output': self.folder, 'seconds': SECONDS, 'after': AFTER, **parameters}
        self.process = self.nodes.start('flight_recorder_node', **given)

    def dump(self):
        return call(self.node, Trigger, 'flight_recorder/dump')

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob('*'))

    def bag(self, cause: str):
        """The path of the only bag of a cause, as soon as it is there."""
        return wait_for(lambda: list(self.folder.glob(f'flight_*_{cause}')), what=f'a bag of {cause}')[0]

    def log(self) -> str:
        return self.nodes.log('flight_recorder_node')


@pytest.fixture
def recorder(nodes, node, tmp_path):
    return Recorder(nodes, node, tmp_path / 'flight')


@pytest.fixture
def robot(node):
    robots = []

    def make(contract=CONTRACT, **settings):
        robots.append(Robot(node, contract, **settings))
        return robots[-1]

    yield make
    for robot in robots:
        robot.stop()


def filled(recorder, robot, seconds: float = SECONDS) -> None:
    """Wait until the recorder's window is full."""
    wait_for(lambda: 'keeping the last' in recorder.log(), what='the recorder')
    wait_for(lambda: recorder.node.count_subscribers('command'), what='its subscriptions')
    time.sleep(1.0 + seconds)  # reliability is adapted to what the publishers offer


def assert_complete(path, robot, first: int, last: int) -> None:
    """A bag holds everything that was sent from first to last [ns], once each, in order."""
    messages = list(Bag(path).messages())
    assert [received for _, _, received, _, _ in messages] == sorted(received for _, _, received, _, _ in messages)
    for topic, sent in robot.sent.items():
        stamps = [stamp_of(message) for name, *_, message in messages if name == topic]
        within = [stamp for stamp in sent if first <= stamp <= last]
        assert len(within) >= 3
        assert [stamp for stamp in sorted(stamps) if first <= stamp <= last] == within, f'{topic}: nothing lost, nothing twice'


@pytest.mark.parametrize('cause', ['fault', 'takeover', 'request'])
def test_each_event_gives_a_bag_of_the_whole_window(recorder, robot, tmp_path, cause):
    robot = robot()
    recorder.start()
    filled(recorder, robot)
    if cause == 'request':
        happened = robot.now
        answer = recorder.dump()
        assert answer.success and answer.message == str(recorder.bag(cause))
    else:
        happened = robot.enter(MODES[cause], 'for a reason')
    path = recorder.bag(cause)
    # From the window before `after` has passed, to `after`; 0.2 s are the event's own way to the recorder and back.
    assert_complete(path, robot, happened + int((AFTER - SECONDS + 0.2) * S), happened + int((AFTER - 0.2) * S))
    custom = Bag(path).about
    assert custom['flight'] == cause and custom['success'] == 'unknown'
    assert custom['contract_hash'] == load_contract(CONTRACT).hash
    (event,) = json.loads(custom['flight_events'])
    assert event['cause'] == cause and abs(event['stamp'] - happened) < 0.3 * S
    assert event['reason'] == ('asked for' if cause == 'request' else 'for a reason')
    # What came while that bag was written is in the next one.
    assert recorder.dump().success
    second = wait_for(lambda: sorted(set(recorder.folder.glob('*_request*')) - {path}), what='a second bag')[0]
    assert_complete(second, robot, happened + int((AFTER - 0.2) * S), happened + int((2 * AFTER - 0.2) * S))
    with AnyReader([path]) as reader:  # another library finds no fault with it
        assert reader.message_count == len(list(Bag(path).messages()))
    (report,) = convert([path], None, tmp_path / 'dataset', jobs=1)
    assert not report.refused and report.details['success'] is None and report.details['rows'] >= 10 * (SECONDS - 0.5)


def small_policy(contract, **features: tuple[int, ...]) -> BC:
    """An untrained policy that sees these, one second ahead."""
    torch.manual_seed(0)
    spec = PolicySpec(features, contract.action.joints, 10, 2, contract.step_period, contract.action_offset)
    rng = np.random.default_rng(0)
    data = {name: rng.uniform(0, 1, (20, 6)).astype(np.float32) for name in ('joint_positions', 'action')}
    vision = VisionConfig(channels=(8,), keypoints=4, size=8)
    return BC(spec, BCConfig(UNetConfig((16, 32)), vision=vision), Normalizer.fit(data)).eval()


def test_a_policy_can_be_tried_on_what_it_wrote(recorder, robot):
    """What the replay says of chunks and errors, computed anew from what the robot sent and when the recorder received it."""
    robot, contract = robot(), load_contract(CONTRACT)
    recorder.start()
    filled(recorder, robot)
    robot.enter(ControllerStatus.FAULT)
    path = recorder.bag('fault')
    policy = small_policy(contract, joint_positions=(6,))
    result = replay(Bag(path), policy, contract, stride=2)

    with AnyReader([path]) as reader:  # by another library
        seen = [(connection.topic, received, reader.deserialize(data, connection.msgtype))
                for connection, received, data in reader.messages() if connection.topic in ('/joint_states', '/command')]
    received = np.array([at for _, at, _ in seen])
    first, least = received[0], round(2 * contract.step_period * S)
    starts = np.round(result.starts * S).astype(np.int64) + first
    assert result.starts[0] < 0.05 and result.refused == {}
    assert len(starts) >= (SECONDS - 0.5) / (2 * contract.step_period)
    for start, following in zip(starts, [*starts[1:], None]):
        later = received[received >= start + least]
        assert following == (later[0] if len(later) else None), 'with the first message that comes when two steps have passed'

    def sent(topic: str) -> tuple[np.ndarray, np.ndarray]:
        """Stamps [ns] and positions of all joints [rad] of what the robot sent and the bag holds."""
        stamps = np.array(robot.sent[topic])
        inside = np.isin(stamps, [stamp_of(message) for name, _, message in seen if name == topic])
        assert inside.sum() == sum(name == topic for name, _, _ in seen)
        return stamps[inside], robot.every[topic] * np.flatnonzero(inside) * 1e-3

    (joint_stamps, joints), (command_stamps, commands) = sent('/joint_states'), sent('/command')
    arrived = {stamp_of(message): at for name, at, message in seen if name == '/joint_states'}
    done = np.full((len(starts), 10), np.nan)
    for i, start in enumerate(starts):
        newest = [max(stamp for stamp in joint_stamps if stamp <= max(start - back, starts[0]) and arrived[stamp] <= start)
                  for back in (S // 10, 0)]
        positions = joints[np.searchsorted(joint_stamps, newest)]
        observation = {'joint_positions': torch.tensor(positions, dtype=torch.float32)[None, :, None].expand(1, 2, 6)}
        np.testing.assert_allclose(result.planned[i], policy.predict(observation)[0].numpy(), atol=1e-5)
        for step in range(10):
            due = start + step * S // 10
            within = commands[(command_stamps >= due) & (command_stamps < due + S // 10)]
            before = commands[(command_stamps < due) & (command_stamps >= due - contract.action.max_age * S)]
            if len(within) or len(before):
                done[i, step] = within[0] if len(within) else before[-1]
    known = np.isfinite(done)
    assert known[:-6].all() and not known[-1].all(), 'the end of the bag is not what the last chunks are compared with'
    np.testing.assert_allclose(result.done, np.repeat(done[:, :, None], 6, axis=2), atol=1e-6)
    errors = [result.planned[i, 3, 0] - done[i, 3] for i in range(len(starts)) if known[i, 3]]
    assert result.rms()[3, 0] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-3)

    seeing = replay(Bag(path), small_policy(contract, joint_positions=(6,), front=(96, 96, 3)), contract, stride=2)
    with AnyReader([path]) as reader:
        first = next(at for connection, at, _ in reader.messages()
                     if connection.topic in ('/joint_states', '/command', '/camera/image/compressed'))
    frames = np.array(robot.sent['/camera/image/compressed'])
    begun = np.round(seeing.starts * S).astype(np.int64) + first
    assert len(begun) >= 5 and np.abs(begun[:, None] - frames).min(axis=1).max() < 1000, 'with a camera, chunks begin at frames'


def test_events_that_follow_each_other_are_one_bag_and_the_oldest_go(recorder, robot):
    robot = robot()
    recorder.start(keep=1, seconds=1.0, after=0.3)
    filled(recorder, robot, 0.0)
    robot.enter(ControllerStatus.FAULT)
    requested = recorder.dump().message
    assert requested.endswith('_fault-request')
    events = json.loads(Bag(requested).about['flight_events'])
    assert [event['cause'] for event in events] == ['fault', 'request']
    robot.enter(ControllerStatus.TELEOP)
    first = recorder.bag('takeover')
    robot.enter(ControllerStatus.HOLD)
    robot.enter(ControllerStatus.FAULT)
    second = recorder.bag('fault')
    wait_for(lambda: not first.exists(), what='the oldest to go')
    assert set(recorder.folder.iterdir()) == {Path(requested), second}


def test_only_bags_of_ours_go_the_oldest_first(tmp_path):
    def bag(name: str, flight: str | None):
        BagWriter(tmp_path / name, standard_types()).close({'flight': flight} if flight else {'task': 'reach'})

    others = {'flight_20200101T000000_request': 'request', 'flight_20200101T000000_fault-request': 'fault-request',
              'flight_20200101T000000_fault': None, 'flight_20200101T000000_fault_keep_it': 'fault', 'mine': 'fault'}
    for name, flight in others.items():
        bag(name, flight)
    (tmp_path / 'flight_20200101T000000_takeover').mkdir()
    for name in ('10_takeover', '10_takeover_2', '10_fault', '09_fault'):
        bag(f'flight_20260101T0000{name}', name.split('_')[1])
    remove_oldest(tmp_path, 2)
    left = {path.name for path in tmp_path.iterdir()} - {*others, 'flight_20200101T000000_takeover'}
    assert left == {'flight_20260101T000010_takeover_2', 'flight_20260101T000010_fault'}
    assert all((tmp_path / name).exists() for name in others)


def test_the_mode_is_known_even_if_it_was_told_long_ago(recorder, robot):
    robot = robot()
    robot.mode = ControllerStatus.POLICY
    recorder.start(seconds=1.0, after=0.0)
    filled(recorder, robot, 0.0)
    robot.silent = {'/controller/status'}
    time.sleep(1.5)
    path = recorder.dump().message
    (topic, _, received, published, status), *_, (_, _, last, _, _) = Bag(path).messages()
    assert topic == '/controller/status' and status.mode == ControllerStatus.POLICY
    assert published - stamp_of(status) < 0.1 * S and received - published > 0.4 * S
    assert last - received <= 1.1 * S


def test_what_each_kind_of_output_said(recorder, robot, tmp_path):
    contract = yaml.safe_load(CONTRACT.read_text())
    *arm, wrist, gripper = contract['action']['joints']
    contract['action']['outputs'] = [
        {'topic': 'arm', 'type': 'trajectory_msgs/msg/JointTrajectory', 'joints': arm},
        {'topic': 'wrist', 'type': 'std_msgs/msg/Float64MultiArray', 'joints': [wrist]},
        {'topic': 'gripper', 'type': 'sensor_msgs/msg/JointState', 'joints': [gripper]},
    ]
    (tmp_path / 'split.yaml').write_text(yaml.safe_dump(contract))
    robot(tmp_path / 'split.yaml')
    recorder.start(contract=tmp_path / 'split.yaml', seconds=1.0, after=0.0)
    filled(recorder, robot, 0.0)
    path = recorder.dump().message
    kinds = {'/' + output['topic']: output['type'] for output in contract['action']['outputs']}
    assert {topic: Bag(path).topics[topic] for topic in kinds} == kinds
    said = {topic: message for topic, *_, message in Bag(path).messages(kinds)}
    assert said['/arm'].points[0].time_from_start.nanosec == 20_000_000 and len(said['/wrist'].data) == 2
    assert said['/gripper'].name == contract['action']['joints']


def test_simulated_time(recorder, robot):
    robot = robot(speed=2.0)
    recorder.start(use_sim_time=True)
    filled(recorder, robot, SECONDS / 2)
    path = recorder.dump().message
    _, *window = Bag(path).messages()  # the first is the status from before the window
    stamps = np.array([(received, published) for _, _, received, published, _ in window])
    assert (stamps[:, 0] == stamps[:, 1]).all() and stamps.min() > SIM_START
    assert 0.9 * SECONDS < (stamps.max() - stamps.min()) / S <= SECONDS
    assert_complete(path, robot, int(stamps.min() + 0.3 * S), int(stamps.max() - 0.3 * S))


def test_a_folder_or_disk_that_refuses(recorder, robot):
    robot(jpeg=bytes(100_000))
    recorder.start(seconds=1.0, after=0.0)
    filled(recorder, robot, 0.0)
    recorder.folder.rmdir()
    recorder.folder.write_text('in the way')
    answer = recorder.dump()
    assert not answer.success and 'cannot be written: Not a directory' in answer.message
    recorder.folder.unlink()
    # As a full disk: no file may grow beyond this.
    resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    answer = recorder.dump()
    assert not answer.success and 'File too large' in answer.message
    assert recorder.names() == [], 'what could not be finished does not fill the disk'
    assert recorder.log().count(f'no bag of request in {recorder.folder}: ') == 2
    resource.prlimit(recorder.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert recorder.dump().success and recorder.dump().success
    assert len(recorder.names()) == 2, 'also within a second'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_ended_while_writing_it_leaves_no_half_bag(recorder, robot, number):
    robot = robot(jpeg=bytes(200_000))
    robot.every['/camera/image/compressed'] = 2  # 20 MB/s
    recorder.start(after=0.0)
    filled(recorder, robot)
    robot.mode = ControllerStatus.FAULT
    wait_for(lambda: list(recorder.folder.glob('*.part')), what='a bag that is being written')
    assert recorder.nodes.stop('flight_recorder_node', number) == (0 if number == signal.SIGINT else -number)
    (name,) = recorder.names()
    if number == signal.SIGINT or not name.endswith('.part'):
        assert len(list(Bag(recorder.bag('fault')).messages())) > 200


def test_told_to_end_after_a_fault_it_writes_at_once(recorder, robot):
    robot = robot()
    recorder.start(seconds=20.0, after=15.0)
    filled(recorder, robot, 1.0)
    happened = robot.enter(ControllerStatus.FAULT)
    assert recorder.nodes.stop('flight_recorder_node') == 0
    (path,) = find_bags(recorder.folder)
    assert_complete(path, robot, happened - S, happened)


def test_memory_is_bounded(recorder, robot):
    robot(jpeg=bytes(200_000)).every['/camera/image/compressed'] = 2  # 20 MB/s
    recorder.start(max_megabytes=10, seconds=30.0, after=0.0)
    wait_for(lambda: 'holds only' in recorder.log(), what='the bound')

    def resident() -> float:
        with open(f'/proc/{recorder.process.pid}/statm') as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e6

    before = resident()
    time.sleep(3.0)
    path = recorder.dump().message
    assert resident() - before < 20.0, 'the window twice at most'
    assert sum(file.stat().st_size for file in recorder.folder.rglob('*.mcap')) < 11e6
    assert recorder.log().count('max_megabytes, 10, holds only') == 1
    assert {topic for topic, *_ in Bag(path).messages()} >= {'/joint_states', '/camera/image/compressed'}


def test_two_arms_do_not_share_a_folder(recorder):
    with open(recorder.nodes.folder / 'flight_recorder_node.log', 'a') as log:
        recorder.nodes.processes['left'] = subprocess.Popen(
            [sys.executable, '-m', 'il_runtime.flight_recorder_node', '--ros-args', '-r', '__ns:=/left', '-p',
             f'contract:={CONTRACT}', '-p', f'output:={recorder.folder}'], stdout=log, stderr=log)
    answer = call(recorder.node, Trigger, 'left/flight_recorder/dump')
    assert not answer.success and answer.message == 'nothing has been received on any topic'
    assert recorder.names() == ['left']


@pytest.mark.parametrize('parameters, words', [
    ({'contract': 'nowhere.yaml'}, 'nowhere.yaml: no such file'),
    ({'output': '/proc/none'}, '/proc/none'),
    ({'after': 3.0}, 'after is 3 s, must be less than seconds, 2 s'),
    ({'keep': 0}, 'keep'),
])
def test_what_cannot_be_used_is_one_clear_line(recorder, parameters, words):
    recorder.start(**parameters)
    assert recorder.process.wait(20) == 2
    assert words in recorder.log() and 'Traceback' not in recorder.log()
