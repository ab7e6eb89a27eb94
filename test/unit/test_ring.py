from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from il_runtime.ring import OVERHEAD, Message, Meter, Ring, Span

LATCHED = 'status'
ARRIVALS = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(['a', 'b', LATCHED]), st.integers(0, 500)), max_size=60)


def filled(arrivals, seconds: float, max_bytes: int) -> tuple[Ring, list[tuple[float, Message]]]:
    """A ring after (seconds since the one before, topic, size) of each message, and everything that it was given."""
    ring, given, now = Ring(seconds, max_bytes, {LATCHED}), [], 0.0
    for i, (step, topic, size) in enumerate(arrivals):
        now += step
        given.append((now, Message(topic, bytes([i]) * size, 1000 + i, 500 + i, 100 + i)))
        ring.add(*given[-1])
    return ring, given


def window(given, seconds: float, max_bytes: int) -> list[Message]:
    """Brute force: the longest tail that is within both bounds."""
    for i in range(len(given)):
        tail = given[i:]
        if tail[-1][0] - tail[0][0] <= seconds and sum(OVERHEAD + len(m.data) for _, m in tail) <= max_bytes:
            return [message for _, message in tail]
    return []


@given(ARRIVALS, st.integers(0, 60), st.integers(0, 20_000))
def test_the_longest_tail_within_time_and_memory(arrivals, seconds, max_bytes):
    ring, given = filled(arrivals, seconds, max_bytes)
    kept = window(given, seconds, max_bytes)
    gone = [message for _, message in given[: len(given) - len(kept)] if message.topic == LATCHED]
    held = [message._replace(received=kept[0].received) if kept else message for message in gone[-1:]]
    assert ring.messages() == held + kept
    assert ring.span == (given[-1][0] - given[-len(kept)][0] if kept else 0.0)


@given(ARRIVALS, st.integers(0, 60), st.integers(0, 20_000))
def test_it_says_when_memory_is_the_bound(arrivals, seconds, max_bytes):
    ring, given = filled(arrivals, seconds, max_bytes)
    tails = [given[: i + 1] for i in range(len(given))]
    assert ring.full == any(len(window(tail, seconds, max_bytes)) < len(window(tail, seconds, 10**9)) for tail in tails)


def test_time_that_begins_again_begins_a_new_window():
    ring, _ = filled([(5, 'a', 1), (1, LATCHED, 1), (1, 'b', 1)], 30, 10**6)
    late = Message('a', b'', 2000, 2000, 0)
    ring.add(2.0, late)
    assert [(message.topic, message.received) for message in ring.messages()] == [(LATCHED, 2000), ('a', 2000)]


def test_in_the_order_of_receipt():
    ring = Ring(1.0, 10**6)
    for received in (3, 1, 2):
        ring.add(0.0, Message('a', b'', received, 0, 0))
    assert [message.received for message in ring.messages()] == [1, 2, 3]
    assert Ring(1.0, 1).messages() == [] and Ring(1.0, 1).span == 0.0


S = 10**9
DECLARED = 20.0


def metered(arrivals, declared: float = DECLARED) -> Meter:
    """A meter after arrivals at these times [s]."""
    meter = Meter(declared)
    for arrival in arrivals:
        meter.add(round(arrival * S))
    return meter


@pytest.mark.parametrize('rate', [0.5, 5.0, 20.0, 29.97, 1000.0])
def test_the_rate_of_a_regular_stream(rate):
    meter = metered(np.arange(0.0, 20.0, 1.0 / rate), declared=rate)
    now = round(20.0 * S - S / rate)
    assert abs(meter.rate(now) / rate - 1.0) < 1e-6 and meter.off(now, 0.01) == ''
    assert meter.known(now) == 1.0


