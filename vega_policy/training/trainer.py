"""The training loop."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vega_policy.checkpoints import add_scores, checkpoint_path, prune_checkpoints, read_scores
from vega_policy.data.augmentation import RandomShift
from vega_policy.data.loader import Batch, ShuffledRows, Source
from vega_policy.training.checkpoint import Origin, TrainState, rng_state, save_checkpoint, snapshot
from vega_policy.training.config import TrainConfig
from vega_policy.training.cuda_graph import CapturedStep
from vega_policy.training.distributed import all_agree, mean_over_processes, replicate, without_gradient
from vega_policy.training.failure_guards import BadStep, disk_guard, finite, memory_guard
from vega_policy.training.logging import Progress, model_card, open_boards
from vega_policy.training.optim import clip_gradient, learning_rates, read_scalars, trainable
from vega_policy.training.validation import held_out_scores, play, spread


class Trainer:
    """Makes optimizer steps until the run, or this start of it, is complete."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        learner: TrainState,
        source: Source,
        sampler: ShuffledRows,
        held_out: Tensor,
        origin: Origin,
        data: str,
        instructions: Sequence[str] = (),
    ) -> None:
        """Takes ready parts; `setup.py` makes them.

        Args:
            config: The run.
            accelerator: Devices, processes and precision.
            learner: Policy, averaged weights, optimizer, schedule, processors and step.
            source: Batches of rows.
            sampler: Order of the training rows.
            held_out: Rows of the held-out episodes [m]; empty for none.
            origin: Sizes and data, noted in each checkpoint.
            data: The dataset in a few words, for the model card.
            instructions: All those of the training rows, which a captured step has to know beforehand.
        """
        self.config, self.accelerator, self.learner, self.origin = config, accelerator, learner, origin
        self.run, self.data = Path(config.output_dir), data
        self.source, self.sampler = source, sampler
        self.held_out = spread(held_out, config.held_out_frames)
        self.weights = trainable(learner.policy)
        self.clip_norm = learner.policy.config.get_optimizer_preset().grad_clip_norm
        self.shift = self._random_shift()
        learner.policy.train()
        self.model = self._wrap()
        self.captured: CapturedStep | None = None
        if config.capture:
            self.captured = CapturedStep(
                self.model, learner.policy, accelerator.autocast, instructions, self.clip_norm
            )

    def _random_shift(self) -> RandomShift | None:
        most, sampler = self.config.dataset.shift, self.sampler
        if most == 0:
            return None
        cameras = list(self.learner.policy.config.image_features)
        return RandomShift(most, cameras, seed=self.config.seed, rank=sampler.rank, world=sampler.world)

    def _wrap(self) -> nn.Module:
        """The policy as several processes call it; shards are in place already."""
        policy, launched = self.learner.policy, torch.distributed.is_initialized()  # also as one process
        if self.config.sharding == "full" and launched:
            return policy
        unused = []
        if launched:
            unused = without_gradient(policy, self.prepare(self.source.batch(self.sampler.batch(0))))
        return replicate(self.accelerator, policy, unused)

    def fit(self) -> Path:
        """Trains from the learner's step to the last one.

        Returns:
            Folder of the last checkpoint.

        Raises:
            TrainingStoppedError: If too many steps were not finite, or disk or memory is full.
        """
        config, learner = self.config, self.learner
        height, width = learner.policy.model.backbone.grid
        main = self.accelerator.is_main_process
        boards = open_boards(config, self.run, learner.step) if main else []
        progress = Progress(self.run, learner.step, config.steps, boards, shown=main)
        batches = self.source.stream(self.sampler, learner.step * config.accumulate)
        try:
            with disk_guard(self.run), memory_guard(config, height * width):
                self._make_up(progress)
                for step in range(learner.step + 1, config.last_step + 1):
                    values = self.optimize(batches, progress, step)
                    learner.step = step
                    progress.step(step, values)
                    if step % config.log_every == 0 or step == config.steps:
                        progress.write(step, mean_over_processes(self.accelerator, progress.interval()))
                    self.look(step, progress)
        finally:
            progress.close()
        return checkpoint_path(self.run, learner.step)

    def optimize(self, batches: Iterator[Batch], progress: Progress, step: int) -> dict[str, float]:
        """One optimizer step over `accumulate` batches; returns what is worth logging.

        A step whose loss or gradient is not finite, in any process, changes no weight in all of them.
        """
        learner = self.learner
        values = read_scalars(self._gradient(batches, progress, step))
        values |= learning_rates(learner.optimizer)
        if all_agree(self.accelerator, finite(values["loss"], values["gradient_norm"])):
            learner.optimizer.step()
            learner.average.update(learner.step)
            learner.skips.good()
        else:
            learner.skips.bad(self._bad_step(step, values), self.run, main=self.accelerator.is_main_process)
        learner.optimizer.zero_grad()
        learner.scheduler.step()
        return values | {"skipped_steps": float(learner.skips.total)}

    def _gradient(self, batches: Iterator[Batch], progress: Progress, step: int) -> dict[str, Tensor]:
        """Leaves the clipped gradient of a step in the weights; returns its norm and what was logged."""
        rounds = self.config.accumulate
        sums: dict[str, Tensor] = {}
        for number in range(rounds):
            with progress.waiting():
                batch = self.prepare(next(batches))
            if self.shift is not None:
                batch = self.shift(batch, (step - 1) * rounds + number)
            noise, time = self.learner.policy.sample_noise_and_time(
                batch["action"],
                self.learner.draws,
                self.accelerator.process_index,
                self.accelerator.num_processes,
            )
            if self.captured is not None:  # of a single round, or it is refused at the start
                return self.captured(batch, noise, time)
            last = number == rounds - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss, logged = self.model(batch, noise=noise, time=time, metrics_as_tensors=True)
                self.accelerator.backward(loss / rounds)
            for name, value in logged.items():
                sums[name] = sums.get(name, 0.0) + torch.as_tensor(value) / rounds
        sums["gradient_norm"] = clip_gradient(self.weights.values(), self.clip_norm)
        return sums

    def _bad_step(self, step: int, values: dict[str, float]) -> BadStep:
        rounds = self.config.accumulate
        numbers = range((step - 1) * rounds, step * rounds)
        rows = [row for number in numbers for row in self.sampler.batch(number).tolist()]
        weights = [name for name, weight in self.weights.items() if weight.grad is not None]
        wrong = [name for name in weights if not self.weights[name].grad.isfinite().all()]  # pyright: ignore[reportOptionalMemberAccess]
        return BadStep(step, values["loss"], values["gradient_norm"], rows, wrong[:8])

    def prepare(self, batch: Batch) -> Batch:
        """Pre-processes a batch; what is cached only changes place and, but for frames, type."""
        cached = {name: batch.pop(name) for name in list(batch) if name.startswith("vega.")}
        device = self.accelerator.device
        moved = {name: value.to(device, non_blocking=True) for name, value in cached.items()}
        moved |= {name: value.float() for name, value in moved.items() if value.is_floating_point()}
        return {**self.learner.processors[0](batch), **moved}

    def look(self, step: int, progress: Progress) -> None:
        """After a step: measures, saves, plays and tidies up, each where it is due."""
        config = self.config
        last, every = step == config.last_step, config.simulation.every
        playing = every > 0 and (last or step % every == 0)
        saving = last or playing or step % config.save_every == 0
        measuring = len(self.held_out) > 0 and (saving or step % config.evaluate_every == 0)
        scores: dict[str, float] = {}
        if measuring:
            scores = self.measure()
            progress.write(step, scores, "held_out")
        if saving:
            self.save(scores)
        if playing:
            scores |= self.play(step, progress)
        if self.accelerator.is_main_process and scores:
            add_scores(self.run, step, scores)
        if self.accelerator.is_main_process and saving:
            prune_checkpoints(self.run, keep_last=config.keep_last, keep_best=config.keep_best)

    def _make_up(self, progress: Progress) -> None:
        """Plays the checkpoint this start goes on from, where a kill came between saving and playing it."""
        step, every = self.learner.step, self.config.simulation.every
        if step and every and step % every == 0 and "success" not in read_scores(self.run).get(step, {}):
            scores = self.play(step, progress)
            if self.accelerator.is_main_process:
                add_scores(self.run, step, scores)

    def measure(self) -> dict[str, float]:
        """Loss and action error of the averaged weights on the held-out rows."""
        return held_out_scores(
            self.accelerator,
            self.learner,
            self.source,
            self.prepare,
            self.held_out,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
        )

    def play(self, step: int, progress: Progress) -> dict[str, float]:
        """Closed-loop success of the checkpoint after a step; the main process's films go to the boards."""
        device = str(self.accelerator.device)
        played = play(self.accelerator, self.config.simulation, checkpoint_path(self.run, step), device)
        progress.write(step, played.scores, "simulation")
        for film in played.films:
            progress.film(step, f"simulation/{film.stem}", film)
        return played.scores

    def save(self, scores: dict[str, float]) -> None:
        """Writes a checkpoint; all processes give their random states and shards, the main one writes."""
        states = gather_object([rng_state(self.learner.draws)])
        content = snapshot(self.learner)
        if self.accelerator.is_main_process:
            card = model_card(self.config, self.learner.step, scores, self.data)
            save_checkpoint(self.run, self.learner, content, states, self.origin, card)
        self.accelerator.wait_for_everyone()
