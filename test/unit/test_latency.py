from __future__ import annotations

import math

import numpy as np
import pytest

from il_runtime.core.latency import Window


@pytest.mark.parametrize('seed', range(10))
def test_quantiles_are_those_of_the_last_while(seed):
    """Against sorting: the smallest duration in the window that at least this share of them does not exceed."""
    rng = np.random.default_rng(seed)
    window = Window(seconds=5.0, capacity=64)
    times, durations = np.cumsum(rng.exponential(0.2, 200)), rng.lognormal(-4, 1, 200)
    for time, duration in zip(times, durations, strict=True):
        window.add(time, duration)
    now = times[-1] + 0.3
    inside = sorted(durations[-64:][times[-64:] > now - 5.0])
    assert 3 < len(inside)
    for share, quantile in zip((0.0, 0.5, 0.9, 1.0), window.quantiles(now, (0.0, 0.5, 0.9, 1.0)), strict=True):
        assert quantile == inside[math.ceil(share * (len(inside) - 1) - 1e-9)]


def test_one_slow_first_pass_is_forgotten():
    window = Window(seconds=10.0)
    window.add(0.0, 3.0)
    for i in range(1, 200):
        window.add(0.1 * i, 0.02)
    assert window.quantiles(9.0, (1.0,))[0] == 3.0
    assert window.quantiles(20.0, (1.0,))[0] == 0.02
    assert window.quantiles(100.0) is None and window.words(100.0) == 'none for 10 s'
    assert window.words(20.0).startswith('20.0 / 20.0 / 20.0 / 20.0 ms of ')


def test_a_clock_that_goes_back_begins_anew():
    window = Window(seconds=10.0, capacity=4)
    for i in range(6):
        window.add(1000.0 + i, 3.0)
    window.add(5.0, 0.02)
    assert window.values(5.0).tolist() == [0.02]
    window.add(6.0, 0.03)
    assert sorted(window.values(6.0)) == [0.02, 0.03]


def test_memory_is_fixed():
    window = Window(seconds=1e9, capacity=16)
    for i in range(1000):
        window.add(i, i)
    assert sorted(window.values(1000.0)) == list(range(984, 1000))


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match='seconds is 0'):
        Window(seconds=0)
