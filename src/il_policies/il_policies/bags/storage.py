"""What the files of bags have in common: messages as recorded, topics, and what to do about damage.

What a file promises (checksums, indices, counts) is compared with what is found: a damaged file is refused, or salvaged
if asked, but never quietly shorter than it was.
"""
from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import zstandard

ZSTD_MAGIC = b'\x28\xb5\x2f\xfd'
LARGEST = 256 << 20
"""No chunk or message is larger [bytes]: a damaged length must not take the machine's memory."""
STAMPS = range(2**63)
"""Stamps that are none of these do not fit a signed integer; no clock shows them [ns]."""


class Raw(NamedTuple):
    """A message as it was recorded."""

    topic: str
    data: bytes
    """Serialised, as a rule as CDR."""
    receive_ns: int
    publish_ns: int | None
    """None where the storage keeps none."""


class Topic(NamedTuple):
    """What a file says about a topic."""

    name: str
    type: str
    encoding: str
    """Of its messages, as a rule cdr."""
    language: str
    """Of the definition: ros2msg or ros2idl; anything else if there is none."""
    definition: str


class Damaged(Exception):
    """What is wrong with a file."""


def merged(starts: Sequence[int], open_source: Callable[[int], Iterator[Raw]]) -> Iterator[Raw]:
    """Merge sources, each in order of receipt and with its first stamp given; at equal stamps the earlier source leads.

    open_source: index of a source → its messages; called when the source's turn comes, so that few are open at a time.
    """
    waiting = map(int, np.argsort(np.asarray(starts, np.uint64), kind='stable'))
    following = next(waiting, None)
    active: list[tuple[int, int, Raw, Iterator[Raw]]] = []
    while active or following is not None:
        if following is not None and (not active or starts[following] <= active[0][0]):
            source = open_source(following)
            if (first := next(source, None)) is not None:
                heapq.heappush(active, (first.receive_ns, following, first, source))
            following = next(waiting, None)
            continue
        _, place, raw, source = active[0]
        yield raw
        if (raw := next(source, None)) is None:
            heapq.heappop(active)
        else:
            heapq.heapreplace(active, (raw.receive_ns, place, raw, source))


def plain(data: bytes) -> bytes:
    """A message, decompressed if it is compressed by itself: no CDR begins as zstd does. Raises Damaged."""
    if not data.startswith(ZSTD_MAGIC):
        return data
    try:
        if zstandard.frame_content_size(data) > LARGEST:
            raise Damaged('a message is too large to be one')
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=LARGEST)
    except (zstandard.ZstdError, MemoryError) as error:
        raise Damaged(f'a message cannot be decompressed: {error}') from None


def is_plain(data: bytes) -> bool:
    """Whether `plain` succeeds."""
    try:
        plain(data)
    except Damaged:
        return False
    return True
