"""README and docs: commands compose, Python examples run, links resolve."""

import importlib
import importlib.util
import re
import shlex
import sys
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from envs.robosuite import TASKS
from tests.training_runs import tiny_run
from vega_policy.cli import Command, refuse_unknown_options, with_positional
from vega_policy.training.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONSOLE = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
SCRIPTS = {
    "train_policy": "vega-train",
    "eval_policy": "vega-eval",
    "collect_demos": "vega-collect",
    "render_demos": "vega-render",
    "deploy_policy": "vega-deploy",
    "serve_policy": "vega-serve",
    "probe_prior": "vega-probe",
    "pretrain_prior": "vega-pretrain",
    "export_policy": "vega-export-policy",
    "benchmark": "vega-benchmark",
    "compare_runs": "vega-compare",
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[:2] == ["accelerate", "launch"]:
                    words = ["python", *words[4:]]
                if words and (words[0].startswith("vega-") or "scripts/" in " ".join(words[:2])):
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


@cache
def command_named(name):
    """Return a console command after its options are registered."""
    module, _, attribute = CONSOLE[name].partition(":")
    command = getattr(importlib.import_module(module), attribute.removesuffix(".main"))
    assert isinstance(command, Command)
    command.register()
    return command


def command_of(words):
    """Return the command object and the arguments of a line."""
    if words[0].startswith("vega-"):
        name, arguments = words[0], words[1:]
    else:
        name, arguments = SCRIPTS[Path(words[1]).stem], words[2:]
    return command_named(name), arguments


@pytest.mark.parametrize("words", commands())
def test_every_command_of_the_docs_composes(words):
    command, arguments = command_of(words)
    overrides = [word for word in with_positional(arguments, command.positional) if not word.startswith("-")]
    overrides = [re.sub(r"=(choice|range)\(.*\)$", "=0", word) for word in overrides]
    if "-m" in arguments:  # a sweep composes each of its values
        overrides = [re.sub(r"^(\w+)=([^\[,]+),.*$", r"\1=\2", word) for word in overrides]
    refuse_unknown_options(overrides)
    overrides = [word for word in overrides if not word.startswith("machines=ray")]
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base=None):
        compose(command.config, overrides=overrides)


