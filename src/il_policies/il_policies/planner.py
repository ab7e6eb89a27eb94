"""Planning: observation → chunk, with one rule for the sampler's noise from chunk to chunk."""
from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from il_policies.policies import Policy

NOISE = ('warm_start', 'per_epoch', 'per_chunk')


class Planner:
    """Asks a policy for chunks and remembers, within an epoch, what the next one needs.

    noise, for sampling policies:
    per_chunk   fresh noise for every chunk: consecutive chunks may choose different modes;
    per_epoch   one draw for the epoch;
    warm_start  the previous chunk, resampled by time onto the new chunk's steps, is re-noised to flow time `tau` and
                denoised from there: the mode is kept. The first chunk of an epoch is drawn from noise alone.
    """

    def __init__(self, policy: Policy, noise: Literal['warm_start', 'per_epoch', 'per_chunk'] = 'warm_start',
                 tau: float = 0.5, seed: int = 0):
        """tau: flow time in [0, 1) at which a warm start enters; higher keeps more of the previous chunk.

        Raises ValueError for unknown modes or tau out of range.
        """
        if noise not in NOISE:
            raise ValueError(f'noise is {noise!r}; valid: {", ".join(NOISE)}')
        if not 0.0 <= tau < 1.0:
            raise ValueError(f'tau is {tau}, must be in [0, 1)')
        self.policy = policy
        self.noise = noise
        self.tau = tau
        self._generator = torch.Generator()
        self.reset(seed)

    def reset(self, seed: int | None = None) -> None:
        """Begin an epoch: forget the previous chunk; reseed the noise if a seed is given."""
        if seed is not None:
            self._generator.manual_seed(seed)
        self._epoch_noise: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Draw the next chunk from noise alone: the previous one was not followed."""
        self._previous: tuple[np.ndarray, float] | None = None

    def plan(self, observation: dict[str, np.ndarray], start: float) -> np.ndarray:
        """Chunk (H, D) float64 in raw units.

        observation: feature → (To, ...), oldest first. start: time of step 0 [s], on any clock, the same throughout an
        epoch. Raises PolicyError for observations that do not fit.
        """
        spec = self.policy.spec
        batch = {name: torch.from_numpy(np.array(value, np.uint8 if name in spec.images else np.float32))[None]
                 for name, value in observation.items()}
        shape = (1, spec.horizon, len(spec.action_names))
        if self.noise == 'per_epoch':
            if self._epoch_noise is None:
                self._epoch_noise = torch.randn(shape, generator=self._generator)
            noise = self._epoch_noise
        else:
            noise = torch.randn(shape, generator=self._generator)
        warm = None
        if self.noise == 'warm_start' and self._previous is not None:
            chunk = resample(*self._previous, start, spec.step_period)
            warm = (torch.from_numpy(chunk.astype(np.float32))[None], self.tau)
        chunk = self.policy.predict(batch, noise=noise, warm=warm)[0].double().numpy()
        self._previous = (chunk, start)
        return chunk

    def warm_up(self) -> None:
        """Plan once from zeros and forget it, the noise drawn too: a network's first pass is its slowest."""
        spec, state = self.policy.spec, self._generator.get_state()
        self.plan({name: np.zeros((spec.history, *shape)) for name, shape in spec.features.items()}, 0.0)
        self._generator.set_state(state)
        self.reset()


def resample(chunk: np.ndarray, chunk_start: float, start: float, step_period: float) -> np.ndarray:
    """A chunk (H, D) that began at `chunk_start` on the steps of one that begins at `start`, both [s]. Shape (H, D).

    Linear between steps; before its first and after its last step the chunk is held.
    """
    H = len(chunk)
    at = np.clip((start - chunk_start) / step_period + np.arange(H), 0.0, H - 1.0)  # in steps of the old chunk
    below = np.floor(at).astype(int)
    above = np.minimum(below + 1, H - 1)
    part = (at - below)[:, None]
    return (1.0 - part) * chunk[below] + part * chunk[above]
