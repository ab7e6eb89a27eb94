"""ACT, action chunking with transformers: a conditional variational autoencoder of chunks.

Zhao et al., 2023, https://arxiv.org/abs/2304.13705. In training an encoder sees the demonstrated chunk and tells, by a
latent z of few numbers, what the observation leaves open: which way round, how fast. The loss is the absolute error of
the chunk plus kl_weight · KL(q(z | chunk, state) ‖ N(0, I)), which keeps z to what is needed. Then z = 0, or is drawn.

The transformers are DETR's (Carion et al., 2020, https://arxiv.org/abs/2005.12872): normalised after each residual path,
positions added to what is compared and not to what is passed on. Its decoder begins with self-attention among queries
that hold nothing yet, of which each gets the same constant; here that constant is learnt as such (`ACTNet.start`), which
gives the same functions with a million parameters fewer.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from il_policies.policies import Policy, PolicyError, PolicySpec
from il_policies.policies.guidance import Guidance
from il_policies.policies.normalize import Normalizer
from il_policies.policies.vision import ImageTokens, VisionConfig


@dataclass(frozen=True)
class ACTConfig:
    """ACT, in the size of the paper."""

    width: int = 512
    """Length of a token; a multiple of 4 and of heads."""
    heads: int = 8
    """Of each attention."""
    feedforward: int = 3200
    """Hidden units between attentions."""
    encoder_layers: int = 4
    """Over latent, state and image tokens."""
    decoder_layers: int = 1
    """From these to the chunk. The original has 7 but uses the first one only."""
    vae_layers: int = 4
    """Over state and demonstrated chunk, in training only."""
    latent: int = 32
    """Numbers in z."""
    kl_weight: float = 10.0
    """Weight of the Kullback-Leibler divergence in the loss: larger leaves less to z."""
    dropout: float = 0.1
    """In training, on attentions and residual paths."""
    latent_sampling: Literal['zero', 'normal'] = 'zero'
    """z when predicting: 0, the most likely, or drawn, so that chunks differ where demonstrations did."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The network that looks at each camera; `keypoints` and `size` are not used, each place of its maps is a token."""

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ('width', 'heads', 'feedforward', 'encoder_layers',
                                                        'decoder_layers', 'vae_layers', 'latent')}
        if min(sizes.values()) < 1:
            raise ValueError(f'{", ".join(f"{name} {value}" for name, value in sizes.items())}: all must be at least 1')
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f'width is {self.width}, must be a multiple of 4 and of heads, {self.heads}')
        if not self.kl_weight >= 0.0 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'kl_weight is {self.kl_weight}, must be at least 0; dropout is {self.dropout}, '
                             'must be in [0, 1)')


