"""Kinematics of the robot a contract names.

The pose of its end effector, joint motion that moves it as asked, and where all of the arm is.
"""
from __future__ import annotations

import numpy as np

from il_policies.contract import Contract, ContractError
from il_policies.description import load_spec, root_link  # before mujoco: it chooses how to render

# isort: split
import mink
import mujoco

DAMPING = 0.1
"""What joint motion costs while moving, in steps asked for times the length of the arm: little, but near a singularity an
arm that is asked for more than it reaches comes to rest. With a third of it, a stretched SO-101 jumps about at full speed."""
TURNING, TURNING_DAMPING = 0.02, 0.003
"""When turning without moving, what a radian off counts and what joint motion costs, alike: both little, so as not to move."""
ITERATIONS = 2
"""Of each linearised problem; they also undo the damping where nothing is singular."""


class _Box(mink.Limit):
    """Joint positions that one step may reach, from where it began: within position limits, and no faster than allowed."""

    def __init__(self, lower: np.ndarray, upper: np.ndarray, velocity: np.ndarray):
        """Position limits [rad or m] and velocity limits [rad/s or m/s], shape (N,) each."""
        self.lower, self.upper, self.velocity = lower, upper, velocity
        self.G = np.concatenate([np.eye(len(lower)), -np.eye(len(lower))])

    def begin(self, q: np.ndarray, dt: float) -> None:
        """A step of dt [s] from q, shape (N,), which is within the position limits."""
        self.low = np.maximum(self.lower, q - self.velocity * dt)
        self.high = np.minimum(self.upper, q + self.velocity * dt)

    def compute_qp_inequalities(self, configuration: mink.Configuration, dt: float) -> mink.Constraint:
        """G Δq ≤ h."""
        return mink.Constraint(G=self.G, h=np.concatenate([self.high - configuration.q, configuration.q - self.low]))


