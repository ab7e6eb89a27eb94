"""LeRobot's format: what is exported is read back here by pyarrow and av alone, the way LeRobot does."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from il_policies import cli
from il_policies.data.errors import DataError
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode
from il_policies.exchange import lerobot
from il_policies.exchange.lerobot import ExportConfig, export_lerobot, import_lerobot
from recordings import contract

CONTRACT = contract()
INFO = DatasetInfo(
    fps=30.0,
    features={
        'joints': Feature((2,), 'lowdim', ('a', 'b')),
        'gripper': Feature((1,), 'lowdim'),
        'front': Feature((32, 48, 3), 'image'),
        'wrist': Feature((24, 24, 3), 'image'),
        'range': Feature((6, 8, 1), 'depth'),
    },
    action=ActionInfo(('b', 'a'), 0.0),
    label='command',
    contract=CONTRACT.to_dict(),
    contract_hash=CONTRACT.hash,
)
INDICES = (0, 1, 4, 5)
LENGTHS = (7, 1, 12, 9)


def coded(number: int, size: tuple[int, int], colour=(90, 30, 160)) -> np.ndarray:
    """An image of a number: its 12 bits as blocks of black and white above a colour."""
    h, w = size
    image = np.full((h, w, 3), colour, np.uint8)
    for bit in range(12):
        row, column = divmod(bit, 6)
        image[row * h // 4:(row + 1) * h // 4, column * w // 6:(column + 1) * w // 6] = 255 * (number >> bit & 1)
    return image


def number_in(image: np.ndarray) -> int:
    """The number of `coded`, from an image that may have suffered."""
    h, w = image.shape[:2]
    blocks = [image[row * h // 4:(row + 1) * h // 4, column * w // 6:(column + 1) * w // 6]
              for row in (0, 1) for column in range(6)]
    return sum((block.mean() > 127) << bit for bit, block in enumerate(blocks))


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def number(e: int, t: int, camera: str) -> int:
    """What the image of row t of episode e shows: unlike any other."""
    return 64 * e + 2 * t + (camera == 'wrist')


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Dataset:
    path = tmp_path_factory.mktemp('lerobot') / 'data'
    create(path, INFO)
    random = np.random.default_rng(0)
    for e, (index, T) in enumerate(zip(INDICES, LENGTHS)):
        depth = random.integers(0, 65535, (T, 6, 8), dtype=np.uint16)
        write_episode(
            path,
            index,
            {'joints': random.normal(size=(T, 2)) * 1e3, 'gripper': random.normal(size=(T, 1))},
            random.normal(size=(T, 2)),
            1_700_000_000_000_000_000 + np.arange(T) * 33_333_333 + random.integers(0, 10**6, T),
            random.random(T) < 0.3,
            {
                'front': (jpeg(coded(number(e, t, 'front'), (32, 48))) for t in range(T)),
                'wrist': (jpeg(coded(number(e, t, 'wrist'), (24, 24))) for t in range(T)),
                'range': (cv2.imencode('.png', image)[1].tobytes() for image in depth),
            },
            {'task': f'to the {"left" if e % 2 else "right"}', 'success': (True, False, None)[e % 3], 'source': f'bag_{e}',
             'conversion': {'key': f'{e}'}},
            {'verdict': 'PASS', 'rows': T},
        )
    return Dataset(path)


@pytest.fixture(scope='module', params=['h264', 'av1', 'jpeg'])
def exported(request, dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('exported') / request.param
    export_lerobot(dataset, out, ExportConfig(images=request.param, state=('joints',)))
    return out


def read(out: Path) -> tuple[dict, list[dict], dict]:
    """info.json, rows of meta/episodes, and column → all rows of the data files, in order of the files' names."""
    info = json.loads((out / 'meta/info.json').read_text())
    episodes = [row for file in sorted(out.glob('meta/episodes/*/*.parquet')) for row in pq.read_table(file).to_pylist()]
    data = pa.concat_tables([pq.read_table(file) for file in sorted(out.glob('data/*/*.parquet'))])
    return info, episodes, {name: data[name].to_pylist() for name in data.column_names}


def decode(file: Path) -> list[tuple[Fraction, np.ndarray]]:
    """Every frame of a video with its time [s]."""
    with av.open(str(file)) as container:
        base = container.streams.video[0].time_base
        return [(frame.pts * base, frame.to_ndarray(format='rgb24')) for frame in container.decode(video=0)]


