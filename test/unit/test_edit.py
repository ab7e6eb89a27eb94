from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from il_policies import cli
from il_policies.data.convert import dataset_info
from il_policies.data.edit import choose_parts, merge, split
from il_policies.data.errors import DataError
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode
from recordings import contract, jpeg, picture

INFO = DatasetInfo(10.0, {'x': Feature((1,), 'lowdim'), 'front': Feature((8, 12, 3), 'image')}, ActionInfo(('u',)), 'command')


def make(path, episodes, info: DatasetInfo = INFO) -> Dataset:
    """A dataset of 2-row episodes: (index, value) with x = value and grey = 10·value."""
    create(path, info)
    for index, value in episodes:
        x = np.full((2, 1), value)
        front = {'front': [jpeg(picture(10 * value))] * 2} if 'front' in info.features else {}
        write_episode(path, index, {'x': x}, x, np.arange(2), np.zeros(2, bool), front, {'task': f'{value}'}, {'n': value})
    return Dataset(path)


def values(dataset: Dataset) -> list[int]:
    """What its episodes hold, after a look at all they consist of."""
    assert [meta['index'] for meta in dataset.episodes] == list(range(len(dataset)))
    found = [int(dataset.lowdim(i)['x'][0, 0]) for i in range(len(dataset))]
    for i, value in enumerate(found):
        np.testing.assert_allclose(dataset.image(i, 'front', 1), 10 * value, atol=1)
        assert dataset.episodes[i]['task'] == f'{value}' and dataset.report(i) == {'n': value}
    return found


@pytest.fixture(scope='module')
def ten(tmp_path_factory) -> Dataset:
    """Ten episodes, numbered 0, 2, 4, …, of values 0, 1, 2, …"""
    return make(tmp_path_factory.mktemp('edit') / 'ten', [(2 * k, k) for k in range(10)])


def test_merged_in_the_order_given(tmp_path):
    make(tmp_path / 'a', [(0, 1), (5, 2)])
    make(tmp_path / 'b', [(0, 3), (1, 4)])
    merged, left_out = merge([tmp_path / 'b', tmp_path / 'a'], tmp_path / 'c')
    assert values(merged) == [3, 4, 1, 2] and left_out == []
    assert merged.info == INFO
    assert sorted(os.listdir(tmp_path / 'c')) == ['dataset.json', 'episodes']


def test_merging_what_was_split_gives_it_back(tmp_path, ten):
    whole, _ = merge([ten.path], tmp_path / 'whole')
    parts = split(whole.path, tmp_path / 'parts', ['b=5-9', 'a=rest'])
    again, _ = merge([parts['a'].path, parts['b'].path], tmp_path / 'again')
    assert again.hash == whole.hash


def test_an_episode_is_taken_once(tmp_path):
    a = make(tmp_path / 'a', [(0, 1), (1, 2)])
    b = make(tmp_path / 'b', [(0, 2), (1, 3)])
    merged, left_out = merge([a.path, b.path, a.path], tmp_path / 'c')
    assert values(merged) == [1, 2, 3]
    assert left_out == [str(folder) for folder in (b.folders[0], *a.folders)]


def test_damaged_episodes_are_not_passed_on(tmp_path):
    a = make(tmp_path / 'a', [(0, 1), (1, 2)])
    b = make(tmp_path / 'b', [(0, 2), (1, 3)])
    file = a.folders[1] / 'images/front.mjpeg'
    file.write_bytes(bytes([*file.read_bytes()[:-1], 0]))
    merged, left_out = merge([a.path, b.path], tmp_path / 'c')
    assert values(merged) == [1, 2, 3] and left_out == [str(a.folders[1])]
    for make_it in (lambda: merge([a.path], tmp_path / 'd'), lambda: split(a.path, tmp_path / 'd', ['x=rest'])):
        with pytest.raises(DataError, match='E302 .*a/episodes/000001: not what was written'):
            make_it()
    assert not (tmp_path / 'd').exists()
    split(a.path, tmp_path / 'd', ['x=0'])


def test_the_folder_one_is_in(tmp_path, ten, monkeypatch):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    for make_it in (lambda: merge([ten.path], '.'), lambda: split(ten.path, '.', ['a=rest'])):
        with pytest.raises(DataError, match='E301 .: is the folder you are in'):
            make_it()
    (tmp_path / 'target').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'target')
    merge([ten.path], '../link')
    assert len(Dataset(tmp_path / 'target')) == len(ten)


