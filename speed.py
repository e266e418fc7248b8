"""Expected time of a step, good enough to put settings in order; no torch import.

The seconds are those of one H100 with 16 host cores; on other machines only their ratios between settings of one model
mean something, and less where the host is slower or faster beside its GPU.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from report import MatrixShape, token_flops

# Between what 1.3b (138 ms) and 2.7b under a cap (788 ms) reach on one H100 (2026-11-25): 50 % of its
# dense 989 TFLOP/s.
GPU_FLOPS = 500e12
# Tokens/s of 125m, batch 32 x 1024, over low_level_zero's on one H200 (2026-11-27), most of them from one sweep (README,
# results); torch_ddp_fp16: mean of two calls, gemini and torch_ddp (2026-11-28, 16-bit gradients): by both their ratios to
# plain_compile; hybrid_parallel: in a call of its own (2026-11-28).
PLUGIN_SPEED = {
    "hybrid_parallel": 1.003,
    "low_level_zero": 1.0,
    "torch_ddp": 0.972,
    "gemini": 0.961,
    "torch_ddp_fp16": 0.861,
}
# low_level_zero and gemini in fp16 or fp32, or on a CPU; and their launches: in fp16 the host waits to hear of overflows.
# Estimates.
OTHER_ZERO_SPEED, OTHER_ZERO_LAUNCHES = 0.8, 1.4
# Forward and backward on several GPUs, over those on one: 1.3b, batch 8 x 1024, on four H200. torch_ddp and low_level_zero in
# one call (2026-11-28), without the update 131.8 ms a step to 119.8 and 127.4 to 117.1; gemini so that with the update it
# takes 1.09 times as long as low_level_zero, 6.7b and 13b, batch 4, on two in one call (2026-11-29), 1.105 and 1.083, with
# chunks fetched ahead (1.3b waits for launches, 1.21 to 1.25 times as long, from other calls);
# hybrid_parallel's is what tp 2 x dp 2, compiled, 181.2 ms to 131.0 on one, leaves beside its layers' exchanges and
# MATRIX_SHARE.
EXCHANGE_SPEED = {
    "torch_ddp": 0.909,
    "torch_ddp_fp16": 0.909,
    "low_level_zero": 0.919,
    "gemini": 0.87,
    "hybrid_parallel": 0.91,
}
# Share of an H100's 787 TFLOP/s (scaling.MATRIX_FLOPS) that compiled layers reach, by the width of a square matrix as large
# as what a GPU has of one, hidden size / sqrt(tp), on one and two H200 (2026-11-27 and 28): 125m, 1.3b under tp 2, 1.3b,
# 6.7b under tp 2; 6.7b and 13b whole lie 2 % to either side of the last.
MATRIX_SHARE = {768: 0.535, 1448: 0.60, 2048: 0.70, 2896: 0.765}
# Bus bandwidth of an all-reduce of 1 GiB over NVLink, measured, by the number of GPUs.
NVLINK_BYTES_S = {2: 329e9, 4: 355e9, 8: 361e9}
LATENCY_S = 20e-6  # of one collective on two GPUs; grows with the logarithm of their number. ASSUMPTION
# What the host takes to launch forward and backward pass and update of a compiled layer: 125m, batch 8 x 1024, on one
# H200, where that is the limit, four layers a graph, means of two calls (2026-11-28, benchmarks/results/gpus.md);
# gemini's, with a graph a layer, of one, before colossal_ext/gemini_hook.py; hybrid_parallel's by its ratio to
# low_level_zero's in one, torch_ddp_fp16's by that to torch_ddp's the day before. Up to twice as much on another host.
LAUNCH_S = {
    "torch_ddp": 1.9e-3,
    "torch_ddp_fp16": 2.4e-3,
    "low_level_zero": 1.84e-3,
    "hybrid_parallel": 1.74e-3,
    "gemini": 3.6e-3,
}
# With a graph a layer, over that: in the call by hand low_level_zero 25.0 and 25.6 ms a step to 20.7, torch_ddp 27.4 to 21.1.
SINGLE_GRAPH_LAUNCHES = 1.25
# low_level_zero's on several GPUs over torch_ddp's, and layers divided by two over whole ones: 1.3b, batch 1 x 1024 a GPU, on
# two H200 in one call (2026-11-28), 46.2 ms a step to 44.7, and 54.4, hybrid_parallel's own launches taken out.
SHARDED_LAUNCHES, DIVIDED_LAUNCHES = 1.03, 1.33
# A layer's share of a step whose layers are CUDA graphs: 125m, batch 1 x 1024, low_level_zero on one H200 (2026-11-28), 14.7 ms
# for 19.5 without.
GRAPH_LAUNCH_S = 1.2e-3
# The same of a layer without the update, for each piece of a pipeline: 1.3b under tp 2 x pp 2 on four H200 (2026-11-27), not
# compiled, and compiled one by one, 2.4 to 4.6 ms for eight pieces from call to call, 3.7 for four; 6.7b, four layers a graph,
# 3.0 at most (2026-11-28).
EAGER_LAYER_S, COMPILED_LAYER_S = 3.8e-3, 3.0e-3
# Adding the gradients of a pipeline's next piece to those that are there, in 16 bits: 34 ms of 13b under tp 2 x pp 2 in
# eight pieces, on H200 (2026-11-27), 1.5e-12; what two pieces gain on four in ten parts a stage, 8 ms a step beside a bubble
# twice as large (2026-11-28), 2.3e-12, of which some is that products are larger.
SUM_PARAMETER_S = 1.7e-12
# Updating in the backward pass, the host waits for the loss before it may launch that pass. Estimate.
BACKWARD_STEP_SPEED = 0.97
# 28 bytes of states, gradient and weight a parameter, read or written at 2.8 TB/s. Estimate.
GPU_ADAM_S = 1e-11
# Adam on 16 host cores, seconds a parameter, with its gradient and weight on their way over PCIe: what 2.7b with all states
# on the host, 896 ms a step (2026-11-25), leaves of the host beside an H100.
HOST_ADAM_S = 2.7e-10
# A parameter kept on the host comes to the GPU for forward and backward: 2 x 2 bytes at 54 GB/s, and its gradient goes.
HOST_PARAMETER_S = 1.1e-10
# A micro-batch more: launches, and weights and gradients read and written once more, 12 bytes a parameter. Estimate.
MICRO_BATCH_S, MICRO_BATCH_PARAMETER_S = 3e-3, 4e-12


@dataclass(frozen=True)
class Work:
    """What a step asks of one GPU and its host.

    Args:
        at_best: GPUs in bf16.
        on_gpu: the host launches what a GPU computes.
        exchanges: with other data-parallel ranks.
        tokens: of all micro-batches, for each GPU of a data-parallel replica of `replica_size` GPUs.
        gpu_states, host_states: parameters that this GPU, and the whole host, update.
        host_parameters: parameters that come from the host when they are needed.
        stages, pieces: of a pipeline, and what it cuts each micro-batch into.
        chunks: parts of the model that a stage has.
        compiled: its layers, of which `layers_per_graph` share a graph.
        cuda_graphs: its layers are replayed as such.
        layer_bytes, layer_rounds: that pass a GPU's link in all-reduces of divided layers, and how often these wait for
            LATENCY_S: each to scatter and to gather, by the logarithm of the GPUs that it connects.
        stage_bytes, stage_rounds: the same of what a stage of a pipeline sends on and back.
    """

    shape: MatrixShape
    plugin: str
    at_best: bool
    on_gpu: bool
    exchanges: bool
    tokens: int
    seq_len: int
    micro_batches: int
    num_params: int
    recomputed_layers: int
    gpu_states: float
    host_states: float
    host_parameters: float
    step_in_backward: bool
    replica_size: int = 1
    stages: int = 1
    pieces: int = 1
    chunks: int = 1
    compiled: bool = True
    layers_per_graph: int = 1
    cuda_graphs: bool = False
    layer_bytes: float = 0.0
    layer_rounds: float = 0.0
    stage_bytes: float = 0.0
    stage_rounds: float = 0.0

    @property
    def bubble(self) -> float:
        """Time that a pipeline's stages wait, over the time they work."""
        return (self.stages - 1) / (self.pieces * self.chunks)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause; the whole is their sum.

    Args:
        compute: forward, backward and the GPU's own update.
        recompute: forward of the recomputed layers once more.
        exchanges: between the GPUs that share a layer, and between stages; nothing hides them.
        bubble: stages of a pipeline wait for the first and the last piece.
        micro_batches: what accumulation adds.
        host: the GPU waits for the host's updates and parameters.
        launches: the GPU waits for the host to launch its work, where that is little.
    """

    compute: float
    recompute: float
    exchanges: float
    bubble: float
    micro_batches: float
    host: float
    launches: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def describe(self) -> str:
        """Return the causes as shares of the whole, those that are nothing left out."""
        parts = {
            "compute": self.compute,
            "recompute": self.recompute,
            "exchanges within the model": self.exchanges,
            "the pipeline's bubble": self.bubble,
            "accumulation": self.micro_batches,
            "waiting for the host": self.host,
            "waiting for launches": self.launches,
        }
        shares = {name: seconds / self.total for name, seconds in parts.items()}
        return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)


def step_time(work: Work) -> StepTime:
    """Return the expected time of a step.

    The host's update starts with the first gradient where it runs in the backward pass of the last micro-batch, which
    then hides it, and after that pass otherwise.
    """
    flops = token_flops(work.shape, work.seq_len, recomputed_layers=work.recomputed_layers)
    rate = GPU_FLOPS * work.replica_size * _plugin_speed(work)
    # Of a micro-batch the first piece's are part of what accumulation adds.
    sums = work.micro_batches * (work.pieces - 1) * work.num_params * SUM_PARAMETER_S
    forward_backward = work.tokens * flops.model / rate * stage_imbalance(work.shape, work.stages) + sums
    recompute = work.tokens * (flops.hardware - flops.model) / rate * _recompute_imbalance(work)
    last_backward = (forward_backward * 2 / 3 + recompute) / work.micro_batches
    layers = _exchange_s(work.layer_bytes, work.layer_rounds)
    exchanges = layers + _exchange_s(work.stage_bytes, work.stage_rounds)
    bubble = work.bubble * (forward_backward + recompute + layers)
    host = work.host_states * HOST_ADAM_S
    if work.step_in_backward:
        host = max(0.0, host - last_backward)
    compute = forward_backward + work.gpu_states * GPU_ADAM_S
    return StepTime(
        compute=compute,
        recompute=recompute,
        exchanges=exchanges,
        bubble=bubble,
        micro_batches=(work.micro_batches - 1) * (MICRO_BATCH_S + work.num_params * MICRO_BATCH_PARAMETER_S),
        host=host + work.micro_batches * work.host_parameters * HOST_PARAMETER_S,
        launches=max(0.0, _launch_s(work) - compute - recompute - exchanges - bubble),
    )


def _exchange_s(num_bytes: float, rounds: float) -> float:
    return num_bytes / NVLINK_BYTES_S[2] + rounds * LATENCY_S


def matrix_share(hidden_size: int, *, tp: int = 1) -> float:
    """Return the share of layers of this width divided by `tp`: linear in its logarithm between those measured."""
    width = min(max(hidden_size / math.sqrt(tp), min(MATRIX_SHARE)), max(MATRIX_SHARE))
    points = itertools.pairwise(MATRIX_SHARE.items())
    (low, share_low), (high, share_high) = next(pair for pair in points if width <= pair[1][0])
    return share_low + (share_high - share_low) * math.log(width / low) / math.log(high / low)


def stage_imbalance(shape: MatrixShape, stages: int) -> float:
    """Return the work of a pipeline's last stage, which has the output head, over that of an even share."""
    return 1 + (stages - 1) * (1 - shape.layer_matrix_params / shape.matrix_params)


