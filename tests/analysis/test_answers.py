"""The head that answers spatial questions: it reads what is planted, guesses when blind, and is cached."""

import numpy as np
import pytest
import torch

from tests.synthetic_scenes import scenes
from vega_policy.analysis import report as page
from vega_policy.analysis.probe import gates_of
from vega_policy.analysis.report import Episode, gate_over, write_recording
from vega_policy.analysis.spatial_qa import Codec, Features, Question, chance, score
from vega_policy.analysis.spatial_qa_model import (
    AnswerModel,
    AnswerTraining,
    Draws,
    Eyes,
    Looker,
    answer,
    compare,
    question_set,
    train,
)
from vega_policy.model.config import BackboneConfig, FusionConfig, PriorConfig

GRID = (4, 4)
SMALL = BackboneConfig(
    width=32, depth=0, heads=2, pretrained=False, freeze_image_encoder=True, freeze_text_encoder=True
)
EYES = Eyes(SMALL, FusionConfig(), 64, 4)
REACH = ((0.3, 0.8), (-0.3, 0.3))  # where synthetic things stand: x and y in the robot's frame (m)


def scored(model, codec, questions, features):
    given = answer(model, codec, codec.batch(questions), features)
    return np.array([score(question, one) for question, one in zip(questions, given, strict=True)])


def test_an_answer_head_reads_a_planted_count_in_unseen_scenes_and_guesses_when_blind():
    options = ("0", "1", "2", "3")
    asked = [
        Question(scene, "object_count", "How many?", options, choice=str(scene % 4)) for scene in range(64)
    ]
    planted = torch.zeros(64, 4, 112, *GRID)
    for scene in range(64):
        planted[scene, :, scene % 4] = 3.0
    features, codec = Features(planted, None), Codec(asked[:48])
    how = AnswerTraining(steps=80, scenes=32, rate=3e-3)
    right = {}
    for name, shown in {"seeing": features, "blind": features.mean()}.items():
        model, _ = train(EYES.model(PriorConfig(name="none")), codec, codec.batch(asked[:48]), shown, how)
        right[name] = scored(model, codec, asked[48:], shown).mean()
    assert right["seeing"] == 1.0
    assert right["blind"] == 0.25, "one answer to all"


def planted_prior(shown, width=256):
    """Tokens of a prior that knows space: what stands in a cell of a map of the table, and where exactly."""
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
def test_where_the_priors_tokens_carry_the_answer_the_fused_model_finds_it():
    shown = scenes(400)
    asked = question_set(shown)
    kinds = ("object_count", "relative_distance")
    parts = [[q for q in part if q.kind in kinds] for part in (asked.train, asked.test)]
    backbone = BackboneConfig(**{**vars(SMALL), "width": 128, "heads": 4})
    eyes, codec = Eyes(backbone, FusionConfig(), 128, 1), Codec(parts[0])
    features = Features(torch.zeros(len(shown), 1, 112, 8, 8), planted_prior(shown)[:, :1])
    config = eyes.model(PriorConfig(name="random"))
    model, _ = train(config, codec, codec.batch(parts[0]), features, AnswerTraining())
    right, guessed = scored(model, codec, parts[1], features), chance(*parts)
    of = {kind: np.array([question.kind == kind for question in parts[1]]) for kind in kinds}
    assert right[of["object_count"]].mean() > guessed[of["object_count"]].mean() + 0.2
    assert right[of["relative_distance"]].mean() > guessed[of["relative_distance"]].mean() + 0.1


def test_a_step_asks_of_few_scenes_and_of_all_types_alike():
    scene = torch.arange(300) % 3
    kinds = ["object_count" if index < 270 else "grounding" for index in range(300)]
    draw = Draws(scene, kinds, AnswerTraining(scenes=2, questions=4))
    rows = torch.cat([draw() for _ in range(200)])
    assert len(draw()) == 8
    assert len(scene[draw()].unique()) == 2
    share = np.mean([kinds[row] == "grounding" for row in rows.tolist()])
    assert share == pytest.approx(0.5, abs=0.06), "a tenth of the questions, half of what is asked"


