import copy
import logging

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.nn.attention import SDPBackend

from tests import tiny_wan
from tests.policies import frames
from vega_policy.model.config import PriorConfig
from vega_policy.priors import make_prior
from vega_policy.priors.base import PROMPT_LENGTH
from vega_policy.priors.wan import Engine, LatentWorldSimulator
from vega_policy.priors.wan_fast import (
    CapturedWan,
    FastWan,
    FixedTransformer,
    FrameEncoder,
    Plan,
    PromptAttention,
    SelfAttention,
    constant_modulation,
    embed_prompt,
    frame_convolution,
    padded_softmax,
    rotary_tables,
    rotate,
    split_pairs,
)

TIGHT = {"atol": 1e-5, "rtol": 1e-5}
VAE = tiny_wan.VAE | {"dim_mult": [1, 2, 1, 1]}
VAE_OF_WAN22 = VAE | {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "num_res_blocks": 2,
}


def random_gains(module):
    """Norms start at one, which would hide a forgotten gain."""
    for part in module.modules():
        if isinstance(part, torch.nn.RMSNorm):
            torch.nn.init.normal_(part.weight, 1, 0.3)
        if isinstance(part, WanRMS_norm):
            torch.nn.init.normal_(part.gamma, 1, 0.3)
        if isinstance(part, torch.nn.LayerNorm) and part.elementwise_affine:
            torch.nn.init.normal_(part.weight, 1, 0.3)
            torch.nn.init.normal_(part.bias, 0, 0.3)
    return module.eval().requires_grad_(False)


def make_vae(**values):
    torch.manual_seed(0)
    return random_gains(AutoencoderKLWan(**(VAE | values)))


def make_transformer(**values):
    torch.manual_seed(1)
    return random_gains(WanTransformer3DModel(**(tiny_wan.TRANSFORMER | values)))


def make_prompt(n, seed=0):
    words = torch.randn(n, 20, generator=torch.Generator().manual_seed(seed))
    return functional.pad(words, (0, 0, 0, PROMPT_LENGTH - n))


def make_wan(n=1, grid=(4, 6), vae=None, **config):
    values = {"layer": 1, "noise_level": 0.3, "dtype": "float32", "engine": "plain"} | config
    parts = {"vae": vae or make_vae(), "transformer": make_transformer(), "prompt": make_prompt(n)[:n]}
    prior = LatentWorldSimulator(parts, PriorConfig(name="wan_tiny", **values), grid, fingerprint="of a test")
    return prior.eval().requires_grad_(False)


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), ((3, 1, 1), (1, 0, 0))])
def test_on_one_frame_a_causal_convolution_is_its_last_slice_in_two_dimensions(kernel, padding):
    conv = WanCausalConv3d(5, 7, kernel, padding=padding)
    picture = torch.randn(2, 5, 6, 9)
    torch.testing.assert_close(frame_convolution(conv)(picture), conv(picture[:, :, None])[:, :, 0], **TIGHT)


@pytest.mark.parametrize("values", [{}, VAE_OF_WAN22], ids=["wan2.1", "wan2.2"])
@pytest.mark.parametrize("temporal", [(False, True, True), (True, True, False)])
def test_the_two_dimensional_encoder_equals_the_video_encoder_on_one_frame(values, temporal):
    vae = make_vae(**values, temperal_downsample=list(temporal))
    pictures = torch.rand(3, 3, 64, 96)
    expected = vae.encode(2 * pictures[:, :, None] - 1).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(FrameEncoder(vae)(pictures), expected, **TIGHT)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_softmax_over_the_prompt_and_one_counted_blank_equals_softmax_over_all_the_padding(n):
    logits = 5 * torch.randn(4, n)
    padded = torch.cat([logits, torch.zeros(4, PROMPT_LENGTH - n)], dim=1)
    expected = padded.softmax(dim=1)[:, :n]
    torch.testing.assert_close(padded_softmax(logits, PROMPT_LENGTH - n), expected, **TIGHT)


def test_without_padding_the_counted_blank_takes_no_weight():
    logits = torch.randn(4, 3)
    torch.testing.assert_close(padded_softmax(logits, 0), logits.softmax(dim=1), **TIGHT)


@pytest.mark.parametrize("n", [1, 2, 7, PROMPT_LENGTH])
def test_folded_cross_attention_equals_attention_to_the_whole_padded_prompt(n):
    transformer = make_transformer()
    attention, prompt = transformer.blocks[0].attn2, make_prompt(n)
    embedded = transformer.condition_embedder.text_embedder(prompt[None])
    tokens = 3 * torch.randn(2, 10, 48)
    text, padding = embed_prompt(transformer, prompt)
    assert (len(text), padding) == (n + 1, PROMPT_LENGTH - n)
    folded = PromptAttention(attention, text, padding)(tokens)
    torch.testing.assert_close(folded, attention(tokens, embedded.expand(2, -1, -1)), **TIGHT)


