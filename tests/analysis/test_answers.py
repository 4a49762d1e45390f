"""Question-answering models read planted answers, guess without vision, and are cached."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.policies import SMALL_ENCODERS
from tests.synthetic_scenes import scenes
from vega_policy.analysis import decode
from vega_policy.analysis.features import FeatureCache, Features
from vega_policy.analysis.probe import (
    Episode,
    compute_gates,
    overlay_gate,
    run,
    write_recording,
)
from vega_policy.analysis.spatial_qa import (
    Evaluation,
    QAScores,
    Question,
    chance_scores,
    examples_table,
    held_out_table,
    make_question_set,
    qa_table,
    score,
    seed_gains_table,
)
from vega_policy.analysis.spatial_qa_model import (
    FUSED_PAIRS,
    QUESTION_PAIRS,
    AnswerCodec,
    Arm,
    QATraining,
    QuestionSampler,
    SpatialQAModel,
    compare_arms,
    compare_models,
    mean_loss,
    predict_answers,
    qa_model_config,
    question_arms,
    split_scenes,
    train_qa_model,
)
from vega_policy.data.scenes import save_scene
from vega_policy.evaluation.report import Section, Table, render_report
from vega_policy.model.config import BackboneConfig, FusionConfig, PriorConfig

ASSETS = Path(__file__).parents[2] / "assets"
GRID = (4, 4)
SMALL = BackboneConfig(
    width=32,
    depth=0,
    heads=2,
    freeze_image_encoder=True,
    freeze_text_encoder=True,
    **SMALL_ENCODERS,
)
CHANNELS = 48  # of the image encoder
CONFIG = qa_model_config(SMALL, FusionConfig(), 64, 4)
PRIOR = PriorConfig(name="random", seed=3)
TRAINING = QATraining(steps=3, scenes=4, questions=4)
UNTRAINED_FUTURE = "fused, future of the untrained copy"
REACH = ((0.3, 0.8), (-0.3, 0.3))  # where synthetic objects stand: x and y in the robot's frame (m)


def scored(model, codec, questions, features):
    answers = predict_answers(model, codec, codec.encode(questions), features)
    return np.array([score(question, one) for question, one in zip(questions, answers, strict=True)])


def test_a_planted_count_is_read_in_unseen_scenes_and_guessed_without_vision():
    options = ("0", "1", "2", "3")
    asked = [
        Question(scene, "object_count", "How many?", options, choice=str(scene % 4)) for scene in range(64)
    ]
    planted = torch.zeros(64, 4, CHANNELS, *GRID)
    for scene in range(64):
        planted[scene, :, scene % 4] = 3.0
    features, codec = Features(planted, None), AnswerCodec(asked[:48])
    training = QATraining(steps=80, scenes=16, learning_rate=3e-3)
    accuracy = {}
    for name, shown in {"seeing": features, "blind": features.mean()}.items():
        model, _ = train_qa_model(CONFIG, codec, codec.encode(asked[:48]), shown, training)
        accuracy[name] = scored(model, codec, asked[48:], shown).mean()
    assert accuracy["seeing"] == 1.0
    assert accuracy["blind"] == 0.25, "one answer to all"


def planted_prior(shown, width=256):
    """Return prior tokens that are a map of the table: the objects in each cell and their exact place."""
    names = sorted({thing.category for one in shown for thing in one.objects})
    tokens = torch.zeros(len(shown), 4, width, 8, 8)
    for index, one in enumerate(shown):
        for thing in one.objects:
            place = [(thing.centre[axis] - low) / (high - low) for axis, (low, high) in enumerate(REACH)]
            row, column = (min(7, max(0, int(8 * share))) for share in place)
            kind = names.index(thing.category)
            tokens[index, :, kind, row, column] += 1
            tokens[index, :, 20 + 2 * kind : 22 + 2 * kind, row, column] = torch.tensor(place).float() - 0.5
    return tokens


@pytest.mark.slow
def test_the_fused_model_finds_answers_planted_in_the_priors_tokens():
    shown = scenes(400)
    questions = make_question_set(shown)
    kinds = ("object_count", "relative_distance")
    parts = [[q for q in part if q.kind in kinds] for part in (questions.train, questions.test)]
    backbone = BackboneConfig(**{**vars(SMALL), "width": 128, "heads": 4})
    codec = AnswerCodec(parts[0])
    features = Features(torch.zeros(len(shown), 1, CHANNELS, 8, 8), planted_prior(shown)[:, :1])
    config = replace(qa_model_config(backbone, FusionConfig(), 128, 1), prior=PriorConfig(name="random"))
    model, _ = train_qa_model(config, codec, codec.encode(parts[0]), features, QATraining())
    scores, chance = scored(model, codec, parts[1], features), chance_scores(*parts)
    of = {kind: np.array([question.kind == kind for question in parts[1]]) for kind in kinds}
    assert scores[of["object_count"]].mean() > chance[of["object_count"]].mean() + 0.2
    assert scores[of["relative_distance"]].mean() > chance[of["relative_distance"]].mean() + 0.1


def test_a_step_samples_few_scenes_and_all_kinds_equally_often():
    counts = [
        Question(index % 3, "object_count", "How many?", ("0", "1"), choice="0") for index in range(270)
    ]
    places = [Question(index % 3, "grounding", "Where?", box=(0.0,) * 6) for index in range(30)]
    questions = AnswerCodec(counts + places).encode(counts + places)
    sampler = QuestionSampler(questions, QATraining(scenes=2, questions=4))
    rows = torch.cat([sampler.sample() for _ in range(200)])
    assert len(sampler.sample()) == 8
    assert len(questions.scene[sampler.sample()].unique()) == 2
    fraction = np.mean([questions.kinds[row] == "grounding" for row in rows.tolist()])
    assert fraction == pytest.approx(0.5, abs=0.06), "a tenth of the questions, half of the samples"


def counted(labels):
    """Return one question about each scene, whose planted answer is the scene's number modulo 2."""
    asked = [
        Question(scene, "object_count", "How many?", ("0", "1"), choice=str(label), objects=("bowl",))
        for scene, label in enumerate(labels)
    ]
    planted = torch.zeros(len(asked), 4, CHANNELS, *GRID)
    planted[::2, :, 0] = 1.0
    return asked, Features(planted, None)


