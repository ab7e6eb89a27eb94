"""What strangers send is data: nothing in it is run, and no file is read that it names outside of its own folder.

And whatever is started here is found on this machine only (docs/security.md).
"""
from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zarr

from bags import Entry, write_mcap, write_metadata
from il_policies import checkpoint
from il_policies.bags.reader import Bag
from il_policies.bags.types import type_store
from il_policies.checkpoint import CheckpointError
from il_policies.contract import ContractError, from_dict, load_contract
from il_policies.data.errors import BagError, DataError
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode
from il_policies.description import DescriptionError, resolve
from il_policies.exchange.arrays import ImportMapping, import_npz, import_zarr, load_mapping
from il_policies.exchange.lerobot import ExportConfig, export_lerobot, import_lerobot
from test_flow import make_flow

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / 'src').rglob('*.py'), *(ROOT / 'launch').glob('*.py')])


# --- sources ----------------------------------------------------------------------------------------------------------
FORBIDDEN = {'pickle', 'cPickle', '_pickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}


def dangers(text: str) -> list[str]:
    """Calls and imports of a source that would run what a file or a peer says."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or '']
            found += [module for module in modules if module.split('.')[0] in FORBIDDEN]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in ('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'subprocess.getoutput',
                    'subprocess.getstatusoutput') or given.get('shell', 'False') != 'False':
            found.append(name)
        if re.fullmatch(r'yaml\.((full|unsafe)_)?load(_all)?', name) and given.get('Loader') != '_Loader':  # looked at below
            found.append(name)
        if name == 'torch.load':  # an unpickler, even with weights_only
            found.append(name)
        if name in ('np.load', 'numpy.load') and given.get('allow_pickle', 'False') != 'False':
            found.append(name)
    return found


@pytest.mark.parametrize('text', [
    'import pickle', 'from dill import load', 'import joblib.memory', 'eval(x)', 'exec(x)', 'import os\nos.system(x)',
    'yaml.load(x)', 'yaml.load(x, Loader=yaml.Loader)', 'yaml.unsafe_load(x)', 'torch.load(x)',
    'torch.load(x, weights_only=True)', 'np.load(x, allow_pickle=True)', 'subprocess.run(x, shell=True)', 'call(x, shell=y)'])
def test_the_scan_finds(text):
    assert dangers(text)


def test_no_source_runs_what_it_reads():
    assert len(SOURCES) > 60
    assert {str(path.relative_to(ROOT)): found for path in SOURCES if (found := dangers(path.read_text()))} == {}


def test_the_loader_of_yaml_is_a_safe_one():
    from il_policies.yaml_file import _Loader
    assert issubclass(_Loader, yaml.SafeLoader)
    assert set(_Loader.yaml_constructors) == set(yaml.SafeLoader.yaml_constructors) and not _Loader.yaml_multi_constructors


# --- files of strangers -----------------------------------------------------------------------------------------------
class Attack:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    """What is made if anything of a stranger is run; the test fails if it is there at its end."""
    place = tmp_path / 'canary'
    yield place
    assert not place.exists(), 'something was run'


@pytest.fixture
def secret(tmp_path):
    """A folder beside that of the stranger's."""
    folder = tmp_path / 'secret'
    folder.mkdir()
    return folder


@pytest.fixture
def careless(monkeypatch):
    """numcodecs as it was before it refused to unpickle by itself."""
    monkeypatch.setattr(numcodecs.pickles, 'ALLOW_UNSAFE_PICKLE_DECODE', True, raising=False)


def test_attacks_are_real(tmp_path, careless):
    """They do make the canary, of those who are careless."""
    for i, run in enumerate((
            lambda place: pickle.loads(pickle.dumps(Attack(place))),
            lambda place: yaml.load(python_yaml(place), Loader=yaml.UnsafeLoader),
            lambda place: numcodecs.Pickle().decode(pickle.dumps(Attack(place))))):
        run(tmp_path / str(i))
        assert (tmp_path / str(i)).exists()


def python_yaml(place: Path) -> str:
    return f'robot: !!python/object/apply:os.mkdir ["{place}"]\n'


BOMB = 'a0: &a0 [x, x]\n' + ''.join(f'a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}, *a{i}]\n' for i in range(30))


@pytest.mark.parametrize('load', [load_contract, load_mapping])
def test_yaml(tmp_path, canary, load):
    robot = (ROOT / 'config/robots/so101.yaml').read_text()
    for text, words in ((python_yaml(canary), 'could not determine a constructor'), (BOMB, 'aliases make more than'),
                        ('a: &a [*a]', 'holds itself'), ('[' * 1000, 'nested too deeply'), ('a: 2020-99-99', 'not readable'),
                        ('fps: 1\nfps: 2', "'fps' is given twice"), (f'{robot}\nrobot: other', "'robot' is given twice"),
                        ('- 1', 'must be a mapping'), ('a: "\0"', 'not readable')):
        (tmp_path / 'file.yaml').write_text(text)
        with pytest.raises(ContractError, match=words):
            load(tmp_path / 'file.yaml')


def test_yaml_of_honest_people_is_read():
    from il_policies.yaml_file import parse
    text = 'a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n1: one\n? [k, l]\n: pair\n'
    with pytest.raises(yaml.YAMLError, match='unhashable'):
        parse(text)
    text = text.partition('?')[0]
    assert parse(text) == yaml.safe_load(text) and parse(text)['b'] == {'x': 1, 'y': 3}
    assert parse('') is None


@pytest.mark.parametrize('uri', ['package://il_policies/../../../secret/arm.urdf', 'package://../secret/arm.urdf', 'file:///etc/passwd',
                                 '/etc/passwd', 'package://a/b/../../c'])
def test_descriptions_stay_in_their_package(tmp_path, monkeypatch, secret, uri):
    (secret / 'arm.urdf').write_text('<robot/>')
    (tmp_path / 'share' / 'il_policies' / 'b').mkdir(parents=True)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path))
    with pytest.raises(DescriptionError, match='must be package://'):
        resolve(uri)


