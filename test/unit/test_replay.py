"""Replays of synthetic recordings, whose every signal is a known function of time, against computations of their own."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from il_policies import checkpoint, cli
from il_policies.bags.reader import Bag
from il_policies.data.errors import DataError
from il_policies.policies import PolicyError, PolicySpec
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.normalize import Normalizer
from il_policies.replay import contract_for, replay, table
from recordings import MS, START, contract, joint_state, positions, recording, write_bag

FEATURES = {'joints': (2,), 'goal': (2,)}


def make_policy(robot, features=None, horizon=8, history=2):
    """An untrained BC policy for this contract."""
    torch.manual_seed(0)
    features = features or FEATURES
    spec = PolicySpec(features, robot.action.joints, horizon, history, robot.step_period, robot.action_offset)
    rng = np.random.default_rng(0)
    data = {name: rng.uniform(-2, 2, (20, shape[0])).astype(np.float32) for name, shape in features.items() if len(shape) == 1}
    policy = BC(spec, BCConfig(), Normalizer.fit({**data, 'action': rng.uniform(-2, 2, (20, 2)).astype(np.float32)}))
    policy.extra = {'contract': robot.to_dict()}
    return policy.eval()


def expected_done(result, label):
    """What the recording says at the times of the steps: commands b = -t, a = t each 20 ms from 10 ms on, or positions."""
    times = result.starts[:, None] + 0.002 + np.arange(result.planned.shape[1]) * 0.1  # the bag begins 2 ms after the stamps
    if label == 'command':
        stamp = np.ceil((times - 0.01) / 0.02 - 1e-6) * 0.02 + 0.01  # the first not before
        last = 2.99
        stamp = np.where(stamp > last + 1e-6, np.where(times - last <= 0.1, last, np.nan), stamp)
        return np.stack([-stamp, stamp], axis=-1)
    stamp = np.floor(times / 0.01 + 1e-6) * 0.01
    stamp = np.where(stamp > 2.99 + 1e-6, np.where(times - 2.99 <= 0.05 + 1e-6, 2.99, np.nan), stamp)
    return positions(stamp)[..., ::-1]


@pytest.mark.parametrize('label', ['command', 'next_state'])
def test_chunks_are_compared_with_what_was_done_at_their_times(tmp_path, label):
    robot = contract(label, camera_rate=None)
    policy = make_policy(robot)
    messages = [entry for entry in recording(3.0) if entry[0] != 'camera/compressed']
    result = replay(Bag(write_bag(tmp_path / 'demo', messages)), policy, robot, stride=4)
    assert len(result.starts) == 8 and np.allclose(np.diff(result.starts), 0.4, atol=0.0101)
    np.testing.assert_allclose(result.done, expected_done(result, label), atol=2e-6)
    assert np.isfinite(result.error).any() and np.isnan(result.error).any()

    # Each chunk is what the policy says of the newest joints and goal at that time, and one step of 0.1 s before.
    for start, planned in zip(result.starts, result.planned, strict=True):
        observed = start + 0.002 - (0.1 if label == 'next_state' else 0.0)
        times = [max(observed - 0.1, result.starts[0] + 0.002 - (0.1 if label == 'next_state' else 0.0)), observed]
        joints = positions(np.floor(np.array(times) / 0.01 + 1e-6) * 0.01)
        goal = [[0.25, np.floor(time / 0.1 + 1e-6) / 10] for time in times]
        batch = {'joints': torch.tensor(joints[None], dtype=torch.float32), 'goal': torch.tensor([goal], dtype=torch.float32)}
        np.testing.assert_allclose(planned, policy.predict(batch)[0].numpy(), atol=1e-5)

    step = 3
    errors = (result.planned - expected_done(result, label))[:, step]
    errors = errors[np.isfinite(errors[:, 0])]
    np.testing.assert_allclose(result.rms()[step], [np.sqrt(sum(e * e for e in errors[:, d]) / len(errors)) for d in (0, 1)])
    np.testing.assert_allclose(result.worst()[step], [max(map(abs, errors[:, d])) for d in (0, 1)])
    plain = result.to_dict()
    assert plain['joints']['b']['rms_in_tolerances'][step] == pytest.approx(result.rms()[step, 0] / 0.1)
    assert plain['compared'][step] == len(errors) and json.loads(json.dumps(plain)) == plain


def test_cameras_set_the_time_and_what_is_broken_is_counted(tmp_path):
    """As live: chunks begin at frames; a message that is no sample is left out, and what it leaves too old stops planning."""
    robot = contract()
    policy = make_policy(robot, {'joints': (2,), 'front': (8, 12, 3)}, history=1)
    messages = []
    for topic, stamp, message in recording(3.0):
        if topic == 'joint_states' and 1000 * MS <= stamp - START < 1500 * MS:
            message = joint_state(stamp, ['b', 'x', 'a'], [np.nan] * 3)
        messages.append((topic, stamp, message))
    result = replay(Bag(write_bag(tmp_path / 'flight', messages, about={'flight': 'fault'})), policy, robot, stride=2)
    frames = (result.starts + 0.002) / 0.1
    np.testing.assert_allclose(frames, np.round(frames), atol=1e-6)
    assert result.refused == {'joints': 50} and result.not_planned['joints'] > 5
    assert not ((result.starts > 1.06) & (result.starts < 1.45)).any() and (result.starts > 1.5).sum() > 5


def test_what_cannot_be_replayed_is_named(tmp_path):
    robot = contract(camera_rate=None)
    policy = make_policy(robot)
    bag = Bag(write_bag(tmp_path / 'silent', recording(1.0), keep=lambda topic, stamp: topic != 'goal'))
    with pytest.raises(DataError, match='never saw all that it observes; missing or too old: goal'):
        replay(bag, policy, robot)
    with pytest.raises(PolicyError, match='stride is 0'):
        replay(bag, policy, robot, stride=0)
    other = make_policy(contract(camera_rate=None, fps=20.0))
    with pytest.raises(PolicyError, match='trained for another robot'):
        replay(bag, other, robot)
    policy.extra = {}
    with pytest.raises(DataError, match='pass --contract'):
        contract_for(bag, policy)


def test_the_command_writes_table_file_and_picture(tmp_path, capsys):
    robot = contract(camera_rate=None)
    policy = make_policy(robot)
    checkpoint.save(tmp_path / 'policy', policy, policy.extra)
    bag = write_bag(tmp_path / 'demo', [entry for entry in recording(2.0) if entry[0] != 'camera/compressed'])
    cli.main(['replay', str(bag), '--policy', str(tmp_path / 'policy'), '--out', str(tmp_path / 'out/errors.json'),
              '--plot', str(tmp_path / 'out/errors.png'), '--stride', '3'])
    shown = capsys.readouterr().out
    saved = json.loads((tmp_path / 'out/errors.json').read_text())
    assert 'demo, 7 chunks of bc' in shown and saved['policy'] == policy.hash and saved['chunks'] == 7
    result = replay(Bag(bag), policy, robot, stride=3)
    heading, *rows = table(result)
    assert heading[:4] == ('after [s]', 'chunks', 'b [rad]', 'a [rad]')
    assert [row[0] for row in rows] == [f'{0.1 * step:.2f}' for step in range(8)]
    for step, row in enumerate(rows):
        assert row[2] == f'{saved["joints"]["b"]["rms"][step]:.3f} / {saved["joints"]["b"]["worst"][step]:.3f}'
    assert (tmp_path / 'out/errors.png').read_bytes()[:4] == b'\x89PNG'
    with pytest.raises(SystemExit) as end:
        cli.main(['replay', str(bag), '--policy', str(tmp_path / 'policy'), '--threads', '0'])
    assert end.value.code == 2 and capsys.readouterr().err == 'il: threads is 0, must be at least 1\n'