def test_the_output_of_cross_attention_to_one_token_has_rank_of_the_number_of_heads():
    transformer = make_transformer()
    folded = PromptAttention(transformer.blocks[0].attn2, *embed_prompt(transformer, make_prompt(1)))
    assert folded.table.shape == (2, 48)
    change = folded(torch.randn(1, 40, 48))[0] - folded.constant
    assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 2


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_the_constant_modulation_is_what_the_time_embedding_gives(level):
    transformer = make_transformer()
    _, expected, _, _ = transformer.condition_embedder(
        torch.full((1,), 1000 * level), make_prompt(1)[None], None
    )
    torch.testing.assert_close(constant_modulation(transformer, level).flatten(), expected[0], **TIGHT)


def test_one_product_for_query_key_value_with_rotary_tables_equals_diffusers_self_attention():
    transformer = make_transformer()
    attention = transformer.blocks[0].attn1
    latent, tokens = torch.empty(1, 4, 1, 8, 12), torch.randn(2, 24, 48)
    expected = attention(tokens, None, None, transformer.rope(latent))
    found = SelfAttention(attention)(tokens, rotary_tables(transformer, latent))
    torch.testing.assert_close(found, expected, **TIGHT)


def test_moving_rotary_pairs_apart_changes_no_scalar_product():
    order = split_pairs(48, 2)
    assert order[:4].tolist() == [0, 2, 4, 6]
    assert order[12:14].tolist() == [1, 3]
    assert order[24].item() == 24  # heads stay where they are
    query, key = torch.randn(2, 1, 5, 2, 24)
    angle = torch.randn(5, 1, 12)
    cosine, sine = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    pairs = [torch.view_as_complex(x.unflatten(-1, (12, 2)).contiguous()) for x in (query, key)]
    turn = torch.polar(torch.ones_like(angle), angle)
    expected = ((pairs[0] * turn) * (pairs[1] * turn).flip(1).conj()).real.sum(-1)
    moved = [rotate(x.flatten(2)[..., order].unflatten(-1, (2, 24)), (cosine, sine)) for x in (query, key)]
    torch.testing.assert_close((moved[0] * moved[1].flip(1)).sum(-1), expected, **TIGHT)


def test_the_fixed_transformer_equals_the_plain_one_behind_its_last_block():
    prior = make_wan(n=2)
    latent = torch.randn(2, 4, 8, 12)
    fixed = FixedTransformer(prior.transformer, prior.prompt[0], 0.3, (8, 12))
    expected = prior.run_blocks(latent[:, :, None]).flatten(3).transpose(2, 3)[:, 0]
    torch.testing.assert_close(fixed(latent), expected, **TIGHT)


def test_the_fast_form_has_no_block_behind_the_one_that_is_read():
    assert len(FastWan(make_wan(layer=0)).transformer.blocks) == 1
    assert len(FastWan(make_wan(layer=2)).transformer.blocks) == 3


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("views", [1, 3])
def test_all_reductions_together_equal_the_plain_path(n, views):
    plain, fast = make_wan(n, engine="plain"), make_wan(n, engine="fast")
    pictures = frames(views=views)
    expected = plain(pictures)
    assert expected.shape == (1, views, 48, 4, 6)
    torch.testing.assert_close(fast(pictures), expected, **TIGHT)
    fresh = [prior(pictures, torch.Generator().manual_seed(5)) for prior in (plain, fast)]
    torch.testing.assert_close(fresh[1], fresh[0], **TIGHT)
    assert not torch.allclose(fresh[0], expected)


def test_the_fast_form_of_wan22s_autoencoder_equals_the_plain_path():
    plain, fast = (make_wan(vae=make_vae(**VAE_OF_WAN22), engine=engine) for engine in ("plain", "fast"))
    torch.testing.assert_close(fast(frames(views=2)), plain(frames(views=2)), **TIGHT)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_packaged_tiny_prior_gives_the_same_features_fast_and_plain(grid):
    plain, auto = (
        make_prior(PriorConfig(name="wan_tiny", engine=engine), grid) for engine in ("plain", "auto")
    )
    torch.testing.assert_close(auto(frames(views=2)), plain(frames(views=2)), **TIGHT)


def test_in_half_precision_the_fast_path_is_as_near_to_float32_as_the_plain_one():
    exact = make_wan()
    pictures = frames(views=2)
    expected = exact(pictures)
    errors = {}
    for engine in ("plain", "fast"):
        prior = make_wan(engine=engine).to(torch.bfloat16)
        features = prior(pictures)
        assert features.dtype == torch.bfloat16
        errors[engine] = ((features.float() - expected).norm() / expected.norm()).item()
    assert 1e-4 < errors["fast"] < 1.1 * errors["plain"] < 0.1


