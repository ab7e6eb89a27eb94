"""Reach around: an SO-101 brings its gripper to a goal behind a pillar, round its left or its right.

Both ways are equally good and start alike, through a funnel in front of the pillar: whoever averages the demonstrations
drives into the pillar. The arm is the URDF of `example-robot-data`; physics is MuJoCo with position servos.

Lengths in [m], angles in [rad], times in [s]. The world frame is the arm's base: x forward, y left, z up, table z = 0.
"""
from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from il_policies.description import DescriptionError, load_spec  # before mujoco: it chooses how to render

# isort: split
import mujoco

DESCRIPTION = 'package://example-robot-data/robots/so_arm_description/urdf/so101.urdf'
JOINTS = ('shoulder_pan', 'shoulder_lift', 'elbow_flex', 'wrist_flex', 'wrist_roll', 'gripper')
TIP = 'gripper_frame_link'

PHYSICS_STEP = 0.004
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
JPEG_QUALITY = 95

TASK = 'to the goal round the {side}'
"""What a demonstration does, in words."""


class SceneError(DescriptionError):
    """A scene that cannot be simulated; the message says what was received and what is valid."""


@dataclass(frozen=True)
class Scene:
    """One start and one goal."""

    start: tuple[float, float] = (0.107, 0.0)
    """Where the tip starts: x, y [m]."""
    goal: tuple[float, float] = (0.28, 0.0)
    """Where the tip shall go: x, y [m]."""


def sample_scene(rng: np.random.Generator, goals: Literal['narrow', 'wide'] = 'narrow') -> Scene:
    """A scene drawn uniformly from the area of starts and one of the areas of goals. Raises SceneError for another area."""
    if goals not in GOALS:
        raise SceneError(f'goals is {goals!r}; valid: {", ".join(GOALS)}')
    start = (rng.uniform(*START_X), rng.uniform(*START_Y))
    if goals == 'narrow':
        return Scene(start, (rng.uniform(*GOAL_X), rng.uniform(*GOAL_Y)))
    radius, angle = rng.uniform(*GOAL_RADIUS), rng.uniform(*GOAL_ANGLE)
    return Scene(start, (PAN_AXIS[0] + radius * math.cos(angle), PAN_AXIS[1] + radius * math.sin(angle)))


@functools.lru_cache(maxsize=1)
def build_model() -> mujoco.MjModel:
    """The arm on its table with pillar, goal marker and camera; shared by all simulations of a process.

    The arm collides with table and pillar, not with itself.
    """
    spec = load_spec(DESCRIPTION)
    spec.option.timestep = PHYSICS_STEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE

    for mesh in spec.meshes:
        vertices, faces = simplified_stl(Path(mesh.file), cell=0.004)
        mesh.file, mesh.uservert, mesh.userface = '', vertices.ravel(), faces.ravel()
    for geom in spec.geoms:
        if geom.contype:  # collision shapes, the meshes' convex hulls
            geom.contype, geom.conaffinity, geom.group = 1, 0, 3  # group 3 is not drawn
    for name in JOINTS:
        joint = next(joint for joint in spec.joints if joint.name == name)
        spec.add_actuator(
            name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT,
            gaintype=mujoco.mjtGain.mjGAIN_FIXED, gainprm=[SERVO['kp']] + [0.0] * 9,
            biastype=mujoco.mjtBias.mjBIAS_AFFINE, biasprm=[0.0, -SERVO['kp']] + [0.0] * 8,
            ctrllimited=True, ctrlrange=joint.range, forcelimited=True, forcerange=[-SERVO['force'], SERVO['force']])

    world, shape = spec.worldbody, mujoco.mjtGeom
    obstacle, ghost = {'contype': 0, 'conaffinity': 1}, {'contype': 0, 'conaffinity': 0}
    world.add_geom(name='table', type=shape.mjGEOM_PLANE, size=[0, 0, 1], rgba=[0.86, 0.87, 0.88, 1], **obstacle)
    world.add_geom(name='pillar', type=shape.mjGEOM_CYLINDER, pos=[*PILLAR, PILLAR_HEIGHT / 2],
                   size=[PILLAR_RADIUS, PILLAR_HEIGHT / 2, 0], rgba=[0.80, 0.24, 0.20, 1], **obstacle)
    goal = world.add_body(name='goal', mocap=True)
    goal.add_geom(type=shape.mjGEOM_CYLINDER, pos=[0, 0, 0.001], size=[REACH_TOLERANCE, 0.001, 0],
                  rgba=[0.10, 0.62, 0.35, 1], **ghost)
    add_camera(world, CAMERA, position=(0.62, -0.24, 0.36), target=(0.125, 0.0, 0.09), fovy=36)
    world.add_light(pos=[0.4, 0.4, 1.2], dir=[-0.25, -0.3, -1], diffuse=[0.5, 0.5, 0.5], specular=[0.1, 0.1, 0.1],
                    cutoff=90, exponent=0, castshadow=False)
    spec.visual.headlight.ambient = [0.35, 0.35, 0.35]
    spec.visual.headlight.diffuse = [0.35, 0.35, 0.35]
    spec.visual.quality.offsamples = 0  # multisampling makes software rendering several times slower

    model = spec.compile()
    for i in (model.joint(name).dofadr[0] for name in JOINTS):
        model.dof_damping[i] = SERVO['damping']
        model.dof_armature[i] = SERVO['armature']
        model.dof_frictionloss[i] = SERVO['frictionloss']
    return model


