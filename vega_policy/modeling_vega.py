"""VegaPolicy: LeRobot's policy contract around `VegaModel`; the method is in `model/vega.py`."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from vega_policy.checkpoints import fetch_checkpoint, write_checksums
from vega_policy.configuration_vega import VegaConfig
from vega_policy.model.compilation import CapturedSteps
from vega_policy.model.fusion import gate_weights
from vega_policy.model.observation import Observation, stack_views
from vega_policy.model.rtc import RTCQueueAdapter
from vega_policy.model.vega import Displacement, FutureFrames, VegaModel, load_weights
from vega_policy.priors import resolve


class VegaPolicy(PreTrainedPolicy):
    """Vision-language-action policy with VEGA-3D as its observation encoder.

    Batches are LeRobot's; see `observe`. In training they also hold `action` [b t a] and, if there is
    padding, `action_is_pad` [b t]. In the configuration, open prior fields are resolved and fingerprints are
    filled in; of `dataset_meta`, LeRobot's metadata of the training data, it keeps the rate. LeRobot's other
    arguments are not used: the processors hold the statistics.

    Raises:
        ValueError: If the features or the configuration of a part cannot work.
        FileNotFoundError: If the prior's weights are missing.
    """

    config_class = VegaConfig  # pyright: ignore[reportAssignmentType]
    name = "vega"  # pyright: ignore[reportAssignmentType]
    config: VegaConfig

    def __init__(
        self, config: VegaConfig, dataset_stats: Any = None, dataset_meta: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(config)
        if dataset_meta is not None:
            config.dataset_fps = dataset_meta.fps
            config.set_dataset_rendering(Path(dataset_meta.root))
        self.model: Any
        if config.base.name == "none":
            self.model = VegaModel(config.model)
        else:
            # imports LeRobot's other policies, which is slow
            from vega_policy.backbones import pretrained_vla

            config.validate_features()
            self.model = pretrained_vla.BasedModel(config)
            config.base = pretrained_vla.with_fingerprint(config.base, self.model.fingerprint)
        prior = self.model.prior
        if prior is not None:
            config.prior = dataclasses.replace(resolve(config.prior), fingerprint=prior.fingerprint)
        self._queue: deque[Tensor] = deque()
        self._is_moving = False  # a chunk of this episode has been executed
        self._history: dict[str, deque[Tensor]] = {}
        self.captured_steps = CapturedSteps(config.capture)
        self.rtc_processor: RTCProcessor | None = None
        self._rtc_queue: RTCQueueAdapter | None = None

    @property
    def base(self) -> Any:
        """The pre-trained policy that this one builds upon; None without one."""
        return None if self.config.base.name == "none" else self.model.base

    # Training

    def get_optim_params(self) -> Iterable[Any]:
        """Return the parameter groups of everything that learns."""
        return parameter_groups(self, self.config.optimizer_lr, self.config.fusion.gate_lr_scale)

    def forward(
        self,
        batch: dict[str, Any],
        reduction: str = "mean",
        noise: Tensor | None = None,
        time: Tensor | None = None,
        *,
        metrics_as_tensors: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the training loss of a normalised batch with actions, and metrics.

        With `reduction="none"` it is one loss a sample [b]. Noise [b t a] and time [b] are those of
        `sample_noise_and_time`; None samples them from torch's default generator. Metrics are `loss`, with a
        gate its mean `gate` (weight of the semantic stream) over all views and per view, `gate/<camera>`, and
        in training the losses of auxiliary heads, `forecast` and `displacement` (m); `metrics_as_tensors`
        leaves them on the device.
        """
        if self.base is not None:
            loss, metrics = self.base(batch, reduction=reduction)
        else:
            if noise is None and time is None:
                noise, time = self.sample_noise_and_time(batch[ACTION])
            losses = self.model.loss(
                self.observe(batch),
                batch[ACTION],
                batch.get("action_is_pad"),
                noise,
                time,
                self._prior_generator(),
                self._future(batch),
                self._displacement(batch),
                self._prefix(batch),
            )
            mean = losses.mean()
            loss, metrics = mean if reduction == "mean" else losses, {"loss": mean.detach()}
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        scalars = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        scalars |= self._gates()
        if self.base is None and self.training:
            scalars |= self.model.errors
        if scalars and not metrics_as_tensors:
            values = torch.stack([value.float() for value in scalars.values()]).tolist()
            scalars = dict(zip(scalars, values, strict=True))
        return loss, numbers | scalars

    def _future(self, batch: dict[str, Any]) -> FutureFrames | None:
        """Return the later frames of a batch of a cache, None without a forecast."""
        if "vega.future_is_pad" not in batch:
            return None
        forms = {name: batch.get(f"vega.future_{name}") for name in ("frames", "semantic")}
        return FutureFrames(batch["vega.future_is_pad"], **forms)

    def _displacement(self, batch: dict[str, Any]) -> Displacement | None:
        """Return the displacement of a batch's target, None without."""
        if "vega.displacement" not in batch:
            return None
        return Displacement(batch["vega.displacement"], batch.get("vega.displacement_noise"))

    def _prefix(self, batch: dict[str, Any]) -> Tensor | None:
        """Return the executed actions [b t a] of a batch, None where a prefix holds the clean ones."""
        if self.config.head.prefix_actions == "clean":
            return None
        if "vega.executed_action" not in batch:
            raise ValueError(
                "head.prefix_actions=executed needs vega.executed_action [b t a] in a batch: train with "
                "vega-train, on a dataset with the feature executed_action."
            )
        return batch["vega.executed_action"]

    @torch.no_grad()
    def with_prior_features(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with `vega.prior`, the prior's features that `forward` would compute itself.

        The same random numbers are drawn. Features that the batch holds stay, and a base computes its own.
        """
        if self.base is not None or self.model.prior is None or "vega.prior" in batch:
            return batch
        features = self.model.prior_features(self.observe(batch), self._prior_generator())
        return batch | {"vega.prior": features}

    def _prior_generator(self) -> torch.Generator | None:
        """Return the generator of the prior's noise; None stands for its fixed noise."""
        is_fresh = self.training and self.config.prior.noise == "fresh"
        return torch.default_generator if is_fresh else None

    def sample_noise_and_time(
        self, actions: Tensor, generator: torch.Generator | None = None, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sample noise [b t a] and time [b] or [b t] for the loss of actions [b t a]; see `ActionHead`.

        Both are None for an L1 head without a prefix, and for a base, which samples its own.
        """
        if self.base is not None:
            return None, None
        return self.model.head.sample_noise_and_time(actions, generator, rank, world_size)

    def _gates(self) -> dict[str, Tensor]:
        """Return the mean of the last gate over all views and per view; empty without a gate.

        A base embeds one view after the other, so its gate is that of the last view.
        """
        if self.model.gate is None:
            return {}
        if self.base is not None:
            return {"gate": self.model.gate.float().mean()}
        cameras = [key.rpartition(".")[-1] for key in self.config.image_features]
        means = self.model.gate.float().unflatten(0, (-1, len(cameras))).mean(dim=(0, 2, 3))
        per_view = zip(cameras, means.unbind(), strict=True)
        return {"gate": means.mean()} | {f"gate/{camera}": mean for camera, mean in per_view}

    # Inference

    def reset(self) -> None:
        """Begin a new episode: clear the action queue and the history of frames."""
        self._queue.clear()
        self._is_moving = False
        self._history.clear()
        if self.base is not None:
            self.base.reset()
        if self._rtc_queue is not None:
            self._rtc_queue.reset()

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the next normalised action [b a]; predict a chunk every `n_action_steps` calls.

        Each chunk but the first of an episode begins after `latency_steps` actions, which are under way. With
        `prior.clip=history` it keeps the frames of the last calls: call it once per control step.
        """
        if self.config.use_relative_actions and self.config.n_action_steps > 1:
            raise ValueError(
                "select_action: actions relative to the start of a chunk need whole chunks, and LeRobot's "
                "post-processor would add the present state to each. Set n_action_steps=1, or evaluate with "
                "vega-eval, which post-processes chunks."
            )
        batch = self.remember(batch)
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise=noise, **kwargs)
            first = self.config.latency_steps if self._is_moving else 0
            self._queue.extend(chunk[:, first : first + self.config.n_action_steps].unbind(dim=1))
            self._is_moving = True
        return self._queue.popleft()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None, **rtc: Any) -> Tensor:
        """Return a chunk of normalised actions [b t a] for a normalised batch without actions.

        The flow starts from `noise` [b t a]: equal noise, equal chunk; None samples it. `rtc` are arguments
        of LeRobot's real-time chunking (`inference_delay`, `prev_chunk_left_over`, `execution_horizon`),
        without effect unless `use_rtc` was called or the head was trained for delay (`head.prefix_steps`).
        """
        if self.base is None:
            predict = partial(self._predict, batch, noise)
        else:
            predict = partial(self.base.predict_action_chunk, batch, noise=noise)
        queue = self._rtc_queue if "inference_delay" in rtc else None
        return predict(**rtc) if queue is None else queue.answer(predict, **rtc)

    def _predict(self, batch: dict[str, Any], noise: Tensor | None, **rtc: Any) -> Tensor:
        observation = self.observe(batch)
        noise = torch.randn(len(observation.state), *self.noise_shape) if noise is None else noise
        noise, processor = noise.to(observation.state), self.rtc_processor
        left: Tensor | None = rtc.pop("prev_chunk_left_over", None)  # [t a] or [1 t a]
        if left is not None and not left.numel():
            left = None
        known = min(rtc.get("inference_delay", 0), self.config.head.prefix_steps)
        if left is not None and known > 0:  # trained for delay
            prefix = left.reshape(1, -1, left.shape[-1])[:, :known].to(noise)
            return self.model.sample_actions(observation, noise, _integrate, prefix)
        # A policy that was trained for delay begins freely where nothing is under way, as in training.
        if processor is None or left is None or self.config.head.prefix_steps:
            uncaptured = partial(self.model.sample_actions, integrate=_integrate)
            return self.captured_steps.sample_actions(self.model, observation, noise, uncaptured)
        left = left.reshape(1, -1, left.shape[-1])[:, : self.config.chunk_size]
        if self.config.head.name != "flow":
            return _blend(processor, self.model.sample_actions(observation, noise), left, **rtc)
        guidance = {"prev_chunk_left_over": left, "rtc_processor": processor, "rtc_enabled": True}
        return self.model.sample_actions(observation, noise, partial(_integrate, **rtc, **guidance))

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape [t a] of the noise that a chunk starts from."""
        width = self.model.config.action_dim if self.base is None else self.model.noise_width
        return self.config.chunk_size, width

    def observe(self, batch: dict[str, Any]) -> Observation:
        """Return the observation of a normalised LeRobot batch.

        It holds frames [b 3 h w] or [b t 3 h w], uint8 or in [0, 1], under the camera keys;
        `observation.state` [b s] or [b t s], of which the last is read; `task`, a sentence or b of them.
        Frames may be replaced by cached ones, `vega.frames` uint8 [b v 3 h w], or by features,
        `vega.semantic` [b v c gh gw] and `vega.prior` [b v d gh gw]; the task by `vega.words`, encoded text.
        """
        config = self.config
        semantic, prior, cached = (batch.get(f"vega.{name}") for name in ("semantic", "prior", "frames"))
        is_encoded = semantic is not None and (config.prior.name == "none" or prior is not None)
        cameras = [] if is_encoded or cached is not None else list(config.image_features)
        missing = [key for key in (*cameras, OBS_STATE) if key not in batch]
        if missing:
            held = sorted(key for key in batch if key.startswith("observation"))
            raise ValueError(f"The batch lacks {missing}; it holds {held}. Rename the keys to match.")
        if cached is not None and cached.dtype != torch.uint8:
            raise TypeError(f"vega.frames: expected uint8 frames of a cache, got {cached.dtype}.")
        frames = None if cached is None else cached[:, :, None]
        if cameras:
            frames = stack_views({key: batch[key] for key in cameras}, config.frame_size, config.resize)
        state = batch[OBS_STATE]
        state = state[:, -1] if state.ndim == 3 else state
        task = batch.get("task")
        if task is None:
            if "vega.words" not in batch:
                raise ValueError(
                    "The batch has no 'task': expected an instruction, or one for each row. Give task='' to "
                    "a policy that was trained without."
                )
            task = ""
        instruction = [task] * len(state) if isinstance(task, str) else list(task)
        return Observation(frames, state, instruction, semantic, prior, batch.get("vega.words"))

    def remember(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Replace each camera's frame [b 3 h w] by the last `clip_frames` frames, [b t 3 h w].

        Before there are enough, the first frame is repeated, as in LeRobot's dataset at the start of an
        episode. Without `prior.clip=history` the batch is returned as it is.
        """
        if self.config.prior.clip != "history":
            return batch
        length = self.config.prior.clip_frames
        clips = {}
        for key in (key for key in self.config.image_features if key in batch):
            history = self._history.setdefault(key, deque([batch[key]] * length, maxlen=length))
            history.append(batch[key])
            clips[key] = torch.stack(tuple(history), dim=1)
        return batch | clips

    # Real-time chunking

    def supports_rtc(self) -> bool:
        """Return whether real-time chunking works: for a base, if it does there; else without history.

        A rollout requests chunks at any time, not once per step, so a history would have gaps.
        """
        return self.config.prior.clip != "history" if self.base is None else self.base.supports_rtc()

    def use_rtc(self, config: RTCConfig | None) -> None:
        """Let chunks continue what remains of the last one, as `config` says; None turns that off.

        A head that was trained for delay continues the actions under way as a clean prefix. Otherwise a flow
        is guided step by step (Black et al., arXiv 2506.07339), the chunk of an L1 head is blended with the
        remaining actions, and a base does it its own way. The caller joins chunks by the number of
        executed actions.

        Raises:
            ValueError: If this policy cannot (see `supports_rtc`).
        """
        self._rtc_queue = None
        if config is not None and config.enabled and not self.supports_rtc():
            raise ValueError(
                f"real-time chunking needs prior.clip=frame or views and a base that supports it; got clip="
                f"{self.config.prior.clip} and base={self.config.base.name}. Use sync inference."
            )
        if self.base is not None:
            self.base.config.rtc_config = config
            self.base.init_rtc_processor()
        else:
            self.rtc_processor = RTCProcessor(config) if config is not None and config.enabled else None

    def init_rtc_processor(self) -> None:
        """Turn on real-time chunking for LeRobot's rollout, which has set `config.rtc_config`.

        The rollout would join chunks by the clock; see `RTCQueueAdapter`.
        """
        shared = self.config.rtc_config  # with the rollout's queue
        self.use_rtc(None if shared is None else dataclasses.replace(shared))
        if shared is not None and shared.enabled:
            self._rtc_queue = RTCQueueAdapter(self.config.n_action_steps, self.config.latency_steps)
            shared.enabled = False

    # Captured control steps: their graphs hold the addresses of the weights

    def train(self, mode: bool = True) -> Self:
        """Set the mode and drop captured steps: the text encoder, whose output they hold, may learn now."""
        self.captured_steps.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if "captured_steps" in self.__dict__:
            self.captured_steps.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # Graphs cannot be copied.
        return self.__dict__ | {"captured_steps": CapturedSteps(self.config.capture)}

    # Checkpoints

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, strict: bool = True, **kwargs: Any
    ) -> Self:
        """Load a checkpoint or an exported policy, whose checksums are verified.

        A missing or superfluous weight is an error unless `strict=False`.

        Raises:
            DamagedCheckpointError: If its files are not those that its checksums list.
            ValueError: If the policy leaves out a text encoder and the installed one differs.
            UnsafeCheckpointError: If its configuration or a processor beside it names code.
        """
        options = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        hub = {name: kwargs[name] for name in options if name in kwargs}
        folder, config = fetch_checkpoint(pretrained_name_or_path, **hub), kwargs.get("config")
        if config is not None and config.use_peft and config.pretrained_path is not None:
            fetch_checkpoint(config.pretrained_path, **hub)  # LeRobot reads the processors beside the adapter
        return super().from_pretrained(folder, strict=strict, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Save configuration, weights and their checksums; see LeRobot's `save_pretrained`."""
        url = super().save_pretrained(save_directory, **kwargs)
        write_checksums(Path(save_directory), [CONFIG_NAME, SAFETENSORS_SINGLE_FILE])
        return url

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save configuration and weights, without those that are unchanged in the base's own file."""
        frozen = set() if self.base is None else {f"model.{name}" for name in self.model.frozen_names()}
        if frozen:
            held = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in held.items() if name not in frozen}
        super()._save_pretrained(save_directory, state_dict=state_dict)

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        """Load weights; with a base, those that do not learn are loaded already."""
        if model.base is None and model.config.backbone.text_encoder_fingerprint is not None:
            load_weights(model.model, load_file(model_file), model_file, strict=strict)
            return model
        if model.base is None:
            return super()._load_as_safetensor(model, model_file, map_location, strict)
        from vega_policy.backbones.pretrained_vla import refuse_misfits

        saved = load_file(model_file)
        if strict:
            refuse_misfits(model, saved.keys(), model_file)
        model.load_state_dict(saved, strict=False)
        return model


