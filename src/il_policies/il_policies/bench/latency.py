"""Latency: from a sample's capture to the first command that uses the chunk planned from it, through really running nodes.

Simulator, planner and controller are processes of their own and talk over DDS, on this machine and on a domain of their own;
il_runtime's latency_node listens. All moments of a chunk are on the wall clock of this machine, so that its stages add up to the
whole: the planner says when the sample was captured and arrived and when inference began and ended, the controller which command
is the first to use the chunk, and the middleware's own stamps when chunk and command were sent.

Captured is the newest frame of the camera that the observation is anchored to, or without cameras the newest sample.
"""
from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
import yaml
from rich.console import Console

from il_policies import deploy
from il_policies.bench import BenchError, publish
from il_policies.check.agreement import differences, of_contract, of_policy
from il_policies.contract import Contract, from_dict, load_contract
from il_policies.policies import Policy
from il_policies.probe import ask
from il_policies.sim.reach_around import DESCRIPTION, JOINTS

STAGES = ('capture to arrival', 'arrival to planning', 'inference', 'planned to published', 'published to first command')
"""What follows on what, without a gap."""
WHOLE, OBSERVED, BEYOND = 'capture to first command', 'observation to first command', 'without a fresh chunk, beyond inference'
"""The stages together; the same from the chunk's stamp; and the gaps between chunks, see `beyond_inference`."""
PLAN_WHEN = ('stride', 'continuous')
"""As in the rows, unless others are asked for."""
SHARES = (0.5, 0.9, 0.99, 1.0)
"""Quantiles of the table, each a duration that occurred."""
BINS = 40
START_S = 30.0
"""Starting three nodes and setting the arm back between episodes may take so much longer than the measurement [s]."""
COLORS = {'stride': '#4c72b0', 'continuous': '#dd8452', 'horizon': '#55a868', 'unknown': '#8172b3'}


@dataclass(frozen=True)
class Chunk:
    """A chunk as it was heard. Times: wall clock [ns]."""

    epoch: int
    sequence: int
    policy: str
    step_period: float
    """[s]."""
    observed: int
    """Its header's stamp."""
    inference: int
    """How long the network took [ns]."""
    start: int
    """Time of its first step."""
    end: int
    """Time of its last step."""
    sent: int
    received: int


@dataclass(frozen=True)
class Planned:
    """What the planner says about a chunk [ns]."""

    epoch: int
    sequence: int
    captured: int
    arrived: int
    began: int
    planned: int


@dataclass(frozen=True)
class Followed:
    """What the controller says about a chunk."""

    epoch: int
    sequence: int
    commanded: int
    """Stamp of the first command that uses it [ns]."""


@dataclass(frozen=True)
class Command:
    """A command: its stamp is the tick that it is for [ns]."""

    stamp: int
    sent: int


@dataclass(frozen=True)
class Status:
    """A status of the controller."""

    time: int
    epoch: int
    follows: bool
    """Chunks are followed, or will be as soon as one covers now."""
    starved: bool
    """It stops, or has stopped, for want of a fresh chunk."""
    fault: bool
    reason: str


@dataclass(frozen=True)
class Heard:
    """Everything that il_runtime's latency_node heard between two moments [ns]."""

    began: int
    ended: int
    chunks: list[Chunk]
    planned: list[Planned]
    followed: list[Followed]
    commands: list[Command]
    statuses: list[Status]
    plan_when: str
    """As the planner says; '' if it says nothing."""


def durations(heard: Heard) -> dict[str, np.ndarray]:
    """Stage → how long each took [s], NaN where it is not known; one row a chunk heard. Shape (number of chunks,) each."""
    planned = {(p.epoch, p.sequence): p for p in heard.planned}
    commanded = {(f.epoch, f.sequence): f.commanded for f in heard.followed}
    sent = {command.stamp: command.sent for command in heard.commands}
    rows = []
    for chunk in heard.chunks:
        key = chunk.epoch, chunk.sequence
        p, command = planned.get(key), sent.get(commanded.get(key))
        before = (np.nan,) * 4 if p is None else tuple(t - chunk.sent for t in (p.captured, p.arrived, p.began, p.planned))
        after = np.nan if command is None else command - chunk.sent
        rows.append((*before, 0, after, chunk.observed - chunk.sent, chunk.inference))
    moments = np.array(rows, dtype=np.float64).reshape(-1, 8) * 1e-9  # of each chunk, seen from when it was sent
    found = dict(zip(STAGES, np.diff(moments[:, :6], axis=1).T))
    found['inference'] = moments[:, 7]  # which every planner says
    return {**found, WHOLE: moments[:, 5] - moments[:, 0], OBSERVED: moments[:, 5] - moments[:, 6]}


