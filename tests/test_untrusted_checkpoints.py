"""A checkpoint of an attacker runs no code, reads no file of the user and contacts no server."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from draccus.utils import DecodingError, ParsingError
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.processor import ProcessorStepRegistry

from tests.evaluations import evaluate, evaluation_config, save_checkpoint
from tests.policies import tiny_config
from tests.training_runs import tiny_policy, tiny_run
from vega_policy.backbones.pretrained_vla import base_config
from vega_policy.checkpoints import (
    POLICY_TYPES,
    PROCESSOR_STEPS,
    DamagedCheckpointError,
    UnsafeCheckpointError,
    check_checkpoint,
    write_checksums,
)
from vega_policy.deployment.deploy import read_rollout
from vega_policy.deployment.remote_policy import VegaRemoteConfig
from vega_policy.deployment.server import load_served_policy
from vega_policy.evaluation.evaluate import evaluate_checkpoint, trained_frames
from vega_policy.evaluation.open_loop import read_recorded
from vega_policy.evaluation.policies import load_lerobot_policy
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.run_dir import DamagedFileError, OtherRunError
from vega_policy.training.checkpoint import export_policy
from vega_policy.training.train import train


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid") / "checkpoints" / "000001"
    save_checkpoint(VegaPolicy(tiny_config()), folder, None)
    write_checksums(folder / "pretrained_model")
    return folder / "pretrained_model"


@pytest.fixture
def folder(valid, tmp_path):
    return Path(shutil.copytree(valid.parent, tmp_path / "checkpoints" / "000001")) / "pretrained_model"


def add_step(folder: Path, step: object, file: str = "policy_preprocessor.json") -> None:
    pipeline = json.loads((folder / file).read_text())
    pipeline["steps"].insert(0, step)
    (folder / file).write_text(json.dumps(pipeline))
    write_checksums(folder)  # the attacker's own


def run_command(folder: Path) -> dict:
    """A step that makes the file `attacked`, as LeRobot's pipeline would import and call it."""
    return {"class": "subprocess.Popen", "config": {"args": ["touch", str(folder / "attacked")]}}


def set_type(folder: Path, **fields: object) -> None:
    (folder / "config.json").write_text(json.dumps(fields))
    write_checksums(folder)


def deploy(folder: Path, tmp_path: Path) -> None:
    read_rollout({"checkpoint": str(folder), "server": {"url": None}, "device": "cpu"})


def fine_tune(folder: Path, tmp_path: Path) -> None:
    policy = tiny_policy(pretrained_path=folder)
    train(tiny_run(tmp_path / "data", tmp_path / "run", policy=policy))


