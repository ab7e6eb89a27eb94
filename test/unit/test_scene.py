from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from il_policies.contract import ContractError, load_contract
from il_policies.sim.reach_around import tips
from il_runtime.core.ensembling import Blending, Chunk, Ensembler
from il_runtime.core.mode import Mode
from il_runtime.scene import AHEAD, DEED, FAINTEST, INK, LIMIT, PLAN, TRAIL_S, Scene

START = 5000.0
"""A time long after the clock began [s]."""
D = 6


@pytest.fixture
def so101(root):
    return load_contract(root / 'config/robots/so101.yaml')


@pytest.fixture
def scene(so101) -> Scene:
    scene = Scene(so101, keep=8)
    scene.blending = Blending()
    return scene


def told(**changes):
    """A status of a controller that follows chunks."""
    return SimpleNamespace(**{'mode': 2, 'reason': 'following chunks', 'epoch': 7, 'ensembling': 'newest_first', 'live_chunks': 2,
                              'chunk_age': 0.12, 'disagreement': 0.25, 'speed_scale': 100.0, 'clamped_joints': [],
                              'lateness': [], **changes})


def wave(start: float, sequence: int = 0, steps: int = 16, period: float = 0.1, epoch: int = 7, phase: float = 0.0) -> Chunk:
    """All joints swing, each by its own amplitude."""
    t = start - START + period * np.arange(steps)
    return Chunk(start, period, np.sin(t + phase)[:, None] * np.linspace(0.1, 0.6, D), epoch, sequence, start)


def heard(scene: Scene, chunk: Chunk, now: float) -> None:
    scene.chunk(chunk, latency=now - chunk.observed, inference=0.01, now=now)


def of(scene: Scene, namespace: str, now: float) -> list:
    return [shape for shape in scene.shapes(now) if shape.namespace == namespace]


def text(scene: Scene, now: float) -> str:
    return of(scene, 'text', now)[0].text


def test_nothing_has_been_heard_and_that_is_all_there_is_to_see(scene):
    shape, = scene.shapes(START)
    assert (shape.kind, shape.text) == ('text', 'no controller')


def test_a_chunk_is_the_way_of_the_tip_and_the_goal_is_where_the_arm_ends(scene, so101):
    chunk = wave(START)
    heard(scene, chunk, START)
    path, = of(scene, 'chunks', START)
    np.testing.assert_allclose(path.points, tips(chunk.positions), atol=1e-6)
    sticks, balls = of(scene, 'goal', START)
    np.testing.assert_allclose(balls.points[scene.skeleton.tips[0]], tips(chunk.positions[-1:])[0], atol=1e-6)
    # Every stick ends at a link, and begins at another or at the root.
    np.testing.assert_allclose(sticks.points[::2], balls.points, atol=0)
    assert {tuple(p) for p in sticks.points[1::2]} <= {(0.0, 0.0, 0.0), *map(tuple, balls.points)}


def test_chunks_fade_with_age_and_vanish_at_their_end(scene):
    first, second = wave(START, 0), wave(START + 0.8, 1)
    heard(scene, first, START)
    heard(scene, second, START + 0.8)
    opacity = {now: [shape.colour[3] for shape in of(scene, 'chunks', START + now)] for now in (0.8, 1.2, 1.49, 1.51, 2.31)}
    assert opacity[0.8] == pytest.approx([0.7 / 1.5, 1.0])
    assert opacity[1.2] == pytest.approx([0.3 / 1.5, 1.1 / 1.5])
    assert opacity[1.49][0] == FAINTEST
    assert len(opacity[1.51]) == 1 and not opacity[2.31]
    assert all(shape.colour[:3] == PLAN for shape in of(scene, 'chunks', START + 1.2))


def test_the_goal_is_that_of_the_newest_chunk_whatever_the_order_of_arrival(scene):
    new, old = wave(START + 0.5, 1), wave(START, 0)
    heard(scene, new, START + 0.5)
    goal = of(scene, 'goal', START + 0.6)[1].points
    heard(scene, old, START + 0.6)
    assert of(scene, 'goal', START + 0.6)[1].points is goal


def test_a_path_is_worked_out_once(scene, monkeypatch):
    heard(scene, wave(START), START)
    before = {(s.namespace, s.number): s.points for s in scene.shapes(START) if s.namespace in ('chunks', 'goal')}
    calls, positions = [], scene.skeleton.positions
    monkeypatch.setattr(scene.skeleton, 'positions', lambda q: calls.append(len(q)) or positions(q))
    for i in range(1, 10):
        after = {(s.namespace, s.number): s.points for s in scene.shapes(START + 0.1 * i)}
        assert after['chunks', 1] is before['chunks', 1] and (after['goal', 1] == before['goal', 1]).all()
    assert not calls


