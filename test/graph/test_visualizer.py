from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from mcap.reader import make_reader
from rosbags.typesys import Stores, get_typestore

from il_policies.sim.reach_around import JOINTS, tips
from support import CONTRACT, ROOT, FollowingArm, call, patient_contract, wait_for

ADD, DELETE = 0, 2


class Pictures:
    """What the visualizer publishes, heard as RViz would."""

    def __init__(self, node):
        from std_msgs.msg import String
        from visualization_msgs.msg import MarkerArray

        from il_runtime.ros import STATUS_QOS
        self.arrays, self.times, self.descriptions = [], [], []
        node.create_subscription(MarkerArray, 'visualization', self._on_array, 5)
        node.create_subscription(String, 'robot_description', self.descriptions.append, STATUS_QOS)

    def _on_array(self, message):
        self.times.append(time.monotonic())
        self.arrays.append(message)

    def newest(self) -> dict[str, list]:
        """Namespace → markers of the newest picture."""
        shown = defaultdict(list)
        for marker in self.arrays[-1].markers if self.arrays else []:
            if marker.action == ADD:
                shown[marker.ns].append(marker)
        return shown

    @property
    def text(self) -> str:
        return self.newest()['text'][0].text if self.arrays else ''


def points(marker) -> np.ndarray:
    return np.array([(p.x, p.y, p.z) for p in marker.points])


