"""A policy server in its own thread or process, with a policy made of arithmetic.

`python -m tests.policy_servers PORT SECONDS CONNECTIONS_PER_SECOND [CERTIFICATE KEY]` serves until it is
killed; a prediction takes SECONDS.
"""

import asyncio
import contextlib
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np

from vega_policy.deployment.client import ServerAddress
from vega_policy.deployment.server import PolicyServer, ServerSettings
from vega_policy.evaluation.policies import ObservationBatch, PolicyDescription

CAMERAS = ("observation.images.image", "observation.images.image2")
TOKEN = "a-token-for-tests-that-is-long-enough"


class ArithmeticPolicy:
    """Actions from sums of pixels, state and noise; a prediction takes `seconds`."""

    reads_frames = True
    noise_shape = (4, 7)
    fingerprint = "arithmetic"
    supports_rtc = True
    description = PolicyDescription("arithmetic", "none", CAMERAS, 8, 7, 2)

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.rows = []

    def reset(self, instructions=()):
        pass

    def chunk(self, batch, noise, rtc=None):
        self.rows.append(len(batch.instructions))
        time.sleep(self.seconds)
        if "fail" in batch.instructions:
            raise RuntimeError("the instruction is to fail")
        total = sum(frames.mean(axis=(1, 2, 3), dtype=np.float64) for frames in batch.frames.values())
        base = np.zeros((len(batch.instructions), 4, 7)) if noise is None else noise
        chunk = (base + (total + batch.state.sum(axis=1))[:, None, None]).astype(np.float32)
        if rtc is not None:
            chunk[0, : len(rtc.actions)] = rtc.actions[:4]
        return chunk


def observations(rows=1, seed=0, side=32, instruction="lift the red cube"):
    rng = np.random.default_rng(seed)
    frames = {camera: rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8) for camera in CAMERAS}
    return ObservationBatch(frames, rng.normal(size=(rows, 8)).astype(np.float32), [instruction] * rows)


def noises(rows=1, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, 4, 7)).astype(np.float32)


def limits(**changes):
    """The default limits without a rate limit, with changes."""
    return msgspec.structs.replace(ServerSettings.limits, **{"requests_per_second": 1e6} | changes)


@contextlib.contextmanager
def running(policy=None, kind=ServerSettings, **settings):
    """Yield a server and its port; it is shut down afterwards, and that must succeed."""
    settings = {"port": 0, "limits": limits(), "grace_seconds": 5.0} | settings
    server = PolicyServer(policy or ArithmeticPolicy(), kind(**settings))
    loop, stop, ready, ports = asyncio.new_event_loop(), asyncio.Event(), threading.Event(), []

    def started(port):
        ports.append(port)
        ready.set()

    def work():
        loop.run_until_complete(server.run(stop, started))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(20)
    server.stop = lambda: loop.call_soon_threadsafe(stop.set)
    try:
        yield server, ports[0]
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server did not shut down"
        loop.close()


def address(port, tmp_path=None, token=None, **options):
    file = None
    if token is not None:
        file = tmp_path / f"token-{token[:8]}"
        file.write_text(token)
        file.chmod(0o600)
    return ServerAddress(f"ws://127.0.0.1:{port}", token_file=file, **{"timeout_seconds": 10.0} | options)


def write_certificate(folder):
    """Write a certificate for this machine and its key, and return their paths."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


@contextlib.contextmanager
def server_process(port=0, seconds=0.0, tls=(), log=None, rate=ServerSettings.connections_per_second):
    """Yield a server's process and port; the process is killed afterwards.

    `rate` limits new connections a second, `tls` is a certificate and its key, `log` an open file for the
    server's log.
    """
    command = [sys.executable, "-m", "tests.policy_servers", *map(str, (port, seconds, rate, *tls))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    port, seconds, rate, *files = sys.argv[1:]
    tls = {name: Path(file) for name, file in zip(("certificate", "key"), files, strict=False)}
    chosen = ServerSettings(port=int(port), limits=limits(), connections_per_second=float(rate), **tls)
    server = PolicyServer(ArithmeticPolicy(float(seconds)), chosen)

    def started(port):
        sys.stdout.write(f"{port}\n")
        sys.stdout.flush()

    asyncio.run(server.run(asyncio.Event(), started))