def test_every_row_finds_its_own_frame(exported, dataset):
    """For every row and camera, LeRobot's way: the frame of the episode's file at from_timestamp + timestamp."""
    info, episodes, data = read(exported)
    if exported.name == 'jpeg':
        for e, episode in enumerate(episodes):
            for t in range(episode['length']):
                for camera in ('front', 'wrist'):
                    cell = data[f'observation.images.{camera}'][episode['dataset_from_index'] + t]
                    assert cell == {'bytes': dataset.encoded(e, camera, t), 'path': None}
        return
    for camera in ('front', 'wrist'):
        key, before = f'observation.images.{camera}', 0
        file = exported / info['video_path'].format(video_key=key, chunk_index=0, file_index=0)
        frames = decode(file)
        assert len(frames) == sum(LENGTHS)
        for e, episode in enumerate(episodes):
            first = episode[f'videos/{key}/from_timestamp']
            assert abs(first - Fraction(before, 30)) < 1e-6 and episode[f'videos/{key}/file_index'] == 0
            assert abs(episode[f'videos/{key}/to_timestamp'] - Fraction(before + LENGTHS[e], 30)) < 1e-6
            for t in range(LENGTHS[e]):
                wanted = np.float32(first + data['timestamp'][episode['dataset_from_index'] + t])
                distance = [abs(np.float32(time) - wanted) for time, _ in frames]
                place = int(np.argmin(distance))
                assert distance[place] < 1e-4, 'the tolerance of LeRobot'
                assert place == before + t and number_in(frames[place][1]) == number(e, t, camera)
            before += LENGTHS[e]


def test_rows_and_metadata(exported, dataset):
    info, episodes, data = read(exported)
    tables = [dataset.lowdim(i) for i in range(len(dataset))]
    for column, feature in {'observation.state': 'joints', 'action': 'action'}.items():
        written = np.array(data[column], np.float32)
        np.testing.assert_array_equal(written, np.concatenate([table[feature] for table in tables]))
    gripper = np.array(data['observation.gripper'], np.float32)
    assert gripper.ndim == 1, 'LeRobot reads features of shape (1,) as plain numbers'
    np.testing.assert_array_equal(gripper, np.concatenate([table['gripper'][:, 0] for table in tables]))
    assert data['index'] == list(range(29))
    assert data['episode_index'] == [0] * 7 + [1] + [2] * 12 + [3] * 9
    assert data['frame_index'] == [t for T in LENGTHS for t in range(T)]
    assert data['task_index'] == [0] * 7 + [1] + [0] * 12 + [1] * 9
    assert data['timestamp'] == [np.float32(t / 30) for T in LENGTHS for t in range(T)]

    ends = np.cumsum(LENGTHS).tolist()
    for e, episode in enumerate(episodes):
        assert (episode['episode_index'], episode['length']) == (e, LENGTHS[e])
        assert (episode['dataset_from_index'], episode['dataset_to_index']) == (ends[e] - LENGTHS[e], ends[e])
        assert episode['tasks'] == [f'to the {"left" if e % 2 else "right"}']
        assert {episode[key] for key in episode if key.endswith(('chunk_index', 'file_index'))} == {0}

    tasks = pq.read_table(exported / 'meta/tasks.parquet')
    assert tasks.schema.pandas_metadata['index_columns'] == ['task']
    assert tasks.to_pylist() == [{'task_index': 0, 'task': 'to the right'}, {'task_index': 1, 'task': 'to the left'}]

    video = exported.name != 'jpeg'
    assert {key: info[key] for key in info if key != 'features'} == {
        'codebase_version': 'v3.0', 'robot_type': 'two', 'total_episodes': 4, 'total_frames': 29, 'total_tasks': 2,
        'chunks_size': 1000, 'data_files_size_in_mb': 100, 'video_files_size_in_mb': 200, 'fps': 30,
        'splits': {'train': '0:4'},
        'data_path': 'data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
        'video_path': 'videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4' if video else None,
    }
    kinds = {key: (feature['dtype'], feature['shape']) for key, feature in info['features'].items()}
    assert kinds == {
        'observation.state': ('float32', [2]), 'observation.gripper': ('float32', [1]),
        'observation.images.front': ('video' if video else 'image', [32, 48, 3]),
        'observation.images.wrist': ('video' if video else 'image', [24, 24, 3]),
        'observation.depth.range': ('image', [6, 8, 1]), 'action': ('float32', [2]), 'timestamp': ('float32', [1]),
        'frame_index': ('int64', [1]), 'episode_index': ('int64', [1]), 'index': ('int64', [1]), 'task_index': ('int64', [1]),
    }
    assert info['features']['observation.state']['names'] == ['a', 'b'] and info['features']['action']['names'] == ['b', 'a']
    assert info['features']['observation.images.front']['names'] == ['height', 'width', 'channels']
    if video:
        assert info['features']['observation.images.front']['info'] == {
            'video.height': 32, 'video.width': 48, 'video.codec': exported.name, 'video.pix_fmt': 'yuv420p',
            'video.is_depth_map': False, 'video.fps': 30, 'video.channels': 3, 'has_audio': False}

    schema = pq.read_schema(exported / 'data/chunk-000/file-000.parquet')
    stored = {key for key, (dtype, _) in kinds.items() if dtype != 'video'}
    assert set(schema.names) == stored, 'LeRobot refuses columns that info.json does not list'
    assert schema.field('observation.state').type == pa.list_(pa.float32(), 2) and schema.field('timestamp').type == pa.float32()
    described = json.loads(schema.metadata[b'huggingface'])['info']['features']
    assert set(described) == stored and described['observation.depth.range'] == {'_type': 'Image'}
    assert described['action'] == {'feature': {'dtype': 'float32', '_type': 'Value'}, 'length': 2, '_type': 'Sequence'}
    groups = pq.ParquetFile(exported / 'data/chunk-000/file-000.parquet').metadata
    assert [groups.row_group(g).num_rows for g in range(groups.num_row_groups)] == list(LENGTHS), 'one row group an episode'


