import json
import os
import runpy
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from tests import point_world as world
from tests.evaluations import DELAYED, FACTORY, MEAN_FRAME, GoalSeeker, evaluate, settings
from vega_policy.evaluation.ablations import apply_ablation
from vega_policy.evaluation.compare import UnpairedRunsError, compare_runs, comparison_table
from vega_policy.evaluation.env_pool import WorkerError, WorkerPool
from vega_policy.evaluation.env_worker import state_hash
from vega_policy.evaluation.episodes import (
    FIRST_SEED,
    Episode,
    plan_episodes,
    read_episodes,
)
from vega_policy.evaluation.evaluate import Evaluation, evaluation_folders
from vega_policy.evaluation.policies import IncompatiblePolicyError, ObservationBatch, PolicyDescription
from vega_policy.evaluation.report import format_summary, list_files
from vega_policy.evaluation.rollout import Schedule, episode_noise
from vega_policy.evaluation.stats import wilson_interval
from vega_policy.run_dir import OtherRunError


def run_alone(episode: Episode, policy):
    """Return success, length, calls and last state of an episode run without the harness."""
    env = world.make(episode.suite, episode.task_index, frame_size=32, rendering="fast", render=True)
    observation, _ = env.reset(seed=episode.seed)
    for call in range(100):
        frames = {world.CAMERA: observation["pixels"]["image"][None]}
        noise = episode_noise(episode.seed, call, policy.noise_shape)[None]
        batch = observe(frames, observation["agent_pos"][None])
        for step, action in enumerate(policy.chunk(batch, noise)[0, : policy.description.action_steps]):
            _, truncated = env.step_blindly(action)
            if env.reached() or truncated:
                length = call * policy.description.action_steps + step + 1
                return env.reached(), length, call + 1, state_hash(env.simulator_state())
        observation = env.observe()
    raise AssertionError("the episode never ended")


def observe(frames, state):
    return ObservationBatch(frames, state, ["go"] * len(state))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted evaluation in one process, with blind ablation and videos."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    summary = evaluate(folder, ablations=("none", "blind"), videos=2)
    return folder, summary


def test_every_episode_ends_as_it_does_in_a_plain_loop(finished):
    results = [result for result in read_episodes(finished[0]) if result.ablation == "none"]
    plan = plan_episodes(world.tasks("two_points"), 7, 0, official_states=False)
    assert [result.key for result in results] == [episode.key for episode in plan]
    for result, episode in zip(results, plan, strict=True):
        outcome = (result.success, result.length, result.policy_calls, result.final_hash)
        assert outcome == run_alone(episode, GoalSeeker())
    assert 0 < sum(result.success for result in results) < len(results)  # or the test would compare little


class RowSeeker(GoalSeeker):
    """Acts a little differently in each row of a batch, as a kernel may, and fills padding rows with NaN."""

    def chunk(self, batch, noise):
        chunk = super().chunk(batch, noise) + np.float32(0.01) * np.arange(len(noise))[:, None, None]
        chunk[sorted(batch.idle)] = np.nan
        return chunk.astype(np.float32)


def test_the_states_of_all_episodes_are_kept_if_asked_for(tmp_path):
    evaluate(tmp_path / "run", keep_states=True, videos=1)
    assert len(list((tmp_path / "run" / "videos").glob("*.mp4"))) == 2
    for result in read_episodes(tmp_path / "run"):
        (path,) = (tmp_path / "run" / "trajectories").glob(
            f"{result.index:05d}_{result.task_index:03d}_*.npy"
        )
        states = np.load(path)
        assert len(states) == result.length + 1
        assert [state_hash(states[0]), state_hash(states[-1])] == [result.initial_hash, result.final_hash]


def test_results_depend_on_neither_processes_nor_timing_nor_padding(tmp_path):
    evaluate(tmp_path / "one", policy=RowSeeker())
    for processes in (2, 5):
        evaluate(tmp_path / f"{processes}", policy=RowSeeker(), processes=processes, factory=DELAYED)
        assert read_episodes(tmp_path / f"{processes}") == read_episodes(tmp_path / "one")
    evaluate(tmp_path / "other", policy=RowSeeker(), batch_size=3)
    assert read_episodes(tmp_path / "other") != read_episodes(tmp_path / "one")  # so that rows matter here


