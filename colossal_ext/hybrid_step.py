"""HybridParallel's 16-bit step in one pass over its states: no fp32 copies of gradients, no wait for their norm."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelAMPOptimizer
from colossalai.tensor.d_tensor.api import is_distributed_tensor
from torch import Tensor

from .adam_kernels import CompileFreeAdam
from .grad_norm import clipping_divisor, global_norm
from .upstream import require_mended_version


def install_hybrid_step_mend() -> None:
    """Mend mixed_precision_optimizer.py:169-204 of ColossalAI 0.5.0 for HybridParallel. Repeating it is fine.

    There every gradient is copied to fp32, 4 bytes a parameter, and divided in a pass of its own, weights are copied to
    the model's in another, and the host waits for the norm. Here Adam reads the gradients as they are, divides them, and
    writes both weights.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.booster.plugin.hybrid_parallel_plugin.HybridParallelAMPOptimizer")
    HybridParallelAMPOptimizer.step = _step


@torch.no_grad()
def _step(optimizer: HybridParallelAMPOptimizer, *args: Any, **kwargs: Any) -> None:
    if not isinstance(optimizer.optim, CompileFreeAdam):
        MixedPrecisionOptimizer.step(optimizer, *args, **kwargs)
        return
    if optimizer.mixed_precision.should_skip_step():
        optimizer.zero_grad()
        return
    div_scale: float | Tensor = optimizer.mixed_precision.get_grad_div_scale()
    if optimizer.max_norm > 0:
        norm = _grad_norm(optimizer)
        optimizer._current_grad_norm = norm
        div_scale = div_scale * clipping_divisor(norm / div_scale, optimizer.max_norm)

    def grad_and_copy(master: Tensor) -> tuple[Tensor | None, tuple[Tensor]]:
        working = optimizer.master_to_working_map[master]
        return working.grad, (working.data,)

    for group in optimizer.optim.param_groups:
        optimizer.optim.update_group(group, grad_and_copy, div_scale)


def _grad_norm(optimizer: HybridParallelAMPOptimizer) -> Tensor:
    """Return the norm over the model's gradients as they are, the same fp32 scalar on every rank. A collective."""
    by_copies = defaultdict(list)
    for working in optimizer.working_to_master_map:
        if working.grad is not None:
            by_copies[_num_copies(optimizer, working)].append(working.grad)
    square = torch.zeros((), dtype=torch.float64, device=next(iter(optimizer.working_to_master_map)).device)
    for num_copies, grads in by_copies.items():
        square += global_norm(grads).double().square() / num_copies
    for group, size in ((optimizer.tp_pg, optimizer.tp_size), (optimizer.pp_pg, optimizer.pp_size)):
        if size > 1:
            dist.all_reduce(square, group=group)
    return square.sqrt().float()


def _num_copies(optimizer: HybridParallelAMPOptimizer, working: Tensor) -> int:
    """Return how many of the ranks that add up their squares hold this gradient."""
    num_copies = optimizer.tp_size if optimizer.tp_size > 1 and not is_distributed_tensor(working) else 1
    for stages in optimizer.shared_params if optimizer.pp_size > 1 else ():
        if stages.get(optimizer.stage_manager.stage) is working:
            num_copies *= len(stages)
    return num_copies
