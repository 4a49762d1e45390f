"""Spatial questions have correct answers, and sets that cannot be answered from the text alone."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.question_checks import Known, agree
from tests.synthetic_scenes import scene, scenes
from vega_policy.analysis.linear_probes import estimate
from vega_policy.analysis.spatial_qa import (
    KINDS,
    Question,
    balance,
    box_iou,
    chance_scores,
    generate_questions,
    make_question_set,
    mean_relative_accuracy,
    score,
    text_only_scores,
)


def known(one):
    """Return the objects of a synthetic scene with the view in which each appears first."""
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
    for question in generate_questions(0, one, ["bowl", "cookie box", "mug", "plate", "ramekin"]):
        assert agree(question, known(one)), question
        assert question.choice is None or question.choice in question.options
        assert sum(part is not None for part in (question.choice, question.number, question.box)) == 1


def test_all_seven_kinds_are_generated():
    questions = [question for one in scenes(20) for question in generate_questions(0, one, ["bowl"])]
    assert {question.kind for question in questions} == set(KINDS)


def test_a_question_lists_the_objects_that_its_text_names():
    questions = [question for one in scenes(20) for question in generate_questions(0, one, ["bowl"])]
    for question in questions:
        assert 1 <= len(question.objects) <= 4
        assert all(words in question.text for words in question.objects), question
        if question.kind in ("relative_distance", "appearance_order"):
            assert set(question.options) <= set(question.objects)


def test_no_question_is_about_an_invisible_object():
    one = scene(np.random.default_rng(0), presence=1.0)
    one.views.segments[one.views.segments == 2] = -1  # the plate
    assert one.objects[2].category == "plate"
    questions = generate_questions(0, one, ["plate"])
    assert questions
    assert not [question for question in questions if "plate" in question.text]
    assert not [question for question in questions if question.kind == "object_count"], (
        "it would count wrongly"
    )


@pytest.fixture(scope="module")
def questions():
    """A balanced set over many scenes."""
    return make_question_set(scenes(400), max_per_kind=1200)


def test_every_answer_to_a_text_is_correct_equally_often(questions):
    for part in (questions.train, questions.test):
        answers = defaultdict(Counter)
        for question in part:
            if question.kind != "grounding":
                answers[question.text][question.label] += 1
        assert answers
        for text, counts in answers.items():
            assert len(set(counts.values())) == 1, (text, counts)
            assert len(counts) > 1, (text, counts)


def test_train_and_test_questions_are_about_different_scenes(questions):
    train, test = ({question.scene for question in part} for part in (questions.train, questions.test))
    assert not train & test
    assert {question.kind for question in questions.test} == set(KINDS)


def test_each_task_has_its_fourth_of_test_scenes():
    """Also where scenes of several tasks take turns, as the probe renders them."""
    shown = [replace(one, name=f"suite/{index % 2}/{index}") for index, one in enumerate(scenes(80))]
    found = make_question_set(shown)
    train, test = ({question.scene for question in part} for part in (found.train, found.test))
    for task in (0, 1):
        of_task = set(range(task, 80, 2))
        assert test & of_task <= set(range(task, 80, 8))
        assert len(test & of_task) >= 8
        assert len(train & of_task) >= 25


def test_the_text_alone_stays_at_chance(questions):
    text_only = text_only_scores(questions.train, questions.test)
    chance = chance_scores(questions.train, questions.test)
    for kind in KINDS:
        rows = [index for index, question in enumerate(questions.test) if question.kind == kind]
        by_scene = defaultdict(lambda: np.zeros(2))
        for index in rows:
            by_scene[questions.test[index].scene] += text_only[index] - chance[index], 1
        gained = estimate(np.stack(list(by_scene.values())))
        assert gained.low < 0.02, f"{kind}: text gains {gained} over chance"


def test_an_unbalanced_set_is_answered_from_its_text():
    leaky = [
        Question(
            index, "relative_distance", "Which?", ("a", "b", "c"), choice="a" if index % 4 else "b", label="a"
        )
        for index in range(80)
    ]
    parts = leaky[:40], leaky[40:]
    assert text_only_scores(*parts).mean() > chance_scores(*parts).mean() + 0.3
    assert balance(leaky, np.random.default_rng(0), 80, 10) == [], "one option is never correct"


def test_scores_are_those_of_their_papers():
    assert mean_relative_accuracy(1.0, 1.0) == 1.0
    assert mean_relative_accuracy(1.24, 1.0) == pytest.approx(0.6), "within 50, 45, 40, 35, 30 and 25 percent"
    assert mean_relative_accuracy(2.0, 1.0) == 0.0
    cube = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    assert box_iou(cube, cube) == 1.0
    assert box_iou(cube, (0.5, 0.0, 0.0, 1.0, 1.0, 1.0)) == pytest.approx(1 / 3)
    assert box_iou(cube, (2.0, 0.0, 0.0, 1.0, 1.0, 1.0)) == 0.0
    where = Question(0, "grounding", "Where?", box=cube)
    assert (score(where, (0.5, 0, 0, 1, 1, 1)), score(where, (0.7, 0, 0, 1, 1, 1))) == (1.0, 0.0)
