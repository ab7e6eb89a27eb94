"""Recorder: one rosbag2 bag (mcap) an episode, holding what the contract names, the commands, and what the system did.

Messages are written as they arrive, serialised, without being decoded.
"""
from __future__ import annotations

import re
import time
from pathlib import Path

from il_msgs.srv import StartEpisode, StopEpisode
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.task import Future

from il_policies.contract import load_contract
from il_policies.data.bag_writer import BagWriter
from il_policies.data.errors import BagError
from il_runtime.ring import Message
from il_runtime.ros import declare, run
from il_runtime.tap import Tap

DRAIN_S = 4.0
"""How long the end of an episode waits for messages that are still on their way [s]."""


class RecorderNode(Node):
    """Subscribes to everything at start, so that a silent stream is known before an episode begins."""

    def __init__(self):
        """Raises ContractError or BagError for what cannot be recorded, OSError for an unusable folder."""
        super().__init__('recorder')
        contract = declare(self, 'contract', '', "the robot's contract, a YAML file")
        output = declare(self, 'output', 'bags', 'folder in which each episode becomes a bag')
        self.contract = load_contract(contract)
        self.output = Path(output).expanduser().absolute()
        self.output.mkdir(parents=True, exist_ok=True)
        self.sim_time = self.get_parameter('use_sim_time').value
        self.writer: BagWriter | None = None
        self.task = ''
        self.failure = ''
        self.since, self.until = 0, None

        self.tap = Tap(self, self.contract, self._on_message)
        self.create_timer(0.5, self._adapt_reliability, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.create_service(StartEpisode, '~/start_episode', self._on_start)
        # A group of its own: it waits while messages are still being received.
        self.create_service(StopEpisode, '~/stop_episode', self._on_stop, callback_group=MutuallyExclusiveCallbackGroup())
        self.get_logger().info(f'{self.contract.robot}: recording to {self.output} on request')

    def _adapt_reliability(self) -> None:
        if self.writer is None:  # between episodes: it can cost a message
            self.tap.adapt_reliability()

    def _on_message(self, message: Message) -> None:
        if self.writer is None or message.sent < self.since:
            return
        if self.until is not None and message.sent > self.until:
            self.waiting_for.discard(message.topic)
            if not self.waiting_for:
                self.drained.set_result(None)
            return
        try:
            self.writer.write(message.topic, message.data, message.received, message.published)
        except OSError as error:
            self.failure = f'recording stopped, {self.writer.part} is incomplete: {error.strerror}'
            self.get_logger().error(self.failure)
            self.writer = None

    def _on_start(self, request: StartEpisode.Request, response: StartEpisode.Response) -> StartEpisode.Response:
        response.message = self._refusal(request.name)
        if response.message:
            return response
        name = request.name
        if not name:
            taken = [re.match(r'episode_(\d+)', path.name) for path in self.output.iterdir()]
            name = f'episode_{max((int(found[1]) for found in taken if found), default=-1) + 1:06d}'
        try:
            writer = BagWriter(self.output / name, self.tap.types)
            for topic in self.tap.topics():
                writer.add_topic(*topic)
        except (BagError, OSError) as error:
            response.message = str(error)
            return response
        self.writer, self.task, self.failure = writer, request.task, ''
        self.since, self.until = time.time_ns(), None
        response.success, response.path = True, str(writer.path)
        return response

    def _refusal(self, name: str) -> str:
        """Why an episode of this name cannot begin now; empty if it can."""
        if self.writer is not None:
            return f'{self.writer.path.name} is being recorded; stop it first'
        if name and not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*', name) or name.endswith('.part'):
            return f'{name!r} is no name for a bag; valid: letters, digits, _ . -'
        if self.sim_time and not self.get_clock().now().nanoseconds:
            return 'use_sim_time is set, but nothing was received on /clock'
        silent = []
        for stream in self.contract.observations.values():
            topic = self.tap.resolved(stream.topic)
            age = time.monotonic() - self.tap.last_seen.get(topic, float('-inf'))
            if age > max(2.0, 3.0 / stream.rate):
                silent.append(f'{topic} ({"never seen" if age == float("inf") else f"last seen {age:.1f} s ago"}, '
                              f'{self.count_publishers(topic)} publishers)')
        return f'silent: {", ".join(silent)}' if silent else ''

    async def _on_stop(self, request: StopEpisode.Request, response: StopEpisode.Response) -> StopEpisode.Response:
        if self.writer is None or self.until is not None:
            response.message = self.failure or 'nothing is being recorded'
            return response
        # A busy machine hands messages over late: what was sent before now belongs to the episode, and what is sent after
        # it tells that a topic has nothing more to come.
        self.until = time.time_ns()
        self.waiting_for = {self.tap.resolved(stream.topic) for stream in self.contract.observations.values()}
        self.drained = Future()
        give_up = self.create_timer(DRAIN_S, lambda: self.drained.set_result(None), clock=Clock(clock_type=ClockType.STEADY_TIME))
        await self.drained
        self.destroy_timer(give_up)
        if self.writer is None:  # the disk gave up meanwhile
            response.message = self.failure
            return response
        response.path = str(self.writer.path)
        try:
            if request.discard:
                self.writer.discard()
                response.message = 'discarded'
            else:
                counts = self.writer.counts
                self._close('true' if request.task_succeeded else 'false', interrupted=False)
                response.message = f'{sum(counts.values())} messages'
            response.success = True
        except OSError as error:
            response.message = f'{self.writer.part} is incomplete: {error.strerror}'
        self.writer = None
        return response

    def _close(self, success: str, interrupted: bool) -> None:
        self.writer.close({**self.tap.about(), 'task': self.task, 'success': success,
                           'interrupted': 'true' if interrupted else 'false'})

    def finish(self, _spin_once) -> None:
        """Complete an open bag, marked as interrupted and without a label."""
        self.tap.take()
        if self.writer is not None:
            self._close('unknown', interrupted=True)
            self.get_logger().warning(f'interrupted: {self.writer.path} was completed without a label')


def main() -> None:
    """Entry point."""
    run(RecorderNode)


if __name__ == '__main__':
    main()
