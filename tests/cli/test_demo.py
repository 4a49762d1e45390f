"""The stages of `make demo`, their seconds, and a stage that fails."""

import json
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vega_policy.cli import generated_groups

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The script as a module, in an empty folder; its stages only note that they were called."""
    monkeypatch.chdir(tmp_path)
    spec = spec_from_file_location("demo", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.called, module.codes = [], {}

    def call(command):
        script = Path(command[1]).name
        module.called.append(script)
        if script == "eval_policy.py":
            summary = module.OUTPUT / "eval" / "summary.json"
            summary.parent.mkdir(parents=True, exist_ok=True)
            summary.write_text(json.dumps({"success_rate": 0.5, "seconds_total": 7.0}))
        return module.codes.get(script, 0)

    monkeypatch.setattr(module.subprocess, "call", call)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    return module


def summary_of(demo):
    return json.loads((demo.OUTPUT / "eval" / "summary.json").read_text())


def test_it_collects_trains_evaluates_and_prints_the_paths_of_videos_and_report(demo, capsys):
    demo.main()
    assert demo.called == ["collect_demos.py", "render_demos.py", "train_policy.py", "eval_policy.py"]
    assert summary_of(demo)["success_rate"] == 0.5
    printed = capsys.readouterr().out
    assert "outputs/demo/eval/videos" in printed
    assert "outputs/demo/eval/report.html" in printed


def test_its_seconds_are_those_of_all_starts_with_the_installation(demo, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--started", str(demo.time.time() - 30)])
    demo.main()
    demo.main()
    summary = summary_of(demo)
    assert set(summary["seconds_by_stage"]) == {"install", "collect", "render", "train", "evaluate"}
    assert summary["seconds_by_stage"]["install"] == pytest.approx(60, abs=5)
    assert summary["seconds_total"] == pytest.approx(sum(summary["seconds_by_stage"].values()))


def test_a_stage_that_fails_ends_it_and_the_next_start_goes_on(demo):
    demo.codes["train_policy.py"] = 3
    with pytest.raises(SystemExit, match="train ended with exit code 3"):
        demo.main()
    assert demo.called == ["collect_demos.py", "render_demos.py", "train_policy.py"]
    demo.codes.clear()
    demo.main()
    assert summary_of(demo)["seconds_total"] >= 0


def test_training_reads_the_frames_that_the_demo_renders(demo):
    """In the message for missing demonstrations, too."""
    dataset = OmegaConf.load(SCRIPT.parent.parent / "configs" / "dataset" / "demo.yaml")
    commands = [shlex.join(["python", f"scripts/{script}", *rest]) for script, *rest in demo.STAGES.values()]
    assert dataset.collect_command == " && ".join(commands[:2])
    rendered = dict(argument.split("=") for argument in demo.STAGES["render"][2:])
    assert rendered["root"] == dataset.root
    assert rendered["frame_stride"] == str(dataset.frame_stride)
    assert rendered["repo_id"] == generated_groups()["dataset"]["lift_wide"]["repo_id"]
