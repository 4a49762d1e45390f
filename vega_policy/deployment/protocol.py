"""The wire between robot and policy server, version 1: msgpack over WebSocket, checked field by field.

A client opens `ws(s)://host:port/v1` with the subprotocol `vega-policy.v1` and, where the server has a token,
the header `Authorization: Bearer <token>`. Every message is one binary WebSocket message that holds one
msgpack map with exactly the keys below; there are no extension types. An array is a map {shape: [uint, ...],
data: bin} in row-major order, little-endian: *u8* or *f32* says of what. b rows, one observation each, share
a message; a robot sends b = 1.

    server -> client, first   {type: "hello", version: 1, session: bin 16, policy: {...}, limits: {...}}
        policy  {name, prior, fingerprint: str, cameras: [str], state_size: uint | nil, action_size: uint,
                 action_steps: uint, history: uint, noise_shape: [t, a] | nil, continues: bool}
        limits  {message_bytes: uint, rows: uint, frame_side: uint, requests_per_second: float}

    client -> server          {type: "predict", session, sequence: uint, frames: {camera: u8 [b h w 3]},
                               state: f32 [b s], instructions: [str, b of them],
                               noise: f32 [b t a] | nil, continuation: nil | {
                                   actions: f32 [t a], delay: uint, horizon: uint, guidance: float}}
    server -> client          {type: "actions", sequence, actions: f32 [b t a],
                               model_seconds: float, server_seconds: float}
                              {type: "error", sequence: uint | nil, code: str, message: str}

`frames` are RGB, upright, with exactly the policy's cameras. Where `history` is not 1, the policy
reads the last so many frames of the episode: u8 [b t h w 3]. `state` and `actions` are in the robot's units.
`session` repeats what hello said and `sequence` grows with each request, so that recorded messages mean
nothing in another session, or twice in one. `noise` None leaves it to the server (the same at every call).
`continuation` asks for real-time chunking: `actions` are those of the last chunk that are still to be
executed, `delay` how many of them will have been by the time the answer comes.

Error codes: malformed, session, sequence, rate, policy. After too many malformed messages, or one that is too
large, the server closes the connection (1008, 1009); when it shuts down, after running requests, with 1001.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import msgpack
import numpy as np

from vega_policy.evaluation.policies import ChunkPolicy, ObservationBatch, PolicyDescription


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


@dataclass(frozen=True)
class RTCContext:
    """What real-time chunking needs to know of the chunk that is being executed.

    Attributes:
        actions: Actions still to be executed, float32 [t a], in the robot's units.
        delay: How many of them will have been executed when the new chunk arrives.
        horizon: Up to which of them the new chunk is guided.
        guidance: Largest weight of the guidance.
    """

    actions: np.ndarray
    delay: int
    horizon: int
    guidance: float


class ServablePolicy(ChunkPolicy, Protocol):
    """A chunk policy that a server can offer."""

    @property
    def fingerprint(self) -> str:
        """Hash over the checkpoint's files."""
        ...

    @property
    def continues(self) -> bool:
        """Whether `continue_chunk` works."""
        ...

    def continue_chunk(
        self, batch: ObservationBatch, noise: np.ndarray | None, continuation: RTCContext
    ) -> np.ndarray:
        """Predict a chunk for one row that goes on from the last one, float32 [1 t a]."""
        ...


VERSION = 1
SUBPROTOCOL = "vega-policy.v1"
PATH = "/v1"
SESSION_BYTES = 16
MAX_INSTRUCTION = 512
MAX_SEQUENCE = 2**63


@dataclass(frozen=True)
class MessageLimits:
    """How large a request may be.

    Attributes:
        message_bytes: Bytes of a message.
        rows: Observations of a request.
        frame_side: Height or width of a frame in pixels.
        requests_per_second: Requests a second of one session.
    """

    message_bytes: int = 8 * 2**20
    rows: int = 16
    frame_side: int = 1280
    requests_per_second: float = 50.0


