"""VegaPolicy: LeRobot's contract around `VegaModel`. Thin; the method is in `model.py`."""

import dataclasses
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from vega_policy.configuration_vega import VegaConfig
from vega_policy.model import VegaModel
from vega_policy.observation import Observation, stack_views
from vega_policy.priors import resolve


class VegaPolicy(PreTrainedPolicy):
    """Vision-language-action policy with VEGA-3D eyes.

    Batches are LeRobot's: frames [b 3 h w] in [0, 1] under `observation.image(s).*`, `observation.state`
    [b s], `task` (b sentences), in training also `action` [b t a] and `action_is_pad` [b t]. In place of
    frames a batch may hold cached features under `vega.semantic` [b v c gh gw] and `vega.prior` [b v d gh
    gw].

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
        self.model = VegaModel(config.model)
        prior = self.model.prior
        if prior is not None:
            config.prior = dataclasses.replace(resolve(config.prior), fingerprint=prior.fingerprint)
        self._queue: deque[Tensor] = deque()
        self._past: dict[str, deque[Tensor]] = {}

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, strict: bool = True, **kwargs: Any
    ) -> Self:
        """Load a checkpoint; a missing or superfluous weight is an error unless `strict=False`."""
        return super().from_pretrained(pretrained_name_or_path, strict=strict, **kwargs)

    def get_optim_params(self) -> Iterator[nn.Parameter]:
        """All parameters that learn; the prior's are not among them."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def reset(self) -> None:
        """Forget the rest of the last chunk and the past: a new episode begins."""
        self._queue.clear()
        self._past.clear()

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Training loss.

        Args:
            batch: Normalised batch with `action` [b t a] and, if there is padding, `action_is_pad` [b t].
            reduction: `mean` for a scalar, `none` for one loss a sample [b].

        Returns:
            The loss, and what is worth logging: `loss`, and for gates the mean `gate` (weight of the semantic
            stream).
        """
        fresh = torch.default_generator if self.training and self.config.prior.noise == "fresh" else None
        losses = self.model.loss(
            self.observe(batch), batch[ACTION], batch.get("action_is_pad"), prior_generator=fresh
        )
        loss = losses.mean()
        log = {"loss": loss.item()}
        if self.model.gate is not None:
            log["gate"] = self.model.gate.mean().item()
        return (loss if reduction == "mean" else losses), log

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None, **rtc: Any) -> Tensor:
        """A chunk of normalised actions [b t a].

        Args:
            batch: Normalised batch without actions.
            noise: Where the flow starts, [b t a]; the same noise gives the same chunk. None draws it.
            **rtc: Arguments of LeRobot's real-time chunking, handed to its integrator.
        """
        observation = self.observe(batch)
        model = self.model.config
        shape = (len(observation.state), model.chunk_size, model.action_dim)
        noise = torch.randn(shape) if noise is None else noise
        return self.model.act(
            observation, noise.to(observation.state), partial(_integrate, rtc=rtc) if rtc else _integrate
        )

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The next normalised action [b a]; a new chunk when `n_action_steps` of the last are spent.

        With `prior.clip=history` it remembers the frames of the last calls, so it wants one call a control
        step.
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
        needed = list(self.config.image_features)
        if cached["semantic"] is not None and (self.model.prior is None or cached["prior"] is not None):
            needed = []
        missing = [key for key in (*needed, OBS_STATE) if key not in batch]
        if missing:
            held = sorted(key for key in batch if key.startswith("observation"))
            raise ValueError(f"The batch lacks {missing}; it holds {held}. Rename the keys to match.")
        state = batch[OBS_STATE]
        state = state[:, -1] if state.ndim == 3 else state  # of a clip, the present
        frames = {key: batch[key] for key in needed}
        return Observation(
            frames=stack_views(frames, self.config.frame_size) if needed else None,
            state=state,
            instruction=_sentences(batch.get("task"), len(state)),
            **cached,
        )


def _sentences(task: str | list[str] | None, batch: int) -> list[str]:
    """One sentence a sample; LeRobot gives a string, a list, or nothing for a dataset without tasks."""
    if task is None:
        return [""] * batch
    return [task] * batch if isinstance(task, str) else list(task)


def _integrate(denoise: Any, noise: Tensor, steps: int, rtc: dict[str, Any] | None = None) -> Tensor:
    """LeRobot's Euler integrator, so that its real-time chunking applies."""
    return euler_integrate(denoise, noise, steps, **(rtc or {}))
