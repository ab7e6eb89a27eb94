from __future__ import annotations

import struct
import time
from dataclasses import replace

import av
import cv2
import numpy as np
import pytest

from il_policies.contract import Stream
from il_policies.data.decode import COLOUR, DecodeError, decode, decode_frame, encode_frame, jpeg_size, stamp_of
from recordings import TYPES, compressed, header, joint_state, jpeg, picture, point

JOINTS = Stream(
    topic='joint_states', type='sensor_msgs/msg/JointState', rate=100, max_age=0.1, field='position', names=('a', 'b')
)
POINT = Stream(topic='goal', type='geometry_msgs/msg/PointStamped', rate=10, max_age=0.1, fields=('point.y', 'point.x'))
CAMERA = Stream(topic='camera', type='sensor_msgs/msg/CompressedImage', rate=10, max_age=0.1, image_size=(8, 12))


DEPTH = replace(CAMERA, depth=True)
SMOOTH = cv2.resize(np.random.default_rng(1).integers(0, 256, (3, 4, 3), np.uint8), (48, 32), interpolation=cv2.INTER_CUBIC)
"""A colour image without detail, which the coarse colours of YUV and JPEG keep. (32, 48, 3)"""


def raw(encoding: str, pixels: np.ndarray, padding: int = 0, big: bool = False, height: int | None = None):
    """A sensor_msgs/Image of (rows, w, channels) pixels, each row padded."""
    rows, w, _ = pixels.shape
    packed = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder('>' if big else '<')))
    packed = packed.view(np.uint8).reshape(rows, w * pixels.shape[2] * pixels.itemsize)
    data = np.concatenate([packed, np.full((rows, padding), 255, np.uint8)], axis=1)
    return TYPES.types['sensor_msgs/msg/Image'](header(1), height or rows, w, encoding, int(big), data.shape[1], data.ravel())


def compressed_data(data: bytes, format: str = 'jpeg'):
    """A CompressedImage of these bytes."""
    return TYPES.types['sensor_msgs/msg/CompressedImage'](header(1), format, np.frombuffer(data, np.uint8))


def png(image: np.ndarray) -> bytes:
    """PNG file of an RGB or a 16-bit grey image."""
    return cv2.imencode('.png', image[:, :, ::-1] if image.ndim == 3 and image.shape[2] == 3 else image)[1].tobytes()


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


@pytest.mark.parametrize(
    'encoding, order', [('rgb', [0, 1, 2]), ('bgr', [2, 1, 0]), ('rgba', [0, 1, 2, 3]), ('bgra', [2, 1, 0, 3])])
@pytest.mark.parametrize('bits, big', [(8, False), (16, False), (16, True)])
def test_channels_in_every_order_and_depth(encoding, order, bits, big):
    pixels = np.random.default_rng(0).integers(0, 1 << bits, (8, 12, 4)).astype(f'u{bits // 8}')
    decoded = decode(raw(f'{encoding}{bits}', pixels[..., order], 3, big), CAMERA)
    np.testing.assert_array_equal(decoded, pixels[..., :3] >> (bits - 8))


@pytest.mark.parametrize('big', [False, True])
def test_grey_of_16_bits_is_not_scaled_by_its_content(big):
    pixels = np.array([[[0], [255], [256], [40000]]], np.uint16)
    decoded = decode(raw('mono16', pixels, 2, big), replace(CAMERA, image_size=(1, 4)))
    np.testing.assert_array_equal(decoded, np.array([0, 0, 1, 156])[None, :, None] * [1, 1, 1])


@pytest.mark.parametrize('pattern', ['rggb', 'bggr', 'gbrg', 'grbg'])
@pytest.mark.parametrize('bits', [8, 16])
def test_bayer_against_the_mosaic_of_a_known_image(pattern, bits):
    mosaic = np.zeros((32, 48, 1), f'u{bits // 8}')
    for place, colour in enumerate(pattern):
        y, x = divmod(place, 2)
        mosaic[y::2, x::2, 0] = SMOOTH[y::2, x::2, 'rgb'.index(colour)].astype(int) << (bits - 8)
    decoded = decode(raw(f'bayer_{pattern}{bits}', mosaic, 4), replace(CAMERA, image_size=(32, 48)))
    assert np.abs(decoded.astype(int) - SMOOTH)[2:-2, 2:-2].mean() < 2


@pytest.mark.parametrize('encoding, layout', [('uyvy', 'uyvy422'), ('yuv422', 'uyvy422'), ('yuyv', 'yuyv422'),
                                              ('yuv422_yuy2', 'yuyv422'), ('nv12', 'nv12'), ('nv21', 'nv21')])
