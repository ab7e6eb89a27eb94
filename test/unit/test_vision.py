from __future__ import annotations

import numpy as np
import pytest
import torch

from il_policies.policies import PolicyError
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.vision import ImageEncoder, VisionConfig, shifted, spatial_softmax
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
                           ({'shift': -1}, 'shift')):
        with pytest.raises(ValueError, match=message):
            VisionConfig(**wrong)
