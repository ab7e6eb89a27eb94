from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from il_policies.contract import load_contract
from il_policies.data.decode import decode
from il_policies.evaluate import evaluate
from il_policies.lockstep import Execution, contract_of, followed, observe, run_episode, run_episodes, scenes
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
    for option, value, least in (('episodes', 0, 1), ('seed', -1, 0), ('stride', 0, 1)):
        for task in ('pusht', 'reach_around'):
            with pytest.raises(PolicyError, match=f'{task}: {option} is {value}, must be at least {least}'):
                evaluate(blind, task, **{option: value})


@rendering
def test_images_of_another_size_are_refused(root):
    with pytest.raises(PolicyError, match=r"'front': \(48, 48, 3\).*the task has.*\(96, 96, 3\)"):
        evaluate(make_policy(root, {'front': (48, 48, 3)}), 'reach_around', episodes=1)


class Stairs:
    """A planner whose nth chunk goes, or stands, n stairs from where the arm starts."""

    STAIR = 0.02

    def __init__(self, horizon: int = 16, slope: float = 0.0):
        self.policy = SimpleNamespace(spec=PolicySpec({'joint_positions': (6,)}, JOINTS, horizon, 1, 0.1, 0.0))
        self.slope, self.first, self.asked = slope, 0, []

    def reset(self, seed=None):
        self.asked, self.forgot = [], []

    def forget(self):
        self.forgot.append(len(self.asked))

    def plan(self, observation, start, delay=0.0):
        if not self.asked:
            self.home = observation['joint_positions'][-1]
        self.asked.append((start, delay))
        along = (len(self.asked) - 1 + self.first) * self.STAIR + self.slope * np.arange(self.policy.spec.horizon)
        return self.home + along[:, None] * (np.arange(6) == 0)


def climb(root, monkeypatch, planner: Stairs, **settings):
    """An episode of 3 s without rendering, and how far the shoulder was asked to turn in each control period."""
    monkeypatch.setattr('il_policies.sim.reach_around.EPISODE_S', 3.0)
    simulation, scene = ReachAround(camera=False), scenes(1, 0)[0]
    episode = run_episode(simulation, planner, load_contract(root / 'config/robots/so101.yaml'), scene,
                          Execution(ensembling='latest', **settings), 0, scene)
    return episode, episode.targets[:, 0] - planner.home[0]


@pytest.mark.parametrize(('delay', 'stride'), [(0, 4), (4, 4), (3, 8), (8, 8)])
def test_a_chunk_is_followed_only_after_its_delay(root, monkeypatch, delay, stride):
    planner = Stairs()
    episode, turned = climb(root, monkeypatch, planner, delay=delay, stride=stride)
    planned = [round(start / 0.02) for start, _ in planner.asked]
    assert planned == list(range(0, 150, 5 * stride)), 'thinking holds nobody up'
    assert [asked for _, asked in planner.asked] == pytest.approx([0.0] + [0.1 * delay] * (len(planned) - 1))
    assert episode.arrivals == [0] + [tick + 5 * delay for tick in planned[1:] if tick + 5 * delay <= 150]
    for n, tick in enumerate(episode.arrivals[1:], 1):
        assert turned[tick - 1] == pytest.approx((n - 1) * Stairs.STAIR), 'before, the old chunk'
        assert turned[min(tick + 3, len(turned) - 1)] == pytest.approx(n * Stairs.STAIR), 'then, the new one'
    assert episode.violations == 0


def test_who_plans_synchronously_stands_meanwhile(root, monkeypatch):
    planner = Stairs(slope=0.005)  # four steps are a stair: each chunk begins where the one before was left
    episode, turned = climb(root, monkeypatch, planner, delay=6, stride=4, waits=True)
    assert episode.arrivals == [0, 50, 100, 150], 'four steps, then six of waiting'
    standing = turned[20:50]
    assert np.ptp(standing) == pytest.approx(0.0, abs=1e-9) and standing[0] == pytest.approx(4 * 0.005)
    assert turned[70] == pytest.approx(8 * 0.005)
    # A chunk that is planned while the arm stands begins when it is there.
    assert [start for start, _ in planner.asked[:3]] == pytest.approx([0.0, 1.0, 2.0])


def test_a_chunk_that_was_refused_is_not_continued(root, monkeypatch):
    monkeypatch.setattr(Stairs, 'STAIR', 0.1)
    far, near = Stairs(), Stairs()
    far.first = 3  # 0.3 rad off, where 0.15 is tolerated
    assert not np.abs(climb(root, monkeypatch, far, stride=4)[1]).max() > 1e-6
    assert far.forgot == list(range(8)), 'nothing is ever followed'
    climb(root, monkeypatch, near, stride=4)
    assert near.forgot == [0]


def test_targets_are_held_only_for_who_waits():
    np.testing.assert_array_equal(followed(Execution(stride=8), 16), np.arange(16))
    np.testing.assert_array_equal(followed(Execution(stride=4, delay=4), 16), np.arange(16))
    assert followed(Execution(stride=8, delay=8), 16).tolist() == [*range(16), 15, 15, 15, 15, 15]
    assert followed(Execution(stride=2, delay=1, waits=True), 16).tolist() == [0, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(('delay', 'stride', 'waits'), [(5, 4, False), (4, 13, False), (-1, 4, True)])
def test_a_chunk_must_last_until_the_next_one(delay, stride, waits):
    with pytest.raises(PolicyError, match='0 <= delay <= stride <= horizon - delay'):
        Execution(delay=delay, stride=stride, waits=waits).check(16)


def test_action_noise_is_its_own_and_repeats(root, monkeypatch):
    quiet, loud, again = (climb(root, monkeypatch, Stairs(), action_noise=noise)[0] for noise in (0.0, 0.02, 0.02))
    np.testing.assert_array_equal(loud.tips, again.tips)
    np.testing.assert_array_equal(loud.commands, quiet.commands)
    assert 1e-3 < np.linalg.norm(loud.tips - quiet.tips, axis=1).max() < 0.05


def test_a_policy_is_told_where_the_goal_is_now():
    simulation = ReachAround(camera=False)
    start = scenes(1, 0)[0].start
    simulation.reset(replace(scenes(1, 0, 'wide')[0], start=start, goal_speed=0.1))
    for _ in range(100):
        simulation.step(simulation.joint_positions)
    np.testing.assert_allclose(simulation.observation()['goal'], simulation.scene.goal_at(2.0), atol=1e-6)