def test_every_ready_simulator_is_in_the_next_batch_and_none_waits_for_the_others(tmp_path):
    policy = GoalSeeker()
    evaluate(tmp_path / "run", policy=policy, processes=4, factory=DELAYED)
    filled = {len(batch.active_rows()) for batch in policy.batches if len(batch.state) == 4}
    assert min(filled) < 4
    rows = sum(len(batch.active_rows()) for batch in policy.batches if len(batch.state) == 4)
    assert rows == sum(result.policy_calls for result in read_episodes(tmp_path / "run"))


def test_a_policy_that_mixes_rows_waits_for_all_and_is_repeatable(tmp_path):
    class Mixer(GoalSeeker):
        def chunk(self, batch, noise):
            return super().chunk(batch, noise) + batch.state.mean()

    for name in ("one", "two"):
        chosen = settings(ablations=("prior_batch",), processes=3)
        evaluation = Evaluation(chosen, world.tasks("two_points"), tmp_path / name, {})
        with WorkerPool(DELAYED, 3) as pool:
            evaluation.run({"prior_batch": Mixer()}, pool)
    assert read_episodes(tmp_path / "one") == read_episodes(tmp_path / "two")


@pytest.mark.parametrize("calls", [0, 12])
def test_an_interrupted_and_resumed_evaluation_equals_an_uninterrupted_one(finished, tmp_path, calls):
    class Interrupted(GoalSeeker):
        def chunk(self, batch, noise):
            if len(self.batches) == calls:
                raise KeyboardInterrupt
            return super().chunk(batch, noise)

    chosen = {"ablations": ("none", "blind"), "videos": 2 if calls == 12 else 0}
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "run", policy=Interrupted(), processes=2, **chosen)
    interrupted_late = (tmp_path / "run" / "episodes.parquet").is_file()
    assert interrupted_late == (calls == 12)
    if interrupted_late:
        assert 0 < len(read_episodes(tmp_path / "run")) < 14
    evaluate(tmp_path / "run", **chosen)
    assert read_episodes(tmp_path / "run") == read_episodes(finished[0])
    if calls == 12:
        videos = sorted(path.name for path in (finished[0] / "videos").iterdir())
        assert sorted(path.name for path in (tmp_path / "run" / "videos").iterdir()) == videos


def test_a_killed_worker_is_reported_and_its_evaluation_goes_on(finished, tmp_path):
    chosen = settings(ablations=("none", "blind"))
    evaluation = Evaluation(chosen, world.tasks("two_points"), tmp_path / "run", {"checkpoint": "seeker"})
    with WorkerPool(FACTORY, 2) as pool:

        class Killer(GoalSeeker):
            def chunk(self, batch, noise):
                if len(self.batches) == 6:
                    os.kill(pool.pids[1], signal.SIGKILL)
                return super().chunk(batch, noise)

        with pytest.raises(
            WorkerError, match=r"process 1 died .* task \d of two_points, seed 100000\d \(exit code -9"
        ):
            evaluation.run({"none": Killer(), "blind": Killer()}, pool)
    evaluate(tmp_path / "run", processes=2, ablations=("none", "blind"))
    assert read_episodes(tmp_path / "run") == read_episodes(finished[0])


def test_a_second_start_of_a_finished_evaluation_runs_nothing(finished, tmp_path):
    class NeverCalled(GoalSeeker):
        def chunk(self, batch, noise):
            raise AssertionError("the policy was called again")

    folder, summary = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    again = evaluate(folder, policy=NeverCalled(), ablations=("none", "blind"), videos=2)
    cost = {"seconds_total": 0, "latency": 0}
    assert {**again, **cost} == {**summary, **cost}
    assert again["latency"] == summary["latency"]
    spent = [json.loads((run / "progress.json").read_text())["seconds"] for run in (finished[0], folder)]
    assert spent[1] > spent[0]  # the summary tells milliseconds, and a second start may take less than one
    assert again["seconds_total"] == round(spent[1], 3)


def test_nothing_is_a_success_that_the_simulator_does_not_call_success(tmp_path):
    # The point reaches its goal, but this simulator never says so.
    summary = evaluate(tmp_path / "run", suite="stubborn", episodes_per_task=4)
    assert summary["success_rate"] == 0
    assert {result.length for result in read_episodes(tmp_path / "run")} == {world.HORIZON}


