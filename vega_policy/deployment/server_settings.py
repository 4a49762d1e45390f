"""How a policy server is run: where it listens, whom it believes, and how much it takes."""

from __future__ import annotations

import ipaddress
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path

from vega_policy.deployment.protocol import MessageLimits

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
