"""`il check`: do contract, description, live topics, bags, dataset and checkpoint fit together, and what to do where not?

facts.py: what streams and a running graph are like; streams.py judges these, robot.py a contract and its description,
agreement.py datasets and checkpoints; findings.py shows it all; command.py opens what was named. No ROS: the live facts
come from il_runtime's probe_node.
"""
