"""Measure every combination of the environment's lists: a process a cell, a row a cell, however it ends.

Called by run_benchmark.sh, whose `-h` explains the lists. A cell is a run of run_clm_synthetic.sh; its result.json is
the only source of its figures, its exit code and the clock of its state.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from tqdm import tqdm

import hardware
from args import ConfigError
from benchmarks import table
from benchmarks.cells import Cell, Forecast, Settings, forecast, pretty_name
from benchmarks.table import Outcome, Run

ROOT = Path(__file__).resolve().parent.parent
EXIT_STATES = {0: "ok", 2: "skipped", 3: "oom", 4: "nan"}
BAR_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt} runs, {elapsed} so far, {remaining} left"
TERM_GRACE_S = 10  # a rank that can still end in order does so after its step
KILL_WAIT_S = 60  # much memory is given back slowly, and the next run wants it


def main(flags: Sequence[str]) -> int:
    """Measure what is missing, write tables, pictures and page, and return the exit code."""
    gpus = hardware.visible_gpus()
    try:
        settings = Settings.from_environment(os.environ, gpus, flags)
        if os.environ.get("DRY_RUN") == "1":
            Sweep(settings, gpus).show()
            return 0
        settings.folder.mkdir(parents=True, exist_ok=True)
        with locked(settings.folder):
            check_machine(settings.folder, gpus)
            return Sweep(settings, gpus).run()
    except ConfigError as error:
        print(error.lines, file=sys.stderr)
        return 2


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this sweep.

    Raises:
        ConfigError: another sweep has it.
    """
    with open(folder / ".lock", "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"OUT={folder}: another sweep is writing there") from None
        yield


def check_machine(folder: Path, gpus: Sequence[hardware.Gpu]) -> None:
    """Remember on what a folder was measured, so that one table never mixes two machines or drivers.

    Raises:
        ConfigError: its cells are of another GPU or driver.
    """
    path = folder / "machine.json"
    here = sorted({f"{gpu.name}, driver {gpu.driver}" for gpu in gpus}) or ["cpu"]
    there = json.loads(path.read_text()) if path.exists() else here
    if there != here:
        raise ConfigError(f"OUT={folder}: was measured on {'; '.join(there)}, this is {'; '.join(here)}: name another")
    path.write_text(json.dumps(here) + "\n")


class Sweep:
    """A sweep on its way through the cells."""

    def __init__(self, settings: Settings, gpus: Sequence[hardware.Gpu]) -> None:
        self.settings = settings
        self.forecasts = {cell: forecast(cell, settings, gpus) for cell in settings.cells}
        self.pending = [
            (cell, number)
            for number in range(1, settings.repeats + 1)  # so that after the first round every cell has a value
            for cell in settings.cells
            if self.forecasts[cell].refusal is None and self.must_run(cell, number)
        ]

    def show(self) -> None:
        """Print a line for each pending run, as a shell reads it, and for each cell that is not tried."""
        for cell, number in self.pending:
            print(shlex.join(launcher(cell, number, self.settings)))
        for cell, known in self.forecasts.items():
            if known.refusal:
                print(f"# {cell.name}: {known.refusal}")

    def run(self) -> int:
        """Do the pending runs and return the exit code: 1 where no cell is ok, 130 after Ctrl-C."""
        _on_interrupt(_interrupt)
        code = 0
        try:
            self.measure_all()
        except KeyboardInterrupt as interrupt:
            code = 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
            print("interrupted; the same command goes on from here", file=sys.stderr)
        _on_interrupt(signal.SIG_DFL)  # what is written from here on the same command writes anew
        rows = self.rows()
        table.write(rows, self.runs(), self.settings.folder)
        print((self.settings.folder / "table.md").read_text(), end="")
        write_pictures(rows, self.settings.folder, num_cells=len(self.settings.cells))
        return code or int(not any(row.status == "ok" for row in rows))

    def measure_all(self) -> None:
        """Measure the pending runs; a repeat of a cell that failed is left out."""
        progress = Progress(len(self.pending), self.settings)
        with progress.bar:
            for cell, number in self.pending:
                if number > 1 and any(run.outcome.status != "ok" for run in self.runs_of(cell)[: number - 1]):
                    progress.leave_out()
                    continue
                progress.start(cell, number)
                outcome = measure(cell, number, self.settings)
                progress.end(outcome, self.speed(cell, number))
                table.write(self.rows(), self.runs(), self.settings.folder)

    def must_run(self, cell: Cell, number: int) -> bool:
        """Return whether a run is missing, was made with other settings, or is to be made again."""
        outcome = table.read_outcome(run_folder(self.settings, cell, number))
        if outcome is None or outcome.flags != wanted_flags(cell, self.settings):
            return True
        return outcome.status in self.settings.force

    def speed(self, cell: Cell, number: int) -> float | None:
        """Return the tokens/s of one run."""
        result = table.read_result(run_folder(self.settings, cell, number))
        return (result.get("throughput") or {}).get("tokens_per_s")

    def runs_of(self, cell: Cell) -> list[Run]:
        """Return the runs a cell has so far, made with the settings of this sweep."""
        folders = [run_folder(self.settings, cell, number) for number in range(1, self.settings.repeats + 1)]
        found = [
            Run(outcome, table.read_result(folder)) for folder in folders if (outcome := table.read_outcome(folder))
        ]
        return [run for run in found if run.outcome.flags == wanted_flags(cell, self.settings)]

    def runs(self) -> dict[Cell, list[Run]]:
        """Return the runs of each cell that has some, in the order of the lists."""
        found = {}
        for cell, known in self.forecasts.items():
            runs = [skipped(known)] if known.refusal else self.runs_of(cell)
            if runs:
                found[cell] = runs
        return found

    def rows(self) -> list[table.Row]:
        """Return a row for each cell that has ended."""
        rows = [table.make_row(cell, runs, self.forecasts[cell].predicted_gib) for cell, runs in self.runs().items()]
        return table.with_relative_speed(rows, self.settings.cells[0].plugin)


def _on_interrupt(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def skipped(known: Forecast) -> Run:
    """Return the run of a cell that is not tried."""
    return Run(Outcome("skipped", known.refusal or "", 0.0, None, ()), {})


def run_folder(settings: Settings, cell: Cell, number: int) -> Path:
    """Return where a run leaves its files."""
    return settings.folder / "cells" / cell.name / f"run-{number}"


def wanted_flags(cell: Cell, settings: Settings) -> tuple[str, ...]:
    """Return what is given to the launcher, which tells whether an old run answers the present question."""
    return (*cell.flags(settings.steps), *settings.flags)


# ---------------------------------------------------------------------------- one run


def launcher(cell: Cell, number: int, settings: Settings) -> list[str]:
    """Return the command of a run."""
    folder = str(run_folder(settings, cell, number))
    own = (*cell.flags(settings.steps), "--overwrite_output_dir", "--output_dir", folder)
    return ["bash", str(ROOT / "run_clm_synthetic.sh"), *own, *settings.flags]


def measure(cell: Cell, number: int, settings: Settings) -> Outcome:
    """Run one cell once, and leave its outcome beside its log and result."""
    folder, flags = run_folder(settings, cell, number), wanted_flags(cell, settings)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("outcome.json", "result.json"):
        (folder / name).unlink(missing_ok=True)
    started = time.monotonic()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        code = run_for(settings.timeout_s, launcher(cell, number, settings), log)
    status, reason = judge(code, folder, settings.timeout_s)
    outcome = Outcome(status, reason, time.monotonic() - started, code, flags)
    table.write_outcome(outcome, folder)
    return outcome


def judge(code: int | None, folder: Path, timeout_s: float) -> tuple[str, str]:
    """Return state and reason of a run from its exit code (None: stopped by the clock), and the words of its log."""
    if code is None:
        return "timeout", f"not done after CELL_TIMEOUT={timeout_s:g} s"
    if code == 0 and not table.read_result(folder).get("throughput"):
        return "error", "ended with 0 and left no throughput in result.json"
    state = EXIT_STATES.get(code, "error")
    return state, "" if state == "ok" else last_words(folder / "log.txt") or f"exit code {code}"


def last_words(log: Path) -> str:
    """Return the first line that says `error:`, else the last one that names an exception, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any(re.search(r"exitcode\s*: -9\b", line) for line in lines):
        return "a rank was killed by signal 9, as the kernel does where host memory runs out"
    said = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (said[:1] or raised[:1] or lines[-1:] or [""])[0][:300]


def run_for(seconds: float, command: list[str], log: Any) -> int | None:
    """Return the exit code of `command`, or None where it took too long; nothing it started is left then.

    It stands in a session of its own: Ctrl-C reaches the sweep alone, which ends it.
    """
    process = psutil.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(timeout=seconds)
    except psutil.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: psutil.Process, *, grace_s: float = TERM_GRACE_S) -> None:
    """End a launcher and all below it: SIGTERM to the launcher, who passes it on, SIGKILL to what is left after `grace_s`."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        process.terminate()
    try:
        _, family = psutil.wait_procs(family, timeout=grace_s)
    finally:  # a second Ctrl-C does not wait
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=KILL_WAIT_S)


# ---------------------------------------------------------------------------- what people see


class Progress:
    """A bar on a terminal, and a line a run: in a log file the lines alone."""

    def __init__(self, total: int, settings: Settings) -> None:
        self.total, self.settings, self.done = total, settings, 0
        self.seconds: list[float] = []
        self.name = ""
        print(
            f"{total} runs to do of {len(settings.cells)} cells x {settings.repeats}; results in {settings.folder}",
            file=sys.stderr,
            flush=True,
        )
        self.bar = tqdm(
            total=total, disable=not sys.stderr.isatty(), dynamic_ncols=True, smoothing=0, bar_format=BAR_FORMAT
        )

    def start(self, cell: Cell, number: int) -> None:
        """Show the run that starts."""
        repeat = f" (run {number} of {self.settings.repeats})" if self.settings.repeats > 1 else ""
        self.name = pretty_name(cell) + repeat
        self.bar.set_description(self.name)
        if self.bar.disable:
            print(f"[{self.done + 1}/{self.total}] {self.name}: ", end="", file=sys.stderr, flush=True)

    def end(self, outcome: Outcome, tokens_per_s: float | None) -> None:
        """Show how it ended, and the time left at the pace so far."""
        self.seconds.append(outcome.seconds)
        self.done += 1
        what = outcome.status if outcome.status != "ok" else f"ok, {tokens_per_s or 0:,.0f} tokens/s"
        reason = f" ({outcome.reason})" if outcome.reason else ""
        line = f"{what}{reason}, {outcome.seconds:.0f} s"
        if self.bar.disable:
            left_s = statistics.mean(self.seconds) * (self.total - self.done)
            print(f"{line}; {duration(left_s)} left", file=sys.stderr, flush=True)
        else:
            self.bar.write(f"{self.name}: {line}", file=sys.stderr)
        self.bar.update()

    def leave_out(self) -> None:
        """Count a run that is not done."""
        self.done += 1
        self.bar.update()


def duration(seconds: float) -> str:
    """Return `40 s`, `12 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def write_pictures(rows: Sequence[table.Row], folder: Path, *, num_cells: int) -> None:
    """Draw the pictures, where matplotlib is there, and write the page; say in one line where all lies."""
    from benchmarks import page

    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"no pictures: {error} (pip install -r requirements.txt)", file=sys.stderr)
        pictures = []
    else:
        pictures = plots.draw_all(rows, folder)
    page.write(rows, pictures, folder, num_cells=num_cells)
    print(f"\ntables, pictures and report.html: {folder}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
