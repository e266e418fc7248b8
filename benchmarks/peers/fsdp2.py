"""FSDP2, used as torchtitan does: each layer compiled, then `fully_shard`, bf16 arithmetic over fp32 shards.

    python -m benchmarks.peers.fsdp2 --model_name_or_path 125m --per_device_train_batch_size 32

Parameters, moments and the gradients that the optimizer sees are fp32.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.peers.harness import Batch, Job, parser, run
from model import parameter_groups
from runtime import start_process_group


def main() -> None:
    """Parse the flags and run."""
    flags = parser(__doc__)
    flags.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile each layer"
    )
    options = flags.parse_args()
    job = Job("fsdp2_compile" if options.compile else "fsdp2", options)
    run(job, lambda job: train(job, compiled=options.compile))


def shard(job: Job, model: nn.Module, *, compiled: bool) -> None:
    """Compile and shard every layer, then shard what stands outside of them; each moves to the device by itself."""
    mesh = init_device_mesh(job.device.type, (job.runtime.world_size,))
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.decoder.layers:  # type: ignore[union-attr]
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def train(job: Job, *, compiled: bool) -> None:
    """Run the plain loop over a sharded model."""
    start_process_group(job.runtime, timeout_s=600)
    model = job.build_model()
    shard(job, model, compiled=compiled)
    optimizer = torch.optim.AdamW(parameter_groups(model, job.args.weight_decay), lr=job.learning_rate, fused=True)
    scheduler = job.schedule(optimizer)
    parameters = list(model.parameters())

    def train_step(batch: Batch) -> Tensor:
        loss = model(**batch).loss
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
