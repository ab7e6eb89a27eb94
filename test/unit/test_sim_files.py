"""What cannot run on a bare machine: the files of Gazebo and Docker, and docs/status.md, which says so.

Every file that one of them names exists, and all of them say what the contract and the task in MuJoCo say.

Where the tools are installed (`gz` or `ign`, `check_urdf`), they are asked too.
"""
from __future__ import annotations

import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import mujoco
import numpy as np
import pytest
import yaml

from il_policies.contract import load_contract
from il_policies.description import resolve
from il_policies.sim import reach_around
from il_policies.sim.reach_around import CAMERA, DESCRIPTION, Scene, build_model, inverse_kinematics

ROOT = Path(__file__).parents[2]
SIM, LAUNCH, DOCKER = ROOT / 'config' / 'sim', ROOT / 'launch', ROOT / 'docker'
CONTRACT = load_contract(ROOT / 'config' / 'robots' / 'so101.yaml')
CONTROLLERS = yaml.safe_load((SIM / 'controllers.yaml').read_text())['/**']
MANAGER = CONTROLLERS['controller_manager']['ros__parameters']
WORLD = ElementTree.parse(SIM / 'reach_around.sdf').getroot().find('world')
HARDWARE = {'mock': 'mock_components/GenericSystem', 'real': 'feetech_ros2_driver/FeetechHardwareInterface',
            'gazebo': 'gz_ros2_control/GazeboSimSystem', 'mujoco': 'mujoco_ros2_control/MujocoSystemInterface'}


def numbers(element, path: str) -> list[float]:
    """The numbers in the text of a part of an XML element."""
    return [float(word) for word in element.find(path).text.split()]


# --- the arm ----------------------------------------------------------------------------------------------------------
def expanded(hardware: str, **arguments: str) -> ElementTree.Element:
    """The URDF that so101.urdf.xacro makes."""
    xacro = pytest.importorskip('xacro')
    mappings = {'hardware': hardware, 'description': str(resolve(DESCRIPTION)), **arguments}
    return ElementTree.fromstring(xacro.process_file(str(SIM / 'so101.urdf.xacro'), mappings=mappings).toxml())


@pytest.mark.parametrize('hardware', HARDWARE)
def test_the_arm_is_the_description_with_the_joints_of_the_contract(hardware):
    arm, description = expanded(hardware), ElementTree.parse(resolve(DESCRIPTION)).getroot()
    links = {link.get('name') for link in description.iter('link')}
    assert {link.get('name') for link in arm.findall('link')} == links | {'world', 'camera_link', 'camera_optical_frame'}
    assert arm.find('ros2_control/hardware/plugin').text == HARDWARE[hardware]
    joints = arm.findall('ros2_control/joint')
    assert tuple(joint.get('name') for joint in joints) == CONTRACT.action.joints
    assert [joint.find("param[@name='id']").text for joint in joints] == list('123456')
    for joint in joints:
        assert [part.get('name') for part in joint.findall('command_interface')] == ['position']
        assert [part.get('name') for part in joint.findall('state_interface')] == ['position', 'velocity']
    start = [float(joint.find('state_interface/param').text) for joint in joints]
    tip = [[*Scene().start, reach_around.TIP_HEIGHT]]
    assert np.abs(np.array(start) - inverse_kinematics(np.array(tip))[0]).max() < 1e-3
    sensors = [sensor.get('type') for sensor in arm.iter('sensor')]
    assert sensors == (['camera'] if hardware == 'gazebo' else [])


def test_each_hardware_gets_its_own_parameters():
    def parameters(arm):
        return {part.get('name'): part.text for part in arm.findall('ros2_control/hardware/param')}

    assert parameters(expanded('mock')) == parameters(expanded('gazebo')) == {}
    assert parameters(expanded('real', usb_port='/dev/ttyUSB3')) == {'usb_port': '/dev/ttyUSB3'}
    assert parameters(expanded('real', joint_config_file='/my.yaml'))['joint_config_file'] == '/my.yaml'
    assert parameters(expanded('mujoco', mujoco_model='/scene.xml')) == {'mujoco_model': '/scene.xml', 'headless': 'true'}
    with pytest.raises(Exception, match='valid: mock, real, gazebo, mujoco'):
        expanded('gazeboo')


def test_gazebo_runs_the_controllers_in_the_namespace_with_the_lag_of_the_servos_in_mujoco():
    plugin = expanded('gazebo', namespace='left', controllers='/controllers.yaml').find('gazebo/plugin')
    assert plugin.get('name') == 'gz_ros2_control::GazeboSimROS2ControlPlugin'
    assert plugin.find('parameters').text == '/controllers.yaml' and plugin.find('ros/namespace').text == '/left'
    assert expanded('gazebo').find('gazebo/plugin/ros/namespace').text == '/'
    gain = float(plugin.find('position_proportional_gain').text)
    servo = reach_around.SERVO['damping'] / reach_around.SERVO['kp']
    assert 1.0 / (gain * MANAGER['update_rate']) == pytest.approx(servo, rel=0.05)


