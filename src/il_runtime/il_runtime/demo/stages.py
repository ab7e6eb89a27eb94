"""What the quick starts are made of: record, convert, train, run. Each stage reuses what is already there."""
from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from il_policies.contract import load_contract
from il_policies.data.convert import convert, summary_line
from il_policies.sim.reach_around import Scene
from il_runtime.demo.processes import DemoError, Processes

RECORDING_SPEED = 4.0
SCENES_SEED = 1000
"""Starts and goals of the evaluation; demonstrations have other seeds."""
LEAST_USABLE = 2 / 3
"""Share of the recordings without which there is no point in training."""

console = Console(highlight=False)


class Stages:
    """Numbered stages with their times; the first is the set-up, which is over."""

    def __init__(self, total: int, setup_s: float):
        self.total, self.times = total, [('set-up', setup_s)]
        self.started = time.monotonic() - setup_s
        console.print(f'[bold]1/{total}  set-up[/bold]\n     [dim]{setup_s:.0f} s[/dim]')

    @contextmanager
    def stage(self, title: str):
        """Announce a stage and time it."""
        console.print(f'[bold]{len(self.times) + 1}/{self.total}  {title}[/bold]')
        started = time.monotonic()
        yield
        self.times.append((title, round(time.monotonic() - started, 1)))
        console.print(f'     [dim]{self.times[-1][1]:.0f} s[/dim]')

    @property
    def wall_s(self) -> float:
        """All together until now, the set-up included [s]."""
        return round(time.monotonic() - self.started, 1)


@contextmanager
def bar(label: str, total: int):
    """A progress bar; where there is no terminal, a line every tenth."""
    columns = (TextColumn('     {task.description}'), BarColumn(), TextColumn('{task.completed:g}/{task.total:g}'),
               TimeElapsedColumn(), TextColumn('{task.fields[note]}'))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total, note='')
        told = 0

        def advance(done: int, note: str = '') -> None:
            nonlocal told
            progress.update(task, completed=done, note=note)
            if not console.is_terminal and 10 * done // total > told:
                told = 10 * done // total
                console.print(f'     {label} {done}/{total} {note}')

        yield advance


def record(out: Path, contract: Path, demonstrations: int, goals: str = 'narrow') -> None:
    """A scripted expert demonstrates, four processes over DDS, faster than real time."""
    bags = out / 'bags'
    if len(finished_bags(bags)) >= demonstrations:
        console.print(f'     {demonstrations} demonstrations are there')
        return
    shutil.rmtree(bags, ignore_errors=True)
    with Processes(out / 'logs') as processes:
        common = {'contract': contract, 'use_sim_time': True}
        processes.node('simulator_node', contract=contract, real_time_factor=RECORDING_SPEED, publish_clock=True)
        processes.node('controller_node', **common)
        processes.node('recorder_node', output=bags, **common)
        expert = processes.node('expert_node', stdout=subprocess.PIPE, demonstrations=demonstrations, goals=goals, **common)
        with bar('demonstrations', demonstrations) as advance:
            for line in expert.stdout:
                if found := re.match(r'demonstration (\d+)/\d+ (\w+) reached', line):
                    advance(int(found[1]), f'round the {found[2]}')
        if expert.wait() != 0:
            raise DemoError(f'the demonstrations failed: {processes.last_words("expert_node")}')


def finished_bags(bags: Path) -> list[Path]:
    """Complete recordings below a folder."""
    return sorted(path.parent for path in bags.glob('*/metadata.yaml') if not path.parent.name.endswith('.part'))


def to_dataset(out: Path, contract: Path) -> tuple[int, str]:
    """The bags as a dataset: how many are usable, and how good they are in a line. Raises DemoError if too few are."""
    reports = convert(out / 'bags', load_contract(contract), out / 'dataset')
    quality = summary_line(reports)
    console.print(f'     {quality}')
    for report in reports:
        if report.refused:
            console.print(f'     refused: {report.refused}')
    usable = sum(not report.refused for report in reports)
    if usable < LEAST_USABLE * len(reports):
        raise DemoError(f'only {usable} of {len(reports)} recordings are usable; is the machine busy? make demo FRESH=1 '
                        'records again')
    return usable, quality


