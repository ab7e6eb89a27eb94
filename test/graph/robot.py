"""A robot as its topics: publishes what a contract names and what the system would say about it, and keeps what it sent."""
from __future__ import annotations

import threading
import time

import cv2
import numpy as np
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import PointStamped
from il_msgs.msg import ActionChunk, ControllerStatus, TaskStatus
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from il_policies.contract import load_contract
from il_runtime.outputs import OUTPUT_TYPES
from il_runtime.ros import STATUS_QOS, chunk_qos, to_stamp

SIM_START = 100 * 10**9
TICK_NS = 5_000_000


def stamp_of(message) -> int:
    """When the robot sent it [ns], also for messages without a header."""
    if hasattr(message, 'header'):
        return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
    return int(message.data[0]) * 10**9 + int(message.data[1])


class Robot:
    """Publishes from a thread, at rates that add up to the declared ones.

    speed: None for real time, else simulated time runs that much faster than the wall clock.
    """

    def __init__(self, node, contract, speed: float | None = None, jpeg: bytes | None = None):
        self.node, self.speed = node, speed
        self.action = load_contract(contract).action
        self.mode, self.reason = ControllerStatus.INACTIVE, ''
        self.every = {  # topic: in ticks of 5 ms
            '/joint_states': 2, '/command': 4, '/camera/image/compressed': 20, '/goal': 20, '/task_status': 20, '/teleop': 4,
            '/chunks': 20, '/controller/status': 20, **{f'/{output.topic}': 4 for output in self.action.outputs}}
        sensors = {'/joint_states': JointState, '/camera/image/compressed': CompressedImage}
        kinds = {'/command': JointState, '/goal': PointStamped, '/task_status': TaskStatus, '/teleop': JointState,
                 **{f'/{output.topic}': OUTPUT_TYPES[output.type] for output in self.action.outputs}}
        self.publishers = {
            '/chunks': node.create_publisher(ActionChunk, 'chunks', chunk_qos(1.6)),
            '/controller/status': node.create_publisher(ControllerStatus, 'controller/status', STATUS_QOS),
            **{topic: node.create_publisher(kind, topic, qos_profile_sensor_data) for topic, kind in sensors.items()},
            **{topic: node.create_publisher(kind, topic, QoSProfile(depth=100)) for topic, kind in kinds.items()}}
        self.clock = node.create_publisher(Clock, '/clock', 10)
        self.jpeg = jpeg or cv2.imencode('.jpg', np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))[1].tobytes()
        self.silent: set[str] = set()
        self.sent: dict[str, list[int]] = {topic: [] for topic in self.publishers}  # stamps [ns]
        self.now = 0
        self.running = True
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        begin, k = time.monotonic(), 0
        while self.running:
            if self.speed:
                self.now = SIM_START + k * TICK_NS
                self.clock.publish(Clock(clock=to_stamp(self.now)))
            else:
                self.now = self.node.get_clock().now().nanoseconds
            for topic, publisher in self.publishers.items():
                if k % self.every[topic] == 0 and topic not in self.silent:
                    publisher.publish(self._message(publisher.msg_type, k))
                    self.sent[topic].append(self.now)
            k += 1
            time.sleep(max(begin + k * TICK_NS * 1e-9 / (self.speed or 1.0) - time.monotonic(), 0.0))

    def _message(self, kind, k: int):
        message = kind()
        positions = [k * 1e-3] * len(self.action.joints)
        if kind is Float64MultiArray:
            message.data = [float(self.now // 10**9), float(self.now % 10**9)]
            return message
        message.header.stamp = to_stamp(self.now)
        if kind is JointState:
            message.name, message.position = list(self.action.joints), positions
        elif kind is CompressedImage:
            message.format, message.data = 'jpeg', self.jpeg
        elif kind is JointTrajectory:
            point = JointTrajectoryPoint(positions=positions, time_from_start=Duration(nanosec=20_000_000))
            message.joint_names, message.points = list(self.action.joints), [point]
        elif kind is ControllerStatus:
            message.mode, message.reason = self.mode, self.reason
        return message

    def enter(self, mode: int, reason: str = '') -> int:
        """The controller's mode from now on; returns when it has been told [ns]."""
        self.mode, self.reason = mode, reason
        told = len(self.sent['/controller/status']) + 2
        while len(self.sent['/controller/status']) < told:
            time.sleep(0.005)
        return self.now

    def stop(self):
        """Publish no more."""
        self.running = False
        self.thread.join()
