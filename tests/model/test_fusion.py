import dataclasses

import pytest
import torch
from torch.nn import functional

from tests.policies import CAMERAS, SIZE, batch, tiny_config
from tests.prior_checkpoints import FUTURE_ONLY, LAST, WRITERS
from vega_policy.backbones import make_backbone
from vega_policy.model.config import FUSIONS, FusionConfig, PriorConfig
from vega_policy.model.fusion import make_fusion
from vega_policy.model.observation import Observation
from vega_policy.model.vega import VegaModel
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.priors import PRIORS, make_prior
from vega_policy.priors.baselines import FeatureWriter

WIDTH = 16
GRID = (2, 3)
GATES = ("token_gate", "channel_gate", "instruction_gate")


def streams():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, WIDTH, generator=generator), torch.randn(2, 6, WIDTH, generator=generator)


def instruction():
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))


def fusion(name="token_gate", **config):
    torch.manual_seed(0)
    return make_fusion(WIDTH, FusionConfig(name=name, **config), GRID)


def gate_at(blend, bias, name="token_gate", **config):
    made = fusion(name, blend=blend, gate_bias=bias, **config)
    torch.nn.init.zeros_(made.logit.weight)
    return made


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("blend", ["raw", "normalized", "residual"])
def test_an_open_gate_passes_the_semantic_stream_alone(name, blend):
    semantic, prior = streams()
    fused = gate_at(blend, 50.0, name)(semantic, prior, instruction())
    expected = functional.layer_norm(semantic, (WIDTH,)) if blend == "normalized" else semantic
    torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("blend", ["raw", "normalized", "residual"])
def test_a_closed_gate_passes_the_prior_alone(name, blend):
    semantic, prior = streams()
    fused = gate_at(blend, -50.0, name, residual_scale=1.0)(semantic, prior, instruction())
    expected = functional.layer_norm(prior, (WIDTH,)) if blend == "normalized" else prior
    torch.testing.assert_close(fused, expected)


def test_the_residual_blend_starts_a_fifth_of_the_way_to_the_raw_mix():
    semantic, prior = streams()
    fused = gate_at("residual", 0.0)(semantic, prior)
    torch.testing.assert_close(fused, semantic + 0.2 * (0.5 * semantic + 0.5 * prior - semantic))


@pytest.mark.parametrize("name", GATES)
def test_a_residual_of_scale_zero_is_the_identity(name):
    semantic, prior = streams()
    fused = gate_at("residual", 0.0, name, residual_scale=0.0)(semantic, prior, instruction())
    assert torch.equal(fused, semantic)


@pytest.mark.parametrize("name", GATES)
def test_the_gate_is_one_number_a_token_that_depends_on_both_streams(name):
    semantic, prior = streams()
    made = fusion(name)
    made(semantic, prior, instruction())
    first = made.gate
    assert first.shape == (2, 6, 1)
    for changed in ((semantic.flip(0), prior), (semantic, prior.flip(0))):
        made(*changed, instruction())
        assert not torch.equal(first, made.gate)


def test_the_channel_gate_weighs_each_channel_by_itself():
    semantic, prior = streams()
    made = gate_at("raw", 0.0, "channel_gate")
    torch.nn.init.constant_(made.logit.bias[:4], 50.0)
    torch.nn.init.constant_(made.logit.bias[4:], -50.0)
    expected = torch.cat([semantic[..., :4], prior[..., 4:]], dim=-1)
    torch.testing.assert_close(made(semantic, prior), expected)
    torch.testing.assert_close(made.gate, torch.full((2, 6, 1), 4 / WIDTH))


def test_the_instruction_shifts_the_logit_of_every_token_by_the_same_scaled_number():
    semantic, prior = streams()
    made = fusion("instruction_gate", context_scale=2.0)
    logits = []
    for context in (instruction(), torch.zeros(2, WIDTH)):
        made(semantic, prior, context)
        logits.append(made.gate.logit())
    shift = 2.0 * functional.layer_norm(instruction(), (WIDTH,)) @ made.instruction[1].weight[0]
    torch.testing.assert_close(
        logits[0] - logits[1], shift[:, None, None].expand(2, 6, 1), atol=1e-5, rtol=1e-4
    )


