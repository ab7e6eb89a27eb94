"""The SO-101 and the task reach_around in Gazebo, with its controller; policy, teleoperation, recorders and RViz on request.

    ros2 launch il_runtime gazebo.launch.py --show-args
    ros2 launch il_runtime gazebo.launch.py headless:=true checkpoint:=demo_out/checkpoints/flow
    ros2 service call /controller/arm il_msgs/srv/Arm        # nothing moves before this

The same contract, topics and nodes as in sim.launch.py, on Gazebo's /clock; what is missing is the task's score (task_status)
and its reset. Needs, besides il_runtime: ros_gz, gz_ros2_control, ros2_controllers, robot_state_publisher, xacro,
compressed_image_transport, and the package example-robot-data in AMENT_PREFIX_PATH.
"""
from launch import LaunchDescription
from launch.actions import AppendEnvironmentVariable, ExecuteProcess, IncludeLaunchDescription, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.substitutions import Command, FindExecutable, IfElseSubstitution, LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from il_runtime.launching import (
    CONFIG,
    FLAG,
    FRAMES,
    argument,
    arguments,
    arm,
    controller,
    flight_recorder,
    needs,
    node,
    policy,
    recorder,
    rviz,
    teleop,
    text,
    this_machine_only,
    visualizer,
)

SIM = CONFIG / 'sim'
PACKAGES = ('ros_gz_sim', 'ros_gz_bridge', 'ros_gz_image', 'gz_ros2_control', 'controller_manager', 'joint_state_broadcaster',
            'forward_command_controller', 'joint_trajectory_controller', 'robot_state_publisher', 'compressed_image_transport',
            'example-robot-data')


def generate_launch_description() -> LaunchDescription:
    """Arguments, Gazebo, the arm and its controllers one after the other, then the nodes of this package."""
    namespace, goal_x, goal_y = LaunchConfiguration('namespace'), LaunchConfiguration('goal_x'), LaunchConfiguration('goal_y')
    controllers = str(SIM / 'controllers.yaml')

    def spawner(name) -> Node:
        return node('controller_manager', 'spawner', arguments=[name, '--param-file', controllers,
                                                                '--controller-manager-timeout', '60'])

    urdf = Command([FindExecutable(name='xacro'), f' "{SIM / "so101.urdf.xacro"}" hardware:=gazebo "controllers:={controllers}"',
                    ' "namespace:=', namespace, '"'])
    spawned = node('ros_gz_sim', 'create', arguments=['-name', 'so101', '-topic', 'robot_description'])
    states, commands = spawner('joint_state_broadcaster'), spawner(LaunchConfiguration('controller'))

    return LaunchDescription([
        this_machine_only(),
        *arguments(namespace='', robot='so101', contract='', params_file='', speed_scale='100.0', checkpoint='',
                   plan_when='stride', stride='8', rtc='off', ensembling='newest_first', backend='auto', teleop='none', bags='',
                   flight='', visualizer='false', mcap='', rviz='false'),
        argument('headless', 'false', 'no window; the camera is rendered off-screen (EGL)', FLAG),
        argument('world', str(SIM / 'reach_around.sdf'), 'path of the world, an SDF file'),
        argument('goal_x', '0.28', 'where the goal is, before the arm [m]', float),
        argument('goal_y', '0.0', 'where the goal is, left of the arm [m]', float),
        argument('controller', 'forward_position_controller', 'what moves the joints; joint_trajectory_controller needs a '
                 'contract with a JointTrajectory as output', ['forward_position_controller', 'joint_trajectory_controller']),
        argument('use_sim_time', 'true', 'Gazebo stamps what it sends with its own time, always', ['true']),
        needs(*PACKAGES),
        # The URDF's meshes are package://example-robot-data/…, which Gazebo looks for below these folders.
        AppendEnvironmentVariable('GZ_SIM_RESOURCE_PATH', PathJoinSubstitution([FindPackageShare('example-robot-data'), '..'])),
        IncludeLaunchDescription(
            PathJoinSubstitution([FindPackageShare('ros_gz_sim'), 'launch', 'gz_sim.launch.py']),
            launch_arguments={
                'gz_args': [IfElseSubstitution(LaunchConfiguration('headless'), '-s --headless-rendering -r ', '-r '),
                            LaunchConfiguration('world')],
                'on_exit_shutdown': 'true'}.items()),
        node('robot_state_publisher', 'robot_state_publisher', remappings=FRAMES,
             parameters=[{'robot_description': ParameterValue(urdf, value_type=str)}]),
        node('ros_gz_bridge', 'parameter_bridge', parameters=[{'config_file': str(SIM / 'bridge.yaml')}]),
        node('ros_gz_image', 'image_bridge', arguments=['camera/image']),

        node('ros_gz_sim', 'create', arguments=['-name', 'goal', '-file', str(SIM / 'goal.sdf'), '-x', goal_x, '-y', goal_y]),
        ExecuteProcess(name='goal', output='log', cmd=[
            'ros2', 'topic', 'pub', '--use-sim-time', '--rate', '10', [namespace, '/goal'], 'geometry_msgs/msg/PointStamped',
            ['{header: {stamp: now, frame_id: base_link}, point: {x: ', goal_x, ', y: ', goal_y, '}}']]),

        spawned,
        after(spawned, states),
        after(states, commands),

        arm(
            controller(ensembling=text('ensembling')),
            policy(),
            teleop(),
            recorder(),
            flight_recorder(),
            visualizer(),
            rviz(),
        ),
    ])


def after(process: Node, action: Node) -> RegisterEventHandler:
    """Start an action once a process has done its work; if it has failed, end everything and say which."""
    def ended(event, _context) -> Node:
        if event.returncode:
            raise RuntimeError(f'{event.process_name} failed with exit code {event.returncode}, see above')
        return action

    return RegisterEventHandler(OnProcessExit(target_action=process, on_exit=ended))
