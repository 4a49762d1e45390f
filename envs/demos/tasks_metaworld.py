"""Meta-World's demonstrators: the scripted policies of its own package."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from envs.demos.options import DemonstrationOptions
from envs.demos.planner_arm import Command
from envs.metaworld import packaged_policy

SUCCESSFUL_STEPS = (
    3  # in a row, until a recording that follows through ends; some handles spring back after 5
)


def packaged_commands(env: Any, options: DemonstrationOptions, rng: np.random.Generator) -> Iterator[Command]:
    """The commands of the packaged policy until the task is done, or to the horizon.

    Some of those policies ask for more than full scale; what they ask is clipped, as the environment does, so
    that what is recorded is what happened.

    Args:
        env: a Meta-World environment that the caller steps between commands.
        options: of the demonstration.
        rng: not needed: the policies are deterministic.

    Raises:
        ValueError: a detour, a widened start or one after a miss is asked for.
    """
    if any(options.detour) or any(options.start_spread) or options.missed_fraction:
        raise ValueError(
            "Meta-World's packaged policies make no detour and start where the simulator puts the hand; set "
            f"detour, start_spread and missed_fraction to zeros, got {options.detour}, "
            f"{options.start_spread} and {options.missed_fraction}"
        )
    policy, done = packaged_policy(env.task.name), 0
    for _ in range(env.task.horizon):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant.* may be too high")
            action = policy.get_action(env.privileged)
        yield Command(np.clip(action, -1.0, 1.0))
        done = done + 1 if env.success else 0
        if done >= (SUCCESSFUL_STEPS if options.follow_through else 1):
            return
