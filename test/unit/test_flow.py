from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from il_policies.policies import PolicyError, PolicySpec
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.guidance import Guidance, rtc_weights
from il_policies.policies.normalize import Normalizer
from il_policies.policies.transformer import TransformerConfig
from il_policies.policies.unet import UNetConfig

SMALL = UNetConfig((16, 32))
torch.set_num_threads(1)  # these nets are too small to share between cores


def make_spec(**changes) -> PolicySpec:
    values = {'features': {'state': (2,)}, 'action_names': ('a', 'b', 'c'), 'horizon': 8, 'history': 2,
              'step_period': 0.1, 'action_offset': 0.0}
    return PolicySpec(**{**values, **changes})


def unit_normalizer(spec: PolicySpec) -> Normalizer:
    sizes = {**{name: shape[0] for name, shape in spec.features.items()}, 'action': len(spec.action_names)}
    return Normalizer({name: {'min': [-1.0] * size, 'max': [1.0] * size} for name, size in sizes.items()})


def make_flow(seed: int = 0, spec: PolicySpec | None = None, **config) -> Flow:
    torch.manual_seed(seed)
    spec = spec or make_spec()
    return Flow(spec, FlowConfig(SMALL, **config), unit_normalizer(spec)).eval()


class GaussianVelocity(nn.Module):
    """The exact velocity field when the data are N(mu, s²): x_t is N(t·mu, (1-t)² + t²s²), and x₁ = mu + s·x₀."""

    def __init__(self, mu: float, s: float):
        super().__init__()
        self.mu, self.s = mu, s
        self.anchor = nn.Parameter(torch.zeros(()))

    def variance(self, t):
        return (1 - t) ** 2 + t**2 * self.s**2

    def forward(self, x, t, condition):
        t = t[:, None, None]
        return self.mu + (t * self.s**2 - (1 - t)) / self.variance(t) * (x - t * self.mu)


class MixtureVelocity(nn.Module):
    """The exact velocity field when each entry is drawn from the sum of w_i·N(mu_i, s²): GaussianVelocity of each, shared."""

    def __init__(self, mu: list[float], w: list[float], s: float):
        super().__init__()
        self.parts = nn.ModuleList(GaussianVelocity(m, s) for m in mu)
        self.w = w

    def forward(self, x, t, condition):
        share, velocity = [], []
        for w, part in zip(self.w, self.parts):
            share.append(math.log(w) - (x - t[:, None, None] * part.mu) ** 2 / (2 * part.variance(t)[:, None, None]))
            velocity.append(part(x, t, condition))
        return (torch.stack(share).softmax(dim=0) * torch.stack(velocity)).sum(dim=0)


@pytest.mark.parametrize('n', range(1, 13))
def test_euler_of_a_gaussian_is_that_of_the_closed_form(n):
    """x₁ = mean + gain·x₀, both from the recursion by hand; one step gives the mean of the data, whatever the noise."""
    mu, s, noise = 0.7, 0.2, torch.randn(4, 8, 3)
    mean, gain = 0.0, 1.0
    for t in np.arange(n) / n:
        slope = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)
        mean += (mu + slope * (mean - t * mu)) / n
        gain += slope * gain / n
    flow = make_flow(euler_steps=n)
    flow.net = GaussianVelocity(mu, s)
    chunk = flow.predict({'state': torch.zeros(4, 2, 2)}, noise=noise)
    torch.testing.assert_close(chunk, mean + gain * noise, rtol=0, atol=1e-5)
    if n == 1:
        torch.testing.assert_close(chunk, torch.full_like(chunk, mu))


def test_exact_velocity_gives_the_distribution():
    """Two modes, 30 % and 70 %, with 20 steps: weights, means and widths; with one step their mean, as regression gives it."""
    torch.manual_seed(0)
    flow = make_flow(euler_steps=20)
    flow.net = MixtureVelocity([-0.6, 0.5], [0.3, 0.7], 0.1)
    x = flow.predict({'state': torch.zeros(1000, 2, 2)}, noise=torch.randn(1000, 8, 3)).flatten()
    low, high = x[x < -0.05], x[x > -0.05]
    assert abs(len(low) / len(x) - 0.3) < 4 * math.sqrt(0.21 / len(x)) + 0.005
    for mode, mu in ((low, -0.6), (high, 0.5)):
        assert abs(mode.mean() - mu) < 0.02 and abs(mode.std() - 0.1) < 0.025
    flow.config = dataclasses.replace(flow.config, euler_steps=1)
    x = flow.predict({'state': torch.zeros(10, 2, 2)}, noise=torch.randn(10, 8, 3))
    torch.testing.assert_close(x, torch.full_like(x, 0.3 * -0.6 + 0.7 * 0.5))


