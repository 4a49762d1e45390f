"""Readers, the sweep and the report on a few small scenes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.synthetic_scenes import scenes
from vega_policy.analysis import report as page
from vega_policy.analysis.config import decode
from vega_policy.analysis.features import token_geometry
from vega_policy.analysis.linear_probes import (
    HEADLINE,
    METRICS,
    UNTRAINED,
    Readout,
    Setup,
    measure,
    prior_readers,
    untrained_copy,
    value,
)
from vega_policy.analysis.report import match, principal_colours
from vega_policy.analysis.sweep import SceneSet, Sweep, comparison_readers, sweep
from vega_policy.data.scenes import Scene
from vega_policy.model.config import BackboneConfig, PriorConfig
from vega_policy.priors import make_prior

GRID = (4, 4)
SMALL = BackboneConfig(
    width=32,
    depth=1,
    heads=2,
    pretrained=False,
    freeze_image_encoder=True,
    freeze_text_encoder=True,
    latents=4,
)


def turned(one, seed):
    """A scene whose views look at a slanted plane from different places."""
    rng = np.random.default_rng(seed)
    views = one.views
    poses = views.poses.copy()
    poses[:, :3, 3] = rng.uniform(-0.05, 0.05, (len(views), 3))
    for pose, angle in zip(poses, rng.uniform(-0.1, 0.1, len(views)), strict=True):
        pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    rows = np.arange(views.depth.shape[1], dtype=np.float32)[None, :, None]
    depth = np.broadcast_to(1.0 + 0.01 * rows * rng.uniform(0.5, 1.5, (len(views), 1, 1)), views.depth.shape)
    lens = np.array([[30.0, 0, 16], [0, 30.0, 16], [0, 0, 1]])
    return Scene(
        one.name,
        replace(
            views,
            poses=poses,
            depth=depth.astype(np.float32),
            intrinsics=np.repeat(lens[None], len(views), axis=0),
        ),
        one.objects,
    )


@pytest.fixture(scope="module")
def few():
    return SceneSet("few", [turned(one, index) for index, one in enumerate(scenes(5))])


def small_wan(wan_checkpoint):
    return PriorConfig(name="wan2.1_t2v_1.3b", path=str(wan_checkpoint), dtype="float32")


def test_one_pass_gives_every_layer_and_noise_level_as_the_prior_itself_would(wan_checkpoint, few):
    config, pictures = small_wan(wan_checkpoint), few.pictures()[:3]
    reader = prior_readers(config, GRID, [0, 2], [0.0, 0.3])[0]
    found = dict(reader.read(pictures, reader.readouts))
    assert len(found) == 4
    for readout, tokens in found.items():
        prior = make_prior(replace(config, layer=readout.layer, noise_level=readout.noise_level), GRID)
        expected = prior(pictures[:, None, None])[:, 0].flatten(2).mT
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_trained_weights_come_with_an_untrained_copy_of_the_same_architecture(wan_checkpoint):
    config = replace(small_wan(wan_checkpoint), layer=2, engine="plain")
    copy, trained = untrained_copy(config, GRID), make_prior(config, GRID)
    shapes = [{name: part.shape for name, part in prior.state_dict().items()} for prior in (copy, trained)]
    shapes[0].pop("prompt"), shapes[1].pop("prompt")
    assert shapes[0] == shapes[1]
    first = [next(prior.transformer.parameters()) for prior in (copy, trained)]
    assert not torch.equal(*first)
    assert copy.untrained
    assert not trained.untrained
    assert [reader.label for reader in prior_readers(config, GRID, [2], [0.3])] == [config.name, UNTRAINED]
    seeded = prior_readers(PriorConfig(name="wan_tiny_untrained"), GRID, [1], [0.3])
    assert [reader.label for reader in seeded] == ["wan_tiny_untrained"], (
        "nothing to compare: it is untrained itself"
    )


def test_a_copy_of_anything_but_wan_is_refused():
    with pytest.raises(ValueError, match="copy is built of Wan priors; got 'random'"):
        untrained_copy(PriorConfig(name="random"), GRID)


def test_all_that_a_prior_is_compared_with_lies_on_the_same_grid(wan_checkpoint, few):
    prior = prior_readers(small_wan(wan_checkpoint), GRID, [0], [0.3])[0]
    names = ["semantic", "vae", "random", "pixels", "position"]
    for reader in comparison_readers(names, prior, SMALL, GRID):
        tokens = dict(reader.read(few.pictures()[:2], reader.readouts))[Readout(reader.label)]
        assert tokens.shape[:2] == (2, 16), reader.label
        assert tokens.isfinite().all()
    with pytest.raises(ValueError, match=r"compare: expected entries of semantic.*; got depth"):
        comparison_readers(["depth"], prior, SMALL, GRID)


@pytest.fixture(scope="module")
def found(wan_checkpoint, few, tmp_path_factory):
    """A sweep with trained weights, their untrained copy and pixels; and its cache."""
    readers = prior_readers(small_wan(wan_checkpoint), GRID, [0, 2], [0.3])
    readers += comparison_readers(["pixels"], readers[0], SMALL, GRID)
    cache = tmp_path_factory.mktemp("cache")
    return sweep(few, readers, readers[0].readouts[1], Setup(GRID), cache), readers, cache


def test_the_sweep_measures_every_readout_on_every_metric(found):
    table = found[0].table()
    assert len(table) == 5
    for numbers in table.values():
        assert all(np.isfinite(numbers[name].value) for name in METRICS)
        assert all(numbers[name].low <= numbers[name].high for name in HEADLINE)


def test_what_was_measured_once_is_not_computed_again(found, few):
    class Asleep:
        label, fingerprint, readouts = found[1][0].label, found[1][0].fingerprint, found[1][0].readouts

        def read(self, pictures, wanted):
            raise AssertionError("the cache should have answered")

    again = sweep(few, [Asleep()], found[0].default, Setup(GRID), found[2])
    for readout, sums in again.sums.items():
        for name, numbers in sums.items():
            np.testing.assert_array_equal(numbers, found[0].sums[readout][name])
    with pytest.raises(AssertionError, match="the cache should have answered"):
        sweep(few, [Asleep()], found[0].default, Setup(GRID, voxel=0.2), found[2])


def test_the_verdict_is_by_intervals_and_says_what_is_untrained(found):
    trained, copy = found[0].default, found[0].twin()
    assert copy is not None
    assert "shows no difference on" in page.verdict(
        Sweep({trained: found[0].sums[trained], copy: found[0].sums[trained]}, trained), False, 5
    )
    better = {name: part.copy() for name, part in found[0].sums[trained].items()}
    better["depth_squares"][:, 0] *= 0.01
    said = page.verdict(Sweep({trained: better, copy: found[0].sums[trained]}, trained), False, 5)
    assert "beats its untrained copy on depth R2" in said
    said = page.verdict(Sweep({trained: found[0].sums[trained], copy: better}, trained), False, 5)
    assert "loses to it on depth R2" in said
    assert "untrained (a seed's)" in page.verdict(found[0], True, 5)
    assert "One scene" in page.verdict(found[0], False, 1)


def test_planted_geometry_is_found_by_the_measures(few):
    geometry = [token_geometry(scene.views, GRID, len(scene.objects)) for scene in few.scenes]
    depth = torch.cat([place.depth for place in geometry])
    mixed = torch.cat([depth[..., None], torch.ones(*depth.shape, 1), depth[..., None] ** 2], dim=-1)
    planted = measure(mixed.float(), few.scenes, geometry, Setup(GRID))
    noise = torch.randn(*depth.shape, 8, generator=torch.Generator().manual_seed(0))
    nothing = measure(noise, few.scenes, geometry, Setup(GRID))
    assert value(planted, "depth_r2").low > 0.99
    assert value(planted, "depth_cm").value < 0.5
    assert value(nothing, "depth_r2").value < 0.2


def test_scenes_without_things_or_enough_of_them_leave_gaps_not_numbers(few):
    bare = [Scene(scene.name, scene.views) for scene in few.scenes[:2]]
    geometry = [token_geometry(scene.views, GRID) for scene in bare]
    sums = measure(torch.randn(8, 16, 4), bare, geometry, Setup(GRID))
    assert np.isfinite(value(sums, "raw").value)
    for name in ("object_cm", "depth_r2", "turn_deg"):
        assert np.isnan(value(sums, name).value)


def test_principal_colours_follow_the_largest_variation():
    ramp = torch.linspace(0, 1, 16).reshape(1, 16, 1) * torch.tensor([3.0, 4.0, 0.0])
    colours = principal_colours(ramp, GRID)
    first = colours.reshape(16, 3)[:, 0]
    steps = np.diff(first)
    assert (steps >= 0).all() or (steps <= 0).all()
    assert np.ptp(first) == pytest.approx(1.0)


def test_lines_join_tokens_of_the_same_point(few):
    place = token_geometry(few.scenes[0].views, GRID)
    tokens = torch.cat([place.points[:2] * 30, -place.points[:2] * 7], dim=-1).sin()
    first, second, right = match(tokens, place, 0, 0.1)
    assert len(first) == len(second) == len(right) > 0
    apart = (place.points[0, first] - place.points[1, second]).norm(dim=-1)
    assert ((apart <= 0.1) == right).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": {"name": "none"}}, "nothing to probe"),
        ({"frame_size": 100}, "multiple of 16; got 100"),
        ({"scenes": {"name": "x"}}, "either a suite or folders"),
        ({"sweep": {"noise_levels": [0.3, 1.3]}}, r"got \[1.3\]"),
        ({"voxels": 0.1}, "voxels"),
        (
            {"questions": None},
            r"questions: expected a group of fields \(scenes, .*None.*scenes=0 asks nothing",
        ),
        ({"prior": None}, r"prior: expected a group of fields \(name, .*got None"),
    ],
)
def test_wrong_settings_end_in_a_message(change, message):
    base = {
        "prior": {"name": "wan_tiny"},
        "backbone": {},
        "scenes": {"name": "s", "suite": "libero_spatial"},
        "output_dir": "x",
    }
    assert decode(base).grid == (14, 14)
    with pytest.raises(ValueError, match=message):
        decode({**base, **change})
