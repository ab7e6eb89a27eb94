"""A recorder of demonstrations, and a human's hand on the arm, beside a robot that runs (robot.launch.py, sim.launch.py).

    ros2 launch il_runtime record.launch.py --show-args
    ros2 launch il_runtime record.launch.py contract:=my_arm.yaml bags:=bags task:='pick the cube' teleop:=gamepad
    ros2 service call /recorder/start_episode il_msgs/srv/StartEpisode
    ros2 service call /recorder/stop_episode il_msgs/srv/StopEpisode "{task_succeeded: true}"

With keys instead of services, and a line that says how things are: ros2 run il_runtime recorder_node, in a terminal.
"""
from launch import LaunchDescription

from il_runtime.launching import argument, arguments, arm, ours, teleop, text, this_machine_only


def generate_launch_description() -> LaunchDescription:
    """Arguments, then the nodes of one arm in its namespace."""
    return LaunchDescription([
        this_machine_only(),
        *arguments(namespace='', robot='', contract='', params_file='', use_sim_time='false', bags='bags', teleop='none'),
        argument('task', '', 'what is done, in words, where whoever starts an episode does not say'),
        arm(
            ours('recorder_node', output=text('bags'), task=text('task')),
            teleop(),
        ),
    ])
