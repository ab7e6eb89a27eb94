from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from il_policies.data.errors import DataError
from il_policies.data.store import (
    ActionInfo,
    Dataset,
    DatasetInfo,
    Feature,
    create,
    place_episode,
    remove_episode,
    write_episode,
    write_episode_folder,
)
from recordings import jpeg, picture

INFO = DatasetInfo(
    fps=10.0,
    features={
        'pose': Feature((3,), 'lowdim', ('x', 'y', 'z')),
        'front': Feature((8, 12, 3), 'image'),
        'wrist.depth': Feature((4, 6, 1), 'depth'),
    },
    action=ActionInfo(('u', 'v'), 0.1),
    label='command',
)


def depth(seed: int, size=(4, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65536, (*size, 1), np.uint16)


def png(image: np.ndarray) -> bytes:
    return cv2.imencode('.png', image)[1].tobytes()


def episode(T: int, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    return {
        'lowdim': {'pose': random.normal(size=(T, 3))},
        'action': random.normal(size=(T, 2)),
        'stamps': 10**18 + np.arange(T) * 10**8,
        'filled': np.arange(T) == 1,
        'images': images(T),
    }


def images(T: int, **changes) -> dict:
    return {
        'front': [jpeg(picture(10 * t)) for t in range(T)],
        'wrist.depth': [png(depth(t)) for t in range(T)],
        **changes,
    }


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob('*')) if file.is_file()}


def write(path, index: int = 0, meta=None, report=None, **changes):
    meta = {'task': 'reach', 'success': True} if meta is None else meta
    report = {'n': 4} if report is None else report
    write_episode(path, index, **{**episode(4, index), **changes}, meta=meta, report=report)


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
    for t in range(4):
        image = dataset.image(1, 'wrist.depth', t)
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(image, depth(t))
        assert dataset.encoded(1, 'front', t) == images(4)['front'][t]
        assert dataset.encoded(1, 'wrist.depth', t) == images(4)['wrist.depth'][t]
    assert dataset.report(0) == {'n': 4}
    assert dataset.info.images == ['front', 'wrist.depth'] and dataset.info.lowdim == ['pose']


def test_images_of_a_camera_are_one_file_that_players_read(tmp_path):
    create(tmp_path, INFO)
    write(tmp_path, images=images(4, front=[jpeg(picture(60 * t)) for t in range(4)]))
    folder = Dataset(tmp_path).folders[0]
    assert sorted(contents(folder)) == ['episode.json', 'images/front.mjpeg', 'images/wrist.depth.png', 'lowdim.parquet',
                                        'report.json']
    with av.open(str(folder / 'images/front.mjpeg')) as file:
        frames = [frame.to_ndarray(format='gray') for frame in file.decode(video=0)]
    assert [round(frame.mean() / 60) for frame in frames] == [0, 1, 2, 3]
    with av.open(str(folder / 'images/wrist.depth.png')) as file:
        frames = [frame.to_ndarray() for frame in file.decode(video=0)]
    np.testing.assert_array_equal(frames, [depth(t)[..., 0] for t in range(4)])


def test_images_of_another_size_are_read_in_the_size_of_the_feature(tmp_path):
    create(tmp_path, INFO)
    large = np.where(np.arange(24)[None, :, None] < 12, 40, 200).astype(np.uint8).repeat(16, axis=0).repeat(3, axis=2)
    deep = np.where(np.arange(12)[None, :, None] < 6, 400, 2000).astype(np.uint16).repeat(8, axis=0)
    write(tmp_path, images={'front': [jpeg(large)] * 4, 'wrist.depth': [png(deep)] * 4})
    dataset = Dataset(tmp_path)
    assert dataset.encoded(0, 'front', 2) == jpeg(large)
    np.testing.assert_allclose(dataset.image(0, 'front', 2), large[::2, ::2], atol=3)
    np.testing.assert_array_equal(dataset.image(0, 'wrist.depth', 2), deep[::2, ::2])


