"""Layers that share a graph: in a pipeline's stage, and in a model that calls them one after the other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import OPTConfig, OPTForCausalLM

import strategy
from args import TrainArgs
from colossal_ext.layer_groups import LayerGroups, compile_together, in_groups
from model import compile_layers, decoder_layers
from opt_sizes import OPT_SHAPES
from planner import PlanRequest, _graph_gradients, layers_per_graph, model_shape


class Layer(torch.nn.Module):
    """Multiplies, and adds the positions."""

    def __init__(self, factor: float, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.factor, self.gradient_checkpointing = factor, gradient_checkpointing

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return hidden_states * self.factor + arguments["position_ids"]


def groups_of(monkeypatch: pytest.MonkeyPatch, size: int, layers: list[Layer]) -> tuple[list[int], torch.Tensor]:
    """Return how many layers each graph was given, and what came out of them for ones."""
    sizes: list[int] = []

    def compiled(run: Any, **_: Any) -> Any:
        def counted(part: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            sizes.append(len(part))
            return run(part, hidden_states, **arguments)

        return counted

    monkeypatch.setattr(torch, "compile", compiled)
    return sizes, LayerGroups(size)(layers, torch.ones(1, 2, 3), position_ids=torch.ones(3))


@pytest.mark.parametrize(
    ("num_layers", "size", "groups"), [(12, 5, [4, 4, 4]), (10, 5, [5, 5]), (11, 5, [4, 4, 3]), (3, 5, [3]), (4, 1, [])]
)
def test_layers_share_a_graph_in_groups_of_nearly_one_size(
    monkeypatch: pytest.MonkeyPatch, num_layers: int, size: int, groups: list[int]
) -> None:
    sizes, output = groups_of(monkeypatch, size, [Layer(2.0) for _ in range(num_layers)])
    assert sizes == groups
    assert output.unique().tolist() == [2.0 ** (num_layers + 1) - 1]


def test_layers_that_are_recomputed_stay_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Layer(3.0, gradient_checkpointing=True), *(Layer(2.0) for _ in range(7))]
    sizes, output = groups_of(monkeypatch, 4, layers)
    assert sizes == [4, 3] and output.unique().tolist() == [4.0 * 2**7 + 2**7 - 1]


def tiny_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    config = OPTConfig(**sizes, num_hidden_layers=4, word_embed_proj_dim=16, dropout=0.0, use_cache=False, **changes)
    return OPTForCausalLM._from_config(config, attn_implementation="sdpa")


def loss_and_gradients(model: Any) -> list[torch.Tensor]:
    input_ids = torch.arange(20).view(2, 10)
    loss = model(input_ids=input_ids, labels=input_ids).loss
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("size", [2, 4])
def test_layers_compiled_together_compute_what_they_do_apart(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    counter, model = CompileCounter(), tiny_model()
    names, wanted = list(model.state_dict()), loss_and_gradients(model)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    for group in in_groups(decoder_layers(model), size):
        compile_together(group)
    torch._dynamo.reset()
    for ours, theirs in zip(loss_and_gradients(model), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1  # one graph for all groups
    assert list(model.state_dict()) == names
    model.eval()
    torch.testing.assert_close(loss_and_gradients(model)[0], wanted[0])


@pytest.mark.parametrize("size", [1, 2])
def test_training_has_its_own_size_compiled_in_whatever_was_evaluated_before(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    are_open: list[bool] = []

    def compiler(graph: Any, inputs: list[Any]) -> Any:
        are_open.append(any(isinstance(each, torch.SymInt) for each in inputs))
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    model = tiny_model()
    compile_layers(model, in_groups(decoder_layers(model), size))
    torch._dynamo.reset()
    with torch.no_grad():
        rows = torch.arange(10).expand(3, 10)
        model(input_ids=rows, labels=rows)
    loss_and_gradients(model)
    assert are_open == [False] * 4  # of both sizes a graph of the layers and one of the loss


def test_layers_of_one_graph_cannot_be_called_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    first, second, third = layers = decoder_layers(tiny_model())[:3]
    compile_together(layers)
    arguments = {"position_ids": torch.arange(4)[None], "attention_mask": None}
    output = first(torch.ones(1, 4, 16), **arguments)
    assert second(output, **arguments) is output
    with pytest.raises(AssertionError, match="different position_ids"):
        third(output, **{**arguments, "position_ids": arguments["position_ids"].clone()})
    with pytest.raises(AssertionError, match="different hidden_states"):
        third(output + 1, **arguments)
    assert third(output, **arguments) is output
    with pytest.raises(AssertionError):  # without the first one's call
        second(output, **arguments)


SMALL, LARGE, LARGEST = 7_087_872, 50_358_272, 1_019_446_272  # a layer's parameters of 125m, 1.3b and 66b


@pytest.mark.parametrize(
    ("plugin", "pp", "layer_params", "rows", "wanted"),
    [
        ("low_level_zero", 1, SMALL, 8, 4),
        ("low_level_zero", 1, SMALL, 32, 1),
        ("torch_ddp", 1, LARGE, 1, 4),
        ("torch_ddp", 1, LARGE, 8, 1),
        ("hybrid_parallel", 1, LARGEST, 0, 1),  # the gradients of one take 2 GiB
        ("gemini", 1, SMALL, 8, 1),
        ("hybrid_parallel", 2, LARGE, 8, 5),
        ("hybrid_parallel", 2, LARGEST, 8, 1),
    ],
)
def test_small_layers_share_a_graph_and_those_of_a_pipeline(
    plugin: str, pp: int, layer_params: int, rows: int, wanted: int
) -> None:
    assert layers_per_graph(plugin, pp, layer_params, 2, rows * 1024, updates_between=False) == wanted


def test_the_plan_counts_the_gradients_of_a_graph_where_they_are_not_kept_anyway() -> None:
    request = PlanRequest(model_shape(OPT_SHAPES["125m"]), "low_level_zero", "bf16", 1, 8, 1024, compiled=True)
    graph = 3 * 2 * request.shape.layer_params
    assert _graph_gradients(request) == _graph_gradients(replace(request, world_size=2, batch_size=32)) == 0
    assert _graph_gradients(replace(request, world_size=2)) == graph
    assert _graph_gradients(replace(request, accumulation_steps=2)) == graph
    assert _graph_gradients(replace(request, world_size=2, step_in_backward=True)) == 0
    assert _graph_gradients(replace(request, world_size=2, compiled=False)) == 0


@pytest.mark.parametrize(
    ("flags", "changes", "sizes"),
    [
        ({"plugin": "torch_ddp"}, {}, [4]),
        ({"plugin": "low_level_zero"}, {}, [4]),
        ({"plugin": "low_level_zero", "compile": "off"}, {}, [1] * 4),
        ({"plugin": "low_level_zero", "step_in_backward": "on"}, {}, [1] * 4),
        ({"plugin": "low_level_zero", "offload_optim_frac": 0.5}, {}, [1] * 4),
        ({"plugin": "gemini"}, {}, [1] * 4),
        ({"plugin": "torch_ddp"}, {"layerdrop": 0.1}, [1] * 4),
        ({"plugin": "torch_ddp"}, {"model_type": "another"}, [1] * 4),
        ({"plugin": "hybrid_parallel", "tp": 2}, {}, [4]),
        ({"plugin": "hybrid_parallel", "pp": 2}, {}, [1] * 4),
    ],
)
def test_layers_share_a_graph_where_nothing_goes_on_between_them(
    flags: dict[str, Any], changes: dict[str, Any], sizes: list[int]
) -> None:
    model = tiny_model(**changes)
    args = TrainArgs(**{"compile": "on", "step_in_backward": "off", "offload_optim_frac": 0.0, **flags})
    engine: Any = SimpleNamespace(args=args, is_pipeline=args.pp > 1)
    engine.workload = strategy.workload(model, varying_length=False)
    assert [len(group) for group in strategy.Engine._layer_groups(engine, model)] == sizes


def test_recomputed_layers_do_not_share_a_graph() -> None:
    model = tiny_model()
    decoder_layers(model)[0].gradient_checkpointing = True
    assert [len(group) for group in in_groups(decoder_layers(model), 4)] == [1, 3]
