"""The policy node when its streams fail, when its policy is exchanged, and under fire, over real DDS."""
from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Point, PointStamped
from il_msgs.msg import ActionChunk, ControllerStatus
from il_msgs.srv import LoadPolicy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from il_policies import checkpoint
from il_policies.contract import load_contract
from il_policies.planner import resample
from il_policies.policies import PolicySpec
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from il_runtime.ros import STATUS_QOS, chunk_qos, nanoseconds, to_stamp
from support import CONTRACT, FollowingArm, call, patient_contract, wait_for

JOINTS = list(load_contract(CONTRACT).action.joints)


def save_policy(path: Path, around=0.0, features=('joint_positions',), seed=0, horizon=16, steps=2) -> Path:
    """An untrained policy whose chunks stay within 0.02 rad of `around`, six joints or one number for all.

    steps: how often its network is computed for a chunk.
    """
    torch.manual_seed(seed)
    shapes = {'joint_positions': (6,), 'goal': (2,), 'front': (24, 32, 3)}
    spec = PolicySpec({name: shapes[name] for name in features}, tuple(JOINTS), horizon=horizon, history=2, step_period=0.1,
                      action_offset=0.0)
    rng = np.random.default_rng(0)
    data = {name: rng.uniform(-1, 1, (50, *shapes[name])).astype(np.float32) for name in features if name != 'front'}
    data['action'] = (around + rng.uniform(-0.02, 0.02, (50, 6))).astype(np.float32)
    checkpoint.save(path, Flow(spec, FlowConfig(euler_steps=steps), Normalizer.fit(data)), {})
    return path


def raw_contract(folder: Path) -> Path:
    """The SO-101's, but its camera sends raw images."""
    contract = yaml.safe_load(CONTRACT.read_text())
    contract['observations']['front'] |= {'topic': 'camera/image', 'type': 'sensor_msgs/msg/Image', 'image_size': [24, 32]}
    path = folder / 'raw.yaml'
    path.write_text(yaml.safe_dump(contract))
    return path


class Streams:
    """Everything a planner listens to, sent as declared unless a fault is set: (stream, what is done to its message)."""

    def __init__(self, node):
        self.node, self.chunks, self.diagnostics, self.fault, self.told = node, [], [], ('', None), None
        self.now = lambda: node.get_clock().now().to_msg()
        self.publishers = {'joint_positions': node.create_publisher(JointState, 'joint_states', 10),
                           'goal': node.create_publisher(PointStamped, 'goal', 10),
                           'front': node.create_publisher(Image, 'camera/image', qos_profile_sensor_data)}
        self.status = node.create_publisher(ControllerStatus, 'controller/status', STATUS_QOS)
        node.create_subscription(ActionChunk, 'chunks', self.chunks.append, chunk_qos())
        node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, QoSProfile(depth=100))
        node.create_timer(0.02, self._report)
        node.create_timer(0.1, self._show)

    def _report(self):
        self._send('joint_positions', JointState(name=JOINTS, position=np.linspace(0, 0.5, 6)))

    def _show(self):
        self._send('goal', PointStamped(point=Point(x=0.28, y=0.01)))
        if self.told is not None:
            self.status.publish(self.told)
        self._send('front', Image(height=24, width=32, step=96, encoding='rgb8', data=bytes(24 * 96)))

    def _send(self, name, message):
        message.header.stamp = self.now()
        stream, change = self.fault
        if stream != name or change is not None and change(message) is not False:
            self.publishers[name].publish(message)

    def _on_diagnostics(self, array):
        self.diagnostics += [(time.monotonic(), status) for status in array.status if status.name.endswith('planning')]

    def follow(self, epoch):
        """The status of a controller, ten times a second from now on."""
        self.told = ControllerStatus(mode=ControllerStatus.HOLD, epoch=epoch, ensembling='newest_first')
        self.status.publish(self.told)

    def shown(self, since, level, words):
        """When diagnostics first said so after `since` [s], else None."""
        return next((at for at, status in list(self.diagnostics)
                     if at > since and status.level == level and all(word in status.message for word in words)), None)


