"""The protocol accepts exactly the documented messages."""

import dataclasses
from datetime import UTC, datetime

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy_servers import ArithmeticPolicy, limits, noises, observations
from vega_policy.deployment import protocol
from vega_policy.deployment.protocol import (
    ActionsMessage,
    Array,
    ErrorMessage,
    Hello,
    ProtocolError,
    Request,
    RTCContext,
    ServedDescription,
)

SESSION = bytes(range(16))
LIMITS = limits(message_bytes=2**20)
SERVED = ServedDescription(
    **dataclasses.asdict(ArithmeticPolicy.description),
    fingerprint="arithmetic",
    noise_shape=(4, 7),
    supports_rtc=True,
)
pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode


def decode(data, last=-1):
    return protocol.decode_request(data, SESSION, last, SERVED, LIMITS)


def valid(**changes):
    rtc = RTCContext(np.ones((3, 7), np.float32), 2, 3, 10.0)
    request = Request(5, observations(), noises(), rtc)
    return unpack(protocol.encode_request(SESSION, request)) | changes


def test_a_request_arrives_as_it_was_sent():
    rtc = RTCContext(np.arange(21, dtype=np.float32).reshape(3, 7), 2, 3, 10.0)
    sent = Request(5, observations(), noises(), rtc)
    got = decode(protocol.encode_request(SESSION, sent))
    for camera, frames in sent.batch.frames.items():
        np.testing.assert_array_equal(got.batch.frames[camera], frames)
    np.testing.assert_array_equal(got.batch.state, sent.batch.state)
    np.testing.assert_array_equal(got.noise, sent.noise)
    np.testing.assert_array_equal(got.rtc.actions, rtc.actions)
    assert (got.sequence, got.batch.instructions) == (5, ["lift the red cube"])
    assert (got.rtc.delay, got.rtc.horizon, got.rtc.guidance) == (2, 3, 10.0)


def test_hello_and_replies_arrive_as_they_were_sent():
    hello = Hello(protocol.VERSION, SESSION, SERVED, LIMITS)
    assert protocol.decode_hello(protocol.encode(hello)) == hello
    assert hello.policy.policy == ArithmeticPolicy.description
    answer = protocol.encode(ActionsMessage(3, Array.pack(noises(2), "<f4"), 0.5, 0.75))
    reply = protocol.decode_answer(answer, 3, 2, SERVED)
    np.testing.assert_array_equal(reply.actions, noises(2))
    assert (reply.model_seconds, reply.server_seconds) == (0.5, 0.75)
    with pytest.raises(ProtocolError, match="too fast") as error:
        protocol.decode_answer(protocol.encode(ErrorMessage(3, "rate", "too fast")), 3, 2, SERVED)
    assert error.value.code == "rate"
    with pytest.raises(ProtocolError, match="expected the answer to 4, got that to 3"):
        protocol.decode_answer(answer, 4, 2, SERVED)
    for broken in (answer[:-1], answer.replace(b"sequence", b"sequenza"), pack({"type": "actions"})):
        with pytest.raises(ProtocolError):
            protocol.decode_answer(broken, 3, 2, SERVED)


@pytest.mark.parametrize(
    "shape", [(1, 4, 7), (2, 1, 7), (2, 1025, 7), (2, 4, 6), (2, 4, 8), (2, 4), (0, 4, 7)]
)
def test_actions_that_are_not_those_of_the_policy_are_refused(shape):
    answer = protocol.encode(ActionsMessage(3, Array.pack(np.zeros(shape), "<f4"), 0.5, 0.75))
    with pytest.raises(
        ProtocolError, match=r"actions: expected the shape \[\(2, 2\), \(2, 1024\), \(7, 7\)\]"
    ):
        protocol.decode_answer(answer, 3, 2, SERVED)


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("policy", "cameras", "front"),
        ("policy", "action_size", -1),
        ("policy", "noise_shape", [4, 7, 1]),
        ("policy", "supports_rtc", 1),
        ("limits", "requests_per_second", 0.0),
        (None, "session", b"short"),
        (None, "version", 2),
        (None, "further", 1),
    ],
)
def test_a_hello_that_violates_the_schema_is_refused(where, field, value):
    hello = unpack(protocol.encode(Hello(protocol.VERSION, SESSION, SERVED, LIMITS)))
    (hello if where is None else hello[where])[field] = value
    with pytest.raises(ProtocolError, match=field):
        protocol.decode_hello(pack(hello))
    del (hello if where is None else hello[where])[field]
    if field != "further":
        with pytest.raises(ProtocolError, match=f"missing required field `{field}`"):
            protocol.decode_hello(pack(hello))


