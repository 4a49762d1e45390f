"""Clients of a policy server: `PolicyClient` sends requests, `RemotePolicy` also reconnects."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from vega_policy.deployment import protocol
from vega_policy.deployment.protocol import Hello, Reply, Request, RTCContext, ServedDescription, read_token
from vega_policy.evaluation.policies import ObservationBatch

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2


class PolicyUnavailableError(ConnectionError):
    """The server is unreachable, closed the connection, or did not answer in time; a retry may succeed."""


@dataclass(frozen=True)
class ServerAddress:
    """Address of a policy server, and the credentials for it."""

    url: str  # `ws://host:port` or, with TLS, `wss://host:port`
    token_file: Path | None = None  # readable by its owner only; None for a server without a token
    ca_file: Path | None = None  # PEM file with the certificate to trust; None trusts the system's
    timeout_seconds: float = 10.0  # for a connection, and for an answer


class ClientTLSContext(ssl.SSLContext):
    """TLS settings for `websockets.sync`, which reads and writes one connection from two threads.

    OpenSSL forbids that: connections end for no reason, or the process crashes.
    """

    def __new__(cls, ca_file: Path | None) -> ClientTLSContext:
        """Trust the certificates of a PEM file only; without one, the system's.

        Raises:
            ValueError: If the file is missing or holds no certificate.
        """
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        if ca_file is None:
            context.load_default_certs()
            return context
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:
            raise ValueError(
                f"{ca_file}: expected a PEM file with the certificate to trust: {error.strerror or error}"
            ) from error
        return context

    def wrap_socket(self, sock: socket.socket, *_: Any, **options: Any) -> ssl.SSLSocket:  # pyright: ignore
        """Return an encrypted connection after its handshake."""
        return cast(ssl.SSLSocket, _TLSConnection(self, sock, options["server_hostname"]))


class _TLSConnection:
    """A socket's methods, encrypted; OpenSSL's object is used by one thread at a time."""

    def __init__(self, context: ssl.SSLContext, plain: socket.socket, server_hostname: str) -> None:
        self._plain = plain
        self._received, self._encrypted = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._encrypted, server_hostname=server_hostname)
        self._using = threading.Lock()  # the three objects above
        self._sending = threading.Lock()  # the socket, so that records stay in order; taken before `_using`
        self._shake_hands(plain.gettimeout())

    def _shake_hands(self, timeout: float | None) -> None:
        end = None if timeout is None else time.monotonic() + timeout  # of all messages, not of each
        while True:
            try:
                self._tls.do_handshake()
                self._flush()
                return
            except ssl.SSLWantReadError:
                self._flush()
            if end is not None:
                self._plain.settimeout(max(end - time.monotonic(), 1e-3))
            self._receive()

    def __getattr__(self, name: str) -> Any:
        """Take names, timeouts and the end of a connection from the socket."""
        return getattr(self._plain, name)

    def recv(self, size: int) -> bytes:
        """Wait for data; empty at the end that the peer announced, an SSLEOFError at any other end."""
        while True:
            with self._using:
                try:
                    return self._tls.read(size)
                except ssl.SSLWantReadError:
                    answer = self._encrypted.pending
                except ssl.SSLZeroReturnError:
                    return b""
            if answer:  # to an update of keys
                self._flush()
            self._receive()

    def sendall(self, data: bytes) -> None:
        """Send all data."""
        with self._using:
            self._tls.write(data)  # memory takes all of it
        self._flush()

    def _receive(self) -> None:
        data = self._plain.recv(2**16)  # without a lock: it may wait
        with self._using:
            if data:
                self._received.write(data)
            else:
                self._received.write_eof()

    def _flush(self) -> None:
        with self._sending:
            with self._using:
                data = self._encrypted.read()
            self._plain.sendall(data)


def _host(url: str) -> str:
    """Return the host of an address; a ValueError if it is none."""
    try:
        parsed = urlsplit(url)
        (parsed.hostname or "").encode("idna")
        if parsed.scheme in ("ws", "wss") and parsed.hostname and parsed.port != 0:
            return parsed.hostname
        error = "no ws:// or wss://, host or port"
    except ValueError as reason:
        error = str(reason)
    raise ValueError(f"expected a ws:// or wss:// address, got {url!r}: {error}")


class PolicyClient:
    """Client of a policy server, one session at a time; not to be shared between threads."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._token = read_token(address.token_file)
        host = _host(address.url)
        if not (self._token is None or address.url.startswith("wss://") or protocol.is_loopback(host)):
            logger.warning("%s: without TLS the token and all frames can be read on the network", address.url)
        self._connection: ClientConnection | None = None
        self._hello: Hello | None = None
        self._first: ServedDescription | None = None
        self._sequence = -1

    def connect(self) -> Hello:
        """Return the server's hello, of the open session if there is one.

        Raises:
            PolicyUnavailableError: If the server is unreachable now.
            PermissionError: If it does not accept the token.
            ValueError: If the address is invalid, or protocol or policy have changed.
        """
        if self._connection is not None and self._hello is not None:
            return self._hello
        url, timeout = self._address.url, self._address.timeout_seconds
        try:
            with contextlib.ExitStack() as on_failure:
                connection = connect(
                    url.rstrip("/") + protocol.PATH,
                    ssl=self._tls(),
                    subprotocols=[Subprotocol(protocol.SUBPROTOCOL)],
                    additional_headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
                    compression=None,
                    proxy=None,
                    open_timeout=timeout,
                    close_timeout=1.0,
                    user_agent_header=None,
                )
                on_failure.callback(connection.close)
                hello = protocol.decode_hello(connection.recv(timeout=timeout))
                self._check_same(hello.policy)
                on_failure.pop_all()
        except InvalidURI as error:
            raise ValueError(f"expected a ws:// or wss:// address, got {url!r}: {error}") from error
        except InvalidStatus as error:
            if error.response.status_code == 401:
                raise PermissionError(f"{url} does not accept the token of this client") from error
            raise PolicyUnavailableError(f"{url} refused: {error}") from error
        except (OSError, TimeoutError, ConnectionClosed, InvalidHandshake) as error:
            raise PolicyUnavailableError(f"no policy server at {url}: {error}") from error
        self._connection, self._hello, self._sequence = connection, hello, -1
        return hello

    def predict(
        self, batch: ObservationBatch, noise: np.ndarray | None = None, rtc: RTCContext | None = None
    ) -> Reply:
        """Request actions for b rows; opens a session if there is none.

        `noise` is float32 [b t a], or None for the server's own; `rtc` is the chunk to continue, for one row.

        Raises:
            PolicyUnavailableError: If the connection broke or no answer came in time; a retry may succeed.
            ProtocolError: If the request is too large, or the server refused it.
        """
        hello = self.connect()
        connection = self._connection
        assert connection is not None
        self._sequence += 1
        request = protocol.encode_request(hello.session, Request(self._sequence, batch, noise, rtc))
        if len(request) > hello.limits.message_bytes:  # the server would hang up, and a retry would not help
            most = hello.limits.message_bytes
            raise protocol.ProtocolError(
                "malformed",
                f"the request has {len(request)} bytes, {self._address.url} takes {most}: "
                "send smaller frames, or start the server with a larger server.limits.message_bytes",
            )
        try:
            connection.send(request)
            answer = connection.recv(timeout=self._address.timeout_seconds)
        except (OSError, TimeoutError, ConnectionClosed) as error:
            self.close()  # a late answer would be read as that to the next request
            raise PolicyUnavailableError(f"{self._address.url} did not answer: {error}") from error
        return protocol.decode_answer(answer, self._sequence, len(batch.instructions), hello.policy)

    def close(self) -> None:
        """End the session, if there is one."""
        if self._connection is not None:
            with contextlib.suppress(OSError, TimeoutError):
                self._connection.close()
        self._connection = self._hello = None

    def _check_same(self, description: ServedDescription) -> None:
        self._first = self._first or description
        if description != self._first:
            raise ValueError(
                f"{self._address.url} now offers another policy ({description.fingerprint} instead of "
                f"{self._first.fingerprint}); restart this client to use it"
            )

    def _tls(self) -> ssl.SSLContext | None:
        if not self._address.url.startswith("wss://"):
            return None
        return ClientTLSContext(self._address.ca_file)


