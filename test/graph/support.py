"""Waiting for what other processes do."""
from __future__ import annotations

import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def wait_for(condition, timeout: float = 20.0, what: str = 'condition'):
    """The first true value of condition(); fails the test after `timeout` [s]."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    pytest.fail(f'{what}: not within {timeout} s')


def call(node, service_type, name: str, request=None, timeout: float = 20.0):
    """Call a service and wait for its answer."""
    client = node.create_client(service_type, name)
    assert client.wait_for_service(timeout), f'{name} is not there'
    future = client.call_async(request or service_type.Request())
    wait_for(future.done, timeout, name)
    node.destroy_client(client)
    return future.result()
