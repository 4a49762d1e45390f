import copy
from dataclasses import replace

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.cli.test_benchmark import model_config
from tests.training_runs import saved_weights, tiny_run
from vega_policy.backbones.compact import ImageEncoder, PaddedConv, pad_in_words
from vega_policy.backbones.depthwise import ShiftedDepthwise, shift_depthwise
from vega_policy.model.observation import Observation
from vega_policy.model.torch_compile import compile_blocks, uncompiled
from vega_policy.model.vega import VegaModel
from vega_policy.training import train as setup
from vega_policy.training.cuda_graph import CapturedGradient
from vega_policy.training.optim import clip_gradient
from vega_policy.training.train import train

TIGHT = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = model_config()
    backbone = replace(config.backbone, image_encoder="test_efficientnet", depth=2)
    return VegaModel(replace(config, backbone=backbone)).train()


def loss_and_gradients(model):
    torch.manual_seed(1)
    seen = Observation(torch.rand(3, 2, 1, 3, 32, 32), torch.randn(3, 8), ["lift", "lift the cube", "go"])
    loss = model.loss(seen, torch.randn(3, 4, 7), generator=torch.Generator().manual_seed(2)).mean()
    model.zero_grad()
    loss.backward()
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    return loss.detach(), [weight.grad for weight in weights]


def assert_same_step(model, other):
    (expected, gradients), (found, others) = loss_and_gradients(model), loss_and_gradients(other)
    torch.testing.assert_close(found, expected, **TIGHT)
    assert len(gradients) == len(others) > 100
    scale = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient, twin in zip(gradients, others, strict=True):
        assert (gradient - twin).norm() < 1e-5 * scale


def test_compiled_blocks_learn_the_same_and_blocks_of_a_kind_share_their_code(model):
    torch._dynamo.reset()
    twin, counter = copy.deepcopy(model), CompileCounterWithBackend("eager")
    compile_blocks(twin, backend=counter)
    names = list(twin.state_dict())
    assert_same_step(model, twin)
    assert names == list(model.state_dict())
    assert counter.frame_count == 7  # encoder, three projectors, fusion, a trunk block, an head block
    with uncompiled(twin):
        loss_and_gradients(twin.eval())
    assert counter.frame_count == 7
    assert all(part._compiled_call_impl is not None for part in twin.backbone.blocks)
    torch._dynamo.reset()


def test_channels_last_changes_the_order_of_memory_and_nothing_else(model):
    twin = copy.deepcopy(model)
    twin.backbone.image_encoder.channels_last = True
    seen = []
    stem = twin.backbone.image_encoder.network
    stem.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    assert_same_step(model, twin)
    assert seen == [True]


def test_shifted_products_are_the_depthwise_convolutions_they_replace():
    torch.manual_seed(0)
    encoder = ImageEncoder("tf_efficientnet_lite0", pretrained=False, frozen=False)
    twin = copy.deepcopy(encoder)
    assert shift_depthwise(twin) == 8
    assert list(twin.state_dict()) == list(encoder.state_dict())
    frames = torch.rand(2, 3, 32, 32)
    expected, found = encoder(frames), twin(frames)
    torch.testing.assert_close(found, expected, **TIGHT)
    for part, features in ((encoder, expected), (twin, found)):
        features.square().sum().backward()
        assert all(weight.grad is not None for weight in part.parameters())
    for weight, other in zip(encoder.parameters(), twin.parameters(), strict=True):
        assert (weight.grad - other.grad).norm() <= 1e-4 * weight.grad.norm()


def test_only_depthwise_convolutions_of_stride_one_are_replaced():
    kept = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),
        nn.Conv2d(4, 4, 1, groups=4, bias=False),
    )
    assert shift_depthwise(kept) == 0
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False).double()
    x = torch.randn(2, 4, 6, 7, dtype=torch.double)
    torch.testing.assert_close(ShiftedDepthwise(conv)(x), conv(x), **TIGHT)


def test_under_autocast_shifted_products_take_its_type():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ShiftedDepthwise(conv)(torch.ones(1, 4, 5, 5)), conv(torch.ones(1, 4, 5, 5))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("side", "size", "dtype"), [(8, 3, "bfloat16"), (7, 5, "float32"), (6, 2, "float32")]
)
def test_padding_in_words_is_timms_padding_bit_by_bit(side, size, dtype):
    conv = Conv2dSame(8, 8, size, stride=2, groups=8, bias=False).to(getattr(torch, dtype))
    network = nn.Sequential(conv)
    x = torch.randn(2, 8, side, side + 2, dtype=conv.weight.dtype).to(memory_format=torch.channels_last)
    found = []
    for _ in range(2):
        conv.weight.grad, seen = None, x.clone().requires_grad_()
        y = network(seen)
        y.square().sum().backward()
        found.append([y.detach(), seen.grad, conv.weight.grad])
        replaced = pad_in_words(network)
    assert replaced == 0  # the second time there is none left
    assert list(network.state_dict()) == ["0.weight"]
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_the_compact_encoder_pads_in_words_and_copies_no_input():
    network = ImageEncoder("tf_efficientnet_lite0", pretrained=False, frozen=False).network
    assert sum(isinstance(module, PaddedConv) for module in network.modules()) == 4
    assert not any(module.inplace for module in network.modules() if isinstance(module, nn.ReLU6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_leaves_the_gradients_that_the_step_leaves():
    layer, x = nn.Linear(4, 4).cuda(), torch.randn(3, 4, device="cuda")
    graph = CapturedGradient(lambda: layer(x).square().mean(), list(layer.parameters()), most=0.1)
    x.copy_(torch.randn_like(x))
    layer.zero_grad()
    loss, norm = graph()
    found = [weight.grad.clone() for weight in layer.parameters()]
    layer.zero_grad()
    expected = layer(x).square().mean()
    expected.backward()
    assert norm > 0.1
    torch.testing.assert_close(norm, clip_gradient(layer.parameters(), 0.1))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, [weight.grad for weight in layer.parameters()])


def test_only_the_compact_backbone_is_compiled(model):
    twin = copy.deepcopy(model)
    twin.backbone = nn.Identity()
    with pytest.raises(ValueError, match=r"compiles the compact backbone; got Identity\. Set compile=false"):
        compile_blocks(twin)


def test_a_sharded_run_is_not_compiled(tmp_path):
    with pytest.raises(ValueError, match="compile=true needs sharding=none; got sharding=full"):
        tiny_run(tmp_path, tmp_path / "run", compile=True, sharding="full")


def test_a_compiled_run_learns_what_an_uncompiled_one_learns(root, tmp_path, monkeypatch):
    """On the CPU with a backend that only traces; the compiler itself runs in the benchmark."""
    monkeypatch.setattr(setup, "compile_blocks", lambda model: compile_blocks(model, backend="eager"))
    runs = [train(tiny_run(root, tmp_path / f"{on}", compile=on, steps=2)) for on in (False, True)]
    expected, found = (saved_weights(checkpoint) for checkpoint in runs)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
