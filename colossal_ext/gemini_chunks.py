"""Chunk sizes for Gemini that shard a model of any size and waste little."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# A chunk of this many elements (128 MiB in bf16) keeps collectives efficient; larger ones only cost memory.
LARGEST_TARGET_NUMEL = 64 * 2**20
# A model is cut into about this many chunks where that keeps them below the largest target.
NUM_CHUNKS_TARGET = 8
# Consecutive parameters whose summed size is tried as a chunk size: four OPT layers.
CANDIDATE_WINDOW = 64
# Padding, as a share of all elements, that a chunk of half or twice the target size has to save.
DOUBLING_COST = 0.01


@dataclass(frozen=True)
class ChunkPlan:
    """How ChunkManager will lay out a model's parameters.

    Attributes:
        chunk_numel: elements of a regular chunk.
        chunk_numels: elements of each chunk, in order; a parameter larger than `chunk_numel` has one of its own.
        padding_numel: elements of all chunks that hold no parameter.
    """

    chunk_numel: int
    chunk_numels: tuple[int, ...]
    padding_numel: int

    @property
    def padding_share(self) -> float:
        return self.padding_numel / sum(self.chunk_numels)


def lay_out(numels: Sequence[int], chunk_numel: int, world_size: int) -> ChunkPlan:
    """Return the layout of parameters in chunks of one size, as `ChunkManager.register_tensor` makes it.

    Args:
        numels: elements of each parameter, in the model's order, tied ones once.
    """
    chunk_numel = round_up(chunk_numel, world_size)
    chunks: list[int] = []
    room = 0
    for numel in numels:
        if numel > room:
            room = max(chunk_numel, round_up(numel, world_size))
            chunks.append(room)
        room -= numel
    return ChunkPlan(chunk_numel, tuple(chunks), sum(chunks) - sum(numels))


def plan_chunks(numels: Sequence[int], world_size: int) -> ChunkPlan:
    """Return the layout with little padding near the target size: an eighth of the layers, capped.

    Never a single replicated chunk, unless the model is a single parameter.
    """
    largest = largest_regular_numel(numels)
    layers_numel = sum(numel for numel in numels if numel <= largest)
    target = max(min(LARGEST_TARGET_NUMEL, layers_numel // NUM_CHUNKS_TARGET), largest)
    sizes = {target, *_candidates(numels, max(largest, target // 2), 2 * target)}
    plans = (lay_out(numels, size, world_size) for size in sorted(sizes))

    def cost(plan: ChunkPlan) -> float:
        return plan.padding_share + DOUBLING_COST * abs(math.log2(plan.chunk_numel / target))

    return min(plans, key=cost)


def _candidates(numels: Sequence[int], low: int, high: int) -> Iterator[int]:
    """Yield the sizes of runs of consecutive parameters from the model's start, middle and end."""
    starts = {0, len(numels) // 2, max(0, len(numels) - CANDIDATE_WINDOW)}
    for start in starts:
        window = np.array(numels[start : start + CANDIDATE_WINDOW], dtype=np.int64)
        for first in range(len(window)):
            sums = np.cumsum(window[first:])
            yield from (int(numel) for numel in sums[(sums >= low) & (sums <= high)])


def largest_regular_numel(numels: Sequence[int]) -> int:
    """Return the size below which ColossalAI's search takes no chunk: its largest parameter without outliers.

    Outliers, the embedding, lie three standard deviations above the mean (search_utils.py:31 of 0.5.0).
    """
    sizes = np.array(numels, dtype=np.float64)
    return int(sizes[sizes <= sizes.mean() + 3 * sizes.std()].max())


def round_up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def gemini_chunk_settings(numels: Sequence[int], world_size: int) -> dict[str, float | int]:
    """Return GeminiPlugin's `min_chunk_size_m`, `search_range_m` and `hidden_dim` for a model.

    GeminiPlugin's defaults replicate a model below 32 x 2^20 elements in one gathered chunk, which is neither ZeRO-3
    nor right with gradient accumulation on several ranks. Its search starts at
    max(min_chunk_size, largest parameter but outliers), rounded up to `hidden_dim`, and tries `search_range / hidden_dim`
    sizes; the range here is empty, because `plan_chunks` has already searched.

    Args:
        numels: elements of each parameter: `[p.numel() for p in model.parameters()]`.
        world_size: ranks that share the chunks.
    """
    chunk_numel = plan_chunks(numels, world_size).chunk_numel
    # Above the model's own size the search would replicate it after all.
    return {
        "min_chunk_size_m": min(chunk_numel, sum(numels)) / 2**20,
        "search_range_m": 0,
        "hidden_dim": world_size,
    }
