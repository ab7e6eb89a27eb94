from __future__ import annotations

import os

import pytest

from il_policies.description import DescriptionError, resolve
from il_policies.sim.reach_around import DESCRIPTION


def test_descriptions_are_found_in_ament_prefixes_first(tmp_path, monkeypatch):
    monkeypatch.setenv('AMENT_PREFIX_PATH', '')  # whatever workspaces are sourced
    wheel = resolve(DESCRIPTION)
    assert wheel.name == 'so101.urdf'
    urdf = tmp_path / 'share/example_robot_data/robots/so_arm_description/urdf/so101.urdf'
    urdf.parent.mkdir(parents=True)
    urdf.write_text('<robot/>')
    monkeypatch.setenv('AMENT_PREFIX_PATH', os.pathsep.join(['/nonexistent', str(tmp_path)]))
    assert resolve(DESCRIPTION) == urdf
    monkeypatch.setenv('AMENT_PREFIX_PATH', '')
    assert resolve(DESCRIPTION) == wheel
    with pytest.raises(DescriptionError, match='no_such_robot'):
        resolve('package://no_such_robot/robot.urdf')
    with pytest.raises(DescriptionError, match='must be package://'):
        resolve('robot.urdf')
