"""Any image-text-to-text model of transformers as a backbone, with the fusion inside its own forward pass.

The model's `get_image_features` is wrapped on the instance: while `read` runs, it hands back the fused tokens
in place of the image features. Positions, masks and token types stay the model's own, so a fusion that
returns the semantic tokens as they came leaves the model's hidden states as they were, bit by bit.
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
"""Switches of image processors that cut a picture into several; a frame has to stay one grid of tokens."""

PIXEL_KEYS = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
NOT_READ = ("labels", "pixel_values", "pixel_attention_mask")


class Prompts:
    """The processor of one model, asked for one camera's worth of tokens a frame and nothing cut or padded.

    Args:
        folder: Local folder of the model.
        views: Cameras v, which all precede the instruction.
        frame_size: Side of the square frames in pixels.

    Raises:
        ImportError: If the processor needs a package that is not installed.
    """

    def __init__(self, folder: Path, views: int, frame_size: int) -> None:
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder)
        except ImportError as error:
            raise ImportError(
                f"{error} It comes with this package's extra: pip install 'lerobot_policy_vega[vlm]'."
            ) from error
        for switch in TILING:
            if hasattr(self.processor.image_processor, switch):
                setattr(self.processor.image_processor, switch, False)
        self.views, self.frame_size = views, frame_size
        self._known: dict[str, dict[str, Tensor]] = {}

    @property
    def picture_hash(self) -> str:
        """Hash over what becomes of a picture before the model sees it, 8 hexadecimal digits."""
        return hashlib.sha256(self.processor.image_processor.to_json_string().encode()).hexdigest()[:8]

    def pixels(self, frames: Tensor) -> dict[str, Tensor]:
        """Model inputs for frames in [0, 1], one picture each, [n 3 h w] -> `PIXEL_KEYS` there are."""
        pictures = list(frames.float().unbind())
        inputs = self.processor.image_processor(
            images=pictures, do_rescale=False, return_tensors="pt", device=frames.device
        )
        return {key: inputs[key] for key in PIXEL_KEYS if key in inputs}

    def encode(self, sentences: list[str], device: torch.device) -> dict[str, Tensor]:
        """Model inputs for instructions, with a placeholder for each token of each frame.

        Shorter ones are padded on the right, where a causal model does not see it and positions stay.

        Args:
            sentences: One instruction a sample, b of them.
            device: Where the inputs go.

        Returns:
            `input_ids` and `attention_mask` [b l], whatever else the model's processor gives of that shape,
            and `image_grid_thw` [b*v 3] where the model wants it.
        """
        rows = [self._row(sentence) for sentence in sentences]
        length = max(row["input_ids"].shape[1] for row in rows)
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

    def words(self, sentences: list[str]) -> list[Tensor]:
        """Token ids of the bare instructions, each [l]; an empty one counts as the end of a sentence."""
        tokenizer = self.processor.tokenizer
        ids = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
        return [torch.tensor(row or [tokenizer.pad_token_id], dtype=torch.long) for row in ids]

    def _row(self, sentence: str) -> dict[str, Tensor]:
        """Inputs of one instruction; the processor runs once for each."""
        if sentence not in self._known:
            blank = torch.zeros(3, self.frame_size, self.frame_size)
            inputs = self.processor(
                text=[self._prompt(sentence)],
                images=[[blank] * self.views],
                images_kwargs={"do_rescale": False},
                return_tensors="pt",
            )
            self._known[sentence] = {key: value for key, value in inputs.items() if key not in NOT_READ}
        return self._known[sentence]

    def _prompt(self, sentence: str) -> str:
        """The instruction as the model was trained to be asked, by its own chat template if it has one."""
        if self.processor.chat_template is None:
            return self.processor.image_token * self.views + sentence
        content = [{"type": "image"}] * self.views + [{"type": "text", "text": sentence}]
        message = [{"role": "user", "content": content}]
        return self.processor.tokenizer.apply_chat_template(
            message, chat_template=self.processor.chat_template, add_generation_prompt=True, tokenize=False
        )


NEEDED = ("config.json", "*processor_config.json", "tokenizer*", "*.safetensors")
"""What a model's folder must hold."""

FETCHED = (*NEEDED, "*.json", "*.jinja", "*.txt", "*.model")


def locate_model(name: str, source: str | None, revision: str | None, terms: str | None) -> Path:
    """Local folder of an image-text-to-text model, fetched from the hub if need be.

    Args:
        name: The backbone's name, for messages.
        source: Local folder or hub id; None if neither the config nor the table names one.
        revision: Hub revision; None takes the newest.
        terms: Terms of use of the weights, told where they cannot be had.

    Raises:
        ValueError: If there is no source.
        FileNotFoundError: If files are missing; names them and says where they may come from.
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
            f"{held}. {_way_out(terms)}"
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
            f"The backbone's model {source!r} is neither a local folder nor to be had from the hub "
            f"({type(error).__name__}). Missing: {', '.join(NEEDED)}. Download it once (`hf download "
            f"{source}`) or give its folder as backbone.path. {_way_out(terms)}"
        ) from error


def _way_out(terms: str | None) -> str:
    told = f"Its terms: {terms}. " if terms else ""
    return f"{told}A policy without such a model: backbone=compact (LeRobot: --policy.backbone.name=compact)."


ENCODERS = ("vision_tower", "vision_model", "visual")
CONNECTORS = ("connector", "multi_modal_projector", "visual.merger", "visual.deepstack_merger_list")


def parts_of(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The sub-modules of a model that are called so."""
    there = dict(model.named_modules())
    return [there[name] for name in names if name in there]


def freeze_parts(model: nn.Module, decoder: nn.Module, config: BackboneConfig) -> None:
    """Fix the parts that a config names.

    Args:
        model: The image-text model without its head.
        decoder: Its language model.
        config: `freeze_*` and `lora_*`.

    Raises:
        ImportError: If adapters are asked for and PEFT is not installed.
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
    """Fix a language model and give its linear layers low-rank adapters (LoRA, arXiv 2106.09685).

    Adapters are float32 and start at zero: the model's output is unchanged at first.

    Args:
        decoder: The language model, changed in place.
        config: Rank, scale and targets.

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
        if "lora_" in name:  # steps of an optimizer vanish in the rounding of shorter types
            weight.data = weight.data.float()


def checkpoint_blocks(blocks: Any) -> None:
    """Let blocks be computed again in the backward pass, also where they are frozen and in evaluation mode.

    transformers' own switch works in training mode only, in which frozen parts never are.

    Args:
        blocks: The blocks of a language model, changed in place.
    """
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


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

    def encode_context(
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
