"""What a policy must offer to be evaluated: chunks of actions for a batch of observations, nothing more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from vega_policy.evaluation.worker import SlotObservation

IMAGE_PREFIX = "observation.images."
"""LeRobot's prefix of camera keys: the environment's camera `image` is the key `observation.images.image`."""

LONE_IMAGE = "observation.image"
"""LeRobot's key of an environment's only camera."""


@dataclass(frozen=True)
class ObservationBatch:
    """What the policy sees of all slots at one tick, in LeRobot's names.

    Attributes:
        frames: Camera key -> uint8 [b h w 3], or [b t h w 3] for a policy that reads histories; empty if the
            policy reads no frames.
        state: Proprioception, float32 [b s].
        instructions: b strings.
        constant_frames: Whether the policy is shown these same frames at every call, so that it may encode
            them once.
        idle: Rows in which no episode is running; they mean nothing.
    """

    frames: dict[str, np.ndarray]
    state: np.ndarray
    instructions: list[str]
    constant_frames: bool = False
    idle: frozenset[int] = frozenset()

    def active_rows(self) -> list[int]:
        """Return the rows in which an episode is running."""
        return [row for row in range(len(self.instructions)) if row not in self.idle]

    def with_constant_frames(self, frames: dict[str, np.ndarray]) -> ObservationBatch:
        """Return the same batch with frames uint8 [b h w 3] by camera key that never change."""
        return replace(self, frames=frames, constant_frames=True)

    def row(self, index: int) -> ObservationBatch:
        """Return one row as a batch of one."""
        only = slice(index, index + 1)
        frames = {camera: pixels[only] for camera, pixels in self.frames.items()}
        return ObservationBatch(frames, self.state[only], self.instructions[only], self.constant_frames)


@dataclass(frozen=True)
class PolicyDescription:
    """What a policy was trained on, in LeRobot's names.

    Attributes:
        name: Type of the policy, such as `vega`.
        prior: Name of the prior, with "untrained" said where its weights are only seeded; `none` without one.
        cameras: Camera keys it reads.
        state_size: Number of state values it reads, or None if it reads no state.
        action_size: Number of values in an action.
        action_steps: How many actions of a chunk are executed before it is asked again.
        history: Frames of each camera that it reads, the last ones of the episode.
    """

    name: str
    prior: str
    cameras: tuple[str, ...]
    state_size: int | None
    action_size: int
    action_steps: int
    history: int = 1

    def frame_axes(self, rows: int) -> tuple[int, ...]:
        """Leading axes of a camera's frames for so many rows: [b], or [b t] where histories are read."""
        return (rows,) if self.history == 1 else (rows, self.history)


class ChunkPolicy(Protocol):
    """A policy without memory: a chunk depends on the observation, the noise and the row alone."""

    @property
    def description(self) -> PolicyDescription:
        """What the policy was trained on."""
        ...

    @property
    def noise_shape(self) -> tuple[int, int] | None:
        """Shape [t a] of the noise that one chunk starts from, or None if the policy takes none."""
        ...

    @property
    def reads_frames(self) -> bool:
        """Whether frames matter; if not, the environments render nothing."""
        ...

    def reset(self) -> None:
        """Forget everything; called once before an evaluation."""
        ...

    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict actions in the environment's units.

        Args:
            batch: Observations of b slots.
            noise: float32 [b t a] of `noise_shape`, or None if the policy takes none.

        Returns:
            float32 [b t a] with at least `action_steps` actions.
        """
        ...


class IncompatiblePolicyError(ValueError):
    """A policy and an environment do not fit; the message names what both sides have."""


def check_compatible(
    description: PolicyDescription, observation: SlotObservation, *, reads_frames: bool
) -> None:
    """Refuse a policy that an environment cannot feed, or that cannot drive it.

    Args:
        description: What the policy was trained on.
        observation: A first observation of the environment.
        reads_frames: Whether the policy is given the environment's frames.

    Raises:
        IncompatiblePolicyError: If cameras are missing, or the state or the action has another size.
    """
    offered = sorted(IMAGE_PREFIX + camera for camera in observation["frames"])
    if reads_frames and not set(description.cameras) <= set(lerobot_keys(observation["frames"])):
        raise IncompatiblePolicyError(
            f"the checkpoint reads the cameras {sorted(description.cameras)}, but the environment offers "
            f"{offered}; evaluate it in an environment with the cameras it was trained on"
        )
    state_size = observation["state"].shape[0]
    if description.state_size not in (None, state_size):
        raise IncompatiblePolicyError(
            f"the checkpoint reads a state of {description.state_size} values (observation.state), but the "
            f"environment offers {state_size}; evaluate it in an environment of the robot it was trained on"
        )
    if description.action_size != observation["action_size"]:
        raise IncompatiblePolicyError(
            f"the checkpoint predicts actions of {description.action_size} values, but the environment takes "
            f"{observation['action_size']}; evaluate it in an environment of the robot it was trained on"
        )


def lerobot_keys(cameras: Iterable[str]) -> dict[str, str]:
    """Return LeRobot's key of each camera of an environment -> its name there.

    That is `observation.images.<name>`, and `observation.image` as well for a lone one.
    """
    names = list(cameras)
    keys = {IMAGE_PREFIX + name: name for name in names}
    return keys if len(names) != 1 else {**keys, LONE_IMAGE: names[0]}


def stack_observations(rows: Sequence[SlotObservation | None], cameras: Sequence[str]) -> ObservationBatch:
    """Batch the observations of all slots; idle slots (None) become zeros, so that no row ever moves.

    Args:
        rows: Observation of each slot; at least one is not None.
        cameras: Camera keys to batch.

    Raises:
        ValueError: If every slot is idle.
    """
    sample = next((row for row in rows if row is not None), None)
    if sample is None:
        raise ValueError("expected at least one slot with an observation, got only idle ones")
    state = np.zeros((len(rows), *sample["state"].shape), np.float32)
    keys = lerobot_keys(sample["frames"])
    names = {camera: keys[camera] for camera in cameras}
    frames = {
        camera: np.zeros((len(rows), *sample["frames"][name].shape), np.uint8)
        for camera, name in names.items()
    }
    for index, row in enumerate(rows):
        if row is None:
            continue
        state[index] = row["state"]
        for camera, name in names.items():
            frames[camera][index] = row["frames"][name]
    idle = frozenset(index for index, row in enumerate(rows) if row is None)
    return ObservationBatch(frames, state, [row["instruction"] if row else "" for row in rows], idle=idle)
