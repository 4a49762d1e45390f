"""Hugging Face models as backbones: the fusion sits inside each model's own forward pass."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BertConfig

from tests.policies import batch, tiny_config
from tests.synthetic_dataset import square_frame
from tests.vlm_checkpoints import WRITERS, Folders, build, vlm
from vega_policy.backbones import BACKBONES, make_backbone
from vega_policy.backbones.vlm import TILING
from vega_policy.data.feature_cache import check_cacheable
from vega_policy.model.config import ActionHeadConfig, BackboneConfig, FusionConfig, ModelConfig, PriorConfig
from vega_policy.model.observation import Observation
from vega_policy.model.vega import VegaModel
from vega_policy.modeling_vega import VegaPolicy

SENTENCES = ["lift the red cube", "push the cube to the blue plate"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("models"))


def model_of(backbone, **fusion):
    sizes = {"views": 2, "state_dim": 8, "action_dim": 7, "chunk_size": 4, "frame_size": 64}
    return VegaModel(
        ModelConfig(
            **sizes,
            prior=PriorConfig(name="random"),
            fusion=FusionConfig(**fusion),
            backbone=backbone,
            head=ActionHeadConfig(width=32, depth=1, heads=2, steps=2),
        )
    ).eval()


def observation():
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(2, 2, 1, 3, 64, 64, generator=generator)
    return Observation(frames, torch.randn(2, 8, generator=generator), SENTENCES)


@torch.no_grad()
def unmodified(path, layer=None):
    """Hidden states of the model as transformers runs it, its own processor having made the inputs."""
    processor = AutoProcessor.from_pretrained(path)
    for switch in TILING:
        if hasattr(processor.image_processor, switch):
            setattr(processor.image_processor, switch, False)
    if processor.chat_template is None:
        prompts = [processor.image_token * 2 + sentence for sentence in SENTENCES]
    else:
        pictures = [{"type": "image"}] * 2
        talks = [[{"role": "user", "content": [*pictures, {"type": "text", "text": s}]}] for s in SENTENCES]
        prompts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    images = [list(frames.unbind()) for frames in observation().frames[:, :, 0]]
    inputs = processor(
        text=prompts,
        images=images,
        do_rescale=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    inputs.pop("labels", None)
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    read = {}
    if layer is not None:
        following = model.get_decoder().layers[layer + 1]  # what it is given; DeepStack adds in between
        following.register_forward_pre_hook(lambda module, args: read.update(hidden=args[0]))
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    return read.get("hidden", hidden), inputs["attention_mask"].bool()


@pytest.mark.parametrize("family", WRITERS)
def test_with_the_identity_as_fusion_the_context_is_the_unmodified_models_bit_by_bit(family, folders):
    hidden, mask = unmodified(folders(family))
    for fusion in ({"name": "semantic_only"}, {"blend": "residual", "residual_scale": 0.0}):
        context, seen = model_of(vlm(folders(family)), **fusion).encode_context(observation())
        assert torch.equal(context[:, :-1], hidden), fusion
        assert torch.equal(seen[:, :-1], mask)
        assert seen[:, -1].all()


@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl"])
def test_the_context_is_the_output_of_the_chosen_layer_and_later_ones_are_gone(family, folders):
    hidden, _ = unmodified(folders(family), layer=1)
    model = model_of(vlm(folders(family), layer=1), name="semantic_only")
    context, _ = model.encode_context(observation())
    assert torch.equal(context[:, :-1], hidden)
    assert len(model.backbone.model.get_decoder().layers) == 2


@pytest.mark.parametrize("family", WRITERS)
def test_the_prior_reaches_the_context_through_the_fusion(family, folders):
    model = model_of(vlm(folders(family)), name="add")
    seen = observation()
    context, _ = model.encode_context(seen)
    with torch.no_grad():
        model.project[2].weight += 0.1
    changed, _ = model.encode_context(seen)
    assert not torch.equal(changed[:, :-1], context[:, :-1])


@pytest.mark.parametrize("family", WRITERS)
def test_tokens_look_at_the_pixels_that_their_place_in_the_grid_says(family, folders):
    backbone = build(folders(family), views=1).eval()
    rows, columns = backbone.grid
    dark = torch.full((1, 1, 3, 64, 64), 0.3)
    cell = 64 // rows
    for row in (0, rows // 2, rows - 1):
        for column in (0, columns // 2, columns - 1):
            lit = dark.clone()
            lit[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 1.0
            change = backbone.project(backbone.encode(lit)) - backbone.project(backbone.encode(dark))
            assert change.norm(dim=-1).argmax().item() == row * columns + column, (row, column)


def test_grey_frames_which_smolvlm_takes_for_padding_still_give_features(folders):
    backbone = build(folders("smolvlm")).eval()
    frames = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    frames[0, 1] = 0.5
    features = backbone.encode(frames)
    assert features.shape == (2, 2, 32, 4, 4)
    nearly = frames.clone()
    nearly[0, 1, 0, 0, 0] += 1e-6
    torch.testing.assert_close(features, backbone.encode(nearly), atol=1e-4, rtol=0)


def test_deepstack_features_bypass_the_fusion_and_stay_the_models_own(folders):
    model = model_of(vlm(folders("qwen3_vl")), name="prior_only")
    seen = observation()
    features = model.semantic_features(seen)
    assert features.shape[2] == 3 * model.backbone.width
    tokens = model.fuse(features, seen)
    context, _ = model.backbone.encode_context(tokens, seen.instruction, seen.state, features)
    other = features.clone()
    other[:, :, model.backbone.width :] += 1
    moved, _ = model.backbone.encode_context(tokens, seen.instruction, seen.state, other)
    assert not torch.equal(context[:, :-1], moved[:, :-1])


def learning(module):
    return {name for name, weight in module.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_each_part_is_frozen_by_its_own_field(family, folders):
    whole = learning(build(folders(family)).model)
    seeing = learning(build(folders(family), freeze_image_encoder=True).model)
    joined = learning(build(folders(family), freeze_image_encoder=True, freeze_connector=True).model)
    reading = learning(build(folders(family), freeze_language_model=True).model)
    assert joined < seeing < whole
    assert {name for name in whole if "language_model" in name or "text_model" in name} == whole - reading
    assert joined == whole - reading
    assert seeing - joined
    assert all("connector" in name or "merger" in name for name in seeing - joined)


def test_gradients_pass_through_a_frozen_language_model_to_the_fusion(folders):
    model = model_of(
        vlm(folders("smolvlm"), freeze_image_encoder=True, freeze_connector=True, freeze_language_model=True)
    )
    context, _ = model.encode_context(observation())
    context[:, :-1].square().mean().backward()
    assert not learning(model.backbone.model)
    assert all(weight.grad.abs().sum() > 0 for weight in model.project.parameters())


def test_adapters_start_as_the_identity_and_alone_learn(folders):
    plain, adapted = (build(folders("smolvlm"), lora_rank=rank).eval() for rank in (0, 2))
    seen = observation()
    features = plain.encode(seen.frames[:, :, 0])
    contexts = [
        backbone.encode_context(backbone.project(features), SENTENCES, seen.state, features)[0][:, :-1]
        for backbone in (plain, adapted)
    ]
    assert torch.equal(*contexts)
    adapters = learning(adapted.model.get_decoder())
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert len(adapters) == 3 * 7 * 2  # blocks, layers of a block, A and B


def test_adapters_learn_in_full_precision_on_a_model_in_half(folders):
    model = model_of(vlm(folders("smolvlm"), lora_rank=2, dtype="bfloat16"))
    model.encode_context(observation())[0].square().mean().backward()
    for name, weight in model.backbone.model.get_decoder().named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name


def test_recomputed_blocks_give_the_same_gradients_even_where_they_are_frozen(folders):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = vlm(folders("paligemma"), freeze_language_model=True, gradient_checkpointing=recompute)
        model = model_of(backbone).train()
        model.encode_context(observation())[0].square().mean().backward()
        gradients.append(model.project[0].weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_type_and_attention_are_fields(folders):
    seen = observation()
    contexts = {}
    for name, fields in {"sdpa": {}, "eager": {"attention": "eager"}, "half": {"dtype": "bfloat16"}}.items():
        torch.manual_seed(0)
        model = model_of(vlm(folders("smolvlm"), **fields))
        contexts[name] = model.encode_context(seen)[0].detach()
        assert contexts[name].dtype == torch.float32
    assert model.backbone.model.dtype == torch.bfloat16
    assert not torch.equal(contexts["sdpa"], contexts["half"])
    torch.testing.assert_close(contexts["sdpa"], contexts["eager"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(contexts["sdpa"], contexts["half"], atol=0.2, rtol=0.1)


def training_batch():
    """Frames with a bright square whose place is the action, as `square_frame` draws it."""
    seen = batch(4)
    positions = torch.linspace(0, 0.9, 4)
    frames = torch.stack([torch.from_numpy(square_frame((64, 64), float(p))) for p in positions])
    for key in [key for key in seen if "images" in key]:
        seen[key] = frames.permute(0, 3, 1, 2) / 255
    return seen | {"action": (2 * positions - 1)[:, None, None].expand(4, 4, 7).contiguous()}


@pytest.mark.parametrize("family", WRITERS)
def test_training_reads_the_action_off_the_picture(family, folders):
    """The best constant action leaves 0.8 of the first loss: only who sees the square falls below half."""
    backbone = vlm(folders(family), freeze_image_encoder=True)
    torch.manual_seed(0)
    config = dataclasses.replace(tiny_config(), backbone=backbone)
    config.head = ActionHeadConfig(name="l1", width=32, depth=1, heads=2)
    policy = VegaPolicy(config).train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=2e-3)
    seen, losses = training_batch(), []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = policy(seen)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < 0.5 * losses[0]:
            return
    pytest.fail(f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} only")


def test_a_policy_comes_back_from_its_checkpoint(folders, tmp_path):
    config = dataclasses.replace(tiny_config(), backbone=vlm(folders("smolvlm"), lora_rank=2))
    policy = VegaPolicy(config).eval()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    policy.save_pretrained(tmp_path)
    loaded = VegaPolicy.from_pretrained(tmp_path)
    noise = torch.randn(2, 4, 7)
    chunks = [p.predict_action_chunk(batch(), noise=noise) for p in (policy, loaded)]
    assert torch.equal(*chunks)


def test_frozen_features_can_be_cached_and_learning_ones_cannot():
    prior, wanted = PriorConfig(name="none"), ["semantic"]
    fixed = vlm("x", freeze_image_encoder=True, freeze_connector=True)
    assert check_cacheable(fixed, prior, wanted) == wanted
    with pytest.raises(ValueError, match=r"backbone\.freeze_connector=false"):
        check_cacheable(dataclasses.replace(fixed, freeze_connector=False), prior, wanted)


def test_a_fusion_with_more_tokens_than_places_is_refused(folders):
    with pytest.raises(ValueError, match=r"takes 16 tokens of each view; fusion=sequence_concat returns 32"):
        VegaPolicy(
            dataclasses.replace(
                tiny_config(fusion=FusionConfig(name="sequence_concat")), backbone=vlm(folders("smolvlm"))
            )
        )


def test_more_views_than_were_trained_are_refused(folders):
    backbone = build(folders("smolvlm"), views=1)
    features = backbone.encode(torch.rand(1, 2, 3, 64, 64))
    with pytest.raises(ValueError, match="built for 1 cameras; the observation has 2"):
        backbone.encode_context(backbone.project(features), [""], torch.zeros(1, 8), features)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": 3}, r"backbone\.layer: the language model has blocks 0 to 2; got 3"),
        (
            {"lora_rank": 2, "lora_targets": ("qkv",)},
            r"lora_targets: no linear layer is called qkv; there are .*q_proj",
        ),
    ],
)
def test_layers_that_do_not_exist_are_refused(folders, fields, message):
    with pytest.raises(ValueError, match=message):
        build(folders("smolvlm"), **fields)


def test_another_architecture_is_refused(folders, tmp_path):
    BertConfig().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        ValueError, match=r"type 'bert', which transformers does not know as image-text-to-text"
    ):
        build(str(tmp_path))


def test_an_incomplete_folder_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no \*processor_config.json, tokenizer\*, \*.safetensors"):
        build(str(tmp_path))


def test_a_hub_out_of_reach_says_what_is_missing_and_how_to_give_a_folder(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError

    monkeypatch.setattr("vega_policy.backbones.vlm.snapshot_download", unreachable)
    expected = (
        r"google/gemma-3-4b-it.*Missing: config.json.*backbone\.path.*gated, under the Gemma terms.*compact"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        make_backbone(BackboneConfig(name="gemma3_4b"), state_dim=8, views=1, frame_size=224)


def test_weights_with_terms_of_use_are_announced(caplog, folders):
    config = BackboneConfig(name="qwen2.5_vl_3b", path=folders("qwen2_5_vl"))
    make_backbone(config, state_dim=8, views=1, frame_size=64)
    assert "non-commercial" in caplog.text


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'smolvlm2_500'.*Did you mean 'smolvlm2_500m'\? Known: compact"):
        make_backbone(BackboneConfig(name="smolvlm2_500"), state_dim=8, views=1, frame_size=64)


def test_the_compact_backbone_refuses_fields_of_the_others():
    with pytest.raises(ValueError, match=r"backbone\.lora_rank concerns Hugging Face models"):
        BackboneConfig(lora_rank=8)


def test_every_backbone_of_the_table_names_a_source():
    assert {name for name, entry in BACKBONES.items() if entry.source is None} == {"compact", "vlm"}
