"""The policy server: authentication, limits, reconnection and shutdown."""

import contextlib
import http.client
import logging
import re
import select
import socket
import threading
import time

import msgspec
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.policy_servers import (
    TOKEN,
    ArithmeticPolicy,
    address,
    limits,
    noises,
    observations,
    running,
    write_certificate,
)
from vega_policy.deployment import protocol
from vega_policy.deployment.client import (
    PolicyClient,
    PolicyUnavailableError,
    RemotePolicy,
    ServerAddress,
)
from vega_policy.deployment.protocol import ProtocolError, Request, RTCContext, read_token
from vega_policy.deployment.server import LogLimit, ServerSettings


class Other(ArithmeticPolicy):
    """Another checkpoint."""

    fingerprint = "other"


def raw(port, token=None, **options):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    options = {"subprotocols": [protocol.SUBPROTOCOL], "compression": None, "proxy": None} | options
    return connect(f"ws://127.0.0.1:{port}/v1", additional_headers=headers, **options)


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def request(connection, hello, sequence=0, **options):
    connection.send(
        protocol.encode_request(hello.session, Request(sequence, observations(**options), None, None))
    )
    return receive(connection)


def receive(connection):
    return msgspec.msgpack.decode(connection.recv(timeout=10))


def test_a_remote_policy_predicts_the_actions_of_the_local_one_bit_for_bit():
    local = ArithmeticPolicy()
    with running() as (_, port):
        remote = RemotePolicy(address(port))
        assert remote.description == local.description
        assert remote.noise_shape == local.noise_shape
        for rows, seed in ((1, 0), (3, 1)):
            batch, noise = observations(rows, seed), noises(rows, seed)
            np.testing.assert_array_equal(remote.chunk(batch, noise), local.chunk(batch, noise))
        np.testing.assert_array_equal(remote.chunk(observations(), None), local.chunk(observations(), None))
        rtc = RTCContext(np.ones((2, 7), np.float32), 1, 2, 10.0)
        assert (remote.chunk(observations(), noises(), rtc)[0, :2] == 1).all()
        remote.close()


def test_without_the_token_only_health_is_answered(tmp_path):
    with running(token=TOKEN) as (server, port):
        for wrong in (None, "", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "\u00e9" * 30):
            with pytest.raises(InvalidStatus) as error:
                raw(port, wrong)
            assert error.value.response.status_code == 401
        assert get(port, "/metrics")[0] == 401
        assert get(port, "/healthz") == (200, '{"status": "ok", "protocol": 1}\n')
        assert get(port, "/secret")[0] == 404
        assert 'vega_connections_refused_total{reason="token"} 7.0' in server.metrics.text()
        status, metrics = get(port, "/metrics", Authorization=f"Bearer {TOKEN}")
        assert (status, "vega_sessions 0.0" in metrics) == (200, True)
        with pytest.raises(PermissionError, match="does not accept the token"):
            PolicyClient(address(port, tmp_path, "another-token-that-is-long-enough")).connect()
        assert PolicyClient(address(port, tmp_path, TOKEN)).predict(observations()).actions.shape == (1, 4, 7)


def test_a_web_page_cannot_connect_to_a_server_on_loopback():
    with running() as (_, port):
        with pytest.raises(InvalidStatus) as error:
            raw(port, origin="https://evil.example")
        assert error.value.response.status_code == 403


def test_a_recorded_session_cannot_be_replayed():
    with running() as (_, port):
        with raw(port) as connection:
            hello = protocol.decode_hello(connection.recv(timeout=10))
            recorded = protocol.encode_request(hello.session, Request(0, observations(), None, None))
            connection.send(recorded)
            assert receive(connection)["type"] == "actions"
            connection.send(recorded)
            assert receive(connection)["code"] == "sequence"
        with raw(port) as connection:
            connection.recv(timeout=10)
            connection.send(recorded)
            assert receive(connection)["code"] == "session"


def test_many_malformed_messages_or_one_too_large_close_the_connection():
    with running(faults=3, limits=limits(message_bytes=100_000)) as (_, port):
        with raw(port) as connection:
            connection.recv(timeout=10)
            for _ in range(3):
                connection.send(b"rubbish")
                assert receive(connection)["code"] == "malformed"
            with pytest.raises(ConnectionClosed) as error:
                connection.recv(timeout=10)
            assert error.value.rcvd.code == 1008
        with raw(port) as connection:
            connection.recv(timeout=10)
            connection.send(b"x" * 100_001)
            with pytest.raises(ConnectionClosed) as error:
                connection.recv(timeout=10)
            assert error.value.rcvd.code == 1009
        assert RemotePolicy(address(port)).chunk(observations(), None).shape == (1, 4, 7)


