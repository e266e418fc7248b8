"""Decoder layers compiled several at a time: what the host does around a graph takes it as long as the launches in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def in_groups(layers: Sequence[Any], most: int) -> Iterator[tuple[Any, ...]]:
    """Yield neighbours in groups of nearly one size, which share their graph; layers that are recomputed by themselves."""
    for is_recomputed, part in itertools.groupby(layers, key=lambda layer: layer.gradient_checkpointing):
        neighbours = tuple(part)
        size = 1 if is_recomputed else -(-len(neighbours) // -(-len(neighbours) // most))
        for start in range(0, len(neighbours), size):
            yield neighbours[start : start + size]


class LayerGroups:
    """Runs a pipeline stage's layers one after the other, some of them in one graph.

    Layers that are recomputed have a graph each, if they are compiled.

    Args:
        size: layers of a graph at most; 1: no graph, but those of layers that are compiled each by itself.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._run_graph = torch.compile(_run_layers) if size > 1 else _run_layers

    def __call__(self, layers: Sequence[Any], hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Return the last layer's output of `hidden_states`, (B, T, H), each getting `arguments` as well."""
        for group in in_groups(layers, self.size):
            run = _run_layers if group[0].gradient_checkpointing else self._run_graph
            hidden_states = run(group, hidden_states, **arguments)
        return hidden_states


def _run_layers(layers: Sequence[Any], hidden_states: Tensor, **arguments: Any) -> Tensor:
    for layer in layers:
        hidden_states = layer(hidden_states, **arguments)
    return hidden_states


def compile_together(layers: Sequence[Any]) -> None:
    """Compile layers in place that their model calls one after the other, each with the output of the one before.

    The first one's call computes all of them, and the others return what they are given. Layers that are not recomputed,
    and whose other arguments are the same.
    """
    if len(layers) == 1:
        layers[0].compile()
        return
    group = _Group(tuple(layers))
    first, *others = layers
    first._compiled_call_impl = group.compute  # what nn.Module.__call__ calls in place of `_call_impl`
    for layer in others:
        layer._compiled_call_impl = group.hand_on


class _Group:
    def __init__(self, layers: tuple[Any, ...]) -> None:
        self._layers = layers
        self._compute = torch.compile(_compute)
        self._arguments: dict[str, Any] = {}

    def compute(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self._arguments = arguments
        return self._compute(self._layers, hidden_states, **arguments)

    def hand_on(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        different = [name for name, value in arguments.items() if value is not self._arguments.get(name)]
        assert not different, f"layers of one graph were called with different {', '.join(different)}"
        return hidden_states


def _compute(layers: Sequence[Any], hidden_states: Tensor, **arguments: Any) -> Tensor:
    for layer in layers:
        hidden_states = layer._call_impl(hidden_states, **arguments)
    return hidden_states