def stamped(seconds):
    def change(message):
        message.header.stamp.sec += seconds
    return change


def with_fields(**values):
    def change(message):
        for name, value in values.items():
            setattr(message, name, value)
    return change


def exchanged(message):
    message.name, message.position = message.name[::-1], message.position[::-1]


FAULTS = {
    'joints stopped': ('joint_positions', None, 'joint_states: newest sample is'),
    'goal stopped': ('goal', None, 'goal: newest sample is'),
    'camera stopped': ('front', None, 'camera/image: newest sample is'),
    'joints NaN': ('joint_positions', with_fields(position=[np.nan] * 6), 'not finite: shoulder_pan = nan'),
    'goal infinite': ('goal', with_fields(point=Point(x=np.inf)), 'not finite: x = inf'),
    'joints of another shape': ('joint_positions', with_fields(position=[0.0] * 5), '5 values of position for 6 names'),
    'joints misnamed': ('joint_positions', with_fields(name=[*JOINTS[:5], 'jaw']), "no joints ['gripper']"),
    'joints doubled': ('joint_positions', with_fields(name=[*JOINTS, JOINTS[0]], position=[0.0] * 7), 'occur more than once'),
    'joints ahead': ('joint_positions', stamped(3600), 's ahead of now'),
    'joints behind': ('joint_positions', stamped(-3600), 'joint_states: newest sample is'),
    'camera ahead': ('front', stamped(5), 's ahead of now'),
    'camera of another shape': ('front', with_fields(data=bytes(100)), '100 bytes do not hold 24 rows'),
    'camera of another encoding': ('front', with_fields(encoding='rot13'), "encoding 'rot13'"),
}


@pytest.mark.long
def test_whatever_happens_to_a_stream_stops_planning_is_named_and_passes(node, nodes, tmp_path):
    """Within a second; the chunks before it was noticed are from observations before it; no restart."""
    contract = raw_contract(tmp_path)
    nodes.start('policy_node', contract=contract, stride=1, noise='per_epoch', nice=0,
                checkpoint=save_policy(tmp_path / 'policy', features=('joint_positions', 'goal', 'front')))
    streams = Streams(node)
    wait_for(lambda: streams.shown(0, DiagnosticStatus.WARN, ['waiting for a controller']), 40, 'diagnostics')
    streams.follow(1)
    observed = load_contract(contract).observations
    took = {}
    for name, (stream, change, reason) in FAULTS.items():
        count = len(streams.chunks)
        wait_for(lambda count=count: len(streams.chunks) > count + 1, what=f'planning before {name}')
        injected, at = time.monotonic(), node.get_clock().now().nanoseconds
        streams.fault = (stream, change)
        seen = wait_for(partial(streams.shown, injected, DiagnosticStatus.ERROR, ['not planning', reason]), what=name)
        took[name] = seen - injected
        time.sleep(0.25)
        until = at + (observed[stream].max_age + 0.1) * 1e9
        assert not [chunk for chunk in streams.chunks if nanoseconds(chunk.header.stamp) > until], name
        streams.fault = ('', None)
        wait_for(partial(streams.shown, seen, DiagnosticStatus.OK, ['planning']), what=f'recovery from {name}')
    assert max(took.values()) <= 1.0, took

    # Joints in another order are the same joints.
    streams.fault = ('joint_positions', exchanged)
    time.sleep(0.3)
    count = len(streams.chunks)
    chunk = wait_for(lambda: len(streams.chunks) > count + 1 and streams.chunks[-1], what='a chunk')
    np.testing.assert_allclose(chunk.positions, streams.chunks[0].positions, atol=1e-5)
    status = streams.diagnostics[-1][1]
    values = {pair.key: pair.value for pair in status.values}
    for stage in ('capture to arrival here', 'inference', 'capture to published'):
        quantiles = [float(word) for word in values[f'{stage} p50 / p90 / p99 / max'].split(' ms')[0].split(' / ')]
        assert quantiles == sorted(quantiles) and 0 <= quantiles[0] < 2000
    assert int(values['refused joint_positions']) > 10 and values['stream goal'] == 'fresh'