def test_a_policy_of_histories_is_sent_histories_and_nothing_else():
    policy = dataclasses.replace(ArithmeticPolicy.description, history=3)
    served = msgspec.structs.replace(SERVED, history=3)
    assert served.policy == policy
    single = observations(rows=2)
    clips = {camera: np.stack([frames] * 3, axis=1) for camera, frames in single.frames.items()}
    sent = protocol.encode_request(
        SESSION, Request(5, dataclasses.replace(single, frames=clips), noises(2), None)
    )
    got = protocol.decode_request(sent, SESSION, -1, served, LIMITS)
    for camera, frames in clips.items():
        np.testing.assert_array_equal(got.batch.frames[camera], frames)
    with pytest.raises(ProtocolError, match="expected the shape"):
        decode(sent)


ARRAY = {"shape": [1, 8], "data": b"\0" * 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "execute"}, "'execute'"),
        ({"extra": 1}, "extra"),
        ({"session": b"other"}, "another session"),
        ({"sequence": 2}, "must grow"),
        ({"sequence": -1}, "sequence"),
        ({"sequence": True}, "sequence"),
        ({"sequence": 1.0}, "sequence"),
        ({"instructions": []}, "instructions"),
        ({"instructions": ["x"] * 17}, "1 to 16 rows"),
        ({"instructions": ["x" * 513]}, "<= 512"),
        ({"instructions": [7]}, "instructions"),
        ({"instructions": ["two", "rows"]}, "expected the shape"),
        ({"frames": {}}, "exactly the cameras"),
        ({"frames": 3}, "frames"),
        ({"state": ARRAY | {"data": b"\0" * 31}}, "expected 32 bytes"),
        ({"state": ARRAY | {"data": "text" * 8}}, "state.data"),
        ({"state": ARRAY | {"shape": [1, 7]}}, "expected the shape"),
        ({"state": ARRAY | {"shape": [1, 8.0]}}, "state.shape"),
        ({"state": ARRAY | {"shape": [2**40, 2**40]}}, "state.shape"),
        ({"state": ARRAY | {"shape": [1] * 6}}, "state.shape"),
        ({"state": ARRAY | {"data": np.full(8, np.nan, "<f4").tobytes()}}, "finite"),
        ({"noise": ARRAY}, "expected the shape"),
        ({"rtc": {}}, "rtc"),
        ({"rtc": {"actions": ARRAY, "delay": 0, "horizon": 1, "guidance": float("nan")}}, "guidance"),
        ({"rtc": {"actions": ARRAY, "delay": 0, "horizon": 0, "guidance": 1.0}}, "horizon"),
    ],
)
def test_every_departure_from_the_schema_is_refused_by_name(changes, message):
    with pytest.raises(ProtocolError, match=message):
        decode(pack(valid(**changes)), last=4)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        "text",
        pack([1, 2]),
        pack({1: 2}),
        pack({"a": msgspec.msgpack.Ext(1, b"x")}),
        pack({"a": datetime(2026, 1, 1, tzinfo=UTC)}),
        b"\xdf\xff\xff\xff\xff",  # a map of 4 billion entries
        b"\xc6\xff\xff\xff\xff",  # 4 GB of binary data
        b"\x91" * 100_000,  # nested beyond any depth
        b"\x82\xa4type\xa7predict\xa6frames\xdf\xff\xff\xff\xff",  # the same in fields of a request
        b"\x82\xa4type\xa7predict\xacinstructions\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xa7predict\xa5noise\x81\xa5shape\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xa7predict\xa5noise\x81\xa4data\xc6\xff\xff\xff\xff",
        b"\x82\xa4type\xa7predict\xa5noise" + b"\x91" * 100_000,
        b"\x81\xa1\xff",  # no UTF-8
        pack({"a": 1}) + b"\x00",
        pack({"a": list(range(2000))}),
    ],
)
def test_messages_other_than_small_plain_maps_are_refused(data):
    with pytest.raises(ProtocolError):
        decode(data)


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


wrong_fields = st.dictionaries(st.sampled_from([*valid(), "other"]), plain)


@settings(max_examples=100, deadline=None)
@given(wrong_fields, st.booleans())
def test_no_wrong_field_content_raises_anything_but_a_refusal(fields, complete):
    check_refused(fields, complete)


@pytest.mark.slow
@settings(max_examples=3_000, deadline=None)
@given(wrong_fields, st.booleans())
def test_no_long_search_finds_wrong_field_content_that_is_not_refused(fields, complete):
    check_refused(fields, complete)


def check_refused(fields, complete):
    with pytest.raises(ProtocolError):
        decode(pack((valid() if complete else {}) | fields | {"sequence": 0}), last=4)
