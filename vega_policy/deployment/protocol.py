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

At `/` a server can answer the client of another package as well, see `DIALECTS`. `FeatureKeys` maps its names
to the policy's; a request has one row.
"""

from __future__ import annotations

import io
import ipaddress
import re
import stat
import struct
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from PIL import Image

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
Shape = Annotated[tuple[Size, ...], Meta(max_length=5)]


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

    shape: Shape
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
        if array.dtype.kind == "f" and not np.isfinite(array).all():
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


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only; of names, only `localhost` is."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


def decode_answer(data: bytes | str, sequence: int, rows: int, served: ServedDescription) -> Reply:
    """Decode the answer to a request of `rows` observations.

    Raises:
        ProtocolError: If the server reported an error (with its code), or the answer is not to that request,
            or of another shape than the policy's.
    """
    answer: ActionsMessage | ErrorMessage = _decode(data, ActionsMessage | ErrorMessage)
    if isinstance(answer, ErrorMessage):
        raise ProtocolError(answer.code, f"the server refused: {answer.message}")
    if answer.sequence != sequence:
        raise ProtocolError("malformed", f"expected the answer to {sequence}, got that to {answer.sequence}")
    shape = (rows, (served.action_steps, 1024), served.action_size)
    actions = answer.actions.unpack("<f4", shape, "actions")
    return Reply(actions, answer.model_seconds, answer.server_seconds)


class SessionProtocol(Protocol):
    """Messages of one session: the server's own protocol or a dialect."""

    @property
    def greeting(self) -> bytes | None:
        """The server's first message."""
        ...

    def receive(self, data: bytes | str) -> Request | bytes | None:
        """Return a request to predict, an answer to send at once, or None for a message without an answer.

        Raises:
            ProtocolError: If the message violates the protocol.
        """
        ...

    def answer(self, reply: Reply) -> bytes:
        """Encode the actions of the last request."""
        ...

    def refuse(self, error: ProtocolError) -> bytes | str:
        """Encode the refusal of the last message."""
        ...


class VegaSession:
    """Protocol version 1, as described at the top."""

    def __init__(self, secret: bytes, served: ServedDescription, limits: MessageLimits) -> None:
        self.greeting = encode(Hello(VERSION, secret, served, limits))
        self._secret, self._served, self._limits = secret, served, limits
        self._last = -1  # sequence number of the last valid request
        self._current: int | None = None

    def receive(self, data: bytes | str) -> Request:
        """Decode a request; see `decode_request`."""
        self._current = None
        request = decode_request(data, self._secret, self._last, self._served, self._limits)
        self._last = self._current = request.sequence
        return request

    def answer(self, reply: Reply) -> bytes:
        """Encode an `ActionsMessage`."""
        assert self._current is not None
        actions = Array.pack(reply.actions, "<f4")
        return encode(ActionsMessage(self._current, actions, reply.model_seconds, reply.server_seconds))

    def refuse(self, error: ProtocolError) -> bytes:
        """Encode an `ErrorMessage`; its sequence is that of the request, where one was read."""
        return encode(ErrorMessage(self._current, error.code, str(error)[:1000]))


DIALECTS: dict[str, dict[str, dict[str, str | tuple[str, ...]]]] = {
    "openpi": {
        "libero": {
            "observation.images.image": "observation/image",
            "observation.images.image2": "observation/wrist_image",
            "observation.state": "observation/state",
            "task": "prompt",
        },
        "droid": {
            "observation.images.exterior_1_left": "observation/exterior_image_1_left",
            "observation.images.exterior_2_left": "observation/exterior_image_2_left",
            "observation.images.wrist_left": "observation/wrist_image_left",
            "observation.state": ("observation/joint_position", "observation/gripper_position"),
            "task": "prompt",
        },
    },
    "vla_eval": {
        "libero": {
            "observation.images.image": "images/agentview",
            "observation.images.image2": "images/wrist",
            "observation.state": "states",
            "task": "task_description",
            "controller": "controller_states",
        },
    },
}
"""Presets of client keys by dialect: policy feature -> the client's key, or keys that are concatenated."""


