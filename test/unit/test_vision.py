from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from safetensors.torch import save_file

from il_policies.policies import PolicyError
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.vision import (
    ImageEncoder,
    ImageTokens,
    ResNet18,
    VisionConfig,
    cropped,
    load_pretrained,
    recoloured,
    shifted,
    spatial_softmax,
)
from test_flow import SMALL, make_spec, unit_normalizer

TINY = VisionConfig(channels=(8,), keypoints=4, size=8)
SPEC = {'features': {'state': (2,), 'front': (24, 32, 3)}}


def pictures(n: int, T: int = 2, h: int = 24, w: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, T, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make_policy(kind, spec_changes=None, vision=TINY):
    torch.manual_seed(0)
    spec = make_spec(**{**SPEC, **(spec_changes or {})})
    lowdim = make_spec(features={'state': (2,)})
    return kind(spec, (FlowConfig if kind is Flow else BCConfig)(SMALL, vision=vision), unit_normalizer(lowdim)).eval()


def test_a_sharp_map_is_the_place_of_its_peak():
    maps = torch.zeros(1, 2, 5, 9)
    maps[0, 0, 4, 0] = maps[0, 1, 1, 6] = 100.0  # row, column
    torch.testing.assert_close(spatial_softmax(maps), torch.tensor([[-1.0, 0.5, 1.0, -0.5]]))


def test_a_flat_map_is_its_middle_and_others_are_the_mean_place():
    torch.testing.assert_close(spatial_softmax(torch.zeros(1, 1, 4, 6)), torch.zeros(1, 2))
    maps = torch.randn(3, 4, 6, 5)
    found = spatial_softmax(maps).numpy()
    for n in range(3):
        for k in range(4):
            weight = np.exp(maps[n, k].double().numpy())
            weight /= weight.sum()
            x = sum(weight[i, j] * (-1 + 2 * j / 4) for i in range(6) for j in range(5))
            y = sum(weight[i, j] * (-1 + 2 * i / 5) for i in range(6) for j in range(5))
            assert found[n, k] == pytest.approx(x, abs=1e-5) and found[n, 4 + k] == pytest.approx(y, abs=1e-5)


def test_shifts_are_whole_alike_within_a_window_and_repeat_the_edge():
    torch.manual_seed(0)
    images = pictures(40, h=10, w=12)
    moved, found = shifted(images, 2), set()
    assert moved.dtype == torch.uint8 and moved.shape == images.shape
    for window, result in zip(images.numpy(), moved.numpy()):
        padded = np.pad(window, ((0, 0), (2, 2), (2, 2), (0, 0)), mode='edge')
        places = [(y, x) for y in range(5) for x in range(5) if np.array_equal(padded[:, y:y + 10, x:x + 12], result)]
        assert len(places) == 1, 'one shift for both images of a window'
        found.add(places[0])
    assert {y for y, _ in found} == {x for _, x in found} == set(range(5)), 'every shift occurs'


def test_images_are_shifted_in_training_only_and_older_frames_are_not_seen():
    torch.manual_seed(0)
    encoder = ImageEncoder(TINY)
    images = pictures(3)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    seen = encoder(images)
    torch.testing.assert_close(seen, encoder(images))
    older = images.clone()
    older[:, 0] = 0
    torch.testing.assert_close(seen, encoder(older))
    both = ImageEncoder(VisionConfig(channels=(8,), keypoints=4, size=8, frames=2)).eval()
    assert both(images).shape == (3, 16) and seen.shape == (3, 8)
    assert not torch.equal(both(images), both(older))
    newest = both(torch.stack([images[:, 1], images[:, 1]], dim=1))
    torch.testing.assert_close(newest[:, :8], newest[:, 8:])


def test_a_policy_learns_what_only_the_image_shows():
    """A bright disc somewhere in the image; the chunk is where it is. Untrained the error is that of a guess."""
    torch.manual_seed(0)
    spec = make_spec(features={'state': (1,), 'front': (24, 24, 3)}, action_names=('x', 'y'), horizon=2, history=1)
    sizes = make_spec(features={'state': (1,)}, action_names=('x', 'y'))
    vision = VisionConfig(channels=(16,), keypoints=8, size=16, shift=0)
    policy = BC(spec, BCConfig(SMALL, vision), unit_normalizer(sizes))
    grid = torch.linspace(-1, 1, 24)

    def batch(n):
        place = torch.rand(n, 2) * 1.6 - 0.8
        disc = ((grid[None, None] - place[:, 0, None, None])**2 + (grid[None, :, None] - place[:, 1, None, None])**2) < 0.04
        image = (disc[..., None] * torch.tensor([40, 200, 80])).to(torch.uint8) + 20
        return {'observation': {'state': torch.zeros(n, 1, 1), 'front': image[:, None]},
                'action': place[:, None].expand(n, 2, 2), 'valid': torch.ones(n, 2, dtype=torch.bool)}

    def error():
        torch.manual_seed(1)
        test = batch(100)
        policy.eval()
        guess = policy.predict(test['observation'])
        policy.train()
        return (guess - test['action']).abs().mean()

    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    before = error()
    for _ in range(150):
        optimizer.zero_grad()
        policy.loss(batch(32))['loss'].backward()
        optimizer.step()
    assert error() < 0.1 < 0.3 < before


@pytest.mark.parametrize('kind', [Flow, BC])
def test_everything_seen_matters(kind):
    policy = make_policy(kind)
    observation = {'state': torch.randn(3, 2, 2), 'front': pictures(3)}
    batch = {'observation': observation, 'action': torch.randn(3, 8, 3), 'valid': torch.ones(3, 8, dtype=torch.bool)}
    policy.train().loss(batch)['loss'].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    policy.eval()
    noise = torch.randn(3, 8, 3)
    other = policy.predict({**observation, 'front': pictures(3, seed=1)}, noise=noise)
    assert not torch.equal(policy.predict(observation, noise=noise), other)


def test_images_alone_will_do():
    policy = make_policy(Flow, {'features': {'front': (24, 32, 3), 'wrist': (16, 16, 3)}})
    chunk = policy.predict({'front': pictures(2), 'wrist': pictures(2, h=16, w=16)}, noise=torch.zeros(2, 8, 3))
    assert chunk.shape == (2, 8, 3) and policy.condition_size == 16 and len(policy.encoders) == 2


def test_what_it_cannot_take_is_named():
    policy = make_policy(Flow)
    state = torch.zeros(1, 2, 2)
    with pytest.raises(PolicyError, match="'front' is torch.float32; images must be uint8"):
        policy.predict({'state': state, 'front': pictures(1).float()})
    with pytest.raises(PolicyError, match=r"'front' has shape \(1, 2, 24, 24, 3\), must be \(B, 2, 24, 32, 3\)"):
        policy.predict({'state': state, 'front': pictures(1, w=24)})
    with pytest.raises(PolicyError, match=r"cannot take features {'front': \(24, 32, 1\)}"):
        make_policy(Flow, {'features': {'state': (2,), 'front': (24, 32, 1)}})
    with pytest.raises(PolicyError, match='vision.frames is 3, must be at most the history, 2'):
        make_policy(Flow, vision=VisionConfig(frames=3))
    for wrong, message in (({'channels': (12,)}, 'multiples of groups'), ({'channels': ()}, 'channels'),
                           ({'shift': -1}, 'shift'), ({'crop': 0.0}, 'crop is 0.0'), ({'contrast': 1.5}, 'contrast 1.5'),
                           ({'norm': 'frozen_batch'}, "with network 'small'")):
        with pytest.raises(ValueError, match=message):
            VisionConfig(**wrong)


def resnet_weights() -> dict[str, torch.Tensor]:
    """Weights by a formula, under torchvision's names and with what else its files hold."""
    shapes = {'conv1.weight': (64, 3, 7, 7), 'bn1': 64, 'fc.weight': (1000, 512), 'fc.bias': (1000,)}
    for i, (a, b) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), start=1):
        shapes |= {f'layer{i}.0.conv1.weight': (b, a, 3, 3), f'layer{i}.0.bn1': b, f'layer{i}.0.conv2.weight': (b, b, 3, 3),
                   f'layer{i}.0.bn2': b, f'layer{i}.1.conv1.weight': (b, b, 3, 3), f'layer{i}.1.bn1': b,
                   f'layer{i}.1.conv2.weight': (b, b, 3, 3), f'layer{i}.1.bn2': b}
        if a != b:
            shapes |= {f'layer{i}.0.downsample.0.weight': (b, a, 1, 1), f'layer{i}.0.downsample.1': b}

    def numbers(name, shape):
        n = int(np.prod(shape))
        return torch.from_numpy(np.modf(np.sin(12.9898 * np.arange(n) + len(name)) * 43758.5453)[0].reshape(shape)).float()

    weights = {}
    for name, shape in shapes.items():
        if isinstance(shape, tuple):
            fan = int(np.prod(shape[1:])) if len(shape) > 1 else 1
            weights[name] = numbers(name, shape) * (6 / fan) ** 0.5
        else:
            for part, about, spread in (('weight', 1.0, 0.2), ('bias', 0.0, 0.1), ('running_mean', 0.0, 0.1),
                                        ('running_var', 1.5, 0.5)):
                weights[f'{name}.{part}'] = about + spread * numbers(f'{name}.{part}', (shape,))
            weights[f'{name}.num_batches_tracked'] = torch.tensor(7)
    return weights


