"""Checkpoints that any plugin and layout can go on from, the export to a Hugging Face folder, and text from one.

A checkpoint is a folder of safetensors with the full fp32 weights and Adam moments by name, the random states of every
rank, and `checkpoint.json`, written last, with everything else and the digest of each file. Nothing in it is pickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from args import ConfigError, TrainArgs
from model import ModelSource, max_positions
from runtime import log, writing
from strategy import Engine

FORMAT = 1
MANIFEST = "checkpoint.json"
FILE_BYTES = 2 * 2**30  # tensors are collected up to this much before they are written: the writer's host memory
EXPORT_SHARD_BYTES = 5 * 10**9
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("weight", "exp_avg", "exp_avg_sq")

# What decides data order, schedule and model: a resumed run must keep it.
FIXED_FLAGS = (
    "model_name_or_path", "tokenizer_name", "dropout", "dataset", "train_file", "validation_file",
    "validation_split_percentage", "text_column", "block_size", "max_train_samples", "learning_rate", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "num_warmup_steps", "warmup_ratio",
    "max_grad_norm", "num_train_epochs", "max_train_steps", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        step: updates done.
        epoch: the current pass over the data, from 0.
        rows: rows of that pass already used, over all ranks.
        tokens: real tokens seen since the start.
    """

    step: int = 0
    epoch: int = 0
    rows: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Found:
    """A whole checkpoint and what it says of itself."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Manifest:
    """The content of checkpoint.json.

    Args:
        global_batch_size: rows of one step.
        adam_step: updates that the moments have seen.
        counters: `Engine.counters`.
        files: name -> {"bytes", "sha256"} of every other file.
    """

    format: int
    progress: Progress
    args: Mapping[str, Any]
    world_size: int
    global_batch_size: int
    adam_step: int
    counters: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]


# ---------------------------------------------------------------------------- saving


def save(
    engine: Engine, source: ModelSource, tokenizer: Any, progress: Progress, folder: Path, *, keep: int | None = None
) -> Path:
    """Write `folder`/step-<n>, whole or not at all, and return it. A collective.

    The files are written under a temporary name and flushed, then the folder is renamed: a kill at any moment leaves
    the checkpoint before, and at most a hidden folder, which the next save removes.

    Args:
        folder: holds the run's checkpoints; all ranks must see the same file system.
        keep: number of newest checkpoints to keep; None: all.

    Raises:
        RankFailure: on the rank that could not write; the half-written folder no longer fills the disk.
    """
    target = folder / f"step-{progress.step:08d}"
    staging = folder / f".{target.name}.tmp"
    with writing(f"checkpoint {target}"), _removed_on_failure(staging, is_main=engine.runtime.is_main):
        if engine.runtime.is_main:
            _remove_left_over(folder)
            staging.mkdir(parents=True)
        dist.barrier()
        _write_tensors(engine, staging)
        random_states = engine.random_states()
        if engine.runtime.is_main:
            _write_file(staging / "random.safetensors", random_states)
            _write_configuration(source, tokenizer, torch.float32, staging)
            _write_manifest(engine, progress, staging)
            _replace(staging, target)
            _prune(folder, keep, newest=target)
    dist.barrier()
    return target


@contextmanager
def _removed_on_failure(folder: Path, *, is_main: bool) -> Iterator[None]:
    """Give a full disk its space back. Rank 0 alone may: it lists the files, so they must not vanish under it."""
    try:
        yield
    except BaseException:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_left_over(folder: Path) -> None:
    """Remove what a kill during an earlier save left in a run's folder of checkpoints."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def _write_tensors(engine: Engine, folder: Path) -> None:
    """Write this pipeline stage's tensors in files of about FILE_BYTES."""
    pending: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        if pending:
            _write_file(folder / f"states-{engine.stage:02d}-{number:04d}.safetensors", pending)
            number += 1
            pending.clear()

    for name, kind, tensor in engine.full_states(KINDS):
        if tensor is not None:
            pending[f"{kind}/{name}"] = tensor
        if sum(each.nbytes for each in pending.values()) > FILE_BYTES:
            flush()
    flush()


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors writes 0600
    _flush(path)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(engine: Engine, progress: Progress, folder: Path) -> None:
    manifest = Manifest(
        format=FORMAT,
        progress=progress,
        args=asdict(engine.args),
        world_size=engine.runtime.world_size,
        global_batch_size=engine.args.global_batch_size(engine.runtime.world_size),
        adam_step=engine.adam_step,
        counters=engine.counters,
        files={path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(folder.iterdir())},
    )
    path = folder / MANIFEST
    path.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    _flush(path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _replace(staging: Path, target: Path) -> None:
    _flush(staging)
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)  # removing it takes long: a kill meanwhile would leave neither
    staging.rename(target)
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _prune(folder: Path, keep: int | None, *, newest: Path) -> None:
    """Keep `newest`, just written, and the `keep` - 1 others of the highest steps."""
    if keep is not None:
        for old in [path for path in step_folders(folder) if path != newest][keep - 1 :]:
            shutil.rmtree(old)


