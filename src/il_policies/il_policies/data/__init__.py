"""From recordings to training windows: decoding, alignment, quality, the episode store. No ROS and no torch."""