def _integrate(velocity: Any, noise: Tensor, steps: int, **guidance: Any) -> Tensor:
    """Integrate with LeRobot's Euler integrator, which applies real-time chunking.

    It takes the Jacobian of the velocity for the identity, but would still record the network's graph.
    """
    return euler_integrate(torch.no_grad()(velocity), noise, steps, **guidance)


def _blend(
    processor: RTCProcessor,
    chunk: Tensor,
    left: Tensor,
    inference_delay: int = 0,
    execution_horizon: int | None = None,
) -> Tensor:
    """Blend a chunk [b t a] with what remains of the last one [1 t a], by the weights of a flow's guidance.

    An L1 head has no flow to guide. The remaining actions are kept during the delay, then fade out up to the
    horizon.
    """
    horizon = execution_horizon or processor.rtc_config.execution_horizon
    length = min(horizon, left.shape[1])
    weights = processor.get_prefix_weights(inference_delay, length, chunk.shape[1])
    weights = weights.to(chunk)[:, None]  # [t 1]
    kept = functional.pad(left, (0, 0, 0, chunk.shape[1] - left.shape[1]))
    return weights * kept.to(chunk) + (1 - weights) * chunk


def parameter_groups(model: nn.Module, rate: float, gate_scale: float) -> list[Any]:
    """Return the trainable parameters of a policy, in two groups if the gate has a rate of its own.

    The second group is the gate's, whose rate is `gate_scale` times `rate`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gate = {id(weight) for weight in gate_weights(model)}
    if gate_scale == 1 or not gate:
        return trained
    others = [parameter for parameter in trained if id(parameter) not in gate]
    slow = [parameter for parameter in trained if id(parameter) in gate]
    return [{"params": others}, {"params": slow, "lr": gate_scale * rate}]
