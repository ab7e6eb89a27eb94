"""Raw images through cv_bridge, where it is installed.

Encodings that `il_policies.data.decode` does not convert, live, and encodings to publish. It is no package of Python's: it comes
with a ROS 2 installation, and nothing else here needs it.
"""
from __future__ import annotations

import os
from array import array

import numpy as np
from sensor_msgs.msg import Image

from il_policies.data.decode import DecodeError


def convert(message: Image, encoding: str) -> np.ndarray:
    """The pixels of a raw image as `encoding`, (h, w) or (h, w, channels): the `convert` that `decode` asks.

    Raises DecodeError naming the encoding, and the package where that is what is missing.
    """
    bridge = _bridge(message.encoding)
    try:
        return bridge.imgmsg_to_cv2(message, encoding)
    except (TypeError, RuntimeError, ValueError) as error:  # CvBridgeError is a TypeError, and not all of them are that
        raise DecodeError(f'encoding {message.encoding!r} is not converted by cv_bridge either: {_line(error)}', 'E208') from None


def to_message(image: np.ndarray, encoding: str = 'rgb8') -> Image:
    """An image (h, w, 3) uint8 RGB as a message, without stamp and frame.

    Raises DecodeError for encodings that cv_bridge does not make of it, or that need it where it is not.
    """
    height, width, _ = image.shape
    message = Image(height=height, width=width, encoding='rgb8', step=3 * width, data=array('B', image.tobytes()))
    return message if encoding == 'rgb8' else _bridge(encoding).cv2_to_imgmsg(convert(message, encoding), encoding)


def _bridge(encoding: str):
    """cv_bridge with what it converts by, which it loads only when it is needed."""
    try:
        from cv_bridge import CvBridge
        from cv_bridge.boost import cv_bridge_boost  # noqa: F401
    except (ImportError, AttributeError) as error:  # also where it was built for another NumPy
        raise DecodeError(f'encoding {encoding!r} needs cv_bridge: apt install ros-{os.environ.get("ROS_DISTRO") or "<distro>"}'
                          f'-cv-bridge ({_line(error)})', 'E208') from None
    return CvBridge()


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())