def example(tmp_path, index):
    """Import the index-th Python example of docs/extend.md as a module."""
    path = tmp_path / f"extension_{index}.py"
    path.write_text(blocks(REPOSITORY / "docs" / "extend.md", "python")[index])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_the_example_prior_gives_the_mean_colour_of_each_token(tmp_path, monkeypatch):
    from vega_policy.model.config import PriorConfig
    from vega_policy.priors import PRIORS, make_prior

    monkeypatch.setattr("vega_policy.priors.PRIORS", registry := dict(PRIORS))
    monkeypatch.syspath_prepend(tmp_path)
    example(tmp_path, 0)
    assert "mean_color" in registry
    prior = make_prior(PriorConfig(name="mean_color"), (2, 2))
    frames = torch.zeros(1, 2, 1, 3, 8, 8)
    frames[:, 1, :, 0, :4, 4:] = 1.0  # red, top right, second view
    features = prior(frames)
    assert features.shape == (1, 2, 3, 2, 2)
    assert features[0, 1, 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert not features[0, 0].any()


def test_the_example_fusion_takes_the_maximum(tmp_path, monkeypatch):
    from vega_policy.model import config, fusion

    registry = dict(config.FUSIONS)
    monkeypatch.setattr(config, "FUSIONS", registry)
    monkeypatch.setattr(fusion, "FUSIONS", registry)
    monkeypatch.syspath_prepend(tmp_path)
    example(tmp_path, 1)
    fused = fusion.make_fusion(4, config.FusionConfig(name="maximum"), (2, 2))
    first, second = torch.randn(2, 1, 4, 4)
    assert torch.equal(fused(first, second), torch.maximum(first, second))


def test_the_examples_of_the_features_page_encode_frames_and_train_act(capsys):
    names: dict[str, object] = {}
    for block in blocks(REPOSITORY / "docs" / "features.md", "python"):
        exec(block, names)
    assert "[2, 3, 64, 384]" in capsys.readouterr().out
    assert names["encoder"].fusion.logit.weight.grad.abs().sum() > 0


def test_readme_is_short_and_every_relative_link_resolves():
    assert len((REPOSITORY / "README.md").read_text().split()) <= 900
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_modules_tests_and_options_that_the_docs_name_exist():
    found = 0
    for page in PAGES:
        for name in re.findall(r"`(tests/[\w/]+\.py)", page.read_text()):
            assert (REPOSITORY / name).is_file(), f"{page.name}: {name}"
        for command in re.findall(r"`([^`]*(?:pytest |TESTS |-m tests\.)[^`]*)`", page.read_text()):
            words, found = shlex.split(command), found + 1
            if (module := next((word for word in words if word.startswith("tests.")), None)) is not None:
                program = (REPOSITORY / f"{module.replace('.', '/')}.py").read_text()
                named = [word for word in words[words.index(module) + 1 :] if word.islower()]
                assert all(word in program for word in named), command
            files = [REPOSITORY / word for word in words if word.endswith(".py")]
            assert all(file.is_file() for file in files), command
            if "-k" in words:
                tests = "".join(re.findall(r"def (test_\w+)", "".join(file.read_text() for file in files)))
                chosen = words[words.index("-k") + 1].split(" or ")
                assert all(word in tests for word in chosen), command
    assert found > 5


def test_everything_that_is_shipped_in_assets_has_an_origin_and_a_licence():
    page = (REPOSITORY / "docs" / "security.md").read_text()
    licences = dict(re.findall(r"^\| `(assets/[^`]+)` \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE))
    assets = REPOSITORY / "assets"
    collections = ("demonstrations", "policies")
    shipped = [entry for entry in assets.iterdir() if entry.name not in collections]
    shipped += [entry for name in collections for entry in (assets / name).iterdir()]
    assert {f"{path.relative_to(REPOSITORY)}" for path in shipped} == set(licences)
    for path in shipped:
        card = path / "README.md"
        stated = (
            re.search(r"^license: *([\w.-]+[\w])", card.read_text(), re.I | re.M) if card.is_file() else None
        )
        assert stated is None or stated[1].lower() == licences[str(path.relative_to(REPOSITORY))].lower()


def test_every_page_starts_with_a_command():
    for page in PAGES[1:]:
        if page.stem not in ("glossary", "results", "extend", "features"):
            lines = [line for line in page.read_text().splitlines()[1:] if line]
            assert lines[0] == "```bash", page.name


def test_every_row_of_the_robustness_page_names_a_test_that_exists():
    """A name is a part of the test's name; the file before it is the one that the section names, if none."""
    page, default = (REPOSITORY / "docs" / "robustness.md").read_text(), ""
    for line in page.splitlines():
        if line.startswith("Tests without a file"):
            default = line.partition("](../")[2].partition(")")[0]
        elif line.startswith("| ") and not line.startswith("| input"):
            named = re.findall(r"`([^`]+)`", line.rpartition(" | ")[2])
            assert named, line
            for name in named:
                file, colon, part = name.partition(": ") if ".py" in name else (default, ": ", name)
                (path,) = REPOSITORY.glob(f"tests/**/{Path(file).name}")
                assert not colon or re.search(rf"def test_\w*{part}", path.read_text()), name


DEMO = "outputs/demo/train/checkpoints/last/pretrained_model"


def test_the_example_counts_successes_of_ten_episodes(root, tmp_path, capsys, monkeypatch):
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, replace(task, horizon=5))
    (snippet,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert snippet.count(DEMO) == 1
    checkpoint = train(tiny_run(root, tmp_path / "run", steps=2))
    left: dict = {}
    shortened = snippet.replace(DEMO, str(checkpoint / "pretrained_model")).replace("1_000_010", "1_000_001")
    assert shortened.count("1_000_001") == 1
    exec(shortened, left)
    assert capsys.readouterr().out.splitlines()[-1] == f"{int(left['terminated'])} of 10 episodes succeed"
    assert left["action"].shape == (1, 7)
    assert np.isfinite(left["action"].numpy()).all()
    left["env"].close()
