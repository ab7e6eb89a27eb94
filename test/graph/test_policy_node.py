from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
import torch
from geometry_msgs.msg import Point, PointStamped
from il_msgs.msg import ActionChunk, ControllerStatus
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, JointState

from il_policies import checkpoint
from il_policies.contract import load_contract
from il_policies.policies import PolicySpec
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from il_runtime.ros import STATUS_QOS, chunk_qos, nanoseconds
from support import ROOT, wait_for

CONTRACT = ROOT / 'config/robots/so101.yaml'


def save_policy(path, joints=None, step_period=0.1, features=None):
    """An untrained flow policy for the SO-101."""
    torch.manual_seed(0)
    joints = joints or load_contract(CONTRACT).action.joints
    spec = PolicySpec(features or {'joint_positions': (6,), 'goal': (2,)}, tuple(joints), horizon=16, history=2,
                      step_period=step_period, action_offset=0.0)
    rng = np.random.default_rng(0)
    normalizer = Normalizer.fit({name: rng.uniform(-1, 1, (50, size)).astype(np.float32)
                                 for name, size in (('joint_positions', 6), ('goal', 2), ('action', len(joints)))})
    checkpoint.save(path, Flow(spec, FlowConfig(euler_steps=2), normalizer), {})
    return path


class Robot:
    """What a policy node needs around it: joint states, a goal and a controller's status; collects its chunks."""

    def __init__(self, node):
        self.node, self.chunks, self.goal_is_silent, self.frames = node, [], False, []
        self.names = list(load_contract(CONTRACT).action.joints)
        self.states = node.create_publisher(JointState, 'joint_states', 10)
        self.goals = node.create_publisher(PointStamped, 'goal', 10)
        self.status = node.create_publisher(ControllerStatus, 'controller/status', STATUS_QOS)
        node.create_subscription(ActionChunk, 'chunks', self.chunks.append, chunk_qos())
        node.create_timer(0.01, self._report)

    def _report(self):
        now = self.node.get_clock().now().to_msg()
        # Shuffled names: the node must match them by name.
        state = JointState(name=self.names[::-1], position=np.linspace(0, 0.5, 6)[::-1])
        state.header.stamp = now
        self.states.publish(state)
        if not self.goal_is_silent:
            goal = PointStamped(point=Point(x=0.28, y=0.01))
            goal.header.stamp = now
            self.goals.publish(goal)

    def photograph(self, image: np.ndarray):
        """Send a camera image from now on, ten a second."""
        data = cv2.imencode('.jpg', image[..., ::-1])[1].tobytes()
        publisher = self.node.create_publisher(CompressedImage, 'camera/image/compressed', qos_profile_sensor_data)

        def send():
            message = CompressedImage(format='jpeg', data=data)
            message.header.stamp = self.node.get_clock().now().to_msg()
            self.frames.append(message)
            publisher.publish(message)

        return self.node.create_timer(0.1, send)

    def follow(self, epoch: int, mode: int = ControllerStatus.HOLD):
        self.status.publish(ControllerStatus(mode=mode, epoch=epoch))


@pytest.fixture
def robot(node):
    return Robot(node)


def test_chunks_carry_time_names_epoch_and_rise(robot, nodes, tmp_path):
    path = save_policy(tmp_path / 'policy')
    nodes.start('policy_node', contract=CONTRACT, checkpoint=path, stride=2, nice=0)
    robot.follow(7, ControllerStatus.INACTIVE)
    wait_for(lambda: 'plans every 0.2 s' in nodes.log('policy_node'), 40, 'activation')
    time.sleep(0.5)
    assert not robot.chunks, 'nobody is armed'
    robot.follow(8)
    wait_for(lambda: len(robot.chunks) >= 6, 20, 'six chunks')
    chunks = robot.chunks[:6]
    assert [c.epoch for c in chunks] == [8] * 6 and [c.sequence for c in chunks] == list(range(6))
    assert all(c.start == c.header.stamp for c in chunks), 'label `command`: the first action is for now'
    stamps = np.array([nanoseconds(c.start) for c in chunks]) * 1e-9
    assert np.median(np.diff(stamps)) == pytest.approx(0.2, abs=0.03)
    assert all(c.horizon == 16 and len(c.positions) == 96 and c.step_period == 0.1 for c in chunks)
    assert all(list(c.joint_names) == robot.names and c.policy == checkpoint.load(path).hash for c in chunks)
    assert all(0 < nanoseconds(c.inference_time) < 10**9 for c in chunks)

    # The controller stops and holds again within the epoch: planning pauses, the sequence goes on.
    robot.follow(8, ControllerStatus.STOPPING)
    time.sleep(0.5)
    count = len(robot.chunks)
    time.sleep(0.5)
    assert len(robot.chunks) == count
    robot.follow(8)
    wait_for(lambda: len(robot.chunks) > count, what='planning again')
    sequences = [c.sequence for c in robot.chunks]
    assert sequences == list(range(len(sequences)))

    robot.follow(9)
    new = wait_for(lambda: [c for c in robot.chunks if c.epoch == 9], what='a chunk of the new epoch')
    assert new[0].sequence == 0