def test_held_out_scenes_choose_the_step_and_train_nothing():
    training = QATraining(steps=12, scenes=4, evaluations=1, held_out=5)
    weights, labels = [], [scene % 2 for scene in range(20)]
    asked, _ = counted(labels)
    held_out = split_scenes(AnswerCodec(asked).encode(asked), 5)[1].tolist()
    assert len(held_out) == 4
    assert {scene % 2 for scene in held_out} == {0, 1}  # of both tasks, where two take turns
    for flipped in (0, 1):  # the answers about them
        asked, features = counted(
            [label ^ (flipped and scene in held_out) for scene, label in enumerate(labels)]
        )
        codec = AnswerCodec(asked)
        model, curve = train_qa_model(CONFIG, codec, codec.encode(asked), features, training)
        weights.append(torch.cat([part.flatten() for part in model.parameters()]))
        assert [point.step for point in curve] == [12]
    assert torch.equal(*weights)
    training = replace(training, evaluations=6, learning_rate=1e-2)
    model, curve = train_qa_model(CONFIG, codec, codec.encode(asked), features, training)
    batch = codec.encode(asked)
    kept = mean_loss(model, features, batch[split_scenes(batch, 5)[1]])
    assert kept == pytest.approx(min(point.held_out for point in curve), abs=1e-6)
    assert len({round(point.held_out, 4) for point in curve}) > 1


