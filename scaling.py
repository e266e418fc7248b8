"""Predicted step time, tokens/s, MFU and memory of a setting on any number of GPUs and machines. No torch import.

Times are arithmetic over measured rates; where a rate was not measured it says ASSUMPTION. docs/scaling.md has the
formulae; `python -m benchmarks.scaling` makes its tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import report
from planner import (
    GIB,
    ModelShape,
    Plan,
    PlanRequest,
    chunk_numbers,
    chunks_ahead,
    ddp_gradient_bytes,
    in_pieces,
    layer_exchanges,
    layouts,
    plan,
    stage_exchanges,
    stage_params,
)
from speed import (
    COMPILED_LAYER_S,
    EAGER_LAYER_S,
    LATENCY_S,
    MATRIX_SHARE,
    NVLINK_BYTES_S,
    SUM_PARAMETER_S,
    matrix_share,
    stage_imbalance,
)

GPU_GIB = 79.6  # of an H100, as torch sees it
ORIGIN = (
    "predicted from rates measured on H100 and H200 (scaling.py), across machines 400 Gb/s a GPU assumed; not measured"
)

# Rates of one H100 SXM unless they say otherwise.
MATRIX_FLOPS = 787e12  # measured: bf16, 8192^3
PEAK_FLOPS = 989.4e12  # data sheet, dense: what MFU is a share of
# Of the share of MATRIX_FLOPS that compiled layers reach (speed.MATRIX_SHARE) these plugins have a part: gemini between 0.87
# of 1.3b and all of 6.7b, 13b and 30b, torch_ddp_fp16 125m's ratio (2026-11-27 and 28).
SHARE_OF_PLUGIN = {"gemini": 0.94, "torch_ddp_fp16": 0.86}
# Pipelines of wide matrices: 13b and 30b under tp 2 x pp 2 and pp 4 on four H200, 1F1B and interleaved, 4 % to either side
# (2026-11-28).
PIPELINE_SHARE = 0.78
EAGER_SHARE = 0.5  # ASSUMPTION
# Compiled layers take this much longer while NCCL's kernels share GPU and memory: torch_ddp, 1.3b on 4 H200 with fp32
# gradients, on 2 with 16-bit ones; LowLevelZero, half of whose exchange is in the forward pass: 6.7b and 13b on 4
# (2026-11-28); small buckets: PyTorch's DDP of 1.3b on 2 and 4 (2026-11-27). hybrid_parallel without ZeRO: with MATRIX_SHARE.
BESIDE_NCCL = {"low_level_zero": 1.04, "torch_ddp": 1.08, "torch_ddp_fp16": 1.08, "hybrid_parallel": 1.08}
BESIDE_SMALL_BUCKETS = 1.13
# Forward passes made again, over what their operations would take at that rate: 6.7b, batch 4, on one H200 407.7 for 316.3
# ms (0.86), 13b, batch 4, on four 770.3 for 644.3 and 651.7 (0.6; 2026-11-27).
RECOMPUTED = 0.7
HBM_BYTES_S = 0.9 * 3.35e12  # data sheet; 0.9 of it: ASSUMPTION
NIC_BYTES_S = 50e9  # ASSUMPTION: one 400 Gb/s InfiniBand port for each GPU
PINNED_BYTES_S = 54e9  # measured: host to device, and back
HOST_UPDATE_S = 0.195e-9  # measured: a parameter's Adam on 16 threads of the host
# An update reads and writes fp32 weight and two moments, reads a 16-bit gradient, writes a 16-bit weight.
UPDATE_BYTES = 3 * 8 + 2 + 2
# One exchange of ColossalAI's, in 16 bits, and of colossal_ext/sharded_zero.py and data_parallel.py at least.
BUCKET_BYTES = 24 * 2**20
OWN_BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Machines:
    """Equal machines.

    Args:
        gpus: of one machine.
    """

    gpus: int
    nodes: int = 1

    @property
    def world_size(self) -> int:
        return self.gpus * self.nodes

    def __str__(self) -> str:
        return f"{self.gpus} GPUs" if self.nodes == 1 else f"{self.nodes} machines of {self.gpus} GPUs"


@dataclass(frozen=True)
class Group:
    """Ranks that meet in a collective.

    Args:
        local: how many of them share a machine.
    """

    size: int
    local: int

    @property
    def bytes_s(self) -> float:
        """Bus bandwidth: that of NVLink inside a machine; across machines, no more than its members' ports together."""
        inside = NVLINK_BYTES_S[min((n for n in NVLINK_BYTES_S if n >= self.local), default=max(NVLINK_BYTES_S))]
        if self.size <= self.local:
            return inside
        ports = self.local * NIC_BYTES_S
        return min(inside, ports) if self.local > 1 else ports

    def all_reduce_s(self, num_bytes: float, *, calls: int = 1) -> float:
        """Return the seconds of all-reduces of `num_bytes` together: 2 (n - 1) / n of them pass each GPU's link."""
        return 2 * self.gather_s(num_bytes, calls=calls)

    def gather_s(self, num_bytes: float, *, calls: int = 1) -> float:
        """Return the same of all-gathers, or of reduce-scatters, of `num_bytes` as they are when whole."""
        if self.size == 1:
            return 0.0
        latency_s = calls * LATENCY_S * math.log2(self.size)
        return (self.size - 1) / self.size * num_bytes / self.bytes_s + latency_s


