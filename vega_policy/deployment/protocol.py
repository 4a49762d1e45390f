"""Messages between robot and policy server, version 1: msgpack over WebSocket, one schema a message.

A client opens `ws(s)://host:port/v1` with the subprotocol `vega-policy.v1` and, where the server has a token,
the header `Authorization: Bearer <token>`. The server begins with `Hello`; to each `PredictMessage` it
answers `ActionsMessage` or `ErrorMessage`. A message is one binary WebSocket message: a msgpack map with
exactly the fields of its class, and `type`, the class's `tag`.

b rows, one observation each, share a message; a robot sends b = 1. `frames` are RGB and upright, u8 [b h w
3], or u8 [b t h w 3] of the last t = `history` frames where that is not 1. `state` f32 [b s] and `actions`
f32 [b t a] are in the robot's units; `noise` is f32 [b t a], or None for the server's own (the same at every
call). `session` repeats the value of hello and `sequence` grows with each request, so that a recorded message
is invalid in another session, and the second time in the same one. `rtc` requests real-time chunking of one
row.

Error codes: malformed, session, sequence, rate, policy. After too many malformed messages, or one that is too
large, the server closes the connection (1008, 1009); when it shuts down, after running requests, with 1001.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from vega_policy.evaluation.policies import ObservationBatch, PolicyDescription

VERSION = 1
SUBPROTOCOL = "vega-policy.v1"
PATH = "/v1"
SESSION_BYTES = 16

Count = Annotated[int, Meta(ge=1, le=2**31)]
Size = Annotated[int, Meta(ge=0, le=2**31)]
SequenceNumber = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Name = Annotated[str, Meta(max_length=512)]
Names = Annotated[tuple[Name, ...], Meta(max_length=16)]
Session = Annotated[bytes, Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]


class ProtocolError(ValueError):
    """A message violates the protocol; `code` is one of the documented error codes."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class RTCContext:
    """The chunk that is being executed, for real-time chunking (Black et al., arXiv 2506.07339)."""

    actions: np.ndarray  # still to be executed, float32 [t a], in the robot's units
    delay: int  # number of them that are executed before the new chunk arrives
    horizon: int  # number of them that guide the new chunk
    guidance: float  # largest weight of the guidance


class Schema(Struct, frozen=True, forbid_unknown_fields=True):
    """A map with exactly the declared fields."""


class Array(Schema, frozen=True):
    """An array, row-major and little-endian."""

    shape: Annotated[tuple[Size, ...], Meta(max_length=5)]
    data: memoryview

    @classmethod
    def pack(cls, array: np.ndarray, dtype: str) -> Array:
        """Return an array of numpy's type `dtype` ("u1" or "<f4") as a message field."""
        packed = np.ascontiguousarray(array, dtype=dtype)
        return cls(packed.shape, packed.data)

    def unpack(self, dtype: str, shape: Sequence[int | tuple[int, int]], name: str) -> np.ndarray:
        """Return the values as a writable array, after checking shape, number of bytes and finiteness.

        `shape` has the size of each axis, or its smallest and largest size; `name` is for the error message.
        """
        bounds = [size if isinstance(size, tuple) else (size, size) for size in shape]
        if len(self.shape) != len(bounds) or not all(
            low <= size <= high for size, (low, high) in zip(self.shape, bounds, strict=True)
        ):
            raise ProtocolError("malformed", f"{name}: expected the shape {bounds}, got {list(self.shape)}")
        size = int(np.prod(self.shape)) * np.dtype(dtype).itemsize
        if len(self.data) != size:
            raise ProtocolError(
                "malformed",
                f"{name}: expected {size} bytes for {self.shape} of {dtype}, got {len(self.data)}",
            )
        array = np.frombuffer(self.data, dtype).reshape(self.shape).copy()
        if dtype == "<f4" and not np.isfinite(array).all():
            raise ProtocolError("malformed", f"{name}: expected finite numbers")
        return array


class MessageLimits(Schema, frozen=True):
    """Size and rate limits of requests."""

    message_bytes: Count
    rows: Count  # observations of a request
    frame_side: Count  # largest height or width of a frame in pixels
    requests_per_second: Annotated[float, Meta(gt=0, lt=1e9)]  # of one session


class ServedDescription(Schema, frozen=True):
    """The served policy: the fields of `PolicyDescription`, and those of `ServedPolicy`."""

    name: Name
    prior: Name
    cameras: Names
    state_size: Count | None
    action_size: Count
    action_steps: Count
    history: Count
    fingerprint: Name
    noise_shape: tuple[Count, Count] | None  # [t a]
    supports_rtc: bool

    @property
    def policy(self) -> PolicyDescription:
        """The data that the policy was trained on."""
        names = [field.name for field in fields(PolicyDescription)]
        return PolicyDescription(**{name: getattr(self, name) for name in names})


class Hello(Schema, frozen=True, tag_field="type", tag="hello"):
    """First message of a session."""

    version: int
    session: Session
    policy: ServedDescription
    limits: MessageLimits


class RTCMessage(Schema, frozen=True):
    """`RTCContext` in a message."""

    actions: Array
    delay: Annotated[int, Meta(ge=0, le=1024)]
    horizon: Annotated[int, Meta(ge=1, le=1024)]
    guidance: Annotated[float, Meta(gt=0, le=1000)]


class PredictMessage(Schema, frozen=True, tag_field="type", tag="predict"):
    """A request."""

    session: bytes
    sequence: SequenceNumber
    frames: Annotated[dict[Name, Array], Meta(max_length=16)]
    state: Array
    instructions: Annotated[list[Name], Meta(min_length=1, max_length=1024)]
    noise: Array | None
    rtc: RTCMessage | None


