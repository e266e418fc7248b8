"""One step, one evaluation, and the loop."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import data
from args import TrainArgs
from checkpoint import Progress
from model import IGNORED, count_targets
from pace import SlowRanks, Stopwatch
from runtime import StopSignal, log
from strategy import Engine
from watchdog import Pulse

Batch = dict[str, Tensor]

# Graphs and optimizer states are there after so many steps of a run.
FIRST_STEPS = 2


class NonFiniteLoss(RuntimeError):
    """A step's global loss, gradient norm or weights are NaN or infinite; raised on every rank, before a save."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer update, summed over the world.

    Args:
        loss: mean over the step's real targets, nats a token.
        grad_norm: global gradient norm before clipping, None where clipping is off; a tensor is not there yet.
        num_tokens, num_samples: without padding.
        seconds: wall time since the step before, loading included. On a GPU each step waits for its own loss, so that
            the times of consecutive steps add up to the device's time, though the last work of a step counts in the next.
    """

    step: int
    loss: float
    grad_norm: Tensor | float | None
    learning_rate: float
    num_tokens: int
    num_samples: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood over `num_tokens` predicted tokens of the whole split."""

    loss: float
    num_tokens: int


@dataclass(frozen=True)
class Schedule:
    """How long the run is: epochs, and the number of steps at which it stops."""

    num_epochs: int
    num_steps: int


def plan_schedule(batches_per_epoch: int, args: TrainArgs) -> Schedule:
    """Return epochs and steps; `--max_train_steps` overrides the epochs."""
    steps_per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        return Schedule(args.num_train_epochs, steps_per_epoch * args.num_train_epochs)
    return Schedule(math.ceil(args.max_train_steps / steps_per_epoch), args.max_train_steps)


@dataclass(frozen=True)
class Hooks:
    """What the loop calls; none of them may change the model.

    Args:
        on_step: gets each step's result.
        at_first_loss: gets the loss of the run's first step.
        evaluate: gets the step, and what has ended, e.g. `epoch 1`; called where `--eval_strategy` and `--eval_steps` say.
        save: gets where the run is; called where `--save_strategy` and `--save_steps` say, and at a signal.
    """

    on_step: Callable[[StepResult], None] = lambda result: None
    at_first_loss: Callable[[float], None] = lambda loss: None
    evaluate: Callable[[int, str], None] = lambda step, ended: None
    save: Callable[[Progress], None] = lambda progress: None


