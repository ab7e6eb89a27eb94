"""Policies: networks that turn a history of observations into a chunk of future actions.

`Policy.loss(batch)` trains, `Policy.predict(observation)` plans. One algorithm a file.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from il_policies.policies.guidance import Guidance
from il_policies.policies.normalize import Normalizer
from il_policies.policies.transformer import Transformer
from il_policies.policies.unet import UNet
from il_policies.policies.vision import Camera, ImageEncoder


class PolicyError(ValueError):
    """A policy that cannot be built or asked this way; the message says what was received and what is valid."""


@dataclass(frozen=True)
class PolicySpec:
    """What goes into a policy and what comes out."""

    features: dict[str, tuple[int, ...]]
    """Observed feature → shape of one sample: (D,), or (h, w, 3) for images."""
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

    @property
    def images(self) -> list[str]:
        """Names of the image features."""
        return [name for name, shape in self.features.items() if len(shape) == 3]

    @property
    def lowdim(self) -> list[str]:
        """Names of the low-dimensional features."""
        return [name for name in self.features if name not in self.images]


class Policy(nn.Module):
    """What all policies share: their description, normalisation and the vector of observations.

    Dimensions: B batch, To history, H horizon, D actions, F low-dimensional numbers observed at one time, h and w of images.
    """

    kind: str
    """Name of the algorithm."""

    def __init__(self, spec: PolicySpec, config, normalizer: Normalizer):
        """`config` is the algorithm's own frozen dataclass with a `vision`. Raises PolicyError for features it cannot take."""
        super().__init__()
        wrong = {name: shape for name, shape in spec.features.items() if len(shape) != 1 and shape[2:] != (3,)}
        if wrong:
            raise PolicyError(f'{self.kind}: it cannot take features {wrong}; valid: (D,) and images of shape (h, w, 3)')
        if spec.images and config.vision.frames > spec.history:
            raise PolicyError(f'{self.kind}: vision.frames is {config.vision.frames}, must be at most the history, '
                              f'{spec.history}')
        self.spec = spec
        self.config = config
        self.encoders = nn.ModuleList(self.encoder(spec.features[name]) for name in spec.images)
        self.normalizer = normalizer
        self.hash = ''
        """Content hash of the checkpoint it was loaded from or saved to; empty before."""
        self.backend = 'torch'
        """What runs its networks; see deploy.py."""
        self.extra: dict = {}
        """What its checkpoint says besides: contract, contract_hash, dataset_hash, training."""

    def encoder(self, shape: tuple[int, ...]) -> Camera:
        """A new network that looks at the images of one camera, of shape (h, w, 3)."""
        return ImageEncoder(self.config.vision)

    @property
    def condition_size(self) -> int:
        """Length of what `condition` gives."""
        lowdim = self.spec.history * sum(self.spec.features[name][0] for name in self.spec.lowdim)
        return lowdim + sum(encoder.size for encoder in self.encoders)

    def condition(self, observation: dict[str, Tensor]) -> Tensor:
        """All observations as one vector: low-dimensional ones normalised, images encoded.

        {feature: (B, To, D_f) float32 or (B, To, h, w, 3) uint8} → (B, condition_size). Raises PolicyError.
        """
        for name, shape in self.spec.features.items():
            if name not in observation:
                raise PolicyError(f'{self.kind}: feature {name!r} is missing; received: {list(observation)}')
            value = observation[name]
            if value.shape[1:] != (self.spec.history, *shape):
                raise PolicyError(f'{self.kind}: feature {name!r} has shape {tuple(value.shape)}, '
                                  f'must be (B, {self.spec.history}, {", ".join(map(str, shape))})')
            if (value.dtype == torch.uint8) != (name in self.spec.images):
                raise PolicyError(f'{self.kind}: feature {name!r} is {value.dtype}; images must be uint8, all else not')
        lowdim = [self.normalizer.bounded(name, observation[name]) for name in self.spec.lowdim]
        parts = [torch.cat(lowdim, dim=-1).flatten(1)] if lowdim else []
        parts += [encoder(observation[name]) for name, encoder in zip(self.spec.images, self.encoders)]
        return torch.cat(parts, dim=-1)

    def backbone(self, time: bool) -> nn.Module:
        """The network that `config.backbone` names: x (B, H, D), t, condition (B, K) → (B, H, D). Raises PolicyError."""
        kind, config = {'unet': (UNet, self.config.unet), 'transformer': (Transformer, self.config.transformer)}[
            self.config.backbone]
        try:
            return kind(len(self.spec.action_names), self.condition_size, self.spec.horizon, config, time)
        except ValueError as error:
            raise PolicyError(f'{self.kind}: {error}') from None

    def loss(self, batch: dict) -> dict[str, Tensor]:
        """Losses of a batch in raw units, as `Windows.batch` gives it, in tensors; 'loss' is what is minimised."""
        raise NotImplementedError

    def predict(self, observation: dict[str, Tensor], noise: Tensor | None = None,
                warm: tuple[Tensor, float] | None = None, guidance: Guidance | None = None) -> Tensor:
        """Chunk (B, H, D) in raw units.

        Deterministic policies ignore `noise` and `warm`, and raise PolicyError for `guidance`.
        """
        raise NotImplementedError


