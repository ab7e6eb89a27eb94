"""Flight recorder: keeps the last half minute in memory and makes a bag of it when something has happened.

Events: the controller faults, a human takes over, somebody asks (`~/dump`). A bag is written a little later, so that the
stop is in it, in a thread of its own, while recording goes on.
"""
from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path

from il_msgs.msg import ControllerStatus
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from rclpy.task import Future
from std_srvs.srv import Trigger

from il_policies.bags.reader import Bag
from il_policies.bags.writer import BagWriter
from il_policies.contract import load_contract
from il_policies.data.errors import BagError
from il_runtime.ring import Message, Ring
from il_runtime.ros import Worker, be_nice, declare, run
from il_runtime.tap import CONTROLLER_STATUS, Tap, warn_of_cut_short

CAUSES = {ControllerStatus.FAULT: 'fault', ControllerStatus.TELEOP: 'takeover'}
"""Modes of the controller that are events when they begin."""
REQUEST = 'request'


@dataclass
class Flight:
    """A bag to be."""

    began: float
    """When its first event happened: monotonic [s]."""
    due: float
    """When it is written: monotonic [s]."""
    events: list[dict] = field(default_factory=list)
    """stamp [ns], cause and reason of each."""
    answer: Future = field(default_factory=Future)
    """Whether there is a bag, and its path or what went wrong."""

    @property
    def cause(self) -> str:
        """Such as fault, or fault-takeover for several."""
        return '-'.join(dict.fromkeys(event['cause'] for event in self.events))


