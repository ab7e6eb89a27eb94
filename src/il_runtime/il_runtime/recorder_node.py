"""Recorder: one rosbag2 bag (mcap) an episode, holding what the contract names, the commands, and what the system did.

Messages are written as they arrive, serialised, without being decoded. Episodes begin and end by service, or by key where the
node was started from a terminal; the topic `episode` says the same to other recorders.
"""
from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from il_msgs.srv import StartEpisode, StopEpisode
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.task import Future
from std_msgs.msg import String

from il_policies.bags.writer import BagWriter
from il_policies.contract import load_contract
from il_policies.data.errors import BagError
from il_policies.data.quality import RATE_TOLERANCE
from il_runtime.ring import Message, Span
from il_runtime.ros import Terminal, be_nice, declare, run
from il_runtime.tap import Tap, warn_of_cut_short

DRAIN_S = 4.0
"""How long the end of an episode waits for messages that are still on their way [s]."""
TEND_S = 0.25
"""How often everything is handed to the system, and rates and disk are looked at [s]: what a kill can cost."""
OFF_RATE_LOOKS = 4
"""So many looks in a row must find a stream off its rate before it is warned of: simulated time arrives in leaps."""
LABELS = {'success': 'true', 'failure': 'false'}
"""How an episode may end → its label in the bag; or it ends as `discard`."""
KEYS = {'s': 'start', 'y': 'success', 'n': 'failure', 'd': 'discard'}
GIB = 2**30


@dataclass
class Episode:
    """A recording in progress."""

    writer: BagWriter
    span: Span
    """On the wall clock."""
    awaited: set[str] = field(default_factory=set)
    """Topics of which something that was sent before the end may still come."""
    drained: Future = field(default_factory=Future)
    warnings: list[str] = field(default_factory=list)
    off_rate: dict[str, int] = field(default_factory=dict)
    """Topics that come at another rate than declared now → for how many looks."""

    def settle(self) -> None:
        """Nothing more is waited for."""
        if not self.drained.done():
            self.drained.set_result(None)

    @property
    def messages(self) -> int:
        """How many were recorded."""
        return sum(self.writer.counts.values())

    @property
    def seconds(self) -> float:
        """How long it has lasted [s, wall]."""
        return (time.time_ns() - self.span.since) * 1e-9


