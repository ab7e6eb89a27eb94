"""PushT in gym-pusht, under the protocol of Diffusion Policy (https://arxiv.org/abs/2303.04137), with state input.

gym-pusht scores coverage itself, but draws other starts and observes eight other points; here are the protocol's starts
and the observations of the human demonstrations.
"""
from __future__ import annotations

import os
import warnings

import numpy as np

os.environ.setdefault('SDL_VIDEODRIVER', 'dummy')      # pygame, imported by gym-pusht, looks for a screen otherwise
os.environ.setdefault('PYGAME_HIDE_SUPPORT_PROMPT', '1')
with warnings.catch_warnings():
    warnings.simplefilter('ignore')                    # pygame imports pkg_resources, which warns
    from gym_pusht.envs.pusht import PushTEnv

FPS = 10.0
"""Steps per second [Hz]."""
MAX_STEPS = 300
"""Length of an episode."""
FULL_COVERAGE = 0.95
"""Coverage that counts as 1: the score is coverage / FULL_COVERAGE, at most 1."""

# The nine points of the demonstrations' `keypoint` array in the block's frame [px], recovered from its states.
KEYPOINTS = np.array([
    (9.269, 90.023), (-60.992, -1.187), (60.907, -1.393), (-0.270, 25.544), (-14.064, 122.811),
    (39.000, 32.861), (-39.955, 32.734), (-16.822, 62.872), (23.541, -1.700)])

FEATURES = {'pose': (6,), 'keypoints': (18,)}
"""Shapes of what `PushT.observation` gives."""


def legacy_start(seed: int) -> np.ndarray:
    """Start of the protocol: agent x, y, block x, y [px], angle [rad], from NumPy's old generator, as there. (5,)."""
    rng = np.random.RandomState(seed)
    return np.array([rng.randint(50, 450), rng.randint(50, 450), rng.randint(100, 400), rng.randint(100, 400),
                     rng.randn() * 2 * np.pi - np.pi])


class PushT:
    """One environment. Actions are positions the agent is driven to, (x, y) in 0..512 [px]."""

    def __init__(self):
        self._env = PushTEnv(obs_type='state')

    def reset(self, state: np.ndarray, legacy: bool = False) -> None:
        """Put agent and block at state (5,): agent x, y, block x, y [px], angle [rad].

        legacy: set the block's position before its angle, which moves it about its centre of mass. The protocol's
        starts are made so (its `legacy_test`); a recorded state is restored only without.
        """
        self._env.reset(options={'reset_to_state': state})
        if not legacy:
            # Fresh bodies, since the first setting ran a physics step in which bodies may have touched.
            self._env._setup()
            self._env.agent.position = tuple(map(float, state[:2]))
            self._env.block.angle = float(state[4])
            self._env.block.position = tuple(map(float, state[2:4]))

    def step(self, action: np.ndarray) -> float:
        """Drive the agent towards action (2,) for 0.1 s; returns the score now, coverage / 0.95 clipped to [0, 1]."""
        _, score, _, _, _ = self._env.step(np.asarray(action, np.float64))
        return float(score)

    @property
    def state(self) -> np.ndarray:
        """Agent x, y, block x, y [px], angle in [0, 2π) [rad]. Shape (5,)."""
        return self._env.get_obs()

    def observation(self) -> dict[str, np.ndarray]:
        """The features `config/imports/pusht.yaml` makes of a demonstration: pose (6,) and keypoints (18,), float32."""
        agent_x, agent_y, x, y, angle = self.state
        sin, cos = np.sin(angle), np.cos(angle)
        points = KEYPOINTS @ np.array([(cos, sin), (-sin, cos)]) + (x, y)
        return {'pose': np.array([agent_x, agent_y, x, y, sin, cos], np.float32),
                'keypoints': points.astype(np.float32).ravel()}
