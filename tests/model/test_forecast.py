"""The forecast head: later tokens of the semantic encoder, predicted beside the actions."""

import dataclasses

import pytest
import torch

from tests.policies import SIZE, batch, model_config, tiny_config
from tests.training.test_cuda_graph import UncapturedWithoutPrior, two_steps
from tests.training_runs import assert_bitwise_equal, tiny_backbone, tiny_policy, tiny_run
from vega_policy.data.augmentation import FRAMES, FUTURE, RandomShift
from vega_policy.data.dataset import FrameTable
from vega_policy.data.loader import CachedSource
from vega_policy.model.action_head import ForecastHead
from vega_policy.model.config import BaseConfig, ForecastConfig, PriorConfig
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.training import cuda_graph
from vega_policy.training import train as setup
from vega_policy.training.train import train

SMALL = {"width": 16, "depth": 1, "heads": 2}
LEARNS = tiny_backbone(freeze_image_encoder=False)


def policy_of(**fields):
    torch.manual_seed(0)
    forecast = ForecastConfig(**(SMALL | fields)) if fields else ForecastConfig()
    config = tiny_config(PriorConfig(name="none"), freeze_text_encoder=True)  # its dropout would draw too
    return VegaPolicy(dataclasses.replace(config, forecast=forecast))


def with_future(seed=0):
    frames = torch.rand(2, 2, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    is_pad = torch.tensor([[False, False], [False, True]])
    return batch() | {FUTURE: (255 * frames).to(torch.uint8), "vega.future_is_pad": is_pad}


def test_without_a_forecast_nothing_differs_and_with_one_the_other_weights_start_alike():
    off, on = policy_of(), policy_of(weight=0.5, read=True)
    assert off.model.forecast is None
    assert not any("forecast" in name for name in off.state_dict())
    held = on.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in off.state_dict().items())
    torch.manual_seed(1)
    plain, metrics = off.train()(batch())
    unread = policy_of(weight=0.5).eval()
    torch.manual_seed(1)
    beside, _ = unread(batch())  # the held-out loss stays that of the actions
    assert "forecast" not in metrics
    torch.testing.assert_close(beside, plain)


def test_the_forecast_adds_its_weighted_loss_and_its_gradient_reaches_the_image_encoder():
    policy = policy_of(weight=0.5).train()
    torch.manual_seed(1)
    total, metrics = policy(with_future())
    torch.manual_seed(1)
    actions, _ = policy.eval()(with_future())
    assert total.item() == pytest.approx(actions.item() + 0.5 * metrics["forecast"], rel=1e-4)
    policy.train()(with_future())[0].backward()
    assert next(policy.model.backbone.image_encoder.parameters()).grad.abs().sum() > 0
    assert all(weight.grad is None for weight in policy.model.forecast.target.parameters())


