"""From a message to a sample of a contract's stream: the same code for live messages and for those of a bag.

Messages are read by attribute, so rclpy's classes and those deserialised from a bag both do. Values are never scaled by
what else is in the frame: 16-bit images lose their lower byte, depth is in millimetres.
"""
from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Literal, NamedTuple

import cv2
import numpy as np

from il_policies.contract import Stream
from il_policies.data.errors import DataError

JPEG_QUALITY = 95
SOI, EOI = b'\xff\xd8', b'\xff\xd9'
"""First and last bytes of a JPEG file."""


class Layout(NamedTuple):
    """How the pixels of a raw image lie in memory."""

    dtype: str
    """Type of a value, without byte order, which is in the message."""
    channels: int
    """Values per pixel."""
    to_rgb: int | None = None
    """cv2's conversion to RGB; None: is RGB."""
    planar: bool = False
    """True for a brightness plane followed by a colour plane of half its height."""


COLOUR = {
    'rgb8': Layout('u1', 3), 'bgr8': Layout('u1', 3, cv2.COLOR_BGR2RGB),
    'rgba8': Layout('u1', 4, cv2.COLOR_RGBA2RGB), 'bgra8': Layout('u1', 4, cv2.COLOR_BGRA2RGB),
    'mono8': Layout('u1', 1, cv2.COLOR_GRAY2RGB), '8UC1': Layout('u1', 1, cv2.COLOR_GRAY2RGB),
    'rgb16': Layout('u2', 3), 'bgr16': Layout('u2', 3, cv2.COLOR_BGR2RGB),
    'rgba16': Layout('u2', 4, cv2.COLOR_RGBA2RGB), 'bgra16': Layout('u2', 4, cv2.COLOR_BGRA2RGB),
    'mono16': Layout('u2', 1, cv2.COLOR_GRAY2RGB),
    **{f'bayer_{pattern}{bits}': Layout(f'u{bits // 8}', 1, getattr(cv2, f'COLOR_Bayer{pattern.upper()}2RGB'))
       for pattern in ('rggb', 'bggr', 'gbrg', 'grbg') for bits in (8, 16)},
    # By yuv422 sensor_msgs means UYVY; yuv422 and yuv422_yuy2 are the older names.
    'uyvy': Layout('u1', 2, cv2.COLOR_YUV2RGB_UYVY), 'yuv422': Layout('u1', 2, cv2.COLOR_YUV2RGB_UYVY),
    'yuyv': Layout('u1', 2, cv2.COLOR_YUV2RGB_YUYV), 'yuv422_yuy2': Layout('u1', 2, cv2.COLOR_YUV2RGB_YUYV),
    'nv12': Layout('u1', 1, cv2.COLOR_YUV2RGB_NV12, planar=True),
    'nv21': Layout('u1', 1, cv2.COLOR_YUV2RGB_NV21, planar=True),
}
"""Encodings of sensor_msgs/Image that are read as colour."""
DEPTH = {'16UC1': Layout('u2', 1), 'mono16': Layout('u2', 1), '32FC1': Layout('f4', 1)}
"""Encodings that are read as depth: integers in [mm], floats in [m] (REP 118)."""


class DecodeError(DataError):
    """A message that is no sample of its stream."""


class NotFiniteError(DecodeError):
    """A message that holds NaN or infinity."""


Convert = Callable[[object, str], np.ndarray]
"""convert(raw image, encoding): its pixels in that encoding, (h, w) or (h, w, channels). Raises DecodeError."""


