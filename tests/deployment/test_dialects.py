"""Clients of other packages at a policy server: openpi-client and vla-eval."""

import asyncio
import io
import itertools
import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from websockets.asyncio.client import connect as connect_async
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.policy_servers import TOKEN, ArithmeticPolicy, address, limits, running, write_certificate
from vega_policy.deployment.client import RemotePolicy
from vega_policy.deployment.protocol import FeatureKeys
from vega_policy.deployment.server import load_served_policy
from vega_policy.evaluation.policies import ObservationBatch, PolicyDescription

DROID = PolicyDescription(
    "arithmetic",
    "none",
    ("observation.images.exterior_1_left", "observation.images.wrist_left"),
    8,
    7,
    2,
)


def libero(seed=0, side=48):
    rng = np.random.default_rng(seed)
    return {
        "observation/image": rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (side + 16, side, 3), dtype=np.uint8),
        "observation/state": rng.normal(size=8),
        "prompt": "lift the red cube",
    }


def batch_of(observation):
    """The same observation under the policy's keys."""
    image, wrist, state, prompt = observation.values()
    frames = {"observation.images.image": image[None], "observation.images.image2": wrist[None]}
    return ObservationBatch(frames, state[None].astype(np.float32), [prompt])


def pack_array(array, **changes):
    fields = {
        "__ndarray__": True,
        "data": np.ascontiguousarray(array).tobytes(),
        "dtype": array.dtype.str,
        "shape": array.shape,
    }
    return {key.encode(): value for key, value in (fields | changes).items()}


def pack(observation):
    """Encode an observation as openpi-client does, without the package."""
    values = {
        key: pack_array(value) if isinstance(value, np.ndarray) else value
        for key, value in observation.items()
    }
    return msgspec.msgpack.encode(values)


def image_bytes(side, kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, kind)
    return buffer.getvalue()


class Harness:
    """vla-eval's messages, without the package."""

    def __init__(self, port, **options):
        self.connection = connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None, **options)
        self.sequence = itertools.count(1)

    def send(self, kind, payload, **changes):
        message = {"type": kind, "payload": payload, "seq": next(self.sequence), "timestamp": 0.0}
        self.connection.send(msgspec.msgpack.encode(message | changes))

    def request(self, kind, payload, **changes):
        self.send(kind, payload, **changes)
        return msgspec.msgpack.decode(self.connection.recv(timeout=10))

    def act(self, payload):
        answer = self.request("observation", payload)
        assert answer["type"] == "action", answer
        return np.frombuffer(answer["payload"]["actions"]["data"], "<f4")


def vla_eval_observation(side=32, kind="PNG", **changes):
    image = {"__image__": True, "format": kind.lower(), "data": image_bytes(side, kind)}
    state = {"__ndarray__": True, "data": np.ones(8).tobytes(), "dtype": "<f8", "shape": [8]}
    images = {"agentview": image, "wrist": image}
    observation = {"images": images, "states": state, "task_description": "lift", "controller_states": state}
    return observation | changes


def test_openpi_client_gets_the_actions_of_our_own_client_bit_for_bit():
    client = pytest.importorskip("openpi_client.websocket_client_policy")
    with running(dialect="openpi") as (_, port):
        openpi = client.WebsocketClientPolicy("127.0.0.1", port)
        metadata = openpi.get_server_metadata()
        assert metadata["observation"] == list(libero())
        assert (metadata["policy"], metadata["action_steps"]) == ("arithmetic", 2)
        own = RemotePolicy(address(port))
        for seed in range(3):
            observation = libero(seed)
            answer = openpi.infer(observation)
            assert answer["actions"].shape == (4, 7)
            np.testing.assert_array_equal(answer["actions"], own.chunk(batch_of(observation), None)[0])
        assert 0 <= answer["policy_timing"]["infer_ms"] <= answer["server_timing"]["infer_ms"]
        with pytest.raises(RuntimeError, match=r"missing keys \['prompt'\], unknown keys \['instruction'\]"):
            openpi.infer(
                {"instruction" if key == "prompt" else key: value for key, value in libero().items()}
            )
        with pytest.raises(RuntimeError, match="policy: the policy failed"):
            openpi.infer(libero() | {"prompt": "fail"})
        assert openpi.infer(libero())["actions"].shape == (4, 7)


