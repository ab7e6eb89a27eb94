"""Codes are promises: each is used, and docs/data.md says what to do about it."""
from __future__ import annotations

import re
from pathlib import Path

from il_policies.data.errors import CODES

ROOT = Path(__file__).parents[2]


def test_every_code_is_documented_as_it_is_defined():
    rows = re.findall(r'^\| (E\d{3}) \| (.+?) \| .+ \|$', (ROOT / 'docs/data.md').read_text(), re.MULTILINE)
    assert dict(rows) == CODES and len(rows) == len(CODES)


def test_every_code_that_is_raised_is_defined_and_every_one_defined_is_raised():
    sources = [file for file in (ROOT / 'src').rglob('*.py') if file.name != 'errors.py']
    raised = set(re.findall(r'\bE[1-5]\d\d\b', '\n'.join(file.read_text() for file in sources)))
    assert raised == set(CODES)
