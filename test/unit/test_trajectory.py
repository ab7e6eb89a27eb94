from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from il_policies.sim.trajectory import TrajectoryError, TrajectoryFollower, arranged

NAN, INF = math.nan, math.inf


def sampled(follower: TrajectoryFollower, times) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities at times (N,). Shape (N, D) each."""
    positions, velocities = zip(*(follower.at(float(t)) for t in times))
    return np.array(positions), np.array(velocities)


def cubic_by_its_conditions(t0, t1, p0, p1, v0, v1, t) -> tuple[float, float]:
    """Position and velocity at t of the one cubic with these ends, from its four equations."""
    def values(t):
        return [1, t, t**2, t**3]

    def slopes(t):
        return [0, 1, 2 * t, 3 * t**2]

    c = np.linalg.solve([values(0), values(t1 - t0), slopes(0), slopes(t1 - t0)], [p0, p1, v0, v1])
    return c @ values(t - t0), c @ slopes(t - t0)


@st.composite
def trajectories(draw, joints: int = 2):
    """Times (N,) from 0.1 s on, positions (N, D), velocities (N, D) that end at rest."""
    points = draw(st.integers(1, 5))
    times = np.cumsum(draw(st.lists(st.floats(0.1, 1.0), min_size=points, max_size=points)))
    numbers = st.lists(st.floats(-3, 3), min_size=points * joints, max_size=points * joints)
    positions, velocities = (np.reshape(draw(numbers), (points, joints)) for _ in range(2))
    velocities[-1] = 0.0
    return times, positions, velocities


def test_it_rests_where_it_is_put():
    follower = TrajectoryFollower([0.3, -0.7])
    for now in (-5.0, 0.0, 1e6):
        position, velocity = follower.at(now)
        assert position.tolist() == [0.3, -0.7] and velocity.tolist() == [0, 0]
    follower.rest([1.0, 2.0])
    assert follower.at(3.0)[0].tolist() == [1.0, 2.0]


def test_constant_acceleration_and_a_ramp_to_rest_are_reproduced_exactly():
    start, speed = np.array([0.2, -0.4]), np.array([1.5, -0.8])
    gather, brake = 0.5, 0.3
    top = start + speed * gather / 2
    end = top + speed * brake / 2
    follower = TrajectoryFollower(start)
    follower.follow(10.0, [10.5, 10.8], [top, end], [speed, [0, 0]])
    u = np.linspace(0, gather, 101)[:, None]
    positions, velocities = sampled(follower, 10.0 + u[:, 0])
    np.testing.assert_allclose(positions, start + speed / gather * u**2 / 2, atol=1e-12)
    np.testing.assert_allclose(velocities, speed / gather * u, atol=1e-12)
    u = np.linspace(0, brake, 101)[:, None]
    positions, velocities = sampled(follower, 10.5 + u[:, 0])
    np.testing.assert_allclose(positions, top + speed * u - speed / brake * u**2 / 2, atol=1e-12)
    np.testing.assert_allclose(velocities, speed - speed / brake * u, atol=1e-12)
    positions, velocities = sampled(follower, [10.8, 11.0, 1e5])
    assert (positions == end).all() and not velocities.any()


@given(trajectories(), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_cubics_are_those_of_their_conditions_and_meet_every_point(trajectory, parts):
    times, positions, velocities = trajectory
    start = np.array([0.5, -0.5])
    follower = TrajectoryFollower(start)
    follower.follow(0.0, times, positions, velocities)
    t, p, v = np.append(0, times), np.vstack([start, positions]), np.vstack([[0, 0], velocities])
    np.testing.assert_allclose(sampled(follower, t), (p, v), atol=1e-9)
    for part in parts:
        k = min(int(part * len(times)), len(times) - 1)
        now = t[k] + (t[k + 1] - t[k]) * part
        truth = np.transpose([cubic_by_its_conditions(t[k], t[k + 1], p[k, d], p[k + 1, d], v[k, d], v[k + 1, d], now)
                              for d in range(2)])
        if now < t[k + 1]:
            np.testing.assert_allclose(follower.at(now), truth, atol=1e-9)


@given(trajectories())
def test_without_velocities_it_is_linear_from_where_it_was(trajectory):
    times, positions, _ = trajectory
    follower = TrajectoryFollower([0.5, -0.5])
    follower.follow(0.0, times, positions)
    dense = np.linspace(0, times[-1] + 1, 333)
    truth = [np.interp(dense, np.append(0, times), np.append(start, column))
             for start, column in zip((0.5, -0.5), positions.T)]
    np.testing.assert_allclose(sampled(follower, dense)[0], np.transpose(truth), atol=1e-9)
    assert not follower.at(times[-1])[1].any()


@settings(max_examples=300)
@given(trajectories(), trajectories(), st.floats(0, 6), st.floats(-3, 3), st.booleans())
def test_a_replacement_goes_on_from_the_commanded_state_through_the_points_still_to_come(first, second, now, start, smooth):
    follower = TrajectoryFollower([0.0, 0.0])
    follower.follow(0.0, *first)
    before = follower.at(now)
    times, positions, velocities = second
    times = times + now + start
    if times[-1] < now:
        with pytest.raises(TrajectoryError, match='ago'):
            follower.follow(now, times, positions, velocities)
        np.testing.assert_array_equal(follower.at(now), before)
        return
    if 0 <= times[-1] - now < 1e-3:  # no time to get there: a jump, as asked
        return
    follower.follow(now, times, positions, velocities if smooth else None)
    after = follower.at(now)
    np.testing.assert_allclose(after[0], before[0], atol=1e-9)
    if smooth:
        np.testing.assert_allclose(after[1], before[1], atol=1e-9)
    for t, position, velocity in zip(times, positions, velocities):
        if t > now + 1e-3:
            np.testing.assert_allclose(follower.at(t)[0], position, atol=1e-6)
            if smooth:
                np.testing.assert_allclose(follower.at(t)[1], velocity, atol=1e-4)


def test_a_single_point_that_is_due_now_is_taken_at_once():
    follower = TrajectoryFollower([0.0])
    follower.follow(5.0, [5.0], [[0.7]], [[0.0]])
    np.testing.assert_array_equal(follower.at(5.0), [[0.7], [0.0]])


def test_set_points_with_a_ramp_are_tracked_and_run_out_to_rest_when_they_cease():
    """What a controller sends fifty times a second: its next set-point, and from there a bounded stop."""
    period, acceleration = 0.02, 15.0
    follower = TrajectoryFollower([0.0])
    worst = 0.0
    for tick in range(1, 71):
        now, then = tick * period, (tick + 1) * period
        p, v = math.sin(then), math.cos(then)
        brake = abs(v) / acceleration
        follower.follow(now, [then, then + brake], [[p], [p + v * brake / 2]], [[v], [0.0]])
        for u in np.linspace(0, period, 7):
            if tick > 1:  # the first one starts from rest
                worst = max(worst, abs(follower.at(now + u)[0][0] - math.sin(now + u)))
    assert worst < period**4 / 384 * 1.01  # of cubic Hermite interpolation: h⁴/384 · max |sin''''|
    dense = np.linspace(now, now + 1, 2001)
    positions, velocities = sampled(follower, dense)
    assert positions[-1, 0] == pytest.approx(p + v * abs(v) / (2 * acceleration), abs=1e-12) and velocities[-1] == 0
    decelerations = np.abs(np.diff(velocities[:, 0])) / np.diff(dense)
    assert decelerations.max() < acceleration * 1.001
    assert (np.abs(velocities[dense > then + brake]) == 0).all()


@pytest.mark.parametrize('times, positions, velocities, words', [
    ([], [], None, 'no points'),
    ([0.2, 0.2], [[0, 0], [1, 1]], None, 'one after the other'),
    ([0.3, 0.2], [[0, 0], [1, 1]], None, 'one after the other'),
    ([INF], [[0, 0]], None, 'one after the other'),
    ([0.1, NAN], [[0, 0], [1, 1]], None, 'one after the other'),
    ([-0.2, -0.1], [[0, 0], [1, 1]], None, 'ended 0.100 s ago'),
    ([0.1], [[0, 0, 0]], None, r'positions of shape \(1, 3\), must be \(1, 2\)'),
    ([0.1], [[0, 0], [1, 1]], None, r'positions of shape \(2, 2\), must be \(1, 2\)'),
    ([0.1, 0.2], [[0, NAN], [1, 1]], None, r'positions hold \[nan\], must be finite'),
    ([0.1, 0.2], [[0, 0], [1, -INF]], None, r'positions hold \[-inf\], must be finite'),
    ([0.1], [[0, 1e300]], None, 'within ±10000'),
    ([0.1, 0.2], [[0, 0], [1, 1]], [[NAN, 1], [0, 0]], r'velocities hold \[nan\]'),
    ([0.1, 0.2], [[0, 0], [1, 1]], [[0, 0]], r'velocities of shape \(1, 2\), must be \(2, 2\)'),
    ([0.1, 0.2], [[0, 0], [1, 1]], [[1, 1], [0, 1e-3]], r'\[0.0, 0.001\] at the last point, must be 0'),
])
def test_what_cannot_be_followed_is_refused_whole(times, positions, velocities, words):
    follower = TrajectoryFollower([0.0, 0.0])
    follower.follow(0.0, [2.0], [[1.0, 2.0]], [[0.0, 0.0]])
    now = 1.0
    before = sampled(follower, np.linspace(0, 3))
    with pytest.raises(TrajectoryError, match=words):
        follower.follow(now, np.add(now, times), positions, velocities)
    np.testing.assert_array_equal(sampled(follower, np.linspace(0, 3)), before)


@pytest.mark.parametrize('positions', [[0.0], [0.0, 0.0, 0.0], [0.0, NAN], [INF, 0.0], []])
def test_a_set_point_of_another_size_or_not_finite_is_refused(positions):
    follower = TrajectoryFollower([0.1, 0.2])
    with pytest.raises(TrajectoryError, match='must be'):
        follower.rest(positions)
    assert follower.at(0.0)[0].tolist() == [0.1, 0.2]


def test_columns_are_found_by_name():
    rows = arranged([[1, 2, 3], [4, 5, 6]], ['c', 'a', 'b'], ('a', 'b', 'c'))
    assert rows.tolist() == [[2, 3, 1], [5, 6, 4]]
    assert arranged([], ['b', 'a'], ('a', 'b')).shape == (0, 2)


@pytest.mark.parametrize('rows, names, words', [
    ([[1, 2]], ['a', 'x'], r"joints \['a', 'x'\], must be each of \['a', 'b'\] once"),
    ([[1, 2, 3]], ['a', 'b', 'x'], 'once'),
    ([[1]], ['a'], 'once'),
    ([[1, 2]], ['a', 'a'], 'once'),
    ([[]], [], 'once'),
    ([[1, 2, 3]], ['a', 'b'], r'rows of \[3\] values for 2 joints'),
    ([[1, 2], []], ['a', 'b'], r'rows of \[0\] values for 2 joints'),
])
def test_other_joints_and_other_sizes_are_refused(rows, names, words):
    with pytest.raises(TrajectoryError, match=words):
        arranged(rows, names, ('a', 'b'))
