"""The robot of any contract in MuJoCo: does it do as it is told, and is what it shows true."""
from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from il_policies.contract import Action, Contract, Joint, Output, Stream, load_contract
from il_policies.description import DescriptionError, resolve
from il_policies.sim.arm import PHYSICS_STEP, SERVO_LAG, Arm
from il_policies.sim.reach_around import DESCRIPTION, ReachAround, Scene, expert

ROBOTS = Path(__file__).parents[2] / 'config' / 'robots'
WHEEL = 'package://example-robot-data/robots/'
CAMERA = Stream(topic='image', type='sensor_msgs/msg/CompressedImage', rate=30.0, max_age=0.1, image_size=(120, 160))
RENDERS = pytest.mark.skipif(os.environ.get('MUJOCO_GL') == 'disable', reason='no libEGL on this machine: no images')


def contract_of(description: str, joints: list[Joint], cameras=()) -> Contract:
    """A contract of these joints."""
    names = tuple(joint.name for joint in joints)
    state = Stream(topic='joint_states', type='sensor_msgs/msg/JointState', rate=100.0, max_age=0.1,
                   field='position', names=names)
    return Contract(robot='test', tried_on='checked', description=description, control_rate=50.0, policy_rate=10.0,
                    joints=tuple(joints), observations={'joint_positions': state, **{name: CAMERA for name in cameras}},
                    action=Action(joints=names, topic='command', outputs=(Output('out', 'sensor_msgs/msg/JointState'),)))


def from_urdf(description: str, speed: float, acceleration: float, tolerance: float) -> Contract:
    """A contract of every joint of a URDF that moves, within its limits."""
    joints = []
    for joint in ElementTree.parse(resolve(description)).getroot().iter('joint'):
        if joint.get('type') in ('revolute', 'prismatic') and joint.find('mimic') is None:
            low, high = (float(joint.find('limit').get(key)) for key in ('lower', 'upper'))
            joints.append(Joint(joint.get('name'), (low, high), speed, acceleration, 0.1, tolerance))
    return contract_of(description, joints)


def written(folder: Path, *parts: str) -> Path:
    """A URDF of these parts."""
    path = folder / 'robot.urdf'
    path.write_text(f'<?xml version="1.0"?>\n<robot name="test">{"".join(parts)}</robot>')
    return path


def tour(contract: Contract, start: np.ndarray, seed: int, targets: int = 3) -> np.ndarray:
    """Commands at 50 Hz that take all joints at once to random places, and rest there. Shape (T, D).

    Each goes by a trapezoid at its speed and acceleration.
    """
    rng, at, rows = np.random.default_rng(seed), np.array(start, dtype=float), []
    for _ in range(targets):
        goal = np.array([rng.uniform(*joint.position) for joint in contract.action_joints])
        times = np.arange(0, max(abs(g - a) / j.velocity + j.velocity / j.acceleration
                                 for g, a, j in zip(goal, at, contract.action_joints)) + 0.3, 0.02)
        columns = []
        for a, g, joint in zip(at, goal, contract.action_joints):
            distance = abs(g - a)
            v = min(joint.velocity, np.sqrt(distance * joint.acceleration))
            ramp = v / joint.acceleration
            end = distance / v + ramp if v else 0.0
            t, rest = np.minimum(times, end), np.maximum(end - times, 0.0)
            braking = distance - joint.acceleration * rest**2 / 2
            s = np.where(t < ramp, joint.acceleration * t**2 / 2, np.where(rest < ramp, braking, v * (t - ramp / 2)))
            columns.append(a + np.sign(g - a) * s)
        rows.append(np.column_stack(columns))
        at = goal
    return np.vstack(rows)


CONTRACTS = {'so101': load_contract(ROBOTS / 'so101.yaml'), 'franka': load_contract(ROBOTS / 'franka.yaml'),
             'aloha': load_contract(ROBOTS / 'aloha.yaml'),
             'ur5': from_urdf(WHEEL + 'ur_description/urdf/ur5_robot.urdf', 1.5, 6.0, 0.2),
             'xarm7': from_urdf(WHEEL + 'xarm_description/urdf/xarm7.urdf', 2.0, 10.0, 0.1)}


