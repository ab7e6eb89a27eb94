"""Policies: networks that turn a history of observations into a chunk of future actions.

`Policy.loss(batch)` trains, `Policy.predict(observation)` plans. One algorithm a file.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from il_policies.policies.normalize import Normalizer


class PolicyError(ValueError):
    """A policy that cannot be built or asked this way; the message says what was received and what is valid."""


@dataclass(frozen=True)
class PolicySpec:
    """What goes into a policy and what comes out."""

    features: dict[str, tuple[int, ...]]
    """Observed feature → shape of one sample."""
    action_names: tuple[str, ...]
    """Names of the D action entries, such as joints."""
    horizon: int
    """Steps H of a chunk."""
    history: int
    """Observations To a chunk is predicted from, the newest being now."""
    step_period: float
    """Time between the steps of a chunk, and between observations [s]."""
    action_offset: float
    """Time from the newest observation to step 0 of the chunk [s]."""

    def __post_init__(self):
        if self.horizon < 1 or self.history < 1:
            raise ValueError(f'horizon {self.horizon} and history {self.history} must both be at least 1')
        if not (math.isfinite(self.step_period) and self.step_period > 0 and math.isfinite(self.action_offset)):
            raise ValueError(f'step_period is {self.step_period}, must be > 0; action_offset is {self.action_offset}, '
                             'must be finite')
        if not self.features or not self.action_names:
            raise ValueError(f'features {list(self.features)} and action_names {list(self.action_names)} must not be '
                             'empty')


class Policy(nn.Module):
    """What all policies share: their description, normalisation and the vector of observations.

    Dimensions: B batch, To history, H horizon, D actions, F numbers observed at one time.
    """

    kind: str
    """Name of the algorithm."""

    def __init__(self, spec: PolicySpec, config, normalizer: Normalizer):
        """`config` is the algorithm's own frozen dataclass. Raises PolicyError for features it cannot take."""
        super().__init__()
        images = {name: shape for name, shape in spec.features.items() if len(shape) != 1}
        if images:
            raise PolicyError(f'{self.kind}: features {images} are images; it takes low-dimensional ones (D,) only, '
                              f'here: {[name for name in spec.features if name not in images]}')
        self.spec = spec
        self.config = config
        self.normalizer = normalizer
        self.hash = ''
        """Content hash of the checkpoint it was loaded from or saved to; empty before."""
        self.extra: dict = {}
        """What its checkpoint says besides: contract, contract_hash, dataset_hash, training."""

    @property
    def condition_size(self) -> int:
        """To·F: length of what `condition` gives."""
        return self.spec.history * sum(shape[0] for shape in self.spec.features.values())

    def condition(self, observation: dict[str, Tensor]) -> Tensor:
        """All observations, normalised, as one vector: {feature: (B, To, D_f)} → (B, To·F). Raises PolicyError."""
        parts = []
        for name, shape in self.spec.features.items():
            if name not in observation:
                raise PolicyError(f'{self.kind}: feature {name!r} is missing; received: {list(observation)}')
            value = observation[name]
            if value.shape[1:] != (self.spec.history, *shape):
                raise PolicyError(f'{self.kind}: feature {name!r} has shape {tuple(value.shape)}, '
                                  f'must be (B, {self.spec.history}, {", ".join(map(str, shape))})')
            # Clamped: an entry that hardly moved in the demonstrations would drown all others when it is off live.
            parts.append(self.normalizer.normalize(name, value).clamp(-2.0, 2.0))
        return torch.cat(parts, dim=-1).flatten(1)

    def loss(self, batch: dict) -> dict[str, Tensor]:
        """Losses of a batch in raw units, as `Windows.batch` gives it, in tensors; 'loss' is what is minimised."""
        raise NotImplementedError

    def predict(self, observation: dict[str, Tensor], noise: Tensor | None = None,
                warm: tuple[Tensor, float] | None = None) -> Tensor:
        """Chunk (B, H, D) in raw units. Deterministic policies ignore `noise` and `warm`."""
        raise NotImplementedError


def masked_mse(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error over the valid steps. prediction, target: (B, H, D), valid: (B, H) bool."""
    per_step = (prediction - target).square().mean(dim=-1)
    return (per_step * valid).sum() / valid.sum()
