"""Reach around: an SO-101 brings its gripper to a goal behind a pillar, round its left or its right.

Both ways are equally good and start alike, through a funnel in front of the pillar: whoever averages the demonstrations
drives into the pillar. The arm is the URDF of `example-robot-data`; physics is MuJoCo with position servos.

Lengths in [m], angles in [rad], times in [s]. The world frame is the arm's base: x forward, y left, z up, table z = 0.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from il_policies.sim.arm import (  # before mujoco: it chooses how to render
    PHYSICS_STEP,
    SceneError,
    Simulation,
    add_camera,
    add_servo,
    jpeg,
    load_robot,
    look,
    place_cameras,
)

# isort: split
import mujoco

DESCRIPTION = 'package://example-robot-data/robots/so_arm_description/urdf/so101.urdf'
JOINTS = ('shoulder_pan', 'shoulder_lift', 'elbow_flex', 'wrist_flex', 'wrist_roll', 'gripper')
BASE, TIP = 'base_link', 'gripper_frame_link'

CONTROL_PERIOD = 0.02
EPISODE_S = 6.0
"""A goal reached later than this is not reached."""

PILLAR = (0.212, 0.0)
PILLAR_RADIUS = 0.025
PILLAR_HEIGHT = 0.05
"""Low enough for the forearm to pass over it, too high for the gripper."""
TIP_HEIGHT = 0.03
"""Height at which the tip travels, gripper down."""
START_X, START_Y = (0.10, 0.115), (-0.02, 0.02)
GOAL_X, GOAL_Y = (0.275, 0.285), (-0.03, 0.03)
"""The narrow area of goals: straight behind the pillar."""
PAN_AXIS = (0.0388, 0.0)
"""Where the shoulder turns."""
GOALS = ('narrow', 'wide')
GOAL_RADIUS, GOAL_ANGLE = (0.243, 0.252), (-0.4, 0.4)
"""The wide area of goals, about PAN_AXIS: an arc of 0.2 m. Who does not know where on it the goal is comes to rest within
REACH_TOLERANCE of it once in seven times."""

REACH_TOLERANCE = 0.015
"""Largest horizontal distance from the tip to a reached goal."""
REACH_HEIGHT = 0.06
"""Largest height of the tip at a reached goal."""
REST_SPEED = 0.03
"""The tip rests below this speed [m/s]."""
REST_S = 0.2
"""How long the tip rests at a reached goal."""

FUNNEL = (0.14, 0.0)
"""Every demonstration passes here before it turns left or right."""
DETOUR_Y = 0.08
"""Distance at which a demonstration passes the middle of the pillar."""
MOVE_S, LAST_LENGTH = 2.6, 0.135
"""How long a demonstration moves; longer in proportion if it is further than LAST_LENGTH from a detour to the goal."""
HOLD_S = 0.7
GRIPPER = -0.15
"""Closed all but a little: the moving jaw opens forwards, towards the pillar."""

SERVO = {'kp': 17.8, 'damping': 0.6, 'armature': 0.028, 'frictionloss': 0.052, 'force': 3.35}
"""An STS3215 servo at its usual gain: [N·m/rad], [N·m·s/rad], [kg·m²], [N·m], [N·m]."""

CAMERA = 'front'

TASK = 'to the goal round the {side}'
"""What a demonstration does, in words."""


@dataclass(frozen=True)
class Scene:
    """One start and one goal."""

    start: tuple[float, float] = (0.107, 0.0)
    """Where the tip starts: x, y [m]."""
    goal: tuple[float, float] = (0.28, 0.0)
    """Where the tip shall go: x, y [m]."""
    goal_speed: float = 0.0
    """The goal slides about PAN_AXIS, to and fro within GOAL_ANGLE; positive: first to the left [rad/s]."""

    def goal_at(self, time) -> np.ndarray:
        """Where the goal is at `time` (...) [s]: x, y [m]. Shape (..., 2)."""
        time = np.asarray(time, dtype=float)
        if self.goal_speed == 0.0:
            return np.broadcast_to(self.goal, (*time.shape, 2)).astype(float)
        along = np.subtract(self.goal, PAN_AXIS)
        low, width = GOAL_ANGLE[0], GOAL_ANGLE[1] - GOAL_ANGLE[0]
        turned = np.arctan2(along[1], along[0]) - low + self.goal_speed * time
        angle = low + width - np.abs(turned % (2.0 * width) - width)
        return PAN_AXIS + np.hypot(*along) * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def sample_scene(rng: np.random.Generator, goals: Literal['narrow', 'wide'] = 'narrow') -> Scene:
    """A scene drawn uniformly from the area of starts and one of the areas of goals. Raises SceneError for another area."""
    if goals not in GOALS:
        raise SceneError(f'goals is {goals!r}; valid: {", ".join(GOALS)}')
    start = (rng.uniform(*START_X), rng.uniform(*START_Y))
    if goals == 'narrow':
        return Scene(start, (rng.uniform(*GOAL_X), rng.uniform(*GOAL_Y)))
    radius, angle = rng.uniform(*GOAL_RADIUS), rng.uniform(*GOAL_ANGLE)
    return Scene(start, (PAN_AXIS[0] + radius * math.cos(angle), PAN_AXIS[1] + radius * math.sin(angle)))


@functools.lru_cache(maxsize=2)
def build_model(cameras: tuple[str, ...] = ()) -> mujoco.MjModel:
    """The arm on its table with pillar, goal marker and CAMERA, and other cameras if wanted.

    Shared by all simulations of a process. The arm collides with table and pillar, not with itself.
    """
    spec = load_robot(DESCRIPTION)
    for name in JOINTS:
        add_servo(spec, next(joint for joint in spec.joints if joint.name == name), SERVO['kp'], force=SERVO['force'])

    world, shape = spec.worldbody, mujoco.mjtGeom
    obstacle, ghost = {'contype': 0, 'conaffinity': 1}, {'contype': 0, 'conaffinity': 0}
    world.add_geom(name='table', type=shape.mjGEOM_PLANE, size=[0, 0, 1], rgba=[0.86, 0.87, 0.88, 1], **obstacle)
    world.add_geom(name='pillar', type=shape.mjGEOM_CYLINDER, pos=[*PILLAR, PILLAR_HEIGHT / 2],
                   size=[PILLAR_RADIUS, PILLAR_HEIGHT / 2, 0], rgba=[0.80, 0.24, 0.20, 1], **obstacle)
    goal = world.add_body(name='goal', mocap=True)
    goal.add_geom(type=shape.mjGEOM_CYLINDER, pos=[0, 0, 0.001], size=[REACH_TOLERANCE, 0.001, 0],
                  rgba=[0.10, 0.62, 0.35, 1], **ghost)
    eye = (0.62, -0.24, 0.36)
    add_camera(world, CAMERA, eye, look(eye, (0.125, 0.0, 0.09)), fovy=36)
    if cameras:
        data = mujoco.MjData(spec.compile())
        mujoco.mj_kinematics(data.model, data)
        place_cameras(spec, data, cameras, TIP)

    model = spec.compile()
    for i in (model.joint(name).dofadr[0] for name in JOINTS):
        model.dof_damping[i] = SERVO['damping']
        model.dof_armature[i] = SERVO['armature']
        model.dof_frictionloss[i] = SERVO['frictionloss']
    return model


class ReachAround(Simulation):
    """One simulated arm with its task."""

    def __init__(self, camera: bool = True, cameras: tuple[str, ...] = ()):
        """cameras: others besides CAMERA. Raises SceneError if images are wanted of a machine without EGL."""
        super().__init__(build_model(cameras), JOINTS, {name: name for name in (CAMERA, *cameras)}, camera)
        self._tip = self.model.body(TIP).id
        self._pillar = self.model.geom('pillar').id
        self._posed: mujoco.MjData | None = None
        self.reset(Scene())

    def reset(self, scene: Scene) -> None:
        """Put the arm to rest at the scene's start, commanded to stay there.

        Raises SceneError, and changes nothing, if the start is out of reach.
        """
        positions = inverse_kinematics(np.array([[*scene.start, TIP_HEIGHT]]))[0]
        if not np.isfinite(scene.goal).all():
            raise SceneError(f'goal is {tuple(scene.goal)}, must be finite')
        mujoco.mj_resetData(self.model, self.data)
        self.scene = scene
        self.touched = False
        self.reached = False
        self._rested = 0.0
        self.data.qpos[self._qpos] = positions
        self.data.ctrl[self._ctrl] = positions
        self._update()

    def step(self, command) -> None:
        """Command shape (6,), then advance by one control period."""
        self.command(command)
        self.advance(round(CONTROL_PERIOD / PHYSICS_STEP))

    def advance(self, steps: int = 1) -> None:
        """Advance by physics steps towards the last command."""
        for _ in range(steps):
            before = self.tip
            super().advance()
            speed = np.linalg.norm(self.tip - before) / PHYSICS_STEP
            away = np.hypot(*(self.tip[:2] - self.goal))
            if away < REACH_TOLERANCE and 0.0 < self.tip[2] < REACH_HEIGHT and speed < REST_SPEED:
                self._rested += PHYSICS_STEP
            else:
                self._rested = 0.0
            self.reached |= self._rested >= REST_S and self.time <= EPISODE_S

    def _update(self) -> None:
        self.goal = self.scene.goal_at(self.time)
        """Where the goal is now: x, y [m]. Shape (2,)."""
        self.data.mocap_pos[0, :2] = self.goal
        super()._update()
        self.touched |= bool((self.data.contact.geom == self._pillar).any())

    @property
    def tip(self) -> np.ndarray:
        """Position of the tip [m]. Shape (3,)."""
        return self.data.xpos[self._tip].copy()

    @property
    def done(self) -> bool:
        """Reached, touched, or out of time."""
        return self.reached or self.touched or self.time >= EPISODE_S

    def observation(self) -> dict[str, np.ndarray]:
        """joint_positions (6,) [rad] and goal (2,) [m]."""
        return {**super().observation(), 'goal': self.goal.copy()}

    def render_pose(self, positions, goal: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
        """The camera's image of any pose, shape (6,), and goal, for replays; the simulation stays as it is."""
        if self._posed is None:
            self._posed = mujoco.MjData(self.model)
        self._posed.qpos[self._qpos] = positions
        self._posed.mocap_pos[0] = (*goal, 0.0)
        mujoco.mj_kinematics(self.model, self._posed)
        mujoco.mj_camlight(self.model, self._posed)
        return self._render(self._posed, size, CAMERA)

    def photograph(self, size: tuple[int, int], goal: tuple[float, float] | None = None, camera: str = CAMERA) -> bytes:
        """A camera's image now as a JPEG file, as cameras send it. goal: where CAMERA shows the goal, if not where it is."""
        return jpeg(self.render(size, camera) if goal is None else self.render_pose(self.joint_positions, goal, size))


