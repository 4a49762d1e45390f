"""The process behind `VegaSim`: one thread steps the simulator on the wall clock, one answers requests.

It is started as a file with the number of a socket, so that it imports nothing but the simulator. When its
client is gone it holds still for a while, as a robot would, logs the remaining motion, and ends.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

MAX_PENDING = 2  # commands; evens out the sender's jitter, the oldest surplus one is dropped
ALONE_SECONDS = 1.0  # how long it holds still after its client is gone
SEED_STRIDE = 10_000  # between two evaluation seeds, as in vega_policy.evaluation


class WallClockRobot:
    """An environment that is stepped whether or not a command has arrived.

    Args:
        make: Builds the environment; called in the thread that steps it, which owns its rendering context.
        seed: Seed of episode 0; the following ones count up.
        first_episode: Number of the first episode.
        auto_reset: Whether the end of an episode draws a new scene.
        reset_seconds: How long a new scene is shown before commands move anything.
        log_file: Where JSON lines are appended, or None.
    """

    def __init__(
        self,
        make: Any,
        *,
        seed: int,
        auto_reset: bool,
        reset_seconds: float,
        log_file: Path | None,
        first_episode: int = 0,
    ) -> None:
        self._make, self._log_file = make, log_file
        self._seed, self._first_episode = seed, first_episode
        self._auto_reset, self._reset_seconds = auto_reset, reset_seconds
        self._commands: deque[np.ndarray] = deque(maxlen=MAX_PENDING)
        self._observation: tuple[np.ndarray, dict[str, np.ndarray]] | None = None
        self._lock = threading.Lock()
        self._started = threading.Event()  # a command has arrived in this episode
        self._return = threading.Event()  # a new scene is requested
        self._untouched = threading.Event()  # no command has arrived in this scene
        self._closed = threading.Event()
        self.ready = threading.Event()
        self.failure: str | None = None

    def observe(self) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
        """Return the latest state float32 [s] and frames uint8 [h w 3] by camera."""
        with self._lock:
            return self._observation

    def act(self, action: np.ndarray) -> None:
        """Queue a command [a] for the next step."""
        with self._lock:
            self._commands.append(action)
            self._untouched.clear()
            self._started.set()

    def new_scene(self) -> None:
        """Request a new scene and wait until it is shown; an untouched scene is kept."""
        if not self._untouched.is_set():
            self._return.set()
            while not (self._untouched.wait(0.1) or self._closed.is_set() or self.failure is not None):
                pass

    def close(self) -> None:
        """End after the present step."""
        with self._lock:
            self._closed.set()
            self._started.set()

    def run(self) -> None:
        """Step until closed; a failure's traceback is kept in `failure`."""
        environment = None
        try:
            environment = self._make()
            self._run_episodes(environment)
        except (RuntimeError, ValueError, OSError, ImportError):
            self.failure = traceback.format_exc()
        finally:
            if not self._closed.is_set() and self.failure is None:  # an unexpected type, a bug; it propagates
                self.failure = traceback.format_exc()
            if self.failure is not None:
                self.ready.set()
            if environment is not None:
                environment.close()

    def _run_episodes(self, environment: Any) -> None:
        episode = self._first_episode
        while not self._closed.is_set():
            seed = self._seed + episode
            environment.reset_blindly(seed=seed)
            self._publish(environment)
            if episode > self._first_episode:
                self._closed.wait(self._reset_seconds)  # so that no plan is based on the old scene
            with self._lock:
                self._commands.clear()
                if not self._closed.is_set():
                    self._started.clear()
                self._return.clear()
                self._untouched.set()
            self.ready.set()
            if episode == self._first_episode or not self._auto_reset:
                self._started.wait()  # the client's start-up does not count as the policy's time
            if self._closed.is_set():
                return
            self._log({"episode": episode, "seed": seed, **self._run_episode(environment)})
            episode += 1

    def _run_episode(self, environment: Any) -> dict[str, Any]:
        """Step through one episode and return its record."""
        period = 1.0 / environment.metadata["render_fps"]
        hold = np.zeros(environment.action_space.shape[0])
        hold[-1] = -1.0
        steps = held = late = 0
        success = ended = False
        won_at = None
        start = due = time.monotonic()
        while not (ended or self._closed.is_set() or self._return.is_set()):
            due += period
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            elif wait < -period:
                late, due = late + 1, time.monotonic()  # the simulator itself is too slow
            with self._lock:
                action = self._commands.popleft() if self._commands else None
            held += action is None
            hold[-1] = hold[-1] if action is None else action[-1]
            done, truncated = environment.step_blindly(hold if action is None else action)
            steps += 1
            if done and not success:
                success, won_at = True, round(time.monotonic() - start, 3)
            ended = (success or truncated) and self._auto_reset
            self._publish(environment)
        return {
            "success": bool(success),
            "steps": steps,
            "held_steps": held,
            "late_steps": late,
            "seconds": round(time.monotonic() - start, 3),
            "won_at": won_at,
            "cut_short": not (ended or self._return.is_set()),  # closed during the episode
        }

    def _publish(self, environment: Any) -> None:
        observation = environment.observe()
        with self._lock:
            self._observation = observation["agent_pos"], dict(observation["pixels"])

    def hold_alone(self) -> None:
        """Wait after the client is gone and log how far the hand still moves."""
        with self._lock:
            pending = len(self._commands)
        time.sleep(ALONE_SECONDS / 2)  # pending commands are executed and their motion ends
        before = self.observe()
        time.sleep(ALONE_SECONDS / 2)
        after = self.observe()
        if before is not None and after is not None:
            moved = float(np.abs(after[0][:3] - before[0][:3]).max())
            self._log(
                {"event": "client gone", "pending_commands": pending, "then_moved_metres": round(moved, 5)}
            )

    def _log(self, record: dict[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **record})
        sys.stderr.write(f"vega_sim {line}\n")
        sys.stderr.flush()
        if self._log_file is not None:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            with self._log_file.open("a") as file:
                file.write(line + "\n")


def answer(robot: WallClockRobot, connection: Connection) -> None:
    """Answer requests until the client disconnects or dies."""
    robot.ready.wait()
    request = None
    try:
        while True:
            if robot.failure is not None:
                connection.send(("failed", robot.failure))
                return
            connection.send(("done", robot.observe() if request == "observe" else None))
            request, argument = connection.recv()
            if request == "act":
                robot.act(argument)
            elif request == "return":
                robot.new_scene()
            elif request == "disconnect":
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        robot.hold_alone()


def main() -> None:
    """Serve the client at the other end of the socket that the command line names."""
    connection = Connection(int(sys.argv[1]))
    search_path, options = connection.recv()
    sys.path[:] = search_path
    import envs
    from envs.base import EVALUATION_SEED

    def make() -> Any:
        names = ("suite", "task_index", "frame_size", "rendering")
        return envs.make(**{name: options[name] for name in names})

    robot = WallClockRobot(
        make,
        seed=EVALUATION_SEED + SEED_STRIDE * options["seed"],
        **{name: options[name] for name in ("first_episode", "auto_reset", "reset_seconds", "log_file")},
    )
    stepping = threading.Thread(target=robot.run, name="simulator")
    stepping.start()
    answer(robot, connection)
    robot.close()
    stepping.join()


if __name__ == "__main__":
    main()
