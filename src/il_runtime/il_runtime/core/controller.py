"""One arm's controller without its clock, thread and wires: what the node and the lock-step evaluation both run."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from il_policies.contract import Contract
from il_runtime.core.ensembling import Blend, Chunk, ChunkError, Ensembler
from il_runtime.core.mode import TRANSITIONS, Mode
from il_runtime.core.safety import Gate, Ramp

MAX_MISSED = 2
"""Ticks an overrun may cost; after more of them the arm has stopped by itself or does so, and the motion begins anew …"""
MAX_PAUSE = 0.04
"""… unless they are shorter than this together [s]."""
MAX_NON_FINITE = 3
"""Non-finite inputs of one source in a row that latch a fault."""
SPEED_SLEW = 2.0
"""Largest change of the speed scale, in full speeds a second: with it chunks are slowed down within the acceleration limits."""
FAULT_SHOWN = 1.0
"""A shadow shows a fault for so long before it begins anew [s]."""
MAX_WAITING = 8
"""Chunks of a new epoch that wait while the arm still follows the old one's."""
STARVED = 'no fresh chunk'
"""Why a controller has stopped that has run out of chunks."""
SOURCES = ('chunks', 'joint_states', 'teleop')


@dataclass(frozen=True)
class Settings:
    """Times and shares of the controller."""

    tracking_time: float = 0.5
    """A measured joint may be off its command by more than its tracking tolerance for so long [s]."""
    lag_time: float = 0.5
    """A command may lag behind what was asked for by more than the tracking tolerance for so long [s]."""
    blend_time: float = 0.2
    """A new source, policy or human, fades in over this time [s]."""
    teleop_timeout: float = 0.15
    """A human who is silent for longer without having let go has lost control [s]."""
    approach_speed: float = 0.1
    """Share of the velocity and acceleration limits at which a far first command is approached."""


