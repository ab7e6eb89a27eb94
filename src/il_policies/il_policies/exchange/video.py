"""Videos in which every frame has an exact place: frame n is shown at n / rate, however many clips were joined before it.

Times that are sums of durations drift away from the frames they mean; here a clip's frames are counted.
"""
from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np

from il_policies.data.errors import DataError

ENCODERS = {
    # Without B-frames packets come in the order of their frames, so joining clips is counting.
    'h264': ('libx264', 18, {'preset': 'veryfast', 'bf': '0'}),
    'av1': ('libsvtav1', 30, {'preset': '10', 'svtav1-params': 'lp=1'}),
}
"""Codec → encoder, default constant rate factor, options."""
KEYFRAME_INTERVAL = 2
"""Training reads frames in any order: every second one can be decoded alone."""
BT601, LIMITED = 6, 1
"""How RGB becomes YUV, written into the stream so that no player has to guess."""


def frame_rate(fps: float) -> Fraction:
    """A rate [Hz] as a fraction that a video can hold: 29.97 → 2997/100, 16.666… → 50/3."""
    return Fraction(fps).limit_denominator(10_000)


def encode(frames: Iterable[np.ndarray], rate: Fraction, codec: str, crf: int | None = None) -> bytes:
    """A clip of frames (h, w, 3) uint8 RGB as mp4 file, encoded by one thread. crf: None for the codec's own."""
    os.environ.setdefault('SVT_LOG', '1')  # errors only: SVT-AV1 prints its settings for every clip
    name, default, options = ENCODERS[codec]
    clip = io.BytesIO()
    with av.open(clip, 'w', format='mp4') as container:
        stream = container.add_stream(name, rate=rate, options={
            **options, 'crf': str(default if crf is None else crf), 'g': str(KEYFRAME_INTERVAL)})
        stream.thread_count = 1  # clips are encoded in parallel
        for number, image in enumerate(frames):
            if number == 0:
                stream.height, stream.width = image.shape[:2]
                # x264 halves the colour planes of even sizes only.
                stream.pix_fmt = 'yuv444p' if codec == 'h264' and (image.shape[0] | image.shape[1]) % 2 else 'yuv420p'
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = BT601
                context.color_range = LIMITED
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
        container.mux(stream.encode())
    return clip.getvalue()


class VideoWriter:
    """One mp4 file of clips of the same kind, joined without encoding them again."""

    def __init__(self, file: Path, rate: Fraction):
        """file: made, with its folder."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._rate = rate
        # The index goes to the front, for readers that stream.
        self._container = av.open(str(file), 'w', options={'movflags': 'faststart'})
        self._stream = None
        self.frames = 0
        """Frames written so far: the place of the next clip's first."""
        self.size = 0
        """Bytes of the clips written so far."""
        self.pix_fmt = ''
        """Pixel format of the clips."""

    def append(self, clip: bytes) -> None:
        """Add a clip of `encode`."""
        with av.open(io.BytesIO(clip)) as source:
            video = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(video, opaque=True)
                self.pix_fmt = video.pix_fmt
            for packet in source.demux(video):
                if packet.dts is None:  # the end
                    continue
                packet.stream = self._stream
                packet.time_base = 1 / self._rate
                packet.pts = packet.dts = self.frames
                packet.duration = 1
                self._container.mux(packet)
                self.frames += 1
        self.size += len(clip)

    def close(self) -> None:
        """Finish the file."""
        self._container.close()


class VideoReader:
    """Frames by their times, from one file after the other; quickest when times rise."""

    def __init__(self):
        """Nothing is open yet."""
        self._file: Path | None = None
        self._container = self._decoder = self._frame = None

    def frames(self, file: Path, times: Sequence[float], tolerance: float) -> Iterator[np.ndarray]:
        """The frame at each time [s], (h, w, 3) uint8 RGB.

        tolerance: a frame may be shown at most this far from its time [s], less than half of the time between frames.
        Raises DataError if the file cannot be read or has no frame there.
        """
        for time in times:
            try:
                if file != self._file or self._frame is None or time < self._frame.time - tolerance:
                    self._open(file, time)
                while self._frame is None or self._frame.time < time - tolerance:
                    self._frame = next(self._decoder, None)
                    if self._frame is None:
                        raise DataError(f'{file}: ends before the frame at {time:.6f} s', 'E403')
            except (OSError, IndexError, av.error.FFmpegError) as error:
                raise DataError(f'{file}: not readable as video: {error}', 'E403') from None
            if abs(self._frame.time - time) > tolerance:
                raise DataError(f'{file}: no frame at {time:.6f} s; the next is at {self._frame.time:.6f} s', 'E403')
            yield self._frame.to_ndarray(format='rgb24')

    def close(self) -> None:
        """Close the file that is open."""
        if self._container is not None:
            self._container.close()
        self._file = self._container = self._frame = None

    def _open(self, file: Path, time: float) -> None:
        """Stand before the frame at this time."""
        if file != self._file:
            self.close()
            self._container, self._file = av.open(str(file), format='mp4'), file  # a playlist names files
            self._container.streams.video[0].thread_type = 'AUTO'
        stream = self._container.streams.video[0]
        self._container.seek(max(0, round(time / stream.time_base)), stream=stream)
        self._decoder = self._container.decode(stream)
        self._frame = None
