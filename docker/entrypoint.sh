#!/bin/bash
# Runs a command in the environment that setup.sh made:   il-env ros2 launch il_runtime sim.launch.py
set -e
. "/opt/ros/$ROS_DISTRO/setup.bash"
. /home/il/il/env.sh
exec "$@"