def test_only_the_last_chunks_and_those_of_the_epoch_are_shown(scene):
    for i in range(12):
        heard(scene, wave(START + 0.01 * i, i), START + 0.01 * i)
    assert len(of(scene, 'chunks', START + 0.2)) == 8
    scene.status(told(epoch=8), START + 0.2)
    assert not of(scene, 'chunks', START + 0.2) and not of(scene, 'goal', START + 0.2)
    heard(scene, wave(START + 0.2, 0, epoch=8), START + 0.2)
    assert len(of(scene, 'chunks', START + 0.2)) == 1


@pytest.mark.parametrize('blending', [Blending(), Blending('oldest_first', 0.01), Blending('latest'),
                                      Blending(max_disagreement=0.5)], ids=lambda b: f'{b.mode}-{b.max_disagreement:g}')
def test_the_path_ahead_is_what_the_controllers_ensembling_gives(scene, so101, blending):
    scene.blending = blending
    reference = Ensembler([joint.tracking_tolerance for joint in so101.action_joints], blending, ramp=0.04)
    reference.reset(7)
    scene.status(told(), START)
    for i in range(3):
        now = START + 0.3 * i
        chunk = wave(now, i, phase=0.6 * i)
        heard(scene, chunk, now)
        reference.add(chunk, now)
        ahead, = of(scene, 'ensembled', now)
        reference.at(now)
    times = np.linspace(now, now + 1.5, AHEAD)
    expected = [reference.at(t).positions for t in times]
    assert ahead.colour == (*DEED, 1.0)
    np.testing.assert_allclose(ahead.points, tips(np.array(expected)), atol=1e-6)
    apart = tips(np.array([chunk.at(t) for t in times]))
    assert blending.mode == 'latest' or np.abs(apart - ahead.points).max() > 1e-3, 'more than the newest chunk'


def test_chunks_that_were_heard_before_their_epoch_was_are_followed_all_the_same(scene):
    heard(scene, wave(START), START)
    assert not of(scene, 'ensembled', START)
    scene.status(told(), START + 0.05)
    assert len(of(scene, 'ensembled', START + 0.1)) == 1


@pytest.mark.parametrize('mode', [mode for mode in Mode if mode != Mode.POLICY])
def test_nothing_is_ahead_unless_the_policy_is_in_charge(scene, mode):
    heard(scene, wave(START), START)
    scene.status(told(mode=int(mode)), START)
    assert not of(scene, 'ensembled', START + 0.1)
    assert len(of(scene, 'chunks', START + 0.1)) == 1


def test_nothing_is_ahead_as_long_as_it_is_not_known_how_chunks_are_blended(scene):
    scene.blending = None
    heard(scene, wave(START), START)
    scene.status(told(), START)
    assert not of(scene, 'ensembled', START + 0.1)


def test_slowed_down_the_arm_gets_less_far_along_the_chunk(scene):
    """At a fifth of full speed a chunk that has 1.5 s to go is followed for 0.3 s of its own."""
    scene.status(told(speed_scale=20.0), START - 1.0)
    for i in range(10):
        scene.shapes(START - 1.0 + 0.1 * i)
    chunk = wave(START)
    heard(scene, chunk, START)
    for now, begun in ((START, 0.0), (START + 0.5, 0.1)):
        ahead, = of(scene, 'ensembled', now)
        ends = tips(np.array([chunk.at(START + begun), chunk.at(START + 0.3)]))
        np.testing.assert_allclose(ahead.points[[0, -1]], ends, atol=1e-6)


def test_clamps_are_red_at_the_joint_and_along_the_path_by_how_far_they_hold_it_back(scene, so101):
    measured, chunk = np.linspace(-0.5, 0.5, D), wave(START)
    scene.joint_state(measured)
    scene.status(told(clamped_joints=['elbow_flex', 'gripper']), START)
    heard(scene, chunk, START)
    tolerance = so101.joints[0].tracking_tolerance
    links = scene.skeleton.positions([measured])[0]
    for now, off, share in ((0.1, 0.0, 0.0), (0.2, 0.5 * tolerance, 0.5), (0.3, 2.0 * tolerance, 1.0)):
        scene.command(chunk.at(START + now - 0.01) + [0, 9, off, 0, 0, 0], START + now - 0.01)  # the second is not clamped
        shapes = scene.shapes(START + now)
        elbow, gripper = (shape for shape in shapes if shape.namespace == 'clamped')
        np.testing.assert_array_equal(elbow.points, links[[scene.skeleton.links.index('lower_arm_link')]])
        np.testing.assert_array_equal(gripper.points, links[[scene.skeleton.links.index('moving_jaw_so101_v1_link')]])
        assert elbow.colour == pytest.approx((*LIMIT, 0.2 + 0.6 * share)) and gripper.colour == pytest.approx((*LIMIT, 0.2))
        assert elbow.size == pytest.approx(gripper.size * (1 + share))
        path, = (shape for shape in shapes if shape.namespace == 'ensembled')
        np.testing.assert_allclose(path.colour[:3], share * np.array(LIMIT) + (1 - share) * np.array(DEED), atol=1e-6)
    assert 'held back by limits: elbow_flex, gripper' in text(scene, START + 0.3)
    scene.status(told(), START + 0.3)
    assert not of(scene, 'clamped', START + 0.4) and of(scene, 'ensembled', START + 0.4)[0].colour[:3] == DEED


