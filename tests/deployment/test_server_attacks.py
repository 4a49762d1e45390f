"""Thousands of malformed messages and killed processes: the server keeps serving, and the robot holds.

The measurements of the slow tests are shown with `-m slow -o log_cli=true -o log_cli_level=INFO`.
"""

import contextlib
import logging
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.policy_servers import CAMERAS, address, observations, running, server_process, write_certificate
from vega_policy.deployment import protocol
from vega_policy.deployment.client import PolicyClient, RemotePolicy, ServerAddress
from vega_policy.deployment.protocol import Request
from vega_policy.deployment.safety import JointLimits, SafetyFilter, Watchdog

logger = logging.getLogger(__name__)
FIELDS = ("type", "session", "sequence", "frames", "state", "instructions", "noise", "rtc", "x")
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
malformed = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=50),
    st.dictionaries(st.sampled_from(FIELDS), plain).map(msgspec.msgpack.encode),
    st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=8)),  # where a valid request is damaged
    st.integers(0, 6000),  # where a valid request is cut off
)


VALID = {
    "type": "predict",
    "session": b"",  # filled in by the attacker
    "sequence": 2**40,
    "frames": {camera: {"shape": [1, 32, 32, 3], "data": bytes(3072)} for camera in CAMERAS},
    "state": {"shape": [1, 8], "data": bytes(32)},
    "instructions": ["lift"],
    "noise": None,
    "rtc": None,
}
HUGE, NAN = {"shape": [2**31] * 5, "data": b""}, b"\x00\x00\xc0\x7f"
CORPUS = [
    b"",
    b"\xc1",  # never used in msgpack
    b"\xdf\xff\xff\xff\xff",  # a map of 4 billion entries
    b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
    b"\x91" * 5000,  # nested lists
    b"\x81\xa1a\xc6\x7f\xff\xff\xff",
    b"\xc7\x05\x01hello",  # an extension type
    "{}",
    b"\x80",
    *(
        VALID | change
        for change in (
            {"session": bytes(16)},
            {"session": bytes(2**16)},
            {"sequence": -1},
            {"sequence": 2**63},
            {"sequence": 1.5},
            {"frames": {}},
            {"frames": dict.fromkeys(CAMERAS, HUGE)},
            {"frames": VALID["frames"] | {"more": HUGE}},
            {"frames": {key: {"shape": [1, 32, 32, 3], "data": bytes(3071)} for key in CAMERAS}},
            {"frames": {key: {"shape": [1, 1, 1, 3], "data": bytes(3)} for key in CAMERAS}},
            {"frames": {key: {"shape": [1, -32, -32, 3], "data": bytes(3072)} for key in CAMERAS}},
            {"frames": {key: {"shape": [0, 32, 32, 3], "data": b""} for key in CAMERAS}},
            {"frames": {key: {"shape": [1, 32, 32, 3], "data": "x" * 3072} for key in CAMERAS}},
            {"state": {"shape": [1, 8], "data": NAN * 8}},
            {"state": {"shape": [1, 0], "data": b""}},
            {"state": HUGE},
            {"noise": {"shape": [1, 4, 7], "data": NAN * 28}},
            {"noise": HUGE},
            {"instructions": []},
            {"instructions": ["x"] * 1025},
            {"instructions": ["x" * 513]},
            {"instructions": [None]},
            {"rtc": {}},
            {"rtc": {"actions": HUGE, "delay": 0, "horizon": 1, "guidance": 1.0}},
            {"rtc": {"actions": HUGE, "delay": 2**63, "horizon": 0, "guidance": float("nan")}},
            {"more": 1},
            {"type": "hello"},
        )
    ),
]


class Attacker:
    """Sends one message after another; opens a new session when the server closed the last one."""

    def __init__(self, port):
        self.port = port
        self.connection = None
        self.sent = self.closed = 0

    def send(self, message):
        if self.connection is None:
            self.connection = connect(
                f"ws://127.0.0.1:{self.port}/v1",
                subprotocols=[protocol.SUBPROTOCOL],
                compression=None,
                proxy=None,
            )
            self.session = protocol.decode_hello(self.connection.recv(timeout=20)).session
        try:
            self.connection.send(self.corrupt(message))
            self.answer = msgspec.msgpack.decode(self.connection.recv(timeout=20))
            assert self.answer["type"] in ("error", "actions")
        except ConnectionClosed:
            self.connection, self.closed = None, self.closed + 1
        self.sent += 1

    def corrupt(self, message):
        if isinstance(message, bytes | str):
            return message
        if isinstance(message, dict):
            session = message["session"] or self.session
            return msgspec.msgpack.encode(message | {"session": session})
        valid = protocol.encode_request(self.session, Request(self.sent, observations(side=16), None, None))
        if isinstance(message, int):
            return valid[: min(message, len(valid) - 1)]
        place, damage = message
        return valid[:place] + damage + valid[place + len(damage) :]


