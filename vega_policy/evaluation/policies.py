"""What a policy must offer to be evaluated: chunks of actions for a batch of observations, nothing more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_STATE, PRETRAINED_MODEL_DIR
from lerobot.utils.import_utils import register_third_party_plugins
from torch import Tensor

from vega_policy.evaluation.env_worker import SlotObservation
from vega_policy.modeling_vega import VegaPolicy

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


_NOISE_SHAPES = {
    "smolvla": ("chunk_size", "max_action_dim"),
    "pi0": ("chunk_size", "max_action_dim"),
    "pi05": ("chunk_size", "max_action_dim"),
    "diffusion": ("horizon", None),
}
"""Policy type -> fields of its config that hold the two sizes of its noise; None is the size of an action."""

_FINGERPRINTED = ("*.json", "*.safetensors")


class LeRobotChunkPolicy:
    """A LeRobot policy with its processors; asked for whole chunks, never for its own action queue."""

    reads_frames = True

    def __init__(
        self,
        policy: PreTrainedPolicy,
        preprocessor: PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
        postprocessor: PolicyProcessorPipeline[Any, Any],
        *,
        action_steps: int | None = None,
    ) -> None:
        """Wrap a loaded policy.

        Args:
            policy: The policy, in evaluation mode, on its device.
            preprocessor: What its observations pass first.
            postprocessor: What its actions pass last; brings them into the environment's units.
            action_steps: Actions executed of each chunk; None takes the policy's own `n_action_steps`.

        Raises:
            ValueError: If the policy remembers past observations, or no `action_steps` are known or possible.
        """
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self._description = describe(policy, action_steps)
        self._noise_shape = _noise_shape(policy)
        self.reads_frames = bool(self._description.cameras)
        self._constant_features: dict[int, dict[str, Tensor]] = {}

    @property
    def description(self) -> PolicyDescription:
        """What the policy was trained on."""
        return self._description

    @property
    def noise_shape(self) -> tuple[int, int] | None:
        """Shape [t a] of its noise; None if it takes no noise, or not from outside."""
        return self._noise_shape

    def reset(self) -> None:
        """Forget everything."""
        self.policy.reset()
        self._constant_features = {}

    @torch.no_grad()
    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict actions in the environment's units; see `ChunkPolicy.chunk`."""
        inputs = self.inputs(batch)
        if batch.constant_frames and isinstance(self.policy, VegaPolicy) and self.policy.base is None:
            inputs |= self._encode_once(self.policy, inputs)
        return self.predict(inputs, noise)

    def inputs(self, batch: ObservationBatch) -> dict[str, Any]:
        """Return a batch as the policy takes it, preprocessed."""
        return self.preprocessor(to_lerobot(batch, self._description))

    @torch.no_grad()
    def predict(self, inputs: dict[str, Any], noise: np.ndarray | None) -> np.ndarray:
        """Predict actions in the environment's units, float32 [b t a], from preprocessed inputs."""
        if noise is None:
            # A policy that draws its own noise draws the same at every call: by row, not by history.
            with torch.random.fork_rng(devices=_cuda_devices()):
                torch.manual_seed(0)
                actions = self.policy.predict_action_chunk(inputs)
        else:
            start = torch.from_numpy(noise).to(self.policy.config.device)
            actions = self.policy.predict_action_chunk(inputs, noise=start)  # pyright: ignore[reportCallIssue]
        return self.postprocessor(actions).float().cpu().numpy()

    def _encode_once(self, policy: VegaPolicy, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return the features of frames that never change, for as many rows as there are."""
        rows = len(inputs["task"])
        if rows not in self._constant_features:
            observation = policy.observe(inputs)
            features = {"vega.semantic": policy.model.semantic_features(observation)}
            if policy.model.prior is not None:
                features["vega.prior"] = policy.model.prior_features(observation)
            self._constant_features[rows] = features
        return self._constant_features[rows]


def find_checkpoint(path: Path) -> Path:
    """Return the folder of a checkpoint that holds `config.json`.

    Args:
        path: A checkpoint of a training run, or its `pretrained_model` folder.

    Raises:
        FileNotFoundError: If neither holds a `config.json`; the message says where it was looked for.
    """
    for folder in (path / PRETRAINED_MODEL_DIR, path):
        if (folder / "config.json").is_file():
            return folder
    there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else "nothing"
    raise FileNotFoundError(
        f"no checkpoint at {path}: expected {PRETRAINED_MODEL_DIR}/config.json or config.json there, found "
        f"{there}; give a folder such as outputs/<run>/checkpoints/last"
    )


def checkpoint_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over all configuration and weight files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _FINGERPRINTED for path in folder.glob(pattern)):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def load_lerobot_policy(folder: Path, *, device: str, action_steps: int | None = None) -> LeRobotChunkPolicy:
    """Load a LeRobot checkpoint with its processors; the normalisation statistics travel with it.

    Args:
        folder: Folder with `config.json`, as `find_checkpoint` returns it.
        device: Torch device such as `cpu` or `cuda`.
        action_steps: Actions executed of each chunk; None takes the policy's own `n_action_steps`.

    Raises:
        ValueError: If the policy type is not registered, or the policy cannot be evaluated by chunks.
    """
    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = device
    policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
    policy.eval()
    on_device = {"device_processor": {"device": device}}
    preprocessor, postprocessor = make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides=on_device
    )
    return LeRobotChunkPolicy(policy, preprocessor, postprocessor, action_steps=action_steps)


def describe(policy: PreTrainedPolicy, action_steps: int | None) -> PolicyDescription:
    """Read from a policy's config what the policy was trained on.

    Args:
        policy: The policy.
        action_steps: Actions executed of each chunk; None takes the policy's own `n_action_steps`.

    Raises:
        ValueError: If the policy needs several past observations, or does not say how many actions to
            execute.
    """
    config, fields = policy.config, vars(policy.config)
    if config.n_obs_steps != 1:
        raise ValueError(
            f"policy {config.type!r} reads {config.n_obs_steps} past observations; this harness evaluates "
            "policies of one observation (n_obs_steps=1)"
        )
    if action_steps is None and "n_action_steps" not in fields:
        raise ValueError(f"policy {config.type!r} has no n_action_steps: set action_steps in the evaluation")
    steps = fields["n_action_steps"] if action_steps is None else action_steps
    if steps < 1:
        raise ValueError(f"expected action_steps of at least 1, got {steps}")
    state, action = config.robot_state_feature, config.action_feature
    if action is None:
        raise ValueError(f"policy {config.type!r} has no output feature {ACTION!r}")
    return PolicyDescription(
        name=config.type,
        prior=_prior_label(policy),
        cameras=tuple(config.image_features),
        state_size=None if state is None else state.shape[0],
        action_size=action.shape[0],
        action_steps=steps,
        history=_history(policy),
    )


def _history(policy: PreTrainedPolicy) -> int:
    steps = policy.config.observation_delta_indices if isinstance(policy, VegaPolicy) else None
    return 1 if steps is None else len(steps)


def _prior_label(policy: PreTrainedPolicy) -> str:
    if not isinstance(policy, VegaPolicy) or policy.model.prior is None:
        return "none"
    name = policy.config.prior.name
    return f"{name} (untrained prior)" if policy.model.prior.untrained else name


def _noise_shape(policy: PreTrainedPolicy) -> tuple[int, int] | None:
    if isinstance(policy, VegaPolicy):
        return policy.noise_shape
    config = policy.config
    if config.type not in _NOISE_SHAPES or config.action_feature is None:
        return None
    length, size = _NOISE_SHAPES[config.type]
    fields = vars(config)
    return fields[length], config.action_feature.shape[0] if size is None else fields[size]


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


def to_lerobot(batch: ObservationBatch, description: PolicyDescription) -> dict[str, Any]:
    """Return a batch as LeRobot's preprocessors expect it: frames float32 [b (t) 3 h w] in [0, 1].

    Args:
        batch: Frames uint8 [b (t) h w 3], state and instructions.
        description: What the policy reads.
    """
    inputs: dict[str, Any] = {
        camera: rearrange(torch.from_numpy(np.ascontiguousarray(pixels)), "... h w c -> ... c h w").float()
        / 255
        for camera, pixels in batch.frames.items()
    }
    if description.state_size is not None:
        inputs[OBS_STATE] = torch.from_numpy(batch.state)
    inputs["task"] = list(batch.instructions)
    return inputs
