"""The trainer's parts against closed forms: order of samples, chunks, averaged weights, folders, batches."""

import sys

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch import nn

from tests.synthetic_dataset import REPO_ID, write_dataset
from vega_policy.data.dataset import check_finite, read_table
from vega_policy.data.loader import CachedSource, ShuffledRows
from vega_policy.training.optim import EMA


def test_each_pass_visits_every_row_once_in_another_order():
    rows = torch.arange(100, 110)
    sampler = ShuffledRows(rows, 5, seed=0)
    first, second = (torch.cat([sampler.batch(k), sampler.batch(k + 1)]) for k in (0, 2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == rows.tolist()
    assert first.tolist() != second.tolist()


def test_a_batch_does_not_depend_on_what_was_asked_for_before():
    straight = ShuffledRows(torch.arange(7), 3, seed=1)
    batches = [straight.batch(number).tolist() for number in range(20)]
    assert ShuffledRows(torch.arange(7), 3, seed=1).batch(17).tolist() == batches[17]
    assert ShuffledRows(torch.arange(7), 3, seed=2).batch(17).tolist() != batches[17]


def test_a_batch_may_be_larger_than_the_dataset():
    assert sorted(ShuffledRows(torch.arange(3), 6, seed=0).batch(4).tolist()) == [0, 0, 1, 1, 2, 2]


def test_processes_share_one_global_batch():
    alone = ShuffledRows(torch.arange(50), 8, seed=0).batch(3)
    shares = [ShuffledRows(torch.arange(50), 4, seed=0, rank=rank, world=2).batch(3) for rank in range(2)]
    assert torch.equal(torch.cat(shares), alone)


def test_a_mixture_keeps_its_shares_and_repeats_a_row_only_after_all_of_its_dataset():
    shares = [(3, 1.0), (40, 1.0), (7, 2.0)]  # rows and weight of each dataset
    sampler = ShuffledRows(torch.arange(50), 10, seed=4, shares=shares)
    samples = torch.cat([sampler.batch(number) for number in range(40)])
    parts = [samples[samples < 3], samples[(samples >= 3) & (samples < 43)], samples[samples >= 43]]
    assert [len(part) for part in parts] == [100, 100, 200]
    for part, (length, _) in zip(parts, shares, strict=True):
        counts = part.unique(return_counts=True)[1]
        assert len(counts) == length
        assert counts.max() - counts.min() <= 1
    again = ShuffledRows(torch.arange(50), 10, seed=4, shares=shares)
    assert torch.equal(again.batch(37), samples[370:380])
    halves = [ShuffledRows(torch.arange(50), 5, seed=4, rank=r, world=2, shares=shares) for r in (0, 1)]
    assert torch.equal(torch.cat([half.batch(37) for half in halves]), samples[370:380])


def test_chunks_and_padding_are_those_of_lerobot(root):
    dataset = LeRobotDataset(
        REPO_ID, root=root, video_backend="pyav", delta_timestamps={"action": [k / 10 for k in range(4)]}
    )
    table = read_table(root)
    action, is_pad = table.chunks(torch.arange(len(table)), 4)
    for row in (0, 5, 7, 8, 14, 26):
        item = dataset[row]
        assert torch.equal(action[row], item["action"])
        assert torch.equal(is_pad[row], item["action_is_pad"])
        assert torch.equal(table.state[row], item["observation.state"])
        assert table.instructions(torch.tensor([row])) == [item["task"]]


def test_the_last_episodes_of_each_task_are_held_out(root):
    learned, held_out = read_table(root).split(0.4)
    assert (learned, held_out) == ([0], [1, 2])  # tasks: lift (0, 2), push (1): the share is rounded up


def test_holding_everything_out_is_refused(root):
    with pytest.raises(ValueError, match=r"held_out=0\.9 leaves no episode"):
        read_table(root).split(0.9)


def test_an_episode_that_does_not_exist_is_refused(root):
    with pytest.raises(ValueError, match=r"dataset\.episodes.*\[7\].*0 to 2"):
        read_table(root).split(0.0, [0, 7])


def test_a_nan_action_is_refused_only_where_it_would_be_read(tmp_path):
    table = read_table(write_dataset(tmp_path / "nan", nan_action_at=11))
    with pytest.raises(ValueError, match=r"finite numbers in action, found \[nan.*episode 1, frame 2 \(1 of"):
        check_finite(table, torch.arange(len(table)), "here")
    check_finite(table, table.rows_of([0, 2]), "here")


def test_the_average_follows_its_closed_form_and_lends_itself_without_a_trace():
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = EMA(layer, decay=0.9)
    expected = 0.0
    for updates in range(3):
        nn.init.constant_(layer.weight, float(updates + 1))
        average.update(updates)
        decay = min(0.9, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * (updates + 1)
    with average.applied():
        assert layer.weight[0, 0].item() == pytest.approx(expected, rel=1e-6)
    assert layer.weight.tolist() == [[3.0, 3.0]]


def test_batches_from_a_cache_need_no_lerobot(root, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lerobot"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it in a function fails
    table = read_table(root)
    source = CachedSource(table, {"prior": torch.zeros(len(table), 2, 3, 1, 1)}, 4)
    batch = next(source.stream(ShuffledRows(torch.arange(len(table)), 5, seed=0), 0))
    assert batch["vega.prior"].shape == (5, 2, 3, 1, 1)
    assert batch["action"].shape == (5, 4, 7)
