"""Guards that stop a training with advice: values that are not finite, a full disk, exhausted memory."""

import errno
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vega_policy.checkpoints import CHECKPOINTS
from vega_policy.run_dir import remove_partial, write_json
from vega_policy.training.config import TrainConfig

REPORT = "not_finite.json"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory")


class TrainingStoppedError(RuntimeError):
    """Training cannot continue; the message says why, what is intact, and what to do."""


class NotFiniteError(TrainingStoppedError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


class DiskFullError(TrainingStoppedError):
    """A file could not be written for want of space."""


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
def disk_guard(run: Path) -> Iterator[None]:
    """Turn a full disk into one clear error, and delete half-written files.

    Raises:
        DiskFullError: If a write inside failed for want of space.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        remove_partial(run / CHECKPOINTS)
        free = shutil.disk_usage(run).free
        raise DiskFullError(
            f"{run}: the disk is full ({free / 1e9:.1f} GB free; {error}). Earlier checkpoints are complete "
            "and untouched. Make room, or lower keep_last and keep_best, then resume with resume=true."
        ) from error


def check_space(run: Path, needed: int) -> None:
    """Refuse to start where a checkpoint of `needed` bytes does not fit.

    Raises:
        DiskFullError: If less is free.
    """
    free = shutil.disk_usage(run).free
    if free < needed:
        raise DiskFullError(
            f"{run}: a checkpoint takes about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free. Make "
            "room or give an output_dir on another disk."
        )


def _is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    return any(f"(os error {code})" in str(error) for code in _DISK_FULL)  # safetensors gives only the text


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
