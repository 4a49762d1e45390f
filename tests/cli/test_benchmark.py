import json
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.policies import model_config
from vega_policy.benchmarks import (
    by_kind,
    cost_of_prior,
    device_name,
    longest,
    matmul_ceiling,
    measure,
    ratios,
    table,
    write,
)
from vega_policy.benchmarks import parts as prior_part
from vega_policy.benchmarks.parts import (
    RandomWan,
    benchmark_any_prior,
    benchmark_policy,
    benchmark_prior,
    benchmark_train,
)
from vega_policy.cli.commands import benchmark
from vega_policy.model import compilation as captured
from vega_policy.model.compilation import CapturedControlStep
from vega_policy.model.config import BackboneConfig
from vega_policy.model.observation import Observation
from vega_policy.model.sizes import BACKBONE_ARCHITECTURES, Architecture
from vega_policy.model.vega import VegaModel
from vega_policy.priors import PRIORS

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
    monkeypatch.setitem(PRIORS, "wan_tiny", replace(PRIORS["wan_tiny"], architecture=TINY))


def test_the_measured_latency_of_a_sleep_is_its_length():
    calls = []
    latency = measure(lambda: calls.append(time.sleep(0.01)), CPU, seconds=0.1)
    assert 10 <= latency["p50_ms"] <= latency["p95_ms"] < 100
    assert latency["peak_gib"] is None
    assert len(calls) >= 3 + 5


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
    wan = RandomWan("wan_tiny", CPU, (32, 48))
    frames = torch.rand(2, 3, 32, 48)
    expected = wan.encode_exactly(frames)
    for path in ("all_blocks", "early_stop", "fast"):
        found = wan.path(path, frames)(frames)
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
    assert stages == ["semantic encoder", "prior", "projectors and fusion", "backbone", "head", "whole"]


def test_the_train_part_compares_a_live_a_cached_and_no_prior():
    rows = {row["prior"]: row for row in benchmark_train(model_config(), CPU, batch=2, seconds=0.01)}
    assert list(rows) == ["live", "cached", "none"]
    assert "prior_ms" in rows["live"]
    assert "prior_ms" not in rows["cached"]
    for row in rows.values():
        assert row["samples_per_s"] == pytest.approx(2000 / row["step_ms"])


def test_the_cost_of_a_cached_prior_is_reported_for_each_variant_measured_without_one():
    times = {("cached", "eager"): 20.0, ("cached", "compiled"): 5.0, ("none", "eager"): 19.0}
    rows = [{"prior": case, "variant": name, "step_ms": time} for (case, name), time in times.items()]
    assert cost_of_prior(rows) == ["prior cached, eager: 0.95 of the steps a second without a prior"]


@pytest.mark.parametrize("option", ["cases", "variants"])
def test_an_unknown_case_or_variant_of_the_train_part_is_refused(option):
    with pytest.raises(ValueError, match=f"{option}: expected some of .*; got shifted"):
        next(benchmark_train(model_config(), CPU, batch=2, seconds=0.01, **{option: ("shifted",)}))


