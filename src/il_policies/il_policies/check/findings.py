"""What a check finds and how it is shown: each mismatch with its fix, and a line for what fits."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from il_policies.data.quality import FAIL, PASS, WARN

NOTE = 'NOTE'
LEVELS = FAIL, WARN, NOTE, PASS
"""Will not work; works, but look at it; worth knowing, or not looked at; fits."""
COLOURS = {FAIL: 'bold red', WARN: 'yellow', NOTE: 'cyan', PASS: 'green'}


@dataclass(frozen=True)
class Finding:
    """One thing that was compared."""

    level: str
    """FAIL, WARN, NOTE or PASS."""
    place: str
    """What it is about: a stream with its topic, a field of the contract."""
    found: str
    """What is there."""
    code: str = ''
    """One of `il_policies.data.errors.CODES`; '' for what fits."""
    expected: str = ''
    """What should be there; '' where there is nothing to compare with."""
    fix: str = ''
    """A command, a line of YAML, or what else helps."""

    @property
    def words(self) -> str:
        """In a line, without level and fix."""
        what = f'expected {self.expected}, found {self.found}' if self.expected else self.found
        return f'{self.place}: {what}'


@dataclass(frozen=True)
class Section:
    """Everything found about one thing."""

    title: str
    """What it is: its kind, name and hash."""
    findings: tuple[Finding, ...]
    """Worst first."""


@dataclass(frozen=True)
class Report:
    """A whole check."""

    sections: tuple[Section, ...]
    """One for each thing that was looked at."""

    def count(self, level: str) -> int:
        """How many findings have this level."""
        return sum(finding.level == level for section in self.sections for finding in section.findings)

    def to_dict(self) -> dict:
        """JSON types."""
        return {**{level: self.count(level) for level in LEVELS}, 'sections': [dataclasses.asdict(s) for s in self.sections]}


def section(title: str, findings: Iterable[Finding]) -> Section:
    """A section whose worst findings come first."""
    return Section(title, tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))))


def merged(findings: dict[str, list[Finding]]) -> list[Finding]:
    """Findings of several like things (name → findings): what many of them share is said once, with how many they are."""
    alike: dict[tuple, list[tuple[str, Finding]]] = {}
    for name, found in findings.items():
        for finding in found:
            key = (finding.level, finding.code, finding.place, finding.expected if finding.code else '')
            alike.setdefault(key, []).append((name, finding))
    result = []
    for of in alike.values():
        name, first = of[0]
        if len(findings) > 1:
            where = f'in {name}' if len(of) == 1 else f'in {len(of)} of {len(findings)}, such as {name}'
            first = dataclasses.replace(first, place=f'{first.place} {where}')
        result.append(first)
    return result


def show(report: Report, console: Console) -> None:
    """Print a section for each thing and a summary."""
    for part in report.sections:
        console.print(Text(part.title, 'bold'))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow='fold')
        for finding in part.findings:
            words = Text.assemble((finding.place, 'bold' if finding.code else ''), finding.words[len(finding.place):])
            table.add_row(Text(finding.level, COLOURS[finding.level]), finding.code, words)
            if finding.fix:
                table.add_row('', '', Text.assemble(('fix: ', 'green'), finding.fix))
        console.print(table)
        console.print()
    console.print(Text(', ').join(
        Text(f'{report.count(level)} {level}', COLOURS[level] if report.count(level) else 'dim') for level in LEVELS))