def test_a_padded_horizon_is_left_out_and_predicting_zero_costs_one():
    torch.manual_seed(0)
    head = ForecastHead(ForecastConfig(weight=1.0, **SMALL), 8, channels=6, tokens=4, target=None)
    torch.nn.init.zeros_(head.output[1].weight)
    torch.nn.init.zeros_(head.output[1].bias)
    future = head(torch.randn(2, 1, 4, 8), torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert future.shape == (2, 2 * 4, 16)
    target, is_pad = torch.randn(2, 2, 1, 6, 2, 2), torch.tensor([[False, True], [True, True]])
    losses = head.loss(future, target, is_pad)
    torch.testing.assert_close(losses, torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        losses, head.loss(future, torch.cat([target[:, :1], 9 * target[:, :1]], 1), is_pad)
    )


def test_a_forecast_learns_the_tokens_that_its_queries_and_the_context_tell():
    torch.manual_seed(0)
    head = ForecastHead(ForecastConfig(weight=1.0, **SMALL), 8, channels=6, tokens=4, target=None)
    tokens, mask = torch.randn(3, 1, 4, 8), torch.ones(3, 2, dtype=torch.bool)
    target = torch.randn(3, 2, 1, 6, 2, 2)
    context, is_pad = torch.randn(3, 2, 8), torch.zeros(3, 2, dtype=torch.bool)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(head(tokens, context, mask), target, is_pad).mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    other = head.loss(head(tokens, context.flip(0), mask), target, is_pad).mean()
    assert other > 2 * loss  # the context decides too


def test_a_forecast_that_is_read_lengthens_the_context_of_the_action_head():
    lengths = []
    for read in (False, True):
        policy = policy_of(weight=0.1, read=read).eval()
        with torch.no_grad():
            context, mask = policy.model.encode_context(policy.observe(batch()))
        assert context.shape[:2] == mask.shape
        assert policy.predict_action_chunk(batch()).shape == (2, 4, 7)  # without later frames
        lengths.append(context.shape[1])
    assert lengths[1] - lengths[0] == 2 * 2 * 16  # two horizons, two views


def test_later_frames_are_those_of_the_same_episode_so_many_steps_on():
    ends = torch.tensor([7] * 7 + [12] * 5)
    table = FrameTable(
        torch.zeros(12, 1),
        torch.zeros(12, 1),
        (ends == 12).long(),
        ends,
        torch.zeros(12, dtype=torch.int64),
        ("go",),
        20,
    )
    stored = table.every(2).nonzero()[:, 0]
    frames = stored.to(torch.uint8).reshape(-1, 1, 1, 1, 1)
    assert stored.tolist() == [0, 2, 4, 6, 7, 9, 11]
    source = CachedSource(table, {"frames": frames}, 4, stored, future=(2, 4))
    found = source.batch(torch.tensor([0, 4, 6, 9]))
    assert found["vega.frames"].flatten().tolist() == [0, 4, 6, 9]
    assert found[FUTURE].flatten(1).tolist() == [[2, 4], [6, 4], [6, 6], [11, 9]]
    assert found["vega.future_is_pad"].tolist() == [
        [False, False],
        [False, True],
        [True, True],
        [False, True],
    ]
    features = CachedSource(table, {"frames": frames, "semantic": frames.float()}, 4, stored, future=(2,))
    assert features.batch(torch.tensor([0]))["vega.future_semantic"].flatten().tolist() == [2.0]
    assert FUTURE not in CachedSource(table, {"frames": frames}, 4, stored).batch(torch.tensor([0]))


def test_later_frames_shift_with_the_present_one():
    frames = torch.randint(0, 256, (3, 2, 3, 8, 8), dtype=torch.uint8)
    moved = RandomShift(2, ["a", "b"], seed=0)(
        {FRAMES: frames, FUTURE: torch.stack([frames, frames], dim=1)}, 5
    )
    assert not torch.equal(moved[FRAMES], frames)
    for later in moved[FUTURE].unbind(dim=1):
        assert torch.equal(later, moved[FRAMES])


def run(root, output, backbone=LEARNS, cached=("frames",), **fields):
    forecast = ForecastConfig(weight=0.5, read=True, **SMALL)
    policy = tiny_policy(forecast=forecast, backbone=backbone)
    dataset = {"cached": list(cached), "held_out": 0.3, **({"shift": 2} if cached == ("frames",) else {})}
    return tiny_run(root, output, policy=policy, dataset=dataset, **fields)


@pytest.mark.slow
def test_a_run_with_a_forecast_resumes_bitwise(root, tmp_path):
    whole = train(run(root, tmp_path / "whole"))
    parts = [train(run(root, tmp_path / "parts", **more)) for more in ({"stop_after": 2}, {"resume": True})]
    assert_bitwise_equal(whole, parts[1])
    assert VegaPolicy.from_pretrained(whole / "pretrained_model").model.forecast.target.frozen


def test_captured_steps_learn_a_forecast_as_uncaptured_ones_do(root, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_graph, "CapturedGradient", UncapturedWithoutPrior)
    monkeypatch.setattr(setup, "check_capturable", lambda *_: None)
    runs = [two_steps(run(root, tmp_path / f"{on}", capture=on)) for on in (False, True)]
    assert runs[0][0][0]["forecast"] > 0
    torch.testing.assert_close(runs[1][:2], runs[0][:2], atol=1e-5, rtol=1e-4)


def test_a_frozen_image_encoder_is_its_own_target_from_cached_features(root, tmp_path):
    config = run(root, tmp_path / "run", backbone=tiny_backbone(), cached=("semantic", "prior"), steps=1)
    loaded = VegaPolicy.from_pretrained(train(config) / "pretrained_model")
    assert loaded.model.forecast.target is None


@pytest.mark.parametrize(
    ("policy", "dataset", "message"),
    [
        ({}, {"cache": "none"}, r"come from a cache: .* got dataset\.cache=none"),
        ({}, {"cached": ["prior"]}, "come from a cache: .*'prior'"),
        ({"steps": (4, 6)}, {"frame_stride": 4}, r"multiples of dataset\.frame_stride=4.* got \[6\]"),
    ],
)
def test_a_dataset_that_cannot_give_later_frames_is_refused_at_the_start(
    root, tmp_path, policy, dataset, message
):
    forecast = ForecastConfig(weight=0.1, **policy)
    config = tiny_run(
        root,
        tmp_path / "run",
        policy=tiny_policy(forecast=forecast),
        dataset={"cached": ["frames"]} | dataset,
    )
    with pytest.raises(ValueError, match=message):
        train(config)


def test_forecasts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"forecast\.steps: .* got \[4, 4\]"):
        ForecastConfig(steps=(4, 4))
    with pytest.raises(ValueError, match=r"forecast\.weight: .* got -1"):
        ForecastConfig(weight=-1)
    with pytest.raises(ValueError, match=r"multiple of forecast\.heads; got width 18, heads 4"):
        ForecastConfig(width=18)
    blind = dataclasses.replace(model_config("none").backbone, sight=False)
    with pytest.raises(ValueError, match=r"needs backbone=compact with .*sight=true.* sight=false"):
        dataclasses.replace(model_config("none"), backbone=blind, forecast=ForecastConfig(weight=1.0))
    with pytest.raises(ValueError, match="not for a base"):
        tiny_policy(base=BaseConfig(name="smolvla"), forecast=ForecastConfig(weight=1.0))
    with pytest.raises(ValueError, match=r"dataset\.cached=\[frames\]"):
        policy_of(weight=0.5).train()(batch())
