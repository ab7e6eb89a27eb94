"""Benchmarks: each prints a table, writes JSON and a plot, and names the machine and the budget.

`il bench NAME` runs the module of that name.
"""
from __future__ import annotations

import json
import math
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

COLORS = {'bc': '#c44e52', 'act': '#8172b3', 'diffusion': '#4c72b0', 'flow': '#55a868'}
"""Colour of each policy, the same in all plots."""


class BenchError(RuntimeError):
    """A benchmark that cannot be run this way; the message says why and what is valid."""


def machine() -> str:
    """Processor, cores, threads of torch and load, in words."""
    model = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = [line.partition(':')[2].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
                 if line.startswith('model name')]
        model = lines[0] if lines else model
    return (f'{model}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__} with {torch.get_num_threads()} threads, '
            f'load {os.getloadavg()[0]:.1f}')


def require_known(names: tuple[str, ...], valid: tuple[str, ...], what: str) -> None:
    """Raises BenchError unless all names are valid ones."""
    wrong = [name for name in names if name not in valid]
    if wrong or not names:
        raise BenchError(f'{what}: {", ".join(wrong) or "none given"}; valid: {", ".join(valid)}')


def publish(name: str, budget: str, rows: list[dict], out: Path, figure=None, **more) -> dict:
    """Print the rows as a table, write `out`/NAME.json and, of a matplotlib figure, NAME.png; returns what the JSON says.

    Every row has the same keys, the heads of the columns; a NaN becomes an empty cell and null, for JSON has none. more: goes
    into the JSON beside them.
    """
    rows = [{head: None if isinstance(value, float) and math.isnan(value) else value for head, value in row.items()}
            for row in rows]
    result = {'benchmark': name, 'date': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'machine': machine(),
              'budget': budget, 'rows': rows, **more}
    out.mkdir(parents=True, exist_ok=True)
    (out / f'{name}.json').write_text(json.dumps(result, indent=1))
    table = Table(title=f'{name}: {budget}', caption=result['machine'])
    for i, head in enumerate(rows[0]):
        table.add_column(head.replace('_', ' '), justify='left' if i == 0 else 'right')
    for row in rows:
        table.add_row(*(f'{value:.4g}' if isinstance(value, float) else '' if value is None else str(value)
                        for value in row.values()))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or pipe has no width
        console.width = 160
    console.print(table)
    written = [f'{name}.json']
    if figure is not None:
        figure.savefig(out / f'{name}.png', dpi=110)
        written.append(f'{name}.png')
    print(f'{out}: {", ".join(written)}')
    return result
