"""What the OPT policy refuses, and what it leaves alone; training with it is in test_colossal_ext_training.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from colossal_ext import opt_policy
from colossal_ext.layer_groups import LayerGroups

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def tiny_config(**changes: Any) -> OPTConfig:
    return OPTConfig(**(TINY | changes))


@pytest.mark.parametrize(
    ("changes", "layout", "problem"),
    [
        ({"num_attention_heads": 16, "vocab_size": 520}, {"tp_size": 16}, "vocabulary, 520, must divide by tp_size 16"),
        ({}, {"tp_size": 8}, "attention heads, 4, must divide by tp_size 8"),
        ({"ffn_dim": 255}, {"tp_size": 2}, "feed-forward width, 255"),
        ({"attention_dropout": 0.1}, {"tp_size": 2}, "attention_dropout 0.1"),
        ({}, {"num_stages": 5}, "4 layers are fewer than the 5 pipeline stages"),
        ({"layerdrop": 0.1}, {"num_stages": 2}, "layerdrop 0.1"),
        ({}, {"tp_size": 2, "vocab_multiple": 512}, "make_vocab_size_divisible_by=1"),
    ],
)
def test_a_layout_that_the_model_does_not_divide_by_is_explained(
    changes: dict[str, Any], layout: dict[str, int], problem: str
) -> None:
    arguments = {"tp_size": 1, "num_stages": 1} | layout
    found = opt_policy.opt_layout_problems(tiny_config(**changes), **arguments)
    assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (4, 4), (1, 4)])
def test_a_layout_that_divides_has_no_problem(layout: tuple[int, int]) -> None:
    assert opt_policy.opt_layout_problems(tiny_config(), tp_size=layout[0], num_stages=layout[1]) == []


@pytest.mark.parametrize("tp_size", [2, 4, 8, 16, 32])
def test_the_released_vocabulary_divides_without_padding(tp_size: int) -> None:
    config = tiny_config(vocab_size=50272, num_attention_heads=32)
    assert opt_policy.opt_layout_problems(config, tp_size=tp_size, num_stages=1) == []


def policy_for(stages: Any = None, model: Any = None, **shard_options: Any) -> Any:
    options = {
        "tensor_parallel_size": 1,
        "pipeline_stage_manager": stages,
        "make_vocab_size_divisible_by": 1,
        "enable_sequence_parallelism": False,
        "parallel_output": True,
    }
    policy = opt_policy.OPTCausalLMPolicy()
    policy.set_model(model or OPTForCausalLM(tiny_config()))
    policy.set_shard_config(SimpleNamespace(**(options | shard_options)))
    return policy


def test_the_policy_raises_the_problems_of_its_layout() -> None:
    with pytest.raises(ValueError, match=r"attention heads, 4, must divide by tp_size 3; .*vocabulary, 512"):
        policy_for(tensor_parallel_size=3)


@pytest.mark.parametrize(
    ("stages", "shard_options", "problem"),
    [
        (SimpleNamespace(num_stages=2, num_model_chunks=2, use_zbv=True), {}, "zbv"),
        (None, {"enable_sequence_parallelism": True}, "sequence parallelism"),
        (SimpleNamespace(num_stages=2, num_model_chunks=3, use_zbv=False), {}, "6 pipeline stages"),
    ],
)
def test_the_policy_refuses_what_it_does_not_have(stages: Any, shard_options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        policy_for(stages, **shard_options)


def test_without_tensor_or_pipeline_parallelism_nothing_is_replaced() -> None:
    policy = policy_for()
    loss_function = policy.model.loss_function
    policy.preprocess()
    assert policy.module_policy() == {} and policy.get_shared_params() == []
    assert policy.postprocess().loss_function is loss_function


class OneStage:
    """A pipeline of one stage that holds everything."""

    def is_first_stage(self) -> bool:
        return True

    def is_last_stage(self) -> bool:
        return True


WHOLE_MODEL: dict[str, Any] = {
    "stage_manager": OneStage(),
    "stage_index": (0, 4),
    "run_layers": LayerGroups(1),
}


@pytest.mark.parametrize("shape", [{}, {"do_layer_norm_before": False, "word_embed_proj_dim": 32}])
def test_stage_forward_over_all_layers_equals_the_models_own(shape: dict[str, Any]) -> None:
    model = OPTForCausalLM._from_config(tiny_config(**shape), attn_implementation="sdpa").eval()
    input_ids = torch.randint(512, (3, 10))
    output = opt_policy.stage_forward(model, input_ids, input_ids, **WHOLE_MODEL)
    wanted = model(input_ids=input_ids, labels=input_ids)
    torch.testing.assert_close(output.logits, wanted.logits)
    torch.testing.assert_close(output.loss, wanted.loss)


def test_stage_forward_leaves_the_causal_mask_to_the_attention_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OPTForCausalLM._from_config(tiny_config(), attn_implementation="sdpa")
    masks = []
    for layer in model.model.decoder.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    opt_policy.stage_forward(model, torch.ones(1, 4).long(), **WHOLE_MODEL)
    assert masks == [None] * 4


def test_stage_forward_refuses_an_attention_mask() -> None:
    model = OPTForCausalLM(tiny_config())
    ones = torch.ones(1, 4).long()
    with pytest.raises(ValueError, match="attention_mask"):
        opt_policy.stage_forward(model, ones, attention_mask=ones, **WHOLE_MODEL)


def test_any_model_is_left_as_it_is_without_a_layout() -> None:
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    policy = policy_for(model=LlamaForCausalLM(LlamaConfig(**sizes)))
    policy.preprocess()
    assert policy.module_policy() == {} and policy.get_shared_params() == []
