"""One demonstration: played without pictures, and rendered from its simulator states if it succeeded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from envs.base import ManipulationEnv
from envs.demonstrators import DemonstrationOptions, demonstrate

DEMONSTRATOR_STREAM = 1  # keeps a demonstrator's draws apart from the reset's, which use the bare seed


@dataclass(frozen=True)
class Demonstrator:
    """How demonstrators play.

    Attributes:
        noise: Strength of the action noise in shares of full scale; the clean action is recorded.
        noisy_share: Share of the episodes that are played with noise, in [0, 1].
        options: Everything else (see `envs.demonstrators.options`).
    """

    noise: float = 0.0
    noisy_share: float = 1.0
    options: DemonstrationOptions = field(default_factory=DemonstrationOptions)

    def __post_init__(self) -> None:
        """Refuse shares outside their range.

        Raises:
            ValueError: If a share is not in [0, 1].
        """
        for name in ("noise", "noisy_share"):
            value = vars(self)[name]
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"demonstrator.{name} is a share: expected [0, 1], got {value}")


@dataclass(frozen=True)
class Recording:
    """A successful demonstration as physics.

    Attributes:
        seed: Seed of the episode.
        states: Simulator state before each action, float64 [t n].
        actions: Clean actions, float32 [t a] in [-1, 1].
        attempts: Episodes played to get it, itself included.
    """

    seed: int
    states: np.ndarray
    actions: np.ndarray
    attempts: int = 1


def record(
    env: ManipulationEnv, seed: int, demonstrator: Demonstrator, *, initial_state: int | None = None
) -> Recording | None:
    """Play one episode without rendering.

    Args:
        env: Environment, in any condition.
        seed: Decides the whole episode: start, noise, outcome.
        demonstrator: How it is played.
        initial_state: Official initial state, to measure a demonstrator; never for training data.

    Returns:
        The recording, or None unless the simulator's own check calls the last step a success.
    """
    rng = np.random.default_rng((seed, DEMONSTRATOR_STREAM))
    noise = demonstrator.noise if rng.random() < demonstrator.noisy_share else 0.0
    env.reset_blindly(seed=seed, options=None if initial_state is None else {"initial_state": initial_state})
    states, actions, success = [], [], False
    for executed, clean in demonstrate(env, rng=rng, noise=noise, options=demonstrator.options):
        states.append(env.simulator_state())  # after the first action is asked for: the start may be widened
        actions.append(clean)
        success, truncated = env.step_blindly(executed)
        if truncated:
            break
    if not success:
        return None
    return Recording(seed, np.stack(states), np.stack(actions).astype(np.float32))


def dataset_frames(env: ManipulationEnv, recording: Recording) -> Iterator[dict[str, Any]]:
    """Render a recording, frame by frame, under LeRobot's keys.

    Args:
        env: Environment of the recording's task, with cameras.
        recording: What was played.

    Yields:
        What `LeRobotDataset.add_frame` takes.
    """
    for state, action in zip(recording.states, recording.actions, strict=True):
        env.restore(state)
        observation = env.observe()
        pixels: Mapping[str, np.ndarray] = observation["pixels"]
        yield {
            **{image_key(env, camera): frame for camera, frame in pixels.items()},
            "observation.state": observation["agent_pos"],
            "action": action,
            "task": env.task_description,
        }


def dataset_features(env: ManipulationEnv) -> dict[str, dict[str, Any]]:
    """Describe those frames as `LeRobotDataset.create` asks."""
    size = env.frame_size
    frame = {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    return {
        **{image_key(env, camera): dict(frame) for camera in env.cameras},
        "observation.state": {"dtype": "float32", "shape": (env.state_size,), "names": None},
        "action": {"dtype": "float32", "shape": (env.action_size,), "names": None},
    }


def image_key(env: ManipulationEnv, camera: str) -> str:
    """Return LeRobot's key of a camera; an environment's only camera is `observation.image`."""
    return "observation.image" if len(env.cameras) == 1 else f"observation.images.{camera}"