def test_the_copy_outlives_the_source(tmp_path):
    a = make(tmp_path / 'a', [(0, 1), (1, 2)])
    merged, _ = merge([a.path], tmp_path / 'c')
    before = merged.hash
    make(tmp_path / 'a', [(0, 7)])  # replaces an episode of the source
    assert values(Dataset(a.path)) == [7, 2]
    assert values(merged) == [1, 2] and Dataset(merged.path).hash == before


def test_another_disk(tmp_path):
    """/dev/shm is another file system than the temporary folder: no hard links."""
    shared = '/dev/shm'
    if not os.path.isdir(shared) or os.stat(shared).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip('no second file system here')
    a = make(tmp_path / 'a', [(0, 1), (1, 2)])
    out = f'{shared}/il_test_edit_{os.getpid()}'
    try:
        merged, _ = merge([a.path], out)
        assert values(merged) == [1, 2] and merged.hash == a.hash
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_datasets_that_do_not_fit_are_named_with_every_difference(tmp_path):
    a = make(tmp_path / 'a', [(0, 1)])
    other = replace(INFO, fps=20.0, label='next_state')
    b = make(tmp_path / 'b', [(0, 1)], other)
    with pytest.raises(DataError, match='(?s)E303 .*b: differs from .*a in\n  fps: 20.0 ≠ 10.0\n  label: next_state ≠ command\n'):
        merge([a.path, b.path], tmp_path / 'c')
    robots = [contract(), contract(latency=0.1)]
    for name, robot in zip('de', robots):
        create(tmp_path / name, dataset_info(robot))
    with pytest.raises(DataError, match=r'e: differs from .*d in\n  contract: observations.front.latency: 0.1 ≠ 0.0\nconvert'):
        merge([tmp_path / 'd', tmp_path / 'e'], tmp_path / 'c')
    assert not (tmp_path / 'c').exists() and not list(tmp_path.glob('.*'))


def test_nothing_is_overwritten(tmp_path, ten):
    for out in (ten.path, ten.path.parent):
        for make_it in (lambda out: merge([ten.path], out), lambda out: split(ten.path, out, ['a=rest'])):
            with pytest.raises(DataError, match='E301 .*exists already; remove it or give another folder'):
                make_it(out)
    with pytest.raises(DataError, match='E302 .*no dataset here'):
        merge([ten.path, tmp_path], tmp_path / 'c')
    assert os.listdir(tmp_path) == []


def test_split_by_episode_and_rest(tmp_path, ten):
    parts = split(ten.path, tmp_path / 'out', ['bad=6,0-2', 'val=10', 'train=rest'])
    assert {name: values(part) for name, part in parts.items()} == {'bad': [0, 1, 3], 'val': [5], 'train': [2, 4, 6, 7, 8, 9]}


def test_split_by_what_is_known(tmp_path):
    create(tmp_path / 'd', INFO)
    known = [(True, 'PASS'), (False, 'FAIL'), (False, 'PASS'), (None, 'FAIL'), (True, 'WARN')]
    for index, (success, verdict) in enumerate(known):
        write_episode(tmp_path / 'd', index, {'x': np.full((2, 1), index)}, np.zeros((2, 1)), np.arange(2), np.zeros(2, bool),
                      {'front': [jpeg(picture(0))] * 2}, {'success': success}, {'verdict': verdict})
    dataset = Dataset(tmp_path / 'd')
    assert choose_parts(dataset, ['bad=verdict:FAIL', 'failed=success:false', 'good=rest']) == {
        'bad': [1, 3], 'failed': [2], 'good': [0, 4]}
    assert choose_parts(dataset, ['failed=success:False', 'bad=verdict:FAIL']) == {'failed': [1, 2], 'bad': [3]}
    with pytest.raises(DataError, match="part a: no episode has 'side'; there are: content, index, length, .*verdict"):
        choose_parts(dataset, ['a=side:left'])
    with pytest.raises(DataError, match='part a: no episode is left with verdict OK; verdict is one of: FAIL, PASS, WARN'):
        choose_parts(dataset, ['a=verdict:OK'])
    with pytest.raises(DataError, match='part b: episode 1 is named twice'):
        choose_parts(dataset, ['a=verdict:FAIL', 'b=0-2'])


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    named=st.sets(st.integers(0, 9), max_size=3),
)
def test_shares(ten, shares, seed, named):
    shares = [share / sum(shares) for share in shares]
    parts = [f'p{k}={share}' for k, share in enumerate(shares)]
    parts += ['n=' + ','.join(str(2 * place) for place in sorted(named))] if named else []
    try:
        chosen = choose_parts(ten, parts, seed)
    except DataError as error:
        assert 'no episodes for' in str(error) and min(shares) * (10 - len(named)) < 1.5
        return
    assert sorted(place for part in chosen.values() for place in part) == list(range(10))  # each episode once
    assert all(part == sorted(part) for part in chosen.values())
    assert chosen.get('n', []) == sorted(named)
    for k, share in enumerate(shares):
        assert abs(len(chosen[f'p{k}']) - (10 - len(named)) * share) <= 1
    assert choose_parts(ten, parts, seed) == chosen


