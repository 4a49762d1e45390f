"""Perturbations of LIBERO at evaluation, with the names and the axes of LIBERO-plus (arXiv 2510.13626).

Ranges of camera, robot and noise are those of its task lists; textures, lights and words are our own, because
its package brings neither its assets nor its light files. An episode's seed decides everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

if TYPE_CHECKING:
    from envs.libero import LiberoEnv

AXES = ("none", "camera", "robot", "light", "background", "noise", "language", "layout")
STREAM = 3  # separates the random numbers of perturbations from the reset's and the layout's
CAMERA, SEEN = "agentview", "image"  # the scene camera and its name in observations; the wrist's is as it was
TURN, CLIMB, FARTHER, TILT = np.radians(75.0), np.radians(15.0), 1.0, np.radians(10.0)
"""Largest turn about the vertical through the scene with its climb, share of the distance added, own tilt."""

BENT = 0.5  # rad; norm of the largest change of the arm's joints
ROBOT_TRIES, HAND_ABOVE = 50, 0.05  # postures that are drawn; m that a hand stays above the table
BRIGHTER, TINTED, LIGHT_TURN = 0.7, 0.5, np.radians(45.0)  # largest change of intensity, colour, direction
SURFACES = ("floorplane", "walls_mat", "table_texture", "living_room_table", "desk")
"""Materials of the floor, the walls and the tables."""

LAYOUT_RADIUS = 0.3  # m that an object may be moved at full strength
VERBS = {
    r"\bpick up\b": ("take", "grab", "lift", "fetch"),
    r"\bplace it\b": ("put it", "set it", "lay it", "put it down"),
    r"\bput\b": ("place", "set", "lay", "bring"),
    r"\bopen\b": ("pull open", "slide open"),
    r"\bclose\b": ("shut", "push shut"),
    r"\bturn on\b": ("switch on", "start"),
    r"\bturn off\b": ("switch off", "stop"),
    r"\bpush\b": ("slide", "move", "shove"),
    r"\bstack\b": ("pile", "put"),
}
FRAMES = (
    "please {}",
    "could you {}",
    "your task is to {}",
    "i would like you to {}",
    "the next thing to do: {}",
)
ASIDES = (
    "{}, and leave everything else where it is",
    "there may be other things around; {}",
    "guests are coming soon, so {}",
    "{}, take the time that is needed",
)


def check(axis: str, strength: float, suite: str) -> None:
    """Refuse an axis or a strength that does not exist, or is not there for a suite.

    Raises:
        ValueError: Says what is expected.
    """
    from envs import LIBERO_SUITES

    if axis not in AXES:
        raise ValueError(f"perturbation: expected one of {', '.join(AXES)}; got {axis!r}.")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"perturbation_strength: expected a number in (0, 1]; got {strength}.")
    if axis != "none" and not suite.startswith("libero_"):
        raise ValueError(f"perturbation={axis}: expected one of LIBERO's suites; got {suite!r}.")
    if axis == "layout" and suite not in LIBERO_SUITES:
        raise ValueError(
            f"perturbation=layout: expected one of {', '.join(LIBERO_SUITES)}, whose instructions say what "
            f"has to stay; got {suite!r}."
        )


def prompts(suite: str, axis: str, strength: float) -> list[str]:
    """Return every instruction that an episode of a suite can have; refuses as `check`."""
    import envs

    check(axis, strength, suite)
    own = [task.instruction for task in envs.tasks(suite)]
    return [text for one in own for text in rephrasings(one, strength)] if axis == "language" else own


@cache
def rephrasings(instruction: str, strength: float) -> tuple[str, ...]:
    """Return other words for an instruction: verbs, from 1/3 on a polite frame, from 2/3 on an aside, too."""
    texts = []
    for number in range(max(map(len, VERBS.values()))):
        text = instruction
        for pattern, words in VERBS.items():
            text = re.sub(pattern, words[number % len(words)], text)
        texts.append(text)
    frames = FRAMES if strength > 1 / 3 or instruction in texts else ("{}",)
    asides = ASIDES if strength > 2 / 3 else ("{}",)
    every = [aside.format(frame.format(text)) for text, frame, aside in product(texts, frames, asides)]
    return tuple(dict.fromkeys(every))


class Perturbation:
    """One axis of one episode: what it changes in an environment, until `undo`."""

    def __init__(self, env: LiberoEnv, axis: str, strength: float, seed: int) -> None:
        """Change the environment's model or instruction; for `layout` see `options`."""
        check(axis, strength, env.task.suite)
        self._env, self._axis, self._strength = env, axis, strength
        self._rng = np.random.default_rng((seed, STREAM, AXES.index(axis)))
        self._saved: list[tuple[np.ndarray, np.ndarray]] = []  # arrays of the model, and what they held
        self._textures: list[int] = []
        self._corrupt: Callable[[np.ndarray], np.ndarray] | None = None
        match axis:
            case "camera":
                self._move_camera()
            case "light":
                self._change_light()
            case "background":
                self._change_background()
            case "noise":
                size = env.frame_size
                kind = NOISES[int(self._rng.integers(len(NOISES)))]
                self._corrupt = kind(size, self._magnitude(), self._rng)
            case "language":
                texts = rephrasings(env.task.instruction, strength)
                env.task_description = texts[int(self._rng.integers(len(texts)))]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the reset that the axis sets."""
        if self._axis != "layout":
            return {}
        return {"layout": "random", "layout_radius": LAYOUT_RADIUS * self._strength}

    def undo(self) -> None:
        """Put everything back that is no part of a reset."""
        for array, values in self._saved:
            array[...] = values
        self._upload()
        self._env.task_description = self._env.task.instruction

    def start(self) -> None:
        """Change the arm's posture (`robot`), before the first step of an episode."""
        if self._axis == "robot":
            self._bend_arm()

    def frames(self, pixels: dict[str, np.ndarray]) -> None:
        """Replace the scene camera's frame [h w 3] by a corrupted one (`noise`)."""
        if self._corrupt is not None and SEEN in pixels:
            pixels[SEEN] = self._corrupt(pixels[SEEN])

    def _magnitude(self) -> float:
        """Return a share of an axis's largest change: half of the strength to all of it."""
        return self._strength * float(self._rng.uniform(0.5, 1.0))

    def _signed(self) -> float:
        return float(self._rng.choice([-1.0, 1.0])) * self._magnitude()

    def _change(self, array: np.ndarray, values: Any) -> None:
        self._saved.append((array, array.copy()))
        array[...] = values

    def _move_camera(self) -> None:
        """Turn the camera about the scene, take it farther away, or tilt it where it is."""
        model = self._env.model
        index = model.camera(CAMERA).id
        place = np.array(model.cam_pos[index])
        turned = Rotation.from_quat(np.array(model.cam_quat[index]), scalar_first=True)
        middle = looked_at(place, turned, float(self._env.raw.workspace_offset[2]))
        match int(self._rng.integers(3)):
            case 0:
                about = Rotation.from_euler("z", TURN * self._signed())
                climb = self._rng.integers(2) * CLIMB * self._magnitude()
                about *= Rotation.from_rotvec(-climb * turned.apply([1.0, 0.0, 0.0]))
                place, turned = middle + about.apply(place - middle), about * turned
            case 1:
                place = middle + (1.0 + FARTHER * self._magnitude()) * (place - middle)
            case _:
                turned *= Rotation.from_euler("xy", [TILT * self._signed(), TILT * self._signed()])
        self._change(model.cam_pos[index], place)
        self._change(model.cam_quat[index], turned.as_quat(scalar_first=True))

    def _change_light(self) -> None:
        """Make the lights brighter or darker, tint them and turn them."""
        model, rng = self._env.model, self._rng
        gain, tint = 1.0 + BRIGHTER * self._signed(), 1.0 - TINTED * self._magnitude() * rng.random(3)
        self._change(model.light_diffuse, model.light_diffuse * gain * tint)
        head = model.vis.headlight
        self._change(head.ambient, head.ambient * gain * tint)
        self._change(head.diffuse, head.diffuse * gain * tint)
        heading = rng.uniform(-np.pi, np.pi)
        axis = np.array([np.cos(heading), np.sin(heading), 0.0])
        turn = Rotation.from_rotvec(LIGHT_TURN * self._magnitude() * axis)
        self._change(model.light_dir, turn.apply(np.array(model.light_dir)))

    def _change_background(self) -> None:
        """Blend the textures of floor, walls and table with others of LIBERO's own."""
        model = self._env.model
        known = [model.mat(index).name for index in range(model.nmat)]
        for name in SURFACES:
            if name not in known:
                continue
            texture = int(model.mat_texid[model.mat(name).id].max())
            height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
            shape = height, width, int(model.tex_nchannel[texture])
            first = int(model.tex_adr[texture])
            data = model.tex_data[first : first + int(np.prod(shape))].reshape(shape)
            files = texture_files()
            other = load_texture(files[int(self._rng.integers(len(files)))], width, height)
            share = self._magnitude()
            self._change(data, ((1 - share) * data + share * other).round().astype(np.uint8))
            self._textures.append(texture)
        self._upload()

    def _upload(self) -> None:
        if self._env.camera_rig is not None:
            self._env.camera_rig.upload_textures(self._textures)

    def _bend_arm(self) -> None:
        """Change the arm's joints by a random vector, until the arm touches nothing."""
        raw, data = self._env.raw, self._env.data
        robot = raw.robots[0]
        joints = list(robot._ref_joint_pos_indexes)
        before = np.array(data.qpos[joints])
        norm = BENT * self._magnitude()
        for _ in range(ROBOT_TRIES):
            way = self._rng.standard_normal(len(joints))
            data.qpos[joints] = before + norm * way / np.linalg.norm(way)
            raw.sim.forward()
            if not self._arm_touches():
                break
        else:
            raise RuntimeError(f"no posture {norm:.2f} rad away is free in {self._env.task.name}")
        # The controller's null space pulls to the new posture, as if the robot had been built with it.
        robot.controller.update_initial_joints(np.array(data.qpos[joints]))
        robot.controller.reset_goal()

    def _arm_touches(self) -> bool:
        model, data = self._env.model, self._env.data
        hand = data.site_xpos[self._env.raw.robots[0].eef_site_id]
        if hand[2] < self._env.raw.workspace_offset[2] + HAND_ABOVE:
            return True
        owners = model.geom_bodyid[data.contact.geom[: data.ncon]]  # [n 2]
        names = [{model.body(body).name.partition("_")[0] for body in pair} for pair in owners]
        return any("robot0" in pair or "gripper0" in pair for pair in names)


