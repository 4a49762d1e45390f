"""A whole evaluation: play what is missing, film, summarise, report."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lerobot.utils.constants import PRETRAINED_MODEL_DIR
from tqdm import tqdm

from vega_policy.checkpoints import require_intact
from vega_policy.evaluation import report as videos
from vega_policy.evaluation.ablations import ABLATIONS, apply_ablation
from vega_policy.evaluation.config import EvaluationSettings
from vega_policy.evaluation.env_pool import EnvironmentFactory, Shard, WorkerPool, gather
from vega_policy.evaluation.env_worker import resolve
from vega_policy.evaluation.episodes import (
    SUMMARY_FILE,
    TRAJECTORY_FOLDER,
    Episode,
    EpisodeResult,
    RunFolder,
    TaskDescription,
    Trajectories,
    plan_episodes,
    slot_of,
    slot_queues,
    write_json,
)
from vega_policy.evaluation.policies import (
    ChunkPolicy,
    checkpoint_fingerprint,
    find_checkpoint,
    load_lerobot_policy,
)
from vega_policy.evaluation.report import summarize, write_report
from vega_policy.evaluation.rollout import FinishedEpisode, Rollout, single_call_seconds

logger = logging.getLogger(__name__)


class Evaluation:
    """One evaluation of one policy, under one or more ablations, in one suite and one folder."""

    def __init__(
        self,
        settings: EvaluationSettings,
        tasks: Sequence[TaskDescription],
        folder: Path,
        provenance: dict[str, Any],
        shard: Shard | None = None,
    ) -> None:
        """Open or begin an evaluation.

        Args:
            settings: What to do.
            tasks: All tasks of the suite.
            folder: Output folder; may hold an unfinished evaluation with the same settings.
            provenance: What else decides the results (checkpoint, device, rendering, ...), as JSON values.
            shard: The part that is played here, in a folder of its own; None plays all.

        Raises:
            OtherRunError: If the folder holds something else.
            FolderInUseError: If another process evaluates into it.
            ValueError: If a task index does not exist, a number is out of range, or an ablation cannot be
                played in shards.
        """
        self.settings = settings
        self.episodes = plan_episodes(
            select_tasks(tasks, settings.tasks),
            settings.episodes_per_task,
            settings.seed,
            official_states=settings.official_states,
        )
        self._shard = shard or Shard()
        if self._shard.count > 1:
            _require_rows_apart(settings)
        self._groups = {task.name: task.group for task in tasks}
        self._folder = RunFolder(self._shard.folder(folder), {**provenance, **settings.decisive()})
        self._trajectories = Trajectories(self._folder.path / TRAJECTORY_FOLDER, settings.videos)
        if self._shard.count == 1:
            gather(self._folder, self._trajectories, settings.ablations[0])
        self._forget_what_cannot_go_on()
        self._started = time.perf_counter()

    def episodes_left(self) -> tuple[int, int]:
        """Return how many episodes are still to play here, over all ablations, and of how many."""
        num_envs, ablations = self.settings.num_envs, self.settings.ablations
        total = len(self.episodes)
        here = sum(self._shard.plays(slot_of(number, total, num_envs)) for number in range(total))
        left = sum(len(queue) for ablation in ablations for queue in self._queues(ablation))
        return left, here * len(ablations)

    def prepare(self, pool: WorkerPool) -> None:
        """Let the workers build the environments needed first, while the caller loads the policy."""
        for ablation in self.settings.ablations:
            queues = self._queues(ablation)
            if any(queues):
                pool.open(render=ablation != "blind", keep_states=False)
                firsts = {slot: queue[0] for slot, queue in enumerate(queues) if queue}
                pool.build({slot: (e.suite, e.task_index) for slot, e in firsts.items()})
                return

    def run(self, policies: Mapping[str, ChunkPolicy], pool: WorkerPool) -> dict[str, Any]:
        """Play every missing episode, then write summary.json, the films and report.html.

        Args:
            policies: The policy under each ablation of the settings.
            pool: Workers.

        Returns:
            The content of summary.json.

        Raises:
            ValueError: If the policies are not those of the settings' ablations.
        """
        try:
            return self._run(policies, pool)
        finally:
            self._folder.close()

    def _run(self, policies: Mapping[str, ChunkPolicy], pool: WorkerPool) -> dict[str, Any]:
        if tuple(policies) != self.settings.ablations:
            raise ValueError(f"expected policies for {list(self.settings.ablations)}, got {list(policies)}")
        for ablation, policy in policies.items():
            self._play(ablation, policy, pool)
        first, policy = next(iter(policies.items()))
        results = {ablation: self._folder.results(ablation) for ablation in policies}
        films = self._film(results[first], pool)
        self._clock()
        summary = summarize(
            results, policy.description, self._folder.progress, self._folder.settings, self._groups
        )
        write_json(self._folder.path / SUMMARY_FILE, summary)
        write_report(self._folder.path, summary, films)
        return summary

    def _play(self, ablation: str, policy: ChunkPolicy, pool: WorkerPool) -> None:
        finished, queues = self._folder.results(ablation), self._queues(ablation)
        if not any(queues):
            return
        seconds = self._folder.progress.call_seconds.setdefault(ablation, [])
        main = ablation == self.settings.ablations[0]
        pool.open(
            render=policy.reads_frames,
            keep_states=main and self.settings.videos > 0,
            history=policy.description.history,
        )
        rollout = Rollout(policy, pool, policy.description.action_steps, call_seconds=seconds)
        with _ProgressBar(ablation, len(self.episodes), finished) as bar:
            for end in rollout.play(queues):
                result = _result(ablation, end)
                if main:
                    self._trajectories.offer(result, end.outcome["states"])
                    self._time_single_calls(rollout)
                # States and durations first: an episode on record is never played again.
                self._clock()
                self._folder.add([result])
                bar.count(result)

    def _time_single_calls(self, rollout: Rollout) -> None:
        progress = self._folder.progress
        if not progress.single_call_seconds and rollout.last_batch is not None:
            calls = self.settings.latency_calls
            progress.single_call_seconds = single_call_seconds(rollout.policy, rollout.last_batch, calls)

    def _film(self, results: Sequence[EpisodeResult], pool: WorkerPool) -> list[videos.Film]:
        return videos.film(
            videos.choose(results, self.settings.videos),
            self.episodes,
            self._trajectories,
            pool,
            self._folder.path,
            frame_size=self.settings.video_frame_size,
        )

    def _queues(self, ablation: str) -> list[deque[Episode]]:
        finished = {result.key for result in self._folder.results(ablation)}
        queues = slot_queues(self.episodes, self.settings.num_envs, finished)
        return [queue if self._shard.plays(slot) else deque() for slot, queue in enumerate(queues)]

    def _forget_what_cannot_go_on(self) -> None:
        for ablation in self.settings.ablations:
            finished = len(self._folder.results(ablation))
            if not ABLATIONS[ablation].rows_apart and finished < len(self.episodes):
                self._folder.forget(ablation)

    def _clock(self) -> None:
        """Add the time since the last call to the evaluation's record."""
        now = time.perf_counter()
        self._folder.progress.seconds += now - self._started
        self._started = now
        self._folder.progress.save()


