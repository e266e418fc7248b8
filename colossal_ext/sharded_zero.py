"""ZeRO on several data-parallel ranks, in large exchanges that hide behind the backward and the forward pass.

ColossalAI 0.5.0 begins a new bucket whenever a gradient of another parameter group comes, so that matrices and biases in
turn make hundreds of small all-reduces; it copies, casts and scales the gradients one by one, and waits for the device
after the backward pass: on four H200 the 132 ms of a step of 1.3b on one become 290 (2026-11-27).

Here parameters stand in fixed buckets. A bucket's gradients are scattered while the backward pass goes on, one launch
updates this rank's share of many parameters, and the new ones are gathered as the next forward pass comes to them.
Shares are upstream's: an equal part of every flat parameter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any
from weakref import proxy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adam_kernels import CompileFreeAdam
from .exchanges import BUCKETS, in_parts, in_pieces, prepare_mean, together, wait_for
from .local_zero import LocalZeroOptimizer, LocalZeroPlugin, MasterWeights, groups_of, offloaded
from .pinned import pinned_empty

# Elements of one exchange at least, 256 MiB in 16 bits, so that NVLink passes them at its full rate and the host keeps
# ahead of the device: 6.7b takes 320.0 ms a step on four H200, with half of it 328.7 (2026-11-28).
BUCKET_NUMEL = 2**27
# Exchanges of gradients, and of parameters, that are under way while the device computes.
MAX_IN_FLIGHT = 2


class ShardedZeroPlugin(LocalZeroPlugin):
    """LowLevelZeroPlugin for several ranks. Stage 2 divides gradients between the micro-batches of a step, too."""

    @property
    def optimizer_class(self) -> type[LocalZeroOptimizer]:
        return ShardedZeroOptimizer

    def _master_weights(
        self, model: nn.Module, optimizer: CompileFreeAdam, device: torch.device, dtype: torch.dtype
    ) -> MasterWeights:
        return ShardedWeights(model, groups_of(optimizer), self.offload_frac, device, dtype)

    def support_no_sync(self) -> bool:
        """Return False in stage 2, where no gradient stays whole until a later micro-batch."""
        return self.stage == 1


@torch.no_grad()
def keep_share(module: nn.Module, *, rank: int, num_ranks: int, dtype: torch.dtype) -> None:
    """Turn a module's own fp32 parameters into `dtype`, and keep this rank's share of each for `Bucket.take`."""
    for parameter in module.parameters(recurse=False):
        parameter.master_share = padded(parameter.view(-1), num_ranks)[rank].clone()  # type: ignore[attr-defined]
        parameter.data = parameter.data.to(dtype)


def padded(flat: Tensor, num_ranks: int) -> Tensor:
    """Return (num_ranks, size): equal shares, the last ones filled up with zeros."""
    size = -(-flat.numel() // num_ranks)
    padding = size * num_ranks - flat.numel()
    return (nn.functional.pad(flat, (0, padding)) if padding else flat).view(num_ranks, size)


class Bucket:
    """Parameters that are exchanged together, with this rank's share of their fp32 weights and moments.

    Args:
        on_host: weights and moments are there.

    Attributes:
        whole: each parameter's own memory as (ranks, size), padded with zeros.
        masters: (numel,) fp32, the parameters' shares one behind the other, on the device or on the host.
        moments: both of Adam's, as `masters`; None before the first update.
        shares: (numel,) on the device, in the parameters' type: the mean gradients, then the new weights.
        present: parameters whose gradients are in `shares`.
        num_missing: parameters whose gradients of this backward pass are not there.
        on_their_way: parts of `masters` that the host updates.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, on_host: bool, rank: int, num_ranks: int) -> None:
        self.parameters, self.on_host = list(parameters), on_host
        self.rank, self.num_ranks = rank, num_ranks
        self.sizes = [-(-parameter.numel() // num_ranks) for parameter in parameters]
        self.numel = sum(self.sizes)
        self.num_missing = len(self.parameters)
        self.masters = torch.empty(0)
        self.moments: tuple[Tensor, Tensor] | None = None
        self._moment_views: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self.shares: Tensor | None = None
        self.present: set[nn.Parameter] = set()
        self.on_their_way: list[Tensor] = []
        self.whole: dict[nn.Parameter, Tensor] = {}
        self._pieces = list(self._cut())
        self._received: Tensor | None = None  # (numel,), and (ranks, size) of each piece, until `_works` are done
        self._exchanged: list[Tensor] = []
        self._works: list[Any] = []

    def _cut(self) -> Iterator[tuple[list[nn.Parameter], slice]]:
        """Yield what one tensor of an exchange holds, and where it stands in `shares`."""
        begin, sizes = 0, iter(self.sizes)
        for piece in in_pieces(self.parameters):
            end = begin + sum(islice(sizes, len(piece)))
            yield piece, slice(begin, end)
            begin = end

    def take(self, masters: Tensor, device: torch.device, dtype: torch.dtype) -> dict[nn.Parameter, Tensor]:
        """Fill `masters` from the parameters, turn these into `dtype` on the device, and return their parts of it."""
        self.masters = masters
        parts = dict(zip(self.parameters, masters.split(self.sizes), strict=True))
        for parameter, master in parts.items():
            whole = padded(parameter.detach().contiguous().view(-1), self.num_ranks)
            master.copy_(parameter.__dict__.pop("master_share", whole[self.rank]))
            self.whole[parameter] = whole.to(device).to(dtype)
            parameter.data = self.whole[parameter].view(-1)[: parameter.numel()].view(parameter.shape)
        return parts

    def moments_of(self, parameter: nn.Parameter, part: slice) -> tuple[Tensor, Tensor]:
        """Return the parameter's part of both moments, the same objects each time."""
        if parameter not in self._moment_views:
            assert self.moments is not None, "made before"
            exp_avg, exp_avg_sq = self.moments
            self._moment_views[parameter] = exp_avg[part], exp_avg_sq[part]
        return self._moment_views[parameter]

    # Gradients

    def scatter(self) -> None:
        """Send the gradients that are there, which are then gone; no gradient counts as zeros."""
        self.num_missing = len(self.parameters)
        self._exchanged = [self._to_send(parameters) for parameters, _ in self._pieces]
        self._received = self._exchanged[0].new_empty(self.numel)
        mean = prepare_mean(self._exchanged, self.num_ranks)
        shares = [self._received[part] for _, part in self._pieces]
        sent = [each.view(-1) for each in self._exchanged]
        self._works = together(dist.reduce_scatter_tensor, shares, sent, op=mean)

    def _to_send(self, parameters: list[nn.Parameter]) -> Tensor:
        """Return gradients as (ranks, size), and forget them; of one parameter its own memory."""
        grads = []
        for parameter in parameters:
            if parameter.grad is None:
                grads.append(torch.zeros_like(self.whole[parameter]))
                continue
            grads.append(padded(parameter.grad.contiguous().view(-1), self.num_ranks))
            parameter.grad = None
            self.present.add(parameter)
        return torch.cat(grads, dim=1) if len(grads) > 1 else grads[0]

    def receive(self) -> None:
        """Put the mean gradients into `shares`, or add them to those of an earlier micro-batch."""
        wait_for(self._works)
        assert self._received is not None, "scattered before"
        self.shares = self._received if self.shares is None else self.shares.add_(self._received)
        self._received = None
        self._exchanged.clear()

    # Parameters

    @property
    def is_sent_for(self) -> bool:
        return bool(self._works)

    def send_for(self) -> None:
        """Begin to gather the new weights, which are in `shares`; no earlier pass may read the parameters any more."""
        assert self.shares is not None, "updated before"
        shares = [self.shares[part] for _, part in self._pieces]
        gathered = [
            self.whole[parameters[0]] if len(parameters) == 1 else share.new_empty(self.num_ranks, share.numel())
            for (parameters, _), share in zip(self._pieces, shares, strict=True)
        ]
        self._works = together(dist.all_gather_into_tensor, [each.view(-1) for each in gathered], shares)
        self._exchanged = gathered

    def arrive(self) -> None:
        """Put the gathered weights into the parameters."""
        wait_for(self._works)
        for (parameters, _), gathered in zip(self._pieces, self._exchanged, strict=True):
            if len(parameters) > 1:
                whole = [self.whole[parameter] for parameter in parameters]
                torch.split_with_sizes_copy(gathered, [each.shape[1] for each in whole], dim=1, out=whole)
        self.shares = None
        self._exchanged.clear()


class ShardedWeights(MasterWeights):
    """This rank's shares of the fp32 weights, bucket by bucket, in the order in which a backward pass wants them.

    Args:
        group_of: number of the optimizer's group of each parameter; in a bucket those of a group stand together.

    Attributes:
        buckets: never of parameters on the host and on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        group_of: Mapping[nn.Parameter, int],
        offload_frac: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        dict.__init__(self)  # not MasterWeights', which fills itself with whole parameters
        parameters = [each for each in model.parameters() if each.requires_grad and each in group_of]
        self.on_host = set(offloaded(parameters, offload_frac))
        bucket_numel = min(BUCKET_NUMEL, sum(parameter.numel() for parameter in parameters) // BUCKETS)
        self.buckets = [
            Bucket(
                sorted(part, key=group_of.__getitem__),
                on_host=on_host,
                rank=dist.get_rank(),
                num_ranks=dist.get_world_size(),
            )
            for on_host, neighbours in groupby(reversed(parameters), key=lambda each: each in self.on_host)
            for part in in_parts(neighbours, bucket_numel)
        ]
        self.bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        host_numel = sum(bucket.numel for bucket in self.buckets if bucket.on_host)
        # One block for all on the host: the device reads it directly, and no size is rounded up.
        self._block = pinned_empty(host_numel) if device.type == "cuda" else torch.empty(host_numel)
        blocks = iter(self._block.split([bucket.numel for bucket in self.buckets if bucket.on_host]))
        for bucket in self.buckets:
            place = next(blocks) if bucket.on_host else torch.empty(bucket.numel, device=device)
            self.update(bucket.take(place, device, dtype))

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return self.bucket_of[parameter].whole[parameter].view(-1)


class ShardedZeroOptimizer(LocalZeroOptimizer):
    """LocalZeroOptimizer over shares of gradients and parameters, one a rank.

    All ranks have to make the same calls in the same order, forward passes included, and have gradients in the same
    buckets. Gradients are exchanged in each backward pass outside of `no_sync`; with updates in the backward pass there
    is one such pass a step. Weights are read by calling the layers, or after `settle`.
    """

    _masters: ShardedWeights

    def __init__(self, optimizer: CompileFreeAdam, masters: ShardedWeights, **options: Any) -> None:
        self._next = 0  # bucket of this backward pass to be scattered
        self._scattered: deque[Bucket] = deque()
        self._updated: list[Bucket] = []
        self._gathers: deque[Bucket] = deque()
        self._stale: set[nn.Parameter] = set()  # other ranks' shares of them are not here yet
        super().__init__(optimizer, masters, **options)

    def _attach_hooks(self) -> None:
        optimizer = proxy(self)

        def count(parameter: nn.Parameter) -> None:
            if optimizer.require_grad_sync:
                optimizer._count(parameter)

        for parameter in self._group_of:
            self.grad_handles.append(parameter.register_post_accumulate_grad_hook(count))

    # Gradients

    def _count(self, parameter: nn.Parameter) -> None:
        """Note that a gradient is there; send the buckets that are full, in their order, the same on all ranks."""
        buckets = self._masters.buckets
        self._masters.bucket_of[parameter].num_missing -= 1
        while self._next < len(buckets) and not buckets[self._next].num_missing:
            self._scatter(buckets[self._next])
            self._next += 1

    def _scatter(self, bucket: Bucket) -> None:
        while bucket in self._scattered:  # in an earlier micro-batch
            self._receive()
        has_new_weights = bucket in self._updated or not self._stale.isdisjoint(bucket.parameters)
        assert not has_new_weights, "a bucket is exchanged once a step, and only after it was read"
        bucket.scatter()
        self._scattered.append(bucket)
        while len(self._scattered) > MAX_IN_FLIGHT:
            self._receive()

    def _receive(self) -> None:
        bucket = self._scattered.popleft()
        bucket.receive()
        if self._updates_in_backward:
            self._update_bucket(bucket, 1.0)

    def _reduce_grad(self, partition_grad: bool) -> None:
        """Send what is left at the end of a backward pass: buckets in which some parameters got no gradient in it."""
        for bucket in self._masters.buckets[self._next :]:
            if any(parameter.grad is not None for parameter in bucket.parameters):
                self._scatter(bucket)
        self._next = 0

    def grads(self) -> list[Tensor]:
        """Return this rank's shares of the mean gradients that no update has used, after waiting for all exchanges."""
        while self._scattered:
            self._receive()
        return [bucket.shares for bucket in self._waiting() if bucket.shares is not None]

    def _waiting(self) -> list[Bucket]:
        """Return the buckets with gradients that no update has used."""
        return [bucket for bucket in self._masters.buckets if bucket.present]

    def _norm(self, grads: list[Tensor]) -> Tensor:
        squares = super()._norm(grads).double().square()
        dist.all_reduce(squares)
        return squares.sqrt().float()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, shares of them and those on their way too."""
        super().zero_grad(set_to_none)
        while self._scattered:
            self._scattered.popleft().receive()
        for bucket in self._waiting():
            bucket.shares = None
            bucket.present.clear()

    # Updates

    def _update_rest(self) -> None:
        div_scale = self._div_scale(self.grads())
        for bucket in self._waiting():
            self._update_bucket(bucket, div_scale)
        self._flush(div_scale)
        self._queue_gathers()

    def _update_bucket(self, bucket: Bucket, div_scale: float | Tensor) -> None:
        """Hand the bucket's shares to the host or to the next launch, neighbours of the same settings as one."""
        if bucket.moments is None:
            bucket.moments = torch.zeros_like(bucket.masters), torch.zeros_like(bucket.masters)
        assert bucket.shares is not None, "received before"
        for key, part in self._runs(bucket):
            if key is None:
                bucket.shares[part].copy_(bucket.masters[part])
                continue
            grad = working = bucket.shares[part]
            exp_avg, exp_avg_sq = bucket.moments
            states = bucket.masters[part], exp_avg[part], exp_avg_sq[part]
            if bucket.on_host:
                bucket.on_their_way.append(states[0])
            self._submit(key, grad, states, working, div_scale, on_host=bucket.on_host)
        bucket.present.clear()
        self._updated.append(bucket)

    def _runs(self, bucket: Bucket) -> Iterator[tuple[tuple[int, int] | None, slice]]:
        """Yield parts of the bucket with group and number of their update, None where there was no gradient."""
        begin, end, last = 0, 0, None
        for parameter, size in zip(bucket.parameters, bucket.sizes, strict=True):
            key = self._advance(bucket, parameter, slice(end, end + size))
            if key != last and end > begin:
                yield last, slice(begin, end)
                begin = end
            end, last = end + size, key
        yield last, slice(begin, end)

    def _advance(self, bucket: Bucket, parameter: nn.Parameter, part: slice) -> tuple[int, int] | None:
        """Count an update of a parameter whose states stand in a part of the bucket, and return its key."""
        if parameter not in bucket.present:
            return None
        state = self.optim.state[self._masters[parameter]]
        state["step"] = state.get("step", 0) + 1
        for kind, moment in zip(("exp_avg", "exp_avg_sq"), bucket.moments_of(parameter, part), strict=True):
            own = state.get(kind)
            if own is not moment:  # new, or loaded from a file
                state[kind] = moment.zero_() if own is None else moment.copy_(own.view(-1))
        return self._group_of[parameter], state["step"]

    # Parameters

    def _late_parameters(self) -> Iterable[nn.Parameter]:
        return self._group_of

    def wait_for(self, parameters: Iterable[nn.Parameter]) -> None:
        """Wait, on the device, until these parameters are whole, and send for those that follow."""
        wanted = set(parameters)
        while not wanted.isdisjoint(self._stale):
            self._gather_next()

    def settle(self) -> None:
        """Wait for every update and every parameter."""
        while self._gathers:
            self._gather_next()
        super().settle()

    def _queue_gathers(self) -> None:
        """Queue what was updated in the order in which a forward pass wants it, what all layers wait for first."""
        updated, self._updated = self._updated[::-1], []
        updated.sort(key=lambda bucket: self._outside_layers.isdisjoint(bucket.parameters))
        self._gathers.extend(updated)
        self._stale.update(parameter for bucket in updated for parameter in bucket.parameters)

    def _gather_next(self) -> None:
        """Finish the oldest exchange, with the next ones under way."""
        for bucket in islice(self._gathers, 1 + MAX_IN_FLIGHT):
            if not bucket.is_sent_for:
                if self._host:
                    self._host.wait(bucket.on_their_way)
                bucket.on_their_way.clear()
                bucket.send_for()
        bucket = self._gathers.popleft()
        bucket.arrive()
        self._stale.difference_update(bucket.parameters)
