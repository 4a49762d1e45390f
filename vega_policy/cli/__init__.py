"""Console commands: Hydra overrides, positional arguments, one-line errors, and generated config groups.

A prior, a fusion or a suite is registered in one place of the code. Its command-line option (`prior`,
`fusion`, `base`, `env`, `scenes`, `dataset`) follows from there, with the defaults of the frozen dataclasses.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vega_policy import resource
from vega_policy.analysis import SceneSettings
from vega_policy.config import is_own_error
from vega_policy.model.config import BASES, FUSIONS, BaseConfig, FusionConfig, PriorConfig
from vega_policy.priors import PRIORS

logger = logging.getLogger(__name__)

SEARCH_PATH_OPTIONS = ("--config-dir", "-cd", "--config-path", "-cp", "hydra.searchpath")
"""Arguments that add config folders; only Hydra knows the options there."""

MISTAKES = (ValueError, OSError, RuntimeError, ImportError, FloatingPointError)
"""Errors whose message suffices; `hydra.verbose=true` shows where they were raised."""


@dataclass(frozen=True)
class Command:
    """A command line; as a decorator `@partial(Command, config=...)` it wraps its function."""

    # Runs the command with the composed config and returns what is printed at the end; its docstring starts
    # the text of `--help`.
    run: Callable[[DictConfig], str | None]
    config: str  # name of the root config, in configs/ or of `fields`
    examples: Sequence[str] = ()  # lines of `--help` that can be copied
    # YAML text of the root config where no file in configs/ holds it; a comment behind each field.
    fields: str | None = None
    # Fields that arguments without `=` fill in this order; a name that ends in `...` takes all further ones
    # as a list.
    positional: Sequence[str] = ()
    optional: Sequence[str] = ()  # fields without a default that the command does without

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Compose the config of a command line, the program's own by default, and run."""
        given = list(sys.argv[1:] if arguments is None else arguments)
        sys.argv[1:] = with_quoted_text(with_positional(given, self.positional))
        refuse_unknown_options(sys.argv[1:])
        self.register()
        self._refuse_unknown_fields(sys.argv[1:])
        if {"--help", "-h"} & {*given}:
            print(self.help([word for word in sys.argv[1:] if not word.startswith("-")]))  # noqa: T201
            return
        hydra.main(version_base=None, config_path=str(resource("configs")), config_name=self.config)(
            self._run
        )()

    def help(self, overrides: Sequence[str] = ()) -> str:
        """Return the text of `--help`: examples, options of the groups, and fields with their values.

        Hydra's own help composes once an option, which takes seconds.
        """
        with hydra.initialize_config_dir(str(resource("configs")), version_base=None):
            config = hydra.compose(self.config, list(overrides), return_hydra_config=True)
        choices = OmegaConf.to_container(config.hydra.runtime.choices)
        assert isinstance(choices, dict)
        groups = sorted(str(name) for name in choices if not str(name).startswith("hydra/"))
        OmegaConf.set_struct(config, False)
        del config.hydra
        lines = [inspect.getdoc(self.run) or "", "", *(f"  {line}" for line in self.examples)]
        if groups:
            lines += ["", "== Groups: NAME=OPTION =="]
            lines += [f"{name}: {', '.join(group_options(name))}" for name in groups]
        lines += [
            "",
            "== Fields: NAME=VALUE (with the values of this command line) ==",
            annotate(OmegaConf.to_yaml(config), self.comments(choices)),
        ]
        return "\n".join(lines)

    @property
    def node(self) -> dict[str, Any]:
        """The fields of the root config with their defaults, without what groups add."""
        node = OmegaConf.to_container(OmegaConf.create(self._text))
        assert isinstance(node, dict)
        return {str(key): value for key, value in node.items()}

    def comments(self, choices: Mapping[Any, Any]) -> dict[str, str]:
        """Return the comments of the fields by dotted path, with those of the chosen options (by group)."""
        found = _comments_of(self._text)
        for group, option in choices.items():
            for name, comment in _option_comments(group, option).items():
                found.setdefault(f"{group}.{name}", comment)
        return found

    @property
    def _text(self) -> str:
        """YAML text of the root config."""
        if self.fields is not None:
            return self.fields
        return (resource("configs") / f"{self.config}.yaml").read_text()

    def _refuse_unknown_fields(self, arguments: Sequence[str]) -> None:
        """End the program if a field has no such name, as in `priro=none`; Hydra would suggest to add it."""
        if any(argument.startswith((*SEARCH_PATH_OPTIONS, "--config-name", "-cn")) for argument in arguments):
            return
        fields = self.node
        groups = [key for entry in fields.pop("defaults", ()) if isinstance(entry, dict) for key in entry]
        known = sorted({*fields, *groups, *generated_groups(), "hydra"})
        for override in _overrides(arguments):
            name = override.key_or_group.partition(".")[0]
            if override.is_add() or override.is_delete() or "/" in name or name in known:
                continue
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}={override.get_value_element_as_str()}?" if near else ""
            sys.exit(f"There is no field {name}.{hint} Known: {', '.join(known)}.")

    def register(self) -> None:
        """Store the generated options and, where no YAML file holds it, the root config."""
        register_groups()
        if self.fields is not None:
            node = self.node
            node["defaults"] = ["command", *node.get("defaults", ()), "_self_"]
            ConfigStore.instance().store(name=self.config, node=node)

    def _run(self, config: DictConfig) -> None:
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        try:
            refuse_missing_fields(config, self.optional)
            check_cache_folders()
            message = self.run(config)
        except KeyboardInterrupt:
            sys.exit("Interrupted. The same command resumes from what is finished.")
        except MISTAKES as error:
            if isinstance(error, RuntimeError) and not is_own_error(error):
                raise  # an error of torch, say: only its traceback tells where it comes from
            logger.debug("Raised here:", exc_info=True)
            text = f"{type(error).__name__}: {error}"
            if not sweep:
                sys.exit(text)
            logger.error("%s", text)  # other jobs of a sweep go on; its table marks this one as failed
            return
        if message:
            try:
                print(message, flush=True)  # noqa: T201
            except BrokenPipeError:  # as of `| head`; Python would fail again when it flushes at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def annotate(text: str, comments: Mapping[str, str]) -> str:
    """Append to the lines of a YAML text the comments of their fields, given by dotted path."""
    lines = []
    for path, line in _paths(text):
        comment = comments.get(path) if path else None
        lines.append(f"{line}  # {comment}" if comment else line)
    return "\n".join(lines)