def test_resnet18_is_torchvisions(tmp_path):
    """The numbers at the end are those of torchvision 0.28's resnet18 with these weights, without avgpool and fc."""
    file = tmp_path / 'resnet18.safetensors'
    save_file(resnet_weights(), file)
    network = ResNet18('frozen_batch').train()  # frozen in training too
    network.load_pretrained(file)
    x = torch.sin(0.013 * torch.arange(2 * 3 * 70 * 90)).reshape(2, 3, 70, 90)
    with torch.no_grad():
        maps = network(x)
    assert maps.shape == (2, 512, 3, 3) == (2, 512, *VisionConfig(network='resnet18').map_shape(70, 90))
    found = torch.stack([maps.mean(), maps.std(), *maps[0, :4, 1, 1], *maps[1, 300:304, 2, 0]])
    expected = torch.tensor([0.458519, 0.55769, 1.178937, 0.752908, 0.03346, 0.0, 0.096853, 0.108709, 1.806616, 0.303662])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in network.named_parameters() if 'bn' in name or 'downsample.1' in name], 'nothing to train'


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / 'w.pth'
    with pytest.raises(ValueError, match='w.pth: no weights can be read'):
        ResNet18('frozen_batch').load_pretrained(file)
    torch.save({'conv1.weight': Attack(tmp_path / 'canary')}, file)
    with pytest.raises(ValueError, match='w.pth: no weights can be read: .*; must be safetensors'):
        ResNet18('frozen_batch').load_pretrained(file)
    assert not (tmp_path / 'canary').exists(), 'a file of weights runs no code'
    save_file({'conv1.weight': torch.zeros(64, 3, 7, 7)}, file)
    with pytest.raises(ValueError, match='w.pth: is no resnet18: .*bn1.weight'):
        ResNet18('frozen_batch').load_pretrained(file)
    with pytest.raises(ValueError, match='need norm frozen_batch; it is group'):
        ResNet18('group').load_pretrained(file)
    with pytest.raises(ValueError, match='for network resnet18; it is small'):
        load_pretrained([ImageEncoder(TINY)], file)
    with pytest.raises(ValueError, match='w.pth: pretrained weights are for images; it sees none'):
        load_pretrained([], file)


