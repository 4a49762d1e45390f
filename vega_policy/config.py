"""Decode plain nested values, such as a composed Hydra config, into nested frozen dataclasses.

Values that cannot be are refused in one way here, and errors of this distribution distinguished from others.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

import draccus
from draccus.utils import DecodingError, ParsingError

from vega_policy import PACKAGE


def from_config[T](cls: type[T], node: Mapping[str, Any]) -> T:
    """Build a dataclass from plain values; nested dataclasses from nested mappings.

    `node` holds resolved values, field by field; those with a default may be missing. A field whose type is a
    draccus choice class (LeRobot's `PreTrainedConfig`) takes the class that its key `type` names.

    Raises:
        ValueError: If a field is unknown or missing, or a value does not fit its field.
    """
    check_fields(cls, node)
    try:
        return draccus.decode(cls, dict(node))
    except ParsingError as error:
        # Where draccus only says that it could not build a part, the part's own message is the cause.
        cause = None if isinstance(error, DecodingError) else error.__cause__
        raise ValueError(f"Config: {cause or error}") from error


def check_numbers(config: Any, prefix: str, **bounds: str) -> None:
    """Refuse fields of a dataclass outside an interval such as `[0, 1)`, NaN included; None passes.

    Raises:
        ValueError: Names the field as `prefix` and its name, the interval and the value.
    """
    for name, interval in bounds.items():
        value = getattr(config, name)
        if value is None:
            continue
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        is_above = value >= low if interval[0] == "[" else value > low
        is_below = value <= high if interval[-1] == "]" else value < high
        if not (is_above and is_below):
            expected = (
                f"at least {low:g}" if interval.startswith("[") and high == inf else f"a number in {interval}"
            )
            raise ValueError(f"{prefix}{name}: expected {expected}; got {value}.")


def check_choice(path: str, value: Any, known: Collection[Any]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        ValueError: Names the field, the known values and the value.
    """
    if value not in known:
        listed = ", ".join("null" if one is None else str(one) for one in known)
        raise ValueError(f"{path}: expected one of {listed}; got {value!r}.")


def check_choices(config: Any, prefix: str, **known: Collection[Any]) -> None:
    """Refuse fields of a dataclass that have none of their known values.

    Raises:
        ValueError: As `check_choice`; the field is `prefix` and its name.
    """
    for name, values in known.items():
        check_choice(prefix + name, getattr(config, name), values)


def unknown_name(kind: str, name: str, known: Collection[str], near: int = 1) -> ValueError:
    """Return the error for a name that is none of the known ones, with up to `near` similar ones."""
    close = difflib.get_close_matches(name, known, n=near, cutoff=0.4 if near > 1 else 0.6)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ValueError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")


def check_fields(cls: type, node: Mapping[str, Any], path: str = "") -> None:
    """Refuse unknown and missing fields.

    Raises:
        ValueError: At the first such field, with its path; an unknown one with near and known names.
    """
    types, known = get_type_hints(cls), [field.name for field in fields(cls) if field.init]
    for key in node:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {path}{near[0]}?" if near else ""
            raise ValueError(f"Unknown config field {path}{key}.{hint} Known there: {', '.join(known)}.")
    required = [
        field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING
    ]
    missing = [f"{path}{name}" for name in required if name not in node]
    if missing:
        raise ValueError(f"Config: no value for {', '.join(missing)}.")
    for key, value in node.items():
        _check_nested(types[key], value, f"{path}{key}")


def _check_number(cls: type, value: Any, path: str) -> None:
    """Refuse what is no number, under the field's own name: others may refer to it."""
    try:
        cls(value)
    except (TypeError, ValueError):
        kind = "a whole number" if cls is int else "a number"
        given = "null" if value is None else repr(value)
        raise ValueError(f"{path}: expected {kind}; got {given}.") from None


def _check_nested(cls: Any, value: Any, path: str) -> None:
    if cls in (int, float):
        _check_number(cls, value, path)
    if isinstance(cls, type) and issubclass(cls, draccus.ChoiceRegistry):
        check_choice(f"{path}.type", value.get("type"), sorted(cls.get_known_choices()))
        rest = {name: kept for name, kept in value.items() if name != "type"}
        check_fields(cls.get_choice_class(value["type"]), rest, f"{path}.")
    elif isinstance(cls, type) and is_dataclass(cls):
        if not isinstance(value, Mapping):
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"{path}: expected a group of fields ({known}); got {value!r}.")
        check_fields(cls, value, f"{path}.")


def is_own_error(error: BaseException) -> bool:
    """Return whether this distribution's code raised an error, so that its message suffices.

    An error that a process pool brought from another process has its traceback as the text of its cause.
    """
    remote = re.findall(r'^  File "(.+?)", line', getattr(error.__cause__, "tb", ""), re.MULTILINE)
    if remote:
        origin = Path(remote[-1]).resolve()
        return any(origin.is_relative_to(folder) for folder in (PACKAGE, PACKAGE.with_name("envs")))
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(names) and names[-1].partition(".")[0] in ("vega_policy", "envs")


def describe_error(error: BaseException) -> str:
    """Return the message of an error of this distribution, or the whole traceback of another one."""
    if is_own_error(error):
        return f"{type(error).__name__}: {error}"
    return "".join(traceback.format_exception(error))