def beyond_inference(chunks: list[Chunk]) -> np.ndarray:
    """Time without a fresh chunk, beyond inference [s]: shape (number of gaps,).

    From the arrival of one chunk to that of the next one of the same epoch, less the inference time of the latter.
    """
    by_epoch: dict[int, list[Chunk]] = {}
    for chunk in sorted(chunks, key=lambda chunk: chunk.received):
        by_epoch.setdefault(chunk.epoch, []).append(chunk)
    return np.array([after.received - before.received - after.inference
                     for row in by_epoch.values() for before, after in zip(row, row[1:])], dtype=np.float64) * 1e-9


def starvation(heard: Heard) -> tuple[list[tuple[int, int]], float]:
    """When no chunk that had arrived covered now, though one would have been followed: from, to [ns]; and out of how long [s].

    Counted from the first chunk of each epoch on: until then there is none to be late.
    """
    by_epoch: dict[int, list[Chunk]] = {}
    for chunk in heard.chunks:
        by_epoch.setdefault(chunk.epoch, []).append(chunk)
    starved, followed = [], 0
    for epoch, begin, end in _following(heard):
        chunks = by_epoch.get(epoch, [])
        now = max([begin, heard.began, min([chunk.received for chunk in chunks], default=end)])
        if now >= end:
            continue
        followed += end - now
        # One that has ended when it comes covers nothing.
        spans = sorted((max(c.received, c.start), c.end) for c in chunks if c.end > c.received)
        for covers, until in (*spans, (end, end)):
            if min(covers, end) > now:
                starved.append((now, min(covers, end)))
            now = min(max(now, until), end)
    return starved, followed * 1e-9


def _following(heard: Heard) -> list[tuple[int, int, int]]:
    """When the controller followed, or would have followed, chunks of which epoch: epoch, from, to [ns]."""
    statuses = sorted(heard.statuses, key=lambda status: status.time)
    spans: list[tuple[int, int, int]] = []
    for status, end in zip(statuses, [status.time for status in statuses[1:]] + [heard.ended]):
        if spans and spans[-1][::2] == (status.epoch, status.time) and status.follows:
            spans[-1] = *spans[-1][:2], end
        elif status.follows:
            spans.append((status.epoch, status.time, end))
    return spans


def run(checkpoint: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar='CHECKPOINT')] = None,
        seconds: float = 60.0, plan_when: tuple[Literal['stride', 'continuous', 'horizon'], ...] = (), stride: int = 8,
        backend: Literal['auto', 'torch', 'onnxruntime', 'openvino'] = 'auto', threads: int = 1, contract: Path | None = None,
        live: tyro.conf.FlagCreatePairsOff[bool] = False, namespace: str = '/', out: Path = Path('bench_out')) -> dict:
    """Where the time goes from capture to command: a checkpoint in simulation, over DDS, or --live what runs now (needs ROS 2).

    Histograms of capture → arrival → planning → inference → published → first command, and the time without a fresh chunk: from
    the arrival of one chunk to that of the next one, less its inference. For a planner that does not wait on purpose its p99 must
    not exceed one policy step.

    Args:
        checkpoint: Checkpoint folder, for the SO-101 in reach_around: simulator, controller and planner are started.
        seconds: How long each is measured [s].
        plan_when: When the planner plans; none: stride, then continuous.
        stride: Policy steps between plans, for stride.
        backend: What runs the network; auto: the fastest that the checkpoint was exported for (il export onnx), or torch.
        threads: CPU threads of the network.
        contract: Contract of the robot: config/robots/<robot>.yaml. None: the one inside the checkpoint.
        live: Listen to what runs now instead of a checkpoint; moves nothing, arm it yourself.
        namespace: Live: namespace of the nodes, such as /left.
        out: Folder for latency.json and latency.png.
    """
    if live == (checkpoint is not None):
        raise BenchError('give either a checkpoint, to be run in simulation, or --live, to listen to what runs now')
    if not 1.0 <= seconds <= 3600.0:
        raise BenchError(f'seconds is {seconds:g}, must be 1 to 3600')
    if stride < 1 or threads < 1:
        raise BenchError(f'stride is {stride} and threads {threads}, must be at least 1')
    if live and contract is None:
        raise BenchError('--live needs the contract of the robot that runs: --contract config/robots/<robot>.yaml')
    if live and plan_when:
        raise BenchError('--plan-when is for a checkpoint; one that runs is told by: ros2 param set /policy plan_when …')
    if live:
        with Console(stderr=True).status(f'listening for {seconds:g} s'):
            running = _ask(load_contract(contract), {}, seconds, namespace)
        heard = {running.plan_when or 'unknown': running}
        what = f'what runs in {namespace}'
    else:
        policy = deploy.load(checkpoint, backend, threads)
        robot = _robot(checkpoint, policy, contract)
        planner = {'checkpoint': checkpoint.absolute(), 'stride': stride, 'backend': backend, 'threads': threads}
        heard = {}
        for when in plan_when or PLAN_WHEN:
            with Console(stderr=True).status(f'{when}: {seconds:g} s of episodes'):
                heard[when] = _ask(robot, {**planner, 'plan_when': when}, seconds)
        what = f'{policy.kind} {policy.hash} by {policy.backend}, {threads} threads, stride {stride}, SO-101 simulated'
    return _report(heard, f'{what}, {seconds:g} s each', out)


