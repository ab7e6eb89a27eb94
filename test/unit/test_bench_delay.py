from __future__ import annotations

import json
import math

import numpy as np
import pytest

from il_policies.bench import BenchError, delay
from il_policies.bench.delay import (
    ACTION_NOISE,
    METHODS,
    best_blend,
    bootstrap,
    demonstrate,
    difference,
    execution_of,
    mean,
    moving,
    ratio,
    rms_jerk,
    seam_jumps,
    verdict,
    wilson,
)
from il_policies.contract import load_contract
from il_policies.data.store import Dataset
from il_policies.lockstep import scenes
from il_policies.policies.transformer import TransformerConfig


def test_the_jump_at_a_seam_is_the_change_of_velocity():
    targets = np.zeros((40, 2))
    targets[:, 0] = 0.02 * np.arange(40)      # 1 rad/s all the way
    targets[11:, 0] += 0.05                   # a chunk arrives at 10 and is 0.05 + 0.05 rad ahead, over two periods
    targets[12:, 0] += 0.05
    targets[31:, 1] -= 0.01 * np.arange(1, 10)  # another one at 30 sets off a standing joint at 0.5 rad/s
    np.testing.assert_allclose(seam_jumps(targets, [0, 10, 20, 30, 39, 60]), [2.5, 0.0, 0.5], atol=1e-9)
    assert seam_jumps(targets, [0]).shape == (0,)


def test_what_happens_more_than_a_step_after_a_seam_is_not_its_fault():
    targets = np.zeros((30, 1))
    targets[16:] = 0.1
    np.testing.assert_allclose(seam_jumps(targets, [0, 10]), [0.0])
    np.testing.assert_allclose(seam_jumps(targets, [0, 11]), [5.0])


def test_jerk_of_a_cubic_and_of_a_sine():
    t = np.arange(500) * 0.02
    assert rms_jerk(np.stack([t ** 3, t ** 3], axis=1)) == pytest.approx(6.0)
    assert rms_jerk(np.sin(2.0 * t)[:, None]) == pytest.approx(8.0 / math.sqrt(2.0), rel=0.03)
    corners = np.interp(t, t[::5], np.sin(2.0 * t[::5]))[:, None]
    assert rms_jerk(corners) == pytest.approx(rms_jerk(np.sin(2.0 * t)[:, None]))
    assert math.isnan(rms_jerk(np.zeros((15, 2))))


def test_wilson_as_published():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for (r, n), expected in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611),
                             (1, 29): (0.0061, 0.1718)}.items():
        assert wilson(r, n) == pytest.approx(expected, abs=6e-5)


def test_pairs_are_drawn_together():
    rng = np.random.default_rng(0)
    reference = rng.lognormal(size=100)
    assert bootstrap(ratio, 0.5 * reference, reference) == pytest.approx((0.5, 0.5, 0.5))
    found, low, high = bootstrap(difference, reference + rng.normal(1.0, 0.1, 100), reference)
    assert found == pytest.approx(1.0, abs=0.03) and high - low == pytest.approx(2 * 1.96 * 0.1 / 10, rel=0.3)


def test_means_and_ratios_leave_out_what_is_not_there():
    nan = float('nan')
    assert mean(np.array([1.0, nan, 3.0])) == 2.0 and math.isnan(mean(np.array([nan, nan])))
    assert ratio(np.array([1.0, nan, 5.0]), np.array([2.0, 7.0, nan])) == 0.5


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('d', [0, 4, 8])
def test_every_cell_can_be_executed(method, d):
    execution = execution_of(method, d)
    execution.check(16)
    assert (execution.delay, execution.action_noise) == (d, ACTION_NOISE)
    assert execution.stride == (8 if method == 'synchronous' else max(4, d))


