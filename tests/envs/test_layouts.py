"""Random layouts of LIBERO: what moves with what, what stays true, and how far official states are away."""

from dataclasses import replace
from pathlib import Path
from time import process_time
from types import SimpleNamespace

import numpy as np
import pytest

import envs
from envs import layouts
from envs.base import EVALUATION_SEED
from envs.demos import DemonstrationOptions
from envs.demos.collect import CollectionSettings, collect
from envs.demos.planner_fixtures import body_of, goals, holds
from envs.demos.planner_grasping import Workcell
from envs.demos.render import render_episode
from envs.demos.shards import Demonstrator, Recording, record, write_state_shard
from envs.demos.states import StateEpisode, drop_held_out, read_header, read_states, write_states
from envs.demos.tasks import clearance
from envs.layouts import (
    GAP,
    HELD_OUT,
    NoLayoutError,
    Relation,
    distances_to_official,
    find_fixtures,
    find_groups,
    holds_for_one,
    in_view,
    outline,
)
from envs.libero import LiberoEnv, load_problem, official_places, problem_file

RANDOM = {"layout": "random"}
PARTIAL = {"layout": "partial"}
FIXTURES = {"layout": "fixtures"}
SHIPPED = Path(__file__).parents[2] / "assets" / "demonstrations" / "libero_layouts"
NEAR_STANDARD, SWAPPED = 1000, 4000  # seeds whose first partial draw of libero_object 0 is an evaluated one
ONCE = Demonstrator(noise=0.2, options=DemonstrationOptions(retries=False))


def make(suite, index, **settings) -> LiberoEnv:
    env = envs.make(suite, index, **settings)
    assert isinstance(env, LiberoEnv)
    return env


@pytest.fixture(scope="module")
def cans():
    """libero_object 0: seven objects, one of them the basket, on the floor."""
    env = make("libero_object", 0, frame_size=32, rendering="fast")
    yield env
    env.close()


@pytest.fixture(scope="module")
def bowls():
    """libero_spatial 0: the bowl between the plate and the ramekin, another bowl, cabinet and stove."""
    env = make("libero_spatial", 0, render=False)
    yield env
    env.close()


@pytest.fixture(scope="module")
def arrange():
    """Return a function that puts an environment into a seed's layout, which is drawn at first use."""
    known = {}

    def arranged(env, seed, layout="random"):
        key = (env.task.suite, seed, layout)
        if key in known:
            env.restore(known[key])
        else:
            env.reset_blindly(seed=seed, options={"layout": layout})
            known[key] = env.simulator_state()

    return arranged


def positions(env):
    return {name: env.data.body(one.root_body).xpos[:2].copy() for name, one in env.raw.objects_dict.items()}


def problem_of(suite, index):
    """Return what `find_groups` reads of LIBERO's environment, without a simulator."""
    task = envs.tasks(suite)[index]
    parsed = load_problem(problem_file(suite, task.name))
    names = [name for kind in parsed["objects"].values() for name in kind]
    workspace = next(name for name in parsed["fixtures"] if name.endswith(("table", "floor")))
    workspace = parsed["fixtures"][workspace][0]
    sites = {f"{name}_contain_region": SimpleNamespace(parent_name=name) for name in names}
    fixtures = [name for kind in parsed["fixtures"].values() for name in kind if name != workspace]
    fields = {"parsed_problem": parsed, "objects_dict": dict.fromkeys(names), "object_sites_dict": sites}
    fields["fixtures_dict"] = dict.fromkeys(fixtures)
    return SimpleNamespace(workspace_name=workspace, **fields), task.instruction


