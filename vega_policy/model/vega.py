"""VegaModel: a policy on features of a semantic encoder fused with those of a frozen video diffusion model.

VEGA-3D (arXiv 2603.19235), in the paper's order:

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
from vega_policy.model.observation import Observation, to_float
from vega_policy.priors import make_prior


class VegaModel(nn.Module):
    """Observation -> fused tokens -> context -> chunk of normalised actions.

    The prior is frozen. It moves between devices with the model but is no sub-module, so that it is in no
    optimizer, checkpoint or shard.

    Args:
        config: Prior, fusion, backbone and head, and the sizes that the data dictates.
        parts: Backbone and prior if they exist already; None builds those of the config.
    """

    backbone: Any
    prior: Any
    project: Mlp
    fusion: Any
    head: Any

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
            self.project = Mlp(prior.width, width, width)
            self.fusion = make_fusion(width, config.fusion, self.backbone.grid)
            self._check_token_count()
        self.head = make_action_head(config.head, width, config.chunk_size, config.action_dim)

    def loss(
        self,
        observation: Observation,
        actions: Tensor,  # [b t a], normalised
        is_pad: Tensor | None = None,  # [b t], True after the end of the episode
        noise: Tensor | None = None,  # [b t a] and [b], as `head.sample_noise_and_time` gives them
        time: Tensor | None = None,
        prior_generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss of each sample, [b]."""
        context, mask = self.encode_context(observation, prior_generator)
        return self.head.loss(context, mask, actions, is_pad, noise, time)

    def sample_actions(
        self, observation: Observation, noise: Tensor, integrate: flow.Integrator = flow.euler
    ) -> Tensor:
        """Return a chunk of normalised actions from noise, [b t a] -> [b t a]; equal noise, equal chunk."""
        context, mask = self.encode_context(observation)
        return self.head.sample(context, mask, noise, integrate)

    def encode_context(
        self, observation: Observation, prior_generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the backbone's context of tokens, instruction and state, [b s d], and its mask [b s]."""
        features = self.semantic_features(observation)
        tokens = self.fuse(features, observation, prior_generator)
        state = observation.state if self.config.head.state else torch.zeros_like(observation.state)
        return self.backbone.encode_context(tokens, observation.text, state, features)

    def encode_observation(
        self, observation: Observation, prior_generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the fused tokens of each view, [b v m d]."""
        return self.fuse(self.semantic_features(observation), observation, prior_generator)

    def fuse(
        self, features: Tensor, observation: Observation, prior_generator: torch.Generator | None = None
    ) -> Tensor:
        """Fuse the image features with those of the prior, [b v c gh gw] -> tokens [b v m d]."""
        semantic = self.backbone.project(features)  # [b v n d]
        if self.prior is None:
            return semantic
        views = semantic.shape[1]
        prior = self.prior_features(observation, prior_generator)
        prior = self.project(rearrange(prior, "b v d gh gw -> b v (gh gw) d"))
        instruction = None
        if self.fusion.reads_instruction:
            instruction = repeat(self.backbone.pool(observation.text), "b d -> (b v) d", v=views)
        fused = self.fusion(semantic.flatten(0, 1), prior.flatten(0, 1), instruction)
        return rearrange(fused, "(b v) m d -> b v m d", v=views)

    def semantic_features(self, observation: Observation) -> Tensor:
        """Return the features of the backbone's image encoder, [b v c gh gw], cached or of the last frames.

        They are zeros in a policy without vision (`backbone.sight=false`).
        """
        features = observation.semantic
        if features is None:
            features = self.backbone.encode(to_float(observation.require_frames("semantic")[:, :, -1]))
        return features if self.config.backbone.sight else torch.zeros_like(features)

    def prior_features(self, observation: Observation, generator: torch.Generator | None = None) -> Tensor:
        """Return the prior's features, [b v d gh gw], cached or computed from the frames.

        Their noise comes from `generator`; None takes the prior's fixed noise.
        """
        if observation.prior is not None:
            return observation.prior
        features = self.prior(to_float(observation.require_frames("prior")), generator)
        return features.to(self.project[0].weight.dtype)

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
