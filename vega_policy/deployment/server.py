"""WebSocket policy server with authentication, rate limits and input validation."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import json
import logging
import math
import secrets
import selectors
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import ACTION
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, NegotiationError
from websockets.frames import CloseCode
from websockets.headers import build_authorization_basic
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.typing import Subprotocol

from vega_policy.checkpoints import find_checkpoint
from vega_policy.config import check_numbers
from vega_policy.deployment import protocol
from vega_policy.deployment.protocol import FeatureKeys, MessageLimits, ProtocolError, RTCContext
from vega_policy.evaluation.policies import (
    ChunkPolicy,
    LeRobotChunkPolicy,
    ObservationBatch,
    checkpoint_fingerprint,
    choose_device,
    load_lerobot_policy,
    to_lerobot,
)
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.run_dir import use_available_cores

logger = logging.getLogger(__name__)

MIN_TOKEN_LENGTH = 24
_MOST_MESSAGES = 100
_CLOSED_PER_COLLECTION = 100
DEFAULT_LIMITS = MessageLimits(8 * 2**20, rows=16, frame_side=1280, requests_per_second=50.0)


class ServedPolicy(ChunkPolicy, Protocol):
    """A chunk policy that a server can offer."""

    fingerprint: str  # hash over the checkpoint's files
    supports_rtc: bool  # whether `chunk` accepts an `RTCContext`

    def chunk(
        self, batch: ObservationBatch, noise: np.ndarray | None, rtc: RTCContext | None = None
    ) -> np.ndarray:
        """Predict a chunk as `ChunkPolicy.chunk`; with `rtc`, for one row, it continues the last one."""
        ...


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a policy server."""

    host: str = "127.0.0.1"  # any other address than loopback requires a token
    port: int = 8765  # 0 takes a free one
    token: str | None = field(default=None, repr=False)
    certificate: Path | None = None  # PEM file with the certificate chain; with `key` it switches TLS on
    key: Path | None = None  # PEM file with the certificate's private key
    limits: MessageLimits = DEFAULT_LIMITS
    sessions: int = 64  # open at once
    connections: int = 128  # TCP connections open at once, handshakes included
    connections_per_second: float = 25.0  # accepted; others wait, so that requests of sessions do not
    handshake_seconds: float = 5.0  # time until a connection must be a session
    idle_seconds: float = 60.0  # time between complete messages after which a session is closed
    faults: int = 8  # malformed messages after which a session is closed
    grace_seconds: float = 10.0  # time that a shutdown waits for running requests
    dialect: str = "vega"  # of clients at `/`: a key of `protocol.DIALECTS`; `vega` answers at `/v1` only
    client_keys: Mapping[str, Any] | str = "libero"  # names of the inputs in the dialect; see `FeatureKeys`
    ignored_keys: Sequence[str] = ()  # further inputs that its clients send

    def __post_init__(self) -> None:
        """Refuse settings that open the server to everybody, and half a TLS configuration."""
        counts = dict.fromkeys(("sessions", "connections", "faults"), "[1, inf)")
        positive = ("connections_per_second", "handshake_seconds", "idle_seconds", "grace_seconds")
        check_numbers(self, "server.", port="[0, 65535]", **counts, **dict.fromkeys(positive, "(0, inf)"))
        if not protocol.is_loopback(self.host) and self.token is None:
            raise ValueError(
                f"a server on {self.host!r} can be reached from other machines and needs a token: give "
                "token_file, or listen on 127.0.0.1"
            )
        if self.token is not None and len(self.token) < MIN_TOKEN_LENGTH:
            raise ValueError(
                f"expected a token of {MIN_TOKEN_LENGTH} or more characters, got {len(self.token)}; run: "
                'python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        if (self.certificate is None) != (self.key is None):
            raise ValueError(
                f"TLS needs both files: certificate is {self.certificate}, key is {self.key}; give both or "
                "neither"
            )

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context; None without certificate, an OSError if the files are unusable."""
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        return context


def read_server_settings(config: dict[str, Any]) -> ServerSettings:
    """Read the settings of a server from the `server` node of configs/serve.yaml.

    Raises:
        ValueError: If the server would be open to everybody (see `ServerSettings`), or a limit is invalid.
        OSError: If the token's file is missing or others can read it.
    """
    values = dict(config)
    token_file, certificate, key = (
        None if (path := values.pop(name)) is None else Path(path).expanduser()
        for name in ("token_file", "certificate", "key")
    )
    limits = msgspec.convert(values.pop("limits"), MessageLimits)
    return ServerSettings(
        **values, token=protocol.read_token(token_file), certificate=certificate, key=key, limits=limits
    )


def serve_forever(config: Any) -> None:
    """Serve a checkpoint as configs/serve.yaml describes it, until SIGINT or SIGTERM.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If a setting is wrong.
        OSError: If the address is taken, or a file cannot be used.
    """
    use_available_cores(spare=1)  # for decoding frames, and a robot's own process
    dialect = {name: config[name] for name in ("dialect", "client_keys", "ignored_keys")}
    settings = replace(read_server_settings(config["server"]), **dialect)
    policy = load_served_policy(
        Path(config["checkpoint"]),
        device=choose_device(config["device"]),
        action_steps=config["action_steps"],
    )
    warm_up(policy, config["warm_up_side"])

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await PolicyServer(policy, settings).run(stop)

    asyncio.run(run())


def warm_up(policy: ServedPolicy, side: int) -> None:
    """Predict once from black frames of a size, so that the first client does not wait for compilation."""
    description = policy.description
    shape = (*description.frame_axes(1), side, side, 3)
    frames = {camera: np.zeros(shape, np.uint8) for camera in description.cameras}
    state = np.zeros((1, description.state_size or 0), np.float32)
    noise = None if policy.noise_shape is None else np.zeros((1, *policy.noise_shape), np.float32)
    policy.chunk(ObservationBatch(frames, state, ["warm up"]), noise)


class PolicyServer:
    """Offers a policy to clients that present the token.

    Besides the protocol and a dialect (see `vega_policy.deployment.protocol`) it answers `GET /healthz` (200,
    or 503 while it shuts down) to anybody and `GET /metrics` (Prometheus text) to clients with the token. One
    thread predicts, one request after the other.
    """

    def __init__(self, policy: ServedPolicy, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = ServerMetrics()
        self._policy = policy
        self._served = protocol.ServedDescription(
            **asdict(policy.description),
            fingerprint=policy.fingerprint,
            noise_shape=policy.noise_shape,
            supports_rtc=policy.supports_rtc,
        )
        self._keys: FeatureKeys | None = None
        if settings.dialect != "vega":
            self._keys = FeatureKeys.resolve(
                settings.dialect, settings.client_keys, settings.ignored_keys, policy.description
            )
        self._sessions: set[_Session] = set()
        self._stopping = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")

    async def run(self, stop: asyncio.Event, started: Callable[[int], None] | None = None) -> None:
        """Serve until `stop` is set, then let running requests finish; an OSError if the address is taken.

        `started` is called with the port once clients can connect.
        """
        settings = self.settings
        tls = settings.tls()
        patience = settings.handshake_seconds  # asyncio waits 60 and 30 s, in which others are refused
        timeouts = {"ssl_handshake_timeout": patience, "ssl_shutdown_timeout": patience}
        only_with_tls: dict[str, Any] = timeouts if tls else {}
        refuse = partial(self._count_refusal, "connections")
        listener = _Listener(settings, refuse)
        async with serve(
            self._serve_session,
            sock=listener,
            origins=[None],  # no browser: any web page could otherwise connect to a server on loopback
            select_subprotocol=self._select_subprotocol,
            compression=None,  # a small message cannot expand into a large one
            process_request=self._authorize,
            server_header=None,
            open_timeout=settings.handshake_seconds,
            max_size=settings.limits.message_bytes,
            max_queue=1,
            # vla-eval answers no pings while it builds a simulator; `idle_seconds` closes dead sessions
            ping_interval=None if settings.dialect == "vla_eval" else 20,
            ssl=tls,
            **only_with_tls,
        ) as server:
            port = server.sockets[0].getsockname()[1]
            logger.info("serving on %s:%d, %s", settings.host, port, "TLS" if tls else "no TLS")
            if self._keys is not None:
                keys = f"{self._keys.required}, ignored: {sorted(self._keys.ignored)}"
                logger.info("dialect %s at /, observations with the keys %s", settings.dialect, keys)
            if tls is None and not protocol.is_loopback(settings.host):
                logger.warning("without TLS the token and all frames can be read on the network")
            if started is not None:
                started(port)
            gc.collect()
            gc.freeze()  # what imports have made: collecting is a matter of milliseconds then
            with limited_logs("asyncio", "websockets.server", __name__):
                await stop.wait()
                await self._shut_down(server)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _shut_down(self, server: Server) -> None:
        self._stopping = True
        logger.info("shutting down: %d sessions", len(self._sessions))
        idle = [session for session in self._sessions if not session.busy]
        closing = [
            asyncio.create_task(session.connection.close(CloseCode.GOING_AWAY, "shutting down"))
            for session in idle
        ]
        deadline = time.monotonic() + self.settings.grace_seconds
        while any(session.busy for session in self._sessions) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if closing:
            await asyncio.wait(closing, timeout=1.0)
        server.close()

    def _count_refusal(self, reason: str) -> None:
        self.metrics.refused.labels(reason).inc()

    def _authorize(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer plain HTTP requests; return None to continue a WebSocket handshake with the right token."""
        if request.path == "/healthz":
            status = HTTPStatus.SERVICE_UNAVAILABLE if self._stopping else HTTPStatus.OK
            health = {"status": "stopping" if self._stopping else "ok", "protocol": protocol.VERSION}
            return connection.respond(status, json.dumps(health) + "\n")
        paths = [protocol.PATH, "/metrics"] if self._keys is None else [protocol.PATH, "/metrics", "/"]
        if request.path not in paths:
            return connection.respond(HTTPStatus.NOT_FOUND, f"the policy is at {protocol.PATH}\n")
        if not self._has_token(request):
            self._count_refusal("token")
            return connection.respond(HTTPStatus.UNAUTHORIZED, "Authorization: Bearer <token> is needed\n")
        if request.path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.metrics.text())
        if len(self._sessions) >= self.settings.sessions:
            self._count_refusal("sessions")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "all sessions are taken\n")
        return None

    def _has_token(self, request: HttpRequest) -> bool:
        """Whether a request has the token; at `/` in the way of the dialect's client as well."""
        token = self.settings.token
        if token is None:
            return True
        presented = request.headers.get_all("Authorization")
        accepted = [f"Bearer {token}"]
        if request.path == "/" and self.settings.dialect == "openpi":
            accepted.append(f"Api-Key {token}")
        if request.path == "/" and self.settings.dialect == "vla_eval":  # ws://vega:TOKEN@host:port
            accepted.append(build_authorization_basic("vega", token))
        received = presented[0].encode("utf-8", "surrogateescape") if len(presented) == 1 else b""
        return any(hmac.compare_digest(received, one.encode()) for one in accepted)

    def _select_subprotocol(
        self, connection: ServerConnection, offered: Sequence[Subprotocol]
    ) -> Subprotocol | None:
        """Require this protocol's name at its path; clients of the dialects offer none."""
        if connection.request is None or connection.request.path != protocol.PATH:
            return None
        if protocol.SUBPROTOCOL not in offered:
            raise NegotiationError(f"missing subprotocol; expected {protocol.SUBPROTOCOL}")
        return Subprotocol(protocol.SUBPROTOCOL)

    def _open_session(self, connection: ServerConnection) -> _Session:
        limits = self.settings.limits
        if self._keys is None or (connection.request and connection.request.path == protocol.PATH):
            secret = secrets.token_bytes(protocol.SESSION_BYTES)
            return _Session(connection, protocol.VegaSession(secret, self._served, limits))
        dialects = {"openpi": protocol.OpenpiSession, "vla_eval": protocol.VlaEvalSession}
        messages = dialects[self.settings.dialect](self._keys, self._served, limits)
        return _Session(connection, messages, waits=True)

    async def _serve_session(self, connection: ServerConnection) -> None:
        """Run one session, from hello to its end."""
        if len(self._sessions) >= self.settings.sessions:  # several handshakes may have passed at once
            self._count_refusal("sessions")
            await connection.close(CloseCode.TRY_AGAIN_LATER, "all sessions are taken")
            return
        session = self._open_session(connection)
        self._sessions.add(session)
        self.metrics.sessions.set(len(self._sessions))
        try:
            if session.messages.greeting is not None:
                await connection.send(session.messages.greeting)
            while not self._stopping and session.faults < self.settings.faults:
                await self._exchange(session)
            if self._stopping:
                await connection.close(CloseCode.GOING_AWAY, "shutting down")
            else:
                await connection.close(CloseCode.POLICY_VIOLATION, "too many malformed messages")
        except ConnectionClosed:
            pass  # the usual end of a session
        except TimeoutError:
            self._count_refusal("idle")
            await connection.close(CloseCode.POLICY_VIOLATION, "idle for too long")
        finally:
            self._sessions.discard(session)
            self.metrics.sessions.set(len(self._sessions))

    async def _exchange(self, session: _Session) -> None:
        """Receive one message and answer it."""
        idle = self.settings.idle_seconds
        data = await asyncio.wait_for(session.connection.recv(), idle)  # a complete message
        start = time.perf_counter()
        session.busy = True
        try:
            outcome, answer = await self._answer(session, data, start)
            self.metrics.requests.labels(outcome).inc()
            self.metrics.server_seconds.observe(time.perf_counter() - start)
            if answer is not None:
                await asyncio.wait_for(session.connection.send(answer), idle)
        finally:
            session.busy = False  # only now: a shutdown also waits for an answer that is being sent

    async def _answer(
        self, session: _Session, data: str | bytes, start: float
    ) -> tuple[str, bytes | str | None]:
        """Return the outcome, `ok` or an error code, and the message to send."""
        try:
            await self._spend(session)
            request = session.messages.receive(data)
            if not isinstance(request, protocol.Request):
                return "ok", request
            actions, model_seconds = await self._predict(request)
        except ProtocolError as error:
            if error.code in ("malformed", "session", "sequence"):
                session.faults += 1
            return error.code, session.messages.refuse(error)
        reply = protocol.Reply(actions, model_seconds, time.perf_counter() - start)
        return "ok", session.messages.answer(reply)

    async def _spend(self, session: _Session) -> None:
        """Take a request from the session's allowance; nothing more is read while it is used up.

        Clients of the dialects have no answer for a refusal, so theirs waits.

        Raises:
            ProtocolError: If a client of this protocol has none left.
        """
        rate = self.settings.limits.requests_per_second
        while not session.spend(rate):
            await asyncio.sleep(1 / rate)
            if not session.waits:
                raise ProtocolError("rate", f"more than {rate} requests a second")

    async def _predict(self, request: protocol.Request) -> tuple[np.ndarray, float]:
        """Return the actions and the seconds spent in the policy; ProtocolError if it failed."""

        def predict() -> tuple[np.ndarray, float]:
            start = time.perf_counter()
            actions = self._policy.chunk(request.batch, request.noise, request.rtc)
            return actions, time.perf_counter() - start

        work = asyncio.get_running_loop().run_in_executor(self._thread, predict)
        await asyncio.wait([work])
        error = work.exception()
        if error is not None:
            logger.error("the policy failed", exc_info=error)
            raise ProtocolError("policy", "the policy failed; see the server's log")
        actions, seconds = work.result()
        self.metrics.model_seconds.observe(seconds)
        return actions, seconds


