from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from il_policies.contract import Contract, ContractError, Joint, load_contract
from il_policies.description import DescriptionError
from il_policies.kinematics import Kinematics
from il_policies.sim.reach_around import TIP, inverse_kinematics, tips

DT = 0.02
REACH = (0.2, 0.0, 0.05)
LENGTHS = np.array([0.3, 0.25, 0.1])
PLANAR = '''<?xml version="1.0"?>
<robot
  name="planar">
  <link name="base"/>
  <link name="upper"><visual><geometry><mesh filename="package://elsewhere/no_such.dae"/></geometry></visual></link>
  <link name="fore"><collision><geometry><mesh filename="package://planar/no_such.stl"/></geometry></collision></link>
  <link name="hand"/><link name="tip"/><link name="finger"/><link name="thumb"/>
  <joint name="shoulder" type="revolute"><parent link="base"/><child link="upper"/><axis xyz="0 0 1"/>
    <limit lower="-1" upper="1" velocity="1" effort="1"/></joint>
  <joint name="elbow" type="continuous"><parent link="upper"/><child link="fore"/>
    <origin xyz="0.3 0 0"/><axis xyz="0 0 1"/></joint>
  <joint name="wrist" type="continuous"><parent link="fore"/><child link="hand"/>
    <origin xyz="0.25 0 0"/><axis xyz="0 0 1"/></joint>
  <joint name="flange" type="fixed"><parent link="hand"/><child link="tip"/><origin xyz="0.1 0 0"/></joint>
  <joint name="grip" type="prismatic"><parent link="hand"/><child link="finger"/><axis xyz="0 1 0"/>
    <limit lower="0" upper="0.04" velocity="1" effort="1"/></joint>
  <joint name="mirror" type="prismatic"><parent link="hand"/><child link="thumb"/><axis xyz="0 -1 0"/>
    <limit lower="0" upper="0.04" velocity="1" effort="1"/><mimic joint="grip"/></joint>
</robot>
'''


@pytest.fixture
def so101(root) -> Contract:
    return load_contract(root / 'config/robots/so101.yaml')


def arm_of(so101: Contract, description: str, end_effector: str, *names: str) -> Contract:
    """The SO-101's contract, rewritten for another arm."""
    joints = tuple(Joint(name, (-3.0, 3.0), 2.0, 10.0, 0.1, 0.3) for name in names)
    stream = replace(so101.observations['joint_positions'], names=names)
    return replace(so101, description=description, end_effector=end_effector, joints=joints,
                   observations={'joint_positions': stream}, action=replace(so101.action, joints=names))


@pytest.fixture
def planar(so101, tmp_path, monkeypatch) -> Contract:
    """An arm that moves in the plane, described without masses and with meshes that are nowhere; gripper first."""
    (tmp_path / 'share/planar').mkdir(parents=True)
    (tmp_path / 'share/planar/arm.urdf').write_text(PLANAR)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path))
    return arm_of(so101, 'package://planar/arm.urdf', 'tip', 'grip', 'wrist', 'elbow', 'shoulder')


def planar_pose(q) -> np.ndarray:
    """x, y and angle of the tip; q in the order grip, wrist, elbow, shoulder."""
    angles = np.cumsum(q[:0:-1])
    return np.array([LENGTHS @ np.cos(angles), LENGTHS @ np.sin(angles), angles[-1]])


def test_a_planar_arm_is_where_trigonometry_puts_it(planar):
    kinematics = Kinematics(planar)
    for q in np.random.default_rng(0).uniform(-2, 2, (20, 4)):
        x, y, angle = planar_pose(q)
        position, rotation = kinematics.pose(q)
        np.testing.assert_allclose(position, [x, y, 0], atol=1e-9)
        np.testing.assert_allclose(rotation[:2, 0], [np.cos(angle), np.sin(angle)], atol=1e-9)


def test_so101_is_where_the_simulator_has_it(so101):
    kinematics = Kinematics(so101)
    assert so101.end_effector == TIP
    poses = np.random.default_rng(1).uniform(-1.5, 1.5, (20, 6))
    np.testing.assert_allclose([kinematics.pose(q)[0] for q in poses], tips(poses), atol=1e-6)


def test_jogging_moves_a_planar_arm_as_trigonometry_has_it(planar):
    kinematics = Kinematics(planar)
    for speed, turn in np.random.default_rng(2).uniform(-1, 1, (20, 2)) * [0.2, 1.0]:
        q = np.array([0.01, 0.6, 1.2, -0.8])
        moved = kinematics.jog(q, [speed, -speed, 0, 0, 0, turn], DT)
        way = planar_pose(moved) - planar_pose(q)
        np.testing.assert_allclose(way[:2], [speed * DT, -speed * DT], atol=1e-4)
        assert way[2] == pytest.approx(turn * DT, abs=1e-3)
        assert moved[0] == q[0]  # the gripper does not move the tip
        # What does not move the arm in its plane does not move it at all.
        np.testing.assert_allclose(kinematics.jog(q, [0, 0, speed, turn, 0, 0], DT), q, atol=1e-9)


@pytest.mark.parametrize('speed', [0.03, 0.1])
@pytest.mark.parametrize('axis', range(3))
@pytest.mark.parametrize('sign', [1, -1])
def test_so101_jogs_along_straight_lines(so101, axis, sign, speed):
    kinematics = Kinematics(so101)
    q = inverse_kinematics(np.array([REACH]))[0]
    begin, direction = kinematics.pose(q)[0], sign * np.eye(3)[axis]
    twist = np.concatenate([speed * direction, np.zeros(3)])
    for i in range(round(0.05 / speed / DT)):
        q = kinematics.jog(q, twist, DT)
        way = tips(q[None])[0] - begin
        assert np.linalg.norm(way - (i + 1) * speed * DT * direction) < 5e-4


