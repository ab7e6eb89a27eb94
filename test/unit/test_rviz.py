"""What RViz is told to show: only what it can, and what the visualizer publishes."""
from __future__ import annotations

import re

import pytest
import yaml

from il_runtime import scene

RVIZ = {
    'Panels': {f'rviz_common/{name}' for name in ('Displays', 'Views', 'Selection', 'Time', 'Tool Properties', 'Transformation')},
    'Displays': {'rviz_common/Group', *(f'rviz_default_plugins/{name}' for name in (
        'Axes', 'Camera', 'Grid', 'Image', 'InteractiveMarkers', 'Marker', 'MarkerArray', 'Path', 'PointCloud2', 'PointStamped',
        'Pose', 'RobotModel', 'TF', 'Wrench'))},
    'Tools': {f'rviz_default_plugins/{name}' for name in ('Interact', 'MoveCamera', 'Select', 'FocusCamera', 'Measure')},
    'View': {f'rviz_default_plugins/{name}' for name in ('Orbit', 'FPS', 'TopDownOrtho', 'XYOrbit', 'ThirdPersonFollower')},
}
"""Classes that come with RViz, of those that one might want here."""


@pytest.fixture
def config(root) -> dict:
    return yaml.safe_load((root / 'config/rviz/il.rviz').read_text())


@pytest.fixture
def displays(config) -> dict[str, dict]:
    """By their class."""
    return {display['Class']: display for display in config['Visualization Manager']['Displays']}


def test_all_of_it_comes_with_rviz(config, displays):
    manager = config['Visualization Manager']
    assert {panel['Class'] for panel in config['Panels']} <= RVIZ['Panels']
    assert set(displays) <= RVIZ['Displays'] and len(displays) == len(manager['Displays'])
    assert {tool['Class'] for tool in manager['Tools']} <= RVIZ['Tools']
    assert manager['Views']['Current']['Class'] in RVIZ['View']


def test_its_topics_are_the_visualizers_and_its_qos_hears_them(root, displays):
    node = (root / 'src/il_runtime/il_runtime/visualizer_node.py').read_text()
    published = dict(re.findall(r"create_publisher\((\w+), '(\w+)'", node))
    plans, arm = displays['rviz_default_plugins/MarkerArray'], displays['rviz_default_plugins/RobotModel']
    # From the root, so that a launch file can remap them into a namespace.
    assert plans['Topic']['Value'] == f'/{published["MarkerArray"]}'
    assert arm['Description Topic']['Value'] == f'/{published["String"]}'
    assert [plans['Topic']['Durability Policy'], arm['Description Topic']['Durability Policy']] == ['Volatile', 'Transient Local']


def test_what_can_be_switched_off_is_what_there_is(displays):
    drawn = set(re.findall(r"(?:Shape|_body)\('(\w+)'", open(scene.__file__).read()))
    assert set(displays['rviz_default_plugins/MarkerArray']['Namespaces']) == drawn