def test_blind_receives_nothing_but_the_mean_frame_and_renders_nothing(tmp_path):
    policy = GoalSeeker()
    summary = evaluate(tmp_path / "run", policy=policy, ablations=("blind",), episodes_per_task=3)
    assert policy.batches
    for batch in policy.batches:
        assert batch.constant_frames
        for frame in batch.frames[world.CAMERA]:
            np.testing.assert_array_equal(frame, MEAN_FRAME)
    assert summary["ablation"] == "blind"
    assert summary["blind_success_rate"] == summary["success_rate"]


def test_a_chunk_is_executed_as_predicted(tmp_path):
    class Counting(GoalSeeker):
        """Walks along a path that no simulator step hides: action k of the episode is k/100."""

        noise_shape = None

        def chunk(self, batch, noise):
            start = 3 * len(self.batches)
            super().chunk(batch, np.zeros((len(batch.state), 6, 2), np.float32))
            return np.broadcast_to(np.arange(start, start + 6, dtype=np.float32)[:, None] / 100, (2, 6, 2))

    policy = Counting(action_steps=3)
    evaluate(tmp_path / "run", policy=policy, suite="stubborn", episodes_per_task=1, batch_size=2)
    first, *later = (batch.state[0] for batch in policy.batches[:3])
    for call, state in enumerate(later, start=1):
        executed = np.arange(3 * call) / 100
        np.testing.assert_allclose(state, first + world.STEP * executed.sum(), atol=1e-5)


@pytest.mark.parametrize("processes", [1, 3])
def test_an_episode_keeps_its_row_and_padding_rows_are_zero(tmp_path, processes):
    policy = GoalSeeker()
    evaluate(tmp_path / "run", policy=policy, processes=processes, suite="near", episodes_per_task=6)
    batches = [(batch, noise) for batch, noise in zip(policy.batches, policy.noises, strict=True)][:-4]
    rows = {episode_noise(FIRST_SEED + number, 0, (6, 2)).tobytes(): number % 4 for number in range(6)}
    begun = []
    for batch, noise in batches:
        assert batch.state.shape == (4, 2)
        for row in batch.idle:
            assert not batch.state[row].any()
            assert not batch.frames[world.CAMERA][row].any()
            assert not noise[row].any()
            assert batch.instructions[row] == ""
        begun += [(rows[noise[row].tobytes()], row) for row in range(4) if noise[row].tobytes() in rows]
    assert len(begun) == 6
    assert all(row == expected for expected, row in begun)


def test_simulators_share_the_tasks_and_stay_with_one_for_as_long_as_they_can():
    plan = plan_episodes(world.tasks("two_points"), 3, 0, official_states=False)
    schedule = Schedule(plan, batch_size=4)
    first = [schedule.take(), schedule.take()]
    assert [episode.task for episode in first] == ["near", "far"]
    taken = [first[0]]
    while (episode := schedule.take(taken[-1], [first[1]])) is not None:
        taken.append(episode)
    assert [episode.task for episode in taken] == ["near", "near", "near", "far", "far"]
    assert {*taken, first[1]} == set(plan)


def test_episodes_whose_row_is_free_begin_first():
    plan = plan_episodes(world.tasks("near"), 4, 0, official_states=False)
    schedule = Schedule(plan, batch_size=2)
    first = schedule.take()
    assert [first.index, schedule.take(None, [first]).index, schedule.take(None, [plan[1]]).index] == [
        0,
        1,
        2,
    ]


def test_different_seeds_share_no_episode_and_official_states_are_passed_on():
    tasks = [replace(task, official_states=10_000) for task in world.tasks("near")]
    first, second = (plan_episodes(tasks, 10_000, seed, official_states=True) for seed in (0, 1))
    assert not {episode.seed for episode in first} & {episode.seed for episode in second}
    assert first[0].seed == FIRST_SEED
    assert first[49].spec()["initial_state"] == 49


def test_official_states_that_do_not_exist_are_refused():
    (near,) = world.tasks("near")
    with pytest.raises(ValueError, match=r"near.*has no official initial states; set official_states=false"):
        plan_episodes([near], 1, 0, official_states=True)
    with pytest.raises(ValueError, match="has 50 official initial states, but episodes_per_task is 51"):
        plan_episodes([replace(near, official_states=50)], 51, 0, official_states=True)


