"""Everything that a contract names and what the system does about it, serialised, as it arrives: for recorders.

Stamps: with a real clock the middleware's receive and source stamps; with use_sim_time both are the simulated time of
arrival, since the source stamp is wall time and a bag must have one clock.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
from il_msgs.msg import ActionChunk, ControllerStatus, TaskStatus
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSCompatibility, QoSProfile, ReliabilityPolicy, qos_check_compatible
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo
from sensor_msgs.msg import JointState

from il_policies.bags.writer import CONTRACT, add_definitions, cut_short, standard_types
from il_policies.contract import Contract
from il_policies.data.errors import BagError
from il_runtime.outputs import OUTPUT_TYPES
from il_runtime.ring import Message, Meter
from il_runtime.ros import message_class

DEPTH = 1000
"""Messages of a topic that may wait while the disk or the machine is busy: a second of the fastest joint states."""
POLL_S = 0.05
"""How often what has arrived is taken [s]."""
SILENT_S = 2.0
"""A stream that was last heard of longer ago, and three periods ago, is silent [s, wall]."""
CONTROLLER_STATUS = 'controller/status'
SENSOR = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.BEST_EFFORT)
COMMAND = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class _Polled(MutuallyExclusiveCallbackGroup):
    """Subscriptions for which the executor is not woken, as long as `polled`.

    A round of the executor for each of 250 messages a second takes 17 % of a core, taking together what has arrived takes 5 %.
    """

    polled = True

    def can_execute(self, entity) -> bool:
        """Whether the executor may wait for an entity."""
        return not self.polled and super().can_execute(entity)


class Tap:
    """Subscribes to the streams, command and outputs of a contract, to teleop, chunks and status; none needs a publisher."""

    def __init__(self, node: Node, contract: Contract, on_message: Callable[[Message], None]):
        """on_message is called from the executor's thread. Raises ValueError for types that cannot be recorded."""
        self.contract = contract
        self.last_seen: dict[str, float] = {}
        """Resolved topic → when a message was last taken: monotonic [s]; the simulated clock may stand still."""
        self.types = standard_types()
        self._node, self._on_message = node, on_message
        self._sim_time = node.get_parameter('use_sim_time').value
        self._names: dict[str, str] = {}  # topic as in the contract → resolved
        self._topics: dict[str, str] = {}  # resolved topic → type
        self._subscribed: dict[str, Subscription] = {}  # by resolved topic
        self._group = _Polled()
        self._meters: dict[str, Meter] = {}  # by resolved topic of a stream
        for stream in contract.observations.values():
            self._subscribe(stream.topic, message_class(stream), SENSOR)
            self._meters.setdefault(self._names[stream.topic], Meter(stream.rate))
        for output in contract.action.outputs:
            self._subscribe(output.topic, OUTPUT_TYPES[output.type], COMMAND)
        for name, kind in ((contract.action.topic, JointState), ('teleop', JointState), ('chunks', ActionChunk),
                           ('task_status', TaskStatus)):
            self._subscribe(name, kind, COMMAND)
        self._subscribe(CONTROLLER_STATUS, ControllerStatus, LATCHED)
        self._timer = node.create_timer(POLL_S, self.take, clock=Clock(clock_type=ClockType.STEADY_TIME))
        if self._sim_time:
            self._stop_polling()

    def _subscribe(self, name: str, kind, qos: QoSProfile) -> None:
        topic = self._names[name] = self._node.resolve_topic_name(name)
        if topic in self._topics:
            return  # two features of one topic
        self._topics[topic] = _type_name(kind)
        add_definitions(self.types, self._topics[topic], _definitions)
        self._subscribed[topic] = self._subscription(topic, kind, qos)

    def _subscription(self, topic: str, kind, qos: QoSProfile) -> Subscription:
        def on_message(data: bytes, info: dict) -> None:
            self.take((self._message(topic, data, info),))

        return self._node.create_subscription(kind, topic, on_message, qos, callback_group=self._group, raw=True)

    def _stop_polling(self) -> None:
        """Stamps that are taken on arrival need a wake-up for each message."""
        self._group.polled = False
        self._timer.cancel()

    def take(self, first: tuple[Message, ...] = ()) -> None:
        """Hand over what has arrived, in the order of receipt, after `first`."""
        taken = list(first)
        for topic, subscription in self._subscribed.items():
            for _ in range(DEPTH):
                arrived = subscription.handle.take_message(subscription.msg_type, True)
                if arrived is None:
                    break
                taken.append(self._message(topic, *arrived))
        taken.sort(key=lambda message: message.received)
        for message in taken:
            self._on_message(message)

    def _message(self, topic: str, data: bytes, info: dict) -> Message:
        self.last_seen[topic] = time.monotonic()
        sent, received = info['source_timestamp'], info['received_timestamp']
        published = sent
        if self._sim_time:
            received = published = self._now()
        elif not received:  # not every middleware says (Cyclone DDS)
            self._stop_polling()
            received = self._now()
        if topic in self._meters:
            self._meters[topic].add(received)
        return Message(topic, data, received, published or received, sent or time.time_ns())

    def _now(self) -> int:
        """Time on the clock of the bag [ns]."""
        return self._node.get_clock().now().nanoseconds

    def off_rate(self, tolerance: float) -> dict[str, str]:
        """Streams whose rate is further from the declared one than this share of it: resolved topic → both rates in words."""
        self.take()
        now = self._now()
        return {topic: words for topic, meter in self._meters.items() if (words := meter.off(now, tolerance))}

    def faults(self, tolerance: float) -> list[str]:
        """Why the contract's streams cannot be recorded now: a line for each that does not come as declared."""
        off, now, lines = self.off_rate(tolerance), self._now(), []
        for topic, meter in self._meters.items():
            age = time.monotonic() - self.last_seen.get(topic, float('-inf'))
            if age > max(SILENT_S, 3.0 / meter.declared):
                since = 'never seen' if age == float('inf') else f'silent for {age:.1f} s'
                lines.append(f'E202 {topic}: {since}, declared {meter.declared:g} Hz; {self._offers(topic)}')
            elif meter.known(now) < (1.0 if topic in off else 0.3):  # a stream may begin with a burst of what has waited
                lines.append(f'E202 {topic}: has just begun; ask again')
            elif topic in off:
                lines.append(f'E211 {topic}: {off[topic]}; {self._offers(topic)}; correct its driver, or `rate` in the contract')
        return lines

    def publishers(self, topic: str) -> list[tuple[TopicEndpointInfo, str]]:
        """Who publishes a resolved topic, and why that does not reach the subscription here: '' if it does."""
        found = []
        for info in self._node.get_publishers_info_by_topic(topic):
            compatible, reason = qos_check_compatible(info.qos_profile, self._subscribed[topic].qos_profile)
            found.append((info, reason if compatible == QoSCompatibility.ERROR else ''))
        return found

    def _offers(self, topic: str) -> str:
        """Who publishes a topic, with what QoS, and why that does not reach this subscription, if it does not."""
        offers = []
        for info, incompatible in self.publishers(topic):
            qos = info.qos_profile
            offer = (f'{info.node_namespace.rstrip("/")}/{info.node_name} offers {qos.reliability.name.lower()}, '
                     f'{qos.durability.name.lower()}')
            if info.topic_type != self._topics[topic]:
                offer += f', but of type {info.topic_type}: the contract says {self._topics[topic]}'
            elif incompatible:
                offer += f', incompatible: {incompatible}'
            offers.append(offer)
        return ' and '.join(offers) or 'nobody publishes it: start its driver, or correct `topic` in the contract'

    def adapt_reliability(self) -> None:
        """As `ros2 bag record`: reliable where all publishers are, so that nothing is lost; else what all can serve."""
        for topic, subscription in self._subscribed.items():
            qos = subscription.qos_profile
            offered = {info.qos_profile.reliability for info in self._node.get_publishers_info_by_topic(topic)}
            wanted = ReliabilityPolicy.RELIABLE if offered == {ReliabilityPolicy.RELIABLE} else ReliabilityPolicy.BEST_EFFORT
            if offered and wanted != qos.reliability:
                profile = QoSProfile(depth=DEPTH, reliability=wanted, durability=qos.durability)
                replacement = self._subscription(topic, subscription.msg_type, profile)
                self.take()  # what still waits in the old one
                self._subscribed[topic] = replacement
                self._node.destroy_subscription(subscription)
                if topic in self._meters:  # for a moment both of them received
                    self._meters[topic] = Meter(self._meters[topic].declared)

    def resolved(self, name: str) -> str:
        """The topic that a name of the contract stands for here."""
        return self._names[name]

    def topics(self) -> list[tuple[str, str, list[dict]]]:
        """Of every topic its name, type and the QoS profiles on offer now: arguments of BagWriter.add_topic."""
        return [(topic, kind, [_profile(info.qos_profile) for info in self._node.get_publishers_info_by_topic(topic)])
                for topic, kind in self._topics.items()]

    def about(self) -> dict[str, str]:
        """What a bag says about the robot, the contract itself included."""
        return {'robot': self.contract.robot, 'contract_hash': self.contract.hash, 'topics': json.dumps(self._names),
                CONTRACT: json.dumps(self.contract.to_dict())}


def warn_of_cut_short(node: Node, folder: Path) -> None:
    """Name what recorders that were killed have left in a folder, and the way to recover it."""
    if parts := cut_short(folder):
        names = ', '.join(part.name for part in parts)
        node.get_logger().warning(f'E101 {folder}: cut short: {names}; recover what is there with '
                                  f'`il convert {folder} --salvage --out DATASET`, or remove it')


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