def train(out: Path, jobs: dict[str, list[str | Path]], at_once: int = 1) -> dict[str, dict]:
    """Train what is not trained yet, and go on where a training was interrupted. Returns the facts of the trainings.

    jobs: name of the checkpoint → further arguments of `il train`.
    """
    checkpoints = {name: out / 'checkpoints' / name for name in jobs}
    queue = [name for name, path in checkpoints.items()
             if not (path / 'policy.json').exists() or (path / 'training').exists()]
    with Processes(out / 'logs') as processes, bar('trainings', len(queue) or 1) as advance:
        running: dict[str, subprocess.Popen] = {}
        done = 0
        while queue or running:
            while queue and len(running) < at_once:
                name = queue.pop(0)
                running[name] = processes.start(f'train_{name}', [
                    sys.executable, '-m', 'il_policies.cli', 'train', str(out / 'dataset'), '--out', str(checkpoints[name]),
                    '--resume', *map(str, jobs[name])])
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode != 0:
                        raise DemoError(f'training {name} failed: {processes.last_words(f"train_{name}")}')
                    done += 1
            advance(done, ', '.join(f'{name} {percent(out / "logs" / f"train_{name}.log")}' for name in running))
            time.sleep(0.2)
    facts = {name: json.loads((path / 'policy.json').read_text())['extra']['training'] for name, path in checkpoints.items()}
    for name, fact in facts.items():
        console.print(f'     {name:<8} {fact["parameters"]} parameters, {fact["steps"]} steps on {fact["episodes"]} '
                      f'demonstrations in {fact["seconds"]:.0f} s, loss {fact["loss"]:.4f}')
    told = ('steps', 'seconds', 'loss', 'episodes', 'parameters')
    return {name: {key: fact[key] for key in told} for name, fact in facts.items()}


def percent(log: Path) -> str:
    """How far a training is, from its log."""
    found = re.findall(r'(\d+)%', log.read_text()) if log.exists() else []
    return f'{found[-1]} %' if found else '0 %'


def closed_loop(out: Path, contract_path: Path, policies: list[str], scenes: list[Scene], stride: int) -> dict[str, dict]:
    """Each policy in real time over DDS, simulator, planner and controller a process each; one episode a scene.

    stride: policy steps between plans.
    """
    import rclpy

    from il_runtime.demo.rollouts import over_dds
    from il_runtime.session import SessionError
    contract, results = load_contract(contract_path), {}
    for name in policies:
        with Processes(out / 'logs') as processes:
            processes.node('simulator_node', contract=contract_path)
            processes.node('controller_node', contract=contract_path)
            processes.node('policy_node', contract=contract_path, checkpoint=out / 'checkpoints' / name, stride=stride)
            rclpy.init()
            try:
                with bar(f'{name} over DDS', len(scenes)) as advance:
                    results[name] = over_dds(contract, scenes, out / 'rollouts' / f'{name}_dds.npz', processes.check, advance)
            except SessionError as error:
                processes.check()
                raise DemoError(f'{name} over DDS: {error}') from None
            finally:
                rclpy.try_shutdown()
    return results


def loop_facts(out: Path, dds: dict[str, dict], lockstep: dict[str, dict]) -> dict:
    """How the 50 Hz loop of the policies run over DDS kept time; limit violations are those of all runs."""
    lateness = np.concatenate([np.load(out / 'rollouts' / f'{name}_dds.npz')['lateness'] for name in dds]) * 1e3
    scheduler = re.search(r'scheduler (.*)', (out / 'logs' / 'controller_node.log').read_text())
    return {
        'rate_hz': 50.0,
        **{f'lateness_p{q}_ms': round(float(np.percentile(lateness, q)), 3) for q in (50, 99)},
        'lateness_max_ms': round(float(lateness.max()), 3),
        'missed_ticks': sum(d['missed_ticks'] for d in dds.values()), 'ticks': sum(d['ticks'] for d in dds.values()),
        'faults': [reason for d in dds.values() for reason in d['faults']],
        'limit_violations': sum(d['limit_violations'] for d in (*dds.values(), *lockstep.values())),
        'scheduler': scheduler[1].strip() if scheduler else 'unknown'}


def machine() -> str:
    """What this runs on."""
    return f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}'


def write_json(path: Path, data: dict) -> None:
    """Write whole or not at all."""
    part = path.with_suffix('.part')
    part.write_text(json.dumps(data, indent=1))
    part.replace(path)


def loop_line(loop: dict) -> str:
    """How punctual the 50 Hz loop was, in words; loop: `controller` of results.json."""
    return (f'50 Hz loop ({loop["scheduler"]}): lateness p50 {loop["lateness_p50_ms"]} ms, p99 {loop["lateness_p99_ms"]} ms, '
            f'max {loop["lateness_max_ms"]} ms; {loop["missed_ticks"]} of {loop["ticks"]} ticks missed; '
            f'{loop["limit_violations"]} limit violations')
