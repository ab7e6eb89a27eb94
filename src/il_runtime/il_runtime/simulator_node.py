"""The reach-around task as a robot: joint states, goal, camera and task status out, commands in, on every topic and
of every type that a contract's outputs may have.

Physics runs in a thread of its own on absolute deadlines; services and commands come in through the executor's thread.
"""
from __future__ import annotations

import sys
import threading
import time

import numpy as np
from geometry_msgs.msg import Point, PointStamped
from il_msgs.msg import TaskStatus
from il_msgs.srv import ResetTask
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from il_policies.contract import Output, Stream, load_contract
from il_policies.sim.reach_around import CONTROL_PERIOD, JOINTS, PHYSICS_STEP, ReachAround, Scene, SceneError
from il_policies.sim.trajectory import TrajectoryError, TrajectoryFollower, arranged
from il_runtime.ros import Worker, be_nice, declare, nanoseconds, run, to_stamp

STATUS_RATE = 20.0
"""Rate of the task status [Hz of simulated time]."""
MAX_LAG = 0.1
"""Further behind than this, time is given up instead of being made up for [s]."""
STEP_NS = round(PHYSICS_STEP * 1e9)
MAX_AHEAD_NS = round((CONTROL_PERIOD + PHYSICS_STEP) * 1e9)
"""With /clock, simulated time may run this far beyond the last command, so that none is skipped [ns] …"""
GONE_S = 0.2
"""… unless none has come for so long [s, wall]."""