def decode(message, stream: Stream, convert: Convert | None = None) -> np.ndarray:
    """The sample in a message: (D,) float64, or in the stream's image size.

    That is (h, w, 3) uint8 RGB or (h, w, 1) uint16 depth [mm], 0 where unknown.

    convert: asked for raw images in encodings that are not read here; the converter of bags has none.
    Raises DecodeError if something is missing, doubled, not finite or not decodable.
    """
    if stream.is_image:
        return resize(_image(message, stream, convert), stream.shape)
    if stream.field:
        values = _joints(message, stream)
    else:
        try:
            values = np.array([_attribute(message, path) for path in stream.fields], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DecodeError(f'{stream.topic}: {list(stream.fields)} must all be single numbers: {error}', 'E203') from None
        except AttributeError as error:
            raise DecodeError(f'{stream.topic}: {error}', 'E203') from None
    if not np.isfinite(values).all():
        names = stream.names or stream.fields
        bad = [f'{name} = {value}' for name, value in zip(names, values, strict=True) if not np.isfinite(value)]
        raise NotFiniteError(f'{stream.topic}: not finite: {", ".join(bad)}', 'E205')
    return values


def encode_frame(message, stream: Stream, images: Literal['jpeg95', 'passthrough'] = 'jpeg95') -> bytes:
    """The image of a message as a file for the episode store.

    jpeg95: a JPEG of quality 95 in the stream's size; one that has this size already is passed on unchanged.
    passthrough: what was recorded, unchanged, whatever its size; raw images, which would be large, as jpeg95.
    Depth: a 16-bit PNG [mm] in the stream's size, always.
    Raises DecodeError if it is no whole image.
    """
    if stream.depth:
        return encode_depth(resize(_image(message, stream), stream.shape))
    if hasattr(message, 'format'):
        data = bytes(message.data)
        # Its header is enough to know that a JPEG is whole and of which size: decoding it takes two hundred times as long.
        size = jpeg_size(data)
        if size is not None and (images == 'passthrough' or size == stream.image_size):
            return data
        if images == 'passthrough':
            _image(message, stream)
            return data
    return encode_jpeg(resize(_image(message, stream), stream.shape))


def encode_jpeg(image: np.ndarray) -> bytes:
    """An image (h, w, 3) uint8 RGB as a JPEG file of quality 95."""
    return cv2.imencode('.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def encode_depth(depth: np.ndarray) -> bytes:
    """Depth (h, w, 1) uint16 [mm] as a PNG file, without loss."""
    return cv2.imencode('.png', depth)[1].tobytes()


def decode_frame(data: bytes, shape: tuple[int, int, int], where: str) -> np.ndarray:
    """The image in a file, resized to `shape`: (h, w, 3) uint8 RGB, or (h, w, 1) uint16 depth [mm] of a 16-bit PNG.

    Raises DecodeError, naming `where`.
    """
    return resize(_file_depth(data, where) if shape[2] == 1 else _file_image(data, where), shape)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a whole JPEG file, read from its header; None if it is none, or truncated."""
    if data[:2] != SOI:
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            size = int.from_bytes(data[place + 5:place + 7], 'big'), int.from_bytes(data[place + 7:place + 9], 'big')
            # Cameras pad behind the end, so it need not be last; libjpeg makes up what is missing, in grey.
            return size if all(size) and data.rfind(EOI) > place else None
        # Bytes 0xFF may fill up the space before a marker; the others are followed by their length.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2:place + 4], 'big')
    return None


def resize(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """An image in the size of `shape`: by area when it shrinks, linear when it grows.

    Depth by its nearest pixel, since the mean over an edge is a distance at which nothing is.
    """
    height, width, channels = shape
    if image.shape[:2] == (height, width):
        return image
    if channels == 1:
        how = cv2.INTER_NEAREST_EXACT
    else:
        how = cv2.INTER_AREA if height <= image.shape[0] and width <= image.shape[1] else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how).reshape(shape)


def stamp_of(message, stream: Stream, publish_ns: int | None, receive_ns: int | None) -> int:
    """When the sample was taken [ns], by the clock the stream declares, less its latency.

    Raises DecodeError if that clock has no stamp: another one would be a silent shift in time.
    """
    if stream.clock == 'header':
        header = getattr(message, 'header', None)
        if header is None:
            raise DecodeError(f'{stream.topic}: clock is header, but {stream.type} has none; valid: publish, receive',
                              'E204')
        stamp = header.stamp.sec * 1_000_000_000 + header.stamp.nanosec
    else:
        stamp = publish_ns if stream.clock == 'publish' else receive_ns
    if not stamp:
        raise DecodeError(f'{stream.topic}: clock is {stream.clock}, but the message carries no such stamp', 'E204')
    return int(stamp) - round(stream.latency * 1e9)


def _joints(message, stream: Stream) -> np.ndarray:
    """The values of the stream's joints, found by name."""
    names = list(message.name)
    values = getattr(message, stream.field)
    if len(values) != len(names):
        raise DecodeError(f'{stream.topic}: {len(values)} values of {stream.field} for {len(names)} names', 'E203')
    try:
        places = [names.index(name) for name in stream.names]
    except ValueError:
        missing = [name for name in stream.names if name not in names]
        raise DecodeError(f'{stream.topic}: no joints {missing}; the message has {names}', 'E203') from None
    doubled = [name for name in stream.names if names.count(name) > 1]
    if doubled:
        raise DecodeError(f'{stream.topic}: joints {doubled} occur more than once; the message has {names}', 'E203')
    return np.array([values[place] for place in places], dtype=np.float64)


def _attribute(message, path: str):
    """The value at an attribute path such as point.x; a number in the path indexes an array."""
    value = message
    for part in path.split('.'):
        if part.isdigit():
            if int(part) >= len(value):
                raise AttributeError(f'{path}: no entry {part}, there are {len(value)}')
            value = value[int(part)]
        elif hasattr(value, part):
            value = getattr(value, part)
        else:
            present = (getattr(value, '__dataclass_fields__', None)
                       or getattr(value, 'get_fields_and_field_types', dict)())
            raise AttributeError(f'{path}: no {part!r}; there are: {", ".join(present) or type(value).__name__}')
    return value


def _image(message, stream: Stream, convert: Convert | None = None) -> np.ndarray:
    """The image at its own size, (h, w, 3) uint8 RGB or (h, w, 1) uint16 [mm]."""
    if hasattr(message, 'format'):
        data = bytes(message.data)
        if 'compressedDepth' in message.format:
            return _compressed_depth(data, message.format, stream)
        where = f'{stream.topic}, format {message.format!r}'
        return _file_depth(data, where) if stream.depth else _file_image(data, where)
    layouts = DEPTH if stream.depth else COLOUR
    layout = layouts.get(message.encoding)
    if layout is None:
        other = message.encoding in (COLOUR if stream.depth else DEPTH)
        if convert is not None and not other:
            return _converted(message, stream, convert)
        hint = f'; the contract says depth: {str(stream.depth).lower()}' if other else ''
        raise DecodeError(f'{stream.topic}: encoding is {message.encoding!r}; valid: {", ".join(layouts)}{hint}', 'E208')
    pixels = _pixels(message, layout, stream)
    if stream.depth:
        return pixels if layout.dtype == 'u2' else _millimetres(pixels)
    if layout.dtype == 'u2':
        pixels = (pixels >> 8).astype(np.uint8)
    try:
        return pixels if layout.to_rgb is None else cv2.cvtColor(pixels, layout.to_rgb)
    except cv2.error:
        raise DecodeError(f'{stream.topic}: {message.width} x {message.height} pixels cannot be {message.encoding}; '
                          'its width and height must be even', 'E208') from None


def _converted(message, stream: Stream, convert: Convert) -> np.ndarray:
    """The image, as whoever knows its encoding reads it: colour as rgb8, depth as the numbers that it holds."""
    try:
        pixels = np.asarray(convert(message, 'passthrough' if stream.depth else 'rgb8'))
    except DecodeError as error:
        raise error.at(stream.topic) from None
    expected = (message.height, message.width, *(() if stream.depth else (3,)))
    if pixels.shape != expected or not (stream.depth or pixels.dtype == np.uint8):
        raise DecodeError(f'{stream.topic}: encoding {message.encoding!r} gives {pixels.shape} {pixels.dtype}, which is no '
                          f'{"depth" if stream.depth else "colour"} image of {expected[0]} x {expected[1]}', 'E208')
    if not stream.depth:
        return pixels
    return _millimetres(pixels[:, :, None] * (1.0 if pixels.dtype.kind == 'f' else 1e-3))


def _pixels(message, layout: Layout, stream: Stream) -> np.ndarray:
    """The values of a raw image, (rows, w, channels)."""
    data = np.frombuffer(message.data, dtype=np.uint8)
    dtype = np.dtype(layout.dtype).newbyteorder('>' if message.is_bigendian else '<')
    height, width, step = message.height, message.width, message.step
    used = width * layout.channels * dtype.itemsize
    rows = height + height // 2 if layout.planar else height
    if height < 1 or width < 1 or step < used or len(data) < rows * step:
        raise DecodeError(f'{stream.topic}: {len(data)} bytes do not hold {rows} rows of {step} bytes, '
                          f'{width} {message.encoding} pixels', 'E208')
    packed = np.ascontiguousarray(data[:rows * step].reshape(rows, step)[:, :used])  # rows may be padded to `step` bytes
    return packed.view(dtype).reshape(rows, width, layout.channels).astype(layout.dtype, copy=False)


def _file_image(data: bytes, where: str) -> np.ndarray:
    """A JPEG or PNG file as (h, w, 3) uint8 RGB."""
    if data[:2] == SOI and jpeg_size(data) is None:
        raise DecodeError(f'{where}: {len(data)} bytes are no whole JPEG; truncated or damaged', 'E208')
    image = _imdecode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise DecodeError(f'{where}: {len(data)} bytes are no image; valid: jpeg, png', 'E208')
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _imdecode(data: bytes, flags: int) -> np.ndarray | None:
    """What a JPEG or PNG file holds; None if that is no image."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:  # such as a header that claims more pixels than fit into memory
        return None


def _file_depth(data: bytes, where: str) -> np.ndarray:
    """A 16-bit PNG file as (h, w, 1) uint16."""
    image = _imdecode(data, cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.ndim != 2:
        raise DecodeError(f'{where}: {len(data)} bytes are no 16-bit grey PNG, which depth must be', 'E208')
    return image[:, :, None]


def _compressed_depth(data: bytes, format: str, stream: Stream) -> np.ndarray:
    """What compressed_depth_image_transport makes, as (h, w, 1) uint16 [mm].

    12 bytes of header, then a PNG: 16UC1 in [mm], or 32FC1 as quantised inverse depth.
    """
    encoding, where = format.split(';')[0].strip(), f'{stream.topic}, format {format!r}'
    if not stream.depth:
        raise DecodeError(f'{where}: a depth image; set depth: true in the contract', 'E208')
    if 'rvl' in format or encoding not in DEPTH:
        raise DecodeError(f'{where}: not read; valid: 16UC1 and 32FC1 as png (set the publisher\'s '
                          'compressedDepth format to png)', 'E208')
    depth = _file_depth(data[12:], where)
    if encoding != '32FC1':
        return depth
    _, a, b = struct.unpack('<iff', data[:12])  # whole, since a PNG follows
    with np.errstate(divide='ignore', invalid='ignore'):
        return _millimetres(np.where(depth == 0, np.nan, a / (depth.astype(np.float32) - b)))


def _millimetres(metres: np.ndarray) -> np.ndarray:
    """Depth [m] as uint16 [mm]: 0 where it is not finite or behind the camera, 65535 beyond 65.535 m."""
    known = np.where(np.isfinite(metres), metres, 0.0)
    return np.clip(np.round(known * 1e3), 0, 65535).astype(np.uint16)
