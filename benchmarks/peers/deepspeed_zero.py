"""DeepSpeed ZeRO 1, 2 and 3, with `--offload` its ZeRO-Offload, set as its tutorials and configuration page recommend.

    python -m benchmarks.peers.deepspeed_zero --stage 2 --offload --recompute --model_name_or_path 2.7b

The model is bf16; ZeRO keeps fp32 master weights and moments. The optimizer is DeepSpeed's own (FusedAdam, and
DeepSpeedCPUAdam for offload), which a compiler builds at the first use; where it cannot be built, torch's fused AdamW. A
build that is killed leaves a file `lock` in ~/.cache/torch_extensions, for which the next run waits: remove it.
"""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.harness import Batch, Job, parser, run
from model import parameter_groups


def main() -> None:
    """Parse the flags and run."""
    flags = parser(__doc__)
    flags.add_argument("--name", default="deepspeed", help="name in the table")
    flags.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage")
    flags.add_argument("--compile", action="store_true", help="engine.compile()")
    flags.add_argument("--offload", action="store_true", help="optimizer states and update on the host")
    flags.add_argument(
        "--pin_memory", action=argparse.BooleanOptionalAction, default=True, help="page-locked host memory"
    )
    flags.add_argument("--ratio", type=float, default=1.0, help="share of the states on the host; below 1: stage 3")
    options = flags.parse_args()
    run(Job(options.name, options), lambda job: train(job, options), needs="deepspeed")


def train(job: Job, options: argparse.Namespace) -> None:
    """Run DeepSpeed's three lines: forward, backward, step."""
    import deepspeed

    name_ranks()
    deepspeed.init_distributed("gloo" if job.runtime.on_cpu else "nccl")
    model = job.build_model()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, job.args.weight_decay),
        lr_scheduler=job.schedule,
        **optimizer_and_config(job, options, model),
    )
    if options.compile:
        engine.compile()

    def train_step(batch: Batch) -> Tensor:
        loss: Tensor = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss

    job.train(train_step)


def name_ranks() -> None:
    """Tell DeepSpeed that this process is the whole run, where torchrun has not: else it looks for MPI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", port)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


def optimizer_and_config(job: Job, options: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Return the arguments of `deepspeed.initialize` that say how to update: `config`, and where needed `optimizer`."""
    config = configuration(job, options)
    if builds_own_adam(job, options):
        config["optimizer"] = {"type": "AdamW", "params": {"lr": job.learning_rate}}
        return {"config": config}
    config["zero_force_ds_cpu_optimizer"] = False
    groups = parameter_groups(model, job.args.weight_decay)
    return {"config": config, "optimizer": torch.optim.AdamW(groups, lr=job.learning_rate, fused=True)}


def configuration(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Return DeepSpeed's configuration without the optimizer; what is not named keeps its default."""
    zero: dict[str, Any] = {"stage": options.stage, "overlap_comm": True, "contiguous_gradients": True}
    if options.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": options.pin_memory, "ratio": options.ratio}
    return {
        "train_micro_batch_size_per_gpu": job.args.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": job.args.max_grad_norm,
        "bf16": {"enabled": job.precision == "bf16"},
        "zero_optimization": zero,
        "steps_per_print": 1_000_000,
    }


def builds_own_adam(job: Job, options: argparse.Namespace) -> bool:
    """Return whether DeepSpeed's kernels for the optimizer could be built here, and note which one is used."""
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    try:
        (CPUAdamBuilder if options.offload else FusedAdamBuilder)().load(verbose=False)
    except Exception as error:  # whatever a compiler, or its absence, leads to
        job.notes.append(f"torch's AdamW, since DeepSpeed's could not be built ({type(error).__name__})")
        return False
    job.notes.append("DeepSpeedCPUAdam" if options.offload else "FusedAdam")
    return True


if __name__ == "__main__":
    main()
