"""The robot's side of the wire: ask for chunks, and find back to a server that went away."""

from __future__ import annotations

import contextlib
import logging
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from vega_policy.deployment import protocol
from vega_policy.deployment.protocol import (
    Hello,
    ProtocolError,
    Reply,
    Request,
    RTCContext,
    ServedDescription,
)
from vega_policy.deployment.server import read_token
from vega_policy.evaluation.policies import ObservationBatch, PolicyDescription

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2


class PolicyUnavailableError(ConnectionError):
    """The server cannot be reached, went away, or did not answer in time; trying again may help."""


@dataclass(frozen=True)
class ServerAddress:
    """Where a policy server is and how to be believed there.

    Attributes:
        url: `ws://host:port` or, with TLS, `wss://host:port`.
        token_file: File with the token, readable by its owner only; None for a server without.
        ca_file: PEM file with the certificate to trust; None trusts what the system trusts.
        timeout_seconds: How long to wait for a connection or an answer.
    """

    url: str
    token_file: Path | None = None
    ca_file: Path | None = None
    timeout_seconds: float = 10.0


class PolicyClient:
    """One session after another with a policy server; not to be shared between threads.

    Args:
        address: Where the server is.
    """

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._token = read_token(address.token_file)
        self._connection: ClientConnection | None = None
        self._hello: Hello | None = None
        self._first: ServedDescription | None = None
        self._sequence = -1

    def connect(self) -> Hello:
        """Return the server's hello, of the present session if there is one.

        Raises:
            PolicyUnavailableError: If the server cannot be reached now.
            PermissionError: If it does not believe the token.
            ValueError: If the address is no address, if the server speaks another protocol, or if it offers
                another policy than at the first connection.
        """
        if self._connection is not None and self._hello is not None:
            return self._hello
        address = self._address
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        try:
            with contextlib.ExitStack() as refused:  # closes what does not say hello as it should
                connection = connect(
                    address.url.rstrip("/") + protocol.PATH,
                    ssl=self._tls(),
                    subprotocols=[Subprotocol(protocol.SUBPROTOCOL)],
                    additional_headers=headers,
                    compression=None,
                    proxy=None,
                    open_timeout=address.timeout_seconds,
                    close_timeout=1.0,
                    user_agent_header=None,
                )
                refused.callback(connection.close)
                hello = protocol.decode_hello(connection.recv(timeout=address.timeout_seconds))
                self._check_same(hello.description)
                refused.pop_all()
        except InvalidURI as error:
            raise ValueError(f"{address.url!r} is no ws:// or wss:// address") from error
        except InvalidStatus as error:
            if error.response.status_code == 401:
                raise PermissionError(f"{address.url} does not accept the token of this client") from error
            raise PolicyUnavailableError(f"{address.url} refused: {error}") from error
        except (OSError, TimeoutError, ConnectionClosed, InvalidHandshake) as error:
            raise PolicyUnavailableError(f"no policy server at {address.url}: {error}") from error
        self._connection, self._hello, self._sequence = connection, hello, -1
        return hello

    def predict(
        self,
        batch: ObservationBatch,
        noise: np.ndarray | None = None,
        continuation: RTCContext | None = None,
    ) -> Reply:
        """Ask for actions; opens a session if there is none.

        Args:
            batch: Observations of b rows.
            noise: float32 [b t a], or None.
            continuation: The chunk to go on from, for real-time chunking with one row.

        Raises:
            PolicyUnavailableError: If the connection broke or no answer came in time; ask again.
            ProtocolError: If the server refused the request.
        """
        hello = self.connect()
        connection = self._connection
        assert connection is not None
        self._sequence += 1
        request = Request(self._sequence, batch, noise, continuation)
        try:
            connection.send(protocol.encode_request(hello.session, request))
            answer = connection.recv(timeout=self._address.timeout_seconds)
        except (OSError, TimeoutError, ConnectionClosed) as error:
            self.close()  # an answer that comes late would be taken for that to the next question
            raise PolicyUnavailableError(f"{self._address.url} did not answer: {error}") from error
        return protocol.decode_answer(answer, self._sequence, hello.limits.message_bytes)

    def close(self) -> None:
        """End the session, if there is one."""
        if self._connection is not None:
            with contextlib.suppress(OSError, TimeoutError):
                self._connection.close()
        self._connection = self._hello = None

    def _check_same(self, description: ServedDescription) -> None:
        """Refuse another policy than the first; asked again, it is refused again."""
        if self._first is None:
            self._first = description
        if description != self._first:
            raise ValueError(
                f"{self._address.url} now offers another policy ({description.fingerprint} instead of "
                f"{self._first.fingerprint}); start anew to use it"
            )

    def _tls(self) -> ssl.SSLContext | None:
        if not self._address.url.startswith("wss://"):
            return None
        ca_file = self._address.ca_file
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))


class RemotePolicy:
    """A policy on a server, in the place of a local one (`ChunkPolicy`): same rows, same noise, same actions.

    Args:
        address: Where the server is.
        action_steps: Actions executed of each chunk; None takes the policy's own.
        patience_seconds: How long to look for a server that went away before giving up.

    Raises:
        PolicyUnavailableError: If the server cannot be reached within that time.
        PermissionError: If it does not believe the token.
    """

    def __init__(
        self, address: ServerAddress, *, action_steps: int | None = None, patience_seconds: float = 30.0
    ) -> None:
        self._client = PolicyClient(address)
        self._patience = patience_seconds
        self.reconnections = 0
        self.served = self._insist_on_connecting(time.monotonic() + patience_seconds).description
        policy = self.served.policy
        steps = policy.action_steps if action_steps is None else action_steps
        self._description = PolicyDescription(**{**vars(policy), "action_steps": steps})
        self.reads_frames = bool(policy.cameras)
        self.last_reply: Reply | None = None

    @property
    def description(self) -> PolicyDescription:
        """What the policy was trained on."""
        return self._description

    @property
    def noise_shape(self) -> tuple[int, int] | None:
        """Shape [t a] of its noise."""
        return self.served.noise_shape

    def reset(self) -> None:
        """Nothing to forget: the server keeps nothing between requests."""

    def chunk(self, batch: ObservationBatch, noise: np.ndarray | None) -> np.ndarray:
        """Predict actions in the robot's units; see `ChunkPolicy.chunk`.

        Raises:
            PolicyUnavailableError: If the server stayed away longer than the patience lasts.
            ProtocolError: If the server refused the request.
            ValueError: If another checkpoint is served after a reconnection.
        """
        return self.ask(batch, noise, None)

    def ask(
        self, batch: ObservationBatch, noise: np.ndarray | None, continuation: RTCContext | None
    ) -> np.ndarray:
        """As `chunk`, going on from a chunk that is being executed."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                reply = self._client.predict(batch, noise, continuation)
            except PolicyUnavailableError as error:
                if time.monotonic() > deadline:
                    raise
                logger.warning("%s; trying again", error)
                time.sleep(RETRY_SECONDS)
                self._insist_on_connecting(deadline)
                self.reconnections += 1
                logger.warning("connected again")
                continue
            self.last_reply = reply
            return reply.actions

    def close(self) -> None:
        """End the session."""
        self._client.close()

    def _insist_on_connecting(self, deadline: float) -> Hello:
        while True:
            try:
                return self._client.connect()
            except PolicyUnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)


__all__ = ["PolicyClient", "PolicyUnavailableError", "ProtocolError", "RemotePolicy", "ServerAddress"]
