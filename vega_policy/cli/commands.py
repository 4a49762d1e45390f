"""The console commands `vega-train`, `vega-eval`, ...; each imports what it runs when it is run."""

import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from vega_policy.cli import Command, generated_groups
from vega_policy.config import check_choice

logger = logging.getLogger(__name__)


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the resolved values of a config as plain dictionaries and lists."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


class SweepTable(Callback):
    """Hydra callback that writes and prints one table of all jobs when a sweep has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write `sweep.json` and `sweep.txt` into the sweep's folder."""
        from vega_policy.training.sweep import write_table

        folder = Path(config.hydra.sweep.dir)
        logger.info("%s\n\nsweep: %s", write_table(folder), folder)


@partial(
    Command,
    config="train",
    examples=[
        "vega-train experiment=demo                                the demo's policy, two CPU cores",
        "vega-train experiment=demo prior=none                     one field changed: an ablation",
        "vega-train dataset.repo_id=ORG/NAME                       a dataset of the hub",
        "vega-train output_dir=outputs/train/RUN resume=true       continue",
        "vega-train dataset.cache=disk stop_after=0 ...            build the cache and stop",
        "vega-train -m experiment=demo fusion=token_gate,add seed=0,1    a sweep, one table",
    ],
)
def train(config: DictConfig) -> str:
    """Train a VEGA-3D policy on a LeRobot dataset. With resume=true an interrupted run continues."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode is RunMode.MULTIRUN:  # each job of a sweep has a folder below output_dir
        config.output_dir = HydraConfig.get().runtime.output_dir
    if os.environ.get("RANK", "0") == "0":  # of the processes of `accelerate launch` the first alone
        what = "building the cache of" if config.stop_after == 0 else "training"
        logger.info("%s %s: loading torch and LeRobot, then the dataset", what, config.output_dir)
    from vega_policy.training.config import from_hydra
    from vega_policy.training.train import train

    outcome = train(from_hydra(config))
    return f"cache: {outcome}" if config.stop_after == 0 else f"checkpoint: {outcome}"


SIZES = {"views": 2, "state_dim": 8, "action_dim": 7}
"""Sizes of LIBERO's data, for the model that `inspect` builds."""


@partial(
    Command,
    config="train",
    examples=[
        "vega-inspect                                              the defaults",
        "vega-inspect experiment=libero_wan +views=1 +state_dim=6",
    ],
    optional=["dataset.repo_id"],
)
def inspect(config: DictConfig) -> str:
    """List parameters, memory, tokens and FLOPs of each part of a policy; no weights are needed."""
    from vega_policy.benchmarks import table
    from vega_policy.model.config import ModelConfig
    from vega_policy.model.sizes import inspect_model, published_sizes, refuse_base
    from vega_policy.training.config import from_hydra

    with open_dict(config):
        sizes = {name: config.pop(name, usual) for name, usual in SIZES.items()}
        if OmegaConf.is_missing(config.dataset, "repo_id"):
            config.dataset.repo_id = "none"
    policy = from_hydra(config).vega
    refuse_base(policy.base)
    parts = {name: getattr(policy, name) for name in ("prior", "fusion", "backbone", "head")}
    model = ModelConfig(**sizes, chunk_size=policy.chunk_size, frame_size=policy.frame_size, **parts)
    sizes["frame_size"] = policy.frame_size
    lines = [", ".join(f"{name} {size}" for name, size in sizes.items())]
    lines.append(table([part.row() for part in inspect_model(model)]))
    published = published_sizes(policy.prior.name)
    if published:
        whole = ", ".join(f"{part} {size:,}" for part, size in published.items())
        lines.append(f"prior {policy.prior.name}, published: {whole}")
    return "\n".join(lines)


