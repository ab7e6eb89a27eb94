from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import zarr
from numcodecs import Blosc, Zstd

from il_policies import cli
from il_policies.contract import ContractError, from_dict
from il_policies.data.errors import DataError
from il_policies.data.store import Dataset
from il_policies.exchange.arrays import ImportMapping, import_npz, import_zarr, load_mapping

ZARR_3 = not zarr.__version__.startswith('2.')
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
    return import_npz(tmp_path / 'a.npz', tmp_path / 'out', mapping and from_dict(ImportMapping, mapping, 'test'))


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
        ({'observations': {'pose': {'array': 'state', 'sin_cos': [3]}}}, r'sin_cos names columns \[3\] of state'),
        ({'observations': {'pose': {'array': 'state', 'columns': [0, 7]}}}, r'columns names columns \[7\]'),
        ({'observations': {'pose': {'array': ['state', 'ends']}}}, r'state, ends have \[9, 2\] rows'),
        ({'observations': {'pose': {'array': 'kp', 'image': True}}}, r'kp has shape \(9, 4, 2\); images must be \(N, h, w, 3\)'),
        ({'observations': {'a/b': {'array': 'state'}}}, "'a/b' is no feature name"),
        ({'observations': {'stamp': {'array': 'state'}}}, "'stamp' is no feature name"),
    ],
)
def test_refused_with_nothing_left(tmp_path, arrays, change, words):
    with pytest.raises(DataError, match=words):
        run(tmp_path, arrays, {**MAPPING, **change})
    assert [path.name for path in tmp_path.iterdir()] == ['a.npz']


def test_unreadable_files(tmp_path, arrays):
    mapping = from_dict(ImportMapping, MAPPING, 'test')
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


def noise(N: int, size=(10, 14), seed: int = 1) -> np.ndarray:
    """Images that differ from each other and survive JPEG: coarse random colours."""
    coarse = np.random.default_rng(seed).integers(0, 255, (N, 2, 2, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR) for image in coarse])


def assert_images(dataset: Dataset, feature: str, images: np.ndarray) -> None:
    """The dataset holds these images, in this order."""
    rows = [(i, t) for i, meta in enumerate(dataset.episodes) for t in range(meta['length'])]
    assert len(rows) == len(images)
    for (i, t), image in zip(rows, images):
        assert np.abs(dataset.image(i, feature, t).astype(int) - image).mean() < 4


def test_columns_joined_and_chosen(tmp_path, arrays):
    mapping = {**MAPPING, 'observations': {
        'some': {'array': ['state', 'act'], 'columns': [4, 1], 'sin_cos': [1], 'names': ['v', 'sin', 'cos']}}}
    table = run(tmp_path, arrays, mapping).lowdim(0)
    angle = arrays['state'][:4, 1].astype(np.float64)
    np.testing.assert_array_equal(
        table['some'], np.stack([arrays['act'][:4, 1], np.sin(angle), np.cos(angle)], 1).astype(np.float32)
    )


def test_the_next_row_as_action(tmp_path, arrays):
    dataset = run(tmp_path, arrays, {**MAPPING, 'action_next': True, 'action_offset': 0.05})
    assert [e['length'] for e in dataset.episodes] == [3, 4] and dataset.info.action.offset == 0.05 + 1 / 5
    for i, rows in enumerate((range(3), range(4, 8))):
        table = dataset.lowdim(i)
        np.testing.assert_array_equal(table['action'], arrays['act'][[row + 1 for row in rows]].astype(np.float32))
        np.testing.assert_array_equal(table['points'], arrays['kp'][list(rows)].reshape(-1, 8))
    with pytest.raises(DataError, match='E207 .*episode 1 has one row and action_next is set'):
        shutil.rmtree(tmp_path / 'out')
        run(tmp_path, {**arrays, 'ends': np.array([8, 9])}, {**MAPPING, 'action_next': True})


def test_images_in_an_npz(tmp_path, arrays):
    images = noise(9)
    mapping = {**MAPPING, 'observations': {'top': {'array': 'img', 'image': True}}}
    assert_images(run(tmp_path, {**arrays, 'img': images}, mapping), 'top', images)


@pytest.mark.parametrize('change, words', [
    ({'fps': 0}, 'fps is 0.0, must be > 0'),
    ({'action': {'array': 'act', 'image': True}}, 'an image is no action'),
    ({'observations': {'top': {'array': 'img', 'image': True, 'names': ['r']}}}, 'an image is one array, without columns'),
])
def test_mappings_that_make_no_sense(change, words):
    with pytest.raises(ContractError, match=words):
        from_dict(ImportMapping, {**MAPPING, **change}, 'test')