@pytest.mark.parametrize(
    ("suite", "index", "together", "staying"),
    [
        ("libero_object", 0, [], []),
        ("libero_spatial", 0, [{"akita_black_bowl_1", "plate_1", "glazed_rim_porcelain_ramekin_1"}], []),
        ("libero_spatial", 2, [], ["akita_black_bowl_1"]),  # from table center
        (
            "libero_spatial",
            3,
            [{"akita_black_bowl_1", "cookies_1"}],
            ["akita_black_bowl_2"],
        ),  # one on the other
        ("libero_spatial", 7, [], ["akita_black_bowl_1", "akita_black_bowl_2"]),  # both on fixtures
        ("libero_goal", 1, [], []),
        ("libero_10", 4, [{"plate_1", "plate_2"}], []),  # the left plate, the right plate
        ("libero_10", 5, [], []),
        ("libero_10", 6, [], ["plate_1"]),  # the goal beside it is a fixed region of the table
        ("libero_10", 8, [], []),  # both moka pots: no relation tells them apart
    ],
)
def test_what_the_instruction_relates_moves_as_one_and_what_stands_on_fixtures_stays(
    suite, index, together, staying
):
    raw, instruction = problem_of(suite, index)
    groups, _ = find_groups(raw, instruction)
    assert [{*group.members} for group in groups if len(group.members) > 1] == together, instruction
    moving = {name for group in groups for name in group.members}
    assert {*raw.objects_dict} - moving == {*staying}


@pytest.mark.parametrize(
    ("suite", "index", "fixtures", "turns"),
    [
        ("libero_goal", 0, {"wooden_cabinet_1": (), "flat_stove_1": (), "wine_rack_1": ()}, 4),
        ("libero_goal", 5, {"wooden_cabinet_1": (), "wine_rack_1": ()}, 1),  # to the front of the stove
        (
            "libero_spatial",
            4,
            {"wooden_cabinet_1": ("akita_black_bowl_1", "akita_black_bowl_2"), "flat_stove_1": ()},
            4,
        ),
        ("libero_10", 5, {"desk_caddy_1": ()}, 1),  # its back compartment is in the back
        ("libero_object", 0, {}, 4),
    ],
)
def test_fixtures_move_with_what_stands_on_them_unless_the_instruction_places_them(
    suite, index, fixtures, turns
):
    groups = find_fixtures(*problem_of(suite, index))
    assert {group.fixture: group.members for group in groups} == fixtures
    assert all(len(group.turns) == turns for group in groups)


def test_sides_are_not_mirrored_and_other_relations_are():
    plates = [group for group in find_groups(*problem_of("libero_10", 4))[0] if len(group.members) > 1]
    assert not plates[0].is_mirrored
    bowl = [group for group in find_groups(*problem_of("libero_spatial", 0))[0] if len(group.members) > 1]
    assert bowl[0].is_mirrored


def test_a_layout_depends_on_the_seed_alone_and_changes_no_standard_reset(cans):
    cans.reset_blindly(seed=4)
    standard = cans.simulator_state()
    cans.reset_blindly(seed=4, options=RANDOM)
    first = cans.simulator_state()
    assert not np.array_equal(positions(cans)["basket_1"], standard)
    cans.reset_blindly(seed=5, options=RANDOM)
    assert not np.array_equal(first, cans.simulator_state())
    cans.reset_blindly(seed=4, options=RANDOM)
    assert np.array_equal(first, cans.simulator_state())
    cans.reset_blindly(seed=4)
    assert np.array_equal(standard, cans.simulator_state())


def test_objects_stand_apart_in_view_and_the_task_is_not_done(cans, arrange):
    spread = []
    for seed in range(6):
        arrange(cans, seed)
        cell = Workcell.of(cans.raw)
        bodies = {name: body_of(cell, name) for name in cans.raw.objects_dict}
        shapes = {name: outline(cell.scene.cloud(body)) for name, body in bodies.items()}
        for name, shape in shapes.items():
            others = np.concatenate([other for key, other in shapes.items() if key != name])
            assert clearance(shape, others) > GAP - 0.005, (seed, name)
            assert in_view(cans, cell.scene.position(bodies[name])), (seed, name)
        assert not any(holds(cell, goal) for goal in goals(cell))
        spread.append(positions(cans)["alphabet_soup_1"])
    assert np.ptp(spread, axis=0).min() > 0.2  # m; a standard reset moves it by 5 cm at most