def test_a_clamp_of_which_nobody_knows_how_far_it_holds_back_is_red(scene):
    scene.joint_state(np.zeros(D))
    scene.status(told(mode=3, clamped_joints=['elbow_flex', 'tail']), START)
    clamped, = of(scene, 'clamped', START)
    assert clamped.colour == pytest.approx((*LIMIT, 0.8))


def test_commands_leave_a_trail(scene):
    commands = np.sin(np.arange(150) * 0.02)[:, None] * np.ones(D)
    for i, command in enumerate(commands):
        scene.command(command, START + 0.02 * i)
    trail, = of(scene, 'commanded', START + 3.0)
    shown = [i for i in range(150) if 0.02 * i >= 3.0 - TRAIL_S - 1e-6]
    np.testing.assert_allclose(trail.points, tips(commands[shown]), atol=1e-6)
    scene.command(np.zeros(D), START + 3.5)  # armed again, elsewhere
    assert not of(scene, 'commanded', START + 3.5)
    scene.command(np.ones(D), START + 3.52)
    trail, = of(scene, 'commanded', START + 3.52)
    np.testing.assert_allclose(trail.points, tips(np.outer([0.0, 1.0], np.ones(D))), atol=1e-6)
    assert not of(scene, 'commanded', START + 10.0)


def test_words(scene):
    scene.status(told(lateness=[0.0002] * 98 + [0.003] * 2), START)
    for latency in (0.050, 0.034):
        scene.chunk(wave(START), latency, 0.012, START)
    assert text(scene, START).splitlines() == [
        'POLICY: following chunks', 'newest_first of 2, newest 120 ms old', 'disagreement 0.25 tolerances',
        'observation to chunk 34 ms, at most 50 ms; inference 12 ms', 'loop late by 3.0 ms (p99)']
    assert of(scene, 'text', START)[0].colour[:3] == INK
    assert text(scene, START).isascii()  # RViz has few other letters
    assert text(scene, START + 1.5).splitlines()[0] == 'controller silent for 1.5 s; it said:'
    scene.status(told(mode=5, reason='joint states older than 0.100 s, ' + 'and so on ' * 8, live_chunks=0, chunk_age=np.nan,
                      speed_scale=20.0), START + 2.0)
    lines = text(scene, START + 2.0).splitlines()
    assert lines[0].startswith('FAULT: joint states older') and max(map(len, lines)) <= 64
    assert 'no live chunk, speed 20 %' in lines and of(scene, 'text', START + 2.0)[0].colour[:3] == LIMIT


def test_no_two_shapes_are_taken_for_one_and_all_are_finite(scene):
    for i in range(10):
        heard(scene, wave(START + 0.1 * i, i), START + 0.1 * i)
        scene.command(np.full(D, 0.1 * i), START + 0.1 * i)
    scene.joint_state(np.zeros(D))
    scene.status(told(clamped_joints=['gripper']), START + 1.0)
    shapes = scene.shapes(START + 1.0)
    assert len({(shape.namespace, shape.number) for shape in shapes}) == len(shapes) > 12
    assert {shape.namespace for shape in shapes} == {'text', 'chunks', 'goal', 'arm', 'clamped', 'commanded', 'ensembled'}
    assert all(np.isfinite(shape.points).all() and shape.size > 0 for shape in shapes)


def test_after_a_jump_of_the_clock_nothing_of_before_is_left(scene):
    scene.status(told(), START)
    heard(scene, wave(START), START)
    scene.command(np.zeros(D), START)
    scene.reset()
    scene.status(told(epoch=8), 10.0)
    assert {shape.namespace for shape in scene.shapes(10.0)} == {'text'}
    heard(scene, wave(10.0, epoch=8), 10.0)
    assert len(of(scene, 'ensembled', 10.1)) == 1


def test_a_chunk_of_one_step_has_a_goal_but_no_way(scene):
    heard(scene, wave(START, steps=1), START)
    assert not of(scene, 'chunks', START) and len(of(scene, 'goal', START)) == 2


