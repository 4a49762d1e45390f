"""Imported once by the server process that worker processes are forked from: what they need takes seconds."""

import lerobot.datasets.lerobot_dataset  # noqa: F401

from envs.robosuite import load_robosuite

load_robosuite()
