"""Commands as the robot wants them: the types of a contract's outputs."""
from __future__ import annotations

import numpy as np
from builtin_interfaces.msg import Duration, Time
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from il_policies.contract import Contract
from il_runtime.core.safety import Gate

OUTPUT_TYPES = {'std_msgs/msg/Float64MultiArray': Float64MultiArray, 'sensor_msgs/msg/JointState': JointState,
                'trajectory_msgs/msg/JointTrajectory': JointTrajectory}
"""Message classes of the types a contract's output may have."""


class Outputs:
    """Publishers of one robot: what the gate allows, to everything that moves."""

    def __init__(self, node: Node, contract: Contract, shadow: bool = False):
        """shadow: nothing to what moves, and the stamped command as the node's own ~/command."""
        action = contract.action
        self._stamped = node.create_publisher(JointState, '~/command' if shadow else action.topic, QoSProfile(depth=100))
        self._joints = list(action.joints)
        self._parts = []
        for output in () if shadow else action.outputs:
            joints = output.joints or action.joints
            self._parts.append((OUTPUT_TYPES[output.type], [action.joints.index(name) for name in joints], list(joints),
                                node.create_publisher(OUTPUT_TYPES[output.type], output.topic, QoSProfile(depth=1))))
        self.topics = [publisher.topic_name for publisher in (self._stamped, *(part[-1] for part in self._parts))]
        """Resolved topics on which nobody else may publish."""

    def publish(self, gate: Gate, stamp: Time) -> None:
        """The gate's set-point to the robot, then stamped and named for whoever records or learns from it."""
        message = JointState(name=self._joints, position=gate.position, velocity=gate.velocity)
        message.header.stamp = stamp
        ramp = None
        for kind, columns, joints, publisher in self._parts:
            if kind is JointTrajectory:
                ramp = gate.run_out() if ramp is None else ramp
                publisher.publish(trajectory(joints, ramp, columns))
            elif kind is JointState:
                part = JointState(name=joints, position=gate.position[columns], velocity=gate.velocity[columns])
                part.header.stamp = stamp
                publisher.publish(part)
            else:
                publisher.publish(Float64MultiArray(data=gate.position[columns]))
        self._stamped.publish(message)


def trajectory(joints: list[str], ramp: tuple[np.ndarray, np.ndarray, np.ndarray], columns: list[int]) -> JointTrajectory:
    """Times from now [s], positions and velocities (N, D) of `Gate.run_out` as a message that starts on receipt.

    It ends at rest, without which a joint_trajectory_controller refuses it, and with which an arm whose controller has died
    comes to rest instead of stopping dead.
    """
    points = []
    for time, position, velocity in zip(*ramp, strict=True):
        ns = round(time * 1e9)
        points.append(JointTrajectoryPoint(positions=position[columns], velocities=velocity[columns],
                                           time_from_start=Duration(sec=ns // 10**9, nanosec=ns % 10**9)))
    return JointTrajectory(joint_names=joints, points=points)
