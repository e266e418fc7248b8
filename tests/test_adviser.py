"""adviser.py: the flags to try next where memory ran out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adviser import fitting_flags, oom_advice
from args import TrainArgs, parse_args, problems
from chooser import resolve_auto
from planning import LARGE, choose, choose_on_four, shape_of


def advise(given: TrainArgs, *, world_size: int = 1, **used: Any) -> list[str]:
    return oom_advice(given, replace(given, **used), num_layers=24, world_size=world_size)


def test_advice_starts_with_recompute_and_then_halves_the_batch() -> None:
    assert advise(TrainArgs(plugin="torch_ddp"), gradient_checkpointing="0", step_in_backward="off") == [
        "--gradient_checkpointing on",
        "--per_device_train_batch_size 8 --gradient_accumulation_steps 2",
        "--plugin low_level_zero",
        "--plugin low_level_zero --step_in_backward on",
        "--plugin low_level_zero --offload_optim_frac 1",
        "--plugin gemini",
        "--plugin gemini --offload_optim_frac 1",
        "--plugin gemini --offload_optim_frac 1 --offload_param_frac 1",
        "--block_size 512",
        "a smaller --model_name_or_path, or more GPUs",
    ]


def test_advice_leaves_out_what_is_in_force() -> None:
    given = TrainArgs(
        plugin="gemini",
        gradient_checkpointing="on",
        per_device_train_batch_size=1,
        offload_optim_frac=1.0,
        offload_param_frac=1.0,
        block_size=128,
    )
    assert advise(given) == ["a smaller --model_name_or_path, or more GPUs"]


def test_advice_names_what_auto_chose_since_it_would_choose_again() -> None:
    advice = advise(TrainArgs(), plugin="gemini", gradient_checkpointing="24", offload_optim_frac=0.5)
    batch = next(line for line in advice if "batch_size" in line)
    assert batch.startswith("--plugin gemini --gradient_checkpointing 24 --offload_optim_frac 0.5 --per_device")


def test_advice_names_the_micro_batches_that_auto_cut() -> None:
    advice = advise(TrainArgs(), plugin="low_level_zero", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert "--plugin low_level_zero --per_device_train_batch_size 2 --gradient_accumulation_steps 8" in advice
    assert all("--per_device_train_batch_size" in line for line in advice if line.startswith("--"))


def test_advice_does_not_stumble_over_what_was_filled_in_for_the_plugin() -> None:
    advice = advise(TrainArgs(), plugin="low_level_zero", zero_stage=1, compile="on", precision="bf16")
    assert "--plugin gemini" in advice


def test_advice_keeps_the_global_batch() -> None:
    given = TrainArgs(plugin="torch_ddp", per_device_train_batch_size=9, gradient_accumulation_steps=2)
    assert "--per_device_train_batch_size 3 --gradient_accumulation_steps 6" in advise(given)


def test_advice_to_shard_comes_before_advice_to_offload_where_there_are_several_gpus() -> None:
    advice = advise(TrainArgs(plugin="torch_ddp"), world_size=4)
    assert advice.index("--plugin low_level_zero") < advice.index("--plugin gemini")
    accumulating = TrainArgs(plugin="low_level_zero", zero_stage=1, gradient_accumulation_steps=2)
    assert "--zero_stage 2" in advise(accumulating, world_size=4)
    assert not any("zero_stage" in line for line in advise(TrainArgs(plugin="low_level_zero"), world_size=4))
    assert not any("step_in_backward" in line for line in advise(TrainArgs(plugin="torch_ddp"), world_size=4))


def test_advice_names_the_cap() -> None:
    assert "a higher --mem_cap than 8 GB" in advise(TrainArgs(plugin="torch_ddp", mem_cap=8.0))


@pytest.mark.parametrize(
    "flags",
    [
        "--plugin torch_ddp --precision fp32",
        "--plugin torch_ddp --compile on",
        "--plugin torch_ddp_fp16",
        "--plugin low_level_zero --zero_stage 1",
        "--plugin hybrid_parallel --tp 2 --pp 2 --num_microbatches 4",
        "--plugin hybrid_parallel --tp 2",
        "--plugin gemini --offload_optim_frac 0.5",
    ],
)
def test_every_advice_added_to_the_command_is_a_command_that_is_accepted(flags: str) -> None:
    given = parse_args(flags.split())
    advice = [line for line in advise(given, world_size=8) if line.startswith("--")]
    assert advice
    for line in advice:
        changed = parse_args([*flags.split(), *line.split()])
        assert changed != given
        assert problems(changed, world_size=8, num_gpus=8, gpus_per_node=8) == []


def test_a_pipelines_pieces_are_chosen_and_named_where_memory_ran_out() -> None:
    flags = {"plugin": "hybrid_parallel", "tp": 2, "pp": 2, "per_device_train_batch_size": 8}
    assert choose("1.3b", world_size=4, **flags).num_microbatches == 4
    assert choose("30b", world_size=4, **flags).num_microbatches == 8
    assert choose("1.3b", world_size=4, num_microbatches=2, **flags).num_microbatches == 2
    assert choose("1.3b", world_size=4, plugin="gemini").num_microbatches == 0
    given = TrainArgs(**flags)
    advice = oom_advice(given, replace(given, num_microbatches=4), num_layers=24, world_size=4, on_cpu=False)
    assert advice[0] == "--num_microbatches 8"
    halved = next(line for line in advice if "per_device" in line)
    assert "--num_microbatches 4" in halved
    given = replace(given, per_device_train_batch_size=6)  # 24 rows in 8 pieces; half of them are not
    advice = oom_advice(given, replace(given, num_microbatches=8), num_layers=24, world_size=4, on_cpu=False)
    halved = next(line for line in advice if "per_device" in line)
    assert "--per_device_train_batch_size 3" in halved and "--num_microbatches" not in halved


def test_where_auto_divided_layers_that_ran_out_of_memory_the_host_is_advised_as_well() -> None:
    given = TrainArgs(**LARGE)
    choice = choose_on_four()
    named = ("plugin", "precision", "tp", "pp", "pp_schedule", "num_microbatches", "num_model_chunks")
    used = replace(given, **{name: getattr(choice, name) for name in named}, gradient_checkpointing="0")
    advice = oom_advice(given, used, num_layers=48, world_size=4)
    (line,) = (each for each in advice if each.endswith("--offload_optim_frac 1"))
    assert line.startswith("--plugin gemini") and "--tp" not in line
    changed = parse_args(f"--per_device_train_batch_size 4 --block_size 1024 {line}".split())
    assert problems(changed, world_size=4, num_gpus=4, gpus_per_node=4) == []
    kept = oom_advice(replace(given, plugin="hybrid_parallel", tp=4), used, num_layers=48, world_size=4)
    assert not any("gemini" in each for each in kept)


def test_no_setting_is_advised_that_takes_more_than_what_ran_out() -> None:
    args = TrainArgs(plugin="hybrid_parallel", tp=2, pp=2, per_device_train_batch_size=4, block_size=1024)
    ran = resolve_auto(args, shape_of("13b"), 4, 79.6, 1024)
    used = replace(args, num_microbatches=ran.num_microbatches, precision="bf16", gradient_checkpointing="0")
    where = shape_of("13b"), 4, 79.6, 1024
    fastest = resolve_auto(replace(args, pp_schedule="interleaved"), *where)
    assert fastest.fits and fastest.step_time.total < ran.step_time.total
    assert fastest.plan.total_bytes > ran.plan.total_bytes  # 68 GiB, that one, for 59 that ran out
    assert fitting_flags(args, used, *where) is None


def test_chunks_fetched_ahead_do_not_keep_another_plugin_from_being_advised() -> None:
    given = TrainArgs(plugin="gemini", max_prefetch="8", per_device_train_batch_size=8)
    used = replace(given, precision="bf16", gradient_checkpointing="0")
    flags = fitting_flags(given, used, shape_of("6.7b"), 2, 79.6, 1024)
    assert flags and flags.startswith("--plugin low_level_zero") and "--max_prefetch auto" in flags