def seconds_of_cpu(process: subprocess.Popen) -> float:
    """Used by a process so far [s]."""
    fields = open(f'/proc/{process.pid}/stat').read().rsplit(')', 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def sway(arm: FollowingArm, epoch: int, until, every: float = 0.25, horizon: int = 100, period: float = 0.024) -> np.ndarray:
    """Chunks that swing the first joint, one `every` [s], until that is true; the positions of the last one."""
    began, sequence = time.monotonic(), 0
    while not until():
        t = time.monotonic() - began
        values = 0.5 * np.sin(t + period * np.arange(horizon))
        before = arm.position
        arm.send(epoch, values, sequence, period=period)
        sequence += 1
        time.sleep(every)
    positions = np.tile(before, (horizon, 1))
    positions[:, 0] = values
    return positions


@pytest.mark.long
def test_eight_chunks_of_a_hundred_steps_ten_times_a_second_take_a_fifth_of_a_core(nodes, node, tmp_path):
    contract = patient_contract(tmp_path)
    arm, pictures, scene = FollowingArm(node, contract), Pictures(node), tmp_path / 'scene.mcap'
    nodes.start('controller_node', contract=contract)
    process = nodes.start('visualizer_node', contract=contract, mcap=scene, publish_description=True)
    wait_for(lambda: 'INACTIVE' in pictures.text, what='a picture of the controller at rest')
    epoch = arm.arm()
    swung = time.monotonic() + 3.0
    sway(arm, epoch, lambda: time.monotonic() > swung)
    since, before, began = len(pictures.times), seconds_of_cpu(process), time.monotonic()
    last = sway(arm, epoch, lambda: time.monotonic() > began + 6.0)
    share = (seconds_of_cpu(process) - before) / (time.monotonic() - began)
    shown = pictures.newest()
    rate = np.median(1.0 / np.diff(pictures.times[since:]))
    print(f'{100 * share:.1f} % of a core, {rate:.1f} Hz')
    assert len(shown['chunks']) == 8 and all(len(m.points) == 100 for m in shown['chunks'])
    assert share <= 0.20
    assert rate == pytest.approx(10.0, rel=0.1) and len(pictures.times) - since >= 50

    # Where the tip will be, by the simulator's kinematics.
    assert list(arm.names) == list(JOINTS)
    newest = max(shown['chunks'], key=lambda marker: marker.id)
    np.testing.assert_allclose(points(newest), tips(last), atol=1e-5)
    assert newest.color.a == max(m.color.a for m in shown['chunks']) > 0.6
    assert {m.header.frame_id for m in pictures.arrays[-1].markers} == {'base_link'}
    assert all(len({(m.ns, m.id) for m in array.markers}) == len(array.markers) for array in pictures.arrays)
    for name in ('goal', 'arm', 'commanded', 'ensembled'):
        assert shown[name], name
    # All chunks lie on one wave, and so does what becomes of them.
    ahead = points(shown['ensembled'][0])
    assert max(np.linalg.norm(points(newest) - point, axis=1).min() for point in ahead[len(ahead) // 2:]) < 5e-3
    for words in ('POLICY: following chunks', 'newest_first of ', 'disagreement 0.0', 'observation to chunk ', 'loop late by '):
        assert words in shown['text'][0].text
    assert '<robot' in pictures.descriptions[0].data

    gone = Counter((m.ns, m.action) for array in pictures.arrays for m in array.markers)['chunks', DELETE]
    assert gone >= 15, 'chunks that have ended are removed'
    assert nodes.stop('visualizer_node') == 0
    types = get_typestore(Stores.ROS2_KILTED)
    with open(scene, 'rb') as file:
        reader = make_reader(file)
        assert reader.get_header().profile == 'ros2'
        topics = Counter(channel.topic for _, channel, _ in reader.iter_messages())
        written = [types.deserialize_cdr(message.data, schema.name)
                   for schema, channel, message in reader.iter_messages(topics=['/visualization'])]
    assert topics['/controller/status'] > 50
    kept = {point.x for array in pictures.arrays for m in array.markers if m.ns == 'ensembled' for point in m.points}
    assert len(written) >= len(pictures.arrays) and len(kept) > 100
    assert kept <= {point.x for array in written for m in array.markers if m.ns == 'ensembled' for point in m.points}


def test_it_follows_how_the_controller_blends_while_that_changes(nodes, node, tmp_path):
    from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
    from rcl_interfaces.srv import SetParameters
    contract = patient_contract(tmp_path)
    arm, pictures = FollowingArm(node, contract), Pictures(node)
    nodes.start('controller_node', contract=contract, max_disagreement=100.0)
    nodes.start('visualizer_node', contract=contract)
    wait_for(lambda: 'INACTIVE' in pictures.text, what='a picture')
    epoch = arm.arm()
    hold = np.zeros(80)
    for i, offset in enumerate((0.0, 0.1)):  # two chunks of 8 s that never agree
        arm.send(epoch, hold + offset, sequence=i, offset=-0.2 * (1 - i))

    def shown() -> float:
        """The pan angle at which the path ahead ends but for the chunks' ends, which fade."""
        path = pictures.newest()['ensembled']
        if not path:
            return np.nan
        x, y, _ = points(path[0])[len(path[0].points) // 2]
        return float(np.arctan2(y, x - 0.0388))

    def expected(weight: float) -> float:
        """With the newer chunk's weight."""
        x, y, _ = tips(np.eye(1, 6) * 0.1 * weight)[0]
        return float(np.arctan2(y, x - 0.0388))

    def set_parameter(name: str, **value) -> None:
        kind = ParameterType.PARAMETER_STRING if 'string_value' in value else ParameterType.PARAMETER_DOUBLE
        request = SetParameters.Request(parameters=[Parameter(name=name, value=ParameterValue(type=kind, **value))])
        assert call(node, SetParameters, 'controller/set_parameters', request).results[0].successful

    older = np.exp(-0.5 * 2)  # 0.2 s are two steps
    wait_for(lambda: abs(shown() - expected(1 / (1 + older))) < 2e-3, what='weights of m = 0.5')
    set_parameter('m', double_value=0.0)
    wait_for(lambda: abs(shown() - expected(0.5)) < 1e-3, 3.0, 'equal weights')
    set_parameter('ensembling', string_value='latest')
    wait_for(lambda: abs(shown() - expected(1.0)) < 1e-3, 3.0, 'the newest alone')
    assert 'latest of 2' in pictures.text


def refusal(*parameters: str) -> str:
    """The line with which the node refuses to start."""
    arguments = [part for parameter in parameters for part in ('-p', parameter)]
    ended = subprocess.run([sys.executable, '-m', 'il_runtime.visualizer_node', '--ros-args', *arguments], timeout=60,
                           capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    return ended.stderr.strip().splitlines()[-1]


def test_what_cannot_be_shown_or_written_is_refused_in_a_line(tmp_path):
    so101 = f'contract:={CONTRACT}'
    (tmp_path / 'scene.mcap').write_text('of yesterday')
    assert 'exists already' in refusal(so101, f'mcap:={tmp_path}/scene.mcap')
    assert (tmp_path / 'scene.mcap').read_text() == 'of yesterday'
    assert 'cannot be written' in refusal(so101, f'mcap:={tmp_path}/nowhere/scene.mcap')
    assert 'rate' in refusal(so101, 'rate:=0.0')
    assert 'no such file' in refusal('contract:=nowhere.yaml')
    assert 'not found' in refusal(f'contract:={ROOT}/config/robots/ur5e.yaml')
    other = tmp_path / 'other.yaml'
    other.write_text(CONTRACT.read_text().replace('gripper_frame_link', 'nose'))
    assert "end_effector is 'nose'; links of" in refusal(f'contract:={other}')


def test_a_foreign_chunk_is_named_and_does_no_harm(nodes, node, tmp_path):
    contract = patient_contract(tmp_path)
    arm, pictures = FollowingArm(node, contract), Pictures(node)
    nodes.start('visualizer_node', contract=contract, frame='left/base_link')
    wait_for(lambda: pictures.text == 'no controller', what='a picture')
    arm.send(1, [0.0, 0.1], names=[*arm.names[:5], 'tail'], joint='tail')
    arm.send(1, [0.0, np.nan], sequence=1)
    arm.send(1, [0.0, 0.1], sequence=2, offset=-5.0)
    wait_for(lambda: "chunk ignored: joint_names: missing ['gripper']" in nodes.log('visualizer_node'), what='a remark')
    assert not pictures.newest()['chunks']
    arm.send(1, np.linspace(0.0, 0.1, 20), sequence=3)
    wait_for(lambda: pictures.newest()['chunks'], what='the good one, which nobody follows')
    assert pictures.newest()['goal'][0].header.frame_id == 'left/base_link'
