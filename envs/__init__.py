"""Simulators: one module a family, found by the name of a suite; importing this imports no simulator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.base import ManipulationEnv, Task

PRO_BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
LIBERO_SUITES = (*PRO_BASES, "libero_90")

FAMILIES = {
    "envs.robosuite": ("robosuite", "lift", "lift_wide", "stack", "pick_place_can", "nut_assembly_square"),
    "envs.libero": (
        *LIBERO_SUITES,
        *(f"{suite}_{variant}" for suite in PRO_BASES for variant in ("lan", "object", "swap", "task")),
    ),
    "envs.metaworld": (
        "metaworld_mt10",
        "metaworld_mt50",
        "metaworld_easy",
        "metaworld_medium",
        "metaworld_hard",
        "metaworld_very_hard",
    ),
    "envs.so101": ("so101_pick_cube",),
}
"""Module of each family -> the suites it offers. A module has `tasks(suite)` and `make(task, ...)`."""


def suite_names() -> list[str]:
    """Return every suite's name."""
    return [name for names in FAMILIES.values() for name in names]


def tasks(suite: str) -> list[Task]:
    """Return the tasks of a suite; for an unknown one, a ValueError lists similar names."""
    return importlib.import_module(_family(suite)).tasks(suite)


def make(
    suite: str, task_index: int, *, frame_size: int = 256, rendering: str = "full", render: bool = True
) -> ManipulationEnv:
    """Build the environment of a task, `task_index` of `suite`, with square frames of `frame_size` pixels.

    `rendering` is the profile "full" or "fast" (see `envs.rendering`); `render=False` builds no cameras.

    Raises:
        ValueError: If the suite, the task or the profile does not exist.
        RuntimeError: If the simulator cannot run here (see `envs.rendering.load_mujoco`).
    """
    known = tasks(suite)
    if not 0 <= task_index < len(known):
        names = ", ".join(f"{task.index} {task.name}" for task in known)
        raise ValueError(f"suite {suite!r} has no task {task_index}; its tasks are: {names}")
    family = importlib.import_module(_family(suite))
    return family.make(known[task_index], frame_size=frame_size, rendering=rendering, render=render)


def __getattr__(name: str) -> Any:
    """Return the simulated robot's class: LeRobot looks for it in the package that holds its options."""
    if name == "VegaSim":
        from envs.sim_robot import VegaSim

        return VegaSim
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _family(suite: str) -> str:
    for module, names in FAMILIES.items():
        if suite in names:
            return module
    from vega_policy.config import unknown_name  # needed by an error alone

    raise unknown_name("suite", suite, suite_names(), near=5)