def test_openpi_client_needs_the_token_and_trusts_the_certificate(tmp_path, monkeypatch):
    client = pytest.importorskip("openpi_client.websocket_client_policy")
    certificate, key = write_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with running(dialect="openpi", token=TOKEN, certificate=certificate, key=key) as (_, port):
        url = f"wss://127.0.0.1:{port}"
        for wrong in (None, TOKEN[:-1]):
            with pytest.raises(InvalidStatus, match="401"):
                client.WebsocketClientPolicy(url, api_key=wrong)
        openpi = client.WebsocketClientPolicy(url, api_key=TOKEN)
        assert openpi.infer(libero())["actions"].shape == (4, 7)


def test_openpi_client_sends_the_keys_of_droid_images_of_another_size_and_scalars():
    client = pytest.importorskip("openpi_client.websocket_client_policy")
    tools = pytest.importorskip("openpi_client.image_tools")
    policy = ArithmeticPolicy()
    policy.description = DROID
    image = np.full((180, 320, 3), 0.5)
    observation = {
        "observation/exterior_image_1_left": tools.convert_to_uint8(image),
        "observation/wrist_image_left": tools.resize_with_pad(np.full((180, 320, 3), 9, np.uint8), 224, 224),
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.float32(0.5),
        "prompt": "lift the red cube",
    }
    with running(policy, dialect="openpi", client_keys="droid") as (_, port):
        actions = client.WebsocketClientPolicy("127.0.0.1", port).infer(observation)["actions"]
    frames = {
        DROID.cameras[0]: np.full((1, 180, 320, 3), 127, np.uint8),
        DROID.cameras[1]: observation["observation/wrist_image_left"][None],
    }
    state = np.array([[*range(7), 0.5]], np.float32)
    np.testing.assert_array_equal(actions, policy.chunk(ObservationBatch(frames, state, ["lift"]), None)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation/image": pack_array(np.zeros((3, 48, 48), np.uint8))}, "expected the shape"),
        (
            {"observation/image": pack_array(np.zeros((48, 48, 3), np.float32))},
            "expected an image of type uint8",
        ),
        ({"observation/image": pack_array(np.zeros((2000, 16, 3), np.uint8))}, "expected the shape"),
        ({"observation/image": pack_array(np.zeros((8, 8, 3), np.uint8))}, "expected the shape"),
        (
            {"observation/image": pack_array(np.zeros(9, np.uint8), shape=(1280, 1280, 3))},
            "expected 4915200 bytes",
        ),
        ({"observation/image": pack_array(np.zeros(9, np.uint8), shape=(1,) * 65)}, "length <= 5"),
        ({"observation/image": pack_array(np.zeros(9, np.uint8), shape=(-1, 3))}, ">= 0"),
        ({"observation/image": "text"}, "expected an image of type uint8"),
        ({"observation/image": {b"pickle": b"x"}}, "expected a number, text or an array"),
        ({"observation/image": [[]] * 100}, "Expected"),
        ({"observation/state": pack_array(np.zeros(8), dtype="|O")}, r"expected float32 or float64, got \|O"),
        ({"observation/state": pack_array(np.zeros(8), dtype="V8")}, "expected float32 or float64, got V8"),
        ({"observation/state": pack_array(np.zeros(8, ">f8"))}, "expected float32 or float64, got >f8"),
        ({"observation/state": pack_array(np.zeros(7))}, r"expected 8 values, got \[7\]"),
        ({"observation/state": pack_array(np.full(8, np.nan))}, "finite"),
        ({"observation/state": pack_array(np.full(8, 1e300))}, "finite"),
        ({"observation/state": "text"}, "expected numbers, got text"),
        ({"prompt": 3.0}, "prompt: expected text"),
        ({"prompt": "x" * 513}, "prompt: expected text of at most 512"),
        ({f"key{number}": 1.0 for number in range(100)}, "length <= 64"),
    ],
)
def test_an_openpi_observation_is_refused_with_one_error(changes, message):
    with running(dialect="openpi") as (_, port), connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
        connection.recv(timeout=10)
        valid = {key: value for key, value in libero().items() if key not in changes}
        packed = msgspec.msgpack.decode(pack(valid)) | changes
        connection.send(msgspec.msgpack.encode(packed))
        answer = connection.recv(timeout=10)
        assert isinstance(answer, str), "openpi-client raises on text only"
        assert answer.startswith("malformed: ")
        assert re.search(message, answer), answer
        connection.send(pack(libero()))
        assert b"__ndarray__" in connection.recv(timeout=10)


