"""The transformers Trainer with what its guide to one GPU recommends: bf16, fused AdamW, torch.compile, pinned batches.

    python -m benchmarks.peers.hf_trainer --model_name_or_path 125m --per_device_train_batch_size 32

Parameters, gradients and moments are fp32.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import data
from benchmarks.peers.harness import Job, parser, run


def main() -> None:
    """Parse the flags and run."""
    flags = parser(__doc__)
    flags.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="the Trainer's torch_compile"
    )
    options = flags.parse_args()
    job = Job("hf_trainer", options)
    run(job, lambda job: train(job, compiled=options.compile))


class OrderedRows(Dataset[dict[str, Tensor]]):
    """The rows as the Trainer takes them, in the order of `train_clm.py`."""

    def __init__(self, job: Job) -> None:
        self._rows = job.rows()
        self._order = list(job.order(self._rows))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return data.Collator(pad_token_id=0)([self._rows[self._order[index]]])


class LossKeeper(Trainer):
    """Keeps each step's loss on the device: logging every step would wait for it."""

    last_loss: Tensor

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """Return what the Trainer's own method does."""
        outcome = super().compute_loss(*arguments, **options)
        self.last_loss = (outcome[0] if isinstance(outcome, tuple) else outcome).detach()
        return outcome


def train(job: Job, *, compiled: bool) -> None:
    """Let the Trainer run its loop; it reports every step's end."""

    class Marks(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            job.clock.mark()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            job.end_step(trainer.last_loss)

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    with tempfile.TemporaryDirectory() as folder:
        trainer = LossKeeper(
            job.build_model(),
            training_arguments(job, folder, compiled=compiled),
            collate,
            OrderedRows(job),
            callbacks=[Marks()],
        )
        trainer.train()


def training_arguments(job: Job, folder: str, *, compiled: bool) -> TrainingArguments:
    args = job.args
    return TrainingArguments(
        folder,
        use_cpu=job.runtime.on_cpu,
        bf16=job.precision == "bf16",
        optim="adamw_torch_fused",
        torch_compile=compiled,
        dataloader_pin_memory=not job.runtime.on_cpu,
        dataloader_num_workers=args.dataloader_num_workers,
        per_device_train_batch_size=args.per_device_train_batch_size,
        max_steps=job.num_steps,
        learning_rate=job.learning_rate,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        train_sampling_strategy="sequential",
        seed=args.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
