"""Images → features: a small convolutional network, or ResNet-18, whose output is where in the image things are.

Convolutions end in maps; the spatial softmax turns each map into the one point at which it is highest on average (Levine
et al., 2016, https://arxiv.org/abs/1504.00702). A transformer takes the places of the maps as tokens instead. ResNet-18
(He et al., 2016, https://arxiv.org/abs/1512.03385) is trained from scratch with group normalisation, as Diffusion Policy
does (https://arxiv.org/abs/2303.04137), or begins from weights of ImageNet, whose batch normalisation is then frozen.
Random shifts or crops (Yarats et al., 2021, https://arxiv.org/abs/2004.13649) and colours keep few demonstrations from
being learnt by heart.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in the grey of a colour (ITU-R BT.601)."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What ResNet's weights of ImageNet were trained on, of RGB in [0, 1]."""


@dataclass(frozen=True)
class VisionConfig:
    """Size of the network that looks at one camera."""

    channels: tuple[int, ...] = (16, 32)
    """Small network: channels of each level; every level halves height and width."""
    keypoints: int = 32
    """Maps at the end, and so points found in an image."""
    size: int = 64
    """Numbers handed on for each image."""
    frames: int = 1
    """Newest images looked at, at most the policy's history. One will do where joint positions tell the motion."""
    shift: int = 4
    """Training images are shifted by up to this in both directions [px]."""
    groups: int = 8
    """Small network: groups of the group normalisation; divides every number of channels."""
    network: Literal['small', 'resnet18'] = 'small'
    """The convolutions; resnet18 is for a GPU."""
    norm: Literal['group', 'frozen_batch'] = 'group'
    """resnet18: group normalisation from scratch, or the frozen batch normalisation of pretrained weights."""
    crop: float = 1.0
    """Part of height and width that is looked at: at a random place in training, else in the middle. 1: all."""
    brightness: float = 0.0
    """Training images are brightened by a factor in [1 - this, 1 + this]."""
    contrast: float = 0.0
    """The same for the distance from the image's mean grey."""
    saturation: float = 0.0
    """The same for the distance of each pixel from its own grey."""

    def __post_init__(self):
        if not self.channels or any(n < 1 or n % self.groups for n in self.channels):
            raise ValueError(f'channels {list(self.channels)} must be positive multiples of groups, {self.groups}')
        if min(self.keypoints, self.size, self.frames) < 1 or self.shift < 0:
            raise ValueError(f'keypoints {self.keypoints}, size {self.size} and frames {self.frames} must be at least 1, '
                             f'shift {self.shift} at least 0')
        if self.norm != 'group' and self.network != 'resnet18':
            raise ValueError(f'norm is {self.norm!r} with network {self.network!r}, which knows group; '
                             'frozen_batch is for resnet18')
        if not 0.0 < self.crop <= 1.0:
            raise ValueError(f'crop is {self.crop}, must be above 0 and at most 1')
        colours = {name: getattr(self, name) for name in ('brightness', 'contrast', 'saturation')}
        if not all(0.0 <= value <= 1.0 for value in colours.values()):
            raise ValueError(f'{", ".join(f"{name} {value}" for name, value in colours.items())} must be from 0 to 1')

    def map_shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the maps that images (height, width) become."""
        halvings = 5 if self.network == 'resnet18' else len(self.channels)
        return tuple(-(-n // 2**halvings) for n in self.cropped_shape(height, width))

    def cropped_shape(self, height: int, width: int) -> tuple[int, int]:
        """What is looked at of images (height, width) [px]."""
        return max(1, round(self.crop * height)), max(1, round(self.crop * width))


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored numbers that training leaves as they are: small batches would spoil them."""

    def __init__(self, channels: int):
        super().__init__()
        for name, value in (('weight', 1.0), ('bias', 0.0), ('running_mean', 0.0), ('running_var', 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


def _norm(kind: str, channels: int) -> nn.Module:
    # 16 channels a group, as in Diffusion Policy.
    return FrozenBatchNorm(channels) if kind == 'frozen_batch' else nn.GroupNorm(channels // 16, channels)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a residual path. (N, in, h, w) → (N, out, h / stride, w / stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = _norm(norm, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = _norm(norm, channels_out)
        self.downsample = None if stride == 1 else nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), _norm(norm, channels_out))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + skip).relu()


