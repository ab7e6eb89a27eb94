"""Closed-loop episodes for the demo: over DDS in real time, and in lock-step without ROS."""
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rclpy
from il_msgs.msg import ActionChunk, ControllerStatus, TaskStatus
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import JointState

from il_policies.contract import Contract
from il_policies.data.decode import decode
from il_policies.sim.reach_around import EPISODE_S, Scene
from il_runtime.core.safety import limit_violations
from il_runtime.ros import STATUS_QOS, chunk_qos, nanoseconds
from il_runtime.session import Session, SessionError


class Spectator:
    """Subscribes to a running graph and keeps what an episode showed."""

    def __init__(self, node, contract: Contract):
        self.contract = contract
        self.stream = contract.observations[contract.joint_state]
        self.lateness: list[float] = []
        self.statuses: list[ControllerStatus] = []
        self.clear()
        node.create_subscription(JointState, contract.action.topic, self._on_command, QoSProfile(depth=200))
        node.create_subscription(JointState, self.stream.topic, self._on_joints, qos_profile_sensor_data)
        node.create_subscription(TaskStatus, 'task_status', self._on_task, QoSProfile(depth=50))
        node.create_subscription(ControllerStatus, 'controller/status', self._on_status, STATUS_QOS)
        node.create_subscription(ActionChunk, 'chunks', self._on_chunk, chunk_qos())

    def clear(self) -> None:
        """Begin a new episode."""
        self.commands: list[tuple[int, np.ndarray]] = []
        self.joints: list[tuple[int, np.ndarray]] = []
        self.tips: list[tuple[float, float, float]] = []
        self.chunks: list[tuple[int, np.ndarray, float]] = []

    def _on_command(self, message: JointState) -> None:
        self.commands.append((nanoseconds(message.header.stamp), np.array(message.position)))

    def _on_joints(self, message: JointState) -> None:
        self.joints.append((nanoseconds(message.header.stamp), decode(message, self.stream)))

    def _on_task(self, message: TaskStatus) -> None:
        self.tips.append((message.tip.x, message.tip.y, message.tip.z))

    def _on_status(self, message: ControllerStatus) -> None:
        self.lateness.extend(message.lateness)
        self.statuses.append(message)

    def _on_chunk(self, message: ActionChunk) -> None:
        positions = np.array(message.positions, dtype=float).reshape(message.horizon, -1)
        self.chunks.append((nanoseconds(message.start), positions, message.step_period))


def over_dds(contract: Contract, scenes: list[Scene], save: Path, healthy: Callable[[], None],
             progress: Callable[[int, str], None]) -> dict:
    """Run one episode a scene in the graph that is up, save them as `save`, and return counts and timing.

    healthy: raises if a node has died. Raises SessionError if the graph does not answer.
    """
    node = rclpy.create_node('demo')
    spectator = Spectator(node, contract)
    session = Session(node)
    episodes, shown, violations, faults = [], None, 0, []
    try:
        wait_for_planner(node, healthy)
        for i, scene in enumerate(scenes):
            healthy()
            reached, touched, fault = _episode(session, spectator, scene)
            if fault:
                faults.append(fault)
            tips, commands = np.array(spectator.tips), list(spectator.commands)
            stamps = np.array([stamp for stamp, _ in commands], dtype=np.int64)
            violations += limit_violations(contract, np.array([q for _, q in commands]), (stamps - stamps[0]) * 1e-9)
            episodes.append((scene, tips, reached, touched))
            success = reached and not touched
            # Show the first success, or else the first episode.
            if shown is None or (success and not shown[0]):
                shown = (success, scene, commands, list(spectator.joints), list(spectator.chunks))
            progress(i + 1, fault or ('touched the pillar' if touched else 'reached' if reached else 'not reached'))
        session.stop()
        last = spectator.statuses[-1]
    finally:
        session.close()
        node.destroy_node()
    _, scene, commands, joints, chunks = shown
    zero = commands[0][0]
    save_rollouts(save, episodes, lateness=np.array(spectator.lateness),
                  shown_command_times=np.array([stamp - zero for stamp, _ in commands]) * 1e-9,
                  shown_commands=np.array([q for _, q in commands]),
                  shown_joint_times=np.array([stamp - zero for stamp, _ in joints]) * 1e-9,
                  shown_joints=np.array([q for _, q in joints]),
                  shown_chunk_starts=np.array([start - zero for start, _, _ in chunks]) * 1e-9,
                  shown_chunks=np.array([positions for _, positions, _ in chunks]),
                  chunk_period=chunks[0][2] if chunks else 0.0, shown_goal=np.array(scene.goal))
    return {'successes': sum(reached and not touched for _, _, reached, touched in episodes),
            'touched': sum(touched for *_, touched in episodes), 'episodes': len(episodes), 'faults': faults,
            'ticks': last.ticks, 'missed_ticks': last.missed_ticks, 'limit_violations': violations}


