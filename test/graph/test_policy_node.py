from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from geometry_msgs.msg import Point, PointStamped
from il_msgs.msg import ActionChunk, ControllerStatus
from sensor_msgs.msg import JointState

from il_policies import checkpoint
from il_policies.contract import load_contract
from il_policies.policies import PolicySpec
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from il_runtime.ros import STATUS_QOS, chunk_qos, nanoseconds
from support import ROOT, wait_for

CONTRACT = ROOT / 'config/robots/so101.yaml'


def save_policy(path, joints=None, step_period=0.1):
    """An untrained flow policy for the SO-101."""
    torch.manual_seed(0)
    joints = joints or load_contract(CONTRACT).action.joints
    spec = PolicySpec({'joint_positions': (6,), 'goal': (2,)}, tuple(joints), horizon=16, history=2, step_period=step_period,
                      action_offset=0.0)
    rng = np.random.default_rng(0)
    normalizer = Normalizer.fit({name: rng.uniform(-1, 1, (50, size)).astype(np.float32)
                                 for name, size in (('joint_positions', 6), ('goal', 2), ('action', len(joints)))})
    checkpoint.save(path, Flow(spec, FlowConfig(euler_steps=2), normalizer), {})
    return path


class Robot:
    """What a policy node needs around it: joint states, a goal and a controller's status; collects its chunks."""

    def __init__(self, node):
        self.node, self.chunks, self.goal_is_silent = node, [], False
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


def test_a_policy_of_another_robot_is_refused(nodes, tmp_path):
    path = save_policy(tmp_path / 'policy', joints=['a', 'b'], step_period=0.05)
    assert nodes.start('policy_node', contract=CONTRACT, checkpoint=path).wait(40) == 2
    log = nodes.log('policy_node')
    assert "joints ['a', 'b'] ≠" in log and 'step period 0.05 s ≠ 0.1 s' in log and 'Traceback' not in log


def test_no_checkpoint_is_one_clear_line(nodes, tmp_path):
    assert nodes.start('policy_node', contract=CONTRACT, checkpoint=tmp_path / 'nowhere').wait(40) == 2
    assert 'nowhere' in nodes.log('policy_node') and 'Traceback' not in nodes.log('policy_node')
