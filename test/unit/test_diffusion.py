from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from il_policies.policies import PolicyError
from il_policies.policies.diffusion import Diffusion, DiffusionConfig
from il_policies.policies.guidance import Guidance, rtc_weights
from il_policies.policies.normalize import Normalizer
from il_policies.policies.transformer import TransformerConfig
from il_policies.policies.unet import UNetConfig
from test_flow import SMALL, GaussianVelocity, make_flow, make_spec, unit_normalizer

SCHEDULE = {'num_train_timesteps': 100, 'beta_schedule': 'squaredcos_cap_v2', 'clip_sample': True}
STATE = {'state': torch.zeros(1, 2, 2)}


def make_diffusion(seed: int = 0, **config) -> Diffusion:
    torch.manual_seed(seed)
    return Diffusion(make_spec(), DiffusionConfig(SMALL, **config), unit_normalizer(make_spec())).eval()


class MixtureNoise(nn.Module):
    """The exact ε when each entry is drawn from the sum of w_i·N(mu_i, s²): -√(1 - ā) times the score of x_k."""

    def __init__(self, policy: Diffusion, mu: list[float], w: list[float], s: float):
        super().__init__()
        self.alpha_bar = torch.tensor(policy.alpha_bar, dtype=torch.float64)
        self.mu, self.log_w, self.s = torch.tensor(mu, dtype=torch.float64), torch.tensor(w, dtype=torch.float64).log(), s
        self.calls: list[int] = []

    def forward(self, x, t, condition):
        k = (1000 * t).round().long()
        self.calls.append(k[0].item())
        a = self.alpha_bar[k].view(-1, 1, 1, 1)
        off = x.double()[..., None] - a.sqrt() * self.mu
        variance = a * self.s**2 + 1 - a
        share = (self.log_w - off**2 / (2 * variance)).softmax(dim=-1)
        return ((1 - a).sqrt() * share * off / variance).sum(dim=-1).to(x)


def test_every_ddpm_step_is_that_of_diffusers():
    policy = make_diffusion(sampler='ddpm')
    theirs = DDPMScheduler(**SCHEDULE, variance_type='fixed_small')
    torch.testing.assert_close(torch.tensor(policy.alpha_bar), theirs.alphas_cumprod, rtol=2e-6, atol=1e-9)
    for subset in (list(range(99, -1, -1)), list(range(90, -1, -10)), [97, 60, 59, 13, 0]):
        theirs.set_timesteps(timesteps=subset)
        for k, to in zip(subset, [*subset[1:], None]):
            x, epsilon = torch.randn(2, 4, 8, 3)
            torch.manual_seed(k)
            mine = policy.ddpm(x, epsilon, k, to)
            expected = theirs.step(epsilon, k, x, generator=torch.Generator().manual_seed(k)).prev_sample
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('n', [5, 10, 20, 100])
def test_every_ddim_step_is_that_of_diffusers(n):
    policy = make_diffusion(inference_steps=n)
    theirs = DDIMScheduler(**SCHEDULE)
    theirs.set_timesteps(n)
    assert policy.steps == theirs.timesteps.tolist()
    for k, to in zip(policy.steps, [*policy.steps[1:], None]):
        x, epsilon = torch.randn(2, 4, 8, 3)
        torch.testing.assert_close(policy.ddim(x, epsilon, k, to), theirs.step(epsilon, k, x).prev_sample, rtol=0, atol=1e-5)


def test_whole_sampling_is_that_of_diffusers():
    """With the same network and noise, which also tells that the network is asked about the right step."""
    policy, noise = make_diffusion(), torch.randn(1, 8, 3)
    theirs, x = DDIMScheduler(**SCHEDULE), noise
    theirs.set_timesteps(10)
    with torch.no_grad():
        for k in theirs.timesteps:
            x = theirs.step(policy.net(x, k[None] / 1000, policy.condition(STATE)), k, x).prev_sample
    torch.testing.assert_close(policy.predict(STATE, noise=noise), x, rtol=0, atol=1e-5)


def test_noising_example():
    policy = make_diffusion()
    policy.alpha_bar = [0.36]
    x = policy.add_noise(torch.tensor([[[1.5, -0.3]]]), torch.tensor([[[0.8, -1.2]]]), torch.tensor([0]))
    torch.testing.assert_close(x, torch.tensor([[[1.54, -1.14]]]))


def test_steps_cover_the_range_where_they_do_not_divide_it():
    assert make_diffusion(inference_steps=16).steps == [93, 87, 81, 75, 68, 62, 56, 50, 43, 37, 31, 25, 18, 12, 6, 0]
    assert make_diffusion(inference_steps=60).steps[:3] == [98, 96, 95]


