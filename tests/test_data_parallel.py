"""Data parallelism: gradients are the mean of all ranks', in their own memory (beside the plain loop: matrix)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from colossal_ext import exchanges
from colossal_ext.data_parallel import DataParallelModel
from conftest import MODULE_PATH


def test_one_rank_exchanges_nothing(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DataParallelModel(nn.Linear(2, 2))
        monkeypatch.setattr(dist, "all_reduce", None)
        model(torch.ones(1, 2)).sum().backward()
        assert model.unwrap().weight.grad is not None
    finally:
        dist.destroy_process_group()


# --- on two ranks ------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Layers and a vector that only some passes use."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(6))
        self.turned = nn.Parameter(torch.randn(5, 5).t())  # its gradient is laid out like it: not contiguous
        self.extra = nn.Parameter(torch.ones(5))

    def forward(self, values: Tensor, *, with_extra: bool = True) -> Tensor:
        for layer in self.layers:
            values = torch.tanh(layer(values @ self.turned))
        return (values * self.extra if with_extra else values).square().sum()


def grads_of(model: nn.Module) -> list[Tensor | None]:
    return [None if each.grad is None else each.grad.clone() for each in model.parameters()]


def check_means(rank: int, device: torch.device) -> None:
    """Compare the gradients of two ranks' exchange with those of the whole batch in one model."""
    batches = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)).to(device)
    plain, model = Toy().to(device), DataParallelModel(Toy(seed=rank).to(device))
    module = model.unwrap()
    assert torch.equal(module.layers[0].weight, plain.layers[0].weight), "not rank 0's weights"

    def both(number: int, **options: bool) -> None:
        (plain(batches[number], **options) / 2).backward()
        model(batches[number, 2 * rank : 2 * rank + 2], **options).backward()

    both(0)
    torch.testing.assert_close(grads_of(module), grads_of(plain))
    plain.zero_grad()
    module.zero_grad()
    # Summed over micro-batches, exchanged with the last.
    with model.no_sync():
        both(0)
        assert not torch.allclose(module.layers[0].weight.grad, plain.layers[0].weight.grad)
    both(1)
    torch.testing.assert_close(grads_of(module), grads_of(plain))
    # A large gradient stays in its memory, and is on its way before the last one is there.
    module.zero_grad()
    kept: list[int] = []
    module.layers[3].weight.register_post_accumulate_grad_hook(lambda each: kept.append(each.grad.data_ptr()))
    sent: list[int] = []
    module.layers[2].weight.register_post_accumulate_grad_hook(lambda _: sent.append(model._next))
    model(batches[2]).backward()
    assert kept == [module.layers[3].weight.grad.data_ptr()] and 2 < sent[0] < len(model._buckets)
    assert not module.turned.grad.is_contiguous(), "every gradient is laid out as a collective wants it"
    # A parameter without a gradient: another rank's would be added to those of another parameter.
    with pytest.raises(RuntimeError, match="1 parameters got no gradient"):
        model(batches[2], with_extra=False).backward()
    with pytest.raises(AssertionError, match="a backward pass was broken off"):
        model(batches[2])


def check_16_bit_gradients(rank: int, device: torch.device) -> None:
    """Beside fp32 ones, large and small: each keeps its type and, where it is large, its memory."""
    parameters = [nn.Parameter(torch.zeros(size, device=device)) for size in (25, 26, 5, 6)]
    for parameter, dtype in zip(parameters, (torch.bfloat16, torch.float32) * 2, strict=True):
        parameter.grad_dtype = None
        parameter.grad = torch.full_like(parameter, 1.5 + rank, dtype=dtype)
    memory = [parameter.grad.data_ptr() for parameter in parameters]
    bucket = exchanges.GradientBucket(parameters)
    bucket.send()
    bucket.receive()
    assert [parameter.grad.dtype for parameter in parameters] == [torch.bfloat16, torch.float32] * 2
    assert [parameter.grad.data_ptr() for parameter in parameters] == memory
    assert all((parameter.grad == 2.0).all() for parameter in parameters)


def check_that_nothing_keeps_a_model_that_is_gone(device: torch.device) -> None:
    """Not even the hooks of its parameters, into which the collector does not see."""
    model = DataParallelModel(Toy().to(device))
    weight = weakref.ref(model.unwrap().turned)
    del model
    gc.collect()
    assert weight() is None


def run_rank() -> None:
    torch.set_num_threads(1)
    rank, on_gpu = int(os.environ["RANK"]), sys.argv[1:] == ["gpus"]
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    exchanges.OWN_NUMEL = 25  # matrices in their own memory, vectors in a copy
    check_means(rank, device)
    check_16_bit_gradients(rank, device)
    check_that_nothing_keeps_a_model_that_is_gone(device)
    dist.barrier()
    dist.destroy_process_group()


def run_this_file(*launcher: str, on: str) -> None:
    environment = os.environ | {"PYTHONPATH": MODULE_PATH}
    command = [sys.executable, *launcher, __file__, on]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_gradients_of_two_ranks_are_those_of_the_whole_batch():
    run_this_file(on="cpu")


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gradients_of_two_gpus_are_those_of_the_whole_batch():
    run_this_file("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", on="gpus")


if __name__ == "__main__":
    if sys.argv[1] == "gpus":
        run_rank()
    else:
        from benchmarks.forks import fork_ranks

        fork_ranks(run_rank, 2)