def test_evaluation_seeds_begin_where_the_environments_say():
    base = pytest.importorskip("envs.base")
    assert base.EVALUATION_SEED == FIRST_SEED
    assert FIRST_SEED not in base.DEMONSTRATION_SEEDS


def test_the_summary_counts_what_the_episodes_say(finished):
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    rows = pyarrow.parquet.read_table(folder / "episodes.parquet").to_pylist()
    for ablation in ("none", "blind"):
        successes = [row["success"] for row in rows if row["ablation"] == ablation]
        numbers = summary["ablations"][ablation]
        assert (numbers["successes"], numbers["episodes"]) == (sum(successes), 14)
        interval = wilson_interval(sum(successes), 14)
        assert (numbers["ci_low"], numbers["ci_high"]) == (interval.low, interval.high)
        by_task = [row["success"] for row in rows if (row["ablation"], row["task"]) == (ablation, "far")]
        assert numbers["tasks"]["far"]["success_rate"] == sum(by_task) / 7
    assert summary["success_rate"] == summary["ablations"]["none"]["success_rate"]
    assert summary["blind_success_rate"] == summary["ablations"]["blind"]["success_rate"]
    assert summary["blind_success_rate"] < summary["success_rate"]
    assert {"ci_low", "ci_high", "prior", "seconds_total", "episodes"} <= summary.keys()
    assert summary["latency"]["batch_size"] == 4
    assert "far" in format_summary(summary)


def test_videos_show_the_whole_episode_and_the_page_links_what_exists(finished):
    folder, _ = finished
    page = (folder / "report.html").read_text()
    videos = list((folder / "videos").glob("*.mp4"))
    assert len(videos) == 4
    assert sum("success" in video.name for video in videos) == 2
    lengths = {(r.task, r.index): r.length for r in read_episodes(folder) if r.ablation == "none"}
    for video in videos:
        assert f"videos/{video.name}" in page
        assert f"videos/{video.with_suffix('.png').name}" in page
        assert video.with_suffix(".png").is_file()
        _, task, index = video.stem.split("_")
        with av.open(video) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            frames = sum(1 for _ in container.decode(stream))
        assert frames == lengths[task, int(index)] + 1
    assert "blind" in page
    assert "McNemar" in page


def test_report_videos_and_episodes_are_named_where_they_are(finished, tmp_path):
    folder, _ = finished
    named = [line.split(": ") for line in list_files(folder).splitlines()]
    assert named == [
        ["report", f"{folder}/report.html"],
        ["videos", f"{folder}/videos"],
        ["episodes", f"{folder}/episodes.parquet"],
    ]
    assert list_files(tmp_path) == ""


def test_folders_of_suites_perturbations_and_shards_are_named():
    env, parts = {"suite": ["a", "b"], "perturbation": ["none"]}, {"shard": 1, "shards": 2}
    config = {"env": env, "output_dir": "eval", "shard": 0, "shards": 1}
    assert evaluation_folders(config) == {f"{suite}/none": Path(f"eval/{suite}/none") for suite in "ab"}
    config["env"] = {"suite": "a", "perturbation": "none"}
    assert evaluation_folders(config | parts) == {"a": Path("eval/shards/1_of_2")}


def test_other_settings_in_the_same_folder_are_refused_by_name(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(OtherRunError, match=r"seed \(stored: 0, received: 5\)") as refusal:
        evaluate(folder, ablations=("none", "blind"), videos=2, seed=5, provenance={"checkpoint": "other"})
    assert "checkpoint (stored: 'seeker', received: 'other')" in str(refusal.value)
    assert "batch_size" not in str(refusal.value)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OtherRunError, match="expected an empty or new folder, found notes"):
        evaluate(tmp_path)


