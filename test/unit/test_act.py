from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from il_policies import checkpoint
from il_policies.policies import PolicyError, PolicySpec
from il_policies.policies.act import ACT, ACTConfig, ACTNet, Attention, DecoderLayer, grid_sinusoid, kl_divergence
from il_policies.policies.guidance import Guidance
from il_policies.policies.normalize import Normalizer
from il_policies.policies.vision import VisionConfig
from test_flow import make_spec

TINY = ACTConfig(width=32, heads=4, feedforward=64, encoder_layers=2, vae_layers=2, latent=4, dropout=0.1,
                 vision=VisionConfig(channels=(8, 16), shift=2))


def statistics(spec: PolicySpec) -> Normalizer:
    sizes = {**{name: shape[0] for name, shape in spec.features.items() if len(shape) == 1}, 'action': len(spec.action_names)}
    return Normalizer({name: {'min': [-3.0] * n, 'max': [5.0] * n, 'mean': [1.0] * n, 'std': [2.0] * n}
                       for name, n in sizes.items()})


def make_act(spec_changes=None, **changes) -> ACT:
    torch.manual_seed(0)
    spec = make_spec(**(spec_changes or {}))
    return ACT(spec, dataclasses.replace(TINY, **changes), statistics(spec)).eval()


def make_batch(n: int = 5, **images) -> dict:
    generator = torch.Generator().manual_seed(1)
    observation = {'state': torch.randn(n, 2, 2, generator=generator)}
    for name, (h, w) in images.items():
        observation[name] = torch.randint(0, 256, (n, 2, h, w, 3), dtype=torch.uint8, generator=generator)
    valid = torch.arange(8) < torch.randint(1, 9, (n, 1), generator=generator)
    return {'observation': observation, 'action': torch.randn(n, 8, 3, generator=generator), 'valid': valid}


def test_divergence_from_the_standard_normal():
    assert kl_divergence(torch.tensor([[2.0]]), torch.tensor([[2 * math.log(0.5)]])).item() == pytest.approx(2.318, abs=5e-4)
    mean, log_variance = torch.randn(6, 4), torch.randn(6, 4)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)


def test_loss_is_the_absolute_error_of_valid_steps_and_the_weighted_divergence():
    act, batch = make_act(kl_weight=3.0), make_batch()
    torch.manual_seed(5)
    loss = act.loss(batch)
    torch.manual_seed(5)
    target, valid = (batch['action'] - 1.0) / 2.0, batch['valid']
    condition = act.condition(batch['observation'])
    mean, log_variance = act.vae(condition, target, valid)
    prediction = act.net(condition, torch.distributions.Normal(mean, (0.5 * log_variance).exp()).rsample())
    errors = torch.stack([(prediction[b, h] - target[b, h]).abs().mean() for b in range(5) for h in range(8) if valid[b, h]])
    torch.testing.assert_close(loss['l1'], errors.mean())
    torch.testing.assert_close(loss['kl'], kl_divergence(mean, log_variance).mean())
    torch.testing.assert_close(loss['loss'], loss['l1'] + 3.0 * loss['kl'])


def test_a_small_divergence_is_told_in_bfloat16_too():
    policy, batch = make_act(), make_batch()
    with torch.no_grad():
        policy.vae.out.weight.mul_(0.005)
        policy.vae.out.bias.zero_()
    exact = policy.loss(batch)['kl']
    with torch.autocast('cpu', torch.bfloat16):
        rounded = policy.loss(batch)['kl']
    assert rounded.dtype == torch.float32 and 0.0 < exact < 1e-3
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.0)


def test_padded_steps_change_nothing():
    act, batch = make_act(), make_batch()
    other = {**batch, 'action': torch.where(batch['valid'][..., None], batch['action'], 1e3)}
    assert not torch.equal(other['action'], batch['action'])
    losses = []
    for data in (batch, other):
        torch.manual_seed(2)
        losses.append(act.loss(data))
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name])
    seen = {**batch, 'action': batch['action'] + 0.5}
    assert not torch.isclose(act.loss(seen)['kl'], losses[0]['kl']), 'valid steps are looked at'


def test_attention_is_torchs():
    torch.manual_seed(0)
    attention, reference = Attention(TINY).eval(), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([attention.query.bias, attention.key.bias, attention.value.bias]))
        reference.out_proj.load_state_dict(attention.out.state_dict())
    x, memory, at, places = torch.randn(3, 5, 32), torch.randn(3, 7, 32), torch.randn(5, 32), torch.randn(7, 32)
    keep = torch.rand(3, 7) > 0.3
    keep[:, 0] = True
    expected = attention.norm(x + reference(x + at, memory + places, memory, key_padding_mask=~keep)[0])
    torch.testing.assert_close(attention(x, at, memory, places, keep), expected)
    expected = attention.norm(x + reference(x + at, x + at, x)[0])
    torch.testing.assert_close(attention(x, at), expected)


