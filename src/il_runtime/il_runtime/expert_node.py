"""The scripted expert: a planner that shows every scene round the left and round the right, and has each recorded.

One run is one session. A line per demonstration on stdout; exit 0 if all were recorded, 1 if not, 2 if it cannot start.
"""
from __future__ import annotations

import signal
import sys
from contextlib import suppress

import numpy as np
import rclpy
from il_msgs.msg import ActionChunk, ControllerStatus
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from il_policies.contract import load_contract
from il_policies.description import DescriptionError
from il_policies.sim.reach_around import (
    CONTROL_PERIOD,
    EPISODE_S,
    GOALS,
    JOINTS,
    TASK,
    Scene,
    expert,
    sample_scene,
)
from il_runtime.ros import chunk_qos, declare, nanoseconds, to_stamp
from il_runtime.session import Session, SessionError

SIDES = {'left': 1, 'right': -1}
LEAD_S = 0.06
"""A trajectory starts this long after it is published, so that it has arrived when it starts [s]."""


class ExpertNode(Node):
    """Publishes whole trajectories as action chunks."""

    def __init__(self):
        """Raises ContractError or ValueError for parameters that make no session."""
        super().__init__('expert')
        self.contract = load_contract(declare(self, 'contract', '', "the robot's contract, a YAML file"))
        self.demonstrations = declare(self, 'demonstrations', 60, 'how many to record; even, as each scene is shown '
                                      'round both sides', 2, 100_000)
        self.seed = declare(self, 'seed', 0, 'seed of scenes and noise', 0, 2**31 - 1)
        self.goals = declare(self, 'goals', 'narrow', f'area of the goals: {", ".join(GOALS)}')
        self.noise = declare(self, 'noise', 0.003, 'size of the smooth random deviation from the path [m]', 0.0, 0.01)
        if self.goals not in GOALS:
            raise ValueError(f'goals is {self.goals!r}; valid: {", ".join(GOALS)}')
        if self.demonstrations % 2:
            raise ValueError(f'demonstrations is {self.demonstrations}, must be even: each scene is shown both ways')
        if sorted(self.contract.action.joints) != sorted(JOINTS):
            raise ValueError(f'the expert moves {list(JOINTS)}, '
                             f'the contract commands {list(self.contract.action.joints)}')
        self.chunks = self.create_publisher(ActionChunk, 'chunks', chunk_qos(EPISODE_S))

    def publish(self, trajectory: np.ndarray, epoch: int) -> int:
        """Send a trajectory (N, 6) at 50 Hz that starts at once; when it ends [ns]."""
        now = self.get_clock().now().nanoseconds
        start = now + round(LEAD_S * 1e9)
        message = ActionChunk(start=to_stamp(start), step_period=CONTROL_PERIOD, joint_names=JOINTS,
                              horizon=len(trajectory), positions=trajectory.astype(np.float32).ravel(), epoch=epoch,
                              sequence=0, policy='expert')
        message.header.stamp = to_stamp(now)
        self.chunks.publish(message)
        return start + round((len(trajectory) - 1) * CONTROL_PERIOD * 1e9)


def demonstrate(node: ExpertNode, session: Session, scene: Scene, trajectory: np.ndarray, task: str,
                name: str) -> str:
    """Record one demonstration; what went wrong, in which case it is discarded, or ''."""
    session.stop()
    session.reset(scene)
    session.start_episode(task, name)
    try:
        problem = follow(node, session, trajectory)
    except BaseException:  # Ctrl-C too: half a demonstration is none
        session.silence_s = 1.0
        with suppress(SessionError):
            session.stop_episode(succeeded=False, discard=True)
        raise
    session.stop_episode(succeeded=not problem, discard=bool(problem))
    return problem


def follow(node: ExpertNode, session: Session, trajectory: np.ndarray) -> str:
    """Arm, send the trajectory, wait until it is over; what went wrong, or ''."""
    end = node.publish(trajectory, session.arm())

    def over(controller: ControllerStatus, task) -> bool:
        return (task.touched or controller.mode == ControllerStatus.FAULT
                or task.reached and nanoseconds(task.header.stamp) >= end)

    finished = session.wait_status(over, EPISODE_S)
    if session.task.touched:
        return 'touched the pillar'
    if not finished or not session.task.reached:
        return f'goal not reached, controller {session.describe()}'
    return ''


def record_all(node: ExpertNode, session: Session) -> None:
    """Every scene round both sides; each failure is repeated once. Raises SessionError."""
    repeated = 0
    for count in range(node.demonstrations):
        number, side = count // 2, list(SIDES)[count % 2]
        scene = sample_scene(np.random.default_rng([node.seed, number]), node.goals)
        # Both sides get the same deviation: what comes before the turn must not tell which side follows.
        trajectory = expert(scene, SIDES[side], node.noise, np.random.default_rng([node.seed, number, 1]))
        label, name = f'demonstration {count + 1}/{node.demonstrations} {side}', f'scene_{number:04d}_{side}'
        for last_try in (False, True):
            problem = demonstrate(node, session, scene, trajectory, TASK.format(side=side), name)
            if not problem:
                break
            if last_try:
                raise SessionError(f'{label} failed twice: {problem}')
            repeated += 1
            print(f'{label} repeated: {problem}', flush=True)
        print(f'{label} reached', flush=True)
    print(f'{node.demonstrations} demonstrations recorded, {repeated} repeated', flush=True)


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = ExpertNode()
    except (ValueError, rclpy.exceptions.ParameterException) as error:
        print(f'expert_node: {error}', file=sys.stderr)
        rclpy.shutdown()
        sys.exit(2)
    session = Session(node)
    try:
        record_all(node, session)
    except (SessionError, DescriptionError) as error:
        print(f'expert_node: {error}', file=sys.stderr)
        sys.exit(1)
    finally:
        session.silence_s = 1.0
        with suppress(SessionError):  # the controller may be what failed
            session.stop()
        session.close()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == '__main__':
    main()
