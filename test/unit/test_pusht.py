from __future__ import annotations

import numpy as np
import pytest
import torch

from il_policies.evaluate import evaluate, evaluate_pusht
from il_policies.policies import PolicyError, PolicySpec
from il_policies.policies.diffusion import Diffusion, DiffusionConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from il_policies.policies.unet import UNetConfig
from il_policies.sim.pusht import PushT, legacy_start


@pytest.fixture(scope='module')
def demonstrations(request):
    file = request.config.rootpath.parent / 'shared' / 'data' / 'pusht_lowdim.npz'
    if not file.exists():
        pytest.skip(f'the human PushT demonstrations are not at {file}')
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


def make_policy(features, actions=('x', 'y'), period=0.1) -> Flow:
    torch.manual_seed(0)
    spec = PolicySpec(features, actions, horizon=16, history=2, step_period=period, action_offset=0.0)
    statistics = {name: {'min': [0.0] * shape[0], 'max': [512.0] * shape[0]} for name, shape in features.items()}
    return Flow(spec, FlowConfig(UNetConfig((16, 32)), euler_steps=2), Normalizer(
        {**statistics, 'action': {'min': [0.0] * len(actions), 'max': [512.0] * len(actions)}})).eval()


def test_replayed_human_actions_give_the_recorded_states_and_score(demonstrations):
    """The recording is the truth: for the physics, the way of setting a state, and what is observed."""
    state, action = demonstrations['state'].astype(float), demonstrations['action']
    keypoints = demonstrations['keypoint'].reshape(len(state), -1)
    end = int(demonstrations['episode_ends'][0])
    env = PushT()
    env.reset(state[0])
    best = 0.0
    for t in range(end):
        difference = env.state - state[t]
        difference[4] = (difference[4] + np.pi) % (2 * np.pi) - np.pi
        assert np.abs(difference).max() < 1e-3
        observation = env.observation()
        np.testing.assert_allclose(observation['keypoints'], keypoints[t], atol=0.1)
        pose = [*state[t, :4], np.sin(state[t, 4]), np.cos(state[t, 4])]
        np.testing.assert_allclose(observation['pose'], pose, atol=1e-2)
        best = max(best, env.step(action[t]))
    assert best > 0.9


def test_starts_are_those_of_the_protocol():
    """Diffusion Policy draws them from NumPy's old generator, in this order, and sets the block's position first."""
    rng = np.random.RandomState(100003)
    expected = [rng.randint(50, 450), rng.randint(50, 450), rng.randint(100, 400), rng.randint(100, 400),
                rng.randn() * 2 * np.pi - np.pi]
    np.testing.assert_array_equal(legacy_start(100003), expected)
    env = PushT()
    env.reset(np.array(expected))
    np.testing.assert_allclose(env.state[:4], expected[:4], atol=1e-9)
    np.testing.assert_allclose(env.state[4], expected[4] % (2 * np.pi), atol=1e-9)
    env.reset(np.array(expected), legacy=True)
    assert np.abs(env.state[2:4] - expected[2:4]).max() > 5, 'setting the angle last moves the block'
    np.testing.assert_allclose(env.state[4], expected[4] % (2 * np.pi), atol=0.1)


def test_an_episode_does_not_depend_on_the_others():
    policy = make_policy({'pose': (6,), 'keypoints': (18,)})
    result = evaluate(policy, 'pusht', episodes=3, seed=100000)
    again = evaluate_pusht(policy, episodes=1, seed=100001)
    assert result['episodes'] == 3 and len(result['scores']) == 3
    assert result['score'] == pytest.approx(np.mean(result['scores']))
    assert all(0.0 <= score <= 1.0 for score in result['scores'])
    assert again['scores'][0] == pytest.approx(result['scores'][1], abs=1e-3)


def test_scores_of_ddpm_are_reproduced_too():
    """It draws at every step, beside the noise of a chunk; whoever asks for a score keeps a random state of his own."""
    flow = make_policy({'pose': (6,)})
    config = DiffusionConfig(UNetConfig((16, 32)), sampler='ddpm', inference_steps=3)
    policy = Diffusion(flow.spec, config, flow.normalizer).eval()
    torch.manual_seed(1)
    first = evaluate(policy, 'pusht', episodes=8, seed=100000)['scores']
    after = torch.rand(1)
    torch.manual_seed(2)
    assert evaluate(policy, 'pusht', episodes=8, seed=100000)['scores'] == first
    torch.manual_seed(1)
    assert torch.rand(1) == after


def test_other_policies_are_refused():
    with pytest.raises(PolicyError, match='pusht: the policy sees.*goal'):
        evaluate_pusht(make_policy({'goal': (2,)}))
    with pytest.raises(PolicyError, match='gives 3 actions'):
        evaluate_pusht(make_policy({'pose': (6,)}, actions=('x', 'y', 'z')))
    with pytest.raises(PolicyError, match='stride is 17'):
        evaluate_pusht(make_policy({'pose': (6,)}), stride=17)
    with pytest.raises(PolicyError, match="no task 'chess'; valid: .*pusht"):
        evaluate(make_policy({'pose': (6,)}), 'chess')
