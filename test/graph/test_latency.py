"""`il bench latency` against what is known: chunks of a scripted planner, and the stages of really running nodes."""
from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from builtin_interfaces.msg import Duration
from il_msgs.msg import ActionChunk

from il_policies.bench.latency import BEYOND, OBSERVED, STAGES, WHOLE, Heard, beyond_inference, durations, starvation
from il_policies.contract import from_dict
from il_policies.probe import ask
from il_policies.sim.reach_around import Scene
from il_runtime.ros import nanoseconds, to_stamp
from support import FollowingArm, patient_contract
from test_closed_loop import save_fidgeting_policy

INFERENCE_S, HORIZON = 0.06, 7
PATTERN_S = (0.2, 0.2, 1.6)
"""From chunk to chunk. They cover 0.6 s from when inference began: after every third nothing covers now for 1.06 s."""
TICK_S = 0.02


class Planner(threading.Thread):
    """Takes INFERENCE_S for a chunk that keeps the arm where it is; the last of each pattern comes too late."""

    def __init__(self, arm: FollowingArm, epoch: int):
        super().__init__(daemon=True)
        self.arm, self.epoch, self.running, self.sent = arm, epoch, True, []  # sequence, when inference began, when sent [ns]
        self.start()

    def run(self):
        due, sequence = time.monotonic(), 0
        while self.running:
            began = time.time_ns()
            message = ActionChunk(step_period=0.1, joint_names=self.arm.names, horizon=HORIZON, policy='scripted',
                                  positions=np.tile(self.arm.position.astype(np.float32), HORIZON), epoch=self.epoch,
                                  sequence=sequence, inference_time=Duration(nanosec=round(INFERENCE_S * 1e9)))
            message.header.stamp = message.start = to_stamp(began)
            time.sleep(INFERENCE_S)
            self.sent.append((sequence, began, time.time_ns()))
            self.arm.chunks.publish(message)
            due += PATTERN_S[sequence % len(PATTERN_S)]
            sequence += 1
            time.sleep(max(due - time.monotonic(), 0.0))


