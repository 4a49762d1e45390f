"""LeRobot's own command lines find and run the policy, with no flag that names our modules."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from lerobot.configs.policies import PreTrainedConfig
from lerobot.envs.configs import EnvConfig
from lerobot.scripts import lerobot_eval, lerobot_train
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors.torch import load_file

from envs.robosuite import TASKS
from tests.base_checkpoints import write_base
from tests.policies import SMALL_ENCODERS
from tests.synthetic_dataset import REPO_ID, write_dataset
from tests.training_runs import tiny_run
from vega_policy.training.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = (
    "--policy.prior.name=wan_tiny",
    "--policy.frame_size=64",
    "--policy.chunk_size=4",
    "--policy.n_action_steps=4",
    "--policy.backbone.width=32",
    "--policy.backbone.heads=2",
    "--policy.backbone.depth=1",
    "--policy.backbone.freeze_text_encoder=true",
    "--policy.head.width=32",
    "--policy.head.heads=2",
    "--policy.head.depth=1",
)


def run(programs: Path, folder: Path, command: str, *arguments: str) -> str:
    """Run one of an environment's programs in `folder`, offline, and return what it printed."""
    outcome = subprocess.run(
        [programs / command, *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MUJOCO_GL": "egl", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    printed = outcome.stdout + outcome.stderr
    assert outcome.returncode == 0, printed[-4000:]
    return printed


def train_and_evaluate(call: Callable[..., object], folder: Path, policy: Sequence[str] = TINY) -> None:
    """Two steps of `lerobot-train`, then one episode of `lerobot-eval` on what it saved."""
    data = write_dataset(folder / "data", lengths=(6, 6), frame_shapes=((64, 64), (64, 64)))
    call(
        "lerobot-train",
        "--policy.type=vega",
        *policy,
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        f"--dataset.repo_id={REPO_ID}",
        f"--dataset.root={data}",
        "--dataset.video_backend=pyav",
        "--batch_size=2",
        "--num_workers=0",
        "--steps=2",
        "--log_freq=1",
        f"--output_dir={folder / 'run'}",
    )
    checkpoint = folder / "run" / "checkpoints" / "last" / "pretrained_model"
    stored = json.loads((checkpoint / "config.json").read_text())
    assert stored["type"] == "vega"
    assert stored["prior"]["fingerprint"]
    call(
        "lerobot-eval",
        f"--policy.path={checkpoint}",
        "--policy.device=cpu",
        "--env.type=vega_robosuite",
        "--env.task=lift_wide",
        "--env.frame_size=64",
        "--env.rendering=fast",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--output_dir={folder / 'evaluation'}",
    )
    results = json.loads((folder / "evaluation" / "eval_info.json").read_text())
    assert results["overall"]["n_episodes"] == 1


def test_lerobots_trainer_and_evaluator_run_the_policy(tmp_path, monkeypatch):
    mains = {"lerobot-train": lerobot_train.main, "lerobot-eval": lerobot_eval.main}

    short = replace(TASKS["lift_wide"], horizon=8)  # two chunks
    monkeypatch.setitem(TASKS, "lift_wide", short)

    def call(command, *arguments):
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        mains[command]()

    small = (f"--policy.backbone.{name}={value}" for name, value in SMALL_ENCODERS.items())
    train_and_evaluate(call, tmp_path, (*TINY, *small))


def test_lerobots_discovery_imports_the_plugin_that_registers_policy_and_environments(monkeypatch):
    monkeypatch.delitem(sys.modules, "lerobot_policy_vega", raising=False)
    register_third_party_plugins()
    assert "lerobot_policy_vega" in sys.modules
    assert PreTrainedConfig.get_choice_class("vega").__name__ == "VegaConfig"
    kinds = {f"vega_{family}" for family in ("robosuite", "libero", "metaworld", "so101")}
    assert kinds <= EnvConfig.get_known_choices().keys()


@pytest.mark.slow
def test_lerobot_train_and_lerobot_eval_run_from_the_installed_package(tmp_path):
    train_and_evaluate(partial(run, Path(sys.executable).parent, tmp_path), tmp_path)


@pytest.mark.slow
def test_a_pretrained_base_trains_and_evaluates_by_lerobots_commands_as_type_vega(tmp_path, monkeypatch):
    base = write_base("smolvla", tmp_path, monkeypatch)
    policy = (
        "--policy.base.name=smolvla",
        f"--policy.base.path={base}",
        "--policy.prior.name=random",
        "--policy.chunk_size=4",
        "--policy.n_action_steps=4",
    )
    train_and_evaluate(partial(run, Path(sys.executable).parent, tmp_path), tmp_path, policy)


@pytest.mark.slow
def test_a_checkpoint_of_either_trainer_is_where_the_other_goes_on(tmp_path):
    programs = Path(sys.executable).parent
    data = write_dataset(tmp_path / "data", lengths=(6, 6), frame_shapes=((64, 64), (64, 64)))
    common = ("--policy.device=cpu", "--policy.push_to_hub=false", f"--dataset.repo_id={REPO_ID}")
    common += (f"--dataset.root={data}", "--dataset.video_backend=pyav", "--batch_size=2", "--num_workers=0")
    common += ("--steps=1", "--log_freq=1")
    theirs = f"--output_dir={tmp_path / 'theirs'}"
    run(programs, tmp_path, "lerobot-train", "--policy.type=vega", *TINY, *common, theirs)
    source = tmp_path / "theirs" / "checkpoints" / "last" / "pretrained_model"
    config = PreTrainedConfig.from_pretrained(source)
    config.pretrained_path, config.push_to_hub = source, False
    ours = train(tiny_run(data, tmp_path / "ours", policy=config, steps=1, dataset={"cache": "none"}))
    before, after = (load_file(path / "model.safetensors") for path in (source, ours / "pretrained_model"))
    assert before.keys() == after.keys()
    path = f"--policy.path={ours / 'pretrained_model'}"
    run(programs, tmp_path, "lerobot-train", path, *common, f"--output_dir={tmp_path / 'again'}")
    assert (tmp_path / "again" / "checkpoints" / "last" / "pretrained_model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_trains_and_evaluates_outside_the_repository(tmp_path):
    def call(*command: str | Path) -> None:
        subprocess.run(command, check=True, cwd=tmp_path, timeout=900)

    uv = Path(sys.executable).parent / "uv"
    pip = (sys.executable, "-m", "pip", "--quiet")
    call(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "dist", REPOSITORY)
    call(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    requirements = REPOSITORY / "requirements.lock"
    call(uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", requirements)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    call(uv, "pip", "install", "--quiet", "--python", python, "--no-deps", wheel)
    found = run(
        python.parent,
        tmp_path,
        "python",
        "-c",
        "from vega_policy import resource; print(resource('configs') / 'train.yaml')",
    )
    assert "empty" in found
    assert Path(found.strip().splitlines()[-1]).is_file()
    train_and_evaluate(partial(run, python.parent, tmp_path), tmp_path)