def _recompute_imbalance(work: Work) -> float:
    """Return the first stage's recomputed layers over an even share of them: they are the first of the model."""
    if not work.recomputed_layers:
        return 1.0
    part = work.shape.num_layers / (work.stages * work.chunks)
    rounds, rest = divmod(work.recomputed_layers, work.stages * part)
    return (rounds * part + min(rest, part)) * work.stages / work.recomputed_layers


def _launch_s(work: Work) -> float:
    """Return the seconds in which the host launches a step."""
    if not work.on_gpu:
        return 0.0
    layers = work.micro_batches * work.shape.num_layers
    if work.stages == 1:
        return layers * _layer_launch_s(work)
    layer_s = COMPILED_LAYER_S if work.compiled else EAGER_LAYER_S
    return layers / work.stages * work.pieces * layer_s * (1 + work.bubble)


def _layer_launch_s(work: Work) -> float:
    if work.cuda_graphs:
        return GRAPH_LAUNCH_S
    seconds = LAUNCH_S[work.plugin]
    if work.plugin == "low_level_zero" and work.exchanges:
        seconds = SHARDED_LAUNCHES * LAUNCH_S["torch_ddp"]
    if work.layer_bytes:
        seconds *= DIVIDED_LAUNCHES
    if work.layers_per_graph == 1 and work.plugin != "gemini":
        seconds *= SINGLE_GRAPH_LAUNCHES
    return seconds * (OTHER_ZERO_LAUNCHES if _is_other_zero(work) else 1.0)


def _is_other_zero(work: Work) -> bool:
    return work.plugin in ("low_level_zero", "gemini") and not work.at_best


def _plugin_speed(work: Work) -> float:
    factor = PLUGIN_SPEED[work.plugin]
    if _is_other_zero(work):
        factor *= OTHER_ZERO_SPEED
    if work.exchanges:
        factor *= EXCHANGE_SPEED[work.plugin]
    if work.layer_bytes:
        width = work.shape.hidden_size
        factor *= matrix_share(width, tp=work.replica_size // work.stages) / matrix_share(width)
    return factor * (BACKWARD_STEP_SPEED if work.step_in_backward else 1.0)
