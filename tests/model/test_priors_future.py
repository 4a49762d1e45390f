"""`prior.clip=future`: a frame, slots of noise behind it, and one pass of a network that continues frames."""

import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from diffusers.pipelines.wan.pipeline_wan_vace import WanVACEPipeline
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionModel

from tests.policies import CAMERAS, batch, frames, tiny_config
from tests.tiny_wan import write_text_encoder
from vega_policy.config import from_config
from vega_policy.model.config import PriorConfig
from vega_policy.model.fusion import SlotAttention
from vega_policy.model.observation import Observation, resize
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.priors import PRIORS, make_prior, resolve
from vega_policy.priors import wan as wan_module

GRID = (2, 2)
TIGHT = {"atol": 1e-5, "rtol": 1e-5}
NAMES = ("wan2.2_ti2v_5b", "wan2.1_vace_1.3b", "wan2.1_i2v_14b")


@pytest.fixture
def load(prior_checkpoint):
    """Return a function that loads a prior with `clip=future`, read at blocks 0 and 2."""

    def loaded(name, grid=GRID, **config):
        values = {"layer": (0, 2), "dtype": "float32", "clip": "future", "path": str(prior_checkpoint(name))}
        return make_prior(PriorConfig(name=name, **(values | config)), grid)

    return loaded


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def pipeline_of(vae, transformer):
    """What methods of diffusers' pipelines read of `self`."""
    return SimpleNamespace(
        vae=vae,
        transformer=transformer,
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=vae.spatial_compression_ratio,
        config=SimpleNamespace(expand_timesteps=False),
    )


def read_blocks(network, *inputs, **options):
    """Run a whole network of diffusers; the outputs of blocks 0 and 2 for 3 latents, [3 2*d 2 2]."""
    seen = []
    # VACE adds its hints behind a block; what enters the next one, or the final norm, holds them
    for module in (network.blocks[1], network.norm_out):
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(*inputs, **options)
    return torch.cat(seen, dim=-1)[0].unflatten(0, (3, *GRID)).permute(0, 3, 1, 2)


def prompt_of(path):
    prompt = torch.zeros(1, 512, 20)
    prompt[0, :2] = load_file(path / "empty_prompt.safetensors")["prompt"]
    return prompt


def found(prior, picture, slots=2):
    """Features of a prior that joins its slots, one map a latent, [1+k d gh gw]."""
    return prior(picture)[0, 0].unflatten(0, (1 + slots, -1))


@torch.no_grad()
@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_a_future_is_a_clean_first_latent_at_time_zero_and_noise_behind_it(prior_checkpoint, load, engine):
    path, picture = prior_checkpoint("wan2.2_ti2v_5b"), frames()
    vae = AutoencoderKLWan.from_pretrained(path / "vae").eval()
    network = WanTransformer3DModel.from_pretrained(path / "transformer").eval()
    clean = vae.encode(2 * picture.transpose(2, 3)[0] - 1).latent_dist.mean
    latent = torch.cat([clean, seeded(6, 3, 4, 4)[None, :, 1:]], dim=2)
    time = torch.tensor([0.0] * 4 + [1000.0] * 8)[None]
    expected = read_blocks(network, latent, time, prompt_of(path))
    torch.testing.assert_close(found(load("wan2.2_ti2v_5b", engine=engine), picture), expected, **TIGHT)


@torch.no_grad()
def test_vace_is_shown_the_frame_by_its_pipelines_masked_video(prior_checkpoint, load):
    name, picture = "wan2.1_vace_1.3b", frames(size=32)
    path = prior_checkpoint(name)
    vae = AutoencoderKLWan.from_pretrained(path / "vae").eval()
    network = WanVACETransformer3DModel.from_pretrained(path / "transformer").eval()
    video, mask = torch.zeros(1, 3, 9, 32, 32), torch.ones(1, 3, 9, 32, 32)
    video[:, :, 0], mask[:, :, 0] = 2 * picture[0, :, 0] - 1, 0
    pipeline: Any = pipeline_of(vae, network)
    shown = WanVACEPipeline.prepare_video_latents(pipeline, video, mask, [[]], device=torch.device("cpu"))
    masks = WanVACEPipeline.prepare_masks(pipeline, mask, [[]])
    expected = read_blocks(
        network,
        seeded(4, 3, 4, 4)[None],
        torch.tensor([1000.0]),
        prompt_of(path),
        control_hidden_states=torch.cat([shown, masks], dim=1),
    )
    torch.testing.assert_close(found(load(name), picture), expected, **TIGHT)


