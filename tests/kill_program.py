"""Kills a command at random moments, resumes it, and compares its result with that of an undisturbed one.

    python -m tests.kill_program training|cache|evaluation|collection|pretraining FOLDER KILLS

Prints a line of JSON. The parent imports everything once and forks, so that a start costs a second.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import av
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from envs.demos.collect import CollectionSettings, collect
from tests.evaluations import evaluate
from tests.policies import tiny_config
from tests.pretraining_runs import TINY
from tests.pretraining_runs import settings as pretraining_settings
from tests.synthetic_dataset import CAMERAS, write_dataset
from tests.training_runs import saved_weights, tiny_run
from vega_policy.data import feature_cache
from vega_policy.evaluation.episodes import read_episodes
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.pretraining.trainer import pretrain
from vega_policy.priors import PRIORS
from vega_policy.training.train import choose_checkpoint, make_accelerator, make_trainer


def digest(parts: dict[str, bytes]) -> str:
    """A hash over named bytes."""
    whole = hashlib.sha256()
    for name in sorted(parts):
        whole.update(name.encode() + parts[name])
    return whole.hexdigest()


def digest_tensors(tensors: dict[str, torch.Tensor]) -> str:
    return digest(
        {name: value.reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in tensors.items()}
    )


class Program(Protocol):
    """A command that resumes."""

    def run(self, output: Path, begin: Callable[[], None]) -> None:
        """Run or resume; `begin` is called once the work begins."""
        ...

    def digest(self, output: Path) -> str:
        """A hash over the result."""
        ...

    def finished(self, output: Path) -> int:
        """How much is finished: it must never shrink."""
        ...


class Training:
    """240 steps with a checkpoint every four."""

    def __init__(self, folder: Path) -> None:
        self.data = write_dataset(folder / "data")

    def run(self, output: Path, begin: Callable[[], None]) -> None:
        config = tiny_run(self.data, output, steps=240, save_every=4, keep_last=2, resume=True)
        accelerator = make_accelerator(cpu=True, precision="no")
        trainer = make_trainer(config, accelerator, choose_checkpoint(config, accelerator))
        begin()
        trainer.fit()

    def digest(self, output: Path) -> str:
        return digest_tensors(saved_weights(output / "checkpoints" / "000240"))

    def finished(self, output: Path) -> int:
        return max((int(path.name) for path in (output / "checkpoints").glob("[0-9]*")), default=0)


class Cache:
    """Features of 450 frames; a killed build starts over, since a stream is complete or absent."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.policy, size = VegaPolicy(tiny_config()), (450, 3, 64, 64)
        self.frames = {camera: torch.randint(0, 256, size, dtype=torch.uint8) for camera in CAMERAS}

    def run(self, output: Path, begin: Callable[[], None]) -> None:
        streams = feature_cache.streams_of(
            self.policy.model, {"repo_id": "x"}, list(CAMERAS), ["frames", "semantic", "prior"]
        )
        clips = ({key: part[at : at + 9] for key, part in self.frames.items()} for at in range(0, 450, 9))
        begin()
        feature_cache.build_streams(output, streams, self.policy.model, clips, 450)

    def digest(self, output: Path) -> str:
        return digest({path.parent.name + path.name: path.read_bytes() for path in output.glob("*/*")})

    def finished(self, output: Path) -> int:
        return len(list(output.glob("[a-z]*/manifest.json")))


class Evaluation:
    """80 episodes in a world of points, with simulators in two processes."""

    def __init__(self, folder: Path) -> None:
        pass

    def run(self, output: Path, begin: Callable[[], None]) -> None:
        begin()
        evaluate(output, processes=2, episodes_per_task=20, ablations=("none", "blind"), videos=1)

    def digest(self, output: Path) -> str:
        rows = [asdict(row) for row in read_episodes(output)]
        return digest({"rows": json.dumps(rows, sort_keys=True).encode()})

    def finished(self, output: Path) -> int:
        table = output / "episodes.parquet"
        return pq.read_metadata(table).num_rows if table.is_file() else 0