def _comments_of(text: str) -> dict[str, str]:
    """Return the comments behind the fields of a YAML text by dotted path."""
    found = {}
    for path, line in _paths(text):
        _, mark, comment = line.partition(" # ")
        if path and mark:
            found[path] = comment.strip()
    return found


def _option_comments(group: str, option: str) -> dict[str, str]:
    """Return the comments of an option's fields: of its file, its base files and its dataclass."""
    file = resource("configs") / group / f"{option}.yaml"
    text = file.read_text() if file.is_file() else ""
    node = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(node, dict)
    bases = (node or generated_groups().get(group, {}).get(option, {})).get("defaults", ())
    found = _comments_of(text) | OPTION_COMMENTS.get(group, {})
    if group in DATACLASSES:
        found |= _dataclass_comments(DATACLASSES[group])
    for base in bases:
        if isinstance(base, str) and base != "_self_":
            found = _option_comments(group, base) | found
    return found


def _dataclass_comments(cls: type) -> dict[str, str]:
    """Return the comments of a dataclass's fields in its source: behind a field, else in the lines above."""
    found, above = {}, []
    for line in inspect.getsource(cls).splitlines():
        code, mark, comment = line.partition("# ")
        if (field := re.match(r"    (\w+): ", code)) and (mark or above):
            text = comment if mark else " ".join(above)
            found[field[1]] = re.sub(r"\b(None|True|False)\b", lambda word: YAML_WORDS[word[0]], text)
        above = [*above, comment] if mark and not code.strip() else []
    return found


YAML_WORDS = {"None": "null", "True": "true", "False": "false"}


def _paths(text: str) -> Iterator[tuple[str | None, str]]:
    """Yield each line of a YAML text of nested mappings with the dotted path of its field, None without."""
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        key, colon, _ = line.strip().partition(":")
        if not colon or key.startswith(("#", "-")) or " " in key:
            yield None, line
            continue
        indent = len(line) - len(line.lstrip())
        stack = [(depth, name) for depth, name in stack if depth < indent] + [(indent, key)]
        yield ".".join(name for _, name in stack), line


