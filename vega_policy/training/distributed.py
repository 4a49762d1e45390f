"""Training in several processes: replicas (DDP) or shards (FSDP2) of the trainable weights.

Weights, averages and the optimizer's state are saved whole: a checkpoint does not depend on the number of
processes. The prior is no sub-module of the policy: each process has all of it, and no optimizer holds it.
"""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vega_policy.model.compilation import uncompiled

if TYPE_CHECKING:
    from vega_policy.modeling_vega import VegaPolicy


def make_accelerator(*, cpu: bool, precision: str) -> Accelerator:
    """Return accelerate's view of devices and processes; `precision` is `no` or `bf16`."""
    # Frozen networks keep their statistics, so replicas' buffers never differ.
    replicas = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[replicas])


def replicate(accelerator: Accelerator, policy: "VegaPolicy", unused: list[str]) -> nn.Module:
    """Return the policy as accelerate wraps it: alone, or as one of several replicas.

    Replicas have to search for the weights without gradient in each step if `find_unused_weights` found some.
    """
    handler = accelerator.ddp_handler
    assert handler is not None  # make_accelerator gave one
    handler.find_unused_parameters = bool(unused)
    return accelerator.prepare(policy)


def shard(accelerator: Accelerator, policy: "VegaPolicy") -> None:
    """Shard the trainable weights over the launched processes, block by block (FSDP2), in place.

    The policy is on its device, and features of a cache are already computed.
    """
    if not torch.distributed.is_initialized():
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": {weight for weight in policy.parameters() if not weight.requires_grad},
    }
    lists = [module for module in policy.modules() if isinstance(module, nn.ModuleList)]
    for block in (block for members in reversed(lists) for block in members):  # inner blocks first
        if any(weight.requires_grad for weight in block.parameters()):
            fully_shard(block, **options)
    # Gathered weights are freed after each forward pass: averages are written into the shards in between.
    fully_shard(policy, reshard_after_forward=True, **options)
    register_fsdp_forward_method(policy, "predict_action_chunk")


def find_unused_weights(policy: "VegaPolicy", batch: dict[str, Any]) -> list[str]:
    """Return the names of the weights that a batch's loss does not reach, such as an unused projector's.

    Of the random states only torch's default generator may advance.
    """
    noise, time = policy.sample_noise_and_time(batch["action"], torch.Generator())
    with uncompiled(policy):  # another type than under autocast would be compiled for this one call
        policy(batch, noise=noise, time=time)[0].backward()
    weights = [(name, weight) for name, weight in policy.named_parameters() if weight.requires_grad]
    unused = [name for name, weight in weights if weight.grad is None]
    policy.zero_grad()
    return unused


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """Return a whole tensor sharded as `model` is."""
    if not isinstance(model, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)


def shard_state(optimizer: torch.optim.Optimizer) -> None:
    """Shard an optimizer's state, loaded whole, as its weights are."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = shard_like(value, weight)
