from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

from il_policies import checkpoint
from il_policies.data.errors import DataError
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode
from il_policies.policies import PolicyError
from il_policies.policies.unet import UNetConfig
from il_policies.policies.vision import VisionConfig
from il_policies.train import TrainConfig, TrainError, budget_spent, choose_episodes, learning_rate, train

SMALL = UNetConfig((16, 32), activation='silu')


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


@pytest.mark.parametrize('policy', ['bc', 'flow'])
def test_the_loss_falls_and_the_checkpoint_tells_the_facts(policy, dataset, tmp_path):
    losses = []
    config = TrainConfig(policy=policy, unet=SMALL, steps=120, horizon=8, warmup_steps=10, threads=1)
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
        policy = train(dataset, TrainConfig(unet=SMALL, steps=15, horizon=8, seed=seed, threads=1), progress=quiet)
        return torch.cat([p.flatten() for p in policy.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_budget_of_time_ends_in_time(dataset):
    spent = []
    config = TrainConfig(unet=SMALL, minutes=0.01, horizon=8, threads=1)
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
    config = TrainConfig(unet=SMALL, vision=vision, observations=('state', 'front'), steps=12, horizon=8, warmup_steps=2,
                         threads=1)
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
    config = TrainConfig(unet=SMALL, steps=50, horizon=8, learning_rate=1e30, warmup_steps=0, threads=1)
    with pytest.raises(TrainError, match='the loss became (nan|inf) at step'):
        train(dataset, config, tmp_path / 'p', quiet)
    assert not (tmp_path / 'p').exists()


def test_what_cannot_be_trained_is_named(dataset):
    with pytest.raises(PolicyError, match='vision.frames is 2, must be at most the history, 1'):
        train(dataset, TrainConfig(observations=('front',), vision=VisionConfig(frames=2), history=1, steps=1), progress=quiet)
    with pytest.raises(TrainError, match='no budget'):
        train(dataset, TrainConfig(), progress=quiet)
    for wrong, message in (({'steps': 0}, 'steps is 0'), ({'where': ('left',)}, 'field=value'),
                           ({'ema_decay': 1.0}, 'ema_decay')):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**wrong)


@pytest.mark.parametrize('preset', ['bc', 'flow', 'flow_images', 'flow_pusht'])
def test_presets_are_valid(preset, root):
    from il_policies.contract import from_dict, load_yaml
    path = root / 'config' / 'policies' / f'{preset}.yaml'
    config = from_dict(TrainConfig, load_yaml(path), str(path))
    assert config.policy == preset.split('_')[0] and (config.steps is None) != (config.minutes is None)
    assert preset != 'flow_images' or config.observations == ('joint_positions', 'front'), 'the goal is seen by the camera only'


def test_bc_and_flow_presets_differ_in_the_objective_only(root):
    from il_policies.contract import load_yaml
    bc, flow = (load_yaml(root / 'config' / 'policies' / f'{name}.yaml') for name in ('bc', 'flow'))
    assert {key for key in {*bc, *flow} if bc.get(key) != flow.get(key)} == {'policy', 'euler_steps', 'time_sampling'}