@dataclass(frozen=True)
class FeatureKeys:
    """Keys under which a client of another package sends the policy's inputs."""

    cameras: dict[str, str]  # camera of the policy -> the client's key
    state: tuple[str, ...]  # keys that are concatenated in this order; empty for a policy without state
    task: str
    ignored: frozenset[str]  # keys that may be sent as well
    policy: PolicyDescription

    @classmethod
    def resolve(
        cls, dialect: str, keys: Mapping[str, Any] | str, ignored: Sequence[str], policy: PolicyDescription
    ) -> FeatureKeys:
        """Return the keys of a policy's inputs.

        Args:
            dialect: A key of `DIALECTS`.
            keys: Name of a preset of the dialect, or the client's key or keys by policy feature. A preset's
                keys of features that the policy does not read are ignored.
            ignored: Further keys that clients send and the policy does not read.
            policy: The served policy.

        Raises:
            ValueError: If dialect or preset are unknown, or the features are not those of the policy.
        """
        if dialect not in DIALECTS:
            raise ValueError(f"dialect: expected vega, {', '.join(DIALECTS)}; got {dialect!r}")
        if policy.history != 1:
            raise ValueError(
                f"dialect={dialect} sends single frames, but the policy reads the last {policy.history} of "
                "each camera: serve it with dialect=vega"
            )
        presets, unread = DIALECTS[dialect], set(ignored)
        if isinstance(keys, str) and keys not in presets:
            raise ValueError(
                f"client_keys: expected a preset of dialect={dialect} ({', '.join(presets)}) or a map "
                f"{{FEATURE: KEY, ...}}; got {keys!r}"
            )
        mapping = presets[keys] if isinstance(keys, str) else keys
        names = {feature: (key,) if isinstance(key, str) else tuple(key) for feature, key in mapping.items()}
        expected = {*policy.cameras, "task"} | ({"observation.state"} if policy.state_size else set())
        if isinstance(keys, str):
            unread |= {key for feature in names.keys() - expected for key in names[feature]}
            names = {feature: key for feature, key in names.items() if feature in expected}
        used = [key for key_tuple in names.values() for key in key_tuple]
        if set(names) != expected or len(set(used)) != len(used) or unread & set(used):
            raise ValueError(
                f"client_keys: expected one key of its own for each of {sorted(expected)}, got "
                f"{ {feature: list(key) for feature, key in names.items()} }; give them as "
                "'client_keys={FEATURE: KEY, ...}'"
            )
        single = [feature for feature in names if feature != "observation.state" and len(names[feature]) != 1]
        if single:
            raise ValueError(f"client_keys: expected one key for {single}; only a state is concatenated")
        cameras = {camera: names[camera][0] for camera in policy.cameras}
        return cls(cameras, names.get("observation.state", ()), names["task"][0], frozenset(unread), policy)

    @property
    def required(self) -> list[str]:
        """The keys that each observation must have."""
        return [*self.cameras.values(), *self.state, self.task]

    def batch(self, values: Mapping[str, _ForeignValue], limits: MessageLimits) -> ObservationBatch:
        """Return a client's observation as a batch of one row.

        Raises:
            ProtocolError: If keys are unknown or missing, or a value has another type, shape or size.
        """
        missing = [key for key in self.required if key not in values]
        unknown = sorted(values.keys() - {*self.required, *self.ignored})
        if missing or unknown:
            raise ProtocolError(
                "malformed",
                f"observation: missing keys {missing}, unknown keys {unknown}; expected exactly "
                f"{self.required}. The server's client_keys and ignored_keys change that.",
            )
        frames = {
            camera: _foreign_frame(values[key], limits.frame_side, key)[None]
            for camera, key in self.cameras.items()
        }
        parts = [_foreign_vector(values[key], key) for key in self.state]
        state = np.concatenate([np.zeros(0, np.float32), *parts])
        if len(state) != (self.policy.state_size or 0):
            raise ProtocolError(
                "malformed",
                f"observation.state: expected {self.policy.state_size} values, got "
                f"{[len(part) for part in parts]} from {list(self.state)}",
            )
        task = values[self.task]
        if not isinstance(task, str) or len(task) > 512:
            raise ProtocolError("malformed", f"{self.task}: expected text of at most 512 characters")
        return ObservationBatch(frames, state[None], [task])


