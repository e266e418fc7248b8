"""The verdict on each case of equivalence.py, and the tables in Markdown and JSON. No torch import."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from benchmarks.equivalence_cases import Case, Strategy

# Largest relative differences to the reference. All but that of the norm were asked for before the first run.
FP32_TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-5, "evaluation": 1e-5, "weights": 1e-4, "perplexity": 1e-6}
HALF_TOLERANCES = {"loss": 2e-2, "grad_norm": 5e-2, "evaluation": 2e-2, "perplexity": 2e-2}

NOT_RUN = "not run: interrupted"  # a verdict

Found = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Differences:
    """Largest relative differences to the reference; None where there is nothing to compare.

    Args:
        loss, grad_norm: over all steps. Steps that fp16 skipped have no norm.
        evaluation: over the evaluations after each epoch.
        weights: over tensors, the largest difference of an element to the tensor's largest element.
        tensor: the one that differs most.
        num_skipped: steps that fp16 skipped because a gradient overflowed.
    """

    loss: float | None = None
    grad_norm: float | None = None
    evaluation: float | None = None
    perplexity: float | None = None
    weights: float | None = None
    tensor: str | None = None
    num_skipped: int = 0


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    case: Case
    differences: Differences
    verdict: str
    seconds: float | None = None
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether the case came out as it has to: right, or with a fault that was noticed."""
        return self.verdict.startswith("differs" if self.case.fault else "agrees")


@dataclass(frozen=True)
class Numbers:
    """What a run is compared by."""

    losses: Sequence[float]
    grad_norms: Sequence[float | None]
    evaluations: Sequence[float]
    num_skipped: int = 0


def compare_training(case: Case, found: Numbers, plain: Numbers, weights: tuple[float, str]) -> Differences:
    """Return how far a training is from the plain one.

    Args:
        weights: the largest difference of a tensor, and its name.
    """
    skipped = [norm == math.inf and case.precision == "fp16" for norm in found.grad_norms]
    return Differences(
        loss=largest(found.losses, plain.losses),
        grad_norm=largest(found.grad_norms, plain.grad_norms, skipped) if case.clips else None,
        evaluation=largest(found.evaluations, plain.evaluations),
        weights=weights[0],
        tensor=weights[1],
        num_skipped=found.num_skipped,
    )


def compare_evaluation(found: float, plain: float) -> Differences:
    """Return how far an evaluation of the same weights is from the plain one."""
    return Differences(evaluation=relative(found, plain), perplexity=relative(math.exp(found), math.exp(plain)))


def largest(
    values: Sequence[float | None], expected: Sequence[float | None], left_out: Sequence[bool] | None = None
) -> float:
    """Return the largest relative difference; infinite where there are not as many values as expected."""
    if len(values) != len(expected):
        return math.inf
    left_out = left_out or [False] * len(values)
    pairs = zip(values, expected, left_out, strict=True)
    return max((relative(value, other) for value, other, out in pairs if not out), default=0.0)


def relative(value: float | None, expected: float | None) -> float:
    """Return |value - expected| / |expected|, infinite for what is missing or not finite."""
    if value is None or expected is None or not math.isfinite(value):
        return math.inf
    return abs(value - expected) / abs(expected)


def judge(case: Case, differences: Differences, chunk_shares: Sequence[float] | None) -> str:
    """Return `agrees`, or `differs` with what is further off than it may be.

    Args:
        chunk_shares: the share of each of Gemini's chunks that a rank holds; None under other plugins.
    """
    tolerances = FP32_TOLERANCES if case.precision == "fp32" else HALF_TOLERANCES
    problems = [
        f"{name.replace('_', ' ')} {value:.1e} > {tolerance:.0e}"
        for name, tolerance in tolerances.items()
        if (value := getattr(differences, name)) is not None and not value <= tolerance
    ]
    if chunk_shares is not None and (len(chunk_shares) < 2 or set(chunk_shares) != {1 / case.strategy.world_size}):
        problems.append(f"{len(chunk_shares)} chunks, of which a rank holds {sorted(set(chunk_shares))}")
    skipped = differences.num_skipped
    if problems:
        return f"differs: {', '.join(problems)}" + (f"; fp16 skipped {skipped} of the steps" if skipped else "")
    return f"agrees, though fp16 skipped {skipped} of the steps" if skipped else "agrees"


