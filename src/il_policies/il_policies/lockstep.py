"""Closed loop without ROS: physics, planning and control advance in step, so that results are exact and repeatable.

The planner, the ensembling and the safety gate are those of the nodes. `il_runtime.core` is pure numpy; this is the one place
where il_policies looks up to it.
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from il_policies.contract import Contract, ContractError, from_dict
from il_policies.data.decode import decode_frame
from il_policies.planner import Planner
from il_policies.policies import Policy, PolicyError, PolicySpec
from il_policies.sim.reach_around import JOINTS, ReachAround, Scene, sample_scene
from il_runtime.core.controller import Controller
from il_runtime.core.ensembling import Blending, Chunk, Ensembler
from il_runtime.core.mode import Mode
from il_runtime.core.safety import limit_violations

RESERVE = 4
"""Policy steps in which an arm at full speed comes to rest, and more."""


@dataclass(frozen=True)
class Execution:
    """How chunks are planned and blended; the nodes' parameters of the same names."""

    stride: int = 8
    """Policy steps between plans."""
    noise: Literal['warm_start', 'per_epoch', 'per_chunk'] = 'warm_start'
    """Noise of each new chunk."""
    tau: float = 0.5
    """Warm start: flow time at which the previous chunk enters."""
    ensembling: Literal['newest_first', 'oldest_first', 'latest', 'crossfade'] = 'newest_first'
    """How overlapping chunks are blended."""
    m: float = 0.5
    """Weight exp(-m·age) of a chunk, age in policy steps."""
    max_disagreement: float = 1.0
    """Above this distance between live chunks, in tracking tolerances, the newest one takes over."""
    delay: int = 0
    """Policy steps from an observation until its chunk is there, but for the first one: an arm at rest is not late."""
    waits: bool = False
    """Synchronous: the arm waits at the last of `stride` targets until the next chunk is there, which begins only then."""
    rtc: Literal['off', 'vjp', 'identity', 'prefix'] = 'off'
    """Real-time chunking: how a new chunk is made to continue the previous one."""
    beta: float = 5.0
    """Largest weight of that guidance."""
    action_noise: float = 0.0
    """Standard deviation of an error of what the servos are told, one draw a policy step [rad]."""

    def check(self, horizon: int) -> None:
        """Raises PolicyError if this cannot be executed with chunks of so many steps."""
        if not 1 <= self.stride < horizon:
            raise PolicyError(f'stride is {self.stride}, must be from 1 to {horizon - 1}, below the horizon')
        if self.delay < 0 or not self.waits and not self.delay <= self.stride <= horizon - self.delay:
            raise PolicyError(f'delay is {self.delay} and stride {self.stride} of horizon {horizon}; must be '
                              '0 <= delay <= stride <= horizon - delay')


@dataclass
class Episode:
    """What happened in one episode."""

    scene: Scene
    """Start and goal."""
    reached: bool
    """The tip rested at the goal in time."""
    touched: bool
    """The arm touched the pillar."""
    duration: float
    """Until reached, touched or out of time [s]."""
    tips: np.ndarray
    """Path of the tip, one row a control period [m]. Shape (N, 3)."""
    targets: np.ndarray
    """What the ensembling asked for, before the safety gate; where no chunk is followed, the command. Shape (N, 6) [rad]."""
    commands: np.ndarray
    """Commands, one row a control period [rad]. Shape (N, 6)."""
    chunks: list[tuple[float, np.ndarray]]
    """Start [s] and positions (H, 6) of every chunk that was planned."""
    arrivals: list[int]
    """Control period, a row of `commands`, from which each chunk counts that was there before the end."""
    violations: int
    """Commands outside position, velocity or acceleration limits; recomputed from the commands alone."""

    @property
    def success(self) -> bool:
        """Reached the goal in time without touching the pillar."""
        return self.reached and not self.touched


def scenes(episodes: int, seed: int, goals: str = 'narrow') -> list[Scene]:
    """Starts and goals of an evaluation, from one of the areas of goals; the same for the same seed, whatever their number."""
    return [sample_scene(np.random.default_rng([seed, i]), goals) for i in range(episodes)]


def observe(simulation: ReachAround, spec: PolicySpec, seen: Scene) -> dict[str, np.ndarray]:
    """What the policy is told now. Images went through JPEG, as between nodes, and show the goal of `seen`."""
    goal = seen.goal_at(simulation.time)
    images = {name: decode_frame(simulation.photograph(spec.features[name][:2], goal), spec.features[name], name)
              for name in spec.images}
    return {**simulation.observation(), **images}


