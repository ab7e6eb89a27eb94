"""Transformer over the steps of a chunk, conditioned by adaptive layer norms that begin as the identity.

DiT (Peebles and Xie, 2023, https://arxiv.org/abs/2212.09748) with the steps of a chunk as tokens. Unlike the U-Net it takes
any horizon, and a time for each step, which training-time real-time chunking needs.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from il_policies.policies.unet import TimeEmbedding


@dataclass(frozen=True)
class TransformerConfig:
    """Size of the transformer."""

    width: int = 128
    """Channels of a token."""
    layers: int = 4
    """Blocks of attention and perceptron."""
    heads: int = 4
    """Heads of the attention; divides the width."""
    mlp_ratio: int = 4
    """Hidden channels of the perceptrons in widths."""
    time_size: int = 64
    """Length of the embedding of the flow time or diffusion step; even."""
    dropout: float = 0.0
    """Share of what attention and perceptrons add that is dropped in training."""

    def __post_init__(self):
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f'width {self.width} must be a positive multiple of heads, {self.heads}')
        if self.layers < 1 or self.mlp_ratio < 1 or self.time_size < 4 or self.time_size % 2:
            raise ValueError(f'layers is {self.layers} and mlp_ratio {self.mlp_ratio}, must be at least 1; time_size is '
                             f'{self.time_size}, must be even and at least 4')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout is {self.dropout}, must be in [0, 1)')


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale and bias, and a gate, come from the condition. (B, H, C) → (B, H, C) and (B, 1 or H, C).

    All three, side by side (B, 1 or H, 3·C), are `modulation` of the condition. They begin at 0: the norm without scale and bias,
    and a gate that is shut.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        scale, bias, gate = modulation.chunk(3, dim=-1)
        return torch.addcmul(bias, self.norm(x), 1.0 + scale), gate


class Block(nn.Module):
    """Attention among all steps, then a perceptron on each. (B, H, C), two modulations (B, 1 or H, 3·C) → (B, H, C)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = AdaptiveNorm(C), AdaptiveNorm(C)
        self.qkv, self.project = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, config.mlp_ratio * C), nn.GELU(approximate='tanh'),
                                 nn.Linear(config.mlp_ratio * C, C))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        B, H, C = x.shape
        h, gate = self.norm1(x, first)
        q, k, v = self.qkv(h).view(B, H, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, H, C/heads) each
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, C)
        x = x + gate * self.dropout(self.project(h))
        h, gate = self.norm2(x, second)
        return x + gate * self.dropout(self.mlp(h))


class Transformer(nn.Module):
    """x (B, H, D), t (B,) or (B, H) or None, condition (B, K) → (B, H, D)."""

    def __init__(self, action_size: int, condition_size: int, horizon: int, config: TransformerConfig, time: bool):
        super().__init__()
        C = config.width
        self.time = nn.Sequential(TimeEmbedding(config.time_size, nn.SiLU()), nn.Linear(config.time_size, C)) if time else None
        self.observation = nn.Sequential(nn.Linear(condition_size, C), nn.SiLU(), nn.Linear(C, C))
        self.embed = nn.Linear(action_size, C)
        self.position = nn.Parameter(0.02 * torch.randn(1, horizon, C))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(C, elementwise_affine=False)
        self.modulation = nn.Linear(C, 2 * C)
        self.last = nn.Linear(C, action_size)
        for layer in (self.modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor | None, condition: Tensor) -> Tensor:
        return self.body(x, self.modulate(t, condition))

    def modulate(self, t: Tensor | None, condition: Tensor) -> Tensor:
        """All that the network computes from time and condition alone: of all norms, side by side. (B, 1 or H, M)."""
        c = self.observation(condition)[:, None]                                    # (B, 1, C)
        if self.time is not None:
            c = c + self.time(t if t.ndim == 2 else t[:, None])                     # (B, 1 or H, C)
        c = F.silu(c)
        return torch.cat([layer(c) for layer in self.modulations], dim=-1)

    def body(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The rest. x (B, H, D), modulation (B, 1 or H, M) → (B, H, D)."""
        *of_norms, of_last = modulation.split([layer.out_features for layer in self.modulations], dim=-1)
        h = self.embed(x) + self.position
        for block, first, second in zip(self.blocks, of_norms[::2], of_norms[1::2]):
            h = block(h, first, second)
        scale, bias = of_last.chunk(2, dim=-1)
        return self.last(torch.addcmul(bias, self.norm(h), 1.0 + scale))

    @property
    def modulations(self) -> list[nn.Linear]:
        """What turns the condition into scales, biases and gates, in the order in which x meets them."""
        return [*(norm.modulation for block in self.blocks for norm in (block.norm1, block.norm2)), self.modulation]
