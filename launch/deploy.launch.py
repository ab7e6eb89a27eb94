"""A policy on a real arm: planner, controller, flight recorder and overlay; or in its shadow, where it moves nothing.

    ros2 launch il_runtime deploy.launch.py --show-args
    ros2 launch il_runtime deploy.launch.py contract:=my_arm.yaml checkpoint:=my_policy drivers:=my_drivers.launch.py
    ros2 service call /controller/arm il_msgs/srv/Arm        # nothing moves before this

    ros2 launch il_runtime deploy.launch.py contract:=my_arm.yaml checkpoint:=my_policy shadow:=true rviz:=true
"""
from launch import LaunchDescription
from launch.actions import GroupAction
from launch.conditions import UnlessCondition
from launch.substitutions import IfElseSubstitution, LaunchConfiguration

from il_runtime.launching import (
    FLAG,
    argument,
    arguments,
    arm,
    controller,
    drivers,
    flag,
    flight_recorder,
    policy,
    rviz,
    teleop,
    text,
    this_machine_only,
    visualizer,
)


def generate_launch_description() -> LaunchDescription:
    """Arguments, then the nodes of one arm in its namespace."""
    shadow = LaunchConfiguration('shadow')
    seat = IfElseSubstitution(shadow, 'shadow', 'controller')
    # A shadow has a planner of its own, whatever controller may be moving the arm meanwhile.
    apart = [('controller/status', [seat, '/status']), ('chunks', IfElseSubstitution(shadow, 'shadow/chunks', 'chunks'))]
    shown = [*apart, ('command', IfElseSubstitution(shadow, 'shadow/command', 'command'))]
    return LaunchDescription([
        this_machine_only(),
        *arguments(namespace='', robot='', contract='', drivers='', params_file='', use_sim_time='false', checkpoint=None,
                   plan_when='stride', stride='8', rtc='off', ensembling='newest_first', backend='auto', speed_scale='20.0',
                   teleop='none', flight='flight', visualizer='true', mcap='', rviz='false'),
        argument('shadow', 'false', 'only show what the policy would do, on shadow/command, while a human moves the arm by hand, '
                 'by its own teleoperation or under robot.launch.py (that one with visualizer:=false); speed_scale is 100', FLAG),
        arm(
            controller(name=seat, shadow=flag('shadow'), ensembling=text('ensembling')),
            policy(remappings=apart),
            drivers(),
            teleop(),
            GroupAction([flight_recorder()], condition=UnlessCondition(shadow)),
            visualizer(remappings=shown),
            rviz(),
        ),
    ])