# --- checkpoints ------------------------------------------------------------------------------------------------------
def forged(folder: Path, weights: bytes | None = None, **changes) -> Path:
    """A checkpoint with other content, and hashes that are right."""
    checkpoint.save(folder, make_flow(), {})
    if weights is not None:
        (folder / 'model.safetensors').write_bytes(weights)
        changes['weights_sha256'] = hashlib.sha256(weights).hexdigest()
    description = {**json.loads((folder / 'policy.json').read_text()), **changes}
    description = {key: value for key, value in description.items() if value is not None}
    description['hash'] = checkpoint._hash(description)
    (folder / 'policy.json').write_text(json.dumps(description))
    return folder


def test_checkpoints(tmp_path, canary):
    assert checkpoint.load(forged(tmp_path / 'fine')).kind == 'flow'
    saved = io.BytesIO()
    torch.save({'w': Attack(canary)}, saved)
    code = {'_target_': 'os.mkdir', 'path': str(canary)}
    attacks = {'pickle': {'weights': pickle.dumps(Attack(canary))}, 'torch': {'weights': saved.getvalue()},
               'kind': {'kind': 'os.mkdir'}, 'path': {'kind': '/etc/passwd'}, 'list': {'kind': ['flow']},
               'target': {'config': code}, 'spec': {'spec': code}, 'statistics': {'statistics': code},
               'statistics_list': {'statistics': [1]}, 'statistics_text': {'statistics': {'action': '__import__("os")'}},
               'extra': {'extra': 5}, 'nothing': {'extra': None}, 'header': {'weights': (2**63).to_bytes(8, 'little') + b'{}'}}
    for name, changes in attacks.items():
        with pytest.raises(CheckpointError):
            checkpoint.load(forged(tmp_path / name, **changes))
    (tmp_path / 'fine' / 'policy.json').write_text('[' * 100_000)
    with pytest.raises(CheckpointError, match='not JSON'):
        checkpoint.load(tmp_path / 'fine')


# --- arrays -----------------------------------------------------------------------------------------------------------
MAPPING = from_dict(ImportMapping, {'fps': 10.0, 'episode_ends': 'ends', 'action': {'array': 'act'},
                                    'observations': {'pose': {'array': 'state'}}}, 'test')
ARRAYS = {'act': np.ones((4, 2), np.float32), 'state': np.ones((4, 3), np.float32), 'ends': np.array([4])}


