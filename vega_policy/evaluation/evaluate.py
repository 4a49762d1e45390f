"""A whole evaluation: run the missing episodes, render videos, summarize, report."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import yaml
from lerobot.utils.constants import PRETRAINED_MODEL_DIR
from tqdm import tqdm

from vega_policy.checkpoints import check_checkpoint
from vega_policy.evaluation.ablations import ABLATIONS, apply_ablation
from vega_policy.evaluation.config import EvaluationSettings, read_settings
from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool
from vega_policy.evaluation.env_worker import resolve
from vega_policy.evaluation.episodes import (
    SUMMARY_FILE,
    Episode,
    EpisodeResult,
    EvaluationFolder,
    Shard,
    TaskDescription,
    env_of,
    plan_episodes,
    queue_episodes,
    select_tasks,
)
from vega_policy.evaluation.policies import (
    ChunkPolicy,
    checkpoint_fingerprint,
    choose_device,
    find_checkpoint,
    load_lerobot_policy,
)
from vega_policy.evaluation.report import choose_episodes, render_videos, summarize, write_report
from vega_policy.evaluation.rollout import FinishedEpisode, Rollout, single_call_seconds
from vega_policy.run_dir import write_json

logger = logging.getLogger(__name__)


class LoadPolicy(Protocol):
    """Loads the policy of a checkpoint folder, such as `load_lerobot_policy` or a connection to a server."""

    def __call__(self, folder: Path, *, device: str, action_steps: int | None) -> ChunkPolicy:
        """Return the policy."""
        ...


def evaluate_checkpoint(
    config: Mapping[str, Any], load_policy: LoadPolicy = load_lerobot_policy
) -> dict[str, Any]:
    """Evaluate a checkpoint and return the content of summary.json.

    Args:
        config: The composed configs/eval.yaml as plain values.
        load_policy: Returns the policy of the checkpoint.

    Raises:
        FileNotFoundError: If the checkpoint, or a file that an ablation needs, does not exist.
        ValueError: If a setting is wrong, the output folder holds something else, the checkpoint is damaged,
            or the policy does not fit the environment.
        WorkerError: If a simulator failed.
    """
    environment, functions = config["env"], config["environments"]
    tasks = resolve(functions["tasks"])(environment["suite"])
    settings = read_settings(config, tasks)
    factory = EnvironmentFactory(functions["make"], environment["frame_size"], environment["rendering"])
    checkpoint = find_checkpoint(Path(config["checkpoint"]))
    check_checkpoint(checkpoint)
    device = choose_device(config["device"])
    provenance = {
        "checkpoint": str(config["checkpoint"]),
        "checkpoint_sha256": checkpoint_fingerprint(checkpoint),
        "action_steps": config["action_steps"],
        "device": device,
        "frame_size": factory.frame_size,
        "rendering": factory.rendering,
    }
    warn_of_other_frames(checkpoint, factory)
    shard = Shard(config["shard"], config["shards"])
    evaluation = Evaluation(settings, tasks, Path(config["output_dir"]), provenance, shard)
    left, total = evaluation.count_episodes()
    logger.info("%s: %d of %d episodes left", config["output_dir"], left, total)
    logger.info("loading %s on %s, and the environments of %s", checkpoint, device, settings.suite)
    with WorkerPool(factory, min(settings.processes, settings.num_envs)) as pool:
        evaluation.prepare(pool)
        policy = load_policy(checkpoint, device=device, action_steps=config["action_steps"])
        policies = {ablation: apply_ablation(ablation, policy, checkpoint) for ablation in settings.ablations}
        return evaluation.run(policies, pool)


def warn_of_other_frames(checkpoint: Path, factory: EnvironmentFactory) -> None:
    """Warn if the policy was trained on frames of another size or rendering profile than it will receive.

    What it was trained on is known if the run's folder and its collected dataset are still there.
    """
    run = checkpoint.parents[2] / "config.yaml"
    if checkpoint.name != PRETRAINED_MODEL_DIR or not run.is_file():
        return
    root = yaml.safe_load(run.read_text())["dataset"]["root"]
    collected = None if root is None else Path(root) / "meta" / "vega.json"
    if collected is None or not collected.is_file():
        return
    trained = json.loads(collected.read_text())["settings"]
    for name in ("rendering", "frame_size"):
        now, then = getattr(factory, name), trained[name]
        if then != now:
            logger.warning(
                "the policy was trained on frames with %s=%s, but is evaluated with %s=%s: the results say "
                "little about it. Set env.%s=%s, or render the demonstrations again "
                "(scripts/render_demos.py).",
                *(name, then, name, now, name, then),
            )


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
        """Open or begin an evaluation; its folder stays locked until `run` returns.

        Args:
            settings: The settings.
            tasks: All tasks of the suite.
            folder: Output folder; may hold an unfinished evaluation with the same settings.
            provenance: What else decides the results (checkpoint, device, rendering, ...), as JSON values.
            shard: The part that is run here, in a folder of its own; None runs all.

        Raises:
            OtherRunError: If the folder holds something else.
            FolderInUseError: If another process evaluates into it.
            ValueError: If a task index does not exist, a number is out of range, or an ablation cannot be
                run in shards.
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
            _require_independent_rows(settings)
        self._groups = {task.name: task.group for task in tasks}
        path, decisive = self._shard.folder(folder), {**provenance, **settings.decisive()}
        self._folder = EvaluationFolder(path, decisive, kept_videos=settings.videos)
        if self._shard.count == 1:
            self._folder.gather_shards(settings.ablations[0])
        for ablation in settings.ablations:
            finished = len(self._folder.results(ablation))
            if not ABLATIONS[ablation].rows_independent and finished < len(self.episodes):
                self._folder.discard(ablation)
        self._started = time.perf_counter()

    def count_episodes(self) -> tuple[int, int]:
        """Return how many episodes are left to run here, over all ablations, and of how many."""
        num_envs, ablations = self.settings.num_envs, self.settings.ablations
        total = len(self.episodes)
        here = sum(self._shard.contains(env_of(number, total, num_envs)) for number in range(total))
        left = sum(len(queue) for ablation in ablations for queue in self._queues(ablation))
        return left, here * len(ablations)

    def prepare(self, pool: WorkerPool) -> None:
        """Start to build the environments that are needed first, while the caller loads the policy."""
        for ablation in self.settings.ablations:
            queues = self._queues(ablation)
            if any(queues):
                pool.open(render=ablation != "blind", keep_states=False)
                first = {env: queue[0] for env, queue in enumerate(queues) if queue}
                pool.build({env: (episode.suite, episode.task_index) for env, episode in first.items()})
                return

    def run(self, policies: Mapping[str, ChunkPolicy], pool: WorkerPool) -> dict[str, Any]:
        """Run every missing episode, write summary.json, videos and report.html, and return the summary.

        Args:
            policies: The policy by ablation, in the order of the settings.
            pool: Workers.

        Raises:
            ValueError: If the policies are not those of the settings' ablations.
        """
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
        finished, queues = self._folder.results(ablation), self._queues(ablation)
        if not any(queues):
            return
        progress = self._folder.progress
        is_main = ablation == self.settings.ablations[0]
        pool.open(
            render=policy.reads_frames,
            keep_states=is_main and self.settings.videos > 0,
            history=policy.description.history,
        )
        rollout = Rollout(policy, pool, call_seconds=progress.call_seconds.setdefault(ablation, []))
        successes = sum(result.success for result in finished)
        with tqdm(
            total=len(self.episodes),
            initial=len(finished),
            desc=f"ablation {ablation}",
            unit="ep",
            dynamic_ncols=True,
        ) as bar:
            for end in rollout.run(queues):
                result = _result(ablation, end)
                if is_main:
                    self._folder.trajectories.offer(result, end.outcome["states"])
                    if not progress.single_call_seconds and rollout.last_batch is not None:
                        calls = self.settings.latency_calls
                        progress.single_call_seconds = single_call_seconds(policy, rollout.last_batch, calls)
                # States and durations first: an episode on record is never run again.
                self._record_seconds()
                self._folder.add([result])
                successes += result.success
                bar.set_postfix_str(f"success {successes}/{bar.n + 1}", refresh=False)
                bar.update()

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

    def _queues(self, ablation: str) -> list[deque[Episode]]:
        finished = {result.key for result in self._folder.results(ablation)}
        queues = queue_episodes(self.episodes, self.settings.num_envs, finished)
        return [queue if self._shard.contains(env) else deque() for env, queue in enumerate(queues)]

    def _record_seconds(self) -> None:
        """Add the time since the last call to the recorded cost."""
        now = time.perf_counter()
        self._folder.add_seconds(now - self._started)
        self._started = now


def _require_independent_rows(settings: EvaluationSettings) -> None:
    mixed = [name for name in settings.ablations if not ABLATIONS[name].rows_independent]
    if mixed:
        raise ValueError(
            f"the ablations {mixed} exchange features between the rows of a batch and cannot be run in "
            "shards; evaluate them with shards=1"
        )


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