@pytest.mark.parametrize('name', CONTRACTS)
def test_any_arm_follows_the_limits_of_its_contract_within_its_tolerances(name):
    contract, arm = CONTRACTS[name], Arm(CONTRACTS[name], camera=False)
    D = len(arm.joints)
    commands = tour(contract, arm.joint_positions[:D], seed=1)
    off = []
    for command in commands:
        arm.command(command)
        arm.advance(round(0.02 / PHYSICS_STEP))
        off.append(np.abs(arm.joint_positions[:D] - command))
    off = np.array(off)
    tolerance = np.array([joint.tracking_tolerance for joint in contract.action_joints])
    # All of it is the servos' lag, a position behind at full speed: half of each tolerance is left for whoever is in between.
    lag = np.array([SERVO_LAG * joint.velocity for joint in contract.action_joints])
    assert (off.max(axis=0) < np.minimum(tolerance / 2, 1.25 * lag)).all(), (off.max(axis=0) / tolerance).round(2)
    assert off[-1].max() < 2e-3
    assert np.abs(np.diff(commands, axis=0)).max() > 0.9 * 0.02 * max(joint.velocity for joint in contract.action_joints)


@pytest.mark.parametrize('name', CONTRACTS)
def test_it_starts_within_its_limits_and_stays_there(name):
    arm = Arm(CONTRACTS[name], camera=False)
    start = arm.joint_positions.copy()
    for joint, at in zip(CONTRACTS[name].action_joints, start):
        assert joint.position[0] <= at <= joint.position[1]
    arm.advance(500)
    assert np.abs(arm.joint_positions - start).max() < 1e-4 and np.abs(arm.joint_velocities).max() < 1e-3
    arm.command(start[:len(arm.joints)] + 0.01)
    arm.advance(100)
    arm.reset()
    assert np.array_equal(arm.joint_positions, start) and not arm.joint_velocities.any()


def test_a_tight_tolerance_makes_stiffer_servos():
    """A third of the tolerance at full speed, though SERVO_LAG would be more."""
    arm = Arm(from_urdf(WHEEL + 'xarm_description/urdf/xarm7.urdf', 2.0, 10.0, 0.09), camera=False)
    for t in np.arange(0, 100) * PHYSICS_STEP:
        arm.command(np.full(7, 2.0 * t))
        arm.advance()
    assert 0.8 - arm.joint_positions == pytest.approx(np.full(7, 0.03), rel=0.1)


@pytest.mark.parametrize(('name', 'mimics'), [
    ('franka', {'panda_finger_joint2': ('panda_finger_joint1', 1.0, 0.0)}),
    ('aloha', {f'{side}_{finger}_finger': (f'{side}_gripper', 0.037, -0.00194) for side in ('left', 'right')
               for finger in ('left', 'right')})])
def test_mimic_joints_follow_theirs(name, mimics):
    contract, arm = CONTRACTS[name], Arm(CONTRACTS[name], camera=False)
    assert set(mimics) == set(arm.measured) - set(arm.joints)
    moved = []
    for command in tour(contract, arm.joint_positions[:len(arm.joints)], seed=2):
        arm.command(command)
        arm.advance(5)
        at = dict(zip(arm.measured, arm.joint_positions))
        for joint, (leader, factor, offset) in mimics.items():
            assert at[joint] == pytest.approx(factor * at[leader] + offset, abs=5e-4)
        moved.append([at[joint] for joint in mimics])
    assert (np.ptp(moved, axis=0) > 0.008).all()


def links(names: str) -> str:
    """Links named by a letter each."""
    return ''.join(f'<link name="{name}"><inertial><mass value="0.5"/><inertia ixx="0.002" iyy="0.002" izz="0.002" ixy="0" '
                   'ixz="0" iyz="0"/></inertial></link>' for name in names)


def hinge(name: str, parent: str, child: str, more: str = '', at: str = '0 0 0.3') -> str:
    """A joint about y, ±2 rad."""
    return (f'<joint name="{name}" type="revolute"><parent link="{parent}"/><child link="{child}"/><origin xyz="{at}"/>'
            f'<axis xyz="0 1 0"/><limit lower="-2" upper="2" effort="0" velocity="3"/>{more}</joint>')


def a_joint(name: str, low: float = -1.5, high: float = 1.5) -> Joint:
    return Joint(name, (low, high), 1.0, 5.0, 0.1, 0.2)