def test_statistics(exported, dataset):
    """Of all rows and of each episode's, against numpy on the source; LeRobot's shapes."""
    _, episodes, data = read(exported)
    stats = json.loads((exported / 'meta/stats.json').read_text())
    quantiles = {'q01': 0.01, 'q10': 0.10, 'q50': 0.50, 'q90': 0.90, 'q99': 0.99}

    def check(values: np.ndarray, found: dict, shape: tuple, count: int, method: str, scale: float = 1.0):
        """values: (N, channels)."""
        wanted = {'min': values.min(0), 'max': values.max(0), 'mean': values.mean(0), 'std': values.std(0),
                  **{name: np.quantile(values, q, axis=0, method=method) for name, q in quantiles.items()}}
        assert found.pop('count') == [count] and set(found) == set(wanted)
        for name, value in wanted.items():
            np.testing.assert_allclose(np.array(found[name]), value.reshape(shape) / scale, rtol=1e-9, atol=1e-12)

    places = [range(len(dataset)), *([i] for i in range(len(dataset)))]
    tables = [stats, *({key: {name: episode[f'stats/{key}/{name}'] for name in (*quantiles, 'min', 'max', 'mean', 'std', 'count')}
                        for key in stats} for episode in episodes)]
    for i, found in zip(places, tables):
        rows = slice(episodes[i[0]]['dataset_from_index'], episodes[i[-1]]['dataset_to_index'])
        count = rows.stop - rows.start
        for key in ('observation.state', 'observation.gripper', 'action', 'timestamp', 'index', 'episode_index', 'task_index'):
            values = np.array(data[key][rows], np.float64).reshape(count, -1)
            check(values, dict(found[key]), values.shape[1:], count, 'linear')
        for camera, key, scale in (('front', 'images.front', 255), ('wrist', 'images.wrist', 255), ('range', 'depth.range', 1)):
            images = np.stack([dataset.image(k, camera, t) for k in i for t in range(LENGTHS[k])]).astype(np.float64)
            channels = images.shape[-1]
            check(images.reshape(-1, channels), dict(found[f'observation.{key}']), (channels, 1, 1), count, 'inverted_cdf', scale)


def test_what_was_exported_comes_back(exported, dataset, tmp_path):
    back, left_out = import_lerobot(exported, tmp_path / 'back')
    assert back.info == dataset.info and left_out == []
    for i in range(len(dataset)):
        mine, theirs = back.lowdim(i), dataset.lowdim(i)
        assert set(mine) == set(theirs)
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype and mine[name].tobytes() == theirs[name].tobytes()
        assert back.report(i) == dataset.report(i)
        # Images out of a video are not those of the bag: such an episode does not pass for its conversion.
        differing = {'content'} if exported.name == 'jpeg' else {'content', 'conversion'}
        left, right = ({key: value for key, value in d.episodes[i].items() if key not in differing} for d in (back, dataset))
        assert ('conversion' in back.episodes[i]) == (exported.name == 'jpeg')
        assert left == right and back.episodes[i]['index'] == INDICES[i]
        for t in range(LENGTHS[i]):
            assert [number_in(back.image(i, camera, t)) for camera in ('front', 'wrist')] == [
                number(i, t, 'front'), number(i, t, 'wrist')]
            np.testing.assert_allclose(back.image(i, 'front', t)[-8:], dataset.image(i, 'front', t)[-8:], atol=12)
            np.testing.assert_array_equal(back.image(i, 'range', t), dataset.image(i, 'range', t))
    if exported.name == 'jpeg':
        assert back.hash == dataset.hash, 'exported as jpeg, nothing at all has changed'


def test_all_features_become_the_state(dataset, tmp_path):
    export_lerobot(dataset, tmp_path / 'out', ExportConfig(images='jpeg'))
    info, _, data = read(tmp_path / 'out')
    assert info['features']['observation.state']['names'] == ['joints.a', 'joints.b', 'gripper']
    table = dataset.lowdim(0)
    state = np.array(data['observation.state'][:7], np.float32)
    np.testing.assert_array_equal(state, np.hstack([table['joints'], table['gripper']]))
    assert import_lerobot(tmp_path / 'out', tmp_path / 'back')[0].hash == dataset.hash


