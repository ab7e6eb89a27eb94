"""Nodes around a pure core: the 50 Hz controller, the policy node, the recorder, the simulator."""
