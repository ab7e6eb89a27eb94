"""Diffusion Policy: chunks are denoised step by step.

Chi et al., 2023, https://arxiv.org/abs/2303.04137. With x_k = √ā_k·x₀ + √(1 - ā_k)·ε, x₀ a demonstrated chunk and ε normal
noise, the network learns ε. Samplers: DDPM (Ho et al., 2020, https://arxiv.org/abs/2006.11239) and DDIM (Song et al.,
2020, https://arxiv.org/abs/2010.02502), over any subset of the steps trained on.

Flow time. Divided by √ā + √(1 - ā), x_k lies on the straight path of flow.py at the time τ_k = √ā/(√ā + √(1 - ā)), the
same ratio of signal to noise. Warm starts and guidance use this, so that both policies are asked alike.

Guidance. On the straight path x = (1 - τ)·ε + τ·x₀ the velocity is v = x₀ - ε, so that at a given x a velocity changed by Δv
is an ε changed by -τ·Δv. RTC's Δv is weight(τ)·[(target - x̂₀) ⊙ W]ᵀ ∂x̂₀/∂x, and ∂x_k/∂x = √ā + √(1 - ā), hence

    Δε = -√ā · weight(τ_k) · [(target - x̂₀) ⊙ W]ᵀ ∂x̂₀/∂x_k .

Where the weight is not capped this is the score's correction of ΠGDM, Δε = -√(1 - ā)·Δscore, with r² = 1 - ā.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from il_policies.policies import PolicyError, PolicySpec, SamplingPolicy, masked_mse
from il_policies.policies.guidance import Guidance, correction, guidance_weight
from il_policies.policies.normalize import Normalizer
from il_policies.policies.transformer import TransformerConfig
from il_policies.policies.unet import TIME_SCALE, UNetConfig
from il_policies.policies.vision import VisionConfig


@dataclass(frozen=True)
class DiffusionConfig:
    """Diffusion Policy."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    """The network, if backbone is unet."""
    inference_steps: int = 10
    """Denoising steps, i·train_steps/inference_steps rounded down; warm starts take proportionally fewer."""
    sampler: Literal['ddim', 'ddpm'] = 'ddim'
    """ddim: the noise decides the chunk, few steps will do. ddpm: draws further noise at every step, from torch's global
    generator, and wants many."""
    train_steps: int = 100
    """Diffusion steps trained on."""
    clip_sample: float = 1.0
    """The clean chunk is clipped to ± this at every denoising step, normalised; the demonstrations are within ± 1."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The network that looks at each camera."""
    backbone: Literal['unet', 'transformer'] = 'unet'
    """Kind of network."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """The network, if backbone is transformer."""

    def __post_init__(self):
        # The only step of one would be 0, for which pure noise passes as an almost clean chunk.
        if not 2 <= self.inference_steps <= self.train_steps:
            raise ValueError(f'inference_steps is {self.inference_steps}, must be from 2 to train_steps, {self.train_steps}')
        if not self.clip_sample > 0:
            raise ValueError(f'clip_sample is {self.clip_sample}, must be > 0')


def squared_cosine(steps: int) -> list[float]:
    """ā_k of each diffusion step k, 'squaredcos_cap_v2' (Nichol and Dhariwal, 2021, https://arxiv.org/abs/2102.09672, eq. 17)."""
    def signal(part: float) -> float:
        return math.cos((part + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar, product = [], 1.0
    for k in range(steps):
        product *= 1.0 - min(1.0 - signal((k + 1) / steps) / signal(k / steps), 0.999)
        alpha_bar.append(product)
    return alpha_bar


class Diffusion(SamplingPolicy):
    """Samples chunks by denoising. Steps k run from train_steps - 1, almost pure noise, to 0, almost clean."""

    kind = 'diffusion'
    GUIDANCE = ('vjp', 'identity')

    def __init__(self, spec: PolicySpec, config: DiffusionConfig, normalizer: Normalizer):
        """Raises PolicyError for what cannot be built."""
        super().__init__(spec, config, normalizer)
        if normalizer.mode != 'min_max':
            raise PolicyError(f'diffusion: normalisation is {normalizer.mode}; clip_sample needs min_max, which bounds actions')
        self.net = self.backbone(time=True)
        self.alpha_bar = squared_cosine(config.train_steps)
        """ā_k of each step k, float64."""

    @property
    def steps(self) -> list[int]:
        """Diffusion steps of a chunk from pure noise, falling to 0, spaced as 'leading' of Diffusion Policy.

        They begin below the last step trained on: there ā is about 0, and any error of ε, divided by √ā, would choose the mode.
        """
        n, T = self.config.inference_steps, self.config.train_steps
        return [i * T // n for i in reversed(range(n))]

    def flow_time(self, k: int) -> float:
        """τ_k in (0, 1), the flow time with the signal-to-noise ratio of step k."""
        signal, noise = math.sqrt(self.alpha_bar[k]), math.sqrt(1.0 - self.alpha_bar[k])
        return signal / (signal + noise)

    def add_noise(self, x0: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """x_k = √ā_k·x₀ + √(1 - ā_k)·ε. x0, noise: (B, H, D), k: (B,) of integers."""
        alpha_bar = torch.tensor(self.alpha_bar, dtype=x0.dtype, device=x0.device)[k].view(-1, 1, 1)
        return alpha_bar.sqrt() * x0 + (1.0 - alpha_bar).sqrt() * noise

    def loss(self, batch: dict) -> dict[str, Tensor]:
        condition = self.condition(batch['observation'])
        x0 = self.normalizer.normalize('action', batch['action'])
        noise = torch.randn_like(x0)
        k = torch.randint(0, self.config.train_steps, (len(x0),), device=x0.device)
        return {'loss': masked_mse(self.net(self.add_noise(x0, noise, k), k / TIME_SCALE, condition), noise, batch['valid'])}

    def sample(self, noise: Tensor, condition: Tensor, warm: tuple[Tensor, float] | None = None,
               guidance: Guidance | None = None) -> Tensor:
        """A warm start re-noises the chunk to the step whose flow time is nearest to tau, and denoises from there.

        It enters no step above the first of `steps`, for the reason that these begin there.
        """
        if warm is None:
            return self.denoise(noise, self.steps, condition, guidance)
        chunk, tau = warm
        enter = min(range(self.steps[0] + 1), key=lambda k: abs(self.flow_time(k) - tau))
        x = self.add_noise(chunk, noise, torch.full((len(chunk),), enter, device=chunk.device))
        return self.denoise(x, [enter, *(k for k in self.steps if k < enter)], condition, guidance)

    def denoise(self, x: Tensor, steps: list[int], condition: Tensor, guidance: Guidance | None = None) -> Tensor:
        """From x at the first of the falling `steps`, over the others, to a clean chunk, all normalised. x: (B, H, D)."""
        step = self.ddim if self.config.sampler == 'ddim' else self.ddpm
        for k, to, net in zip(steps, [*steps[1:], None], self.at_steps(steps, condition)):
            x = step(x, self.epsilon(x, k, net, guidance), k, to)
        return x

    def at_steps(self, steps: list[int], condition: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """The network at each of these diffusion steps, as functions of x (B, H, D); condition: (B, K)."""
        times = torch.tensor(steps, dtype=torch.float64) / TIME_SCALE
        return self.at(times.float().to(condition.device)[:, None].expand(-1, len(condition)), condition)

    def epsilon(self, x: Tensor, k: int, net: Callable[[Tensor], Tensor], guidance: Guidance | None = None) -> Tensor:
        """The noise in x (B, H, D) at step k; without guidance as the network gives it, differentiable in x.

        net: the network at k, one of `at_steps`. With guidance it has the correction of RTC, and is the noise that goes with
        the clipped clean chunk.
        """
        if guidance is None:
            return net(x)

        def predict(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            epsilon = net(x)
            clean = self._clean(x, epsilon, k)
            # The pull is towards what the sampler goes on with; the Jacobian is that of the chunk before clipping, which a
            # clipped entry would have none of.
            return epsilon, clean, self._clip(clean)

        epsilon, g = correction(predict, x, guidance.target, guidance.weights, guidance.mode)
        # The identity stands for the Jacobian on the straight path, on which the guidance is defined.
        tau = self.flow_time(k)
        scale = tau if guidance.mode == 'identity' else math.sqrt(self.alpha_bar[k])
        epsilon = epsilon - scale * guidance_weight(tau, guidance.beta) * g
        # Of a clean chunk that is pushed beyond the clip only the change of ε would be left, which pushes it the other way.
        signal, noise = math.sqrt(self.alpha_bar[k]), math.sqrt(1.0 - self.alpha_bar[k])
        return (x - signal * self._clip(self._clean(x, epsilon, k))) / noise

    def _clean(self, x: Tensor, epsilon: Tensor, k: int) -> Tensor:
        return (x - math.sqrt(1.0 - self.alpha_bar[k]) * epsilon) / math.sqrt(self.alpha_bar[k])

    def _clip(self, clean: Tensor) -> Tensor:
        return clean.clamp(-self.config.clip_sample, self.config.clip_sample)

    def ddim(self, x: Tensor, epsilon: Tensor, k: int, to: int | None) -> Tensor:
        """DDIM's eq. 12 with η = 0, from step k to a lower one (None: to the clean chunk)."""
        clean = self._clip(self._clean(x, epsilon, k))
        if to is None:
            return clean
        return math.sqrt(self.alpha_bar[to]) * clean + math.sqrt(1.0 - self.alpha_bar[to]) * epsilon

    def ddpm(self, x: Tensor, epsilon: Tensor, k: int, to: int | None) -> Tensor:
        """DDPM's eq. 7 with the posterior's variance ('fixed_small'), from step k to a lower one (None: to the clean chunk)."""
        clean = self._clip(self._clean(x, epsilon, k))
        if to is None:
            return clean
        before, here = self.alpha_bar[to], self.alpha_bar[k]
        alpha = here / before
        mean = (math.sqrt(before) * (1.0 - alpha) * clean + math.sqrt(alpha) * (1.0 - before) * x) / (1.0 - here)
        return mean + math.sqrt((1.0 - before) / (1.0 - here) * (1.0 - alpha)) * torch.randn_like(x)
