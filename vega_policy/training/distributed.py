"""Several processes: replicas (DDP) or shards (FSDP2) of what learns, and the few sums they share.

Weights, averages and the optimizer's state are saved whole, so that a checkpoint does not know how it was
trained. The prior is no sub-module of the policy: each process has all of it, and no optimizer knows it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from vega_policy.modeling_vega import VegaPolicy


def make_accelerator(*, cpu: bool, precision: str) -> Accelerator:
    """Devices, processes and precision of this start.

    Args:
        cpu: Whether to stay off the GPUs.
        precision: `no` or `bf16`.
    """
    # Frozen networks keep their statistics, so replicas' buffers never differ.
    replicas = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[replicas])


def replicate(accelerator: Accelerator, policy: "VegaPolicy", unused: list[str]) -> nn.Module:
    """The policy as accelerate wraps it: alone, or as one of several replicas.

    Args:
        accelerator: The processes.
        policy: The policy.
        unused: Weights that get no gradient, by `without_gradient`; replicas have to look for them.
    """
    handler = accelerator.ddp_handler
    assert handler is not None  # make_accelerator gave one
    handler.find_unused_parameters = bool(unused)
    return accelerator.prepare(policy)


def shard(accelerator: Accelerator, policy: "VegaPolicy") -> None:
    """Spreads the weights that learn over the processes, block by block (FSDP2), in place.

    Args:
        accelerator: The processes; one is allowed and shards nothing.
        policy: The policy, on its device; features of a cache have been computed before.
    """
    if not torch.distributed.is_initialized():
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": {weight for weight in policy.parameters() if not weight.requires_grad},
    }
    for block in _blocks(policy):
        fully_shard(block, **options)
    # Gathered weights never outlive a forward pass: the average is lent to the shards in between.
    fully_shard(policy, reshard_after_forward=True, **options)
    register_fsdp_forward_method(policy, "predict_action_chunk")


def _blocks(policy: "VegaPolicy") -> list[nn.Module]:
    """Members of the policy's lists of blocks that learn, inner ones first."""
    lists = [module for module in policy.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for members in reversed(lists) for block in members]
    return [block for block in blocks if any(weight.requires_grad for weight in block.parameters())]


def without_gradient(policy: "VegaPolicy", batch: dict[str, Any]) -> list[str]:
    """Names of the weights that a batch's loss does not reach, such as the projector of an unread stream.

    Of the random states only torch's default generator may advance.
    """
    noise, time = policy.sample_noise_and_time(batch["action"], torch.Generator())
    policy(batch, noise=noise, time=time)[0].backward()
    weights = [(name, weight) for name, weight in policy.named_parameters() if weight.requires_grad]
    unused = [name for name, weight in weights if weight.grad is None]
    policy.zero_grad()
    return unused


def mean_over_processes(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """Mean of each value over all processes; to be called by all, with the same names."""
    if accelerator.num_processes == 1:
        return dict(values)
    mine = torch.tensor(list(values.values()), dtype=torch.float64).to(accelerator.device, torch.float32)
    reduced: Any = accelerator.reduce(mine, reduction="mean")
    return dict(zip(values, reduced.tolist(), strict=True))


def all_agree(accelerator: Accelerator, mine: bool) -> bool:
    """Whether it is so in every process; to be called by all."""
    if accelerator.num_processes == 1:
        return mine
    votes: Any = accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), reduction="sum")
    return votes.item() == accelerator.num_processes


def own_part(value: Tensor) -> Tensor:
    """What this process holds of a tensor, to be written to in place; all of it if it is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Any) -> Any:
    """A tensor, detached and gathered if it is sharded; anything else as it is."""
    if not isinstance(value, DTensor):
        return value.detach() if isinstance(value, Tensor) else value
    gathered = value.full_tensor().detach()
    # Where processes do not divide a tensor evenly it is a view into padded memory, which no file may hold.
    return gathered if gathered.untyped_storage().nbytes() == gathered.nbytes else gathered.clone()


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """This process's view of a whole tensor, sharded as `model` is."""
    if not isinstance(model, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)


def shard_state(optimizer: torch.optim.Optimizer) -> None:
    """Shards an optimizer's state, loaded whole, as its weights are."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = shard_like(value, weight)
