"""benchmarks/plan_accuracy.py: which cells run beside each other, and what becomes of the bytes beside the allocator."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan_accuracy
from benchmarks.packing import Need, Room
from conftest import ROOT
from hardware import Gpu

SMALL, MIDDLE, LARGE = "125m torch_ddp 1 64", "1.3b low_level_zero 4 512", "2.7b low_level_zero 4 1024"
TWO = tuple(Gpu(number, f"GPU-{number}", "H100", 80.0, None, 9.0, None) for number in range(2))


def test_a_run_is_placed_where_most_is_left_and_waits_where_card_or_host_would_overflow() -> None:
    room = Room((80.0, 80.0), host_gib=64.0)
    assert room.place(Need(500.0, 500.0), []) == 0
    assert room.place(Need(30.0, 4.0), [(0, Need(30.0, 4.0))]) == 1
    assert room.place(Need(30.0, 4.0), [(0, Need(30.0, 4.0)), (1, Need(20.0, 4.0))]) == 1
    # 2 x (1.15 x 33.5 + 2) is above 80, though 2 x 33.5 is not.
    assert room.place(Need(33.5, 4.0), [(0, Need(33.5, 4.0)), (1, Need(33.5, 4.0))]) is None
    assert room.place(Need(1.0, 30.0), [(0, Need(1.0, 25.0))]) is None
    assert Room((), host_gib=64.0).place(Need(0.0, 4.0), [(0, Need(0.0, 4.0))]) == 0


def pretend(arguments: list[str], folder: Path, uuid: str | None) -> None:
    """Stand for a training: write down when it ran and where, for half a second."""
    folder.mkdir()
    started = time.monotonic()
    time.sleep(0.5)
    (folder / "result.json").write_text(json.dumps({"status": "ok", "uuid": uuid, "span": [started, time.monotonic()]}))


@pytest.fixture
def spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run lines as pretended cells and return what each left."""
    monkeypatch.setattr(plan_accuracy, "_train", pretend)
    monkeypatch.setattr(plan_accuracy.hardware, "host_memory_gib", lambda: 256.0)

    def run(lines: list[str], gpus: tuple[Gpu, ...], jobs: int, seconds: float = 60) -> dict[str, Any]:
        cells = plan_accuracy.Cells(gpus, jobs, seconds, 30, tmp_path)
        return {result["line"]: result for result in cells.run(lines)}

    return run


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    (start, end), (other_start, other_end) = one["span"], other["span"]
    return start < other_end and other_start < end


def test_the_smallest_cell_runs_alone_and_the_others_share_the_cards(spans: Any) -> None:
    found = spans([LARGE, MIDDLE, SMALL], TWO, 8)
    assert not overlap(found[SMALL], found[LARGE]) and not overlap(found[SMALL], found[MIDDLE])
    assert overlap(found[LARGE], found[MIDDLE])
    assert {found[LARGE]["uuid"], found[MIDDLE]["uuid"]} == {"GPU-0", "GPU-1"}


def test_cells_that_do_not_fit_together_wait_for_each_other(spans: Any) -> None:
    found = spans([LARGE, MIDDLE, SMALL], TWO[:1], 8)
    assert not overlap(found[LARGE], found[MIDDLE])


def test_one_job_keeps_the_order_and_time_that_is_up_is_said(spans: Any) -> None:
    found = spans([MIDDLE, SMALL], TWO, 1)
    assert found[MIDDLE]["span"][1] < found[SMALL]["span"][0]
    assert spans([LARGE], TWO, 1, seconds=-1)[LARGE]["status"] == "no time left"


def test_a_cell_over_its_time_or_without_a_result_is_said_to_be(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan_accuracy, "_train", lambda *_: time.sleep(60))
    assert next(plan_accuracy.Cells((), 1, 60, 0.2, tmp_path).run([SMALL]))["status"] == "timeout"
    monkeypatch.setattr(plan_accuracy, "_train", lambda *_: os._exit(3))
    assert next(plan_accuracy.Cells((), 1, 60, 30, tmp_path).run([SMALL]))["status"] == "exit 3"


def test_neighbours_memory_is_not_taken_for_a_cells_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def results(_: Any, lines: list[str]) -> Any:
        for line, outside_gib in zip(lines, (1.25, 40.0), strict=True):
            yield {"line": line, "status": "ok", "memory": {"outside_gib": outside_gib}}

    monkeypatch.setattr(plan_accuracy.Cells, "run", results)
    monkeypatch.setattr(plan_accuracy, "_share_cores", lambda _: None)
    monkeypatch.setattr(plan_accuracy, "import_what_can_be_forked", lambda: None)
    monkeypatch.setattr(plan_accuracy, "row", lambda result: {"cell": result["line"], "status": "not looked at"})
    for jobs, second in ((2, 1.25), (1, 40.0)):
        options = argparse.Namespace(jobs=jobs, seconds=9.0, limit_seconds=9.0)
        found = list(plan_accuracy.measure([SMALL, LARGE], options))
        assert [each["memory"]["outside_gib"] for each in found] == [1.25, second]


# ---------------------------------------------------------------------------- the host, on this machine


def host_errors(folder: Path, only: str) -> dict[str, float]:
    """Measure cells of the CPU grid in a process of its own, and return how far off the planner is."""
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--only", only, "--output", str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=1800)
    rows = [plan_accuracy.row(result) for result in json.loads((folder / "plan_accuracy.json").read_text())]
    assert rows and all(each["status"] == "ok" for each in rows), rows
    return {each["cell"]: each["host_error"] for each in rows}


@pytest.mark.long
def test_the_hosts_memory_for_a_tiny_model_is_predicted_within_a_tenth(tmp_path: Path) -> None:
    errors = host_errors(tmp_path, "^tiny (torch_ddp|low_level_zero)")
    assert len(errors) == 3 and all(-0.05 <= error <= 0.10 for error in errors.values()), errors


@pytest.mark.slow
def test_the_hosts_memory_is_predicted_within_a_tenth_for_nine_of_ten_and_never_much_too_low(tmp_path: Path) -> None:
    errors = host_errors(tmp_path, ".")
    assert len(errors) == len(plan_accuracy.CPU_GRID.split("\n")) - 2
    assert min(errors.values()) >= -0.05, errors
    assert sum(abs(error) <= 0.10 for error in errors.values()) >= 0.9 * len(errors), errors
