"""What the peers share: flags, weights, rows, the clock, and the closing line of JSON with the fields of result.json."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_scheduler

import data
import report
from args import TrainArgs
from model import opt_config
from opt_sizes import OPT_SHAPES
from planner import model_shape
from runtime import EXIT_NAN, EXIT_OK, EXIT_OOM, current_runtime, leave_now

Batch = dict[str, Tensor]

# Flags of train_clm.py that a peer takes as well, with the same meaning and default.
SHARED_FLAGS = (
    "model_name_or_path", "per_device_train_batch_size", "block_size", "max_train_steps", "dropout", "weight_decay",
    "max_grad_norm", "precision", "mem_cap", "dataloader_num_workers", "seed",
)  # fmt: skip


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the flags that every peer has: `SHARED_FLAGS`, `--recompute` and `--device_init`."""
    result = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for spec in fields(TrainArgs):
        if spec.name in SHARED_FLAGS:
            options = {name: value for name, value in spec.metadata.items() if name != "group"}
            result.add_argument(f"--{spec.name}", default=spec.default, **options)
    result.add_argument("--recompute", action="store_true", help="recompute the activations of every layer")
    result.add_argument(
        "--device_init",
        action="store_true",
        help="draw the weights on the GPU: a minute less for 6.7b, but other numbers than those of train_clm.py",
    )
    return result


@dataclass
class Clock:
    """Times steps without making the device wait: CUDA events, or the wall clock on a CPU."""

    device: torch.device
    marks: list[Any] = field(default_factory=list)

    def mark(self) -> None:
        """Note that all work given to the device so far belongs to the steps before."""
        if self.device.type == "cpu":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Return the time between neighbouring marks; waits for the device."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cpu":
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


