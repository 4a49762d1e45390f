"""Interface of an evaluated policy (a chunk of actions a batch of observations) and its LeRobot adapter."""

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
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.import_utils import register_third_party_plugins
from torch import Tensor

from vega_policy.checkpoints import check_checkpoint
from vega_policy.evaluation.env_worker import EnvObservation
from vega_policy.modeling_vega import VegaPolicy

IMAGE_PREFIX = "observation.images."
"""LeRobot's prefix of camera keys: the environment's camera `image` is the key `observation.images.image`."""

SINGLE_IMAGE = "observation.image"
"""LeRobot's key of an environment's only camera."""


@dataclass(frozen=True)
class ObservationBatch:
    """Observations of all environments at one tick, under LeRobot's keys."""

    frames: dict[str, np.ndarray]  # camera key -> uint8 [b (t) h w 3], t with a history; may be empty
    state: np.ndarray  # proprioception, float32 [b s]
    instructions: list[str]  # b
    constant_frames: bool = False  # the frames are the same at every call, so that they may be encoded once
    idle: frozenset[int] = frozenset()  # rows without a running episode; their values are undefined

    def active_rows(self) -> list[int]:
        """Return the rows in which an episode is running."""
        return [row for row in range(len(self.instructions)) if row not in self.idle]

    def with_constant_frames(self, frames: dict[str, np.ndarray]) -> ObservationBatch:
        """Return the same batch with frames, uint8 [b h w 3] by camera key, that never change."""
        return replace(self, frames=frames, constant_frames=True)

    def row(self, index: int) -> ObservationBatch:
        """Return one row as a batch of one."""
        only = slice(index, index + 1)
        frames = {camera: pixels[only] for camera, pixels in self.frames.items()}
        return ObservationBatch(frames, self.state[only], self.instructions[only], self.constant_frames)


@dataclass(frozen=True)
class PolicyDescription:
    """What a policy was trained on, under LeRobot's keys."""

    name: str  # type of the policy, such as `vega`
    prior: str  # name of the prior, marked if its weights are untrained; `none` without one
    cameras: tuple[str, ...]  # camera keys that it reads
    state_size: int | None  # None if it reads no state
    action_size: int
    action_steps: int  # actions of a chunk that are executed before the next one is predicted
    history: int = 1  # frames of each camera that it reads, the last ones of the episode

    def frame_axes(self, rows: int) -> tuple[int, ...]:
        """Return the leading axes of a camera's frames: [b], or [b t] with a history."""
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
        """Whether the policy reads frames; if not, the environments render nothing."""
        ...

    def reset(self, instructions: Sequence[str] = ()) -> None:
        """Forget everything; called once before an evaluation, with the instructions of its suite.

        Where a network pads text to the longest of a batch, it has to pad to the longest of these instead:
        else a chunk would depend on the other rows.
        """
        ...

    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict actions in the environment's units for observations of b environments, float32 [b t a].

        t is at least `action_steps`. The noise is float32 [b t a] of `noise_shape`, or None if the policy
        takes none.
        """
        ...


class IncompatiblePolicyError(ValueError):
    """A policy and an environment do not fit; the message names what both sides have."""


def check_compatible(
    description: PolicyDescription, observation: EnvObservation, *, reads_frames: bool
) -> None:
    """Refuse a policy that an environment has not the inputs for, or that has other actions.

    Raises:
        IncompatiblePolicyError: If cameras are missing, or the state or the action has another size.
    """
    frames = observation["frames"]
    if reads_frames and not set(description.cameras) <= set(lerobot_keys(frames)):
        raise IncompatiblePolicyError(
            f"the checkpoint reads the cameras {sorted(description.cameras)}, but the environment offers "
            f"{sorted(IMAGE_PREFIX + camera for camera in frames)}; evaluate it in an environment with the "
            "cameras it was trained on"
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
    """Return the name of each camera by LeRobot's key: `observation.images.<name>`.

    A single camera is `observation.image` as well.
    """
    names = list(cameras)
    keys = {IMAGE_PREFIX + name: name for name in names}
    return keys if len(names) != 1 else {**keys, SINGLE_IMAGE: names[0]}


def stack_observations(rows: Sequence[EnvObservation | None], cameras: Sequence[str]) -> ObservationBatch:
    """Batch the cameras of all environments; idle ones (None) become zeros, so that no row ever moves.

    Raises:
        ValueError: If every environment is idle.
    """
    sample = next((row for row in rows if row is not None), None)
    if sample is None:
        raise ValueError("expected at least one environment with an observation, got only idle ones")
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


def to_lerobot(
    batch: ObservationBatch, description: PolicyDescription, *, keep_uint8: bool = False
) -> dict[str, Any]:
    """Return a batch as LeRobot's preprocessors expect it.

    Frames become [b (t) 3 h w], float32 in [0, 1], or uint8 for a policy that converts them in its encoders.
    """
    inputs: dict[str, Any] = {}
    for camera, pixels in batch.frames.items():
        frames = rearrange(torch.from_numpy(np.ascontiguousarray(pixels)), "... h w c -> ... c h w")
        inputs[camera] = frames if keep_uint8 else frames.float() / 255
    if description.state_size is not None:
        inputs[OBS_STATE] = torch.from_numpy(batch.state)
    inputs["task"] = list(batch.instructions)
    return inputs


def checkpoint_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over all configuration and weight files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def choose_device(device: str | None) -> str:
    """Return a torch device; None takes a GPU if there is one, else the CPU.

    Raises:
        ValueError: If torch knows no such device, or has none here.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter by a torch that was built without CUDA
        raise ValueError(
            f"device: expected null, cpu, cuda or another device that torch has here; got {device!r}."
        ) from error
    return device


