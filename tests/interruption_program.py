"""Interrupts a whole command, starts it again, and compares its result with that of an undisturbed run.

    python -m tests.interruption_program kill PROGRAM FOLDER COUNT    SIGKILL at random moments
    unshare --mount python -m tests.interruption_program fill PROGRAM FOLDER COUNT    full disks
    unshare --mount python -m tests.interruption_program protect PROGRAM FOLDER COUNT    a read-only disk
    python -m tests.interruption_program misplace PROGRAM FOLDER COUNT    a file in its place
    python -m tests.interruption_program twice PROGRAM FOLDER COUNT    two starts at once
    python -m tests.interruption_program fail PROGRAM FOLDER COUNT    as it is, where it cannot begin
    python -m tests.interruption_program damage PROGRAM FOLDER COUNT    a damaged file of a finished run

PROGRAM is a key of `PROGRAMS`. Prints a line of JSON. The parent imports everything once and forks, so that a
start costs a second. A disk is a tmpfs on FOLDER/disk that grows after each failure.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from safetensors.torch import load_file, save_file

from envs.demos import collect
from tests.evaluations import save_checkpoint
from tests.policies import TEXT_ENCODER
from tests.pretraining_runs import TINY, write_prompts, write_shards
from tests.synthetic_dataset import REPO_ID, write_dataset
from tests.training_runs import saved_weights, tiny_policy
from vega_policy.cli import Command, commands, render
from vega_policy.data import feature_cache
from vega_policy.evaluation import evaluate  # noqa: F401
from vega_policy.evaluation.episodes import read_episodes
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.pretraining import trainer  # noqa: F401
from vega_policy.priors import PRIORS
from vega_policy.training import train  # noqa: F401


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


def digest_files(folder: Path, pattern: str = "*") -> str:
    files = [path for path in folder.rglob(pattern) if path.is_file()]
    return digest({str(path.relative_to(folder)): path.read_bytes() for path in files})


class Program(Protocol):
    """A command that resumes. Its output is a path, or paths that begin with it."""

    command: Command

    def __init__(self, inputs: Path) -> None:
        """Write what the command reads."""
        ...

    def arguments(self, output: Path) -> list[str]:
        """The command line."""
        ...

    def digest(self, output: Path) -> str:
        """A hash over the result."""
        ...

    def finished(self, output: Path) -> int:
        """How much is finished: it must never shrink."""
        ...


TINY_POLICY = (
    "prior=random head=flow policy.device=cpu policy.chunk_size=4 policy.n_action_steps=2 "
    "policy.frame_size=32 backbone.pretrained=false backbone.image_encoder=test_efficientnet "
    f"backbone.text_encoder={TEXT_ENCODER} backbone.freeze_image_encoder=true "
    "backbone.freeze_text_encoder=true backbone.width=16 backbone.depth=1 backbone.heads=2 "
    "head.width=16 head.depth=1 head.heads=2 head.steps=2 log_every=1"
).split()


class Training:
    """A checkpoint every 15 steps, on a cache that is there already from the second start on."""

    command = commands.train
    STEPS = 180

    def __init__(self, inputs: Path) -> None:
        self.data = write_dataset(inputs / "data")

    def arguments(self, output: Path) -> list[str]:
        data = [f"dataset.repo_id={REPO_ID}", f"dataset.root={self.data}", "dataset.cache=disk"]
        run = [f"output_dir={output}", f"dataset.cache_root={output}-cache", "resume=true", "keep_last=2"]
        steps = [f"steps={self.STEPS}", "save_every=15", "batch_size=5", "dataset.workers=0"]
        return [*TINY_POLICY, *data, *run, *steps]

    def digest(self, output: Path) -> str:
        return digest_tensors(saved_weights(output / "checkpoints" / f"{self.STEPS:06d}"))

    def finished(self, output: Path) -> int:
        return max((int(path.name) for path in (output / "checkpoints").glob("[0-9]*")), default=0)


class Decoding(Training):
    """Videos decoded by two processes in each step."""

    def arguments(self, output: Path) -> list[str]:
        return [*super().arguments(output), "dataset.cache=none", "dataset.workers=2"]


class Cache(Training):
    """The three streams of 450 frames, and a single step; a build goes on after its recorded episodes."""

    STEPS = 1

    def __init__(self, inputs: Path) -> None:
        self.data = write_dataset(inputs / "data", lengths=(90,) * 5)
        feature_cache.RECORD_EVERY = 0.0  # after each episode

    def arguments(self, output: Path) -> list[str]:
        return [*super().arguments(output), "dataset.cached=[frames,semantic,prior]"]

    def digest(self, output: Path) -> str:
        return digest_files(output.with_name(f"{output.name}-cache"))

    def finished(self, output: Path) -> int:
        cache = output.with_name(f"{output.name}-cache")
        recorded = [
            load_file(file)["episodes"] for file in cache.glob("*.building/notes/*/[a-z]*.safetensors")
        ]
        return 5 * len(list(cache.glob("[a-z]*/manifest.json"))) + sum(map(len, recorded))


class Evaluation:
    """Episodes in a world of points, under two ablations, with simulators in two processes."""

    command = commands.evaluate

    def __init__(self, inputs: Path) -> None:
        torch.manual_seed(0)
        camera = "observation.images.image"
        features = {
            "input_features": {
                camera: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
                "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            },
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))},
        }
        pair = {"min": -torch.ones(2), "max": torch.ones(2), "mean": torch.zeros(2), "std": torch.ones(2)}
        statistics = {"action": pair, "observation.state": pair}
        self.checkpoint = save_checkpoint(VegaPolicy(tiny_policy(**features)), inputs / "policy", statistics)
        mean = {camera: torch.full((3, 32, 32), 0.1)}
        save_file(mean, self.checkpoint / "pretrained_model" / "mean_frames.safetensors")

    def arguments(self, output: Path) -> list[str]:
        world = ["env.suite=two_points", "env.frame_size=32", "environments.tasks=tests.point_world.tasks"]
        world.append("environments.make=tests.point_world.make_without_torch")
        size = ["episodes_per_task=60", "ablations=[none,blind]", "processes=2", "batch_size=3", "videos=1"]
        files = [f"checkpoint={self.checkpoint}", f"output_dir={output}"]
        return [*files, *world, *size, "device=cpu", "latency_calls=1", "video_frame_size=64"]

    def digest(self, output: Path) -> str:
        rows = [asdict(row) for row in read_episodes(output)]
        assert len(rows) == 240
        assert (output / "report.html").is_file()
        return digest({"rows": json.dumps(rows, sort_keys=True).encode()})

    def finished(self, output: Path) -> int:
        table = output / "episodes.parquet"
        return pq.read_metadata(table).num_rows if table.is_file() else 0


class Collection:
    """Four demonstrations in MuJoCo, each in a shard of its own."""

    command = commands.collect

    def __init__(self, inputs: Path) -> None:
        pass

    def arguments(self, output: Path) -> list[str]:
        size = ["episodes_per_task=4", "episodes_per_shard=1", "env.frame_size=32", "processes=1"]
        return ["env=lift", f"root={output}", *size]

    def digest(self, output: Path) -> str:
        parts = {}
        for path in (output / "data").rglob("*.parquet"):
            table = pq.read_table(path, columns=["action", "observation.state", "index", "episode_index"])
            parts[str(path.relative_to(output))] = json.dumps(table.to_pylist()).encode()
        for path in output.glob("states/*"):
            parts[path.name] = digest_tensors(load_file(path)).encode()
        parts |= {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.mp4")}
        assert len(parts) == 16
        return digest(parts)

    def finished(self, output: Path) -> int:
        if output.exists():
            return 4
        return len(list(output.with_name(f"{output.name}.partial").glob("[0-9]*/shard.json")))


class Rendering:
    """Two demonstrations rendered from their states into a dataset and the training's cache of frames."""

    command = render.render

    def __init__(self, inputs: Path) -> None:
        self.states = inputs / "lift.safetensors"
        collect.collect(
            collect.CollectionSettings("lift", episodes_per_task=4, format="states"), self.states, processes=1
        )

    def arguments(self, output: Path) -> list[str]:
        places = [f"root={output}", f"cache_root={output}-cache", "repo_id=tests/lift"]
        return [str(self.states), *places, "frame_size=64", "rendering=fast", "processes=1"]

    def digest(self, output: Path) -> str:
        (cache,) = output.with_name(f"{output.name}-cache").iterdir()
        return digest_files(cache, "values.bin") + digest_files(output, "*.parquet")

    def finished(self, output: Path) -> int:
        notes = output.parent.glob(f"{output.name}-cache/*/notes/*.txt")
        done = len(list(output.parent.glob(f"{output.name}-cache/*/manifest.json")))
        return output.exists() + sum(file.read_text().count("\n") for file in notes) + 10 * done


