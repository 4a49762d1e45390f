"""The policy server: a WebSocket endpoint that believes nobody and survives everybody."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import secrets
import signal
import ssl
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import ACTION
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.typing import Subprotocol

from vega_policy.deployment import protocol
from vega_policy.deployment.protocol import (
    Hello,
    MessageLimits,
    ProtocolError,
    Reply,
    Request,
    RTCContext,
    ServablePolicy,
    ServedDescription,
    unpack,
)
from vega_policy.evaluation.evaluate import choose_device
from vega_policy.evaluation.policies import (
    LeRobotChunkPolicy,
    ObservationBatch,
    checkpoint_fingerprint,
    find_checkpoint,
    load_lerobot_policy,
    to_lerobot,
)
from vega_policy.modeling_vega import VegaPolicy

logger = logging.getLogger(__name__)

SHORTEST_TOKEN = 24


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a policy server.

    Attributes:
        host: Address to listen on; anything but loopback needs a token.
        port: TCP port; 0 takes a free one.
        token: What clients must present, or None.
        certificate: PEM file with the certificate chain; together with `key` it switches TLS on.
        key: PEM file with the certificate's private key.
        limits: How large a request may be, and how many a second.
        sessions: Clients served at once.
        connections: TCP connections open at once, handshakes included.
        handshake_seconds: A connection that has not become a session by then is closed.
        idle_seconds: A session without a complete message for so long is closed.
        faults: Malformed messages after which a session is closed.
        batch_rows: Most observations predicted together.
        batch_wait_seconds: How long a request waits for others to join it, if there are other sessions.
        grace_seconds: How long a shutdown waits for requests that are being answered.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    limits: MessageLimits = field(default_factory=MessageLimits)
    sessions: int = 64
    connections: int = 128
    handshake_seconds: float = 5.0
    idle_seconds: float = 60.0
    faults: int = 8
    batch_rows: int = 16
    batch_wait_seconds: float = 0.002
    grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what would be open to everybody.

        Raises:
            ValueError: If it listens beyond loopback without a token, the token is short, or only one of the
                two TLS files is given.
        """
        if not is_loopback(self.host) and self.token is None:
            raise ValueError(
                f"a server on {self.host!r} can be reached from other machines and needs a token: give "
                "token_file, or listen on 127.0.0.1"
            )
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise ValueError(
                f"the token has {len(self.token)} characters, expected at least {SHORTEST_TOKEN}; make one "
                'with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        if (self.certificate is None) != (self.key is None):
            raise ValueError(
                f"TLS needs both files: certificate is {self.certificate}, key is {self.key}; give both or "
                "neither"
            )

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context; None without certificate.

        Raises:
            FileNotFoundError: If a file is missing.
            ssl.SSLError: If the files do not belong together.
        """
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        return context


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only; names other than localhost count as not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path | None) -> str | None:
    """Read a token from a file that nobody else may read; None for None.

    Raises:
        FileNotFoundError: If there is no such file.
        PermissionError: If others may read it.
    """
    if path is None:
        return None
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise PermissionError(
            f"{path} can be read by other users (mode {mode:o}): run chmod 600 {path}, and make a new token"
        )
    return path.read_text().strip()


_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class ServerMetrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vega_requests", "Requests by outcome: ok, or an error code.", ["outcome"], registry=self.registry
        )
        self.refused = Counter(
            "vega_connections_refused", "Connections refused, by reason.", ["reason"], registry=self.registry
        )
        self.sessions = Gauge("vega_sessions", "Sessions open now.", registry=self.registry)
        self.model_seconds = Histogram(
            "vega_model_seconds", "Time in the policy, a batch.", buckets=_SECONDS, registry=self.registry
        )
        self.server_seconds = Histogram(
            "vega_server_seconds", "From message to answer.", buckets=_SECONDS, registry=self.registry
        )
        self.batch_rows = Histogram(
            "vega_batch_rows",
            "Observations in a batch.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )

    def text(self) -> str:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry).decode()


Answer = tuple[np.ndarray, float]
"""Actions float32 [b t a] of a request, and the seconds that its batch spent in the policy."""


@dataclass
class _Waiting:
    request: Request
    answer: asyncio.Future[Answer]


class Batcher:
    """Collects requests and lets the policy predict them.

    One client alone is never kept waiting and gets exactly what the policy says of its rows by themselves;
    with several, the rows of a batch may differ by rounding from those of a batch of one.

    Args:
        policy: The policy; called from one thread only.
        rows: Most observations of a batch.
        wait_seconds: How long a request waits for others to join it.
        crowded: Says whether there is anybody to wait for.
        metrics: Where batches are counted.
    """

    def __init__(
        self,
        policy: ServablePolicy,
        *,
        rows: int,
        wait_seconds: float,
        crowded: Callable[[], bool],
        metrics: ServerMetrics,
    ) -> None:
        self._policy = policy
        self._rows = rows
        self._wait = wait_seconds
        self._crowded = crowded
        self._metrics = metrics
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._left_over: _Waiting | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")

    async def predict(self, request: Request) -> Answer:
        """Return what the policy predicts for a request.

        Raises:
            ProtocolError: With code `policy`, if the policy failed.
        """
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.answer

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            batch = await self._collect()
            await self._answer(batch)

    def close(self) -> None:
        """Let the policy's thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _collect(self) -> list[_Waiting]:
        first = self._left_over or await self._queue.get()
        self._left_over = None
        batch, rows = [first], len(first.request.batch.instructions)
        deadline = time.monotonic() + (self._wait if self._crowded() else 0.0)
        while rows < self._rows:
            following = await self._next(deadline - time.monotonic())
            if following is None:
                break
            rows += len(following.request.batch.instructions)
            if rows > self._rows or _kind(following.request) != _kind(first.request):
                self._left_over = following
                break
            batch.append(following)
        return batch

    async def _next(self, seconds: float) -> _Waiting | None:
        if not self._queue.empty():
            return self._queue.get_nowait()
        if seconds <= 0:
            return None
        try:
            return await asyncio.wait_for(self._queue.get(), seconds)
        except TimeoutError:
            return None

    async def _answer(self, batch: list[_Waiting]) -> None:
        requests = [waiting.request for waiting in batch]
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._predict, requests)
        await asyncio.wait([work])
        error = work.exception()
        if error is not None:
            logger.error("the policy failed", exc_info=error)
        for index, waiting in enumerate(batch):
            if waiting.answer.done():  # its client is gone
                continue
            if error is None:
                actions, seconds = work.result()
                waiting.answer.set_result((actions[index], seconds))
            else:
                waiting.answer.set_exception(
                    ProtocolError("policy", "the policy failed; see the server's log")
                )

    def _predict(self, requests: list[Request]) -> tuple[list[np.ndarray], float]:
        start = time.perf_counter()
        first = requests[0]
        if first.continuation is not None:
            chunks = self._policy.continue_chunk(first.batch, first.noise, first.continuation)
        else:
            chunks = self._policy.chunk(*_joined(requests))
        seconds = time.perf_counter() - start
        self._metrics.model_seconds.observe(seconds)
        self._metrics.batch_rows.observe(len(chunks))
        ends = np.cumsum([len(request.batch.instructions) for request in requests])
        return np.split(np.asarray(chunks, np.float32), ends[:-1]), seconds