def test_the_instruction_gate_starts_at_its_own_bias_and_refuses_to_guess_an_instruction():
    assert fusion("instruction_gate").logit.bias.item() == -0.5
    assert fusion("token_gate").logit.bias.item() == 0.0
    assert fusion("instruction_gate", gate_bias=1.0).logit.bias.item() == 1.0
    with pytest.raises(ValueError, match="needs the pooled instruction as context; got none"):
        fusion("instruction_gate")(*streams())


def test_add_is_the_sum():
    semantic, prior = streams()
    assert torch.equal(fusion("add")(semantic, prior), semantic + prior)


def test_weights_start_at_one_half_each_and_only_their_ratio_counts():
    semantic, prior = streams()
    made = fusion("weighted")
    torch.testing.assert_close(made(semantic, prior), (semantic + prior) / 2)
    for factor in (1.0, 10.0):
        torch.nn.init.zeros_(made.weights)
        made.weights.data += factor * torch.tensor([3.0, 1.0])
        torch.testing.assert_close(made(semantic, prior), 0.75 * semantic + 0.25 * prior)
    torch.testing.assert_close(made.gate, torch.full((2, 6, 1), 0.75))


def test_concat_is_an_mlp_of_both_streams_side_by_side():
    semantic, prior = streams()
    made = fusion("concat")
    first, last = made.mix[0], made.mix[2]
    hidden = semantic @ first.weight[:, :WIDTH].T + prior @ first.weight[:, WIDTH:].T + first.bias
    torch.testing.assert_close(made(semantic, prior), functional.gelu(hidden) @ last.weight.T + last.bias)


def test_sequence_concat_keeps_both_streams_whole():
    semantic, prior = streams()
    fused = fusion("sequence_concat")(semantic, prior)
    assert torch.equal(fused[:, :6], semantic)
    assert torch.equal(fused[:, 6:], prior)


def test_one_stream_alone_is_that_stream():
    semantic, prior = streams()
    assert torch.equal(fusion("prior_only")(semantic, prior), prior)
    assert torch.equal(fusion("semantic_only")(semantic, prior), semantic)


@pytest.mark.parametrize("layers", [1, 3])
def test_cross_attention_starts_as_the_identity(layers):
    semantic, prior = streams()
    assert torch.equal(fusion("cross_attention", layers=layers)(semantic, prior), semantic)


def awake(**config):
    made = fusion("cross_attention", **config)
    for block in made.blocks:
        torch.nn.init.normal_(block.attention.out_proj.weight)
    return made


@torch.no_grad()
def test_cross_attention_is_a_soft_look_up_of_the_prior_by_place():
    semantic, prior = streams()
    made = awake(heads=1)
    block, position = made.blocks[0], made.position
    query = block.attention.q_proj(functional.layer_norm(semantic, (WIDTH,)) + position)
    read = functional.layer_norm(prior, (WIDTH,)) + position
    key, value = block.attention.kv_proj(read).chunk(2, dim=-1)
    looked_up = (query @ key.mT / WIDTH**0.5).softmax(dim=-1) @ value
    torch.testing.assert_close(made(semantic, prior), semantic + block.attention.out_proj(looked_up))


@torch.no_grad()
def test_cross_attention_knows_the_place_of_a_prior_token():
    semantic, prior = streams()
    made = awake()
    assert not torch.allclose(made(semantic, prior), made(semantic, prior.flip(1)), atol=1e-4)


D = WIDTH
GATE = 4 * D + 2 * D + 1 + 1  # two norms, the logit's weight and bias, the residual scale
BLOCK = 6 * D + 4 * (D * D + D) + 8 * D * D + 5 * D  # three norms, attention, MLP


@pytest.mark.parametrize(
    ("name", "layers", "added"),
    [
        ("token_gate", 1, GATE),
        ("channel_gate", 1, 4 * D + 2 * D * D + D + 1),
        ("instruction_gate", 1, GATE + 3 * D + 1),
        ("add", 1, 0),
        ("weighted", 1, 2),
        ("concat", 1, 2 * D * D + D + D * D + D),
        ("sequence_concat", 1, 0),
        ("cross_attention", 1, BLOCK),
        ("cross_attention", 3, 3 * BLOCK),
        ("prior_only", 1, 0),
        ("semantic_only", 1, 0),
    ],
)
def test_every_fusion_adds_as_many_parameters_as_its_equation_has(name, layers, added):
    made = fusion(name, layers=layers)
    assert sum(parameter.numel() for parameter in made.parameters()) == added


