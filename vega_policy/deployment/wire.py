"""Plain values on the wire: msgpack without extensions, arrays with a shape, checks that name the fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np


class ProtocolError(ValueError):
    """A message breaks the protocol; `code` is one of the documented ones."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def pack(value: dict[str, Any]) -> bytes:
    """Encode a map of plain values."""
    packed = msgpack.packb(value)
    assert packed is not None  # it is for packers that keep their own buffer only
    return packed


def unpack(data: bytes | str, limit: int) -> dict[str, Any]:
    """Decode one msgpack map of plain values; no extension types, no objects, no unbounded containers.

    Raises:
        ProtocolError: If the message is anything else.
    """
    if isinstance(data, str):
        raise ProtocolError("malformed", "expected a binary message, got text")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=4096,
            max_bin_len=limit,
            max_array_len=1024,
            max_map_len=64,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError("malformed", f"not msgpack as documented: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise ProtocolError("malformed", f"expected a map, got {type(value).__name__}")
    return value


def pack_array(array: np.ndarray, dtype: str) -> dict[str, Any]:
    """Return an array as {shape, data}, in row-major order, as numpy's `dtype` ("u1" or "<f4")."""
    packed = np.ascontiguousarray(array, dtype=dtype)
    return {"shape": list(packed.shape), "data": packed.data}


def check_array(value: Any, dtype: str, shape: Sequence[int | tuple[int, int]], name: str) -> np.ndarray:
    """Return the array of {shape, data}, as a copy.

    Args:
        value: What was received.
        dtype: Numpy's name of the type, "u1" or "<f4"; floating-point values must be finite.
        shape: For each axis its size, or the least and the most.
        name: Name of the field, for the message.

    Raises:
        ProtocolError: If it is anything else.
    """
    if not isinstance(value, dict) or set(value) != {"shape", "data"}:
        raise ProtocolError("malformed", f"{name}: expected an array {{shape, data}}")
    sizes, data = value["shape"], value["data"]
    if not isinstance(sizes, list) or len(sizes) != len(shape) or not isinstance(data, bytes):
        raise ProtocolError("malformed", f"{name}: expected {len(shape)} axes and binary data")
    for size, wanted in zip(sizes, shape, strict=True):
        least, most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        check_integer(size, f"{name}: an axis", least, most)
    if len(data) != int(np.prod(sizes)) * np.dtype(dtype).itemsize:
        raise ProtocolError("malformed", f"{name}: {len(data)} bytes do not make {sizes} of {dtype}")
    array = np.frombuffer(data, dtype).reshape(sizes).copy()
    if dtype == "<f4" and not np.isfinite(array).all():
        raise ProtocolError("malformed", f"{name}: expected finite numbers")
    return array


def check_integer(value: Any, name: str, least: int, most: int) -> int:
    """Return an integer in [least, most], or raise ProtocolError."""
    if type(value) is not int or not least <= value <= most:
        raise ProtocolError("malformed", f"{name}: expected an integer in [{least}, {most}]")
    return value


def check_map(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the map that a field holds, or raise ProtocolError."""
    inner = value.get(name)
    if not isinstance(inner, dict):
        raise ProtocolError("malformed", f"{name}: expected a map")
    return inner


def check_keys(value: Mapping[str, Any], expected: set[str], name: str) -> None:
    """Raise ProtocolError unless a map has exactly these keys."""
    if set(value) != expected:
        raise ProtocolError("malformed", f"{name}: expected exactly the keys {sorted(expected)}")


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Whether it is an integer of at least one."""
    return type(value) is int and 1 <= value <= 2**31


def is_pair(value: Any) -> bool:
    """Whether it is a list of two counts."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value))


def check_fields(value: dict[str, Any], fields: dict[str, Callable[[Any], bool]], name: str) -> None:
    """Raise ProtocolError unless a map has exactly these fields, each of them good."""
    check_keys(value, set(fields), name)
    wrong = [field for field, good in fields.items() if not good(value[field])]
    if wrong:
        raise ProtocolError("malformed", f"{name}: not as documented: {', '.join(wrong)}")