class ServerMetrics:
    """Counters of one server, in their own registry."""

    BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vega_requests", "Requests by outcome: ok, or an error code.", ["outcome"], registry=registry
        )
        self.refused = Counter(
            "vega_connections_refused", "Connections refused, by reason.", ["reason"], registry=registry
        )
        self.sessions = Gauge("vega_sessions", "Sessions open now.", registry=registry)
        self.model_seconds = Histogram(
            "vega_model_seconds", "Time in the policy, a request.", buckets=self.BUCKETS, registry=registry
        )
        self.server_seconds = Histogram(
            "vega_server_seconds", "From message to answer.", buckets=self.BUCKETS, registry=registry
        )

    def text(self) -> str:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry).decode()


@dataclass(eq=False)
class _Session:
    """State of one client's session, with its request allowance (a token bucket)."""

    connection: ServerConnection
    messages: protocol.SessionProtocol = field(repr=False)
    waits: bool = False  # requests above the rate wait instead of being refused
    faults: int = 0
    busy: bool = False
    allowance: float = math.inf  # requests; at most those of one second
    counted_at: float = field(default_factory=time.monotonic)

    def spend(self, rate: float) -> bool:
        """Take one request from the allowance, which refills at `rate` a second; False if it is used up."""
        now = time.monotonic()
        self.allowance = min(self.allowance + (now - self.counted_at) * rate, max(rate, 1.0))
        self.counted_at = now
        if self.allowance < 1.0:
            return False
        self.allowance -= 1.0
        return True


