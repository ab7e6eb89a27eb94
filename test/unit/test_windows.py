from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from il_policies.data.errors import DataError
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode
from il_policies.data.windows import Windows
from recordings import jpeg, picture

LENGTHS = (3, 1, 7)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Dataset:
    """Entries tell episode and row.

    x = 100·episode + row, action = -x, image grey 10·row + 80·episode, depth 1000·episode + row.
    """
    path = tmp_path_factory.mktemp('windows')
    create(
        path,
        DatasetInfo(
            fps=10.0,
            features={
                'x': Feature((1,), 'lowdim'),
                'front': Feature((8, 12, 3), 'image'),
                'deep': Feature((2, 3, 1), 'depth'),
            },
            action=ActionInfo(('u',)),
            label='command',
        ),
    )
    for e, T in enumerate(LENGTHS):
        x = 100.0 * e + np.arange(T)[:, None]
        write_episode(
            path,
            e,
            {'x': x},
            -x,
            np.arange(T),
            np.zeros(T, bool),
            {
                'front': [jpeg(picture(10 * t + 80 * e)) for t in range(T)],
                'deep': [cv2.imencode('.png', np.full((2, 3), 1000 * e + t, np.uint16))[1].tobytes() for t in range(T)],
            },
            {},
            {},
        )
    return Dataset(path)


@settings(max_examples=40, deadline=None)
@given(
    history=st.integers(1, 5),
    horizon=st.integers(1, 9),
    chosen=st.permutations(range(3)).flatmap(lambda order: st.sampled_from([order[:n] for n in (1, 2, 3)])),
    cache=st.booleans(),
)
def test_against_brute_force(dataset, history, horizon, chosen, cache):
    windows = Windows(dataset, ['x', 'front', 'deep'], history, horizon, chosen, cache)
    batch = windows.batch(np.arange(len(windows)))
    row = 0
    for e in chosen:
        for t in range(LENGTHS[e]):
            past = [max(t - history + 1 + k, 0) for k in range(history)]
            assert batch['observation']['x'][row, :, 0].tolist() == [100 * e + p for p in past]
            assert (
                np.abs(
                    batch['observation']['front'][row, :, 0, 0, 0].astype(int) - [10 * p + 80 * e for p in past]
                ).max()
                <= 1
            )
            assert batch['observation']['deep'][row, :, 1, 2, 0].tolist() == [1000 * e + p for p in past]
            assert batch['action'][row, :, 0].tolist() == [
                -(100 * e + min(t + k, LENGTHS[e] - 1)) for k in range(horizon)
            ]
            assert batch['valid'][row].tolist() == [t + k < LENGTHS[e] for k in range(horizon)]
            row += 1
    assert row == len(windows)


def test_shapes_and_types(dataset):
    windows = Windows(dataset, ['front', 'x', 'deep'], 2, 4)
    assert windows.images == ['front', 'deep'] and list(windows.lowdim) == ['x'] and len(windows) == sum(LENGTHS)
    batch = windows.batch([5, 0, 5])
    assert {name: (value.shape, value.dtype) for name, value in batch['observation'].items()} == {
        'x': ((3, 2, 1), np.float32),
        'front': ((3, 2, 8, 12, 3), np.uint8),
        'deep': ((3, 2, 2, 3, 1), np.uint16),
    }
    assert batch['action'].shape == (3, 4, 1) and batch['action'].dtype == np.float32
    assert batch['valid'].shape == (3, 4) and batch['valid'].dtype == bool


def test_refused(dataset):
    with pytest.raises(DataError, match=r"no features \['y'\]; there are: \['x', 'front', 'deep'\]"):
        Windows(dataset, ['y'], 1, 1)
    with pytest.raises(DataError, match=r'no episodes \[3\]; there are 3'):
        Windows(dataset, ['x'], 1, 1, [0, 3])
    with pytest.raises(DataError, match='no episodes chosen'):
        Windows(dataset, ['x'], 1, 1, [])
    with pytest.raises(DataError, match='horizon 0'):
        Windows(dataset, ['x'], 1, 0)
