"""50 Hz controller: chunks in, ensembled and limited commands out. Never waits for the network, never jumps.

The loop has its own thread on absolute deadlines and takes its inputs itself, once a tick: no callback competes with it for
the interpreter. Services and parameters, served by the executor's thread, leave their wishes in an inbox.

As a shadow it moves nothing: it shows what it would do, and compares that with what is done.
"""
from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from il_msgs.msg import ActionChunk, ControllerStatus
from il_msgs.srv import Arm
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger

from il_policies.contract import load_contract
from il_policies.data.decode import DecodeError, NotFiniteError, decode, stamp_of
from il_runtime.core.clock import LoopClock, StampError
from il_runtime.core.controller import SOURCES, STARVED, Controller, Settings
from il_runtime.core.ensembling import (
    MODES,
    Blending,
    Chunk,
    ChunkError,
    Ensembler,
    NonFiniteError,
    arrange,
    check_finite,
)
from il_runtime.core.latency import Window
from il_runtime.core.mode import Mode
from il_runtime.core.shadow import COMMANDED, MEASURED, Comparison
from il_runtime.outputs import Outputs
from il_runtime.ros import (
    STATUS_QOS,
    Polled,
    Worker,
    be_nice,
    chunk_qos,
    declare,
    entities,
    loud,
    nanoseconds,
    run,
    start,
    take_all,
    to_stamp,
)

STATUS_PERIOD = 0.1
"""Time between periodic statuses [s]."""
STALL_S = 0.5
"""A /clock that tells the same time for longer stands still [s, wall]."""
MAX_ARRIVALS = 64
"""Chunks whose time of receipt is remembered."""
REMEMBERED = 3000
"""Ticks whose lateness diagnostics show: a minute."""


