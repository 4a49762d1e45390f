"""The suites as LeRobot environments: `lerobot-eval --env.type=vega_robosuite --env.task=lift_wide`.

LeRobot imports this module through the distribution's plugin in every one of its commands, so no simulator is
imported before an environment is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

import envs
from envs.base import EVALUATION_SEED, ManipulationEnv, Observation, observation_space

CAMERAS = ("image", "image2")


@EnvConfig.register_subclass("vega_robosuite")
@dataclass
class VegaRobosuiteEnv(EnvConfig):
    """Robosuite tasks with two cameras, an 8-d state and 7-d actions.

    Attributes:
        task: A suite: one task ("lift_wide", "stack", ...) or "robosuite" for all of them.
        fps: Control steps a second.
        frame_size: Height and width of a frame in pixels.
        rendering: Profile "full" or "fast"; evaluate with the one that the demonstrations were rendered with.
    """

    task: str | None = "lift_wide"
    fps: int = 20
    frame_size: int = 256
    rendering: str = "full"
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            ACTION: ACTION,
            "agent_pos": OBS_STATE,
            **{f"pixels/{camera}": f"{OBS_IMAGES}.{camera}" for camera in CAMERAS},
        }
    )

    def __post_init__(self) -> None:
        """Derive what a policy sees from the frame size."""
        frame = PolicyFeature(type=FeatureType.VISUAL, shape=(self.frame_size, self.frame_size, 3))
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(ManipulationEnv.action_size,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(ManipulationEnv.state_size,)),
            **{f"pixels/{camera}": frame for camera in CAMERAS},
        }

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `envs.make` that all tasks share."""
        return {"frame_size": self.frame_size, "rendering": self.rendering}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """Build `{suite: {task index: vector environment}}` as LeRobot asks.

        Args:
            n_envs: Copies of each task that are stepped together.
            use_async_envs: Whether each copy runs in its own process (with one copy there is none).

        Raises:
            ValueError: If the suite does not exist; the message lists the near names.
        """
        if self.task is None:
            raise ValueError(f"--env.task is missing; choose one of {', '.join(envs.suite_names())}")
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
        space = observation_space(CAMERAS, self.frame_size, ManipulationEnv.state_size)
        actions = gymnasium.spaces.Box(-1.0, 1.0, (ManipulationEnv.action_size,))
        return _LazyAsyncVectorEnv(factories, space, actions, ManipulationEnv.metadata)


class EvaluationSeeds(gymnasium.Wrapper):
    """Counts an environment's seeds from EVALUATION_SEED.

    LeRobot's commands evaluate from seed 1000 on, which would replay episodes that demonstrators have played.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode that no demonstration has started from."""
        return self.env.reset(seed=None if seed is None else EVALUATION_SEED + seed, options=options)


def make_for_evaluation(suite: str, task_index: int, *, frame_size: int, rendering: str) -> gymnasium.Env:
    """Build an environment whose seeds are disjoint from the demonstrations'; see `envs.make`."""
    return EvaluationSeeds(envs.make(suite, task_index, frame_size=frame_size, rendering=rendering))
