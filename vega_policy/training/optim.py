"""Optimizer, learning rates, gradient clipping and averaged weights (EMA)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vega_policy.training.distributed import own_part, whole

if TYPE_CHECKING:
    from vega_policy.modeling_vega import VegaPolicy


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
