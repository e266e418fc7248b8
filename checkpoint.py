"""Export of the trained model to a Hugging Face folder, and text generated from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from args import TrainArgs
from model import ModelSource
from strategy import Engine

MAX_SHARD_GB = 5


def export(engine: Engine, source: ModelSource, tokenizer: Any, folder: Path) -> None:
    """Write the trained model as a Hugging Face folder: safetensors, config, generation config, tokenizer.

    A collective. The plugin gathers its shards into a temporary folder beside `folder`; rank 0 merges them, since
    ColossalAI 0.5.0 writes no config on transformers 5 and trips over tied weights in safetensors.

    Args:
        folder: replaced if it exists; all ranks must see the same file system.
    """
    parts = folder.with_name(f"{folder.name}.parts")
    if engine.runtime.is_main:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
    dist.barrier()
    engine.booster.save_model(engine.model, str(parts), shard=True, size_per_shard=MAX_SHARD_GB * 1024)
    dist.barrier()
    if engine.runtime.is_main:
        _write_folder(_merge(parts), source, tokenizer, folder)
        shutil.rmtree(parts)
    dist.barrier()


def _merge(parts: Path) -> dict[str, Tensor]:
    """Return all tensors of the folder's shards by name, mapped from the files, without running pickled code."""
    index = next(parts.glob("*.index.json"), None)
    if index is None:
        names = sorted(path.name for path in parts.glob("*.bin"))
    else:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= torch.load(parts / name, map_location="cpu", weights_only=True, mmap=True)
    return tensors


def _write_folder(tensors: dict[str, Tensor], source: ModelSource, tokenizer: Any, folder: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    dtype = next(iter(tensors.values())).dtype
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    lost = [name for name in missing if name != "lm_head.weight"]
    assert not lost and not unexpected, f"export: missing {lost}, unexpected {unexpected}"
    model.config.use_cache = True
    model.config.dtype = dtype
    staging = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging, max_shard_size=f"{MAX_SHARD_GB}GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    # The old folder may be the one the run's weights are mapped from: moved aside, its files live on.
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


@torch.no_grad()
def generate(weights: str, tokenizer: Any, args: TrainArgs) -> Iterator[str]:
    """Yield texts sampled from the model of a Hugging Face folder: one for each `--prompt`, then `--num_samples` more.

    The samples start from `</s>` alone. Runs on the CPU, in fp32: a few texts, beside a GPU that may be full.
    """
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    torch.manual_seed(args.seed)
    for prompt in [*args.prompt, *[""] * args.num_samples]:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_p=0.95,
            max_new_tokens=args.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        yield tokenizer.decode(ids[0], skip_special_tokens=True).strip()