def test_joints_that_nobody_commands_stand_and_mimics_of_mimics_follow(tmp_path):
    urdf = written(tmp_path, links('abcde'), hinge('j1', 'a', 'b'), hinge('j2', 'b', 'c'),
                   hinge('j3', 'c', 'd', '<mimic joint="j1" multiplier="-0.5"/>'),
                   hinge('j4', 'd', 'e', '<mimic joint="j3" multiplier="2" offset="0.1"/>'))
    arm = Arm(contract_of('package://no/where.urdf', [a_joint('j1', 0.4, 1.5)]), camera=False, description=urdf)
    assert arm.joints == ('j1',) and arm.measured == ('j1', 'j2', 'j3', 'j4')
    np.testing.assert_allclose(arm.joint_positions, [0.95, 0.0, -0.475, -0.85], atol=1e-9)  # the middle, as 0 is not allowed
    arm.command([0.5])
    arm.advance(250)
    np.testing.assert_allclose(arm.joint_positions, [0.5, 0.0, -0.25, -0.4], atol=1e-3)


def test_a_mimic_may_be_what_is_commanded(tmp_path):
    urdf = written(tmp_path, links('abc'), hinge('j1', 'a', 'b'), hinge('j2', 'b', 'c', '<mimic joint="j1" multiplier="2"/>'))
    arm = Arm(contract_of('', [a_joint('j2')]), camera=False, description=urdf)
    arm.command([0.8])
    arm.advance(250)
    np.testing.assert_allclose(dict(zip(arm.measured, arm.joint_positions))['j1'], 0.4, atol=2e-3)
    np.testing.assert_allclose(arm.joint_positions[0], 0.8, atol=2e-3)


def test_it_starts_where_ros2_control_does(tmp_path):
    joint = '<joint name="j1"><state_interface name="position"><param name="initial_value">{}</param></state_interface></joint>'
    for told, starts in (('0.7', 0.7), ('9.0', 1.5)):  # within what the contract allows
        urdf = written(tmp_path, links('ab'), hinge('j1', 'a', 'b'), '<ros2_control name="x" type="system">',
                       joint.format(told), '</ros2_control>')
        assert Arm(contract_of('', [a_joint('j1')]), camera=False, description=urdf).joint_positions == pytest.approx([starts])
    urdf.write_text(urdf.read_text().replace('9.0', 'nine'))
    with pytest.raises(DescriptionError, match='initial positions: .*nine'):
        Arm(contract_of('', [a_joint('j1')]), camera=False, description=urdf)


@pytest.mark.parametrize('mesh', ['package://gone/b.stl', 'b.dae', 'ascii.stl', 'cut.stl'])
def test_descriptions_without_masses_or_meshes_do(tmp_path, mesh):
    for name, content in (('b.dae', b'<COLLADA/>'), ('ascii.stl', b'solid b\n' * 20), ('cut.stl', bytes(80) + b'\x07' * 9)):
        (tmp_path / name).write_bytes(content)
    mesh = mesh if '://' in mesh else f'file://{tmp_path}/{mesh}'
    urdf = written(tmp_path, f'<link name="a"/><link name="b"><visual><geometry><mesh filename="{mesh}"/></geometry></visual>',
                   '</link>', hinge('j1', 'a', 'b'))
    arm = Arm(contract_of('', [a_joint('j1')]), camera=False, description=urdf)
    for t in np.arange(0.0, 1.0, 0.02):
        arm.command([t])
        arm.advance(5)
    assert abs(arm.joint_positions[0] - 0.98) < 0.04


def test_what_cannot_be_simulated_is_told_in_one_line(tmp_path):
    contract = CONTRACTS['franka']
    for changed, words in (({'description': 'package://no_such_robot/robot.urdf'}, 'no_such_robot/robot.urdf: not found'),
                           ({'description': DESCRIPTION}, r"action.joints \['panda_joint1', .*'\] are not in .*so101.urdf; "
                            'joints there: shoulder_pan, ')):
        with pytest.raises(DescriptionError, match=words):
            Arm(replace(contract, **changed), camera=False)
    for path, text, words in ((tmp_path / 'no.urdf', None, 'no.urdf: not readable: .*No such file'),
                              (tmp_path / 'x.urdf', 'hello', 'no URDF that MuJoCo can read'),
                              (tmp_path / 'x.urdf.xacro', '<robot/>', r'is a xacro; expand it first: xacro x.urdf.xacro >')):
        if text:
            path.write_text(text)
        with pytest.raises(DescriptionError, match=words) as caught:
            Arm(contract, camera=False, description=path)
        assert '\n' not in str(caught.value)


def test_joint_states_may_come_more_often_than_physics_usually_steps():
    for rate, period in ((100.0, 0.004), (250.0, 0.004), (500.0, 0.002), (1000.0, 0.001)):
        contract = CONTRACTS['xarm7']
        state = replace(contract.observations['joint_positions'], rate=rate)
        arm = Arm(replace(contract, observations={'joint_positions': state}), camera=False)
        assert arm.step_period == pytest.approx(period)
        arm.command(np.full(7, 0.2))
        arm.advance(round(0.4 / period))
        np.testing.assert_allclose(arm.joint_positions, 0.2, atol=1e-3)