@partial(
    Command,
    config="eval",
    examples=[
        "vega-eval checkpoint=outputs/demo/train/checkpoints/last",
        "vega-eval checkpoint=... env=stack episodes_per_task=20 'ablations=[none,blind]'",
        "vega-eval -m machines=slurm shards=8 'shard=range(8)' checkpoint=... env=libero_10",
    ],
)
def evaluate(config: DictConfig) -> str:
    """Evaluate a checkpoint in closed loop. The same command resumes with the missing episodes."""
    logger.info("evaluating %s in %s", config.checkpoint, config.env.suite)
    from vega_policy.evaluation.evaluate import USUAL_FRAMES, evaluate_checkpoint, evaluation_folders
    from vega_policy.evaluation.policies import load_lerobot_policy
    from vega_policy.evaluation.report import format_perturbations, format_summary, list_files

    values = plain(config)
    is_local = values["server"]["url"] is None
    load_policy = load_lerobot_policy if is_local else partial(_connect_policy, values["server"])
    suites = values["env"]["suite"]
    first = suites if isinstance(suites, str) else suites[0]
    usual = generated_groups()["env"].get(first, USUAL_FRAMES)
    summaries = evaluate_checkpoint(values, load_policy, usual)
    folders = evaluation_folders(values)
    parts = [f"{name}\n{format_summary(one)}\n{list_files(folders[name])}" for name, one in summaries.items()]
    if not isinstance(values["env"]["perturbation"], str):
        parts.append(f"{format_perturbations(summaries)}\n{list_files(Path(config.output_dir))}")
    return "\n\n".join(parts)


@partial(
    Command,
    config="evaluate_offline",
    examples=[
        "vega-eval-offline outputs/train/RUN/checkpoints/last           on the run's held-out episodes",
        "vega-eval-offline outputs/train/RUN/checkpoints/last 'episodes=[40,41]'",
        "vega-eval-offline FOLDER root=data/my_arm 'episodes=[0]'       an exported policy",
    ],
    fields="""
checkpoint: ??? # a checkpoint of a run, or an exported policy
root: null # folder of the dataset; null takes the run's
repo_id: null # LeRobot's name of the dataset; null takes the run's
episodes: null # indices; null takes those that the run held out
frames: 512 # evenly spaced frames that are evaluated
device: null # cpu, cuda, ...; null takes the best there is
output_dir: outputs/open_loop # for open_loop.json and open_loop.png
""",
    positional=("checkpoint",),
)
def evaluate_offline(config: DictConfig) -> str:
    """Compare a checkpoint's actions with recorded ones, joint by joint; no robot or simulator is needed."""
    logger.info("evaluating %s on recorded episodes", config.checkpoint)
    from vega_policy.checkpoints import find_checkpoint
    from vega_policy.evaluation.open_loop import evaluate_open_loop
    from vega_policy.evaluation.policies import choose_device, load_lerobot_policy

    values, folder = plain(config), find_checkpoint(Path(config.checkpoint))
    policy = load_lerobot_policy(folder, device=choose_device(config.device))
    data = {name: values[name] for name in ("root", "repo_id", "episodes")}
    errors = evaluate_open_loop(policy, folder, Path(config.output_dir), frames=config.frames, **data)
    output = Path(config.output_dir)
    return f"{errors.table()}\nerrors: {output / 'open_loop.json'}\nplot: {output / 'open_loop.png'}"


def _connect_policy(server: Mapping[str, Any], folder: Path, *, device: str, action_steps: int | None) -> Any:
    """Return the policy on a server; it must serve the checkpoint that is evaluated."""
    from vega_policy.deployment.client import RemotePolicy, ServerAddress
    from vega_policy.evaluation.policies import checkpoint_fingerprint

    token_file, ca_file = (
        None if server[name] is None else Path(server[name]) for name in ("token_file", "ca_file")
    )
    policy = RemotePolicy(ServerAddress(server["url"], token_file, ca_file), action_steps=action_steps)
    expected = checkpoint_fingerprint(folder)
    if policy.served.fingerprint != expected:
        raise ValueError(
            f"expected a server of the checkpoint {folder} ({expected}), but {server['url']} serves "
            f"{policy.served.fingerprint}; serve the one that is to be evaluated"
        )
    return policy


