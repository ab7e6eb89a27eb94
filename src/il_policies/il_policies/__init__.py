"""Robot contract, data, policies, training, evaluation and simulated tasks. Never imports ROS."""
