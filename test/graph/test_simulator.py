from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import yaml

from il_policies.sim.reach_around import JOINTS, TIP_HEIGHT, Scene, inverse_kinematics
from support import ROOT, FollowingArm, call, patient_contract, wait_for

CONTRACT = ROOT / 'config/robots/so101.yaml'
SCENE = Scene((0.11, -0.01), (0.278, 0.02))
ARRAY, STATE, TRAJECTORY = 'std_msgs/msg/Float64MultiArray', 'sensor_msgs/msg/JointState', 'trajectory_msgs/msg/JointTrajectory'

SENDER = """
import json, sys, time
import rclpy
from builtin_interfaces.msg import Duration
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint
names, pose, speed, brake = json.loads(sys.argv[1])  # the first joint moves
rclpy.init()
publisher = rclpy.create_node('sender').create_publisher(JointTrajectory, 'arm/joint_trajectory', 1)
while publisher.get_subscription_count() < 2:  # the simulator and the test
    time.sleep(0.01)
time.sleep(0.3)  # until they know it too
began = time.monotonic()
while True:
    there = pose[0] + speed * (time.monotonic() - began + 0.04)
    points = [JointTrajectoryPoint(positions=[p, *pose[1:]], velocities=[v, *[0.0] * len(pose[1:])],
                                   time_from_start=Duration(nanosec=round(t * 1e9)))
              for p, v, t in ((there, speed, 0.04), (there + speed * brake / 2, 0.0, 0.04 + brake))]
    publisher.publish(JointTrajectory(joint_names=names, points=points))
    time.sleep(0.02)
"""
"""A controller that is killed below: 50 times a second the next set-point and a ramp to rest."""


class Observer:
    """Keeps what the simulator publishes and commands it."""

    def __init__(self, node, clock: bool = False):
        from geometry_msgs.msg import PointStamped
        from il_msgs.msg import TaskStatus
        from rclpy.qos import qos_profile_sensor_data
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import CompressedImage, JointState
        self.node = node
        self._publishers = {}
        self.joints, self.goals, self.images, self.tasks, self.clocks = [], [], [], [], []
        for kind, topic, kept in ((JointState, 'joint_states', self.joints), (PointStamped, 'goal', self.goals),
                                  (CompressedImage, 'camera/image/compressed', self.images)):
            node.create_subscription(kind, topic, kept.append, qos_profile_sensor_data)
        node.create_subscription(TaskStatus, 'task_status', self.tasks.append, 50)
        if clock:
            node.create_subscription(Clock, '/clock', self.clocks.append, 1000)
        wait_for(lambda: self.joints and self.goals and self.tasks, what='messages of the simulator')

    def send(self, topic: str, message) -> None:
        if topic not in self._publishers:
            self._publishers[topic] = self.node.create_publisher(type(message), topic, 1)
        wait_for(self._publishers[topic].get_subscription_count, what='a simulator that listens')
        self._publishers[topic].publish(message)

    def command(self, positions) -> None:
        self.send('forward_position_controller/commands', array(positions))

    def reset(self, scene: Scene):
        from il_msgs.srv import ResetTask
        return call(self.node, ResetTask, 'simulator/reset', ResetTask.Request(start=scene.start, goal=scene.goal))

    @property
    def pose(self) -> dict[str, float]:
        return dict(zip(self.joints[-1].name, self.joints[-1].position))

    @property
    def tip(self) -> tuple[float, float]:
        return self.tasks[-1].tip.x, self.tasks[-1].tip.y


def seconds(stamp) -> float:
    return stamp.sec + stamp.nanosec * 1e-9


def array(positions):
    from std_msgs.msg import Float64MultiArray
    return Float64MultiArray(data=[float(p) for p in positions])


def trajectory(names, *points, start: float = 0.0):
    """Points are (time from start, positions) or (time from start, positions, velocities); start 0 means now."""
    from rclpy.time import Duration, Time
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint
    message = JointTrajectory(joint_names=names)
    message.header.stamp = Time(seconds=start).to_msg()
    for after, positions, *velocities in points:
        message.points.append(JointTrajectoryPoint(
            positions=positions, velocities=velocities[0] if velocities else [],
            time_from_start=Duration(seconds=after).to_msg()))
    return message


def contract_with(folder, *outputs):
    """The SO-101's contract with other outputs: (topic, type, joints)."""
    contract = yaml.safe_load(CONTRACT.read_text())
    contract['action']['outputs'] = [{'topic': topic, 'type': kind, 'joints': list(joints)} for topic, kind, joints in outputs]
    path = folder / 'contract.yaml'
    path.write_text(yaml.safe_dump(contract))
    return path


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


