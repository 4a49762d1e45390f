import copy
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from tests.policies import model_config
from tests.training_runs import assert_bitwise_equal, saved_weights, tiny_backbone, tiny_policy, tiny_run
from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import Observation
from vega_policy.model.vega import VegaModel
from vega_policy.priors.base import BasePrior
from vega_policy.training import cuda_graph as captured_step
from vega_policy.training import train as setup
from vega_policy.training.cuda_graph import CapturedStep, check_capturable
from vega_policy.training.distributed import make_accelerator
from vega_policy.training.logging import Progress
from vega_policy.training.optim import clip_gradient
from vega_policy.training.train import make_trainer, train

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SENTENCES = ["lift", "lift the red cube", "go"]


class Uncaptured:
    """Stands in for a graph on a CPU: warms up, drawing as dropout does, then calls the function."""

    def __init__(self, loss, weights, most):
        self.loss, self.weights, self.most = loss, weights, most
        torch.rand(3)
        self()

    def __call__(self):
        for weight in self.weights:
            weight.grad = None
        loss = self.loss()
        loss.backward()
        return loss.detach(), clip_gradient(self.weights, self.most)


class UncapturedWithoutPrior(Uncaptured):
    """Fails if the prior runs in the function: a graph cannot replay the prior's own graph."""

    def __call__(self):
        with mock.patch.object(BasePrior, "forward", side_effect=AssertionError("a prior in the graph")):
            return super().__call__()


def two_steps(config):
    """Values, weights and random states of two steps with a look at held-out rows after each."""
    trainer = make_trainer(config, make_accelerator(cpu=True, precision="no"), None)
    progress = Progress(trainer.run, 0, 2, [], shown=False)
    batches = trainer.source.stream(trainer.sampler, 0)
    values = [trainer.optimize(batches, progress, step) | trainer.measure() for step in (1, 2)]
    progress.close()
    weights = {name: weight.detach() for name, weight in trainer.weights.items()}
    return values, weights, [trainer.state.generator.get_state(), torch.get_rng_state()]


@pytest.fixture
def captured_on_cpu(monkeypatch):
    """A run with `capture=true` trains on a CPU."""
    monkeypatch.setattr(captured_step, "CapturedGradient", UncapturedWithoutPrior)
    monkeypatch.setattr(setup, "check_capturable", lambda *_: None)


LIVE = {"cached": ["frames"], "shift": 2, "brightness": 0.3, "hue": 0.1, "state_dropout": 0.2}


def live_run(root, output, noise, **fields):
    policy = tiny_policy(prior=PriorConfig(name="wan_tiny_untrained", layer=0, noise=noise))
    return tiny_run(root, output, policy=policy, dataset={"held_out": 0.3} | LIVE, **fields)


@pytest.mark.parametrize(
    "noise",
    [None, pytest.param("fixed", marks=pytest.mark.slow), "fresh"],
    ids=["cached", "live", "live and fresh"],
)
@pytest.mark.usefixtures("captured_on_cpu")
def test_captured_steps_learn_and_draw_what_uncaptured_ones_do(root, tmp_path, noise):
    runs = []
    for on in (False, True):
        if noise is None:
            run = tiny_run(root, tmp_path / f"{on}", capture=on, dataset={"held_out": 0.3})
        else:
            run = live_run(root, tmp_path / f"{on}", noise, capture=on)
        runs.append(two_steps(run))
    expected, found = runs
    assert found[0][1].keys() == expected[0][1].keys() >= {"loss", "gate", "gradient_norm", "held_out_loss"}
    torch.testing.assert_close(found[:2], expected[:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], expected[2], atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("captured_on_cpu")
def test_a_captured_run_with_a_live_prior_resumes_bitwise(root, tmp_path):
    whole = train(live_run(root, tmp_path / "whole", "fresh", capture=True))
    parts = [
        train(live_run(root, tmp_path / "parts", "fresh", capture=True, **fields))
        for fields in ({"stop_after": 2}, {"resume": True})
    ]
    assert_bitwise_equal(whole, parts[1])


@pytest.fixture(scope="module", params=[True, False], ids=["frozen", "learning"])
def model(request):
    torch.manual_seed(0)
    config = model_config()
    backbone = replace(config.backbone, image_encoder="test_efficientnet", freeze_text_encoder=request.param)
    head = replace(config.head, name="l1" if request.param else "flow")
    model = VegaModel(replace(config, backbone=backbone, head=head)).train()
    words = model.backbone.text_encoder.eval()  # no dropout
    words.network.encoder.layer = words.network.encoder.layer[:1]
    return model


def policy_of(model):
    """A policy as a captured step needs it: what it sees is fixed, and its gradient does not vanish."""
    torch.manual_seed(1)
    frames, draws = torch.rand(4, 2, 1, 3, 32, 32), torch.Generator().manual_seed(2)

    def forward(batch, noise=None, time=None, metrics_as_tensors=True):
        seen = Observation(frames, batch["state"], batch["task"], words=batch.get("vega.words"))
        loss = model.loss(seen, batch["action"], batch["is_pad"], noise, time).mean()
        return loss, {"loss": loss.detach()}

    def noise_and_time(batch):
        return model.head.sample_noise_and_time(batch["action"], draws)

    return SimpleNamespace(
        model=model, parameters=model.parameters, forward=forward, noise_and_time=noise_and_time
    )


def batch_of(seed, sentences):
    generator = torch.Generator().manual_seed(seed)
    state, action = torch.randn(4, 8, generator=generator), torch.randn(4, 4, 7, generator=generator)
    is_pad = torch.rand(4, 4, generator=generator) > 0.7
    return {"state": state, "action": action, "is_pad": is_pad, "task": sentences, "index": 0}


def step_of(policy):
    return CapturedStep(
        policy.forward, policy, lambda: torch.autocast("cpu", enabled=False), SENTENCES, 1.0, Uncaptured
    )


def test_words_by_number_are_the_words_and_learn_the_same(model):
    twin = copy.deepcopy(model)
    plain, policy = policy_of(model), policy_of(twin)
    step = step_of(policy)
    batches = [["lift"] * 4, ["go", SENTENCES[1], "go", "lift"]]
    for seed, sentences in enumerate(batches):  # the first has no padding, the second another length
        batch = batch_of(seed, sentences)
        model.zero_grad()
        loss, _ = plain.forward(batch, *plain.noise_and_time(batch))
        loss.backward()
        norm = clip_gradient(model.parameters(), 1.0)
        found = step(batch, *policy.noise_and_time(batch))
        torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["gradient_norm"], norm, atol=1e-5, rtol=1e-4)
        for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
            if weight.grad is not None:
                assert other.grad is not None
                assert (weight.grad - other.grad).norm() < 1e-5
    learns = next(twin.backbone.text_encoder.parameters()).grad is not None
    assert learns is not model.backbone.text_encoder.frozen


