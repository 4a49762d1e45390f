"""Frozen dataclasses of a policy's configuration, importable without torch or LeRobot.

`VegaConfig` (LeRobot's side) and `VegaModel` share them. Their defaults are the method of VEGA-3D (arXiv
2603.19235): Wan2.1-T2V-1.3B read at block 20 and noise level 0.3, fused by a token gate.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points

from vega_policy.config import check_choices, check_numbers, unknown_name

STRIDE = 16
"""Pixels of a token of the compact backbone."""

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a decoder block under the names that Llama, Gemma and Qwen share."""

DTYPES = ("float32", "bfloat16", "float16")
RESIZES = ("stretch", "pad")
"""How frames of another shape become square."""


@dataclass(frozen=True)
class PriorConfig:
    """The latent world simulator, and where it is read. None takes the default of the registered prior."""

    name: str = "wan2.1_t2v_1.3b"  # key of `vega_policy.priors.PRIORS`; `none` removes the geometric stream
    path: str | None = None  # hub id, or local folder in the hub's layout
    revision: str | None = None  # hub revision (branch, tag or commit)
    # 0-based block that is read; of several: their features joined
    layer: int | tuple[int, ...] | None = None
    # Fraction in [0, 1] of noise on the straight path; with clip=future of the slots alone, 1 by default.
    noise_level: float | None = None
    noise: str = "fixed"  # `fixed`: one seeded noise for all frames; `fresh`: new noise in each training step
    seed: int = 0  # of the fixed noise, and of the weights of priors without a checkpoint
    input_size: int | None = None  # side in pixels of the prior's frames; None: its tokens fall on the grid
    dtype: str | None = None  # of the frozen weights
    prompt_file: str | None = None  # safetensors file, key `prompt` [n d]; None: from the text encoder, once
    # One video is: `frame`, `history` (last frames of a camera), `views` (all cameras), or `future` (a clean
    # frame, and noise behind it).
    clip: str = "frame"
    clip_frames: int = 5  # frames of a history, 1 + 4k
    future_slots: int = 2  # latents of noise behind the frame, each of four video frames
    # How the frame and its slots become one token a place: their `mean`, `concat` (the width multiplies), or
    # `attention` of the frame to all slots, which is trained.
    slot_pool: str = "concat"
    shuffle: bool = False  # control: training gives each sample the features of another one of its batch
    prompt: str = "empty"  # of clip=future: `empty`, or the `instruction`, encoded as in the prior's training
    fingerprint: str | None = None  # hash over the weights, filled in by the policy; others are refused
    # `plain`: diffusers; `fast`: one captured batch size on CUDA; `auto`: fast if it can
    engine: str = "auto"

    def __post_init__(self) -> None:
        clips, engines = ("frame", "history", "views", "future"), ("plain", "fast", "auto")
        check_choices(
            self, "prior.", clip=clips, noise=("fixed", "fresh"), engine=engines, dtype=(None, *DTYPES)
        )
        check_choices(
            self, "prior.", slot_pool=("mean", "concat", "attention"), prompt=("empty", "instruction")
        )
        check_numbers(self, "prior.", noise_level="[0, 1]", future_slots="[1, inf)")
        self._check_future()
        if self.clip_frames < 1 or self.clip_frames % 4 != 1:
            raise ValueError(
                "prior.clip_frames is 1 + 4k (1, 5, 9, ...), as video autoencoders require; got "
                f"{self.clip_frames}."
            )
        if self.engine == "fast" and self.clip in ("history", "views"):
            raise ValueError(
                f"prior.engine={self.engine} reads single frames; prior.clip={self.clip} needs "
                "prior.engine=auto or plain."
            )

    def _check_future(self) -> None:
        layers = self.layers
        if isinstance(self.layer, tuple) and (not layers or sorted(set(layers)) != list(layers)):
            raise ValueError(f"prior.layer: expected different layers in rising order; got {list(layers)}.")
        if self.prompt == "instruction" and self.clip != "future":
            raise ValueError(
                f"prior.prompt=instruction describes what happens next: it needs prior.clip=future; got "
                f"prior.clip={self.clip}."
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read; empty where `layer` is open."""
        if self.layer is None:
            return ()
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)


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
"""Name -> "module:class", constructed with (width, config, grid). A new fusion is one class and one line,
here or in another package under the entry points `vega_policy.fusions`.
"""


def registered_elsewhere(kind: str, own: Collection[str]) -> dict[str, str]:
    """Return name -> "module:attribute" of the entry points `vega_policy.<kind>`; nothing is imported.

    Raises:
        ValueError: If another package registers a name of this one, or two packages the same.
    """
    found: dict[str, str] = {}
    for point in entry_points(group=f"vega_policy.{kind}"):
        package = point.dist.name if point.dist else point.value
        if point.name in own or found.get(point.name, point.value) != point.value:
            raise ValueError(
                f"The package {package!r} registers {kind} {point.name!r}, which exists already. Rename "
                "its entry point, or uninstall it."
            )
        found[point.name] = point.value
    return found


FUSIONS |= registered_elsewhere("fusions", FUSIONS)


@dataclass(frozen=True)
class FusionConfig:
    """How the semantic and the prior token of one place become one token."""

    name: str = "token_gate"  # key of `FUSIONS`
    blend: str = "residual"  # of gates: `raw` (paper), `normalized` (scene code), `residual` (recommended)
    residual_scale: float = 0.2  # initial value of the learned scale of the residual blend
    gate_bias: float | None = None  # initial bias of the logit; positive opens the semantic stream
    # The logit reads 2 * width normalised numbers: one Adam step can move it by 2 * width * learning rate.
    gate_lr_scale: float = 1.0  # learning rate of the gate's logit as a fraction of `optimizer_lr`
    context_scale: float = 1.0  # initial factor of the instruction's term in the logit
    layers: int = 1  # of cross-attention; the paper has 1 and 3
    heads: int = 8  # of cross-attention; divides the token width

    def __post_init__(self) -> None:
        check_choices(self, "fusion.", blend=("raw", "normalized", "residual"))
        check_numbers(self, "fusion.", layers="[1, inf)", heads="[1, inf)", gate_lr_scale="(0, inf]")
        finite = dict.fromkeys(("gate_bias", "residual_scale", "context_scale"), "(-inf, inf)")
        check_numbers(self, "fusion.", **finite)


@dataclass(frozen=True)
class BackboneConfig:
    """The vision-language backbone that reads the fused tokens with the instruction."""

    name: str = "compact"  # key of `vega_policy.backbones.BACKBONES`
    pretrained: bool = True  # start from pre-trained weights
    sight: bool = True  # False: image features are zeros, so that only state and instruction remain
    freeze_image_encoder: bool = False

    # The compact backbone.
    image_encoder: str = "tf_efficientnet_lite0"  # timm name, or a folder that timm loads; read at stride 16
    text_encoder: str | None = None  # folder or hub id of a sentence encoder; None: the packaged MiniLM
    freeze_text_encoder: bool = False
    text_encoder_fingerprint: str | None = None  # of packaged weights that an exported policy leaves out
    width: int = 384  # of the trunk's tokens
    depth: int = 4
    heads: int = 6
    latents: int | None = None  # tokens into which each view is resampled; None keeps all tokens
    dropout: float = 0.0  # in the trunk, in [0, 1)

    # Image-text-to-text models of transformers.
    path: str | None = None  # hub id or local folder; None takes that of the registered backbone
    revision: str | None = None
    layer: int | None = None  # 0-based block whose output is the context; None: behind the final norm
    dtype: str = "float32"
    attention: str | None = None  # transformers' `attn_implementation`
    freeze_connector: bool = False
    freeze_language_model: bool = False  # gradients still pass through it to the fusion
    lora_rank: int = 0  # 0: no adapters; else the language model is frozen but for them
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = LORA_TARGETS
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("width", "heads", "latents", "lora_alpha"), "[1, inf)")
        check_numbers(self, "backbone.", **sizes, depth="[0, inf)", lora_rank="[0, inf)", dropout="[0, 1)")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"backbone.width must be a multiple of 4 and of backbone.heads; got width {self.width}, "
                f"heads {self.heads}."
            )
        check_choices(self, "backbone.", dtype=DTYPES)
        if self.name == "compact":
            self._check_compact()

    def _check_compact(self) -> None:
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
        """Whether training leaves the semantic features unchanged, so that they can be cached."""
        return self.freeze_image_encoder and (self.name == "compact" or self.freeze_connector)


PREFIX_ACTIONS = ("clean", "executed")


@dataclass(frozen=True)
class ActionHeadConfig:
    """The action head that turns the context into a chunk of actions."""

    name: str = "flow"  # key of `vega_policy.model.action_head.ACTION_HEADS`
    width: int = 384
    depth: int = 4
    heads: int = 6
    steps: int = 10  # integration steps from noise to actions
    time_power: float = 1.5  # training times are Beta(time_power, 1); above 1 prefers noise (pi0: 1.5)
    state: bool = True  # False: the policy gets a state of zeros
    dropout: float = 0.0  # on each branch of the blocks, in [0, 1)
    # training for delay: most actions under way that a chunk is conditioned on; 0: none
    prefix_steps: int = 0
    prefix_dropout: float = 0.5  # part of the training samples without a prefix
    # actions in the prefix: the targets (`clean`), or those with the noise that the robot executed
    prefix_actions: str = "clean"

    def __post_init__(self) -> None:
        check_numbers(self, "head.", width="[1, inf)", heads="[1, inf)", steps="[1, inf)", depth="[0, inf)")
        check_numbers(self, "head.", time_power="(0, inf)", dropout="[0, 1)", prefix_dropout="[0, 1)")
        check_numbers(self, "head.", prefix_steps="[0, inf)")
        check_choices(self, "head.", prefix_actions=PREFIX_ACTIONS)
        if self.prefix_actions == "executed" and not self.prefix_steps:
            raise ValueError(
                "head.prefix_actions=executed needs a prefix: expected head.prefix_steps of at least 1; got "
                "0. Set it, or head.prefix_actions=clean."
            )
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"head.width must be even and a multiple of head.heads; got width {self.width}, "
                f"heads {self.heads}."
            )


@dataclass(frozen=True)
class ForecastConfig:
    """Auxiliary head that predicts the semantic encoder's tokens of later frames; off by default."""

    weight: float = 0.0  # of its loss beside that of the actions; 0: no loss
    steps: tuple[int, ...] = (4, 8)  # control steps ahead
    read: bool = False  # the action head reads the predicted tokens behind the context
    width: int = 256
    depth: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        check_numbers(self, "forecast.", weight="[0, inf)", depth="[1, inf)", heads="[1, inf)")
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise ValueError(
                f"forecast.steps: expected different numbers of control steps; got {list(self.steps)}."
            )
        if self.width % self.heads:
            raise ValueError(
                f"forecast.width must be a multiple of forecast.heads; got width {self.width}, heads "
                f"{self.heads}."
            )

    @property
    def is_on(self) -> bool:
        """Whether the head exists."""
        return self.weight > 0 or self.read


@dataclass(frozen=True)
class DisplacementConfig:
    """Auxiliary head that predicts where the target is from the gripper; off by default.

    The action head is conditioned on the prediction (arXiv 2606.27663).
    """

    weight: float = 0.0  # of its mean absolute error in metres beside the loss of the actions; 0: no head
    noise: float = 0.02  # m, standard deviation of what training adds to the prediction that is read
    width: int = 256
    heads: int = 4

    def __post_init__(self) -> None:
        check_numbers(self, "displacement.", weight="[0, inf)", noise="[0, inf)", heads="[1, inf)")
        if self.width % self.heads:
            raise ValueError(
                f"displacement.width must be a multiple of displacement.heads; got width {self.width}, heads "
                f"{self.heads}."
            )


@dataclass(frozen=True)
class ModelConfig:
    """All that `VegaModel` needs: its parts and the sizes that the data dictates."""

    views: int  # cameras v
    state_dim: int  # width s of the proprioceptive state
    action_dim: int  # width a of an action
    chunk_size: int = 16  # actions t in a chunk
    frame_size: int = 224  # side of the square frames in pixels
    resize: str = "stretch"  # how frames of another shape become square: `stretch` or `pad`
    prior: PriorConfig = field(default_factory=PriorConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: ActionHeadConfig = field(default_factory=ActionHeadConfig)
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    displacement: DisplacementConfig = field(default_factory=DisplacementConfig)

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("views", "action_dim", "chunk_size", "frame_size"), "[1, inf)")
        check_numbers(self, "policy.", **sizes, state_dim="[0, inf)")
        if self.forecast.is_on and (self.backbone.name != "compact" or not self.backbone.sight):
            raise ValueError(
                "policy.forecast predicts what the compact backbone's image encoder will see: it needs "
                f"backbone=compact with backbone.sight=true; got backbone={self.backbone.name}, "
                f"sight={str(self.backbone.sight).lower()}. Set policy.forecast.weight=0."
            )
        if self.head.prefix_steps >= self.chunk_size:
            raise ValueError(
                f"head.prefix_steps must be below chunk_size ({self.chunk_size}); got "
                f"{self.head.prefix_steps}."
            )
        check_choices(self, "policy.", resize=RESIZES)
        if not self.backbone.sight and self.prior.name != "none":
            raise ValueError(
                f"backbone.sight=false removes all vision, but prior={self.prior.name} reads the frames. "
                "Take prior=none, or experiment=blind."
            )


@dataclass(frozen=True)
class BaseEntry:
    """A pre-trained policy of LeRobot that can be built upon."""

    source: str  # hub id
    embedder: str  # dotted path from LeRobot's policy to the module with `embed_image`


BASES = {
    "smolvla": BaseEntry("lerobot/smolvla_base", "model.vlm_with_expert"),
    "pi0": BaseEntry("lerobot/pi0_base", "model.paligemma_with_expert"),
    "pi05": BaseEntry("lerobot/pi05_base", "model.paligemma_with_expert"),
}
"""LeRobot policy type -> entry."""

TUNES = ("all", "expert", "lora")


@dataclass(frozen=True)
class BaseConfig:
    """The pre-trained policy that is built upon; it replaces `backbone` and `head`."""

    name: str = "none"  # key of `BASES`, or `none`
    path: str | None = None  # hub id or local folder; None takes the entry's source
    revision: str | None = None  # hub revision (branch, tag or commit)
    tune: str = "expert"  # what learns besides projector and fusion: `all`, its action `expert`, or `lora`
    lora_rank: int = 16  # adapters are where LeRobot puts them for this policy
    fingerprint: str | None = None  # hash over the weights, filled in by the policy; others are refused

    def __post_init__(self) -> None:
        if self.name != "none" and self.name not in BASES:
            raise unknown_name("base", self.name, ["none", *BASES])
        check_choices(self, "base.", tune=TUNES)
        check_numbers(self, "base.", lora_rank="[1, inf)")