def test_a_flood_of_requests_is_slowed_down_to_the_rate_allowed():
    with running(limits=limits(requests_per_second=4.0)) as (_, port), raw(port) as connection:
        hello = protocol.decode_hello(connection.recv(timeout=10))
        start = time.monotonic()
        answers = [request(connection, hello, sequence) for sequence in range(12)]
        assert time.monotonic() - start > 0.9
        assert {answer.get("code") for answer in answers} == {None, "rate"}


def test_slow_connections_are_closed_while_others_are_served():
    with running(handshake_seconds=0.5, idle_seconds=0.7) as (server, port):
        client = PolicyClient(address(port))
        with socket.create_connection(("127.0.0.1", port)) as half, raw(port) as dripping:
            half.sendall(b"GET /v1 HTTP/1.1\r\nHost: x\r\n")
            dripping.recv(timeout=10)
            end, closed = time.monotonic() + 10, False
            half.settimeout(0.01)
            while not closed:
                assert time.monotonic() < end, "slow connections were never closed"
                client.predict(observations())
                try:
                    half.sendall(b"X")
                    dripping.ping()
                    closed = half.recv(1) == b""
                except TimeoutError:
                    time.sleep(0.05)
                except ConnectionError:
                    closed = True
            with pytest.raises(ConnectionClosed):
                dripping.recv(timeout=10)
        assert 'reason="idle"' in server.metrics.text()
        client.close()


def test_fifty_clients_at_once_each_get_their_own_answer():
    policy, local, wrong = ArithmeticPolicy(0.01), ArithmeticPolicy(), []

    def work(seed):
        client = PolicyClient(address(port))
        for turn in range(3):
            batch, noise = observations(seed=seed + 100 * turn), noises(seed=seed)
            if not np.array_equal(client.predict(batch, noise).actions, local.chunk(batch, noise)):
                wrong.append(seed)
        client.close()

    with running(policy, sessions=50) as (server, port):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert 'vega_requests_total{outcome="ok"} 150.0' in server.metrics.text()
    assert policy.rows == [1] * 150


def test_there_are_no_more_sessions_and_connections_than_allowed():
    with running(sessions=2, connections=4) as (server, port):
        taken = [raw(port) for _ in range(2)]
        for connection in taken:
            connection.recv(timeout=10)
        with pytest.raises(InvalidStatus) as error:
            raw(port)
        assert error.value.response.status_code == 503
        opened = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(3)]
        # The refused session may still be counted when the first of them arrives: any one of them is refused.
        answered, _, _ = select.select(opened, [], [], 4)  # less than the time of a handshake
        assert any(connection.recv(1) == b"" for connection in answered)
        assert 'reason="connections"' in server.metrics.text()
        for connection in [*taken, *opened]:
            connection.close()


def test_new_connections_are_accepted_one_after_the_other_while_a_session_is_served():
    with running(connections_per_second=10.0) as (_, port):
        client = PolicyClient(address(port))
        client.predict(observations())
        start, served = time.monotonic(), 0
        burst = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(12)]
        for connection in burst:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        while len(select.select(burst, [], [], 0)[0]) < len(burst):
            client.predict(observations())
            served += 1
        assert time.monotonic() - start >= 1.1  # eleven pauses of 0.1 s
        assert served > 20
        for connection in burst:
            assert connection.recv(12) == b"HTTP/1.1 200"
            connection.close()
        client.close()


def test_a_policy_that_fails_costs_one_answer_not_the_server():
    with running() as (_, port):
        client = PolicyClient(address(port))
        with pytest.raises(ProtocolError, match="policy failed") as error:
            client.predict(observations(instruction="fail"))
        assert error.value.code == "policy"
        assert client.predict(observations()).actions.shape == (1, 4, 7)


