"""The planner over time: a hundred exchanges of its policy in motion, ten thousand random messages, memory."""
from __future__ import annotations

import os
import time

import pytest
from il_msgs.msg import ActionChunk, ControllerStatus
from il_msgs.srv import LoadPolicy

from il_policies import checkpoint
from il_runtime.ros import chunk_qos
from support import FollowingArm, call, patient_contract, wait_for
from test_planning import Streams, assert_one_policy_an_epoch, fire, raw_contract, save_policy

MINUTES = float(os.environ.get('IL_SOAK_MINUTES', 10))
EXCHANGES = 100
MOST_GROWTH = 40.0
"""Memory that a node may have gained since it had warmed up [MiB]; a leak of 0.1 % of the images would be more in 10 minutes."""


def resident(process) -> float:
    """Memory of a process [MiB]."""
    with open(f'/proc/{process.pid}/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('VmRSS')) / 1024


@pytest.mark.timeout(900)
def test_a_hundred_exchanges_in_motion(node, nodes, tmp_path, show):
    contract = patient_contract(tmp_path, max_age=1.0)
    paths = [save_policy(tmp_path / 'a', 0.0), save_policy(tmp_path / 'b', 0.08, seed=1)]
    hashes = [checkpoint.load(path).hash for path in paths]
    arm, chunks = FollowingArm(node, contract, plans=False), []
    node.create_subscription(ActionChunk, 'chunks', chunks.append, chunk_qos())
    nodes.start('controller_node', contract=contract)
    planner = nodes.start('policy_node', contract=contract, checkpoint=paths[0], stride=2)
    arm.arm()
    wait_for(lambda: arm.mode == ControllerStatus.POLICY, 40, 'the first policy')
    began, memory = len(arm.statuses), 0.0
    for i in range(1, EXCHANGES + 1):
        epoch = arm.statuses[-1].epoch
        answer = call(node, LoadPolicy, 'policy/load_policy', LoadPolicy.Request(checkpoint=str(paths[i % 2])))
        assert answer.success and answer.policy == hashes[i % 2], answer.message
        wait_for(lambda epoch=epoch: arm.statuses[-1].epoch > epoch, what='a new epoch')
        # Some are exchanged while the arm is still on its way.
        wait_for(lambda i=i: abs(arm.position - 0.08 * (i % 2)).max() < (0.03 if i % 3 else 0.07), what='the new policy followed')
        memory = memory or (resident(planner) if i == EXCHANGES // 5 else 0.0)
    modes = {status.mode for status in arm.statuses[began:]}
    assert modes == {ControllerStatus.POLICY}
    arm.assert_within_limits()
    assert_one_policy_an_epoch(chunks)
    assert resident(planner) - memory < MOST_GROWTH
    show('policy exchanged in motion, 100 times', '0 stops, 0 commands of two policies, within limits',
         f'0 stops, one policy an epoch, {resident(planner) - memory:+.1f} MiB since the 20th')


@pytest.mark.timeout(60 * MINUTES + 300)
def test_ten_thousand_random_messages_and_then_time(node, nodes, tmp_path, show):
    planner = nodes.start('policy_node', contract=raw_contract(tmp_path), stride=1,
                          checkpoint=save_policy(tmp_path / 'policy', features=('joint_positions', 'goal', 'front')))
    streams = Streams(node)
    wait_for(lambda: streams.diagnostics, 40, 'diagnostics')
    for seed in range(1, 11):
        fire(streams, 1000, seed)
        assert planner.poll() is None, nodes.log('policy_node')[-2000:]
    streams.follow(77)
    wait_for(lambda: [chunk for chunk in streams.chunks if chunk.epoch == 77], what='planning after all that')
    time.sleep(10)
    before, count = resident(planner), len(streams.chunks)
    time.sleep(60 * MINUTES)
    assert len(streams.chunks) - count > 60 * MINUTES * 5, 'it must have planned meanwhile'
    assert resident(planner) - before < MOST_GROWTH
    show('10,000 random and malformed messages on every input of a planner', 'it lives, and plans again', 'so it did; then '
         f'{resident(planner) - before:+.1f} MiB in {MINUTES:g} min')
