from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from il_policies.contract import load_contract
from il_policies.data.decode import decode
from il_policies.evaluate import evaluate
from il_policies.lockstep import Execution, contract_of, observe, run_episode, run_episodes, scenes
from il_policies.planner import Planner
from il_policies.policies import PolicyError, PolicySpec
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from il_policies.policies.unet import UNetConfig
from il_policies.policies.vision import VisionConfig
from il_policies.sim.reach_around import JOINTS, TIP_HEIGHT, ReachAround, inverse_kinematics

SEEING = {'joint_positions': (6,), 'front': (96, 96, 3)}
rendering = pytest.mark.skipif(os.environ.get('MUJOCO_GL') == 'disable',
                               reason='no libEGL on this machine: nothing can be rendered')


def make_policy(root, features=None) -> Flow:
    """An untrained policy for the SO-101 that fidgets about the start."""
    torch.manual_seed(0)
    spec = PolicySpec(features or SEEING, JOINTS, horizon=8, history=2, step_period=0.1, action_offset=0.0)
    pose = inverse_kinematics(np.array([[0.107, 0.0, TIP_HEIGHT]]))[0]
    ranges = {'joint_positions': (pose - 1, pose + 1), 'goal': ([0.2, -0.1], [0.3, 0.1]), 'action': (pose - 0.05, pose + 0.05)}
    normalizer = Normalizer({name: {'min': list(map(float, low)), 'max': list(map(float, high))}
                             for name, (low, high) in ranges.items() if name in (*spec.features, 'action')})
    policy = Flow(spec, FlowConfig(UNetConfig((16,)), 2, vision=VisionConfig((8,), 8, 16)), normalizer).eval()
    policy.extra = {'contract': load_contract(root / 'config/robots/so101.yaml').to_dict()}
    return policy


@rendering
def test_images_are_what_the_node_would_see(root):
    policy, simulation = make_policy(root), ReachAround()
    scene, other = scenes(2, 0, 'wide')
    simulation.reset(scene)
    observed = observe(simulation, policy.spec, scene)
    message = SimpleNamespace(format='jpeg', data=simulation.photograph((96, 96)))
    stream = contract_of(policy).observations['front']
    np.testing.assert_array_equal(observed['front'], decode(message, stream))
    np.testing.assert_array_equal(observed['joint_positions'], simulation.joint_positions)
    apart = np.abs(observe(simulation, policy.spec, other)['front'].astype(int) - observed['front']).max(axis=2) > 50
    assert 10 < apart.sum() < 120, 'the goal alone is elsewhere'
    simulation.close()


@rendering
def test_shuffled_images_are_those_of_the_next_episode(root, monkeypatch):
    monkeypatch.setattr('il_policies.sim.reach_around.EPISODE_S', 1.0)
    policy = make_policy(root)
    chosen, execution = scenes(2, 0, 'wide'), Execution(stride=7)
    shuffled = run_episodes(policy, chosen, 3, execution, shuffled=True)
    simulation = ReachAround()
    planner, contract = Planner(policy), contract_of(policy)
    own, same = (run_episode(simulation, planner, contract, chosen[0], execution, 3 * 1_000_003, seen) for seen in chosen)
    np.testing.assert_array_equal(shuffled[0].commands, same.commands)
    assert not np.array_equal(own.commands, same.commands), 'the image matters'
    assert own.duration == pytest.approx(1.0) and own.violations == 0 and len(own.chunks) == 2
    simulation.close()


def test_what_does_not_fit_is_refused(root):
    blind = make_policy(root, {'joint_positions': (6,), 'goal': (2,)})
    with pytest.raises(PolicyError, match=r"no images to shuffle: the policy sees \['joint_positions', 'goal'\]"):
        evaluate(blind, 'reach_around_wide', episodes=1, shuffled=True)
    with pytest.raises(PolicyError, match='pusht: there are no images to shuffle'):
        evaluate(blind, 'pusht', shuffled=True)
    with pytest.raises(PolicyError, match='valid: pusht, reach_around, reach_around_wide'):
        evaluate(blind, 'chess')


@rendering
def test_images_of_another_size_are_refused(root):
    with pytest.raises(PolicyError, match=r"'front': \(48, 48, 3\).*the task has.*\(96, 96, 3\)"):
        evaluate(make_policy(root, {'front': (48, 48, 3)}), 'reach_around', episodes=1)
