"""TorchDDP's own exchange: gradients are the mean of all ranks', in their own memory (beside the plain loop: matrix)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from colossal_ext import exchanges
from colossal_ext.data_parallel import DataParallelModel
from colossal_ext.exchanges import in_parts, in_pieces
from conftest import MODULES


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size)) for size in sizes]


def sizes(parts: object) -> list[list[int]]:
    return [[len(each) for each in part] for part in parts]  # type: ignore[attr-defined]


def test_parts_hold_at_least_so_many_elements_and_the_last_what_is_left():
    assert sizes(in_parts(parameters(3, 3, 9, 1, 5, 2), 6)) == [[3, 3], [9], [1, 5], [2]]
    assert list(in_parts([], 6)) == []


def test_large_parameters_stand_alone_and_small_neighbours_together(monkeypatch):
    monkeypatch.setattr(exchanges, "OWN_NUMEL", 4)
    assert sizes(in_pieces(parameters(4, 1, 2, 5, 6, 3))) == [[4], [1, 2], [5], [6], [3]]


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
    # A parameter without a gradient: another rank's would be added to those of another parameter.
    with pytest.raises(RuntimeError, match="1 parameters got no gradient"):
        model(batches[2], with_extra=False).backward()


def run_rank(*, on_gpu: bool = False) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    exchanges.OWN_NUMEL = 25  # matrices in their own memory, vectors in a copy
    check_means(rank, device)
    dist.barrier()
    dist.destroy_process_group()


def run_this_file(*launcher: str) -> None:
    environment = os.environ | {"PYTHONPATH": MODULES}
    command = [sys.executable, *launcher, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_gradients_of_two_ranks_are_those_of_the_whole_batch():
    run_this_file()


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gradients_of_two_gpus_are_those_of_the_whole_batch():
    run_this_file("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_rank(on_gpu=True)
    else:
        from benchmarks.forks import fork_ranks

        fork_ranks(run_rank, 2)
