"""With --deterministic a resumed run repeats the losses of the undisturbed one on GPUs, too (on a CPU: test_checkpoint)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from conftest import Run
from runtime import settle_kernels

# Rows so long that attention's backward pass has several blocks of keys, whose parts of dQ are added up.
LONG = (
    "--deterministic --model_name_or_path 125m --block_size 512 --per_device_train_batch_size 8 --max_train_steps 6 "
    "--logging_steps 1 --eval_strategy no --no-save_final"
)


@pytest.fixture
def kernels_of_before() -> Iterator[None]:
    yield
    settle_kernels(deterministic=False)


def test_the_flag_turns_deterministic_kernels_on_and_off(kernels_of_before, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    settle_kernels(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    settle_kernels(deterministic=True)
    # With warnings alone torch leaves attention as it is.
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plugin", ["torch_ddp", "low_level_zero", "gemini", "hybrid_parallel"])
def test_a_resumed_run_on_gpus_repeats_the_losses_bit_for_bit(
    plugin: str, tmp_path: Path, run_training: Callable[..., Run]
):
    world = torch.cuda.device_count()
    flags = [*LONG.split(), "--plugin", plugin]
    run = run_training(tmp_path / "whole", *flags, "--save_strategy", "steps", "--save_steps", 2, world=world)
    checkpoint = run.folder / "checkpoints" / "step-00000002"
    rest = run_training(tmp_path / "rest", *flags, "--resume_from_checkpoint", checkpoint, world=world)
    assert run.code == rest.code == 0, run.output + rest.output
    assert rest.losses == run.losses[2:]
