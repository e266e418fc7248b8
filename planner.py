"""Predicted memory by category for a model under a plugin, and the fastest setting that fits. No torch import.

Bytes of states are arithmetic over what each plugin keeps (ColossalAI 0.5.0, read in its source); bytes of
activations are derived tensor by tensor. What is only estimated says so and waits for calibration.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, product
from typing import Any, Literal

from args import TrainArgs, microbatch_choices, microbatch_numbers, model_chunks, pipeline_microbatches, problems
from opt_sizes import OPTShape
from speed import GPU_FLOPS, StepTime, Work, step_time

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

# Those that lay out hybrid_parallel.
LAYOUT_FLAGS = ("tp", "pp", "pp_schedule", "num_microbatches", "num_model_chunks")
# The flags that `auto` can decide and that advice has to name.
AUTO_FLAGS = (
    "plugin", "gradient_checkpointing", "offload_optim_frac", "offload_param_frac", "step_in_backward",
    "per_device_train_batch_size", "gradient_accumulation_steps", *LAYOUT_FLAGS,
)  # fmt: skip
# What else a plugin may have been given, and another one would refuse; `off` it would not.
OTHER_FLAGS = ("placement", "cuda_graphs", "max_prefetch")
# Where memory ran out, advice leaves this much more of it free than a plan does.
OOM_ROOM = 0.9
OFFLOAD_STEPS = tuple(step / 50 for step in range(1, 51))
# What is known less well has to promise more. States go to the host only where all else is expected to take this much
# longer; how far its work hides behind the GPU's is a model's word.
OFFLOAD_HANDICAP = 1.05
# The same for a batch cut into smaller micro-batches: gradients are then summed in their own 16 bits, but for
# torch_ddp, and the time of small micro-batches is an estimate.
SPLIT_HANDICAP = 1.1
# The same for layers or depth divided among GPUs, which hangs on the links, and on a host that is quick to launch. 30b on
# four, the only choice measured that it decides: Gemini with 10 layers recomputed, which was not, is expected to take 1.08
# times as long as the fastest that was.
LAYOUT_HANDICAP = 1.05


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
    def excess(self) -> float:
        """The largest share of a limit that is used; above 1 - FIT_MARGIN it does not fit."""
        pairs = ((self.total_bytes, self.limit_bytes), (self.host_bytes, self.host_limit_bytes))
        return max((used / limit for used, limit in pairs if limit), default=0.0)

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


def _named_prefetch(args: TrainArgs) -> int | None:
    """Return what the flags say of `chunks_ahead`; None: nothing."""
    if args.placement == "auto":
        return 0
    return None if args.max_prefetch == "auto" else int(args.max_prefetch)


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
    HybridParallel makes its fp32 weights of 16-bit ones, too.
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
    weights = 4 * request.shape.num_params
    loading = HOST_YOUNG_PROCESS_BYTES + (weights if _weights_place(request) == "host" else 0)
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


# ---------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class Choice:
    """What `auto` became.

    Args:
        precision: bf16, fp16 or fp32.
        tp, pp, pp_schedule, num_model_chunks: of hybrid_parallel; the last is 0 but for an interleaved pipeline.
        per_device_train_batch_size, gradient_accumulation_steps: with the product that was asked for.
        num_microbatches: pieces of a pipeline's micro-batch, 0 without a pipeline.
        max_prefetch: chunks that Gemini fetches ahead, `auto` under other plugins.
        cuda_graphs: layers are replayed as such.
        graph_obstacles: what it lacks for the CUDA graphs that were asked for.
        reason: one line: what was chosen and why.
        fits: False where no setting is predicted to fit; the smallest is then chosen.
        step_time: expected, for comparing only (speed.py).
    """

    plugin: str
    precision: str
    checkpointed_layers: int
    offload_optim_frac: float
    offload_param_frac: float
    step_in_backward: bool
    tp: int
    pp: int
    pp_schedule: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_microbatches: int
    num_model_chunks: int
    max_prefetch: str
    cuda_graphs: bool
    graph_obstacles: tuple[str, ...]
    reason: str
    plan: Plan
    step_time: StepTime

    @property
    def fits(self) -> bool:
        return self.plan.fits


def resolve_auto(
    args: TrainArgs,
    shape: ModelShape,
    world_size: int,
    gpu_gib: float | None,
    host_gib: float | None,
    *,
    processes_per_host: int | None = None,
    has_bf16: bool = True,
    dropout: bool = True,
) -> Choice:
    """Return the setting that is expected to be fastest of those predicted to fit; flags that are given stand.

    Open to choice are plugin, recomputed layers, share of states on the host, update in the backward pass, the pieces of
    a pipeline's micro-batch and, with `--plugin auto`, smaller micro-batches of the same global batch and, on the GPUs of
    one machine, tp x pp. Of equally fast settings the simplest is taken. On a CPU without a cap nothing limits the
    "device": torch_ddp without recompute.

    Args:
        gpu_gib: memory of one GPU; None on a CPU.
        host_gib: memory of one machine; None: not looked at.
        processes_per_host: ranks on this machine; off: all of them.
        has_bf16: whether the GPU has bf16 arithmetic.
        dropout: whether the model drops activations out.
    """
    on_host: dict[str, Any] = {
        "host_gib": host_gib,
        "processes_per_host": processes_per_host or world_size,
        "dropout": dropout,
    }
    one_machine = on_host["processes_per_host"] == world_size
    best: _Candidate | None = None
    for micro_batches in _splits(args, gpu_gib):
        for request in _requests(_split(args, micro_batches), shape, world_size, gpu_gib, has_bf16, one_machine):
            full = replace(request, **on_host)
            least = _Candidate.of(full, is_split=micro_batches > 1)  # recompute only adds to its cost
            if best and best.plan.fits and least.cost >= best.cost:
                continue
            for setting in _with_recompute(args, full, least.plan):
                candidate = _Candidate.of(setting, is_split=micro_batches > 1)
                best = min(best or candidate, candidate, key=_Candidate.rank)
    assert best, "there is always a setting"
    return _choice(args, best)


@dataclass(frozen=True)
class _Candidate:
    """A setting that `auto` looks at.

    Args:
        is_split: whether the batch that was asked for is cut into micro-batches.
    """

    request: PlanRequest
    plan: Plan
    step_time: StepTime
    is_split: bool

    @classmethod
    def of(cls, request: PlanRequest, *, is_split: bool) -> _Candidate:
        """Return the setting with its predictions."""
        return cls(request, plan(request), step_time(work(request)), is_split)

    def rank(self) -> tuple[bool, float]:
        """Return what the best has least of: those that fit by their cost, then the others by what they lack."""
        return not self.plan.fits, self.cost if self.plan.fits else self.plan.excess

    @property
    def cost(self) -> float:
        """Seconds of a step, raised by the handicaps."""
        request, cost = self.request, self.step_time.total
        cost *= SPLIT_HANDICAP if self.is_split else 1.0
        cost *= LAYOUT_HANDICAP if request.tp * request.pp > 1 else 1.0
        return cost * (OFFLOAD_HANDICAP if request.offload_optim_frac else 1.0)


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


def _splits(args: TrainArgs, gpu_gib: float | None) -> list[int]:
    """Return the numbers of micro-batches that the batch of one GPU may be cut into, 1 first."""
    if args.plugin != "auto" or (gpu_gib is None and not args.mem_cap):
        return [1]
    rows = args.per_device_train_batch_size
    return [number for number in range(1, rows + 1) if rows % number == 0]


def _split(args: TrainArgs, micro_batches: int) -> TrainArgs:
    """Return the settings with each micro-batch cut into as many; the rows of a step stay."""
    return replace(
        args,
        per_device_train_batch_size=args.per_device_train_batch_size // micro_batches,
        gradient_accumulation_steps=args.gradient_accumulation_steps * micro_batches,
    )


@dataclass(frozen=True)
class _Setting:
    """What `auto` can choose beside recompute."""

    plugin: str
    offload_optim_frac: float = 0.0
    offload_param_frac: float = 0.0
    step_in_backward: bool = False
    tp: int = 1
    pp: int = 1
    pp_schedule: str = "1f1b"


def _requests(
    args: TrainArgs, shape: ModelShape, world_size: int, gpu_gib: float | None, has_bf16: bool, one_machine: bool
) -> Iterator[PlanRequest]:
    """Yield the settings that the flags leave open, simplest first, without recompute."""
    found = _settings(args, world_size, on_cpu=gpu_gib is None, has_bf16=has_bf16)
    if args.plugin == "auto" and gpu_gib is not None and one_machine:
        found = chain(found, _divided(args, shape, world_size))
    for setting in found:
        named = replace(args, plugin=setting.plugin, tp=setting.tp, pp=setting.pp, pp_schedule=setting.pp_schedule)
        precision = _precision(named, on_cpu=gpu_gib is None, has_bf16=has_bf16)
        zero_stage = args.zero_stage if args.zero_stage is not None else int(setting.plugin == "low_level_zero")
        is_pipeline = setting.plugin == "hybrid_parallel" and setting.pp > 1
        request = PlanRequest(
            shape=shape,
            plugin=setting.plugin,
            precision=precision,
            world_size=world_size,
            batch_size=named.train_batch_size,
            block_size=min(args.block_size, shape.max_positions),
            zero_stage=zero_stage,
            tp=setting.tp,
            pp=setting.pp,
            accumulation_steps=args.gradient_accumulation_steps,
            offload_optim_frac=setting.offload_optim_frac,
            offload_param_frac=setting.offload_param_frac,
            max_prefetch=_named_prefetch(args),
            step_in_backward=setting.step_in_backward,
            compiled=_compiled(named, on_cpu=gpu_gib is None),
            cuda_graphs="off" if args.eval_only else args.cuda_graphs,
            random_weights=args.from_scratch or args.model_size == "tiny",
            gpu_gib=gpu_gib,
            mem_cap_gb=args.mem_cap,
        )
        if not is_pipeline:
            yield request
            continue
        for chunks in _chunk_choices(named, shape):
            yield from in_pieces(replace(request, pp_chunks=chunks), microbatch_choices(named))


def _chunk_choices(args: TrainArgs, shape: ModelShape) -> list[int]:
    """Return the numbers of parts a stage that are open to choice: one alone without interleaving or by the flag."""
    if args.pp_schedule != "interleaved" or args.num_model_chunks:
        return [model_chunks(args)]
    return chunk_numbers(shape, args.pp) or [model_chunks(args)]


def chunk_numbers(shape: ModelShape, pp: int) -> list[int]:
    """Return the numbers of parts that a stage of an interleaved pipeline may have, each of as many layers, two or more.

    What a part of one layer costs the host beside its launches was not measured.
    """
    layers, rest = divmod(shape.num_layers, pp)
    return [] if rest else [number for number in range(2, layers // 2 + 1) if layers % number == 0]


def in_pieces(request: PlanRequest, numbers: Sequence[int] = ()) -> Iterator[PlanRequest]:
    """Yield a pipeline's request with its batch cut into each of these numbers, off: all open to choice, most first."""
    interleaved = request.pp_chunks > 1
    for number in reversed(numbers or microbatch_numbers(request.batch_size, request.pp, interleaved=interleaved)):
        yield replace(request, num_microbatches=number)


