"""Images → features: a small convolutional network whose output is where in the image things are.

Convolutions with group normalisation end in maps; the spatial softmax turns each map into the one point at which it is
highest on average (Levine et al., 2016, https://arxiv.org/abs/1504.00702). Random shifts of the images in training keep
few demonstrations from being learnt by heart (Yarats et al., 2021, https://arxiv.org/abs/2004.13649). Trained from
scratch with the policy.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionConfig:
    """Size of the network that looks at one camera."""

    channels: tuple[int, ...] = (16, 32)
    """Channels of each level; every level halves height and width."""
    keypoints: int = 32
    """Maps at the end, and so points found in an image."""
    size: int = 64
    """Numbers handed on for each image."""
    frames: int = 1
    """Newest images looked at, at most the policy's history. One will do where joint positions tell the motion."""
    shift: int = 4
    """Training images are shifted by up to this in both directions [px]."""
    groups: int = 8
    """Groups of the group normalisation; divides every number of channels."""

    def __post_init__(self):
        if not self.channels or any(n < 1 or n % self.groups for n in self.channels):
            raise ValueError(f'channels {list(self.channels)} must be positive multiples of groups, {self.groups}')
        if min(self.keypoints, self.size, self.frames) < 1 or self.shift < 0:
            raise ValueError(f'keypoints {self.keypoints}, size {self.size} and frames {self.frames} must be at least 1, '
                             f'shift {self.shift} at least 0')


class ImageEncoder(nn.Module):
    """Images of one camera, (B, T, h, w, 3) uint8 RGB → (B, frames·size), from the newest frames."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip((3, *config.channels), config.channels)):
            kernel = 5 if i == 0 else 3
            layers += [nn.Conv2d(a, b, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(config.groups, b), nn.SiLU()]
        last = config.channels[-1]
        layers += [nn.Conv2d(last, last, 3, padding=1), nn.GroupNorm(config.groups, last), nn.SiLU(),
                   nn.Conv2d(last, config.keypoints, 1)]
        self.maps = nn.Sequential(*layers)
        self.project = nn.Linear(2 * config.keypoints, config.size)

    @property
    def size(self) -> int:
        """Length of the output."""
        return self.config.frames * self.config.size

    def forward(self, images: Tensor) -> Tensor:
        images = images[:, -self.config.frames:]
        if self.training and self.config.shift:
            images = shifted(images, self.config.shift)
        B, T = images.shape[:2]
        # Rows, columns, channels is torch's channels-last layout: no copy is made.
        x = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        return self.project(spatial_softmax(self.maps(x))).view(B, T * self.config.size)


def spatial_softmax(maps: Tensor) -> Tensor:
    """Mean position under the softmax of each map: (N, K, h, w) → (N, 2K), x of all maps then y, both in [-1, 1]."""
    N, K, h, w = maps.shape
    weight = maps.flatten(2).softmax(dim=-1).view(N, K, h, w)
    x = weight.sum(dim=2) @ torch.linspace(-1.0, 1.0, w, device=maps.device)
    y = weight.sum(dim=3) @ torch.linspace(-1.0, 1.0, h, device=maps.device)
    return torch.cat([x, y], dim=-1)


def shifted(images: Tensor, most: int) -> Tensor:
    """Images (B, T, h, w, 3), each of the B moved by its own whole numbers of pixels, up to `most` down and right.

    What moves in at an edge repeats the edge.
    """
    B, T, h, w, _ = images.shape
    down, right = torch.randint(-most, most + 1, (2, B, 1), device=images.device)
    rows = (torch.arange(h, device=images.device) - down).clamp(0, h - 1)      # (B, h)
    columns = (torch.arange(w, device=images.device) - right).clamp(0, w - 1)  # (B, w)
    b, t = torch.arange(B, device=images.device), torch.arange(T, device=images.device)
    return images[b[:, None, None, None], t[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]
