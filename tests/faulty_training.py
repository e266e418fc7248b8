"""Stands for train_clm.py: real training that fails by its batch size, as `HARM` says ({"2": "oom", ...})."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch

import train_clm
import trainer


def main() -> None:
    """Train, and come to harm in the third step."""
    harms = json.loads(os.environ["HARM"])
    step = trainer.Trainer.train_step

    def harmed(self: trainer.Trainer, micro_batches: Any) -> trainer.StepResult:
        if self.progress.step == 2:
            come_to(harms.get(str(self.engine.args.per_device_train_batch_size)))
        return step(self, micro_batches)

    trainer.Trainer.train_step = harmed  # type: ignore[method-assign]
    train_clm.main()


def come_to(harm: str | None) -> None:
    """Do what the word says; None: nothing."""
    if harm == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if harm == "nan":
        raise trainer.NonFiniteLoss("the loss of step 3 is nan")
    if harm == "crash":
        raise RuntimeError("planted")
    while harm == "hang":
        time.sleep(0.1)


if __name__ == "__main__":
    main()
