"""Read-outs of the future: targets from known paths, episodes held out whole, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.demos.states import read_states
from envs.posed_views import write_demonstrations
from tests.policies import SMALL_ENCODERS
from vega_policy.analysis import FutureSettings, decode
from vega_policy.analysis.features import UNTRAINED
from vega_policy.analysis.linear_probes import (
    CONSTANT,
    NOTHING,
    PROPRIOCEPTION,
    future_metrics,
    future_of,
    principal_components,
    probe_moments,
)
from vega_policy.analysis.probe import run
from vega_policy.data.scenes import Demonstration, load_demonstrations, save_demonstrations

ASSETS = Path(__file__).parents[2] / "assets"
SHIPPED = ASSETS / "demonstrations" / "libero"
SETTINGS = FutureSettings(every=2, horizons=[2, 4], components=6)


def demonstration(paths, *, steps, task="t/0", name="t/0/0", speed=0.003):
    """Return an episode in which the hand moves along x, and objects on `paths`, [t 3] by kind."""
    positions = np.stack(list(paths.values()), axis=1)
    gripper = np.zeros((len(positions), 3))
    gripper[:, 0] = speed * np.arange(len(positions))
    steps = np.array(steps)
    frames = np.zeros((len(steps), 2, 16, 16, 3), np.uint8)
    state = gripper[steps].astype(np.float32)
    return Demonstration(name, task, "go", steps, frames, state, gripper, tuple(paths), positions)


def still(length):
    return np.zeros((length, 3))


def test_targets_are_the_displacements_of_hand_and_of_the_part_that_moves_now_or_next():
    """The bowl moves up by 1 cm a step from step 6 to 10, then the door along y by 2 cm from 14 to 16."""
    bowl, door = still(24), still(24)
    bowl[:, 2] = 0.01 * np.clip(np.arange(24) - 6, 0, 4)
    door[:, 1] = 0.02 * np.clip(np.arange(24) - 14, 0, 2)
    one = demonstration({"bowl": bowl, "door": door}, steps=[0, 4, 8, 10, 12, 14, 18])
    future = future_of(one, [2, 4], 0.015)
    expected = {0: (0, 0), 4: (0, 0.02), 8: (0.02, 0.02)}  # of the bowl upwards, then of the door along y
    later = {10: (0, 0), 12: (0, 0.04), 14: (0.04, 0.04), 18: (0, 0)}
    heights, sides = future.target[:3, :, 2], future.target[3:, :, 1]
    np.testing.assert_allclose(heights, list(expected.values()), atol=1e-9)
    np.testing.assert_allclose(sides, list(later.values()), atol=1e-9)
    assert not future.target[:3, :, :2].any()
    np.testing.assert_allclose(future.gripper[..., 0], np.tile([0.006, 0.012], (7, 1)))
    assert future.mover == (NOTHING, "bowl", "bowl", NOTHING, "door", "door", NOTHING)
    # at step 8 the bowl has moved by 2 cm in the last 4 steps; it does not begin then
    assert future.begins.tolist() == [False, True, False, False, True, True, False]


def episodes(count, seed=0, tasks=4):
    """Return episodes in which one of three objects moves in a direction that nothing else tells."""
    rng, found = np.random.default_rng(seed), []
    for index in range(count):
        paths = {kind: still(25) for kind in ("bowl", "mug", "pot")}
        for start in (2, 8, 14, 19):
            path = paths[list(paths)[rng.integers(3)]]
            path[start:] += np.linspace(0, 1, 25 - start)[:, None].clip(0, 0.3) * rng.uniform(-1, 1, 3)
        task = f"t/{index * tasks // count}"
        found.append(demonstration(paths, steps=range(0, 20, 2), task=task, name=f"{task}/{index}"))
    return found


def answers_of(known):
    """Return features that hold the future: displacements, and which object moves; [n 1 2 d] each."""
    features = []
    for one in known:
        future = future_of(one, SETTINGS.horizons, SETTINGS.moved)
        hot = torch.tensor([[kind == other for kind in (*one.objects, NOTHING)] for other in future.mover])
        flat = torch.cat([future.target.flatten(1), future.gripper.flatten(1), 1.0 * hot], dim=1).float()
        features.append(flat.unflatten(1, (1, 2, -1)))
    return features


def test_features_that_hold_the_future_are_read_out_and_noise_is_not():
    known = episodes(20)
    metrics = future_metrics(SETTINGS.horizons)
    settings = replace(SETTINGS, components=20)
    planted = probe_moments(settings, answers_of(known), known, "planted")
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(len(one.steps), 1, 2, 8, generator=generator) for one in known]
    nothing = probe_moments(settings, noise, known, "noise")
    constant = probe_moments(settings, None, known, "")
    for unit in ("episodes", "tasks"):
        values = {name: metric.value(planted[unit, "planted"]) for name, metric in metrics.items()}
        assert values["target_4_r2"].low > 0.99
        assert values["target_4_cm"].value < 0.2
        assert values["moves"].value > 95
        assert values["begins"].value > 95
        assert metrics["target_4_r2"].value(nothing[unit, "noise"]).value < 0.1
        assert abs(metrics["target_4_r2"].value(constant[unit, CONSTANT]).value) < 0.05
    assert 100 / 4 < metrics["moves"].value(constant["episodes", CONSTANT]).value < 60
    gain = metrics["target_4_r2"].gain(planted["episodes", "planted"], nothing["episodes", "noise"])
    assert gain.low > 0.9


def test_rows_hold_what_is_appended_and_no_number_of_a_held_out_task():
    known = episodes(12)
    found = probe_moments(SETTINGS, answers_of(known), known, "x") | probe_moments(SETTINGS, None, known, "")
    rows = {unit: [name for split, name in found if split == unit] for unit in ("episodes", "tasks")}
    of_x, of_none = ["x", "x + state"], [CONSTANT, PROPRIOCEPTION]
    assert rows["episodes"] == [
        *of_x, "x + state and task", *of_none, f"{PROPRIOCEPTION} + task"
    ]  # fmt: skip
    assert rows["tasks"] == [*of_x, *of_none]
    assert all(len(sums["moves"]) == (12 if unit == "episodes" else 4) for (unit, _), sums in found.items())


@pytest.mark.parametrize("unit", ["episodes", "tasks"])
def test_nothing_of_a_held_out_episode_reaches_its_probe(unit):
    """What is held out with unit 0 gets other features and another future: unit 0 is predicted alike."""
    known = episodes(20, tasks=10)
    features = [
        torch.randn(len(one.steps), 1, 2, 8, generator=torch.Generator().manual_seed(i))
        for i, one in enumerate(known)
    ]
    before = probe_moments(SETTINGS, features, known, "x")[unit, "x"]
    held = (
        range(5, 20, 5) if unit == "episodes" else [10, 11]
    )  # of the same fold as unit 0: 5, 10, 15, or task 5
    other = episodes(20, seed=1, tasks=10)
    changed = [other[i] if i in held else one for i, one in enumerate(known)]
    moved = [100 * x if i in held else x for i, x in enumerate(features)]
    after = probe_moments(SETTINGS, moved, changed, "x")[unit, "x"]
    for name in before:
        np.testing.assert_array_equal(after[name][0], before[name][0])
    fitted = [replace(one, positions=2 * one.positions) if i == 2 else one for i, one in enumerate(known)]
    assert not np.array_equal(
        probe_moments(SETTINGS, features, fitted, "x")[unit, "x"]["target_4_squares"][0],
        before["target_4_squares"][0],
    )


def test_principal_components_are_fitted_to_the_given_parts_and_keep_their_geometry():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(3, 20, 2, generator=generator) @ torch.randn(2, 12, generator=generator)
    parts = list((plane + 5.0).unflatten(2, (3, 4)))  # [20 3 4] each, two dimensions
    reduced = principal_components(parts, [0, 1], 2)
    assert [part.shape for part in reduced] == [(20, 2)] * 3
    both = torch.cat(reduced[:2])
    torch.testing.assert_close(both.mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0)
    spread = both.T @ both
    assert abs(spread[0, 1]) < 1e-4 * spread.diagonal().min()
    scale = torch.cat([part.flatten(0, 1) for part in parts[:2]]).std(dim=0)
    scaled = (parts[2] / scale).flatten(1)
    torch.testing.assert_close(
        torch.cdist(reduced[2], reduced[2]), torch.cdist(scaled, scaled), atol=1e-3, rtol=1e-3
    )
    moved = principal_components([*parts[:2], 9 * parts[2]], [0, 1], 2)
    assert torch.equal(moved[0], reduced[0])


def write_stub(folder, *, processes, file, tasks, **spec):
    """Stand in for a simulator: moments of random frames."""
    rng, paths = np.random.default_rng(0), []
    for task in tasks:
        known = [
            replace(one, frames=rng.integers(0, 255, (10, 2, 32, 32, 3)).astype(np.uint8), task=f"t/{task}")
            for one in episodes(spec["episodes_per_task"], seed=task)
        ]
        paths.append(folder / f"{Path(file).stem}-{task}.npz")
        save_demonstrations([replace(one, name=f"t/{task}/{i}") for i, one in enumerate(known)], paths[-1])
    return paths


BASE = {
    "prior": {"name": "wan_tiny", "clip": "future", "layer": [2, 5]},
    "backbone": {"width": 32, "heads": 2, "depth": 1, **SMALL_ENCODERS},
    "scenes": {"name": "s", "suite": "libero_spatial"},
    "output_dir": "x",
    "measure": "future",
    "frame_size": 32,
    "future": {"grid": 2},
}


def test_a_run_writes_a_table_of_all_encoders_and_resumes_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("vega_policy.analysis.linear_probes.RESAMPLES", 100)
    prior = BASE["prior"] | {"path": str(ASSETS / "wan_tiny_future")}
    (tmp_path / "stub.safetensors").write_bytes(b"states")
    future = {"states": str(tmp_path), "suites": ["stub"], "tasks": [0, 1, 2], "episodes_per_task": 2}
    future |= {"every": 2, "horizons": [2, 4], "grid": 2, "components": 4, "prompts": ["empty"]}
    node = BASE | {"prior": prior, "cache_root": str(tmp_path / "c")}
    node |= {"future": future | {"frame_path": str(ASSETS / "wan_tiny")}, "output_dir": str(tmp_path / "run")}
    settings = decode(node | {"demonstration_writer": f"{__name__}.write_stub"})
    page = run(settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = summary["held_out_episodes"]["rows"]
    encoders = {"semantic", "future, prompt empty", "frame, same weights", "frame, wan_tiny", UNTRAINED}
    assert {name.partition(" + ")[0] for name in names} == encoders | {CONSTANT, PROPRIOCEPTION}
    assert "future, prompt empty + state better than" in page.read_text()
    assert summary["moments"] == 60
    assert sum(summary["movers"].values()) == 60
    monkeypatch.setattr(
        "vega_policy.priors.wan.LatentWorldSimulator.forward", None
    )  # nothing is encoded again
    run(settings)
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {**again, "seconds": {}} == {**summary, "seconds": {}}


def test_demonstrations_are_written_and_loaded_unchanged(tmp_path):
    known = episodes(2)
    save_demonstrations(known, tmp_path / "a.npz")
    for one, other in zip(known, load_demonstrations(tmp_path / "a.npz"), strict=True):
        assert (one.name, one.task, one.instruction, one.objects) == (
            other.name, other.task, other.instruction, other.objects,
        )  # fmt: skip
        for name in ("steps", "frames", "state", "gripper", "positions"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.slow
def test_moments_of_a_shipped_demonstration_show_what_its_states_hold(tmp_path):
    """Tasks 0 and 7 of libero_goal: a drawer is drawn out by 15 cm, a knob is turned."""
    spec = {"tasks": [0, 7], "episodes_per_task": 1, "every": 20, "ahead": 32, "frame_size": 32}
    paths = write_demonstrations(tmp_path, file=str(SHIPPED / "libero_goal.safetensors"), **spec)
    moving = []
    for path, task in zip(paths, (0, 7), strict=True):
        (one,) = load_demonstrations(path)
        (episode, *_) = read_states(SHIPPED / "libero_goal.safetensors", [task])
        assert one.frames.shape == (len(range(0, len(episode) - 32, 20)), 2, 32, 32, 3)
        np.testing.assert_array_equal(one.state, episode.proprioception[one.steps])
        bowl = one.objects.index("black bowl")
        at = 9  # of the bowl's free joint in the positions, behind seven of the arm and two of the fingers
        np.testing.assert_allclose(one.positions[:, bowl], episode.positions[:, at : at + 3], atol=1e-6)
        away = np.linalg.norm(one.positions - one.positions[0], axis=-1).max(axis=0)
        moving.append((one.objects[int(away.argmax())], away.max()))
    assert moving[0][0] == "wooden cabinet middle level"
    assert 0.05 < moving[0][1] < 0.2
    assert moving[1][0] == "flat stove button"
    assert 0.01 < moving[1][1] < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": {"name": "wan_tiny", "clip": "views"}}, "prior.clip=frame or future; got 'views'"),
        ({"measure": "past"}, "measure: expected one of space, future"),
        ({"measure": "space"}, "probes of space read single frames .*measure=future"),
        ({"future": {"horizons": [16, 8]}}, r"rising numbers of steps; got \[16, 8\]"),
        ({"future": {"horizons": []}}, "rising numbers of steps"),
        ({"future": {"components": 0}}, "future.components: expected at least 1; got 0"),
        ({"future": {"moved": 0.0}}, r"future.moved: expected a number in \(0, inf\); got 0"),
        ({"future": {"suites": []}}, "expected at least one of suites"),
        ({"future": {"grid": 4}}, "frames of 32 pixels have only 2 tokens a side"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    assert decode(BASE).measure == "future"
    with pytest.raises(ValueError, match=message):
        decode({**BASE, **change})


def test_what_cannot_be_read_out_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/libero_goal.safetensors does not exist"):
        run(decode({**BASE, "future": {"grid": 2, "states": "nowhere"}}))
    file = str(SHIPPED / "libero_object.safetensors")
    with pytest.raises(ValueError, match=r"expected 40 demonstrations of task 9 .*got those of"):
        write_demonstrations(tmp_path, file=file, tasks=[9], episodes_per_task=40, ahead=500)
    with pytest.raises(ValueError, match=r"t/0/0: no part moves by more than 0.01 m"):
        future_of(demonstration({"bowl": still(9)}, steps=[0, 2]), [2, 4], 0.01)
    with pytest.raises(ValueError, match="expected 4 steps behind each moment; the last one is step 6 of 9"):
        future_of(demonstration({"bowl": still(9)}, steps=[0, 6]), [2, 4], 0.01)
    with pytest.raises(ValueError, match="at least 3 episodes or tasks"):
        probe_moments(SETTINGS, None, episodes(2), "")
    one = demonstration({"bowl": still(9)}, steps=[0, 2])
    with pytest.raises(ValueError, match=r"expected 2 moments of 9 steps .*got \{'frames': 1\}"):
        replace(one, frames=one.frames[:1])
