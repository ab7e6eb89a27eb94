from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from il_runtime.ring import OVERHEAD, Message, Ring

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
