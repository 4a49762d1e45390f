"""The process behind `VegaSim`: one thread steps the simulator on the wall clock, one answers requests.

It is started as a file with the number of a socket, so that it imports nothing but the simulator. When its
client is gone it holds still for a while, as a robot would, logs the remaining motion, and ends.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
import traceback
from collections import Counter, deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

MAX_PENDING = 2  # commands; the oldest surplus one is lost
ALONE_SECONDS = 1.0  # how long it holds still after its client is gone
SEED_STRIDE = 10_000  # between two evaluation seeds, as in vega_policy.evaluation

View = tuple[np.ndarray, dict[str, np.ndarray], int]
"""State float32 [s], frames uint8 [h w 3] by camera, and number of the last command in them."""


class WallClockRobot:
    """An environment that is stepped whether or not a command has arrived.

    `make` builds it in the thread that steps it, which owns its rendering context. `seed` is that of episode
    0; the following ones count up from it. Views are `latency_steps` steps late. JSON lines are appended to
    `log_file`, if given.
    """

    def __init__(
        self, make: Any, *, seed: int, log_file: Path | None, first_episode: int = 0, latency_steps: int = 0
    ) -> None:
        self._make, self._log_file = make, log_file
        self._seed, self._first_episode = seed, first_episode
        self._commands: deque[tuple[int, np.ndarray]] = deque()
        self._sent = 0  # number of the last command
        self._lost = 0  # commands of this episode that a later one displaced
        self._views: deque[View] = deque(maxlen=latency_steps + 1)
        self._under_way: Counter[int] = Counter()  # commands that views of this episode did not reflect
        self._changed = threading.Condition()
        self._is_started = False  # a command has arrived in this scene
        self._is_returned = False  # a new scene is requested
        self._is_closed = False
        self._position_unit = ""  # of the state's first three entries
        self.ready = threading.Event()
        self.failure: str | None = None

    def observe(self) -> View | None:
        """Wait until all commands are executed; return the latest view, or that of `latency_steps` before."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over or not self._views or self._views[-1][2] == self._sent
            )
            if not self._views:
                return None
            self._under_way[self._sent - self._views[0][2]] += 1
            return self._views[0]

    def act(self, action: np.ndarray) -> None:
        """Queue a command [a] for the next step."""
        with self._changed:
            self._sent += 1
            self._commands.append((self._sent, action))
            if len(self._commands) > MAX_PENDING:
                self._commands.popleft()
                self._lost += 1
            self._is_started = True
            self._changed.notify_all()

    def new_scene(self) -> None:
        """Request a new scene and wait until it is shown; one that no command has changed is kept."""
        with self._changed:
            if self._is_started:
                self._is_returned = True
                self._changed.wait_for(lambda: self._is_over or not self._is_returned)

    def close(self) -> None:
        """End after the present step."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def _is_over(self) -> bool:
        return self._is_closed or self.failure is not None

    def run(self) -> None:
        """Step until closed; what made it fail is kept in `failure`."""
        environment = None
        try:
            environment = self._make()
            self._position_unit = environment.position_unit
            self._run_episodes(environment)
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            from vega_policy.config import describe_error  # found only now: `main` sets the search path

            self.failure = describe_error(error)
        finally:
            if not self._is_closed and self.failure is None:  # an unexpected type, a bug; it propagates
                self.failure = traceback.format_exc()
            if self.failure is not None:
                self.ready.set()
            with self._changed:
                self._changed.notify_all()
            if environment is not None:
                environment.close()

    def _run_episodes(self, environment: Any) -> None:
        episode = self._first_episode
        while not self._is_closed:
            seed = self._seed + episode
            environment.reset_blindly(seed=seed)
            with self._changed:  # commands for the old scene are void
                self._commands.clear()
                self._views.clear()
                self._under_way.clear()
                self._lost = 0
            self._publish(environment, self._sent)
            with self._changed:
                self._is_started = self._is_returned = False
                self._changed.notify_all()
                self.ready.set()
                self._changed.wait_for(lambda: self._is_started or self._is_closed)
            if not self._is_started:
                return
            self._log({"episode": episode, "seed": seed, **self._run_episode(environment)})
            episode += 1

    def _run_episode(self, environment: Any) -> dict[str, Any]:
        """Step until the client requests a new scene or closes, and return the episode's record."""
        period = 1.0 / environment.metadata["render_fps"]
        last: np.ndarray | None = None
        steps = held = late = number = 0
        success, won_at = False, None
        start = due = time.monotonic()
        while not (self._is_closed or self._is_returned):
            with self._changed:
                number, action = self._commands.popleft() if self._commands else (number, None)
            held += action is None
            last = environment.holding_action(last) if action is None else action
            success_now, _ = environment.step_blindly(last)
            steps += 1
            if success_now and not success:
                success, won_at = True, round(time.monotonic() - start, 3)
            self._publish(environment, number)
            due += period
            missed = max(math.floor((time.monotonic() - due) / period), 0)  # the simulator itself is too slow
            late, due = late + missed, due + missed * period
            time.sleep(max(due - time.monotonic(), 0.0))
        return {
            "success": success,
            "steps": steps,
            "held_steps": held,
            "late_steps": late,
            "lost_commands": self._lost,
            "under_way": {str(count): times for count, times in sorted(self._under_way.items())},
            "seconds": round(time.monotonic() - start, 3),
            "won_at": won_at,
            "cut_short": not self._is_returned,  # closed during the episode
        }

    def _publish(self, environment: Any, number: int) -> None:
        """Show the present state, which reflects the commands up to a number."""
        observation = environment.observe()
        view = observation["agent_pos"], dict(observation["pixels"]), number
        with self._changed:
            self._views.extend([view] * (1 if self._views else self._views.maxlen or 1))
            self._changed.notify_all()

    def hold_alone(self) -> None:
        """Wait after the client is gone and log how far the hand still moves."""
        with self._changed:
            pending = len(self._commands)
        time.sleep(ALONE_SECONDS / 2)  # pending commands are executed and their motion ends
        before = self.observe()
        time.sleep(ALONE_SECONDS / 2)
        after = self.observe()
        if before is not None and after is not None:
            moved = float(np.abs(after[0][:3] - before[0][:3]).max())
            moved_key = f"then_moved_{self._position_unit}"
            self._log({"event": "client gone", "pending_commands": pending, moved_key: round(moved, 5)})

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
        **{name: options[name] for name in ("first_episode", "latency_steps", "log_file")},
    )
    stepping = threading.Thread(target=robot.run, name="simulator")
    stepping.start()
    answer(robot, connection)
    robot.close()
    stepping.join()


if __name__ == "__main__":
    main()
