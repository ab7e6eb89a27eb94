from __future__ import annotations

import numpy as np
import pytest

from il_policies.contract import load_contract
from il_runtime.core.safety import Gate, limit_violations, stopping_speed

PERIOD = 0.02
LOWER, UPPER = np.array([-1.9, -0.5, 0.0]), np.array([1.9, 0.7, 0.1])
VELOCITY, ACCELERATION = np.array([2.5, 1.0, 0.2]), np.array([15.0, 3.0, 4.0])


def gate() -> Gate:
    return Gate(LOWER, UPPER, VELOCITY, ACCELERATION, PERIOD)


def test_stopping_speed_against_stepping():
    rng = np.random.default_rng(0)
    for distance, acceleration in zip(rng.uniform(0, 1, 300), rng.uniform(0.5, 30, 300), strict=True):
        speed = float(stopping_speed(np.array(distance), np.array(acceleration), PERIOD))

        def travelled(v, a=acceleration):
            path = 0.0
            while v > 0:
                path, v = path + v * PERIOD, v - a * PERIOD
            return path

        assert travelled(speed) == pytest.approx(distance, abs=1e-9)


@pytest.mark.parametrize('seed', range(4))
def test_limits_hold_for_any_request(seed):
    rng = np.random.default_rng(seed)
    g = gate()
    target, walk = g.position.copy(), np.zeros(3)
    path = [g.position]
    for _ in range(5000):
        kind = rng.random()
        if kind < 0.05:
            target = rng.uniform(LOWER - 1, UPPER + 1)  # a jump, often out of bounds
        elif kind < 0.06:
            target = rng.choice([-1e308, 1e308], 3)
        else:
            walk = 0.95 * walk + rng.normal(size=3) * 0.05
            target = np.clip(target, LOWER, UPPER) + walk * PERIOD * 10
        g.step(None if rng.random() < 0.02 else target)
        path.append(g.position)
    path = np.array(path)
    velocity = np.diff(path, axis=0) / PERIOD
    acceleration = np.diff(velocity, axis=0, prepend=np.zeros((1, 3))) / PERIOD
    assert (path >= LOWER).all() and (path <= UPPER).all()
    assert (np.abs(velocity) <= VELOCITY * (1 + 1e-9)).all()
    assert (np.abs(acceleration) <= ACCELERATION * (1 + 1e-6)).all()
    assert np.abs(velocity[:, 0]).max() > 2.4, 'the test must reach the limit'


def test_a_feasible_motion_is_followed_without_lag():
    g = gate()
    t = np.arange(0, 4, PERIOD)
    start = g.position.copy()
    for value in 0.03 * (1 - np.cos(2 * t)):
        target = start + np.array([value * 10, value, value * 0.3])
        assert not g.step(target)
        np.testing.assert_allclose(g.position, target, atol=1e-9)


def test_a_jump_is_approached_without_overshoot():
    g = gate()
    target = np.array([1.5, 0.6, 0.09])
    path = []
    for _ in range(200):
        g.step(target)
        path.append(g.position)
    path = np.array(path)
    assert (path <= target + 1e-12).all()
    np.testing.assert_allclose(path[-1], target, atol=1e-12)
    # Time-optimal for a trapezoid: distance/v + v/a, within two ticks.
    assert np.argmax(path[:, 0] > 1.5 - 1e-9) * PERIOD < 1.5 / 2.5 + 2.5 / 15 + 3 * PERIOD


def test_stop_takes_no_longer_than_announced():
    g = gate()
    for _ in range(20):
        g.step(np.array([1.9, 0.7, 0.1]))
    announced, ticks = g.stopping_time, 0
    while not g.at_rest:
        g.step(None)
        ticks += 1
    assert 0 < ticks * PERIOD <= announced + 1e-9


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_non_finite_targets_are_refused_and_change_nothing(bad):
    g = gate()
    g.step(np.array([0.1, 0.1, 0.05]))
    before = g.position.copy()
    with pytest.raises(ValueError, match='not finite'):
        g.step(np.array([0.0, bad, 0.0]))
    np.testing.assert_array_equal(g.position, before)
    with pytest.raises(ValueError, match='not finite or outside'):
        g.rest(np.array([0.0, bad, 0.0]))


def test_violations_are_counted_from_the_commands_alone(root):
    contract = load_contract(root / 'config/robots/so101.yaml')
    t = np.arange(100) * PERIOD
    smooth = np.zeros((100, 6))
    smooth[:, 0] = 0.5 * (1 - np.cos(2 * t))  # at most 1 rad/s and 2 rad/s²
    assert limit_violations(contract, smooth) == 0 == limit_violations(contract, smooth, t)
    jump = smooth.copy()
    jump[50:, 0] += 0.04  # 2 rad/s more for one tick: within the velocity limit, but 100 rad/s² there and back
    assert limit_violations(contract, jump) == 2
    fast = smooth.copy()
    fast[:, 1] = 2.6 * t  # beyond 2.5 rad/s on each tick but the first, which has no speed yet; out of bounds as well later
    assert limit_violations(contract, fast) == 99
    out = smooth.copy()
    out[7, 5] = 1.75
    assert limit_violations(contract, out) >= 1
    # A missed tick: the same motion with one command left out is judged by the time that passed.
    assert limit_violations(contract, np.delete(smooth, 40, axis=0), np.delete(t, 40)) == 0
