"""The robot of any contract, simulated: joint states and cameras out, commands in.

Commands come on every topic and of every type that a contract's outputs may have; for the SO-101 there is the task reach_around
with its goal and its status. Physics runs in a thread of its own on absolute deadlines; services and commands come in through the
executor's thread.
"""
from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import numpy as np
from geometry_msgs.msg import Point
from il_msgs.msg import TaskStatus
from il_msgs.srv import ResetTask
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from il_policies.contract import Output, Stream, load_contract
from il_policies.sim import reach_around
from il_policies.sim.arm import Arm, SceneError, Simulation
from il_policies.sim.reach_around import ReachAround, Scene
from il_policies.sim.trajectory import TrajectoryError, TrajectoryFollower, arranged
from il_runtime.images import to_message
from il_runtime.ros import Worker, be_nice, declare, message_class, nanoseconds, run, to_stamp

TASKS = ('auto', 'reach_around', 'none')
STATUS_RATE = 20.0
"""Rate of the task status [Hz of simulated time]."""
MAX_LAG = 0.1
"""Further behind than this, time is given up instead of being made up for [s]."""
GONE_S = 0.2
"""With /clock, simulated time waits for a command every control period, unless none has come for so long [s, wall]."""


class SimulatorNode(Node):
    """Topics come from the contract; `publish_clock` makes this the source of time for nodes with `use_sim_time`.

    What was commanded goes on with simulated time, whoever dies: a set-point is held, a trajectory is followed to its end.
    """

    def __init__(self):
        """Raises ContractError or DescriptionError for a contract, description, task or machine that do not go together."""
        super().__init__('simulator')
        contract = declare(self, 'contract', '', "the robot's contract, a YAML file")
        task = declare(self, 'task', 'auto', 'reach_around: the SO-101 and its task; none: the robot alone; auto: reach_around '
                       'if the contract is for the SO-101')
        description = declare(self, 'description', '', "URDF instead of the contract's: package://<package>/<path>, or a path")
        camera = declare(self, 'camera', True, "publish the contract's cameras")
        size = declare(self, 'camera_size', [0, 0], 'height and width of images [px]; 0, 0: as in the contract')
        self.encoding = declare(self, 'camera_encoding', 'rgb8', 'of raw images, where the contract says sensor_msgs/msg/Image; '
                                'others than rgb8, such as bgr8 or mono8, need cv_bridge')
        self.factor = declare(self, 'real_time_factor', 1.0, 'simulated seconds per second; other than 1 needs '
                              'publish_clock', 0.05, 100.0)
        be_nice(self)
        self.publish_clock = declare(self, 'publish_clock', False, 'publish /clock and stamp with simulated time')
        self.contract = load_contract(contract)
        if self.factor != 1.0 and not self.publish_clock:
            raise SceneError(f'real_time_factor is {self.factor:g}: without publish_clock only 1 is valid')
        if len(size) != 2 or min(size) < 0 or max(size) > 4096 or (0 in size and max(size) > 0):
            raise SceneError(f'camera_size is {list(size)}, must be height and width, 1 to 4096 each, or 0, 0')
        to_message(np.zeros((2, 2, 3), np.uint8), self.encoding)  # what cannot be published is known before it is due
        self.sim = self._simulation(task, description, camera)
        self.step = self.sim.step_period
        self.step_ns, self.control_ns = round(self.step * 1e9), round(1e9 / self.contract.control_rate)
        self.lock = threading.Lock()  # over the simulation, between its thread and a reset
        self.episode = 0
        self.time_ns = self.step_ns  # a stamp of 0 means none
        self.pictures: list[Callable[[], object]] = []
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
        doing = 'reach_around' if self.task else 'alone, without a task,'
        self.get_logger().info(f'{self.contract.robot}: {doing} at real-time factor {self.factor:g}')

    def _simulation(self, task: str, description: str, camera: bool) -> Simulation:
        """What to simulate: `self.task` is it too, if it is a task."""
        contract, robot = self.contract, description or self.contract.description
        if task not in TASKS:
            raise SceneError(f'task is {task!r}, valid: {", ".join(TASKS)}')
        wrong = []
        if robot != reach_around.DESCRIPTION:
            wrong.append(f'needs the description {reach_around.DESCRIPTION}, has {robot}')
        if set(contract.action.joints) != set(reach_around.JOINTS):
            wrong.append(f'moves {list(reach_around.JOINTS)}, the contract commands {list(contract.action.joints)}')
        if task == 'reach_around' and wrong:
            raise SceneError(f'reach_around {"; it ".join(wrong)}; use task:=none')
        self.task: ReachAround | None = None
        if task == 'none' or wrong:
            return Arm(contract, camera, Path(description) if description and '://' not in description else robot)
        self.task = ReachAround(camera, tuple(name for name in contract.cameras if name != reach_around.CAMERA))
        return self.task

    def _outputs(self, camera: bool, size: tuple[int, int]) -> list[list]:
        """Of every topic: next time due [ns], period [ns], function that publishes at a stamp, name if it is a camera."""
        outputs, topics = [], set()

        def add(topic: str, kind, rate: float, make: Callable, name: str = '') -> None:
            publisher = self.create_publisher(kind, topic, QoSProfile(depth=10))
            outputs.append([0, round(1e9 / rate), lambda stamp: publisher.publish(make(stamp)), name])
            topics.add(topic)

        if self.task:
            add('task_status', TaskStatus, STATUS_RATE, self._task_status)
        for name, stream in self.contract.observations.items():
            if stream.topic in topics or (stream.is_image and not camera):
                continue
            if stream.type == 'sensor_msgs/msg/JointState':
                make = self._joint_state_of(stream.topic)
            elif stream.type in ('sensor_msgs/msg/CompressedImage', 'sensor_msgs/msg/Image') and not stream.depth:
                make = self._image_of(name, stream, size)
            elif stream.fields and len(self.sim.observation().get(name, ())) == len(stream.fields):
                make = self._value_of(name, stream)
            else:
                self.get_logger().warning(f'observations.{name}: nobody simulates it; who needs {stream.topic} ({stream.type}'
                                          f'{", depth" if stream.depth else ""}) will wait for it')
                continue
            add(stream.topic, message_class(stream), stream.rate, make, name if stream.is_image else '')
        return outputs

    def _listen(self, output: Output) -> tuple[list[int], TrajectoryFollower]:
        """Have the joints of an output obey its topic: their columns in the simulation and their commanded motion."""
        joints = output.joints or self.contract.action.joints
        columns = [self.sim.joints.index(name) for name in joints]
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
        """To the start and goal asked for; without a task, to where the robot started."""
        try:
            with self.lock:
                if self.task:
                    self.task.reset(Scene(tuple(request.start), tuple(request.goal)))
                else:
                    self.sim.reset()
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
            for picture in self.pictures:  # the first image takes longest, and a machine that cannot render says so now
                picture()
        except SceneError as error:
            self.failure = error
            return
        finally:
            started.set()
        began = base = time.monotonic()
        period = self.step / self.factor
        # Whoever follows /clock must keep up with it: on a busy machine it slows down, it does not race to catch up.
        # Without it the wall is the clock: physics catches up, and nothing is published twice.
        most = round((self.control_ns * 1e-9 if self.publish_clock else MAX_LAG) / self.step)
        steps = 0
        while self.running:
            time.sleep(max(base + (steps + 1) * period - time.monotonic(), 0.0))
            behind = int((time.monotonic() - base) / period + 1e-6) - steps
            if behind > most:
                base += (behind - 1) * period
                if not self.publish_clock:
                    self.get_logger().warning(f'the machine is too slow: {(behind - 1) * self.step:.2f} s given up',
                                              throttle_duration_sec=1.0)
                behind = 1
            if behind < 1 or self._ahead_of_controller():
                continue
            count = 1 if self.publish_clock else behind
            with self.lock:
                for _ in range(count):
                    self.sim.command(self._target())
                    self.sim.advance()
                    self.time_ns += self.step_ns
                steps += count
                if self.clock is not None:
                    self.clock.publish(Clock(clock=to_stamp(self.time_ns)))
                self._publish_due()
        achieved = steps * self.step / (time.monotonic() - began)
        self.get_logger().info(f'{steps * self.step:.1f} s simulated at real-time factor {achieved:.2f}')
        self.sim.close()

    def _target(self) -> np.ndarray:
        """Where every joint is commanded to be now. Shape (D,), order of the simulation's joints."""
        target = np.empty(len(self.sim.joints))
        for columns, motion in self.parts:
            target[columns], _ = motion.at(self.time_ns * 1e-9)
        return target

    def _ahead_of_controller(self) -> bool:
        """Faster than real time a few milliseconds of a busy machine are a long time: wait for who commands the arm."""
        if not self.publish_clock or self.heard is None or self.time_ns - self.heard[0] < self.control_ns + self.step_ns:
            return False
        if time.monotonic() - self.heard[1] > GONE_S:
            self.heard = None  # nobody commands any more
        return self.heard is not None

    def _publish_due(self) -> None:
        stamp = to_stamp(self.time_ns) if self.publish_clock else self.get_clock().now().to_msg()
        due = [output for output in self.outputs if self.time_ns >= output[0]]
        # One image at a time: where a machine cannot draw them all, images are skipped, and joint states stay fresh.
        images = sorted((output for output in due if output[3]), key=lambda output: output[0])
        for output in [output for output in due if not output[3]] + images[:1]:
            since, period, publish, name = output
            skipped = (self.time_ns - since) // period
            output[0] = since + period * (1 + skipped)
            if name and skipped and since:
                self.get_logger().warning(f'{name}: images are skipped, the machine is too slow (camera_size, camera)',
                                          throttle_duration_sec=10.0)
            publish(stamp)

    def _joint_state_of(self, topic: str) -> Callable:
        """Of all joints that the contract's streams on this topic name."""
        streams = {name: stream for name, stream in self.contract.observations.items() if stream.topic == topic}
        joints = list(dict.fromkeys(joint for stream in streams.values() for joint in stream.names))
        missing = [name for name in joints if name not in self.sim.measured]
        if missing:
            raise SceneError(f'observations.{next(iter(streams))}: joints {missing} are not in the description; there are: '
                             f'{", ".join(self.sim.measured)}')
        columns = [self.sim.measured.index(name) for name in joints]

        def joint_state(stamp) -> JointState:
            sim = self.sim
            message = JointState(name=joints, position=sim.joint_positions[columns], velocity=sim.joint_velocities[columns],
                                 effort=sim.joint_efforts[columns])
            message.header.stamp = stamp
            return message

        return joint_state

    def _value_of(self, name: str, stream: Stream) -> Callable:
        """What the task shows under this name, in the fields that the contract names."""
        kind, places = message_class(stream), [field.rpartition('.') for field in stream.fields]

        def value(stamp):
            message = kind()
            message.header.stamp, message.header.frame_id = stamp, reach_around.BASE
            for (path, _, field), number in zip(places, self.sim.observation()[name].tolist()):
                setattr(attrgetter(path)(message) if path else message, field, number)
            return message

        return value

    def _task_status(self, stamp) -> TaskStatus:
        sim = self.task
        message = TaskStatus(episode=self.episode, elapsed=sim.time, reached=sim.reached, touched=sim.touched)
        message.header.stamp, message.header.frame_id = stamp, reach_around.BASE
        x, y, z = sim.tip.tolist()
        message.tip = Point(x=x, y=y, z=z)
        message.goal = Point(x=sim.scene.goal[0], y=sim.scene.goal[1], z=0.0)
        return message

    def _image_of(self, name: str, stream: Stream, size: tuple[int, int]) -> Callable:
        size, frame = size if all(size) else stream.image_size, self.sim.frames[name]
        if stream.type == 'sensor_msgs/msg/Image':
            def take() -> Image:
                return to_message(self.sim.render(size, camera=name), self.encoding)
        else:
            def take() -> CompressedImage:
                return CompressedImage(format='jpeg', data=self.sim.photograph(size, camera=name))

        def image(stamp):
            message = take()
            message.header.stamp, message.header.frame_id = stamp, frame
            return message

        self.pictures.append(take)
        return image


def main() -> None:
    """Entry point."""
    run(SimulatorNode)


if __name__ == '__main__':
    main()
