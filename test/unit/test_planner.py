from __future__ import annotations

import numpy as np
import pytest
import torch

from il_policies.planner import Planner, resample
from il_policies.policies.flow import Flow
from test_bc import make_bc
from test_flow import make_flow
from test_vision import make_policy, pictures

OBSERVATION = {'state': np.array([[0.1, -0.2], [0.3, 0.0]], np.float32)}


@pytest.mark.parametrize('seed', range(20))
def test_resampling_by_time_against_interpolation(seed):
    """np.interp on the clock is the truth: linear between steps, held before the first and after the last."""
    rng = np.random.default_rng(seed)
    H, D, P = int(rng.integers(1, 20)), 3, float(rng.uniform(0.02, 0.3))
    chunk, old = rng.normal(size=(H, D)), float(rng.uniform(0, 1e6))
    new = old + float(rng.uniform(-1.5, 1.5)) * H * P
    times = np.arange(H) * P
    expected = np.stack([np.interp(new - old + times, times, chunk[:, d]) for d in range(D)], axis=1)
    np.testing.assert_allclose(resample(chunk, old, new, P), expected, atol=1e-6)


def test_the_warm_start_is_the_previous_chunk_by_time():
    """The second chunk is what the policy gives for the first, shifted 3 steps by hand, with the planner's noise."""
    flow = make_flow()
    planner = Planner(flow, 'warm_start', tau=0.5, seed=7)
    first, second = planner.plan(OBSERVATION, 10.0), planner.plan(OBSERVATION, 10.3)
    generator = torch.Generator().manual_seed(7)
    noises = [torch.randn((1, 8, 3), generator=generator) for _ in range(2)]
    batch = {'state': torch.from_numpy(OBSERVATION['state'])[None]}
    shifted = torch.from_numpy(np.concatenate([first[3:], np.repeat(first[-1:], 3, axis=0)]).astype(np.float32))[None]
    np.testing.assert_allclose(first, flow.predict(batch, noise=noises[0])[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(second, flow.predict(batch, noise=noises[1], warm=(shifted, 0.5))[0].numpy(), atol=1e-5)
    assert first.shape == (8, 3) and first.dtype == np.float64


def test_what_was_not_followed_is_no_start():
    flow = make_flow()
    planner = Planner(flow, 'warm_start', seed=7)
    planner.plan(OBSERVATION, 0.0)
    planner.forget()
    chunk = planner.plan(OBSERVATION, 0.3)
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randn((1, 8, 3), generator=generator) for _ in range(2)][1]
    expected = flow.predict({'state': torch.from_numpy(OBSERVATION['state'])[None]}, noise=noise)[0].numpy()
    np.testing.assert_allclose(chunk, expected, atol=1e-6)


def test_images_reach_the_policy_as_they_are():
    policy = make_policy(Flow)
    planner = Planner(policy, 'per_chunk', seed=3)
    planner.warm_up()
    images = pictures(1)[0]
    chunk = planner.plan({**OBSERVATION, 'front': images.numpy()}, 0.0)
    noise = torch.randn((1, 8, 3), generator=torch.Generator().manual_seed(3))
    batch = {'state': torch.from_numpy(OBSERVATION['state'])[None], 'front': images[None]}
    np.testing.assert_allclose(chunk, policy.predict(batch, noise=noise)[0].numpy(), atol=1e-6)


def test_noise_per_epoch_and_per_chunk():
    flow = make_flow()
    planner = Planner(flow, 'per_epoch', seed=1)
    one, two = planner.plan(OBSERVATION, 0.0), planner.plan(OBSERVATION, 0.4)
    np.testing.assert_array_equal(one, two)
    planner.reset()
    assert np.abs(planner.plan(OBSERVATION, 0.0) - one).max() > 1e-3
    planner = Planner(flow, 'per_chunk', seed=1)
    assert np.abs(planner.plan(OBSERVATION, 0.0) - planner.plan(OBSERVATION, 0.4)).max() > 1e-3


@pytest.mark.parametrize('noise', ['warm_start', 'per_epoch', 'per_chunk'])
def test_an_epoch_can_be_repeated(noise):
    planner = Planner(make_flow(), noise, seed=0)
    runs = []
    for _ in range(2):
        planner.reset(seed=5)
        runs.append([planner.plan(OBSERVATION, 0.4 * i) for i in range(3)])
    np.testing.assert_array_equal(runs[0], runs[1])


def test_a_new_epoch_forgets_the_previous_chunk():
    flow = make_flow()
    used, fresh = Planner(flow, 'warm_start'), Planner(flow, 'warm_start')
    used.plan(OBSERVATION, 0.0)
    used.reset(seed=3)
    fresh.reset(seed=3)
    np.testing.assert_array_equal(used.plan(OBSERVATION, 0.4), fresh.plan(OBSERVATION, 0.4))


def test_regression_plans_too():
    planner = Planner(make_bc())
    np.testing.assert_array_equal(planner.plan(OBSERVATION, 0.0), planner.plan(OBSERVATION, 0.4))


@pytest.mark.parametrize(('wrong', 'message'), [({'noise': 'none'}, "noise is 'none'; valid: warm_start"),
                                                ({'tau': 1.0}, 'tau')])
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Planner(make_flow(), **wrong)


def test_warming_up_changes_no_chunk():
    warm, cold = (Planner(make_flow(), 'per_chunk', seed=3) for _ in range(2))
    warm.warm_up()
    np.testing.assert_array_equal(warm.plan(OBSERVATION, 0.0), cold.plan(OBSERVATION, 0.0))
