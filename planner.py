"""What a setting takes: predicted memory by category, and the work of a step whose time speed.py expects. No torch import.

Bytes of states are arithmetic over what each plugin keeps (ColossalAI 0.5.0, read in its source); bytes of
activations are derived tensor by tensor. What is only estimated says so and waits for calibration.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Literal

from args import TrainArgs, microbatch_numbers, model_chunks
from opt_sizes import OPTShape
from speed import GPU_FLOPS, Work

GIB = 2**30

# On a GPU beside the allocator: CUDA context, loaded kernels, NCCL on one rank, 1.30 GiB measured on an H200; NCCL's
# buffers between several ranks, an estimate.
CUDA_BYTES = int(1.3 * GIB)
NCCL_BYTES = int(0.5 * GIB)
# HybridParallelPlugin's groups for each axis, which one rank has too: measured on an H100. NCCL's memory for each of them
# that connects ranks: tp 2, tp 2 x dp 2 and tp 2 x pp 2 held 2.43, 2.91 and 3.35 GiB in all on H200 (2026-11-27).
HYBRID_GROUPS_BYTES = int(0.38 * GIB)
GROUP_BYTES = int(0.42 * GIB)
# A process with torch, transformers and ColossalAI imported: 0.39 GiB measured, the rest is data. With CUDA: 1.5 to
# 1.9 GiB measured on an H200, without what writing a checkpoint takes; until it compiles, 1.1 to 1.3.
HOST_PROCESS_BYTES = int(0.5 * GIB)
HOST_CUDA_PROCESS_BYTES = int(1.65 * GIB)
HOST_YOUNG_PROCESS_BYTES = int(1.2 * GIB)
# What torch's build for CUDA takes beyond HOST_PROCESS_BYTES without a GPU: measured (2.11.0+cu130, 2026-11-28).
CUDA_BUILD_BYTES = int(0.35 * GIB)
# Holes in malloc's heap, as a share of the states of layers: what 125m and 350m need on a CPU beyond their tensors.
HEAP_HOLES = 0.08
# Share of a GPU's memory that random fp32 weights may fill before the plugin has cast and placed them; larger models
# go to the host layer by layer as they are drawn, or are cast if that takes no more than the second share.
WEIGHTS_ROOM = 0.4
CAST_ROOM = 0.8
# A compiled layer keeps about this much more of each token than its tensors add up to, whatever its width: measured on
# an H100 at 125m and 1.3b; statistics of LayerNorm and attention are part of it.
COMPILED_LAYER_BYTES = 400
# Share of the limit that a setting must leave free to be called fitting: fragmentation and our own error. Estimate.
FIT_MARGIN = 0.05
# Log-softmax's backward holds three fp32 matrices of the logits' size: its output, and the gradients of both sides.
EAGER_LOGIT_BYTES = 12
# Compiled by itself, the loss keeps 16-bit logits and makes their 16-bit gradients: measured on an H100.
COMPILED_LOGIT_BYTES = 4
# HybridParallelPlugin's bucket of 12 x 2^20 elements, and its flattened copy.
BUCKET_ELEMENTS = 2 * 12 * 2**20
# Gemini's chunks: an eighth of the layers, at most this many elements (colossal_ext/gemini_chunks.py).
LARGEST_CHUNK_ELEMENTS = 64 * 2**20

# colossal_ext/local_zero.py: gradients collected before a launch; sharded_zero.py: before an exchange, of which so many
# are under way or about to be; host_updates.py: staging buffers.
FLUSH_ELEMENTS = 2**25
EXCHANGE_ELEMENTS = 2**27
EXCHANGES = 3
BUCKETS = 8  # of a small model an exchange has at least this share of the parameters
SLOT_ELEMENTS = 2**25
NUM_SLOTS = 16
# colossal_ext/layer_groups.py: layers of a pipeline's graph, and their gradients, at most.
GRAPH_LAYERS, GRAPH_BYTES = 5, 2**30
# Without a pipeline: layers of a graph at most, which divides the depth of every OPT, and the GPU's seconds for forward
# and backward of a layer up to which they share one: 125m to batch 28 x 1024, 1.3b to 4. The host takes 1.7 to 4 ms to launch
# them. With four the first step of 125m takes 6 s longer where their graph is not cached (one H200, by hand, 2026-11-28).
SMALL_GRAPH_LAYERS, SMALL_LAYER_S = 4, 2.5e-3

Place = Literal["device", "host", "cast"]


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that the planner and the FLOP count need.

    Args:
        embed_dim: width of the word embeddings and of the output head.
        ffn_width: elements that one token's feed-forward keeps for its backward.
        num_params: distinct parameters.
        layer_params: parameters of one layer.
        matrix_params: elements of all matrices a token is multiplied with, the output head once.
        layer_matrix_params: the part of them that stands in the layers.
        num_heads: of attention; 0: not known to be OPT, the only model that hybrid_parallel divides.
        layerdrop: share of the layers that a step of training leaves out, at random.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    embed_dim: int
    max_positions: int
    ffn_width: int
    num_params: int
    layer_params: int
    matrix_params: int
    layer_matrix_params: int
    num_heads: int = 0
    layerdrop: float = 0.0


def model_shape(shape: OPTShape, num_params: int | None = None) -> ModelShape:
    """Return the planner's numbers of an OPT model, or of another decoder with the same word sizes.

    Args:
        num_params: the true count of a model that is not OPT. All its layers' parameters are then taken for matrices,
            and its feed-forward is taken to keep one element a matrix row and column: estimates, within a few percent.
    """
    h, layers = shape.hidden_size, shape.num_layers
    projections = 2 * h * shape.embed_dim if shape.embed_dim != h else 0
    head = shape.vocab_size * shape.embed_dim
    num_heads = 0
    if num_params is None or num_params == shape.num_params:
        num_params = shape.num_params
        layer_matrices = 4 * h * h + 2 * h * shape.ffn_dim
        # Beside the matrices: their biases, 4 h + ffn + h, and two LayerNorms of 2 h.
        layer_params, ffn_width = layer_matrices + 9 * h + shape.ffn_dim, shape.ffn_dim
        num_heads = shape.num_heads
    else:
        layer_params = layer_matrices = max(num_params - head, 0) // layers
        ffn_width = max(layer_matrices - 4 * h * h, 0) // h
    return ModelShape(
        num_layers=layers,
        hidden_size=h,
        vocab_size=shape.vocab_size,
        embed_dim=shape.embed_dim,
        max_positions=shape.max_positions,
        ffn_width=ffn_width,
        num_params=num_params,
        layer_params=layer_params,
        matrix_params=layers * layer_matrices + projections + head,
        layer_matrix_params=layers * layer_matrices,
        num_heads=num_heads,
    )


def layout_problems(args: TrainArgs, name: str, shape: ModelShape) -> list[str]:
    """Return what in a model does not divide by hybrid_parallel's tp and pp."""
    if args.plugin != "hybrid_parallel" or max(args.tp, args.pp) == 1:
        return []
    if not shape.num_heads:
        return [f"--plugin hybrid_parallel: --tp and --pp above 1 split OPT only, which {name} is not"]
    sizes = {
        "attention heads": shape.num_heads,
        "feed-forward width": shape.ffn_width,
        "vocabulary": shape.vocab_size,
    }
    found = [
        f"--tp {args.tp}: must divide {name}'s {what}, {number}" for what, number in sizes.items() if number % args.tp
    ]
    chunks = model_chunks(args)
    if shape.num_layers < args.pp * chunks:
        parts = f" x --num_model_chunks {chunks}" if chunks > 1 else ""
        found.append(f"--pp {args.pp}{parts}: needs at least {args.pp * chunks} layers, {name} has {shape.num_layers}")
    return found


