"""Nodes as ordinary processes that never outlive the demo."""
from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one line for the user."""


class Processes:
    """Starts processes with logs of their own; leaving the block ends them all."""

    def __init__(self, logs: Path, patience: float = 8.0):
        """patience: from asking a process to end to ending it [s]."""
        self.logs, self.patience = logs, patience
        self.running: dict[str, subprocess.Popen] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + self.patience
        for process in self.running.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, command: list[str], **options) -> subprocess.Popen:
        """Start a command under a name; its output goes to <logs>/<name>.log unless stdout is given."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.logs / f'{name}.log', 'w') as log:
            options.setdefault('stdout', log)
            self.running[name] = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                                                  preexec_fn=_end_with_parent, text=True, **options)
        return self.running[name]

    def node(self, name: str, use_sim_time: bool = False, stdout=None, **parameters) -> subprocess.Popen:
        """Start a node of il_runtime with parameters."""
        arguments = [word for key, value in (('use_sim_time', use_sim_time), *parameters.items())
                     for word in ('-p', f'{key}:={str(value).lower() if isinstance(value, bool) else value}')]
        options = {} if stdout is None else {'stdout': stdout}
        return self.start(name, [sys.executable, '-m', f'il_runtime.{name}', '--ros-args', *arguments], **options)

    def check(self) -> None:
        """Raise DemoError if a process has ended that should be running."""
        for name, process in self.running.items():
            if process.poll() is not None:
                raise DemoError(f'{name} ended with {process.returncode}: {self.last_words(name)}')

    def last_words(self, name: str) -> str:
        """The last line that a process printed, and where the others are."""
        log = self.logs / f'{name}.log'
        lines = log.read_text(errors='replace').strip().splitlines() if log.exists() else []
        return f'{lines[-1] if lines else "it printed nothing"} (log: {log})'


def _end_with_parent() -> None:
    # If the demo itself is killed, the kernel ends its children (Linux: PR_SET_PDEATHSIG = 1).
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C."""
    def interrupt(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