def test_yuv_against_ffmpeg(encoding, layout):
    frame = av.VideoFrame.from_ndarray(SMOOTH, 'rgb24').reformat(format=layout)
    planes = [np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size) for plane in frame.planes]
    pixels = np.concatenate([plane[:, :48 if len(planes) == 2 else 96] for plane in planes])
    decoded = decode(raw(encoding, pixels.reshape(len(pixels), 48, -1), 6, height=32), replace(CAMERA, image_size=(32, 48)))
    assert np.abs(decoded.astype(int) - SMOOTH).mean() < 5  # colours are kept at half the resolution; swapped ones differ by 60
    assert np.abs(decoded.astype(int) - frame.reformat(format='rgb24').to_ndarray()).mean() < 4


def test_raw_images_refused():
    with pytest.raises(DecodeError, match="E208 camera: encoding is '16UC1'; valid: rgb8, .*; the contract says depth: false"):
        decode(raw('16UC1', picture(0)[..., :1].astype(np.uint16)), CAMERA)
    with pytest.raises(DecodeError, match="encoding is '8UC3'; valid: rgb8, bgr8, [^;]*$"):
        decode(raw('8UC3', picture(0)), CAMERA)
    with pytest.raises(DecodeError, match="encoding is 'rgb8'; valid: 16UC1, mono16, 32FC1; the contract says depth: true"):
        decode(raw('rgb8', picture(0)), DEPTH)
    with pytest.raises(DecodeError, match='must be even'):
        decode(raw('uyvy', np.zeros((8, 11, 2), np.uint8)), CAMERA)
    short = raw('rgb8', picture(0))
    short.data = short.data[:-1]
    with pytest.raises(DecodeError, match='287 bytes do not hold 8 rows of 36 bytes'):
        decode(short, CAMERA)


def planar(message, encoding):
    """Knows one encoding more: 'planes', red, green and blue one after the other, or 'metres', depth as float64."""
    if message.encoding == 'planes' and encoding == 'rgb8':
        return np.moveaxis(message.data.reshape(3, message.height, message.width), 0, -1)
    if message.encoding == 'metres' and encoding == 'passthrough':
        return message.data.view('<f8').reshape(message.height, message.width)
    if message.encoding == 'odd':
        return np.zeros((2, 2), np.float32)
    raise DecodeError(f'never heard of {message.encoding!r}', 'E208')


def test_encodings_that_are_not_read_here_are_asked_for():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    planes = raw('planes', np.moveaxis(pixels, -1, 0).reshape(24, 12, 1), height=8)
    np.testing.assert_array_equal(decode(planes, CAMERA, planar), pixels)
    with pytest.raises(DecodeError, match="E208 camera: encoding is 'planes'; valid: rgb8"):
        decode(planes, CAMERA)  # as the converter does
    metres = np.array([[0.0, 1.2344, np.nan], [70.0, -1.0, 0.5]])
    depth = decode(raw('metres', metres[..., None]), replace(DEPTH, image_size=(2, 3)), planar)
    np.testing.assert_array_equal(depth[..., 0], [[0, 1234, 0], [65535, 0, 500]])
    with pytest.raises(DecodeError, match="E208 camera: never heard of '8UC3'"):
        decode(raw('8UC3', np.zeros((8, 12, 3), np.uint8)), CAMERA, planar)
    with pytest.raises(DecodeError, match=r"camera: encoding 'odd' gives \(2, 2\) float32, which is no colour image of 8 x 12"):
        decode(raw('odd', np.zeros((8, 12, 3), np.uint8)), CAMERA, planar)


@pytest.mark.parametrize('encoding', COLOUR)
def test_nobody_is_asked_for_what_is_read_here(encoding):
    """Live images must be those of the converter, bit for bit."""
    layout = COLOUR[encoding]
    rng = np.random.default_rng(0)
    rows = 12 if layout.planar else 8
    message = raw(encoding, rng.integers(0, 200, (rows, 12, layout.channels)).astype(layout.dtype), height=8)

    def convert(*_):
        pytest.fail('asked')

    np.testing.assert_array_equal(decode(message, CAMERA, convert), decode(message, CAMERA))


@pytest.mark.parametrize(('encoding', 'stream'), [('16UC1', CAMERA), ('rgb8', DEPTH)])
def test_nobody_makes_colour_of_depth(encoding, stream):
    with pytest.raises(DecodeError, match='the contract says depth'):
        decode(raw(encoding, np.zeros((8, 12, 3), np.uint8)), stream, planar)


@pytest.mark.parametrize('encoding', COLOUR)
@pytest.mark.parametrize('size', [(0, 0), (1, 1), (1, 2), (3, 5), (2, 2)])
def test_no_encoding_fails_otherwise_than_with_words(encoding, size):
    layout = COLOUR[encoding]
    rows = size[0] + size[0] // 2 if layout.planar else size[0]
    message = raw(encoding, np.zeros((rows, size[1], layout.channels), layout.dtype), height=size[0])
    try:
        assert decode(message, CAMERA).shape == (8, 12, 3)
    except DecodeError as error:
        assert error.code == 'E208'


