"""Planning: observations in, stamped action chunks out, as slow as the network needs. The only node that imports torch."""
from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from builtin_interfaces.msg import Duration
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from il_msgs.msg import ActionChunk, ControllerStatus
from il_msgs.srv import LoadPolicy
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration as Span
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rclpy.task import Future
from std_msgs.msg import String

from il_policies import deploy
from il_policies.check.agreement import differences, of_contract, of_policy
from il_policies.contract import load_contract
from il_policies.data.align import Observation
from il_policies.data.decode import DecodeError
from il_policies.observer import Observer
from il_policies.planner import NOISE, RTC, Planner
from il_policies.policies import Policy
from il_runtime.core.latency import Window
from il_runtime.images import convert
from il_runtime.ros import STATUS_QOS, Worker, be_nice, chunk_qos, declare, entities, loud, message_class, run, start, to_stamp

FOLLOWING = (ControllerStatus.HOLD, ControllerStatus.POLICY, ControllerStatus.APPROACH)
PLAN_WHEN = ('stride', 'continuous', 'horizon')
PAUSE = 0.002
"""Between two looks of the planning thread at what has changed [s]."""
LEAST_PERIOD = 0.02
"""Continuous planning of a quick network begins no chunk sooner after another: the controller takes up one a tick [s]."""
STREAMS_TIMEOUT = 5.0
"""A policy that was loaded at run time waits for its observations for so long, then it is given up [s]."""
SILENT = 2.0
"""A controller that tells nothing for longer is gone; it publishes its status every 0.1 s, also when /clock stands still [s]."""
DELAY_SHARE = 0.9
"""Share of measured delays that real-time chunking allows for."""
STAGES = {'arrival': 'capture to arrival here', 'observation': 'observation to planning', 'inference': 'inference',
          'publishing': 'inference to published', 'total': 'capture to published'}
"""What is timed, and its name in diagnostics. The first command after it is the controller's to tell."""


@dataclass
class Brain:
    """A policy that plans, and what it sees."""

    source: str
    """Folder of its checkpoint."""
    policy: Policy
    planner: Planner
    observer: Observer
    deadline: float = 0.0
    """Loaded at run time: until when it may wait for its observations, monotonic [s]."""
    taken_over: Future = field(default_factory=Future)
    """Loaded at run time: '' once it plans, else why it does not."""