class FlightRecorderNode(Node):
    """The ring is filled in the executor's thread; `thread` writes the bag that is being written."""

    def __init__(self):
        """Raises ContractError, BagError or ValueError for what cannot be recorded, OSError for an unusable folder."""
        super().__init__('flight_recorder')
        contract = declare(self, 'contract', '', "the robot's contract, a YAML file")
        output = declare(self, 'output', 'flight', 'folder of the bags; those of a robot in a namespace go into a folder of that '
                         'name in it')
        seconds = declare(self, 'seconds', 30.0, 'length of the window that is kept [s]', 0.1, 3600.0)
        self.after = declare(self, 'after', 2.0, 'recording goes on for so long after an event [s]', 0.0, 600.0)
        self.max_megabytes = declare(self, 'max_megabytes', 512, 'memory for the window [MB]; as much again while a bag is being '
                                     'written', 1, 1_000_000)
        self.keep = declare(self, 'keep', 20, 'so many bags of faults and takeovers stay, the oldest are removed', 1, 1_000_000)
        be_nice(self)
        if self.after >= seconds:
            raise ValueError(f'after is {self.after:g} s, must be less than seconds, {seconds:g} s: the event would be lost')
        loaded = load_contract(contract)
        self.folder = Path(output).expanduser().absolute() / self.get_namespace().strip('/')
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sim_time = self.get_parameter('use_sim_time').value
        self.mode: int | None = None
        self.pending: Flight | None = None
        self.thread: Worker | None = None

        self.status_topic = self.resolve_topic_name(CONTROLLER_STATUS)
        self.ring = Ring(seconds, self.max_megabytes * 1_000_000, {self.status_topic})
        self.tap = Tap(self, loaded, self._on_message)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # the simulated clock may stop with the fault
        self.create_timer(0.5, self.tap.adapt_reliability, clock=steady)
        self.timer = self.create_timer(0.05, self._write_when_due, clock=steady)
        self.timer.cancel()
        # A group that lets others in: an answer waits for its bag.
        self.create_service(Trigger, '~/dump', self._on_dump, callback_group=ReentrantCallbackGroup())
        warn_of_cut_short(self, self.folder)
        self.get_logger().info(f'{loaded.robot}: keeping the last {seconds:g} s, for {self.folder}')

    # --- what happens -------------------------------------------------------------------------------------------------
    def _on_message(self, message: Message) -> None:
        full = self.ring.full
        self.ring.add(message.received * 1e-9 if self.sim_time else time.monotonic(), message)
        if self.ring.full and not full:
            self.get_logger().warning(f'max_megabytes, {self.max_megabytes}, holds only {self.ring.span:.1f} s of '
                                      f'{self.ring.seconds:g} s')
        if message.topic == self.status_topic:
            status = deserialize_message(message.data, ControllerStatus)
            if status.mode in CAUSES and self.mode not in (None, status.mode):
                self._on_event(CAUSES[status.mode], status.reason)
            self.mode = status.mode

    async def _on_dump(self, _request, response: Trigger.Response) -> Trigger.Response:
        if not self.tap.last_seen:
            response.message = 'nothing has been received on any topic'
            return response
        response.success, response.message = await self._on_event(REQUEST, 'asked for').answer
        return response

    def _on_event(self, cause: str, reason: str) -> Flight:
        """Have a bag written when `after` has passed without another event, but while the first one is still in the window."""
        now = time.monotonic()
        if self.pending is None:
            self.pending = Flight(now, now + self.after)
            self.timer.reset()
        flight = self.pending
        flight.due = max(flight.due, min(now + self.after, flight.began + self.ring.seconds / 2))
        flight.events.append({'stamp': self.get_clock().now().nanoseconds, 'cause': cause, 'reason': reason})
        self.get_logger().info(f'{cause}: {reason}; a bag follows')
        return flight

    # --- the bag ------------------------------------------------------------------------------------------------------
    def _writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def _write_when_due(self) -> None:
        if self._writing() or time.monotonic() < self.pending.due:
            return
        flight, self.pending = self.pending, None
        self.timer.cancel()
        about = {**self.tap.about(), 'task': '', 'success': 'unknown', 'interrupted': 'false', 'flight': flight.cause,
                 'flight_events': json.dumps(flight.events)}
        messages, topics = self.ring.messages(), self.tap.topics()
        self.thread = Worker(lambda: self._write(flight, messages, topics, about), 'bag')
        self.thread.start()

    def _write(self, flight: Flight, messages: list[Message], topics: list[tuple], about: dict[str, str]) -> None:
        try:
            path = self._save(flight, messages, topics, about)
            self.get_logger().info(f'{path}: {len(messages)} messages')
            flight.answer.set_result((True, str(path)))
        except (BagError, OSError) as error:
            self.get_logger().error(f'no bag of {flight.cause} in {self.folder}: {error}')
            flight.answer.set_result((False, str(error)))
            return
        try:
            remove_oldest(self.folder, self.keep)
        except OSError as error:
            self.get_logger().error(f'old bags stay: {error}')

    def _save(self, flight: Flight, messages: list[Message], topics: list[tuple], about: dict[str, str]) -> Path:
        """Write a bag under a name that is free. Raises BagError or OSError, and leaves nothing then."""
        happened = datetime.fromtimestamp(time.time() - (time.monotonic() - flight.began))
        name = f'flight_{happened:%Y%m%dT%H%M%S}_{flight.cause}'
        paths = (self.folder / (name if n == 1 else f'{name}_{n}') for n in count(1))
        writer = BagWriter(next(path for path in paths if not path.exists()), self.tap.types, about)
        try:
            for topic in topics:
                writer.add_topic(*topic)
            for message in messages:
                writer.write(message.topic, message.data, message.received, message.published)
            return writer.close()
        except OSError:
            writer.discard()
            raise

    def finish(self, spin_once) -> None:
        """Write what is pending at once and wait for it: Ctrl-C often follows a fault."""
        self.tap.take()
        while self.pending is not None or self._writing():
            if self.pending is not None:
                self.pending.due = 0.0
            spin_once()


def remove_oldest(folder: Path, keep: int) -> None:
    """Remove the oldest bags of faults and takeovers beyond `keep`; requested ones, renamed ones and anything else stay."""
    bags = [path for path in folder.iterdir() if re.fullmatch(r'flight_\d{8}T\d{6}_[a-z-]+(_\d+)?', path.name)
            and _causes(path) & set(CAUSES.values()) and REQUEST not in _causes(path)]
    # By the time in the name, which survives copying; within a second by that of the file.
    bags.sort(key=lambda path: (path.name.split('_')[1], (path / 'metadata.yaml').stat().st_mtime_ns))
    for path in bags[:-keep]:
        shutil.rmtree(path)


def _causes(path: Path) -> set[str]:
    """Why a bag was written; nothing if it is no flight bag."""
    try:
        return set(Bag(path).about.get('flight', '').split('-'))
    except BagError:
        return set()


def main() -> None:
    """Entry point."""
    run(FlightRecorderNode)


if __name__ == '__main__':
    main()
