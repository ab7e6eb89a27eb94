from __future__ import annotations

import numpy as np
import pytest

from il_runtime.core.ensembling import MODES, Blending, Chunk, ChunkError, Ensembler, NonFiniteError, arrange

TOLERANCE = np.array([0.3, 0.3])


def chunk(start, values, sequence=0, epoch=1, period=0.1):
    return Chunk(start, period, np.asarray(values, float).reshape(len(values), -1), epoch, sequence, start)


def filled(mode='newest_first', **options) -> Ensembler:
    ensembler = Ensembler([1.0], Blending(mode, **options))
    ensembler.reset(1)
    return ensembler


def test_textbook_example(show):
    # Predictions of four chunks, one step apart, for the same moment; newest to oldest 1.2, 1.0, 0.8, 1.1 at m = 0.5.
    ensembler = filled(m=0.5)
    for age, value in enumerate([1.2, 1.0, 0.8, 1.1]):
        ensembler.add(chunk(-0.1 * age, [value] * 16, sequence=10 - age), now=-1.0)
    blended = ensembler.at(0.5).positions[0]
    assert blended == pytest.approx(1.0677, abs=1e-4)
    show('textbook ensembling example', '1.0677 ± 1e-4', f'{blended:.5f}')


def test_oldest_first_is_act():
    ensembler = filled('oldest_first', m=0.01)
    values = [0.3, -0.2, 0.9]
    for i, value in enumerate(values):
        ensembler.add(chunk(0.1 * i, [value] * 16, sequence=i), now=-1.0)
    weights = np.exp(-0.01 * np.arange(3))  # ACT: w_0 belongs to the oldest
    assert ensembler.at(0.6).positions[0] == pytest.approx(weights @ values / weights.sum(), abs=1e-12)


def brute_force(chunks, received, t, blending, ramp):
    """Every chunk, every time, from the definition. Shape (D,), or None where no chunk has weight."""
    live = [(c, r) for c, r in zip(chunks, received, strict=True) if c.start <= t <= c.end and r <= t]
    live.sort(key=lambda pair: pair[0].start)
    total, weight_sum = 0.0, 0.0
    for i, (c, r) in enumerate(live):
        if blending.mode == 'newest_first':
            w, entering = np.exp(-blending.m * (live[-1][0].start - c.start) / live[-1][0].period), (t - r) / ramp
        elif blending.mode == 'oldest_first':
            w, entering = np.exp(-blending.m * (c.start - live[0][0].start) / live[-1][0].period), (t - r) / ramp
        else:
            seam = ramp if blending.mode == 'latest' else blending.seam
            w, entering = 1.0 if i == 0 else np.clip((t - r) / seam, 0, 1), 1.0
            for _, later in live[i + 1:]:
                w *= 1 - np.clip((t - later) / seam, 0, 1)
        w *= np.clip(min(entering, (c.end - t) / ramp), 0, 1)
        times = c.start + np.arange(len(c.positions)) * c.period
        total = total + w * np.array([np.interp(t, times, column) for column in c.positions.T])
        weight_sum += w
    return total / weight_sum if weight_sum > 1e-6 else None


def largest_difference(mode: str, seed: int) -> float:
    """Between an ensembler and brute force, on chunks shuffled, doubled, dropped and delayed by a seed."""
    rng = np.random.default_rng(seed)
    chunks = [Chunk(0.35 * i + rng.uniform(-0.1, 0.1), rng.choice([0.1, 0.07]), rng.normal(size=(12, 2)), 1, i, 0.35 * i)
              for i in range(15)]
    chunks = [c for c in chunks if rng.random() > 0.2]
    received = [c.start + rng.uniform(0.0, 0.9) for c in chunks]
    deliveries = [(r, c) for r, c in zip(received, chunks, strict=True)]
    deliveries += [(r + rng.uniform(0, 0.3), c) for r, c in deliveries if rng.random() < 0.5]  # doubled
    deliveries.sort(key=lambda pair: pair[0])
    blending = Blending(mode, m=0.3)
    ensembler = Ensembler(TOLERANCE, blending)
    ensembler.reset(1)
    differences = []
    for t in np.arange(0.0, 6.0, 0.02):
        while deliveries and deliveries[0][0] <= t:
            ensembler.add(deliveries[0][1], deliveries.pop(0)[0])
        blend = ensembler.at(t)
        expected = brute_force(chunks, received, t, blending, 0.04)
        if expected is not None:
            differences.append(np.abs(blend.positions - expected).max())
    assert len(differences) > 150
    return max(differences)


