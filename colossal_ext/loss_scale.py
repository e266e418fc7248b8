"""ColossalAI's fp16 optimizers divide their gradients by the scale that these were multiplied with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import FP16MixedPrecisionMixin
from torch import Tensor

from .upstream import require_mended_version


def install_loss_scale_mend() -> None:
    """Mend fp16.py:79-87 of ColossalAI 0.5.0, for LowLevelZero, Gemini and HybridParallel. Repeating it is fine.

    `should_skip_step` adapts the scale, and only then `get_grad_div_scale` reads it: on each step that raises the
    scale (one in `growth_interval`) the gradients are divided by twice their factor, and so is the norm that
    clipping looks at.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.amp.naive_amp.mixed_precision_mixin.fp16.FP16MixedPrecisionMixin")
    mixin = FP16MixedPrecisionMixin
    if not hasattr(mixin.get_grad_div_scale, "__wrapped__"):
        mixin.pre_backward = _remembering_scale(mixin.pre_backward)
        mixin.pre_backward_by_grad = _remembering_scale(mixin.pre_backward_by_grad)
        mixin.get_grad_div_scale = _remembered_scale(mixin.get_grad_div_scale)


def _remembering_scale(pre_backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(pre_backward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.scale_of_grads = self.loss_scale
        return pre_backward(self, *args, **kwargs)

    return wrapper


def _remembered_scale(get_grad_div_scale: Callable[[Any], float]) -> Callable[[Any], float]:
    @functools.wraps(get_grad_div_scale)
    def wrapper(self: Any) -> float:
        get_grad_div_scale(self)  # checks and advances the mixin's state
        return self.scale_of_grads

    return wrapper
