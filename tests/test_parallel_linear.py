"""Divided layers on one rank, where each holds all; what several ranks compute is in test_colossal_ext_training.py."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from types import MethodType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from transformers import OPTConfig
from transformers.models.opt.modeling_opt import OPTDecoderLayer

import strategy
from colossal_ext.mends import install_mends
from colossal_ext.opt_policy import _attention_forward
from colossal_ext.parallel_linear import ColumnParallelLinear, CopyingColumnParallelLinear, RowParallelLinear
from model import compile_layers

REPLACED: dict[str, Any] = {
    "q_proj": ColumnParallelLinear,
    "k_proj": ColumnParallelLinear,
    "v_proj": ColumnParallelLinear,
    "out_proj": RowParallelLinear,
    "fc1": CopyingColumnParallelLinear,
    "fc2": RowParallelLinear,
}


@pytest.fixture
def group() -> Iterator[Any]:
    install_mends(on_cpu=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def layers(group: Any) -> tuple[OPTDecoderLayer, OPTDecoderLayer]:
    """Return a layer of transformers and the same one with divided linear layers."""
    torch.manual_seed(0)
    config = OPTConfig(hidden_size=32, ffn_dim=64, num_attention_heads=2, dropout=0.0, attn_implementation="sdpa")
    plain = OPTDecoderLayer(config, layer_idx=0)
    divided = copy.deepcopy(plain)
    for parent in (divided.self_attn, divided):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, REPLACED[name].from_native_module(child, group))
    divided.self_attn.forward = MethodType(_attention_forward, divided.self_attn)
    return plain, divided


def output_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what a call returns, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output = layer(x)
    output.square().sum().backward()
    return [output, x.grad, *(parameter.grad for parameter in layer.parameters())]


def test_a_layer_computes_the_same_and_exchanges_twice_in_each_direction(group, monkeypatch):
    plain, divided = layers(group)
    all_reduce = Mock(wraps=dist.all_reduce)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    x = torch.randn(2, 8, 32)
    for ours, theirs in zip(output_and_gradients(divided, x), output_and_gradients(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all_reduce.call_count == 4


def test_a_layer_is_one_graph_that_exchanges_twice_in_each_direction(group):
    (_, divided), (_, compiled) = layers(group), layers(group)
    exchanges = []

    def count(graph: GraphModule, inputs: Any) -> Any:
        exchanges.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compiled.compile(backend=aot_autograd(fw_compiler=count), fullgraph=True)
    x = torch.randn(2, 8, 32)
    for ours, theirs in zip(output_and_gradients(compiled, x), output_and_gradients(divided, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert exchanges == [2, 2]


@pytest.mark.skipif(not strategy._has_c_compiler(), reason="torch.compile needs a C compiler")
def test_a_compiled_layer_makes_weights_gradients_while_it_exchanges(group):
    _, divided = layers(group)
    model: Any = nn.Sequential(divided)
    model.loss_function = nn.functional.mse_loss
    compile_layers(model)
    _, (_, backward) = run_and_get_code(output_and_gradients, divided, torch.randn(2, 8, 32))
    calls = re.findall(r"all_reduce_(?=\.default\()|wait_tensor(?=\.default\()|mm(?=\()", backward)
    exchanges = [place for place, call in enumerate(calls) if call == "all_reduce_"]
    between = [calls[place + 1 : calls.index("wait_tensor", place)] for place in exchanges]
    # Those of fc1 and fc2, and of the attention's four.
    assert [len(each) for each in between] == [2, 4], calls
