"""Plans and what becomes of them, for RViz and Foxglove, from what planner and controller say anyway.

Joint states and commands, which come far more often than anybody looks, are taken when the next picture is due.
"""
from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Point
from il_msgs.msg import ActionChunk, ControllerStatus
from mcap.writer import Writer
from rcl_interfaces.msg import ParameterEvent
from rcl_interfaces.srv import GetParameters
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.parameter import parameter_value_to_python
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rclpy.serialization import serialize_message
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from visualization_msgs.msg import Marker, MarkerArray

from il_policies.bags.writer import add_definitions, standard_types
from il_policies.contract import Stream, load_contract
from il_policies.data.decode import DecodeError, decode
from il_policies.data.errors import BagError
from il_policies.description import resolve
from il_runtime.core.clock import LoopClock, StampError
from il_runtime.core.ensembling import Blending, Chunk, ChunkError, arrange
from il_runtime.ros import STATUS_QOS, Polled, be_nice, chunk_qos, declare, nanoseconds, run, take_all
from il_runtime.scene import Scene, Shape

KINDS = {'path': Marker.LINE_STRIP, 'sticks': Marker.LINE_LIST, 'balls': Marker.SPHERE_LIST, 'text': Marker.TEXT_VIEW_FACING}
BLENDING = ('m', 'seam', 'max_disagreement')
"""Parameters of the controller that Blending has under the same names."""


class Markers:
    """Shapes as messages; what has not changed is not made anew."""

    def __init__(self, frame: str, lifetime: float):
        """lifetime: after which they vanish by themselves [s]."""
        self._frame, self._lifetime = frame, Duration(sec=int(lifetime), nanosec=int(lifetime % 1 * 1e9))
        self._shown: dict[tuple[str, int], tuple[Shape, Marker]] = {}

    def array(self, shapes: list[Shape]) -> MarkerArray:
        """Those to be shown from now on, and the removal of those that are not any more."""
        before, self._shown = self._shown, {}
        for shape in shapes:
            key = (shape.namespace, shape.number)
            self._shown[key] = (shape, self._marker(shape, *before.pop(key, (None, None))))
        gone = [Marker(ns=namespace, id=number, action=Marker.DELETE) for namespace, number in before]
        for marker in gone:
            marker.header.frame_id = self._frame
        return MarkerArray(markers=[*gone, *(marker for _, marker in self._shown.values())])

    def _marker(self, shape: Shape, before: Shape | None, marker: Marker | None) -> Marker:
        if marker is None:
            marker = Marker(ns=shape.namespace, id=shape.number, type=KINDS[shape.kind], lifetime=self._lifetime)
            # Stamp 0: where the frame is now, however late its transform.
            marker.header.frame_id, marker.frame_locked, marker.pose.orientation.w = self._frame, True, 1.0
        marker.color.r, marker.color.g, marker.color.b, marker.color.a = shape.colour
        if shape.kind == 'text':
            marker.text, marker.scale.z = shape.text, shape.size
            marker.pose.position = _points(shape.points)[0]
            return marker
        marker.scale.x = shape.size
        if shape.kind == 'balls':
            marker.scale.y = marker.scale.z = shape.size
        if before is None or before.points is not shape.points:
            marker.points = _points(shape.points)
        return marker


def _points(points) -> list[Point]:
    return [Point(x=x, y=y, z=z) for x, y, z in points.tolist()]


class SceneFile:
    """An MCAP file of ROS 2 messages, as Foxglove opens it and `ros2 bag play` plays it."""

    def __init__(self, path: str, topics: dict[str, str]):
        """topics: name → type. Raises BagError if `path` exists or cannot be made."""
        try:
            self._file = open(path, 'xb')
        except FileExistsError:
            raise BagError(f'{path}: exists already; choose another name, or remove it', 'E301') from None
        except OSError as error:
            raise BagError(f'{path}: cannot be written: {error.strerror}', 'E305') from None
        self._writer = Writer(self._file, chunk_size=256 * 1024)  # a second: what a kill costs
        self._writer.start(profile='ros2', library='il_runtime')
        types = standard_types()
        for name in topics.values():
            add_definitions(types, name, lambda package: Path(get_package_share_directory(package)) / 'msg')
        self._channels = {
            topic: self._writer.register_channel(topic, 'cdr', self._writer.register_schema(
                name, 'ros2msg', types.generate_msgdef(name, ros_version=2)[0].encode())) for topic, name in topics.items()}

    def write(self, topic: str, data: bytes, time: int) -> None:
        """Append a message of time [ns], serialised as CDR. Raises OSError."""
        self._writer.add_message(self._channels[topic], time, data, time)

    def close(self) -> None:
        """Complete the file. Raises OSError."""
        self._writer.finish()
        self._file.close()