def test_a_silent_stream_stops_planning_and_is_named(robot, nodes, tmp_path):
    nodes.start('policy_node', contract=CONTRACT, checkpoint=save_policy(tmp_path / 'policy'), stride=1, nice=0)
    wait_for(lambda: 'plans every' in nodes.log('policy_node'), 40, 'activation')
    robot.follow(1)
    wait_for(lambda: len(robot.chunks) > 3, what='chunks')
    robot.goal_is_silent = True
    wait_for(lambda: 'not planning: goal: newest sample is' in nodes.log('policy_node'), what='a warning that names the stream')
    count = len(robot.chunks)
    time.sleep(0.5)
    assert len(robot.chunks) == count
    robot.goal_is_silent = False
    wait_for(lambda: len(robot.chunks) > count, what='recovery')


def test_a_policy_that_sees_plans_from_the_newest_frame(robot, nodes, tmp_path):
    """Chunks are what the policy predicts from the frame as it was sent, each from new noise as long as none is followed.

    Their stamps are the frames', and no frame is from before the epoch.
    """
    path = save_policy(tmp_path / 'policy', features={'joint_positions': (6,), 'front': (96, 96, 3)})
    nodes.start('policy_node', contract=CONTRACT, checkpoint=path, stride=2, nice=0, seed=5)
    wait_for(lambda: 'plans every' in nodes.log('policy_node'), 40, 'activation')
    robot.follow(1)
    wait_for(lambda: 'not planning: nothing received on camera/image/compressed' in nodes.log('policy_node'),
             what='a warning that names the camera')
    assert not robot.chunks
    sent = np.zeros((96, 96, 3), np.uint8)
    sent[30:60, 10:50] = (30, 200, 90)
    camera = robot.photograph(sent)
    wait_for(lambda: len(robot.chunks) >= 3, what='chunks')
    first = robot.chunks[:3]
    told = robot.node.get_clock().now().nanoseconds
    robot.follow(2)
    again = wait_for(lambda: [chunk for chunk in robot.chunks if chunk.epoch == 2], what='a chunk of the new epoch')
    assert nanoseconds(again[0].header.stamp) >= told
    stamps = {nanoseconds(frame.header.stamp) for frame in robot.frames}
    assert {nanoseconds(chunk.header.stamp) for chunk in robot.chunks} <= stamps

    policy = checkpoint.load(path)
    seen = cv2.imdecode(np.frombuffer(robot.frames[0].data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    observation = {'joint_positions': torch.linspace(0, 0.5, 6).expand(1, 2, 6),
                   'front': torch.from_numpy(np.stack([seen, seen])[None].copy())}
    generator = torch.Generator().manual_seed(5)
    for chunk in first:
        noise = torch.randn((1, 16, 6), generator=generator)
        expected = policy.predict(observation, noise=noise)[0].numpy().ravel()
        np.testing.assert_allclose(chunk.positions, expected, atol=1e-4)
    blank = policy.predict({**observation, 'front': torch.zeros_like(observation['front'])}, noise=noise)[0].numpy().ravel()
    assert np.abs(blank - expected).max() > 3e-3, 'it would be another chunk from another image'

    camera.cancel()
    wait_for(lambda: 'not planning: camera/image/compressed: newest sample is' in nodes.log('policy_node'),
             what='a warning that names the camera')
    count = len(robot.chunks)
    time.sleep(0.5)
    assert len(robot.chunks) == count


def test_a_policy_of_another_robot_is_refused(nodes, tmp_path):
    path = save_policy(tmp_path / 'policy', joints=['a', 'b'], step_period=0.05)
    assert nodes.start('policy_node', contract=CONTRACT, checkpoint=path).wait(40) == 2
    log = nodes.log('policy_node')
    assert "found ['a', 'b']: without shoulder_pan" in log and 'found 0.05 s' in log and 'Traceback' not in log


def test_no_checkpoint_is_one_clear_line(nodes, tmp_path):
    assert nodes.start('policy_node', contract=CONTRACT, checkpoint=tmp_path / 'nowhere').wait(40) == 2
    assert 'nowhere' in nodes.log('policy_node') and 'Traceback' not in nodes.log('policy_node')
