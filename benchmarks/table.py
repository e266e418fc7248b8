"""The rows of a sweep, and their tables as CSV, Markdown and JSON."""

from __future__ import annotations

import csv
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell

GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """How a run ended: outcome.json.

    Args:
        status: ok, oom, timeout, error, nan or skipped.
        reason: one sentence, empty for ok.
        seconds: from the launcher's start to its end.
        exit_code: the launcher's; None where it was stopped or never started.
        flags: what the launcher was given.
    """

    status: str
    reason: str
    seconds: float
    exit_code: int | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One run of a cell: its outcome, and its result.json, empty where it left none."""

    outcome: Outcome
    result: Mapping[str, Any]


def read_outcome(folder: Path) -> Outcome | None:
    """Return the outcome of a run, None where it has not ended."""
    found = _read(folder / "outcome.json")
    return Outcome(**{**found, "flags": tuple(found["flags"])}) if found else None


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """Write outcome.json in one step: it is there, or the run is missing."""
    _replace(folder / "outcome.json", json.dumps(asdict(outcome), indent=2) + "\n")


def read_result(folder: Path) -> dict[str, Any]:
    """Return the result.json of a run, empty where there is none."""
    return _read(folder / "result.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return {}


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------- rows


def column(label: str, form: str = "", *, main: bool = False, help: str = "") -> Any:
    """Return a field that is a column.

    Args:
        label: heading for people, with the unit.
        form: format of its numbers.
        main: whether it stands in the Markdown table and is shown at first on the page.
        help: what it means, where the label does not say it.
    """
    return field(default=None, metadata={"label": label, "form": form, "main": main, "help": help})


@dataclass(frozen=True)
class Row:
    """A line of the table; None where the cell did not get that far. Figures are medians over its runs."""

    # fmt: off
    cell: str
    model: str = column("model", main=True)
    plugin: str = column("plugin", main=True)
    precision: str = column("precision", main=True)
    batch_size: int = column("batch", "d", main=True, help="rows of one micro-batch on each GPU")
    num_gpus: int = column("GPUs", "d", main=True, help="processes, one a GPU")
    seq_len: int = column("length", "d", main=True, help="tokens a row")
    mem_cap_gb: float = column("cap GB", "g", main=True, help="memory cap of each GPU, 10^9 bytes; 0: none")
    status: str = column("status", main=True)
    num_runs: int = column("runs", "d", main=True, help="runs that were ok, of which the figures are medians")
    tokens_per_s: float | None = column("tokens/s", ",.0f", main=True, help="all GPUs together, after warm-up")
    tokens_per_s_min: float | None = column("tokens/s min", ",.0f", help="slowest run")
    tokens_per_s_max: float | None = column("tokens/s max", ",.0f", help="fastest run")
    spread_percent: float | None = column("spread %", ".1f", main=True, help="fastest less slowest run, of the median; needs REPEATS")
    tokens_per_s_per_gpu: float | None = column("tokens/s a GPU", ",.0f", main=True)
    relative_speed: float | None = column("speed / first plugin", ".2f", main=True, help="tokens/s over those of the first plugin in the same setting")
    samples_per_s: float | None = column("samples/s", ",.1f", main=True)
    model_tflops_per_gpu: float | None = column("model TFLOP/s a GPU", ",.4g", main=True, help="recompute not counted")
    hardware_tflops_per_gpu: float | None = column("hardware TFLOP/s a GPU", ",.4g", main=True, help="recompute counted")
    mfu_percent: float | None = column("MFU %", ".1f", main=True, help="model TFLOP/s of the GPU's peak")
    mfu_peak: str | None = column("peak of MFU", help="where the peak stands")
    step_ms_median: float | None = column("step ms median", ",.1f", main=True)
    step_ms_p10: float | None = column("step ms p10", ",.1f", main=True)
    step_ms_p90: float | None = column("step ms p90", ",.1f", main=True)
    first_step_s: float | None = column("first step s", ",.1f", help="compiles kernels and fills caches; not measured")
    warmup_steps: int | None = column("warm-up steps", "g", help="first steps, left out")
    measured_steps: int | None = column("measured steps", "g")
    peak_allocated_gib: float | None = column("allocated GiB", ",.2f", main=True, help="peak, largest rank")
    peak_reserved_gib: float | None = column("reserved GiB", ",.2f", help="peak of the allocator, largest rank")
    peak_gpu_gib: float | None = column("peak GPU GiB", ",.2f", main=True, help="allocated, and what lies beside the allocator: CUDA context, kernels, NCCL")
    host_gib: float | None = column("host GiB", ",.2f", main=True, help="peak resident memory, largest rank")
    predicted_gib: float | None = column("predicted GiB", ",.2f", main=True, help="of one device, by the plan, CUDA context included")
    prediction_error_percent: float | None = column("prediction error %", "+.0f", main=True, help="predicted over peak GPU GiB")
    reason: str = column("reason", help="why the cell is not ok")
    first_loss: float | None = column("first loss", ".4f")
    last_loss: float | None = column("last loss", ".4f")
    recomputed_layers: str | None = column("recomputed layers")
    compiled: str | None = column("compiled")
    gpu: str | None = column("GPU")
    gpu_memory_gib: float | None = column("GPU memory GiB", ".1f")
    link: str | None = column("link", help="between the GPUs, or of a single one to the host")
    driver: str | None = column("driver")
    torch: str | None = column("torch")
    transformers: str | None = column("transformers")
    colossalai: str | None = column("ColossalAI")
    python: str | None = column("Python")
    commit: str | None = column("commit")
    seconds: float | None = column("run s", ",.0f", help="wall time of a run, start and compilation included")
    # fmt: on

    @property
    def memory_limit_gib(self) -> float | None:
        """What one GPU may hold: the cap, else its memory; None on a CPU without a cap."""
        return self.mem_cap_gb * 1e9 / GIB if self.mem_cap_gb else self.gpu_memory_gib


COLUMNS: tuple[Field[Any], ...] = fields(Row)[1:]


def make_row(cell: Cell, runs: Sequence[Run], predicted_gib: float | None) -> Row:
    """Return a cell's line.

    Args:
        runs: at least one. The first that is not ok decides the state, and the line then has no speed.
        predicted_gib: the sweep's own prediction, for a cell that left none.
    """
    failed = [run for run in runs if run.outcome.status != "ok"]
    last = (failed or runs)[0]
    result, good = last.result, [] if failed else runs
    args, versions, device = (result.get(name) or {} for name in ("args", "versions", "device"))
    peak, plan = device.get("memory_gib"), result.get("plan") or {}
    row = Row(
        cell=cell.name,
        model=cell.model,
        plugin=cell.plugin,
        precision=args.get("precision") or cell.precision,
        batch_size=cell.batch_size,
        num_gpus=cell.num_gpus,
        seq_len=cell.seq_len,
        mem_cap_gb=cell.mem_cap_gb,
        status=last.outcome.status,
        reason=_reason(runs, failed),
        num_runs=len(good),
        predicted_gib=plan["total_bytes"] / GIB if plan else predicted_gib,
        recomputed_layers=args.get("gradient_checkpointing"),
        compiled=args.get("compile"),
        gpu=device.get("name"),
        gpu_memory_gib=peak,
        link=device.get("link"),
        driver=device.get("driver"),
        torch=versions.get("torch"),
        transformers=versions.get("transformers"),
        colossalai=versions.get("colossalai"),
        python=versions.get("python"),
        commit=result.get("git_commit"),
        seconds=statistics.median(run.outcome.seconds for run in runs),
    )
    return _with_figures(row, good) if good else row


def _reason(runs: Sequence[Run], failed: Sequence[Run]) -> str:
    if not failed:
        return ""
    number = f"run {runs.index(failed[0]) + 1}: " if len(runs) > 1 else ""
    return number + failed[0].outcome.reason


def _with_figures(row: Row, runs: Sequence[Run]) -> Row:
    """Return the row with the medians of its runs."""

    def median(block: str, name: str, scale: float = 1.0) -> float | None:
        values = [(run.result.get(block) or {}).get(name) for run in runs]
        numbers = [value for value in values if value is not None]
        return scale * statistics.median(numbers) if numbers else None

    speeds = [run.result["throughput"]["tokens_per_s"] for run in runs]
    tokens_per_s = statistics.median(speeds)
    losses = [loss for _, loss in runs[0].result.get("train_loss") or []]
    return replace(
        row,
        tokens_per_s=tokens_per_s,
        tokens_per_s_min=min(speeds),
        tokens_per_s_max=max(speeds),
        spread_percent=100 * (max(speeds) - min(speeds)) / tokens_per_s if len(speeds) > 1 else None,
        tokens_per_s_per_gpu=median("throughput", "tokens_per_s_per_device"),
        samples_per_s=median("throughput", "samples_per_s"),
        model_tflops_per_gpu=median("throughput", "model_tflops_per_device"),
        hardware_tflops_per_gpu=median("throughput", "hardware_tflops_per_device"),
        mfu_percent=median("throughput", "mfu", 100),
        mfu_peak=runs[0].result["throughput"].get("peak_source"),
        step_ms_median=median("throughput", "step_ms_median"),
        step_ms_p10=median("throughput", "step_ms_p10"),
        step_ms_p90=median("throughput", "step_ms_p90"),
        first_step_s=median("throughput", "first_step_ms", 1e-3),
        warmup_steps=runs[0].result["throughput"].get("warmup_steps"),
        measured_steps=runs[0].result["throughput"].get("measured_steps"),
        peak_allocated_gib=median("memory", "peak_allocated_gib"),
        peak_reserved_gib=median("memory", "peak_reserved_gib"),
        peak_gpu_gib=median("plan_check", "gpu_measured_gib"),
        host_gib=median("memory", "host_peak_rss_gib"),
        prediction_error_percent=median("plan_check", "gpu_error", 100),
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
    )


def with_relative_speed(rows: Sequence[Row], plugin: str) -> list[Row]:
    """Return the rows with their speed relative to that of `plugin` in the same cell otherwise."""

    def others(row: Row) -> str:
        return row.cell.replace(f"-{row.plugin}-", "-", 1)

    base = {others(row): row.tokens_per_s for row in rows if row.plugin == plugin}
    return [
        replace(row, relative_speed=row.tokens_per_s / speed if row.tokens_per_s and speed else None)
        for row in rows
        for speed in [base.get(others(row))]
    ]


def hardware_line(rows: Sequence[Row]) -> str:
    """Return hardware and versions in one line, from the rows that know them."""
    known = [row for row in rows if row.gpu]
    if not known:
        return "nothing ran"
    most = max(row.num_gpus for row in known)
    devices = " and ".join(dict.fromkeys(str(row.gpu) for row in known))
    parts = [f"up to {most} x {devices}" if most > 1 else devices]
    links = dict.fromkeys(row.link for row in known if row.link and row.num_gpus == most)
    parts += [link for link in links if link]
    for name, label in (("driver", "driver"), ("torch", "torch"), ("colossalai", "ColossalAI")):
        found = dict.fromkeys(getattr(row, name) for row in known if getattr(row, name))
        parts += [f"{label} {' and '.join(found)}"] if found else []
    return ", ".join(parts)


# ---------------------------------------------------------------------------- files


def text(value: Any, form: str = "") -> str:
    """Return a value as the tables for people show it; `-` for None."""
    if value is None or value == "":
        return "-"
    return format(value, form) if isinstance(value, (int, float)) and form else str(value)


def write(rows: Sequence[Row], runs: Mapping[Cell, Sequence[Run]], folder: Path) -> None:
    """Write table.csv, table.json and table.md, each in one step."""
    _replace(folder / "table.md", markdown(rows))
    _replace(folder / "table.json", as_json(rows, runs))
    temporary = folder / f".table.csv.{os.getpid()}"
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([spec.name for spec in fields(Row)])
        writer.writerows(astuple(row) for row in rows)
    os.replace(temporary, folder / "table.csv")


def as_json(rows: Sequence[Row], runs: Mapping[Cell, Sequence[Run]]) -> str:
    """Return the rows, each with the whole result.json of its runs."""
    results = {cell.name: [dict(run.result) for run in found if run.result] for cell, found in runs.items()}
    whole = [{**asdict(row), "results": results.get(row.cell, [])} for row in rows]
    return json.dumps({"measured": time.strftime("%Y-%m-%d"), "rows": whole}, indent=1, allow_nan=False) + "\n"


def read(folder: Path) -> list[Row]:
    """Return the rows of a sweep's folder.

    Raises:
        FileNotFoundError: it holds no table.json.
    """
    known = {spec.name for spec in fields(Row)}
    whole = json.loads((folder / "table.json").read_text(encoding="utf-8"))["rows"]
    return [Row(**{name: value for name, value in row.items() if name in known}) for row in whole]


def split_columns(rows: Sequence[Row]) -> tuple[list[Field[Any]], list[Field[Any]]]:
    """Return the settings that are the same in every row, and the main columns that are left and not empty."""
    shown = [
        spec for spec in COLUMNS if spec.metadata["main"] and any(getattr(row, spec.name) is not None for row in rows)
    ]
    settings = {spec.name for spec in fields(Cell)} - {"plugin"}
    same = [spec for spec in shown if spec.name in settings and len({getattr(row, spec.name) for row in rows}) == 1]
    return same, [spec for spec in shown if spec not in same]


def common_line(rows: Sequence[Row], same: Sequence[Field[Any]]) -> str:
    """Return what is the same in every row, in words."""
    parts = [f"{spec.metadata['label']} {text(getattr(rows[0], spec.name), spec.metadata['form'])}" for spec in same]
    return ", ".join(part for part in parts if part != "cap GB 0") or "no two cells alike"


def peaks_line(rows: Sequence[Row]) -> str:
    """Return where the peaks of MFU stand, in a sentence; empty where none is known."""
    peaks = dict.fromkeys(row.mfu_peak for row in rows if row.mfu_peak)
    return f"MFU stands against: {'; '.join(map(str, peaks))}." if peaks else ""


def markdown(rows: Sequence[Row]) -> str:
    """Return the table for people: what is the same in every row stands above it, what failed has its reason below."""
    same, columns = split_columns(rows)
    lines = [f"{hardware_line(rows)}, {time.strftime('%Y-%m-%d')}; {common_line(rows, same)}.", ""]
    lines += ["| " + " | ".join(spec.metadata["label"] for spec in columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [text(getattr(row, spec.name), spec.metadata["form"]).replace("|", "\\|") for spec in columns]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {row.cell}: {row.status}: {row.reason}" for row in rows if row.reason]
    if peaks := peaks_line(rows):
        lines += ["", peaks]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"