def check_cache_folders() -> None:
    """Refuse variables that name cache folders which cannot exist; libraries fail of them when imported.

    Raises:
        ValueError: Names the variable.
    """
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_LEROBOT_HOME", "TORCH_HOME"):
        folder = os.environ.get(name)
        try:
            if folder:
                Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                continue  # then nothing is cached, which is no error
            raise ValueError(
                f"{name}: expected a folder that exists or can be made, got {folder} ({error.strerror}). "
                f"Give another folder, or unset {name}."
            ) from error


def with_positional(arguments: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Turn arguments without `=` into overrides of the given fields, in order.

    Raises:
        SystemExit: If there are more such arguments than fields.
    """
    overrides, values = [], []
    for argument in arguments:
        is_value = fields and "=" not in argument and not argument.startswith(("-", "~", "+"))
        (values if is_value else overrides).append(argument)
    for index, field in enumerate(fields):
        if field.endswith("...") and values:
            quoted = ",".join(_quoted(value) for value in values)
            return [f"{field[:-3]}=[{quoted}]", *overrides]
        if index < len(values) and not field.endswith("..."):
            overrides.insert(0, f"{field}={_quoted(values[index])}")
    if len(values) > len(fields):
        sys.exit(f"expected at most {len(fields)} arguments without '=' ({', '.join(fields)}); got {values}")
    return overrides


def with_quoted_text(arguments: Sequence[str]) -> list[str]:
    """Quote values that Hydra's grammar does not read bare: instructions in other scripts, "don't"."""
    return [
        f"{name}={_quoted(value)}"
        if equals and value[:1] not in ("[", "{", "'", '"') and not _overrides([argument])
        else argument
        for argument in arguments
        for name, equals, value in (argument.partition("="),)
    ]


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def refuse_missing_fields(config: DictConfig, optional: Sequence[str] = ()) -> None:
    """End the program if a field without a default, such as an evaluation's checkpoint, has no value.

    Those that are `optional` may have none.

    Raises:
        SystemExit: With the message.
    """
    missing = sorted(set(OmegaConf.missing_keys(config)) - set(optional))
    if OmegaConf.select(config, "dataset.mixture") and "dataset.repo_id" in missing:
        missing.remove("dataset.repo_id")  # the entries name their datasets
    if missing:
        fields = " ".join(f"{name}=..." for name in missing)
        sys.exit(
            f"No value for {', '.join(missing)}. Add {fields} to the command line; --help describes them."
        )


def refuse_unknown_options(arguments: Sequence[str]) -> None:
    """End the program if a group has no such option, as in `env=libero_spatail`; lists near ones first.

    Raises:
        SystemExit: With the message.
    """
    if any(argument.startswith(SEARCH_PATH_OPTIONS) for argument in arguments):
        return
    problems = [problem for override in _overrides(arguments) for problem in _unknown(override)]
    if problems:
        sys.exit("\n".join(problems))


def group_options(group: str) -> list[str]:
    """Return the options of a config group: files in configs/ and generated ones."""
    files = (path.stem for path in (resource("configs") / group).glob("*.yaml"))
    return sorted({*files, *generated_groups().get(group, {})})


def _overrides(arguments: Sequence[str]) -> list[Override]:
    """Return what Hydra's own parser accepts; Hydra reports the rest."""
    parser, parsed = OverridesParser.create(), []
    for argument in arguments:
        try:
            parsed += parser.parse_overrides([argument])
        except OverrideParseException:
            continue
    return parsed


def _unknown(override: Override) -> list[str]:
    group = override.key_or_group
    options = group_options(group) if "." not in group and not group.startswith("hydra") else []
    if override.is_delete() or not options:
        return []
    value = override.value()
    if isinstance(value, ChoiceSweep):
        value = value.list
    values = value if isinstance(value, list) else [value]
    names = [name for name in values if isinstance(name, str) and name != "null"]
    return [_message(group, name, options) for name in names if name not in options]


def _message(group: str, name: str, options: list[str]) -> str:
    near = difflib.get_close_matches(name, options, n=5, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'{group}={one}' for one in near)}? " if near else ""
    return f"there is no {group}={name}; {hint}The group {group} has: {', '.join(options)}"


