"""Gemini's static placement, with fractions that mean what they say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.placement_policy import PlacementPolicyFactory, StaticPlacementPolicy

from .upstream import require_mended_version


class ExactStaticPlacementPolicy(StaticPlacementPolicy):
    """StaticPlacementPolicy that counts every chunk once and picks the same chunks on every rank.

    Upstream (placement_policy.py:87 of 0.5.0) sums `chunk_mem` over parameters, so that a chunk of twelve parameters
    counts twelve times: `offload_optim_frac=0.1` then offloads everything, and `shard_param_frac=0.9` gathers
    everything. It also walks a set of chunks, whose order differs from rank to rank.
    """

    def setup_grads_device(
        self, params: Sequence[torch.Tensor], grads_device_map: dict[torch.Tensor, torch.device]
    ) -> None:
        """Fill `grads_device_map`: where each parameter's gradient and optimizer states live."""
        chunks = self.chunk_manager.get_chunks(params)
        total_bytes = sum(chunk.chunk_mem for chunk in chunks)
        offloaded_bytes = 0
        for chunk in chunks:
            on_host = not chunk.keep_gathered and offloaded_bytes < total_bytes * self.offload_optim_frac
            offloaded_bytes += chunk.chunk_mem if on_host else 0
            chunk.offloaded = on_host
            device = torch.device("cpu") if on_host else get_accelerator().get_current_device()
            grads_device_map.update(dict.fromkeys(chunk.get_tensors(), device))
        self.keep_gathered_chunk_mem = total_bytes * (1 - self.shard_param_frac)
        self.keep_cuda_chunk_mem = total_bytes * (1 - self.offload_param_frac)


def install_exact_placement() -> None:
    """Make Gemini's placement_policy="static" the exact one. Repeating it is fine.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.zero.gemini.placement_policy.StaticPlacementPolicy")
    PlacementPolicyFactory.policies["static"] = ExactStaticPlacementPolicy