@pytest.mark.long
def test_every_output_moves_its_own_joints_however_it_is_told(nodes, node, tmp_path):
    from sensor_msgs.msg import JointState
    arm = ['shoulder_lift', 'elbow_flex', 'wrist_flex']
    nodes.start('simulator_node', camera='false', nice=0, contract=contract_with(
        tmp_path, ('turn/commands', ARRAY, ['wrist_roll', 'shoulder_pan']), ('arm/joint_trajectory', TRAJECTORY, arm),
        ('gripper/command', STATE, ['gripper'])))
    seen = Observer(node)
    time.sleep(0.5)  # gravity bends the arm a little
    at_rest = seen.pose

    def moved(topic, message, **by) -> None:
        before = seen.pose
        seen.send(topic, message)
        wait_for(lambda: all(abs(seen.pose[name] - before[name] - by[name]) < 0.03 for name in by), what=f'{by}')
        time.sleep(0.2)
        assert {name for name in before if abs(seen.pose[name] - before[name]) > 0.03} == set(by)

    moved('turn/commands', array([0.4, -0.3]), wrist_roll=0.4, shoulder_pan=-0.3)
    moved('gripper/command', JointState(name=['gripper'], position=[0.5]), gripper=0.65)
    pose = dict(zip(JOINTS, inverse_kinematics([[*Scene().start, TIP_HEIGHT]])[0]))
    names = ['wrist_flex', 'shoulder_lift', 'elbow_flex']
    moved('arm/joint_trajectory', trajectory(names, (0.5, [pose[name] - 0.2 * (name == 'shoulder_lift') for name in names])),
          shoulder_lift=-0.2)

    before, here, rest = seen.pose, [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    nan, point = float('nan'), (0.5, here, rest)
    for topic, message, words in (
            ('turn/commands', array([1.0]), r'positions of shape (1, 1), must be (1, 2)'),
            ('turn/commands', array([1.0, nan]), 'positions hold [nan]'),
            ('gripper/command', JointState(name=['gripper', 'gripper'], position=[1.0, 1.0]), "joints ['gripper', 'gripper']"),
            ('gripper/command', JointState(name=['gripper'], position=[1.0, 1.0]), 'rows of [2] values'),
            ('arm/joint_trajectory', trajectory(arm), 'no points'),
            ('arm/joint_trajectory', trajectory([*arm, 'gripper'], (0.5, [0.0] * 4)), 'must be each of'),
            ('arm/joint_trajectory', trajectory(arm, point, point), 'one after the other'),
            ('arm/joint_trajectory', trajectory(arm, (0.2, here), point), 'rows of [0] values for 3 joints'),
            ('arm/joint_trajectory', trajectory(arm, (0.5, here, [0.1, 0.0, 0.0])), 'at the last point, must be 0'),
            ('arm/joint_trajectory', trajectory(arm, point, start=1.0), 's ago, must end in the future')):
        def refused(topic=topic, message=message, words=words) -> bool:
            seen.send(topic, message)  # again and again: warnings are throttled
            time.sleep(0.1)
            return f'{topic}: command ignored: ' in (log := nodes.log('simulator_node')) and words in log
        wait_for(refused, what=words)
    assert {name for name in before if abs(seen.pose[name] - before[name]) > 0.01} == set()

    seen.send('arm/joint_trajectory', trajectory(arm, (20.0, here, rest)))
    assert seen.reset(Scene()).success
    time.sleep(1.0)
    assert all(abs(seen.pose[name] - at_rest[name]) < 0.01 for name in JOINTS)  # also the trajectory has been forgotten
    assert nodes.stop('simulator_node') == 0


@pytest.mark.parametrize('clock, factor', [(False, 1.0), (True, 3.0)])
def test_a_trajectory_keeps_its_time(nodes, node, tmp_path, clock, factor):
    contract = contract_with(tmp_path, ('arm/joint_trajectory', TRAJECTORY, JOINTS))
    nodes.start('simulator_node', contract=contract, camera='false', nice=0, publish_clock=clock, real_time_factor=factor)
    seen = Observer(node)
    pose = inverse_kinematics([[*Scene().start, TIP_HEIGHT]])[0]

    def turned(by: float) -> list[float]:
        return (pose + [by, 0, 0, 0, 0, 0]).tolist()

    seen.send('arm/joint_trajectory', trajectory(JOINTS, (0.3, turned(0.0))))
    time.sleep(0.3)  # the first message waits for the connection, the second one comes at once
    began = seconds(seen.joints[-1].header.stamp)
    seen.send('arm/joint_trajectory', trajectory(JOINTS, (-1.0, turned(-1.0)), (1.0, turned(0.6)), start=began + 0.2))
    wait_for(lambda: seconds(seen.joints[-1].header.stamp) > began + 1.7, what='the end of the trajectory')
    stamps = np.array([seconds(message.header.stamp) for message in list(seen.joints)])
    pan = np.array([message.position[0] for message in list(seen.joints)])
    # Straight from where it was to the one point that is still to come, however late the message was on a busy machine.
    left, lag = stamps[np.argmax(pan > 0.005)], 0.034  # of the servos [s]
    assert began < left < began + 0.8
    np.testing.assert_allclose(pan, np.interp(stamps, [left - 0.01, began + 1.2 + lag], [0.0, 0.6]), atol=0.03)
    assert abs(pan[-1] - 0.6) < 0.02
    assert nodes.stop('simulator_node') == 0


def test_when_its_controller_is_killed_the_arm_runs_out_to_rest(nodes, node, tmp_path):
    from trajectory_msgs.msg import JointTrajectory
    contract = contract_with(tmp_path, ('arm/joint_trajectory', TRAJECTORY, JOINTS))
    nodes.start('simulator_node', contract=contract, camera='false', nice=0)
    seen = Observer(node)
    sent = []
    node.create_subscription(JointTrajectory, 'arm/joint_trajectory', sent.append, 10)
    speed, brake = 1.0, 0.5
    pose = dict(zip(JOINTS, inverse_kinematics([[*Scene().start, TIP_HEIGHT]])[0].tolist()))
    names = ['shoulder_pan', *reversed(JOINTS[1:])]
    sender = subprocess.Popen([sys.executable, '-c', SENDER, json.dumps([names, [pose[name] for name in names], speed, brake])])
    try:
        wait_for(lambda: seen.pose['shoulder_pan'] > 0.3, what='the arm to move')
    finally:
        sender.send_signal(signal.SIGKILL)
        sender.wait()
    killed, here = len(seen.joints), seen.pose['shoulder_pan']
    wait_for(lambda: len(seen.joints) > killed + 150, what='a second and a half')
    ran_out = seen.joints[killed:]
    end = sent[-1].points[-1].positions[0]
    assert end - here > speed * brake / 2  # it was in the middle of a motion …
    assert abs(ran_out[-1].position[0] - end) < 0.02 and abs(ran_out[-1].velocity[0]) < 0.01  # … and stopped where it should
    velocity = np.array([message.velocity[0] for message in ran_out])
    assert velocity.max() < 1.5 * speed and velocity.min() > -0.05
    slowing = np.count_nonzero(velocity > 0.05) / 100  # joint states come at 100 Hz
    assert 0.7 * brake < slowing < brake + 0.3
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
    robots = ROOT / 'config/robots'
    for parameters, words in (({'real_time_factor': 4.0}, 'without publish_clock only 1'),
                              ({'camera_size': '[96, 0]'}, 'camera_size'),
                              ({'task': 'pick'}, "task is 'pick', valid: auto, reach_around, none"),
                              ({'task': 'reach_around', 'contract': robots / 'aloha.yaml'}, 'reach_around needs the description'),
                              ({'contract': robots / 'ur5e.yaml', 'description': 'arm.urdf'}, 'arm.urdf: not readable')):
        process = nodes.start('simulator_node', **{'contract': CONTRACT, **parameters})
        assert process.wait(20) == 2
        assert words in nodes.log('simulator_node').splitlines()[-1]


# --- any contract -----------------------------------------------------------------------------------------------------
class SimulatedArm(FollowingArm):
    """A simulator with a controller, and chunks for it; the arm is where the simulator says."""

    def __init__(self, nodes, node, contract, namespace: str):
        from sensor_msgs.msg import JointState
        self.states = []
        # Both must be started before anybody is waited for.
        nodes.start('simulator_node', namespace, contract=contract, camera='false')
        nodes.start('controller_node', namespace, contract=contract)
        super().__init__(node, contract, f'{namespace}/')
        self.measured = []
        node.create_subscription(JointState, f'{namespace}/joint_states', self._on_state, 10)

    def _on_state(self, message) -> None:
        self.measured.append(dict(zip(message.name, message.position)))

    def _report(self) -> None:
        """The simulator does."""

    def ready(self) -> int:
        """Wait for the simulator and arm; the epoch."""
        wait_for(lambda: self.measured, what=f'{self.prefix} joint states')
        self.start = self.position = np.array([self.measured[-1][name] for name in self.names])
        return self.arm()

    def moved(self) -> dict[str, float]:
        """How far each joint has gone."""
        return {name: self.measured[-1][name] - start for name, start in zip(self.names, self.start)}


def test_two_arms_in_two_namespaces_and_two_arms_under_one_controller_run_at_50_hz(nodes, node, tmp_path):
    """Two SO-101 under /left and /right, and the 14 joints of ALOHA, all simulated at once on this machine."""
    aloha = yaml.safe_load((ROOT / 'config/robots/aloha.yaml').read_text())
    aloha['observations']['joint_positions']['max_age'] = 0.5  # as patient_contract
    (tmp_path / 'aloha.yaml').write_text(yaml.safe_dump(aloha))
    so101 = patient_contract(tmp_path)
    arms = {name: SimulatedArm(nodes, node, contract, name) for name, contract in
            (('left', so101), ('right', so101), ('cell', tmp_path / 'aloha.yaml'))}
    ways = {'left': {'shoulder_pan': 0.6}, 'right': {'wrist_roll': -0.6}, 'cell': {'left_waist': -0.5, 'right_elbow': -0.5}}
    epochs = {name: arm.ready() for name, arm in arms.items()}
    told, ticks, began = {name: len(arm.statuses) for name, arm in arms.items()}, {}, {}
    for name, arm in arms.items():
        ticks[name], began[name] = arm.statuses[-1].ticks, seconds(arm.statuses[-1].header.stamp)
    for sequence in range(12):
        for name, arm in arms.items():
            steps = arm.start + np.outer(np.minimum(np.arange(sequence, sequence + 16) / 20, 1.0),
                                         [ways[name].get(joint, 0.0) for joint in arm.names])
            arm.send_rows(epochs[name], steps, sequence)
        time.sleep(0.1)
    wait_for(lambda: all(abs(arm.moved()[joint] - by) < 0.05 for name, arm in arms.items() for joint, by in ways[name].items()),
             what='all to arrive')
    for name, arm in arms.items():
        assert {joint for joint, by in arm.moved().items() if abs(by) > 0.05} == set(ways[name])
        arm.assert_within_limits()
    rates, late = {}, {}
    for name, arm in arms.items():
        status = arm.statuses[-1]
        rates[name] = (status.ticks - ticks[name]) / (seconds(status.header.stamp) - began[name])
        late[name] = np.median(np.concatenate([status.lateness for status in arm.statuses[told[name]:]]))
        assert status.mode in (1, 2) and 47 < rates[name] < 51, (name, rates[name], status.reason)
        assert late[name] < 0.01
    print('ticks [Hz]', rates, 'median lateness [s]', late)
    assert all(nodes.stop(f'{name}/controller_node') == 0 for name in arms)


def test_a_robot_without_a_task_shows_what_its_contract_names_and_says_what_nobody_simulates(nodes, node, tmp_path):
    """The SO-101 alone: its goal is the task's. Raw images and efforts too."""
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image, JointState
    contract = yaml.safe_load(CONTRACT.read_text())
    streams = contract['observations']
    streams['front'] |= {'type': 'sensor_msgs/msg/Image', 'topic': 'camera/image'}
    streams['efforts'] = {**streams['joint_positions'], 'field': 'effort', 'names': ['gripper', 'wrist_roll']}
    (tmp_path / 'alone.yaml').write_text(yaml.safe_dump(contract, sort_keys=False))
    nodes.start('simulator_node', contract=tmp_path / 'alone.yaml', task='none')
    states, images = [], []
    node.create_subscription(JointState, 'joint_states', states.append, 10)
    node.create_subscription(Image, 'camera/image', images.append, qos_profile_sensor_data)
    wait_for(lambda: len(states) > 20 and images, what='messages of the simulator')
    image = np.frombuffer(images[-1].data, np.uint8).reshape(96, 96, 3)
    assert (images[-1].encoding, images[-1].step) == ('rgb8', 288) and image.std() > 20
    assert list(states[-1].name) == list(JOINTS) and len(states[-1].effort) == 6
    log = nodes.log('simulator_node')
    assert log.count('nobody simulates it') == 1 and 'observations.goal: nobody simulates it; who needs goal (geometry' in log
    assert 'alone, without a task' in log and '/task_status' not in dict(node.get_topic_names_and_types())

    command = node.create_publisher(type(array([])), 'forward_position_controller/commands', 1)
    wait_for(command.get_subscription_count)
    command.publish(array([0.5] * 6))
    wait_for(lambda: np.abs(np.array(states[-1].position) - 0.5).max() < 0.01, what='the arm to move')
    from il_msgs.srv import ResetTask
    assert call(node, ResetTask, 'simulator/reset').success
    wait_for(lambda: np.abs(states[-1].position).max() < 0.01, what='the start')
    assert nodes.stop('simulator_node') == 0
