"""Thousands of malformed messages and killed processes: the server keeps serving, and the robot holds.

The measurements of the slow tests are shown with `-m slow -o log_cli=true -o log_cli_level=INFO`.
"""

import logging
import signal
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

from tests.policy_servers import address, observations, running, server_process
from vega_policy.deployment import protocol
from vega_policy.deployment.client import PolicyClient, RemotePolicy
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
            answer = msgspec.msgpack.decode(self.connection.recv(timeout=20))
            assert answer["type"] in ("error", "actions")
        except ConnectionClosed:
            self.connection, self.closed = None, self.closed + 1
        self.sent += 1

    def corrupt(self, message):
        if isinstance(message, bytes | str):
            return message
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
    corpus = [
        b"",
        b"\xc1",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"\x81\xa1a\xc6\x7f\xff\xff\xff",
        "{}",
        b"\x80",
    ]
    while attacker.sent < messages:
        turn = attacker.sent % 20
        if turn < len(corpus):
            attacker.send(corpus[turn])
        elif turn < 10 and attacker.sent % 400 < 20:
            attacker.send(bytes(9 * 2**20))
        elif turn < 15:
            attacker.send((int(rng.integers(3000)), rng.bytes(int(rng.integers(1, 9)))))
        else:
            attacker.send(rng.bytes(int(rng.integers(2000))))
    return attacker


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
