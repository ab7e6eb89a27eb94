"""From a message to a sample of a contract's stream: the same code for live messages and for those of a bag.

Messages are read by attribute, so rclpy's classes and those deserialised from a bag both do.
"""
from __future__ import annotations

import cv2
import numpy as np

from il_policies.contract import Stream
from il_policies.data.errors import DataError

CHANNELS = {'rgb8': 3, 'bgr8': 3, 'mono8': 1}
JPEG_QUALITY = 95


class DecodeError(DataError):
    """A message that is no sample of its stream."""


class NotFiniteError(DecodeError):
    """A message that holds NaN or infinity."""


def decode(message, stream: Stream) -> np.ndarray:
    """The sample in a message: (D,) float64, or (h, w, 3) uint8 RGB in the stream's image size.

    Raises DecodeError if something is missing, doubled, not finite or not decodable.
    """
    if stream.is_image:
        return _resized(_image(message, stream), stream)
    if stream.field:
        values = _joints(message, stream)
    else:
        try:
            values = np.array([_attribute(message, path) for path in stream.fields], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DecodeError(f'{stream.topic}: {list(stream.fields)} must all be single numbers: {error}') from None
        except AttributeError as error:
            raise DecodeError(f'{stream.topic}: {error}') from None
    if not np.isfinite(values).all():
        names = stream.names or stream.fields
        bad = [f'{name} = {value}' for name, value in zip(names, values, strict=True) if not np.isfinite(value)]
        raise NotFiniteError(f'{stream.topic}: not finite: {", ".join(bad)}')
    return values


def decode_jpeg(message, stream: Stream) -> bytes:
    """The image of a message as JPEG file in the stream's size; bytes that already are one are passed on unchanged."""
    image = _image(message, stream)
    data = bytes(message.data) if hasattr(message, 'format') else b''
    if image.shape == stream.shape and data[:3] == b'\xff\xd8\xff':
        return data
    done, jpeg = cv2.imencode('.jpg', cv2.cvtColor(_resized(image, stream), cv2.COLOR_RGB2BGR),
                              [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise DecodeError(f'{stream.topic}: image of shape {image.shape} cannot be encoded as JPEG')
    return jpeg.tobytes()


def stamp_of(message, stream: Stream, publish_ns: int | None, receive_ns: int | None) -> int:
    """When the sample was taken [ns], by the clock the stream declares, less its latency.

    Raises DecodeError if that clock has no stamp: another one would be a silent shift in time.
    """
    if stream.clock == 'header':
        header = getattr(message, 'header', None)
        if header is None:
            raise DecodeError(f'{stream.topic}: clock is header, but {stream.type} has none; valid: publish, receive')
        stamp = header.stamp.sec * 1_000_000_000 + header.stamp.nanosec
    else:
        stamp = publish_ns if stream.clock == 'publish' else receive_ns
    if not stamp:
        raise DecodeError(f'{stream.topic}: clock is {stream.clock}, but the message carries no such stamp')
    return int(stamp) - round(stream.latency * 1e9)


def _joints(message, stream: Stream) -> np.ndarray:
    """The values of the stream's joints, found by name."""
    names = list(message.name)
    values = getattr(message, stream.field)
    if len(values) != len(names):
        raise DecodeError(f'{stream.topic}: {len(values)} values of {stream.field} for {len(names)} names')
    try:
        places = [names.index(name) for name in stream.names]
    except ValueError:
        missing = [name for name in stream.names if name not in names]
        raise DecodeError(f'{stream.topic}: no joints {missing}; the message has {names}') from None
    doubled = [name for name in stream.names if names.count(name) > 1]
    if doubled:
        raise DecodeError(f'{stream.topic}: joints {doubled} occur more than once; the message has {names}')
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


def _image(message, stream: Stream) -> np.ndarray:
    """The image at its own size, (h, w, 3) uint8 RGB."""
    data = np.frombuffer(message.data, dtype=np.uint8)
    if hasattr(message, 'format'):
        if 'compressedDepth' in message.format:
            raise DecodeError(f'{stream.topic}: format is {message.format!r}, a depth image; valid: jpeg, png')
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if image is None:
            raise DecodeError(f'{stream.topic}: {len(data)} bytes of format {message.format!r} are no image')
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    channels = CHANNELS.get(message.encoding)
    if channels is None:
        raise DecodeError(f'{stream.topic}: encoding is {message.encoding!r}; valid: {", ".join(CHANNELS)}')
    height, width, step = message.height, message.width, message.step
    if height < 1 or width < 1 or step < width * channels or len(data) < height * step:
        raise DecodeError(f'{stream.topic}: {len(data)} bytes do not hold {height} rows of {step} bytes, '
                          f'{width} {message.encoding} pixels')
    rows = data[:height * step].reshape(height, step)[:, :width * channels]  # rows may be padded to `step` bytes
    pixels = rows.reshape(height, width, channels)
    if message.encoding == 'bgr8':
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(np.broadcast_to(pixels, (height, width, 3)))


def _resized(image: np.ndarray, stream: Stream) -> np.ndarray:
    height, width = stream.image_size
    if image.shape[:2] == (height, width):
        return image
    smaller = height <= image.shape[0] and width <= image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