class VisualizerNode(Node):
    """Everything by relative topics, so that remapping shows another controller or planner."""

    def __init__(self):
        """Raises ContractError, DescriptionError or BagError for what cannot be shown or written."""
        super().__init__('visualizer')
        path = declare(self, 'contract', '', "the robot's contract, a YAML file; its description is needed")
        rate = declare(self, 'rate', 10.0, 'pictures [Hz]', 1.0, 50.0)
        keep = declare(self, 'chunks', 8, 'so many of the last chunks are shown', 1, 64)
        frame = declare(self, 'frame', '', "frame of the markers; empty: the description's root link. Say it where "
                        'robot_state_publisher has a frame_prefix')
        mcap = declare(self, 'mcap', '', 'MCAP file to write the scene to, for Foxglove; empty: none')
        publish = declare(self, 'publish_description', False, 'publish the URDF, latched, on robot_description')
        be_nice(self)
        contract = load_contract(path)
        self.scene, self.joints = Scene(contract, keep), contract.action.joints
        self.sim_time = self.get_parameter('use_sim_time').value
        steady, stamps = Clock(clock_type=ClockType.STEADY_TIME), self.get_clock()
        self.clock = LoopClock(lambda: (stamps if self.sim_time else steady).now().nanoseconds, lambda: stamps.now().nanoseconds)
        self.drawn = 0.0
        self.markers = Markers(frame or self.scene.skeleton.frame, 3.0 / rate)
        self.failure = ''
        self.status_topic = self.resolve_topic_name('controller/status')
        self.ensembling = ''
        self.asked: tuple | None = None  # the ensembling and epoch under which the controller was last asked how it blends
        self.controller, self.questions = '', None  # the controller's name and the client that asks it

        state = contract.observations[contract.joint_state]
        self.state_stream = Stream(state.topic, state.type, state.rate, state.max_age, field='position', names=self.joints)
        self.pictures = self.create_publisher(MarkerArray, 'visualization', QoSProfile(depth=1))
        topics = {self.pictures.topic_name: 'visualization_msgs/msg/MarkerArray',
                  self.status_topic: 'il_msgs/msg/ControllerStatus'}
        self.file = SceneFile(mcap, topics) if mcap else None
        if publish:
            self.description = self.create_publisher(String, 'robot_description', STATUS_QOS)
            self.description.publish(String(data=resolve(contract.description).read_text()))
        polled, lossy = Polled(), qos_profile_sensor_data.reliability
        self.states = self.create_subscription(
            JointState, state.topic, _never, QoSProfile(depth=1, reliability=lossy), callback_group=polled)
        since = round(2 * contract.control_rate / rate)  # a picture may be late
        self.commands = self.create_subscription(
            JointState, contract.action.topic, _never, QoSProfile(depth=since, reliability=lossy), callback_group=polled)
        self.create_subscription(ActionChunk, 'chunks', self._on_chunk, chunk_qos())
        self.create_subscription(ControllerStatus, 'controller/status', self._on_status, STATUS_QOS)
        self.create_subscription(ParameterEvent, '/parameter_events', self._on_parameters, QoSProfile(depth=10))
        self.create_timer(1.0 / rate, self._draw, clock=steady)  # also while /clock stands still
        self.get_logger().info(f'{contract.robot}: {self.pictures.topic_name}' + (f' and {mcap}' if mcap else ''))

    # --- what is heard ------------------------------------------------------------------------------------------------
    def _on_chunk(self, message: ActionChunk, info: dict) -> None:
        try:
            positions = arrange(message.joint_names, message.positions, message.horizon, message.step_period, self.joints)
            observed, begins = self.clock.convert(nanoseconds(message.header.stamp), nanoseconds(message.start))
        except (ChunkError, StampError) as error:
            self.get_logger().warning(f'chunk ignored: {error}', throttle_duration_sec=5.0)
            return
        now = self.clock.now()
        # The middleware knows when it came, on the wall clock (not every middleware).
        waited = 0.0 if self.sim_time or not info['received_timestamp'] else max(
            self.get_clock().now().nanoseconds - info['received_timestamp'], 0) * 1e-9
        self.scene.chunk(Chunk(begins, message.step_period, positions, message.epoch, message.sequence, observed),
                         now - waited - observed, nanoseconds(message.inference_time) * 1e-9, now)

    def _on_status(self, message: ControllerStatus) -> None:
        self.scene.status(message, self.clock.now())
        self._write(self.status_topic, serialize_message(message))
        self.ensembling = message.ensembling
        state = (message.ensembling, message.epoch)
        if self.asked != state and self._ask_blending():
            self.asked = state

    def _take(self, now: float) -> None:
        """Joint states and commands since the last picture."""
        for message, _ in take_all(self.states):
            try:
                positions = decode(message, self.state_stream)
            except DecodeError as error:
                self.get_logger().warning(f'joint states ignored: {error}', throttle_duration_sec=5.0)
                continue
            self.scene.skeleton.others(message.name, message.position)
            self.scene.joint_state(positions)
        for message, _ in take_all(self.commands):
            try:
                given, = self.clock.convert(nanoseconds(message.header.stamp))
                self.scene.command(arrange(message.name, message.position, 1, 1.0, self.joints)[0], given)
            except (ChunkError, StampError) as error:
                self.get_logger().warning(f'command ignored: {error}', throttle_duration_sec=5.0)

    # --- how chunks are blended: the controller's parameters ----------------------------------------------------------
    def _on_parameters(self, event: ParameterEvent) -> None:
        if event.node == self.controller and {parameter.name for parameter in event.changed_parameters} & set(BLENDING):
            self.asked = None  # again with the next status

    def _ask_blending(self) -> bool:
        """Ask whoever the status comes from; False if that cannot be done yet."""
        names = [f'{info.node_namespace.rstrip("/")}/{info.node_name}'
                 for info in self.get_publishers_info_by_topic(self.status_topic)]
        if names and names[-1] != self.controller:
            if self.questions is not None:
                self.destroy_client(self.questions)
            self.controller = names[-1]
            self.questions = self.create_client(GetParameters, f'{self.controller}/get_parameters')
        if self.questions is None or not self.questions.service_is_ready():
            return False
        self.questions.call_async(GetParameters.Request(names=list(BLENDING))).add_done_callback(self._on_blending)
        return True

    def _on_blending(self, future) -> None:
        values = map(parameter_value_to_python, future.result().values)
        known = {name: value for name, value in zip(BLENDING, values) if value is not None}
        try:
            self.scene.blending = Blending(self.ensembling, **known)
        except ValueError as error:  # a controller of another kind
            self.get_logger().warning(f'{self.controller}: {error}; its path ahead is not shown')

    # --- the picture --------------------------------------------------------------------------------------------------
    def _draw(self) -> None:
        now = self.clock.now()
        if now < self.drawn:
            self.scene.reset()
        self.drawn = now
        self._take(now)
        picture = serialize_message(self.markers.array(self.scene.shapes(now)))
        self.pictures.publish(picture)
        self._write(self.pictures.topic_name, picture)

    def _write(self, topic: str, data: bytes) -> None:
        if self.file is not None and not self.failure:
            try:
                self.file.write(topic, data, self.get_clock().now().nanoseconds)
            except OSError as error:
                self.failure = f'the scene cannot be written on: {error.strerror}'

    def finish(self, _spin_once) -> None:
        """Complete the file."""
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:
                self.failure = f'the scene is incomplete: {error.strerror}'


def _never(_message) -> None:
    """Callback of subscriptions that are polled."""


def main() -> None:
    """Entry point."""
    run(VisualizerNode)


if __name__ == '__main__':
    main()
