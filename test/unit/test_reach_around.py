from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import cv2
import numpy as np
import pytest

from il_policies.contract import load_contract
from il_policies.description import resolve
from il_policies.sim import reach_around
from il_policies.sim.reach_around import (
    CONTROL_PERIOD,
    DESCRIPTION,
    EPISODE_S,
    FUNNEL,
    GOAL_ANGLE,
    GOAL_RADIUS,
    JOINTS,
    PAN_AXIS,
    PILLAR,
    REACH_TOLERANCE,
    START_X,
    START_Y,
    TIP_HEIGHT,
    ReachAround,
    Scene,
    SceneError,
    expert,
    inverse_kinematics,
    sample_scene,
)


@pytest.fixture(scope='module')
def sim():
    """One simulation without rendering; tests reset it."""
    return ReachAround(camera=False)


def turn(axis, angle) -> np.ndarray:
    """Rodrigues' formula."""
    x, y, z = axis
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


def tip_by_urdf(positions) -> tuple[np.ndarray, np.ndarray]:
    """Position and rotation of the tip at positions (6,), from the URDF's own numbers, without MuJoCo."""
    positions = dict(zip(JOINTS, positions, strict=True))
    joints = {joint.find('child').get('link'): joint for joint in ElementTree.parse(resolve(DESCRIPTION)).iter('joint')
              if joint.get('type') is not None}
    chain, link = [], 'gripper_frame_link'
    while link in joints:
        chain.insert(0, joints[link])
        link = joints[link].find('parent').get('link')
    p, R = np.zeros(3), np.eye(3)
    for joint in chain:
        xyz, (roll, pitch, yaw) = (np.array(joint.find('origin').get(key).split(), float) for key in ('xyz', 'rpy'))
        p = p + R @ xyz
        R = R @ turn((0, 0, 1), yaw) @ turn((0, 1, 0), pitch) @ turn((1, 0, 0), roll)
        if joint.get('type') == 'revolute':
            R = R @ turn(np.array(joint.find('axis').get('xyz').split(), float), positions[joint.get('name')])
    return p, R


def play(sim: ReachAround, scene: Scene, commands) -> np.ndarray:
    """The tip after every control period of an episode. Shape (N, 3)."""
    sim.reset(scene)
    tips = []
    for command in commands:
        sim.step(command)
        tips.append(sim.tip)
    return np.array(tips)


def test_the_tip_is_where_the_urdf_puts_it(sim):
    import mujoco
    rng, data = np.random.default_rng(0), mujoco.MjData(sim.model)
    for _ in range(20):
        positions = rng.uniform(-1.5, 1.5, 6)
        data.qpos[[sim.model.joint(name).qposadr[0] for name in JOINTS]] = positions
        mujoco.mj_kinematics(sim.model, data)
        p, R = tip_by_urdf(positions)
        np.testing.assert_allclose(data.body('gripper_frame_link').xpos, p, atol=1e-6)
        np.testing.assert_allclose(data.body('gripper_frame_link').xmat.reshape(3, 3), R, atol=1e-6)


def test_inverse_kinematics_reaches_with_the_gripper_down():
    tips = np.array([[0.1, 0.02, 0.03], [0.14, 0.0, 0.03], [0.2, -0.08, 0.03], [0.285, 0.03, 0.03], [0.2, 0.0, 0.05]])
    for tip, positions in zip(tips, inverse_kinematics(tips), strict=True):
        p, R = tip_by_urdf(positions)
        np.testing.assert_allclose(p, tip, atol=2e-5)
        np.testing.assert_allclose(R[:, 2], [0, 0, -1], atol=1e-3)
        assert positions[4] == 0


@pytest.mark.parametrize('tip', [(0.6, 0.0, 0.03), (0.0, 0.5, 0.03), (np.nan, 0.0, 0.03)])
def test_inverse_kinematics_refuses_what_is_out_of_reach(tip):
    with pytest.raises(SceneError, match='no pose with the gripper down'):
        inverse_kinematics(np.array([tip]))


