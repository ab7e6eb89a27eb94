"""The launch files, run by launch_ros where it is installed: what they start, how they refuse, and that nothing stays behind."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from il_msgs.msg import ControllerStatus
from il_msgs.srv import StartEpisode, StopEpisode
from rcl_interfaces.srv import GetParameters
from rclpy.parameter import parameter_value_to_python

from il_policies.sim.reach_around import Scene
from il_runtime.ros import STATUS_QOS
from support import ROOT, call, patient_contract, wait_for
from test_closed_loop import save_fidgeting_policy

pytest.importorskip('launch_ros', reason='launch_ros is not installed (PyPI has none): launch files are only read here, by '
                    'test/unit/test_launch.py')

FILES = sorted((ROOT / 'launch').glob('*.py'))
RUN = '''
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
arguments = [argument.split(':=', 1) for argument in sys.argv[2:]]
service = LaunchService(argv=sys.argv[2:])
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(sys.argv[1], launch_arguments=arguments)]))
sys.exit(service.run())
'''
"""What `ros2 launch` does."""


class Launched:
    """Launch files as processes with all that they start."""

    def __init__(self, folder: Path):
        self.folder, self.running = folder, []

    def start(self, name: str, *arguments: str, environment: dict[str, str] = os.environ) -> subprocess.Popen:
        """Launch a file, in a process group of its own as a shell would, where Ctrl-C means something."""
        with open(self.folder / f'launch_{len(self.running)}.log', 'w') as log:
            self.running.append(subprocess.Popen(
                [sys.executable, '-c', RUN, str(ROOT / 'launch' / name), *arguments], stdout=log, stderr=log, cwd=self.folder,
                stdin=subprocess.DEVNULL, start_new_session=True, env={**environment, 'ROS_LOG_DIR': str(self.folder)}))
        return self.running[-1]

    def end(self, process: subprocess.Popen) -> int:
        """Ctrl-C, which all of them hear; the exit code of launch. Nothing may be left."""
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(40)
        assert self.left(process) == ''
        return code

    def left(self, process: subprocess.Popen) -> str:
        """What a launch file that has ended has left running."""
        return subprocess.run(['pgrep', '-a', '-g', str(process.pid)], capture_output=True, text=True).stdout

    def pid(self, process: subprocess.Popen, executable: str) -> int | None:
        """Of a node that it has started, or None."""
        found = subprocess.run(['pgrep', '-f', '-g', str(process.pid), f'lib/il_runtime/{executable}'], capture_output=True,
                               text=True)
        return int(found.stdout.split()[0]) if found.stdout else None

    def log(self, process: subprocess.Popen) -> str:
        """What it and its nodes printed."""
        return (self.folder / f'launch_{self.running.index(process)}.log').read_text()


@pytest.fixture
def launched(tmp_path):
    """Launch files that do not outlive the test."""
    launched = Launched(tmp_path)
    yield launched
    for process in launched.running:
        if launched.left(process):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        print(launched.log(process))


def statuses(node, namespace: str = '', name: str = 'controller') -> list[ControllerStatus]:
    """What a controller says from now on."""
    found: list[ControllerStatus] = []
    node.create_subscription(ControllerStatus, f'{namespace}/{name}/status', found.append, STATUS_QOS)
    return found


def armed(node, found: list[ControllerStatus], namespace: str = '') -> None:
    """Arm a controller, as soon as it can be."""
    from il_msgs.srv import Arm
    wait_for(lambda: found, 60.0, 'controller status')
    wait_for(lambda: call(node, Arm, f'{namespace}/controller/arm', timeout=60.0).success, 60.0, 'arming')


def values(node, name: str, *parameters: str) -> list:
    """Of a node's parameters."""
    answer = call(node, GetParameters, f'{name}/get_parameters', GetParameters.Request(names=list(parameters)))
    return [parameter_value_to_python(value) for value in answer.values]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_arguments_read_like_a_manual(path):
    from launch.launch_description_sources import get_launch_description_from_python_launch_file
    arguments = get_launch_description_from_python_launch_file(str(path)).get_launch_arguments()
    assert len(arguments) >= 6
    for argument in arguments:
        assert argument.description.endswith('.') or 'Valid choices are' in argument.description, argument.name
        if argument.default_value is None:
            assert '; required.' in argument.description
        else:  # prints as it is, not as what it will be computed from
            assert [part.describe() for part in argument.default_value] in ([], [f"'{argument.default_value[0].text}'"])


