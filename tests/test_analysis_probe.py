"""Readers, the sweep, the answer head and the report on a few small scenes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file

from tests.synthetic_scenes import scenes
from vega_policy.analysis import page
from vega_policy.analysis.answers import AnswerModel, AnswerTraining, Codec, Features, answer, train
from vega_policy.analysis.comparisons import comparison_readers
from vega_policy.analysis.measures import HEADLINE, METRICS, Setup, measure, value
from vega_policy.analysis.pictures import gate_over, match, principal_colours
from vega_policy.analysis.probe import gates_of
from vega_policy.analysis.questions import Question
from vega_policy.analysis.readouts import UNTRAINED, Readout, prior_readers, untrained_copy
from vega_policy.analysis.reasoning import Eyes, compare, question_set
from vega_policy.analysis.recording import Episode, write_recording
from vega_policy.analysis.scenes import Scene
from vega_policy.analysis.settings import decode
from vega_policy.analysis.sweep import SceneSet, Sweep, sweep
from vega_policy.analysis.tokens import token_geometry
from vega_policy.parts import BackboneConfig, FusionConfig, PriorConfig
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
EYES = Eyes(SMALL, FusionConfig(), 64, 4)
VAE = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
LATENTS = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [0.5, 1.5, 1.0, 0.7]}
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 3,
    "ffn_dim": 64,
    "text_dim": 20,
    "freq_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
}


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
        one.things,
    )


@pytest.fixture(scope="module")
def few():
    return SceneSet("few", [turned(one, index) for index, one in enumerate(scenes(5))])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stand-in for trained weights: a small Wan whose weights a few training steps have moved."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(5)
    AutoencoderKLWan(**VAE, **LATENTS).save_pretrained(folder / "vae")
    transformer = WanTransformer3DModel(**TRANSFORMER)
    optimizer = torch.optim.SGD(transformer.parameters(), 0.1)
    for _ in range(3):
        noisy = torch.randn(2, 4, 1, 8, 8)
        out = transformer(noisy, torch.tensor([300.0, 300.0]), torch.zeros(2, 4, 20)).sample
        optimizer.zero_grad()
        (out - noisy).square().mean().backward()
        optimizer.step()
    transformer.save_pretrained(folder / "transformer")
    save_file({"prompt": torch.randn(2, 20)}, folder / "empty_prompt.safetensors")
    return folder


def small_wan(checkpoint):
    return PriorConfig(name="wan2.1_t2v_1.3b", path=str(checkpoint), dtype="float32")


def test_one_pass_gives_every_layer_and_noise_level_as_the_prior_itself_would(checkpoint, few):
    config, pictures = small_wan(checkpoint), few.pictures()[:3]
    reader = prior_readers(config, GRID, [0, 2], [0.0, 0.3])[0]
    found = dict(reader.read(pictures, reader.readouts))
    assert len(found) == 4
    for readout, tokens in found.items():
        prior = make_prior(replace(config, layer=readout.layer, noise_level=readout.noise_level), GRID)
        expected = prior(pictures[:, None, None])[:, 0].flatten(2).mT
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_trained_weights_come_with_an_untrained_copy_of_the_same_architecture(checkpoint):
    config = replace(small_wan(checkpoint), layer=2, engine="plain")
    copy, trained = untrained_copy(config, GRID), make_prior(config, GRID)
    shapes = [{name: part.shape for name, part in prior.state_dict().items()} for prior in (copy, trained)]
    shapes[0].pop("prompt"), shapes[1].pop("prompt")
    assert shapes[0] == shapes[1]
    assert copy.fingerprint != trained.fingerprint
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


def test_all_that_a_prior_is_compared_with_lies_on_the_same_grid(checkpoint, few):
    prior = prior_readers(small_wan(checkpoint), GRID, [0], [0.3])[0]
    names = ["semantic", "vae", "random", "pixels", "position"]
    for reader in comparison_readers(names, prior, SMALL, GRID):
        tokens = dict(reader.read(few.pictures()[:2], reader.readouts))[Readout(reader.label)]
        assert tokens.shape[:2] == (2, 16), reader.label
        assert tokens.isfinite().all()
    with pytest.raises(ValueError, match=r"compare: expected entries of semantic.*; got depth"):
        comparison_readers(["depth"], prior, SMALL, GRID)


@pytest.fixture(scope="module")
def found(checkpoint, few, tmp_path_factory):
    """A sweep with trained weights, their untrained copy and pixels; and its cache."""
    readers = prior_readers(small_wan(checkpoint), GRID, [0, 2], [0.3])
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
    geometry = [token_geometry(scene.views, GRID, len(scene.things)) for scene in few.scenes]
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


def test_an_answer_head_reads_a_planted_count_in_unseen_scenes_and_guesses_when_blind():
    options = ("0", "1", "2", "3")
    asked = [
        Question(scene, "object_count", "How many?", options, choice=str(scene % 4)) for scene in range(64)
    ]
    config = EYES.model(PriorConfig(name="none"))
    channels = AnswerModel(config, 1).eyes.backbone.image_encoder.channels
    planted = torch.zeros(64, 4, channels, *GRID)
    for scene in range(64):
        planted[scene, :, scene % 4] = 3.0
    features, codec = Features(planted, None), Codec(asked[:48])
    how = AnswerTraining(steps=80, batch=32, rate=3e-3)
    tested = codec.batch(asked[48:])
    right = {}
    for name, shown in {"seeing": features, "blind": features.mean()}.items():
        model, _ = train(config, codec, codec.batch(asked[:48]), shown, how)
        given = answer(model, codec, tested, shown)
        right[name] = np.mean(
            [one == question.choice for one, question in zip(given, asked[48:], strict=True)]
        )
    assert right["seeing"] == 1.0
    assert right["blind"] == 0.25, "one answer to all"


def test_the_frozen_encoders_of_an_answer_head_stay_frozen_and_the_rest_learns():
    model = AnswerModel(EYES.model(PriorConfig(name="random")), 3)
    learning = {
        name.split(".")[1] if name.startswith("eyes") else name.split(".")[0]
        for name, part in model.named_parameters()
        if part.requires_grad
    }
    assert {"backbone", "fusion", "project", "queries", "attention", "name", "number", "box"} <= learning
    frozen = {name for name, part in model.named_parameters() if not part.requires_grad}
    assert any("image_encoder" in name for name in frozen)
    assert not any("prior" in name.split(".") for name, _ in model.named_parameters())


def test_the_comparison_has_every_model_and_control_and_a_page_shows_them(tmp_path):
    shown = scenes(40)
    asked = question_set(shown, per_kind=60, texts=5)
    result = compare(shown, asked, EYES, PriorConfig(name="random", seed=3), AnswerTraining(steps=3, batch=8))
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
