"""The composed configs: the default is the method, an ablation is one field, nothing leaks, no typo."""

import copy
import errno
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import vega_policy
from tests.synthetic_dataset import write_dataset
from vega_policy import resource
from vega_policy.backbones import BACKBONES
from vega_policy.cli import (
    Command,
    check_cache_folders,
    commands,
    generated_groups,
    group_options,
    refuse_missing_fields,
    refuse_unknown_options,
    with_positional,
    with_quoted_text,
)
from vega_policy.cli.commands import replay, train
from vega_policy.cli.render import render
from vega_policy.configuration_vega import VegaConfig
from vega_policy.data.dataset import DatasetConfig
from vega_policy.deployment.server import ServerSettings
from vega_policy.model.config import (
    BASES,
    FUSIONS,
    ActionHeadConfig,
    BackboneConfig,
    BaseConfig,
    FusionConfig,
    PriorConfig,
)
from vega_policy.priors import PRIORS
from vega_policy.training.checkpoint import FREE_TO_CHANGE
from vega_policy.training.config import GROUPS, SimulationConfig, decode, encode, from_hydra

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
PARTS = {
    "prior": PriorConfig,
    "fusion": FusionConfig,
    "backbone": BackboneConfig,
    "head": ActionHeadConfig,
    "base": BaseConfig,
}
DATASET = "dataset.repo_id=tests/synthetic"


@pytest.fixture(scope="module")
def headline():
    return run("experiment=libero_wan")


@cache
def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("train", overrides=["policy.device=cpu", "output_dir=outputs/x", *overrides])


def run(*overrides):
    return from_hydra(composed(*overrides))


def with_value(node, field, value):
    """Return what composing the same command line with `field=value` gives, without composing again."""
    options = generated_groups().get(field, {})
    if field in GROUPS and value not in options:
        options = {value: composed(DATASET, f"{field}={value}")[field]}
    node = copy.deepcopy(node)
    OmegaConf.update(node, field, options.get(value, yaml.safe_load(value)), merge=False)
    return node


def flat(node, path=""):
    if not isinstance(node, dict):
        return {path: node}
    return {
        key: value for name, child in node.items() for key, value in flat(child, f"{path}.{name}").items()
    }


def difference(first, second):
    first, second = flat(encode(first)), flat(encode(second))
    return {key[1:] for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def test_the_default_config_is_the_method():
    policy, method = run(DATASET).vega, VegaConfig(device="cpu")
    for part in (*PARTS, "chunk_size", "n_action_steps", "frame_size", "optimizer_lr", "scheduler_decay_lr"):
        assert getattr(policy, part) == getattr(method, part), part


FILLED_IN = {"fingerprint", "text_encoder_fingerprint"}  # by the policy, never by a user


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_lists_every_field_of_its_part(group):
    generated = generated_groups().get(group, {})
    for option in group_options(group):
        listed = generated.get(option) or composed(DATASET, f"{group}={option}")[group]
        assert listed.keys() == {field.name for field in fields(PARTS[group])} - FILLED_IN, option


def test_every_prior_fusion_and_backbone_of_the_tables_is_an_option():
    assert group_options("prior") == sorted(["none", *PRIORS])
    assert group_options("fusion") == sorted(FUSIONS)
    assert group_options("base") == sorted(["none", *BASES])
    assert group_options("backbone") == sorted([*BACKBONES, "compact_small", "compact_blind"])


@pytest.mark.parametrize(
    ("prior", "fusion", "experiment"),
    [
        # There are more priors than fusions and experiments; each of all three is composed.
        (prior, fusion, experiment)
        for prior, fusion, experiment in zip(
            group_options("prior"),
            cycle(group_options("fusion")),
            cycle(group_options("experiment")),
            strict=False,
        )
    ],
)
def test_every_prior_fusion_and_experiment_composes_and_nothing_leaks(prior, fusion, experiment):
    node = composed(f"experiment={experiment}", f"prior={prior}", f"fusion={fusion}", DATASET)
    assert node.prior == generated_groups()["prior"][prior]
    assert node.fusion == generated_groups()["fusion"][fusion]
    policy = from_hydra(node).vega
    assert (policy.prior.name, policy.fusion.name) == (prior, fusion)


@pytest.mark.parametrize("experiment", group_options("experiment"))
def test_an_experiment_sets_no_field_that_belongs_to_a_group(experiment):
    node = yaml.safe_load((CONFIGS / "experiment" / f"{experiment}.yaml").read_text())
    groups = generated_groups().keys() | {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert not groups & node.keys()
    assert not groups & node.get("policy", {}).keys()


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("prior=none", "policy.prior.name"),
        ("fusion=add", "policy.fusion.name"),
        ("prior.layer=1", "policy.prior.layer"),
        ("fusion.blend=raw", "policy.fusion.blend"),
        ("seed=7", "seed"),
    ],
)
def test_an_ablation_is_one_field(override, field):
    assert difference(run("experiment=demo"), run("experiment=demo", override)) == {field}