class RemotePolicy:
    """A policy on a server as a `ChunkPolicy`: the same rows and noise give the same actions as locally.

    `action_steps` of each chunk are executed, None takes the policy's own. A server that is unavailable for
    `patience_seconds` is a PolicyUnavailableError.
    """

    def __init__(
        self, address: ServerAddress, *, action_steps: int | None = None, patience_seconds: float = 30.0
    ) -> None:
        self._client = PolicyClient(address)
        self._patience = patience_seconds
        self.reconnections = 0
        self.served = self._connect(time.monotonic() + patience_seconds).policy
        self.noise_shape = self.served.noise_shape
        self.description = self.served.policy
        if action_steps is not None:
            self.description = replace(self.description, action_steps=action_steps)
        self.reads_frames = bool(self.description.cameras)

    def reset(self, instructions: Sequence[str] = ()) -> None:
        """Do nothing: the server keeps no state between requests."""

    def chunk(
        self, batch: ObservationBatch, noise: np.ndarray | None, rtc: RTCContext | None = None
    ) -> np.ndarray:
        """Predict actions in the robot's units; see `ChunkPolicy.chunk`.

        Raises:
            PolicyUnavailableError: If the server is unavailable for longer than `patience_seconds`.
            ProtocolError: If the server refused the request.
            ValueError: If another checkpoint is served after a reconnection.
        """
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return self._client.predict(batch, noise, rtc).actions
            except PolicyUnavailableError as error:
                if time.monotonic() > deadline:
                    raise
                logger.warning("%s; trying again", error)
            time.sleep(RETRY_SECONDS)
            self._connect(deadline)
            self.reconnections += 1
            logger.warning("connected again")

    def close(self) -> None:
        """End the session."""
        self._client.close()

    def _connect(self, deadline: float) -> Hello:
        while True:
            try:
                return self._client.connect()
            except PolicyUnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)
