from __future__ import annotations

import json
import math

import numpy as np
import pytest

from il_policies.bench import BenchError, inference, methods, multimodal, publish, pusht, training
from il_policies.cli import BENCHMARKS, main

RNG = np.random.default_rng(3)


def test_demonstrations_are_valid_and_take_both_ways_equally():
    ends, ways = multimodal.demonstrations(400, RNG)
    valid, side = multimodal.judge(ends, ways)
    assert valid.all() and (side > 0).sum() == 200
    np.testing.assert_allclose(ways[:, 0], ends[:, :2])
    np.testing.assert_allclose(ways[:, -1], ends[:, 2:])


def test_their_mean_is_not():
    ends, ways = multimodal.demonstrations(400, RNG)
    valid, _ = multimodal.judge(ends, np.broadcast_to(ways.mean(axis=0), ways.shape))
    assert not valid.any()


@pytest.mark.parametrize(('change', 'valid'), [
    (lambda way: way, True),
    (lambda way: way * [1.0, -1.0], True),
    (lambda way: way * [1.0, 0.4], False),  # through the disc, at 0.12
    (lambda way: way + np.linspace(0.0, 0.06, len(way))[:, None] * [1.0, 0.0], False),  # beyond the goal
    (lambda way: np.where(np.arange(len(way))[:, None] % 15 == 0, way, [[0.5, 0.3]] * len(way)), True),
    (lambda way: np.linspace(way[0], way[-1], len(way)), False),
])
def test_a_way_is_judged_between_its_steps_too(change, valid):
    way = np.stack([np.linspace(0.0, 1.0, 16), 0.3 * np.sin(np.linspace(0.0, np.pi, 16))], axis=1)
    found, _ = multimodal.judge(np.array([[0.0, 0.0, 1.0, 0.0]]), change(way)[None])
    assert found[0] == valid


def test_a_line_between_two_steps_can_cross_the_disc():
    way = np.array([[0.0, 0.0]] * 8 + [[1.0, 0.0]] * 8)  # no step is in it
    assert not multimodal.judge(np.array([[0.0, 0.0, 1.0, 0.0]]), way[None])[0].any()


def test_multimodal_writes_what_it_prints(tmp_path, capsys):
    main(['bench', 'multimodal', '--out', str(tmp_path), '--policies', 'bc', '--steps', '50', '--samples', '50'])
    result = json.loads((tmp_path / 'multimodal.json').read_text())
    assert result['rows'][0]['policy'] == 'bc' and 0.0 <= result['rows'][0]['invalid_%'] <= 100.0
    assert result['machine'] and '50 steps' in result['budget'] and (tmp_path / 'multimodal.png').stat().st_size > 5000
    assert 'bc' in capsys.readouterr().out


def test_inference_compares_backends(tmp_path):
    result = inference.run(tmp_path, ('flow-64-euler-5',), rounds=3, threads=1, backends=('torch',))
    row, = result['rows']
    assert row['p10_ms'] <= row['median_ms'] <= row['p90_ms'] and row['off_torch'] == 0.0 and row['times_torch'] == 1.0


@pytest.mark.parametrize(('call', 'message'), [
    (lambda out: multimodal.run(out, ('bc', 'gpt')), 'policies: gpt; valid: bc, act, diffusion, flow'),
    (lambda out: multimodal.run(out, steps=3), 'steps is 3, must be at least 50'),
    (lambda out: methods.run(out, out, ()), 'policies: none given; valid'),
    (lambda out: methods.run(out, out, minutes=0.0), 'minutes is 0, must be > 0'),
    (lambda out: pusht.run(out, out, episodes=0), 'episodes is 0, must be at least 1'),
    (lambda out: inference.run(out, ('act',)), 'cases: act; valid: act-512'),
    (lambda out: training.run((), out), 'presets are'),
])
def test_what_cannot_be_run_is_named(call, message, tmp_path):
    with pytest.raises(BenchError, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_there_is_no_number_for_is_empty_in_the_table_and_null_in_valid_json(tmp_path, capsys):
    publish('x', 'none', [{'policy': 'bc', 'jerk': math.nan}], tmp_path)
    written = json.loads((tmp_path / 'x.json').read_text(), parse_constant=pytest.fail)
    assert written['rows'] == [{'policy': 'bc', 'jerk': None}] and 'nan' not in capsys.readouterr().out


def test_the_command_lists_its_benchmarks(capsys):
    with pytest.raises(SystemExit) as exit:
        main(['bench', '--help'])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and all(name in shown for name in BENCHMARKS)
    with pytest.raises(SystemExit) as exit:
        main(['bench', 'speed'])
    assert exit.value.code == 2 and "no benchmark 'speed'; valid: multimodal, " in capsys.readouterr().err