def test_the_blind_experiment_is_the_demo_without_sight_and_without_a_prior():
    changed = difference(run("experiment=demo"), run("experiment=blind"))
    assert changed == {"policy.prior.name", "policy.backbone.sight"}


@pytest.mark.parametrize("study", group_options("study"))
def test_a_study_sweeps_one_field_over_seeds_and_every_value_is_one_field_away_from_the_method(
    study, headline
):
    node = yaml.safe_load((CONFIGS / "study" / f"{study}.yaml").read_text())
    (field, values), (seed, seeds) = node["hydra"]["sweeper"]["params"].items()
    assert node["hydra"]["mode"] == "MULTIRUN"
    assert (seed, len(seeds.split(","))) == ("seed", 3)
    group = field.partition(".")[0]
    for value in str(values).split(","):
        row = from_hydra(with_value(composed("experiment=libero_wan", f"study={study}"), field, value))
        changed = difference(headline, row)
        allowed = f"policy.{field}.name" if field in GROUPS else f"policy.{field}"
        assert changed <= {allowed} or group == "head", (value, changed)
        assert all(name.startswith(f"policy.{group}.") for name in changed)


def test_an_error_of_a_library_keeps_its_traceback_and_one_of_ours_ends_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(run):
        return Command(run, config="failing", fields="").main

    with pytest.raises(SystemExit) as stopped:  # Hydra prints the traceback and ends
        main(lambda config: torch.zeros(2) @ torch.zeros(3))([])
    assert stopped.value.code == 1
    assert "Traceback" in capsys.readouterr().err
    ours = "def run(config): raise RuntimeError('no room for the objects')"
    exec(ours, module := {"__name__": "envs.example"})
    with pytest.raises(SystemExit, match=r"^RuntimeError: no room for the objects$"):
        main(module["run"])([])