def test_a_partial_layout_changes_what_the_task_needs_or_its_goal_and_at_most_five_objects(cans, arrange):
    changes, exchanges = [], 0
    for seed in range(5):
        arrange(cans, seed, "standard")
        before = positions(cans)
        arrange(cans, seed, "partial")
        after = positions(cans)
        changed = {name for name, place in after.items() if np.linalg.norm(place - before[name]) > 0.02}
        assert changed & {"alphabet_soup_1", "basket_1"}, seed
        for name in {*after} - changed:
            np.testing.assert_allclose(after[name], before[name], atol=2e-3)
        cell = Workcell.of(cans.raw)
        shapes = {name: outline(cell.scene.cloud(body_of(cell, name))) for name in changed}
        for name, shape in shapes.items():
            others = [cell.scene.cloud(body_of(cell, one))[:, :2] for one in after if one != name]
            assert clearance(shape, np.concatenate(others)) > GAP - 0.005, (seed, name)
        changes.append(len(changed))
        exchanges += any(
            max(np.linalg.norm(after[one] - before[other]), np.linalg.norm(after[other] - before[one])) < 0.02
            for one in changed
            for other in changed - {one}
        )
    assert 1 <= min(changes) <= 2 < max(changes) <= 6
    assert 0 < exchanges < 5


def test_a_layout_of_fixtures_moves_one_and_refuses_a_task_without(bowls, cans):
    moved = []
    for seed in range(2):
        bowls.reset_blindly(seed=seed)
        before = bowls.model.body_pos[bowls._fixtures].copy()
        bowls.reset_blindly(seed=seed, options=FIXTURES)
        ways = np.linalg.norm(bowls.model.body_pos[bowls._fixtures] - before, axis=1)
        moved.append(np.flatnonzero(ways > 0.05))
    assert all(map(len, moved)), moved
    layout = layouts.Layout(bowls, np.random.default_rng(0), "fixtures", np.inf)
    assert layout._chosen([layouts.Group(("plate_1",), is_wanted=True, is_mirrored=False)]) == []
    with pytest.raises(NoLayoutError, match=r"expected a task with a fixture.*got libero_object 0"):
        cans.reset_blindly(seed=0, options=FIXTURES)


def test_fixtures_stay_and_only_one_bowl_is_between_plate_and_ramekin(bowls):
    bowls.reset_blindly(seed=3)
    fixtures = [bowls.model.body_pos[body].copy() for body in bowls._fixtures]
    for seed in (3, 1000):  # in the reset of seed 1000 the bowl falls on the ramekin and rolls away
        bowls.reset_blindly(seed=seed, options=RANDOM)
        place = positions(bowls)
        middle = (place["plate_1"] + place["glazed_rim_porcelain_ramekin_1"]) / 2
        meant, other = (np.linalg.norm(place[f"akita_black_bowl_{k}"] - middle) for k in (1, 2))
        assert meant < 0.1
        assert other > meant + 0.1
        if seed == 3:
            assert np.array_equal(fixtures, [bowls.model.body_pos[body] for body in bowls._fixtures])


def test_a_relation_holds_for_the_nearest_object_alone(bowls, arrange):
    arrange(bowls, 3)
    cell = Workcell.of(bowls.raw)
    relation = Relation("akita_black_bowl_1", ("akita_black_bowl_2",), ("plate_1",))
    plate = positions(bowls)["plate_1"]

    def holds_with(meant, other):
        """Put the bowls so far (m) to the left and to the right of the plate."""
        for name, away in (("akita_black_bowl_1", meant), ("akita_black_bowl_2", -other)):
            bowls.data.joint(f"{name}_joint0").qpos[:2] = plate + np.array([0.0, away])
        cell.scene.refresh()
        return holds_for_one(cell, relation)

    assert holds_with(meant=0.1, other=0.3)
    assert not holds_with(meant=0.1, other=0.12), "the other bowl is next to the plate, too"
    assert not holds_with(meant=0.3, other=0.9), "the bowl is not next to the plate"


