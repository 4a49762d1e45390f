"""Where a Hugging Face model comes from: a local folder or the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

NEEDED = ("config.json", "*processor_config.json", "tokenizer*", "*.safetensors")
"""What a model's folder must hold."""

FETCHED = (*NEEDED, "*.json", "*.jinja", "*.txt", "*.model")


def locate_model(name: str, source: str | None, revision: str | None, terms: str | None) -> Path:
    """Local folder of an image-text-to-text model, fetched from the hub if need be.

    Args:
        name: The backbone's name, for messages.
        source: Local folder or hub id; None if neither the config nor the table names one.
        revision: Hub revision; None takes the newest.
        terms: Terms of use of the weights, told where they cannot be had.

    Raises:
        ValueError: If there is no source.
        FileNotFoundError: If files are missing; names them and says where they may come from.
    """
    if source is None:
        raise ValueError(
            f"backbone {name!r} needs backbone.path: the folder or hub id of an image-text-to-text model."
        )
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(source, revision, terms)
    missing = [pattern for pattern in NEEDED if not any(folder.glob(pattern))]
    if missing:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"{folder} is not a complete image-text-to-text model: no {', '.join(missing)}. It holds: "
            f"{held}. {_way_out(terms)}"
        )
    return folder


def _fetch(source: str, revision: str | None, terms: str | None) -> Path:
    skipped = ["*.bin", "*.pth", "*.gguf", "*.onnx*", "onnx/*", "original/*"]
    try:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=list(FETCHED), ignore_patterns=skipped
            )
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The backbone's model {source!r} is neither a local folder nor to be had from the hub "
            f"({type(error).__name__}). Missing: {', '.join(NEEDED)}. Download it once (`hf download "
            f"{source}`) or give its folder as backbone.path. {_way_out(terms)}"
        ) from error


def _way_out(terms: str | None) -> str:
    told = f"Its terms: {terms}. " if terms else ""
    return f"{told}A policy without such a model: backbone=compact (LeRobot: --policy.backbone.name=compact)."
