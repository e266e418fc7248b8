"""transformers and PyTorch, nothing else: autocast, SDPA, fused AdamW; with `--compile` the whole model in one graph.

    python -m benchmarks.peers.plain --compile --model_name_or_path 125m --per_device_train_batch_size 32

Parameters, gradients and moments are fp32. The loss comes from the model, inside the compiled graph, and no attention
mask is passed, since no row is padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.harness import Batch, Job, parser, run
from model import parameter_groups


def main() -> None:
    """Parse the flags and run."""
    flags = parser(__doc__)
    flags.add_argument("--compile", action="store_true", help="torch.compile the model")
    options = flags.parse_args()
    job = Job("plain_compile" if options.compile else "plain", options)
    run(job, lambda job: train(job, compiled=options.compile))


def train(job: Job, *, compiled: bool) -> None:
    """Run the loop that every introduction to PyTorch shows."""
    model = job.build_model().to(job.device)
    groups = parameter_groups(model, job.args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=job.learning_rate, fused=True)
    scheduler = job.schedule(optimizer)
    parameters = list(model.parameters())
    forward = torch.compile(model) if compiled else model

    def train_step(batch: Batch) -> Tensor:
        with job.autocast():
            loss = forward(**batch).loss
        loss.backward()
        if job.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, job.args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss

    job.train(train_step)


if __name__ == "__main__":
    main()