def test_limits_of_the_server_hold_for_a_dialect():
    few = limits(message_bytes=50_000, requests_per_second=5.0)
    with running(dialect="openpi", faults=2, idle_seconds=1.0, limits=few) as (server, port):
        with connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
            connection.recv(timeout=10)
            connection.send(b"x" * 50_001)
            with pytest.raises(ConnectionClosed) as error:
                connection.recv(timeout=10)
            assert error.value.rcvd.code == 1009
        with connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
            connection.recv(timeout=10)
            for _ in range(2):
                connection.send("text")
                assert "expected a binary message" in connection.recv(timeout=10)
            with pytest.raises(ConnectionClosed) as error:
                connection.recv(timeout=10)
            assert error.value.rcvd.code == 1008
        with connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
            connection.recv(timeout=10)
            for _ in range(8):  # 5 at once, then 5 a second: none is refused
                connection.send(pack(libero()))
            answers = [connection.recv(timeout=10) for _ in range(8)]
            assert all(isinstance(answer, bytes) for answer in answers)
            with pytest.raises(ConnectionClosed, match="idle"):
                connection.recv(timeout=10)
        assert 'reason="idle"' in server.metrics.text()


def test_a_dialect_is_answered_only_where_it_is_chosen_and_only_with_its_token():
    with running() as (_, port), pytest.raises(InvalidStatus, match="404"):
        connect(f"ws://127.0.0.1:{port}", proxy=None)
    with running(dialect="vla_eval", token=TOKEN) as (_, port):
        for url, headers in (
            (f"ws://127.0.0.1:{port}", {}),
            (f"ws://127.0.0.1:{port}", {"Authorization": f"Api-Key {TOKEN}"}),
            (f"ws://vega:{TOKEN[:-1]}@127.0.0.1:{port}", {}),
            (f"ws://other:{TOKEN}@127.0.0.1:{port}", {}),
        ):
            with pytest.raises(InvalidStatus, match="401"):
                connect(url, additional_headers=headers, proxy=None)
        connect(f"ws://vega:{TOKEN}@127.0.0.1:{port}", proxy=None).close()


@pytest.mark.parametrize(
    ("dialect", "keys", "ignored", "policy", "message"),
    [
        ("json", "libero", (), {}, "expected vega, openpi, vla_eval; got 'json'"),
        ("openpi", "aloha", (), {}, r"expected a preset of dialect=openpi \(libero, droid\)"),
        ("openpi", "droid", (), {}, "expected one key of its own for each of"),
        ("openpi", "libero", (), {"history": 4}, "reads the last 4"),
        ("openpi", {"task": "prompt"}, (), {}, "expected one key of its own for each of"),
        (
            "openpi",
            {"a": "x", "task": "x"},
            (),
            {"cameras": ("a",), "state_size": None},
            "one key of its own",
        ),
        (
            "openpi",
            {"a": "x", "task": "y"},
            ("y",),
            {"cameras": ("a",), "state_size": None},
            "one key of its own",
        ),
        (
            "openpi",
            {"a": ["x", "y"], "task": "z"},
            (),
            {"cameras": ("a",), "state_size": None},
            "one key for",
        ),
    ],
)
def test_client_keys_that_do_not_fit_the_policy_are_refused_before_serving(
    dialect, keys, ignored, policy, message
):
    description = PolicyDescription(
        **{"name": "p", "prior": "none", "cameras": ArithmeticPolicy.description.cameras, "state_size": 8}
        | {"action_size": 7, "action_steps": 2}
        | policy
    )
    with pytest.raises(ValueError, match=message):
        FeatureKeys.resolve(dialect, keys, ignored, description)


