from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import strategy
import train_clm
from args import PLUGINS, TrainArgs
from model import build_model, find_model
from planner import framework_bytes
from runtime import RankFailure
from strategy import PLUGIN_TABLE, Engine, resolve_compile, workload


class EngineOfRank(Engine):
    """An engine that is nothing but one of two data-parallel ranks, and its pipeline stage."""

    dp_rank, dp_size, stage = 0, 2, 0  # properties there

    def __init__(self, dp_rank: int, stage: int) -> None:
        self.dp_rank, self.stage = dp_rank, stage


def masks(dp_rank: int, stage: int = 0) -> torch.Tensor:
    EngineOfRank(dp_rank, stage).seed_dropout(42)
    return nn.functional.dropout(torch.ones(64))


def test_dropout_masks_differ_across_data_parallel_ranks_and_stages_and_agree_within_one():
    drawn = [masks(dp_rank, stage) for dp_rank in (0, 1) for stage in (0, 1, 2)]
    assert len({tuple(mask.tolist()) for mask in drawn}) == 6
    assert torch.equal(masks(1, stage=2), masks(1, stage=2))


def test_every_plugin_of_the_command_line_has_a_row():
    assert set(PLUGIN_TABLE) == set(PLUGINS) - {"auto"}


@pytest.mark.parametrize(
    ("changes", "on_cpu", "compiles"),
    [
        ({"plugin": "torch_ddp"}, False, "on"),
        ({"plugin": "torch_ddp"}, True, "off"),
        ({"plugin": "gemini"}, False, "on"),
        ({"plugin": "torch_ddp", "dataset": "netflix"}, False, "off"),
        ({"plugin": "hybrid_parallel", "tp": 2}, False, "on"),
        ({"plugin": "hybrid_parallel", "tp": 2, "pp": 2, "dataset": "netflix"}, False, "off"),
        ({"plugin": "torch_ddp", "compile": "on"}, True, "on"),
        ({"plugin": "torch_ddp", "compile": "off"}, False, "off"),
    ],
)
def test_auto_compiles_on_a_gpu_where_the_plugin_allows_it(changes, on_cpu, compiles, monkeypatch):
    monkeypatch.setattr(strategy.shutil, "which", lambda name: "/usr/bin/cc")
    assert resolve_compile(replace(TrainArgs(), **changes), on_cpu=on_cpu) == compiles


def test_without_a_c_compiler_auto_does_not_compile(monkeypatch):
    monkeypatch.setattr(strategy.shutil, "which", lambda name: None)
    assert resolve_compile(TrainArgs(plugin="torch_ddp"), on_cpu=False) == "off"


def test_the_workload_counts_tied_weights_once_and_names_them_twice():
    model = build_model(find_model(TrainArgs(model_name_or_path="tiny", from_scratch=True)), seed=0)
    facts = workload(model, varying_length=False)
    assert sum(facts.parameter_numels) == 3548672
    assert facts.parameter_shapes["lm_head.weight"] == facts.parameter_shapes["model.decoder.embed_tokens.weight"]


def test_a_rank_that_chose_otherwise_than_rank_0_says_so_before_they_wait_for_each_other(monkeypatch):
    args = TrainArgs(plugin="hybrid_parallel", pp=2, num_microbatches=8, output_dir="run")
    process = SimpleNamespace(rank=1, device=torch.device("cpu"))

    def broadcast(objects, **_):
        if isinstance(objects[0], dict):
            objects[0] = {**objects[0], "num_microbatches": number}

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    number = 8
    train_clm.require_same_choice(args, process)
    assert train_clm.agree_on_folder(args, process) == Path("run")
    number = 4
    with pytest.raises(RankFailure, match="--num_microbatches 8 and not 4"):
        train_clm.require_same_choice(args, process)


def test_a_cap_leaves_tensors_what_the_allocator_sees():
    args = TrainArgs(plugin="hybrid_parallel", tp=2, mem_cap=16)
    assert train_clm.allocator_bytes(args, 4) == 16e9 - framework_bytes("hybrid_parallel", 4, 2, 1) < 13e9
    assert train_clm.allocator_bytes(TrainArgs(), 4) is None