@pytest.mark.long
def test_policies_are_exchanged_in_motion_under_new_epochs(node, nodes, tmp_path):
    """The arm never stops, never leaves its limits; an epoch's followed chunks are of one policy; refusals change nothing."""
    contract = patient_contract(tmp_path, max_age=1.0)
    paths = [save_policy(tmp_path / 'a', 0.0), save_policy(tmp_path / 'b', 0.08, seed=1)]
    arm = FollowingArm(node, contract, plans=False)
    chunks = []
    node.create_subscription(ActionChunk, 'chunks', chunks.append, chunk_qos())
    nodes.start('controller_node', contract=contract)
    nodes.start('policy_node', contract=contract, checkpoint=paths[0], stride=2, nice=0)
    arm.arm()
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, 40, 'the first policy')
    began = len(arm.statuses)
    hashes = [checkpoint.load(path).hash for path in paths]
    for i in range(1, 5):
        epoch = arm.statuses[-1].epoch
        answer = call(node, LoadPolicy, 'policy/load_policy', LoadPolicy.Request(checkpoint=str(paths[i % 2])))
        assert answer.success and answer.policy == hashes[i % 2], answer.message
        wait_for(lambda epoch=epoch: arm.statuses[-1].epoch > epoch, what='a new epoch')
        wait_for(lambda i=i: abs(arm.position - 0.08 * (i % 2)).max() < 0.03, what='the pose of the new policy')
    for wrong, words in ((tmp_path / 'nowhere', 'no readable checkpoint'),
                         (save_policy(tmp_path / 'blind', features=('joint_positions', 'goal')), 'nothing received on goal')):
        answer = call(node, LoadPolicy, 'policy/load_policy', LoadPolicy.Request(checkpoint=str(wrong)))
        assert not answer.success and words in answer.message and answer.policy == hashes[0]
    count = len(chunks)
    wait_for(lambda: len(chunks) > count + 2, what='the old policy planning on')
    assert {status.mode for status in arm.statuses[began:]} == {ControllerStatus.POLICY}
    arm.assert_within_limits()
    assert_one_policy_an_epoch(chunks)

    # What the two say of the time from an observation on fits together, and that the arm has run out of chunks shows.
    wait_for(lambda: len([array for array in arm.diagnostics if 'control loop' in array.status[0].name]) > 3, what='diagnostics')
    told = {}
    for array in arm.diagnostics:
        for status in array.status:
            told |= {pair.key: pair.value for pair in status.values}
    published, commanded, waited = (float(told[f'{name} p50 / p90 / p99 / max'].split()[0]) for name in (
        'capture to published', 'observation to first command', 'chunk received to first command'))
    assert 0 < published < commanded < published + 100 and 0 <= waited < 25
    nodes.stop('policy_node')
    wait_for(lambda: any(status.level == DiagnosticStatus.WARN and 'starved' in status.message
                         for array in arm.diagnostics for status in array.status), what='a controller that is starved')


