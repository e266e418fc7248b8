"""Compiled layers under autocast: their matrices have 16-bit gradients, on one rank the same numbers as in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import strategy
from args import TrainArgs
from colossal_ext.gradient_types import set_gradient_dtype
from colossal_ext.mixed_precision import autocast_forward
from model import compile_layers, decoder_layers, parameter_groups, recompute_layers
from planner import has_16_bit_gradients
from runtime import current_runtime

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def inductor_as_it_was() -> Iterator[None]:
    with torch._inductor.config.patch(post_grad_custom_post_pass=None):
        yield


def two_layers() -> Any:
    """Return a model, the first of whose layers is recomputed, so that each has a graph of its own."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=16, dropout=0.0, use_cache=False)
    model = OPTForCausalLM._from_config(config, attn_implementation="sdpa")
    recompute_layers(model, 1)
    return model


def matrices_of_layers(model: Any) -> set[int]:
    return {id(each) for layer in decoder_layers(model) for each in layer.parameters() if each.ndim == 2}


def batch() -> dict[str, Tensor]:
    input_ids = torch.arange(20).view(2, 10)
    return {"input_ids": input_ids, "labels": input_ids}


def gradients(model: Any) -> dict[str, Tensor]:
    model(**batch()).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_matrices_of_layers_have_16_bit_gradients_that_are_the_same_numbers() -> None:
    both = []
    for dtype in (None, BF16):
        model = two_layers()
        autocast_forward(model, "cpu", BF16)
        compile_layers(model, gradient_dtype=dtype)
        both.append(gradients(model))
    fp32, mixed = both
    assert {grad.dtype for grad in fp32.values()} == {FP32}
    for name, grad in mixed.items():
        is_matrix = id(model.get_parameter(name)) in matrices_of_layers(model)
        assert grad.dtype is (BF16 if is_matrix else FP32), name
        assert torch.equal(grad.float(), fp32[name]), name


class Head(nn.Module):
    """A product that the forward pass casts to fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        return self.linear(values).float()


def test_graphs_cast_what_a_forward_pass_returns_and_autograd_what_else_is_wanted_in_fp32() -> None:
    torch._dynamo.reset()
    head, other = Head(), Head()
    set_gradient_dtype([head], BF16)
    values = torch.ones(2, 8, requires_grad=True)
    for model in (head, other):
        model.compile()
        with torch.autocast("cpu", BF16):
            output = model(values)
        assert output.dtype is FP32
        output.sum().backward()
    assert values.grad.dtype is FP32  # a product, too
    assert [model.linear.weight.grad.dtype for model in (head, other)] == [BF16, FP32]


def test_a_gradient_has_its_type_without_a_graph_and_is_fp32_where_layers_share_it() -> None:
    first, second = Head(), Head()
    second.extra = first.extra = nn.Parameter(torch.ones(4, 4))
    set_gradient_dtype([first, second], BF16)
    (first(torch.ones(2, 8)) @ first.extra).sum().backward()
    assert (first.linear.weight.grad.dtype, first.extra.grad.dtype) == (BF16, FP32)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.autograd.set_multithreading_enabled(True)


def trained(compile_: str, accumulation: int, max_norm: float) -> tuple[set[torch.dtype], list[Tensor]]:
    """Return the types of matrices' gradients before the update, and the weights after two steps."""
    args = TrainArgs(
        plugin="torch_ddp",
        precision="bf16",
        compile=compile_,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=max_norm,
        gradient_checkpointing="1",
    )
    model = two_layers()
    names = [name for name, each in model.named_parameters() if id(each) in matrices_of_layers(model)]
    engine = strategy.Engine(args, current_runtime(), strategy.workload(model, varying_length=False))
    optimizer = strategy.make_optimizer(parameter_groups(model, 0.0), args, 1e-3)
    engine.boost(model, optimizer, strategy.make_scheduler(optimizer, args, 2))
    dtypes = set()
    for _ in range(2):
        for number in range(accumulation):
            scale = torch.tensor(1.0 / accumulation)
            engine.forward_backward(batch(), scale, last=number == accumulation - 1, at_loss=lambda _: None)
        dtypes |= {model.get_parameter(name).grad.dtype for name in names}
        engine.step()
    return dtypes, [each.detach().clone() for each in model.parameters()]


def test_an_engine_trains_with_them_clipped_and_sums_micro_batches_in_fp32(one_rank: None) -> None:
    plain_dtypes, plain = trained("off", 1, 0.1)
    dtypes, weights = trained("on", 1, 0.1)
    assert (plain_dtypes, dtypes) == ({FP32}, {BF16})
    # Adam's two steps are of 1e-3 each, wherever a gradient is not nothing.
    for ours, theirs in zip(weights, plain, strict=True):
        assert (ours - theirs).abs().mean() < 2e-5
    assert trained("on", 2, 0.0)[0] == {FP32}


@pytest.mark.parametrize(
    ("plugin", "precision", "compiled", "accumulates", "expected"),
    [
        ("torch_ddp", "bf16", True, False, True),
        ("torch_ddp", "bf16", True, True, False),  # summed in fp32
        ("torch_ddp", "bf16", False, False, False),
        ("torch_ddp", "fp32", True, False, False),
        ("torch_ddp_fp16", "fp16", True, False, False),  # unscaled in fp32
        ("low_level_zero", "bf16", True, False, False),  # its weights have 16 bits themselves
    ],
)
def test_only_a_micro_batch_of_torch_ddp_has_them_beside_fp32_weights(
    plugin: str, precision: str, compiled: bool, accumulates: bool, expected: bool
) -> None:
    assert has_16_bit_gradients(plugin, precision, compiled=compiled, accumulates=accumulates) is expected
