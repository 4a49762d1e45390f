"""What is peculiar to each prior: parity with its own library, conditions, early stop, clips, exact sizes."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    WanVACETransformer3DModel,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    DINOv3ViTModel,
    PreTrainedTokenizerFast,
    VJEPA2Config,
    VJEPA2Model,
)

from tests.policies import frames
from vega_policy.model.config import PriorConfig
from vega_policy.model.sizes import build_networks, published_sizes
from vega_policy.priors import PRIORS, make_prior
from vega_policy.priors.unet import encode_empty_prompt, fix_prompt, fix_single_token, fix_time

GRID = (4, 4)
SMALL_GRID = (2, 2)  # of the video networks, which take seconds on larger frames


@pytest.fixture
def folder(prior_checkpoint):
    return prior_checkpoint


def load(name, path, grid=GRID, **config):
    values = {"dtype": "float32", "path": str(path)} | config
    return make_prior(PriorConfig(name=name, **values), grid)


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def watch(module, inputs=False):
    """A list that fills with what a module gives (or is given) when it runs."""
    seen = []
    if inputs:
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs), with_kwargs=True
        )
    else:
        module.register_forward_hook(lambda _, args, output: seen.append(output))
    return seen


@torch.no_grad()
def test_stable_diffusions_prior_feature_is_what_enters_the_mid_block_of_diffusers_unet(folder):
    path, picture = folder("sd21"), frames(size=256)
    vae = AutoencoderKL.from_pretrained(path / "vae").eval()
    unet = UNet2DConditionModel.from_pretrained(path / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
    latent = vae.encode(2 * picture[0, 0] - 1).latent_dist.mean * vae.config["scaling_factor"]
    step = torch.tensor([250])
    noisy = scheduler.add_noise(latent, seeded(4, 32, 32)[None], step)  # pyright: ignore[reportArgumentType]
    prompt = load_file(path / "empty_prompt.safetensors")["prompt"][None]
    for layer, module, entering in ((3, unet.mid_block, True), (4, unet.mid_block, False)):
        seen = watch(module, inputs=entering)
        unet(noisy, step, prompt)
        feature = load("sd21", path, layer=layer)(picture)
        torch.testing.assert_close(feature[0, 0], seen[0][0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_video_diffusions_prior_feature_is_what_enters_the_mid_block_at_sigma_t_over_one_minus_t(folder):
    path, picture = folder("svd"), frames(size=256)
    vae = AutoencoderKLTemporalDecoder.from_pretrained(path / "vae").eval()
    unet = UNetSpatioTemporalConditionModel.from_pretrained(path / "unet").eval()
    clip = CLIPVisionModelWithProjection.from_pretrained(path / "image_encoder").eval()
    prior = load("svd", path)
    sigma = 0.3 / 0.7
    assert prior.sigma == pytest.approx(sigma)
    pixels = 2 * picture[0, 0] - 1
    latent = vae.encode(pixels).latent_dist.mean * vae.config["scaling_factor"]
    condition = vae.encode(pixels + 0.02 * seeded(1, 1, 3, 256, 256)[0]).latent_dist.mean
    scaled = (latent + sigma * seeded(1, 1, 4, 32, 32)[0]) / (sigma**2 + 1) ** 0.5
    seen = watch(unet.mid_block, inputs=True)
    conditions = torch.tensor([[6.0, 127.0, 0.02]])
    time = torch.tensor(sigma).log() / 4
    picture_embedding = clip(prior_pixels(picture[0, 0], prior)).image_embeds[:, None]
    unet(torch.cat([scaled, condition], dim=1)[None], time, picture_embedding, conditions)
    given = seen[0]["hidden_states"] if isinstance(seen[0], dict) else seen[0]
    torch.testing.assert_close(prior(picture)[0, 0], given[0], atol=1e-4, rtol=1e-4)


def prior_pixels(picture, prior):
    small = torch.nn.functional.interpolate(picture, (32, 32), mode="bilinear", antialias=True).clamp(0, 1)
    return (small - prior.mean) / prior.std


def test_the_time_that_video_diffusion_hears_is_that_of_its_own_scheduler(folder):
    scheduler = EulerDiscreteScheduler(
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        use_karras_sigmas=True,
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.timesteps, (scheduler.sigmas[:-1].log() / 4).float())
    assert load("svd", folder("svd"), noise_level=1.0).sigma == 700.0
    assert load("svd", folder("svd"), noise_level=0.5).sigma == 1.0


@pytest.mark.parametrize(("name", "layer"), [("sd21", 1), ("svd", 1), ("sd21", 4), ("svd", 3)])
def test_nothing_behind_the_read_out_of_a_unet_prior_is_kept(folder, name, layer):
    prior = load(name, folder(name), SMALL_GRID, layer=layer)
    assert len(prior.unet.down_blocks) == min(layer + 1, 4)
    assert (prior.unet.mid_block is None) == (layer < 4)
    assert len(prior.unet.up_blocks) == 0
    assert prior.unet.conv_out is None
    assert prior.vae.decoder is None
    assert prior(frames()).shape[-2:] == SMALL_GRID


@pytest.mark.parametrize("layer", [1, 4])
@pytest.mark.parametrize(("name", "size", "clip"), [("sd21", 3, "frame"), ("svd", 2, "views")])
def test_what_a_unet_prior_need_not_compute_twice_changes_no_feature(folder, name, size, clip, layer):
    pictures = torch.rand(2, size, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain, fast = (
        load(name, folder(name), SMALL_GRID, layer=layer, clip=clip, engine=engine)
        for engine in ("plain", "auto")
    )
    expected = plain(pictures)
    largest = float(expected.abs().max())  # float32 rounds alike for all; its sums differ between processors
    torch.testing.assert_close(fast(pictures), expected, atol=1e-4 * largest, rtol=0.0)
    counts = [sum(weight.numel() for weight in prior.unet.parameters()) for prior in (plain, fast)]
    assert counts[1] < counts[0]  # time projections, keys and values are gone


def test_each_reduction_of_a_unet_alone_changes_nothing(folder):
    """Time, prompt, single token, each on a UNet of its own."""
    unet = UNet2DConditionModel.from_pretrained(folder("sd21") / "unet").eval().requires_grad_(False)
    prompt, embedded = seeded(77, 16), seeded(1, 32)
    latent = seeded(3, 4, 16, 16)

    def read(network, words):
        hidden = network.conv_in(latent)
        for block in network.down_blocks:
            given = {"encoder_hidden_states": words.expand(3, -1, -1)} if hasattr(block, "attentions") else {}
            hidden = block(hidden, embedded.expand(3, -1), **given)[0]
        return hidden

    words = prompt[:, : unet.config.cross_attention_dim]
    for fix, fixed, seen in (
        (fix_time, embedded[0], words),
        (fix_prompt, words, words),
        (fix_single_token, None, words[:1]),
    ):
        other = copy.deepcopy(unet)
        assert (fix(other) if fixed is None else fix(other, fixed)) > 0
        torch.testing.assert_close(read(other, seen[None]), read(unet, seen[None]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"reduced to a single token; got 77"):
        read(other, words[None])


def test_the_empty_prompt_of_stable_diffusion_keeps_its_padding(tmp_path):
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), pad_token="<pad>"
    ).save_pretrained(tmp_path / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=3,
            hidden_size=12,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=9,
            eos_token_id=1,
            bos_token_id=0,
        )
    ).save_pretrained(tmp_path / "text_encoder")
    assert encode_empty_prompt(tmp_path).shape == (9, 12)


@torch.no_grad()
def test_the_vae_priors_are_the_scaled_mean_and_the_normalised_mean(folder):
    picture = frames(size=32)
    vae = AutoencoderKL.from_pretrained(folder("sd_vae") / "vae").eval()
    expected = 0.5 * vae.encode(2 * picture[0, 0] - 1).latent_dist.mean
    torch.testing.assert_close(load("sd_vae", folder("sd_vae"), input_size=32)(picture)[0], expected)
    wan = AutoencoderKLWan.from_pretrained(folder("wan_vae") / "vae").eval()
    mean, std = (
        torch.tensor(wan.config[key])[:, None, None, None] for key in ("latents_mean", "latents_std")
    )
    expected = (wan.encode(2 * picture.transpose(2, 3)[0] - 1).latent_dist.mean - mean) / std
    read = load("wan_vae", folder("wan_vae"), input_size=32)(picture)
    torch.testing.assert_close(read[0], expected[:, :, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_dinov3_prior_is_the_normed_patch_tokens_of_the_block_that_is_read(folder):
    picture = frames(size=64)
    network = DINOv3ViTModel.from_pretrained(folder("dinov3")).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (picture[0, 0] - mean[:, None, None]) / std[:, None, None]
    seen = watch(network.model.layer[1])
    last = network(pixels).last_hidden_state
    for layer, hidden in ((2, last), (1, network.norm(seen[0]))):
        prior = load("dinov3", folder("dinov3"), layer=layer)
        expected = hidden[0, 3:].T.reshape(16, *GRID)
        torch.testing.assert_close(prior(picture)[0, 0], expected, atol=1e-5, rtol=1e-5)
        assert len(prior.network.model.layer) == layer + 1


@torch.no_grad()
def test_the_vjepa2_prior_is_its_encoder_and_knows_the_size_of_its_frames(folder):
    picture = frames(size=64)  # trained on 96 pixels: 6 tokens a row, not 4
    config = VJEPA2Config.from_pretrained(folder("vjepa2"))
    config.crop_size = 64
    network = VJEPA2Model.from_pretrained(folder("vjepa2"), config=config).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (picture[0, 0] - mean[:, None, None]) / std[:, None, None]
    expected = network.get_vision_features(pixels[:, None])[0].T.reshape(24, *GRID)
    prior = load("vjepa2", folder("vjepa2"), layer=2)
    torch.testing.assert_close(prior(picture)[0, 0], expected, atol=1e-5, rtol=1e-5)
    assert prior.network.predictor is None


@torch.no_grad()
def test_the_vace_prior_is_the_frames_half_of_block_k_of_diffusers_transformer(folder):
    path, picture = folder("wan2.1_vace_1.3b"), frames()
    vae = AutoencoderKLWan.from_pretrained(path / "vae").eval()
    network = WanVACETransformer3DModel.from_pretrained(path / "transformer").eval()
    mean, std = (
        torch.tensor(vae.config[key])[:, None, None, None] for key in ("latents_mean", "latents_std")
    )

    def encode(video):
        return (vae.encode(video).latent_dist.mean - mean) / std

    clean = encode(2 * picture.transpose(2, 3)[0] - 1)
    grey = encode(torch.zeros(1, 3, 1, 64, 64))
    both = torch.cat([clean, clean], dim=2)
    noisy = 0.7 * both + 0.3 * seeded(4, 2, 8, 8)
    reference = torch.cat([clean, torch.zeros_like(clean), torch.zeros(1, 64, 1, 8, 8)], dim=1)
    frame = torch.cat([grey, clean, torch.ones(1, 64, 1, 8, 8)], dim=1)
    prompt = torch.zeros(1, 512, 20)
    prompt[0, :2] = load_file(path / "empty_prompt.safetensors")["prompt"]
    for layer in (1, 2):
        seen = watch(network.norm_out, inputs=True) if layer == 2 else watch(network.blocks[1])
        network(
            noisy, torch.tensor([300.0]), prompt, control_hidden_states=torch.cat([reference, frame], dim=2)
        )
        prior = load("wan2.1_vace_1.3b", path, layer=layer)
        expected = seen[0][0, 16:].T.reshape(48, *GRID)
        torch.testing.assert_close(prior(picture)[0, 0], expected, atol=1e-5, rtol=1e-5)
        assert len(prior.transformer.vace_blocks) == layer  # beside blocks 0 and 2


def test_the_wan_vae_prior_refuses_views_that_it_would_read_one_by_one(folder):
    with pytest.raises(ValueError, match="clip=views would change nothing"):
        load("wan_vae", folder("wan_vae"), clip="views")


def test_the_vace_prior_refuses_the_fast_engine(folder):
    with pytest.raises(ValueError, match="has no fast form"):
        load("wan2.1_vace_1.3b", folder("wan2.1_vace_1.3b"), layer=1, engine="fast")


def test_the_fast_engine_of_the_wan_prior_refuses_clips(folder):
    with pytest.raises(ValueError, match=r"reads single frames; prior\.clip=history needs"):
        load("wan2.1_t2v_14b", folder("wan2.1_t2v_14b"), layer=1, engine="fast", clip="history")


VIDEO = ["wan2.1_t2v_14b", "wan2.2_ti2v_5b", "wan_vae", "svd", "vjepa2"]
LAYERS = {"wan_vae": 0, "svd": 3}


@torch.no_grad()
@pytest.mark.parametrize("name", VIDEO)
def test_a_history_is_read_as_one_video_whose_past_changes_the_prior_features_of_the_last_frame(folder, name):
    values = {"layer": LAYERS.get(name, 2), "clip_frames": 5}
    prior = load(name, folder(name), SMALL_GRID, clip="history", **values)
    video = torch.rand(1, 2, 5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = prior(video)
    assert features.shape == (1, 2, prior.width, *SMALL_GRID)
    other = video.clone()
    other[:, 1, 0] = 1 - other[:, 1, 0]
    changed = prior(other) - features
    assert changed[:, 0].abs().max() < 1e-5  # each camera is its own video
    assert changed[:, 1].abs().max() > 1e-6
    alone = load(name, folder(name), SMALL_GRID, **values)
    last = alone(video)
    assert not torch.allclose(last, features, atol=1e-4)
    torch.testing.assert_close(last, alone(video[:, :, -1:]))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in VIDEO if name != "wan_vae"])
def test_views_of_one_instant_are_read_as_one_video_in_which_a_prior_sees_them_together(folder, name):
    prior = load(name, folder(name), SMALL_GRID, clip="views", layer=LAYERS.get(name, 2))
    pictures = frames(views=3)
    features = prior(pictures)
    assert features.shape == (1, 3, prior.width, *SMALL_GRID)
    other = pictures.clone()
    other[:, 2] = 1 - other[:, 2]
    changed = (prior(other) - features).abs().amax(dim=(0, 2, 3, 4))
    assert (changed > 1e-6).all()  # every camera hears of the third
    assert changed.argmax() == 2


def test_a_prior_of_single_pictures_refuses_clips_and_names_those_that_read_them():
    with pytest.raises(ValueError, match=r"'dinov3' reads single frames .* svd, vjepa2, wan2.1_t2v_1.3b"):
        make_prior(PriorConfig(name="dinov3", clip="views"), GRID)
    with pytest.raises(ValueError, match=r"1 \+ 4k.*got 4"):
        PriorConfig(clip="history", clip_frames=4)
    with pytest.raises(
        ValueError, match=r"prior\.clip: expected one of frame, history, views, future; got 'video'"
    ):
        PriorConfig(clip="video")


MILLIONS = {
    "wan2.1_t2v_1.3b": {"vae": 126.89, "transformer": 1_419.0},
    "wan2.1_t2v_14b": {"vae": 126.89, "transformer": 14_288.49},
    "wan2.1_vace_1.3b": {"vae": 126.89, "transformer": 2_153.97},
    "wan2.2_ti2v_5b": {"vae": 704.69, "transformer": 4_999.79},
    "wan_vae": {"vae": 126.89},
    "sd21": {"vae": 83.65, "unet": 865.91},
    "svd": {"unet": 1_524.62, "vae": 97.74, "image_encoder": 632.08},
    "sd_vae": {"vae": 83.65, "its encoder": 34.16},
    "dinov3": {"encoder": 303.13},
    "vjepa2": {"encoder": 1_012.17},
    "wan_tiny": {},
    "wan_tiny_untrained": {},
}
"""Parameters of the networks as published, by prior and part."""


def test_the_networks_of_every_prior_have_their_published_size():
    for name, sizes in MILLIONS.items():
        found = {part: round(size / 1e6, 2) for part, size in published_sizes(name).items()}
        assert found == sizes, name
    assert published_sizes("wan2.1_t2v_1.3b") == {"vae": 126_892_531, "transformer": 1_418_996_800}
    with pytest.raises(ValueError, match="No architecture of the prior 'random'"):
        build_networks("random")


def test_the_default_layer_of_every_prior_is_one_that_its_network_has():
    counts = {"wan2.1_t2v_14b": 40, "wan2.2_ti2v_5b": 30, "wan2.1_vace_1.3b": 30, "dinov3": 24, "vjepa2": 40}
    for name, count in counts.items():
        networks = build_networks(name)
        blocks = networks["transformer"].blocks if "transformer" in networks else None
        if blocks is None:
            network = networks["."]
            blocks = network.model.layer if name == "dinov3" else network.encoder.layer
        assert len(blocks) == count
        assert 0 <= PRIORS[name].layer < count