def _settings(args: TrainArgs, world_size: int, *, on_cpu: bool, has_bf16: bool) -> Iterator[_Setting]:
    """Yield what the flags leave open; of equally fast settings the first is taken."""
    can_step = _can_step_in_backward(args, world_size)
    if args.plugin != "auto":
        on = {"on": True, "off": False, "auto": can_step and args.offload_optim_frac > 0}[args.step_in_backward]
        on = on and args.plugin == "low_level_zero"
        fractions = args.offload_optim_frac, args.offload_param_frac
        yield _Setting(args.plugin, *fractions, on, args.tp, args.pp, args.pp_schedule)
        return
    limited = not on_cpu or args.mem_cap > 0
    lacks_bf16 = args.precision == "auto" and not on_cpu and not has_bf16
    ddp = _Setting("torch_ddp_fp16" if args.precision == "fp16" or lacks_bf16 else "torch_ddp")
    zero = _Setting("low_level_zero")
    if not limited:
        yield ddp
        return
    alone, in_bf16 = world_size == 1, args.precision in ("auto", "bf16") and not lacks_bf16
    yield from (zero, ddp) if alone and in_bf16 and not on_cpu else (ddp, zero)
    can_step = can_step and not lacks_bf16
    yield from (replace(zero, step_in_backward=True),) if can_step else ()
    for fraction in OFFLOAD_STEPS:
        yield _Setting("low_level_zero", fraction, 0.0, can_step)
    if args.precision == "fp32":
        return
    if not alone:
        yield _Setting("gemini")
        for fraction in OFFLOAD_STEPS:
            yield _Setting("gemini", fraction)
    yield _Setting("gemini", 1.0, 1.0)


