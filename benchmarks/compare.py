"""Two sweeps side by side, cell by cell: what changed by more than the runs differ among themselves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import table
from benchmarks.table import Row, text

SURROUNDINGS = ("gpu", "link", "driver", "torch", "transformers", "colossalai", "python", "commit")


@dataclass(frozen=True)
class Spread:
    """The range in which a cell's tokens/s lie.

    Args:
        source: `runs` where the cell was repeated, else `steps`: p10 to p90 of one run's steps.
    """

    low: float
    high: float
    source: str


def main(arguments: Sequence[str]) -> int:
    """Print the comparison of two folders; 2 where one of them holds no sweep."""
    if len(arguments) != 2 or any(argument.startswith("-") for argument in arguments):
        print("usage: python report.py A B\n\nCompares two folders of run_benchmark.sh, cell by cell.", file=sys.stderr)
        return 0 if "-h" in arguments or "--help" in arguments else 2
    sweeps = []
    for folder in map(Path, arguments):
        try:
            sweeps.append(table.read(folder))
        except (OSError, KeyError, TypeError, ValueError):
            print(f"error: {folder}: holds no table.json of run_benchmark.sh", file=sys.stderr)
            return 2
    print(comparison(*sweeps), end="")
    return 0


def comparison(first: Sequence[Row], second: Sequence[Row]) -> str:
    """Return what differs around the two sweeps, and a Markdown table with a line a cell of either."""
    rows_a, rows_b = ({row.cell: row for row in rows} for rows in (first, second))
    lines = list(differences(first, second)) or ["The same hardware, versions and commit."]
    heads = ("cell", "A", "B", "tokens/s A", "B", "B / A", "outside the spread", "spread of", "GiB A", "B", "B / A")
    lines += ["", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for cell in dict.fromkeys([*rows_a, *rows_b]):
        lines.append("| " + " | ".join(compare(cell, rows_a.get(cell), rows_b.get(cell))) + " |")
    return "\n".join(lines) + "\n"


def differences(first: Sequence[Row], second: Sequence[Row]) -> list[str]:
    """Return a line for each part of the surroundings that is not the same."""
    found = []
    for name in SURROUNDINGS:
        a, b = (", ".join(sorted({str(getattr(row, name)) for row in rows if row.gpu})) for rows in (first, second))
        if a != b:
            found.append(f"{name}: A {a or '-'}, B {b or '-'}")
    return found


def memory_gib(row: Row) -> float | None:
    """Return the peak of a device; tables of before 2026-11-28 have the allocator's alone."""
    return row.peak_gpu_gib or row.peak_reserved_gib or row.host_gib


def compare(cell: str, a: Row | None, b: Row | None) -> list[str]:
    """Return the words of one line; a cell that only one sweep has, or that is not ok, has no ratio."""
    speeds = [row.tokens_per_s if row else None for row in (a, b)]
    memories = [memory_gib(row) if row and row.tokens_per_s else None for row in (a, b)]
    verdict, source = judge(a, b) if a and b and all(speeds) else ("-", "-")
    return [
        cell,
        *(row.status if row else "not there" for row in (a, b)),
        *(text(speed, ",.0f") for speed in speeds),
        ratio(*speeds),
        verdict,
        source,
        *(text(memory, ".2f") for memory in memories),
        ratio(*memories),
    ]


def ratio(a: float | None, b: float | None) -> str:
    """Return b over a, `-` where one is missing."""
    return f"{b / a:.3f}" if a and b else "-"


def judge(a: Row, b: Row) -> tuple[str, str]:
    """Return whether B is faster or slower than any of A, and which spread says so."""
    one, other = spread(a), spread(b)
    source = one.source if one.source == other.source else f"{one.source}, {other.source}"
    if other.low > one.high:
        return "faster", source
    return ("slower", source) if other.high < one.low else ("no", source)


def spread(row: Row) -> Spread:
    """Return the range of a cell's tokens/s."""
    speed = row.tokens_per_s or 0.0
    if row.num_runs > 1:
        return Spread(row.tokens_per_s_min or speed, row.tokens_per_s_max or speed, "runs")
    step_ms = row.step_ms_median or 1.0
    slow, fast = row.step_ms_p90 or step_ms, row.step_ms_p10 or step_ms
    return Spread(speed * step_ms / slow, speed * step_ms / fast, "steps")
