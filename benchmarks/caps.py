"""Under each memory cap: the largest model that `auto` says fits, its speed beside every fixed plugin that fits too.

    python -m benchmarks.caps                           # one GPU: caps of 8, 12, 16, 24 and 40 GB, batch 8 x 1024
    python -m benchmarks.caps --caps 24 40 --steps 20
    python -m benchmarks.caps --sizes tiny --caps 0.2 --batch-size 2 --block-size 32     # a rehearsal on a CPU

Random weights, synthetic tokens. Fixed settings are those of `--plan`: of each plugin the one that is expected to be
fastest of those predicted to fit on GPU and host, at most four a cap. A run is a process of its own with a time limit;
caps.md and caps.json are written after each, and called again with the same settings only what is missing or failed
is run. A peak is what the allocator reserved and what lies beside it on the GPU, which must be empty otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import chooser
import hardware
import planner
from args import TrainArgs, parse_args
from benchmarks import side_by_side
from benchmarks.side_by_side import Case, Contestant, Outcome, Setting
from opt_sizes import OPT_SHAPES
from report import GIB

CAPS_GB = (8.0, 12.0, 16.0, 24.0, 40.0)
MAX_FIXED = 4
# `auto` may be slower than the best fixed setting by so much.
REQUIRED_RATIO = 0.95
CASE = Case("auto", ())


@dataclass(frozen=True)
class Trial:
    """One run under a cap.

    Args:
        outside_gib: on the GPU beside the allocator; None on a CPU.
    """

    cap_gb: float
    size: str
    outcome: Outcome
    outside_gib: float | None = None

    @property
    def is_auto(self) -> bool:
        return self.outcome.name == "auto"

    @property
    def tokens_per_s(self) -> float:
        return (self.outcome.tokens_per_s or 0.0) if self.outcome.status == "ok" else 0.0

    @property
    def peak_gib(self) -> float | None:
        """What the driver sees of the process at its peak; None on a CPU."""
        reserved = self.outcome.peak_reserved_gib
        return None if reserved is None else reserved + (self.outside_gib or 0.0)

    @property
    def is_under_cap(self) -> bool | None:
        """Whether the peak stayed under the cap; None where it was not measured."""
        return None if self.peak_gib is None else self.peak_gib * GIB <= self.cap_gb * 1e9


@dataclass(frozen=True)
class Machine:
    """What a plan is made for. None: a CPU."""

    gpu_gib: float | None
    host_gib: float

    @classmethod
    def here(cls, host_gib: float | None) -> Machine:
        """Return the first GPU, if there is one, and the host, with no more memory than is said."""
        sizes = [gpu.memory_gib for gpu in hardware.visible_gpus()]
        there_gib = hardware.host_memory_gib()
        return cls(sizes[0] if sizes else None, min(there_gib, host_gib or there_gib))

    def choose(self, args: TrainArgs) -> chooser.Choice:
        """Return what `auto` takes on one rank."""
        assert args.model_size, "a size of the OPT table"
        shape = OPT_SHAPES[args.model_size]
        where = (planner.model_shape(shape), 1, self.gpu_gib, self.host_gib)
        return chooser.resolve_auto(args, *where, dropout=shape.dropout > 0)

    def fixed(self, args: TrainArgs, choice: chooser.Choice) -> list[Contestant]:
        """Return the fastest expected fixed setting of each plugin that is predicted to fit, fastest first."""
        assert args.model_size, "a size of the OPT table"
        shape = OPT_SHAPES[args.model_size]
        where = (planner.model_shape(shape), 1, self.gpu_gib, self.host_gib)
        others = chooser.alternatives(args, *where, choice=choice, dropout=shape.dropout > 0)
        fitting = sorted((other for other in others if other.plan.fits), key=lambda other: -other.relative_speed)
        best: dict[str, Contestant] = {}
        for other in fitting:
            flags = tuple(shlex.split(other.flags))
            name = other.flags.replace("--", "")
            best.setdefault(flags[1], Contestant(name, None, flags, chooses_recompute=True))
        return list(best.values())[:MAX_FIXED]


def setting_of(size: str, cap_gb: float, options: argparse.Namespace) -> Setting:
    """Return the job that everybody is given."""
    return Setting(size, options.batch_size, options.block_size, mem_cap_gb=cap_gb, max_grad_norm=0.0)


def command_of(contestant: Contestant, setting: Setting, options: argparse.Namespace, folder: Path) -> str:
    """Return the shell line of a run."""
    return side_by_side.command_of(contestant, setting, CASE, options, folder)


def largest(cap_gb: float, machine: Machine, options: argparse.Namespace) -> tuple[str, list[Contestant]] | None:
    """Return the largest size that `auto` says fits under the cap, with everybody who trains it; None: none fits."""
    auto = Contestant("auto", None, ("--plugin", "auto"), chooses_recompute=True)
    for size in reversed(options.sizes):
        line = command_of(auto, setting_of(size, cap_gb, options), options, Path("unused"))
        args = parse_args(shlex.split(line)[2:])
        choice = machine.choose(args)
        if choice.fits:
            return size, [auto, *machine.fixed(args, choice)]
    return None


def trials(options: argparse.Namespace, done: Sequence[Trial], machine: Machine) -> Iterator[Trial]:
    """Run what is not done yet, and yield each run as it ends."""
    for cap_gb in options.caps:
        found = largest(cap_gb, machine, options)
        if found is None:
            print(f"cap {cap_gb:g} GB: none of {' '.join(options.sizes)} is predicted to fit", file=sys.stderr)
            continue
        size, contestants = found
        for number, contestant in enumerate(contestants):
            stem = f"{cap_gb:g}-{size}-{number}"
            folder = options.output / "runs" / stem
            command = command_of(contestant, setting_of(size, cap_gb, options), options, folder)
            if any(each.outcome.command == command and each.outcome.status == "ok" for each in done):
                continue
            print(f"cap {cap_gb:g} GB, {size}: {contestant.name}", file=sys.stderr, flush=True)
            outcome = side_by_side.run(command, options.output / f"{stem}.txt", limit_s=options.limit_seconds)
            outcome = replace(outcome, setting=f"{size}, cap {cap_gb:g} GB", name=contestant.name, is_ours=True)
            memory = side_by_side.read_ours(folder).get("memory") or {}
            yield Trial(cap_gb, size, outcome, memory.get("outside_gib"))


# ---------------------------------------------------------------------------- tables


def best_fixed(cap: Sequence[Trial]) -> float:
    """Return the tokens/s of the fastest fixed setting of a cap, 0 where none trained."""
    return max((each.tokens_per_s for each in cap if not each.is_auto), default=0.0)


def ratio(trial: Trial, cap: Sequence[Trial]) -> float | None:
    """Return the speed over that of the best fixed setting; None where there is none."""
    best = best_fixed(cap)
    return trial.tokens_per_s / best if best else None


def is_fast_enough(trial: Trial, cap: Sequence[Trial]) -> bool | None:
    """Return whether `auto` trained, and hardly slower than the best fixed setting; None for the others."""
    if not trial.is_auto:
        return None
    return trial.tokens_per_s >= REQUIRED_RATIO * best_fixed(cap) and trial.tokens_per_s > 0


COLUMNS = (
    "cap GB", "model", "setting", "status", "tokens/s", "x best fixed", "GPU GiB allocated", "reserved",
    "with what lies outside", "cap GiB", "under the cap", f"auto >= {REQUIRED_RATIO} x best", "host GiB",
    "loss, first to last", "notes",
)  # fmt: skip


def table(done: Sequence[Trial]) -> str:
    """Return a line a run as Markdown, those of a cap together."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for cap_gb in dict.fromkeys(each.cap_gb for each in done):
        cap = [each for each in done if each.cap_gb == cap_gb]
        lines += ["| " + " | ".join(_cells(each, cap)) + " |" for each in cap]
    return "\n".join(lines) + "\n"