def planar(q: np.ndarray, y: float) -> tuple[np.ndarray, np.ndarray]:
    """Hand of an arm whose shoulder is at y, and where its finger slides to: q shape (N, 3), each (N, 3)."""
    angles = np.cumsum(q[:, :2], axis=1)
    ones = np.ones(len(q))
    hand = np.stack([0.3 * np.cos(angles).sum(axis=1), y + 0.3 * np.sin(angles).sum(axis=1), ones], axis=1)
    return hand, np.stack([-np.sin(angles[:, 1]), np.cos(angles[:, 1]), 0 * ones], axis=1) * q[:, 2:]


def test_two_arms_have_two_paths_and_a_gripper_of_its_own_output_has_none(two_arms):
    scene = Scene(two_arms)
    assert scene.skeleton.frame == 'world'
    q = np.random.default_rng(0).uniform(-1, 1, (5, 6))
    scene.chunk(Chunk(START, 0.1, q, 1, 0, START), 0.0, 0.0, START)
    left, right = of(scene, 'chunks', START)
    hand, finger = planar(q[:, :3], 0.4)
    np.testing.assert_allclose(left.points, hand + finger, atol=1e-9)  # the last link of an output that has the gripper, too
    np.testing.assert_allclose(right.points, planar(q[:, 3:], -0.4)[0], atol=1e-9)


def test_what_the_action_does_not_move_is_where_it_was_seen_last(two_arms):
    skeleton = Scene(two_arms).skeleton
    q = np.random.default_rng(1).uniform(-1, 1, (1, 6))
    before = skeleton.positions(q)
    skeleton.others(['left_grip', 'rail', 'elsewhere'], [9.0, 2.5, 1.0])
    np.testing.assert_allclose(skeleton.positions(q) - before, np.full_like(before, (2.5, 0, 0)), atol=1e-9)


def test_a_joint_that_mimics_another_follows_it(two_arms):
    skeleton = Scene(replace(two_arms, end_effector='left_thumb')).skeleton
    q = np.random.default_rng(2).uniform(-1, 1, (5, 6))
    hand, finger = planar(q[:, :3], 0.4)
    np.testing.assert_allclose(skeleton.positions(q)[:, skeleton.tips[0]], hand - finger, atol=1e-9)


def test_an_end_effector_that_is_not_there_is_named(two_arms):
    with pytest.raises(ContractError, match="end_effector is 'nose'; links of .*: cart, left_upper"):
        Scene(replace(two_arms, end_effector='nose'))


def arm(side: str, y: float) -> str:
    """Two links in the plane, and a finger that slides."""
    def joint(name, parent, child, origin, kind='continuous', more='<axis xyz="0 0 1"/>'):
        return (f'<joint name="{side}_{name}" type="{kind}"><parent link="{parent}"/><child link="{side}_{child}"/>'
                f'<origin xyz="{origin}"/>{more}</joint>')

    links = ''.join(f'<link name="{side}_{name}"/>' for name in ('upper', 'fore', 'hand', 'finger', 'thumb'))
    sliding = '<axis xyz="0 1 0"/><limit lower="-1" upper="1" velocity="1" effort="1"/>'
    return (links + joint('shoulder', 'cart', 'upper', f'0 {y} 1') + joint('elbow', f'{side}_upper', 'fore', '0.3 0 0')
            + joint('flange', f'{side}_fore', 'hand', '0.3 0 0', 'fixed', '')
            + joint('grip', f'{side}_hand', 'finger', '0 0 0', 'prismatic', sliding)
            + joint('mirror', f'{side}_hand', 'thumb', '0 0 0', 'prismatic',
                    f'{sliding}<mimic joint="{side}_grip" multiplier="-1"/>'))


@pytest.fixture
def two_arms(so101, tmp_path, monkeypatch):
    """A cart that rolls, which the action does not move, with two arms of three joints, an output each for arm and gripper."""
    rail = '<joint name="rail" type="prismatic"><parent link="world"/><child link="cart"/><axis xyz="1 0 0"/>' \
           '<limit lower="-9" upper="9" velocity="1" effort="1"/></joint>'
    urdf = f'<robot name="two"><link name="world"/><link name="cart"/>{rail}{arm("left", 0.4)}{arm("right", -0.4)}</robot>'
    (tmp_path / 'share/two').mkdir(parents=True)
    (tmp_path / 'share/two/two.urdf').write_text(urdf)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path))
    names = tuple(f'{side}_{name}' for side in ('left', 'right') for name in ('shoulder', 'elbow', 'grip'))
    output = so101.action.outputs[0]
    outputs = (replace(output, topic='left', joints=names[:3]), replace(output, topic='right', joints=names[3:5]),
               replace(output, topic='right_gripper', joints=names[5:]))
    return replace(so101, description='package://two/two.urdf', end_effector='',
                   joints=tuple(replace(so101.joints[0], name=name) for name in names),
                   observations={'joint_positions': replace(so101.observations['joint_positions'], names=names)},
                   action=replace(so101.action, joints=names, outputs=outputs))
