r"""A picture of one training step: what ran when, on the GPU, on its way to and from the host, and on the host.

    python -m benchmarks.timeline --output DIR \
      --run "before: --plugin low_level_zero --offload_optim_frac 1 --step_in_backward off" \
      --run "after: --plugin low_level_zero --offload_optim_frac 1" \
      -- --model_name_or_path 2.7b --per_device_train_batch_size 16 --gradient_checkpointing on --mem_cap 24
    python -m benchmarks.timeline --draw DIR    # again, from DIR/timeline.json, without a GPU

Flags of train_clm.py for all runs stand after `--`. A run that starts with `--peer deepspeed_zero` is that of
benchmarks/peers, with its own flags: --run "ZeRO-Offload: --peer deepspeed_zero --stage 2 --offload". Each run is a
process of its own on one device, and trains synthetic rows. Left in DIR: timeline.png and .svg, the runs on one axis of
time; timeline.json, the numbers and intervals; a log of each run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.timeline_trace import Timeline, Trace, measure, short_name

ROOT = Path(__file__).resolve().parent.parent
RECORDED = 3  # timeline_worker.NUM_RECORDED, whose module needs torch


def main(argv: Sequence[str] | None = None) -> int:
    """Run and measure, or read what was measured, then draw and print; return 1 where a run failed."""
    options = parse(sys.argv[1:] if argv is None else argv)
    folder = options.draw or options.output
    failed = 0
    if options.draw:
        timelines = read(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        found = [timeline_of(run, options) for run in options.run or ["step:"]]
        timelines = [timeline for timeline in found if timeline]
        failed = len(found) - len(timelines)
        content = {"runs": [asdict(timeline) for timeline in timelines]}
        (folder / "timeline.json").write_text(json.dumps(content) + "\n")
    if timelines:
        from benchmarks.timeline_plot import draw

        draw(timelines, folder)
    for timeline in timelines:
        print(table(timeline))
    return int(failed > 0)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, with train_clm.py's flags as `common`."""
    assert __doc__
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, metavar="DIR", help="run, and leave the results here")
    where.add_argument(
        "--draw", type=Path, metavar="DIR", help="run nothing; draw again what an earlier call left here"
    )
    parser.add_argument(
        "--run", action="append", metavar="'NAME: FLAGS'", help="a run, its name and its flags; again for the next one"
    )
    parser.add_argument("--warm_up", type=int, default=7, help="steps before those recorded, 4 or more (default: 7)")
    parser.add_argument("--limit_seconds", type=float, default=300, help="seconds a run may take (default: 300)")
    parser.add_argument("--trace", action="store_true", help="keep each run's chrome trace: NAME.trace.json.gz")
    options = parser.parse_args(argv[:at])
    options.common = argv[at + 1 :]
    if options.warm_up < 4:
        parser.error(f"--warm_up {options.warm_up}: has to be 4 or more")
    names = [name_of(run) for run in options.run or []]
    if "" in names or len(set(names)) < len(names):
        parser.error("--run: each has a name of its own before its colon")
    return options


def name_of(run: str) -> str:
    """Return the name before the colon, empty where there is no colon."""
    name, colon, _ = run.partition(":")
    return name.strip() if colon else ""


def read(folder: Path) -> list[Timeline]:
    """Return the runs of a timeline.json."""
    return [Timeline.from_json(fields) for fields in json.loads((folder / "timeline.json").read_text())["runs"]]


# ---------------------------------------------------------------------------- one run


