"""Closed-loop evaluation of a checkpoint in a simulated task, without ROS."""
from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from il_policies.policies import Policy, PolicyError


def evaluate_pusht(policy: Policy, episodes: int = 50, seed: int = 100000, stride: int = 8,
                   progress: Callable[[float], None] = lambda fraction: None) -> dict:
    """PushT under Diffusion Policy's protocol; all episodes are advanced together, with one prediction for all.

    Start i is `legacy_start(seed + i)`, and seed + i seeds the policy's noise in it; 300 steps; of each chunk `stride`
    steps are executed; an episode's score is the maximum over time of coverage / 0.95 clipped to 1. Returns protocol,
    mean score, scores, and how many episodes exceeded 0.95 coverage (gym-pusht's "success", another metric).
    Raises PolicyError if the policy is not one for PushT.
    """
    from il_policies.sim import pusht

    spec = policy.spec
    known = pusht.FEATURES
    wrong = [name for name, shape in spec.features.items() if known.get(name) != tuple(shape)]
    if wrong or len(spec.action_names) != 2 or abs(spec.step_period * pusht.FPS - 1.0) > 1e-6:
        raise PolicyError(f'pusht: the policy sees {spec.features} and gives {len(spec.action_names)} actions every '
                          f'{spec.step_period} s; the task has {known}, 2 actions every {1 / pusht.FPS} s')
    if not 1 <= stride <= spec.horizon:
        raise PolicyError(f'pusht: stride is {stride}, must be from 1 to the horizon, {spec.horizon}')
    started = time.perf_counter()
    # One generator an episode, so that its course depends neither on how many others there are nor on when they end.
    generators = [torch.Generator().manual_seed(seed + i) for i in range(episodes)]
    environments = [pusht.PushT() for _ in range(episodes)]
    for i, environment in enumerate(environments):
        environment.reset(pusht.legacy_start(seed + i), legacy=True)
    histories = [[environment.observation()] * spec.history for environment in environments]
    best = np.zeros(episodes)
    for t in range(0, pusht.MAX_STEPS, stride):
        # An episode that has reached score 1 cannot improve: it is left as it is.
        live = [i for i in range(episodes) if best[i] < 1.0]
        if not live:
            break
        observation = {name: torch.from_numpy(np.array([[step[name] for step in histories[i]] for i in live]))
                       for name in spec.features}
        noise = torch.stack([torch.randn((spec.horizon, 2), generator=generators[i]) for i in live])
        chunk = policy.predict(observation, noise=noise).numpy()  # (live, H, 2)
        for i, actions in zip(live, chunk):
            for action in actions[:min(stride, pusht.MAX_STEPS - t)]:
                best[i] = max(best[i], environments[i].step(action))
                histories[i] = [*histories[i][1:], environments[i].observation()]
                if best[i] >= 1.0:
                    break
        progress(min(1.0, (t + stride) / pusht.MAX_STEPS))
    return {
        'task': 'pusht',
        'protocol': f'mean over {episodes} starts (legacy, seeds from {seed}) of max over {pusht.MAX_STEPS} steps of '
                    f'coverage / {pusht.FULL_COVERAGE} clipped to 1; {stride} of {spec.horizon} steps executed',
        'score': float(best.mean()),
        'scores': best.tolist(),
        'above_095_coverage': int((best >= 1.0).sum()),
        'episodes': episodes,
        'seed': seed,
        'policy': policy.hash,
        'wall_s': round(time.perf_counter() - started, 1),
    }


TASKS = ('pusht', 'reach_around', 'reach_around_wide')
"""reach_around_wide has its goals on an arc of 0.2 m: too wide to be reached by chance."""


def evaluate(policy: Policy, task: str, shuffled: bool = False, **options) -> dict:
    """Evaluate in the named task. shuffled: with the camera images of other episodes, for policies that see images.

    Raises PolicyError for unknown tasks, policies that do not fit, and numbers out of range.
    """
    for name, least in (('episodes', 1), ('seed', 0), ('stride', 1)):
        if name in options and options[name] < least:
            raise PolicyError(f'{task}: {name} is {options[name]}, must be at least {least}')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.get('seed', 0))  # DDPM draws anew at every step, whatever noise a chunk begins from
        if task == 'pusht' and not shuffled:
            return evaluate_pusht(policy, **options)
        if task in ('reach_around', 'reach_around_wide'):
            from il_policies.lockstep import evaluate_reach_around  # brings il_runtime's core, which PushT does not need
            goals = 'wide' if task == 'reach_around_wide' else 'narrow'
            return evaluate_reach_around(policy, goals=goals, shuffled=shuffled, **options)
    raise PolicyError('pusht: there are no images to shuffle' if task == 'pusht' else
                      f'no task {task!r}; valid: {", ".join(TASKS)}')
