"""The process that steps simulators.

It runs as a file (`python worker.py <file descriptor>`), not as a module of the package: `import vega_policy`
brings torch and LeRobot, which a simulator does not need and which would cost every worker seconds. So this
file uses the standard library and numpy alone, and everything that crosses the connection is made of their
types.

Frames that nobody reads are never rendered: a slot executes its actions blindly and observes once, after the
last.
"""

from __future__ import annotations

import hashlib
import importlib
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NotRequired, TypedDict

import numpy as np


class EpisodeSpec(TypedDict):
    """Which episode to play.

    `initial_state` picks an official initial state; None leaves the start to the seed. `start` float64 [n] is
    a simulator state to be put in its place.
    """

    suite: str
    task_index: int
    seed: int
    initial_state: int | None
    start: NotRequired[np.ndarray]


class SlotSpec(TypedDict):
    """What one slot does in a tick: execute `actions` [t a], then, if nothing is running, start `episode`."""

    actions: np.ndarray | None
    episode: EpisodeSpec | None


class SlotObservation(TypedDict):
    """What the policy may see.

    `frames` {camera: uint8 [h w 3], or [t h w 3] where a history is wanted}, empty if unrendered; `state`
    float32 [s].
    """

    frames: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str
    action_size: int


class Outcome(TypedDict):
    """How an episode ended; `states` float64 [length + 1, n] only if the pool was opened to keep them."""

    success: bool
    length: int
    initial_hash: str
    final_hash: str
    states: np.ndarray | None


class SlotReport(TypedDict):
    """The end of the episode that was running, if it ended, and the view of the one now running, if any."""

    outcome: Outcome | None
    observation: SlotObservation | None


def state_hash(state: np.ndarray) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a simulator state."""
    return hashlib.sha256(np.ascontiguousarray(state, dtype=np.float64).tobytes()).hexdigest()[:16]


class Stage:
    """An environment of one task after another, built anew only when the task changes."""

    def __init__(self, make: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._make = make
        self._arguments = arguments
        self._task: tuple[str, int] | None = None
        self.environment: Any = None

    def build(self, suite: str, task_index: int) -> None:
        """Have the environment of a task."""
        if (suite, task_index) != self._task:
            self.close()
            self.environment = self._make(suite, task_index, **self._arguments)
            self._task = (suite, task_index)

    def begin(self, order: EpisodeSpec) -> Any:
        """Start an episode and return its first observation."""
        self.build(order["suite"], order["task_index"])
        official = order["initial_state"]
        options = {} if official is None else {"initial_state": official}
        observation = self.environment.reset(seed=order["seed"], options=options)[0]
        if "start" not in order:
            return observation
        self.environment.restore(order["start"])
        return self.environment.observe()

    def close(self) -> None:
        """Close the environment, so that no rendering context outlives it."""
        if self.environment is not None:
            self.environment.close()
        self.environment, self._task = None, None


class Slot:
    """One row of the policy's batch: plays one episode after another."""

    def __init__(self, stage: Stage, *, keep_states: bool, history: int = 1) -> None:
        self.stage = stage
        self.keep_states = keep_states
        self.history = history
        self._past: deque[dict[str, np.ndarray]] = deque()
        self._length = 0
        self._initial_hash = ""
        self._states: list[np.ndarray] = []

    def advance(self, order: SlotSpec) -> SlotReport:
        """Execute the actions of a tick, start the next episode where one ended, and observe."""
        outcome, observation = None, None
        if order["actions"] is not None:
            outcome = self._play(order["actions"])
            if outcome is None:
                return {"outcome": None, "observation": self._view(self.stage.environment.observe())}
        if order["episode"] is not None:
            observation = self._view(self._begin(order["episode"]))
        return {"outcome": outcome, "observation": observation}

    def _begin(self, order: EpisodeSpec) -> Any:
        observation = self.stage.begin(order)
        # Before the episode's start there is its first frame, as LeRobot's dataset pads a clip.
        self._past = deque(maxlen=self.history)
        for _ in range(self.history - 1):
            self._remember(observation)
        state = self.stage.environment.simulator_state()
        self._length, self._initial_hash = 0, state_hash(state)
        self._states = [state] if self.keep_states else []
        return observation

    def _play(self, actions: np.ndarray) -> Outcome | None:
        """Execute actions [t a] until the simulator says success or cuts the episode; None if it goes on."""
        environment = self.stage.environment
        for step, action in enumerate(actions, start=1):
            success, truncated = environment.step_blindly(action)
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
            if 0 < len(actions) - step < self.history:  # what comes after the last is seen by `_view`
                self._remember(environment.observe())
        return None

    def _remember(self, observation: dict[str, Any]) -> None:
        """Keep a copy of the frames: a simulator may draw the next ones into the same memory."""
        pixels = observation.get("pixels", {})
        self._past.append({camera: frame.copy() for camera, frame in pixels.items()})

    def _view(self, observation: dict[str, Any]) -> SlotObservation:
        environment = self.stage.environment
        frames = dict(observation.get("pixels", {}))
        if self.history > 1:
            self._remember(observation)
            frames = {camera: np.stack([seen[camera] for seen in self._past]) for camera in frames}
        return {
            "frames": frames,
            "state": np.asarray(observation["agent_pos"], dtype=np.float32),
            "instruction": environment.task_description,
            "action_size": environment.action_space.shape[0],
        }