@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_every_fusion_makes_as_many_tokens_as_it_says(name):
    made = fusion(name)
    assert made(*streams(), instruction()).shape == (2, made.tokens(6), WIDTH)


@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_every_fusion_trains_a_step_inside_a_policy(name):
    torch.manual_seed(0)
    policy = VegaPolicy(tiny_config(PriorConfig(name="random"), FusionConfig(name=name)))
    loss, log = policy(batch())
    loss.backward()
    assert loss.isfinite()
    assert ("gate" in log) == (name in (*GATES, "weighted"))


def test_the_policys_instruction_reaches_the_instruction_gate():
    torch.manual_seed(0)
    policy = VegaPolicy(tiny_config(fusion=FusionConfig(name="instruction_gate")))
    gates = []
    for sentence in ("lift the red cube", "open the drawer"):
        policy(batch() | {"task": sentence})
        gates.append(policy.model.gate)
    assert gates[0].shape == (4, 16, 1)
    assert not torch.equal(*gates)


def test_an_unknown_fusion_blend_or_size_says_what_is_possible():
    with pytest.raises(
        ValueError, match=r"'cross_atention'\. Did you mean 'cross_attention'\? Known: add, channel_gate"
    ):
        fusion("cross_atention")
    with pytest.raises(
        ValueError, match=r"fusion\.blend: expected one of raw, normalized, residual; got 'soft'"
    ):
        FusionConfig(blend="soft")
    with pytest.raises(ValueError, match="got 3 heads and width 16"):
        fusion("cross_attention", heads=3)
    with pytest.raises(ValueError, match=r"fusion.layers: expected at least 1; got 0"):
        FusionConfig(layers=0)


def write_features(folder):
    """What `batch()` shows, with features of another program."""
    seen = batch()
    frames = torch.stack([seen[key] for key in seen if key.startswith("observation.images")], dim=1)
    writer = FeatureWriter(folder, "stand-in")
    writer.add(frames, torch.randn(2, 2, 6, SIZE // 16, SIZE // 16))
    writer.close()
    return folder


def prior_config(name, folder, prior_checkpoint, wan_checkpoint):
    if name in ("random", "wan_tiny", "wan_tiny_untrained"):
        return PriorConfig(name=name)
    if name == "precomputed":
        return PriorConfig(name=name, path=str(write_features(folder)))
    if name in FUTURE_ONLY:
        return PriorConfig(
            name=name, path=str(prior_checkpoint(name)), layer=2, dtype="float32", clip="future"
        )
    if name in WRITERS:
        path, layer = prior_checkpoint(name), LAST[name]
    else:
        path, layer = wan_checkpoint, 2
    return PriorConfig(name=name, path=str(path), layer=layer, dtype="float32")


@pytest.fixture(scope="module")
def backbone():
    """One for all priors, both encoders frozen: what is tried lies behind them."""
    torch.manual_seed(0)
    config = tiny_config(freeze_image_encoder=True, freeze_text_encoder=True)
    return make_backbone(config.backbone, state_dim=8, views=2, frame_size=SIZE)


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_every_prior_trains_a_step_with_a_third_of_the_fusions_and_these_with_a_third_of_the_priors(
    name, backbone, tmp_path, prior_checkpoint, wan_checkpoint
):
    torch.manual_seed(0)
    config = tiny_config(prior_config(name, tmp_path / "features", prior_checkpoint, wan_checkpoint))
    model = VegaModel(config.model, (backbone, make_prior(config.prior, backbone.grid)))
    given = batch()
    frames = torch.stack([given[key] for key in CAMERAS], dim=1)[:, :, None]
    seen = Observation(frames, given["observation.state"], given["task"])
    streams = {"semantic": model.semantic_features(seen), "prior": model.prior_features(seen)}
    read_once = dataclasses.replace(seen, **streams)  # frozen, so the same for every fusion
    for fusion in sorted(FUSIONS)[sorted(PRIORS).index(name) % 3 :: 3]:
        model.fusion = make_fusion(backbone.width, FusionConfig(name=fusion), backbone.grid)
        model.zero_grad()
        drawn = model.head.sample_noise_and_time(given["action"])
        loss = model.loss(read_once, given["action"], None, *drawn).mean()
        loss.backward()
        assert loss.isfinite(), fusion
        learns = [parameter.grad is not None for parameter in model.project.parameters()]
        assert all(learns) == (fusion != "semantic_only"), fusion