def groups(request: PlanRequest, machines: Machines) -> dict[str, Group]:
    """Return the groups of a rank by axis. tp takes neighbouring ranks, then pp, then dp (ColossalAI's mesh)."""
    found, stride = {}, 1
    for axis, size in (("tp", request.tp), ("pp", request.pp), ("dp", request.dp_size)):
        found[axis] = Group(size, local=max(1, min(size, machines.gpus // stride)))
        stride *= size
    return found


@dataclass(frozen=True)
class Step:
    """Seconds of one step in which the GPU computes, or waits for what is named.

    Args:
        compute: with what the GPU waits for the host to launch it.
        bubble: stages of a pipeline that have no micro-batch.
        layers: all-reduces of tensor parallelism.
        stages: activations and their gradients, between stages.
        weights: gathers of parameters.
        gradients: the part of their exchange that the backward pass does not hide.
        update: Adam on the GPU.
        host: Adam on the host, with its copies.
    """

    compute: float
    bubble: float = 0.0
    layers: float = 0.0
    stages: float = 0.0
    weights: float = 0.0
    gradients: float = 0.0
    update: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Prediction:
    """A setting on some machines.

    Args:
        tokens_per_s: of all GPUs.
        mfu: share of PEAK_FLOPS, recomputation not counted.
    """

    request: PlanRequest
    machines: Machines
    step: Step
    plan: Plan
    tokens_per_s: float
    mfu: float


def predict(request: PlanRequest, machines: Machines) -> Prediction:
    """Return what a step of one micro-batch a replica takes."""
    step = _step(request, machines)
    tokens = request.batch_size * request.block_size * request.dp_size
    flops = report.token_flops(request.shape, request.block_size).model
    tokens_per_s = tokens / step.total
    mfu = tokens_per_s * flops / machines.world_size / PEAK_FLOPS
    return Prediction(request, machines, step, plan(request), tokens_per_s, mfu)


def _step(request: PlanRequest, machines: Machines) -> Step:
    along = groups(request, machines)
    forward_s, backward_s = _compute_s(request)
    layers_s, stages_s = _layers_s(request, along["tp"]), _stages_s(request, along["pp"])
    # The GPU is done with a piece before the host has launched the next one.
    waits_s = max(0.0, _launches_s(request) - forward_s - backward_s - layers_s - stages_s)
    compute_s = forward_s + backward_s + waits_s
    gradients_s, weights_s = _exchange_s(request, along["dp"], forward_s, backward_s)
    # (p - 1) of m + p - 1 slots of a stage are empty: (p - 1) / m of the time it works; with v chunks a v-th of that.
    idle = (request.pp - 1) / (request.num_microbatches * request.pp_chunks)
    share = stage_params(request) / _state_shards(request)
    return Step(
        compute=compute_s,
        bubble=idle * (compute_s + layers_s),
        layers=layers_s,
        stages=stages_s,
        weights=weights_s,
        gradients=gradients_s,
        update=(1 - request.offload_optim_frac) * share * UPDATE_BYTES / HBM_BYTES_S,
        host=_host_s(request, request.offload_optim_frac * share, machines.gpus),
    )


def _compute_s(request: PlanRequest) -> tuple[float, float]:
    """Return the seconds of forward and backward pass: one and two of three parts, the latter with what it recomputes."""
    flops = report.token_flops(request.shape, request.block_size, recomputed_layers=request.checkpointed_layers)
    tokens = request.batch_size * request.block_size / (request.tp * request.pp)
    rate = MATRIX_FLOPS * _matrix_share(request)
    slowdown = BESIDE_NCCL[request.plugin] if _is_own_exchange(request) else BESIDE_SMALL_BUCKETS
    beside_nccl = slowdown if request.compiled and request.dp_size > 1 else 1.0
    forward_s = tokens * flops.model / 3 / rate * beside_nccl * stage_imbalance(request.shape, request.pp)
    recompute_s = tokens * (flops.hardware - flops.model) / rate * RECOMPUTED
    sums_s = (request.num_microbatches - 1) * stage_params(request) * SUM_PARAMETER_S
    return forward_s, 2 * forward_s + recompute_s + sums_s


def _matrix_share(request: PlanRequest) -> float:
    """Return the share of MATRIX_FLOPS that forward and backward pass reach."""
    if not request.compiled:
        return EAGER_SHARE
    share = matrix_share(request.shape.hidden_size, tp=request.tp)
    if request.pp > 1:
        return PIPELINE_SHARE * share / max(MATRIX_SHARE.values())
    return share * SHARE_OF_PLUGIN.get(request.plugin, 1.0)


def _launches_s(request: PlanRequest) -> float:
    """Return the seconds in which the host launches a stage's layers; 0 where it keeps ahead of the GPU."""
    if request.compiled and request.pp == 1:
        return 0.0
    layer_s = COMPILED_LAYER_S if request.compiled else EAGER_LAYER_S
    return layer_s * request.num_microbatches * request.shape.num_layers / request.pp


def _state_shards(request: PlanRequest) -> int:
    """Return among how many ranks a stage's optimizer states are divided."""
    shards_states = request.plugin in ("low_level_zero", "gemini") or request.zero_stage > 0
    return request.dp_size if shards_states else 1


def _is_own_exchange(request: PlanRequest) -> bool:
    """Return whether gradients go in few large exchanges of ours, and not in ColossalAI's buckets."""
    return request.plugin != "gemini" and not (request.plugin == "hybrid_parallel" and request.zero_stage)


def _exchange_s(request: PlanRequest, group: Group, forward_s: float, backward_s: float) -> tuple[float, float]:
    """Return the seconds in which the GPU waits for gradients, and for parameters.

    torch_ddp all-reduces fp32 gradients, but those of compiled matrices, and the others 16-bit ones; LowLevelZero and
    Gemini scatter them. ZeRO gathers the new 16-bit parameters: LowLevelZero in the next forward pass, which hides it,
    hybrid_parallel after the update.
    Gemini gathers every chunk for the forward pass, and again for the backward pass, by default before it is needed.
    A pipeline exchanges gradients when its last micro-batch is done.
    """
    if group.size == 1:
        return 0.0, 0.0
    num_params, item = stage_params(request), request.item_bytes
    is_ddp = request.plugin.startswith("torch_ddp")
    gradient_bytes = ddp_gradient_bytes(request) if is_ddp else num_params * item
    is_zero = request.plugin == "low_level_zero"
    is_own = _is_own_exchange(request)
    scatters = is_zero or request.plugin == "gemini" or request.zero_stage == 2
    calls = math.ceil(gradient_bytes / (OWN_BUCKET_BYTES if is_own else BUCKET_BYTES))
    exchange = group.gather_s if scatters else group.all_reduce_s
    whole_s = exchange(gradient_bytes, calls=calls)
    # Our last bucket, and the first one that LowLevelZero's next forward pass wants, is the embedding.
    embedding = request.shape.vocab_size * request.shape.embed_dim / request.tp
    first_s = group.gather_s(embedding * item)
    last_s = exchange(embedding * (4 if is_ddp else item)) if is_own else whole_s / calls
    hidden_s = 0.0 if request.pp > 1 else min(backward_s, whole_s - last_s)
    gathers = {"gemini": 2, "low_level_zero": 1}.get(request.plugin, int(request.zero_stage > 0))
    weights_s = gathers * group.gather_s(num_params * item, calls=request.shape.num_layers)
    hidden_weights_s = 0.0
    if is_zero or chunks_ahead(request):
        one_s = weights_s / gathers
        hidden_weights_s = min(forward_s, one_s - first_s)
        if gathers == 2:
            hidden_weights_s += min(backward_s - hidden_s, one_s)
    return whole_s - hidden_s, weights_s - hidden_weights_s


def _layers_s(request: PlanRequest, group: Group) -> float:
    """Return the seconds of tensor parallelism: two all-reduces a layer forward and two backward, none hidden."""
    num_bytes, calls = layer_exchanges(request)
    return group.all_reduce_s(num_bytes, calls=calls)


def _stages_s(request: PlanRequest, group: Group) -> float:
    """Return the seconds in which a stage sends its chunks' outputs on and gradients back, for every micro-batch."""
    num_bytes, calls = stage_exchanges(request)
    link = NIC_BYTES_S if group.size > group.local else NVLINK_BYTES_S[2]
    return num_bytes / link + calls * LATENCY_S


def _host_s(request: PlanRequest, num_params: float, ranks: int) -> float:
    """Return the seconds of an update on the host, whose cores the ranks of a machine share: the copies run meanwhile."""
    return max(num_params * ranks * HOST_UPDATE_S, num_params * (request.item_bytes + 4) / PINNED_BYTES_S)


# ---------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Args:
        rows: of one GPU in a step, whatever the plugin.
        gpu_gib: memory of one GPU.
    """

    shape: ModelShape
    rows: int
    block_size: int
    gpu_gib: float
    dropout: bool = True


def best(job: Job, machines: Machines, plugin: str) -> Prediction | None:
    """Return the fastest setting of a plugin that is predicted to fit, None without one."""
    fitting = [
        each for each in (predict(setting, machines) for setting in settings(job, machines, plugin)) if each.plan.fits
    ]
    return max(fitting, key=lambda each: each.tokens_per_s, default=None)


def settings(job: Job, machines: Machines, plugin: str) -> Iterator[PlanRequest]:
    """Yield the settings of a plugin: without and with recompute, ZeRO stages, tp (inside a machine) x pp, schedules."""
    base = PlanRequest(
        job.shape, plugin, "bf16", machines.world_size, job.rows, job.block_size, gpu_gib=job.gpu_gib,
        processes_per_host=machines.gpus, dropout=job.dropout, random_weights=True,
    )  # fmt: skip
    stages = {"low_level_zero": (1,), "hybrid_parallel": (0, 1)}.get(plugin, (0,))
    is_hybrid = plugin == "hybrid_parallel"
    chosen = list(layouts(job.shape, machines.world_size, machines.gpus)) if is_hybrid else [(1, 1)]
    for recomputed in (0, job.shape.num_layers):
        for stage in stages:
            for tp, pp in chosen:
                rows = job.rows * tp * pp
                setting = replace(
                    base,
                    batch_size=rows,
                    zero_stage=stage,
                    tp=tp,
                    pp=pp,
                    checkpointed_layers=recomputed,
                    compiled=True,
                    cuda_graphs="auto",
                )
                if pp == 1:
                    yield setting
                    continue
                for chunks in (1, *chunk_numbers(job.shape, pp)):
                    yield from in_pieces(replace(setting, pp_chunks=chunks))


PLUGINS = ("torch_ddp", "low_level_zero", "gemini", "hybrid_parallel")


def compare(job: Job, machines: Machines) -> list[Prediction]:
    """Return each plugin's best setting, fastest first; a plugin that does not fit is left out."""
    found = [each for plugin in PLUGINS if (each := best(job, machines, plugin))]
    return sorted(found, key=lambda each: -each.tokens_per_s)


def setting_of(request: PlanRequest) -> str:
    """Return the flags of a setting, shortened."""
    parts = [request.plugin]
    parts += [f"tp {request.tp}"] * (request.tp > 1) + [f"pp {request.pp}"] * (request.pp > 1)
    parts += [f"{request.num_microbatches} pieces"] * (request.pp > 1)
    parts += [f"interleaved in {request.pp_chunks}"] * (request.pp_chunks > 1)
    parts += [f"ZeRO {request.zero_stage}"] * (request.zero_stage > 0)
    if request.plugin == "gemini" and request.dp_size > 1 and not chunks_ahead(request):
        parts.append("nothing fetched ahead")
    parts += ["recompute"] * (request.checkpointed_layers > 0)
    return ", ".join(parts)


HEAD = (
    "setting", "GPU GiB", "step s", "tokens/s", "MFU", "compute", "bubble", "tp", "pp", "weights", "gradients", "update",
    "host",
)  # fmt: skip


def cells(prediction: Prediction) -> list[str]:
    """Return a prediction under HEAD: the parts of the step as shares of it."""
    step = prediction.step
    shares = [f"{part / step.total:.0%}" if part else "-" for part in asdict(step).values()]
    return [
        setting_of(prediction.request), f"{prediction.plan.total_bytes / GIB:.1f}", f"{step.total:.2f}",
        f"{prediction.tokens_per_s:,.0f}", f"{prediction.mfu:.0%}", *shares,
    ]  # fmt: skip


def text_table(predictions: Sequence[Prediction]) -> str:
    """Return predictions as aligned text."""
    rows = [list(HEAD), *map(cells, predictions)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(
        lines
        if predictions
        else ["nothing is predicted to fit with all or no layers recomputed and all states on the GPUs"]
    )
