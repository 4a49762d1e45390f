"""A whole evaluation: run the missing episodes, render videos, summarize, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub.constants import CONFIG_NAME
from tqdm import tqdm

from vega_policy.checkpoints import PRETRAINED, check_checkpoint, find_checkpoint
from vega_policy.configuration_vega import read_rendering
from vega_policy.evaluation.ablations import ABLATIONS, apply_ablation, check_ablations
from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool
from vega_policy.evaluation.env_worker import resolve
from vega_policy.evaluation.episodes import (
    SUMMARY_FILE,
    Episode,
    EpisodeResult,
    EvaluationFolder,
    Shard,
    TaskDescription,
    plan_episodes,
    select_tasks,
)
from vega_policy.evaluation.policies import (
    ChunkPolicy,
    checkpoint_fingerprint,
    choose_device,
    load_lerobot_policy,
)
from vega_policy.evaluation.report import (
    choose_episodes,
    render_videos,
    summarize,
    write_perturbation_report,
    write_report,
)
from vega_policy.evaluation.rollout import FinishedEpisode, Rollout, Schedule
from vega_policy.evaluation.stats import paired_difference
from vega_policy.run_dir import read_json, read_yaml, write_json

logger = logging.getLogger(__name__)

USUAL_FRAMES = {"frame_size": 256, "rendering": "full"}
"""LIBERO's and Meta-World's published sizes, where nothing says what a policy was trained on."""

_SECONDS_BETWEEN_WRITES = 2.0  # of the table: writing it after every episode would delay all simulators


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Raises:
        ValueError: If an ablation is unknown, or a number is out of range.
    """

    suite: str
    tasks: tuple[int, ...] | None = None  # indices; None evaluates all tasks of the suite
    episodes_per_task: int = 50
    seed: int = 0  # different seeds share no episode
    official_states: bool = False  # episode i starts from the suite's official initial state i
    ablations: tuple[str, ...] = ("none",)  # the first one is the headline of the report
    batch_size: int = 1  # rows of a prediction of the policy; their number may change the last bits
    processes: int = 2  # simulators, one a process; without influence on results
    videos: int = 3  # number of successes and of failures that are rendered to videos
    video_frame_size: int = 256  # pixels
    latency_calls: int = 20  # timed policy calls with a single observation
    keep_states: bool = False  # of all episodes, not only of those with videos
    perturbation: str = "none"  # axis along which the environments change every episode
    perturbation_strength: float = 0.5  # in (0, 1]

    def __post_init__(self) -> None:
        check_ablations(self.ablations)
        for name, least in (("batch_size", 1), ("processes", 1), ("videos", 0), ("latency_calls", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"expected {name} of at least {least}, got {value}")

    def decisive(self) -> dict[str, Any]:
        """Return the settings that influence results and so must not change when an evaluation resumes."""
        free = {"latency_calls"} if self.mixes_rows else {"latency_calls", "processes"}
        if self.perturbation == "none":  # as evaluations from before there were any
            free |= {"perturbation", "perturbation_strength"}
        if not self.keep_states:
            free |= {"keep_states"}
        return {name: value for name, value in asdict(self).items() if name not in free}

    @property
    def kept(self) -> int | None:
        """Of how many successes and failures the simulator states are kept; None: of all episodes."""
        return None if self.keep_states else self.videos

    @property
    def mixes_rows(self) -> bool:
        """Whether an ablation exchanges features between the rows of a batch."""
        return not all(ABLATIONS[name].rows_independent for name in self.ablations)


def default_batch_size(device: str) -> int:
    """Return the number of rows of a prediction: one on a CPU, which takes as long for each row of more."""
    return 1 if device.startswith("cpu") else 16


def read_settings(
    config: Mapping[str, Any],
    suite: str,
    tasks: Sequence[TaskDescription],
    device: str,
    perturbation: str = "none",
) -> EvaluationSettings:
    """Return the settings of a composed configs/eval.yaml in a suite, given all its tasks.

    `ablations` is one name or a list of names. Official initial states are the default where all tasks of the
    suite have them; the batch size defaults by `device`.
    """
    ablations, indices, official = config["ablations"], config["tasks"], config["official_states"]
    plain = ("episodes_per_task", "seed", "processes", "videos", "video_frame_size", "latency_calls")
    return EvaluationSettings(
        suite=suite,
        tasks=None if indices is None else tuple(indices),
        ablations=(ablations,) if isinstance(ablations, str) else tuple(ablations),
        official_states=all(task.official_states for task in tasks) if official is None else official,
        batch_size=config["batch_size"] or default_batch_size(device),
        perturbation=perturbation,
        perturbation_strength=config["env"]["perturbation_strength"],
        **{name: config[name] for name in (*plain, "keep_states")},
    )


class LoadPolicy(Protocol):
    """Loads the policy of a checkpoint folder, such as `load_lerobot_policy` or a connection to a server."""

    def __call__(self, folder: Path, *, device: str, action_steps: int | None) -> ChunkPolicy:
        """Return the policy."""
        ...


def evaluate_checkpoint(
    config: Mapping[str, Any],
    load_policy: LoadPolicy = load_lerobot_policy,
    usual_frames: Mapping[str, Any] = USUAL_FRAMES,
) -> dict[str, Any]:
    """Evaluate a checkpoint as the composed configs/eval.yaml says; each suite has a folder of its own.

    Returns the content of summary.json by suite. `usual_frames` hold where neither the config nor the
    checkpoint says it.

    Raises:
        FileNotFoundError: If the checkpoint, or a file that an ablation needs, does not exist.
        ValueError: If a setting is wrong, the output folder holds something else, the checkpoint is damaged,
            or the policy does not fit the environment.
        WorkerError: If a simulator failed.
    """
    environment, functions = config["env"], config["environments"]
    device = choose_device(config["device"])
    checkpoint = find_checkpoint(Path(config["checkpoint"]))
    check_checkpoint(checkpoint)
    frames = choose_frames(checkpoint, environment, usual_frames)
    provenance = {
        "checkpoint": str(config["checkpoint"]),
        "checkpoint_sha256": checkpoint_fingerprint(checkpoint),
        "action_steps": config["action_steps"],
        "device": device,
        **frames,
    }
    evaluations = _open_evaluations(config, provenance)
    left = sum(evaluation.count_episodes()[0] for evaluation in evaluations.values())
    logger.info("loading %s on %s, environments of %s", checkpoint, device, ", ".join(evaluations))
    factory = EnvironmentFactory(functions["make"], **frames)
    with WorkerPool(factory, min(config["processes"], max(left, 1))) as pool:
        first = next(iter(evaluations.values()))
        first.prepare(pool)
        policy = load_policy(checkpoint, device=device, action_steps=config["action_steps"])
        names = first.settings.ablations
        policies = {name: apply_ablation(name, policy, checkpoint) for name in names}
        summaries = {name: evaluation.run(policies, pool) for name, evaluation in evaluations.items()}
        if len(_listed(environment["perturbation"])) > 1 and config["shards"] == 1:
            _compare_perturbations(evaluations, summaries, pool, Path(config["output_dir"]))
        return summaries


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _open_evaluations(config: Mapping[str, Any], provenance: dict[str, Any]) -> dict[str, Evaluation]:
    """Open the evaluation of each suite and perturbation, named as by `evaluation_folders`."""
    functions = config["environments"]
    evaluations: dict[str, Evaluation] = {}
    for name, (suite, axis, folder) in _named_evaluations(config).items():
        tasks = resolve(functions["tasks"])(suite)
        settings = read_settings(config, suite, tasks, provenance["device"], axis)
        prompts = [task.instruction for task in tasks]
        if axis != "none":
            prompts = resolve(functions["prompts"])(suite, axis, settings.perturbation_strength)
        shard = Shard(config["shard"], config["shards"])
        evaluations[name] = Evaluation(settings, tasks, folder, provenance, shard, prompts)
        logger.info("%s: %d of %d episodes left", folder, *evaluations[name].count_episodes())
    return evaluations


def _named_evaluations(config: Mapping[str, Any]) -> dict[str, tuple[str, str, Path]]:
    """Return suite, perturbation and folder of each evaluation by name.

    Each suite and perturbation of a list has a folder of its own, also of a list of one.
    """
    environment, found = config["env"], {}
    one_suite, one_axis = (isinstance(environment[name], str) for name in ("suite", "perturbation"))
    suites, axes = _listed(environment["suite"]), _listed(environment["perturbation"])
    for suite, axis in product(suites, axes):
        parts = ([] if one_suite else [suite]) + ([] if one_axis else [axis])
        name = suite if one_axis else f"{suite}/{axis}"
        found[name] = suite, axis, Path(config["output_dir"], *parts)
    return found


def evaluation_folders(config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the folder of the results by suite, or by "suite/perturbation" of a list of perturbations."""
    shard = Shard(config["shard"], config["shards"])
    return {name: shard.folder(folder) for name, (_, _, folder) in _named_evaluations(config).items()}


def _compare_perturbations(
    evaluations: Mapping[str, Evaluation],
    summaries: Mapping[str, dict[str, Any]],
    pool: WorkerPool,
    folder: Path,
) -> None:
    """Pair each perturbation with none by initial state, in its summary, and write a report over all."""
    for name, evaluation in evaluations.items():
        settings, summary = evaluation.settings, summaries[name]
        unperturbed = evaluations.get(f"{settings.suite}/none")
        if settings.perturbation != "none" and unperturbed is not None:
            summary["against_none"] = paired_difference(evaluation.successes(), unperturbed.successes())
            write_json(evaluation.path / SUMMARY_FILE, summary)
    specs = [evaluation.episodes[0].spec() for evaluation in evaluations.values()]
    size = next(iter(evaluations.values())).settings.video_frame_size
    frames = pool.render([(spec, None) for spec in specs], frame_size=size)
    starts = {name: frame[0] for name, frame in zip(evaluations, frames, strict=True)}
    write_perturbation_report(folder, summaries, starts)


def choose_frames(
    checkpoint: Path, environment: Mapping[str, Any], usual: Mapping[str, Any] = USUAL_FRAMES
) -> dict[str, Any]:
    """Return `frame_size` and `rendering`: those given, else those of the training, else the usual ones."""
    trained, chosen = trained_frames(checkpoint), {}
    for name in USUAL_FRAMES:
        given, then = environment.get(name), trained.get(name)
        chosen[name] = given if given is not None else usual[name] if then is None else then
        origin = "as in training" if chosen[name] == then else "given" if given is not None else "by default"
        if then is None:
            origin += ", that of the training is not known"
        logger.info("env.%s=%s (%s)", name, chosen[name], origin)
        if then is not None and chosen[name] != then:
            logger.warning(
                "the policy was trained on frames with %s=%s, but is evaluated with %s=%s: the results say "
                "little about it. Leave out env.%s, or render the demonstrations again (vega-render).",
                *(name, then, name, chosen[name], name),
            )
    return chosen


def trained_frames(checkpoint: Path) -> dict[str, Any]:
    """Return the `frame_size` and the `rendering` of a policy's training data, None where unknown.

    Checkpoints from before the rendering was stored have it in the folder of the dataset, if that is there.
    """
    config = read_json(checkpoint / CONFIG_NAME)
    features = (config.get("input_features") or {}).values()
    sides = {side for one in features if one["type"] == "VISUAL" for side in one["shape"][1:]}
    rendering, run = config.get("dataset_rendering"), checkpoint.resolve().parent.parent.parent
    if rendering is None and checkpoint.name == PRETRAINED and (run / "config.yaml").is_file():
        root = read_yaml(run / "config.yaml", "dataset")["dataset"]["root"]
        rendering = None if root is None else read_rendering(Path(root))
    return {"frame_size": sides.pop() if len(sides) == 1 else None, "rendering": rendering}


class Evaluation:
    """One evaluation of one policy, under one or more ablations, in one suite and one folder."""

    def __init__(
        self,
        settings: EvaluationSettings,
        tasks: Sequence[TaskDescription],
        folder: Path,
        provenance: dict[str, Any],
        shard: Shard | None = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """Open or begin an evaluation; its folder stays locked until `run` returns.

        The folder may hold an unfinished evaluation with the same settings and `provenance`: what else
        decides the results (checkpoint, device, rendering, ...), as JSON values. A `shard` is run in a folder
        of its own. `prompts` are all instructions that an episode may have; None: those of the tasks.

        Raises:
            OtherRunError: If the folder holds something else.
            FolderInUseError: If another process evaluates into it.
            ValueError: If a task index or a number is out of range, or an ablation cannot be run in shards.
        """
        self.settings = settings
        self.episodes = plan_episodes(
            select_tasks(tasks, settings.tasks),
            settings.episodes_per_task,
            settings.seed,
            official_states=settings.official_states,
            perturbation=settings.perturbation,
            perturbation_strength=settings.perturbation_strength,
        )
        self._shard = shard or Shard()
        if self._shard.count > 1 and settings.mixes_rows:
            raise ValueError(
                f"the ablations {list(settings.ablations)} exchange features between the rows of a batch and "
                "cannot be run in shards; evaluate them with shards=1"
            )
        self._instructions = [task.instruction for task in tasks] if prompts is None else list(prompts)
        self._groups = {task.name: task.group for task in tasks}
        path, decisive = self._shard.folder(folder), {**provenance, **settings.decisive()}
        self._folder = EvaluationFolder(path, decisive, kept=settings.kept)
        if self._shard.count == 1:
            self._folder.gather_shards(settings.ablations[0])
        for ablation in settings.ablations:
            is_part = len(self._folder.results(ablation)) < len(self.episodes)
            if is_part and not ABLATIONS[ablation].rows_independent:
                self._folder.discard(ablation)
        self._started = 0.0

    def count_episodes(self) -> tuple[int, int]:
        """Return how many episodes are left to run here, over all ablations, and of how many."""
        left = sum(len(self._missing(ablation)) for ablation in self.settings.ablations)
        return left, len(self._here) * len(self.settings.ablations)

    @property
    def path(self) -> Path:
        """Folder of the results."""
        return self._folder.path

    def successes(self) -> list[bool]:
        """Return the successes under the first ablation, in order of task and episode."""
        return [result.success for result in self._folder.results(self.settings.ablations[0])]

    def prepare(self, pool: WorkerPool) -> None:
        """Start to build the simulators that are needed first, while the caller loads the policy."""
        self._started = time.perf_counter()
        for ablation in self.settings.ablations:
            if missing := self._missing(ablation):
                schedule = Schedule(missing, self.settings.batch_size)
                first = [schedule.take() for _ in range(min(len(pool), len(missing)))]
                pool.open(render=ablation != "blind", keep_states=False)
                pool.build(episode.scene for episode in first if episode is not None)
                return

    def run(self, policies: Mapping[str, ChunkPolicy], pool: WorkerPool) -> dict[str, Any]:
        """Run every missing episode, write summary.json, videos and report.html, and return the summary.

        `policies` are by ablation, in the order of the settings.

        Raises:
            ValueError: If the policies are not those of the settings' ablations.
        """
        self._started = self._started or time.perf_counter()
        try:
            if tuple(policies) != self.settings.ablations:
                raise ValueError(
                    f"expected policies for {list(self.settings.ablations)}, got {list(policies)}"
                )
            for ablation, policy in policies.items():
                self._run_episodes(ablation, policy, pool)
            return self._report(policies, pool)
        finally:
            self._folder.close()

    def _run_episodes(self, ablation: str, policy: ChunkPolicy, pool: WorkerPool) -> None:
        missing, progress = self._missing(ablation), self._folder.progress
        if not missing:
            return
        is_main = ablation == self.settings.ablations[0]
        pool.open(
            render=policy.reads_frames,
            keep_states=is_main and self.settings.kept != 0,
            history=policy.description.history,
        )
        rollout = Rollout(
            policy,
            pool,
            self.settings.batch_size,
            lockstep=not ABLATIONS[ablation].rows_independent,
            call_seconds=progress.call_seconds.setdefault(ablation, []),
        )
        unwritten: list[EpisodeResult] = []
        total, done = len(self._here), len(self._here) - len(missing)
        successes = sum(result.success for result in self._folder.results(ablation))
        try:
            with tqdm(
                total=total, initial=done, desc=f"ablation {ablation}", unit="ep", dynamic_ncols=True
            ) as bar:
                for end in rollout.run(missing, self._instructions):
                    result = _result(ablation, end)
                    if is_main:
                        self._folder.trajectories.offer(result, end.outcome["states"])
                    successes += result.success
                    bar.set_postfix_str(f"success {successes}/{bar.n + 1}", refresh=False)
                    bar.update()
                    if bar.n == bar.total and is_main and not progress.single_call_seconds:
                        calls = self.settings.latency_calls  # now that no simulator takes its time
                        progress.single_call_seconds = rollout.single_call_seconds(calls)
                    unwritten.append(result)
                    if time.perf_counter() - self._started > _SECONDS_BETWEEN_WRITES:
                        self._write(unwritten)
        finally:
            self._write(unwritten)
        logger.info("simulators busy %.0f%% of the time", 100 * rollout.busy_fraction)

    def _write(self, results: list[EpisodeResult]) -> None:
        """Write finished episodes and empty their list."""
        # States and durations first: an episode on record is never run again.
        self._record_seconds()
        if results:
            self._folder.add(results)
            results.clear()

    def _report(self, policies: Mapping[str, ChunkPolicy], pool: WorkerPool) -> dict[str, Any]:
        folder, main = self._folder, self.settings.ablations[0]
        results = {ablation: folder.results(ablation) for ablation in policies}
        videos = render_videos(
            choose_episodes(results[main], self.settings.videos),
            self.episodes,
            folder.trajectories,
            pool,
            folder.path,
            frame_size=self.settings.video_frame_size,
        )
        self._record_seconds()
        description = policies[main].description
        summary = summarize(results, description, folder.progress, folder.settings, self._groups)
        write_json(folder.path / SUMMARY_FILE, summary)
        write_report(folder.path, summary, videos)
        return summary

    @property
    def _here(self) -> list[Episode]:
        return self._shard.part(self.episodes)

    def _missing(self, ablation: str) -> list[Episode]:
        finished = {result.key for result in self._folder.results(ablation)}
        return [episode for episode in self._here if episode.key not in finished]

    def _record_seconds(self) -> None:
        """Add the time since the last call to the recorded cost."""
        now = time.perf_counter()
        self._folder.add_seconds(now - self._started)
        self._started = now


def _result(ablation: str, end: FinishedEpisode) -> EpisodeResult:
    episode, outcome = asdict(end.episode), end.outcome
    del episode["initial_state"], episode["perturbation_strength"]
    return EpisodeResult(
        ablation=ablation,
        **episode,
        success=outcome["success"],
        length=outcome["length"],
        policy_calls=end.policy_calls,
        initial_hash=outcome["initial_hash"],
        final_hash=outcome["final_hash"],
    )
