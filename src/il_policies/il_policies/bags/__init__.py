"""rosbag2 bags, read and written without ROS."""
