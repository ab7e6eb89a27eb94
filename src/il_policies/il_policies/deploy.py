"""Deployment: a checkpoint's networks as ONNX files, run by ONNX Runtime or OpenVINO, at two to three times the speed of PyTorch.

Only the networks are exported, each as a graph of its own: encoders run once a chunk, the network of a sampler once a step. The
samplers stay the code that was trained and tested; an exported policy is the policy with other `net` and `encoders`.
"""
from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from il_policies import checkpoint, durable
from il_policies.policies import Policy

FOLDER, DESCRIPTION = 'onnx', 'export.json'
TOLERANCE = 1e-4
"""Largest difference from eager, in normalised actions, with which an export is accepted."""
ENGINES = ('onnxruntime', 'openvino')
"""Engines, which are Python modules too; the first that is installed will be used. OpenVINO is faster on an idle machine, and
slower where others use the cores."""
BACKENDS = ('auto', 'torch', *ENGINES)


class DeployError(ValueError):
    """An export that cannot be made or used; the message says why and what helps."""


class Compiled(nn.Module):
    """A network whose passes an inference engine makes; where a gradient is wanted, its eager twin does."""

    def __init__(self, eager: nn.Module, run: Callable[[list[np.ndarray]], np.ndarray]):
        super().__init__()
        self.eager, self.run = eager, run

    def forward(self, *inputs: Tensor | None) -> Tensor:
        tensors = [value for value in inputs if value is not None]
        if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
            return self.eager(*inputs)
        return torch.from_numpy(self.run([np.ascontiguousarray(value.numpy()) for value in tensors]))

    def __getattr__(self, name: str):
        """Sizes and configurations are asked of the network itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('eager'), name)


def networks(policy: Policy) -> dict[str, nn.Module]:
    """Networks that a policy runs when it predicts, by their names in it."""
    return {'net': policy.net, **{f'encoders.{i}': encoder for i, encoder in enumerate(policy.encoders)}}


def export(path: str | Path) -> dict:
    """Write the networks of a checkpoint into its folder onnx/, checked against eager; returns what export.json says.

    All of it or, on an error, nothing. Raises CheckpointError, and DeployError if a network cannot be exported or differs.
    """
    policy, path = checkpoint.load(path), Path(path)
    _require('onnx', 'onnxscript', 'onnxruntime')
    observation = _observation(policy, 2, torch.Generator().manual_seed(0))
    temporary, final = path / f'.{FOLDER}.new', path / FOLDER
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        files = {}
        for name, inputs in _inputs(policy, observation).items():
            file = temporary / f'{name}.onnx'
            durable.write(file, _graph(networks(policy)[name], inputs, name))
            files[name] = {'file': file.name, 'sha256': hashlib.sha256(file.read_bytes()).hexdigest()}
        description = {'policy': policy.hash, 'files': files, 'torch': torch.__version__, 'max_error': {}}
        for engine in filter(installed, ENGINES):
            error = _difference(policy, _compiled(copy.deepcopy(policy), temporary, files, engine, 1))
            if not error <= TOLERANCE:
                raise DeployError(f'{path}: actions by {engine} are {error:.2g} off those by torch (normalised), at most '
                                  f'{TOLERANCE:g} is accepted; nothing was written')
            description['max_error'][engine] = error
        durable.write(temporary / DESCRIPTION, json.dumps(description, indent=1).encode())
        durable.sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        durable.sync(path)
    except OSError as error:
        raise DeployError(f'{path}: cannot be written: {error}') from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return description


def load(path: str | Path, backend: Literal['auto', 'torch', 'onnxruntime', 'openvino'] = 'auto', threads: int = 1) -> Policy:
    """The policy of a checkpoint, its networks run by `backend` with so many threads; `policy.backend` names the one in use.

    auto: the fastest installed one that the checkpoint was exported for, or torch. Raises CheckpointError, and DeployError if a
    backend that was asked for cannot be had.
    """
    if backend not in BACKENDS:
        raise DeployError(f'backend is {backend!r}; valid: {", ".join(BACKENDS)}')
    torch.set_num_threads(threads)
    policy, folder = checkpoint.load(path), Path(path) / FOLDER
    engines = list(filter(installed, ENGINES)) if backend == 'auto' else [backend]
    if backend == 'torch' or backend == 'auto' and (not engines or not (folder / DESCRIPTION).exists()):
        return policy
    _require(engines[0])
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        exported, files = description['policy'], {name: description['files'][name] for name in networks(policy)}
    except FileNotFoundError:
        raise DeployError(f'{path}: was not exported; do it with: il export onnx {path}') from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeployError(f'{folder / DESCRIPTION}: unreadable ({error}); export again: il export onnx {path}') from None
    if exported != policy.hash:
        raise DeployError(f'{folder}: belongs to policy {exported}, the checkpoint is {policy.hash}; '
                          f'export again: il export onnx {path}')
    return _compiled(policy, folder, files, engines[0], threads)


def _compiled(policy: Policy, folder: Path, files: dict, engine: str, threads: int) -> Policy:
    for name, module in networks(policy).items():
        graph = (folder / Path(files[name]['file']).name).read_bytes()
        if hashlib.sha256(graph).hexdigest() != files[name]['sha256']:
            raise DeployError(f'{folder / files[name]["file"]}: damaged: its SHA-256 is not the one in {DESCRIPTION}')
        compiled = Compiled(module, (_openvino if engine == 'openvino' else _onnxruntime)(graph, threads))
        if name == 'net':
            policy.net = compiled
        else:
            policy.encoders[int(name.rpartition('.')[2])] = compiled
    policy.backend = engine
    return policy


def _onnxruntime(graph: bytes, threads: int) -> Callable[[list[np.ndarray]], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that spin while they wait would take the cores from the control loop.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])
    names = [value.name for value in session.get_inputs()]
    return lambda values: session.run(None, dict(zip(names, values, strict=True)))[0]


def _openvino(graph: bytes, threads: int) -> Callable[[list[np.ndarray]], np.ndarray]:
    import openvino

    core = openvino.Core()
    request = core.compile_model(core.read_model(io.BytesIO(graph)), 'CPU', {
        'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32',
        'ENABLE_CPU_PINNING': False}).create_infer_request()

    def run(values: list[np.ndarray]) -> np.ndarray:
        # The result lies in a buffer that the next pass uses again.
        return request.infer(values, share_inputs=True, share_outputs=True)[0].copy()

    return run


def _graph(module: nn.Module, inputs: tuple[Tensor | None, ...], name: str) -> bytes:
    """ONNX graph of a module for any batch size."""
    given = [f'x{i}' for i, value in enumerate(inputs) if value is not None]
    shapes = tuple(None if value is None else {0: torch.export.Dim.DYNAMIC} for value in inputs)
    try:
        with _silent():
            program = torch.onnx.export(module, inputs, dynamo=True, opset_version=18, input_names=given, output_names=['y'],
                                        dynamic_shapes=(shapes,) if _variadic(module) else shapes, verbose=False)
            return program.model_proto.SerializeToString()
    except Exception as error:  # torch.onnx raises what its many stages raise
        raise DeployError(f'{name} cannot be exported to ONNX: {" ".join(str(error).split())[:300]}') from None


def _variadic(module: nn.Module) -> bool:
    return bool(module.forward.__code__.co_flags & 0x04)


def _inputs(policy: Policy, observation: dict[str, Tensor]) -> dict[str, tuple[Tensor | None, ...]]:
    """What each network is given when the policy predicts."""
    seen: dict[str, tuple] = {}

    def keep(name: str):
        return lambda _module, arguments: seen.update({name: arguments})

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in networks(policy).items()]
    try:
        policy.predict(observation)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _observation(policy: Policy, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random observations within the ranges trained on."""
    spec = policy.spec
    return {name: torch.randint(0, 256, (batch, spec.history, *shape), generator=generator, dtype=torch.uint8)
            if name in spec.images else
            policy.normalizer.unnormalize(name, 2.0 * torch.rand((batch, spec.history, *shape), generator=generator) - 1.0)
            for name, shape in spec.features.items()}


def _difference(one: Policy, other: Policy) -> float:
    """Largest difference of normalised actions for the same observations and noise, one and several at a time."""
    generator, worst = torch.Generator().manual_seed(1), 0.0
    for batch in (1, 1, 3):
        observation = _observation(one, batch, generator)
        noise = torch.randn((batch, one.spec.horizon, len(one.spec.action_names)), generator=generator)
        chunks = []
        for policy in (one, other):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(batch)  # DDPM draws at every step
                chunks.append(policy.normalizer.normalize('action', policy.predict(observation, noise=noise)))
        worst = max(worst, float((chunks[0] - chunks[1]).abs().max()))
    return worst


def installed(module: str) -> bool:
    """Whether a Python module, such as an engine, can be imported."""
    return importlib.util.find_spec(module) is not None


def _require(*modules: str) -> None:
    missing = [module for module in modules if not installed(module)]
    if missing:
        raise DeployError(f'not installed: {", ".join(missing)}; pip install {" ".join(missing)}')


@contextlib.contextmanager
def _silent():
    """The exporter tells its progress and its internals' deprecations; what matters is checked afterwards."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