def test_an_export_depends_on_nothing_but_the_dataset(dataset, tmp_path):
    for name, jobs in (('one', 1), ('three', 3)):
        export_lerobot(dataset, tmp_path / name, ExportConfig(jobs=jobs))
    files = sorted(file.relative_to(tmp_path / 'one') for file in (tmp_path / 'one').rglob('*') if file.is_file())
    assert len(files) == 9
    for file in files:
        assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'three' / file).read_bytes(), file


def test_files_are_divided_by_size_and_time(tmp_path, monkeypatch):
    """Noise compresses badly: six episodes make several files of at most 70 KiB, two to a chunk; no episode is divided."""
    monkeypatch.setattr(lerobot, 'FILES_PER_CHUNK', 2)
    monkeypatch.setattr(lerobot, 'MB', 70 * 1024)
    info = DatasetInfo(fps=10.0, features={'noise': Feature((64, 64, 3), 'image'), 'x': Feature((1000,), 'lowdim')},
                       action=ActionInfo(('u',)), label='imported')
    create(tmp_path / 'd', info)
    random = np.random.default_rng(0)
    for e in range(6):
        images = [jpeg(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(8)]
        write_episode(tmp_path / 'd', e, {'x': random.normal(size=(8, 1000))}, np.zeros((8, 1)), np.arange(8) * 10**8,
                      np.zeros(8, bool), {'noise': images}, {}, {})
    dataset = Dataset(tmp_path / 'd')
    config = ExportConfig(images='h264', crf=5, data_file_mb=1, video_file_mb=1)
    export_lerobot(dataset, tmp_path / 'out', config)
    info, episodes, data = read(tmp_path / 'out')
    for pattern, keys in (('videos/*', 'videos/observation.images.noise/'), ('data', 'data/')):
        files = sorted((tmp_path / 'out').glob(f'{pattern}/*/*'))
        names = [f'{file.parent.name}/{file.stem}' for file in files]
        used = [f'chunk-{episode[f"{keys}chunk_index"]:03d}/file-{episode[f"{keys}file_index"]:03d}' for episode in episodes]
        assert names == [f'chunk-{n // 2:03d}/file-{n % 2:03d}' for n in range(len(names))] and len(names) >= 3
        assert used == sorted(used) and sorted(set(used)) == names
        assert all(file.stat().st_size <= 70 * 1024 for file in files)
        if pattern == 'data':
            assert [pq.read_metadata(file).num_rows for file in files] == [8 * used.count(name) for name in names]
        else:
            assert [len(decode(file)) for file in files] == [8 * used.count(name) for name in names]
            firsts = {name: 0 for name in names}
            for name, episode in zip(used, episodes):
                assert episode[f'{keys}from_timestamp'] == firsts[name] / 10
                firsts[name] += 8
    # The statistics of 1000 entries alone fill a file of episodes each.
    assert [(row['meta/episodes/chunk_index'], row['meta/episodes/file_index']) for row in episodes] == [
        divmod(e, 2) for e in range(6)]
    assert len(list((tmp_path / 'out').glob('meta/episodes/*/*'))) == 6
    assert data['index'] == list(range(48))
    back, _ = import_lerobot(tmp_path / 'out', tmp_path / 'back')
    np.testing.assert_array_equal(back.lowdim(5)['x'], dataset.lowdim(5)['x'])
    assert np.abs(back.image(5, 'noise', 7).astype(int) - dataset.image(5, 'noise', 7)).mean() < 30
    assert np.abs(back.image(4, 'noise', 7).astype(int) - dataset.image(5, 'noise', 7)).mean() > 50, 'noise tells frames apart'

    monkeypatch.setattr(lerobot, 'VIDEO_SECONDS', 2)
    export_lerobot(dataset, tmp_path / 'short', ExportConfig(crf=40))
    _, episodes, _ = read(tmp_path / 'short')
    assert [episode['videos/observation.images.noise/from_timestamp'] for episode in episodes] == [0, 0.8] * 3


def test_why_videos_end_after_a_thousand_seconds():
    """LeRobot looks frames up by float32(from_timestamp + float32(k / fps)), which must be within 0.1 ms of float32(n / fps)."""
    def late(seconds: int, fps: int = 30, episode: int = 200) -> int:
        k = np.arange(episode * fps)
        firsts = np.arange(0, seconds * fps - len(k) + 1, len(k))[:, None]
        wanted = (firsts / fps + (k / fps).astype(np.float32).astype(np.float64)).astype(np.float32)
        return int(np.sum(np.abs(wanted - ((firsts + k) / fps).astype(np.float32)) >= 1e-4))

    assert late(lerobot.VIDEO_SECONDS) == 0 and late(2000) > 1000


@pytest.mark.parametrize('change, words', [
    ({'state': ('joints', 'wrist')}, r"state is \['joints', 'wrist'\]; valid: joints, gripper, each once"),
    ({'state': ('joints', 'joints')}, 'each once'),
    ({'crf': 60}, 'crf is 60; valid: 0 to 51 for h264'),
    ({'crf': 20, 'images': 'jpeg'}, 'valid: none for jpeg'),
    ({'video_file_mb': 0}, 'video_file_mb is 0, must be at least 1'),
])
def test_export_refuses_with_nothing_left(dataset, tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        export_lerobot(dataset, tmp_path / 'out', ExportConfig(**change))
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_damaged_episodes(dataset, tmp_path):
    shutil.copytree(dataset.path, tmp_path / 'data')
    copy = Dataset(tmp_path / 'data')
    file = copy.folders[1] / 'images/front.mjpeg'
    file.write_bytes(bytes([*file.read_bytes()[:-1], 0]))
    with pytest.raises(DataError, match=f'E302 .*{copy.folders[1].name}: not what was written'):
        export_lerobot(copy, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_export_is_whole_or_absent(dataset, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.tex').touch()
    with pytest.raises(DataError, match='E301 .*out: exists already'):
        export_lerobot(dataset, tmp_path / 'out')
    create(tmp_path / 'empty', INFO)
    with pytest.raises(DataError, match='no episodes'):
        export_lerobot(Dataset(tmp_path / 'empty'), tmp_path / 'none')
    shutil.copytree(dataset.path, tmp_path / 'torn')
    file = tmp_path / 'torn/episodes/000005/images/wrist.mjpeg'
    file.write_bytes(file.read_bytes()[:-200])
    for images in ('h264', 'jpeg'):
        with pytest.raises(DataError, match='wrist.mjpeg'):
            export_lerobot(Dataset(tmp_path / 'torn'), tmp_path / 'none', ExportConfig(images=images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty', 'out', 'torn']


def png(image: np.ndarray) -> bytes:
    return cv2.imencode('.png', image[..., ::-1])[1].tobytes()


def write_foreign(path: Path, lengths=(5, 8), fps: int = 10, late: float = 0.0) -> None:
    """A dataset as LeRobot 0.4 writes it.

    Float64 columns, nested names, an unnamed pandas index, one continuous video with B-frames, row groups that ignore episodes,
    columns of reinforcement learning. late: error of every from_timestamp [s].
    """
    N = sum(lengths)
    video = path / 'videos/observation.images.top/chunk-000/file-000.mp4'
    video.parent.mkdir(parents=True)
    with av.open(str(video), 'w') as container:
        stream = container.add_stream('libx264', rate=fps, options={'crf': '15', 'g': '30'})
        stream.height, stream.width, stream.pix_fmt = 32, 48, 'yuv420p'
        for n in range(N):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(coded(n, (32, 48)), format='rgb24')))
        container.mux(stream.encode())
    frame = np.concatenate([np.arange(T) for T in lengths])
    struct = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
    data = pa.table({
        'observation.image': pa.array([{'bytes': png(coded(n, (24, 24))), 'path': 'x.png'} for n in range(N)], struct),
        'observation.state': pa.array([[n, n / 2, n / 4] for n in range(N)], pa.list_(pa.float64())),
        'observation.gripper/left': pa.array(np.arange(N) % 3, pa.int64()),
        'observation.map': pa.array([[[n, n], [n, n]] for n in range(N)], pa.list_(pa.list_(pa.float32()))),
        'next.reward': pa.array(np.ones(N, np.float32)),
        'action': pa.array([[n, -n] for n in range(N)], pa.list_(pa.float32(), 2)),
        'timestamp': pa.array((frame / fps).astype(np.float32)),
        'frame_index': pa.array(frame),
        'episode_index': pa.array(np.repeat(np.arange(len(lengths)), lengths)),
        'index': pa.array(np.arange(N)),
        'task_index': pa.array(np.repeat(np.arange(len(lengths)) % 2, lengths)),
    })
    (path / 'data/chunk-000').mkdir(parents=True)
    pq.write_table(data, path / 'data/chunk-000/file-000.parquet', row_group_size=4)
    ends = np.cumsum(lengths).tolist()
    rows = [{'episode_index': e, 'tasks': ['x'], 'length': T, 'data/chunk_index': 0, 'data/file_index': 0,
             'dataset_from_index': end - T, 'dataset_to_index': end, 'stats/action/min': [0.0],
             'videos/observation.images.top/chunk_index': 0, 'videos/observation.images.top/file_index': 0,
             'videos/observation.images.top/from_timestamp': (end - T) / fps + late,
             'videos/observation.images.top/to_timestamp': end / fps} for e, (T, end) in enumerate(zip(lengths, ends))]
    (path / 'meta/episodes/chunk-000').mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path / 'meta/episodes/chunk-000/file-000.parquet')
    pq.write_table(pa.table({'task_index': [0, 1], '__index_level_0__': ['push', 'pull']}), path / 'meta/tasks.parquet')
    counters = {key: {'dtype': dtype, 'shape': [1], 'names': None} for key, dtype in lerobot.COUNTERS.items()}
    (path / 'meta/info.json').write_text(json.dumps({
        'codebase_version': 'v3.0', 'robot_type': 'other', 'total_episodes': len(lengths), 'total_frames': N, 'total_tasks': 2,
        'chunks_size': 1000, 'data_files_size_in_mb': 100, 'video_files_size_in_mb': 500, 'fps': fps,
        'splits': {'train': f'0:{len(lengths)}'}, 'data_path': lerobot.DATA, 'video_path': lerobot.VIDEO,
        'features': {
            'observation.images.top': {'dtype': 'video', 'shape': [32, 48, 3], 'names': ['height', 'width', 'channels']},
            'observation.image': {'dtype': 'image', 'shape': [24, 24, 3], 'names': ['height', 'width', 'channel']},
            'observation.state': {'dtype': 'float64', 'shape': [3], 'names': {'motors': ['x', 'y', 'z']}},
            'observation.gripper/left': {'dtype': 'int64', 'shape': [1], 'names': None},
            'observation.map': {'dtype': 'float32', 'shape': [2, 2], 'names': None},
            'next.reward': {'dtype': 'float32', 'shape': [1], 'names': None},
            'action': {'dtype': 'float32', 'shape': [2], 'names': {'dx': 0, 'dy': 1}},
            **counters,
        }}))


def test_datasets_of_others(tmp_path):
    write_foreign(tmp_path / 'them')
    dataset, left_out = import_lerobot(tmp_path / 'them', tmp_path / 'us')
    assert left_out == ['observation.map', 'next.reward']
    assert dataset.info == DatasetInfo(
        fps=10.0,
        features={'top': Feature((32, 48, 3), 'image'), 'image': Feature((24, 24, 3), 'image'),
                  'state': Feature((3,), 'lowdim', ('x', 'y', 'z')), 'gripper_left': Feature((1,), 'lowdim')},
        action=ActionInfo(('dx', 'dy')), label='imported')
    assert [(meta['length'], meta['task'], meta['source']) for meta in dataset.episodes] == [
        (5, 'push', 'them[0]'), (8, 'pull', 'them[1]')]
    n = 0
    for i, T in enumerate((5, 8)):
        table = dataset.lowdim(i)
        np.testing.assert_array_equal(table['stamp'], np.arange(T) * 100_000_000)
        for t in range(T):
            assert table['state'][t].tolist() == [n, n / 2, n / 4] and table['action'][t].tolist() == [n, -n]
            assert table['gripper_left'][t] == n % 3
            assert number_in(dataset.image(i, 'top', t)) == n
            np.testing.assert_array_equal(dataset.image(i, 'image', t), coded(n, (24, 24)))
            n += 1


def test_names_and_shapes_that_others_choose(tmp_path):
    """Channels first, names that are no file names or equal without their prefix, a reserved one."""
    path = tmp_path / 'them'
    write_foreign(path)
    info = json.loads((path / 'meta/info.json').read_text())
    renamed = {'observation.image': 'observation.images.state', 'observation.map': 'observation.filled'}
    features = {renamed.get(key, key): feature for key, feature in info['features'].items()}
    features['observation.images.top'] |= {'shape': [3, 32, 48], 'names': ['channels', 'height', 'width']}
    features['observation.filled'] |= {'dtype': 'float32', 'shape': [1]}
    edit_info(path, features=features)
    file = path / 'data/chunk-000/file-000.parquet'
    table = pq.read_table(file)
    table = table.rename_columns([renamed.get(name, name) for name in table.column_names])
    pq.write_table(table.set_column(table.column_names.index('observation.filled'), 'observation.filled',
                                    pa.array(np.arange(13, dtype=np.float32))), file)
    dataset, left_out = import_lerobot(path, tmp_path / 'us')
    assert left_out == ['next.reward']
    assert {name: feature.shape for name, feature in dataset.info.features.items()} == {
        'top': (32, 48, 3), 'state': (24, 24, 3), 'state_': (3,), 'gripper_left': (1,), 'filled_': (1,)}
    assert number_in(dataset.image(1, 'top', 2)) == number_in(dataset.image(1, 'state', 2)) == 7
    assert dataset.lowdim(1)['filled_'][2] == 7 and dataset.lowdim(1)['state_'][2].tolist() == [7, 3.5, 1.75]


def test_two_features_cannot_be_one_column(tmp_path):
    features = {'state': Feature((1,), 'lowdim'), 'joints': Feature((1,), 'lowdim')}
    create(tmp_path / 'd', DatasetInfo(fps=10.0, features=features, action=ActionInfo(('u',)), label='imported'))
    one = np.ones((1, 1))
    write_episode(tmp_path / 'd', 0, {'state': one, 'joints': 2 * one}, one, np.arange(1), np.zeros(1, bool), {}, {}, {})
    dataset = Dataset(tmp_path / 'd')
    with pytest.raises(DataError, match='E303 .*several features would be observation.state; choose another state'):
        export_lerobot(dataset, tmp_path / 'out', ExportConfig(state=('joints',)))
    for name, state in (('all', None), ('one', ('state',)), ('none', ())):
        export_lerobot(dataset, tmp_path / name, ExportConfig(state=state))
        assert import_lerobot(tmp_path / name, tmp_path / f'{name}_back')[0].hash == dataset.hash


def test_times_between_frames_are_refused(tmp_path):
    """Sums of durations drift: a frame that is off by less than a quarter period is still the one meant, else it is guesswork."""
    write_foreign(tmp_path / 'near', late=0.02)
    dataset, _ = import_lerobot(tmp_path / 'near', tmp_path / 'us')
    assert [number_in(dataset.image(1, 'top', t)) for t in range(8)] == list(range(5, 13))
    write_foreign(tmp_path / 'far', late=0.04)
    with pytest.raises(DataError, match=r'E403 .*file-000.mp4: no frame at 0.040000 s; the next is at 0.100000 s'):
        import_lerobot(tmp_path / 'far', tmp_path / 'none')


def test_recorded_times_are_kept(tmp_path):
    write_foreign(tmp_path / 'them')
    file = tmp_path / 'them/data/chunk-000/file-000.parquet'
    table = pq.read_table(file)
    times = np.array(table['timestamp'].to_pylist()) + 0.01 * (np.arange(13) % 2)
    pq.write_table(table.set_column(table.column_names.index('timestamp'), 'timestamp', pa.array(times.astype(np.float32))), file)
    dataset, _ = import_lerobot(tmp_path / 'them', tmp_path / 'us')
    np.testing.assert_allclose(dataset.lowdim(0)['stamp'], [0, 0.11e9, 0.2e9, 0.31e9, 0.4e9], atol=100)


def edit_info(path: Path, **changes) -> None:
    file = path / 'meta/info.json'
    info = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**info, **changes}.items() if value is not None}))


