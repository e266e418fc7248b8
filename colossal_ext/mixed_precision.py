"""Autocast, loss scaling and a gradient norm for TorchDDP: an object for `Booster(mixed_precision=...)`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from colossalai.booster.mixed_precision.mixed_precision_base import MixedPrecision
from colossalai.interface import ModelWrapper, OptimizerWrapper
from torch import Tensor, nn
from torch.optim import Optimizer


class AutocastPrecision(MixedPrecision):
    """Runs the forward under `torch.autocast`, with fp32 weights and optimizer states, and fp32 gradients by default.

    Unlike ColossalAI's own "fp16" it leaves the boosted model's class alone, so that no_sync and checkpoints work,
    runs on CPU and CUDA alike, and `clip_grad_by_norm` returns the norm. "bf16" does not exist there.
    """

    def __init__(self, device_type: str, dtype: torch.dtype, *, initial_scale: float = 2.0**16) -> None:
        """
        Args:
            device_type: "cuda" or "cpu".
            dtype: torch.bfloat16; torch.float16, which scales the loss; torch.float32, which casts nothing.
            initial_scale: the first loss scale of fp16.
        """
        super().__init__()
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype {dtype}: must be torch.bfloat16, torch.float16 or torch.float32")
        self.device_type, self.dtype, self.initial_scale = device_type, dtype, initial_scale

    def configure(
        self, model: nn.Module, optimizer: Optimizer | None = None, criterion: Callable | None = None
    ) -> tuple[nn.Module, OptimizerWrapper | None, Callable | None]:
        """Return the same model, now autocasting, and the optimizer in a wrapper that keeps the gradient norm."""
        if self.dtype is not torch.float32:
            inner = model.unwrap() if isinstance(model, ModelWrapper) else model
            autocast_forward(inner, self.device_type, self.dtype)
        return model, optimizer and self._wrap(optimizer), criterion

    def _wrap(self, optimizer: Optimizer) -> NormKeepingOptimizer:
        plain = optimizer.unwrap() if isinstance(optimizer, OptimizerWrapper) else optimizer
        if self.dtype is torch.float16:
            return LossScaledOptimizer(plain, self.device_type, self.initial_scale)
        return NormKeepingOptimizer(plain)


def autocast_forward(module: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Replace `module.forward` by itself under autocast, with the same signature.

    `module.compile()` compiles it with the autocast inside, whichever of the two calls comes first.
    """
    forward = module.forward

    @functools.wraps(forward)  # generate() reads the signature
    def forward_under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype):
            return forward(*args, **kwargs)

    module.forward = forward_under_autocast


class NormKeepingOptimizer(OptimizerWrapper):
    """A wrapper that remembers the norm that clipping found."""

    def __init__(self, optim: Optimizer) -> None:
        super().__init__(optim)
        self._grad_norm: Tensor | None = None

    def clip_grad_by_norm(self, max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
        """Clip, and return the norm before clipping."""
        self._grad_norm = super().clip_grad_by_norm(max_norm, *args, **kwargs)
        return self._grad_norm

    def get_grad_norm(self, norm_type: float = 2.0, **kwargs: Any) -> Tensor | None:
        """Return what the last `clip_grad_by_norm` returned; None before the first."""
        return self._grad_norm


class LossScaledOptimizer(NormKeepingOptimizer):
    """An optimizer whose losses are scaled against fp16 underflow; a step with an overflow is skipped."""

    def __init__(self, optim: Optimizer, device_type: str, initial_scale: float) -> None:
        super().__init__(optim)
        self.scaler = torch.amp.GradScaler(device_type, init_scale=initial_scale)
        self._unscaled = False

    @property
    def loss_scale(self) -> float:
        """The current factor of the loss. Reading it blocks on the device."""
        return self.scaler.get_scale()

    def scale_loss(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def backward(self, loss: Tensor, inputs: Any = None, retain_graph: bool = False, **kwargs: Any) -> None:
        super().backward(self.scale_loss(loss), inputs=inputs, retain_graph=retain_graph, **kwargs)

    def unscale_grad(self) -> None:
        """Divide the gradients by the loss scale, once a step."""
        if not self._unscaled:
            self.scaler.unscale_(self.optim)
            self._unscaled = True

    def clip_grad_by_norm(self, max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
        """Unscale, clip, and return the norm before clipping: inf or nan where the step will be skipped."""
        self.unscale_grad()
        return super().clip_grad_by_norm(max_norm, *args, **kwargs)

    def clip_grad_by_value(self, clip_value: float, *args: Any, **kwargs: Any) -> None:
        self.unscale_grad()
        super().clip_grad_by_value(clip_value, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> float | None:
        """Update the parameters unless a gradient overflowed, and adapt the scale. Blocks on the device."""
        result = self.scaler.step(self.optim, *args, **kwargs)
        self.scaler.update()
        self._unscaled = False
        return result