def test_queries_that_hold_nothing_get_one_constant_from_each_other():
    """Why the first decoder layer has no self-attention: DETR's gives the same for every query, whatever its position."""
    torch.manual_seed(0)
    attention = Attention(TINY).eval()
    found = attention(torch.zeros(2, 6, 32), torch.randn(6, 32))
    torch.testing.assert_close(found, found[:1, :1].expand(2, 6, 32))
    torch.testing.assert_close(found[0, 0], attention.norm(attention.out(attention.value.bias)))


@pytest.mark.parametrize('decoder_layers', [1, 2])
def test_the_shortcut_through_a_short_memory_gives_the_same(decoder_layers):
    """Training does without it, and without dropout is the plain computation: from 4 heads times 2 tokens to 24 steps."""
    act = make_act({'horizon': 24}, dropout=0.0, decoder_layers=decoder_layers)
    with torch.no_grad():
        for name, p in act.net.named_parameters():
            if 'norm' in name or 'bias' in name or name == 'start':
                p.add_(0.3 * torch.randn_like(p))  # which begin as 1 and 0
    given = torch.randn(5, act.condition_size), torch.randn(5, 4)
    shortcut, hits = DecoderLayer._from_few, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderLayer, '_from_few', lambda *arguments: hits.append(1) or shortcut(*arguments))
        few, plain = act.net(*given), act.train().net(*given)
    assert len(hits) == 1
    torch.testing.assert_close(few, plain, rtol=1e-4, atol=2e-6)


def test_size_of_the_paper():
    """By hand, for 14 joints and 100 steps: attention, feed-forward and two norms a layer; linear maps; learned tokens."""
    d, f, z, k, h = 512, 3200, 32, 14, 100
    layer = 4 * (d * d + d) + (d * f + f + f * d + d) + 2 * 2 * d
    vae = 4 * layer + d + 2 * (k * d + d) + (d * 2 * z + 2 * z)
    net = 5 * layer + (z * d + d) + (k * d + d) + 2 * d + h * d + d + 2 * d + (d * k + k)
    spec = make_spec(features={'state': (k,)}, action_names=tuple(map(str, range(k))), horizon=h, history=1)
    with torch.device('meta'):
        sizes = [sum(p.numel() for p in ACTNet(k, [], k, h, ACTConfig()).parameters())]
    sizes.append(sum(p.numel() for p in ACT(spec, ACTConfig(), statistics(spec)).vae.parameters()))
    assert sizes == [net, vae]


def test_places_of_an_image_are_told_apart_row_by_row():
    places = grid_sinusoid(3, 4, 32)
    assert places.shape == (12, 32)
    angle = 2 * math.pi * 2 / 3  # second of three rows, first of its frequencies; third of four columns
    torch.testing.assert_close(places[1 * 4 + 2, :2], torch.tensor([math.sin(angle), math.cos(angle)]))
    torch.testing.assert_close(places[6, 16:18], torch.tensor([math.sin(1.5 * math.pi), math.cos(1.5 * math.pi)]))
    assert torch.cdist(places, places).add(torch.eye(12) * 9).min() > 0.1


def test_zero_latent_is_deterministic_and_a_drawn_one_comes_from_the_noise():
    observation = make_batch()['observation']
    noise = torch.randn(5, 8, 3)
    zero, normal = make_act(), make_act(latent_sampling='normal')
    torch.testing.assert_close(zero.predict(observation), zero.predict(observation, noise=noise))
    first = normal.predict(observation, noise=noise)
    torch.testing.assert_close(first, normal.predict(observation, noise=noise))
    condition = normal.condition(observation)
    z = torch.stack([noise[:, 0, 0], noise[:, 0, 1], noise[:, 0, 2], noise[:, 1, 0]], dim=-1)
    torch.testing.assert_close(first, 2.0 * normal.net(condition, z) + 1.0, msg='raw units of mean 1 and deviation 2')
    assert not torch.allclose(first, normal.predict(observation)), 'drawn'


@pytest.mark.parametrize('images', [{}, {'front': (24, 32), 'wrist': (17, 20)}])
def test_a_chunk_does_not_depend_on_its_batch(images):
    features = {'state': (2,), **{name: (*shape, 3) for name, shape in images.items()}}
    act, observation = make_act({'features': features}), make_batch(**images)['observation']
    together = act.predict(observation)
    for b in range(5):
        alone = act.predict({name: value[b:b + 1] for name, value in observation.items()})
        torch.testing.assert_close(together[b:b + 1], alone, rtol=1e-4, atol=1e-5)


