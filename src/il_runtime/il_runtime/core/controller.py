"""One arm's controller without its clock, thread and wires: what the node and the lock-step evaluation both run."""
from __future__ import annotations

import numpy as np

from il_policies.contract import Contract
from il_runtime.core.ensembling import Blend, Chunk, Ensembler
from il_runtime.core.mode import TRANSITIONS, Mode
from il_runtime.core.safety import Gate


class Controller:
    """Chunks in, one safe command per tick out. Times are seconds of one clock of the caller's choice.

    Nothing moves before `arm`. Every arming issues a new epoch, and only chunks that carry it are followed.
    """

    def __init__(self, contract: Contract, ensembler: Ensembler, first_epoch: int = 1, tracking_time: float = 0.5):
        """tracking_time: a measured joint may be off its command by more than its tolerance for so long [s]."""
        joints = contract.action_joints
        self.contract = contract
        self.joints = contract.action.joints
        self.period = 1.0 / contract.control_rate
        self.ensembler = ensembler
        self.gate = Gate([j.position[0] for j in joints], [j.position[1] for j in joints], [j.velocity for j in joints],
                         [j.acceleration for j in joints], self.period)
        self.first_command_tolerance = np.array([j.first_command_tolerance for j in joints])
        self.tracking_tolerance = np.array([j.tracking_tolerance for j in joints])
        self.tracking_time = tracking_time
        self.max_state_age = contract.observations[contract.joint_state].max_age + self.period
        self.mode, self.reason, self.epoch = Mode.INACTIVE, 'started', first_epoch
        self.blend: Blend | None = None
        self.ticks = self.clamped_ticks = 0
        self._disarm_when_stopped = False
        self._measured: tuple[float, np.ndarray] | None = None
        self._tracking_since: float | None = None

    def joint_state(self, now: float, positions: np.ndarray) -> None:
        """Take measured positions in action order, shape (D,); non-finite ones are ignored, and so grow stale."""
        if np.isfinite(positions).all():
            self._measured = (now, np.asarray(positions, dtype=np.float64))

    def arm(self, now: float) -> tuple[bool, str]:
        """Hold the measured pose under a new epoch. (False, reason) if that is not safe or not legal now."""
        if (self.mode, 'arm') not in TRANSITIONS:
            return False, f'cannot arm while {self.mode.name}' + (': ' + self.reason if self.mode == Mode.FAULT else '')
        if self._state_is_stale(now):
            return False, 'no fresh joint states'
        measured = self._measured[1]
        held = np.clip(measured, self.gate.lower, self.gate.upper)
        outside = np.abs(measured - held) > self.first_command_tolerance
        if outside.any():
            names = [name for name, out in zip(self.joints, outside, strict=True) if out]
            return False, f'measured pose is outside the position limits: {names}'
        self.gate.rest(held)
        self.epoch += 1
        self.ensembler.reset(self.epoch)
        self._disarm_when_stopped = False
        self._tracking_since = None
        self._event('arm', 'armed')
        return True, f'holding the measured pose, epoch {self.epoch}'

    def disarm(self, reason: str = 'disarmed') -> None:
        """Come to a bounded stop if moving, then send nothing more."""
        self._disarm_when_stopped = True
        if self.mode == Mode.FAULT and not self.gate.at_rest:
            return  # the stop goes on; tick() lets go at rest
        self._event('disarm', reason)

    def add_chunk(self, chunk: Chunk, now: float) -> None:
        """Take a checked chunk. Raises ChunkError if it is of another epoch."""
        self.ensembler.add(chunk, now)

    def tick(self, now: float, elapsed: int = 1) -> np.ndarray | None:
        """The command for ``now``, shape (D,), or None while inactive.

        elapsed: control periods since the previous tick. The ticks that an overrun loop missed are computed, not sent, so
        that the next command is where the arm should be by now; after more than two missed ones the motion resumes from
        where the command stood.
        """
        self.ticks += 1
        missed = elapsed - 1 if elapsed <= 3 else 0
        for i in range(missed, -1, -1):
            self._advance(now - i * self.period)
        return None if self.mode == Mode.INACTIVE else self.gate.position

    def _advance(self, now: float) -> None:
        self.blend = None
        if self.mode == Mode.INACTIVE:
            return
        self._watch(now)
        if self.mode in (Mode.HOLD, Mode.POLICY):
            self.blend = self.ensembler.at(now)
        if self.mode == Mode.POLICY:
            # The stop begins while the chunks still cover it.
            if self.blend is None or self.ensembler.end - now < self.gate.stopping_time:
                self.ensembler.clear()
                self._event('starved', 'no fresh chunk')
        elif self.mode == Mode.HOLD and self.blend is not None:
            self._follow_if_near(self.blend.positions)
        clamped = self.gate.step(self.blend.positions if self.mode == Mode.POLICY else None)
        self.clamped_ticks += clamped
        if self.gate.at_rest:
            if self.mode == Mode.STOPPING:
                self._event('stopped', self.reason)
            if self._disarm_when_stopped:
                self._event('disarm', self.reason)

    def _event(self, event: str, reason: str) -> None:
        after = TRANSITIONS.get((self.mode, event))
        if after is not None:
            self.mode, self.reason = after, reason

    def _state_is_stale(self, now: float) -> bool:
        return self._measured is None or now - self._measured[0] > self.max_state_age

    def _watch(self, now: float) -> None:
        """Latch a fault when the arm is blind or does not follow."""
        if self._state_is_stale(now):
            self._event('fault', f'joint states older than {self.max_state_age:.3f} s')
            return
        off = np.abs(self._measured[1] - self.gate.position) > self.tracking_tolerance
        if not off.any():
            self._tracking_since = None
        elif self._tracking_since is None:
            self._tracking_since = now
        elif now - self._tracking_since > self.tracking_time:
            names = [name for name, out in zip(self.joints, off, strict=True) if out]
            self._event('fault', f'joints do not follow their command: {names}')

    def _follow_if_near(self, first: np.ndarray) -> None:
        """HOLD → POLICY, unless the policy would start too far away."""
        off = np.abs(first - self.gate.position)
        far = off > self.first_command_tolerance
        if far.any():
            worst = int(np.argmax(off / self.first_command_tolerance))
            self.reason = (f'first command refused: {self.joints[worst]} is {off[worst]:.3f} off, '
                           f'tolerance {self.first_command_tolerance[worst]:.3f}')
        else:
            self._event('chunk', 'following chunks')