def test_a_folder_written_anywhere_becomes_any_episode(tmp_path):
    """What lets several processes write episodes before it is known which numbers they get."""
    for name, indices in (('a', (0, 1)), ('b', (1, 0))):
        create(tmp_path / name, INFO)
        folders = {}
        for index in indices:
            folders[index] = tmp_path / f'{name}.{index}'
            meta = write_episode_folder(folders[index], INFO, **episode(4, index), meta={'task': str(index)}, report={})
            assert meta['length'] == 4 and 'index' not in meta
        assert Dataset(tmp_path / name).episodes == []
        for index in indices:
            place_episode(tmp_path / name, folders[index], index)
    for index in (0, 1):
        write(tmp_path / 'a', index, {'task': str(index)}, report={})
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert Dataset(tmp_path / 'a').hash == Dataset(tmp_path / 'b').hash
    assert [meta['index'] for meta in Dataset(tmp_path / 'a').episodes] == [0, 1]
    place_episode(tmp_path / 'a', tmp_path / 'a/episodes/000001', 0)
    assert [meta['task'] for meta in Dataset(tmp_path / 'a').episodes] == ['1']


def test_images_are_read_row_by_row(tmp_path):
    create(tmp_path, INFO)
    order = []

    def source(name):
        for t, data in enumerate(images(4)[name]):
            order.append((t, name))
            yield data

    write(tmp_path, images={name: source(name) for name in ('wrist.depth', 'front')})
    assert order == [(t, name) for t in range(4) for name in ('front', 'wrist.depth')]


def test_colours_keep_their_order(tmp_path):
    create(tmp_path, INFO)
    red = np.zeros((8, 12, 3), np.uint8)
    red[..., 0] = 200
    write(tmp_path, images=images(4, front=[jpeg(red)] * 4))
    image = Dataset(tmp_path).image(0, 'front', 0)
    assert image[..., 0].min() > 190 and image[..., 1:].max() < 10


def test_hash_is_of_the_content_only(tmp_path):
    for name in ('a', 'b'):
        create(tmp_path / name, INFO)
        write(tmp_path / name, meta={'task': 'reach', 'success': True, 'source': name}, report={'name': name})
    shutil.move(tmp_path / 'b', tmp_path / 'elsewhere')
    assert Dataset(tmp_path / 'a').hash == Dataset(tmp_path / 'elsewhere').hash


@pytest.mark.parametrize(
    'change',
    [
        {'lowdim': {'pose': episode(4)['lowdim']['pose'] + 1e-3}},
        {'action': episode(4)['action'][::-1]},
        {'stamps': episode(4)['stamps'] + 1},
        {'filled': np.ones(4, bool)},
        {'images': images(4, front=[jpeg(picture(10 * t + (t == 3))) for t in range(4)])},
        {'images': images(4, **{'wrist.depth': [png(depth(t + 1)) for t in range(4)]})},
        {'meta': {'task': 'push', 'success': True}},
        {'meta': {'task': 'reach', 'success': None}},
        {'index': 1},
    ],
)
def test_hash_is_of_all_content(tmp_path, change):
    create(tmp_path / 'a', INFO)
    create(tmp_path / 'b', INFO)
    write(tmp_path / 'a', **episode(4))
    write(tmp_path / 'b', **{**episode(4), **change})
    assert Dataset(tmp_path / 'a').hash != Dataset(tmp_path / 'b').hash


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'lowdim': {}}, r"low-dimensional features are \[\], must be \['pose'\]"),
        ({'lowdim': {'pose': np.zeros((4, 2))}}, r'pose has shape \(4, 2\), must be \(4, 3\)'),
        ({'action': np.array([[0, 0], [0, 0], [0, np.nan], [0, 0]])}, 'action is not finite in row 2'),
        ({'stamps': np.array([0, 2, 2, 3])}, 'stamps must rise; row 2 does not'),
        ({'action': np.full((4, 2), 1e300)}, 'action is not finite in row 0'),
        ({'images': images(1)}, '1 images of front for 4 rows'),
        ({'images': images(5)}, 'more images of front than its 4 rows'),
        ({'images': images(4, front=[b''] * 4)}, 'the image of row 0 is empty in front'),
        ({'images': {'front': []}}, r"image features are \['front'\], must be \['front', 'wrist.depth'\]"),
        ({'filled': np.zeros(3, bool)}, '4 stamps, 3 filled flags'),
    ],
)
def test_refused_whole(tmp_path, changes, words):
    create(tmp_path, INFO)
    with pytest.raises(DataError, match=f'E[23]0[35] {tmp_path.name} episode 0: .*{words}'):
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
        write(tmp_path, images=images(4, front=broken()))
    assert Dataset(tmp_path).hash == before