def _robot(checkpoint: Path, policy: Policy, path: Path | None) -> Contract:
    """The contract to run a policy by. Raises BenchError, or ContractError, if it cannot run in reach_around."""
    if path is None and not policy.extra.get('contract'):
        raise BenchError(f'{checkpoint}: carries no contract; give one: --contract config/robots/<robot>.yaml')
    contract = load_contract(path) if path else from_dict(Contract, policy.extra['contract'], f'{checkpoint}: contract')
    if contract.description != DESCRIPTION or set(contract.action.joints) != set(JOINTS):
        raise BenchError(f'{path or checkpoint}: robot {contract.robot}, but the task is reach_around, of the SO-101 '
                         '(config/robots/so101.yaml); measure others where they run: --live')
    if mismatches := differences(of_contract(str(path or checkpoint), contract), of_policy(str(checkpoint), policy)):
        raise BenchError(f'{checkpoint} was trained for another robot: ' + '; '.join(mismatches))
    return contract


def _ask(contract: Contract, planner: dict, seconds: float, namespace: str = '/') -> Heard:
    """What latency_node hears. Raises ProbeError, and BenchError if there was no chunk."""
    # Never among the nodes of a robot that runs.
    domain = 1 + os.getpid() % 100
    apart = {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
             'ROS_DOMAIN_ID': str(domain + (str(domain) == os.environ.get('ROS_DOMAIN_ID')))} if planner else {}
    with tempfile.NamedTemporaryFile('w', prefix='il_latency_', suffix='.yaml') as file:
        yaml.safe_dump(contract.to_dict(), file)
        file.flush()
        parameters = {'contract': file.name, 'seconds': float(seconds), **planner}
        heard = ask('latency_node', parameters, 2.0 * seconds + START_S, namespace, 'bench latency', **apart)
    heard = from_dict(Heard, heard, 'latency_node')
    if not heard.chunks:
        raise BenchError(f'no chunk came within {seconds:g} s; the controller: '
                         f'{heard.statuses[-1].reason if heard.statuses else "silent"}')
    return heard


def _report(heard: dict[str, Heard], budget: str, out: Path) -> dict:
    found = {when: {**durations(h), BEYOND: beyond_inference(h.chunks)} for when, h in heard.items()}
    known = {when: {stage: values[~np.isnan(values)] for stage, values in row.items()} for when, row in found.items()}
    rows = [_row(when, stage, values) for when, row in known.items() for stage, values in row.items()]
    verdicts = [_verdict(when, h, known[when][BEYOND]) for when, h in heard.items()]
    edges = {stage: _edges(np.concatenate([row[stage] for row in known.values()])) for stage in next(iter(known.values()))}
    # One number a chunk, or gap, so that whoever wants another histogram has it.
    plain = {when: {stage: [None if np.isnan(x) else round(1e3 * float(x), 4) for x in values] for stage, values in row.items()}
             for when, row in found.items()}
    result = publish('latency', budget, rows, out, _plot(known, edges, verdicts), verdicts=verdicts, durations_ms=plain)
    print(f'"{BEYOND}": from the arrival of one chunk to that of the next one of its epoch, less its inference.')
    for verdict in verdicts:
        print(_words(verdict))
    return result