class Controller:
    """Chunks and teleop commands in, one safe command per tick out. Times are seconds of one clock of the caller's choice.

    Nothing moves before `arm`. Every arming, every hand-back by a human, every clock reset and every change of policy issues a
    new epoch, and only chunks that carry it are followed. Not thread-safe: everything is called from the loop.

    An epoch has one policy: the first chunk of another one is not followed, but begins a new epoch. Meanwhile the arm goes on
    along the chunks it has, and takes up the new epoch's, and none of the old, when the first of them covers now. Two planners
    cannot take turns so: while there are several, the policy that was the first after arming stays.

    A shadow's commands are not sent, and the arm does what somebody else wants: at rest a shadow stands where the arm is, and
    when the arm has gone another way it begins anew there; it arms itself, and leaves a fault by itself.
    """

    def __init__(self, contract: Contract, ensembler: Ensembler, first_epoch: int = 1, settings: Settings = Settings(),  # noqa: B008
                 shadow: bool = False):
        joints = contract.action_joints
        self.contract, self.settings, self.shadow = contract, settings, shadow
        self.joints = contract.action.joints
        self.period = 1.0 / contract.control_rate
        self.ensembler = ensembler
        self.gate = Gate([j.position[0] for j in joints], [j.position[1] for j in joints], [j.velocity for j in joints],
                         [j.acceleration for j in joints], self.period)
        self.first_command_tolerance = np.array([j.first_command_tolerance for j in joints])
        self.tracking_tolerance = np.array([j.tracking_tolerance for j in joints])
        self.max_state_age = contract.observations[contract.joint_state].max_age
        # Joints behind a trajectory controller run out to rest when nothing comes; the others stand where they were told.
        on_ramp = {name for output in contract.action.outputs if output.type.endswith('JointTrajectory')
                   for name in output.joints or contract.action.joints}
        self._runs_out = np.array([name in on_ramp for name in self.joints])
        self.mode, self.reason, self.epoch = Mode.INACTIVE, 'started', first_epoch
        self.follows_chunks = False
        self.speed_scale = 1.0
        """Share of full speed that is asked for, 0 to 1."""
        self.scale = 1.0
        """Share of full speed now: follows `speed_scale` smoothly."""
        self.blend: Blend | None = None
        self.clamped: tuple[str, ...] = ()
        self.ticks = self.clamped_ticks = 0
        self.rejected = dict.fromkeys(SOURCES, 0)
        self.begun_anew = 0
        """Times that a shadow was elsewhere than the arm."""
        self.would_fault = 0
        """Faults of a shadow, and commands of it that lagged for so long that a controller would have faulted."""
        self.arms_itself = shadow
        """A shadow does, until it is told to stop or to hold."""
        self._non_finite = dict.fromkeys(SOURCES, 0)
        self._stop_when_at_rest = False
        self._measured: tuple[float, np.ndarray] | None = None
        self._human: tuple[float, np.ndarray] | None = None
        self._human_locked_out = False
        self._held = False
        self._may_approach, self._approached = False, ''
        self._ramp: Ramp | None = None
        self._entered = self._last = 0.0
        self._tracking_since: float | None = None
        self._lagging_since: float | None = None
        self._policy: str | None = None  # that is followed since arming, once there is one
        self._waiting: deque[tuple[Chunk, float, float]] = deque(maxlen=MAX_WAITING)  # and when received, and its delay
        self._delays: deque[tuple[float, float]] = deque([(0.0, 0.0)], maxlen=round(2.0 * contract.control_rate))

    # --- inputs -------------------------------------------------------------------------------------------------------
    def joint_state(self, taken: float, positions: np.ndarray, now: float) -> None:
        """Take positions measured at ``taken`` [s], in action order, shape (D,), finite.

        A stamp ahead of ``now`` counts as now: it must not keep a dead sensor alive.
        """
        self._measured = (min(taken, now), np.asarray(positions, dtype=np.float64))
        self._non_finite['joint_states'] = 0

    def teleop(self, given: float, positions: np.ndarray, now: float) -> None:
        """Take a human's command of time ``given`` [s], shape (D,), finite. While they come, the human is in charge."""
        self._human = (min(given, now), np.asarray(positions, dtype=np.float64))
        self._non_finite['teleop'] = 0

    def release(self) -> None:
        """The human lets go: stop, then the policy goes on under a new epoch."""
        self._human, self._human_locked_out = None, False
        if self.mode != Mode.APPROACH or self._approached == 'teleop':
            self._event('released', 'released by the human')

    def add_chunk(self, chunk: Chunk, now: float, planners: Callable[[], int] = lambda: 1) -> None:
        """Take a checked chunk that has come since the last tick. Raises ChunkError if it is of another epoch or policy.

        planners: how many there are, asked only when a chunk is of another policy than its epoch.
        """
        self._non_finite['chunks'] = 0
        if chunk.epoch != self.epoch:
            raise ChunkError(f'epoch {chunk.epoch}, the current one is {self.epoch}')
        if self._policy not in (None, chunk.policy):
            before = self._policy
            words = f'planned by {chunk.policy!r}, the epoch is that of {before!r}'
            if chunk.end < now:
                raise ChunkError(f'{words}, and it has ended')
            # Both would answer every new epoch with a chunk, and so have it end at once, again and again. And an arm that has
            # stopped, as one's camera has failed, must not set out again for the other.
            if (count := planners()) > 1:
                raise ChunkError(f'{words}, which stays as long as there are {count} planners, or until the arm is armed anew')
            self._new_epoch(goes_on=self.mode == Mode.POLICY)
            self._policy = chunk.policy
            raise ChunkError(f'{words}: {self.epoch} begins for the other')
        self._policy = chunk.policy
        # Fading in from the last tick on, it has weight at the next one already.
        arrival = chunk, max(self._last, now - self.period), self._delay(chunk.start)
        if self.mode != Mode.INACTIVE and self.ensembler.epoch != self.epoch:
            self._waiting.append(arrival)
        else:
            self.ensembler.add(*arrival)

    def reject(self, source: str, non_finite: bool) -> None:
        """Count a message of one of SOURCES that was refused whole; the third non-finite one in a row latches a fault."""
        self.rejected[source] += 1
        if non_finite:
            self._non_finite[source] += 1
            if self._non_finite[source] >= MAX_NON_FINITE:
                self.fault(f'{source}: {MAX_NON_FINITE} non-finite messages in a row')

    # --- services -----------------------------------------------------------------------------------------------------
    def arm(self, now: float, approach: bool = False) -> tuple[bool, str]:
        """Hold the measured pose under a new epoch, or, when held, go on. (False, reason) if that is not safe or not legal.

        approach: a pose outside the limits, and a first command that is too far away, are approached slowly.
        """
        if (self.mode, 'arm') not in TRANSITIONS:
            hint = f': {self.reason}; reset_fault first' if self.mode == Mode.FAULT else ''
            return False, f'cannot arm while {self.mode.name}{hint}'
        if self._state_is_stale(now):
            return False, 'no fresh joint states' + (
                '' if self._measured is None else f': the newest was taken {now - self._measured[0]:.3f} s ago')
        ramp, self._last = None, now
        if self.mode == Mode.INACTIVE:
            measured = self._measured[1]
            off = np.abs(measured - np.clip(measured, self.gate.lower, self.gate.upper))
            outside = self._names(off > self.first_command_tolerance)
            if outside and not approach:
                return False, f'measured pose is outside the position limits: {outside}; arm with approach to go there slowly'
            self.gate.rest(measured)
            self.scale = self.speed_scale
            if approach and off.any():
                try:
                    ramp = self._approach_ramp(measured)
                except RuntimeError as error:
                    return False, f'measured pose is outside the position limits, and there is no slow way back: {error}'
            if self._human is not None and now - self._human[0] > self.settings.teleop_timeout:
                self._human = None  # of an earlier arming
        self._stop_when_at_rest, self._human_locked_out, self._held = False, False, False
        self._tracking_since = self._lagging_since = None
        self._may_approach, self.follows_chunks = approach, True
        self.arms_itself = self.shadow
        self._policy = None
        self._new_epoch()
        self._event('arm', 'armed')
        if ramp is not None:
            self._ramp, self._approached = ramp, 'limits'
            self._event('far', 'slowly back into the position limits')
        return True, f'holding the measured pose, epoch {self.epoch}'

    def hold(self, reason: str = 'told to hold') -> tuple[bool, str]:
        """Come to a bounded stop and follow nothing until armed again."""
        if self.mode in (Mode.INACTIVE, Mode.FAULT):
            return False, f'{self.mode.name}: nothing to hold'
        self.follows_chunks, self._held = False, True
        self.arms_itself = False
        self._event('hold', reason)
        if self.mode == Mode.HOLD:
            self.reason = reason
        return True, 'holding until armed again'

    def stop(self, reason: str = 'told to stop') -> tuple[bool, str]:
        """Come to a bounded stop if moving, then send nothing more. A fault stays a fault."""
        self.arms_itself = False
        if self.mode != Mode.FAULT:
            self._stop_when_at_rest = True
            self._event('stop', reason)
            self.reason = reason
        return True, self.mode.name

    def reset_fault(self) -> tuple[bool, str]:
        """FAULT → INACTIVE, once the arm is at rest; then it can be armed."""
        if self.mode != Mode.FAULT:
            return False, f'there is no fault, the mode is {self.mode.name}'
        if not self.gate.at_rest:
            return False, 'the arm is still stopping'
        self._event('reset', f'fault reset: {self.reason}')
        return True, 'fault reset; arm to go on'

    def fault(self, reason: str) -> None:
        """Latch a fault: bounded stop, then a fixed pose until `reset_fault`."""
        self.would_fault += self.shadow and (self.mode, 'fault') in TRANSITIONS
        self._event('fault', reason)

    def clock_stalled(self) -> None:
        """The clock stands still: come to rest when it goes on, and wait for a chunk planned since."""
        self._forget_chunks()
        self._event('clock', '/clock stands still')

    def clock_jumped(self, now: float) -> None:
        """The clock went back to ``now`` [s]: everything stamped before is void."""
        self._delays = deque([(now, self._delays[-1][1])], maxlen=self._delays.maxlen)
        self._last, self._human = now, None
        if self._measured is not None:
            self._measured = (now, self._measured[1])
        self._tracking_since = self._lagging_since = None
        if self.mode != Mode.INACTIVE:
            self._new_epoch()
        self._event('clock', '/clock jumped back')
        self._ramp = self._stop_ramp()  # a stop that was under way began at a time that is to come

    # --- the tick -----------------------------------------------------------------------------------------------------
    def tick(self, now: float, elapsed: int = 1) -> np.ndarray | None:
        """The command for ``now``, shape (D,), or None while inactive.

        elapsed: control periods since the previous tick. One or two that an overrun loop missed are computed, not sent, so
        that the next command is where the arm should be by now; after more the arm has come to stand, and what was followed
        must be near again.
        """
        self.ticks += 1
        if self.arms_itself:
            self._arm_itself(now)
        missed, armed = elapsed - 1, self.mode != Mode.INACTIVE
        if missed > max(MAX_MISSED, MAX_PAUSE / self.period):
            self._overrun(now, missed)
            missed = 0
        for i in range(missed, -1, -1):
            self._advance(now - i * self.period)
        return self.gate.position if armed else None  # also the one that comes to rest and ends it

    def _advance(self, now: float) -> None:
        self.blend = None
        self._play(now)
        if self.mode == Mode.INACTIVE:
            self._last = now
            return
        try:
            self._watch(now)
            target = self._target(now)
            slowly = self.settings.approach_speed if self.mode == Mode.APPROACH else 1.0
            self.gate.step(target, self.scale * slowly)
        except Exception as error:  # whatever is wrong with a source, the arm comes to a bounded stop
            self.fault(f'internal error: {error!r}')
            self.gate.step(None)
        self.clamped = self._names(self.gate.clamped) if self.gate.clamped.any() else ()
        self.clamped_ticks += bool(self.clamped)
        self._last = now
        self._watch_lag(now)
        if self.gate.at_rest:
            self._event('stopped', self.reason)
            if self._stop_when_at_rest:
                self._event('stop', self.reason)

    def _arm_itself(self, now: float) -> None:
        """Nothing moves by a shadow, so it needs nobody to arm it, or to look after its faults."""
        shown = self.mode == Mode.FAULT and self.gate.at_rest and now - self._entered > FAULT_SHOWN
        if shown and not self._state_is_stale(now):
            self.reset_fault()
        if self.mode == Mode.INACTIVE:
            before = self.reason
            armed, message = self.arm(now)
            self.reason = f'armed by itself; before: {before}' if armed else f'arms itself when it can: {message}'

    def _target(self, now: float) -> np.ndarray | None:
        """What the arm is asked for now, shape (D,), by whoever is in charge; None: stop, or stay."""
        self._heed_human(now)
        if self.ensembler.epoch != self.epoch:
            self._change_policy(now)
        if self.mode == Mode.HOLD and self._human is None and self.follows_chunks:
            self.blend = self.ensembler.at(now, self._delay(now))
            if self.blend is not None:
                self._begin('chunk', self.blend.positions, 'following chunks')
        elif self.mode == Mode.POLICY:
            self.blend = self.ensembler.at(now, self._delay(now))
            # The stop begins while the chunks still cover it.
            if self.blend is None or self.ensembler.covers_until(now) - now < self.gate.stopping_time:
                self.ensembler.clear()
                self._event('starved', STARVED)
        if self.mode == Mode.POLICY:
            return self._faded_in(now, self.blend.positions)
        if self.mode == Mode.TELEOP:
            return self._faded_in(now, self._human[1])
        if self.mode == Mode.APPROACH:
            if now > self._ramp.end and self.gate.at_rest:
                self._event('arrived', 'approached')
            elif self._approached == 'chunk' and self.ensembler.covers_until(now) <= now:
                self._event('starved', 'what was approached has ended: no fresh chunk')
        moving = self.mode in (Mode.STOPPING, Mode.FAULT, Mode.APPROACH) and self._ramp is not None
        return self._ramp.at(now) if moving and now < self._ramp.end + self.period else None

    def _change_policy(self, now: float) -> None:
        """Take up the new epoch's chunks, once one of them covers now or the old ones are not followed any longer."""
        covered = any(chunk.start <= now <= chunk.end for chunk, _, _ in self._waiting)
        if self.mode == Mode.POLICY and not covered:
            return
        self.ensembler.reset(self.epoch)
        while self._waiting:
            self.ensembler.add(*self._waiting.popleft())
        if self.mode == Mode.POLICY:
            blend = self.ensembler.at(now, self._delay(now))
            far = np.abs(blend.positions - self.gate.position) > self.first_command_tolerance
            if far.any():
                self._event('hold', f'the new policy wants to be elsewhere: {self._names(far)}')
            else:
                self.reason = 'following chunks of another policy'
                self._entered, self._ramp = self._last, self._stop_ramp()

    def _heed_human(self, now: float) -> None:
        """Whoever sends teleop commands is in charge, or at least nobody else is."""
        if self._human is None:
            return
        age = now - self._human[0]
        if age > self.settings.teleop_timeout:
            self._human, self.follows_chunks = None, False
            reason = f'teleop fell silent without a release, its newest command is {age:.2f} s old: arm to go on'
            self._event('silent', reason)
            if self.mode == Mode.HOLD:
                self.reason = reason
        elif self._human_locked_out or self._held:
            return
        elif self.mode == Mode.APPROACH and self._approached != 'teleop':
            self._event('hold', 'a human reached for the arm')
        elif self.mode in (Mode.HOLD, Mode.POLICY):
            # A human who reaches for the arm does not want the policy, near enough to be followed or not.
            if not self._begin('teleop', self._human[1], 'a human took over') and self.mode == Mode.POLICY:
                self._event('hold', self.reason)

    def _begin(self, event: str, first: np.ndarray, reason: str) -> bool:
        """Hand control to a source whose first command is ``first``, shape (D,), if that is near; else approach or refuse."""
        off = np.abs(first - self.gate.position)
        if (off <= self.first_command_tolerance).all():
            self._may_approach = False
            self._event(event, reason)
            return True
        worst = int(np.argmax(off / self.first_command_tolerance))
        self.reason = (f'first command refused: {self.joints[worst]} is {off[worst]:.3f} off, '
                       f'tolerance {self.first_command_tolerance[worst]:.3f}')
        if self._may_approach and self.mode == Mode.HOLD:
            try:
                self._ramp, self._approached = self._approach_ramp(first), event
            except RuntimeError as error:
                self.reason += f'; {error}'
            else:
                self._event('far', f'slowly to a first command {off[worst]:.3f} off at {self.joints[worst]}')
        return False

    def _approach_ramp(self, goal: np.ndarray) -> Ramp:
        """From where the arm stands. Raises RuntimeError where there is none, or it would take hours."""
        if self.scale < 0.01:
            raise RuntimeError(f'speed_scale is {100 * self.scale:g} %, too slow to approach')
        return self.gate.approach_ramp(self._last, goal, self.settings.approach_speed * self.scale)

    def _faded_in(self, now: float, target: np.ndarray) -> np.ndarray:
        """From what the arm did before, brought to rest, over to the new source."""
        passed = (now - self._entered) / self.settings.blend_time
        if passed >= 1:
            return target
        share = passed * passed * (3 - 2 * passed)  # without a step of velocity at either end
        return share * target + (1 - share) * self._ramp.at(now)

    def _event(self, event: str, reason: str) -> None:
        after = TRANSITIONS.get((self.mode, event))
        if after is None:
            return
        before, self.mode, self.reason = self.mode, after, reason
        if after in (Mode.POLICY, Mode.TELEOP, Mode.STOPPING, Mode.FAULT):
            self._entered, self._ramp = self._last, self._stop_ramp()
        if before == Mode.TELEOP:
            self._new_epoch()
        elif after == Mode.TELEOP:
            self.ensembler.clear()
        if self._stop_when_at_rest and after == Mode.INACTIVE:
            self._stop_when_at_rest = False

    def _stop_ramp(self) -> Ramp | None:
        try:
            return self.gate.stop_ramp(self._last)
        except RuntimeError:
            return None  # the gate brakes by itself

    def _new_epoch(self, goes_on: bool = False) -> None:
        """goes_on: along the chunks of the old epoch, until the new one has its first."""
        self.epoch += 1
        self._waiting.clear()
        if not goes_on:
            self.ensembler.reset(self.epoch)

    def _forget_chunks(self) -> None:
        self.ensembler.clear()
        self._waiting.clear()

    def _overrun(self, now: float, missed: int) -> None:
        """Meanwhile the arm has stood where it was last told to be, or has run out: come to rest from there."""
        self.gate.pause(missed, self._runs_out)
        self._forget_chunks()
        if self._measured is not None and not self._state_is_stale(self._last):
            # What was sent meanwhile is still on its way into this process: its age is what it was before the pause.
            self._measured = (self._measured[0] + now - self._last, self._measured[1])
        self._last = now - self.period
        self._event('overrun', 'the loop was paused')
        self._ramp = self._stop_ramp()

    def _play(self, now: float) -> None:
        """Advance the playback of chunks: slowed down, it falls behind the clock."""
        step = SPEED_SLEW * self.period
        self.scale += min(max(self.speed_scale - self.scale, -step), step)
        self._delays.append((now, self._delays[-1][1] + (1.0 - self.scale) * self.period))

    def _delay(self, t: float) -> float:
        """How far playback was, is or (at the present scale) will be behind at time t [s]."""
        last, delay = self._delays[-1]
        if t >= last:
            return delay + (t - last) * (1.0 - self.scale)
        return float(np.interp(t, *zip(*self._delays)))

    # --- watching -----------------------------------------------------------------------------------------------------
    def _state_is_stale(self, now: float) -> bool:
        return self._measured is None or now - self._measured[0] > self.max_state_age

    def _watch(self, now: float) -> None:
        """Latch a fault when the arm is blind or does not follow."""
        if self._state_is_stale(now):
            self.fault(f'joint states older than {self.max_state_age:.3f} s')
            return
        off = np.abs(self._measured[1] - self.gate.position) > self.tracking_tolerance
        if self.shadow:
            if self.mode == Mode.HOLD:
                self.gate.rest(self._measured[1])
            elif off.any() and self.mode != Mode.FAULT:
                self._begin_anew(f'the arm has gone another way: {self._names(off)}')
            return
        self._tracking_since = _since(self._tracking_since, off.any(), now)
        if _longer(self._tracking_since, now, self.settings.tracking_time):
            self.fault(f'joints do not follow their command: {self._names(off)}')

    def _watch_lag(self, now: float) -> None:
        """A source that keeps asking for what the limits forbid is not followed any longer."""
        off = self.gate.lag > self.tracking_tolerance
        following = self.mode in (Mode.POLICY, Mode.TELEOP)
        self._lagging_since = _since(self._lagging_since, following and off.any(), now)
        if _longer(self._lagging_since, now, self.settings.lag_time):
            reason = f'the command lags behind what is asked for: {self._names(off)}'
            if self.shadow:
                self.would_fault += 1
                self._begin_anew(f'a controller would have faulted: {reason}')
            elif self.mode == Mode.POLICY:
                self.fault(reason)
            else:
                self._human_locked_out = True  # until released
                self._event('released', reason)

    def _begin_anew(self, why: str) -> None:
        """A shadow goes to rest where the arm is; the policy goes on from there once its command is near."""
        self.begun_anew += 1
        self.gate.rest(self._measured[1])
        self._lagging_since = None
        self._event('hold', f'begun anew at the measured pose: {why}')

    def _names(self, chosen: np.ndarray) -> tuple[str, ...]:
        return tuple(name for name, is_chosen in zip(self.joints, chosen, strict=True) if is_chosen)


def _since(since: float | None, true: bool, now: float) -> float | None:
    """Since when something is true without a break."""
    return None if not true else now if since is None else since


def _longer(since: float | None, now: float, time: float) -> bool:
    return since is not None and now - since > time
