"""Deployment: a checkpoint's networks as ONNX files, run by ONNX Runtime or OpenVINO, at two to three times the speed of PyTorch.

Only the networks are exported, each as a graph of its own: encoders run once a chunk, and so does what the network of a sampler
computes from times and condition alone, for all steps in one pass; the rest of it runs once a step. The samplers stay the code
that was trained and tested; an exported policy is the policy with other `net` and `encoders`.
"""
from __future__ import annotations

import contextlib
import copy
import functools
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
from il_policies.policies import Policy, SamplingPolicy

FOLDER, DESCRIPTION = 'onnx', 'export.json'
TOLERANCE = 1e-4
"""Largest difference from eager, in normalised actions, with which an export is accepted."""
ENGINES = ('onnxruntime', 'openvino')
"""Engines, which are Python modules too; the first that is installed will be used."""
BACKENDS = ('auto', 'torch', *ENGINES)
MODULATE = 'net.modulate'
"""Name of the graph of what is computed once a chunk, where `net` is what is computed once a step."""


class DeployError(ValueError):
    """An export that cannot be made or used; the message says why and what helps."""


Run = Callable[[list[np.ndarray]], np.ndarray]
"""A pass through a graph."""


class Compiled(nn.Module):
    """A network whose passes an inference engine makes; where a gradient is wanted, its eager twin does.

    run: of the whole network; of its `body` if it also has `modulate`, of the method of this name.
    """

    def __init__(self, eager: nn.Module, run: Run, modulate: Run | None = None):
        super().__init__()
        self.eager, self.run, self.modulate = eager, run, modulate

    def forward(self, *inputs: Tensor | None) -> Tensor:
        if self.modulate is None:
            return self._pass(self.run, self.eager, *inputs)
        x, t, condition = inputs
        step, = self.at(t[None], condition)
        return step(x)

    def at(self, times: Tensor, condition: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """The network at each of `times` (n, B) or (n, B, H), as functions of x (B, H, D); condition: (B, K)."""
        modulations = self._pass(self.modulate, self.eager.modulate, times.flatten(0, 1), condition.repeat(len(times), 1))
        return [functools.partial(self._step, modulation) for modulation in modulations.unflatten(0, times.shape[:2])]

    def _step(self, modulation: Tensor, x: Tensor) -> Tensor:
        return self._pass(self.run, self.eager.body, x, modulation)

    @staticmethod
    def _pass(run: Run, eager: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        tensors = [value for value in inputs if value is not None]
        if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
            return eager(*inputs)
        return torch.from_numpy(run([np.ascontiguousarray(value.numpy()) for value in tensors]))

    def __getattr__(self, name: str):
        """Sizes and configurations are asked of the network itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('eager'), name)


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
        for name, (module, inputs) in _graphs(policy, observation).items():
            file = temporary / f'{name}.onnx'
            durable.write(file, _graph(module, inputs, name))
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
    if threads < 1:
        raise DeployError(f'threads is {threads}, must be at least 1')
    torch.set_num_threads(threads)
    policy, folder = checkpoint.load(path), Path(path) / FOLDER
    engines = list(filter(installed, ENGINES)) if backend == 'auto' else [backend]
    if backend == 'torch' or backend == 'auto' and (not engines or not (folder / DESCRIPTION).exists()):
        return policy
    _require(engines[0])
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        exported, files = description['policy'], {name: description['files'][name] for name in _names(policy)}
    except FileNotFoundError:
        raise DeployError(f'{path}: was not exported; do it with: il export onnx {path}') from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeployError(f'{folder / DESCRIPTION}: unreadable ({error}); export again: il export onnx {path}') from None
    if exported != policy.hash:
        raise DeployError(f'{folder}: belongs to policy {exported}, the checkpoint is {policy.hash}; '
                          f'export again: il export onnx {path}')
    return _compiled(policy, folder, files, engines[0], threads)


def _compiled(policy: Policy, folder: Path, files: dict, engine: str, threads: int) -> Policy:
    def run(name: str) -> Run:
        graph = (folder / Path(files[name]['file']).name).read_bytes()
        if hashlib.sha256(graph).hexdigest() != files[name]['sha256']:
            raise DeployError(f'{folder / files[name]["file"]}: damaged: its SHA-256 is not the one in {DESCRIPTION}')
        return (_openvino if engine == 'openvino' else _onnxruntime)(graph, threads)

    policy.encoders = nn.ModuleList(Compiled(encoder, run(f'encoders.{i}')) for i, encoder in enumerate(policy.encoders))
    policy.net = Compiled(policy.net, run('net'), run(MODULATE) if _sampled(policy) else None)
    policy.backend = engine
    return policy


def _onnxruntime(graph: bytes, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that spin for long would take the cores from the control loop; those that never do wake when a small product is done
    # already, and two are slower than one. So: for 20 us, which old versions do not know, and never between passes.
    options.add_session_config_entry('session.intra_op.spin_duration_us', '20')
    options.add_session_config_entry('session.force_spinning_stop', '1')
    # Fused with the sum before it, layer norm is computed one number at a time and takes four times as long as both apart.
    session = onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'],
                                           disabled_optimizers=['SkipLayerNormFusion'])
    names = [value.name for value in session.get_inputs()]
    return lambda values: session.run(None, dict(zip(names, values, strict=True)))[0]


def _openvino(graph: bytes, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    request = core.compile_model(core.read_model(io.BytesIO(graph)), 'CPU', {
        'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32',
        'ENABLE_CPU_PINNING': False}).create_infer_request()

    def run(values: list[np.ndarray]) -> np.ndarray:
        # The result lies in a buffer that the next pass uses again.
        return request.infer(values, share_inputs=True, share_outputs=True)[0].copy()

    return run


class _Method(nn.Module):
    """A method of a module as a module, which alone can be exported."""

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return getattr(self.module, self.name)(*inputs)


def _mish(x):
    """Mish, x·tanh(log(1 + exp x)), as x·r/(2 - r), r = p·(2 - p), p = sigmoid(x), in ONNX.

    As ONNX has it, ONNX Runtime takes 4 times as long: it computes the logarithm one number at a time.
    """
    from onnxscript import opset18 as op

    p = op.Sigmoid(x)
    r = op.Mul(p, op.Sub(2.0, p))
    return op.Mul(x, op.Div(r, op.Sub(2.0, r)))


def _graph(module: nn.Module, inputs: tuple[Tensor | None, ...], name: str) -> bytes:
    """ONNX graph of a module for any batch size."""
    given = [f'x{i}' for i, value in enumerate(inputs) if value is not None]
    shapes = tuple(None if value is None else {0: torch.export.Dim.DYNAMIC} for value in inputs)
    try:
        with _silent():
            program = torch.onnx.export(module, inputs, dynamo=True, opset_version=18, input_names=given, output_names=['y'],
                                        dynamic_shapes=(shapes,), verbose=False,
                                        custom_translation_table={torch.ops.aten.mish.default: _mish})
            return program.model_proto.SerializeToString()
    except Exception as error:  # torch.onnx raises what its many stages raise
        raise DeployError(f'{name} cannot be exported to ONNX: {" ".join(str(error).split())[:300]}') from None


def _sampled(policy: Policy) -> bool:
    """Whether the network runs several times a chunk, of which some of it is needed once only."""
    return isinstance(policy, SamplingPolicy)


def _names(policy: Policy) -> list[str]:
    """Of the graphs."""
    return ['net', *([MODULATE] if _sampled(policy) else []), *(f'encoders.{i}' for i in range(len(policy.encoders)))]


@torch.no_grad()
def _graphs(policy: Policy, observation: dict[str, Tensor]) -> dict[str, tuple[nn.Module, tuple[Tensor | None, ...]]]:
    """Name → what becomes a graph, and what it is given when the policy predicts."""
    seen: dict[nn.Module, tuple] = {}
    modules = {'net': policy.net, **{f'encoders.{i}': encoder for i, encoder in enumerate(policy.encoders)}}
    hooks = [module.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs}))
             for module in modules.values()]
    try:
        policy.predict(observation)
    finally:
        for hook in hooks:
            hook.remove()
    graphs = {name: (_Method(module, 'forward'), seen[module]) for name, module in modules.items()}
    if _sampled(policy):
        x, t, condition = seen[policy.net]
        graphs['net'] = _Method(policy.net, 'body'), (x, policy.net.modulate(t, condition))
        graphs[MODULATE] = _Method(policy.net, 'modulate'), (t, condition)
    return graphs


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
