"""Flow matching: chunks are carried from noise to actions along straight lines.

Lipman et al., 2023, https://arxiv.org/abs/2210.02747, and as a policy π₀ (Black et al., 2024,
https://arxiv.org/abs/2410.24164). With x_t = (1 - t)·x₀ + t·x₁, x₀ normal noise and x₁ a demonstrated chunk, the
network learns the velocity x₁ - x₀; Euler steps from t = 0 to 1 give a sample.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from il_policies.policies import Policy, PolicyError, PolicySpec, masked_mse
from il_policies.policies.guidance import Guidance, correction, guidance_weight
from il_policies.policies.normalize import Normalizer
from il_policies.policies.unet import UNet, UNetConfig
from il_policies.policies.vision import VisionConfig


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    """The network."""
    euler_steps: int = 10
    """Steps from noise to actions; warm starts take proportionally fewer."""
    time_sampling: Literal['uniform', 'beta'] = 'uniform'
    """Flow times trained on: uniform, or 1 - Beta(1.5, 1) with more weight near noise, as π₀."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The network that looks at each camera."""

    def __post_init__(self):
        if self.euler_steps < 1:
            raise ValueError(f'euler_steps is {self.euler_steps}, must be at least 1')


class Flow(Policy):
    """Samples chunks; one noise, one chunk."""

    kind = 'flow'

    def __init__(self, spec: PolicySpec, config: FlowConfig, normalizer: Normalizer):
        super().__init__(spec, config, normalizer)
        try:
            self.net = UNet(len(spec.action_names), self.condition_size, spec.horizon, config.unet, time=True)
        except ValueError as error:
            raise PolicyError(f'flow: {error}') from None

    def sample_time(self, n: int) -> Tensor:
        """Flow times to train on, (n,) in [0, 1]."""
        u = torch.rand(n, device=self._device)
        # Beta(1.5, 1) has the distribution function x^1.5, so u^(1/1.5) is a draw of it.
        return u if self.config.time_sampling == 'uniform' else 1.0 - u ** (1 / 1.5)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def loss(self, batch: dict) -> dict[str, Tensor]:
        condition = self.condition(batch['observation'])
        x1 = self.normalizer.normalize('action', batch['action'])
        x0 = torch.randn_like(x1)
        t = self.sample_time(len(x1))
        xt = torch.lerp(x0, x1, t[:, None, None])
        return {'loss': masked_mse(self.net(xt, t, condition), x1 - x0, batch['valid'])}

    @torch.no_grad()
    def predict(self, observation: dict[str, Tensor], noise: Tensor | None = None,
                warm: tuple[Tensor, float] | None = None, guidance: Guidance | None = None) -> Tensor:
        """Chunk (B, H, D) in raw units.

        noise: x₀ (B, H, D), standard normal; drawn if None. warm: a chunk (B, H, D) in raw units and the flow time tau
        at which to enter: x_tau = (1 - tau)·noise + tau·chunk, so that the new chunk stays in the old one's mode.
        guidance: what the chunk shall continue. Raises PolicyError for wrong shapes.
        """
        condition = self.condition(observation)
        shape = (len(condition), self.spec.horizon, len(self.spec.action_names))
        x = torch.randn(shape, device=self._device) if noise is None else noise
        tau = 0.0
        if warm is not None:
            chunk, tau = warm
            if not 0.0 <= tau < 1.0 or chunk.shape != shape:
                raise PolicyError(f'flow: warm start from a chunk of shape {tuple(chunk.shape)} at {tau}; '
                                  f'must be {shape} and in [0, 1)')
            x = torch.lerp(x, self.normalizer.normalize('action', chunk), tau)
        if x.shape != shape:
            raise PolicyError(f'flow: noise has shape {tuple(x.shape)}, must be {shape}')
        if guidance is not None:
            if guidance.target.shape != shape:
                raise PolicyError(f'flow: guidance target has shape {tuple(guidance.target.shape)}, must be {shape}')
            if guidance.mode == 'prefix':
                raise PolicyError("flow: guidance mode is 'prefix'; valid: vjp, identity")
            guidance = replace(guidance, target=self.normalizer.normalize('action', guidance.target))
        return self.normalizer.unnormalize('action', self.integrate(x, tau, condition, guidance))

    def integrate(self, x: Tensor, tau: float, condition: Tensor, guidance: Guidance | None = None) -> Tensor:
        """Euler steps of equal length from flow time tau to 1, all normalised. x: (B, H, D), condition: (B, K)."""
        n = math.ceil(self.config.euler_steps * (1.0 - tau) - 1e-9)
        step = (1.0 - tau) / n
        for i in range(n):
            x = x + step * self.velocity(x, tau + i * step, condition, guidance)
        return x

    def velocity(self, x: Tensor, tau: float, condition: Tensor, guidance: Guidance | None = None) -> Tensor:
        """Velocity at flow time tau, with the correction of RTC (https://arxiv.org/abs/2506.07339, eq. 2), all normalised."""
        t = torch.full((len(x),), tau, device=x.device)
        if guidance is None:
            return self.net(x, t, condition)

        def predict(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            v = self.net(x, t, condition)
            clean = x + (1.0 - tau) * v
            return v, clean, clean

        v, g = correction(predict, x, guidance.target, guidance.weights, guidance.mode)
        return v + guidance_weight(tau, guidance.beta) * g
