"""The suites as LeRobot environments, and the options of the simulated robot.

`lerobot-eval --env.type=vega_libero --env.task=libero_spatial`, `lerobot-rollout --robot.type=vega_sim
--robot.suite=lift_wide`. LeRobot imports this module through the distribution's plugin in every one of its
commands, so no simulator is imported before an environment or a robot is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end
from lerobot.robots.config import RobotConfig
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_IMAGES, OBS_STATE

import envs
from envs import so101
from envs.base import EVALUATION_SEED, ManipulationEnv, Observation, observation_space
from envs.metaworld import MetaworldEnv


@dataclass
class VegaEnv(EnvConfig):
    """Common part of the families: two cameras, an 8-d state and 7-d actions of a Panda."""

    task: str | None = None  # a suite
    fps: int = 20  # control steps per second
    frame_size: int = 256  # height and width in pixels
    rendering: str = "full"  # or "fast"; use the one of the demonstrations
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    image_keys: ClassVar[Mapping[str, str]] = {
        f"pixels/{camera}": f"{OBS_IMAGES}.{camera}" for camera in ("image", "image2")
    }
    suites: ClassVar[tuple[str, ...]] = ()  # which no other type accepts
    state_size: ClassVar[int] = ManipulationEnv.state_size
    action_size: ClassVar[int] = ManipulationEnv.action_size
    action_limit: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        frame = PolicyFeature(type=FeatureType.VISUAL, shape=(self.frame_size, self.frame_size, 3))
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(self.action_size,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(self.state_size,)),
            **dict.fromkeys(self.image_keys, frame),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE, **self.image_keys}

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `envs.make` that all tasks share."""
        return {"frame_size": self.frame_size, "rendering": self.rendering}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """Build `{suite: {task index: vector environment}}`, the form that LeRobot expects.

        `n_envs` copies of each task are stepped together, with `use_async_envs` each in its own process (with
        one copy there is none).

        Raises:
            ValueError: If the suite does not exist, with near names, or is of another type.
        """
        if self.task is None:
            raise ValueError(f"--env.task is missing; choose one of {', '.join(envs.suite_names())}")
        owner = next((kind for kind in VegaEnv.__subclasses__() if self.task in kind.suites), type(self))
        if not isinstance(self, owner):
            raise ValueError(
                f"--env.task: expected a suite of --env.type={self.type}, got {self.task}; "
                f"choose --env.type={owner.get_choice_name(owner)}"
            )
        separate = use_async_envs and n_envs > 1
        return {
            self.task: {
                task.index: self._vector(task.suite, task.index, n_envs, separate)
                for task in envs.tasks(self.task)
            }
        }

    def _vector(self, suite: str, task_index: int, n_envs: int, separate: bool) -> Any:
        factories = [
            partial(make_for_evaluation, suite, task_index, **self.gym_kwargs) for _ in range(n_envs)
        ]
        if not separate:
            frozen = [freeze_after_episode_end(factory) for factory in factories]
            return SyncVectorEnv(frozen, autoreset_mode=AutoresetMode.NEXT_STEP)
        space = self._observation_space()
        actions = gymnasium.spaces.Box(-self.action_limit, self.action_limit, (self.action_size,))
        return _LazyAsyncVectorEnv(factories, space, actions, {"render_fps": self.fps})

    def _observation_space(self) -> gymnasium.spaces.Dict:
        cameras = tuple(name.removeprefix("pixels/") for name in self.image_keys)
        space = observation_space(cameras, self.frame_size, self.state_size)
        return SingleCameraWrapper.space(space) if "pixels" in self.image_keys else space


@EnvConfig.register_subclass("vega_robosuite")
@dataclass
class VegaRobosuiteEnv(VegaEnv):
    """robosuite tasks: one of them ("lift_wide", "stack", ...) or "robosuite" for all."""

    task: str | None = "lift_wide"

    suites: ClassVar[tuple[str, ...]] = envs.FAMILIES["envs.robosuite"]


@EnvConfig.register_subclass("vega_libero")
@dataclass
class VegaLiberoEnv(VegaEnv):
    """LIBERO and LIBERO-PRO suites, from their official initial states."""

    task: str | None = "libero_spatial"

    suites: ClassVar[tuple[str, ...]] = envs.FAMILIES["envs.libero"]