def test_everything_learns_from_what_is_seen():
    vision = VisionConfig(channels=(8, 16), shift=2, frames=2)
    act = make_act({'features': {'state': (2,), 'front': (24, 32, 3)}}, decoder_layers=2, vision=vision).train()
    batch = make_batch(front=(24, 32))
    act.loss(batch)['loss'].backward()
    # A bias of keys adds the same to all that a query compares, which the softmax takes out again.
    still = [name for name, p in act.named_parameters() if p.grad is None or p.grad.abs().sum() == 0.0]
    assert [name for name in still if not name.endswith('key.bias')] == []
    act.eval()
    before = act.predict(batch['observation'])
    for name, value in batch['observation'].items():
        assert not torch.allclose(act.predict({**batch['observation'], name: value.flip(0)}), before), name


def test_images_alone_will_do():
    act = make_act({'features': {'front': (24, 32, 3)}})
    batch = make_batch(front=(24, 32))
    batch['observation'].pop('state')
    assert act.predict(batch['observation']).shape == (5, 8, 3)
    assert act.loss(batch)['loss'].isfinite()


def test_two_ways_are_told_apart_by_the_latent():
    """The same observation, chunks of all +1 or all -1: whoever predicts one chunk errs by 1, the latent says which."""
    torch.manual_seed(0)
    spec = make_spec()
    normalizer = Normalizer({name: {'min': [-1.0] * n, 'max': [1.0] * n, 'mean': [0.0] * n, 'std': [1.0] * n}
                             for name, n in (('state', 2), ('action', 3))})
    config = dataclasses.replace(TINY, vae_layers=1, encoder_layers=1, kl_weight=0.02, dropout=0.0, latent_sampling='normal')
    act = ACT(spec, config, normalizer)
    optimizer = torch.optim.AdamW(act.parameters(), lr=2e-3)
    observation = {'state': torch.zeros(64, 2, 2)}
    action = torch.ones(64, 8, 3) * torch.tensor([1.0, -1.0]).repeat(32)[:, None, None]
    for _ in range(150):
        loss = act.loss({'observation': observation, 'action': action, 'valid': torch.ones(64, 8, dtype=torch.bool)})
        optimizer.zero_grad()
        loss['loss'].backward()
        optimizer.step()
    assert loss['l1'] < 0.2
    chunk = act.eval().predict({'state': torch.zeros(200, 2, 2)}, noise=torch.randn(200, 8, 3)).mean(dim=(1, 2))
    assert (chunk > 0.8).float().mean() > 0.25 and (chunk < -0.8).float().mean() > 0.25


def test_a_checkpoint_gives_equal_chunks(tmp_path):
    act = make_act({'features': {'state': (2,), 'front': (24, 32, 3)}}, latent_sampling='normal')
    checkpoint.save(tmp_path / 'p', act, {})
    loaded = checkpoint.load(tmp_path / 'p')
    observation, noise = make_batch(front=(24, 32))['observation'], torch.randn(5, 8, 3)
    assert (loaded.kind, loaded.config, loaded.hash, loaded.normalizer.mode) == ('act', act.config, act.hash, 'mean_std')
    torch.testing.assert_close(loaded.predict(observation, noise=noise), act.predict(observation, noise=noise))


def test_what_it_cannot_do_is_named():
    act, observation = make_act(), make_batch()['observation']
    with pytest.raises(PolicyError, match='act: it does not sample chunks and takes no guidance; valid: flow, diffusion'):
        act.predict(observation, guidance=Guidance(torch.zeros(5, 8, 3), torch.ones(8)))
    with pytest.raises(PolicyError, match=r'act: noise has shape \(5, 8, 2\), must be \(5, 8, 3\)'):
        act.predict(observation, noise=torch.zeros(5, 8, 2))
    with pytest.raises(PolicyError, match='latent is 32; .* at most its 8 steps times 3 actions'):
        make_act(latent=32, latent_sampling='normal')
    with pytest.raises(PolicyError, match=r"act: statistics of 'state' lack \['mean', 'std'\]"):
        ACT(make_spec(), TINY, Normalizer({'state': {'min': [0.0] * 2, 'max': [1.0] * 2}}))
    for wrong, message in (({'width': 34}, 'multiple of 4 and of heads'), ({'heads': 3}, 'multiple of 4 and of heads, 3'),
                           ({'vae_layers': 0}, 'vae_layers 0'), ({'dropout': 1.0}, r'must be in \[0, 1\)'),
                           ({'kl_weight': -1.0}, 'at least 0')):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **wrong)


def test_network_and_encoders_export_for_any_batch():
    """A batch that is looked at by `len` would be fixed in the exported network."""
    act = make_act({'features': {'state': (2,), 'front': (24, 32, 3)}}, decoder_layers=2).requires_grad_(False)
    any_batch = {0: torch.export.Dim('batch', max=64)}
    image = make_batch(front=(24, 32))['observation']['front']
    for module, given in ((act.net, (torch.randn(5, act.condition_size), torch.randn(5, 4))), (act.encoders[0], (image,))):
        exported = torch.export.export(module, given, dynamic_shapes=tuple(any_batch for _ in given)).module()
        for n in (1, 3):
            few = [value[:n] for value in given]
            torch.testing.assert_close(exported(*few), module(*few))