def failure(case: Case, error: str) -> Row:
    """Return the row of a case that has no numbers; its verdict is the last line of `error`."""
    last = next((line.strip() for line in reversed(error.splitlines()) if line.strip()), "no message")
    return Row(case, Differences(), f"error: {last}", error=error)


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Circumstances:
    """What stands above the table.

    Args:
        rounding: how far the plain loop in fp64 is from itself in fp32: what no run can undercut.
    """

    command: str
    date: str
    device: str
    versions: dict[str, str | None]
    commit: str | None
    text: str
    minutes: float
    rounding: Differences


@dataclass(frozen=True)
class Report:
    """All rows and how they came about."""

    circumstances: Circumstances
    rows: list[Row]

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.rows)

    def as_json(self) -> Found:
        """Return everything, with what is infinite as None."""
        return {
            "circumstances": asdict(self.circumstances),
            "tolerances": {"fp32": FP32_TOLERANCES, "bf16": HALF_TOLERANCES, "fp16": HALF_TOLERANCES},
            "rows": [_row_as_json(row) for row in self.rows],
        }

    def summary(self) -> str:
        """Return one line a plugin, for the README."""
        lines = [_plugin_line(plugin, rows) for plugin, rows in self._grouped(lambda strategy: strategy.plugin)]
        table = markdown(("plugin", "strategies", "ranks", *MEASURED), [*lines, TOLERANCES])
        return "\n".join([_about(self.circumstances), "", *table, "", _closing(self.rows)])

    def by_strategy(self) -> str:
        """Return one line a strategy."""
        groups = self._grouped(lambda strategy: strategy)
        lines = [[strategy.name, str(strategy.world_size), *_measured(rows)] for strategy, rows in groups]
        return "\n".join(markdown(("strategy", "ranks", *MEASURED), lines))

    def _grouped(self, group_of: Callable[[Strategy], T]) -> Iterable[tuple[T, list[Row]]]:
        """Return the rows without a fault by group, in the order in which the groups first come."""
        groups: dict[T, list[Row]] = {}
        for row in self.rows:
            if not row.case.fault:
                groups.setdefault(group_of(row.case.strategy), []).append(row)
        return groups.items()

    def as_markdown(self) -> str:
        """Return the summary, a line a strategy, then every row."""
        parts = ["# Every plugin trains the same model", "", self.summary(), "", METHOD]
        parts += ["", "## Strategies", "", self.by_strategy()]
        for title, rows in _sections(self.rows):
            parts += ["", f"## {title}", "", *markdown(HEAD, map(_line, rows))]
        errors = [row for row in self.rows if row.error]
        for row in errors:
            parts += ["", f"### {row.case.name}", "", "```text", row.error.strip(), "```"]
        return "\n".join(parts) + "\n"


METHOD = """\
A case is one run of train_clm.py's own functions: its flags, its plugin, its loader, its loop, its evaluation after
each epoch, its export. The reference (benchmarks/reference.py) is a plain PyTorch loop in fp32 on one device, which
has no ranks, no accumulation, no padding in evaluation and no ColossalAI. All start from the same random weights of 4
layers, width 64, and take 20 steps of 16 rows over 2 epochs; 151 rows of up to 33 bytes, a prime, make the last step
of each epoch a short one. Dropout is compared where every rank sees the batch of a single process (on GPUs in fp32
alone); its masks are then the reference's. Under each strategy the cases hold every pair of values of two factors:
precision, shape, packed or padded rows, accumulation 1 or 4, clipping off or at 0.5, recompute off or on, dropout 0
or 0.1.

`loss` and `norm` are the largest relative difference to the reference over all 20 steps, `evaluation` over both
epochs' ends, `weights` over all tensors that were exported: largest difference of an element / largest element.
Tolerances: in fp32 loss, norm and evaluation 1e-5, weights 1e-4, perplexity 1e-6; in bf16 and fp16 loss, evaluation
and perplexity 2e-2, norm 5e-2, weights not judged. A row beyond one `differs`, followed by each number that is beyond
its tolerance, Gemini's chunks where they were not shared out, and the steps that fp16 skipped; a case that failed is an
`error` with its last line, the rest stands at the end of this page. A weight beyond 1e-6 in fp32 is a row of `fc1`: one
token's activation lies so near zero that rounding decides on which side of the ReLU it falls, which then moves others."""

MEASURED = (
    "cases", "loss fp32", "loss 16-bit", "norm fp32", "norm 16-bit", "evaluation fp32", "evaluation 16-bit",
    "weights fp32", "perplexity fp32", "perplexity 16-bit", "verdict",
)  # fmt: skip
HEAD = ("strategy", "ranks", "case", "loss", "norm", "evaluation", "perplexity", "weights", "seconds", "verdict")