def test_shutting_down_lets_running_requests_finish():
    answers = []
    with running(ArithmeticPolicy(0.5)) as (server, port):
        idle = raw(port)
        idle.recv(timeout=10)
        client = PolicyClient(address(port))
        client.connect()
        thread = threading.Thread(target=lambda: answers.append(client.predict(observations())))
        thread.start()
        time.sleep(0.2)
        server.stop()
        with pytest.raises(ConnectionClosed) as error:
            idle.recv(timeout=10)
        assert error.value.rcvd.code == 1001
        thread.join(10)
    assert answers[0].actions.shape == (1, 4, 7)
    with pytest.raises(PolicyUnavailableError):
        PolicyClient(address(port, timeout_seconds=1.0)).connect()


def test_a_client_reconnects_to_a_restarted_server():
    with running() as (_, port):
        remote = RemotePolicy(address(port), patience_seconds=20)
        before = remote.chunk(observations(), None)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(remote.chunk(observations(), None)))
    thread.start()
    time.sleep(0.5)
    assert not answers
    with running(port=port):
        thread.join(20)
        np.testing.assert_array_equal(answers[0], before)
        assert remote.reconnections == 1
        remote.close()


def test_another_policy_at_the_same_address_is_refused_at_every_request():
    with running() as (_, port):
        remote = RemotePolicy(address(port), patience_seconds=5)
        remote.chunk(observations(), None)
    with running(Other(), port=port):
        for _ in range(2):
            with pytest.raises(ValueError, match="now offers another policy"):
                remote.chunk(observations(), None)
    remote.close()


def test_a_server_beyond_loopback_needs_a_long_private_token(tmp_path):
    with pytest.raises(ValueError, match="needs a token"):
        ServerSettings(host="0.0.0.0")
    with pytest.raises(ValueError, match="needs a token"):
        ServerSettings(host="robot.lab")
    with pytest.raises(ValueError, match="24 or more"):
        ServerSettings(token="short")
    with pytest.raises(ValueError, match="TLS needs both"):
        ServerSettings(certificate=tmp_path / "a.pem")
    assert TOKEN not in repr(ServerSettings(host="0.0.0.0", token=TOKEN))
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o644)
    with pytest.raises(PermissionError, match="chmod 600"):
        read_token(file)
    file.chmod(0o600)
    assert read_token(file) == TOKEN


def test_half_open_tls_handshakes_count_as_connections_and_are_freed_when_they_end(tmp_path):
    certificate, key = write_certificate(tmp_path)
    with running(connections=4, certificate=certificate, key=key) as (server, port):
        opened = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(5)]
        # The refused session may still be counted when the first of them arrives: any one of them is refused.
        answered, _, _ = select.select(opened, [], [], 4)  # less than the time of a handshake
        assert any(connection.recv(1) == b"" for connection in answered)
        assert 'vega_connections_refused_total{reason="connections"} 1.0' in server.metrics.text()
        for connection in opened:
            connection.close()
        trusting = ServerAddress(f"wss://127.0.0.1:{port}", ca_file=certificate, timeout_seconds=5)
        RemotePolicy(trusting, patience_seconds=5).close()


def test_of_many_equal_log_records_a_few_pass_and_the_rest_is_counted():
    now = [0.0]
    limit, passed = LogLimit(most=2, seconds=60.0, clock=lambda: now[0]), []

    def log(name, text):
        record = logging.LogRecord(name, logging.ERROR, "", 0, text, (), None)
        if limit.filter(record):
            passed.append(record.getMessage())

    for number in range(9):
        log("asyncio", f"Fatal error\ntransport: <{number}>")
    log("asyncio", "another")
    now[0] = 61.0
    log("asyncio", "Fatal error")
    assert passed == [
        "Fatal error\ntransport: <0>",
        "Fatal error\ntransport: <1>",
        "another",
        "Fatal error (7 more in 61 s)",
    ]


def test_of_equal_log_records_the_first_has_its_traceback():
    limit, tracebacks = LogLimit(), []
    for error in (EOFError, EOFError, OSError):
        record = logging.LogRecord("a", logging.ERROR, "", 0, "failed", (), (error, error(), None))
        assert limit.filter(record)
        tracebacks.append(record.exc_info is not None)
    assert tracebacks == [True, False, True]


@pytest.mark.parametrize(
    "content", ["", "two words\nand lines", "-----BEGIN KEY-----\nabc\n", "\u00e9" * 30, "x" * 513]
)
def test_a_file_that_holds_no_token_is_not_sent_to_a_server(tmp_path, content):
    file = tmp_path / "id_rsa"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ValueError, match=r"id_rsa: expected one line of at most 512 visible ASCII"):
        read_token(file)


