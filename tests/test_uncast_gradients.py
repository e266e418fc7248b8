"""Compiled layers under autocast: their matrices' gradients are the 16-bit products, the same numbers as in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from colossal_ext.mixed_precision import autocast_forward
from model import compile_layers, decoder_layers, recompute_layers
from planner import keeps_products


@pytest.fixture(autouse=True)
def inductor_as_it_was() -> Iterator[None]:
    with torch._inductor.config.patch(post_grad_custom_post_pass=None):
        yield


def compiled_model(*, keeps_products: bool) -> Any:
    """Return two layers, the first of them recomputed, each a graph of its own."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=16, dropout=0.0, use_cache=False)
    model = OPTForCausalLM._from_config(config, attn_implementation="sdpa")
    autocast_forward(model, "cpu", torch.bfloat16)
    recompute_layers(model, 1)
    compile_layers(model, keeps_products=keeps_products)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    input_ids = torch.arange(20).view(2, 10)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_matrices_of_layers_have_16_bit_gradients_that_are_the_same_numbers() -> None:
    cast = gradients(compiled_model(keeps_products=False))
    assert {grad.dtype for grad in cast.values()} == {torch.float32}
    model = compiled_model(keeps_products=True)
    matrices = {id(each) for layer in decoder_layers(model) for each in layer.parameters() if each.ndim == 2}
    for name, grad in gradients(model).items():
        is_product = id(model.get_parameter(name)) in matrices
        assert grad.dtype is (torch.bfloat16 if is_product else torch.float32), name
        assert torch.equal(grad.float(), cast[name]), name


def test_what_autograd_wants_in_fp32_it_casts_itself() -> None:
    """The pass is the whole process's: another model's graphs return products, too."""
    model = compiled_model(keeps_products=True)
    for parameter in model.parameters():
        parameter.grad_dtype = parameter.dtype
    assert {grad.dtype for grad in gradients(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("plugin", "precision", "compiled", "accumulates", "keeps"),
    [
        ("torch_ddp", "bf16", True, False, True),
        ("torch_ddp", "bf16", True, True, False),  # summed in fp32
        ("torch_ddp", "bf16", False, False, False),
        ("torch_ddp", "fp32", True, False, False),
        ("torch_ddp_fp16", "fp16", True, False, False),  # unscaled in fp32
        ("low_level_zero", "bf16", True, False, False),  # its weights have 16 bits themselves
    ],
)
def test_only_a_micro_batch_of_torch_ddp_keeps_products(
    plugin: str, precision: str, compiled: bool, accumulates: bool, keeps: bool
) -> None:
    assert keeps_products(plugin, precision, compiled=compiled, accumulates=accumulates) is keeps