def _require_rows_apart(settings: EvaluationSettings) -> None:
    mixed = [name for name in settings.ablations if not ABLATIONS[name].rows_apart]
    if mixed:
        raise ValueError(
            f"the ablations {mixed} exchange features between the rows of a batch and cannot be played in "
            "shards; evaluate them with shards=1"
        )


def select_tasks(tasks: Sequence[TaskDescription], indices: Sequence[int] | None) -> list[TaskDescription]:
    """Return the tasks with the given indices, in the suite's order; all of them for None.

    Raises:
        ValueError: If an index does not exist; the message lists the tasks.
    """
    if indices is None:
        return list(tasks)
    unknown = sorted(set(indices) - {task.index for task in tasks})
    if unknown:
        known = ", ".join(f"{task.index} {task.name}" for task in tasks)
        raise ValueError(f"no tasks with index {unknown}; the suite has: {known}")
    return [task for task in tasks if task.index in set(indices)]


class _ProgressBar:
    """Episodes and the success so far, resumed episodes included."""

    def __init__(self, ablation: str, total: int, finished: Sequence[EpisodeResult]) -> None:
        self._successes = sum(result.success for result in finished)
        self._bar = tqdm(
            total=total, initial=len(finished), desc=f"ablation {ablation}", unit="ep", dynamic_ncols=True
        )

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count(self, result: EpisodeResult) -> None:
        """Count one more episode."""
        self._successes += result.success
        self._bar.set_postfix_str(f"success {self._successes}/{self._bar.n + 1}", refresh=False)
        self._bar.update()


def _result(ablation: str, end: FinishedEpisode) -> EpisodeResult:
    episode, outcome = asdict(end.episode), end.outcome
    del episode["initial_state"]
    return EpisodeResult(
        ablation=ablation,
        **episode,
        success=outcome["success"],
        length=outcome["length"],
        policy_calls=end.policy_calls,
        initial_hash=outcome["initial_hash"],
        final_hash=outcome["final_hash"],
    )


_SETTINGS = (
    "episodes_per_task",
    "seed",
    "num_envs",
    "processes",
    "videos",
    "video_frame_size",
    "latency_calls",
)


