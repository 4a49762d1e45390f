"""A pre-trained policy of LeRobot (SmolVLA, pi0, pi0.5) whose image tokens are fused with a prior's."""

import dataclasses
from collections.abc import Callable, Iterable, Set
from importlib import import_module
from math import isqrt
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from einops import rearrange
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file
from torch import Tensor, nn

from vega_policy.checkpoints import check_checkpoint
from vega_policy.model.config import BASES, BaseConfig
from vega_policy.model.fusion import make_fusion, make_projector
from vega_policy.priors import make_prior
from vega_policy.priors.base import fingerprint_files

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

    from vega_policy.configuration_vega import VegaConfig


class BasedModel(nn.Module):
    """LeRobot's policy with its image embedding wrapped on the instance.

    The change by the fusion is scaled by one learned number that starts at zero, so that a new policy equals
    its base, bit by bit. The prior reads each image as the base's image encoder does: resized and padded by
    the base.

    Raises:
        ValueError: If the fusion or the prior's clips cannot work with a base.
    """

    base: Any
    prior: Any
    fusion: Any
    scale: Tensor

    def __init__(self, config: "VegaConfig") -> None:
        super().__init__()
        if config.prior.shuffle:
            raise ValueError("prior.shuffle is a control of this package's own backbones. Take base=none.")
        if config.prior.clip in ("history", "views") or config.prior.prompt != "empty":
            raise ValueError(
                f"prior.clip={config.prior.clip}, prior.prompt={config.prior.prompt}: a base embeds one "
                "image at a time, without the instruction; take prior.clip=frame or future, and "
                "prior.prompt=empty."
            )
        self.base, self.fingerprint = load_base(config)
        embedder: Any = attrgetter(BASES[config.base.name].embedder)(self.base)
        self._native: Callable[[Tensor], Tensor] = embedder.embed_image
        side, width = self._measure()
        self.__dict__["prior"] = make_prior(config.prior, (side, side))  # not a sub-module
        if self.prior is not None:
            self.project = make_projector(self.prior, width)
            self.fusion = make_fusion(width, config.fusion, (side, side))
            self.scale = nn.Parameter(torch.zeros(()))
            _check_fusion(config, self.fusion, side**2)
            embedder.embed_image = self.embed_image
        self.fresh_noise = config.prior.noise == "fresh"
        if config.base.tune == "lora":
            _add_adapters(self.base, config.base.lora_rank)

    @property
    def gate(self) -> Tensor | None:
        """Weight of the semantic stream in the last forward pass, [b n 1]; None without a gate."""
        return None if self.prior is None else self.fusion.gate

    @property
    def noise_width(self) -> int:
        """Width of the noise that a chunk starts from: the base pads actions."""
        config: Any = self.base.config
        return config.max_action_dim

    def embed_image(self, images: Tensor) -> Tensor:
        """Return fused tokens instead of the base's image tokens, [b 3 h w] in [-1, 1] -> [b n d]."""
        semantic = self._native(images)
        frames = ((images.float() + 1) / 2).clamp(0, 1)[:, None, None]
        fresh = torch.default_generator if self.training and self.fresh_noise else None
        dtype = self.scale.dtype
        prior = rearrange(self.prior(frames, fresh)[:, 0], "b d h w -> b (h w) d").to(dtype)
        plain = semantic.to(dtype)
        fused = self.fusion(plain, self.project(prior), None)
        return (plain + self.scale * (fused - plain)).to(semantic.dtype)

    def frozen_names(self) -> set[str]:
        """Return the names of the base's weights that do not learn; a checkpoint omits them."""
        learning = {name for name, weight in self.named_parameters() if weight.requires_grad}
        return {name for name in self.state_dict() if name.startswith("base.") and name not in learning}

    @torch.no_grad()
    def _measure(self) -> tuple[int, int]:
        """Return the side of the token grid and the token width, measured on one blank image."""
        config: Any = self.base.config
        size = config.resize_imgs_with_padding if config.type == "smolvla" else config.image_resolution
        weight = next(self.base.parameters())
        tokens = self._native(torch.zeros(1, 3, size[1], size[0], device=weight.device))
        side = isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(
                f"The base {config.type!r} has {tokens.shape[1]} tokens per image, which are no square grid."
            )
        return side, tokens.shape[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the prior along with the model (torch calls this for `.to`, `.cuda`, `.half`, ...)."""
        super()._apply(fn, recurse)
        prior: Any = self.__dict__["prior"]
        if prior is not None:
            prior._apply(fn, recurse)
        return self


def _check_fusion(config: "VegaConfig", fusion: Any, n: int) -> None:
    if fusion.reads_instruction or fusion.tokens(n) != n:
        raise ValueError(
            f"fusion={config.fusion.name} cannot work with a base, which embeds images without the "
            f"instruction and takes {n} tokens of each. Take another, such as fusion=token_gate."
        )


def _add_adapters(policy: Any, rank: int) -> None:
    """Freeze a policy and add low-rank adapters where LeRobot puts them for its type."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("base.tune=lora needs PEFT: pip install 'lerobot_policy_vega[vlm]'.") from error
    policy.requires_grad_(False)
    targets = policy._get_default_peft_targets()["target_modules"]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), policy)
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()


NEEDED = ("config.json", "model.safetensors")


def locate_base(base: BaseConfig) -> Path:
    """Return the local folder of a pre-trained policy, downloaded from the hub if need be.

    Raises:
        FileNotFoundError: If files are missing.
    """
    source = base.path or BASES[base.name].source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, revision=base.revision))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
            raise FileNotFoundError(
                f"The base policy {source!r} is neither a local folder nor available from the hub "
                f"({type(error).__name__}). Missing: {', '.join(NEEDED)}. Download it once (`hf download "
                f"{source}`) or give its folder as base.path. A policy without a base: base=none."
            ) from error
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"{folder} is not a pre-trained LeRobot policy: no {', '.join(missing)}. It holds: {held}. Give "
            "another base.path."
        )
    return folder


