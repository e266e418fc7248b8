"""Make the tables of docs/scaling.md: predictions for clusters, and predictions beside what was measured.

    python -m benchmarks.scaling                                # predictions alone; a second, no GPU
    python -m benchmarks.scaling --measured outputs/scaling     # and every result.json below a folder beside its prediction

The measured runs are those of run_clm_synthetic.sh, of `python -m benchmarks.side_by_side --case gpus`, or of any
training: settings and speed are read from their result.json. With --output the tables replace those of the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planner
import scaling
from args import microbatch_numbers
from opt_sizes import OPT_SHAPES
from scaling import Job, Machines, Prediction

MODELS = ("13b", "66b", "175b")
CLUSTERS = (Machines(8), Machines(8, 8), Machines(8, 64))
ROWS, BLOCK_SIZE = 4, 2048
BEGIN, END = "<!-- tables: python -m benchmarks.scaling -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Measured:
    """A run, and what was predicted of it.

    Args:
        tokens_per_s, memory_gib: measured; the latter is the allocator's peak, None where it was not taken.
    """

    name: str
    device: str
    num_gpus: int
    tokens_per_s: float
    memory_gib: float | None
    prediction: Prediction

    @property
    def error(self) -> float:
        """The prediction's, as a share of what was measured."""
        return self.prediction.tokens_per_s / self.tokens_per_s - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or put them into the page."""
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--measured", type=Path, metavar="DIR", help="folder of runs; off: predictions alone")
    parser.add_argument("--output", type=Path, metavar="PAGE", help="page whose tables are replaced; off: print them")
    options = parser.parse_args(argv)
    if options.output and not options.output.is_file():
        parser.error(f"--output {options.output}: no such page; it is given other tables, not made")
    text = clusters_text()
    if options.measured:
        text += "\n\n" + measured_text(read_runs(options.measured))
    if not options.output:
        print(text)
        return 0
    options.output.write_text(replaced(options.output.read_text(), text))
    return 0


def replaced(page: str, tables: str) -> str:
    """Return the page with other tables between its two marks."""
    head, _, rest = page.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise ValueError(f"the page lacks the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{tables}\n\n{END}{tail}"


def clusters_text() -> str:
    """Return a table a model: each plugin's best setting on each cluster."""
    parts = []
    for model in MODELS:
        job = Job(planner.model_shape(OPT_SHAPES[model]), ROWS, BLOCK_SIZE, scaling.GPU_GIB)
        rows = [
            [f"{machines.world_size}", *scaling.cells(each)]
            for machines in CLUSTERS
            for each in scaling.compare(job, machines)
        ]
        fitting = {row[0] for row in rows}
        rows += [[f"{each.world_size}", "none fits"] for each in CLUSTERS if str(each.world_size) not in fitting]
        rows.sort(key=lambda row: int(row[0]))
        parts.append(
            f"**{model}**, {ROWS} x {BLOCK_SIZE} tokens a GPU, predicted\n\n{markdown(('GPUs', *scaling.HEAD), rows)}"
        )
    return "\n\n".join(parts)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; short rows are filled up."""
    lines = [head, ["---"] * len(head), *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------------- measured runs


def read_runs(folder: Path) -> list[Measured]:
    """Return the runs below a folder that ended well on GPUs and measured a speed, smallest first."""
    found = [run for path in sorted(folder.rglob("result.json")) if (run := measured(json.loads(path.read_text())))]
    return sorted(found, key=lambda run: (run.prediction.request.shape.num_params, run.num_gpus, run.name))


def measured(result: dict[str, Any], *, gpus_per_machine: int = 8) -> Measured | None:
    """Return a run beside its prediction; None for one that this page is not about, or that accumulates gradients."""
    args, device, speed = result.get("args", {}), result["device"], result.get("throughput")
    is_predicted = args.get("model_name_or_path") in OPT_SHAPES and args["gradient_accumulation_steps"] == 1
    if result["status"] != "ok" or not speed or device["name"] == "cpu" or not is_predicted:
        return None
    world_size = device["count"]
    machines = Machines(min(world_size, gpus_per_machine), max(1, world_size // gpus_per_machine))
    prediction = scaling.predict(request_of(args, world_size, device["memory_gib"]), machines)
    name = f"{args['model_name_or_path']}, {scaling.setting_of(prediction.request)}"
    peak_gib = (result.get("memory") or {}).get("peak_allocated_gib")
    return Measured(name, device["name"], world_size, speed["tokens_per_s"], peak_gib, prediction)


def request_of(args: dict[str, Any], world_size: int, gpu_gib: float | None) -> planner.PlanRequest:
    """Return a run's settings as the planner takes them."""
    tp, pp = args["tp"], args["pp"]
    rows = args["per_device_train_batch_size"] * tp * pp
    shape = OPT_SHAPES[args["model_name_or_path"]]
    # Where a result holds none, the most were taken (until 2026-11-27).
    microbatches = args["num_microbatches"] or microbatch_numbers(rows, pp)[-1]
    # Gemini's results without it fetched nothing ahead (until 2026-11-28).
    max_prefetch = int(args.get("max_prefetch", 0)) if args["plugin"] == "gemini" else None
    return planner.PlanRequest(
        shape=planner.model_shape(shape),
        plugin=args["plugin"],
        precision=args["precision"],
        world_size=world_size,
        batch_size=rows,
        block_size=args["block_size"],
        zero_stage=args["zero_stage"] or 0,
        tp=tp,
        pp=pp,
        num_microbatches=microbatches if pp > 1 else 1,
        pp_chunks=(args.get("num_model_chunks") or 2) if pp > 1 and args["pp_schedule"] == "interleaved" else 1,
        checkpointed_layers=int(args["gradient_checkpointing"]),
        offload_optim_frac=args["offload_optim_frac"],
        offload_param_frac=args["offload_param_frac"],
        max_prefetch=max_prefetch,
        compiled=args["compile"] == "on",
        cuda_graphs=args.get("cuda_graphs", "off"),  # which older results lack
        dropout=(shape.dropout if args["dropout"] is None else args["dropout"]) > 0,
        random_weights=args["from_scratch"],
        gpu_gib=gpu_gib,
    )


def measured_text(runs: Sequence[Measured]) -> str:
    """Return the table of runs, with the largest error below it."""
    head = ("run", "device", "GPUs", "tokens/s", "predicted", "error", "GPU GiB", "predicted")
    rows = [
        [
            run.name, run.device, f"{run.num_gpus}", f"{run.tokens_per_s:,.0f}", f"{run.prediction.tokens_per_s:,.0f}",
            f"{run.error:+.0%}", "-" if run.memory_gib is None else f"{run.memory_gib:.1f}",
            f"{(run.prediction.plan.total_bytes - run.prediction.plan.device_bytes.framework) / planner.GIB:.1f}",
        ]
        for run in runs
    ]  # fmt: skip
    worst = max((abs(run.error) for run in runs), default=0.0)
    return f"{markdown(head, rows)}\n\nThe largest error of {len(runs)} runs is {worst:.0%}."


if __name__ == "__main__":
    sys.exit(main())