def cut(path: Path, pattern: str, share: float) -> None:
    file = next(path.glob(pattern))
    file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])


def drop_rows(path: Path) -> None:
    file = path / 'data/chunk-000/file-000.parquet'
    pq.write_table(pq.read_table(file).slice(0, 9), file)


def drop_column(path: Path) -> None:
    file = path / 'data/chunk-000/file-000.parquet'
    pq.write_table(pq.read_table(file).drop_columns(['observation.state']), file)


def swap_rows(path: Path) -> None:
    file = path / 'data/chunk-000/file-000.parquet'
    pq.write_table(pq.read_table(file).take([1, 0, *range(2, 13)]), file)


def empty_row(path: Path) -> None:
    file = path / 'data/chunk-000/file-000.parquet'
    table = pq.read_table(file)
    values = pa.array([None if n == 3 else [n, n] for n in range(13)], pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.column_names.index('action'), 'action', values), file)


def other_size(path: Path) -> None:
    features = json.loads((path / 'meta/info.json').read_text())['features']
    edit_info(path, features={**features, 'observation.images.top': {**features['observation.images.top'], 'shape': [64, 96, 3]}})


@pytest.mark.parametrize('damage, words', [
    (lambda p: edit_info(p, codebase_version='v2.1'), 'version v2.1; valid: v3.0. Older ones are converted by LeRobot: python'),
    (lambda p: edit_info(p, codebase_version=None), 'version None'),
    (lambda p: edit_info(p, total_frames=14), 'counts 13 rows, info.json 14'),
    (lambda p: edit_info(p, total_episodes=3), 'describes 2 episodes, not all of 0 to 2'),
    (lambda p: edit_info(p, fps=None), "not as version 3.0 has it: KeyError 'fps'"),
    (lambda p: edit_info(p, features={}), 'no column action of numbers'),
    (lambda p: (p / 'meta/info.json').write_text('{'), 'info.json: not readable'),
    (lambda p: (p / 'meta/info.json').unlink(), 'no LeRobot dataset here'),
    (lambda p: (p / 'meta/tasks.parquet').unlink(), 'tasks.parquet: no such file; copy the dataset again whole'),
    (lambda p: (p / 'data/chunk-000/file-000.parquet').unlink(), 'file-000.parquet: no such file'),
    (lambda p: cut(p, 'data/*/*', 0.7), 'file-000.parquet: not readable: .*without their end'),
    (lambda p: cut(p, 'meta/episodes/*/*', 0.7), 'file-000.parquet: not readable'),
    (lambda p: cut(p, 'videos/*/*/*', 0.5), 'file-000.mp4: not readable as video'),
    (lambda p: next(p.glob('videos/*/*/*')).unlink(), 'file-000.mp4: not readable as video'),
    (drop_rows, r'file-000.parquet, episode 1: 4 rows, not the 8 in a row'),
    (drop_column, r"no columns \['observation.state'\], which info.json lists"),
    (swap_rows, 'episode 0: frame_index does not count from 0 to 4'),
    (empty_row, 'episode 0: action: 1 of 5 rows are empty'),
    (other_size, r'frames of shape \(32, 48, 3\), but info.json says \[64, 96, 3\]'),
])
def test_damage_is_named_and_nothing_is_left(tmp_path, damage, words):
    write_foreign(tmp_path / 'them')
    damage(tmp_path / 'them')
    with pytest.raises(DataError, match=words):
        import_lerobot(tmp_path / 'them', tmp_path / 'us')
    assert [path.name for path in tmp_path.iterdir()] == ['them']