def test_npz(tmp_path, canary):
    np.savez(tmp_path / 'a.npz', **{**ARRAYS, 'act': np.array([Attack(canary)] * 4, dtype=object)})
    with pytest.raises(DataError, match='without pickled objects'):
        import_npz(tmp_path / 'a.npz', tmp_path / 'out', MAPPING)
    (tmp_path / 'b.npz').write_bytes(pickle.dumps(Attack(canary)))
    with pytest.raises(DataError, match='without pickled objects'):
        import_npz(tmp_path / 'b.npz', tmp_path / 'out', MAPPING)
    assert not (tmp_path / 'out').exists()


def test_zarr(tmp_path, canary, careless):
    def buffer(name: str, **act) -> Path:
        group = zarr.open_group(str(tmp_path / name), mode='w', zarr_format=2)
        for key in ('state', 'ends'):
            group.create_array(f'data/{key}', data=ARRAYS[key])
        group.create_array('data/act', shape=(4, 2), chunks=(4, 2), **act)
        (tmp_path / name / 'data/act/0.0').write_bytes(pickle.dumps(Attack(canary)))
        return tmp_path / name

    sources = {
        'as filter': buffer('a.zarr', dtype='float32', compressors=None, filters=[numcodecs.Pickle()]),
        'as compressor': buffer('b.zarr', dtype='float32', compressors=numcodecs.Pickle(), filters=None)}
    objects = buffer('c.zarr', dtype='float32', compressors=None, filters=None)
    about = json.loads((objects / 'data/act/.zarray').read_text())
    (objects / 'data/act/.zarray').write_text(json.dumps({**about, 'dtype': '|O', 'fill_value': None, 'filters': [
        {'id': 'pickle', 'protocol': 5}]}))
    for source in (*sources.values(), objects):
        with pytest.raises(DataError) as error:
            import_zarr(source, tmp_path / 'out', MAPPING)
        assert not canary.exists() and not (tmp_path / 'out').exists(), error


# --- datasets ---------------------------------------------------------------------------------------------------------
INFO = DatasetInfo(fps=10.0, features={'state': Feature((2,), 'lowdim'), 'front': Feature((16, 16, 3), 'image')},
                   action=ActionInfo(('u',)), label='command')


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    from il_policies.data.decode import encode_jpeg
    create(tmp_path / 'data', INFO)
    write_episode(tmp_path / 'data', 0, {'state': np.ones((4, 2))}, np.ones((4, 1)), np.arange(4) * 10**8, np.zeros(4, bool),
                  {'front': [encode_jpeg(np.zeros((16, 16, 3), np.uint8))] * 4}, {'task': 't'}, {})
    return Dataset(tmp_path / 'data')


def test_feature_names_are_no_paths(dataset):
    file = dataset.path / 'dataset.json'
    for name in ('../../../secret', '/etc/passwd', '..', 'a/b', '.hidden', 'a\0b'):
        content = json.loads(json.dumps(INFO.to_dict()))
        content['features'][name] = content['features'].pop('front')
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match='is no feature name'):
            Dataset(dataset.path)
    file.write_text('[' * 100_000)
    with pytest.raises(DataError, match='not readable'):
        Dataset(dataset.path)


@pytest.mark.parametrize('span', [(0, 2**50), (-5, 3), (7, 2), (2**62, 2**62)])
def test_places_of_images_are_in_their_file(dataset, span):
    file = dataset.folders[0] / 'lowdim.parquet'
    table = pq.read_table(file)
    spans = pa.FixedSizeListArray.from_arrays(pa.array(list(span) * 4, pa.int64()), 2)
    pq.write_table(table.set_column(table.column_names.index('front'), 'front', spans), file)
    with pytest.raises(DataError, match='ends before the image'):
        Dataset(dataset.path).image(0, 'front', 0)