def test_the_camera_sees_what_it_sees_in_mujoco():
    arm, model = expanded('gazebo'), build_model()
    sensor, joints = arm.find(".//sensor[@name='camera']"), {joint.get('name'): joint for joint in arm.findall('joint')}
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_camlight(model, data)
    place, axes = data.camera(CAMERA).xpos, data.camera(CAMERA).xmat.reshape(3, 3)

    def origin(name):
        """Position and rotation of a joint's child in its parent."""
        part = joints[name].find('origin')
        roll, pitch, yaw = (float(angle) for angle in part.get('rpy').split())
        quaternion, matrix = np.zeros(4), np.zeros(9)
        mujoco.mju_euler2Quat(quaternion, [roll, pitch, yaw], 'XYZ')
        mujoco.mju_quat2Mat(matrix, quaternion)
        return np.array([float(x) for x in part.get('xyz').split()]), matrix.reshape(3, 3)

    assert joints['camera_joint'].find('parent').get('link') == 'base_link'
    assert 'origin' not in {part.tag for part in joints['world_to_base']}  # the world is the arm's base, as in MuJoCo
    position, link = origin('camera_joint')
    shift, optical = origin('camera_optical_joint')
    assert np.abs(position - place).max() < 1e-6 and not shift.any()
    # MuJoCo's cameras look along -z with y up, optical frames along z with y down (REP 103).
    assert np.abs(link @ optical - axes * [1, -1, -1]).max() < 1e-5

    height, width = CONTRACT.observations[CAMERA].image_size
    assert (float(sensor.find('camera/image/width').text), float(sensor.find('camera/image/height').text)) == (width, height)
    across = math.tan(math.radians(model.camera(CAMERA).fovy[0]) / 2) * width / height
    assert float(sensor.find('camera/horizontal_fov').text) == pytest.approx(2 * math.atan(across))
    assert float(sensor.find('update_rate').text) == CONTRACT.observations[CAMERA].rate
    # image_transport adds /compressed to the topic of the image
    assert sensor.find('topic').text + '/compressed' == CONTRACT.observations[CAMERA].topic
    assert sensor.find('gz_frame_id').text == 'camera_optical_frame'
    wide = expanded('gazebo', image_width='192').find(".//sensor/camera/horizontal_fov").text
    assert float(wide) == pytest.approx(2 * math.atan(2 * across))


# --- the world --------------------------------------------------------------------------------------------------------
def test_the_world_is_the_task():
    pillar = WORLD.find("model[@name='pillar']")
    x, y, z, *turned = numbers(pillar, 'pose')
    assert (x, y) == reach_around.PILLAR and z == reach_around.PILLAR_HEIGHT / 2 and not any(turned)
    for shape in pillar.iter('cylinder'):
        assert numbers(shape, 'radius') == [reach_around.PILLAR_RADIUS]
        assert numbers(shape, 'length') == [reach_around.PILLAR_HEIGHT]
    table = WORLD.find("model[@name='table']")
    assert table.find('pose') is None and numbers(table, './/collision//normal') == [0, 0, 1]
    goal = ElementTree.parse(SIM / 'goal.sdf').getroot().find('model')
    assert numbers(goal, './/radius') == [reach_around.REACH_TOLERANCE] and goal.find('.//collision') is None
    for model, geom in ((pillar, 'pillar'), (table, 'table')):
        assert np.allclose(numbers(model, './/diffuse'), build_model().geom(geom).rgba)
    for static in (pillar, table, goal):
        assert static.find('static').text == 'true'


def test_the_world_has_the_systems_it_needs_and_a_clock_of_200_hz():
    systems = {plugin.get('filename'): plugin.get('name').split('::')[-1] for plugin in WORLD.findall('plugin')}
    assert systems == {'gz-sim-physics-system': 'Physics', 'gz-sim-user-commands-system': 'UserCommands',
                       'gz-sim-scene-broadcaster-system': 'SceneBroadcaster', 'gz-sim-sensors-system': 'Sensors'}
    assert 1.0 / numbers(WORLD, 'physics/max_step_size')[0] == MANAGER['update_rate'] == 200
    assert WORLD.get('name') == 'reach_around'