class RecorderNode(Node):
    """Subscribes to everything at start, so that what a stream lacks is known before an episode begins."""

    def __init__(self):
        """Raises ContractError or BagError for what cannot be recorded, OSError for an unusable folder."""
        super().__init__('recorder')
        contract = declare(self, 'contract', '', "the robot's contract, a YAML file")
        output = declare(self, 'output', 'bags', 'folder in which each episode becomes a bag')
        self.task = declare(self, 'task', '', 'what is done, in words, where whoever starts an episode does not say')
        self.min_free = declare(self, 'min_free', 1.0, 'with less than this free on the disk, recording ends [GiB]', 0.0, 1e6)
        self.tolerance = declare(self, 'rate_tolerance', RATE_TOLERANCE, 'how far the rate of a stream may be from the declared '
                                 'one, as a share of it', 0.01, 100.0)
        be_nice(self)
        self.contract = load_contract(contract)
        self.output = Path(output).expanduser().absolute()
        self.output.mkdir(parents=True, exist_ok=True)
        self.sim_time = self.get_parameter('use_sim_time').value
        self.episode: Episode | None = None
        self.failure = ''
        """Why the node cannot go on, which ends it."""

        self.tap = Tap(self, self.contract, self._on_message)
        self.marks = self.create_publisher(String, 'episode', QoSProfile(depth=10))
        self.steady = Clock(clock_type=ClockType.STEADY_TIME)  # the simulated clock may stop
        self.create_timer(TEND_S, self._tend, clock=self.steady)
        self.create_service(StartEpisode, '~/start_episode', self._on_start)
        # Groups of their own: they wait while messages are still being received.
        self.create_service(StopEpisode, '~/stop_episode', self._on_stop, callback_group=MutuallyExclusiveCallbackGroup())
        warn_of_cut_short(self, self.output)
        self.get_logger().info(f'{self.contract.robot}: recording to {self.output} on request')
        try:
            self.terminal = Terminal()
        except ValueError:
            self.terminal = None
        else:
            print('s  start an episode    y  it is a success    n  it is a failure    d  discard it    Ctrl-C  leave')
            self.create_timer(0.05, self._on_keys, callback_group=MutuallyExclusiveCallbackGroup(), clock=self.steady)
            self.create_timer(0.2, self._show, clock=self.steady)

    # --- what arrives -------------------------------------------------------------------------------------------------
    def _on_message(self, message: Message) -> None:
        episode = self.episode
        if episode is None:
            return
        # Simulated time says nothing about arrival on the wall clock; then all publishers are on this machine, as a rule.
        place = episode.span.place(message.topic, message.sent if self.sim_time else message.received, message.sent)
        if place > 0:
            episode.awaited.discard(message.topic)
            if not episode.awaited:
                episode.settle()
        if place != 0:
            return
        try:
            episode.writer.write(message.topic, message.data, message.received, message.published)
        except OSError as error:
            self._end_early(error.strerror)

    def _tend(self) -> None:
        """Hand what was written to the system, and look at the disk and at the rates."""
        if self.episode is None:
            self.tap.adapt_reliability()  # between episodes: it can cost a message
            return
        off_rate = self.tap.off_rate(self.tolerance)
        if (episode := self.episode) is None:
            return
        episode.off_rate = {topic: episode.off_rate.get(topic, 0) + 1 for topic in off_rate}
        for topic, looks in episode.off_rate.items():
            if looks == OFF_RATE_LOOKS:
                self._warn(f'{topic}: {off_rate[topic]}, after {episode.seconds:.1f} s')
        try:
            episode.writer.flush()
            if self._free() < self.min_free:
                self._end_early(self._nearly_full())
        except OSError as error:
            self._end_early(error.strerror)

    def _free(self) -> float:
        """Space for recordings [GiB]."""
        return shutil.disk_usage(self.output).free / GIB

    def _nearly_full(self) -> str:
        return f'{self._free():.2g} GiB free, less than min_free, {self.min_free:g} GiB'

    # --- an episode ---------------------------------------------------------------------------------------------------
    def start(self, name: str, task: str) -> Path:
        """Begin an episode; its path. Raises BagError saying why not."""
        if self.episode is not None:
            raise BagError(f'{self.episode.writer.path.name} is being recorded; stop it first')
        if name and not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*', name) or name.endswith('.part'):
            raise BagError(f'{name!r} is no name for a bag; valid: letters, digits, _ . -')
        if self.sim_time and not self.get_clock().now().nanoseconds:
            raise BagError('use_sim_time is set, but nothing was received on /clock')
        if self._free() < self.min_free:
            raise BagError(f'{self.output}: {self._nearly_full()}; make room, or record elsewhere', 'E305')
        if faults := self.tap.faults(self.tolerance):
            raise BagError(' | '.join(faults))
        if not name:
            taken = [re.match(r'episode_(\d+)', path.name) for path in self.output.iterdir()]
            name = f'episode_{max((int(found[1]) for found in taken if found), default=-1) + 1:06d}'
        task = task or self.task
        writer = BagWriter(self.output / name, self.tap.types, {**self.tap.about(), 'task': task})
        for topic in self.tap.topics():
            writer.add_topic(*topic)
        self.episode = Episode(writer, Span(time.time_ns()))
        self._mark(f'start {task}'.strip())
        return writer.path

    async def stop(self, how: str) -> str:
        """End the episode as success, failure or discard; what became of it. Raises BagError if that cannot be done."""
        episode = self.episode
        if episode is None or episode.span.until is not None:
            raise BagError('nothing is being recorded' if episode is None else f'{episode.writer.path.name} is ending already')
        self._mark(how)
        episode.span.until = time.time_ns()
        if how == 'discard':
            self.episode = None
            episode.writer.discard()
            return 'discarded'
        # A busy machine hands messages over late: what was sent before now belongs to the episode, and what is sent after
        # it tells that a topic has nothing more to come.
        episode.awaited = set(self._streams())
        give_up = self.create_timer(DRAIN_S, episode.settle, clock=self.steady)
        await episode.drained
        self.destroy_timer(give_up)
        if self.episode is episode:
            self._close(LABELS[how])
        if self.failure:  # of the disk, now or meanwhile
            raise BagError(self.failure)
        return ', '.join([f'{how}: {episode.messages} messages', *episode.warnings])

    def _streams(self) -> list[str]:
        """Topics of the contract's streams, each once."""
        return list(dict.fromkeys(self.tap.resolved(stream.topic) for stream in self.contract.observations.values()))

    def _warn_of_missing(self) -> None:
        counts = self.episode.writer.counts
        for topic in self._streams():
            if not counts[topic]:
                self._warn(f'{topic}: no message was recorded')
        command = self.tap.resolved(self.contract.action.topic)
        if self.contract.action.label != 'next_state' and not counts[command]:
            self._warn(f'{command}: no command was recorded')

    def _close(self, success: str, interruption: str = '') -> None:
        """Complete the bag, or, if the disk refuses even that, end the node."""
        self._warn_of_missing()
        episode, self.episode = self.episode, None
        about = {'success': success, 'interrupted': 'true' if interruption else 'false'}
        if interruption:
            about['interruption'] = interruption
        if episode.warnings:
            about['warnings'] = json.dumps(episode.warnings)
        try:
            episode.writer.close(about)
        except OSError as error:
            self.failure = f'E305 {episode.writer.part}: is incomplete: {error.strerror}; recover it with il convert --salvage'
        episode.settle()

    def _end_early(self, fault: str) -> None:
        """Complete the bag on a disk that is full, and end the node."""
        path = self.episode.writer.path
        self.failure = f'E305 {path}: {fault}; it is complete up to here, and marked as interrupted'
        self._interrupt(fault)

    def _interrupt(self, interruption: str) -> None:
        """Complete the bag, marked as interrupted and without a label."""
        self._mark('stop')
        self._close('unknown', interruption)

    def _mark(self, what: str) -> None:
        self.marks.publish(String(data=what))

    def _warn(self, text: str) -> None:
        """Say it, and note it in the bag."""
        self.episode.warnings.append(text)
        self._clear()
        self.get_logger().warning(f'{self.episode.writer.path.name}: {text}')

    # --- who asks -----------------------------------------------------------------------------------------------------
    def _on_start(self, request: StartEpisode.Request, response: StartEpisode.Response) -> StartEpisode.Response:
        try:
            response.path = str(self.start(request.name, request.task))
            response.success = True
        except (BagError, OSError) as error:
            response.message = str(error)
        return response

    async def _on_stop(self, request: StopEpisode.Request, response: StopEpisode.Response) -> StopEpisode.Response:
        response.path = str(self.episode.writer.path) if self.episode else ''
        try:
            response.message = await self.stop('discard' if request.discard else
                                               'success' if request.task_succeeded else 'failure')
            response.success = True
        except (BagError, OSError) as error:
            response.message = str(error)
        return response

    async def _on_keys(self) -> None:
        for key in self.terminal.read() or '':
            if key in KEYS:
                said = await self._obey(KEYS[key])
                self._clear()
                print(said)

    async def _obey(self, word: str) -> str:
        """Do what a key stands for; what came of it."""
        try:
            if word == 'start':
                return f'{self.start("", "").name}: recording'
            name = self.episode.writer.path.name if self.episode else self.output
            return f'{name}: {await self.stop(word)}'
        except (BagError, OSError) as error:
            return str(error)

    def _show(self) -> None:
        episode = self.episode
        if episode is None:
            self.terminal.show('○ ready   [s start]')
        else:
            off = f'   off rate: {", ".join(sorted(episode.off_rate))}' if episode.off_rate else ''
            self.terminal.show(f'● {episode.writer.path.name}   {episode.seconds:.1f} s   {episode.messages} messages{off}   '
                               '[y success   n failure   d discard]')

    def _clear(self) -> None:
        """Before anything is printed."""
        if self.terminal is not None:
            self.terminal.show('')

    def finish(self, spin_once) -> None:
        """Complete an open bag, marked as interrupted and without a label, unless it is ending anyway."""
        self.tap.take()
        while self.episode is not None and self.episode.span.until is not None:
            spin_once()
        self._clear()
        if self.episode is not None:
            path = self.episode.writer.path
            self._interrupt('told to end')
            if not self.failure:
                self.get_logger().warning(f'interrupted: {path} was completed without a label')


def main() -> None:
    """Entry point."""
    run(RecorderNode)


if __name__ == '__main__':
    main()
