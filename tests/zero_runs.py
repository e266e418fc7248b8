"""What runs of LowLevelZero are held to, on one rank and on several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

PLAIN = "--plugin torch_ddp"
ZERO = "--plugin low_level_zero"
CLIPPED = "--max_grad_norm 0.5 --gradient_accumulation_steps 2"

RunMany = Callable[..., Mapping[str, Any]]


def assert_trains_like_the_plain_run(runs: Mapping[str, Any], flags: Mapping[str, str], name: str) -> None:
    """Compare the losses of a run with those of "plain", or of "plain clipped" where it clips."""
    run = runs[name]
    assert run.code == 0, run.output
    reference = "plain clipped" if CLIPPED in flags[name] else "plain"
    assert run.losses == pytest.approx(runs[reference].losses, rel=2e-3 if "16" in name else 1e-6)
    assert run.losses[-1] < run.losses[0]


def assert_no_bit_differs_in_bf16(runs: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare the losses of runs with those of "bf16", and see that of two on the host one updates in the backward."""
    for name in names:
        assert runs[name].losses == runs["bf16"].losses, name
    steps = {name: runs[name].result["args"]["step_in_backward"] for name in runs if name.startswith("bf16 on")}
    assert steps == {"bf16 on the host": "off", "bf16 on the host, in the backward pass": "on"}


def assert_resumed_runs_repeat_the_losses(
    folder: Path, runs: Mapping[str, Any], run_many: RunMany, flags: Mapping[str, str], *, world: int
) -> None:
    """Run each command once more with checkpoints, go on from step 2, and compare the losses bit for bit.

    Args:
        flags: by name, of the runs to resume; `runs` holds what they did undisturbed.
    """
    saving = {name: f"{flags[name]} --save_strategy steps --save_steps 1".split() for name in flags}
    saved = run_many(folder, saving, world=world)
    orders = {
        f"{name} resumed": [
            *f"{flags[name]} --resume_from_checkpoint".split(),
            saved[name].folder / "checkpoints" / "step-00000002",
        ]
        for name in flags
    }
    for name, run in run_many(folder, orders, world=world).items():
        assert run.code == 0, run.output
        assert run.losses == runs[name.removesuffix(" resumed")].losses[2:], name
