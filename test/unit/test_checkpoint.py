from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from il_policies import checkpoint
from il_policies.checkpoint import CheckpointError
from test_bc import make_bc
from test_flow import make_flow

EXTRA = {'contract': {'robot': 'r'}, 'contract_hash': 'abc', 'dataset_hash': 'def', 'training': {'steps': 3}}


@pytest.mark.parametrize('make', [make_flow, make_bc])
def test_a_loaded_policy_gives_equal_chunks(make, tmp_path):
    policy = make()
    checkpoint.save(tmp_path / 'p', policy, EXTRA)
    loaded = checkpoint.load(tmp_path / 'p')
    observation, noise = {'state': torch.randn(3, 2, 2)}, torch.randn(3, 8, 3)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in policy.state_dict().items())
    # The tensors lie differently in memory, which may change the order of a sum: equal to the last bits.
    expected = policy.predict(observation, noise=noise)
    torch.testing.assert_close(loaded.predict(observation, noise=noise), expected, rtol=1e-5, atol=1e-6)
    assert (loaded.kind, loaded.spec, loaded.config, loaded.extra) == (policy.kind, policy.spec, policy.config, EXTRA)
    assert loaded.hash == policy.hash and len(policy.hash) == 16


def test_the_hash_is_of_the_content_only(tmp_path):
    hashes = set()
    for name, seed, extra in (('a', 0, EXTRA), ('b', 0, EXTRA), ('c', 1, EXTRA), ('d', 0, {})):
        policy = make_flow(seed)
        checkpoint.save(tmp_path / name, policy, extra)
        hashes.add((name, policy.hash))
    by_name = dict(hashes)
    assert by_name['a'] == by_name['b'] and len(set(by_name.values())) == 3


def test_an_older_checkpoint_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    checkpoint.save(tmp_path / 'p', make_flow(0), EXTRA)
    newer = make_flow(1)
    checkpoint.save(tmp_path / 'p', newer, EXTRA)
    assert checkpoint.load(tmp_path / 'p').hash == newer.hash
    assert [entry.name for entry in tmp_path.iterdir()] == ['p']


def test_a_link_to_another_place_stays_one(tmp_path):
    """Each save replaces the folder that it points to; between the two renames of one the older checkpoint still loads."""
    (tmp_path / 'large').mkdir()
    (tmp_path / 'p').symlink_to(tmp_path / 'large' / 'kept')
    for seed in range(3):
        policy = make_flow(seed)
        checkpoint.save(tmp_path / 'p', policy, EXTRA)
        assert checkpoint.load(tmp_path / 'p').hash == policy.hash
    assert (tmp_path / 'p').is_symlink() and {entry.name for entry in tmp_path.iterdir()} == {'p', 'large'}
    assert [entry.name for entry in (tmp_path / 'large').iterdir()] == ['kept']
    (tmp_path / 'large' / 'kept').rename(tmp_path / 'large' / '.kept.old')
    assert checkpoint.load(tmp_path / 'p').hash == policy.hash


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(('damage', 'message'), [
    (lambda p: flip_a_bit(p / 'model.safetensors'), 'model.safetensors: damaged'),
    (lambda p: (p / 'model.safetensors').write_bytes((p / 'model.safetensors').read_bytes()[:-10]), 'damaged'),
    (lambda p: (p / 'model.safetensors').unlink(), 'no readable checkpoint.*model.safetensors'),
    (lambda p: (p / 'policy.json').write_text('{'), 'not JSON'),
    (lambda p: (p / 'policy.json').write_text('[]'), 'format is list'),
    (lambda p: (p / 'policy.json').write_text((p / 'policy.json').read_text().replace('-1.0', '-2.0')), 'edited'),
])
def test_damage_is_refused(damage, message, tmp_path):
    checkpoint.save(tmp_path / 'p', make_flow(), EXTRA)
    damage(tmp_path / 'p')
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / 'p')