def test_success_counts_before_smoothness():
    def cell(success, seam):
        return {'success': np.array(success, float), 'seam': np.array(seam, float)}

    tried = {('newest_first', 0.1): cell([1, 0], [0.1, 0.1]), ('newest_first', 0.5): cell([1, 1], [3, 3]),
             ('crossfade', 0.0): cell([1, 1], [2, 2]), ('oldest_first', 0.01): cell([1, 1], [math.nan, math.nan])}
    assert best_blend(tried) == ('crossfade', 0.0)


def test_half_as_rough_must_hold_outside_the_interval():
    rng = np.random.default_rng(1)
    rough = rng.uniform(1.0, 2.0, 60)
    naive = {'seam': rough, 'jerk': rough, 'success': np.ones(60)}
    smooth = {'seam': 0.3 * rough, 'jerk': 0.5 * rough * rng.uniform(0.5, 1.5, 60), 'success': np.ones(60)}
    smooth['success'][:30] = 0.0
    found = verdict({(4, 'naive'): naive, (4, 'rtc'): smooth, (0, 'rtc'): naive}, 4)
    assert found['seam_halved'] and not found['jerk_halved'] and not found['no_worse']
    assert found['seam_ratio'] == pytest.approx((0.3, 0.3, 0.3)) and found['best_success'] == 'naive'
    assert found['success_difference'][0] == -0.5


def test_demonstrations_are_what_the_policy_will_see(root, tmp_path):
    contract = load_contract(root / 'config/robots/so101.yaml')
    data = demonstrate(tmp_path / 'a', contract, 4, 5)
    assert len(data) == 4 and [meta['side'] for meta in data.episodes] == ['left', 'right'] * 2
    scene = moving(scenes(2, 5, 'wide'), 5)[0]
    table = Dataset(tmp_path / 'a').lowdim(0)
    T = len(table['stamp'])
    np.testing.assert_allclose(table['goal'], scene.goal_at(0.1 * np.arange(T)), atol=1e-6)
    assert table['action'].shape == (T, 6) and np.ptp(table['goal'], axis=0).max() > 0.02
    # A servo is where it was told to be a little later, but for the noise and its lag.
    assert np.abs(table['joint_positions'][1:] - table['action'][:-1]).max() < 0.15
    assert demonstrate(tmp_path / 'b', contract, 4, 5).hash == data.hash


def test_a_small_run_from_demonstrations_to_the_plot(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(delay, 'BLENDS', (('newest_first', 0.5),))
    monkeypatch.setattr(delay, 'TRANSFORMER', TransformerConfig(width=16, layers=1, heads=2))

    def run(*methods):
        return delay.run(tmp_path, methods, (4,), episodes=2, minutes=0.01, demonstrations=2, threads=1,
                         contract=root / 'config/robots/so101.yaml')

    result = run('naive', 'ensembling', 'training_rtc')
    assert [row['method'] for row in result['rows']] == ['naive', 'ensembling newest_first m=0.5', 'training_rtc']
    assert [found['method'] for found in result['verdicts']] == ['training_rtc']
    saved = json.loads((tmp_path / 'delay.json').read_text(), parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
    assert saved['rows'] == result['rows'] and len(saved['episodes']['4 naive']['success']) == 2
    assert (tmp_path / 'delay.png').stat().st_size > 10_000
    assert 'd = 4, training_rtc: seam jump' in capsys.readouterr().out
    again = run('naive')['episodes']['4 naive']
    assert again == saved['episodes']['4 naive'], 'what is trained is used again, and all else repeats'


@pytest.mark.parametrize(('options', 'message'), [
    ({'methods': ('rtc',)}, 'must have naive'), ({'delays': (9,)}, 'must be from 0 to 8'), ({'episodes': 1}, 'at least 2'),
    ({'methods': ('naive', 'hope')}, 'methods: hope; valid: synchronous, naive'), ({'minutes': 0.0}, 'must be > 0')])
def test_what_cannot_be_run_is_refused(options, message, tmp_path):
    with pytest.raises(BenchError, match=message):
        delay.run(tmp_path, **options)
