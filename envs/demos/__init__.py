"""Scripted demonstrators with privileged state: they plan on collision geometry, which no policy observes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.demos.planner_arm import (
    Array,
    Command,
    Skill,
    UnreachableStartError,
    start_after_a_miss,
    widen_start,
)
from envs.demos.planner_grasping import FailedAttemptError, NoGraspError, Workcell
from envs.demos.tasks import DEMONSTRATORS, achieve_goals, lift
from envs.metaworld import packaged_policy
from envs.so101 import SUITE as SO101_SUITE
from envs.so101 import CubePicker

logger = logging.getLogger(__name__)

type ActionPair = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(executed, clean): float32 [a] each, in the action space; they differ by the action noise."""

ROTATION_NOISE = 0.3  # of the translation's: turning the hand moves the fingers through clutter sooner
METAWORLD_SUCCESSES = 3  # steps in a row that end a recording; some handles spring back after 5
SO101_ATTEMPTS = 3


@dataclass(frozen=True)
class DemonstrationOptions:
    """Options of `demonstrate`; the defaults give a plain recording to the end of the task."""

    noise_correlation: float = 0.9  # of the action noise between two control steps, in [0, 1)
    # Largest shift of the hand's start in x, y (both ways) and upwards z (m), up to 0.3.
    start_spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    # Largest error of the first approach: metres of x and y (up to 0.1), radians of yaw (up to 1). The hand
    # first goes to a wrong place above the object, then corrects itself: recordings show corrections while
    # every action stays the demonstrator's own. Lift and LiftWide only.
    detour: tuple[float, float] = (0.0, 0.0)
    # Fraction of the episodes that begin as if a grasp had just missed: the hand closed, empty, 4 to 14 cm
    # above the object's centre, up to 4 cm aside in x and in y, turned by up to 0.6 rad. Recordings then show
    # a second attempt but no miss; `start_spread` does not apply to them. Lift and LiftWide only.
    missed_fraction: float = 0.0
    # Continue until the hand has let go and retreated, or held SO-101's cube for a second; False ends at the
    # first success.
    follow_through: bool = True
    # Try failed grasps again; False gives up, so that no recording shows a failed grasp. Meta-World's
    # demonstrators do not retry.
    retries: bool = True

    def __post_init__(self) -> None:
        missed = self.missed_fraction
        if not (isinstance(missed, int | float) and not isinstance(missed, bool) and 0.0 <= missed <= 1.0):
            raise ValueError(f"missed_fraction: expected a number in [0, 1], got {missed!r}")
        if not (0.0 <= self.detour[0] <= 0.1 and 0.0 <= self.detour[1] <= 1.0):
            raise ValueError(f"detour: expected up to 0.1 m and up to 1 rad, got {self.detour}")
        if not all(0.0 <= spread <= 0.3 for spread in self.start_spread):
            raise ValueError(f"start_spread: expected [0, 0.3] m for each axis, got {self.start_spread}")


class OrnsteinUhlenbeck:
    """A mean-reverting random walk over the six pose entries of an action, in units of their full scale.

    `scale` is the stationary standard deviation of the translations, in [0, 1], and ROTATION_NOISE of it that
    of the rotations; of joint positions the first three count as translations. `correlation` is that between
    one control step and the next, in [0, 1). The first value is drawn from the stationary distribution.
    """

    def __init__(self, scale: float, correlation: float, rng: np.random.Generator) -> None:
        if not 0.0 <= scale <= 1.0:
            raise ValueError(f"action noise: expected a fraction of full scale in [0, 1], got {scale}")
        if not 0.0 <= correlation < 1.0:
            raise ValueError(f"noise correlation: expected [0, 1), got {correlation}")
        self._scales = scale * np.array([1.0, 1.0, 1.0, ROTATION_NOISE, ROTATION_NOISE, ROTATION_NOISE])
        self._correlation, self._rng = correlation, rng
        self._value = self._scales * rng.standard_normal(6)

    def step(self) -> Array:
        """Return the next value [6] of the walk."""
        fresh = np.sqrt(1.0 - self._correlation**2) * self._rng.standard_normal(6)
        self._value = self._correlation * self._value + self._scales * fresh
        return self._value