@pytest.mark.parametrize('tau', [0.0, 0.5])
def test_sampler_follows_the_exact_flow_of_a_gaussian(tau):
    """Euler converges to the analytic solution, with an error that halves when the steps double."""
    noise = torch.randn(64, 8, 3, generator=torch.Generator().manual_seed(0))
    chunk = torch.rand(64, 8, 3, generator=torch.Generator().manual_seed(1))
    observation = {'state': torch.zeros(64, 2, 2)}
    velocity = GaussianVelocity(0.7, 0.2)
    x_tau = (1 - tau) * noise + tau * chunk
    exact = 0.7 + 0.2 * (x_tau - tau * 0.7) / velocity.variance(tau) ** 0.5
    errors = []
    for steps in (50, 100, 200):
        flow = make_flow(euler_steps=steps)
        flow.net = velocity
        sample = flow.predict(observation, noise=noise, warm=(chunk, tau) if tau else None)
        errors.append((sample - exact).abs().mean().item())
    assert errors[-1] < 5e-3
    assert 1.7 < errors[0] / errors[1] < 2.4 and 1.7 < errors[1] / errors[2] < 2.4


@pytest.mark.parametrize('tau', [0.0, 0.1, 0.5, 0.9])
def test_guided_velocity_is_that_of_the_paper(tau):
    """v + min(β, …)·eᵀ∂x̂₁/∂x, printed as in the design, with the Jacobian by central differences; a shut graph would show."""
    flow = make_flow().double()
    condition = torch.zeros(1, 4, dtype=torch.float64)
    x, target = torch.randn(2, 1, 8, 3, dtype=torch.float64)
    weights = rtc_weights(8, 2, 3)

    def clean(x):
        return x + (1 - tau) * flow.net(x, torch.full((1,), tau), condition)

    with torch.no_grad():
        jacobian = torch.stack([((clean(x + h) - clean(x - h)) / 2e-5).flatten()
                                for h in 1e-5 * torch.eye(24, dtype=torch.float64).view(24, 1, 8, 3)], dim=1)
        error = (target - clean(x)) * weights[:, None].double()
        net, = flow.at(torch.full((1, 1), tau), condition)
        free = flow.velocity(x, tau, net)
        for beta in (5.0, 1e9):
            weight = beta if tau == 0 else min(beta, (1 - tau) / tau * (tau**2 + (1 - tau) ** 2) / (1 - tau) ** 2)
            if weight > 1e6:
                continue
            guided = flow.velocity(x, tau, net, Guidance(target, weights, beta=beta))
            torch.testing.assert_close(guided, free + weight * (error.flatten() @ jacobian).view(1, 8, 3), rtol=1e-6, atol=1e-7)
            simple = flow.velocity(x, tau, net, Guidance(target, weights, 'identity', beta))
            torch.testing.assert_close(simple, free + weight * error)
            if tau < 0.9:
                assert (guided - simple).abs().max() > 1e-2


@pytest.mark.parametrize('mode', ['vjp', 'identity'])
def test_guidance_continues_the_chunk(mode):
    """Where it has weight it chooses the mode; the steps without weight are as they would be."""
    flow = make_flow()
    flow.net = MixtureVelocity([-0.6, 0.6], [0.5, 0.5], 0.1)
    state, noise = {'state': torch.zeros(50, 2, 2)}, torch.randn(50, 8, 3)
    target, weights = torch.full((50, 8, 3), 0.6), rtc_weights(8, 3, 3)
    guided, free = flow.predict(state, noise, guidance=Guidance(target, weights, mode)), flow.predict(state, noise)
    assert (guided[:, :3] > 0).float().mean() > 0.8 > 0.6 > (free[:, :3] > 0).float().mean()
    torch.testing.assert_close(guided[:, 5:], free[:, 5:])
    per_sample = torch.cat([weights.expand(25, 8), torch.zeros(25, 8)])
    half = flow.predict(state, noise, guidance=Guidance(target, per_sample, mode))
    torch.testing.assert_close(half, torch.cat([guided[:25], free[25:]]))