def test_answers_do_not_depend_on_the_other_questions_of_the_batch():
    asked = [
        Question(index % 3, "object_count", f"How many of {index}?", ("0", "1"), choice="0")
        for index in range(8)
    ]
    features = Features(torch.randn(3, 4, CHANNELS, *GRID, generator=torch.Generator().manual_seed(0)), None)
    codec = AnswerCodec(asked)
    model = SpatialQAModel(CONFIG, 2, features).eval()
    with torch.no_grad():
        together = model(features, codec.encode(asked))
        alone = [model(features, codec.encode([question])) for question in asked]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), atol=1e-5, rtol=1e-5)


def test_frozen_encoders_stay_frozen_and_the_rest_is_trained():
    features = Features(torch.randn(2, 4, CHANNELS, *GRID), torch.randn(2, 4, 256, *GRID))
    model = SpatialQAModel(replace(CONFIG, prior=PriorConfig(name="random")), 3, features)
    learning = {
        name.split(".")[1] if name.startswith("encoder") else name.split(".")[0]
        for name, part in model.named_parameters()
        if part.requires_grad
    }
    assert {
        "backbone",
        "fusion",
        "project",
        "places",
        "blocks",
        "option",
        "name",
        "number",
        "box",
    } <= learning
    frozen = {name for name, part in model.named_parameters() if not part.requires_grad}
    assert any("image_encoder" in name for name in frozen)
    assert not any("matrix" in name for name, _ in model.named_parameters()), "the prior is no part of it"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison on few scenes and steps, and its cache."""
    shown = scenes(40)
    questions = make_question_set(shown, max_per_kind=60, max_texts=5)
    cache = FeatureCache(shown, "forty", 64, tmp_path_factory.mktemp("answers"))
    return questions, cache, compare_models(cache, questions, CONFIG, PRIOR, TRAINING)


def test_the_comparison_has_every_model_and_ablation_and_a_report_shows_them(compared):
    questions, _, comparison = compared
    expected = {
        "chance",
        "text only (constant)",
        "semantic only",
        "fused",
        "fused, random prior",
        "fused, blind",
    }
    ablations = {f"fused, prior {name}" for name in ("zeroed", "noise", "shuffled")}
    assert comparison.scores.scores.keys() == expected | ablations
    for scores in comparison.scores.scores.values():
        assert len(scores) == len(questions.test)
        assert 0 <= scores.min() <= scores.max() <= 1
    page = render_report(
        "t", [Section("Q", [*qa_table(comparison.scores, FUSED_PAIRS), examples_table(questions)])]
    )
    assert "fused minus semantic only" in page
    assert "grounding" in page


def test_the_fused_models_gate_is_recorded_over_an_episode(compared, tmp_path):
    _, cache, comparison = compared
    episode = Episode(cache.scenes[0], np.zeros((8, 7), np.float32), np.arange(4) * 2, "lift it")
    gates = compute_gates(comparison.model, episode)
    assert gates is not None
    assert gates.shape == (4, 4, 4)
    assert 0 < gates.min() < gates.max() < 1
    assert overlay_gate(cache.scenes[0].views.frames[0], gates[0]).shape == (32, 64, 3)
    write_recording(tmp_path / "episode.rrd", episode, gates)
    assert (tmp_path / "episode.rrd").stat().st_size > 1000
    with pytest.raises(ValueError, match="each of 4 views, got 2"):
        write_recording(tmp_path / "other.rrd", episode, gates[:2])


def test_a_second_run_neither_encodes_nor_trains_and_gives_the_same_scores(compared):
    questions, cache, first = compared
    blank = [
        replace(scene, views=replace(scene.views, frames=np.zeros_like(scene.views.frames)))
        for scene in cache.scenes
    ]
    before = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    again = compare_models(replace(cache, scenes=blank), questions, CONFIG, PRIOR, TRAINING)
    assert {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()} == before
    assert again.scores.curves == first.scores.curves
    for name, scores in first.scores.scores.items():
        np.testing.assert_array_equal(again.scores.scores[name], scores)


def test_every_arm_answers_with_every_seed_and_all_answers_are_kept(compared, tmp_path):
    questions, cache, _ = compared
    arms = question_arms(PRIOR, None)
    assert [arm.name for arm in arms] == ["words only", "semantic only", "fused", "prior only"]
    result = compare_arms(cache, questions, CONFIG, arms, TRAINING, [0, 1])
    (tmp_path / "answers.parquet").write_bytes(result.to_parquet())
    table = pd.read_parquet(tmp_path / "answers.parquet")
    assert len(table) == len(questions.test)
    for name in ("words only", "prior only"):
        both = [table[f"{name}, seed {seed}: score"].to_numpy() for seed in (0, 1)]
        np.testing.assert_allclose(np.mean(both, axis=0), result.scores[name])
    assert (table.groupby("question")["words only, seed 0: answer"].nunique() == 1).all(), "it has no scene"
    assert (table.groupby("question")["prior only, seed 0: answer"].nunique() > 1).any()
    rows = [row[0] for row in qa_table(result, QUESTION_PAIRS)[0].rows]
    assert "fused minus semantic only" in rows
    assert "fused, future minus words only" not in rows, "that model was not trained"


def test_the_gain_of_each_seed_is_in_summary_and_table():
    counts = [Question(scene, "object_count", "How many?", ("0", "1"), choice="0") for scene in (0, 1)]
    sizes = [Question(0, "object_size", "How long?", number=10.0)]
    result = QAScores(counts + sizes)
    for seed, answers in enumerate((["0", "0", 10.0], ["0", "1", 10.0])):
        result.add("fused", seed, answers, [Evaluation(1, 0.0, 0.0)])
    for seed, answers in enumerate((["1", "0", 10.0], ["0", "0", 90.0])):
        result.add("semantic only", seed, answers, [Evaluation(1, 0.0, 0.0)])
    result.scores["chance"] = np.array([0.5, 0.5, 0.0])
    pairs = [("fused", "semantic only"), ("fused", "chance"), ("fused", "not trained")]
    expected = {
        "fused minus semantic only": {
            "mean": {0: 0.25, 1: 0.25},
            "object_count": {0: 0.5, 1: -0.5},
            "object_size": {0: 0.0, 1: 1.0},
        },
        "fused minus chance": {
            "mean": {0: 0.75, 1: 0.5},
            "object_count": {0: 0.5, 1: 0.0},
            "object_size": {0: 1.0, 1: 1.0},
        },
    }
    summary = result.summarize(pairs)
    assert summary["seed_gains"] == expected
    for title, gains in summary["gains"].items():
        for kind, gain in gains.items():
            assert gain[0] == pytest.approx(np.mean(list(expected[title][kind].values())))
    assert seed_gains_table(result, pairs).rows == [
        ("fused minus semantic only, seed 0", "0.250", "0.500", "0.000"),
        ("fused minus semantic only, seed 1", "0.250", "-0.500", "1.000"),
        ("fused minus chance, seed 0", "0.750", "0.500", "1.000"),
        ("fused minus chance, seed 1", "0.500", "0.000", "1.000"),
    ]


@pytest.fixture
def six_seeds():
    """Gains of 0.1, 0.3, -0.2, 0.4, 0.0 and 0.6: mean 0.2, standard deviation sqrt(0.42 / 5) = 0.28983."""
    result = QAScores(
        [Question(scene, "object_count", "How many?", ("0", "1"), choice="0") for scene in range(10)]
    )
    for seed, correct in enumerate((5, 7, 2, 8, 4, 10)):
        result.add("fused", seed, ["0"] * correct + ["1"] * (10 - correct), [Evaluation(1, 0.0, 0.0)])
        result.add("semantic only", seed, ["0"] * 4 + ["1"] * 6, [Evaluation(1, 0.0, 0.0)])
    return result


def test_the_interval_of_a_gain_over_seeds_is_that_computed_by_hand(six_seeds):
    margin = 2.570582 * (0.42 / 5) ** 0.5 / 6**0.5  # Student's t, five degrees of freedom
    pair = ("fused", "semantic only")
    interval = six_seeds.seed_interval(*pair)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.2 - margin, 0.2 + margin))
    assert margin == pytest.approx(0.30416, abs=1e-5)
    summary = six_seeds.summarize([pair])
    assert summary["seed_intervals"] == {
        "fused minus semantic only": {
            "mean": [0.2, -0.10416, 0.50416],
            "object_count": [0.2, -0.10416, 0.50416],
        }
    }
    row = "0.200 [-0.104, 0.504]"
    assert seed_gains_table(six_seeds, [pair]).rows[-1] == (
        f"{' minus '.join(pair)}, mean of 6 seeds",
        row,
        row,
    )


def test_fewer_than_three_seeds_have_no_interval_over_seeds(six_seeds):
    pair = ("fused", "semantic only")
    for name, group in six_seeds.seeds.items():
        six_seeds.seeds[name] = {seed: group[seed] for seed in (0, 1)}
    assert six_seeds.seed_interval(*pair) is None
    assert six_seeds.summarize([pair])["seed_intervals"] == {}
    assert [row[0] for row in seed_gains_table(six_seeds, [pair]).rows] == [
        f"fused minus semantic only, seed {seed}" for seed in (0, 1)
    ]
    six_seeds.seeds["fused"][2] = six_seeds.seeds["semantic only"][2] = six_seeds.seeds["fused"][1]
    assert six_seeds.seed_interval(*pair) is not None


def test_the_held_out_loss_of_the_kept_weights_is_in_summary_and_table():
    result = QAScores([Question(0, "object_count", "How many?", ("0", "1"), choice="0")])
    nan = float("nan")
    for seed, losses in {3: (0.5, 0.19, 0.2), 4: (0.9, 0.6, 0.46), 5: (0.3, 0.3, nan)}.items():
        curve = [Evaluation(10 * step, 0.1, loss) for step, loss in enumerate(losses, start=1)]
        result.add("fused", seed, ["0"], curve)
    assert result.summarize([])["held_out_loss"] == {
        "fused": {
            3: {"loss": 0.19, "step": 20},
            4: {"loss": 0.46, "step": 30},  # trained too little
            5: {"loss": 0.3, "step": 10},  # the first of two; a loss that is no number is never the lowest
        }
    }
    assert held_out_table(result) == Table(
        ("model", "seed 3", "seed 4", "seed 5"),
        [("fused", "0.190 (step 20)", "0.460 (step 30)", "0.300 (step 10)")],
    )
    result.add("fused", 3, ["0"], [Evaluation(10, 0.1, nan), Evaluation(20, 0.1, nan)])
    held_out = result.summarize([])["held_out_loss"]["fused"]
    assert held_out[3] == {"loss": None, "step": 20}, "without held-out scenes the last weights are kept"
    text = json.dumps(result.summarize([]), allow_nan=False)  # nan is no JSON
    assert json.loads(text)["curves"]["fused"]["3"][0] == {"step": 10, "training": 0.1, "held_out": None}


@pytest.mark.slow
def test_other_steps_train_other_models(compared):
    questions, cache, first = compared
    before = set(cache.folder.glob("*.pt"))
    compare_models(cache, questions, CONFIG, PRIOR, replace(TRAINING, steps=4))
    assert len(set(cache.folder.glob("*.pt")) - before) == len(first.scores.curves)


def write_synthetic(folder, count, **_):
    """Write synthetic scenes in place of the simulator's."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.npz" for index in range(count)]
    for path, one in zip(paths, scenes(count), strict=True):
        save_scene(one, path)
    return paths