@torch.no_grad()
def test_i2v_is_shown_the_frame_by_its_pipelines_channels_and_by_clip(prior_checkpoint, load):
    name, picture = "wan2.1_i2v_14b", frames(size=32)
    path = prior_checkpoint(name)
    vae = AutoencoderKLWan.from_pretrained(path / "vae").eval()
    network = WanTransformer3DModel.from_pretrained(path / "transformer").eval()
    clip = CLIPVisionModel.from_pretrained(path / "image_encoder").eval()
    prior = load(name)
    pipeline: Any = pipeline_of(vae, network)
    image = 2 * picture[0, :, 0] - 1
    size: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "dtype": torch.float32}
    latent, condition = WanImageToVideoPipeline.prepare_latents(
        pipeline, image, 1, 4, **size, device=torch.device("cpu"), latents=seeded(4, 3, 4, 4)[None]
    )
    pixels = (resize(picture[0, :, 0], 32, 32) - prior.clip_mean) / prior.clip_std
    tokens = clip(pixels, output_hidden_states=True).hidden_states[-2]
    expected = read_blocks(
        network,
        torch.cat([latent, condition], dim=1),
        torch.tensor([1000.0]),
        prompt_of(path),
        encoder_hidden_states_image=tokens,
    )
    torch.testing.assert_close(found(prior, picture), expected, **TIGHT)