class Trainer:
    """Runs an engine over its data.

    Args:
        pulse: is kept at where the loop stands.
    """

    def __init__(
        self, engine: Engine, stop: StopSignal, hooks: Hooks, progress: Progress, pulse: Pulse | None = None
    ) -> None:
        self.engine, self.stop, self.hooks, self.progress = engine, stop, hooks, progress
        self.pulse = pulse or Pulse()
        self.interrupted = False
        self._stopwatch = Stopwatch(on_cpu=engine.runtime.on_cpu)
        self._slow_ranks = SlowRanks(log.warning, engine.args.logging_steps)
        self._own_s = 0.0
        self._spared_collector = _SparedCollector()
        self._clock = time.perf_counter()
        self._saved_step = progress.step
        self._evaluated_step: int | None = None

    def train(self, batches: DataLoader[Any], schedule: Schedule) -> None:
        """Train from where the progress stands until the schedule ends or a signal asks to stop.

        Raises:
            NonFiniteLoss: on every rank, before a checkpoint holds the bad step.
        """
        progress_bar = _progress_bar(schedule.num_steps, self.engine.runtime.is_main)
        with logging_redirect_tqdm([log]), self._spared_collector, progress_bar as bar:
            bar.update(self.progress.step)
            if self.progress.step >= schedule.num_steps:  # a signal came in the last step
                self._evaluate()
            while self.progress.step < schedule.num_steps and not self.interrupted:
                self._train_epoch(batches, schedule, bar)
        self.pulse.mark("the end of the run", self.progress.step)
        self._require_finite_weights()

    def _train_epoch(self, batches: DataLoader[Any], schedule: Schedule, bar: tqdm) -> None:
        args, epoch = self.engine.args, self.progress.epoch
        cast(data.EpochSampler, batches.sampler).set_epoch(epoch, start=self.progress.rows)
        self._clock = time.perf_counter()
        self._start_loading()
        for micro_batches in data.batches(batches, args.gradient_accumulation_steps):
            result = self.train_step(micro_batches)
            if result.step == 1:
                self.hooks.at_first_loss(result.loss)
            self.hooks.on_step(result)
            _show(bar, result)
            self._spared_collector.count_step()
            if args.eval_steps and result.step % args.eval_steps == 0 and not self.interrupted:
                self._evaluate()
            if self.interrupted or (args.save_steps and result.step % args.save_steps == 0):
                self._save()
            if self.interrupted:
                return
            if result.step == schedule.num_steps:
                break
            self._start_loading()
        else:
            self.progress = replace(self.progress, epoch=epoch + 1, rows=0)
        if args.eval_strategy == "epoch":
            self._evaluate(f"epoch {epoch + 1}")
        elif self.progress.step == schedule.num_steps:
            self._evaluate()
        if args.save_strategy == "epoch":
            self._save()

    def _start_loading(self) -> None:
        self.pulse.mark("data", self.progress.step + 1)
        self._stopwatch.start_loading()

    def _evaluate(self, ended: str = "") -> None:
        if self.engine.args.eval_strategy != "no" and self._evaluated_step != self.progress.step:
            self.pulse.mark("evaluation", self.progress.step)
            self.hooks.evaluate(self.progress.step, ended or f"step {self.progress.step}")
            self._evaluated_step = self.progress.step
            self._clock = time.perf_counter()

    def _save(self) -> None:
        self.pulse.mark("checkpoint", self.progress.step)
        if self.engine.args.save_strategy != "no" and self._saved_step < self.progress.step:
            self._require_finite_weights()
            self.hooks.save(self.progress)
            self._saved_step = self.progress.step
            self._clock = time.perf_counter()

    def _require_finite_weights(self) -> None:
        """A finite loss may have a gradient that is not; without clipping nobody has looked at it."""
        if not self.engine.weights_are_finite():
            raise NonFiniteLoss(f"the weights after step {self.progress.step} are not finite; they are not saved")

    def train_step(self, micro_batches: list[Batch]) -> StepResult:
        """Update the weights once from the rows of all ranks; the loss is normalised by their global target count."""
        engine, step = self.engine, self.progress.step + 1
        self.pulse.mark("forward", step)
        self._stopwatch.end_loading()
        counts = self._global_counts(micro_batches)
        is_logged = step % engine.args.logging_steps == 0
        self._stopwatch.start_forward(is_local=engine.forward_is_local(settled=is_logged))
        scale = (engine.dp_size / counts[0].clamp(min=1)).float()
        totals = _StepTotals(step, counts)

        def at_loss(loss: Tensor, *, first: bool, last: bool) -> None:
            self.pulse.mark("backward", step)
            if first:
                self._stopwatch.end_forward()
            totals.add(loss, last=last)
            if last and engine.steps_in_backward:
                totals.check()

        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            engine.forward_backward(batch, scale, last=last, at_loss=partial(at_loss, first=index == 0, last=last))
        totals.check()
        loss, _, num_tokens, num_samples, stop, *own_s = totals.read()
        self._own_s = self._stopwatch.seconds()
        self.pulse.mark("update", step)
        learning_rate = engine.learning_rate
        grad_norm = engine.step()
        # One that is still on its way shows in the next loss, or in the weights before they are saved. In fp16 the
        # loss scale is lowered and the step skipped.
        in_fp16 = engine.args.precision == "fp16"
        if isinstance(grad_norm, float) and not math.isfinite(grad_norm) and not in_fp16:
            raise NonFiniteLoss(f"the gradient norm of step {step} is {grad_norm}; its weights are not saved")
        self.interrupted = stop > 0
        self.progress = replace(
            self.progress,
            step=step,
            rows=self.progress.rows + int(num_samples),
            tokens=self.progress.tokens + int(num_tokens),
        )
        started, self._clock = self._clock, time.perf_counter()
        seconds = self._clock - started
        if engine.runtime.is_main:
            self._slow_ranks.add(own_s, seconds)
        return StepResult(step, loss, grad_norm, learning_rate, int(num_tokens), int(num_samples), seconds)

    def _global_counts(self, micro_batches: list[Batch]) -> Tensor:
        """Return what every rank must know of the step, (4 + world,) float64.

        These are targets, tokens, rows, ranks asked to stop, and each rank's own work in the step before, in seconds.
        """
        own = [0, 0, 0]
        if self.engine.counts:
            labels = [batch["labels"] for batch in micro_batches]
            own = [
                sum(count_targets(each) for each in labels),
                sum(int((each != IGNORED).sum()) for each in labels),
                sum(int((each[:, 0] != IGNORED).sum()) for each in labels),
            ]
        runtime = self.engine.runtime
        own_s = [0.0] * runtime.world_size
        own_s[runtime.rank] = self._own_s
        counts = torch.tensor([*own, self.stop.number > 0, *own_s], dtype=torch.float64)
        if not runtime.on_cpu:
            # From pinned memory the copy waits for nothing; otherwise the device runs dry before each step.
            counts = counts.pin_memory().to(runtime.device, non_blocking=True)
        dist.all_reduce(counts)
        return counts


