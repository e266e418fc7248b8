"""Stages that share a tied embedding add up its gradients without waiting for each other's devices."""

from __future__ import annotations

import torch.distributed as dist
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule

from .upstream import require_mended_version


def install_pipeline_barrier_mend() -> None:
    """Mend hybrid_parallel_plugin.py:136 of ColossalAI 0.5.0. Repeating it is fine.

    After each shared parameter's exchange stands a barrier of all ranks, in which the host waits for its GPU at the end
    of every step: it then has nothing launched ahead. The exchange is in the order of the stream without it.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.booster.plugin.hybrid_parallel_plugin.HybridParallelModule")
    HybridParallelModule.sync_shared_params = _sync_shared_params


def _sync_shared_params(self: HybridParallelModule) -> None:
    for stages, group in zip(self.shared_params, self.shared_param_process_groups, strict=True):
        if self.stage_manager.stage in stages:
            dist.all_reduce(stages[self.stage_manager.stage].grad, group=group)
