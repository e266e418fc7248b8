"""Linear layers divided among tensor-parallel ranks, that `torch.compile` takes into one graph with what is around them.

ColossalAI 0.5.0's break the graph at each exchange, so that layers stay uncompiled, and all-reduce the gradient of the
attention's input three times, once each for q, k and v. Here whoever calls divides the work: `copied_to_ranks` stands once
before the layers that share an input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row
from colossalai.shardformer.layer.parallel_module import ParallelModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional_collectives
from torch.nn import functional


def copied_to_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return `x`, whose gradient is the sum of the ranks'. For matrix products alone: their gradient is overwritten."""
    return _CopiedToRanks.apply(x, group)


def summed_over_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of the ranks' `x`, each of which gets its whole gradient. `x` may be overwritten."""
    return _SummedOverRanks.apply(x, group)


class _DividedLinear(ParallelModule):
    @classmethod
    def from_native_module(cls, module: nn.Linear, process_group: ProcessGroup, **kwargs: Any) -> _DividedLinear:
        """Return this rank's part of a linear layer, whose parameters stay the same objects."""
        return cls(
            in_features=module.in_features,
            out_features=module.out_features,
            bias=module.bias is not None,
            device=module.weight.device,
            process_group=process_group,
            weight=module.weight,
            bias_=module.bias,
            **kwargs,
        )


class ColumnParallelLinear(_DividedLinear, Linear1D_Col):
    """Some of the outputs of a linear layer, of an input that `copied_to_ranks` returned."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., outputs / ranks) of `x` (..., inputs)."""
        return functional.linear(x, self.weight, self.bias)


class RowParallelLinear(_DividedLinear, Linear1D_Row):
    """All outputs of a linear layer, each rank's from some of the inputs, summed."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., outputs) of `x` (..., inputs / ranks). A collective."""
        output = summed_over_ranks(functional.linear(x, self.weight), self.process_group)
        return output if self.bias is None else output + self.bias


class CopyingColumnParallelLinear(ColumnParallelLinear):
    """A ColumnParallelLinear that alone has its input, and copies it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., outputs / ranks) of `x` (..., inputs); a collective in the backward pass."""
        if not torch.compiler.is_compiling():
            return Linear1D_Col.forward(self, x)  # which exchanges gradients while it makes the weight's
        return super().forward(copied_to_ranks(x, self.process_group))


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of the ranks' `x`, in place unless compiled."""
    if torch.compiler.is_compiling():
        return functional_collectives.wait_tensor(functional_collectives.all_reduce(x, "sum", group))
    dist.all_reduce(x, group=group)
    return x


class _CopiedToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad.contiguous(), ctx.group), None


class _SummedOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = _sum(x, group)
        if total is x:
            ctx.mark_dirty(x)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