def test_lerobot(tmp_path, dataset, secret, canary):
    export_lerobot(dataset, tmp_path / 'videos')
    export_lerobot(dataset, tmp_path / 'jpeg', ExportConfig(images='jpeg'))
    for kind in ('videos', 'jpeg'):  # what is to be stolen is there, and would do
        shutil.copytree(tmp_path / kind, secret / kind)

    def refused(name: str, words: str, kind: str = 'videos', **changes) -> None:
        source = tmp_path / name
        shutil.copytree(tmp_path / kind, source)
        shutil.rmtree(source / 'meta/il_policies')  # as of others
        info = json.loads((source / 'meta/info.json').read_text())
        (source / 'meta/info.json').write_text(json.dumps({**info, **changes}))
        with pytest.raises(DataError, match=words):
            import_lerobot(source, tmp_path / 'out')
        assert not (tmp_path / 'out').exists()

    place = 'chunk-{chunk_index:03d}/file-{file_index:03d}'
    outside = 'names a file outside'
    refused('a', outside, 'jpeg', data_path=f'../secret/jpeg/data/{place}.parquet')
    refused('b', outside, 'jpeg', data_path=f'{secret}/jpeg/data/{place}.parquet')
    refused('c', outside, video_path=f'../secret/videos/videos/{{video_key}}/{place}.mp4')
    refused('d', outside, video_path=f'{secret}/videos/videos/{{video_key}}/{place}.mp4')
    refused('e', 'names files by', data_path='data/{chunk_index.__class__}')
    refused('f', 'names files by', data_path='data/{chunk_index:999999999d}')
    refused('g', 'names files by', data_path='data/{chunk_index!r}')
    refused('h', outside, 'jpeg', data_path='data/\0')

    shutil.copytree(tmp_path / 'videos', tmp_path / 'i')  # columns of our own folder
    file = tmp_path / 'i/meta/il_policies/dataset.json'
    ours = json.loads(file.read_text())
    for index in ('../../x', -1, 1.5):
        ours['episodes'][0]['meta']['index'] = index
        file.write_text(json.dumps(ours))
        with pytest.raises(DataError, match='of an episode; must be'):
            import_lerobot(tmp_path / 'i', tmp_path / 'out')


@pytest.mark.parametrize('text', ['ffconcat version 1.0\nfile {}\n', '#EXTM3U\n#EXTINF:1,\nfile://{}\n#EXT-X-ENDLIST\n'])
def test_a_video_is_no_list_of_other_files(tmp_path, dataset, secret, text):
    export_lerobot(dataset, tmp_path / 'source')
    shutil.rmtree(tmp_path / 'source/meta/il_policies')
    video = next((tmp_path / 'source').rglob('*.mp4'))
    shutil.copy(video, secret / 'film.mp4')
    video.write_text(text.format(secret / 'film.mp4'))
    with pytest.raises(DataError, match='not readable as video'):
        import_lerobot(tmp_path / 'source', tmp_path / 'out')


# --- bags -------------------------------------------------------------------------------------------------------------
STRING = Entry('words', 'std_msgs/msg/String', 1, 1, b'\0\1\0\0\2\0\0\0x\0')


def test_metadata_names_files_of_its_folder_only(tmp_path, secret):
    write_mcap(secret / 'demo_0.mcap', [STRING])
    assert Bag(secret / 'demo_0.mcap').topics
    for i, name in enumerate((secret / 'demo_0.mcap', '../secret/demo_0.mcap', '..', '../secret')):
        folder = write_metadata(tmp_path / f'bag{i}', [STRING], [str(name)])
        with pytest.raises(BagError):
            Bag(folder)


def test_metadata_is_data(tmp_path, canary):
    for i, text in enumerate((python_yaml(canary), BOMB, '[' * 1000, f'rosbag2_bagfile_information: {BOMB.splitlines()[0]}')):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_mcap(folder / f'{i}_0.mcap', [STRING])
        (folder / 'metadata.yaml').write_text(text)
        with pytest.raises(BagError):
            Bag(folder)


