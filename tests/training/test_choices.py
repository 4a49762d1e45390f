"""What users choose: relative actions, longer runs, moved data, padding; and refusals in one line."""

import json
import shutil

import pytest
import torch

from tests.synthetic_dataset import CAMERAS, write_dataset
from tests.training_runs import tiny_policy, tiny_run
from vega_policy.evaluation.policies import load_lerobot_policy
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.training.config import check_device
from vega_policy.training.train import load_data, train


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
        ({"frame_size": 0}, {}, r"policy\.frame_size must be at least 1"),
        ({"resize": "crop"}, {}, r"policy\.resize: expected stretch or pad; got 'crop'"),
    ],
)
def test_choices_that_cannot_work_are_refused(root, tmp_path, policy, run, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(root, tmp_path / "run", policy=tiny_policy(**policy), **run))
