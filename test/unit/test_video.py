from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from il_policies.data.errors import DataError
from il_policies.exchange.video import VideoReader, VideoWriter, encode, frame_rate


def grey(value: int, size=(16, 24)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


@pytest.mark.parametrize('codec', ['h264', 'av1'])
@pytest.mark.parametrize('fps', [10, 29.97, 50 / 3])
def test_joined_clips_keep_every_frame_in_its_place(codec, fps, tmp_path):
    """Three clips of 3, 1 and 8 frames; frame n is grey of value 20·n, and shown at n / fps exactly."""
    file, rate, n = tmp_path / 'a' / 'v.mp4', frame_rate(fps), 0
    writer = VideoWriter(file, rate)
    for length in (3, 1, 8):
        assert writer.frames == n
        writer.append(encode((grey(20 * (n + k)) for k in range(length)), rate, codec))
        n += length
    writer.close()
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.codec.canonical_name == codec
        assert stream.duration * stream.time_base == n / rate, 'LeRobot joins datasets by the duration of their files'
        for i, frame in enumerate(frames):
            assert frame.pts * stream.time_base == i / rate
            np.testing.assert_allclose(frame.to_ndarray(format='rgb24'), 20 * i, atol=3)
    assert len(frames) == n and float(rate) == fps
    keys = [i for i, frame in enumerate(frames) if frame.key_frame]
    assert {0, 3, 4} <= set(keys) and max(np.diff([*keys, n])) <= 2, 'each clip begins with a key frame, every second is one'


@pytest.mark.parametrize('codec, size', [('h264', (17, 24)), ('h264', (8, 8)), ('av1', (17, 25)), ('av1', (8, 8))])
def test_sizes_and_colours(codec, size):
    colours = np.zeros((4, *size, 3), np.uint8)
    for i, colour in enumerate([(220, 20, 30), (20, 200, 40), (30, 20, 210), (200, 200, 20)]):
        colours[i] = colour
    with av.open(io.BytesIO(encode(colours, Fraction(10), codec))) as container:
        decoded = [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
    np.testing.assert_allclose(decoded, colours, atol=6)


def test_quality_is_a_choice():
    noise = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    for codec in ('h264', 'av1'):
        good, poor = (len(encode(noise, Fraction(10), codec, crf)) for crf in (5, 45))
        assert poor < 0.5 * good


def test_reading_by_time(tmp_path):
    for name, offset in (('a', 0), ('b', 100)):
        writer = VideoWriter(tmp_path / f'{name}.mp4', Fraction(10))
        writer.append(encode((grey(offset + 10 * k) for k in range(9)), Fraction(10), 'h264'))
        writer.close()
    reader = VideoReader()

    def values(name, *times):
        return [int(round(image.mean() / 10)) for image in reader.frames(tmp_path / f'{name}.mp4', times, 0.025)]

    assert values('a', 0.0, 0.1, 0.21, 0.8) == [0, 1, 2, 8]
    assert values('a', 0.7, 0.3, 0.3, 0.0) == [7, 3, 3, 0]
    assert values('b', 0.4) == [14]
    with pytest.raises(DataError, match=r'b.mp4: no frame at 0.650000 s; the next is at 0.700000 s'):
        values('b', 0.5, 0.65)
    with pytest.raises(DataError, match='a.mp4: ends before the frame at 0.900000 s'):
        values('a', 0.9)
    with pytest.raises(DataError, match='c.mp4: not readable as video'):
        values('c', 0.0)
    (tmp_path / 'c.mp4').write_bytes((tmp_path / 'a.mp4').read_bytes()[:300])
    with pytest.raises(DataError, match='c.mp4: not readable as video'):
        values('c', 0.0)
    assert values('a', 0.2) == [2], 'an error leaves the reader usable'
    reader.close()
