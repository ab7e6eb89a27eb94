"""Training: dataset → checkpoint. Low-dimensional data is held in memory, images are read batch by batch as uint8.

The folder of a run is a checkpoint at any time, the averaged weights of the newest save. In it lie `training/`, the state with
which `resume` goes on, until the run is finished, and `best/`, the checkpoint with the lowest loss on the validation episodes.

Under torchrun each process computes its share of every batch. Batches, random draws and the mean over valid steps are those of
one process, so that the number of processes changes a run by rounding only; dropout alone is each process's own.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from il_policies import checkpoint
from il_policies.contract import ContractError, from_dict, load_yaml
from il_policies.data.errors import DataError
from il_policies.data.store import Dataset
from il_policies.data.windows import Windows
from il_policies.policies import Policy, PolicyError, PolicySpec
from il_policies.policies.flow import FlowConfig
from il_policies.policies.normalize import Normalizer
from il_policies.policies.vision import load_pretrained

Algorithm = functools.reduce(operator.or_, (config_type for _, config_type in checkpoint.POLICIES.values()))
STATE = 'training/state.safetensors', 'training/state.json'
BEST = 'best/'
MACHINE = ('threads', 'device', 'tensorboard', 'save_minutes', 'save_steps', 'pretrained')
"""Settings that may change when a run is resumed: they say where it runs, not what it learns."""


class TrainError(RuntimeError):
    """Training that cannot start or go on; the message says why."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Presets: config/policies/*.yaml."""

    __pydantic_config__ = {'extra': 'forbid'}

    policy: Annotated[Algorithm, tyro.conf.arg(name='')] = field(default_factory=FlowConfig)
    """Algorithm with its own settings, which presets hold beside the others."""
    observations: tuple[str, ...] = ()
    """Features the policy sees; none: all low-dimensional ones of the dataset."""
    history: int = 2
    """Observations it sees, the newest being now."""
    horizon: int = 16
    """Steps of a chunk."""
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
    vision_learning_rate: float | None = None
    """The same for the networks that look at images, such as 1e-5 where they are pretrained; none: as the others."""
    betas: tuple[float, float] = (0.95, 0.999)
    """Of AdamW: how slowly its means of gradients and of their squares change. Diffusion Policy's; ACT has 0.9, 0.999."""
    weight_decay: float = 1e-6
    """Of AdamW, on the weights of layers; biases, norms and embeddings have none."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal['fp32', 'bf16'] = 'fp32'
    """bf16: matrix products in bfloat16 by autocast; weights, optimiser and loss stay in float32."""
    ema_power: float = 0.75
    """The weights kept are averaged with decay 1 - (1 + step)^-ema_power …"""
    ema_decay: float = 0.999
    """… but at most this."""
    validation: float = 0.0
    """Share of the episodes kept out of training, chosen by `episode_seed`, on which the loss of the averaged weights is
    measured, always with the same noise; the best checkpoint is kept in OUT/best. 0: none."""
    validate_steps: int = 500
    """Steps between these measurements."""
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
    pretrained: Path | None = None
    """Weights of torchvision's ResNet-18 trained on ImageNet, as safetensors, for --vision.network resnet18 with
    --vision.norm frozen_batch; none: from scratch."""
    device: Literal['auto', 'cpu', 'cuda'] = 'auto'
    """Where to compute; auto: on a GPU if there is one."""
    threads: int = 2
    """CPU threads."""
    save_minutes: float = 5.0
    """Time between saves of checkpoint and training state [min]."""
    save_steps: int | None = None
    """Steps between saves, besides; none: by time only."""
    tensorboard: Path | None = None
    """Write loss and learning rate for TensorBoard into this folder (needs the package tensorboard)."""

    def __post_init__(self):
        for key in ('steps', 'minutes', 'max_episodes', 'vision_learning_rate', 'save_steps'):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f'{key} is {getattr(self, key)}, must be > 0')
        for key in ('seed', 'episode_seed'):
            if getattr(self, key) < 0:
                raise ValueError(f'{key} is {getattr(self, key)}, must be at least 0')
        for key in ('history', 'horizon', 'batch_size', 'learning_rate', 'clip_norm', 'threads', 'validate_steps',
                    'save_minutes'):
            if not getattr(self, key) > 0:
                raise ValueError(f'{key} is {getattr(self, key)}, must be > 0')
        if not 0.0 <= self.ema_decay < 1.0 or not self.ema_power >= 0.0 or self.warmup_steps < 0:
            raise ValueError(f'ema_decay is {self.ema_decay}, must be in [0, 1); ema_power is {self.ema_power} and warmup_steps '
                             f'{self.warmup_steps}, must be at least 0')
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f'betas are {list(self.betas)}, must be in [0, 1)')
        if not 0.0 <= self.validation < 1.0 or not self.weight_decay >= 0.0:
            raise ValueError(f'validation is {self.validation}, must be in [0, 1); weight_decay is {self.weight_decay}, '
                             'must be at least 0')
        wrong = [pair for pair in self.where if '=' not in pair]
        if wrong:
            raise ValueError(f'where is {wrong}; must be field=value, such as side=left')

    @property
    def kind(self) -> str:
        """Name of the algorithm."""
        return next(kind for kind, (_, config_type) in checkpoint.POLICIES.items() if type(self.policy) is config_type)


@dataclass(frozen=True)
class TrainCommand:
    """Train a policy on a dataset and save a checkpoint. A budget is needed: --steps or --minutes."""

    dataset: tyro.conf.Positional[Path]
    """Dataset to learn from."""
    out: Path
    """Checkpoint folder to write."""
    config: Annotated[TrainConfig, tyro.conf.arg(name='')]
    """Everything else."""
    policy: Literal[tuple(checkpoint.POLICIES)] = 'flow'
    """Algorithm; --help shows the settings of the one that is given."""
    preset: Path | None = None
    """YAML file that changes the defaults below, such as config/policies/flow.yaml; --help then shows the new ones."""
    resume: bool = False
    """Go on with the training at --out that was interrupted; begin where there is none."""
    overwrite: bool = False
    """Begin anew where there is a checkpoint at --out, finished or not: the first save, also that of Ctrl-C, replaces it."""


def load_preset(path: str | Path | None, policy: str | None = None) -> TrainConfig:
    """Settings of a YAML file over the defaults; `policy` overrides its algorithm. Raises ContractError."""
    data = load_yaml(path) if path is not None else {}
    kind = policy or data.get('policy', 'flow')
    if not isinstance(kind, str) or kind not in checkpoint.POLICIES:
        source = f'{path}: ' if policy is None else ''
        raise ContractError(f'{source}policy is {kind!r}; valid: {", ".join(checkpoint.POLICIES)}')
    config_type = checkpoint.POLICIES[kind][1]
    own = {f.name for f in dataclasses.fields(config_type)}
    common = {f.name for f in dataclasses.fields(TrainConfig)} - {'policy'}
    _refuse_unknown(TrainConfig, {key: value for key, value in data.items() if key not in own}, f'{path}, policy {kind}', own)
    _refuse_unknown(config_type, {key: value for key, value in data.items() if key in own}, path)
    algorithm = from_dict(config_type, {key: data[key] for key in data if key in own}, str(path))
    config = from_dict(TrainConfig, {key: data[key] for key in data if key in common}, str(path))
    return dataclasses.replace(config, policy=algorithm)


def _refuse_unknown(config_type: type, data: dict, path: str | Path | None, besides: set[str] = frozenset(), place: str = ''):
    """Misspelt keys, at any depth: a default would be used in silence. Raises ContractError."""
    valid = {f.name: f for f in dataclasses.fields(config_type)}
    for key, value in data.items():
        if key not in valid:
            raise ContractError(f'{path}: {place}{key} is not a known key, received {value!r}; valid: '
                                f'{", ".join(sorted({*valid, *besides}))}')
        nested = valid[key].default_factory
        if isinstance(value, dict) and isinstance(nested, type) and dataclasses.is_dataclass(nested):
            _refuse_unknown(nested, value, path, place=f'{place}{key}.')


def train(dataset: Dataset, config: TrainConfig, output: str | Path | None = None,
          progress: Callable[[float, int, float], None] | None = None, resume: bool = False,
          overwrite: bool = False) -> Policy:
    """Train a policy, save it as a checkpoint at `output` (None: do not), and return it in evaluation mode.

    progress: called every step with the fraction of the budget spent, the step and its loss; None: a bar on stderr.
    resume: go on with the run at `output`, if there is one; on a CPU the result is bit for bit that of a run without a stop.
    overwrite: begin anew, whatever checkpoint is at `output`, which the first save replaces; else it is left as it is.
    Saves now and then, and when interrupted or terminated, then raises KeyboardInterrupt.
    Raises DataError, PolicyError, TrainError, CheckpointError.
    """
    if config.steps is None and config.minutes is None:
        raise TrainError('no budget: give steps or minutes')
    if resume and overwrite:
        raise TrainError('resume goes on with what is there, overwrite begins anew: give one of them')
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(join_processes(config))
        saved = None
        if output is not None:
            output = checkpoint.require_writable(output) if processes.first else Path(output).resolve()
            saved = None if overwrite else saved_run(output, dataset, config, resume)
            if processes.total(saved is not None) not in (0, processes.count):
                raise TrainError(f'{output}: not all processes find it; --out must be in a folder that all machines share')
            if saved is not None and saved.finished:
                return checkpoint.load(output)
        device = processes.device
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        rng = np.random.default_rng(config.seed)
        episodes = choose_episodes(dataset, config)
        training, held_out = split_episodes(episodes, config)
        observations = config.observations or tuple(dataset.info.lowdim)
        if not observations:
            raise TrainError(f'{dataset.path}: has images only, {", ".join(dataset.info.images)}; name what the policy sees: '
                             '--observations')
        windows = Windows(dataset, observations, config.history, config.horizon, training, cache=False)
        if min(config.batch_size, len(windows)) < processes.count:
            raise TrainError(f'batch_size is {config.batch_size} and there are {len(windows)} windows; with '
                             f'{processes.count} processes both must be at least that')
        policy = make_policy(dataset, config, observations, windows).to(device)
        if windows.images:  # decoded, which takes a while, only once there is a policy that can be trained on them
            windows = Windows(dataset, observations, config.history, config.horizon, training)
        validation = Windows(dataset, observations, config.history, config.horizon, held_out,
                             cache=bool(windows.images)) if held_out else None

        average = copy.deepcopy(policy).requires_grad_(False).eval()
        weights, averaged = list(policy.parameters()), list(average.parameters())
        optimizer = make_optimizer(policy, config)
        run = Run(policy, average, optimizer, rng, order=rng.permutation(len(windows)))
        if saved is not None:
            run.restore(saved)
        processes.share(policy, average)

        def facts() -> dict:
            return {'config': _plain(config), 'episodes': len(training), 'of_episodes': len(dataset),
                    'windows': len(windows), 'steps': run.step, 'seconds': round(run.seconds, 1),
                    'loss': round(run.mean_loss, 6), 'torch': torch.__version__, 'finished': run.spent >= 1.0,
                    'parameters': sum(p.numel() for p in weights)} | (
                    {'validation_episodes': len(held_out), 'validation_loss': run.validation_loss} if held_out else {})

        def extra() -> dict:
            return {'contract': dataset.info.contract, 'contract_hash': dataset.info.contract_hash,
                    'dataset_hash': dataset.hash, 'training': facts()}

        def save() -> None:
            if output is not None and processes.first:
                checkpoint.save(output, average, extra(), run.best | ({} if run.spent >= 1.0 else run.state()))

        report = progress or stack.enter_context(progress_bar(f'{config.kind} on {dataset.path.name}'))
        if not processes.first:
            report = _silent
        writer = _tensorboard(config.tensorboard if processes.first else None, stack)
        stop = stack.enter_context(signals()) if output is not None else threading.Event()
        started = time.perf_counter() - run.seconds
        saved_at = time.perf_counter()
        while run.spent < 1.0:
            rate = learning_rate(config, run.step, run.spent)
            for group in optimizer.param_groups:
                group['lr'] = rate * group['share']
            indices = run.next_batch(config.batch_size, len(windows))
            share = processes.share_of(len(indices))
            batch = to_device(windows.batch(indices[share]), device)

            counted = batch['valid'].sum().item()
            with SharedDraws(len(indices), share), autocast(config, device):
                # The mean over the valid steps of all processes, of which this is the part of one.
                loss = policy.loss(batch)['loss'] * (counted / processes.total(counted))
            value = processes.total(loss.item())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            processes.sum_gradients(weights)
            norm = nn.utils.clip_grad_norm_(weights, config.clip_norm).item()
            if not (math.isfinite(value) and math.isfinite(norm)):
                what = 'loss' if not math.isfinite(value) else 'gradient'
                raise TrainError(f'the {what} became {norm if math.isfinite(value) else value} at step {run.step}; learning_rate '
                                 f'is {config.learning_rate}, try less' + _kept(output))
            optimizer.step()
            run.step += 1
            decay = min(config.ema_decay, 1.0 - (1.0 + run.step) ** -config.ema_power)
            with torch.no_grad():  # else the average would keep the graph of every step
                torch._foreach_lerp_(averaged, weights, 1.0 - decay)

            run.mean_loss += (value - run.mean_loss) * max(0.01, 1.0 / run.step)
            run.seconds = processes.of_first(time.perf_counter() - started)
            run.spent = budget_spent(config, run.step, run.seconds)
            if writer is not None:
                writer.add_scalar('loss', value, run.step)
                writer.add_scalar('learning_rate', rate, run.step)
            if validation is not None and processes.first and (run.step % config.validate_steps == 0 or run.spent >= 1.0):
                run.validation_loss = validation_loss(average, validation, config, device)
                if writer is not None:
                    writer.add_scalar('validation_loss', run.validation_loss, run.step)
                if run.validation_loss < run.best_loss:
                    run.best_loss = run.validation_loss
                    run.best = {BEST + name: data for name, data in checkpoint.content(average, extra()).items()}
            report(run.spent, run.step, run.mean_loss)
            stopped = processes.total(stop.is_set()) > 0
            late = time.perf_counter() - saved_at >= 60.0 * config.save_minutes
            if stopped or late or config.save_steps and run.step % config.save_steps == 0:
                if run.spent < 1.0:
                    save()
                    saved_at = time.perf_counter()
            if stopped and run.spent < 1.0:
                raise KeyboardInterrupt(f'interrupted at step {run.step}, {100 * run.spent:.0f} % of the budget; saved in '
                                        f'{output}, go on with --resume')
        average.cpu()
        average.extra = extra()
        save()
    return average


@dataclass
class Run:
    """Everything that a run is made of and that changes in it: what is saved, restored bit for bit and gone on with."""

    policy: Policy
    average: Policy
    """The policy with exponentially averaged weights: what becomes the checkpoint."""
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator
    order: np.ndarray
    """Windows in the order of this pass over the data."""
    at: int = 0
    """How many of them are done."""
    step: int = 0
    seconds: float = 0.0
    """Time spent, of all sessions together [s]."""
    spent: float = 0.0
    """Fraction of the budget spent."""
    mean_loss: float = 0.0
    validation_loss: float | None = None
    best_loss: float = math.inf
    best: dict[str, bytes] = field(default_factory=dict)
    """Files of the best checkpoint."""

    NUMBERS = ('at', 'step', 'seconds', 'spent', 'mean_loss', 'validation_loss', 'best_loss')

    def next_batch(self, size: int, windows: int) -> np.ndarray:
        """Indices of the next windows, in a new random order after each pass. Shape (size,), fewer if there are not as many."""
        if self.at + size > len(self.order):
            self.order, self.at = self.rng.permutation(windows), 0
        indices = self.order[self.at:self.at + size]
        self.at += size
        return indices

    def state(self) -> dict[str, bytes]:
        """Files that `restore` goes on from, besides the checkpoint, which holds the averaged weights."""
        tensors = {f'weights.{name}': value for name, value in self.policy.state_dict().items()}
        for name, parameter in self.policy.named_parameters():
            tensors |= {f'optimizer.{name}.{key}': value for key, value in self.optimizer.state[parameter].items()}
        tensors |= {'order': torch.from_numpy(self.order), 'random.cpu': torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors['random.cuda'] = torch.cuda.get_rng_state()
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        described = numbers | {'best_loss': None if math.isinf(self.best_loss) else self.best_loss,
                               'random': self.rng.bit_generator.state}
        return {STATE[0]: save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()}),
                STATE[1]: json.dumps(described, indent=1).encode()}

    def restore(self, saved: SavedRun) -> None:
        """Take over what `state` wrote. Raises TrainError if it does not fit."""
        try:
            tensors, numbers = load_tensors(saved.state), saved.numbers
            self.policy.load_state_dict({name.removeprefix('weights.'): value for name, value in tensors.items()
                                         if name.startswith('weights.')})
            self.average.load_state_dict(saved.average.state_dict())
            for name, parameter in self.policy.named_parameters():
                prefix = f'optimizer.{name}.'
                kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device) if value.ndim == 0 else torch.empty_like(parameter).copy_(value)
                    for key, value in kept.items()}
            self.order = tensors['order'].numpy()
            self.rng.bit_generator.state = numbers['random']
            for name in self.NUMBERS:
                setattr(self, name, numbers[name])
            self.best_loss = math.inf if self.best_loss is None else self.best_loss
            self.best = saved.best
            torch.set_rng_state(tensors['random.cpu'])
            if torch.cuda.is_available() and 'random.cuda' in tensors:
                torch.cuda.set_rng_state(tensors['random.cuda'])
        except (KeyError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            raise TrainError(f'{saved.folder}: its training state cannot be gone on with: '
                             + ' '.join(str(error).split())) from None


@dataclass(frozen=True)
class SavedRun:
    """What is found where a run is to go on."""

    folder: Path
    average: Policy
    finished: bool
    state: bytes = b''
    numbers: dict = field(default_factory=dict)
    best: dict[str, bytes] = field(default_factory=dict)


def saved_run(output: Path, dataset: Dataset, config: TrainConfig, resume: bool) -> SavedRun | None:
    """The run at `output` to go on with; None: begin.

    Raises TrainError if there is a checkpoint that is not to be resumed, or does not fit: each field that differs is named.
    """
    folder = checkpoint.present(output)
    if not (folder / checkpoint.DESCRIPTION).exists():
        return None
    unfinished = (folder / STATE[1]).exists()
    if not resume:
        raise TrainError(f'{output}: holds ' + ('a training that is not finished; go on with it (--resume)' if unfinished
                         else 'a checkpoint') + '; give another folder, or begin anew in its place (--overwrite)')
    average = checkpoint.load(output)
    facts = average.extra.get('training', {})
    if not unfinished and not facts.get('finished'):
        raise TrainError(f'{output}: holds a checkpoint without a training state; give another folder')
    # A setting that is newer than the run has as its default what was done before there was a choice.
    now, default = (json.loads(json.dumps(_plain(each))) for each in (config, TrainConfig(type(config.policy)())))
    differences = [f'  {name}: was {was!r}, is {now!r}' for name, was, now in
                   _differences(facts.get('config', {}), now, default) if name not in MACHINE]
    if average.extra.get('dataset_hash') != dataset.hash:
        differences.append(f'  dataset: its content was {average.extra.get("dataset_hash")}, is {dataset.hash}')
    if differences:
        raise TrainError(f'{output}: was trained with other settings, and cannot be gone on with under these:\n'
                         + '\n'.join(differences))
    if not unfinished:
        return SavedRun(output, average, finished=True)
    try:
        best = {f'{BEST}{name}': (folder / BEST / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.DESCRIPTION)
                if (folder / BEST).exists()}
        state, numbers = ((folder / name).read_bytes() for name in STATE)
        return SavedRun(output, average, False, state, json.loads(numbers), best)
    except (OSError, ValueError) as error:
        raise TrainError(f'{output}: its training state cannot be read: {error}') from None


def _differences(was: dict, now: dict, default: dict, place: str = '') -> list[tuple[str, object, object]]:
    """(name, was, is) of what differs between nested settings; what is absent in `was` was the default."""
    found = []
    for key in sorted({*was, *now}):
        a, b = was.get(key, default.get(key)), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, default.get(key) or {}, f'{place}{key}.')
        elif a != b:
            found.append((f'{place}{key}', a, b))
    return found


class Processes:
    """The processes that train together, one or, under torchrun, several: what they compute alike, and what they add up."""

    def __init__(self, config: TrainConfig):
        """Raises TrainError if the device is not there."""
        cuda = torch.cuda.is_available()
        if config.device == 'cuda' and not cuda:
            raise TrainError('device is cuda, but torch finds no GPU; valid here: cpu, auto')
        self.count, self.rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
        self.device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0))) if cuda and config.device != 'cpu' \
            else torch.device('cpu')
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)

    @property
    def first(self) -> bool:
        """True in the process that reports and saves."""
        return self.rank == 0

    def share_of(self, n: int) -> slice:
        """The part of a batch of n that is this process's."""
        return slice(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def share(self, *modules: nn.Module) -> None:
        """All begin with the first one's weights: equal seeds need not give equal ones on different machines."""
        if self.count > 1:
            for tensor in (tensor for module in modules for tensor in module.state_dict().values()):
                dist.broadcast(tensor, 0)

    def total(self, number: float) -> float:
        """Sum over the processes."""
        if self.count == 1:
            return float(number)
        value = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(value)
        return value.item()

    def of_first(self, number: float) -> float:
        """The first one's number."""
        return self.total(number if self.first else 0.0)

    def sum_gradients(self, weights: list[nn.Parameter]) -> None:
        """Sum over the processes, in one message."""
        if self.count == 1:
            return
        used = [weight for weight in weights if weight.grad is not None]
        flat = torch.cat([weight.grad.flatten() for weight in used])
        dist.all_reduce(flat)
        for weight, part in zip(used, flat.split([weight.numel() for weight in used])):
            weight.grad.copy_(part.view_as(weight))


@contextlib.contextmanager
def join_processes(config: TrainConfig) -> Iterator[Processes]:
    """Those that torchrun started with this one; this one alone without it."""
    processes = Processes(config)
    if processes.count == 1:
        yield processes
        return
    dist.init_process_group('nccl' if processes.device.type == 'cuda' else 'gloo')
    try:
        yield processes
    finally:
        dist.destroy_process_group()


class SharedDraws(TorchFunctionMode):
    """Random numbers for a share of a batch are drawn as for all of it, of which the share is kept.

    The axis of the batch is the first one of whatever is drawn.
    """

    DRAWS = (torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like)

    def __init__(self, batch: int, share: slice):
        super().__init__()
        self.batch, self.share = batch, share

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.DRAWS or self.share == slice(0, self.batch):
            return func(*args, **kwargs)
        shape = self.batch, *func(*args, **{**kwargs, 'device': 'meta'}).shape[1:]
        if func in (torch.rand_like, torch.randn_like):
            drawn = func(args[0].new_empty(1).expand(shape), **kwargs)
        else:
            drawn = func(*(args[:-1] if func is torch.randint else ()), shape, **kwargs)
        return drawn[self.share]


def split_episodes(episodes: list[int], config: TrainConfig) -> tuple[list[int], list[int]]:
    """The episodes to train on, and those held out: the share `validation` of them, at least one. Raises TrainError."""
    if config.validation == 0.0:
        return episodes, []
    n = max(1, round(config.validation * len(episodes)))
    if n >= len(episodes):
        raise TrainError(f'validation is {config.validation} of {len(episodes)} episodes, which leaves none to train on')
    held_out = set(np.random.default_rng([config.episode_seed, 1]).permutation(episodes)[:n].tolist())
    return [i for i in episodes if i not in held_out], sorted(held_out)


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in up to four groups: with and without weight decay, networks that look at images and all else.

    `share` of a group is its learning rate as a multiple of the schedule's.
    """
    decayed = {f'{name}.{part}' for name, module in policy.named_modules() if not isinstance(module, nn.Embedding)
               for part, parameter in module.named_parameters(recurse=False)
               if part.endswith('weight') and parameter.ndim >= 2}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in policy.named_parameters():
        groups.setdefault((name in decayed, name.startswith('encoders.')), []).append(parameter)
    vision = (config.vision_learning_rate or config.learning_rate) / config.learning_rate
    return torch.optim.AdamW(
        [{'params': parameters, 'weight_decay': config.weight_decay if decay else 0.0, 'share': vision if sees else 1.0}
         for (decay, sees), parameters in groups.items()],
        lr=config.learning_rate, betas=config.betas, fused=True)


@torch.no_grad()
def validation_loss(policy: Policy, windows: Windows, config: TrainConfig, device: torch.device, most: int = 16) -> float:
    """Mean loss over windows of the held-out episodes, evenly chosen, at most `most` batches; with the same noise each time."""
    n = min(len(windows), most * config.batch_size)
    chosen = np.linspace(0, len(windows) - 1, n).round().astype(int)
    total, counted = 0.0, 0
    with torch.random.fork_rng([device] if device.type == 'cuda' else []), autocast(config, device):
        torch.manual_seed(config.seed)
        for start in range(0, n, config.batch_size):
            batch = to_device(windows.batch(chosen[start:start + config.batch_size]), device)
            valid = batch['valid'].sum().item()
            total += policy.loss(batch)['loss'].item() * valid
            counted += valid
    return total / counted


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The precision asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == 'bf16')


@contextlib.contextmanager
def signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is finished first; a second Ctrl-C ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    """An untrained policy for a dataset, normalised by its windows. Raises PolicyError, and TrainError for NaN in the data."""
    info = dataset.info
    spec = PolicySpec(features={name: info.features[name].shape for name in observations},
                      action_names=info.action.names, horizon=config.horizon, history=config.history,
                      step_period=1.0 / info.fps, action_offset=info.action.offset)
    try:
        normalizer = Normalizer.fit({**windows.lowdim, 'action': windows.action})
    except ValueError as error:
        raise TrainError(f'{dataset.path}: {error}') from None
    policy = checkpoint.POLICIES[config.kind][0](spec, config.policy, normalizer)
    if config.pretrained is not None:
        try:
            load_pretrained(policy.encoders, config.pretrained)
        except (OSError, ValueError) as error:
            raise PolicyError(f'{config.kind}: {error}') from None
    return policy


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


def to_device(batch: dict, device: torch.device) -> dict[str, Tensor | dict[str, Tensor]]:
    """A batch of arrays as tensors."""
    return {key: to_device(value, device) if isinstance(value, dict) else torch.from_numpy(value).to(device)
            for key, value in batch.items()}


def _plain(config: TrainConfig) -> dict:
    """JSON types; `policy` is the name of the algorithm, whose settings stand beside the others as in presets."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()}
    return {**values, **values['policy'], 'policy': config.kind}


def _kept(output: Path | None) -> str:
    return f'; the checkpoint saved before is kept: {output}' if output is not None and output.exists() else ''


def _silent(spent: float, step: int, loss: float) -> None:
    pass


def _tensorboard(folder: Path | None, stack: contextlib.ExitStack):
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainError('tensorboard was asked for but is not installed: pip install tensorboard') from None
    return stack.enter_context(SummaryWriter(str(folder)))