def committing_flow(**config) -> Flow:
    """A transformer of random weights, past its initialisation at which its output is zero."""
    flow = make_flow(backbone='transformer', transformer=TransformerConfig(32, 2, 2, time_size=16), **config)
    for p in flow.net.parameters():
        nn.init.normal_(p, std=0.2)
    return flow


def test_committed_steps_are_clean_and_no_targets():
    """In training: at time 1 the chunk itself, at one time t < 1 all that follows; every delay, and only valid steps learnt."""
    flow = committing_flow(rtc_max_delay=3)
    seen = []
    flow.net.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)) or output.retain_grad())
    valid = torch.arange(8)[None] < torch.tensor([8, 1, 3, 2])[torch.arange(400) % 4, None]
    action = torch.randn(400, 8, 3)
    flow.loss({'observation': {'state': torch.randn(400, 2, 2)}, 'action': action, 'valid': valid})['loss'].backward()
    x, t, _, output = seen[0]
    committed = t == 1
    delay = committed.sum(dim=1)
    assert (committed == (torch.arange(8) < delay[:, None])).all()
    assert set(delay.tolist()) == {0, 1, 2, 3} and set(delay[1::4].tolist()) == {0} and set(delay[3::4].tolist()) == {0, 1}
    torch.testing.assert_close(x[committed], action[committed])
    assert all(len(set(row[d:].tolist())) == 1 for row, d in zip(t, delay.tolist()))
    assert ((output.grad.abs().sum(dim=-1) > 0) == (valid & ~committed)).all()


@pytest.mark.parametrize('decay', [0.0, 0.25, 1.0])
def test_delays_trained_on_have_the_stated_distribution(decay):
    torch.manual_seed(0)
    drawn = committing_flow(rtc_max_delay=3, rtc_delay_decay=decay).sample_delay(40000)
    weights = [math.exp(-decay * d) for d in range(4)]
    shares = [(drawn == d).float().mean().item() for d in range(4)]
    assert shares == pytest.approx([w / sum(weights) for w in weights], abs=0.01)  # 4 standard deviations


def test_from_an_offset_of_the_committed_steps_the_rest_comes_back():
    """Shifted as a whole, half of it gone after two steps, all after four; what continues nothing is the demonstration."""
    torch.manual_seed(0)
    flow = Flow(make_spec(horizon=12), FlowConfig(backbone='transformer', transformer=TransformerConfig(32, 1, 2, time_size=16),
                                                  rtc_max_delay=3, rtc_prefix_noise=0.2), unit_normalizer(make_spec()))
    asked = []
    flow.net.register_forward_hook(lambda module, inputs, output: asked.append(inputs))
    flow.sample_time = lambda n: torch.full((n,), 1.0 - 1e-6)  # all steps as good as clean
    action = torch.randn(3000, 12, 3)
    flow.loss({'observation': {'state': torch.zeros(3000, 2, 2)}, 'action': action, 'valid': torch.ones(3000, 12, dtype=bool)})
    x, t, _ = asked[0]
    shift, delay = x - action, (t == 1).sum(dim=1)
    assert shift[delay == 0].abs().max() < 1e-4
    for d in (1, 2, 3):
        offset = shift[delay == d][:, :1]
        assert offset.std().item() == pytest.approx(0.2, rel=0.1) and abs(offset.mean().item()) < 0.03
        left = (shift[delay == d] / offset).nanmedian(dim=0).values.mean(dim=1)
        assert left[:d].tolist() == pytest.approx([1.0] * d, abs=1e-3)
        assert left[d + 1].item() == pytest.approx(0.5, abs=1e-3) and left[d + 3:].abs().max() < 1e-3
        assert (left[d - 1:d + 4].diff() < 0).all()


def test_prefix_stays_and_the_rest_is_integrated_after_it():
    """Step by step by hand, warm start included; without a delay it is plain sampling."""
    flow = committing_flow(rtc_max_delay=3, euler_steps=4)
    state, noise = {'state': torch.randn(2, 2, 2)}, torch.randn(2, 8, 3)
    target, chunk = torch.rand(2, 8, 3), torch.rand(2, 8, 3)
    with torch.no_grad():
        condition, x = flow.condition(state), 0.5 * noise + 0.5 * chunk
        for tau in (0.5, 0.75):
            x = torch.cat([target[:, :2], x[:, 2:]], dim=1)
            x = x + 0.25 * flow.net(x, torch.tensor([1.0] * 2 + [tau] * 6).expand(2, 8), condition)
        expected = torch.cat([target[:, :2], x[:, 2:]], dim=1)
    guidance = Guidance(target, torch.ones(8), 'prefix', delay=2)
    torch.testing.assert_close(flow.predict(state, noise, (chunk, 0.5), guidance), expected)
    none = dataclasses.replace(guidance, delay=0)
    torch.testing.assert_close(flow.predict(state, noise, guidance=none), flow.predict(state, noise))


