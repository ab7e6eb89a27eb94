"""The recorder killed again and again, disks that are full, and the control loop beside them."""
from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from il_policies.data.store import Dataset
from support import FollowingArm, patient_contract, wait_for
from test_recorder import CONTRACT, assert_tells_of_interruption, salvaged, small_disk, started
from test_recorder import robot as make_robot  # noqa: F401, a fixture

MINUTES = float(os.environ.get('IL_SOAK_MINUTES', 10))
KILLS = 50 if MINUTES >= 10 else 10
S = 10**9


def slow_contract(folder):
    """Ten joint states a second and as many goals, some 5 kB/s: no chunk is ever full."""
    contract = yaml.safe_load(CONTRACT.read_text())
    del contract['observations']['front']
    contract['observations']['joint_positions'] |= {'rate': 10.0, 'max_age': 0.3}
    path = folder / 'slow.yaml'
    path.write_text(yaml.safe_dump(contract))
    return path


@pytest.mark.timeout(KILLS * 30)
@pytest.mark.parametrize('slow', [False, True], ids=['full_rates', 'slow'])
def test_killed_at_any_moment(nodes, node, make_robot, tmp_path, slow):  # noqa: F811
    contract, random, lost = slow_contract(tmp_path) if slow else CONTRACT, np.random.default_rng(0), []
    robot = make_robot(contract)
    if slow:
        robot.every['/joint_states'] = 20
        robot.silent = set(robot.sent) - {'/joint_states', '/goal', '/command'}
    for i in range(KILLS // 2):
        # A dead node stays in the graph for a while: its successor has a name of its own.
        nodes.run('recorder_node', '-m', 'il_runtime.recorder_node', '--ros-args', '-r', f'__node:=recorder_{i}', '-p',
                  f'contract:={contract}', '-p', f'output:={tmp_path / "bags"}')
        started(node, f'killed_{i}', f'recorder_{i}')
        time.sleep(1.5 + random.uniform(0.0, 1.0))
        killed = time.time_ns()
        nodes.stop('recorder_node', signal.SIGKILL)
        stamps, about = salvaged(tmp_path / f'bags/killed_{i}.part')
        assert about['task'] == 'reach the goal'
        assert set(stamps) == set(robot.sent) - robot.silent
        for topic, received in stamps.items():
            sent = [stamp for stamp in robot.sent[topic] if received[0] < stamp < received[-1]]
            assert len(received) >= len(sent), f'{topic}: nothing lost before that'
            lost.append((killed - received[-1]) / S - robot.every[topic] * 5e-3)  # less a period: what had not come yet
    print(f'{KILLS // 2} kills: lost {np.median(lost):.2f} s at the median, {max(lost):.2f} s at most')
    assert max(lost) <= 1.0
    command = ['convert', tmp_path / 'bags', '--salvage', '--gaps', 'split', '--out', tmp_path / 'dataset']
    done = subprocess.run([sys.executable, '-m', 'il_policies.cli', *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dataset = Dataset(tmp_path / 'dataset')
    for i, meta in enumerate(dataset.episodes):
        assert meta['task'] == 'reach the goal' and meta['success'] is None
        assert dataset.report(i)['verdict'] != 'PASS', 'labelled'
    assert {meta['source'] for meta in dataset.episodes} == {f'killed_{i}' for i in range(KILLS // 2)}
    assert sum(meta['length'] for meta in dataset.episodes) >= 10 * KILLS // 2


def test_a_full_disk_leaves_the_control_loop_alone(nodes, node, tmp_path):
    from il_msgs.msg import ControllerStatus
    path = patient_contract(tmp_path)
    contract = yaml.safe_load(path.read_text())
    contract['observations'] = {'joint_positions': contract['observations']['joint_positions']}
    path.write_text(yaml.safe_dump(contract))
    arm = FollowingArm(node, path)
    nodes.start('controller_node', contract=path)
    epoch = arm.arm()
    arm.send(epoch, 0.3 * np.sin(np.arange(0.0, 30.0, 0.1)))
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, what='following the chunk')
    with small_disk(tmp_path / 'disk', 6) as disk:
        recorder = nodes.start('recorder_node', contract=path, output=disk, min_free=0.0)
        bag = disk / started(node).path
        began = len(arm.statuses)
        time.sleep(4.0)
        assert recorder.poll() is None
        filled = len(arm.statuses)
        with open(disk / 'other', 'wb', buffering=0) as other, pytest.raises(OSError):
            while True:  # somebody else takes the rest
                other.write(bytes(4096))
        assert recorder.wait(20) == 1
        time.sleep(2.0)
        ended = len(arm.statuses)
        del nodes.processes['recorder_node']
        assert_tells_of_interruption(bag, 'No space left on device')
    arm.assert_within_limits()
    assert {status.mode for status in arm.statuses[began:ended]} == {ControllerStatus.POLICY}

    def lateness(statuses) -> tuple[float, float]:
        """p99 [ms], and the share of ticks that were missed."""
        first, *told = statuses
        ticks = told[-1].ticks - first.ticks
        return (np.percentile(np.concatenate([status.lateness for status in told]), 99) * 1e3,
                (told[-1].missed_ticks - first.missed_ticks) / ticks)

    before, during = lateness(arm.statuses[began:filled]), lateness(arm.statuses[filled:ended])
    print(f'lateness p99 {before[0]:.2f} ms while it records, {during[0]:.2f} ms while its disk fills and it ends')
    assert during[0] <= 3.0 * before[0] + 5.0 and during[1] <= before[1] + 0.01


def test_a_disk_that_refuses_even_the_end(nodes, node, make_robot, tmp_path):  # noqa: F811
    robot = make_robot(CONTRACT)
    recorder = nodes.start('recorder_node', contract=CONTRACT, output=tmp_path / 'bags')
    started(node, 'bag')
    resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))  # no file may grow beyond this
    assert recorder.wait(30) == 1
    del nodes.processes['recorder_node']
    part = tmp_path / 'bags/bag.part'
    assert f'E305 {part}: is incomplete: File too large; recover it with il convert --salvage' in nodes.log('recorder_node')
    stamps, _ = salvaged(part)
    for topic, received in stamps.items():
        sent = [stamp for stamp in robot.sent[topic] if received[0] < stamp < received[-1]]
        assert len(received) >= len(sent) > 3, f'{topic}: nothing lost before that'
