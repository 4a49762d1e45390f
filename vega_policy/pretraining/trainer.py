"""The loop that both trainings share: stops at any moment and goes on; on the CPU bit by bit.

<run>/checkpoints/<step>/   weights, average and optimizer as safetensors, step.json, checksums.json
      metrics.jsonl         one line a log step
      tensorboard/

All that is drawn depends on the seed, the step and the number of clips, so that no random state has to be
kept. On a GPU the fastest kernels are looked for anew at each start, and results agree up to rounding.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from vega_policy.checkpoints import (
    CHECKPOINTS,
    checkpoint_path,
    newest_intact,
    prune_checkpoints,
    set_aside_after,
    write_checksums,
)
from vega_policy.pretraining.config import LearningSettings, PretrainSettings
from vega_policy.run_dir import atomic_folder, drop_lines_after, remove_partial

METRICS = "metrics.jsonl"
KEPT = 2
"""Checkpoints that are kept."""


@dataclass(frozen=True)
class Draws:
    """Where one step's randomness comes from.

    Attributes:
        order: Which clips are taken, and how they are cut.
        noise: Noise and times, on the device.
    """

    order: np.random.Generator
    noise: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int, device: torch.device) -> "Draws":
        """Those of a step."""
        order = np.random.default_rng((seed, step))
        return cls(order, torch.Generator(device).manual_seed(int(order.integers(2**62))))


Loss = Callable[[Draws], tuple[Tensor, dict[str, Tensor]]]
"""From a step's draws to its loss and what else is logged; it knows the network."""


class StageTrainer:
    """A network with all that its learning changes.

    Args:
        network: What learns, on its device; it goes on from the folder's newest sound checkpoint.
        settings: Its optimization.
        folder: The run's folder.
    """

    def __init__(self, network: nn.Module, settings: LearningSettings, folder: Path) -> None:
        self.network, self.settings, self.folder, self.step = network, settings, folder, 0
        self.weights = list(network.parameters())
        self.device = self.weights[0].device
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.average = EMAModel(self.weights, decay=settings.average_decay, foreach=True)
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
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, self.settings.gradient_norm, foreach=True)
        self.optimizer.step()
        self.average.step(self.weights)
        self.step += 1
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Lend the averaged weights to the network; the raw ones come back bit by bit."""
        self.average.store(self.weights)
        self.average.copy_to(self.weights)
        self.network.eval()
        try:
            yield
        finally:
            self.average.restore(self.weights)
            self.network.train()

    def save(self) -> None:
        """Write a checkpoint, unless this step has one, and delete old ones."""
        target = checkpoint_path(self.folder, self.step)
        if target.exists():
            return
        state = self.optimizer.state_dict()["state"]
        with atomic_folder(target) as folder:
            save_file(_by_index(self.weights), folder / "weights.safetensors")
            save_file(_by_index(self.average.shadow_params), folder / "average.safetensors")
            moments = {
                f"{index}.{name}": value.contiguous()
                for index, row in state.items()
                for name, value in row.items()
            }
            save_file(moments, folder / "optimizer.safetensors")
            (folder / "step.json").write_text(json.dumps({"step": self.step}))
            write_checksums(folder)
        prune_checkpoints(self.folder, keep_last=KEPT, keep_best=1)

    def _restore(self, checkpoint: Path) -> None:
        self.step = json.loads((checkpoint / "step.json").read_text())["step"]
        for name, into in (("weights", self.weights), ("average", self.average.shadow_params)):
            saved = load_file(checkpoint / f"{name}.safetensors")
            shapes = {index: tuple(tensor.shape) for index, tensor in saved.items()}
            if shapes != {str(index): tuple(tensor.shape) for index, tensor in enumerate(into)}:
                raise ValueError(f"{checkpoint} holds another architecture; give another output_dir")
            with torch.no_grad():
                for index, tensor in enumerate(into):
                    tensor.copy_(saved[str(index)])
        self.average.optimization_step = self.step
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(checkpoint / "optimizer.safetensors").items():
            index, name = key.split(".")
            weight = self.weights[int(index)]
            if value.shape == weight.shape:  # laid out in memory as the weight is
                value = torch.empty_like(weight, dtype=value.dtype).copy_(value)
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def learning_rate(settings: LearningSettings, step: int) -> float:
    """Rate of a step: linear warm-up, then a cosine down to a tenth at the last step."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def learn(
    learner: StageTrainer,
    loss: Loss,
    validate: Callable[[], dict[str, float]],
    settings: PretrainSettings,
    deadline: float | None,
) -> bool:
    """Train until the last step or the deadline, whichever comes first; a checkpoint is left either way.

    Args:
        learner: What learns.
        loss: Of one step.
        validate: Measures the averaged weights on held-out clips.
        settings: The run.
        deadline: Time (`time.time()`) at which to stop.

    Returns:
        Whether all steps are made.

    Raises:
        FloatingPointError: If loss or gradient are not finite; the last checkpoint is sound.
    """
    if learner.finished:
        return True
    learner.network.train()
    with _Log(learner, settings.tensorboard) as log:
        while not learner.finished and (deadline is None or time.time() < deadline):
            with torch.autocast(learner.device.type, torch.bfloat16, enabled=_autocast(learner, settings)):
                value, parts = loss(Draws.of(settings.seed, learner.step, learner.device))
            norm = learner.update(value)
            log.note({"loss": value, "gradient_norm": norm, **parts})
            at, last = learner.step, learner.finished
            if at % settings.log_every == 0 or at % settings.save_every == 0 or last:
                log.write(at)
            if at % settings.validate_every == 0 or last:
                with learner.averaged():
                    log.write_values(at, validate())
            if at % settings.save_every == 0:
                learner.save()
        log.write(learner.step)
        learner.save()
    return learner.finished


def _autocast(learner: StageTrainer, settings: PretrainSettings) -> bool:
    return settings.precision == "bf16" and learner.device.type == "cuda"


def _by_index(tensors: list[Any]) -> dict[str, Tensor]:
    return {str(index): tensor.detach().contiguous() for index, tensor in enumerate(tensors)}


class _Log:
    """Progress bar, metrics.jsonl and TensorBoard; a context manager."""

    def __init__(self, learner: StageTrainer, tensorboard: bool) -> None:
        folder, first = learner.folder, learner.step
        drop_lines_after(folder / METRICS, first)
        self._file = (folder / METRICS).open("a")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # not installed everywhere

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        self._bar = tqdm(
            total=learner.settings.steps, initial=first, desc=folder.name, unit="step", mininterval=1.0
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

    def note(self, values: dict[str, Tensor]) -> None:
        """Keep one step's values; they stay on the device, so that it need not be waited for."""
        self._rows.append({name: value.detach() for name, value in values.items()})
        self._bar.update()

    def write(self, step: int) -> None:
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
                f"step {step}: {', '.join(broken)} not finite. The last checkpoint is sound; lower the "
                "learning_rate, or give precision=no, and run the same command again"
            )
        self.write_values(step, means)

    def write_values(self, step: int, values: dict[str, float]) -> None:
        """Write values of a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