def test_an_export_that_was_changed_since(dataset, tmp_path):
    out = tmp_path / 'out'
    export_lerobot(dataset, out, ExportConfig(images='jpeg'))
    for file in out.glob('meta/episodes/*/*'):
        pq.write_table(pq.read_table(file).slice(0, 3), file)
    edit_info(out, total_episodes=3, total_frames=20)
    with pytest.raises(DataError, match='describes other episodes than meta/episodes, which was changed since the export'):
        import_lerobot(out, tmp_path / 'back')
    shutil.rmtree(out / 'meta/il_policies')
    back, left_out = import_lerobot(out, tmp_path / 'back')
    assert left_out == ['observation.depth.range'] and len(back) == 3 and back.info.label == 'imported'
    np.testing.assert_array_equal(back.lowdim(2)['state'][:, :2], dataset.lowdim(2)['joints'])


def test_images_of_another_size_than_their_feature(tmp_path):
    """Passed through as recorded, images are larger than what the policy sees: LeRobot gets what the policy sees."""
    info = DatasetInfo(fps=10.0, features={'front': Feature((24, 24, 3), 'image')}, action=ActionInfo(('u',)), label='imported')
    create(tmp_path / 'd', info)
    files = [jpeg(coded(1, (48, 48))), jpeg(coded(2, (24, 24))), png(coded(3, (24, 24)))]
    write_episode(tmp_path / 'd', 0, {}, np.zeros((3, 1)), np.arange(3), np.zeros(3, bool), {'front': files}, {}, {})
    export_lerobot(Dataset(tmp_path / 'd'), tmp_path / 'jpeg', ExportConfig(images='jpeg'))
    info, _, data = read(tmp_path / 'jpeg')
    cells = [cell['bytes'] for cell in data['observation.images.front']]
    assert 'observation.state' not in info['features'] and cells[1:] == files[1:]
    small = cv2.imdecode(np.frombuffer(cells[0], np.uint8), cv2.IMREAD_COLOR)
    assert small.shape == (24, 24, 3) and number_in(small) == 1
    export_lerobot(Dataset(tmp_path / 'd'), tmp_path / 'h264')
    frames = [image for _, image in decode(tmp_path / 'h264/videos/observation.images.front/chunk-000/file-000.mp4')]
    assert [number_in(image) for image in frames] == [1, 2, 3] and frames[0].shape == (24, 24, 3)