def _divided(args: TrainArgs, shape: ModelShape, world_size: int) -> Iterator[_Setting]:
    """Yield the ways to divide layers and depth among the GPUs of one machine.

    Left out is what nobody has measured: fp32, and padded rows, whose layers are not compiled. A pipeline evaluates with
    its training batch.
    """
    same_batch = args.per_device_eval_batch_size in (None, args.per_device_train_batch_size)
    if args.precision == "fp32" or not args.packs_text:
        return
    for tp, pp in layouts(shape, world_size, world_size):
        if tp * pp > 1 and (same_batch or pp == 1):
            setting = _Setting("hybrid_parallel", tp=tp, pp=pp)
            yield setting
            if pp > 1 and chunk_numbers(shape, pp):
                yield replace(setting, pp_schedule="interleaved")


def _can_step_in_backward(args: TrainArgs, world_size: int) -> bool:
    if world_size > 1 and args.zero_stage == 2 and args.gradient_accumulation_steps > 1:
        return False  # the gradients are divided before the last micro-batch
    return not args.max_grad_norm and args.precision != "fp16" and args.step_in_backward != "off"


def _precision(args: TrainArgs, *, on_cpu: bool, has_bf16: bool) -> str:
    if args.precision != "auto":
        return args.precision
    if args.plugin == "torch_ddp_fp16":
        return "fp16"
    if on_cpu:
        needs_half = args.plugin == "gemini" or (args.plugin == "hybrid_parallel" and args.zero_stage)
        return "bf16" if needs_half else "fp32"
    without_bf16 = "fp32" if args.plugin == "torch_ddp" else "fp16"
    return "bf16" if has_bf16 else without_bf16


