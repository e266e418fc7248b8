"""TorchDDP on one rank: nothing to reduce, so no reducer, no buckets, and one compiled graph.

PyTorch's DDP keeps gradients in buckets for good, 4 bytes a parameter, builds them anew after the first step while the
old ones are there, and makes torch.compile cut the model at every bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from colossalai.booster.plugin import TorchDDPPlugin
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.utils import get_current_device
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from .upstream import require_mended_version


class LocalDDPPlugin(TorchDDPPlugin):
    """TorchDDPPlugin for one rank."""

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
        return ModelWrapper(model.to(get_current_device())), optimizer, criterion, dataloader, lr_scheduler

    def no_sync(self, model: nn.Module, optimizer: OptimizerWrapper) -> AbstractContextManager[None]:
        """Return a context that holds nothing back."""
        return nullcontext()