@partial(
    Command,
    config="compare",
    examples=[
        "vega-compare outputs/eval/A outputs/eval/B                two evaluations, task by task",
        "vega-compare assets/results/{wan_tiny,none}               policies, suite by suite and over seeds",
        "vega-compare outputs/eval/A outputs/eval/A second_ablation=blind",
        "vega-compare outputs/open_loop/A outputs/open_loop/B      two of vega-eval-offline, joint by joint",
    ],
    fields="""
folders: ??? # two or more evaluations or policies (<seed>/<suite> below); the last one is the reference
first_ablation: none # ablation of all folders but the last, such as blind
second_ablation: none # ablation of the last folder
markdown: false # true prints the table as Markdown
json: null # file that also receives all numbers
""",
    positional=("folders...",),
)
def compare(config: DictConfig) -> str:
    """Compare evaluations of the same episodes: paired differences in success with intervals."""
    from vega_policy.evaluation import compare
    from vega_policy.run_dir import write_json

    folders = [Path(folder) for folder in config.folders]
    if len(folders) == 2 and all((folder / compare.OPEN_LOOP_REPORT).is_file() for folder in folders):
        return compare.compare_open_loop(*folders)
    if len(folders) < 2:
        raise ValueError(
            f"folders: expected at least two, got {len(folders)}. For an ablation of one evaluation give its "
            "folder twice and second_ablation=blind."
        )
    if len(folders) == 2 and not any(compare.evaluations_below(folder) for folder in folders):
        ablations = {"first_ablation": config.first_ablation, "second_ablation": config.second_ablation}
        comparison = compare.compare_runs(*folders, **ablations)
        notes = compare.comparison_notes(*folders, **ablations)
        numbers = {"tasks": comparison, "notes": notes}
        text = "\n".join([*notes, "", compare.comparison_table(comparison, markdown=config.markdown)])
    else:
        ablations = [config.first_ablation] * (len(folders) - 1) + [config.second_ablation]
        policies = compare.compare_policies(compare.read_policies(folders, ablations))
        numbers, text = policies.numbers(), compare.results_table(policies, markdown=config.markdown)
    if config.json:
        write_json(Path(config.json), numbers)
    return text


@partial(
    Command,
    config="collect",
    examples=[
        "vega-collect env=lift_wide episodes_per_task=50",
        "vega-collect env=libero_spatial episodes_per_task=50 processes=16 demonstrator.noise=0.2",
        "vega-collect env=libero_spatial format=states root=outputs/states/libero_spatial processes=16",
    ],
)
def collect(config: DictConfig) -> str:
    """Collect demonstrations into a LeRobotDataset, or into one file of simulator states.

    The same command resumes after an interruption.
    """
    values = plain(config)
    root = Path(values["root"])
    logger.info("collecting %s in %s", values["env"]["suite"], root)
    collect = import_module("envs.demos.collect")  # by name: vega_policy does not depend on envs
    metadata = collect.collect(collect.CollectionSettings.of(values), root, processes=values["processes"])
    lines = [
        f"{name}: {counts['demonstrations']} demonstrations from {counts['attempts']} episodes"
        for name, counts in metadata["tasks"].items()
    ]
    if values["format"] == "states":
        return "\n".join([*lines, f"states: {root.with_suffix('.safetensors')}"])
    return "\n".join([*lines, f"dataset: {root}"])


@partial(
    Command,
    config="replay",
    examples=[
        "vega-replay outputs/demonstrations/libero_spatial processes=16",
        "vega-replay assets/demonstrations/libero/libero_object.safetensors 'episodes=[0,424]'",
    ],
    fields="""
source: ??? # a dataset of vega-collect (its folder), or a file of states (*.safetensors)
episodes: null # indices, such as [0,424]; null replays all
processes: 2 # simulators, one a process
""",
    positional=("source",),
)
def replay(config: DictConfig) -> str:
    """Execute the recorded actions of demonstrations from their initial states and count successes.

    This is an end-to-end check of actions, states and gripper sign. Of a file of states the executed actions,
    noise included, are taken.
    """
    from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool

    source = Path(config.source)
    read = _episodes_of_states if source.suffix == ".safetensors" else _episodes_of_dataset
    episodes = read(source, config.episodes)
    with WorkerPool(EnvironmentFactory("envs.make", 128, "fast"), config.processes) as pool:
        successes = pool.replay(episodes)
    lines = [
        f"failed: {episode.task}, seed {episode.seed}, {len(episode.actions)} actions"
        for episode, success in zip(episodes, successes, strict=True)
        if not success
    ]
    return "\n".join([*lines, f"{sum(successes)} of {len(episodes)} replayed demonstrations succeed"])


