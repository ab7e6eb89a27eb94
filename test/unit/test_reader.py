"""Bags of every kind against the messages they were written from; what is damaged within a file stands in its own tests."""
from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from bags import Entry, compress, definition, entries, write_mcap, write_metadata, write_splits, write_sqlite
from il_policies.bags.reader import Bag, find_bags
from il_policies.bags.writer import ABOUT, BagWriter
from il_policies.data.errors import BagError
from recordings import CONTAINERS, MS, START, TYPES, joint_state, recording, write_as, write_bag

ENTRIES = entries()
JOINT_STATE = 'sensor_msgs/msg/JointState'


def recorded(bag: Bag, topics=None) -> list[tuple[str, int, bytes]]:
    return [(raw.topic, raw.receive_ns, raw.data) for raw in bag.raw(topics)]


def expected(messages=ENTRIES) -> list[tuple[str, int, bytes]]:
    return [(entry.topic, entry.receive_ns, entry.data) for entry in messages]


def write(kind: str, path: Path) -> Path:
    """The entries as one kind of bag."""
    if kind in CONTAINERS:
        return write_as(kind, path / 'bag', recording(1.0))
    if kind == 'own writer':
        return write_bag(path / 'bag', recording(1.0))
    if kind == 'humble':
        return write_sqlite(path / 'bag_0.db3', ENTRIES)
    options = {'no checksums': {'crc': False}, 'no index': {'index': False}, 'no summary': {'summary': False},
               'no chunks': {'chunks': False}, 'fastwrite': {'chunks': False, 'crc': False, 'index': False, 'summary': False},
               'lz4 without index': {'compression': 'LZ4', 'index': False, 'summary': False},
               'one chunk': {'chunk_size': 1 << 20}, 'a chunk a message': {'chunk_size': 1}, 'packed': {}}[kind]
    file = write_mcap(path / 'bag.mcap', ENTRIES, **options)
    return compress(file) if kind == 'packed' else file


OTHERS = ('own writer', 'humble', 'no checksums', 'no index', 'no summary', 'no chunks', 'fastwrite', 'lz4 without index',
          'one chunk', 'a chunk a message', 'packed')
KEEP_PUBLISH_STAMPS = {'mcap', 'mcap lz4', 'mcap zstd', 'splits', *OTHERS} - {'humble'}