@dataclass(frozen=True)
class ServedDescription:
    """What a server says of its policy.

    Attributes:
        policy: What the policy was trained on.
        fingerprint: Hash over the checkpoint's files.
        noise_shape: Shape [t a] of its noise; None if it takes none.
        continues: Whether it can continue a chunk (real-time chunking).
    """

    policy: PolicyDescription
    fingerprint: str
    noise_shape: tuple[int, int] | None
    continues: bool


@dataclass(frozen=True)
class Request:
    """A checked request: what the policy is to predict from."""

    sequence: int
    batch: ObservationBatch
    noise: np.ndarray | None
    continuation: RTCContext | None


@dataclass(frozen=True)
class Hello:
    """The server's first message."""

    session: bytes
    description: ServedDescription
    limits: MessageLimits


@dataclass(frozen=True)
class Reply:
    """Predicted actions, float32 [b t a], and the seconds spent in the model and on the server in all."""

    sequence: int
    actions: np.ndarray
    model_seconds: float
    server_seconds: float


_POLICY: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "prior", "fingerprint"), is_text),
    **dict.fromkeys(("action_size", "action_steps", "history"), is_count),
    "cameras": lambda value: isinstance(value, list) and all(map(is_text, value)),
    "state_size": lambda value: value is None or is_count(value),
    "noise_shape": lambda value: value is None or is_pair(value),
    "continues": lambda value: isinstance(value, bool),
}
_LIMITS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("message_bytes", "rows", "frame_side"), is_count),
    "requests_per_second": lambda value: isinstance(value, float | int) and 0 < value < 1e9,
}


def encode_hello(hello: Hello) -> bytes:
    """Encode the server's first message."""
    served = hello.description
    policy = asdict(served.policy) | {
        "fingerprint": served.fingerprint,
        "noise_shape": served.noise_shape,
        "continues": served.continues,
    }
    message = {"type": "hello", "version": VERSION, "session": hello.session}
    return pack(message | {"policy": policy, "limits": asdict(hello.limits)})


def decode_hello(data: bytes | str) -> Hello:
    """Decode the server's first message.

    Raises:
        ProtocolError: If it is not the documented one, or of another version.
    """
    value = unpack(data, 4096)
    if value.get("type") != "hello" or value.get("version") != VERSION:
        said = f"{value.get('type')!r} of version {value.get('version')!r}"
        raise ProtocolError("malformed", f"expected a hello of version {VERSION}, got {said}")
    check_keys(value, {"type", "version", "session", "policy", "limits"}, "hello")
    if not isinstance(value["session"], bytes) or len(value["session"]) != SESSION_BYTES:
        raise ProtocolError("malformed", f"session: expected {SESSION_BYTES} bytes")
    policy, limits = check_map(value, "policy"), check_map(value, "limits")
    check_fields(policy, _POLICY, "policy")
    check_fields(limits, _LIMITS, "limits")
    shape = policy["noise_shape"]
    description = PolicyDescription(
        name=policy["name"],
        prior=policy["prior"],
        cameras=tuple(policy["cameras"]),
        state_size=policy["state_size"],
        action_size=policy["action_size"],
        action_steps=policy["action_steps"],
        history=policy["history"],
    )
    served = ServedDescription(
        description,
        policy["fingerprint"],
        None if shape is None else (shape[0], shape[1]),
        policy["continues"],
    )
    return Hello(value["session"], served, MessageLimits(**limits))


def encode_request(session: bytes, request: Request) -> bytes:
    """Encode a request."""
    batch, going_on = request.batch, request.continuation
    continuation = None
    if going_on is not None:
        continuation = vars(going_on) | {"actions": pack_array(going_on.actions, "<f4")}
    return pack(
        {
            "type": "predict",
            "session": session,
            "sequence": request.sequence,
            "frames": {camera: pack_array(frames, "u1") for camera, frames in batch.frames.items()},
            "state": pack_array(batch.state, "<f4"),
            "instructions": list(batch.instructions),
            "noise": None if request.noise is None else pack_array(request.noise, "<f4"),
            "continuation": continuation,
        }
    )


