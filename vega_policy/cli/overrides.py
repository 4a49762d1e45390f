"""What the scripts say about a command line before Hydra composes it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from vega_policy.resources import resource

OTHER_SOURCES = (
    "--config-dir",
    "-cd",
    "--config-path",
    "-cp",
    "hydra.searchpath",
)  # options that lie there are known to Hydra alone


def refuse_unknown_options(arguments: Sequence[str] | None = None) -> None:
    """Ends the program if a group is asked for an option that it does not have, such as `env=libero_spatail`.

    Hydra's own message lists every option of the group; this one begins with the near ones.

    Args:
        arguments: of the command line; None takes the program's own.

    Raises:
        SystemExit: with the message.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if any(argument.startswith(OTHER_SOURCES) for argument in given):
        return
    problems = [problem for override in _overrides(given) for problem in _unknown(override)]
    if problems:
        sys.exit("\n".join(problems))


def refuse_missing_fields(config: DictConfig) -> None:
    """Ends the program if a field without a default, such as the checkpoint of an evaluation, is not given.

    Args:
        config: as Hydra composed it.

    Raises:
        SystemExit: with the message.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        fields = " ".join(f"{name}=..." for name in missing)
        sys.exit(
            f"not given: {', '.join(missing)}; add {fields} to the command line (--help tells what it is)"
        )


def _overrides(arguments: Sequence[str]) -> list[Override]:
    """Those of the arguments that Hydra's own parser takes; what is wrong with the others, Hydra says."""
    parser, parsed = OverridesParser.create(), []
    for argument in arguments:
        try:
            parsed += parser.parse_overrides([argument])
        except OverrideParseException:
            continue
    return parsed


def _unknown(override: Override) -> list[str]:
    group = override.key_or_group
    folder = resource("configs") / group
    if override.is_delete() or group.startswith("hydra") or not folder.is_dir():
        return []
    options = sorted(path.stem for path in folder.glob("*.yaml"))
    value = override.value()
    if isinstance(value, ChoiceSweep):
        value = value.list
    named = value if isinstance(value, list) else [value]
    names = [name for name in named if isinstance(name, str) and name != "null"]
    return [_message(group, name, options) for name in names if name not in options]


def _message(group: str, name: str, options: list[str]) -> str:
    near = difflib.get_close_matches(name, options, n=5, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'{group}={one}' for one in near)}? " if near else ""
    return f"there is no {group}={name}; {hint}The group {group} has: {', '.join(options)}"
