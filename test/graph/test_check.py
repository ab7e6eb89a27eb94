"""`il check --live` against a real simulator and real publishers that get it wrong, over DDS."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from geometry_msgs.msg import PointStamped
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from il_policies.contract import load_contract
from support import CONTRACT, wait_for

JOINTS = load_contract(CONTRACT).action.joints
OUTPUT = '/forward_position_controller/commands'
BUSY = {'E211', 'E507'}
"""A shared machine pauses processes: rates and ages are then what they are."""


def check(tmp_path: Path, contract: Path = CONTRACT, *arguments: str) -> dict:
    """What il check finds live, as JSON: (level, code) → findings' words and fixes, joined; '' where there are none."""
    file = tmp_path / 'check.json'
    result = subprocess.run([sys.executable, '-m', 'il_policies.cli', 'check', str(contract), '--live', '--seconds', '2',
                             '--json', str(file), *arguments], capture_output=True, text=True, timeout=90)
    print(result.stdout, result.stderr)
    content = json.loads(file.read_text())
    assert result.returncode == (1 if content['FAIL'] else 0)
    live = next(part for part in content['sections'] if part['title'].startswith('live'))
    return {key: '\n'.join(f'{f["place"]}: {f["expected"]} | {f["found"]} | {f["fix"]}' for f in live['findings']
                           if (f['level'], f['code']) == key) for key in {(f['level'], f['code']) for f in live['findings']}}


def wrong(found: dict) -> set[str]:
    """Codes of what is wrong, but for what a busy machine does."""
    return {code for level, code in found if level in ('FAIL', 'WARN')} - BUSY


def simulate(nodes, node, **settings) -> None:
    namespace = f'/{settings["namespace"]}' if 'namespace' in settings else ''
    nodes.start('simulator_node', contract=CONTRACT, **settings)
    wait_for(lambda: node.count_publishers(f'{namespace}/camera/image/compressed'), 40, 'the simulator')


def test_a_robot_that_fits_and_who_disturbs_it(ros, nodes, node, tmp_path):
    simulate(nodes, node)
    found = check(tmp_path)
    assert wrong(found) == set()
    for said in ('joint_positions (/joint_states):  | sensor_msgs/msg/JointState by /simulator', '96×96 jpeg',
                 f'action.outputs ({OUTPUT}):  | std_msgs/msg/Float64MultiArray, heard by /simulator',
                 'values within the limits'):
        assert said in found['PASS', '']

    # A second arm driver, two who command, a leader arm with sensor QoS, a servo that wants latched commands.
    node.create_publisher(JointState, 'teleop', qos_profile_sensor_data)
    node.create_publisher(JointState, 'joint_states', 10)
    other = ros.create_node('moveit')
    for commanding in (node, other):
        commanding.create_publisher(Float64MultiArray, OUTPUT, 1)
    node.create_subscription(Float64MultiArray, OUTPUT, print, QoSProfile(
        depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL))
    found = check(tmp_path)
    assert wrong(found) == {'E504', 'E505'}
    assert '2: /simulator, /test' in found['FAIL', 'E505'] and 'joint_state_publisher' in found['FAIL', 'E505']
    assert f'action.outputs ({OUTPUT}): one publisher, the controller | 2: /moveit, /test' in found['FAIL', 'E505']
    assert 'publisher of /test with best_effort, volatile' in found['FAIL', 'E504']
    assert 'subscription of /test with reliable, transient_local' in found['FAIL', 'E504']
    other.destroy_node()


def test_a_robot_in_another_namespace(nodes, node, tmp_path):
    simulate(nodes, node, namespace='left')
    found = check(tmp_path)
    assert wrong(found) == {'E201', 'E506'}
    assert 'joint_positions, goal, front (/joint_states, /goal, /camera/image/compressed)' in found['FAIL', 'E201']
    assert 'published in the namespace /left | start all nodes with --ros-args -r __ns:=/left' in found['FAIL', 'E201']
    assert 'one in the namespace /left' in found['FAIL', 'E506']
    assert wrong(check(tmp_path, CONTRACT, '--namespace', '/left')) == set()