@pytest.mark.parametrize("name", ["HF_HOME", "HF_DATASETS_CACHE", "TORCH_HOME"])
def test_a_cache_folder_that_cannot_exist_is_named_before_a_library_meets_it(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setenv(name, "/proc/nothing")
    with pytest.raises(
        SystemExit, match=rf"^ValueError: {name}: expected a folder .* got /proc/nothing \(No"
    ):
        Command(lambda config: "done", config="working", fields="").main([])


def test_a_cache_folder_is_made_and_may_be_read_only(monkeypatch, tmp_path, capsys):
    def read_only(path, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    command = Command(lambda config: "done", config="working", fields="")
    command.main([])
    assert (tmp_path / "hub").is_dir()
    monkeypatch.setattr(Path, "mkdir", read_only)
    check_cache_folders()
    assert capsys.readouterr().out == "done\n"


def test_arguments_without_an_equals_sign_fill_fields_in_order():
    assert with_positional(["a b", "c=1", "d"], ("source", "root")) == ["root='d'", "source='a b'", "c=1"]
    assert with_positional(["x/y", "z", "json=f"], ("folders...",)) == ["folders=['x/y','z']", "json=f"]
    assert with_positional(["--help"], ("part",)) == ["--help"]
    with pytest.raises(SystemExit, match=r"at most 1 arguments without '=' \(part\)"):
        with_positional(["prior", "policy"], ("part",))


def test_instructions_in_any_script_and_with_any_mark_can_be_given_without_quotes():
    given = ["dataset.task=把红色方块放进盒子里", "task=don't drop it!", "seed=1", "-m", "x=[1,", "a='b'"]
    quoted = with_quoted_text(given)
    assert quoted == [
        "dataset.task='把红色方块放进盒子里'",
        "task='don\\'t drop it!'",
        *given[2:],
    ]
    assert run(DATASET, *quoted[:1]).dataset.task == "把红色方块放进盒子里"


OUT_OF_RANGE = {
    FusionConfig: {"layers": 0, "heads": 0},
    BackboneConfig: {"width": 0, "heads": -6, "depth": -1, "latents": 0, "lora_rank": -1, "dropout": 1.0},
    ActionHeadConfig: {"width": 0, "heads": 0, "depth": -1, "steps": 0, "time_power": 0.0, "dropout": -0.1}
    | {"prefix_steps": -1, "prefix_dropout": 1.0},
    VegaConfig: {"optimizer_lr": -1e-4, "scheduler_warmup_steps": -1},
    DatasetConfig: {"workers": -1, "frame_stride": 0, "held_out": 1.0, "hue": 0.6},
    SimulationConfig: {"videos": -1, "every": -1},
    ServerSettings: {"port": 70_000, "sessions": 0, "idle_seconds": 0.0, "grace_seconds": float("inf")},
}
NEEDED = {DatasetConfig: {"repo_id": "a/b"}, VegaConfig: {"device": "cpu"}}


@pytest.mark.parametrize("part", OUT_OF_RANGE, ids=lambda part: part.__name__)
def test_numbers_out_of_range_are_refused_under_their_field_and_none_is_nan(part):
    given = NEEDED.get(part, {})
    part(**given)
    wrong = OUT_OF_RANGE[part] | {
        field.name: float("nan") for field in fields(part) if isinstance(field.default, float)
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"{name}\b.* got {value}"):
            part(**given, **{name: value})


def test_a_saved_config_gives_the_same_run():
    config = run("experiment=demo", "prior.layer=2")
    assert decode(yaml.safe_load(yaml.safe_dump(encode(config)))) == config


def test_fields_that_may_change_on_resuming_exist():
    assert {f".{name}" for name in FREE_TO_CHANGE} <= flat(encode(run(DATASET))).keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+policy.chunk_sise=8",
            r"policy\.chunk_sise\. Did you mean policy\.chunk_size\? Known there: .*frame_size",
        ),
        ("+prior.noise_levle=0.1", r"policy\.prior\.noise_levle\. Did you mean policy\.prior\.noise_level"),
        ("+step=3", r"Unknown config field step\. Did you mean steps"),
        ("+dataset.chache=ram", r"dataset\.chache\. Did you mean dataset\.cached?\?"),
        ("dataset.cache=memory", r"dataset\.cache: expected one of none, disk, ram, gpu; got 'memory'"),
        ("dataset.cached=[prior,semantics]", r"dataset\.cached: expected one of .*; got 'semantics'"),
        ("steps=many", r"steps.*'many'"),
        ("steps=0", r"steps: expected at least 1; got 0"),
        ("policy.type=vegan", r"policy\.type: expected one of .*vega.*; got 'vegan'"),
        ("prior.noise_level=1.5", r"noise_level.*\[0, 1\].*1\.5"),
    ],
)
def test_a_wrong_field_or_value_ends_in_a_message(override, message):
    with pytest.raises(ValueError, match=message):
        run("experiment=demo", override)


