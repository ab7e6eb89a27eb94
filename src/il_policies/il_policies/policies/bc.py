"""Behaviour cloning: one chunk per observation, by regression.

The network is Flow's without the flow time: it is fed a learned constant instead of noise, so that the two differ in
nothing but the objective. The mean squared error asks for the mean of all demonstrated chunks, which may be none of
them.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from il_policies.policies import Policy, PolicyError, PolicySpec, masked_mse
from il_policies.policies.guidance import Guidance
from il_policies.policies.normalize import Normalizer
from il_policies.policies.transformer import TransformerConfig
from il_policies.policies.unet import UNetConfig
from il_policies.policies.vision import VisionConfig


@dataclass(frozen=True)
class BCConfig:
    """Behaviour cloning."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    """The network, if backbone is unet."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The network that looks at each camera."""
    backbone: Literal['unet', 'transformer'] = 'unet'
    """Kind of network."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """The network, if backbone is transformer."""


class BC(Policy):
    """Predicts the chunk directly."""

    kind = 'bc'

    def __init__(self, spec: PolicySpec, config: BCConfig, normalizer: Normalizer):
        super().__init__(spec, config, normalizer)
        H, D = spec.horizon, len(spec.action_names)
        self.net = self.backbone(time=False)
        self.query = nn.Parameter(torch.randn(1, H, D))

    def _chunk(self, observation: dict[str, Tensor]) -> Tensor:
        """Normalised chunk (B, H, D)."""
        condition = self.condition(observation)
        return self.net(self.query.expand(len(condition), -1, -1), None, condition)

    def loss(self, batch: dict) -> dict[str, Tensor]:
        target = self.normalizer.normalize('action', batch['action'])
        return {'loss': masked_mse(self._chunk(batch['observation']), target, batch['valid'])}

    @torch.no_grad()
    def predict(self, observation: dict[str, Tensor], noise: Tensor | None = None,
                warm: tuple[Tensor, float] | None = None, guidance: Guidance | None = None) -> Tensor:
        if guidance is not None:
            raise PolicyError('bc: it does not sample and takes no guidance; valid: flow, diffusion')
        return self.normalizer.unnormalize('action', self._chunk(observation))
