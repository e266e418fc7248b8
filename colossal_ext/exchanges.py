"""Collectives of many tensors: few and large, from and to the tensors' own memory where they are large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A parameter of as many elements is exchanged from and to its own memory; smaller ones in a copy of them all.
OWN_NUMEL = 2**18
# Of a small model an exchange has this share, so that there is a backward pass to hide behind.
BUCKETS = 8


def in_parts(parameters: Iterable[nn.Parameter], least: int) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in their order, together at least so many elements, but for the last."""
    part, numel = list[nn.Parameter](), 0
    for parameter in parameters:
        part.append(parameter)
        numel += parameter.numel()
        if numel >= least:
            yield part
            part, numel = [], 0
    if part:
        yield part


def in_pieces(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield what one tensor of a collective holds, in the order given: a large parameter, or small neighbours."""
    for is_large, neighbours in groupby(parameters, key=lambda each: each.numel() >= OWN_NUMEL):
        piece = list(neighbours)
        yield from ([each] for each in piece) if is_large else [piece]


def by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in groups of one type, as collectives and kernels take them, in the order in which types appear."""
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
    return [[tensor for tensor in tensors if tensor.dtype is dtype] for dtype in dtypes]


def together(
    collective: Callable[..., Any], *tensors: Sequence[Tensor], group: Any = None, **options: Any
) -> list[Any]:
    """Begin a collective of each tensor, or output and input, on GPUs all in one launch; return what to wait for."""
    if tensors[0][0].device.type == "cpu":  # gloo's coalesced all-gather writes where it must not (torch 2.13.0)
        return [collective(*each, async_op=True, group=group, **options) for each in zip(*tensors, strict=True)]
    with dist._coalescing_manager(group, async_ops=True) as work:
        for each in zip(*tensors, strict=True):
            collective(*each, group=group, **options)
    return [work]


def wait_for(works: list[Any]) -> None:
    """Wait for what `together` returned, on a GPU its current stream alone, and empty the list."""
    for work in works:
        work.wait()
    works.clear()


def prepare_mean(tensors: Sequence[Tensor], num_ranks: int) -> dist.ReduceOp.RedOpType:
    """Make tensors ready to be reduced to the ranks' mean, and return the operation: for a sum they are divided here.

    gloo has no mean. NCCL multiplies 16-bit numbers with a 16-bit 1 / ranks: by 0.2 % too much among three in bf16.
    """
    is_exact = tensors[0].element_size() > 2 or num_ranks & (num_ranks - 1) == 0
    if tensors[0].device.type != "cpu" and is_exact:
        return dist.ReduceOp.AVG
    torch._foreach_div_(list(tensors), num_ranks)
    return dist.ReduceOp.SUM


class GradientBucket:
    """Parameters whose gradients are exchanged together, to become the ranks' mean; large ones stay where they are.

    Args:
        group: the ranks; None: all.

    Attributes:
        num_missing: parameters whose gradients of this backward pass are not there.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
        self.parameters, self._group = parameters, group
        self.num_missing = len(parameters)
        self._pieces = list(in_pieces(parameters))
        # Gradients behind one another, and where they belong.
        self._copied: list[tuple[Tensor, list[Tensor]]] = []
        self._works: list[Any] = []

    @torch.no_grad()
    def send(self) -> None:
        """Begin to make the mean of the gradients that are there; small neighbours of both types go in fp32."""
        self.num_missing = len(self.parameters)
        sent = []
        for piece in self._pieces:
            grads = [parameter.grad for parameter in piece if parameter.grad is not None]
            if len(grads) == 1 and grads[0].is_contiguous():
                sent.append(grads[0])
            elif grads:
                sent.append(torch.cat([grad.reshape(-1) for grad in grads]))
                self._copied.append((sent[-1], grads))
        if not sent:
            return
        for tensors in by_dtype(sent):
            mean = prepare_mean(tensors, dist.get_world_size(self._group))
            self._works += together(dist.all_reduce, tensors, group=self._group, op=mean)

    @torch.no_grad()
    def receive(self) -> None:
        """Wait for the means, and put those of copied gradients where they belong."""
        wait_for(self._works)
        for means, grads in self._copied:
            parts = means.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
        self._copied.clear()
