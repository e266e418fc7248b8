"""Collectives of many tensors: what goes together, and how a sum becomes a mean (among ranks: test_data_parallel)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from colossal_ext import exchanges
from colossal_ext.exchanges import by_dtype, in_parts, in_pieces, prepare_mean


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


def test_tensors_of_one_type_go_together_in_their_order() -> None:
    tensors = [torch.tensor([i], dtype=dtype) for i, dtype in enumerate((torch.half, torch.float, torch.half))]
    assert [[int(each) for each in alike] for alike in by_dtype(tensors)] == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("dtype", "num_ranks", "has_mean"),
    [
        (torch.bfloat16, 4, True),
        (torch.bfloat16, 3, False),  # NCCL's 1 / 3 in bf16 is 0.334
        (torch.float16, 6, False),
        (torch.float32, 3, True),
    ],
)
def test_nccls_own_mean_is_taken_where_it_is_exact(dtype: torch.dtype, num_ranks: int, has_mean: bool):
    operation = prepare_mean([torch.ones(2, dtype=dtype, device="meta")], num_ranks)
    assert operation == (dist.ReduceOp.AVG if has_mean else dist.ReduceOp.SUM)


def test_gloo_adds_up_what_is_divided_before():
    tensors = [torch.tensor([4.0, 2.0]), torch.tensor([1.0])]
    assert prepare_mean(tensors, 2) == dist.ReduceOp.SUM
    assert [each.tolist() for each in tensors] == [[2.0, 1.0], [0.5]]
