"""Packages as ROS tools read them: manifests, XML, YAML, and the rules of ament_flake8, ament_pep257 and ament_xmllint."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from catkin_pkg.package import parse_package

from il_policies.contract import load_yaml
from il_policies.yaml_file import parse

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / 'src').glob('*/package.xml'))
PACKAGES = {path.parent.name: parse_package(path) for path in MANIFESTS}
XML = sorted([*MANIFESTS, *(path for path in (ROOT / 'config').rglob('*') if path.suffix in ('.sdf', '.urdf', '.xacro', '.xml'))])
YAML = sorted(path for path in (ROOT / 'config').rglob('*') if path.suffix in ('.yaml', '.yml', '.rviz'))
KEYS = {'python3-numpy', 'python3-opencv', 'python3-pydantic', 'python3-pytest', 'python3-rich', 'python3-yaml'}
"""Keys of rosdep/python.yaml that are used."""
ROS = {
    'ament_cmake', 'ament_cmake_python', 'ament_index_python', 'builtin_interfaces', 'diagnostic_msgs', 'geometry_msgs', 'launch',
    'launch_ros', 'lifecycle_msgs', 'rcl_interfaces', 'rclpy', 'ros2launch', 'rosgraph_msgs', 'rosidl_default_generators',
    'rosidl_default_runtime', 'sensor_msgs', 'std_msgs', 'std_srvs', 'trajectory_msgs', 'visualization_msgs'}
"""Packages of every ROS 2 distribution that are used; each is its own key."""


def test_manifests_are_valid_and_agree():
    assert set(PACKAGES) == {'il_msgs', 'il_policies', 'il_runtime'}
    for folder, package in PACKAGES.items():
        package.validate()
        assert package.name == folder and package.package_format == 3
        assert re.fullmatch(r'\d+\.\d+\.\d+', package.version) and package.description
    for of in (lambda package: package.version, lambda package: package.licenses,
               lambda package: [(person.name, person.email) for person in package.maintainers]):
        assert len({str(of(package)) for package in PACKAGES.values()}) == 1
    assert PACKAGES['il_msgs'].licenses == ['Apache-2.0'] and 'Apache License' in (ROOT / 'LICENSE').read_text()
    for setup in ('src/il_policies/setup.py', 'src/il_policies/setup.cfg', 'src/il_runtime/setup.cfg'):
        for version in re.findall(r"version\s*=\s*['\"]?([\d.]+)", (ROOT / setup).read_text()):
            assert version == PACKAGES['il_msgs'].version, setup


@pytest.mark.parametrize('name', PACKAGES)
def test_dependencies_are_keys_that_there_are(name):
    package = PACKAGES[name]
    package.evaluate_conditions({})
    wanted = {part.name for kind in ('buildtool_depends', 'build_depends', 'exec_depends', 'test_depends', 'build_export_depends')
              for part in getattr(package, kind)}
    assert wanted - KEYS - ROS - set(PACKAGES) == set()


@pytest.mark.parametrize('name', ['il_policies', 'il_runtime'])
def test_what_is_imported_of_ros_is_declared(name):
    package, sources = PACKAGES[name], (ROOT / 'src' / name / name).rglob('*.py')
    declared = {part.name for part in package.exec_depends}
    modules = {module for path in sources for module in re.findall(r'^\s*(?:from|import) (\w+)', path.read_text(), re.MULTILINE)}
    assert modules & (ROS | set(PACKAGES)) - declared - {name} - ({'il_runtime'} if name == 'il_policies' else set()) == set()


@pytest.mark.parametrize('path', XML, ids=lambda path: path.name)
def test_xml_is_well_formed(path):
    ElementTree.parse(path)
    if shutil.which('xmllint'):
        checked = subprocess.run(['xmllint', '--noout', '--nonet', str(path)], capture_output=True, text=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr


@pytest.mark.parametrize('path', YAML, ids=lambda path: str(path.relative_to(ROOT / 'config')))
def test_yaml_gives_no_key_twice(path):
    assert parse(path.read_text())
    if path.suffix == '.yaml' and path.name != 'bridge.yaml':  # a list
        assert load_yaml(path)


@pytest.mark.parametrize('text', ['a: 1\na: 2', 'a: {b: 1, b: 1}', '- {1: a, 1: b}'])
def test_a_key_given_twice_is_found(text):
    with pytest.raises(yaml.YAMLError, match='given twice'):
        parse(text)


@pytest.mark.skipif(find_spec('ruff') is None, reason='ruff is not installed: pip install -r src/il_policies/requirements.txt')
def test_linters_find_nothing():
    """E, F, W and I are ament_flake8's rules, D is ament_pep257's; pyproject.toml says which do not hold here."""
    checked = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', 'src', 'launch', 'test'], cwd=ROOT,
                             capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
