"""chooser.py: what `auto` becomes, and the plan's table."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from args import TrainArgs, problems
from chooser import OFFLOAD_HANDICAP, alternatives, chosen_flags, resolve_auto, table
from opt_sizes import OPT_SHAPES
from planner import GIB, model_shape, plan
from planning import LARGE, choose, choose_on_four, request_of, shape_of


@pytest.mark.parametrize(
    ("world_size", "rows", "plugin"),
    [(1, 32, "low_level_zero"), (1, 8, "low_level_zero"), (4, 8, "low_level_zero"), (4, 32, "low_level_zero")],
)
def test_a_small_model_takes_the_fastest_plugin_without_recompute(world_size: int, rows: int, plugin: str) -> None:
    choice = choose("125m", world_size=world_size, per_device_train_batch_size=rows)
    assert (choice.plugin, choice.precision, choice.checkpointed_layers, choice.fits) == (plugin, "bf16", 0, True)


def test_layers_are_divided_where_that_spares_their_recomputation() -> None:
    choice = choose_on_four()
    assert (choice.plugin, choice.fits, choice.checkpointed_layers) == ("hybrid_parallel", True, 0)
    assert choice.tp * choice.pp == 4 and choice.per_device_train_batch_size == 4
    assert 4 * 4 % choice.num_microbatches == 0 < choice.num_microbatches
    flags = {name: getattr(choice, name) for name in ("plugin", "tp", "pp", "pp_schedule", "num_microbatches")}
    named = TrainArgs(**LARGE, **flags, precision="bf16")
    assert problems(named, world_size=4, num_gpus=4, gpus_per_node=4) == []
    again = resolve_auto(named, shape_of("30b"), 4, 139.8, 512)
    assert again.plan.device_bytes == choice.plan.device_bytes


@pytest.mark.parametrize(
    "flags", [{"dataset": "netflix"}, {"precision": "fp32"}, {"size": "13b"}, {"size": "6.7b"}, {"size": "1.3b"}]
)
def test_layers_stay_whole_where_all_else_is_as_good(flags: dict[str, Any]) -> None:
    choice = choose_on_four(**flags)
    assert choice.plugin != "hybrid_parallel" and (choice.tp, choice.pp, choice.num_microbatches) == (1, 1, 0)


def test_a_pipeline_needs_evaluation_batches_of_its_own_size() -> None:
    assert choose_on_four(per_device_eval_batch_size=4).pp > 1
    assert choose_on_four(per_device_eval_batch_size=8).pp == 1


def test_several_machines_and_other_models_than_opt_are_not_divided() -> None:
    args, shape = TrainArgs(**LARGE), shape_of("30b")
    where = (4, 139.8, 512)
    assert resolve_auto(args, shape, *where, processes_per_host=4).plugin == "hybrid_parallel"
    assert resolve_auto(args, shape, *where, processes_per_host=2).plugin != "hybrid_parallel"
    other = model_shape(OPT_SHAPES["30b"], OPT_SHAPES["30b"].num_params + 1)
    assert resolve_auto(args, other, *where, processes_per_host=4).plugin != "hybrid_parallel"


def test_less_memory_is_bought_with_ever_more_time_and_states_on_the_host() -> None:
    choices = [choose("1.3b", gpu_gib=gib) for gib in (80, 40, 24, 18, 11)]
    assert all(choice.fits and choice.plugin == "low_level_zero" for choice in choices)
    shares = [choice.offload_optim_frac for choice in choices]
    assert choices[0].checkpointed_layers == shares[0] == 0 < choices[3].checkpointed_layers
    assert shares == sorted(shares) and shares[-1] > 0.8
    times = [choice.step_time.total for choice in choices]
    assert times == sorted(times) and len(set(times)) == len(times)
    assert not choices[0].step_in_backward and choices[3].step_in_backward


def test_no_setting_that_fits_and_has_no_handicap_is_expected_to_be_faster_than_the_choice() -> None:
    for gib in (60, 30, 20, 12):
        chosen = choose("1.3b", gpu_gib=gib)
        for other in alternatives(TrainArgs(), shape_of("1.3b"), 1, gib, 128, choice=chosen):
            assert not other.plan.fits or other.relative_speed <= OFFLOAD_HANDICAP + 1e-9, (gib, other.flags)


# ---------------------------------------------------------------------------- micro-batches


def test_a_batch_is_cut_where_nothing_else_fits_or_all_else_is_much_slower() -> None:
    whole, cut = choose("350m", gpu_gib=24), choose("350m", gpu_gib=6)
    assert (whole.per_device_train_batch_size, whole.gradient_accumulation_steps) == (16, 1)
    assert cut.fits and cut.gradient_accumulation_steps > 1
    assert f"batch cut into {cut.gradient_accumulation_steps} micro-batches" in cut.reason
    assert "batch cut" not in whole.reason


def test_the_rows_of_a_step_stay_however_a_batch_is_cut() -> None:
    for gib in (30, 6, 2):
        for batch, accumulation in ((16, 1), (12, 2), (7, 3)):
            choice = choose(
                "350m", gpu_gib=gib, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
            )
            rows = choice.per_device_train_batch_size * choice.gradient_accumulation_steps
            assert rows == batch * accumulation and choice.per_device_train_batch_size <= batch


def test_a_named_plugin_keeps_its_batch() -> None:
    choice = choose("350m", gpu_gib=8, plugin="low_level_zero")
    assert (choice.per_device_train_batch_size, choice.gradient_accumulation_steps, choice.fits) == (16, 1, False)


def test_a_cut_batch_is_worth_its_handicap() -> None:
    for gib in (20, 16, 12, 10, 8):
        cut = choose("125m", gpu_gib=gib, per_device_train_batch_size=32)
        whole = [
            found
            for plugin in ("low_level_zero", "torch_ddp")
            if (found := choose("125m", gpu_gib=gib, per_device_train_batch_size=32, plugin=plugin)).fits
        ]
        if cut.gradient_accumulation_steps > 1:
            assert all(other.step_time.total > cut.step_time.total * 1.04 for other in whole)


def test_clipping_needs_all_gradients_so_nothing_is_updated_before() -> None:
    assert not choose("1.3b", gpu_gib=24, max_grad_norm=1.0).step_in_backward


def test_several_gpus_shard_before_they_offload() -> None:
    choice = choose("2.7b", gpu_gib=40, world_size=4, host_gib=512, per_device_train_batch_size=4)
    assert (choice.plugin, choice.offload_optim_frac, choice.fits) == ("low_level_zero", 0, True)


def test_no_more_layers_are_recomputed_than_needed() -> None:
    def layers(share: float) -> int:
        return choose("350m", gpu_gib=share * need_gib / 0.95, plugin="low_level_zero").checkpointed_layers

    need_gib = plan(request_of("350m", "low_level_zero", batch_size=16, compiled=True)).total_bytes / GIB
    numbers = [layers(share) for share in (1.001, 0.999, 0.9)]
    assert numbers[:2] == [0, 1]
    fewer = request_of("350m", "low_level_zero", batch_size=16, compiled=True, checkpointed_layers=numbers[2] - 1)
    assert not plan(replace(fewer, gpu_gib=0.9 * need_gib / 0.95)).fits


def test_flags_that_are_given_stand() -> None:
    choice = choose("1.3b", plugin="gemini", gradient_checkpointing="3", offload_optim_frac=0.25)
    assert (choice.plugin, choice.checkpointed_layers, choice.offload_optim_frac) == ("gemini", 3, 0.25)
    assert choose("1.3b", plugin="low_level_zero", gradient_checkpointing="on").checkpointed_layers == 24
    assert choose("1.3b", gpu_gib=8, gradient_checkpointing="off").checkpointed_layers == 0
    assert choose("1.3b", gradient_checkpointing="99").checkpointed_layers == 24


def test_rows_are_never_planned_longer_than_the_model_can_address() -> None:
    assert choose("125m", block_size=9999).plan == choose("125m", block_size=2048).plan


@pytest.mark.parametrize("size", ["6.7b", "13b", "30b"])
def test_gemini_fetches_the_next_layers_three_chunks_and_one_more_ahead_of_several_ranks(size: str) -> None:
    several = choose(size, 139.8, world_size=4, plugin="gemini", gradient_checkpointing="on")
    assert several.max_prefetch == "4" and "4 chunks fetched ahead" in several.reason
    assert choose(size, 139.8, plugin="gemini", gradient_checkpointing="on").max_prefetch == "0"
    named = choose(size, 139.8, world_size=4, plugin="gemini", gradient_checkpointing="on", max_prefetch="7")
    assert named.max_prefetch == "7"
    chunk = 2 * shape_of(size).layer_params / 3  # bytes
    assert named.plan.total_bytes - several.plan.total_bytes == pytest.approx(3 * chunk, rel=0.01)
    placed = choose(size, 139.8, world_size=4, plugin="gemini", gradient_checkpointing="on", placement="auto")
    assert placed.max_prefetch == "0"


def test_a_cap_is_kept_like_a_smaller_gpu() -> None:
    choice = choose("1.3b", gpu_gib=80, mem_cap=24)
    assert choice.fits
    assert choice.plan.total_bytes <= 0.95 * 24e9


def test_on_a_cpu_auto_is_ddp_in_fp32_without_recompute() -> None:
    for size, fits in (("tiny", True), ("6.7b", False)):
        choice = choose(size, gpu_gib=None, world_size=2, host_gib=32)
        assert (choice.plugin, choice.precision, choice.checkpointed_layers) == ("torch_ddp", "fp32", 0)
        assert choice.fits is fits


def test_on_a_cpu_a_cap_is_applied_to_the_plan() -> None:
    flags = {"mem_cap": 2.4, "block_size": 128, "per_device_train_batch_size": 8}
    recomputing = choose("125m", gpu_gib=None, host_gib=512, **flags)
    assert (recomputing.plugin, recomputing.fits) == ("torch_ddp", True)
    assert recomputing.checkpointed_layers > 0
    other = choose("125m", gpu_gib=None, host_gib=512, gradient_checkpointing="off", **flags)
    assert other.plugin != "torch_ddp"


@pytest.mark.parametrize(
    ("flags", "plugin", "precision"),
    [
        ({"precision": "fp16"}, "torch_ddp_fp16", "fp16"),
        ({"precision": "fp32"}, "torch_ddp", "fp32"),
        ({"plugin": "torch_ddp_fp16"}, "torch_ddp_fp16", "fp16"),
        ({"plugin": "gemini"}, "gemini", "bf16"),
    ],
)
def test_precision_follows_the_flags(flags: dict[str, str], plugin: str, precision: str) -> None:
    choice = choose("125m", **flags)
    assert (choice.plugin, choice.precision) == (plugin, precision)


def test_a_gpu_without_bf16_takes_fp16() -> None:
    choice = resolve_auto(TrainArgs(block_size=256), shape_of("125m"), 1, 16, 64, has_bf16=False)
    assert (choice.plugin, choice.precision) == ("torch_ddp_fp16", "fp16")


@pytest.mark.parametrize(
    ("plugin", "zero_stage", "precision"),
    [
        ("gemini", None, "bf16"),
        ("low_level_zero", None, "fp32"),
        ("hybrid_parallel", 1, "bf16"),
        ("torch_ddp_fp16", None, "fp16"),
    ],
)
def test_precision_on_a_cpu_is_what_the_plugin_has(plugin: str, zero_stage: int | None, precision: str) -> None:
    assert choose("tiny", gpu_gib=None, plugin=plugin, zero_stage=zero_stage).precision == precision


def test_what_auto_may_not_choose_is_never_chosen() -> None:
    assert choose("13b", gpu_gib=24, precision="fp32").plugin != "gemini"


def test_where_nothing_fits_the_smallest_is_taken_and_said_to_be_too_large() -> None:
    choice = choose("175b", gpu_gib=80)
    assert not choice.fits
    assert "NOT to fit the device or the host," in choice.reason
    assert "\n" not in choice.reason


def test_every_choice_is_accepted_by_the_argument_checks() -> None:
    for size in ("tiny", "350m", "6.7b", "175b"):
        for mem_cap in (0.0, 8.0, 24.0):
            choice = choose(size, mem_cap=mem_cap)
            args = TrainArgs(precision=choice.precision, **chosen_flags(choice))
            assert problems(args, world_size=1, num_gpus=1, gpus_per_node=1) == []


# ---------------------------------------------------------------------------- the whole table


def test_the_table_has_every_plugin_that_a_run_can_have() -> None:
    def flags(world_size: int, **changes: Any) -> str:
        args = TrainArgs(per_device_train_batch_size=4, **changes)
        choice = resolve_auto(args, shape_of("1.3b"), world_size, 80, 512)
        found = alternatives(args, shape_of("1.3b"), world_size, 80, 512, choice=choice)
        return "\n".join(other.flags for other in found)

    alone, four = flags(1), flags(4)
    for plugin in ("torch_ddp ", "torch_ddp_fp16", "low_level_zero", "gemini"):
        assert plugin in alone and plugin in four
    assert "--tp 2 --pp 2" in four and "--tp" not in alone
    assert "--step_in_backward on" in alone and "--step_in_backward on" in four
    assert "--step_in_backward" not in flags(1, max_grad_norm=1.0)


def test_the_table_says_how_fast_and_why() -> None:
    args = TrainArgs()
    choice = resolve_auto(args, shape_of("1.3b"), 1, 26, 128)
    others = alternatives(args, shape_of("1.3b"), 1, 26, 128, choice=choice)
    by_flags = {other.flags: other for other in others}
    recomputed = by_flags["--plugin low_level_zero --step_in_backward on --gradient_checkpointing on"]
    assert "recompute" in recomputed.why and 0.5 < recomputed.relative_speed < 1
    full = by_flags["--plugin torch_ddp --gradient_checkpointing off"]
    assert (
        not full.plan.fits and full.why == f"{full.plan.total_bytes / full.plan.limit_bytes:.0%} of the device's memory"
    )
    lines = table(choice, others).splitlines()
    assert lines[1].split()[-2:] == ["speed", "flags"] and f"({recomputed.why})" in "\n".join(lines)


def test_the_plan_answers_at_once_and_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "train_clm.py", "--plan", "--model_name_or_path", "6.7b"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--mem_cap", "24", "--output_dir", str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The processor's time, one core's: that on the clock is the same where nothing else runs.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert done.returncode == 0 and "device 22.4 GiB" in done.stdout and "chosen: low_level_zero" in done.stdout
    assert " torch\n" not in done.stderr
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["chosen"]["plugin"] == "low_level_zero" and len(content["alternatives"]) > 15


def test_a_plan_for_flags_that_contradict_each_other_is_refused() -> None:
    command = [sys.executable, "train_clm.py", "--plan", "--plugin", "gemini", "--precision", "fp32"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: --precision fp32: gemini trains in bf16")


def test_a_plan_for_a_layout_that_does_not_divide_the_model_is_refused() -> None:
    flags = "--plan --gpus 4 --model_name_or_path tiny --plugin hybrid_parallel --pp 4 --pp_schedule interleaved"
    done = subprocess.run(
        [sys.executable, "train_clm.py", *flags.split()],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "--num_model_chunks 2: needs at least 8 layers, tiny has 4" in done.stderr
