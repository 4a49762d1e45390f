"""The smallest Wan: constructor arguments that test files share, and its checkpoint in the hub's layout."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

STATISTICS = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [0.5, 1.5, 1.0, 0.7]}
VAE = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} | STATISTICS
BLOCKS = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 3,
    "ffn_dim": 64,
    "text_dim": 20,
    "freq_dim": 32,
}
TRANSFORMER = BLOCKS | {"in_channels": 4, "out_channels": 4}


def write_vae(folder: Path) -> None:
    """The autoencoder of Wan2.1."""
    AutoencoderKLWan(**VAE).save_pretrained(folder / "vae")


def write_wan(folder: Path) -> None:
    """Wan2.1 from text to video, with the empty prompt's embedding as a file."""
    write_vae(folder)
    WanTransformer3DModel(**TRANSFORMER).save_pretrained(folder / "transformer")
    save_file({"prompt": torch.randn(2, 20)}, folder / "empty_prompt.safetensors")


def write_text_encoder(folder: Path, words: tuple[str, ...] = ()) -> None:
    """A tokenizer that knows `words`, and a UMT5 encoder of the transformer's text width."""
    vocabulary = {token: index for index, token in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    UMT5EncoderModel(
        UMT5Config(vocab_size=len(vocabulary), d_model=20, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(folder / "text_encoder")