def layouts(shape: ModelShape, world_size: int, gpus: int) -> Iterator[tuple[int, int]]:
    """Yield tp and pp, powers of two that divide GPUs, layers and what is in them; tp stays in a machine.

    Args:
        gpus: of one machine.
    """
    if not shape.num_heads:
        yield 1, 1
        return
    sizes = gpus, shape.num_heads, shape.ffn_width, shape.vocab_size
    for tp, pp in product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        divides_layers = all(size % tp == 0 for size in sizes)
        if divides_layers and world_size % (tp * pp) == 0 and shape.num_layers % pp == 0:
            yield tp, pp


def chunk_numbers(shape: ModelShape, pp: int) -> list[int]:
    """Return the numbers of parts that a stage of an interleaved pipeline may have, each of as many layers, two or more.

    What a part of one layer costs the host beside its launches was not measured.
    """
    layers, rest = divmod(shape.num_layers, pp)
    return [] if rest else [number for number in range(2, layers // 2 + 1) if layers % number == 0]


@dataclass(frozen=True)
class PlanRequest:
    """One setting to predict. Nothing in it is `auto`.

    Args:
        batch_size: rows of one micro-batch of a replica (the GPUs that hold one copy of the model).
        num_microbatches: pieces the pipeline cuts it into.
        pp_chunks: parts of the model that a stage has; 2 or more: an interleaved schedule.
        accumulation_steps: micro-batches a step.
        max_prefetch: chunks that Gemini fetches before the layer that needs them; None: `auto`.
        step_in_backward: whether each parameter is updated, and its gradient freed, in the backward pass.
        checkpointed_layers: layers whose activations are recomputed.
        compiled: layers, and the loss where no rank has a share of the logits.
        cuda_graphs: whether layers are replayed as CUDA graphs where there are no `graph_obstacles`: on, off, or auto,
            which does small ones.
        dropout: whether dropout masks are kept.
        random_weights: drawn on the GPU, where they stay if there is room; others pass through the host.
        gpu_gib: memory of one GPU; None on a CPU.
        mem_cap_gb: cap in GB, 10^9 bytes; 0: none.
        host_gib: memory of one machine; None: not looked at.
        processes_per_host: ranks that share it.
    """

    shape: ModelShape
    plugin: str
    precision: str
    world_size: int
    batch_size: int
    block_size: int
    zero_stage: int = 0
    tp: int = 1
    pp: int = 1
    num_microbatches: int = 1
    pp_chunks: int = 1
    accumulation_steps: int = 1
    checkpointed_layers: int = 0
    offload_optim_frac: float = 0.0
    offload_param_frac: float = 0.0
    max_prefetch: int | None = None
    step_in_backward: bool = False
    compiled: bool = False
    cuda_graphs: str = "off"
    dropout: bool = True
    random_weights: bool = False
    gpu_gib: float | None = None
    mem_cap_gb: float = 0.0
    host_gib: float | None = None
    processes_per_host: int = 1

    @property
    def on_cpu(self) -> bool:
        return self.gpu_gib is None

    @property
    def accumulates(self) -> bool:
        """Whether gradients stay from one micro-batch to the next."""
        return self.accumulation_steps > 1

    @property
    def autocast(self) -> bool:
        """Whether parameters stay fp32 and each operation casts what it takes."""
        return self.plugin.startswith("torch_ddp") and self.precision != "fp32"

    @property
    def item_bytes(self) -> int:
        """Bytes of a number in the matrix products."""
        return 4 if self.precision == "fp32" else 2

    @property
    def dp_size(self) -> int:
        return max(1, self.world_size // (self.tp * self.pp))

    @property
    def limit_bytes(self) -> int | None:
        """The smaller of the GPU's memory and the cap; None where there is neither."""
        limits = [self.gpu_gib * GIB if self.gpu_gib else None, self.mem_cap_gb * 1e9 if self.mem_cap_gb else None]
        return min((int(limit) for limit in limits if limit is not None), default=None)


def in_pieces(request: PlanRequest, numbers: Sequence[int] = ()) -> Iterator[PlanRequest]:
    """Yield a pipeline's request with its batch cut into each of these numbers, off: all open to choice, most first."""
    interleaved = request.pp_chunks > 1
    for number in reversed(numbers or microbatch_numbers(request.batch_size, request.pp, interleaved=interleaved)):
        yield replace(request, num_microbatches=number)


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes on one device by category."""

    parameters: int = 0
    gradients: int = 0
    master_weights: int = 0
    optimizer_moments: int = 0
    activations: int = 0
    logits: int = 0
    communication_buffers: int = 0
    framework: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())  # asdict copies each number: two thirds of a plan's time


@dataclass(frozen=True)
class Plan:
    """A prediction.

    Args:
        device_bytes: one device's bytes by category, at the moment that needs most.
        moment: that moment: `build`, `loss`, `backward` or `optimizer step`.
        host_bytes: of one machine, all its processes together.
        limit_bytes: what a device may hold; None: not limited.
        fits: whether device and host stay under their limits with FIT_MARGIN to spare.
    """

    device_bytes: DeviceBytes
    moment: str
    total_bytes: int
    host_bytes: int
    limit_bytes: int | None
    host_limit_bytes: int | None
    fits: bool

    @property
    def _limited(self) -> list[tuple[str, int, int]]:
        """Each memory that has a limit: `device` or `host`, bytes used, bytes there."""
        memories = (
            ("device", self.total_bytes, self.limit_bytes),
            ("host", self.host_bytes, self.host_limit_bytes),
        )
        return [(where, used, limit) for where, used, limit in memories if limit]

    @property
    def exceeded(self) -> dict[str, float]:
        """The used shares of the memories, `device` and `host`, that do not keep FIT_MARGIN; empty where it fits."""
        return {where: used / limit for where, used, limit in self._limited if used > (1 - FIT_MARGIN) * limit}

    @property
    def excess(self) -> float:
        """The largest share of a limit that is used; above 1 - FIT_MARGIN it does not fit."""
        return max((used / limit for _, used, limit in self._limited), default=0.0)

    def describe(self) -> str:
        """Return one line: totals, limits, and every category that is not empty."""
        limit = f" of {self.limit_bytes / GIB:.1f}" if self.limit_bytes else ""
        host_limit = f" of {self.host_limit_bytes / GIB:.1f}" if self.host_limit_bytes else ""
        parts = [
            f"{name.replace('_', ' ')} {value / GIB:.2f}" for name, value in asdict(self.device_bytes).items() if value
        ]
        return (
            f"{self.total_bytes / GIB:.2f}{limit} GiB a device ({self.moment}: {', '.join(parts)}), "
            f"host {self.host_bytes / GIB:.1f}{host_limit} GiB"
        )


def plan(request: PlanRequest) -> Plan:
    """Return the predicted memory of one setting."""
    moments = _moments(request)
    moment = max(moments, key=lambda name: moments[name].total)
    device, host_bytes = moments[moment], _host_bytes(request, moments[moment])
    host_limit = int(request.host_gib * GIB) if request.host_gib else None
    limits = ((device.total, request.limit_bytes), (host_bytes, host_limit))
    fits = all(limit is None or used <= (1 - FIT_MARGIN) * limit for used, limit in limits)
    return Plan(device, moment, device.total, host_bytes, request.limit_bytes, host_limit, fits)


# ---------------------------------------------------------------------------- states


@dataclass(frozen=True)
class States:
    """Bytes of one rank's states.

    Args:
        kept_gradients: gradients there before a backward pass starts.
        gradients: after it.
        step_gradients: during the optimizer step, with its copies.
        built_parameters, built_masters: on the device while the plugin is set up, where some leave it later.
        offloaded: states on the host.
    """

    parameters: int
    kept_gradients: int
    gradients: int
    step_gradients: int
    master_weights: int
    moments: int
    communication: int
    built_parameters: int = 0
    built_masters: int = 0
    offloaded: int = 0


def layers_per_graph(
    plugin: str, pp: int, layer_params: int, item_bytes: int, tokens: int, *, updates_between: bool
) -> int:
    """Return how many layers are compiled at a time, whose gradients then come together.

    Where the GPU is done with a layer before the host has launched the next, the host is to do less: a pipeline's stage
    computes small pieces, and without one a layer can be small. On two cores the host's part of a step of 24 layers, eight
    pieces, fell from 187 to 123 ms with four layers a graph; 125m, batch 8 x 1024, on one H200 from 25 to 21 ms.

    Args:
        layer_params: of one layer on one GPU.
        item_bytes: of a gradient's number.
        tokens: of a micro-batch of a replica.
        updates_between: a layer's weights are updated in the backward pass, or on the host.
    """
    room = max(1, GRAPH_BYTES // max(1, item_bytes * layer_params))
    if pp > 1:
        return min(GRAPH_LAYERS, room)
    is_small = 6 * layer_params * tokens / GPU_FLOPS < SMALL_LAYER_S
    return min(SMALL_GRAPH_LAYERS, room) if is_small and plugin != "gemini" and not updates_between else 1


def graph_obstacles(request: PlanRequest) -> list[str]:
    """Return what a setting lacks for its layers to be replayed as CUDA graphs.

    Weights have to stay where they are from step to step, and nothing may happen between layers. Gradients lie in the
    graphs' memory, which the next forward pass uses again: they cannot be summed over micro-batches, or kept.
    """
    needs = {
        "a GPU": not request.on_cpu,
        "compiled layers": request.compiled,
        "an OPT model": request.shape.num_heads > 0,
        "another plugin than gemini": request.plugin != "gemini",
        "--zero_stage 0 of hybrid_parallel": request.plugin != "hybrid_parallel" or request.zero_stage == 0,
        "no --tp and --pp": request.tp * request.pp == 1,
        "no recomputed layers": not request.checkpointed_layers,
        "one micro-batch a step": not request.accumulates,
        "states on the GPU, updated after the backward pass": not request.step_in_backward
        and not request.offload_optim_frac,
        "no layerdrop": not request.shape.layerdrop,
    }
    return [name for name, is_there in needs.items() if not is_there]


def replays_graphs(request: PlanRequest) -> bool:
    """Return whether the layers of a setting are replayed as CUDA graphs."""
    wanted = request.cuda_graphs == "on" or (request.cuda_graphs == "auto" and _request_layers_per_graph(request) > 1)
    return wanted and not graph_obstacles(request)


def has_16_bit_gradients(plugin: str, precision: str, *, compiled: bool, accumulates: bool) -> bool:
    """Return whether matrices of layers have 16-bit gradients beside fp32 weights: colossal_ext/gradient_types.py.

    Those of micro-batches are summed in fp32, and fp16's are unscaled in it.
    """
    return plugin == "torch_ddp" and precision == "bf16" and compiled and not accumulates


def _request_layers_per_graph(request: PlanRequest) -> int:
    if not request.compiled or request.checkpointed_layers == request.shape.num_layers:
        return 1
    return layers_per_graph(
        request.plugin,
        request.pp,
        request.shape.layer_params // request.tp,
        request.item_bytes,
        request.batch_size * request.block_size,
        updates_between=request.step_in_backward or request.offload_optim_frac > 0,
    )


def stage_params(request: PlanRequest) -> int:
    """Return the parameters one rank computes with: its share of layers, and the embeddings an end stage holds."""
    shape = request.shape
    layers = shape.layer_params * shape.num_layers
    return (layers // request.pp + shape.num_params - layers) // request.tp


def _states(request: PlanRequest) -> States:
    if request.plugin.startswith("torch_ddp"):
        return _ddp_states(request)
    if request.plugin == "gemini":
        return _gemini_states(request)
    if request.plugin == "hybrid_parallel" and request.zero_stage == 0:
        return _hybrid_states(request)
    if request.plugin == "low_level_zero":
        return _low_level_zero_states(request)
    return _zero_states(request)


def _ddp_states(request: PlanRequest) -> States:
    """DDP replicates 16 bytes a parameter, 14 where its gradient has 16 bits (`has_16_bit_gradients`).

    Gradients are exchanged where they are: colossal_ext/data_parallel.py.
    """
    p, gradients = stage_params(request), ddp_gradient_bytes(request)
    return States(4 * p, gradients * int(request.accumulates), gradients, gradients, 0, 8 * p, 0)


def ddp_gradient_bytes(request: PlanRequest) -> int:
    """Return the bytes of all gradients of a replica under torch_ddp."""
    has_16_bits = has_16_bit_gradients(
        request.plugin, request.precision, compiled=request.compiled, accumulates=request.accumulates
    )
    return 4 * stage_params(request) - 2 * request.shape.layer_matrix_params * int(has_16_bits)


def _undivided_weights(request: PlanRequest) -> int:
    """Return the 16-bit weights of the whole model that a rank of HybridParallel draws before it drops what is not its own."""
    return 2 * request.shape.num_params if _weights_place(request) == "cast" else 0


def _zero_states(request: PlanRequest) -> States:
    """HybridParallel with ZeRO: whole parameters, fp32 master weights and moments divided among data-parallel ranks.

    Gradients stay whole in stage 1 and are divided in stage 2. The step copies this rank's share to fp32 while the
    originals are still held, and takes the norm of the largest in double precision.
    """
    p, dp, item = stage_params(request), request.dp_size, request.item_bytes
    gradients = item * p // (dp if request.zero_stage == 2 else 1)
    largest = request.shape.vocab_size * request.shape.embed_dim // request.tp
    return States(
        parameters=item * p,
        kept_gradients=gradients if request.accumulates or request.pp > 1 else 0,
        gradients=gradients,
        step_gradients=gradients + (4 * p // dp if item == 2 else 0) + 8 * largest // dp,
        master_weights=4 * p // dp,
        moments=8 * p // dp,
        communication=BUCKET_ELEMENTS * item,
        built_parameters=_undivided_weights(request),
    )


def _low_level_zero_states(request: PlanRequest) -> States:
    """LowLevelZero (colossal_ext/local_zero.py): states on device and host, on several ranks a share of them.

    One rank keeps gradients in place. Updated in the backward pass, they are gone at its end but for those collected
    for the next launch, and the embedding's, which come last. On several ranks (colossal_ext/sharded_zero.py) they are
    divided in the backward pass, bucket by bucket; the last one is the embedding. Updated there, the shares become the new
    weights, which wait for the next forward pass.
    """
    shape, item, dp = request.shape, request.item_bytes, request.dp_size
    p, on_device = shape.num_params, 1 - _local_offload(request)
    embedding = shape.vocab_size * shape.embed_dim
    shares = 0 if request.step_in_backward and dp == 1 else item * p // dp
    if dp > 1:
        bucket = min(EXCHANGE_ELEMENTS, p // BUCKETS)
        gradients = shares + item * (EXCHANGES * (bucket + bucket // dp) + embedding)
    else:
        gradients = min(item * p, item * (FLUSH_ELEMENTS + embedding)) if request.step_in_backward else item * p
    kept = (item * p // (dp if request.zero_stage == 2 else 1)) if request.accumulates else 0
    has_masters = item == 2 or dp > 1 or request.offload_optim_frac > 0
    has_embedding = request.offload_optim_frac * p > shape.layer_params * shape.num_layers
    largest_on_host = embedding if has_embedding else shape.hidden_size * shape.ffn_width
    slot_elements = min(SLOT_ELEMENTS, 1 << (-(-largest_on_host // dp) - 1).bit_length())
    slots = 0 if request.on_cpu else NUM_SLOTS * 4 * slot_elements
    return States(
        parameters=item * p,
        kept_gradients=kept,
        gradients=max(gradients, kept),
        step_gradients=shares,
        master_weights=int(4 * p * on_device) // dp if has_masters else 0,
        moments=int(8 * p * on_device) // dp,
        communication=0,
        offloaded=int(12 * p * (1 - on_device)) // dp + (slots if request.offload_optim_frac else 0),
    )


def _local_offload(request: PlanRequest) -> float:
    """Return the share that really goes to the host: whole layers, in which vectors are left out of account."""
    shape, wanted = request.shape, request.offload_optim_frac * request.shape.num_params
    return min(wanted + 0.5 * shape.layer_params / 4, shape.num_params) / shape.num_params if wanted else 0.0


def _gemini_states(request: PlanRequest) -> States:
    """Gemini: everything divided among the ranks; a parameter's 16-bit storage holds its gradient after backward.

    With accumulation gradients have storage of their own. Fractions of optimizer states and parameters live on the
    host, where a chunk's 16-bit and fp32 shards have memory once they were there (colossal_ext/gemini_device.py).
    Weights are built on the device and leave it only when all are there.
    """
    shape, share = request.shape, request.shape.num_params // request.dp_size
    regular = _chunk_elements(shape)
    # Whole chunks go to the host: half a chunk more than was asked for.
    wanted = request.offload_optim_frac * shape.num_params
    offloaded = min(wanted + 0.5 * regular, shape.num_params) / shape.num_params if wanted else 0.0
    on_device = 1 - offloaded
    largest = max(regular, shape.vocab_size * shape.embed_dim)
    gradients = 2 * share if request.accumulates else 0
    # A gather holds shard and chunk together, and the next chunk is fetched meanwhile; in the backward pass all chunks
    # of a layer are there with its gradients. An offloaded chunk arrives in fp32. Beside them are the next layer's.
    communication = max(4 * largest, 2 * (shape.layer_params + regular) + 2 * shape.layer_params)
    communication += 2 * regular * chunks_ahead(request)
    communication += 4 * largest if request.offload_optim_frac else 0
    sixteen_bit = 0 if request.on_cpu else 4 if request.accumulates else 2
    return States(
        parameters=int(2 * share * (1 - request.offload_param_frac)),
        kept_gradients=gradients,
        gradients=gradients,
        step_gradients=gradients,
        master_weights=int(4 * share * on_device),
        moments=int(8 * share * on_device),
        communication=communication,
        built_parameters=max(2 * share, 2 * shape.num_params - 4 * share if _weights_place(request) == "cast" else 0),
        built_masters=4 * share,
        offloaded=int((12 + sixteen_bit) * share * offloaded),
    )


def chunks_ahead(request: PlanRequest) -> int:
    """Return how many chunks Gemini fetches before the layer that needs them: the next layer's, and one more; else 0.

    Where a layer has three, 6.7b takes 361.0, 342.3 and 342.7 ms a step with two, four and eight ahead, and 381.7 with
    none, on two H200 (2026-11-29). One rank has nothing to gather.
    """
    if request.plugin != "gemini":
        return 0
    if request.max_prefetch is not None:
        return request.max_prefetch
    return math.ceil(request.shape.layer_params / _chunk_elements(request.shape)) + 1 if request.dp_size > 1 else 0


def _chunk_elements(shape: ModelShape) -> int:
    """Return about how many elements Gemini's chunks have."""
    target = min(LARGEST_CHUNK_ELEMENTS, shape.layer_params * shape.num_layers // 8)
    return max(target, math.ceil(shape.layer_params / 3))


def _hybrid_states(request: PlanRequest) -> States:
    """HybridParallel without ZeRO: fp32 states as they are, or 16-bit ones with fp32 masters.

    Gradients stay from micro-batch to micro-batch.
    """
    p = stage_params(request)
    kept = request.item_bytes * p * int(request.accumulates or request.pp > 1)
    if request.precision == "fp32":
        return States(4 * p, kept, 4 * p, 4 * p, 0, 8 * p, 0)
    return States(2 * p, kept, 2 * p, 2 * p, 4 * p, 8 * p, 0, built_parameters=_undivided_weights(request))


# ---------------------------------------------------------------------------- activations


def layer_activation_bytes(request: PlanRequest) -> int:
    """Return the bytes one layer keeps for the backward of one token, with flash attention and without recompute.

    Of an OPT layer of width h, autograd keeps, in 16-bit: the input of each LayerNorm (2 x 2 h), their outputs, which
    feed q, k, v and fc1 (2 x 2 h), q, k, v (6 h), the attention's output (2 h), relu's output, which feeds fc2 (8 h),
    and two dropout masks of one byte (2 h): 26 h. In fp32 without dropout: 48 h.
    Under autocast the residual stream is fp32 (2 x 4 h) and each of q, k, v casts its own copy of the LayerNorm's
    output (4 x 2 h): 34 h; a compiled graph casts once: 30 h. Statistics of LayerNorm and softmax, below 1 %, are
    left out. Tensor parallelism divides q, k, v, the attention's output and the feed-forward.
    """
    h, item = request.shape.hidden_size, request.item_bytes
    residual = 2 * _residual_bytes(request)
    normed = (4 if request.autocast and not request.compiled else 2) * item * h
    divided = item * (4 * h + request.shape.ffn_width) // request.tp
    # The CPU keeps a mask in the numbers' own type.
    masks = 2 * h * (item if request.on_cpu else 1) if request.dropout else 0
    unexplained = COMPILED_LAYER_BYTES if request.compiled else 0
    return residual + normed + divided + masks + unexplained


def _residual_bytes(request: PlanRequest) -> int:
    return request.shape.hidden_size * (4 if request.autocast else request.item_bytes)


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank when the backward starts.

    Args:
        saved: everything kept from the forward, without the logits.
        logits: with what the loss's backward holds beside them.
        first_layer: what the first layer's backward, at the output, holds beside `saved`.
        last_layer: what is left when the last one's, at the input, runs.
    """

    saved: int
    logits: int
    first_layer: int
    last_layer: int


def _activations(request: PlanRequest) -> Activations:
    """Return the activations of the stage that needs most: the first holds most micro-batches, the last the logits."""
    tokens = request.batch_size * request.block_size // request.num_microbatches
    if request.pp == 1:
        return _stage_activations(request, tokens, in_flight=1, has_head=True)
    # Before its first backward pass a stage of v chunks has made (v + 1) p - 1 forward passes of one of them, the last
    # (v - 1) p + 1; with one chunk p and 1.
    chunks = request.pp_chunks
    waiting = request.pp if chunks == 1 else ((chunks + 1) * request.pp - 1) / chunks
    first = _stage_activations(request, tokens, in_flight=min(waiting, request.num_microbatches), has_head=False)
    last_waits = ((chunks - 1) * request.pp + 1) / chunks
    last = _stage_activations(request, tokens, in_flight=min(last_waits, request.num_microbatches), has_head=True)
    return max(first, last, key=lambda stage: stage.saved + max(stage.logits, stage.first_layer))


def _stage_activations(request: PlanRequest, tokens: int, *, in_flight: float, has_head: bool) -> Activations:
    shape = request.shape
    checkpointed = min(request.checkpointed_layers, shape.num_layers)
    per_layer, per_input = layer_activation_bytes(request), _residual_bytes(request)
    layers = (checkpointed * per_input + (shape.num_layers - checkpointed) * per_layer) // request.pp
    # The final LayerNorm keeps its input and, for the head, its output.
    head = per_input + request.item_bytes * shape.embed_dim if has_head else 0
    logit_bytes = COMPILED_LOGIT_BYTES if request.compiled else EAGER_LOGIT_BYTES
    if request.tp > 1:  # colossal_ext/vocab_parallel.py: the logits and their gradients
        logit_bytes = 2 * request.item_bytes
    # The largest gradients of a layer: those of relu's output and of its input.
    gradients = 2 * request.item_bytes * shape.ffn_width // request.tp
    recomputed = per_layer - per_input if checkpointed == shape.num_layers else 0
    return Activations(
        saved=int(in_flight * tokens * layers) + tokens * head + _cast_bytes(request, checkpointed),
        logits=tokens * shape.vocab_size * logit_bytes // request.tp if has_head else 0,
        first_layer=tokens * (gradients + recomputed),
        last_layer=tokens * (gradients + per_layer),
    )


def _cast_bytes(request: PlanRequest, checkpointed: int) -> int:
    """Return the 16-bit copies of fp32 matrices that autocast's products keep until their backward."""
    if not request.autocast:
        return 0
    shape = request.shape
    recomputed = shape.layer_matrix_params * checkpointed // shape.num_layers
    return 2 * (shape.matrix_params - recomputed)


# ---------------------------------------------------------------------------- the whole


def _moments(request: PlanRequest) -> dict[str, DeviceBytes]:
    """Return the device's bytes at each moment that can be the peak.

    Between the loss and the end of the backward, activations fall and gradients grow layer by layer, so the peak is
    at one end.
    """
    states, activations = _states(request), _activations(request)
    fixed = DeviceBytes(
        parameters=states.parameters,
        master_weights=states.master_weights,
        optimizer_moments=states.moments,
        communication_buffers=states.communication,
        framework=0 if request.on_cpu else framework_bytes(request.plugin, request.world_size, request.tp, request.pp),
    )
    # Of a pipeline with a piece a stage only the first part has made gradients while all pieces are under way.
    kept = states.kept_gradients
    if request.pp_chunks > 1 and request.num_microbatches == request.pp and not request.accumulates:
        layers = request.item_bytes * request.shape.layer_params * request.shape.num_layers // (request.pp * request.tp)
        kept -= layers - layers // request.pp_chunks
    at_loss = replace(fixed, gradients=kept, activations=activations.saved, logits=activations.logits)
    first_layer = replace(at_loss, activations=activations.saved + activations.first_layer, logits=0)
    last_layer = replace(
        fixed, gradients=states.gradients + _graph_gradients(request), activations=activations.last_layer
    )
    return {
        "build": replace(
            fixed,
            parameters=max(states.parameters, states.built_parameters),
            master_weights=max(states.master_weights, states.built_masters),
            optimizer_moments=0,
        ),
        "loss": at_loss,
        "backward": max(first_layer, last_layer, key=lambda moment: moment.total),
        "optimizer step": replace(fixed, gradients=states.step_gradients),
    }


def _graph_gradients(request: PlanRequest) -> int:
    """Return the gradients of a graph beside those that are kept, but for one layer's."""
    keeps_each = request.pp == 1 and not request.accumulates
    if keeps_each and not (request.plugin == "low_level_zero" and request.dp_size > 1):
        return 0
    layer_bytes = request.item_bytes * request.shape.layer_params // request.tp
    return (_request_layers_per_graph(request) - 1) * layer_bytes


def framework_bytes(plugin: str, world_size: int, tp: int = 1, pp: int = 1) -> int:
    """Return a GPU's bytes that its allocator does not see: CUDA context, loaded kernels, NCCL."""
    outside = CUDA_BYTES + (NCCL_BYTES if world_size > 1 else 0)
    if plugin != "hybrid_parallel":
        return outside
    # Beside the world's: tp, dp, the neighbours in a pipeline, of which an inner stage has two, and its ends, which share
    # the embedding.
    num_groups = (tp > 1) + (world_size > tp * pp) + 2 * (pp > 1) + (pp > 2)
    return outside + HYBRID_GROUPS_BYTES + num_groups * GROUP_BYTES


def weights_place(plugin: str, precision: str, num_params: int, world_size: int, limit_bytes: int | None) -> Place:
    """Return where random weights drawn on a GPU wait for the plugin: there, on the host, or there but cast.

    Cast they have the form that the plugin keeps: 16 bits, and in LowLevelZero's case this rank's share in fp32.
    Gemini's and HybridParallel's fp32 weights are drawn once more when the model is sharded (`model.DrawnAgain`).
    """
    if plugin != "gemini" and 4 * num_params <= WEIGHTS_ROOM * (limit_bytes or 0):
        return "device"
    if precision == "fp32" or plugin not in ("gemini", "low_level_zero", "hybrid_parallel") or world_size == 1:
        return "host"
    share, whole = num_params // world_size, 2 * num_params
    built = {
        # Each parameter that enters one of Gemini's 16-bit and fp32 chunks leaves its own memory.
        "gemini": max(whole, 6 * share),
        "low_level_zero": whole + 4 * share,
        # A stage drops what is not its own before it divides layers, one by one.
        "hybrid_parallel": whole + whole // 2,
    }[plugin]
    room = CAST_ROOM * ((limit_bytes or 0) - framework_bytes(plugin, world_size))
    return "cast" if built <= room else "host"


def _weights_place(request: PlanRequest) -> Place:
    if not request.random_weights:
        return "host"
    return weights_place(
        request.plugin, request.precision, request.shape.num_params, request.world_size, request.limit_bytes
    )


def _host_bytes(request: PlanRequest, device: DeviceBytes) -> int:
    """Return one machine's memory: on a CPU the "device" is there too; on a GPU fp32 weights pass through it."""
    offloaded = _states(request).offloaded
    if request.on_cpu:
        tensors = offloaded + device.total + _heap_bytes(request, device)
        process = HOST_PROCESS_BYTES + (CUDA_BUILD_BYTES if _torch_is_for_gpus() else 0)
        return request.processes_per_host * (process + tensors)
    # Weights in fp32 wait until their masters are made (colossal_ext/unrounded.py), meanwhile HybridParallel casts its own, and
    # those that Gemini keeps there, a third of its states, are made.
    weights = 4 * request.shape.num_params
    if request.plugin == "hybrid_parallel" and request.item_bytes == 2:
        weights = max(weights, (4 + 2) * stage_params(request))
    masters = offloaded // 3 if request.plugin == "gemini" else 0
    loading = HOST_YOUNG_PROCESS_BYTES + masters + (weights if _weights_place(request) == "host" else 0)
    return request.processes_per_host * max(HOST_CUDA_PROCESS_BYTES + offloaded, loading)


@functools.cache
def _torch_is_for_gpus() -> bool:
    """Return whether torch is installed, which a plan does not need, with libraries for GPUs."""
    try:
        return sys.platform == "linux" and not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _heap_bytes(request: PlanRequest, device: DeviceBytes) -> int:
    """Return what a CPU's memory holds beside the tensors of the moment: holes in malloc's heap, a second gradient.

    With every block given back at once (MALLOC_MMAP_THRESHOLD_=65536) the holes are gone, and time is lost. Between the
    gradients of the layers lies what each recomputed layer freed: as much as if nothing were recomputed. The gradient of
    the embedding waits for that of the head, which shares its weights.
    """
    shape = request.shape
    states = device.parameters + device.gradients + device.master_weights + device.optimizer_moments
    in_heap = states * shape.layer_params * shape.num_layers / shape.num_params
    tokens = request.batch_size * request.block_size // request.num_microbatches
    recomputed = request.checkpointed_layers * tokens * layer_activation_bytes(request) // request.pp
    embedding = request.item_bytes * shape.vocab_size * shape.embed_dim // request.tp
    return int(HEAP_HOLES * in_heap) + recomputed + embedding


# ---------------------------------------------------------------------------- work


def work(request: PlanRequest) -> Work:
    """Return what a step of this setting asks of GPU and host."""
    replica = request.tp * request.pp
    shared = request.dp_size if request.plugin in ("gemini", "low_level_zero") or request.zero_stage else 1
    states = stage_params(request) / shared
    on_host = request.offload_optim_frac * states
    num_bytes, calls = layer_exchanges(request)
    stage_bytes, stage_rounds = stage_exchanges(request)
    return Work(
        shape=request.shape,
        plugin=request.plugin,
        at_best=request.precision == "bf16" and not request.on_cpu,
        on_gpu=not request.on_cpu,
        exchanges=request.dp_size > 1,
        tokens=request.batch_size * request.block_size * request.accumulation_steps,
        seq_len=request.block_size,
        micro_batches=request.accumulation_steps,
        num_params=stage_params(request),
        recomputed_layers=request.checkpointed_layers,
        gpu_states=states - on_host,
        host_states=on_host * request.processes_per_host,
        host_parameters=request.offload_param_frac * states,
        step_in_backward=request.step_in_backward,
        replica_size=replica,
        stages=request.pp,
        pieces=request.num_microbatches,
        chunks=request.pp_chunks,
        compiled=request.compiled,
        layers_per_graph=_request_layers_per_graph(request),
        cuda_graphs=replays_graphs(request),
        layer_bytes=2 * (request.tp - 1) / request.tp * num_bytes,
        layer_rounds=2 * calls * math.log2(request.tp),
        stage_bytes=stage_bytes,
        stage_rounds=stage_rounds,
    )


def layer_exchanges(request: PlanRequest) -> tuple[float, int]:
    """Return bytes and number of a stage's all-reduces in a step: two a divided layer forward, two backward."""
    layers = (4 * request.shape.num_layers + 2 * request.checkpointed_layers) / request.pp
    tokens = request.batch_size * request.block_size * request.accumulation_steps
    calls = math.ceil(layers * request.num_microbatches * request.accumulation_steps)
    return layers * tokens * request.shape.hidden_size * request.item_bytes, calls


def stage_exchanges(request: PlanRequest) -> tuple[float, int]:
    """Return bytes and number of what a stage sends in a step: each part's outputs on, and gradients back."""
    if request.pp == 1:
        return 0.0, 0
    passes = 2 * request.pp_chunks * request.accumulation_steps
    num_bytes = request.batch_size * request.block_size * request.shape.hidden_size * request.item_bytes
    return passes * num_bytes, passes * request.num_microbatches