CODE = '__import__("os").mkdir("{}")'
DEFINITIONS = {
    'default': ('ros2msg', 'int32 x {code}'), 'constant': ('ros2msg', 'int32 X={code}'),
    'field': ('ros2msg', 'int32 x={code}\nint32 a\n'), 'name': ('ros2msg', 'int32 a;{code}\n'),
    'text': ('ros2msg', "string X='''\n{code}\n'''\nint32 a\n"), 'quotes': ('ros2msg', 'string X="\\");{code}#"\nint32 a\n'),
    'itself': ('ros2msg', 'pkg/Evil a\n'), 'package': ('ros2msg', '../../secret/Evil a\n'),
    'length': ('ros2msg', 'int32[{code}] a\n'), 'bound': ('ros2msg', 'string<={code} a\n'),
    'idl': ('ros2idl', 'module pkg { module msg { struct Evil { long a_{code}; }; }; };'),
    'idl constant': ('ros2idl', 'module pkg { module msg { module Evil_Constants { const string X = "\\"+{code}+\\""; }; '
                     'struct Evil { long a; }; }; };')}


@pytest.mark.parametrize('name', DEFINITIONS)
def test_definitions_of_messages_are_not_run(canary, name):
    """Code is generated from them, by rosbags; what is no name and no number has no way into it."""
    language, text = DEFINITIONS[name]
    try:
        types = type_store('pkg/msg/Evil', [(language, text.replace('{code}', CODE.format(canary)))], (), 'jazzy')
        types.deserialize_cdr(b'\0\1\0\0\0\0\0\0', 'pkg/msg/Evil')
    except BagError:
        return
    assert name in ('default', 'constant'), 'what is to be a number was kept as text'


def test_folders_of_messages(tmp_path, secret, canary):
    package = tmp_path / 'package'
    (package / 'msg').mkdir(parents=True)
    (secret / 'name').write_text('stolen')
    (package / 'package.xml').write_text(
        f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{secret / "name"}">]><package><name>&x;</name></package>')
    (package / 'msg' / 'Evil.msg').write_text('package/Evil a\n')  # holds itself
    for name in ('package/msg/Evil', 'stolen/msg/Evil', '../msg/Evil', 'package/msg/../../secret/name', 'package/msg/\0'):
        with pytest.raises(BagError):
            type_store(name, (), (package,), 'jazzy')


# --- this machine only ------------------------------------------------------------------------------------------------
def reach(before: str) -> str:
    """ROS_AUTOMATIC_DISCOVERY_RANGE in a shell that has sourced env.sh, from what is set before."""
    shell = subprocess.run(['bash', '-c', f'{before}; . ./env.sh; echo "$ROS_AUTOMATIC_DISCOVERY_RANGE"'], cwd=ROOT, text=True,
                           capture_output=True, check=True, env={'PATH': os.environ['PATH'], 'HOME': os.environ['HOME']})
    return shell.stdout.strip()


def test_env_sh_keeps_to_this_machine():
    assert reach('true') == 'LOCALHOST'
    assert reach('export ROS_AUTOMATIC_DISCOVERY_RANGE=SUBNET') == 'LOCALHOST'  # as ROS 2 itself says when it is sourced
    assert reach('export ROS_AUTOMATIC_DISCOVERY_RANGE=OFF') == 'OFF'


def test_launch_files_keep_to_this_machine():
    files = sorted((ROOT / 'launch').glob('*.launch.py'))
    assert len(files) >= 6
    for path in files:
        first = next(node.args[0].elts[0] for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call) and ast.unparse(node.func) == 'LaunchDescription')
        assert ast.unparse(first) == 'this_machine_only()', f'{path.name}: before anything is started'
    shared = ast.parse((ROOT / 'src/il_runtime/il_runtime/launching.py').read_text())
    function = next(node for node in shared.body if getattr(node, 'name', '') == 'this_machine_only')
    assert ast.unparse(function.body[-1]) == (
        "return SetEnvironmentVariable('ROS_AUTOMATIC_DISCOVERY_RANGE', "
        "EnvironmentVariable('ROS_AUTOMATIC_DISCOVERY_RANGE', default_value='LOCALHOST'))")


def test_containers_and_the_demo_keep_to_this_machine():
    services = yaml.safe_load((ROOT / 'docker/compose.yaml').read_text())['services']
    for name, service in services.items():
        if name != 'train':  # without ROS
            assert service['environment']['ROS_AUTOMATIC_DISCOVERY_RANGE'] == '${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}', name
        assert not {'ports', 'expose'} & set(service)
    demo = (ROOT / 'src/il_runtime/il_runtime/demo/__main__.py').read_text()
    assert "os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'" in demo
