"""Does the advice after running out of memory work? A script that follows it to the letter until the run trains.

    python -m benchmarks.advice                                   # one GPU: four plugins that cannot fit, 1.3b, 16 GB
    python -m benchmarks.advice --flags "--model_name_or_path 2.7b --mem_cap 12 --plugin torch_ddp"

train_clm.py runs with random weights and synthetic tokens. While it exits with 3, the first line of flags that it
printed is added to the command, as printed. Exit code 0: every command trained in the end.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.side_by_side import EXIT_STATUS, ROOT, last_line, run_group

HEAD = "Try, in this order:"
CASES = tuple(
    f"--model_name_or_path 1.3b --mem_cap 16 --per_device_train_batch_size 8 --block_size 1024 --plugin {plugin}"
    for plugin in ("torch_ddp", "low_level_zero", "gemini", "hybrid_parallel")
)
SHARED = (
    "--from_scratch --dataset synthetic --max_train_steps 3 --eval_strategy no --save_strategy no --no-save_final "
    "--overwrite_output_dir"
)


@dataclass(frozen=True)
class Attempt:
    """One run.

    Args:
        added: the advice it followed, empty for the command as it was given.
        status: ok, oom, timeout, ...
        advice: the lines it printed, in their order.
    """

    added: str
    status: str
    advice: tuple[str, ...]
    notes: str = ""


def advice_of(log: str) -> tuple[str, ...]:
    """Return the lines of advice in what a run printed: the indented ones that follow the head."""
    _, head, rest = log.partition(HEAD)
    lines = []
    for line in rest.splitlines()[1:] if head else []:
        if not line.startswith("  "):
            break
        lines.append(line.strip())
    return tuple(lines)


def follow(
    flags: str, folder: Path, *, limit_s: float, max_attempts: int, script: Path = ROOT / "train_clm.py"
) -> list[Attempt]:
    """Run, and follow the first line of advice while memory runs out and there are flags to add."""
    attempts, added, command = list[Attempt](), "", [*shlex.split(SHARED), *shlex.split(flags)]
    while len(attempts) < max_attempts:
        command += shlex.split(added)
        arguments = [sys.executable, str(script), *command, "--output_dir", str(folder / "run")]
        attempts.append(_attempt(added, arguments, folder / f"{len(attempts)}.txt", limit_s))
        print(f"  {added or 'as given'}: {attempts[-1].status}", file=sys.stderr, flush=True)
        added = next((line for line in attempts[-1].advice if line.startswith("--")), "")
        if attempts[-1].status != "oom" or not added:
            break
    return attempts


def _attempt(added: str, arguments: list[str], log: Path, limit_s: float) -> Attempt:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(log, "w", encoding="utf-8") as file:
        code = run_group(arguments, file, environment, limit_s=limit_s)
    status = "timeout" if code is None else EXIT_STATUS.get(code, "error") if code else "ok"
    notes = last_line(log) if status not in ("ok", "oom") else ""
    return Attempt(added, status, advice_of(log.read_text(errors="replace")), notes)


def table(found: dict[str, list[Attempt]]) -> str:
    """Return a line a command as Markdown."""
    lines = ["| command | advice followed | runs | ended | notes |", "| --- | --- | --- | --- | --- |"]
    for flags, attempts in found.items():
        followed = "; then ".join(f"`{each.added}`" for each in attempts[1:])
        lines.append(f"| `{flags}` | {followed} | {len(attempts)} | {attempts[-1].status} | {attempts[-1].notes} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Follow the advice of every command, print and write the table, and return 1 where one never trained."""
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--flags", nargs="+", default=CASES, metavar="FLAGS", help="train_clm.py's, a command a word")
    parser.add_argument("--limit-seconds", type=float, default=180, help="seconds a run may take (default: 180)")
    parser.add_argument("--max-attempts", type=int, default=12, help="runs a command at most (default: 12)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/advice"), metavar="DIR", help="folder of the results"
    )
    options = parser.parse_args(argv)
    found: dict[str, list[Attempt]] = {}
    for number, flags in enumerate(options.flags):
        folder = options.output / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        print(flags, file=sys.stderr, flush=True)
        found[flags] = follow(flags, folder, limit_s=options.limit_seconds, max_attempts=options.max_attempts)
        (options.output / "advice.md").write_text(table(found))
    print(table(found), end="")
    return int(any(attempts[-1].status != "ok" for attempts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