def timeline_of(run: str, options: argparse.Namespace) -> Timeline | None:
    """Return a run's measured step; None, with the end of its log printed, where it failed."""
    name = name_of(run)
    folder = options.output / re.sub(r"\W+", "-", name.lower())
    folder.mkdir(exist_ok=True)
    flags = worker_flags(shlex.split(run.partition(":")[2]), options, folder)
    trace, facts = folder / "trace.json.gz", folder / "run.json"
    for old in (trace, facts):
        old.unlink(missing_ok=True)
    reason = start(flags, folder, options)
    try:
        if facts.exists():
            return read_run(folder, name, shlex.join(flags))
    except ValueError as error:
        reason += f", {error}"
    finally:
        if options.trace and trace.exists():
            trace.replace(options.output / f"{folder.name}.trace.json.gz")
        trace.unlink(missing_ok=True)
    print(
        f"{name}: {reason}; the end of {folder / 'log.txt'}:\n{(folder / 'log.txt').read_text()[-1500:]}",
        file=sys.stderr,
    )
    return None


def worker_flags(own: list[str], options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the worker's flags: the common ones before a run's own, so that these win."""
    steps = options.warm_up + RECORDED
    shared = f"--from_scratch --dataset synthetic --max_train_steps {steps} --logging_steps {steps}".split()
    shared += "--save_strategy no --no-save_final --eval_strategy no --overwrite_output_dir".split()
    shared += ["--output_dir", str(folder / "run"), *options.common]
    if own[:1] == ["--peer"]:
        return [*own[:2], *shared, "--own", *own[2:]]
    return [*shared, *own]


def start(flags: list[str], folder: Path, options: argparse.Namespace) -> str:
    """Run the worker to its end, with its output in log.txt, and return how it ended."""
    command = [sys.executable, "-m", "benchmarks.timeline_worker", str(folder), str(options.warm_up), *flags]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with open(folder / "log.txt", "w") as log:
        try:
            done = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=options.limit_seconds
            )
        except subprocess.TimeoutExpired:
            return f"no end after {options.limit_seconds:g} s"
    return f"exit code {done.returncode}"


def read_run(folder: Path, name: str, command: str) -> Timeline:
    """Return what a worker left, measured.

    Raises:
        ValueError: the trace holds no whole step, or no kernel although there is a GPU.
    """
    facts = json.loads((folder / "run.json").read_text())
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        trace = Trace(json.load(file), facts.pop("main_thread"), facts.pop("host_threads"))
    if facts["device"] != "CPU" and not trace.on_gpu:
        raise ValueError("the profiler saw no kernel: is another one using the GPU's counters?")
    return measure(trace, name=name, command=command, **facts)


# ---------------------------------------------------------------------------- words


def table(timeline: Timeline) -> str:
    """Return the numbers of a run as text: the lanes, the GPU's idle time, the top kernels."""
    step, idle = timeline.step_ms, timeline.idle_ms
    plain = f", {timeline.plain_step_ms:.1f} ms without the profiler" if timeline.plain_step_ms else ""
    lines = [f"\n{timeline.name}: one step {step:.1f} ms{plain} ({timeline.device}, {timeline.date})"]
    idle_head = "" if idle is None else "  of GPU idle"
    lines.append(f"  {'lane':<18} {'busy ms':>9} {'of step':>8} {'beside compute':>15}{idle_head}")
    for name, lane in timeline.lanes.items():
        overlap = "" if lane.overlap is None else f"{lane.overlap:.0%}"
        in_idle = f"{lane.idle_gpu_ms:13.1f}" if lane.idle_gpu_ms is not None and lane.overlap is not None else ""
        lines.append(f"  {name:<18} {lane.busy_ms:9.1f} {lane.busy_ms / step:8.0%} {overlap:>15}{in_idle}")
        if len(lane.kinds_ms) > 1:
            lines.append("    " + ", ".join(f"{kind} {spent:.1f}" for kind, spent in lane.kinds_ms.items()))
    if idle is not None:
        lines.append(f"  {'GPU idle':<18} {idle:9.1f} {idle / step:8.0%}")
    lines.append("  top kernels" if idle is not None else "  top operators, without those they call")
    lines += [f"  {each.total_ms:9.1f} ms {each.count:6} x  {short_name(each.name)}" for each in timeline.kernels]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