class Features:
    """Features of a stand-in for another repository's model, exported over a dataset."""

    command = commands.export_features

    def __init__(self, inputs: Path) -> None:
        self.data = write_dataset(inputs / "data", lengths=(90,) * 5)

    def arguments(self, output: Path) -> list[str]:
        data = [f"repo_id={REPO_ID}", f"root={self.data}", f"output={output}"]
        return ["tests.interruption_program:stand_in", *data, "frame_size=64", "batch_size=8", "device=cpu"]

    def digest(self, output: Path) -> str:
        return digest_files(output)

    def finished(self, output: Path) -> int:
        return len(list(output.glob("*.safetensors"))) + (output / "manifest.json").exists()


def stand_in(device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def encode(frames: torch.Tensor) -> torch.Tensor:
        """[n v 3 h h] -> [n v 3 8 8]."""
        return torch.nn.functional.avg_pool3d(frames, (1, 8, 8))

    return encode


class Pretraining:
    """Autoencoder and transformer of a small prior, 30 steps each, with a checkpoint every three."""

    command = commands.pretrain

    def __init__(self, inputs: Path) -> None:
        PRIORS["wan_tiny"] = replace(PRIORS["wan_tiny"], architecture=TINY, shipped=None, layer=1)
        self.inputs = inputs
        write_shards(inputs / "clips")
        write_prompts(inputs / "prompts.safetensors")

    def arguments(self, output: Path) -> list[str]:
        files = [f"output_dir={output}", f"clips.folder={self.inputs}/clips", "device=cpu"]
        files.append(f"prompts={self.inputs}/prompts.safetensors")
        clips = ["clips.order={suites:[square],frames:5,frame_size:16}", "vae.lengths=[1,5]"]
        learning = "{steps:30,batch_size:2,learning_rate:3e-3,warmup:2}"
        learn = [f"vae.learning={learning}", f"transformer.learning={learning}"]
        report = ["report.clips=2", "report.sample_steps=2", "report.hardware=none"]
        every = ["log_every=1", "save_every=3", "validate_every=30", "stages=[vae,transformer,report,film]"]
        return [*files, *clips, *learn, *report, *every]

    def digest(self, output: Path) -> str:
        assert (output / "report" / "sample.mp4").stat().st_size > 0
        return digest_files(output / "wan_tiny")

    def finished(self, output: Path) -> int:
        steps = [int(path.name) for path in output.glob("*/checkpoints/[0-9]*") if path.name.isdigit()]
        return max(steps, default=0) + 100 * len(list(output.glob("wan_tiny/[a-z]*")))


class Export(Evaluation):
    """A policy written to a new folder to be published."""

    command = commands.export_policy

    def __init__(self, inputs: Path) -> None:
        super().__init__(inputs)
        (self.checkpoint / "pretrained_model" / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")

    def arguments(self, output: Path) -> list[str]:
        return [str(self.checkpoint), str(output)]

    def digest(self, output: Path) -> str:
        return digest_files(output, "*.safetensors")

    def finished(self, output: Path) -> int:
        return int(output.exists())


PROGRAMS: dict[str, type[Program]] = {
    "training": Training,
    "decoding": Decoding,
    "cache": Cache,
    "evaluation": Evaluation,
    "collection": Collection,
    "rendering": Rendering,
    "features": Features,
    "pretraining": Pretraining,
    "export": Export,
}


@dataclass
class Counts:
    """What happened; `finished` has a pair (number of the folder, how much is finished) an interruption."""

    program: str
    tried: int = 0
    in_write: int = 0  # a draft was left
    finished: list[tuple[int, int]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)  # of full disks
    folders: int = 1
    same: bool = False
    seconds: float = 0.0


class Interrupter:
    """Runs a program in child processes."""

    def __init__(self, name: str, folder: Path, inputs: Path) -> None:
        self.program, self.folder = PROGRAMS[name](inputs), folder
        self.counts, self.moments = Counts(name), random.Random(0)
        self._context = multiprocessing.get_context("fork")
        self._log = folder / "log"

    def start(self, output: Path, log: Path | None = None) -> Any:
        child = self._context.Process(target=attempt, args=(self.program, output, log or self._log))
        child.start()
        return child

    def run(self, output: Path) -> str:
        """Run to the end, and return the message of a failure."""
        child = self.start(output)
        child.join(600)
        return "" if child.exitcode == 0 else self._log.read_text().strip().splitlines()[-1]

    def kill(self, count: int) -> None:
        """Kill at random moments of the run's duration, every other time within a write.

        A program that is through before enough kills begins again in another folder.
        """
        straight, counts = self.folder / "straight", self.counts
        begin = time.monotonic()
        assert self.run(straight) == ""
        whole = time.monotonic() - begin
        while counts.tried < count:
            target = self.folder / f"killed{counts.folders}"
            child = self.start(target)
            if counts.tried % 2:
                wait_for_draft(child, target, whole)
                child.join(self.moments.choice((0, self.moments.uniform(0, 0.03))))  # some writes are short
            else:
                child.join(self.moments.uniform(0, whole))
            if child.exitcode is not None:
                assert child.exitcode == 0, self._log.read_text()
                counts.folders += 1
                continue
            child.kill()
            child.join()
            counts.tried += 1
            counts.finished.append((counts.folders, self.program.finished(target)))
            counts.in_write += bool(find_drafts(target))
        self.finish(straight, self.folder / f"killed{counts.folders}")

    def fill(self, count: int) -> None:
        """Run on disks that are too small, which grow after each failure.

        A program that is through before enough failures begins again on another disk.
        """
        disk, straight, counts = self.folder / "disk", self.folder / "straight", self.counts
        disk.mkdir()
        with mounted(disk, 2**30), measured(disk) as peak:
            assert self.run(disk / "run") == ""
            subprocess.run(["cp", "-r", *disk.iterdir(), self.folder], check=True)
        for path in self.folder.glob("run*"):
            path.rename(path.with_name(path.name.replace("run", "straight", 1)))
        sizes: list[int] = []
        with contextlib.ExitStack() as stack:
            while counts.tried < count:
                if not sizes:
                    stack.close()
                    drawn = max(4, count - counts.tried)
                    sizes = sorted(self.moments.randrange(4096, peak[0], 4096) for _ in range(drawn))
                    stack.enter_context(mounted(disk, sizes[0]))
                resize(disk, sizes.pop(0))
                message = self.run(disk / "run")
                if message == "":
                    counts.folders, sizes = counts.folders + 1, []
                    continue
                counts.tried += 1
                counts.finished.append((counts.folders, self.program.finished(disk / "run")))
                counts.in_write += bool(find_drafts(disk / "run"))
                counts.messages.append(message.replace(str(disk), "DISK"))
            resize(disk, 4 * peak[0])
            self.finish(straight, disk / "run")

    def protect(self, count: int) -> None:
        """Run on a disk that cannot be written to, then with such a disk for the cache alone."""
        disk = self.folder / "disk"
        for place in (disk, disk / "run-cache")[:count]:
            place.mkdir()
            with mounted(place, 2**20):
                subprocess.run(["mount", "-o", "remount,ro", place], check=True)
                self.fail(1)

    def misplace(self, count: int) -> None:
        """Run with a file in place of the output, then with one in place of the cache."""
        disk = self.folder / "disk"
        disk.mkdir()
        for place in (disk / "run", disk / "run-cache")[:count]:
            place.write_text("somebody's")
            self.fail(1)
            assert place.read_text() == "somebody's"
            place.unlink()

    def twice(self, count: int) -> None:
        """Start the command twice at once in one folder, COUNT times in all."""
        straight, counts, logs = self.folder / "straight", self.counts, [self.folder / "log1", self._log]
        assert self.run(straight) == ""
        same = []
        for counts.tried in range(1, count + 1):
            output = self.folder / f"twice{counts.tried}"
            children = [self.start(output, log) for log in logs]
            for child in children:
                child.join(600)
            codes = [child.exitcode for child in children]
            assert sorted(codes) == [0, 1], [log.read_text() for log in logs]
            refusal = logs[codes.index(1)].read_text().strip().splitlines()[-1]
            winner = children[codes.index(0)].pid
            counts.messages.append(refusal.replace(str(output), "RUN").replace(str(winner), "WINNER"))
            same.append(self.program.digest(output) == self.program.digest(straight))
        counts.same = all(same)

    def damage(self, count: int) -> None:
        """Damage one file of a finished result, start the command again, and note how it ended.

        A message has the damaged file and the end of the log; an end without an error has no message.
        """
        straight, counts = self.folder / "straight", self.counts
        assert self.run(straight) == ""
        whole = [path for path in self.folder.glob("straight*") if path.name != "log"]
        for counts.tried in range(1, count + 1):
            for path in whole:
                copy = self.folder / path.name.replace("straight", "damaged", 1)
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(path, copy, symlinks=True)
            files = [path for path in self.folder.glob("damaged*/**/*") if path.is_file()]
            file = self.moments.choice(sorted(path for path in files if not path.is_symlink()))
            content = file.read_bytes()
            damages = (b"", content[: len(content) // 2], b"[]\n", b"{}\n", self.moments.randbytes(200))
            file.write_bytes(self.moments.choice(damages))
            if self.run(self.folder / "damaged") != "":
                *_, last = log = self._log.read_text().strip().splitlines()
                kind = "traceback" if "Traceback (most recent call last):" in log else "message"
                counts.messages.append(f"{kind} {file.relative_to(self.folder)}: {last}")
        counts.same = True

    def fail(self, count: int) -> None:
        """Run where the command cannot begin."""
        for _ in range(count):
            message = self.run(self.folder / "disk" / "run")
            self.counts.messages.append(message.replace(str(self.folder / "disk"), "DISK"))
            self.counts.tried += bool(message)
        self.counts.same = True

    def finish(self, straight: Path, output: Path) -> None:
        message = self.run(output)
        assert message == "", message
        self.counts.same = self.program.digest(output) == self.program.digest(straight)


def attempt(program: Program, output: Path, log: Path) -> None:
    """Run the command in this process; what it prints and its last message go to the log."""
    torch.set_num_threads(1)
    with log.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            program.command.main(program.arguments(output))
        except BaseException as error:  # noqa: BLE001  reported by its last line, as by the command
            if not isinstance(error, SystemExit):
                traceback.print_exc(file=file)
            file.write(f"\n{error}\n")
            file.flush()
            os._exit(1)  # without the parent's handlers


@contextlib.contextmanager
def mounted(disk: Path, size: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


@contextlib.contextmanager
def measured(disk: Path) -> Iterator[list[int]]:
    """Yield a list that holds the most bytes that were in use."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            status = os.statvfs(disk)
            peak[0] = max(peak[0], (status.f_blocks - status.f_bfree) * status.f_frsize)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def find_drafts(output: Path) -> list[Path]:
    """Return the unfinished files and folders of a program."""
    return [
        path
        for folder in output.parent.glob(f"{output.name}*")
        for path in (folder, *folder.rglob(".*.partial"))
        if path.name.startswith(".")
    ] + list(output.parent.glob(f".{output.name}*.partial"))


def wait_for_draft(child: Any, output: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while child.exitcode is None and not find_drafts(output) and time.monotonic() < end:
        pass


def main(arguments: Sequence[str]) -> None:
    """Interrupt one command, and print what happened."""
    how, name, folder, count = arguments
    start = time.monotonic()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as inputs:
        interrupter = Interrupter(name, Path(folder).resolve(), Path(inputs))
        actions = (interrupter.kill, interrupter.fill, interrupter.protect, interrupter.misplace)
        actions += (interrupter.twice, interrupter.fail, interrupter.damage)
        {action.__name__: action for action in actions}[how](int(count))
    interrupter.counts.seconds = round(time.monotonic() - start, 1)
    sys.stdout.write(json.dumps(asdict(interrupter.counts)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
