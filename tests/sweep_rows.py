"""Rows of a sweep that was never made, with round figures; shared by the tests of tables, pictures and page."""

from __future__ import annotations

from typing import Any

from benchmarks import table
from benchmarks.cells import Cell
from benchmarks.table import Outcome, Row, Run

GPU = {"name": "NVIDIA Fake 80GB", "count": 1, "memory_gib": 79.0, "driver": "570.1", "link": "PCIe 5.0 x16"}
CPU = {"name": "cpu", "count": 1, "memory_gib": None, "driver": None, "link": None}


def cell(plugin: str = "torch_ddp", batch_size: int = 8, num_gpus: int = 1, **changes: Any) -> Cell:
    """Return a cell of tiny."""
    settings = {"model": "tiny", "seq_len": 64, "precision": "auto", "mem_cap_gb": 0.0} | changes
    return Cell(plugin=plugin, batch_size=batch_size, num_gpus=num_gpus, **settings)


def ok_run(tokens_per_s: float, *, gib: float | None = 10.0, device: dict[str, Any] | None = None) -> Run:
    """Return a run whose step takes 100 ms, 90 to 120."""
    speed = {
        **{"tokens_per_s": tokens_per_s, "tokens_per_s_per_device": tokens_per_s, "samples_per_s": tokens_per_s / 64},
        **{"model_tflops_per_device": 1.5, "hardware_tflops_per_device": 2.0, "mfu": 0.25, "peak_source": "a sheet"},
        **{"step_ms_median": 100.0, "step_ms_p10": 90.0, "step_ms_p90": 120.0, "first_step_ms": 3000.0},
        **{"warmup_steps": 5, "measured_steps": 25},
    }
    result = {
        "args": {"precision": "bf16", "gradient_checkpointing": "0", "compile": "off"},
        "versions": {"torch": "2.13.0", "colossalai": "0.5.0"},
        "git_commit": "abc",
        "device": device or (GPU if gib else CPU),
        "plan": {"total_bytes": 11 * 2**30},
        "throughput": speed,
        "memory": {
            "peak_allocated_gib": gib and gib - 1,
            "peak_reserved_gib": gib,
            "host_peak_rss_gib": 2.0,
        },
        "plan_check": {"gpu_measured_gib": gib and gib + 0.5, "gpu_error": gib and 11 / (gib + 0.5) - 1},
        "train_loss": [[1, 10.5], [30, 7.5]],
    }
    return Run(Outcome("ok", "", 20.0, 0, ()), result)


def failed_run(status: str = "oom", reason: str = "no room") -> Run:
    """Return a run that left no result."""
    return Run(Outcome(status, reason, 5.0, 1, ()), {})


def example_rows(*, gib: float | None = 10.0, num_gpus: tuple[int, ...] = (1,), cap: float = 0.0) -> list[Row]:
    """Return three plugins at batches 8 and 32; the second is out of memory at 32, the third timed out there."""
    rows = []
    for i, plugin in enumerate(("torch_ddp", "low_level_zero", "gemini")):
        for batch_size in (8, 32):
            for gpus in num_gpus:
                run = ok_run(1000.0 * gpus * batch_size * (3 - i), gib=gib)
                if batch_size == 32 and i:
                    run = failed_run(*(("oom", "no <room>"), ("timeout", "too long"))[i - 1])
                rows.append(table.make_row(cell(plugin, batch_size, gpus, mem_cap_gb=cap), [run], 12.0))
    return table.with_relative_speed(rows, "torch_ddp")