def _kind(request: Request) -> Any:
    """What must agree for requests to share a batch; a continuation stands alone."""
    if request.continuation is not None:
        return object()
    shapes = {camera: frames.shape[1:] for camera, frames in request.batch.frames.items()}
    return shapes, request.batch.state.shape[1:], request.noise is None


def _joined(requests: list[Request]) -> tuple[ObservationBatch, np.ndarray | None]:
    if len(requests) == 1:
        return requests[0].batch, requests[0].noise
    batches = [request.batch for request in requests]
    joined = ObservationBatch(
        {camera: np.concatenate([batch.frames[camera] for batch in batches]) for camera in batches[0].frames},
        np.concatenate([batch.state for batch in batches]),
        [text for batch in batches for text in batch.instructions],
    )
    noises = [request.noise for request in requests if request.noise is not None]
    return joined, np.concatenate(noises) if noises else None


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


class ServedPolicy:
    """A chunk policy with its checkpoint's fingerprint and, for VEGA, real-time chunking.

    Args:
        chunks: The policy as the evaluation harness runs it.
        fingerprint: Hash over the checkpoint's files.
    """

    def __init__(self, chunks: LeRobotChunkPolicy, fingerprint: str) -> None:
        self._chunks = chunks
        self.fingerprint = fingerprint
        self.description = chunks.description
        self.noise_shape = chunks.noise_shape
        self.reads_frames = chunks.reads_frames
        policy = chunks.policy
        self.continues = isinstance(policy, VegaPolicy) and policy.supports_rtc()

    def reset(self) -> None:
        """Forget everything."""
        self._chunks.reset()

    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict actions in the robot's units; see `ChunkPolicy.chunk`."""
        return self._chunks.chunk(batch, noise)

    @torch.no_grad()
    def continue_chunk(
        self, batch: ObservationBatch, noise: np.ndarray | None, continuation: RTCContext
    ) -> np.ndarray:
        """Predict a chunk for one row that goes on from the last one, float32 [1 t a], in the robot's units.

        Raises:
            ValueError: If the policy cannot (see `continues`).
        """
        policy = self._chunks.policy
        if not isinstance(policy, VegaPolicy) or not self.continues:
            raise ValueError(f"policy {self.description.name!r} cannot continue a chunk (real-time chunking)")
        policy.use_rtc(
            RTCConfig(execution_horizon=continuation.horizon, max_guidance_weight=continuation.guidance)
        )
        # With the observation, the pre-processor brings the chunk into the policy's units.
        left = torch.from_numpy(continuation.actions)[None]
        inputs = self._chunks.preprocessor(to_lerobot(batch, self.description) | {ACTION: left})
        actions = policy.predict_action_chunk(
            inputs,
            noise=None if noise is None else torch.from_numpy(noise).to(policy.config.device),
            inference_delay=continuation.delay,
            prev_chunk_left_over=inputs[ACTION],
        )
        return self._chunks.postprocessor(actions).float().cpu().numpy()