def test_equals_brute_force_on_shuffled_doubled_dropped_delayed_chunks(show):
    largest = max(largest_difference(mode, seed) for mode in MODES for seed in range(5))
    assert largest <= 1e-9
    show('chunks shuffled, duplicated, dropped, delayed (seeded)', 'equals the brute-force reference ≤ 1e-9',
         f'≤ {largest:.0e}, {len(MODES)} modes × 5 seeds')


def commands_between_modes(max_disagreement: float, seed: int) -> tuple[float, float]:
    """Shares of commands in the middle 60 % of the gap between two modes, of which every chunk draws one.

    Of all commands, and of those outside a crossfade. Replanned every 0.8 step of 0.1 s, m = 0.5.
    """
    rng = np.random.default_rng(seed)
    ensembler = filled(m=0.5, max_disagreement=max_disagreement)
    middle, calm = [], []
    for tick in range(1, 20_000):
        t = tick * 0.02
        if tick % 4 == 1:
            ensembler.add(chunk(t - 0.05, [rng.choice([-3.0, 3.0])] * 16, sequence=tick), t)
        blend = ensembler.at(t)
        if tick > 100:
            middle.append(abs(blend.positions[0]) < 0.6 * 3.0)
            calm.append(not blend.crossfading)
    middle, calm = np.array(middle), np.array(calm)
    return middle.mean(), (middle & calm).sum() / max(calm.sum(), 1)


def test_a_mode_drawn_per_chunk_is_not_averaged(show):
    averaged, _ = commands_between_modes(np.inf, 1)
    with_rule, outside_seams = commands_between_modes(1.0, 1)
    assert outside_seams == 0.0
    assert averaged == pytest.approx(0.79, abs=0.03)
    assert with_rule < 0.55 * averaged
    show('a mode drawn at random per chunk (synthetic)', 'with the disagreement rule, outside a seam\'s crossfade, 0 commands in '
         'the middle 60 % of the gap', f'{100 * outside_seams:.0f} % ({100 * with_rule:.0f} % with the crossfades); without the '
         f'rule {100 * averaged:.0f} %')


def test_an_older_chunk_that_comes_late_and_disagrees_never_counts():
    ensembler = filled(m=0.0, max_disagreement=1.0)
    ensembler.add(chunk(0.2, [1.0] * 16, sequence=1), now=0.2)
    ensembler.at(0.3)
    ensembler.add(chunk(0.0, [-1.0] * 16, sequence=0), now=0.3)
    assert [ensembler.at(t).positions[0] for t in np.arange(0.3, 0.6, 0.02)] == [1.0] * 15


def test_a_planner_that_counts_anew_is_heard_at_once():
    ensembler = filled(m=0.0)
    for i in range(3):
        ensembler.add(chunk(0.1 * i, [0.0] * 16, sequence=i), now=0.1 * i)
    ensembler.add(chunk(0.5, [1.0] * 16, sequence=0), now=0.5)
    assert ensembler.at(0.6).live == 4 and ensembler.at(0.62).age == pytest.approx(0.12)


def test_what_has_ended_is_forgotten():
    ensembler = filled()
    for i in range(1000):
        ensembler.add(chunk(0.1 * i, [0.0] * 4, sequence=i), now=0.1 * i)
        ensembler.at(0.1 * i)
    assert len(ensembler._seen) < 10 and len(ensembler._members) < 10


def test_switching_the_mode_in_motion_makes_no_step():
    ensembler = filled(m=0.0, seam=0.2)
    ensembler.add(chunk(0.0, [-1.0] * 30, sequence=0), now=-1.0)
    ensembler.add(chunk(0.1, [1.0] * 30, sequence=1), now=-1.0)
    path = []
    for tick in range(100):
        t = 0.5 + tick * 0.02
        if tick == 20:
            ensembler.switch(Blending('latest', seam=0.2), t)
        if tick == 60:
            ensembler.switch(Blending('newest_first', m=0.5, seam=0.2), t)
        path.append(ensembler.at(t).positions[0])
    assert path[19] == 0.0 and path[50] == 1.0
    assert path[-1] == pytest.approx((1 - np.exp(-0.5)) / (1 + np.exp(-0.5)))
    # `latest` fades within two ticks, so its seam is those; the other way lasts 0.2 s.
    assert np.abs(np.diff(path[:50])).max() <= 0.5 + 1e-9 and np.abs(np.diff(path[50:])).max() <= 0.1 + 1e-9


def test_slowed_down_playback_samples_less_of_a_chunk_but_it_ends_when_it_would():
    ensembler = filled()
    ensembler.add(chunk(1.0, np.arange(11.0), sequence=0), now=1.0, delay=0.3)
    assert ensembler.at(1.5, delay=0.3 + 0.25).positions[0] == pytest.approx(2.5)  # half speed since it started
    assert ensembler.at(2.01, delay=0.8) is None


