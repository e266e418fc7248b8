"""args.py: flags, their help, and every problem that can be seen before torch is loaded."""

from __future__ import annotations

import itertools
import re
import resource
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from args import ConfigError, TrainArgs, build_parser, parse_args, pipeline_microbatches, problems

ROOT = Path(__file__).resolve().parent.parent

# DESIGN.md, "Fixed interfaces", without those of later issues (checkpoints, export, plan).
PROMISED_FLAGS = """
    model_name_or_path tokenizer_name from_scratch dataset train_file validation_file validation_split_percentage
    text_column block_size per_device_train_batch_size gradient_accumulation_steps learning_rate weight_decay
    lr_scheduler_type num_warmup_steps warmup_ratio max_grad_norm num_train_epochs max_train_steps logging_steps
    output_dir overwrite_output_dir seed dropout precision gradient_checkpointing compile mem_cap plugin tp pp
    num_microbatches zero_stage offload_optim_frac offload_param_frac placement eval_only prompt
"""


def found(world_size: int = 1, num_gpus: int = 1, gpus_per_node: int = 1, **flags: Any) -> list[str]:
    return problems(TrainArgs(**flags), world_size=world_size, num_gpus=num_gpus, gpus_per_node=gpus_per_node)


# ---------------------------------------------------------------------------- parser


def help_text() -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_clm.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


def test_help_lists_every_flag_and_what_was_promised() -> None:
    listed = set(re.findall(r"--(\w+)", help_text()))
    assert listed >= {*PROMISED_FLAGS.split(), *(spec.name for spec in fields(TrainArgs))}


def test_help_answers_without_loading_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    help_text()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of processor time, which other work on the machine does not stretch. torch alone takes above 1 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_every_flag_has_help_that_says_its_default_or_its_off_value() -> None:
    for action in build_parser()._actions[1:]:
        assert action.help, action.option_strings
        is_switch, is_optional_text = action.nargs == 0, action.dest in ("prompt", "train_file")
        says_default = "%(default)s" in action.help or "off:" in action.help
        assert is_switch or is_optional_text or says_default, action.option_strings


def test_no_flags_give_the_dataclass_defaults() -> None:
    assert parse_args([]) == TrainArgs()


def test_flags_reach_their_fields_with_their_types() -> None:
    words = "--tp 2 --learning_rate 1e-4 --from_scratch --no-save_final --prompt one --prompt two --zero_stage 0"
    args = parse_args(words.split())
    assert (args.tp, args.learning_rate, args.zero_stage) == (2, 1e-4, 0)
    assert (args.from_scratch, args.save_final, args.prompt) == (True, False, ("one", "two"))


def test_a_home_folder_is_found_where_the_shell_leaves_it(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    args = parse_args(["--output_dir=~/run", "--train_file", "~/a.txt", "--model_name_or_path", "125m"])
    assert (args.output_dir, args.train_file) == ("/home/somebody/run", "/home/somebody/a.txt")
    assert (args.model_name_or_path, args.cache_dir) == ("125m", None)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--learning_rte", "did you mean --learning_rate?"),
        ("--batch_size", "did you mean --per_device_train_batch_size or --per_device_eval_batch_size?"),
        ("--lr", "did you mean --learning_rate?"),
        ("--resume=last", "did you mean --resume_from_checkpoint?"),
        ("--xyzzy", "unrecognized arguments: --xyzzy\n"),
    ],
)
def test_an_unknown_flag_is_told_what_it_may_stand_for(word: str, meant: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_args([word])
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["--plug gemini", "--plugin fsdp", "--from_scratch yes", "--tp two", "--block_size 1.5", "stray", "--zero_stage 3"],
)
def test_an_unknown_abbreviated_or_mistyped_flag_ends_with_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(words.split())
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_arguments_cannot_change_after_parsing() -> None:
    with pytest.raises(FrozenInstanceError):
        parse_args([]).tp = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "size", "slug"),
    [("6.7", "6.7b", "6.7b"), ("125M", "125m", "125m"), ("facebook/opt-125m", None, "opt-125m"), ("/a/b/", None, "b")],
)
def test_a_model_word_is_a_size_or_a_name(name: str, size: str | None, slug: str) -> None:
    args = TrainArgs(model_name_or_path=name)
    assert (args.model_size, args.model_slug) == (size, slug)


def test_evaluation_uses_the_training_batch_unless_told() -> None:
    assert TrainArgs(per_device_train_batch_size=3).eval_batch_size == 3
    assert TrainArgs(per_device_eval_batch_size=5).eval_batch_size == 5


