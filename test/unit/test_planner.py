from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from il_policies.planner import Planner, resample
from il_policies.policies import PolicyError
from il_policies.policies.flow import Flow
from il_policies.policies.guidance import Guidance
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
                                                ({'tau': 1.0}, 'tau'), ({'rtc': 'on'}, "rtc is 'on'; valid: off, vjp"),
                                                ({'beta': 0.0}, 'beta is 0.0')])
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Planner(make_flow(), **wrong)


def test_warming_up_changes_no_chunk():
    warm, cold = (Planner(make_flow(), 'per_chunk', seed=3) for _ in range(2))
    warm.warm_up()
    np.testing.assert_array_equal(warm.plan(OBSERVATION, 0.0), cold.plan(OBSERVATION, 0.0))


def weights(horizon: int, delay: int, executed: int) -> list[float]:
    """Eq. 5 of the paper, step by step."""
    found = []
    for i in range(horizon):
        c = (horizon - executed - i) / (horizon - executed - delay + 1)
        found.append(1.0 if i < delay else c * (np.exp(c) - 1) / (np.e - 1) if i < horizon - executed else 0.0)
    return found


@pytest.mark.parametrize('mode', ['vjp', 'identity'])
@pytest.mark.parametrize(('start', 'delay', 'd', 's'), [
    (10.3, 0.0, 0, 3), (10.3, 0.12, 2, 3), (10.25, 0.2, 2, 3), (10.3, 5.0, 3, 3), (10.6, 0.5, 2, 6), (10.7, 0.3, 1, 7)])
def test_rtc_continues_the_previous_chunk_by_time(mode, start, delay, d, s):
    """Against the policy itself, given the target by np.interp and the weights by hand; H = 8, 0.1 s a step.

    A delay that does not fit is cut to what was executed, and to what the chunks share.
    """
    flow = make_flow()
    planner = Planner(flow, 'per_chunk', seed=7, rtc=mode)
    first, second = planner.plan(OBSERVATION, 10.0), planner.plan(OBSERVATION, start, delay)
    generator = torch.Generator().manual_seed(7)
    noises = [torch.randn((1, 8, 3), generator=generator) for _ in range(2)]
    batch, times = {'state': torch.from_numpy(OBSERVATION['state'])[None]}, 0.1 * np.arange(8)
    target = np.stack([np.interp(start - 10.0 + times, times, first[:, joint]) for joint in range(3)], axis=1)
    guidance = Guidance(torch.tensor(target[None], dtype=torch.float32), torch.tensor(weights(8, d, s)), mode, 5.0, d)
    np.testing.assert_allclose(first, flow.predict(batch, noise=noises[0])[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(second, flow.predict(batch, noise=noises[1], guidance=guidance)[0].numpy(), atol=1e-4)
    assert np.abs(second - flow.predict(batch, noise=noises[1])[0].numpy()).max() > 1e-3


@pytest.mark.parametrize('start', [10.8, 30.0, 9.0])
def test_nothing_is_continued_where_chunks_do_not_overlap(start):
    """As if there had been no previous chunk: no target is made up."""
    guided, free = (Planner(make_flow(), 'per_chunk', seed=7, rtc=rtc) for rtc in ('vjp', 'off'))
    for planner in (guided, free):
        planner.plan(OBSERVATION, 10.0)
    np.testing.assert_array_equal(guided.plan(OBSERVATION, start, 0.1), free.plan(OBSERVATION, start))


def test_rtc_after_a_new_epoch_continues_nothing():
    guided, free = (Planner(make_flow(), 'per_chunk', seed=7, rtc=rtc) for rtc in ('vjp', 'off'))
    for planner in (guided, free):
        planner.plan(OBSERVATION, 10.0)
        planner.reset(seed=2)
    np.testing.assert_array_equal(guided.plan(OBSERVATION, 10.3, 0.1), free.plan(OBSERVATION, 10.3))


@pytest.mark.parametrize(('policy', 'mode'), [(make_bc, 'vjp'), (make_flow, 'prefix')])
def test_a_policy_that_takes_no_guidance_says_so_before_it_plans(policy, mode):
    with pytest.raises(PolicyError, match='guidance'):
        Planner(policy(), rtc=mode).warm_up()


@pytest.mark.parametrize('rtc', ['off', 'vjp'])
@pytest.mark.parametrize('speed', [0.0, 0.2, 0.5])
def test_of_what_is_played_slowly_more_is_left(rtc, speed):
    """At a fifth of full speed an arm comes in 0.5 s as far as in 0.1 s, and so much of a chunk passes while one is planned."""
    slow, full = (Planner(make_flow(), 'warm_start', seed=7, rtc=rtc) for _ in range(2))
    for planner in (slow, full):
        planner.plan(OBSERVATION, 10.0)
    expected = full.plan(OBSERVATION, 10.0 + 0.5 * speed, 0.2 * speed)
    np.testing.assert_allclose(slow.plan(OBSERVATION, 10.5, 0.2, speed), expected, atol=1e-5)
    other = Planner(make_flow(), 'warm_start', seed=7, rtc=rtc)
    other.plan(OBSERVATION, 10.0)
    assert np.abs(other.plan(OBSERVATION, 10.5, 0.2) - expected).max() > 1e-3


def test_a_chunk_that_was_played_slowly_ends_at_its_time_all_the_same():
    guided, free = (Planner(make_flow(), 'per_chunk', seed=7, rtc=rtc) for rtc in ('vjp', 'off'))
    for planner in (guided, free):
        planner.plan(OBSERVATION, 10.0)
    np.testing.assert_array_equal(guided.plan(OBSERVATION, 10.8, 0.1, 0.2), free.plan(OBSERVATION, 10.8))


@pytest.mark.parametrize(('period', 'steps'), [(1 / 30, 4), (0.02, 7), (0.05, 3), (0.1, 3)])
def test_whole_steps_of_a_wall_clock_are_whole_steps(period, steps):
    """A float holds today's seconds to 2e-7 only."""
    flow = make_flow(spec=dataclasses.replace(make_flow().spec, step_period=period))
    wall, small = (Planner(flow, 'per_chunk', seed=7, rtc='identity') for _ in range(2))
    for planner, start in ((wall, 1.8e9), (small, 0.0)):
        planner.plan(OBSERVATION, start)
    expected = small.plan(OBSERVATION, steps * period, period)
    np.testing.assert_allclose(wall.plan(OBSERVATION, 1.8e9 + steps * period, period), expected, atol=1e-4)