def _episodes_of_dataset(root: Path, indices: Sequence[int] | None) -> list[Any]:
    """Read recorded episodes of a dataset that was collected without action noise."""
    from vega_policy.evaluation.env_pool import RecordedEpisode

    shards = import_module("envs.demos.shards")
    if shards.collected_metadata(root)["settings"]["demonstrator"]["noise"]:
        raise ValueError(
            f"{root} was collected with action noise: the recorded actions are not the executed ones."
        )
    return [
        RecordedEpisode(
            stored.task.suite,
            stored.task.name,
            stored.task.index,
            stored.recording.seed,
            stored.recording.states[0],
            stored.recording.actions,
        )
        for stored in shards.read_episodes(root, indices)
    ]


def _episodes_of_states(file: Path, indices: Sequence[int] | None) -> list[Any]:
    """Read recorded episodes of a file of states, with the executed actions."""
    from vega_policy.evaluation.env_pool import RecordedEpisode

    states = import_module("envs.demos.states")
    suite, stored = states.read_header(file)["suite"], states.read_states(file)
    chosen = range(len(stored)) if indices is None else indices
    if unknown := [index for index in chosen if not 0 <= index < len(stored)]:
        raise ValueError(f"{file} has the episodes 0 to {len(stored) - 1}, got {unknown}")
    names = [task.name for task in import_module("envs").tasks(suite)]
    return [
        RecordedEpisode(suite, names[one.task], one.task, one.seed, one.initial, one.executed)
        for one in (stored[index] for index in chosen)
    ]


LIBERO_BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@partial(
    Command,
    config="demonstrators",
    examples=["vega-demonstrators libero_goal episodes=5 processes=16"],
    fields="""
suites: [] # such as [libero_goal]; []: the standard measurement, above
episodes: 20 # of each task
official: false # true: the named suites start from official states
tasks: null # indices; null takes all
swap_episodes: 20 # official states of each task of the swap suites
processes: 2 # simulators, one a process
output: null # JSON file that grows as tasks end; the command resumes while the code is the same
""",
    positional=("suites...",),
)
def demonstrators(config: DictConfig) -> str:
    """Measure how often the scripted demonstrators succeed, task by task.

    Without `suites`: 20 episodes a task of LIBERO's spatial, object, goal and 10 on fresh resets, 20 official
    states a task of LIBERO-PRO's swap suites, and 3 episodes a task of Meta-World MT50.
    """
    collect = import_module("envs.demos.collect")
    suites = list(config.suites)
    plan = [(suites, config.official, config.episodes)]
    if not suites:
        swapped = [f"{suite}_swap" for suite in LIBERO_BASES]
        plan = [(LIBERO_BASES, False, config.episodes), (swapped, True, config.swap_episodes)]
        plan.append((["metaworld_mt50"], False, min(3, config.episodes)))
    output = None if config.output is None else Path(config.output)
    start, results, known = time.perf_counter(), [], [] if output is None else collect.load_results(output)
    for names, official, episodes in plan:
        logger.info("%d episodes of each task of %s; a line as a task ends", episodes, ", ".join(names))
        options = {"processes": config.processes, "only": config.tasks, "known": known}
        for result in collect.measure_success(names, episodes=episodes, official=official, **options):
            results.append(result)
            known = collect.merge_result(known, result)
            if output is not None:
                collect.save_results(output, known)
            task, counts = result.task, f"{result.successes}/{len(result.lengths)}"
            seconds = time.perf_counter() - start
            logger.info("%.0f s: %s %d %s: %s", seconds, task.suite, task.index, task.name, counts)
    seconds = time.perf_counter() - start
    return f"\n{collect.success_table(results)}\n\n{seconds:.0f} s, code {collect.code_version()}"


