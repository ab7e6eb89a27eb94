from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from il_policies.data.errors import DataError
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, remove_episode, write_episode
from recordings import jpeg, picture

INFO = DatasetInfo(
    fps=10.0,
    features={'pose': Feature((3,), 'lowdim', ('x', 'y', 'z')), 'front': Feature((8, 12, 3), 'image')},
    action=ActionInfo(('u', 'v'), 0.1),
    label='command',
)


def episode(T: int, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    return {
        'lowdim': {'pose': random.normal(size=(T, 3))},
        'action': random.normal(size=(T, 2)),
        'stamps': 10**18 + np.arange(T) * 10**8,
        'filled': np.arange(T) == 1,
        'images': {'front': [jpeg(picture(10 * t)) for t in range(T)]},
    }


def write(path, index: int = 0, meta=None, **changes):
    write_episode(
        path,
        index,
        **{**episode(4, index), **changes},
        meta=meta or {'task': 'reach', 'success': True},
        report={'n': 4},
    )


def test_what_is_written_is_read(tmp_path):
    create(tmp_path / 'd', INFO)
    write(tmp_path / 'd', 1)
    write(tmp_path / 'd', 0, {'task': 'reach', 'success': False, 'source': 'bag'})
    dataset = Dataset(tmp_path / 'd')
    assert dataset.info == INFO
    assert [(e['index'], e['length'], e['success'], e['source']) for e in dataset.episodes] == [
        (0, 4, False, 'bag'),
        (1, 4, True, ''),
    ]
    for i in range(2):
        table, written = dataset.lowdim(i), episode(4, i)
        np.testing.assert_array_equal(table['pose'], written['lowdim']['pose'].astype(np.float32))
        np.testing.assert_array_equal(table['action'], written['action'].astype(np.float32))
        np.testing.assert_array_equal(table['stamp'], written['stamps'])
        np.testing.assert_array_equal(table['filled'], [False, True, False, False])
        assert table['stamp'].dtype == np.int64 and table['filled'].dtype == bool
    assert dataset.image(0, 'front', 3).shape == (8, 12, 3)
    np.testing.assert_allclose(dataset.image(0, 'front', 3), 30, atol=1)
    assert dataset.report(0) == {'n': 4}


def test_colours_keep_their_order(tmp_path):
    create(tmp_path, INFO)
    red = np.zeros((8, 12, 3), np.uint8)
    red[..., 0] = 200
    write(tmp_path, images={'front': [jpeg(red)] * 4})
    image = Dataset(tmp_path).image(0, 'front', 0)
    assert image[..., 0].min() > 190 and image[..., 1:].max() < 10


def test_hash_is_of_the_content_only(tmp_path):
    for name in ('a', 'b', 'c'):
        create(tmp_path / name, INFO)
        write(tmp_path / name, meta={'task': 'reach', 'success': True, 'source': name})
    shutil.move(tmp_path / 'b', tmp_path / 'elsewhere')
    write(tmp_path / 'c', lowdim={'pose': episode(4)['lowdim']['pose'] + 1e-3}, meta={'task': 'reach', 'success': True})
    a, b, c = (Dataset(tmp_path / name).hash for name in ('a', 'elsewhere', 'c'))
    assert a == b != c


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'lowdim': {}}, r"low-dimensional features are \[\], must be \['pose'\]"),
        ({'lowdim': {'pose': np.zeros((4, 2))}}, r'pose has shape \(4, 2\), must be \(4, 3\)'),
        ({'action': np.array([[0, 0], [0, 0], [0, np.nan], [0, 0]])}, 'action is not finite in row 2'),
        ({'stamps': np.array([0, 2, 2, 3])}, 'stamps must rise; row 2 does not'),
        ({'images': {'front': [b'']}}, '1 images of front for 4 rows'),
        ({'filled': np.zeros(3, bool)}, '4 stamps, 3 filled flags'),
    ],
)
def test_refused_whole(tmp_path, changes, words):
    create(tmp_path, INFO)
    with pytest.raises(DataError, match=words):
        write(tmp_path, **changes)
    assert list((tmp_path / 'episodes').iterdir()) == []


def test_an_error_in_the_images_leaves_the_old_episode(tmp_path):
    create(tmp_path, INFO)
    write(tmp_path)
    before = Dataset(tmp_path).hash

    def broken():
        yield jpeg(picture(0))
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        write(tmp_path, images={'front': broken()})
    assert Dataset(tmp_path).hash == before


def test_interrupted_writes_are_not_seen_and_replaced(tmp_path):
    create(tmp_path, INFO)
    left = tmp_path / 'episodes' / '.000000.new'
    left.mkdir()
    (left / 'episode.json').write_text('{')
    (tmp_path / 'episodes' / '000007').mkdir()
    assert Dataset(tmp_path).episodes == []
    write(tmp_path)
    write(tmp_path)
    assert len(Dataset(tmp_path)) == 1 and not left.exists()
    remove_episode(tmp_path, 0)
    assert Dataset(tmp_path).episodes == []


def test_create(tmp_path):
    create(tmp_path / 'd', INFO)
    create(tmp_path / 'd', INFO)
    with pytest.raises(DataError, match='another fps'):
        create(tmp_path / 'd', DatasetInfo(fps=20.0, features=INFO.features, action=INFO.action, label='command'))
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'thesis.tex').touch()
    with pytest.raises(DataError, match='is no dataset'):
        create(tmp_path / 'other', INFO)


def test_unreadable(tmp_path):
    with pytest.raises(DataError, match='no dataset here'):
        Dataset(tmp_path)
    create(tmp_path / 'd', INFO)
    write(tmp_path / 'd')
    (tmp_path / 'd/episodes/000000/lowdim.parquet').write_bytes(b'PAR1')
    with pytest.raises(DataError, match='lowdim.parquet: not readable'):
        Dataset(tmp_path / 'd').lowdim(0)
    with pytest.raises(DataError, match='000009.jpg: absent'):
        Dataset(tmp_path / 'd').image(0, 'front', 9)
    content = json.loads((tmp_path / 'd/dataset.json').read_text())
    (tmp_path / 'd/dataset.json').write_text(json.dumps({**content, 'format': 2}))
    with pytest.raises(DataError, match='dataset format is 2; this version reads 1'):
        Dataset(tmp_path / 'd')


@pytest.mark.parametrize('name', ['stamp', 'a/b', '../x', ''])
def test_feature_names_are_safe(name):
    with pytest.raises(ValueError, match='is no feature name'):
        DatasetInfo(fps=10.0, features={name: Feature((3,), 'lowdim')}, action=ActionInfo(('u',)), label='command')
