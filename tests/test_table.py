"""Rows from runs, and the three tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import table
from sweep_rows import cell, example_rows, failed_run, ok_run


def test_figures_are_medians_over_the_runs_with_their_spread() -> None:
    row = table.make_row(cell(), [ok_run(100), ok_run(130), ok_run(110)], None)
    assert (row.tokens_per_s, row.tokens_per_s_min, row.tokens_per_s_max) == (110, 100, 130)
    assert row.spread_percent == pytest.approx(100 * 30 / 110)
    assert row.num_runs == 3


def test_one_run_has_no_spread() -> None:
    assert table.make_row(cell(), [ok_run(100)], None).spread_percent is None


def test_a_run_that_failed_decides_the_state_and_takes_the_figures_away() -> None:
    row = table.make_row(cell(), [ok_run(100), failed_run("nan", "loss is nan")], 12.0)
    assert (row.status, row.reason, row.tokens_per_s, row.num_runs) == ("nan", "run 2: loss is nan", None, 0)


def test_units_are_those_of_the_columns() -> None:
    row = table.make_row(cell(mem_cap_gb=20.0), [ok_run(100)], None)
    assert (row.mfu_percent, row.first_step_s, row.predicted_gib) == (25, 3, 11)
    assert (row.peak_allocated_gib, row.peak_reserved_gib, row.peak_gpu_gib) == (9, 10, 10.5)
    assert row.prediction_error_percent == pytest.approx(100 * (11 / 10.5 - 1))
    assert row.memory_limit_gib == pytest.approx(18.63, abs=0.01)
    assert (row.link, row.driver, row.commit, row.mfu_peak) == ("PCIe 5.0 x16", "570.1", "abc", "a sheet")


def test_a_cell_without_a_result_keeps_the_sweeps_own_prediction() -> None:
    assert table.make_row(cell(), [failed_run()], 12.0).predicted_gib == 12.0


def test_speed_is_relative_to_the_first_plugin_in_the_same_setting() -> None:
    relative = {(row.plugin, row.batch_size): row.relative_speed for row in example_rows()}
    assert relative["torch_ddp", 8] == relative["torch_ddp", 32] == 1
    assert relative["gemini", 8] == pytest.approx(1 / 3)
    assert relative["gemini", 32] is None


def test_the_three_tables_hold_every_row_and_the_json_every_result(tmp_path: Path) -> None:
    runs = {cell(): [ok_run(100), ok_run(120)], cell(batch_size=32): [failed_run("oom", "a | b")]}
    rows = [table.make_row(each, found, None) for each, found in runs.items()]
    table.write(rows, runs, tmp_path)
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    whole = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [line["status"] for line in lines] == [row["status"] for row in whole] == ["ok", "oom"]
    assert lines[0]["tokens_per_s"] == "110.0"
    assert [result["throughput"]["tokens_per_s"] for result in whole[0]["results"]] == [100, 120]
    assert table.read(tmp_path) == rows


def test_markdown_names_what_is_common_once_and_the_reasons_below() -> None:
    head, _, *lines = table.markdown(example_rows()).splitlines()
    assert head.startswith("NVIDIA Fake 80GB, PCIe 5.0 x16, driver 570.1, torch 2.13.0, ColossalAI 0.5.0, 20")
    assert head.endswith("; model tiny, GPUs 1, length 64.")
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert "| 24,000 |" in lines[2]
    assert lines[-2].endswith(": oom: no <room>")
    assert "MFU stands against: a sheet." in lines


def test_headings_have_the_units() -> None:
    head = table.markdown(example_rows()).splitlines()[2]
    units = [
        *("tokens/s", "tokens/s a GPU", "speed / first plugin", "samples/s"),
        *("model TFLOP/s a GPU", "hardware TFLOP/s a GPU", "MFU %"),
        *("step ms median", "step ms p10", "step ms p90", "allocated GiB", "peak GPU GiB", "host GiB"),
        *("predicted GiB", "prediction error %"),
    ]
    assert [word for word in head.strip("| ").split(" | ") if word in units] == units


def test_an_outcome_is_read_back_and_half_a_file_is_none(tmp_path: Path) -> None:
    outcome = table.Outcome("oom", "no room", 1.5, 3, ("8", "0"))
    table.write_outcome(outcome, tmp_path)
    assert table.read_outcome(tmp_path) == outcome
    (tmp_path / "outcome.json").write_text('{"status": "o')
    assert table.read_outcome(tmp_path) is None
