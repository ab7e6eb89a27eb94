"""Each guard of the core is removed in turn; a unit test must notice. What survives here is protected by nobody."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from support import ROOT

CORE = ROOT / 'src/il_runtime/il_runtime/core'
TESTS = {'safety': ('test_guards', 'test_safety', 'test_controller'), 'clock': ('test_clock',),
         'mode': ('test_controller', 'test_guards'), 'controller': ('test_guards', 'test_controller', 'test_shadow'),
         'shadow': ('test_shadow',),
         'ensembling': ('test_guards', 'test_ensembling', 'test_controller'), 'teleop': ('test_teleop', 'test_guards')}
"""The unit tests that watch over a file, the likeliest first; test_mode compares tables and would catch any change."""


class Guard(NamedTuple):
    """A check, by the text that makes it and the text without it; the text occurs once in its file."""

    file: str
    name: str
    text: str
    without: str


GUARDS = [Guard(file, *guard) for file, guards in {
    'safety': [
        # --- limits of one tick
        ('a stop from beyond a bound is no square root of a negative', 'np.maximum(distance, 0.0)', 'distance'),
        ('nothing rests at NaN', 'if not np.isfinite(positions).all():', 'if False:'),
        ('nothing is asked to go to NaN', 'if not np.isfinite(asked).all():', 'if False:'),
        ('a joint beyond a limit is not pushed back',
         'np.minimum(self.lower, self.position), np.maximum(self.upper, self.position)', 'self.lower, self.upper'),
        ('velocity limit', 'most = np.maximum(self.max_velocity * speed,', 'most = np.maximum(np.inf,'),
        ('share of the velocity limit', 'self.max_velocity * speed, np.abs', 'self.max_velocity, np.abs'),
        ('a lower share is reached by braking', 'np.abs(self.velocity) - change)\n', '0.0)\n'),
        ('deceleration limit', 'np.maximum(self.velocity - change, -most)', '-most'),
        ('acceleration limit', 'np.minimum(self.velocity + change, most)', 'most'),
        ('a stop fits before the lower bound',
         'low = np.maximum(low, -stopping_speed(self.position - self.lower, self.max_acceleration, self.period))', 'pass'),
        ('a stop fits before the upper bound',
         'high = np.minimum(high, stopping_speed(self.upper - self.position, self.max_acceleration, self.period))', 'pass'),
        ('what is wanted is bounded', 'np.minimum(np.maximum(wanted, low), high)', 'wanted'),
        ('the bound is exact', 'np.minimum(np.maximum(self.position + self.velocity * self.period, lowest), highest)',
         'self.position + self.velocity * self.period'),
        ('a request beyond the bounds is cut', 'target = np.minimum(np.maximum(asked, lowest), highest)', 'target = asked'),
        ('lag counts what the bounds cut off', 'np.abs(asked - self.position)', 'np.abs(target - self.position)'),
        # --- motions to rest
        ('a ramp has not begun before it begins', 'max(t - self._began, 0.0)', '(t - self._began)'),
        ('a stop stays within the bounds', 'if (rest < self.lower).any() or (rest > self.upper).any():', 'if False:'),
        ('an approach ends within the bounds', 'np.clip(goal, self.lower, self.upper)', 'goal'),
        ('an approach is slow', 'self.max_velocity * speed, self.max_acceleration * speed)',
         'self.max_velocity, self.max_acceleration * speed)'),
        ('an approach is gentle', 'self.max_velocity * speed, self.max_acceleration * speed)',
         'self.max_velocity * speed, self.max_acceleration)'),
        ('a motion that Ruckig did not plan is an error', 'except (RuckigError, ValueError) as error:',
         'except MemoryError as error:'),
        ('a ramp is followed from where it starts',
         'self._target = self.position  # the ramp starts here, whatever was asked for before', 'pass'),
        ('running out stays within the bounds',
         'np.minimum(np.maximum(velocity, np.maximum(low, -most)), np.minimum(high, most))',
         'np.minimum(np.maximum(velocity, -most), most)'),
        ('running out keeps the velocity limit',
         'np.minimum(np.maximum(velocity, np.maximum(low, -most)), np.minimum(high, most))',
         'np.minimum(np.maximum(velocity, low), high)'),
        ('what comes to rest does not turn round', 'velocity[velocity * self.velocity <= 0] = 0.0', 'pass'),
        ('a ramp is not cut short by whole milliseconds', 'np.ceil(braking[braking > 0] * 1e3)',
         'np.floor(braking[braking > 0] * 1e3)'),
        ('a joint at rest runs out to where it is', 'np.maximum(np.abs(velocity) / self.max_acceleration, 1e-12)',
         'np.abs(velocity) / self.max_acceleration'),
        ('stopping takes the slowest joint, and a tick',
         'float(np.max(np.abs(self.velocity) / self.max_acceleration)) + self.period', '0.0'),
        ('at rest means all joints', 'return not self.velocity.any()', 'return not self.velocity.all()'),
    ],
    'clock': [
        ('a stamp from the past of another clock is refused', 'if abs(age) > MAX_STAMP_OFFSET:', 'if -age > MAX_STAMP_OFFSET:'),
        ('a stamp from the future of another clock is refused', 'if abs(age) > MAX_STAMP_OFFSET:', 'if age > MAX_STAMP_OFFSET:'),
        ('every stamp is looked at', 'for stamp in stamps:', 'for stamp in stamps[:1]:'),
        ('stamps are even while the wall clock is slewed', 'abs(offset - self._offset) > SLEW[moving] * 1e9', 'True'),
        ('a pause is no step of a clock', 'undisturbed = self._loop_ns() - before < 200_000', 'undisturbed = True'),
    ],
    'mode': [
        # --- transitions without which something would go on
        ('without chunks the policy ends', "    (Mode.POLICY, 'starved'): Mode.STOPPING,\n", ''),
        ('a human who lets go is obeyed', "    (Mode.TELEOP, 'released'): Mode.STOPPING,\n", ''),
        ('a human who falls silent has lost control', "for event in ('silent', 'hold', 'stop', 'clock', 'overrun')",
         "for event in ('hold', 'stop', 'clock', 'overrun')"),
        ('hold stops what moves', "for event in ('silent', 'hold', 'stop', 'clock', 'overrun')",
         "for event in ('silent', 'stop', 'clock', 'overrun')"),
        ('stop stops what moves', "for event in ('silent', 'hold', 'stop', 'clock', 'overrun')",
         "for event in ('silent', 'hold', 'clock', 'overrun')"),
        ('a clock that fails stops what moves', "for event in ('silent', 'hold', 'stop', 'clock', 'overrun')",
         "for event in ('silent', 'hold', 'stop', 'overrun')"),
        ('a long pause ends what moved', "for event in ('silent', 'hold', 'stop', 'clock', 'overrun')",
         "for event in ('silent', 'hold', 'stop', 'clock')"),
        ('an approach ends with its chunk', "    (Mode.APPROACH, 'starved'): Mode.STOPPING,\n", ''),
        ('a human who lets go ends an approach', "    (Mode.APPROACH, 'released'): Mode.STOPPING,\n", ''),
        ('a human takes over from the policy', "    (Mode.POLICY, 'teleop'): Mode.TELEOP,\n", ''),
        ('a fault stops what moves', '(Mode.HOLD, *_MOVING, Mode.STOPPING)}', '(Mode.HOLD, Mode.STOPPING)}'),
        ('a held arm can fault', '(Mode.HOLD, *_MOVING, Mode.STOPPING)}', '(*_MOVING, Mode.STOPPING)}'),
        ('a stopping arm can fault', '(Mode.HOLD, *_MOVING, Mode.STOPPING)}', '(Mode.HOLD, *_MOVING)}'),
        ('a fault is latched', "(Mode.FAULT, 'reset'): Mode.INACTIVE,",
         "(Mode.FAULT, 'reset'): Mode.INACTIVE, (Mode.FAULT, 'stopped'): Mode.HOLD,"),
        ('a fault is not left by arming', "(Mode.FAULT, 'reset'): Mode.INACTIVE,",
         "(Mode.FAULT, 'reset'): Mode.INACTIVE, (Mode.FAULT, 'arm'): Mode.HOLD,"),
    ],
    'controller': [
        # --- inputs
        ('a clock ahead keeps no dead sensor alive', '(min(taken, now),', '(taken,'),
        ('a clock ahead keeps no silent human in charge', '(min(given, now),', '(given,'),
        ('the third non-finite message latches', 'if self._non_finite[source] >= MAX_NON_FINITE:', 'if False:'),
        # --- another policy
        ('an epoch that has passed has passed', 'if chunk.epoch != self.epoch:', 'if False:'),
        ('an epoch has one policy', 'if self._policy not in (None, chunk.policy):', 'if False:'),
        ('what has ended begins no epoch', 'if chunk.end < now:', 'if False:'),
        ('two planners do not take turns', 'if (count := planners()) > 1:', 'if False:'),
        ('whoever arms may have another planner', '        self._policy = None\n        self._new_epoch()',
         '        self._new_epoch()'),
        ('another policy waits until it covers now', 'if self.mode == Mode.POLICY and not covered:', 'if False:'),
        ('while it waits nothing mixes', 'if self.mode != Mode.INACTIVE and self.ensembler.epoch != self.epoch:', 'if False:'),
        ('another policy far away is not followed', 'if far.any():', 'if False:'),
        ('another policy is faded in',
         'self._entered, self._ramp = self._last, self._stop_ramp()\n\n    def _heed',
         'pass\n\n    def _heed'),
        # --- services
        ('arming is legal only where the table says', "if (self.mode, 'arm') not in TRANSITIONS:", 'if False:'),
        ('arming needs fresh joint states', '        if self._state_is_stale(now):\n            return False,',
         '        if False:\n            return False,'),
        ('a pose outside the limits is refused', 'if outside and not approach:', 'if False:'),
        ('arming begins at the measured pose', '            self.gate.rest(measured)\n', ''),
        ('an arming forgets an older stop', 'self._stop_when_at_rest, self._human_locked_out, self._held = False, False, False',
         'self._human_locked_out, self._held = False, False'),
        ('an arming forgets an earlier human', 'self._human = None  # of an earlier arming', 'pass'),
        ('every arming is a new epoch', "        self._new_epoch()\n        self._event('arm', 'armed')",
         "        self._event('arm', 'armed')"),
        ('what is too far is approached only if allowed', 'self._may_approach, self.follows_chunks = approach, True',
         'self._may_approach, self.follows_chunks = True, True'),
        ('from outside the limits the way back is slow', 'if approach and off.any():', 'if False:'),
        ('without a slow way back there is no arming', 'except RuntimeError as error:\n                    return',
         'except MemoryError as error:\n                    return'),
        ('hold is until armed', 'self.follows_chunks, self._held = False, True', 'self._held = True'),
        ('hold is for the human, too', 'self.follows_chunks, self._held = False, True', 'self.follows_chunks = False'),
        ('after a stop nothing is sent', 'self._stop_when_at_rest = True', 'pass'),
        ('a fault is no stop', 'if self.mode != Mode.FAULT:\n            self._stop_when',
         'if True:\n            self._stop_when'),
        ('a fault is reset at rest', "if not self.gate.at_rest:\n            return False, 'the arm",
         "if False:\n            return False, 'the arm"),
        # --- clocks
        ('a clock that stalls voids chunks', "        self._forget_chunks()\n        self._event('clock'",
         "        self._event('clock'"),
        ('a clock that stalls stops the arm', "self._event('clock', '/clock stands still')", 'pass'),
        ('a clock that jumps stops the arm', "self._event('clock', '/clock jumped back')", 'pass'),
        ('a clock that jumps is a new epoch', 'if self.mode != Mode.INACTIVE:\n            self._new_epoch()', 'pass'),
        ('a clock that jumps voids the human', 'self._last, self._human = now, None', 'self._last = now'),
        ('a stop goes on after the clock jumped',
         'self._ramp = self._stop_ramp()  # a stop that was under way began at a time that is to come', 'pass'),
        ('after a jump playback is not behind', 'self._delays = deque([(now, self._delays[-1][1])], maxlen=self._delays.maxlen)',
         'pass'),
        # --- the tick
        ('a long pause is not made up for', 'if missed > max(MAX_MISSED, MAX_PAUSE / self.period):', 'if False:'),
        ('nothing is sent before arming', 'return self.gate.position if armed else None', 'return self.gate.position'),
        ('whatever breaks inside is caught', 'except Exception as error:', 'except MemoryError as error:'),
        ('whatever breaks inside is a fault', "self.fault(f'internal error: {error!r}')", 'pass'),
        ('whatever breaks inside, the arm brakes', '            self.gate.step(None)\n', '            pass\n'),
        ('the arm is watched', '            self._watch(now)\n', ''),
        ('lag is watched', '        self._watch_lag(now)\n', ''),
        ('at rest, a stop is over', "            if self._stop_when_at_rest:\n                self._event('stop', self.reason)\n",
         ''),
        ('chunks are followed only while that is wanted', ' and self.follows_chunks:', ':'),
        ('chunks are not followed while a human is there', 'self.mode == Mode.HOLD and self._human is None and',
         'self.mode == Mode.HOLD and'),
        ('the stop begins while the chunks cover it',
         'if self.blend is None or self.ensembler.covers_until(now) - now < self.gate.stopping_time:', 'if self.blend is None:'),
        ('what was too short to go on with is dropped',
         "                self.ensembler.clear()\n                self._event('starved'",
         "                self._event('starved'"),
        ('an approach is over at rest', 'now > self._ramp.end and self.gate.at_rest:', 'now > self._ramp.end:'),
        # --- the human
        ('silence ends teleop', 'if age > self.settings.teleop_timeout:', 'if False:'),
        ('after silence nothing is followed until armed', 'self._human, self.follows_chunks = None, False', 'self._human = None'),
        ('who is locked out is not followed', 'elif self._human_locked_out or self._held:', 'elif self._held:'),
        ('who was told to hold is not followed', 'elif self._human_locked_out or self._held:', 'elif self._human_locked_out:'),
        ('who reaches for the arm does not want it to approach',
         "elif self.mode == Mode.APPROACH and self._approached != 'teleop':", 'elif False:'),
        ("who lets go does not end another's approach", "if self.mode != Mode.APPROACH or self._approached == 'teleop':",
         'if True:'),
        ('an approach to a chunk ends with it', "elif self._approached == 'chunk' and self.ensembler.covers_until(now) <= now:",
         'elif False:'),
        ('who reaches for the arm does not want the policy', "                self._event('hold', self.reason)\n",
         '                pass\n'),
        # --- taking over
        ('a first chunk must be near', 'if (off <= self.first_command_tolerance).all():',
         "if event == 'chunk' or (off <= self.first_command_tolerance).all():"),
        ('a first teleop command must be near', 'if (off <= self.first_command_tolerance).all():',
         "if event == 'teleop' or (off <= self.first_command_tolerance).all():"),
        ('what was allowed is one approach', 'self._may_approach = False\n            self._event(event', 'self._event(event'),
        ('nothing is approached unless allowed', 'if self._may_approach and self.mode', 'if self.mode'),
        ('nothing is approached at no speed', 'if self.scale < 0.01:', 'if False:'),
        ('approaches heed the speed scale', 'self.settings.approach_speed * self.scale)', 'self.settings.approach_speed)'),
        ('whatever is planned, an approach is slow', 'self.scale * slowly', 'self.scale'),
        ('a new source fades in', 'if passed >= 1:', 'if True:'),
        ('an event that is not legal changes nothing', 'if after is None:\n            return',
         'if after is None:\n            after = Mode.HOLD'),
        ('a stop is planned', 'Mode.POLICY, Mode.TELEOP, Mode.STOPPING, Mode.FAULT):\n            self._entered',
         'Mode.POLICY, Mode.TELEOP):\n            self._entered'),
        ('a hand-back is a new epoch', 'if before == Mode.TELEOP:\n            self._new_epoch()',
         'if before == Mode.TELEOP:\n            pass'),
        ('a stop that cannot be planned is still one', 'except RuntimeError:', 'except MemoryError:'),
        # --- pauses, speed, watching
        ('after a pause the arm is where its ramp took it', 'self.gate.pause(missed, self._runs_out)',
         'self.gate.pause(missed, ~self._runs_out)'),
        ('after a pause the arm has braked', 'self.gate.pause(missed, self._runs_out)', 'pass'),
        ('those of another policy that wait are void then, too', '        self._waiting.clear()\n\n', '\n'),
        ('after a pause old chunks are void', '        self._forget_chunks()\n        if self._measured is not',
         '        if self._measured is not'),
        ('after a pause the mode begins anew', "self._event('overrun', 'the loop was paused')", 'pass'),
        ('after a pause an old ramp is void', "'the loop was paused')\n        self._ramp = self._stop_ramp()",
         "'the loop was paused')"),
        ('speed changes smoothly', 'self.scale += min(max(self.speed_scale - self.scale, -step), step)',
         'self.scale = self.speed_scale'),
        ('chunks are played slowly', '(1.0 - self.scale) * self.period))', '0.0))'),
        ('joint states must be fresh', 'or now - self._measured[0] > self.max_state_age', ''),
        ('an arm that does not follow faults', 'if _longer(self._tracking_since, now, self.settings.tracking_time):',
         'if False:'),
        ('a policy that asks for the impossible faults', 'if self.mode == Mode.POLICY:\n                self.fault(reason)',
         'if self.mode == Mode.POLICY:\n                pass'),
        ('a human who asks for the impossible is stopped', "                self._event('released', reason)",
         '                pass'),
        ('who asked for the impossible is locked out', 'self._human_locked_out = True  # until released', 'pass'),
        # --- as a shadow
        ('only a shadow arms itself', 'self.arms_itself = shadow', 'self.arms_itself = True'),
        ('an armed controller does not arm itself', 'self.arms_itself = self.shadow', 'self.arms_itself = True'),
        ('a shadow told to hold waits to be armed',
         'self.follows_chunks, self._held = False, True\n        self.arms_itself = False',
         'self.follows_chunks, self._held = False, True'),
        ('a shadow told to stop waits to be armed', 'self.arms_itself = False\n        if self.mode != Mode.FAULT:',
         'if self.mode != Mode.FAULT:'),
        ('a fault of a shadow is shown', 'and now - self._entered > FAULT_SHOWN', ''),
        ('a blind shadow stays where it is', 'if shown and not self._state_is_stale(now):', 'if shown:'),
        ('only a shadow is not watched', 'if self.shadow:\n            if self.mode', 'if True:\n            if self.mode'),
        ('a shadow at rest stands where the arm is',
         'if self.mode == Mode.HOLD:\n                self.gate.rest(self._measured[1])',
         'if self.mode == Mode.HOLD:\n                pass'),
        ('a shadow that is elsewhere begins anew', 'elif off.any() and self.mode != Mode.FAULT:', 'elif False:'),
        ('a shadow begins anew where the arm is', 'self.begun_anew += 1\n        self.gate.rest(self._measured[1])',
         'self.begun_anew += 1'),
        ('what lags is a fault of all but a shadow', 'if self.shadow:\n                self.would_fault',
         'if True:\n                self.would_fault'),
        ('a shadow tells what would have been a fault', 'self.would_fault += self.shadow and', 'self.would_fault += False and'),
    ],
    'shadow': [
        ('nothing is compared across a gap', 'self._times[i] - self._times[i - 1] > self._max_gap', 'False'),
        ('nothing is compared where there is no target', 'return found if np.isfinite(found).all() else None', 'return found'),
        ('a track forgets', 'if self._times[0] < t - 2 * REMEMBERED:', 'if False:'),
        ('a track goes forward', 'if self._times and t <= self._times[-1]:', 'if False:'),
        ('a chunk is compared where it reaches', 'if chunk.start - 1e-9 <= t <= chunk.end + 1e-9:', 'if True:'),
        ('what is never answered is not kept', 'deque(maxlen=2000)', 'deque()'),
        ('what is yet to come waits', 'if not track.reaches(t):', 'if False:'),
    ],
    'ensembling': [
        # --- what is let in
        ('NaN is refused', 'if not (np.abs(positions) <= MAX_MAGNITUDE).all():', 'if (np.abs(positions) > MAX_MAGNITUDE).any():'),
        ('absurd numbers are refused', 'if not (np.abs(positions) <= MAX_MAGNITUDE).all():',
         'if not np.isfinite(positions).all():'),
        ('values of a chunk are looked at', '    check_finite(positions)\n    return', '    return'),
        ('doubled names are refused', 'if sorted(names) != sorted(joints):', 'if set(names) != set(joints):'),
        ('missing names are refused', 'if sorted(names) != sorted(joints):', 'if not set(names) <= set(joints):'),
        ('unknown names are refused', 'if sorted(names) != sorted(joints):', 'if not set(names) >= set(joints):'),
        ('columns go by name', '[:, [names.index(name) for name in joints]]', ''),
        ('a period is finite', 'if not (np.isfinite(step_period) and step_period > 0):', 'if step_period <= 0:'),
        ('a period is positive', 'if not (np.isfinite(step_period) and step_period > 0):', 'if not np.isfinite(step_period):'),
        ('a chunk is not endless', 'if (horizon - 1) * step_period > MAX_LENGTH:', 'if False:'),
        ('a chunk has steps', 'if horizon < 1 or positions.size', 'if positions.size'),
        ('a chunk has the size it says', ' or positions.size != horizon * len(names):', ':'),
        ('only modes that exist', 'if self.mode not in MODES:', 'if False:'),
        ('m is finite and not negative', 'if not (np.isfinite(self.m) and self.m >= 0):', 'if False:'),
        ('seam is finite and positive', 'if not (np.isfinite(self.seam) and self.seam > 0):', 'if False:'),
        ('max_disagreement is positive', 'if not self.max_disagreement > 0:', 'if False:'),
        ('chunks of another epoch are refused', 'if chunk.epoch != self.epoch:', 'if False:'),
        ('a doubled chunk changes nothing', 'if key not in self._seen and chunk.end', 'if chunk.end'),
        ('what has ended is forgotten', '{known: end for known, end in self._seen.items() if end >= now}', 'self._seen'),
        ('a reset forgets', '        self.epoch, self._switched = epoch, -np.inf\n        self.clear()\n',
         '        self.epoch, self._switched = epoch, -np.inf\n'),
        ('a chunk covers no gap', 'if member.chunk.start <= until:', 'if True:'),
        # --- what counts
        ('a chunk ends', 'if member.chunk.end < t or', 'if'),
        ('slow is never stale', 'if member.chunk.end < t or', 'if member.chunk.end < t - (delay - member.delay) or'),
        ('a chunk has not begun before it begins', ' if m.chunk.start <= t]', ']'),
        ('a chunk is held beyond its end', '/ self.period, 0.0), len(positions) - 1.0)', '/ self.period, 0.0), 1e9)'),
        ('a chunk is held before its start', 'min(max((t - self.start) / self.period, 0.0),',
         'min((t - self.start) / self.period,'),
        ('chunks that disagree are not averaged', 'if disagreement > self.blending.max_disagreement:', 'if False:'),
        ('chunks that agree with the newest stay', 'if self._disagreement(points[standing]) > self.blending.max_disagreement:',
         'if True:'),
        ('the newest that is left counts again', 'newest.retired = np.inf', 'pass'),
        ('an older chunk that comes late and disagrees never counts', '(min(t, member.retired) - member.since)',
         '(t - member.since)'),
        ('a chunk fades in', 'min(max(min(entering, leaving, 1.0), 0.0), 1.0)', 'min(max(min(leaving, 1.0), 0.0), 1.0)'),
        ('a chunk fades out', 'min(max(min(entering, leaving, 1.0), 0.0), 1.0)', 'min(max(min(entering, 1.0), 0.0), 1.0)'),
        ('a chunk that disagrees fades out', '1.0 - (t - member.retired) / self._seam(blending) if t >', '0.0 if t >'),
        ('a chunk alone counts in full', 'faded if faded.sum() > 1e-9 * base.sum() else base', 'faded'),
        ('another way of blending fades in', 'if fraction < 1:', 'if False:'),
    ],
    'teleop': [
        # --- the dead-man switch
        ('what is held from the start was not pressed', 'self._held = True  #', 'self._held = False  #'),
        ('lost inputs are no release', 'if lost:\n                self', 'if False:\n                self'),
        ('who lost the arm does not hand it back for others', 'elif self._published and not others:', 'elif self._published:'),
        ('a release is repeated', 'self._releases = RELEASES', 'self._releases = 1'),
        ('a pause loses the hold', 'if pause > PAUSE_S else', 'if False else'),
        ('lost inputs lose the hold', 'lost or paused or', 'paused or'),
        ('lost inputs begin nothing', 'self._wait(now, lost or', 'self._wait(now,'),
        ('a silent controller is not driven', 'if now - self._heard > SILENT_S:', 'if False:'),
        ('a controller that is not armed is not driven', 'if self._mode in (Mode.INACTIVE, Mode.FAULT):', 'if False:'),
        ('without a command there is nowhere to begin', 'if now - self._commanded > SILENT_S:', 'if False:'),
        ('another human is not driven over', 'if not problem and self._mode not in (Mode.HOLD, Mode.POLICY):', 'if False:'),
        ('when the controller stops following, so does the human', 'if self._followed and not in_charge:', 'if False:'),
        ('what was lost must be let go', 'self._grip = Grip.LOST', 'self._grip = Grip.WAITING'),
        ('a gamepad that is unplugged does not let go', 'pressed or now - self._up_since < CONFIRM_S', 'pressed'),
        ('a switch that is not there is refused', 'if len(buttons) <= self.button:', 'if False:'),
        # --- targets
        ('a leader beyond the limits is cut', 'np.clip(leader + self._offset, self.low, self.high)', 'leader + self._offset'),
        ('jogging stays within the limits', 'np.clip(target + motion.joints * self.period, self.low, self.high)',
         'target + motion.joints * self.period'),
        ('targets do not run away from the arm', 'lead / max(1.0, np.max(np.abs(lead) / self.leash))', 'lead'),
        ('axes are finite', ' or not np.isfinite(axes).all()', ''),
        ('axes are there', 'if len(axes) <= axis or len(buttons) <= button', 'if len(buttons) <= button'),
        ('buttons are there', 'if len(axes) <= axis or len(buttons) <= button', 'if len(axes) <= axis'),
        ('axes are bounded', 'np.clip(axes[axis], -1.0, 1.0)', 'axes[axis]'),
        ('a stick has a dead zone', 'max(abs(value) - layout.dead_zone, 0.0)', 'abs(value)'),
        ('sticks count while the switch is pressed', 'self.pressed * twist', 'twist'),
        ('buttons count while the switch is pressed', 'self.pressed * joints', 'joints'),
        ('a key ends', "self._key if now < self._until else ''", 'self._key'),
        ('any other key stops', "key if key in self.moves else ''", 'key if key in self.moves else self._key'),
    ],
}.items() for guard in guards]

# The mutated package must be the one that the tests import.
RUN = """
import sys, pytest, il_runtime.core.{file} as mutated
assert mutated.__file__.startswith({folder!r}), mutated.__file__
sys.exit(pytest.main({arguments!r}))
"""


def passes(folder: Path, file: str) -> bool:
    """True if the unit tests that watch over a file pass with the il_runtime in ``folder``."""
    tests = [str(ROOT / f'test/unit/{name}.py') for name in TESTS[file]]
    # The statistics of modes take 15 s and show nothing that the other tests of the rule do not.
    arguments = ['-x', '-q', '-p', 'no:cacheprovider', '-k', 'not mode_drawn', *tests]
    environment = {**os.environ, 'PYTHONPATH': f'{folder}:{os.environ["PYTHONPATH"]}', 'IL_FAULTS': str(folder / 'faults'),
                   'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'}
    done = subprocess.run([sys.executable, '-c', RUN.format(file=file, folder=str(folder), arguments=arguments)], cwd=ROOT,
                          env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode in (0, 1), f'tests did not run:\n{done.stdout}{done.stderr}'
    return done.returncode == 0


def survives(guard: Guard, folder: Path) -> bool:
    """True if no test fails without this guard."""
    shutil.copytree(CORE, folder / 'il_runtime/core', ignore=shutil.ignore_patterns('__pycache__'))
    (folder / 'il_runtime/__init__.py').touch()
    path = folder / f'il_runtime/core/{guard.file}.py'
    path.write_text(path.read_text().replace(guard.text, guard.without))
    return passes(folder, guard.file)


@pytest.mark.parametrize('guard', GUARDS, ids=lambda guard: guard.name)
def test_the_list_is_up_to_date(guard):
    assert (CORE / f'{guard.file}.py').read_text().count(guard.text) == 1


@pytest.mark.parametrize('file', TESTS)
def test_with_all_guards_the_tests_pass(file, tmp_path):
    assert survives(Guard(file, 'none', '', ''), tmp_path)


@pytest.mark.timeout(1800)
def test_each_guard_removed_in_turn(tmp_path, show):
    with ThreadPoolExecutor(2) as pool:
        survived = pool.map(lambda i: survives(GUARDS[i], tmp_path / str(i)), range(len(GUARDS)))
    survivors = [guard.name for guard, lives in zip(GUARDS, survived, strict=True) if lives]
    assert not survivors
    show('each guard in `core` removed in turn', 'at least one test fails', f'{len(GUARDS)} of {len(GUARDS)} noticed')
