from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from il_policies import checkpoint
from il_policies.contract import ContractError
from il_policies.data.errors import DataError
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode
from il_policies.data.windows import Windows
from il_policies.policies import PolicyError, vision
from il_policies.policies.act import ACTConfig
from il_policies.policies.bc import BCConfig
from il_policies.policies.diffusion import DiffusionConfig
from il_policies.policies.flow import FlowConfig
from il_policies.policies.unet import UNetConfig
from il_policies.policies.vision import VisionConfig
from il_policies.train import (
    STATE,
    SharedDraws,
    TrainConfig,
    TrainError,
    budget_spent,
    choose_episodes,
    learning_rate,
    load_preset,
    make_optimizer,
    make_policy,
    split_episodes,
    train,
    validation_loss,
)

ROOT = Path(__file__).parents[2]
SMALL = UNetConfig((16, 32), activation='silu')
TINY_ACT = ACTConfig(width=32, heads=2, feedforward=64, encoder_layers=1, vae_layers=1, latent=4)


def quiet(spent, step, loss):
    pass


def make_dataset(path) -> Dataset:
    """Eight episodes of a point driven along a sine; the first four are labelled left, the others right."""
    features = {'state': Feature((2,), 'lowdim'), 'front': Feature((8, 8, 3), 'image')}
    create(path, DatasetInfo(fps=10.0, features=features, action=ActionInfo(('a',), 0.1), label='command',
                             contract={'robot': 'point'}, contract_hash='c0'))
    image = cv2.imencode('.jpg', np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    for index in range(8):
        t = np.arange(30) / 10 + index
        write_episode(path, index, {'state': np.stack([np.sin(t), np.cos(t)], 1)}, np.sin(t + 0.1)[:, None],
                      np.arange(30) * 10**8, np.zeros(30, bool), {'front': [image] * 30},
                      {'side': 'left' if index < 4 else 'right'}, {})
    return Dataset(path)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp('train') / 'data')


@pytest.mark.parametrize('policy', [BCConfig(SMALL), TINY_ACT, DiffusionConfig(SMALL), FlowConfig(SMALL)],
                         ids=lambda config: type(config).__name__)
def test_the_loss_falls_and_the_checkpoint_tells_the_facts(policy, dataset, tmp_path):
    losses = []
    config = TrainConfig(policy=policy, steps=120, horizon=8, warmup_steps=10, threads=1)
    trained = train(dataset, config, tmp_path / 'p', lambda spent, step, loss: losses.append(loss))
    assert losses[-1] < 0.5 * losses[0] and len(losses) == 120
    loaded = checkpoint.load(tmp_path / 'p')
    assert loaded.hash == trained.hash
    assert loaded.extra['contract'] == {'robot': 'point'} and loaded.extra['contract_hash'] == 'c0'
    assert loaded.extra['dataset_hash'] == dataset.hash
    facts = loaded.extra['training']
    assert (facts['steps'], facts['episodes'], facts['windows']) == (120, 8, 240)
    assert loaded.spec.features == {'state': (2,)}
    assert loaded.spec.step_period == 0.1 and loaded.spec.action_offset == 0.1
    assert all(p.isfinite().all() for p in loaded.parameters())
    assert all(p.is_leaf and not p.requires_grad for p in trained.parameters()), 'the average must hold no graph'