# --- controllers and bridge -------------------------------------------------------------------------------------------
def test_controllers_command_the_contract():
    types = {name: value['type'] for name, value in MANAGER.items() if isinstance(value, dict)}
    assert types == {'joint_state_broadcaster': 'joint_state_broadcaster/JointStateBroadcaster',
                     'forward_position_controller': 'forward_command_controller/ForwardCommandController',
                     'joint_trajectory_controller': 'joint_trajectory_controller/JointTrajectoryController'}
    assert set(CONTROLLERS) == {'controller_manager', *types}
    values = {name: CONTROLLERS[name]['ros__parameters'] for name in types}
    for name in ('forward_position_controller', 'joint_trajectory_controller'):
        assert tuple(values[name]['joints']) == CONTRACT.action.joints
    assert values['forward_position_controller']['interface_name'] == 'position'
    assert values['joint_trajectory_controller']['interpolate_from_desired_state'] is True
    assert [output.topic for output in CONTRACT.action.outputs] == ['forward_position_controller/commands']
    rate = values['joint_state_broadcaster']['update_rate']
    assert rate == CONTRACT.observations[CONTRACT.joint_state].rate and MANAGER['update_rate'] % rate == 0


def test_the_bridge_brings_clock_and_camera_from_gazebo():
    bridge = {entry['ros_topic_name']: entry for entry in yaml.safe_load((SIM / 'bridge.yaml').read_text())}
    assert set(bridge) == {'/clock', 'camera/camera_info'}
    for topic, entry in bridge.items():
        assert set(entry) == {'ros_topic_name', 'gz_topic_name', 'ros_type_name', 'gz_type_name', 'direction'}
        assert entry['gz_topic_name'] == topic and entry['direction'] == 'GZ_TO_ROS'
        assert entry['ros_type_name'].rsplit('/')[-1] == entry['gz_type_name'].rsplit('.')[-1]  # Clock, CameraInfo


# --- files that name files --------------------------------------------------------------------------------------------
def test_every_file_of_the_simulation_is_named_and_every_named_file_exists():
    robots = (ROOT / 'config' / 'robots').iterdir()  # whose descriptions are here
    text = '\n'.join(path.read_text() for path in (*SIM.iterdir(), *robots, LAUNCH / 'gazebo.launch.py'))
    named = set(re.findall(r"(?:SIM / ['\"]|filename=\"|config/sim/)([\w.]+\.(?:yaml|sdf|xacro|urdf))", text))
    named |= {f'{name}.xacro' for name in named if name.endswith('.urdf')}  # of which they are made
    there = {path.name for path in SIM.iterdir()}
    assert named == there


def test_gazebo_is_launched_with_our_controllers_and_topics():
    text = (LAUNCH / 'gazebo.launch.py').read_text()
    commanding = re.search(r"'controller', '(\w+)',.*?\[('[^\]]+)\]", text, re.DOTALL)
    spawned = {*re.findall(r"spawner\('(\w+)'\)", text), *re.findall(r"'(\w+)'", commanding[2])}
    assert spawned == {name for name, value in MANAGER.items() if isinstance(value, dict)}
    assert CONTRACT.action.outputs[0].topic == f'{commanding[1]}/commands'
    assert "'image_bridge', arguments=['camera/image']" in text
    goal = CONTRACT.observations['goal']
    assert f"'/{goal.topic}']" in text and f"'--rate', '{goal.rate:g}'" in text and f"'{goal.type}'" in text
    assert tuple(float(re.search(rf"'goal_{axis}', '([\d.]+)'", text)[1]) for axis in 'xy') == Scene().goal


# --- the tools of others ----------------------------------------------------------------------------------------------
GZ = next(([tool, 'sdf', '-k'] for tool in ('gz', 'ign') if shutil.which(tool)), None)


