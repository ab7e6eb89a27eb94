"""What all tests share."""
from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = Path(os.environ.get('IL_FAULTS', ROOT / 'log' / 'faults'))
"""Where tests leave what they measured for docs/safety.md, one file a case; test/safety_table.py makes the table."""


@pytest.fixture
def show():
    """show(case, required, measured): a row of the table in docs/safety.md, called once a test has seen that it holds."""
    def write(case: str, required: str, measured: str) -> None:
        FAULTS.mkdir(parents=True, exist_ok=True)
        name = re.sub(r'[^a-z0-9]+', '-', case.lower()).strip('-')
        (FAULTS / f'{name}.json').write_text(json.dumps({'case': case, 'required': required, 'measured': measured}))
        print(f'{case}: {measured} (required: {required})')

    return write


def pytest_collection_modifyitems(items):
    """`-m shown`: what leaves a row for docs/safety.md."""
    for item in items:
        if 'show' in getattr(item, 'fixturenames', ()):
            item.add_marker('shown')
