"""Loss and action error on episodes that training never sees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vega_policy.compiled import uncompiled
from vega_policy.training.batches import Batch, Source
from vega_policy.training.checkpoints import Learner

Prepare = Callable[[Batch], Batch]


def spread(rows: Tensor, most: int | None) -> Tensor:
    """At most so many of the rows [m], evenly spaced; all for None."""
    if most is None or len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).round().long()]


@torch.no_grad()
def held_out_scores(
    accelerator: Accelerator,
    learner: Learner,
    source: Source,
    prepare: Prepare,
    rows: Tensor,
    *,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """What the averaged weights make of held-out rows, always with the same noise.

    To be called by all processes; each takes its share of the batches. Random states are left as they were.

    Args:
        accelerator: The processes.
        learner: Policy, averaged weights, processors.
        source: Batches of rows.
        prepare: What a batch passes before the policy.
        rows: The rows [m], m >= 1.
        batch_size: Rows at once.
        seed: Seed of the noise.

    Returns:
        `held_out_loss`, the mean training loss of a row, and `held_out_action_error`, the mean absolute
        difference between predicted and demonstrated actions in the dataset's units, padded ones left out.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = rows.split(batch_size)
    sums = torch.zeros(4)  # losses, rows, errors, action values
    with _lent(learner):
        for number in range(rank, -(-len(batches) // world) * world, world):
            # Shards compute in step: a process without a batch of its own repeats the last and counts none.
            own = number < len(batches)
            rows = batches[min(number, len(batches) - 1)]
            measured = _measure(accelerator, learner, source, prepare, rows, seed + number)
            sums += measured if own else 0.0
    reduced: Any = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
    losses, count, errors, values = reduced.tolist()
    return {"held_out_loss": losses / count, "held_out_action_error": errors / values}


def _measure(
    accelerator: Accelerator, learner: Learner, source: Source, prepare: Prepare, rows: Tensor, seed: int
) -> Tensor:
    """Sum of losses, rows, sum of errors, number of action values, [4]."""
    policy = learner.policy
    raw = source.batch(rows)
    actions, is_pad = raw["action"].clone(), raw["action_is_pad"]
    batch = prepare(raw)
    policy.draws = torch.Generator().manual_seed(seed)
    noise = torch.randn(actions.shape, generator=policy.draws)
    with accelerator.autocast():
        loss, _ = policy(batch)
        predicted = policy.predict_action_chunk(batch, noise=noise)
    error = (learner.processors[1](predicted).float().cpu() - actions).abs()[~is_pad]
    return torch.tensor([loss.item() * len(rows), len(rows), error.sum().item(), error.numel()])


@contextmanager
def _lent(learner: Learner) -> Iterator[None]:
    """The policy with averaged weights, in evaluation mode, drawing for itself alone."""
    policy, expert = learner.policy, learner.policy.model.expert
    share, lazy, policy.lazy_log = expert.share, policy.lazy_log, False
    policy.eval()
    expert.share = (0, 1)
    try:
        with learner.average.applied(), uncompiled(policy):
            yield
    finally:
        policy.lazy_log = lazy
        policy.draws, expert.share = learner.draws, share
        policy.train()