@pytest.mark.parametrize('name, arguments, said', [
    ('sim.launch.py', ['robot:=so10'], "robot is 'so10', valid: aloha, franka, so101, ur5e"),
    ('robot.launch.py', [], "robot is '', valid: "),
    ('record.launch.py', ['contract:=nix.yaml'], "contract is 'nix.yaml': there is no such file"),
    ('sim.launch.py', ['params_file:=nix.yaml'], "params_file is 'nix.yaml': there is no such file"),
    ('sim.launch.py', ['speed_scale:=fast'], "speed_scale is 'fast', must be a number"),
    ('sim.launch.py', ['stride:=1.5'], "stride is '1.5', must be an integer"),
    ('sim.launch.py', ['teleop:=joystick'], "Valid options are: ['none', 'gamepad', 'leader']"),
    ('deploy.launch.py', ['robot:=so101'], "missing required argument 'checkpoint'"),
    ('robot.launch.py', ['robot:=so101', 'drivers:=nix.launch.py'], "No such file or directory: 'nix.launch.py'"),
    ('deploy.launch.py', ['robot:=so101', 'checkpoint:=nix'], 'nix: no readable checkpoint'),
    ('sim.launch.py', ['speed_scale:=250'], 'speed_scale out of range'),
    ('sim.launch.py', ['robot:=ur5e'], 'ur5e_cell'),
])
def test_what_cannot_work_is_said_and_ends_everything(launched, name, arguments, said):
    process = launched.start(name, *arguments)
    assert process.wait(60) == 1
    assert said in launched.log(process) and launched.left(process) == ''


@pytest.mark.parametrize('said, meant', [({}, 'LOCALHOST'), ({'ROS_AUTOMATIC_DISCOVERY_RANGE': 'OFF'}, 'OFF')])
def test_nodes_are_found_on_this_machine_only_unless_the_environment_says_otherwise(launched, said, meant):
    environment = {name: value for name, value in os.environ.items() if name != 'ROS_AUTOMATIC_DISCOVERY_RANGE'} | said
    process = launched.start('sim.launch.py', 'camera:=false', environment=environment)
    for executable in ('simulator_node', 'controller_node'):
        pid = wait_for(lambda executable=executable: launched.pid(process, executable), what=executable)
        assert f'ROS_AUTOMATIC_DISCOVERY_RANGE={meant}' in Path(f'/proc/{pid}/environ').read_text().split('\0')
    assert launched.end(process) == 0


def test_two_arms_in_two_namespaces_run_at_50_hz(launched, node, tmp_path):
    contract = patient_contract(tmp_path)
    arms = {namespace: launched.start('sim.launch.py', f'namespace:={namespace}', f'contract:={contract}', 'camera:=false')
            for namespace in ('left', 'right')}
    found = {namespace: statuses(node, f'/{namespace}') for namespace in arms}
    for namespace, said in found.items():
        armed(node, said, f'/{namespace}')
    since = {namespace: said[-1] for namespace, said in found.items()}
    time.sleep(8)
    for namespace, process in arms.items():
        first, last = since[namespace], found[namespace][-1]
        seconds = last.header.stamp.sec - first.header.stamp.sec + (last.header.stamp.nanosec - first.header.stamp.nanosec) * 1e-9
        assert (last.ticks + last.missed_ticks - first.ticks - first.missed_ticks) / seconds == pytest.approx(50, abs=0.5)
        assert last.missed_ticks - first.missed_ticks < 0.1 * 50 * seconds
        assert launched.end(process) == 0
        assert 'process has died' not in launched.log(process)


