"""Listens to planner, controller and commands and prints as JSON when what happened: the ears of `il bench latency`.

With a checkpoint it first starts simulator, controller and planner, each a process of its own, and drives episodes of
reach_around with them; without one it listens to what runs, and moves nothing. It judges nothing. All times are of the wall clock
[ns]; `sent` is when the middleware sent a message, by its own stamp, and `received` when it came to this process.
"""
from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from il_msgs.msg import ActionChunk, ControllerStatus
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState

from il_policies.contract import load_contract
from il_policies.sim.reach_around import EPISODE_S, sample_scene
from il_runtime.core.controller import STARVED
from il_runtime.demo.processes import DemoError, Processes, terminate_like_interrupt
from il_runtime.demo.rollouts import wait_for_planner
from il_runtime.ros import answer, be_nice, declare, nanoseconds
from il_runtime.session import Session, SessionError

SILENT_S = 10.0
"""Who has heard no controller for so long does not wait any longer [s]."""
DEPTH = 1000
"""Messages that may wait while the machine is busy: nothing may be lost."""
FOLLOWING = (ControllerStatus.HOLD, ControllerStatus.POLICY, ControllerStatus.APPROACH, ControllerStatus.STOPPING)
SEED = 1000
"""Of the starts and goals."""


class LatencyNode(Node):
    """Keeps what it hears between `begin` and `end`."""

    def __init__(self):
        """Raises ContractError for a contract that cannot be used."""
        super().__init__('latency')
        self.path = declare(self, 'contract', '', "the robot's contract, a YAML file")
        self.seconds = declare(self, 'seconds', 60.0, 'how long to measure [s]', 1.0, 3600.0)
        self.checkpoint = declare(self, 'checkpoint', '', 'folder written by il train, to be run in simulation; empty: listen to '
                                  'what runs')
        self.planning = {name: declare(self, name, default, f'of the planner, see policy_node: {name}')
                         for name, default in (('plan_when', 'stride'), ('stride', 8), ('backend', 'auto'), ('threads', 1))}
        self.contract = load_contract(self.path)
        self.chunks, self.planned, self.followed, self.commands, self.statuses = [], [], [], [], []
        self.plan_when = ''
        lossless, latched = QoSProfile(depth=DEPTH), QoSProfile(depth=DEPTH, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.create_subscription(ActionChunk, 'chunks', self._on_chunk, lossless)
        self.create_subscription(JointState, self.contract.action.topic, self._on_command, lossless)
        self.create_subscription(ControllerStatus, 'controller/status', self._on_status, latched)
        for name, kept in (('policy', self.planned), ('controller', self.followed)):
            self.create_subscription(DiagnosticStatus, f'{name}/chunk_times',
                                     lambda message, kept=kept: self._on_times(message, kept), lossless)

    def _on_times(self, message: DiagnosticStatus, kept: list[dict]) -> None:
        values = {pair.key: pair.value for pair in message.values}
        self.plan_when = values.pop('plan when', self.plan_when)
        kept.append({key: int(value) for key, value in values.items()})

    def _on_chunk(self, message: ActionChunk, info: dict) -> None:
        start = nanoseconds(message.start)
        self.chunks.append({
            'epoch': message.epoch, 'sequence': message.sequence, 'policy': message.policy, 'step_period': message.step_period,
            'observed': nanoseconds(message.header.stamp), 'inference': nanoseconds(message.inference_time),
            'start': start, 'end': start + round((message.horizon - 1) * message.step_period * 1e9),
            'sent': info['source_timestamp'], 'received': info['received_timestamp'] or time.time_ns()})

    def _on_command(self, message: JointState, info: dict) -> None:
        self.commands.append({'stamp': nanoseconds(message.header.stamp), 'sent': info['source_timestamp']})

    def _on_status(self, message: ControllerStatus) -> None:
        self.statuses.append({
            'time': nanoseconds(message.header.stamp), 'epoch': message.epoch,
            'follows': message.follows_chunks and message.mode in FOLLOWING,
            'starved': message.mode in (ControllerStatus.STOPPING, ControllerStatus.HOLD) and message.reason == STARVED,
            'fault': message.mode == ControllerStatus.FAULT, 'reason': message.reason})

    def heard(self, began: int, ended: int) -> dict:
        """All that was kept."""
        return {'began': began, 'ended': ended, 'chunks': self.chunks, 'planned': self.planned, 'followed': self.followed,
                'commands': self.commands, 'statuses': self.statuses, 'plan_when': self.plan_when}

    def drive(self, healthy) -> None:
        """Episodes of reach_around for `seconds`. Raises SessionError; healthy raises if a node has died."""
        session, scenes, remaining = Session(self), 0, self.seconds
        try:
            wait_for_planner(self, healthy)
            while remaining > 0.1:
                healthy()
                session.stop()
                session.reset(sample_scene(np.random.default_rng([SEED, scenes])))
                session.arm()
                armed = time.monotonic()
                session.wait_status(lambda controller, _: controller.mode == ControllerStatus.FAULT, min(EPISODE_S, remaining))
                remaining -= time.monotonic() - armed
                scenes += 1
            session.stop()
        finally:
            session.close()


def listen(node: LatencyNode) -> tuple[int, int]:
    """What runs already, for `seconds`; when that began and ended [ns]. Raises ValueError if there is nothing to listen to."""
    be_nice(node)
    executor = SingleThreadedExecutor()
    executor.add_node(node)

    def spin(seconds: float, until=lambda: False) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            executor.spin_once(timeout_sec=max(end - time.monotonic(), 0.0))

    spin(SILENT_S, lambda: node.statuses)
    if not node.statuses:
        topic = node.resolve_topic_name('controller/status')
        raise ValueError(f'no controller: nothing received on {topic} within {SILENT_S:g} s')
    if node.count_publishers('/clock'):
        raise ValueError('time is simulated (/clock is published): durations would be of another clock')
    for kept in (node.chunks, node.planned, node.followed, node.commands):
        kept.clear()  # what came before; the controller's last status holds on
    began = time.time_ns()
    spin(node.seconds)
    return began, time.time_ns()


def simulate(node: LatencyNode) -> tuple[int, int]:
    """Simulator, controller and planner as processes; when the episodes began and ended [ns].

    Raises DemoError if one of them dies, SessionError if one does not answer.
    """
    with tempfile.TemporaryDirectory(prefix='il_latency_') as folder, Processes(Path(folder)) as processes:
        try:
            processes.node('simulator_node', contract=node.path)
            processes.node('controller_node', contract=node.path)
            processes.node('policy_node', contract=node.path, checkpoint=node.checkpoint, **node.planning)
            be_nice(node)  # only now: processes inherit it
            began = time.time_ns()
            node.drive(processes.check)
        except SessionError as error:
            processes.check()  # who died is why nobody answered
            raise ValueError(str(error)) from None
        except DemoError as error:  # its logs are about to go
            raise ValueError(str(error).partition(' (log: ')[0]) from None
        return began, time.time_ns()


def measure() -> dict:
    """What was heard, with nodes of its own or of others."""
    with terminate_like_interrupt():
        node = LatencyNode()
        return node.heard(*(simulate if node.checkpoint else listen)(node))


def main() -> None:
    """Entry point."""
    answer('latency_node', measure)


if __name__ == '__main__':
    main()
