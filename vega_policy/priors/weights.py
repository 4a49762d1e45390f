"""Where a prior's weights come from: local folder, hub, or seed; and the fingerprint that names them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

CHUNK = 1 << 24


def locate(source: str, revision: str | None, parts: Iterable[str], way_out: str) -> Path:
    """Local folder that holds the named parts of a checkpoint, fetched from the hub if need be.

    Args:
        source: Local folder in the hub's layout, or hub id.
        revision: Hub revision; None takes the newest.
        parts: Sub-folders that are needed, such as `vae` and `transformer`.
        way_out: Advice for somebody who cannot have these files.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If a part is missing; names it and says where files may come from.
    """
    parts = list(parts)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(source, revision, parts, way_out)
    missing = [f"{part}/config.json" for part in parts if not (folder / part / "config.json").is_file()]
    if missing:
        held = sorted(entry.name for entry in folder.iterdir())[:12]
        raise FileNotFoundError(
            f"{folder} is not a checkpoint in the hub's layout: no {', '.join(missing)}. "
            f"It holds: {', '.join(held) or 'nothing'}. {way_out}"
        )
    return folder


def _fetch(source: str, revision: str | None, parts: list[str], way_out: str) -> Path:
    patterns = [f"{part}/*" for part in parts] + ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The prior's weights {source!r} are neither a local folder nor to be had from the hub "
            f"({type(error).__name__}). Missing: {', '.join(f'{part}/' for part in parts)}. "
            f"Download them once (`hf download {source}`) or give their folder as prior.path. {way_out}"
        ) from error


def check_class(folder: Path, expected: str) -> None:
    """Refuse a part whose config names another class than the one that will read it.

    Args:
        folder: A checkpoint's part, such as `<checkpoint>/vae`.
        expected: Class name, as diffusers or transformers wrote it.

    Raises:
        ValueError: If the folder holds another architecture.
    """
    config = json.loads((folder / "config.json").read_text())
    found = config.get("_class_name") or ", ".join(config.get("architectures") or ["no class"])
    if found != expected:
        raise ValueError(f"{folder} holds {found}; this prior needs {expected}.")


def fingerprint_files(folder: Path, parts: Iterable[str]) -> str:
    """Hash over names and bytes of the safetensors files of a checkpoint's parts, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((folder / part).glob("*.safetensors")):
            digest.update(f"{part}/{path.name}".encode())
            with path.open("rb") as file:
                while block := file.read(CHUNK):
                    digest.update(block)
    return digest.hexdigest()[:16]


def fingerprint_seed(seed: int, architecture: Any) -> str:
    """Hash over what determines seeded weights, 16 hexadecimal digits."""
    text = json.dumps({"seed": seed, "architecture": architecture}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
