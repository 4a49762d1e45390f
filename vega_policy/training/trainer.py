"""The training loop: optimizer steps, and measurements, checkpoints and evaluations where they are due."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vega_policy.checkpoints import add_scores, checkpoint_path, prune_checkpoints, read_scores
from vega_policy.data.augmentation import make_augmentations
from vega_policy.data.dataset import ACTION, EXECUTED, STATE, DatasetConfig, FrameTable, LocalDataset
from vega_policy.data.dataset_files import hash_bytes
from vega_policy.data.loader import Batch, PairedRows, ShuffledRows, Source
from vega_policy.run_dir import disk_guard
from vega_policy.training.checkpoint import Origin, TrainState, rng_state, save_checkpoint, snapshot
from vega_policy.training.config import TrainConfig
from vega_policy.training.cuda_graph import CapturedStep
from vega_policy.training.distributed import find_unused_weights, replicate
from vega_policy.training.logging import Progress, model_card, open_trackers
from vega_policy.training.optim import (
    BadStep,
    are_finite,
    clip_gradient,
    disk_advice,
    learning_rates,
    memory_guard,
    read_scalars,
    trainable,
)
from vega_policy.training.validation import evaluate_closed_loop, held_out_scores, spread_evenly


@dataclass(frozen=True)
class DataPart:
    """One opened dataset and its split; a mixture has several."""

    config: DatasetConfig
    dataset: LocalDataset
    table: FrameTable
    rows: Tensor  # training rows [n]
    held_out: Tensor  # rows of the held-out episodes [m]; may be empty
    weight: float = 1.0


@dataclass(frozen=True)
class TrainData:
    """The data of a run: one dataset, or the datasets of a mixture one after the other."""

    parts: Sequence[DataPart]
    table: FrameTable
    rows: Tensor  # training rows [n]
    held_out: Tensor  # rows of the held-out episodes [m]; may be empty
    fingerprint: dict[str, str]  # hashes of the dataset's parts, by `fingerprint_dataset`
    stats: dict[str, Any]  # for the normalisation, by feature

    @property
    def starts(self) -> list[int]:
        """First row of each dataset in the table."""
        return [0, *accumulate(len(part.table) for part in self.parts[:-1])]

    @property
    def shares(self) -> list[tuple[int, float]] | None:
        """Number of training rows and weight of each dataset of a mixture, None of a single dataset."""
        if len(self.parts) == 1:
            return None
        return [(len(part.rows), part.weight) for part in self.parts]

    @property
    def instructions(self) -> list[str]:
        """Distinct instructions of the training rows."""
        return [self.table.tasks[task] for task in self.table.task[self.rows].unique().tolist()]

    def describe(self) -> str:
        """Return the dataset in a few words."""
        held = f", {len(self.held_out)} held out" if len(self.held_out) else ""
        whole = hash_bytes(json.dumps(self.fingerprint).encode())
        return f"{self.names}, {len(self.rows)} frames{held}, fingerprint {whole}"

    @property
    def names(self) -> str:
        """Names of the datasets, with the shares of a mixture."""
        if len(self.parts) == 1:
            return self.parts[0].config.repo_id
        whole = sum(part.weight for part in self.parts)
        return " + ".join(f"{100 * part.weight / whole:.3g}% {part.config.repo_id}" for part in self.parts)


class Trainer:
    """Makes optimizer steps until the run, or this start of it, is complete."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        state: TrainState,
        source: Source,
        data: TrainData,
        origin: Origin,
    ) -> None:
        rank, world = accelerator.process_index, accelerator.num_processes
        self.config, self.accelerator, self.state, self.source = config, accelerator, state, source
        self.run, self.data, self._origin = Path(config.output_dir), data.describe(), origin
        order: dict[str, Any] = {"seed": config.seed, "rank": rank, "world": world, "shares": data.shares}
        self.sampler = ShuffledRows(data.rows, config.batch_size, **order)
        if config.dataset.pairs:
            order |= {"table": data.table, "starts": data.starts}
            self.sampler = PairedRows(data.rows, config.batch_size, **order)
        self.held_out = spread_evenly(data.held_out, config.held_out_frames)
        self.weights = trainable(state.policy)
        self._clip_norm = state.policy.config.get_optimizer_preset().grad_clip_norm
        cameras = list(state.policy.config.image_features)
        displacement = config.vega.displacement
        self._augmentations = make_augmentations(
            config.dataset,
            cameras,
            seed=config.seed,
            rank=rank,
            world=world,
            displacement_noise=displacement.noise if displacement.weight else 0.0,
        )
        state.policy.train()
        self._model = self._wrap()
        self._captured: CapturedStep | None = None
        if config.capture:
            self._captured = CapturedStep(
                self._model, state.policy, accelerator.autocast, data.instructions, self._clip_norm
            )

    def _wrap(self) -> nn.Module:
        """Return the policy as several processes call it; shards are in place already."""
        policy, launched = self.state.policy, torch.distributed.is_initialized()  # also as one process
        if self.config.sharding == "full" and launched:
            return policy
        unused = []
        if launched:
            unused = find_unused_weights(policy, self.prepare(self.source.batch(self.sampler.batch(0))))
        return replicate(self.accelerator, policy, unused)

    def fit(self) -> Path:
        """Train from the state's step to the last one, and return the last checkpoint's folder.

        Raises:
            TrainingStoppedError: If too many steps were not finite, or memory is full.
            DiskFullError: If the disk is full.
        """
        config, state = self.config, self.state
        height, width = state.policy.model.backbone.grid
        main = self.accelerator.is_main_process
        trackers = open_trackers(config, self.run, state.step) if main else []
        progress = Progress(self.run, state.step, config.steps, trackers, shown=main)
        batches = self.source.stream(self.sampler, state.step * config.accumulate)
        try:
            with disk_advice(), disk_guard(self.run), memory_guard(config, height * width):
                self._make_up_evaluation(progress)
                for step in range(state.step + 1, config.last_step + 1):
                    values = self.optimize(batches, progress, step)
                    state.step = step
                    progress.step(values)
                    if step % config.log_every == 0 or step == config.steps:
                        progress.write(step, mean_over_processes(self.accelerator, progress.interval()))
                    self._measure_and_save(step, progress)
        finally:
            progress.close()
        return checkpoint_path(self.run, state.step)

    def optimize(self, batches: Iterator[Batch], progress: Progress, step: int) -> dict[str, float]:
        """Make one optimizer step over `accumulate` batches, and return the values to log.

        A step whose loss or gradient is not finite in any process changes no weight in any of them.
        """
        state = self.state
        values = read_scalars(self._compute_gradient(batches, progress, step))
        values |= learning_rates(state.optimizer)
        if all_agree(self.accelerator, are_finite(values["loss"], values["gradient_norm"])):
            state.optimizer.step()
            state.average.update(state.step)
            state.guard.record_good()
        else:
            bad = self._describe_bad_step(step, values)
            state.guard.record_bad(bad, self.run, main=self.accelerator.is_main_process)
        state.optimizer.zero_grad()
        state.scheduler.step()
        return values | {"skipped_steps": float(state.guard.total)}

    def _compute_gradient(self, batches: Iterator[Batch], progress: Progress, step: int) -> dict[str, Tensor]:
        """Leave the clipped gradient of a step in the weights, and return its norm and the metrics."""
        rounds, accelerator = self.config.accumulate, self.accelerator
        sums: dict[str, Tensor] = {}
        for number in range(rounds):
            with progress.waiting():
                batch = self.prepare(next(batches))
            for augment in self._augmentations:
                batch = augment(batch, (step - 1) * rounds + number)
            noise, time = self._sample_noise_and_time(batch["action"])
            if self._captured is not None:  # `check_capturable` refuses several rounds
                return self._captured(self.state.policy.with_prior_features(batch), noise, time)
            last = number == rounds - 1
            with nullcontext() if last else accelerator.no_sync(self._model):
                with accelerator.autocast():
                    loss, metrics = self._model(batch, noise=noise, time=time, metrics_as_tensors=True)
                accelerator.backward(loss / rounds)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + torch.as_tensor(value) / rounds
        sums["gradient_norm"] = clip_gradient(self.weights.values(), self._clip_norm)
        return sums

    def _sample_noise_and_time(self, actions: Tensor) -> list[Tensor | None]:
        """Sample what the loss of a batch's actions [b t a] needs; the samples of a pair share it."""
        repeats = 2 if self.config.dataset.pairs else 1
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        policy, generator = self.state.policy, self.state.generator
        drawn = policy.sample_noise_and_time(actions[::repeats], generator, rank, world)
        return [one if one is None or repeats == 1 else one.repeat_interleave(repeats, 0) for one in drawn]

    def _describe_bad_step(self, step: int, values: dict[str, float]) -> BadStep:
        rounds = self.config.accumulate
        numbers = range((step - 1) * rounds, step * rounds)
        rows = [row for number in numbers for row in self.sampler.batch(number).tolist()]
        gradients = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        return BadStep(step, values["loss"], values["gradient_norm"], rows, wrong[:8])

    def prepare(self, batch: Batch) -> Batch:
        """Pre-process a batch; cached streams only change device and, except frames, become float32.

        Executed actions are brought into the units of the policy's actions.
        """
        cached = {name: batch.pop(name) for name in list(batch) if name.startswith("vega.")}
        device = self.accelerator.device
        if (executed := cached.get(f"vega.{EXECUTED}")) is not None:
            beside = {name: batch[name] for name in (STATE, "task")}  # relative actions need the state
            cached[f"vega.{EXECUTED}"] = self.state.processors[0](beside | {ACTION: executed})[ACTION]
        moved = {name: value.to(device, non_blocking=True) for name, value in cached.items()}
        moved |= {name: value.float() for name, value in moved.items() if value.is_floating_point()}
        return {**self.state.processors[0](batch), **moved}

    def _measure_and_save(self, step: int, progress: Progress) -> None:
        """After a step: measure the held-out loss, save, evaluate and prune, each where it is due."""
        config = self.config
        last, every = step == config.last_step, config.simulation.every
        evaluating = every > 0 and (last or step % every == 0)
        saving = last or evaluating or step % config.save_every == 0
        measuring = len(self.held_out) > 0 and (saving or step % config.evaluate_every == 0)
        scores: dict[str, float] = {}
        if measuring:
            scores = self.measure()
            progress.write(step, scores, "held_out")
        if saving:
            self._save(scores)
        if evaluating:
            scores |= self._evaluate(step, progress)
        if self.accelerator.is_main_process and scores:
            add_scores(self.run, step, scores)
        if self.accelerator.is_main_process and saving:
            prune_checkpoints(self.run, keep_last=config.keep_last, keep_best=config.keep_best)

    def _make_up_evaluation(self, progress: Progress) -> None:
        """Evaluate the checkpoint this start resumes from, if a kill prevented that."""
        step, every = self.state.step, self.config.simulation.every
        if step and every and step % every == 0 and "success" not in read_scores(self.run).get(step, {}):
            scores = self._evaluate(step, progress)
            if self.accelerator.is_main_process:
                add_scores(self.run, step, scores)

    def measure(self) -> dict[str, float]:
        """Return loss and action error of the averaged weights on the held-out rows."""
        return held_out_scores(
            self.accelerator,
            self.state,
            self.source,
            self.prepare,
            self.held_out,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
        )

    def _evaluate(self, step: int, progress: Progress) -> dict[str, float]:
        """Return the closed-loop success of the checkpoint after a step; log the main process's videos."""
        device = str(self.accelerator.device)
        checkpoint = checkpoint_path(self.run, step)
        scores, videos = evaluate_closed_loop(self.accelerator, self.config.simulation, checkpoint, device)
        progress.write(step, scores, "simulation")
        for video in videos:
            progress.write_video(step, f"simulation/{video.stem}", video)
        return scores

    def _save(self, scores: dict[str, float]) -> None:
        """Write a checkpoint; all processes give their random states and shards, the main one writes."""
        states = gather_object([rng_state(self.state.generator)])
        content = snapshot(self.state)
        if self.accelerator.is_main_process:
            card = model_card(self.config, self.state.policy.config, self.state.step, scores, self.data)
            save_checkpoint(self.run, self.state, content, states, self._origin, card)
        self.accelerator.wait_for_everyone()


def mean_over_processes(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each value over all processes; all call it with the same names."""
    if accelerator.num_processes == 1:
        return dict(values)
    mine = torch.tensor(list(values.values()), dtype=torch.float64).to(accelerator.device, torch.float32)
    reduced: Any = accelerator.reduce(mine, reduction="mean")
    return dict(zip(values, reduced.tolist(), strict=True))


def all_agree(accelerator: Accelerator, mine: bool) -> bool:
    """Return whether `mine` is True in every process; all call it."""
    if accelerator.num_processes == 1:
        return mine
    votes: Any = accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), reduction="sum")
    return votes.item() == accelerator.num_processes
