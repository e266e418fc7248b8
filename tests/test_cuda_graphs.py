"""Layers replayed as CUDA graphs: where they can be, and on GPUs that they train as without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch

from adviser import fitting_flags, oom_advice
from args import ConfigError, TrainArgs, parse_args, problems
from chooser import resolve_auto
from colossal_ext import layer_groups
from conftest import Run
from model import ModelSource, opt_config
from opt_sizes import OPT_SHAPES
from planner import PlanRequest, graph_obstacles, model_shape, replays_graphs, work
from runtime import Runtime
from speed import step_time
from train_clm import print_plan, resolve

SHAPE = model_shape(OPT_SHAPES["125m"])
SMALL = PlanRequest(SHAPE, "low_level_zero", "bf16", 1, 8, 1024, compiled=True, cuda_graphs="on", gpu_gib=80.0)
# Evaluation after each second step, with batches of another size; masks; a norm.
FLAGS = (
    "--block_size 128 --per_device_train_batch_size 4 --num_train_epochs 3 --max_train_steps 6 --per_device_eval_batch_size 3 "
    "--max_eval_samples 7 --dropout 0.1 --max_grad_norm 0.5 --deterministic"
)


@pytest.mark.parametrize(
    ("changes", "obstacles"),
    [
        ({}, []),
        ({"plugin": "torch_ddp", "world_size": 4}, []),
        ({"plugin": "hybrid_parallel"}, []),
        ({"gpu_gib": None}, ["a GPU"]),
        ({"compiled": False}, ["compiled layers"]),
        ({"plugin": "gemini"}, ["another plugin than gemini"]),
        ({"plugin": "hybrid_parallel", "tp": 2, "world_size": 2}, ["no --tp and --pp"]),
        ({"plugin": "hybrid_parallel", "zero_stage": 1}, ["--zero_stage 0 of hybrid_parallel"]),
        ({"checkpointed_layers": 1}, ["no recomputed layers"]),
        ({"accumulation_steps": 2}, ["one micro-batch a step"]),
        ({"step_in_backward": True}, ["states on the GPU, updated after the backward pass"]),
        ({"offload_optim_frac": 0.5}, ["states on the GPU, updated after the backward pass"]),
        ({"shape": replace(SHAPE, num_heads=0)}, ["an OPT model"]),
    ],
)
def test_layers_can_be_replayed_where_nothing_moves_or_happens_between_them(
    changes: dict[str, Any], obstacles: list[str]
) -> None:
    request = replace(SMALL, **changes)
    assert graph_obstacles(request) == obstacles
    assert work(request).cuda_graphs == (not obstacles) and not work(replace(request, cuda_graphs="off")).cuda_graphs


@pytest.mark.parametrize(
    ("changes", "replayed"),
    [
        ({}, True),
        ({"batch_size": 64}, False),
        ({"accumulation_steps": 2}, False),
        ({"gpu_gib": None}, False),
        ({"compiled": False}, False),
        ({"shape": model_shape(OPT_SHAPES["6.7b"])}, False),
        ({"shape": model_shape(OPT_SHAPES["6.7b"]), "cuda_graphs": "on"}, True),
        ({"cuda_graphs": "off"}, False),
    ],
)
def test_auto_replays_small_layers(changes: dict[str, Any], replayed: bool) -> None:
    assert replays_graphs(replace(SMALL, **{"cuda_graphs": "auto", **changes})) == replayed


def test_a_small_batch_waits_less_for_launches_and_a_large_one_never_did() -> None:
    for rows, gains in ((8, True), (64, False)):
        launched, replayed = (
            step_time(work(replace(SMALL, batch_size=rows, cuda_graphs=word))).total for word in ("off", "on")
        )
        assert (replayed < 0.9 * launched) == gains and replayed <= launched


@pytest.mark.parametrize(
    ("flags", "layerdrop", "needs"),
    [
        ({"plugin": "low_level_zero"}, 0.0, "a GPU, compiled layers"),
        ({"plugin": "gemini"}, 0.1, "a GPU, compiled layers, another plugin than gemini, no layerdrop"),
        ({"plugin": "low_level_zero", "cuda_graphs": "off"}, 0.0, ""),
    ],
)
def test_a_setting_without_graphs_is_refused_where_they_were_asked_for(
    flags: dict[str, Any], layerdrop: float, needs: str
) -> None:
    args = TrainArgs(**{"from_scratch": True, "cuda_graphs": "on", "gradient_checkpointing": "off", **flags})
    config = opt_config(OPT_SHAPES["125m"])
    config.layerdrop = layerdrop
    process = Runtime(0, 1, 0, 1, torch.device("cpu"), 0)
    refused = pytest.raises(ConfigError, match=f"--cuda_graphs on: needs {needs};") if needs else nullcontext()
    with refused:
        resolve(args, process, ModelSource("125m", config, None), replace(SHAPE, layerdrop=layerdrop))


def test_auto_becomes_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategy._has_c_compiler", lambda: True)
    monkeypatch.setattr(Runtime, "device_memory_gib", 80.0)
    monkeypatch.setattr(Runtime, "has_bf16", True)
    gpu = Runtime(0, 1, 0, 1, torch.device("cuda"), 1)
    config = opt_config(OPT_SHAPES["125m"])
    small = TrainArgs(model_name_or_path="125m", from_scratch=True, block_size=1024, per_device_train_batch_size=8)

    def resolved(args: TrainArgs, layerdrop: float = 0.0) -> tuple[str, str, bool]:
        config.layerdrop = layerdrop
        choice, used = resolve(args, gpu, ModelSource("125m", config, None), replace(SHAPE, layerdrop=layerdrop))
        return used.compile, used.cuda_graphs, "layers as CUDA graphs" in choice.reason

    assert resolved(small) == ("on", "on", True)
    assert resolved(small, layerdrop=0.1) == ("on", "off", False)
    assert resolved(replace(small, eval_only=True)) == ("on", "off", False)
    assert resolved(replace(small, per_device_train_batch_size=64)) == ("on", "off", False)
    monkeypatch.setattr("strategy._has_c_compiler", lambda: False)
    assert resolved(small) == ("off", "off", False)


def test_a_plan_refuses_what_the_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--plan --gpus 1 --model_name_or_path 125m --cuda_graphs on --plugin"
    assert print_plan(parse_args(f"{flags} gemini".split())) == 2
    assert "needs another plugin than gemini" in capsys.readouterr().err
    assert print_plan(parse_args(f"{flags} torch_ddp".split())) == 0
    assert "torch_ddp, bf16, layers as CUDA graphs" in capsys.readouterr().out
    assert "--eval_only" in "".join(
        problems(TrainArgs(cuda_graphs="on", eval_only=True), world_size=1, num_gpus=1, gpus_per_node=1)
    )


def test_what_auto_takes_under_a_tight_cap_is_refused_where_graphs_were_asked_for() -> None:
    args = TrainArgs(cuda_graphs="on", block_size=1024, per_device_train_batch_size=4)
    shape = model_shape(OPT_SHAPES["1.3b"])
    wide, tight = (resolve_auto(args, shape, 1, gpu_gib, None) for gpu_gib in (40.0, 14.0))
    assert wide.graph_obstacles == () and "layers as CUDA graphs" in wide.reason
    assert tight.fits and tight.graph_obstacles and "CUDA graphs" not in tight.reason
    assert resolve_auto(replace(args, cuda_graphs="off"), shape, 1, 14.0, None).graph_obstacles == ()


def test_advice_leaves_graphs_to_auto_where_it_changes_the_layers() -> None:
    given = TrainArgs(plugin="low_level_zero", cuda_graphs="on", per_device_train_batch_size=8, block_size=1024)
    used = replace(given, precision="bf16", gradient_checkpointing="0", step_in_backward="off", zero_stage=1)
    advice = oom_advice(given, used, num_layers=12, world_size=1)
    assert "--gradient_checkpointing on --cuda_graphs auto" in advice and "--block_size 512" in advice
    for word in ("on", "off"):
        fitting = fitting_flags(replace(given, cuda_graphs=word), used, model_shape(OPT_SHAPES["1.3b"]), 1, 22.0, None)
        assert fitting and ("--cuda_graphs auto" in fitting) == (word == "on")


def test_graphs_are_recorded_where_gradients_are_wanted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def compiled(run: Any, *, dynamic: bool, options: dict[str, Any] | None = None) -> Any:
        def noted(*args: Any, **arguments: Any) -> Any:
            called.append(options)
            return run(*args, **arguments)

        return noted

    monkeypatch.setattr(torch, "compile", compiled)
    layer = torch.nn.Identity()
    layer.forward = lambda hidden_states, **_: hidden_states + 1  # type: ignore[method-assign]
    layer_groups.compile_together([layer], cuda_graphs=True)
    assert layer(torch.ones(1)).item() == 2
    with torch.no_grad():
        assert layer(torch.ones(1)).item() == 2
    assert called == [{"triton.cudagraphs": True}, None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plugin", ["low_level_zero", "torch_ddp", "torch_ddp_fp16", "hybrid_parallel"])
def test_replayed_layers_train_as_launched_ones_and_resume_bit_for_bit(
    plugin: str, tmp_path: Path, run_training: Callable[..., Run]
) -> None:
    world = torch.cuda.device_count()
    flags = [*FLAGS.split(), "--max_train_samples", 8 * world, "--plugin", plugin, "--cuda_graphs"]
    saving = ["on", "--save_strategy", "steps", "--save_steps", 4]
    launched = run_training(tmp_path / "launched", *flags, "off", world=world)
    whole = run_training(tmp_path / "whole", *flags, *saving, world=world, TORCH_LOGS="cudagraphs")
    checkpoint = whole.folder / "checkpoints" / "step-00000004"
    rest = run_training(tmp_path / "rest", *flags, "on", "--resume_from_checkpoint", checkpoint, world=world)
    assert launched.code == whole.code == rest.code == 0, launched.output + whole.output + rest.output
    assert "Recording function" in whole.output and "skipping cudagraphs" not in whole.output
    assert rest.losses == whole.losses[4:]
    assert whole.losses == launched.losses
    assert whole.result["eval"]["loss"] == rest.result["eval"]["loss"] == launched.result["eval"]["loss"]