@EnvConfig.register_subclass("vega_metaworld")
@dataclass
class VegaMetaworldEnv(VegaEnv):
    """Meta-World suites: one camera, a 4-d state and 4-d actions, under LeRobot's keys."""

    task: str | None = "metaworld_mt10"
    fps: int = 80

    suites: ClassVar[tuple[str, ...]] = envs.FAMILIES["envs.metaworld"]
    image_keys: ClassVar[Mapping[str, str]] = {"pixels": OBS_IMAGE}
    state_size: ClassVar[int] = MetaworldEnv.state_size
    action_size: ClassVar[int] = MetaworldEnv.action_size


@EnvConfig.register_subclass("vega_so101")
@dataclass
class VegaSO101Env(VegaEnv):
    """SO-101: one camera `front`, state and actions the six joints' positions in LeRobot's units."""

    task: str | None = so101.SUITE

    suites: ClassVar[tuple[str, ...]] = envs.FAMILIES["envs.so101"]
    image_keys: ClassVar[Mapping[str, str]] = {f"pixels/{so101.CAMERA}": f"{OBS_IMAGES}.{so101.CAMERA}"}
    state_size: ClassVar[int] = so101.SO101Env.state_size
    action_size: ClassVar[int] = so101.SO101Env.action_size
    action_limit: ClassVar[float] = np.inf  # that of the joints is the package's


class EvaluationSeeds(gymnasium.Wrapper):
    """Counts an environment's seeds from EVALUATION_SEED and starts from official states where there are any.

    LeRobot's commands evaluate from seed 1000 on, which would repeat episodes of demonstrations. Seed k
    starts from official state k modulo their number (50).
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an evaluation episode."""
        task = self.unwrapped.task  # pyright: ignore[reportAttributeAccessIssue]
        if task.official_states and "initial_state" not in (options or {}):
            if seed is None:
                seed = int(self.np_random.integers(2**31))
            options = {**(options or {}), "initial_state": seed % task.official_states}
        return self.env.reset(seed=None if seed is None else EVALUATION_SEED + seed, options=options)


class SingleCameraWrapper(gymnasium.ObservationWrapper):
    """Gives the only camera's image, `image`, itself as "pixels", which LeRobot calls `observation.image`."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.observation_space = self.space(env.observation_space)

    @staticmethod
    def space(space: gymnasium.Space) -> gymnasium.spaces.Dict:
        """Return the space of observations with a single image."""
        parts = dict(cast(gymnasium.spaces.Dict, space))
        (parts["pixels"],) = cast(gymnasium.spaces.Dict, parts["pixels"]).values()
        return gymnasium.spaces.Dict(parts)

    def observation(self, observation: Observation) -> Observation:
        """Take the image out of its dictionary."""
        (image,) = observation["pixels"].values()
        return {**observation, "pixels": image}


def make_for_evaluation(suite: str, task_index: int, *, frame_size: int, rendering: str) -> gymnasium.Env:
    """Build an environment whose seeds are disjoint from the demonstrations'; see `envs.make`."""
    env = envs.make(suite, task_index, frame_size=frame_size, rendering=rendering)
    return EvaluationSeeds(SingleCameraWrapper(env) if env.cameras == ("image",) else env)


@RobotConfig.register_subclass("vega_sim")
@dataclass(kw_only=True)
class VegaSimConfig(RobotConfig):
    """A task of `envs` that runs on the wall clock, whether or not a policy keeps up."""

    suite: str = "lift_wide"
    task_index: int = 0
    frame_size: int = 128  # height and width in pixels
    rendering: str = "fast"  # or "full"; use the one of the policy's training data
    seed: int = 0  # episode i of seed k starts as in an evaluation with that seed: 1000000 + 10000 k + i
    # The first i. A new scene is created when the robot is sent back to its start, as LeRobot does at the end
    # of an episode and of a rollout, never while a policy runs.
    first_episode: int = 0
    latency_steps: int = 0  # steps by which observations are late, to imitate a slower robot
    log_file: Path | None = None  # JSON lines, one per episode or event; None logs to the console only
