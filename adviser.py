"""Out of memory: the flags to try next. No torch import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from args import TrainArgs, microbatch_choices, pipeline_microbatches, problems
from chooser import (
    AUTO_FLAGS,
    LAYOUT_FLAGS,
    can_step_in_backward,
    chosen_flags,
    fixed_layers,
    flag_text,
    resolve_auto,
)
from planner import GIB, ModelShape

# What else a plugin may have been given, and another one would refuse; `off` it would not.
OTHER_FLAGS = ("placement", "cuda_graphs", "max_prefetch")
# Where memory ran out, advice leaves this much more of it free than a plan does.
OOM_ROOM = 0.9


def oom_advice(
    given: TrainArgs, used: TrainArgs, *, num_layers: int, world_size: int, on_cpu: bool = False
) -> list[str]:
    """Return the flags to try next after running out of memory, cheapest first, each to be added to the command.

    What is in force already, and what the command's other flags would refuse, is left out.

    Args:
        given: the flags as the user gave them.
        used: the same without `auto`: what ran.
        world_size: processes of the whole run.
    """
    # What `auto` chose stands in every line, since it would choose again.
    chosen = {name: getattr(used, name) for name in AUTO_FLAGS if getattr(used, name) != getattr(given, name)}
    for name, nothing in (("gradient_checkpointing", "0"), ("step_in_backward", "off")):
        if chosen.get(name) == nothing:
            del chosen[name]
    if given.gradient_checkpointing != "auto":  # a word that became a number
        chosen.pop("gradient_checkpointing", None)
    ran = replace(given, **chosen)
    num_gpus = 0 if on_cpu else world_size
    advice = []
    for changes in _cheaper_settings(ran, given, num_layers, world_size):
        changed = replace(ran, **changes)
        refused = problems(changed, world_size=world_size, num_gpus=num_gpus, gpus_per_node=num_gpus)
        if changed != ran and not refused:
            # Of these only shorter rows leave layers as they were.
            recorded = {"cuda_graphs": "auto"} if given.cuda_graphs == "on" and "block_size" not in changes else {}
            flags = {**chosen, **changes, **recorded}
            advice.append(flag_text({name: flags[name] for name in flags if flags[name] != getattr(given, name)}))
    if given.mem_cap:
        advice.append(f"a higher --mem_cap than {given.mem_cap:g} GB")
    return [*advice, "a smaller --model_name_or_path, or more GPUs"]


def fitting_flags(
    given: TrainArgs,
    used: TrainArgs,
    shape: ModelShape,
    world_size: int,
    gpu_gib: float | None,
    host_gib: float | None,
    **options: Any,
) -> str | None:
    """Return the flags, to be added to the command, of the fastest setting that is predicted to fit with room to spare.

    Args:
        given: the flags as the user gave them; what they say of precision, compilation and the model stands.
        used: the same without `auto`: what ran out of memory.
        options: `resolve_auto`'s.

    Returns:
        None where nothing is predicted to fit without taking more than what ran, nothing limits a device, or another
        flag stands in the way.
    """
    limits = [gpu_gib * GIB / 1e9 if gpu_gib else 0.0, given.mem_cap]
    limit_gb = min((limit for limit in limits if limit), default=0.0)
    names = [*AUTO_FLAGS, *(name for name in OTHER_FLAGS if getattr(given, name) != "off")]
    free = {spec.name: spec.default for spec in fields(TrainArgs) if spec.name in names}
    rows = {name: getattr(given, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    asked = replace(given, **{**free, **rows, "mem_cap": OOM_ROOM * limit_gb})
    choice = resolve_auto(asked, shape, world_size, gpu_gib, host_gib, **options)
    ran = resolve_auto(used, shape, world_size, gpu_gib, host_gib, **options)
    if not limit_gb or not choice.fits or choice.plan.total_bytes > ran.plan.total_bytes:
        return None
    changed = replace(asked, mem_cap=given.mem_cap, **chosen_flags(choice))
    changes = {name: getattr(changed, name) for name in free if getattr(changed, name) != getattr(given, name)}
    num_gpus = 0 if gpu_gib is None else world_size
    refused = problems(changed, world_size=world_size, num_gpus=num_gpus, gpus_per_node=num_gpus)
    resolved = replace(changed, step_in_backward="on" if choice.step_in_backward else "off")
    is_used = all(getattr(resolved, name) == getattr(used, name) for name in AUTO_FLAGS)
    return None if refused or is_used else flag_text(changes)


def _cheaper_settings(args: TrainArgs, given: TrainArgs, num_layers: int, world_size: int) -> Iterator[dict[str, Any]]:
    """Yield changed settings that need less memory, in order of what they cost.

    Args:
        args: what ran.
        given: the flags as the user gave them.
    """
    plugin, replicas = args.plugin, world_size // args.replica_size
    if args.precision == "fp32":
        yield {"precision": "bf16"}
    if args.pp > 1:
        numbers = microbatch_choices(replace(args, num_microbatches=0))
        if more := [number for number in numbers if number > pipeline_microbatches(args)]:
            yield {"num_microbatches": more[0]}
    if fixed_layers(args.gradient_checkpointing, num_layers) < num_layers:
        yield {"gradient_checkpointing": "on"}
    divisor = _smallest_divisor(args.per_device_train_batch_size)
    if divisor > 1:
        smaller: dict[str, Any] = {
            "per_device_train_batch_size": args.per_device_train_batch_size // divisor,
            "gradient_accumulation_steps": args.gradient_accumulation_steps * divisor,
        }
        keeps_pieces = replace(args, **smaller).train_batch_size % max(args.num_microbatches, 1) == 0
        yield smaller if keeps_pieces else {**smaller, "num_microbatches": given.num_microbatches}
    if plugin.startswith("torch_ddp"):
        yield {"plugin": "low_level_zero", **_half(args)}
    if plugin == "hybrid_parallel" and replicas > 1:
        yield {"zero_stage": 1, **_half(args)}
    if plugin == "low_level_zero" and replicas > 1 and args.gradient_accumulation_steps > 1:
        yield {"zero_stage": 2}
    alone = plugin.startswith("torch_ddp") and world_size == 1
    zero = {"plugin": "low_level_zero", **_half(args)} if alone else {}
    if zero or plugin == "low_level_zero":
        if can_step_in_backward(args, world_size):
            yield {**zero, "step_in_backward": "on"}
        yield {**zero, "offload_optim_frac": 1.0}
    yield from _gemini_settings(args, given)
    if args.block_size >= 256:
        yield {"block_size": args.block_size // 2}


def _gemini_settings(args: TrainArgs, given: TrainArgs) -> Iterator[dict[str, Any]]:
    if given.plugin == "hybrid_parallel":
        return
    layout = {name: getattr(given, name) for name in LAYOUT_FLAGS}
    gemini = {} if args.plugin == "gemini" else {"plugin": "gemini", **_half(args), **layout}
    yield gemini
    if args.offload_optim_frac < 1 or gemini:
        yield {**gemini, "offload_optim_frac": 1.0}
    yield {**gemini, "offload_optim_frac": 1.0, "offload_param_frac": 1.0}


def _half(args: TrainArgs) -> dict[str, Any]:
    """Return the precision flag that a plugin with master weights needs where the given one would be refused."""
    return {"precision": "bf16"} if args.precision == "fp32" else {}


def _smallest_divisor(number: int) -> int:
    """Return the smallest divisor above 1, or 1 for 1."""
    return next((divisor for divisor in range(2, number + 1) if number % divisor == 0), 1)
