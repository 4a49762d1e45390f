"""A simulator small enough for tests.

A point has to be moved to a goal that only the camera shows. Worker processes import this file by name.
"""

import random
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

CAMERA = "observation.images.image"
REACH = 0.12
STEP = 0.15
HORIZON = 9


@dataclass(frozen=True)
class Task:
    suite: str
    index: int
    name: str
    instruction: str
    horizon: int
    official_states: int = 0
    group: str = ""


def tasks(suite):
    names = ("near", "far") if suite == "two_points" else (suite,)
    return [Task(suite, index, name, f"go to the {name} goal", HORIZON) for index, name in enumerate(names)]


def prompts(suite, axis, strength):
    if axis not in ("light", "layout"):
        raise ValueError(f"perturbation: expected one of light, layout; got {axis!r}.")
    return [task.instruction for task in tasks(suite)]


class PointWorld:
    """State [point 2, goal 2]; frames show the goal as one bright pixel; the state shows the point alone."""

    def __init__(self, task, *, frame_size, render):
        self.task, self.task_description = task, task.instruction
        self.action_space = SimpleNamespace(shape=(2,))
        self._size, self._render, self._steps = frame_size, render, 0
        self._point, self._goal = np.zeros(2), np.zeros(2)

    def reset(self, *, seed=None, options=None):
        rng = np.random.default_rng((seed, self.task.index, (options or {}).get("initial_state", 0)))
        self._steps, self._point = 0, rng.uniform(-0.2, 0.2, 2)
        self._goal = rng.uniform(-1, 1, 2) * (1.0 if self.task.name == "far" else 0.7)
        if (options or {}).get("perturbation") == "layout":
            self._goal = self._goal.clip(-0.5, 0.5) + 0.5 * options["perturbation_strength"]
        return self.observe(), {"is_success": False}

    def step_blindly(self, action):
        self._steps += 1
        self._point = self._point + STEP * np.clip(action.astype(np.float64), -1, 1)
        if self.task.suite == "crash" and self._steps == 5:
            raise RuntimeError("the solver diverged")
        return self.reached() and self.task.suite != "stubborn", self._steps >= self.task.horizon

    def reached(self):
        return bool(np.linalg.norm(self._point - self._goal) < REACH)

    def observe(self):
        observation = {"agent_pos": self._point.astype(np.float32)}
        return {**observation, "pixels": {"image": self.render()}} if self._render else observation

    def render(self):
        if not self._render:
            raise RuntimeError("rendered although render=False")
        frame = np.zeros((self._size, self._size, 3), np.uint8)
        column, row = ((self._goal + 1) / 2 * (self._size - 1)).round().astype(int)
        frame[row, column] = 255
        return frame

    def simulator_state(self):
        return np.concatenate([self._point, self._goal])

    def restore(self, state):
        self._point, self._goal = state[:2].copy(), state[2:].copy()

    def close(self):
        self._render = False


def make(suite, task_index, *, frame_size, rendering, render):
    return PointWorld(tasks(suite)[task_index], frame_size=frame_size, render=render)


def make_without_torch(suite, task_index, **arguments):
    heavy = sorted({"torch", "lerobot", "vega_policy"} & set(sys.modules))
    if heavy:
        raise RuntimeError(f"a simulator process imported {heavy}")
    return make(suite, task_index, **arguments)


def make_with_delays(suite, task_index, **arguments):
    """Make a simulator whose steps take random times that differ from one run to the next."""
    env = make(suite, task_index, **arguments)
    step = env.step_blindly

    def delayed(action):
        time.sleep(random.SystemRandom().uniform(0, 0.004))
        return step(action)

    env.step_blindly = delayed
    return env