def test_the_gpus_of_a_replica_pool_their_rows_and_a_step_has_as_many_under_every_layout() -> None:
    hybrid = TrainArgs(plugin="hybrid_parallel", tp=2, pp=3, per_device_train_batch_size=4)
    single = TrainArgs(plugin="gemini", per_device_train_batch_size=4)
    assert (hybrid.replica_size, hybrid.train_batch_size, hybrid.eval_batch_size) == (6, 24, 24)
    assert (single.replica_size, single.train_batch_size) == (1, 4)
    assert hybrid.global_batch_size(12) == single.global_batch_size(12) == 48


def test_a_config_error_holds_all_its_problems() -> None:
    error = ConfigError("one", "two")
    assert error.problems == ("one", "two")
    assert str(error) == "one\ntwo"


# ---------------------------------------------------------------------------- problems


def test_the_defaults_are_fine_on_gpu_and_cpu() -> None:
    assert found() == []
    assert found(num_gpus=0) == []


def test_all_problems_are_found_at_once() -> None:
    listed = found(
        world_size=4, num_gpus=0, plugin="hybrid_parallel", tp=3, block_size=1, precision="fp16", warmup_ratio=2.0
    )
    assert len(listed) == 4
    for flag in ("--tp 3", "--block_size 1", "--precision fp16", "--warmup_ratio 2.0"):
        assert any(line.startswith(flag) for line in listed), flag


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"block_size": 1}, "--block_size 1: must be at least 2"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: must be at least 1"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size 0: must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0: must be at least 1"),
        ({"max_train_steps": 0}, "--max_train_steps 0: must be at least 1"),
        ({"mem_cap": -1.0}, "--mem_cap -1.0: must be at least 0"),
        ({"learning_rate": float("nan")}, "--learning_rate nan: must be at least 0"),
        ({"dropout": 1.5}, "--dropout 1.5: must be between 0 and 1"),
        ({"validation_split_percentage": 100.0}, "--validation_split_percentage 100.0: must be between 0 and 99"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"gradient_checkpointing": "some"}, "--gradient_checkpointing some: must be auto, on, off or a number"),
        ({"gradient_checkpointing": "-1"}, "--gradient_checkpointing -1: must be auto, on, off or a number"),
        ({"plugin": "gemini", "max_prefetch": "-1"}, "--max_prefetch -1: must be auto or a number of chunks"),
        ({"num_warmup_steps": 5, "warmup_ratio": 0.1}, "--num_warmup_steps and --warmup_ratio: give one"),
    ],
)
def test_a_number_out_of_range_is_named_with_what_is_allowed(flags: dict[str, Any], problem: str) -> None:
    assert len(found(**flags)) == 1
    assert found(**flags)[0].startswith(problem)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"plugin": "torch_ddp_fp16", "precision": "bf16"}, "--precision bf16: torch_ddp_fp16 is fp16"),
        ({"plugin": "torch_ddp", "precision": "fp16"}, "--precision fp16: use --plugin torch_ddp_fp16"),
        ({"plugin": "gemini", "precision": "fp32"}, "--precision fp32: gemini trains in bf16 or fp16"),
        ({"plugin": "hybrid_parallel", "precision": "fp32", "zero_stage": 1}, "--precision fp32: hybrid_parallel with"),
        ({"plugin": "low_level_zero", "zero_stage": 0}, "--zero_stage 0: low_level_zero has stages 1 and 2"),
        (
            {"plugin": "low_level_zero", "step_in_backward": "on", "max_grad_norm": 1.0},
            "--step_in_backward on: not with --max_grad_norm",
        ),
        ({"plugin": "gemini", "offload_param_frac": 0.5}, "--offload_param_frac: needs --offload_optim_frac 1"),
        ({"plugin": "gemini", "placement": "auto", "max_prefetch": "4"}, "--placement auto: fetches as much ahead as"),
    ],
)
def test_a_plugin_refuses_what_it_cannot_do(flags: dict[str, Any], problem: str) -> None:
    assert len(found(**flags)) == 1
    assert found(**flags)[0].startswith(problem)


def test_gradients_divided_between_micro_batches_cannot_wait_for_a_step_in_the_backward_pass() -> None:
    flags = {"plugin": "low_level_zero", "step_in_backward": "on", "zero_stage": 2, "gradient_accumulation_steps": 2}
    several = {"world_size": 2, "num_gpus": 2, "gpus_per_node": 2}
    (problem,) = found(**several, **flags)
    assert problem.startswith("--step_in_backward on: not with --zero_stage 2 and accumulation")
    assert found(**flags) == found(**several, **flags | {"zero_stage": 1}) == []
    assert found(**several, **flags | {"gradient_accumulation_steps": 1}) == []