def test_compressed_images():
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8), (12, 8))
    image = decode(compressed(1, smooth), CAMERA)
    assert image.dtype == np.uint8 and np.abs(image.astype(int) - smooth).mean() < 6
    red = np.zeros((8, 12, 3), np.uint8)
    red[..., 0] = 200
    assert decode(compressed(1, red), CAMERA)[..., 0].min() > 190
    np.testing.assert_array_equal(decode(compressed_data(png(smooth), 'rgb8; png compressed bgr8'), CAMERA), smooth)
    for data, words in ((b'', '0 bytes are no image'), (b'\x00\x00\x00\x01\x67', '5 bytes are no image; valid: jpeg, png')):
        with pytest.raises(DecodeError, match=f"E208 camera, format 'h264': {words}"):
            decode(compressed_data(data, 'h264'), CAMERA)


def exif(thumbnail: bytes) -> bytes:
    """A segment of a JPEG file that holds a small one."""
    return b'\xff\xe1' + struct.pack('>H', len(thumbnail) + 8) + b'Exif\0\0' + thumbnail


@pytest.mark.parametrize('options', [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]])
@pytest.mark.parametrize('grey', [False, True])
def test_size_of_a_jpeg_without_decoding_it(options, grey):
    plain = cv2.imencode('.jpg', SMOOTH[..., 0] if grey else SMOOTH, options)[1].tobytes()
    thumbnail = jpeg(picture(3, (4, 4)))
    for data in (plain, plain + bytes(100), plain[:2] + exif(thumbnail) + plain[2:], plain[:2] + b'\xff\xff' + plain[2:]):
        assert jpeg_size(data) == (32, 48)
        assert decode_frame(data, (32, 48, 3), '').shape == (32, 48, 3)


def test_a_truncated_image_is_never_taken_for_a_whole_one():
    for whole in (jpeg(SMOOTH), jpeg(SMOOTH)[:2] + exif(jpeg(picture(3, (4, 4)))) + jpeg(SMOOTH)[2:], png(SMOOTH)):
        decode(compressed_data(whole), CAMERA)
        for length in range(0, len(whole), 7 if whole[:1] == b'\xff' else 97):
            for images in ('jpeg95', 'passthrough'):
                with pytest.raises(DecodeError, match='truncated|no image'):
                    encode_frame(compressed_data(whole[:length]), CAMERA, images)
            with pytest.raises(DecodeError, match='truncated|no image'):
                decode(compressed_data(whole[:length]), CAMERA)


def test_jpeg_size_against_noise():
    random = np.random.default_rng(0)
    whole = bytearray(jpeg(SMOOTH))
    for _ in range(2000):
        data = bytearray(whole)
        for place in random.integers(2, len(data), 4):
            data[place] = random.integers(256)
        size = jpeg_size(bytes(data))
        assert size is None or all(value > 0 for value in size)


def test_depth_is_in_millimetres_whatever_is_in_the_frame():
    metres = np.array([[0.0, 0.0004, 0.0006, 1.2344], [np.nan, np.inf, -np.inf, -1.0], [65.535, 65.6, 1e30, 2.0]], np.float32)
    expected = np.array([[0, 0, 1, 1234], [0, 0, 0, 0], [65535, 65535, 65535, 2000]], np.uint16)[:, :, None]
    stream = replace(DEPTH, image_size=(3, 4))
    for big in (False, True):
        decoded = decode(raw('32FC1', metres[:, :, None], 5, big), stream)
        assert decoded.dtype == np.uint16
        np.testing.assert_array_equal(decoded, expected)
        for encoding in ('16UC1', 'mono16'):
            np.testing.assert_array_equal(decode(raw(encoding, expected, 2, big), stream), expected)


def test_compressed_depth():
    stream = replace(DEPTH, image_size=(2, 3))
    depth = np.array([[0, 1, 500], [65535, 3, 9999]], np.uint16)
    for format in ('16UC1; compressedDepth png', '16UC1; compressedDepth'):
        decoded = decode(compressed_data(struct.pack('<iff', 0, 0, 0) + png(depth), format), stream)
        np.testing.assert_array_equal(decoded[:, :, 0], depth)
    np.testing.assert_array_equal(decode(compressed_data(png(depth), '16UC1; png compressed '), stream)[:, :, 0], depth)
    # 32FC1 as the transport quantises it: 1 / depth, so that near is exact and far is coarse.
    metres, quantisation, farthest = np.array([[0.5, 1.0, 2.0], [4.0, np.nan, 8.0]]), 100.0, 10.0
    a = quantisation * (quantisation + 1)
    b = 1 - a / farthest
    inverse = np.where(np.isnan(metres), 0, np.round(a / np.nan_to_num(metres, nan=1.0) + b)).astype(np.uint16)
    decoded = decode(compressed_data(struct.pack('<iff', 0, a, b) + png(inverse), '32FC1; compressedDepth png'), stream)[..., 0]
    assert decoded[1, 1] == 0
    known = ~np.isnan(metres)
    assert np.all(np.abs(decoded[known] - 1e3 * metres[known]) <= 1e3 * metres[known] ** 2 / a / 2 + 1)


