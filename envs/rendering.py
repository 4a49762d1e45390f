"""Rendering: profiles, the EGL set-up, and the cameras of an environment."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

MUJOCO_VERSION = "3.3.7"

MjModel = MjData = Any  # mujoco is a compiled module without type stubs


@dataclass(frozen=True)
class Profile:
    """How much of the picture is paid for.

    Attributes:
        shadows: Whether lights cast shadows.
        reflections: Whether surfaces mirror the scene.
        samples: Samples a pixel (anti-aliasing); None keeps what the scene asks for.
    """

    shadows: bool
    reflections: bool
    samples: int | None


PROFILES = {
    "full": Profile(shadows=True, reflections=True, samples=None),
    "fast": Profile(shadows=False, reflections=False, samples=0),
}


def profile(name: str) -> Profile:
    """Return a rendering profile by name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown rendering profile {name!r}; known: {', '.join(PROFILES)}")
    return PROFILES[name]


def apply_profile(model: MjModel, chosen: Profile) -> None:
    """Change a compiled model so that new rendering contexts follow the profile; the physics is untouched."""
    if not chosen.shadows:
        model.light_castshadow[:] = 0
        model.vis.quality.shadowsize = 1
    if not chosen.reflections:
        model.mat_reflectance[:] = 0
    if chosen.samples is not None:
        model.vis.quality.offsamples = chosen.samples


def load_mujoco() -> ModuleType:
    """Import mujoco, set up for headless rendering unless the user chose otherwise with MUJOCO_GL.

    Raises:
        RuntimeError: If mujoco is missing or of another version than the simulators need, or EGL is missing.
    """
    check_mujoco_version()
    if "mujoco" not in sys.modules and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ.get("MUJOCO_GL", "").lower() == "egl":
        check_egl()
    import mujoco

    return mujoco


def check_mujoco_version() -> None:
    """Refuse any mujoco but the one on which robosuite, LIBERO and Meta-World all run unpatched.

    Raises:
        RuntimeError: Naming the version found and the way out.
    """
    try:
        found = importlib.metadata.version("mujoco")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            "the simulators are not installed; install them with: pip install 'lerobot_policy_vega[sim]'"
        ) from None
    if found != MUJOCO_VERSION:
        raise RuntimeError(
            f"mujoco {MUJOCO_VERSION} is needed, found {found}: on other versions robosuite, LIBERO and "
            f"Meta-World break or simulate other physics. Run: pip install mujoco=={MUJOCO_VERSION}"
        )


def check_egl() -> None:
    """Refuse to start without the EGL library, naming the package that holds it.

    Raises:
        RuntimeError: If libEGL cannot be loaded.
    """
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError as error:
        raise RuntimeError(
            "headless rendering needs the EGL library (libEGL.so.1), which is not installed. On Debian or "
            "Ubuntu: apt-get install libegl1 libgl1 libopengl0 libegl-mesa0. To use another back-end, "
            "set MUJOCO_GL (glfw, osmesa) before starting."
        ) from error


@contextmanager
def quiet_import() -> Iterator[None]:
    """Silence what simulators say while they are imported: macro files, escape sequences, deprecations."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class CameraRig:
    """The cameras of one environment, rendered off screen, upright for a person.

    The context is made at the first frame, so that an environment that never shows one costs nothing.
    """

    def __init__(
        self,
        model: MjModel,
        data: MjData,
        cameras: Mapping[str, str],
        frame_size: int,
        *,
        hidden_groups: tuple[int, ...] = (),
    ) -> None:
        """Look at a simulation.

        Args:
            model: Compiled model, with its profile applied.
            data: The simulation's state; must be up to date when frames are asked for.
            cameras: Name in the observation -> name in the simulator; the first is used for videos.
            frame_size: Height and width in pixels.
            hidden_groups: Geometry groups that are not shown (collision shapes).
        """
        if frame_size < 8:
            raise ValueError(f"frame_size must be at least 8 pixels, got {frame_size}")
        self._model, self._data = model, data
        self._cameras, self._frame_size = dict(cameras), frame_size
        self._hidden_groups = hidden_groups
        self._renderer: Any = None

    def frames(self) -> dict[str, np.ndarray]:
        """Render every camera, {name: uint8 [h w 3]}."""
        return {name: self._render(camera) for name, camera in self._cameras.items()}

    def frame(self) -> np.ndarray:
        """Render the first camera, uint8 [h w 3]."""
        return self._render(next(iter(self._cameras.values())))

    def close(self) -> None:
        """Free the rendering context now: left to the interpreter's exit, it ends in an EGL traceback."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _render(self, camera: str) -> np.ndarray:
        import mujoco

        if self._renderer is None:
            self._open(mujoco)
        self._renderer.update_scene(self._data, camera, self._options)
        return self._renderer.render()  # mujoco.Renderer has already turned OpenGL's rows the right way up

    def _open(self, mujoco: ModuleType) -> None:
        screen = self._model.vis.global_
        screen.offwidth = max(screen.offwidth, self._frame_size)
        screen.offheight = max(screen.offheight, self._frame_size)
        self._options = mujoco.MjvOption()
        for group in self._hidden_groups:
            self._options.geomgroup[group] = 0
        self._renderer = mujoco.Renderer(self._model, self._frame_size, self._frame_size)
