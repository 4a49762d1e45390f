import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.policies import model_config
from tests.training_runs import saved_weights, tiny_run
from vega_policy.backbones.compact import ImageEncoder
from vega_policy.model.compilation import compile_blocks, uncompiled
from vega_policy.model.observation import Observation
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
    actions, generator = torch.randn(3, 4, 7), torch.Generator().manual_seed(2)
    noise, time = model.head.sample_noise_and_time(actions, generator)
    loss = model.loss(seen, actions, None, noise, time).mean()
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


def test_no_activation_of_the_compact_encoder_overwrites_its_input():
    network = ImageEncoder("tf_efficientnet_lite0", pretrained=False, frozen=False).network
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