def _cells(trial: Trial, cap: Sequence[Trial]) -> list[str]:
    outcome = trial.outcome
    losses = "-" if outcome.last_loss is None else f"{outcome.first_loss:.3f} to {outcome.last_loss:.3f}"
    return [
        f"{trial.cap_gb:g}",
        trial.size,
        f"**{outcome.name}**" if trial.is_auto else outcome.name,
        outcome.status,
        _number(outcome.tokens_per_s, ",.0f"),
        _number(ratio(trial, cap), ".2f"),
        _number(outcome.peak_allocated_gib, ".2f"),
        _number(outcome.peak_reserved_gib, ".2f"),
        _number(trial.peak_gib, ".2f"),
        f"{trial.cap_gb * 1e9 / GIB:.2f}",
        _verdict(trial.is_under_cap),
        _verdict(is_fast_enough(trial, cap)),
        _number(outcome.host_gib, ".1f"),
        losses,
        outcome.notes.replace("|", "/"),
    ]


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _verdict(verdict: bool | None) -> str:
    return {None: "-", True: "yes", False: "NO"}[verdict]


def write(folder: Path, done: Sequence[Trial]) -> None:
    """Write caps.md and caps.json, each in one step."""
    command = shlex.join(["python", "-m", "benchmarks.caps", *sys.argv[1:]])
    head = side_by_side.heading([each.outcome for each in done]).rsplit("\n\n", 1)[0]
    page = f"{head}\n\n    {command}\n\n{table(done)}"
    rows = json.dumps([asdict(each) for each in done], indent=1) + "\n"
    for name, text in (("caps.md", page), ("caps.json", rows)):
        temporary = folder / f".{name}"
        temporary.write_text(text)
        os.replace(temporary, folder / name)


def read(path: Path) -> list[Trial]:
    """Return the runs that an earlier call left, none without one."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text())
    return [Trial(**{**row, "outcome": Outcome(**row["outcome"])}) for row in rows]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    sizes = tuple(size for size in OPT_SHAPES if size != "tiny")
    parser.add_argument("--caps", nargs="+", type=float, default=CAPS_GB, metavar="GB", help="caps (10^9 bytes)")
    parser.add_argument("--sizes", nargs="+", choices=tuple(OPT_SHAPES), default=sizes, help="models, smallest first")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step (default: 8)")
    parser.add_argument("--block-size", type=int, default=1024, help="tokens a row (default: 1024)")
    parser.add_argument("--steps", type=int, default=12, help="steps a run, of which 5 are warm-up (default: 12)")
    parser.add_argument("--limit-seconds", type=float, default=240, help="seconds a run may take (default: 240)")
    parser.add_argument("--host-gib", type=float, help="choose sizes for a host of this memory; off: this one's")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/caps"), metavar="DIR", help="folder of the results"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the tables after each run, and return 1 where a verdict is NO."""
    options = parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the run in progress on the way out
    done = read(options.output / "caps.json")
    for trial in trials(options, done, Machine.here(options.host_gib)):
        key = (trial.cap_gb, trial.size, trial.outcome.name)
        done = [each for each in done if (each.cap_gb, each.size, each.outcome.name) != key] + [trial]
        write(options.output, done)
    write(options.output, done)
    print((options.output / "caps.md").read_text(), end="")
    by_cap = {each.cap_gb: [other for other in done if other.cap_gb == each.cap_gb] for each in done}
    verdicts = [verdict for each in done for verdict in (each.is_under_cap, is_fast_enough(each, by_cap[each.cap_gb]))]
    return int(False in verdicts)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
