"""scaling.py in the cases whose answer is known without it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

import planner
import scaling
import speed
from args import TrainArgs, problems
from benchmarks import scaling as page
from conftest import ROOT
from opt_sizes import OPT_SHAPES
from planner import GIB, PlanRequest, ddp_gradient_bytes, model_shape, stage_params
from scaling import NIC_BYTES_S, NVLINK_BYTES_S, Group, Job, Machines, groups, predict
from speed import matrix_share

SHAPE = model_shape(OPT_SHAPES["1.3b"])


def request(plugin: str = "low_level_zero", world_size: int = 1, **changes: object) -> PlanRequest:
    base = PlanRequest(SHAPE, plugin, "bf16", world_size, 8, 1024, zero_stage=1, compiled=True, gpu_gib=scaling.GPU_GIB)
    return replace(base, **changes)


@pytest.mark.parametrize("plugin", ["torch_ddp", "low_level_zero", "gemini", "hybrid_parallel"])
def test_one_gpu_computes_and_updates_and_waits_for_nobody(plugin):
    step = predict(request(plugin), Machines(1)).step
    assert {name for name, seconds in asdict(step).items() if seconds} == {"compute", "update"}


def test_one_gpu_reaches_the_share_of_the_ceiling_that_was_put_in():
    prediction = predict(request(), Machines(1))
    flops = 8 * 1024 * (6 * SHAPE.matrix_params + 6 * SHAPE.num_layers * SHAPE.hidden_size * 1024)
    assert prediction.step.compute == pytest.approx(flops / (0.70 * 787e12))
    assert prediction.mfu == pytest.approx(flops / prediction.step.total / 989.4e12)
    assert prediction.tokens_per_s == pytest.approx(8 * 1024 / prediction.step.total)


SIX, THIRTEEN = (
    {"shape": model_shape(OPT_SHAPES[size]), "batch_size": 4, "gpu_gib": 139.8, "zero_stage": 0}
    for size in ("6.7b", "13b")
)
NOT_AHEAD = {"max_prefetch": 0}
# Measured on H200s of one machine, 2026-11-27 to 29 (docs/scaling.md), 1.3b unless it says otherwise: tokens/s. The rates
# are fitted to these.
MEASURED = [
    ("low_level_zero", 1, {}, 62_400),
    ("torch_ddp", 1, {}, 60_374),
    ("torch_ddp", 2, {}, 114_670),
    ("torch_ddp", 1, SIX, 12_273),
    ("low_level_zero", 2, SIX, 25_561),
    ("low_level_zero", 2, THIRTEEN, 13_464),
    ("gemini", 2, SIX | NOT_AHEAD, 21_215),
    ("gemini", 2, THIRTEEN | NOT_AHEAD, 11_180),
    ("gemini", 2, SIX, 23_099),
    ("gemini", 2, THIRTEEN, 12_225),
    ("hybrid_parallel", 2, {**SIX, "tp": 2, "batch_size": 8}, 24_110),
    ("gemini", 1, {}, 53_400),
    ("gemini", 2, NOT_AHEAD, 92_753),
    ("gemini", 2, NOT_AHEAD, 107_635),
    ("gemini", 2, {}, 98_090),
    ("gemini", 2, {}, 101_142),
    ("gemini", 4, NOT_AHEAD, 196_005),
    ("hybrid_parallel", 4, {"tp": 2, "compiled": False, "batch_size": 16}, 165_020),
    (
        "hybrid_parallel",
        4,
        {"tp": 2, "pp": 2, "compiled": False, "batch_size": 32, "num_microbatches": 8, "zero_stage": 0},
        78_408,
    ),
    ("low_level_zero", 4, {}, 243_692),
    ("hybrid_parallel", 2, {"tp": 2, "batch_size": 32, "zero_stage": 0}, 98_208),
    ("hybrid_parallel", 4, {"tp": 2, "batch_size": 16, "zero_stage": 0}, 180_811),
]


@pytest.mark.parametrize(("plugin", "gpus", "changes", "tokens_per_s"), MEASURED)
def test_what_was_measured_is_met_within_10_percent(plugin, gpus, changes, tokens_per_s):
    prediction = predict(request(plugin, gpus, **changes), Machines(gpus))
    assert prediction.tokens_per_s == pytest.approx(tokens_per_s, rel=0.10)


# Four H200, 2026-11-28, batch 4 a GPU, 1.3b 8: tokens/s, GiB allocated (benchmarks/results/gpus.md).
TP_2_PP_2 = {"batch_size": 16, "tp": 2, "pp": 2}
LARGE = [
    ("6.7b", "low_level_zero", {"batch_size": 4, "zero_stage": 1}, 51_865, 44.9),
    ("13b", "low_level_zero", {"batch_size": 4, "zero_stage": 1}, 26_913, 81.4),
    ("13b", "hybrid_parallel", {**TP_2_PP_2, "num_microbatches": 8}, 22_000, 56.5),
    ("13b", "hybrid_parallel", {**TP_2_PP_2, "num_microbatches": 8, "pp_chunks": 2}, 22_980, 58.3),
    ("13b", "hybrid_parallel", {**TP_2_PP_2, "num_microbatches": 4, "pp_chunks": 4}, 24_124, 65.5),
    ("13b", "hybrid_parallel", {"batch_size": 16, "pp": 4, "num_microbatches": 16, "pp_chunks": 2}, 22_333, 58.6),
    ("30b", "hybrid_parallel", {**TP_2_PP_2, "num_microbatches": 8}, 10_084, 125.6),
    ("30b", "hybrid_parallel", {"batch_size": 16, "pp": 4, "num_microbatches": 16, "pp_chunks": 2}, 10_250, 128.9),
    ("13b", "hybrid_parallel", {**TP_2_PP_2, "num_microbatches": 2, "pp_chunks": 10}, 24_633, 73.1),
    ("30b", "hybrid_parallel", {**TP_2_PP_2, "num_microbatches": 8, "pp_chunks": 4}, 10_868, 127.3),
    ("6.7b", "torch_ddp", {"batch_size": 4}, 45_769, 101.7),
    ("1.3b", "torch_ddp", {"batch_size": 8}, 231_079, 29.3),
    ("1.3b", "low_level_zero", {"batch_size": 8, "zero_stage": 1}, 252_301, 17.5),
]


@pytest.mark.parametrize(("model", "plugin", "changes", "tokens_per_s", "gib"), LARGE)
def test_large_models_are_met_within_5_percent(model, plugin, changes, tokens_per_s, gib):
    shape = model_shape(OPT_SHAPES[model])
    prediction = predict(
        request(plugin, 4, **{"shape": shape, "gpu_gib": 139.8, "zero_stage": 0} | changes), Machines(4)
    )
    assert prediction.tokens_per_s == pytest.approx(tokens_per_s, rel=0.05)
    allocated = prediction.plan.total_bytes - prediction.plan.device_bytes.framework
    assert allocated / GIB == pytest.approx(gib, rel=0.05)


def test_an_all_reduce_of_1_gib_runs_at_the_measured_bus_bandwidth():
    for size, bus in NVLINK_BYTES_S.items():
        seconds = Group(size, size).all_reduce_s(2**30, calls=0)
        assert 2 * (size - 1) / size * 2**30 / seconds == pytest.approx(bus)


def test_a_group_across_machines_is_as_fast_as_its_members_ports_and_never_faster_than_nvlink():
    assert Group(2, 1).bytes_s == NIC_BYTES_S
    assert Group(64, 4).bytes_s == 4 * NIC_BYTES_S
    assert Group(64, 8).bytes_s == NVLINK_BYTES_S[8]


def test_tp_lies_inside_a_machine_and_dp_across():
    found = groups(request("hybrid_parallel", 64, tp=4, pp=2), Machines(8, 8))
    assert found == {"tp": Group(4, 4), "pp": Group(2, 2), "dp": Group(8, 1)}


def test_a_pipeline_without_communication_is_idle_for_p_minus_1_of_m_plus_p_minus_1_slots(monkeypatch):
    monkeypatch.setattr(scaling, "LATENCY_S", 0.0)
    setting = request("hybrid_parallel", 4, pp=4, num_microbatches=8, batch_size=32, zero_stage=0)
    step = predict(setting, Machines(4)).step
    assert step.bubble / (step.bubble + step.compute) == pytest.approx(3 / (8 + 3))


@pytest.mark.parametrize("changes", [{}, {"pp": 2, "num_microbatches": 8}, {"checkpointed_layers": 24}])
def test_auto_counts_the_exchanges_of_divided_layers_as_this_table_does(changes):
    setting = request("hybrid_parallel", 4, tp=2, batch_size=32, **changes)
    work = planner.work(setting)
    seconds = work.layer_bytes / NVLINK_BYTES_S[2] + work.layer_rounds * speed.LATENCY_S
    assert seconds == pytest.approx(predict(setting, Machines(4)).step.layers)


def test_a_pipeline_is_as_slow_as_the_stage_with_the_head_and_adds_up_its_pieces():
    shape = model_shape(OPT_SHAPES["13b"])
    head = shape.matrix_params - shape.layer_matrix_params
    stage = shape.layer_matrix_params / 4
    assert scaling.stage_imbalance(shape, 4) == pytest.approx((stage + head) / (shape.matrix_params / 4))
    few, many = (
        predict(request("hybrid_parallel", 4, shape=shape, pp=4, num_microbatches=number, batch_size=16), Machines(4))
        for number in (4, 16)
    )
    added = 12 * few.plan.device_bytes.parameters / 2 * scaling.SUM_PARAMETER_S
    assert many.step.compute - few.step.compute == pytest.approx(added, rel=1e-6)


def test_an_interleaved_pipeline_waits_half_as_long_sends_twice_and_holds_more():
    settings = [
        request("hybrid_parallel", 4, pp=4, num_microbatches=8, batch_size=32, zero_stage=0, pp_chunks=chunks)
        for chunks in (1, 2)
    ]
    plain, interleaved = (predict(setting, Machines(4)) for setting in settings)
    assert interleaved.step.bubble == pytest.approx(plain.step.bubble / 2)
    assert interleaved.step.stages == pytest.approx(plain.step.stages * 2)
    activations = [each.plan.device_bytes.activations for each in (plain, interleaved)]
    assert activations[1] == pytest.approx(activations[0] * 5.5 / 4, rel=0.1)  # pieces: 4, and 11 of half a stage
    assert scaling.setting_of(settings[1]) == "hybrid_parallel, pp 4, 8 pieces, interleaved in 2"


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 512])
def test_replicas_of_divided_layers_never_wait_longer_than_their_exchange_takes(tp, rows):
    setting = request("hybrid_parallel", 2 * tp, tp=tp, zero_stage=0, batch_size=rows)
    num_bytes = 2 * stage_params(setting)
    whole_s = Group(2, 2).all_reduce_s(num_bytes, calls=math.ceil(num_bytes / scaling.OWN_BUCKET_BYTES))
    assert 0 < predict(setting, Machines(2 * tp)).step.gradients <= whole_s


def test_gradients_hide_behind_a_long_backward_pass_but_for_the_last_bucket(monkeypatch):
    monkeypatch.setattr(scaling, "LATENCY_S", 0.0)
    short, long = (
        predict(request("torch_ddp", world_size=8, batch_size=rows), Machines(1, 8)).step for rows in (1, 512)
    )
    # Those of compiled matrices have 16 bits, the last bucket, the embedding's, 32.
    whole_s, last_s = (
        Group(8, 1).all_reduce_s(num_bytes)
        for num_bytes in (ddp_gradient_bytes(request("torch_ddp")), 4 * SHAPE.vocab_size * SHAPE.embed_dim)
    )
    assert long.gradients == pytest.approx(last_s)
    assert short.gradients == pytest.approx(whole_s - short.compute * 2 / 3, rel=0.1)


def test_low_level_zero_scatters_gradients_and_hides_the_gathered_weights_too(monkeypatch):
    monkeypatch.setattr(scaling, "LATENCY_S", 0.0)
    short, long = (predict(request(world_size=8, batch_size=rows), Machines(1, 8)).step for rows in (1, 512))
    whole_s = Group(8, 1).gather_s(2 * SHAPE.num_params)
    embedding_s = Group(8, 1).gather_s(2 * SHAPE.vocab_size * SHAPE.embed_dim)
    assert long.gradients == pytest.approx(embedding_s) and long.weights == pytest.approx(embedding_s)
    assert short.gradients == pytest.approx(whole_s - short.compute * 2 / 3, rel=0.1)
    assert short.weights == pytest.approx(whole_s - short.compute / 3, rel=0.1)


def test_the_host_launches_what_is_not_compiled_layer_by_layer_for_every_micro_batch():
    steps = [
        predict(request("hybrid_parallel", 2, pp=2, num_microbatches=number, compiled=False, batch_size=8), Machines(2))
        for number in (4, 8)
    ]
    # What the GPUs send meanwhile costs nothing more.
    few, many = (each.step.compute + each.step.stages for each in steps)
    assert many == pytest.approx(2 * few) and steps[1].step.stages > 0
    assert many == pytest.approx(scaling.EAGER_LAYER_S * 8 * SHAPE.num_layers / 2)


def test_tensor_parallelism_waits_four_times_a_layer_and_halves_the_rest(monkeypatch):
    monkeypatch.setattr(scaling, "LATENCY_S", 0.0)
    alone = predict(request("hybrid_parallel", zero_stage=0), Machines(1)).step
    both = predict(request("hybrid_parallel", 2, tp=2, zero_stage=0), Machines(2)).step
    num_bytes = 4 * SHAPE.num_layers * 8 * 1024 * SHAPE.hidden_size * 2
    assert both.layers == pytest.approx(num_bytes / NVLINK_BYTES_S[2])
    slower = matrix_share(SHAPE.hidden_size) / matrix_share(SHAPE.hidden_size, tp=2)
    assert slower > 1.1
    assert both.compute == pytest.approx(slower * alone.compute / 2)
    assert both.update == pytest.approx(alone.update / 2, rel=0.01)


def test_recompute_costs_less_than_its_operations_and_no_mfu_is_claimed_for_it():
    without, with_ = (predict(request(checkpointed_layers=layers), Machines(1)) for layers in (0, SHAPE.num_layers))
    assert 1.2 < with_.step.compute / without.step.compute < 1 + 0.7 / 3
    assert with_.mfu * with_.step.total == pytest.approx(without.mfu * without.step.total)


def test_states_on_the_host_are_updated_by_the_cores_that_all_ranks_share():
    one, four = (predict(request(world_size=gpus, offload_optim_frac=1.0), Machines(gpus)).step.host for gpus in (1, 4))
    assert one == pytest.approx(SHAPE.num_params * 0.195e-9) and four == pytest.approx(one, rel=0.01)


def test_a_comparison_holds_only_what_fits_fastest_first():
    job = Job(model_shape(OPT_SHAPES["66b"]), 4, 2048, scaling.GPU_GIB)
    assert scaling.compare(job, Machines(8)) == []
    found = scaling.compare(job, Machines(8, 8))
    assert all(each.plan.fits for each in found) and "torch_ddp" not in {each.request.plugin for each in found}
    speeds = [each.tokens_per_s for each in found]
    assert speeds == sorted(speeds, reverse=True)


def test_the_plan_of_a_cluster_is_printed_without_torch_and_without_a_gpu():
    words = "--plan --model_name_or_path 66b --gpus 8 --nodes 8 --per_device_train_batch_size 4".split()
    done = subprocess.run(
        [sys.executable, "train_clm.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "speed on 8 machines of 8 GPUs: predicted" in done.stdout
    assert re.search(r"hybrid_parallel, .*pp \d+.* \d+,\d{3} +\d+%", done.stdout)


def test_gpus_and_nodes_without_plan_are_refused():
    (problem,) = problems(TrainArgs(nodes=2), world_size=1, num_gpus=1, gpus_per_node=1)
    assert "need --plan" in problem


# --- the page --------------------------------------------------------------------------------------------------------


def result(**changes):
    """What a run on two H100 leaves, as far as the page reads it."""
    args = asdict(TrainArgs(model_name_or_path="1.3b", per_device_train_batch_size=8, from_scratch=True))
    args |= {"plugin": "low_level_zero", "precision": "bf16", "zero_stage": 1, "gradient_checkpointing": "0"}
    args |= {"compile": "on"} | changes.pop("args", {})
    device = {"name": "NVIDIA H100 80GB HBM3", "count": 2, "memory_gib": 79.6}
    speed, memory = {"tokens_per_s": 100_000.0}, {"peak_allocated_gib": 24.0}
    return {"status": "ok", "args": args, "device": device, "throughput": speed, "memory": memory} | changes


def test_a_measured_run_stands_beside_the_prediction_of_its_own_settings(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(json.dumps(result()))
    (run,) = page.read_runs(tmp_path)
    expected = predict(request(world_size=2), Machines(2)).tokens_per_s
    assert run.prediction.tokens_per_s == pytest.approx(expected)
    assert run.error == pytest.approx(expected / 100_000 - 1)
    text = page.measured_text([run])
    assert "| 1.3b, low_level_zero, ZeRO 1 | NVIDIA H100 80GB HBM3 | 2 | 100,000 | 12" in text
    assert text.endswith(f"The largest error of 1 runs is {abs(run.error):.0%}.") and abs(run.error) > 0.1


def test_a_measured_pipeline_has_the_micro_batches_that_the_run_had():
    args = {"plugin": "hybrid_parallel", "zero_stage": 0, "tp": 1, "pp": 2}
    run = page.measured(result(args=args))
    assert run and run.prediction.request.num_microbatches == 8 and run.prediction.request.batch_size == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "oom"},
        {"throughput": None},
        {"device": {"name": "cpu", "count": 2, "memory_gib": None}},
        {"args": {"model_name_or_path": "a/folder"}},
        {"args": {"gradient_accumulation_steps": 2}},
    ],
)
def test_a_run_that_says_nothing_of_these_predictions_is_left_out(changes):
    assert page.measured(result(**changes)) is None


def test_the_tables_of_the_page_are_those_that_its_command_makes():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert page.clusters_text() in text
    assert page.replaced(text, "new").count("new") == text.count("new") + 1
    with pytest.raises(ValueError, match="lacks the lines"):
        page.replaced("no marks", "new")


def test_a_page_that_is_not_there_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        page.main(["--output", str(tmp_path / "nowhere.md")])
    assert "nowhere.md: no such page" in capsys.readouterr().err


def test_a_cluster_on_which_nothing_fits_has_a_row_that_says_so():
    assert "| 8 | none fits |" in page.clusters_text()
