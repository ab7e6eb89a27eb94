"""Driving the graph from a script: reset the task, record, arm, wait, one call after the other.

Timeouts of what the robot does are in the node's clock, so they hold at any real-time factor; a wall-clock watchdog
names whatever stopped answering.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable

from il_msgs.msg import ControllerStatus, TaskStatus
from il_msgs.srv import Arm, ResetTask, StartEpisode, StopEpisode
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from std_srvs.srv import Trigger

from il_policies.sim.reach_around import Scene
from il_runtime.ros import STATUS_QOS

PATIENCE_S = 10.0
"""Recorder and controller refuse while a stream has just begun, lags or falters: they are asked again so long [s, wall]."""
SETTLE_S = 0.1
"""From a reset until joint states of the new pose have reached everybody [s]."""
MODES = {getattr(ControllerStatus, name): name
         for name in ('INACTIVE', 'HOLD', 'POLICY', 'TELEOP', 'STOPPING', 'FAULT', 'APPROACH')}


class SessionError(RuntimeError):
    """Something refused or did not answer; the message says what and why."""


class Session:
    """Synchronous calls to simulator, controller and recorder. Spins the node in a thread: do not spin it elsewhere."""

    def __init__(self, node: Node):
        self.node = node
        self.silence_s = 10.0
        """A service or status topic that says nothing for this long is given up [s, wall]."""
        self.controller: ControllerStatus | None = None
        self.task: TaskStatus | None = None
        self._heard = {'controller/status': time.monotonic(), 'task_status': time.monotonic()}
        self._changed = threading.Condition()
        node.create_subscription(ControllerStatus, 'controller/status', self._on_controller, STATUS_QOS)
        node.create_subscription(TaskStatus, 'task_status', self._on_task, QoSProfile(depth=10))
        self._reset = node.create_client(ResetTask, 'simulator/reset')
        self._arm = node.create_client(Arm, 'controller/arm')
        self._stop_arm = node.create_client(Trigger, 'controller/stop')
        self._reset_fault = node.create_client(Trigger, 'controller/reset_fault')
        self._start = node.create_client(StartEpisode, 'recorder/start_episode')
        self._stop = node.create_client(StopEpisode, 'recorder/stop_episode')
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._thread = threading.Thread(target=self._spin, name='spin', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop spinning; the node is the caller's."""
        self._executor.shutdown()
        self._thread.join(timeout=2.0)

    def reset(self, scene: Scene) -> int:
        """Put arm and goal where the scene says, wait until that is seen; the episode's number. Stop first."""
        episode = self._call(self._reset, ResetTask.Request(start=scene.start, goal=scene.goal)).episode
        if not self.wait_status(lambda _, task: task.episode == episode and task.elapsed >= SETTLE_S, 5.0):
            raise SessionError(f'task_status shows episode {self.task.episode} after the reset to episode {episode}')
        return episode

    def arm(self) -> int:
        """Arm the controller and wait until it says so; the epoch."""
        epoch = self._call(self._arm, Arm.Request(), PATIENCE_S).epoch
        if not self.wait_status(lambda controller, _: controller.epoch == epoch, 5.0):
            raise SessionError(f'controller/status does not show epoch {epoch}; mode {self.describe()}')
        return epoch

    def stop(self) -> None:
        """Bounded stop, then INACTIVE; a fault is reset."""
        if self.controller is not None and self.controller.mode == ControllerStatus.FAULT:
            self._call(self._reset_fault, Trigger.Request(), PATIENCE_S)
        else:
            self._call(self._stop_arm, Trigger.Request())
        if not self.wait_status(lambda controller, _: controller.mode == ControllerStatus.INACTIVE, 5.0):
            raise SessionError(f'the controller does not become INACTIVE; mode {self.describe()}')

    def start_episode(self, task: str, name: str = '') -> str:
        """Begin a recording; its path."""
        return self._call(self._start, StartEpisode.Request(name=name, task=task), PATIENCE_S).path

    def stop_episode(self, succeeded: bool, discard: bool = False) -> str:
        """End the recording and keep it, labelled, or discard it; its path."""
        return self._call(self._stop, StopEpisode.Request(task_succeeded=succeeded, discard=discard)).path

    def wait_status(self, predicate: Callable[[ControllerStatus, TaskStatus], bool], timeout: float) -> bool:
        """Wait until predicate(controller, task) holds for the latest of both; False after `timeout` [s, node's clock].

        Raises SessionError if one of them falls silent.
        """
        clock = self.node.get_clock()
        deadline, began = None, time.monotonic()
        with self._changed:
            while True:
                if self.controller is not None and self.task is not None:
                    if predicate(self.controller, self.task):
                        return True
                    # Simulated time is unknown until it was heard of.
                    deadline = clock.now().nanoseconds + round(timeout * 1e9) if deadline is None else deadline
                    if clock.now().nanoseconds > deadline:
                        return False
                for topic, heard in self._heard.items():
                    if time.monotonic() - max(heard, began) > self.silence_s:
                        raise SessionError(f'{self.node.resolve_topic_name(topic)} is silent for {self.silence_s:g} s; '
                                           f'publishers: {self.node.count_publishers(topic)}')
                self._changed.wait(timeout=0.05)

    def describe(self) -> str:
        """The controller's mode and its reason, in words."""
        if self.controller is None:
            return 'unknown'
        return f'{MODES.get(self.controller.mode, self.controller.mode)}: {self.controller.reason}'

    def _call(self, client, request, patience: float = 0.0):
        """The response, once it is a success; a refusal is final after `patience` [s, wall]."""
        deadline = time.monotonic() + patience
        while True:
            if not client.wait_for_service(timeout_sec=self.silence_s):
                raise SessionError(f'{client.srv_name}: nobody offers this service')
            future, done = client.call_async(request), threading.Event()
            future.add_done_callback(lambda _, done=done: done.set())
            if not done.wait(timeout=self.silence_s):
                raise SessionError(f'{client.srv_name}: no answer for {self.silence_s:g} s')
            if future.result().success:
                return future.result()
            if time.monotonic() > deadline:
                raise SessionError(f'{client.srv_name}: {future.result().message}')
            time.sleep(0.05)

    def _on_controller(self, message: ControllerStatus) -> None:
        with self._changed:
            self.controller = message
            self._heard['controller/status'] = time.monotonic()
            self._changed.notify_all()

    def _on_task(self, message: TaskStatus) -> None:
        with self._changed:
            self.task = message
            self._heard['task_status'] = time.monotonic()
            self._changed.notify_all()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass
