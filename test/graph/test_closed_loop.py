"""The whole graph at once: simulator, policy node and controller, each its own process, watched as the demo watches it."""
from __future__ import annotations

import numpy as np
import rclpy
import torch

from il_policies import checkpoint
from il_policies.contract import load_contract
from il_policies.policies import PolicySpec
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from il_policies.sim.reach_around import TIP_HEIGHT, Scene, inverse_kinematics
from il_runtime.demo.rollouts import over_dds
from support import ROOT, patient_contract

CONTRACT = ROOT / 'config/robots/so101.yaml'


def save_fidgeting_policy(path, scene: Scene):
    """An untrained flow policy whose actions stay within 0.05 rad of the scene's start pose."""
    torch.manual_seed(0)
    contract = load_contract(CONTRACT)
    pose = inverse_kinematics(np.array([[*scene.start, TIP_HEIGHT]]))[0]
    spec = PolicySpec({'joint_positions': (6,), 'goal': (2,)}, contract.action.joints, horizon=16, history=2, step_period=0.1,
                      action_offset=0.0)
    rng = np.random.default_rng(0)
    normalizer = Normalizer.fit({'joint_positions': rng.uniform(-1, 1, (50, 6)).astype(np.float32),
                                 'goal': rng.uniform(-1, 1, (50, 2)).astype(np.float32),
                                 'action': (pose + rng.uniform(-0.05, 0.05, (50, 6))).astype(np.float32)})
    checkpoint.save(path, Flow(spec, FlowConfig(euler_steps=4), normalizer), {})
    return path


def test_planner_controller_and_simulator_run_an_episode_within_limits(ros, nodes, tmp_path):
    scene = Scene()
    contract = patient_contract(tmp_path)
    nodes.start('simulator_node', contract=contract, nice=0)
    nodes.start('controller_node', contract=contract)
    nodes.start('policy_node', contract=contract, checkpoint=save_fidgeting_policy(tmp_path / 'policy', scene), stride=4,
                nice=0)

    def healthy():
        assert all(process.poll() is None for process in nodes.processes.values())

    told = []
    result = over_dds(load_contract(CONTRACT), [scene, scene], tmp_path / 'rollouts.npz', healthy,
                      lambda done, outcome: told.append((done, outcome)))
    # It fidgets where it stands: nothing is reached, nothing is touched, and each episode lasts its six seconds.
    assert told == [(1, 'not reached'), (2, 'not reached')]
    assert (result['successes'], result['touched'], result['episodes']) == (0, 0, 2)
    assert result['ticks'] > 500 and result['limit_violations'] == 0
    saved = np.load(tmp_path / 'rollouts.npz')
    assert len(saved['shown_chunks']) >= 8 and saved['shown_chunks'].shape[1:] == (16, 6)
    moved = np.ptp(saved['shown_commands'], axis=0)
    assert (moved > 1e-3).any() and (moved < 0.3).all(), 'the chunks were followed'
    assert len(saved['lateness']) > 500
    assert rclpy.ok()