class Kinematics:
    """Forward and differential inverse kinematics of `contract.end_effector`, in the frame of the description's root link.

    Meshes are not read. Joints of the description that are not in the action stay at 0.
    """

    def __init__(self, contract: Contract):
        """Raises ContractError or DescriptionError if description, end effector and joints do not fit together."""
        spec, links, joints = _described(contract)
        if contract.end_effector not in links:
            raise _no_end_effector(contract, links)
        chain = _chain(links[contract.end_effector])
        above = [joint.name for link in chain for joint in link.joints]
        moving = [name for name in contract.action.joints if name in above]
        if not moving:
            raise ContractError(f'end_effector {contract.end_effector!r} is moved by {above or "no joint"}, the action moves '
                                f'{list(contract.action.joints)}')
        for name, joint in joints.items():
            if name not in moving:
                spec.delete(joint)
        model = _compiled(spec)
        names = [model.joint(i).name for i in range(model.njnt)]
        by_name = {joint.name: joint for joint in contract.action_joints}
        lower, upper = np.array([by_name[name].position for name in names]).T
        self._place = [contract.action.joints.index(name) for name in names]
        self._box = _Box(lower, upper, np.array([by_name[name].velocity for name in names]))
        sliding = np.array([by_name[name].unit == 'm' for name in names])
        self._length = max(sum(np.linalg.norm(link.pos) for link in chain) + (upper - lower)[sliding].sum(), 0.01)
        self._end = contract.end_effector
        self._move = mink.FrameTask(self._end, 'body', position_cost=1.0, orientation_cost=0.0)
        self._turn = mink.FrameTask(self._end, 'body', position_cost=1.0, orientation_cost=TURNING * self._length)
        self._configuration = mink.Configuration(model)

    def pose(self, q) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) [m] and rotation (3, 3) of the end effector at q, shape (D,) in action order."""
        self._configuration.update(np.asarray(q, dtype=float)[self._place])
        body = self._configuration.data.body(self._end)
        return body.xpos.copy(), body.xmat.reshape(3, 3).copy()

    def jog(self, q, twist, dt: float) -> np.ndarray:
        """Joint positions after moving the end effector for dt [s] from q, shape (D,) in action order.

        twist: velocity of the end effector's origin [m/s] and angular velocity [rad/s], shape (6,), along the base's axes.
        Joints that do not move the end effector keep their value. Within position and velocity limits; where these, a
        singularity or too few joints do not allow the twist, it is followed as nearly as they do, first in position. A q
        beyond a position limit is first brought to it. Raises ValueError unless q and twist are finite.
        """
        q, twist = np.array(q, dtype=float), np.asarray(twist, dtype=float)
        if not (np.isfinite(q).all() and np.isfinite(twist).all()):
            raise ValueError(f'cannot jog from {q} with {twist}: not finite')
        start = np.clip(q[self._place], self._box.lower, self._box.upper)
        self._box.begin(start, dt)
        configuration = self._configuration
        configuration.update(start)
        pose = configuration.get_transform_frame_to_world(self._end, 'body')
        rotation, position = mink.SO3.exp(twist[3:] * dt) @ pose.rotation(), pose.translation() + twist[:3] * dt
        moving = 1e-9 + DAMPING * self._length * np.linalg.norm(twist[:3]) * dt
        turning = (TURNING_DAMPING * self._length) ** 2
        # First the position alone, then the orientation without giving that up.
        for task, damping in ((self._move, moving), (self._turn, turning)):
            task.set_target(mink.SE3.from_rotation_and_translation(rotation, position))
            for _ in range(ITERATIONS):
                velocity = mink.solve_ik(configuration, [task], dt, 'daqp', damping=damping, limits=[self._box])
                configuration.integrate_inplace(velocity, dt)
            position = configuration.get_transform_frame_to_world(self._end, 'body').translation()
        q[self._place] = np.clip(configuration.q, self._box.low, self._box.high)  # the solver is exact to 1e-6 only
        return q


class Skeleton:
    """Where the links are that the action's joints move, and the tips of its arms, in the frame of the description's root link.

    A stick goes from each of these links to the nearest one of them before it, the first to the root. Meshes are not read.
    Joints that mimic one follow it; others that are not in the action stay where `others` last saw them, at first at 0.
    """

    def __init__(self, contract: Contract):
        """Raises ContractError or DescriptionError if description, end effector and joints do not fit together."""
        spec, links, joints = _described(contract)
        self.frame = root_link(contract.description)
        """Name of the root link."""
        followers = [(e.name1, e.name2, e.data[:2].copy()) for e in spec.equalities if e.type == mujoco.mjtEq.mjEQ_JOINT]
        moved = {joint.parent.name: joint.name for joint in joints.values() if joint.name in contract.action.joints}
        ends = [contract.end_effector] if contract.end_effector else _ends(contract, links, {name for name, *_ in followers})
        if not set(ends) <= set(links):
            raise _no_end_effector(contract, links)
        self.links = tuple(name for name in links if name in moved or name in ends)
        """Names of the links, K of them, each after those before it."""
        self.tips = [self.links.index(name) for name in ends]
        """Places of the tips among the links: the end effector, or without one, of every arm the last link that it moves."""
        self.link_of = {joint: self.links.index(name) for name, joint in moved.items()}
        """Joint of the action → place of the link it moves, whose origin it is."""
        chains = {name: [link.name for link in _chain(links[name])[1:]] for name in self.links}
        self.before = [next((self.links.index(link) for link in chains[name] if link in self.links), -1) for name in self.links]
        """Of each link the place of the one before it; -1: the root."""
        self.length = max(sum(np.linalg.norm(link.pos) for link in _chain(links[name])) for name in ends)
        """Of the longest arm, stretched [m]."""
        self._model = _compiled(spec)
        self._data = mujoco.MjData(self._model)
        self._body = [self._model.body(name).id for name in self.links]
        place = {self._model.joint(i).name: self._model.jnt_qposadr[i] for i in range(self._model.njnt)}
        self._place = [place[name] for name in contract.action.joints]
        self._others = {name: at for name, at in place.items() if name not in contract.action.joints}
        self._followers = [(place[name], place[leader], *data) for name, leader, data in followers]

    def others(self, names, positions) -> None:
        """Measured positions of any joints by name; those of the action are not looked at."""
        for name, position in zip(names, positions):
            if name in self._others:
                self._data.qpos[self._others[name]] = position

    def positions(self, q) -> np.ndarray:
        """Origins of the links [m] at each of q, shape (N, D) in action order. Shape (N, K, 3)."""
        model, data = self._model, self._data
        found = np.empty((len(q), len(self._body), 3))
        for n, pose in enumerate(q):
            data.qpos[self._place] = pose
            for follower, leader, offset, factor in self._followers:
                data.qpos[follower] = offset + factor * data.qpos[leader]
            mujoco.mj_kinematics(model, data)
            found[n] = data.xpos[self._body]
        return found


def _described(contract: Contract) -> tuple[mujoco.MjSpec, dict, dict]:
    """The description, its links and its joints by name. Raises DescriptionError, or ContractError if a joint is not there."""
    spec = load_spec(contract.description)
    links = {body.name: body for body in spec.bodies if body.parent is not None}
    joints = {joint.name: joint for joint in spec.joints}
    missing = [name for name in contract.action.joints if name not in joints]
    if missing:
        raise ContractError(f'action.joints {missing} are not in {contract.description}; joints there: {", ".join(joints)}')
    return spec, links, joints


def _no_end_effector(contract: Contract, links: dict) -> ContractError:
    return ContractError(f'end_effector is {contract.end_effector!r}; links of {contract.description}: {", ".join(links)}')


def _chain(link) -> list:
    """A link and those before it, up to the root."""
    chain = [link]
    while chain[-1].parent.parent is not None:
        chain.append(chain[-1].parent)
    return chain


def _ends(contract: Contract, links: dict, followers: set[str]) -> list[str]:
    """Of each output the last link that its joints move: the one that most of them and fewest others do, furthest from the root.

    An output of one or two joints that another one carries, such as a gripper, has none, and what moves by joints that mimic
    others is not looked at.
    """
    above = {name: {joint.name for part in _chain(link) for joint in part.joints} for name, link in links.items()}
    above = {name: joints for name, joints in above.items() if not joints & followers}
    ends = []
    for output in contract.action.outputs:
        own = output.joints or contract.action.joints
        others = set(contract.action.joints) - set(own)
        _, strangers, _, end = max((len(joints & set(own)), -len(joints & others), len(_chain(links[link])), link)
                                   for link, joints in above.items())
        if len(own) > 2 or not strangers:
            ends.append(end)
    return list(dict.fromkeys(ends))


def _compiled(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """The model of links and joints alone: without meshes, which are not read then, and whatever the masses."""
    for part in (*spec.geoms, *spec.meshes, *spec.equalities):  # a mimic joint is an equality
        spec.delete(part)
    for link in spec.bodies:  # a description for kinematics may do without masses, MuJoCo may not
        if link.parent is not None:
            link.mass, link.inertia, link.fullinertia, link.explicitinertial = 1.0, [1, 1, 1], [np.nan] * 6, True
    return spec.compile()