def load_served_policy(path: Path, *, device: str, action_steps: int | None = None) -> ServedPolicy:
    """Load a checkpoint to be served.

    Args:
        path: A checkpoint of a training run, or its `pretrained_model` folder.
        device: Torch device such as `cpu` or `cuda`.
        action_steps: Actions executed of each chunk; None takes the policy's own `n_action_steps`.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the policy cannot be asked for chunks.
    """
    folder = find_checkpoint(path)
    chunks = load_lerobot_policy(folder, device=device, action_steps=action_steps)
    return ServedPolicy(chunks, checkpoint_fingerprint(folder))


def read_server_settings(config: dict[str, Any]) -> ServerSettings:
    """Read the settings of a server from the `server` node of configs/serve.yaml.

    Raises:
        ValueError: If it would be open to everybody (see `ServerSettings`).
        OSError: If the token's file is missing or can be read by others.
    """
    values: dict[str, Any] = dict(config)
    values["token"] = read_token(_path(values.pop("token_file")))
    values["limits"] = MessageLimits(**values["limits"])
    for name in ("certificate", "key"):
        values[name] = _path(values[name])
    return ServerSettings(**values)


def serve_forever(config: Any) -> None:
    """Serve a checkpoint as configs/serve.yaml describes it, until SIGINT or SIGTERM.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If a setting is wrong.
        OSError: If the address is taken, or a file cannot be used.
    """
    settings = read_server_settings(config["server"])
    policy = load_served_policy(
        Path(config["checkpoint"]),
        device=choose_device(config["device"]),
        action_steps=config["action_steps"],
    )
    warm_up(policy, config["warm_up_side"])
    asyncio.run(_serve(PolicyServer(policy, settings)))


async def _serve(server: PolicyServer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.run(stop)


def warm_up(policy: ServablePolicy, side: int) -> None:
    """Ask a policy once with black frames of a size, so that the first client does not wait for start-up."""
    description = policy.description
    shape = (*description.frame_axes(1), side, side, 3)
    frames = {camera: np.zeros(shape, np.uint8) for camera in description.cameras}
    state = np.zeros((1, description.state_size or 0), np.float32)
    noise = None if policy.noise_shape is None else np.zeros((1, *policy.noise_shape), np.float32)
    policy.chunk(ObservationBatch(frames, state, ["warm up"]), noise)


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value).expanduser()