def test_ddim_follows_the_exact_flow_of_a_gaussian():
    """The probability flow carries x_k to mu + s·(x_k - √ā·mu)/√(ā·s² + 1 - ā); the error halves with the step length."""
    mu, s = 0.3, 0.2
    noise = torch.randn(64, 8, 3, generator=torch.Generator().manual_seed(0))
    errors = []
    for T in (100, 200, 400):
        policy = make_diffusion(inference_steps=T, train_steps=T, clip_sample=5.0)
        policy.net = MixtureNoise(policy, [mu], [1.0], s)
        a = policy.alpha_bar[-1]
        exact = mu + s * (noise - a**0.5 * mu) / (a * s**2 + 1 - a) ** 0.5
        errors.append((policy.predict({'state': torch.zeros(64, 2, 2)}, noise=noise) - exact).abs().mean().item())
    assert errors[-1] < 2e-3
    assert 1.7 < errors[0] / errors[1] < 2.4 and 1.7 < errors[1] / errors[2] < 2.4


@pytest.mark.parametrize('sampler', ['ddim', 'ddpm'])
def test_exact_score_gives_the_distribution(sampler):
    """Two modes, 30 % and 70 %: weights, means and widths within four standard errors, and 2 % of steps of finite length."""
    torch.manual_seed(0)
    policy = make_diffusion(sampler=sampler, inference_steps=500, train_steps=500, clip_sample=5.0)
    policy.net = MixtureNoise(policy, [-0.6, 0.5], [0.3, 0.7], 0.1)
    x = policy.predict({'state': torch.zeros(500, 2, 2)}, noise=torch.randn(500, 8, 3)).flatten()
    n = len(x)
    low, high = x[x < 0], x[x > 0]
    assert abs(len(low) / n - 0.3) < 4 * math.sqrt(0.21 / n)
    for mode, mu in ((low, -0.6), (high, 0.5)):
        assert abs(mode.mean() - mu) < 4 * 0.1 / math.sqrt(len(mode)) + 0.002
        assert abs(mode.std() - 0.1) < 4 * 0.1 / math.sqrt(2 * len(mode)) + 0.002


@pytest.mark.parametrize('tau', [0.1, 0.5, 0.9])
def test_warm_start_enters_where_signal_and_noise_are_as_tau_says(tau):
    """… and goes on as the exact flow of a Gaussian does from there."""
    mu, s = 0.3, 0.2
    policy = make_diffusion(inference_steps=1000, train_steps=1000, clip_sample=5.0)
    policy.net = net = MixtureNoise(policy, [mu], [1.0], s)
    chunk, noise = torch.rand(2, 8, 3), torch.randn(2, 8, 3)
    sample = policy.predict({'state': torch.zeros(2, 2, 2)}, noise=noise, warm=(chunk, tau))
    k = net.calls[0]
    assert policy.alpha_bar[k] / (1 - policy.alpha_bar[k]) == pytest.approx((tau / (1 - tau)) ** 2, rel=0.02)
    assert net.calls == list(range(k, -1, -1))
    a = policy.alpha_bar[k]
    x = a**0.5 * chunk + (1 - a) ** 0.5 * noise
    torch.testing.assert_close(sample, mu + s * (x - a**0.5 * mu) / (a * s**2 + 1 - a) ** 0.5, rtol=0, atol=5e-3)


def test_warm_start_takes_fewer_steps_and_keeps_the_mode():
    """Between two like modes the sign of x_k, re-noised, is the sign of the chunk."""
    policy = make_diffusion()
    policy.net = net = MixtureNoise(policy, [-0.6, 0.6], [0.5, 0.5], 0.1)
    state, noise = {'state': torch.zeros(50, 2, 2)}, torch.randn(50, 8, 3)
    assert 0.4 < (policy.predict(state, noise=noise) > 0).float().mean() < 0.6
    assert net.calls == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    net.calls.clear()
    chunk = torch.full((50, 8, 3), 0.6)
    warm = policy.predict(state, noise=noise, warm=(chunk, 0.8))
    x = policy.add_noise(chunk, noise, torch.full((50,), net.calls[0]))
    clear = x.abs() > 0.05
    assert ((warm > 0) == (x > 0))[clear].all() and (warm > 0).float().mean() > 0.97
    assert net.calls == [14, 10, 0]
    net.calls.clear()
    policy.predict(state, noise=noise, warm=(chunk, 0.0))
    assert net.calls == policy.steps, 'not from step 99, where errors decide'


