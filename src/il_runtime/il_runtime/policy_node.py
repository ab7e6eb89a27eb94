"""Planning: observations in, stamped action chunks out, as slow as the network needs. The only node that imports torch."""
from __future__ import annotations

import threading
import time

import torch
from builtin_interfaces.msg import Duration
from il_msgs.msg import ActionChunk, ControllerStatus
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import qos_profile_sensor_data

from il_policies import checkpoint
from il_policies.check.agreement import differences, of_contract, of_policy
from il_policies.contract import load_contract
from il_policies.data.align import buffers, observation_at
from il_policies.data.decode import DecodeError, decode, stamp_of
from il_policies.planner import NOISE, Planner
from il_runtime.images import convert
from il_runtime.ros import STATUS_QOS, Worker, be_nice, chunk_qos, declare, loud, message_class, run, start, to_stamp

FOLLOWING = (ControllerStatus.HOLD, ControllerStatus.POLICY, ControllerStatus.APPROACH)


class PolicyNode(LifecycleNode):
    """Lifecycle: configure loads the checkpoint and checks it against the contract, activate plans."""

    def __init__(self):
        super().__init__('policy')
        declare(self, 'contract', '', "the robot's contract, a YAML file")
        declare(self, 'checkpoint', '', 'folder written by il train')
        declare(self, 'stride', 8, 'policy steps between plans', 1, 1000)
        declare(self, 'noise', 'warm_start', f'noise of each new chunk: {", ".join(NOISE)}')
        declare(self, 'tau', 0.5, 'warm start: from where the previous chunk is denoised anew; 0 = pure noise', 0.0, 0.99)
        declare(self, 'seed', 0, 'seed of the noise', 0, 2**31 - 1)
        declare(self, 'threads', 1, 'threads of the network', 1, 256)
        be_nice(self)
        if declare(self, 'autostart', True, 'configure and activate at once'):
            start(self)

    # --- lifecycle ----------------------------------------------------------------------------------------------------
    @loud
    def on_configure(self, _state) -> TransitionCallbackReturn:
        """Load, check, warm up."""
        value = {p: self.get_parameter(p).value for p in ('contract', 'checkpoint', 'stride', 'noise', 'tau', 'seed', 'threads')}
        torch.set_num_threads(value['threads'])
        self.contract = load_contract(value['contract'])
        self.policy = checkpoint.load(value['checkpoint'])
        mismatches = differences(of_contract(value['contract'], self.contract), of_policy(value['checkpoint'], self.policy))
        if mismatches:
            raise ValueError(f'{value["checkpoint"]} was trained for another robot: ' + '; '.join(mismatches))
        self.planner = Planner(self.policy, value['noise'], value['tau'], value['seed'])
        classes = {name: message_class(self.contract.observations[name]) for name in self.policy.spec.features}
        spec = self.policy.spec
        self.period = round(spec.step_period * 1e9)
        self.stride = value['stride'] * self.period
        self.streams = buffers(self.contract, list(spec.features))
        cameras = [name for name in spec.features if self.contract.observations[name].is_image]
        self.anchor = cameras[0] if cameras else None
        self.lock = threading.Lock()  # over streams and status, between callbacks and the planning thread
        self.status: ControllerStatus | None = None
        self.create_subscription(ControllerStatus, 'controller/status', self._on_status, STATUS_QOS)
        for name, buffer in self.streams.items():
            self.create_subscription(classes[name], buffer.stream.topic,
                                     lambda message, info, name=name: self._on_sample(name, message, info),
                                     qos_profile_sensor_data)
        # The first pass through a network is the slowest; it must not be the first of an episode.
        self.planner.warm_up()
        # Last, so that who sees a publisher of chunks finds a planner that is ready.
        self.chunks = self.create_publisher(ActionChunk, 'chunks', chunk_qos(spec.horizon * spec.step_period))
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state) -> TransitionCallbackReturn:
        """Start planning."""
        self.running = True
        self.thread = Worker(self._plan, 'planning')
        self.thread.start()
        self.get_logger().info(f'{self.policy.hash}: plans every {self.stride / 1e9:g} s')
        return super().on_activate(state)

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        """Stop planning."""
        self.finish()
        return super().on_deactivate(state)

    def finish(self, _spin_once=None) -> None:
        """End the planning thread."""
        if getattr(self, 'running', False):
            self.running = False
            self.thread.join(timeout=5.0)

    # --- callbacks ----------------------------------------------------------------------------------------------------
    def _on_sample(self, name: str, message, info: dict) -> None:
        stream = self.streams[name].stream
        try:
            sample = decode(message, stream, convert)
            stamp = stamp_of(message, stream, info['source_timestamp'], self.get_clock().now().nanoseconds)
        except DecodeError as error:
            self.get_logger().warning(f'{name} ignored: {error}', throttle_duration_sec=1.0)
            return
        with self.lock:
            self.streams[name].add(stamp, sample)

    def _on_status(self, status: ControllerStatus) -> None:
        with self.lock:
            self.status = status

    # --- planning -----------------------------------------------------------------------------------------------------
    def _plan(self) -> None:
        epoch, following, sequence, due, since, began = None, False, 0, 0, 0, None
        while self.running:
            with self.lock:
                status = self.status
            now = self.get_clock().now().nanoseconds
            was_following, following = following, status is not None and status.mode in FOLLOWING
            if following and (status.epoch != epoch or not was_following):
                # After a stop the arm is elsewhere than the last chunk would have it. Within an epoch the sequence goes on:
                # the controller takes one that it has seen for a double.
                sequence = sequence if status.epoch == epoch else 0
                epoch, due, since, began = status.epoch, now, now, None
                self.planner.reset()
            if not following or now < due:
                time.sleep(0.002)
                continue
            with self.lock:
                t = self.streams[self.anchor].newest or now if self.anchor else now
                first = t if began is None else began
                observation = observation_at(self.streams, t, self.policy.spec.history, self.period, first, self.anchor)
                # Measured against itself the newest frame is never old: a camera that has died shows against now.
                dead = observation_at({self.anchor: self.streams[self.anchor]}, now).problems if self.anchor else {}
            problems = observation.problems | dead
            if problems:
                self.get_logger().warning('not planning: ' + '; '.join(problems.values()), throttle_duration_sec=1.0)
                time.sleep(0.02)
                continue
            if t < since:  # the newest frame is from before: it may show the arm elsewhere, as before a reset
                time.sleep(0.002)
                continue
            began = first
            if status.mode == ControllerStatus.HOLD:
                # Nothing is followed yet. Warm-started from a chunk that was refused, the next one would be refused too.
                self.planner.forget()
            started = time.monotonic_ns()
            chunk_start = t + round(self.policy.spec.action_offset * 1e9)
            positions = self.planner.plan(observation.data, chunk_start * 1e-9)
            self._publish(t, chunk_start, positions, epoch, sequence, time.monotonic_ns() - started)
            sequence += 1
            due += self.stride * (1 + max(0, (now - due) // self.stride))

    def _publish(self, t: int, chunk_start: int, positions, epoch: int, sequence: int, took: int) -> None:
        message = ActionChunk(step_period=self.policy.spec.step_period, joint_names=list(self.policy.spec.action_names),
                              horizon=len(positions), positions=positions.astype('float32').ravel(), epoch=epoch,
                              sequence=sequence, policy=self.policy.hash)
        message.header.stamp = to_stamp(t)
        message.start = to_stamp(chunk_start)
        message.inference_time = Duration(sec=took // 10**9, nanosec=took % 10**9)
        self.chunks.publish(message)


def main() -> None:
    """Entry point."""
    run(PolicyNode)


if __name__ == '__main__':
    main()