def _compiled(args: TrainArgs, *, on_cpu: bool) -> bool:
    return args.packs_text and (args.compile == "on" or (args.compile == "auto" and not on_cpu))


def _with_recompute(args: TrainArgs, request: PlanRequest, predicted: Plan) -> Iterator[PlanRequest]:
    """Yield the request with the layers that the flag says; for auto with none, or else with the fewest that fit.

    Args:
        predicted: the request's plan.
    """
    num_layers = request.shape.num_layers
    if args.gradient_checkpointing != "auto":
        yield replace(request, checkpointed_layers=_fixed_layers(args.gradient_checkpointing, num_layers))
        return
    everything = replace(request, checkpointed_layers=num_layers)
    if request.limit_bytes is None or predicted.fits:
        yield request
    elif not plan(everything).fits:
        yield min(request, everything, key=lambda each: plan(each).excess)
    else:
        yield replace(request, checkpointed_layers=_fewest_layers(request))


def _fewest_layers(request: PlanRequest) -> int:
    """Return the fewest recomputed layers that fit, where none is too few and all are enough."""
    few, many = 0, request.shape.num_layers
    while many - few > 1:
        layers = (few + many) // 2
        few, many = (few, layers) if plan(replace(request, checkpointed_layers=layers)).fits else (layers, many)
    return many