def test_guided_noise_is_the_score_corrected():
    """Against ΠGDM's Δε = -√(1 - ā)·Δscore, Δscore = 1/(1 - ā)·eᵀ∂x̂₀/∂x, capped as RTC caps it; Jacobian by differences."""
    policy = make_diffusion().double()
    condition = torch.zeros(1, 4, dtype=torch.float64)
    target = torch.rand(1, 8, 3, dtype=torch.float64) * 2 - 1
    weights = rtc_weights(8, 2, 3)
    with torch.no_grad():
        for k in (20, 50, 80):
            a, x = policy.alpha_bar[k], torch.randn(1, 8, 3, dtype=torch.float64)
            net, = policy.at_steps([k], condition)

            def clean(x, k=k, a=a, net=net):
                return (x - (1 - a) ** 0.5 * policy.epsilon(x, k, net)) / a**0.5

            jacobian = torch.stack([((clean(x + h) - clean(x - h)) / 2e-5).flatten()
                                    for h in 1e-5 * torch.eye(24, dtype=torch.float64).view(24, 1, 8, 3)], dim=1)
            error = (target - clean(x).clamp(-1, 1)) * weights[:, None].double()
            score = (error.flatten() @ jacobian).view(1, 8, 3) / (1 - a)
            tau = a**0.5 / (a**0.5 + (1 - a) ** 0.5)
            uncapped = (tau**2 + (1 - tau) ** 2) / (tau * (1 - tau))
            for beta in (1.5, 1e9):
                for mode, change in (('vjp', -(1 - a) ** 0.5 * score * min(1.0, beta / uncapped)),
                                     ('identity', -tau * min(beta, uncapped) * error)):
                    expected = policy.epsilon(x, k, net) + change
                    expected = (x - a**0.5 * ((x - (1 - a) ** 0.5 * expected) / a**0.5).clamp(-1, 1)) / (1 - a) ** 0.5
                    guided = policy.epsilon(x, k, net, Guidance(target, weights, mode, beta))
                    torch.testing.assert_close(guided, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('mode', ['vjp', 'identity'])
def test_guidance_does_to_diffusion_what_it_does_to_flow(mode):
    """Of the same Gaussian, from the same noise and with many steps: two samplers, two parametrisations, one chunk."""
    mu, s, noise = 0.3, 0.2, torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(torch.full((4, 8, 3), 0.7), rtc_weights(8, 2, 3), mode)
    flow, state = make_flow(euler_steps=1000), {'state': torch.zeros(4, 2, 2)}
    flow.net = GaussianVelocity(mu, s)
    policy = make_diffusion(inference_steps=1000, train_steps=1000, clip_sample=50.0)
    policy.net = MixtureNoise(policy, [mu], [1.0], s)
    expected, guided = flow.predict(state, noise=noise, guidance=guidance), policy.predict(state, noise=noise, guidance=guidance)
    free = policy.predict(state, noise=noise)
    torch.testing.assert_close(guided, expected, rtol=0, atol=0.01)
    assert (guided - 0.7)[:, :2].abs().mean() < 0.5 * (free - 0.7)[:, :2].abs().mean()
    torch.testing.assert_close(guided[:, 5:], free[:, 5:])


@pytest.mark.parametrize('n', [10, 100])
def test_guidance_continues_the_chunk(n):
    """At either number of steps: at the last step trained on, the guided clean chunk is far beyond the clip."""
    policy = make_diffusion(inference_steps=n)
    policy.net = MixtureNoise(policy, [-0.6, 0.6], [0.5, 0.5], 0.1)
    target, state = torch.full((50, 8, 3), 0.6), {'state': torch.zeros(50, 2, 2)}
    for sampler in ('ddim', 'ddpm'):
        policy.config = dataclasses.replace(policy.config, sampler=sampler)
        for mode in ('vjp', 'identity'):
            x = policy.predict(state, noise=torch.randn(50, 8, 3), guidance=Guidance(target, rtc_weights(8, 3, 3), mode))
            assert (x[:, :3] > 0).float().mean() > 0.8 and x.isfinite().all()
            assert 0.35 < (x[:, 5:] > 0).float().mean() < 0.65


def test_padded_steps_are_no_targets():
    policy = make_diffusion()
    outputs = []
    policy.net.register_forward_hook(lambda module, inputs, output: outputs.append(output) or output.retain_grad())
    valid = torch.arange(8)[None] < torch.tensor([8, 1, 3, 5, 8, 2])[:, None]
    policy.loss({'observation': {'state': torch.randn(6, 2, 2)}, 'action': torch.randn(6, 8, 3),
                 'valid': valid})['loss'].backward()
    assert ((outputs[0].grad.abs().sum(dim=-1) > 0) == valid).all()


def test_loss_of_the_exact_noise_is_zero_for_one_chunk():
    """Data of one chunk: the exact network knows the noise, so the loss is 0, at every step that training draws."""
    policy = make_diffusion()
    policy.net = net = MixtureNoise(policy, [0.4], [1.0], 0.0)
    batch = {'observation': {'state': torch.zeros(400, 2, 2)}, 'action': torch.full((400, 8, 3), 0.4),
             'valid': torch.ones(400, 8, dtype=torch.bool)}
    asked = []
    net.register_forward_hook(lambda module, inputs, output: asked.append((1000 * inputs[1]).round()))
    assert policy.loss(batch)['loss'] < 1e-10
    assert asked[0].min() <= 3 and asked[0].max() >= 96 and asked[0].max() <= 99


def test_noise_decides_the_chunk_and_raw_units_go_in_and_out():
    policy, state, noise = make_diffusion(), torch.rand(3, 2, 2), torch.randn(3, 8, 3)
    chunk = policy.predict({'state': state}, noise=noise)
    torch.testing.assert_close(chunk[1:2], policy.predict({'state': state[1:2]}, noise=noise[1:2]), rtol=1e-4, atol=1e-5)
    assert (chunk - policy.predict({'state': state})).abs().max() > 1e-2
    torch.manual_seed(0)
    scaled = Diffusion(make_spec(), DiffusionConfig(SMALL), Normalizer(
        {'state': {'min': [8.0, 8.0], 'max': [12.0, 12.0]}, 'action': {'min': [90.0] * 3, 'max': [110.0] * 3}})).eval()
    guidance = Guidance(torch.rand(3, 8, 3), rtc_weights(8, 1, 2))
    torch.testing.assert_close(
        scaled.predict({'state': 10 + 2 * state}, noise, (100 + 10 * chunk, 0.3),
                       dataclasses.replace(guidance, target=100 + 10 * guidance.target)),
        100 + 10 * policy.predict({'state': state}, noise, (chunk, 0.3), guidance), rtol=1e-4, atol=1e-3)


def test_what_it_cannot_take_is_named():
    for wrong, message in (({'inference_steps': 1}, 'inference_steps is 1, must be from 2 to train_steps, 100'),
                           ({'inference_steps': 101}, 'inference_steps is 101'), ({'clip_sample': 0.0}, 'clip_sample is 0.0')):
        with pytest.raises(ValueError, match=message):
            DiffusionConfig(**wrong)
    ones = {key: [1.0] * 3 for key in ('min', 'max', 'mean', 'std')}
    with pytest.raises(PolicyError, match='diffusion: normalisation is mean_std; clip_sample needs min_max'):
        Diffusion(make_spec(), DiffusionConfig(SMALL), Normalizer({'state': ones, 'action': ones}, 'mean_std'))
    policy = make_diffusion()
    with pytest.raises(PolicyError, match='diffusion: noise has shape'):
        policy.predict(STATE, noise=torch.zeros(1, 4, 3))
    with pytest.raises(PolicyError, match='diffusion: warm start from a chunk'):
        policy.predict(STATE, warm=(torch.zeros(1, 8, 3), 1.0))
    with pytest.raises(PolicyError, match="diffusion: guidance mode is 'prefix'; valid: vjp, identity"):
        policy.predict(STATE, guidance=Guidance(torch.zeros(1, 8, 3), torch.ones(8), 'prefix'))
    with pytest.raises(PolicyError, match=r'diffusion: guidance target has shape \(2, 8, 3\), must be \(1, 8, 3\)'):
        policy.predict(STATE, guidance=Guidance(torch.zeros(2, 8, 3), torch.ones(8)))


@pytest.mark.parametrize('backbone', ['unet', 'transformer'])
def test_two_modes_are_kept(backbone):
    """Demonstrations go to +0.8 or to -0.8 from the same observation: both are sampled, and nothing between."""
    spec = make_spec(features={'state': (1,)}, action_names=('a',), horizon=4, history=1)
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    policy = Diffusion(spec, DiffusionConfig(UNetConfig((16,), time_size=32), backbone=backbone,
                                             transformer=TransformerConfig(32, 2, 2, time_size=32)), unit_normalizer(spec))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(200):
        side = torch.randint(0, 2, (64, 1, 1), generator=rng) * 1.6 - 0.8
        optimizer.zero_grad()
        policy.loss({'observation': {'state': torch.zeros(64, 1, 1)}, 'action': side.expand(64, 4, 1),
                     'valid': torch.ones(64, 4, dtype=torch.bool)})['loss'].backward()
        optimizer.step()
    samples = policy.eval().predict({'state': torch.zeros(200, 1, 1)}, noise=torch.randn(200, 4, 1, generator=rng))
    assert 60 <= (samples.mean(dim=(1, 2)) > 0).sum() <= 140
    assert ((samples.abs() - 0.8).abs() < 0.2).float().mean() > 0.9
    assert (samples > 0).float().mean(dim=(1, 2)).round(decimals=3).remainder(1).eq(0).float().mean() > 0.9