def test_questions_are_answered_alike_in_any_company():
    asked = [
        Question(index % 3, "object_count", f"How many of {index}?", ("0", "1"), choice="0")
        for index in range(8)
    ]
    features = Features(torch.randn(3, 4, 112, *GRID, generator=torch.Generator().manual_seed(0)), None)
    codec = Codec(asked)
    model = AnswerModel(EYES.model(PriorConfig(name="none")), 2, features).eval()
    with torch.no_grad():
        together = model(features, codec.batch(asked))
        alone = [model(features, codec.batch([question])) for question in asked]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), atol=1e-5, rtol=1e-5)


def test_the_frozen_encoders_of_an_answer_head_stay_frozen_and_the_rest_learns():
    features = Features(torch.randn(2, 4, 112, *GRID), torch.randn(2, 4, 256, *GRID))
    model = AnswerModel(EYES.model(PriorConfig(name="random")), 3, features)
    learning = {
        name.split(".")[1] if name.startswith("eyes") else name.split(".")[0]
        for name, part in model.named_parameters()
        if part.requires_grad
    }
    assert {"backbone", "fusion", "project", "queries", "lookup", "name", "number", "box"} <= learning
    frozen = {name for name, part in model.named_parameters() if not part.requires_grad}
    assert any("image_encoder" in name for name in frozen)
    assert not any("matrix" in name for name, _ in model.named_parameters()), "the prior is no part of it"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison on few scenes and steps, and its cache."""
    shown = scenes(40)
    asked = question_set(shown, per_kind=60, texts=5)
    looker = Looker(shown, "forty", 64, tmp_path_factory.mktemp("answers"))
    how = AnswerTraining(steps=3, scenes=4, questions=4)
    return shown, asked, looker, how, compare(looker, asked, EYES, PriorConfig(name="random", seed=3), how)


def test_the_comparison_has_every_model_and_control_and_a_page_shows_them(compared, tmp_path):
    shown, asked, _, _, result = compared
    expected = {
        "chance",
        "words alone (constant)",
        "semantic only",
        "fused",
        "fused, random prior",
        "fused, blind",
    }
    controls = {f"fused, prior {name}" for name in ("zeroed", "noise", "shuffled")}
    assert result.answers.scores.keys() == expected | controls
    for scores in result.answers.scores.values():
        assert len(scores) == len(asked.test)
        assert 0 <= scores.min() <= scores.max() <= 1
    written = page.write_page(tmp_path, "t", {"Q": page.answers_table(result.answers) + page.examples(asked)})
    text = written.read_text()
    assert "fused minus semantic only" in text
    assert "grounding" in text
    moments = shown[0].views
    episode = Episode(shown[0], np.zeros((8, 7), np.float32), np.arange(4) * 2, "lift it")
    gates = gates_of(result.model, episode)
    assert gates is not None
    assert gates.shape == (4, 4, 4)
    assert 0 < gates.min() < gates.max() < 1
    assert gate_over(moments.frames[0], gates[0]).shape == (32, 64, 3)
    write_recording(tmp_path / "episode.rrd", episode, gates)
    assert (tmp_path / "episode.rrd").stat().st_size > 1000
    with pytest.raises(ValueError, match="each of 4 moments, got 2"):
        write_recording(tmp_path / "other.rrd", episode, gates[:2])


def test_a_second_start_looks_and_trains_no_more_and_answers_the_same(compared, monkeypatch):
    def forbidden(*_args, **_named):
        raise AssertionError("the cache should have answered")

    _, asked, looker, how, first = compared
    monkeypatch.setattr("vega_policy.analysis.spatial_qa_model.train", forbidden)
    monkeypatch.setattr(Looker, "_look", forbidden)
    again = compare(looker, asked, EYES, PriorConfig(name="random", seed=3), how)
    assert again.answers.losses == first.answers.losses
    for name, scores in first.answers.scores.items():
        np.testing.assert_array_equal(again.answers.scores[name], scores)
    with pytest.raises(AssertionError, match="the cache should have answered"):
        compare(looker, asked, EYES, PriorConfig(name="random", seed=3), AnswerTraining(steps=4))