class Job:
    """One run of a peer: its settings, and what was measured of it.

    Args:
        peer: its name in the table.
        options: `parser()`'s, and maybe the peer's own.
    """

    def __init__(self, peer: str, options: argparse.Namespace) -> None:
        self.peer = peer
        self.args = TrainArgs(
            dataset="synthetic", **{name: value for name, value in vars(options).items() if name in SHARED_FLAGS}
        )
        self.recompute, self.device_init = options.recompute, options.device_init
        self.shape = OPT_SHAPES[self.args.model_name_or_path]
        self.config = opt_config(self.shape)
        self.config.use_cache = False
        if self.args.dropout is not None:
            self.config.dropout = self.args.dropout
        self.runtime = current_runtime()
        self.device = self.runtime.device
        self.clock = Clock(self.device)
        self.losses: list[Tensor] = []
        self.first_step_time_s: float | None = None
        self.notes: list[str] = []

    @property
    def num_steps(self) -> int:
        return self.args.max_train_steps or 20

    @property
    def precision(self) -> str:
        """bf16 on a GPU and fp32 on a CPU, as train_clm.py, unless --precision says otherwise."""
        if self.args.precision != "auto":
            return self.args.precision
        return "fp32" if self.runtime.on_cpu else "bf16"

    def limit_memory(self) -> None:
        """Keep the allocator under --mem_cap, the way train_clm.py does."""
        if self.args.mem_cap and not self.runtime.on_cpu:
            total_bytes = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.args.mem_cap * 1e9 / total_bytes))

    def build_model(self) -> nn.Module:
        """Return the model in fp32; the peaks of memory count from here.

        Its weights are those that train_clm.py starts from, unless --device_init was given.
        """
        torch.manual_seed(self.args.seed)
        with torch.device(self.device if self.device_init else "cpu"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, attn_implementation="sdpa")
        if self.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not self.runtime.on_cpu:
            torch.cuda.reset_peak_memory_stats()
        return model.train()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that computes in `precision` while parameters stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def learning_rate(self) -> float:
        """Peak rate of the OPT paper, which train_clm.py takes for random weights."""
        return self.shape.learning_rate

    def schedule(self, optimizer: Any) -> LRScheduler:
        return get_scheduler("linear", optimizer, 0, self.num_steps)

    def rows(self) -> data.TokenRows:
        """Return the training rows of train_clm.py's `--dataset synthetic`."""
        prepared = data.prepare(
            self.args,
            tokenizer=None,
            vocab_size=self.config.vocab_size,
            max_positions=self.config.max_position_embeddings,
            global_batch_size=self.args.global_batch_size(self.runtime.world_size),
        )
        assert prepared.train is not None
        return prepared.train

    def order(self, rows: data.TokenRows) -> data.EpochSampler:
        """Return the order in which this rank of train_clm.py takes its rows in the first epoch."""
        make = functools.partial(data.EpochSampler, rows, self.runtime.world_size, self.runtime.rank, True)
        return make(seed=self.args.seed, batch_size=self.args.per_device_train_batch_size, group_by_length=False)

    def batches(self) -> Iterator[Batch]:
        """Yield each step's batch on the device, copied from pinned memory while the device works."""
        rows = self.rows()
        loader: DataLoader[Any] = DataLoader(
            rows,
            self.args.per_device_train_batch_size,
            sampler=self.order(rows),
            collate_fn=data.Collator(pad_token_id=0),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=not self.runtime.on_cpu,
        )
        for batch in loader:
            yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def train(self, train_step: Callable[[Batch], Tensor]) -> None:
        """Time `train_step`, which updates the weights once and returns its loss, over all batches."""
        batches = self.batches()
        self.clock.mark()
        for batch in batches:
            self.end_step(train_step(batch))

    def end_step(self, loss: Tensor) -> None:
        """Record a step whose work has been given to the device; only the first one is waited for."""
        self.losses.append(loss.detach().float())
        self.clock.mark()
        if self.first_step_time_s is None:
            if not self.runtime.on_cpu:
                torch.cuda.synchronize()
            self.first_step_time_s = time.time()

    def result(self, status: str, *, alone: bool = False) -> dict[str, Any]:
        """Return the essentials of result.json, with `notes` and the Unix time at which the first step was done.

        A collective, where there are other ranks.

        Args:
            alone: only this rank is here.
        """
        alone = alone or not dist.is_initialized()
        losses = [float(loss) for loss in (self.losses if alone else self._mean_losses())]
        args = self.args
        rows_per_step = args.global_batch_size(self.runtime.world_size)
        meter = report.StepMeter()
        for seconds in self.clock.seconds() if status == "ok" else []:
            meter.add(seconds, tokens=rows_per_step * args.block_size, samples=rows_per_step)
        shape = model_shape(self.shape)
        recomputed_layers = self.shape.num_layers if self.recompute else 0
        flops = report.token_flops(shape, args.block_size, recomputed_layers=recomputed_layers)
        peak = report.peak_of(self.runtime.device_name, self.precision)
        throughput = meter.throughput(flops, num_devices=self.runtime.world_size, peak=peak)
        return {
            "status": status,
            "plugin": self.peer,
            "device": asdict(
                report.Device(self.runtime.device_name, self.runtime.world_size, self.runtime.device_memory_gib)
            ),
            "versions": report.versions(),
            "steps": len(self.losses),
            "train_loss": [[step, loss] for step, loss in enumerate(losses, start=1)],
            "throughput": asdict(throughput) if throughput else None,
            "memory": asdict(self._memory(alone=alone)),
            "first_step_time_s": self.first_step_time_s,
            "notes": "; ".join(self.notes),
        }

    def _mean_losses(self) -> list[Tensor]:
        """Return each step's mean over the ranks, whose rows are equally many and equally long. A collective."""
        losses = torch.stack(self.losses)
        dist.all_reduce(losses)
        return list(losses / self.runtime.world_size)

    def _memory(self, *, alone: bool) -> report.Memory:
        """Return the maxima over the ranks. A collective, unless `alone`."""
        peaks = [0, 0] if self.runtime.on_cpu else [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
        maxima = torch.tensor(
            [*peaks, report.host_peak_rss_gib() * report.GIB], dtype=torch.float64, device=self.device
        )
        if not alone:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        allocated, reserved, host = (maxima / report.GIB).tolist()
        cap_gib = self.args.mem_cap * 1e9 / report.GIB if self.args.mem_cap else None
        if self.runtime.on_cpu:
            return report.Memory(None, None, cap_gib, host)
        return report.Memory(allocated, reserved, cap_gib, host)


def run(job: Job, body: Callable[[Job], None], *, needs: str | None = None) -> None:
    """Run a peer to its line of JSON and its exit code.

    Args:
        needs: the package that the peer is; where it is not installed the run is skipped.
    """
    if needs and importlib.util.find_spec(needs) is None:
        _finish({"status": "skipped", "plugin": job.peer, "notes": f"{needs} is not installed"}, EXIT_OK)
    if needs:
        job.notes.append(f"{needs} {importlib.metadata.version(needs)}")
    if not job.runtime.on_cpu:
        torch.cuda.set_device(job.device)
    job.limit_memory()
    try:
        body(job)
    except torch.OutOfMemoryError as error:
        job.notes.append(str(error).splitlines()[0])
        print(json.dumps(job.result("oom", alone=True)), flush=True)
        leave_now(EXIT_OOM)  # the other ranks wait for this one
    result = job.result("ok")
    if dist.is_initialized():
        dist.destroy_process_group()
    if not all(math.isfinite(loss) for _, loss in result["train_loss"]):
        _finish({**result, "status": "nan", "train_loss": []}, EXIT_NAN)
    _finish(result, EXIT_OK)


def _finish(result: dict[str, Any], code: int) -> None:
    """Print the result, once for all ranks, and end the process."""
    if current_runtime().is_main:
        print(json.dumps(result), flush=True)
    sys.exit(code)