@pytest.mark.parametrize('kind', [*CONTAINERS, *OTHERS])
def test_every_container_gives_the_same(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    path = write(kind, tmp_path)
    for salvage in (False, True):
        bag = Bag(path, salvage=salvage)
        # Files that overlap in time leave open which of equal stamps was first.
        order = sorted if kind == 'splits' else list
        assert order(recorded(bag)) == order(expected())
        assert bag.topics == {entry.topic: entry.type for entry in sorted(ENTRIES)} and bag.damage == ()
        wanted = ['/goal', '/camera/compressed']
        assert order(recorded(bag, wanted)) == order(entry for entry in expected() if entry[0] in wanted)
    if kind in KEEP_PUBLISH_STAMPS:
        assert sorted(raw.publish_ns for raw in bag.raw()) == sorted(entry.publish_ns for entry in ENTRIES)
    elif 'db3' in kind or kind == 'humble':
        assert {raw.publish_ns for raw in bag.raw()} == {None}
    for message, raw in zip(bag.messages(), bag.raw(), strict=True):
        assert message[:4] == (raw.topic, bag.topics[raw.topic], raw.receive_ns, raw.publish_ns)
        assert bytes(TYPES.serialize_cdr(message.message, message.type)) == raw.data
    assert not list(tmp_path.glob('il_bag_*'))
    assert bag.name == ('bag_0' if kind == 'humble' else 'bag')


def test_splits_are_merged_whatever_their_order(tmp_path):
    """Also where they tie: all messages come at one of two stamps. bag_10 is after bag_9."""
    coarse = [entry._replace(receive_ns=START + (i > 80)) for i, entry in enumerate(ENTRIES)]
    rng = np.random.default_rng(1)
    fingerprints = []
    for i, messages in enumerate((ENTRIES, coarse)):
        for k in range(3):
            bag = Bag(write_splits(tmp_path / f'{i}{k}' / 'bag', messages, rng.permutation(12)))
            assert recorded(bag) == expected(messages)
            fingerprints.append(json.dumps(bag.fingerprint))
    assert len(set(fingerprints)) == 2
    (tmp_path / '00/bag/metadata.yaml').unlink()
    assert recorded(Bag(tmp_path / '00/bag')) == expected()


@pytest.mark.parametrize('changes', [
    {},  # QoS and type hashes that are not those in the file, which has none
    {'storage_identifier': ''},
    {'storage_identifier': 'sqlite3', 'compression_mode': 'FILE', 'compression_format': 'lz4'},
    {'version': 3, 'relative_file_paths': ['bag/bag_0.mcap'], 'custom_data': None},
    {'ros_distro': None, 'message_count': 10**9, 'starting_time': None},
])
def test_odd_metadata(tmp_path, changes):
    write_mcap(tmp_path / 'bag/bag_0.mcap', ENTRIES)
    write_metadata(tmp_path / 'bag', ENTRIES, ['bag_0.mcap'], **changes)
    bag = Bag(tmp_path / 'bag')
    assert recorded(bag) == expected() and bag.about == {} and bag.contract is None
    assert len(list(bag.messages())) == len(ENTRIES)


def test_metadata_that_is_none(tmp_path):
    write_mcap(tmp_path / 'bag/bag_0.mcap', ENTRIES)
    file = tmp_path / 'bag/metadata.yaml'
    for text in ('', '{', 'a: 1', 'rosbag2_bagfile_information: []', 'rosbag2_bagfile_information: {relative_file_paths: 3}'):
        file.write_text(text)
        with pytest.raises(BagError, match='E102 .*metadata.yaml: (not readable|no metadata of rosbag2)'):
            Bag(tmp_path / 'bag')
        bag = Bag(tmp_path / 'bag', salvage=True)
        assert recorded(bag) == expected() and 'metadata.yaml' in bag.damage[0]


def test_less_than_metadata_promises_is_no_whole_bag(tmp_path):
    """As when a file was lost, or exchanged for an older one."""
    folder = write_splits(tmp_path / 'bag', ENTRIES, range(3))
    (folder / 'bag_1.mcap').unlink()
    third = len(ENTRIES) // 3
    left = ENTRIES[:third] + ENTRIES[2 * len(ENTRIES) // 3:]
    with pytest.raises(BagError, match=f'E101 .*bag_1.mcap: No such file or directory; {len(left)} messages, 1.0 s are usable: '
                                       'rerun with --salvage'):
        Bag(folder)
    bag = Bag(folder, salvage=True)
    assert recorded(bag) == expected(left) and any('bag_1.mcap: nothing usable' in text for text in bag.damage)
    write_mcap(folder / 'bag_1.mcap', ENTRIES[third:third + 10])
    with pytest.raises(BagError, match=r'E101 .*missing by metadata.yaml: \d+ of 100 messages on /j.*; .* rerun with --salvage'):
        Bag(folder)
    write_metadata(folder, ENTRIES[:50], [f'bag_{i}.mcap' for i in range(3)])  # more than promised is all there is
    assert len(recorded(Bag(folder))) == len(left) + 10


def test_one_bad_split(tmp_path):
    folder = write_splits(tmp_path / 'bag', ENTRIES, (2, 0, 1))
    file = folder / 'bag_1.mcap'
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BagError, match='E101 .*bag_1.mcap: no end mark'):
        Bag(folder)
    bag = Bag(folder, salvage=True)
    third = len(ENTRIES) // 3
    got = recorded(bag)
    assert got[:third] == expected(ENTRIES[:third]) and got[-third:] == expected(ENTRIES[-third:])
    assert 2 * third < len(got) <= len(ENTRIES) and set(got) <= set(expected())
    assert len(bag.damage) >= 1 and bag.damage[0].startswith('bag_1.mcap: ')
    file.write_bytes(b'')
    with pytest.raises(BagError, match='E101 .*bag_1.mcap: it is empty'):
        Bag(folder)
    assert len(recorded(Bag(folder, salvage=True))) == len(ENTRIES) - (2 * len(ENTRIES) // 3 - third)


def test_what_it_is_about(tmp_path):
    note = {'robot': 'two', 'task': 'reach', 'contract': json.dumps({'robot': 'two', 'joints': [1, 2]})}
    writer = BagWriter(tmp_path / 'bag', TYPES, note)
    writer.add_topic('/j', JOINT_STATE)
    writer.write('/j', TYPES.serialize_cdr(joint_state(START, ['a'], [1]), JOINT_STATE), START, START)
    writer.add_topic('/silent', JOINT_STATE)
    path = writer.close({'success': 'true'})
    whole = Bag(path)
    assert whole.about == {'robot': 'two', 'task': 'reach', 'success': 'true'} and whole.topics['/silent'] == JOINT_STATE
    assert whole.contract == {'robot': 'two', 'joints': [1, 2]}
    (path / 'metadata.yaml').unlink()  # rosbag2 and we keep a copy of it in the file
    single = Bag(path / 'bag_0.mcap')
    assert single.about == Bag(path).about == whole.about and single.contract == whole.contract
    # A recorder that was killed wrote only what stands at the beginning.
    killed = write_mcap(tmp_path / 'k.part/k_0.mcap', ENTRIES, notes={ABOUT: note})
    killed.write_bytes(killed.read_bytes()[:20_000])
    with pytest.raises(BagError, match='E101 .*k_0.mcap: no end mark at byte 20000: cut off, damaged or still being recorded'):
        Bag(tmp_path / 'k.part')
    part = Bag(tmp_path / 'k.part', salvage=True)
    assert (part.name, part.about) == ('k', {'robot': 'two', 'task': 'reach'}) and part.contract == whole.contract
    assert 50 < len(recorded(part)) < len(ENTRIES) and part.damage
    bad = write_mcap(tmp_path / 'bad.mcap', ENTRIES, notes={ABOUT: {'contract': '{'}})
    with pytest.raises(BagError, match='E102 .*the contract in it is unreadable; pass --contract'):
        _ = Bag(bad).contract


def test_find_bags(tmp_path):
    for name in ('demo_10', 'demo_2', 'sub/demo_1'):  # with metadata.yaml, with files of its name, cut short
        write_mcap(tmp_path / name / f'{Path(name).name}_0.mcap', ENTRIES[:3])
    write_metadata(tmp_path / 'demo_2', ENTRIES[:3], ['demo_2_0.mcap'])
    write_mcap(tmp_path / 'demo_10/demo_10_1.mcap', ENTRIES[3:6])
    write_mcap(tmp_path / 'demo_3.part/demo_3_0.mcap', ENTRIES[:3])
    compress(write_sqlite(tmp_path / 'files/b.db3', ENTRIES[:3]))
    write_mcap(tmp_path / 'files/a_0.mcap', ENTRIES[:3])
    write_mcap(tmp_path / 'files/a_1.mcap', ENTRIES[:3])
    (tmp_path / 'files/readme.txt').touch()

    def names(path, salvage=False):
        return [str(bag.relative_to(tmp_path)) for bag in find_bags(path, salvage)]

    whole = ['demo_2', 'demo_10', 'files/a_0.mcap', 'files/a_1.mcap', 'files/b.db3.zstd', 'sub/demo_1']
    assert names(tmp_path) == whole
    assert names(tmp_path, salvage=True) == [*whole[:1], 'demo_3.part', *whole[1:]]
    assert names(tmp_path / 'demo_10') == ['demo_10'] and len(recorded(Bag(tmp_path / 'demo_10'))) == 6
    assert names(tmp_path / 'files/b.db3.zstd') == ['files/b.db3.zstd']
    assert names(tmp_path / 'demo_3.part', salvage=True) == ['demo_3.part']
    with pytest.raises(BagError, match='E101 .*only bags that were cut short: demo_3.part; rerun with --salvage'):
        find_bags(tmp_path / 'demo_3.part')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(BagError, match='E102 .*empty: no bag here; a bag is a folder with metadata.yaml or'):
        find_bags(tmp_path / 'empty')
    with pytest.raises(BagError, match='E102 .*absent: no such file or folder'):
        find_bags(tmp_path / 'absent')


def test_find_bags_behind_links(tmp_path):
    here, disk = tmp_path / 'here', tmp_path / 'disk'
    for folder in (here / 'demo_2', disk / 'demo_1', disk / 'more/demo_3'):
        write_mcap(folder / f'{folder.name}_0.mcap', ENTRIES[:3])
    write_metadata(disk / 'demo_1', ENTRIES[:3], ['demo_1_0.mcap'])
    (here / 'a_latest').symlink_to('demo_2')  # known by its own name
    (here / 'demo_1').symlink_to(disk / 'demo_1')
    (here / 'more').symlink_to(disk / 'more')
    (here / 'again').symlink_to(here)
    (disk / 'more/back').symlink_to(here)
    (here / 'loop').symlink_to('loop')
    (here / 'nowhere').symlink_to(tmp_path / 'absent')
    assert find_bags(here) == [here / 'demo_1', here / 'demo_2', here / 'more/demo_3']
    assert len(recorded(Bag(here / 'demo_1'))) == 3
    (tmp_path / 'link').symlink_to(here)
    assert find_bags(tmp_path / 'link')[0] == tmp_path / 'link/demo_1'


def test_what_is_no_bag(tmp_path):
    (tmp_path / 'notes.txt').write_text('hello')
    (tmp_path / 'one.bag').write_bytes(b'#ROSBAG V2.0\n' + bytes(100))
    (tmp_path / 'text.mcap').write_text('hello')
    (tmp_path / 'folder').mkdir()
    for name, words in (('notes.txt', 'E102 .*no bag: neither MCAP nor SQLite'), ('absent', 'E102 .*no such file'),
                        ('one.bag', 'E103 .*one.bag: a bag of ROS 1; convert it'), ('folder', 'E102 .*no metadata.yaml, no .mca'),
                        ('text.mcap', 'E101 .*it does not begin as MCAP or SQLite do; nothing in it is usable')):
        with pytest.raises(BagError, match=words):
            Bag(tmp_path / name)
    with pytest.raises(BagError, match='E101 .*nothing in it can be read: text.mcap: nothing usable'):
        Bag(tmp_path / 'text.mcap', salvage=True)
    if os.getuid():
        (tmp_path / 'text.mcap').chmod(0)
        with pytest.raises(BagError, match='E101 .*Permission denied'):
            Bag(tmp_path / 'text.mcap')


def test_topics_that_are_not_there_or_ambiguous(tmp_path):
    bag = Bag(write_mcap(tmp_path / 'a.mcap', ENTRIES))
    with pytest.raises(BagError, match='E201 .*no topic /nope; there are: /camera/compressed, /command, /goal, /joint_states'):
        bag.raw(['/goal', '/nope'])
    assert recorded(bag, []) == []
    write_mcap(tmp_path / 'two/two_0.mcap', ENTRIES)
    write_mcap(tmp_path / 'two/two_1.mcap', [entry._replace(topic='/goal') for entry in ENTRIES if entry.topic == '/command'])
    two = Bag(tmp_path / 'two')
    assert len(recorded(two, ['/command'])) == 50
    with pytest.raises(BagError, match='E201 .*/goal was recorded as geometry_msgs/msg/PointStamped and as sensor_msgs/msg/Joi'):
        two.raw(['/goal'])


@pytest.mark.parametrize('schema', ['unknown', '', 'jsonschema'])
def test_topics_without_definition_do_not_spoil_the_others(tmp_path, schema):
    """rosbag2 writes both words where a type's package was not installed."""
    own = [Entry('/own', 'robot_msgs/msg/State', START, START, b'\0\1\0\0' + bytes([7, 0, 0, 0]))]
    write_mcap(tmp_path / 'bag/bag_0.mcap', ENTRIES)
    file = write_mcap(tmp_path / 'bag/bag_1.mcap', own, schema=schema)
    bag = Bag(tmp_path / 'bag')
    assert len(recorded(bag)) == len(ENTRIES) + 1 and len(list(bag.messages(['/goal']))) == 10
    with pytest.raises(BagError, match='E104 .*bag: /own: the bag does not define robot_msgs/msg/State, robot_msgs is not a stan'
                                       'dard package; pass --msg-path'):
        list(bag.messages())
    (tmp_path / 'robot_msgs/msg').mkdir(parents=True)
    (tmp_path / 'robot_msgs/msg/State.msg').write_text('uint32 mode\n')
    (message,) = Bag(file, msg_paths=[str(tmp_path / 'robot_msgs')]).messages()
    assert message.message.mode == 7
    # What is standard needs no help.
    bag = Bag(write_mcap(tmp_path / 'b.mcap', ENTRIES, schema=schema))
    assert [bytes(TYPES.serialize_cdr(m.message, m.type)) for m in bag.messages()] == [entry.data for entry in ENTRIES]


def test_humble_bags_with_own_types(tmp_path):
    own = [Entry('/own', 'robot_msgs/msg/State', START, START, b'\0\1\0\0' + bytes([7, 0, 0, 0]))]
    (tmp_path / 'robot_msgs/msg').mkdir(parents=True)
    (tmp_path / 'robot_msgs/msg/State.msg').write_text('uint32 mode\n')
    file = write_sqlite(tmp_path / 'bag.db3', [*own, *ENTRIES])
    messages = list(Bag(file, [tmp_path]).messages())
    assert messages[0].message.mode == 7 and len(messages) == 1 + len(ENTRIES)


def test_messages_that_are_not_what_they_should_be(tmp_path):
    data = bytearray(TYPES.serialize_cdr(joint_state(START, ['a', 'b'], [1, 2]), JOINT_STATE))
    good = Entry('/j', JOINT_STATE, START, START, bytes(data))
    bag = Bag(write_mcap(tmp_path / 'a.mcap', [good]))
    assert bag.deserialize('/j', good.data).name == ['a', 'b']
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        bad = data.copy()
        if rng.random() < 0.5:
            bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        else:
            del bad[rng.integers(len(bad)):]
        try:
            bag.deserialize('/j', bytes(bad))
        except BagError as error:
            assert error.code == 'E105' and '/j is unreadable as sensor_msgs/msg/JointState' in str(error)
            refused += 1
    assert refused > 100
    foreign = Bag(write_mcap(tmp_path / 'b.mcap', [good], encoding='json'))
    assert recorded(foreign) == expected([good])
    with pytest.raises(BagError, match="E103 .*/j is encoded as 'json'; valid: cdr"):
        list(foreign.messages())


def test_fingerprint(tmp_path):
    """Of the content, not of the place; the same after JSON; another after any change that counts."""
    path = write_bag(tmp_path / 'x/bag', recording(1.0), custom={'success': 'true'})
    first = Bag(path).fingerprint
    assert json.loads(json.dumps(first)) == first == Bag(path, salvage=True).fingerprint
    assert Bag(write_bag(tmp_path / 'y/bag', recording(1.0), custom={'success': 'true'})).fingerprint == first
    information = yaml.safe_load((path / 'metadata.yaml').read_text())
    information['rosbag2_bagfile_information']['custom_data']['success'] = 'false'
    (path / 'metadata.yaml').write_text(yaml.safe_dump(information))
    others = [Bag(path).fingerprint]
    others.append(Bag(write_bag(tmp_path / 'z/other', recording(1.0), custom={'success': 'true'})).fingerprint)
    others.append(Bag(write_bag(tmp_path / 'z/bag', recording(1.01), custom={'success': 'true'})).fingerprint)
    later = [(topic, stamp + MS, message) for topic, stamp, message in recording(1.0)]
    others.append(Bag(write_bag(tmp_path / 'w/bag', later, custom={'success': 'true'})).fingerprint)
    assert len({json.dumps(other) for other in [first, *others]}) == 5


MEMORY = """
import sys
from il_policies.bags.reader import Bag

def peak():
    return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))

for i, path in enumerate(sys.argv[1:]):
    assert sum(1 for _ in Bag(path).raw()) in (1, 200)
    if i % 2 == 0:
        before = peak()
    else:
        print(peak() - before)
"""


def test_memory_is_bounded(tmp_path):
    """40 MB are read within 12 MB more than one message takes; by the system's own count, in a process of its own."""
    data = b'\0\1\0\0' + np.random.default_rng(0).bytes(200_000)
    big = [Entry('/i', 'sensor_msgs/msg/Image', START + i * MS, START, data) for i in range(200)]
    files = []
    for name, messages in (('small', big[:1]), ('big', big)):
        options = {'chunk_size': 512 * 1024, 'crc': False}
        files.append([write_mcap(tmp_path / name / 'a.mcap', messages, **options),
                      write_mcap(tmp_path / name / 'b.mcap', messages, **options, summary=False, index=False),
                      write_mcap(tmp_path / name / 'c.mcap', messages, **options, chunks=False, summary=False),
                      write_sqlite(tmp_path / name / 'd.db3', messages),
                      compress(write_mcap(tmp_path / name / 'e.mcap', messages, **options))])
    pairs = [str(file) for pair in zip(*files) for file in pair]
    grown = subprocess.run([sys.executable, '-c', MEMORY, *pairs], check=True, capture_output=True, text=True).stdout.split()
    assert len(grown) == 5 and max(map(int, grown)) < 12 * 1024, grown  # [KiB]


def test_no_room_to_unpack(tmp_path):
    packed = compress(write_mcap(tmp_path / 'a.mcap', ENTRIES))
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # as a full disk, for files of this process
    try:
        with pytest.raises(BagError, match='E103 .*a.mcap.zstd: cannot be unpacked to .*: File too large; set TMPDIR'):
            Bag(packed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert recorded(Bag(packed)) == expected()


def test_a_file_that_says_it_is_huge_takes_no_memory(tmp_path):
    """Lengths and sizes set to the largest, one by one, of a chunk that is compressed."""
    file = write_mcap(tmp_path / 'a.mcap', ENTRIES, 'ZSTD', summary=False)
    whole = file.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunk = whole.index(b'\x04\0\0\0zstd') - 37
    for place in (chunk + 1, chunk + 9 + 16, chunk + 9 + 28 + 8):  # of the record, of its content, of its data
        for value in (2**64 - 1, 2**63, 2**40, 200 << 20):
            content = bytearray(whole)
            content[place:place + 8] = value.to_bytes(8, 'little')
            file.write_bytes(content)
            with pytest.raises(BagError, match='E101'):
                list(Bag(file).raw())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # [KiB]: 200 MiB were believed


def test_definitions_are_of_the_bag(tmp_path):
    """Not the type of that name that we know: here it has a field less, and so has the message."""
    whole = definition(JOINT_STATE).encode()
    less = whole.replace(b'float64[] effort', b'# nothing else  ')
    data = bytes(TYPES.serialize_cdr(joint_state(START, [], []), JOINT_STATE))[:-4]
    file = write_mcap(tmp_path / 'a.mcap', [Entry('/j', JOINT_STATE, START, START, data)], crc=False)
    with pytest.raises(BagError, match='E105'):
        list(Bag(file).messages())
    file.write_bytes(file.read_bytes().replace(whole, less))
    (message,) = Bag(file).messages()
    assert message.message.velocity.tolist() == [] and not hasattr(message.message, 'effort')
