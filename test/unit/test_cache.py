from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from il_policies.data import cache
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, remove_episode, write_episode
from il_policies.data.windows import Windows

SHAPE = (12, 16)
INFO = DatasetInfo(
    fps=10.0,
    features={'front': Feature((*SHAPE, 3), 'image'), 'deep': Feature((6, 8, 1), 'depth')},
    action=ActionInfo(('u',)),
    label='command',
)


def encode(suffix: str, image: np.ndarray) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def write(path, index: int, T: int, seed: int, info: DatasetInfo = INFO):
    """An episode of T rows of noise."""
    random = np.random.default_rng(seed)
    images = {
        name: [
            encode('.jpg', random.integers(0, 256, feature.shape, np.uint8))
            if feature.kind == 'image'
            else encode('.png', random.integers(0, 65536, feature.shape, np.uint16))
            for _ in range(T)
        ]
        for name, feature in info.features.items()
    }
    write_episode(path, index, {}, np.zeros((T, 1)), np.arange(T), np.zeros(T, bool), images, {}, {})


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    create(tmp_path / 'd', INFO)
    for index, T in enumerate((5, 1, 40)):
        write(tmp_path / 'd', index, T, index)
    return Dataset(tmp_path / 'd')


def everything(windows: Windows) -> dict[str, np.ndarray]:
    return windows.batch(np.arange(len(windows)))['observation']


def assert_same(dataset: Dataset, windows: Windows):
    """Images of the windows are those that the dataset gives one by one."""
    observed = everything(windows)
    for name, feature in dataset.info.features.items():
        single = [dataset.image(i, name, t) for i in range(len(dataset)) for t in range(dataset.episodes[i]['length'])]
        assert observed[name].dtype == feature.dtype
        np.testing.assert_array_equal(observed[name][:, -1], single)


def spoil(dataset: Dataset):
    """Make every image undecodable: what is still read comes from the cache."""
    for folder in dataset.folders:
        for file in (folder / 'images').iterdir():
            file.write_bytes(bytes(file.stat().st_size))


def files(dataset: Dataset) -> list[str]:
    return sorted(file.name for file in (dataset.path / 'cache').glob('*.npy'))


def test_cached_images_are_the_decoded_ones(dataset):
    fresh = Windows(dataset, ['front', 'deep'], 2, 1)
    assert_same(dataset, fresh)
    assert_same(dataset, Windows(dataset, ['front', 'deep'], 1, 1, cache=False))
    assert len(files(dataset)) == 6
    for i, meta in enumerate(dataset.episodes):  # any tool reads them
        file = dataset.path / f'cache/{meta["content"][:32]}.deep.6x8x1.npy'
        np.testing.assert_array_equal(np.load(file), [dataset.image(i, 'deep', t) for t in range(meta['length'])])
    expected = everything(fresh)
    spoil(dataset)
    for windows in (fresh, Windows(Dataset(dataset.path), ['front', 'deep'], 2, 1)):
        for name, images in everything(windows).items():
            np.testing.assert_array_equal(images, expected[name])


def test_nothing_is_written_unless_wanted(dataset):
    Windows(dataset, ['front', 'deep'], 1, 1, cache=False)
    Windows(dataset, [], 1, 1)
    assert not (dataset.path / 'cache').exists()


def test_only_what_is_wanted_is_cached(dataset):
    Windows(dataset, ['deep'], 1, 1, [0, 2])
    assert len(files(dataset)) == 2


def test_deleted_while_it_is_used(dataset):
    windows = Windows(dataset, ['front', 'deep'], 2, 1)
    for name in files(dataset)[::2]:
        (dataset.path / 'cache' / name).unlink()
    assert_same(dataset, windows)
    for name in files(dataset):
        (dataset.path / 'cache' / name).unlink()
    assert_same(dataset, windows)
    assert_same(dataset, Windows(dataset, ['front', 'deep'], 2, 1))
    assert len(files(dataset)) == 6


@pytest.mark.parametrize('length', [0, 7, 100, -1])
def test_damaged_files_are_made_again(dataset, length):
    Windows(dataset, ['front', 'deep'], 1, 1)
    for file in (dataset.path / 'cache').glob('*.npy'):
        file.write_bytes(file.read_bytes()[:length])
    assert_same(dataset, Windows(dataset, ['front', 'deep'], 1, 1))


def test_replaced_and_removed_episodes_are_never_taken_from_the_cache(dataset):
    Windows(dataset, ['front', 'deep'], 1, 1)
    kept = files(dataset)
    write(dataset.path, 0, 5, 99)
    remove_episode(dataset.path, 1)
    (dataset.path / 'cache/.left.npy.new').touch()
    changed = Dataset(dataset.path)
    assert_same(changed, Windows(changed, ['front', 'deep'], 1, 1))
    assert len(files(dataset)) == 4 and len(set(files(dataset)) & set(kept)) == 2
    assert not (dataset.path / 'cache/.left.npy.new').exists()


