"""Where the folders that travel with the package lie: `configs` and `assets`."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """Folder of the given name: inside the package in an installed wheel, in the repository otherwise.

    Args:
        name: `configs` or `assets`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If it lies in neither place; names both.
    """
    places = (PACKAGE / name, PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"{name!r} lies neither in {places[0]} nor in {places[1]}; install the package again."
    )
