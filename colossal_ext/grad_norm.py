"""The last gradient norm of any boosted optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import FP16MixedPrecisionMixin
from colossalai.interface import OptimizerWrapper
from torch import Tensor

from .exchanges import by_dtype

# The attribute that holds the mixed precision state: LowLevelZero and hybrid with ZeRO, Gemini, hybrid without.
_MIXIN_NAMES = ("mixed_precision_mixin", "mix_precision_mixin", "mixed_precision")


def grad_norm(optimizer: OptimizerWrapper) -> Tensor | float | None:
    """Return the global gradient norm of the last step, before clipping and without the loss scale.

    The same number on every rank, without communication. Call it after `step`.

    Returns:
        A tensor where the GPU may still be computing it.
        inf where fp16 gradients overflowed and the step was skipped; None where nothing computed a norm: before the
        first step, and without clipping under Gemini and HybridParallel (max_norm) and TorchDDP (clip_grad_by_norm).
        A `max_norm` that nothing reaches, such as 1e9, gives the norm without clipping.
    """
    mixin = fp16_mixin(optimizer)
    if mixin is not None and mixin.found_overflow.item() > 0:
        return math.inf
    try:
        norm = optimizer.get_grad_norm()
    except NotImplementedError:  # TorchDDP without AutocastPrecision
        return None
    if norm is None:
        return None
    return number_if_there(norm / _scale_of_grads(mixin))


def number_if_there(norm: Tensor | float) -> Tensor | float:
    """Return a float, unless reading it would wait for a GPU."""
    return norm if isinstance(norm, Tensor) and norm.is_cuda else float(norm)


def global_norm(grads: list[Tensor]) -> Tensor:
    """Return the norm over all gradients, an fp32 scalar on their device. Does not wait for the device."""
    # On a CPU torch adds the squares of a tensor in fp32: 1e-4 off for an embedding's three million.
    dtype = torch.float64 if grads[0].device.type == "cpu" else torch.float32
    # Of mixed types torch would take the norms one by one.
    norms = [norm for alike in by_dtype(grads) for norm in torch._foreach_norm(alike, 2, dtype=dtype)]
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def clipping_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of this norm are divided by to be clipped; does not wait for the device.

    NaN where the norm is not finite, so that the weights tell: division by infinity would turn gradients to zeros.
    """
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1)
    return torch.where(norm.isfinite(), divisor, torch.nan)


def fp16_mixin(optimizer: OptimizerWrapper) -> FP16MixedPrecisionMixin | None:
    """Return the object that scales the optimizer's losses, or None where ColossalAI does not."""
    candidates: tuple[Any, ...] = tuple(getattr(optimizer, name, None) for name in _MIXIN_NAMES)
    return next((found for found in candidates if isinstance(found, FP16MixedPrecisionMixin)), None)


def _scale_of_grads(mixin: FP16MixedPrecisionMixin | None) -> float:
    if mixin is None:
        return 1.0
    return getattr(mixin, "scale_of_grads", mixin.loss_scale)
