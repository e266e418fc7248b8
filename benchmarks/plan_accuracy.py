"""The planner's predicted peak beside the measured one, over sizes, plugins, batches, lengths, recompute and offload.

    python -m benchmarks.plan_accuracy                      # the grid, on one GPU: about 6 minutes
    python -m benchmarks.plan_accuracy --output DIR         # plan_accuracy.md and .json there
    python -m benchmarks.plan_accuracy --again FILE.json    # today's planner against the peaks measured then

Libraries are imported once; each cell is a process forked from there, a few steps of train_clm.py long.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import planner  # noqa: E402
from args import TrainArgs, parse_args  # noqa: E402
from opt_sizes import OPT_SHAPES  # noqa: E402

STEPS = 3
LIMIT_S = 90
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


def command_of(line: str) -> list[str]:
    """Return train_clm.py's arguments for a line of the grid: size, plugin, batch, length, flags."""
    size, plugin, batch, length, *flags = line.split()
    return [
        *f"--model_name_or_path {size} --from_scratch --dataset synthetic --plugin {plugin}".split(),
        *f"--per_device_train_batch_size {batch} --block_size {length} --max_train_steps {STEPS}".split(),
        *"--save_strategy no --no-save_final --eval_strategy no".split(),
        *flags,
    ]


def run_cell(line: str, folder: Path) -> dict[str, Any]:
    """Train in a forked process and return its result.json, or why there is none."""
    child = multiprocessing.get_context("fork").Process(target=_train, args=(command_of(line), folder))
    child.start()
    child.join(LIMIT_S)
    if child.is_alive():
        child.kill()
        child.join()
        return {"line": line, "status": "timeout"}
    path = folder / "result.json"
    if not path.exists():
        return {"line": line, "status": f"exit {child.exitcode}"}
    return {"line": line, **json.loads(path.read_text())}


def _train(arguments: list[str], folder: Path) -> None:
    import runtime
    import train_clm

    process = runtime.current_runtime()
    with open(folder.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        runtime.start_logging(process)
        code = train_clm.run(parse_args([*arguments, "--output_dir", str(folder)]), process)
    os._exit(code)


def predicted(result: dict[str, Any]) -> planner.Plan:
    """Return today's plan for the settings of a result."""
    names = {spec.name for spec in fields(TrainArgs)}
    known = {name: value for name, value in result["args"].items() if name in names}
    args = TrainArgs(**known | {"prompt": ()})
    size = result["model"]["name"]
    return planner.resolve_auto(
        args,
        planner.model_shape(OPT_SHAPES[size]),
        world_size=result["device"]["count"],
        gpu_gib=result["device"]["memory_gib"],
        host_gib=None,
        dropout=OPT_SHAPES[size].dropout > 0,
    ).plan


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


def measure(lines: list[str], seconds: float) -> list[dict[str, Any]]:
    """Run every cell until the time is up, and print each as it ends."""
    import runtime

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.redirect_stderr(io.StringIO()):
        _import_what_can_be_forked(runtime)
    results, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(lines):
            if time.monotonic() - started > seconds:
                results.append({"line": line, "status": "no time left"})
                continue
            results.append(run_cell(line, Path(folder) / str(number)))
            print(table([row(results[-1])]).splitlines()[2], flush=True)
            if results[-1]["status"] != "ok":
                print((Path(folder) / f"{number}.log").read_text()[-600:], flush=True)
    return results


def _import_what_can_be_forked(runtime: Any) -> None:
    """Import what takes longest, but ColossalAI, whose import makes a CUDA context: that does not survive a fork."""
    runtime.quiet_third_parties(runtime.Runtime(0, 1, 0, 1, torch_cpu(), 0))
    import datasets  # noqa: F401
    from transformers import OPTForCausalLM  # noqa: F401

    import recorder  # noqa: F401


def torch_cpu() -> Any:
    """Return torch's CPU device; torch is imported late, so that --help answers at once."""
    import torch

    return torch.device("cpu")


def main() -> None:
    """Measure the grid, or compare with an earlier measurement, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for plan_accuracy.md and plan_accuracy.json")
    parser.add_argument("--again", type=Path, help="take the peaks of this plan_accuracy.json instead of measuring")
    parser.add_argument(
        "--grid", type=Path, help="file of lines `size plugin batch length flags` (default: the built-in grid)"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further cell after this time")
    options = parser.parse_args()
    if options.again:
        results = json.loads(options.again.read_text())
    else:
        text = options.grid.read_text() if options.grid else GRID
        results = measure([line for line in text.strip().splitlines() if line], options.seconds)
    text = table([row(result) for result in results])
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "plan_accuracy.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.output / "plan_accuracy.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
