"""The compact backbone: small pre-trained encoders and a transformer trunk, with no model hub involved."""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vega_policy.attention import Attention, Block, Mlp, grid_positions
from vega_policy.backbones import BackboneEntry
from vega_policy.backbones.encoders import STRIDE, ImageEncoder, TextEncoder
from vega_policy.parts import BackboneConfig


class Resampler(nn.Module):
    """Learned queries that gather a view's tokens into a few latents (Perceiver, arXiv 2103.03206).

    Args:
        width: Token width d.
        heads: Attention heads.
        latents: Number of queries l.
    """

    def __init__(self, width: int, heads: int, latents: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(latents, width))  # small ones would all attend alike
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b n d] -> [b l d]."""
        queries = repeat(self.queries, "l d -> b l d", b=len(tokens))
        return queries + self.attention(queries, self.norm(tokens))


class CompactBackbone(nn.Module):
    """EfficientNet-Lite0 for frames, MiniLM for the instruction, a transformer trunk over all tokens.

    Args:
        config: Encoders and sizes.
        state_dim: Width s of the proprioceptive state.
        views: Number of cameras v.
        frame_size: Side of the square frames in pixels; a multiple of 16.

    Raises:
        ValueError: If `frame_size` is not a multiple of the encoder's stride.
    """

    position: Tensor
    one_token_a_place = False

    def __init__(self, config: BackboneConfig, state_dim: int, views: int, frame_size: int) -> None:
        super().__init__()
        if frame_size % STRIDE:
            raise ValueError(
                f"The compact backbone needs a frame_size divisible by {STRIDE}; got {frame_size}."
            )
        self.width = config.width
        self.grid = (frame_size // STRIDE, frame_size // STRIDE)
        self.encoder_name = config.image_encoder
        self.image_encoder = ImageEncoder(
            config.image_encoder, config.pretrained, config.freeze_image_encoder
        )
        self.text_encoder = TextEncoder(config.text_encoder, config.pretrained, config.freeze_text_encoder)
        self.project_image = Mlp(self.image_encoder.channels, config.width, config.width)
        self.project_text = nn.Linear(self.text_encoder.width, config.width)
        self.project_state = Mlp(state_dim, config.width, config.width)
        self.view = nn.Parameter(0.02 * torch.randn(views, 1, config.width))
        self.register_buffer("position", grid_positions(*self.grid, config.width), persistent=False)
        self.resample: Resampler | None = None
        if config.latents:
            self.resample = Resampler(config.width, config.heads, config.latents)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.dropout) for _ in range(config.depth)
        )

    def encode(self, frames: Tensor) -> Tensor:
        """Image encoder, frames in [0, 1], [b v 3 h w] -> [b v c gh gw]."""
        features = self.image_encoder(frames.flatten(0, 1))
        return features.unflatten(0, frames.shape[:2])

    def project(self, features: Tensor) -> Tensor:
        """Semantic tokens, [b v c gh gw] -> [b v n d]."""
        return self.project_image(rearrange(features, "b v c h w -> b v (h w) c"))

    def pool(self, instruction: list[str]) -> Tensor:
        """Mean of the instruction's projected words, b sentences -> [b d]."""
        words, is_word = self.text_encoder(instruction)
        words = self.project_text(words) * is_word[..., None]
        return words.sum(dim=1) / is_word.sum(dim=1, keepdim=True)

    def read(
        self, tokens: Tensor, instruction: list[str], state: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read fused tokens with the instruction and the state.

        Args:
            tokens: Fused tokens [b v m d], m the grid's tokens or a multiple (streams one after the other).
            instruction: One sentence a sample.
            state: Normalised proprioception [b s].
            features: Not needed: nothing bypasses the fusion here.

        Returns:
            Context [b s d] and its mask [b s] (True: may be read).
        """
        batch, views, m, _ = tokens.shape
        self._check_views(views)
        position = self.position.repeat(m // len(self.position), 1)
        tokens = tokens + position + self.view
        if self.resample is not None:
            tokens = self.resample(tokens.flatten(0, 1)).unflatten(0, (batch, views))
        words, is_word = self.text_encoder(instruction)
        seen = torch.cat([tokens.flatten(1, 2), self.project_state(state)[:, None]], dim=1)
        context = torch.cat([seen, self.project_text(words)], dim=1)
        mask = torch.cat([is_word.new_ones(seen.shape[:2]), is_word], dim=1)
        for block in self.blocks:
            context = block(context, mask)
        return context, mask

    def _check_views(self, views: int) -> None:
        if views != len(self.view):
            raise ValueError(
                f"This policy was built for {len(self.view)} cameras; the observation has {views}."
            )


def load(
    config: BackboneConfig, entry: BackboneEntry, state_dim: int, views: int, frame_size: int
) -> CompactBackbone:
    """The compact backbone of a config; the entry has nothing to add."""
    return CompactBackbone(config, state_dim, views, frame_size)