def test_seeds_reproduce(dataset):
    def weights(seed):
        policy = train(dataset, TrainConfig(policy=FlowConfig(SMALL), steps=15, horizon=8, seed=seed, threads=1), progress=quiet)
        return torch.cat([p.flatten() for p in policy.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_budget_of_time_ends_in_time(dataset):
    spent = []
    config = TrainConfig(policy=FlowConfig(SMALL), minutes=0.01, horizon=8, threads=1)
    train(dataset, config, progress=lambda s, step, loss: spent.append(s))
    assert spent[-1] >= 1.0 and all(s < 1.0 for s in spent[:-1]) and spent == sorted(spent)


def test_budget_and_schedule():
    config = TrainConfig(steps=100, minutes=1.0, learning_rate=2.0, warmup_steps=9)
    assert budget_spent(config, 50, 6.0) == 0.5
    assert budget_spent(config, 10, 45.0) == 0.75
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.2)
    assert learning_rate(config, 9, 0.0) == pytest.approx(2.0)
    assert learning_rate(config, 50, 0.5) == pytest.approx(1.0)
    assert learning_rate(config, 75, 0.75) == pytest.approx(1.0 + math.cos(0.75 * math.pi))
    assert learning_rate(config, 100, 1.0) == pytest.approx(0.0)


def test_choosing_episodes(dataset):
    assert choose_episodes(dataset, TrainConfig(where=('side=right',))) == [4, 5, 6, 7]
    some = choose_episodes(dataset, TrainConfig(where=('side=left',), max_episodes=2))
    assert len(some) == 2 and set(some) < {0, 1, 2, 3}
    assert some == choose_episodes(dataset, TrainConfig(where=('side=left',), max_episodes=2, seed=9))
    with pytest.raises(TrainError, match='side is one of: left, right'):
        choose_episodes(dataset, TrainConfig(where=('side=up',)))
    with pytest.raises(TrainError, match="no episode has the field 'colour'; there are:.*side"):
        choose_episodes(dataset, TrainConfig(where=('colour=red',)))


def judged(path, verdicts: list[tuple[str, bool | None]]) -> Dataset:
    """Episodes of two rows with these verdicts and labels of success."""
    create(path, DatasetInfo(fps=10.0, features={'state': Feature((1,), 'lowdim')}, action=ActionInfo(('a',)), label='command'))
    for index, (verdict, success) in enumerate(verdicts):
        reasons = {'PASS': [], 'WARN': ['WARN a little late'], 'FAIL': ['FAIL gap of 0.83 s on /cam', 'WARN a little late']}
        write_episode(path, index, {'state': np.array([[0.0], [1.0]])}, np.array([[0.0], [1.0]]), np.arange(2) * 10**8,
                      np.zeros(2, bool), {}, {'source': f'demo_{index:02d}', 'success': success},
                      {'verdict': verdict, 'reasons': reasons[verdict]})
    return Dataset(path)


def test_bad_recordings_are_refused_unless_told(tmp_path):
    data = judged(tmp_path / 'd', [('PASS', True), ('FAIL', True), ('WARN', None), ('FAIL', False)])
    with pytest.raises(DataError) as error:
        choose_episodes(data, TrainConfig())
    lines = str(error.value).splitlines()
    assert '1 of 3 episodes failed the check' in lines[0] and '--failed skip' in lines[0] and '--failed use' in lines[0]
    assert lines[1:] == ['  episode 1 (demo_01): FAIL gap of 0.83 s on /cam'], 'one line for each, with what it failed for'
    assert choose_episodes(data, TrainConfig(failed='skip')) == [0, 2]
    assert choose_episodes(data, TrainConfig(failed='use')) == [0, 1, 2]
    assert choose_episodes(data, TrainConfig(where=('source=demo_02',))) == [2], 'only what would be trained on is judged'


def test_failures_are_left_out_unless_told(tmp_path):
    data = judged(tmp_path / 'd', [('PASS', True), ('PASS', False), ('PASS', None)])
    assert choose_episodes(data, TrainConfig()) == [0, 2]
    assert choose_episodes(data, TrainConfig(unsuccessful='use')) == [0, 1, 2]
    nothing = judged(tmp_path / 'n', [('PASS', False), ('FAIL', True)])
    with pytest.raises(TrainError, match='none of 2 episodes is left.*--unsuccessful use.*--failed use'):
        choose_episodes(nothing, TrainConfig(failed='skip'))
    assert len(choose_episodes(judged(tmp_path / 'm', [('PASS', None)] * 3 + [('FAIL', None)] * 15),
                               TrainConfig(failed='skip', max_episodes=2))) == 2


def test_images_train_and_the_checkpoint_sees_them(dataset, tmp_path):
    vision = VisionConfig(channels=(8,), keypoints=4, size=8)
    config = TrainConfig(policy=FlowConfig(SMALL, vision=vision), observations=('state', 'front'), steps=12, horizon=8,
                         warmup_steps=2, threads=1)
    trained = train(dataset, config, tmp_path / 'p', quiet)
    loaded = checkpoint.load(tmp_path / 'p')
    assert loaded.spec.features == {'state': (2,), 'front': (8, 8, 3)} and loaded.config.vision == vision
    observation = {'state': torch.randn(3, 2, 2), 'front': torch.randint(0, 256, (3, 2, 8, 8, 3), dtype=torch.uint8)}
    noise = torch.randn(3, 8, 1)
    torch.testing.assert_close(loaded.predict(observation, noise=noise), trained.predict(observation, noise=noise),
                               rtol=1e-5, atol=1e-6)
    again = train(dataset, config, progress=quiet)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters())), 'shifts follow the seed too'


