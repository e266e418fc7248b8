"""speed.py: what a step is expected to take, against steps measured on an H100, and what hides behind what."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from opt_sizes import OPT_SHAPES
from planner import PlanRequest, model_shape, work
from scaling import Machines, predict
from speed import HOST_ADAM_S, LAUNCH_S, MATRIX_SHARE, PLUGIN_SPEED, SUM_PARAMETER_S, Work, matrix_share, step_time


def work_of(size: str = "1.3b", rows: int = 8, **changes: Any) -> Work:
    shape = model_shape(OPT_SHAPES[size])
    share = float(changes.pop("host_share", 0.0))
    work = Work(
        shape=shape,
        plugin="low_level_zero",
        at_best=True,
        on_gpu=True,
        exchanges=False,
        tokens=rows * 1024,
        seq_len=1024,
        micro_batches=1,
        num_params=shape.num_params,
        recomputed_layers=0,
        gpu_states=(1 - share) * shape.num_params,
        host_states=share * shape.num_params,
        host_parameters=0.0,
        step_in_backward=share > 0,
    )
    return replace(work, **changes)


@pytest.mark.parametrize(
    ("size", "rows", "layers", "share", "measured_ms"),
    [("1.3b", 8, 0, 0.0, 138.5), ("2.7b", 16, 32, 1.0, 896.4), ("2.7b", 16, 32, 0.7, 788.4)],
)
def test_steps_measured_on_a_gpu_are_expected_within_a_tenth(
    size: str, rows: int, layers: int, share: float, measured_ms: float
) -> None:
    expected = step_time(work_of(size, rows, recomputed_layers=layers, host_share=share))
    assert 1e3 * expected.total == pytest.approx(measured_ms, rel=0.1)


def test_the_host_hides_behind_the_last_backward_pass_and_only_behind_it() -> None:
    little, much = work_of(host_share=0.1), work_of(host_share=1.0)
    assert step_time(little).host == 0 < step_time(much).host
    after = step_time(replace(little, step_in_backward=False))
    assert after.host == pytest.approx(0.1 * little.num_params * HOST_ADAM_S)
    assert step_time(replace(much, micro_batches=4)).host > step_time(much).host


def test_recompute_and_accumulation_cost_what_they_repeat() -> None:
    plain = step_time(work_of())
    recomputed, cut = step_time(work_of(recomputed_layers=24)), step_time(work_of(micro_batches=4))
    assert 0.25 < recomputed.recompute / plain.compute < 0.34 and recomputed.compute == plain.compute
    assert 0 < cut.micro_batches < 0.2 * plain.compute and plain.micro_batches == 0


def test_plugins_stand_in_the_order_of_the_readme_where_the_gpu_is_busy() -> None:
    times = [step_time(work_of("125m", 64, plugin=plugin)).total for plugin in PLUGIN_SPEED]
    assert times == sorted(times)
    assert step_time(work_of(at_best=False)).total > step_time(work_of()).total
    assert step_time(work_of(exchanges=True)).total > step_time(work_of()).total


def test_a_pipeline_is_cut_into_few_pieces_where_launches_take_long_and_into_many_otherwise() -> None:
    def times(size: str) -> dict[int, float]:
        piped = work_of(size, 32, plugin="hybrid_parallel", exchanges=True, replica_size=4, stages=2)
        return {pieces: step_time(replace(piped, pieces=pieces)).total for pieces in (2, 4, 8)}

    small, large = times("1.3b"), times("30b")
    assert min(small, key=small.__getitem__) == 4  # on four H200 352 ms; 8 pieces took 571 (2026-11-27)
    assert min(large, key=large.__getitem__) == 8


def test_the_gradients_of_a_pipelines_pieces_are_added_up_once() -> None:
    piped = work_of("13b", 32, plugin="hybrid_parallel", replica_size=2, stages=2, pieces=4)
    whole, cut = step_time(piped), step_time(replace(piped, micro_batches=2))
    # Of the second micro-batch's four pieces; the first one's are in `micro_batches`.
    assert cut.compute - whole.compute == pytest.approx(3 * piped.num_params * SUM_PARAMETER_S)


def test_a_stage_recomputes_the_first_layers_of_each_of_its_parts() -> None:
    def recompute(layers: int, chunks: int) -> float:
        piped = work_of("1.3b", 32, plugin="hybrid_parallel", replica_size=2, stages=2, chunks=chunks)
        return step_time(replace(piped, recomputed_layers=layers)).recompute

    # 24 layers: stage 0 has the first 12; in two parts each 0 to 5 and 12 to 17.
    assert recompute(12, 1) == recompute(24, 1) == pytest.approx(2 * recompute(6, 1))
    assert recompute(6, 2) == recompute(12, 2) == pytest.approx(recompute(24, 2) / 2)
    assert recompute(15, 2) == pytest.approx(recompute(24, 2) * 9 / 12)


def test_divided_layers_without_a_pipeline_are_slower_and_take_longer_to_launch() -> None:
    # A GPU's row of 1.3b on two H200: torch_ddp 44.7 ms a step, tp 2 54.4 (2026-11-28).
    small = {"exchanges": True, "layers_per_graph": 4}
    whole = step_time(work_of("1.3b", 1, plugin="torch_ddp", **small))
    divided = step_time(work_of("1.3b", 1, plugin="hybrid_parallel", layer_bytes=1.0, replica_size=2, **small))
    assert divided.launches > 0 and whole.launches > 0
    assert divided.total == pytest.approx(54.4 / 44.7 * whole.total, rel=0.01)
    large = work_of("1.3b", 64, plugin="hybrid_parallel", replica_size=2)
    assert step_time(replace(large, layer_bytes=1.0)).compute > 1.1 * step_time(large).compute


def test_a_pipeline_of_narrow_halves_is_slower_than_one_of_whole_layers_as_the_other_module_says() -> None:
    # 2.7b on four GPUs, 16 rows each.
    shape, layout = model_shape(OPT_SHAPES["2.7b"]), {"world_size": 4, "num_microbatches": 4, "pp_chunks": 8}
    requests = [
        PlanRequest(
            shape, "hybrid_parallel", "bf16", batch_size=64, block_size=1024, compiled=True, gpu_gib=139.8, **each
        )
        for each in ({"tp": 2, "pp": 2, **layout}, {"pp": 4, **layout})
    ]
    for seconds in (
        lambda request: step_time(work(request)).total,
        lambda request: predict(request, Machines(4)).step.total,
    ):
        assert seconds(requests[1]) < 0.97 * seconds(requests[0])


def test_wide_layers_are_no_slower_for_being_divided_by_two() -> None:
    assert matrix_share(2048, tp=2) < 0.9 * matrix_share(2048)
    assert matrix_share(4096, tp=2) == matrix_share(4096) == matrix_share(12288)


def test_between_measured_widths_the_share_grows_and_beyond_them_it_stays() -> None:
    shares = [matrix_share(width) for width in (512, 768, 1024, 1448, 2048, 2560, 2896, 9216)]
    assert shares[0] == shares[1] == MATRIX_SHARE[768] and shares[-2] == shares[-1]
    assert all(narrow < wide for narrow, wide in itertools.pairwise(shares[1:-1]))
    assert shares[3:5] == [MATRIX_SHARE[1448], MATRIX_SHARE[2048]]


def test_a_small_batch_waits_for_the_host_to_launch_it_on_several_gpus_least_under_ddp() -> None:
    small = work_of("125m", 8, layers_per_graph=4)
    alone, among_others = (
        {plugin: step_time(replace(small, plugin=plugin, exchanges=exchanges)) for plugin in PLUGIN_SPEED}
        for exchanges in (False, True)
    )
    assert alone["low_level_zero"].total < alone["torch_ddp"].total < alone["gemini"].total
    assert among_others["torch_ddp"].total < among_others["low_level_zero"].total
    # On one H200 20.7 and 23.4 ms, torch_ddp 21.1 and 24.4 (2026-11-28).
    assert alone["low_level_zero"].total == pytest.approx(22e-3, rel=0.05)
    assert alone["torch_ddp"].total == pytest.approx(22.75e-3, rel=0.05)
    assert all(step.launches > 0 for step in (*alone.values(), *among_others.values()))
    single = {plugin: step_time(replace(small, plugin=plugin, layers_per_graph=1)).total for plugin in LAUNCH_S}
    assert single["low_level_zero"] > 1.2 * alone["low_level_zero"].total and single["gemini"] == alone["gemini"].total
    in_fp16 = replace(small, at_best=False)
    assert step_time(in_fp16).total > step_time(replace(in_fp16, plugin="torch_ddp_fp16", at_best=True)).total
    assert step_time(work_of("125m", 8, on_gpu=False)).launches == step_time(work_of()).launches == 0


def test_the_causes_are_named_with_their_shares() -> None:
    text = step_time(work_of(host_share=1.0, recomputed_layers=24)).describe()
    assert text.startswith("compute ") and "recompute" in text and "waiting for the host" in text
    assert step_time(work_of()).describe() == "compute 100%"
