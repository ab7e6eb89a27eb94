"""What decides the next command: numpy only, no ROS, no torch, every clock injected."""