@partial(
    Command,
    config="export_features",
    examples=["vega-export-features my_model:encoder repo_id=ORG/NAME output=features"],
    fields="""
encoder: ??? # your function, as module:function
repo_id: ??? # LeRobot's name of the dataset
root: null # its local folder; null takes the hub's
output: ??? # new folder for the features; an interrupted export is resumed
frame_size: 224 # the policy's policy.frame_size, pixels
batch_size: 32 # instants encoded at once
device: null # cpu, cuda, ...; null: cuda where there is one
""",
    positional=("encoder",),
)
def export_features(config: DictConfig) -> str:
    """Export features of any model over a LeRobot dataset, for `prior=precomputed prior.path=FOLDER`.

    Run it where the model's own repository is installed (VGGT, SEVA, Vmem, ...). `encoder` names a function
    of yours as module:function, called as `function(device)`. It returns a callable

        frames float32 [n v 3 h h] in [0, 1], on the device  ->  features [n v d gh gw]

    that normalizes frames as its model requires, reads all views of an instant together, keeps the whole
    frame (no crop, no letterbox) and returns the patch tokens of one layer at their places, at least as many
    as the backbone has (14x14 for the compact one at 224 pixels). Views come in the dataset's camera order.
    """
    import torch
    from tqdm import tqdm

    from vega_policy.data.dataset import DatasetConfig, open_dataset
    from vega_policy.data.video import frames_in_order
    from vega_policy.model.observation import stack_views
    from vega_policy.priors.baselines import FeatureWriter, find_encoder
    from vega_policy.run_dir import lock_folder

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sys.path.insert(0, str(Path.cwd()))  # the encoder's module may be in the working folder
    encode = find_encoder(config.encoder)(device)
    dataset = open_dataset(DatasetConfig(config.repo_id, root=config.root))
    bar = tqdm(desc="Encoding", total=dataset.num_frames, unit="frame", mininterval=1.0)
    with lock_folder(Path(config.output)), bar:
        writer = FeatureWriter(Path(config.output), config.encoder)
        for stretch in frames_in_order(dataset, dataset.cameras, "pyav"):
            length = len(next(iter(stretch.values())))
            for start in range(0, length, config.batch_size):
                clips = {camera: clip[start : start + config.batch_size] for camera, clip in stretch.items()}
                views = {camera: clip.to(device).float() / 255 for camera, clip in clips.items()}
                frames = stack_views(views, config.frame_size)[:, :, 0]
                if not writer.skip(frames):
                    with torch.no_grad():
                        writer.add(frames, encode(frames))
                bar.update(len(frames))
        writer.close()
    return f"features: {config.output}{' (complete before, compared)' if writer.was_complete else ''}"


@partial(
    Command,
    config="export_policy",
    examples=[
        "python scripts/export_policy.py outputs/demo/train/checkpoints/last my_policy",
        "python scripts/export_policy.py my_policy my_policy_1 'evaluations=[outputs/eval/lift_wide]'",
    ],
    fields="""
checkpoint: ??? # a checkpoint of a run, or an exported policy
output: ??? # new folder
evaluations: [] # output folders of evaluations of this checkpoint, for the card
""",
    positional=("checkpoint", "output"),
)
def export_policy(config: DictConfig) -> str:
    """Write a policy to a new folder to be published: in bfloat16, without training state, with a card."""
    from vega_policy.checkpoints import find_checkpoint
    from vega_policy.training.checkpoint import export_policy
    from vega_policy.training.logging import complete_card

    source, output = find_checkpoint(Path(config.checkpoint)), Path(config.output)
    export_policy(source, output, complete_card(source, [Path(folder) for folder in config.evaluations]))
    size = sum(path.stat().st_size for path in output.iterdir())
    return f"policy: {output} ({size / 1e6:.1f} MB)"


@partial(
    Command,
    config="pretrain_prior",
    examples=[
        "vega-pretrain                                          all stages",
        "vega-pretrain 'stages=[clips]' clips.processes=16      record clips only",
        "vega-pretrain 'stages=[vae]' max_seconds=540           stop in time; the same command resumes",
    ],
)
def pretrain(config: DictConfig) -> str:
    """Train a small video diffusion model (Wan2.1's architecture) on clips of the simulators."""
    from vega_policy.config import from_config
    from vega_policy.pretraining import PretrainSettings
    from vega_policy.pretraining.trainer import pretrain

    folder = pretrain(from_config(PretrainSettings, plain(config)))
    return f"weights: {folder}" if folder else "max_seconds reached; the same command resumes"