TOLERANCES = (
    "held to", "", "", "",
    *(f"{tolerances[name]:.0e}" for name in ("loss", "grad_norm", "evaluation") for tolerances in (FP32_TOLERANCES, HALF_TOLERANCES)),
    *(f"{FP32_TOLERANCES[name]:.0e}" for name in ("weights", "perplexity")), f"{HALF_TOLERANCES['perplexity']:.0e}", "",
)  # fmt: skip


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def _about(about: Circumstances) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items() if version)
    rounding = about.rounding
    return (
        f"Made {about.date} on {about.device} in {about.minutes:.0f} minutes by `{about.command}` "
        f"at {about.commit or 'no commit'}, {versions}; text: {about.text}. Largest relative difference to a plain "
        f"PyTorch loop; the same loop in fp64 differs by {_number(rounding.loss)} in the losses, "
        f"{_number(rounding.grad_norm)} in the norms and {_number(rounding.weights)} in the weights."
    )


def _plugin_line(plugin: str, rows: list[Row]) -> list[str]:
    strategies = dict.fromkeys(row.case.strategy.name for row in rows)
    ranks = sorted({row.case.strategy.world_size for row in rows})
    return [f"`{plugin}`", "; ".join(strategies), ", ".join(map(str, ranks)), *_measured(rows)]


def _measured(rows: list[Row]) -> list[str]:
    """Return the cells under MEASURED. An evaluation of given weights differs in `perplexity`, a training in the rest."""
    exact = [row for row in rows if row.case.precision == "fp32"]
    half = [row for row in rows if row.case.precision != "fp32"]
    trained_exact, trained_half = ([row for row in group if not row.case.evaluates] for group in (exact, half))
    return [
        str(len(rows)),
        *(_worst(g, name) for name in ("loss", "grad_norm", "evaluation") for g in (trained_exact, trained_half)),
        _worst(trained_exact, "weights"),
        *(_worst(group, "perplexity") for group in (exact, half)),
        _verdict(rows),
    ]


def _verdict(rows: Sequence[Row]) -> str:
    num_missing = sum(row.verdict == NOT_RUN for row in rows)
    num_wrong = sum(not row.holds for row in rows) - num_missing
    words = [f"{num_wrong} of {len(rows)} differ"] if num_wrong else []
    words += [f"{num_missing} not run"] if num_missing else []
    return ", ".join(words) or "agrees"


def _closing(rows: Sequence[Row]) -> str:
    faulty = [row for row in rows if row.case.fault]
    caught = sum(row.holds for row in faulty)
    others = [row for row in rows if not row.case.fault]
    right = sum(row.holds for row in others)
    missing = sum(row.verdict == NOT_RUN for row in rows)
    return (
        f"{right} of {len(others)} cases agree with the reference. "
        f"{caught} of {len(faulty)} faults planted on purpose were noticed."
    ) + (f" {missing} of all were not run: interrupted." if missing else "")


def _worst(rows: Sequence[Row], name: str) -> str:
    values = [value for row in rows if (value := getattr(row.differences, name)) is not None]
    return _number(max(values)) if values else "-"


def _sections(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    trained = [row for row in rows if not row.case.fault and not row.case.evaluates]
    evaluated = [row for row in rows if not row.case.fault and row.case.evaluates]
    faulty = [row for row in rows if row.case.fault]
    titles = ("Training", "Perplexity of the same weights", "Faults planted on purpose, which have to differ")
    return [(title, part) for title, part in zip(titles, (trained, evaluated, faulty), strict=True) if part]


def _line(row: Row) -> list[str]:
    case, found = row.case, row.differences
    words = [*filter(None, case.factors.values())] + ([f"fault: {case.fault}"] if case.fault else [])
    numbers = (found.loss, found.grad_norm, found.evaluation, found.perplexity, found.weights)
    return [
        case.strategy.name,
        str(case.strategy.world_size),
        ", ".join(words),
        *map(_number, numbers),
        "-" if row.seconds is None else f"{row.seconds:.1f}",
        row.verdict.replace("|", "\\|"),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _row_as_json(row: Row) -> Found:
    differences = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(row.differences).items()
    }
    settings = {spec.name: getattr(row.case, spec.name) for spec in fields(Case) if spec.name != "strategy"}
    return {
        "name": row.case.name,
        "strategy": row.case.strategy.name,
        "ranks": row.case.strategy.world_size,
        **settings,
        "differences": differences,
        "verdict": row.verdict,
        "holds": row.holds,
        "seconds": row.seconds,
        "error": row.error,
    }