@pytest.mark.parametrize('axis', range(6))
def test_six_joints_move_and_turn_along_every_axis_and_no_other(so101, axis):
    kinematics = Kinematics(arm_of(
        so101, 'package://example-robot-data/robots/ur_description/urdf/ur5_robot.urdf', 'tool0', 'shoulder_pan_joint',
        'shoulder_lift_joint', 'elbow_joint', 'wrist_1_joint', 'wrist_2_joint', 'wrist_3_joint'))
    q = np.array([0.0, -1.2, 1.6, -0.4, 1.2, 0.0])
    position, rotation = kinematics.pose(q)
    twist = np.eye(6)[axis] * [0.1, 0.1, 0.1, 0.3, 0.3, 0.3]
    for _ in range(50):
        q = kinematics.jog(q, twist, DT)
    moved, turn = kinematics.pose(q)[0] - position, kinematics.pose(q)[1] @ rotation.T
    turned = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2  # axis · sin(angle)
    np.testing.assert_allclose(moved, twist[:3], atol=1e-3)
    np.testing.assert_allclose(turned, np.sin(twist[3:]), atol=0.01)


def test_so101_turns_in_place_as_far_as_five_joints_can(so101):
    kinematics = Kinematics(so101)
    q = inverse_kinematics(np.array([REACH]))[0]
    begin, before = kinematics.pose(q)
    for _ in range(50):
        q = kinematics.jog(q, [0, 0, 0, 0, 0, 0.5], DT)  # about the vertical gripper
    position, rotation = kinematics.pose(q)
    turned = rotation @ before.T
    assert np.arctan2(turned[1, 0], turned[0, 0]) == pytest.approx(0.5, abs=0.05)
    assert np.linalg.norm(position - begin) < 2e-3


def test_limits_are_never_broken_and_the_gripper_stays(so101):
    kinematics, rng = Kinematics(so101), np.random.default_rng(3)
    low, high = np.array([joint.position for joint in so101.action_joints]).T
    velocity = np.array([joint.velocity for joint in so101.action_joints])
    q = (low + high) / 2
    for i in range(1500):
        if i % 50 == 0:
            twist = rng.normal(size=6) * [0.5, 0.5, 0.5, 2, 2, 2] * rng.choice([0.1, 1, 10])
        moved = kinematics.jog(q, twist, DT)
        assert (moved >= low).all() and (moved <= high).all()
        assert (np.abs(moved - q) <= velocity * DT + 1e-12).all()
        assert moved[-1] == q[-1]
        q = moved
    assert np.isfinite(q).all()


@pytest.mark.parametrize('twist', [(0.1, 0, 0), (0, 0, 0.1), (0, 0.1, 0), (0.3, 0, 0), (0.07, 0, 0.07), (1.0, 0, 0.5)])
def test_an_arm_that_is_asked_for_more_than_it_reaches_comes_to_rest_and_back(so101, twist):
    kinematics = Kinematics(so101)
    velocity = np.array([joint.velocity for joint in so101.action_joints])
    q = inverse_kinematics(np.array([REACH]))[0]
    twist = np.array([*twist, 0, 0, 0])
    steps = max(round(0.7 / np.linalg.norm(twist) / DT), 150)
    way = [q]
    for _ in range(steps):
        way.append(kinematics.jog(way[-1], twist, DT))
    speeds = np.diff(way, axis=0) / DT
    assert (np.abs(speeds) <= velocity + 1e-9).all()
    assert np.abs(np.diff(speeds[-20:], axis=0)).max() < 0.02  # at the end of its reach it does not jump about
    there = kinematics.pose(way[-1])[0]
    back = way[-1]
    for _ in range(steps // 3):
        back = kinematics.jog(back, -twist, DT)
    assert (there - kinematics.pose(back)[0]) @ twist[:3] / np.linalg.norm(twist) > 0.1


def test_what_is_not_finite_is_refused(so101):
    kinematics = Kinematics(so101)
    for q, twist in ((np.full(6, np.nan), np.zeros(6)), (np.zeros(6), [np.inf, 0, 0, 0, 0, 0])):
        with pytest.raises(ValueError, match='not finite'):
            kinematics.jog(q, twist, DT)


def test_contracts_that_do_not_fit_their_description_are_refused(so101, planar):
    for contract, fault in (
            (replace(planar, end_effector='nose'), r"end_effector is 'nose'; links .*: base, upper, fore, hand, tip"),
            (replace(planar, end_effector=''), "end_effector is ''"),
            (replace(planar, end_effector='base'), "end_effector 'base' is moved by no joint"),
            (replace(so101, description=planar.description, end_effector='tip'), r"\['shoulder_pan', .*not in .*shoulder, elbow"),
            (replace(planar, description='package://planar/leg.urdf'), 'not found')):
        with pytest.raises((ContractError, DescriptionError), match=fault):
            Kinematics(contract)


def test_a_file_that_is_no_urdf_is_named(planar, tmp_path):
    (tmp_path / 'share/planar/arm.urdf').write_text('<robot name="x"><link name="a"></robot>')
    with pytest.raises(DescriptionError, match='arm.urdf: no URDF that MuJoCo can read'):
        Kinematics(planar)