@partial(
    Command,
    config="probe",
    examples=[
        "vega-probe prior=wan_tiny scenes=libero_spatial",
        "vega-probe prior=wan_tiny prior.path=FOLDER                  other weights against untrained ones",
        "vega-probe scenes=folder 'scenes.folders=[A,B,C]'            posed frames (transforms.json)",
        "vega-probe measure=questions prior=wan_tiny                  spatial questions with and without it",
        "vega-probe measure=future prior=wan_tiny prior.path=FOLDER prior.clip=future 'prior.layer=[2,5]'",
    ],
)
def probe(config: DictConfig) -> str:
    """Measure what a frozen prior encodes about space: correspondence, linear probes, questions.

    With measure=questions: whether it helps to answer spatial questions, with several seeds. With
    measure=future: what it encodes about the next steps of demonstrations, by linear probes.
    """
    from vega_policy.analysis import decode
    from vega_policy.analysis.probe import run

    return f"report: {run(decode(plain(config)))}"


@partial(
    Command,
    config="deploy",
    examples=[
        "vega-deploy checkpoint=... robot=vega_sim 'task=lift the red cube' dry_run=true    moves nothing",
        "vega-deploy checkpoint=... robot=vega_sim 'task=lift the red cube' inference=rtc",
        "vega-deploy server.url=wss://gpu.lab:8765 server.token_file=token robot=so101 task=...",
    ],
)
def deploy(config: DictConfig) -> str:
    """Let a policy control a robot. Nothing moves before the preflight has passed."""
    from vega_policy.deployment.deploy import deploy

    logging.getLogger("websockets").setLevel(logging.WARNING)
    outcome = deploy(plain(config))
    if outcome.stopped is not None:
        raise RuntimeError(f"stopped: {outcome.stopped}")
    steps = f"{outcome.steps} steps, {outcome.late_steps} deadlines missed"
    recorded = f"\nepisodes: {config.recording.folder}" if outcome.episodes else ""
    return f"{steps}; interventions of the safety layer: {outcome.interventions or 'none'}{recorded}"


@partial(
    Command,
    config="serve",
    examples=[
        "vega-serve checkpoint=outputs/demo/train/checkpoints/last",
        "vega-serve checkpoint=... server.host=0.0.0.0 server.token_file=token "
        "server.certificate=cert.pem server.key=key.pem",
    ],
)
def serve(config: DictConfig) -> None:
    """Serve a checkpoint to robots over WebSocket. SIGINT and SIGTERM let running requests finish."""
    from vega_policy.deployment.server import serve_forever

    logging.getLogger("websockets").setLevel(logging.WARNING)
    serve_forever(plain(config))


@partial(
    Command,
    config="doctor",
    examples=[
        "vega-doctor                               this installation",
        "vega-doctor dataset data/my_arm           would vega-train start on this dataset?",
        "vega-doctor dataset data/my_arm 'rename={actions: action}'",
    ],
    fields="""
part: null # dataset, or null: the installation
root: null # folder of the dataset
repo_id: local/dataset # LeRobot's name of the dataset
rename: null # as dataset.rename, such as {actions: action}
task: null # as dataset.task: one instruction for all frames
frame_size: 224 # the policy's, for the storage of a cache
folder: outputs # where runs and caches are going to be written
""",
    positional=("part", "root"),
)
def doctor(config: DictConfig) -> None:
    """Check this installation in a minute, or with `dataset ROOT` a dataset before training on it."""
    from vega_policy.data.dataset import DatasetConfig
    from vega_policy.doctor import check_dataset, check_installation, format_check

    if config.part not in (None, "dataset") or (config.part is None) != (config.root is None):
        raise ValueError(
            f"expected vega-doctor, or vega-doctor dataset ROOT; got {config.part} {config.root}"
        )
    if config.part is None:
        checks = check_installation(Path(config.folder))
    else:
        fields = {name: plain(config)[name] for name in ("repo_id", "root", "rename", "task")}
        dataset = DatasetConfig(**fields, cache="disk", cache_root=config.folder)
        checks = check_dataset(dataset, config.frame_size)
    failed = False
    for check in checks:
        print(format_check(check, color=sys.stdout.isatty()), flush=True)  # noqa: T201
        failed |= check.status == "failed"
    if failed:
        sys.exit(1)


