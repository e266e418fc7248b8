"""The last gradient norm of any boosted optimizer."""

from __future__ import annotations

import math
from typing import Any

from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import FP16MixedPrecisionMixin
from colossalai.interface import OptimizerWrapper

# The attribute that holds the mixed precision state: LowLevelZero and hybrid with ZeRO, Gemini, hybrid without.
_MIXIN_NAMES = ("mixed_precision_mixin", "mix_precision_mixin", "mixed_precision")


def grad_norm(optimizer: OptimizerWrapper) -> float | None:
    """Return the global gradient norm of the last step, before clipping and without the loss scale.

    The same number on every rank, without communication. Call it after `step`.

    Returns:
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
    return float(norm) / _scale_of_grads(mixin)


def fp16_mixin(optimizer: OptimizerWrapper) -> FP16MixedPrecisionMixin | None:
    """Return the object that scales the optimizer's losses, or None where ColossalAI does not."""
    candidates: tuple[Any, ...] = tuple(getattr(optimizer, name, None) for name in _MIXIN_NAMES)
    return next((found for found in candidates if isinstance(found, FP16MixedPrecisionMixin)), None)


def _scale_of_grads(mixin: FP16MixedPrecisionMixin | None) -> float:
    if mixin is None:
        return 1.0
    return getattr(mixin, "scale_of_grads", mixin.loss_scale)
