"""What stops a training in time: it says why and what to do, and leaves the last good checkpoint intact."""

import json
import resource

import pytest
import torch

from tests.training_runs import (
    assert_bitwise_equal,
    cache_of,
    saved_weights,
    stopped_run,
    tiny_policy,
    tiny_run,
)
from vega_policy.checkpoints import checkpoint_path, newest_intact
from vega_policy.run_dir import DiskFullError
from vega_policy.training.distributed import make_accelerator
from vega_policy.training.optim import (
    MemoryExhaustedError,
    NotFiniteError,
    TrainingStoppedError,
    memory_guard,
)
from vega_policy.training.train import choose_checkpoint, make_trainer, train


class SpoiledSource:
    """Gives the batches of another source, some of them with an infinite state."""

    def __init__(self, source, spoiled):
        self.source, self.spoiled = source, spoiled

    def batch(self, rows):
        return self.source.batch(rows)

    def stream(self, sampler, first):
        for number, batch in enumerate(self.source.stream(sampler, first), start=first):
            if number in self.spoiled:
                batch["observation.state"] = batch["observation.state"] * float("inf")
            yield batch


def run(root, output, spoiled=(), **fields):
    config = tiny_run(root, output, **fields)
    accelerator = make_accelerator(cpu=True, precision="no")
    trainer = make_trainer(config, accelerator, choose_checkpoint(config, accelerator))
    trainer.source = SpoiledSource(trainer.source, set(spoiled))
    return trainer.fit()


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(root, tmp_path):
    fields = {"steps": 3, "save_every": 1}
    run(root, tmp_path / "run", spoiled=[1], **fields)
    first, second, third = (saved_weights(checkpoint_path(tmp_path / "run", step)) for step in (1, 2, 3))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert any(not torch.equal(second[name], third[name]) for name in second)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert ["loss" in line for line in lines] == [True, False, True]


def test_skipped_steps_are_remembered_by_a_run_that_goes_on(root, tmp_path):
    run(root, tmp_path / "straight", spoiled=[1])
    run(root, tmp_path / "parts", spoiled=[1], stop_after=2)
    resumed = train(tiny_run(root, tmp_path / "parts", resume=True))
    assert_bitwise_equal(checkpoint_path(tmp_path / "straight", 4), resumed)
    state = json.loads((resumed / "training_state" / "training_step.json").read_text())
    assert (state["skipped"], state["skipped_in_a_row"]) == (1, 0)


def test_too_many_in_a_row_end_the_training_with_a_report_and_sound_checkpoints(root, tmp_path):
    with pytest.raises(NotFiniteError, match=r"3 steps in a row, up to step 5.*not_finite\.json"):
        run(root, tmp_path / "run", spoiled=[0, 2, 3, 4], steps=9, save_every=2, max_skipped_steps=3)
    report = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert [bad["step"] for bad in report] == [3, 4, 5]
    assert all(len(bad["rows"]) == 5 and bad["weights"] for bad in report)
    newest = newest_intact(tmp_path / "run")
    assert newest is not None
    assert all(value.isfinite().all() for value in saved_weights(newest).values())


def test_a_full_disk_is_one_clear_error_and_the_earlier_checkpoint_stays(root, tmp_path, finished):
    stopped_run(finished, tmp_path / "run")
    largest, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a file above 50 kB meets the disk's end
    try:
        full = r"000004: the disk is full \(it needs more than \d+ bytes, \d+ are free\).*Lower keep_last"
        with pytest.raises(DiskFullError, match=full):
            train(tiny_run(root, tmp_path / "run", resume=True, dataset=cache_of(finished)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["000002", "last"]
    resumed = train(tiny_run(root, tmp_path / "run", resume=True, dataset=cache_of(finished)))
    assert resumed.name == "000004"


def test_a_lack_of_memory_names_what_to_lower_in_order_of_use(root, tmp_path):
    config = tiny_run(root, tmp_path, policy=tiny_policy(chunk_size=50))
    config.vega.input_features = {}
    with pytest.raises(MemoryExhaustedError) as caught, memory_guard(config, tokens=4):
        torch.empty(1 << 60)
    message = str(caught.value)
    order = ["batch_size=2 accumulate=2", "chunk_size (now 50", "cameras in policy.input_features"]
    assert [message.index(part) for part in order] == sorted(message.index(part) for part in order)
    assert isinstance(caught.value, TrainingStoppedError)


def test_other_errors_are_not_called_a_lack_of_memory(root, tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), memory_guard(tiny_run(root, tmp_path), tokens=4):
        raise RuntimeError("shapes do not fit")
