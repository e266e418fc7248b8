"""Which cells a sweep has, and which it does not try."""

from __future__ import annotations

from typing import Any

import pytest

import hardware
from args import ConfigError
from benchmarks.cells import Settings, forecast

H100 = hardware.Gpu(0, "GPU-0", "NVIDIA H100 80GB HBM3", 79.6, "570.1", 9.0, "PCIe 5.0 x16")


def settings(num_gpus: int = 0, *flags: str, **environment: str) -> Settings:
    return Settings.from_environment(environment, [H100] * num_gpus, flags)


def refusal(num_gpus: int = 0, *flags: str, **environment: str) -> str | None:
    asked = settings(num_gpus, *flags, **environment)
    (cell,) = asked.cells
    return forecast(cell, asked, [H100] * num_gpus).refusal


ONE = {"PLUGINS": "torch_ddp", "BATCH_SIZES": "8", "GPUS": "1"}


@pytest.mark.parametrize(("there", "counts"), [(1, {1}), (2, {1, 2}), (4, {1, 4}), (8, {1, 4})])
def test_the_default_is_the_originals_sweep_cut_to_the_gpus_that_are_there(there: int, counts: set[int]) -> None:
    cells = settings(there).cells
    assert {cell.num_gpus for cell in cells} == counts
    assert {cell.model for cell in cells} == {"125m"}
    assert {cell.batch_size for cell in cells} == {8, 32, 128}
    assert len({cell.plugin for cell in cells}) == 5
    assert len(cells) == 15 * len(counts)


def test_without_a_gpu_the_default_is_a_rehearsal_of_tiny() -> None:
    cells = settings().cells
    assert {(cell.model, cell.num_gpus) for cell in cells} == {("tiny", 1)}
    assert len(cells) == 6


def test_every_list_multiplies_and_a_word_given_twice_is_one_cell() -> None:
    lists = {"PLUGINS": "gemini torch_ddp", "BATCH_SIZES": "1 2 2", "SEQ_LENS": "32 64", "MEM_CAPS": "0 1.5"}
    assert len(settings(0, **lists, PRECISIONS="bf16 auto").cells) == 2 * 2 * 2 * 2 * 2


def test_each_cell_has_a_name_of_its_own() -> None:
    lists = {"MODELS": "tiny 125m", "BATCH_SIZES": "1 11", "GPUS": "1 2", "SEQ_LENS": "1 11", "MEM_CAPS": "0 1"}
    cells = settings(0, **lists, PRECISIONS="bf16 fp16").cells
    assert len({cell.name for cell in cells}) == len(cells)


def test_all_bad_words_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        settings(0, BATCH_SIZES="eight", PLUGINS="ddp gemini", GPUS="0", MEM_CAPS="much", FORCE="bad")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        *("PLUGINS", "BATCH_SIZES", "GPUS", "MEM_CAPS", "FORCE")
    ]


def test_force_means_all_states_or_those_named() -> None:
    assert settings(0).force == set()
    assert settings(0, FORCE="timeout error").force == {"timeout", "error"}
    assert settings(0, FORCE="1").force >= {"ok", "oom", "nan"}


@pytest.mark.parametrize(
    ("num_gpus", "environment", "words"),
    [
        (0, {"PRECISIONS": "fp16"}, "fp16 needs a GPU"),
        (1, {"GPUS": "4"}, "4 GPUs asked for, 1 here"),
        (1, {"PLUGINS": "gemini", "PRECISIONS": "fp32"}, "gemini trains in bf16 or fp16"),
        (1, {"MODELS": "13b"}, "predicted to need"),
        (1, {"MEM_CAPS": "1"}, "x the 0.93 GiB (SKIP_ABOVE)"),
        (0, {"MODELS": "175b"}, "of host memory"),
    ],
)
def test_a_cell_that_cannot_run_is_refused_with_the_reason(
    num_gpus: int, environment: dict[str, str], words: str
) -> None:
    assert words in (refusal(num_gpus, **ONE | environment) or "")


def test_what_the_users_flags_make_impossible_is_refused_too() -> None:
    assert "--tp 3" in (refusal(1, "--tp", "3", **ONE | {"PLUGINS": "hybrid_parallel"}) or "")


def test_a_cell_near_the_memory_there_is_is_tried() -> None:
    assert refusal(1, MODELS="125m", **ONE) is None
    assert refusal(1, MODELS="1.3b", **ONE | {"BATCH_SIZES": "32"}) is None


def test_skip_above_0_tries_what_the_planner_refuses() -> None:
    assert refusal(1, **ONE, MEM_CAPS="1", SKIP_ABOVE="0") is None


def test_a_model_outside_the_opt_table_has_no_prediction(tmp_path: Any) -> None:
    asked = settings(1, MODELS=str(tmp_path), **ONE)
    known = forecast(asked.cells[0], asked, [H100])
    assert (known.refusal, known.predicted_gib) == (None, None)
