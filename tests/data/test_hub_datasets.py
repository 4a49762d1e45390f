"""Datasets of LIBERO and Meta-World as the hub has them: policies of them fit our environments.

The hub was not reached: these small datasets have the published schemas.
"""

from pathlib import Path

import numpy as np
import pytest
import yaml
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from envs.demos.shards import image_key
from envs.metaworld import MetaworldEnv
from envs.robosuite import CAMERAS
from tests.training_runs import tiny_policy
from vega_policy.data.dataset import match_features, open_folder
from vega_policy.evaluation.policies import check_compatible, describe, stack_observations
from vega_policy.modeling_vega import VegaPolicy

CONFIGS = Path(__file__).parents[2] / "configs" / "dataset"


def image_feature(size):
    return {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channel"]}


def vector(size):
    return {"dtype": "float32", "shape": (size,), "names": None}


LIBERO = {
    "observation.images.image": image_feature(64),
    "observation.images.image2": image_feature(64),
    "observation.state": vector(8),
    "action": vector(7),
}
METAWORLD = {
    "observation.image": image_feature(48),
    "observation.state": vector(4),
    "observation.environment_state": vector(39),
    "action": vector(4),
    "next.reward": vector(1),
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
}


def write(root, features, fps):
    dataset = LeRobotDataset.create("tests/hub", fps=fps, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(5):
        frame = {}
        for name, feature in features.items():
            if feature["dtype"] == "image":
                frame[name] = rng.integers(0, 256, feature["shape"], np.uint8)
            else:
                frame[name] = rng.normal(size=feature["shape"]).astype(feature["dtype"])
        dataset.add_frame({**frame, "task": "push the puck to a goal"})
    dataset.save_episode()
    dataset.finalize()
    return open_folder(root, "tests/hub")


@pytest.mark.parametrize(
    ("schema", "fps", "cameras", "state", "action"),
    [(LIBERO, 10, tuple(CAMERAS), 8, 7), (METAWORLD, 80, ("image",), 4, 4)],
)
def test_a_policy_of_the_hubs_schema_is_fed_by_our_environment(tmp_path, schema, fps, cameras, state, action):
    dataset = write(tmp_path / "hub", schema, fps)
    config = tiny_policy(input_features=None, output_features=None)
    match_features(config, dataset)
    assert "observation.environment_state" not in config.input_features, "object states reach no policy"
    description = describe(VegaPolicy(config), None)
    shown = {
        "frames": {camera: np.full((32, 32, 3), 9, np.uint8) for camera in cameras},
        "state": np.zeros(state, np.float32),
        "instruction": "push the puck to a goal",
        "action_size": action,
    }
    check_compatible(description, shown, reads_frames=True)
    batch = stack_observations([shown, None], description.cameras)
    assert set(batch.frames) == set(config.image_features)
    assert all(frames[0].min() == 9 for frames in batch.frames.values())


def test_our_own_datasets_have_the_hubs_camera_names():
    panda = type("Panda", (), {"cameras": tuple(CAMERAS)})
    assert {image_key(panda, camera) for camera in CAMERAS} == {key for key in LIBERO if "images" in key}
    assert image_key(type("Sawyer", (), {"cameras": ("image",)}), "image") in METAWORLD
    assert MetaworldEnv.metadata["render_fps"] == 80


@pytest.mark.parametrize("name", ["libero", "metaworld_hub"])
def test_the_hubs_datasets_have_a_config_that_says_that_they_were_not_reached(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert "ested on this schema only" in text
    assert "/" in yaml.safe_load(text)["repo_id"]
