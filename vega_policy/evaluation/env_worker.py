"""The worker process: one simulator, which begins episodes and executes chunks of actions on request.

It runs as a file (`python env_worker.py SOCKET MEMORY`), not as a module of the package: `import vega_policy`
brings torch and LeRobot, which a simulator does not need and which would cost every worker seconds. So this
file imports the standard library and numpy alone, and all that is sent consists of their types.
Frames of observations are written into memory that both processes map.

Frames that the policy does not read are never rendered: an environment executes its actions without observing
and observes once, after the last.
"""

from __future__ import annotations

import hashlib
import importlib
import mmap
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NotRequired, TypedDict

import numpy as np

Commands = Sequence[np.ndarray | None] | np.ndarray
"""Actions [t a] of an episode; None is a step without a command."""


class EpisodeSpec(TypedDict):
    """The episode to run: task, seed of the reset, and where it starts."""

    suite: str
    task_index: int
    seed: int
    initial_state: int | None  # index of an official initial state; None: the seed alone decides
    options: NotRequired[dict[str, Any]]  # further ones of the reset, such as its perturbation
    start: NotRequired[np.ndarray]  # simulator state float64 [n] that replaces the one after the reset


class EnvObservation(TypedDict):
    """What the policy may observe."""

    frames: dict[str, np.ndarray]  # camera -> uint8 [h w 3], [t h w 3] with a history; empty if unrendered
    state: np.ndarray  # float32 [s]
    instruction: str
    action_size: int


class Outcome(TypedDict):
    """How an episode ended."""

    success: bool
    length: int
    initial_hash: str
    final_hash: str
    states: np.ndarray | None  # float64 [length + 1, n], if the pool was opened to keep them


class EnvReport(TypedDict):
    """Outcome of the episode if it ended, else its observation."""

    outcome: Outcome | None
    observation: EnvObservation | None
    shapes: NotRequired[dict[str, tuple[int, ...]]]  # of the frames, which then are in the shared memory


MEMORY_BYTES = 1 << 30
"""Size of the file that both processes map; only what frames fill takes memory."""