def test_a_loss_that_is_not_finite_stops_it(dataset, tmp_path):
    config = TrainConfig(policy=FlowConfig(SMALL), steps=50, horizon=8, learning_rate=1e30, warmup_steps=0, threads=1)
    with pytest.raises(TrainError, match='the loss became (nan|inf) at step'):
        train(dataset, config, tmp_path / 'p', quiet)
    assert not (tmp_path / 'p').exists()


def test_what_cannot_be_trained_is_named(dataset):
    with pytest.raises(PolicyError, match='vision.frames is 2, must be at most the history, 1'):
        train(dataset, TrainConfig(FlowConfig(vision=VisionConfig(frames=2)), ('front',), history=1, steps=1), progress=quiet)
    with pytest.raises(TrainError, match='no budget'):
        train(dataset, TrainConfig(), progress=quiet)
    for wrong, message in (({'steps': 0}, 'steps is 0'), ({'where': ('left',)}, 'field=value'),
                           ({'seed': -1}, 'seed is -1'), ({'episode_seed': -2}, 'episode_seed is -2'),
                           ({'ema_decay': 1.0}, 'ema_decay'), ({'ema_power': -0.75}, 'ema_power is -0.75')):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**wrong)


def test_data_that_cannot_be_learnt_from_is_named(dataset, tmp_path):
    info = dataclasses.replace(dataset.info, features={'front': dataset.info.features['front']})
    create(tmp_path / 'd', info)
    images = {'front': [cv2.imencode('.jpg', dataset.image(0, 'front', 0))[1].tobytes()] * 20}
    write_episode(tmp_path / 'd', 0, {}, np.zeros((20, 1)), np.arange(20) * 10**8, np.zeros(20, bool), images, {}, {})
    with pytest.raises(TrainError, match='d: has images only, front; name what the policy sees: --observations'):
        train(Dataset(tmp_path / 'd'), TrainConfig(steps=1), progress=quiet)
    shutil.copytree(dataset.path, tmp_path / 'n')
    file = tmp_path / 'n' / 'episodes' / '000003' / 'lowdim.parquet'
    rows = parquet.read_table(file).to_pydict()
    rows['state'][7] = [0.5, math.nan]
    parquet.write_table(pyarrow.table(rows, parquet.read_schema(file)), file)
    with pytest.raises(TrainError, match=r"n: statistics of 'state'.*nan.*must be finite"):
        train(Dataset(tmp_path / 'n'), TrainConfig(FlowConfig(SMALL), horizon=8, steps=1), progress=quiet)