_ForeignMap = Annotated[dict[Name, Raw], Meta(max_length=64)]


class _ForeignArray(NamedTuple):
    """An array in another package's message: raw values, or a compressed image."""

    data: memoryview
    dtype: str = "|u1"
    shape: tuple[int, ...] | None = None  # None for a compressed image


type _ForeignValue = str | float | _ForeignArray


def _foreign_value(raw: Raw, name: str, key: type[str] | type[bytes]) -> _ForeignValue:
    """Decode a value of msgpack-numpy; `key` is the type of the keys by which it describes arrays.

    No type of numpy is looked up by a name of the message, and nothing is decoded that is not used.
    """
    value = _decode(raw, str | float | Annotated[dict[key, Raw], Meta(max_length=8)])
    if not isinstance(value, dict):
        return value
    entries = {
        entry if isinstance(entry, str) else entry.decode("latin-1"): raw for entry, raw in value.items()
    }
    if "__npgeneric__" in entries and "data" in entries:
        return float(_decode(entries["data"], float))
    if (
        "__image__" in entries
        and {"format", "data"} <= set(entries)
        and _decode(entries["format"], Name) != "raw"
    ):
        return _ForeignArray(_decode(entries["data"], memoryview))
    if not ({"__ndarray__", "__image__"} & set(entries) and {"data", "dtype", "shape"} <= set(entries)):
        raise ProtocolError("malformed", f"{name}: expected a number, text or an array of msgpack-numpy")
    types = {"data": memoryview, "dtype": Name, "shape": Shape}
    return _ForeignArray(**{entry: _decode(entries[entry], kind) for entry, kind in types.items()})


def _foreign_frame(value: _ForeignValue, most: int, name: str) -> np.ndarray:
    """Return a camera's frame, u8 [h w 3]."""
    if not isinstance(value, _ForeignArray) or value.dtype not in ("|u1", "u1"):
        kind = value.dtype if isinstance(value, _ForeignArray) else type(value).__name__
        raise ProtocolError(
            "malformed", f"{name}: expected an image of type uint8, height x width x 3; got {kind}"
        )
    if value.shape is not None:
        side = (16, most)
        return Array(value.shape, value.data).unpack("u1", (side, side, 3), name)
    try:
        with Image.open(io.BytesIO(value.data), formats=("PNG", "JPEG")) as image:  # reads the header only
            if image.mode != "RGB" or not 16 <= min(image.size) <= max(image.size) <= most:
                raise ProtocolError(
                    "malformed",
                    f"{name}: expected RGB, 16 to {most} pixels a side; got {image.mode}, {image.size}",
                )
            return np.asarray(image)
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise ProtocolError("malformed", f"{name}: not a PNG or JPEG image: {error}") from error


def _foreign_vector(value: _ForeignValue, name: str) -> np.ndarray:
    """Return a number or a vector of numbers as f32 [n]."""
    if isinstance(value, _ForeignArray):
        if value.dtype not in ("<f4", "<f8") or value.shape is None:
            raise ProtocolError("malformed", f"{name}: expected float32 or float64, got {value.dtype}")
        shape = ((0, 256),) if len(value.shape) else ()
        numbers = Array(value.shape, value.data).unpack(value.dtype, shape, name)
    elif isinstance(value, str):
        raise ProtocolError("malformed", f"{name}: expected numbers, got text")
    else:
        numbers = np.array(value)
    with np.errstate(over="ignore"):
        vector = np.atleast_1d(numbers.astype(np.float32))
    if not np.isfinite(vector).all():
        raise ProtocolError("malformed", f"{name}: expected finite numbers of type float32")
    return vector