class _Listener(socket.socket):
    """Listening socket that pauses after each connection, and closes at once what exceeds a number of them.

    asyncio creates a connection's object only after its TLS handshake, so handshakes are counted here. It
    accepts while `fileno()` is readable: that of a selector, which holds the socket except during pauses.
    """

    def __init__(self, settings: ServerSettings, on_refusal: Callable[[], None]) -> None:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        address = settings.host, settings.port
        super().__init__(fileno=socket.create_server(address, family=family).detach())
        self.open = self._closed = 0
        self._most, self._on_refusal = settings.connections, on_refusal
        self._pause_seconds = 1 / settings.connections_per_second
        self._pause: asyncio.TimerHandle | None = None
        self._gate = selectors.DefaultSelector()
        self._end_pause()

    def fileno(self) -> int:
        """Return the descriptor that is readable when a connection may be accepted."""
        return self._gate.fileno()

    def close(self) -> None:
        """Stop listening."""
        if self._pause is not None:
            self._pause.cancel()
        self._gate.close()
        super().close()

    def count_closed(self) -> None:
        """Count a closed connection; collect garbage at times.

        A TLS handshake that was cut off is a reference cycle with a buffer of 256 KiB.
        """
        self.open -= 1
        self._closed += 1
        if self._closed % _CLOSED_PER_COLLECTION == 0:
            gc.collect()

    def accept(self) -> tuple[socket.socket, Any]:
        """Return a connection and its address.

        Raises:
            BlockingIOError: During a pause.
            ConnectionAbortedError: If the connection was closed at once.
        """
        if self._pause is not None:
            raise BlockingIOError
        accepted, address = super().accept()
        self._gate.unregister(super().fileno())
        self._pause = asyncio.get_running_loop().call_later(self._pause_seconds, self._end_pause)
        connection = _CountedConnection(self, accepted.detach())
        if self.open > self._most:
            self._on_refusal()
            connection.close()
            raise ConnectionAbortedError
        return connection, address

    def _end_pause(self) -> None:
        self._pause = None
        self._gate.register(super().fileno(), selectors.EVENT_READ)


