"""Shorthands of the tests of planner.py, chooser.py and adviser.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from args import TrainArgs
from chooser import Choice, resolve_auto
from opt_sizes import OPT_SHAPES
from planner import ModelShape, PlanRequest, model_shape

LARGE: dict[str, Any] = {"per_device_train_batch_size": 4, "block_size": 1024}


def shape_of(size: str) -> ModelShape:
    return model_shape(OPT_SHAPES[size])


def request_of(size: str = "125m", plugin: str = "torch_ddp", **changes: Any) -> PlanRequest:
    """Return a request on one 80 GiB GPU, 32 rows of 1024 tokens, unless `changes` say otherwise."""
    request = PlanRequest(
        shape=shape_of(size),
        plugin=plugin,
        precision="bf16",
        world_size=1,
        batch_size=32,
        block_size=1024,
        zero_stage=int(plugin == "low_level_zero"),
        gpu_gib=80,
    )
    return replace(request, **changes)


def choose(
    size: str, gpu_gib: float | None = 80, *, world_size: int = 1, host_gib: float = 128, **flags: Any
) -> Choice:
    return resolve_auto(TrainArgs(**flags), shape_of(size), world_size, gpu_gib, host_gib)


def choose_on_four(size: str = "30b", **flags: Any) -> Choice:
    """Return the choice on four GPUs of 140 GiB, for which 30b is too large unless it is divided or recomputed."""
    return choose(size, 139.8, world_size=4, host_gib=512, **{**LARGE, **flags})