@given(st.lists(st.floats(0.001, 0.099), min_size=40, max_size=200), st.floats(0.0, 5.0))
def test_rate_by_brute_force(gaps, silence):
    arrivals = np.cumsum(gaps)
    now = arrivals[-1] + silence
    stamps = np.round(arrivals * S)
    inside = stamps[stamps >= round(now * S) - 3 * S]
    end = round(now * S) if silence > 2 / DECLARED + 1e-6 else inside[-1] if len(inside) else 0
    expected = (len(inside) - 1) / (end - inside[0]) * S if len(inside) > 1 else 0.0
    if abs(silence - 2 / DECLARED) > 1e-6:
        assert metered(arrivals).rate(round(now * S)) == pytest.approx(expected)


def test_what_is_off_rate():
    fast = np.arange(0.0, 4.0, 0.05)
    for arrivals, now, words in (
        (fast, 4.0, ''),
        (fast[::2], 4.0, '10 Hz, declared 20 Hz'),
        (np.arange(0.0, 4.0, 1 / 24), 4.0, '24 Hz, declared 20 Hz'),
        (np.arange(0.0, 4.0, 1 / 22), 4.0, ''),
        ([*fast[fast < 1.0], *fast[fast > 2.0]], 3.95, '13 Hz, declared 20 Hz'),  # a second without
        (fast, 4.95, '13.3 Hz, declared 20 Hz'),  # and now
        (fast, 40.0, '0 Hz, declared 20 Hz'),
        ([], 1.0, '0 Hz, declared 20 Hz'),
    ):
        assert metered(arrivals).off(round(now * S), 0.15) == words


def test_how_much_of_the_window_is_known():
    assert Meter(DECLARED).known(5 * S) == 0.0
    for now, share in ((10.0, 0.0), (11.5, 0.5), (13.0, 1.0), (20.0, 1.0)):
        assert metered([10.0, 10.5]).known(round(now * S)) == share
    assert metered([10.0], declared=0.5).known(15 * S) == 0.5, 'five periods, if that is longer'


def test_time_that_begins_again_begins_a_new_measurement():
    meter = metered([*np.arange(100.0, 110.0, 0.05), *np.arange(0.0, 1.0, 0.1)])
    assert meter.rate(round(0.9 * S)) == pytest.approx(10.0) and meter.known(round(0.9 * S)) == pytest.approx(0.3)


MS = 1_000_000
SINCE, UNTIL = 1_700_000_000 * S, 1_700_000_001 * S


def spanned(offset: int, delays) -> list[int]:
    """Where a span of 1 s places a 10 Hz stream that began 1 s before it; delays and its publisher's clock's offset in ns."""
    span, places = Span(SINCE), []
    for k, delay in enumerate(delays):
        sent = SINCE - S + 50 * MS + k * 100 * MS  # on this machine's clock
        if sent + delay > UNTIL:
            span.until = UNTIL
        places.append(span.place('camera', sent + delay, sent + offset))
    return places


@pytest.mark.parametrize('offset', [0, -3 * S, 600 * MS, 3600 * S])
def test_a_span_holds_what_arrived_in_it_whatever_the_publishers_clock(offset):
    assert spanned(offset, [2 * MS] * 30) == [-1] * 10 + [0] * 10 + [1] * 10


@pytest.mark.parametrize('offset', [0, -3 * S, 600 * MS])
def test_a_span_holds_what_was_sent_in_it_but_came_late(offset):
    """From the seventh message in it on, the machine hands nothing over for half a second."""
    delays = [2 * MS + (k % 3) * MS for k in range(30)]
    delays[17:22] = [502 * MS] * 5
    assert spanned(offset, delays) == [-1] * 10 + [0] * 10 + [1] * 10


def test_a_topic_that_was_silent_in_a_span_has_nothing_in_it():
    span = Span(SINCE)
    assert span.place('fast', SINCE + MS, SINCE) == 0
    span.until = UNTIL
    assert span.place('slow', UNTIL + MS, UNTIL - 3 * S) == 1
    assert span.place('fast', UNTIL + 5 * MS, UNTIL - 2 * MS) == 0, 'each topic has a clock of its own'
