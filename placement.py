"""Which ranks share a machine along each axis of parallelism. No torch import, nothing of ours.

ColossalAI's HybridParallelPlugin lays ranks out as (dp, pp, tp): neighbours share a layer, which is what talks most, then
come the stages of a replica, then the replicas. torchrun numbers the ranks of one machine in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Ranks divided by one kind of parallelism.

    Args:
        name: tp, pp or dp.
        size: ranks of one group.
        machines: most that one of its groups touches.
    """

    name: str
    size: int
    machines: int


def axes(tp: int, pp: int, *, world_size: int, gpus: int) -> list[Axis]:
    """Return the axes from the innermost on.

    Args:
        gpus: ranks of one machine.
    """
    found, stride = [], 1
    for name, size in (("tp", tp), ("pp", pp), ("dp", world_size // (tp * pp))):
        firsts = [rank for rank in range(world_size) if rank // stride % size == 0]
        machines = max(len({(first + member * stride) // gpus for member in range(size)}) for first in firsts)
        found.append(Axis(name, size, machines))
        stride *= size
    return found


def describe(axes: Sequence[Axis]) -> str:
    """Return one line on the axes that divide anything."""
    parts = []
    for axis in axes:
        where = "inside each machine" if axis.machines == 1 else f"across {axis.machines} machines"
        parts += [f"{axis.name} {axis.size} {where}"] * (axis.size > 1)
    return ", ".join(parts)


def warning(axes: Sequence[Axis]) -> str | None:
    """Return what is wrong with the placement: tensor parallelism waits for its link four times a layer."""
    tp = axes[0]
    if tp.machines == 1:
        return None
    return (
        f"--tp {tp.size}: spans {tp.machines} machines, whose network every layer waits for; take a --tp that divides "
        "the GPUs of a machine, and --pp across"
    )
