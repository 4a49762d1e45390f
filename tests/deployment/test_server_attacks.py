"""Thousands of malformed messages and killed processes: the server keeps serving, and the robot holds.

The measurements of the slow tests are shown with `-m slow -o log_cli=true -o log_cli_level=INFO`.
"""

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from asyncio.sslproto import SSLProtocol
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

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
from vega_policy.deployment.client import ClientTLSContext, PolicyClient, RemotePolicy, ServerAddress
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

    def __init__(self, port, certificate=None):
        self.url = f"{'ws' if certificate is None else 'wss'}://localhost:{port}/v1"
        self.tls, self.connection = None if certificate is None else ClientTLSContext(certificate), None
        self.sent = self.closed = 0

    def send(self, message):
        if self.connection is None:
            self.connection = connect(
                self.url, ssl=self.tls, subprotocols=[protocol.SUBPROTOCOL], compression=None, proxy=None
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


def attack(port, messages, certificate=None):
    """Send a number of messages, half of them drawn by hypothesis, a tenth too large.

    Returns how many were sent, and how many sessions the server closed.
    """
    attacker = Attacker(port, certificate)

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
    return attacker.sent, attacker.closed


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
        assert attack(port, 300)[0] >= 300
        np.testing.assert_array_equal(client.predict(observations()).actions, expected)
        client.close()


class Clients:
    """Valid clients with a session each, in turn; every answer is checked."""

    def __init__(self, port, certificate, count):
        scheme = "ws" if certificate is None else "wss"
        server = ServerAddress(f"{scheme}://localhost:{port}", ca_file=certificate, timeout_seconds=30)
        self.clients = [PolicyClient(server) for _ in range(count)]
        self.expected, self.served = self.clients[0].predict(observations()).actions, 0
        self.times(count)  # opens all sessions

    def times(self, requests):
        """Return the seconds of requests."""
        seconds = []
        for _ in range(requests):
            client = self.clients[self.served % len(self.clients)]
            start = time.monotonic()
            np.testing.assert_array_equal(client.predict(observations()).actions, self.expected)
            seconds.append(time.monotonic() - start)
            self.served += 1
        return seconds


@contextlib.contextmanager
def attacking_process():
    """Yield the `submit` of a process that takes the time that server and clients leave of the cores.

    An attacker is on another machine, and must not take the time of a client by Python's lock.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=os.nice, initargs=(19,)) as pool:
        yield pool.submit


def times_until(attack, clients):
    """Return the seconds of valid requests until the attack ends, and its result."""
    seconds = []
    while not attack.done():
        seconds += clients.times(1)
    return seconds, attack.result()


def milliseconds(seconds):
    return float(np.percentile(seconds, 95)) * 1e3


@pytest.mark.slow
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
def test_ten_thousand_malformed_messages_cost_no_memory_and_disturb_no_client(tmp_path, encrypted):
    tls = write_certificate(tmp_path) if encrypted else (None,)
    with (
        server_process(tls=tls if encrypted else ()) as (process, port),
        attacking_process() as submit,
    ):
        clients, server = Clients(port, tls[0], 1), psutil.Process(process.pid)
        # Until everything that is allocated once has been; the clients go on, since idle sessions are closed.
        times_until(submit(attack, port, 1000, tls[0]), clients)
        alone = clients.times(2000)
        before = server.memory_info().rss
        beside, (sent, closed) = times_until(submit(attack, port, 10_000, tls[0]), clients)
        after = server.memory_info().rss
        slow = milliseconds(alone), milliseconds(beside)
        logger.info(
            "%d messages, %d closed sessions; memory %.1f -> %.1f MiB; p95 of a valid request %.2f ms alone "
            "and %.2f ms meanwhile (%d requests, the slowest %.3f s)",
            *(sent, closed, before / 2**20, after / 2**20, *slow, len(beside), max(beside)),
        )
        assert process.poll() is None
        assert sent >= 10_000
        assert after < before + min(0.05 * before, 20 * 2**20)
        assert slow[1] <= 2 * slow[0]


UPGRADE = (
    b"GET /v1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: vega-policy.v1\r\n\r\n"
)


def binary_frame(message):
    """Return a WebSocket frame with a mask of zeros."""
    return b"\x82\xff" + struct.pack(">Q", len(message)) + bytes(4) + message


class Aborter:
    """Opens connections to a server and hangs up at every stage, half of the times with a TCP reset."""

    def __init__(self, port, certificate=None):
        self.port, self.tls = port, None if certificate is None else ClientTLSContext(certificate)

    def abort(self, number):
        """Open and abort one connection; `number` chooses the stage."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else 40 ms each
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
        frame = binary_frame(message)
        connection.sendall(frame[: int(len(frame) * part)])
        return connection


def abort_connections(port, count, certificate=None):
    """Abort a number of connections, eight at a time: there is always one that the server may accept next."""
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(Aborter(port, certificate).abort, range(count)):
            pass  # an error is raised here


@pytest.mark.slow
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
def test_a_soak_of_fifty_sessions_and_aborted_connections_costs_neither_memory_nor_log(tmp_path, encrypted):
    tls = write_certificate(tmp_path) if encrypted else (None,)
    log = (tmp_path / "log").open("w")
    with (
        log,
        server_process(tls=tls if encrypted else (), log=log) as (process, port),
        attacking_process() as submit,
    ):
        clients, server = Clients(port, tls[0], 50), psutil.Process(process.pid)
        clients.times(1000)
        times_until(submit(abort_connections, port, 1000, tls[0]), clients)
        before = server.memory_info().rss
        alone = clients.times(5000)
        beside, _ = times_until(submit(abort_connections, port, 5000, tls[0]), clients)
        after, lines = server.memory_info().rss, (tmp_path / "log").read_text().count("\n")
        slow = milliseconds(alone), milliseconds(beside)
        logger.info(
            "5000 requests of 50 sessions, 5000 aborted: memory %.1f -> %.1f MiB, %d log lines, p95 of a "
            "request %.2f ms alone and %.2f ms meanwhile (%d requests)",
            *(before / 2**20, after / 2**20, lines, *slow, len(beside)),
        )
        assert process.poll() is None
        assert after < 1.05 * before
        assert lines < 500
        assert slow[1] <= 2 * slow[0]


def test_tls_handshakes_that_are_cut_off_are_freed_without_python_s_own_collections(tmp_path):
    certificate, key = write_certificate(tmp_path)
    gc.disable()
    try:
        with running(certificate=certificate, key=key, connections_per_second=1e6) as (_, port):
            aborter, end = Aborter(port, certificate), time.monotonic() + 10
            for _ in range(400):
                aborter.abort(4)  # without a reset, which frees everything at once
            while sum(isinstance(one, SSLProtocol) for one in gc.get_objects()) > 200:
                assert time.monotonic() < end, "more than half of the handshakes are kept"
                time.sleep(0.1)
    finally:
        gc.enable()


@pytest.mark.slow
def test_tls_handshakes_that_are_cut_off_do_not_pile_up_in_memory(tmp_path):
    tls = write_certificate(tmp_path)
    with server_process(tls=tls, rate=1e6) as (process, port):
        aborter, server, used = Aborter(port, tls[0]), psutil.Process(process.pid), []
        for _ in range(4):
            for number in range(1500):
                aborter.abort(4 * (number % 2))  # without a reset and with one
            used.append(server.memory_info().rss / 2**20)
        logger.info("6000 handshakes cut off: memory %s MiB", [round(one) for one in used])
        assert used[-1] < used[0] + 10


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
