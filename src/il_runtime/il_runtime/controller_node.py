"""50 Hz controller: chunks in, ensembled and limited commands out. Never waits for the network, never jumps.

The loop has its own thread on absolute deadlines; callbacks only leave things in an inbox that the loop empties.
"""
from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections import deque

import numpy as np
from il_msgs.msg import ActionChunk, ControllerStatus
from il_msgs.srv import Arm
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger

from il_policies.contract import load_contract
from il_policies.data.decode import DecodeError, decode
from il_runtime.core.controller import Controller
from il_runtime.core.ensembling import MODES, Chunk, ChunkError, Ensembler, arrange
from il_runtime.core.mode import Mode
from il_runtime.ros import STATUS_QOS, Worker, chunk_qos, declare, loud, nanoseconds, run, start, to_stamp

MAX_STAMP_OFFSET = 1.0
"""A chunk whose observation is further than this from now was stamped by another clock [s]."""


class ControllerNode(LifecycleNode):
    """Lifecycle: configure reads the contract, activate starts the loop, deactivate stops the arm and then the loop."""

    def __init__(self):
        super().__init__('controller')
        declare(self, 'contract', '', "the robot's contract, a YAML file")
        declare(self, 'ensembling', 'newest_first', f'how overlapping chunks are blended: {", ".join(MODES)}')
        declare(self, 'm', 0.5, 'weight exp(-m·age) of a chunk, age in policy steps', 0.0, 10.0)
        declare(self, 'seam', 0.1, 'length of a crossfade [s]', 0.02, 2.0)
        declare(self, 'max_disagreement', 1.0, 'above this distance between live chunks, in tracking tolerances, the newest '
                'one takes over instead of being averaged', 0.01, 1e9)
        declare(self, 'realtime_priority', 40, 'SCHED_FIFO priority of the loop where permitted; 0 leaves it as it is', 0, 49)
        autostart = declare(self, 'autostart', True, 'configure and activate at once')
        if autostart:
            start(self)

    # --- lifecycle ----------------------------------------------------------------------------------------------------
    @loud
    def on_configure(self, _state) -> TransitionCallbackReturn:
        """Read the contract, open topics and services."""
        value = {name: self.get_parameter(name).value for name in ('contract', 'ensembling', 'm', 'seam', 'max_disagreement')}
        self.contract = load_contract(value['contract'])
        ensembler = Ensembler([joint.tracking_tolerance for joint in self.contract.action_joints], value['ensembling'],
                              value['m'], ramp=2.0 / self.contract.control_rate, seam=value['seam'],
                              max_disagreement=value['max_disagreement'])
        # Wall-clock milliseconds: a restarted controller never issues an epoch that a late chunk could carry.
        self.controller = Controller(self.contract, ensembler, first_epoch=time.time_ns() // 1_000_000)
        self.state_stream = self.contract.observations[self.contract.joint_state]
        self.state_order = [self.state_stream.names.index(name) for name in self.contract.action.joints]
        self.sim_time = self.get_parameter('use_sim_time').value
        self.inbox: deque = deque(maxlen=1000)
        self.wake = threading.Condition()
        self.measured: tuple[float, np.ndarray] | None = None
        self.rejected = self.ticks = self.missed = 0
        self.lateness: deque = deque(maxlen=10_000)
        self.announced = None
        self.running = False
        self.offset = 0

        self.commands = self.create_publisher(JointState, self.contract.action.topic, QoSProfile(depth=100))
        self.output = self.create_publisher(Float64MultiArray, self.contract.action.output_topic, QoSProfile(depth=1))
        self.status = self.create_publisher(ControllerStatus, '~/status', STATUS_QOS)
        self.create_subscription(JointState, self.state_stream.topic, self._on_joint_state, qos_profile_sensor_data)
        self.create_subscription(ActionChunk, 'chunks', self._on_chunk, chunk_qos())
        self.create_service(Arm, '~/arm', self._on_arm)
        self.create_service(Trigger, '~/disarm', self._on_disarm)
        # Steady: a step of the wall clock, or a stalled /clock, must not silence the status.
        self.create_timer(0.1, self._publish_status, clock=Clock(clock_type=ClockType.STEADY_TIME))
        if self.sim_time:
            threshold = JumpThreshold(min_forward=Duration(nanoseconds=1), min_backward=Duration(nanoseconds=-1))
            self._jumps = self.get_clock().create_jump_callback(threshold, post_callback=lambda _: self._wake_up())
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state) -> TransitionCallbackReturn:
        """Start the loop; the arm stays INACTIVE until armed."""
        self.inbox.clear()
        self.running = True
        self.thread = Worker(self._loop, 'control')
        self.thread.start()
        return super().on_activate(state)

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        """Bounded stop, then end the loop."""
        self.finish(lambda: time.sleep(0.01))
        return super().on_deactivate(state)

    def finish(self, spin_once) -> None:
        """Bring the arm to rest within its limits, then end the loop."""
        if not getattr(self, 'running', False):  # perhaps never configured
            return
        self._post(lambda now: self.controller.disarm('shutting down'))
        deadline = time.monotonic() + 5.0
        while self.thread.is_alive() and self.controller.mode != Mode.INACTIVE and time.monotonic() < deadline:
            spin_once()
        self.running = False
        self._wake_up()
        self.thread.join(timeout=1.0)
        self._publish_status()

    # --- callbacks: leave it in the inbox ------------------------------------------------------------------------------
    def _on_joint_state(self, message: JointState) -> None:
        try:
            positions = decode(message, self.state_stream)
        except DecodeError as error:
            self.get_logger().warning(f'joint states ignored: {error}', throttle_duration_sec=1.0)
            return
        self.measured = (self._now(), positions[self.state_order])

    def _on_chunk(self, message: ActionChunk) -> None:
        try:
            positions = arrange(message.joint_names, message.positions, message.horizon, message.step_period,
                                self.controller.joints)
            # Onto the loop's clock, once: later steps of the wall clock change nothing.
            now, wall = self._now(), self.get_clock().now().nanoseconds
            observed = now + (nanoseconds(message.header.stamp) - wall) * 1e-9
            if abs(now - observed) > MAX_STAMP_OFFSET:
                raise ChunkError(f'stamp is {now - observed:+.3f} s old, allowed ±{MAX_STAMP_OFFSET:g} s: set the clocks')
            chunk = Chunk(now + (nanoseconds(message.start) - wall) * 1e-9, message.step_period, positions, message.epoch,
                          message.sequence, observed)
        except ChunkError as error:
            self._reject(error)
            return
        self._post(lambda now: self._take(chunk, now))

    def _take(self, chunk: Chunk, now: float) -> None:
        try:
            self.controller.add_chunk(chunk, now)
        except ChunkError as error:
            self._reject(error)

    def _reject(self, error: ChunkError) -> None:
        self.rejected += 1
        self.get_logger().warning(f'chunk refused: {error}', throttle_duration_sec=1.0)

    def _on_arm(self, _request, response: Arm.Response) -> Arm.Response:
        answer = self._ask(self.controller.arm)
        response.success, response.message = answer or (False, 'the control loop does not run; activate the node')
        response.epoch = self.controller.epoch
        return response

    def _on_disarm(self, _request, response: Trigger.Response) -> Trigger.Response:
        answer = self._ask(lambda now: (True, self.controller.disarm() or 'stopping'))
        response.success, response.message = answer or (False, 'the control loop does not run')
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
                answer.append(action(now))
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

    # --- the loop -----------------------------------------------------------------------------------------------------
    def _now(self) -> float:
        """The loop's clock [s]: monotonic, or simulated time."""
        return self.get_clock().now().nanoseconds * 1e-9 if self.sim_time else time.monotonic()

    def _stamp_offset(self) -> int:
        """From the loop's clock to stamps [ns]; follows a wall clock that was set, not the jitter of reading two clocks."""
        if self.sim_time:
            return 0
        before = time.monotonic_ns()
        offset = self.get_clock().now().nanoseconds - before
        # While armed the stamps of commands are as even as the commands, whatever slews the wall clock.
        tolerated = 1_000_000 if self.controller.mode == Mode.INACTIVE else 50_000_000
        if abs(offset - self.offset) > tolerated and time.monotonic_ns() - before < 200_000:
            self.offset = offset
        return self.offset

    def _loop(self) -> None:
        self._become_realtime()
        period = self.controller.period
        last = round(self._now() / period)
        while self.running:
            due = last + 1
            self._wait_until(due * period)
            now = self._now()
            while self.inbox:
                self.inbox.popleft()(now)
            index = int(now / period + 1e-6)
            armed = self.controller.mode != Mode.INACTIVE
            if index < last:
                self.get_logger().error('the clock jumped back')
                last = index
                continue
            if index < due:
                continue  # woken for the inbox
            if armed:
                self.ticks += 1
                self.missed += index - due
                if not self.sim_time:
                    self.lateness.append(now - due * period)
            self._tick(index * period, index - last)
            last = index

    def _wait_until(self, deadline: float) -> None:
        if not self.sim_time:
            time.sleep(max(deadline - time.monotonic(), 0.0))
            return
        with self.wake:
            while self.running and not self.inbox and self._now() < deadline:
                self.wake.wait(timeout=0.2)

    def _tick(self, now: float, elapsed: int) -> None:
        if self.measured is not None:
            self.controller.joint_state(*self.measured)
        command = self.controller.tick(now, elapsed)
        offset = self._stamp_offset()
        if command is not None:
            message = JointState(name=self.controller.joints, position=command, velocity=self.controller.gate.velocity)
            # Stamped with the tick it is for, so that differences of commands are exact velocities.
            message.header.stamp = to_stamp(round(now * 1e9) + offset)
            self.output.publish(Float64MultiArray(data=command))
            self.commands.publish(message)
        if self.announced != (self.controller.mode, self.controller.epoch):
            self._publish_status(with_lateness=False)

    def _publish_status(self, with_lateness: bool = True) -> None:
        c, blend = self.controller, self.controller.blend
        self.announced = (c.mode, c.epoch)
        message = ControllerStatus(
            mode=int(c.mode), reason=c.reason, epoch=c.epoch, live_chunks=blend.live if blend else 0,
            chunk_age=blend.age if blend else float('nan'), disagreement=blend.disagreement if blend else 0.0,
            rejected_chunks=self.rejected, clamped_ticks=c.clamped_ticks, ticks=self.ticks, missed_ticks=self.missed)
        message.header.stamp = self.get_clock().now().to_msg()
        if with_lateness:
            message.lateness = [self.lateness.popleft() for _ in range(len(self.lateness))]
            if c.mode == Mode.INACTIVE:
                gc.collect()  # off while moving: a full collection can take longer than a tick
        self.status.publish(message)

    def _become_realtime(self) -> None:
        sys.setswitchinterval(0.0005)
        gc.collect()
        gc.freeze()
        gc.disable()
        priority = self.get_parameter('realtime_priority').value
        scheduler = 'as started'
        if priority and not self.sim_time:
            try:
                os.sched_setscheduler(threading.get_native_id(), os.SCHED_FIFO, os.sched_param(priority))
                scheduler = f'SCHED_FIFO {priority}'
            except PermissionError:
                pass
        self.get_logger().info(f'{self.contract.robot}: {self.contract.control_rate:g} Hz loop, scheduler {scheduler}')


def main() -> None:
    """Entry point."""
    run(ControllerNode)


if __name__ == '__main__':
    main()
