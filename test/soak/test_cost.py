"""What a tick costs, and that nothing accumulates."""
from __future__ import annotations

import dataclasses
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from il_policies.contract import load_contract
from il_runtime.core.controller import Controller
from il_runtime.core.ensembling import Blending, Chunk, Ensembler
from il_runtime.core.mode import Mode
from support import ROOT

PERIOD = 0.02
D = 14


@pytest.fixture
def controller() -> Controller:
    """Armed, with 14 joints behind a trajectory controller, as of two arms."""
    contract = load_contract(ROOT / 'config/robots/so101.yaml')
    names = tuple(f'joint_{i}' for i in range(D))
    states = dataclasses.replace(contract.observations['joint_positions'], names=names)
    output = dataclasses.replace(contract.action.outputs[0], type='trajectory_msgs/msg/JointTrajectory')
    contract = dataclasses.replace(
        contract, joints=tuple(dataclasses.replace(contract.joints[0], name=name) for name in names),
        observations={'joint_positions': states}, action=dataclasses.replace(contract.action, joints=names, outputs=(output,)))
    controller = Controller(contract, Ensembler([0.3] * D, Blending(max_disagreement=1.0)))
    controller.joint_state(0.0, np.zeros(D), 0.0)
    assert controller.arm(0.0)[0]
    return controller


def wave(controller: Controller, now: float, sequence: int) -> Chunk:
    """Nine steps, 0.1 s apart, of a slow wave of all joints."""
    positions = 0.3 * np.sin(now + 0.1 * np.arange(9))[:, None] * np.ones(D)
    return Chunk(now, 0.1, positions, controller.epoch, sequence, now)


def test_cost_of_a_tick(controller, show):
    took = []
    for i in range(1, 5001):
        now = i * PERIOD
        controller.joint_state(now, controller.gate.position, now)
        if i % 5 == 0:
            controller.add_chunk(wave(controller, now, i), now)
        began = time.perf_counter()
        controller.tick(now)
        ticked = time.perf_counter()
        controller.gate.run_out()
        took.append((ticked - began, time.perf_counter() - ticked))
    assert controller.mode == Mode.POLICY and controller.blend.live in (8, 9)
    # The quietest of five rounds: others use this machine, too.
    tick, ramp = min(np.median(np.reshape(took, (5, 1000, 2)), axis=1), key=sum) * 1e3
    assert tick <= 0.3
    show('tick cost, 14 joints, 8 live chunks', '≤ 0.3 ms median', f'{tick:.2f} ms, and {ramp:.2f} ms for its ramp to rest')


def resident() -> float:
    """Memory of this process [MiB]."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.parametrize('followed', [True, False], ids=['followed', 'held'])
def test_a_million_chunks_leave_nothing_behind(show, followed):
    ensembler, positions = Ensembler([0.3] * D), np.zeros((9, D))
    ensembler.reset(1)
    memory = []
    for i in range(1_000_001):
        now = i * PERIOD
        ensembler.add(Chunk(now, 0.1, positions.copy(), 1, i, now), now)
        if followed and i % 10 == 0:
            ensembler.at(now)
        if i % 100_000 == 0:
            memory.append(resident())
    grown = max(memory[2:]) - memory[1]
    assert grown < 1.0, f'{grown:.1f} MiB more after 900,000 chunks'
    show(f'1,000,000 chunks, {"followed" if followed else "while held"}', 'memory does not grow', f'+{max(grown, 0):.1f} MiB')
