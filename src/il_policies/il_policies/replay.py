"""A recorded bag played through what runs live: what would a policy have planned, and how far is that from what was done?

Messages reach the live node's buffers in the order of their arrival, chunks are planned from them as it would, and each step
of a chunk is compared with the action that the converter would label its time with. Nothing planned is followed: every chunk
is planned from noise alone, from what was seen on the way that the human, or another policy, took.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from il_policies.bags.reader import Bag
from il_policies.check.agreement import differences, of_contract, of_policy
from il_policies.contract import Contract, Stream, from_dict
from il_policies.data.align import labels
from il_policies.data.decode import DecodeError, decode, stamp_of
from il_policies.data.errors import BagError, DataError
from il_policies.data.recording import SECOND, match_topics, streams_of
from il_policies.observer import Observer
from il_policies.planner import Planner
from il_policies.policies import Policy, PolicyError

SHOWN = 60
"""At most so many chunks are drawn."""


@dataclass(frozen=True)
class Replay:
    """N chunks of H steps for D joints, and what was done at their times."""

    bag: str
    """Name of the recording."""
    policy: str
    """Content hash of the checkpoint."""
    joints: tuple[str, ...]
    """The D joints."""
    units: tuple[str, ...]
    """Of each joint, rad or m."""
    tolerance: np.ndarray
    """Tracking tolerance of each joint. Shape (D,)."""
    step_period: float
    """Between the steps of a chunk [s]."""
    starts: np.ndarray
    """When each chunk's step 0 is due, since the bag began [s]. Shape (N,)."""
    planned: np.ndarray
    """The chunks. Shape (N, H, D)."""
    done: np.ndarray
    """What was done instead, NaN where nothing was recorded. Shape (N, H, D)."""
    not_planned: dict[str, int]
    """Stream → how often it kept the policy from planning."""
    refused: dict[str, int]
    """Stream → messages of it that are no samples."""

    @property
    def error(self) -> np.ndarray:
        """Planned less done, NaN where unknown. Shape (N, H, D)."""
        return self.planned - self.done

    def rms(self) -> np.ndarray:
        """Root mean square error of each step over all chunks [rad or m]; NaN where nothing is known. Shape (H, D)."""
        return _over_chunks(np.square(self.error), np.mean, np.sqrt)

    def worst(self) -> np.ndarray:
        """Largest distance of each step over all chunks [rad or m]; NaN where nothing is known. Shape (H, D)."""
        return _over_chunks(np.abs(self.error), np.max)

    def to_dict(self) -> dict:
        """JSON types: RMS and worst error, by joint and step, in units of the joint and in tracking tolerances."""
        steps = {name: {'unit': unit, 'tolerance': float(tolerance), 'rms': _plain(rms), 'worst': _plain(worst),
                        'rms_in_tolerances': _plain(rms / tolerance), 'worst_in_tolerances': _plain(worst / tolerance)}
                 for name, unit, tolerance, rms, worst in
                 zip(self.joints, self.units, self.tolerance, self.rms().T, self.worst().T, strict=True)}
        return {'bag': self.bag, 'policy': self.policy, 'chunks': len(self.starts), 'step_period': self.step_period,
                'compared': np.isfinite(self.error[:, :, 0]).sum(axis=0).tolist(), 'not_planned': self.not_planned,
                'refused': self.refused, 'joints': steps}


def _over_chunks(values: np.ndarray, reduce: Callable, then: Callable = lambda value: value) -> np.ndarray:
    """Reduce (N, H, D) to (H, D) over what is known; NaN where nothing is."""
    _, H, D = values.shape
    result = np.full((H, D), np.nan)
    for step in range(H):
        known = values[np.isfinite(values[:, step]).all(axis=-1), step]
        if len(known):
            result[step] = then(reduce(known, axis=0))
    return result


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def contract_for(bag: Bag, policy: Policy) -> Contract:
    """The contract that the policy's checkpoint carries, else that of the bag. Raises BagError E102 if neither has one."""
    data = policy.extra.get('contract') or bag.contract
    if not data:
        raise BagError(f'{bag.path}: neither checkpoint nor bag carries a contract; pass --contract', 'E102')
    return from_dict(Contract, data, 'contract')