# ---------------------------------------------------------------------------- finding and loading


def step_folders(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def find(word: str, output_dir: Path) -> Found:
    """Return the checkpoint to go on from, verified file by file.

    Args:
        word: a checkpoint folder, or `last`: the newest whole one of `output_dir`.

    Raises:
        ConfigError: none there, or a damaged, half-written or foreign one, with the file named.
    """
    if word != "last":
        return Found(Path(word), verify(Path(word)))
    candidates = step_folders(output_dir / "checkpoints")
    for folder in candidates:
        try:
            return Found(folder, verify(folder))
        except ConfigError as error:
            log.warning(f"skipped a damaged checkpoint: {error}")
    raise ConfigError(f"--resume_from_checkpoint last: no whole checkpoint in {output_dir / 'checkpoints'}")


def verify(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint whose every file has the size and digest it was written with.

    Raises:
        ConfigError: naming the file that is missing, damaged or not ours.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**{**content, "progress": Progress(**content["progress"])})
    except FileNotFoundError:
        raise ConfigError(f"{folder}: has no {MANIFEST}: not a checkpoint, or half-written") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder}: {path} cannot be read ({error})") from None
    if manifest.format != FORMAT:
        raise ConfigError(f"{folder}: format {manifest.format}, this version reads {FORMAT}")
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"] or _digest(file) != expected["sha256"]:
            raise ConfigError(f"{folder}: {file} is missing or damaged")
    return manifest


def resume_problems(manifest: Manifest, args: TrainArgs, world_size: int) -> list[str]:
    """Return what may not differ from the run that wrote the checkpoint, and does."""
    found = [
        f"--{name} {getattr(args, name)}: the checkpoint's run had {manifest.args[name]}; it may not change on resume "
        "(a new run may start from its final/)"
        for name in FIXED_FLAGS
        if _plain(getattr(args, name)) != _plain(manifest.args[name])
    ]
    if args.global_batch_size(world_size) != manifest.global_batch_size:
        found.append(
            f"global batch {args.global_batch_size(world_size)} (--per_device_train_batch_size x "
            f"--gradient_accumulation_steps x GPUs): the checkpoint's run had {manifest.global_batch_size}"
        )
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load(engine: Engine, found: Found) -> Progress:
    """Put the engine where the checkpoint was: weights, moments, schedule, loss scale, random states.

    On another number of GPUs, or with layers or depth divided otherwise, the dropout masks start anew, from the seed and
    the step: ranks that share a layer must drop the same.
    """
    folder, manifest = found.folder, found.manifest
    with Tensors(folder, manifest) as tensors:
        engine.load_states(tensors.read, adam_step=manifest.adam_step)
    engine.restore_counters(manifest.counters)
    layout = engine.runtime.world_size, engine.args.tp, engine.args.pp
    if (manifest.world_size, manifest.args["tp"], manifest.args["pp"]) == layout:
        engine.set_random_states(load_file(folder / "random.safetensors"))
    else:
        engine.seed_dropout(engine.args.seed + manifest.progress.step)
    log.info(f"resumed {folder}: step {manifest.progress.step}, epoch {manifest.progress.epoch + 1}")
    return manifest.progress


class Tensors:
    """The tensors of a checkpoint by name, mapped from its files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._files = [
            safe_open(folder / name, framework="pt").__enter__()
            for name in manifest.files
            if name.startswith("states-")
        ]
        self._places = {key: file for file in self._files for key in file.keys()}

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)

    @property
    def names(self) -> list[str]:
        """Names of all parameters."""
        return [key.removeprefix("weight/") for key in self._places if key.startswith("weight/")]

    def read(self, name: str, kind: str) -> Tensor:
        """Return a full fp32 tensor; the output head, which a later pipeline stage asks for, is the embedding."""
        key = f"{kind}/{name}"
        if key not in self._places and name == "lm_head.weight":
            key = f"{kind}/model.decoder.embed_tokens.weight"
        return self._places[key].get_tensor(key)


# ---------------------------------------------------------------------------- export


def export(engine: Engine, source: ModelSource, tokenizer: Any, folder: Path) -> None:
    """Write the trained model as a Hugging Face folder: safetensors, config, generation config, tokenizer.

    A collective.

    Args:
        folder: replaced if it exists; all ranks must see the same file system.

    Raises:
        RankFailure: on the rank that could not write.
    """
    staging = folder.with_name(f".{folder.name}.tmp")
    dtype = export_dtype(engine.args.export_dtype, trained_in=engine.args.precision)
    weights = ((name, tensor) for name, _, tensor in engine.full_states(("weight",)) if tensor is not None)
    with writing(folder), _removed_on_failure(staging, is_main=engine.runtime.is_main):
        if engine.runtime.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        write_weights(weights, source, dtype, staging, prefix=f"stage-{engine.stage:02d}")
        dist.barrier()
        if engine.runtime.is_main:
            finish_folder(source, tokenizer, dtype, staging)
            _replace(staging, folder)
    dist.barrier()


def export_dtype(asked: str, *, trained_in: str) -> torch.dtype:
    """Return the type of exported weights. `auto` takes 16 bits: the training's own type, bf16 after fp32."""
    sixteen_bits = "bf16" if trained_in == "fp32" else trained_in
    return TORCH_DTYPES[sixteen_bits if asked == "auto" else asked]


