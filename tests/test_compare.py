"""`python report.py A B`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare, table
from conftest import ROOT
from sweep_rows import GPU, cell, failed_run, ok_run


def row(*speeds: float, **device: str) -> table.Row:
    return table.make_row(cell(), [ok_run(speed, device=GPU | device) for speed in speeds], None)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ((100, 104), (105, 110), ("faster", "runs")),
        ((100, 104), (90, 99), ("slower", "runs")),
        ((100, 104), (103, 110), ("no", "runs")),
        ((100,), (115,), ("no", "steps")),  # 90 to 120 ms a step: 83 to 111 tokens/s, and 96 to 128
        ((100,), (140,), ("faster", "steps")),
        ((100, 101), (140,), ("faster", "runs, steps")),
    ],
)
def test_a_change_counts_where_the_ranges_do_not_meet(
    a: tuple[float, ...], b: tuple[float, ...], verdict: tuple[str, str]
) -> None:
    assert compare.judge(row(*a), row(*b)) == verdict


def test_a_line_has_both_speeds_their_ratio_and_that_of_the_memory() -> None:
    words = compare.compare("x", row(1000), row(1500))
    assert words == ["x", "ok", "ok", "1,000", "1,500", "1.500", "faster", "steps", "10.50", "10.50", "1.000"]


def test_a_cell_that_failed_or_that_one_sweep_lacks_has_no_ratio() -> None:
    oom = table.make_row(cell(), [failed_run()], None)
    assert compare.compare("x", row(1000), oom)[1:7] == ["ok", "oom", "1,000", "-", "-", "-"]
    assert compare.compare("x", None, row(1000))[1:7] == ["not there", "ok", "-", "1,000", "-", "-"]


def test_what_changed_around_the_sweeps_is_named() -> None:
    after = replace(row(100), driver="580.2")
    assert compare.differences([row(100)], [after]) == ["driver: A 570.1, B 580.2"]
    assert "The same hardware" in compare.comparison([row(100)], [row(100)])


def test_the_command_compares_two_folders(tmp_path: Path) -> None:
    for name, speed in (("a", 100.0), ("b", 150.0)):
        (tmp_path / name).mkdir()
        runs = {cell(): [ok_run(speed)]}
        table.write([table.make_row(cell(), runs[cell()], None)], runs, tmp_path / name)
    command = [sys.executable, str(ROOT / "report.py"), "a", "b"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| 100 | 150 | 1.500 | faster | steps |" in done.stdout


def test_a_folder_without_a_sweep_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert "holds no table.json" in capsys.readouterr().err
