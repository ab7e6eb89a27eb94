"""Training windows at the size of a real dataset: speed, and a cache whose builders are killed."""
from __future__ import annotations

import os
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode
from il_policies.data.windows import Windows

E, T = 30, 60
KILLS = 10 if float(os.environ.get('IL_SOAK_MINUTES', 2)) <= 2 else 50


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Dataset:
    """30 episodes of 2 s at 30 Hz, one camera of 240 x 320 with some grain, 38 KB a frame: 400 MiB decoded."""
    path = tmp_path_factory.mktemp('windows') / 'data'
    create(path, DatasetInfo(30.0, {'joints': Feature((7,), 'lowdim'), 'front': Feature((240, 320, 3), 'image')},
                             ActionInfo(tuple('abcdefg')), 'command'))
    random = np.random.default_rng(0)
    scene = cv2.resize(random.integers(0, 256, (40, 50, 3), np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC).astype(int)
    grain = random.normal(0, 2, (64, 240, 320, 3)).round().astype(int)
    for e in range(E):
        frames = [np.clip(np.roll(scene, (t, e), (1, 0)) + grain[t % 64], 0, 255).astype(np.uint8) for t in range(T)]
        write_episode(path, e, {'joints': random.normal(size=(T, 7))}, random.normal(size=(T, 7)), np.arange(T) * 33_333_333,
                      np.zeros(T, bool), {'front': [cv2.imencode('.jpg', f, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
                                                    for f in frames]}, {}, {})
    return Dataset(path)


BUILDER = '''
import sys
from il_policies.data.store import Dataset
from il_policies.data.windows import Windows
Windows(Dataset(sys.argv[1]), ['front'], 1, 1)
'''


def test_killed_builders_leave_whole_files(dataset):
    """The cache grows from kill to kill, and in the end holds what the dataset holds."""
    random, sizes = np.random.default_rng(), []
    for _ in range(KILLS):
        builder = subprocess.Popen([sys.executable, '-c', BUILDER, str(dataset.path)], stderr=subprocess.PIPE)
        builder.stderr.readline()  # says that it begins, unless it finds nothing left to do
        time.sleep(random.uniform(0, 2))
        builder.kill()
        builder.communicate()
        files = list((dataset.path / 'cache').glob('*.npy'))
        sizes.append(len(files))
        assert all(np.load(file, mmap_mode='r').shape == (T, 240, 320, 3) for file in files)
    assert sizes == sorted(sizes)
    windows = Windows(dataset, ['front'], 1, 1)
    assert not list((dataset.path / 'cache').glob('.*.new'))
    rows = random.integers(0, E * T, 200)
    images = windows.batch(rows)['observation']['front'][:, 0]
    for image, row in zip(images, rows.tolist()):
        np.testing.assert_array_equal(image, dataset.image(row // T, 'front', row % T))
    print(f'{KILLS} builders killed: {sizes} of {E} files after each')


@pytest.mark.parametrize('cache, usual', [(True, 10_000), (False, 1_200)])
def test_windows_per_cpu_second(dataset, cache, usual):
    """Batches of 64, history 1, in any order; asserted with room for machines of half the speed."""
    assert len(dataset.encoded(0, 'front', 0)) > 30_000  # no easier to decode than a camera's
    windows, random = Windows(dataset, ['joints', 'front'], 1, 16, cache=cache), np.random.default_rng(0)
    rates = []
    for _ in range(8):
        start, batches = time.process_time(), 50 if cache else 5
        for _ in range(batches):
            windows.batch(random.integers(0, len(windows), 64))
        rates.append(64 * batches / (time.process_time() - start))
    print(f'{"cache" if cache else "JPEG"}: {np.median(rates):.0f} windows per CPU-second, at best {max(rates):.0f}')
    assert max(rates) > usual / 2
