"""Waiting for what other processes do."""
from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def patient_contract(folder: Path) -> Path:
    """The SO-101's contract, but joint states may be half a second old: a shared machine pauses processes for longer than an
    arm may be moved blindly."""
    contract = yaml.safe_load((ROOT / 'config/robots/so101.yaml').read_text())
    contract['observations']['joint_positions']['max_age'] = 0.5
    path = folder / 'patient.yaml'
    path.write_text(yaml.safe_dump(contract))
    return path


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