def map_frames(memory: mmap.mmap, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return uint8 arrays in the memory, one after the other."""
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()], dtype=int)
    return {
        camera: np.ndarray(shape, np.uint8, memory, int(end - np.prod(shape)))
        for (camera, shape), end in zip(shapes.items(), ends, strict=True)
    }


def resolve(path: str) -> Callable[..., Any]:
    """Return the function that a dotted path such as `envs.make` names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def state_hash(state: np.ndarray) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a simulator state."""
    return hashlib.sha256(np.ascontiguousarray(state, dtype=np.float64).tobytes()).hexdigest()[:16]


class TaskEnv:
    """An environment of one task after another, rebuilt only when the task changes."""

    def __init__(self, make: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._make = make
        self._arguments = arguments
        self._task: tuple[str, int] | None = None
        self.environment: Any = None

    def build(self, suite: str, task_index: int) -> None:
        """Build the environment of a task unless it is there."""
        if (suite, task_index) != self._task:
            self.close()
            self.environment = self._make(suite, task_index, **self._arguments)
            self._task = (suite, task_index)

    def begin(self, spec: EpisodeSpec) -> Any:
        """Start an episode and return its first observation."""
        self.build(spec["suite"], spec["task_index"])
        official = spec["initial_state"]
        options: dict[str, Any] = {} if official is None else {"initial_state": official}
        options |= spec.get("options", {})
        observation = self.environment.reset(seed=spec["seed"], options=options)[0]
        if "start" not in spec:
            return observation
        self.environment.restore(spec["start"])
        return self.environment.observe()

    def close(self) -> None:
        """Close the environment, and with it its rendering context."""
        if self.environment is not None:
            self.environment.close()
        self.environment, self._task = None, None


class EnvRunner:
    """Runs one episode after another in one environment."""

    def __init__(self, env: TaskEnv, *, keep_states: bool, history: int = 1) -> None:
        self.env = env
        self.keep_states = keep_states
        self.history = history
        self._past: deque[dict[str, np.ndarray]] = deque()
        self._last: np.ndarray | None = None  # the last executed action
        self._length = 0
        self._initial_hash = ""
        self._states: list[np.ndarray] = []

    def begin(self, spec: EpisodeSpec) -> EnvReport:
        """Start an episode and observe."""
        observation = self.env.begin(spec)
        # The frames before the start are the first frame, as LeRobot's dataset pads a clip.
        self._past = deque(maxlen=self.history)
        for _ in range(self.history - 1):
            self._remember(observation)
        state = self.env.environment.simulator_state()
        self._last, self._length, self._initial_hash = None, 0, state_hash(state)
        self._states = [state] if self.keep_states else []
        return {"outcome": None, "observation": self._observation(observation)}

    def execute(self, actions: Commands) -> EnvReport:
        """Execute actions [t a] until success or truncation; observe if the episode goes on.

        The environment holds still where an action is None.
        """
        outcome = self._execute(actions)
        observation = self._observation(self.env.environment.observe()) if outcome is None else None
        return {"outcome": outcome, "observation": observation}

    def _execute(self, actions: Commands) -> Outcome | None:
        environment = self.env.environment
        for step, action in enumerate(actions, start=1):
            self._last = environment.holding_action(self._last) if action is None else action
            success, truncated = environment.step_blindly(self._last)
            self._length += 1
            if self.keep_states:
                self._states.append(environment.simulator_state())
            if success or truncated:
                return {
                    "success": bool(success),
                    "length": self._length,
                    "initial_hash": self._initial_hash,
                    "final_hash": state_hash(environment.simulator_state()),
                    "states": np.stack(self._states) if self.keep_states else None,
                }
            if 0 < len(actions) - step < self.history:  # the frame after the last is added by `_observation`
                self._remember(environment.observe())
        return None

    def _remember(self, observation: dict[str, Any]) -> None:
        """Keep a copy of the frames: a simulator may render the next ones into the same memory."""
        pixels = observation.get("pixels", {})
        self._past.append({camera: frame.copy() for camera, frame in pixels.items()})

    def _observation(self, observation: dict[str, Any]) -> EnvObservation:
        environment = self.env.environment
        frames = dict(observation.get("pixels", {}))
        if self.history > 1:
            self._remember(observation)
            frames = {camera: np.stack([past[camera] for past in self._past]) for camera in frames}
        return {
            "frames": frames,
            "state": np.asarray(observation["agent_pos"], dtype=np.float32),
            "instruction": environment.task_description,
            "action_size": environment.action_space.shape[0],
        }


class Worker:
    """The simulator of this process; its public methods are the requests of the pool."""

    def __init__(self, make: Callable[..., Any], memory: mmap.mmap) -> None:
        self._make = make
        self._memory = memory
        self._arguments: dict[str, Any] = {}
        self._runner = EnvRunner(TaskEnv(make, {}), keep_states=False)
        self._renderer: tuple[dict[str, Any], TaskEnv] | None = None

    def open(self, arguments: dict[str, Any], keep_states: bool, history: int) -> None:
        """Set how environments are made and observed; one that was made with other arguments is closed."""
        if arguments != self._arguments:
            self.close()
            self._arguments = arguments
            self._runner = EnvRunner(TaskEnv(self._make, arguments), keep_states=keep_states)
        self._runner.keep_states, self._runner.history = keep_states, history

    def build(self, suite: str, task_index: int) -> None:
        """Build the environment of the task that runs first."""
        self._runner.env.build(suite, task_index)

    def begin(self, spec: EpisodeSpec) -> EnvReport:
        """Start an episode and observe."""
        return self._share(self._runner.begin(spec))

    def execute(self, actions: Commands) -> EnvReport:
        """Execute actions [t a] of the running episode, None to hold still."""
        return self._share(self._runner.execute(actions))

    def replay(self, spec: EpisodeSpec, actions: np.ndarray) -> bool:
        """Return whether an episode of known actions [t a] is a success."""
        self._runner.begin(spec)
        outcome = self._runner.execute(actions)["outcome"]
        return outcome is not None and outcome["success"]

    def render(self, spec: EpisodeSpec, states: np.ndarray | None, arguments: dict[str, Any]) -> np.ndarray:
        """Render states [t n] of an episode, or its start alone, uint8 [t h w 3]."""
        if self._renderer is None or self._renderer[0] != arguments:
            self._renderer = (arguments, TaskEnv(self._make, arguments))
        env = self._renderer[1]
        # A state does not contain all that a reset draws: LIBERO draws the poses of fixtures there.
        env.begin(spec)
        if states is None:
            return env.environment.render()[None]
        frames = []
        for state in states:
            env.environment.restore(state)
            frames.append(env.environment.render())
        return np.stack(frames)

    def close(self) -> None:
        """Close every environment."""
        self._runner.env.close()
        if self._renderer is not None:
            self._renderer[1].close()
        self._renderer = None

    def _share(self, report: EnvReport) -> EnvReport:
        """Move the frames of an observation into the shared memory."""
        if (observation := report["observation"]) is not None:
            shapes = {camera: frame.shape for camera, frame in observation["frames"].items()}
            for camera, shared in map_frames(self._memory, shapes).items():
                shared[:] = observation["frames"][camera]
            observation["frames"], report["shapes"] = {}, shapes
        return report


def serve(connection: Connection, memory: mmap.mmap) -> None:
    """Answer requests `(method, arguments)` with `("done", result, seconds)` until the other side closes.

    Methods without a result are not answered. An error is sent as `("failed", description, 0)` and ends the
    process.
    """

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        from vega_policy.config import describe_error  # not sooner: see the top of this file

        connection.send(("failed", describe_error(error), 0.0))

    sys.excepthook = report
    search_path, make = connection.recv()
    sys.path[:] = search_path
    worker = Worker(resolve(make), memory)
    try:
        while True:
            method, arguments = connection.recv()
            start = time.perf_counter()
            result = getattr(worker, method)(**arguments)
            if result is not None:
                connection.send(("done", result, time.perf_counter() - start))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the main process closed the connection or is gone
    finally:
        worker.close()


if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; the main process decides, and its end is this process's end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])), mmap.mmap(int(sys.argv[2]), MEMORY_BYTES))
