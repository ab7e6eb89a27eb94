"""Flow matching: chunks are carried from noise to actions along straight lines.

Lipman et al., 2023, https://arxiv.org/abs/2210.02747, and as a policy π₀ (Black et al., 2024,
https://arxiv.org/abs/2410.24164). With x_t = (1 - t)·x₀ + t·x₁, x₀ normal noise and x₁ a demonstrated chunk, the
network learns the velocity x₁ - x₀; Euler steps from t = 0 to 1 give a sample.

With `rtc_max_delay` it also learns to continue committed steps (training-time RTC, https://arxiv.org/abs/2512.05964): the
first d steps of a training chunk are at time 1, which is clean, and are no targets.
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
from il_policies.policies.unet import UNetConfig
from il_policies.policies.vision import VisionConfig

COME_BACK = 4
"""Steps in which an offset of committed steps is given up in training: about those that are executed before the next chunk."""


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    """The network, if backbone is unet."""
    euler_steps: int = 10
    """Steps from noise to actions; warm starts take proportionally fewer."""
    time_sampling: Literal['uniform', 'beta'] = 'uniform'
    """Flow times trained on: uniform, or 1 - Beta(1.5, 1) with more weight near noise, as π₀."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The network that looks at each camera."""
    backbone: Literal['unet', 'transformer'] = 'unet'
    """Kind of network."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """The network, if backbone is transformer."""
    rtc_max_delay: int = 0
    """Training-time RTC: up to this many steps, drawn anew for each sample, are handed over as committed; needs the
    transformer. 0: off."""
    rtc_delay_decay: float = 0.25
    """Training-time RTC: d steps are handed over with a probability in proportion to exp(-rtc_delay_decay·d). The first chunk
    of an epoch continues nothing, and only the samples with d = 0 teach its first step. 0: all delays alike."""
    rtc_prefix_noise: float = 0.0
    """Training-time RTC: standard deviation, of normalised actions, of an offset of what is handed over, from which the steps
    after it come back to the demonstration. In demonstrations committed steps are never wrong, and a policy follows them
    rather than what it observes; its own ones are. 0: off, as published."""

    def __post_init__(self):
        if self.euler_steps < 1:
            raise ValueError(f'euler_steps is {self.euler_steps}, must be at least 1')
        if self.rtc_max_delay < 0:
            raise ValueError(f'rtc_max_delay is {self.rtc_max_delay}, must be at least 0')
        for key in ('rtc_delay_decay', 'rtc_prefix_noise'):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ValueError(f'{key} is {getattr(self, key)}, must be at least 0')
        if self.rtc_max_delay and self.backbone != 'transformer':
            raise ValueError(f'rtc_max_delay is {self.rtc_max_delay} and backbone {self.backbone!r}; a time for each step needs '
                             "backbone 'transformer'")


class Flow(SamplingPolicy):
    """Samples chunks; one noise, one chunk."""

    kind = 'flow'

    def __init__(self, spec: PolicySpec, config: FlowConfig, normalizer: Normalizer):
        """Raises PolicyError for what cannot be built."""
        super().__init__(spec, config, normalizer)
        if config.rtc_max_delay >= spec.horizon:
            raise PolicyError(f'flow: rtc_max_delay is {config.rtc_max_delay}, must be less than the horizon, {spec.horizon}')
        self.net = self.backbone(time=True)

    @property
    def GUIDANCE(self) -> tuple[str, ...]:
        return ('vjp', 'identity', 'prefix') if self.config.rtc_max_delay else ('vjp', 'identity')

    def sample_time(self, n: int) -> Tensor:
        """Flow times to train on, (n,) in [0, 1]."""
        u = torch.rand(n, device=next(self.parameters()).device)
        # Beta(1.5, 1) has the distribution function x^1.5, so u^(1/1.5) is a draw of it.
        return u if self.config.time_sampling == 'uniform' else 1.0 - u ** (1 / 1.5)

    def sample_delay(self, n: int) -> Tensor:
        """Numbers of committed steps to train on, (n,) of integers."""
        u = torch.rand(n, device=next(self.parameters()).device)
        weights = torch.exp(-self.config.rtc_delay_decay * torch.arange(self.config.rtc_max_delay + 1, device=u.device))
        return torch.searchsorted(weights.cumsum(0)[:-1] / weights.sum(), u, right=True)

    def loss(self, batch: dict) -> dict[str, Tensor]:
        condition = self.condition(batch['observation'])
        x1 = self.normalizer.normalize('action', batch['action'])
        B, H, _ = x1.shape
        x0 = torch.randn_like(x1)
        t, valid = self.sample_time(B), batch['valid']
        if self.config.rtc_max_delay:
            # Every sample keeps a step to learn from, however few it has before its episode ends.
            delay = torch.minimum(self.sample_delay(B), valid.sum(dim=1) - 1)
            if self.config.rtc_prefix_noise:
                offset = self.config.rtc_prefix_noise * torch.randn_like(x1[:, :1])
                x1 = x1 + offset * (come_back(delay, H) * (delay > 0)[:, None])[..., None]
            t, committed = with_prefix(t, delay, H)
            valid = valid & ~committed
        xt = torch.lerp(x0, x1, t.view(B, -1, 1))
        return {'loss': masked_mse(self.net(xt, t, condition), x1 - x0, valid)}

    def sample(self, noise: Tensor, condition: Tensor, warm: tuple[Tensor, float] | None = None,
               guidance: Guidance | None = None) -> Tensor:
        """One noise, one chunk. A warm start enters at x_tau = (1 - tau)·noise + tau·chunk."""
        if warm is None:
            return self.integrate(noise, 0.0, condition, guidance)
        chunk, tau = warm
        return self.integrate(torch.lerp(noise, chunk, tau), tau, condition, guidance)

    def integrate(self, x: Tensor, tau: float, condition: Tensor, guidance: Guidance | None = None) -> Tensor:
        """Euler steps of equal length from flow time tau to 1, all normalised. x: (B, H, D), condition: (B, K)."""
        n = math.ceil(self.config.euler_steps * (1.0 - tau) - 1e-9)
        step = (1.0 - tau) / n
        if guidance is not None and guidance.mode == 'prefix':
            return self._integrate_after_prefix(x, tau, step, n, condition, guidance)
        times = [tau + i * step for i in range(n)]
        # A network trained with times of each step is asked with them always: an exported one takes no other shape.
        per_step = x.shape[:2] if self.config.rtc_max_delay else x.shape[:1]
        for t, net in zip(times, self.at(torch.stack([torch.full(per_step, t, device=x.device) for t in times]), condition)):
            x = x + step * self.velocity(x, t, net, guidance)
        return x

    @staticmethod
    def velocity(x: Tensor, tau: float, net: Callable[[Tensor], Tensor], guidance: Guidance | None = None) -> Tensor:
        """Velocity at flow time tau, with the correction of RTC (https://arxiv.org/abs/2506.07339, eq. 2), all normalised.

        net: the network at tau, x → velocity.
        """
        if guidance is None:
            return net(x)

        def predict(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            v = net(x)
            clean = x + (1.0 - tau) * v
            return v, clean, clean

        v, g = correction(predict, x, guidance.target, guidance.weights, guidance.mode)
        return v + guidance_weight(tau, guidance.beta) * g

    def _integrate_after_prefix(self, x: Tensor, tau: float, step: float, n: int, condition: Tensor,
                                guidance: Guidance) -> Tensor:
        """As `integrate`, with the first steps clean throughout, as in training with `rtc_max_delay`."""
        if guidance.delay > self.config.rtc_max_delay:
            raise PolicyError(f'flow: delay is {guidance.delay} steps; it was trained with rtc_max_delay '
                              f'{self.config.rtc_max_delay}')
        B, H, _ = x.shape
        times = torch.stack([torch.full((B,), tau + i * step, device=x.device) for i in range(n)])
        times, committed = with_prefix(times, torch.full((B,), guidance.delay, device=x.device), H)
        for net in self.at(times, condition):
            x = torch.where(committed[..., None], guidance.target, x)
            x = x + step * net(x)
        return torch.where(committed[..., None], guidance.target, x)


def come_back(delay: Tensor, horizon: int) -> Tensor:
    """What is left of an offset of the first `delay` (B,) steps: all in them, then by a cosine none after COME_BACK. (B, H)."""
    after = torch.arange(horizon, device=delay.device) + 1 - delay[:, None]
    return 0.5 + 0.5 * torch.cos(math.pi * (after / COME_BACK).clamp(0.0, 1.0))


def with_prefix(t: Tensor, delay: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Times (…, B, H) of each step when the first `delay` (B,) are clean, t = 1, others at t (…, B); and which are, (B, H)."""
    committed = torch.arange(horizon, device=t.device) < delay[:, None]
    return torch.where(committed, 1.0, t[..., None]), committed
