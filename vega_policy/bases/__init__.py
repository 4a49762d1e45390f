"""Pre-trained vision-language-action policies of LeRobot as a base, given VEGA-3D eyes.

The base is LeRobot's own policy as it was trained: its action expert, flow, real-time chunking and processors
stay. Only its image embedding is wrapped: fused tokens take the place of the image tokens.
"""

from dataclasses import dataclass

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
    """The pre-trained policy that is built upon; with one, `backbone` and `expert` of a policy mean nothing.

    Attributes:
        name: Entry of `BASES`, or `none` for a policy of this package's own backbones and experts.
        path: Hub id or local folder of the pre-trained policy; None takes the entry's own.
        revision: Hub revision; None takes the newest.
        tune: What learns besides projector and fusion: `all`, `expert` (the action expert) or `lora`
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