Options = dict[str, dict[str, Any]]

SCENE_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "lift_wide")


INFERENCE: Options = {
    "sync": {"type": "sync"},
    "async": {"type": "rtc", "queue_threshold": 10, "rtc": {"enabled": False}},
    "rtc": {
        "type": "rtc",
        "queue_threshold": 10,  # predict the next chunk when at most 10 actions are left
        "rtc": {
            "execution_horizon": 10,  # 10 of the actions left guide the next chunk
            "max_guidance_weight": 10.0,
        },
    },
}
"""How a robot gets its next chunk, in LeRobot's terms; docs/deploy.md says what each does."""

DATACLASSES = {"prior": PriorConfig, "fusion": FusionConfig, "base": BaseConfig, "scenes": SceneSettings}
"""Groups whose options have the fields of a dataclass."""

OPTION_COMMENTS = {
    "env": {
        "suite": "suite of tasks: the option's name",
        "frame_size": "height and width of a frame in pixels",
        "rendering": "profile of the renderer: full, or fast (no shadows, reflections or anti-aliasing)",
    },
    "inference": {
        "type": "LeRobot's engine: sync, or rtc, which predicts while the last chunk is executed",
        "queue_threshold": "the next chunk is predicted when at most this number of actions is left",
        "rtc.enabled": "the next chunk continues the last one",
        "rtc.execution_horizon": "actions of the last chunk that guide the next one",
        "rtc.max_guidance_weight": "largest weight of that guidance",
    },
}
"""Comments of the fields of other generated options."""


def register_groups() -> None:
    """Store all generated options in Hydra's ConfigStore, and the settings that every command shares."""
    store = ConfigStore.instance()
    # no folder and no log file of Hydra's own
    shared = {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False}}
    defaults = [{"override hydra/job_logging": "stdout"}]
    store.store(name="command", node={"defaults": defaults, "hydra": shared}, package="_global_")
    for group, options in generated_groups().items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node, provider="vega_policy")


def generated_groups() -> dict[str, Options]:
    """Return group -> option -> plain values."""
    return {
        "prior": {name: _fields(PriorConfig(name=name)) for name in ("none", *PRIORS)},
        "fusion": {name: asdict(FusionConfig(name=name)) for name in FUSIONS},
        "base": {name: _fields(BaseConfig(name=name)) for name in ("none", *BASES)},
        "env": dict(_environments()),
        "scenes": _scenes(),
        "dataset": dict(_demonstrations()),
        "inference": INFERENCE,
    }


def _environments() -> Iterator[tuple[str, dict[str, Any]]]:
    families: dict[str, tuple[str, ...]] = import_module("envs").FAMILIES
    for family, suites in families.items():
        # Published numbers of LIBERO and Meta-World are of 256 pixels; the others have none.
        published = family in ("envs.libero", "envs.metaworld")
        size, rendering = (256, "full") if published else (128, "fast")
        for suite in suites:
            yield suite, {"suite": suite, "frame_size": size, "rendering": rendering}


def _demonstrations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the datasets that collect_demos.py writes; other fields are those of dataset/lerobot.yaml."""
    envs = import_module("envs")
    single_task = {*envs.FAMILIES["envs.robosuite"], *envs.FAMILIES["envs.so101"]} - {"robosuite"}
    for suite in envs.suite_names():
        root, command = f"outputs/demonstrations/{suite}", f"python scripts/collect_demos.py env={suite}"
        node = {"repo_id": f"vega/{suite}", "root": root, "collect_command": command}
        if suite in single_task:
            node["cache"] = "ram"
        yield suite, {"defaults": ["lerobot", "_self_"], **node}


def _scenes() -> Options:
    options = {name: asdict(SceneSettings(name=name, suite=name)) for name in SCENE_SUITES}
    options["lift_wide"]["tasks"] = [0]
    options["folder"] = {"name": "folder", "suite": None, "folders": "???", "views": 32}
    return options


def _fields(config: PriorConfig | BaseConfig) -> dict[str, Any]:
    node = asdict(config)
    del node["fingerprint"]  # follows from the weights
    return node
