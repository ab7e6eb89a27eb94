"""Checkpoints: a folder with `model.safetensors` (weights) and `policy.json` (everything else). No pickle.

Training writes two folders more into it: `best/`, a checkpoint of its own, and, until it is finished, `training/`.

policy.json: kind, config, spec, statistics, extra (contract, contract_hash, dataset_hash, training), the SHA-256 of the
weights, and `hash`, the first 16 hex digits of the SHA-256 of all that: what `ActionChunk.policy` carries.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from il_policies import durable
from il_policies.contract import ContractError, from_dict
from il_policies.policies import Policy, PolicyError, PolicySpec
from il_policies.policies.act import ACT, ACTConfig
from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.diffusion import Diffusion, DiffusionConfig
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer

FORMAT = 1
WEIGHTS, DESCRIPTION = 'model.safetensors', 'policy.json'
POLICIES = {'act': (ACT, ACTConfig), 'bc': (BC, BCConfig), 'diffusion': (Diffusion, DiffusionConfig), 'flow': (Flow, FlowConfig)}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message says which file and why."""


def require_writable(path: str | Path) -> Path:
    """The path, links followed, if a checkpoint can be written there: asked before training. Raises CheckpointError."""
    path = Path(path).resolve()  # a link, such as to a larger disk, stays: what it points to is renamed
    _recover(path)
    if path.exists() and not (path / DESCRIPTION).exists():
        raise CheckpointError(f'{path}: exists and is no checkpoint; give another folder')
    temporary = path.with_name(f'.{path.name}.new')
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        temporary.rmdir()
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be written: {error.strerror}') from None
    return path


def present(path: Path) -> Path:
    """Where the files of the checkpoint at `path` are, `path` or a folder beside it.

    Between the two renames of `save`, or if it was killed there, the older checkpoint is under another name. Who only reads
    must leave it there: `save` may be about to rename the newer one.
    """
    replaced = path.with_name(f'.{path.name}.old')
    return replaced if not path.exists() and (replaced / DESCRIPTION).exists() else path


def _recover(path: Path) -> None:
    """Undo the first rename of a `save` that was killed before the second."""
    if present(path) != path:
        with contextlib.suppress(OSError):
            os.rename(present(path), path)


def content(policy: Policy, extra: dict) -> dict[str, bytes]:
    """The files of a checkpoint, by name; sets `policy.extra` and `policy.hash`. extra: JSON types."""
    weights = save_tensors({name: value.contiguous() for name, value in policy.state_dict().items()})
    description = {
        'format': FORMAT,
        'kind': policy.kind,
        'config': dataclasses.asdict(policy.config),
        'spec': dataclasses.asdict(policy.spec),
        'statistics': policy.normalizer.statistics,
        'extra': extra,
        'weights_sha256': hashlib.sha256(weights).hexdigest(),
    }
    description['hash'] = _hash(description)
    policy.extra = json.loads(json.dumps(extra))
    policy.hash = description['hash']
    return {WEIGHTS: weights, DESCRIPTION: json.dumps(description, indent=1).encode()}


def save(path: str | Path, policy: Policy, extra: dict, further: dict[str, bytes] | None = None) -> None:
    """Write a checkpoint folder, replacing an older checkpoint there; sets `policy.extra` and `policy.hash`.

    Written to a temporary folder beside it, synced and renamed: killed at any time, it leaves no half-written
    checkpoint. extra: JSON types. further: more files by their path in the folder, which come and go with it. Raises
    CheckpointError if something else is at `path` or it cannot be written.
    """
    path = require_writable(path)
    files = content(policy, extra) | (further or {})
    temporary = path.with_name(f'.{path.name}.new')
    replaced = path.with_name(f'.{path.name}.old')
    try:
        for rest in (temporary, replaced):
            shutil.rmtree(rest, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            durable.write(temporary / name, data)
        for folder in {(temporary / name).parent for name in files}:
            durable.sync(folder)
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
        durable.sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f'{path}: cannot be written: {error}') from None