class _CountedConnection(socket.socket):
    def __init__(self, listener: _Listener, descriptor: int) -> None:
        super().__init__(fileno=descriptor)
        self._listener: _Listener | None = listener
        listener.open += 1

    def close(self) -> None:
        if self._listener is not None:
            self._listener.count_closed()
            self._listener = None
        super().close()


@contextlib.contextmanager
def limited_logs(*names: str) -> Iterator[None]:
    """Limit the records of loggers: clients that hang up by the thousand must not fill the disk."""
    limit = LogLimit()
    loggers = [logging.getLogger(name) for name in names]
    for one in loggers:
        one.addFilter(limit)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(limit)


class LogLimit(logging.Filter):
    """Passes `most` records of one message in `seconds`; the first one after that counts those dropped.

    Only the first one has its traceback.
    """

    def __init__(
        self, most: int = 5, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._most, self._seconds, self._clock = most, seconds, clock
        self._seen: dict[tuple[Any, ...], tuple[float, int]] = {}  # start of the interval, records in it

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record passes."""
        error = record.exc_info and record.exc_info[0]
        key = (record.name, str(record.msg).partition("\n")[0][:100], error)  # asyncio appends addresses
        now = self._clock()
        start, count = self._seen.pop(key, (now, 0))
        if now - start >= self._seconds:
            if count > self._most:
                record.msg = f"{record.msg} ({count - self._most} more in {now - start:.0f} s)"
            start, count = now, 0
        if count:
            record.exc_info = None
        self._seen[key] = (start, count + 1)
        if len(self._seen) > _MOST_MESSAGES:
            self._seen.pop(next(iter(self._seen)))
        return count < self._most


class ServedCheckpoint:
    """A LeRobot policy with its checkpoint's fingerprint and, for VEGA, real-time chunking."""

    def __init__(self, chunks: LeRobotChunkPolicy, fingerprint: str) -> None:
        self._chunks = chunks
        self.fingerprint = fingerprint
        self.description = chunks.description
        self.noise_shape = chunks.noise_shape
        self.reads_frames = chunks.reads_frames
        policy = chunks.policy
        self.supports_rtc = isinstance(policy, VegaPolicy) and policy.supports_rtc()

    def reset(self, instructions: Sequence[str] = ()) -> None:
        """Forget everything."""
        self._chunks.reset(instructions)

    @torch.no_grad()
    def chunk(
        self, batch: ObservationBatch, noise: np.ndarray | None, rtc: RTCContext | None = None
    ) -> np.ndarray:
        """Predict actions in the robot's units; with `rtc`, for one row, they continue the last chunk.

        Raises:
            ValueError: If `rtc` is given to a policy without `supports_rtc`.
        """
        if rtc is None:
            return self._chunks.chunk(batch, noise)
        policy = self._chunks.policy
        if not isinstance(policy, VegaPolicy) or not self.supports_rtc:
            raise ValueError(f"policy {self.description.name!r} does not support real-time chunking")
        policy.use_rtc(RTCConfig(execution_horizon=rtc.horizon, max_guidance_weight=rtc.guidance))
        # With the observation, the pre-processor brings the chunk into the policy's units.
        left = torch.from_numpy(rtc.actions)[None]
        inputs = self._chunks.preprocessor(
            to_lerobot(batch, self.description, keep_uint8=True) | {ACTION: left}
        )
        actions = policy.predict_action_chunk(
            inputs,
            noise=None if noise is None else torch.from_numpy(noise).to(policy.config.device),
            inference_delay=rtc.delay,
            prev_chunk_left_over=inputs[ACTION],
        )
        return self._chunks.postprocessor(actions).float().cpu().numpy()


def load_served_policy(path: Path, *, device: str, action_steps: int | None = None) -> ServedCheckpoint:
    """Load a checkpoint of a training run to be served; see `load_lerobot_policy`."""
    folder = find_checkpoint(path)
    chunks = load_lerobot_policy(folder, device=device, action_steps=action_steps)
    return ServedCheckpoint(chunks, checkpoint_fingerprint(folder))
