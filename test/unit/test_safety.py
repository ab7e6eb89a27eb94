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


def test_a_stop_fits_after_a_tick_at_stopping_speed():
    rng = np.random.default_rng(0)
    for distance, a in zip(rng.uniform(0, 1, 300), rng.uniform(0.5, 30, 300), strict=True):
        speed = float(stopping_speed(np.array(distance), np.array(a), PERIOD))
        # One tick at that speed, then braking in continuous time: exactly there. In ticks: never beyond.
        assert speed * PERIOD + speed**2 / (2 * a) == pytest.approx(distance, abs=1e-9)
        path, v = 0.0, speed
        while v > 0:
            path, v = path + v * PERIOD, v - a * PERIOD
        assert path <= distance + 1e-12
    assert stopping_speed(np.array(-1.0), np.array(5.0), PERIOD) == 0.0


def drive(seed: int, ticks: int) -> np.ndarray:
    """Positions of a gate under a seeded storm: walks, jumps beyond the bounds, stops by None and by ramp, speed scales."""
    rng = np.random.default_rng(seed)
    g = gate()
    target, walk, ramp, speed, now = g.position.copy(), np.zeros(3), None, 1.0, 0.0
    path = np.empty((ticks + 1, 3))
    path[0] = g.position
    for i in range(1, ticks + 1):
        now += PERIOD
        kind = rng.random()
        if kind < 0.05:
            target = rng.uniform(LOWER - 1, UPPER + 1)  # a jump, often out of bounds
        elif kind < 0.06:
            target = rng.choice([-1e308, 1e308], 3)
        elif kind < 0.07:
            target = np.where(rng.random(3) < 0.5, LOWER, UPPER) + rng.normal(size=3) * 1e-3  # about a bound
        elif kind < 0.08:
            ramp = g.stop_ramp(now - PERIOD)
        elif kind < 0.09:
            speed = rng.choice([0.0, 0.2, 1.0])
        else:
            walk = 0.95 * walk + rng.normal(size=3) * 0.05
            target = np.clip(target, LOWER, UPPER) + walk * PERIOD * 10
        if ramp is not None:
            g.step(ramp.at(now) if now < ramp.end else None, speed)
            ramp = None if now > ramp.end + 0.1 else ramp
        else:
            g.step(None if rng.random() < 0.02 else target, speed)
        path[i] = g.position
    return path


def assert_within_limits(path: np.ndarray) -> None:
    velocity = np.diff(path, axis=0) / PERIOD
    acceleration = np.diff(velocity, axis=0, prepend=np.zeros((1, 3))) / PERIOD
    assert (path >= LOWER).all() and (path <= UPPER).all()
    assert (np.abs(velocity) <= VELOCITY * (1 + 1e-9)).all()
    assert (np.abs(acceleration) <= ACCELERATION * (1 + 1e-6)).all()
    assert np.abs(velocity[:, 0]).max() > 2.4, 'the test must reach the limit'
    assert np.isclose(path, LOWER, atol=1e-6).any() and np.isclose(path, UPPER, atol=1e-6).any(), 'and the bounds'


@pytest.mark.parametrize('seed', range(4))
def test_limits_hold_for_any_request(seed):
    assert_within_limits(drive(seed, 5000))


def test_a_feasible_motion_is_followed_without_lag():
    g = gate()
    t = np.arange(0, 4, PERIOD)
    start = g.position.copy()
    for value in 0.03 * (1 - np.cos(2 * t)):
        target = start + np.array([value * 10, value, value * 0.3])
        g.step(target)
        assert not g.clamped.any() and g.lag.max() < 1e-12
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
    # Time-optimal for a trapezoid: distance/v + v/a, within a few ticks.
    assert np.argmax(path[:, 0] > 1.5 - 1e-6) * PERIOD < 1.5 / 2.5 + 2.5 / 15 + 5 * PERIOD


def test_what_holds_a_joint_back_is_told():
    g = gate()
    g.step(np.array([1.5, g.position[1], 5.0]))
    np.testing.assert_array_equal(g.clamped, [True, False, True])
    np.testing.assert_allclose(g.lag, [1.5 - g.position[0], 0, 5.0 - g.position[2]])
    g.step(None)
    assert not g.clamped.any() and not g.lag.any()


def test_a_share_of_the_speed_is_reached_by_braking():
    g, path = gate(), []
    for i in range(60):
        g.step(np.array([1.9, 0.1, 0.05]), 1.0 if i < 20 else 0.2)
        path.append(g.position[0])
    velocity = np.diff(path) / PERIOD
    assert velocity.max() == pytest.approx(2.5) and (np.diff(velocity) / PERIOD >= -15 * (1 + 1e-9)).all()
    np.testing.assert_allclose(velocity[35:45], 0.5)


