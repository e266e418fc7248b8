"""The state of an fp16 loss scaler, in the same words for every plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from colossalai.interface import OptimizerWrapper

from .grad_norm import fp16_mixin
from .mixed_precision import LossScaledOptimizer


def loss_scale_state(optimizer: OptimizerWrapper) -> dict[str, float] | None:
    """Return scale, steps since it last changed, and overflows counted; None where losses are not scaled.

    ColossalAI's own `state_dict` (dynamic_grad_scaler.py of 0.5.0) leaves the two counters out. Blocks on the device.
    """
    if isinstance(optimizer, LossScaledOptimizer):
        state = optimizer.scaler.state_dict()
        return {"scale": state["scale"], "growth_step": state["_growth_tracker"], "hysteresis_step": 0}
    mixin = fp16_mixin(optimizer)
    if mixin is None:
        return None
    scaler: Any = mixin.grad_scaler
    return {
        "scale": scaler.scale.item(),
        "growth_step": scaler._growth_step,
        "hysteresis_step": scaler._hysteresis_step,
    }


def restore_loss_scale(optimizer: OptimizerWrapper, state: Mapping[str, float]) -> None:
    """Put the scaler of any fp16 plugin where `loss_scale_state` found one; bf16 and fp32 have none to set."""
    if isinstance(optimizer, LossScaledOptimizer):
        new = {"scale": state["scale"], "_growth_tracker": int(state["growth_step"])}
        optimizer.scaler.load_state_dict(optimizer.scaler.state_dict() | new)
    elif (mixin := fp16_mixin(optimizer)) is not None:
        scaler: Any = mixin.grad_scaler
        scaler._scale = torch.full_like(scaler._scale, state["scale"])
        scaler._growth_step = int(state["growth_step"])
        scaler._hysteresis_step = int(state["hysteresis_step"])