def test_resnet18_from_scratch_is_trained_whole():
    torch.manual_seed(0)
    encoder = ImageEncoder(VisionConfig(network='resnet18', keypoints=4, size=8))
    out = encoder(pictures(2, h=40, w=64))
    out.square().sum().backward()
    assert out.shape == (2, 8) and not list(encoder.maps[0].buffers())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    encoder.eval()
    images = pictures(3, h=40, w=64)
    torch.testing.assert_close(encoder(images)[1:2], encoder(images[1:2]), rtol=1e-4, atol=1e-5)


def test_tokens_are_the_places_of_the_maps_row_by_row():
    torch.manual_seed(0)
    tokens = ImageTokens(VisionConfig(channels=(8, 16), frames=2), (24, 31), 12).eval()
    images = pictures(3, h=24, w=31)
    found = tokens(images).view(3, 2, *tokens.shape, 12)
    assert tokens.shape == (6, 8) and tokens(images).shape == (3, tokens.size)
    maps = tokens.features(images).view(3, 2, 12, 6, 8)
    torch.testing.assert_close(found[2, 1, 4, 7], maps[2, 1, :, 4, 7])


def test_crops_are_in_the_middle_or_anywhere_alike_within_a_window():
    torch.manual_seed(0)
    images, found = pictures(80, h=10, w=12), set()
    torch.testing.assert_close(cropped(images, 8, 8, random=False), images[:, :, 1:9, 2:10])
    for window, result in zip(images, cropped(images, 8, 9, random=True)):
        places = [(y, x) for y in range(3) for x in range(4) if torch.equal(window[:, y:y + 8, x:x + 9], result)]
        assert len(places) == 1, 'one place for both images of a window'
        found.add(places[0])
    assert found == {(y, x) for y in range(3) for x in range(4)}, 'every place occurs'
    encoder = ImageEncoder(VisionConfig(channels=(8,), keypoints=4, size=8, crop=0.75, shift=0))
    assert encoder.config.cropped_shape(24, 32) == (18, 24)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    other = images.clone()
    other[:, :, :1] = other[:, :, :, -1:] = 0
    torch.testing.assert_close(encoder(images), encoder(other))


@pytest.mark.parametrize('factors', [(0.6, 1.0, 1.0), (1.5, 1.0, 1.0), (1.0, 0.5, 1.0), (1.0, 1.7, 1.0), (1.0, 1.0, 0.2),
                                     (1.0, 1.0, 1.9), (1.2, 0.8, 1.3)])
def test_colours_change_as_in_pillow(factors):
    """Which rounds to whole levels after each of the three."""
    images = pictures(2, T=1)
    mine = recoloured(images.float(), *(torch.tensor([1.0, factor]) for factor in factors))
    torch.testing.assert_close(mine[0], images[0].float(), msg='factors of 1 change nothing')
    expected = Image.fromarray(images[1, 0].numpy())
    for kind, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        expected = kind(expected).enhance(factor)
    np.testing.assert_allclose(mine[1, 0].numpy(), np.asarray(expected, np.float32), atol=3.0)


def test_colours_change_in_training_only():
    torch.manual_seed(0)
    encoder, images = ImageEncoder(VisionConfig(channels=(8,), keypoints=4, size=8, shift=0, brightness=0.3)), pictures(3)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))