def _fixed_layers(gradient_checkpointing: str, num_layers: int) -> int:
    """Return the layers that `on`, `off` or a number means; `auto` counts as off."""
    words = {"on": num_layers, "off": 0, "auto": 0}
    layers = words[gradient_checkpointing] if gradient_checkpointing in words else int(gradient_checkpointing)
    return min(layers, num_layers)


def _choice(args: TrainArgs, chosen: _Candidate) -> Choice:
    request = chosen.request
    what = [request.plugin, request.precision]
    if request.offload_optim_frac:
        what.append(f"{request.offload_optim_frac:.0%} of optimizer states on the host")
    if request.offload_param_frac:
        what.append(f"{request.offload_param_frac:.0%} of parameters on the host")
    if ahead := chunks_ahead(request):
        what.append(f"{ahead} chunks fetched ahead")
    if request.step_in_backward:
        what.append("updated in the backward pass")
    if replays_graphs(request):
        what.append("layers as CUDA graphs")
    what += [f"{axis} {size}" for axis, size in (("tp", request.tp), ("pp", request.pp)) if size > 1]
    if request.pp_chunks > 1:
        what.append(f"interleaved in {request.pp_chunks} parts a stage")
    if request.num_microbatches > 1:
        what.append(f"cut into {request.num_microbatches} pieces")
    what.append(_recompute_text(request))
    rows = request.batch_size // (request.tp * request.pp)
    if chosen.is_split:
        what.append(f"batch cut into {args.per_device_train_batch_size // rows} micro-batches of {rows}")
    kind = "the fastest predicted to fit" if args.plugin == "auto" else "as asked"
    if not chosen.plan.fits:
        kind = "predicted NOT to fit; nothing smaller is left to choose"
    return Choice(
        plugin=request.plugin,
        precision=request.precision,
        checkpointed_layers=request.checkpointed_layers,
        offload_optim_frac=request.offload_optim_frac,
        offload_param_frac=request.offload_param_frac,
        step_in_backward=request.step_in_backward,
        tp=request.tp,
        pp=request.pp,
        pp_schedule="interleaved" if request.pp_chunks > 1 else "1f1b",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=request.accumulation_steps,
        num_microbatches=request.num_microbatches if request.pp > 1 else 0,
        num_model_chunks=request.pp_chunks if request.pp_chunks > 1 else 0,
        max_prefetch=f"{ahead}" if request.plugin == "gemini" else "auto",
        cuda_graphs=replays_graphs(request),
        graph_obstacles=tuple(graph_obstacles(request)) if request.cuda_graphs == "on" else (),
        reason=f"{', '.join(what)}: {kind}; {chosen.plan.describe()}",
        plan=chosen.plan,
        step_time=chosen.step_time,
    )


def _recompute_text(request: PlanRequest) -> str:
    if not request.checkpointed_layers:
        return "no recompute"
    return f"{request.checkpointed_layers} of {request.shape.num_layers} layers recomputed"


# ---------------------------------------------------------------------------- the whole table