class ActionsMessage(Schema, frozen=True, tag_field="type", tag="actions"):
    """An answer: a chunk for each row, and the seconds spent in the model and on the server in all."""

    sequence: SequenceNumber
    actions: Array
    model_seconds: float
    server_seconds: float


class ErrorMessage(Schema, frozen=True, tag_field="type", tag="error"):
    """A refusal."""

    sequence: SequenceNumber | None
    code: Name
    message: str


@dataclass(frozen=True)
class Request:
    """A checked request."""

    sequence: int
    batch: ObservationBatch
    noise: np.ndarray | None
    rtc: RTCContext | None


class Reply(NamedTuple):
    """Predicted actions, float32 [b t a], and the seconds spent in the model and on the server in all."""

    actions: np.ndarray
    model_seconds: float
    server_seconds: float


def encode(message: Schema) -> bytes:
    """Encode a message."""
    return msgspec.msgpack.encode(message)


def decode_hello(data: bytes | str) -> Hello:
    """Decode the server's first message; a ProtocolError if it violates the schema or the version."""
    hello = _decode(data, Hello)
    if hello.version != VERSION:
        raise ProtocolError("malformed", f"expected protocol version {VERSION}, got {hello.version}")
    return hello


def encode_request(session: bytes, request: Request) -> bytes:
    """Encode a request."""
    batch, noise, rtc = request.batch, request.noise, request.rtc
    context = None
    if rtc is not None:
        context = RTCMessage(Array.pack(rtc.actions, "<f4"), rtc.delay, rtc.horizon, rtc.guidance)
    message = PredictMessage(
        session,
        request.sequence,
        {camera: Array.pack(frames, "u1") for camera, frames in batch.frames.items()},
        Array.pack(batch.state, "<f4"),
        list(batch.instructions),
        None if noise is None else Array.pack(noise, "<f4"),
        context,
    )
    return encode(message)


def decode_request(
    data: bytes | str, session: bytes, last: int, served: ServedDescription, limits: MessageLimits
) -> Request:
    """Decode a request and check it against the session, the policy and the limits.

    `last` is the sequence number of the session's last request, -1 before the first.

    Raises:
        ProtocolError: At the first violation.
    """
    message = _decode(data, PredictMessage)
    if message.session != session:
        raise ProtocolError("session", "the message belongs to another session")
    if message.sequence <= last:
        raise ProtocolError("sequence", f"sequence must grow: {message.sequence} came after {last}")
    rows, policy = len(message.instructions), served.policy
    if rows > limits.rows:
        raise ProtocolError("malformed", f"instructions: expected 1 to {limits.rows} rows, got {rows}")
    if set(message.frames) != set(policy.cameras):
        raise ProtocolError("malformed", f"frames: expected exactly the cameras {sorted(policy.cameras)}")
    side = (16, limits.frame_side)
    shape = (*policy.frame_axes(rows), side, side, 3)
    frames = {name: message.frames[name].unpack("u1", shape, name) for name in policy.cameras}
    state = message.state.unpack("<f4", (rows, policy.state_size or (0, 256)), "state")
    noise = None
    if message.noise is not None:
        if served.noise_shape is None:
            raise ProtocolError("malformed", "noise: this policy takes none")
        noise = message.noise.unpack("<f4", (rows, *served.noise_shape), "noise")
    rtc = None
    if message.rtc is not None:
        if not served.supports_rtc or rows != 1:
            raise ProtocolError("malformed", "rtc: expected one row, and a policy that supports it")
        actions = message.rtc.actions.unpack("<f4", ((1, 1024), policy.action_size), "rtc.actions")
        rtc = RTCContext(actions, message.rtc.delay, message.rtc.horizon, message.rtc.guidance)
    return Request(message.sequence, ObservationBatch(frames, state, message.instructions), noise, rtc)


def decode_answer(data: bytes | str, sequence: int) -> Reply:
    """Decode the answer to a request.

    Raises:
        ProtocolError: If the server reported an error (with its code), or the answer is not to that request.
    """
    answer: ActionsMessage | ErrorMessage = _decode(data, ActionsMessage | ErrorMessage)
    if isinstance(answer, ErrorMessage):
        raise ProtocolError(answer.code, f"the server refused: {answer.message}")
    if answer.sequence != sequence:
        raise ProtocolError("malformed", f"expected the answer to {sequence}, got that to {answer.sequence}")
    axis = (1, 1024)
    actions = answer.actions.unpack("<f4", (axis, axis, axis), "actions")
    return Reply(actions, answer.model_seconds, answer.server_seconds)


def read_token(path: Path | None) -> str | None:
    """Read a token from a file; None for None.

    Raises:
        PermissionError: If others may read the file.
        ValueError: If the file holds anything but one token, so that no other file is sent to a server.
    """
    if path is None:
        return None
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise PermissionError(
            f"{path} can be read by other users (mode {mode:o}): run chmod 600 {path}, and make a new token"
        )
    token = path.read_bytes().strip()
    if not re.fullmatch(rb"[!-~]{1,512}", token):
        raise ValueError(
            f"{path}: expected one line of at most 512 visible ASCII characters, found {len(token)} bytes of "
            'something else; run: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return token.decode()


def _decode(data: bytes | str, schema: Any) -> Any:
    if isinstance(data, str):
        raise ProtocolError("malformed", "expected a binary message, got text")
    try:
        return msgspec.msgpack.decode(data, type=schema)
    except (ValueError, RecursionError) as error:  # msgspec's errors, and text that is not UTF-8
        raise ProtocolError("malformed", str(error)) from error
