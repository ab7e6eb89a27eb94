"""Listens for a while to everything that a contract names and prints as JSON what it is like: the eyes of `il check --live`.

It judges nothing and publishes nothing. Where /clock is published it takes the times of arrival from there.
"""
from __future__ import annotations

import dataclasses
import time

from rclpy.duration import Infinite
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import JointState

from il_policies.check.facts import Endpoint, Graph, Observed
from il_policies.contract import load_contract
from il_policies.data.recording import streams_of
from il_runtime.outputs import OUTPUT_TYPES
from il_runtime.ring import Message
from il_runtime.ros import answer, be_nice, declare, message_class
from il_runtime.tap import Tap

DISCOVERY_S = 1.5
"""Between two looks at who is there, until they agree [s]."""
ALONE_S = 4.5
"""Until it is believed that nobody is there: who missed our first announcements hears the next one after 3 s."""
OURS = QoSProfile(depth=1, deadline=Infinite, liveliness_lease_duration=Infinite)
"""QoS of the controller's outputs, as the graph would show it: what is not set is infinite there."""
RECORDERS = ('recorder', 'flight_recorder', 'rosbag2_recorder')
"""Nodes that listen to commands without obeying them."""


class ProbeNode(Node):
    """Subscribes as the recorder does."""

    def __init__(self):
        """Raises ContractError or ValueError for a contract whose types are not read."""
        super().__init__('probe')
        contract = declare(self, 'contract', '', "the robot's contract, a YAML file")
        self.seconds = declare(self, 'seconds', 5.0, 'how long to listen [s]', 0.5, 3600.0)
        be_nice(self)
        self.contract = load_contract(contract)

    def listen(self) -> None:
        """Subscribe, once it is known whether time is simulated."""
        self.sim_time = self.count_publishers('/clock') > 0
        self.set_parameters([Parameter('use_sim_time', value=self.sim_time)])
        self.tap = Tap(self, self.contract, self._on_message)
        declared = streams_of(self.contract)
        declared['teleop'] = dataclasses.replace(declared['action'], topic='teleop')
        self.observed = {name: Observed(stream, self.tap.resolved(stream.topic)) for name, stream in declared.items()}
        self.classes = {name: message_class(stream) if name in self.contract.observations else JointState
                        for name, stream in declared.items()}

    def _on_message(self, message: Message) -> None:
        names = [name for name, observed in self.observed.items() if observed.topic == message.topic]
        if names and (message.received or not self.sim_time):  # before the first /clock simulated time is unknown
            content = deserialize_message(message.data, self.classes[names[0]])
            for name in names:
                self.observed[name].add(content, message.received, message.published)

    def graph(self) -> Graph:
        """What has been seen."""
        topics = {name: tuple(types) for name, types in self.get_topic_names_and_types()}
        published = {name: types for name, types in topics.items() if self.count_publishers(name)}
        mine = [stream.topic for stream in streams_of(self.contract).values()]
        outputs = [output.topic for output in self.contract.action.outputs]
        resolved = {name: self.tap.resolved(name) for name in (*mine, *outputs, 'teleop')}
        # Another topic of these types that somebody listens to may be the one that was meant.
        unlike_states = OUTPUT_TYPES.keys() - {'sensor_msgs/msg/JointState'}
        listening = {resolved[name] for name in outputs} | {name for name, types in topics.items() if unlike_states & set(types)}
        return Graph(self.get_namespace(), self.seconds, self.sim_time, resolved, published,
                     {topic: self._offers(topic) for topic in resolved.values()},
                     {topic: self._audience(topic) for topic in sorted(listening)},
                     {name: observed.measured() for name, observed in self.observed.items()})

    def _offers(self, topic: str) -> tuple[Endpoint, ...]:
        return tuple(_endpoint(info, problem) for info, problem in self.tap.publishers(topic))

    def _audience(self, topic: str) -> tuple[Endpoint, ...]:
        """Who obeys a topic: not this node, no recorder."""
        found = []
        for info in self.get_subscriptions_info_by_topic(topic):
            if info.node_name != self.get_name() and info.node_name not in RECORDERS:
                compatible, reason = qos_check_compatible(OURS, info.qos_profile)
                found.append(_endpoint(info, reason if compatible == QoSCompatibility.ERROR else ''))
        return tuple(found)


def _endpoint(info, problem: str) -> Endpoint:
    qos = info.qos_profile
    return Endpoint(f'{info.node_namespace.rstrip("/")}/{info.node_name}', info.topic_type,
                    f'{qos.reliability.name.lower()}, {qos.durability.name.lower()}',
                    problem.removeprefix('ERROR: ').rstrip(';'))


def look() -> dict:
    """What is seen once it is known who is there."""
    node = ProbeNode()
    executor = SingleThreadedExecutor()
    executor.add_node(node)

    def spin(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            executor.spin_once(timeout_sec=max(end - time.monotonic(), 0.0))

    alone, known = time.monotonic() + ALONE_S, None
    while known != (known := node.get_topic_names_and_types()) or (
            len(node.get_node_names()) == 1 and time.monotonic() < alone):
        spin(DISCOVERY_S)
    node.listen()
    spin(node.seconds)
    node.tap.take()
    return dataclasses.asdict(node.graph())


def main() -> None:
    """Entry point."""
    answer('probe_node', look)


if __name__ == '__main__':
    main()