def test_what_a_step_was_not_captured_for_is_refused(model):
    policy = policy_of(model)
    step, drawn = step_of(policy), policy.noise_and_time(batch_of(0, ["go"] * 4))
    step(batch_of(0, ["go"] * 4), *drawn)
    with pytest.raises(ValueError, match="'sit' is none of the 3 instructions"):
        step(batch_of(0, ["go", "go", "sit", "go"]), *drawn)
    fewer = {name: value[:3] for name, value in batch_of(0, ["go"] * 4).items() if name != "index"}
    with pytest.raises(ValueError, match=r"captured for .*\(4, 8\).* got .*\(3, 8\)"):
        step(fewer, *drawn)


@pytest.mark.parametrize(
    ("fields", "device", "count", "message"),
    [
        ({}, CPU, 2, "a GPU; got the device cpu"),
        ({"sharding": "full"}, GPU, 2, "sharding=none; got sharding=full"),
        ({"accumulate": 2}, GPU, 2, "accumulate=1; got accumulate=2"),
        ({"backbone": tiny_backbone(name="vlm")}, GPU, 2, "backbone=compact; got backbone=vlm"),
        ({"dataset": {"cache": "none"}}, GPU, 2, r".*dataset\.cache=gpu\); got dataset\.cache=none"),
        ({"backbone": tiny_backbone(freeze_text_encoder=False)}, GPU, 65, ".*more than 64 .* got 65 of them"),
    ],
)
def test_a_run_that_cannot_be_captured_is_refused_at_the_start(tmp_path, fields, device, count, message):
    fields = dict(fields)
    policy = tiny_policy(**({"backbone": fields.pop("backbone")} if "backbone" in fields else {}))
    config = tiny_run(tmp_path, tmp_path / "run", policy=policy, capture=True, **fields)
    with pytest.raises(ValueError, match=rf"capture=true needs {message}.* or capture=false\."):
        check_capturable(config, device, ["go"] * count)


def test_a_run_that_can_be_captured_is_let_through_and_one_on_the_cpu_stops(root, tmp_path):
    learning = tiny_policy(backbone=tiny_backbone(freeze_text_encoder=False))
    config = tiny_run(root, tmp_path / "run", policy=learning, capture=True)
    check_capturable(config, GPU, ["go"] * 64)
    check_capturable(replace(config, policy=tiny_policy()), GPU, ["go"] * 65)
    with pytest.raises(ValueError, match="capture=true needs a GPU"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_cache_on_the_gpu_is_refused_without_one(root, tmp_path):
    with pytest.raises(ValueError, match=r"cache=gpu needs a GPU; .* cpu\. Take dataset\.cache=ram"):
        train(tiny_run(root, tmp_path / "run", policy=tiny_policy(), dataset={"cache": "gpu"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    ("frozen", "compiled", "prior", "dataset"),
    [
        (True, False, PriorConfig(name="random"), {}),
        (False, False, PriorConfig(name="random"), {}),
        (True, True, PriorConfig(name="wan_tiny_untrained", layer=0, noise="fresh"), LIVE),
    ],
    ids=["cached", "trained text encoder", "live and compiled"],
)
def test_on_a_gpu_a_captured_run_learns_what_an_uncaptured_one_learns(
    root, tmp_path, monkeypatch, frozen, compiled, prior, dataset
):
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    backbone = tiny_backbone(freeze_text_encoder=frozen)
    fields = {"precision": "bf16", "compile": compiled, "dataset": dataset}
    runs = []
    for on in (False, True):
        policy = tiny_policy(device="cuda", backbone=backbone, prior=prior)
        runs.append(train(tiny_run(root, tmp_path / f"{on}", policy=policy, capture=on, **fields)))
    expected, found = (saved_weights(checkpoint) for checkpoint in runs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-3, rtol=1e-2)
