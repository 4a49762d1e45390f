"""`vega-render`: render demonstrations from simulator states, at any frame size and rendering profile."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vega_policy.cli import Command

logger = logging.getLogger(__name__)

FIELDS = """
source: ??? # a dataset of vega-collect and the new folder, or files of states (*.safetensors; repeats count)
root: null # folder of the new dataset
frame_size: 256 # height and width in pixels
rendering: full # or fast: no shadows, reflections or anti-aliasing
processes: 2 # renderers, one a process; they change the time it takes, never the frames
video: null # of a dataset: lossless or h264; null: as the source
repo_id: null # of files of states: LeRobot's name of the new dataset, such as vega/libero_object
cache_root: outputs/cache # of files of states: the training's dataset.cache_root, which receives the frames
tasks: null # of files of states: indices of tasks of each file, such as [0,1]; null takes all
episodes_per_task: null # of files of states: first ones of each task; null takes all
frame_stride: 1 # of files of states: only every k-th state of an episode is rendered (dataset.frame_stride)
reuse: [] # of files of states: datasets rendered before from states, whose frames are copied
displacement: false # of files of states: true stores where the target is in each frame (policy.displacement)
egl_devices: [] # of files of states: GPUs over which the processes are spread, such as [0,1]
"""


@partial(
    Command,
    config="render",
    examples=[
        "vega-render outputs/demonstrations/libero_spatial NEW_FOLDER frame_size=128 rendering=fast",
        "vega-render assets/demonstrations/libero/libero_object.safetensors root=NEW_FOLDER "
        "repo_id=vega/libero_object frame_size=128 rendering=fast processes=16",
    ],
    fields=FIELDS,
    positional=("source...",),
)
def render(config: DictConfig) -> str:
    """Render demonstrations from their simulator states, without simulating again.

    A dataset of vega-collect becomes one with other videos. Files of states become one dataset without
    videos and the training's cache of its frames. The same command resumes after an interruption.
    """
    values = cast(dict[str, Any], OmegaConf.to_container(config))
    source = values.pop("source")
    sources = [Path(name) for name in (source if isinstance(source, list) else [source])]
    logger.info("rendering %s", sources[0] if len(sources) == 1 else f"{len(sources)} files")
    if all(path.suffix == ".safetensors" for path in sources):
        del values["video"]
        return render_states(sources, **values)
    if values["root"] is None and len(sources) == 2:
        values["root"] = sources.pop()
    if values["root"] is None or len(sources) != 1:
        held = sources[0].is_dir() and any(sources[0].glob("*.safetensors"))
        hint = f"; name the files of that folder: {sources[0]}/*.safetensors" if held else ""
        raise ValueError(
            f"expected a dataset and a new folder, or files of states (*.safetensors); got {source}{hint}"
        )
    render_again = import_module("envs.demos.collect").render_again
    options = {name: values[name] for name in ("frame_size", "rendering", "video", "processes")}
    metadata = render_again(sources[0], Path(values["root"]), **options)
    return f"{len(metadata['episodes'])} demonstrations of {config.frame_size} pixels: {values['root']}"


def render_states(
    files: list[Path],
    *,
    root: str | Path | None,
    repo_id: str | None,
    cache_root: str | Path,
    frame_size: int,
    rendering: str,
    processes: int = 2,
    tasks: list[int] | None = None,
    episodes_per_task: int | None = None,
    frame_stride: int = 1,
    reuse: list[str] | None = None,
    displacement: bool = False,
    egl_devices: list[int] | None = None,
) -> str:
    """Make one dataset without videos of files of states, and its frames in the training's cache.

    Raises:
        ValueError: If a field is missing, a file does not fit, or `root` holds another dataset.
        RuntimeError: If a rendering process dies; the same call resumes.
    """
    from vega_policy.data import feature_cache

    if root is None or repo_id is None:
        raise ValueError("files of states are rendered into a dataset: add root=FOLDER repo_id=ORG/NAME")
    states, root, cache_root = import_module("envs.demos.render"), Path(root), Path(cache_root)
    start = time.perf_counter()
    chosen = {"tasks": tasks, "episodes_per_task": episodes_per_task}
    chosen |= {"frame_stride": frame_stride, "displacement": displacement}
    plan, values = states.plan_rendering(files, frame_size=frame_size, rendering=rendering, **chosen)
    _write_dataset(states, plan, values, root, repo_id, processes)
    plan = states.with_sources(
        plan, _rendered_before(states, [Path(one) for one in reuse or []], plan, cache_root)
    )
    stream = _frames_stream(root, repo_id, plan)
    if not (cache_root / stream.folder).exists():
        with feature_cache.draft_frames(cache_root, stream, plan.rows) as draft:
            draft.sums = states.render_frames(
                plan, draft.values, draft.notes, processes=processes, egl_devices=egl_devices or ()
            )
    seconds = time.perf_counter() - start
    return (
        f"{len(plan.episodes)} demonstrations, {plan.rows} states, {plan.rows * len(plan.cameras)} frames of "
        f"{frame_size} pixels in {seconds:.1f} s: {root}, {cache_root / stream.folder}"
    )


def _write_dataset(
    states: Any, plan: Any, values: list[dict[str, Any]], root: Path, repo_id: str, processes: int
) -> None:
    """Write the dataset unless it is there; another one is refused."""
    from vega_policy.data.dataset_files import DISPLACEMENT, LowDimensionalEpisode, write_state_dataset
    from vega_policy.run_dir import atomic_folder, lock_draft, require_folder

    require_folder(root)
    if not root.exists():
        with lock_draft(root), atomic_folder(root) as draft:
            episodes = [LowDimensionalEpisode(**value) for value in values]
            if DISPLACEMENT in plan.features:
                found = states.find_displacements(plan, processes)
                pairs = zip(episodes, found, strict=True)
                episodes = [replace(episode, displacement=way) for episode, way in pairs]
            write_state_dataset(draft, episodes, plan.features, fps=plan.fps, robot_type=plan.robot_type)
            states.write_origin(draft, plan, repo_id)
    expected, found = states.origin(plan, repo_id), states.read_origin(root)
    if found is None or {name: found[name] for name in expected} != expected:
        got = "a dataset that is not of states" if found is None else _describe_origin(found)
        raise ValueError(
            f"{root} holds something else than these states rendered so: expected "
            f"{_describe_origin(expected)}, got {got}; give another root=FOLDER"
        )


def _describe_origin(origin: dict[str, Any]) -> str:
    settings = " ".join(f"{name}={value}" for name, value in origin["settings"].items())
    return f"{len(origin['episodes'])} episodes with {settings}"


def _frames_stream(root: Path, repo_id: str, plan: Any) -> Any:
    from vega_policy.data.dataset_files import fingerprint_frames
    from vega_policy.data.feature_cache import frames_stream

    key = {"repo_id": repo_id, **fingerprint_frames(root)}
    return frames_stream(key, plan.cameras, plan.frame_size, stride=plan.frame_stride)


def _rendered_before(
    states: Any, roots: list[Path], plan: Any, cache_root: Path
) -> dict[str, tuple[Path, int]]:
    """Return where frames that were rendered in the same way lie, (file, first row) by episode."""
    from vega_policy.data.feature_cache import VALUES

    places = {}
    for root in roots:
        found = states.read_origin(root)
        wanted = {name: getattr(plan, name) for name in ("frame_size", "rendering", "frame_stride")}
        if found is None or {name: found["settings"].get(name, 1) for name in wanted} != wanted:
            described = " ".join(f"{name}={value}" for name, value in wanted.items())
            raise ValueError(
                f"reuse: expected a dataset of {described} that vega-render made of states; {root} is none"
            )
        file = cache_root / _frames_stream(root, found["settings"]["repo_id"], plan).folder / VALUES
        if not file.is_file():
            raise ValueError(f"reuse: {cache_root} holds no frames of {root}; leave it out")
        row = 0
        for identity in found["episodes"]:
            places[json.dumps(identity)] = file, row
            row += identity[3]
    return places
