"""The frozen parts of a policy's configuration: plain values, importable without torch or LeRobot.

`VegaConfig` (LeRobot's side) and `VegaModel` (the method's side) share these classes. Their defaults are the
method of VEGA-3D (arXiv 2603.19235): Wan2.1-T2V-1.3B read at layer 20 and noise level 0.3, mixed in by a
token gate.
"""

from dataclasses import dataclass, field, fields

STRIDE = 16
"""Pixels of a token of the compact backbone."""

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a decoder block under the names that Llama, Gemma and Qwen share."""


@dataclass(frozen=True)
class PriorConfig:
    """Which latent world simulator is read, and where.

    Attributes:
        name: Entry of the table in `vega_policy.priors`; `none` switches the geometric stream off.
        path: Hub id or local folder in the hub's layout; None takes the entry's own checkpoint.
        revision: Hub revision (branch, tag or commit); None takes the newest.
        layer: 0-based index of the block that is read; None takes the entry's default (20 for Wan2.1-1.3B).
        noise_level: Share t in [0, 1] of noise on the straight path; None takes the entry's default (0.3).
        noise: `fixed` (one seeded noise for every frame) or `fresh` (drawn anew in each training step).
        seed: Seed of the fixed noise, and of the weights of priors that have no checkpoint.
        input_size: Side in pixels to which frames are resized for the prior; None lets its tokens fall on
            the grid.
        dtype: Floating-point type of the frozen weights (`float32`, `bfloat16`); None takes the entry's
            default.
        prompt_file: Safetensors file with the embedding of the empty prompt (key `prompt`, [n d]); None
            computes it once from the checkpoint's text encoder and keeps it.
        clip: What is read as one video: `frame` (each frame for itself, as the paper's code does), `history`
            (the last `clip_frames` of a camera) or `views` (the cameras of one instant).
        clip_frames: Frames of a history, 1 + 4k; only with `clip=history`.
        fingerprint: Hash over the prior's weights, filled in when a policy is built; a checkpoint refuses
            others.
        engine: How features are computed, which changes them by no more than rounding: `plain` (diffusers'
            own modules), `fast` (exact reductions; on CUDA compiled and captured for the first batch size,
            others are refused) or `auto` (fast where it exists; other batch sizes run uncompiled).
    """

    name: str = "wan2.1_t2v_1.3b"
    path: str | None = None
    revision: str | None = None
    layer: int | None = None
    noise_level: float | None = None
    noise: str = "fixed"
    seed: int = 0
    input_size: int | None = None
    dtype: str | None = None
    prompt_file: str | None = None
    clip: str = "frame"
    clip_frames: int = 5
    fingerprint: str | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        if self.clip not in ("frame", "history", "views"):
            raise ValueError(f"prior.clip is 'frame', 'history' or 'views'; got {self.clip!r}.")
        if self.clip_frames < 1 or self.clip_frames % 4 != 1:
            raise ValueError(
                f"prior.clip_frames is 1 + 4k, as video autoencoders want it (1, 5, 9, ...); got "
                f"{self.clip_frames}."
            )
        if self.noise_level is not None and not 0.0 <= self.noise_level <= 1.0:
            raise ValueError(
                "prior.noise_level is the share of noise on the path and lies in [0, 1]; got "
                f"{self.noise_level}."
            )
        if self.noise not in ("fixed", "fresh"):
            raise ValueError(f"prior.noise is 'fixed' or 'fresh'; got {self.noise!r}.")
        if self.engine not in ("plain", "fast", "auto"):
            raise ValueError(f"prior.engine is 'plain', 'fast' or 'auto'; got {self.engine!r}.")
        if self.engine == "fast" and self.clip != "frame":
            raise ValueError(
                f"prior.engine={self.engine} reads single frames; prior.clip={self.clip} needs "
                "prior.engine=auto or plain."
            )
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"prior.dtype is float32, bfloat16, float16 or null; got {self.dtype!r}.")


FUSIONS = {
    "token_gate": "vega_policy.model.fusion:TokenGate",
    "channel_gate": "vega_policy.model.fusion:ChannelGate",
    "instruction_gate": "vega_policy.model.fusion:InstructionGate",
    "add": "vega_policy.model.fusion:Add",
    "weighted": "vega_policy.model.fusion:Weighted",
    "concat": "vega_policy.model.fusion:Concat",
    "sequence_concat": "vega_policy.model.fusion:SequenceConcat",
    "cross_attention": "vega_policy.model.fusion:CrossAttention",
    "prior_only": "vega_policy.model.fusion:PriorOnly",
    "semantic_only": "vega_policy.model.fusion:SemanticOnly",
}
"""Name -> "module:class", constructed with (width, config, grid). A new fusion is one class and one line."""


@dataclass(frozen=True)
class FusionConfig:
    """How semantic and prior tokens of one place become one token.

    Attributes:
        name: Entry of the table in `vega_policy.model.fusion`.
        blend: For gates: `raw` (the paper's equation), `normalized` (released scene code) or `residual`
            (starts near the semantic stream; recommended).
        residual_scale: Initial value of the learned scale s of the `residual` blend.
        gate_bias: Initial bias of the gate's logit; positive opens the semantic stream; None takes the
            fusion's own (0, and -0.5 where the instruction is read).
        gate_lr_scale: Learning rate of the gate's logit, as a share of the policy's `optimizer_lr` (which
            counts for it even where an optimizer is set otherwise). The logit reads 2 * width normalised
            numbers, so that one step of Adam can move it by about 2 * width times the learning rate.
        context_scale: Initial factor of the instruction's summand in the gate's logit.
        layers: Layers of cross-attention; the paper has 1 and 3.
        heads: Heads of cross-attention; divides the token width.
    """

    name: str = "token_gate"
    blend: str = "residual"
    residual_scale: float = 0.2
    gate_bias: float | None = None
    gate_lr_scale: float = 1.0
    context_scale: float = 1.0
    layers: int = 1
    heads: int = 8

    def __post_init__(self) -> None:
        if self.blend not in ("raw", "normalized", "residual"):
            raise ValueError(f"fusion.blend is 'raw', 'normalized' or 'residual'; got {self.blend!r}.")
        if not self.gate_lr_scale > 0:
            raise ValueError(f"fusion.gate_lr_scale must be above 0; got {self.gate_lr_scale}.")
        if self.layers < 1 or self.heads < 1:
            raise ValueError(
                f"fusion.layers and fusion.heads must be at least 1; got {self.layers} and {self.heads}."
            )


@dataclass(frozen=True)
class BackboneConfig:
    """The vision-language backbone that reads the fused tokens with the instruction.

    The first fields concern every backbone, the second group the compact one, the third Hugging Face models.

    Attributes:
        name: Entry of the table in `vega_policy.backbones`.
        pretrained: Whether the encoders (or the whole Hugging Face model) start from pre-trained weights.
        sight: Whether the policy sees; without, its image features are zeros and it learns from state and
            instruction alone, which needs `prior=none`.
        freeze_image_encoder: Keep the image encoder fixed.
        image_encoder: timm model name, or a local folder that timm can load, read at stride 16.
        text_encoder: Folder or hub id of a sentence encoder; None takes the packaged MiniLM.
        freeze_text_encoder: Keep the text encoder fixed.
        width: Token width d of the trunk.
        depth: Number of trunk blocks.
        heads: Attention heads of a trunk block; divides `width`.
        latents: Learned queries into which each view's tokens are resampled; None keeps all tokens.
        dropout: Dropout probability inside the trunk, in [0, 1).
        path: Hub id or local folder of an image-text-to-text model; None takes the entry's own.
        revision: Hub revision; None takes the newest.
        layer: 0-based block of the language model whose output is the context; later blocks are dropped. None
            reads the last hidden state, behind the final norm.
        dtype: Floating-point type of the model's weights (`float32`, `bfloat16`, `float16`).
        attention: Attention implementation of transformers (`eager`, `sdpa`, `flash_attention_2`, ...); None
            takes the model's default.
        freeze_connector: Keep the projector from image features to the language model fixed.
        freeze_language_model: Keep the language model fixed; gradients still pass through it to the fusion.
        lora_rank: Rank of low-rank adapters on the language model, which is then fixed otherwise; 0 for none.
        lora_alpha: Adapters are scaled by lora_alpha / lora_rank.
        lora_targets: Names of the linear layers that get adapters.
        gradient_checkpointing: Compute the language model's blocks twice, to save memory in training.
    """

    name: str = "compact"
    pretrained: bool = True
    sight: bool = True
    freeze_image_encoder: bool = False

    image_encoder: str = "tf_efficientnet_lite0"
    text_encoder: str | None = None
    freeze_text_encoder: bool = False
    width: int = 384
    depth: int = 4
    heads: int = 6
    latents: int | None = None
    dropout: float = 0.0

    path: str | None = None
    revision: str | None = None
    layer: int | None = None
    dtype: str = "float32"
    attention: str | None = None
    freeze_connector: bool = False
    freeze_language_model: bool = False
    lora_rank: int = 0
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = LORA_TARGETS
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"backbone.width must be a multiple of 4 and of backbone.heads; got width {self.width}, "
                f"heads {self.heads}."
            )
        if self.lora_rank < 0:
            raise ValueError(f"backbone.lora_rank is 0 (no adapters) or more; got {self.lora_rank}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"backbone.dtype is float32, bfloat16 or float16; got {self.dtype!r}.")
        if self.name == "compact":
            self._check_compact()

    def _check_compact(self) -> None:
        """Refuse fields that mean nothing to the compact backbone.

        Raises:
            ValueError: If one of them is set.
        """
        defaults = {field.name: field.default for field in fields(self)}
        foreign = ("path", "revision", "layer", "dtype", "attention", "freeze_connector")
        foreign += ("freeze_language_model", "lora_rank", "gradient_checkpointing")
        given = [name for name in foreign if getattr(self, name) != defaults[name]]
        if given:
            raise ValueError(
                f"backbone.{given[0]} concerns Hugging Face models; the compact backbone has none. Choose "
                "one, such as backbone=smolvlm2_500m."
            )

    @property
    def frozen_features(self) -> bool:
        """Whether training leaves the semantic features as they are, so that they can be cached."""
        return self.freeze_image_encoder and (self.name == "compact" or self.freeze_connector)


@dataclass(frozen=True)
class ActionHeadConfig:
    """The action head that turns the context into a chunk of actions.

    Attributes:
        name: Entry of the table in `vega_policy.model.action_head`.
        width: Token width of the head.
        depth: Number of blocks.
        heads: Attention heads; divides `width`.
        steps: Integration steps from noise to actions.
        time_power: Training times are drawn as u ** (1 / time_power), u uniform: a Beta(time_power, 1)
            distribution, which prefers noisy times (pi0 uses 1.5).
        state: Whether the policy knows its proprioceptive state; without, it sees a state of zeros.
    """

    name: str = "flow"
    width: int = 384
    depth: int = 4
    heads: int = 6
    steps: int = 10
    time_power: float = 1.5
    state: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"head.width must be even and a multiple of head.heads; got width {self.width}, "
                f"heads {self.heads}."
            )
        if self.steps < 1:
            raise ValueError(f"head.steps must be at least 1; got {self.steps}.")


@dataclass(frozen=True)
class ModelConfig:
    """All that `VegaModel` needs: the four parts and the sizes that the data dictates.

    Attributes:
        views: Number of cameras v.
        state_dim: Width s of the proprioceptive state.
        action_dim: Width a of an action.
        chunk_size: Actions t in a chunk.
        frame_size: Side of the square frames in pixels.
        prior: The latent world simulator.
        fusion: How its tokens are mixed in.
        backbone: The vision-language backbone.
        head: The action head.
    """

    views: int
    state_dim: int
    action_dim: int
    chunk_size: int = 16
    frame_size: int = 224
    prior: PriorConfig = field(default_factory=PriorConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: ActionHeadConfig = field(default_factory=ActionHeadConfig)

    def __post_init__(self) -> None:
        if not self.backbone.sight and self.prior.name != "none":
            raise ValueError(
                "backbone.sight=false is for a policy that sees nothing, but "
                f"prior={self.prior.name} reads the frames; take prior=none, or experiment=blind."
            )


TUNES = ("all", "expert", "lora")


@dataclass(frozen=True)
class BaseEntry:
    """A line of the table.

    Attributes:
        source: Hub id of the pre-trained policy.
        eyes: Dotted path from LeRobot's policy to the module with `embed_image`.
    """

    source: str
    eyes: str


BASES = {
    "smolvla": BaseEntry("lerobot/smolvla_base", "model.vlm_with_expert"),
    "pi0": BaseEntry("lerobot/pi0_base", "model.paligemma_with_expert"),
    "pi05": BaseEntry("lerobot/pi05_base", "model.paligemma_with_expert"),
}
"""LeRobot policy type -> entry."""


@dataclass(frozen=True)
class BaseConfig:
    """The pre-trained policy that is built upon; with one, `backbone` and `head` of a policy mean nothing.

    Attributes:
        name: Entry of `BASES`, or `none` for a policy of this package's own backbones and heads.
        path: Hub id or local folder of the pre-trained policy; None takes the entry's own.
        revision: Hub revision; None takes the newest.
        tune: What learns besides projector and fusion: `all`, `expert` (its action expert) or `lora`
            (low-rank adapters where LeRobot puts them for this policy).
        lora_rank: Rank of the adapters.
        fingerprint: Hash over the base's weights, filled in when a policy is built; a checkpoint, which holds
            only what differs from the base, refuses others.
    """

    name: str = "none"
    path: str | None = None
    revision: str | None = None
    tune: str = "expert"
    lora_rank: int = 16
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.name != "none" and self.name not in BASES:
            raise ValueError(f"Unknown base {self.name!r}. Known: none, {', '.join(BASES)}.")
        if self.tune not in TUNES:
            raise ValueError(f"base.tune is one of {', '.join(TUNES)}; got {self.tune!r}.")
        if self.lora_rank < 1:
            raise ValueError(f"base.lora_rank must be at least 1; got {self.lora_rank}.")