def looked_at(place: np.ndarray, turned: Rotation, height: float) -> np.ndarray:
    """Return the point [3] of a height that is in the middle of a camera's view."""
    ahead = turned.apply([0.0, 0.0, -1.0])
    return place + (height - place[2]) / ahead[2] * ahead


@cache
def texture_files() -> list[Path]:
    """Return LIBERO's textures of floors, walls and tables."""
    from libero.libero import get_libero_path

    return sorted((Path(get_libero_path("assets")) / "textures").glob("*.png"))


@cache
def load_texture(path: Path, width: int, height: int) -> np.ndarray:
    """Return a texture, uint8 [h w 3]."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((width, height)))


type Corruption = Callable[[np.ndarray], np.ndarray]
"""Function of frames uint8 [h w 3] -> [h w 3], the same for all frames of an episode."""


def motion_blur(size: int, magnitude: float, rng: np.random.Generator) -> Corruption:
    """Return the mean over a motion of up to an eighth of the frame, at most 45 degrees from the level."""
    angle, length = rng.uniform(-np.pi / 4, np.pi / 4), magnitude * size / 8
    steps = np.linspace(-length / 2, length / 2, max(2, int(np.ceil(length))))
    shifts = np.stack([steps * np.sin(angle), steps * np.cos(angle)], axis=1).round().astype(int)
    pad = int(np.abs(shifts).max())

    def blur(frame: np.ndarray) -> np.ndarray:
        wide = np.pad(frame, ((pad, pad), (pad, pad), (0, 0)), mode="edge").astype(np.float32)
        moved = [wide[pad + y : pad + y + size, pad + x : pad + x + size] for y, x in shifts]
        return np.mean(moved, axis=0).round().astype(np.uint8)

    return blur


def gaussian_blur(size: int, magnitude: float, rng: np.random.Generator) -> Corruption:
    """Return a blur with a deviation of up to 10 of 256 pixels."""
    sigma = 10 / 256 * size * magnitude
    return lambda frame: gaussian_filter(frame, (sigma, sigma, 0))


def zoom_blur(size: int, magnitude: float, rng: np.random.Generator) -> Corruption:
    """Return the mean over a zoom of up to 1.56."""
    middle = (size - 1) / 2
    scales = np.linspace(1.0, 1.0 + 0.56 * magnitude, 12)
    places = [(middle + (np.arange(size) - middle) / scale).round().astype(int) for scale in scales]
    return lambda frame: (
        np.mean([frame[place][:, place] for place in places], axis=0).round().astype(np.uint8)
    )


def fog(size: int, magnitude: float, rng: np.random.Generator) -> Corruption:
    """Return a mix with a bright cloudy field, up to nine tenths of it."""
    field = sum(
        gaussian_filter(rng.standard_normal((size, size)), size / 2**octave, mode="wrap") * size / 2**octave
        for octave in (2, 3, 4, 5)
    )
    field = (field - np.min(field)) / np.ptp(field)
    share = 0.9 * magnitude * (0.5 + 0.5 * field)[..., None]
    return lambda frame: ((1 - share) * frame + share * 230).round().astype(np.uint8)


def glass_blur(size: int, magnitude: float, rng: np.random.Generator) -> Corruption:
    """Return a frame whose pixels come from up to 8 of 256 pixels away."""
    reach = max(1, round(8 / 256 * size * magnitude))
    rows, columns = np.indices((size, size)) + rng.integers(-reach, reach + 1, (2, size, size))
    rows, columns = rows.clip(0, size - 1), columns.clip(0, size - 1)
    return lambda frame: gaussian_filter(frame[rows, columns], (0.5, 0.5, 0))


NOISES = (motion_blur, gaussian_blur, zoom_blur, fog, glass_blur)
"""LIBERO-plus' kinds of sensor noise."""
