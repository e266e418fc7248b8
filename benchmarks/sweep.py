"""Run every combination of the environment's lists through run_clm_synthetic.sh; print and write one table.

Called by run_benchmark.sh, whose `-h` explains the lists. A cell is a process of its own, so that none can end the
sweep, and its result.json is the only source of its row.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXIT_STATUS = {2: "refused", 3: "oom", 4: "nan"}


@dataclass(frozen=True)
class Cell:
    """One combination of settings."""

    model: str
    plugin: str
    batch_size: int
    num_gpus: int
    seq_len: int
    mem_cap_gb: float

    @property
    def name(self) -> str:
        """The folder's name."""
        return "-".join(str(value).replace("/", "_") for value in astuple(self))


@dataclass(frozen=True)
class Row:
    """A line of the table; None where the cell did not get that far."""

    cell: Cell
    status: str
    tokens_per_s: float | None
    tokens_per_s_per_device: float | None
    step_ms_median: float | None
    model_tflops_per_device: float | None
    mfu_percent: float | None
    peak_allocated_gib: float | None
    peak_reserved_gib: float | None
    first_loss: float | None
    last_loss: float | None
    first_step_s: float | None


def main(flags: Sequence[str]) -> None:
    """Measure the missing cells and write the table after each."""
    folder = Path(os.environ.get("OUT", "outputs/benchmark"))
    folder.mkdir(parents=True, exist_ok=True)
    cells = list(planned_cells())
    rows: list[Row] = []
    for number, cell in enumerate(cells, start=1):
        print(f"[{number}/{len(cells)}] {cell.name}", file=sys.stderr, flush=True)
        status = measure(cell, folder / cell.name, flags)
        rows.append(make_row(cell, folder / cell.name, status))
        write_tables(rows, folder)
    print((folder / "table.md").read_text(), end="")


def planned_cells() -> Iterator[Cell]:
    """Yield the combinations of the environment's lists, without the GPU counts that are not there."""
    names = ("MODELS", "PLUGINS", "BATCH_SIZES", "GPUS", "SEQ_LENS", "MEM_CAPS")
    lists = [os.environ.get(name, "0").split() for name in names]
    available = num_gpus_here()
    for model, plugin, batch_size, num_gpus, seq_len, mem_cap_gb in itertools.product(*lists):
        if available == 0 or int(num_gpus) <= available:
            yield Cell(model, plugin, int(batch_size), int(num_gpus), int(seq_len), float(mem_cap_gb))


def num_gpus_here() -> int:
    """Return the GPUs that torch would see, 0 where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device and device != "-1"])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return 0
    return listing.count("GPU ")


def measure(cell: Cell, folder: Path, flags: Sequence[str]) -> str:
    """Run one cell and return how it ended; a cell that already has a result is not run again."""
    if (folder / "result.json").exists() and os.environ.get("FORCE") != "1":
        return str(json.loads((folder / "result.json").read_text())["status"])
    folder.mkdir(parents=True, exist_ok=True)
    command = ["bash", str(ROOT / "run_clm_synthetic.sh")]
    command += [str(cell.batch_size), f"{cell.mem_cap_gb:g}", cell.model, str(cell.num_gpus), "--plugin", cell.plugin]
    command += ["--block_size", str(cell.seq_len), "--max_train_steps", os.environ.get("STEPS", "30")]
    command += ["--eval_strategy", "no", "--no-save_final", "--overwrite_output_dir", "--output_dir", str(folder)]
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        code = run_for(float(os.environ.get("CELL_TIMEOUT", "600")), [*command, *flags], log)
    return "timeout" if code is None else "ok" if code == 0 else EXIT_STATUS.get(code, "error")


def run_for(seconds: float, command: list[str], log: Any) -> int | None:
    """Return the exit code of `command`, or None after its process group was ended for taking too long."""
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            return process.wait(timeout=seconds)
        except BaseException as error:
            process.send_signal(signal.SIGTERM)  # the launcher passes it on to its ranks
            try:
                process.wait(timeout=45)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    return None


def make_row(cell: Cell, folder: Path, status: str) -> Row:
    """Return the cell's line, from its result.json where it left one."""
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    speed, memory = result.get("throughput") or {}, result.get("memory") or {}
    losses = [loss for _, loss in result.get("train_loss", [])]
    mfu, first_step_ms = speed.get("mfu"), speed.get("first_step_ms")
    return Row(
        cell=cell,
        status=status,
        tokens_per_s=speed.get("tokens_per_s"),
        tokens_per_s_per_device=speed.get("tokens_per_s_per_device"),
        step_ms_median=speed.get("step_ms_median"),
        model_tflops_per_device=speed.get("model_tflops_per_device"),
        mfu_percent=None if mfu is None else 100 * mfu,
        peak_allocated_gib=memory.get("peak_allocated_gib"),
        peak_reserved_gib=memory.get("peak_reserved_gib"),
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        first_step_s=None if first_step_ms is None else first_step_ms / 1e3,
    )


def write_tables(rows: Sequence[Row], folder: Path) -> None:
    """Write table.md and table.csv."""
    names = [spec.name for spec in (*fields(Cell), *fields(Row)[1:])]
    lines_of_values = [(*astuple(row.cell), *astuple(row)[1:]) for row in rows]
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(lines_of_values)
    lines = [f"Measured {time.strftime('%Y-%m-%d')}.", "", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(map(_text, values)) + " |" for values in lines_of_values]
    (folder / "table.md").write_text("\n".join(lines) + "\n")


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    main(sys.argv[1:])
