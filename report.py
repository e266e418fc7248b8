"""What a run measured: meters, FLOP counts, result.json, metrics.jsonl, log lines. No torch import, nothing of ours."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

GIB = 2**30
Status = Literal["ok", "oom", "nan", "interrupted", "error"]


# ---------------------------------------------------------------------------- FLOPs


class MatrixShape(Protocol):
    """The numbers of a model that decide its arithmetic; `planner.ModelShape` has them."""

    @property
    def matrix_params(self) -> int:
        """Elements of all matrices a token is multiplied with: layers, projections, the output head once."""

    @property
    def layer_matrix_params(self) -> int:
        """The part of them that stands in the layers."""

    @property
    def num_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations of training on one token, forward and backward.

    Args:
        model: what the mathematics needs; the same for every plugin and setting.
        hardware: `model` plus the forward of the recomputed layers.
    """

    model: float
    hardware: float


def token_flops(shape: MatrixShape, seq_len: float, *, recomputed_layers: int = 0) -> TokenFlops:
    """Return the operations a token costs: 6 N + 6 L h T.

    PaLM (Chowdhery et al. 2022, appendix B) counts 6 N + 12 L h T: each matrix element is
    multiplied and added once forward and twice backward, and each of L layers multiplies a query
    with T keys and the scores with T values (2 x 2 h T forward, twice that backward). A causal
    model needs half of the attention, so 6 L h T. N leaves out what no token is multiplied with:
    position embeddings, the lookup in the word embeddings, biases, LayerNorm; the output head
    counts once although it shares the word embeddings' storage.
    Recomputing a layer (Korthikanti et al. 2022) repeats its forward: 2 N_layer + 2 h T. What a
    fused attention kernel recomputes inside its backward is not counted.

    Args:
        seq_len: tokens of a row; for rows of unequal length their mean.
        recomputed_layers: layers under gradient checkpointing.
    """
    attention_forward = 2 * shape.hidden_size * seq_len
    model = 6 * shape.matrix_params + 3 * shape.num_layers * attention_forward
    layer_forward = 2 * shape.layer_matrix_params / shape.num_layers + attention_forward
    return TokenFlops(model=model, hardware=model + recomputed_layers * layer_forward)


@dataclass(frozen=True)
class Peak:
    """A device's dense peak.

    Args:
        flops: operations a second.
        source: where the number stands.
    """

    flops: float
    source: str


@dataclass(frozen=True)
class DevicePeaks:
    """Dense peaks of one device in TFLOP/s by precision; None where it has no such arithmetic or no published number.

    Args:
        pattern: regular expression found in the device's lower-case name.
        source: the publication. Where it prints numbers "with sparsity", half of them stands here.
        fp32: without tensor cores; `tf32` is fp32 through them.
    """

    pattern: str
    source: str
    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float | None


