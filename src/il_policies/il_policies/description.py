"""A robot's URDF: found by its package:// name, read by MuJoCo. No ROS needed."""
from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import re
import sys
from pathlib import Path

if sys.platform == 'linux' and not os.environ.get('DISPLAY'):
    # Chosen when mujoco is imported. Without libEGL the import itself would fail, even where nothing is rendered.
    os.environ.setdefault('MUJOCO_GL', 'egl' if ctypes.util.find_library('EGL') else 'disable')

import mujoco  # noqa: E402

PACKAGE_URI = re.compile(r'package://([^/]+)/(.+)')


class DescriptionError(ValueError):
    """A description that cannot be used; the message says what was received and what is valid."""


def resolve(uri: str) -> Path:
    """The file a ``package://<package>/<path>`` URI names.

    Looks in the share folders of `AMENT_PREFIX_PATH` (hyphens and underscores in the package's name are the same), then
    in the Python distribution of that name. Raises DescriptionError.
    """
    match = PACKAGE_URI.fullmatch(uri)
    if not match:
        raise DescriptionError(f'description is {uri!r}, must be package://<package>/<path>')
    package, path = match.groups()
    names = dict.fromkeys((package, package.replace('-', '_'), package.replace('_', '-')))
    prefixes = [Path(prefix) for prefix in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if prefix]
    try:
        # Wheels made with cmeel carry an install prefix of their own.
        prefixes.append(Path(importlib.metadata.distribution(package).locate_file('cmeel.prefix')))
    except importlib.metadata.PackageNotFoundError:
        pass
    for prefix in prefixes:
        for name in names:
            if (found := prefix / 'share' / name / path).is_file():
                return found
    raise DescriptionError(f'{uri}: not found; install it with "pip install example-robot-data" or source a ROS 2 workspace '
                           f'that has {package}')


def load_spec(uri: str) -> mujoco.MjSpec:
    """MuJoCo's editable model of a URDF, meshes of its package resolved but not read yet. Raises DescriptionError."""
    urdf = resolve(uri)
    package, path = PACKAGE_URI.fullmatch(uri).groups()
    text = urdf.read_text().replace(f'package://{package}/', str(urdf)[:-len(path)])
    # Static links stay bodies of their own, so that they keep their names.
    options = '<mujoco><compiler strippath="false" discardvisual="false" fusestatic="false"/></mujoco>'
    text = re.sub(r'<robot\s[^>]*>', lambda tag: tag[0] + options, text, count=1)
    try:
        return mujoco.MjSpec.from_string(text)
    except ValueError as error:
        raise DescriptionError(f'{urdf}: no URDF that MuJoCo can read: {" ".join(str(error).split())}') from None
