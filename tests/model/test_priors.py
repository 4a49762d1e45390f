import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, WanTransformer3DModel
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import load_file, save_file

from tests.policies import batch, frames, tiny_config
from tests.synthetic_dataset import CAMERAS, REPO_ID, write_dataset
from tests.tiny_wan import TRANSFORMER, write_text_encoder
from vega_policy import packaged_policies, resource
from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import stack_views
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.priors import FORMER_WEIGHTS, PRIORS, has_trained_weights, make_prior, resolve
from vega_policy.priors.base import empty_prompt, local_folder
from vega_policy.priors.baselines import FeatureWriter, find_encoder
from vega_policy.priors.wan import encode_empty_prompt
from vega_policy.run_dir import OtherRunError

GRID = (4, 4)


def wan(wan_checkpoint, **config):
    values = {"layer": 1, "dtype": "float32"} | config
    return make_prior(PriorConfig(name="wan2.1_t2v_1.3b", path=str(wan_checkpoint), **values), GRID)


def plain_feature(wan_checkpoint, picture, layer, prompt, noise):
    """The paper's equations with unmodified diffusers modules, one picture [3 h w] at a time."""
    vae = AutoencoderKLWan.from_pretrained(wan_checkpoint / "vae").eval()
    transformer = WanTransformer3DModel.from_pretrained(wan_checkpoint / "transformer").eval()
    mean = torch.tensor(vae.config["latents_mean"])[None, :, None, None, None]
    std = torch.tensor(vae.config["latents_std"])[None, :, None, None, None]
    clean = (vae.encode(picture[None, :, None] * 2 - 1).latent_dist.mean - mean) / std
    noised = 0.7 * clean + 0.3 * noise
    seen = {}
    transformer.blocks[layer].register_forward_hook(lambda module, inputs, output: seen.update(block=output))
    padded = torch.zeros(1, 512, prompt.shape[1])
    padded[0, : len(prompt)] = prompt
    transformer(noised, torch.tensor([300.0]), padded)
    return seen["block"].transpose(1, 2).reshape(-1, *GRID)


@torch.no_grad()
def test_the_prior_feature_is_block_k_of_the_papers_equations(wan_checkpoint):
    prior = wan(wan_checkpoint)
    pictures = frames(views=2)
    features = prior(pictures)
    assert features.shape == (1, 2, 48, *GRID)
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = load_file(wan_checkpoint / "empty_prompt.safetensors")["prompt"]
    for view in range(2):
        expected = plain_feature(wan_checkpoint, pictures[0, view, 0], 1, prompt, noise)
        torch.testing.assert_close(features[0, view], expected, atol=1e-5, rtol=1e-5)


def test_the_priors_default_is_the_papers_layer_20_and_noise_level_exactly_three_tenths():
    resolved = resolve(PriorConfig())
    assert (resolved.name, resolved.layer, resolved.noise_level) == ("wan2.1_t2v_1.3b", 20, 0.3)
    assert resolved.path == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_no_prior_block_after_the_read_layer_exists_or_runs(wan_checkpoint):
    prior = wan(wan_checkpoint, layer=1, engine="plain")
    ran = []
    for block in prior.transformer.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    prior(frames())
    assert len(prior.transformer.blocks) == 2
    assert len(ran) == 2
    assert not hasattr(prior.vae.decoder, "parameters")