# fmt: off
DEVICE_PEAKS = (
    DevicePeaks(r"\bgb200\b", "NVIDIA GB200 NVL72 data sheet", 2500, 2500, 1250, None),
    DevicePeaks(r"\bb200\b", "NVIDIA HGX B200 data sheet", 2250, 2250, 1125, None),
    DevicePeaks(r"\bgh200\b", "NVIDIA GH200 data sheet", 989.4, 989.4, 494.7, 66.9),
    DevicePeaks(r"\bh200 nvl\b", "NVIDIA H200 data sheet (NVL)", 835.5, 835.5, 417.5, 60),
    DevicePeaks(r"\bh200\b(?! nvl)", "NVIDIA H200 data sheet (SXM)", 989.4, 989.4, 494.7, 66.9),
    DevicePeaks(r"\bh100 nvl\b", "NVIDIA H100 data sheet (NVL)", 835.5, 835.5, 417.5, 60),
    DevicePeaks(r"\bh100 pcie\b", "NVIDIA H100 data sheet (PCIe)", 756, 756, 378, 51.2),
    DevicePeaks(r"\bh100\b.*\bhbm3\b", "NVIDIA H100 data sheet (SXM)", 989.4, 989.4, 494.7, 66.9),
    DevicePeaks(r"\ba[18]00\b", "NVIDIA A100 data sheet", 312, 312, 156, 19.5),
    DevicePeaks(r"\bl40s\b", "NVIDIA L40S data sheet", 362.05, 362.05, 183, 91.6),
    DevicePeaks(r"\bl40\b", "NVIDIA L40 data sheet", 181.05, 181.05, 90.5, 90.5),
    DevicePeaks(r"\bl4\b", "NVIDIA L4 data sheet", 121, 121, 60, 30.3),
    DevicePeaks(r"\ba40\b", "NVIDIA A40 data sheet", 149.7, 149.7, 74.8, 37.4),
    DevicePeaks(r"\ba30\b", "NVIDIA A30 data sheet", 165, 165, 82, 10.3),
    DevicePeaks(r"\ba10g\b", "NVIDIA A10G data sheet", 70, 70, 35, 35),
    DevicePeaks(r"\ba10\b", "NVIDIA A10 data sheet", 125, 125, 62.5, 31.2),
    DevicePeaks(r"\brtx a6000\b", "NVIDIA RTX A6000 data sheet", 154.8, 154.8, 77.4, 38.7),
    DevicePeaks(r"\brtx 5090$", "NVIDIA RTX Blackwell white paper, fp32 accumulate", 209.5, 209.5, 104.8, 104.8),
    DevicePeaks(r"\brtx 4090$", "NVIDIA Ada white paper, fp32 accumulate", 165.2, 165.2, 82.6, 82.6),
    DevicePeaks(r"\brtx 3090$", "NVIDIA Ampere GA102 white paper, fp32 accumulate", 71, 71, 35.6, 35.6),
    DevicePeaks(r"\bv100-sxm", "NVIDIA V100 data sheet (SXM2)", None, 125, None, 15.7),
    DevicePeaks(r"\bv100-pcie", "NVIDIA V100 data sheet (PCIe)", None, 112, None, 14),
    DevicePeaks(r"\bt4\b", "NVIDIA T4 data sheet", None, 65, None, 8.1),
    DevicePeaks(r"\bmi3(00|25)x\b", "AMD Instinct MI300X data sheet", 1307.4, 1307.4, 653.7, 163.4),
)
# fmt: on

# Slower relatives and slices of the devices above carry their names: a MIG slice, a virtual GPU (A10-24Q), a laptop.
REDUCED_DEVICE = re.compile(r"\bmig\b|\blaptop\b|\bmax-q\b|\bgrid\b|-\d+[abcq]\b")


def peak_of(device_name: str, precision: str) -> Peak | None:
    """Return the dense peak of a device as torch names it, or None where it is not known: never a guess.

    Args:
        precision: bf16, fp16, tf32 or fp32.
    """
    name = device_name.lower()
    if REDUCED_DEVICE.search(name):
        return None
    for peaks in DEVICE_PEAKS:
        if re.search(peaks.pattern, name):
            tflops = {"bf16": peaks.bf16, "fp16": peaks.fp16, "tf32": peaks.tf32, "fp32": peaks.fp32}[precision]
            return None if tflops is None else Peak(tflops * 1e12, f"{peaks.source}, dense {precision}")
    return None


# ---------------------------------------------------------------------------- blocks of result.json


@dataclass(frozen=True)
class Device:
    """Args:
    name: as torch names it; `cpu` in a rehearsal.
    count: devices of the whole run.
    memory_gib: memory of one.
    driver: version of the GPUs' driver; None on a CPU.
    link: what joins the GPUs of one machine, `NVLink (...)` or `PCIe (...)`, or a single one and its host.
    """

    name: str
    count: int
    memory_gib: float | None
    driver: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    name: str
    num_params: int
    pretrained: bool


@dataclass(frozen=True)
class Eval:
    """Args:
    loss: nats a predicted token, over `num_tokens` of them.
    protocol: how the text was cut, in one sentence.
    """

    loss: float
    perplexity: float
    num_tokens: int
    protocol: str

    @classmethod
    def from_loss(cls, loss: float, *, num_tokens: int, protocol: str) -> Eval:
        """Return the block with exp(loss), infinite where a float cannot hold it."""
        perplexity = math.exp(loss) if loss < 700 else loss * math.inf
        return cls(loss, perplexity, num_tokens, protocol)


