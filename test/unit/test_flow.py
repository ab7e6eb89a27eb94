from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from il_policies.policies import PolicyError, PolicySpec
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
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
