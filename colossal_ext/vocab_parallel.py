"""Cross entropy over logits whose vocabulary is split across ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED = -100
# Logits that are upcast to fp32 at a time: 64 MiB.
BLOCK_NUMEL = 1 << 24


def vocab_parallel_nll_sum(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the negative log-likelihood summed over the real targets, the same on every rank of `group`.

    A collective: one all-gather of three numbers a token. Beside the logits, which the model's output holds anyway,
    a few numbers a token are kept for the backward; fp32 copies are made a block at a time.

    Args:
        logits: (B, T, V / ranks), any float dtype; rank r holds the columns from r V / ranks on.
        labels: (B, T) int64, -100 where ignored; shifted here, so that the logits at t predict the label at t + 1.

    Returns:
        fp32 scalar; 0.0, with zero gradient, where no target is real.
    """
    targets = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return _VocabParallelNllSum.apply(logits.flatten(0, 1), targets.flatten(), group)


class _VocabParallelNllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the loss of logits (N, V / ranks) and targets (N,)."""
        num_columns = logits.shape[1]
        column = targets - dist.get_rank(group) * num_columns
        is_local = (column >= 0) & (column < num_columns)
        column = column.where(is_local, 0)
        target = logits.gather(1, column[:, None])[:, 0].float().where(is_local, 0.0)

        peaks, sums, targets_of_ranks = _all_gather(torch.stack((*_peak_and_sum(logits), target)), group).unbind(1)
        peak = peaks.amax(0)
        sum_exp = (sums * (peaks - peak).exp()).sum(0)
        nll = sum_exp.log() - (targets_of_ranks.sum(0) - peak)
        ctx.save_for_backward(logits, peak, sum_exp, column, is_local, targets == IGNORED)
        return nll.where(targets != IGNORED, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        """Return (softmax - one-hot) x `grad_loss` in the logits' dtype, zero in ignored rows."""
        logits, *columns = ctx.saved_tensors
        peak, sum_exp, column, is_local, ignored = (saved[:, None] for saved in columns)
        grad_logits = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            grad = (logits[rows].float() - peak[rows]).exp_().div_(sum_exp[rows])
            grad.scatter_add_(1, column[rows], -is_local[rows].float())
            grad_logits[rows] = grad.mul_(grad_loss).masked_fill_(ignored[rows], 0.0)
        return grad_logits, None, None


def _peak_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit and sum of exp(logit - largest), fp32."""
    peak = logits.amax(1).float()
    sums = [(logits[rows].float() - peak[rows, None]).exp_().sum(1) for rows in _row_blocks(logits)]
    return peak, torch.cat(sums)


def _row_blocks(logits: Tensor) -> list[slice]:
    num_rows, num_columns = logits.shape
    step = max(1, BLOCK_NUMEL // num_columns)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return every rank's tensor, stacked in the order of ranks."""
    num_ranks = dist.get_world_size(group)
    gathered = local.new_empty((num_ranks, *local.shape))
    dist.all_gather(list(gathered), local, group=group)
    return gathered