def launch(config: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate a checkpoint as configs/eval.yaml describes it.

    Args:
        config: The composed configuration as plain values; configs/eval.yaml explains each field.

    Returns:
        The content of summary.json.

    Raises:
        FileNotFoundError: If the checkpoint, or a file that an ablation needs, does not exist.
        ValueError: If a setting is wrong, the output folder holds something else, the policy does not fit
            the environment, or the server offers another checkpoint.
        PolicyUnavailableError: If there is no policy server at the address given.
        WorkerError: If a simulator failed.
    """
    environment = config["env"]
    tasks = resolve(config["environments"]["tasks"])(environment["suite"])
    settings = read_settings(config, tasks)
    factory = EnvironmentFactory(
        config["environments"]["make"], environment["frame_size"], environment["rendering"]
    )
    checkpoint = find_checkpoint(Path(config["checkpoint"]))
    require_intact(checkpoint)
    device = choose_device(config["device"])
    provenance = {
        "checkpoint": str(config["checkpoint"]),
        "checkpoint_sha256": checkpoint_fingerprint(checkpoint),
        "action_steps": config["action_steps"],
        "device": device,
        "frame_size": factory.frame_size,
        "rendering": factory.rendering,
    }
    warn_of_other_pictures(checkpoint, factory)
    shard = Shard(config["shard"], config["shards"])
    evaluation = Evaluation(settings, tasks, Path(config["output_dir"]), provenance, shard)
    left, total = evaluation.episodes_left()
    logger.info("%s: %d of %d episodes left to play", config["output_dir"], left, total)
    logger.info("loading %s on %s, and the environments of %s", checkpoint, device, settings.suite)
    with WorkerPool(factory, min(settings.processes, settings.num_envs)) as pool:
        evaluation.prepare(pool)
        policy = _policy(config, checkpoint, device)
        policies = {ablation: apply_ablation(ablation, policy, checkpoint) for ablation in settings.ablations}
        return evaluation.run(policies, pool)


def _policy(config: Mapping[str, Any], checkpoint: Path, device: str) -> ChunkPolicy:
    """Return the checkpoint's policy, in this process or on the server that the config names."""
    server, steps = config["server"], config["action_steps"]
    if server["url"] is None:
        return load_lerobot_policy(checkpoint, device=device, action_steps=steps)
    from vega_policy.deployment.client import RemotePolicy, ServerAddress

    token_file, ca_file = (
        None if server[name] is None else Path(server[name]) for name in ("token_file", "ca_file")
    )
    policy = RemotePolicy(ServerAddress(server["url"], token_file, ca_file), action_steps=steps)
    if policy.served.fingerprint != checkpoint_fingerprint(checkpoint):
        raise ValueError(
            f"{server['url']} serves the checkpoint {policy.served.fingerprint}, but {checkpoint} is "
            f"{checkpoint_fingerprint(checkpoint)}; serve the one that is to be evaluated"
        )
    return policy


def read_settings(config: Mapping[str, Any], suite_tasks: Sequence[TaskDescription]) -> EvaluationSettings:
    """Read the settings of an evaluation from a composed configuration.

    Args:
        config: Plain values; `ablation` is one name or a list of names.
        suite_tasks: All tasks of the suite: where all have official initial states, these are the default.
    """
    ablation, tasks, official = config["ablation"], config["tasks"], config["official_states"]
    if official is None:
        official = all(task.official_states for task in suite_tasks)
    return EvaluationSettings(
        suite=config["env"]["suite"],
        tasks=None if tasks is None else tuple(tasks),
        ablations=(ablation,) if isinstance(ablation, str) else tuple(ablation),
        official_states=official,
        **{name: config[name] for name in _SETTINGS},
    )


def warn_of_other_pictures(checkpoint: Path, factory: EnvironmentFactory) -> None:
    """Warn if the policy was trained on pictures of another size or rendering profile than it will be shown.

    What it was trained on is known where the run's folder and its dataset, collected here, are still there.

    Args:
        checkpoint: Folder of the checkpoint's `config.json`.
        factory: How environments are built.
    """
    run = checkpoint.parents[2] / "config.yaml"
    if checkpoint.name != PRETRAINED_MODEL_DIR or not run.is_file():
        return
    root = yaml.safe_load(run.read_text())["dataset"]["root"]
    collected = None if root is None else Path(root) / "meta" / "vega.json"
    if collected is None or not collected.is_file():
        return
    trained = json.loads(collected.read_text())["settings"]
    for name, shown in (("rendering", factory.rendering), ("frame_size", factory.frame_size)):
        if trained[name] != shown:
            logger.warning(
                "the policy was trained on frames with %s=%s, but is evaluated with %s=%s: such results "
                "say little about it. Set env.%s=%s, or render the demonstrations again "
                "(scripts/render_demos.py).",
                name,
                trained[name],
                name,
                shown,
                name,
                trained[name],
            )


def choose_device(device: str | None) -> str:
    """Return a torch device; None takes a GPU if there is one, else the CPU."""
    if device is not None:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