def test_a_second_planner_moves_nothing_and_is_named(node, nodes, tmp_path):
    """Started while the arm follows another one's: the arm goes on, in its epoch, until that one is gone; then it has a turn."""
    contract = patient_contract(tmp_path, max_age=1.0)
    first, second = save_policy(tmp_path / 'a', 0.0), save_policy(tmp_path / 'b', 0.08, seed=1)
    arm = FollowingArm(node, contract, plans=False)
    chunks = []
    node.create_subscription(ActionChunk, 'chunks', chunks.append, chunk_qos())
    nodes.start('controller_node', contract=contract)
    nodes.start('policy_node', contract=contract, checkpoint=first, stride=2, nice=0)
    epoch = arm.arm()
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, 40, 'the first policy')
    began = len(arm.statuses)
    rogue = checkpoint.load(second).hash
    nodes.run('rogue', '-m', 'il_runtime.policy_node', '--ros-args', '-r', '__node:=rogue', '-p', f'contract:={contract}', '-p',
              f'checkpoint:={second}', '-p', 'stride:=1', '-p', 'nice:=0')
    wait_for(lambda: len([chunk for chunk in chunks if chunk.policy == rogue]) > 20, 40, 'many chunks of the other')
    assert {(status.mode, status.epoch) for status in arm.statuses[began:]} == {(ControllerStatus.POLICY, epoch)}
    assert abs(arm.position).max() < 0.03, 'where the first one wants the arm'
    wait_for(lambda: any(status.level == DiagnosticStatus.WARN and '2 planners on /chunks' in status.message
                         for array in arm.diagnostics for status in array.status), what='a warning')
    answer = call(node, LoadPolicy, 'policy/load_policy', LoadPolicy.Request(checkpoint=str(second)))
    assert not answer.success and 'there are 2 planners on /chunks' in answer.message
    assert {(status.mode, status.epoch) for status in arm.statuses[began:]} == {(ControllerStatus.POLICY, epoch)}
    nodes.stop('policy_node')
    wait_for(lambda: arm.mode == ControllerStatus.POLICY and abs(arm.position - 0.08).max() < 0.03, what='its turn')
    assert arm.statuses[-1].epoch == epoch + 1
    arm.assert_within_limits()
    assert_one_policy_an_epoch([chunk for chunk in chunks if chunk.epoch > epoch])


def assert_one_policy_an_epoch(chunks: list[ActionChunk]) -> None:
    """But for the last chunk of an epoch, which made the controller begin the next one."""
    for epoch in {chunk.epoch for chunk in chunks}:
        policies = [chunk.policy for chunk in chunks if chunk.epoch == epoch]
        changes = [i for i in range(1, len(policies)) if policies[i] != policies[i - 1]]
        assert len(changes) <= 1 and (not changes or changes[0] >= len(policies) - 2), policies


def set_parameters(node, **values) -> list[str]:
    """Ask the planner for these; why it refuses any."""
    parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
    answer = call(node, SetParameters, 'policy/set_parameters', SetParameters.Request(parameters=parameters))
    return [result.reason for result in answer.results if not result.successful]


def test_when_to_plan(node, nodes, tmp_path):
    """Changed while it plans: by stride, by the horizon that remains, as fast as it can."""
    nodes.start('policy_node', contract=CONTRACT, checkpoint=save_policy(tmp_path / 'policy'), stride=3, nice=0, rtc='identity',
                rtc_beta=20.0)
    streams = Streams(node)
    node.create_publisher(String, 'instruction', STATUS_QOS).publish(String(data='put it down'))
    wait_for(lambda: streams.diagnostics, 40, 'diagnostics')
    streams.follow(1)
    for values, low, high in (({}, 0.25, 0.35), ({'plan_when': 'horizon', 'least_horizon': 10}, 0.45, 0.65),  # 15 - 10 steps
                              ({'plan_when': 'continuous'}, 0.015, 0.09)):
        assert not values or set_parameters(node, **values) == []
        count = len(streams.chunks) + 1
        wait_for(lambda count=count: len(streams.chunks) > count + 5, what=f'chunks with {values}')
        stamps = np.array([nanoseconds(chunk.start) for chunk in streams.chunks[count:count + 6]]) * 1e-9
        assert low < np.median(np.diff(stamps)) < high, values
    assert set_parameters(node, plan_when='often') == ["plan_when is 'often'; valid: stride, continuous, horizon"]
    assert 'must be less than the horizon of the policy, 16' in set_parameters(node, plan_when='horizon', least_horizon=16)[-1]
    wait_for(lambda: streams.shown(0, DiagnosticStatus.WARN, ['rtc is identity', 'should be latest']), what='a warning')
    assert {pair.key: pair.value for pair in streams.diagnostics[-1][1].values}['instruction'] == 'put it down'


