"""The layout holds: no import cycle between packages, envs without models, and limits on size."""

import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("vega_policy", "envs")
MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES = 125, 750, 50
DATA_MODULES = (
    "vega_policy.run_dir",
    "vega_policy.config",
    "vega_policy.data.scenes",
)
"""Modules of vega_policy that envs may import: data types, configs and files, no models."""
METHOD = {
    f"vega_policy.{name}"
    for name in ("model", "backbones", "priors", "configuration_vega", "modeling_vega", "processor_vega")
}
"""One layer: the model builds backbones and priors, which share its config and layers; LeRobot's contract."""
PLUGIN = REPOSITORY / "vega_policy" / "lerobot_plugin" / "__init__.py"
"""LeRobot's plugin discovery imports it to register environments, so it imports envs."""


def source_files(*folders: str) -> list[Path]:
    """Return the tracked and the new Python files below folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--"]
    patterns = [f"{folder}/*.py" for folder in folders]
    listed = subprocess.run([*command, *patterns], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [REPOSITORY / name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """Yield all modules that a file imports; else those that importing it imports."""
    for node in walk(ast.parse(path.read_text()), inside_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if is_module(member) else str(node.module)


def walk(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    yield tree
    for node in ast.iter_child_nodes(tree):
        is_late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if inside_functions or not is_late:
            yield from walk(node, inside_functions)


def file_of(module: str) -> Path:
    path = REPOSITORY / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(module: str) -> set[str]:
    """Return all modules that importing one of ours imports: others' as they are named, ours to the end."""
    found: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        parents = [".".join(name.split(".")[: depth + 1]) for depth in range(name.count(".") + 1)]
        for one in [one for one in parents if one not in found]:
            found.add(one)
            if is_module(one):
                left += imported_modules(file_of(one), inside_functions=False)
    return found


def is_module(name: str) -> bool:
    path = REPOSITORY / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def package_of(module: str) -> str:
    """Return the sub-package of vega_policy or the module at its top level; envs is one package."""
    package = ".".join(module.split(".")[:2])
    return "envs" if module.split(".")[0] == "envs" else "the method" if package in METHOD else package


def import_graph() -> dict[str, dict[str, list[str]]]:
    """Return, by importing and imported package, the files that import."""
    graph: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in source_files(*PACKAGES):
        package = package_of(module_of(path))
        for module in imported_modules(path):
            imported = package_of(module)
            if module.split(".")[0] in PACKAGES and imported != package:
                graph[package][imported].append(str(path.relative_to(REPOSITORY)))
    return graph


def find_cycle(graph: dict[str, dict[str, list[str]]]) -> list[str]:
    """Return the packages of one cycle, the first one repeated at the end; empty if there is none."""
    done: set[str] = set()

    def visit(package: str, trail: list[str]) -> list[str]:
        if package in trail:
            return [*trail[trail.index(package) :], package]
        if package not in done:
            for imported in sorted(graph.get(package, {})):
                if cycle := visit(imported, [*trail, package]):
                    return cycle
            done.add(package)
        return []

    for package in sorted(graph):
        if cycle := visit(package, []):
            return cycle
    return []


def test_a_cycle_is_found():
    graph = {"a": {"b": ["a.py"]}, "b": {"c": ["b.py"], "d": ["b.py"]}, "c": {}, "d": {"b": ["d.py"]}}
    assert find_cycle(graph) == ["b", "d", "b"]
    assert find_cycle({"a": {"b": ["a.py"], "c": ["a.py"]}, "b": {"c": ["b.py"]}}) == []


def test_packages_do_not_import_each_other_in_a_cycle():
    graph = import_graph()
    cycle = find_cycle(graph)
    steps = [
        f"{one} -> {other} in {', '.join(sorted(set(graph[one][other])))}" for one, other in pairwise(cycle)
    ]
    assert not cycle, "; ".join(steps)


def test_envs_imports_data_types_of_vega_policy_only():
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {module}"
        for path in source_files("envs")
        for module in imported_modules(path)
        if module.split(".")[0] == "vega_policy" and module not in DATA_MODULES
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["vega_policy.data.video", "vega_policy.data.loader"])
def test_processes_that_decode_videos_import_no_models(module):
    """Nor libav, before they decode: pre-training reads no videos and runs without it."""
    roots = {imported.split(".")[0] for imported in imports_of(module)}
    assert "torch" in roots
    assert not roots & {"av", "timm", "transformers", "diffusers", "lerobot"}


def test_vega_policy_imports_envs_and_scripts_by_name_only():
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {module}"
        for path in source_files("vega_policy")
        for module in imported_modules(path)
        if module.split(".")[0] in ("envs", "scripts") and path != PLUGIN
    ]
    assert wrong == []


def test_the_method_and_its_cached_batches_import_no_lerobot():
    files = source_files(*(f"vega_policy/{package}" for package in ("model", "priors", "backbones")))
    files += [REPOSITORY / "vega_policy" / "data" / name for name in ("loader.py", "feature_cache.py")]
    for path in files:
        assert "lerobot" not in imports_of(module_of(path)), path
    assert "lerobot" in imports_of("vega_policy.modeling_vega")
    assert {"torch", "vega_policy.model.fusion"} <= imports_of("vega_policy.model.vega")


def test_there_are_few_files():
    assert len(source_files(*PACKAGES, "scripts")) <= MAX_FILES


@pytest.mark.parametrize("folder", [*PACKAGES, "scripts"])
def test_files_and_functions_are_short(folder):
    long = []
    for path in source_files(folder):
        text, name = path.read_text(), path.relative_to(REPOSITORY)
        if (count := len(text.splitlines())) > MAX_LINES:
            long.append(f"{name}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno} {node.name}: {count} lines")
    assert long == []
