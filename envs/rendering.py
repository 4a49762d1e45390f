"""Rendering: profiles, the EGL set-up, and the cameras of an environment."""

from __future__ import annotations

import atexit
import ctypes
import importlib.metadata
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import batched
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

MUJOCO_VERSION = "3.3.7"

UNSEEN_GROUP = 5  # of shapes outside a camera's view; robosuite, LIBERO and Meta-World leave it empty

BATCH = 32  # states whose frames are drawn before the first pixel is read
MAX_CAMERAS = 4  # for which a batch has room

MjModel = MjData = Any  # mujoco is a compiled module without type stubs

_OF_THREAD = threading.local()


@dataclass(frozen=True)
class Profile:
    """Rendering quality."""

    shadows: bool
    reflections: bool
    samples: int | None  # per pixel (anti-aliasing); None keeps the scene's own


PROFILES = {
    "full": Profile(shadows=True, reflections=True, samples=None),
    "fast": Profile(shadows=False, reflections=False, samples=0),
}


def profile(name: str) -> Profile:
    """Return a rendering profile by name; a ValueError lists the known ones."""
    if name not in PROFILES:
        from vega_policy.config import unknown_name  # needed by an error alone

        raise unknown_name("rendering profile", name, PROFILES)
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


def load_mujoco() -> Any:
    """Import mujoco, set up for headless rendering unless the user chose otherwise with MUJOCO_GL.

    Raises:
        RuntimeError: If mujoco is missing or of another version than the simulators need, EGL is missing, or
            the environment's variables name no back-end or device.
    """
    check_mujoco_version()
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    if _uses_egl():
        check_egl()
    with explained_back_end(), quiet_import():
        import mujoco
        import mujoco.gl_context

        if _uses_egl():  # mujoco keeps its own default if it was imported before EGL was chosen here
            from mujoco.egl import GLContext, egl_ext

            mujoco.GLContext = mujoco.gl_context.GLContext = GLContext
            if chosen := os.environ.get("MUJOCO_EGL_DEVICE_ID"):
                _check_device(chosen, len(egl_ext.eglQueryDevicesEXT()))
    return mujoco


def _check_device(chosen: str, count: int) -> None:
    """Refuse a device that MuJoCo would refuse at the first frame, which may be in another process."""
    if not (chosen.isdecimal() and int(chosen) < count):
        raise ValueError(f"MUJOCO_EGL_DEVICE_ID: expected a number from 0 to {count - 1}")


@contextmanager
def explained_back_end() -> Iterator[None]:
    """Turn errors of rendering back-ends, which are of many types, into one that names their settings.

    Raises:
        RuntimeError: Says what the variables are and what to do.
    """
    try:
        yield
    except Exception as error:  # ImportError, AttributeError, GLError, ...: each driver has its own
        names = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM", "CUDA_VISIBLE_DEVICES")
        chosen = ", ".join(f"{name}={os.environ[name]!r}" for name in names if name in os.environ)
        raise RuntimeError(
            f"rendering cannot start with {chosen or 'no variable set'} ({type(error).__name__}: {error}). "
            "Expected MUJOCO_GL to be egl, osmesa or glfw; leave the other variables out, or try vega-doctor."
        ) from error


def _uses_egl() -> bool:
    return os.environ.get("MUJOCO_GL", "").lower() == "egl"


def check_mujoco_version() -> None:
    """Refuse any mujoco but the one on which robosuite, LIBERO and Meta-World all run unpatched."""
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


