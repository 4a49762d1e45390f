"""Any image-text-to-text model of transformers as a backbone, with the fusion inside its own forward pass.

The model's `get_image_features` is wrapped on the instance: during `encode_context` it returns the fused
tokens instead of the image features. Positions, masks and token types stay the model's own, so a fusion that
returns the semantic tokens unchanged leaves the model's hidden states unchanged, bit by bit.
"""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vega_policy.backbones import BackboneEntry
from vega_policy.backbones.compact import quiet_transformers
from vega_policy.model.config import BackboneConfig
from vega_policy.model.layers import Mlp

TILING = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")
"""Options of image processors that cut an image into tiles; a frame has to stay one grid of tokens."""

PIXEL_KEYS = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
UNUSED_KEYS = ("labels", "pixel_values", "pixel_attention_mask")

ENCODERS = ("vision_tower", "vision_model", "visual")
CONNECTORS = ("connector", "multi_modal_projector", "visual.merger", "visual.deepstack_merger_list")


@dataclass(frozen=True)
class Family:
    """The form in which a family's `get_image_features` returns features."""

    split: bool = False  # one tensor per image, [n d] each, instead of one for all, [images n d]
    deep: bool = False  # also features for the first decoder blocks (DeepStack), which bypass the fusion


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

    The context is the language model's output for its whole prompt (at `config.layer`), followed by one token
    of the state, which the model itself does not read. Qwen3-VL's DeepStack features, which enter its first
    blocks beside the tokens, stay those of the unmodified model.

    Raises:
        ValueError: If the layer does not exist, or a frame's tokens are no rectangle.
    """

    takes_grid_only = True
    model: Any
    project_state: Any

    def __init__(self, model: Any, prompts: "Prompts", config: BackboneConfig, state_dim: int) -> None:
        super().__init__()
        self.config, self.prompts = config, prompts
        self.encoder_name = f"{model.config.model_type}, images {prompts.image_hash}"
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
        """The modules that `encode` runs: image encoder and connector."""
        return nn.ModuleList(parts_of(self.model, (*ENCODERS, *CONNECTORS)))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what learns; frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self.modules():
            weights = list(part.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                part.eval()
        return self

    def encode(self, frames: Tensor) -> Tensor:
        """Return image features behind the connector, frames in [0, 1], [b v 3 h w] -> [b v c gh gw].

        c is the width d; each DeepStack feature adds d more.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen_features):
            inputs = self.prompts.pixels(frames.flatten(0, 1))
            inputs["pixel_values"] = _never_blank(inputs["pixel_values"])
            accepted = inspect.signature(self._native_features).parameters
            inputs = {key: value for key, value in inputs.items() if key in accepted}
            features = self._native_features(**inputs, return_dict=True)
            pooled = features.pooler_output
            pooled = torch.stack(pooled) if self.family.split else pooled  # [b*v n d]
            deep = features.deepstack_features if self.family.deep else []
            streams = [pooled, *(stream.unflatten(0, pooled.shape[:2]) for stream in deep)]
        batch, (gh, gw) = len(frames), self.grid
        return rearrange(torch.cat(streams, -1), "(b v) (h w) c -> b v c h w", b=batch, h=gh, w=gw)

    def project(self, features: Tensor) -> Tensor:
        """Return the semantic tokens: the connector's output as it is, -> [b v n d]."""
        tokens = rearrange(features[:, :, : self.width], "b v d h w -> b v (h w) d")
        return tokens.to(self.project_state[0].weight.dtype)

    def pool(self, text: list[str]) -> Tensor:
        """Return the mean of the instruction's word embeddings, b sentences -> [b d]."""
        embed = self.model.get_input_embeddings()
        words = self.prompts.words(text)
        pooled = torch.stack([embed(ids.to(embed.weight.device)).mean(dim=0) for ids in words])
        return pooled.to(self.project_state[0].weight.dtype)

    def encode_context(
        self, tokens: Tensor, text: list[str], state: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode fused tokens [b v n d] and instructions; the token of the normalised state [b s] follows.

        `features` [b v c gh gw] is the output of `encode`. Returns the context [b s d] and its mask [b s]
        (True: may be read).

        Raises:
            ValueError: If the number of views is not that of the policy.
        """
        if tokens.shape[1] != self.prompts.views:
            raise ValueError(
                f"This policy was built for {self.prompts.views} cameras; the observation has "
                f"{tokens.shape[1]}."
            )
        inputs = self.prompts.encode(text, tokens.device)
        self._replacement = self._as_native(tokens, features)
        try:
            hidden = self.model(**inputs, pixel_values=tokens, use_cache=False).last_hidden_state
        finally:
            self._replacement = None
        state_token = self.project_state(state)[:, None]
        context = torch.cat([hidden.to(state_token.dtype), state_token], dim=1)
        mask = inputs["attention_mask"].bool()
        return context, torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)

    def pad_instructions(self, instructions: list[str]) -> None:
        """Pad the instructions of every batch to the longest of these; none ends it."""
        self.prompts.pad_to_longest(instructions)

    def _as_native(self, tokens: Tensor, features: Tensor) -> BaseModelOutputWithPooling:
        """Return fused tokens in the form of the model's own `get_image_features`."""
        dtype = self.model.get_input_embeddings().weight.dtype
        fused = tokens.flatten(0, 1).to(dtype)
        output: Any = BaseModelOutputWithPooling()
        output.pooler_output = tuple(fused) if self.family.split else fused
        if self.family.deep:
            deep = rearrange(features[:, :, self.width :], "b v (k d) h w -> k (b v h w) d", d=self.width)
            output.deepstack_features = list(deep.to(dtype))
        return output

    def _fused_features(self, *args: Any, **kwargs: Any) -> Any:
        """Return fused tokens during `encode_context`, else the model's own image features."""
        if self._replacement is None:
            return self._native_features(*args, **kwargs)
        return self._replacement

    def _measure_grid(self) -> tuple[int, int]:
        """Return the token grid of a frame, from the placeholders of the model's own processor."""
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
                "which are no square grid; its features cannot be fused token by token."
            )
        return side, side