def test_the_engine_refuses_what_it_was_not_built_for():
    engine = FastWan(make_wan())
    pictures, noise = torch.rand(2, 3, 64, 96), torch.randn(4, 1, 8, 12)
    assert engine(pictures, noise, 0.3).shape == (2, 48, 4, 6)
    with pytest.raises(ValueError, match=r"frames \[n 3 64 96\]; got \[2, 3, 96, 64\].*prior.engine=plain"):
        engine(pictures.mT, noise, 0.3)
    with pytest.raises(ValueError, match=r"noise \[4, 1, 8, 12\] .*; got \[3, 4, 1, 8, 12\]"):
        engine(pictures, noise.expand(3, -1, -1, -1, -1), 0.3)
    with pytest.raises(ValueError, match=r"float32; got torch.float64 and torch.float32"):
        engine(pictures.double(), noise, 0.3)
    with pytest.raises(ValueError, match=r"on cpu; got frames on meta"):
        engine(pictures.to("meta"), noise, 0.3)
    with pytest.raises(ValueError, match=r"noise level 0.3; got 0.5"):
        engine(pictures, noise, 0.5)


def test_a_prior_whose_noise_level_was_changed_after_its_first_call_is_refused():
    prior = make_wan(engine="auto")
    prior(frames())
    prior.noise_level = 0.7
    with pytest.raises(ValueError, match=r"noise level 0.3; got 0.7"):
        prior(frames())


def test_auto_takes_the_plain_path_where_there_is_no_fast_one_and_says_why(caplog):
    vae = make_vae()
    vae.use_tiling = True
    with caplog.at_level(logging.INFO):
        prior = make_wan(vae=vae, engine="auto")
        prior(frames())
        prior(frames())
    assert caplog.text.count("prior.engine=auto takes the plain path: its autoencoder works in tiles") == 1
    with pytest.raises(ValueError, match=r"prior.engine=fast.*works in tiles.*prior.engine=plain"):
        make_wan(vae=vae, engine="fast")(frames())


def test_auto_says_once_that_it_takes_the_fast_path(caplog):
    with caplog.at_level(logging.INFO):
        prior = make_wan(engine="auto")
        prior(frames())
        prior(frames())
    assert caplog.text.count("prior.engine=auto: exact reductions for frames of 64x96") == 1


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match=r"prior\.engine: expected one of plain, fast, auto; got 'turbo'"):
        PriorConfig(engine="turbo")


def test_the_fast_engine_refuses_videos_of_several_frames():
    with pytest.raises(ValueError, match=r"reads single frames; prior.clip=history needs prior.engine=auto"):
        PriorConfig(engine="fast", clip="history")


def test_a_prior_that_changes_its_type_builds_another_engine():
    prior = make_wan(engine="fast")
    assert prior(frames()).dtype == torch.float32
    assert prior.to(torch.bfloat16)(frames()).dtype == torch.bfloat16


def test_a_copy_of_a_used_prior_works_and_carries_no_engine():
    prior = make_wan(engine="fast")
    expected = prior(frames())
    twin = copy.deepcopy(prior)
    assert isinstance(prior.fast_engine, Engine)
    assert twin.fast_engine is not prior.fast_engine
    assert torch.equal(twin(frames()), expected)


def test_the_engine_adds_nothing_to_what_a_prior_holds():
    prior = make_wan(engine="fast")
    before = sorted(prior.state_dict())
    prior(frames())
    assert sorted(prior.state_dict()) == before


def test_all_blocks_share_one_compiled_function():
    torch._dynamo.reset()
    counter = CompileCounter()
    fixed = FixedTransformer(make_transformer(), make_prompt(1), 0.3, (8, 12))
    blocks = [torch.compile(block, backend=counter, fullgraph=True, dynamic=False) for block in fixed.blocks]
    latent = torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        compiled = fixed.run(fixed.embed(latent), blocks)
        torch.testing.assert_close(compiled, fixed(latent), **TIGHT)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_plan_names_its_attention_kernel_and_at_least_one_frame():
    assert Plan(attention="flash").kernels[0] == SDPBackend.FLASH_ATTENTION
    assert len(set(Plan().kernels)) == 4
    with pytest.raises(ValueError, match="one of cudnn, flash, efficient, math; got 'sage'"):
        Plan(attention="sage")
    with pytest.raises(ValueError, match="encode_at_once: expected at least 1; got 0"):
        Plan(encode_at_once=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_captured_graph_gives_the_plain_features_and_refuses_another_batch():
    plain, fast = make_wan(engine="plain").cuda(), make_wan(engine="fast").cuda()
    pictures = frames(views=2).cuda()
    torch.testing.assert_close(fast(pictures), plain(pictures), atol=1e-3, rtol=1e-3)
    assert isinstance(fast.fast_engine.captured, CapturedWan)
    with pytest.raises(ValueError, match="batches of 2 frames; got 1"):
        fast(pictures[:, :1])
