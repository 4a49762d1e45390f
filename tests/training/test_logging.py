"""Outputs of a run: curves, videos, closed-loop success, model card and provenance."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vega_policy
from tests.evaluations import evaluation_config
from tests.synthetic_dataset import CAMERAS, write_dataset
from tests.training_runs import assert_bitwise_equal, tiny_policy, tiny_run
from vega_policy.checkpoints import add_scores, checkpoint_path, find_damage, read_scores
from vega_policy.evaluation.episodes import read_episodes
from vega_policy.evaluation.evaluate import evaluate_checkpoint
from vega_policy.training.checkpoint import FREE_TO_CHANGE, export_policy
from vega_policy.training.config import EnvironmentConfig, SimulationConfig, TrackerConfig, encode
from vega_policy.training.logging import complete_card, model_card
from vega_policy.training.train import train

WORLD = "tests.point_world"


def simulation(every):
    return SimulationConfig(
        every=every,
        env=EnvironmentConfig(suite="near", frame_size=32),
        episodes_per_task=3,
        make=f"{WORLD}.make",
        tasks=f"{WORLD}.tasks",
    )


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A dataset with the sizes of the point world: one camera, two state values, two action values."""
    return write_dataset(
        tmp_path_factory.mktemp("points") / "data",
        lengths=(6, 5, 4),
        frame_shapes=((32, 32),),
        cameras=CAMERAS[:1],
        state_width=2,
        action_width=2,
    )


@pytest.fixture(scope="module")
def watched(points, tmp_path_factory):
    """A run with held-out episodes, evaluated in closed loop after every second step."""
    output = tmp_path_factory.mktemp("runs") / "watched"
    train(tiny_run(points, output, simulation=simulation(2), dataset={"held_out": 0.3}))
    return output


def test_success_is_what_the_simulator_says_and_reaches_scores_and_log(watched):
    scores = read_scores(watched)
    assert sorted(scores) == [2, 4]
    for step, row in scores.items():
        episodes = read_episodes(watched / "simulation" / f"{step:06d}" / "0")
        assert [episode.seed for episode in episodes] == [1_990_000, 1_990_001, 1_990_002]
        assert row["success"] == sum(episode.success for episode in episodes) / 3
        assert row["episodes"] == 3
        assert {"held_out_loss", "held_out_action_error"} <= row.keys()
    logged = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    assert [line["success"] for line in logged if "success" in line] == [
        scores[2]["success"],
        scores[4]["success"],
    ]


def test_evaluation_changes_no_bit_of_the_training(points, watched, tmp_path):
    silent = train(tiny_run(points, tmp_path / "silent", dataset={"held_out": 0.3}))
    assert_bitwise_equal(silent, checkpoint_path(watched, 4))


def test_curves_and_videos_are_on_tensorboard(watched):
    board = EventAccumulator(str(watched / "tensorboard")).Reload()
    curves = set(board.Tags()["scalars"])
    assert {"train/loss", "train/gate/image", "held_out/held_out_loss", "simulation/success"} <= curves
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    (video,) = {tag for tag in board.Tags()["images"] if tag.startswith("simulation/")}
    assert board.Images(video)[0].encoded_image_string.startswith(b"GIF89a")


@pytest.mark.slow
def test_a_kill_between_saving_and_evaluating_loses_no_score(points, watched, tmp_path):
    output = tmp_path / "run"
    train(tiny_run(points, output, dataset={"held_out": 0.3}, stop_after=2))
    assert "success" not in read_scores(output)[2]
    train(tiny_run(points, output, dataset={"held_out": 0.3}, simulation=simulation(2), resume=True))
    assert read_scores(output)[2]["success"] == read_scores(watched)[2]["success"]


def test_the_action_error_is_in_the_datasets_units(watched):
    """A policy that knows nothing is off by about the spread of the actions, which lie in [-1, 1]."""
    error = read_scores(watched)[4]["held_out_action_error"]
    assert 0.2 < error < 2.0


def test_a_card_says_what_was_learned_from_how_and_what_was_measured(watched):
    card = ModelCard.load(checkpoint_path(watched, 4) / "pretrained_model" / "README.md")
    assert card.data.datasets == ["tests/synthetic"]
    assert card.data.library_name == "lerobot"
    for part in ("4 of 4, seed 3", "random, layer", "fusion | token_gate", "loss on held-out episodes | "):
        assert part in card.text
    assert 'path = "FOLDER/pretrained_model"' in card.text
    assert re.search(r"`observation` holds `observation\..+`observation\.state`.* and `task`", card.text)


def test_a_card_without_a_prior_claims_none(points, tmp_path):
    config = tiny_run(points, tmp_path, policy=tiny_policy())
    cards = []
    for prior in (config.vega.prior, replace(config.vega.prior, name="none")):
        vega = replace(config.vega, prior=prior)
        cards.append(model_card(config, vega, 4, {}, "8 demonstrations").text)
    for claim in ("VEGA-3D", "prior's weights", "fusion |"):
        assert [claim in card for card in cards] == [True, False]
    assert "| prior | none |" in cards[1]
    assert "with a semantic image encoder as its observation encoder, without a video" in cards[1]