def base_config(config: "VegaConfig", folder: Path) -> Any:
    """Return the base's own configuration, with the features of a VEGA policy.

    Raises:
        ValueError: If the folder holds a policy of another type or chunk length.
        UnsafeCheckpointError: If a processor beside it names code.
    """
    from lerobot.configs.policies import PreTrainedConfig

    check_checkpoint(folder)
    own: Any = PreTrainedConfig.from_pretrained(folder)
    base = config.base
    if own.type != base.name:
        raise ValueError(f"{folder} holds a policy of type {own.type!r}; base={base.name} needs its own.")
    if own.chunk_size != config.chunk_size:
        raise ValueError(
            f"The base {base.name!r} predicts {own.chunk_size} actions at once; got policy.chunk_size="
            f"{config.chunk_size}. Set policy.chunk_size={own.chunk_size}."
        )
    own.device, own.compile_model = config.device, False
    own.input_features = dict(config.input_features or {})
    own.output_features = dict(config.output_features or {})
    own.train_expert_only = base.tune == "expert"
    own.freeze_vision_encoder = base.tune != "all"
    if base.name == "smolvla":
        own.load_vlm_weights = False  # the base's own file has them
    return own


def load_base(config: "VegaConfig") -> tuple["PreTrainedPolicy", str]:
    """Return the pre-trained policy and the hash over its weights.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the folder holds another policy, weights other than those of `base.fingerprint`, or
            weights that the policy did not load.
    """
    from lerobot.policies.factory import get_policy_class

    folder = locate_base(config.base)
    own = base_config(config, folder)
    fingerprint = fingerprint_files(folder, ["."])
    if config.base.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"This policy was trained on other weights of the base {config.base.name!r}: expected "
            f"fingerprint {config.base.fingerprint}, got {fingerprint} from {folder}. Give base.path (and "
            "base.revision) of the weights it was trained on."
        )
    import_module(f"lerobot.policies.{own.type}.processor_{own.type}")  # registers its processor steps
    policy = get_policy_class(own.type).from_pretrained(folder, config=own)
    check_loaded(policy, folder / "model.safetensors")
    return policy, fingerprint


@torch.no_grad()
def check_loaded(policy: "PreTrainedPolicy", file: Path) -> None:
    """Check that a policy holds the weights of a file: some loaders of LeRobot only print a warning.

    Raises:
        ValueError: If weights are missing or differ.
    """
    stored = load_file(file)
    if policy.config.type != "smolvla":  # the pi policies rename what older versions wrote
        loader: Any = policy
        stored = loader._fix_pytorch_state_dict_keys(stored, policy.config)
    names_by_weight: dict[int, list[str]] = {}  # a file holds a shared weight once, under any of its names
    weights = dict(policy.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        names_by_weight.setdefault(id(weight), []).append(name)
    wrong = []
    for names in names_by_weight.values():
        keys = [key for name in names for key in (name, name.removeprefix("model.")) if key in stored]
        if not keys or not torch.equal(stored[keys[0]].to(weights[names[0]]), weights[names[0]]):
            wrong.append(names[0])
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(names_by_weight)} weights of the base were not loaded from {file}, such "
            f"as {wrong[:3]}. The file was written by another version of LeRobot or is not complete."
        )


def base_processors(
    config: "VegaConfig", dataset_stats: dict[str, dict[str, Tensor]] | None
) -> tuple[Any, Any]:
    """Return the base's own pre- and post-processor, with the features and statistics of new data.

    `dataset_stats` are those of the training data by key; None keeps the base's.
    """
    from lerobot.policies.factory import make_pre_post_processors

    folder = locate_base(config.base)
    own = base_config(config, folder)
    if not (folder / "policy_preprocessor.json").is_file():
        return make_pre_post_processors(own, dataset_stats=dataset_stats)
    device = {"device_processor": {"device": config.device or "cpu"}}
    if dataset_stats is None:
        return make_pre_post_processors(own, pretrained_path=str(folder), preprocessor_overrides=device)
    norm = {"stats": dataset_stats, "norm_map": own.normalization_mapping}
    features = {**own.input_features, **own.output_features}
    return make_pre_post_processors(
        own,
        pretrained_path=str(folder),
        preprocessor_overrides=device | {"normalizer_processor": norm | {"features": features}},
        postprocessor_overrides={"unnormalizer_processor": norm | {"features": own.output_features}},
    )


def with_fingerprint(base: BaseConfig, fingerprint: str) -> BaseConfig:
    """Return the config as a checkpoint stores it."""
    return dataclasses.replace(base, path=base.path or BASES[base.name].source, fingerprint=fingerprint)


def sharing_memory(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names of weights that share memory with a named one; files hold them once."""
    state = model.state_dict(keep_vars=True)
    held = {state[name].data_ptr() for name in names if name in state}
    return {name for name, weight in state.items() if weight.data_ptr() in held}


def refuse_misfits(policy: Any, saved: Set[str], file: str) -> None:
    """Check that the saved names of a checkpoint's file are those of the weights that learn.

    Raises:
        RuntimeError: If some are missing or superfluous.
    """
    held = policy.state_dict()
    frozen = {f"model.{name}" for name in policy.model.frozen_names()}
    shared = sharing_memory(policy, saved)
    missing = [name for name in held if name not in saved | frozen | shared]
    superfluous = sorted(saved - held.keys())
    if missing or superfluous:
        raise RuntimeError(
            f"{file} does not fit the policy: missing {missing[:3]}, superfluous {superfluous[:3]}."
        )
