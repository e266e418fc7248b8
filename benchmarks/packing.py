"""Which runs fit beside each other: on a GPU, and together on the host. No torch import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What a prediction may be short of, and what lies beside every process.
SAFETY_FACTOR, SAFETY_GIB = 1.15, 2.0


@dataclass(frozen=True)
class Need:
    """Memory that one run is predicted to take, in GiB, on one GPU (0 on a CPU) and on the host."""

    gpu_gib: float
    host_gib: float

    def with_safety(self) -> Need:
        """Return what is set aside for the run."""
        gpu_gib = SAFETY_FACTOR * self.gpu_gib + SAFETY_GIB if self.gpu_gib else 0.0
        return Need(gpu_gib, SAFETY_FACTOR * self.host_gib + SAFETY_GIB)


@dataclass(frozen=True)
class Room:
    """A machine: GiB of each GPU (none: a CPU) and of the host."""

    gpus_gib: tuple[float, ...]
    host_gib: float

    def place(self, need: Need, running: Sequence[tuple[int, Need]]) -> int | None:
        """Return the GPU with most space left that `need` fits on, or None where it has to wait; 0 on a CPU.

        On an idle machine anything is placed: its prediction may be wrong, and its failure tells.

        Args:
            running: GPU and need of what runs already.
        """
        if not running:
            return 0
        wanted = need.with_safety()
        taken = [(gpu, each.with_safety()) for gpu, each in running]
        if wanted.host_gib + sum(each.host_gib for _, each in taken) > self.host_gib:
            return None
        left = [
            size - sum(each.gpu_gib for gpu, each in taken if gpu == number)
            for number, size in enumerate(self.gpus_gib)
        ]
        if not left:
            return 0
        best = max(range(len(left)), key=left.__getitem__)
        return best if wanted.gpu_gib <= left[best] else None
