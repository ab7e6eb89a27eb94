"""The contracts in config/robots: what they say of the robots, against descriptions of these robots by others."""
from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from il_policies.contract import load_contract
from il_policies.description import DescriptionError, resolve
from il_policies.kinematics import Kinematics
from il_policies.sim.reach_around import DESCRIPTION, JOINTS

ROBOTS = Path(__file__).parents[2] / 'config' / 'robots'
SIM = ROBOTS.parent / 'sim'
CONTRACTS = {path.stem: load_contract(path) for path in sorted(ROBOTS.glob('*.yaml'))}
WHEEL = 'package://example-robot-data/robots/'
UR5 = WHEEL + 'ur_description/urdf/ur5_robot.urdf'
"""The UR5e's older brother: other lengths, but the same joints and limits."""
FR3 = {'fr3_joint1': (-2.7437, 2.7437, 2.62), 'fr3_joint2': (-1.7837, 1.7837, 2.62), 'fr3_joint3': (-2.9007, 2.9007, 2.62),
       'fr3_joint4': (-3.0421, -0.1518, 2.62), 'fr3_joint5': (-2.8065, 2.8065, 5.26), 'fr3_joint6': (0.5445, 4.5169, 4.18),
       'fr3_joint7': (-3.0159, 3.0159, 5.26), 'fr3_finger_joint1': (0.0, 0.04, 0.2)}
"""Lowest, highest position and velocity, by the maker."""
VIPERX_AXES = ((0, 0, 1, 0, 0, 0), (0, 1, 0, -0.12705, 0, 0), (0, 1, 0, -0.42705, 0, 0.05955), (1, 0, 0, 0, 0.42705, 0),
               (0, 1, 0, -0.42705, 0, 0.35955), (1, 0, 0, 0, 0.42705, 0))
VIPERX_HOME = (0.536494, 0.0, 0.42705)
"""Screw axes of a ViperX 300 S at zero in its base's frame, angular part first, and where its end effector is then, by the maker
(his product of exponentials)."""
VIPERX = {'waist': (-180, 180), 'shoulder': (-106, 72), 'elbow': (-101, 92), 'forearm_roll': (-180, 180),
          'wrist_angle': (-107, 128), 'wrist_rotate': (-180, 180)}
"""Lowest and highest position [deg] of a ViperX 300 S, by the maker."""


def limits(uri: str) -> dict[str, tuple[float, float, float]]:
    """Joint → lowest, highest position and velocity, as the URDF says, for every joint that moves."""
    found = {}
    for joint in ElementTree.parse(resolve(uri)).getroot().iter('joint'):
        limit = joint.find('limit')
        if joint.get('type') in ('revolute', 'prismatic') and joint.find('mimic') is None:
            found[joint.get('name')] = tuple(float(limit.get(key)) for key in ('lower', 'upper', 'velocity'))
    return found


def assert_within(contract, robot: dict[str, tuple[float, float, float]]) -> None:
    """Every limit of the contract's joints that the robot has lies within the robot's."""
    checked = [joint for joint in contract.joints if joint.name in robot]
    assert checked
    for joint in checked:
        lower, upper, velocity = robot[joint.name]
        assert lower <= joint.position[0] < joint.position[1] <= upper, joint.name
        assert joint.velocity <= velocity, joint.name


def test_the_robots_of_the_manual_are_there():
    assert set(CONTRACTS) >= {'so101', 'ur5e', 'franka', 'aloha'}
    assert [len(CONTRACTS[name].action.joints) for name in ('so101', 'ur5e', 'franka', 'aloha')] == [6, 7, 8, 14]


@pytest.mark.parametrize('name', CONTRACTS)
def test_all_of_a_robot_is_seen_limited_and_commanded(name):
    contract = CONTRACTS[name]
    named = [joint.name for joint in contract.joints]
    state = contract.observations[contract.joint_state]
    assert list(contract.action.joints) == named == list(state.names)
    assert contract.control_rate == 50.0  # what its documents promise
    for stream in contract.observations.values():  # a sample may be late by more than one period without being stale
        assert stream.max_age > 2.0 / stream.rate
    for joint in contract.joints:  # it can stop within a quarter of a second
        assert joint.velocity / joint.acceleration <= 0.25
        if 'gripper' in joint.name or 'finger' in joint.name or 'knuckle' in joint.name:
            continue
        assert joint.first_command_tolerance <= joint.tracking_tolerance <= 0.3


@pytest.mark.parametrize('name', sorted(set(CONTRACTS) - {'so101'}))  # whose gripper has nothing to hold in its task
def test_a_gripper_that_holds_something_is_no_following_error(name):
    grippers = [joint for joint in CONTRACTS[name].joints if re.search('gripper|finger|knuckle', joint.name)]
    assert grippers
    for joint in grippers:
        reach = joint.position[1] - joint.position[0]
        assert joint.tracking_tolerance >= reach and joint.first_command_tolerance >= reach


@pytest.mark.parametrize('name', CONTRACTS)
def test_joint_trajectory_controllers_are_told_where_to_go_on_from(name):
    outputs = CONTRACTS[name].action.outputs
    trajectories = any(output.type == 'trajectory_msgs/msg/JointTrajectory' for output in outputs)
    assert trajectories == ('`interpolate_from_desired_state: true`' in (ROBOTS / f'{name}.yaml').read_text())


