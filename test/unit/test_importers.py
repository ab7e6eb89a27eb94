from __future__ import annotations

import numpy as np
import pytest

from il_policies.contract import ContractError, from_dict
from il_policies.data.errors import DataError
from il_policies.data.importers import NpzMapping, import_npz, load_mapping
from il_policies.data.store import Dataset

MAPPING = {
    'fps': 5,
    'episode_ends': 'ends',
    'action': {'array': 'act', 'names': ['u', 'v']},
    'action_offset': 0.2,
    'observations': {
        'pose': {'array': 'state', 'sin_cos': [1], 'names': ['x', 'sin', 'cos', 'y']},
        'points': {'array': 'kp'},
    },
}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        'act': random.normal(size=(9, 2)),
        'state': random.normal(size=(9, 3)).astype(np.float32),
        'kp': random.integers(0, 9, size=(9, 4, 2)),
        'ends': np.array([4, 9]),
    }


def run(tmp_path, arrays, mapping=MAPPING) -> Dataset:
    np.savez(tmp_path / 'a.npz', **arrays)
    return import_npz(tmp_path / 'a.npz', tmp_path / 'out', mapping and from_dict(NpzMapping, mapping, 'test'))


def test_import(tmp_path, arrays):
    dataset = run(tmp_path, arrays)
    assert [e['length'] for e in dataset.episodes] == [4, 5]
    assert dataset.info.fps == 5 and dataset.info.action.offset == 0.2 and dataset.info.contract is None
    assert dataset.info.features['points'].shape == (8,)
    table = dataset.lowdim(1)
    state = arrays['state'][4:]
    np.testing.assert_allclose(
        table['pose'], np.stack([state[:, 0], np.sin(state[:, 1]), np.cos(state[:, 1]), state[:, 2]], 1), rtol=1e-6
    )
    np.testing.assert_array_equal(table['points'], arrays['kp'][4:].reshape(5, 8))
    np.testing.assert_array_equal(table['action'], arrays['act'][4:].astype(np.float32))
    np.testing.assert_array_equal(table['stamp'], np.arange(5) * 200_000_000)


def test_without_mapping_the_file_explains_itself(tmp_path, arrays):
    with pytest.raises(DataError) as error:
        run(tmp_path, arrays, None)
    assert 'kp: int64, shape (9, 4, 2)' in str(error.value) and 'episode_ends: ' in str(error.value)


@pytest.mark.parametrize(
    'change, words',
    [
        ({'action': {'array': 'nope'}}, "no array 'nope'; there are: act, state, kp, ends"),
        ({'episode_ends': 'act'}, 'must be rising integers ending at the number of rows, 9'),
        ({'action': {'array': 'ends'}}, 'pose has 9 rows, the action 2'),
        ({'action': {'array': 'act', 'names': ['u']}}, 'act has 2 entries'),
        ({'observations': {'pose': {'array': 'state', 'sin_cos': [3]}}}, r'sin_cos names columns \[3\]'),
    ],
)
def test_refused_with_nothing_left(tmp_path, arrays, change, words):
    with pytest.raises(DataError, match=words):
        run(tmp_path, arrays, {**MAPPING, **change})
    assert [path.name for path in tmp_path.iterdir()] == ['a.npz']


def test_unreadable_files(tmp_path, arrays):
    mapping = from_dict(NpzMapping, MAPPING, 'test')
    with pytest.raises(DataError, match='no such file'):
        import_npz(tmp_path / 'b.npz', tmp_path / 'out', mapping)
    (tmp_path / 'b.npz').write_text('hello')
    with pytest.raises(DataError, match='not readable as .npz'):
        import_npz(tmp_path / 'b.npz', tmp_path / 'out', mapping)
    np.savez(tmp_path / 'b.npz', act=np.array([{}], dtype=object))  # a pickle inside
    with pytest.raises(DataError, match='without pickled objects'):
        import_npz(tmp_path / 'b.npz', tmp_path / 'out', mapping)
    run(tmp_path, arrays)
    with pytest.raises(DataError, match='exists already'):
        run(tmp_path, arrays)


def test_mapping_files(tmp_path, root):
    (tmp_path / 'm.yaml').write_text('fps: 10\nepisode_end: e\naction: {array: a}\nobservations: {}')
    with pytest.raises(ContractError, match='episode_end is not a known key'):
        load_mapping(tmp_path / 'm.yaml')
    assert load_mapping(root / 'config/imports/pusht.yaml').observations['pose'].sin_cos == (4,)


def test_pusht(tmp_path, root):
    source = root.parent / 'shared/data/pusht_lowdim.npz'
    if not source.exists():
        pytest.skip(f'{source} is not here')
    dataset = import_npz(source, tmp_path / 'pusht', load_mapping(root / 'config/imports/pusht.yaml'))
    assert (len(dataset), sum(e['length'] for e in dataset.episodes)) == (206, 25650)
    pose = dataset.lowdim(0)['pose']
    assert pose.shape == (161, 6)
    np.testing.assert_allclose(np.hypot(pose[:, 4], pose[:, 5]), 1, rtol=1e-6)
    np.testing.assert_allclose(
        pose[0], [222, 97, 222.99382, 381.59903, np.sin(3.0079994), np.cos(3.0079994)], rtol=1e-5
    )
