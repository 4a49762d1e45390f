"""VegaPolicy: LeRobot's contract around `VegaModel`. Thin; the method is in `model.py`."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors.torch import load_file
from torch import Tensor

from vega_policy.configuration_vega import VegaConfig
from vega_policy.model.cuda_graph import CapturedSteps
from vega_policy.model.observation import Observation, stack_views
from vega_policy.model.rtc import RTCQueueAdapter, go_on, integrate, left_over
from vega_policy.model.vega import VegaModel
from vega_policy.priors import resolve
from vega_policy.training.optim import parameter_groups

if TYPE_CHECKING:
    from vega_policy.backbones.pretrained_vla import BasedModel


class VegaPolicy(PreTrainedPolicy):
    """Vision-language-action policy with VEGA-3D eyes.

    Batches are LeRobot's: frames [b 3 h w] in [0, 1] under `observation.image(s).*`, `observation.state`
    [b s], `task` (b sentences), in training also `action` [b t a] and `action_is_pad` [b t]. In place of
    frames a batch may hold cached ones under `vega.frames`, uint8 [b v 3 h w], and cached features under
    `vega.semantic` [b v c gh gw] and `vega.prior` [b v d gh gw].

    Args:
        config: The configuration; open prior fields are resolved and its fingerprint is filled in.
        dataset_stats: Taken for LeRobot's sake; statistics live in the processors.
        dataset_meta: Taken for LeRobot's sake.
        **kwargs: Taken for LeRobot's sake.

    Raises:
        ValueError: If the features or a part's configuration cannot work.
        FileNotFoundError: If the prior's weights are missing.
    """

    config_class = VegaConfig  # pyright: ignore[reportAssignmentType]
    name = "vega"  # pyright: ignore[reportAssignmentType]
    config: VegaConfig

    def __init__(
        self, config: VegaConfig, dataset_stats: Any = None, dataset_meta: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(config)
        self.model: Any = VegaModel(config.model) if config.base.name == "none" else self._based(config)
        prior = self.model.prior
        if prior is not None:
            config.prior = dataclasses.replace(resolve(config.prior), fingerprint=prior.fingerprint)
        self._queue: deque[Tensor] = deque()
        self._past: dict[str, deque[Tensor]] = {}
        self._captured = CapturedSteps(config.capture)
        self.rtc_processor: RTCProcessor | None = None
        self._clock: RTCQueueAdapter | None = None

    @staticmethod
    def _based(config: VegaConfig) -> "BasedModel":
        config.validate_features()
        from vega_policy.backbones.pretrained_vla import (
            BasedModel,  # LeRobot's other policies are heavy to import
            with_fingerprint,
        )

        model = BasedModel(config)
        config.base = with_fingerprint(config.base, model.fingerprint)
        return model

    @property
    def base(self) -> Any:
        """The pre-trained policy that this one builds upon; None without one."""
        return None if self.config.base.name == "none" else self.model.base

    def supports_rtc(self) -> bool:
        """Whether LeRobot's real-time chunking works: as for the base; else for all that see single instants.

        A rollout asks for chunks whenever it likes, not once a step, so a history would have gaps.
        """
        return self.config.prior.clip != "history" if self.base is None else self.base.supports_rtc()

    def use_rtc(self, config: RTCConfig | None) -> None:
        """Let chunks go on from what is left of the last one, as `config` says; None stops that.

        A flow is guided, step by step (Black et al., arXiv 2506.07339); an L1 head's chunk is blended with
        what is left. A base does it in its own way. Whoever asks joins chunks by what was executed.

        Raises:
            ValueError: If this policy cannot (see `supports_rtc`).
        """
        self._clock = None
        if config is not None and config.enabled and not self.supports_rtc():
            raise ValueError(
                f"real-time chunking asks for single instants and a policy that can; this one has prior.clip="
                f"{self.config.prior.clip} and base={self.config.base.name}. Use sync inference."
            )
        if self.base is not None:
            self.base.config.rtc_config = config
            self.base.init_rtc_processor()
        else:
            self.rtc_processor = RTCProcessor(config) if config is not None and config.enabled else None

    def init_rtc_processor(self) -> None:
        """LeRobot's rollout, whose chunks are joined by the clock, has set `config.rtc_config`."""
        self.use_rtc(self.config.rtc_config)
        self._clock = None if self.rtc_processor is None else RTCQueueAdapter()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, strict: bool = True, **kwargs: Any
    ) -> Self:
        """Load a checkpoint; a missing or superfluous weight is an error unless `strict=False`."""
        return super().from_pretrained(pretrained_name_or_path, strict=strict, **kwargs)

    def get_optim_params(self) -> Iterable[Any]:
        """All parameters that learn; see `parameter_groups`."""
        return parameter_groups(self, self.config.optimizer_lr, self.config.fusion.gate_lr_scale)

    def reset(self) -> None:
        """Forget the rest of the last chunk and the past: a new episode begins."""
        self._queue.clear()
        self._past.clear()
        if self.base is not None:
            self.base.reset()

    def forward(
        self,
        batch: dict[str, Any],
        reduction: str = "mean",
        noise: Tensor | None = None,
        time: Tensor | None = None,
        *,
        metrics_as_tensors: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the training loss and metrics.

        Args:
            batch: Normalised batch with `action` [b t a] and, if there is padding, `action_is_pad` [b t].
            reduction: `mean` for a scalar, `none` for one loss per sample [b].
            noise: Noise [b t a] and time [b] of a flow head, from `sample_noise_and_time`; None samples them
                from torch's default generator.
            time: See `noise`.
            metrics_as_tensors: Return metrics as scalars on the device, which waits for nothing, instead of
                numbers.

        Returns:
            The loss, and metrics: `loss`, and with a gate its mean `gate` (weight of the semantic stream)
            over all views and per view, `gate/<camera>`.
        """
        if self.base is not None:
            loss, metrics = self.base(batch, reduction=reduction)
        else:
            if noise is None:
                noise, time = self.sample_noise_and_time(batch[ACTION])
            fresh = torch.default_generator if self.training and self.config.prior.noise == "fresh" else None
            losses = self.model.loss(
                self.observe(batch), batch[ACTION], batch.get("action_is_pad"), noise, time, fresh
            )
            mean = losses.mean()
            loss, metrics = mean if reduction == "mean" else losses, {"loss": mean.detach()}
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        scalars = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        scalars |= self._gates()
        if scalars and not metrics_as_tensors:
            values = torch.stack([value.float() for value in scalars.values()]).tolist()
            scalars = dict(zip(scalars, values, strict=True))
        return loss, numbers | scalars

    def sample_noise_and_time(
        self, actions: Tensor, generator: torch.Generator | None = None, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sample noise [b t a] and time [b] for the loss of actions [b t a]; see `ActionHead`.

        Both are None for an L1 head and for a base, which samples its own.
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
        of_each = zip(cameras, means.unbind(), strict=True)
        return {"gate": means.mean()} | {f"gate/{camera}": mean for camera, mean in of_each}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None, **rtc: Any) -> Tensor:
        """A chunk of normalised actions [b t a].

        Args:
            batch: Normalised batch without actions.
            noise: Where the flow starts, [b t a]; the same noise gives the same chunk. None draws it.
            **rtc: Arguments of LeRobot's real-time chunking (`inference_delay`, `prev_chunk_left_over`,
                `execution_horizon`); without effect unless `use_rtc` was called. See `RTCQueueAdapter`.
        """
        if self.base is not None:
            return self.base.predict_action_chunk(batch, noise=noise, **rtc)
        predict = partial(self._chunk, batch, noise)
        clock = self._clock if "inference_delay" in rtc else None
        return predict(**rtc) if clock is None else clock.answer(predict, **rtc)

    def _chunk(self, batch: dict[str, Any], noise: Tensor | None, **rtc: Any) -> Tensor:
        observation = self.observe(batch)
        noise = torch.randn(len(observation.state), *self.noise_shape) if noise is None else noise
        noise, processor = noise.to(observation.state), self.rtc_processor
        left = left_over(rtc.pop("prev_chunk_left_over", None), self.config.chunk_size)
        if processor is None or left is None:
            plain = partial(self.model.sample_actions, integrate=integrate)
            return self._captured.sample_actions(self.model, observation, noise, plain)
        act = partial(self.model.sample_actions, observation, noise)
        return go_on(act, processor, left, flows=self.config.head.name == "flow", **rtc)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape [t a] of the noise that a chunk starts from."""
        width = self.model.config.action_dim if self.base is None else self.model.noise_width
        return self.config.chunk_size, width

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The next normalised action [b a]; a new chunk when `n_action_steps` of the last are spent.

        With `prior.clip=history` it remembers the last calls' frames: it wants one call a control step.
        """
        batch = self.remember(batch)
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise=noise, **kwargs)
            self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self._queue.popleft()

    def remember(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Replace each camera's frame [b 3 h w] by the clip that a history ends with, [b t 3 h w].

        Before there are enough frames the first one is repeated, as LeRobot's dataset does at the start of an
        episode. Without `prior.clip=history` the batch is returned as it is.
        """
        if self.config.prior.clip != "history":
            return batch
        length = self.config.prior.clip_frames
        clips = {}
        for key in (key for key in self.config.image_features if key in batch):
            past = self._past.setdefault(key, deque([batch[key]] * length, maxlen=length))
            past.append(batch[key])
            clips[key] = torch.stack(tuple(past), dim=1)
        return batch | clips

    def observe(self, batch: dict[str, Any]) -> Observation:
        """Make an `Observation` of a LeRobot batch.

        Raises:
            ValueError: If a camera or the state is missing (both lists are named), or frames are outside
                [0, 1] or have another shape.
        """
        cached = {name: batch.get(f"vega.{name}") for name in ("semantic", "prior")}
        stored = batch.get("vega.frames")
        known = cached["semantic"] is not None and (self.model.prior is None or cached["prior"] is not None)
        needed = [] if known or stored is not None else list(self.config.image_features)
        missing = [key for key in (*needed, OBS_STATE) if key not in batch]
        if missing:
            held = sorted(key for key in batch if key.startswith("observation"))
            raise ValueError(f"The batch lacks {missing}; it holds {held}. Rename the keys to match.")
        state = batch[OBS_STATE]
        state = state[:, -1] if state.ndim == 3 else state  # of a clip, the present
        frames = {key: batch[key] for key in needed}
        return Observation(
            frames=stack_views(frames, self.config.frame_size) if needed else _cached_frames(stored),
            state=state,
            instruction=_sentences(batch.get("task"), len(state)),
            words=batch.get("vega.words"),
            **cached,
        )

    def train(self, mode: bool = True) -> Self:
        """Forget captured steps: what they hold of the instruction may learn now."""
        self._captured.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Forget captured steps where the weights move or change their type."""
        if "_captured" in self.__dict__:
            self._captured.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """A copy captures its own steps: graphs cannot be copied."""
        return self.__dict__ | {"_captured": CapturedSteps(self.config.capture)}

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save configuration and weights, less those that lie unchanged in the base's own file."""
        frozen = set() if self.base is None else {f"model.{name}" for name in self.model.frozen_names()}
        if frozen:
            held = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in held.items() if name not in frozen}
        super()._save_pretrained(save_directory, state_dict=state_dict)

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        """Load weights; those that do not learn have come with the base already."""
        if model.base is None:
            return super()._load_as_safetensor(model, model_file, map_location, strict)
        from vega_policy.backbones.pretrained_vla import (
            refuse_misfits,  # LeRobot's other policies are heavy to import
        )

        saved = load_file(model_file)
        if strict:
            refuse_misfits(model, saved.keys(), model_file)
        model.load_state_dict(saved, strict=False)
        return model


def _cached_frames(frames: Tensor | None) -> Tensor | None:
    """Return a cache's frames with a time axis, uint8 [b v 3 h w] -> [b v 1 3 h w]."""
    if frames is None:
        return None
    if frames.dtype != torch.uint8:
        raise TypeError(f"vega.frames: expected uint8 frames of a cache, got {frames.dtype}.")
    return frames[:, :, None]


def _sentences(task: str | list[str] | None, batch: int) -> list[str]:
    """Return one sentence per sample; LeRobot gives a string, a list, or nothing."""
    if task is None:
        return [""] * batch
    return [task] * batch if isinstance(task, str) else list(task)