def load(
    config: BackboneConfig, entry: BackboneEntry, state_dim: int, views: int, frame_size: int
) -> VisionLanguageBackbone:
    """Load the model of a folder or of the hub; with `pretrained=false` its weights are random.

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
    """Load the image-text model of a folder, without its language head.

    Raises:
        ValueError: If transformers does not know it as an image-text-to-text model.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "trust_remote_code": False}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    # A checkpoint's config names the folder: no code of that repository, and no pickles.
    architecture = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(architecture) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{folder} holds a model of type {architecture.model_type!r}, which transformers does not know "
            "as image-text-to-text. Give another backbone.path."
        )
    if config.pretrained:
        whole = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **options)
    else:
        whole = AutoModelForImageTextToText.from_config(architecture, **options)
    return whole.base_model


NEEDED = ("config.json", "*processor_config.json", "tokenizer*", "*.safetensors")
"""Patterns of which a model's folder must hold files."""

FETCHED = (*NEEDED, "*.json", "*.jinja", "*.txt", "*.model")


def locate_model(name: str, source: str | None, revision: str | None, terms: str | None) -> Path:
    """Return the local folder of an image-text-to-text model, downloaded from the hub if need be.

    `source` is a local folder or hub id; None if neither the config nor the registry names one. `name` is the
    backbone's and `terms` the terms of use of the weights, for messages.

    Raises:
        ValueError: If there is no source.
        FileNotFoundError: If files are missing.
    """
    if source is None:
        raise ValueError(
            f"backbone {name!r} needs backbone.path: the folder or hub id of an image-text-to-text model."
        )
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(source, revision, terms)
    missing = [pattern for pattern in NEEDED if not any(folder.glob(pattern))]
    if missing:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"{folder} is not a complete image-text-to-text model: no {', '.join(missing)}. It holds: "
            f"{held}. {_alternatives(terms)}"
        )
    return folder


def _fetch(source: str, revision: str | None, terms: str | None) -> Path:
    skipped = ["*.bin", "*.pth", "*.gguf", "*.onnx*", "onnx/*", "original/*"]
    try:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=list(FETCHED), ignore_patterns=skipped
            )
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The backbone's model {source!r} is neither a local folder nor available from the hub "
            f"({type(error).__name__}). Missing: {', '.join(NEEDED)}. Download it once (`hf download "
            f"{source}`) or give its folder as backbone.path. {_alternatives(terms)}"
        ) from error


def _alternatives(terms: str | None) -> str:
    note = f"Its terms: {terms}. " if terms else ""
    return f"{note}A policy without such a model: backbone=compact (LeRobot: --policy.backbone.name=compact)."


