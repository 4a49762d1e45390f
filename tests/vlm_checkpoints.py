"""Small randomly initialised image-text-to-text models in the hub's layout, one a family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from vega_policy.backbones import make_backbone
from vega_policy.model.config import BackboneConfig

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
SIGLIP = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 64, "width": 64}
WORDS = ["lift", "push", "the", "red", "blue", "cube", "to", "plate", "user", "assistant", ":", "\n"]
TEMPLATE = (
    "{% for m in messages %}user : {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% else %} {{ c['text'] }}{% endif %}{% endfor %} {% endfor %}assistant :"
)


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a model's own special tokens, all of one word each."""
    extra = [*special, *named.values()]
    words = ["<unk>", "<pad>", "<bos>", "<eos>", *extra, *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=extra,
        extra_special_tokens=named,
    )


def write_smolvlm(folder: Path) -> None:
    """SmolVLM2: SigLIP, pixel shuffle, Llama; 4x4 tokens of 64 pixels."""
    words = tokenizer(
        "<end_of_utterance>",
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    config = SmolVLMConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "llama", **TEXT, "pad_token_id": 1},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=1,
    )
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}}
    SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes, **HALF),
        words,
        SmolVLMVideoProcessor(
            **sizes, video_sampling={"fps": 1, "max_frames": 4, "video_size": sizes["size"]}
        ),
        image_seq_len=16,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)


def write_paligemma(folder: Path) -> None:
    """PaliGemma 2: SigLIP, Gemma 2, no chat template, a prefix that sees itself both ways; 8x8 tokens."""
    words = tokenizer(image_token="<image>")
    config = PaliGemmaConfig(
        vision_config={**SIGLIP, "projection_dim": 32, "vision_use_head": False},
        text_config={"model_type": "gemma2", **TEXT, "query_pre_attn_scalar": 8, "pad_token_id": 1},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    config.text_config.vocab_size = 2048
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    images = SiglipImageProcessor(size=SQUARE, **HALF)
    images.image_seq_length = 64
    PaliGemmaProcessor(images, words).save_pretrained(folder)


def write_gemma3(folder: Path) -> None:
    """Gemma 3: SigLIP pooled to 4x4 tokens, sliding windows, images that see themselves both ways."""
    words = tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    config = Gemma3Config(
        vision_config={**SIGLIP, "vision_use_head": False},
        text_config={**TEXT, "sliding_window": 64, "query_pre_attn_scalar": 8, "pad_token_id": 1},
        mm_tokens_per_image=16,
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros by default
    model.save_pretrained(folder)
    template = TEMPLATE.replace("IMAGE", "<start_of_image>")
    Gemma3Processor(
        Gemma3ImageProcessor(size=SQUARE, **HALF), words, chat_template=template, image_seq_length=16
    ).save_pretrained(folder)


def write_internvl(folder: Path) -> None:
    """InternVL 3: its own ViT, pixel shuffle, Qwen 2; 4x4 tokens."""
    words = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config={**SIGLIP, "image_size": [64, 64], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **TEXT, "pad_token_id": 1},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
    )
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    InternVLProcessor(
        GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, **HALF),
        words,
        InternVLVideoProcessor(size=SQUARE),
        image_seq_length=16,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    ).save_pretrained(folder)


QWEN = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
QWEN_IMAGE = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_TEMPLATE = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")


def qwen_ids(words: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of Qwen's special tokens by the names its configs give them."""
    return {f"{name}_id": words.convert_tokens_to_ids(word) for name, word in (QWEN | QWEN_IMAGE).items()}


def write_qwen25(folder: Path) -> None:
    """Qwen2.5-VL: a ViT of windows, a merger of 2x2, rotary positions in three axes; 4x4 tokens."""
    words = tokenizer(**QWEN, **QWEN_IMAGE)
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 32,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        **qwen_ids(words),
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=8, min_pixels=256, max_pixels=65536, **HALF),
        words,
        Qwen2VLVideoProcessor(patch_size=8),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)


def write_qwen3(folder: Path) -> None:
    """Qwen3-VL: as Qwen2.5-VL, with DeepStack features of its first ViT block."""
    words = tokenizer(**QWEN, **QWEN_IMAGE)
    config = Qwen3VLConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        },
        **qwen_ids(words),
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=8, min_pixels=256, max_pixels=65536, **HALF),
        words,
        Qwen3VLVideoProcessor(patch_size=8),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "smolvlm": write_smolvlm,
    "paligemma": write_paligemma,
    "gemma3": write_gemma3,
    "internvl": write_internvl,
    "qwen2_5_vl": write_qwen25,
    "qwen3_vl": write_qwen3,
}
"""Family -> function that writes its model and processor into a folder."""


def write_vlm(family: str, folder: Path) -> Path:
    """Write a family's model with seeded weights; returns the folder."""
    torch.manual_seed(0)
    WRITERS[family](folder)
    return folder


class Folders:
    """Folder of each family's model, written when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, family: str) -> str:
        folder = self.root / family
        return str(folder if folder.exists() else write_vlm(family, folder))


def vlm(path: str, **fields: Any) -> BackboneConfig:
    """Config of the model in a folder."""
    return BackboneConfig(**{"name": "vlm", "path": path} | fields)


def build(path: str, views: int = 2, **fields: Any) -> Any:
    """Backbone of the model in a folder, for frames of 64 pixels."""
    return make_backbone(vlm(path, **fields), state_dim=8, views=views, frame_size=64)
