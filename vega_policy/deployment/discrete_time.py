"""Ways to execute chunks while the policy thinks, compared without a clock: the same on any machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.policies.rtc import ActionQueue, RTCConfig
from torch import Tensor

from vega_policy.deployment.limits import JointLimits
from vega_policy.deployment.real_time import Predict, RealTimeEngine
from vega_policy.deployment.safety import SafetyFilter


@dataclass
class Clockless:
    """An episode in which thinking takes steps of the environment.

    Attributes:
        environment: One of `envs`, reset.
        predict: Asks the policy.
        thinking: So many steps pass until a plan is there; without a command the hand holds still.
        steps: Steps until now.
        held: Steps without a command.
        success: Whether the environment said so.
    """

    environment: Any
    predict: Predict
    thinking: int
    steps: int = 0
    held: int = 0
    success: bool = False
    _gripper: float = -1.0

    @property
    def over(self) -> bool:
        """Whether it succeeded, or took as long as it may."""
        return self.success or self.steps >= self.environment.task.horizon

    def step(self, action: Tensor | None) -> None:
        """Execute an action [a], or hold still."""
        if self.over:
            return
        told = np.zeros(self.environment.action_space.shape[0])
        told[-1] = self._gripper
        if action is None:
            self.held += 1
        else:
            told = action.numpy().astype(np.float64)
        self._gripper = told[-1]
        self.success = bool(self.environment.step_blindly(told)[0])
        self.steps += 1


def sync(world: Clockless, *, action_steps: int, threshold: int) -> None:
    """Wait while the policy thinks, then execute the first actions of its chunk."""
    while not world.over:
        _, actions = world.predict(world.environment.observe(), 0, None)
        for action in [None] * world.thinking + list(actions[:action_steps]):
            world.step(action)


def joined(world: Clockless, *, action_steps: int, threshold: int) -> None:
    """Real-time chunking as `RealTimeEngine` does it: chunks are joined by what was executed."""
    safety = SafetyFilter([JointLimits("any", -1.0, 1.0)], period=0.05, max_observation_age=np.inf)

    def tick() -> None:
        engine.notify_observation({} if world.over else world.environment.observe())
        world.step(engine.get_action(None))

    def think(seen: dict[str, Any], delay: int, left: Tensor | None) -> tuple[Tensor, Tensor]:
        answer = world.predict(seen, delay, left)
        for _ in range(world.thinking - 1):  # the tick before has executed one
            tick()
        return answer

    engine = RealTimeEngine(think, lambda: None, safety, threshold=threshold, shutdown=threading.Event())
    while not world.over:
        tick()
        if not world.over:
            engine.think()


def by_the_clock(world: Clockless, *, action_steps: int, threshold: int) -> None:
    """Real-time chunking with LeRobot's own queue: what the clock says was executed is dropped."""
    queue = ActionQueue(RTCConfig())
    while not world.over:
        if queue.qsize() > threshold:
            world.step(queue.get())
            continue
        chunk, actions = world.predict(world.environment.observe(), world.thinking, queue.get_left_over())
        for _ in range(world.thinking):
            world.step(queue.get())
        queue.merge(chunk, actions, world.thinking, None)
        world.step(queue.get())


WAYS: dict[str, Callable[..., None]] = {"sync": sync, "rtc": joined, "rtc by the clock": by_the_clock}


def frames_to_batch(observation: dict[str, Any], task: str) -> dict[str, Any]:
    """Return an environment's observation as LeRobot's pre-processor takes it."""
    frames = {
        f"observation.images.{camera}": torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        for camera, pixels in observation["pixels"].items()
    }
    state = torch.from_numpy(np.asarray(observation["agent_pos"], np.float32))[None]
    return {**frames, "observation.state": state, "task": [task]}
