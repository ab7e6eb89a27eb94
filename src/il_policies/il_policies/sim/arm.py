"""A robot in MuJoCo: servos on its joints, what they measure, and cameras.

`Simulation` is what simulator_node runs: an `Arm`, which is the robot of any contract whose description is found, or a task
with a model of its own (`reach_around`). Lengths in [m], angles in [rad], times in [s]. The world frame is that of the
description's root link, z up.
"""
from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from il_policies.contract import Contract
from il_policies.description import DescriptionError, initial_positions, load_spec  # before mujoco: it chooses how to render

# isort: split
import mujoco

PHYSICS_STEP = 0.004
"""Time between physics steps; a part of it where a contract's joint states come more often."""
SERVO_LAG = 0.03
"""How far an arm is behind its commands, about as the SO-101's servos are; less where a tracking tolerance asks for it."""
POSES = 50
"""Inertias are the largest of so many poses."""
JPEG_QUALITY = 95
THIRD_PERSON = ((-35, 25), (35, 25), (-145, 25), (145, 25), (0, 60))
"""Where cameras look from that no link carries, in turn: degrees to the left of the x axis, and up."""
DRAWN, HIDDEN = (1, 3)
"""Groups of shapes; the renderer draws the first one."""


class SceneError(DescriptionError):
    """A scene that cannot be simulated; the message says what was received and what is valid."""


def load_robot(description: str | Path) -> mujoco.MjSpec:
    """A description with light to see it, and its meshes made simple enough to draw without a GPU. Raises DescriptionError.

    Meshes other than STL and OBJ, which MuJoCo cannot draw, and those whose files are missing are left out; a link that is left
    without anything to see is drawn as it collides.
    """
    spec = load_spec(description)
    spec.option.timestep = PHYSICS_STEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE

    unread = {mesh.name for mesh in spec.meshes if not drawable(Path(mesh.file))}
    for geom in spec.geoms:
        if geom.meshname in unread:
            spec.delete(geom)
    for mesh in spec.meshes:
        if mesh.name in unread:
            spec.delete(mesh)
        elif mesh.file.lower().endswith('.stl'):
            vertices, faces = simplified_stl(Path(mesh.file), cell=0.004)
            mesh.file, mesh.uservert, mesh.userface = '', vertices.ravel(), faces.ravel()
    for body in spec.bodies:
        visible = any(not geom.contype for geom in body.geoms)
        for geom in body.geoms:
            if geom.contype:  # collision shapes, the meshes' convex hulls
                geom.contype, geom.conaffinity, geom.group = 1, 0, HIDDEN if visible else DRAWN

    spec.worldbody.add_light(pos=[0.4, 0.4, 1.2], dir=[-0.25, -0.3, -1], diffuse=[0.5, 0.5, 0.5], specular=[0.1, 0.1, 0.1],
                             cutoff=90, exponent=0, castshadow=False)
    spec.visual.headlight.ambient = [0.35, 0.35, 0.35]
    spec.visual.headlight.diffuse = [0.35, 0.35, 0.35]
    spec.visual.quality.offsamples = 0  # multisampling makes software rendering several times slower
    return spec


def drawable(mesh: Path) -> bool:
    """Whether a mesh is there and of a kind that can be drawn: OBJ, or binary STL."""
    if not mesh.is_file() or mesh.suffix.lower() not in ('.stl', '.obj'):
        return False
    with open(mesh, 'rb') as file:
        head = file.read(84)
    return mesh.suffix.lower() == '.obj' or mesh.stat().st_size == 84 + 50 * int.from_bytes(head[80:], 'little') > 84


