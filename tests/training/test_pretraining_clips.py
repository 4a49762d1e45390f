"""Clips and their latents: what is held out, what is damaged, and what the autoencoder makes of them."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.pretraining_runs import CPU, TINY, moving_square, write_shards
from vega_policy.pretraining.autoencoder import (
    denormalise,
    measure_statistics,
    normalise,
    posterior_means,
    write_image_latents,
    write_latents,
)
from vega_policy.pretraining.clips import Clips, DamagedClipsError


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "clips"
    write_shards(folder)
    return Clips.open(folder, 0.05)[0]


@pytest.fixture(scope="module")
def vae(clips):
    torch.manual_seed(0)
    network = AutoencoderKLWan(**TINY["vae"]).eval().requires_grad_(False)
    measure_statistics(network, clips, CPU)
    return network


def test_normalised_latents_have_mean_zero_and_deviation_one_and_come_back(vae, clips):
    latent = posterior_means(vae, clips.take(np.arange(len(clips))), CPU)
    scaled = normalise(vae, latent)
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3, 4)), torch.ones(4), atol=0.05, rtol=0)
    torch.testing.assert_close(denormalise(vae, scaled), latent)


def test_single_images_are_encoded_without_earlier_frames(vae, clips, tmp_path):
    some = np.array([1, 5])
    singles = write_image_latents(tmp_path / "images.npy", vae, clips, CPU)
    assert singles.shape == (len(clips), 2, 4, 1, 2, 2)
    alone = normalise(vae, posterior_means(vae, clips.take(some)[:, 4:5], CPU)).half()
    torch.testing.assert_close(torch.from_numpy(singles[some, 1]), alone, atol=2e-3, rtol=0)
    whole = write_latents(tmp_path / "clips.npy", vae, clips, CPU)
    assert np.allclose(singles[:, 0], whole[:, :, :1], atol=2e-3)
    assert not np.allclose(singles[:, 1], whole[:, :, 1:2], atol=2e-2)


def test_a_shard_that_was_cut_off_is_refused_by_name(tmp_path):
    write_shards(tmp_path / "clips")
    whole = (tmp_path / "clips" / "square-1.npy").read_bytes()
    (tmp_path / "clips" / "square-1.npy").write_bytes(whole[:-7])
    with pytest.raises(DamagedClipsError, match=r"square-1\.npy has \d+ bytes, \d+ were written"):
        Clips.open(tmp_path / "clips", 0.1)


def test_nothing_is_learned_from_a_held_out_shard(tmp_path):
    write_shards(tmp_path / "clips")
    clips, held_out = Clips.open(tmp_path / "clips", 0.1)
    assert (len(clips), len(held_out)) == (8, 4)
    assert np.array_equal(held_out.take(np.arange(4)), moving_square(4, 1))
    assert np.array_equal(clips.take(np.array([7, 0]))[0], moving_square(4, 2)[3])
    assert clips.instructions == ["", "move it"] * 4


def test_held_out_shards_stay_held_out_when_more_are_rendered(tmp_path):
    write_shards(tmp_path / "few")
    write_shards(tmp_path / "many", shards=10)
    aside = [Clips.open(tmp_path / name, 0.1)[1].take(np.arange(4)) for name in ("few", "many")]
    assert np.array_equal(*aside)
    learned, held_out = Clips.open(tmp_path / "many", 0.1)
    assert (len(learned), len(held_out)) == (28, 12)
    assert learned.mark != held_out.mark == Clips.open(tmp_path / "many", 0.1)[1].mark