class Prompts:
    """The processor of a model, set to one image per frame, without tiles or padding.

    The images of all views precede the instruction.

    Raises:
        ImportError: If the processor needs a package that is not installed.
    """

    def __init__(self, folder: Path, views: int, frame_size: int) -> None:
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        except ImportError as error:
            raise ImportError(
                f"{error} It comes with this package's extra: pip install 'lerobot_policy_vega[vlm]'."
            ) from error
        for switch in TILING:
            if hasattr(self.processor.image_processor, switch):
                setattr(self.processor.image_processor, switch, False)
        self.views, self.frame_size = views, frame_size
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._length = 0  # least length of a batch

    @property
    def image_hash(self) -> str:
        """Hash over the image processor's settings, 8 hexadecimal digits."""
        return hashlib.sha256(self.processor.image_processor.to_json_string().encode()).hexdigest()[:8]

    def pixels(self, frames: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs among `PIXEL_KEYS` for frames in [0, 1], [n 3 h w]."""
        inputs = self.processor.image_processor(
            images=list(frames.float().unbind()), do_rescale=False, return_tensors="pt", device=frames.device
        )
        return {key: inputs[key] for key in PIXEL_KEYS if key in inputs}

    def encode(self, sentences: list[str], device: torch.device) -> dict[str, Tensor]:
        """Return the model's inputs for b instructions, with a placeholder for each token of each frame.

        Shorter ones are padded on the right, where it changes neither a causal model's output nor positions.
        The inputs are `input_ids` and `attention_mask` [b l], other outputs of the processor of that shape,
        and `image_grid_thw` [b*v 3] where the model takes it.
        """
        rows = [self._row(sentence) for sentence in sentences]
        length = max(self._length, *(row["input_ids"].shape[1] for row in rows))
        batch = {}
        for key in rows[0]:
            parts = [row[key] for row in rows]
            if key != "image_grid_thw":
                fill = self.processor.tokenizer.pad_token_id if key == "input_ids" else 0
                parts = [
                    torch.nn.functional.pad(part, (0, length - part.shape[1]), value=fill) for part in parts
                ]
            batch[key] = torch.cat(parts).to(device)
        return batch

    def pad_to_longest(self, sentences: list[str]) -> None:
        """Pad every batch to the longest of these sentences, so that its shape depends on no batch."""
        self._length = max((self._row(sentence)["input_ids"].shape[1] for sentence in sentences), default=0)

    def words(self, sentences: list[str]) -> list[Tensor]:
        """Return the token ids of each instruction, [l]; an empty one is a padding token."""
        tokenizer = self.processor.tokenizer
        ids = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
        return [torch.tensor(row or [tokenizer.pad_token_id], dtype=torch.long) for row in ids]

    def _row(self, sentence: str) -> dict[str, Tensor]:
        """Return the inputs of one instruction; the processor runs once for each."""
        if sentence not in self._rows:
            blank = torch.zeros(3, self.frame_size, self.frame_size)
            inputs = self.processor(
                text=[self._prompt(sentence)],
                images=[[blank] * self.views],
                images_kwargs={"do_rescale": False},
                return_tensors="pt",
            )
            self._rows[sentence] = {key: value for key, value in inputs.items() if key not in UNUSED_KEYS}
        return self._rows[sentence]

    def _prompt(self, sentence: str) -> str:
        """Return the instruction in the model's chat template, if it has one."""
        if self.processor.chat_template is None:
            return self.processor.image_token * self.views + sentence
        content = [{"type": "image"}] * self.views + [{"type": "text", "text": sentence}]
        message = [{"role": "user", "content": content}]
        return self.processor.tokenizer.apply_chat_template(
            message, chat_template=self.processor.chat_template, add_generation_prompt=True, tokenize=False
        )


def parts_of(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Return the sub-modules of a model with the given names, where it has them."""
    modules = dict(model.named_modules())
    return [modules[name] for name in names if name in modules]


def freeze_parts(model: nn.Module, decoder: nn.Module, config: BackboneConfig) -> None:
    """Freeze the parts of a model that `freeze_*` names, and add the adapters of `lora_*` to its decoder.

    Raises:
        ImportError: If adapters are requested and PEFT is not installed.
        ValueError: If no layer has a name of `lora_targets`.
    """
    connectors = parts_of(model, CONNECTORS)
    for part in parts_of(model, ENCODERS):
        part.requires_grad_(not config.freeze_image_encoder)
    for part in connectors:  # after the encoders: Qwen's connectors lie within
        part.requires_grad_(not config.freeze_connector)
    if config.freeze_language_model:
        decoder.requires_grad_(False)
    if config.lora_rank:
        add_adapters(decoder, config)


def add_adapters(decoder: nn.Module, config: BackboneConfig) -> None:
    """Freeze a language model and add low-rank adapters to its linear layers (LoRA, arXiv 2106.09685).

    Adapters are float32 and start at zero: the model's output is unchanged at first.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If no layer has one of the names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("backbone.lora_rank needs PEFT: pip install 'lerobot_policy_vega[vlm]'.") from error
    targets = list(config.lora_targets)
    ends = {name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)}
    if not ends & set(targets):
        raise ValueError(
            f"backbone.lora_targets: no linear layer is called {', '.join(targets)}; there are "
            f"{', '.join(sorted(ends))}."
        )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,  # pyright: ignore[reportArgumentType]
    )
    inject_adapter_in_model(lora, decoder)
    for name, weight in decoder.named_parameters():
        if "lora_" in name:  # an optimizer's steps are lost in the rounding of shorter types
            weight.data = weight.data.float()


def checkpoint_blocks(blocks: Any) -> None:
    """Recompute blocks in the backward pass, also frozen ones and in evaluation mode, in place.

    transformers' own option works in training mode only, which frozen parts never enter.
    """
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _stop_at(decoder: Any, layer: int | None) -> None:
    """Drop the language model's blocks after a layer, and its final norm."""
    if layer is None:
        return
    count = len(decoder.layers)
    if not 0 <= layer < count:
        raise ValueError(f"backbone.layer: the language model has blocks 0 to {count - 1}; got {layer}.")
    decoder.layers = decoder.layers[: layer + 1]
    decoder.norm = nn.Identity()


def _never_blank(pixels: Tensor) -> Tensor:
    """Add a tiny number to images that are zero everywhere: SmolVLM would drop them as padding."""
    blank = (pixels == 0).flatten(-3).all(dim=-1) if pixels.ndim > 3 else None
    if blank is None or not blank.any():
        return pixels
    return pixels + blank[..., None, None, None] * torch.finfo(pixels.dtype).tiny
