"""What the wire takes: exactly what is documented, and nothing else."""

import dataclasses

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy_servers import ArithmeticPolicy, noises, observations
from vega_policy.deployment import protocol
from vega_policy.deployment.protocol import (
    Hello,
    MessageLimits,
    ProtocolError,
    Reply,
    Request,
    RTCContext,
    ServedDescription,
    unpack,
)

SESSION = bytes(range(16))
LIMITS = MessageLimits(message_bytes=2**20)
SERVED = ServedDescription(ArithmeticPolicy.description, "arithmetic", (4, 7), True)


def decode(data, last=-1):
    return protocol.decode_request(unpack(data, LIMITS.message_bytes), SESSION, last, SERVED, LIMITS)


def valid(**changes):
    going_on = RTCContext(np.ones((3, 7), np.float32), 2, 3, 10.0)
    request = Request(5, observations(), noises(), going_on)
    return msgpack.unpackb(protocol.encode_request(SESSION, request)) | changes


def test_a_request_arrives_as_it_was_sent():
    going_on = RTCContext(np.arange(21, dtype=np.float32).reshape(3, 7), 2, 3, 10.0)
    sent = Request(5, observations(), noises(), going_on)
    got = decode(protocol.encode_request(SESSION, sent))
    for camera, frames in sent.batch.frames.items():
        np.testing.assert_array_equal(got.batch.frames[camera], frames)
    np.testing.assert_array_equal(got.batch.state, sent.batch.state)
    np.testing.assert_array_equal(got.noise, sent.noise)
    np.testing.assert_array_equal(got.continuation.actions, going_on.actions)
    assert (got.sequence, got.batch.instructions) == (5, ["lift the red cube"])
    assert (got.continuation.delay, got.continuation.horizon, got.continuation.guidance) == (2, 3, 10.0)


def test_hello_and_replies_arrive_as_they_were_sent():
    hello = Hello(SESSION, SERVED, LIMITS)
    assert protocol.decode_hello(protocol.encode_hello(hello)) == hello
    reply = protocol.decode_answer(protocol.encode_reply(Reply(3, noises(2), 0.5, 0.75)), 3, 2**20)
    np.testing.assert_array_equal(reply.actions, noises(2))
    assert (reply.sequence, reply.model_seconds, reply.server_seconds) == (3, 0.5, 0.75)
    with pytest.raises(ProtocolError, match="too fast") as error:
        protocol.decode_answer(protocol.encode_error(3, "rate", "too fast"), 3, 2**20)
    assert error.value.code == "rate"


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("policy", "cameras", "front"),
        ("policy", "action_size", -1),
        ("policy", "noise_shape", [4, 7, 1]),
        ("policy", "continues", 1),
        ("limits", "requests_per_second", 0.0),
        (None, "session", b"short"),
        (None, "further", 1),
    ],
)
def test_a_server_is_not_trusted_to_say_hello_as_documented(where, field, value):
    hello = msgpack.unpackb(protocol.encode_hello(Hello(SESSION, SERVED, LIMITS)))
    (hello if where is None else hello[where])[field] = value
    with pytest.raises(
        ProtocolError, match=f"not as documented: {field}" if where else "session|exactly the keys"
    ):
        protocol.decode_hello(msgpack.packb(hello))
    del (hello if where is None else hello[where])[field]
    if field != "further":
        with pytest.raises(ProtocolError):
            protocol.decode_hello(msgpack.packb(hello))


def test_a_policy_of_histories_is_sent_histories_and_nothing_else():
    policy = dataclasses.replace(ArithmeticPolicy.description, history=3)
    served = dataclasses.replace(SERVED, policy=policy)
    hello = Hello(SESSION, served, LIMITS)
    assert protocol.decode_hello(protocol.encode_hello(hello)) == hello
    single = observations(rows=2)
    clips = {camera: np.stack([frames] * 3, axis=1) for camera, frames in single.frames.items()}
    sent = protocol.encode_request(
        SESSION, Request(5, dataclasses.replace(single, frames=clips), noises(2), None)
    )
    got = protocol.decode_request(unpack(sent, LIMITS.message_bytes), SESSION, -1, served, LIMITS)
    for camera, frames in clips.items():
        np.testing.assert_array_equal(got.batch.frames[camera], frames)
    with pytest.raises(ProtocolError, match="expected 4 axes"):
        decode(sent)


ARRAY = {"shape": [1, 8], "data": b"\0" * 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "execute"}, "type 'predict'"),
        ({"extra": 1}, "exactly the keys"),
        ({"session": b"other"}, "another session"),
        ({"sequence": 2}, "must grow"),
        ({"sequence": -1}, "integer"),
        ({"sequence": True}, "integer"),
        ({"sequence": 1.0}, "integer"),
        ({"instructions": []}, "1 to 16 strings"),
        ({"instructions": ["x"] * 17}, "1 to 16 strings"),
        ({"instructions": ["x" * 513]}, "at most 512"),
        ({"instructions": [7]}, "at most 512"),
        ({"instructions": ["two", "rows"]}, "an axis"),
        ({"frames": {}}, "exactly the keys"),
        ({"frames": 3}, "expected a map"),
        ({"state": ARRAY | {"data": b"\0" * 31}}, "31 bytes do not make"),
        ({"state": ARRAY | {"data": "text" * 8}}, "binary data"),
        ({"state": ARRAY | {"shape": [1, 7]}}, "integer in"),
        ({"state": ARRAY | {"shape": [2**40, 2**40]}}, "integer in"),
        ({"state": ARRAY | {"data": np.full(8, np.nan, "<f4").tobytes()}}, "finite"),
        ({"noise": ARRAY}, "3 axes"),
        ({"continuation": {}}, "exactly the keys"),
        (
            {"continuation": {"actions": ARRAY, "delay": 0, "horizon": 1, "guidance": float("nan")}},
            "guidance",
        ),
    ],
)
def test_every_departure_from_the_schema_is_refused_by_name(changes, message):
    with pytest.raises(ProtocolError, match=message):
        decode(msgpack.packb(valid(**changes)), last=4)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        "text",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        msgpack.packb({"a": msgpack.ExtType(1, b"x")}),
        msgpack.packb({"a": msgpack.Timestamp(0, 0)}),
        b"\xdf\xff\xff\xff\xff",  # a map of 4 billion entries
        b"\xc6\xff\xff\xff\xff",  # 4 GB of binary data
        b"\x91" * 100_000,  # nested beyond any depth
        msgpack.packb({"a": 1}) + b"\x00",
        msgpack.packb({"a": list(range(2000))}),
    ],
)
def test_what_is_no_plain_bounded_map_is_refused(data):
    with pytest.raises(ProtocolError):
        unpack(data, 2**20)


VALID = protocol.encode_request(SESSION, Request(5, observations(side=16), noises(), None))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_requests_are_refused_or_still_within_the_schema(data):
    damaged = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 400) | st.integers(0, len(damaged) - 1))
        damaged[min(place, len(damaged) - 1)] = data.draw(st.integers(0, 255))
    end = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))
    try:
        request = decode(bytes(damaged[:end]))
    except ProtocolError:
        return
    assert request.batch.state.shape == (1, 8)
    assert np.isfinite(request.batch.state).all()
    assert all(frames.shape[3] == 3 for frames in request.batch.frames.values())


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*valid(), "other"]), plain), st.booleans())
def test_no_content_of_the_fields_does_anything_but_be_refused(fields, complete):
    with pytest.raises(ProtocolError):
        decode(msgpack.packb((valid() if complete else {}) | fields | {"sequence": 0}), last=4)