class Collection:
    """Four demonstrations in MuJoCo, each in a shard of its own.

    The result is their numbers, states and lengths of videos: a renderer that has drawn other frames before
    may round one pixel of a frame otherwise, by one level of 255 (seen in 2 of 8 videos).
    """

    def __init__(self, folder: Path) -> None:
        self.settings = CollectionSettings("lift", episodes_per_task=4, episodes_per_shard=1, frame_size=32)

    def run(self, output: Path, begin: Callable[[], None]) -> None:
        begin()
        collect(self.settings, output, processes=1)

    def digest(self, output: Path) -> str:
        parts = {}
        for path in output.rglob("*.mp4"):
            with av.open(str(path)) as video:
                parts[str(path.relative_to(output))] = str(video.streams.video[0].frames).encode()
        for path in (output / "data").rglob("*.parquet"):
            table = pq.read_table(path, columns=["action", "observation.state", "index", "episode_index"])
            parts[str(path.relative_to(output))] = json.dumps(table.to_pylist()).encode()
        for path in output.glob("states/*"):
            parts[path.name] = digest_tensors(load_file(path)).encode()
        return digest(parts)

    def finished(self, output: Path) -> int:
        if output.exists():
            return 4
        return len(list(output.with_name(f"{output.name}.partial").glob("[0-9]*/shard.json")))


class Pretraining:
    """Autoencoder and transformer of a small prior, 30 steps each, with a checkpoint every three."""

    def __init__(self, folder: Path) -> None:
        PRIORS["wan_tiny"] = replace(PRIORS["wan_tiny"], architecture=TINY, shipped=None, layer=1)

    def run(self, output: Path, begin: Callable[[], None]) -> None:
        learning = {"steps": 30, "batch_size": 2, "learning_rate": 3e-3, "warmup": 2}
        parts = {"vae": {"learning": learning, "lengths": [1, 5]}, "transformer": {"learning": learning}}
        settings = pretraining_settings(output, **parts, save_every=3, validate_every=30)
        begin()
        pretrain(settings)

    def digest(self, output: Path) -> str:
        files = sorted((output / "wan_tiny").rglob("*.safetensors"))
        return digest(
            {str(path.relative_to(output)): digest_tensors(load_file(path)).encode() for path in files}
        )

    def finished(self, output: Path) -> int:
        steps = [int(path.name) for path in output.glob("*/checkpoints/[0-9]*") if path.name.isdigit()]
        return max(steps, default=0) + 100 * len(list(output.glob("wan_tiny/[a-z]*")))


PROGRAMS: dict[str, Callable[[Path], Program]] = {
    "training": Training,
    "cache": Cache,
    "evaluation": Evaluation,
    "collection": Collection,
    "pretraining": Pretraining,
}


def attempt(program: Program, output: Path, began: Any) -> None:
    """Run in a child process, without progress bars."""
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        program.run(output, began.set)


def kill(program: Program, output: Path, kills: int, context: Any) -> dict[str, Any]:
    """Kill the program at random moments, every other time while it writes; return what was finished.

    A program that is through before enough kills begins again in another folder.
    """
    moments, finished, drafts, rounds = random.Random(0), [], 0, 0
    began = context.Event()
    start = time.monotonic()
    program.run(output.with_name("straight"), lambda: None)
    whole = time.monotonic() - start
    longest = (0.9 if isinstance(program, Cache) else 0.4) * whole
    while len(finished) < kills:
        began.clear()
        target = output.with_name(f"killed{rounds}")
        child = context.Process(target=attempt, args=(program, target, began))
        child.start()
        began.wait(300)
        if len(finished) % 2:
            wait_for_draft(child, target, 5.0)
            child.join(moments.uniform(0, 0.03))
        else:
            child.join(moments.uniform(0, longest))
        if child.exitcode is not None:
            rounds += 1
            continue
        child.kill()
        child.join()
        finished.append((rounds, program.finished(target)))
        drafts += bool(find_drafts(target))
    last = output.with_name(f"killed{rounds}")
    program.run(last, lambda: None)
    same = program.digest(last) == program.digest(output.with_name("straight"))
    return {"kills": kills, "in_write": drafts, "finished": finished, "same": same}


def find_drafts(output: Path) -> list[Path]:
    """Return the unfinished files and folders of a program."""
    return [*output.rglob(".*.partial"), *output.with_name(f"{output.name}.partial").rglob(".*.partial")]


def wait_for_draft(child: Any, output: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while child.exitcode is None and not find_drafts(output) and time.monotonic() < end:
        pass


def main() -> None:
    """Interrupt one command, and print what happened."""
    name, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as inputs:
        counts = kill(PROGRAMS[name](Path(inputs)), folder / "killed", kills, context)
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