def test_interrupted_writes_are_not_seen_and_replaced(tmp_path):
    create(tmp_path, INFO)
    left = tmp_path / 'episodes' / '.000000.new'
    left.mkdir()
    (left / 'episode.json').write_text('{')
    assert Dataset(tmp_path).episodes == []
    write(tmp_path)
    write(tmp_path)
    assert len(Dataset(tmp_path)) == 1 and not left.exists()
    remove_episode(tmp_path, 0)
    assert Dataset(tmp_path).episodes == []


WRITER = '''
import sys
from test_store import *
while True:
    for seed in (0, 1):
        write(sys.argv[1], 0, {'task': str(seed)}, **episode(4, seed))
        print(seed, flush=True)
'''


def test_a_killed_writer_leaves_a_whole_episode(tmp_path):
    """Killed 3 times at any moment while it replaces one episode by another, over and over."""
    expected = []
    for seed in (0, 1):
        create(tmp_path / str(seed), INFO)
        write(tmp_path / str(seed), 0, {'task': str(seed)}, **episode(4, seed))
        expected.append(Dataset(tmp_path / str(seed)).hash)
    create(tmp_path / 'd', INFO)
    for pause in np.random.default_rng().uniform(0, 0.05, 3):
        writer = subprocess.Popen([sys.executable, '-c', WRITER, str(tmp_path / 'd')], cwd=Path(__file__).parent,
                                  stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        create(tmp_path / 'd', INFO)
        dataset = Dataset(tmp_path / 'd')
        assert dataset.hash in expected
        assert len(dataset.lowdim(0)['stamp']) == 4
        assert dataset.image(0, 'front', 3).shape == (8, 12, 3)
        np.testing.assert_array_equal(dataset.image(0, 'wrist.depth', 3), depth(3))
    write(tmp_path / 'd', 0, {'task': '0'}, **episode(4, 0))
    assert contents(tmp_path / 'd') == contents(tmp_path / '0')


def test_killed_between_two_renames(tmp_path):
    create(tmp_path, INFO)
    write(tmp_path)
    before, episodes = contents(tmp_path), tmp_path / 'episodes'
    (episodes / '000000').rename(episodes / '.000000.old')
    assert Dataset(tmp_path).episodes == []
    create(tmp_path, INFO)
    assert contents(tmp_path) == before
    for left in ('.000000.old', '.000001.removed'):
        (episodes / left).mkdir()
        (episodes / left / 'episode.json').touch()
    create(tmp_path, INFO)
    assert contents(tmp_path) == before


def test_create(tmp_path):
    other = DatasetInfo(fps=20.0, features=INFO.features, action=INFO.action, label='command')
    create(tmp_path / 'd', other)
    create(tmp_path / 'd', INFO)  # gives way while there are no episodes
    assert Dataset(tmp_path / 'd').info == INFO
    write(tmp_path / 'd')
    create(tmp_path / 'd', INFO)
    for name in ('000000', '.000000.old'):
        (tmp_path / 'd/episodes/000000').rename(tmp_path / 'd/episodes' / name)
        with pytest.raises(DataError, match='another fps'):
            create(tmp_path / 'd', other)
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
    create(tmp_path / 'e', INFO)
    write(tmp_path / 'e')
    dataset, images_of = Dataset(tmp_path / 'e'), tmp_path / 'e/episodes/000000/images'
    for t in (-1, 4, 9):
        with pytest.raises(DataError, match=f'E302 .*front.mjpeg: no row {t}, there are 4'):
            dataset.image(0, 'front', t)
    with pytest.raises(DataError, match=r"no images 'pose'; there are: front, wrist.depth"):
        dataset.image(0, 'pose', 0)
    whole = (images_of / 'front.mjpeg').read_bytes()
    (images_of / 'front.mjpeg').write_bytes(whole[:-1])
    dataset.image(0, 'front', 2)
    with pytest.raises(DataError, match='front.mjpeg: ends before the image of row 3'):
        dataset.image(0, 'front', 3)
    (images_of / 'front.mjpeg').write_bytes(bytes(len(whole)))
    with pytest.raises(DataError, match='E208 .*front.mjpeg, row 1: .* are no image'):
        dataset.image(0, 'front', 1)
    (images_of / 'front.mjpeg').unlink()
    with pytest.raises(DataError, match='front.mjpeg: not readable: No such file'):
        dataset.image(0, 'front', 0)
    meta = tmp_path / 'e/episodes/000000/episode.json'
    meta.write_text(meta.read_text().replace('"length": 4', '"length": 5'))
    with pytest.raises(DataError, match='4 rows, but episode.json says 5'):
        Dataset(tmp_path / 'e').lowdim(0)
    for text, words in (('{}', 'no length, content'), ('{"length": "34", "content": ""}', "length '34'"),
                        ('[]', 'holds no JSON object'), ('{', 'not readable')):
        meta.write_text(text)
        with pytest.raises(DataError, match=f'E302 .*episode.json: .*{words}'):
            Dataset(tmp_path / 'e')


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize('name, damage, words', [
    ('images/front.mjpeg', cut, 'front.mjpeg: .* bytes, not the'), ('images/front.mjpeg', flip, 'front.mjpeg or .* is damaged'),
    ('images/wrist.depth.png', Path.unlink, 'wrist.depth.png: not readable'), ('lowdim.parquet', cut, 'lowdim.parquet: not read'),
    ('lowdim.parquet', lambda file: file.write_bytes(file.read_bytes().replace(np.float64(1).tobytes(), b'')[:40]),
     'lowdim.parquet: not readable'),
    ('report.json', Path.unlink, 'report.json: not readable'),
    ('episode.json', lambda file: file.write_text(file.read_text().replace('reach', 'push')), 'episode.json is damaged')])
def test_verify(tmp_path, name, damage, words):
    create(tmp_path, INFO)
    write(tmp_path, 0)
    write(tmp_path, 1)
    for i in (0, 1):
        Dataset(tmp_path).verify(i)
    damage(tmp_path / 'episodes/000001' / name)
    dataset = Dataset(tmp_path)
    dataset.verify(0)
    with pytest.raises(DataError, match=f'E302 .*000001.*{words}'):
        dataset.verify(1)


def test_folders_without_a_description_are_named(tmp_path):
    create(tmp_path, INFO)
    write(tmp_path)
    (tmp_path / 'episodes/000001_backup').mkdir()
    assert len(Dataset(tmp_path)) == 1
    (tmp_path / 'episodes/000007').mkdir()
    with pytest.raises(DataError, match='E302 .*000007: no whole episode'):
        Dataset(tmp_path)


def test_another_format_says_what_to_do(tmp_path):
    create(tmp_path, INFO)
    content = json.loads((tmp_path / 'dataset.json').read_text())
    for other in (1, 3):
        (tmp_path / 'dataset.json').write_text(json.dumps({**content, 'format': other}))
        with pytest.raises(DataError, match=f'dataset format is {other}; this version reads 2: convert the bags again'):
            Dataset(tmp_path)


def test_episodes_are_in_the_order_of_their_numbers(tmp_path):
    create(tmp_path, INFO)
    for index in (999_999, 1_000_000, 3):
        write(tmp_path, index)
    (tmp_path / 'episodes/7 (copy)').mkdir()
    shutil.copy(tmp_path / 'episodes/000003/episode.json', tmp_path / 'episodes/7 (copy)')
    assert [meta['index'] for meta in Dataset(tmp_path).episodes] == [3, 999_999, 1_000_000]


@pytest.mark.parametrize('shape, kind', [((8, 12), 'image'), ((8, 12, 1), 'image'), ((8, 12, 3), 'depth'), ((8, 1), 'lowdim'),
                                         ((), 'lowdim'), ((0,), 'lowdim'), ((8, 0, 3), 'image')])
def test_shapes_that_make_no_sense(shape, kind):
    with pytest.raises(ValueError, match='shape'):
        Feature(shape, kind)


@pytest.mark.parametrize('name', ['stamp', 'a/b', '../x', ''])
def test_feature_names_are_safe(name):
    with pytest.raises(ValueError, match='is no feature name'):
        DatasetInfo(fps=10.0, features={name: Feature((3,), 'lowdim')}, action=ActionInfo(('u',)), label='command')