@pytest.mark.long
def test_planning_that_is_too_slow_is_named_until_it_is_not(node, nodes, tmp_path):
    """Slower than its stride, and cured by a longer one; slower than a whole chunk, and cured by a quicker policy."""
    fast = save_policy(tmp_path / 'fast')
    policy, seen = checkpoint.load(fast), {'joint_positions': torch.zeros(1, 2, 6)}
    torch.set_num_threads(1)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        policy.predict(seen)
        times.append((time.perf_counter() - began) / 2)
    step = np.median(times)  # [s]
    slow = save_policy(tmp_path / 'slow', steps=round(0.4 / step))  # a stride takes 0.1 s, a chunk 1.5 s
    starving = save_policy(tmp_path / 'starving', horizon=4, steps=round(1.2 / step))  # a chunk takes 0.3 s
    nodes.start('policy_node', contract=CONTRACT, checkpoint=slow, stride=1, nice=0)
    streams = Streams(node)
    wait_for(lambda: streams.diagnostics, 40, 'diagnostics')
    streams.follow(1)

    def told(level, words: str) -> float:
        """Wait for a judgement that begins so; the time in it is one that chunks since have taken [s]."""
        asked, count = time.monotonic(), len(streams.chunks)
        wait_for(lambda: streams.shown(asked, level, [words]), what=words)
        said = next(status.message for at, status in streams.diagnostics if at > asked and words in status.message)
        assert said.startswith(words)
        took = float(said.removeprefix(words).split()[0])
        inferred = [nanoseconds(chunk.inference_time) * 1e-9 for chunk in streams.chunks[max(0, count - 1):]]
        assert min(inferred) - 0.01 <= took <= max(inferred) + 0.2, (said, inferred)

    told(DiagnosticStatus.WARN, 'slow: planning takes ')
    assert set_parameters(node, stride=15) == []
    asked = time.monotonic()
    wait_for(lambda: streams.shown(asked, DiagnosticStatus.OK, ['planning']), what='time enough')
    for path, level, words in (
            (starving, DiagnosticStatus.ERROR, 'starved: chunks end before they are planned: they cover 0.30 s and come after '),
            (fast, DiagnosticStatus.OK, 'planning')):
        answer = call(node, LoadPolicy, 'policy/load_policy', LoadPolicy.Request(checkpoint=str(path)))
        assert answer.success, answer.message
        if level == DiagnosticStatus.ERROR:
            told(level, words)
    asked = time.monotonic()
    wait_for(lambda: streams.shown(asked, level, [words]), what='a quick policy')
    assert not streams.shown(asked, DiagnosticStatus.ERROR, ['starved'])


def test_frames_that_come_late_are_no_slow_planning(node, nodes, tmp_path):
    """By twice the stride; what the planner cannot help it does not warn of."""
    contract = yaml.safe_load(raw_contract(tmp_path).read_text())
    for stream in contract['observations'].values():
        stream['max_age'] = 2.0
    (tmp_path / 'late.yaml').write_text(yaml.safe_dump(contract))
    nodes.start('policy_node', contract=tmp_path / 'late.yaml', stride=3, nice=0,
                checkpoint=save_policy(tmp_path / 'policy', features=('joint_positions', 'front')))
    streams = Streams(node)

    def late(message):
        message.header.stamp = to_stamp(nanoseconds(message.header.stamp) - 600_000_000)

    streams.fault = ('front', late)
    wait_for(lambda: streams.diagnostics, 40, 'diagnostics')
    streams.follow(1)
    wait_for(lambda: len(streams.chunks) > 4, what='chunks')
    since = time.monotonic()
    wait_for(lambda: [at for at, _ in streams.diagnostics if at > since + 1.0], what='diagnostics')
    assert {status.message for at, status in streams.diagnostics if at > since} == {'planning'}
    told = {pair.key: pair.value for pair in streams.diagnostics[-1][1].values}
    assert float(told['capture to published p50 / p90 / p99 / max'].split()[0]) > 600


