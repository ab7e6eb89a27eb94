from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from il_policies import checkpoint
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.diffusion import Diffusion, DiffusionConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.transformer import AdaptiveNorm, Block, Transformer, TransformerConfig
from il_policies.policies.vision import VisionConfig
from test_flow import make_spec, unit_normalizer

SMALL = TransformerConfig(width=32, layers=2, heads=4, time_size=16)


def make_net(time: bool = True, horizon: int = 9) -> Transformer:
    """A network past its initialisation, at which nothing matters yet."""
    torch.manual_seed(0)
    net = Transformer(3, 7, horizon, SMALL, time)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


@pytest.mark.parametrize('time', ['one', 'per step', 'none'])
def test_shapes_and_that_everything_matters(time):
    net = make_net(time != 'none')
    x, condition = torch.randn(5, 9, 3, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    t = {'one': torch.rand(5, requires_grad=True), 'per step': torch.rand(5, 9, requires_grad=True), 'none': None}[time]
    y = net(x, t, condition)
    assert y.shape == x.shape
    y[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert x.grad[0].abs().min() > 0 and condition.grad[0].abs().min() > 0
    assert x.grad[1:].abs().max() == 0, 'samples of a batch must not mix'
    if t is not None:
        assert t.grad[0].abs().min() > 0 and t.grad[1:].abs().max() == 0


def test_one_time_is_the_same_time_for_all_steps():
    net, x, condition, t = make_net(), torch.randn(4, 9, 3), torch.randn(4, 7), torch.rand(4)
    torch.testing.assert_close(net(x, t, condition), net(x, t[:, None].expand(4, 9), condition))
    assert (net(x, t, condition) - net(x, torch.rand(4, 9), condition)).abs().max() > 1e-2


def test_steps_have_places():
    """Steps in another order do not give the same in that order, as they would without positions."""
    net, x, condition, t = make_net(), torch.randn(4, 9, 3), torch.randn(4, 7), torch.rand(4)
    assert (net(x, t, condition).flip(1) - net(x.flip(1), t, condition)).abs().max() > 1e-2
    nn.init.zeros_(net.position)
    torch.testing.assert_close(net(x, t, condition).flip(1), net(x.flip(1), t, condition), rtol=1e-4, atol=1e-5)


def test_block_is_torchs_with_its_gates_open():
    torch.manual_seed(0)
    block = Block(SMALL)
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, lambda x: F.gelu(x, approximate='tanh'), batch_first=True,
                                        norm_first=True)
    with torch.no_grad():
        for norm in (block.norm1, block.norm2):
            norm.modulation.bias[64:] = 1.0
        for mine, other in ((block.qkv.weight, theirs.self_attn.in_proj_weight), (block.qkv.bias, theirs.self_attn.in_proj_bias),
                            (block.project.weight, theirs.self_attn.out_proj.weight),
                            (block.project.bias, theirs.self_attn.out_proj.bias),
                            (block.mlp[0].weight, theirs.linear1.weight), (block.mlp[0].bias, theirs.linear1.bias),
                            (block.mlp[2].weight, theirs.linear2.weight), (block.mlp[2].bias, theirs.linear2.bias)):
            mine.copy_(other)
    x, c = torch.randn(3, 9, 32), torch.randn(3, 1, 32)
    torch.testing.assert_close(block(x, block.norm1.modulation(c), block.norm2.modulation(c)), theirs(x), rtol=1e-4, atol=1e-5)


def test_adaptive_norm_scales_and_shifts():
    norm = AdaptiveNorm(2)
    with torch.no_grad():
        norm.modulation.bias.copy_(torch.tensor([1.0, 0.0, 0.5, -0.5, 0.25, 0.75]))
    y, gate = norm(torch.tensor([[[3.0, 7.0]]]), norm.modulation(torch.zeros(1, 1, 2)))
    torch.testing.assert_close(y, torch.tensor([[[2 * -1 + 0.5, 1 - 0.5]]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(gate, torch.tensor([[[0.25, 0.75]]]))


def test_it_begins_as_zero_and_learns_from_there():
    """Gradients reach all of it within a few steps, though gates and output begin shut."""
    torch.manual_seed(0)
    net = Transformer(3, 7, 8, SMALL, True)
    x, condition, t = torch.randn(64, 8, 3), torch.randn(64, 7), torch.rand(64)
    assert net(x, t, condition).abs().max() == 0
    target = x * condition[:, None, :1] + t[:, None, None]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        loss = F.mse_loss(net(x, t, condition), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * target.var()


@pytest.mark.parametrize('cameras', [0, 2])
@pytest.mark.parametrize(('kind', 'config'), [(BC, BCConfig), (Diffusion, DiffusionConfig), (Flow, FlowConfig)])
def test_every_policy_takes_it_with_any_cameras(kind, config, cameras, tmp_path):
    """A horizon that the U-Net could not halve; every camera counts; saved and loaded it is the same policy."""
    images = {f'camera{i}': (16, 16, 3) for i in range(cameras)}
    spec = make_spec(features={'state': (2,), **images}, horizon=9, history=3)
    torch.manual_seed(0)
    policy = kind(spec, config(backbone='transformer', transformer=SMALL, vision=VisionConfig((8,), 8, 16, frames=2)),
                  unit_normalizer(make_spec()))
    for p in policy.net.parameters():
        nn.init.normal_(p, std=0.1)
    observation = {'state': torch.rand(4, 3, 2),
                   **{name: torch.randint(0, 256, (4, 3, *shape), dtype=torch.uint8) for name, shape in images.items()}}
    valid = torch.arange(9)[None] < torch.tensor([9, 1, 4, 6])[:, None]
    policy.loss({'observation': observation, 'action': torch.randn(4, 9, 3), 'valid': valid})['loss'].backward()
    assert len(policy.encoders) == cameras and all(p.grad.abs().sum() > 0 for p in policy.encoders.parameters())
    checkpoint.save(tmp_path / 'policy', policy, {})
    noise = torch.randn(4, 9, 3)
    chunk = policy.eval().predict(observation, noise=noise)
    assert chunk.shape == (4, 9, 3)
    torch.testing.assert_close(checkpoint.load(tmp_path / 'policy').predict(observation, noise=noise), chunk)


@pytest.mark.parametrize(('wrong', 'message'), [({'width': 30}, 'width 30 must be a positive multiple of heads, 4'),
                                                ({'layers': 0}, 'layers is 0'), ({'time_size': 5}, 'time_size is 5'),
                                                ({'dropout': 1.0}, r'dropout is 1.0, must be in \[0, 1\)')])
def test_config_is_validated(wrong, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**wrong)