BENCHMARK_FIELDS = """
defaults: # with random weights
  - prior: wan_tiny
  - backbone: compact
  - head: flow
  - env: lift_wide

part: ??? # prior, policy, train, dataset or simulate; of deployment: latency, logs or server
device: null # cpu, cuda, ...; null: cuda where there is one
output: null # JSON file, written after each row
seconds: 1.0 # duration of each measurement
sizes: [256x256] # prior: sizes of frames, HEIGHTxWIDTH
frames: [2] # prior: frames encoded at once
paths: null # prior: of released, all_blocks, early_stop, fast; null: all that run here
views: 2 # policy, train: cameras
frame_size: 128 # policy, train, dataset, simulate: side of the frames in pixels
batch: 256 # train, dataset: samples of a training step
text_encoder: null # policy, train: folder of a sentence encoder's config
cases: [live, cached, none] # train: where the prior's features come from
variants: null # train: of eager, compiled; null: eager, and compiled on a GPU
root: outputs/demonstrations/lift_wide # dataset: folder, with videos (vega-collect env=lift_wide)
repo_id: vega/lift_wide # dataset: LeRobot's name of it
cache_root: outputs/cache # dataset: where the cache is built
cached: [semantic, prior] # dataset: of frames, semantic, prior
small: false # dataset: true takes the demo's small trunk and head
suites: [lift_wide] # simulate: suites that are measured
env: # latency: the suite, the same on any machine
  frame_size: null # pixels; null: as in the checkpoint's training
  rendering: null # profile, full or fast; null: as in the checkpoint's training
checkpoint: null # latency: a checkpoint of a run, or an exported policy
methods: null # latency: such as [async,rtc]; the first is the reference; null: all that fit policy and suite
delays: [0, 1, 2, 4, 8] # latency: control steps from an observation until its chunk arrives
under_way: [0, 1, 2] # latency: control steps from sending a command to its execution
tasks: null # latency: indices; null takes the whole suite
episodes: 40 # latency: of each cell, spread over the tasks; logs: of each log, null takes all
action_steps: null # latency: actions executed of each chunk; null takes the policy's own n_action_steps
displacements: null # latency: indices of actions, for catch_up; null: all but the gripper, and none of SO-101
batch_size: 1 # latency: rows of a prediction; chunks that continue the last one are predicted one by one
processes: 2 # latency: simulators, one a process
folder: outputs/latency/${env.suite} # latency: raw episodes and plot; the same command resumes
logs: {} # logs: name: file of a simulated robot
url: ws://127.0.0.1:8765 # server: its address
token_file: null # server: file with its token
ca_file: null # server: PEM file with the certificate to trust; null trusts what the system trusts
clients: [1, 4, 16] # server: numbers of clients that are measured
"""

DEPLOYMENT = ("latency", "logs", "server")


