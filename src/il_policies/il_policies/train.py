"""Training: dataset → checkpoint. Low-dimensional data is held in memory, images are read batch by batch as uint8."""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from il_policies import checkpoint
from il_policies.data.errors import DataError
from il_policies.data.store import Dataset
from il_policies.data.windows import Windows
from il_policies.policies import Policy, PolicySpec
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from il_policies.policies.unet import UNetConfig
from il_policies.policies.vision import VisionConfig


class TrainError(RuntimeError):
    """Training that cannot start or go on; the message says why."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Presets: config/policies/*.yaml."""

    __pydantic_config__ = {'extra': 'forbid'}

    policy: Literal['bc', 'flow'] = 'flow'
    """Algorithm."""
    observations: tuple[str, ...] = ()
    """Features the policy sees; none: all low-dimensional ones of the dataset."""
    history: int = 2
    """Observations it sees, the newest being now."""
    horizon: int = 16
    """Steps of a chunk."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """Network, the same for both algorithms."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Network that looks at each camera."""
    euler_steps: int = 10
    """Flow: integration steps from noise to actions."""
    time_sampling: Literal['uniform', 'beta'] = 'uniform'
    """Flow: distribution of the flow times trained on; beta has more weight near noise."""
    steps: int | None = None
    """Budget in optimiser steps; none: no limit."""
    minutes: float | None = None
    """Budget in time [min]; none: no limit. One budget is needed, the first one spent ends the run. What a time reaches
    depends on the machine; steps are reproducible."""
    batch_size: int = 64
    """Windows per step."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW; falls to 0 by a cosine over the budget."""
    warmup_steps: int = 100
    """Steps of linear rise before that."""
    weight_decay: float = 1e-6
    """Of AdamW."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    ema_power: float = 0.75
    """The weights kept are averaged with decay 1 - (1 + step)^-ema_power …"""
    ema_decay: float = 0.999
    """… but at most this."""
    max_episodes: int | None = None
    """Train on this many episodes, chosen at random by `episode_seed`; none: on all."""
    episode_seed: int = 42
    """Seed of that choice."""
    where: tuple[str, ...] = ()
    """Train only on episodes whose description has these, as field=value: side=left."""
    failed: Literal['refuse', 'skip', 'use'] = 'refuse'
    """Episodes whose quality report says FAIL (il inspect tells why): refuse to train, leave them out, or use them."""
    unsuccessful: Literal['skip', 'use'] = 'skip'
    """Episodes in which the task was labelled as not achieved: leave them out, or use them."""
    seed: int = 0
    """Seed of weights, batches and noise."""
    threads: int = 2
    """CPU threads."""
    tensorboard: Path | None = None
    """Write loss and learning rate for TensorBoard into this folder (needs the package tensorboard)."""

    def __post_init__(self):
        for key in ('steps', 'minutes', 'max_episodes'):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f'{key} is {getattr(self, key)}, must be > 0')
        for key in ('history', 'horizon', 'batch_size', 'learning_rate', 'clip_norm', 'euler_steps', 'threads'):
            if not getattr(self, key) > 0:
                raise ValueError(f'{key} is {getattr(self, key)}, must be > 0')
        if not 0.0 <= self.ema_decay < 1.0 or self.warmup_steps < 0:
            raise ValueError(f'ema_decay is {self.ema_decay}, must be in [0, 1); warmup_steps is {self.warmup_steps}, '
                             'must be at least 0')
        wrong = [pair for pair in self.where if '=' not in pair]
        if wrong:
            raise ValueError(f'where is {wrong}; must be field=value, such as side=left')


@dataclass(frozen=True)
class TrainCommand:
    """Train a policy on a dataset and save a checkpoint. A budget is needed: --steps or --minutes."""

    dataset: tyro.conf.Positional[Path]
    """Dataset to learn from."""
    out: Path
    """Checkpoint folder to write; an older checkpoint there is replaced."""
    config: Annotated[TrainConfig, tyro.conf.arg(name='')]
    """Everything else."""
    preset: Path | None = None
    """YAML file that changes the defaults below, such as config/policies/flow.yaml; --help then shows the new ones."""


def train(dataset: Dataset, config: TrainConfig, output: str | Path | None = None,
          progress: Callable[[float, int, float], None] | None = None) -> Policy:
    """Train a policy, save it as a checkpoint at `output` (None: do not), and return it in evaluation mode.

    progress: called every step with the fraction of the budget spent, the step and its loss; None: a bar on stderr.
    Raises DataError, PolicyError, TrainError, CheckpointError.
    """
    if config.steps is None and config.minutes is None:
        raise TrainError('no budget: give steps or minutes')
    if output is not None:
        output = checkpoint.require_writable(output)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    episodes = choose_episodes(dataset, config)
    observations = config.observations or tuple(dataset.info.lowdim)
    windows = Windows(dataset, observations, config.history, config.horizon, episodes, cache=False)
    policy = make_policy(dataset, config, observations, windows)
    if windows.images:  # decoded, which takes a while, only once there is a policy that can be trained on them
        windows = Windows(dataset, observations, config.history, config.horizon, episodes)

    average = copy.deepcopy(policy).requires_grad_(False)
    weights, averaged = list(policy.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.95, 0.999), weight_decay=config.weight_decay, fused=True)
    order, at = rng.permutation(len(windows)), 0
    step, spent, mean_loss = 0, 0.0, 0.0
    with contextlib.ExitStack() as stack:
        report = progress or stack.enter_context(progress_bar(f'{config.policy} on {dataset.path.name}'))
        writer = _tensorboard(config.tensorboard, stack)
        started = time.perf_counter()
        while spent < 1.0:
            rate = learning_rate(config, step, spent)
            for group in optimizer.param_groups:
                group['lr'] = rate
            if at + config.batch_size > len(order):
                order, at = rng.permutation(len(windows)), 0
            batch = _tensors(windows.batch(order[at:at + config.batch_size]))
            at += config.batch_size

            loss = policy.loss(batch)['loss']
            value = loss.item()
            if not math.isfinite(value):
                raise TrainError(f'the loss became {value} at step {step}; learning_rate is {config.learning_rate}, '
                                 'try less')
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, config.clip_norm)
            optimizer.step()
            step += 1
            decay = min(config.ema_decay, 1.0 - (1.0 + step) ** -config.ema_power)
            with torch.no_grad():  # else the average would keep the graph of every step
                torch._foreach_lerp_(averaged, weights, 1.0 - decay)

            mean_loss += (value - mean_loss) * max(0.01, 1.0 / step)
            spent = budget_spent(config, step, time.perf_counter() - started)
            if writer is not None:
                writer.add_scalar('loss', value, step)
                writer.add_scalar('learning_rate', rate, step)
            report(spent, step, mean_loss)
        seconds = time.perf_counter() - started

    average.eval()
    if output is not None:
        checkpoint.save(output, average, {
            'contract': dataset.info.contract,
            'contract_hash': dataset.info.contract_hash,
            'dataset_hash': dataset.hash,
            'training': {
                'config': _plain(config), 'episodes': len(episodes), 'of_episodes': len(dataset),
                'windows': len(windows), 'steps': step,
                'seconds': round(seconds, 1), 'loss': round(mean_loss, 6), 'torch': torch.__version__,
                'parameters': sum(p.numel() for p in weights),
            }})
    return average


def choose_episodes(dataset: Dataset, config: TrainConfig) -> list[int]:
    """Places in `dataset.episodes` to train on, after `where`, `unsuccessful`, `failed` and `max_episodes`.

    Raises TrainError if none is left, DataError if episodes failed the check of their quality and nobody said what to do with
    them.
    """
    places = list(range(len(dataset)))
    for pair in config.where:
        key, value = pair.split('=', 1)
        if not any(key in meta for meta in dataset.episodes):
            fields = sorted({name for meta in dataset.episodes for name in meta})
            raise TrainError(f'{dataset.path}: no episode has the field {key!r}; there are: {", ".join(fields)}')
        found = sorted({str(meta.get(key)) for meta in dataset.episodes})
        places = [i for i in places if str(dataset.episodes[i].get(key)) == value]
        if not places:
            raise TrainError(f'{dataset.path}: no episode is left with {" ".join(config.where)}; {key} is one of: '
                             f'{", ".join(found[:10])}')
    considered = len(places)
    if config.unsuccessful == 'skip':
        places = [i for i in places if dataset.episodes[i].get('success') is not False]
    if config.failed != 'use':
        reports = {i: dataset.report(i) for i in places}
        failed = [i for i in places if reports[i].get('verdict') == 'FAIL']
        if failed and config.failed == 'refuse':
            named = '\n'.join(f'  episode {dataset.episodes[i]["index"]} ({dataset.episodes[i]["source"] or "no source"}): '
                              + '; '.join(line for line in reports[i].get('reasons', []) if line.startswith('FAIL'))
                              for i in failed[:10])
            raise DataError(f'{dataset.path}: {len(failed)} of {len(places)} episodes failed the check of their quality; '
                            f'leave them out (--failed skip) or use them (--failed use):\n{named}'
                            + (f'\n  and {len(failed) - 10} more' if len(failed) > 10 else ''), 'E304')
        places = [i for i in places if i not in failed]
    if not places:
        raise TrainError(f'{dataset.path}: ' + (f'none of {considered} episodes is left: all are labelled as not achieved '
                         '(use them: --unsuccessful use) or failed the check of their quality (--failed use)' if considered
                         else 'holds no episodes'))
    if config.max_episodes is not None and config.max_episodes < len(places):
        chosen = np.random.default_rng(config.episode_seed).choice(len(places), config.max_episodes, replace=False)
        places = [places[i] for i in sorted(chosen)]
    return places


def make_policy(dataset: Dataset, config: TrainConfig, observations: tuple[str, ...], windows: Windows) -> Policy:
    """An untrained policy for a dataset, normalised by its windows. Raises PolicyError."""
    info = dataset.info
    spec = PolicySpec(features={name: info.features[name].shape for name in observations},
                      action_names=info.action.names, horizon=config.horizon, history=config.history,
                      step_period=1.0 / info.fps, action_offset=info.action.offset)
    normalizer = Normalizer.fit({**windows.lowdim, 'action': windows.action})
    if config.policy == 'bc':
        return BC(spec, BCConfig(config.unet, config.vision), normalizer)
    return Flow(spec, FlowConfig(config.unet, config.euler_steps, config.time_sampling, config.vision), normalizer)


def budget_spent(config: TrainConfig, step: int, seconds: float) -> float:
    """Fraction of the budget spent after `step` steps and `seconds` [s]; 1 or more means done."""
    by_steps = step / config.steps if config.steps is not None else 0.0
    by_time = seconds / (60.0 * config.minutes) if config.minutes is not None else 0.0
    return max(by_steps, by_time)


def learning_rate(config: TrainConfig, step: int, spent: float) -> float:
    """Linear warm-up over steps, then a cosine to 0 over the budget, of which the fraction `spent` is gone."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.learning_rate * warmup * 0.5 * (1.0 + math.cos(math.pi * min(spent, 1.0)))


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[float, int, float], None]]:
    """A bar on stderr with loss and remaining time; on a file or pipe, a line every tenth of the budget."""
    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), TextColumn('{task.percentage:3.0f}%  step {task.fields[step]}  '
               'loss {task.fields[loss]:.4f}'), TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=1.0, step=0, loss=0.0)
        tenth = 0

        def report(spent: float, step: int, loss: float):
            nonlocal tenth
            bar.update(task, completed=min(spent, 1.0), step=step, loss=loss)
            if not console.is_terminal and int(10 * spent) > tenth:
                tenth = int(10 * spent)
                print(f'{label}: {100 * min(spent, 1.0):.0f}%  step {step}  loss {loss:.4f}', file=sys.stderr,
                      flush=True)

        yield report


def _tensors(batch: dict) -> dict:
    return {key: _tensors(value) if isinstance(value, dict) else torch.from_numpy(value)
            for key, value in batch.items()}


def _plain(config: TrainConfig) -> dict:
    """JSON types."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()}


def _tensorboard(folder: Path | None, stack: contextlib.ExitStack):
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainError('tensorboard was asked for but is not installed: pip install tensorboard') from None
    return stack.enter_context(SummaryWriter(str(folder)))