class ControllerNode(LifecycleNode):
    """Lifecycle: configure reads the contract, activate starts the loop, deactivate stops the arm and then the loop."""

    def __init__(self):
        """Raises ValueError for a shadow that would be taken for a controller."""
        super().__init__('controller')
        self.running = False
        declare(self, 'contract', '', "the robot's contract, a YAML file")
        self.shadow = declare(self, 'shadow', False, 'send nothing to the robot, which somebody else moves: follow ~/chunks, '
                              'publish ~/command and its ~/error, all below the name it must be given, as -r __node:=shadow; '
                              'it arms itself, hears no teleoperation, and its speed_scale is 100')
        if self.shadow:
            if self.get_name() == 'controller':
                raise ValueError('a shadow named controller would speak for the controller that moves the arm: start it with '
                                 '-r __node:=shadow')
            be_nice(self)
        declare(self, 'realtime_priority', 40, 'SCHED_FIFO priority of the loop where permitted; 0 leaves it as it is', 0, 49)
        live = {'read_only': False}
        declare(self, 'ensembling', 'newest_first', f'how overlapping chunks are blended: {", ".join(MODES)}; live', **live)
        declare(self, 'm', 0.5, 'weight exp(-m·age) of a chunk, age in policy steps; live', 0.0, 10.0, **live)
        declare(self, 'seam', 0.1, 'length of a crossfade [s]; live', 0.02, 2.0, **live)
        declare(self, 'max_disagreement', 1.0, 'above this distance between live chunks, in tracking tolerances, the newest '
                'one takes over instead of being averaged; live', 0.01, 1e9, **live)
        declare(self, 'speed_scale', 100.0, 'slows everything down [%]; a new arm starts at 20; live', 0.0, 100.0, **live)
        default = Settings()
        declare(self, 'tracking_time', default.tracking_time, 'a joint may be off its command by more than its tracking '
                'tolerance for so long [s]; not while armed', 0.02, 10.0, **live)
        declare(self, 'lag_time', default.lag_time, 'a command may lag behind what is asked for by more than the tracking '
                'tolerance for so long [s]; not while armed', 0.02, 10.0, **live)
        declare(self, 'blend_time', default.blend_time, 'time over which a new source, policy or human, fades in [s]; not while '
                'armed', 0.02, 5.0, **live)
        declare(self, 'teleop_timeout', default.teleop_timeout, 'a human who is silent for longer without a release has lost '
                'control [s]; not while armed', 0.04, 1.0, **live)
        declare(self, 'approach_speed', 100 * default.approach_speed, 'speed of an approach, share of the velocity and '
                'acceleration limits [%]; not while armed', 1.0, 100.0, **live)
        autostart = declare(self, 'autostart', True, 'configure and activate at once')
        self.permanent = set(entities(self))
        if autostart:
            start(self)

    # --- lifecycle ----------------------------------------------------------------------------------------------------
    @loud
    def on_configure(self, _state) -> TransitionCallbackReturn:
        """Read the contract, open topics and services."""
        value = self._values()
        self.contract = load_contract(value['contract'])
        self.sim_time = value['use_sim_time']
        stamps = self.get_clock()
        self.clock = LoopClock(lambda: stamps.now().nanoseconds if self.sim_time else time.monotonic_ns(),
                               lambda: stamps.now().nanoseconds)
        ensembler = Ensembler([joint.tracking_tolerance for joint in self.contract.action_joints], blending(value),
                              ramp=2.0 / self.contract.control_rate)
        # Wall-clock milliseconds: a restarted controller never issues an epoch that a late chunk could carry.
        self.controller = Controller(self.contract, ensembler, time.time_ns() // 1_000_000, settings(value), self.shadow)
        self.state_stream = self.contract.observations[self.contract.joint_state]
        self.state_order = [self.state_stream.names.index(name) for name in self.contract.action.joints]
        self.inbox: deque = deque(maxlen=1000)
        self.wake = threading.Condition()
        self.remarks: dict[str, str] = {}  # what the loop would log: it leaves that to the executor's thread
        self.ticks = self.missed = 0
        self.lateness: deque = deque(maxlen=10_000)
        self.recent = np.full(REMEMBERED, np.nan)
        self.announced, self.told = None, 0.0
        self.observed_to_command, self.received_to_command = Window(), Window()
        self.arrivals: dict[tuple[float, int], float] = {}  # chunk → when it was received; only those not used yet
        self.used: tuple[float, int] | None = None  # chunk whose first command was the last to be measured
        self.starved = 0
        self.others: list[str] = []
        self.stalled, self.ending, self.scheduler = False, False, 'not running'

        self.outputs = Outputs(self, self.contract, self.shadow)
        self.status = self.create_publisher(ControllerStatus, '~/status', STATUS_QOS)
        self.chunk_times = self.create_publisher(DiagnosticStatus, '~/chunk_times', QoSProfile(depth=100))
        self.diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', QoSProfile(depth=10))
        polled = Polled()
        newest = QoSProfile(depth=1, reliability=qos_profile_sensor_data.reliability)  # drivers send up to 1 kHz
        self.states = self.create_subscription(JointState, self.state_stream.topic, _never, newest, callback_group=polled)
        self.chunks = self.create_subscription(ActionChunk, '~/chunks' if self.shadow else 'chunks', _never, chunk_qos(),
                                               callback_group=polled)
        # A shadow hears what the human's system commands, and not what that is asked for.
        human, reliability = ((self.contract.action.topic, newest.reliability) if self.shadow else
                              ('teleop', ReliabilityPolicy.RELIABLE))
        self.human = self.create_subscription(JointState, human, _never, QoSProfile(depth=10, reliability=reliability),
                                              callback_group=polled)
        self.create_service(Arm, '~/arm', self._on_arm)
        for name, action in (('hold', lambda now: self.controller.hold()), ('stop', lambda now: self.controller.stop()),
                             ('reset_fault', lambda now: self.controller.reset_fault())):
            self.create_service(Trigger, f'~/{name}', lambda _, response, action=action: self._answer(response, action))
        self.add_on_set_parameters_callback(self._on_parameters)
        # Steady: a step of the wall clock, or a stalled /clock, must not silence the node.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(0.5, self._look_around, clock=steady)
        self.create_timer(1.0, self._publish_diagnostics, clock=steady)
        if self.shadow:
            self.comparison = Comparison(self.controller.joints, self.controller.tracking_tolerance, self.controller.period,
                                         self.state_stream.max_age)
            self.seen: deque = deque(maxlen=10_000)  # what the loop leaves to be compared
            self.commanded = 0.0  # when a command was last compared: monotonic [s]
            self.error = self.create_publisher(JointState, '~/error', QoSProfile(depth=100))
            self.create_timer(0.1, self._compare, clock=steady)
        if self.sim_time:
            threshold = JumpThreshold(min_forward=Duration(nanoseconds=1), min_backward=Duration(nanoseconds=-1))
            self._jumps = stamps.create_jump_callback(threshold, post_callback=lambda _: self._wake_up())
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state) -> TransitionCallbackReturn:
        """Start the loop; the arm stays INACTIVE until armed, by itself if it is a shadow."""
        self.inbox.clear()
        self.controller.arms_itself = self.shadow
        self._apply(self._values(), self.clock.now())
        self.running, self.ending = True, False
        self.thread = Worker(self._loop, 'control')
        self.thread.start()
        return super().on_activate(state)

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        """Bounded stop, then end the loop."""
        self.finish(lambda: time.sleep(0.01))
        return super().on_deactivate(state)

    def on_cleanup(self, state) -> TransitionCallbackReturn:
        """Give up what configure opened, so that it can be configured anew."""
        for entity, destroy in entities(self).items():
            if entity not in self.permanent:
                destroy(entity)
        self.remove_on_set_parameters_callback(self._on_parameters)
        return super().on_cleanup(state)

    def on_shutdown(self, state) -> TransitionCallbackReturn:
        """Bounded stop, from whatever state."""
        self.finish(lambda: time.sleep(0.01))
        return super().on_shutdown(state)

    def finish(self, spin_once) -> None:
        """Bring the arm to rest within its limits, then end the loop."""
        if not self.running:  # perhaps never configured
            return
        self.ending = True
        self._post(lambda now: self.controller.stop('shutting down'))
        deadline = time.monotonic() + 10.0
        while self.thread.is_alive() and time.monotonic() < deadline and not self._is_still():
            spin_once()
        self.running = False
        self._wake_up()
        self.thread.join(timeout=1.0)
        gc.unfreeze()
        gc.enable()
        self._schedule_threads(os.SCHED_OTHER, 0)
        self._publish_status(self.clock.now())
        if self.shadow:
            self._compare()
            c = self.controller
            self.get_logger().info('\n  '.join([
                f'{self.contract.robot}: {self.comparison.chunks} chunks; begun anew {c.begun_anew} times, would have faulted '
                f'{c.would_fault} times; errors [rad or m]:', *self.comparison.report()]))

    def _is_still(self) -> bool:
        """True when nothing is left to be stopped: a simulated arm stands as long as its time does."""
        return not self.inbox and (self.controller.mode == Mode.INACTIVE or self.sim_time and self.stalled
                                   or self.controller.mode == Mode.FAULT and self.controller.gate.at_rest)

    def _values(self) -> dict:
        """Parameter → value."""
        return {name: parameter.value for name, parameter in self.get_parameters_by_prefix('').items()}

    # --- executor's thread: leave it in the inbox -----------------------------------------------------------------------
    def _on_arm(self, request: Arm.Request, response: Arm.Response) -> Arm.Response:
        self._look_around()
        if self.ending:
            response.message = 'the node is ending'
        elif self.others:
            response.message = f'somebody else commands this arm: {"; ".join(self.others)}'
        elif self.shadow and request.approach:
            response.message = 'a shadow cannot approach, it moves nothing: arm without'
        else:
            self._answer(response, lambda now: self.controller.arm(now, request.approach))
        response.epoch = self.controller.epoch
        return response

    def _answer(self, response, action):
        """Fill a response with what the loop answers."""
        answer = self._ask(action)
        response.success, response.message = answer or (False, 'the control loop does not run; activate the node')
        return response

    def _ask(self, action):
        """Have the loop do it before its next tick; its answer, or None if the loop does not run.

        What was answered with None is never done: a refused arming must not come true when the loop starts.
        """
        if not self.running:
            return None
        answer = []
        taken, done = threading.Lock(), threading.Event()  # whoever takes the lock, loop or time-out, decides

        def act(now: float) -> None:
            if taken.acquire(blocking=False):
                try:
                    answer.append(action(now))
                except Exception as error:
                    answer.append((False, f'internal error: {error!r}'))
                    raise
                finally:
                    done.set()

        self._post(act)
        if not done.wait(timeout=1.0) and not taken.acquire(blocking=False):
            done.wait()
        return answer[0] if answer else None

    def _post(self, action) -> None:
        self.inbox.append(action)
        if self.sim_time:
            self._wake_up()

    def _wake_up(self) -> None:
        with self.wake:
            self.wake.notify_all()

    def _on_parameters(self, parameters) -> SetParametersResult:
        """Live ones take effect at the next tick; the others are read-only while armed."""
        value = self._values()
        value |= {parameter.name: parameter.value for parameter in parameters}
        fixed = [p.name for p in parameters if hasattr(Settings, p.name)]
        if fixed and self.controller.mode != Mode.INACTIVE:
            return SetParametersResult(successful=False, reason=f'{", ".join(fixed)}: read-only while armed; stop first')
        try:
            blending(value)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))

        self._post(lambda now: self._apply(value, now))  # if the loop does not run, activation does it
        return SetParametersResult(successful=True)

    def _apply(self, value: dict, now: float) -> None:
        """Let the controller have what parameters say."""
        self.controller.settings = settings(value)
        self.controller.speed_scale = 1.0 if self.shadow else value['speed_scale'] / 100
        if blending(value) != self.controller.ensembler.blending:
            self.controller.ensembler.switch(blending(value), now)

    def _look_around(self) -> None:
        """Say what the loop had to say, and latch a fault if somebody else commands the arm."""
        self._await_gap()
        for source in list(self.remarks):
            self.get_logger().warning(f'{source}: {self.remarks.pop(source)}')
        self.others = []
        for topic in self.outputs.topics:
            if self.count_publishers(topic) > 1:  # which is quick; who they are is not
                publishers = self.get_publishers_info_by_topic(topic)
                names = [f'{info.node_namespace.rstrip("/")}/{info.node_name}' for info in publishers]
                self.others.append(f'{len(names)} publishers on {topic}: {", ".join(sorted(names))}')
        if self.others and self.running:
            reason = '; '.join(self.others)
            self._post(lambda now: self.controller.fault(reason))
        if time.monotonic() - self.told > 3 * STATUS_PERIOD:  # the loop does not run, or its clock stands still
            self._publish_status(self.clock.now())

    def _await_gap(self) -> None:
        """Wait until a tick has just passed: what holds the interpreter for a millisecond must not do so when one is due."""
        if self.running and not self.sim_time:
            time.sleep((0.3 * self.controller.period - time.monotonic()) % self.controller.period)

    def _publish_diagnostics(self) -> None:
        self._await_gap()
        c, lateness = self.controller, self.recent[~np.isnan(self.recent)] * 1e3
        shares = np.percentile(lateness, [50, 99, 100]) if len(lateness) else (0.0, 0.0, 0.0)
        if c.mode == Mode.FAULT:
            level, message = DiagnosticStatus.ERROR, f'FAULT: {c.reason}'
        elif self.others:
            level, message = DiagnosticStatus.ERROR, '; '.join(self.others)
        elif c.mode in (Mode.STOPPING, Mode.HOLD) and c.reason == STARVED:
            level, message = DiagnosticStatus.WARN, f'{c.mode.name}: starved, {c.reason}'
        elif (planners := self._planners()) > 1:
            level, message = DiagnosticStatus.WARN, f'{c.mode.name}: {planners} planners on {self.chunks.topic_name}; {c.reason}'
        elif c.mode == Mode.HOLD and 'refused' in c.reason or shares[1] > 5.0 or self.sim_time and self.stalled:
            level, message = DiagnosticStatus.WARN, f'{c.mode.name}: {c.reason}'
        else:
            level, message = DiagnosticStatus.OK, f'{c.mode.name}: {c.reason}'
        values = {
            'mode': c.mode.name, 'reason': c.reason, 'epoch': c.epoch, 'follows chunks': c.follows_chunks,
            'ensembling': c.ensembler.blending.mode, 'speed scale [%]': f'{100 * c.scale:.0f}',
            **{f'rejected {source}': count for source, count in c.rejected.items()},
            'clamped ticks': c.clamped_ticks, 'clamped joints': ', '.join(c.clamped), 'ticks': self.ticks,
            'missed ticks': self.missed, 'lateness p50 [ms]': f'{shares[0]:.2f}', 'lateness p99 [ms]': f'{shares[1]:.2f}',
            'lateness max [ms]': f'{shares[2]:.2f}', 'scheduler': self.scheduler, 'starved': self.starved,
            'observation to first command p50 / p90 / p99 / max': self.observed_to_command.words(self.clock.now()),
            'chunk received to first command p50 / p90 / p99 / max': self.received_to_command.words(self.clock.now())}
        status = DiagnosticStatus(level=level, name=f'{self.get_fully_qualified_name()}: control loop', message=message,
                                  hardware_id=self.contract.robot,
                                  values=[KeyValue(key=key, value=str(value)) for key, value in values.items()])
        array = DiagnosticArray(status=[status, *([self._shadow_status()] if self.shadow else [])])
        array.header.stamp = self.get_clock().now().to_msg()
        self.diagnostics.publish(array)

    # --- a shadow, on the executor's thread -----------------------------------------------------------------------------
    def _compare(self) -> None:
        """Compare what the loop has seen; publish the error of now, against the arm where no command is heard."""
        with suppress(IndexError):
            while True:
                take, *seen = self.seen.popleft()
                take(*seen)
        new = self.comparison.settle()
        if COMMANDED in new:
            self.commanded = time.monotonic()
        which = COMMANDED if time.monotonic() - self.commanded < 1.0 else MEASURED
        for t, error in new.get(which, ()):
            message = JointState(name=self.controller.joints, position=error)
            message.header.stamp, message.header.frame_id = to_stamp(self.clock.stamp(t, moving=True)), which
            self.error.publish(message)

    def _shadow_status(self) -> DiagnosticStatus:
        c, values = self.controller, {}
        if not self.comparison.errors[COMMANDED].count:
            values[COMMANDED] = f'nothing heard on {self.human.topic_name} while chunks covered it'
        for name, error in self.comparison.errors.items():
            if error.count:
                rms, worst, joint = self.comparison.in_tolerances(name)
                values[f'{name} [tolerances]'] = f'RMS {rms:.2f}, worst {worst:.2f} ({joint}), {error.count} compared'
        values = {'chunks': self.comparison.chunks, 'begun anew': c.begun_anew, 'would have faulted': c.would_fault, **values}
        return DiagnosticStatus(
            level=DiagnosticStatus.OK, name=f'{self.get_fully_qualified_name()}: against what is done',
            message='moves nothing', hardware_id=self.contract.robot,
            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()])

    # --- the loop -----------------------------------------------------------------------------------------------------
    def _loop(self) -> None:
        self._become_realtime()
        period = self.controller.period
        last = round(self.clock.now() / period)
        while self.running:
            due = last + 1
            self._wait_until(due * period)
            now = self.clock.now()
            index = int(now / period + 1e-6)
            if index < last:
                self.controller.clock_jumped(now)
                self.remarks['clock'] = '/clock jumped back'
                self._show('forget')
                last = index
            while self.inbox:
                self._do(self.inbox.popleft(), now)
            if index < due:
                continue  # woken for the inbox, or by a jump
            self._receive(now)
            if self.controller.mode != Mode.INACTIVE:
                self.ticks += 1
                self.missed += index - due
                if not self.sim_time:
                    self.recent[self.ticks % REMEMBERED] = now - due * period
                    self.lateness.append(now - due * period)
            self._tick(index * period, index - last)
            last = index

    def _do(self, action, now: float) -> None:
        """What was left in the inbox; whatever is wrong with it, the loop goes on, to a bounded stop."""
        try:
            action(now)
        except Exception as error:
            self.controller.fault(f'internal error: {error!r}')
            self.remarks['internal error'] = traceback.format_exc()

    def _wait_until(self, deadline: float) -> None:
        if not self.sim_time:
            time.sleep(max(deadline - self.clock.now(), 0.0))
            return
        seen, since = self.clock.now(), time.monotonic()
        with self.wake:
            while self.running and not self.inbox and seen <= (now := self.clock.now()) < deadline:
                if now > seen:
                    seen, since = now, time.monotonic()
                self.stalled = time.monotonic() - since > STALL_S
                if self.stalled:
                    self.controller.clock_stalled()
                self.wake.wait(timeout=0.1)

    def _receive(self, now: float) -> None:
        """Take what has arrived since the last tick; what is malformed is refused whole, counted and named."""
        for message, info in take_all(self.states):
            with self._refusing('joint_states'):
                positions = decode(message, self.state_stream)[self.state_order]
                check_finite(positions)
                taken, = self.clock.convert(self._stamp(message, info))
                self.controller.joint_state(taken, positions, now)
                self._show('measured', taken, positions)
        for message, _ in take_all(self.human):
            with self._refusing('commands' if self.shadow else 'teleop'):
                given, = self.clock.convert(nanoseconds(message.header.stamp))
                if not message.name and not self.shadow:
                    self.controller.release()
                    continue
                positions = arrange(message.name, message.position, 1, 1.0, self.controller.joints)[0]
                if self.shadow:
                    self._show('commanded', given, positions)
                else:
                    self.controller.teleop(given, positions, now)
        for message, _ in take_all(self.chunks):
            with self._refusing('chunks'):
                positions = arrange(message.joint_names, message.positions, message.horizon, message.step_period,
                                    self.controller.joints)
                observed, begins = self.clock.convert(nanoseconds(message.header.stamp), nanoseconds(message.start))
                chunk = Chunk(begins, message.step_period, positions, message.epoch, message.sequence, observed, message.policy)
                self.controller.add_chunk(chunk, now, self._planners)
                if len(self.arrivals) == MAX_ARRIVALS:
                    self.arrivals.pop(next(iter(self.arrivals)))
                self.arrivals[chunk.start, chunk.sequence] = now
                if self.controller.follows_chunks and self.controller.mode != Mode.INACTIVE:
                    self._show('chunk', chunk)

    def _planners(self) -> int:
        return self.count_publishers(self.chunks.topic_name)

    def _stamp(self, message: JointState, info: dict) -> int:
        published, received = info['source_timestamp'], info['received_timestamp']
        # With simulated time those two are of another clock.
        now = self.get_clock().now().nanoseconds if self.sim_time else 0
        return stamp_of(message, self.state_stream, now or published, now or received)

    def _show(self, what: str, *values) -> None:
        """Leave it to be compared, if this is a shadow; what: a method of Comparison."""
        if self.shadow:
            self.seen.append((getattr(self.comparison, what), *values))

    @contextmanager
    def _refusing(self, source: str) -> Iterator[None]:
        """In which one message is taken: what is wrong with it is counted and named, then the next one is looked at."""
        try:
            yield
        except (DecodeError, ChunkError, StampError) as error:
            if source in SOURCES:
                self.controller.reject(source, non_finite=isinstance(error, (NotFiniteError, NonFiniteError)))
            self.remarks[source] = f'refused: {error}'

    def _tick(self, now: float, elapsed: int) -> None:
        before = self.controller.mode
        command = self.controller.tick(now, elapsed)
        is_first = self._measure_latency(before)
        self._show('target', now, self.controller.blend.positions if self.controller.blend else None)
        if command is not None:
            # Stamped with the tick it is for, so that differences of commands are exact velocities.
            stamp = self.clock.stamp(now, moving=True)
            self.outputs.publish(self.controller.gate, to_stamp(stamp))
            if is_first:
                self._publish_chunk_times(stamp)
        due = time.monotonic() - self.told > STATUS_PERIOD - 0.5 * self.controller.period
        if due or self.announced != (self.controller.mode, self.controller.epoch):
            self._publish_status(now)

    def _measure_latency(self, before: Mode) -> bool:
        """At the first command that uses a chunk: how old its observation is, and how long ago it came. True if it is one."""
        c = self.controller
        self.starved += before == Mode.POLICY and c.mode == Mode.STOPPING and c.reason == STARVED
        is_first = c.mode == Mode.POLICY and c.blend is not None and c.blend.newest != self.used
        if is_first:
            now, self.used = self.clock.now(), c.blend.newest
            self.observed_to_command.add(now, c.blend.age)
            if (arrived := self.arrivals.pop(self.used, None)) is not None:
                self.received_to_command.add(now, now - arrived)
        return is_first

    def _publish_chunk_times(self, commanded: int) -> None:
        """For `il bench latency`: the stamp [ns] of the first command that uses the newest chunk."""
        values = {'epoch': self.controller.ensembler.epoch, 'sequence': self.used[1], 'commanded': commanded}
        self.chunk_times.publish(DiagnosticStatus(
            name=f'{self.get_fully_qualified_name()}: chunk', hardware_id=self.contract.robot,
            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()]))

    def _publish_status(self, now: float) -> None:
        c, blend = self.controller, self.controller.blend
        self.announced, self.told = (c.mode, c.epoch), time.monotonic()
        lateness = []
        with suppress(IndexError):  # both threads may come here, and len() would be old
            while True:
                lateness.append(self.lateness.popleft())
        message = ControllerStatus(
            mode=int(c.mode), reason=c.reason, epoch=c.epoch, follows_chunks=c.follows_chunks,
            ensembling=c.ensembler.blending.mode, live_chunks=blend.live if blend else 0,
            chunk_age=blend.age if blend else float('nan'), disagreement=blend.disagreement if blend else 0.0,
            speed_scale=100 * c.scale, clamped_joints=list(c.clamped), clamped_ticks=c.clamped_ticks,
            rejected_chunks=c.rejected['chunks'], rejected_joint_states=c.rejected['joint_states'],
            rejected_teleop=c.rejected['teleop'], ticks=self.ticks, missed_ticks=self.missed,
            lateness=lateness)
        message.header.stamp = to_stamp(self.clock.stamp(now, moving=c.mode != Mode.INACTIVE))
        self.status.publish(message)
        if c.mode == Mode.INACTIVE:
            gc.collect()  # off while moving: a full collection can take longer than a tick

    def _become_realtime(self) -> None:
        sys.setswitchinterval(0.0005)
        gc.collect()
        gc.freeze()
        gc.disable()
        priority = self.get_parameter('realtime_priority').value
        self.scheduler = 'as started'
        if priority and not self.sim_time and not self.shadow:
            try:
                # Every thread that may hold what the loop needs when a tick is due, the interpreter or a lock of the middleware:
                # preempted by somebody else's work, it would keep the loop waiting.
                self._schedule_threads(os.SCHED_FIFO, max(priority - 1, 1))
                os.sched_setscheduler(threading.get_native_id(), os.SCHED_FIFO, os.sched_param(priority))
                self.scheduler = f'SCHED_FIFO {priority}'
            except PermissionError:
                pass
        self.get_logger().info(f'{self.contract.robot}: {self.contract.control_rate:g} Hz loop, scheduler {self.scheduler}')

    @staticmethod
    def _schedule_threads(policy: int, priority: int) -> None:
        for thread in os.listdir('/proc/self/task'):
            with suppress(ProcessLookupError):  # it may have ended meanwhile
                os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


def blending(value: dict) -> Blending:
    """The ensembling that parameters ask for. Raises ValueError."""
    return Blending(value['ensembling'], value['m'], value['seam'], value['max_disagreement'])


def settings(value: dict) -> Settings:
    """The settings that parameters ask for."""
    return Settings(value['tracking_time'], value['lag_time'], value['blend_time'], value['teleop_timeout'],
                    value['approach_speed'] / 100)


def _never(_message) -> None:
    """Callback of subscriptions that the loop polls."""


def main() -> None:
    """Entry point."""
    run(ControllerNode)


if __name__ == '__main__':
    main()
