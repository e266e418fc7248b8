"""Gemini with fp16 and gradient accumulation recovers from an overflow."""

from __future__ import annotations

import functools
from typing import Any

from colossalai.zero.gemini.gemini_optimizer import GeminiFP16MixedPrecisionMixin

from .upstream import require_mended_version


def install_gemini_overflow_mend() -> None:
    """Mend gemini_optimizer.py:264-270 of ColossalAI 0.5.0. Repeating it is fine.

    A skipped step returns before it ends the accumulation, so that all later gradients are added to the infinite
    ones: every further step overflows and is skipped as well. Here dropping the gradients ends the accumulation.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.zero.gemini.gemini_optimizer.GeminiFP16MixedPrecisionMixin")
    pre_zero_grad = GeminiFP16MixedPrecisionMixin.pre_zero_grad
    if hasattr(pre_zero_grad, "__wrapped__"):
        return

    @functools.wraps(pre_zero_grad)
    def pre_zero_grad_and_end_accumulation(self: Any) -> None:
        pre_zero_grad(self)
        self.module.chunk_manager.accumulating_grads = False

    GeminiFP16MixedPrecisionMixin.pre_zero_grad = pre_zero_grad_and_end_accumulation