def test_shares_add_up(ten):
    assert {name: len(part) for name, part in choose_parts(ten, ['a=0.7', 'b=0.2', 'c=0.1']).items()} == {'a': 7, 'b': 2, 'c': 1}
    assert {name: len(part) for name, part in choose_parts(ten, ['a=0.25', 'b=0.3']).items()} == {'a': 2, 'b': 4}


def test_the_seed_decides(tmp_path, ten):
    drawn = {tuple(choose_parts(ten, ['a=0.5'], seed)['a']) for seed in range(6)}
    assert len(drawn) > 3 and all(len(part) == 5 for part in drawn)
    assert values(split(ten.path, tmp_path / 'out', ['a=0.5'], 3)['a']) == choose_parts(ten, ['a=0.5'], 3)['a']


@pytest.mark.parametrize('parts, words', [
    ([], r'no parts given; valid: NAME=0.9 \(a share\), NAME=0-49,60 \(episodes\), .*NAME=rest'),
    (['a'], "part 'a': not understood; valid: NAME=0.9"),
    (['../a=0.5'], "part '../a=0.5': not understood"),
    (['a=0.5', 'a=rest'], "part 'a=rest': given twice"),
    (['a=half'], 'part a=half: not understood'),
    (['a=1.5'], 'part a=1.5: not understood'),
    (['a=nan'], 'part a=nan: not understood'),
    (['a=0.6', 'b=0.6'], 'the shares a=0.6 b=0.6 are more than 1 together'),
    (['a=3'], 'part a: no episode 3; there are 0, 2, 4, 6, 8, 10, 12, 14, 16, 18$'),
    (['a=0,2', 'b=2-9'], 'part b: episode 2 is named twice'),
    (['a=rest', 'b=rest'], 'a and b are both the rest'),
    (['a=1.0', 'b=rest'], 'no episodes for b; there are 10'),
    (['a=0.01'], 'no episodes for a'),
    (['a=4-2'], 'part a: no episode 4-2'),
])
def test_parts_refused(tmp_path, ten, parts, words):
    with pytest.raises(DataError, match=f'E303 .*{words}'):
        split(ten.path, tmp_path / 'out', parts)
    assert os.listdir(tmp_path) == []


def test_commands(tmp_path, ten, capsys):
    cli.main(['split', str(ten.path), 'train=0.8', 'val=rest', '--out', str(tmp_path / 'out'), '--seed', '3'])
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r'[0-9a-f]{16}$', '#', line) for line in lines] == [
        f'{tmp_path}/out/train: 8 episodes, 16 rows, hash #', f'{tmp_path}/out/val: 2 episodes, 4 rows, hash #']
    cli.main(['merge', str(tmp_path / 'out/train'), str(tmp_path / 'out/val'), str(ten.path), '--out', str(tmp_path / 'all')])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'{tmp_path}/all: 10 episodes, 20 rows, hash ')
    assert lines[1].startswith('left out, being the same as one before: ') and lines[1].count('/episodes/') == 10
    cli.main(['split', str(ten.path), 'a=0,2', '--out', str(tmp_path / 'few')])
    assert capsys.readouterr().out.endswith('\n8 episodes are in no part\n')
    with pytest.raises(SystemExit) as end:
        cli.main(['merge', str(tmp_path / 'none'), '--out', str(tmp_path / 'x')])
    assert end.value.code == 2 and capsys.readouterr().err.startswith('il: E302 ')
