"""What there is to see of an arm that follows a policy: what is planned, what becomes of it, and what holds it back.

Pure: no ROS, and times are seconds of one clock of the caller's choice. Positions are in [m], in the frame of the description's
root link; every position is worked out once, when it is heard of.
"""
from __future__ import annotations

import copy
import textwrap
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from il_policies.contract import Contract
from il_policies.kinematics import Skeleton
from il_runtime.core.ensembling import Blend, Blending, Chunk, Ensembler
from il_runtime.core.mode import Mode

PLAN, DEED, LIMIT = (0.25, 0.62, 1.0), (1.0, 0.76, 0.1), (0.95, 0.1, 0.1)
"""Colours of what the policy plans, of what the controller makes of it, and of limits and faults."""
ARM, INK = (0.62, 0.62, 0.62), (0.92, 0.92, 0.92)
"""Colours of the measured arm and of the text."""
FAINTEST = 0.08
"""Opacity of a chunk that is about to end."""
TRAIL_S = 2.0
"""How much of the commanded motion is shown [s]."""
PAUSE_S = 0.2
"""After a longer pause commands begin a new trail [s]."""
AHEAD = 40
"""Points of the path ahead."""
SILENT_S = 1.0
"""A controller that was last heard of longer ago is silent [s]."""
LINE = 64
"""Letters in a line of text."""


@dataclass(frozen=True)
class Shape:
    """One thing to draw; namespace and number tell it from others."""

    namespace: str
    number: int
    kind: Literal['path', 'sticks', 'balls', 'text']
    """A line through all points, lines between each two of them, spheres, or words in their middle."""
    points: np.ndarray
    """Shape (N, 3) [m]. The same array as before if nothing has moved."""
    colour: tuple[float, float, float, float]
    """Red, green, blue and opacity, 0 to 1."""
    size: float
    """Width of lines, diameter of balls or height of letters [m]."""
    text: str = ''


@dataclass(frozen=True)
class Plan:
    """A chunk and where it leads."""

    number: int
    chunk: Chunk
    paths: list[np.ndarray]
    """Of each tip. Shape (H, 3)."""
    goal: np.ndarray
    """The links at its end. Shape (K, 3)."""


