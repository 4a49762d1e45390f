"""The stages of a pre-training run and their training loop; both stop and resume at any time.

<run>/settings.json
      prompts.safetensors, clips/, latents-*.npy
      vae/, transformer/        of each training: metrics.jsonl, tensorboard/ and
          checkpoints/<step>/   weights, average and optimizer as safetensors, step.json, checksums.json
      <prior>/                  the exported weights
      report/

On a CPU a resumed run ends in the same bits. On a GPU the fastest kernels are selected at each start, and
results agree up to rounding.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from vega_policy.checkpoints import (
    CHECKPOINTS,
    checkpoint_path,
    list_checkpoints,
    newest_intact,
    prune_checkpoints,
    set_aside_after,
    write_checksums,
)
from vega_policy.evaluation.env_worker import resolve
from vega_policy.pretraining import (
    STAGES,
    LearningSettings,
    PretrainSettings,
    autoencoder,
    export,
    transformer,
)
from vega_policy.pretraining.clips import Clips, Loss, StepRandomness
from vega_policy.pretraining.transformer import EMPTY, PromptTable, read_prompts, write_prompts
from vega_policy.priors import PRIORS
from vega_policy.priors.base import fingerprint_files
from vega_policy.run_dir import atomic_folder, drop_lines_after, open_run, read_json, remove_partial

METRICS = "metrics.jsonl"
_KEPT = 2  # checkpoints of each training
_FREE_TO_CHANGE = (
    *("output_dir", "stages", "device", "max_seconds", "log_every", "save_every", "validate_every"),
    *("tensorboard", "prompts", "clips.folder", "clips.processes", "report"),
)


def pretrain(settings: PretrainSettings) -> Path | None:
    """Run the stages of the settings, each from where an earlier start stopped; see `open_run`.

    Returns the folder of the weights, None if the time was up before all was done: call again.

    Raises:
        ValueError: If the prior is not one that is trained here.
        FolderInUseError: If another process runs in the folder.
        OtherRunError: If the folder holds a run with other settings, or other files.
    """
    stages = _Stages(settings)
    may_hold = ("clips", "prompts.safetensors")
    with open_run(stages.folder, asdict(settings), free_to_change=_FREE_TO_CHANGE, may_hold=may_hold):
        for stage in STAGES:
            if stage in settings.stages and not stages.run(stage):
                return None
    return stages.weights


class _Stages:
    """The stages of one run on one device; each returns False if the time was up before it was done."""

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.output_dir)
        self.weights = self.folder / settings.prior
        self._device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        entry = PRIORS.get(settings.prior)
        if entry is None or entry.architecture is None:
            small = ", ".join(name for name, one in PRIORS.items() if one.architecture)
            raise ValueError(f"prior: expected one that is trained here, {small}; got {settings.prior!r}")
        self._architecture = entry.architecture
        self._deadline = None if settings.max_seconds is None else time.time() + settings.max_seconds
        self._prompts = Path(settings.prompts or self.folder / "prompts.safetensors")
        torch.backends.cudnn.benchmark = True  # few shapes of small convolutions, whose best kernel differs

    def run(self, name: str) -> bool:
        work: dict[str, Callable[[], bool]] = {
            "prompts": self._embed_prompts,
            "clips": self._render_clips,
            "vae": self._train_vae,
            "transformer": self._train_transformer,
            "report": self._report,
            "film": self._sample_video,
        }
        return work[name]()

    def _embed_prompts(self) -> bool:
        if not self._prompts.is_file():
            clips = self.settings.clips
            write_prompts(self._prompts, resolve(clips.instructions)(**clips.order))
        return True

    def _render_clips(self) -> bool:
        clips = self.settings.clips
        write = resolve(clips.write)
        return write(Path(clips.folder), processes=clips.processes, deadline=self._deadline, **clips.order)

    def _open_clips(self) -> tuple[Clips, Clips]:
        return Clips.open(Path(self.settings.clips.folder), self.settings.clips.held_out)

    def _train_vae(self) -> bool:
        """Train the autoencoder, measure its latents' statistics, and export it."""
        if (self.weights / "vae").is_dir():
            return True
        clips, held_out = self._open_clips()
        network = autoencoder.convolve_images_in_2d(self._make_network(AutoencoderKLWan, "vae"))
        if self.settings.vae.channels_last:
            autoencoder.use_channels_last(network)
        trainer = StageTrainer(network, self.settings.vae.learning, self.folder / "vae")
        loss = autoencoder.autoencoder_loss(network, clips, self.settings.vae, self._device)
        validate = autoencoder.make_validation(network, held_out, self._device)
        if not run_training(trainer, loss, validate, self.settings, self._deadline):
            return False
        with trainer.averaged():
            autoencoder.measure_statistics(network, clips, self._device)
            export.write_part(network, self.weights / "vae")
        return True

    def _keep_vae(self) -> None:
        """Take the autoencoder of `start`, if it is not among the stages and this run has none."""
        target, start = self.weights / "vae", self.settings.start
        if start is not None and "vae" not in self.settings.stages and not target.is_dir():
            with atomic_folder(target) as folder:
                shutil.copytree(Path(start) / "vae", folder, dirs_exist_ok=True)

    def _train_transformer(self) -> bool:
        """Train the transformer on latents of the exported autoencoder, and export it."""
        if (self.weights / "transformer").is_dir():
            return True
        self._keep_vae()
        clips, held_out = self._open_clips()
        prompts, device = read_prompts(self._prompts), self._device
        table = PromptTable(prompts, device)
        vae = export.load_vae(self.weights, device)
        mark = fingerprint_files(self.weights, ["vae"])
        latents, unseen = (
            autoencoder.write_latents(
                self.folder / f"latents-{name}-{mark}-{part.mark}.npy", vae, part, device
            )
            for name, part in (("training", clips), ("held_out", held_out))
        )
        path = self.folder / f"latents-images-{mark}-{clips.mark}.npy"
        images = autoencoder.write_image_latents(path, vae, clips, device)
        network = self._make_network(WanTransformer3DModel, "transformer")
        settings = self.settings.transformer
        trainer = StageTrainer(network, settings.learning, self.folder / "transformer")
        loss = transformer.matching_loss(
            network, latents, images, clips.instructions, table, settings, device
        )
        continues = settings.image_to_video > 0
        validate = transformer.make_validation(
            network, unseen, held_out.instructions, table, device, continues
        )
        if not run_training(trainer, loss, validate, self.settings, self._deadline):
            return False
        with trainer.averaged():
            export.write_rest(self.weights, prompts[EMPTY], self.settings.report.sample_shift)
            if continues:
                export.write_training(self.weights, self.settings)
            export.write_part(network, self.weights / "transformer")
        return True

    def _report(self) -> bool:
        """Measure the exported weights on held-out clips, and write their card."""
        clips, held_out = self._open_clips()
        vae = export.load_vae(self.weights, self._device)
        network = export.load_transformer(self.weights, self._device)
        table = PromptTable(read_prompts(self._prompts), self._device)
        folder = self.folder / "report"
        folder.mkdir(exist_ok=True)
        figures = export.measure(vae, network, held_out, table, self.settings)
        export.write_reconstructions(folder / "reconstructions.png", vae, held_out)
        export.write_card(self.weights, figures, self._describe_training(clips, held_out), self.settings)
        return True

    def _sample_video(self) -> bool:
        """Write a video sampled from noise; requires the weights alone, and pyav.

        Of a network that continues frames also futures of held-out clips; that requires the clips.
        """
        vae = export.load_vae(self.weights, self._device)
        network = export.load_transformer(self.weights, self._device)
        path = self.folder / "report" / "sample.mp4"
        path.parent.mkdir(exist_ok=True)
        export.write_video(path, vae, network, read_prompts(self._prompts), self.settings)
        if self.settings.transformer.image_to_video > 0:
            _, held_out = self._open_clips()
            table = PromptTable(read_prompts(self._prompts), self._device)
            path = path.with_name("futures.mp4")
            export.write_futures(path, vae, network, held_out, table, self.settings.report)
        return True

    def _describe_training(self, clips: Clips, held_out: Clips) -> dict[str, Any]:
        made = {part: list_checkpoints(self.folder / part) for part in ("vae", "transformer")}
        steps = {f"{part}_steps": _read_step(made[part][-1]) if made[part] else 0 for part in made}
        start = self.settings.start
        return {
            "start": None if start is None else fingerprint_files(Path(start), ["vae", "transformer"]),
            "clips": len(clips),
            "held_out": len(held_out),
            "frames": clips.shape[0],
            "size": clips.shape[1],
            "suites": list(self.settings.clips.order["suites"]),
            "shots": sorted(set(clips.shots)),
            **steps,
        }

    def _make_network(self, cls: Any, part: str) -> Any:
        """Return a network with the weights of the seed, or of `start`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.settings.seed)
            network = cls(**self._architecture[part])
        if self.settings.start is not None:
            path = Path(self.settings.start) / part / SAFETENSORS_WEIGHTS_NAME
            if not path.is_file():
                raise FileNotFoundError(f"start: {path} does not exist; give a folder that a run has written")
            export.load_weights(network, path)
        return network.to(self._device)


class StageTrainer:
    """A network on its device with its optimizer and average, resumed from the folder's newest checkpoint."""

    def __init__(self, network: nn.Module, settings: LearningSettings, folder: Path) -> None:
        self.network, self.settings, self.folder, self.step = network, settings, folder, 0
        self.weights = list(network.parameters())
        self.device = self.weights[0].device
        self._optimizer = torch.optim.AdamW(
            self.weights,
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._average = EMAModel(self.weights, decay=settings.average_decay, foreach=True)
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        remove_partial(folder / CHECKPOINTS)
        checkpoint = newest_intact(folder)
        if checkpoint is not None:
            self._restore(checkpoint)
        set_aside_after(folder, self.step)

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.settings.steps

    def update(self, loss: Tensor) -> Tensor:
        """Make one step, and return the gradient's norm."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, self.settings.gradient_norm, foreach=True)
        self._optimizer.step()
        self._average.step(self.weights)
        self.step += 1
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the network; on leaving, the raw ones are restored bitwise."""
        self._average.store(self.weights)
        self._average.copy_to(self.weights)
        self.network.eval()
        try:
            yield
        finally:
            self._average.restore(self.weights)
            self.network.train()

    def save(self) -> None:
        """Write a checkpoint, unless this step has one, and delete old ones."""
        target = checkpoint_path(self.folder, self.step)
        if target.exists():
            return
        state = self._optimizer.state_dict()["state"]
        with atomic_folder(target) as folder:
            save_file(_by_index(self.weights), folder / "weights.safetensors")
            save_file(_by_index(self._average.shadow_params), folder / "average.safetensors")
            moments = {
                f"{index}.{name}": value.contiguous()
                for index, row in state.items()
                for name, value in row.items()
            }
            save_file(moments, folder / "optimizer.safetensors")
            (folder / "step.json").write_text(json.dumps({"step": self.step}))
            write_checksums(folder)
        prune_checkpoints(self.folder, keep_last=_KEPT, keep_best=1)

    def _restore(self, checkpoint: Path) -> None:
        self.step = _read_step(checkpoint)
        for name, target in (("weights", self.weights), ("average", self._average.shadow_params)):
            saved = load_file(checkpoint / f"{name}.safetensors")
            shapes = {index: tuple(tensor.shape) for index, tensor in saved.items()}
            if shapes != {str(index): tuple(tensor.shape) for index, tensor in enumerate(target)}:
                raise ValueError(f"{checkpoint} holds another architecture; give another output_dir")
            with torch.no_grad():
                for index, tensor in enumerate(target):
                    tensor.copy_(saved[str(index)])
        self._average.optimization_step = self.step
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(checkpoint / "optimizer.safetensors").items():
            index, name = key.split(".")
            weight = self.weights[int(index)]
            if value.shape == weight.shape:  # with the weight's memory layout
                value = torch.empty_like(weight, dtype=value.dtype).copy_(value)
            moments.setdefault(int(index), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _by_index(tensors: list[Any]) -> dict[str, Tensor]:
    return {str(index): tensor.detach().contiguous() for index, tensor in enumerate(tensors)}


def _read_step(checkpoint: Path) -> int:
    return read_json(checkpoint / "step.json", "step")["step"]


def learning_rate(settings: LearningSettings, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine down to a tenth at the last step."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def run_training(
    trainer: StageTrainer,
    loss: Loss,
    validate: Callable[[], dict[str, float]],
    settings: PretrainSettings,
    deadline: float | None,
) -> bool:
    """Train until the last step or the deadline (`time.time()`), save, and return whether all steps are made.

    `validate` measures the averaged weights on held-out clips.

    Raises:
        FloatingPointError: If loss or gradient are not finite; the last checkpoint is intact.
    """
    if trainer.finished:
        return True
    trainer.network.train()
    autocast = settings.precision == "bf16" and trainer.device.type == "cuda"
    with _Log(trainer, settings.tensorboard) as log:
        while not trainer.finished and (deadline is None or time.time() < deadline):
            with torch.autocast(trainer.device.type, torch.bfloat16, enabled=autocast):
                value, metrics = loss(StepRandomness.of_step(settings.seed, trainer.step, trainer.device))
            norm = trainer.update(value)
            log.add({"loss": value, "gradient_norm": norm, **metrics})
            step, last = trainer.step, trainer.finished
            if step % settings.log_every == 0 or step % settings.save_every == 0 or last:
                log.write_means(step)
            if step % settings.validate_every == 0 or last:
                with trainer.averaged():
                    log.write(step, validate())
            if step % settings.save_every == 0:
                trainer.save()
        log.write_means(trainer.step)
        trainer.save()
    return trainer.finished


class _Log:
    """Progress bar, metrics.jsonl and TensorBoard; a context manager."""

    def __init__(self, trainer: StageTrainer, tensorboard: bool) -> None:
        folder, first = trainer.folder, trainer.step
        drop_lines_after(folder / METRICS, first)
        self._file = (folder / METRICS).open("a")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # not installed everywhere

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        self._bar = tqdm(
            total=trainer.settings.steps, initial=first, desc=folder.name, unit="step", mininterval=1.0
        )
        self._rows: list[dict[str, Tensor]] = []
        self._since = time.perf_counter()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, values: dict[str, Tensor]) -> None:
        """Keep one step's values on the device, without waiting for it."""
        self._rows.append({name: value.detach() for name, value in values.items()})
        self._bar.update()

    def write_means(self, step: int) -> None:
        """Write the means since the last call."""
        if not self._rows:
            return
        names = dict.fromkeys(name for row in self._rows for name in row)
        means = {
            name: torch.stack([row[name].float() for row in self._rows if name in row]).mean().item()
            for name in names
        }
        now = time.perf_counter()
        means["steps_per_s"] = len(self._rows) / (now - self._since)
        self._rows, self._since = [], now
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"step {step}: {', '.join(broken)} not finite. The last checkpoint is intact; lower the "
                "learning_rate, or give precision=no, and run the same command again"
            )
        self.write(step, means)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write values of a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