def test_the_script_prints_and_writes_what_it_measured(tiny, monkeypatch, tmp_path, capsys):
    output = tmp_path / "prior.json"
    arguments = ["prior", "device=cpu", "prior=wan_tiny", "sizes=[32x32]", "frames=[1]"]
    arguments += ["paths=[early_stop,fast]", "seconds=0.01", f"output={output}"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "prior on CPU" in printed
    assert "times as fast as early_stop" in printed
    assert [row["path"] for row in json.loads(output.read_text())["rows"]] == ["early_stop", "fast"]


def test_a_prior_without_a_fast_form_is_measured_as_a_policy_runs_it():
    rows = list(benchmark_any_prior("random", CPU, [(32, 48)], [1, 2], seconds=0.01))
    assert [(row["size"], row["frames"], row["reads"]) for row in rows] == [
        ("32x48", 1, "32x48"),
        ("32x48", 2, "32x48"),
    ]
    for row in rows:
        assert row["frames_per_s"] == pytest.approx(1000 * row["frames"] / row["p50_ms"])
    with pytest.raises(ValueError, match="'precomputed' has no networks of published size"):
        next(benchmark_any_prior("precomputed", CPU, [(32, 32)], [1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sizes=[100x96]"], "multiples of 16, such as 256x256; got '100x96'"),
        (["sizes=['256']"], "HEIGHTxWIDTH .*; got '256'"),
        (["paths=[slow]"], "expected some of released, all_blocks, early_stop, fast, .*; got slow"),
        (["paths=['fast/speed=9']"], "such as fast/encode=8; got fast/speed=9"),
        (["paths=['released/encode=2']"], "the last also with .*; got released/encode=2"),
    ],
)
def test_the_script_refuses_sizes_and_paths_that_it_cannot_measure(arguments, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "prior", "device=cpu", *arguments])
    with pytest.raises(SystemExit, match=message):
        benchmark.main()


def test_the_product_with_an_activation_counts_as_a_product():
    with FlopCounterMode(display=False, custom_mapping=prior_part.FLOPS) as counter:
        torch._addmm_activation(torch.zeros(7), torch.zeros(3, 5), torch.zeros(5, 7), use_gelu=True)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7


def test_fewer_blocks_are_measured_with_their_error(tiny):
    paths = ["fast/encode=1/attention=flash", "fast/layer=2", "fast/future=2"]
    rows = {
        row["path"]: row for row in benchmark_prior("wan_tiny", CPU, [(32, 32)], [2], paths, seconds=0.01)
    }
    assert rows["fast/encode=1/attention=flash"]["error"] < 1e-5
    assert rows["fast/layer=2"]["error"] > 0.01
    assert rows["fast/future=2"]["error"] < 1e-5


def test_kernels_are_counted_by_kind_and_the_longest_are_kept():
    times = {"sm90_xmma_gemm_bf16": 3.0, "cudnn_fprop_nhwc": 2.0, "triton_poi_add": 0.5, "elementwise": 0.25}
    assert by_kind(times) == {
        "products_ms": 3.0,
        "convolution_ms": 2.0,
        "compiled_ms": 0.5,
        "pointwise and sums_ms": 0.25,
    }
    assert longest(times, 2) == {"sm90_xmma_gemm_bf16": 3.0, "cudnn_fprop_nhwc": 2.0}


def test_a_vision_language_backbone_is_built_at_random_for_the_policy_part(monkeypatch):
    small = {
        "text_config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 49280,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
        "scale_factor": 4,
        "image_token_id": 49190,
        "pad_token_id": 2,
    }
    monkeypatch.setitem(BACKBONE_ARCHITECTURES, "smolvlm2_500m", Architecture("smolvlm", small, side=2))
    config = replace(
        model_config("wan_tiny"),
        backbone=BackboneConfig(name="smolvlm2_500m", pretrained=False, width=32, heads=2),
    )
    stages = [row["stage"] for row in benchmark_policy(config, CPU, seconds=0.01)]
    assert stages[-1] == "whole"
    assert "prior" in stages


def test_a_backbone_whose_images_need_its_own_processor_is_refused():
    config = replace(model_config(), backbone=BackboneConfig(name="qwen2.5_vl_3b", pretrained=False))
    with pytest.raises(
        ValueError, match=r"'qwen2.5_vl_3b' needs a processor of its own. Take compact or one of"
    ):
        next(benchmark_policy(config, CPU, seconds=0.01))


def test_a_captured_step_without_a_gpu_is_refused():
    seen = Observation(torch.rand(1, 2, 1, 3, 32, 32), torch.randn(1, 8), ["lift the red cube"])
    with pytest.raises(ValueError, match="needs frames and a CUDA device"):
        CapturedControlStep(VegaModel(model_config()).eval(), seen, torch.randn(1, 4, 7))


class Counted:
    """Stands in for a captured step: remembers for what it was captured, and answers like the model."""

    def __init__(self, model, observation, noise):
        self.model = model
        self.model.made.append(observation.instruction)

    def __call__(self, observation, noise):
        return self.model.sample_actions(observation, noise)


def test_a_step_is_captured_when_its_kind_is_met_again_and_agrees_with_the_plain_one(monkeypatch):
    model = VegaModel(model_config()).eval()
    model.made = []
    monkeypatch.setattr(captured, "capture_obstacle", lambda *_: None)
    steps, plain = captured.CapturedSteps(True, Counted, capacity=2), []

    def act(instruction, views=2):
        seen = Observation(torch.rand(1, views, 1, 3, 32, 32), torch.randn(1, 8), [instruction])
        noise = torch.randn(1, 4, 7)
        found = steps.sample_actions(
            model, seen, noise, lambda *given: plain.append(instruction) or model.sample_actions(*given)
        )
        torch.testing.assert_close(found, model.sample_actions(seen, noise))

    with torch.no_grad():
        for instruction in ("a", "a", "a", "b", "c", "b", "c", "c", "a"):
            act(instruction)
    assert plain == ["a", "b", "c", "b", "c"]  # b and c, met once, took each other's place; now c stays
    assert model.made == [["a"], ["c"]]
    with torch.no_grad():
        act("d")
        act("d")
        next(model.backbone.text_encoder.parameters()).add_(1.0)
        act("a")
        assert plain[5:] == ["d", "d", "a"]  # no room for d; a's words are no longer those
        steps.clear()
        act("c")
    assert plain[-1] == "c"


def test_nothing_is_captured_unless_it_is_asked_for():
    model, steps = VegaModel(model_config()).eval(), captured.CapturedSteps(False, Counted)
    seen = Observation(torch.rand(1, 2, 1, 3, 32, 32), torch.randn(1, 8), ["lift the red cube"])
    model.made = []
    with torch.no_grad():
        for _ in range(3):
            steps.sample_actions(model, seen, torch.randn(1, 4, 7), model.sample_actions)
    assert not model.made


def test_what_cannot_be_captured_runs_as_it_is_and_the_log_says_once_why(caplog):
    model, steps = VegaModel(model_config()).eval(), captured.CapturedSteps(True)
    seen = Observation(torch.rand(1, 2, 1, 3, 32, 32), torch.randn(1, 8), ["lift the red cube"])
    noise = torch.randn(1, 4, 7)
    with caplog.at_level("INFO"), torch.no_grad():
        for _ in range(2):
            assert torch.equal(
                steps.sample_actions(model, seen, noise, model.sample_actions),
                model.sample_actions(seen, noise),
            )
    assert caplog.text.count("are not captured: a CUDA graph needs a GPU, and this is cpu") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_captured_step_gives_the_plain_chunk():
    model = VegaModel(model_config("wan_tiny")).eval().cuda()
    steps = captured.CapturedSteps(True)
    for _ in range(3):
        seen = Observation(torch.rand(1, 2, 1, 3, 32, 32).cuda(), torch.randn(1, 8).cuda(), ["lift"])
        noise = torch.randn(1, 4, 7).cuda()
        with torch.no_grad():
            found = steps.sample_actions(model, seen, noise, model.sample_actions)
            torch.testing.assert_close(found, model.sample_actions(seen, noise), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_the_dataset_part_compares_videos_a_warm_cache_and_no_prior(root, tmp_path, monkeypatch, capsys):
    arguments = ["dataset", "device=cpu", f"root={root}", "prior=random", "small=true"]
    arguments += ["batch=2", "frame_size=32", "seconds=0.01"]
    arguments += ["repo_id=tests/synthetic", f"cache_root={tmp_path / 'cache'}"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [
        ["videos", "random"],
        ["cache", "random"],
        ["cache", "none"],
    ]


@pytest.mark.parametrize(("count", "name"), [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_one_thread_is_singular(count, name, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert device_name(CPU) == name