class SimulatorNode(Node):
    """Topics come from the contract; `publish_clock` makes this the source of time for nodes with `use_sim_time`.

    What was commanded goes on with simulated time, whoever dies: a set-point is held, a trajectory is followed to its end.
    """

    def __init__(self):
        """Raises ContractError or SceneError for a contract or machine that cannot run this task."""
        super().__init__('simulator')
        contract = declare(self, 'contract', '', "the robot's contract, a YAML file")
        camera = declare(self, 'camera', True, "publish the contract's cameras")
        size = declare(self, 'camera_size', [0, 0], 'height and width of images [px]; 0, 0: as in the contract')
        self.factor = declare(self, 'real_time_factor', 1.0, 'simulated seconds per second; other than 1 needs '
                              'publish_clock', 0.05, 100.0)
        be_nice(self)
        self.publish_clock = declare(self, 'publish_clock', False, 'publish /clock and stamp with simulated time')
        self.contract = load_contract(contract)
        if self.factor != 1.0 and not self.publish_clock:
            raise SceneError(f'real_time_factor is {self.factor:g}: without publish_clock only 1 is valid')
        if len(size) != 2 or min(size) < 0 or max(size) > 4096 or (0 in size and max(size) > 0):
            raise SceneError(f'camera_size is {list(size)}, must be height and width, 1 to 4096 each, or 0, 0')
        if sorted(self.contract.action.joints) != sorted(JOINTS):
            raise SceneError(f'this task moves {list(JOINTS)}, '
                             f'the contract commands {list(self.contract.action.joints)}')
        self.sim = ReachAround(camera=camera)
        self.lock = threading.Lock()  # over the simulation, between its thread and a reset
        self.episode = 0
        self.time_ns = STEP_NS  # a stamp of 0 means none
        self.image_sizes: set[tuple[int, int]] = set()
        self.outputs = self._outputs(camera, tuple(size))
        self.clock = self.create_publisher(Clock, '/clock', QoSProfile(depth=10)) if self.publish_clock else None
        self.parts = [self._listen(output) for output in self.contract.action.outputs]
        self.create_service(ResetTask, '~/reset', self._on_reset)

        self.heard: tuple[int, float] | None = None  # when the last command came: simulated [ns], wall [s]
        self.running = True
        self.failure: Exception | None = None
        started = threading.Event()
        self.thread = Worker(lambda: self._loop(started), 'physics')
        self.thread.start()
        started.wait()
        if self.failure is not None:
            raise self.failure
        self.get_logger().info(f'{self.contract.robot}: reach_around at real-time factor {self.factor:g}')

    def _outputs(self, camera: bool, size: tuple[int, int]) -> list[list]:
        """Of every topic: next time due [ns], period [ns], function that publishes at a stamp; slow images last."""
        makers = {'sensor_msgs/msg/JointState': (JointState, lambda name, stream: self._joint_state),
                  'geometry_msgs/msg/PointStamped': (PointStamped, lambda name, stream: self._goal)}
        if camera:
            makers['sensor_msgs/msg/CompressedImage'] = (
                CompressedImage, lambda name, stream: self._image_of(name, stream, size))
        outputs, topics = [], set()
        for name, stream in self.contract.observations.items():
            if stream.topic in topics or (stream.is_image and not camera):
                continue
            if stream.type not in makers:
                raise SceneError(f'observations.{name}: {stream.type} is not simulated; there are: {", ".join(makers)}')
            topics.add(stream.topic)
            kind, maker = makers[stream.type]
            publisher = self.create_publisher(kind, stream.topic, QoSProfile(depth=10))
            outputs.append([stream, publisher, maker(name, stream)])
        outputs.sort(key=lambda output: output[0].is_image)
        status = self.create_publisher(TaskStatus, 'task_status', QoSProfile(depth=10))
        entries = [[round(1e9 / STATUS_RATE), status, self._task_status]]
        entries += [[round(1e9 / stream.rate), publisher, make] for stream, publisher, make in outputs]
        return [[0, period, lambda stamp, publisher=publisher, make=make: publisher.publish(make(stamp))]
                for period, publisher, make in entries]

    def _listen(self, output: Output) -> tuple[list[int], TrajectoryFollower]:
        """Have the joints of an output obey its topic: their columns in JOINTS and their commanded motion."""
        joints = output.joints or self.contract.action.joints
        columns = [JOINTS.index(name) for name in joints]
        motion = TrajectoryFollower(self.sim.joint_positions[columns])
        kind, move = {
            'std_msgs/msg/Float64MultiArray': (
                Float64MultiArray, lambda message: motion.rest(message.data)),
            'sensor_msgs/msg/JointState': (  # servos take positions; velocities and efforts are not looked at
                JointState, lambda message: motion.rest(arranged([message.position], message.name, joints)[0])),
            'trajectory_msgs/msg/JointTrajectory': (
                JointTrajectory, lambda message: self._follow(message, joints, motion)),
        }[output.type]

        def on_command(message) -> None:
            try:
                move(message)
            except TrajectoryError as error:
                self.get_logger().warning(f'{output.topic}: command ignored: {error}', throttle_duration_sec=1.0)
                return
            self.heard = (self.time_ns, time.monotonic())

        self.create_subscription(kind, output.topic, on_command, QoSProfile(depth=1))
        return columns, motion

    # --- executor's thread --------------------------------------------------------------------------------------------
    def _follow(self, message: JointTrajectory, joints: tuple[str, ...], motion: TrajectoryFollower) -> None:
        """Stamp 0: from now. Stamps become simulated time on receipt. Accelerations and efforts are not looked at."""
        now, start = self.time_ns, nanoseconds(message.header.stamp)
        if not start:
            start = now
        elif not self.publish_clock:
            start += now - self.get_clock().now().nanoseconds
        points = message.points
        times = [(start + nanoseconds(point.time_from_start)) * 1e-9 for point in points]
        positions = arranged([point.positions for point in points], message.joint_names, joints)
        velocities = None
        if any(point.velocities for point in points):
            velocities = arranged([point.velocities for point in points], message.joint_names, joints)
        motion.follow(now * 1e-9, times, positions, velocities)

    def _on_reset(self, request: ResetTask.Request, response: ResetTask.Response) -> ResetTask.Response:
        try:
            with self.lock:
                self.sim.reset(Scene(tuple(request.start), tuple(request.goal)))
                for columns, motion in self.parts:
                    motion.rest(self.sim.joint_positions[columns])
                self.episode += 1
            response.success = True
        except SceneError as error:
            response.message = str(error)
        response.episode = self.episode
        return response

    def finish(self, _spin_once) -> None:
        """End the physics."""
        self.running = False
        self.thread.join(timeout=2.0)

    # --- physics' thread ----------------------------------------------------------------------------------------------
    def _loop(self, started: threading.Event) -> None:
        sys.setswitchinterval(0.001)  # a command must not wait 5 ms for the interpreter
        try:
            for size in self.image_sizes:  # the first image takes longest, and a machine that cannot render says so now
                self.sim.render(size)
        except SceneError as error:
            self.failure = error
            return
        finally:
            started.set()
        began = base = time.monotonic()
        period = PHYSICS_STEP / self.factor
        # Whoever follows /clock must keep up with it: on a busy machine it slows down, it does not race to catch up.
        # Without it the wall is the clock: physics catches up, and nothing is published twice.
        most = round((CONTROL_PERIOD if self.publish_clock else MAX_LAG) / PHYSICS_STEP)
        steps = 0
        while self.running:
            time.sleep(max(base + (steps + 1) * period - time.monotonic(), 0.0))
            behind = int((time.monotonic() - base) / period + 1e-6) - steps
            if behind > most:
                base += (behind - 1) * period
                if not self.publish_clock:
                    self.get_logger().warning(f'the machine is too slow: {(behind - 1) * PHYSICS_STEP:.2f} s given up',
                                              throttle_duration_sec=1.0)
                behind = 1
            if behind < 1 or self._ahead_of_controller():
                continue
            count = 1 if self.publish_clock else behind
            with self.lock:
                for _ in range(count):
                    self.sim.command(self._target())
                    self.sim.advance()
                    self.time_ns += STEP_NS
                steps += count
                if self.clock is not None:
                    self.clock.publish(Clock(clock=to_stamp(self.time_ns)))
                self._publish_due()
        achieved = steps * PHYSICS_STEP / (time.monotonic() - began)
        self.get_logger().info(f'{steps * PHYSICS_STEP:.1f} s simulated at real-time factor {achieved:.2f}')
        self.sim.close()

    def _target(self) -> np.ndarray:
        """Where every joint is commanded to be now. Shape (6,), order of JOINTS."""
        target = np.empty(len(JOINTS))
        for columns, motion in self.parts:
            target[columns], _ = motion.at(self.time_ns * 1e-9)
        return target

    def _ahead_of_controller(self) -> bool:
        """Faster than real time a few milliseconds of a busy machine are a long time: wait for who commands the arm."""
        if not self.publish_clock or self.heard is None or self.time_ns - self.heard[0] < MAX_AHEAD_NS:
            return False
        if time.monotonic() - self.heard[1] > GONE_S:
            self.heard = None  # nobody commands any more
        return self.heard is not None

    def _publish_due(self) -> None:
        stamp = to_stamp(self.time_ns) if self.publish_clock else self.get_clock().now().to_msg()
        for output in self.outputs:
            due, period, publish = output
            if self.time_ns >= due:
                output[0] = due + period * (1 + (self.time_ns - due) // period)
                publish(stamp)

    def _joint_state(self, stamp) -> JointState:
        message = JointState(name=JOINTS, position=self.sim.joint_positions, velocity=self.sim.joint_velocities)
        message.header.stamp = stamp
        return message

    def _goal(self, stamp) -> PointStamped:
        x, y = self.sim.scene.goal
        message = PointStamped(point=Point(x=x, y=y, z=0.0))
        message.header.stamp, message.header.frame_id = stamp, 'base_link'
        return message

    def _task_status(self, stamp) -> TaskStatus:
        sim = self.sim
        message = TaskStatus(episode=self.episode, elapsed=sim.time, reached=sim.reached, touched=sim.touched)
        message.header.stamp, message.header.frame_id = stamp, 'base_link'
        x, y, z = sim.tip.tolist()
        message.tip = Point(x=x, y=y, z=z)
        message.goal = Point(x=sim.scene.goal[0], y=sim.scene.goal[1], z=0.0)
        return message

    def _image_of(self, name: str, stream: Stream, size: tuple[int, int]):
        size = size if all(size) else stream.image_size
        self.image_sizes.add(size)

        def image(stamp) -> CompressedImage:
            message = CompressedImage(format='jpeg', data=self.sim.photograph(size))
            message.header.stamp, message.header.frame_id = stamp, name
            return message

        return image


def main() -> None:
    """Entry point."""
    run(SimulatorNode)


if __name__ == '__main__':
    main()
