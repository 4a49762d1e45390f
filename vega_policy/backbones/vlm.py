"""Any image-text-to-text model of transformers as a backbone, with the fusion inside its own forward pass.

The model's `get_image_features` is wrapped on the instance: while `read` runs, it hands back the fused tokens
in place of the image features. Positions, masks and token types stay the model's own, so a fusion that
returns the semantic tokens as they came leaves the model's hidden states as they were, bit by bit.
"""

import inspect
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vega_policy.attention import Mlp
from vega_policy.backbones import BackboneEntry
from vega_policy.backbones.encoders import quiet_transformers
from vega_policy.backbones.prompts import Prompts
from vega_policy.backbones.sources import locate_model
from vega_policy.backbones.tuning import CONNECTORS, ENCODERS, checkpoint_blocks, freeze_parts, parts_of
from vega_policy.parts import BackboneConfig


@dataclass(frozen=True)
class Family:
    """How a family's `get_image_features` gives its features.

    Attributes:
        split: One tensor a picture, [n d] each, instead of one for all, [pictures n d].
        deep: It also gives features for the first decoder blocks (DeepStack), which bypass the fusion.
    """

    split: bool = False
    deep: bool = False


PLAIN = Family()
FAMILIES = {
    "qwen2_vl": Family(split=True),
    "qwen2_5_vl": Family(split=True),
    "qwen3_vl": Family(split=True, deep=True),
    "qwen3_vl_moe": Family(split=True, deep=True),
}
"""Model type of transformers -> family; all others are `PLAIN`."""


