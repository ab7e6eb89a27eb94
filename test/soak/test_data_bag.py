"""Damaged bags of a short demonstration with a camera, in every container; and the time it takes to read whole ones."""
from __future__ import annotations

import os
import resource
import time
from collections import Counter

import numpy as np
import pytest
from mcap.reader import SeekingReader

from bags import Entry, compress, write_mcap, write_sqlite
from damage import outcome
from il_policies.bags.reader import Bag
from recordings import MS, START, TYPES, header, joint_state

FLIPS = 200 if float(os.environ.get('IL_SOAK_MINUTES', 2)) <= 2 else 2000
IMAGE = 'sensor_msgs/msg/Image'
JOINT_STATE = 'sensor_msgs/msg/JointState'


def demonstration(seconds: int, size: tuple[int, int]) -> list[Entry]:
    """Joints at 200 Hz and a raw camera at 30 Hz, half of each image noise."""
    random = np.random.default_rng(0)
    entries = []
    for i in range(200 * seconds):
        stamp = START + i * 5 * MS
        message = joint_state(stamp, list('abcdef'), random.normal(size=6))
        entries.append(Entry('/joint_states', JOINT_STATE, stamp + MS, stamp, bytes(TYPES.serialize_cdr(message, JOINT_STATE))))
        if i * 30 % 200 < 30:
            pixels = random.integers(0, 256, size[0] * size[1] * 3, np.uint8)
            pixels[::2] = 0
            message = TYPES.types[IMAGE](header(stamp), *size, 'rgb8', 0, 3 * size[1], pixels)
            entries.append(Entry('/image', IMAGE, stamp + MS, stamp, bytes(TYPES.serialize_cdr(message, IMAGE))))
    return entries


@pytest.fixture(scope='module')
def short() -> list[Entry]:
    return demonstration(2, (48, 64))


CONTAINERS = {'mcap': {}, 'lz4': {'compression': 'LZ4'}, 'zstd': {'compression': 'ZSTD'}, 'as rosbag2': {'crc': False},
              'zstd as rosbag2': {'compression': 'ZSTD', 'crc': False}, 'no summary': {'summary': False},
              'fastwrite': {'chunks': False, 'crc': False, 'index': False, 'summary': False}, 'sqlite': None, 'packed': {}}


@pytest.mark.parametrize('container', CONTAINERS)
def test_damage(tmp_path, short, container):
    """Cut at every twentieth, and with one bit flipped: refused, or all there; salvaged and said so; within 10 s and 1 GB."""
    options = CONTAINERS[container]
    file = write_sqlite(tmp_path / 'a.db3', short) if options is None else write_mcap(
        tmp_path / 'a.mcap', short, chunk_size=64 * 1024, **options)
    file = compress(file) if container == 'packed' else file
    whole = file.read_bytes()
    for k in range(20):
        file.write_bytes(whole[:len(whole) * k // 20])
        assert outcome(file, short, checked=True) == 'refused'
    random = np.random.default_rng()
    outcomes = Counter()
    slowest = 0.0
    for _ in range(FLIPS):
        place, bit = int(random.integers(len(whole))), int(random.integers(8))
        content = bytearray(whole)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        begin = time.monotonic()
        try:
            outcomes[outcome(file, short, checked=container in ('mcap', 'lz4', 'zstd', 'no summary', 'packed'))] += 1
        except AssertionError as error:
            raise AssertionError(f'bit {bit} of byte {place} of {len(whole)}') from error
        slowest = max(slowest, time.monotonic() - begin)
    print(f'{container}: {len(whole) / 1e6:.1f} MB, 20 cuts refused; flips {dict(outcomes)}, slowest {slowest:.2f} s')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 20  # [KiB]


def test_speed(tmp_path):
    """Everything of 140 MB, with checksums, in order and complete, in at most twice the time of mcap's own reader."""
    messages = demonstration(20, (240, 320))
    file = write_mcap(tmp_path / 'a.mcap', messages, chunk_size=512 * 1024)

    def theirs() -> int:
        with open(file, 'rb') as stream:
            return sum(1 for _ in SeekingReader(stream, validate_crcs=True).iter_messages())

    def ours() -> int:
        return sum(1 for _ in Bag(file).raw())

    took = {theirs: [], ours: []}
    for _ in range(3):
        for read, times in took.items():
            begin = time.process_time()
            assert read() == len(messages)
            times.append(time.process_time() - begin)
    print(f'{file.stat().st_size / 1e6:.0f} MB of 20 s: ours {min(took[ours]):.2f} CPU s, mcap {min(took[theirs]):.2f}')
    assert min(took[ours]) < 2 * min(took[theirs])