class Attention(nn.Module):
    """Multi-head attention with its residual path, normalised after it.

    x (B, S, d) or (1, S, d) looks at memory (B, T, d), or at itself → (B, S, d). keep: (B, T) bool, what may be looked at.
    """

    def __init__(self, config: ACTConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query, self.key, self.value, self.out = (nn.Linear(config.width, config.width) for _ in range(4))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor | None = None, memory_positions: Tensor | None = None,
                keep: Tensor | None = None) -> Tensor:
        if memory is None:
            memory, memory_positions = x, positions
        q, k, v = self._project(x + positions, memory + memory_positions, memory)
        mask = None if keep is None else keep[:, None, None, :]
        found = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        found = self.out(found.transpose(1, 2).flatten(2))
        return self.norm(x + F.dropout(found, self.dropout, self.training))

    def mixture(self, x: Tensor, positions: Tensor, memory: Tensor, memory_positions: Tensor) -> tuple[Tensor, Tensor]:
        """What is found, before dropout and residual path, as weights (B, S, heads·T) @ values (B, heads·T, d) + out.bias."""
        q, k, v = self._project(x + positions, memory + memory_positions, memory)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)            # (B, heads, S, T)
        values = v @ self.out.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0)            # (B, heads, T, d)
        return weights.transpose(1, 2).flatten(2), values.flatten(1, 2)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values of each head, (B, heads, ·, d/heads)."""
        # Queries that depend on no observation are projected once, not for each of the B: constant in an exported network.
        parts = self.query(query).expand(value.shape[0], -1, -1), self.key(key), self.value(value)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]


class FeedForward(nn.Module):
    """Two layers with ReLU, for each token by itself, with their residual path and normalised after it. (B, S, d)."""

    def __init__(self, config: ACTConfig):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(config.width, config.feedforward), nn.ReLU(), nn.Dropout(config.dropout),
                                    nn.Linear(config.feedforward, config.width), nn.Dropout(config.dropout))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        # As a matrix, which ONNX Runtime multiplies and adds to in one go.
        return self.norm(x + self.layers(x.flatten(0, 1)).view_as(x))


class EncoderLayer(nn.Module):
    """Tokens look at each other. x: (B, S, d), positions: (S, d), keep: (B, S) bool → (B, S, d)."""

    def __init__(self, config: ACTConfig):
        super().__init__()
        self.attention, self.feedforward = Attention(config), FeedForward(config)

    def forward(self, x: Tensor, positions: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.feedforward(self.attention(x, positions, keep=keep))


class DecoderLayer(nn.Module):
    """Queries look at each other, then at the memory. x: (B or 1, H, d), queries: (H, d), memory: (B, S, d) → (B, H, d).

    first: they hold nothing yet, x is (1, H, d) with equal steps, and they do not look at each other.
    """

    def __init__(self, config: ACTConfig, first: bool):
        super().__init__()
        self.among = None if first else Attention(config)
        self.attention, self.feedforward = Attention(config), FeedForward(config)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        if self.among is not None:
            x = self.among(x, queries)
        elif not self.training and self.attention.heads * memory.shape[1] < x.shape[1]:
            return self._from_few(x, queries, memory, positions)
        return self.feedforward(self.attention(x, queries, memory, positions))

    def _from_few(self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
        """The same without dropout, sooner where the memory is short, such as numbers only.

        All that the attention adds to the equal steps are mixtures of n = heads·S values. The normalisation is linear but for a
        scale of each step, so that the first layer of the perceptron, of all layers the largest, need not see H steps, but n + 1.
        """
        attention, layers = self.attention, self.feedforward.layers
        weights, values = attention.mixture(x, queries, memory, positions)
        constant = (x[:, :1] + attention.out.bias).expand(len(values), -1, -1)
        basis = torch.cat([constant, values], dim=1)                                            # (B, n + 1, d)
        basis = basis - basis.mean(dim=-1, keepdim=True)
        weights = torch.cat([torch.ones_like(weights[..., :1]), weights], dim=-1)               # (B, H, n + 1)
        y = weights @ basis                                                                     # (B, H, d), of mean 0
        scale = (y.square().mean(dim=-1, keepdim=True) + attention.norm.eps).rsqrt()
        y = scale * y * attention.norm.weight + attention.norm.bias
        hidden = F.linear(basis * attention.norm.weight, layers[0].weight)                      # (B, n + 1, feedforward)
        hidden = (scale * weights) @ hidden + F.linear(attention.norm.bias, layers[0].weight, layers[0].bias)
        return self.feedforward.norm(y + layers[1:](hidden.flatten(0, 1)).view_as(y))


class VAE(nn.Module):
    """state (B, K), chunk (B, H, D), valid (B, H) bool → mean and log variance of z, (B, latent) each.

    All normalised. Steps that are not valid are not looked at.
    """

    def __init__(self, state_size: int, action_size: int, horizon: int, config: ACTConfig):
        super().__init__()
        self.summary = nn.Parameter(torch.randn(1, 1, config.width))
        self.state = nn.Linear(state_size, config.width) if state_size else None
        self.action = nn.Linear(action_size, config.width)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.vae_layers))
        self.out = nn.Linear(config.width, 2 * config.latent)
        before = 2 if state_size else 1
        self.register_buffer('positions', sinusoid(torch.arange(before + horizon), config.width), persistent=False)
        _initialise(self.layers)

    def forward(self, state: Tensor, chunk: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        before = [self.summary.expand(len(chunk), -1, -1)]
        if self.state is not None:
            before.append(self.state(state).unsqueeze(1))
        x = torch.cat([*before, self.action(chunk)], dim=1)
        keep = torch.cat([valid.new_ones(len(chunk), len(before)), valid], dim=1)
        for layer in self.layers:
            x = layer(x, self.positions, keep)
        # In float32 under autocast too: bfloat16 leaves nothing of a small divergence, and what it leaves may be negative.
        mean, log_variance = self.out(x[:, 0]).float().chunk(2, dim=-1)
        return mean, log_variance


class ACTNet(nn.Module):
    """condition (B, state_size + tokens of images, flat), z (B, latent) → chunk (B, H, D), normalised."""

    def __init__(self, state_size: int, images: list[ImageTokens], action_size: int, horizon: int, config: ACTConfig):
        super().__init__()
        self.width, self.state_size, self.image_size = config.width, state_size, sum(image.size for image in images)
        self.latent = nn.Linear(config.latent, config.width)
        self.state = nn.Linear(state_size, config.width) if state_size else None
        self.positions = nn.Parameter(torch.randn(2 if state_size else 1, config.width))
        places = [grid_sinusoid(*image.shape, config.width).repeat(image.config.frames, 1) for image in images]
        self.register_buffer('places', torch.cat([torch.zeros(0, config.width), *places]), persistent=False)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.queries = nn.Parameter(torch.randn(horizon, config.width))
        self.start = nn.Parameter(torch.zeros(1, 1, config.width))
        self.decoder = nn.ModuleList(DecoderLayer(config, first=i == 0) for i in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, action_size)
        _initialise(self.encoder)
        _initialise(self.decoder)

    def forward(self, condition: Tensor, z: Tensor) -> Tensor:
        state, images = condition.split([self.state_size, self.image_size], dim=-1)
        tokens = [self.latent(z).unsqueeze(1)]
        if self.state is not None:
            tokens.append(self.state(state).unsqueeze(1))
        if self.image_size:
            tokens.append(images.unflatten(-1, (-1, self.width)))
        x, positions = torch.cat(tokens, dim=1), torch.cat([self.positions, self.places])
        for layer in self.encoder:
            x = layer(x, positions)
        y = self.start.expand(-1, len(self.queries), -1)
        for layer in self.decoder:
            y = layer(y, self.queries, x, positions)
        return self.head(self.norm(y))


class ACT(Policy):
    """Predicts the chunk in one go; z = 0, or one z, one chunk."""

    kind = 'act'

    def __init__(self, spec: PolicySpec, config: ACTConfig, normalizer: Normalizer):
        """Whatever the mode of `normalizer`, its mean and standard deviation are used."""
        try:
            normalizer = Normalizer(normalizer.statistics, 'mean_std')
        except ValueError as error:
            raise PolicyError(f'act: {error}') from None
        super().__init__(spec, config, normalizer)
        H, D = spec.horizon, len(spec.action_names)
        if config.latent_sampling == 'normal' and H * D < config.latent:
            raise PolicyError(f'act: latent is {config.latent}; to be drawn from the noise of a chunk it must be at most '
                              f'its {H} steps times {D} actions')
        self.state_size = spec.history * sum(spec.features[name][0] for name in spec.lowdim)
        self.vae = VAE(self.state_size, D, H, config)
        self.net = ACTNet(self.state_size, list(self.encoders), D, H, config)

    def encoder(self, shape: tuple[int, ...]) -> ImageTokens:
        return ImageTokens(self.config.vision, shape[:2], self.config.width)

    def loss(self, batch: dict) -> dict[str, Tensor]:
        """'loss' = 'l1', the mean absolute error over valid steps, + kl_weight · 'kl', the divergence summed over z."""
        condition = self.condition(batch['observation'])
        target, valid = self.normalizer.normalize('action', batch['action']), batch['valid']
        mean, log_variance = self.vae(condition[:, :self.state_size], target, valid)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        per_step = (self.net(condition, z) - target).abs().mean(dim=-1)
        l1 = (per_step * valid).sum() / valid.sum()
        kl = kl_divergence(mean, log_variance).mean()
        return {'loss': l1 + self.config.kl_weight * kl, 'l1': l1, 'kl': kl}

    @torch.no_grad()
    def predict(self, observation: dict[str, Tensor], noise: Tensor | None = None,
                warm: tuple[Tensor, float] | None = None, guidance: Guidance | None = None) -> Tensor:
        """Chunk (B, H, D) in raw units.

        noise: (B, H, D), standard normal, of which the first `latent` numbers are z if latent_sampling is normal; drawn if
        None, not looked at if latent_sampling is zero. One noise keeps z, and so the way chosen; `warm` is not used. Raises
        PolicyError for guidance and noise of a wrong shape.
        """
        if guidance is not None:
            raise PolicyError('act: it does not sample chunks and takes no guidance; valid: flow, diffusion')
        condition = self.condition(observation)
        B, H, D = len(condition), self.spec.horizon, len(self.spec.action_names)
        if noise is not None and noise.shape != (B, H, D):
            raise PolicyError(f'act: noise has shape {tuple(noise.shape)}, must be {(B, H, D)}')
        if self.config.latent_sampling == 'zero':
            z = condition.new_zeros(B, self.config.latent)
        elif noise is None:
            z = torch.randn(B, self.config.latent, device=condition.device)
        else:
            z = noise.flatten(1)[:, :self.config.latent]
        return self.normalizer.unnormalize('action', self.net(condition, z))


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) ‖ N(0, 1)), summed over z: (B, latent) each → (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=-1)


def sinusoid(positions: Tensor, size: int) -> Tensor:
    """Sines and cosines of positions (N,) at size / 2 frequencies from 1 down to about 1e-4, (N, size)."""
    frequencies = torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
    angle = positions[:, None].float() * frequencies
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def grid_sinusoid(height: int, width: int, size: int) -> Tensor:
    """The same in two dimensions, over height and width each scaled to 2π, as DETR: (height·width, size), row by row."""
    rows, columns = (sinusoid(torch.arange(1, n + 1) * (2.0 * math.pi / n), size // 2) for n in (height, width))
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=-1)


def _initialise(layers: nn.Module) -> None:
    """Xavier's uniform distribution for all matrices, as DETR."""
    for parameter in layers.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
