"""What a run leaves behind: log lines, metrics.jsonl and result.json, filled in while it trains."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import hardware
import placement
import report
import tracking
from args import TrainArgs
from checkpoint import Found
from chooser import Choice
from data import PreparedData, TokenRows
from model import ModelSource
from planner import ModelShape
from runtime import Runtime, log, process_age_s, writing
from trainer import Evaluation, StepResult

WARMUP_STEPS = 5  # left out of the throughput: compilation, autotuning, the allocator's growth


@dataclass(frozen=True)
class Job:
    """A run that was found possible: nothing in `args` is `auto` any more, and the data lies ready."""

    args: TrainArgs
    process: Runtime
    source: ModelSource
    shape: ModelShape
    data: PreparedData
    choice: Choice
    resume: Found | None = None

    @property
    def rows(self) -> TokenRows:
        """The split that the run is about: the training rows, or with --eval_only the evaluation rows."""
        rows = self.data.train or self.data.validation
        assert rows is not None, "data.prepare gives at least one split"
        return rows


class Recorder:
    """Rank 0's book of the run; the other ranks only take part in the maxima.

    Args:
        folder: output folder, made by rank 0.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.startup = report.StartUp(connected_s=process_age_s())
        self.meter = report.StepMeter(WARMUP_STEPS)
        self.losses: list[tuple[int, float]] = []
        self.evaluation: report.Eval | None = None
        self.num_steps = 0
        self.tracker: tracking.Tracker | None = None
        seq_len = job.rows.info.num_tokens / max(job.rows.info.num_rows, 1)
        recomputed_layers = int(job.args.gradient_checkpointing)
        self.flops = report.token_flops(job.shape, seq_len, recomputed_layers=recomputed_layers)
        self.peak = report.peak_of(job.process.device_name, job.args.precision)
        if job.process.is_main:
            self._open_folder()

    def _open_folder(self) -> None:
        """Make the folder, and with its metrics.jsonl say from now on that a run is here."""
        args, path = self.job.args, self.folder / "metrics.jsonl"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if args.overwrite_output_dir and not (args.resume_from_checkpoint or args.eval_only):
                _remove_run(self.folder)
        # Before the folder counts as a run's: a tracker that cannot be opened leaves none.
        first_step = self.job.resume.manifest.progress.step + 1 if self.job.resume else 1
        self.tracker = tracking.open_tracker(args.report_to, self.folder, asdict(args), first_step=first_step)
        with writing(self.folder):
            path.touch()
        self.metrics = report.MetricsLog(path)

    def start(self, num_steps: int) -> None:
        """Print what will run, before the first step."""
        job, self.num_steps = self.job, num_steps
        self.startup = replace(self.startup, built_s=process_age_s())
        weights = "pretrained" if job.source.pretrained else "random"
        info = job.rows.info
        log.info(f"model   {job.source.name}, {job.shape.num_params:,} parameters, {weights} weights")
        log.info(
            f"data    {info.name} ({info.split}): {info.num_rows:,} rows, {info.num_tokens:,} tokens, "
            f"{info.dropped_tokens:,} dropped"
        )
        log.info(f"plan    {job.choice.reason}")
        self._say_layout()
        log.info(
            f"run     {num_steps:,} steps on {job.process.world_size} x {job.process.device_name}, in {self.folder}"
        )

    def _say_layout(self) -> None:
        args, process = self.job.args, self.job.process
        if args.replica_size == 1 and process.world_size == process.local_world_size:
            return
        axes = placement.axes(args.tp, args.pp, world_size=process.world_size, gpus=process.local_world_size)
        log.info(f"layout  {placement.describe(axes)}")
        if warning := placement.warning(axes):
            log.warning(warning)

    def on_step(self, result: StepResult) -> None:
        """Record a step, and log it where `--logging_steps` says so."""
        if not self.losses:
            self.startup = replace(self.startup, first_step_s=process_age_s())
        self.losses.append((result.step, result.loss))
        self.meter.add(result.seconds, tokens=result.num_tokens, samples=result.num_samples)
        args = self.job.args
        is_due = result.step % args.logging_steps == 0 or result.step in (1, self.num_steps)
        if is_due and self.job.process.is_main:
            self._log_step(result)

    def _log_step(self, result: StepResult) -> None:
        rate = self.meter.interval()
        assert rate is not None, "a step was just recorded"
        per_device = rate.tokens_per_s / self.job.process.world_size
        memory_gib = None if self.job.process.on_cpu else torch.cuda.max_memory_allocated() / report.GIB
        measured = {
            "loss": result.loss,
            "lr": result.learning_rate,
            "grad_norm": None if result.grad_norm is None else float(result.grad_norm),
            "tokens_per_s": rate.tokens_per_s,
            "mfu": per_device * self.flops.model / self.peak.flops if self.peak else None,
            "step_ms": rate.step_ms,
            "memory_gib": memory_gib,
        }
        log.info(report.log_line(result.step, self.num_steps, **measured))
        self._append(result.step, **measured)

    def _append(self, step: int, **measured: float | None) -> None:
        with writing(self.metrics.path):
            self.metrics.append(step=step, time_s=time.time(), **measured)
        if self.tracker:
            self.tracker.log(step, {name: value for name, value in measured.items() if value is not None})

    def on_evaluation(self, evaluation: Evaluation, step: int, ended: str) -> None:
        """Record and log an evaluation; the last one stands in result.json.

        Args:
            ended: before it, e.g. `epoch 1`; empty: nothing was trained.
        """
        protocol = self.job.data.protocol
        self.evaluation = report.Eval.from_loss(evaluation.loss, num_tokens=evaluation.num_tokens, protocol=protocol)
        if self.job.process.is_main:
            after = f" after {ended}" if ended else ""
            log.info(
                f"eval{after}: loss {evaluation.loss:.4f}, perplexity {self.evaluation.perplexity:.2f} "
                f"over {evaluation.num_tokens:,} tokens"
            )
            self._append(step, eval_loss=evaluation.loss)

    def on_checkpoint(self, folder: Path) -> None:
        """Log where a checkpoint was written."""
        log.info(f"checkpoint {folder}")

    def write(self, status: report.Status, *, alone: bool = False) -> report.Result:
        """Write result.json and return what it holds.

        Args:
            alone: only this rank is here (memory ran out, or it failed): no maxima over the others.
        """
        job, memory = self.job, _memory(self.job, alone=alone)
        result = report.Result(
            status=status,
            command=shlex.join(sys.argv),
            args=asdict(job.args),
            versions=report.versions(),
            git_commit=report.git_commit(),
            device=_device(job.process),
            plugin=job.args.plugin,
            plan=job.choice.plan,
            model=report.ModelInfo(job.source.name, job.shape.num_params, job.source.pretrained),
            data=job.rows.info,
            steps=len(self.losses),
            train_loss=self.losses,
            eval=self.evaluation,
            throughput=self.meter.throughput(self.flops, num_devices=job.process.world_size, peak=self.peak),
            memory=memory,
            output_dir=str(self.folder),
            resumed_from=job.resume.manifest.progress.step if job.resume else None,
            plan_check=_plan_check(job, memory) if self.losses else None,  # plans are of training
            startup=self.startup,
        )
        if job.resume and status == "ok" and not self.losses and (self.folder / "result.json").is_file():
            log.info("nothing was left to train: result.json stays as the run before left it")
        elif job.process.is_main or alone:
            with writing(self.folder / "result.json"):
                result.write(self.folder / "result.json")
        if self.tracker:
            self.tracker.close()
        return result