def test_simulated_time(nodes, node, tmp_path):
    simulate(nodes, node, publish_clock=True)
    found = check(tmp_path)
    assert wrong(found) == set() and 'use_sim_time:=true' in found['NOTE', '']


def test_drivers_that_get_it_wrong(node, tmp_path):
    """Degrees and permuted at half the rate; a joint renamed; stamps of another clock; a raw image; a topic by another name."""
    contract = yaml.safe_load(CONTRACT.read_text())
    seen = contract['observations']
    seen['wrist'] = {**seen['joint_positions'], 'topic': 'wrist_states', 'names': ['wrist_roll', 'gripper']}
    seen['tool'] = {**seen['goal'], 'topic': 'tool'}
    (tmp_path / 'contract.yaml').write_text(yaml.safe_dump(contract))
    states, wrist = (node.create_publisher(JointState, topic, 10) for topic in ('joint_states', 'wrist_states'))
    goals, tools = (node.create_publisher(PointStamped, topic, 10) for topic in ('goal', 'tool_point'))
    images = node.create_publisher(Image, 'camera/image/compressed', 10)

    def stamped(message, late_s: int = 0):
        message.header.stamp = node.get_clock().now().to_msg()
        message.header.stamp.sec -= late_s
        return message

    def fast():
        degrees = np.degrees(np.linspace(-1.0, 1.0, 6))
        states.publish(stamped(JointState(name=list(JOINTS)[::-1], position=degrees)))
        wrist.publish(stamped(JointState(name=['wrist_rol', 'gripper'], position=[0.0, 0.0])))

    def slow():
        goals.publish(stamped(PointStamped(), late_s=120))
        tools.publish(stamped(PointStamped()))
        images.publish(stamped(Image(height=96, width=96, encoding='rgb8', step=288, data=bytes(96 * 288))))

    timers = [node.create_timer(0.02, fast), node.create_timer(0.1, slow)]
    found = check(tmp_path, tmp_path / 'contract.yaml')
    for timer in timers:
        node.destroy_timer(timer)
    assert {code for level, code in found if level == 'FAIL'} >= {'E201', 'E203', 'E204', 'E211', 'E503', 'E506'}
    degrees = found['FAIL', 'E503']
    assert 'shoulder_pan 57.3 … 57.3' in degrees and 'degrees?' in degrees and 'publish radians (REP 103)' in degrees
    assert 'names (in another order: matched by name)' in found['PASS', '']
    assert 'joint_positions (/joint_states): 100 Hz | ' in found['FAIL', 'E211']
    assert 'observations.joint_positions.rate: ' in found['FAIL', 'E211']
    assert 'wrist (/wrist_states): joints wrist_roll | wrist_rol, gripper' in found['FAIL', 'E203']
    assert 'wrist_rol for wrist_roll' in found['FAIL', 'E203']
    assert 'stamps 120 s before their arrival' in found['FAIL', 'E204'] and 'chrony' in found['FAIL', 'E204']
    assert 'observations.front.type: sensor_msgs/msg/Image' in found['FAIL', 'E201']
    assert 'tool (/tool)' in found['FAIL', 'E201'] and 'observations.tool.topic: /tool_point' in found['FAIL', 'E201']
    assert 'nobody listens' in found['FAIL', 'E506']


def test_nobody_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', '101')  # of the children: this process has joined its own
    found = check(tmp_path)
    assert wrong(found) == {'E201'} and 'network: nodes that publish something | nobody but this node' in found['FAIL', 'E201']
    assert 'ROS_DOMAIN_ID' in found['FAIL', 'E201']


def test_a_type_that_is_not_read_is_one_line(tmp_path):
    contract = yaml.safe_load(CONTRACT.read_text())
    contract['observations']['goal']['type'] = 'my_msgs/msg/State'
    (tmp_path / 'contract.yaml').write_text(yaml.safe_dump(contract))
    result = subprocess.run([sys.executable, '-m', 'il_policies.cli', 'check', str(tmp_path / 'contract.yaml'), '--live'],
                            capture_output=True, text=True, timeout=90)
    assert result.returncode == 2 and result.stderr.count('\n') == 1
    assert "type 'my_msgs/msg/State' is not supported; valid: " in result.stderr
