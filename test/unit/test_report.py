from __future__ import annotations

import base64
import copy
import io
import json
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from il_policies.contract import load_contract
from il_policies.data import store
from il_policies.sim.reach_around import JOINTS, ReachAround, Scene, expert, inverse_kinematics, tips
from il_runtime.demo import report

# No two counts alike, so that a number on the page is that number.
RESULTS = {
    'demonstrations': 4,
    'policies': {'bc': {'successes': 3, 'episodes': 21, 'touched': 17,
                        'lockstep_successes': 13, 'lockstep_episodes': 101, 'lockstep_touched': 83},
                 'flow': {'successes': 19, 'episodes': 22, 'touched': 2,
                          'lockstep_successes': 97, 'lockstep_episodes': 102, 'lockstep_touched': 1}},
    'studies': {'bc_left': {'successes': 93, 'episodes': 96, 'touched': 0},
                'flow_one_start': {'left': 24, 'right': 26, 'episodes': 50, 'successes': 48},
                'fresh_average': {'successes': 28, 'episodes': 51, 'touched': 20, 'jerk_rms': 123.4},
                'warm_start': {'successes': 49, 'episodes': 52, 'touched': 1, 'jerk_rms': 234.5}},
    'controller': {'rate_hz': 50.0, 'lateness_p50_ms': 0.151, 'lateness_p99_ms': 0.683, 'lateness_max_ms': 7.912,
                   'missed_ticks': 5, 'ticks': 9012, 'limit_violations': 0, 'scheduler': 'SCHED_OTHER'},
    'machine': 'x86_64 <test>, 2 cores',
    'training': {'flow': {'steps': 2500, 'seconds': 98.2, 'loss': 0.0123},
                 'bc': {'steps': 2501, 'seconds': 87, 'loss': 0.0045}},
    'dataset': '4 episodes, 136 rows, 7 repeated',
    'stages': [['set-up', 61.5], ['training', 171.4]], 'wall_s': 553.6, 'setup_s': 61.5}


@pytest.fixture(scope='module')
def demonstrations() -> list[tuple[Scene, int, np.ndarray]]:
    """Scene, side and joint positions (N, 6) at 50 Hz."""
    scenes = (Scene(), Scene((0.102, 0.015), (0.28, -0.02)))
    return [(scene, side, expert(scene, side)) for scene in scenes for side in (1, -1)]


def make(out, contract, demonstrations) -> None:
    """A demo_out whose policies replay demonstrations (Flow) and their average (BC)."""
    info = store.DatasetInfo(10.0, {'joint_positions': store.Feature((6,), 'lowdim', JOINTS),
                                    'goal': store.Feature((2,), 'lowdim', ('x', 'y')),
                                    'front': store.Feature((96, 96, 3), 'image')},
                             store.ActionInfo(JOINTS), 'command', contract.to_dict(), contract.hash)
    store.create(out / 'dataset', info)
    jpeg = cv2.imencode('.jpg', np.full((96, 96, 3), 90, np.uint8))[1].tobytes()
    for i, (scene, _, positions) in enumerate(demonstrations):
        rows = positions[::5]
        T = len(rows)
        store.write_episode(out / 'dataset', i, {'joint_positions': rows, 'goal': np.tile(scene.goal, (T, 1))}, rows,
                            np.arange(T) * 10**8, np.zeros(T, bool), {'front': [jpeg] * T}, {}, {})
    average = (demonstrations[0][2] + demonstrations[1][2])[:80] / 2
    (out / 'rollouts').mkdir()
    for name in ('bc', 'flow', 'bc_left', 'flow_one_start', 'fresh_average', 'warm_start', 'bc_dds', 'flow_dds'):
        runs = [q for *_, q in demonstrations]
        if name in ('bc', 'bc_dds', 'fresh_average'):
            runs = [average, runs[0]]
        arrays = {'tips': np.concatenate([tips(q) for q in runs]), 'ends': np.cumsum([len(q) for q in runs]),
                  'reached': np.array([len(q) > 80 for q in runs]), 'touched': np.array([len(q) == 80 for q in runs]),
                  'starts': np.tile((0.107, 0.0), (len(runs), 1)), 'goals': np.tile((0.28, 0.0), (len(runs), 1))}
        if name.endswith('dds'):
            q, starts = runs[-1], np.arange(0, 80, 40)
            arrays |= {'lateness': np.abs(np.random.default_rng(0).normal(size=500)) * 1e-3,
                       'shown_command_times': 7.0 + 0.02 * np.arange(len(q)), 'shown_commands': q,
                       'shown_joint_times': 7.005 + 0.02 * np.arange(len(q)), 'shown_joints': q,
                       'shown_chunk_starts': 7.0 + 0.02 * starts, 'chunk_period': 0.1,
                       'shown_chunks': np.stack([q[start:start + 80:5] for start in starts]),
                       'shown_goal': np.array((0.28, 0.0))}
        np.savez(out / 'rollouts' / f'{name}.npz', **arrays)


def text_of(page: str) -> str:
    """What a reader sees, as one line."""
    return ' '.join(re.sub(r'<[^>]*>', ' ', re.sub(r'<style>.*?</style>', '', page, flags=re.DOTALL)).split())


@pytest.fixture(scope='module')
def out(tmp_path_factory, demonstrations, request):
    """A demo_out with its report."""
    folder = tmp_path_factory.mktemp('demo') / 'demo_out'
    folder.mkdir()
    make(folder, load_contract(request.config.rootpath / 'config/robots/so101.yaml'), demonstrations)
    (folder / 'results.json').write_text(json.dumps(RESULTS))
    assert report.write(folder) == folder / 'report.html'
    return folder