class OpenpiSession:
    """Messages of the package openpi-client (0.1): metadata first, then an observation for each chunk.

    An answer holds `actions`, f32 [t a], and openpi's timings in ms. A refusal is text: the client raises it.
    """

    def __init__(self, keys: FeatureKeys, served: ServedDescription, limits: MessageLimits) -> None:
        metadata = {
            "policy": served.name,
            "fingerprint": served.fingerprint,
            "action_size": served.action_size,
            "action_steps": served.action_steps,
            "observation": keys.required,
            "cameras": keys.cameras,
            "ignored": sorted(keys.ignored),
        }
        self.greeting = msgspec.msgpack.encode(metadata)
        self._keys, self._limits = keys, limits

    def receive(self, data: bytes | str) -> Request:
        """Decode an observation."""
        entries = _decode(data, _ForeignMap)
        values = {name: _foreign_value(raw, name, bytes) for name, raw in entries.items()}
        return Request(0, self._keys.batch(values, self._limits), None, None)

    def answer(self, reply: Reply) -> bytes:
        """Encode a chunk."""
        chunk = np.ascontiguousarray(reply.actions[0], "<f4")
        array = {b"__ndarray__": True, b"data": chunk.data, b"dtype": "<f4", b"shape": chunk.shape}
        timings = {"policy_timing": reply.model_seconds, "server_timing": reply.server_seconds}
        milliseconds = {name: {"infer_ms": 1000 * seconds} for name, seconds in timings.items()}
        return msgspec.msgpack.encode({"actions": array, **milliseconds})

    def refuse(self, error: ProtocolError) -> str:
        """Return the error as text."""
        return f"{error.code}: {error}"[:1000]


class _VlaEvalMessage(Schema, frozen=True):
    """A message of vla-eval's harness, protocol version 1."""

    type: Literal["hello", "observation", "episode_start", "episode_end", "error"]
    payload: Raw
    seq: SequenceNumber
    timestamp: float


class VlaEvalSession:
    """Messages of the package vla-eval (0.8), whose client requests one action a step.

    `action_steps` of each chunk are answered before the next one is predicted; a new episode drops the rest.
    """

    greeting = None

    def __init__(self, keys: FeatureKeys, served: ServedDescription, limits: MessageLimits) -> None:
        self._keys, self._limits, self._steps = keys, limits, served.action_steps
        self._actions: deque[np.ndarray] = deque()
        self._seq = 0

    def receive(self, data: bytes | str) -> Request | bytes | None:
        """Answer a hello or, from the last chunk, an observation; or return a request for the next chunk."""
        message: _VlaEvalMessage = _decode(data, _VlaEvalMessage)
        self._seq = message.seq
        if message.type == "hello":
            used = {*self._keys.required}
            requested = {"send_wrist_image": "images/wrist" in used, "send_state": "states" in used}
            # LeRobot's LIBERO states have angles over [0, 2 pi]. vla-eval folds them at pi by default, which
            # negates the rotation of a hand that points down.
            requested["quat_no_antipodal"] = requested["send_state"]
            hello = {"harness_version": "vega_policy", "protocol_version": 1, "model_server": "vega_policy"}
            return self._encode("hello", {**hello, "capabilities": {}, "observation_params": requested})
        if message.type == "observation":
            batch = self._read(message.payload)  # checked also where the action is known
            return self._next_action() if self._actions else Request(0, batch, None, None)
        self._actions.clear()
        return None

    def answer(self, reply: Reply) -> bytes:
        """Encode the first action of a new chunk."""
        self._actions.extend(reply.actions[0, : self._steps])
        return self._next_action()

    def refuse(self, error: ProtocolError) -> bytes:
        """Encode an error message."""
        return self._encode("error", {"error": f"{error.code}: {error}"[:1000]})

    def _read(self, payload: Raw) -> ObservationBatch:
        entries: dict[str, Raw] = _decode(payload, _ForeignMap)
        images: dict[str, Raw] = _decode(entries.pop("images", Raw(b"\x80")), _ForeignMap)
        entries |= {f"images/{name}": raw for name, raw in images.items()}
        values = {name: _foreign_value(raw, name, str) for name, raw in entries.items()}
        return self._keys.batch(values, self._limits)

    def _next_action(self) -> bytes:
        action = np.ascontiguousarray(self._actions.popleft(), "<f4")
        array = {"__ndarray__": True, "data": action.data, "dtype": "<f4", "shape": action.shape}
        return self._encode("action", {"actions": array})

    def _encode(self, kind: str, payload: dict[str, Any]) -> bytes:
        message = {"type": kind, "payload": payload, "seq": self._seq, "timestamp": time.time()}
        return msgspec.msgpack.encode(message)


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
