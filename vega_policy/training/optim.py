"""Optimizer and averaged weights, on whole lists of tensors at once."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vega_policy.model.fusion import gate_weights
from vega_policy.training.distributed import own_part, whole

if TYPE_CHECKING:
    from vega_policy.modeling_vega import VegaPolicy


class EMA:
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


def clip_gradient(weights: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scales the gradient so that its norm is at most `most`, unless it is not finite.

    Nothing waits for the device.

    Returns:
        The norm it had, over all shards, a scalar.
    """
    reached = [weight for weight in weights if weight.grad is not None]
    norm = nn.utils.get_total_norm([weight.grad for weight in reached if weight.grad is not None])
    # a norm of zero scales by one
    nn.utils.clip_grads_with_norm_(reached, most, torch.where(norm.isfinite(), norm, 0.0))
    return whole(norm)


def read_scalars(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Values of scalars, read off their device in one go: the only time a step waits for it."""
    devices = {value.device for value in scalars.values() if value.device.type != "cpu"}
    place = next(iter(devices), torch.device("cpu"))
    stacked = torch.stack([value.detach().to(place, torch.float32) for value in scalars.values()])
    return dict(zip(scalars, stacked.tolist(), strict=True))


def make_optimizer(policy: "VegaPolicy", steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
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


def parameter_groups(model: nn.Module, rate: float, gate_scale: float) -> list[Any]:
    """What an optimizer takes: all parameters that learn, the prior's not among them.

    Args:
        model: The policy.
        rate: Learning rate.
        gate_scale: Learning rate of the gate, as a share of `rate`.

    Returns:
        The parameters; or, where a gate has another rate, two groups, the second of which is the gate's.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gate = {id(weight) for weight in gate_weights(model)}
    if gate_scale == 1 or not gate:
        return learning
    slow = [parameter for parameter in learning if id(parameter) in gate]
    others = [parameter for parameter in learning if id(parameter) not in gate]
    return [{"params": others}, {"params": slow, "lr": gate_scale * rate}]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The rates now: `learning_rate`, and `learning_rate/gate` where the gate has one of its own."""
    names = ("learning_rate", "learning_rate/gate")
    groups = optimizer.param_groups
    return {name: float(group["lr"]) for name, group in zip(names[: len(groups)], groups, strict=True)}
