import pytest
import torch

from vega_policy.fusion import FUSIONS, make_fusion
from vega_policy.parts import FusionConfig

WIDTH = 16


def streams():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, WIDTH, generator=generator), torch.randn(2, 5, WIDTH, generator=generator)


def gate_at(blend, bias, **config):
    fusion = make_fusion(WIDTH, FusionConfig(blend=blend, gate_bias=bias, **config))
    torch.nn.init.zeros_(fusion.logit.weight)
    return fusion


@pytest.mark.parametrize("blend", ["raw", "normalized", "residual"])
def test_an_open_gate_passes_the_semantic_stream_alone(blend):
    semantic, prior = streams()
    fused = gate_at(blend, 50.0)(semantic, prior)
    expected = torch.nn.functional.layer_norm(semantic, (WIDTH,)) if blend == "normalized" else semantic
    torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("blend", ["raw", "normalized", "residual"])
def test_a_closed_gate_passes_the_prior_alone(blend):
    semantic, prior = streams()
    fused = gate_at(blend, -50.0, residual_scale=1.0)(semantic, prior)
    expected = torch.nn.functional.layer_norm(prior, (WIDTH,)) if blend == "normalized" else prior
    torch.testing.assert_close(fused, expected)


def test_the_residual_blend_starts_a_fifth_of_the_way_to_the_raw_mix():
    semantic, prior = streams()
    fused = gate_at("residual", 0.0)(semantic, prior)
    torch.testing.assert_close(fused, semantic + 0.2 * (0.5 * semantic + 0.5 * prior - semantic))


def test_a_residual_of_scale_zero_is_the_identity():
    semantic, prior = streams()
    assert torch.equal(gate_at("residual", 0.0, residual_scale=0.0)(semantic, prior), semantic)


def test_the_gate_is_one_number_a_token_that_depends_on_both_streams():
    semantic, prior = streams()
    fusion = make_fusion(WIDTH, FusionConfig())
    fusion(semantic, prior)
    first = fusion.gate
    assert first.shape == (2, 5, 1)
    for changed in ((semantic.flip(0), prior), (semantic, prior.flip(0))):
        fusion(*changed)
        assert not torch.equal(first, fusion.gate)


def test_add_is_the_sum():
    semantic, prior = streams()
    assert torch.equal(make_fusion(WIDTH, FusionConfig(name="add"))(semantic, prior), semantic + prior)


@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_every_fusion_makes_as_many_tokens_as_it_says(name):
    fusion = make_fusion(WIDTH, FusionConfig(name=name))
    assert fusion(*streams()).shape == (2, fusion.tokens(5), WIDTH)


def test_an_unknown_fusion_or_blend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'sum'.*add, token_gate"):
        make_fusion(WIDTH, FusionConfig(name="sum"))
    with pytest.raises(ValueError, match="'raw', 'normalized' or 'residual'"):
        FusionConfig(blend="soft")