# --- cameras ----------------------------------------------------------------------------------------------------------
def seen(arm: Arm, camera: str, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where in a camera's picture points (N, 3) are: columns, rows in [-1, 1], and whether before it. By the pinhole model."""
    position, axes = arm.data.camera(camera).xpos, arm.data.camera(camera).xmat.reshape(3, 3)
    right, up, back = ((points - position) @ axes).T
    scale = np.tan(np.radians(arm.model.camera(camera).fovy[0]) / 2)
    return np.column_stack([right / -back / scale * size[0] / size[1], up / -back / scale, -back])


@RENDERS
@pytest.mark.parametrize('name', CONTRACTS)
def test_cameras_around_an_arm_see_all_of_it_from_different_sides(name):
    cameras = ('one', 'two', 'three')
    contract = replace(CONTRACTS[name], observations={**{k: v for k, v in CONTRACTS[name].observations.items() if not v.is_image},
                                                      **{camera: CAMERA for camera in cameras}})
    arm = Arm(contract)
    assert arm.frames == {camera: camera for camera in cameras}
    images = []
    for camera in cameras:
        where = seen(arm, camera, arm.data.xpos[1:], CAMERA.image_size)
        assert (np.abs(where[:, :2]) < 1).all() and (where[:, 2] > 0).all()
        images.append(arm.render(CAMERA.image_size, camera).astype(int))
        assert images[-1].shape == (120, 160, 3) and images[-1].std() > 10, 'something is to be seen'
    assert all(np.abs(images[i] - images[j]).mean() > 3 for i, j in ((0, 1), (0, 2), (1, 2)))
    arm.close()


@RENDERS
def test_aloha_has_its_cameras_where_its_description_has_their_optical_frames():
    contract, arm = CONTRACTS['aloha'], Arm(CONTRACTS['aloha'])
    assert arm.frames == {name: f'{name}_optical_frame' for name in contract.cameras} and len(arm.frames) == 3
    before = {name: arm.render((60, 80), name).astype(int) for name in contract.cameras}
    for side in ('left', 'right'):  # each wrist's camera sees its own fingers, in the middle
        for finger in ('left', 'right'):
            where = seen(arm, f'{side}_wrist', arm.data.body(f'{side}_{finger}_finger_link').xpos[None], (240, 320))[0]
            assert abs(where[0]) < 0.5 and abs(where[1]) < 1 and where[2] > 0
    arm.command(arm.joint_positions[:14] + np.eye(14)[5])  # left_wrist_rotate
    arm.advance(200)
    turned = {name: np.abs(arm.render((60, 80), name) - before[name]).mean() for name in contract.cameras}
    assert turned['left_wrist'] > 10 and turned['right_wrist'] < 5
    arm.close()


@RENDERS
def test_a_wrist_camera_without_a_frame_follows_the_end_effector():
    arm = Arm(CONTRACTS['franka'])
    for joint in (0, 6):
        arm.command(arm.joint_positions[:8] + 0.8 * np.eye(8)[joint])
        arm.advance(300)
        tip = arm.data.body('panda_hand_tcp').xpos
        where = seen(arm, 'wrist', tip[None], (240, 320))[0]
        assert np.abs(where[:2]).max() < 0.7 and 0.1 < where[2] < 0.3
    assert arm.render((60, 80), 'wrist').std() > 10, 'COLLADA cannot be drawn: the collision shapes are'
    arm.close()


@RENDERS
def test_more_cameras_do_not_change_a_task():
    commands, paths = expert(Scene(), 1)[:80], []
    for cameras in ((), ('wrist', 'side')):
        sim = ReachAround(cameras=cameras)
        for command in commands:
            sim.step(command)
        assert set(sim.frames) == {'front', *cameras}
        photos = [sim.photograph((60, 80), camera=name) for name in cameras]
        paths.append((sim.joint_positions.copy(), sim.render((60, 80)), photos))
    assert np.array_equal(paths[0][0], paths[1][0])
    assert np.abs(paths[0][1].astype(int) - paths[1][1]).max() <= 1  # contexts may round apart
    assert len(set(paths[1][2])) == 2
    wrist, other = (sim.model.camera(name).bodyid[0] for name in ('wrist', 'side'))
    assert sim.model.body(wrist).name == 'gripper_frame_link' and other == 0