def load_lerobot_policy(folder: Path, *, device: str, action_steps: int | None = None) -> LeRobotChunkPolicy:
    """Load a LeRobot checkpoint with its processors, which hold the normalisation statistics.

    `action_steps` of each chunk are executed; None takes the policy's own `n_action_steps`. The folder is one
    of `find_checkpoint`.

    Raises:
        ValueError: If the policy type is not registered, or the policy cannot be evaluated by chunks.
        DamagedCheckpointError: If its files are not those that its checksums list.
        UnsafeCheckpointError: If its configuration names code.
    """
    register_third_party_plugins()
    check_checkpoint(folder)
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = device
    policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
    policy.eval()
    on_device = {"device_processor": {"device": device}}
    preprocessor, postprocessor = make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides=on_device
    )
    return LeRobotChunkPolicy(policy, preprocessor, postprocessor, action_steps=action_steps)


class LeRobotChunkPolicy:
    """A LeRobot policy with its processors; it predicts whole chunks and never uses its own action queue."""

    def __init__(
        self,
        policy: PreTrainedPolicy,
        preprocessor: PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
        postprocessor: PolicyProcessorPipeline[Any, Any],
        *,
        action_steps: int | None = None,
    ) -> None:
        """Wrap a policy that is in evaluation mode and on its device; see `load_lerobot_policy`.

        The postprocessor brings actions into the environment's units.

        Raises:
            ValueError: See `describe`.
        """
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self.description = describe(policy, action_steps)
        self.noise_shape = _noise_shape(policy)
        self.reads_frames = bool(self.description.cameras)
        # A pre-trained base has processors of its own, which expect floats as all of LeRobot's do.
        self._vega = policy if isinstance(policy, VegaPolicy) and policy.base is None else None
        self._constant_features: dict[int, dict[str, Tensor]] = {}  # by number of rows

    def reset(self, instructions: Sequence[str] = ()) -> None:
        """Forget everything; see `ChunkPolicy.reset`."""
        self.policy.reset()
        self._constant_features = {}
        if self._vega is not None:
            self._vega.model.backbone.pad_instructions(list(instructions))
        for step in self.preprocessor.steps if instructions else ():
            if getattr(step, "padding", None) == "longest":  # LeRobot's tokenizer
                step.padding = "max_length"  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict actions in the environment's units; see `ChunkPolicy.chunk`."""
        inputs = self.inputs(batch)
        if batch.constant_frames and self._vega is not None:
            inputs |= self._encode_once(self._vega, inputs)
        return self.predict(inputs, noise)

    def inputs(self, batch: ObservationBatch) -> dict[str, Any]:
        """Return a preprocessed batch."""
        return self.preprocessor(to_lerobot(batch, self.description, keep_uint8=self._vega is not None))

    @torch.no_grad()
    def predict(self, inputs: dict[str, Any], noise: np.ndarray | None) -> np.ndarray:
        """Predict actions in the environment's units, float32 [b t a], from preprocessed inputs."""
        if noise is None:
            # A policy that samples its own noise samples the same at every call: by row, not by history.
            devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices=list(devices)):
                torch.manual_seed(0)
                actions = self.policy.predict_action_chunk(inputs)
        else:
            start = torch.from_numpy(noise).to(self.policy.config.device)
            actions = self.policy.predict_action_chunk(inputs, noise=start)  # pyright: ignore[reportCallIssue]
        return self.postprocessor(actions).float().cpu().numpy()

    def _encode_once(self, policy: VegaPolicy, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return the features of frames that never change."""
        rows = len(inputs["task"])
        if rows not in self._constant_features:
            observation = policy.observe(inputs)
            features = {"vega.semantic": policy.model.semantic_features(observation)}
            if policy.model.prior is not None:
                features["vega.prior"] = policy.model.prior_features(observation)
            self._constant_features[rows] = features
        return self._constant_features[rows]


def describe(policy: PreTrainedPolicy, action_steps: int | None) -> PolicyDescription:
    """Return what a policy was trained on, from its config.

    Raises:
        ValueError: If the policy reads several past observations, or the number of actions to execute is
            unknown or below 1.
    """
    config, fields = policy.config, vars(policy.config)
    if config.n_obs_steps != 1:
        raise ValueError(
            f"policy {config.type!r} reads {config.n_obs_steps} past observations; expected a policy of one "
            "observation (n_obs_steps=1)"
        )
    steps = fields.get("n_action_steps") if action_steps is None else action_steps
    if steps is None:
        raise ValueError(f"policy {config.type!r} has no n_action_steps: set action_steps in the evaluation")
    if steps < 1:
        raise ValueError(f"expected action_steps of at least 1, got {steps}")
    state, action = config.robot_state_feature, config.action_feature
    if action is None:
        raise ValueError(f"policy {config.type!r} has no output feature {ACTION!r}")
    prior, history = "none", None
    if isinstance(policy, VegaPolicy):
        history = policy.config.observation_delta_indices
        if policy.model.prior is not None:
            untrained = " (untrained prior)" if policy.model.prior.untrained else ""
            prior = policy.config.prior.name + untrained
    return PolicyDescription(
        name=config.type,
        prior=prior,
        cameras=tuple(config.image_features),
        state_size=None if state is None else state.shape[0],
        action_size=action.shape[0],
        action_steps=steps,
        history=1 if history is None else len(history),
    )


_NOISE_SHAPES = {
    "smolvla": ("chunk_size", "max_action_dim"),
    "pi0": ("chunk_size", "max_action_dim"),
    "pi05": ("chunk_size", "max_action_dim"),
    "diffusion": ("horizon", None),
}
"""Policy type -> fields of its config with the two sizes of its noise; None is the size of an action."""


def _noise_shape(policy: PreTrainedPolicy) -> tuple[int, int] | None:
    if isinstance(policy, VegaPolicy):
        return policy.noise_shape
    config = policy.config
    if config.type not in _NOISE_SHAPES or config.action_feature is None:
        return None
    length, size = _NOISE_SHAPES[config.type]
    fields = vars(config)
    return fields[length], config.action_feature.shape[0] if size is None else fields[size]
