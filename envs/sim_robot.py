"""A simulated robot for LeRobot: a process of its own, as a robot is, that neither waits nor slows down."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.robots.robot import Robot
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

from envs.config_sim_robot import VegaSimConfig

STATE_NAMES = ("x.pos", "y.pos", "z.pos", "rx.pos", "ry.pos", "rz.pos", "finger1.pos", "finger2.pos")
"""Entries of the state: the hand's position (m) and axis-angle (rad) in the world, the fingers' positions."""

ACTION_NAMES = ("x.vel", "y.vel", "z.vel", "roll.vel", "pitch.vel", "yaw.vel", "gripper.pos")
"""Entries of an action: displacements a step (1 is 5 cm or 0.5 rad), and the gripper (-1 open, 1 closed)."""

CAMERAS = ("image", "image2")
_SIMULATOR = Path(__file__).with_name("sim_robot_process.py")
_SECONDS_TO_START = 180.0
_SECONDS_TO_ANSWER = 20.0

logger = logging.getLogger(__name__)


class VegaSim(Robot):
    """A robosuite or LIBERO scene behind LeRobot's interface of a robot.

    The simulator steps on the wall clock, 20 times a second: a command is executed in the next step, without
    one the hand holds still, and what comes faster than it can be executed is lost. Its own check decides
    what is a success, and its log is the record.

    Args:
        config: What is simulated.
    """

    config_class = VegaSimConfig  # pyright: ignore[reportAssignmentType]
    name = "vega_sim"  # pyright: ignore[reportAssignmentType]

    def __init__(self, config: VegaSimConfig) -> None:
        super().__init__(config)
        self.config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def observation_features(self) -> dict[str, Any]:
        """The state's entries, and cameras as (height, width, 3)."""
        size = self.config.frame_size
        return {**dict.fromkeys(STATE_NAMES, float), **dict.fromkeys(CAMERAS, (size, size, 3))}

    @property
    def action_features(self) -> dict[str, Any]:
        """The action's entries."""
        return dict.fromkeys(ACTION_NAMES, float)

    @property
    def is_connected(self) -> bool:
        """Whether the simulator runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_calibrated(self) -> bool:
        """Always: there is nothing to calibrate."""
        return True

    def connect(self, calibrate: bool = True) -> None:
        """Start the simulator and wait until it has laid out its first scene.

        Args:
            calibrate: Taken for LeRobot's sake.

        Raises:
            DeviceAlreadyConnectedError: If it runs already.
            RuntimeError: If the simulator could not start; the message holds its reason.
        """
        if self.is_connected:
            raise DeviceAlreadyConnectedError("the simulated robot is connected already")
        ours, theirs = socket.socketpair()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SIMULATOR), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **threads},
                start_new_session=True,  # Ctrl-C is for the program that drives it
            )
        self._connection = Connection(ours.detach())
        options = dataclasses.asdict(self.config)
        self._connection.send((sys.path, {key: options[key] for key in _OPTIONS}))
        if not self._connection.poll(_SECONDS_TO_START):
            self.disconnect()
            raise RuntimeError(f"the simulator did not start within {_SECONDS_TO_START} s")
        self._receive()

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    def get_observation(self) -> dict[str, Any]:
        """The latest state and camera frames (uint8 [h w 3]); does not wait for a new one.

        Raises:
            DeviceNotConnectedError: If the simulator does not run.
        """
        state, frames = self._ask("observe", None)
        return {**dict(zip(STATE_NAMES, state.tolist(), strict=True)), **frames}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        """Queue one command for the next step.

        Being sent to a pose (the names of the state) means, as in LeRobot's rollout, back to where it
        started: a new scene is laid out, unless the present one was not touched. It returns when the new one
        is shown.

        Raises:
            DeviceNotConnectedError: If the simulator does not run.
            ValueError: If the command has other entries, or values that are not finite.
        """
        if set(action) == set(STATE_NAMES):
            self._ask("return", None)
            return action
        if set(action) != set(ACTION_NAMES):
            raise ValueError(f"expected the entries {list(ACTION_NAMES)}, got {list(action)}")
        values = np.array([float(action[name]) for name in ACTION_NAMES])
        if not np.isfinite(values).all():
            raise ValueError(f"expected finite values, got {action}")
        self._ask("act", values)
        return action

    def disconnect(self) -> None:
        """End the simulator."""
        connection, self._connection = self._connection, None  # from here on it is not connected
        if connection is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.send(("disconnect", None))
            connection.close()
        if self._process is not None:
            try:
                self._process.wait(_SECONDS_TO_ANSWER)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def _ask(self, request: str, argument: Any) -> Any:
        if self._connection is None:
            raise DeviceNotConnectedError("the simulated robot is not connected: call connect() first")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((request, argument))  # if it is dead, its last words can still be read
        if not self._connection.poll(_SECONDS_TO_ANSWER):
            raise DeviceNotConnectedError(f"the simulator did not answer within {_SECONDS_TO_ANSWER} s")
        return self._receive()

    def _receive(self) -> Any:
        assert self._connection is not None
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise DeviceNotConnectedError("the simulator ended without a word") from error
        if kind == "failed":
            raise RuntimeError(f"the simulator failed:\n{value}")
        return value


_OPTIONS = (
    "suite",
    "task_index",
    "frame_size",
    "rendering",
    "seed",
    "first_episode",
    "auto_reset",
    "reset_seconds",
    "log_file",
)