@pytest.mark.parametrize("name", ["wan2.2_ti2v_5b", "wan_tiny"])
def test_the_fast_form_of_a_future_equals_the_plain_path(prior_checkpoint, name):
    path = None if name == "wan_tiny" else str(prior_checkpoint(name))
    values = {"path": path, "dtype": "float32", "clip": "future", "layer": (1, 2), "noise_level": 0.8}
    plain, fast = (
        make_prior(PriorConfig(name=name, engine=engine, future_slots=3, **values), GRID)
        for engine in ("plain", "fast")
    )
    pictures = frames(views=2)
    torch.testing.assert_close(fast(pictures), plain(pictures), **TIGHT)
    fresh = [prior(pictures, torch.Generator().manual_seed(5)) for prior in (plain, fast)]
    torch.testing.assert_close(fresh[1], fresh[0], **TIGHT)
    assert not torch.allclose(fresh[0], plain(pictures), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_slots_are_joined_by_mean_or_one_after_another(load, name):
    joined, mean = load(name)(frames(views=2)), load(name, slot_pool="mean")(frames(views=2))
    assert joined.shape == (1, 2, 3 * 2 * 48, *GRID)
    torch.testing.assert_close(mean, joined.unflatten(2, (3, 96)).mean(dim=2), **TIGHT)
    assert load(name, slot_pool="mean").width == 96
    single = load(name, layer=2)(frames(views=2))
    torch.testing.assert_close(single, joined.unflatten(2, (3, 2, 48))[:, :, :, 1].flatten(2, 3), **TIGHT)


def test_attention_over_slots_is_trained_and_reads_every_slot():
    torch.manual_seed(0)
    policy = VegaPolicy(
        tiny_config(PriorConfig(name="wan_tiny_untrained", layer=0, clip="future", slot_pool="attention"))
    )
    assert isinstance(policy.model.project, SlotAttention)
    loss, _ = policy(batch())
    loss.backward()
    assert all(weight.grad is not None for weight in policy.model.project.parameters())
    features = torch.randn(2, 5, 3 * 256, requires_grad=True)
    policy.model.project(features).square().sum().backward()
    assert (features.grad.unflatten(-1, (3, 256)).norm(dim=-1) > 1e-6).all()


def test_shuffled_features_in_training_are_those_of_another_sample():
    torch.manual_seed(0)
    model = VegaPolicy(tiny_config(PriorConfig(name="random", shuffle=True))).model
    seen = batch()
    frames_ = torch.stack([seen[key] for key in CAMERAS], dim=1)[:, :, None]
    observation = Observation(frames_, seen["observation.state"], seen["task"])
    own = model.eval().prior_tokens(observation)
    assert not torch.allclose(own[0], own[1], atol=1e-3)
    torch.testing.assert_close(model.train().prior_tokens(observation), own.flip(0))


def test_slot_attention_is_softmax_attention_of_the_first_slot():
    torch.manual_seed(0)
    layer = SlotAttention(12, 3, 8)
    features = torch.randn(7, 12)
    tokens = layer.embed(layer.norm(features.view(7, 3, 4))) + layer.position
    key, value = layer.key_value(tokens).chunk(2, dim=-1)
    query = layer.query(tokens[:, :1])
    query, key, value = (x.unflatten(-1, (4, 2)).transpose(1, 2) for x in (query, key, value))
    mixed = nn.functional.scaled_dot_product_attention(query, key, value).flatten(1)
    torch.testing.assert_close(layer(features), layer.mlp(tokens[:, 0] + mixed), **TIGHT)


def test_a_prior_of_frames_joins_the_layers_that_it_reads(wan_checkpoint):
    def read(layer, engine):
        values = {"path": str(wan_checkpoint), "dtype": "float32", "engine": engine}
        return make_prior(PriorConfig(name="wan2.1_t2v_1.3b", layer=layer, **values), (4, 4))(frames())

    expected = torch.cat([read(0, "plain"), read(2, "plain")], dim=2)
    for engine in ("plain", "fast"):
        torch.testing.assert_close(read((0, 2), engine), expected, **TIGHT)


def test_the_slots_of_a_future_are_pure_noise_by_default_and_layers_may_be_a_list():
    resolved = resolve(from_config(PriorConfig, {"name": "wan_tiny", "clip": "future", "layer": [2, 5]}))
    assert (resolved.noise_level, resolved.layer) == (1.0, (2, 5))
    assert resolve(PriorConfig(name="wan_tiny")).noise_level == PRIORS["wan_tiny"].noise_level
    assert resolve(PriorConfig(name="wan_tiny", clip="future", noise_level=0.7)).noise_level == 0.7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "wan2.1_t2v_1.3b"},
            r"'wan2.1_t2v_1.3b' cannot, since it was trained from text to video.* wan_tiny",
        ),
        ({"name": "dinov3"}, "'dinov3' cannot, since it encodes frames and generates none.*wan2.2_ti2v_5b"),
        ({"name": "svd"}, "'svd' cannot, since its reading of a frame followed by noise is not implemented"),
        ({"name": "wan_tiny", "layer": (5, 2)}, r"different layers in rising order; got \[5, 2\]"),
        ({"name": "wan_tiny", "layer": (2, 8)}, r"blocks 0 to 7; got \(2, 8\)"),
        ({"name": "wan_tiny", "future_slots": 0}, "future_slots: expected at least 1; got 0"),
        ({"name": "wan_tiny", "slot_pool": "max"}, "expected one of mean, concat, attention; got 'max'"),
        ({"name": "wan_tiny", "prompt": "task"}, "expected one of empty, instruction; got 'task'"),
        (
            {"name": "wan_tiny", "prompt": "instruction", "clip": "frame"},
            "needs prior.clip=future; got prior.clip=frame",
        ),
    ],
)
def test_futures_that_cannot_be_read_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        make_prior(PriorConfig(**({"clip": "future"} | values)), GRID)


def test_i2v_refuses_a_frame_alone_and_a_prior_of_one_layer_several(load):
    with pytest.raises(ValueError, match=r"'wan2\.1_i2v_14b' continues a frame"):
        load("wan2.1_i2v_14b", clip="frame")
    with pytest.raises(ValueError, match=r"'sd_vae' has the single layer 0; got \(0, 2\)"):
        load("sd_vae", clip="frame")
    with pytest.raises(ValueError, match=r"'dinov3' is read at one layer; got \[0, 2\]"):
        load("dinov3", clip="frame")


def test_the_shipped_prior_warns_that_it_has_not_learned_to_continue_a_frame(caplog, tmp_path):
    make_prior(PriorConfig(name="wan_tiny", clip="future"), GRID)
    assert "their slots are no trained prediction" in caplog.text
    caplog.clear()
    (tmp_path / wan_module.TRAINING).write_text('{"clips": {"frames": 9}}')
    wan_module.warn_of_training(tmp_path, 2)
    make_prior(PriorConfig(name="wan_tiny_untrained", clip="future"), GRID)
    assert not [one for one in caplog.records if one.name.startswith("vega_policy")]
    wan_module.warn_of_training(tmp_path, 3)
    assert "trained on clips with 2 slots" in caplog.text