def test_a_policy_is_deployed_on_a_robot_with_drivers_and_parameters_of_the_users_own(launched, node, tmp_path):
    """Its driver: the simulator, started by a launch file that knows nothing of ours but its arguments."""
    contract = patient_contract(tmp_path)
    (tmp_path / 'drivers.launch.py').write_text('''
from launch import LaunchDescription
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

def generate_launch_description():
    return LaunchDescription([Node(package='il_runtime', executable='simulator_node', name=LaunchConfiguration('driver'),
                                   parameters=[{'contract': LaunchConfiguration('contract'), 'camera': False}])])
''')
    (tmp_path / 'more.yaml').write_text('/**/controller: {ros__parameters: {m: 2.0, speed_scale: 70.0}}')
    process = launched.start(
        'deploy.launch.py', 'namespace:=left', f'contract:={contract}', 'drivers:=drivers.launch.py', 'params_file:=more.yaml',
        f'checkpoint:={save_fidgeting_policy(tmp_path / "policy", Scene())}', 'stride:=4',
        'plan_when:=horizon', 'rtc:=identity', 'ensembling:=latest', 'backend:=torch', 'mcap:=scene.mcap', 'driver:=mine')
    said = statuses(node, '/left')
    armed(node, said, '/left')
    wait_for(lambda: said[-1].mode == ControllerStatus.POLICY, 60.0, 'policy')
    assert said[-1].ensembling == 'latest' and said[-1].speed_scale == 20.0  # what an argument says wins
    assert values(node, '/left/controller', 'm', 'shadow') == [2.0, False]
    assert values(node, '/left/policy', 'stride', 'plan_when', 'rtc', 'backend') == [4, 'horizon', 'identity', 'torch']
    expected = {(name, '/left') for name in ('controller', 'policy', 'flight_recorder', 'visualizer', 'mine')}
    wait_for(lambda: expected <= set(node.get_node_names_and_namespaces()), what='all nodes')
    assert launched.end(process) == 0
    assert 'process has died' not in launched.log(process)
    assert (tmp_path / 'flight' / 'left').is_dir() and (tmp_path / 'scene.mcap').stat().st_size > 1000


def test_a_shadow_commands_nothing_beside_the_controller_that_moves_the_arm(launched, node, tmp_path):
    contract = patient_contract(tmp_path)
    robot = launched.start('sim.launch.py', f'contract:={contract}', 'camera:=false')
    shadow = launched.start('deploy.launch.py', f'contract:={contract}', 'shadow:=true',
                            f'checkpoint:={save_fidgeting_policy(tmp_path / "policy", Scene())}')
    said = statuses(node, name='shadow')
    armed(node, statuses(node))
    wait_for(lambda: said and said[-1].mode == ControllerStatus.POLICY, 90.0, 'the shadow follows')

    def ends(of, topic):
        return [info.node_name for info in of(topic)]

    publishers, listeners = node.get_publishers_info_by_topic, node.get_subscriptions_info_by_topic
    wait_for(lambda: ends(publishers, 'shadow/chunks') == ['policy'] and ends(listeners, 'shadow/command') == ['visualizer'],
             what='planner and overlay of the shadow')
    assert ends(publishers, 'shadow/command') == ['shadow'] and not ends(publishers, 'chunks')
    assert ends(publishers, 'forward_position_controller/commands') == ends(publishers, 'command') == ['controller']
    assert launched.end(shadow) == 0 and launched.end(robot) == 0
    assert not (tmp_path / 'flight').exists()


def test_demonstrations_are_recorded_beside_a_robot(launched, node, tmp_path):
    contract = patient_contract(tmp_path)
    robot = launched.start('sim.launch.py', f'contract:={contract}')
    process = launched.start('record.launch.py', f'contract:={contract}', 'bags:=mine', 'task:=pick the cube')
    wait_for(lambda: call(node, StartEpisode, '/recorder/start_episode', timeout=60.0).success, 90.0, 'an episode')
    time.sleep(2)
    answer = call(node, StopEpisode, '/recorder/stop_episode', StopEpisode.Request(task_succeeded=True))
    assert answer.success and Path(answer.path) == tmp_path / 'mine' / 'episode_000000'
    assert 'pick the cube' in (tmp_path / 'mine' / 'episode_000000' / 'metadata.yaml').read_text()
    assert launched.end(process) == 0 and launched.end(robot) == 0


def test_a_recorder_that_ends_leaves_the_arm_alone_and_a_controller_that_ends_does_not(launched, node, tmp_path):
    contract = patient_contract(tmp_path)
    process = launched.start('sim.launch.py', f'contract:={contract}', 'camera:=false', 'bags:=bags')
    said = statuses(node)
    armed(node, said)
    wait_for(lambda: any(name == 'recorder' for name in node.get_node_names()), 60.0, 'recorder')
    os.kill(launched.pid(process, 'recorder_node'), signal.SIGKILL)
    wait_for(lambda: 'recorder_node' not in launched.left(process), what='end of the recorder')
    before = said[-1].ticks
    wait_for(lambda: said[-1].ticks > before + 100, what='the loop goes on')
    assert said[-1].mode == ControllerStatus.HOLD
    os.kill(launched.pid(process, 'controller_node'), signal.SIGKILL)
    assert process.wait(40) == 1 and launched.left(process) == ''
