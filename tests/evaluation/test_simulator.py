"""The evaluation on a real simulator: slow, because each process imports and builds robosuite."""

import numpy as np
import pytest

from vega_policy.evaluation.config import EvaluationSettings
from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool
from vega_policy.evaluation.episodes import read_episodes
from vega_policy.evaluation.evaluate import Evaluation
from vega_policy.evaluation.policies import PolicyDescription

envs = pytest.importorskip("envs")
CAMERAS = ("observation.images.image", "observation.images.image2")


class Fidgeter:
    """Moves at random, a little differently with each frame: a stand-in whose episodes all differ."""

    reads_frames = True
    noise_shape = (8, 7)
    description = PolicyDescription("fidgeter", "none", CAMERAS, 8, 7, 8)

    def reset(self):
        pass

    def chunk(self, batch, noise):
        brightness = sum(batch.frames[camera].mean(axis=(1, 2, 3)) for camera in CAMERAS) / 510
        return np.clip(noise * brightness[:, None, None], -1, 1).astype(np.float32)


def run(folder, processes, interrupt_after=None):
    settings = EvaluationSettings(
        "lift_wide", episodes_per_task=4, num_envs=2, processes=processes, videos=0, latency_calls=1
    )
    evaluation = Evaluation(settings, envs.tasks("lift_wide"), folder, {})
    policy = Fidgeter()
    if interrupt_after is not None:
        remaining = iter(range(interrupt_after))
        chunk = policy.chunk

        def interrupted(batch, noise):
            if next(remaining, None) is None:
                raise KeyboardInterrupt
            return chunk(batch, noise)

        policy.chunk = interrupted
    with WorkerPool(EnvironmentFactory("envs.make", 64, "fast"), processes) as pool:
        evaluation.run({"none": policy}, pool)
    return read_episodes(folder)


@pytest.mark.slow
def test_robosuite_episodes_depend_on_neither_processes_nor_interruptions(tmp_path):
    alone = run(tmp_path / "one", 1)
    assert len({result.final_hash for result in alone}) == 4
    assert run(tmp_path / "two", 2) == alone
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 2, interrupt_after=20)
    assert 0 < len(read_episodes(tmp_path / "killed")) < 4
    assert run(tmp_path / "killed", 1) == alone