def test_with_tls_only_clients_that_trust_the_certificate_connect(tmp_path):
    certificate, key = write_certificate(tmp_path)
    with running(certificate=certificate, key=key) as (_, port):
        trusting = ServerAddress(f"wss://127.0.0.1:{port}", ca_file=certificate, timeout_seconds=5)
        assert PolicyClient(trusting).predict(observations()).actions.shape == (1, 4, 7)
        with pytest.raises(PolicyUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            PolicyClient(ServerAddress(f"wss://127.0.0.1:{port}", timeout_seconds=5)).connect()
        with pytest.raises(PolicyUnavailableError):
            PolicyClient(ServerAddress(f"ws://127.0.0.1:{port}", timeout_seconds=5)).connect()
        for file in (key, tmp_path / "missing.pem"):
            with pytest.raises(
                ValueError, match=f"{file}: expected a PEM file with the certificate to trust"
            ):
                PolicyClient(ServerAddress(f"wss://127.0.0.1:{port}", ca_file=file)).connect()
    with pytest.raises(ValueError, match="expected a ws://"):
        PolicyClient(ServerAddress("http://127.0.0.1:1")).connect()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ws://",
        "http://h:1",
        "ws://h:x",
        "ws://h:99999",
        "ws://[::1",
        "ws://h:0",
        "ws://h#x",
        "ws://" + "a" * 99,
    ],
)
def test_what_is_no_address_of_a_server_is_named(url):
    with pytest.raises(ValueError, match=rf"expected a ws:// or wss:// address, got '{re.escape(url)}'"):
        PolicyClient(ServerAddress(url, timeout_seconds=2)).connect()


def test_a_server_that_drips_its_tls_handshake_does_not_hold_the_client_longer_than_its_timeout(tmp_path):
    certificate, _ = write_certificate(tmp_path)
    header = b"\x16\x03\x03\x40\x00"  # of a record of 16 KiB

    def drip():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            for byte in header + bytes(200):
                connection.sendall(bytes([byte]))
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        dripping = threading.Thread(target=drip)
        dripping.start()
        url, start = f"wss://127.0.0.1:{listener.getsockname()[1]}", time.monotonic()
        with pytest.raises(PolicyUnavailableError, match="timed out"):
            PolicyClient(ServerAddress(url, ca_file=certificate, timeout_seconds=1)).connect()
        assert time.monotonic() - start < 3
        dripping.join()


def test_a_token_that_goes_to_another_machine_without_tls_is_warned_of(tmp_path, caplog):
    token = address(1, tmp_path, TOKEN).token_file
    for url in ("ws://127.0.0.1:1", "ws://localhost:1", "wss://gpu.lab:1"):
        PolicyClient(ServerAddress(url, token_file=token))
    PolicyClient(ServerAddress("ws://gpu.lab:1"))
    assert not caplog.records
    PolicyClient(ServerAddress("ws://gpu.lab:1", token_file=token))
    assert "ws://gpu.lab:1: without TLS the token and all frames can be read" in caplog.text


def test_a_request_that_is_too_large_for_the_server_is_refused_before_it_is_sent():
    with running(limits=limits(message_bytes=5000)) as (_, port):
        remote = RemotePolicy(address(port), patience_seconds=0.0)
        with pytest.raises(
            ProtocolError, match=r"the request has \d+ bytes, ws://.* takes 5000: send smaller"
        ):
            remote.chunk(observations(side=32), noises())
        assert remote.chunk(observations(side=16), noises()).shape == (1, 4, 7)


class ManyTickets(ServerSettings):
    """TLS that keeps a client's receiving thread busy inside OpenSSL while its first request is sent."""

    def tls(self):
        context = super().tls()
        context.num_tickets = 100
        return context


def test_with_tls_sending_and_receiving_do_not_disturb_each_other(tmp_path):
    certificate, key = write_certificate(tmp_path)
    with running(kind=ManyTickets, certificate=certificate, key=key) as (_, port):
        trusting = ServerAddress(f"wss://127.0.0.1:{port}", ca_file=certificate, timeout_seconds=5)
        for seed in range(50):
            client = PolicyClient(trusting)
            expected = ArithmeticPolicy().chunk(observations(seed=seed), noises())
            np.testing.assert_array_equal(client.predict(observations(seed=seed), noises()).actions, expected)
            client.close()
