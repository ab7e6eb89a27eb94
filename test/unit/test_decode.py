from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from il_policies.contract import Stream
from il_policies.data.decode import DecodeError, decode, decode_jpeg, stamp_of
from recordings import TYPES, compressed, header, joint_state, jpeg, picture, point

JOINTS = Stream(
    topic='joint_states', type='sensor_msgs/msg/JointState', rate=100, max_age=0.1, field='position', names=('a', 'b')
)
POINT = Stream(topic='goal', type='geometry_msgs/msg/PointStamped', rate=10, max_age=0.1, fields=('point.y', 'point.x'))
CAMERA = Stream(topic='camera', type='sensor_msgs/msg/CompressedImage', rate=10, max_age=0.1, image_size=(8, 12))


def raw(encoding: str, pixels: np.ndarray, padding: int = 0):
    """A sensor_msgs/Image of (h, w, channels) pixels, each row padded."""
    h, w, channels = pixels.shape
    rows = np.concatenate([pixels.reshape(h, -1), np.full((h, padding), 255, np.uint8)], axis=1)
    return TYPES.types['sensor_msgs/msg/Image'](header(1), h, w, encoding, 0, w * channels + padding, rows.ravel())


def test_joints_by_name():
    assert decode(joint_state(1, ['c', 'b', 'a'], [3.0, 2.0, 1.0]), JOINTS).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    'names, values, words',
    [
        (['a', 'c'], [1, 2], r"joint_states: no joints \['b'\]; the message has \['a', 'c'\]"),
        (['a', 'b', 'a'], [1, 2, 3], r"joints \['a'\] occur more than once"),
        (['a', 'b'], [], '0 values of position for 2 names'),
        (['a', 'b'], [1, np.nan], 'not finite: b = nan'),
        (['a', 'b'], [np.inf, 1], 'not finite: a = inf'),
    ],
)
def test_joints_refused(names, values, words):
    with pytest.raises(DecodeError, match=words):
        decode(joint_state(1, names, values), JOINTS)


def test_a_doubled_joint_that_is_not_used_does_no_harm():
    assert decode(joint_state(1, ['a', 'x', 'x', 'b'], [1, 8, 9, 2]), JOINTS).tolist() == [1, 2]


def test_attribute_paths():
    assert decode(point(1, 1.5, 2.5), POINT).tolist() == [2.5, 1.5]
    numbered = replace(POINT, type='std_msgs/msg/Float64MultiArray', fields=('data.1',))
    layout = TYPES.types['std_msgs/msg/MultiArrayLayout']([], 0)
    message = TYPES.types['std_msgs/msg/Float64MultiArray'](layout, np.array([4.0, 5.0]))
    assert decode(message, numbered).tolist() == [5.0]
    with pytest.raises(DecodeError, match='data.2: no entry 2, there are 2'):
        decode(message, replace(numbered, fields=('data.2',)))
    with pytest.raises(DecodeError, match="point.w: no 'w'; there are: x, y, z"):
        decode(point(1, 0, 0), replace(POINT, fields=('point.w',)))
    with pytest.raises(DecodeError, match='must all be single numbers'):
        decode(point(1, 0, 0), replace(POINT, fields=('point',)))
    with pytest.raises(DecodeError, match='point.y = nan'):
        decode(point(1, 0, np.nan), POINT)


def test_raw_images_respect_step_and_order():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    for padding in (0, 5):
        np.testing.assert_array_equal(decode(raw('rgb8', pixels, padding), CAMERA), pixels)
        np.testing.assert_array_equal(decode(raw('bgr8', pixels, padding), CAMERA), pixels[..., ::-1])
        np.testing.assert_array_equal(decode(raw('mono8', pixels[..., :1], padding), CAMERA), pixels[..., [0, 0, 0]])


def test_raw_images_refused():
    with pytest.raises(DecodeError, match="encoding is '16UC1'; valid: rgb8, bgr8, mono8"):
        decode(raw('16UC1', picture(0)), CAMERA)
    short = raw('rgb8', picture(0))
    short.data = short.data[:-1]
    with pytest.raises(DecodeError, match='287 bytes do not hold 8 rows of 36 bytes'):
        decode(short, CAMERA)


def test_compressed_images():
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8), (12, 8))
    image = decode(compressed(1, smooth), CAMERA)
    assert image.dtype == np.uint8 and np.abs(image.astype(int) - smooth).mean() < 6
    red = np.zeros((8, 12, 3), np.uint8)
    red[..., 0] = 200
    assert decode(compressed(1, red), CAMERA)[..., 0].min() > 190
    broken = compressed(1, red)
    broken.data = broken.data[:20]
    with pytest.raises(DecodeError, match="20 bytes of format 'jpeg' are no image"):
        decode(broken, CAMERA)


def test_resized_by_area():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    mean = pixels.reshape(8, 2, 12, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(decode(raw('rgb8', pixels), CAMERA), mean, atol=0.51)
    assert decode(raw('rgb8', pixels[:3, :5]), CAMERA).shape == (8, 12, 3)


def test_jpeg_passes_unchanged_or_is_resized():
    message = compressed(1, picture(77))
    assert decode_jpeg(message, CAMERA) == jpeg(picture(77))
    for other in (compressed(1, picture(77, (20, 30))), raw('rgb8', picture(77))):
        stored = cv2.imdecode(np.frombuffer(decode_jpeg(other, CAMERA), np.uint8), cv2.IMREAD_COLOR)
        assert stored.shape == (8, 12, 3)
        np.testing.assert_allclose(stored, 77, atol=1)


def test_stamps():
    message = point(3_000_000_007, 0, 0)
    assert stamp_of(message, POINT, 5, 6) == 3_000_000_007
    assert stamp_of(message, replace(POINT, latency=0.001), 5, 6) == 2_999_000_007
    assert stamp_of(message, replace(POINT, clock='publish'), 5, 6) == 5
    assert stamp_of(message, replace(POINT, clock='receive'), 5, 6) == 6


def test_a_missing_stamp_is_an_error_not_a_fallback():
    with pytest.raises(DecodeError, match='clock is publish, but the message carries no such stamp'):
        stamp_of(point(1, 0, 0), replace(POINT, clock='publish'), None, 6)
    with pytest.raises(DecodeError, match='clock is header, but the message carries no such stamp'):
        stamp_of(point(0, 0, 0), POINT, 5, 6)
    with pytest.raises(DecodeError, match='clock is header, but geometry_msgs/msg/PointStamped has none'):
        stamp_of(point(1, 0, 0).point, POINT, 5, 6)
