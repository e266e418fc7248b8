"""Out of memory, the printed advice is followed to the letter, and works (benchmarks/advice.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adviser import fitting_flags
from args import TrainArgs, parse_args, problems
from benchmarks import advice
from chooser import resolve_auto
from conftest import ROOT
from opt_sizes import OPT_SHAPES
from planner import model_shape

SMALL = "--model_name_or_path tiny --block_size 32 --per_device_train_batch_size 8 --gradient_checkpointing on"


def flags_that_fit(size: str, gpu_gib: float | None, line: str, **used: Any) -> str | None:
    given = parse_args(line.split())
    return fitting_flags(given, replace(given, **used), model_shape(OPT_SHAPES[size]), 1, gpu_gib, 128)


def test_the_advice_is_read_as_it_is_printed() -> None:
    log = "step 1\nerror: out of GPU memory (x). Try, in this order:\n  --plugin gemini\n  a smaller model\nother\n  --no 1"
    assert advice.advice_of(log) == ("--plugin gemini", "a smaller model")
    assert advice.advice_of("step 1\n  --no 1") == ()


@pytest.mark.parametrize(
    "line",
    [
        "--plugin torch_ddp --mem_cap 16",
        "--plugin gemini --placement auto --mem_cap 12",
        "--plugin hybrid_parallel --mem_cap 24 --gradient_checkpointing 3",
        "--plugin low_level_zero --zero_stage 1 --mem_cap 10",
        "--per_device_train_batch_size 64",
    ],
)
def test_the_first_advice_is_a_command_that_is_accepted_and_predicted_to_fit(line: str) -> None:
    added = flags_that_fit("1.3b", 79.6, line)
    assert added
    args = parse_args([*line.split(), *added.split()])
    assert problems(args, world_size=1, num_gpus=1, gpus_per_node=1) == []
    plan = resolve_auto(args, model_shape(OPT_SHAPES["1.3b"]), 1, 79.6, 128).plan
    assert plan.limit_bytes and plan.total_bytes <= 0.9 * 0.95 * plan.limit_bytes + 1e7


def test_what_ran_out_is_not_advised_and_where_nothing_fits_or_limits_there_is_no_such_line() -> None:
    chosen = resolve_auto(TrainArgs(mem_cap=0.9 * 24), model_shape(OPT_SHAPES["1.3b"]), 1, 79.6, 128)
    ran = {
        "plugin": chosen.plugin,
        "gradient_checkpointing": str(chosen.checkpointed_layers),
        "offload_optim_frac": chosen.offload_optim_frac,
        "step_in_backward": "on",
    }
    assert flags_that_fit("1.3b", 79.6, "--mem_cap 24") and not flags_that_fit("1.3b", 79.6, "--mem_cap 24", **ran)
    assert flags_that_fit("175b", 79.6, "--mem_cap 24") is None
    assert flags_that_fit("125m", None, "--gradient_checkpointing on") is None


@pytest.mark.long
def test_a_run_without_memory_trains_when_its_advice_is_followed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HARM", json.dumps({"8": "oom"}))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = ROOT / "tests" / "faulty_training.py"
    found = advice.follow(f"{SMALL} --plugin torch_ddp", tmp_path, limit_s=120, max_attempts=4, script=script)
    assert [each.status for each in found] == ["oom", "ok"], found
    assert found[1].added == "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    assert "| 2 | ok |" in advice.table({"x": found})


def test_following_ends_where_there_is_nothing_left_to_follow(tmp_path: Path, monkeypatch: Any) -> None:
    ends = iter([("oom", ("--a 1", "--b 2")), ("oom", ("--c 3",)), ("oom", ("a smaller model",))])
    seen: list[list[str]] = []

    def attempt(added: str, arguments: list[str], *_: Any) -> advice.Attempt:
        seen.append(arguments)
        return advice.Attempt(added, *next(ends))

    monkeypatch.setattr(advice, "_attempt", attempt)
    found = advice.follow("--x 0", tmp_path, limit_s=1, max_attempts=9)
    assert [each.added for each in found] == ["", "--a 1", "--c 3"] and found[-1].status == "oom"
    assert "--a 1 --c 3" in " ".join(seen[2]) and "--b" not in seen[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 16 GB")
@pytest.mark.parametrize("flags", advice.CASES)
def test_every_plugin_under_a_cap_trains_when_its_advice_is_followed(flags: str, tmp_path: Path) -> None:
    found = advice.follow(flags, tmp_path, limit_s=240, max_attempts=12)
    assert found[0].status == "oom" and found[-1].status == "ok", found
