"""16-bit gradients beside fp32 weights, in compiled layers.

Under autocast a weight is cast for its product, and backward that cast makes fp32 of a 16-bit product: on one rank the
same numbers, in twice the bytes to write, to keep and to read. Ranks then exchange 16 bits, too, and sum them so, as
LowLevelZero does: 0.2 % of a gradient is lost between 2 ranks, 0.4 between 8 if they add one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


def set_gradient_dtype(layers: Iterable[nn.Module], dtype: torch.dtype | None) -> None:
    """Give the matrices of layers gradients of a 16-bit `dtype`, in which their graphs will return them.

    A matrix of several layers is left out: its gradients are summed. What is not compiled autograd casts to `dtype`.
    Graphs are the process's: its next models' are made so, too, which costs a cast and changes no number.

    Args:
        dtype: None: that of the weights, in the next models' graphs as well.
    """
    torch._inductor.config.post_grad_custom_post_pass = UncastProducts() if dtype else None
    if dtype is None:
        return
    uses = Counter(each for layer in layers for each in layer.parameters() if each.ndim >= 2)
    for matrix, number in uses.items():
        if number == 1:
            matrix.grad_dtype = dtype


class UncastProducts(CustomGraphPass):
    """Lets a backward graph return 16-bit matrix products that it would only cast to fp32.

    Autograd casts by itself whatever is wanted in fp32.
    """

    def __call__(self, graph: fx.Graph) -> None:
        if not any(node.target.startswith("tangents_") for node in graph.find_nodes(op="placeholder")):
            return
        (output,) = graph.find_nodes(op="output")
        output.args = (tuple(_uncast(each) for each in output.args[0]),)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _uncast(node: Any) -> Any:
    """Return the 16-bit product that a node casts to fp32, or any other node itself."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.prims.convert_element_type.default:
        return node
    source, dtype = node.args
    if dtype is not torch.float32 or not isinstance(source, fx.Node) or source.target is not torch.ops.aten.mm.default:
        return node
    return source if source.meta["val"].itemsize == 2 else node
