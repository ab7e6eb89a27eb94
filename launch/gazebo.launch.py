"""The SO-101 and the task reach_around in Gazebo, with its controller; a recorder and a policy on request.

    ros2 launch il_runtime gazebo.launch.py --show-args
    ros2 launch il_runtime gazebo.launch.py headless:=true checkpoint:=demo_out/checkpoints/flow
    ros2 service call /controller/arm il_msgs/srv/Arm        # nothing moves before this

The same contract, topics and nodes as in sim.launch.py, on Gazebo's /clock; what is missing is the task's score (task_status)
and its reset. Needs, besides il_runtime: ros_gz_sim, ros_gz_bridge, ros_gz_image, gz_ros2_control, ros2_controllers,
robot_state_publisher, xacro, compressed_image_transport, and the package example-robot-data in AMENT_PREFIX_PATH.
"""
from launch import LaunchDescription
from launch.actions import (
    AppendEnvironmentVariable,
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    RegisterEventHandler,
    Shutdown,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.substitutions import Command, FindExecutable, LaunchConfiguration, PathJoinSubstitution, PythonExpression
from launch_ros.actions import Node, SetParameter
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

SHARE = FindPackageShare('il_runtime')
SIM = PathJoinSubstitution([SHARE, 'config', 'sim'])
ARGUMENTS = {
    'namespace': ('', 'namespace of all nodes and controllers'),
    'robot': ('so101', 'contract in config/robots, without .yaml'),
    'contract': ([PathJoinSubstitution([SHARE, 'config', 'robots', LaunchConfiguration('robot')]), '.yaml'],
                 'path of a contract, if it is not one of config/robots'),
    'world': (PathJoinSubstitution([SIM, 'reach_around.sdf']), 'path of the world'),
    'headless': ('false', 'no window; the camera is rendered off-screen (EGL)'),
    'goal_x': ('0.28', 'where the goal is, before the arm [m]'),
    'goal_y': ('0.0', 'where the goal is, left of the arm [m]'),
    'controller': ('forward_position_controller', 'what moves the joints: forward_position_controller, or '
                   'joint_trajectory_controller with a contract whose output is a JointTrajectory'),
    'checkpoint': ('', 'folder written by il train; with it a policy node is started'),
    'stride': ('8', 'policy steps between plans'),
    'speed_scale': ('100.0', 'slows everything down [%]'),
    'bags': ('', 'folder for recordings; with it a recorder node is started'),
}


def generate_launch_description() -> LaunchDescription:
    """Arguments, Gazebo, the arm and its controllers one after the other, then the nodes of this package."""
    value = {name: LaunchConfiguration(name) for name in ARGUMENTS}

    def node(package, executable, *, parameters=(), arguments=(), condition=None):
        # The namespace is said here: what an event handler starts would miss that of a group.
        return Node(package=package, executable=executable, namespace=value['namespace'], output='screen', condition=condition,
                    parameters=list(parameters), arguments=list(arguments))

    def ours(executable, *, parameters=(), condition=None):
        return node('il_runtime', executable, parameters=[{'contract': value['contract']}, *parameters], condition=condition)

    def given(name):
        return IfCondition(PythonExpression(["'", value[name], "' != ''"]))

    def typed(name, kind):
        return {name: ParameterValue(value[name], value_type=kind)}

    controllers = PathJoinSubstitution([SIM, 'controllers.yaml'])

    def spawner(name):
        return node('controller_manager', 'spawner', arguments=[name, '--param-file', controllers,
                                                                '--controller-manager-timeout', '60'])

    urdf = Command([FindExecutable(name='xacro'), ' "', PathJoinSubstitution([SIM, 'so101.urdf.xacro']), '" hardware:=gazebo',
                    ' "controllers:=', controllers, '" "namespace:=', value['namespace'], '"'])
    arm = node('ros_gz_sim', 'create', arguments=['-name', 'so101', '-topic', 'robot_description'])
    states, commands = spawner('joint_state_broadcaster'), spawner(value['controller'])

    return LaunchDescription([
        *(DeclareLaunchArgument(name, default_value=default, description=text) for name, (default, text) in ARGUMENTS.items()),
        SetParameter('use_sim_time', True),  # Gazebo stamps what it sends with its own time, always
        # The URDF's meshes are package://example-robot-data/…, which Gazebo looks for below these folders.
        AppendEnvironmentVariable('GZ_SIM_RESOURCE_PATH', PathJoinSubstitution([FindPackageShare('example-robot-data'), '..'])),
        IncludeLaunchDescription(
            PathJoinSubstitution([FindPackageShare('ros_gz_sim'), 'launch', 'gz_sim.launch.py']),
            launch_arguments={
                'gz_args': [PythonExpression(["'-s --headless-rendering -r ' if '", value['headless'], "' == 'true' else '-r '"]),
                            value['world']],
                'on_exit_shutdown': 'true'}.items()),
        node('robot_state_publisher', 'robot_state_publisher',
             parameters=[{'robot_description': ParameterValue(urdf, value_type=str)}]),
        node('ros_gz_bridge', 'parameter_bridge', parameters=[{'config_file': PathJoinSubstitution([SIM, 'bridge.yaml'])}]),
        node('ros_gz_image', 'image_bridge', arguments=['camera/image']),

        node('ros_gz_sim', 'create', arguments=['-name', 'goal', '-file', PathJoinSubstitution([SIM, 'goal.sdf']),
                                                '-x', value['goal_x'], '-y', value['goal_y']]),
        ExecuteProcess(name='goal', output='log', cmd=[
            'ros2', 'topic', 'pub', '--use-sim-time', '--rate', '10', [value['namespace'], '/goal'],
            'geometry_msgs/msg/PointStamped',
            ['{header: {stamp: now, frame_id: base_link}, point: {x: ', value['goal_x'], ', y: ', value['goal_y'], '}}']]),

        arm,
        after(arm, states),
        after(states, commands),

        ours('controller_node', parameters=[typed('speed_scale', float)]),
        ours('policy_node', condition=given('checkpoint'),
             parameters=[{'checkpoint': ParameterValue(value['checkpoint'], value_type=str)}, typed('stride', int)]),
        ours('recorder_node', condition=given('bags'),
             parameters=[{'output': ParameterValue(value['bags'], value_type=str)}]),
    ])


def after(process: Node, action: Node) -> RegisterEventHandler:
    """Start an action once a process has done its work; if it has failed, end everything and say which."""
    def ended(event, _context):
        if event.returncode == 0:
            return action
        return Shutdown(reason=f'{event.process_name} failed with exit code {event.returncode}')

    return RegisterEventHandler(OnProcessExit(target_action=process, on_exit=ended))
