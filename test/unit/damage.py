"""What a damaged bag may do: be refused, or give what was written; if salvaged, give a labelled part of it."""
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bags import Entry
from il_policies.bags.reader import Bag
from il_policies.data.errors import BagError

SECONDS = 10
"""No file takes longer."""


def outcome(file: Path, messages: Sequence[Entry], checked: bool) -> str:
    """Read a damaged file, strictly and to salvage; 'refused', 'unchanged' or 'altered'. Fails where it may not be so.

    checked: the container has checksums of the messages, so that none may be altered. One without may: in a payload or a
    stamp, but not in number, unless a message or a topic now counts as another's.
    """
    begin = time.monotonic()
    truth = [(entry.topic, entry.receive_ns, entry.data) for entry in messages]
    try:
        got = [(raw.topic, raw.receive_ns, raw.data) for raw in Bag(file).raw()]
    except BagError as error:
        assert error.code in ('E101', 'E103'), error
        strict = 'refused'
    else:
        strict = 'unchanged' if got == truth else 'altered'
        assert len(got) == len(truth), f'{len(got)} of {len(truth)} messages without a word'
        assert strict == 'unchanged' or not checked
    try:
        bag = Bag(file, salvage=True)
    except BagError as error:
        assert strict == 'refused' and error.code in ('E101', 'E103'), error
    else:
        got = [(raw.topic, raw.receive_ns, raw.data) for raw in bag.raw()]
        assert got == sorted(got, key=lambda entry: entry[1])
        assert bool(bag.damage) == (strict == 'refused'), (strict, bag.damage)
        if checked:
            assert not Counter(got) - Counter(truth)
        if strict == 'refused':
            assert len(got) <= len(truth) and all('\\n' not in text for text in bag.damage)
    assert time.monotonic() - begin < SECONDS
    return strict