def _remove_run(folder: Path) -> None:
    """Remove the checkpoints and numbers of the run before: `last` would take the one that went further for ours.

    Its final/ may be what this run starts from, and stays until there is a new one.
    """
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "result.json"):
        (folder / name).unlink(missing_ok=True)


def _device(process: Runtime) -> report.Device:
    """Return what the run ran on; driver and link are those of this machine's GPUs."""
    gpus = [] if process.on_cpu else hardware.visible_gpus()[: process.local_world_size]
    driver, link = gpus[0].driver if gpus else None, hardware.link_of(gpus)
    return report.Device(process.device_name, process.world_size, process.device_memory_gib, driver, link)


def _plan_check(job: Job, memory: report.Memory) -> report.PlanCheck:
    plan = job.choice.plan
    return report.PlanCheck.of(
        memory,
        gpu_predicted_gib=plan.total_bytes / report.GIB,
        host_predicted_gib=plan.host_bytes / report.GIB / job.process.local_world_size,
    )


def _memory(job: Job, *, alone: bool) -> report.Memory:
    """Return the maxima over ranks. A collective, unless `alone`."""
    device = job.process.device
    # Gemini's automatic placement resets the allocator's marks as it measures: its peaks are not known.
    has_marks = not job.process.on_cpu and job.args.placement == "static"
    peaks = [0.0, 0.0, 0.0]
    if has_marks:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        outside_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
        peaks = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), outside_bytes]
    maxima = torch.tensor([*peaks, report.host_peak_rss_gib() * report.GIB], dtype=torch.float64, device=device)
    if not alone:
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    allocated, reserved, outside, host = (maxima / report.GIB).tolist()
    cap_gib = job.args.mem_cap * 1e9 / report.GIB if job.args.mem_cap else None
    if not has_marks:
        return report.Memory(None, None, cap_gib, host)
    return report.Memory(allocated, reserved, cap_gib, host, outside)