def test_an_unreachable_draw_is_drawn_again_and_never_forever(cans, monkeypatch):
    faults = iter(["too far"])
    monkeypatch.setattr(layouts, "unreachable", lambda cell, goal: next(faults, ""))
    cans.reset_blindly(seed=4, options=RANDOM)
    second = cans.simulator_state()
    monkeypatch.setattr(layouts, "unreachable", lambda cell, goal: "")
    cans.reset_blindly(seed=4, options=RANDOM)
    assert not np.array_equal(second, cans.simulator_state())
    monkeypatch.setattr(layouts, "unreachable", lambda cell, goal: "too far")
    monkeypatch.setattr(layouts, "MAX_DRAWS", 1)
    with pytest.raises(NoLayoutError, match=r"none of 1 random layouts.*seed 4.*too far"):
        cans.reset_blindly(seed=4, options=RANDOM)
    assert record(cans, 4, ONCE, layout="random") is None  # a failure of this seed, not the collection's end


@pytest.mark.parametrize("radius", [0.1, 0.8 * HELD_OUT])
def test_objects_stay_within_a_radius_of_where_they_were_however_near(cans, radius):
    cans.reset_blindly(seed=EVALUATION_SEED, options={"initial_state": 3})
    before = positions(cans)
    cans.reset_blindly(seed=EVALUATION_SEED, options={"initial_state": 3, **RANDOM, "layout_radius": radius})
    ways = [np.linalg.norm(place - before[name]) for name, place in positions(cans).items()]
    assert 0.02 < max(ways) < radius + 0.01


def test_an_unknown_layout_and_another_family_are_refused(cans):
    with pytest.raises(
        ValueError, match="layout: expected one of standard, random, partial, fixtures; got 'mirrored'"
    ):
        cans.reset_blindly(seed=0, options={"layout": "mirrored"})
    with pytest.raises(
        ValueError, match="layouts: expected one of standard, random, partial, fixtures; got 'mirrored'"
    ):
        CollectionSettings("libero_object", layouts="mirrored")
    with pytest.raises(
        ValueError, match=r"layouts=random: expected one of the suites libero_spatial.*got 'lift'"
    ):
        CollectionSettings("lift", layouts="random")


def test_states_of_a_random_layout_render_after_a_standard_reset(cans, tmp_path):
    cans.reset_blindly(seed=2, options=RANDOM)
    seen = [frame.transpose(2, 0, 1) for frame in cans.observe()["pixels"].values()]
    actions = np.zeros((3, 7), np.float32)
    recording = Recording(2, np.repeat(cans.simulator_state()[None], 3, axis=0), actions, executed=actions)
    write_state_shard(tmp_path / "shard", cans, recording)
    (episode,) = read_states(tmp_path / "shard" / "states.safetensors")
    cans.reset_blindly(seed=77)
    rendered = render_episode(cans, episode, stride=len(episode))[0]
    assert np.abs(rendered.astype(int) - np.stack(seen)).max() <= 1


@pytest.mark.slow
def test_states_of_a_moved_fixture_render_and_replay_and_the_next_reset_has_it_back(tmp_path):
    env = make("libero_goal", 1, frame_size=32, rendering="fast")  # put the bowl on the stove
    env.reset_blindly(seed=7)
    standard = env.simulator_state()
    places = env.model.body_pos[env._fixtures].copy()
    env.reset_blindly(seed=7, options=FIXTURES)
    assert np.abs(env.model.body_pos[env._fixtures] - places)[:, :2].max() > 0.05
    seen = [frame.transpose(2, 0, 1) for frame in env.observe()["pixels"].values()]
    recording = record(env, 7, ONCE, layout="fixtures")
    assert recording is not None
    write_state_shard(tmp_path / "shard", env, recording)
    (episode,) = read_states(tmp_path / "shard" / "states.safetensors")
    env.reset_blindly(seed=7)
    assert np.array_equal(standard, env.simulator_state())
    rendered = render_episode(env, episode, stride=len(episode))[0]
    assert np.abs(rendered.astype(int) - np.stack(seen)).max() <= 1
    env.reset_blindly(seed=77)
    env.restore(episode.initial)
    assert any(env.step_blindly(action)[0] for action in episode.executed)
    env.close()