def simplified_stl(path: Path, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """A binary STL with the vertices of each cubic cell of that size [m] merged into one.

    Returns vertices (V, 3) float32 and faces (F, 3) int32. The arm's 400,000 triangles take 50 ms to draw without a GPU
    and 2 s to load; merging moves the surface by less than a cell.
    """
    record = np.dtype([('normal', '<f4', 3), ('corners', '<f4', (3, 3)), ('attribute', '<u2')])
    corners = np.frombuffer(path.read_bytes(), record, offset=84)['corners'].reshape(-1, 3)
    cells = np.round((corners - corners.min(axis=0)) / cell).astype(np.int64)
    x, y, z = cells.T
    _, index, count = np.unique((x * (y.max() + 1) + y) * (z.max() + 1) + z, return_inverse=True, return_counts=True)
    vertices = np.stack([np.bincount(index, column) / count for column in corners.T], axis=1)  # mean of each cell
    faces = index.reshape(-1, 3)
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    return vertices.astype(np.float32), faces[first].astype(np.int32)


def add_camera(body, name: str, position, target, fovy: float) -> None:
    """A camera at `position` that looks at `target`, upright; vertical field of view in [deg]."""
    backwards = np.subtract(position, target) / np.linalg.norm(np.subtract(position, target))
    right = np.cross([0.0, 0.0, 1.0], backwards)
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.column_stack([right, np.cross(backwards, right), backwards]).ravel())
    body.add_camera(name=name, pos=position, quat=quaternion, fovy=fovy)