REPLAY = from_dict(ImportMapping, {
    'fps': 10, 'episode_ends': 'episode_ends', 'action': {'array': 'action'}, 'task': 'push',
    'observations': {'image': {'array': 'img', 'image': True}, 'agent': {'array': 'state', 'columns': [0, 1]}},
}, 'test')


def new_group(path: Path, version: int):
    """An empty zarr group; zarr 2 writes version 2 only."""
    return zarr.open_group(str(path), mode='w', **({'zarr_format': version} if ZARR_3 else {}))


def put(group, name: str, values: np.ndarray, chunk: int, **codec) -> None:
    write, key = (group.create_array, 'compressors') if ZARR_3 else (group.create_dataset, 'compressor')
    write(name, data=values, chunks=(chunk, *values.shape[1:]), **({key: codec['codec']} if codec else {}))


def write_replay(path: Path, version: int = 2, dtype: str = 'u1', chunk: int = 4, **codec) -> dict[str, np.ndarray]:
    """A replay buffer of Diffusion Policy: two episodes of 6 and 5 rows, chunks that do not care where episodes end."""
    random = np.random.default_rng(0)
    data = {'action': random.normal(size=(11, 2)).astype(np.float32), 'state': random.normal(size=(11, 5)),
            'img': noise(11).astype(dtype)}
    group = new_group(path, version)
    for name, values in data.items():
        put(group.require_group('data'), name, values, chunk, **codec)
    put(group.create_group('meta'), 'episode_ends', np.array([6, 11]), 2, **codec)
    return data


@pytest.mark.parametrize('version', [2, 3] if ZARR_3 else [2])
@pytest.mark.parametrize('dtype, chunk', [('u1', 4), ('u1', 1), ('f4', 20)])
def test_replay_buffers(tmp_path, version, dtype, chunk):
    data = write_replay(tmp_path / 'a.zarr', version, dtype, chunk)
    shutil.make_archive(str(tmp_path / 'a.zarr'), 'zip', tmp_path / 'a.zarr')
    told = []
    folder = import_zarr(tmp_path / 'a.zarr', tmp_path / 'folder', REPLAY, told.append)
    archive = import_zarr(tmp_path / 'a.zarr.zip', tmp_path / 'archive', REPLAY)
    assert folder.hash == archive.hash and told == [6 / 11, 1.0]
    assert [(e['length'], e['task'], e['source']) for e in folder.episodes] == [
        (6, 'push', 'a.zarr[0:6]'), (5, 'push', 'a.zarr[6:11]')]
    assert folder.info.features['image'].shape == (10, 14, 3) and folder.info.label == 'imported'
    for i, rows in enumerate((slice(0, 6), slice(6, 11))):
        table = folder.lowdim(i)
        np.testing.assert_array_equal(table['action'], data['action'][rows])
        np.testing.assert_array_equal(table['agent'], data['state'][rows, :2].astype(np.float32))
    assert_images(folder, 'image', data['img'].astype(np.uint8))


def test_replay_buffers_that_are_not_whole(tmp_path):
    """zarr itself reads absent chunks as zeros."""
    write_replay(tmp_path / 'a.zarr')

    def refused(words, mapping=REPLAY, source='a.zarr'):
        with pytest.raises(DataError, match=words):
            import_zarr(tmp_path / source, tmp_path / 'out', mapping)
        assert not (tmp_path / 'out').exists()

    refused(r'E402 .*a mapping is needed. Arrays in the file:\n(.*\n)*  img: uint8, shape \(11, 10, 14, 3\)', None)
    shutil.copytree(tmp_path / 'a.zarr', tmp_path / 'absent')
    (tmp_path / 'absent/data/img/1.0.0.0').unlink()
    refused('E401 .*img lacks 1 of 3 chunks', source='absent')
    (tmp_path / 'damaged.zip').write_bytes(b'PK\x03\x04' + bytes(50))
    refused('not readable as zarr', source='damaged.zip')
    refused('no such file or folder', source='nowhere')
    (tmp_path / 'empty').mkdir()
    refused('not readable as zarr', source='empty')


CODECS = [(2, Blosc('lz4'), '1.0.0.0 is truncated'), (2, Zstd(), 'not readable'), (2, None, 'not readable')]
if ZARR_3:
    CODECS += [(3, zarr.codecs.BloscCodec(), 'c/1/0/0/0 is truncated'), (3, zarr.codecs.ZstdCodec(), 'not readable')]


