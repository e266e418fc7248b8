"""The ranks of one of equivalence.py's process groups: they run cases one after the other through train_clm.py's functions.

    python -m benchmarks.equivalence_worker RANKS RANKS_PER_GPU FOLDER GROUP

FOLDER holds weights and rows, GROUP, the process group's own, `orders.json`: a list of cases. Ranks are forked, since
importing the libraries takes longer than most cases. Rank 0 appends what it found to `found.jsonl` in GROUP. A rank that
fails appends its error and ends, which ends the group: the caller starts another one for the rest.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import checkpoint
import model
import strategy
import train_clm
from args import ConfigError, TrainArgs, parse_args, problems
from benchmarks.forks import fork_ranks, import_what_can_be_forked
from data import DataInfo, PreparedData, TokenRows
from recorder import Job, Recorder
from runtime import Runtime, current_runtime, start_process_group
from trainer import Evaluation, StepResult

COLLECTIVE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Order:
    """A case as a rank needs it.

    Args:
        flags: of train_clm.py.
        texts: name of the file with the rows.
        fault: what to do wrong on purpose, a key of FAULTS; empty: nothing.
    """

    name: str
    flags: list[str]
    texts: str
    fault: str = ""


class FixedRows(TokenRows):
    """Rows of token ids that lie in memory; of one length they count as packed."""

    def __init__(self, rows: list[list[int]], split: str) -> None:
        lengths = np.array([len(row) for row in rows])
        info = DataInfo("text", split, int(lengths.sum()), 0, len(rows))
        super().__init__(info, None if len(set(lengths)) == 1 else lengths)
        self._rows = rows

    def _row(self, index: int) -> np.ndarray:
        return np.array(self._rows[index])


class UntrainedSource(model.ModelSource):
    """Weights of a folder that were never trained: a first loss no better than chance is no error."""

    pretrained = False


class Book:
    """What train_clm.train reports; stands in for its Recorder."""

    def __init__(self) -> None:
        self.steps: list[StepResult] = []
        self.evaluations: list[float] = []

    def start(self, num_steps: int) -> None: ...

    def on_step(self, result: StepResult) -> None:
        self.steps.append(result)

    def on_evaluation(self, evaluation: Evaluation, step: int, ended: str) -> None:
        self.evaluations.append(evaluation.loss)


def main(num_ranks: int, ranks_per_gpu: int, folder: Path, group: Path) -> None:
    """Import what the ranks need, and fork them.

    Raises:
        torch.multiprocessing.ProcessExitedException: a rank failed; the others were ended.
    """
    import_what_can_be_forked()
    gc.freeze()  # what is imported stays: no collection of a rank's needs to look at it
    fork_ranks(run_rank, num_ranks, ranks_per_gpu, folder, group)


def run_rank(ranks_per_gpu: int, folder: Path, group: Path) -> None:
    """Run the orders of a process group."""
    process = sharing(current_runtime(), ranks_per_gpu)
    if process.on_cpu:
        torch.set_num_threads(1)
    start_process_group(process, timeout_s=COLLECTIVE_TIMEOUT_S)
    for fields in json.loads((group / "orders.json").read_text()):
        order = Order(**fields)
        try:
            found = run(order, process, folder)
        except Exception:
            append(group, {"name": order.name, "error": traceback.format_exc()})
            os._exit(1)  # clean-up could wait for ranks that are still in a collective
        if process.is_main:
            append(group, found)
    dist.barrier()
    os._exit(0)  # ColossalAI's process groups complain when the interpreter ends


def sharing(process: Runtime, ranks_per_gpu: int) -> Runtime:
    """Return where a process stands whose GPU also has the ranks beside it; each GPU then counts as several."""
    if process.on_cpu:
        return process
    device = torch.device("cuda", process.local_rank // ranks_per_gpu)
    return replace(process, device=device, num_gpus=process.num_gpus * ranks_per_gpu)


def append(group: Path, found: dict[str, Any]) -> None:
    with open(group / "found.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def run(order: Order, process: Runtime, folder: Path) -> dict[str, Any]:
    """Train or evaluate as the flags say, export what was trained, and return the numbers."""
    started = time.perf_counter()
    job, book = prepare(order, process, folder), Book()
    never_stops = SimpleNamespace(number=0)
    with FAULTS[order.fault]():
        engine, _ = train_clm.train(job, cast(Recorder, book), cast(Any, never_stops), None)
    if not job.args.eval_only:
        checkpoint.export(engine, job.source, None, folder / "finals" / order.name)
    chunks = chunk_shares(engine) if job.args.plugin == "gemini" else None
    num_updates = 0 if job.args.eval_only else engine.adam_step
    engine.close()
    del engine
    gc.collect()
    if job.args.compile == "on":
        torch._dynamo.reset()  # past eight graphs of one function the rest of this process would not be compiled
    return {
        "name": order.name,
        "losses": [step.loss for step in book.steps],
        "grad_norms": [step.grad_norm if step.grad_norm is None else float(step.grad_norm) for step in book.steps],
        "evaluations": book.evaluations,
        "num_skipped": len(book.steps) - num_updates,
        "chunk_shares": chunks,
        "seconds": time.perf_counter() - started,
    }


def prepare(order: Order, process: Runtime, folder: Path) -> Job:
    """Return what train_clm.prepare would, with rows of our own."""
    args = parse_args(order.flags)
    source = UntrainedSource(**vars(model.find_model(args)))
    if found := problems(
        args, world_size=process.world_size, num_gpus=process.num_gpus, gpus_per_node=process.local_world_size
    ):
        raise ConfigError(*found)
    shape = model.shape_of(source)
    choice, args = train_clm.resolve(args, process, source, shape)
    rows = {split: FixedRows(texts, split) for split, texts in json.loads((folder / order.texts).read_text()).items()}
    prepared = PreparedData(None if args.eval_only else rows["train"], rows["validation"], "")
    return Job(args, process, source, shape, prepared, choice)


def chunk_shares(engine: strategy.Engine) -> list[float]:
    """Return the share of each of Gemini's chunks that this rank holds."""
    boosted = engine.model
    chunks = [
        chunk
        for parameters in (boosted.fp16_params, boosted.fp32_params)
        for chunk in boosted.chunk_manager.get_chunks(parameters)
    ]
    return [chunk.payload.numel() / chunk.chunk_size for chunk in chunks]


