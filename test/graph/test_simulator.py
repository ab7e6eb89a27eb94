from __future__ import annotations

import time

import cv2
import numpy as np

from il_policies.sim.reach_around import JOINTS, TIP_HEIGHT, Scene, inverse_kinematics
from support import ROOT, call, wait_for

CONTRACT = ROOT / 'config/robots/so101.yaml'
SCENE = Scene((0.11, -0.01), (0.278, 0.02))


class Observer:
    """Keeps what the simulator publishes and commands it."""

    def __init__(self, node, clock: bool = False):
        from geometry_msgs.msg import PointStamped
        from il_msgs.msg import TaskStatus
        from rclpy.qos import qos_profile_sensor_data
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import CompressedImage, JointState
        from std_msgs.msg import Float64MultiArray
        self.node = node
        self.joints, self.goals, self.images, self.tasks, self.clocks = [], [], [], [], []
        for kind, topic, kept in ((JointState, 'joint_states', self.joints), (PointStamped, 'goal', self.goals),
                                  (CompressedImage, 'camera/image/compressed', self.images)):
            node.create_subscription(kind, topic, kept.append, qos_profile_sensor_data)
        node.create_subscription(TaskStatus, 'task_status', self.tasks.append, 50)
        if clock:
            node.create_subscription(Clock, '/clock', self.clocks.append, 1000)
        self._commands = node.create_publisher(Float64MultiArray, 'forward_position_controller/commands', 1)
        wait_for(lambda: self.joints and self.goals and self.tasks, what='messages of the simulator')

    def command(self, positions) -> None:
        from std_msgs.msg import Float64MultiArray
        wait_for(self._commands.get_subscription_count, what='a simulator that listens')
        self._commands.publish(Float64MultiArray(data=[float(p) for p in positions]))

    def reset(self, scene: Scene):
        from il_msgs.srv import ResetTask
        return call(self.node, ResetTask, 'simulator/reset', ResetTask.Request(start=scene.start, goal=scene.goal))

    @property
    def tip(self) -> tuple[float, float]:
        return self.tasks[-1].tip.x, self.tasks[-1].tip.y


def seconds(stamp) -> float:
    return stamp.sec + stamp.nanosec * 1e-9


def test_it_streams_what_the_contract_names_moves_on_command_and_resets(nodes, node):
    nodes.start('simulator_node', contract=CONTRACT)
    seen = Observer(node)
    assert list(seen.joints[0].name) == list(JOINTS)
    wait_for(lambda: len(seen.images) > 10, what='images')
    for kept, rate in ((seen.joints, 100), (seen.goals, 10), (seen.images, 10), (seen.tasks, 20)):
        stamps = np.array([seconds(message.header.stamp) for message in list(kept)])
        assert 1 / np.median(np.diff(stamps)) > 0.7 * rate and (np.diff(stamps) > 0).all()
        assert abs(stamps[-1] - node.get_clock().now().nanoseconds * 1e-9) < 0.5
    image = cv2.imdecode(np.frombuffer(seen.images[-1].data, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (96, 96, 3) and image.std() > 20

    answer = seen.reset(SCENE)
    assert answer.success and answer.episode == 1
    wait_for(lambda: seen.tasks[-1].episode == 1, what='the new episode')
    assert np.hypot(*np.subtract(seen.tip, SCENE.start)) < 5e-3 and seen.tasks[-1].elapsed < 1
    assert (seen.tasks[-1].goal.x, seen.tasks[-1].goal.y) == SCENE.goal
    wait_for(lambda: seen.goals[-1].point.x == SCENE.goal[0], what='the new goal')

    start = inverse_kinematics([[*SCENE.start, TIP_HEIGHT]])[0]
    for nonsense in ([0.0] * 5, [0.0] * 5 + [np.nan]):
        seen.command(nonsense)
        wait_for(lambda nonsense=nonsense: f'command ignored: {nonsense}' in nodes.log('simulator_node'))
        time.sleep(1.0)  # warnings are throttled
    seen.command(start + [0.3, 0, 0, 0, 0, 0])
    wait_for(lambda: abs(seen.joints[-1].position[0] - start[0] - 0.3) < 0.02, what='the arm to turn')
    assert np.isfinite(seen.joints[-1].position).all()

    for x in np.linspace(*(SCENE.start[0], 0.2), 50):  # straight into the pillar
        seen.command(inverse_kinematics([[x, 0.0, TIP_HEIGHT]])[0])
        told = len(seen.joints)
        wait_for(lambda told=told: len(seen.joints) > told + 1)
    wait_for(lambda: seen.tasks[-1].touched, what='contact')
    refused = seen.reset(Scene((0.9, 0.0), (0.28, 0.0)))
    assert not refused.success and 'no pose' in refused.message and refused.episode == 1
    assert seen.reset(SCENE).episode == 2
    wait_for(lambda: seen.tasks[-1].episode == 2, what='the second episode')
    assert not seen.tasks[-1].touched
    assert nodes.stop('simulator_node') == 0


def test_its_clock_runs_faster_than_real_time_and_never_back(nodes, node):
    nodes.start('simulator_node', contract=CONTRACT, real_time_factor=3.0, publish_clock='true', camera='false')
    seen = Observer(node, clock=True)
    assert seen.reset(SCENE).success
    wait_for(lambda: seen.tasks[-1].elapsed > 1.0, what='a second after the reset')
    clocks = np.array([seconds(message.clock) for message in list(seen.clocks)])
    assert (np.diff(clocks) > 0).all() and np.median(np.diff(clocks)) <= 1 / 200
    stamps = np.array([seconds(message.header.stamp) for message in list(seen.joints)])
    assert (np.diff(stamps) > 0).all() and np.median(np.diff(stamps)) <= 0.0121  # 100 Hz on a grid of 4 ms
    assert abs(stamps[-1] - clocks[-1]) < 0.5
    assert not seen.images
    assert nodes.stop('simulator_node') == 0


def test_what_cannot_work_is_refused_in_one_line(nodes):
    for parameters, words in (({'real_time_factor': 4.0}, 'without publish_clock only 1'),
                              ({'camera_size': '[96, 0]'}, 'camera_size')):
        process = nodes.start('simulator_node', **{'contract': CONTRACT, **parameters})
        assert process.wait(20) == 2
        assert words in nodes.log('simulator_node').splitlines()[-1]