@partial(
    Command,
    config="benchmark",
    examples=[
        "vega-benchmark prior prior=wan2.1_t2v_1.3b 'frames=[1,2,8,32]'",
        "vega-benchmark policy prior=wan_tiny device=cpu output=outputs/policy.json",
        "vega-benchmark latency checkpoint=outputs/demo/train/checkpoints/last 'delays=[0,4,8]'",
        "vega-benchmark logs +logs.sync=outputs/rollout/sync.jsonl",
    ],
    fields=BENCHMARK_FIELDS,
    positional=("part",),
)
def benchmark(config: DictConfig) -> str:
    """Measure a part on this machine.

    Parts: prior, policy, train, dataset, simulate; deployment: latency, logs, server.
    """
    import torch
    from tqdm import tqdm

    from vega_policy.benchmarks import PARTS, benchmark, device_name, summarize, table, write

    check_choice("part", config.part, (*PARTS, *DEPLOYMENT))
    options = SimpleNamespace(**OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportCallIssue]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for group in ("prior", "backbone", "head"):
        setattr(options, group, config[group].name)
    device = torch.device(options.device)
    command, rows = shlex.join(["vega-benchmark", *sys.argv[1:]]), []
    logger.info("measuring %s on %s", options.part, device_name(device))
    measure = _deployment(options) if options.part in DEPLOYMENT else benchmark(options.part, options, device)
    for row in measure:
        rows.append(row)
        tqdm.write("  ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr)
        if options.output is not None:  # after each row: a killed run keeps what it measured
            write(Path(options.output), options.part, rows, command, device)
    lines = [f"{options.part} on {device_name(device)}", table(rows), *summarize(options.part, rows)]
    if options.part == "latency":
        folder = Path(options.folder)
        lines += [f"plot: {folder / 'latency.png'}", f"episodes: {folder / 'episodes.parquet'}"]
    return "\n".join(lines)


def _deployment(options: SimpleNamespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part of `DEPLOYMENT`."""
    from vega_policy.deployment import latency_benchmark as latency
    from vega_policy.deployment.client import ServerAddress

    if options.part == "logs":
        for name, file in options.logs.items():
            yield latency.summarize_log(name, Path(file), options.episodes)
    elif options.part == "server":
        token, certificate = options.token_file, options.ca_file
        address = ServerAddress(
            options.url,
            None if token is None else Path(token),
            None if certificate is None else Path(certificate),
        )
        yield from latency.benchmark_server(address, clients=options.clients, seconds=options.seconds)
    else:
        yield from _latency(options)


def _latency(options: SimpleNamespace) -> Iterator[dict[str, Any]]:
    """Yield success in virtual time, a row for each method, delay and number of commands under way."""
    from vega_policy.checkpoints import find_checkpoint
    from vega_policy.deployment import latency_benchmark as latency
    from vega_policy.deployment.server import load_served_policy
    from vega_policy.evaluation.env_pool import EnvironmentFactory, WorkerPool
    from vega_policy.evaluation.episodes import plan_episodes, select_tasks
    from vega_policy.evaluation.evaluate import choose_frames

    if options.checkpoint is None:
        raise ValueError("latency: no value for checkpoint. Add checkpoint=FOLDER to the command line.")
    env = options.env
    tasks = select_tasks(import_module("envs").tasks(env["suite"]), options.tasks)
    official = all(task.official_states for task in tasks)
    episodes = plan_episodes(tasks, math.ceil(options.episodes / len(tasks)), 0, official_states=official)
    cells = [
        latency.Cell(method, delay, under_way)
        for under_way in options.under_way
        for delay in options.delays
        for method in options.methods or latency.DEFAULT_METHODS
    ]
    env |= choose_frames(find_checkpoint(Path(options.checkpoint)), env)
    factory = EnvironmentFactory("envs.make", env["frame_size"], env["rendering"])
    policy = load_served_policy(
        Path(options.checkpoint), device=options.device, action_steps=options.action_steps
    )
    settings = {"checkpoint": policy.fingerprint, "action_steps": policy.description.action_steps, "env": env}
    settings |= {"tasks": options.tasks, "episodes": options.episodes, "batch_size": options.batch_size}
    displacements = options.displacements
    if displacements is None:
        absolute = env["suite"] in import_module("envs").FAMILIES["envs.so101"]
        displacements = [] if absolute else list(range(policy.description.action_size - 1))
    if options.methods is None:
        fitting = latency.fitting_methods(policy, displacements)
        logger.info("methods: %s, all that fit the policy and the suite", ", ".join(fitting))
        cells = [cell for cell in cells if cell.method in fitting]
    if any(cell.method == "catch_up" for cell in cells):
        settings["displacements"] = displacements
    output = Path(options.folder)
    with WorkerPool(factory, options.processes) as pool:
        sizes = {"batch_size": options.batch_size, "settings": settings, "displacements": displacements}
        yield from latency.benchmark_latency(policy, pool, episodes, cells, output=output, **sizes)
