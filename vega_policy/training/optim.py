"""What surrounds the gradient of a training step: optimizer, clipping, averaged weights, guards.

The guards stop a training with advice: values that are not finite, a full disk, exhausted memory.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vega_policy.run_dir import DiskFullError, write_json
from vega_policy.training.config import TrainConfig

if TYPE_CHECKING:
    from vega_policy.modeling_vega import VegaPolicy

REPORT = "not_finite.json"
_NO_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory")


class EMA:
    """Exponential moving average of a module's trainable weights, starting from the present ones.

    The decay rises with the number of updates k as min(decay, (1 + k) / (10 + k)), so that a short run is
    not dominated by its initial weights; a decay of 0 follows the weights.
    """

    # Not diffusers' EMAModel: it rounds otherwise (s - (1 - d)(s - w) instead of lerp), which would change
    # the weights of every run.

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights: list[Tensor] = list(trainable(module).values())
        self._average = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the average towards the weights, after `updates` earlier calls."""
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.decay else 0.0
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    def by_weight(self) -> dict[int, Tensor]:
        """Return the average of each weight by the weight's `id`."""
        return {id(weight): mean for weight, mean in zip(self._weights, self._average, strict=True)}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module; on leaving, the raw weights are restored bitwise."""
        raw = [weight.detach().clone() for weight in self._weights]
        self._write(self._average)
        try:
            yield
        finally:
            self._write(raw)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_([own_part(weight) for weight in self._weights], [own_part(v) for v in values])


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def clip_gradient(weights: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale a finite gradient to a norm of at most `most`, and return its former norm over all shards.

    Nothing waits for the device.
    """
    reached = [weight for weight in weights if weight.grad is not None]
    norm = nn.utils.get_total_norm([weight.grad for weight in reached if weight.grad is not None])
    # a norm of zero scales by one
    nn.utils.clip_grads_with_norm_(reached, most, torch.where(norm.isfinite(), norm, 0.0))
    return whole(norm)


def own_part(value: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, to be written in place; all if it is unsharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Any) -> Any:
    """Return a tensor detached and, if sharded, gathered; anything else unchanged."""
    if not isinstance(value, DTensor):
        return value.detach() if isinstance(value, Tensor) else value
    gathered = value.full_tensor().detach()
    # A tensor that processes divide unevenly is a view into padded memory, which safetensors refuses.
    return gathered if gathered.untyped_storage().nbytes() == gathered.nbytes else gathered.clone()


def read_scalars(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Read scalars off their device in one transfer: the only time a step waits for it."""
    devices = {value.device for value in scalars.values() if value.device.type != "cpu"}
    device = next(iter(devices), torch.device("cpu"))
    stacked = torch.stack([value.detach().to(device, torch.float32) for value in scalars.values()])
    return dict(zip(scalars, stacked.tolist(), strict=True))


def make_optimizer(policy: "VegaPolicy", steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Return the policy's own AdamW, fused, and its learning-rate schedule over a run of `steps`."""
    preset = policy.config.get_optimizer_preset()
    optimizer = torch.optim.AdamW(
        policy.get_optim_params(),
        lr=preset.lr,
        betas=preset.betas,
        eps=preset.eps,
        weight_decay=preset.weight_decay,
        fused=True,
    )
    return optimizer, policy.config.get_scheduler_preset().build(optimizer, steps)


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return `learning_rate`, and `learning_rate/gate` where the gate has one of its own."""
    names = ("learning_rate", "learning_rate/gate")
    groups = optimizer.param_groups
    return {name: float(group["lr"]) for name, group in zip(names[: len(groups)], groups, strict=True)}


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
        """Count a skipped step; at the limit the main process writes a report before training ends.

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
    """Add to the error of a full disk, which `disk_guard` raises inside, what to lower.

    Raises:
        DiskFullError: If a write inside failed for want of space.
    """
    try:
        yield
    except DiskFullError as error:
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
