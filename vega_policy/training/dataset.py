"""Opening a LeRobot dataset, and refusing one the policy cannot learn from."""

from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.feature_utils import dataset_to_policy_features

from vega_policy.training.config import DatasetConfig
from vega_policy.training.dataset_files import damaged_files


class DatasetError(ValueError):
    """The dataset is missing or does not fit the policy."""


def open_dataset(config: DatasetConfig, policy: PreTrainedConfig) -> LeRobotDataset:
    """Opens all episodes, with a chunk of actions at every row.

    Args:
        config: Where the dataset is.
        policy: The policy's config, which says what is read around each row.

    Returns:
        The dataset; frames of videos are uint8.

    Raises:
        DatasetError: If a local root holds no finalized dataset, or a damaged one; names the files and the
            command that collects it.
    """
    if config.root is not None and not (Path(config.root) / "meta" / "info.json").is_file():
        command = config.collect_command or "the command that collects or downloads it"
        raise DatasetError(
            f"No demonstrations in {config.root}: expected a finalized LeRobotDataset (meta/info.json), "
            f"found {_listing(Path(config.root))}. Collect them first: {command}"
        )
    if config.root is not None and (damaged := damaged_files(Path(config.root))):
        raise DatasetError(
            f"{config.root} is damaged or only partly written: {'; '.join(damaged[:5])}. Delete it, then "
            f"collect or download it again{f': {config.collect_command}' if config.collect_command else '.'}"
        )
    meta = LeRobotDatasetMetadata(config.repo_id, root=config.root, revision=config.revision)
    return LeRobotDataset(
        config.repo_id,
        root=config.root,
        revision=config.revision,
        video_backend=config.video_backend,
        delta_timestamps=resolve_delta_timestamps(policy, meta),
        return_uint8=True,
    )


def match_features(policy: PreTrainedConfig, dataset: LeRobotDataset) -> None:
    """Gives the policy the dataset's features, or checks those it expects already.

    Cameras, `observation.state` and `action` are taken; anything else a dataset may hold, such as a
    simulator's state, never reaches a policy.

    Args:
        policy: The policy's config; filled in if it names no features yet.
        dataset: The dataset.

    Raises:
        DatasetError: If a camera, the state or the action is missing or has another width; names what the
            policy expects and what the dataset has.
    """
    seen = (FeatureType.VISUAL, FeatureType.STATE)
    there = dataset_to_policy_features(dataset.meta.features)
    if not policy.input_features:
        policy.input_features = {key: kept for key, kept in there.items() if kept.type in seen}
    if not policy.output_features:
        policy.output_features = {key: kept for key, kept in there.items() if kept.type is FeatureType.ACTION}
    expected = {**policy.input_features, **policy.output_features}
    wrong = [key for key, feature in expected.items() if not _fits(feature, there.get(key))]
    lacking = [
        name
        for name, found in (
            ("observation.images.<camera>", policy.image_features),
            ("observation.state", policy.robot_state_feature),
            ("action", policy.action_feature),
        )
        if not found
    ]
    if wrong or lacking:
        raise DatasetError(
            f"{dataset.repo_id} does not fit the policy ({', '.join(wrong + lacking)}). The policy expects: "
            f"{_names(expected, lacking)}. The dataset has: {_names(there)}. Rename or collect what is "
            "missing, or give policy.input_features that the dataset has."
        )


def _fits(expected: PolicyFeature, found: PolicyFeature | None) -> bool:
    """Same kind and width; a camera may have another size, its frames are resized."""
    if found is None or found.type is not expected.type:
        return False
    return expected.type is FeatureType.VISUAL or tuple(found.shape) == tuple(expected.shape)


def _names(features: dict[str, PolicyFeature], lacking: list[str] | None = None) -> str:
    told = [f"{key} {list(feature.shape)}" for key, feature in features.items()]
    return ", ".join([*told, *(lacking or [])]) or "nothing"


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"
