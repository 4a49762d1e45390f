"""A small Wan is trained, stopped at any moment, written as the hub has it, and read as a prior."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file

from tests.pretraining_runs import CPU, TINY, WIDTH, moving_square, settings, write_shards
from vega_policy.model.config import PriorConfig
from vega_policy.pretraining import autoencoder, export, trainer, transformer
from vega_policy.pretraining.autoencoder import (
    denormalise,
    measure_statistics,
    normalise,
    posterior_means,
    write_image_latents,
    write_latents,
)
from vega_policy.pretraining.clips import Clips, DamagedClipsError, StepRandomness
from vega_policy.pretraining.trainer import pretrain
from vega_policy.priors import PRIORS, make_prior
from vega_policy.priors.base import fingerprint_files


@pytest.fixture(autouse=True)
def smaller_still(monkeypatch):
    entry = replace(PRIORS["wan_tiny"], architecture=TINY, shipped=None, layer=1)
    monkeypatch.setitem(PRIORS, "wan_tiny", entry)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with its report."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            PRIORS, "wan_tiny", replace(PRIORS["wan_tiny"], architecture=TINY, shipped=None, layer=1)
        )
        return pretrain(settings(folder, stages=["vae", "transformer", "report", "film"]))


def test_a_few_steps_lower_both_losses_on_a_moving_square(tmp_path):
    write_shards(tmp_path / "clips")
    clips, _ = Clips.open(tmp_path / "clips", 0.3)
    run = settings(tmp_path / "run")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**TINY["vae"])
    small = replace(run.vae.learning, steps=12, batch_size=4)
    losses = fit(
        vae, autoencoder.autoencoder_loss(vae, clips, replace(run.vae, learning=small, lengths=[1]), CPU),
        small, tmp_path / "vae",
    )  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]
    network = WanTransformer3DModel(**TINY["transformer"])
    latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1, -1)
    table, singles = transformer.PromptTable({"": torch.ones(2, WIDTH)}, CPU), latents[:, None, :, :1]
    measure = transformer.make_validation(network, latents.numpy(), [""] * 8, table, CPU)
    before = measure()
    small = replace(small, steps=30, learning_rate=1e-2)
    learned = replace(run.transformer, learning=small)
    fit(
        network,
        transformer.matching_loss(
            network, latents.numpy(), singles.numpy(), [""] * 8, table, learned, CPU
        ),
        small, tmp_path / "transformer",
    )  # fmt: skip
    after = measure()
    assert all(after[name] < 0.8 * before[name] for name in before)


def fit(network, loss, learning, folder):
    """Loss before each step."""
    learns, losses = trainer.StageTrainer(network, learning, folder), []
    for step in range(learning.steps):
        value, _ = loss(StepRandomness.of_step(0, step, CPU))
        learns.update(value)
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("frames", [1, 5])
def test_2d_convolutions_of_images_and_channels_last_change_neither_results_nor_gradients(frames):
    video, found = torch.rand(1, 3, frames, 16, 16, generator=torch.Generator().manual_seed(0)), []
    for change in (lambda plain: plain, autoencoder.convolve_images_in_2d, autoencoder.use_channels_last):
        torch.manual_seed(0)
        vae = change(AutoencoderKLWan(**TINY["vae"]))
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        decoded.square().mean().backward()
        found.append([decoded, *(weight.grad for weight in vae.parameters() if weight.grad is not None)])
    for changed in found[1:]:
        torch.testing.assert_close(changed, found[0], rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_the_weights_of_another(trained, tmp_path):
    still = {"steps": 1, "batch_size": 2, "learning_rate": 0.0, "warmup": 1, "average_decay": 0.0}
    folder = pretrain(
        settings(
            tmp_path,
            start=str(trained),
            stages=["vae", "transformer", "report"],
            vae={"learning": still, "lengths": [1], "channels_last": True},
            transformer={"learning": still},
        )
    )
    for part in ("vae", "transformer"):
        before, after = (
            load_file(one / part / "diffusion_pytorch_model.safetensors") for one in (trained, folder)
        )
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    mark = fingerprint_files(trained, ["vae", "transformer"])
    assert f"started from the weights {mark}" in (folder / "README.md").read_text()


def test_a_start_of_another_architecture_or_place_is_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="start"):
        pretrain(settings(tmp_path / "first", start=str(tmp_path / "nowhere")))
    PRIORS["wan_tiny"].architecture["vae"]["base_dim"] = 4
    try:
        with pytest.raises(ValueError, match="another architecture"):
            pretrain(settings(tmp_path / "second", start=str(trained)))
    finally:
        PRIORS["wan_tiny"].architecture["vae"]["base_dim"] = 8


def test_a_run_killed_between_two_checkpoints_ends_in_the_same_weights(trained, tmp_path, monkeypatch):
    update, made = trainer.StageTrainer.update, []

    def dying(self, loss):
        made.append(self.step)
        if len(made) in (3, 7):  # once in each training, after the checkpoint of step 2
            raise KeyboardInterrupt
        return update(self, loss)

    monkeypatch.setattr(trainer.StageTrainer, "update", dying)
    run = settings(tmp_path)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretrain(run)
    folder = pretrain(run)
    assert made == [0, 1, 2, 2, 0, 1, 2, 2]
    parts = ["vae", "transformer"]
    assert fingerprint_files(folder, parts) == fingerprint_files(trained, parts)
    for part in parts:
        rows = [json.loads(line) for line in (tmp_path / part / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_a_run_whose_time_is_up_says_so_and_leaves_a_checkpoint(tmp_path):
    assert pretrain(settings(tmp_path, max_seconds=0)) is None
    assert not (tmp_path / "wan_tiny" / "vae").exists()
    assert (tmp_path / "vae" / "checkpoints" / "last" / "weights.safetensors").is_file()


def test_the_folder_is_a_prior_whose_weights_are_not_the_untrained_ones(trained):
    grid = (2, 2)
    prior = make_prior(PriorConfig(name="wan_tiny", path=str(trained)), grid)
    untrained = make_prior(PriorConfig(name="wan_tiny_untrained"), grid)
    assert not prior.untrained
    assert prior.fingerprint != untrained.fingerprint
    features = prior(torch.rand(1, 1, 1, 3, 32, 32))
    assert features.shape == (1, 1, 24, 2, 2)
    assert features.isfinite().all()
    empty = transformer.read_prompts(trained.parent / "prompts.safetensors")[""]
    assert torch.equal(prior.prompt[0, :2], empty)
    assert not prior.prompt[0, 2:].any()


def test_the_prior_noises_and_scales_time_as_the_training_does(trained):
    prior = make_prior(
        PriorConfig(name="wan_tiny", path=str(trained), noise_level=0.3, engine="plain"), (2, 2)
    )
    seen = {}
    network = prior.transformer
    network.patch_embedding.register_forward_hook(lambda _m, given, _o: seen.update(latent=given[0]))
    network.condition_embedder.register_forward_hook(lambda _m, given, _o: seen.update(time=given[0]))
    image = torch.rand(1, 1, 1, 3, 32, 32)
    prior(image)
    frames = (image[0, 0].permute(0, 2, 3, 1)[None] * 255).round().to(torch.uint8).numpy()
    latent = normalise(prior.vae, posterior_means(prior.vae, frames, CPU))
    noise = prior.noise(latent, None).expand_as(latent)
    torch.testing.assert_close(seen["latent"], 0.7 * latent + 0.3 * noise, atol=0.05, rtol=0)
    time = torch.tensor([0.3])
    torch.testing.assert_close(transformer.add_noise(latent, noise, time), 0.7 * latent + 0.3 * noise)
    given = {}

    def network_like_wans(_latent, moment, _prompt, return_dict):
        given.update(time=moment)
        return (torch.zeros_like(latent),)

    transformer.predict_velocity(network_like_wans, latent, time, prior.prompt)
    torch.testing.assert_close(given["time"], torch.tensor([300.0]))
    torch.testing.assert_close(seen["time"], torch.tensor([300.0]))


CONTINUES = {
    "learning": {"steps": 3, "batch_size": 2, "learning_rate": 3e-3, "warmup": 2},
    "single_frames": 0.0,
    "image_to_video": 1.0,
    "pure_noise": 0.5,
}


def continuing(trained, folder, *stages):
    """A run that starts from finished weights, keeps their autoencoder and learns to continue frames."""
    return settings(folder, transformer=CONTINUES, stages=["transformer", *stages], start=str(trained))


def test_a_run_that_continues_frames_says_what_its_weights_have_learned(trained, tmp_path, caplog):
    folder = pretrain(continuing(trained, tmp_path, "report", "film"))
    assert fingerprint_files(folder, ["vae"]) == fingerprint_files(trained, ["vae"])
    rows = [json.loads(line) for line in (tmp_path / "transformer/metrics.jsonl").read_text().splitlines()]
    assert all("loss_future" in row and "loss_clips" not in row for row in rows if "loss" in row)
    assert {"held_out_future_1.0", "held_out_still_1.0"} <= set().union(*rows)
    assert (tmp_path / "report" / "futures.mp4").stat().st_size
    assert "a video in which nothing moves has" in (folder / "README.md").read_text()
    read = PriorConfig(name="wan_tiny", path=str(folder), clip="future", future_slots=1)
    assert make_prior(read, (2, 2))(torch.rand(1, 1, 1, 3, 32, 32)).shape == (1, 1, 2 * 24, 2, 2)
    assert "no trained prediction" not in caplog.text
    make_prior(replace(read, path=str(trained)), (2, 2))
    assert "no trained prediction" in caplog.text


@pytest.mark.slow
def test_a_run_that_continues_frames_resumes_bitwise(trained, tmp_path, monkeypatch):
    update, made = trainer.StageTrainer.update, []

    def dying(self, loss):
        made.append(self.step)
        if len(made) == 3:
            raise KeyboardInterrupt
        return update(self, loss)

    straight = pretrain(continuing(trained, tmp_path / "straight"))
    monkeypatch.setattr(trainer.StageTrainer, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        pretrain(continuing(trained, tmp_path / "killed"))
    resumed = pretrain(continuing(trained, tmp_path / "killed"))
    assert made == [0, 1, 2, 2]
    assert len({fingerprint_files(folder, ["transformer"]) for folder in (straight, resumed)}) == 1


def test_the_prior_reads_a_future_as_it_was_trained(trained):
    config = PriorConfig(name="wan_tiny", path=str(trained), clip="future", future_slots=1, engine="plain")
    prior, seen = make_prior(config, (2, 2)), {}
    network = prior.transformer
    network.patch_embedding.register_forward_hook(lambda _m, given, _o: seen.update(latent=given[0]))
    network.condition_embedder.register_forward_hook(lambda _m, given, _o: seen.update(time=given[0]))
    image = torch.rand(1, 1, 1, 3, 32, 32)
    prior(image)
    latent = prior.encode_latent(image[0].transpose(1, 2)).expand(-1, -1, 2, -1, -1)
    noise = prior.noise(latent, None).expand_as(latent)
    noisy, times = transformer.continue_frame(latent, noise, torch.ones(1))
    torch.testing.assert_close(seen["latent"].float(), noisy.to(network.dtype).float())
    given = {}

    def network_like_wans(_latent, moment, _prompt, return_dict):
        given.update(time=moment)
        return (torch.zeros_like(latent),)

    network_like_wans.config = network.config
    transformer.predict_velocity(network_like_wans, noisy, times, prior.prompt)
    assert given["time"].shape == (1, 8)
    torch.testing.assert_close(given["time"].flatten(), seen["time"])


def test_only_latents_behind_the_first_are_predicted_and_a_few_steps_lower_their_error():
    torch.manual_seed(0)
    network = WanTransformer3DModel(**TINY["transformer"])
    latent = torch.randn(1, 4, 3, 4, 4).expand(4, -1, -1, -1, -1)
    noise, time, prompt = torch.randn(4, 4, 3, 4, 4), torch.full((4,), 0.9), torch.ones(4, 512, WIDTH)
    noisy, times = transformer.continue_frame(latent, noise, time)
    assert torch.equal(noisy[:, :, 0], latent[:, :, 0])
    torch.testing.assert_close(noisy[:, :, 1:], transformer.add_noise(latent, noise, time)[:, :, 1:])
    assert times.tolist() == [[0.0, *[pytest.approx(0.9)] * 2]] * 4
    error = transformer.future_error(network, latent, noise, time, prompt)
    assert error.shape == (4, 4, 2, 4, 4)
    table = transformer.PromptTable({"": torch.ones(2, WIDTH)}, CPU)
    measure = transformer.make_validation(network, latent.numpy(), [""] * 4, table, CPU, continues=True)
    before, optimizer = measure(), torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        transformer.future_error(
            network, latent, torch.randn_like(noise), torch.ones(4), prompt
        ).mean().backward()
        optimizer.step()
    after = measure()
    assert after["held_out_future_1.0"] < 0.8 * before["held_out_future_1.0"]
    still = (latent[:1, :, 1:] - latent[:1, :, :1]).square().mean().item()
    assert after["held_out_still_1.0"] == before["held_out_still_1.0"] == pytest.approx(still)


def test_the_velocity_leads_from_any_point_of_the_path_back_to_the_data():
    data, noise, time = torch.randn(5, 4, 2, 3, 3), torch.randn(5, 4, 2, 3, 3), torch.linspace(0, 1, 5)
    at = transformer.add_noise(data, noise, time)
    target = transformer.velocity(data, noise)
    torch.testing.assert_close(at - time[:, None, None, None, None] * target, data)
    step = 1e-3
    there = transformer.add_noise(data.double(), noise.double(), time.double() + step)
    torch.testing.assert_close((there - at.double()) / step, target.double(), atol=1e-3, rtol=1e-3)


def test_times_are_logit_normal_and_a_shift_moves_them_towards_noise():
    generator = torch.Generator().manual_seed(0)
    logits = torch.logit(transformer.sample_time(20_000, 0.5, 0.8, 1.0, generator))
    assert abs(logits.mean() - 0.5) < 0.03
    assert abs(logits.std() - 0.8) < 0.03
    torch.testing.assert_close(
        transformer.shift_time(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0, 0.75, 1.0])
    )


def test_the_report_has_intervals_images_a_video_and_a_card(trained):
    report = json.loads((trained.parent / "report" / "report.json").read_text())
    for level in ("0.1", "0.3", "0.9"):
        assert (
            report["figures"]["loss"][level]["clips"]["low"]
            < report["figures"]["loss"][level]["clips"]["high"]
        )
    assert (trained.parent / "report" / "reconstructions.png").stat().st_size
    assert (trained.parent / "report" / "sample.mp4").stat().st_size
    text = (trained / "README.md").read_text()
    assert "autoencoder 3, transformer 3" in text
    assert f"{report['figures']['psnr_clips']['mean']:.3f} [" in text


def test_signal_to_noise_has_its_closed_form():
    frames = np.full((1, 1, 16, 16, 3), 100, np.uint8)

    class OffByTen:
        def encode(self, video):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: video))

        def decode(self, latent):
            return SimpleNamespace(sample=latent + 10 / 127.5)

    vae = OffByTen()
    measured = autoencoder.peak_signal_to_noise(vae, frames, CPU)
    torch.testing.assert_close(measured, torch.tensor([20 * np.log10(25.5)], dtype=torch.float32))


def test_an_instruction_without_embedding_is_named():
    table = transformer.PromptTable({"": torch.ones(2, WIDTH)}, CPU)
    with pytest.raises(ValueError, match="'fly'"):
        table(["", "fly"])


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_its_last_checkpoint(tmp_path):
    run = settings(tmp_path, save_every=1)
    learns = trainer.StageTrainer(torch.nn.Linear(2, 1), run.vae.learning, tmp_path / "run")

    def broken(draws):
        value = learns.network(torch.ones(1, 2)).sum() * (torch.nan if learns.step == 2 else 1.0)
        return value, {}

    with pytest.raises(FloatingPointError, match="step 3"):
        trainer.run_training(learns, broken, dict, run, None)
    again = trainer.StageTrainer(torch.nn.Linear(2, 1), run.vae.learning, tmp_path / "run")
    assert again.step == 2
    assert all(weight.isfinite().all() for weight in again.weights)


def test_frames_are_converted_to_the_networks_range_and_back():
    frames = moving_square(2, 0)
    assert np.array_equal(autoencoder.as_frames(autoencoder.as_video(frames, CPU)), frames)


@pytest.mark.slow
def test_pretraining_needs_neither_lerobot_nor_hydra():
    program = """
