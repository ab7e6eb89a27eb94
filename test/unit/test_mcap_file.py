"""Whole MCAP files against what was written, damaged ones against what may be left of them."""
from __future__ import annotations

import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from mcap.exceptions import McapError
from mcap.records import Message
from mcap.stream_reader import StreamReader

from bags import Entry, compress, entries, write_mcap
from damage import outcome
from il_policies.bags.mcap_file import McapFile
from il_policies.bags.reader import Bag
from il_policies.data.errors import BagError
from recordings import MS, START, recording, write_as

ENTRIES = entries()
VARIANTS = {'plain': {}, 'lz4': {'compression': 'LZ4'}, 'zstd': {'compression': 'ZSTD'}, 'as rosbag2': {'crc': False},
            'zstd as rosbag2': {'compression': 'ZSTD', 'crc': False}, 'no summary': {'summary': False},
            'fastwrite': {'chunks': False, 'crc': False, 'index': False, 'summary': False}}
CHECKED = {'plain', 'lz4', 'zstd', 'no summary', 'packed'}


def write(variant: str, folder):
    if variant == 'message-zstd':
        return next(write_as('mcap message-zstd', folder / 'bag', recording(1.0)).glob('*.mcap'))
    file = write_mcap(folder / 'a.mcap', ENTRIES, **VARIANTS.get(variant, {}))
    return compress(file) if variant == 'packed' else file


def recorded(bag: Bag) -> list[tuple[str, int, bytes]]:
    return [(raw.topic, raw.receive_ns, raw.data) for raw in bag.raw()]


@pytest.mark.parametrize('chunk_size', [1, 700, 1 << 20])
def test_order_is_that_of_receipt(tmp_path, chunk_size):
    """Messages written in disorder, also across chunks; many at one stamp keep the order in which they were written."""
    rng = np.random.default_rng(0)
    stamps = START + np.arange(300) // 5 * MS + rng.integers(0, 4, 300) * MS
    messages = [Entry(f'/t{i % 3}', 'std_msgs/msg/Int32', int(stamp), 0, b'\0\1\0\0' + i.to_bytes(4, 'little'))
                for i, stamp in enumerate(stamps)]
    for options in ({}, {'summary': False}, {'chunks': False}):
        file = McapFile(write_mcap(tmp_path / 'a.mcap', messages, chunk_size=chunk_size, **options), salvage=False)
        read = list(file.read())
        assert [raw.data for raw in read] == [entry.data for entry in sorted(messages, key=lambda entry: entry.receive_ns)]
        assert {raw.publish_ns for raw in read} == {None}  # 0: the middleware said nothing
        assert file.counts == {'/t0': 100, '/t1': 100, '/t2': 100} and file.span == (min(stamps), max(stamps))


def test_empty_files(tmp_path):
    for options in VARIANTS.values():
        bag = Bag(write_mcap(tmp_path / 'a.mcap', [], **options))
        assert recorded(bag) == [] and bag.topics == {} and bag.damage == ()