@pytest.mark.parametrize(('options', 'message'), [
    ({'mode': 'newest'}, "ensembling is 'newest', valid: newest_first, oldest_first, latest, crossfade"),
    ({'m': -1.0}, 'm is -1.0'), ({'m': np.nan}, 'm is nan'), ({'seam': 0.0}, 'seam is 0.0'),
    ({'max_disagreement': 0.0}, 'max_disagreement is 0.0'), ({'max_disagreement': np.nan}, 'max_disagreement is nan'),
])
def test_blending_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Blending(**options)


@pytest.mark.parametrize('mode', MODES)
def test_entry_and_expiry_make_no_step(mode):
    ensembler = filled(mode, m=0.1)
    pieces = [chunk(0.3 * i, [float(i)] * 8, sequence=i) for i in range(6)]  # constants 0, 1, 2 …: any step shows
    previous, largest = None, 0.0
    for t in np.arange(0.0, 1.5, 0.001):
        for piece in pieces:
            if abs(piece.start + 0.05 - t) < 5e-4:
                ensembler.add(piece, t)
        blend = ensembler.at(t)
        if blend is not None:
            if previous is not None:
                largest = max(largest, abs(blend.positions[0] - previous))
            previous = blend.positions[0]
    assert largest < 2.2 * 0.001 / 0.04  # the steepest ramp is two units over two ticks of 20 ms


def test_disagreement_fades_to_the_newest():
    ensembler = filled(m=0.0, max_disagreement=1.0)
    ensembler.add(chunk(0.0, [-1.0] * 16, sequence=0), now=-1.0)
    assert ensembler.at(0.2).disagreement == 0.0
    ensembler.add(chunk(0.2, [1.0] * 16, sequence=1), now=0.2)
    path = [ensembler.at(t) for t in np.arange(0.2, 0.5, 0.02)]
    assert path[1].disagreement == pytest.approx(2.0)
    assert path[-1].positions[0] == 1.0, 'the mean of two modes is neither'
    assert max(np.diff([blend.positions[0] for blend in path])) < 1.2


def test_epochs_and_duplicates():
    ensembler = filled()
    ensembler.add(chunk(0.0, [1.0] * 4), now=0.0)
    with pytest.raises(ChunkError, match='epoch 7, the current one is 1'):
        ensembler.add(chunk(0.0, [5.0] * 4, sequence=1, epoch=7), now=0.0)
    ensembler.add(chunk(0.0, [9.0] * 4), now=0.01)  # same sequence again
    assert ensembler.at(0.1).positions[0] == 1.0
    ensembler.reset(2)
    assert ensembler.at(0.15) is None


def test_arrange_matches_by_name(show):
    out = arrange(['b', 'a'], [1, 2, 3, 4], 2, 0.1, ('a', 'b'))
    np.testing.assert_array_equal(out, [[2, 1], [4, 3]])
    show('joint names permuted; missing; doubled; wrong size or period', 'identical output; the rest refused with the names',
         'identical, and refused with the names')


@pytest.mark.parametrize(('names', 'positions', 'horizon', 'period', 'message'), [
    (['a'], [1, 2], 2, 0.1, r"missing \['b'\]"),
    (['a', 'a'], [1, 2], 1, 0.1, r"doubled \['a'\]"),
    (['a', 'c'], [1, 2], 1, 0.1, r"unknown \['c'\]"),
    (['a', 'b'], [1, 2, 3], 2, 0.1, '3 positions, expected horizon 2 × 2'),
    (['a', 'b'], [], 0, 0.1, 'horizon 0'),
    (['a', 'b'], [1, np.nan], 1, 0.1, 'NaN'),
    (['a', 'b'], [1, np.inf], 1, 0.1, 'infinity'),
    (['a', 'b'], [1, 2], 1, 0.0, 'step_period is 0.0'),
    (['a', 'b'], [1, 2], 1, float('nan'), 'step_period is nan'),
    (['a', 'b'], [1, 2, 3, 4], 2, 31.0, 'must cover at most 30 s'),
])
def test_arrange_refuses(names, positions, horizon, period, message):
    with pytest.raises(ChunkError, match=message):
        arrange(names, positions, horizon, period, ('a', 'b'))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e308, -1e308, 1.1e4])
def test_one_bad_number_anywhere_refuses_the_whole_chunk(bad):
    for i in range(16 * 6):
        positions = np.zeros(16 * 6)
        positions[i] = bad
        with pytest.raises(NonFiniteError, match='NaN, infinity or a number beyond'):
            arrange([f'j{k}' for k in range(6)], positions, 16, 0.1, tuple(f'j{k}' for k in range(6)))