@pytest.fixture
def simulated(tmp_path):
    """The benchmark of a checkpoint, begun: it has a domain, and nodes, of its own."""
    policy = save_fidgeting_policy(tmp_path / 'policy', Scene())
    process = subprocess.Popen(
        [sys.executable, '-m', 'il_policies.cli', 'bench', 'latency', str(policy), '--contract', str(patient_contract(tmp_path)),
         '--plan-when', 'continuous', '--seconds', '3', '--out', str(tmp_path / 'out')],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield process
    process.kill()


@pytest.mark.long
def test_a_planner_that_is_known_and_nodes_that_run(simulated, node, nodes, tmp_path):
    nodes.start('controller_node', contract=patient_contract(tmp_path))
    arm = FollowingArm(node, patient_contract(tmp_path))
    planner = Planner(arm, arm.arm())
    heard = from_dict(Heard, ask('latency_node', {'contract': tmp_path / 'patient.yaml', 'seconds': 5.0}, 5.0), 'latency_node')
    planner.running = False
    planner.join()
    check_against(planner, arm, heard)

    output, _ = simulated.communicate(timeout=120)
    print(output)
    assert simulated.returncode == 0 and 'one policy step is 100 ms: ' in output
    result = json.loads((tmp_path / 'out/latency.json').read_text())
    assert (tmp_path / 'out/latency.png').stat().st_size > 20_000
    check_sums(result)


def check_against(planner: Planner, arm: FollowingArm, heard: Heard) -> None:
    """What was heard is what the planner did, and what the arm heard."""
    sent = {sequence: (began, at) for sequence, began, at in planner.sent if heard.began < at < heard.ended - 50_000_000}
    chunks = {chunk.sequence: chunk for chunk in heard.chunks}
    assert sent.keys() <= chunks.keys() and len(sent) >= 6, 'nothing is lost'
    late = np.array([[chunks[k].sent - at, chunks[k].received - at] for k, (_, at) in sent.items()]) * 1e-9
    assert (np.median(late, axis=0) < 0.03).all() and (late > -1e-3).all()
    found = durations(heard)
    assert found['inference'] == pytest.approx(INFERENCE_S, abs=1e-6) and np.isnan(found['capture to arrival']).all()

    # The first command after a chunk has come is the first to use it: nothing else covers later than it.
    stamps = np.array([nanoseconds(message.header.stamp) for message in arm.commands])
    used = {f.sequence: f.commanded for f in heard.followed if f.sequence in sent}
    assert len(used) >= len(sent) - 2
    ticks = [np.searchsorted(stamps, commanded) - np.searchsorted(stamps, sent[k][1]) for k, commanded in used.items()]
    assert all(commanded in stamps for commanded in used.values()) and np.median(ticks) in (0, 1)
    first = found['published to first command']
    assert 0.0 < np.nanmedian(first) < 2 * TICK_S and np.isfinite(first).sum() >= len(used) - 1
    # Of the chunk under way when listening began, the command may have gone unheard.
    known = np.isfinite(first)
    ages = np.array([(chunk.sent - chunk.observed) * 1e-9 for chunk in heard.chunks])
    np.testing.assert_allclose((found[OBSERVED] - first)[known], ages[known], atol=1e-6)

    gaps = np.diff([at for _, _, at in planner.sent if heard.began < at < heard.ended]) * 1e-9 - INFERENCE_S
    measured = beyond_inference(heard.chunks)
    assert np.median(np.abs(measured[:len(gaps)] - gaps[:len(measured)])) < 0.02
    assert np.quantile(measured, 0.99, method='higher') == pytest.approx(PATTERN_S[2] - INFERENCE_S, abs=0.3)

    first_heard = min(chunk.received for chunk in heard.chunks)
    times = np.arange(first_heard, heard.ended, 1_000_000)
    covered = np.zeros(len(times), bool)
    for sequence, began, at in planner.sent:
        if sequence >= heard.chunks[0].sequence:
            covered |= (times >= at) & (times <= began + (HORIZON - 1) * 100_000_000)
    starved, followed = starvation(heard)
    assert sum(b - a for a, b in starved) * 1e-9 == pytest.approx((~covered).mean() * followed, abs=0.15)
    assert len(starved) == pytest.approx(np.sum(np.diff(covered.astype(int)) < 0), abs=1) and len(starved) >= 2
    assert followed == pytest.approx(len(times) * 1e-3, abs=0.15)
    assert any(status.starved for status in heard.statuses)


def check_sums(result: dict) -> None:
    """Of every chunk the stages are the whole, each is positive, and the verdict is what the durations say."""
    took = {stage: np.array(values, dtype=float) for stage, values in result['durations_ms']['continuous'].items()}
    followed = np.isfinite(took[WHOLE])
    assert followed.sum() >= 10 and np.isfinite(took['inference']).all()
    assert sum(took[stage] for stage in STAGES)[followed] == pytest.approx(took[WHOLE][followed], abs=1e-3)
    assert (np.array([took[stage][followed] for stage in STAGES]) > -1.0).all()
    # Without a camera the observation is taken as planning begins.
    rest = sum(took[stage] for stage in STAGES[2:])[followed]
    assert np.median(np.abs(took[OBSERVED][followed] - rest)) < 2.0
    verdict, = result['verdicts']
    p99 = np.quantile(took[BEYOND], 0.99, method='higher')
    assert verdict['beyond_inference_p99_s'] == pytest.approx(p99 * 1e-3, abs=1e-6) and verdict['kept'] == (p99 <= 100.0)
    assert verdict['followed_s'] == pytest.approx(3.0, abs=1.0)
    rows = {row['stage']: row for row in result['rows']}
    assert rows[WHOLE]['count'] == followed.sum() and rows['inference']['count'] == len(took['inference'])
