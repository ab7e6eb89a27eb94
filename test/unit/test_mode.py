from __future__ import annotations

import pytest

from il_runtime.core.mode import EVENTS, TRANSITIONS, Mode, table


def test_every_mode_is_reached_and_left():
    assert {mode for mode, _ in TRANSITIONS} == set(Mode) == set(TRANSITIONS.values())
    assert {event for _, event in TRANSITIONS} == set(EVENTS)


def test_numbers_are_those_of_the_message(root):
    lines = (root / 'src/il_msgs/msg/ControllerStatus.msg').read_text().splitlines()
    numbers = dict(line.split()[1].split('=') for line in lines if line.startswith('uint8 ') and '=' in line)
    assert {name: int(number) for name, number in numbers.items()} == {mode.name: int(mode) for mode in Mode}


def test_a_fault_is_left_by_reset_only_and_nothing_moves_without_arming():
    assert {event for mode, event in TRANSITIONS if mode == Mode.FAULT} == {'reset'}
    assert {event for mode, event in TRANSITIONS if mode == Mode.INACTIVE} == {'arm'}


@pytest.mark.parametrize('mode', [m for m in Mode if m not in (Mode.INACTIVE, Mode.FAULT)])
def test_a_fault_is_legal_wherever_the_arm_is_commanded(mode):
    assert TRANSITIONS[mode, 'fault'] == Mode.FAULT


@pytest.mark.parametrize('mode', [Mode.POLICY, Mode.TELEOP, Mode.APPROACH])
def test_a_moving_arm_can_be_held_and_stopped(mode):
    assert TRANSITIONS[mode, 'hold'] == TRANSITIONS[mode, 'stop'] == Mode.STOPPING


def test_the_table_of_the_docs_is_that_of_the_code(root):
    assert table() in (root / 'docs/safety.md').read_text()