def test_a_collection_of_other_layouts_is_refused_by_name(tmp_path):
    settings = CollectionSettings(
        "libero_object", tasks=(0,), episodes_per_task=1, format="states", demonstrator=ONCE, layouts="random"
    )
    metadata = collect(settings, tmp_path / "object", processes=1)
    assert metadata["settings"]["layouts"] == "random"
    with pytest.raises(ValueError, match=r"layouts \(stored: 'random', received: 'standard'\)"):
        collect(replace(settings, layouts="standard"), tmp_path / "object", processes=1)


@pytest.mark.slow
def test_an_object_whose_shape_is_not_known_stays_and_the_others_keep_away():
    env = make("libero_90", 60, render=False)  # its salad dressing collides as shapes that are not sampled
    env.reset_blindly(seed=0)
    before = positions(env)
    env.reset_blindly(seed=0, options=RANDOM)
    after = positions(env)
    env.close()
    dressing = after.pop("new_salad_dressing_1")
    np.testing.assert_allclose(dressing, before["new_salad_dressing_1"], atol=1e-3)
    assert min(np.linalg.norm(place - dressing) for place in after.values()) > 0.08
    assert max(np.linalg.norm(place - before[name]) for name, place in after.items()) > 0.1


def shipped_files(suite, partial=False):
    folders = (SHIPPED, SHIPPED.with_name("libero_fixtures"))
    files = [file for folder in folders for file in sorted(folder.glob(f"*{suite}.safetensors"))]
    return [file for file in files if file.name.startswith(("partial_", "fixtures_")) is partial]


def new_layouts(env, arrange):
    for seed in range(8):
        arrange(env, seed)
        yield distances_to_official(env)


def partial_layouts(env, arrange, count=8):
    for seed in (SWAPPED, NEAR_STANDARD, *range(count - 2)):
        arrange(env, seed, "partial")
        yield distances_to_official(env)


def many_partial_layouts(env, arrange):
    return partial_layouts(env, arrange, 100)


def shipped_layouts(env, arrange=None, partial=False):
    env.reset_blindly(seed=0)
    for file in shipped_files(env.task.suite, partial):
        for episode in read_states(file, tasks=[env.task.index]):
            env.restore(episode.initial)
            yield distances_to_official(env)


@pytest.mark.parametrize(
    ("fixture", "layouts_of", "count"),
    [
        ("cans", new_layouts, 8),
        ("cans", partial_layouts, 8),
        ("cans", shipped_layouts, 60),
        ("bowls", new_layouts, 8),
        ("bowls", shipped_layouts, 60),
        pytest.param("cans", many_partial_layouts, 100, marks=pytest.mark.slow),
        pytest.param("bowls", many_partial_layouts, 100, marks=pytest.mark.slow),
    ],
)
def test_no_layout_is_an_official_state(fixture, layouts_of, count, request, arrange, capsys):
    env = request.getfixturevalue(fixture)
    found = list(layouts_of(env, arrange))
    least = {suite: min(distances[suite] for distances in found) for suite in found[0]}
    with capsys.disabled():
        name = f"nearest of {len(found)} {layouts_of.__name__}"
        for suite, distance in least.items():
            print(f"\n{name} to an official state of {suite} 0: {100 * distance:.1f} cm")  # noqa: T201
    assert [*least] == [env.task.suite, f"{env.task.suite}_swap"]
    assert len(found) == count
    assert min(least.values()) > HELD_OUT


