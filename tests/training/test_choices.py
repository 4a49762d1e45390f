"""What users choose: relative actions, longer runs, moved data, padding; and refusals in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.synthetic_dataset import CAMERAS, write_dataset
from tests.training_runs import assert_bitwise_equal, tiny_policy, tiny_run
from vega_policy.data.dataset import MixtureEntry
from vega_policy.data.loader import ShuffledRows
from vega_policy.evaluation.policies import load_lerobot_policy
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.training.config import check_device
from vega_policy.training.train import load_data, make_source, train


def observation(state):
    frames = {camera: torch.rand(1, 3, 32, 32) for camera in CAMERAS}
    return {**frames, "observation.state": state, "task": ["lift the cube"]}


def test_relative_actions_are_normalised_by_their_own_statistics_and_restored(root, tmp_path):
    config = tiny_run(root, tmp_path / "run", policy=tiny_policy(use_relative_actions=True), steps=1)
    data = load_data(config)
    actions, is_pad = data.table.chunks(torch.arange(len(data.table)), 4)
    relative = (actions - data.table.state[:, None, :7])[~is_pad]
    assert data.stats["action"]["max"] == pytest.approx(relative.amax(0).numpy(), rel=1e-5)
    folder = train(config) / "pretrained_model"
    policy = load_lerobot_policy(folder, device="cpu")
    state = torch.randn(1, 8)
    batch = observation(state)
    normalised = policy.preprocessor({**batch, "action": actions[:1]})["action"]
    assert normalised.abs().max() > 0.01
    restored = policy.postprocessor(normalised)
    torch.testing.assert_close(restored, actions[:1], atol=1e-5, rtol=1e-5)


def test_relative_actions_leave_out_the_joints_that_are_named(tmp_path):
    folder = write_dataset(tmp_path / "arm", lengths=(5, 4))
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = [*(f"joint{index}" for index in range(6)), "gripper.pos"]
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    policy = tiny_policy(use_relative_actions=True, relative_exclude_joints=["gripper"])
    data = load_data(tiny_run(folder, tmp_path / "run", policy=policy))
    assert data.stats["action"]["max"][6] == pytest.approx(data.table.action[:, 6].max().item())
    assert data.stats["action"]["max"][0] != pytest.approx(data.table.action[:, 0].max().item())


def test_lerobots_single_actions_are_refused_for_relative_chunks(root, tmp_path):
    policy = tiny_policy(use_relative_actions=True)
    load_data(tiny_run(root, tmp_path / "run", policy=policy))
    with pytest.raises(ValueError, match=r"Set n_action_steps=1, or evaluate with vega-eval"):
        VegaPolicy(policy).select_action(observation(torch.zeros(1, 8)))


def test_a_finished_run_is_extended_on_data_that_moved_with_another_cache(root, tmp_path):
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    train(tiny_run(root, tmp_path / "run", steps=2))
    policy = tiny_policy(scheduler_decay_steps=8)
    last = train(
        tiny_run(moved, tmp_path / "run", policy=policy, steps=3, resume=True, dataset={"cache": "disk"})
    )
    assert last.name == "000003"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_the_checkpoint_names_the_rate_of_its_data(root, tmp_path):
    folder = train(tiny_run(root, tmp_path / "run", steps=1)) / "pretrained_model"
    assert json.loads((folder / "config.json").read_text())["dataset_fps"] == 10


def test_padded_frames_are_another_cache_and_the_policy_keeps_the_choice(root, tmp_path):
    for resize in ("stretch", "pad"):
        policy = tiny_policy(resize=resize)
        folder = train(tiny_run(root, tmp_path / resize, policy=policy, steps=1))
        assert json.loads((folder / "pretrained_model" / "config.json").read_text())["resize"] == resize
    assert len(list((tmp_path / "cache").glob("prior-*"))) == 2


def test_a_batch_without_an_instruction_is_refused(root, tmp_path):
    policy = tiny_policy()
    load_data(tiny_run(root, tmp_path / "run", policy=policy))
    batch = observation(torch.zeros(1, 8))
    del batch["task"]
    with pytest.raises(ValueError, match=r"The batch has no 'task'.*task=''"):
        VegaPolicy(policy).predict_action_chunk(batch)


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "gpu", "tpu"])
def test_a_device_that_does_not_exist_is_refused(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    with pytest.raises(ValueError, match=rf"policy\.device: this machine has cpu; got '{name}'"):
        check_device(name)
    check_device("cpu")
    check_device(None)


@pytest.mark.parametrize(
    ("policy", "run", "message"),
    [
        ({}, {"precision": "bf16"}, r"precision=bf16 needs a GPU; policy\.device is cpu"),
        ({"frame_size": 0}, {}, r"policy\.frame_size: expected at least 1; got 0"),
        (
            {"frame_size": 32},
            {"dataset": {"mixture": [], "root": None}},
            r"dataset\.mixture: expected at least one dataset",
        ),
        (
            {},
            {"tracking": "mlflow"},
            r"tracking: expected one of none, tensorboard, trackio, wandb; got 'mlflow'",
        ),
        ({"resize": "crop"}, {}, r"policy\.resize: expected one of stretch, pad; got 'crop'"),
    ],
)
def test_choices_that_cannot_work_are_refused(root, tmp_path, policy, run, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(root, tmp_path / "run", policy=tiny_policy(**policy), **run))


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_built(root, tmp_path, monkeypatch):
    monkeypatch.setattr("vega_policy.training.config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tracking=trackio: not installed\. Run: pip"):
        tiny_run(root, tmp_path / "run", tracking="trackio")


def mixed(*entries, **fields):
    mixture = [MixtureEntry(f"tests/{number}", **entry) for number, entry in enumerate(entries)]
    return {"repo_id": "mixture", "root": None, "mixture": mixture, **fields}


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """Two datasets with the same features, other frame sizes, tasks and lengths."""
    folder = tmp_path_factory.mktemp("arms")
    second = {"lengths": (7, 5), "frame_shapes": ((32, 32), (48, 64)), "tasks": ("push the cube", "wave")}
    return str(write_dataset(folder / "first")), str(write_dataset(folder / "second", **second))


def test_a_mixture_is_sampled_by_weight_and_resumes_bitwise(arms, tmp_path):
    first, second = arms
    dataset = mixed({"root": first, "weight": 3.0}, {"root": second, "episodes": [1]})

    def run(name, **fields):
        return train(tiny_run(Path(first), tmp_path / name, dataset=dataset, **fields))

    whole = run("whole")
    run("stopped", stop_after=2)
    assert_bitwise_equal(whole, run("stopped", resume=True))
    assert "75% tests/0 + 25% tests/1, 32 frames" in (whole / "pretrained_model" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"dataset\.mixture \(stored"):
        train(tiny_run(Path(first), tmp_path / "whole", resume=True, dataset=mixed({"root": first})))


def test_statistics_of_a_mixture_are_those_of_its_samples(arms, tmp_path):
    first, second = arms
    dataset = mixed({"root": first, "weight": 3.0}, {"root": second})
    data = load_data(tiny_run(Path(first), tmp_path / "run", dataset=dataset))
    sampler = ShuffledRows(data.rows, 39 * 4, seed=0, shares=data.shares)  # four passes over 39 frames
    sampled = data.table.state[sampler.batch(0)].double()
    assert data.stats["observation.state"]["mean"] == pytest.approx(sampled.mean(0).numpy(), abs=0.03)
    assert data.stats["observation.state"]["std"] == pytest.approx(sampled.std(0).numpy(), rel=0.05)
    assert data.table.tasks == ("lift the cube", "push the cube", "wave")


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_batches_of_a_mixture_hold_the_rows_of_their_datasets(arms, tmp_path, cache):
    first, _ = arms
    entries = ({"root": first}, {"root": first, "task": "wave", "episodes": [0]})
    config = tiny_run(Path(first), tmp_path / "run", dataset=mixed(*entries, cache=cache))
    data = load_data(config)
    source, _ = make_source(config, VegaPolicy(config.vega), data, None)
    batch = source.batch(torch.tensor([30, 2, 3]))  # row 3 of the second, rows 2 and 3 of the first
    assert batch["task"] == ["wave", "lift the cube", "lift the cube"]
    for name, values in batch.items():
        if torch.is_tensor(values):
            assert torch.equal(values[0], values[2]), name
            assert name == "action_is_pad" or not torch.equal(values[1], values[2]), name


def test_datasets_that_do_not_mix_are_refused(arms, tmp_path):
    first, second = arms
    narrow = str(
        write_dataset(
            tmp_path / "narrow", lengths=(4,), action_width=6, cameras=("observation.image", CAMERAS[1])
        )
    )

    def load(*entries, **fields):
        load_and_build = tiny_run(Path(first), tmp_path / "run", dataset=mixed(*entries, **fields))
        data = load_data(load_and_build)
        make_source(load_and_build, VegaPolicy(load_and_build.vega), data, None)

    with pytest.raises(
        ValueError,
        match=r"tests/1 differs from tests/0: no \S+images\.image; observation\.image besides; action \[6\] "
        r"instead of \[7\]",
    ):
        load({"root": first}, {"root": narrow})
    with pytest.raises(ValueError, match=r"have several sizes .* dataset\.cache=disk"):
        load({"root": first}, {"root": second}, cache="none")
    with pytest.raises(ValueError, match=r"expected a positive weight for tests/0; got 0\.0"):
        load({"root": first, "weight": 0.0})
    with pytest.raises(ValueError, match=r"dataset\.root: give it in each entry"):
        load({"root": first}, root=first)