class ReachAround:
    """One simulated arm with its task. Deterministic: the same scene and commands give the same motion."""

    def __init__(self, camera: bool = True):
        """Raises SceneError if images are wanted of a machine without EGL."""
        self.model = build_model()
        self.data = mujoco.MjData(self.model)
        self._qpos = np.array([self.model.joint(name).qposadr[0] for name in JOINTS])
        self._qvel = np.array([self.model.joint(name).dofadr[0] for name in JOINTS])
        self._ctrl = np.array([self.model.actuator(name).id for name in JOINTS])
        self._tip = self.model.body(TIP).id
        self._pillar = self.model.geom('pillar').id
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        self._posed: mujoco.MjData | None = None
        if camera and os.environ.get('MUJOCO_GL') == 'disable':
            raise SceneError('images cannot be rendered without libEGL: "apt install libegl1 libgl1", or run without '
                             'the camera')
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
        self.data.mocap_pos[0] = (*scene.goal, 0.0)
        self._update()

    def command(self, positions) -> None:
        """Set the servos' targets. Shape (6,). Raises ValueError unless finite."""
        positions = np.asarray(positions, dtype=float)
        if positions.shape != (len(JOINTS),) or not np.isfinite(positions).all():
            raise ValueError(f'command is {positions}, must be {len(JOINTS)} finite positions')
        self.data.ctrl[self._ctrl] = positions

    def step(self, command) -> None:
        """Command shape (6,), then advance by one control period."""
        self.command(command)
        self.advance(round(CONTROL_PERIOD / PHYSICS_STEP))

    def advance(self, steps: int = 1) -> None:
        """Advance by physics steps towards the last command."""
        for _ in range(steps):
            before = self.tip
            mujoco.mj_step2(self.model, self.data)
            self._update()
            speed = np.linalg.norm(self.tip - before) / PHYSICS_STEP
            away = np.hypot(*(self.tip[:2] - self.scene.goal))
            if away < REACH_TOLERANCE and 0.0 < self.tip[2] < REACH_HEIGHT and speed < REST_SPEED:
                self._rested += PHYSICS_STEP
            else:
                self._rested = 0.0
            self.reached |= self._rested >= REST_S and self.time <= EPISODE_S

    def _update(self) -> None:
        # `advance` does the second half of a step first, so that poses and contacts always belong to the positions.
        mujoco.mj_step1(self.model, self.data)
        self.touched |= bool((self.data.contact.geom == self._pillar).any())

    @property
    def time(self) -> float:
        """Time since the reset [s]."""
        return self.data.time

    @property
    def joint_positions(self) -> np.ndarray:
        """Measured positions [rad]. Shape (6,), order of JOINTS."""
        return self.data.qpos[self._qpos]

    @property
    def joint_velocities(self) -> np.ndarray:
        """Measured velocities [rad/s]. Shape (6,)."""
        return self.data.qvel[self._qvel]

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
        return {'joint_positions': self.joint_positions, 'goal': np.array(self.scene.goal)}

    def render(self, size: tuple[int, int]) -> np.ndarray:
        """The camera's image now. `size` is (height, width) [px]; returns (height, width, 3) uint8, RGB."""
        return self._render(self.data, size)

    def render_pose(self, positions, goal: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
        """The camera's image of any pose, shape (6,), and goal, for replays; the simulation stays as it is."""
        if self._posed is None:
            self._posed = mujoco.MjData(self.model)
        self._posed.qpos[self._qpos] = positions
        self._posed.mocap_pos[0] = (*goal, 0.0)
        mujoco.mj_kinematics(self.model, self._posed)
        mujoco.mj_camlight(self.model, self._posed)
        return self._render(self._posed, size)

    def photograph(self, size: tuple[int, int], goal: tuple[float, float] | None = None) -> bytes:
        """The camera's image now as a JPEG file, as cameras send it. goal: where it shows the goal, if not where it is."""
        image = self.render(size) if goal is None else self.render_pose(self.joint_positions, goal, size)
        return cv2.imencode('.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
                            [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()

    def _render(self, data: mujoco.MjData, size: tuple[int, int]) -> np.ndarray:
        # Created on first use: an OpenGL context belongs to the thread that draws.
        if size not in self._renderers:
            try:
                renderer = mujoco.Renderer(self.model, *size)
            except Exception as error:
                raise SceneError(f'images of {size} cannot be rendered (MUJOCO_GL={os.environ.get("MUJOCO_GL", "")}): '
                                 f'{" ".join(str(error).split())}') from error
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                renderer.scene.flags[flag] = False
            self._renderers[size] = renderer
        renderer = self._renderers[size]
        renderer.update_scene(data, camera=CAMERA)
        return renderer.render()

    def close(self) -> None:
        """Free the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


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

    side: +1 passes the pillar on its left (y > 0), -1 on its right.
    noise: size of a smooth random deviation from the path [m], zero at both ends; `rng` draws it. Give both sides of a
        scene the same draw, or the way to the funnel tells them apart.
    """
    if side not in (-1, 1):
        raise ValueError(f'side is {side}, valid: +1 (left), -1 (right)')
    # Via points, and direction times relative speed there. The funnel is left slowly and straight ahead, whatever the
    # side; the goal is approached from the side. So the gripper stays 12 mm clear of the pillar, and joints below 85 %
    # of their limits.
    points = np.array([scene.start, FUNNEL, (PILLAR[0], side * DETOUR_Y), scene.goal])  # (4, 2)
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    # The same timing for both sides, or the speed before the turn would tell which side follows.
    last = [np.hypot(scene.goal[0] - PILLAR[0], scene.goal[1] - y) for y in (-DETOUR_Y, DETOUR_Y)]
    lengths[2] = np.mean(last)
    move_s = MOVE_S * max(1.0, max(last) / LAST_LENGTH)
    # A goal far on the other side is reached in a wider bow, behind the pillar.
    bow = 1.0 + 8.0 * max(0.0, -side * scene.goal[1] - GOAL_Y[1])
    knots = np.concatenate([[0.0], np.cumsum(lengths)])
    tangents = np.array([(points[1] - points[0]) / lengths[0], (0.3, 0.0), (bow, 0.0), (0.0, -0.6 * side)])  # (4, 2)

    times = np.arange(round((move_s + HOLD_S) / CONTROL_PERIOD) + 1) * CONTROL_PERIOD
    s = minimum_jerk(np.clip(times / move_s, 0.0, 1.0))  # (N,) part of the way
    along = s * knots[-1]
    k = np.clip(np.searchsorted(knots, along, side='right') - 1, 0, 2)
    u = ((along - knots[k]) / lengths[k])[:, None]
    # Quintic Hermite pieces without curvature at the via points: velocity and acceleration are continuous.
    blend = minimum_jerk(u)
    leave, arrive = u - u**3 * (6 - 8 * u + 3 * u**2), -u**3 * (4 - 7 * u + 3 * u**2)
    xy = (points[k] * (1 - blend) + points[k + 1] * blend
          + lengths[k, None] * (tangents[k] * leave + tangents[k + 1] * arrive))

    if noise:
        rng = np.random.default_rng() if rng is None else rng
        waves = np.arange(1, 5)
        amplitudes = rng.normal(size=(len(waves), 2)) / np.sqrt(len(waves))
        xy = xy + noise * np.sin(np.pi * s)[:, None] * (np.sin(np.pi * np.outer(s, waves)) @ amplitudes)
    return inverse_kinematics(np.column_stack([xy, np.full(len(xy), TIP_HEIGHT)]))
