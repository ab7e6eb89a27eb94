"""The controller's states and every legal transition between them, as one table."""
from __future__ import annotations

from enum import IntEnum


class Mode(IntEnum):
    """Same numbers as il_msgs/msg/ControllerStatus."""

    INACTIVE = 0
    HOLD = 1
    POLICY = 2
    STOPPING = 4
    FAULT = 5


# (mode, event) → mode. An event that is not listed for a mode changes nothing.
TRANSITIONS: dict[tuple[Mode, str], Mode] = {
    (Mode.INACTIVE, 'arm'): Mode.HOLD,
    (Mode.HOLD, 'chunk'): Mode.POLICY,
    (Mode.HOLD, 'disarm'): Mode.INACTIVE,
    (Mode.HOLD, 'fault'): Mode.FAULT,
    (Mode.POLICY, 'starved'): Mode.STOPPING,
    (Mode.POLICY, 'disarm'): Mode.STOPPING,
    (Mode.POLICY, 'fault'): Mode.FAULT,
    (Mode.STOPPING, 'stopped'): Mode.HOLD,
    (Mode.STOPPING, 'fault'): Mode.FAULT,
    (Mode.FAULT, 'disarm'): Mode.INACTIVE,
}