@pytest.mark.parametrize('preset', sorted(file.stem for file in (ROOT / 'config' / 'policies').glob('*.yaml')))
def test_presets_are_valid(preset, root):
    config = load_preset(root / 'config' / 'policies' / f'{preset}.yaml')
    assert config.kind == preset.split('_')[0] and (config.steps is None) != (config.minutes is None)
    assert preset != 'flow_images' or config.observations == ('joint_positions', 'front'), 'the goal is seen by the camera only'


def test_misspelt_settings_of_a_preset_are_named_at_any_depth(tmp_path):
    file = tmp_path / 'p.yaml'
    for text, message in (('policy: flow\nunet: {down_dim: [8]}', 'unet.down_dim is not a known key.*valid: activation'),
                          ('policy: bc\neuler_steps: 3', 'p.yaml, policy bc: euler_steps is not a known key'),
                          ('policy: pi', "policy is 'pi'; valid: act, bc, diffusion, flow"),
                          ('batch_size: many', 'batch_size.*many'), ('batch_size: 0', 'batch_size is 0')):
        file.write_text(text)
        with pytest.raises(ContractError, match=message):
            load_preset(file)
    for source in (None, file):
        with pytest.raises(ContractError, match="^policy is 'pi'; valid: act"):
            load_preset(source, 'pi')
    file.write_text('policy: flow\nunet: {down_dims: [8, 16]}\nsteps: 7')
    assert load_preset(file) == TrainConfig(FlowConfig(UNetConfig((8, 16))), steps=7)
    assert load_preset(file, 'bc') == TrainConfig(BCConfig(UNetConfig((8, 16))), steps=7), 'the argument is stronger'


class Killed(Exception):
    pass


def killed_at(last: int):
    def progress(spent, step, loss):
        if step == last:
            raise Killed
    return progress


@pytest.mark.parametrize('policy', [TINY_ACT, FlowConfig(SMALL, vision=VisionConfig(channels=(8,), keypoints=4, size=8))],
                         ids=['act', 'flow'])
def test_k_and_k_steps_are_2k_steps_bit_for_bit(policy, dataset, tmp_path):
    """Killed after the save at step 20, gone on with from there: dropout, shifts of images, orders, averages and the best."""
    config = TrainConfig(policy, ('state', 'front'), horizon=8, steps=40, batch_size=32, warmup_steps=5, threads=1, save_steps=20,
                         validation=0.25, validate_steps=8)
    whole = train(dataset, config, tmp_path / 'whole', quiet)
    with pytest.raises(Killed):
        train(dataset, config, tmp_path / 'p', killed_at(25))
    halfway = checkpoint.load(tmp_path / 'p')
    assert halfway.extra['training']['steps'] == 20 and not halfway.extra['training']['finished']
    kept = {file.name for file in (tmp_path / 'p').rglob('*') if file.is_file()}
    assert kept == {'policy.json', 'model.safetensors', 'state.safetensors', 'state.json'}
    steps = []
    resumed = train(dataset, config, tmp_path / 'p', lambda spent, step, loss: steps.append(step), resume=True)
    assert steps == list(range(21, 41))
    weights = whole.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in resumed.state_dict().items())
    for folder in (tmp_path / 'p', tmp_path / 'p' / 'best'):
        a, b = checkpoint.load(folder), checkpoint.load(tmp_path / 'whole' / folder.relative_to(tmp_path / 'p'))
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
        assert {**a.extra['training'], 'seconds': 0} == {**b.extra['training'], 'seconds': 0}
    assert not (tmp_path / 'p' / 'training').exists(), 'a finished run has no state to go on from'
    assert train(dataset, config, tmp_path / 'p', killed_at(1), resume=True).hash == checkpoint.load(tmp_path / 'p').hash


