import json
import re
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts import benchmark as script
from vega_policy.benchmark import prior as prior_part
from vega_policy.benchmark.policy import benchmark_policy
from vega_policy.benchmark.prior import Subject, benchmark_prior
from vega_policy.benchmark.reader import benchmark_reader
from vega_policy.benchmark.report import ratios, table, write
from vega_policy.benchmark.timing import matmul_ceiling, measure
from vega_policy.benchmark.train import benchmark_train
from vega_policy.captured import CapturedAct
from vega_policy.model import VegaModel
from vega_policy.observation import Observation
from vega_policy.parts import BackboneConfig, ExpertConfig, ModelConfig, PriorConfig

CPU = torch.device("cpu")
TINY = {
    "vae": {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "transformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": 8,
        "ffn_dim": 64,
        "text_dim": 20,
        "freq_dim": 32,
    },
}
ROWS = [
    {"path": "all_blocks", "size": "64x64", "frames": 2, "p50_ms": 12.0},
    {"path": "fast", "size": "64x64", "frames": 2, "p50_ms": 3.0, "error": 1e-7},
]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(prior_part.SHAPES, "wan_tiny", TINY)


def model_config(prior="random"):
    return ModelConfig(
        views=2,
        state_dim=8,
        action_dim=7,
        chunk_size=4,
        frame_size=32,
        prior=PriorConfig(name=prior),
        backbone=BackboneConfig(width=32, depth=1, heads=2, pretrained=False, freeze_text_encoder=True),
        expert=ExpertConfig(width=32, depth=1, heads=2, steps=2),
    )


def test_the_measured_latency_of_a_sleep_is_its_length():
    latency = measure(lambda: time.sleep(0.01), CPU, seconds=0.1)
    assert 10 <= latency.p50 <= latency.p95 < 100
    assert latency.calls >= 5
    assert latency.peak_gib is None


def test_the_matrix_ceiling_is_a_plausible_rate():
    assert 1e-4 < matmul_ceiling(CPU, torch.float32) < 100  # TFLOP/s


def test_a_table_aligns_columns_and_leaves_missing_fields_empty():
    lines = table(ROWS).splitlines()
    assert lines[0].split() == ["path", "size", "frames", "p50_ms", "error"]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-1] == "12"
    assert lines[2].split()[-1] == "1e-07"


def test_ratios_compare_the_same_frames_only():
    other = {"path": "all_blocks", "size": "32x32", "frames": 2, "p50_ms": 99.0}
    assert ratios([*ROWS, other], "all_blocks", "fast") == [
        "64x64, 2 frames: fast is 4.0 times as fast as all_blocks"
    ]


def test_the_report_names_command_and_machine_beside_the_rows(tmp_path):
    write(tmp_path / "new" / "report.json", "prior", ROWS, "python scripts/benchmark.py prior", CPU)
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["rows"] == ROWS
    assert report["command"] == "python scripts/benchmark.py prior"
    assert report["device"].startswith("CPU")


def test_all_ways_to_compute_the_prior_agree(tiny):
    subject = Subject("wan_tiny", CPU, (32, 48))
    frames = torch.rand(2, 3, 32, 48)
    expected = subject.exact(frames)
    for path in ("all_blocks", "early_stop", "fast"):
        found = subject.path(path, frames)(frames)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_prior_part_gives_a_row_for_each_path_with_its_error(tiny):
    rows = list(benchmark_prior("wan_tiny", CPU, [(32, 32)], [1, 2], ["early_stop", "fast"], seconds=0.01))
    assert [(row["path"], row["frames"]) for row in rows] == [
        ("early_stop", 1),
        ("fast", 1),
        ("early_stop", 2),
        ("fast", 2),
    ]
    assert all(row["error"] < 1e-5 and 0 < row["p50_ms"] <= row["p95_ms"] for row in rows)
    assert rows[1]["dit_of_ceiling"] > 0


def test_the_policy_part_times_each_stage_and_the_whole():
    stages = [row["stage"] for row in benchmark_policy(model_config(), CPU, seconds=0.01)]
    assert stages == ["semantic encoder", "prior", "projectors and fusion", "backbone", "expert", "whole"]


def test_the_train_part_compares_a_live_a_cached_and_no_prior():
    rows = {row["prior"]: row for row in benchmark_train(model_config(), CPU, batch=2, seconds=0.01)}
    assert list(rows) == ["live", "cached", "none"]
    assert "prior_ms" in rows["live"]
    assert "prior_ms" not in rows["cached"]
    for row in rows.values():
        assert row["samples_per_s"] == pytest.approx(2000 / row["step_ms"])


def test_the_script_prints_and_writes_what_it_measured(tiny, monkeypatch, tmp_path, capsys):
    output = tmp_path / "prior.json"
    arguments = ["prior", "--device", "cpu", "--prior", "wan_tiny", "--sizes", "32x32", "--frames", "1"]
    arguments += ["--paths", "early_stop", "fast", "--seconds", "0.01", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    script.main()
    printed = capsys.readouterr().out
    assert "prior on CPU" in printed
    assert "times as fast as early_stop" in printed
    assert [row["path"] for row in json.loads(output.read_text())["rows"]] == ["early_stop", "fast"]


def test_a_prior_without_a_fast_form_is_measured_as_a_policy_reads_it():
    rows = list(benchmark_reader("random", CPU, [(32, 48)], [1, 2], seconds=0.01))
    assert [(row["size"], row["frames"], row["reads"]) for row in rows] == [
        ("32x48", 1, "32x48"),
        ("32x48", 2, "32x48"),
    ]
    for row in rows:
        assert row["frames_per_s"] == pytest.approx(1000 * row["frames"] / row["p50_ms"])
    with pytest.raises(ValueError, match="'precomputed' has no reader without weights"):
        next(benchmark_reader("precomputed", CPU, [(32, 32)], [1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "100x96"], "multiples of 16, such as 256x256; got '100x96'"),
        (["--sizes", "256"], "HEIGHTxWIDTH .*; got '256'"),
        (["--paths", "slow"], "known are released, all_blocks, early_stop, fast; got slow"),
    ],
)
def test_the_script_refuses_sizes_and_paths_that_it_cannot_measure(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "prior", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit):
        script.main()
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_the_product_with_an_activation_counts_as_a_product():
    with FlopCounterMode(display=False, custom_mapping=prior_part.FLOPS) as counter:
        torch._addmm_activation(torch.zeros(7), torch.zeros(3, 5), torch.zeros(5, 7), use_gelu=True)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7


def test_a_captured_step_without_a_gpu_is_refused():
    seen = Observation(torch.rand(1, 2, 1, 3, 32, 32), torch.randn(1, 8), ["lift the red cube"])
    with pytest.raises(ValueError, match="needs frames and a CUDA device"):
        CapturedAct(VegaModel(model_config()).eval(), seen, torch.randn(1, 4, 7))
