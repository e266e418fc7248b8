"""`--plugin auto` and `--plan`: the fastest setting that is predicted to fit, and the table of the others. No torch import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from args import TrainArgs, microbatch_choices, model_chunks, problems
from planner import (
    GIB,
    ModelShape,
    Plan,
    PlanRequest,
    chunk_numbers,
    chunks_ahead,
    graph_obstacles,
    in_pieces,
    layout_problems,
    layouts,
    plan,
    replays_graphs,
    work,
)
from speed import StepTime, step_time

# Those that lay out hybrid_parallel.
LAYOUT_FLAGS = ("tp", "pp", "pp_schedule", "num_microbatches", "num_model_chunks")
# The flags that `auto` can decide and that advice has to name.
AUTO_FLAGS = (
    "plugin", "gradient_checkpointing", "offload_optim_frac", "offload_param_frac", "step_in_backward",
    "per_device_train_batch_size", "gradient_accumulation_steps", *LAYOUT_FLAGS,
)  # fmt: skip
OFFLOAD_STEPS = tuple(step / 50 for step in range(1, 51))
# What is known less well has to promise more. States go to the host only where all else is expected to take this much
# longer; how far its work hides behind the GPU's is a model's word.
OFFLOAD_HANDICAP = 1.05
# The same for a batch cut into smaller micro-batches: gradients are then summed in their own 16 bits, but for
# torch_ddp, and the time of small micro-batches is an estimate.
SPLIT_HANDICAP = 1.1
# The same for layers or depth divided among GPUs, which hangs on the links, and on a host that is quick to launch. 30b on
# four, the only choice measured that it decides: Gemini with 10 layers recomputed, which was not, is expected to take 1.08
# times as long as the fastest that was.
LAYOUT_HANDICAP = 1.05


@dataclass(frozen=True)
class Choice:
    """What `auto` became.

    Args:
        precision: bf16, fp16 or fp32.
        tp, pp, pp_schedule, num_model_chunks: of hybrid_parallel; the last is 0 but for an interleaved pipeline.
        per_device_train_batch_size, gradient_accumulation_steps: with the product that was asked for.
        num_microbatches: pieces of a pipeline's micro-batch, 0 without a pipeline.
        max_prefetch: chunks that Gemini fetches ahead, `auto` under other plugins.
        cuda_graphs: layers are replayed as such.
        graph_obstacles: what it lacks for the CUDA graphs that were asked for.
        reason: one line: what was chosen and why.
        fits: False where no setting is predicted to fit; the smallest is then chosen.
        step_time: expected, for comparing only (speed.py).
    """

    plugin: str
    precision: str
    checkpointed_layers: int
    offload_optim_frac: float
    offload_param_frac: float
    step_in_backward: bool
    tp: int
    pp: int
    pp_schedule: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_microbatches: int
    num_model_chunks: int
    max_prefetch: str
    cuda_graphs: bool
    graph_obstacles: tuple[str, ...]
    reason: str
    plan: Plan
    step_time: StepTime

    @property
    def fits(self) -> bool:
        return self.plan.fits


def resolve_auto(
    args: TrainArgs,
    shape: ModelShape,
    world_size: int,
    gpu_gib: float | None,
    host_gib: float | None,
    *,
    processes_per_host: int | None = None,
    has_bf16: bool = True,
    dropout: bool = True,
) -> Choice:
    """Return the setting that is expected to be fastest of those predicted to fit; flags that are given stand.

    Open to choice are plugin, recomputed layers, share of states on the host, update in the backward pass, the pieces of
    a pipeline's micro-batch and, with `--plugin auto`, smaller micro-batches of the same global batch and, on the GPUs of
    one machine, tp x pp. Of equally fast settings the simplest is taken. On a CPU without a cap nothing limits the
    "device": torch_ddp without recompute.

    Args:
        gpu_gib: memory of one GPU; None on a CPU.
        host_gib: memory of one machine; None: not looked at.
        processes_per_host: ranks on this machine; off: all of them.
        has_bf16: whether the GPU has bf16 arithmetic.
        dropout: whether the model drops activations out.
    """
    on_host: dict[str, Any] = {
        "host_gib": host_gib,
        "processes_per_host": processes_per_host or world_size,
        "dropout": dropout,
    }
    one_machine = on_host["processes_per_host"] == world_size
    best: _Candidate | None = None
    for micro_batches in _splits(args, gpu_gib):
        for request in _requests(_split(args, micro_batches), shape, world_size, gpu_gib, has_bf16, one_machine):
            full = replace(request, **on_host)
            least = _Candidate.of(full, is_split=micro_batches > 1)  # recompute only adds to its cost
            if best and best.plan.fits and least.cost >= best.cost:
                continue
            for setting in _with_recompute(args, full, least.plan):
                candidate = _Candidate.of(setting, is_split=micro_batches > 1)
                best = min(best or candidate, candidate, key=_Candidate.rank)
    assert best, "there is always a setting"
    return _choice(args, best)


@dataclass(frozen=True)
class _Candidate:
    """A setting that `auto` looks at.

    Args:
        is_split: whether the batch that was asked for is cut into micro-batches.
    """

    request: PlanRequest
    plan: Plan
    step_time: StepTime
    is_split: bool

    @classmethod
    def of(cls, request: PlanRequest, *, is_split: bool) -> _Candidate:
        """Return the setting with its predictions."""
        return cls(request, plan(request), step_time(work(request)), is_split)

    def rank(self) -> tuple[bool, float]:
        """Return what the best has least of: those that fit by their cost, then the others by what they lack."""
        return not self.plan.fits, self.cost if self.plan.fits else self.plan.excess

    @property
    def cost(self) -> float:
        """Seconds of a step, raised by the handicaps."""
        request, cost = self.request, self.step_time.total
        cost *= SPLIT_HANDICAP if self.is_split else 1.0
        cost *= LAYOUT_HANDICAP if request.tp * request.pp > 1 else 1.0
        return cost * (OFFLOAD_HANDICAP if request.offload_optim_frac else 1.0)


def _splits(args: TrainArgs, gpu_gib: float | None) -> list[int]:
    """Return the numbers of micro-batches that the batch of one GPU may be cut into, 1 first."""
    if args.plugin != "auto" or (gpu_gib is None and not args.mem_cap):
        return [1]
    rows = args.per_device_train_batch_size
    return [number for number in range(1, rows + 1) if rows % number == 0]


def _split(args: TrainArgs, micro_batches: int) -> TrainArgs:
    """Return the settings with each micro-batch cut into as many; the rows of a step stay."""
    return replace(
        args,
        per_device_train_batch_size=args.per_device_train_batch_size // micro_batches,
        gradient_accumulation_steps=args.gradient_accumulation_steps * micro_batches,
    )


@dataclass(frozen=True)
class _Setting:
    """What `auto` can choose beside recompute."""

    plugin: str
    offload_optim_frac: float = 0.0
    offload_param_frac: float = 0.0
    step_in_backward: bool = False
    tp: int = 1
    pp: int = 1
    pp_schedule: str = "1f1b"


def _requests(
    args: TrainArgs, shape: ModelShape, world_size: int, gpu_gib: float | None, has_bf16: bool, one_machine: bool
) -> Iterator[PlanRequest]:
    """Yield the settings that the flags leave open, simplest first, without recompute."""
    found = _settings(args, world_size, on_cpu=gpu_gib is None, has_bf16=has_bf16)
    if args.plugin == "auto" and gpu_gib is not None and one_machine:
        found = chain(found, _divided(args, shape, world_size))
    for setting in found:
        named = replace(args, plugin=setting.plugin, tp=setting.tp, pp=setting.pp, pp_schedule=setting.pp_schedule)
        precision = _precision(named, on_cpu=gpu_gib is None, has_bf16=has_bf16)
        zero_stage = args.zero_stage if args.zero_stage is not None else int(setting.plugin == "low_level_zero")
        is_pipeline = setting.plugin == "hybrid_parallel" and setting.pp > 1
        request = PlanRequest(
            shape=shape,
            plugin=setting.plugin,
            precision=precision,
            world_size=world_size,
            batch_size=named.train_batch_size,
            block_size=min(args.block_size, shape.max_positions),
            zero_stage=zero_stage,
            tp=setting.tp,
            pp=setting.pp,
            accumulation_steps=args.gradient_accumulation_steps,
            offload_optim_frac=setting.offload_optim_frac,
            offload_param_frac=setting.offload_param_frac,
            max_prefetch=_named_prefetch(args),
            step_in_backward=setting.step_in_backward,
            compiled=_compiled(named, on_cpu=gpu_gib is None),
            cuda_graphs="off" if args.eval_only else args.cuda_graphs,
            random_weights=args.random_weights,
            gpu_gib=gpu_gib,
            mem_cap_gb=args.mem_cap,
        )
        if not is_pipeline:
            yield request
            continue
        for chunks in _chunk_choices(named, shape):
            yield from in_pieces(replace(request, pp_chunks=chunks), microbatch_choices(named))


def _chunk_choices(args: TrainArgs, shape: ModelShape) -> list[int]:
    """Return the numbers of parts a stage that are open to choice: one alone without interleaving or by the flag."""
    if args.pp_schedule != "interleaved" or args.num_model_chunks:
        return [model_chunks(args)]
    return chunk_numbers(shape, args.pp) or [model_chunks(args)]


def _settings(args: TrainArgs, world_size: int, *, on_cpu: bool, has_bf16: bool) -> Iterator[_Setting]:
    """Yield what the flags leave open; of equally fast settings the first is taken."""
    can_step = can_step_in_backward(args, world_size)
    if args.plugin != "auto":
        on = {"on": True, "off": False, "auto": can_step and args.offload_optim_frac > 0}[args.step_in_backward]
        on = on and args.plugin == "low_level_zero"
        fractions = args.offload_optim_frac, args.offload_param_frac
        yield _Setting(args.plugin, *fractions, on, args.tp, args.pp, args.pp_schedule)
        return
    limited = not on_cpu or args.mem_cap > 0
    lacks_bf16 = args.precision == "auto" and not on_cpu and not has_bf16
    ddp = _Setting("torch_ddp_fp16" if args.precision == "fp16" or lacks_bf16 else "torch_ddp")
    zero = _Setting("low_level_zero")
    if not limited:
        yield ddp
        return
    alone, in_bf16 = world_size == 1, args.precision in ("auto", "bf16") and not lacks_bf16
    yield from (zero, ddp) if alone and in_bf16 and not on_cpu else (ddp, zero)
    can_step = can_step and not lacks_bf16
    yield from (replace(zero, step_in_backward=True),) if can_step else ()
    for fraction in OFFLOAD_STEPS:
        yield _Setting("low_level_zero", fraction, 0.0, can_step)
    if args.precision == "fp32":
        return
    if not alone:
        yield _Setting("gemini")
        for fraction in OFFLOAD_STEPS:
            yield _Setting("gemini", fraction)
    yield _Setting("gemini", 1.0, 1.0)


def _divided(args: TrainArgs, shape: ModelShape, world_size: int) -> Iterator[_Setting]:
    """Yield the ways to divide layers and depth among the GPUs of one machine.

    Left out is what nobody has measured: fp32, and padded rows, whose layers are not compiled. A pipeline evaluates with
    its training batch.
    """
    same_batch = args.per_device_eval_batch_size in (None, args.per_device_train_batch_size)
    if args.precision == "fp32" or not args.packs_text:
        return
    for tp, pp in layouts(shape, world_size, world_size):
        if tp * pp > 1 and (same_batch or pp == 1):
            setting = _Setting("hybrid_parallel", tp=tp, pp=pp)
            yield setting
            if pp > 1 and chunk_numbers(shape, pp):
                yield replace(setting, pp_schedule="interleaved")


def can_step_in_backward(args: TrainArgs, world_size: int) -> bool:
    """Return whether low_level_zero may update weights in the backward pass: nothing needs all gradients first."""
    if world_size > 1 and args.zero_stage == 2 and args.gradient_accumulation_steps > 1:
        return False  # the gradients are divided before the last micro-batch
    return not args.max_grad_norm and args.precision != "fp16" and args.step_in_backward != "off"


def _precision(args: TrainArgs, *, on_cpu: bool, has_bf16: bool) -> str:
    if args.precision != "auto":
        return args.precision
    if args.plugin == "torch_ddp_fp16":
        return "fp16"
    if on_cpu:
        needs_half = args.plugin == "gemini" or (args.plugin == "hybrid_parallel" and args.zero_stage)
        return "bf16" if needs_half else "fp32"
    without_bf16 = "fp32" if args.plugin == "torch_ddp" else "fp16"
    return "bf16" if has_bf16 else without_bf16


def _compiled(args: TrainArgs, *, on_cpu: bool) -> bool:
    return args.packs_text and (args.compile == "on" or (args.compile == "auto" and not on_cpu))


def _named_prefetch(args: TrainArgs) -> int | None:
    """Return what the flags say of `chunks_ahead`; None: nothing."""
    if args.placement == "auto":
        return 0
    return None if args.max_prefetch == "auto" else int(args.max_prefetch)


def _with_recompute(args: TrainArgs, request: PlanRequest, predicted: Plan) -> Iterator[PlanRequest]:
    """Yield the request with the layers that the flag says; for auto with none, or else with the fewest that fit.

    Args:
        predicted: the request's plan.
    """
    num_layers = request.shape.num_layers
    if args.gradient_checkpointing != "auto":
        yield replace(request, checkpointed_layers=fixed_layers(args.gradient_checkpointing, num_layers))
        return
    everything = replace(request, checkpointed_layers=num_layers)
    if request.limit_bytes is None or predicted.fits:
        yield request
    elif not plan(everything).fits:
        yield min(request, everything, key=lambda each: plan(each).excess)
    else:
        yield replace(request, checkpointed_layers=_fewest_layers(request))


def _fewest_layers(request: PlanRequest) -> int:
    """Return the fewest recomputed layers that fit, where none is too few and all are enough."""
    few, many = 0, request.shape.num_layers
    while many - few > 1:
        layers = (few + many) // 2
        few, many = (few, layers) if plan(replace(request, checkpointed_layers=layers)).fits else (layers, many)
    return many


def fixed_layers(gradient_checkpointing: str, num_layers: int) -> int:
    """Return the layers that `on`, `off` or a number means; `auto` counts as off."""
    words = {"on": num_layers, "off": 0, "auto": 0}
    layers = words[gradient_checkpointing] if gradient_checkpointing in words else int(gradient_checkpointing)
    return min(layers, num_layers)


def _choice(args: TrainArgs, chosen: _Candidate) -> Choice:
    request = chosen.request
    what = [request.plugin, request.precision]
    if request.offload_optim_frac:
        what.append(f"{request.offload_optim_frac:.0%} of optimizer states on the host")
    if request.offload_param_frac:
        what.append(f"{request.offload_param_frac:.0%} of parameters on the host")
    if ahead := chunks_ahead(request):
        what.append(f"{ahead} chunks fetched ahead")
    if request.step_in_backward:
        what.append("updated in the backward pass")
    if replays_graphs(request):
        what.append("layers as CUDA graphs")
    what += [f"{axis} {size}" for axis, size in (("tp", request.tp), ("pp", request.pp)) if size > 1]
    if request.pp_chunks > 1:
        what.append(f"interleaved in {request.pp_chunks} parts a stage")
    if request.num_microbatches > 1:
        what.append(f"cut into {request.num_microbatches} pieces")
    what.append(_recompute_text(request))
    rows = request.batch_size // (request.tp * request.pp)
    if chosen.is_split:
        what.append(f"batch cut into {args.per_device_train_batch_size // rows} micro-batches of {rows}")
    kind = "the fastest predicted to fit" if args.plugin == "auto" else "as asked"
    if not chosen.plan.fits:
        where = " or ".join(f"the {each}" for each in chosen.plan.exceeded)
        kind = f"predicted NOT to fit {where}, as nothing else that was tried"
    return Choice(
        plugin=request.plugin,
        precision=request.precision,
        checkpointed_layers=request.checkpointed_layers,
        offload_optim_frac=request.offload_optim_frac,
        offload_param_frac=request.offload_param_frac,
        step_in_backward=request.step_in_backward,
        tp=request.tp,
        pp=request.pp,
        pp_schedule="interleaved" if request.pp_chunks > 1 else "1f1b",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=request.accumulation_steps,
        num_microbatches=request.num_microbatches if request.pp > 1 else 0,
        num_model_chunks=request.pp_chunks if request.pp_chunks > 1 else 0,
        max_prefetch=f"{ahead}" if request.plugin == "gemini" else "auto",
        cuda_graphs=replays_graphs(request),
        graph_obstacles=tuple(graph_obstacles(request)) if request.cuda_graphs == "on" else (),
        reason=f"{', '.join(what)}: {kind}; {chosen.plan.describe()}",
        plan=chosen.plan,
        step_time=chosen.step_time,
    )


def _recompute_text(request: PlanRequest) -> str:
    if not request.checkpointed_layers:
        return "no recompute"
    return f"{request.checkpointed_layers} of {request.shape.num_layers} layers recomputed"


def chosen_flags(choice: Choice) -> dict[str, Any]:
    """Return the flags that make a run of this choice."""
    flags = {name: getattr(choice, name) for name in AUTO_FLAGS if hasattr(choice, name)}
    step = "on" if choice.step_in_backward else "off"
    flags["step_in_backward"] = step if choice.plugin == "low_level_zero" else "auto"
    return {**flags, "gradient_checkpointing": str(choice.checkpointed_layers)}


def flag_text(changes: dict[str, Any]) -> str:
    """Return changed settings as they are typed."""
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in changes.items()}
    return " ".join(f"--{name} {value}" for name, value in values.items())


# ---------------------------------------------------------------------------- the whole table

# The main settings of every plugin; those that a run cannot have (number of GPUs, other flags) are left out.
MAIN_SETTINGS: tuple[dict[str, Any], ...] = (
    {"plugin": "torch_ddp"},
    {"plugin": "torch_ddp_fp16"},
    {"plugin": "low_level_zero"},
    {"plugin": "low_level_zero", "zero_stage": 2},
    {"plugin": "low_level_zero", "step_in_backward": "on"},
    {"plugin": "low_level_zero", "offload_optim_frac": 0.5},
    {"plugin": "low_level_zero", "offload_optim_frac": 1.0},
    {"plugin": "gemini"},
    {"plugin": "gemini", "offload_optim_frac": 0.5},
    {"plugin": "gemini", "offload_optim_frac": 1.0},
    {"plugin": "gemini", "offload_optim_frac": 1.0, "offload_param_frac": 1.0},
    {"plugin": "hybrid_parallel", "zero_stage": 1},
    {"plugin": "hybrid_parallel", "tp": 2},
    {"plugin": "hybrid_parallel", "pp": 2},
    {"plugin": "hybrid_parallel", "tp": 2, "pp": 2},
    {"plugin": "hybrid_parallel", "tp": 2, "pp": 2, "pp_schedule": "interleaved"},
)


@dataclass(frozen=True)
class Alternative:
    """A line of the plan's table.

    Args:
        flags: what to add to the command for it.
        relative_speed: expected, over that of the choice.
        why: what stops it, or what its time is expected to go into.
    """

    flags: str
    plan: Plan
    relative_speed: float
    why: str


def alternatives(
    args: TrainArgs,
    shape: ModelShape,
    world_size: int,
    gpu_gib: float | None,
    host_gib: float | None,
    *,
    choice: Choice,
    dropout: bool = True,
) -> list[Alternative]:
    """Return every plugin's main settings, each without and with recompute, for the batch and length of `args`.

    Args:
        choice: what `auto` takes, to which speeds are compared.
    """
    num_gpus, found = 0 if gpu_gib is None else world_size, []
    for changes in MAIN_SETTINGS:
        if changes.get("zero_stage") == 2 and (world_size == 1 or args.gradient_accumulation_steps == 1):
            continue  # the same as stage 1
        for recompute in ("off", "on"):
            changed = {**changes, "gradient_checkpointing": recompute}
            setting = replace(args, **changed)
            refused = problems(setting, world_size=world_size, num_gpus=num_gpus, gpus_per_node=num_gpus)
            if refused or layout_problems(setting, "", shape):
                continue
            other = resolve_auto(setting, shape, world_size, gpu_gib, host_gib, dropout=dropout)
            speed = choice.step_time.total / other.step_time.total
            found.append(Alternative(flag_text(changed), other.plan, speed, _why(other)))
    return found


def _why(choice: Choice) -> str:
    over = [f"{share:.0%} of the {where}'s memory" for where, share in choice.plan.exceeded.items()]
    return " and ".join(over) or choice.step_time.describe()


def table(choice: Choice, others: list[Alternative]) -> str:
    """Return the choice and the alternatives as text: GiB of one device by category, and of the host; speed and why."""
    chosen = f"chosen: {choice.reason}"
    if not others:
        return chosen
    names = {
        "parameters": "param", "gradients": "grad", "master_weights": "master", "optimizer_moments": "moments",
        "activations": "activ", "logits": "logits", "communication_buffers": "comm", "framework": "frame",
    }  # fmt: skip
    lines = ["  ".join([*(f"{short:>7}" for short in names.values()), "  total", "   host", "fits", "speed", "flags"])]
    for other in others:
        parts = asdict(other.plan.device_bytes)
        numbers = [*(parts[name] for name in names), other.plan.total_bytes, other.plan.host_bytes]
        cells = [f"{value / GIB:7.2f}" for value in numbers]
        fits, speed = " yes" if other.plan.fits else "  no", f"{other.relative_speed:5.2f}"
        lines.append("  ".join([*cells, fits, speed, f"{other.flags} ({other.why})"]))
    limits = [
        f"{what} {limit / GIB:.1f} GiB"
        for what, limit in (("device", choice.plan.limit_bytes), ("host", choice.plan.host_limit_bytes))
        if limit
    ]
    head = (
        "GiB a device at the moment that needs most, and of the host; speed as expected, over that of the choice; "
        f"limits: {', '.join(limits) or 'none'}"
    )
    return "\n".join([head, *lines, chosen])