def attack(port, messages):
    """Send a number of messages, half of them drawn by hypothesis, a tenth too large; return the attacker."""
    attacker = Attacker(port)

    @settings(
        max_examples=messages // 2, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(malformed)
    def draw(message):
        attacker.send(message)

    draw()
    rng = np.random.default_rng(0)
    while attacker.sent < messages:
        turn = attacker.sent % 100
        if turn < len(CORPUS):
            attacker.send(CORPUS[turn])
        elif turn < 50 and attacker.sent % 400 < 100:
            attacker.send(bytes(9 * 2**20))
        elif turn < 75:
            attacker.send((int(rng.integers(3000)), rng.bytes(int(rng.integers(1, 9)))))
        else:
            attacker.send(rng.bytes(int(rng.integers(2000))))
    return attacker


@pytest.mark.parametrize("message", CORPUS, ids=range(len(CORPUS)))
def test_each_message_of_the_corpus_is_refused_and_the_session_continues(corpus_server, message):
    attacker = Attacker(corpus_server)
    attacker.send(message)
    assert attacker.answer["type"] == "error"
    assert attacker.answer["code"] in ("malformed", "session")
    attacker.connection.close()


@pytest.fixture(scope="module")
def corpus_server():
    with running() as (_, port):
        yield port


def test_malformed_messages_are_refused_while_a_valid_client_is_served():
    with running() as (_, port):
        client = PolicyClient(address(port))
        expected = client.predict(observations()).actions
        assert attack(port, 300).sent >= 300
        np.testing.assert_array_equal(client.predict(observations()).actions, expected)
        client.close()


@pytest.mark.slow
def test_ten_thousand_malformed_messages_cost_no_memory_and_disturb_no_client():
    with server_process() as (process, port):
        client, slowest, done = PolicyClient(address(port)), [0.0], threading.Event()
        expected = client.predict(observations()).actions

        def live():
            while not done.is_set():
                start = time.monotonic()
                np.testing.assert_array_equal(client.predict(observations()).actions, expected)
                slowest[0] = max(slowest[0], time.monotonic() - start)
                served[0] += 1

        served = [0]
        attack(port, 1000)  # until everything that is allocated once has been
        before = psutil.Process(process.pid).memory_info().rss
        good = threading.Thread(target=live)
        good.start()
        attacker = attack(port, 10_000)
        after = psutil.Process(process.pid).memory_info().rss
        done.set()
        good.join(30)
        logger.info(
            "%d messages, %d closed sessions, %d good requests, the slowest %.3f s; memory %.1f -> %.1f MiB",
            *(attacker.sent, attacker.closed, served[0], slowest[0], before / 2**20, after / 2**20),
        )
        assert process.poll() is None
        assert not good.is_alive()
        assert served[0] > 100
        assert after - before < 20 * 2**20


UPGRADE = (
    b"GET /v1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: vega-policy.v1\r\n\r\n"
)


class Aborter:
    """Opens connections to a server and hangs up at every stage, half of the times with a TCP reset."""

    def __init__(self, port, certificate=None):
        self.port = port
        self.tls = None if certificate is None else ssl.create_default_context(cafile=str(certificate))

    def abort(self, number):
        """Open and abort one connection; `number` chooses the stage."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        stages = (self.half_handshake, self.handshake, self.half_request, self.request)
        connection = stages[number % 4](connection)
        if number % 8 < 4:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def half_handshake(self, connection):
        """Send half of the first bytes: of TLS's hello, or of the HTTP request."""
        if self.tls is None:
            connection.sendall(UPGRADE[:100])
            return connection
        received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.wrap_bio(received, sent, server_hostname="localhost").do_handshake()
        connection.sendall(sent.read()[:100])
        return connection

    def handshake(self, connection):
        """Open a session and read its first message in part."""
        if self.tls is not None:
            connection = self.tls.wrap_socket(connection, server_hostname="localhost")
        connection.sendall(UPGRADE)
        connection.recv(200)
        return connection

    def half_request(self, connection):
        """Send half of a request."""
        return self.request(connection, part=0.5)

    def request(self, connection, part=1.0):
        """Send a request and do not wait for the answer."""
        connection = self.handshake(connection)
        message = protocol.encode_request(bytes(16), Request(0, observations(side=64), None, None))
        frame = b"\x82\xff" + struct.pack(">Q", len(message)) + bytes(4) + message
        connection.sendall(frame[: int(len(frame) * part)])
        return connection


@pytest.mark.slow
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
def test_a_soak_of_malformed_requested_and_aborted_connections_costs_neither_memory_nor_log(
    tmp_path, encrypted
):
    tls = write_certificate(tmp_path) if encrypted else ()
    log = (tmp_path / "log").open("w")
    with log, server_process(tls=tls, log=log) as (process, port):
        url = f"{'wss' if encrypted else 'ws'}://localhost:{port}"
        client = PolicyClient(ServerAddress(url, ca_file=tls[0] if tls else None, timeout_seconds=30))
        expected, aborter, server = (
            client.predict(observations()),
            Aborter(port, *tls[:1]),
            psutil.Process(process.pid),
        )

        def times(count):
            """Return the seconds of valid requests."""
            seconds = []
            for _ in range(count):
                start = time.monotonic()
                np.testing.assert_array_equal(client.predict(observations()).actions, expected.actions)
                seconds.append(time.monotonic() - start)
            return seconds

        def abort(count):
            for number in range(count):
                aborter.abort(number)

        times(1000)
        abort(1000)
        alone = times(1000)
        before = server.memory_info().rss
        times(5000)
        attacker = threading.Thread(target=abort, args=(5000,))
        attacker.start()
        beside = []
        while attacker.is_alive():
            beside += times(1)
        after, lines = server.memory_info().rss, (tmp_path / "log").read_text().count("\n")
        slow = [float(np.percentile(seconds, 95)) * 1e3 for seconds in (alone, beside)]
        logger.info(
            "5000 requests, 5000 aborted: memory %.1f -> %.1f MiB, %d log lines, p95 of a request "
            "%.2f ms alone and %.2f ms meanwhile (%d requests)",
            *(before / 2**20, after / 2**20, lines, *slow, len(beside)),
        )
        assert process.poll() is None
        assert after < 1.05 * before
        assert lines < 500


LIMITS = [JointLimits(f"joint{index}.pos", -1e6, 1e6, speed=10.0) for index in range(7)]
START = {limit.name: 0.0 for limit in LIMITS}


class Robot:
    """Records when it was commanded, and by whom."""

    def __init__(self):
        self.commands = []

    def hold(self, command):
        self.commands.append((time.monotonic(), "watchdog"))

    def move(self, command):
        self.commands.append((time.monotonic(), "policy"))

    def last(self, who, since=0.0):
        return [moment for moment, by in self.commands if by == who and moment > since]


@pytest.mark.slow
def test_when_the_server_is_killed_the_robot_holds_in_time_and_continues_after_a_restart():
    hold_after, robot, stop = 0.3, Robot(), threading.Event()
    safety = SafetyFilter(LIMITS, period=0.05, max_observation_age=0.5)

    def control():
        while not stop.is_set():
            safety.set_observation_time(time.monotonic())
            chunk = remote.chunk(observations(), None)[0]
            robot.move(safety.command(dict(zip(START, chunk[0].tolist(), strict=True)), START))
            time.sleep(0.05)

    with server_process(seconds=0.02) as (process, port):
        remote = RemotePolicy(address(port), patience_seconds=600)
        with Watchdog(safety, robot.hold, hold_after=hold_after, stop_after=600, on_stop=robot.hold):
            controlling = threading.Thread(target=control)
            controlling.start()
            time.sleep(1.0)
            assert not robot.last("watchdog")
            process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            time.sleep(1.0)
            first_hold = robot.last("watchdog", killed)[0] - killed
            assert not robot.last("policy", killed + 0.1)
            with server_process(port=port, seconds=0.02):
                back = time.monotonic()
                time.sleep(1.5)
                assert len(robot.last("policy", back)) > 5
                stop.set()
                controlling.join(10)
    logger.info("the robot was held %.3f s after the kill (watchdog: %s s)", first_hold, hold_after)
    assert first_hold < hold_after + 0.2
    assert safety.counts["stale"] == 1  # the last answer was to an observation from before the kill
    assert remote.reconnections == 1


CLIENT = """
import sys
from tests.policy_servers import address, observations
from vega_policy.deployment.client import PolicyClient
client = PolicyClient(address(int(sys.argv[1])))
while True:
    client.predict(observations())
    print("answered", flush=True)
"""


@pytest.mark.slow
def test_when_a_client_is_killed_its_session_ends_and_others_are_served():
    with running() as (server, port):
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(port)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "answered\n"
        assert "vega_sessions 1.0" in server.metrics.text()
        process.kill()
        process.wait()
        process.stdout.close()
        end = time.monotonic() + 5
        while "vega_sessions 0.0" not in server.metrics.text():
            assert time.monotonic() < end, "the session of a killed client was kept"
            time.sleep(0.01)
        assert PolicyClient(address(port)).predict(observations()).actions.shape == (1, 4, 7)
