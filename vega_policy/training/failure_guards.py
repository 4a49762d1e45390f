"""Guards that stop a training with advice: values that are not finite, a full disk, exhausted memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vega_policy.run_dir import DiskFullError, is_disk_full, write_json
from vega_policy.training.config import TrainConfig

REPORT = "not_finite.json"
_NO_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory")


class TrainingStoppedError(RuntimeError):
    """Training cannot continue; the message says why, what is intact, and what to do."""


class NotFiniteError(TrainingStoppedError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


class MemoryExhaustedError(TrainingStoppedError):
    """The device or the machine has no memory left."""


@dataclass(frozen=True)
class BadStep:
    """A skipped step."""

    step: int
    loss: float
    gradient_norm: float
    rows: list[int]  # dataset rows of its batches in the main process
    weights: list[str]  # the first ones whose gradient is not finite


@dataclass
class NonFiniteGuard:
    """Counts skipped steps, and stops a training after `limit` of them in a row."""

    limit: int
    total: int = 0  # since the run began
    in_a_row: int = 0
    recent: list[BadStep] = field(default_factory=list)  # those in a row, since this start

    def record_good(self) -> None:
        """Count a step that was made."""
        self.in_a_row = 0
        self.recent.clear()

    def record_bad(self, step: BadStep, run: Path, *, main: bool) -> None:
        """Count a skipped step; the main process writes a report to the run's folder before stopping.

        Raises:
            NotFiniteError: At the limit.
        """
        self.total += 1
        self.in_a_row += 1
        self.recent.append(step)
        if self.in_a_row < self.limit:
            return
        if main:
            write_json(run / REPORT, [asdict(bad) for bad in self.recent])
        names = ", ".join(step.weights[:3]) or "none"
        raise NotFiniteError(
            f"{self.in_a_row} steps in a row, up to step {step.step}, had a loss or a gradient that was not "
            f"finite (loss {step.loss}, gradient norm {step.gradient_norm}, first weights: {names}). Their "
            f"dataset rows are in {run / REPORT}; the checkpoints are untouched. Inspect these rows, lower "
            "policy.optimizer_lr or try precision=no; max_skipped_steps sets how many are allowed."
        )

    def state(self) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        self.total, self.in_a_row = state["skipped"], state["skipped_in_a_row"]


def are_finite(*values: float) -> bool:
    """Return whether all values are finite."""
    return all(map(math.isfinite, values))


@contextmanager
def disk_advice() -> Iterator[None]:
    """Add to the error of a full disk what to lower.

    Raises:
        DiskFullError: If a write inside failed for want of space.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"{error} Earlier checkpoints are untouched. Lower keep_last and keep_best to need less; "
            "resume=true resumes."
        ) from error


@contextmanager
def memory_guard(config: TrainConfig, tokens: int) -> Iterator[None]:
    """Turn exhausted memory into advice on what to lower; `tokens` are those of one view's image.

    Raises:
        MemoryExhaustedError: If memory ran out inside.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(mark in str(error) for mark in _NO_MEMORY):
            raise
        raise MemoryExhaustedError(f"{_advice(config, tokens)} ({str(error).splitlines()[0]})") from error


def _advice(config: TrainConfig, tokens: int) -> str:
    views, chunk = len(config.vega.image_features), config.vega.chunk_size
    lower = []
    if config.batch_size > 1:
        half = config.batch_size // 2
        lower.append(
            f"batch_size={half} accumulate={2 * config.accumulate} (now {config.batch_size} and "
            f"{config.accumulate}; it learns from as many samples a step)"
        )
    image = f"cameras in policy.input_features or policy.frame_size (now {views} views of {tokens} tokens)"
    actions = f"policy.chunk_size (now {chunk} action tokens)"
    lower += [image, actions] if views * tokens >= chunk else [actions, image]
    return f"Out of memory. Lower, the most useful first: {'; '.join(lower)}. precision=bf16 helps on a GPU."
