"""Two gloo ranks with ShardedZeroPlugin and a toy model, beside torch's AdamW on the whole batch in each of them.

python -m tests.sharded_zero_cases ANSWER.json     # {case: largest difference of the weights, or an error's text}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.forks import fork_ranks

NUM_LAYERS = 6
Skipped = tuple[int, ...]


class Toy(nn.Module):
    """Layers of odd sizes, so that shares are padded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(NUM_LAYERS))

    def forward(self, values: Tensor, skipped: Skipped = ()) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number not in skipped:
                values = layer(values)
        return values


def batches() -> list[Tensor]:
    """Return (4, 5) each, of which a rank sees half."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, generator=generator) for _ in range(6)]


def reference(steps: Iterable[Iterable[tuple[Tensor, Skipped]]]) -> Tensor:
    """Return the weights after steps of one or more backward passes each."""
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for step in steps:
        for batch, skipped in step:
            (model(batch, skipped).square().sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])


class Boosted:
    """The toy under the plugin, matrices and vectors in groups of their own, so many layers computed by the first of them."""

    def __init__(self, *, precision: str = "fp32", together: int = 1, **options: Any) -> None:
        import torch.distributed as dist
        from colossalai.booster import Booster

        from colossal_ext.adam_kernels import CompileFreeAdam
        from colossal_ext.layer_groups import compile_together
        from colossal_ext.sharded_zero import ShardedZeroPlugin

        self.plain, self.rank = Toy(), dist.get_rank()
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
        groups = [{"params": [p for p in self.plain.parameters() if (p.ndim > 1) == wide]} for wide in (True, False)]
        optimizer = CompileFreeAdam(groups, lr=1e-2, adamw_mode=True)
        plugin = ShardedZeroPlugin(**{"stage": 1, "precision": precision, "max_norm": 0.0, **options})
        self.booster = Booster(plugin=plugin)
        self.model, self.optimizer, *_ = self.booster.boost(self.plain, optimizer)
        parts = [self.plain.layers[start : start + together] for start in range(0, NUM_LAYERS, together)]
        if together > 1:
            with patch.object(torch, "compile", lambda run, **_: run):
                for part in parts:
                    compile_together(part)
        self.optimizer.defer_updates(self.plain, parts)

    def forward(self, batch: Tensor, skipped: Skipped = ()) -> Tensor:
        own = batch[2 * self.rank : 2 * self.rank + 2].to(self.dtype)
        return self.model(own, skipped).float().square().sum()

    def backward(self, batch: Tensor, skipped: Skipped = ()) -> None:
        self.booster.backward(self.forward(batch, skipped), self.optimizer)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def weights(self) -> Tensor:
        self.optimizer.settle()
        return weights_of(self.plain)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def plain(**options: Any) -> float:
    ours, data = Boosted(**options), batches()[:3]
    for batch in data:
        ours.backward(batch)
        ours.step()
    return difference(ours.weights, reference([(batch, ())] for batch in data))


def missing_layer() -> float:
    ours, steps = Boosted(), list(zip(batches()[:3], [(), (2,), ()], strict=True))
    for batch, skipped in steps:
        ours.backward(batch, skipped)
        ours.step()
    return difference(ours.weights, reference([step] for step in steps))


def missing_part() -> float:
    """Return the difference where the layer shares its bucket with another."""
    from colossal_ext import sharded_zero

    with patch.object(sharded_zero, "BUCKETS", NUM_LAYERS // 2):
        return missing_layer()


def dropped() -> float:
    ours, (first, second, *_) = Boosted(), batches()
    ours.backward(first)
    ours.optimizer.zero_grad()
    ours.backward(second)
    ours.step()
    return difference(ours.weights, reference([[(second, ())]]))


def accumulated_then_missing() -> float:
    ours, (first, second, *_) = Boosted(), batches()
    with ours.booster.no_sync(ours.model, ours.optimizer):
        ours.backward(first)
    ours.backward(second, (1, 2, 3))
    ours.step()
    return difference(ours.weights, reference([[(first, ()), (second, (1, 2, 3))]]))


def stage_2() -> float:
    ours, data = Boosted(stage=2), batches()
    for number in (0, 2):
        ours.backward(data[number])
        ours.backward(data[number + 1])
        ours.step()
    return difference(ours.weights, reference([(b, ()) for b in data[n : n + 2]] for n in (0, 2)))


def slow_host() -> float:
    from colossal_ext.host_updates import HostUpdates

    update = HostUpdates._update

    def slowly(*arguments: Any) -> None:
        time.sleep(0.02)
        update(*arguments)

    with patch.object(HostUpdates, "_update", slowly):
        ours, data = Boosted(offload_frac=1.0), batches()[:3]
        for batch in data:
            ours.backward(batch)
            ours.step()
        found = difference(ours.weights, reference([(batch, ())] for batch in data))
        ours.optimizer.close()
    return found


def overflow() -> float:
    """Return the difference to a run that had no overflow; infinity where the weights changed at it."""
    found = []
    for scale in (2.0**24, 2.0**6):
        scaling = {"initial_scale": scale, "hysteresis": 1, "backoff_factor": 2.0**-18}
        ours, (first, *data) = Boosted(precision="fp16", max_norm=1.0, **scaling), batches()
        if scale > 2**10:
            before = ours.weights
            ours.backward(first)
            ours.step()
            if not torch.equal(ours.weights, before):
                return float("inf")
        for batch in data[:3]:
            ours.backward(batch)
            ours.step()
        found.append(ours.weights)
    return difference(*found)


def uneven_evaluation() -> float:
    """Return the difference of the weights after ranks have evaluated differently many batches."""
    ours, (first, second, *data) = Boosted(), batches()
    ours.backward(first)
    ours.step()
    ours.optimizer.settle()  # as trainer.evaluate does
    with torch.no_grad():
        for batch in data[: 1 + ours.rank]:
            ours.forward(batch)
    ours.backward(second)
    ours.step()
    return difference(ours.weights, reference([[(first, ())], [(second, ())]]))


def twice_with_updates() -> str:
    ours, (first, second, *_) = Boosted(updates_in_backward=True), batches()
    ours.backward(first)
    try:
        ours.backward(second)
    except AssertionError as error:
        return str(error)
    return "nothing was raised"


CASES: dict[str, Callable[[], float | str]] = {
    "plain": plain,
    "three layers in one call": partial(plain, together=3),
    "a layer without gradients": missing_layer,
    "a layer without gradients, in a bucket": missing_part,
    "gradients dropped between backward passes": dropped,
    "accumulated, then a layer without gradients": accumulated_then_missing,
    "stage 2, accumulated": stage_2,
    "on the host, slowly": slow_host,
    "an overflow, then steps": overflow,
    "one rank evaluates more": uneven_evaluation,
    "two backward passes with updates": twice_with_updates,  # the last: it leaves exchanges behind
}


def run_rank(answer: Path) -> None:
    """Run every case, and let rank 0 write the answer."""
    torch.set_num_threads(1)
    import torch.distributed as dist

    from colossal_ext import exchanges
    from colossal_ext.mends import install_mends

    dist.init_process_group("gloo")
    install_mends(on_cpu=True)
    with patch.object(exchanges, "OWN_NUMEL", 25):  # matrices in their own memory, vectors in a copy
        found = {name: case() for name, case in CASES.items()}
    if dist.get_rank() == 0:
        answer.write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # ColossalAI's process groups complain when the interpreter ends


if __name__ == "__main__":
    fork_ranks(run_rank, 2, Path(sys.argv[1]))
