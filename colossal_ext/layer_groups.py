"""Decoder layers compiled several at a time: around each graph the host spends as long as on the launches inside.

Each size of a batch has a graph of its own (`dynamic=False`). Otherwise the size that comes second is compiled for any: that of
training, where a resumed run evaluates first and with other batches. Such kernels sum in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def in_groups(layers: Sequence[Any], most: int) -> Iterator[tuple[Any, ...]]:
    """Yield neighbours in groups of one size, the last smaller where they do not divide; recomputed layers one by one."""
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
        self._run_graph = torch.compile(_run_layers, dynamic=False) if size > 1 else _run_layers

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


def compile_together(layers: Sequence[Any], *, cuda_graphs: bool = False) -> None:
    """Compile layers in place that their model calls one after the other, each with the output of the one before.

    The first one's call computes all of them, and the others return what they are given.

    Args:
        layers: none of them recomputed, unless it is alone; all are called with the same other arguments.
        cuda_graphs: where gradients are wanted, launch all kernels of a pass at once. Their memory, that of parameters'
            gradients too, is used again in the next forward pass.
    """
    if len(layers) == 1 and not cuda_graphs:
        layers[0].compile(dynamic=False)
        return
    group = _Group(tuple(layers), cuda_graphs=cuda_graphs)
    first, *others = layers
    first._compiled_call_impl = group.compute  # what nn.Module.__call__ calls in place of `_call_impl`
    for layer in others:
        layer._compiled_call_impl = group.hand_on


class _Group:
    """Layers of one graph, while their model calls them."""

    def __init__(self, layers: tuple[Any, ...], *, cuda_graphs: bool) -> None:
        self._layers = layers
        self._evaluate = torch.compile(_run_uncompiled, dynamic=False)
        self._train = self._evaluate
        if cuda_graphs:
            self._train = torch.compile(_run_uncompiled, dynamic=False, options={"triton.cudagraphs": True})
        # Of the last call of the first layer, until the last layer is called.
        self._arguments: dict[str, Any] = {}
        self._num_left = 0

    def compute(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Return the last layer's output."""
        run = self._train if torch.is_grad_enabled() else self._evaluate
        output = run(self._layers, hidden_states, **arguments)
        self._num_left = len(self._layers) - 1
        self._arguments = {**arguments, "hidden_states": output} if self._num_left else {}
        return output

    def hand_on(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Return the input, which is the last layer's output already."""
        arguments["hidden_states"] = hidden_states
        names = arguments.keys() | self._arguments.keys()
        different = [name for name in sorted(names) if arguments.get(name) is not self._arguments.get(name)]
        assert not different, f"layers of one graph were called with different {', '.join(different)}"
        self._num_left -= 1
        if not self._num_left:
            self._arguments = {}
        return hidden_states


def _run_uncompiled(layers: Sequence[Any], hidden_states: Tensor, **arguments: Any) -> Tensor:
    for layer in layers:
        hidden_states = layer._call_impl(hidden_states, **arguments)  # `layer(...)` would come back to the group
    return hidden_states
