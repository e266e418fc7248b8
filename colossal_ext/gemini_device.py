"""Gemini's chunks on a GPU: host memory only for what goes there, no gradient overwritten, few waits of the host."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from colossalai.zero.gemini.chunk import chunk as chunk_module
from colossalai.zero.gemini.chunk import manager as manager_module
from colossalai.zero.gemini.chunk.chunk import Chunk

from .grad_norm import clipping_divisor
from .pinned import pinned_empty
from .upstream import require_mended_version


class DeviceChunk(Chunk):
    """A chunk whose pinned host shard is made when it is first needed, of exactly its size.

    With `pin_memory` upstream (chunk.py:313 and :670 of 0.5.0) gives every chunk a host shard, though it may never leave
    the GPU, in blocks that PyTorch rounds up to a power of two: of 1.3b's chunks, all on the GPU, the host held
    14.6 GiB.

    Upstream also frees the gathered gradients (chunk.py:417 and :556) while the stream that reduces them still reads:
    the allocator knows of the stream that made them only, and gives the memory away at once. On an H100 and two H200
    losses were up to 25 % off, or NaN, where no clipping waited for the norm. In the same way it frees shards that the
    reducing stream made and another one still reads; where memory is short their pages may be unmapped meanwhile.
    """

    cuda_shard: torch.Tensor | None
    cpu_shard: torch.Tensor | None
    pin_memory: bool

    def close_chunk(self) -> None:
        """Close the chunk, with a host shard only where it starts there."""
        pin_memory, self.pin_memory = self.pin_memory, False
        super().close_chunk()
        self.pin_memory = pin_memory
        if pin_memory and self.cpu_shard is not None:
            self.cpu_shard = pinned_empty(self.shard_size, self.dtype).copy_(self.cpu_shard)

    def shard_move(self, device: torch.device, force_copy: bool = False, non_blocking: bool = False) -> None:
        """Move the shard to the device, or to the host, which takes its content the first time in any case."""
        if device.type == "cpu" and self.pin_memory and self.cpu_shard is None and self.cuda_shard is not None:
            self.cpu_shard = pinned_empty(self.shard_size, self.dtype)
            self.cpu_vis_flag = False
        _keep_for_current_stream(self.cuda_shard)
        super().shard_move(device, force_copy, non_blocking)

    def access_chunk(self, async_access: bool = False) -> dist.Work | None:
        """Gather the chunk, and free the shard once the current stream has read it or waited for NCCL, which has."""
        _keep_for_current_stream(self.cuda_shard)
        return super().access_chunk(async_access)

    def init_grad_chunk(self) -> Chunk:
        """Return this chunk's gradient chunk, which has no host shard yet."""
        if self.grad_chunk is not None:
            _keep_for_current_stream(self.grad_chunk.cuda_shard)
        pin_memory, self.pin_memory = self.pin_memory, False
        grad_chunk = super().init_grad_chunk()
        grad_chunk.pin_memory = self.pin_memory = pin_memory
        return grad_chunk

    def release_chunk(self) -> None:
        """Free the gathered chunk once the current stream has read it."""
        _keep_for_current_stream(self.cuda_global_chunk)
        super().release_chunk()

    def reduce(self, async_op: bool = False) -> None:
        """Reduce on the current stream, and free the gathered gradients once it has.

        Args:
            async_op: not looked at: NCCL would read on a stream of its own, which nothing here knows.
        """
        _keep_for_current_stream(self.cuda_global_chunk)
        super().reduce()

    @property
    def has_inf_or_nan(self) -> Any:
        """Whether gradients overflowed. Only fp16 asks (`check_local_overflow`, gemini_optimizer.py:63)."""
        return super().has_inf_or_nan if self.dtype == torch.float16 else False

    def set_l2_norm(self) -> None:
        """Record the gradients' squared norm, on the GPU: chunk.py:262 makes the host wait for each chunk."""
        numel = self.utilized_size if self.is_gathered else self.valid_end
        self.l2_norm = torch.linalg.vector_norm(self.payload[:numel], dtype=torch.float32).square()


def _keep_for_current_stream(tensor: torch.Tensor | None) -> None:
    """Once the tensor is freed, give its memory away only when the current stream has done what it has by then."""
    if tensor is not None:
        tensor.record_stream(torch.cuda.current_stream())


class StreamOrder:
    """A stream that the current one waits for, where the host would have to.

    GeminiDDP waits with the host for the reduced gradients (`_post_backward`, gemini_ddp.py:327), so that the GPU has
    nothing to do while the optimizer is launched. Only an optimizer on the host needs that.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        """Let the current stream wait."""
        torch.cuda.current_stream().wait_stream(self.stream)


def clip_on_device(optimizer: Any) -> None:
    """Make a GeminiOptimizer divide gradients by a number on the GPU, for which the host does not wait.

    `_calc_global_norm` (gemini_optimizer.py:229 of 0.5.0) reads each group's norm, and only then is the optimizer
    launched. Only an optimizer on the host needs that.
    """
    require_mended_version("colossalai.zero.gemini.gemini_optimizer.GeminiOptimizer")
    optimizer._get_combined_scale = functools.partial(combined_scale, optimizer)


def combined_scale(optimizer: Any) -> torch.Tensor | float:
    """Return what gradients are to be divided by, loss scale x clipping, and remember their norm, as a tensor."""
    scale: float = optimizer.mix_precision_mixin.get_grad_div_scale()
    if not optimizer.clipping_flag:
        return scale
    squares = defaultdict[Any, list[torch.Tensor]](list)
    for chunk in sorted(optimizer.chunk16_set, key=lambda each: each.count_id):  # a sum of its own order each run
        grad_chunk = chunk if optimizer.module.chunk_manager.reuse_fp16_chunk else chunk.grad_chunk
        squares[None if grad_chunk.is_gathered else grad_chunk.torch_pg].append(grad_chunk.l2_norm)
        grad_chunk.l2_norm = None
    sums = {group: torch.stack(parts).sum() for group, parts in squares.items()}
    for group, square in sums.items():
        if group is not None:
            dist.all_reduce(square, group=group)
    optimizer._current_grad_norm = norm = torch.stack(list(sums.values())).sum().sqrt()
    return clipping_divisor(norm / scale, optimizer.max_norm) * scale


def install_gemini_device_chunks() -> None:
    """Make ChunkManager build `DeviceChunk`s. Call it before Gemini is boosted on a GPU; repeating it is fine.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.zero.gemini.chunk.Chunk")
    manager_module.Chunk = DeviceChunk  # parameters and master weights
    chunk_module.Chunk = DeviceChunk  # gradients, in Chunk.init_grad_chunk