def inverse_kinematics(tips: np.ndarray, gripper: float = GRIPPER) -> np.ndarray:
    """Joint positions with the tip at each of `tips` (N, 3) [m], gripper down, wrist not rolled. Shape (N, 6).

    Damped least squares, each solution the next one's start. Raises SceneError where a tip is out of reach.
    """
    model, data = build_model(), mujoco.MjData(build_model())
    qpos = np.array([model.joint(name).qposadr[0] for name in JOINTS])
    moving = np.array([model.joint(name).dofadr[0] for name in JOINTS[:4]])
    tip = model.body(TIP).id
    low, high = model.jnt_range[[model.joint(name).id for name in JOINTS]].T
    q = np.array([0.0, -0.5, 0.5, 1.5, 0.0, gripper])
    jacobian_position, jacobian_rotation = np.zeros((3, model.nv)), np.zeros((3, model.nv))
    solutions = []
    for target in np.asarray(tips, dtype=float):
        for _ in range(100):
            data.qpos[qpos] = q
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            # The tip's z axis is the gripper's direction; it turns onto straight down about their cross product.
            turn = np.cross(data.xmat[tip].reshape(3, 3)[:, 2], [0.0, 0.0, -1.0])
            error = np.concatenate([target - data.xpos[tip], 0.1 * turn])  # 0.1 m per rad makes both comparable
            if not np.isfinite(error).all() or np.abs(error).max() < 1e-5:
                break
            mujoco.mj_jacBody(model, data, jacobian_position, jacobian_rotation, tip)
            J = np.concatenate([jacobian_position, 0.1 * jacobian_rotation])[:, moving]  # (6, 4)
            q[:4] += np.clip(np.linalg.solve(J.T @ J + 1e-6 * np.eye(4), J.T @ error), -0.2, 0.2)
            q = np.clip(q, low, high)
        if not np.abs(error).max() < 1e-4:
            raise SceneError(f'no pose with the gripper down at {tuple(np.round(target, 4).tolist())} [m]')
        solutions.append(q.copy())
    return np.array(solutions)