class ResNet18(nn.Module):
    """ResNet-18 up to its last maps: (N, 3, h, w) → (N, 512, h / 32, w / 32), rounded up.

    Parameters are named as torchvision's, whichever the normalisation.
    """

    CHANNELS = 512

    def __init__(self, norm: Literal['group', 'frozen_batch']):
        super().__init__()
        self.norm = norm
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = _norm(norm, 64)
        for i, (a, b) in enumerate(zip((64, 64, 128, 256), (64, 128, 256, 512)), start=1):
            self.add_module(f'layer{i}', nn.Sequential(BasicBlock(a, b, 1 if a == b else 2, norm), BasicBlock(b, b, 1, norm)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def load_pretrained(self, file: str | Path) -> None:
        """Take the weights of torchvision's resnet18 from a safetensors file; its classifier is left out.

        Raises ValueError for group normalisation, which these weights do not fit, a file that cannot be read, or one that
        holds another network.
        """
        file = Path(file)
        if self.norm != 'frozen_batch':
            raise ValueError(f'{file}: weights of ImageNet need norm frozen_batch; it is {self.norm}')
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f'{file}: no weights can be read: {error}; must be safetensors (a .pth, which is a pickle: load it '
                             'where you trust it, and save it with safetensors.torch.save_file)') from None
        weights = {name: value for name, value in weights.items()
                   if not name.startswith('fc.') and not name.endswith('.num_batches_tracked')}
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f'{file}: is no resnet18: {" ".join(str(error).split())[:300]}') from None


