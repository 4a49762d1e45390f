"""Plug and play: every prior works with every fusion."""

import pytest
import torch

from tests.policies import SIZE, batch, tiny_config
from tests.prior_checkpoints import WRITERS, write_checkpoint, write_wan
from tests.test_priors_protocol import LAST
from vega_policy.fusion import FUSIONS, make_fusion
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.parts import FusionConfig, PriorConfig
from vega_policy.priors import PRIORS
from vega_policy.priors.precomputed import FeatureWriter


def write_features(folder):
    """What `batch()` shows, with features of another program."""
    seen = batch()
    frames = torch.stack([seen[key] for key in seen if key.startswith("observation.images")], dim=1)
    writer = FeatureWriter(folder, "stand-in")
    writer.add(frames, torch.randn(2, 2, 6, SIZE // 16, SIZE // 16))
    writer.close()
    return folder


def prior_config(name, folder):
    if name in ("random", "wan_tiny"):
        return PriorConfig(name=name)
    if name == "precomputed":
        return PriorConfig(name=name, path=str(write_features(folder)))
    if name in WRITERS:
        path, layer = write_checkpoint(name, folder), LAST[name]
    else:
        write_wan(folder)
        path, layer = folder, 2
    return PriorConfig(name=name, path=str(path), layer=layer, dtype="float32")


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_every_prior_trains_a_step_with_every_fusion(name, tmp_path):
    torch.manual_seed(0)
    policy = VegaPolicy(tiny_config(prior_config(name, tmp_path / "checkpoint")))
    model = policy.model
    for fusion in sorted(FUSIONS):
        model.fusion = make_fusion(model.backbone.width, FusionConfig(name=fusion), model.backbone.grid)
        policy.zero_grad()
        loss, _ = policy(batch())
        loss.backward()
        assert loss.isfinite(), fusion
        learns = [parameter.grad is not None for parameter in model.project.parameters()]
        assert all(learns) == (fusion != "semantic_only"), fusion
