"""A robot's URDF: found by its package:// name, read by MuJoCo. No ROS needed."""
from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

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
    if not match or '..' in match[0].split('/'):  # the name of a stranger's contract stays in the package
        raise DescriptionError(f'description is {uri!r}, must be package://<package>/<path>, without ..')
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


def load_spec(description: str | Path) -> mujoco.MjSpec:
    """MuJoCo's editable model of a URDF, meshes of all packages resolved but not read yet.

    description: package://<package>/<path>, or a Path. Raises DescriptionError.
    """
    urdf, text = read(description)
    # Static links stay bodies of their own, so that they keep their names.
    options = '<mujoco><compiler strippath="false" discardvisual="false" fusestatic="false"/></mujoco>'
    text = re.sub(r'<robot\s[^>]*>', lambda tag: tag[0] + options, text, count=1)
    try:
        return mujoco.MjSpec.from_string(text)
    except ValueError as error:
        raise DescriptionError(f'{urdf}: no URDF that MuJoCo can read: {" ".join(str(error).split())}') from None


def read(description: str | Path) -> tuple[Path, str]:
    """A URDF's file and its text, in which package:// and file:// names that can be found have become paths.

    description: package://<package>/<path>, or a Path. Raises DescriptionError.
    """
    urdf = description if isinstance(description, Path) else resolve(description)
    if urdf.suffix == '.xacro':
        raise DescriptionError(f'{urdf} is a xacro; expand it first: xacro {urdf.name} > {urdf.name.split(".")[0]}.urdf')
    try:
        text = urdf.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DescriptionError(f'{urdf}: not readable: {error}') from None

    def path(match: re.Match) -> str:
        try:
            return str(resolve(match[0]))
        except DescriptionError:
            return match[0]

    return urdf, re.sub(r'file://(?=/)', '', re.sub(r'package://[^"\'<>]+', path, text))


def initial_positions(description: str | Path) -> dict[str, float]:
    """Joint → where ros2_control starts it [rad or m], as far as a URDF says. Raises DescriptionError."""
    urdf, text = read(description)
    found = {}
    try:
        for joint in ElementTree.fromstring(text).iterfind('ros2_control/joint'):
            if (value := joint.find("state_interface[@name='position']/param[@name='initial_value']")) is not None:
                found[joint.get('name')] = float(value.text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DescriptionError(f'{urdf}: initial positions: {error}') from None
    return found


def root_link(description: str | Path) -> str:
    """Name of the link of a URDF that no joint moves. Raises DescriptionError."""
    urdf, text = read(description)
    try:
        robot = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DescriptionError(f'{urdf}: no XML: {error}') from None
    children = {child.get('link') for child in robot.iterfind('joint/child')}
    roots = [link.get('name') for link in robot.iterfind('link') if link.get('name') not in children]
    if len(roots) != 1:
        raise DescriptionError(f'{urdf}: root links {roots}, must be one')
    return roots[0]
