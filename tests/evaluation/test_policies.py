from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from tests.evaluations import STATISTICS, evaluation_config, noise_for, observe, save_checkpoint
from tests.point_world import CAMERA
from tests.policies import CAMERAS, tiny_config
from vega_policy.checkpoints import find_checkpoint
from vega_policy.cli import commands
from vega_policy.evaluation.compare import compare_runs, comparison_notes
from vega_policy.evaluation.episodes import read_episodes
from vega_policy.evaluation.evaluate import evaluate_checkpoint
from vega_policy.evaluation.policies import (
    ObservationBatch,
    checkpoint_fingerprint,
    describe,
    load_lerobot_policy,
)
from vega_policy.evaluation.report import format_perturbations
from vega_policy.model.config import PriorConfig
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.run_dir import OtherRunError


@pytest.fixture(scope="module")
def vega(tmp_path_factory):
    torch.manual_seed(0)
    policy = VegaPolicy(tiny_config(PriorConfig(name="random")))
    return save_checkpoint(policy, tmp_path_factory.mktemp("vega"), STATISTICS)


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    """An ACT policy for the point world of these tests, with a mean frame for its blind ablation."""
    torch.manual_seed(0)
    config = ACTConfig(
        device="cpu",
        chunk_size=6,
        n_action_steps=3,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        pretrained_backbone_weights=None,
        input_features={
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    )
    one = {"mean": torch.zeros(2), "std": torch.ones(2)}
    pixels = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    statistics = {"action": one, "observation.state": one, CAMERA: pixels}
    folder = save_checkpoint(ACTPolicy(config), tmp_path_factory.mktemp("act"), statistics)
    save_file(
        {CAMERA: np.zeros((3, 32, 32), np.float32)}, folder / "pretrained_model/mean_frames.safetensors"
    )
    return folder


def test_a_chunk_holds_the_actions_that_lerobots_own_queue_would_give(vega):
    folder = find_checkpoint(vega)
    policy = load_lerobot_policy(folder, device="cpu")
    batch, noise = observe(2), noise_for(policy, 2)
    chunk = policy.chunk(batch, noise)
    assert chunk.shape == (2, 4, 7)

    stock = VegaPolicy.from_pretrained(folder)
    preprocess, postprocess = make_pre_post_processors(stock.config, pretrained_path=str(folder))
    frames = {key: torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 for key, pixels in batch.frames.items()}
    inputs = {**frames, "observation.state": torch.from_numpy(batch.state), "task": batch.instructions}
    for step in range(2):
        action = postprocess(stock.select_action(preprocess(inputs), noise=torch.from_numpy(noise)))
        np.testing.assert_allclose(chunk[:, step], action.numpy(), atol=1e-6)


def test_actions_come_in_the_units_of_the_checkpoints_own_statistics(vega):
    policy = load_lerobot_policy(find_checkpoint(vega), device="cpu")
    batch, noise = observe(2), noise_for(policy, 2)
    normalised = policy.policy.predict_action_chunk(
        policy.preprocessor(
            {
                **{k: torch.from_numpy(v).permute(0, 3, 1, 2) / 255 for k, v in batch.frames.items()},
                "observation.state": torch.from_numpy(batch.state),
                "task": batch.instructions,
            }
        ),
        noise=torch.from_numpy(noise),
    )
    expected = (normalised.numpy() + 1) / 2 * (5 - -3) - 3
    np.testing.assert_allclose(policy.chunk(batch, noise), expected, atol=1e-5)


def test_a_checkpoint_says_what_it_was_trained_on(vega, act):
    described = load_lerobot_policy(find_checkpoint(vega), device="cpu").description
    assert described.cameras == CAMERAS
    assert (described.state_size, described.action_size, described.action_steps) == (8, 7, 2)
    assert described.prior == "random (untrained prior)"
    longer = load_lerobot_policy(find_checkpoint(act), device="cpu", action_steps=5).description
    assert (longer.name, longer.prior, longer.action_steps) == ("act", "none", 5)


def test_a_row_does_not_depend_on_what_the_other_rows_hold(vega):
    policy = load_lerobot_policy(find_checkpoint(vega), device="cpu")
    busy, noise = observe(3), noise_for(policy, 3)
    busy.instructions[1:] = ["put both of the moka pots on the stove and close the drawer", ""]
    idle = ObservationBatch(
        {camera: pixels * np.uint8([1, 0, 0]).reshape(3, 1, 1, 1) for camera, pixels in busy.frames.items()},
        busy.state * np.float32([[1], [0], [0]]),
        [busy.instructions[0], "", ""],
    )
    calm = noise * np.float32([1, 0, 0]).reshape(3, 1, 1)
    np.testing.assert_array_equal(policy.chunk(busy, noise)[0], policy.chunk(idle, calm)[0])


def test_text_is_padded_to_the_longest_instruction_of_the_suite_whatever_a_batch_holds(vega):
    policy = load_lerobot_policy(find_checkpoint(vega), device="cpu")
    backbone, lengths = policy.policy.model.backbone, []
    encode = backbone.encode_context

    def recorded(*arguments):
        context, mask = encode(*arguments)
        lengths.append(context.shape[1])
        return context, mask

    backbone.encode_context = recorded
    long = "put both of the moka pots on the stove and close the drawer"
    for instructions, batched in [([], "lift"), ([], long), (["lift", long], "lift"), (["lift", long], long)]:
        policy.reset(instructions)
        batch = replace(observe(2), instructions=[batched] * 2)
        policy.chunk(batch, noise_for(policy, 2))
    assert lengths[0] < lengths[1] == lengths[2] == lengths[3]


def test_frames_that_never_change_are_encoded_once_and_give_the_same_actions(vega):
    policy = load_lerobot_policy(find_checkpoint(vega), device="cpu")
    policy.reset()
    noise = noise_for(policy, 3)
    first, second = observe(3, seed=0), observe(3, seed=1)
    blind = [replace(batch, frames=first.frames) for batch in (first, second)]
    expected = [policy.chunk(batch, noise) for batch in blind]
    encoded = _count_calls(policy.policy.model.backbone, "encode")
    constant = [policy.chunk(batch.with_constant_frames(first.frames), noise) for batch in blind]
    np.testing.assert_array_equal(constant, expected)
    assert len(encoded) == 1


def _count_calls(owner, name: str) -> list[None]:
    calls: list[None] = []
    original: Callable = getattr(owner, name)

    def counted(*arguments):
        calls.append(None)
        return original(*arguments)

    setattr(owner, name, counted)
    return calls


def test_a_policy_that_draws_its_own_noise_is_repeatable_and_leaves_the_global_generator_alone(act):
    policy = load_lerobot_policy(find_checkpoint(act), device="cpu")
    assert policy.noise_shape is None
    batch = ObservationBatch(
        {CAMERA: np.zeros((2, 32, 32, 3), np.uint8)}, np.zeros((2, 2), np.float32), ["go", "go"]
    )
    before = torch.get_rng_state()
    np.testing.assert_array_equal(policy.chunk(batch, None), policy.chunk(batch, None))
    assert torch.equal(torch.get_rng_state(), before)


def test_several_suites_share_the_simulators_and_have_a_folder_each(act, tmp_path):
    both = evaluate_checkpoint(evaluation_config(act, tmp_path / "both", "env.suite=[near,far]"))
    assert list(both) == ["near", "far"]
    for suite in both:
        evaluate_checkpoint(evaluation_config(act, tmp_path / suite, f"env.suite={suite}"))
        assert read_episodes(tmp_path / "both" / suite) == read_episodes(tmp_path / suite)
        assert both[suite]["settings"]["suite"] == suite


FILES = {"report": "report.html", "episodes": "episodes.parquet"}


def test_a_list_of_one_suite_has_a_folder_for_it_as_a_longer_list_has(act, tmp_path):
    config = evaluation_config(act, tmp_path / "list", "env.suite=[near]")
    printed = commands.evaluate.run(OmegaConf.create(config))
    assert len(read_episodes(tmp_path / "list" / "near")) > 0
    lines = [f"{kind}: {tmp_path}/list/near/{name}" for kind, name in FILES.items()]
    assert printed.splitlines()[-2:] == lines  # and no videos, since videos=0
    assert not (tmp_path / "list" / "episodes.parquet").exists()


def test_perturbations_are_paired_with_none_by_initial_state_and_share_a_table(act, tmp_path):
    axes = "env.perturbation=[none,light,layout]"
    summaries = evaluate_checkpoint(evaluation_config(act, tmp_path / "all", axes))
    assert list(summaries) == [f"two_points/{axis}" for axis in ("none", "light", "layout")]
    rows = {axis: read_episodes(tmp_path / "all" / axis) for axis in ("none", "light", "layout")}
    for axis, results in rows.items():
        assert {result.perturbation for result in results} == {axis}
        assert [(result.key, result.seed) for result in results] == [(r.key, r.seed) for r in rows["none"]]
    hashes = {axis: [result.initial_hash for result in results] for axis, results in rows.items()}
    assert hashes["none"] == hashes["light"] != hashes["layout"]
    pair = summaries["two_points/layout"]["against_none"]
    shares = [np.mean([result.success for result in rows[axis]]) for axis in ("layout", "none")]
    assert pair["difference"] == pytest.approx(shares[0] - shares[1])
    folders = tmp_path / "all" / "none", tmp_path / "all" / "layout"
    assert compare_runs(*folders)["all"]["difference"] == -pair["difference"]
    assert any("perturbation: first none, second layout" in note for note in comparison_notes(*folders))
    table = format_perturbations(summaries).splitlines()
    assert [line.split()[0] for line in table] == ["perturbation", "none", "light", "layout"]
    assert "(+0.0 [" in table[2]
    page = (tmp_path / "all" / "report.html").read_text()
    for axis in rows:
        assert f"starts/two_points_{axis}.png" in page
        assert (tmp_path / "all" / "starts" / f"two_points_{axis}.png").is_file()
    alone = evaluate_checkpoint(evaluation_config(act, tmp_path / "alone"))["two_points"]
    assert read_episodes(tmp_path / "alone") == rows["none"]
    assert "perturbation" not in alone["settings"]
    with pytest.raises(ValueError, match="perturbation: expected one of light, layout; got 'fog'"):
        evaluate_checkpoint(evaluation_config(act, tmp_path / "fog", "env.perturbation=fog"))


def test_the_command_evaluates_a_checkpoint_and_its_blind_ablation(act, tmp_path):
    config = evaluation_config(act, tmp_path / "run", "ablations=[none,blind]", "processes=2")
    summary = evaluate_checkpoint(config)["two_points"]
    assert summary["policy"] == "act"
    assert {result.ablation for result in read_episodes(tmp_path / "run")} == {"none", "blind"}
    assert len(read_episodes(tmp_path / "run")) == 12
    assert summary["settings"]["action_steps"] is None
    assert all(result.length <= 3 * result.policy_calls for result in read_episodes(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").is_file()


def test_retrained_weights_are_not_mixed_into_an_old_evaluation(act, tmp_path):
    evaluate_checkpoint(evaluation_config(act, tmp_path / "run", "tasks=[0]"))
    weights = act / "pretrained_model" / "model.safetensors"
    original = weights.read_bytes()
    before = checkpoint_fingerprint(weights.parent)
    try:
        weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        assert checkpoint_fingerprint(weights.parent) != before
        with pytest.raises(OtherRunError, match="checkpoint_sha256"):
            evaluate_checkpoint(evaluation_config(act, tmp_path / "run", "tasks=[0]"))
    finally:
        weights.write_bytes(original)


def test_a_policy_of_other_cameras_is_refused_with_both_lists(vega, tmp_path):
    with pytest.raises(ValueError, match=r"images\.image2.*offers \['observation\.images\.image'\]"):
        evaluate_checkpoint(evaluation_config(vega, tmp_path / "run"))


def test_a_missing_checkpoint_says_what_was_expected_and_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*found nothing"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "optimizer.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"config\.json.*optimizer\.bin"):
        find_checkpoint(tmp_path)


def test_a_policy_that_remembers_observations_is_refused():
    config = DiffusionConfig(
        device="cpu",
        n_obs_steps=2,
        down_dims=(8,),
        n_groups=4,
        input_features={
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (2,)),
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        horizon=8,
    )
    with pytest.raises(ValueError, match="reads 2 past observations"):
        describe(DiffusionPolicy(config), None)
