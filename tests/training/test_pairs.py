"""Paired batches: two episodes of one instruction at the same phase, with the same noise and augmentation."""

from dataclasses import replace

import pytest
import torch

from tests.synthetic_dataset import write_dataset
from tests.training.test_cuda_graph import UncapturedWithoutPrior
from tests.training_runs import assert_bitwise_equal, tiny_policy, tiny_run
from vega_policy.data.augmentation import FRAMES, make_augmentations
from vega_policy.data.dataset import STATE, DatasetConfig, FrameTable
from vega_policy.data.loader import PairedRows, ShuffledRows
from vega_policy.model.config import ActionHeadConfig, BaseConfig
from vega_policy.training import cuda_graph
from vega_policy.training import train as setup
from vega_policy.training.distributed import make_accelerator
from vega_policy.training.train import make_trainer, train

LENGTHS, TASKS = (9, 21, 5, 13, 30), (0, 1, 0, 1, 0)


@pytest.fixture
def table():
    lengths, ends = torch.tensor(LENGTHS), torch.tensor(LENGTHS).cumsum(0)
    rows = int(ends[-1])
    return FrameTable(
        state=torch.zeros(rows, 1),
        action=torch.zeros(rows, 1),
        episode=torch.arange(len(LENGTHS)).repeat_interleave(lengths),
        episode_end=ends.repeat_interleave(lengths),
        task=torch.tensor(TASKS).repeat_interleave(lengths),
        tasks=("lift", "push"),
        fps=10,
    )


def phase(table, rows):
    lengths = torch.tensor(LENGTHS)[table.episode[rows]]
    return 1 - (table.episode_end[rows] - 1 - rows) / (lengths - 1)


@pytest.mark.parametrize("stride", [1, 3])
def test_each_row_is_followed_by_one_of_its_phase_in_another_episode_of_its_instruction(table, stride):
    rows = table.every(stride).nonzero()[:, 0]
    sampler = PairedRows(rows, 8, table=table, seed=0)
    batches = torch.stack([sampler.batch(number) for number in range(60)])  # several passes
    first, second = batches[:, ::2].flatten(), batches[:, 1::2].flatten()
    assert torch.equal(first[:4], ShuffledRows(rows, 4, seed=0).batch(0))
    assert torch.isin(second, rows).all()
    assert torch.equal(table.task[first], table.task[second])
    assert (table.episode[first] != table.episode[second]).all()
    assert set(zip(table.episode[first].tolist(), table.episode[second].tolist(), strict=True)) == {
        (one, other)
        for one, a in enumerate(TASKS)
        for other, b in enumerate(TASKS)
        if a == b and one != other
    }
    if stride == 1:  # half a frame of the shortest episode
        assert (phase(table, first) - phase(table, second)).abs().max() <= 0.5 / 4


def test_a_batch_follows_from_seed_and_number_and_processes_share_it(table):
    rows = torch.arange(len(table))
    sampler = PairedRows(rows, 8, table=table, seed=3)
    batches = [sampler.batch(number) for number in range(6)]
    for number in (5, 2):
        assert torch.equal(PairedRows(rows, 8, table=table, seed=3).batch(number), batches[number])
        assert not torch.equal(PairedRows(rows, 8, table=table, seed=4).batch(number), batches[number])
        halves = [
            PairedRows(rows, 4, table=table, seed=3, rank=rank, world=2).batch(number) for rank in (0, 1)
        ]
        assert torch.equal(torch.cat(halves), batches[number])
    assert not torch.equal(batches[0], batches[1])


def test_the_counterpart_comes_from_another_dataset_that_has_the_instruction(table):
    rows, shares = torch.arange(len(table)), [(35, 1.0), (43, 1.0)]  # episodes 0 to 2, and 3 and 4
    sampler = PairedRows(rows, 64, table=table, starts=[0, 35], seed=0, shares=shares)
    pairs = torch.cat([table.episode[sampler.batch(number)].reshape(-1, 2) for number in range(9)])
    found = {tuple(pair) for pair in pairs.tolist()}
    assert found == {(0, 4), (2, 4), (4, 0), (4, 2), (1, 3), (3, 1)}


