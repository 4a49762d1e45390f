"""Spatial questions: answers that a second computation confirms, sets that words alone cannot answer."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.question_checks import Known, agree
from tests.synthetic_scenes import scene, scenes
from vega_policy.analysis.correspondence import estimate
from vega_policy.analysis.spatial_qa import (
    KINDS,
    Question,
    ask,
    balanced,
    chance,
    mean_relative_accuracy,
    overlap,
    score,
    without_looking,
)
from vega_policy.analysis.spatial_qa_model import question_set


def known(one):
    """What a synthetic scene holds, with the view in which each thing is first seen."""
    return [
        Known(
            thing.category,
            np.array(thing.centre),
            np.array(thing.size),
            thing.longest,
            thing.movable,
            int((one.views.segments[1:] == index).any(axis=(1, 2)).argmax()),
        )
        for index, thing in enumerate(one.objects)
    ]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_every_answer_is_the_one_that_a_second_computation_gives(seed):
    one = scene(np.random.default_rng(seed))
    for question in ask(0, one, ["bowl", "cookie box", "mug", "plate", "ramekin"]):
        assert agree(question, known(one)), question
        assert question.choice is None or question.choice in question.options
        assert sum(part is not None for part in (question.choice, question.number, question.box)) == 1


def test_all_seven_types_are_asked():
    asked = [question for one in scenes(20) for question in ask(0, one, ["bowl"])]
    assert {question.kind for question in asked} == set(KINDS)


def test_nothing_is_asked_about_what_no_camera_sees():
    one = scene(np.random.default_rng(0), presence=1.0)
    one.views.segments[one.views.segments == 2] = -1  # the plate
    assert one.objects[2].category == "plate"
    asked = ask(0, one, ["plate"])
    assert asked
    assert not [question for question in asked if "plate" in question.text]
    assert not [question for question in asked if question.kind == "object_count"], "it would count wrongly"


@pytest.fixture(scope="module")
def asked():
    """A balanced set over many scenes."""
    return question_set(scenes(400), per_kind=1200)


def test_every_answer_to_a_text_is_right_equally_often(asked):
    for part in (asked.train, asked.test):
        answers = defaultdict(Counter)
        for question in part:
            if question.kind != "grounding":
                answers[question.text][question.label] += 1
        assert answers
        for text, counts in answers.items():
            assert len(set(counts.values())) == 1, (text, counts)
            assert len(counts) > 1, (text, counts)


def test_train_and_test_ask_about_different_scenes(asked):
    assert not {question.scene for question in asked.train} & {question.scene for question in asked.test}
    assert {question.kind for question in asked.test} == set(KINDS)


def test_words_alone_stay_at_chance(asked):
    alone, blind = without_looking(asked.train, asked.test), chance(asked.train, asked.test)
    for kind in KINDS:
        rows = [index for index, question in enumerate(asked.test) if question.kind == kind]
        by_scene = defaultdict(lambda: np.zeros(2))
        for index in rows:
            by_scene[asked.test[index].scene] += alone[index] - blind[index], 1
        gained = estimate(np.stack(list(by_scene.values())))
        assert gained.low < 0.02, f"{kind}: words gain {gained} over chance"


def test_an_unbalanced_set_would_be_found_out():
    leaky = [
        Question(
            index, "relative_distance", "Which?", ("a", "b", "c"), choice="a" if index % 4 else "b", label="a"
        )
        for index in range(80)
    ]
    assert without_looking(leaky[:40], leaky[40:]).mean() > chance(leaky[:40], leaky[40:]).mean() + 0.3
    assert balanced(leaky, np.random.default_rng(0), 80, 10) == [], "an answer that never is right"


def test_scores_are_those_of_their_papers():
    assert mean_relative_accuracy(1.0, 1.0) == 1.0
    assert mean_relative_accuracy(1.24, 1.0) == pytest.approx(0.6), "within 50, 45, 40, 35, 30 and 25 percent"
    assert mean_relative_accuracy(2.0, 1.0) == 0.0
    cube = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    assert overlap(cube, cube) == 1.0
    assert overlap(cube, (0.5, 0.0, 0.0, 1.0, 1.0, 1.0)) == pytest.approx(1 / 3)
    assert overlap(cube, (2.0, 0.0, 0.0, 1.0, 1.0, 1.0)) == 0.0
    where = Question(0, "grounding", "Where?", box=cube)
    assert (score(where, (0.5, 0, 0, 1, 1, 1)), score(where, (0.7, 0, 0, 1, 1, 1))) == (1.0, 0.0)