def wait_for_planner(node, healthy: Callable[[], None]) -> None:
    """Until somebody publishes chunks; loading a network takes a while. Raises SessionError after a minute."""
    deadline = time.monotonic() + 60.0
    while not node.count_publishers('chunks'):
        healthy()
        if time.monotonic() > deadline:
            raise SessionError('nobody publishes chunks; is a policy node running?')
        time.sleep(0.1)
    time.sleep(0.5)  # until the planner and the controller have found each other


def _episode(session: Session, spectator: Spectator, scene: Scene) -> tuple[bool, bool, str]:
    """Reset, arm, watch; (reached, touched, why the controller faulted or '')."""
    session.stop()
    session.reset(scene)
    spectator.clear()
    session.arm()
    session.wait_status(lambda controller, task: task.reached or task.touched or controller.mode == ControllerStatus.FAULT,
                        EPISODE_S)
    faulted = session.controller.mode == ControllerStatus.FAULT
    return session.task.reached and not faulted, session.task.touched, session.controller.reason if faulted else ''


def in_lockstep(checkpoint: Path, scenes: list[Scene], seed: int, execution: dict, save: Path, shuffled: bool = False) -> dict:
    """Episodes without DDS, in a process of their own; saves them as `save` and returns counts and smoothness.

    shuffled: with the camera images of other episodes.
    """
    import torch

    from il_policies import checkpoint as checkpoints
    from il_policies.lockstep import Execution, run_episodes
    torch.set_num_threads(1)
    done = run_episodes(checkpoints.load(checkpoint), scenes, seed, Execution(**execution), shuffled=shuffled)
    commands = [episode.commands for episode in done]
    save_rollouts(save, [(episode.scene, episode.tips, episode.reached, episode.touched) for episode in done],
                  commands=np.concatenate(commands))
    jerk = np.concatenate([np.diff(c, 3, axis=0) / 0.02**3 for c in commands])
    return {'successes': sum(episode.success for episode in done), 'touched': sum(episode.touched for episode in done),
            'episodes': len(done), 'limit_violations': sum(episode.violations for episode in done),
            'jerk_rms': round(float(np.sqrt(np.mean(jerk**2))), 1),
            # The side on which the tip was at its widest.
            'left': sum(bool(tips[np.argmax(np.abs(tips[:, 1])), 1] > 0) for tips in (episode.tips for episode in done))}


def save_rollouts(path: Path, episodes: list[tuple[Scene, np.ndarray, bool, bool]], **arrays: np.ndarray) -> None:
    """Paths of episodes (scene, tips (N, 3), reached, touched), concatenated, with what else belongs to them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path, tips=np.concatenate([tips.reshape(-1, 3) for _, tips, _, _ in episodes]),
        ends=np.cumsum([len(tips) for _, tips, _, _ in episodes]),
        reached=np.array([reached for _, _, reached, _ in episodes]), touched=np.array([touched for *_, touched in episodes]),
        starts=np.array([scene.start for scene, *_ in episodes]), goals=np.array([scene.goal for scene, *_ in episodes]),
        **arrays)
