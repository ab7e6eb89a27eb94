"""Planning: observation → chunk, with one rule for the sampler's noise from chunk to chunk, and real-time chunking."""
from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from il_policies.policies import Policy
from il_policies.policies.guidance import MODES, Guidance, rtc_weights

NOISE = ('warm_start', 'per_epoch', 'per_chunk')
RTC = ('off', *MODES)


class Planner:
    """Asks a policy for chunks and remembers, within an epoch, what the next one needs.

    noise, for sampling policies:
    per_chunk   fresh noise for every chunk: consecutive chunks may choose different modes;
    per_epoch   one draw for the epoch;
    warm_start  the previous chunk, resampled by time onto the new chunk's steps, is re-noised to flow time `tau` and
                denoised from there: the mode is kept. The first chunk of an epoch is drawn from noise alone.

    rtc: real-time chunking (https://arxiv.org/abs/2506.07339), whatever the noise: the new chunk is guided to continue the
    previous one, resampled by time onto its steps; where the two do not overlap there is nothing to continue.
    """

    def __init__(self, policy: Policy, noise: Literal['warm_start', 'per_epoch', 'per_chunk'] = 'warm_start',
                 tau: float = 0.5, seed: int = 0, rtc: Literal['off', 'vjp', 'identity', 'prefix'] = 'off', beta: float = 5.0):
        """tau: flow time in [0, 1) at which a warm start enters; higher keeps more of the previous chunk.

        rtc and beta: mode and largest weight of the guidance, see `Guidance`. A policy that cannot take it says so in
        `warm_up`. Raises ValueError for unknown modes, tau or beta out of range.
        """
        if noise not in NOISE:
            raise ValueError(f'noise is {noise!r}; valid: {", ".join(NOISE)}')
        if rtc not in RTC:
            raise ValueError(f'rtc is {rtc!r}; valid: {", ".join(RTC)}')
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f'beta is {beta}, must be > 0')
        if not 0.0 <= tau < 1.0:
            raise ValueError(f'tau is {tau}, must be in [0, 1)')
        self.policy = policy
        self.noise = noise
        self.tau = tau
        self.rtc = rtc
        self.beta = beta
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

    def plan(self, observation: dict[str, np.ndarray], start: float, delay: float = 0.0, speed: float = 1.0) -> np.ndarray:
        """Chunk (H, D) float64 in raw units.

        observation: feature → (To, ...), oldest first. start: time of step 0 [s], on any clock, the same throughout an
        epoch. delay: time after `start` at which the chunk is expected to be followed, which rtc needs to know [s].
        speed: share of full speed, in [0, 1], at which chunks are played: the arm is that much less far in the previous one.
        Raises PolicyError for observations that do not fit, or for guidance that the policy cannot take.
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
            warm = (self._rest(start, speed), self.tau)
        guidance = self._guidance(start, delay, speed)
        chunk = self.policy.predict(batch, noise=noise, warm=warm, guidance=guidance)[0].double().numpy()
        self._previous = (chunk, start)
        return chunk

    def _rest(self, start: float, speed: float) -> Tensor:
        """What is left of the previous chunk, as it is played, on the steps of one that begins at `start`. Shape (1, H, D)."""
        chunk, began = self._previous
        rest = resample(chunk, 0.0, speed * (start - began), self.policy.spec.step_period)
        return torch.from_numpy(rest.astype(np.float32))[None]

    def _guidance(self, start: float, delay: float, speed: float) -> Guidance | None:
        """What a chunk that begins at `start` shall continue; None: nothing."""
        if self.rtc == 'off' or self._previous is None:
            return None
        H, period = self.policy.spec.horizon, self.policy.spec.step_period
        passed = start - self._previous[1]
        if _steps(passed, period) >= H or passed < -1e-9:  # a chunk ends at its time, however slowly it is played
            return None
        executed = max(_steps(speed * passed, period), 1)
        late = min(max(_steps(speed * delay, period), 0), executed, H - executed)
        return Guidance(self._rest(start, speed), rtc_weights(H, late, executed), self.rtc, self.beta, late)

    def warm_up(self) -> None:
        """Plan from zeros and forget it, the noise drawn too: a network's first pass is its slowest, guided and not.

        Raises PolicyError for a policy that cannot take the guidance of rtc.
        """
        spec, state = self.policy.spec, self._generator.get_state()
        for i in range(1 if self.rtc == 'off' else 2):
            start = i * spec.step_period
            self.plan({name: np.zeros((spec.history, *shape)) for name, shape in spec.features.items()}, start, spec.step_period)
        self._generator.set_state(state)
        self.reset()


def _steps(duration: float, step_period: float) -> int:
    """Rounded up, as a step is lost at once; but what is a whole number of steps stays it, by wall clocks of 1e-7 s too."""
    return math.ceil(duration / step_period - 1e-3)


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
