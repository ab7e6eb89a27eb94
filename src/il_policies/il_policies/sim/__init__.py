"""Simulated tasks: physics, reward and scripted experts. No ROS, no torch."""