def test_another_version_is_refused(tmp_path):
    checkpoint.save(tmp_path / 'p', make_flow(), EXTRA)
    file = tmp_path / 'p' / 'policy.json'
    saved = json.loads(file.read_text())
    unet, action = saved['config']['unet'], saved['statistics']['action']
    for key, value, message in (('format', 99, 'format is 99; this version reads 1'),
                                ('kind', 'gail', "kind is 'gail'; valid: act, bc, diffusion, flow"),
                                ('config', {**saved['config'], 'unet': {**unet, 'gate': True}}, 'it has config.unet.gate, which'),
                                ('spec', {**saved['spec'], 'language': 'en'}, 'it has spec.language, which'),
                                ('statistics', {'action': action}, 'statistics must have 2 numbers of state$')):
        description = {**saved, key: value}
        description['hash'] = checkpoint._hash(description)
        (tmp_path / key).mkdir()
        (tmp_path / key / 'model.safetensors').write_bytes((tmp_path / 'p' / 'model.safetensors').read_bytes())
        (tmp_path / key / 'policy.json').write_text(json.dumps(description))
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(tmp_path / key)


def test_other_folders_are_not_overwritten(tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'thesis.txt').write_text('years of work')
    with pytest.raises(CheckpointError, match='exists and is no checkpoint'):
        checkpoint.save(tmp_path / 'notes', make_flow(), EXTRA)
    assert (tmp_path / 'notes' / 'thesis.txt').exists()


def test_killed_between_two_renames_the_older_one_is_still_there(tmp_path):
    checkpoint.save(tmp_path / 'p', make_flow(), EXTRA)
    (tmp_path / 'p').rename(tmp_path / '.p.old')
    assert checkpoint.load(tmp_path / 'p').extra == EXTRA
    assert not (tmp_path / 'p').exists(), 'who reads does not stand in the way of the second rename'
    assert checkpoint.require_writable(tmp_path / 'p') == tmp_path / 'p' and checkpoint.load(tmp_path / 'p').extra == EXTRA


def test_while_it_is_replaced_a_reader_gets_one_whole_checkpoint(tmp_path):
    policies, done = (make_flow(0), make_flow(1)), threading.Event()
    checkpoint.save(tmp_path / 'p', policies[0], EXTRA)

    def save():
        for policy in itertools.cycle(policies):
            checkpoint.save(tmp_path / 'p', policy, EXTRA)
            if done.is_set():
                return

    with ThreadPoolExecutor(1) as writer:
        saving = writer.submit(save)
        try:
            hashes = {checkpoint.load(tmp_path / 'p').hash for _ in range(80)}
        finally:
            done.set()
        saving.result()
    assert hashes == {policy.hash for policy in policies}


@pytest.mark.parametrize('place', ['/proc/none/p', 'file', 'file/p'])
def test_an_unusable_place_is_known_before_training(tmp_path, place):
    (tmp_path / 'file').write_text('')
    with pytest.raises(CheckpointError, match=place):
        checkpoint.require_writable(tmp_path / place)


def test_killed_while_saving_it_leaves_whole_checkpoints_only(tmp_path):
    program = ('import itertools\nfrom test_flow import make_flow\nfrom il_policies import checkpoint\n'
               'policy = make_flow()\n'
               f'for i in itertools.count(): checkpoint.save(r"{tmp_path}/" + str(i), policy, {{}})\n')
    process = subprocess.Popen([sys.executable, '-c', program], cwd=__file__.rpartition('/')[0])
    deadline = time.monotonic() + 60
    while not (tmp_path / '1').exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = [entry for entry in tmp_path.iterdir() if not entry.name.startswith('.')]
    assert len(saved) >= 2 and len({checkpoint.load(entry).hash for entry in saved}) == 1
    # A folder left half-written does not stand in the way.
    (tmp_path / '.p.new').mkdir()
    (tmp_path / '.p.new' / 'model.safetensors').write_bytes(b'half')
    checkpoint.save(tmp_path / 'p', make_flow(), {})
    checkpoint.load(tmp_path / 'p')
