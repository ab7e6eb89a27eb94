"""Writes what the tests measured (log/faults/*.json, by the fixture `show`) into the table of docs/safety.md."""
from __future__ import annotations

import datetime
import json
import os
import platform
import re

from conftest import FAULTS, ROOT

CASES = (
    'NaN, ±Inf, 1e308 in a chunk, joint state, teleop command',
    '1,000,000 seeded random ticks, stops, limits and bounds near included',
    '200,000 seeded random ticks of the whole controller: chunks, human, services, clocks, pauses',
    'planner SIGKILL',
    'planner SIGSTOP',
    'controller SIGKILL at full speed, JointTrajectory output',
    'controller SIGSTOP 2 s, SIGCONT',
    'joint states stop',
    'first command off the measured pose',
    'a second publisher on the command topic',
    'chunks shuffled, duplicated, dropped, delayed (seeded)',
    'a mode drawn at random per chunk (synthetic)',
    'joint names permuted; missing; doubled; wrong size or period',
    'wall clock ±1 h',
    '`/clock` stalls, jumps back',
    'planner restarted in motion',
    'controller restarted in motion',
    'SIGINT at full speed',
    'SIGTERM at full speed',
    'deactivate at full speed',
    'two arms in two namespaces, 14 joints each',
    'textbook ensembling example',
    'tick cost, 14 joints, 8 live chunks',
    '1,000,000 chunks, followed',
    '1,000,000 chunks, while held',
    'planner at full load and camera in other processes at nice 10: lateness p99 / max; missed',
    'planner at full load and camera in other processes at nice 10: lateness p99 / max; missed, with SCHED_FIFO',
    'chunk received → first command that uses it, p99',
    'each guard in `core` removed in turn',
)
"""What is expected, in this order; a case without a result is shown as not run, others follow."""


def machine() -> str:
    """Where this was measured, in words."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        fifo = 'permitted'
    except PermissionError:
        fifo = 'not permitted'
    return (f'{datetime.date.today()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, '
            f'{platform.system()} {platform.release()}, SCHED_FIFO {fifo}')


def table(results: dict[str, dict]) -> str:
    """The results, by case, as a Markdown table."""
    rows = [results.get(case, {'case': case, 'required': '', 'measured': '**not run**'})
            for case in [*CASES, *sorted(results.keys() - set(CASES))]]
    cells = [[row[column].replace('|', r'\|') for column in ('case', 'required', 'measured')] for row in rows]
    return '\n'.join(['| case | required | measured |', '|---|---|---|', *(f'| {" | ".join(row)} |' for row in cells)])


def main() -> None:
    """Replace what stands between the two marks."""
    results = [json.loads(path.read_text()) for path in FAULTS.glob('*.json')]
    path = ROOT / 'docs/safety.md'
    text, count = re.subn('(?s)(<!-- faults -->\n).*(<!-- /faults -->)',
                          lambda marks: f'{marks[1]}{machine()}\n\n{table({r["case"]: r for r in results})}\n{marks[2]}',
                          path.read_text())
    if count != 1:
        raise SystemExit(f'{path}: expected <!-- faults --> and <!-- /faults -->, once each')
    path.write_text(text)
    print(f'{len(results)} results in {path}')


if __name__ == '__main__':
    main()
