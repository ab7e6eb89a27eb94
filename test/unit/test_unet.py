from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from il_policies.policies.unet import TIME_SCALE, Block, Conv, GroupNorm, TimeEmbedding, UNet, UNetConfig, Upsample


@pytest.mark.parametrize(('kernel_size', 'stride'), [(5, 1), (3, 2), (1, 1)])
def test_conv_is_torchs_convolution(kernel_size, stride):
    torch.manual_seed(0)
    conv = Conv(4, 6, kernel_size, stride)
    x = torch.randn(3, 8, 4)
    weight = conv.linear.weight.view(6, kernel_size, 4).transpose(1, 2)
    expected = F.conv1d(x.transpose(1, 2), weight, conv.linear.bias, stride=stride, padding=kernel_size // 2)
    torch.testing.assert_close(conv(x), expected.transpose(1, 2))


def test_upsampling_is_a_transposed_convolution():
    """With the outer taps it does not have set to 0, it is torch's, of 4 taps and stride 2."""
    torch.manual_seed(0)
    upsample = Upsample(4, 6)
    kernel, bias = torch.randn(4, 6, 4), torch.randn(6)
    weight = torch.zeros(2, 6, 3, 4)                 # (even or odd step, out, tap: before, here, after, in)
    weight[0, :, 0], weight[0, :, 1] = kernel[:, :, 3].T, kernel[:, :, 1].T
    weight[1, :, 1], weight[1, :, 2] = kernel[:, :, 2].T, kernel[:, :, 0].T
    with torch.no_grad():
        upsample.conv.linear.weight.copy_(weight.reshape(12, 12))
        upsample.conv.linear.bias.copy_(bias.repeat(2))
    x = torch.randn(3, 8, 4)
    expected = F.conv_transpose1d(x.transpose(1, 2), kernel, bias, stride=2, padding=1).transpose(1, 2)
    torch.testing.assert_close(upsample(x), expected)


def test_group_norm_is_torchs():
    x = torch.randn(3, 8, 16)
    torch.testing.assert_close(GroupNorm(4, 16)(x), F.group_norm(x.transpose(1, 2), 4).transpose(1, 2))


def test_time_embedding_resolves_the_unit_interval():
    """Neighbouring flow times differ, as they would not if t were not scaled before the sinusoid."""
    torch.manual_seed(0)
    embedding = TimeEmbedding(64, torch.nn.SiLU())
    e = embedding(torch.tensor([0.50, 0.51]))
    assert (e[0] - e[1]).norm() > 0.1 * e[0].norm()


def test_time_embedding_of_a_diffusion_step_is_the_sinusoid_of_the_integer():
    """Entry by entry, and in bfloat16 too: its steps would be 4 apart at 1000."""
    embedding = TimeEmbedding(8, torch.nn.SiLU())
    embedding.mlp = torch.nn.Sequential(torch.nn.Linear(8, 8))
    torch.nn.init.eye_(embedding.mlp[0].weight)
    torch.nn.init.zeros_(embedding.mlp[0].bias)
    k = torch.tensor([[0, 1, 99], [500, 998, 999]])
    expected = [[[f(step * 10000 ** (-i / 3)) for f in (math.sin, math.cos) for i in range(4)] for step in row]
                for row in k.tolist()]
    torch.testing.assert_close(embedding(k / TIME_SCALE), torch.tensor(expected), rtol=0, atol=2e-4)
    coarse = embedding.to(torch.bfloat16)(k / TIME_SCALE)
    torch.testing.assert_close(coarse.float(), torch.tensor(expected), rtol=0, atol=1e-2)


def test_block_is_the_published_one():
    torch.manual_seed(0)
    block = Block(4, 16, 6, UNetConfig((16,)), torch.nn.Mish())
    x, condition = torch.randn(3, 8, 4), torch.randn(3, 6)
    weight = block.conv1.linear.weight.view(16, 5, 4).transpose(1, 2), block.conv2.linear.weight.view(16, 5, 16).transpose(1, 2)

    def convolved(x, i):
        y = F.conv1d(x, weight[i], (block.conv1, block.conv2)[i].linear.bias, padding=2)
        return F.mish(F.group_norm(y, 8))

    scale, bias = (condition @ block.film.weight.T + block.film.bias)[..., None].split(16, dim=1)
    expected = convolved(convolved(x.transpose(1, 2), 0) * (1 + scale) + bias, 1).transpose(1, 2)
    expected = expected + x @ block.residual.weight.T + block.residual.bias
    torch.testing.assert_close(block(x, block.modulate(condition)[:, None]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('blocks', [1, 2])
def test_each_block_gets_its_own_modulation(blocks):
    """Though those of all blocks are passed on side by side."""
    torch.manual_seed(0)
    net = UNet(3, 7, 8, UNetConfig((8, 16), blocks=blocks), True)
    x, t, condition = torch.randn(2, 8, 3), torch.rand(2), torch.randn(2, 7)
    seen = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda block, inputs: seen.append((block, inputs[1])))
    net(x, t, condition)
    assert [block for block, _ in seen] == net.blocks and len(seen) == 4 * blocks
    given = net.activation(torch.cat([net.time(t), condition], dim=-1))
    for block, modulation in seen:
        torch.testing.assert_close(modulation[:, 0], block.modulate(given), msg='of another block')


def test_names_and_shapes_in_checkpoints_stay():
    block = {'conv1.linear.weight': (8, 40), 'conv1.linear.bias': (8,), 'norm1.weight': (8,), 'norm1.bias': (8,),
             'film.weight': (16, 11), 'film.bias': (16,), 'conv2.linear.weight': (8, 40), 'conv2.linear.bias': (8,),
             'norm2.weight': (8,), 'norm2.bias': (8,)}
    expected = {'time.mlp.0.weight': (16, 4), 'time.mlp.0.bias': (16,), 'time.mlp.2.weight': (4, 16), 'time.mlp.2.bias': (4,),
                **{f'down.0.0.{name}': shape for name, shape in block.items()}, 'down.0.0.conv1.linear.weight': (8, 15),
                'down.0.0.residual.weight': (8, 3), 'down.0.0.residual.bias': (8,),
                **{f'bottom.0.{name}': shape for name, shape in block.items()},
                'last.0.linear.weight': (8, 40), 'last.0.linear.bias': (8,), 'last.1.weight': (8,), 'last.1.bias': (8,),
                'last.3.weight': (3, 8), 'last.3.bias': (3,)}
    net = UNet(3, 7, 8, UNetConfig((8,), time_size=4), True)
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == expected


@pytest.mark.parametrize('down_dims', [(16,), (16, 32), (16, 32, 64)])
@pytest.mark.parametrize('time', [True, False])
def test_shapes_and_that_everything_matters(down_dims, time):
    torch.manual_seed(0)
    net = UNet(3, 7, 16, UNetConfig(down_dims, blocks=2), time)
    x, condition = torch.randn(5, 16, 3, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    y = net(x, torch.rand(5) if time else None, condition)
    assert y.shape == x.shape
    y[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert x.grad[0].abs().min() > 0 and condition.grad[0].abs().min() > 0
    assert x.grad[1:].abs().max() == 0, 'samples of a batch must not mix'


def test_horizon_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match='horizon is 18.*multiple of 4, such as 20'):
        UNet(3, 7, 18, UNetConfig((16, 32, 64)), True)


@pytest.mark.parametrize(('wrong', 'message'), [({'down_dims': (30,)}, 'multiples of groups'),
                                                ({'kernel_size': 4}, 'odd'), ({'blocks': 0}, 'blocks')])
def test_config_is_validated(wrong, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**wrong)