class Camera(nn.Module):
    """What looks at images of one camera: augmentation in training, then convolutions whose maps a subclass uses.

    `features` gives (B·T, maps, h', w') for the T = `frames` newest of images (B, To, h, w, 3) uint8 RGB.
    """

    def __init__(self, config: VisionConfig, maps: int):
        super().__init__()
        self.config = config
        if config.network == 'resnet18':
            layers: list[nn.Module] = [ResNet18(config.norm)]
            last = ResNet18.CHANNELS
        else:
            layers = []
            for i, (a, b) in enumerate(zip((3, *config.channels), config.channels)):
                kernel = 5 if i == 0 else 3
                layers += [nn.Conv2d(a, b, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(config.groups, b), nn.SiLU()]
            last = config.channels[-1]
            layers += [nn.Conv2d(last, last, 3, padding=1), nn.GroupNorm(config.groups, last), nn.SiLU()]
        self.maps = nn.Sequential(*layers, nn.Conv2d(last, maps, 1))
        imagenet = config.norm == 'frozen_batch'
        self.register_buffer('mean', 255.0 * torch.tensor(IMAGENET_MEAN if imagenet else [0.5] * 3), persistent=False)
        self.register_buffer('deviation', 255.0 * torch.tensor(IMAGENET_STD if imagenet else [0.5] * 3), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        config = self.config
        images = images[:, -config.frames:]
        if self.training and config.shift:
            images = shifted(images, config.shift)
        if config.crop < 1.0:
            images = cropped(images, *config.cropped_shape(*images.shape[2:4]), random=self.training)
        x = images.float()
        strengths = config.brightness, config.contrast, config.saturation
        if self.training and any(strengths):
            factors = [1.0 + strength * (2.0 * torch.rand(len(x), device=x.device) - 1.0) for strength in strengths]
            x = recoloured(x, *factors)
        x = (x - self.mean) / self.deviation
        # Rows, columns, channels is torch's channels-last layout: no copy is made.
        return self.maps(x.flatten(0, 1).permute(0, 3, 1, 2))


class ImageEncoder(Camera):
    """Images of one camera, (B, T, h, w, 3) uint8 RGB → (B, frames·size), from the newest frames."""

    def __init__(self, config: VisionConfig):
        super().__init__(config, config.keypoints)
        self.project = nn.Linear(2 * config.keypoints, config.size)

    @property
    def size(self) -> int:
        """Length of the output."""
        return self.config.frames * self.config.size

    def forward(self, images: Tensor) -> Tensor:
        return self.project(spatial_softmax(self.features(images))).view(images.shape[0], self.size)


class ImageTokens(Camera):
    """Images of one camera, (B, T, h, w, 3) uint8 RGB → (B, frames·h'·w'·width): each place of the maps is a token.

    Flat, so that every encoder gives a vector; frame by frame, row by row.
    """

    def __init__(self, config: VisionConfig, shape: tuple[int, int], width: int):
        """shape: height and width of the images [px]. width: length of a token."""
        super().__init__(config, width)
        self.width = width
        self.shape = config.map_shape(*shape)
        """Height and width of the maps."""
        self.frame = nn.Parameter(torch.zeros(config.frames, 1, width))  # tells older frames from newer ones

    @property
    def size(self) -> int:
        """Length of the output."""
        return self.config.frames * self.shape[0] * self.shape[1] * self.width

    def forward(self, images: Tensor) -> Tensor:
        maps = self.features(images)
        tokens = maps.flatten(2).transpose(1, 2)  # (B·T, h'·w', width)
        return (tokens.unflatten(0, (-1, self.config.frames)) + self.frame).flatten(1)


def load_pretrained(encoders: Iterable[Camera], file: str | Path) -> None:
    """Begin all encoders, which must be of `network` resnet18, from a file of torchvision's weights. Raises ValueError."""
    encoders = list(encoders)
    if not encoders:
        raise ValueError(f'{file}: pretrained weights are for images; it sees none')
    for encoder in encoders:
        if encoder.config.network != 'resnet18':
            raise ValueError(f'{file}: pretrained weights are for network resnet18; it is {encoder.config.network}')
        encoder.maps[0].load_pretrained(file)


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
    down, right = torch.randint(-most, most + 1, (B, 2), device=images.device).split(1, dim=1)
    rows = (torch.arange(h, device=images.device) - down).clamp(0, h - 1)      # (B, h)
    columns = (torch.arange(w, device=images.device) - right).clamp(0, w - 1)  # (B, w)
    return _gathered(images, rows, columns)


def cropped(images: Tensor, height: int, width: int, random: bool) -> Tensor:
    """Parts (height, width) of images (B, T, h, w, 3): from the middle, or each of the B from its own random place."""
    h, w = images.shape[2:4]
    if not random:
        top, left = (h - height) // 2, (w - width) // 2
        return images[:, :, top:top + height, left:left + width]
    device = images.device
    top = torch.randint(0, h - height + 1, (len(images), 1), device=device)
    left = torch.randint(0, w - width + 1, (len(images), 1), device=device)
    return _gathered(images, top + torch.arange(height, device=device), left + torch.arange(width, device=device))


def _gathered(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows (B, h') and columns (B, w') of images (B, T, h, w, 3), each of the B its own."""
    b, t = (torch.arange(n, device=images.device) for n in images.shape[:2])
    return images[b[:, None, None, None], t[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def recoloured(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Images (B, T, h, w, 3) in [0, 255] with changed brightness, contrast and saturation, in this order.

    Each of the B has its own factors (B,); 1 changes nothing. Contrast is about the mean grey of each image.
    """
    luma = torch.tensor(LUMA, device=images.device)

    def scaled(x: Tensor, about: Tensor | float, factor: Tensor) -> Tensor:
        return (about + factor[:, None, None, None, None] * (x - about)).clamp(0.0, 255.0)

    x = scaled(images, 0.0, brightness)
    x = scaled(x, (x @ luma).mean(dim=(2, 3), keepdim=True).unsqueeze(-1), contrast)
    return scaled(x, (x @ luma).unsqueeze(-1), saturation)