def load_with_lerobot(folder: Path, tmp_path: Path) -> None:
    """As lerobot-eval, lerobot-rollout and lerobot-train do, before they load the processors."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    get_policy_class(config.type).from_pretrained(folder, config=config)


def load_adapter_with_lerobot(folder: Path, tmp_path: Path) -> None:
    """As LeRobot does with `use_peft`: the policy is beside a harmless pipeline, the adapter is not."""
    policy = save_checkpoint(VegaPolicy(tiny_config()), tmp_path / "policy", None) / "pretrained_model"
    config = PreTrainedConfig.from_pretrained(policy)
    config.pretrained_path, config.use_peft = folder, True
    get_policy_class(config.type).from_pretrained(policy, config=config)


LOADERS = {
    "from_pretrained": lambda folder, tmp_path: VegaPolicy.from_pretrained(folder),
    "evaluation": lambda folder, tmp_path: evaluate_checkpoint(evaluation_config(folder, tmp_path / "out")),
    "policy of an evaluation": lambda folder, tmp_path: load_lerobot_policy(folder, device="cpu"),
    "server": lambda folder, tmp_path: load_served_policy(folder, device="cpu"),
    "deployment": deploy,
    "base": lambda folder, tmp_path: base_config(tiny_config(), folder),
    "LeRobot": load_with_lerobot,
    "LeRobot with an adapter": load_adapter_with_lerobot,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_a_step_that_names_a_class_is_refused_before_it_is_imported(folder, tmp_path, load):
    add_step(folder, run_command(folder))
    with pytest.raises(UnsafeCheckpointError, match=r"policy_preprocessor\.json: .*'subprocess\.Popen'"):
        load(folder, tmp_path)
    assert not (folder / "attacked").exists()


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_a_flipped_byte_in_the_weights_is_noticed_without_the_runs_folder(valid, tmp_path, load):
    folder = Path(shutil.copytree(valid, tmp_path / "downloaded"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"downloaded is damaged: model\.safetensors is altered"):
        load(folder, tmp_path)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_a_checkpoint_chooses_neither_a_server_nor_a_token_file(folder, tmp_path, load):
    token = tmp_path / "token"
    token.write_text("a-private-token-of-the-user-that-is-long-enough")
    token.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"ws://127.0.0.1:{server.getsockname()[1]}"
        set_type(folder, type="vega_remote", url=url, token_file=str(token))
        with pytest.raises(UnsafeCheckpointError, match="token file of a policy server"):
            load(folder, tmp_path)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody connected
            server.accept()


@pytest.fixture
def attacker_module(tmp_path, monkeypatch):
    """Name of a module that could be imported; importing it makes a file, whose path is yielded too."""
    made = tmp_path / "imported"
    source = f"import pathlib\npathlib.Path({str(made)!r}).touch()\n\ndef run(*_, **__): ...\n"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "attacker_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield "attacker_module", made
    assert not made.exists()
    assert "attacker_module" not in sys.modules


@pytest.mark.parametrize("separator", [".", ":"])
@pytest.mark.parametrize("part", ["prior", "fusion", "backbone", "head", "base"])
def test_the_name_of_a_part_is_a_key_and_no_module(folder, attacker_module, part, separator):
    config = json.loads((folder / "config.json").read_text())
    config[part]["name"] = f"{attacker_module[0]}{separator}run"
    set_type(folder, **config)
    with pytest.raises((ValueError, ParsingError), match=r"attacker_module|instantiate class BaseConfig"):
        VegaPolicy.from_pretrained(folder)


@pytest.mark.parametrize("part", [None, "prior", "backbone"])
@pytest.mark.parametrize("field", ["_target_", "class", "__class__", "auto_map"])
def test_a_field_that_other_loaders_import_is_refused(folder, attacker_module, part, field):
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part])[field] = f"{attacker_module[0]}.run"
    set_type(folder, **config)
    with pytest.raises(DecodingError, match=field):
        VegaPolicy.from_pretrained(folder)


def test_names_in_the_config_of_a_run_are_not_imported(folder, root, tmp_path, attacker_module):
    run, name = folder.parents[2], f"{attacker_module[0]}.run"
    functions = {"make": name, "tasks": name, "_target_": name}
    values = {"dataset": {"root": None, "_target_": name}, "simulation": functions, "environments": functions}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert trained_frames(folder)["rendering"] is None
    with pytest.raises(ValueError, match="_target_"):
        read_recorded(folder, None, None, None)
    with pytest.raises(OtherRunError, match="_target_"):
        train(tiny_run(root, run, resume=True))


def test_yaml_of_a_run_makes_no_objects(folder, root, attacker_module):
    run = folder.parents[2]
    (run / "config.yaml").write_text(f"dataset: !!python/object/apply:{attacker_module[0]}.run []\n")
    for read in (
        lambda: trained_frames(folder),
        lambda: read_recorded(folder, None, None, None),
        lambda: train(tiny_run(root, run, resume=True)),
    ):
        with pytest.raises(DamagedFileError, match="could not determine a constructor"):
            read()


def test_functions_that_an_evaluations_folder_names_are_not_imported(tmp_path, attacker_module):
    name, functions = f"{attacker_module[0]}.run", ("make", "tasks")
    stored = {"environments": dict.fromkeys(functions, name), "_target_": name}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(json.dumps(stored))
    with pytest.raises(OtherRunError, match=r"environments\.make \(stored: 'attacker_module\.run'"):
        evaluate(tmp_path / "out")


def test_a_run_that_starts_from_a_checkpoint_checks_it(folder, root, tmp_path):
    add_step(folder, run_command(folder))
    policy = tiny_policy(pretrained_path=folder)
    with pytest.raises(UnsafeCheckpointError, match="Popen"):
        train(tiny_run(root, tmp_path / "run", policy=policy, dataset={"cache": "none"}))
    assert not (folder / "attacked").exists()


def test_a_checkpoint_on_the_hub_is_checked(folder, tmp_path, monkeypatch):
    add_step(folder, run_command(folder), "policy_postprocessor.json")
    requests = []

    def download(name, **options):
        requests.append((name, options.get("revision")))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UnsafeCheckpointError, match=r"policy_postprocessor\.json: .*Popen"):
        VegaPolicy.from_pretrained("ORG/NAME", revision="1" * 40)
    assert requests == [("ORG/NAME", "1" * 40)]
    assert not (folder / "attacked").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"class": "lerobot.processor.DeviceProcessorStep"}, r"'lerobot\.processor\.DeviceProcessorStep'"),
        ({"registry_name": "action_tokenizer_processor", "class": "x"}, "'action_tokenizer_processor'"),
        ({"registry_name": "reward_classifier_processor"}, "'reward_classifier_processor'"),
        ({"registry_name": ["device_processor"]}, "device_processor"),
        ({}, "got the step"),
        ("subprocess.Popen", "subprocess"),
        ({"registry_name": "normalizer_processor", "state_file": "../../x.safetensors"}, "state file in"),
        ({"registry_name": "normalizer_processor", "state_file": "/x.safetensors"}, "state file in"),
        ({"registry_name": "normalizer_processor", "state_file": ["x"]}, "state file in"),
    ],
)
def test_a_step_that_is_not_on_the_list_is_refused(folder, step, message):
    add_step(folder, step)
    with pytest.raises(UnsafeCheckpointError, match=message):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "vega_remote", "url": "ws://example.com", "token_file": "/etc/passwd"}, "token file"),
        ({"type": "groot"}, "got 'groot'"),
        ({"type": ["vega"]}, r"got \['vega'\]"),
        ({}, "got None"),
    ],
)
def test_a_policy_type_that_may_load_code_or_credentials_is_refused(folder, fields, message):
    set_type(folder, **fields)
    with pytest.raises(UnsafeCheckpointError, match=message):
        check_checkpoint(folder)


def test_lerobots_commands_do_not_connect_where_a_checkpoint_points_them(folder):
    set_type(folder, type="vega_remote", url="ws://127.0.0.1:1", token_file="/etc/hostname")
    config = PreTrainedConfig.from_pretrained(folder)
    assert isinstance(config, VegaRemoteConfig)
    config.pretrained_path = folder
    with pytest.raises(UnsafeCheckpointError, match=r"your own --policy\.url"):
        get_policy_class(config.type).from_pretrained(folder, config=config)


@pytest.mark.parametrize("content", [b"\xff{", b"", b"[" * 100_000])
def test_json_that_cannot_be_read_is_named(folder, content):
    (folder / "policy_preprocessor.json").write_bytes(content)
    write_checksums(folder)
    with pytest.raises(DamagedCheckpointError, match=r"policy_preprocessor\.json: expected JSON"):
        check_checkpoint(folder)


def test_an_export_of_a_checkpoint_publishes_no_file_that_a_link_in_it_points_to(folder, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "NOTICE").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(
        UnsafeCheckpointError, match=r"NOTICE: expected a file of the checkpoint, got a link to"
    ):
        export_policy(folder, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def make_pipe(path):
    os.mkfifo(path)


def make_dangling(path):
    path.symlink_to("nothing.json")


def make_loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [Path.mkdir, make_pipe, make_dangling, make_loop])
@pytest.mark.parametrize("name", ["policy_preprocessor.json", "more.json"])
def test_a_checkpoints_json_that_is_no_file_neither_blocks_nor_ends_in_a_traceback(folder, make, name):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(DamagedCheckpointError, match=rf"{name}"):
        check_checkpoint(folder)


def test_the_links_of_the_hubs_cache_are_files_of_the_checkpoint(folder, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    (blobs := snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    check_checkpoint(snapshot)


def test_files_that_lerobot_and_the_hub_put_beside_the_weights_and_an_edited_card_pass(folder):
    (folder / "train_config.json").write_text('{"steps": 100, "policy": {"type": "vega"}}')
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "README.md").write_text("edited")
    check_checkpoint(folder)
    assert VegaPolicy.from_pretrained(folder).config.type == "vega"


def test_what_lerobot_saves_of_our_policy_has_checksums_of_the_weights(tmp_path):
    VegaPolicy(tiny_config()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    with pytest.raises(DamagedCheckpointError, match=r"config\.json is altered"):
        VegaPolicy.from_pretrained(tmp_path)


def test_the_lists_name_what_lerobot_has():
    for module in ("pi0", "pi05", "smolvla", "xvla"):
        __import__(f"lerobot.policies.{module}.processor_{module}")
    assert set(ProcessorStepRegistry.list()) >= PROCESSOR_STEPS
    assert PreTrainedConfig.get_known_choices().keys() >= POLICY_TYPES


@pytest.mark.slow
def test_lerobot_eval_runs_nothing_of_a_checkpoint(folder, tmp_path):
    add_step(folder, run_command(folder))
    command = [Path(sys.executable).parent / "lerobot-eval", f"--policy.path={folder}", "--policy.device=cpu"]
    command += [
        "--env.type=vega_robosuite",
        "--env.task=lift_wide",
        "--env.frame_size=64",
        "--env.rendering=fast",
    ]
    command += ["--eval.batch_size=1", "--eval.n_episodes=1"]
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    output = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert output.returncode != 0
    assert "UnsafeCheckpointError" in output.stderr, output.stderr[-2000:]
    assert not (folder / "attacked").exists()
