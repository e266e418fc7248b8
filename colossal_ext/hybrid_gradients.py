"""HybridParallel's stages make the mean of their gradients in one launch."""

from __future__ import annotations

from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule

from .data_parallel import Bucket
from .upstream import require_mended_version


def install_hybrid_gradients_mend() -> None:
    """Mend hybrid_parallel_plugin.py:174 of ColossalAI 0.5.0. Repeating it is fine.

    After its last micro-batch a pipeline exchanges gradients one by one, biases like matrices, and divides each.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.booster.plugin.hybrid_parallel_plugin.HybridParallelModule")
    HybridParallelModule.sync_dp_grads = _sync_dp_grads


def _sync_dp_grads(self: HybridParallelModule) -> None:
    if self.dp_group.size() > 1:
        bucket = Bucket(list(self.module.parameters()), self.dp_group)
        bucket.send()
        bucket.receive()