def tips(positions: np.ndarray) -> np.ndarray:
    """Position of the tip [m] in each pose of `positions` (N, 6) [rad], order of JOINTS. Shape (N, 3)."""
    model, data = build_model(), mujoco.MjData(build_model())
    qpos = [model.joint(name).qposadr[0] for name in JOINTS]
    tip = model.body(TIP).id
    found = np.empty((len(positions), 3))
    for i, q in enumerate(positions):
        data.qpos[qpos] = q
        mujoco.mj_kinematics(model, data)
        found[i] = data.xpos[tip]
    return found


def minimum_jerk(u: np.ndarray) -> np.ndarray:
    """0 to 1 with velocity and acceleration zero at both ends, for u in [0, 1]."""
    return u**3 * (10 - 15 * u + 6 * u**2)


def expert(scene: Scene, side: int, noise: float = 0.0, rng: np.random.Generator | None = None) -> np.ndarray:
    """Joint targets at 50 Hz from start through funnel, round the pillar, to the goal, and a rest there. Shape (N, 6).

    A goal that moves is not foreseen: at any time the target is where it would be had the goal always been where it is now.
    side: +1 passes the pillar on its left (y > 0), -1 on its right.
    noise: size of a smooth random deviation from the path [m], zero at both ends; `rng` draws it. Give both sides of a
        scene the same draw, or the way to the funnel tells them apart.
    """
    if side not in (-1, 1):
        raise ValueError(f'side is {side}, valid: +1 (left), -1 (right)')
    # Via points, and direction times relative speed there. The funnel is left slowly and straight ahead, whatever the
    # side; the goal is approached from the side. So the gripper stays 12 mm clear of the pillar, and joints below 85 %
    # of their limits.
    times = np.arange(round(EPISODE_S / CONTROL_PERIOD) + 1) * CONTROL_PERIOD
    goals = scene.goal_at(times)                                                                   # (N, 2)
    # The same timing for both sides, or the speed before the turn would tell which side follows.
    last = np.hypot(goals[:, :1] - PILLAR[0], goals[:, 1:] - (-DETOUR_Y, DETOUR_Y))                # (N, 2)
    move_s = MOVE_S * np.maximum(1.0, last.max(axis=1) / LAST_LENGTH)
    shown = times < move_s + HOLD_S + 0.5 * CONTROL_PERIOD
    times, goals, last, move_s = times[shown], goals[shown], last[shown], move_s[shown]
    N = len(times)
    points = np.empty((N, 4, 2))
    points[:, 0], points[:, 1], points[:, 2], points[:, 3] = scene.start, FUNNEL, (PILLAR[0], side * DETOUR_Y), goals
    lengths = np.linalg.norm(np.diff(points, axis=1), axis=-1)                                     # (N, 3)
    lengths[:, 2] = last.mean(axis=1)
    # A goal far on the other side is reached in a wider bow, behind the pillar.
    bow = 1.0 + 8.0 * np.maximum(0.0, -side * goals[:, 1] - GOAL_Y[1])
    knots = np.concatenate([np.zeros((N, 1)), np.cumsum(lengths, axis=1)], axis=1)                 # (N, 4)
    tangents = np.zeros((N, 4, 2))
    tangents[:, 0] = (points[:, 1] - points[:, 0]) / lengths[:, :1]
    tangents[:, 1], tangents[:, 2, 0], tangents[:, 3] = (0.3, 0.0), bow, (0.0, -0.6 * side)

    s = minimum_jerk(np.clip(times / move_s, 0.0, 1.0))  # (N,) part of the way
    along = s * knots[:, -1]
    rows, k = np.arange(N), np.clip((knots <= along[:, None]).sum(axis=1) - 1, 0, 2)
    length = lengths[rows, k, None]
    u = (along[:, None] - knots[rows, k, None]) / length
    # Quintic Hermite pieces without curvature at the via points: velocity and acceleration are continuous.
    blend = minimum_jerk(u)
    leave, arrive = u - u**3 * (6 - 8 * u + 3 * u**2), -u**3 * (4 - 7 * u + 3 * u**2)
    xy = (points[rows, k] * (1 - blend) + points[rows, k + 1] * blend
          + length * (tangents[rows, k] * leave + tangents[rows, k + 1] * arrive))

    if noise:
        rng = np.random.default_rng() if rng is None else rng
        waves = np.arange(1, 5)
        amplitudes = rng.normal(size=(len(waves), 2)) / np.sqrt(len(waves))
        xy = xy + noise * np.sin(np.pi * s)[:, None] * (np.sin(np.pi * np.outer(s, waves)) @ amplitudes)
    return inverse_kinematics(np.column_stack([xy, np.full(len(xy), TIP_HEIGHT)]))