def test_a_joint_that_starts_beyond_a_limit_is_not_pushed_and_may_only_come_back():
    g = gate()
    outside = np.array([2.1, -0.6, 0.05])
    g.rest(outside)
    g.step(None)
    np.testing.assert_array_equal(g.position, outside)
    path = [outside]
    for i in range(150):
        g.step(np.array([3.0 if i < 50 else 1.0, -0.6 if i < 50 else 0.0, 0.05]))
        path.append(g.position)
    np.testing.assert_array_equal(path[50], outside)
    moved = np.diff(path, axis=0)
    assert (moved[:, 0] <= 0).all() and (moved[:, 1] >= 0).all()
    assert np.abs(np.diff(moved[:, 0])).max() <= 15 * PERIOD**2 * (1 + 1e-9)
    np.testing.assert_allclose(g.position, [1.0, 0.0, 0.05], atol=1e-9)


def moving(target, ticks=20) -> Gate:
    g = gate()
    for _ in range(ticks):
        g.step(np.asarray(target))
    return g


def test_a_stop_keeps_the_direction_of_the_motion_and_takes_the_slowest_joint_s_time():
    g = moving([1.0, 0.3, 0.08], 8)
    start, velocity = g.position.copy(), g.velocity.copy()
    ramp = g.stop_ramp(3.0)
    assert ramp.end - 3.0 == pytest.approx(np.max(np.abs(velocity) / ACCELERATION))
    for share in (0.3, 0.6, 1.0):
        way = ramp.at(3.0 + share * (ramp.end - 3.0)) - start
        np.testing.assert_allclose(way / np.linalg.norm(way), velocity / np.linalg.norm(velocity), atol=1e-9)
    np.testing.assert_allclose(ramp.at(99.0) - start, velocity * (ramp.end - 3.0) / 2)
    np.testing.assert_array_equal(ramp.at(0.0), start)


def test_a_stop_next_to_a_bound_brakes_each_joint_as_hard_as_it_may():
    g = moving([9.0, 0.3, 9.0], 25)  # joint 0 is fast and near its bound, joint 1 needs longer
    g.velocity[1] = -1.0
    ramp = g.stop_ramp(0.0)
    assert (ramp.at(ramp.end) <= UPPER + 1e-9).all() and (ramp.at(ramp.end) >= LOWER - 1e-9).all()


@pytest.mark.parametrize('target', [[9.0, -9.0, 9.0], [0.4, 0.2, 0.05], [1.0, 9.0, -9.0]])
@pytest.mark.parametrize('ticks', [1, 5, 13, 25, 39, 80])
def test_running_out_is_two_ticks_then_a_stop_inside_all_limits(target, ticks):
    g = moving(target, ticks)
    times, positions, velocities = g.run_out()
    np.testing.assert_array_equal(positions[0], g.position)
    assert not velocities[-1].any() and (np.diff(times) > 5e-4).all() and times[0] == PERIOD
    assert times[-1] <= 2 * PERIOD + np.max(np.abs(velocities[0]) / ACCELERATION) + 1e-3
    assert (np.abs(velocities[0]) <= np.abs(g.velocity) + ACCELERATION * PERIOD / 2).all()
    # A robot's cubic interpolation, written out densely.
    for i in range(len(times) - 1):
        h = times[i + 1] - times[i]
        s = np.linspace(0, 1, 200)[:, None]
        p0, p1, m0, m1 = positions[i], positions[i + 1], velocities[i] * h, velocities[i + 1] * h
        dense = (2 * s**3 - 3 * s**2 + 1) * p0 + (s**3 - 2 * s**2 + s) * m0 + (3 * s**2 - 2 * s**3) * p1 + (s**3 - s**2) * m1
        assert (dense >= LOWER - 1e-6).all() and (dense <= UPPER + 1e-6).all()
        speed = np.gradient(dense, h / 199, axis=0)
        assert (np.abs(speed) <= VELOCITY * (1 + 1e-3) + 1e-6).all()
    # The end, by brute force: braking in steps of 10 µs.
    p, v = positions[0] + np.where(len(times) > 1, velocities[0], 0) * PERIOD, velocities[0].copy()
    while v.any():
        step = np.minimum(np.abs(v), ACCELERATION * 1e-5)
        p, v = p + (v - np.sign(v) * step / 2) * 1e-5, np.where(np.abs(v) <= step, 0.0, v - np.sign(v) * step)
    np.testing.assert_allclose(positions[-1], p, atol=1e-5)


def test_an_approach_is_slow_straight_and_ends_at_the_goal():
    g = gate()
    start, goal = g.position.copy(), np.array([1.0, 0.5, 9.0])
    ramp = g.approach_ramp(0.0, goal, 0.1)
    path = []
    for i in range(1, round(ramp.end / PERIOD) + 5):
        g.step(ramp.at(i * PERIOD))
        path.append(g.position)
    path = np.array(path)
    velocity = np.diff(path, axis=0) / PERIOD
    assert (np.abs(velocity) <= 0.1 * VELOCITY * (1 + 1e-6)).all() and np.isclose(np.abs(velocity) / VELOCITY, 0.1).any()
    assert (np.abs(np.diff(velocity, axis=0)) / PERIOD <= 0.1 * ACCELERATION * (1 + 1e-6)).all()
    np.testing.assert_allclose(path[-1], [1.0, 0.5, 0.1], atol=1e-9)
    way, straight = path - start, path[-1] - start
    np.testing.assert_allclose(way - np.outer(way @ straight / (straight @ straight), straight), 0, atol=1e-6)


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
    with pytest.raises(ValueError, match='not finite'):
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