def test_the_same_seed_gives_the_same_prior_features_and_another_seed_others():
    first = make_prior(PriorConfig(name="wan_tiny_untrained"), GRID)
    torch.randn(7)  # the global random state plays no part
    again = make_prior(PriorConfig(name="wan_tiny_untrained"), GRID)
    other = make_prior(PriorConfig(name="wan_tiny_untrained", seed=1), GRID)
    picture = frames()
    weights = [next(prior.transformer.parameters()) for prior in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(first(picture), again(picture))
    assert first.fingerprint == again.fingerprint
    assert not torch.equal(first(picture), other(picture))
    assert first.fingerprint != other.fingerprint


def test_a_policy_trained_with_weights_that_shipped_before_learns_which_commit_has_them():
    former, commit = next(iter(FORMER_WEIGHTS.items()))
    with pytest.raises(ValueError, match=f"{former}.*until commit {commit}"):
        make_prior(PriorConfig(name="wan_tiny", fingerprint=former), GRID)


def test_building_a_seeded_prior_leaves_the_callers_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make_prior(PriorConfig(name="wan_tiny_untrained"), GRID)
    assert torch.equal(torch.rand(1), expected)


@torch.no_grad()
def test_a_frames_prior_features_do_not_depend_on_its_batch(wan_checkpoint):
    prior = wan(wan_checkpoint)
    pictures = frames(views=3)
    torch.testing.assert_close(prior(pictures)[:, 1:2], prior(pictures[:, 1:2]), atol=1e-5, rtol=1e-5)


def test_fresh_prior_noise_comes_from_the_callers_generator(wan_checkpoint):
    prior = wan(wan_checkpoint)
    draws = [prior(frames(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", ["wan_tiny", "wan_tiny_untrained", "random"])
def test_a_bright_square_changes_the_prior_token_that_holds_it_most(name):
    prior = make_prior(PriorConfig(name=name), (8, 8))
    dark = torch.full((1, 1, 1, 3, 128, 128), 0.3)
    base = prior(dark)
    for row in (0, 3, 7):
        for column in (0, 4, 7):
            lit = dark.clone()
            lit[..., 16 * row + 4 : 16 * row + 12, 16 * column + 4 : 16 * column + 12] = 1.0
            change = (prior(lit) - base)[0, 0].norm(dim=0)
            assert divmod(change.argmax().item(), 8) == (row, column)


def test_prior_tokens_off_the_grid_are_pooled_to_it(wan_checkpoint):
    assert wan(wan_checkpoint, input_size=128)(frames()).shape == (1, 1, 48, *GRID)
    with pytest.raises(ValueError, match="multiple of 16; got 100"):
        wan(wan_checkpoint, input_size=100)


def test_the_prior_is_frozen(wan_checkpoint):
    prior = wan(wan_checkpoint)
    assert not any(parameter.requires_grad for parameter in prior.parameters())
    assert not prior(frames().requires_grad_()).requires_grad


def test_a_prior_layer_outside_the_network_is_refused(wan_checkpoint):
    for layer in (3, -1):
        with pytest.raises(ValueError, match=f"blocks 0 to 2; got {layer}"):
            wan(wan_checkpoint, layer=layer)


def test_a_prior_noise_level_outside_zero_to_one_is_refused():
    for level in (-0.1, 1.2):
        with pytest.raises(
            ValueError, match=rf"prior\.noise_level: expected a number in \[0, 1\]; got {level}"
        ):
            PriorConfig(noise_level=level)


def test_an_unknown_prior_names_the_nearest_and_the_known():
    with pytest.raises(
        ValueError, match=r"'wan_tny'. Did you mean 'wan_tiny'\? Known: none, dinov3, precomputed"
    ):
        make_prior(PriorConfig(name="wan_tny"), GRID)


def test_prior_weights_with_another_fingerprint_are_refused(wan_checkpoint, tmp_path):
    trained_with = wan(wan_checkpoint).fingerprint
    other = tmp_path / "other"
    shutil.copytree(wan_checkpoint, other)
    torch.manual_seed(1)
    WanTransformer3DModel(**TRANSFORMER).save_pretrained(other / "transformer")
    assert wan(wan_checkpoint, fingerprint=trained_with) is not None
    with pytest.raises(ValueError, match=rf"other weights .* expected fingerprint {trained_with}, got"):
        wan(other, fingerprint=trained_with)


def test_a_folder_with_another_architecture_is_refused(wan_checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(wan_checkpoint, other)
    shutil.rmtree(other / "vae")
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(other / "vae")
    with pytest.raises(ValueError, match="holds AutoencoderKL; this prior requires AutoencoderKLWan"):
        wan(other)


def test_missing_prior_files_are_named_with_the_way_out(wan_checkpoint, tmp_path):
    partial = tmp_path / "partial"
    shutil.copytree(wan_checkpoint / "vae", partial / "vae")
    with pytest.raises(FileNotFoundError, match=r"transformer/config.json.*It holds: vae.*prior=wan_tiny"):
        wan(partial)


def test_wans_original_release_is_named_with_the_one_to_take(tmp_path):
    for name in ("Wan2.1_VAE.pth", "config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"original release; .*download \S+-Diffusers .*prior\.path="):
        wan(tmp_path)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            torch.full((1, 1, 1, 3, 64, 64), 200.0),
            r"frames: expected frames in \[0, 1\], got values from 200",
        ),
        (torch.zeros(1, 3, 64, 64), r"frames: expected \[b v t 3 h w\], got shape \(1, 3, 64, 64\)"),
    ],
)
def test_what_are_no_frames_is_refused_by_a_prior(frames, message):
    with pytest.raises(ValueError, match=message):
        make_prior(PriorConfig(name="wan_tiny_untrained"), GRID)(frames)


def test_offline_the_default_prior_names_the_missing_files_and_the_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"Missing: vae/, transformer/.*prior.path.*wan_tiny"):
        make_prior(PriorConfig(revision="0" * 40), GRID)


def test_a_home_that_cannot_be_written_to_costs_only_the_cache_of_the_prompt(tmp_path, monkeypatch, caplog):
    (tmp_path / "home").touch()
    monkeypatch.setattr("vega_policy.priors.base.PROMPT_CACHE", tmp_path / "home" / "cache")
    folder = tmp_path / "wan"
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "text_encoder" / "config.json").touch()
    prompt = empty_prompt(PriorConfig(name="wan", path=str(folder)), folder, 4, lambda _: torch.ones(2, 4))
    assert prompt.shape == (2, 4)
    assert "not cached" in caplog.text


def test_the_empty_prompt_comes_from_the_checkpoints_own_text_encoder(wan_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("vega_policy.priors.base.PROMPT_CACHE", tmp_path / "cache")
    folder = tmp_path / "wan"
    shutil.copytree(wan_checkpoint, folder)
    (folder / "empty_prompt.safetensors").unlink()
    write_text_encoder(folder)
    prompt = encode_empty_prompt(folder)
    assert prompt.shape == (1, 20)  # the end token alone; padding is added as zeros
    prior = wan(folder)
    torch.testing.assert_close(prior.prompt[0, :1], prompt)
    assert prior.prompt.shape == (1, 512, 20)
    assert prior.prompt[0, 1:].abs().max() == 0
    shutil.rmtree(folder / "text_encoder")  # needed once at most
    assert torch.equal(wan(folder).prompt, prior.prompt)


def test_a_prompt_file_of_another_width_is_refused(wan_checkpoint, tmp_path):
    save_file({"prompt": torch.zeros(2, 7)}, tmp_path / "prompt.safetensors")
    with pytest.raises(ValueError, match=r"shape \[n 20\].*got shape \(2, 7\)"):
        wan(wan_checkpoint, prompt_file=str(tmp_path / "prompt.safetensors"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        wan(wan_checkpoint, prompt_file=str(tmp_path / "nothing.safetensors"))


def test_the_tiny_prior_has_a_few_million_parameters_and_says_that_it_is_untrained():
    prior = make_prior(PriorConfig(name="wan_tiny_untrained"), GRID)
    whole = WanTransformer3DModel(**PRIORS["wan_tiny"].architecture["transformer"])
    assert 2e6 < sum(parameter.numel() for parameter in whole.parameters()) < 12e6
    assert prior.untrained


def test_wan_tiny_is_the_prior_that_was_trained_and_its_control_is_not():
    shipped, control = (
        make_prior(PriorConfig(name=name), GRID) for name in ("wan_tiny", "wan_tiny_untrained")
    )
    assert (shipped.untrained, control.untrained) == (False, True)
    assert has_trained_weights(PriorConfig(name="wan_tiny"))
    assert not has_trained_weights(PriorConfig(name="wan_tiny_untrained"))
    assert not torch.equal(next(shipped.transformer.parameters()), next(control.transformer.parameters()))
    older = PriorConfig(name="wan_tiny", fingerprint=control.fingerprint)
    with pytest.raises(ValueError, match="takes wan_tiny_untrained"):
        make_prior(older, GRID)


STAND_IN = '''
import torch

def load(device):
    """Mean colour and its square on an 8x8 grid, and what the other view shows."""
    def encode(frames):
        n, v = frames.shape[:2]
        small = torch.nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1), 8).unflatten(0, (n, v))
        return torch.cat([small, small**2, small.flip(1)], dim=2)
    return encode
'''


def exported_frames(rows=3, seed=0):
    return torch.rand(rows, 2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def write(folder, grid=(8, 8)):
    features = torch.randn(3, 2, 9, *grid, generator=torch.Generator().manual_seed(1))
    writer = FeatureWriter(folder, "stand-in")
    writer.add(exported_frames()[:2], features[:2])
    writer.add(exported_frames()[2:], features[2:])
    writer.close()
    return features


def test_an_interrupted_export_of_features_keeps_its_shards(tmp_path):
    expected = write(tmp_path / "straight")
    writer = FeatureWriter(tmp_path / "features", "stand-in")
    writer.add(exported_frames()[:2], expected[:2])
    again = FeatureWriter(tmp_path / "features", "stand-in")
    assert again.skip(exported_frames()[:2])
    assert not again.skip(exported_frames()[2:])
    again.add(exported_frames()[2:], expected[2:])
    again.close()
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "features" / path.name).read_bytes()


@pytest.mark.parametrize(("model", "seed"), [("another", 0), ("stand-in", 1)])
def test_shards_of_other_frames_or_of_another_model_are_not_resumed(tmp_path, model, seed):
    writer = FeatureWriter(tmp_path / "features", "stand-in")
    writer.add(exported_frames(), torch.zeros(3, 2, 9, 8, 8))
    again = FeatureWriter(tmp_path / "features", model)
    with pytest.raises(ValueError, match=r"shard-00000.* holds features of other frames or of another model"):
        again.skip(exported_frames(seed=seed))


def export_again(folder, *shards, model="stand-in"):
    """Compare a folder with shards of frames, as a second start of the same export does."""
    writer = FeatureWriter(folder, model)
    for shard in shards:
        assert writer.skip(shard)
    writer.close()
    return writer


def test_a_complete_export_of_features_is_compared_and_kept(tmp_path):
    write(tmp_path / "features")
    before = {path.name: path.read_bytes() for path in (tmp_path / "features").iterdir()}
    frames = exported_frames()
    assert export_again(tmp_path / "features", frames[:2], frames[2:]).was_complete
    refused = "complete export of other frames"
    with pytest.raises(OtherRunError, match=f"{refused}: it has 2 shards, and there are more frames"):
        export_again(tmp_path / "features", frames[:2], frames[2:], frames[:2])
    with pytest.raises(OtherRunError, match=rf"{refused}.*its manifest\.json differs"):
        export_again(tmp_path / "features", frames[:2])
    with pytest.raises(OtherRunError, match=r"shard-00000.* of other frames or of another model"):
        export_again(tmp_path / "features", frames[:2], frames[2:], model="another")
    assert {path.name: path.read_bytes() for path in (tmp_path / "features").iterdir()} == before


@pytest.mark.parametrize("complete", [False, True])
def test_a_damaged_shard_of_features_is_computed_again(tmp_path, complete):
    expected = write(tmp_path / "features")
    shard = tmp_path / "features" / "shard-00001.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[: len(before) // 2])
    if not complete:
        (tmp_path / "features" / "manifest.json").unlink()
    writer = FeatureWriter(tmp_path / "features", "stand-in")
    assert writer.skip(exported_frames()[:2])
    assert not writer.skip(exported_frames()[2:])
    writer.add(exported_frames()[2:], expected[2:])
    writer.close()
    assert shard.read_bytes() == before


def opened(folder, **config):
    return make_prior(PriorConfig(name="precomputed", path=str(folder), **config), GRID)


def test_precomputed_prior_features_are_found_by_their_frames_and_pooled_to_the_grid(tmp_path):
    features = write(tmp_path / "features")
    prior = opened(tmp_path / "features")
    found = prior(exported_frames()[[2, 0, 1]][:, :, None])
    expected = torch.nn.functional.adaptive_avg_pool2d(features[[2, 0, 1]].flatten(0, 1), GRID)
    torch.testing.assert_close(found, expected.unflatten(0, (3, 2)))
    torch.testing.assert_close(
        prior(exported_frames()[:, :, None] + 1e-4), prior(exported_frames()[:, :, None])
    )


def test_frames_without_precomputed_prior_features_are_refused(tmp_path):
    write(tmp_path / "features")
    prior = opened(tmp_path / "features")
    with pytest.raises(
        ValueError, match=r"no features of these frames: the nearest of its 3 rows .* rollout"
    ):
        prior(exported_frames(seed=7)[:, :, None])
    with pytest.raises(ValueError, match="2 views of 64 pixels; the policy has 1 of 64"):
        prior(exported_frames()[:, :1, None])


def test_folders_that_a_precomputed_prior_cannot_use_are_refused(tmp_path):
    write(tmp_path / "coarse", grid=(2, 2))
    with pytest.raises(ValueError, match="2x2 tokens a view, which cannot be pooled to the backbone's 4x4"):
        opened(tmp_path / "coarse")
    with pytest.raises(FileNotFoundError, match=r"no manifest.json.*vega-export-features"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"needs prior\.path"):
        make_prior(PriorConfig(name="precomputed"), GRID)
    with pytest.raises(ValueError, match="single layer 0; got 1"):
        opened(tmp_path / "coarse", layer=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("somebody's")
    with pytest.raises(ValueError, match=r"expected an empty or new folder, found notes\.txt"):
        FeatureWriter(tmp_path / "mine", "again")
    with pytest.raises(ValueError, match=r"expected features \[n v d gh gw\]"):
        FeatureWriter(tmp_path / "new", "flat").add(exported_frames(), torch.zeros(3, 2, 9))
    with pytest.raises(ValueError, match="no frames were given"):
        FeatureWriter(tmp_path / "nothing", "none").close()


def test_other_precomputed_prior_features_are_other_weights(tmp_path):
    write(tmp_path / "features")
    fingerprint = opened(tmp_path / "features").fingerprint
    write(tmp_path / "other", grid=(4, 4))
    with pytest.raises(ValueError, match="other weights"):
        opened(tmp_path / "other", fingerprint=fingerprint)


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        ("no_such_module:load", r"no_such_module:load \(No module named 'no_such_module'\)"),
        ("needs_another:load", r"\(No module named 'no_such_repository'\)"),
        ("json:no_such_function", "no attribute 'no_such_function'"),
        ("json", "this names no function"),
        ("json:decoder", "this names no function"),
        ("my model:load", "invalid format"),
    ],
)
def test_an_encoder_that_cannot_be_imported_ends_in_one_message(encoder, reason, tmp_path, monkeypatch):
    (tmp_path / "needs_another.py").write_text("import no_such_repository")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"encoder: expected .* module:function, got .*{reason}.* Run the"):
        find_encoder(encoder)


@pytest.mark.slow
def test_the_export_command_writes_what_a_policy_with_a_precomputed_prior_trains_on(tmp_path):
    write_dataset(tmp_path / "data", lengths=(3, 2), use_videos=False)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    code = "from vega_policy.cli.commands import export_features; export_features.main()"
    options = [f"repo_id={REPO_ID}", "root=data", "output=features", "frame_size=64", "batch_size=2"]
    command = [sys.executable, "-c", code, "stand_in:load", *options, "device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    row = LeRobotDataset(REPO_ID, root=tmp_path / "data")[4]
    views = {camera: row[camera][None] for camera in CAMERAS}
    small = torch.nn.functional.adaptive_avg_pool2d(stack_views(views, 64)[0, :, 0], GRID)
    torch.manual_seed(0)
    policy = VegaPolicy(tiny_config(PriorConfig(name="precomputed", path=str(tmp_path / "features"))))
    features = policy.model.prior(stack_views(views, 64))
    torch.testing.assert_close(features[0, :, :3], small, atol=1e-4, rtol=1e-4)
    loss, _ = policy({**batch(1), **views})
    loss.backward()
    assert loss.isfinite()


KILLED_AFTER_THE_MANIFEST = """
import os, signal, sys
from vega_policy.cli.commands import export_features
from vega_policy.priors.baselines import FeatureWriter
close = FeatureWriter.close
def close_and_die(self):
    close(self)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv.pop() == "killed":
    FeatureWriter.close = close_and_die
export_features.main()
"""


@pytest.mark.slow
def test_an_export_that_is_killed_after_its_manifest_is_complete_and_the_same_command_says_so(tmp_path):
    write_dataset(tmp_path / "data", lengths=(3, 2), use_videos=False)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    options = [f"repo_id={REPO_ID}", "root=data", "output=features", "frame_size=64", "batch_size=2"]

    def start(end):
        command = [
            sys.executable,
            "-c",
            KILLED_AFTER_THE_MANIFEST,
            "stand_in:load",
            *options,
            "device=cpu",
            end,
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)

    assert start("killed").returncode == -signal.SIGKILL
    assert (tmp_path / "features" / ".lock").is_file()
    before = {path.name: path.read_bytes() for path in (tmp_path / "features").glob("[a-z]*")}
    done = start("whole")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("features: features (complete before, compared)\n")
    assert {path.name: path.read_bytes() for path in (tmp_path / "features").iterdir()} == before


def test_a_prior_in_the_packages_assets_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_folder("assets/wan_tiny_future") == resource("assets") / "wan_tiny_future"
    assert local_folder("other/wan_tiny_future") == Path("other/wan_tiny_future")
    (tmp_path / "assets" / "wan_tiny_future").mkdir(parents=True)
    assert local_folder("assets/wan_tiny_future") == Path("assets/wan_tiny_future")


def test_every_shipped_policy_names_a_prior_that_is_shipped_with_it():
    for folder in packaged_policies().values():
        config = json.loads((folder / "config.json").read_text())["prior"]
        if config["path"] is not None:
            assert config["path"].startswith("assets/")
            assert local_folder(config["path"]).is_dir()
