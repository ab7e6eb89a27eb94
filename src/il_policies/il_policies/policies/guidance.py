"""Real-time chunking: a new chunk continues the one being executed, by guidance while it is sampled.

RTC (Black et al., 2025, https://arxiv.org/abs/2506.07339) pulls the clean chunk that a sampler expects towards the
previous chunk, with weights over the steps. Pseudo-inverse guidance (Song et al., 2023, https://arxiv.org/abs/2304.02770)
tells how strongly. The training-time variant (https://arxiv.org/abs/2512.05964) hands the committed steps to the
network as they are; only a policy trained for it can take them.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MODES = ('vjp', 'identity', 'prefix')


@dataclass(frozen=True)
class Guidance:
    """What a new chunk shall continue. B batch, H horizon, D actions."""

    target: Tensor
    """Previous chunk, resampled by time onto the steps of the new one, raw units. Shape (B, H, D), float."""
    weights: Tensor
    """How much each step is held to the target, in [0, 1], such as `rtc_weights`. Shape (H,) or (B, H)."""
    mode: Literal['vjp', 'identity', 'prefix'] = 'vjp'
    """vjp: RTC. identity: RTC with the Jacobian of the clean chunk taken as the identity: no backward pass, so an exported
    network will do. prefix: training-time RTC: the first `delay` steps are the target's, `weights` and `beta` are not used."""
    beta: float = 5.0
    """Largest guidance weight."""
    delay: int = 0
    """Steps of the new chunk that are executed before it arrives, at the start [steps]."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f'mode is {self.mode!r}; valid: {", ".join(MODES)}')
        if self.target.ndim != 3:
            raise ValueError(f'target has shape {tuple(self.target.shape)}, must be (B, H, D)')
        B, H, _ = self.target.shape
        if self.weights.shape not in ((H,), (B, H)):
            raise ValueError(f'weights have shape {tuple(self.weights.shape)}, must be ({H},) or ({B}, {H})')
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f'beta is {self.beta}, must be > 0')
        if not 0 <= self.delay < H:
            raise ValueError(f'delay is {self.delay}, must be at least 0 and less than the horizon, {H}')


def rtc_weights(horizon: int, delay: int, executed: int) -> Tensor:
    """Weights of RTC, eq. 5, shape (H,): 1 for the steps executed meanwhile, 0 for those the previous chunk lacks.

    With horizon H, delay d and executed steps s per chunk: W_i = 1 for i < d; c_i·(exp(c_i) - 1)/(e - 1) for
    d ≤ i < H - s, with c_i = (H - s - i)/(H - s - d + 1); 0 for the rest. Raises ValueError unless 0 ≤ d ≤ s ≤ H - d and s ≥ 1.
    """
    if not (0 <= delay <= executed <= horizon - delay and executed >= 1):
        raise ValueError(f'delay is {delay} and executed {executed} of horizon {horizon}; must be '
                         '0 <= delay <= executed <= horizon - delay, executed >= 1')
    i = torch.arange(horizon, dtype=torch.float64)
    c = (horizon - executed - i) / (horizon - executed - delay + 1)
    between = c * torch.expm1(c) / math.expm1(1.0)
    return torch.where(i < delay, 1.0, torch.where(i < horizon - executed, between, 0.0)).float()


def guidance_weight(tau: float, beta: float) -> float:
    """Weight of the correction of the velocity at flow time tau in [0, 1): RTC, eq. 2 and 4.

    min(beta, (1 - tau)/(tau·r²)) with the variance r² = (1 - tau)²/(tau² + (1 - tau)²) of the clean chunk.
    """
    return beta if tau == 0.0 else min(beta, (tau**2 + (1.0 - tau) ** 2) / (tau * (1.0 - tau)))


def correction(predict: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], x: Tensor, target: Tensor, weights: Tensor,
               mode: Literal['vjp', 'identity']) -> tuple[Tensor, Tensor]:
    """What the network gives at x, and the unweighted correction g = [(target - seen) ⊙ weights]ᵀ ∂clean/∂x.

    predict: x → what the network gives, the clean chunk as a function of x, and that chunk as the sampler sees it, such as
    clipped. x, target: (B, H, D) normalised, weights: (H,) or (B, H). Returns two (B, H, D), without gradients.
    """
    weights = weights.to(x)[..., None]
    if mode == 'identity':
        output, _, seen = predict(x)
        return output, (target - seen) * weights
    with torch.enable_grad():
        # Before the forward pass: otherwise the graph would not reach x, and the Jacobian be lost.
        x = x.detach().requires_grad_()
        output, clean, seen = predict(x)
    g, = torch.autograd.grad(clean, x, ((target - seen) * weights).detach())
    return output.detach(), g
