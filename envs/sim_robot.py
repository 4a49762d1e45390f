"""A simulated robot for LeRobot, in a process of its own that steps on the wall clock, like a real robot."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lerobot.robots.robot import Robot
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

from envs import so101
from envs.lerobot_configs import VegaSimConfig

STATE_NAMES = ("x.pos", "y.pos", "z.pos", "rx.pos", "ry.pos", "rz.pos", "finger1.pos", "finger2.pos")
"""Entries of the state: the hand's position (m) and axis-angle (rad) in the world, the fingers' positions."""

ACTION_NAMES = ("x.vel", "y.vel", "z.vel", "roll.vel", "pitch.vel", "yaw.vel", "gripper.pos")
"""Entries of an action: displacements a step (1 is 5 cm or 0.5 rad), and the gripper (-1 open, 1 closed)."""

CAMERAS = ("image", "image2")


class Interface(NamedTuple):
    """Entries of a robot's state and action, and its cameras, in order."""

    state: tuple[str, ...]
    action: tuple[str, ...]
    cameras: tuple[str, ...]


PANDA = Interface(STATE_NAMES, ACTION_NAMES, CAMERAS)
SO101 = Interface(so101.NAMES, so101.NAMES, (so101.CAMERA,))

_SIMULATOR = Path(__file__).with_name("sim_robot_process.py")
_START_TIMEOUT, _ANSWER_TIMEOUT = 180.0, 20.0  # s
_SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class VegaSim(Robot):
    """A robosuite, LIBERO or SO-101 scene behind LeRobot's robot interface.

    The simulator takes 20 steps a second, the first one with the first command of an episode. A command is
    executed in the next step; without one the hand holds still. An observation waits until all commands are
    executed and in it. Success is the simulator's own check; its log is the record.
    """

    config_class = VegaSimConfig  # pyright: ignore[reportAssignmentType]
    name = "vega_sim"  # pyright: ignore[reportAssignmentType]

    def __init__(self, config: VegaSimConfig) -> None:
        super().__init__(config)
        self.config = config
        self.commands_sent = 0  # number of the last command
        self._interface = SO101 if config.suite == so101.SUITE else PANDA
        self._start: dict[str, float] = {}  # pose in which every scene begins
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def observation_features(self) -> dict[str, Any]:
        """Entries of the state, and cameras as (height, width, 3)."""
        size, interface = self.config.frame_size, self._interface
        return {**dict.fromkeys(interface.state, float), **dict.fromkeys(interface.cameras, (size, size, 3))}

    @property
    def action_features(self) -> dict[str, Any]:
        """Entries of the action."""
        return dict.fromkeys(self._interface.action, float)

    @property
    def is_connected(self) -> bool:
        """Whether the simulator runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_calibrated(self) -> bool:
        """True: there is nothing to calibrate."""
        return True

    def calibrate(self) -> None:
        """Do nothing."""

    def configure(self) -> None:
        """Do nothing."""

    def connect(self, calibrate: bool = True) -> None:
        """Start the simulator and wait for its first scene.

        Raises:
            DeviceAlreadyConnectedError: If it runs already.
            RuntimeError: If the simulator could not start; the message holds its reason.
        """
        if self.is_connected:
            raise DeviceAlreadyConnectedError("the simulated robot is connected already")
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SIMULATOR), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_SINGLE_THREADED},
                start_new_session=True,  # Ctrl-C is for the client
            )
        self._connection, self.commands_sent, self._start = Connection(ours.detach()), 0, {}
        options = {name: getattr(self.config, name) for name in VegaSimConfig.__annotations__}
        self._connection.send((sys.path, options))
        if not self._connection.poll(_START_TIMEOUT):
            self.disconnect()
            raise RuntimeError(f"the simulator did not start within {_START_TIMEOUT} s")
        self._receive()

    def get_observation(self) -> dict[str, Any]:
        """Return the state, camera frames (uint8 [h w 3]) and, as `last_command`, the last command in them.

        It waits until all commands are executed. With `latency_steps` the observation is that many steps old.

        Raises:
            DeviceNotConnectedError: If the simulator does not run.
        """
        state, frames, last_command = self._request("observe", None)
        values = dict(zip(self._interface.state, state.tolist(), strict=True))
        self._start = self._start or values
        return {**values, **frames, "last_command": last_command}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        """Queue one command for the next step.

        A pose (the state's entries) is LeRobot's command to return to the start: a new scene is drawn, unless
        no command has changed the present one. It returns when the new scene is observable. Where actions are
        poses themselves, only the exact pose of the first observation is that command.

        Raises:
            DeviceNotConnectedError: If the simulator does not run.
            ValueError: If the command has other entries, or values that are not finite.
        """
        state, names = self._interface.state, self._interface.action
        if set(action) == set(state) and (state != names or action == self._start):
            self._request("return", None)
            return action
        if set(action) != set(names):
            raise ValueError(f"expected the entries {list(names)}, got {list(action)}")
        values = np.array([float(action[name]) for name in names])
        if not np.isfinite(values).all():
            raise ValueError(f"expected finite values, got {action}")
        self.commands_sent += 1
        self._request("act", values)
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
                self._process.wait(_ANSWER_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def _request(self, request: str, argument: Any) -> Any:
        if self._connection is None:
            raise DeviceNotConnectedError("the simulated robot is not connected: call connect() first")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((request, argument))  # if it is dead, its error can still be received
        if not self._connection.poll(_ANSWER_TIMEOUT):
            raise DeviceNotConnectedError(f"the simulator did not answer within {_ANSWER_TIMEOUT} s")
        return self._receive()

    def _receive(self) -> Any:
        assert self._connection is not None
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise DeviceNotConnectedError("the simulator ended without an error message") from error
        if kind == "failed":
            raise RuntimeError(f"the simulator failed:\n{value}")
        return value
