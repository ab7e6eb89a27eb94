"""From recordings to training windows: decoding, alignment, bags, the episode store. No ROS and no torch."""