def test_a_network_is_asked_for_times_of_one_shape():
    """With guidance of any mode and without: an exported graph has fixed shapes."""
    for flow, shape in ((committing_flow(rtc_max_delay=3), (1, 8)), (make_flow(), (1,))):
        asked = []
        flow.net.register_forward_hook(lambda module, inputs, output, asked=asked: asked.append(tuple(inputs[1].shape)))
        for mode in (None, *flow.GUIDANCE):
            guidance = mode and Guidance(torch.zeros(1, 8, 3), torch.ones(8), mode, delay=2)
            flow.predict({'state': torch.zeros(1, 2, 2)}, guidance=guidance)
        assert len(asked) >= 30 and set(asked) == {shape}


def test_flow_times_have_the_stated_distribution():
    torch.manual_seed(0)
    for sampling, distribution in (('uniform', lambda t: t), ('beta', lambda t: 1 - (1 - t) ** 1.5)):
        t = np.sort(make_flow(time_sampling=sampling).sample_time(20000).numpy())
        assert np.abs(distribution(t) - np.arange(1, 20001) / 20000).max() < 0.015


def test_noise_decides_the_chunk():
    flow = make_flow()
    observation = {'state': torch.randn(4, 2, 2)}
    noise = torch.randn(4, 8, 3)
    chunk = flow.predict(observation, noise=noise)
    torch.testing.assert_close(chunk, flow.predict(observation, noise=noise))
    alone = flow.predict({'state': observation['state'][2:3]}, noise=noise[2:3])
    torch.testing.assert_close(chunk[2:3], alone, rtol=1e-4, atol=1e-5)
    assert (chunk - flow.predict(observation)).abs().max() > 1e-2


def test_raw_units_in_and_out():
    """Shifting and scaling all data shifts and scales the chunk."""
    spec = make_spec()
    torch.manual_seed(0)
    scaled = Flow(spec, FlowConfig(SMALL), Normalizer({'state': {'min': [8.0, 8.0], 'max': [12.0, 12.0]},
                                                       'action': {'min': [90.0] * 3, 'max': [110.0] * 3}})).eval()
    flow = make_flow()
    state, noise = torch.rand(3, 2, 2), torch.randn(3, 8, 3)
    torch.testing.assert_close(scaled.predict({'state': 10 + 2 * state}, noise=noise),
                               100 + 10 * flow.predict({'state': state}, noise=noise), rtol=1e-4, atol=1e-3)


def test_padded_steps_are_no_targets():
    """The gradient at the network's output is zero beyond the end of the episode, and not before."""
    flow = make_flow()
    outputs = []
    flow.net.register_forward_hook(lambda module, inputs, output: outputs.append(output) or output.retain_grad())
    valid = torch.arange(8)[None] < torch.tensor([8, 1, 3, 5, 8, 2])[:, None]
    batch = {'observation': {'state': torch.randn(6, 2, 2)}, 'action': torch.randn(6, 8, 3), 'valid': valid}
    flow.loss(batch)['loss'].backward()
    assert ((outputs[0].grad.abs().sum(dim=-1) > 0) == valid).all()


