"""Kinematics of the robot a contract names: the pose of its end effector, and joint motion that moves it as asked."""
from __future__ import annotations

import numpy as np

from il_policies.contract import Contract, ContractError
from il_policies.description import load_spec  # before mujoco: it chooses how to render

# isort: split
import mink

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
        spec = load_spec(contract.description)
        links = {body.name: body for body in spec.bodies if body.parent is not None}
        joints = {joint.name: joint for joint in spec.joints}
        if contract.end_effector not in links:
            raise ContractError(f'end_effector is {contract.end_effector!r}; links of {contract.description}: '
                                f'{", ".join(links)}')
        missing = [name for name in contract.action.joints if name not in joints]
        if missing:
            raise ContractError(f'action.joints {missing} are not in {contract.description}; joints there: {", ".join(joints)}')
        chain = [links[contract.end_effector]]
        while chain[-1].parent.parent is not None:
            chain.append(chain[-1].parent)
        above = [joint.name for link in chain for joint in link.joints]
        moving = [name for name in contract.action.joints if name in above]
        if not moving:
            raise ContractError(f'end_effector {contract.end_effector!r} is moved by {above or "no joint"}, the action moves '
                                f'{list(contract.action.joints)}')
        still = [joint for name, joint in joints.items() if name not in moving]
        for part in (*spec.geoms, *spec.meshes, *spec.equalities, *still):  # a mimic joint is an equality
            spec.delete(part)
        for link in links.values():  # a description for kinematics may do without masses, MuJoCo may not
            link.mass, link.inertia, link.fullinertia, link.explicitinertial = 1.0, [1, 1, 1], [np.nan] * 6, True
        model = spec.compile()
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
