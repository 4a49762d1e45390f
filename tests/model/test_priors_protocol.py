"""What holds for every prior that is loaded from a checkpoint in the hub's layout."""

import json
import shutil

import pytest
import torch

from tests.policies import frames
from tests.prior_checkpoints import LAST, WRITERS
from vega_policy.model.config import PriorConfig
from vega_policy.priors import PRIORS, make_prior, resolve

GRID = (2, 2)
NAMES = sorted(WRITERS)
WIDTHS = {
    "wan2.1_t2v_14b": 48,
    "wan2.1_vace_1.3b": 48,
    "wan2.2_ti2v_5b": 48,
    "sd21": 16,
    "svd": 32,
    "sd_vae": 4,
    "wan_vae": 4,
    "dinov3": 16,
    "vjepa2": 24,
}
NOISY = [name for name in NAMES if name.startswith(("wan2", "sd21", "svd"))]


@pytest.fixture
def load(prior_checkpoint):
    """Return a function that loads a prior."""

    def loaded(name, grid=GRID, **config):
        values = {"layer": LAST[name], "dtype": "float32", "path": str(prior_checkpoint(name))} | config
        return make_prior(PriorConfig(name=name, **values), grid)

    return loaded


@pytest.fixture(scope="module")
def shared(request, prior_checkpoint):
    """A name and the prior of that name, for the tests that change nothing in it."""
    config = PriorConfig(
        name=request.param,
        layer=LAST[request.param],
        dtype="float32",
        path=str(prior_checkpoint(request.param)),
    )
    return request.param, make_prior(config, GRID)


EACH = pytest.mark.parametrize("shared", NAMES, indirect=True)


@EACH
def test_a_prior_gives_one_feature_a_token_of_the_grid_with_the_width_of_its_config(shared):
    name, prior = shared
    features, width = prior(frames(views=2)), WIDTHS[name]
    assert features.shape == (1, 2, width, *GRID)
    assert prior.width == width
    assert features.isfinite().all()


@EACH
def test_a_prior_gives_the_same_features_of_the_same_frame_in_any_batch(shared, load):
    (name, prior), pictures = shared, frames(views=3)
    both = prior(pictures)
    assert torch.equal(both, load(name)(pictures))
    torch.testing.assert_close(both[:, 1:2], prior(pictures[:, 1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", NOISY, indirect=True)
def test_a_priors_fresh_noise_comes_from_the_callers_generator_and_fixed_noise_from_the_seed(shared, load):
    (name, prior), picture = shared, frames()
    draws = [prior(picture, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(prior(picture), load(name, seed=1)(picture))


@EACH
def test_a_prior_is_frozen(shared):
    _, prior = shared
    assert not prior.training
    assert not any(parameter.requires_grad for parameter in prior.parameters())
    assert not prior(frames().requires_grad_()).requires_grad


def without_cancelling(prior):
    """Make the kernels of random convolutions positive: what remains is where they look."""
    for parameter in prior.parameters():
        if parameter.ndim > 3:
            parameter.abs_()
    return prior


@pytest.mark.parametrize("name", NAMES)
def test_a_bright_square_changes_the_token_of_a_prior_that_holds_it_most(load, name):
    cell = 32
    prior = without_cancelling(load(name, (4, 4)))
    dark = torch.full((1, 1, 1, 3, 128, 128), 0.3)
    base = prior(dark)
    for row in (0, 1, 3):
        for column in (0, 2, 3):
            lit = dark.clone()
            lit[..., cell * row + 8 : cell * row + 24, cell * column + 8 : cell * column + 24] = 1.0
            change = (prior(lit) - base)[0, 0].norm(dim=0)
            assert divmod(change.argmax().item(), 4) == (row, column)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_a_prior_has_not_is_refused(load, name):
    for layer in (-1, 9):
        with pytest.raises(ValueError, match=rf"prior.layer: '{name}' has .*; got {layer}"):
            load(name, layer=layer)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_another_architecture_is_refused_by_each_prior(load, prior_checkpoint, tmp_path, name):
    other = tmp_path / "other"
    shutil.copytree(prior_checkpoint(name), other)
    file = next(path for part in ("vae", ".") if (path := other / part / "config.json").is_file())
    config = json.loads(file.read_text())
    key = "_class_name" if "_class_name" in config else "architectures"
    file.write_text(json.dumps(config | {key: "Sphinx" if key == "_class_name" else ["Sphinx"]}))
    with pytest.raises(ValueError, match="holds Sphinx; this prior requires "):
        load(name, path=str(other))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_without_weights_names_the_missing_files_and_the_way_out(
    load, prior_checkpoint, tmp_path, name
):
    other = tmp_path / "other"
    shutil.copytree(prior_checkpoint(name), other)
    for file in other.rglob("*model*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no (vae/)?\*\.safetensors.*prior=wan_tiny"):
        load(name, path=str(other))


@pytest.mark.parametrize("name", ["svd", "dinov3"])
def test_offline_a_gated_prior_says_that_its_licence_must_be_accepted(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"Missing: .*gated.*https://huggingface.co/.*hf auth login"):
        make_prior(PriorConfig(name=name, revision="0" * 40), GRID)
    assert ("non-commercial" in str(PRIORS[name].terms)) == (name == "svd")


@EACH
def test_other_weights_of_a_prior_have_another_fingerprint(shared, load, tmp_path):
    (name, prior), other = shared, tmp_path / "other"
    torch.manual_seed(1)
    WRITERS[name](other)
    assert load(name).fingerprint == prior.fingerprint
    with pytest.raises(ValueError, match="other weights"):
        load(name, path=str(other), fingerprint=prior.fingerprint)


@pytest.mark.parametrize("name", ["sd_vae", "wan_vae", "dinov3", "vjepa2"])
def test_a_prior_without_noise_refuses_a_noise_level(load, name):
    with pytest.raises(ValueError, match=rf"'{name}' encodes clean frames; leave it null \(got 0.3\)"):
        load(name, noise_level=0.3)


@pytest.mark.parametrize(
    ("name", "stride"), [("sd21", 64), ("svd", 64), ("sd_vae", 8), ("dinov3", 16), ("wan2.2_ti2v_5b", 32)]
)
def test_frames_too_small_for_the_backbones_grid_are_refused_by_a_prior(load, name, stride):
    with pytest.raises(
        ValueError, match=rf"2x2 tokens, which cannot be pooled to the backbone's 4x4.* {4 * stride}"
    ):
        load(name, (4, 4), input_size=2 * stride)
    with pytest.raises(ValueError, match=f"multiple of {stride}; got {stride + 1}"):
        load(name, input_size=stride + 1)
    assert load(name, input_size=4 * stride)(frames()).shape[-2:] == GRID  # pooled from 4x4


def test_the_default_layers_and_noise_levels_of_the_priors_are_the_papers():
    read = {name: resolve(PriorConfig(name=name)) for name in NAMES}
    assert {name: (prior.layer, prior.noise_level) for name, prior in read.items()} == {
        "wan2.1_t2v_14b": (27, 0.3),
        "wan2.1_vace_1.3b": (20, 0.3),
        "wan2.2_ti2v_5b": (20, 0.3),
        "sd21": (3, 0.25),
        "svd": (3, 0.3),
        "sd_vae": (0, 0.0),
        "wan_vae": (0, 0.0),
        "dinov3": (23, 0.0),
        "vjepa2": (39, 0.0),
    }
