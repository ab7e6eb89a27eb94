from __future__ import annotations

import numpy as np
import pytest

from il_runtime.core.ensembling import Chunk, ChunkError, Ensembler, arrange

TOLERANCE = np.array([0.3, 0.3])


def chunk(start, values, sequence=0, epoch=1, period=0.1):
    return Chunk(start, period, np.asarray(values, float).reshape(len(values), -1), epoch, sequence, start)


def filled(mode='newest_first', **options) -> Ensembler:
    ensembler = Ensembler([1.0], mode, **options)
    ensembler.reset(1)
    return ensembler


def test_textbook_example():
    # Predictions of four chunks, one step apart, for the same moment; newest to oldest 1.2, 1.0, 0.8, 1.1 at m = 0.5.
    ensembler = filled(m=0.5)
    for age, value in enumerate([1.2, 1.0, 0.8, 1.1]):
        ensembler.add(chunk(-0.1 * age, [value] * 16, sequence=10 - age), now=-1.0)
    assert ensembler.at(0.5).positions[0] == pytest.approx(1.0677, abs=1e-4)


def test_oldest_first_is_act():
    ensembler = filled('oldest_first', m=0.01)
    values = [0.3, -0.2, 0.9]
    for i, value in enumerate(values):
        ensembler.add(chunk(0.1 * i, [value] * 16, sequence=i), now=-1.0)
    weights = np.exp(-0.01 * np.arange(3))  # ACT: w_0 belongs to the oldest
    assert ensembler.at(0.6).positions[0] == pytest.approx(weights @ values / weights.sum(), abs=1e-12)


def brute_force(chunks, received, t, m, ramp):
    """Every chunk, every time, from the definition."""
    total, weight_sum = 0.0, 0.0
    live = [(c, r) for c, r in zip(chunks, received, strict=True) if c.start <= t <= c.end and r <= t]
    if not live:
        return None
    newest = max(live, key=lambda pair: pair[0].sequence)[0]
    for c, r in live:
        times = c.start + np.arange(len(c.positions)) * c.period
        point = np.array([np.interp(t, times, column) for column in c.positions.T])
        w = np.exp(-m * (newest.start - c.start) / newest.period)
        w *= np.clip(min((t - r) / ramp, (c.end - t) / ramp), 0, 1)
        total, weight_sum = total + w * point, weight_sum + w
    return total / weight_sum if weight_sum > 0 else None


@pytest.mark.parametrize('seed', range(5))
def test_equals_brute_force_on_shuffled_doubled_dropped_chunks(seed):
    rng = np.random.default_rng(seed)
    chunks = [Chunk(0.35 * i + rng.uniform(-0.1, 0.1), rng.choice([0.1, 0.07]), rng.normal(size=(12, 2)), 1, i, 0.35 * i)
              for i in range(15)]
    chunks = [c for c in chunks if rng.random() > 0.2]
    received = [c.start + rng.uniform(0.0, 0.6) for c in chunks]
    deliveries = [(r, c) for r, c in zip(received, chunks, strict=True)]
    deliveries += [(r + rng.uniform(0, 0.3), c) for r, c in deliveries if rng.random() < 0.5]  # doubled
    deliveries.sort(key=lambda pair: pair[0])
    ensembler = Ensembler(TOLERANCE, m=0.3)
    ensembler.reset(1)
    compared = 0
    for t in np.arange(0.0, 6.0, 0.02):
        while deliveries and deliveries[0][0] <= t:
            ensembler.add(deliveries[0][1], deliveries.pop(0)[0])
        blend = ensembler.at(t)
        expected = brute_force(chunks, received, t, 0.3, 0.04)
        if expected is not None:
            np.testing.assert_allclose(blend.positions, expected, atol=1e-9)
            compared += 1
    assert compared > 150


@pytest.mark.parametrize('mode', ['newest_first', 'oldest_first', 'latest', 'crossfade'])
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


def test_arrange_matches_by_name():
    out = arrange(['b', 'a'], [1, 2, 3, 4], 2, 0.1, ('a', 'b'))
    np.testing.assert_array_equal(out, [[2, 1], [4, 3]])


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
])
def test_arrange_refuses(names, positions, horizon, period, message):
    with pytest.raises(ChunkError, match=message):
        arrange(names, positions, horizon, period, ('a', 'b'))