def test_a_run_without_a_dataset_says_how_to_name_one():
    with pytest.raises(ValueError, match=r"No value for dataset\.repo_id.*experiment=demo"):
        run()


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs `python scripts/train_policy.py ARGUMENTS` in an empty folder; gives what it printed."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train_policy.py", *arguments])
        runpy.run_path(str(REPOSITORY / "scripts" / "train_policy.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_help_lists_groups_and_fields(script):
    shown = script("--help")
    for word in ("experiment=demo prior=none", "wan_tiny", "token_gate", "noise_level: null", "optimizer_lr"):
        assert word in shown


def test_help_loads_neither_torch_nor_lerobot():
    code = "import sys; from vega_policy.cli.commands import train; train.main(['--help'])"
    code += "; print({*sys.modules} & {'torch', 'lerobot'})"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert shown.stdout.endswith("set()\n")


def test_the_script_trains_an_ablation_of_the_demo(script, tmp_path):
    write_dataset(tmp_path / "data", lengths=(4, 3))
    ablation = ["fusion=add", "prior.layer=1"]
    sizes = ["steps=2", "batch_size=2", "policy.frame_size=32", "policy.device=cpu"]
    shown = script("experiment=demo", *ablation, "dataset.root=data", *sizes, "output_dir=run")
    assert shown.strip().endswith("checkpoint: run/checkpoints/000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "outputs", "run"]


def test_training_says_what_it_does_before_it_loads_torch(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vega_policy.training.config", None)
    with pytest.raises(SystemExit, match=r"vega_policy\.training\.config"):
        script("experiment=demo", "output_dir=run")
    assert "training run: loading torch and LeRobot, then the dataset" in capsys.readouterr().out


def test_the_script_meets_missing_demonstrations_with_one_message(script, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        script("experiment=demo", "policy.device=cpu", "output_dir=run")
    assert "No demonstrations in outputs/demo/demonstrations" in stopped.value.code
    assert "scripts/collect_demos.py env=lift_wide" in stopped.value.code
    assert list(tmp_path.iterdir()) == []


def test_every_suite_has_an_environment_config_of_its_name():
    import envs

    assert group_options("env") == sorted(envs.suite_names())
    for name, node in generated_groups()["env"].items():
        assert list(node) == ["suite", "frame_size", "rendering"]
        assert node["suite"] == name
    unset = {"suite": "libero_goal", "frame_size": None, "rendering": None}  # as in the training data
    assert composed(DATASET, "env=libero_goal").env == unset


def test_an_option_that_a_group_does_not_have_is_refused_with_the_near_ones():
    with pytest.raises(
        SystemExit, match=r"there is no env=lift_wid; did you mean env=lift_wide or env=lift\?"
    ):
        refuse_unknown_options(["checkpoint=x", "env=lift_wid"])
    with pytest.raises(SystemExit, match=r"there is no prior=wan_tinny; did you mean prior=wan_tiny"):
        refuse_unknown_options(["-m", "prior=none,wan_tinny"])
    refuse_unknown_options(["env=lift_wide", "prior=null", "~experiment", "seed=3", "-cn", "other"])
    refuse_unknown_options(["env=of_their_own", "--config-dir", "elsewhere"])  # Hydra's to judge


def test_a_field_without_a_default_is_named_in_the_message():
    with pytest.raises(
        SystemExit, match=r"No value for checkpoint\. Add checkpoint=\.\.\. to the command line"
    ):
        refuse_missing_fields(OmegaConf.create({"checkpoint": "???", "seed": 0}))
    refuse_missing_fields(OmegaConf.create({"checkpoint": "outputs/run", "seed": 0}))


def test_an_unknown_field_is_refused_with_the_near_one_and_the_known_ones():
    with pytest.raises(SystemExit, match=r"no field priro\. Did you mean prior=none\? Known: .*steps"):
        train.main(["priro=none"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=abc", r"^steps: expected a whole number; got 'abc'"),
        ("seed=null", r"^seed: expected a whole number; got null"),
        ("policy.frame_size=0", r"policy\.frame_size: expected at least 1; got 0"),
        ("policy.device=quantum", r"policy\.device: this machine has cpu.*got 'quantum'"),
        ("dataset.video_backend=opencv", r"dataset\.video_backend: expected one of pyav, torchcodec"),
        (
            "policy.normalization_mapping.ACTION=Z",
            r"normalization_mapping\.ACTION: expected one of .*MIN_MAX",
        ),
    ],
)
def test_a_value_that_does_not_fit_names_its_own_field(override, message):
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base=None):
        composed = compose("train", ["dataset.repo_id=a/b", override])
    with pytest.raises(ValueError, match=message):
        from_hydra(composed)


def test_a_dataset_is_renamed_and_normalised_otherwise_on_the_command_line():
    rename = "dataset.rename={image: observation.images.image,actions: action}"
    modes = "policy.normalization_mapping.ACTION=QUANTILES"
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base=None):
        config = from_hydra(compose("train", ["dataset.repo_id=a/b", rename, modes]))
    assert config.dataset.rename == {"image": "observation.images.image", "actions": "action"}
    assert config.vega.normalization_mapping["ACTION"].name == "QUANTILES"
    assert config.vega.normalization_mapping["STATE"].name == "MEAN_STD"


def test_the_help_shows_the_comments_of_yaml_texts_and_of_dataclasses():
    text = train.help()
    assert "steps: 30000  # optimizer steps" in text
    assert "chunk_size: 16  # actions predicted at once" in text
    assert "held_out: 0.0  # share of each task's episodes" in text
    assert "noise: fixed  # `fixed`: one seeded noise for all frames" in text
    assert "layer: null  # 0-based block that is read; of several: their features joined" in text  # above it
    replay.register()
    assert "episodes: null  # indices, such as [0,424]; null replays all" in replay.help()


COMMANDS = {name: one for name, one in vars(commands).items() if isinstance(one, Command)} | {
    "render": render
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_of_a_command_has_a_comment(name):
    node, comments = COMMANDS[name].node, COMMANDS[name].comments({})
    node.pop("defaults", None)
    node.pop("hydra", None)
    assert [field[1:] for field in flat(node) if field[1:] not in comments] == []


@pytest.mark.parametrize("group", ["clips", *generated_groups(), "backbone", "head", "robot"])
def test_every_field_of_an_option_has_a_comment(group):
    for option in group_options(group):
        file = CONFIGS / group / f"{option}.yaml"
        node = yaml.safe_load(file.read_text()) if file.is_file() else dict(generated_groups()[group][option])
        node.pop("defaults", None)
        comments = COMMANDS["train"].comments({group: option})
        named = {name.removeprefix(f"{group}.") for name in comments if name.startswith(f"{group}.")}
        limits = ".safety.joints."  # low, high, ... of each joint: their group has one
        fields = [field[1:] for field in flat(node) if not field.startswith(limits)]
        assert [field for field in fields if field not in named] == [], option


def test_configs_of_the_repository_are_found_in_an_editable_install():
    assert (resource("configs") / "train.yaml").is_file()


def test_configs_inside_the_package_come_first_as_in_a_wheel(tmp_path, monkeypatch):
    packaged = tmp_path / "vega_policy" / "configs"
    packaged.mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(vega_policy, "PACKAGE", tmp_path / "vega_policy")
    assert resource("configs") == packaged


def test_a_missing_folder_names_both_places(tmp_path, monkeypatch):
    monkeypatch.setattr(vega_policy, "PACKAGE", tmp_path / "vega_policy")
    with pytest.raises(FileNotFoundError, match=r"no folder assets in .*vega_policy or "):
        resource("assets")


def test_a_reader_that_leaves_early_ends_no_command_in_a_traceback(tmp_path):
    results = REPOSITORY / "assets" / "results" / "libero"
    program = ["-X", "importtime", REPOSITORY / "scripts" / "compare_runs.py"]
    command = [sys.executable, *program, results / "vega", results / "none_192"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        printed = process.stderr.read()
    assert process.returncode == 0
    assert b"Traceback" not in printed
    imported = re.findall(rb"\| +(\w+)$", printed, re.MULTILINE)
    assert b"scipy" in imported
    assert not {b"torch", b"lerobot"} & {*imported}  # whose import takes ten times as long as the comparison