def simplified_stl(path: Path, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """A binary STL with the vertices of each cubic cell of that size [m] merged into one.

    Returns vertices (V, 3) float32 and faces (F, 3) int32. The SO-101's 400,000 triangles take 50 ms to draw without a GPU
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


def add_servo(spec: mujoco.MjSpec, joint: mujoco.MjsJoint, kp: float, kd: float = 0.0, force: float = 0.0) -> None:
    """A position servo of a joint's name and range.

    Gain kp [N·m/rad or N/m], damping kd [per rad/s or m/s], largest force (0: any).
    """
    spec.add_actuator(
        name=joint.name, target=joint.name, trntype=mujoco.mjtTrn.mjTRN_JOINT,
        gaintype=mujoco.mjtGain.mjGAIN_FIXED, gainprm=[kp] + [0.0] * 9,
        biastype=mujoco.mjtBias.mjBIAS_AFFINE, biasprm=[0.0, -kp, 0.0 - kd] + [0.0] * 7,
        ctrllimited=joint.range[0] < joint.range[1], ctrlrange=joint.range,
        forcelimited=force > 0.0, forcerange=[-force, force])


def look(position, target) -> np.ndarray:
    """Axes of a camera at `position` that looks at `target`, upright: right, up and backwards in the columns. Shape (3, 3)."""
    backwards = np.subtract(position, target) / np.linalg.norm(np.subtract(position, target))
    right = np.cross([0.0, 0.0, 1.0], backwards)
    right /= np.linalg.norm(right)
    return np.column_stack([right, np.cross(backwards, right), backwards])


def add_camera(body, name: str, position, axes: np.ndarray, fovy: float) -> None:
    """A camera in a body's frame, its axes (3, 3) as `look` gives them; vertical field of view in [deg]."""
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, axes.ravel())
    body.add_camera(name=name, pos=position, quat=quaternion, fovy=fovy)


