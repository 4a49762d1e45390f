"""The process behind `VegaSim`: one thread steps the simulator on the wall clock, one answers.

It runs as a file with the number of a socket, so that it imports the simulator and nothing else. When its
client is gone it holds still for a while, as a robot would, writes down how still, and ends.
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

PENDING = 2
"""Commands that wait for their step at most; more, and the oldest is lost. Evens out the sender's jitter."""

ALONE_SECONDS = 1.0
"""How long it holds still after its client is gone."""

SEEDS_APART = 10_000
"""Between two evaluation seeds, as in vega_policy.evaluation."""


class WallClockRobot:
    """An environment that is stepped whether or not a command has come.

    Args:
        make: Builds the environment; called in the thread that steps it, where its rendering context lives.
        seed: Seed of episode 0; the following ones count up.
        first_episode: Number of the first one that is played.
        auto_reset: Whether the end of an episode lays out a new scene.
        reset_seconds: How long the new scene is shown before commands move anything.
        log_file: Where JSON lines are added, or None.
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
        self._make = make
        self._first_episode = first_episode
        self._seed, self._auto_reset, self._reset_seconds = seed, auto_reset, reset_seconds
        self._log_file = log_file
        self._commands: deque[np.ndarray] = deque(maxlen=PENDING)
        self._observation: tuple[np.ndarray, dict[str, np.ndarray]] | None = None
        self._lock = threading.Lock()
        self._begun = threading.Event()
        self._return = threading.Event()
        self._untouched = threading.Event()
        self._closed = threading.Event()
        self.ready = threading.Event()
        self.failure: str | None = None

    def observe(self) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
        """The latest state float32 [s] and frames uint8 [h w 3] by camera."""
        with self._lock:
            return self._observation

    def act(self, action: np.ndarray) -> None:
        """Queue a command [a] for the next step."""
        with self._lock:
            self._commands.append(action)
            self._untouched.clear()
            self._begun.set()

    def lay_out(self) -> None:
        """Ask for a new scene and wait until it is shown; one that nobody has acted in is new enough."""
        if not self._untouched.is_set():
            self._return.set()
            while not (self._untouched.wait(0.1) or self._closed.is_set() or self.failure is not None):
                pass

    def close(self) -> None:
        """End after the present step."""
        with self._lock:
            self._closed.set()
            self._begun.set()

    def run(self) -> None:
        """Step until closed."""
        environment = None
        try:
            environment = self._make()
            self._play(environment)
        except (RuntimeError, ValueError, OSError, ImportError):
            self.failure = traceback.format_exc()
            self.ready.set()
        finally:
            if not self._closed.is_set() and self.failure is None:  # of a kind that is no simulator's: a bug
                self.failure = traceback.format_exc()
                self.ready.set()
            if environment is not None:
                environment.close()

    def _play(self, environment: Any) -> None:
        episode = self._first_episode
        while not self._closed.is_set():
            seed = self._seed + episode
            environment.reset_blindly(seed=seed)
            self._publish(environment)
            if episode > self._first_episode:
                self._closed.wait(self._reset_seconds)  # the new scene is seen, so that no plan is of the old
            with self._lock:
                self._commands.clear()
                if not self._closed.is_set():
                    self._begun.clear()
                self._return.clear()
                self._untouched.set()
            self.ready.set()
            if episode == self._first_episode or not self._auto_reset:
                self._begun.wait()  # starting the program, or looking at a scene, is not the policy's time
            if self._closed.is_set():
                return
            self._log({"episode": episode, "seed": seed, **self._play_episode(environment)})
            episode += 1

    def _play_episode(self, environment: Any) -> dict[str, Any]:
        """Play one episode and return its record."""
        period = 1.0 / environment.metadata["render_fps"]
        hold = np.zeros(environment.action_space.shape[0])
        hold[-1] = -1.0
        steps = held = late = 0
        success = ended = False
        won_at = None
        began = due = time.monotonic()
        while not (ended or self._closed.is_set() or self._return.is_set()):
            due += period
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            elif wait < -period:
                late, due = late + 1, time.monotonic()  # the simulator itself cannot keep up
            action = self._next_command()
            held += action is None
            hold[-1] = hold[-1] if action is None else action[-1]
            done, truncated = environment.step_blindly(hold if action is None else action)
            steps += 1
            if done and not success:
                success, won_at = True, round(time.monotonic() - began, 3)
            ended = (success or truncated) and self._auto_reset
            self._publish(environment)
        seconds = round(time.monotonic() - began, 3)
        record = {"success": bool(success), "steps": steps, "held_steps": held, "late_steps": late}
        cut_short = not (ended or self._return.is_set())  # only then nobody let it end
        return record | {"seconds": seconds, "won_at": won_at, "cut_short": cut_short}

    def _next_command(self) -> np.ndarray | None:
        with self._lock:
            return self._commands.popleft() if self._commands else None

    def _publish(self, environment: Any) -> None:
        observation = environment.observe()
        with self._lock:
            self._observation = observation["agent_pos"], dict(observation["pixels"])

    def hold_alone(self) -> None:
        """Say how still the hand is held now that nobody is there."""
        with self._lock:
            pending = len(self._commands)
        time.sleep(ALONE_SECONDS / 2)  # what was under way is executed, and its motion ends
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
    """Answer requests until the client hangs up or dies."""
    robot.ready.wait()
    request = "begin"
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
                robot.lay_out()
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
        return envs.make(
            options["suite"],
            options["task_index"],
            frame_size=options["frame_size"],
            rendering=options["rendering"],
        )

    robot = WallClockRobot(
        make,
        seed=EVALUATION_SEED + SEEDS_APART * options["seed"],
        first_episode=options["first_episode"],
        auto_reset=options["auto_reset"],
        reset_seconds=options["reset_seconds"],
        log_file=options["log_file"],
    )
    stepping = threading.Thread(target=robot.run, name="simulator")
    stepping.start()
    answer(robot, connection)
    robot.close()
    stepping.join()


if __name__ == "__main__":
    main()