@pytest.mark.parametrize(
    ("plugin", "flags"),
    [
        ("torch_ddp", {"tp": 2}),
        ("torch_ddp", {"pp": 2}),
        ("low_level_zero", {"num_microbatches": 2}),
        ("gemini", {"pp_schedule": "interleaved"}),
        ("low_level_zero", {"num_model_chunks": 4}),
        ("gemini", {"zero_stage": 1}),
        ("torch_ddp", {"placement": "auto"}),
        ("torch_ddp", {"offload_optim_frac": 1.0}),
        ("auto", {"offload_optim_frac": 0.5}),
        ("auto", {"max_prefetch": "0"}),
        ("low_level_zero", {"offload_param_frac": 1.0, "offload_optim_frac": 1.0}),
    ],
)
def test_a_flag_the_plugin_has_no_use_for_is_refused(plugin: str, flags: dict[str, Any]) -> None:
    name = next(iter(flags))
    (problem,) = found(plugin=plugin, **flags)
    assert problem.startswith(f"--{name} {flags[name]}: needs --plugin ")
    assert problem.endswith(f"got {plugin}")


@pytest.mark.parametrize("flags", [{"precision": "fp16"}, {"plugin": "torch_ddp_fp16"}])
def test_fp16_on_a_cpu_is_refused_unless_rehearsed(flags: dict[str, Any]) -> None:
    (problem,) = found(num_gpus=0, **flags)
    assert "fp16 needs a GPU" in problem
    assert found(num_gpus=0, allow_cpu_fp16=True, **flags) == []
    assert found(num_gpus=1, **flags) == []


def test_auto_placement_needs_a_gpu() -> None:
    assert found(num_gpus=0, plugin="gemini", placement="auto")[0].startswith("--placement auto")
    assert found(num_gpus=1, plugin="gemini", placement="auto") == []


def test_more_gpus_than_there_are_is_said_with_both_numbers() -> None:
    assert found(world_size=4, num_gpus=2, gpus_per_node=4) == [
        "4 GPUs asked for, 2 here: start with 2 or fewer",
    ]
    assert found(world_size=8, num_gpus=4, gpus_per_node=4) == []


@pytest.mark.parametrize(("tp", "pp", "world_size", "fits"), [(2, 2, 4, True), (2, 2, 6, False), (4, 1, 2, False)])
def test_tp_times_pp_must_divide_the_processes(tp: int, pp: int, world_size: int, fits: bool) -> None:
    listed = found(world_size=world_size, num_gpus=0, plugin="hybrid_parallel", tp=tp, pp=pp)
    assert (listed == []) is fits
    assert fits or listed[0].startswith(f"--tp {tp} x --pp {pp}: must divide the {world_size} processes")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            {"per_device_train_batch_size": 6, "num_microbatches": 5},
            "--num_microbatches 5: must divide the 12 rows of a replica (--per_device_train_batch_size 6 x 2 GPUs)",
        ),
        ({"per_device_train_batch_size": 4, "num_microbatches": 1}, "--num_microbatches 1: must be at least --pp 2"),
        (
            {"per_device_train_batch_size": 3, "num_microbatches": 3, "pp_schedule": "interleaved"},
            "--num_microbatches 3: interleaved needs a multiple",
        ),
        ({"per_device_eval_batch_size": 8}, "--per_device_eval_batch_size: must equal the training batch"),
        ({"num_model_chunks": 4}, "--num_model_chunks: needs --pp_schedule interleaved"),
        ({"num_model_chunks": 1, "pp_schedule": "interleaved"}, "--num_model_chunks 1: must be 2 or more"),
    ],
)
def test_a_pipeline_needs_a_batch_that_divides_into_micro_batches(flags: dict[str, Any], problem: str) -> None:
    listed = found(world_size=2, num_gpus=2, gpus_per_node=2, plugin="hybrid_parallel", pp=2, **flags)
    assert len(listed) == 1
    assert listed[0].startswith(problem)


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        ({"per_device_train_batch_size": 16}, 8),
        ({"per_device_train_batch_size": 6}, 6),
        ({"per_device_train_batch_size": 7}, 7),
        ({"per_device_train_batch_size": 11}, 2),
        ({"per_device_train_batch_size": 7, "pp_schedule": "interleaved"}, 2),
        ({"per_device_train_batch_size": 9, "pp_schedule": "interleaved"}, 6),
        ({"per_device_train_batch_size": 16, "num_microbatches": 2}, 2),
    ],
)
def test_micro_batches_are_as_many_as_divide_the_batch_up_to_four_a_stage(flags: dict[str, Any], number: int) -> None:
    assert pipeline_microbatches(TrainArgs(plugin="hybrid_parallel", pp=2, **flags)) == number


@pytest.mark.parametrize("pp_schedule", ["1f1b", "interleaved"])
def test_every_batch_divides_into_micro_batches_by_itself(pp_schedule: str) -> None:
    for batch, tp, pp in itertools.product(range(1, 20), (1, 2), (2, 3, 4)):
        layout = {"plugin": "hybrid_parallel", "tp": tp, "pp": pp, "pp_schedule": pp_schedule}
        size = tp * pp
        listed = found(world_size=size, num_gpus=size, gpus_per_node=size, per_device_train_batch_size=batch, **layout)
        assert listed == []