def check_package(needs: str, package: str, version: str, extra: str) -> None:
    """Require this version of a simulator's package; `needs` begins the message ("the LIBERO suites need").

    Raises:
        RuntimeError: If another version is installed, or none; it names the extra that installs it.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != version:
        raise RuntimeError(
            f"{needs} {package} {version}, found {found}; install it with: "
            f"pip install 'lerobot_policy_vega[{extra}]'"
        )


def check_egl() -> None:
    """Raise a RuntimeError that names the packages to install if the EGL library is missing."""
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
    """Silence the simulators' warnings at import: macro files, escape sequences, deprecations."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class CameraRig:
    """The cameras of one environment, rendered off screen; the model is changed to follow the profile.

    The context is created at the first frame. Without shadows and reflections, shapes outside a camera's view
    are not drawn: the image is the same, and a software renderer transforms a fraction of the robot's 170,000
    triangles.

    Args:
        model: Compiled model.
        data: The simulation's state; must be up to date when frames are rendered.
        cameras: Name in the observation -> name in the simulator; the first is used for videos.
        frame_size: Height and width in pixels, at least 8.
        rendering: Rendering profile.
        hidden_groups: Geometry groups that are not drawn (collision shapes).
        flipped: Axes along which upright images are flipped: (1,) mirrors them left to right, (0, 1) rotates
            them by 180 degrees.
    """

    def __init__(
        self,
        model: MjModel,
        data: MjData,
        cameras: Mapping[str, str],
        *,
        frame_size: int,
        rendering: Profile,
        hidden_groups: tuple[int, ...] = (),
        flipped: tuple[int, ...] = (),
    ) -> None:
        if frame_size < 8:
            raise ValueError(f"frame_size must be at least 8 pixels, got {frame_size}")
        apply_profile(model, rendering)
        self._model, self._data, self._frame_size = model, data, frame_size
        self.cameras = {name: model.camera(camera).id for name, camera in cameras.items()}
        self._hidden_groups, self._flipped = hidden_groups, flipped
        self.culls = not (model.light_castshadow.any() or model.mat_reflectance.any())
        self._screen: _Screen | None = None

    def frames(self) -> dict[str, np.ndarray]:
        """Render every camera, {name: uint8 [h w 3]}."""
        return {name: self._render(camera) for name, camera in self.cameras.items()}

    def frame(self) -> np.ndarray:
        """Render the first camera, uint8 [h w 3]."""
        return self._render(next(iter(self.cameras.values())))

    def render_states(
        self, states: Iterable[np.ndarray], restore: Callable[[np.ndarray], None]
    ) -> Iterator[np.ndarray]:
        """Render every camera at each state; yield uint8 [t v h w 3] for up to `BATCH` states at a time.

        The pixels are those of `frames`, but a GPU copies them aside while it draws the next ones, and this
        process waits once a batch instead of once a frame: a GPU that several processes share changes
        between them less often.
        """
        screen = self._opened_screen()
        for batch in batched(states, BATCH):
            screen.make_current()
            for state in batch:
                restore(state)
                for camera in self.cameras.values():
                    with self._culled(camera):
                        screen.enqueue(self._data, camera)
            frames = screen.collect()  # [t*v h w 3]
            frames = np.flip(frames, [axis + 1 for axis in self._flipped])
            yield frames.reshape(len(batch), len(self.cameras), *frames.shape[1:])

    def upload_textures(self, indices: Iterable[int]) -> None:
        """Have the next frames show what the model's textures hold now."""
        if self._screen is not None:
            self._screen.upload_textures(indices)

    def close(self) -> None:
        """Free the rendering context now: left to the interpreter's exit, it ends in an EGL traceback."""
        if self._screen is not None:
            atexit.unregister(self._screen.close)
            self._screen.close()
            self._screen = None

    def _render(self, camera: int) -> np.ndarray:
        screen = self._opened_screen()
        with self._culled(camera):
            frame = screen.draw(self._data, camera)
        return np.ascontiguousarray(np.flip(frame, self._flipped)) if self._flipped else frame

    def _opened_screen(self) -> _Screen:
        if self._screen is None:
            self._screen = _Screen(self._model, self._frame_size, self._hidden_groups)
            atexit.register(self._screen.close)  # for callers who forget: before EGL itself shuts down
        return self._screen

    @contextmanager
    def _culled(self, camera: int) -> Iterator[None]:
        """Move shapes outside the view of a camera to a group that is not drawn, where that is exact."""
        groups = self._model.geom_group.copy()
        if self.culls:
            self._model.geom_group[out_of_view(self._model, self._data, camera)] = UNSEEN_GROUP
        try:
            yield
        finally:
            self._model.geom_group[:] = groups


def _gl_context() -> Any:
    """Return the OpenGL context of this thread, in which each environment has buffers of its own.

    A context for each environment would compile the driver's shaders again (0.3 s with a software renderer),
    and a GPU would change between them.
    """
    context = getattr(_OF_THREAD, "context", None)
    if context is None:
        context = _OF_THREAD.context = load_mujoco().GLContext(8, 8)  # drawn into are buffers alone
        atexit.register(context.free)  # before EGL itself shuts down
    return context