def corner(i: int) -> Scene:
    """The goals furthest out of the wide area, with the starts furthest to the other side."""
    angle, y = (GOAL_ANGLE[1], START_Y[0]) if i % 2 else (GOAL_ANGLE[0], START_Y[1])
    radius = GOAL_RADIUS[i // 2]
    return Scene((START_X[i // 2], y), (PAN_AXIS[0] + radius * np.cos(angle), PAN_AXIS[1] + radius * np.sin(angle)))


@pytest.mark.parametrize(('noise', 'scenes'), [
    (0.0, [sample_scene(np.random.default_rng([7, i])) for i in range(4)]),
    (0.003, [sample_scene(np.random.default_rng([7, i])) for i in range(4)]),
    (0.003, [corner(i) for i in range(4)])], ids=['plain', 'noise', 'wide'])
def test_the_expert_reaches_both_ways_within_the_limits(sim, root, noise, scenes):
    contract = load_contract(root / 'config/robots/so101.yaml')
    low, high = np.array([joint.position for joint in contract.action_joints]).T
    velocity = np.array([joint.velocity for joint in contract.action_joints])
    acceleration = np.array([joint.acceleration for joint in contract.action_joints])
    for i, scene in enumerate(scenes):
        for side in (1, -1):
            commands = expert(scene, side, noise, np.random.default_rng(i))
            tips = play(sim, scene, commands)
            assert sim.reached and not sim.touched
            assert np.sign(tips[np.argmax(tips[:, 0] > PILLAR[0]), 1]) == side, 'where it passes the pillar'
            assert (commands > low + 0.01).all() and (commands < high - 0.01).all()
            assert (np.abs(np.diff(commands, axis=0)) / CONTROL_PERIOD < 0.95 * velocity).all()
            assert (np.abs(np.diff(commands, 2, axis=0)) / CONTROL_PERIOD**2 < 0.95 * acceleration).all()
            assert np.hypot(*(tips[-1, :2] - scene.goal)) < 0.01


def test_nothing_before_the_funnel_tells_the_side(sim):
    scene = Scene((0.103, 0.015), (0.28, -0.02))
    left, right = (expert(scene, side, 0.003, np.random.default_rng(5)) for side in (1, -1))
    apart = int(np.argmax(np.abs(left - right).max(axis=1) > 1e-3))
    tip = tip_by_urdf(left[apart])[0]
    np.testing.assert_allclose(tip[:2], FUNNEL, atol=5e-3)


def test_a_symmetric_scene_has_mirrored_ways():
    left, right = (expert(Scene((0.107, 0.0), (0.28, 0.0)), side) for side in (1, -1))
    np.testing.assert_allclose(left[:, 0], -right[:, 0], atol=1e-3)
    np.testing.assert_allclose(left[:, 1:], right[:, 1:], atol=2e-3)


def test_the_straight_way_touches_the_pillar_for_good(sim):
    scene = Scene((0.107, 0.0), (0.28, 0.0))
    x = np.linspace(scene.start[0], scene.goal[0], 150)
    play(sim, scene, inverse_kinematics(np.column_stack([x, np.zeros_like(x), np.full_like(x, TIP_HEIGHT)])))
    assert sim.touched
    for _ in range(20):
        sim.step(inverse_kinematics([[0.107, 0.0, TIP_HEIGHT]])[0])
    assert sim.touched and sim.done
    sim.reset(scene)
    assert not sim.touched


def test_a_goal_is_reached_by_resting_near_it_in_time(sim):
    goal = (0.28, 0.0)
    at = {y: inverse_kinematics([[0.28, y, TIP_HEIGHT]])[0] for y in (0.0, 0.022)}
    rest = [at[0.0]] * 20
    play(sim, Scene(goal, goal), rest[:9])
    assert not sim.reached  # not long enough
    play(sim, Scene(goal, goal), rest)
    assert sim.reached
    play(sim, Scene((0.28, 0.022), goal), [at[0.022]] * 20)
    assert not sim.reached  # not near enough
    play(sim, Scene((0.28, 0.022), goal), [at[0.022]] * round(EPISODE_S / CONTROL_PERIOD) + [at[0.0]] * 100)
    assert not sim.reached and sim.done  # not in time


def test_same_commands_same_motion_whatever_came_before(sim):
    scene = sample_scene(np.random.default_rng(3))
    commands = expert(scene, 1)[:60]
    first = play(ReachAround(camera=False), scene, commands)
    play(sim, Scene(), expert(Scene(), -1)[:40])
    assert np.array_equal(play(sim, scene, commands), first)
    assert sim.time == pytest.approx(60 * CONTROL_PERIOD)


def test_scenes_are_drawn_from_their_areas():
    scenes = [sample_scene(np.random.default_rng([0, i])) for i in range(200)]
    assert scenes[0] == sample_scene(np.random.default_rng([0, 0])) != scenes[1]
    x, y = np.array([scene.goal for scene in scenes]).T
    assert 0.275 <= x.min() and x.max() <= 0.285 and -0.03 <= y.min() < -0.02 and 0.02 < y.max() <= 0.03
    assert all(PILLAR[0] > scene.start[0] for scene in scenes)


def test_wide_goals_are_reached_by_chance_once_in_seven_times():
    """Brute force over an evaluation's goals: who goes to any one of them, or knows the best place to go to."""
    goals = np.array([sample_scene(np.random.default_rng([0, i]), 'wide').goal for i in range(400)])
    radius = np.hypot(goals[:, 0] - PAN_AXIS[0], goals[:, 1] - PAN_AXIS[1])
    assert 0.243 <= radius.min() and radius.max() <= 0.252 and goals[:, 1].min() < -0.09 and goals[:, 1].max() > 0.09
    near = np.linalg.norm(goals[:, None] - goals, axis=-1) < REACH_TOLERANCE
    assert 0.12 < (near.sum() - 400) / (400 * 399) < 1 / 6 and near.mean(axis=0).max() < 0.2
    with pytest.raises(SceneError, match="goals is 'far'; valid: narrow, wide"):
        sample_scene(np.random.default_rng(0), 'far')


@pytest.mark.parametrize('command', [[0.0] * 5, [0.0] * 5 + [np.nan]])
def test_commands_that_mean_nothing_are_refused(sim, command):
    with pytest.raises(ValueError, match='6 finite positions'):
        sim.step(command)


def test_scenes_that_mean_nothing_are_refused_and_change_nothing(sim):
    sim.reset(Scene())
    for scene, fault in ((replace(Scene(), start=(0.6, 0.0)), 'no pose'),
                         (replace(Scene(), goal=(np.inf, 0.0)), 'goal')):
        with pytest.raises(SceneError, match=fault):
            sim.reset(scene)
    assert sim.scene == Scene()


def test_the_camera_sees_pillar_goal_and_arm():
    if os.environ.get('MUJOCO_GL') == 'disable':
        pytest.skip('no libEGL on this machine: nothing can be rendered')
    sim = ReachAround()
    before = sim.data.qpos.copy()
    image = sim.render((96, 128)).astype(int)
    assert image.shape == (96, 128, 3)
    r, g, b = np.moveaxis(image, -1, 0)
    red, green, yellow = (r > 1.8 * g) & (r > 1.8 * b), (g > 1.5 * r) & (g > 1.2 * b), (r > 1.5 * b) & (g > 1.5 * b)
    assert red.sum() > 60 and green.sum() > 15 and yellow.sum() > 300
    # The goal lies nearer to the camera than the pillar, the arm behind it.
    assert np.argwhere(green)[:, 0].mean() > np.argwhere(red)[:, 0].mean() > np.argwhere(yellow)[:, 0].mean()

    np.testing.assert_array_equal(sim.render_pose(sim.joint_positions, sim.scene.goal, (96, 128)), image)
    moved = sim.render_pose(expert(Scene(), 1)[80], (0.28, 0.03), (96, 128))
    assert (np.abs(moved.astype(int) - image).max(axis=2) > 50).sum() > 300
    assert np.array_equal(sim.data.qpos, before)

    def photo(*goal):
        return cv2.imdecode(np.frombuffer(sim.photograph((96, 128), *goal), np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)

    assert np.abs(photo() - image).mean() < 3 and np.array_equal(photo(), photo(sim.scene.goal))
    other = np.abs(photo((0.27, 0.09)) - photo()).max(axis=2) > 60
    assert 20 < other.sum() < 150, 'two discs differ and nothing else'
    sim.close()


def test_a_machine_that_cannot_render_says_what_to_install(monkeypatch):
    monkeypatch.setenv('MUJOCO_GL', 'disable')
    with pytest.raises(reach_around.SceneError, match='libegl1'):
        ReachAround(camera=True)


def test_a_moving_goal_slides_to_and_fro_on_its_arc():
    scene = Scene(goal=(PAN_AXIS[0] + 0.25 * np.cos(0.3), PAN_AXIS[1] + 0.25 * np.sin(0.3)), goal_speed=0.2)
    offset = scene.goal_at(np.array([0.0, 0.5, 1.0, 4.0, 4.5, 5.0])) - PAN_AXIS
    np.testing.assert_allclose(np.hypot(*offset.T), 0.25)
    np.testing.assert_allclose(np.arctan2(offset[:, 1], offset[:, 0]), [0.3, 0.4, 0.3, -0.3, -0.4, -0.3], atol=1e-9)
    assert scene.goal_at(1.0).shape == (2,)
    np.testing.assert_array_equal(Scene().goal_at(3.0), Scene().goal)


@pytest.mark.parametrize('side', [-1, 1])
@pytest.mark.parametrize('speed', [-0.08, 0.08])
def test_the_expert_follows_a_moving_goal_within_the_limits(sim, root, side, speed):
    scene = Scene((0.105, 0.01), (PAN_AXIS[0] + 0.25 * np.cos(0.35), PAN_AXIS[1] + 0.25 * np.sin(0.35)), speed)
    targets = expert(scene, side)
    still = expert(Scene(scene.start, tuple(scene.goal_at(0.5))), side)
    np.testing.assert_allclose(targets[25], still[25], atol=1e-4, err_msg='as if the goal had always been there')
    contract = load_contract(root / 'config/robots/so101.yaml')
    velocity, acceleration = np.abs(np.diff(targets, axis=0)) / 0.02, np.abs(np.diff(targets, n=2, axis=0)) / 0.02 ** 2
    for joint, v, a in zip(contract.action_joints, velocity.max(axis=0), acceleration.max(axis=0)):
        assert v < joint.velocity and a < joint.acceleration
    sim.reset(scene)
    for command in targets:
        sim.step(command)
    assert sim.reached and not sim.touched