def demonstrate(
    env: Any, *, rng: np.random.Generator, noise: float = 0.0, options: DemonstrationOptions | None = None
) -> Iterator[ActionPair]:
    """Yield (executed, clean) actions that do the task of an environment that has just been reset.

    The caller steps the environment with each executed action before it takes the next one. The iteration
    ends with the task, or where no grasp fits, an attempt fails without `retries` or the arm does not reach
    its start; only the environment knows whether it succeeded. `noise` is the stationary standard deviation
    of the action noise in fractions of full scale [0, 1], for joint positions of the environment's
    `noise_unit`; precise phases bear a third of it, the gripper none.

    Raises:
        ValueError: No demonstrator for this task, noise outside its range, or an option that this
            demonstrator does not support.
    """
    options = options or DemonstrationOptions()
    walk = OrnsteinUhlenbeck(noise, options.noise_correlation, rng)
    try:
        for command in _commands(env)(env, options, rng):
            low, high = env.action_space.low, env.action_space.high
            clean = np.clip(command.action, low, high)
            disturbance = env.noise_unit * command.noise_share * walk.step()[: len(clean) - 1]
            executed = clean.copy()
            executed[:-1] = np.clip(clean[:-1] + disturbance, low[:-1], high[:-1])  # not the gripper
            yield executed.astype(np.float32), clean.astype(np.float32)
    except (NoGraspError, FailedAttemptError, UnreachableStartError) as error:
        logger.info("%s: the demonstration ends early: %s", env.task.name, error)


def _commands(env: Any) -> Callable[[Any, DemonstrationOptions, np.random.Generator], Iterator[Command]]:
    if env.task.suite == SO101_SUITE:
        return _so101_commands
    return _metaworld_commands if env.task.suite.startswith("metaworld_") else _panda_commands


def _panda_commands(env: Any, options: DemonstrationOptions, rng: np.random.Generator) -> Iterator[Command]:
    program = _program(env)
    if (any(options.detour) or options.missed_fraction) and program is not lift:
        raise ValueError(
            f"the demonstrator of {env.task.name!r} supports neither detour nor missed_fraction, only lift "
            f"and lift_wide do; set them to (0, 0) and 0, got {options.detour} and {options.missed_fraction}"
        )
    if any(options.start_spread):
        widen_start(env.raw, np.array(options.start_spread), rng)
    # The guard keeps the random draws of recordings without misses as they are.
    if options.missed_fraction and rng.random() < options.missed_fraction:
        start_after_a_miss(env.raw, Workcell.of(env.raw).scene.position("cube_main"), rng)
    meters, radians = options.detour
    cell = Workcell.of(env.raw, rng.uniform(-1.0, 1.0, 3) * [meters, meters, radians], options.retries)
    for command in program(cell):
        yield command
        if not options.follow_through and env.raw._check_success():
            return
        cell.scene.refresh()


def _program(env: Any) -> Callable[[Workcell], Skill]:
    if env.task.suite.startswith("libero_"):
        return achieve_goals
    if env.task.name not in DEMONSTRATORS:
        raise ValueError(
            f"no demonstrator for task {env.task.name!r} of suite {env.task.suite!r}; there are "
            f"demonstrators for every libero_* and metaworld_* suite, for {SO101_SUITE} and for "
            f"{sorted(DEMONSTRATORS)}"
        )
    return DEMONSTRATORS[env.task.name]


def _metaworld_commands(env: Any, options: DemonstrationOptions, _: np.random.Generator) -> Iterator[Command]:
    """Yield the commands of Meta-World's own scripted policy until the task is done, or to the horizon.

    Some of these policies exceed full scale; the commands are clipped, so that they are what is executed.
    """
    _refuse_other_starts(options, "Meta-World")
    policy, successes = packaged_policy(env.task.name), 0
    for _step in range(env.task.horizon):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant.* may be too high")
            action = policy.get_action(env.privileged)
        yield Command(np.clip(action, -1.0, 1.0))
        successes = successes + 1 if env.success else 0
        if successes >= (METAWORLD_SUCCESSES if options.follow_through else 1):
            return


def _so101_commands(env: Any, options: DemonstrationOptions, _: np.random.Generator) -> Iterator[Command]:
    """Yield the commands of SO-101's demonstrator until the lifted cube was held."""
    _refuse_other_starts(options, "SO-101")
    for action, noise_share in CubePicker(env).commands(SO101_ATTEMPTS if options.retries else 1):
        yield Command(action, noise_share)
        if env.success and not options.follow_through:
            return


def _refuse_other_starts(options: DemonstrationOptions, family: str) -> None:
    if any(options.detour) or any(options.start_spread) or options.missed_fraction:
        raise ValueError(
            f"demonstrators of {family} support no detour, start_spread or missed_fraction; set them to "
            f"zeros, got {options.detour}, {options.start_spread} and {options.missed_fraction}"
        )