def _row(when: str, stage: str, values: np.ndarray) -> dict:
    quantiles = 1e3 * np.quantile(values, SHARES, method='higher') if len(values) else [np.nan] * len(SHARES)
    return {'stage': stage, 'plan_when': when, 'count': len(values),
            **{f'{"max" if share == 1 else f"p{100 * share:g}"}_ms': float(q) for share, q in zip(SHARES, quantiles)}}


def _verdict(when: str, heard: Heard, beyond: np.ndarray) -> dict:
    """The figure of the plan, beside whether the controller ever ran out of chunks."""
    starved, followed = starvation(heard)
    step, p99 = heard.chunks[-1].step_period, None
    if len(beyond):
        p99 = float(np.quantile(beyond, 0.99, method='higher'))
    statuses = sorted(heard.statuses, key=lambda status: status.time)
    changes = list(zip([None, *statuses], statuses))
    return {'plan_when': when, 'beyond_inference_p99_s': p99, 'policy_step_s': step, 'gaps': len(beyond),
            'kept': None if p99 is None or when in ('stride', 'horizon') else p99 <= step,
            'starved_times': len(starved), 'starved_s': sum(end - begin for begin, end in starved) * 1e-9, 'followed_s': followed,
            'stops_for_want_of_a_chunk': sum(now.starved and not (before and before.starved) for before, now in changes),
            'faults': [now.reason for before, now in changes if now.fault and not (before and before.fault)]}


def _words(verdict: dict) -> str:
    p99, step, followed = verdict['beyond_inference_p99_s'], verdict['policy_step_s'], verdict['followed_s']
    if p99 is None:
        gap = 'only one chunk came'
    else:
        judged = {True: 'kept', False: 'missed', None: 'not judged: this planner waits on purpose'}[verdict['kept']]
        gap = f'without a fresh chunk beyond inference, p99: {1e3 * p99:.1f} ms, one policy step is {1e3 * step:g} ms: {judged}'
    share = 100 * verdict['starved_s'] / followed if followed else 0.0
    return (f'{verdict["plan_when"]}: {gap}; starved (no chunk covers now) {verdict["starved_times"]} times, {share:.2f} % of '
            f'{followed:.1f} s, stopped for it {verdict["stops_for_want_of_a_chunk"]} times'
            + ''.join(f'; FAULT: {reason}' for reason in verdict['faults']))


def _edges(values: np.ndarray) -> np.ndarray:
    return np.linspace(min(0.0, values.min(initial=0.0)), max(values.max(initial=0.0), 1e-4), BINS + 1)


def _plot(known: dict[str, dict[str, np.ndarray]], edges: dict[str, np.ndarray], verdicts: list[dict]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.0, 6.0), layout='constrained')
    panels = figure.subplots(2, 4).flat
    for axes, (stage, bins) in zip(panels, edges.items()):
        for when, row in known.items():
            if len(row[stage]):
                p50, p99 = 1e3 * np.quantile(row[stage], (0.5, 0.99), method='higher')
                axes.hist(1e3 * row[stage], 1e3 * bins, color=COLORS[when], histtype='stepfilled', alpha=0.55,
                          label=f'{when}: {p50:.1f} / {p99:.1f}')
                axes.axvline(p99, color=COLORS[when], linestyle=':')
        if stage == BEYOND:
            axes.axvline(1e3 * verdicts[0]['policy_step_s'], color='0.2', linewidth=1.0)
        axes.set(xlabel='[ms]', ylabel='chunks', yscale='log', ylim=(0.7, None))
        axes.set_title(stage, size=10, pad=18.0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc='lower center', bbox_to_anchor=(0.5, 0.98), ncols=3, frameon=False, fontsize=8, handlelength=1.0,
                        columnspacing=1.0)
    figure.suptitle('From capture to command: p50 / p99 [ms]; dotted: p99; black: one policy step')
    return figure
