"""The policy server: a WebSocket endpoint that believes nobody and survives everybody."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.typing import Subprotocol

from vega_policy.deployment import protocol
from vega_policy.deployment.batching import Batcher
from vega_policy.deployment.metrics import ServerMetrics
from vega_policy.deployment.protocol import Hello, Reply, ServedDescription
from vega_policy.deployment.servable import ServablePolicy
from vega_policy.deployment.server_settings import ServerSettings, is_loopback
from vega_policy.deployment.wire import ProtocolError, unpack

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Session:
    """One client's state: who it is, how far it is, and how much it may still ask."""

    connection: ServerConnection
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(protocol.SESSION_BYTES), repr=False)
    sequence: int = -1
    faults: int = 0
    busy: bool = False
    allowance: float = math.inf  # a full second's worth
    counted_at: float = field(default_factory=time.monotonic)

    def spend(self, rate: float) -> bool:
        """Take one request from the allowance, which refills at `rate` a second up to one second's worth."""
        now = time.monotonic()
        self.allowance = min(self.allowance + (now - self.counted_at) * rate, max(rate, 1.0))
        self.counted_at = now
        if self.allowance < 1.0:
            return False
        self.allowance -= 1.0
        return True


class _CountedConnection(ServerConnection):
    """A connection that is dropped at once if there are too many already, handshakes included."""

    def __init__(self, *arguments: Any, most: int, refused: Callable[[], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most, self._refused = most, refused

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection on, or drop it."""
        if len(self.server.handlers) < self._most:
            super().connection_made(transport)
            return
        super(ServerConnection, self).connection_made(transport)
        self._refused()
        self.transport.abort()


class PolicyServer:
    """Offers a policy to clients that know the token.

    Besides the protocol (see `vega_policy.deployment.protocol`) it answers `GET /healthz` (200, or 503 while
    it shuts down) to anybody and `GET /metrics` (Prometheus text) to those who know the token.

    Args:
        policy: The policy.
        settings: How it is run.
    """

    def __init__(self, policy: ServablePolicy, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = ServerMetrics()
        self._served = ServedDescription(
            policy.description, policy.fingerprint, policy.noise_shape, policy.continues
        )
        self._sessions: set[_Session] = set()
        self._stopping = False
        self._batcher = Batcher(
            policy,
            rows=settings.batch_rows,
            wait_seconds=settings.batch_wait_seconds,
            crowded=lambda: len(self._sessions) > 1,
            metrics=self.metrics,
        )

    async def run(self, stop: asyncio.Event, started: Callable[[int], None] | None = None) -> None:
        """Serve until `stop` is set; then let running requests finish, and close.

        Args:
            stop: Ends the server.
            started: Called with the port once clients can connect.

        Raises:
            OSError: If the address is taken.
        """
        settings = self.settings
        batching = asyncio.create_task(self._batcher.run())
        tls = settings.tls()
        only_with_tls: dict[str, Any] = (
            {} if tls is None else {"ssl_handshake_timeout": settings.handshake_seconds}
        )
        limited = partial(
            _CountedConnection, most=settings.connections, refused=partial(self._refuse, "connections")
        )
        async with serve(
            self._converse,
            settings.host,
            settings.port,
            origins=[None],  # no browser: a page from anywhere could otherwise talk to a server on loopback
            subprotocols=[Subprotocol(protocol.SUBPROTOCOL)],
            compression=None,  # a small message cannot grow into a large one
            process_request=self._admit,
            server_header=None,
            open_timeout=settings.handshake_seconds,
            max_size=settings.limits.message_bytes,
            max_queue=1,
            ssl=tls,
            **only_with_tls,
            create_connection=limited,  # pyright: ignore[reportArgumentType] called, never subclassed
        ) as server:
            port = server.sockets[0].getsockname()[1]
            logger.info("serving on %s:%d, %s", settings.host, port, "TLS" if tls else "no TLS")
            if tls is None and not is_loopback(settings.host):
                logger.warning("without TLS the token and all frames can be read on the way")
            if started is not None:
                started(port)
            await stop.wait()
            await self._shut_down(server)
        batching.cancel()
        self._batcher.close()

    async def _shut_down(self, server: Server) -> None:
        self._stopping = True
        logger.info("shutting down: %d sessions", len(self._sessions))
        idle = [session for session in self._sessions if not session.busy]
        closing = [asyncio.create_task(self._hang_up(session.connection)) for session in idle]
        deadline = time.monotonic() + self.settings.grace_seconds
        while any(session.busy for session in self._sessions) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if closing:
            await asyncio.wait(closing, timeout=1.0)
        server.close()

    async def _hang_up(self, connection: ServerConnection) -> None:
        await connection.close(CloseCode.GOING_AWAY, "shutting down")

    def _refuse(self, reason: str) -> None:
        self.metrics.refused.labels(reason).inc()

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer plain requests; let a WebSocket handshake go on (None) only with the right token."""
        if request.path == "/healthz":
            status = HTTPStatus.SERVICE_UNAVAILABLE if self._stopping else HTTPStatus.OK
            words = {"status": "stopping" if self._stopping else "ok", "protocol": protocol.VERSION}
            return connection.respond(status, json.dumps(words) + "\n")
        if request.path not in (protocol.PATH, "/metrics"):
            return connection.respond(HTTPStatus.NOT_FOUND, f"the policy is at {protocol.PATH}\n")
        if not self._knows_token(request):
            self._refuse("token")
            return connection.respond(HTTPStatus.UNAUTHORIZED, "Authorization: Bearer <token> is needed\n")
        if request.path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.metrics.text())
        if len(self._sessions) >= self.settings.sessions:
            self._refuse("sessions")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "all sessions are taken\n")
        return None

    def _knows_token(self, request: HttpRequest) -> bool:
        if self.settings.token is None:
            return True
        presented = request.headers.get_all("Authorization")
        expected = f"Bearer {self.settings.token}".encode()
        given = presented[0].encode("utf-8", "surrogateescape") if len(presented) == 1 else b""
        return hmac.compare_digest(given, expected)

    async def _converse(self, connection: ServerConnection) -> None:
        """One session, from hello to the end."""
        session = _Session(connection)
        if connection.subprotocol != protocol.SUBPROTOCOL:
            await connection.close(CloseCode.PROTOCOL_ERROR, f"subprotocol {protocol.SUBPROTOCOL} is needed")
            return
        if len(self._sessions) >= self.settings.sessions:  # several handshakes may have passed at once
            self._refuse("sessions")
            await connection.close(CloseCode.TRY_AGAIN_LATER, "all sessions are taken")
            return
        self._sessions.add(session)
        self.metrics.sessions.set(len(self._sessions))
        try:
            await connection.send(
                protocol.encode_hello(Hello(session.secret, self._served, self.settings.limits))
            )
            while not self._stopping and session.faults < self.settings.faults:
                await self._exchange(session)
            if self._stopping:
                await self._hang_up(connection)
            else:
                await connection.close(CloseCode.POLICY_VIOLATION, "too many malformed messages")
        except ConnectionClosed:
            pass  # the usual end of a session
        except TimeoutError:
            self._refuse("idle")
            await connection.close(CloseCode.POLICY_VIOLATION, "idle for too long")
        finally:
            self._sessions.discard(session)
            self.metrics.sessions.set(len(self._sessions))

    async def _exchange(self, session: _Session) -> None:
        """Take one message and answer it."""
        idle = self.settings.idle_seconds
        data = await asyncio.wait_for(session.connection.recv(), idle)  # a whole message: drips do not count
        start = time.perf_counter()
        session.busy = True
        try:
            answer, outcome = await self._answer(session, data, start)
            self.metrics.requests.labels(outcome).inc()
            self.metrics.server_seconds.observe(time.perf_counter() - start)
            await asyncio.wait_for(session.connection.send(answer), idle)
        finally:
            session.busy = False  # an answer that is under way is waited for, too, when the server shuts down

    async def _answer(self, session: _Session, data: str | bytes, start: float) -> tuple[bytes, str]:
        """Return the answer to a message, and the outcome for the metrics."""
        sequence = None
        try:
            rate = self.settings.limits.requests_per_second
            if not session.spend(rate):
                await asyncio.sleep(1 / rate)  # meanwhile nothing more is read of it
                raise ProtocolError("rate", f"more than {rate} requests a second")
            value = unpack(data, self.settings.limits.message_bytes)
            request = protocol.decode_request(
                value, session.secret, session.sequence, self._served, self.settings.limits
            )
            session.sequence = sequence = request.sequence
            actions, model_seconds = await self._batcher.predict(request)
        except ProtocolError as error:
            if error.code in ("malformed", "session", "sequence"):
                session.faults += 1
            return protocol.encode_error(sequence, error.code, str(error)), error.code
        reply = Reply(sequence, actions, model_seconds, time.perf_counter() - start)
        return protocol.encode_reply(reply), "ok"