class SamplingPolicy(Policy):
    """A policy that turns noise into chunks, step by step. A subclass has `sample` and `GUIDANCE`."""

    GUIDANCE: tuple[str, ...]
    """Modes of guidance it can take."""

    @torch.no_grad()
    def predict(self, observation: dict[str, Tensor], noise: Tensor | None = None,
                warm: tuple[Tensor, float] | None = None, guidance: Guidance | None = None) -> Tensor:
        """Chunk (B, H, D) in raw units.

        noise: (B, H, D), standard normal; drawn if None. warm: a chunk (B, H, D) in raw units and the flow time tau in
        [0, 1) at which to enter: sampling begins from a mixture of noise and chunk, so that the new chunk stays in the old
        one's mode. guidance: what the chunk shall continue. Raises PolicyError for wrong shapes and other modes.
        """
        condition = self.condition(observation)
        shape = (len(condition), self.spec.horizon, len(self.spec.action_names))
        if noise is None:
            noise = torch.randn(shape, device=condition.device)
        if noise.shape != shape:
            raise PolicyError(f'{self.kind}: noise has shape {tuple(noise.shape)}, must be {shape}')
        if warm is not None:
            chunk, tau = warm
            if not 0.0 <= tau < 1.0 or chunk.shape != shape:
                raise PolicyError(f'{self.kind}: warm start from a chunk of shape {tuple(chunk.shape)} at {tau}; '
                                  f'must be {shape} and in [0, 1)')
            warm = self.normalizer.normalize('action', chunk), tau
        if guidance is not None:
            if guidance.mode not in self.GUIDANCE:
                raise PolicyError(f'{self.kind}: guidance mode is {guidance.mode!r}; valid: {", ".join(self.GUIDANCE)}')
            if guidance.target.shape != shape:
                raise PolicyError(f'{self.kind}: guidance target has shape {tuple(guidance.target.shape)}, must be {shape}')
            guidance = replace(guidance, target=self.normalizer.normalize('action', guidance.target))
        return self.normalizer.unnormalize('action', self.sample(noise, condition, warm, guidance))

    def at(self, times: Tensor, condition: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """The network at each of `times` (n, B) or (n, B, H), as functions of x (B, H, D); condition: (B, K)."""
        # An exported network computes for all times at once what does not depend on x.
        ahead = getattr(self.net, 'at', None)
        return ahead(times, condition) if ahead else [lambda x, t=t: self.net(x, t, condition) for t in times]

    def sample(self, noise: Tensor, condition: Tensor, warm: tuple[Tensor, float] | None = None,
               guidance: Guidance | None = None) -> Tensor:
        """Chunk (B, H, D), as is all that goes in: normalised."""
        raise NotImplementedError


def masked_mse(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error over the valid steps. prediction, target: (B, H, D), valid: (B, H) bool."""
    per_step = (prediction - target).square().mean(dim=-1)
    return (per_step * valid).sum() / valid.sum()