def run_episode(simulation: ReachAround, planner: Planner, contract: Contract, scene: Scene, execution: Execution,
                seed: int, seen: Scene) -> Episode:
    """One episode from arming to its end. `seed` is that of the planner's noise; images show the goal of `seen`."""
    spec = planner.policy.spec
    blending = Blending(execution.ensembling, execution.m, max_disagreement=execution.max_disagreement)
    controller = Controller(contract, Ensembler([joint.tracking_tolerance for joint in contract.action_joints], blending,
                                                ramp=2.0 / contract.control_rate))
    order = [JOINTS.index(name) for name in contract.action.joints]  # the simulation's joints in the contract's order
    ticks_per_step = round(contract.control_rate * spec.step_period)
    simulation.reset(scene)
    planner.reset(seed)
    controller.joint_state(0.0, simulation.joint_positions[order], 0.0)
    armed, message = controller.arm(0.0)
    if not armed:
        raise PolicyError(f'the simulated arm could not be armed: {message}')
    slips = np.random.default_rng([seed, 1])
    due: deque[tuple[int, Chunk]] = deque()  # control period in which a chunk will be there
    plan_at, history, slip = 0, [], np.zeros(len(order))
    tips, targets, commands, chunks, arrivals = [], [], [], [], []
    for tick in range(10**9):
        now = tick * controller.period
        if tick % ticks_per_step == 0:
            observed = observe(simulation, spec, seen)
            history = (history or [observed] * spec.history)[1:] + [observed]
            slip = execution.action_noise * slips.standard_normal(len(order))
        if tick == plan_at:
            delay = execution.delay if chunks else 0
            there, thinking = tick + delay * ticks_per_step, delay * spec.step_period
            observation = {name: np.stack([step[name] for step in history]) for name in spec.features}
            start = now + spec.action_offset + (thinking if execution.waits else 0.0)
            if controller.mode == Mode.HOLD:
                planner.forget()  # as the node does: what continues a chunk that was refused would be refused too
            positions = planner.plan(observation, start, thinking)
            due.append((there, Chunk(start, spec.step_period, positions[followed(execution, spec.horizon)], controller.epoch,
                                     len(chunks), now)))
            chunks.append((start, positions))
            plan_at = (there if execution.waits else tick) + execution.stride * ticks_per_step
        while due and due[0][0] == tick:
            controller.add_chunk(due.popleft()[1], now)
            arrivals.append(tick)
        controller.joint_state(now, simulation.joint_positions[order], now)
        command = controller.tick(now)
        tips.append(simulation.tip)
        targets.append(command if controller.mode != Mode.POLICY else controller.blend.positions)
        commands.append(command)
        if simulation.done or controller.mode == Mode.FAULT:
            break
        sent = np.empty(len(order))
        sent[order] = command + slip
        simulation.step(sent)
    commands = np.array(commands)
    return Episode(scene, simulation.reached, simulation.touched, simulation.time, np.array(tips), np.array(targets), commands,
                   chunks, arrivals, limit_violations(contract, commands))


def followed(execution: Execution, horizon: int) -> np.ndarray:
    """The steps of a chunk as the controller gets them: who has to wait holds a target until the next chunk is there.

    A controller stops an arm whose targets run out; held for RESERVE steps more, they do not. Without delay, all steps.
    """
    last = execution.stride if execution.waits else horizon - 1
    needed = execution.stride + execution.delay + RESERVE if execution.waits or execution.delay else 0
    return np.minimum(np.arange(max(last, needed) + 1), last)


def contract_of(policy: Policy) -> Contract:
    """The robot a policy was trained for. Raises PolicyError if its checkpoint names none."""
    data = policy.extra.get('contract')
    if data is None:
        raise PolicyError('the checkpoint carries no robot contract: it was not trained on a recorded robot')
    try:
        return from_dict(Contract, data, "the checkpoint's contract")
    except ContractError as error:
        raise PolicyError(str(error)) from None


def run_episodes(policy: Policy, chosen: list[Scene], seed: int, execution: Execution,
                 progress: Callable[[float], None] = lambda fraction: None, shuffled: bool = False) -> list[Episode]:
    """One episode a scene, each with its own noise.

    shuffled: the camera shows every episode the goal of the next one; what is then reached is reached by chance.
    Raises PolicyError if the policy does not fit the task, SceneError if it wants images where none can be rendered.
    """
    contract = contract_of(policy)
    simulation = ReachAround(camera=bool(policy.spec.images))
    if shuffled and not policy.spec.images:
        raise PolicyError(f'there are no images to shuffle: the policy sees {list(policy.spec.features)}')
    known = {**{name: value.shape for name, value in simulation.observation().items()},
             **{name: contract.observations[name].shape for name in contract.cameras}}
    wrong = {name: shape for name, shape in policy.spec.features.items() if known.get(name) != tuple(shape)}
    if wrong or tuple(policy.spec.action_names) != contract.action.joints or set(contract.action.joints) != set(JOINTS):
        raise PolicyError(f'reach_around: the policy sees {dict(policy.spec.features)} and moves '
                          f'{list(policy.spec.action_names)}; the task has {known} and {list(JOINTS)}')
    execution.check(policy.spec.horizon)
    planner = Planner(policy, execution.noise, execution.tau, rtc=execution.rtc, beta=execution.beta)
    episodes = []
    for i, scene in enumerate(chosen):
        seen = chosen[(i + 1) % len(chosen)] if shuffled else scene
        episodes.append(run_episode(simulation, planner, contract, scene, execution, seed * 1_000_003 + i, seen))
        progress((i + 1) / len(chosen))
    simulation.close()
    return episodes


def evaluate_reach_around(policy: Policy, episodes: int = 100, seed: int = 1000, stride: int = 8,
                          noise: str = 'warm_start', ensembling: str = 'newest_first', m: float = 0.5,
                          progress: Callable[[float], None] = lambda fraction: None, goals: str = 'narrow',
                          shuffled: bool = False) -> dict:
    """Success of a policy on reach_around over seeded starts and goals, in lock-step. Raises PolicyError, SceneError."""
    started = time.perf_counter()
    execution = Execution(stride=stride, noise=noise, ensembling=ensembling, m=m)
    done = run_episodes(policy, scenes(episodes, seed, goals), seed, execution, progress, shuffled)
    return {
        'task': 'reach_around' if goals == 'narrow' else f'reach_around_{goals}',
        'protocol': f'{episodes} starts and goals from seed {seed}, lock-step; goal reached in time, pillar not touched'
                    + ('; the camera shows the goal of another episode' if shuffled else ''),
        'execution': asdict(execution),
        'successes': sum(episode.success for episode in done),
        'touched': sum(episode.touched for episode in done),
        'episodes': episodes,
        'limit_violations': sum(episode.violations for episode in done),
        'seed': seed,
        'policy': policy.hash,
        'wall_s': round(time.perf_counter() - started, 1),
    }
