"""Whole SQLite files against what was written, damaged ones against what may be left of them."""
from __future__ import annotations

import os
import shutil
import sqlite3
from collections import Counter

import numpy as np
import pytest

from bags import compress, entries, write_metadata, write_sqlite
from damage import outcome
from il_policies.bags.reader import Bag
from il_policies.data.errors import BagError
from recordings import MS, START, recording, write_as

ENTRIES = entries()


def recorded(bag: Bag) -> list[tuple[str, int, bytes]]:
    return [(raw.topic, raw.receive_ns, raw.data) for raw in bag.raw()]


def expected(messages=ENTRIES) -> list[tuple[str, int, bytes]]:
    return [(entry.topic, entry.receive_ns, entry.data) for entry in messages]


def test_order_is_that_of_receipt(tmp_path):
    rng = np.random.default_rng(0)
    messages = [entry._replace(receive_ns=START + int(stamp) * MS) for entry, stamp in zip(ENTRIES, rng.integers(0, 20, 200))]
    file = write_sqlite(tmp_path / 'a.db3', messages)
    assert recorded(Bag(file)) == expected(sorted(messages, key=lambda entry: entry.receive_ns))
    with sqlite3.connect(file) as connection:
        connection.execute('DROP INDEX timestamp_idx')
    connection.close()
    assert recorded(Bag(file)) == expected(sorted(messages, key=lambda entry: entry.receive_ns))


@pytest.mark.skipif(os.getuid() == 0, reason='root writes anywhere')
def test_needs_no_writable_folder(tmp_path):
    file = write_sqlite(tmp_path / 'bag/a.db3', ENTRIES)
    (tmp_path / 'bag').chmod(0o500)
    assert recorded(Bag(file)) == expected()


def test_reading_leaves_nothing_behind(tmp_path):
    file = write_sqlite(tmp_path / 'a.db3', ENTRIES)
    content = file.read_bytes()
    assert recorded(Bag(file)) == expected() == recorded(Bag(file, salvage=True))
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == content


@pytest.mark.parametrize('folder', [False, True])
def test_write_ahead_log_counts(tmp_path, folder):
    """Messages that a crashed recorder left in it, also where metadata.yaml counts without them."""
    file = write_sqlite(tmp_path / 'bag/bag_0.db3', ENTRIES, wal_from=100)
    wal = file.with_name('bag_0.db3-wal')
    assert wal.stat().st_size > 10_000
    if folder:
        write_metadata(tmp_path / 'bag', ENTRIES[:100], ['bag_0.db3'], storage_identifier='sqlite3')
    content = {path: path.read_bytes() for path in file.parent.iterdir()}
    assert recorded(Bag(tmp_path / 'bag' if folder else file)) == expected()
    assert {path: path.read_bytes() for path in file.parent.iterdir()} == content
    before = Bag(file).fingerprint
    wal.unlink()
    assert recorded(Bag(file)) == expected(ENTRIES[:100]) and Bag(file).fingerprint != before


def test_a_transaction_that_was_not_finished_is_undone(tmp_path):
    """As SQLite does it, but in a copy: what a crash left half done is not taken for the messages."""
    file = write_sqlite(tmp_path / 'a.db3', ENTRIES)
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute('PRAGMA cache_size = 1')
    connection.execute('BEGIN')
    connection.execute('UPDATE messages SET timestamp = timestamp + 1')
    shutil.copytree(tmp_path, tmp_path / 'crashed')
    connection.execute('ROLLBACK')
    connection.close()
    crashed = {path: path.read_bytes() for path in (tmp_path / 'crashed').iterdir()}
    assert len(crashed) == 2 and crashed[tmp_path / 'crashed/a.db3'] != file.read_bytes()
    assert recorded(Bag(tmp_path / 'crashed')) == expected()
    assert {path: path.read_bytes() for path in (tmp_path / 'crashed').iterdir()} == crashed


def test_what_is_no_bag(tmp_path):
    with sqlite3.connect(tmp_path / 'a.db3') as connection:
        connection.execute('CREATE TABLE other(x)')
    connection.close()
    with pytest.raises(BagError, match=r'E101 .*a.db3: no bag: a database of the tables other; nothing in it is usable'):
        Bag(tmp_path / 'a.db3')
    assert recorded(Bag(write_sqlite(tmp_path / 'b.db3', []))) == []


@pytest.mark.parametrize('kind', ['humble', 'rosbags', 'messages', 'packed'])
def test_truncated_at_every_twentieth(tmp_path, kind):
    """Refused; what is salvaged is unaltered, and at best nearly all."""
    file = damageable(kind, tmp_path)
    whole = file.read_bytes()
    best = 0
    for k in range(20):
        file.write_bytes(whole[:len(whole) * k // 20])
        assert outcome(file, ENTRIES, checked=True) == 'refused'  # what is left is unaltered
        try:
            got = recorded(Bag(file, salvage=True))
        except BagError:
            continue
        best = max(best, len(got))
    assert best > 100 or kind == 'packed'


@pytest.mark.parametrize('kind', ['humble', 'rosbags', 'messages', 'packed'])
def test_bit_flips(tmp_path, kind):
    """Never fewer messages without a word; SQLite has no checksums, so that payloads and stamps may be altered."""
    file = damageable(kind, tmp_path)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = Counter()
    for k in range(16):
        content = bytearray(whole)
        page = rng.integers(len(whole) // 4096) * 4096  # every other one in the head of a page
        content[page + rng.integers(40) if k % 2 and kind != 'packed' else rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        outcomes[outcome(file, ENTRIES, checked=False)] += 1
    assert outcomes['refused'], outcomes


def damageable(kind: str, folder):
    if kind in ('humble', 'packed'):
        file = write_sqlite(folder / 'a.db3', ENTRIES)
        return compress(file) if kind == 'packed' else file
    return next(write_as('db3' if kind == 'rosbags' else 'db3 message-zstd', folder / 'bag', recording(1.0)).glob('*.db3'))


def test_a_message_in_the_middle_is_lost(tmp_path):
    """Both ends around a damaged page are found."""
    file = write_sqlite(tmp_path / 'a.db3', ENTRIES)
    whole = file.read_bytes()
    place = whole.index(ENTRIES[60].data) // 4096 * 4096
    file.write_bytes(whole[:place] + b'\xff' * 4096 + whole[place + 4096:])
    with pytest.raises(BagError, match=r'E101 .*a.db3: .*malformed.*; 1\d\d messages, 1.0 s are usable: rerun with --salvage'):
        recorded(Bag(file))
    bag = Bag(file, salvage=True)
    lost = sorted(set(expected()) - set(recorded(bag)), key=expected().index)
    assert expected().index(lost[0]) <= 60 <= expected().index(lost[-1]) and len(lost) < 40
    assert bag.damage[0].startswith(f'a.db3: {len(ENTRIES) - len(lost)} messages read, of numbers 1 to {len(ENTRIES)}: database')
