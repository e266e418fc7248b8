"""A run's logged numbers for TensorBoard or Weights & Biases (`--report_to`), beside metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from args import TrainArgs


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Hand over what is still held back."""


class TensorBoard:
    """Event files in the output folder: `tensorboard --logdir outputs`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that fails ends at once

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run named like the output folder; WANDB_PROJECT, WANDB_MODE and wandb's other variables decide the rest."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], first_step: int) -> None:
        import wandb

        self._run = wandb.init(name=folder.name, dir=str(folder), config=dict(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def problems(args: TrainArgs) -> list[str]:
    """Return what is missing for `--report_to`, a sentence each."""
    name = args.report_to
    if name == "none" or importlib.util.find_spec(name):
        return []
    return [f"--report_to {name}: {name} is not installed (pip install {name})"]


def open_tracker(name: str, folder: Path, settings: Mapping[str, Any], *, first_step: int = 1) -> Tracker | None:
    """Return the tracker of this name, on rank 0; `none`: None.

    Args:
        first_step: that will be logged; a run that goes on repeats those after its checkpoint.
    """
    return TRACKERS[name](folder, settings, first_step) if name in TRACKERS else None
