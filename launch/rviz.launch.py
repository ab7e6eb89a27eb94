"""RViz with what the visualizer node shows.

    ros2 launch il_runtime rviz.launch.py --show-args
    ros2 launch il_runtime rviz.launch.py robot:=so101 description:=true
"""
from launch import LaunchDescription
from launch.actions import GroupAction
from launch.conditions import IfCondition
from launch.substitutions import Command, FindExecutable, LaunchConfiguration
from launch_ros.parameter_descriptions import ParameterValue

from il_runtime.launching import CONFIG, FLAG, FRAMES, argument, arguments, find_contract, needs, node, this_machine_only

# In the file that RViz reads they begin at the root.
SHOWN = [('/visualization', 'visualization'), ('/robot_description', 'robot_description')]


def generate_launch_description() -> LaunchDescription:
    """Arguments, then RViz and, where asked, robot_state_publisher."""
    described = IfCondition(LaunchConfiguration('description'))
    urdf = Command([FindExecutable(name='il'), ' urdf "', LaunchConfiguration('contract'), '"'])
    return LaunchDescription([
        this_machine_only(),
        *arguments(namespace='', use_sim_time='false'),
        argument('rviz_config', str(CONFIG / 'rviz' / 'il.rviz'), 'path of the file that says what RViz shows'),
        argument('frame', 'base_link', 'frame that stands still in RViz: the root link of the arm'),
        argument('description', 'false', 'publish the description of the contract and its transforms, where the drivers of the '
                 'arm do not', FLAG),
        *arguments(robot='', contract=''),
        GroupAction([
            needs('rviz2'),
            needs('robot_state_publisher', condition=described),
            find_contract(described),
            node('robot_state_publisher', 'robot_state_publisher', condition=described, remappings=FRAMES,
                 parameters=[{'robot_description': ParameterValue(urdf, value_type=str)}]),
            node('rviz2', 'rviz2', remappings=FRAMES + SHOWN,
                 arguments=['-d', LaunchConfiguration('rviz_config'), '-f', LaunchConfiguration('frame')]),
        ]),
    ])