def test_what_it_cannot_take_is_named():
    with pytest.raises(PolicyError, match='horizon is 9.*multiple of 2'):
        make_flow(spec=make_spec(horizon=9))
    flow = make_flow()
    state = {'state': torch.zeros(1, 2, 2)}
    with pytest.raises(PolicyError, match="'state' is missing; received: \\['pose'\\]"):
        flow.predict({'pose': torch.zeros(1, 2, 2)})
    with pytest.raises(PolicyError, match=r"'state' has shape \(1, 3, 2\), must be \(B, 2, 2\)"):
        flow.predict({'state': torch.zeros(1, 3, 2)})
    with pytest.raises(PolicyError, match='noise has shape'):
        flow.predict(state, noise=torch.zeros(1, 4, 3))
    with pytest.raises(PolicyError, match='warm start'):
        flow.predict(state, warm=(torch.zeros(1, 8, 3), 1.0))
    with pytest.raises(ValueError, match="rtc_max_delay is 2 and backbone 'unet'; a time for each step needs backbone"):
        FlowConfig(rtc_max_delay=2)
    with pytest.raises(ValueError, match='rtc_delay_decay is -1.0, must be at least 0'):
        FlowConfig(rtc_delay_decay=-1.0)
    with pytest.raises(ValueError, match='rtc_prefix_noise is -0.1, must be at least 0'):
        FlowConfig(rtc_prefix_noise=-0.1)
    with pytest.raises(PolicyError, match='rtc_max_delay is 8, must be less than the horizon, 8'):
        committing_flow(rtc_max_delay=8)
    prefix = Guidance(torch.zeros(1, 8, 3), torch.ones(8), 'prefix', delay=3)
    with pytest.raises(PolicyError, match="guidance mode is 'prefix'; valid: vjp, identity$"):
        flow.predict(state, guidance=prefix)
    with pytest.raises(PolicyError, match='delay is 3 steps; it was trained with rtc_max_delay 2'):
        committing_flow(rtc_max_delay=2).predict(state, guidance=prefix)
    with pytest.raises(PolicyError, match=r'guidance target has shape \(1, 4, 3\), must be \(1, 8, 3\)'):
        flow.predict(state, guidance=Guidance(torch.zeros(1, 4, 3), torch.ones(4)))


def test_two_modes_are_kept_where_regression_averages_them():
    """Demonstrations go to +1 or to -1 from the same observation: Flow samples both, BC gives their mean."""
    spec = make_spec(features={'state': (1,)}, action_names=('a',), horizon=4, history=1)
    rng = torch.Generator().manual_seed(0)
    policies = []
    for kind, config in ((Flow, FlowConfig), (BC, BCConfig)):
        torch.manual_seed(0)
        policy = kind(spec, config(UNetConfig((16,), time_size=32)), unit_normalizer(spec))
        optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
        for _ in range(200):
            side = torch.randint(0, 2, (64, 1, 1), generator=rng) * 2.0 - 1.0
            batch = {'observation': {'state': torch.zeros(64, 1, 1)}, 'action': side.expand(64, 4, 1),
                     'valid': torch.ones(64, 4, dtype=torch.bool)}
            optimizer.zero_grad()
            policy.loss(batch)['loss'].backward()
            optimizer.step()
        policies.append(policy.eval())
    flow, bc = policies
    noise = torch.randn(200, 4, 1, generator=rng)
    samples = flow.predict({'state': torch.zeros(200, 1, 1)}, noise=noise).mean(dim=(1, 2))
    assert 60 <= (samples > 0).sum() <= 140
    assert ((samples.abs() - 1).abs() < 0.3).float().mean() > 0.85
    assert bc.predict({'state': torch.zeros(1, 1, 1)}).abs().max() < 0.35


def test_trained_prefix_decides_the_mode():
    """Two modes from the same observation, and a network trained on committed steps: what follows is of their mode."""
    spec = make_spec(features={'state': (1,)}, action_names=('a',), horizon=4, history=1)
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    flow = Flow(spec, FlowConfig(backbone='transformer', transformer=TransformerConfig(32, 2, 2, time_size=32), rtc_max_delay=2),
                unit_normalizer(spec))
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(200):
        side = torch.randint(0, 2, (64, 1, 1), generator=rng) * 2.0 - 1.0
        optimizer.zero_grad()
        flow.loss({'observation': {'state': torch.zeros(64, 1, 1)}, 'action': side.expand(64, 4, 1),
                   'valid': torch.ones(64, 4, dtype=torch.bool)})['loss'].backward()
        optimizer.step()
    flow.eval()
    state, noise = {'state': torch.zeros(200, 1, 1)}, torch.randn(200, 4, 1, generator=rng)
    target = (torch.arange(200) % 2 * 2.0 - 1.0).view(200, 1, 1).expand(200, 4, 1)
    for delay in (1, 2):
        chunk = flow.predict(state, noise, guidance=Guidance(target, torch.ones(4), 'prefix', delay=delay))
        assert (chunk * target > 0.5).float().mean() > 0.97
    free = flow.predict(state, noise)
    assert 60 <= (free.mean(dim=(1, 2)) > 0).sum() <= 140 and ((free.abs() - 1).abs() < 0.3).float().mean() > 0.85