@pytest.mark.parametrize('name', CONTRACTS)
def test_its_description_has_its_joints_and_allows_its_limits(name):
    contract = CONTRACTS[name]
    try:
        robot = limits(contract.description)
    except DescriptionError as error:
        assert not contract.description.startswith(WHEEL), error  # else it comes with this package's requirements
        package = contract.description.removeprefix('package://').split('/')[0]
        assert re.search(rf'# Yours\b.*?\ndescription: package://{package}/', (ROBOTS / f'{name}.yaml').read_text(), re.DOTALL)
        return
    assert {joint.name for joint in contract.joints} <= set(robot)
    assert_within(contract, robot)


def test_the_contract_of_the_manual_is_one(tmp_path):
    """docs/your-robot.md."""
    blocks = re.findall(r'```yaml\n(.*?)```', (ROBOTS.parents[1] / 'docs' / 'your-robot.md').read_text(), re.DOTALL)
    (tmp_path / 'my_arm.yaml').write_text(blocks[0])
    contract = load_contract(tmp_path / 'my_arm.yaml')
    assert contract.robot == 'my_arm' and contract.cameras == ['wrist']


def test_so101_is_the_simulated_arm():
    assert CONTRACTS['so101'].description == DESCRIPTION and CONTRACTS['so101'].action.joints == JOINTS


def test_ur5e_within_the_limits_of_its_family():
    assert set(limits(UR5)) < {joint.name for joint in CONTRACTS['ur5e'].joints}
    assert_within(CONTRACTS['ur5e'], limits(UR5))


def test_franka_holds_for_the_fr3_too_by_the_command_in_its_head(tmp_path):
    text = (ROBOTS / 'franka.yaml').read_text()
    (tmp_path / 'franka.yaml').write_text(text)
    subprocess.run(re.search(r'^# +(sed .* > fr3\.yaml)$', text, re.MULTILINE)[1], shell=True, check=True, cwd=tmp_path)
    contract = load_contract(tmp_path / 'fr3.yaml')
    assert contract.robot == 'fr3' and {joint.name for joint in contract.joints} == set(FR3)
    assert contract.action.outputs[0].topic == 'fr3_arm_controller/joint_trajectory'
    assert_within(contract, FR3)


def test_franka_reaches_where_its_maker_says():
    """The ready pose of Franka's own examples, whose flange is at 0.307, 0, 0.590, the finger tips 0.1034 below."""
    ready = np.array([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4, 0.02])
    position, rotation = Kinematics(CONTRACTS['franka']).pose(ready)
    assert np.abs(position - [0.307, 0.0, 0.487]).max() < 1e-3
    assert np.abs(rotation[:, 2] - [0, 0, -1]).max() < 1e-3  # fingers down


def test_aloha_is_two_equal_arms_of_seven():
    contract = CONTRACTS['aloha']
    left, right = contract.action.joints[:7], contract.action.joints[7:]
    assert [name.removeprefix('left_') for name in left] == [name.removeprefix('right_') for name in right]
    assert [output.joints for output in contract.action.outputs] == [left, right]
    for side in ('left', 'right'):
        assert_within(contract, {f'{side}_{name}': (np.radians(low), np.radians(high), np.pi)
                                 for name, (low, high) in VIPERX.items()})


def exponential(screw, angle: float) -> np.ndarray:
    """Motion about a screw axis, shape (4, 4), by Rodrigues' formula."""
    (x, y, z), v = screw[:3], np.array(screw[3:])
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    T = np.eye(4)
    T[:3, :3] += np.sin(angle) * K + (1 - np.cos(angle)) * K @ K
    T[:3, 3] = (np.eye(3) * angle + (1 - np.cos(angle)) * K + (angle - np.sin(angle)) * K @ K) @ v
    return T


@pytest.mark.parametrize('side', ['left', 'right'])
def test_aloha_is_as_long_as_its_maker_says(side):
    contract, rng = replace(CONTRACTS['aloha'], end_effector=f'{side}_ee_link'), np.random.default_rng(0)
    kinematics, first = Kinematics(contract), 7 * (side == 'right')
    low, high = np.array([joint.position for joint in contract.action_joints]).T
    across = 1 if side == 'left' else -1  # the arms face each other, 0.469 m from the middle
    base = np.array([[0, across, 0], [-across, 0, 0], [0, 0, 1]])
    for _ in range(50):
        q = rng.uniform(low, high)
        T = np.eye(4)
        for screw, angle in zip(VIPERX_AXES, q[first:first + 6]):
            T = T @ exponential(screw, angle)
        position, rotation = kinematics.pose(q)
        np.testing.assert_allclose(position, base @ (T @ (*VIPERX_HOME, 1))[:3] + [0, 0.469 * across, 0], atol=1e-5)
        np.testing.assert_allclose(rotation, base @ T[:3, :3], atol=1e-5)


def test_alohas_grippers_open_as_their_maker_says():
    """42 to 116 mm between the fingers, over the motor's range in the contract."""
    mimics = [(mimic.get('joint'), float(mimic.get('multiplier')), float(mimic.get('offset')))
              for mimic in ElementTree.parse(resolve(CONTRACTS['aloha'].description)).iter('mimic')]
    for joint in CONTRACTS['aloha'].joints:
        for angle, opening in zip(joint.position, (0.042, 0.116)) if 'gripper' in joint.name else ():
            assert sum(m * angle + offset for name, m, offset in mimics if name == joint.name) == pytest.approx(opening, abs=1e-6)


def test_alohas_urdf_is_what_its_xacro_makes():
    """After a change:  cd config/sim && xacro aloha.urdf.xacro > aloha.urdf"""
    xacro = pytest.importorskip('xacro')
    made = xacro.process_file(str(SIM / 'aloha.urdf.xacro'))
    kept = ElementTree.canonicalize((SIM / 'aloha.urdf').read_text(), strip_text=True)
    assert ElementTree.canonicalize(made.toxml(), strip_text=True) == kept