def test_a_warm_start_is_where_a_slowed_down_arm_is(node, nodes, tmp_path):
    """With tau near 1 a chunk is what is left of the one before, which is the more the slower that was played."""
    nodes.start('policy_node', contract=CONTRACT, checkpoint=save_policy(tmp_path / 'policy'), stride=3, nice=0, tau=0.99)
    streams = Streams(node)
    wait_for(lambda: streams.diagnostics, 40, 'diagnostics')
    for epoch, speed in enumerate((1.0, 0.2, 0.0), 1):
        streams.told = ControllerStatus(mode=ControllerStatus.POLICY, epoch=epoch, speed_scale=100.0 * speed)
        wait_for(lambda epoch=epoch: len([chunk for chunk in streams.chunks if chunk.epoch == epoch]) > 2, what='three chunks')
        one, two = [chunk for chunk in streams.chunks if chunk.epoch == epoch][1:3]
        passed = (nanoseconds(two.start) - nanoseconds(one.start)) * 1e-9
        before, after = (np.array(chunk.positions).reshape(16, 6) for chunk in (one, two))
        errors = {share: np.abs(resample(before, 0.0, share * passed, 0.1) - after).max() for share in (1.0, 0.2, 0.0)}
        assert min(errors, key=errors.get) == speed, errors


def test_a_clock_that_goes_back_is_no_reason_to_wait_for_it(node, nodes, tmp_path):
    """By 1000 s, and the controller's new epoch has come before it, or never: planning goes on in the new time."""
    time_now, clock = [1000.0], node.create_publisher(ClockMessage, '/clock', 10)

    def advance():
        time_now[0] += 0.01
        clock.publish(ClockMessage(clock=to_stamp(round(time_now[0] * 1e9))))

    node.create_timer(0.01, advance)
    nodes.start('policy_node', contract=CONTRACT, checkpoint=save_policy(tmp_path / 'policy'), stride=2, nice=0,
                use_sim_time='true')
    streams = Streams(node)
    streams.now = lambda: to_stamp(round(time_now[0] * 1e9))
    streams.follow(1)
    wait_for(lambda: len(streams.chunks) > 3, 40, 'chunks')
    assert all(chunk.start.sec >= 1000 for chunk in streams.chunks)
    time_now[0] = 10.0
    wait_for(lambda: [chunk for chunk in streams.chunks if chunk.start.sec < 100], 5, 'chunks of the new time')
    sequences = [chunk.sequence for chunk in streams.chunks]
    assert sequences == list(range(len(sequences)))


def test_a_planner_that_is_told_to_end_answers_and_ends(node, nodes, tmp_path):
    """A policy that waits for its observations is answered for when the node is deactivated; shut down, it plans no more.

    Before that, diagnostics say that the controller has gone.
    """
    nodes.start('policy_node', contract=CONTRACT, checkpoint=save_policy(tmp_path / 'policy'), stride=1, nice=0)
    streams = Streams(node)
    streams.fault = ('goal', None)
    wait_for(lambda: streams.diagnostics, 40, 'diagnostics')
    streams.follow(1)
    wait_for(lambda: streams.shown(0, DiagnosticStatus.OK, ['planning']), what='planning')
    client = node.create_client(LoadPolicy, 'policy/load_policy')
    assert client.wait_for_service(10)
    waits = save_policy(tmp_path / 'waits', features=('joint_positions', 'goal'))
    answer = client.call_async(LoadPolicy.Request(checkpoint=str(waits)))
    time.sleep(2.5)
    assert not answer.done(), 'it must wait for its goal'
    change = ChangeState.Request()
    change.transition.id = Transition.TRANSITION_DEACTIVATE
    assert call(node, ChangeState, 'policy/change_state', change).success
    wait_for(answer.done, 2, 'an answer')
    assert answer.result().success and answer.result().policy == checkpoint.load(waits).hash
    streams.fault = ('', None)
    count = len(streams.chunks)
    change.transition.id = Transition.TRANSITION_ACTIVATE
    assert call(node, ChangeState, 'policy/change_state', change).success
    wait_for(lambda: len(streams.chunks) > count + 2, what='planning with the new one')

    streams.told, since = None, time.monotonic()
    wait_for(lambda: streams.shown(since, DiagnosticStatus.WARN, ['the controller is silent']), 6, 'a controller that is missed')
    change.transition.id = Transition.TRANSITION_ACTIVE_SHUTDOWN
    assert call(node, ChangeState, 'policy/change_state', change).success
    time.sleep(0.3)
    count = len(streams.chunks)
    time.sleep(0.5)
    assert len(streams.chunks) == count


