from __future__ import annotations

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from il_policies.bags.storage import LARGEST, Damaged, Raw, is_plain, merged, plain


@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=8).map(sorted), max_size=8))
def test_merged_as_a_stable_sort_would(sources):
    """Against sorting everything by (stamp, source, place), and never with more sources open than overlap."""
    given = [[Raw(str(i), bytes([k]), stamp, None) for k, stamp in enumerate(stamps)] for i, stamps in enumerate(sources)]
    opened = []

    def open_source(i):
        opened.append(i)
        yield from given[i]

    result = []
    for raw in merged([stamps[0] for stamps in sources], open_source):
        result.append(raw)
        assert all(sources[i][0] <= raw.receive_ns for i in opened)
    assert result == sorted((raw for source in given for raw in source), key=lambda raw: raw.receive_ns)
    assert sorted(opened) == list(range(len(sources)))


def test_plain_messages_and_compressed_ones():
    assert plain(b'\0\1\0\0abc') == b'\0\1\0\0abc' and plain(b'') == b''
    packed = zstandard.compress(b'\0\1\0\0abc' * 100)
    assert plain(packed) == b'\0\1\0\0abc' * 100
    without_size = zstandard.ZstdCompressor(write_content_size=False).compress(b'\0\1\0\0abc' * 100)
    assert plain(without_size) == b'\0\1\0\0abc' * 100
    with pytest.raises(Damaged, match='cannot be decompressed'):
        plain(packed[:-3])
    assert is_plain(packed) and not is_plain(packed[:-3])
    huge = bytearray(zstandard.compress(bytes(LARGEST + 1)))  # 8 kB that say they hold 256 MiB
    with pytest.raises(Damaged, match='too large'):
        plain(bytes(huge))
