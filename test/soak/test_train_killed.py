"""Trainings killed at random times, most of them while saving: what is there loads, and going on ends where none was killed."""
from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from il_policies import checkpoint
from il_policies.checkpoint import CheckpointError
from test_train import make_dataset

KILLS = int(os.environ.get('IL_KILLS', 10))
STEPS = 40 * KILLS


def start(dataset: Path, out: Path, log: Path) -> subprocess.Popen:
    """`il train` on one thread, saving after every second step."""
    command = [sys.executable, '-m', 'il_policies.cli', 'train', dataset, '--out', out, '--resume', '--steps', STEPS,
               '--unet.down-dims', 16, 32, '--horizon', 8, '--threads', 1, '--save-steps', 2, '--validation', 0.25,
               '--validate-steps', 10, '--device', 'cpu']
    with open(log, 'a') as stream:
        return subprocess.Popen(list(map(str, command)), stdout=stream, stderr=stream)


def steps_of(out: Path) -> int:
    """Steps of the checkpoint at `out`, 0 if there is none."""
    try:
        return checkpoint.load(out).extra['training']['steps']
    except CheckpointError:
        return 0


@pytest.mark.timeout(60 * KILLS + 300)
def test_killed_at_any_time_a_checkpoint_loads_and_training_goes_on(tmp_path):
    dataset = make_dataset(tmp_path / 'data').path
    out, log = tmp_path / 'p', tmp_path / 'log'
    rng = random.Random(0)
    reached, kills = 0, 0
    while kills < KILLS:
        process = start(dataset, out, log)
        deadline = time.monotonic() + 120
        while steps_of(out) <= reached and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 0.5))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        steps = checkpoint.load(out).extra['training']['steps']
        assert steps > reached, f'kill {kills}: at step {steps} after {reached}: {log.read_text()[-2000:]}'
        if (checkpoint.present(out) / 'best').exists():
            checkpoint.load(checkpoint.present(out) / 'best')
        reached = steps
    assert kills == KILLS or reached > 0, log.read_text()[-2000:]
    for place in (out, tmp_path / 'whole'):
        assert start(dataset, place, log).wait(600) == 0, log.read_text()[-2000:]
    killed, whole = checkpoint.load(out), checkpoint.load(tmp_path / 'whole')
    assert all(torch.equal(a, b) for a, b in zip(killed.state_dict().values(), whole.state_dict().values()))
    assert {entry.name for entry in tmp_path.iterdir()} == {'data', 'p', 'whole', 'log'}, 'nothing half-written is left'
    print(f'{kills} kills at steps up to {reached} of {STEPS}')
