"""The planner's predicted peak beside the measured one, over sizes, plugins, batches, lengths, recompute and offload.

    python -m benchmarks.plan_accuracy                      # the grid, on one GPU: about 6 minutes; CPU: a smaller one
    python -m benchmarks.plan_accuracy --jobs 8             # as many cells at once as fit on the GPUs and the host
    python -m benchmarks.plan_accuracy --only '^125m'       # cells whose line matches
    python -m benchmarks.plan_accuracy --output DIR         # plan_accuracy.md and .json there, after each cell
    python -m benchmarks.plan_accuracy --again FILE.json    # today's planner against the peaks measured then

Libraries are imported once; each cell is a process forked from there, a few steps of train_clm.py long. Cells side by
side do not disturb each other's peaks, only their speed, which is not looked at. What lies beside a process's allocator
is read from the card, though, where the neighbours' memory would count: with --jobs the smallest cell runs alone first, and so
does the smallest of hybrid_parallel, whose process groups have buffers; their figures stand for the others.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import chooser  # noqa: E402
import hardware  # noqa: E402
import planner  # noqa: E402
from args import TrainArgs, parse_args  # noqa: E402
from benchmarks.forks import import_what_can_be_forked  # noqa: E402
from benchmarks.packing import Need, Room  # noqa: E402
from opt_sizes import OPT_SHAPES  # noqa: E402

STEPS = 3
MAX_JOBS = 8
GRID = """
125m low_level_zero 32 1024
125m torch_ddp 32 512
125m torch_ddp 8 2048 --gradient_checkpointing on
125m low_level_zero 16 2048 --max_grad_norm 1
125m torch_ddp_fp16 16 1024
125m gemini 32 1024
125m hybrid_parallel 32 1024
350m low_level_zero 16 1024
350m torch_ddp 32 512 --gradient_checkpointing on
350m low_level_zero 16 1024 --offload_optim_frac 0.5
350m gemini 8 2048
1.3b low_level_zero 8 1024
1.3b torch_ddp 8 1024
1.3b low_level_zero 16 1024 --gradient_checkpointing on
1.3b low_level_zero 8 1024 --offload_optim_frac 1
1.3b low_level_zero 4 512 --max_grad_norm 1
1.3b gemini 4 1024
1.3b gemini 8 1024 --offload_optim_frac 0.5
1.3b hybrid_parallel 4 2048
2.7b low_level_zero 4 1024
2.7b low_level_zero 8 1024 --gradient_checkpointing on --step_in_backward on
2.7b low_level_zero 16 1024 --gradient_checkpointing 16 --offload_optim_frac 0.5
2.7b torch_ddp 4 512
2.7b gemini 4 1024 --gradient_checkpointing on
6.7b low_level_zero 4 1024 --gradient_checkpointing on --step_in_backward on
6.7b low_level_zero 8 512 --gradient_checkpointing on --offload_optim_frac 0.4
"""

# For a machine without a GPU: the host's memory, which is all there is; up to 8 GiB. Products in bf16, all that Gemini
# has, take a CPU without instructions for them a minute a step: few tokens.
CPU_GRID = """
tiny torch_ddp 8 256
tiny low_level_zero 8 256
tiny gemini 2 64
tiny torch_ddp 16 256 --gradient_checkpointing on
125m torch_ddp 2 128
125m low_level_zero 2 128
125m hybrid_parallel 2 128
125m torch_ddp 4 256 --gradient_checkpointing on
125m low_level_zero 2 128 --offload_optim_frac 0.5
350m torch_ddp 1 128
350m low_level_zero 1 128
"""


def command_of(line: str) -> list[str]:
    """Return train_clm.py's arguments for a line of the grid: size, plugin, batch, length, flags."""
    size, plugin, batch, length, *flags = line.split()
    return [
        *f"--model_name_or_path {size} --from_scratch --dataset synthetic --plugin {plugin}".split(),
        *f"--per_device_train_batch_size {batch} --block_size {length} --max_train_steps {STEPS}".split(),
        *"--save_strategy no --no-save_final --eval_strategy no".split(),
        *flags,
    ]