@dataclass(frozen=True)
class Throughput:
    """Medians over the steps after warm-up.

    Args:
        tokens_per_s: median of each step's own rate, all devices together.
        mfu: model_tflops_per_device over the peak that `peak_source` names; None where the device is not known.
        warmup_steps: first steps really left out.
        measured_steps: steps the medians are taken over.
        first_step_ms: the step that compiles kernels and fills caches, never measured unless it is the only one.
    """

    tokens_per_s: float
    tokens_per_s_per_device: float
    samples_per_s: float
    model_tflops_per_device: float
    hardware_tflops_per_device: float
    mfu: float | None
    peak_source: str | None
    step_ms_median: float
    step_ms_p10: float
    step_ms_p90: float
    warmup_steps: int
    measured_steps: int
    first_step_ms: float


@dataclass(frozen=True)
class Memory:
    """Maxima over ranks; the GPU's are None on a CPU.

    Args:
        peak_allocated_gib: held by tensors.
        peak_reserved_gib: held by the allocator.
        outside_gib: on the GPU beside it at the end: CUDA context, loaded kernels, NCCL, and other processes.
        cap_gib: the limit in force, None without one.
        host_peak_rss_gib: resident memory of the largest rank's process.
        headroom_gib: what the cap left free of the peak, None without a cap.
    """

    peak_allocated_gib: float | None
    peak_reserved_gib: float | None
    cap_gib: float | None
    host_peak_rss_gib: float
    outside_gib: float | None = None
    headroom_gib: float | None = field(init=False)

    def __post_init__(self) -> None:
        cap, peak = self.cap_gib, self.peak_process_gib
        object.__setattr__(self, "headroom_gib", None if cap is None or peak is None else cap - peak)

    @property
    def peak_process_gib(self) -> float | None:
        """What the GPU's driver sees of the process at its peak, None on a CPU."""
        return None if self.peak_reserved_gib is None else self.peak_reserved_gib + (self.outside_gib or 0.0)


@dataclass(frozen=True)
class PlanCheck:
    """The plan beside what was measured; errors are relative to the latter. The GPU's are None on a CPU.

    Args:
        gpu_measured_gib: allocated at the peak, and what lies beside the allocator.
        host_predicted_gib: of one process.
    """

    gpu_predicted_gib: float | None
    gpu_measured_gib: float | None
    gpu_error: float | None
    host_predicted_gib: float
    host_measured_gib: float
    host_error: float

    @classmethod
    def of(cls, memory: Memory, *, gpu_predicted_gib: float, host_predicted_gib: float) -> PlanCheck:
        """Return the comparison for a run's memory."""
        host = memory.host_peak_rss_gib
        host_numbers = (host_predicted_gib, host, host_predicted_gib / host - 1)
        if memory.peak_allocated_gib is None:
            return cls(None, None, None, *host_numbers)
        measured = memory.peak_allocated_gib + (memory.outside_gib or 0.0)
        return cls(gpu_predicted_gib, measured, gpu_predicted_gib / measured - 1, *host_numbers)


@dataclass(frozen=True)
class StartUp:
    """Seconds from the start of this rank's process, torchrun's own not counted.

    Args:
        connected_s: libraries imported, settings checked, data found, process group made.
        built_s: model built, data loaded.
        first_step_s: first step done, with compilation; None where there was none.
    """

    connected_s: float
    built_s: float | None = None
    first_step_s: float | None = None


@dataclass(frozen=True)
class Result:
    """Everything a run leaves for tables: result.json.

    Args:
        args: the settings, `dataclasses.asdict(TrainArgs)`.
        output_dir: the folder this result lies in.
        resumed_from: step of the checkpoint the run went on from, None where it started anew.
        plan: `planner.Plan`, or None.
        data: `data.DataInfo`, or None where no data was loaded.
        steps: optimizer steps done by this process, without those before `resumed_from`.
        train_loss: (step, loss) of each step.
        throughput: None where no step was done.
        plan_check: None where nothing was trained.
    """

    status: Status
    command: str
    args: Mapping[str, Any]
    versions: Mapping[str, str | None]
    git_commit: str | None
    device: Device
    plugin: str
    plan: Any
    model: ModelInfo
    data: Any
    steps: int
    train_loss: Sequence[tuple[int, float]]
    eval: Eval | None
    throughput: Throughput | None
    memory: Memory
    output_dir: str | None = None
    resumed_from: int | None = None
    plan_check: PlanCheck | None = None
    startup: StartUp | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes None."""
        return {spec.name: _plain(getattr(self, spec.name)) for spec in fields(self)}

    def write(self, path: str | Path) -> None:
        """Write the file in one step: a reader sees the old content or the new, never a part."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(_json(self.to_dict(), indent=2) + "\n")
        os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """Return `value` with dataclasses as dicts, tuples as lists, and NaN or infinity as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, allow_nan=False, **options)


@dataclass(frozen=True)
class MetricsLog:
    """metrics.jsonl: one line a logged step, on disk at once so that a killed run keeps its curve.

    Args:
        path: appended to, so that a resumed run continues the file.
    """

    path: Path

    def append(self, **values: float | int | str | None) -> None:
        """Write one line; a number that is not finite becomes null."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_json(_plain(values)) + "\n")