def decode_request(
    value: dict[str, Any], session: bytes, last: int, served: ServedDescription, limits: MessageLimits
) -> Request:
    """Check an unpacked request against the session, the policy and the limits.

    Args:
        value: As `unpack` returned it.
        session: What hello said.
        last: Sequence number of the session's last request; -1 before the first.
        served: The policy.
        limits: What is allowed.

    Raises:
        ProtocolError: With the first thing that is wrong.
    """
    fields = {"type", "session", "sequence", "frames", "state", "instructions", "noise", "continuation"}
    check_keys(value, fields, "request")
    if value["type"] != "predict":
        raise ProtocolError("malformed", "expected a message of type 'predict'")
    if value["session"] != session:
        raise ProtocolError("session", "the message belongs to another session")
    sequence = check_integer(value["sequence"], "sequence", 0, MAX_SEQUENCE)
    if sequence <= last:
        raise ProtocolError("sequence", f"sequence must grow: {sequence} came after {last}")
    instructions = value["instructions"]
    if not isinstance(instructions, list) or not 1 <= len(instructions) <= limits.rows:
        raise ProtocolError("malformed", f"instructions: expected a list of 1 to {limits.rows} strings")
    if not all(isinstance(text, str) and len(text) <= MAX_INSTRUCTION for text in instructions):
        raise ProtocolError("malformed", f"instructions: expected strings of at most {MAX_INSTRUCTION}")
    rows, policy = len(instructions), served.policy
    frames = check_map(value, "frames")
    check_keys(frames, set(policy.cameras), "frames")
    side = (16, limits.frame_side)
    frame = (*policy.frame_axes(rows), side, side, 3)
    batch = ObservationBatch(
        {name: check_array(frames[name], "u1", frame, name) for name in policy.cameras},
        check_array(value["state"], "<f4", (rows, policy.state_size or (0, 256)), "state"),
        instructions,
    )
    noise = None
    if value["noise"] is not None:
        if served.noise_shape is None:
            raise ProtocolError("malformed", "noise: this policy takes none")
        noise = check_array(value["noise"], "<f4", (rows, *served.noise_shape), "noise")
    return Request(sequence, batch, noise, _continuation(value["continuation"], rows, served))


def _continuation(value: Any, rows: int, served: ServedDescription) -> RTCContext | None:
    if value is None:
        return None
    if not served.continues or rows != 1:
        raise ProtocolError("malformed", "continuation: for one row, of a policy that can continue chunks")
    if not isinstance(value, dict):
        raise ProtocolError("malformed", "continuation: expected a map")
    check_keys(value, {"actions", "delay", "horizon", "guidance"}, "continuation")
    guidance = value["guidance"]
    if not isinstance(guidance, float) or not 0.0 < guidance <= 1000.0:
        raise ProtocolError("malformed", "guidance: expected a float in (0, 1000]")
    return RTCContext(
        check_array(value["actions"], "<f4", ((1, 1024), served.policy.action_size), "actions"),
        check_integer(value["delay"], "delay", 0, 1024),
        check_integer(value["horizon"], "horizon", 1, 1024),
        guidance,
    )


def encode_reply(reply: Reply) -> bytes:
    """Encode predicted actions."""
    return pack({"type": "actions"} | vars(reply) | {"actions": pack_array(reply.actions, "<f4")})


def encode_error(sequence: int | None, code: str, message: str) -> bytes:
    """Encode an error."""
    return pack({"type": "error", "sequence": sequence, "code": code, "message": message[:1000]})


def decode_answer(data: bytes | str, sequence: int, limit: int) -> Reply:
    """Decode the answer to a request.

    Raises:
        ProtocolError: If the server reported an error (with its code), or answered something else.
    """
    value = unpack(data, limit)
    if value.get("type") == "error":
        raise ProtocolError(str(value.get("code")), f"the server refused: {value.get('message')}")
    if value.get("type") != "actions" or value.get("sequence") != sequence:
        raise ProtocolError(
            "malformed", f"expected the actions of request {sequence}, got {value.get('type')!r}"
        )
    actions = check_array(value["actions"], "<f4", ((1, 1024), (1, 1024), (1, 1024)), "actions")
    return Reply(sequence, actions, value["model_seconds"], value["server_seconds"])