# The main settings of every plugin; those that a run cannot have (number of GPUs, other flags) are left out.
MAIN_SETTINGS: tuple[dict[str, Any], ...] = (
    {"plugin": "torch_ddp"},
    {"plugin": "torch_ddp_fp16"},
    {"plugin": "low_level_zero"},
    {"plugin": "low_level_zero", "zero_stage": 2},
    {"plugin": "low_level_zero", "step_in_backward": "on"},
    {"plugin": "low_level_zero", "offload_optim_frac": 0.5},
    {"plugin": "low_level_zero", "offload_optim_frac": 1.0},
    {"plugin": "gemini"},
    {"plugin": "gemini", "offload_optim_frac": 0.5},
    {"plugin": "gemini", "offload_optim_frac": 1.0},
    {"plugin": "gemini", "offload_optim_frac": 1.0, "offload_param_frac": 1.0},
    {"plugin": "hybrid_parallel", "zero_stage": 1},
    {"plugin": "hybrid_parallel", "tp": 2},
    {"plugin": "hybrid_parallel", "pp": 2},
    {"plugin": "hybrid_parallel", "tp": 2, "pp": 2},
    {"plugin": "hybrid_parallel", "tp": 2, "pp": 2, "pp_schedule": "interleaved"},
)


@dataclass(frozen=True)
class Alternative:
    """A line of the plan's table.

    Args:
        flags: what to add to the command for it.
        relative_speed: expected, over that of the choice.
        why: what stops it, or what its time is expected to go into.
    """

    flags: str
    plan: Plan
    relative_speed: float
    why: str


def alternatives(
    args: TrainArgs,
    shape: ModelShape,
    world_size: int,
    gpu_gib: float | None,
    host_gib: float | None,
    *,
    choice: Choice,
    dropout: bool = True,
) -> list[Alternative]:
    """Return every plugin's main settings, each without and with recompute, for the batch and length of `args`.

    Args:
        choice: what `auto` takes, to which speeds are compared.
    """
    num_gpus, found = 0 if gpu_gib is None else world_size, []
    for changes in MAIN_SETTINGS:
        if changes.get("zero_stage") == 2 and (world_size == 1 or args.gradient_accumulation_steps == 1):
            continue  # the same as stage 1
        for recompute in ("off", "on"):
            changed = {**changes, "gradient_checkpointing": recompute}
            setting = replace(args, **changed)
            refused = problems(setting, world_size=world_size, num_gpus=num_gpus, gpus_per_node=num_gpus)
            if refused or layout_problems(setting, "", shape):
                continue
            other = resolve_auto(setting, shape, world_size, gpu_gib, host_gib, dropout=dropout)
            speed = choice.step_time.total / other.step_time.total
            found.append(Alternative(_flags(changed), other.plan, speed, _why(other)))
    return found


def _why(choice: Choice) -> str:
    plan = choice.plan
    pairs = (("device", plan.total_bytes, plan.limit_bytes), ("host", plan.host_bytes, plan.host_limit_bytes))
    over = [
        f"{used / limit:.0%} of the {where}'s memory"
        for where, used, limit in pairs
        if limit and used > (1 - FIT_MARGIN) * limit
    ]
    return " and ".join(over) or choice.step_time.describe()


def table(choice: Choice, others: list[Alternative]) -> str:
    """Return the choice and the alternatives as text: GiB of one device by category, and of the host; speed and why."""
    chosen = f"chosen: {choice.reason}"
    if not others:
        return chosen
    names = {
        "parameters": "param", "gradients": "grad", "master_weights": "master", "optimizer_moments": "moments",
        "activations": "activ", "logits": "logits", "communication_buffers": "comm", "framework": "frame",
    }  # fmt: skip
    lines = ["  ".join([*(f"{short:>7}" for short in names.values()), "  total", "   host", "fits", "speed", "flags"])]
    for other in others:
        parts = asdict(other.plan.device_bytes)
        numbers = [*(parts[name] for name in names), other.plan.total_bytes, other.plan.host_bytes]
        cells = [f"{value / GIB:7.2f}" for value in numbers]
        fits, speed = " yes" if other.plan.fits else "  no", f"{other.relative_speed:5.2f}"
        lines.append("  ".join([*cells, fits, speed, f"{other.flags} ({other.why})"]))
    limits = [
        f"{what} {limit / GIB:.1f} GiB"
        for what, limit in (("device", choice.plan.limit_bytes), ("host", choice.plan.host_limit_bytes))
        if limit
    ]
    head = (
        "GiB a device at the moment that needs most, and of the host; speed as expected, over that of the choice; "
        f"limits: {', '.join(limits) or 'none'}"
    )
    return "\n".join([head, *lines, chosen])


