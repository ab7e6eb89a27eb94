"""What the nodes share: parameters with descriptions, QoS, stamps, and a main that ends in order."""
from __future__ import annotations

import atexit
import functools
import json
import os
import re
import select
import shutil
import signal
import sys
import termios
import threading
import traceback
import tty
from collections.abc import Callable, Iterator
from contextlib import suppress

import rclpy
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PointStamped, PoseStamped, TwistStamped, WrenchStamped
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.callback_groups import CallbackGroup
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image, Imu, JointState, Range

from il_policies.contract import Stream

MESSAGE_TYPES = {
    'geometry_msgs/msg/PointStamped': PointStamped, 'geometry_msgs/msg/PoseStamped': PoseStamped,
    'geometry_msgs/msg/TwistStamped': TwistStamped, 'geometry_msgs/msg/WrenchStamped': WrenchStamped,
    'sensor_msgs/msg/CompressedImage': CompressedImage, 'sensor_msgs/msg/Image': Image,
    'sensor_msgs/msg/Imu': Imu, 'sensor_msgs/msg/JointState': JointState, 'sensor_msgs/msg/Range': Range,
}
"""What a contract's observation streams may carry: a table, because a file must not name code to import."""

STATUS_QOS = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL, reliability=ReliabilityPolicy.RELIABLE)


def message_class(stream: Stream):
    """The message class of a stream. Raises ValueError for types that are not supported."""
    if stream.type not in MESSAGE_TYPES:
        raise ValueError(f'{stream.topic}: type {stream.type!r} is not supported; valid: {", ".join(MESSAGE_TYPES)}')
    return MESSAGE_TYPES[stream.type]


def chunk_qos(length: float | None = None) -> QoSProfile:
    """QoS of action chunks; a publisher gives the chunk's length [s], after which the middleware drops it."""
    qos = QoSProfile(depth=8, durability=DurabilityPolicy.VOLATILE, reliability=ReliabilityPolicy.RELIABLE)
    if length is not None:
        qos.lifespan = Duration(seconds=length)
    return qos


def declare(node, name: str, default, description: str, low=None, high=None, read_only=True):
    """Declare a parameter that explains itself, and return its value; low and high bound numbers, both included."""
    descriptor = ParameterDescriptor(description=description, read_only=read_only)
    if isinstance(default, bool) or low is None:
        pass
    elif isinstance(default, int):
        descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=0)]
    else:
        descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high), step=0.0)]
    return node.declare_parameter(name, default, descriptor).value


def entities(node) -> dict:
    """What a node has open → how it is given up."""
    return {**dict.fromkeys(node.publishers, node.destroy_publisher), **dict.fromkeys(node.services, node.destroy_service),
            **dict.fromkeys(node.subscriptions, node.destroy_subscription), **dict.fromkeys(node.timers, node.destroy_timer)}


class Polled(CallbackGroup):
    """Group of subscriptions that no executor serves: whoever owns them takes their messages with `take_all`."""

    def can_execute(self, _entity) -> bool:
        """Never."""
        return False

    def beginning_execution(self, _entity) -> bool:
        """Never."""
        return False

    def ending_execution(self, _entity) -> None:
        """Nothing to end."""


def take_all(subscription) -> Iterator[tuple]:
    """What has arrived: (message, info), oldest first."""
    while (taken := subscription.handle.take_message(subscription.msg_type, subscription.raw)) is not None:
        yield taken


