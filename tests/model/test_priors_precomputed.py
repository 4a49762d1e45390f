"""Features of a model that only its own repository can run, exported once and looked up in training."""

import subprocess
import sys

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from tests.policies import batch, tiny_config
from tests.synthetic_dataset import CAMERAS, REPO_ID, write_dataset
from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import stack_views
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.priors import make_prior
from vega_policy.priors.baselines import FeatureWriter

GRID = (4, 4)
STAND_IN = '''
import torch

def load(device):
    """Mean colour and its square on an 8x8 grid, and what the other view shows."""
    def encode(frames):
        n, v = frames.shape[:2]
        small = torch.nn.functional.adaptive_avg_pool2d(frames.flatten(0, 1), 8).unflatten(0, (n, v))
        return torch.cat([small, small**2, small.flip(1)], dim=2)
    return encode
'''


def frames(rows=3, seed=0):
    return torch.rand(rows, 2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def write(folder, grid=(8, 8)):
    features = torch.randn(3, 2, 9, *grid, generator=torch.Generator().manual_seed(1))
    writer = FeatureWriter(folder, "stand-in")
    writer.add(frames()[:2], features[:2])
    writer.add(frames()[2:], features[2:])
    writer.close()
    return features


def opened(folder, **config):
    return make_prior(PriorConfig(name="precomputed", path=str(folder), **config), GRID)


def test_precomputed_prior_features_are_found_by_their_frames_and_pooled_to_the_grid(tmp_path):
    features = write(tmp_path / "features")
    prior = opened(tmp_path / "features")
    found = prior(frames()[[2, 0, 1]][:, :, None])
    expected = torch.nn.functional.adaptive_avg_pool2d(features[[2, 0, 1]].flatten(0, 1), GRID)
    torch.testing.assert_close(found, expected.unflatten(0, (3, 2)))
    torch.testing.assert_close(prior(frames()[:, :, None] + 1e-4), prior(frames()[:, :, None]))


def test_frames_without_precomputed_prior_features_are_refused(tmp_path):
    write(tmp_path / "features")
    prior = opened(tmp_path / "features")
    with pytest.raises(
        ValueError, match=r"no features of these frames: the nearest of its 3 rows .* rollout"
    ):
        prior(frames(seed=7)[:, :, None])
    with pytest.raises(ValueError, match="2 views of 64 pixels; the policy has 1 of 64"):
        prior(frames()[:, :1, None])


def test_folders_that_a_precomputed_prior_cannot_use_are_refused(tmp_path):
    write(tmp_path / "coarse", grid=(2, 2))
    with pytest.raises(ValueError, match="2x2 tokens a view, which cannot be pooled to the backbone's 4x4"):
        opened(tmp_path / "coarse")
    with pytest.raises(FileNotFoundError, match=r"no manifest.json.*vega-export-features"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"needs prior\.path"):
        make_prior(PriorConfig(name="precomputed"), GRID)
    with pytest.raises(ValueError, match="single layer 0; got 1"):
        opened(tmp_path / "coarse", layer=1)
    with pytest.raises(ValueError, match="is not empty"):
        FeatureWriter(tmp_path / "coarse", "again")
    with pytest.raises(ValueError, match=r"expected features \[n v d gh gw\]"):
        FeatureWriter(tmp_path / "new", "flat").add(frames(), torch.zeros(3, 2, 9))
    with pytest.raises(ValueError, match="no frames were given"):
        FeatureWriter(tmp_path / "nothing", "none").close()


def test_other_precomputed_prior_features_are_other_weights(tmp_path):
    write(tmp_path / "features")
    fingerprint = opened(tmp_path / "features").fingerprint
    write(tmp_path / "other", grid=(4, 4))
    with pytest.raises(ValueError, match="other weights"):
        opened(tmp_path / "other", fingerprint=fingerprint)


@pytest.mark.slow
def test_the_export_command_writes_what_a_policy_with_a_precomputed_prior_trains_on(tmp_path):
    write_dataset(tmp_path / "data", lengths=(3, 2), use_videos=False)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    code = "from vega_policy.cli.commands import export_features; export_features.main()"
    options = [f"repo_id={REPO_ID}", "root=data", "output=features", "frame_size=64", "batch_size=2"]
    command = [sys.executable, "-c", code, "stand_in:load", *options, "device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    row = LeRobotDataset(REPO_ID, root=tmp_path / "data")[4]
    views = {camera: row[camera][None] for camera in CAMERAS}
    small = torch.nn.functional.adaptive_avg_pool2d(stack_views(views, 64)[0, :, 0], GRID)
    torch.manual_seed(0)
    policy = VegaPolicy(tiny_config(PriorConfig(name="precomputed", path=str(tmp_path / "features"))))
    features = policy.model.prior(stack_views(views, 64))
    torch.testing.assert_close(features[0, :, :3], small, atol=1e-4, rtol=1e-4)
    loss, _ = policy({**batch(1), **views})
    loss.backward()
    assert loss.isfinite()
