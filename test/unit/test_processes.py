from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from il_runtime.demo.processes import DemoError, Processes

SLEEP = [sys.executable, '-c', 'import time; print("up", flush=True); time.sleep(60)']


def alive(pid: int) -> bool:
    """True if the process runs; a zombie does not."""
    try:
        with open(f'/proc/{pid}/stat') as stat:
            return stat.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def gone(pid: int, timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_leaving_the_block_ends_even_those_that_do_not_listen(tmp_path):
    deaf = [sys.executable, '-c', 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)']
    with pytest.raises(KeyboardInterrupt), Processes(tmp_path, patience=1.0) as processes:
        pids = [processes.start('listens', SLEEP).pid, processes.start('deaf', deaf).pid]
        assert all(alive(pid) for pid in pids)
        raise KeyboardInterrupt
    assert all(gone(pid) for pid in pids)


def test_children_end_when_the_parent_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, '-c', (
        'import pathlib, sys, time\n'
        'from il_runtime.demo.processes import Processes\n'
        'with Processes(pathlib.Path(sys.argv[1])) as processes:\n'
        '    print(processes.start("child", [sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)\n'
        '    time.sleep(60)\n'), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(child)


def test_a_process_that_died_is_named_with_its_last_words(tmp_path):
    with Processes(tmp_path) as processes:
        process = processes.start('weak', [sys.executable, '-c', 'import sys; sys.exit("the plug was pulled")'])
        process.wait()
        with pytest.raises(DemoError, match='weak ended with 1: the plug was pulled'):
            processes.check()
