"""Small randomly initialised checkpoints in the hub's layout, one for each prior, written in seconds."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    DDIMScheduler,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    VJEPA2Config,
    VJEPA2Model,
)

from tests.tiny_wan import BLOCKS, write_vae, write_wan

CHANNELS = (8, 8, 16, 16)
IMAGE_VAE = {
    "block_out_channels": CHANNELS,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def write_sd(folder: Path) -> None:
    """Stable Diffusion 2.1: autoencoder, UNet, schedule, and the empty prompt's embedding."""
    up = ("UpDecoderBlock2D",) * 4
    AutoencoderKL(**IMAGE_VAE, up_block_types=up, scaling_factor=0.5).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        block_out_channels=CHANNELS,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder / "unet")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    save_file({"prompt": torch.randn(7, 12)}, folder / "empty_prompt.safetensors")


def write_svd(folder: Path) -> None:
    """Stable Video Diffusion: autoencoder, UNet, CLIP's image encoder."""
    down = {key: value for key, value in IMAGE_VAE.items() if key != "norm_num_groups"}
    channels = (32, 32, 32, 32)  # its group norms have 32 groups, fixed
    AutoencoderKLTemporalDecoder(**(down | {"block_out_channels": channels})).save_pretrained(folder / "vae")
    UNetSpatioTemporalConditionModel(
        block_out_channels=channels,
        cross_attention_dim=12,
        num_attention_heads=(1, 1, 2, 2),
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    ).save_pretrained(folder / "unet")
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            projection_dim=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).save_pretrained(folder / "image_encoder")


def write_dinov3(folder: Path) -> None:
    """DINOv3's vision transformer with two register tokens."""
    DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_register_tokens=2,
            image_size=64,
            layerscale_value=0.1,
        )
    ).save_pretrained(folder)


def write_vjepa2(folder: Path) -> None:
    """V-JEPA 2 with its predictor, trained (so to say) on frames of 96 pixels."""
    VJEPA2Model(
        VJEPA2Config(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            mlp_ratio=2.0,
            crop_size=96,
            frames_per_clip=8,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
        )
    ).save_pretrained(folder)


def write_vace(folder: Path) -> None:
    """Wan2.1-VACE: control blocks beside blocks 0 and 2."""
    write_vae(folder)
    WanVACETransformer3DModel(
        **BLOCKS, in_channels=4, out_channels=4, vace_layers=[0, 2], vace_in_channels=2 * 4 + 64
    ).save_pretrained(folder / "transformer")
    save_file({"prompt": torch.randn(2, 20)}, folder / "empty_prompt.safetensors")


def write_ti2v(folder: Path) -> None:
    """Wan2.2-TI2V-5B, whose residual autoencoder works on patches of 2x2 pixels, 16 pixels a latent."""
    AutoencoderKLWan(
        base_dim=8,
        z_dim=6,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 6,
        latents_std=[1.0] * 6,
    ).save_pretrained(folder / "vae")
    WanTransformer3DModel(**BLOCKS, in_channels=6, out_channels=6).save_pretrained(folder / "transformer")
    save_file({"prompt": torch.randn(2, 20)}, folder / "empty_prompt.safetensors")


def write_i2v(folder: Path) -> None:
    """Wan2.1-I2V: mask and latents of the frame as further channels, CLIP's tokens in cross-attention."""
    write_vae(folder)
    WanTransformer3DModel(
        **BLOCKS, in_channels=2 * 4 + 4, out_channels=4, image_dim=16, added_kv_proj_dim=48
    ).save_pretrained(folder / "transformer")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).save_pretrained(folder / "image_encoder")
    save_file({"prompt": torch.randn(2, 20)}, folder / "empty_prompt.safetensors")


WRITERS: dict[str, Callable[[Path], None]] = {
    "wan2.1_t2v_14b": write_wan,
    "wan2.1_vace_1.3b": write_vace,
    "wan2.2_ti2v_5b": write_ti2v,
    "sd21": write_sd,
    "svd": write_svd,
    "sd_vae": write_sd,
    "wan_vae": write_vae,
    "dinov3": write_dinov3,
    "vjepa2": write_vjepa2,
}
"""Prior -> function that writes its checkpoint into a folder."""

FUTURE_ONLY: dict[str, Callable[[Path], None]] = {"wan2.1_i2v_14b": write_i2v}
"""The same of a prior that continues frames only."""


LAST = dict.fromkeys(WRITERS, 2) | {"sd21": 3, "svd": 3, "sd_vae": 0, "wan_vae": 0}
"""Last layer of each small checkpoint."""


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint of a prior with seeded weights; returns the folder."""
    torch.manual_seed(0)
    (WRITERS | FUTURE_ONLY)[name](folder)
    return folder
