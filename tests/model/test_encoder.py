"""VegaEncoder: the observation encoder alone, from registered parts, a policy, or other packages."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.policies import SMALL_ENCODERS, batch, tiny_config
from vega_policy import VegaEncoder, VegaPolicy
from vega_policy.cli import generated_groups
from vega_policy.model.config import FUSIONS, BackboneConfig, FusionConfig, registered_elsewhere
from vega_policy.priors import PRIORS, PriorEntry

SMALL = BackboneConfig(width=32, depth=1, heads=2, **SMALL_ENCODERS)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return VegaEncoder.from_pretrained(prior="random", backbone=SMALL, frame_size=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    policy = VegaPolicy(tiny_config()).eval()
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    return policy, folder


@pytest.mark.parametrize(
    ("shape", "views"), [((2, 3, 64, 64), 1), ((2, 3, 3, 48, 80), 3), ((2, 1, 1, 3, 64, 64), 1)]
)
def test_frames_of_any_size_become_tokens_of_both_streams_and_a_gate(encoder, shape, views):
    with torch.no_grad():
        output = encoder(torch.rand(shape))
    assert output.tokens.shape == output.semantic.shape == output.prior.shape == (2, views, 16, 32)
    assert output.gate.shape == (2, views, 16)
    assert ((output.gate > 0) & (output.gate < 1)).all()


def test_cameras_of_several_sizes_are_given_by_name(encoder):
    wide, square = torch.rand(2, 3, 48, 96), torch.rand(2, 3, 64, 64)
    tokens = encoder({"front": wide, "wrist": square}).tokens
    torch.testing.assert_close(tokens[:, :1], encoder(wide).tokens)
    torch.testing.assert_close(tokens[:, 1:], encoder(square).tokens)


def test_bytes_and_their_fractions_have_the_same_tokens(encoder):
    frames = torch.randint(0, 256, (1, 2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(encoder(frames).tokens, encoder(frames.float() / 255).tokens, atol=1e-6)


def test_projectors_and_gate_learn_while_the_prior_does_not(encoder):
    encoder(torch.rand(1, 3, 64, 64)).tokens.sum().backward()
    learning = {name.split(".")[0] for name, weight in encoder.named_parameters() if weight.grad is not None}
    assert {"project", "fusion", "backbone"} <= learning
    assert not any(weight.requires_grad for weight in encoder.prior.parameters())


def test_the_encoder_of_a_policy_returns_the_policys_tokens(checkpoint):
    policy, folder = checkpoint
    encoder, seen = VegaEncoder.from_pretrained(folder), batch()
    frames = torch.stack([seen[key] for key in policy.config.image_features], dim=1)
    with torch.no_grad():
        expected = policy.model.encode_observation(policy.observe(seen))
        assert torch.equal(encoder(frames).tokens, expected)
    assert not hasattr(encoder, "head")


def test_without_a_prior_the_tokens_are_the_semantic_ones():
    output = VegaEncoder.from_pretrained(prior="none", backbone=SMALL, frame_size=64)(
        torch.rand(1, 3, 64, 64)
    )
    assert output.prior is None
    assert output.gate is None
    assert torch.equal(output.tokens, output.semantic)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.rand(3, 64, 64), ValueError, r"expected \[b 3 h w\]"),
        (torch.rand(1, 64, 64, 3), ValueError, r"expected \[b 3 h w\]"),
        (255 * torch.rand(1, 3, 64, 64), ValueError, "Divide frames"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), TypeError, "uint8 or floating-point"),
    ],
)
def test_what_is_no_batch_of_frames_is_refused(encoder, frames, error, message):
    with pytest.raises(error, match=message):
        encoder(frames)


def test_a_fusion_that_reads_the_instruction_requires_one():
    fusion = FusionConfig(name="instruction_gate")
    encoder = VegaEncoder.from_pretrained(prior="random", fusion=fusion, backbone=SMALL, frame_size=64)
    with pytest.raises(ValueError, match="one sentence a sample"):
        encoder(torch.rand(1, 3, 64, 64))
    assert encoder(torch.rand(1, 3, 64, 64), ["lift the cube"]).tokens.shape == (1, 1, 16, 32)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        VegaEncoder.from_pretrained(tmp_path)


TOY = """
import torch
from torch import nn

class MeanColor(nn.Module):
    width, fingerprint, layer, noise_level, untrained = 3, "mean-color-1", 0, 0.0, False
    def __init__(self, grid):
        super().__init__()
        self.grid = grid
    def forward(self, frames, generator=None):
        views = frames[:, :, -1]
        return nn.functional.adaptive_avg_pool2d(views.flatten(0, 1), self.grid).unflatten(0, views.shape[:2])

def load(config, entry, grid):
    return MeanColor(grid)

class Maximum(nn.Module):
    gate, reads_instruction = None, False
    def __init__(self, width, config, grid):
        super().__init__()
    def tokens(self, n):
        return n
    def forward(self, semantic, prior, context=None):
        return semantic.maximum(prior)
"""


def install(folder: Path, points: str) -> None:
    """Write a package `toy` with entry points, as an installer leaves it."""
    folder.joinpath("toy.py").write_text(TOY)
    info = folder / "toy-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    info.joinpath("entry_points.txt").write_text(points)


POINTS = "[vega_policy.priors]\nmean_color = toy:load\n[vega_policy.fusions]\nmaximum = toy:Maximum\n"


def test_a_package_adds_a_prior_and_a_fusion_by_entry_points(tmp_path, monkeypatch):
    install(tmp_path, POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    for name, build in registered_elsewhere("priors", PRIORS).items():
        monkeypatch.setitem(PRIORS, name, PriorEntry(build))
    for name, build in registered_elsewhere("fusions", FUSIONS).items():
        monkeypatch.setitem(FUSIONS, name, build)
    groups = generated_groups()
    assert "mean_color" in groups["prior"]
    assert "maximum" in groups["fusion"]
    assert "toy" not in sys.modules
    encoder = VegaEncoder.from_pretrained(prior="mean_color", fusion="maximum", backbone=SMALL, frame_size=64)
    output = encoder(torch.rand(1, 3, 64, 64))
    assert torch.equal(output.tokens, output.semantic.maximum(output.prior))


@pytest.mark.slow
def test_an_installed_package_adds_a_prior_and_a_fusion_without_lerobot(tmp_path):
    install(tmp_path, POINTS)
    program = f"""
import sys
sys.path.append({str(tmp_path)!r})
import torch
from vega_policy import VegaEncoder
from vega_policy.cli import generated_groups
from vega_policy.model.config import BackboneConfig
groups = generated_groups()
assert "mean_color" in groups["prior"] and "maximum" in groups["fusion"]
assert "toy" not in sys.modules
small = BackboneConfig(width=32, depth=1, heads=2, pretrained=False)
encoder = VegaEncoder.from_pretrained(prior="mean_color", fusion="maximum", backbone=small, frame_size=64)
output = encoder(torch.rand(1, 3, 64, 64))
assert torch.equal(output.tokens, output.semantic.maximum(output.prior))
assert "lerobot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_package_that_registers_an_existing_name_is_refused(tmp_path, monkeypatch):
    install(tmp_path, "[vega_policy.priors]\nrandom = toy:load\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'toy' registers priors 'random'"):
        registered_elsewhere("priors", {"random"})
    assert registered_elsewhere("priors", set()) == {"random": "toy:load"}
