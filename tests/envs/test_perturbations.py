"""Perturbations of LIBERO: what each axis changes, what it leaves, and that it ends with its episode."""

import re

import numpy as np
import pytest

import envs
from envs.base import EVALUATION_SEED
from envs.perturbations import AXES, BENT, LAYOUT_RADIUS, NOISES, VERBS, prompts, rephrasings

UNSEEN_BY_PHYSICS = ("camera", "light", "background", "noise", "language")


@pytest.fixture(scope="module")
def env():
    env = envs.make("libero_spatial", 0, frame_size=48, rendering="fast")
    yield env
    env.close()


@pytest.fixture(scope="module")
def start(env):
    """Return observation, simulator state and instruction of an episode's start, once for each call."""
    known = {}

    def started(axis, seed=EVALUATION_SEED, strength=1.0):
        if (axis, seed, strength) not in known:
            options = {"perturbation": axis, "perturbation_strength": strength} if axis != "none" else {}
            observation, _ = env.reset(seed=seed, options={"initial_state": 3, **options})
            frames = {camera: frame.copy() for camera, frame in observation["pixels"].items()}
            known[axis, seed, strength] = frames, env.simulator_state(), env.task_description
        return known[axis, seed, strength]

    return started


@pytest.mark.parametrize("axis", UNSEEN_BY_PHYSICS)
def test_an_axis_of_what_is_observed_leaves_the_physics_and_the_initial_state(start, axis):
    assert np.array_equal(start(axis)[1], start("none")[1])


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis not in ("none", "language")])
def test_the_scene_camera_sees_a_perturbation_and_the_wrist_only_those_of_the_scene(start, axis):
    plain, changed = start("none")[0], start(axis)[0]
    assert np.abs(plain["image"].astype(int) - changed["image"]).mean() > 0.5
    wrist = np.array_equal(plain["image2"], changed["image2"])
    assert wrist == (axis in ("camera", "noise"))


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "none"])
def test_seed_and_strength_decide_a_perturbation_and_it_ends_with_its_episode(env, start, axis):
    def again(seed, strength):
        options = {"initial_state": 3, "perturbation": axis, "perturbation_strength": strength}
        observation, _ = env.reset(seed=seed, options=options)
        return observation["pixels"]["image"].copy(), env.task_description

    first = start(axis)
    frame, text = again(EVALUATION_SEED, 1.0)
    assert np.array_equal(frame, first[0]["image"])
    assert text == first[2]
    others = [
        again(seed, strength) for seed, strength in ((EVALUATION_SEED + 1, 1.0), (EVALUATION_SEED, 0.4))
    ]
    assert all(not np.array_equal(one, frame) or words != text for one, words in others)
    observation, _ = env.reset(seed=EVALUATION_SEED, options={"initial_state": 3})
    assert np.array_equal(observation["pixels"]["image"], start("none")[0]["image"])
    assert env.task_description == env.task.instruction


def test_videos_show_what_the_policy_observes(env):
    env.reset(seed=EVALUATION_SEED, options={"perturbation": "noise", "perturbation_strength": 1.0})
    assert np.array_equal(env.render(), env.observe()["pixels"]["image"])


def test_the_arm_starts_bent_by_at_most_the_strength_and_touches_nothing(env):
    joints = list(env.raw.robots[0]._ref_joint_pos_indexes)
    objects = [one.joints[0] for one in env.raw.objects_dict.values()]
    env.reset_blindly(seed=EVALUATION_SEED, options={"initial_state": 3})
    arm = env.data.qpos[joints].copy()
    before = np.stack([env.data.joint(name).qpos[:3] for name in objects])
    for strength in (0.4, 1.0):
        options = {"initial_state": 3, "perturbation": "robot", "perturbation_strength": strength}
        env.reset_blindly(seed=EVALUATION_SEED, options=options)
        bent = np.linalg.norm(env.data.qpos[joints] - arm)
        assert 0.5 * strength * BENT - 0.02 < bent < strength * BENT + 0.02  # it holds still for ten steps
        after = np.stack([env.data.joint(name).qpos[:3] for name in objects])
        np.testing.assert_allclose(after, before, atol=1e-3)


def test_objects_are_moved_by_at_most_the_strength_and_fixtures_stay(env):
    names = [one.root_body for one in env.raw.objects_dict.values()]
    env.reset_blindly(seed=EVALUATION_SEED, options={"initial_state": 3})
    before, fixtures = [np.array([env.data.body(n).xpos for n in names]), env.model.body_pos[env._fixtures]]
    options = {"initial_state": 3, "perturbation": "layout", "perturbation_strength": 0.5}
    env.reset_blindly(seed=EVALUATION_SEED, options=options)
    moved = np.linalg.norm(np.array([env.data.body(n).xpos for n in names]) - before, axis=1)
    assert 0.02 < moved.max() < 0.5 * LAYOUT_RADIUS + 0.02
    assert np.array_equal(fixtures, env.model.body_pos[env._fixtures])


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_the_same_for_all_frames_of_an_episode_and_grows_with_its_magnitude(noise):
    tiles = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    frame = tiles.repeat(16, axis=0).repeat(16, axis=1)

    def changed(magnitude):
        corrupt = noise(64, magnitude, np.random.default_rng(1))
        assert np.array_equal(corrupt(frame), corrupt(frame))
        assert corrupt(frame).dtype == np.uint8
        assert corrupt(frame).shape == frame.shape
        return np.abs(corrupt(frame).astype(int) - frame).mean()

    assert 0 < changed(0.2) < changed(1.0)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_other_words_keep_the_objects_and_tell_nothing_of_the_perturbation(strength):
    verbs = {word for pattern in VERBS for word in re.findall(r"\w+", pattern.replace(r"\b", " "))}
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        for task in envs.tasks(suite):
            texts = rephrasings(task.instruction, strength)
            assert len(texts) > 1
            nouns = {*task.instruction.split()} - verbs
            for text in texts:
                assert text != task.instruction
                assert nouns <= {*re.findall(r"\w+", text)}, text
                assert not re.search(r"\d|_|language|perturb|view|level|noise|libero", text), text


def test_prompts_are_all_that_an_episode_can_have():
    own = [task.instruction for task in envs.tasks("libero_goal")]
    assert prompts("libero_goal", "camera", 0.5) == own
    assert {*prompts("libero_goal", "language", 0.5)} == {t for one in own for t in rephrasings(one, 0.5)}


@pytest.mark.parametrize(
    ("suite", "axis", "strength", "message"),
    [
        ("libero_goal", "fog", 0.5, "perturbation: expected one of none, camera, .*got 'fog'"),
        ("libero_goal", "camera", 0.0, r"perturbation_strength: expected a number in \(0, 1\]; got 0.0"),
        ("libero_goal", "camera", 1.5, r"expected a number in \(0, 1\]; got 1.5"),
        ("lift", "camera", 0.5, "expected one of LIBERO's suites; got 'lift'"),
        (
            "libero_goal_swap",
            "layout",
            0.5,
            "whose instructions say what has to stay; got 'libero_goal_swap'",
        ),
    ],
)
def test_what_is_not_there_is_refused(suite, axis, strength, message):
    with pytest.raises(ValueError, match=message):
        prompts(suite, axis, strength)
