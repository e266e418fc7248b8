"""report.py: FLOP counts, peaks, meters, result.json and the lines for people."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import report
from opt_sizes import OPT_SHAPES, OPTShape
from planner import model_shape

SMALL = OPTShape(num_layers=3, hidden_size=32, num_heads=4, learning_rate=1e-3, vocab_size=96, max_positions=64)
FLOPS = report.TokenFlops(model=2e6, hardware=3e6)
PEAK = report.Peak(flops=1e12, source="a data sheet")


# ---------------------------------------------------------------------------- FLOPs


def test_flops_of_125m_are_those_counted_by_hand() -> None:
    layers = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    head = 50272 * 768
    attention = 6 * 12 * 768 * 1024
    flops = report.token_flops(model_shape(OPT_SHAPES["125m"]), 1024)
    assert flops.model == flops.hardware == 6 * (layers + head) + attention == 797_884_416


def test_recomputing_all_layers_adds_one_forward_of_them() -> None:
    shape = model_shape(OPT_SHAPES["125m"])
    flops = report.token_flops(shape, 1024, recomputed_layers=12)
    assert flops.hardware - flops.model == 2 * 12 * 12 * 768 * 768 + 2 * 12 * 768 * 1024


def counted_flops(shape: OPTShape, seq_len: int, *, checkpointed: bool = False, post_norm: bool = False) -> int:
    """Return what torch counts for one forward and backward, divided by the tokens. Eager attention is not causal."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=shape.hidden_size,
        ffn_dim=shape.ffn_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_positions,
        word_embed_proj_dim=shape.embed_dim,
        do_layer_norm_before=not post_norm,
        attn_implementation="eager",
        use_cache=False,
        pad_token_id=1,
    )
    model = OPTForCausalLM(config).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(4, shape.vocab_size, (2, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return counter.get_total_flops() // tokens.numel()


@pytest.mark.parametrize("embed_dim", [None, 16])
def test_flops_agree_with_those_torch_counts(embed_dim: int | None) -> None:
    shape = replace(SMALL, word_embed_proj_dim=embed_dim)
    seq_len = 48
    uncausal_half = 6 * shape.num_layers * shape.hidden_size * seq_len
    counted = counted_flops(shape, seq_len, post_norm=embed_dim is not None)
    assert report.token_flops(model_shape(shape), seq_len).model + uncausal_half == counted


def test_hardware_flops_agree_with_those_torch_counts_under_gradient_checkpointing() -> None:
    uncausal_half = (6 + 2) * SMALL.num_layers * SMALL.hidden_size * 48
    flops = report.token_flops(model_shape(SMALL), 48, recomputed_layers=SMALL.num_layers)
    assert flops.hardware + uncausal_half == counted_flops(SMALL, 48, checkpointed=True)


# ---------------------------------------------------------------------------- peaks


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090", "fp16", 71),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_peak_is_looked_up_by_the_name_torch_gives(name: str, precision: str, tflops: float) -> None:
    peak = report.peak_of(name, precision)
    assert peak is not None
    assert peak.flops == tflops * 1e12
    assert peak.source.endswith(f"dense {precision}")


@pytest.mark.parametrize(
    "name",
    [
        "CPU",
        "NVIDIA H100",  # SXM or PCIe?
        "NVIDIA H20",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA A10-24Q",
        "GRID T4-16Q",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA Z9000",
    ],
)
def test_peak_of_an_unknown_or_reduced_device_is_never_guessed(name: str) -> None:
    assert report.peak_of(name, "bf16") is None


def test_peak_is_none_where_the_device_has_no_such_arithmetic() -> None:
    assert report.peak_of("Tesla V100-SXM2-16GB", "bf16") is None


def test_each_known_device_has_one_row() -> None:
    for row in report.DEVICE_PEAKS:
        name = row.pattern.replace(r"\b", "").replace("(?! nvl)", "").replace(".*", " 80gb ").rstrip("$")
        name = name.replace("[18]", "1").replace("3(00|25)", "300")
        peak = report.peak_of(f"nvidia {name}", "fp16")
        assert peak is not None and peak.source.startswith(row.source), row


# ---------------------------------------------------------------------------- speed


def meter_of(*seconds: float, warmup_steps: int = 2) -> report.StepMeter:
    meter = report.StepMeter(warmup_steps)
    for each in seconds:
        meter.add(each, tokens=1000, samples=10)
    return meter


def test_median_excludes_the_warm_up() -> None:
    speed = meter_of(60.0, 9.0, 0.1, 0.2, 0.4).throughput(FLOPS, num_devices=2, peak=PEAK)
    assert speed is not None
    assert (speed.warmup_steps, speed.measured_steps) == (2, 3)
    assert speed.step_ms_median == pytest.approx(200)
    assert speed.tokens_per_s == pytest.approx(5000)
    assert speed.tokens_per_s_per_device == pytest.approx(2500)
    assert speed.samples_per_s == pytest.approx(50)
    assert speed.first_step_ms == pytest.approx(60_000)


def test_tflops_and_mfu_are_those_of_one_device() -> None:
    speed = meter_of(0.1, warmup_steps=0).throughput(FLOPS, num_devices=2, peak=PEAK)
    assert speed is not None
    assert speed.model_tflops_per_device == pytest.approx(5000 * 2e6 / 1e12)
    assert speed.hardware_tflops_per_device == pytest.approx(5000 * 3e6 / 1e12)
    assert speed.mfu == pytest.approx(0.01)
    assert speed.peak_source == "a data sheet"


def test_mfu_is_none_on_an_unknown_device() -> None:
    speed = meter_of(0.1, warmup_steps=0).throughput(FLOPS, num_devices=1, peak=None)
    assert speed is not None
    assert (speed.mfu, speed.peak_source) == (None, None)


@pytest.mark.parametrize(("num_steps", "left_out"), [(1, 0), (2, 1), (5, 4), (6, 5), (9, 5)])
def test_a_run_shorter_than_its_warm_up_says_what_was_left_out(num_steps: int, left_out: int) -> None:
    speed = meter_of(*[1.0] * num_steps, warmup_steps=5).throughput(FLOPS, num_devices=1, peak=None)
    assert speed is not None
    assert (speed.warmup_steps, speed.measured_steps) == (left_out, num_steps - left_out)


def test_a_run_without_a_step_has_no_throughput() -> None:
    assert report.StepMeter().throughput(FLOPS, num_devices=1, peak=None) is None


def test_rates_of_unequal_steps_are_each_steps_own() -> None:
    meter = report.StepMeter(warmup_steps=0)
    for tokens, seconds in ((100, 1.0), (300, 1.0), (400, 1.0)):
        meter.add(seconds, tokens=tokens, samples=1)
    speed = meter.throughput(FLOPS, num_devices=1, peak=None)
    assert speed is not None and speed.tokens_per_s == 300


def test_interval_covers_the_steps_since_the_last_one() -> None:
    meter = meter_of(9.0, 8.0)
    meter.interval()
    meter.add(0.5, tokens=1000, samples=1)
    assert meter.interval() == report.Rate(tokens_per_s=2000, step_ms=500)
    assert meter.interval() is None


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_percentile_is_numpys(fraction: float) -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    assert report.percentile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)))