@pytest.mark.parametrize('version, codec, words', CODECS)
@pytest.mark.parametrize('share', [0.0, 0.3, 0.9, 0.999])
def test_truncated_chunks(tmp_path, version, codec, words, share):
    """Of these zarr itself notices but some: Blosc reads on into whatever is behind the chunk in memory."""
    write_replay(tmp_path / 'a.zarr', version, codec=codec)
    file = tmp_path / 'a.zarr/data/img' / ('1.0.0.0' if version == 2 else 'c/1/0/0/0')
    file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])
    with pytest.raises(DataError, match=f'E401 .*img.*{words}.*; copy it again whole'):
        import_zarr(tmp_path / 'a.zarr', tmp_path / 'out', REPLAY)
    assert not (tmp_path / 'out').exists()


def test_images_must_be_whole_numbers(tmp_path):
    write_replay(tmp_path / 'a.zarr', dtype='f4')
    images = zarr.open_group(str(tmp_path / 'a.zarr'))['data/img']
    for value in (0.5, 256, -1, np.nan):
        images[7, 3, 2, 1] = value
        with pytest.raises(DataError, match='E402 .*img: row 7 holds values that are no whole numbers from 0 to 255'):
            import_zarr(tmp_path / 'a.zarr', tmp_path / 'out', REPLAY)


def test_umi(tmp_path, root):
    """UMI's replay buffer, but for its codec: the mapping in config/ makes the next pose the action."""
    random = np.random.default_rng(0)
    group = new_group(tmp_path / 'd.zarr', 2)
    widths = {'robot0_eef_pos': 3, 'robot0_eef_rot_axis_angle': 3, 'robot0_gripper_width': 1, 'robot0_demo_start_pose': 6}
    data = {name: random.normal(size=(12, width)) for name, width in widths.items()} | {'camera0_rgb': noise(12)}
    for name, values in data.items():
        put(group.require_group('data'), name, values, 1)
    put(group.create_group('meta'), 'episode_ends', np.array([5, 12]), 2)
    shutil.make_archive(str(tmp_path / 'd.zarr'), 'zip', tmp_path / 'd.zarr')
    mapping = load_mapping(root / 'config/imports/umi.yaml')
    dataset = import_zarr(tmp_path / 'd.zarr.zip', tmp_path / 'out', mapping)
    assert [e['length'] for e in dataset.episodes] == [4, 6] and dataset.info.action.offset == 1 / 59.94
    pose = np.hstack([data[name] for name in list(widths)[:3]]).astype(np.float32)
    table = dataset.lowdim(1)
    np.testing.assert_array_equal(table['action'], pose[6:12])
    np.testing.assert_array_equal(np.hstack([table[name] for name in ('position', 'rotation', 'gripper')]), pose[5:11])
    np.testing.assert_array_equal(table['stamp'], np.round(np.arange(6) * 1e9 / 59.94))
    assert_images(dataset, 'camera', data['camera0_rgb'][[*range(4), *range(5, 11)]])

    metadata = tmp_path / 'd.zarr/data/camera0_rgb/.zarray'
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), 'compressor': {'id': 'imagecodecs_jpegxl', 'level': 99}}))
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match='JPEG-XL images need the package imagecodecs: pip install imagecodecs'):
            import_zarr(tmp_path / 'd.zarr', tmp_path / 'none', mapping)


def test_the_command(tmp_path, root, capsys):
    write_replay(tmp_path / 'a.zarr')
    cli.main(['import', 'zarr', str(tmp_path / 'a.zarr'), '--out', str(tmp_path / 'out'), '--mapping',
              str(root / 'config/imports/pusht_image.yaml')])
    assert capsys.readouterr().out == f'{tmp_path}/out: 2 episodes, 11 rows at 10 Hz, features image, agent\n'
    with pytest.raises(SystemExit) as end:
        cli.main(['import', 'zarr', str(tmp_path / 'a.zarr'), '--out', str(tmp_path / 'other')])
    assert end.value.code == 2 and '  img: uint8, shape (11, 10, 14, 3)' in capsys.readouterr().err


def test_mappings_in_config(root):
    for name, images in (('pusht', 0), ('pusht_image', 1), ('umi', 1)):
        mapping = load_mapping(root / f'config/imports/{name}.yaml')
        assert sum(part.image for part in mapping.observations.values()) == images