class VisionLanguageBackbone(nn.Module):
    """An image-text-to-text model whose image features are replaced by fused tokens.

    The context is what the language model makes of its whole prompt (at `config.layer`), followed by one
    token of the state, which the model itself does not read. Qwen3-VL's DeepStack features, which enter its
    first blocks beside the tokens, stay those of the unmodified model.

    Args:
        model: The model without its head.
        prompts: Its processor.
        config: Layer and what is frozen.
        state_dim: Width s of the proprioceptive state.

    Raises:
        ValueError: If the layer does not exist, or a frame's tokens are no rectangle.
    """

    one_token_a_place = True
    model: Any
    project_state: Any

    def __init__(self, model: Any, prompts: Prompts, config: BackboneConfig, state_dim: int) -> None:
        super().__init__()
        self.config, self.prompts = config, prompts
        self.encoder_name = f"{model.config.model_type}, pictures {prompts.picture_hash}"
        self.family = FAMILIES.get(model.config.model_type, PLAIN)
        self.model = model
        self.width: int = model.config.get_text_config().hidden_size
        self.grid = self._measure_grid()
        decoder = model.get_decoder()
        _stop_at(decoder, config.layer)
        freeze_parts(model, decoder, config)
        if config.gradient_checkpointing:
            checkpoint_blocks(decoder.layers)
        self.project_state = Mlp(state_dim, self.width, self.width)
        self._replacement: BaseModelOutputWithPooling | None = None
        self._native_features = model.get_image_features
        model.get_image_features = self._fused_features
        self.train()

    @property
    def image_encoder(self) -> nn.ModuleList:
        """What `encode` runs: image encoder and connector."""
        return nn.ModuleList(parts_of(self.model, (*ENCODERS, *CONNECTORS)))

    def train(self, mode: bool = True) -> Self:
        """Training mode for what learns; frozen parts stay as in evaluation."""
        super().train(mode)
        for part in self.modules():
            weights = list(part.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                part.eval()
        return self

    def encode(self, frames: Tensor) -> Tensor:
        """Image features behind the connector, frames in [0, 1], [b v 3 h w] -> [b v c gh gw].

        c is the width d; with DeepStack each of its features follows, d more.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen_features):
            inputs = self.prompts.pixels(frames.flatten(0, 1))
            inputs["pixel_values"] = _never_blank(inputs["pixel_values"])
            asked = inspect.signature(self._native_features).parameters
            given = {key: value for key, value in inputs.items() if key in asked}
            features = self._native_features(**given, return_dict=True)
            pooled = features.pooler_output
            pooled = torch.stack(pooled) if self.family.split else pooled  # [b*v n d]
            deep = features.deepstack_features if self.family.deep else []
            streams = [pooled, *(stream.unflatten(0, pooled.shape[:2]) for stream in deep)]
        batch, (gh, gw) = len(frames), self.grid
        return rearrange(torch.cat(streams, -1), "(b v) (h w) c -> b v c h w", b=batch, h=gh, w=gw)

    def project(self, features: Tensor) -> Tensor:
        """Semantic tokens: the features as they are, the model's own connector made them, -> [b v n d]."""
        tokens = rearrange(features[:, :, : self.width], "b v d h w -> b v (h w) d")
        return tokens.to(self.project_state[0].weight.dtype)

    def pool(self, instruction: list[str]) -> Tensor:
        """Mean of the instruction's word embeddings, b sentences -> [b d]."""
        embed = self.model.get_input_embeddings()
        words = self.prompts.words(instruction)
        pooled = torch.stack([embed(ids.to(embed.weight.device)).mean(dim=0) for ids in words])
        return pooled.to(self.project_state[0].weight.dtype)

    def read(
        self, tokens: Tensor, instruction: list[str], state: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read fused tokens with the instruction; the state's token follows.

        Args:
            tokens: Fused tokens [b v n d].
            instruction: One sentence a sample.
            state: Normalised proprioception [b s].
            features: What `encode` gave, [b v c gh gw].

        Returns:
            Context [b s d] and its mask [b s] (True: may be read).

        Raises:
            ValueError: If there are more or fewer views than the policy was built for.
        """
        if tokens.shape[1] != self.prompts.views:
            raise ValueError(
                f"This policy was built for {self.prompts.views} cameras; the observation has "
                f"{tokens.shape[1]}."
            )
        inputs = self.prompts.encode(instruction, tokens.device)
        self._replacement = self._as_native(tokens, features)
        try:
            hidden = self.model(**inputs, pixel_values=tokens, use_cache=False).last_hidden_state
        finally:
            self._replacement = None
        read = self.project_state(state)[:, None]
        context = torch.cat([hidden.to(read.dtype), read], dim=1)
        mask = torch.cat(
            [inputs["attention_mask"].bool(), inputs["attention_mask"].new_ones(len(read), 1).bool()], 1
        )
        return context, mask

    def _as_native(self, tokens: Tensor, features: Tensor) -> BaseModelOutputWithPooling:
        """Fused tokens in the form in which the model's own `get_image_features` gives its features."""
        dtype = self.model.get_input_embeddings().weight.dtype
        fused = tokens.flatten(0, 1).to(dtype)
        output: Any = BaseModelOutputWithPooling()
        output.pooler_output = tuple(fused) if self.family.split else fused
        if self.family.deep:
            deep = rearrange(features[:, :, self.width :], "b v (k d) h w -> k (b v h w) d", d=self.width)
            output.deepstack_features = list(deep.to(dtype))
        return output

    def _fused_features(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gets when it asks for image features: fused tokens in `read`, else its own."""
        if self._replacement is None:
            return self._native_features(*args, **kwargs)
        return self._replacement

    def _measure_grid(self) -> tuple[int, int]:
        """Token grid of a frame, from the placeholders that the model's own processor writes."""
        inputs = self.prompts.encode([""], torch.device("cpu"))
        count = int((inputs["input_ids"] == self.model.config.image_token_id).sum()) // self.prompts.views
        if "image_grid_thw" in inputs:
            _, rows, columns = inputs["image_grid_thw"][0].tolist()
            merged = isqrt(rows * columns // max(count, 1))
            return rows // merged, columns // merged
        side = isqrt(count)
        if side == 0 or side * side != count:
            raise ValueError(
                f"backbone {self.config.name!r} ({self.model.config.model_type}) has {count} tokens a frame, "
                "which are no square grid; its features cannot be fused place by place."
            )
        return side, side


def _stop_at(decoder: Any, layer: int | None) -> None:
    """Drop the language model's blocks behind the one that is read, and its final norm with them."""
    if layer is None:
        return
    count = len(decoder.layers)
    if not 0 <= layer < count:
        raise ValueError(f"backbone.layer: the language model has blocks 0 to {count - 1}; got {layer}.")
    decoder.layers = decoder.layers[: layer + 1]
    decoder.norm = nn.Identity()


def _never_blank(pixels: Tensor) -> Tensor:
    """Add a tiny number to pictures that are zero everywhere: SmolVLM would drop them as padding."""
    blank = (pixels == 0).flatten(-3).all(dim=-1) if pixels.ndim > 3 else None
    if blank is None or not blank.any():
        return pixels
    return pixels + blank[..., None, None, None] * torch.finfo(pixels.dtype).tiny


def load(
    config: BackboneConfig, entry: BackboneEntry, state_dim: int, views: int, frame_size: int
) -> VisionLanguageBackbone:
    """The model of a folder or of the hub; with `pretrained=false` its architecture with random weights.

    Raises:
        ValueError: If the folder holds another kind of model, or no source is named.
        FileNotFoundError: If files are missing.
    """
    folder = locate_model(config.name, config.path or entry.source, config.revision, entry.terms)
    with quiet_transformers():
        model = load_model(folder, config)
    prompts = Prompts(folder, views, frame_size)
    return VisionLanguageBackbone(model, prompts, config, state_dim)


def load_model(folder: Path, config: BackboneConfig) -> Any:
    """The image-text model of a folder, without its language head.

    Raises:
        ValueError: If transformers does not know it as an image-text-to-text model.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    architecture = AutoConfig.from_pretrained(folder)
    if type(architecture) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{folder} holds a model of type {architecture.model_type!r}, which transformers does not know "
            "as image-text-to-text. Give another backbone.path."
        )
    if config.pretrained:
        whole = AutoModelForImageTextToText.from_pretrained(folder, **options)
    else:
        whole = AutoModelForImageTextToText.from_config(architecture, **options)
    return whole.base_model