def export_checkpoint(checkpoint: Path, folder: Path, asked: str = "auto") -> None:
    """Write the model of a checkpoint as a Hugging Face folder, in one process on the CPU.

    Args:
        asked: type of the weights, as `--export_dtype` says it.

    Raises:
        ConfigError: the checkpoint is damaged or not ours.
        RankFailure: a file could not be written.
    """
    manifest = verify(checkpoint)
    source = ModelSource(checkpoint.name, AutoConfig.from_pretrained(checkpoint), None)
    tokenizer = None
    if (checkpoint / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    dtype = export_dtype(asked, trained_in=manifest.args["precision"])
    staging = folder.with_name(f".{folder.name}.tmp")
    with writing(folder), _removed_on_failure(staging, is_main=True), Tensors(checkpoint, manifest) as tensors:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        weights = ((name, tensors.read(name, "weight")) for name in tensors.names)
        write_weights(weights, source, dtype, staging, prefix="stage-00")
        finish_folder(source, tokenizer, dtype, staging)
        _replace(staging, folder)


def is_export(folder: Path) -> bool:
    """Return whether a folder holds an exported model, or nothing, and neither folders nor a checkpoint's files."""
    files = list(folder.iterdir()) if folder.is_dir() else [folder]
    names = {path.name for path in files if path.is_file()}
    return len(names) == len(files) and MANIFEST not in names and (not names or "config.json" in names)


def write_weights(
    weights: Iterable[tuple[str, Tensor]], source: ModelSource, dtype: torch.dtype, folder: Path, *, prefix: str
) -> None:
    """Write full fp32 tensors as `dtype` in shards of at most 5 GB, named `prefix`-<n> until all are there."""
    pending: dict[str, Tensor] = {}
    number = 0
    is_tied = getattr(source.config, "tie_word_embeddings", False)
    for name, tensor in weights:
        if is_tied and name == "lm_head.weight":  # the embedding, once more
            continue
        tensor = tensor.to(dtype)
        if pending and sum(each.nbytes for each in pending.values()) + tensor.nbytes > EXPORT_SHARD_BYTES:
            _write_file(folder / f"{prefix}-{number:04d}.safetensors", pending)
            number, pending = number + 1, {}
        pending[name] = tensor
    if pending:
        _write_file(folder / f"{prefix}-{number:04d}.safetensors", pending)


def finish_folder(source: ModelSource, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    """Give the shards their Hugging Face names, and add index, configurations and tokenizer."""
    shards = sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        with safe_open(shard, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        total_bytes += shard.stat().st_size
        shard.rename(folder / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_configuration(source, tokenizer, dtype, folder)


def _write_configuration(source: ModelSource, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    config = copy.deepcopy(source.config)
    config.use_cache, config.dtype = True, dtype
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def generate(source: ModelSource, tokenizer: Any, args: TrainArgs) -> Iterator[str]:
    """Yield texts sampled from a trained model: one for each `--prompt`, then `--num_samples` more.

    The samples start from the tokenizer's first token alone, `</s>` of OPT. A text ends with the model's positions, if not
    before; of a prompt that is longer the end counts. Runs on the CPU, in fp32: a few texts, beside a GPU that may be full.
    """
    assert source.weights
    model = AutoModelForCausalLM.from_pretrained(source.weights, cache_dir=source.cache_dir, dtype=torch.float32).eval()
    longest = max_positions(source.config)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    torch.manual_seed(args.seed)
    for prompt in [*args.prompt, *[""] * args.num_samples]:
        prompt_ids = (tokenizer(prompt)["input_ids"] or [first])[1 - longest :]
        inputs = torch.tensor([prompt_ids])
        ids = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            top_p=0.95,
            max_new_tokens=min(args.max_new_tokens, longest - len(prompt_ids)),
            pad_token_id=tokenizer.pad_token_id,
        )
        yield tokenizer.decode(ids[0], skip_special_tokens=True).strip()