def test_progress_is_told(dataset, tmp_path):
    told: list[float] = []
    export_lerobot(dataset, tmp_path / 'out', ExportConfig(), told.append)
    assert told == [7 / 29, 8 / 29, 20 / 29, 1.0]
    told.clear()
    import_lerobot(tmp_path / 'out', tmp_path / 'back', told.append)
    assert told == [7 / 29, 8 / 29, 20 / 29, 1.0]


def test_the_commands(dataset, tmp_path, capsys):
    def il(*arguments) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    code, out, err = il('export', 'lerobot', dataset.path, '--out', tmp_path / 'out', '--images', 'jpeg', '--state', 'joints')
    assert code == 0 and out.splitlines() == [
        f'{tmp_path}/out: LeRobot v3.0, 4 episodes, 29 frames at 30 Hz, 2 tasks',
        '  observation.state            2 float32',
        '  observation.gripper          1 float32',
        '  observation.images.front     32×48×3 image',
        '  observation.images.wrist     24×24×3 image',
        '  observation.depth.range      6×8×1 image',
        '  action                       2 float32']
    assert err == 'il: 1 of 4 episodes are labelled a failure, for which LeRobot has no place; il split takes them out\n'
    code, out, err = il('import', 'lerobot', tmp_path / 'out', '--out', tmp_path / 'back')
    assert (code, err) == (0, '') and Dataset(tmp_path / 'back').hash == dataset.hash
    assert out == f'{tmp_path}/back: 4 episodes, 29 rows at 30 Hz, features joints, gripper, front, wrist, range\n'
    write_foreign(tmp_path / 'them')
    code, out, err = il('import', 'lerobot', tmp_path / 'them', '--out', tmp_path / 'us')
    assert code == 0 and out.splitlines()[1] == 'left out, being neither observation nor action: observation.map, next.reward'
    for arguments, words in ((('export', 'lerobot', dataset.path, '--out', tmp_path / 'out'), 'E301 .*out: exists already'),
                             (('export', 'lerobot', tmp_path, '--out', tmp_path / 'new'), 'E302 .*no dataset here'),
                             (('import', 'lerobot', dataset.path, '--out', tmp_path / 'new'), 'E403 .*no LeRobot dataset here')):
        code, out, err = il(*arguments)
        assert code == 2 and out == '' and len(err.splitlines()) == 1 and re.search(words, err)