def test_keys_of_a_preset_that_a_policy_does_not_read_may_be_sent():
    policy = ArithmeticPolicy()
    policy.description = PolicyDescription("p", "none", ("observation.images.image",), None, 7, 2)
    with (
        running(policy, dialect="openpi", ignored_keys=("time",)) as (_, port),
        connect(f"ws://127.0.0.1:{port}", proxy=None) as connection,
    ):
        hello = msgspec.msgpack.decode(connection.recv(timeout=10))
        assert hello["ignored"] == ["observation/state", "observation/wrist_image", "time"]
        connection.send(pack(libero() | {"time": 3.0}))
        assert isinstance(connection.recv(timeout=10), bytes)


def test_vla_eval_gets_one_action_a_step_and_a_new_chunk_in_each_episode():
    policy = ArithmeticPolicy()
    policy.chunk = lambda batch, noise, rtc=None: (
        np.arange(28, dtype=np.float32).reshape(1, 4, 7) + len(calls.append(batch) or calls)
    )
    calls = []
    with running(policy, dialect="vla_eval") as (_, port):
        harness = Harness(port)
        hello = harness.request("hello", {"harness_version": "0.8.0", "protocol_version": 1})
        assert (hello["type"], hello["seq"]) == ("hello", 1)
        requested = hello["payload"]["observation_params"]
        assert requested == {"send_wrist_image": True, "send_state": True, "quat_no_antipodal": True}
        firsts = []
        for _ in range(2):
            harness.send("episode_start", {"task": {"name": "lift", "task_id": 3}})
            firsts += [harness.act(vla_eval_observation())[0] for _ in range(3)]
            harness.send("episode_end", {"metrics": {"success": True}})
        assert firsts == [1, 8, 2, 3, 10, 4]  # 2 actions of each chunk are executed
        assert calls[0].frames["observation.images.image2"].shape == (1, 32, 32, 3)
        np.testing.assert_array_equal(calls[0].state, np.ones((1, 8)))
        assert calls[0].instructions == ["lift"]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (vla_eval_observation(side=2000), "16 to 1280 pixels a side"),
        (vla_eval_observation(side=8), "16 to 1280 pixels a side"),
        (vla_eval_observation(kind="GIF"), "not a PNG or JPEG image"),
        (vla_eval_observation(images={}), r"missing keys \['images/agentview', 'images/wrist'\]"),
        (vla_eval_observation(depth=1.0), r"unknown keys \['depth'\]"),
        (vla_eval_observation(states={"__ndarray__": True}), "expected a number, text or an array"),
        ([1], "Expected `object`"),
    ],
)
def test_a_vla_eval_observation_is_refused_with_one_error(payload, message):
    with running(dialect="vla_eval") as (_, port):
        harness = Harness(port)
        answer = harness.request("observation", payload)
        assert (answer["type"], answer["seq"]) == ("error", 1)
        assert re.search(message, answer["payload"]["error"]), answer
        assert harness.act(vla_eval_observation(kind="JPEG")).shape == (7,)


def impatient(*arguments, ping_interval=20, **options):
    """Serve with 0.05 s instead of 20 s between pings, if there are any, and 0.05 s for their answers."""
    return serve(*arguments, ping_interval=ping_interval and 0.05, ping_timeout=0.05, **options)


def test_a_harness_that_builds_a_simulator_between_two_messages_stays_connected(monkeypatch):
    async def play(port):
        url = f"ws://127.0.0.1:{port}"
        async with connect_async(url, compression=None, proxy=None, ping_interval=None) as connection:
            message = {"type": "observation", "payload": vla_eval_observation(), "seq": 1, "timestamp": 0.0}
            time.sleep(0.6)  # vla-eval builds and resets simulators in its event loop, which answers no pings
            await connection.send(msgspec.msgpack.encode(message))
            return msgspec.msgpack.decode(await connection.recv())

    monkeypatch.setattr("vega_policy.deployment.server.serve", impatient)
    with running(dialect="vla_eval") as (_, port):
        assert asyncio.run(play(port))["type"] == "action"


