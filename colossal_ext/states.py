"""The fp32 weights and Adam moments of any boosted model, as full tensors under the unwrapped model's names.

Each plugin keeps them in its own place, shape and share: whole parameters (TorchDDP, HybridParallel), flat shares of
them (LowLevelZero, HybridParallel with ZeRO) or slices of chunks (Gemini), of what tensor and pipeline parallelism left.
Here all of them are pieces of one full tensor, so that states saved under one plugin and layout load under any other,
bit for bit. ColossalAI 0.5.0's own files lose the fp32 weights of the 16-bit plugins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.zero.gemini import GeminiOptimizer
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from .grad_norm import global_norm

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """Who shares what.

    Args:
        dp_group: ranks that hold the same parameters, or shares of them; None: all.
        tp_group: ranks that hold slices of the same parameters; None: no tensor parallelism.
        shapes: full shape of each parameter by name.
    """

    dp_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    shapes: Mapping[str, torch.Size]

    @property
    def is_writer(self) -> bool:
        """Whether this rank gets the full tensors of its pipeline stage."""
        return dist.get_rank(self.dp_group) == 0 and (self.tp_group is None or dist.get_rank(self.tp_group) == 0)


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one parameter's fp32 states.

    Args:
        shape: of the parameter, or of this rank's slice under tensor parallelism.
        weight: flat fp32 view, None where another rank holds all of it.
        offset: place of `weight` in the flat parameter.
        key: what the optimizer's `state` is looked up with.
        replicated: every data-parallel rank holds all of it.
    """

    name: str
    shape: torch.Size
    weight: Tensor | None
    offset: int
    key: Any
    replicated: bool

    @property
    def numel(self) -> int:
        """Elements of `weight` that are not padding."""
        return 0 if self.weight is None else max(0, min(self.weight.numel(), self.shape.numel() - self.offset))


def full_states(
    model: ModelWrapper, optimizer: OptimizerWrapper | None, layout: Layout, *, kinds: tuple[str, ...]
) -> Iterator[tuple[str, str, Tensor | None]]:
    """Yield (name, kind, full fp32 tensor on the CPU) of this pipeline stage. A collective, tensor by tensor.

    Args:
        kinds: of "weight", "exp_avg", "exp_avg_sq"; moments that no step has made yet are zero.

    Yields:
        The tensor on the writing ranks of `layout`, None on the others.
    """
    for piece in _pieces(model, optimizer):
        for kind in kinds:
            flat = _gathered_over_dp(piece, _local(piece, kind, optimizer), layout.dp_group)
            full = _gathered_over_tp(flat.view(piece.shape), layout.shapes[piece.name], layout.tp_group)
            yield piece.name, kind, full.cpu() if layout.is_writer else None


def load_states(
    model: ModelWrapper,
    optimizer: OptimizerWrapper,
    layout: Layout,
    read: Callable[[str, str], Tensor],
    *,
    adam_step: int,
) -> None:
    """Set fp32 weights, working weights and moments from full tensors. No collective.

    Args:
        read: returns the full fp32 tensor of (name, kind).
        adam_step: updates that the moments have seen; 0: there are none yet, and they are not read.
    """
    kinds = ("weight", *MOMENTS) if adam_step else ("weight",)
    working = dict(model.unwrap().named_parameters())
    for piece in _pieces(model, optimizer):
        full = {kind: _tp_slice(read(piece.name, kind), piece.shape, layout) for kind in kinds}
        if not isinstance(optimizer, GeminiOptimizer):  # there they follow from the fp32 chunks
            working[piece.name].data.copy_(full["weight"])
        if piece.weight is None:
            continue
        share = slice(piece.offset, piece.offset + piece.numel)
        piece.weight[: piece.numel].copy_(full["weight"].flatten()[share])
        if adam_step:
            optimizer.optim.state[piece.key] = _moments(piece, full, share, adam_step)
    if isinstance(optimizer, GeminiOptimizer):
        for chunk in optimizer.chunk16_set:
            _set_working_chunk(chunk)


def _set_working_chunk(chunk: Chunk) -> None:
    """Copy the fp32 chunk to its 16-bit one, wherever the two are; `Chunk.optim_update` wants them side by side."""
    chunk.payload.copy_(chunk.paired_chunk.payload)
    chunk.optim_sync_flag = True
    if chunk.device_type != "cpu":
        chunk.cpu_vis_flag = False  # a copy kept on the host is now stale


def weights_are_finite(model: ModelWrapper, optimizer: OptimizerWrapper) -> bool:
    """Return whether this rank's fp32 weights hold no infinity and no NaN. No collective."""
    by_device = defaultdict(list)
    for piece in _pieces(model, optimizer):
        if piece.weight is not None and piece.numel:
            by_device[piece.weight.device].append(piece.weight[: piece.numel])
    return all(bool(global_norm(weights).isfinite()) for weights in by_device.values())