# ---------------------------------------------------------------------------- result.json


@dataclass(frozen=True)
class DataInfo:
    name: str = "wikitext"
    split: str = "train"
    num_tokens: int = 10
    dropped_tokens: int = 1


def result_of(**changes: object) -> report.Result:
    result = report.Result(
        status="ok",
        command="train_clm.py --seed 1",
        args={"seed": 1, "prompt": ("a", "b"), "cache_dir": Path("x")},
        versions=report.versions(),
        git_commit=None,
        device=report.Device("CPU", 2, None),
        plugin="torch_ddp",
        plan=None,
        model=report.ModelInfo("tiny", 10, pretrained=False),
        data=DataInfo(),
        steps=20,
        train_loss=[(1, 10.8), (20, 7.25)],
        eval=report.Eval.from_loss(2.0, num_tokens=1234, protocol="blocks of 32"),
        throughput=meter_of(0.1, 0.1, 0.1).throughput(FLOPS, num_devices=2, peak=PEAK),
        memory=report.Memory(None, None, None, 1.5),
        output_dir="outputs/x",
    )
    return replace(result, **changes)


# DESIGN.md, "Every run leaves".
PROMISED_KEYS = {
    "device": "name count memory_gib",
    "model": "name num_params pretrained",
    "data": "name split num_tokens dropped_tokens",
    "eval": "loss perplexity num_tokens protocol",
    "throughput": "tokens_per_s tokens_per_s_per_device samples_per_s model_tflops_per_device "
    "hardware_tflops_per_device mfu peak_source step_ms_median step_ms_p10 step_ms_p90 warmup_steps",
    "memory": "peak_allocated_gib peak_reserved_gib cap_gib host_peak_rss_gib",
}
PROMISED_SCALARS = "status command args versions git_commit plugin plan steps train_loss"


