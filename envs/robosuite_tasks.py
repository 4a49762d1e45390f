"""robosuite's tasks with a Panda arm, OSC_POSE control at 20 Hz, and two cameras."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from envs.base import Task, global_seed
from envs.panda import PandaEnv, load_robosuite

COMPILE_SEED = 0  # Lift draws its cube's edge (40 to 44 mm) when it is compiled: one cube for all episodes


@dataclass(frozen=True)
class RobosuiteTask:
    """One entry of the table.

    Attributes:
        environment: Name of robosuite's environment class.
        instruction: What a person would say to the robot.
        horizon: Steps of control before an episode is cut: about twice what the demonstrator needs.
        cube_range: Half-width in metres of the square about the table's centre in which the cube starts, with
            any yaw; None leaves the placement to robosuite.
        options: Further arguments of robosuite's environment.
    """

    environment: str
    instruction: str
    horizon: int
    cube_range: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


TASKS = {
    "lift": RobosuiteTask("Lift", "lift the red cube", 100),
    "lift_wide": RobosuiteTask("Lift", "lift the red cube", 100, cube_range=0.10),
    "stack": RobosuiteTask("Stack", "stack the red cube on the green cube", 160),
    "pick_place_can": RobosuiteTask("PickPlaceCan", "put the can into its bin", 320),
    "nut_assembly_square": RobosuiteTask("NutAssemblySquare", "put the square nut on the square peg", 360),
}


def tasks(suite: str) -> list[Task]:
    """List the tasks of suite "robosuite", or of a suite of one named after its task."""
    names = list(TASKS) if suite == "robosuite" else [suite]
    return [
        Task(suite, index, name, TASKS[name].instruction, TASKS[name].horizon)
        for index, name in enumerate(names)
    ]


def make(task: Task, *, frame_size: int, rendering: str, render: bool) -> RobosuiteEnv:
    """Build the environment of a task; see `envs.make`."""
    return RobosuiteEnv(task, frame_size=frame_size, rendering=rendering, render=render)


class RobosuiteEnv(PandaEnv):
    """A robosuite task whose episodes depend on their seed alone.

    A soft reset takes 1 ms instead of 300 ms; what it leaves of the episode before (the gripper's command) is
    cleared here.
    """

    def _compile(self) -> Any:
        with global_seed(COMPILE_SEED):
            return _compile(TASKS[self.task.name])

    def _reset_simulator(self, seed: int, options: dict[str, Any]) -> None:
        if "initial_state" in options:
            raise ValueError(
                f"{self.task.name} has no official initial states (asked for {options['initial_state']!r}); "
                "choose its episodes by seed"
            )
        self._gripper.current_action = np.zeros_like(self._gripper.current_action)
        with global_seed(seed):
            self._raw.reset()
        self._resumes = False


def _compile(entry: RobosuiteTask) -> Any:
    robosuite = load_robosuite()
    options = dict(entry.options)
    if entry.cube_range is not None:
        options["placement_initializer"] = _cube_placement(entry.cube_range)
    return robosuite.make(
        entry.environment,
        robots="Panda",
        controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
        control_freq=20,
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        use_object_obs=False,
        ignore_done=True,
        **options,
    )


def _cube_placement(half_width: float) -> Any:
    from robosuite.utils.placement_samplers import UniformRandomSampler

    return UniformRandomSampler(
        name="ObjectSampler",
        x_range=(-half_width, half_width),
        y_range=(-half_width, half_width),
        rotation=None,  # any yaw
        ensure_object_boundary_in_range=False,
        ensure_valid_placement=True,
        reference_pos=(0.0, 0.0, 0.8),  # the table's centre in Lift
        z_offset=0.01,
    )