class _Screen:
    """An off-screen buffer in its OpenGL context."""

    def __init__(self, model: MjModel, size: int, hidden_groups: tuple[int, ...]) -> None:
        mujoco = load_mujoco()
        self._mujoco, self._model = mujoco, model
        model.vis.global_.offwidth = model.vis.global_.offheight = size  # the buffer has the frame's size
        with explained_back_end():
            self._context = _gl_context()
            self._context.make_current()
            self._buffer = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        # multisampled frames have to be resolved first
        self._copies_aside = not self._buffer.offSamples and _has_pixel_buffers()
        self._pixels: _PixelBuffer | None = None
        self._drawn: list[np.ndarray] = []  # enqueued frames where pixels cannot be copied aside
        self._options = mujoco.MjvOption()
        for group in (*hidden_groups, UNSEEN_GROUP):
            self._options.geomgroup[group] = 0

    def draw(self, data: MjData, camera: int) -> np.ndarray:
        """Render a camera, uint8 [h w 3]."""
        self.make_current()
        self._render(data, camera)
        frame = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        self._mujoco.mjr_readPixels(frame, None, self._viewport, self._buffer)
        return np.ascontiguousarray(frame[::-1])  # OpenGL's first row is the lowest

    def make_current(self) -> None:
        """Make this screen's context the one that OpenGL draws into."""
        self._context.make_current()

    def upload_textures(self, indices: Iterable[int]) -> None:
        """Copy textures of the model into the context."""
        self.make_current()
        for index in indices:
            self._mujoco.mjr_uploadTexture(self._model, self._buffer, index)

    def enqueue(self, data: MjData, camera: int) -> None:
        """Render a camera without waiting for its pixels; the context must be current."""
        if not self._copies_aside:
            self._drawn.append(self.draw(data, camera))
            return
        if self._pixels is None:
            self._pixels = _PixelBuffer(self._viewport.width, BATCH * MAX_CAMERAS)
        self._render(data, camera)
        self._pixels.copy_frame()

    def collect(self) -> np.ndarray:
        """Return the enqueued frames in order, uint8 [n h w 3]."""
        if self._pixels is not None:
            return self._pixels.take()[:, ::-1, :, :3]
        frames, self._drawn = np.stack(self._drawn), []
        return frames

    def _render(self, data: MjData, camera: int) -> None:
        mujoco = self._mujoco
        self._camera.fixedcamid = camera
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._buffer)
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._buffer)

    def close(self) -> None:
        """Free the buffer, in its context: ids are shared by all contexts."""
        self._context.make_current()
        if self._pixels is not None:
            self._pixels.free()
        self._buffer.free()


def _has_pixel_buffers() -> bool:
    """Return whether PyOpenGL finds pixel buffer objects, which are in libOpenGL or libGL."""
    try:
        from OpenGL import GL

        return _uses_egl() and bool(GL.glGenBuffers)
    except (ImportError, AttributeError, OSError) as error:
        logger.warning(
            "every frame is waited for, which is slow on a GPU: PyOpenGL does not work (%s)", error
        )
        return False


class _PixelBuffer:
    """Copies of rendered frames in memory of OpenGL, a pixel buffer object, read all at once.

    Pixels are RGBA as in MuJoCo's off-screen buffer: some drivers convert other formats on the CPU, at once.
    """

    def __init__(self, size: int, capacity: int) -> None:
        from OpenGL import GL

        self._gl, self._size, self._count = GL, size, 0
        self._buffer = GL.glGenBuffers(1)
        with self._bound():
            GL.glBufferData(GL.GL_PIXEL_PACK_BUFFER, capacity * 4 * size**2, None, GL.GL_STREAM_READ)

    def copy_frame(self) -> None:
        """Copy the frame that has been rendered last, once the GPU is done with it."""
        gl, size = self._gl, self._size
        place = ctypes.c_void_p(self._count * 4 * size**2)
        with self._bound():
            gl.glReadPixels(0, 0, size, size, gl.GL_RGBA, gl.GL_UNSIGNED_BYTE, place)
        self._count += 1

    def take(self) -> np.ndarray:
        """Wait for the copies and return them, lowest row first, uint8 [n h w 4]."""
        gl, frames = self._gl, np.empty((self._count, self._size, self._size, 4), np.uint8)
        with self._bound():
            gl.glGetBufferSubData(gl.GL_PIXEL_PACK_BUFFER, 0, frames.nbytes, frames)
        self._count = 0
        return frames

    def free(self) -> None:
        """Free the memory; the context must be current."""
        self._gl.glDeleteBuffers(1, [self._buffer])

    @contextmanager
    def _bound(self) -> Iterator[None]:
        """Bind the buffer; MuJoCo's own reading requires that none is bound."""
        self._gl.glBindBuffer(self._gl.GL_PIXEL_PACK_BUFFER, self._buffer)
        try:
            yield
        finally:
            self._gl.glBindBuffer(self._gl.GL_PIXEL_PACK_BUFFER, 0)


def out_of_view(model: MjModel, data: MjData, camera: int) -> np.ndarray:
    """Return which shapes have bounding boxes outside the view of a camera's square frame, bool [geoms].

    Unbounded shapes (planes) are never out of view.
    """
    half_angle = np.radians(model.cam_fovy[camera]) / 2
    sides = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]) * np.cos(half_angle)
    normals = np.column_stack([sides, np.full(4, np.sin(half_angle))])  # outward; the camera looks along -z
    normals = data.cam_xmat[camera].reshape(3, 3) @ normals.T  # [3 sides], in the world
    axes = data.geom_xmat.reshape(-1, 3, 3)
    centre = data.geom_xpos + np.einsum("gij,gj->gi", axes, model.geom_aabb[:, :3])
    reach = np.einsum("gj,gjs->gs", model.geom_aabb[:, 3:], np.abs(np.einsum("gij,is->gjs", axes, normals)))
    distance = (centre - data.cam_xpos[camera]) @ normals - reach  # [geoms sides]
    return (distance.max(axis=1) > 0) & (model.geom_rbound > 0)