# ---------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Step:
    """One optimizer step of the whole run: wall seconds between two synchronised points, real tokens, rows."""

    seconds: float
    tokens: int
    samples: int


@dataclass(frozen=True)
class Rate:
    """Speed over the steps since the last log line."""

    tokens_per_s: float
    step_ms: float


@dataclass
class StepMeter:
    """Collects steps and says how fast they were. The caller synchronises the device before it reads the clock.

    Args:
        warmup_steps: first steps left out of `throughput`: compilation, autotuning, allocator growth.
    """

    warmup_steps: int = 5
    steps: list[Step] = field(default_factory=list)
    _logged: int = 0

    def add(self, seconds: float, *, tokens: int, samples: int) -> None:
        """Record one step; tokens and samples are those of all ranks together."""
        self.steps.append(Step(seconds, tokens, samples))

    def interval(self) -> Rate | None:
        """Return the medians since the last call, warm-up included, or None without a step."""
        recent, self._logged = self.steps[self._logged :], len(self.steps)
        if not recent:
            return None
        step_ms = 1e3 * statistics.median(step.seconds for step in recent)
        return Rate(statistics.median(step.tokens / step.seconds for step in recent), step_ms)

    def throughput(self, flops: TokenFlops, *, num_devices: int, peak: Peak | None) -> Throughput | None:
        """Return the medians after warm-up, or None without a step.

        A run too short for its warm-up is measured on its last step: `warmup_steps` then says how many were left out.
        """
        if not self.steps:
            return None
        warmup_steps = min(self.warmup_steps, len(self.steps) - 1)
        measured = self.steps[warmup_steps:]
        step_ms = [1e3 * step.seconds for step in measured]
        tokens_per_s = statistics.median(step.tokens / step.seconds for step in measured)
        tflops = tokens_per_s / num_devices * flops.model / 1e12
        return Throughput(
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_device=tokens_per_s / num_devices,
            samples_per_s=statistics.median(step.samples / step.seconds for step in measured),
            model_tflops_per_device=tflops,
            hardware_tflops_per_device=tokens_per_s / num_devices * flops.hardware / 1e12,
            mfu=tflops * 1e12 / peak.flops if peak else None,
            peak_source=peak.source if peak else None,
            step_ms_median=statistics.median(step_ms),
            step_ms_p10=percentile(step_ms, 0.1),
            step_ms_p90=percentile(step_ms, 0.9),
            warmup_steps=warmup_steps,
            measured_steps=len(measured),
            first_step_ms=1e3 * self.steps[0].seconds,
        )


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the value that `fraction` of `values` lie below, interpolated linearly between neighbours."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


# ---------------------------------------------------------------------------- surroundings