class _StepTotals:
    """A step's loss and counts over the world, on their way to the host while the device goes on."""

    def __init__(self, step: int, counts: Tensor) -> None:
        self._step, self._counts = step, counts
        self._loss_sum = torch.zeros((), device=counts.device)
        self._totals = counts
        self._arrived: torch.cuda.Event | None = None

    def add(self, loss: Tensor, *, last: bool) -> None:
        """Add this rank's summed loss of a micro-batch; a collective for the last one."""
        self._loss_sum += loss
        if not last:
            return
        mean_loss = self._loss_sum / self._counts[0].clamp(min=1)
        totals = torch.cat([mean_loss.reshape(1), self._counts])
        dist.all_reduce(totals[:1])
        self._totals = totals
        if totals.device.type == "cuda":
            self._totals = torch.empty_like(totals, device="cpu", pin_memory=True).copy_(totals, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Return the mean loss and `Trainer._global_counts`."""
        if self._arrived:
            self._arrived.synchronize()
        return self._totals.tolist()

    def check(self) -> None:
        """Raise NonFiniteLoss, on every rank, unless the loss is a number."""
        loss = self.read()[0]
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the loss of step {self._step} is {loss}; stopped before the weights were updated")


def evaluate(engine: Engine, batches: Iterable[Batch]) -> Evaluation:
    """Return the mean loss over every real target of the split, whatever the batch size and number of ranks."""
    engine.settle()
    totals = torch.zeros(2, dtype=torch.float64, device=engine.runtime.device)
    for batch in batches:
        totals[0] += engine.evaluate(batch).double()
        totals[1] += count_targets(batch["labels"]) if engine.counts else 0
    dist.all_reduce(totals)
    loss_sum, num_targets = totals.tolist()
    return Evaluation(loss_sum / max(num_targets, 1), int(num_targets))


class _SparedCollector:
    """Keeps Python's garbage collector away from all that is there after the first steps, until the block ends.

    With torch, transformers and ColossalAI imported a full collection takes 0.1 to 0.2 s, and comes on each rank at
    another step, in which all the others wait. A process that has already frozen what it imported is left as it is.
    """

    def __init__(self) -> None:
        self._steps_left = FIRST_STEPS
        self._has_frozen = False

    def count_step(self) -> None:
        """Note that a step is done."""
        self._steps_left -= 1
        if self._steps_left == 0 and not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            self._has_frozen = True

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        if self._has_frozen:
            gc.unfreeze()


def _progress_bar(num_steps: int, is_main: bool) -> tqdm:
    # In a log file the lines of `--logging_steps` tell the same without redrawing.
    return tqdm(total=num_steps, unit="step", disable=not (is_main and sys.stderr.isatty()), dynamic_ncols=True)


def _show(bar: tqdm, result: StepResult) -> None:
    if bar.disable:
        return
    memory = f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB" if torch.cuda.is_available() else "host"
    bar.set_postfix(
        {"loss": f"{result.loss:.3f}", "tok/s": f"{result.num_tokens / result.seconds:,.0f}", "memory": memory},
        refresh=False,
    )
    bar.update()
