"""opt_sizes.py: the table against published counts and against transformers."""

from __future__ import annotations

import pytest

from opt_sizes import OPT_SHAPES, size_name

# Parameters of the released checkpoints, facebook/opt-<size>.
PUBLISHED = {
    "125m": 125_239_296,
    "350m": 331_196_416,
    "1.3b": 1_315_758_080,
    "2.7b": 2_651_596_800,
    "6.7b": 6_658_473_984,
    "13b": 12_853_473_280,
    "30b": 29_974_540_288,
}


@pytest.mark.parametrize(("size", "num_params"), PUBLISHED.items())
def test_parameters_are_the_published_count(size: str, num_params: int) -> None:
    assert OPT_SHAPES[size].num_params == num_params


@pytest.mark.parametrize("size", OPT_SHAPES)
def test_parameters_are_those_transformers_makes(size: str) -> None:
    import torch
    from transformers import OPTForCausalLM

    from model import opt_config

    with torch.device("meta"):
        model = OPTForCausalLM(opt_config(OPT_SHAPES[size]))
    assert sum(parameter.numel() for parameter in model.parameters()) == OPT_SHAPES[size].num_params


@pytest.mark.parametrize("size", OPT_SHAPES)
def test_head_size_divides_the_width(size: str) -> None:
    shape = OPT_SHAPES[size]
    assert shape.hidden_size % shape.num_heads == 0


@pytest.mark.parametrize(
    ("word", "size"),
    [("6.7", "6.7b"), ("6.7b", "6.7b"), ("6.7B", "6.7b"), ("125", "125m"), ("13", "13b"), ("Tiny", "tiny")],
)
def test_a_size_can_be_written_short(word: str, size: str) -> None:
    assert size_name(word) == size


@pytest.mark.parametrize("word", ["7b", "facebook/opt-125m", "./125m", "", "b"])
def test_anything_else_is_no_size(word: str) -> None:
    assert size_name(word) is None