def toy_words(asked):
    """Stands in for MiniLM, 27 million weights: one vector for each word."""

    def encode(sentences):
        asked.extend(sentences)
        return [
            torch.stack([torch.full((384,), len(word) / 4) for word in text.split()]) for text in sentences
        ]

    return encode


@pytest.fixture
def asked(monkeypatch):
    """Sentences that the small Wan's text encoder was given."""
    sentences = []
    monkeypatch.setattr(wan_module, "_load_minilm", lambda: toy_words(sentences))
    return sentences


def test_with_its_instruction_a_future_depends_on_it_and_each_sentence_is_encoded_once(asked):
    config = PriorConfig(name="wan_tiny_untrained", layer=0, clip="future", prompt="instruction")
    prior, pictures = make_prior(config, GRID), frames(views=2).expand(3, -1, -1, -1, -1, -1)
    texts = ["lift the cube", "open", "lift the cube"]
    features = prior(pictures, instruction=texts)
    torch.testing.assert_close(features[0], features[2])
    assert not torch.allclose(features[0], features[1], atol=1e-4)
    prior(pictures, instruction=texts)
    assert asked == ["lift the cube", "open"]
    alone = prior(pictures[1:2], instruction=["open"])
    torch.testing.assert_close(alone[0], features[1], **TIGHT)
    policy = VegaPolicy(tiny_config(config))
    policy(batch())
    assert asked[2:] == ["lift the red cube"]


@torch.no_grad()
@pytest.mark.parametrize("layer", [(1,), (0, 1)])
def test_the_fast_form_with_instructions_equals_the_plain_path(asked, layer):
    values = {"name": "wan_tiny", "clip": "future", "layer": layer, "prompt": "instruction"}
    plain, fast = (make_prior(PriorConfig(engine=engine, **values), GRID) for engine in ("plain", "fast"))
    pictures, texts = frames(views=2).expand(2, -1, -1, -1, -1, -1), ["lift the red cube", "open"]
    expected = plain(pictures, instruction=texts)
    torch.testing.assert_close(fast(pictures, instruction=texts), expected, **TIGHT)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_an_instruction_reaches_the_blocks_with_all_of_wans_padding(asked):
    prior = make_prior(PriorConfig(name="wan_tiny", clip="future", layer=0, prompt="instruction"), GRID)
    (words,) = toy_words([])(["lift the cube"])
    padded = torch.cat([words, torch.zeros(512 - len(words), 384)])[None]
    _, (prompt, *_) = prior.embed(torch.randn(1, 16, 3, 4, 4), ["lift the cube"])
    torch.testing.assert_close(prompt, prior.transformer.condition_embedder.text_embedder(padded), **TIGHT)


def test_wans_instruction_is_encoded_by_the_text_encoder_of_its_checkpoint(prior_checkpoint, tmp_path, load):
    folder = tmp_path / "wan"
    shutil.copytree(prior_checkpoint("wan2.2_ti2v_5b"), folder)
    with pytest.raises(FileNotFoundError, match=r"no text_encoder.*prior.prompt=empty does not"):
        load("wan2.2_ti2v_5b", path=str(folder), prompt="instruction")
    write_text_encoder(folder, ("lift", "open", "cube"))
    prior = load("wan2.2_ti2v_5b", path=str(folder), prompt="instruction")
    words, count = prior.words(["lift cube", "open"])
    assert words.shape == (2, wan_module.WORDS, 20)
    assert (
        [int(x.abs().amax(dim=1).count_nonzero()) for x in words] == count.tolist() == [3, 2]
    )  # and the end
    features = prior(frames().expand(2, -1, -1, -1, -1, -1), instruction=["lift cube", "open"])
    assert not torch.equal(features[0], features[1])


def test_the_small_wan_of_another_text_width_refuses_instructions(monkeypatch):
    entry = PRIORS["wan_tiny_untrained"]
    small = entry.architecture | {"transformer": entry.architecture["transformer"] | {"text_dim": 20}}
    monkeypatch.setitem(PRIORS, "wan_tiny_untrained", replace(entry, architecture=small))
    with pytest.raises(ValueError, match="384 wide; these weights take 20"):
        make_prior(PriorConfig(name="wan_tiny_untrained", clip="future", prompt="instruction"), GRID)