def replay(bag: Bag, policy: Policy, contract: Contract, stride: int = 8, seed: int = 0) -> Replay:
    """Play a bag, also one of the flight recorder, through the live buffers, and plan every `stride` policy steps.

    Raises PolicyError if the policy is none for this robot; DataError or BagError for bags that lack a topic or are damaged,
    and if the policy never saw enough to plan (E202).
    """
    spec = policy.spec
    if stride < 1:
        raise PolicyError(f'stride is {stride}, must be at least 1')
    mismatches = differences(of_contract('contract', contract), of_policy('checkpoint', policy))
    if mismatches:
        raise PolicyError('the checkpoint was trained for another robot: ' + '; '.join(mismatches))
    labelled = contract.action.label != 'next_state'
    done_by = 'action' if labelled else contract.joint_state
    streams = {name: stream for name, stream in streams_of(contract).items() if name in spec.features or name == done_by}
    topics = match_topics(bag, contract, streams)
    names = {topic: [name for name, other in topics.items() if other == topic] for topic in topics.values()}

    observer, planner = Observer(contract, spec.features, spec.history, spec.step_period), Planner(policy, seed=seed)
    planner.warm_up()
    acted: list[tuple[int, np.ndarray]] = []
    starts, planned = [], []
    not_planned: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    first = last = due = began = None
    for raw in bag.raw(names):
        now = raw.receive_ns
        first = now if first is None else first
        message = bag.deserialize(raw.topic, raw.data)
        for name in names[raw.topic]:
            try:
                if name in observer.streams:
                    observer.take(name, message, raw.publish_ns, now)
                if name == done_by:
                    acted.append((stamp_of(message, streams[name], raw.publish_ns, now), decode(message, streams[name])))
            except DecodeError:
                refused[name] += 1
        if due is not None and now < due:
            continue
        t, observation = observer.observe(now, began)
        if observation.problems:
            not_planned.update(observation.problems.keys())
            due = now + observer.period // 10
            continue
        if last is not None and observer.anchor and t <= last:  # no new frame yet
            continue
        began = t if began is None else began
        planner.forget()
        start = t + round(spec.action_offset * SECOND)
        starts.append(start)
        planned.append(planner.plan(observation.data, start / SECOND))
        last, due = t, now + stride * observer.period
    if not starts:
        what = ', '.join(f'{name} {count} times' for name, count in not_planned.items()) or 'there are no messages'
        raise DataError(f'{bag.path}: the policy never saw all that it observes; missing or too old: {what}', 'E202')
    return Replay(bag.name, policy.hash, contract.action.joints, tuple(joint.unit for joint in contract.action_joints),
                  np.array([joint.tracking_tolerance for joint in contract.action_joints]), spec.step_period,
                  (np.array(starts) - first) / SECOND, np.stack(planned),
                  _done(acted, np.array(starts), contract, spec.horizon, streams[done_by]), dict(not_planned), dict(refused))


def _done(acted: list[tuple[int, np.ndarray]], starts: np.ndarray, contract: Contract, horizon: int,
          stream: Stream) -> np.ndarray:
    """What the converter would label the steps of chunks with, (N, H, D) in action order, NaN where there is nothing.

    acted: (stamp [ns], values) of commands, or, where the label is next_state, of measured positions. starts: (N,) [ns].
    """
    order = [stream.names.index(name) for name in contract.action.joints]
    result = np.full((len(starts), horizon, len(order)), np.nan)
    if not acted:
        return result
    acted.sort(key=lambda entry: entry[0])
    stamps, values = np.array([stamp for stamp, _ in acted]), np.array([value for _, value in acted])[:, order]
    steps = np.round(np.arange(horizon) * contract.step_period * SECOND).astype(np.int64)
    # Measured positions are the newest at each time, which is what command_hold means of commands.
    label = 'command_hold' if contract.action.label == 'next_state' else contract.action.label
    for i, start in enumerate(starts):
        place, _ = labels(start + steps, label, stamps, contract.policy_rate, stream.max_age)
        result[i, place >= 0] = values[place[place >= 0]]
    return result


def table(result: Replay) -> list[tuple[str, ...]]:
    """Rows for people, a heading first: error against horizon, RMS / worst of each joint, and the farthest joint."""
    rms, worst = result.rms(), result.worst()
    rows = [('after [s]', 'chunks', *(f'{name} [{unit}]' for name, unit in zip(result.joints, result.units, strict=True)),
             'worst [tolerances]')]
    H = len(rms)
    for step in sorted({*range(0, H, max(1, H // 8)), H - 1}):
        known = int(np.isfinite(result.error[:, step, 0]).sum())
        relative = worst[step] / result.tolerance
        farthest = f'{relative.max():.2f} ({result.joints[int(np.argmax(relative))]})' if known else '-'
        rows.append((f'{step * result.step_period:.2f}', str(known),
                     *(f'{a:.3f} / {b:.3f}' if known else '-' for a, b in zip(rms[step], worst[step], strict=True)), farthest))
    return rows


def plot(result: Replay, path: Path) -> None:
    """A PNG: per joint what was done with the chunks over it, and the error against the horizon in tracking tolerances."""
    from matplotlib.figure import Figure

    D, H = len(result.joints), result.planned.shape[1]
    ahead = np.arange(H) * result.step_period
    figure = Figure(figsize=(14, 2.2 * D + 0.6), layout='constrained')
    axes = figure.subplots(D, 2, squeeze=False, gridspec_kw={'width_ratios': [3, 1]})
    shown = np.unique(np.linspace(0, len(result.starts) - 1, min(len(result.starts), SHOWN)).astype(int))
    rms, worst = result.rms() / result.tolerance, result.worst() / result.tolerance
    for d, (name, unit) in enumerate(zip(result.joints, result.units, strict=True)):
        left, right = axes[d]
        for i in shown:
            times = result.starts[i] + ahead
            for values, style in ((result.done, {'color': 'black', 'linewidth': 1.6}),
                                  (result.planned, {'color': 'tab:orange', 'linewidth': 0.8})):
                left.plot(times, values[i, :, d], **style)
        left.set_ylabel(f'{name} [{unit}]')
        right.plot(ahead, rms[:, d], label='RMS')
        right.plot(ahead, worst[:, d], label='worst', linestyle=':')
        right.axhline(1.0, color='grey', linewidth=0.8)
        right.set_ylim(bottom=0)
    axes[0, 0].legend(axes[0, 0].lines[:2], ('done', 'planned'), loc='upper right')
    axes[0, 1].legend(loc='upper left')
    axes[0, 1].set_title('error [tracking tolerances]')
    axes[-1, 0].set_xlabel('time [s]')
    axes[-1, 1].set_xlabel('ahead of the observation [s]')
    figure.suptitle(f'{result.bag}: policy {result.policy}, {len(result.starts)} chunks')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format='png')
