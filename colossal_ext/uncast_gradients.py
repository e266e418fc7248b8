"""Weights' gradients of compiled layers in the 16 bits of the products that made them.

Under autocast a weight is cast for its product, and backward that cast makes fp32 of a 16-bit product: the same numbers,
in twice the bytes to write, to keep, to exchange and to read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


def keep_products(modules: Iterable[nn.Module]) -> None:
    """Let matrices of modules that will be compiled have gradients of any dtype, and graphs not cast them."""
    matrices = [each for module in modules for each in module.parameters() if each.ndim == 2]
    torch._inductor.config.post_grad_custom_post_pass = ReturnProducts() if matrices else None
    for matrix in matrices:
        matrix.grad_dtype = None


class ReturnProducts(CustomGraphPass):
    """Lets a backward graph return matrix products that it would only cast to fp32.

    Autograd casts by itself what anything but a parameter of `keep_products` wants in fp32.
    """

    def __call__(self, graph: fx.Graph) -> None:
        if not any(node.target.startswith("tangents_") for node in graph.find_nodes(op="placeholder")):
            return
        (output,) = graph.find_nodes(op="output")
        output.args = (tuple(_product_of(each) for each in output.args[0]),)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _product_of(node: Any) -> Any:
    """Return the 16-bit product that a node casts to fp32, or any other node itself."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.prims.convert_element_type.default:
        return node
    source, dtype = node.args
    is_product = isinstance(source, fx.Node) and source.target is torch.ops.aten.mm.default
    return source if is_product and dtype is torch.float32 else node
