from __future__ import annotations

import pytest

from il_runtime.core.clock import LoopClock, StampError

HOUR = 3600 * 10**9
T0 = 1_700_000_000 * 10**9


class Clocks:
    """Two clocks that are set by hand."""

    def __init__(self):
        self.loop, self.wall = 5 * 10**9, T0
        self.clock = LoopClock(lambda: self.loop, lambda: self.wall)

    def pass_time(self, ns: int):
        self.loop, self.wall = self.loop + ns, self.wall + ns


@pytest.mark.parametrize('step', [HOUR, -HOUR])
def test_a_step_of_the_wall_clock_moves_nothing_that_was_converted(show, step):
    clocks = Clocks()
    observed, start = clocks.clock.convert(T0 - 40_000_000, T0 + 60_000_000)
    assert (observed, start) == pytest.approx((4.96, 5.06))
    clocks.wall += step
    assert clocks.clock.now() == 5.0
    # New messages, stamped by the clock as it is now, are where they belong; those from before are refused and named.
    assert clocks.clock.convert(T0 + step)[0] == pytest.approx(5.0)
    with pytest.raises(StampError, match=r'stamp is [+-]3600.000 s old, allowed ±1 s: set the clocks'):
        clocks.clock.convert(T0)
    # Commands are stamped by the clock as it is now.
    assert clocks.clock.stamp(5.0, moving=True) == T0 + step
    show('wall clock ±1 h', 'unchanged commands', 'nothing that was converted moves; messages from before the step are refused')


def test_stamps_further_than_a_second_off_are_refused_either_way():
    clocks = Clocks()
    for off in (999_000_000, -999_000_000):
        clocks.clock.convert(T0 + off)
    for off in (1_001_000_000, -1_001_000_000):
        with pytest.raises(StampError):
            clocks.clock.convert(T0 + off)
        with pytest.raises(StampError):
            clocks.clock.convert(T0, T0 + off)


def test_stamps_of_commands_are_even_while_the_wall_clock_is_slewed():
    clocks = Clocks()
    stamps = []
    for _ in range(50):
        clocks.pass_time(20_000_000)
        clocks.wall += 40_000  # 2000 ppm
        stamps.append(clocks.clock.stamp(clocks.loop * 1e-9, moving=True))
    assert {b - a for a, b in zip(stamps, stamps[1:])} == {20_000_000}
    # At rest the drift is taken up.
    assert abs(clocks.clock.stamp(clocks.loop * 1e-9, moving=False) - clocks.wall) < 1000


def test_a_pause_between_reading_two_clocks_is_no_step_of_one():
    clocks = Clocks()
    paused = iter([clocks.loop, clocks.loop + 80_000_000])
    clocks.clock._loop_ns = lambda: next(paused)
    clocks.wall += 80_000_000
    assert clocks.clock.stamp(5.0, moving=True) == T0


def test_simulated_time_is_one_clock():
    now = [7 * 10**9]
    clock = LoopClock(lambda: now[0], lambda: now[0])
    assert clock.now() == 7.0 and clock.convert(7_250_000_000)[0] == pytest.approx(7.25)
    assert clock.stamp(7.02, moving=True) == 7_020_000_000
