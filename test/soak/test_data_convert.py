"""The converter at full size: how fast, in how much memory, and killed at any moment."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter

from il_policies.bags.reader import Bag
from il_policies.contract import Contract, Stream
from il_policies.data.store import Dataset
from recordings import MS, START, TYPES, compressed, contract, header, joint_state, point, positions

MINUTES = float(os.environ.get('IL_SOAK_MINUTES', 2))
CAMERAS = ('left', 'right', 'wrist', 'base')
"""Two of 640×480 JPEG, two of raw 320×240, all at 30 Hz."""


def robot(cameras: tuple[str, ...] = CAMERAS) -> Contract:
    """A policy at 30 Hz that sees images of 320×240."""
    plain = contract(camera_rate=None, fps=30.0)
    streams = {name: Stream(topic=f'{name}/image', type=f'sensor_msgs/msg/{"CompressedImage" if i < 2 else "Image"}', rate=30.0,
                            max_age=0.1, image_size=(240, 320)) for i, name in enumerate(CAMERAS)}
    return replace(plain, observations={**plain.observations, **{name: streams[name] for name in cameras}})


def scene(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Shapes and the noise of a sensor: as a JPEG about as large as a camera's."""
    image = cv2.resize(random.integers(0, 255, (6, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + random.normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def large_bag(path: Path, seconds: float) -> Path:
    """A bag of four cameras, joints at 100 Hz, commands at 50 and a goal at 10; 18 MB a second."""
    generator = np.random.default_rng(0)
    large = [cv2.imencode('.jpg', scene(generator, 480, 640), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes() for _ in range(20)]
    small = [scene(generator, 240, 320).reshape(-1) for _ in range(20)]
    raw = TYPES.types['sensor_msgs/msg/Image']
    path.mkdir(parents=True)
    with open(path / f'{path.name}_0.mcap', 'wb') as stream:
        writer = McapWriter(stream, chunk_size=1 << 20, compression=CompressionType.NONE)
        writer.start(profile='ros2', library='test')
        channels = {}

        def write(topic: str, t: float, message) -> None:
            kind = message.__msgtype__
            if topic not in channels:
                schema = writer.register_schema(kind, 'ros2msg', TYPES.generate_msgdef(kind, ros_version=2)[0].encode())
                channels[topic] = writer.register_channel(f'/{topic}', 'cdr', schema)
            writer.add_message(channels[topic], START + round(t * 1e9) + 2 * MS, TYPES.serialize_cdr(message, kind),
                               START + round(t * 1e9))

        for i in range(round(seconds * 100)):
            t = i / 100
            stamp = START + i * 10 * MS
            write('joint_states', t, joint_state(stamp, ['a', 'b'], positions(t)))
            if i % 2 == 0:
                write('command', t, joint_state(stamp, ['a', 'b'], positions(t + 0.1)))
            if i % 10 == 0:
                write('goal', t, point(stamp, 0.25, 0.1))
            for k in range(-(-i * 30 // 100), -(-(i + 1) * 30 // 100)):
                for c, name in enumerate(CAMERAS):
                    stamp = START + round(k * 1e9 / 30)
                    write(f'{name}/image', k / 30, compressed(stamp, large[(k + c) % 20]) if c < 2 else
                          raw(header(stamp), 240, 320, 'rgb8', 0, 960, small[(k + c) % 20]))
        writer.finish()
    return path


MEASURED = '''
import json, re, sys, time
from pathlib import Path
from il_policies.contract import Contract, from_dict
from il_policies.data.convert import convert
from il_policies.data.convert_bag import Options
bag, out, contract, images = sys.argv[1:]
contract = from_dict(Contract, json.loads(contract), 'argument')
began, used = time.monotonic(), time.process_time()
(report,) = convert(bag, contract, out, Options(images=images))
wall, cpu = time.monotonic() - began, time.process_time() - used
assert not report.refused, report.refused
# Not getrusage: its maximum includes the process that this one was forked from.
peak = int(re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1])
print(json.dumps([report.details['rows'], wall, cpu, peak / 1024]))
'''


def measured(bag: Path, out: Path, contract: Contract, images: str = 'jpeg95') -> tuple[int, float, float, float]:
    """Convert in a process of its own: rows, wall time [s], CPU time [s], largest resident set [MiB]."""
    result = subprocess.run([sys.executable, '-c', MEASURED, bag, out, json.dumps(contract.to_dict()), images],
                            capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(out)
    return tuple(json.loads(result.stdout))


@pytest.fixture(scope='module')
def minute(tmp_path_factory) -> tuple[Path, float]:
    """A bag of a minute, or of less where the machine has less time for us; and its length [s]."""
    seconds = 60.0 * min(MINUTES / 2, 1.0)
    return large_bag(tmp_path_factory.mktemp('bags') / 'minute', seconds), seconds


def least(bag: Path, images: str, cameras: tuple[str, ...]) -> float:
    """CPU time [s] without which it cannot be done.

    Every byte read and checked in two passes (one without cameras), images decoded, resized and encoded, on one core. Measured
    now: it is longer where others use the machine's caches.
    """
    reader = Bag(bag)
    began = time.process_time()
    for _ in range(2 if cameras else 1):
        for path in bag.glob('*.mcap'):
            with open(path, 'rb', buffering=0) as stream:
                while data := stream.read(1 << 20):
                    zlib.crc32(data)
    for topic, data, *_ in reader.raw([f'/{name}/image' for name in cameras]):
        message = reader.deserialize(topic, data)
        if hasattr(message, 'encoding'):
            cv2.imencode('.jpg', message.data.reshape(240, 320, 3), [cv2.IMWRITE_JPEG_QUALITY, 95])
        elif images == 'jpeg95':
            image = cv2.resize(cv2.imdecode(message.data, cv2.IMREAD_COLOR), (320, 240), interpolation=cv2.INTER_AREA)
            cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return time.process_time() - began


@pytest.mark.parametrize('images, cameras, factor', [('jpeg95', CAMERAS, 1.7), ('passthrough', CAMERAS, 2.5),
                                                     ('jpeg95', (), 2.5)], ids=['jpeg95', 'passthrough', 'lowdim'])
def test_speed(minute, tmp_path, images, cameras, factor):
    """Not much more than what cannot be avoided. How fast that is in multiples of real time is printed."""
    bag, seconds = minute
    cv2.setNumThreads(1)
    rows, wall, cpu, _ = measured(bag, tmp_path / 'out', robot(cameras), images)
    unavoidable = least(bag, images, cameras)
    assert rows >= 30 * seconds - 5
    print(f'{images}, {len(cameras)} cameras: {seconds:g} s in {wall:.2f} s ({seconds / wall:.1f} x), {cpu:.2f} s of CPU time '
          f'({2 * seconds / cpu:.1f} x on two cores), {unavoidable:.2f} s unavoidable')
    assert cpu <= factor * unavoidable + 0.5 + seconds / 100


def test_memory_does_not_grow_with_the_bag(minute, tmp_path):
    bag, seconds = minute
    longer = large_bag(tmp_path / 'longer', 3 * seconds)
    *_, small = measured(bag, tmp_path / 'out', robot(), 'passthrough')
    *_, large = measured(longer, tmp_path / 'out', robot(), 'passthrough')
    minutes = 2 * seconds / 60
    print(f'{small:.0f} MiB for {seconds:g} s, {large:.0f} MiB for {3 * seconds:g} s')
    # 4 MiB: by which two runs on the same bag differ
    assert large <= 200 and large - small <= minutes + 4


def children(process: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for task in Path(f'/proc/{process}/task').iterdir() for child in (task / 'children').read_text().split()]


def complete(out: Path) -> int:
    """How many episodes the dataset has, each of them whole."""
    if not (out / 'dataset.json').exists():
        return 0
    dataset = Dataset(out)
    for i, episode in enumerate(dataset.episodes):
        assert len(dataset.lowdim(i)['stamp']) == episode['length'] and dataset.report(i)['verdict']
        for name in dataset.info.images:
            assert dataset.image(i, name, episode['length'] - 1).any()
    return len(dataset)


@pytest.mark.timeout(120 + 120 * MINUTES)
@pytest.mark.parametrize('victim', ['all', 'worker'])
def test_killed_at_any_moment(tmp_path, victim):
    """SIGKILL: no episode is half there, and in the end the dataset is that of a run nobody disturbed."""
    for i in range(6):
        large_bag(tmp_path / f'bags/bag_{i}', 1.0 + i % 3 + 0.2 * (i // 3))  # copies would be refused
    (tmp_path / 'robot.json').write_text(json.dumps(robot().to_dict()))

    def command(out: Path) -> list[str]:
        arguments = [tmp_path / 'bags', '--contract', tmp_path / 'robot.json', '--out', out, '--jobs', 2]
        return [sys.executable, '-m', 'il_policies.cli', 'convert', *map(str, arguments)]

    began = time.monotonic()
    subprocess.run(command(tmp_path / 'undisturbed'), check=True)
    took = time.monotonic() - began

    def check() -> None:
        assert complete(out) == 6 and Dataset(out).hash == Dataset(tmp_path / 'undisturbed').hash

    out, moments = tmp_path / 'out', np.random.default_rng(os.getpid())
    kills = max(round(5 * MINUTES), 3) if victim == 'all' else 1
    for _ in range(kills):
        process = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
        time.sleep(moments.uniform(0.2, 0.8) * took if victim == 'all' else 0.5 * took)
        workers = children(process.pid) if process.poll() is None else []
        if victim == 'all':
            process.kill()
            process.communicate()
            deadline = time.monotonic() + 5
            while any(Path(f'/proc/{worker}').exists() for worker in workers) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not any(Path(f'/proc/{worker}').exists() for worker in workers), 'no worker outlives it'
        else:
            workers = [worker for worker in workers if b'spawn_main' in Path(f'/proc/{worker}/cmdline').read_bytes()]
            os.kill(workers[0], signal.SIGKILL)
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 1, stderr
            assert len(re.findall('refused: .*its process ended with exit code -9', stderr)) == 1, stderr
        if complete(out) == 6:
            check()
            shutil.rmtree(out)  # from here on there would be nothing to disturb
    subprocess.run(command(out), check=True)
    check()
    assert sorted(path.name for path in out.iterdir()) == ['dataset.json', 'episodes']