def place_cameras(spec: mujoco.MjSpec, data: mujoco.MjData, names, end_effector: str) -> dict[str, str]:
    """Add a camera for each name to `spec`, whose model's pose is `data`'s; the frame that each one's images are in.

    In its optical frame (REP 103: z forward, x right), where the description has a link `<name>_optical_frame`; else, named
    after a wrist or hand, above the end effector, which it follows; else around the arm, so that all of it is seen.
    """
    bodies, model, frames, around = {body.name: body for body in spec.bodies}, data.model, {}, iter(THIRD_PERSON * len(names))
    low, high = extent(data)
    centre, radius = (low + high) / 2, np.linalg.norm(high - low) / 2
    for name in names:
        frames[name] = name
        if (optical := f'{name}_optical_frame') in bodies:
            add_camera(bodies[optical], name, [0, 0, 0], np.diag([1.0, -1.0, -1.0]), fovy=58)  # a RealSense's colour
            frames[name] = optical
        elif ('wrist' in name or 'hand' in name) and end_effector in bodies:
            end = data.body(end_effector)
            chain = model.body(end_effector).id
            while chain and np.linalg.norm(data.xpos[chain] - end.xpos) < 0.02:
                chain = model.body_parentid[chain]
            ahead = (end.xpos - data.xpos[chain]) / np.linalg.norm(end.xpos - data.xpos[chain])
            side = np.eye(3)[0 if abs(ahead[2]) > 0.9 else 2]  # above a gripper, or before one that points down
            side -= side @ ahead * ahead
            eye = end.xpos - 0.08 * ahead + 0.15 * side / np.linalg.norm(side)
            turn = end.xmat.reshape(3, 3).T
            add_camera(bodies[end_effector], name, turn @ (eye - end.xpos), turn @ look(eye, end.xpos + 0.08 * ahead), fovy=58)
        else:
            azimuth, elevation = np.radians(next(around))
            ray = [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
            eye = centre + np.multiply(ray, 0.9 * radius / np.sin(np.radians(40 / 2)))
            add_camera(spec.worldbody, name, eye, look(eye, centre), fovy=40)
    return frames


def extent(data: mujoco.MjData) -> np.ndarray:
    """Lowest and highest coordinates of all that is drawn, planes aside. Shape (2, 3)."""
    model = data.model
    shown = (model.geom_group != HIDDEN) & (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE)
    if not shown.any():
        return np.stack([data.xpos.min(axis=0) - 0.1, data.xpos.max(axis=0) + 0.1])
    turn, middle, half = data.geom_xmat[shown].reshape(-1, 3, 3), model.geom_aabb[shown, :3], model.geom_aabb[shown, 3:]
    middle = data.geom_xpos[shown] + np.einsum('nij,nj->ni', turn, middle)
    half = np.einsum('nij,nj->ni', np.abs(turn), half)
    return np.stack([(middle - half).min(axis=0), (middle + half).max(axis=0)])


class Simulation:
    """A model with a servo, of the joint's name, on each of `joints`. Deterministic: same commands, same motion."""

    def __init__(self, model: mujoco.MjModel, joints: tuple[str, ...], frames: dict[str, str], camera: bool):
        """frames: camera → frame of its images. Raises SceneError if images are wanted of a machine without EGL."""
        self.model, self.data, self.joints, self.frames = model, mujoco.MjData(model), joints, frames
        others = [model.joint(i).name for i in range(model.njnt)]
        self.measured = (*joints, *(name for name in others if name not in joints))
        """Joints with a measurement: those that are commanded, then mimic joints and those that stand."""
        self._qpos = np.array([model.joint(name).qposadr[0] for name in self.measured])
        self._qvel = np.array([model.joint(name).dofadr[0] for name in self.measured])
        self._ctrl = np.array([model.actuator(name).id for name in joints])
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        if camera and os.environ.get('MUJOCO_GL') == 'disable':
            raise SceneError('images cannot be rendered without libEGL: "apt install libegl1 libgl1", or run without '
                             'the camera')

    def command(self, positions) -> None:
        """Set the servos' targets. Shape (D,), order of `joints`. Raises ValueError unless finite."""
        positions = np.asarray(positions, dtype=float)
        if positions.shape != self._ctrl.shape or not np.isfinite(positions).all():
            raise ValueError(f'command is {positions}, must be {len(self._ctrl)} finite positions')
        self.data.ctrl[self._ctrl] = positions

    def advance(self, steps: int = 1) -> None:
        """Advance by physics steps towards the last command."""
        for _ in range(steps):
            mujoco.mj_step2(self.model, self.data)
            self._update()

    def _update(self) -> None:
        # `advance` does the second half of a step first, so that poses and contacts always belong to the positions.
        mujoco.mj_step1(self.model, self.data)

    @property
    def step_period(self) -> float:
        """Time between physics steps [s]."""
        return self.model.opt.timestep

    @property
    def time(self) -> float:
        """Time since the reset [s]."""
        return self.data.time

    @property
    def joint_positions(self) -> np.ndarray:
        """Measured positions [rad or m]. Shape (N,), order of `measured`."""
        return self.data.qpos[self._qpos]

    @property
    def joint_velocities(self) -> np.ndarray:
        """Measured velocities [rad/s or m/s]. Shape (N,), order of `measured`."""
        return self.data.qvel[self._qvel]

    @property
    def joint_efforts(self) -> np.ndarray:
        """What the servos exert [N·m or N]. Shape (N,), order of `measured`."""
        return self.data.qfrc_actuator[self._qvel]

    def observation(self) -> dict[str, np.ndarray]:
        """joint_positions (N,) [rad or m], and whatever else a task lets a policy see."""
        return {'joint_positions': self.joint_positions}

    def render(self, size: tuple[int, int], camera: str = '') -> np.ndarray:
        """A camera's image now, the first one's by default.

        `size` is (height, width) [px]; returns (height, width, 3) uint8, RGB.
        """
        return self._render(self.data, size, camera)

    def photograph(self, size: tuple[int, int], camera: str = '') -> bytes:
        """A camera's image now as a JPEG file, as cameras send it."""
        return jpeg(self.render(size, camera))

    def _render(self, data: mujoco.MjData, size: tuple[int, int], camera: str) -> np.ndarray:
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
        renderer.update_scene(data, camera=camera or 0)
        return renderer.render()

    def close(self) -> None:
        """Free the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


def jpeg(image: np.ndarray) -> bytes:
    """An RGB image as a JPEG file."""
    return cv2.imencode('.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


class Arm(Simulation):
    """The robot of any contract, alone above a floor; nothing touches anything.

    Its servos are ideal: gravity is compensated, force unlimited, gains such that every joint is critically damped and
    SERVO_LAG behind, whatever the arm weighs. Mimic joints follow theirs; joints that the contract does not command stand.
    """

    def __init__(self, contract: Contract, camera: bool = True, description: str | Path = ''):
        """description: instead of the contract's. Raises DescriptionError unless it is found and has the action's joints."""
        description = description or contract.description
        spec = load_robot(description)
        for joint in spec.joints:
            if joint.type not in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE):
                spec.delete(joint)  # a floating base stands
        joints = {joint.name: joint for joint in spec.joints}
        missing = [name for name in contract.action.joints if name not in joints]
        if missing:
            raise DescriptionError(f'action.joints {missing} are not in {description}; joints there: {", ".join(joints)}')
        # Of a joint and its mimic one has a servo: the one that is commanded, else the first.
        driven = {mimic.name2 if mimic.name1 in contract.action.joints else mimic.name1 for mimic in spec.equalities}
        servos = [joint for name, joint in joints.items() if name in contract.action.joints or name not in driven]
        rate = max(stream.rate for stream in contract.observations.values() if stream.field)
        spec.option.timestep = PHYSICS_STEP / np.ceil(rate * PHYSICS_STEP)
        spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
        spec.compiler.boundmass, spec.compiler.boundinertia, spec.compiler.balanceinertia = 1e-3, 1e-7, True
        for body in spec.bodies:
            body.gravcomp = 1.0
        for mimic in spec.equalities:
            mimic.solref, mimic.solimp = [2 * spec.option.timestep, 1.0], [0.999, 0.9999, 0.001, 0.5, 2.0]  # as stiff as may be

        # Where the arm starts: what its description says (ros2_control), else 0, else the middle of what the contract allows.
        limits = {joint.name: joint.position for joint in contract.action_joints}
        told = initial_positions(description)
        self._start = {}
        for name, joint in joints.items():
            low, high = limits.get(name, joint.range if joint.range[0] < joint.range[1] else (-np.inf, np.inf))
            middle = 0.0 if low <= 0.0 <= high else (low + high) / 2
            self._start[name] = float(np.clip(told.get(name, middle), low, high))
        try:
            model = spec.compile()
        except ValueError as error:
            raise DescriptionError(f'{description}: MuJoCo cannot simulate it: {" ".join(str(error).split())}') from None
        data = mujoco.MjData(model)
        self._put(model, data)

        inertia = largest_inertias(model, data, limits)
        tolerances = {joint.name: joint.tracking_tolerance / joint.velocity for joint in contract.joints}
        for joint in servos:
            joint.actfrclimited = False
            joint.armature = inertia[joint.name]  # gears make a motor feel about as heavy as the arm
            lag = min(SERVO_LAG, max(tolerances.get(joint.name, np.inf) / 3, 2 * PHYSICS_STEP))
            kp = 2 * inertia[joint.name] * (2 / lag) ** 2
            add_servo(spec, joint, kp, kd=kp * lag)
        spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[0, 0, 1], rgba=[0.86, 0.87, 0.88, 1],
                                pos=[0, 0, min(extent(data)[0, 2], 0.0)])
        frames = place_cameras(spec, data, contract.cameras, contract.end_effector) if camera else {}
        model = spec.compile()
        model.dof_damping[:], model.dof_frictionloss[:] = 0.0, 0.0
        super().__init__(model, contract.action.joints, frames, camera)
        self.reset()

    def _put(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        """Every joint to where it starts, mimic joints where theirs have them."""
        for name, position in self._start.items():
            data.qpos[model.joint(name).qposadr[0]] = position
        for _ in range(model.neq):  # a mimic joint may follow another one
            for i in range(model.neq):
                follower, leader = (model.jnt_qposadr[ids[i]] for ids in (model.eq_obj1id, model.eq_obj2id))
                data.qpos[follower] = np.polyval(model.eq_data[i, 4::-1], data.qpos[leader])
        mujoco.mj_fwdPosition(model, data)

    def reset(self) -> None:
        """Put every joint to rest where it starts, commanded to stay there."""
        mujoco.mj_resetData(self.model, self.data)
        self._put(self.model, self.data)
        self.data.ctrl[:] = self.data.qpos[self.model.jnt_qposadr[self.model.actuator_trnid[:, 0]]]
        self._update()


def largest_inertias(model: mujoco.MjModel, data: mujoco.MjData, limits: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Of each joint, what it moves [kg·m² or kg], mimic joints included.

    The largest of `data`'s pose, which stays as it is, and of POSES random ones within `limits`; joints without any stay where
    they are.
    """
    names, rng, posed = [model.joint(i).name for i in range(model.njnt)], np.random.default_rng(0), mujoco.MjData(model)
    posed.qpos[:] = data.qpos
    low, high = np.clip([limits.get(name, (at, at)) for name, at in zip(names, data.qpos)], -np.pi, np.pi).T
    largest, column = np.zeros(model.nv), np.zeros(model.nv)
    for _ in range(1 + POSES):
        mujoco.mj_fwdPosition(model, posed)
        for i in range(model.nv):
            mujoco.mj_mulM(model, posed, column, np.eye(model.nv)[i])
            largest[i] = max(largest[i], column[i])
        posed.qpos[:] = rng.uniform(low, high)
    for i in range(model.neq):
        follower, leader = (model.jnt_dofadr[ids[i]] for ids in (model.eq_obj1id, model.eq_obj2id))
        largest[leader] += model.eq_data[i, 1] ** 2 * largest[follower]
    return dict(zip(names, largest))