def adam_step_of(optimizer: OptimizerWrapper) -> int:
    """Return how many updates the optimizer has made; skipped fp16 steps do not count."""
    steps = [int(state["step"]) for state in optimizer.optim.state.values() if "step" in state]
    return max(steps, default=0)


def _moments(piece: Piece, full: Mapping[str, Tensor], share: slice, adam_step: int) -> dict[str, Any]:
    weight = piece.weight
    assert weight is not None, "only a rank that holds weights holds moments"
    state: dict[str, Any] = {"step": adam_step}
    for kind in MOMENTS:
        moment = torch.zeros_like(weight)
        moment[: piece.numel].copy_(full[kind].flatten()[share])
        # Shaped like the tensor that Adam updates: a parameter or its copy in fp32, or a flat share.
        state[kind] = moment.view(piece.key.shape) if piece.key.numel() == moment.numel() else moment
    return state


def _local(piece: Piece, kind: str, optimizer: OptimizerWrapper | None) -> Tensor | None:
    """Return this rank's flat piece of a state without padding, or None where it holds nothing."""
    if piece.weight is None:
        return None
    if kind == "weight":
        return piece.weight[: piece.numel]
    state = optimizer.optim.state.get(piece.key) if optimizer is not None else None
    return state[kind].flatten()[: piece.numel] if state else torch.zeros_like(piece.weight[: piece.numel])


def _gathered_over_dp(piece: Piece, local: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """Return the whole flat tensor on rank 0 of the group, by adding each rank's piece to zeros: exact."""
    device = get_accelerator().get_current_device()
    if piece.replicated:
        assert local is not None, "a replicated piece is everywhere"
        return local.to(device, torch.float32)
    whole = torch.zeros(piece.shape.numel(), dtype=torch.float32, device=device)
    if local is not None:
        whole[piece.offset : piece.offset + local.numel()].copy_(local)
    dist.reduce(whole, group=group, group_dst=0)
    return whole


def _gathered_over_tp(local: Tensor, shape: torch.Size, group: ProcessGroup | None) -> Tensor:
    dim = _split_dim(local.shape, shape)
    if dim is None:
        return local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim)


def _tp_slice(full: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    dim = _split_dim(shape, full.shape)
    return (
        full if dim is None else full.chunk(dist.get_world_size(layout.tp_group), dim)[dist.get_rank(layout.tp_group)]
    )


def _split_dim(local: torch.Size, full: torch.Size) -> int | None:
    """Return the dimension that tensor parallelism divides, None where every rank has the whole tensor."""
    return next((dim for dim in range(len(full)) if local[dim] != full[dim]), None)


def _pieces(model: ModelWrapper, optimizer: OptimizerWrapper | None) -> Iterator[Piece]:
    """Yield this rank's pieces in the model's order, the same on all ranks of a pipeline stage."""
    numbers = {}
    if isinstance(optimizer, GeminiOptimizer):
        numbers = {id(parameter): number for number, parameter in optimizer.id_to_real_params.items()}
    for name, parameter in model.unwrap().named_parameters():
        if isinstance(optimizer, GeminiOptimizer):
            yield _gemini_piece(name, numbers[id(parameter)], optimizer)
        elif isinstance(optimizer, LowLevelZeroOptimizer):
            yield _zero_piece(name, parameter, optimizer)
        else:
            yield _whole_piece(name, parameter, optimizer)


def _whole_piece(name: str, parameter: Tensor, optimizer: OptimizerWrapper | None) -> Piece:
    # HybridParallel in fp32 has the method, which then returns None.
    masters: Mapping[int, Tensor] = getattr(optimizer, "get_working_to_master_map", dict)() or {}
    master = masters.get(id(parameter), parameter)
    return Piece(name, parameter.shape, master.data.view(-1), 0, master, replicated=True)


def _zero_piece(name: str, parameter: Tensor, optimizer: LowLevelZeroOptimizer) -> Piece:
    master = optimizer.get_working_to_master_map()[id(parameter)]
    store = optimizer.pid_to_bucket_store[id(parameter)]
    offset = store.local_rank * master.numel()
    return Piece(name, parameter.shape, master.data.view(-1), offset, master, replicated=store.world_size == 1)


def _gemini_piece(name: str, number: int, optimizer: GeminiOptimizer) -> Piece:
    shape = torch.Size(optimizer.params_info["id2shape"][number])
    if number not in optimizer.id_to_fake_params:
        return Piece(name, shape, None, 0, None, replicated=False)
    key = optimizer.id_to_fake_params[number]
    begin, end = optimizer.param_to_range[key]
    _, offset, _ = optimizer.get_offsets(number)
    chunk = optimizer.param_to_chunk16[key]
    return Piece(name, shape, chunk.paired_chunk.payload[begin:end], offset, key, replicated=chunk.keep_gathered)