@pytest.mark.parametrize('stream, data, format, words', [
    (DEPTH, bytes(40), '32FC1; compressedDepth rvl', 'not read; valid: 16UC1 and 32FC1 as png'),
    (DEPTH, bytes(7), '16UC1; compressedDepth png', 'no 16-bit grey PNG'),
    (DEPTH, jpeg(picture(0)), 'jpeg', 'no 16-bit grey PNG, which depth must be'),
    (DEPTH, png(picture(0)), 'png', 'no 16-bit grey PNG'),
    (CAMERA, bytes(40), '16UC1; compressedDepth png', 'a depth image; set depth: true in the contract'),
])
def test_compressed_depth_refused(stream, data, format, words):
    with pytest.raises(DecodeError, match=f'E208 camera, format .*{words}'):
        decode(compressed_data(data, format), stream)


def test_resized_depth_holds_only_distances_that_were_measured():
    depth = np.where(np.arange(24) < 12, 500, 3000).astype(np.uint16)[None, :, None].repeat(16, axis=0)
    for size in ((8, 12), (5, 7), (40, 60)):
        decoded = decode(raw('16UC1', depth), replace(DEPTH, image_size=size))
        assert decoded.shape == (*size, 1) and set(np.unique(decoded)) == {500, 3000}


def test_resized_by_area():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    mean = pixels.reshape(8, 2, 12, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(decode(raw('rgb8', pixels), CAMERA), mean, atol=0.51)
    assert decode(raw('rgb8', pixels[:3, :5]), CAMERA).shape == (8, 12, 3)


def test_jpeg_passes_unchanged_or_is_resized():
    message = compressed(1, picture(77))
    assert encode_frame(message, CAMERA) == jpeg(picture(77))
    for other in (compressed(1, picture(77, (20, 30))), raw('rgb8', picture(77)), compressed_data(png(picture(77)), 'png')):
        stored = cv2.imdecode(np.frombuffer(encode_frame(other, CAMERA), np.uint8), cv2.IMREAD_COLOR)
        assert stored.shape == (8, 12, 3)
        np.testing.assert_allclose(stored, 77, atol=1)


def test_passthrough_reads_like_the_live_image():
    for recorded in (jpeg(SMOOTH), png(SMOOTH)):
        message = compressed_data(recorded)
        stored = encode_frame(message, CAMERA, 'passthrough')
        assert stored == recorded
        np.testing.assert_array_equal(decode_frame(stored, CAMERA.shape, ''), decode(message, CAMERA))
    assert jpeg_size(encode_frame(raw('rgb8', SMOOTH), CAMERA, 'passthrough')) == CAMERA.image_size


def test_stored_depth_is_the_live_depth():
    depth = np.random.default_rng(0).integers(0, 65536, (16, 24, 1), np.uint16)
    for images in ('jpeg95', 'passthrough'):
        for message in (raw('16UC1', depth), compressed_data(bytes(12) + png(depth), '16UC1; compressedDepth png')):
            stored = encode_frame(message, DEPTH, images)
            assert stored[:4] == b'\x89PNG'
            np.testing.assert_array_equal(decode_frame(stored, DEPTH.shape, ''), decode(message, DEPTH))


def test_knowing_the_size_is_much_cheaper_than_decoding():
    """What lets images of the right size be copied faster than they are recorded."""
    large = cv2.resize(SMOOTH, (640, 480))
    message, stream = compressed(1, large), replace(CAMERA, image_size=(480, 640))
    start = time.process_time()
    for _ in range(30):
        decode(message, stream)
    decoding = time.process_time() - start
    start = time.process_time()
    for _ in range(30):
        encode_frame(message, stream)
    assert time.process_time() - start < decoding / 5


def test_kind_and_shape_of_a_stream():
    assert [(stream.kind, stream.shape) for stream in (JOINTS, POINT, CAMERA, DEPTH)] == [
        ('lowdim', (2,)), ('lowdim', (2,)), ('image', (8, 12, 3)), ('depth', (8, 12, 1))]
    with pytest.raises(ValueError, match='stream on goal: depth needs image_size'):
        replace(POINT, depth=True)


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
