"""HybridParallel's replicas make the mean of their gradients where these are, in few large exchanges."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from colossalai.booster.plugin import hybrid_parallel_plugin
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule
from torch import nn

from .data_parallel import DataParallelModel
from .exchanges import GradientBucket
from .upstream import require_mended_version


def install_hybrid_gradients_mend() -> None:
    """Mend hybrid_parallel_plugin.py:117 and :174 of ColossalAI 0.5.0. Repeating it is fine.

    A model without stages is put into PyTorch's DistributedDataParallel, on one rank too: `data_parallel` says what that
    costs. After its last micro-batch a pipeline exchanges gradients one by one, biases like matrices, and divides each.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.booster.plugin.hybrid_parallel_plugin.HybridParallelModule")
    hybrid_parallel_plugin.DDP = _Replica
    HybridParallelModule.sync_dp_grads = _sync_dp_grads


class _Replica(DataParallelModel):
    """What HybridParallelModule makes of its model, and knows by its class in `unwrap`."""

    def __init__(self, module: nn.Module, process_group: dist.ProcessGroup, **options_of_ddp: Any) -> None:
        for name in ("find_unused_parameters", "static_graph"):
            if options_of_ddp.get(name):
                raise ValueError(f"{name}: has no effect, every parameter needs a gradient in each backward pass")
        super().__init__(module, process_group)


def _sync_dp_grads(self: HybridParallelModule) -> None:
    if self.dp_group.size() > 1:
        bucket = GradientBucket(list(self.module.parameters()), self.dp_group)
        bucket.send()
        bucket.receive()