def versions() -> dict[str, str | None]:
    """Return the versions that decide a run's numbers, read from metadata; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "colossalai", "transformers", "datasets"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit(folder: str | Path | None = None) -> str | None:
    """Return the commit of our own checkout (`-dirty` where files are changed), or None outside of one."""
    folder = Path(folder or Path(__file__).parent).resolve()
    # A copy that lies inside somebody else's repository is not at that repository's commit.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def host_peak_rss_gib() -> float:
    """Return the largest resident memory of this process so far, in GiB.

    Linux's own mark is read first: `getrusage` also counts what the parent held when it forked us.
    """
    try:
        mark = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        mark = None
    if mark:
        return int(mark[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


# ---------------------------------------------------------------------------- lines for people


def log_line(
    step: int,
    total_steps: int,
    loss: float | None,
    lr: float | None,
    grad_norm: float | None,
    tokens_per_s: float | None,
    mfu: float | None,
    step_ms: float | None,
    memory_gib: float | None,
) -> str:
    """Return one line of fixed width with units; `-` for what is not known.

    Args:
        mfu: share of the peak, 0 to 1.
    """
    digits = len(str(total_steps))
    percent = None if mfu is None else 100 * mfu
    return "  ".join(
        [
            f"step {step:>{digits}}/{total_steps}",
            f"loss {_cell(loss, '.4f', 8)}",
            f"lr {_cell(lr, '.2e', 8)}",
            f"grad norm {_cell(grad_norm, '.3f', 8)}",
            f"tokens/s {_cell(tokens_per_s, ',.0f', 10)}",
            f"MFU {_cell(percent, '.1f', 5)} %",
            f"step {_cell(step_ms, ',.1f', 9)} ms",
            f"memory {_cell(memory_gib, '.2f', 6)} GiB",
        ]
    )


def _cell(value: float | None, spec: str, width: int) -> str:
    """Return `value` right-aligned in `width` characters, in powers of ten where it would be wider."""
    if value is None:
        return "-".rjust(width)
    text = format(value, spec)
    return (text if len(text) <= width else format(value, ".0e")).rjust(width)


def summary(result: Result) -> list[str]:
    """Return the closing lines of a run: what happened, how good, how fast, how much memory, where the files are."""
    lines = [f"status      {result.status} after {result.steps:,} steps"]
    if result.train_loss:
        lines.append(f"train loss  {result.train_loss[-1][1]:.4f} at step {result.train_loss[-1][0]}")
    if result.eval:
        lines.append(
            f"eval        loss {result.eval.loss:.4f}, perplexity {result.eval.perplexity:.2f}"
            f" over {result.eval.num_tokens:,} tokens ({result.eval.protocol})"
        )
    if result.throughput:
        lines += _speed_lines(result.throughput)
    lines.append(f"memory      {_memory_text(result.memory)}")
    if result.plan_check:
        lines.append(f"planned     {_plan_text(result.plan_check)}")
    if result.startup and result.startup.first_step_s is not None:
        lines.append(f"started     first step done {result.startup.first_step_s:.1f} s after the process began")
    if result.output_dir:
        lines.append(f"files       {result.output_dir}")
    return lines


def _speed_lines(speed: Throughput) -> list[str]:
    share = f", MFU {100 * speed.mfu:.1f} % of {speed.peak_source}" if speed.mfu is not None else ""
    return [
        f"speed       {speed.tokens_per_s:,.0f} tokens/s, {speed.tokens_per_s_per_device:,.0f} a device,"
        f" {speed.samples_per_s:,.1f} samples/s, {speed.model_tflops_per_device:,.2f} TFLOP/s a device{share}",
        f"step        {speed.step_ms_median:,.1f} ms median ({speed.step_ms_p10:,.1f} p10,"
        f" {speed.step_ms_p90:,.1f} p90) of {speed.measured_steps} steps after {speed.warmup_steps} of warm-up",
    ]


def _memory_text(memory: Memory) -> str:
    host = f"host {memory.host_peak_rss_gib:.2f} GiB"
    if memory.peak_allocated_gib is None:
        return host
    cap = (
        f", {memory.headroom_gib:.2f} below the cap of {memory.cap_gib:.2f}" if memory.headroom_gib is not None else ""
    )
    reserved = f", {memory.peak_reserved_gib:.2f} reserved" if memory.peak_reserved_gib is not None else ""
    return f"GPU {memory.peak_allocated_gib:.2f} GiB allocated{reserved}{cap}; {host}"


def _plan_text(check: PlanCheck) -> str:
    host = f"host {check.host_predicted_gib:.2f} GiB for {check.host_measured_gib:.2f} ({check.host_error:+.1%})"
    if check.gpu_error is None:
        return host
    gpu = f"GPU {check.gpu_predicted_gib:.2f} GiB for {check.gpu_measured_gib:.2f} ({check.gpu_error:+.1%})"
    return f"{gpu}, {host}"


# ---------------------------------------------------------------------------- python report.py A B


if __name__ == "__main__":
    # Only here: a training run knows nothing of sweeps.
    from benchmarks import compare

    sys.exit(compare.main(sys.argv[1:]))