# --- faults: what the comparison must notice --------------------------------------------------------------------------


def mean_of_means() -> AbstractContextManager[Any]:
    """Divide each micro-batch's loss by its own number of targets, as plain averaging does."""

    def wrong(self: strategy.Engine, batch: dict[str, Tensor], scale: Tensor, **options: Any) -> None:
        num_targets = max(model.count_targets(batch["labels"]), 1)
        share = 1.0 / (num_targets * self.args.gradient_accumulation_steps)
        right(self, batch, torch.full_like(scale, share), **options)

    right = strategy.Engine.forward_backward
    return patch.object(strategy.Engine, "forward_backward", wrong)


def no_clipping() -> AbstractContextManager[Any]:
    """Build the plugin without the clipping that was asked for."""

    def wrong(self: strategy.Engine, args: TrainArgs, *others: Any) -> None:
        right(self, replace(args, max_grad_norm=0.0), *others)

    right = strategy.Engine.__init__
    return patch.object(strategy.Engine, "__init__", wrong)


def other_masks() -> AbstractContextManager[Any]:
    """Draw the dropout masks of another seed."""
    right = strategy.Engine.seed_dropout
    return patch.object(strategy.Engine, "seed_dropout", lambda self, seed: right(self, seed + 1))


def untied_stages() -> AbstractContextManager[Any]:
    """Let the pipeline's first and last stage update their copy of the embedding each by its own gradient."""
    from colossal_ext import pipeline_barrier

    return patch.object(pipeline_barrier, "_sync_shared_params", lambda self: None)


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "mean of means": mean_of_means,
    "no clipping": no_clipping,
    "other masks": other_masks,
    "untied stages": untied_stages,
}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