import importlib.util, sys
for name in ("lerobot", "hydra", "omegaconf", "timm", "av", "tensorboard"):
    sys.modules[name] = None
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "lerobot" else real(name, *rest)
import vega_policy.pretraining.trainer, envs.clips
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "clips"
    write_shards(folder)
    return Clips.open(folder, 0.05)[0]


@pytest.fixture(scope="module")
def vae(clips):
    torch.manual_seed(0)
    network = AutoencoderKLWan(**TINY["vae"]).eval().requires_grad_(False)
    measure_statistics(network, clips, CPU)
    return network


def test_normalised_latents_have_mean_zero_and_deviation_one_and_come_back(vae, clips):
    latent = posterior_means(vae, clips.take(np.arange(len(clips))), CPU)
    scaled = normalise(vae, latent)
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3, 4)), torch.ones(4), atol=0.05, rtol=0)
    torch.testing.assert_close(denormalise(vae, scaled), latent)


def test_single_images_are_encoded_without_earlier_frames(vae, clips, tmp_path):
    some = np.array([1, 5])
    singles = write_image_latents(tmp_path / "images.npy", vae, clips, CPU)
    assert singles.shape == (len(clips), 2, 4, 1, 2, 2)
    alone = normalise(vae, posterior_means(vae, clips.take(some)[:, 4:5], CPU)).half()
    torch.testing.assert_close(torch.from_numpy(singles[some, 1]), alone, atol=2e-3, rtol=0)
    whole = write_latents(tmp_path / "clips.npy", vae, clips, CPU)
    assert np.allclose(singles[:, 0], whole[:, :, :1], atol=2e-3)
    assert not np.allclose(singles[:, 1], whole[:, :, 1:2], atol=2e-2)


