from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from il_policies import cli
from test_train import make_dataset

MODULE = [sys.executable, '-m', 'il_policies.cli']


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp('cli') / 'data').path


@pytest.fixture
def il(capsys):
    """Runs the command in this process: arguments → (exit code, stdout, stderr)."""
    def run(*arguments):
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()
    return run


def test_help_names_the_commands_without_torch():
    program = ('import sys\nfrom il_policies import cli\n'
               'try: cli.main(["--help"])\nexcept SystemExit as end: assert end.code == 0\n'
               'assert not {"torch", "mujoco", "cv2", "pyarrow"} & set(sys.modules)')
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f'il {name}' in result.stdout for name in ('convert', 'import npz', 'train', 'evaluate'))


@pytest.mark.parametrize('command', ['convert', 'import npz', 'evaluate', 'train'])
def test_help_of_a_command(command, il):
    code, out, _ = il(*command.split(), '--help')
    assert code == 0 and f'usage: il {command}' in out


def test_help_of_train_shows_units_and_the_presets_defaults(il, root):
    _, out, _ = il('train', '--preset', root / 'config/policies/flow_pusht.yaml', '--help')
    text = ' '.join(out.replace('│', ' ').split())
    assert '[min]' in text and '(default: 90)' in text


def test_wrong_input_is_one_line_and_2(il, dataset, tmp_path):
    (tmp_path / 'wrong.yaml').write_text('polcy: flow')
    out, train = tmp_path / 'out', ('train', dataset, '--out', tmp_path / 'out')
    for arguments, message in (
            (('dance',), "no command 'dance'; valid: convert"),
            (('train', tmp_path, '--out', out, '--steps', 1), 'no dataset here'),
            (train, 'no budget: give steps or minutes'),
            ((*train, '--preset', tmp_path / 'absent.yaml'), 'no such file; beside it: wrong.yaml'),
            ((*train, '--preset', tmp_path / 'wrong.yaml'), 'polcy is not a known key'),
            ((*train, '--steps', 1, '--observations', 'front', '--vision.frames', 3), 'vision.frames is 3.*the history, 2'),
            ((*train, '--steps', 1, '--observations', 'wrist'), 'wrist'),
            ((*train, '--steps', 1, '--horizon', 18), 'horizon is 18.*such as 20'),
            (('evaluate', tmp_path, '--task', 'pusht'), 'no readable checkpoint'),
            (('import', 'npz', tmp_path / 'x.npz', '--out', out), 'no such file'),
            (('convert', tmp_path, '--out', out, '--contract', tmp_path / 'absent.yaml'), 'no such file')):
        code, _, err = il(*arguments)
        assert code == 2 and len(err.strip().splitlines()) == 1 and err.startswith('il: '), err
        assert re.search(message, err), err
    assert not out.exists()


def test_wrong_arguments_are_explained(il, dataset):
    code, _, err = il('train', dataset)
    assert code == 2 and '--out' in err
    code, _, err = il('train', dataset, '--out', 'p', '--steps', -1)
    assert code == 2 and 'steps is -1, must be > 0' in err


def test_train_makes_a_checkpoint(il, dataset, tmp_path):
    code, out, _ = il('train', dataset, '--out', tmp_path / 'p', '--policy', 'bc', '--steps', 10, '--unet.down-dims', 16,
                      32, '--threads', 1, '--where', 'side=left')
    assert code == 0 and '10 steps' in out and '4 of 8 episodes' in out
    description = json.loads((tmp_path / 'p' / 'policy.json').read_text())
    assert description['kind'] == 'bc' and description['config']['unet']['down_dims'] == [16, 32]
    code, _, err = il('evaluate', tmp_path / 'p', '--task', 'pusht')
    assert code == 2 and 'pusht: the policy sees' in err


def test_import_npz(il, tmp_path, root):
    rows = 20
    np.savez(tmp_path / 'demo.npz', state=np.random.rand(rows, 5), keypoint=np.random.rand(rows, 9, 2),
             action=np.random.rand(rows, 2), episode_ends=np.array([8, rows]))
    mapping = root / 'config/imports/pusht.yaml'
    code, out, _ = il('import', 'npz', tmp_path / 'demo.npz', '--out', tmp_path / 'out', '--mapping', mapping)
    assert code == 0 and '2 episodes, 20 rows at 10 Hz' in out


def test_as_a_process(dataset, tmp_path):
    """Exit codes reach the shell; Ctrl-C is one line and 130, and leaves what goes on with --resume."""
    output = str(tmp_path / 'p')
    result = subprocess.run([*MODULE, 'train', str(tmp_path), '--out', output, '--steps', '1'], capture_output=True,
                            text=True)
    assert result.returncode == 2 and result.stderr.strip().endswith('no dataset here (dataset.json is absent)')
    process = subprocess.Popen([*MODULE, 'train', str(dataset), '--out', output, '--minutes', '0.2', '--threads',
                                '1', '--unet.down-dims', '16', '32'], stderr=subprocess.PIPE, text=True,
                               # A shell's background job inherits Ctrl-C ignored.
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert '%  step ' in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1].strip().splitlines()
    assert process.returncode == 130 and not any('Traceback' in line for line in rest)
    assert rest[-1].startswith('il: interrupted at step ') and rest[-1].endswith('go on with --resume')
    assert [entry.name for entry in tmp_path.iterdir()] == ['p'] and (tmp_path / 'p' / 'training').is_dir()
