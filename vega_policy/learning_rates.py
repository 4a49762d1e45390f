"""Which parameters learn, and how fast."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from vega_policy.fusion import gate_weights


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