class Scene:
    """Told of chunks, statuses, joint states and commands as they come; `shapes` is what can be seen of them then."""

    def __init__(self, contract: Contract, keep: int = 8):
        """keep: so many of the last chunks are shown. Raises ContractError or DescriptionError if the description is no good."""
        self.skeleton = Skeleton(contract)
        self.blending: Blending | None = None
        """How the controller ensembles, once that is known."""
        self._plans: deque[Plan] = deque(maxlen=keep)
        self._count = 0
        self._joints = contract.action.joints
        self._tolerance = np.array([joint.tracking_tolerance for joint in contract.action_joints])
        self._ensembler = Ensembler(self._tolerance, ramp=2.0 / contract.control_rate)
        self._commanded: np.ndarray | None = None
        self._looked = -np.inf  # until where the ensembler was asked, which knows no way back
        self._delays: deque[tuple[float, float]] = deque([(0.0, 0.0)], maxlen=200)
        self._scale = 1.0
        self._status = None
        self._heard = 0.0
        self._links: np.ndarray | None = None
        self._trail: deque[tuple[float, np.ndarray]] = deque()
        self._latencies: deque[float] = deque(maxlen=20)
        self._inference = 0.0
        self._lateness: deque[float] = deque(maxlen=3000)
        pairs = [(i, before) for i, before in enumerate(self.skeleton.before)]
        self._sticks = np.array(pairs).ravel()  # of the links; -1 picks the root, which is appended to them

    # --- what is heard ------------------------------------------------------------------------------------------------
    def chunk(self, chunk: Chunk, latency: float, inference: float, now: float) -> None:
        """A checked chunk, columns in action order; how long it took from the observation, and inference alone [s]."""
        links = self.skeleton.positions(chunk.positions)
        self._count += 1
        self._plans.append(Plan(self._count, chunk, [links[:, tip].copy() for tip in self.skeleton.tips], links[-1].copy()))
        self._latencies.append(latency)
        self._inference = inference
        self._play(now)
        self._follow(chunk, now)

    def status(self, status, now: float) -> None:
        """What the controller says: an object with the fields of il_msgs/msg/ControllerStatus."""
        before, self._status, self._heard = self._status, status, now
        self._play(now)
        self._scale = status.speed_scale / 100
        self._lateness.extend(status.lateness)
        if before is None or before.epoch != status.epoch:
            self._ensembler.reset(status.epoch)
            for plan in self._plans:  # planners may have heard of the epoch earlier
                self._follow(plan.chunk, now)
        elif status.mode not in (Mode.HOLD, Mode.POLICY, Mode.APPROACH):
            self._ensembler.clear()

    def joint_state(self, positions: np.ndarray) -> None:
        """Measured positions in action order, shape (D,)."""
        self._links = self.skeleton.positions([positions])[0]

    def command(self, positions: np.ndarray, given: float) -> None:
        """Commanded positions in action order, shape (D,), of a time that is not before that of the last one."""
        if self._trail and given - self._trail[-1][0] > PAUSE_S:
            self._trail.clear()
        self._trail.append((given, self.skeleton.positions([positions])[0, self.skeleton.tips]))
        self._commanded = positions

    def reset(self) -> None:
        """The clock went back: everything stamped before is void."""
        self._plans.clear()
        self._trail.clear()
        self._delays = deque([(0.0, 0.0)], maxlen=self._delays.maxlen)
        self._ensembler.clear()
        self._looked = -np.inf

    # --- what is seen -------------------------------------------------------------------------------------------------
    def shapes(self, now: float) -> list[Shape]:
        """All there is to draw, nothing twice."""
        self._play(now)
        while self._trail and self._trail[0][0] < now - TRAIL_S:
            self._trail.popleft()
        held, ahead, plans, width = self._held_back(), self._ahead(now), self._live(now), 0.004 * self.skeleton.length
        words = self._words(now, held)
        shapes = [Shape('text', 0, 'text', np.array([[0.0, 0.0, 0.65 * self.skeleton.length]]),
                        (*(LIMIT if self._failed() else INK), 1.0), 0.024 * self.skeleton.length, words)]
        for plan in plans:
            left = (plan.chunk.end - now) / max(plan.chunk.end - plan.chunk.observed, 1e-9)
            colour = (*PLAN, min(max(left, FAINTEST), 1.0))
            shapes += [Shape('chunks', plan.number * len(plan.paths) + i, 'path', path, colour, 1.6 * width)
                       for i, path in enumerate(plan.paths) if len(path) > 1]
        if plans:
            shapes += self._body('goal', plans[-1].goal, (*PLAN, 0.4), 4 * width)
        if self._links is not None:
            shapes += self._body('arm', self._links, (*ARM, 1.0), 3 * width)
            shapes += [Shape('clamped', link, 'balls', self._links[[link]], (*LIMIT, 0.2 + 0.6 * far), (18 + 18 * far) * width)
                       for joint, far in held.items() if (link := self.skeleton.link_of.get(joint)) is not None]
        if len(self._trail) > 1:
            trail = np.array([tips for _, tips in self._trail])  # (N, tips, 3)
            shapes += [Shape('commanded', i, 'path', trail[:, i], (*DEED, 0.45), 1.5 * width) for i in range(trail.shape[1])]
        if ahead is not None:
            far = max(held.values(), default=0.0)
            colour = (*(far * limit + (1 - far) * deed for deed, limit in zip(DEED, LIMIT)), 1.0)
            shapes += [Shape('ensembled', i, 'path', ahead[:, i], colour, 2.5 * width) for i in range(ahead.shape[1])]
        return shapes

    def _words(self, now: float, held: dict[str, float]) -> str:
        """Mode, chunks, disagreement, latency, lateness and clamps, a line each."""
        status, lines = self._status, []
        if status is None:
            lines.append('no controller')
        else:
            if now - self._heard > SILENT_S:
                lines.append(f'controller silent for {now - self._heard:.1f} s; it said:')
            lines += textwrap.wrap(f'{Mode(status.mode).name}: {status.reason}', LINE)
            slow = f', speed {status.speed_scale:.0f} %' if status.speed_scale < 99.5 else ''
            if status.live_chunks:
                lines.append(f'{status.ensembling} of {status.live_chunks}, newest {1e3 * status.chunk_age:.0f} ms old{slow}')
                lines.append(f'disagreement {status.disagreement:.2f} tolerances')
            else:
                lines.append(f'no live chunk{slow}')
        if self._latencies:
            lines.append(f'observation to chunk {1e3 * self._latencies[-1]:.0f} ms, at most {1e3 * max(self._latencies):.0f} ms; '
                         f'inference {1e3 * self._inference:.0f} ms')
        if self._lateness:
            lines.append(f'loop late by {1e3 * np.percentile(self._lateness, 99):.1f} ms (p99)')
        if held:
            lines += textwrap.wrap(f'held back by limits: {", ".join(held)}', LINE)
        return '\n'.join(lines)

    def _failed(self) -> bool:
        return self._status is not None and self._status.mode == Mode.FAULT

    def _live(self, now: float) -> list[Plan]:
        """The plans that have not ended and that the controller may follow, oldest observation first."""
        plans = [plan for plan in self._plans if plan.chunk.end >= now
                 and (self._status is None or plan.chunk.epoch == self._status.epoch)]
        return sorted(plans, key=lambda plan: (plan.chunk.start, plan.chunk.sequence))

    def _body(self, namespace: str, links: np.ndarray, colour: tuple, width: float) -> list[Shape]:
        """The arm as sticks and balls, where its links are, shape (K, 3)."""
        sticks = np.concatenate([links, np.zeros((1, 3))])[self._sticks]
        return [Shape(namespace, 0, 'sticks', sticks, colour, width), Shape(namespace, 1, 'balls', links, colour, 2 * width)]

    def _held_back(self) -> dict[str, float]:
        """Joint that a limit holds back → how far its command is from what the chunks ask for.

        In tracking tolerances, 1 where it is further or that is not known. A ramp of velocity is held back a little at nearly
        every step of a chunk.
        """
        names = self._status.clamped_joints if self._status is not None else []
        blend = self._blend(max(self._trail[-1][0], self._looked)) if names and self._trail else None
        if blend is None:
            return dict.fromkeys(names, 1.0)
        far = dict(zip(self._joints, np.minimum(np.abs(self._commanded - blend.positions) / self._tolerance, 1.0)))
        return {name: float(far.get(name, 1.0)) for name in names}

    def _ahead(self, now: float) -> np.ndarray | None:
        """The tips along what the chunks heard of so far make the arm do from now on, shape (N, tips, 3), while it does."""
        if self._blend(now) is None:
            return None
        ahead = copy.deepcopy(self._ensembler)
        times = np.linspace(now, ahead.covers_until(now), AHEAD)
        blends = [ahead.at(t, self._delay(t)) for t in times]
        positions = [blend.positions for blend in blends if blend is not None]
        return self.skeleton.positions(positions)[:, self.skeleton.tips] if len(positions) > 1 else None

    # --- as the controller does ---------------------------------------------------------------------------------------
    def _blend(self, t: float) -> Blend | None:
        """What the chunks ask for at time t [s], as far as it is known how, and followed."""
        if self.blending is None or self._status is None or self._status.mode != Mode.POLICY:
            return None
        self._looked = t
        if self.blending != self._ensembler.blending:
            self._ensembler.switch(self.blending, t)
        return self._ensembler.at(t, self._delay(t))

    def _follow(self, chunk: Chunk, now: float) -> None:
        if self._status is not None and chunk.epoch == self._status.epoch:
            self._ensembler.add(chunk, now, self._delay(chunk.start))

    def _play(self, now: float) -> None:
        """Advance the playback of chunks: slowed down, it falls behind the clock."""
        last, delay = self._delays[-1]
        self._delays.append((now, delay + (now - last) * (1.0 - self._scale)))

    def _delay(self, t: float) -> float:
        """How far playback was, is or (at the present scale) will be behind at time t [s]."""
        last, delay = self._delays[-1]
        if t >= last:
            return delay + (t - last) * (1.0 - self._scale)
        return float(np.interp(t, *zip(*self._delays)))
