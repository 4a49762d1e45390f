"""An evaluation in several parts: shards equal the whole, one writer a folder, a kill costs nothing."""

from dataclasses import replace

import numpy as np
import pytest

import envs
from tests import point_world as world
from tests.evaluations import FACTORY, MEAN_FRAME, GoalSeeker, evaluate, settings
from vega_policy.evaluation.ablations import BlindPolicy
from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool
from vega_policy.evaluation.episodes import Shard, read_episodes
from vega_policy.evaluation.evaluate import Evaluation, EvaluationSettings
from vega_policy.evaluation.policies import PolicyDescription
from vega_policy.evaluation.report import format_summary
from vega_policy.run_dir import FolderInUseError, OtherRunError

PROVENANCE = {"checkpoint": "seeker"}


def run(folder, shard=None, **changes):
    chosen = settings(ablations=("none", "blind"), **changes)
    evaluation = Evaluation(chosen, world.tasks(chosen.suite), folder, PROVENANCE, shard)
    policy = GoalSeeker()
    means = dict.fromkeys(policy.description.cameras, MEAN_FRAME)
    with WorkerPool(FACTORY, 1) as pool:
        return evaluation.run({"none": policy, "blind": BlindPolicy(policy, means)}, pool)


@pytest.mark.slow
def test_shards_gathered_are_the_evaluation_in_one_piece(tmp_path):
    whole = run(tmp_path / "whole", videos=1)
    for index in (0, 1):
        part = run(tmp_path / "parts", Shard(index, 2), videos=1)
        assert 0 < part["episodes"] < whole["episodes"]
    gathered = run(tmp_path / "parts", videos=1)
    assert read_episodes(tmp_path / "parts") == read_episodes(tmp_path / "whole")
    assert gathered["ablations"] == whole["ablations"]
    videos = {path.name for path in (tmp_path / "whole" / "videos").iterdir()}
    assert {path.name for path in (tmp_path / "parts" / "videos").iterdir()} == videos


def test_both_averages_of_a_grouped_suite_are_reported(tmp_path):
    chosen = settings(suite="two_points", episodes_per_task=6)
    near, far = world.tasks("two_points")
    tasks = [replace(near, group="easy"), replace(far, group="hard")]
    evaluation = Evaluation(chosen, tasks, tmp_path / "run", PROVENANCE)
    with WorkerPool(FACTORY, 1) as pool:
        summary = evaluation.run({"none": GoalSeeker()}, pool)
    numbers = summary["ablations"]["none"]
    rates = [row["success_rate"] for row in numbers["tasks"].values()]
    assert numbers["mean_of_tasks"] == numbers["mean_of_groups"] == sum(rates) / 2
    assert "mean of difficulty groups" in format_summary(summary)
    assert "mean of difficulty groups" in (tmp_path / "run" / "report.html").read_text()


def test_shards_of_other_settings_are_not_gathered(tmp_path):
    run(tmp_path / "parts", Shard(0, 2))
    refused = r"episodes_per_task \(stored: 7, received: 3\)\. Give .* to resume it, or .*output_dir=FOLDER"
    with pytest.raises(OtherRunError, match=refused):
        run(tmp_path / "parts", episodes_per_task=3)


def test_a_shard_that_does_not_exist_and_an_ablation_across_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected shard in \[0, 1\] with shards=2, got 2"):
        Shard(2, 2)
    chosen = settings(ablations=("prior_batch",))
    with pytest.raises(ValueError, match=r"\['prior_batch'\].*cannot be run in shards"):
        Evaluation(chosen, world.tasks(chosen.suite), tmp_path, PROVENANCE, Shard(0, 2))


def test_two_evaluations_do_not_write_into_one_folder(tmp_path):
    chosen = settings()
    holder = Evaluation(chosen, world.tasks(chosen.suite), tmp_path / "run", PROVENANCE)
    with pytest.raises(FolderInUseError, match=r"run is in use by process"):
        evaluate(tmp_path / "run")
    with WorkerPool(FACTORY, 1) as pool:
        holder.run({"none": GoalSeeker()}, pool)
    evaluate(tmp_path / "run")


def test_an_ablation_across_rows_runs_from_its_beginning_after_an_interruption(tmp_path):
    class Interrupted(GoalSeeker):
        def chunk(self, batch, noise):
            if len(self.batches) == 6:
                raise KeyboardInterrupt
            return super().chunk(batch, noise)

    chosen = settings(ablations=("prior_batch",))
    tasks = world.tasks(chosen.suite)
    with WorkerPool(FACTORY, 1) as pool:
        evaluation = Evaluation(chosen, tasks, tmp_path / "run", PROVENANCE)
        with pytest.raises(KeyboardInterrupt):
            evaluation.run({"prior_batch": Interrupted()}, pool)
        assert 0 < len(read_episodes(tmp_path / "run")) < 14
        again = GoalSeeker()
        Evaluation(chosen, tasks, tmp_path / "run", PROVENANCE).run({"prior_batch": again}, pool)
        whole = GoalSeeker()
        Evaluation(chosen, tasks, tmp_path / "whole", PROVENANCE).run({"prior_batch": whole}, pool)
    calls = [sum(len(batch.state) == 4 for batch in seeker.batches) for seeker in (again, whole)]
    assert calls[0] == calls[1]  # those with one row time the policy
    assert read_episodes(tmp_path / "run") == read_episodes(tmp_path / "whole")


CAMERAS = ("observation.images.image", "observation.images.image2")


class Fidgeter:
    """Moves at random, a little differently with each frame: a stand-in whose episodes all differ."""

    reads_frames = True
    noise_shape = (8, 7)
    description = PolicyDescription("fidgeter", "none", CAMERAS, 8, 7, 8)

    def reset(self, instructions=()):
        pass

    def chunk(self, batch, noise):
        brightness = sum(batch.frames[camera].mean(axis=(1, 2, 3)) for camera in CAMERAS) / 510
        return np.clip(noise * brightness[:, None, None], -1, 1).astype(np.float32)


def evaluate_robosuite(folder, processes, interrupt_after=None):
    settings = EvaluationSettings(
        "lift_wide", episodes_per_task=4, batch_size=2, processes=processes, videos=0, latency_calls=1
    )
    evaluation = Evaluation(settings, envs.tasks("lift_wide"), folder, {})
    policy = Fidgeter()
    if interrupt_after is not None:
        chunk, served = policy.chunk, set()

        def interrupted(batch, noise):
            served.update(row.tobytes() for row in noise)  # padding rows are all alike
            if len(served) > interrupt_after:
                raise KeyboardInterrupt
            return chunk(batch, noise)

        policy.chunk = interrupted
    with WorkerPool(EnvironmentFactory("envs.make", 64, "fast"), processes) as pool:
        evaluation.run({"none": policy}, pool)
    return read_episodes(folder)


@pytest.mark.slow
def test_robosuite_episodes_depend_on_neither_processes_nor_interruptions(tmp_path):
    alone = evaluate_robosuite(tmp_path / "one", 1)
    assert len({result.final_hash for result in alone}) == 4
    assert evaluate_robosuite(tmp_path / "two", 2) == alone
    with pytest.raises(KeyboardInterrupt):
        # 13 chunks an episode: with two at a time, the third has begun and the fourth is not through
        evaluate_robosuite(tmp_path / "killed", 2, interrupt_after=3 * 13)
    assert 0 < len(read_episodes(tmp_path / "killed")) < 4
    assert evaluate_robosuite(tmp_path / "killed", 1) == alone
