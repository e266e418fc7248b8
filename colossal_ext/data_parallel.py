"""Data parallelism that makes the mean of gradients where they are, in few large exchanges beside the backward pass.

PyTorch's DDP copies gradients into buckets and keeps these for good, as much memory again. It makes them anew after the
first step while the old ones are there; among three or more ranks a bucket decides in which order their numbers are added,
so that a resumed run differs in its last bits. And torch.compile cuts the model at every bucket, or is kept from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import proxy

import torch
import torch.distributed as dist
from colossalai.booster.plugin import TorchDDPPlugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.utils import get_current_device
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from .exchanges import BUCKETS, GradientBucket, in_parts
from .upstream import require_mended_version

# Of one exchange at least.
BUCKET_BYTES = 2**28


class DataParallelPlugin(TorchDDPPlugin):
    """TorchDDPPlugin with `DataParallelModel` instead of DistributedDataParallel."""

    def __init__(self, **options: Any) -> None:
        require_mended_version("colossalai.booster.plugin.TorchDDPPlugin.configure")
        super().__init__(**options)

    def configure(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Callable | None = None,
        dataloader: DataLoader | None = None,
        lr_scheduler: LRScheduler | None = None,
    ) -> tuple[Any, ...]:
        """Return the model, on the device, and the optimizer in the wrappers that a Booster expects."""
        if optimizer is not None and not isinstance(optimizer, OptimizerWrapper):
            optimizer = OptimizerWrapper(optimizer)
        return DataParallelModel(model.to(get_current_device())), optimizer, criterion, dataloader, lr_scheduler

    def no_sync(self, model: DataParallelModel, optimizer: OptimizerWrapper) -> AbstractContextManager[None]:
        """Return a context in which gradients stay this rank's own."""
        return model.no_sync()


class DataParallelModel(ModelWrapper):
    """A model whose gradients are the ranks' mean after each backward pass outside of `no_sync`; one rank exchanges nothing.

    Every rank gets the first one's weights and buffers. Each such pass has to give every parameter a gradient.

    Args:
        group: the ranks; None: all.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(module)
        self._exchanges = dist.get_world_size(group) > 1
        self._is_in_backward = False
        self._next = 0  # bucket of this backward pass to be sent
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._buckets = list[GradientBucket]()
        if self._exchanges:
            item_bytes = min(((each.grad_dtype or each.dtype).itemsize for each in parameters), default=4)
            least = min(BUCKET_BYTES // item_bytes, sum(parameter.numel() for parameter in parameters) // BUCKETS)
            self._buckets += (GradientBucket(part, group) for part in in_parts(reversed(parameters), least))
            _take_from_the_first(module, group)
        own = proxy(self)

        def count(bucket: GradientBucket, _: nn.Parameter) -> None:
            own._count(bucket)

        # A parameter's hook that holds the parameter would keep both for good: the collector does not see into it.
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(count, proxy(bucket)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert not self._is_in_backward, "a backward pass was broken off"
        return super().forward(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up on each rank."""
        before, self._exchanges = self._exchanges, False
        try:
            yield
        finally:
            self._exchanges = before

    def _count(self, bucket: GradientBucket) -> None:
        """Note that a gradient is there; send the buckets that are full, in their order, the same on all ranks."""
        if not self._exchanges:
            return
        if not self._is_in_backward:
            self._is_in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        bucket.num_missing -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].num_missing:
            self._buckets[self._next].send()
            self._next += 1

    def _finish(self) -> None:
        """Wait for the means at the end of a backward pass, on a GPU its current stream alone.

        Raises:
            RuntimeError: a parameter got no gradient.
        """
        if missing := sum(bucket.num_missing for bucket in self._buckets[self._next :]):
            raise RuntimeError(
                f"{missing} parameters got no gradient in a backward pass: ranks could not exchange them"
            )
        for bucket in self._buckets:
            bucket.receive()
        self._next, self._is_in_backward = 0, False


@torch.no_grad()
def _take_from_the_first(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Give every rank the first one's weights and buffers."""
    for tensor in (*module.parameters(), *module.buffers()):
        sent = tensor.contiguous()
        dist.broadcast(sent, group=group, group_src=0)
        tensor.copy_(sent)  # which costs nothing where it is the tensor itself
