"""LeRobot's pre-trained policies: where they come from, and whether they really were loaded."""

import dataclasses
from collections.abc import Iterable, Set
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from safetensors.torch import load_file
from torch import Tensor, nn

from vega_policy.bases import BASES, BaseConfig
from vega_policy.priors.weights import fingerprint_files

if TYPE_CHECKING:
    from vega_policy.configuration_vega import VegaConfig

NEEDED = ("config.json", "model.safetensors")


def locate_base(base: BaseConfig) -> Path:
    """Local folder of a pre-trained policy, fetched from the hub if need be.

    Raises:
        FileNotFoundError: If files are missing; names them and says where they may come from.
    """
    source = base.path or BASES[base.name].source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, revision=base.revision))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
            raise FileNotFoundError(
                f"The base policy {source!r} is neither a local folder nor to be had from the hub "
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
    """The base's own configuration, for the features of a VEGA policy.

    Args:
        config: The VEGA policy's configuration.
        folder: Folder of the base.

    Raises:
        ValueError: If the folder holds a policy of another type, or chunks of another length are asked for.
    """
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
        own.load_vlm_weights = False  # they are in the base's own file
    return own


def load_base(config: "VegaConfig") -> tuple[PreTrainedPolicy, str]:
    """The pre-trained policy and the hash over its weights.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the folder holds another policy, or weights other than those a checkpoint was trained
            with, or its weights did not arrive in the policy.
    """
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
def check_loaded(policy: PreTrainedPolicy, file: Path) -> None:
    """Refuse a policy that does not hold the weights of a file: some loaders of LeRobot only print a warning.

    Raises:
        ValueError: Names the first weights that are missing or differ.
    """
    stored = load_file(file)
    if policy.config.type != "smolvla":  # the pi policies rename what older versions wrote
        loader: Any = policy
        stored = loader._fix_pytorch_state_dict_keys(stored, policy.config)
    twins: dict[int, list[str]] = {}  # a file holds weights that are shared once, under any of their names
    weights = dict(policy.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        twins.setdefault(id(weight), []).append(name)
    wrong = []
    for names in twins.values():
        keys = [key for name in names for key in (name, name.removeprefix("model.")) if key in stored]
        if not keys or not torch.equal(stored[keys[0]].to(weights[names[0]]), weights[names[0]]):
            wrong.append(names[0])
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(twins)} weights of the base were not loaded from {file}, such as "
            f"{wrong[:3]}. The file was written by another version of LeRobot or is not complete."
        )


def base_processors(
    config: "VegaConfig", dataset_stats: dict[str, dict[str, Tensor]] | None
) -> tuple[Any, Any]:
    """The base's own pre- and post-processor, for the features and statistics of new data.

    Args:
        config: The VEGA policy's configuration.
        dataset_stats: Statistics of the training data by key; None keeps those that the base holds.
    """
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
    """The config as a checkpoint stores it."""
    return dataclasses.replace(base, path=base.path or BASES[base.name].source, fingerprint=fingerprint)


def twins(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Names of weights that share their memory with one of those named: files hold them once."""
    state = model.state_dict(keep_vars=True)
    held = {state[name].data_ptr() for name in names if name in state}
    return {name for name, weight in state.items() if weight.data_ptr() in held}


def refuse_misfits(policy: Any, saved: Set[str], file: str) -> None:
    """Refuse a checkpoint's weights unless they are those that did not come with the base.

    Args:
        policy: With a base.
        saved: Names of the weights in the file.
        file: Where they are, for the message.

    Raises:
        RuntimeError: If some are missing or superfluous.
    """
    held = policy.state_dict()
    frozen = {f"model.{name}" for name in policy.model.frozen_names()}
    shared = twins(policy, saved)
    missing = [name for name in held if name not in saved | frozen | shared]
    superfluous = sorted(saved - held.keys())
    if missing or superfluous:
        raise RuntimeError(
            f"{file} does not fit the policy: missing {missing[:3]}, superfluous {superfluous[:3]}."
        )