@pytest.mark.parametrize('variant', [*VARIANTS, 'message-zstd', 'packed'])
def test_truncated_at_every_twentieth(tmp_path, variant):
    """Refused; salvaged, it gives the beginning of what was written, more of a longer file."""
    file = write(variant, tmp_path)
    whole = file.read_bytes()
    counts = []
    for k in range(20):
        file.write_bytes(whole[:len(whole) * k // 20])
        assert outcome(file, ENTRIES, checked=True) == 'refused'  # what is left is unaltered, whatever the container
        try:
            bag = Bag(file, salvage=True)
        except BagError:
            counts.append(0)
            continue
        got = recorded(bag)
        if variant != 'packed':  # chunks hold what was received in a row
            assert got == [(entry.topic, entry.receive_ns, entry.data) for entry in ENTRIES[:len(got)]]
        counts.append(len(got))
    assert counts == sorted(counts) and counts[0] == 0 and (counts[-1] > 100 or variant == 'packed')


@pytest.mark.parametrize('variant', ['plain', 'fastwrite', 'no summary'])
def test_all_that_is_left_is_salvaged(tmp_path, variant):
    """Of messages that are not compressed: each one that lies before the cut. mcap's reader finds no more."""
    file = write(variant, tmp_path)
    whole = file.read_bytes()
    places = [whole.index(entry.data) + len(entry.data) for entry in ENTRIES]
    for cut in range(1500, len(whole) - 4000, 1999):
        file.write_bytes(whole[:cut])
        with open(file, 'rb') as stream:
            theirs = 0
            try:
                for record in StreamReader(stream, validate_crcs=True).records:
                    theirs += isinstance(record, Message)
            except (McapError, struct.error):
                pass
        bag = Bag(file, salvage=True)
        assert len(recorded(bag)) == sum(place <= cut for place in places) >= theirs
        assert f'of {cut}' in bag.damage[-1]
        with pytest.raises(BagError, match=f'no end mark at byte {cut}: .*; {len(recorded(bag))} messages, .* s are usable'):
            Bag(file)


@pytest.mark.parametrize('variant', [*VARIANTS, 'message-zstd', 'packed'])
def test_bit_flips(tmp_path, variant):
    """Never fewer messages without a word; where there are checksums, none but those that were written."""
    file = write(variant, tmp_path)
    whole = file.read_bytes()
    rng = np.random.default_rng(zlib.crc32(variant.encode()))
    outcomes = Counter()
    for _ in range(16):
        content = bytearray(whole)
        content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        outcomes[outcome(file, ENTRIES, variant in CHECKED)] += 1
    assert outcomes['refused'] > (8 if variant in CHECKED else 0), outcomes


def flipped(file, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def test_a_damaged_chunk_is_left_out(tmp_path):
    """And no more than that; what is wrong and where is said."""
    file = write_mcap(tmp_path / 'a.mcap', ENTRIES)
    place = file.read_bytes().index(ENTRIES[60].data)
    flipped(file, place)
    with pytest.raises(BagError, match=r'E101 .*a.mcap: the chunk at byte \d+ does not match its checksum; '
                                       r'1\d\d messages, 1.0 s are usable: rerun with --salvage'):
        recorded(Bag(file))
    bag = Bag(file, salvage=True)
    (damage,) = bag.damage
    assert damage.startswith('a.mcap: 1 chunks left out, first: the chunk at byte')
    kept = recorded(bag)
    lost = [i for i, entry in enumerate(ENTRIES) if (entry.topic, entry.receive_ns, entry.data) not in set(kept)]
    assert 60 in lost and lost == list(range(lost[0], lost[-1] + 1)) and len(lost) < 40
    assert len(kept) == len(ENTRIES) - len(lost)


def test_without_checksums_the_index_tells(tmp_path):
    """A stamp, a kind of record, a length, a channel: each message is held against the index of its chunk."""
    file = write_mcap(tmp_path / 'a.mcap', ENTRIES, crc=False)
    whole = file.read_bytes()
    head = whole.index(ENTRIES[60].data) - 22 - 9
    for place in (head, head + 1, head + 9, head + 9 + 6):
        file.write_bytes(whole)
        flipped(file, place)
        with pytest.raises(BagError, match='E101 .*a.mcap: the (messages of the )?chunk at byte'):
            recorded(Bag(file))
        assert 100 < len(recorded(Bag(file, salvage=True))) < len(ENTRIES)
    file.write_bytes(whole)
    flipped(file, whole.index(ENTRIES[60].data) + 40)
    assert len(recorded(Bag(file))) == len(ENTRIES)  # but of a payload nothing tells


def test_zeros_where_the_end_should_be(tmp_path):
    """A file that lost power: as long as it should be, and empty towards the end."""
    for variant in VARIANTS:
        file = write(variant, tmp_path)
        whole = file.read_bytes()
        half = len(whole) // 2
        file.write_bytes(whole[:half] + bytes(len(whole) - half))
        assert outcome(file, ENTRIES, checked=variant in CHECKED) == 'refused'
        assert 20 < len(recorded(Bag(file, salvage=True))) < len(ENTRIES)


def test_unknown_compression(tmp_path):
    file = write_mcap(tmp_path / 'a.mcap', ENTRIES, 'ZSTD', summary=False)
    file.write_bytes(file.read_bytes().replace(b'\4\0\0\0zstd', b'\4\0\0\0snap'))
    with pytest.raises(BagError, match="E103 .*a.mcap: a chunk is compressed as 'snap'; valid: none, lz4, zstd"):
        recorded(Bag(file))
