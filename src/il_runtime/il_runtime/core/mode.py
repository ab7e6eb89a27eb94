"""The controller's states and every legal transition between them, as one table."""
from __future__ import annotations

from enum import IntEnum


class Mode(IntEnum):
    """Same numbers as il_msgs/msg/ControllerStatus."""

    INACTIVE = 0
    """Not armed: nothing is sent. Also while the node is configured but not active."""
    HOLD = 1
    """Armed, commanding a fixed pose."""
    POLICY = 2
    """The policy is in charge."""
    TELEOP = 3
    """A human is in charge."""
    STOPPING = 4
    """Bounded stop under way."""
    FAULT = 5
    """Bounded stop, then a fixed pose; latched."""
    APPROACH = 6
    """Moving slowly to a first command that is too far away to be followed at once."""


EVENTS = {
    'arm': 'service arm',
    'chunk': 'a chunk of the current epoch covers now, near the commanded pose',
    'teleop': 'a fresh teleop command near the commanded pose',
    'far': 'the first command is further away than its tolerance, and approaching was allowed on arming',
    'arrived': 'the approach is over',
    'starved': 'the remaining horizon hardly covers the stopping time, or what is approached has ended',
    'released': 'the human let go (or a limit held the human back for too long)',
    'silent': 'the newest teleop command is older than its time-out, and there was no release',
    'hold': 'service hold, or a human reached for the arm who cannot be followed; a shadow: the arm has gone another way',
    'stop': 'service stop, deactivate, Ctrl-C, SIGTERM',
    'clock': '/clock stands still or jumped back',
    'overrun': 'the loop was paused for more than two ticks',
    'stopped': 'the bounded stop is over',
    'fault': 'stale joint states, following error, lagging command, three non-finite inputs in a row, another publisher, '
             'an internal error',
    'reset': 'service reset_fault, at rest',
}
"""What happens, in words."""

_MOVING = (Mode.POLICY, Mode.TELEOP, Mode.APPROACH)

# (mode, event) → mode. An event that is not listed for a mode changes nothing.
TRANSITIONS: dict[tuple[Mode, str], Mode] = {
    (Mode.INACTIVE, 'arm'): Mode.HOLD,
    (Mode.HOLD, 'arm'): Mode.HOLD,
    (Mode.HOLD, 'chunk'): Mode.POLICY,
    (Mode.HOLD, 'teleop'): Mode.TELEOP,
    (Mode.HOLD, 'far'): Mode.APPROACH,
    (Mode.HOLD, 'stop'): Mode.INACTIVE,
    (Mode.APPROACH, 'arrived'): Mode.HOLD,
    (Mode.POLICY, 'teleop'): Mode.TELEOP,
    (Mode.POLICY, 'starved'): Mode.STOPPING,
    (Mode.APPROACH, 'starved'): Mode.STOPPING,
    (Mode.TELEOP, 'released'): Mode.STOPPING,
    (Mode.APPROACH, 'released'): Mode.STOPPING,
    **{(mode, event): Mode.STOPPING for mode in _MOVING for event in ('silent', 'hold', 'stop', 'clock', 'overrun')},
    **{(mode, 'fault'): Mode.FAULT for mode in (Mode.HOLD, *_MOVING, Mode.STOPPING)},
    (Mode.STOPPING, 'stopped'): Mode.HOLD,
    (Mode.FAULT, 'reset'): Mode.INACTIVE,
}


def table() -> str:
    """The transitions as a Markdown table: what docs/safety.md shows."""
    rows = [f'| {mode.name} | {event}: {EVENTS[event]} | {after.name} |' for (mode, event), after in TRANSITIONS.items()]
    return '\n'.join(['| in | when | then |', '|---|---|---|', *rows])
