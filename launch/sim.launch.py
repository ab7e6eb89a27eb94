"""The simulated arm with its controller; a recorder and a policy on request.

    ros2 launch il_runtime sim.launch.py --show-args
    ros2 launch il_runtime sim.launch.py checkpoint:=demo_out/checkpoints/flow
    ros2 launch il_runtime sim.launch.py bags:=bags          # then: ros2 run il_runtime expert_node …, or your own
"""
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution, PythonExpression
from launch_ros.actions import Node, PushRosNamespace, SetParameter
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

SHARE = FindPackageShare('il_runtime')
ARGUMENTS = {
    'namespace': ('', 'namespace of all nodes; two arms get two'),
    'robot': ('so101', 'contract in config/robots, without .yaml'),
    'contract': ([PathJoinSubstitution([SHARE, 'config', 'robots', LaunchConfiguration('robot')]), '.yaml'],
                 'path of a contract, if it is not one of config/robots'),
    'checkpoint': ('', 'folder written by il train; with it a policy node is started'),
    'stride': ('8', 'policy steps between plans'),
    'speed_scale': ('100.0', 'slows everything down [%]'),
    'teleop': ('', 'leader or gamepad; with it a teleop node is started (the keyboard needs a terminal of its own: '
                   'ros2 run il_runtime teleop_node)'),
    'bags': ('', 'folder for recordings; with it a recorder node is started'),
    'flight': ('', 'folder for flight recordings; with it a flight recorder node is started'),
    'real_time_factor': ('1.0', 'speed of the simulation; other than 1 needs use_sim_time:=true'),
    'use_sim_time': ('false', 'run everything on the simulator\'s /clock'),
    'camera': ('true', 'render and publish the camera'),
}


def generate_launch_description() -> LaunchDescription:
    """Arguments, then the nodes of one arm in its namespace."""
    value = {name: LaunchConfiguration(name) for name in ARGUMENTS}

    def given(name):
        return IfCondition(PythonExpression(["'", value[name], "' != ''"]))

    def node(executable, *, parameters=(), condition=None):
        return Node(package='il_runtime', executable=executable, output='screen', condition=condition,
                    parameters=[{'contract': value['contract']}, *parameters])

    def typed(name, kind):
        return {name: ParameterValue(value[name], value_type=kind)}

    return LaunchDescription([
        *(DeclareLaunchArgument(name, default_value=default, description=text) for name, (default, text) in ARGUMENTS.items()),
        GroupAction([
            PushRosNamespace(value['namespace']),
            SetParameter('use_sim_time', ParameterValue(value['use_sim_time'], value_type=bool)),
            node('controller_node', parameters=[typed('speed_scale', float)]),
            node('simulator_node', parameters=[
                typed('real_time_factor', float), typed('camera', bool),
                {'publish_clock': ParameterValue(value['use_sim_time'], value_type=bool)}]),
            node('policy_node', condition=given('checkpoint'),
                 parameters=[{'checkpoint': ParameterValue(value['checkpoint'], value_type=str)}, typed('stride', int)]),
            node('recorder_node', condition=given('bags'),
                 parameters=[{'output': ParameterValue(value['bags'], value_type=str)}]),
            node('flight_recorder_node', condition=given('flight'),
                 parameters=[{'output': ParameterValue(value['flight'], value_type=str)}]),
            node('teleop_node', condition=given('teleop'),
                 parameters=[{'source': ParameterValue(value['teleop'], value_type=str)}]),
        ]),
    ])