def test_a_card_of_a_run_from_a_checkpoint_names_the_prior_that_was_read(points, tmp_path):
    def tiny(name, **policy):
        train(tiny_run(points, tmp_path / name, steps=1, policy=tiny_policy(**policy)))
        return checkpoint_path(tmp_path / name, 1) / "pretrained_model"

    first = tiny("first")
    again = tiny("again", pretrained_path=first)
    rows = [re.search(r"\| prior \| .*", (one / "README.md").read_text()).group() for one in (first, again)]
    assert rows[0] == rows[1]
    assert "None" not in rows[0]


def test_a_card_without_a_measurement_says_so(finished):
    card = ModelCard.load(checkpoint_path(finished, 4) / "pretrained_model" / "README.md")
    assert "Nothing was measured during training" in card.text


def evaluate(checkpoint, output):
    """Evaluate two episodes in the point world."""
    places = (f"environments.make={WORLD}.make", "env.suite=near", "episodes_per_task=2", "processes=1")
    return evaluate_checkpoint(evaluation_config(checkpoint, output, *places))["near"]


def test_a_policy_is_exported_evaluated_by_name_and_exported_again_with_what_it_reached(
    watched, tmp_path, monkeypatch
):
    monkeypatch.setattr(vega_policy, "PACKAGE", tmp_path / "vega_policy")
    (tmp_path / "assets" / "policies").mkdir(parents=True)
    first, second = (tmp_path / "assets" / "policies" / name for name in ("points", "again"))
    source = checkpoint_path(watched, 4) / "pretrained_model"
    export_policy(source, first, complete_card(source, []))
    summary = evaluate("points", tmp_path / "evaluation")
    export_policy(first, second, complete_card(first, [tmp_path / "evaluation"]))
    assert find_damage(second) == []
    text = (second / "README.md").read_text()
    for part in ("## Training", "minutes of optimizer steps", 'path = "FOLDER"', "license: apache-2.0"):
        assert part in text
    assert f"| near | 32 | full | 0 | 2 | {100 * summary['success_rate']:.1f} | " in text
    with pytest.raises(ValueError, match="evaluates another policy: expected"):
        complete_card(checkpoint_path(watched, 2) / "pretrained_model", [tmp_path / "evaluation"])
    with pytest.raises(FileNotFoundError, match=r"name of a packaged policy \(again, points\)"):
        evaluate("pionts", tmp_path / "other")


def test_each_start_notes_code_packages_and_hardware(points, tmp_path):
    for fields in ({"stop_after": 2}, {"resume": True}):
        train(tiny_run(points, tmp_path / "run", **fields))
    first, second = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert (first["from_step"], second["from_step"]) == (0, 2)
    assert first["packages"]["torch"] == version("torch")
    assert first["hardware"]["cores"] >= 1
    assert first["code"]["revision"] is None or len(first["code"]["revision"]) == 40


def test_fields_that_change_only_outputs_may_change_on_resuming():
    assert {"simulation.every", "tracking", "tracker.project", "keep_last", "evaluate_every"} <= set(
        FREE_TO_CHANGE
    )


@pytest.mark.slow
def test_one_field_turns_weights_and_biases_on_and_a_resumed_run_goes_on_there(points, tmp_path):
    fields = {"tracking": "wandb", "tracker": TrackerConfig(project="tests", mode="offline")}
    train(tiny_run(points, tmp_path / "run", stop_after=2, **fields))
    known = (tmp_path / "run" / "wandb_run.txt").read_text()
    train(tiny_run(points, tmp_path / "run", resume=True, **fields))
    assert (tmp_path / "run" / "wandb_run.txt").read_text() == known
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{known.strip()}"))) == 2


@pytest.mark.slow
def test_a_run_tracked_by_trackio_is_resumed_there_with_every_logged_value(points, tmp_path):
    """In a process of its own, since Trackio reads its folder when it is imported; read by its command."""
    pytest.importorskip("trackio")
    fields = {"tracking": "trackio", "simulation": simulation(2), "dataset": {"held_out": 0.3}}
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    for changes in ({"stop_after": 2}, {"resume": True}):
        config = json.dumps(encode(tiny_run(points, tmp_path / "run", **fields, **changes)))
        program = (
            "import json, sys; from vega_policy.training.config import decode; "
            "from vega_policy.training.train import train; train(decode(json.loads(sys.argv[1])))"
        )
        subprocess.run([sys.executable, "-c", program, config], env=environment, check=True)
    name = (tmp_path / "run" / "trackio_run.txt").read_text().strip()
    assert not (tmp_path / "run" / "tensorboard").exists()

    def read(*words):
        command = [sys.executable, "-m", "trackio.cli", *words, "--project", "vega", "--json"]
        return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    assert [run if isinstance(run, str) else run["name"] for run in read("list", "runs")["runs"]] == [name]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for metric in ("loss", "success"):
        expected = [(line["step"], line[metric]) for line in lines if metric in line]
        assert expected
        group = "train" if metric == "loss" else "simulation"
        values = read("get", "metric", "--run", name, "--metric", f"{group}/{metric}")["values"]
        assert [(value["step"], value["value"]) for value in values] == pytest.approx(expected)


def test_scores_of_one_step_are_added_up(tmp_path):
    add_scores(tmp_path, 3, {"held_out_loss": 1.0})
    add_scores(tmp_path, 3, {"success": 0.5})
    assert read_scores(tmp_path) == {3: {"held_out_loss": 1.0, "success": 0.5}}
