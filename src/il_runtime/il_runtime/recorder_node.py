"""Recorder: one rosbag2 bag (mcap) an episode, holding what the contract names, the commands, and what the system did.

Messages are written as they arrive, serialised, without being decoded. Stamps in the bag: with a real clock the
middleware's receive and source stamps; with use_sim_time both are the simulated time of arrival, since the source stamp
is wall time and a bag must have one clock.
"""
from __future__ import annotations

import json
import re
import time
from pathlib import Path

from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
from il_msgs.msg import ActionChunk, ControllerStatus, TaskStatus
from il_msgs.srv import StartEpisode, StopEpisode
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from rclpy.task import Future
from sensor_msgs.msg import JointState

from il_policies.contract import load_contract
from il_policies.data.bag import BagError, BagWriter, add_definitions, standard_types
from il_runtime.ros import STATUS_QOS, chunk_qos, declare, message_class, run

DEPTH = 1000
"""Messages of a topic that may wait while the disk or the machine is busy: a second of the fastest joint states."""


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

        sensor = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.BEST_EFFORT)
        command = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE)
        self.types = standard_types()
        self.topics: dict[str, str] = {}  # resolved topic → type
        self.subscribed: dict[str, Subscription] = {}  # by resolved topic
        self.sensors: list[str] = []  # those of observation streams
        self.last_seen: dict[str, float] = {}  # resolved topic → monotonic [s]; the simulated clock may stand still
        for stream in self.contract.observations.values():
            self._subscribe(stream.topic, message_class(stream), sensor)
        self.create_timer(0.5, self._adapt_reliability, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._subscribe(self.contract.action.topic, JointState, command)
        self._subscribe('task_status', TaskStatus, command)
        self._subscribe('controller/status', ControllerStatus, STATUS_QOS)
        self._subscribe('chunks', ActionChunk, chunk_qos())
        self.create_service(StartEpisode, '~/start_episode', self._on_start)
        # A group of its own: it waits while messages are still being received.
        self.create_service(StopEpisode, '~/stop_episode', self._on_stop, callback_group=MutuallyExclusiveCallbackGroup())
        self.get_logger().info(f'{self.contract.robot}: recording to {self.output} on request')

    def _subscribe(self, name: str, kind, qos: QoSProfile) -> None:
        topic = self.resolve_topic_name(name)
        if topic in self.topics:
            return  # two features of one topic
        self.topics[topic] = _type_name(kind)
        add_definitions(self.types, self.topics[topic], _definitions)

        def on_message(data: bytes, info: dict) -> None:
            self._on_message(topic, data, info)
            # The executor hands over one message a topic and round, and a round takes a millisecond: on a busy machine
            # a queue would only grow. What else has arrived is taken at once.
            for _ in range(DEPTH):
                taken = self.subscribed[topic].handle.take_message(kind, True)
                if taken is None:
                    break
                self._on_message(topic, *taken)

        self.subscribed[topic] = self.create_subscription(kind, topic, on_message, qos, raw=True)
        if qos.reliability == ReliabilityPolicy.BEST_EFFORT:
            self.sensors.append(topic)

    def _adapt_reliability(self) -> None:
        """As `ros2 bag record`: reliable where all publishers are, so that nothing is lost; else what all can serve."""
        if self.writer is not None:
            return
        for topic in self.sensors:
            subscription = self.subscribed[topic]
            offered = {info.qos_profile.reliability for info in self.get_publishers_info_by_topic(topic)}
            wanted = ReliabilityPolicy.RELIABLE if offered == {ReliabilityPolicy.RELIABLE} else ReliabilityPolicy.BEST_EFFORT
            if offered and wanted != subscription.qos_profile.reliability:
                self.subscribed[topic] = self.create_subscription(
                    subscription.msg_type, topic, subscription.callback, QoSProfile(depth=DEPTH, reliability=wanted), raw=True)
                self.destroy_subscription(subscription)

    def _on_message(self, topic: str, data: bytes, info: dict) -> None:
        self.last_seen[topic] = time.monotonic()
        sent = info['source_timestamp']
        if self.writer is None or sent < self.since:
            return
        if self.until is not None and sent > self.until:
            self.waiting_for.discard(topic)
            if not self.waiting_for:
                self.drained.set_result(None)
            return
        if self.sim_time:
            received = published = self.get_clock().now().nanoseconds
        else:
            received = info['received_timestamp'] or self.get_clock().now().nanoseconds
            published = sent or received
        try:
            self.writer.write(topic, data, received, published)
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
            writer = BagWriter(self.output / name, self.types)
            for topic, type_name in self.topics.items():
                publishers = self.get_publishers_info_by_topic(topic)
                writer.add_topic(topic, type_name, [_profile(publisher.qos_profile) for publisher in publishers])
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
            topic = self.resolve_topic_name(stream.topic)
            age = time.monotonic() - self.last_seen.get(topic, float('-inf'))
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
        self.waiting_for = {self.resolve_topic_name(stream.topic) for stream in self.contract.observations.values()}
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
        self.writer.close({
            'robot': self.contract.robot, 'contract_hash': self.contract.hash, 'task': self.task, 'success': success,
            'interrupted': 'true' if interrupted else 'false',
            'topics': json.dumps({stream.topic: self.resolve_topic_name(stream.topic)
                                  for stream in (*self.contract.observations.values(), self.contract.action)})})

    def finish(self, _spin_once) -> None:
        """Complete an open bag, marked as interrupted and without a label."""
        if self.writer is not None:
            self._close('unknown', interrupted=True)
            self.get_logger().warning(f'interrupted: {self.writer.path} was completed without a label')


def _type_name(message_class) -> str:
    """Such as sensor_msgs/msg/JointState."""
    package, kind = message_class.__module__.split('.')[:2]
    return f'{package}/{kind}/{message_class.__name__}'


def _definitions(package: str) -> Path:
    """Folder of a package's .msg files."""
    try:
        return Path(get_package_share_directory(package)) / 'msg'
    except PackageNotFoundError:
        raise BagError(f'package {package} is not installed here') from None


def _profile(qos: QoSProfile) -> dict:
    """What a publisher offers, as rosbag2 writes it."""
    def parts(duration) -> dict:
        return {'sec': duration.nanoseconds // 1_000_000_000, 'nsec': duration.nanoseconds % 1_000_000_000}

    return {'history': qos.history.name.lower(), 'depth': qos.depth, 'reliability': qos.reliability.name.lower(),
            'durability': qos.durability.name.lower(), 'deadline': parts(qos.deadline),
            'lifespan': parts(qos.lifespan), 'liveliness': qos.liveliness.name.lower(),
            'liveliness_lease_duration': parts(qos.liveliness_lease_duration),
            'avoid_ros_namespace_conventions': qos.avoid_ros_namespace_conventions}


def main() -> None:
    """Entry point."""
    run(RecorderNode)


if __name__ == '__main__':
    main()