class Worker:
    """The slots of this process, by number, and what the pool may ask of them."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._slots: dict[int, Slot] = {}
        self._arguments: dict[str, Any] = {}
        self._keep_states = False
        self._history = 1
        self._studio: tuple[dict[str, Any], Stage] | None = None

    def open(self, arguments: dict[str, Any], keep_states: bool, history: int) -> None:
        """Give all slots environments made with these arguments; those that have them already keep them."""
        if arguments != self._arguments:
            self.close()
        self._arguments, self._keep_states, self._history = arguments, keep_states, history
        for slot in self._slots.values():
            slot.keep_states, slot.history = keep_states, history

    def build(self, tasks: dict[int, tuple[str, int]]) -> None:
        """Build the environments of slots for the tasks that they play first."""
        for slot, task in tasks.items():
            self._slot(slot).stage.build(*task)

    def advance(self, orders: dict[int, SlotSpec]) -> dict[int, SlotReport]:
        """Play one tick of each slot that has an order."""
        return {slot: self._slot(slot).advance(order) for slot, order in orders.items()}

    def film(self, order: EpisodeSpec, states: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
        """Render states [t n] of an episode, uint8 [t h w 3]."""
        if self._studio is None or self._studio[0] != arguments:
            self._studio = (arguments, Stage(self._make, arguments))
        stage = self._studio[1]
        # The reset rebuilds what a state does not hold: LIBERO draws the poses of fixtures there.
        stage.begin(order)
        frames = []
        for state in states:
            stage.environment.restore(state)
            frames.append(stage.environment.render())
        return np.stack(frames)

    def close(self) -> None:
        """Close every environment."""
        for slot in self._slots.values():
            slot.stage.close()
        self._slots = {}
        if self._studio is not None:
            self._studio[1].close()
        self._studio = None

    def _slot(self, slot: int) -> Slot:
        if slot not in self._slots:
            stage = Stage(self._make, self._arguments)
            self._slots[slot] = Slot(stage, keep_states=self._keep_states, history=self._history)
        return self._slots[slot]


def resolve(path: str) -> Callable[..., Any]:
    """Return the function that a dotted path such as `envs.make` names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def serve(connection: Connection) -> None:
    """Answer requests `(method, arguments)` with `("done", result)` until the other side hangs up.

    An error is sent as `("failed", traceback)` and ends the process.
    """

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        connection.send(("failed", "".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = report
    search_path, make = connection.recv()
    sys.path[:] = search_path
    worker = Worker(resolve(make))
    try:
        while True:
            method, arguments = connection.recv()
            connection.send(("done", getattr(worker, method)(**arguments)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # The main process hung up or is gone.
    finally:
        worker.close()


if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; the main process decides, and its end is this process's end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))
