"""Feature extractors, the sweep and the report on a few small scenes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.policies import SMALL_ENCODERS
from tests.synthetic_scenes import scenes
from vega_policy.analysis import decode
from vega_policy.analysis.features import (
    UNTRAINED,
    FeatureSpec,
    baseline_extractors,
    build_untrained_copy,
    frames_of,
    prior_extractors,
)
from vega_policy.analysis.geometry import (
    HEADLINE,
    METRICS,
    Measurement,
    SceneSet,
    Sweep,
    match_tokens,
    measure,
    run_sweep,
    token_geometry,
)
from vega_policy.analysis.probe import principal_colours, verdict
from vega_policy.data.scenes import Scene
from vega_policy.model.config import BackboneConfig, PriorConfig
from vega_policy.priors import make_prior

GRID = (4, 4)
SMALL = BackboneConfig(
    width=32,
    depth=1,
    heads=2,
    freeze_image_encoder=True,
    freeze_text_encoder=True,
    latents=4,
    **SMALL_ENCODERS,
)


def turned(one, seed):
    """Return a scene with views of a slanted plane from different places."""
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


def test_one_pass_gives_the_features_of_every_layer_and_noise_level(wan_checkpoint, few):
    config, frames = small_wan(wan_checkpoint), frames_of(few.scenes)[:3]
    extractor = prior_extractors(config, GRID, [0, 2], [0.0, 0.3])[0]
    found = dict(extractor.extract(frames, extractor.specs))
    assert len(found) == 4
    for spec, tokens in found.items():
        prior = make_prior(replace(config, layer=spec.layer, noise_level=spec.noise_level), GRID)
        expected = prior(frames[:, None, None])[:, 0].flatten(2).mT
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_trained_weights_come_with_an_untrained_copy_of_the_same_architecture(wan_checkpoint):
    config = replace(small_wan(wan_checkpoint), layer=2, engine="plain")
    copy, trained = build_untrained_copy(config, GRID), make_prior(config, GRID)
    shapes = [{name: part.shape for name, part in prior.state_dict().items()} for prior in (copy, trained)]
    shapes[0].pop("prompt"), shapes[1].pop("prompt")
    assert shapes[0] == shapes[1]
    first = [next(prior.transformer.parameters()) for prior in (copy, trained)]
    assert not torch.equal(*first)
    assert copy.untrained
    assert not trained.untrained
    extractors = prior_extractors(config, GRID, [2], [0.3])
    assert [extractor.name for extractor in extractors] == [config.name, UNTRAINED]
    seeded = prior_extractors(PriorConfig(name="wan_tiny_untrained"), GRID, [1], [0.3])
    assert [extractor.name for extractor in seeded] == ["wan_tiny_untrained"], "it is untrained itself"


def test_a_copy_of_anything_but_wan_is_refused():
    with pytest.raises(ValueError, match=r"expected a Wan prior .*; got 'random'"):
        build_untrained_copy(PriorConfig(name="random"), GRID)


def test_all_baselines_have_the_same_token_grid(wan_checkpoint, few):
    prior = prior_extractors(small_wan(wan_checkpoint), GRID, [0], [0.3])[0]
    names = ["semantic", "vae", "random", "pixels", "position"]
    for extractor in baseline_extractors(names, prior, SMALL, GRID):
        tokens = dict(extractor.extract(frames_of(few.scenes)[:2], extractor.specs))
        tokens = tokens[FeatureSpec(extractor.name)]
        assert tokens.shape[:2] == (2, 16), extractor.name
        assert tokens.isfinite().all()
    with pytest.raises(ValueError, match=r"baselines: expected entries of semantic.*; got depth"):
        baseline_extractors(["depth"], prior, SMALL, GRID)


@pytest.fixture(scope="module")
def found(wan_checkpoint, few, tmp_path_factory):
    """A sweep with trained weights, their untrained copy and pixels; and its cache."""
    extractors = prior_extractors(small_wan(wan_checkpoint), GRID, [0, 2], [0.3])
    extractors += baseline_extractors(["pixels"], extractors[0], SMALL, GRID)
    cache = tmp_path_factory.mktemp("cache")
    sweep = run_sweep(few, extractors, extractors[0].specs[1], Measurement(GRID), cache)
    return sweep, extractors[0], cache


def test_the_sweep_measures_all_features_on_every_metric(found):
    table = found[0].table()
    assert len(table) == 5
    for numbers in table.values():
        assert all(np.isfinite(numbers[name].value) for name in METRICS)
        assert all(numbers[name].low <= numbers[name].high for name in HEADLINE)


def test_cached_measurements_are_not_computed_again(found, few):
    sweep, extractor, cache = found

    class Unavailable:
        name, fingerprint, specs = extractor.name, extractor.fingerprint, extractor.specs

        def extract(self, frames, specs):
            raise AssertionError("not in the cache")

    again = run_sweep(few, [Unavailable()], sweep.default, Measurement(GRID), cache)
    for spec, sums in again.sums.items():
        for name, numbers in sums.items():
            np.testing.assert_array_equal(numbers, sweep.sums[spec][name])
    with pytest.raises(AssertionError, match="not in the cache"):
        run_sweep(few, [Unavailable()], sweep.default, Measurement(GRID, voxel=0.2), cache)


def test_the_verdict_follows_the_intervals_and_names_untrained_weights(found):
    sweep = found[0]
    trained, copy = sweep.default, sweep.untrained_copy()
    assert copy is not None
    sums = sweep.sums[trained]
    better = {name: part.copy() for name, part in sums.items()}
    better["depth_squares"][:, 0] *= 0.01
    cases = {
        "shows no difference on": (sums, sums),
        "is better than its untrained copy on depth R2": (better, sums),
        "is worse than it on depth R2": (sums, better),
    }
    for expected, (first, second) in cases.items():
        assert expected in verdict(Sweep({trained: first, copy: second}, trained), False, 5)
    assert "untrained (drawn from a seed)" in verdict(sweep, True, 5)
    assert "One scene" in verdict(sweep, False, 1)


def test_probes_find_planted_geometry_and_none_in_noise(few):
    geometry = [token_geometry(scene.views, GRID, len(scene.objects)) for scene in few.scenes]
    depth = torch.cat([place.depth for place in geometry])
    mixed = torch.cat([depth[..., None], torch.ones(*depth.shape, 1), depth[..., None] ** 2], dim=-1)
    planted = measure(mixed.float(), few.scenes, geometry, Measurement(GRID))
    noise = torch.randn(*depth.shape, 8, generator=torch.Generator().manual_seed(0))
    nothing = measure(noise, few.scenes, geometry, Measurement(GRID))
    assert METRICS["depth_r2"].value(planted).low > 0.99
    assert METRICS["depth_cm"].value(planted).value < 0.5
    assert METRICS["depth_r2"].value(nothing).value < 0.2


def test_scenes_without_objects_or_too_few_scenes_give_nan(few):
    bare = [Scene(scene.name, scene.views) for scene in few.scenes[:2]]
    geometry = [token_geometry(scene.views, GRID) for scene in bare]
    sums = measure(torch.randn(8, 16, 4), bare, geometry, Measurement(GRID))
    assert np.isfinite(METRICS["raw"].value(sums).value)
    for name in ("object_cm", "depth_r2", "turn_deg"):
        assert np.isnan(METRICS[name].value(sums).value)


def test_principal_colours_follow_the_largest_variation():
    ramp = torch.linspace(0, 1, 16).reshape(1, 16, 1) * torch.tensor([3.0, 4.0, 0.0])
    colours = principal_colours(ramp, GRID)
    first = colours.reshape(16, 3)[:, 0]
    steps = np.diff(first)
    assert (steps >= 0).all() or (steps <= 0).all()
    assert np.ptp(first) == pytest.approx(1.0)


def test_matched_tokens_show_the_same_point(few):
    place = token_geometry(few.scenes[0].views, GRID)
    tokens = torch.cat([place.points[:2] * 30, -place.points[:2] * 7], dim=-1).sin()
    first, second, right = match_tokens(tokens, place, 0, 0.1)
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
        ({"questions": None}, r"questions: expected a group of fields \(scenes, .*got None"),
        ({"prior": None}, r"prior: expected a group of fields \(name, .*got None"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    base = {
        "prior": {"name": "wan_tiny"},
        "backbone": {},
        "scenes": {"name": "s", "suite": "libero_spatial"},
        "output_dir": "x",
    }
    assert decode(base).grid == (14, 14)
    with pytest.raises(ValueError, match=message):
        decode({**base, **change})
