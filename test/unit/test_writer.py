"""What the writer leaves on the disk, read by other libraries: mcap's own readers, rosbags and PyYAML."""
from __future__ import annotations

import errno
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import yaml
from mcap.exceptions import EndOfFile
from mcap.reader import make_reader
from mcap.records import Message, Metadata
from mcap.stream_reader import StreamReader
from rosbags.highlevel import AnyReader

from il_policies.bags.writer import ABOUT, CHUNK_SIZE, RESERVE, BagWriter, cut_short
from il_policies.data.errors import BagError
from recordings import START, TYPES, joint_state

JOINT_STATE = 'sensor_msgs/msg/JointState'
CDR = bytes(TYPES.serialize_cdr(joint_state(START, ['a'] * 50, np.zeros(50)), JOINT_STATE))
ABOUT_IT = {'robot': 'two', 'task': 'reach', 'contract': json.dumps({'robot': 'two'})}


def opened(path, count: int = 0, about=ABOUT_IT) -> BagWriter:
    """A bag that is being written, with so many messages of some 800 bytes."""
    writer = BagWriter(path, TYPES, about)
    writer.add_topic('/j', JOINT_STATE)
    for i in range(count):
        writer.write('/j', CDR, START + i, START + i)
    return writer


def salvaged(path) -> tuple[list[int], dict[str, dict]]:
    """Of a file without an end: the stamps of its messages and its metadata records, by mcap's streaming reader."""
    stamps, metadata = [], {}
    with open(path, 'rb') as file, pytest.raises((EndOfFile, struct.error)):
        for record in StreamReader(file, validate_crcs=True).records:
            if isinstance(record, Message):
                stamps.append(record.log_time - START)
            elif isinstance(record, Metadata):
                metadata[record.name] = record.metadata
    return stamps, metadata


def test_what_it_is_about_stands_at_both_ends(tmp_path):
    writer = opened(tmp_path / 'bag')
    # Before a single message: what a recorder that is killed leaves.
    assert salvaged(writer.part / 'bag_0.mcap') == ([], {ABOUT: ABOUT_IT})
    assert cut_short(tmp_path) == [writer.part]
    path = writer.close({'success': 'true', 'task': 'reach it'})
    assert cut_short(tmp_path) == []
    with open(path / 'bag_0.mcap', 'rb') as file:
        records = {record.name: record.metadata for record in make_reader(file, validate_crcs=True).iter_metadata()}
    assert records[ABOUT] == ABOUT_IT
    told = yaml.safe_load((path / 'metadata.yaml').read_text())['rosbag2_bagfile_information']
    assert told['custom_data'] == {'robot': 'two', 'task': 'reach it', 'success': 'true'}, 'the last word counts; no contract'
    assert yaml.safe_load(records['rosbag2']['serialized_metadata']) == told


def test_what_was_flushed_outlives_the_process(tmp_path):
    writer = opened(tmp_path / 'bag', 3)
    assert salvaged(writer.part / 'bag_0.mcap')[0] == []
    writer.flush()
    writer.write('/j', CDR, START + 3, START + 3)
    assert salvaged(writer.part / 'bag_0.mcap')[0] == [0, 1, 2]
    writer.flush()
    writer.flush()
    assert salvaged(writer.part / 'bag_0.mcap')[0] == [0, 1, 2, 3]
    while not writer.counts['/j'] > CHUNK_SIZE / len(CDR):  # a full chunk goes by itself
        writer.write('/j', CDR, START, START)
    assert len(salvaged(writer.part / 'bag_0.mcap')[0]) > 0.9 * CHUNK_SIZE / len(CDR)
    writer.discard()


def test_killed_at_any_moment_it_leaves_all_that_was_flushed(tmp_path):
    """A process that writes and flushes without end, killed: what it said it had flushed is there."""
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(os.path.dirname(__file__))!r})
        from test_writer import CDR, START, opened
        writer, i = opened(sys.argv[1]), 0
        while True:
            for _ in range(100):
                writer.write('/j', CDR, START + i, START + i)
                i += 1
            writer.flush()
            print(i, flush=True)
        """)
    process = subprocess.Popen([sys.executable, '-c', script, str(tmp_path / 'bag')], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    flushed = int(process.communicate()[0].split()[-1])
    stamps, metadata = salvaged(tmp_path / 'bag.part/bag_0.mcap')
    assert stamps == list(range(len(stamps))) and len(stamps) >= flushed > 1000
    assert metadata == {ABOUT: ABOUT_IT}


@pytest.fixture
def small_files():
    """Files of this process may grow to `size` more bytes: what a full disk does, at any byte one likes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize('room', [0, 1, 5_000, 300_000])
def test_a_disk_that_refuses_keeps_whole_records_and_forgets_nothing(tmp_path, small_files, room):
    writer = opened(tmp_path / 'bag', 100)
    writer.flush()
    file = writer.part / 'bag_0.mcap'
    before = file.stat().st_size
    small_files(before + room)
    written = 100
    with pytest.raises(OSError) as refused:
        while True:
            written += 1
            writer.write('/j', CDR, START + written - 1, START + written - 1)
    assert refused.value.errno == errno.EFBIG
    with pytest.raises(OSError):
        writer.flush()
    assert file.stat().st_size == before and salvaged(file)[0] == list(range(100)), 'no half record'
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])  # as when the reserve is given back
    path = writer.close({'interrupted': 'true'})
    with AnyReader([path]) as reader:
        assert [stamp - START for _, stamp, _ in reader.messages()] == list(range(written))


def test_the_reserve_is_held_while_recording_only(tmp_path):
    writer = opened(tmp_path / 'bag', 1)
    reserve = writer.part / 'reserve'
    assert reserve.stat().st_size == RESERVE and reserve.stat().st_blocks * 512 >= RESERVE, 'really allocated'
    assert sorted(os.listdir(writer.close())) == ['bag_0.mcap', 'metadata.yaml']


def test_without_room_for_the_reserve_nothing_is_left(tmp_path, small_files):
    small_files(RESERVE - 1)
    with pytest.raises(BagError, match=f'^E305 {tmp_path}/bag: cannot be written: File too large$'):
        opened(tmp_path / 'bag')
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_taken(tmp_path):
    writer = opened(tmp_path / 'bag')
    with pytest.raises(BagError, match='E301 .*bag.part: exists already'):
        opened(tmp_path / 'bag')
    writer.close()
    with pytest.raises(BagError, match='E301 .*bag: exists already'):
        opened(tmp_path / 'bag')
