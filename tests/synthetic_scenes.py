"""Scenes without a simulator: boxes on a table, each a rectangle of pixels in the views."""

import numpy as np

from vega_policy.data.scenes import NO_OBJECT, Scene, SceneObject, Views

CATEGORIES = {"bowl": 0.11, "plate": 0.14, "ramekin": 0.09, "cookie box": 0.08, "mug": 0.07}
SIZE = 32


def scene(rng, name="synthetic", presence=0.75):
    """Return movable objects anywhere and two pieces of furniture, all visible in the overview.

    Each object appears first in a random close-up.
    """
    candidates = [("bowl", 1), ("bowl", 2), *((category, 1) for category in list(CATEGORIES)[1:])]
    there = [(category, number) for category, number in candidates if rng.random() < presence]
    things = [
        SceneObject(
            f"{category} {number}",
            category,
            (float(rng.uniform(0.3, 0.8)), float(rng.uniform(-0.3, 0.3)), 0.02),
            (CATEGORIES[category], CATEGORIES[category], 0.05),
            CATEGORIES[category],
            True,
        )
        for category, number in there
    ]
    things += [
        SceneObject("stove 1", "stove", (0.35, -0.13, 0.01), (0.3, 0.2, 0.07), 0.3, False),
        SceneObject("cabinet 1", "cabinet", (0.7, -0.29, 0.1), (0.3, 0.3, 0.2), 0.26, False),
    ]
    first_seen = rng.integers(0, 3, len(things))
    segments = np.full((4, SIZE, SIZE), NO_OBJECT, np.int16)
    for index in range(len(things)):
        segments[0, 3 * index : 3 * index + 2, :24] = index
        for view in range(1 + first_seen[index], 4):
            segments[view, 3 * index : 3 * index + 2, :24] = index
    patches = rng.integers(0, 255, (4, 4, 4, 3)).astype(np.uint8)
    frames = patches.repeat(SIZE // 4, axis=1).repeat(SIZE // 4, axis=2)
    eye = np.repeat(np.eye(4)[None], 4, axis=0)
    depth = np.ones((4, SIZE, SIZE), np.float32)
    return Scene(name, Views(frames, depth, eye[:, :3, :3], eye, segments), tuple(things))


def scenes(count, seed=0):
    """Return `count` scenes."""
    rng = np.random.default_rng(seed)
    return [scene(rng, f"synthetic {index}") for index in range(count)]
