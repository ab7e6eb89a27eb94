"""Real nodes as real processes over real DDS, on this machine only and on a domain of their own."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Before rclpy is imported: a robot on the same network must not hear the tests.
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
os.environ.setdefault('ROS_DOMAIN_ID', str(10 + os.getpid() % 90))


def pytest_collection_modifyitems(items):
    """A test that fails is run once more, and both runs are reported: processes on a shared machine lose seconds now and then."""
    for item in items:
        if item.path.parent.name in ('graph', 'soak'):
            item.add_marker(pytest.mark.flaky(reruns=1, reruns_delay=2))


class Nodes:
    """Starts nodes of il_runtime and ends them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, namespace: str = '', **parameters) -> subprocess.Popen:
        """Start il_runtime's node `name`; parameters as -p key:=value. In a namespace it is known as namespace/name."""
        arguments = [part for key, value in parameters.items() for part in ('-p', f'{key}:={value}')]
        if namespace:
            arguments += ['-r', f'__ns:=/{namespace}']
            return self.run(f'{namespace}/{name}', '-m', f'il_runtime.{name}', '--ros-args', *arguments)
        return self.run(name, '-m', f'il_runtime.{name}', '--ros-args', *arguments)

    def run(self, name: str, *arguments) -> subprocess.Popen:
        """Start Python with arguments, known as `name`."""
        with open(self.folder / f'{name.replace("/", "_")}.log', 'a') as log:
            self.processes[name] = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=log, stderr=log)
        return self.processes[name]

    def log(self, name: str) -> str:
        """What the node printed."""
        return (self.folder / f'{name}.log').read_text()

    def stop(self, name: str, number: int = signal.SIGINT, timeout: float = 10.0) -> int:
        """Signal the node and wait; its exit status."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(timeout)


@pytest.fixture
def nodes(tmp_path):
    """Nodes that do not outlive the test."""
    nodes = Nodes(tmp_path)
    yield nodes
    # Not killed: a dead controller stays in the graph for a while, and the next test's would not arm beside it.
    for process in nodes.processes.values():
        process.send_signal(signal.SIGCONT)
        process.terminate()
    for process in nodes.processes.values():
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for log in sorted(tmp_path.glob('*.log')):
        print(f'--- {log.name}\n{log.read_text()}')


@pytest.fixture(scope='session')
def ros():
    """rclpy, initialised for the session."""
    import rclpy
    rclpy.init()
    yield rclpy
    rclpy.try_shutdown()


@pytest.fixture
def node(ros):
    """A node of the test's own, spun in the background."""
    node = ros.create_node('test')
    executor = ros.executors.SingleThreadedExecutor()
    executor.add_node(node)
    ended = threading.Event()

    def spin():
        while not ended.is_set():
            executor.spin_once(timeout_sec=0.05)

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    yield node
    ended.set()
    thread.join(timeout=5)
    executor.shutdown()
    node.destroy_node()