def test_an_error_of_the_simulator_reaches_the_user(tmp_path):
    with pytest.raises(WorkerError, match="the solver diverged"):
        evaluate(tmp_path / "run", suite="crash")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": ("observation.images.wrist",)}, r"images\.wrist.*images\.image"),
        ({"state_size": 8}, "state of 8 values.*offers 2"),
        ({"action_size": 7}, "actions of 7 values.*takes 2"),
    ],
)
def test_a_policy_that_does_not_fit_the_environment_is_refused(tmp_path, change, message):
    policy = GoalSeeker()
    policy.description = PolicyDescription(**{**vars(policy.description), **change})
    with pytest.raises(IncompatiblePolicyError, match=message):
        evaluate(tmp_path / "run", policy=policy)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda chunk: chunk[:, :3], r"at least 4, 2\], got \[4, 3, 2\]"),
        (lambda chunk: chunk * np.nan, r"finite actions, .* rows \[0\]"),
    ],
)
def test_a_bad_chunk_is_refused(tmp_path, spoil, message):
    class Bad(GoalSeeker):
        def chunk(self, batch, noise):
            return spoil(super().chunk(batch, noise))

    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "run", policy=Bad())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ablations": ("blnd",)}, "Did you mean 'blind'"),
        ({"ablations": ()}, "one or more"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"tasks": (0, 4)}, r"index \[4\].*0 near, 1 far"),
        ({"seed": -1}, "seed of at least 0"),
        ({"episodes_per_task": 0}, "episodes_per_task in"),
    ],
)
def test_bad_settings_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "run", **change)


def test_the_blind_ablation_reads_the_mean_frames_of_the_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mean_frames\.safetensors"):
        apply_ablation("blind", GoalSeeker(), tmp_path)
    mean = np.random.default_rng(0).random((3, 4, 5), np.float32)
    save_file({"observation.images.other": mean}, tmp_path / "mean_frames.safetensors")
    with pytest.raises(ValueError, match=r"no mean frame for .*images\.image.*images\.other"):
        apply_ablation("blind", GoalSeeker(), tmp_path)
    save_file({world.CAMERA: mean}, tmp_path / "mean_frames.safetensors")
    seeker = GoalSeeker()
    batch = observe({}, np.zeros((2, 2), np.float32))
    apply_ablation("blind", seeker, tmp_path).chunk(batch, np.zeros((2, 6, 2), np.float32))
    frames = seeker.batches[0].frames[world.CAMERA]
    assert frames.shape == (2, 4, 5, 3)
    np.testing.assert_allclose(frames[1] / 255, mean.transpose(1, 2, 0), atol=0.5 / 255 + 1e-6)
    save_file({world.CAMERA: mean * 255}, tmp_path / "mean_frames.safetensors")
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        apply_ablation("blind", GoalSeeker(), tmp_path)


def test_a_comparison_pairs_the_same_episodes(finished, tmp_path):
    folder, summary = finished
    with pytest.raises(ValueError, match="one folder under one ablation"):
        compare_runs(folder, folder)
    against_blind = compare_runs(folder, folder, second_ablation="blind")
    assert against_blind["all"]["difference"] == pytest.approx(
        summary["success_rate"] - summary["blind_success_rate"]
    )
    assert {"near", "far"} <= against_blind.keys()
    assert "far" in comparison_table(against_blind)
    with pytest.raises(UnpairedRunsError, match=r"under the ablation 'zero'.*blind"):
        compare_runs(folder, folder, second_ablation="zero")


def test_runs_of_other_episodes_are_not_compared(finished, tmp_path):
    evaluate(tmp_path / "seed", seed=1, episodes_per_task=7)
    with pytest.raises(UnpairedRunsError, match="did not start alike"):
        compare_runs(finished[0], tmp_path / "seed")
    evaluate(tmp_path / "few", tasks=(1,))
    with pytest.raises(UnpairedRunsError, match="7 only in the first"):
        compare_runs(finished[0], tmp_path / "few")
    with pytest.raises(FileNotFoundError, match=r"nothing is no folder; evaluate first"):
        compare_runs(finished[0], Path(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no evaluation"):
        compare_runs(finished[0], tmp_path / "empty")


def test_the_script_ends_a_mistake_in_one_line(tmp_path, monkeypatch):
    script = Path(__file__).resolve().parents[2] / "scripts" / "eval_policy.py"
    arguments = [f"checkpoint={tmp_path / 'none'}", f"output_dir={tmp_path / 'eval'}"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as ended:  # a process prints such a code to stderr and returns 1
        runpy.run_path(str(script), run_name="__main__")
    assert isinstance(ended.value.code, str)
    assert str(tmp_path / "none") in ended.value.code
    assert "\n" not in ended.value.code