def random_message(rng, streams: Streams):
    """A stream's name and a message for it: of the right type, and otherwise anything."""
    def number():
        return float(rng.choice([0.0, 0.3, -1e308, np.nan, np.inf, rng.normal()]))

    def integer(high):
        return (0, 1, high, int(rng.integers(0, high, dtype=np.uint64)))[rng.integers(4)]

    def words():
        return ''.join(map(chr, rng.integers(1, 0xD7FF, rng.integers(0, 20))))

    kind = str(rng.choice(['joint_positions', 'goal', 'front', 'status', 'instruction']))
    now = streams.node.get_clock().now().to_msg()
    sec = int(rng.choice([now.sec, now.sec + 10, 0, -2**31, 2**31 - 1]))
    nanosec = int(rng.choice([now.nanosec, 0, 2**32 - 1]))
    if kind == 'joint_positions':
        names = [words() if rng.random() < 0.2 else name for name in rng.permutation(JOINTS)][:rng.integers(0, 8)]
        values = len(names) if rng.random() < 0.7 else int(rng.integers(0, 9))
        message = JointState(name=names, position=[number() for _ in range(values)])
    elif kind == 'goal':
        message = PointStamped(point=Point(x=number(), y=number(), z=number()))
    elif kind == 'front':
        encoding = str(rng.choice(['rgb8', 'bgr8', 'mono16', '32FC1', 'bayer_rggb8', 'nv12', 'yuyv', words()]))
        message = Image(height=integer(2**32 - 1), width=integer(2**32 - 1), step=integer(2**32 - 1), encoding=encoding,
                        is_bigendian=integer(255), data=rng.bytes(int(rng.integers(0, 3000))))
        if rng.random() < 0.5:
            message.height, message.width, message.step = (int(n) for n in rng.integers(0, 40, 3))
    elif kind == 'status':
        message = ControllerStatus(mode=integer(255), epoch=integer(2**64 - 1), reason=words(), ensembling=words())
    else:
        return kind, String(data=words())
    message.header.stamp.sec, message.header.stamp.nanosec = sec, nanosec
    return kind, message


def fire(streams: Streams, count: int, seed: int) -> None:
    """Send random messages on every input of a planner, and one in ten as bytes that may be no message at all."""
    from rclpy.serialization import serialize_message
    rng = np.random.default_rng(seed)
    publishers = {**streams.publishers, 'status': streams.status,
                  'instruction': streams.node.create_publisher(String, 'instruction', STATUS_QOS)}
    for i in range(count):
        kind, message = random_message(rng, streams)
        if rng.random() < 0.1:
            data = bytearray(serialize_message(message))
            for _ in range(rng.integers(1, 20)):
                data[rng.integers(4, len(data))] = rng.integers(0, 256)
            message = bytes(data[:rng.integers(4, len(data) + 1)] if rng.random() < 0.5 else data)
        publishers[kind].publish(message)
        if i % 5 == 0:
            time.sleep(0.005)


def test_a_planner_survives_whatever_it_is_sent(node, nodes, tmp_path):
    process = nodes.start('policy_node', contract=raw_contract(tmp_path), stride=1, nice=0,
                          checkpoint=save_policy(tmp_path / 'policy', features=('joint_positions', 'goal', 'front')))
    streams = Streams(node)
    wait_for(lambda: streams.diagnostics, 40, 'diagnostics')
    fire(streams, 1000, seed=0)
    time.sleep(0.5)
    assert process.poll() is None
    streams.follow(77)
    wait_for(lambda: [chunk for chunk in streams.chunks if chunk.epoch == 77], what='planning after all that')
    assert 'Traceback' not in nodes.log('policy_node')
