"""Gemini's chunks shard, and offload, where "device" and "host" are both the CPU."""

from __future__ import annotations

from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.chunk import chunk as chunk_module
from colossalai.zero.gemini.chunk import manager as manager_module
from colossalai.zero.gemini.chunk.chunk import Chunk

from .upstream import require_mended_version

# A label that no tensor is put on: `Chunk` only compares its type with "cpu".
DEVICE_LABEL = torch.device("cuda")


class HostChunk(Chunk):
    """A chunk with a device shard and a host shard that are both CPU tensors.

    `Chunk` tells one from the other by `device.type`. With the accelerator on the CPU it therefore empties its device
    shard when it is closed (chunk.py:318 of 0.5.0) and never fills it again (`shard_move`, chunk.py:345), and the
    first gather asserts. Here the label says "device", and a move goes to the side that the shard is not on.

    Attributes:
        offloaded: this chunk's gradients and optimizer states live on the host.
            `gemini_placement` sets it on the 16-bit chunk; its fp32 and gradient chunks follow.
    """

    cuda_shard: torch.Tensor | None
    cpu_shard: torch.Tensor | None
    optim_sync_flag: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shard_device = DEVICE_LABEL
        self.offloaded = False

    @property
    def lives_on_host(self) -> bool:
        return self.offloaded or (self.paired_chunk is not None and self.paired_chunk.offloaded)

    def shard_move(self, device: torch.device, force_copy: bool = False, non_blocking: bool = False) -> None:
        """Move the shard to the other side; a chunk that does not live on the host never leaves the device.

        Args:
            device: not looked at, since both sides are the CPU.
        """
        if not self.optim_sync_flag:
            self._Chunk__paired_shard_move(non_blocking=non_blocking)
            self.optim_sync_flag = True
        elif self.cuda_shard is None:
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None
        elif self.lives_on_host:
            self.cpu_shard, self.cuda_shard = self.cuda_shard, None
            self.cpu_vis_flag = True

    def init_grad_chunk(self) -> Chunk:
        """Return this chunk's gradient chunk, on the same side as the chunk."""
        grad_chunk = super().init_grad_chunk()
        grad_chunk.offloaded = self.lives_on_host
        return grad_chunk


def install_gemini_host_chunks() -> None:
    """Make ChunkManager build `HostChunk`s. Call it before Gemini is boosted on a CPU; repeating it is fine.

    Raises:
        RuntimeError: the accelerator's device is no CPU, or another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.zero.gemini.chunk.Chunk")
    device = get_accelerator().get_current_device()
    if device.type != "cpu":
        raise RuntimeError(f"install_gemini_host_chunks is for CPU rehearsals only, the accelerator is on {device}")
    manager_module.Chunk = HostChunk  # parameters and master weights
    chunk_module.Chunk = HostChunk  # gradients, in Chunk.init_grad_chunk