def test_an_arrangement_that_is_evaluated_is_drawn_again_and_no_other(cans, monkeypatch):
    drawn = {}
    for held_out in (0.0, HELD_OUT):
        monkeypatch.setattr(layouts, "HELD_OUT", held_out)
        for seed in (SWAPPED, NEAR_STANDARD, 2):
            cans.reset_blindly(seed=seed, options=PARTIAL)
            drawn[seed, held_out] = (distances_to_official(cans), cans.simulator_state())
    assert drawn[SWAPPED, 0.0][0]["libero_object_swap"] < 0.01
    assert 0.01 < drawn[NEAR_STANDARD, 0.0][0]["libero_object"] < HELD_OUT
    for seed in (SWAPPED, NEAR_STANDARD):
        assert min(drawn[seed, HELD_OUT][0].values()) > HELD_OUT
    assert np.array_equal(drawn[2, 0.0][1], drawn[2, HELD_OUT][1])


@pytest.mark.slow
@pytest.mark.parametrize("suite", envs.PRO_BASES)
def test_resets_of_a_swapped_suite_are_arrangements_that_are_held_out(suite, capsys):
    """Apart from those in which an object falls: 50 official states stand for all that can be evaluated."""
    found = []
    for task in envs.tasks(f"{suite}_swap"):
        env = make(task.suite, task.index, render=False)
        for seed in range(8):
            env.reset_blindly(seed=seed)
            found.append(distances_to_official(env))
        env.close()
    own, standard = (np.array([distances[name] for distances in found]) for name in (f"{suite}_swap", suite))
    near = np.mean(own < HELD_OUT)
    with capsys.disabled():
        print(f"\n{suite}_swap: {near:.1%} of {len(own)} resets, {100 * standard.min():.1f} cm to {suite}")  # noqa: T201
    assert near > 0.95
    assert standard.min() > 2 * HELD_OUT


def test_a_fixture_elsewhere_makes_an_arrangement_another_one():
    env, swapped = (make(suite, 0, render=False) for suite in ("libero_goal", "libero_goal_swap"))
    env.reset_blindly(seed=0)
    places = env.model.body_pos[env._fixtures].copy()
    assert distances_to_official(env)["libero_goal"] < 0.03
    swapped.reset_blindly(seed=0, options={"initial_state": 0})  # cabinet and rack have changed places
    env.restore(swapped.simulator_state())
    assert distances_to_official(env)["libero_goal_swap"] < 0.01
    assert distances_to_official(env)["libero_goal"] > 0.2
    env.model.body_pos[env._fixtures] = places
    assert distances_to_official(env)["libero_goal_swap"] > 0.2
    env.close()
    swapped.close()


@pytest.mark.parametrize(
    ("suite", "evaluated"),
    [
        ("libero_object", ["libero_object", "libero_object_swap"]),
        ("libero_90", ["libero_90"]),  # has no swapped suite
        ("libero_object_object", []),  # has other objects
    ],
)
def test_evaluations_of_a_task_are_those_of_the_same_objects(suite, evaluated):
    assert [*official_places(envs.tasks(suite)[0], "floor", (9, 16))] == evaluated