def test_an_instruction_of_one_episode_is_refused(table):
    rows = table.rows_of([0, 1, 2])
    with pytest.raises(ValueError, match="needs two training episodes of each instruction; 'push' has one"):
        PairedRows(rows, 8, table=table, seed=0)


def test_a_pair_shares_every_draw_of_the_augmentation():
    config = DatasetConfig("tests/synthetic", shift=3, brightness=0.3, hue=0.1, state_dropout=0.5, pairs=True)
    views = torch.randint(0, 256, (6, 2, 3, 16, 16), dtype=torch.uint8).repeat_interleave(2, dim=0)
    given = {FRAMES: views, STATE: torch.ones(12, 8), "vega.displacement": torch.zeros(12, 3)}
    draws = {"seed": 5, "displacement_noise": 0.02}
    for augment in make_augmentations(config, ["a", "b"], **draws):
        changed = augment(given, 1)
        drawn = augment.draw(12, 1)
        assert len(drawn.unique(dim=0)) > 1
        for values in (drawn, *(changed[name] for name in changed)):
            assert torch.equal(values[::2], values[1::2])
    parts = [make_augmentations(config, ["a", "b"], **draws, rank=rank, world=3) for rank in range(3)]
    for whole, *several in zip(make_augmentations(config, ["a", "b"], **draws), *parts, strict=True):
        assert torch.equal(torch.cat([part.draw(4, 3) for part in several]), whole.draw(12, 3))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "pairs", lengths=(5, 4, 7, 6))


def run(root, output, head="flow", **fields):
    config = ActionHeadConfig(name=head, width=16, depth=1, heads=2, steps=2, prefix_steps=2)
    fields = {"batch_size": 4} | fields
    dataset = {"pairs": True, "state_dropout": 0.3} | fields.pop("dataset", {})
    return tiny_run(root, output, policy=tiny_policy(head=config), dataset=dataset, **fields)


@pytest.mark.parametrize("head", ["flow", "l1"])
def test_a_pair_shares_noise_time_and_prefix(data, tmp_path, head, monkeypatch):
    trainer = make_trainer(
        run(data, tmp_path / "run", head), make_accelerator(cpu=True, precision="no"), None
    )
    given = []
    forward = trainer.state.policy.model.head.loss
    monkeypatch.setattr(
        trainer.state.policy.model.head, "loss", lambda *args: (given.append(args), forward(*args))[1]
    )
    trainer.fit()
    for _, _, actions, _, noise, time, *_ in given:
        assert not torch.equal(actions[::2], actions[1::2])
        assert torch.equal(time[::2], time[1::2])
        assert (noise is None) == (head == "l1")
        assert noise is None or torch.equal(noise[::2], noise[1::2])
        assert noise is None or not torch.equal(noise[0], noise[2])


def test_a_run_resumes_bitwise(data, tmp_path):
    whole = train(run(data, tmp_path / "whole"))
    parts = [train(run(data, tmp_path / "parts", **more)) for more in ({"stop_after": 2}, {"resume": True})]
    assert_bitwise_equal(whole, parts[1])


def test_captured_steps_learn_pairs_as_uncaptured_ones_do(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_graph, "CapturedGradient", UncapturedWithoutPrior)
    monkeypatch.setattr(setup, "check_capturable", lambda *_: None)
    dataset = {"cached": ["frames"], "shift": 2}
    values = []
    for on in (False, True):
        config = run(data, tmp_path / f"{on}", capture=on, dataset=dataset)
        trainer = make_trainer(config, make_accelerator(cpu=True, precision="no"), None)
        trainer.fit()
        values.append({name: weight.detach() for name, weight in trainer.weights.items()})
    torch.testing.assert_close(values[1], values[0], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_paired_is_refused(root, data, tmp_path):
    with pytest.raises(ValueError, match="needs two training episodes of each instruction; 'push the cube'"):
        train(run(root, tmp_path / "run"))
    with pytest.raises(ValueError, match="needs an even batch_size; got 5"):
        run(data, tmp_path / "run", batch_size=5)
    config = run(data, tmp_path / "run")
    with pytest.raises(ValueError, match="a base samples its own"):
        replace(config, policy=tiny_policy(base=BaseConfig(name="smolvla")))