QUESTIONS = {
    "prior": {"name": "wan_tiny"},
    "backbone": {"width": SMALL.width, "heads": SMALL.heads, **SMALL_ENCODERS}
    | {"freeze_image_encoder": True, "freeze_text_encoder": True},
    "scenes": {"name": "s", "suite": "libero_spatial"},
    "output_dir": "x",
    "measure": "questions",
    "scene_writer": f"{__name__}.write_synthetic",
}


def test_a_run_compares_frame_and_future_and_resumes_from_its_cache(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    questions = {"scenes": 10, "frame_size": 32, "steps": 2, "scenes_per_step": 2, "seeds": [0]}
    questions |= {"future_path": str(ASSETS / "wan_tiny_future"), "max_per_kind": 40}
    node = QUESTIONS | {"questions": questions, "cache_root": str(tmp_path / "cache")}
    settings = decode(node | {"output_dir": str(tmp_path / "run")})
    page = run(settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    trained = {"words only", "semantic only", "fused", "prior only", "fused, untrained copy", "fused, future"}
    trained, gain = trained | {UNTRAINED_FUTURE}, f"fused, future minus {UNTRAINED_FUTURE}"
    assert summary["scores"].keys() == trained | {"chance", "text only (constant)"}
    assert {"fused, future minus fused", "fused minus fused, untrained copy"} <= summary["gains"].keys()
    assert {gain, f"{UNTRAINED_FUTURE} minus semantic only"} <= summary["gains"].keys()
    assert summary["seed_gains"].keys() == summary["gains"].keys()
    assert summary["held_out_loss"].keys() == trained
    for row in (UNTRAINED_FUTURE, gain, f"{gain}, seed 0"):
        assert f">{row}<" in page.read_text()
        assert f"| {row} | " in caplog.text
    assert ">Held-out loss of each training seed<" in page.read_text()
    first = (tmp_path / "run" / "answers.parquet").read_bytes()
    for name in ("priors.wan.LatentWorldSimulator.forward", "analysis.spatial_qa_model.SpatialQAModel.loss"):
        monkeypatch.setattr(f"vega_policy.{name}", None)  # nothing is encoded or trained again
    run(settings)
    assert (tmp_path / "run" / "answers.parquet").read_bytes() == first
    arms = ["fused, future", UNTRAINED_FUTURE]
    run(decode(node | {"output_dir": str(tmp_path / "few"), "questions": questions | {"arms": arms}}))
    few = json.loads((tmp_path / "few" / "summary.json").read_text())
    assert few["settings"]["arms"] == arms
    assert list(few["held_out_loss"]) == arms
    assert list(few["gains"]) == [gain]
    for name in arms:
        assert few["scores"][name] == summary["scores"][name]


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_torch_does_not_have_is_refused_before_scenes_are_rendered(device, tmp_path):
    settings = decode(QUESTIONS | {"device": device, "cache_root": str(tmp_path)})
    with pytest.raises(ValueError, match=f"device: expected null, cpu, cuda .*; got '{device}'"):
        run(settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fused future", UNTRAINED_FUTURE])
def test_an_arm_that_there_is_not_is_refused_before_scenes_are_rendered(name, tmp_path):
    """One that reads the future is there with questions.future_path alone."""
    chosen = {"questions": {"arms": ["semantic only", name]}, "cache_root": str(tmp_path)}
    with pytest.raises(ValueError, match=rf"questions.arms: expected some of .*got \['{name}'\]"):
        run(decode(QUESTIONS | chosen))
    assert not list(tmp_path.iterdir())


def test_the_future_of_the_untrained_copy_differs_from_the_future_in_its_weights_alone():
    future = PriorConfig(
        name="wan_tiny", path=str(ASSETS / "wan_tiny_future"), clip="future", layer=(2, 5), seed=3
    )
    first, second = question_arms(PRIOR, future, ["fused, future", UNTRAINED_FUTURE])
    assert second == replace(first, name=UNTRAINED_FUTURE, is_untrained=True)
    cache = FeatureCache(scenes(1), "one", 32)
    trained, copy = (cache.prior(arm.prior, (2, 2), arm.is_untrained) for arm in (first, second))
    assert trained.shape == copy.shape, "the same layers and slots"
    assert not torch.allclose(trained, copy)
    other = cache.prior(replace(future, seed=4), (2, 2), untrained=True)
    assert not torch.allclose(copy, other), "its weights come from the prior's seed"


class NotCachedError(Exception):
    """Something was not in the cache."""


def recompute(*_, **__):
    raise NotCachedError


def test_another_device_takes_neither_features_nor_models_of_the_cpu_from_the_cache(compared, monkeypatch):
    questions, cache, _ = compared
    other = replace(cache, device=torch.device("meta"))
    assert cache.device_key == {}, "files of the CPU keep their names"
    monkeypatch.setattr("vega_policy.analysis.features.make_backbone", recompute)
    features = cache.semantic(SMALL)
    with pytest.raises(NotCachedError):
        other.semantic(SMALL)
    monkeypatch.setattr("vega_policy.analysis.spatial_qa_model.train_qa_model", recompute)
    monkeypatch.setattr(FeatureCache, "semantic", lambda *_: features)  # the features do not differ
    options = (questions, CONFIG, [Arm("semantic only")], TRAINING, [TRAINING.seed])
    compare_arms(cache, *options)
    with pytest.raises(NotCachedError):
        compare_arms(other, *options)


@pytest.mark.parametrize("steps", [1, 10, 20])
def test_any_number_of_steps_has_a_learning_rate(steps):
    asked, features = counted([0, 1, 0, 1])
    codec = AnswerCodec(asked)
    _, curve = train_qa_model(CONFIG, codec, codec.encode(asked), features, replace(TRAINING, steps=steps))
    assert curve[-1].step == steps


class MetaText:
    """Encoded text of any phrase, without values."""

    def __init__(self, width):
        self.width = width

    def __contains__(self, phrase):
        return True

    def __call__(self, phrases):
        words = torch.empty(len(phrases), 3, self.width, device="meta")
        return words, torch.empty(len(phrases), 3, dtype=torch.bool, device="meta")


def test_a_training_step_neither_leaves_its_device_nor_waits_for_it():
    """Values of the meta device cannot be read, and other tensors than indices must lie there, too."""
    asked, features = counted([0, 1, 0, 1])
    batch = AnswerCodec(asked).encode(asked)
    shown = Features(features.semantic.to("meta"), None)
    model = SpatialQAModel(CONFIG, 2, shown)
    assert {part.device.type for part in model.state_dict().values()} == {"meta"}
    model.text_cache = MetaText(model.encoder.backbone.text_encoder.width)
    loss = model.loss(shown, batch)
    loss.backward()
    assert model.places.grad.device == loss.device == shown.semantic.device


def test_cached_text_is_that_of_the_text_encoder():
    asked, features = counted([0, 1, 0, 1])
    batch, model = AnswerCodec(asked).encode(asked), SpatialQAModel(CONFIG, 2, features).eval()
    with torch.no_grad():
        encoded = model(features, batch)
        model.cache_text(batch)
        for cached, expected in zip(model(features, batch), encoded, strict=True):
            assert torch.equal(cached, expected)
        phrases = ["bowl", ""]
        for cached, expected in zip(
            model.cached_text(phrases), model.encoder.backbone.text_encoder(phrases), strict=True
        ):
            assert torch.equal(cached, expected)
    assert model.cached_text(["bowl", "spoon"]) is None, "spoon is not in the cache"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": "space", "device": "cuda"}, "device=cuda: measure=space runs on the CPU"),
        ({"prior": {"name": "wan_tiny", "clip": "future"}}, "read single frames .*got 'future'"),
        ({"questions": {"scenes": 0}}, "it needs a suite and questions.scenes"),
        ({"questions": {"seeds": []}}, "at least one of seeds, of arms"),
        ({"questions": {"arms": []}}, "at least one of seeds, of arms"),
        ({"questions": {"dropout": 1.0}}, r"questions.dropout: expected a number in \[0, 1\); got 1"),
    ],
)
def test_wrong_settings_of_questions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        decode(QUESTIONS | change)
