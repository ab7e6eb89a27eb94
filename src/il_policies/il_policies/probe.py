"""Asking a process of il_runtime what it hears: what needs ROS is there, and nothing here imports it."""
from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys

PATIENCE_S = 60.0
"""How much longer than asked a probe may take [s]: it starts Python and finds the others."""
GRACE_S = 12.0
"""From asking a probe to end to ending it [s]."""


class ProbeError(RuntimeError):
    """A probe that cannot be started or does not answer; the message says why and what helps."""


def ask(node: str, parameters: dict, seconds: float, namespace: str = '/', who: str = '--live', **environment: str) -> dict:
    """What a node of il_runtime, run for about so many seconds with parameters, prints as JSON.

    who: for whom, in errors; environment: variables it is given besides ours. Raises ProbeError.
    """
    for package, what in (('rclpy', 'source ROS 2 (or . ./env.sh)'), ('il_runtime', 'build the workspace and source it (bash '
                                                                      'setup.sh && . ./env.sh)')):
        if importlib.util.find_spec(package) is None:
            raise ProbeError(f'{who} needs {package}, which is not here: {what}')
    arguments = [word for name, value in parameters.items() for word in ('-p', f'{name}:={value}')]
    # Its output is JSON; logs must go elsewhere.
    process = subprocess.Popen(
        [sys.executable, '-m', f'il_runtime.{node}', '--ros-args', *arguments, '-r', f'__ns:={namespace}'], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'RCUTILS_LOGGING_USE_STDOUT': '0', **environment})
    try:
        output, words = process.communicate(timeout=seconds + PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise ProbeError(f'{who}: no answer from {node} within {seconds + PATIENCE_S:g} s') from None
    finally:
        if process.poll() is None:  # it may have nodes of its own to bring to an end
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode:
        last = (words.strip().splitlines() or ['no word'])[-1]
        raise ProbeError(f'{who}: {last}')
    try:
        return json.loads(output)
    except ValueError as error:
        raise ProbeError(f'{who}: {node} does not answer in JSON: {error}') from None