def test_vla_eval_client_gets_the_actions_of_our_own_client_bit_for_bit(monkeypatch):
    client = pytest.importorskip("vla_eval.connection")

    async def play(port, observations):
        actions = []
        async with client.Connection(f"ws://127.0.0.1:{port}", max_retries=1) as connection:
            for observation in observations:
                image, wrist, state, prompt = observation.values()
                images = {"agentview": image, "wrist": wrist}
                time.sleep(0.3)  # a simulator's step in vla-eval's event loop
                reply = await connection.act({"images": images, "states": state, "task_description": prompt})
                actions.append(reply["actions"])
        return actions

    monkeypatch.setattr("vega_policy.deployment.server.serve", impatient)
    observations = [libero(seed) for seed in range(4)]
    with running(dialect="vla_eval") as (_, port):
        actions = asyncio.run(play(port, observations))
        own = RemotePolicy(address(port))
        # 2 actions of each chunk are executed, so that every second observation is answered from the last one
        chunks = [own.chunk(batch_of(observation), None)[0, :2] for observation in observations[::2]]
    np.testing.assert_array_equal(actions, np.concatenate(chunks))


def run_vla_eval(port, folder, **entry):
    """Play vla-eval's LIBERO benchmark with its own command; return its summary and an episode's steps."""
    entry = {"benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark", "max_tasks": 1} | entry
    server = {"url": f"ws://127.0.0.1:{port}", "timeout": 300}
    config = {"server": server, "output_dir": str(folder), "benchmarks": [entry]}
    (folder / "libero.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "vla_eval.cli.main", "run", "--config", folder / "libero.yaml"]
    outcome = subprocess.run(
        [*command, "--no-docker", "-y"], capture_output=True, text=True, timeout=600, check=False
    )
    printed = outcome.stdout + outcome.stderr
    assert outcome.returncode == 0, printed[-5000:]
    logging.getLogger(__name__).info("%s", printed)
    (summary,) = [json.loads(path.read_text()) for path in folder.glob("*_aggregate.json")]
    (steps,) = [path.read_text().splitlines() for path in folder.rglob("*.jsonl")]
    return summary, [json.loads(line) for line in steps]


@pytest.mark.slow
def test_vla_eval_plays_its_libero_benchmark_with_the_actions_of_our_own_client(tmp_path, monkeypatch):
    pytest.importorskip("vla_eval")
    policy, predicted = load_served_policy(Path("libero"), device="cpu"), []
    predict, executed = policy.chunk, policy.description.action_steps
    policy.chunk = lambda batch, *rest: predicted.append(batch) or predict(batch, *rest)
    monkeypatch.setattr("vega_policy.deployment.server.serve", impatient)
    with running(policy, dialect="vla_eval", idle_seconds=600.0) as (_, port):
        summary, steps = run_vla_eval(
            port, tmp_path, episodes_per_task=1, max_steps=12, params={"suite": "libero_object", "seed": 7}
        )
        observed = list(predicted)
        own = RemotePolicy(address(port, timeout_seconds=60.0))
        actions = np.concatenate([own.chunk(batch, None)[0, :executed] for batch in observed])[: len(steps)]
    (episode,) = summary["tasks"][0]["episodes"]
    assert (summary["num_episodes_total"], summary["num_errors"], episode["steps"]) == (1, 0, 12)
    assert "success" in episode["metrics"]
    assert observed[0].instructions == [summary["tasks"][0]["task"]]
    # The harness opens or closes the gripper entirely; it executes the rest as received.
    actions[:, 6] = np.where(actions[:, 6] < 0, -1, 1)
    np.testing.assert_array_equal([step["action"] for step in steps], actions)
    # The state after the last action of the first chunk is the one that the second chunk was predicted from.
    np.testing.assert_array_equal(np.float32(steps[executed - 1]["state"]), observed[1].state[0])
