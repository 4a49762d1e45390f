"""Optimizer and averaged weights, on whole lists of tensors at once."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from vega_policy.modeling_vega import VegaPolicy
from vega_policy.training.parallel import own_part, whole


class WeightAverage:
    """Exponential moving average of the trainable weights.

    The decay rises with the number of updates k as min(decay, (1 + k) / (10 + k)), so that a short run is
    not dominated by its initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Starts from the module's present weights.

        Args:
            module: Module whose parameters with `requires_grad` are averaged.
            decay: Largest share of the old average kept by an update, in [0, 1); 0 follows the weights.
        """
        self.decay = decay
        self._weights: list[Tensor] = list(trainable(module).values())
        self._average = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Moves the average towards the weights.

        Args:
            updates: Updates made before this one, which sets the decay.
        """
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.decay else 0.0
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    def by_weight(self) -> dict[int, Tensor]:
        """The average of each weight, by the weight's `id`."""
        return {id(weight): mean for weight, mean in zip(self._weights, self._average, strict=True)}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Lends the average to the module; the raw weights come back bit by bit on leaving."""
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
    """Parameters that learn, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def clip_gradient(weights: Iterable[nn.Parameter], most: float) -> float:
    """Scales the gradient so that its norm is at most `most`, unless it is not finite.

    Returns:
        The norm it had, over all shards.
    """
    reached = [weight for weight in weights if weight.grad is not None]
    norm = nn.utils.get_total_norm([weight.grad for weight in reached if weight.grad is not None])
    found = whole(norm).item()
    if math.isfinite(found):
        nn.utils.clip_grads_with_norm_(reached, most, norm)
    return found


def make_optimizer(policy: VegaPolicy, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The policy's own AdamW, in its fused form, and its schedule over the run.

    Args:
        policy: Policy whose config gives the presets and which says what learns.
        steps: Optimizer steps of the whole run.

    Returns:
        Optimizer and learning-rate schedule.
    """
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
