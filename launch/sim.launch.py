"""A simulated arm with its controller; policy, teleoperation, recorders and RViz on request.

    ros2 launch il_runtime sim.launch.py --show-args
    ros2 launch il_runtime sim.launch.py checkpoint:=demo_out/checkpoints/flow rviz:=true
    ros2 launch il_runtime sim.launch.py bags:=bags          # then: ros2 run il_runtime expert_node …, or your own
    ros2 service call /controller/arm il_msgs/srv/Arm        # nothing moves before this
"""
from launch import LaunchDescription

from il_runtime.launching import (
    FLAG,
    argument,
    arguments,
    arm,
    controller,
    flag,
    flight_recorder,
    needed,
    number,
    ours,
    policy,
    recorder,
    rviz,
    teleop,
    text,
    this_machine_only,
    visualizer,
)


def generate_launch_description() -> LaunchDescription:
    """Arguments, then the nodes of one arm in its namespace."""
    return LaunchDescription([
        this_machine_only(),
        *arguments(namespace='', robot='so101', contract='', params_file='', speed_scale='100.0', checkpoint='',
                   plan_when='stride', stride='8', rtc='off', ensembling='newest_first', backend='auto', teleop='none', bags='',
                   flight='', visualizer='false', mcap='', rviz='false'),
        argument('task', 'auto', 'reach_around: the SO-101, a pillar and a goal; none: the arm alone; auto: the task if the '
                 'contract is for the SO-101', ['auto', 'reach_around', 'none']),
        argument('camera', 'true', 'render and publish the cameras of the contract', FLAG),
        argument('use_sim_time', 'false', 'run everything on the simulator\'s /clock, of which there may be one', FLAG),
        argument('real_time_factor', '1.0', 'simulated seconds per second, 0.05 to 100; other than 1 needs use_sim_time:=true',
                 float),
        arm(
            ours('simulator_node', on_exit=needed, task=text('task'), camera=flag('camera'),
                 real_time_factor=number('real_time_factor'), publish_clock=flag('use_sim_time')),
            controller(ensembling=text('ensembling')),
            policy(),
            teleop(),
            recorder(),
            flight_recorder(),
            visualizer(),
            rviz(description='true'),
        ),
    ])