def load(path: str | Path) -> Policy:
    """The policy of a checkpoint folder, in evaluation mode, with `extra` and `hash` set. Raises CheckpointError."""
    path = Path(path)
    try:
        description, weights = _read(path.resolve())
        text = description.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f'{path}: no readable checkpoint ({DESCRIPTION} and {WEIGHTS}): {error}') from None
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{path / DESCRIPTION}: not JSON: {error}') from None
    if not isinstance(description, dict) or description.get('format') != FORMAT:
        found = description.get('format') if isinstance(description, dict) else type(description).__name__
        raise CheckpointError(f'{path / DESCRIPTION}: format is {found}; this version reads {FORMAT}')
    if hashlib.sha256(weights).hexdigest() != description.get('weights_sha256'):
        raise CheckpointError(f'{path / WEIGHTS}: damaged: its SHA-256 is not the one in {DESCRIPTION}')
    if _hash(description) != description.get('hash'):
        raise CheckpointError(f'{path / DESCRIPTION}: damaged or edited: its content does not match its hash')
    kind = description.get('kind')
    if not isinstance(kind, str) or kind not in POLICIES:
        raise CheckpointError(f'{path / DESCRIPTION}: policy kind is {kind!r}; valid: {", ".join(POLICIES)}')
    policy_type, config_type = POLICIES[kind]
    try:
        spec = from_dict(PolicySpec, description['spec'], 'spec')
        config = from_dict(config_type, description['config'], 'config')
        statistics = from_dict(dict[str, dict[str, list[float]]], description['statistics'], 'statistics')
        # Settings that only a newer version knows would be left out in silence.
        unknown = _unknown(description['spec'], dataclasses.asdict(spec), 'spec.')
        unknown += _unknown(description['config'], dataclasses.asdict(config), 'config.')
        if unknown:
            raise ValueError(f'it has {", ".join(unknown)}, which this version does not know')
        sizes = {**{name: spec.features[name][0] for name in spec.lowdim}, 'action': len(spec.action_names)}
        wrong = {name: size for name, size in sizes.items() if len(statistics.get(name, {}).get('min', ())) != size}
        if wrong:
            raise ValueError(f'statistics must have {", ".join(f"{size} numbers of {name}" for name, size in wrong.items())}')
        policy = policy_type(spec, config, Normalizer(statistics))
        policy.load_state_dict(load_tensors(weights))
        policy.extra = from_dict(dict, description['extra'], 'extra')
    except (PolicyError, ContractError, SafetensorError, KeyError, RuntimeError, ValueError, MemoryError) as error:
        raise CheckpointError(f'{path}: does not fit this version: {" ".join(str(error).split())}') from None
    policy.hash = description['hash']
    return policy.eval().requires_grad_(False)


def _unknown(data: dict, known: dict, place: str) -> list[str]:
    """Names of what is in `data`, at any depth, but not in `known`."""
    found = [f'{place}{key}' for key in data if key not in known]
    return found + [name for key, value in data.items() if isinstance(value, dict) and isinstance(known.get(key), dict)
                    for name in _unknown(value, known[key], f'{place}{key}.')]


def _read(path: Path) -> tuple[bytes, bytes]:
    """Description and weights of one and the same save, also while another replaces it. Raises OSError."""
    for last in (False, False, True):
        try:
            # A folder that is held open stays the one it was, whatever `save` renames; only its files may go.
            folder = os.open(present(path), os.O_RDONLY)
            try:
                opener = functools.partial(os.open, dir_fd=folder)
                with open(DESCRIPTION, 'rb', opener=opener) as description, open(WEIGHTS, 'rb', opener=opener) as weights:
                    return description.read(), weights.read()
            finally:
                os.close(folder)
        except FileNotFoundError:
            if last:
                raise


def _hash(description: dict) -> str:
    content = {key: value for key, value in description.items() if key != 'hash'}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

