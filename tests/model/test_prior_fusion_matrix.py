"""Plug and play: every prior works with every fusion."""

import dataclasses

import pytest
import torch

from tests.model.test_priors_protocol import LAST
from tests.policies import CAMERAS, SIZE, batch, tiny_config
from tests.prior_checkpoints import WRITERS
from vega_policy.backbones import make_backbone
from vega_policy.model.config import FUSIONS, FusionConfig, PriorConfig
from vega_policy.model.fusion import make_fusion
from vega_policy.model.observation import Observation
from vega_policy.model.vega import VegaModel
from vega_policy.priors import PRIORS, make_prior
from vega_policy.priors.baselines import FeatureWriter


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
def test_every_prior_trains_a_step_with_every_fusion(
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
    for fusion in sorted(FUSIONS):
        model.fusion = make_fusion(backbone.width, FusionConfig(name=fusion), backbone.grid)
        model.zero_grad()
        drawn = model.head.sample_noise_and_time(given["action"])
        loss = model.loss(read_once, given["action"], None, *drawn).mean()
        loss.backward()
        assert loss.isfinite(), fusion
        learns = [parameter.grad is not None for parameter in model.project.parameters()]
        assert all(learns) == (fusion != "semantic_only"), fusion
