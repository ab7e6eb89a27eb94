"""A real arm under the controller: drivers of your own, teleoperation, flight recorder and overlay. Slow at first.

    ros2 launch il_runtime robot.launch.py --show-args
    ros2 launch il_runtime robot.launch.py contract:=my_arm.yaml drivers:=my_drivers.launch.py teleop:=gamepad
    ros2 service call /controller/arm il_msgs/srv/Arm        # nothing moves before this

record.launch.py records demonstrations beside it; deploy.launch.py takes its place where a policy shall move the arm.
"""
from launch import LaunchDescription

from il_runtime.launching import arguments, arm, controller, drivers, flight_recorder, rviz, teleop, this_machine_only, visualizer


def generate_launch_description() -> LaunchDescription:
    """Arguments, then the nodes of one arm in its namespace."""
    return LaunchDescription([
        this_machine_only(),
        *arguments(namespace='', robot='', contract='', drivers='', params_file='', use_sim_time='false', speed_scale='20.0',
                   teleop='none', flight='flight', visualizer='true', mcap='', rviz='false'),
        arm(
            controller(),
            drivers(),
            teleop(),
            flight_recorder(),
            visualizer(),
            rviz(),
        ),
    ])
