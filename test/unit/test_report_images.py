from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from il_policies.contract import load_contract
from il_policies.sim.reach_around import Scene
from il_runtime.demo import images, report, report_images
from test_report import demonstrations, make, text_of

assert demonstrations  # a fixture

# No two counts alike, so that a number on the page is that number.
RESULTS = {
    'demonstrations': 4, 'dds': {'successes': 17, 'episodes': 19, 'touched': 1},
    'flow': {'successes': 46, 'episodes': 51, 'touched': 3},
    'shuffled': {'successes': 6, 'episodes': 52, 'touched': 5, 'at_shown': 41}, 'chance': 0.1421,
    'controller': {'rate_hz': 50.0, 'lateness_p50_ms': 0.151, 'lateness_p99_ms': 0.683, 'lateness_max_ms': 7.912,
                   'missed_ticks': 7, 'ticks': 9012, 'limit_violations': 0, 'scheduler': 'SCHED_OTHER'},
    'machine': 'x86_64 <test>, 2 cores', 'training': {'flow': {'steps': 4001, 'seconds': 613.2, 'loss': 0.0123, 'episodes': 4}},
    'dataset': '4 episodes, 136 rows, 9 repeated', 'stages': [['set-up', 61.5], ['training', 613.4]], 'wall_s': 1553.6,
    'setup_s': 61.5}


@pytest.fixture(scope='module')
def out(tmp_path_factory, demonstrations, request):  # noqa: F811
    """A demo_out/images with its report."""
    folder = tmp_path_factory.mktemp('demo') / 'demo_out' / 'images'
    folder.mkdir(parents=True)
    make(folder, load_contract(request.config.rootpath / 'config/robots/so101.yaml'), demonstrations)
    shutil.copy(folder / 'rollouts' / 'bc.npz', folder / 'rollouts' / 'shuffled.npz')
    (folder / 'results.json').write_text(json.dumps(RESULTS))
    assert report_images.write(folder) == folder / 'report.html'
    return folder


def test_the_page_needs_nothing_else_and_has_the_numbers(out):
    page = (out / 'report.html').read_text()
    for absent in ('http:', 'https:', '<script', '<link', '<iframe', 'url(', '@import'):
        assert absent not in page
    sources = re.findall(r'(?:src|srcset)="([^"]*)"', page)
    assert all(source.startswith('data:image/webp;base64,') for source in sources)
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.partition(',')[2]))) for source in sources]
    # a clip, first images of the 4 demonstrations, 2 charts of ends, 4 views from above, 3 charts in two sizes
    assert len(pictures) == 17 and sum(picture.size == (96, 96) for picture in pictures) == 4
    text = text_of(page)
    assert '{' not in text, 'a placeholder was left'
    for number in ('46 of 51', '46 / 51', '17 / 19', '6 / 52', '6 of 52', '41 of 52', '14&nbsp;%', '3 touched', '5 touched',
                   '7 missed of 9012', '4001', '613', '0.0123', RESULTS['dataset'], 'x86_64 &lt;test&gt;', 'goal 0 cm',
                   'goal 2 cm right', '2 left, 2 right', 'demo_out/images/checkpoints/flow'):
        assert number in text, number
    assert 'that is chance' in text


def test_more_than_chance_is_called_so(out, monkeypatch):
    monkeypatch.setattr(report, 'data_uri', lambda content: '')  # pictures were tested above
    monkeypatch.setattr(report_images, 'data_uri', lambda content: '')
    monkeypatch.setattr(report, 'render_clip', lambda shown: b'')
    (out / 'results.json').write_text(json.dumps({**RESULTS, 'shuffled': {**RESULTS['shuffled'], 'successes': 22}}))
    assert 'that is more than chance' in text_of(report_images.write(out).read_text())


def test_the_arc_runs_from_left_to_right():
    points = np.array([(0.0388 + 0.2475, 0.0), (0.0388, -0.2475), (0.0388 + 0.3 * np.cos(0.2), 0.3 * np.sin(0.2))])
    np.testing.assert_allclose(report_images.along(points), [0.0, 24.75 * np.pi / 2, -24.75 * 0.2], atol=1e-9)


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['report_images', str(tmp_path)])
    assert report.main(report_images.write, 'report_images', 'demo_out/images', 'make demo IMAGES=1') == 1
    assert 'results.json' in capsys.readouterr().err


def test_chance_is_the_share_of_pairs_that_are_near():
    goals = [(0.28, 0.0), (0.28, 0.014), (0.28, 0.028), (0.28, 0.1)]  # two of six pairs are less than 15 mm apart
    assert images.chance([Scene(goal=goal) for goal in goals]) == pytest.approx(2 / 6)


def test_runs_are_held_against_the_goal_that_they_were_shown(tmp_path):
    (tmp_path / 'rollouts').mkdir()
    tips = np.zeros((7, 3))
    tips[2, :2], tips[4, :2], tips[6, :2] = (0.28, 0.05), (0.28, 0.03), (0.28, 0.0)  # the last of each run
    np.savez(tmp_path / 'rollouts' / 'shuffled.npz', tips=tips, ends=[3, 5, 7], goals=[(0.28, 0.0), (0.28, 0.05), (0.28, -0.05)])
    # The first ends where the second's goal is, the third where the first's is, the second far from the third's.
    assert images.ended_at_shown(tmp_path) == 2