@pytest.mark.skipif(GZ is None, reason='neither gz nor ign is installed')
@pytest.mark.parametrize('name', ['reach_around.sdf', 'goal.sdf', 'arm'])
def test_gazebo_reads_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))  # misspelt elements are told in a log there only
    path = SIM / name
    if name == 'arm':
        path = tmp_path / 'arm.urdf'
        path.write_bytes(ElementTree.tostring(expanded('gazebo')))
    checked = subprocess.run([*GZ, str(path)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0 and 'Valid' in checked.stdout, checked.stderr
    log = '\n'.join(path.read_text() for path in tmp_path.rglob('*.log'))
    assert set(re.findall(r'Element\[(\w+)\].*not defined in SDF', log)) <= {'gz_frame_id'}  # an element of Gazebo's own


@pytest.mark.skipif(not shutil.which('check_urdf'), reason='check_urdf is not installed')
@pytest.mark.parametrize('hardware', HARDWARE)
def test_check_urdf_finds_no_fault(hardware, tmp_path):
    (tmp_path / 'arm.urdf').write_bytes(ElementTree.tostring(expanded(hardware)))
    checked = subprocess.run(['check_urdf', str(tmp_path / 'arm.urdf')], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0 and 'Error' not in checked.stdout + checked.stderr, checked.stderr


# --- Docker -----------------------------------------------------------------------------------------------------------
DOCKERFILE = (DOCKER / 'Dockerfile').read_text()
COMPOSE = yaml.safe_load((DOCKER / 'compose.yaml').read_text())


def test_images_copy_what_exists_and_end_as_a_user():
    stages = re.split(r'^FROM .* AS (\w+)$', DOCKERFILE, flags=re.MULTILINE)[1:]
    assert stages[::2] == ['runtime', 'train']
    ignored = (DOCKER / 'Dockerfile.dockerignore').read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith('!')}
    for stage in stages[1::2]:
        assert re.findall(r'^USER (\S+)$', stage, re.MULTILINE)[-1] == 'il'
        sources = [source for line in re.findall(r'^COPY (?:--\S+ )*(.*)$', stage, re.MULTILINE) for source in line.split()[:-1]]
        for source in sources:
            assert (ROOT / source).exists() and any(source == path or source.startswith(f'{path}/') for path in allowed), source
    assert all((ROOT / path).exists() for path in allowed)


def test_the_images_have_the_torch_of_setup_sh():
    wanted = re.search(r'^torch_version=(\S+)$', (ROOT / 'setup.sh').read_text(), re.MULTILINE)[1]
    assert re.findall(r'torch==(\S+)', DOCKERFILE) == [wanted]


def test_services_have_no_more_rights_than_they_need():
    assert set(COMPOSE['services']) == {'sim', 'gazebo', 'robot', 'record', 'deploy', 'train'}
    for name, service in COMPOSE['services'].items():
        assert not {'privileged', 'devices', 'pid', 'userns_mode'} & set(service), name
        assert service['cap_drop'] == ['ALL'] and service['security_opt'] == ['no-new-privileges:true']
        realtime = name in ('sim', 'gazebo', 'robot', 'deploy')
        assert service.get('cap_add', []) == (['SYS_NICE'] if realtime else [])
        assert service.get('ulimits', {}).get('rtprio') == (49 if realtime else None)  # the controller asks for 49 at most
        on_host = name in ('robot', 'record', 'deploy')
        assert (service.get('network_mode') == 'host') == (service.get('ipc') == 'host') == on_host
        build = service['build']
        assert (DOCKER / build['context'] / build['dockerfile']).is_file() and f'AS {build["target"]}\n' in DOCKERFILE
        assert {argument for argument in build['args'] if argument not in re.findall(r'^ARG (\w+)', DOCKERFILE, re.M)} == set()


def test_services_start_what_exists():
    for service in COMPOSE['services'].values():
        command = service.get('command', '')
        for launched, given in re.findall(r'ros2 launch il_runtime (\S+)(.*)', command):
            text = (LAUNCH / launched).read_text()
            for argument in re.findall(r'(\w+):=', given):
                assert re.search(rf"\b{argument}=|'{argument}'", text), f'{launched} has no argument {argument}'
    assert {'sim', 'gazebo', 'robot', 'record', 'deploy'} == {
        launched for service in COMPOSE['services'].values()
        for launched in re.findall(r'il_runtime (\w+).launch.py', service.get('command', ''))}


# --- docs/status.md ---------------------------------------------------------------------------------------------------
def test_the_status_of_everything_that_may_not_run_here_is_told():
    rows = dict(re.findall(r'^\| `([^`]+)` \| (run|checked|unrun)\b', (ROOT / 'docs' / 'status.md').read_text(), re.MULTILINE))
    contracts = sorted((ROOT / 'config' / 'robots').glob('*.yaml'))
    rviz = (ROOT / 'config' / 'rviz').iterdir()
    files = [*LAUNCH.glob('*.py'), *contracts, *SIM.iterdir(), *rviz, DOCKER / 'compose.yaml']
    stages = {f'docker/Dockerfile: {stage}' for stage in re.findall(r'^FROM .* AS (\w+)$', DOCKERFILE, re.MULTILINE)}
    sourced = {f'setup.sh: {distribution}' for distribution in ('no ROS', 'Jazzy', 'Kilted', 'Lyrical')}
    names = {str(path.relative_to(ROOT)) for path in files} | stages | sourced
    assert set(rows) == names
    for path in contracts:
        tried = load_contract(path).tried_on
        assert rows[str(path.relative_to(ROOT))] == ('checked' if tried == 'checked' else 'run'), path.name
