"""VegaModel: see, read, act, in the paper's order (VEGA-3D, arXiv 2603.19235).

frames -> image encoder of the backbone -> projector -> semantic tokens --+
                                                                          +-> fusion -> backbone -> head
frames -> prior (noised latent, middle block) -> projector -> prior tokens +
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vega_policy.backbones import make_backbone
from vega_policy.model import flow
from vega_policy.model.action_head import make_action_head
from vega_policy.model.config import ModelConfig
from vega_policy.model.fusion import make_fusion
from vega_policy.model.layers import Mlp
from vega_policy.model.observation import Observation
from vega_policy.priors import make_prior


class VegaModel(nn.Module):
    """A policy whose eyes are the fused features of a semantic encoder and a frozen video diffusion model.

    The prior is frozen and travels with the model from device to device, but it is no sub-module: it is in no
    optimizer, no checkpoint and no sharded state.

    Args:
        config: The four parts and the sizes that the data dictates.
        built: Backbone and prior where they exist already (sizes are read off ones without weights); None
            builds those that the config names.
    """

    backbone: Any
    prior: Any
    fusion: Any
    project: Mlp

    def __init__(self, config: ModelConfig, built: tuple[Any, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        backbone, prior = built or _build(config)
        self.backbone, width = backbone, backbone.width
        self.__dict__["prior"] = prior  # not a sub-module
        if self.prior is not None:
            self.project = Mlp(self.prior.width, width, width)
            self.fusion = make_fusion(width, config.fusion, self.backbone.grid)
            self._check_tokens()
        self.head = make_action_head(config.head, width, config.chunk_size, config.action_dim)

    def see(self, observation: Observation, generator: torch.Generator | None = None) -> Tensor:
        """Fused tokens of each view, [b v n d]; reads cached features where the observation brings them."""
        return self.fuse(self.semantic_features(observation), observation, generator)

    def fuse(
        self, features: Tensor, observation: Observation, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mix the prior into the backbone's image features, [b v c gh gw] -> tokens [b v n d]."""
        semantic = self.backbone.project(features)
        if self.prior is None:
            return semantic
        read = self.prior_features(observation, generator)
        prior = self.project(rearrange(read, "b v d h w -> b v (h w) d"))
        views = semantic.shape[1]
        context = None
        if self.fusion.reads_instruction:
            context = repeat(self.backbone.pool(observation.instruction), "b d -> (b v) d", v=views)
        fused = self.fusion(semantic.flatten(0, 1), prior.flatten(0, 1), context)
        return rearrange(fused, "(b v) m d -> b v m d", v=views)

    def read(
        self, observation: Observation, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the backbone makes of the fused tokens: context [b s d] and its mask [b s]."""
        features = self.semantic_features(observation)
        tokens = self.fuse(features, observation, generator)
        state = observation.state if self.config.head.state else torch.zeros_like(observation.state)
        return self.backbone.read(tokens, observation.instruction, state, features)

    def loss(
        self,
        observation: Observation,
        actions: Tensor,
        is_pad: Tensor | None = None,
        generator: torch.Generator | None = None,
        prior_generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss of each sample, normalised actions [b t a], is_pad [b t] (True: no such step) -> [b]."""
        context, mask = self.read(observation, prior_generator)
        return self.head.loss(context, mask, actions, is_pad, generator)

    def act(self, observation: Observation, noise: Tensor, integrate: flow.Integrator = flow.euler) -> Tensor:
        """A chunk of normalised actions, noise [b t a] -> [b t a]; the same noise gives the same chunk."""
        context, mask = self.read(observation)
        return self.head.sample(context, mask, noise, integrate)

    def semantic_features(self, observation: Observation) -> Tensor:
        """Output of the backbone's image encoder, [b v c gh gw], from the cache or from the last frames.

        Zeros of that shape in a policy without sight.
        """
        features = observation.semantic
        if features is None:
            features = self.backbone.encode(_frames(observation, "semantic")[:, :, -1])
        return features if self.config.backbone.sight else torch.zeros_like(features)

    def prior_features(self, observation: Observation, generator: torch.Generator | None = None) -> Tensor:
        """Output of the prior, [b v d gh gw], from the cache or from the frames.

        Args:
            observation: What is seen.
            generator: Source of fresh noise; None takes the prior's fixed noise.
        """
        if observation.prior is not None:
            return observation.prior
        return self.prior(_frames(observation, "prior"), generator).to(self.project[0].weight.dtype)

    @property
    def gate(self) -> Tensor | None:
        """Weight of the semantic stream in the last forward pass, [b*v n 1]; None without a gate."""
        return None if self.prior is None else self.fusion.gate

    def _check_tokens(self) -> None:
        n = self.backbone.grid[0] * self.backbone.grid[1]
        m = self.fusion.tokens(n)
        if self.backbone.one_token_a_place and m != n:
            raise ValueError(
                f"fusion={self.config.fusion.name} makes {m} tokens of {n}; the backbone "
                f"{self.config.backbone.name!r} has a place for {n} of each frame. Take another fusion, or "
                "backbone=compact."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the prior along with the model (torch calls this for `.to`, `.cuda`, `.half`, ...)."""
        super()._apply(fn, recurse)
        prior: Any = self.__dict__["prior"]
        if prior is not None:
            prior._apply(fn, recurse)
        return self


def _build(config: ModelConfig) -> tuple[Any, Any]:
    backbone = make_backbone(config.backbone, config.state_dim, config.views, config.frame_size)
    return backbone, make_prior(config.prior, backbone.grid)


def _frames(observation: Observation, stream: str) -> Tensor:
    if observation.frames is None:
        raise ValueError(
            f"The observation holds neither frames nor cached {stream} features; one of the two is needed."
        )
    return observation.frames