def test_the_size_of_a_feature_is_part_of_the_key(tmp_path):
    infos = [DatasetInfo(10.0, {'front': Feature(shape, 'image')}, ActionInfo(('u',)), 'command')
             for shape in ((12, 16, 3), (6, 8, 3))]
    for name, info in zip('ab', infos):
        create(tmp_path / name, info)
        write(tmp_path / name, 0, 3, 0, infos[0])  # the same images for both
        (tmp_path / name / 'cache').symlink_to(tmp_path / 'cache')
    (tmp_path / 'cache').mkdir()
    for name in ('a', 'b', 'a'):
        dataset = Dataset(tmp_path / name)
        assert_same(dataset, Windows(dataset, ['front'], 1, 1))


def test_no_space_is_no_failure(dataset, capfd, monkeypatch):
    monkeypatch.setattr(cache, 'RESERVE', 1 << 60)
    assert_same(dataset, Windows(dataset, ['front', 'deep'], 1, 1))
    assert files(dataset) == []
    error = capfd.readouterr().err
    assert 'do not fit into' in error and 'decoded for every batch' in error and error.count('\n') == 1


def test_a_folder_that_cannot_be_written_is_no_failure(dataset, capfd):
    (dataset.path / 'cache').touch()
    assert_same(dataset, Windows(dataset, ['front', 'deep'], 1, 1))
    assert 'd/cache: File exists; images are decoded for every batch' in capfd.readouterr().err


def python(program: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', program, *map(str, arguments)], cwd=Path(__file__).parent,
                          capture_output=True, text=True, timeout=60)


LIMITED = '''
import resource, sys
from test_cache import *
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
dataset = Dataset(sys.argv[1])
assert_same(dataset, Windows(dataset, ['front', 'deep'], 1, 1))
'''


def test_a_disk_that_fills_up_is_no_failure(dataset):
    """Writing fails in the middle of a file, in a process that may write no longer ones."""
    run = python(LIMITED, dataset.path)
    assert run.returncode == 0, run.stderr
    assert 'File too large; images are decoded' in run.stderr
    assert 0 < len(files(dataset)) < 6 and not list((dataset.path / 'cache').glob('.*.new'))
    assert_same(dataset, Windows(dataset, ['front', 'deep'], 1, 1))


BUILDER = '''
import sys
from test_cache import *
dataset = Dataset(sys.argv[1])
print(flush=True)
sys.stdin.readline()
assert_same(dataset, Windows(dataset, ['front', 'deep'], 1, 1))
'''


def test_two_processes_at_once(dataset):
    builders = [subprocess.Popen([sys.executable, '-c', BUILDER, str(dataset.path)], cwd=Path(__file__).parent, text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for builder in builders:
        builder.stdout.readline()
    for builder in builders:
        builder.stdin.write('\n')
        builder.stdin.flush()
    for builder in builders:
        _, error = builder.communicate()
        assert builder.returncode == 0, error
    assert len(files(dataset)) == 6


MEMORY = '''
import sys
from test_cache import *
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20
dataset = Dataset(sys.argv[1])
Windows(dataset, ['front'], 1, 1, [0])
before = resident()
windows = Windows(dataset, ['front'], 1, 1, [1])
built = resident()
for begin in range(0, 512, 16):
    windows.batch(np.arange(begin, begin + 16))
print(built - before, resident() - before)
'''


def test_memory_stays_small(tmp_path):
    """512 images, 113 MiB decoded: neither to build the cache nor to read it takes more than a few of them at a time."""
    create(tmp_path, DatasetInfo(10.0, {'front': Feature((240, 320, 3), 'image')}, ActionInfo(('u',)), 'command'))
    flat = encode('.jpg', np.zeros((240, 320, 3), np.uint8))
    for index, T in enumerate((64, 512)):
        write_episode(tmp_path, index, {}, np.zeros((T, 1)), np.arange(T), np.zeros(T, bool), {'front': [flat] * T}, {}, {})
    run = python(MEMORY, tmp_path)
    assert run.returncode == 0, run.stderr
    building, reading = map(float, run.stdout.split())
    assert building < 30 and reading < 40, run.stdout


def test_reading_is_several_times_as_fast_as_decoding(tmp_path):
    """Per CPU-second, 240 x 320, batches of 64: about 20 times, here with noise in both and a margin."""
    info = DatasetInfo(10.0, {'front': Feature((240, 320, 3), 'image')}, ActionInfo(('u',)), 'command')
    create(tmp_path, info)
    write(tmp_path, 0, 64, 0, info)
    dataset, seconds = Dataset(tmp_path), []
    for cached in (True, False):
        windows = Windows(dataset, ['front'], 1, 1, cache=cached)
        trials = []
        for _ in range(3):
            start = time.process_time()
            windows.batch(np.arange(64))
            trials.append(time.process_time() - start)
        seconds.append(min(trials))
    assert seconds[0] < seconds[1] / 4
