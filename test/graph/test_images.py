"""Raw images that need cv_bridge: read and published with it where it is installed, refused in words where it is not."""
from __future__ import annotations

import numpy as np
import pytest
import yaml

from il_policies.contract import Stream
from il_policies.data.decode import COLOUR, DecodeError, decode
from support import CONTRACT, wait_for

CAMERA = Stream(topic='camera', type='sensor_msgs/msg/Image', rate=10, max_age=0.1, image_size=(8, 12))
DEPTH = Stream(topic='depth', type='sensor_msgs/msg/Image', rate=10, max_age=0.1, image_size=(8, 12), depth=True)
RGB = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)

try:
    from cv_bridge.boost import cv_bridge_boost  # noqa: F401
    MISSING = ''
except (ImportError, AttributeError) as error:
    MISSING = f'cv_bridge does not load here: {error}'
with_bridge = pytest.mark.skipif(bool(MISSING), reason=MISSING)
without_bridge = pytest.mark.skipif(not MISSING, reason='cv_bridge is installed')


def raw(encoding: str, pixels: np.ndarray):
    from sensor_msgs.msg import Image
    height, width = pixels.shape[:2]
    message = Image(height=height, width=width, encoding=encoding, step=pixels.nbytes // height)
    message.data.frombytes(pixels.tobytes())
    return message


def raw_camera(folder):
    """The SO-101's contract with a raw camera."""
    contract = yaml.safe_load(CONTRACT.read_text())
    contract['observations']['front'] |= {'type': 'sensor_msgs/msg/Image', 'topic': 'camera/image'}
    path = folder / 'raw.yaml'
    path.write_text(yaml.safe_dump(contract))
    return path


def test_rgb8_is_published_without_it():
    from il_runtime.images import to_message
    message = to_message(RGB)
    assert (message.height, message.width, message.step, message.encoding) == (8, 12, 36, 'rgb8')
    np.testing.assert_array_equal(decode(message, CAMERA), RGB)


@without_bridge
def test_without_it_the_error_names_encoding_and_package(monkeypatch):
    from il_runtime.images import convert, to_message
    monkeypatch.setenv('ROS_DISTRO', 'jazzy')
    words = r"E208 depth: encoding '64FC1' needs cv_bridge: apt install ros-jazzy-cv-bridge \("
    with pytest.raises(DecodeError, match=words):
        decode(raw('64FC1', np.zeros((8, 12))), DEPTH, convert)
    with pytest.raises(DecodeError, match="encoding 'mono8' needs cv_bridge: apt install ros-jazzy-cv-bridge"):
        to_message(RGB, 'mono8')


@without_bridge
def test_without_it_the_simulator_says_so_in_one_line(nodes, tmp_path):
    process = nodes.start('simulator_node', contract=raw_camera(tmp_path), camera_encoding='bgr8')
    assert process.wait(30) == 2
    log = nodes.log('simulator_node')
    assert "encoding 'bgr8' needs cv_bridge" in log and 'Traceback' not in log


@with_bridge
def test_depth_that_is_not_read_here_is_read_with_it():
    from il_runtime.images import convert
    metres = np.full((8, 12), 1.25)
    metres[0] = np.nan
    for message in (raw('64FC1', metres), raw('16SC1', np.nan_to_num(metres * 1e3).astype(np.int16))):
        depth = decode(message, DEPTH, convert)
        assert not depth[0].any() and (depth[1:] == 1250).all()


@with_bridge
@pytest.mark.parametrize('encoding', ['8UC3', 'nv99', '32FC1'])
def test_what_it_does_not_convert_either_is_refused_in_words(encoding):
    from il_runtime.images import convert
    with pytest.raises(DecodeError, match=f"E208 .*encoding '?(is '|){encoding}'"):
        decode(raw(encoding, np.zeros((8, 12, 3), np.uint8)), CAMERA, convert)


@with_bridge
@pytest.mark.parametrize('encoding', ['bgr8', 'mono8', 'bgra8', 'rgba8', 'rgb16', 'mono16'])
def test_what_is_published_with_it_reads_as_what_it_was(encoding):
    from il_runtime.images import to_message
    assert encoding in COLOUR
    message = to_message(RGB, encoding)
    assert message.encoding == encoding and (message.height, message.width) == (8, 12)
    read = decode(message, CAMERA)
    if encoding.startswith('mono'):
        grey = RGB @ np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose(read, np.repeat(grey[..., None], 3, axis=2), atol=1)
    else:
        np.testing.assert_array_equal(read, RGB)


@with_bridge
def test_what_cannot_be_published_is_refused_in_words():
    from il_runtime.images import to_message
    with pytest.raises(DecodeError, match="encoding 'rgb8' is not converted by cv_bridge either"):
        to_message(RGB, 'bayer_rggb8')


@with_bridge
def test_the_simulator_publishes_with_it(nodes, node, tmp_path):
    from sensor_msgs.msg import Image
    images = []
    node.create_subscription(Image, 'camera/image', images.append, 10)
    nodes.start('simulator_node', contract=raw_camera(tmp_path), camera_encoding='bgr8')
    wait_for(lambda: images, 40.0, 'an image')
    assert images[0].encoding == 'bgr8' and len(images[0].data) == images[0].step * images[0].height
