"""The training loop."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vega_policy.training.batches import Batch, Source
from vega_policy.training.checkpoints import Learner, Origin, checkpoint_of, rng_state, save_checkpoint
from vega_policy.training.config import TrainConfig
from vega_policy.training.optimization import train_mode, trainable
from vega_policy.training.progress import Progress
from vega_policy.training.sampler import ShuffledRows


class Trainer:
    """Makes optimizer steps until the run, or this start of it, is complete."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        learner: Learner,
        source: Source,
        sampler: ShuffledRows,
        held_out: Tensor,
        origin: Origin,
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
        """
        self.config, self.accelerator, self.learner, self.origin = config, accelerator, learner, origin
        self.run = Path(config.output_dir)
        self.source, self.sampler, self.held_out = source, sampler, held_out
        self.model: nn.Module = accelerator.prepare(learner.policy)
        self.optimizer = accelerator.prepare(learner.optimizer)
        self.weights = list(trainable(learner.policy).values())
        self.clip_norm = learner.policy.config.get_optimizer_preset().grad_clip_norm

    def fit(self) -> Path:
        """Trains from the learner's step to the last one.

        Returns:
            Folder of the last checkpoint.
        """
        config, learner = self.config, self.learner
        last = config.last_step
        batches = self.source.stream(self.sampler, learner.step * config.accumulate)
        main = self.accelerator.is_main_process
        progress = Progress(self.run, learner.step, config.steps, log_every=config.log_every, shown=main)
        train_mode(learner.policy)
        for step in range(learner.step + 1, last + 1):
            values = self.optimize(batches, progress)
            learner.step = step
            progress.step(step, values)
            if len(self.held_out) and (step % config.evaluate_every == 0 or step == last):
                progress.write(step, {"held_out_loss": self.held_out_loss()})
            if step % config.save_every == 0 or step == last:
                checkpoint = self.save()
        progress.close()
        return checkpoint

    def optimize(self, batches: Iterator[Batch], progress: Progress) -> dict[str, float]:
        """One optimizer step over `accumulate` batches; returns what is worth logging."""
        rounds = self.config.accumulate
        values: dict[str, float] = {}
        for number in range(rounds):
            with progress.waiting():
                batch = self.prepare(next(batches))
            last = number == rounds - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, logged = self.model(batch)
                self.accelerator.backward(loss / rounds)
            for name, value in logged.items():
                values[name] = values.get(name, 0.0) + value / rounds
        norm: Any = self.accelerator.clip_grad_norm_(self.weights, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        values["gradient_norm"] = norm.item()
        values["learning_rate"] = self.learner.optimizer.param_groups[0]["lr"]
        self.learner.scheduler.step()
        self.learner.average.update(self.learner.step)
        return values

    def prepare(self, batch: Batch) -> Batch:
        """Pre-processes a batch; cached features only change place and type."""
        features = {name: batch.pop(name) for name in list(batch) if name.startswith("vega.")}
        device = self.accelerator.device
        moved = {name: value.to(device, non_blocking=True).float() for name, value in features.items()}
        return {**self.learner.processors[0](batch), **moved}

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss of the averaged weights on the held-out rows, always with the same noise.

        Each process takes a share of the rows; the process's own random state is left as it was.
        """
        share = self.held_out[self.accelerator.process_index :: self.accelerator.num_processes]
        total = torch.zeros(2, device=self.accelerator.device)
        self.learner.policy.eval()
        with torch.random.fork_rng(), self.learner.average.applied():
            torch.manual_seed(self.config.seed)
            for rows in share.split(self.config.batch_size):
                batch = self.prepare(self.source.batch(rows))
                with self.accelerator.autocast():
                    loss, _ = self.learner.policy(batch)
                total += torch.tensor([loss.item() * len(rows), len(rows)], device=total.device)
        train_mode(self.learner.policy)
        reduced: Any = self.accelerator.reduce(total, reduction="sum")
        summed, rows_seen = reduced.tolist()
        return summed / rows_seen

    def save(self) -> Path:
        """Writes a checkpoint; all processes give their random states, the main one writes."""
        states = gather_object([rng_state()])
        if self.accelerator.is_main_process:
            save_checkpoint(self.run, self.learner, states, self.origin)
        self.accelerator.wait_for_everyone()
        return checkpoint_of(self.run, self.learner.step)