# ---------------------------------------------------------------------------- advice


def oom_advice(
    given: TrainArgs, used: TrainArgs, *, num_layers: int, world_size: int, on_cpu: bool = False
) -> list[str]:
    """Return the flags to try next after running out of memory, cheapest first, each to be added to the command.

    What is in force already, and what the command's other flags would refuse, is left out.

    Args:
        given: the flags as the user gave them.
        used: the same without `auto`: what ran.
        world_size: processes of the whole run.
    """
    # What `auto` chose stands in every line, since it would choose again.
    chosen = {name: getattr(used, name) for name in AUTO_FLAGS if getattr(used, name) != getattr(given, name)}
    for name, nothing in (("gradient_checkpointing", "0"), ("step_in_backward", "off")):
        if chosen.get(name) == nothing:
            del chosen[name]
    if given.gradient_checkpointing != "auto":  # a word that became a number
        chosen.pop("gradient_checkpointing", None)
    ran = replace(given, **chosen)
    num_gpus = 0 if on_cpu else world_size
    advice = []
    for changes in _cheaper_settings(ran, given, num_layers, world_size):
        changed = replace(ran, **changes)
        refused = problems(changed, world_size=world_size, num_gpus=num_gpus, gpus_per_node=num_gpus)
        if changed != ran and not refused:
            # Of these only shorter rows leave layers as they were.
            recorded = {"cuda_graphs": "auto"} if given.cuda_graphs == "on" and "block_size" not in changes else {}
            flags = {**chosen, **changes, **recorded}
            advice.append(_flags({name: flags[name] for name in flags if flags[name] != getattr(given, name)}))
    if given.mem_cap:
        advice.append(f"a higher --mem_cap than {given.mem_cap:g} GB")
    return [*advice, "a smaller --model_name_or_path, or more GPUs"]