class PolicyNode(LifecycleNode):
    """Lifecycle: configure loads the checkpoint and checks it against the contract, activate plans."""

    def __init__(self):
        super().__init__('policy')
        declare(self, 'contract', '', "the robot's contract, a YAML file")
        declare(self, 'checkpoint', '', 'folder written by il train')
        declare(self, 'plan_when', 'stride', 'stride: every `stride` policy steps; continuous: as fast as it can; '
                'horizon: when less than `least_horizon` steps of the last chunk remain; live', read_only=False)
        declare(self, 'stride', 8, 'policy steps between plans; live', 1, 1000, read_only=False)
        declare(self, 'least_horizon', 8, 'policy steps, see plan_when; live', 1, 1000, read_only=False)
        declare(self, 'noise', 'warm_start', f'noise of each new chunk: {", ".join(NOISE)}')
        declare(self, 'tau', 0.5, 'warm start: from where the previous chunk is denoised anew; 0 = pure noise', 0.0, 0.99)
        declare(self, 'rtc', 'off', f'real-time chunking, the new chunk continues the previous one: {", ".join(RTC)}; '
                'the controller\'s ensembling must be latest')
        declare(self, 'rtc_beta', 5.0, 'largest weight of the guidance by rtc: higher holds closer to the previous chunk',
                0.001, 1000.0)
        declare(self, 'seed', 0, 'seed of the noise', 0, 2**31 - 1)
        declare(self, 'threads', 1, 'threads of the network', 1, 256)
        declare(self, 'backend', 'auto', f'what runs the network: {", ".join(deploy.BACKENDS)}; auto: the fastest that the '
                'checkpoint was exported for (il export onnx), or torch')
        be_nice(self)
        autostart = declare(self, 'autostart', True, 'configure and activate at once')
        self.permanent = set(entities(self))
        if autostart:
            start(self)

    # --- lifecycle ----------------------------------------------------------------------------------------------------
    @loud
    def on_configure(self, _state) -> TransitionCallbackReturn:
        """Load, check, warm up."""
        torch.set_num_threads(self._value('threads'))
        self.contract = load_contract(self._value('contract'))
        self.lock = threading.RLock()  # over observers and status, between callbacks and the planning thread
        self.status: ControllerStatus | None = None
        self.heard = 0.0  # when that came: monotonic [s]
        self.running, self.loading, self.instruction = False, False, ''
        self.incoming: Brain | None = None  # loaded, and about to take over
        self.problems: dict[str, str] = {}
        self.planned = 0.0  # when the last chunk was published: monotonic [s]
        self.count, self.shown, self.told = 0, None, 0.0
        self.arrived: dict[str, tuple[int, int]] = {}  # feature → its newest sample's stamp, and when that came [ns]
        self._forget_durations()
        self.brain = self._load(self._value('checkpoint'))
        self.subscribed: set[str] = set()
        self._subscribe(self.brain)
        self.create_subscription(ControllerStatus, 'controller/status', self._on_status, STATUS_QOS)
        self.create_subscription(String, 'instruction', self._on_instruction, STATUS_QOS)
        self.diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', QoSProfile(depth=10))
        self.chunk_times = self.create_publisher(DiagnosticStatus, '~/chunk_times', QoSProfile(depth=100))
        # Steady: a stalled /clock must not silence the node. A group that lets others in: an answer waits for its policy.
        self.create_timer(0.1, self._look_around, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.create_service(LoadPolicy, '~/load_policy', self._on_load, callback_group=ReentrantCallbackGroup())
        self.add_on_set_parameters_callback(self._on_parameters)
        back = JumpThreshold(min_forward=None, min_backward=Span(nanoseconds=-1), on_clock_change=False)
        self._jumps = self.get_clock().create_jump_callback(back, post_callback=lambda _: self._on_jump_back())
        # Last, so that who sees a publisher of chunks finds a planner that is ready. Its lifespan stays that of the first
        # policy: the controller knows of every chunk when it ends.
        spec = self.brain.policy.spec
        self.chunks = self.create_publisher(ActionChunk, 'chunks', chunk_qos(spec.horizon * spec.step_period))
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state) -> TransitionCallbackReturn:
        """Start planning."""
        self.running = True
        self.thread = Worker(self._plan, 'planning')
        self.thread.start()
        when, period = self._value('plan_when'), self.brain.policy.spec.step_period
        words = {'stride': f'every {self._value("stride") * period:g} s', 'continuous': 'as fast as it can',
                 'horizon': f'when less than {self._value("least_horizon") * period:g} s of a chunk remain'}
        self.get_logger().info(f'{self.brain.policy.hash} by {self.brain.policy.backend}: plans {words[when]}')
        return super().on_activate(state)

    def on_deactivate(self, state) -> TransitionCallbackReturn:
        """Stop planning."""
        self.finish()
        return super().on_deactivate(state)

    def on_shutdown(self, state) -> TransitionCallbackReturn:
        """Stop planning, from whatever state."""
        self.finish()
        return super().on_shutdown(state)

    def on_cleanup(self, state) -> TransitionCallbackReturn:
        """Give up what configure opened, so that it can be configured anew."""
        for entity, destroy in entities(self).items():
            if entity not in self.permanent:
                destroy(entity)
        self.remove_on_set_parameters_callback(self._on_parameters)
        self._jumps.unregister()
        return super().on_cleanup(state)

    def finish(self, _spin_once=None) -> None:
        """End the planning thread."""
        if getattr(self, 'running', False):
            self.running = False
            self.thread.join(timeout=5.0)
            self._take_over(following=False)  # whoever asked for another policy gets an answer

    def _value(self, name: str):
        return self.get_parameter(name).value

    def _load(self, source: str) -> Brain:
        """Load a checkpoint, check it against the contract, warm it up. Raises ValueError if it cannot plan here."""
        policy = deploy.load(source, self._value('backend'), self._value('threads'))
        mismatches = differences(of_contract(self._value('contract'), self.contract), of_policy(source, policy))
        if mismatches:
            raise ValueError(f'{source} was trained for another robot: ' + '; '.join(mismatches))
        spec = policy.spec
        _check_when(self._value('plan_when'), self._value('least_horizon'), spec.horizon)
        planner = Planner(policy, *(self._value(name) for name in ('noise', 'tau', 'seed', 'rtc', 'rtc_beta')))
        # The first pass through a network is the slowest; it must not be the first of an episode.
        planner.warm_up()
        for name in spec.features:
            message_class(self.contract.observations[name])
        return Brain(source, policy, planner, Observer(self.contract, spec.features, spec.history, spec.step_period))

    def _subscribe(self, brain: Brain) -> None:
        """Listen to what a policy observes, too."""
        for name in brain.observer.streams.keys() - self.subscribed:
            stream = self.contract.observations[name]
            self.create_subscription(message_class(stream), stream.topic,
                                     lambda message, info, name=name: self._on_sample(name, message, info),
                                     qos_profile_sensor_data)
            self.subscribed.add(name)

    # --- callbacks ----------------------------------------------------------------------------------------------------
    def _on_sample(self, name: str, message, info: dict) -> None:
        now = self.get_clock().now().nanoseconds
        # Each decodes for itself: two of them listen only while one is about to take over.
        for brain in (self.brain, self.incoming):
            if brain is None or name not in brain.observer.streams:
                continue
            try:
                with self.lock:
                    stamp = brain.observer.take(name, message, info['source_timestamp'], now, convert)
                    self.arrived[name] = stamp, now
            except DecodeError as error:
                self.get_logger().warning(f'{name} ignored: {error}', throttle_duration_sec=1.0)
            else:
                self.windows['arrival'].add(time.monotonic(), (now - stamp) * 1e-9)

    def _on_status(self, status: ControllerStatus) -> None:
        with self.lock:
            self.status, self.heard = status, time.monotonic()

    def _on_instruction(self, message: String) -> None:
        self.instruction = message.data

    def _on_parameters(self, parameters) -> SetParametersResult:
        """Live ones take effect with the next chunk."""
        new = {parameter.name: parameter.value for parameter in parameters}
        try:
            _check_when(*(new.get(name, self._value(name)) for name in ('plan_when', 'least_horizon')),
                        self.brain.policy.spec.horizon)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _on_jump_back(self) -> None:
        with self.lock:
            for brain in (self.brain, self.incoming):
                if brain is not None:
                    brain.observer.clear()

    # --- another policy -----------------------------------------------------------------------------------------------
    async def _on_load(self, request: LoadPolicy.Request, response: LoadPolicy.Response) -> LoadPolicy.Response:
        """Answers once the new policy plans, or with why it does not; meanwhile the old one goes on."""
        if self.loading:
            response.message = 'another policy is being loaded'
        else:
            self.loading = True
            try:
                response.message = await self._exchange(request.checkpoint)
                response.success = not response.message
            finally:
                self.loading = False
            response.message = response.message or f'{request.checkpoint} plans'
        response.policy = self.brain.policy.hash
        if response.success:
            self.get_logger().info(f'load_policy: {response.message}')
        else:
            self.get_logger().error(f'load_policy: {response.message}')
        return response

    async def _exchange(self, source: str) -> str:
        """Why it failed, or ''."""
        planners = self.count_publishers(self.chunks.topic_name)
        if planners > 1:  # the controller would refuse its chunks, and the arm stop for want of the old one's
            return f'there are {planners} planners on {self.chunks.topic_name}; a policy is exchanged by the only one'
        loaded = Future(executor=self.executor)

        def load() -> None:
            torch.set_num_threads(self._value('threads'))
            try:
                loaded.set_result(self._load(source))
            except (ValueError, OSError) as error:
                loaded.set_result(str(error))
            except Exception as error:
                loaded.set_result(f'internal error: {error!r}')

        Worker(load, 'loading').start()
        brain = await loaded
        if isinstance(brain, str):
            return brain
        brain.taken_over = Future(executor=self.executor)
        brain.deadline = time.monotonic() + STREAMS_TIMEOUT
        with self.lock:
            self.incoming = brain
        self._subscribe(brain)
        if not self.running:
            self._take_over(following=False)
        return await brain.taken_over

    def _take_over(self, following: bool) -> bool:
        """The policy that was loaded takes over as soon as it sees all it needs, or if nobody follows; True if it does now."""
        new = self.incoming
        if new is None:
            return False
        with self.lock:
            now = self.get_clock().now().nanoseconds
            problems = new.observer.observe(now, now)[1].problems if following else {}
            if problems and time.monotonic() < new.deadline:
                return False
            self.incoming = None
            if not problems:
                self.brain = new
                self._forget_durations()
        new.taken_over.set_result(f'{new.source} was given up, for what it observes is not there: ' + '; '.join(problems.values())
                                  if problems else '')
        return not problems

    def _forget_durations(self) -> None:
        """Those of another network would tell nothing."""
        self.windows = {name: Window() for name in (*STAGES, 'delay')}

    # --- planning -----------------------------------------------------------------------------------------------------
    def _plan(self) -> None:
        epoch, following, moving, sequence, due, since, began = None, False, False, 0, 0, 0, None
        seen = now = 0
        while self.running:
            taken_over = self._take_over(following)
            if taken_over:  # it has seen nothing before
                began = None
            with self.lock:
                brain, status = self.brain, self.status
            before, now = now, self.get_clock().now().nanoseconds
            if now < before:  # the clock has gone back: what it was to do next is in a time that may be hours away
                due, since, began, seen = now, now, None, 0
                brain.planner.reset()
            was_following, was_moving = following, moving
            following = status is not None and status.mode in FOLLOWING
            moving = following and status.mode == ControllerStatus.POLICY
            if following and (status.epoch != epoch or not was_following):
                # Within an epoch the sequence goes on: the controller takes one that it has seen for a double.
                sequence = sequence if status.epoch == epoch else 0
                if not (moving and was_moving):  # after a stop the arm is elsewhere than the last chunk would have it
                    since, began = now, None
                epoch, due, seen = status.epoch, now, 0
                brain.planner.reset()
            elif taken_over:  # its first chunk makes the controller begin a new epoch, in which it is followed
                due = now
            if not following or now < due:
                time.sleep(PAUSE)
                continue
            with self.lock:
                t, observation = brain.observer.observe(now, began)
                arrivals = dict(self.arrived)
            self.problems = observation.problems
            if observation.problems:
                self.get_logger().warning('not planning: ' + '; '.join(observation.problems.values()), throttle_duration_sec=1.0)
                time.sleep(0.02)
                continue
            # The newest frame is from before: it may show the arm elsewhere, as before a reset; or it has been planned from.
            if t < since or brain.observer.anchor and t <= seen:
                time.sleep(PAUSE)
                continue
            began = t if began is None else began
            if status.mode == ControllerStatus.HOLD:
                # Nothing is followed yet. Warm-started from a chunk that was refused, the next one would be refused too.
                brain.planner.forget()
            anchor = brain.observer.anchor
            captured = arrivals[anchor] if anchor else max(arrivals[name] for name in brain.observer.streams)
            self._make_chunk(brain, t, observation, epoch, sequence, status.speed_scale / 100.0, captured)
            seen, sequence = t, sequence + 1
            due = self._next_due(brain, due, now, t)

    def _next_due(self, brain: Brain, due: int, now: int, t: int) -> int:
        """When the chunk after one that was planned from t is to be begun, by plan_when; all [ns]."""
        period, spec = brain.observer.period, brain.policy.spec
        when = self._value('plan_when')
        if when == 'continuous':
            return now + round(LEAST_PERIOD * 1e9)
        if when == 'horizon':
            end = t + round(spec.action_offset * 1e9) + (spec.horizon - 1) * period
            return max(end - self._value('least_horizon') * period, now + round(LEAST_PERIOD * 1e9))
        stride = self._value('stride') * period
        return due + stride * (1 + max(0, (now - due) // stride))

    def _make_chunk(self, brain: Brain, t: int, observation: Observation, epoch: int, sequence: int, speed: float,
                    captured: tuple[int, int]) -> None:
        """Plan from an observation of time t [ns], publish, and time it.

        speed: share of full speed of the arm. captured: when the newest frame, or without cameras the newest sample, of the
        observation was taken, and when it came [ns].
        """
        spec = brain.policy.spec
        chunk_start = t + round(spec.action_offset * 1e9)
        began = time.monotonic()
        beginning = self.get_clock().now().nanoseconds
        waited = (beginning - t) * 1e-9
        delay = self.windows['delay'].quantiles(began, (DELAY_SHARE,))
        # It is taken up at the controller's next tick.
        late = (0.0 if delay is None else float(delay[0])) + 1.0 / self.contract.control_rate
        positions = brain.planner.plan(observation.data, chunk_start * 1e-9, late, speed if 0.0 <= speed <= 1.0 else 1.0)
        planned = time.monotonic()
        took = round((planned - began) * 1e9)
        message = ActionChunk(step_period=spec.step_period, joint_names=list(spec.action_names), horizon=len(positions),
                              positions=positions.astype('float32').ravel(), epoch=epoch, sequence=sequence,
                              policy=brain.policy.hash)
        message.header.stamp = to_stamp(t)
        message.start = to_stamp(chunk_start)
        message.inference_time = Duration(sec=took // 10**9, nanosec=took % 10**9)
        self.chunks.publish(message)
        published = time.monotonic()
        done = self.get_clock().now().nanoseconds
        self.planned, self.count = published, self.count + 1
        for name, duration in (('observation', waited), ('inference', planned - began), ('publishing', published - planned),
                               ('total', (done - t) * 1e-9), ('delay', (done - chunk_start) * 1e-9)):
            self.windows[name].add(published, duration)
        times = {'captured': captured[0], 'arrived': captured[1], 'began': beginning, 'planned': beginning + took}
        self.chunk_times.publish(self._chunk_times(epoch, sequence, times))

    def _chunk_times(self, epoch: int, sequence: int, times: dict[str, int]) -> DiagnosticStatus:
        """For `il bench latency`: when what happened to a chunk [ns]."""
        values = {'epoch': epoch, 'sequence': sequence, **times, 'plan when': self._value('plan_when')}
        return DiagnosticStatus(name=f'{self.get_fully_qualified_name()}: chunk', hardware_id=self.contract.robot,
                                values=[KeyValue(key=key, value=str(value)) for key, value in values.items()])

    # --- diagnostics --------------------------------------------------------------------------------------------------
    def _look_around(self) -> None:
        """Publish diagnostics once a second, and at once when something has changed."""
        now, monotonic = self.get_clock().now().nanoseconds, time.monotonic()
        with self.lock:
            status, brain = self.status, self.brain
            problems = brain.observer.problems(now)
            refused = dict(brain.observer.refused)
        following = self.running and status is not None and status.mode in FOLLOWING
        if following:
            problems = {**self.problems, **problems}
        level, message = self._judgement(status, brain, following, problems, monotonic)
        shown = level, message.partition(':')[0], tuple(sorted(problems)), brain.policy.hash
        if shown == self.shown and monotonic - self.told < 0.95:
            return
        self.shown, self.told = shown, monotonic
        values = {'policy': brain.policy.hash, 'kind': brain.policy.kind, 'checkpoint': str(Path(brain.source).absolute()),
                  'plan when': self._value('plan_when'), 'rtc': brain.planner.rtc, 'instruction': self.instruction,
                  'chunks': self.count, 'epoch': '' if status is None else status.epoch,
                  **{f'stream {name}': problems.get(name, 'fresh') for name in brain.observer.streams},
                  **{f'refused {name}': count for name, count in refused.items()},
                  **{f'{words} p50 / p90 / p99 / max': self.windows[name].words(monotonic) for name, words in STAGES.items()}}
        array = DiagnosticArray(status=[DiagnosticStatus(
            level=level, name=f'{self.get_fully_qualified_name()}: planning', message=message, hardware_id=self.contract.robot,
            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()])])
        array.header.stamp = self.get_clock().now().to_msg()
        self.diagnostics.publish(array)

    def _judgement(self, status: ControllerStatus | None, brain: Brain, following: bool, problems: dict[str, str],
                   monotonic: float) -> tuple[bytes, str]:
        """Level and message."""
        if problems:
            level = DiagnosticStatus.ERROR if following else DiagnosticStatus.WARN
            return level, ('not planning: ' if following else 'could not plan: ') + '; '.join(problems.values())
        if not self.running:
            return DiagnosticStatus.OK, 'not active'
        if status is None:
            return DiagnosticStatus.WARN, 'waiting for a controller: nothing received on controller/status'
        if monotonic - self.heard > SILENT:
            return DiagnosticStatus.WARN, f'the controller is silent: its newest status came {monotonic - self.heard:.0f} s ago'
        if not following:
            return DiagnosticStatus.OK, f'waiting: the controller is not in a mode that follows chunks ({status.reason})'
        spec = brain.policy.spec
        late, slow = (self.windows[name].quantiles(monotonic, (DELAY_SHARE,)) for name in ('delay', 'inference'))
        length = (spec.horizon - 1) * spec.step_period
        if late is not None and late[0] > length:
            return DiagnosticStatus.ERROR, (f'starved: chunks end before they are planned: they cover {length:.2f} s and come '
                                            f'after {late[0]:.2f} s')
        if slow is not None and self._value('plan_when') == 'stride' and slow[0] > self._value('stride') * spec.step_period:
            return DiagnosticStatus.WARN, (f'slow: planning takes {slow[0]:.2f} s, more than the stride of '
                                           f'{self._value("stride") * spec.step_period:.2f} s')
        if brain.planner.rtc != 'off' and status.ensembling not in ('', 'latest'):
            return DiagnosticStatus.WARN, (f'rtc is {brain.planner.rtc}, but the controller blends chunks: its ensembling is '
                                           f'{status.ensembling}, should be latest')
        return DiagnosticStatus.OK, 'planning'


def _check_when(plan_when: str, least_horizon: int, horizon: int) -> None:
    """Raises ValueError for an unknown mode, or one that would plan all the time without being asked to."""
    if plan_when not in PLAN_WHEN:
        raise ValueError(f'plan_when is {plan_when!r}; valid: {", ".join(PLAN_WHEN)}')
    if plan_when == 'horizon' and least_horizon >= horizon:
        raise ValueError(f'least_horizon is {least_horizon}, must be less than the horizon of the policy, {horizon}')


def main() -> None:
    """Entry point."""
    run(PolicyNode)


if __name__ == '__main__':
    main()