def test_what_a_run_left_is_not_overwritten_unless_told(dataset, tmp_path):
    config = TrainConfig(FlowConfig(SMALL), horizon=8, steps=4, threads=1, validation=0.25, save_steps=1)
    finished = train(dataset, config, tmp_path / 'p', quiet)
    files = {file: file.read_bytes() for file in (tmp_path / 'p').rglob('*') if file.is_file()}
    assert len(files) == 4, 'with the best'
    for seed in (0, 1):
        with pytest.raises(TrainError, match=r'p: holds a checkpoint; give another folder, or begin anew.*--overwrite'):
            train(dataset, dataclasses.replace(config, seed=seed), tmp_path / 'p', killed_at(1))
    with pytest.raises(TrainError, match='resume.*overwrite.*one of them'):
        train(dataset, config, tmp_path / 'p', quiet, resume=True, overwrite=True)
    assert {file: file.read_bytes() for file in (tmp_path / 'p').rglob('*') if file.is_file()} == files
    again = dataclasses.replace(config, seed=1)
    with pytest.raises(Killed):
        train(dataset, again, tmp_path / 'p', killed_at(3), overwrite=True)
    assert checkpoint.load(tmp_path / 'p').extra['training']['steps'] == 2
    with pytest.raises(TrainError, match='holds a training that is not finished; go on with it'):
        train(dataset, again, tmp_path / 'p', quiet)
    anew = train(dataset, again, tmp_path / 'p', quiet, overwrite=True)
    expected = train(dataset, again, progress=quiet)
    assert all(torch.equal(a, b) for a, b in zip(anew.parameters(), expected.parameters())), 'nothing of the run before is left'
    assert anew.hash != finished.hash and checkpoint.load(tmp_path / 'p').hash == anew.hash


def test_what_does_not_fit_is_not_gone_on_with(dataset, tmp_path):
    config = TrainConfig(FlowConfig(SMALL), horizon=8, steps=20, save_steps=5, threads=1)
    with pytest.raises(Killed):
        train(dataset, config, tmp_path / 'p', killed_at(6))
    with pytest.raises(TrainError, match='is not finished; go on with it'):
        train(dataset, config, tmp_path / 'p', quiet)
    other = dataclasses.replace(config, policy=FlowConfig(dataclasses.replace(SMALL, blocks=2)), steps=30)
    with pytest.raises(TrainError) as error:
        train(dataset, other, tmp_path / 'p', quiet, resume=True)
    assert str(error.value).splitlines()[1:] == ['  steps: was 20, is 30', '  unet.blocks: was 1, is 2']
    with pytest.raises(TrainError, match=f'dataset: its content was {dataset.hash}, is '):
        train(judged(tmp_path / 'd', [('PASS', None)] * 2), config, tmp_path / 'p', quiet, resume=True)
    (tmp_path / 'p' / 'training' / 'state.safetensors').write_bytes(b'half')
    with pytest.raises(TrainError, match='its training state cannot be gone on with'):
        train(dataset, config, tmp_path / 'p', quiet, resume=True)
    for rest in ('state.safetensors', 'state.json'):
        (tmp_path / 'p' / 'training' / rest).unlink()
    with pytest.raises(TrainError, match='without a training state'):
        train(dataset, config, tmp_path / 'p', quiet, resume=True)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_finishes_the_step_and_saves(number, dataset, tmp_path):
    config = TrainConfig(FlowConfig(SMALL), horizon=8, steps=20, threads=1)
    with pytest.raises(KeyboardInterrupt, match='interrupted at step 7, 35 % of the budget.*--resume'):
        train(dataset, config, tmp_path / 'p', lambda spent, step, loss: step == 7 and signal.raise_signal(number))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert checkpoint.load(tmp_path / 'p').extra['training']['steps'] == 7
    whole, resumed = train(dataset, config, progress=quiet), train(dataset, config, tmp_path / 'p', quiet, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_a_loss_that_becomes_infinite_keeps_the_last_good_checkpoint(dataset, tmp_path):
    config = TrainConfig(FlowConfig(SMALL), horizon=8, steps=50, learning_rate=1e30, warmup_steps=0, threads=1, save_steps=1)
    with pytest.raises(TrainError, match='the (loss|gradient) became (nan|inf) at step 1;.*saved before is kept'):
        train(dataset, config, tmp_path / 'p', quiet)
    loaded = checkpoint.load(tmp_path / 'p')
    assert loaded.extra['training']['steps'] == 1 and all(p.isfinite().all() for p in loaded.parameters())


def test_a_run_that_is_older_than_a_setting_had_its_default(dataset, tmp_path):
    config = TrainConfig(FlowConfig(SMALL), horizon=8, steps=3, save_steps=1, threads=1)
    with pytest.raises(Killed):
        train(dataset, config, tmp_path / 'p', killed_at(2))
    policy = checkpoint.load(tmp_path / 'p')
    for absent in (('betas',), ('unet', 'groups')):
        place = policy.extra['training']['config']
        for key in absent[:-1]:
            place = place[key]
        del place[absent[-1]]
    state = {name: (tmp_path / 'p' / name).read_bytes() for name in STATE}
    checkpoint.save(tmp_path / 'p', policy, policy.extra, state)
    with pytest.raises(TrainError) as error:
        train(dataset, dataclasses.replace(config, betas=(0.9, 0.999)), tmp_path / 'p', quiet, resume=True)
    assert str(error.value).splitlines()[1:] == ['  betas: was [0.95, 0.999], is [0.9, 0.999]']
    assert train(dataset, config, tmp_path / 'p', quiet, resume=True).extra['training']['steps'] == 3


def test_steps_are_adamws_with_the_betas_given(dataset):
    """Its first moments after steps of gradient 1: 1 - beta^n of it."""
    for betas in ((0.9, 0.999), (0.5, 0.25)):
        policy = torch.nn.Linear(2, 2)
        optimizer = make_optimizer(policy, TrainConfig(steps=1, betas=betas))
        for _ in range(3):
            for p in policy.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        moments = optimizer.state[policy.bias]
        torch.testing.assert_close(moments['exp_avg'], torch.full((2,), 1 - betas[0]**3))
        torch.testing.assert_close(moments['exp_avg_sq'], torch.full((2,), 1 - betas[1]**3))
    with pytest.raises(ValueError, match=r'betas are \[1.0, 0.5\], must be in \[0, 1\)'):
        TrainConfig(betas=(1.0, 0.5))


def test_groups_of_parameters(dataset):
    config = TrainConfig(TINY_ACT, ('state', 'front'), history=1, horizon=8, weight_decay=0.1, learning_rate=1e-3, steps=1,
                         vision_learning_rate=1e-5)
    for algorithm in (TINY_ACT, FlowConfig(SMALL), FlowConfig(backbone='transformer')):
        config = dataclasses.replace(config, policy=algorithm)
        policy = make_policy(dataset, config, config.observations, Windows(dataset, config.observations, 1, 8))
        groups = make_optimizer(policy, config).param_groups
        of = {id(p): group for group in groups for p in group['params']}
        assert len(of) == len(list(policy.parameters())) == sum(len(group['params']) for group in groups)
        for name, module in policy.named_modules():
            for part, p in module.named_parameters(recurse=False):
                layer = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and part == 'weight'
                assert of[id(p)]['weight_decay'] == (0.1 if layer else 0.0), (name, part)
                assert of[id(p)]['share'] == pytest.approx(0.01 if name.startswith('encoders.') else 1.0), (name, part)


def test_validation_is_of_other_episodes_and_always_the_same(dataset):
    config = TrainConfig(FlowConfig(SMALL), horizon=8, validation=0.25, batch_size=32, steps=1)
    training, held_out = split_episodes(list(range(8)), config)
    assert len(held_out) == 2 and sorted(training + held_out) == list(range(8))
    assert split_episodes(list(range(8)), dataclasses.replace(config, seed=5)) == (training, held_out)
    assert split_episodes([3, 4], dataclasses.replace(config, validation=0.01))[1] != []
    with pytest.raises(TrainError, match='leaves none to train on'):
        split_episodes([3], config)
    windows = Windows(dataset, ('state',), 2, 8, held_out)
    policy = make_policy(dataset, config, ('state',), windows).eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = validation_loss(policy, windows, config, torch.device('cpu'))
    assert torch.rand(1) == expected, "training's draws go on as if there had been none"
    assert first == validation_loss(policy, windows, config, torch.device('cpu')) > 0.0


def test_bfloat16_learns_too(dataset, tmp_path):
    losses = {}
    for precision in ('fp32', 'bf16'):
        config = TrainConfig(FlowConfig(SMALL), horizon=8, steps=30, warmup_steps=5, threads=1, precision=precision)
        trained = train(dataset, config, tmp_path / precision, quiet)
        losses[precision] = trained.extra['training']['loss']
        assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert losses['bf16'] != losses['fp32'] and losses['bf16'] == pytest.approx(losses['fp32'], rel=0.05)


def test_a_device_that_is_not_there(dataset):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(TrainError, match='no GPU'):
        train(dataset, TrainConfig(FlowConfig(SMALL), steps=1, device='cuda'), progress=quiet)


def test_draws_of_shares_are_the_draws_of_the_whole():
    def draws(n):
        return [torch.rand(n), torch.randn_like(torch.empty(n, 3)), torch.randint(0, 9, (n,)), torch.randn(n, 4, 2),
                vision.shifted(pictures[:n], 4), vision.cropped(pictures[:n], 5, 5, random=True)]

    pictures = torch.arange(9 * 9, dtype=torch.uint8).view(1, 1, 9, 9, 1).expand(10, 1, 9, 9, 3)
    torch.manual_seed(1)
    whole = draws(10)
    for share in (slice(0, 6), slice(6, 8), slice(8, 10), slice(9, 10)):
        torch.manual_seed(1)
        with SharedDraws(10, share):
            parts = draws(share.stop - share.start)
        assert all(torch.equal(part, all_of_it[share]) for part, all_of_it in zip(parts, whole, strict=True))


def test_two_processes_give_what_one_gives(dataset, tmp_path):
    """Two gloo processes with half of each batch: weights equal to 1e-4 of their largest after 12 steps, by rounding."""
    config = TrainConfig(FlowConfig(SMALL), horizon=8, steps=12, warmup_steps=2, batch_size=33, threads=1)
    expected = train(dataset, config, progress=quiet)
    program = ('import sys\nfrom il_policies.data.store import Dataset\nfrom il_policies.train import *\n'
               'from il_policies.policies.unet import UNetConfig\n'
               'train(Dataset(sys.argv[1]), TrainConfig(FlowConfig(UNetConfig((16, 32), activation="silu")), horizon=8, '
               'steps=12, warmup_steps=2, batch_size=33, threads=1), sys.argv[2], lambda *_: None)\n')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [subprocess.Popen([sys.executable, '-c', program, dataset.path, tmp_path / 'p'], cwd=Path(__file__).parent, env={
        **os.environ, 'WORLD_SIZE': '2', 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(port), 'GLOO_SOCKET_IFNAME': 'lo'}) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    trained = checkpoint.load(tmp_path / 'p')
    assert trained.extra['training']['loss'] > 0.0
    for (name, p), q in zip(expected.named_parameters(), trained.parameters()):
        torch.testing.assert_close(q, p, rtol=0.0, atol=1e-4 * p.abs().max().item() + 1e-6, msg=name)


def test_bc_and_flow_presets_differ_in_the_objective_only(root):
    from il_policies.contract import load_yaml
    bc, flow = (load_yaml(root / 'config' / 'policies' / f'{name}.yaml') for name in ('bc', 'flow'))
    assert {key for key in {*bc, *flow} if bc.get(key) != flow.get(key)} == {'policy', 'euler_steps', 'time_sampling'}
