from __future__ import annotations

import json
import shutil

import pytest
import torch

from il_policies import checkpoint, deploy
from il_policies.deploy import DeployError
from il_policies.policies import PolicySpec
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.diffusion import Diffusion, DiffusionConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.guidance import Guidance
from il_policies.policies.normalize import Normalizer
from il_policies.policies.unet import UNetConfig
from il_policies.policies.vision import VisionConfig

SPEC = PolicySpec({'state': (2,), 'camera': (16, 20, 3)}, ('a', 'b', 'c'), 8, 2, 0.1, 0.0)
UNET = UNetConfig(down_dims=(8, 16), time_size=8)
VISION = VisionConfig(channels=(8,), keypoints=4, size=8)


def make(kind, seed=0):
    torch.manual_seed(seed)
    normalizer = Normalizer({name: {'min': [-1.0] * n, 'max': [2.0] * n} for name, n in (('state', 2), ('action', 3))})
    return (BC(SPEC, BCConfig(unet=UNET, vision=VISION), normalizer) if kind == 'bc' else
            Flow(SPEC, FlowConfig(unet=UNET, vision=VISION, euler_steps=3), normalizer))


def observations(batch, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {'state': torch.randn((batch, 2, 2), generator=generator),
            'camera': torch.randint(0, 256, (batch, 2, 16, 20, 3), generator=generator, dtype=torch.uint8)}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp('exported') / 'policy'
    checkpoint.save(path, make('flow'), {})
    return path, deploy.export(path)


@pytest.mark.parametrize('batch', [1, 4])
def test_chunks_are_those_of_torch(exported, batch):
    path, _ = exported
    fast, eager = deploy.load(path), deploy.load(path, 'torch')
    noise = torch.randn((batch, 8, 3), generator=torch.Generator().manual_seed(1))
    assert (fast.backend, eager.backend) == ('onnxruntime', 'torch')
    torch.testing.assert_close(fast.predict(observations(batch), noise=noise), eager.predict(observations(batch), noise=noise),
                               rtol=0.0, atol=1e-4)


@pytest.mark.parametrize('mode', ['vjp', 'identity'])
def test_guided_chunks_are_those_of_torch(exported, mode):
    path, _ = exported
    noise = torch.randn((1, 8, 3), generator=torch.Generator().manual_seed(1))
    guidance = Guidance(torch.full((1, 8, 3), 0.4), torch.linspace(1.0, 0.0, 8), mode)
    free, fast, eager = (deploy.load(path, backend).predict(observations(1), noise=noise, guidance=given) for backend, given in
                         (('torch', None), ('auto', guidance), ('torch', guidance)))
    assert (eager - free).abs().max() > 0.05
    torch.testing.assert_close(fast, eager, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize('batch', [1, 3])
def test_the_network_at_several_times_is_that_at_each(exported, batch):
    path, _ = exported
    fast, eager = deploy.load(path), deploy.load(path, 'torch')
    x, condition, times = torch.randn(batch, 8, 3), eager.condition(observations(batch)), torch.rand(4, batch)
    with torch.no_grad():
        for at, t in zip(fast.at(times, condition), times, strict=True):
            torch.testing.assert_close(at(x), eager.net(x, t, condition), rtol=0.0, atol=1e-5)


def test_a_sampler_that_draws_at_every_step_is_compared_with_the_same_draws():
    config = DiffusionConfig(unet=UNET, vision=VISION, sampler='ddpm', inference_steps=5)
    policy, twin = (Diffusion(SPEC, config, make('flow').normalizer).eval() for _ in range(2))
    twin.load_state_dict(policy.state_dict())
    before = torch.get_rng_state()
    assert deploy._difference(policy, twin) == 0.0 and torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        next(twin.net.parameters()).add_(1.0)
    assert deploy._difference(policy, twin) > deploy.TOLERANCE


def test_a_network_without_time_is_exported_too(tmp_path):
    checkpoint.save(tmp_path / 'bc', make('bc'), {})
    deploy.export(tmp_path / 'bc')
    fast, eager = deploy.load(tmp_path / 'bc', 'onnxruntime'), deploy.load(tmp_path / 'bc', 'torch')
    torch.testing.assert_close(fast.predict(observations(2)), eager.predict(observations(2)), rtol=0.0, atol=1e-4)


def test_gradients_are_those_of_the_network(exported):
    path, _ = exported
    x, t, condition = torch.randn(1, 8, 3, requires_grad=True), torch.tensor([0.3]), torch.randn(1, 4 + 8)
    expected, = torch.autograd.grad(deploy.load(path, 'torch').net(x, t, condition).sum(), x)
    found, = torch.autograd.grad(deploy.load(path).net(x, t, condition).sum(), x)
    torch.testing.assert_close(found, expected)


def test_what_is_written_says_how_exact_it_is(exported):
    path, description = exported
    assert json.loads((path / 'onnx' / 'export.json').read_text()) == description
    assert sorted(description['files']) == ['encoders.0', 'net', 'net.modulate']
    assert description['policy'] == checkpoint.load(path).hash
    assert 0.0 <= description['max_error']['onnxruntime'] <= 1e-4
    assert not list(path.glob('.*'))


def test_without_an_export_torch_is_used_or_the_command_is_named(tmp_path):
    checkpoint.save(tmp_path / 'p', make('flow'), {})
    assert deploy.load(tmp_path / 'p').backend == 'torch'
    with pytest.raises(DeployError, match='not exported; do it with: il export onnx'):
        deploy.load(tmp_path / 'p', 'onnxruntime')
    with pytest.raises(DeployError, match="backend is 'tensorrt'; valid: auto, torch, onnxruntime, openvino"):
        deploy.load(tmp_path / 'p', 'tensorrt')


def test_an_export_of_another_policy_or_a_damaged_one_is_refused(exported, tmp_path):
    path, _ = exported
    checkpoint.save(tmp_path / 'p', make('flow', seed=1), {})
    shutil.copytree(path / 'onnx', tmp_path / 'p' / 'onnx')
    with pytest.raises(DeployError, match='belongs to policy .* export again'):
        deploy.load(tmp_path / 'p')
    copy = shutil.copytree(path, tmp_path / 'damaged')
    graph = bytearray((copy / 'onnx' / 'net.onnx').read_bytes())
    graph[len(graph) // 2] ^= 1
    (copy / 'onnx' / 'net.onnx').write_bytes(graph)
    with pytest.raises(DeployError, match='net.onnx: damaged'):
        deploy.load(copy)
    (copy / 'onnx' / 'export.json').write_text('{}')
    with pytest.raises(DeployError, match='unreadable .* export again'):
        deploy.load(copy)


def test_a_network_that_differs_is_not_accepted(tmp_path, monkeypatch):
    spec = PolicySpec({'state': (2,)}, ('a', 'b', 'c'), 8, 2, 0.1, 0.0)
    checkpoint.save(tmp_path / 'p', BC(spec, BCConfig(unet=UNetConfig(down_dims=(8,))), make('bc').normalizer), {})
    monkeypatch.setattr(deploy, 'TOLERANCE', 0.0)
    with pytest.raises(DeployError, match='nothing was written'):
        deploy.export(tmp_path / 'p')
    assert not (tmp_path / 'p' / 'onnx').exists() and not list((tmp_path / 'p').glob('.*'))


def test_a_new_checkpoint_takes_no_export_over(exported, tmp_path):
    path = shutil.copytree(exported[0], tmp_path / 'p')
    checkpoint.save(path, make('flow', seed=2), {})
    assert not (path / 'onnx').exists() and deploy.load(path).backend == 'torch'