def test_the_page_needs_nothing_else(out):
    page = (out / 'report.html').read_text()
    assert len(page) < 4e6
    for absent in ('http:', 'https:', '<script', '<link', '<iframe', 'url(', '@import'):
        assert absent not in page
    assert '{' not in text_of(page), 'a placeholder was left'
    sources = re.findall(r'(?:src|srcset)="([^"]*)"', page)
    assert all(source.startswith('data:image/webp;base64,') for source in sources)
    images = [Image.open(io.BytesIO(base64.b64decode(source.partition(',')[2]))) for source in sources]
    for image in images:
        image.load()
    # 4 + 2 views from above, 1 from one start, 2 of averaging, 3 charts in two sizes, a clip and a camera image
    assert len(images) == 17
    clip, = (image for image in images if getattr(image, 'is_animated', False))
    # 3.3 s at 10 frames a second; frames that are alike may be stored once.
    assert clip.size == (480, 360) and 20 < clip.n_frames < 36 and clip.info['loop'] == 0
    pixels = np.asarray(clip.convert('RGB'), float)
    clip.seek(10)
    assert np.abs(np.asarray(clip.convert('RGB'), float) - pixels).max() > 50, 'the arm moves'
    assert Image.open(out / 'paths.png').width > 1200


def test_the_numbers_are_those_of_results_json(out):
    text = text_of((out / 'report.html').read_text())
    for number in (
            '97 of 102', '13 of 101', '3 / 21', '13 / 101', '19 / 22', '97 / 102', '93 / 96', '28 / 51', '49 / 52',
            '17 touched', '83 touched', '2 touched', '1 touched', '24 left', '26 right', '48 of 50', '20 of 51',
            '1 of 52', '123.4 rad/s³', '234.5 rad/s³', '0.151 ms', '0.683 ms', '7.912 ms', '5 missed of 9012',
            '0 limit violations', 'SCHED_OTHER', 'x86_64 &lt;test&gt;', '2500', '2501', '0.0123', '0.0045',
            RESULTS['dataset'], '61.5 s', '171.4 s', '553.6 s', '4 demonstrations', '2 left, 2 right'):
        assert number in text, number
    # Fresh noise has the lower jerk here, and fails: the page must say so.
    assert 'smoothness says nothing without success' in text
    assert 'not the training' in text


def test_optional_results_may_be_missing(out, monkeypatch):
    kept = {key: copy.deepcopy(RESULTS[key]) for key in ('demonstrations', 'policies', 'controller')}
    del kept['controller']['scheduler'], kept['policies']['bc']['touched']
    (out / 'results.json').write_text(json.dumps(kept))
    monkeypatch.setattr(report, 'data_uri', lambda content: '')  # pictures were tested above
    monkeypatch.setattr(report, 'render_clip', lambda shown: b'')
    text = text_of(report.write(out).read_text())
    assert '97 of 102' in text and 'jerk' not in text and 'one side' not in text


def test_what_is_missing_is_named(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['report', str(tmp_path)])
    assert report.main() == 1
    assert 'results.json' in capsys.readouterr().err
    monkeypatch.setattr('sys.argv', ['report'])
    assert report.main() == 2


def test_tips_are_forward_kinematics(demonstrations):
    wanted = np.array([[0.11, 0.0, 0.03], [0.2, 0.08, 0.03], [0.28, -0.03, 0.04]])
    np.testing.assert_allclose(tips(inverse_kinematics(wanted)), wanted, atol=1e-4)
    simulation = ReachAround(camera=False)
    simulation.reset(Scene((0.112, -0.01)))
    np.testing.assert_allclose(tips(simulation.joint_positions[None])[0], simulation.tip, atol=1e-9)


def test_sides_of_demonstrations(demonstrations):
    for _, side, positions in demonstrations:
        assert report.side(tips(positions)) == ('left' if side > 0 else 'right')


def test_seam_is_where_successive_chunks_differ_most():
    chunks = np.zeros((4, 8, 6))
    chunks[1, 2, 0] = 0.2   # 0.2 above chunk 0 at 0.6 s
    chunks[2, 1, 0] = -0.7  # 0.7 below chunk 1 at 0.9 s
    chunks[3, 7, 0] = 3.0   # not in the first half
    shown = report.Shown(np.arange(0, 2, 0.02), np.zeros((100, 6)), np.arange(0, 2, 0.01), np.zeros((200, 6)),
                         np.array([0.0, 0.4, 0.8, 1.2]), chunks, 0.1, (0.28, 0.0), 'reached')
    assert shown.seam(0) == (pytest.approx(0.8), pytest.approx(0.7))
    assert shown.seam(1) == (0.0, 0.0)
    # What was never commanded does not count.
    assert replace(shown, command_times=np.array([0.0, 0.7])).seam(0) == (pytest.approx(0.4), pytest.approx(0.2))


@pytest.mark.parametrize('k, n', [(0, 20), (7, 20), (97, 100), (100, 100)])
def test_interval_is_wilsons(k, n):
    low, high = report.interval(k, n)
    assert 0 <= low < high <= 1 and low - 1e-12 <= k / n <= high + 1e-12
    # Its ends are the rates p from which k/n is 1.96 standard deviations away.
    for p in (low, high):
        assert abs(k / n - p) == pytest.approx(1.96 * np.sqrt(p * (1 - p) / n), abs=1e-7)
