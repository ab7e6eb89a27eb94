"""A planner as a process of its own: swings one joint, a new chunk of 16 × 0.1 s every 0.1 s, whenever the controller follows.

    python scripted_planner.py <period between chunks [s]>
"""
from __future__ import annotations

import sys

import numpy as np
import rclpy
from il_msgs.msg import ActionChunk, ControllerStatus
from rclpy.node import Node
from sensor_msgs.msg import JointState

from il_runtime.ros import STATUS_QOS, chunk_qos, to_stamp

AMPLITUDE, RATE, HORIZON, STEP = 1.2, 1.6, 16, 0.1
"""Of the swing [rad], [rad/s]: 1.9 rad/s at its fastest."""


class ScriptedPlanner(Node):
    """Knows nothing but the controller's status and the newest joint states: it may die and be restarted at any time."""

    def __init__(self, period: float):
        super().__init__('scripted_planner')
        self.status, self.state, self.sequence, self.began = None, None, 0, None
        self.chunks = self.create_publisher(ActionChunk, 'chunks', chunk_qos(HORIZON * STEP))
        self.create_subscription(ControllerStatus, 'controller/status', self._on_status, STATUS_QOS)
        self.create_subscription(JointState, 'joint_states', self._on_state, 1)
        self.create_timer(period, self._plan)

    def _on_status(self, message):
        self.status = message

    def _on_state(self, message):
        self.state = message

    def _plan(self):
        if self.status is None or self.state is None or self.status.mode not in (ControllerStatus.HOLD, ControllerStatus.POLICY):
            self.began = None
            return
        now = self.get_clock().now().nanoseconds
        if self.began is None:  # the swing goes on from where the joint is
            self.began = now - round(np.arcsin(np.clip(self.state.position[0] / AMPLITUDE, -1, 1)) / RATE * 1e9)
        t = (now - self.began) * 1e-9 + STEP * np.arange(HORIZON)
        positions = np.tile(np.array(self.state.position, dtype=np.float32), (HORIZON, 1))
        positions[:, 0] = AMPLITUDE * np.sin(RATE * t)
        message = ActionChunk(step_period=STEP, joint_names=list(self.state.name), horizon=HORIZON, positions=positions.ravel(),
                              epoch=self.status.epoch, sequence=self.sequence, policy='scripted')
        message.header.stamp = message.start = to_stamp(now)
        self.sequence += 1
        self.chunks.publish(message)


if __name__ == '__main__':
    rclpy.init()
    rclpy.spin(ScriptedPlanner(float(sys.argv[1])))