@dataclass
class Running:
    """A cell in a process forked from this one.

    Args:
        gpu: its GPU's number among those of the machine; 0 on a CPU.
    """

    line: str
    folder: Path
    gpu: int
    need: Need
    process: BaseProcess
    end: float

    @classmethod
    def start(cls, line: str, folder: Path, gpu: int, uuid: str | None, need: Need, *, limit_s: float) -> Running:
        """Fork, and train on the GPU with this `uuid`."""
        process = multiprocessing.get_context("fork").Process(target=_train, args=(command_of(line), folder, uuid))
        process.start()
        return cls(line, folder, gpu, need, process, time.monotonic() + limit_s)

    def result(self) -> dict[str, Any] | None:
        """Return result.json, or why there is none; None while the process runs and has time."""
        if self.process.is_alive() and time.monotonic() < self.end:
            return None
        if self.process.is_alive():
            self.kill()
            return {"line": self.line, "status": "timeout"}
        self.process.join()
        path = self.folder / "result.json"
        if not path.exists():
            return {"line": self.line, "status": f"exit {self.process.exitcode}"}
        return {"line": self.line, **json.loads(path.read_text())}

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def _train(arguments: list[str], folder: Path, uuid: str | None) -> None:
    if uuid:  # before CUDA is initialised, which the parent never does
        os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    import runtime
    import train_clm

    with open(folder.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        process = runtime.current_runtime()
        runtime.start_logging(process)
        code = train_clm.run(parse_args([*arguments, "--output_dir", str(folder)]), process)
    os._exit(code)


def predicted(result: dict[str, Any]) -> planner.Plan:
    """Return today's plan for the settings of a result."""
    names = {spec.name for spec in fields(TrainArgs)}
    known = {name: value for name, value in result["args"].items() if name in names}
    args = TrainArgs(**known | {"prompt": ()})
    return plan_of(args, result["model"]["name"], result["device"]["memory_gib"], result["device"]["count"])


def plan_of(args: TrainArgs, size: str, gpu_gib: float | None, world_size: int = 1) -> planner.Plan:
    """Return the plan of a run with nothing to choose."""
    shape = OPT_SHAPES[size]
    found = chooser.resolve_auto(
        args, planner.model_shape(shape), world_size, gpu_gib, host_gib=None, dropout=shape.dropout > 0
    )
    return found.plan


def need_of(line: str, gpu_gib: float | None) -> Need:
    """Return what a cell is predicted to take."""
    args = parse_args(command_of(line))
    assert args.model_size, f"{line}: no size of the OPT table"
    plan = plan_of(args, args.model_size, gpu_gib)
    return Need(plan.total_bytes / planner.GIB if gpu_gib else 0.0, plan.host_bytes / planner.GIB)


def row(result: dict[str, Any]) -> dict[str, Any]:
    """Return predicted and measured GiB of a cell, of the GPU and of the host, which on a CPU is all there is.

    The GPU's measured peak is that of allocated memory, and what lies beside the allocator.
    """
    found = {"cell": result["line"], "status": result["status"]}
    if result["status"] != "ok":
        return found
    plan, memory = predicted(result), result["memory"]
    pairs = {"host": (plan.host_bytes / planner.GIB, memory["host_peak_rss_gib"])}
    if memory["peak_allocated_gib"] is not None:
        pairs["gpu"] = plan.total_bytes / planner.GIB, memory["peak_allocated_gib"] + memory["outside_gib"]
    for where, (predicted_gib, measured_gib) in pairs.items():
        found |= {
            f"{where}_predicted_gib": predicted_gib,
            f"{where}_measured_gib": measured_gib,
            f"{where}_error": predicted_gib / measured_gib - 1,
        }
    return found | {"moment": plan.moment}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, and a line that sums them up."""
    lines = [
        "| model, plugin, batch, length, flags | GPU GiB predicted | measured | error | moment | host GiB predicted | measured | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in rows:
        if each["status"] != "ok":
            lines.append(f"| {each['cell']} | | {each['status']} | | | | | |")
            continue
        cells = [*_cells(each, "gpu"), each["moment"], *_cells(each, "host")]
        lines.append(f"| {each['cell']} | {' | '.join(cells)} |")
    for where in ("gpu", "host"):
        errors = [each[f"{where}_error"] for each in rows if f"{where}_error" in each]
        if errors:
            within = sum(abs(error) <= 0.10 for error in errors)
            lines += [
                "",
                f"{where}: {within} of {len(errors)} within 10 %; lowest {min(errors):+.1%}, highest {max(errors):+.1%}, "
                f"median of the sizes {statistics.median(map(abs, errors)):.1%}.",
            ]
    return "\n".join(lines)


def _cells(found: dict[str, Any], where: str) -> list[str]:
    if f"{where}_error" not in found:
        return ["", "", ""]
    return [
        f"{found[f'{where}_predicted_gib']:.2f}",
        f"{found[f'{where}_measured_gib']:.2f}",
        f"{found[f'{where}_error']:+.1%}",
    ]


@dataclass(frozen=True)
class Cells:
    """Where and how long cells may run.

    Args:
        seconds: no cell is started after this time.
        limit_s: of one cell.
        folder: of the runs' outputs.
    """

    gpus: Sequence[hardware.Gpu]
    jobs: int
    seconds: float
    limit_s: float
    folder: Path

    def run(self, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield each cell's result as it ends; with several jobs `alone` ones first, then large before small."""
        started, running = time.monotonic(), list[Running]()
        needs = {line: need_of(line, self.gpus[0].memory_gib if self.gpus else None) for line in lines}
        waiting = sorted(lines, key=lambda line: -needs[line].gpu_gib - needs[line].host_gib)
        if self.jobs == 1:
            waiting = list(lines)
        first = alone(waiting) if self.gpus and self.jobs > 1 else []
        waiting = [*first, *(line for line in waiting if line not in first)]
        try:
            while waiting or running:
                if time.monotonic() - started > self.seconds:
                    yield from ({"line": line, "status": "no time left"} for line in waiting)
                    waiting = []
                running += self._start(waiting, needs, running, 1 if first else self.jobs)
                wait([each.process.sentinel for each in running], timeout=0.5)
                for each in list(running):
                    if (result := each.result()) is not None:
                        running.remove(each)
                        first = [line for line in first if line != each.line]
                        yield result
        finally:
            for each in running:
                each.kill()

    def _start(
        self, waiting: list[str], needs: dict[str, Need], running: Sequence[Running], jobs: int
    ) -> list[Running]:
        """Start what fits, and take it out of `waiting`."""
        room = Room(tuple(gpu.memory_gib or 0.0 for gpu in self.gpus), hardware.host_memory_gib())
        new: list[Running] = []
        for line in list(waiting):
            there = [(each.gpu, each.need) for each in (*running, *new)]
            gpu = room.place(needs[line], there) if len(there) < jobs else None
            if gpu is not None:
                waiting.remove(line)
                folder = self.folder / _slug(line)
                uuid = self.gpus[gpu].uuid if self.gpus else None
                new.append(Running.start(line, folder, gpu, uuid, needs[line], limit_s=self.limit_s))
        return new


def is_hybrid(line: str) -> bool:
    return line.split()[1] == "hybrid_parallel"


def alone(lines: Sequence[str]) -> list[str]:
    """Return the cells, of those sorted large before small, that show what lies beside an allocator."""
    last = {is_hybrid(line): line for line in lines}
    return list(last.values())


def measure(lines: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield every cell's result, and print each as it ends."""
    _share_cores(options.jobs)
    with contextlib.redirect_stderr(io.StringIO()):
        import_what_can_be_forked()
    outside_gib: dict[bool, float] = {}  # of hybrid_parallel's cells, and of the others
    with tempfile.TemporaryDirectory() as folder:
        cells = Cells(hardware.visible_gpus(), options.jobs, options.seconds, options.limit_seconds, Path(folder))
        for result in cells.run(lines):
            if result["status"] == "ok" and options.jobs > 1 and (own := result["memory"]["outside_gib"]) is not None:
                result["memory"]["outside_gib"] = outside_gib.setdefault(is_hybrid(result["line"]), own)
            print(table([row(result)]).splitlines()[2], flush=True)
            if result["status"].startswith(("exit", "timeout")):
                print(_log_of(result["line"], Path(folder))[-600:], flush=True)
            yield result | {"date": time.strftime("%Y-%m-%d")}


def _slug(line: str) -> str:
    return re.sub(r"\W+", "_", line)


def _log_of(line: str, folder: Path) -> str:
    path = folder / f"{_slug(line)}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def _share_cores(jobs: int) -> None:
    """Set the environment that libraries read at their import."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Asked in CUDA's own way how many GPUs there are, a process cannot be forked any more.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if jobs > 1:
        cores = max(1, (os.cpu_count() or 1) // jobs)
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cores))


def main() -> None:
    """Measure the grid, or compare with an earlier measurement, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for plan_accuracy.md and plan_accuracy.json")
    parser.add_argument("--again", type=Path, help="take the peaks of this plan_accuracy.json instead of measuring")
    parser.add_argument(
        "--grid", type=Path, help="file of lines `size plugin batch length flags` (default: the built-in grid)"
    )
    parser.add_argument("--only", metavar="REGEX", type=re.compile, help="cells whose line it is found in; off: all")
    parser.add_argument(
        "--jobs", type=int, default=1, choices=range(1, MAX_JOBS + 1), help="cells side by side at most (default: 1)"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further cell after this time")
    parser.add_argument("--limit-seconds", type=float, default=180, help="seconds a cell may take (default: 180)")
    options = parser.parse_args()
    if options.again:
        results = json.loads(options.again.read_text())
        write(results, options.output)
    else:
        text = options.grid.read_text() if options.grid else GRID if hardware.visible_gpus() else CPU_GRID
        lines = [line for line in text.strip().splitlines() if line and (not options.only or options.only.search(line))]
        results = []
        for result in measure(lines, options):
            results = sorted([*results, result], key=lambda each: lines.index(each["line"]))
            write(results, options.output)
    print(table([row(result) for result in results]))


def write(results: list[dict[str, Any]], folder: Path | None) -> None:
    """Write plan_accuracy.md and plan_accuracy.json to the folder, if there is one."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan_accuracy.json").write_text(json.dumps(results, indent=1) + "\n")
        page = f"{heading(results)}\n\n{table([row(result) for result in results])}\n"
        (folder / "plan_accuracy.md").write_text(page)


def heading(results: Sequence[dict[str, Any]]) -> str:
    """Return when and on what the cells were measured, and by which command."""
    measured = [result for result in results if result["status"] == "ok"]
    dates = sorted({result.get("date", "") for result in measured})
    devices = sorted({result["device"]["name"] for result in measured})
    versions = {f"{name} {version}" for result in measured for name, version in result["versions"].items() if version}
    parts = [", ".join(each) for each in (dates, devices, sorted(versions)) if each]
    return f"# The plan beside what was measured\n\n    python -m benchmarks.plan_accuracy\n\n{'; '.join(parts)}."


if __name__ == "__main__":
    main()
