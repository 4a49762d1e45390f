"""A finished run on the hub: its best checkpoint, else its last, with a card of all that was measured."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from vega_policy.training.checkpoints import PRETRAINED, step_of
from vega_policy.training.config import TrainConfig
from vega_policy.training.model_card import model_card
from vega_policy.training.retention import BEST, CHECKPOINTS, LAST, read_scores

logger = logging.getLogger(__name__)


def push(config: TrainConfig, data: str) -> str:
    """Uploads `pretrained_model` of the best checkpoint to `policy.repo_id`.

    Args:
        config: The run; a token of the hub is expected where huggingface_hub looks for one.
        data: The dataset in a few words.

    Returns:
        Address of the commit.
    """
    run, policy = Path(config.output_dir), config.vega
    assert policy.repo_id is not None  # TrainConfig refuses to push without
    best = run / CHECKPOINTS / BEST
    checkpoint = best if best.exists() else run / CHECKPOINTS / LAST
    step = step_of(checkpoint)
    card = model_card(config, step, read_scores(run).get(step, {}), data)
    api = HfApi()
    api.create_repo(policy.repo_id, private=policy.private, exist_ok=True)
    with TemporaryDirectory() as folder:
        card.save(Path(folder) / "README.md")
        api.upload_folder(
            repo_id=policy.repo_id, folder_path=checkpoint / PRETRAINED, ignore_patterns=["README.md"]
        )
        commit = api.upload_file(
            repo_id=policy.repo_id, path_or_fileobj=Path(folder) / "README.md", path_in_repo="README.md"
        )
    logger.info("Uploaded %s to %s", checkpoint, commit)
    return str(commit)
