"""Scripted demonstrators with privileged state: they plan on collision geometry, which no policy sees."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.demos.options import (
    DemonstrationOptions,
    OrnsteinUhlenbeck,
    UnreachableStartError,
    start_after_a_miss,
    widen_start,
)
from envs.demos.planner_arm import Command, Skill
from envs.demos.planner_grasping import NoGraspError
from envs.demos.planner_skills import Workcell
from envs.demos.tasks_libero import achieve_goals
from envs.demos.tasks_metaworld import packaged_commands
from envs.demos.tasks_robosuite import DEMONSTRATORS, lift

__all__ = ["ActionPair", "DemonstrationOptions", "demonstrate"]

logger = logging.getLogger(__name__)

type ActionPair = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(executed, clean): float32 [a] each, in [-1, 1]; they differ by the action noise."""


def demonstrate(
    env: Any,
    *,
    rng: np.random.Generator,
    noise: float = 0.0,
    options: DemonstrationOptions | None = None,
) -> Iterator[ActionPair]:
    """Demonstrates the task of a live environment that has just been reset.

    The caller steps the environment with each executed action before it asks for the next one. The end of
    the iteration says nothing about success: ask the environment. Where no grasp fits, or the
    arm does not reach its start, it ends.

    Args:
        env: a manipulation environment with `task` and `raw` (the simulator's own environment).
        rng: source of the action noise and of where the hand starts; owned by the caller.
        noise: stationary standard deviation of the Ornstein-Uhlenbeck action noise, in shares of full scale
            [0, 1]; slow, precise phases bear a third of it, the gripper none.
        options: everything else; None takes the defaults.

    Yields:
        (executed, clean) actions, float32 [a] in [-1, 1].

    Raises:
        ValueError: no demonstrator for this task, noise outside its range, or an option that this
            demonstrator does not have.
    """
    options = options or DemonstrationOptions()
    walk = OrnsteinUhlenbeck(noise, options.noise_correlation, rng)
    play = packaged_commands if env.task.suite.startswith("metaworld_") else _panda_commands
    for command in _until_lost(play(env, options, rng), env.task.name):
        clean = np.clip(command.action, -1.0, 1.0)
        executed = clean.copy()
        disturbed = clean[:-1] + command.noise_share * walk.step()[: len(clean) - 1]  # not the gripper
        executed[:-1] = np.clip(disturbed, -1.0, 1.0)
        yield executed.astype(np.float32), clean.astype(np.float32)


def _until_lost(commands: Iterator[Command], task: str) -> Iterator[Command]:
    try:
        yield from commands
    except (NoGraspError, UnreachableStartError) as error:
        logger.info("%s: the demonstrator gives up: %s", task, error)


def _panda_commands(env: Any, options: DemonstrationOptions, rng: np.random.Generator) -> Iterator[Command]:
    program = _program(env)
    if (any(options.detour) or options.missed_fraction) and program is not lift:
        raise ValueError(
            f"the demonstrator of {env.task.name!r} makes no detour and starts after no miss, which only "
            f"lift and lift_wide show; set detour to (0, 0) and missed_fraction to 0, got {options.detour} "
            f"and {options.missed_fraction}"
        )
    if any(options.start_spread):
        widen_start(env.raw, np.array(options.start_spread), rng)
    # Guarded, so that recordings without misses draw what they always drew.
    if options.missed_fraction and rng.random() < options.missed_fraction:
        start_after_a_miss(env.raw, Workcell.of(env.raw).scene.position("cube_main"), rng)
    meters, radians = options.detour
    cell = Workcell.of(env.raw, rng.uniform(-1.0, 1.0, 3) * [meters, meters, radians])
    for command in program(cell):
        yield command
        if not options.follow_through and env.raw._check_success():
            return
        cell.scene.refresh()


def _program(env: Any) -> Callable[[Workcell], Skill]:
    """The program of skills for the task of `env`: one for every goal in LIBERO, one a task in robosuite."""
    if env.task.suite.startswith("libero_"):
        return achieve_goals
    if env.task.name not in DEMONSTRATORS:
        raise ValueError(
            f"no demonstrator for task {env.task.name!r} of suite {env.task.suite!r}; there are "
            f"demonstrators for every libero_* and metaworld_* suite and for {sorted(DEMONSTRATORS)}"
        )
    return DEMONSTRATORS[env.task.name]
