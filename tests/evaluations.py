"""Evaluations for tests: a policy that walks in the point world, and configs of the command."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from lerobot.policies.factory import make_pre_post_processors
from omegaconf import OmegaConf

from tests import point_world as world
from tests.policies import CAMERAS
from vega_policy.evaluation.ablations import BlindPolicy
from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool
from vega_policy.evaluation.evaluate import Evaluation, EvaluationSettings
from vega_policy.evaluation.policies import ObservationBatch, PolicyDescription

FACTORY = EnvironmentFactory("tests.point_world.make_without_torch", frame_size=32, rendering="fast")
DELAYED = replace(FACTORY, make="tests.point_world.make_with_delays")
MEAN_FRAME = np.full((32, 32, 3), 7, np.uint8)
CONFIGS = str(Path(__file__).parents[1] / "configs")
STATISTICS = {
    "action": {"min": torch.full((7,), -3.0), "max": torch.full((7,), 5.0)},
    "observation.state": {"mean": torch.full((8,), 0.5), "std": torch.full((8,), 2.0)},
}


class GoalSeeker:
    """Reads the goal from the camera and walks there, with its noise added."""

    reads_frames = True
    noise_shape = (6, 2)

    def __init__(self, action_steps=4):
        self.description = PolicyDescription("seeker", "none", (world.CAMERA,), 2, 2, action_steps)
        self.batches, self.noises = [], []

    def reset(self, instructions=()):
        self.batches, self.noises = [], []

    def chunk(self, batch, noise):
        self.batches.append(batch)
        self.noises.append(noise)
        size = batch.frames[world.CAMERA].shape[1]
        brightest = batch.frames[world.CAMERA].max(axis=-1).reshape(len(batch.state), -1).argmax(axis=1)
        goal = np.stack([brightest % size, brightest // size], axis=1) / (size - 1) * 2 - 1
        toward = np.clip((goal - batch.state) / world.STEP / 4, -1, 1)[:, None]
        return (toward + 0.35 * noise).astype(np.float32)


def settings(**changes):
    chosen = {"suite": "two_points", "episodes_per_task": 7, "batch_size": 4, "videos": 0, "latency_calls": 1}
    chosen["video_frame_size"] = 64
    return EvaluationSettings(**{**chosen, **changes})


def evaluate(folder, *, policy=None, processes=1, provenance=None, factory=FACTORY, **changes):
    chosen = settings(**changes)
    evaluation = Evaluation(chosen, world.tasks(chosen.suite), folder, provenance or {"checkpoint": "seeker"})
    policy = policy or GoalSeeker()
    means = dict.fromkeys(policy.description.cameras, MEAN_FRAME)
    variants = {"none": policy, "blind": BlindPolicy(policy, means)}
    with WorkerPool(factory, processes) as pool:
        return evaluation.run({name: variants[name] for name in chosen.ablations}, pool)


def save_checkpoint(policy, folder, statistics):
    preprocessor, postprocessor = make_pre_post_processors(policy.config, dataset_stats=statistics)
    for part in (policy, preprocessor, postprocessor):
        part.save_pretrained(folder / "pretrained_model")
    return folder


def observe(rows, seed=0):
    rng = np.random.default_rng(seed)
    frames = {camera: rng.integers(0, 256, (rows, 48, 48, 3), np.uint8) for camera in CAMERAS}
    state = rng.standard_normal((rows, 8), np.float32)
    return ObservationBatch(frames, state, ["lift the red cube"] * rows)


def noise_for(policy, rows):
    return np.random.default_rng(1).standard_normal((rows, *policy.noise_shape), np.float32)


def evaluation_config(checkpoint, output_dir, *overrides):
    with initialize_config_dir(CONFIGS, version_base=None):
        config = compose(
            "eval",
            [
                f"checkpoint={checkpoint}",
                f"output_dir={output_dir}",
                "env.suite=two_points",
                "env.frame_size=32",
                "environments.make=tests.point_world.make_without_torch",
                "environments.tasks=tests.point_world.tasks",
                "environments.prompts=tests.point_world.prompts",
                "device=cpu",
                "episodes_per_task=3",
                "batch_size=3",
                "videos=0",
                "latency_calls=1",
                *overrides,
            ],
        )
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
