"""run_benchmark.sh end to end: under a fake torchrun that trains nothing, and under the real one."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks import sweep, table
from conftest import MODULE_PATH, ROOT

# Stands for torchrun: notes its batch size, and fails by it.
FAKE_TORCHRUN = """
import json, os, pathlib, sys, time
flag = lambda name: sys.argv[len(sys.argv) - 1 - sys.argv[::-1].index(name) + 1]
batch, folder = int(flag("--per_device_train_batch_size")), pathlib.Path(flag("--output_dir"))
with open(os.environ["CALLS"], "a") as file:
    file.write(f"{batch}\\n")
def end(code, words):
    print(words)
    pathlib.Path(os.environ["CLM_EXIT_CODE_FILE"]).write_text(str(code))
    sys.exit(0)
harm = json.loads(os.environ["HARM"]).get(str(batch))
if harm == "oom":
    end(3, "error: out of GPU memory (planted). Try, in this order:\\n  --gradient_checkpointing on")
if harm == "nan":
    end(4, "error: the loss of step 3 is nan")
if harm == "refused":
    end(2, "error: --batch: cannot work")
if harm == "crash":
    raise RuntimeError("planted")
if harm == "hang":
    time.sleep(60)
speed = {"tokens_per_s": 100.0 * batch, "tokens_per_s_per_device": 100.0 * batch, "step_ms_median": 10.0}
result = {"throughput": speed, "memory": {"host_peak_rss_gib": 1.0}, "device": {"name": "cpu"}}
folder.joinpath("result.json").write_text(json.dumps(result))
"""


class Bench:
    """A folder with a sweep in it, which is started as a user does."""

    def __init__(self, folder: Path, torchrun: Path | None) -> None:
        self.folder, self.out, self.calls_file = folder, folder / "out", folder / "calls"
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
        self.env = kept | {"CUDA_VISIBLE_DEVICES": "", "SKIP_SETUP": "1", "PYTHON": sys.executable}
        self.env |= {"OUT": "out", "CALLS": str(self.calls_file), "PLUGINS": "torch_ddp", "HARM": "{}"}
        self.env |= {"TORCHRUN": str(torchrun)} if torchrun else {}

    def start(self, *flags: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(ROOT / "run_benchmark.sh"), *flags],
            env=self.env | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Where pytest itself runs in the background of a shell, SIGINT would be ignored from the start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self, *flags: str, **environment: str) -> tuple[int, str, str]:
        with self.start(*flags, **environment) as process:
            output, errors = process.communicate(timeout=240)
        return process.returncode, output, errors

    @property
    def calls(self) -> list[int]:
        """The batch sizes torchrun was called for so far, forgotten once read."""
        found = [int(line) for line in self.calls_file.read_text().split()] if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return found

    @property
    def states(self) -> dict[int, str]:
        lines = csv.DictReader((self.out / "table.csv").read_text().splitlines())
        return {int(line["batch_size"]): line["status"] for line in lines}

    @property
    def rows(self) -> dict[int, table.Row]:
        return {row.batch_size: row for row in table.read(self.out)}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    script = tmp_path / "fake_torchrun.py"
    script.write_text(FAKE_TORCHRUN)
    bench = Bench(tmp_path, program(tmp_path / "torchrun", sys.executable, script))
    # Pictures take seconds: as in an environment that cannot draw them.
    (tmp_path / "lean").mkdir()
    (tmp_path / "lean" / "matplotlib.py").write_text("raise ImportError('No module named matplotlib')")
    bench.env["PYTHONPATH"] = str(tmp_path / "lean")
    return bench


def program(path: Path, *words: object, arguments: str = '"$@"') -> Path:
    path.write_text(f"#!/usr/bin/env bash\nexec {shlex.join(map(str, words))} {arguments}\n")
    path.chmod(0o755)
    return path


def wait_for(event: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not event():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def started(bench: Bench, batch_size: int) -> Callable[[], bool]:
    return lambda: bench.calls_file.exists() and str(batch_size) in bench.calls_file.read_text().split()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # which the container's init may never collect
    except psutil.NoSuchProcess:
        return False


def left_behind(bench: Bench) -> list[int]:
    """Processes that still work for this sweep."""
    mark = f"CALLS={bench.calls_file}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


HARM = {"2": "oom", "3": "hang", "4": "crash", "5": "nan", "6": "refused"}


def test_every_cell_is_a_row_however_it_ends_and_none_ends_the_sweep(bench: Bench) -> None:
    lists = {"BATCH_SIZES": "1 2 3 4 5 6 7", "CELL_TIMEOUT": "2"}
    code, output, errors = bench.run(**lists, HARM=json.dumps(HARM))
    assert code == 0
    assert bench.states == {1: "ok", 2: "oom", 3: "timeout", 4: "error", 5: "nan", 6: "skipped", 7: "ok"}
    assert {batch: row.reason for batch, row in bench.rows.items() if row.status != "ok"} == {
        2: "out of GPU memory (planted). Try, in this order:",
        3: "not done after CELL_TIMEOUT=2 s",
        4: "RuntimeError: planted",
        5: "the loss of step 3 is nan",
        6: "--batch: cannot work",
    }
    assert "[7/7] tiny torch_ddp batch 7 1 GPU: ok, 700 tokens/s" in errors
    assert "| 7 | ok | 1 | 700 |" in output
    assert (bench.out / "report.html").exists()
    assert not left_behind(bench)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on_there(bench: Bench) -> None:
    lists = {"BATCH_SIZES": "1 2 3", "HARM": '{"2": "hang"}'}
    process = bench.start(**lists)
    wait_for(started(bench, 2))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (bench.states, bench.calls) == ({1: "ok"}, [1, 2])
    assert "1 of 3 cells" in (bench.out / "report.html").read_text()
    assert not left_behind(bench)
    assert bench.run(**lists | {"HARM": "{}"})[0] == 0
    assert (bench.states, bench.calls) == ({1: "ok", 2: "ok", 3: "ok"}, [2, 3])


def test_ctrl_c_while_pictures_are_drawn_ends_at_once_and_the_same_command_draws_them(bench: Bench) -> None:
    slow, began = bench.folder / "slow", bench.folder / "began"
    slow.mkdir()
    slow.joinpath("matplotlib.py").write_text(f"import time\nopen({str(began)!r}, 'w')\ntime.sleep(60)\n")
    process = bench.start(BATCH_SIZES="1", PYTHONPATH=str(slow))
    wait_for(began.exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and "Traceback" not in errors, errors
    assert bench.states == {1: "ok"} and not (bench.out / "report.html").exists()
    assert bench.run(BATCH_SIZES="1")[0] == 0 and (bench.out / "report.html").exists()
    assert bench.calls == [1]


def test_a_finished_sweep_does_nothing_more_unless_forced_or_asked_something_else(bench: Bench) -> None:
    lists = {"BATCH_SIZES": "1 2", "HARM": '{"2": "oom"}'}
    bench.run(**lists)
    assert bench.calls == [1, 2]
    for environment, calls in (
        ({}, []),
        ({"FORCE": "oom"}, [2]),
        ({"FORCE": "1"}, [1, 2]),
        ({"STEPS": "7"}, [1, 2]),
        ({"STEPS": "7", "BATCH_SIZES": "1 2 3"}, [3]),
    ):
        bench.run(**lists | environment)
        assert bench.calls == calls, environment
    bench.run("--seed", "1", **lists, STEPS="7")
    assert bench.calls == [1, 2]


def test_repeats_go_round_by_round_and_a_cell_that_failed_is_not_repeated(bench: Bench) -> None:
    bench.run(BATCH_SIZES="1 2 3", REPEATS="3", HARM='{"2": "oom"}')
    assert bench.calls == [1, 2, 3, 1, 3, 1, 3]
    assert {batch: row.num_runs for batch, row in bench.rows.items()} == {1: 3, 2: 0, 3: 3}


def test_what_the_planner_or_the_checks_refuse_is_a_row_and_starts_nothing(bench: Bench) -> None:
    code, _, errors = bench.run(BATCH_SIZES="1", PLUGINS="torch_ddp torch_ddp_fp16", MEM_CAPS="0.001 0")
    reasons = [row.reason for row in table.read(bench.out) if row.status == "skipped"]
    assert (code, bench.calls) == (0, [1])
    assert len(reasons) == 3
    assert "SKIP_ABOVE" in reasons[0]
    assert "fp16 needs a GPU" in reasons[1]
    assert "1 runs to do of 4 cells" in errors


def test_a_dry_run_prints_each_command_and_what_is_refused_and_starts_nothing(bench: Bench) -> None:
    code, output, _ = bench.run("--seed", "7", BATCH_SIZES="1 2", PLUGINS="torch_ddp torch_ddp_fp16", DRY_RUN="1")
    lines = [line for line in output.splitlines() if not line.startswith("#")]
    assert code == 0 and not bench.calls and not bench.out.exists()
    for rows, line in zip((1, 2), lines, strict=True):
        assert shlex.split(line)[:3] == ["bash", str(ROOT / "run_clm_synthetic.sh"), str(rows)]
        assert shlex.split(line)[-2:] == ["--seed", "7"]
    assert output.count("fp16 needs a GPU") == 2


def test_a_sweep_without_an_ok_cell_ends_with_1(bench: Bench) -> None:
    assert bench.run(BATCH_SIZES="4", HARM=json.dumps(HARM))[0] == 1


def test_bad_settings_are_named_before_anything_runs(bench: Bench) -> None:
    code, _, errors = bench.run(BATCH_SIZES="many", PLUGINS="ddp")
    assert (code, bench.calls) == (2, [])
    assert [line.split(":")[1].strip() for line in errors.splitlines() if line.startswith("error")] == [
        *("PLUGINS", "BATCH_SIZES")
    ]
    code, _, errors = bench.run("--no_such_flag", BATCH_SIZES="1")
    assert (code, bench.calls) == (2, [])
    assert "--no_such_flag" in errors


def test_with_matplotlib_the_pictures_stand_in_the_page(bench: Bench) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -r requirements.txt")
    bench.run(BATCH_SIZES="1 2", PYTHONPATH=MODULE_PATH)
    assert (bench.out / "throughput.png").stat().st_size > 10_000
    assert (bench.out / "report.html").read_text().count("data:image/svg+xml;base64,") == 3


def test_without_matplotlib_there_are_tables_and_a_page_and_one_line(bench: Bench) -> None:
    code, _, errors = bench.run(BATCH_SIZES="1")
    assert code == 0
    assert [line for line in errors.splitlines() if "matplotlib" in line] == [
        "no pictures: No module named matplotlib (pip install -r requirements.txt)"
    ]
    assert {"table.csv", "table.md", "table.json", "report.html"} <= {path.name for path in bench.out.iterdir()}


def test_a_folder_measured_on_another_machine_is_refused(bench: Bench) -> None:
    bench.out.mkdir()
    (bench.out / "machine.json").write_text('["NVIDIA Other, driver 1"]')
    code, _, errors = bench.run(BATCH_SIZES="1")
    assert (code, bench.calls) == (2, [])
    assert "NVIDIA Other, driver 1" in errors


def test_a_second_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        sweep.locked(tmp_path),
        pytest.raises(sweep.ConfigError, match="another sweep"),
        sweep.locked(tmp_path),
    ):
        pass


def test_what_does_not_heed_sigterm_is_killed_with_all_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "TERM_GRACE_S", 0.5)
    script = f"trap '' TERM; (trap '' TERM; set -m; sleep 60 & echo $! >{tmp_path}/pid; wait) & wait"
    with open(tmp_path / "log", "w") as log:
        assert sweep.run_for(1.0, ["bash", "-c", script], log) is None
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_the_reason_is_what_the_log_says_first_of_errors(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    for words, reason in (
        ("step 1\nerror: no room. Try:\n  --plugin gemini\nValueError: echo\n", "no room. Try:"),
        ("Traceback:\n  File x\ntorch.AcceleratorError: CUDA error\n\nsome chatter\n", "torch.AcceleratorError: CUDA error"),
        ("half a line", "half a line"),
        ("", ""),
        ("Traceback\n  exitcode  : -9 (pid: 7)\n", "a rank was killed by signal 9, as the kernel does where host memory runs out"),
    ):  # fmt: skip
        log.write_text(words)
        assert sweep.last_words(log) == reason


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 s"), (720, "12 min"), (9000, "2.5 h")])
def test_durations_are_in_the_unit_one_would_say(seconds: float, words: str) -> None:
    assert sweep.duration(seconds) == words


# --- real training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def real_bench(tmp_path: Path) -> Iterator[Bench]:
    """A bench under the real torchrun, whose train_clm.py comes to harm by its batch size."""
    faulty = f'"${{@/#*train_clm.py/{ROOT}/tests/faulty_training.py}}"'
    bench = Bench(
        tmp_path, program(tmp_path / "torchrun", sys.executable, "-m", "torch.distributed.run", arguments=faulty)
    )
    bench.env |= {"PYTHONPATH": MODULE_PATH, "SEQ_LENS": "32", "STEPS": "7", "OMP_NUM_THREADS": "1"}
    yield bench
    assert not left_behind(bench)


def test_real_cells_one_ok_and_one_out_of_memory(real_bench: Bench) -> None:
    code, _, errors = real_bench.run(BATCH_SIZES="1 2", HARM='{"2": "oom"}')
    assert code == 0, errors
    ok, oom = real_bench.rows.values()
    assert (ok.status, oom.status) == ("ok", "oom")
    assert oom.reason.startswith("out of GPU memory (CUDA out of memory. Tried to allocate 20.00 GiB.)")
    result = json.loads((real_bench.out / "cells" / ok.cell / "run-1" / "result.json").read_text())
    assert ok.tokens_per_s == result["throughput"]["tokens_per_s"]  # the training's own figure, unchanged
    assert (ok.warmup_steps, ok.measured_steps, ok.precision, ok.gpu) == (5, 2, "fp32", "cpu")
    assert ok.predicted_gib == pytest.approx(result["plan"]["total_bytes"] / 2**30)
    assert (result["device"]["driver"], result["device"]["link"]) == (None, None)
    assert oom.gpu == "cpu", "an out-of-memory cell leaves a result.json, too"
    assert not (real_bench.out / "cells" / ok.cell / "run-1" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_cells_that_hang_crash_and_diverge_then_ctrl_c_and_the_rest(real_bench: Bench) -> None:
    harm = json.dumps({"2": "oom", "3": "hang", "4": "crash", "5": "nan", "6": "hang"})
    lists = {"BATCH_SIZES": "1 2 3 4 5 6 7", "HARM": harm, "CELL_TIMEOUT": "45"}
    process = real_bench.start(**lists)
    log = real_bench.out / "cells" / "tiny-torch_ddp-auto-batch6-gpus1-len32" / "run-1" / "log.txt"
    wait_for(lambda: log.exists() and "step 1/7" in log.read_text(), limit_s=240)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    expected = {1: "ok", 2: "oom", 3: "timeout", 4: "error", 5: "nan"}
    assert real_bench.states == expected
    assert real_bench.rows[4].reason.endswith("planted")
    assert real_bench.run(**lists | {"HARM": "{}"})[0] == 0
    assert real_bench.states == expected | {6: "ok", 7: "ok"}