def fitting_flags(
    given: TrainArgs,
    used: TrainArgs,
    shape: ModelShape,
    world_size: int,
    gpu_gib: float | None,
    host_gib: float | None,
    **options: Any,
) -> str | None:
    """Return the flags, to be added to the command, of the fastest setting that is predicted to fit with room to spare.

    Args:
        given: the flags as the user gave them; what they say of precision, compilation and the model stands.
        used: the same without `auto`: what ran out of memory.
        options: `resolve_auto`'s.

    Returns:
        None where nothing is predicted to fit without taking more than what ran, nothing limits a device, or another
        flag stands in the way.
    """
    limits = [gpu_gib * GIB / 1e9 if gpu_gib else 0.0, given.mem_cap]
    limit_gb = min((limit for limit in limits if limit), default=0.0)
    names = [*AUTO_FLAGS, *(name for name in OTHER_FLAGS if getattr(given, name) != "off")]
    free = {spec.name: spec.default for spec in fields(TrainArgs) if spec.name in names}
    rows = {name: getattr(given, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    asked = replace(given, **{**free, **rows, "mem_cap": OOM_ROOM * limit_gb})
    choice = resolve_auto(asked, shape, world_size, gpu_gib, host_gib, **options)
    ran = resolve_auto(used, shape, world_size, gpu_gib, host_gib, **options)
    if not limit_gb or not choice.fits or choice.plan.total_bytes > ran.plan.total_bytes:
        return None
    changed = replace(asked, mem_cap=given.mem_cap, **chosen_flags(choice))
    changes = {name: getattr(changed, name) for name in free if getattr(changed, name) != getattr(given, name)}
    num_gpus = 0 if gpu_gib is None else world_size
    refused = problems(changed, world_size=world_size, num_gpus=num_gpus, gpus_per_node=num_gpus)
    resolved = replace(changed, step_in_backward="on" if choice.step_in_backward else "off")
    is_used = all(getattr(resolved, name) == getattr(used, name) for name in AUTO_FLAGS)
    return None if refused or is_used else _flags(changes)


def chosen_flags(choice: Choice) -> dict[str, Any]:
    """Return the flags that make a run of this choice."""
    flags = {name: getattr(choice, name) for name in AUTO_FLAGS if hasattr(choice, name)}
    step = "on" if choice.step_in_backward else "off"
    flags["step_in_backward"] = step if choice.plugin == "low_level_zero" else "auto"
    return {**flags, "gradient_checkpointing": str(choice.checkpointed_layers)}


def _flags(changes: dict[str, Any]) -> str:
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in changes.items()}
    return " ".join(f"--{name} {value}" for name, value in values.items())


def _cheaper_settings(args: TrainArgs, given: TrainArgs, num_layers: int, world_size: int) -> Iterator[dict[str, Any]]:
    """Yield changed settings that need less memory, in order of what they cost.

    Args:
        args: what ran.
        given: the flags as the user gave them.
    """
    plugin, replicas = args.plugin, world_size // args.replica_size
    if args.precision == "fp32":
        yield {"precision": "bf16"}
    if args.pp > 1:
        numbers = microbatch_choices(replace(args, num_microbatches=0))
        if more := [number for number in numbers if number > pipeline_microbatches(args)]:
            yield {"num_microbatches": more[0]}
    if _fixed_layers(args.gradient_checkpointing, num_layers) < num_layers:
        yield {"gradient_checkpointing": "on"}
    divisor = _smallest_divisor(args.per_device_train_batch_size)
    if divisor > 1:
        smaller: dict[str, Any] = {
            "per_device_train_batch_size": args.per_device_train_batch_size // divisor,
            "gradient_accumulation_steps": args.gradient_accumulation_steps * divisor,
        }
        keeps_pieces = replace(args, **smaller).train_batch_size % max(args.num_microbatches, 1) == 0
        yield smaller if keeps_pieces else {**smaller, "num_microbatches": given.num_microbatches}
    if plugin.startswith("torch_ddp"):
        yield {"plugin": "low_level_zero", **_half(args)}
    if plugin == "hybrid_parallel" and replicas > 1:
        yield {"zero_stage": 1, **_half(args)}
    if plugin == "low_level_zero" and replicas > 1 and args.gradient_accumulation_steps > 1:
        yield {"zero_stage": 2}
    alone = plugin.startswith("torch_ddp") and world_size == 1
    zero = {"plugin": "low_level_zero", **_half(args)} if alone else {}
    if zero or plugin == "low_level_zero":
        if _can_step_in_backward(args, world_size):
            yield {**zero, "step_in_backward": "on"}
        yield {**zero, "offload_optim_frac": 1.0}
    yield from _gemini_settings(args, given)
    if args.block_size >= 256:
        yield {"block_size": args.block_size // 2}


def _gemini_settings(args: TrainArgs, given: TrainArgs) -> Iterator[dict[str, Any]]:
    if given.plugin == "hybrid_parallel":
        return
    layout = {name: getattr(given, name) for name in LAYOUT_FLAGS}
    gemini = {} if args.plugin == "gemini" else {"plugin": "gemini", **_half(args), **layout}
    yield gemini
    if args.offload_optim_frac < 1 or gemini:
        yield {**gemini, "offload_optim_frac": 1.0}
    yield {**gemini, "offload_optim_frac": 1.0, "offload_param_frac": 1.0}


def _half(args: TrainArgs) -> dict[str, Any]:
    """Return the precision flag that a plugin with master weights needs where the given one would be refused."""
    return {"precision": "bf16"} if args.precision == "fp32" else {}


def _smallest_divisor(number: int) -> int:
    """Return the smallest divisor above 1, or 1 for 1."""
    return next((divisor for divisor in range(2, number + 1) if number % divisor == 0), 1)