def test_episodes_of_evaluated_arrangements_are_dropped_from_a_file_once(cans, monkeypatch, tmp_path):
    monkeypatch.setattr(layouts, "HELD_OUT", 0.0)
    episodes, zeros = [], np.zeros((3, 7), np.float32)
    for seed in (2, SWAPPED, NEAR_STANDARD):
        cans.reset_blindly(seed=seed, options=PARTIAL)
        episodes.append(StateEpisode(0, seed, 1, cans.simulator_state(), *[zeros + seed / 1e4] * 5))
    monkeypatch.undo()
    file, counts = tmp_path / "partial.safetensors", {"attempts": 4, "failures": 1, "demonstrations": 3}
    write_states(file, "libero_object", episodes, {"tasks": {cans.task.name: counts}})
    before = read_states(file)[0]
    dropped = [{"task": 0, "seed": seed} for seed in (SWAPPED, NEAR_STANDARD)]
    assert drop_held_out(file) == dropped
    (left,), content = read_states(file), file.read_bytes()
    assert left.seed == 2
    assert np.array_equal(left.initial, before.initial)
    assert np.array_equal(left.executed, before.executed)
    counts["demonstrations"] = 1
    assert read_header(file)["origin"] == {"tasks": {cans.task.name: counts}, "held_out": dropped}
    assert drop_held_out(file) == []
    assert file.read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("suite", [suite for suite in envs.PRO_BASES if shipped_files(suite, partial=True)])
def test_no_shipped_partial_layout_is_an_official_state(suite, capsys):
    found = []
    for task in envs.tasks(suite):
        env = make(suite, task.index, render=False)
        found += shipped_layouts(env, partial=True)
        env.close()
    least = {name: min(distances[name] for distances in found) for name in (suite, f"{suite}_swap")}
    with capsys.disabled():
        for name, distance in least.items():
            print(f"\nnearest of {len(found)} to an official state of {name}: {100 * distance:.1f} cm")  # noqa: T201
    assert min(least.values()) > HELD_OUT


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10"])
def test_no_shipped_layout_of_any_task_is_there_twice_or_an_official_state(suite, capsys):
    """Chance brings the layouts of two objects closest, so that fewer centimetres are required than above."""
    least, apart = {suite: [], f"{suite}_swap": []}, []
    for task in envs.tasks(suite):
        env = make(suite, task.index, render=False)
        starts = [env.model.joint(one.joints[0]).qposadr[0] for one in env.raw.objects_dict.values()]
        near, places = [], []
        for distances in shipped_layouts(env):  # restores the next layout
            near.append(distances)
            places.append([env.data.qpos[start : start + 2].copy() for start in starts])
        for official, distances in least.items():
            distances.append(min(one[official] for one in near))
        env.close()
        found = np.array(places)
        between = np.linalg.norm(found[:, None] - found, axis=-1).max(axis=-1)
        apart.append(between[~np.eye(len(found), dtype=bool)].min())
        assert len(found) == 60
    with capsys.disabled():
        for name, distances in {**least, "another of the task": apart}.items():
            task = int(np.argmin(distances))
            print(f"\n{suite}, 60 a task: {100 * distances[task]:.1f} cm to {name}, in task {task}")  # noqa: T201
    assert min(*map(min, least.values()), *apart) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "index"),
    [
        (suite, index)
        for suite, pair in (
            ("libero_object", (0, 3)),
            ("libero_spatial", (0, 1)),
            ("libero_goal", (1, 5)),
            ("libero_10", (0, 4)),
        )
        for index in pair
    ],
)
def test_the_planners_solve_random_layouts_at_the_first_try(suite, index, capsys):
    env = make(suite, index, render=False)
    solved = sum(record(env, 1000 * episode, ONCE, layout="random") is not None for episode in range(6))
    env.close()
    with capsys.disabled():
        print(f"\n{suite} {index}: {solved} of 6")  # noqa: T201
    assert solved >= 3


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial", "libero_goal", "libero_10"])
def test_the_planners_solve_partial_layouts_at_the_first_try(suite, capsys):
    solved, start = [], process_time()
    for task in envs.tasks(suite):
        env = make(suite, task.index, render=False)
        for episode in range(3):
            solved.append(record(env, 1000 * episode + 7, ONCE, layout="partial") is not None)
        env.close()
    seconds = (process_time() - start) / sum(solved)
    with capsys.disabled():
        print(f"\n{suite}, partial: {sum(solved)} of {len(solved)}, {seconds:.1f} s each")  # noqa: T201
    assert sum(solved) >= 24