def test_result_has_every_promised_key(tmp_path: Path) -> None:
    result_of().write(tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    assert set(written) >= {*PROMISED_SCALARS.split(), *PROMISED_KEYS}
    for block, keys in PROMISED_KEYS.items():
        assert set(written[block]) >= set(keys.split()), block
    assert written["train_loss"] == [[1, 10.8], [20, 7.25]]
    assert written["args"] == {"seed": 1, "prompt": ["a", "b"], "cache_dir": "x"}


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    result = result_of(
        status="nan",
        train_loss=[(1, math.nan), (2, math.inf)],
        eval=report.Eval.from_loss(1e4, num_tokens=1, protocol=""),
    )
    result.write(tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert written["train_loss"] == [[1, None], [2, None]]
    assert written["eval"]["perplexity"] is None


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert report.Eval.from_loss(3.32, num_tokens=1, protocol="").perplexity == pytest.approx(27.66, abs=0.01)
    assert report.Eval.from_loss(1e9, num_tokens=1, protocol="").perplexity == math.inf
    assert math.isnan(report.Eval.from_loss(math.nan, num_tokens=1, protocol="").perplexity)


def test_a_result_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result_of(steps=1).write(path)
    with pytest.raises(TypeError):
        result_of(steps=2, args={"bad": object()}).write(path)
    assert json.loads(path.read_text())["steps"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_result_replaces_the_file_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    result_of(steps=1).write(path)
    seen = []
    replace_file = report.os.replace

    def look_and_replace(source: Path, target: Path) -> None:
        seen.append((json.loads(Path(source).read_text())["steps"], json.loads(Path(target).read_text())["steps"]))
        replace_file(source, target)

    monkeypatch.setattr(report.os, "replace", look_and_replace)
    result_of(steps=2).write(path)
    assert seen == [(2, 1)]
    assert json.loads(path.read_text())["steps"] == 2


def test_metrics_are_on_disk_line_by_line_and_continue_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    report.MetricsLog(path).append(step=1, loss=2.5, mfu=None)
    report.MetricsLog(path).append(step=2, loss=math.nan)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5, "mfu": None}, {"step": 2, "loss": None}]


# ---------------------------------------------------------------------------- surroundings


def test_versions_name_the_installed_packages() -> None:
    import platform

    import transformers

    versions = report.versions()
    assert list(versions) == ["python", "torch", "colossalai", "transformers", "datasets"]
    assert versions["transformers"] == transformers.__version__
    assert versions["python"] == platform.python_version()


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise report.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(report.importlib.metadata, "version", missing)
    assert report.versions()["colossalai"] is None


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_commit_is_that_of_our_checkout_and_says_when_it_is_changed(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert report.git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert report.git_commit(tmp_path) == f"{commit}-dirty"


def test_git_commit_is_none_in_a_copy_inside_somebody_elses_repository(tmp_path: Path) -> None:
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "theirs")
    copy = tmp_path / "vendor"
    copy.mkdir()
    assert report.git_commit(copy) is None


def test_git_commit_is_none_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert report.git_commit() is None


def test_host_memory_is_the_peak_of_this_process() -> None:
    before_gib = report.host_peak_rss_gib()
    size = int((before_gib + 0.1) * report.GIB)
    block = b"x" * size
    assert report.host_peak_rss_gib() >= len(block) / report.GIB
    del block
    assert report.host_peak_rss_gib() >= size / report.GIB
    assert before_gib < report.host_peak_rss_gib() < 4 * before_gib + 1


# ---------------------------------------------------------------------------- lines


def test_log_line_has_units_and_values() -> None:
    line = report.log_line(10, 2000, 10.82134, 1e-4, 1.2345, 412345.6, 0.4134, 123.45, 13.7)
    assert line == (
        "step   10/2000  loss  10.8213  lr 1.00e-04  grad norm    1.234  tokens/s    412,346"
        "  MFU  41.3 %  step     123.5 ms  memory  13.70 GiB"
    )


@pytest.mark.parametrize(
    "values",
    [
        (1, 2000, None, None, None, None, None, None, None),
        (2000, 2000, math.nan, 0.0, math.inf, 1.0, 1.0, 0.05, 0.01),
        (999, 2000, 123456.7, 1e-12, 1e30, 9.9e12, 0.0, 3.6e9, 141.2),
        (5, 2000, -3.0, 6e-4, 1e-9, 12.0, 0.6, 999_999.9, 9999.0),
    ],
)
def test_log_line_columns_stay_where_they_are(values: tuple[float, ...]) -> None:
    usual = report.log_line(10, 2000, 10.8, 1e-4, 1.2, 412345.6, 0.4, 123.4, 13.7)
    line = report.log_line(*values)
    assert len(line) == len(usual)
    for word in ("loss", "lr", "grad norm", "tokens/s", "MFU", "ms", "memory", "GiB"):
        assert line.index(word) == usual.index(word)


def test_summary_says_what_happened_how_good_how_fast_and_where() -> None:
    text = "\n".join(report.summary(result_of()))
    for part in (
        "ok after 20 steps",
        "7.2500 at step 20",
        "perplexity 7.39 over 1,234 tokens (blocks of 32)",
        "10,000 tokens/s, 5,000 a device",
        "100.0 ms median",
        "1 steps after 2 of warm-up",
        "host 1.50 GiB",
        "outputs/x",
        "MFU 1.0 % of a data sheet",
    ):
        assert part in text


def test_summary_of_a_run_that_did_nothing_leaves_out_what_is_not_there() -> None:
    lines = report.summary(result_of(status="oom", steps=0, train_loss=[], eval=None, throughput=None))
    assert [line.split()[0] for line in lines] == ["status", "memory", "files"]


def test_summary_shows_gpu_memory_beside_its_cap() -> None:
    lines = report.summary(result_of(memory=report.Memory(13.7, 15.2, 22.35, 3.0, outside_gib=1.3)))
    expected = "memory      GPU 13.70 GiB allocated, 15.20 reserved, 5.85 below the cap of 22.35; host 3.00 GiB"
    assert expected in lines


def test_summary_shows_the_plan_beside_what_was_measured() -> None:
    memory = report.Memory(9.0, 9.5, None, 2.0, outside_gib=1.0)
    check = report.PlanCheck.of(memory, gpu_predicted_gib=11.0, host_predicted_gib=1.9)
    lines = report.summary(result_of(plan_check=check))
    assert "planned     GPU 11.00 GiB for 10.00 (+10.0%), host 1.90 GiB for 2.00 (-5.0%)" in lines
    on_cpu = report.PlanCheck.of(report.Memory(None, None, None, 2.0), gpu_predicted_gib=0.5, host_predicted_gib=1.9)
    assert on_cpu.gpu_error is None


def test_summary_says_when_the_first_step_was_done() -> None:
    lines = report.summary(result_of(startup=report.StartUp(8.0, 9.5, 21.25)))
    assert "started     first step done 21.2 s after the process began" in lines
