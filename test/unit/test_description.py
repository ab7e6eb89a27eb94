from __future__ import annotations

import os

import pytest

from il_policies.description import DescriptionError, read, resolve, root_link
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


def test_names_of_other_packages_become_paths_and_what_is_not_there_stays(tmp_path, monkeypatch):
    mesh = tmp_path / 'share/their_arm/meshes/a.stl'
    mesh.parent.mkdir(parents=True)
    mesh.touch()
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path))
    urdf = tmp_path / 'cell.urdf'
    urdf.write_text('<robot name="cell"><a f="package://their_arm/meshes/a.stl"/><b f=\'package://gone/b.stl\'/><c f="file:///c.stl"/>'
                    '<link name="tip"/><link name="base"/><joint><parent link="base"/><child link="tip"/></joint></robot>')
    text = read(urdf)[1]
    assert f'"{mesh}"' in text and "'package://gone/b.stl'" in text and '"/c.stl"' in text
    assert root_link(urdf) == 'base'
    urdf.write_text('<robot><link name="one"/><link name="two"/></robot>')
    with pytest.raises(DescriptionError, match=r"root links \['one', 'two'\], must be one"):
        root_link(urdf)