def test_a_shard_that_was_cut_off_is_refused_by_name(tmp_path):
    write_shards(tmp_path / "clips")
    whole = (tmp_path / "clips" / "square-1.npy").read_bytes()
    (tmp_path / "clips" / "square-1.npy").write_bytes(whole[:-7])
    with pytest.raises(DamagedClipsError, match=r"square-1\.npy has \d+ bytes, \d+ were written"):
        Clips.open(tmp_path / "clips", 0.1)


def test_nothing_is_learned_from_a_held_out_shard(tmp_path):
    write_shards(tmp_path / "clips")
    clips, held_out = Clips.open(tmp_path / "clips", 0.1)
    assert (len(clips), len(held_out)) == (8, 4)
    assert np.array_equal(held_out.take(np.arange(4)), moving_square(4, 1))
    assert np.array_equal(clips.take(np.array([7, 0]))[0], moving_square(4, 2)[3])
    assert clips.instructions == ["", "move it"] * 4


def test_held_out_shards_stay_held_out_when_more_are_rendered(tmp_path):
    write_shards(tmp_path / "few")
    write_shards(tmp_path / "many", shards=10)
    aside = [Clips.open(tmp_path / name, 0.1)[1].take(np.arange(4)) for name in ("few", "many")]
    assert np.array_equal(*aside)
    learned, held_out = Clips.open(tmp_path / "many", 0.1)
    assert (len(learned), len(held_out)) == (28, 12)
    assert learned.mark != held_out.mark == Clips.open(tmp_path / "many", 0.1)[1].mark


def test_a_mean_of_one_clip_has_no_interval_and_its_figures_are_json(tmp_path):
    one, two = (export.interval(torch.tensor(values)) for values in ([3.0], [1.0, 3.0]))
    assert json.loads(json.dumps(one, allow_nan=False)) == {"mean": 3.0, "low": None, "high": None, "n": 1}
    assert two == pytest.approx({"mean": 2.0, "low": 2 - 1.96, "high": 2 + 1.96, "n": 2})  # sd sqrt(2), n 2
    assert [export.format_interval(value) for value in (one, two)] == ["3.000", "2.000 [0.040, 3.960]"]