def nanoseconds(stamp: Time) -> int:
    """A stamp in nanoseconds."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def to_stamp(time: int) -> Time:
    """Nanoseconds as a stamp."""
    return Time(sec=time // 1_000_000_000, nanosec=time % 1_000_000_000)


def be_nice(node) -> None:
    """Declare `nice` and give way by that much: whoever is not the controller must not delay it on a busy machine."""
    nice = declare(node, 'nice', 10, "added to the process's niceness: 0 competes with the controller, 19 gives way", 0, 19)
    for thread in os.listdir('/proc/self/task'):  # Linux counts niceness by thread, and the middleware's run already
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread), min(os.getpriority(os.PRIO_PROCESS, int(thread)) + nice, 19))


def loud(transition):
    """Decorator for lifecycle callbacks: rclpy turns an exception into ERROR without a word; this names it."""
    @functools.wraps(transition)
    def wrapped(node, state):
        try:
            return transition(node, state)
        except ValueError as error:  # ours, written to be read
            node.get_logger().error(str(error))
            return TransitionCallbackReturn.FAILURE
        except Exception:
            node.get_logger().error(traceback.format_exc())
            raise
    return wrapped


def start(node) -> None:
    """Configure and activate a lifecycle node that is its own manager. Raises ValueError if either fails."""
    for transition in (node.trigger_configure, node.trigger_activate):
        if transition() != TransitionCallbackReturn.SUCCESS:
            raise ValueError(f'{node.get_name()} could not start, see above')


class Terminal:
    """The terminal that a node was started from: keys one by one, and a last line that says how things are."""

    def __init__(self):
        """Raises ValueError if there is none, or the node is not in its foreground."""
        self._keys, self._shown = sys.stdin.fileno(), False
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ValueError('stdin is no terminal: keys need a node that was started from a shell, not from a launch file')
        with suppress(OSError):  # not every terminal knows jobs
            if os.tcgetpgrp(self._keys) != os.getpgrp():
                raise ValueError('keys need a node in the foreground')  # asking for them would stop it
        # However this process ends, the shell gets its terminal back, without keys that were not read.
        atexit.register(termios.tcsetattr, self._keys, termios.TCSAFLUSH, termios.tcgetattr(self._keys))
        tty.setcbreak(self._keys)

    def read(self) -> str | None:
        """The keys since the last call, without those that send more than a letter; None if the terminal is gone."""
        try:
            if not select.select([self._keys], [], [], 0)[0]:
                return ''
            text = os.read(self._keys, 1024).decode(errors='ignore')
        except OSError:
            return None
        return re.sub(r'\x1b[\[O][\d;]*.', '', text) if text else None

    def show(self, text: str) -> None:
        """Have the last line say this; '' clears it, which must be done before anything else is printed."""
        if text or self._shown:
            with suppress(OSError):  # it may be gone
                width = shutil.get_terminal_size().columns
                print(f'\r\x1b[K{text[:width - 1]}', end='', flush=True)
        self._shown = bool(text)


class Worker(threading.Thread):
    """A node's own thread; if it fails, `run` ends the node instead of leaving a body without a heart."""

    def __init__(self, work: Callable[[], None], name: str):
        super().__init__(name=name, daemon=True)
        self.work, self.failure = work, ''

    def run(self) -> None:
        """The work, until it returns or fails."""
        try:
            self.work()
        except Exception:
            self.failure = traceback.format_exc()


def answer(name: str, hear: Callable[[], dict]) -> None:
    """Main of a node that il_policies.probe asks: print as JSON what it hears; if it cannot, a line on stderr and exit code 2."""
    rclpy.init()
    try:
        print(json.dumps(hear()))
    except (ValueError, OSError, rclpy.exceptions.ParameterException) as error:
        print(f'{name}: {error}', file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, ExternalShutdownException):
        sys.exit(130)
    finally:
        rclpy.try_shutdown()


def run(make_node: Callable[[], rclpy.node.Node]) -> None:
    """Main of a node: spin until Ctrl-C, SIGTERM or a closed terminal, let it finish in order (`node.finish(spin_once)`), exit 0.

    A node that cannot start says so in one line and exits with 2; one that has a `failure`, or whose `thread`, a Worker, has,
    exits with 1.
    """
    asked = threading.Event()
    # A handler of Python's runs when the executor returns to the interpreter; the byte in a pipe is there at once.
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    for number in (signal.SIGINT, signal.SIGTERM, *(() if under_nohup else (signal.SIGHUP,))):
        signal.signal(number, lambda *_: None)
    # rclpy's own handlers would tear the context down before the last commands are out.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make_node()
    except (ValueError, OSError, rclpy.exceptions.ParameterException) as error:
        print(f'{sys.argv[0].rsplit("/", 1)[-1]}: {error}', file=sys.stderr)
        rclpy.shutdown()
        sys.exit(2)
    executor = SingleThreadedExecutor()
    executor.add_node(node)

    def failure() -> str:
        return getattr(node, 'failure', '') or getattr(getattr(node, 'thread', None), 'failure', '')

    def wait_for_signal() -> None:
        os.read(told, 1)
        asked.set()
        executor.wake()

    threading.Thread(target=wait_for_signal, name='signals', daemon=True).start()
    try:
        while not asked.is_set() and not failure():
            executor.spin_once(timeout_sec=0.5)
        if hasattr(node, 'finish'):
            node.finish(lambda: executor.spin_once(timeout_sec=0.02))
    except ExternalShutdownException:
        pass
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
        # Ctrl-C reaches what ros2 launch started twice, and an interpreter that is shutting down would die of the second.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if failure():
        sys.exit(failure())
