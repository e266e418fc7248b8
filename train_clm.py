"""Train a causal language model with ColossalAI: check, plan, build, train, report."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from args import ConfigError, TrainArgs, parse_args, problems

if TYPE_CHECKING:
    from chooser import Choice
    from model import ModelSource
    from planner import ModelShape
    from recorder import Job, Recorder
    from runtime import Runtime, StopSignal
    from strategy import Engine
    from watchdog import Pulse

WITHOUT_HUB = (
    "the Hugging Face hub cannot be reached, and its cache lacks what this run needs; give local files instead: "
    "--model_name_or_path DIR (or a size with --from_scratch), --tokenizer_name DIR, --train_file FILE"
)

# Heavy packages are imported inside the functions: --help and a bad flag answer at once, and what is imported finds
# its chatter silenced and the hub's reachability settled.


def main() -> None:
    """Run the command line to its exit code."""
    args = parsed()
    if args.plan:
        leave(print_plan(args))
    import runtime

    runtime.run_to_exit(lambda process: run(args, process))


def parsed() -> TrainArgs:
    """Return the settings; a flag that argparse refuses is told by rank 0 alone, and ends the launcher with 2, too."""
    try:
        with nullcontext() if is_first() else redirect_stderr(io.StringIO()):
            return parse_args()
    except SystemExit as end:
        leave(int(end.code or 0))


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def leave(code: int) -> NoReturn:
    """End the process, before there are other ranks to think of.

    The launcher reads the code from a file: of any but 0 torchrun makes 1 and a page of its own traceback.
    """
    code_file = os.environ.get("CLM_EXIT_CODE_FILE")
    if code and code_file and is_first():
        Path(code_file).write_text(str(code), encoding="ascii")
    sys.exit(0 if code_file else code)


def print_plan(args: TrainArgs) -> int:
    """Print what every plugin would take for this command, without torch and without touching a GPU; return 0 or 2."""
    import chooser
    import hardware
    import planner
    import scaling

    if not is_first():
        return 0
    gpus = args.gpus or int(os.environ.get("WORLD_SIZE", 1))
    world_size = gpus * args.nodes
    sizes = [gpu.memory_gib for gpu in hardware.visible_gpus() if gpu.memory_gib]
    gpu_gib = min(sizes, default=args.mem_cap * 1e9 / planner.GIB or (scaling.GPU_GIB if args.gpus else None))
    num_gpus = gpus if gpu_gib else 0
    try:
        if found := problems(args, world_size=world_size, num_gpus=num_gpus, gpus_per_node=num_gpus):
            raise ConfigError(*found)
        shape, dropout = planned_shape(args)
        if found := planner.layout_problems(args, args.model_slug, shape):
            raise ConfigError(*found)
        # Of a machine that is not this one nothing is known.
        host_gib = None if args.gpus else hardware.host_memory_gib()
        where = (args, shape, world_size, gpu_gib, host_gib)
        choice = chooser.resolve_auto(*where, processes_per_host=gpus, dropout=dropout)
        if found := graph_problems(choice):
            raise ConfigError(*found)
    except ConfigError as error:
        print(error.lines, file=sys.stderr)
        return 2
    others = chooser.alternatives(*where, choice=choice, dropout=dropout) if args.nodes == 1 else []
    print(chooser.table(choice, others))
    if gpu_gib and world_size > 1:
        job = scaling.Job(
            shape, args.per_device_train_batch_size, min(args.block_size, shape.max_positions), gpu_gib, dropout
        )
        machines = scaling.Machines(gpus, args.nodes)
        print(f"\nspeed on {machines}: {scaling.ORIGIN}\n{scaling.text_table(scaling.compare(job, machines))}")
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"chosen": asdict(choice), "alternatives": [asdict(other) for other in others]}
        (folder / "plan.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


def planned_shape(args: TrainArgs) -> tuple[ModelShape, bool]:
    """Return the model's numbers, and whether it drops activations out; only a model that is not OPT needs torch."""
    from opt_sizes import OPT_SHAPES
    from planner import model_shape

    if args.model_size:
        shape = OPT_SHAPES[args.model_size]
        return model_shape(shape), (shape.dropout if args.dropout is None else args.dropout) > 0
    import model

    source = model.find_model(args)
    return model.shape_of(source), getattr(source.config, "dropout", 0.0) > 0


def run(args: TrainArgs, process: Runtime) -> int:
    """Do everything from the checks to the report, and return the exit code."""
    import runtime

    runtime.quiet_third_parties(process)
    runtime.check_versions()
    runtime.settle_kernels(deterministic=args.deterministic)
    if args.export:
        return export(args, Path(args.export)) if process.is_main else runtime.EXIT_OK
    args = settle_resume(args)
    job, tokenizer = prepare(args, process)
    runtime.start_process_group(
        process, timeout_s=args.ddp_timeout, allocator_bytes=allocator_bytes(job.args, process.world_size)
    )
    import recorder
    import watchdog

    with watchdog.watching(process, args.hang_timeout) as pulse:
        require_same_choice(job.args, process)
        folder = agree_on_folder(job.args, process)
        with locked(folder, process):
            code = guarded(args, job, recorder.Recorder(job, folder), tokenizer, pulse)
    if code == runtime.EXIT_OK and process.is_main:  # the other ranks need not wait for it
        print_texts(job, folder, tokenizer)
    return code


def allocator_bytes(args: TrainArgs, world_size: int) -> float | None:
    """Return what `--mem_cap` leaves a GPU's tensors beside what the allocator does not see; None without a cap."""
    from planner import framework_bytes

    if not args.mem_cap:
        return None
    return args.mem_cap * 1e9 - framework_bytes(args.plugin, world_size, args.tp, args.pp)


def settle_resume(args: TrainArgs) -> TrainArgs:
    """Return the settings with `--resume_from_checkpoint auto` decided; ranks that torchrun has started again have it.

    Where the run before got to no checkpoint, what it left is written over.
    """
    import runtime

    word = args.resume_from_checkpoint
    if not args.output_dir or args.eval_only or not (word == "auto" or runtime.started_again()):
        return args
    if needs_hub(args):
        runtime.settle_hub()  # before transformers is imported, as checkpoint does
    import checkpoint

    folders = checkpoint.step_folders(Path(args.output_dir) / "checkpoints")
    if args.overwrite_output_dir and runtime.started_again():
        # It may have ended before it removed those of another run.
        folders = [folder for folder in folders if folder.stat().st_mtime >= runtime.start_of_torchrun()]
    if folders:
        return replace(args, resume_from_checkpoint="last")
    if word not in (None, "auto"):
        return args
    return replace(args, resume_from_checkpoint=None, overwrite_output_dir=True)


def prepare(args: TrainArgs, process: Runtime) -> tuple[Job, Any]:
    """Check all settings, find model, tokenizer and data, and resolve what is `auto`. No collective, no weights.

    Returns:
        The job and its tokenizer (None for synthetic tokens).

    Raises:
        ConfigError: with every problem that can be seen at this point.
    """
    import data
    import runtime
    import tracking

    found = problems(
        args, world_size=process.world_size, num_gpus=process.num_gpus, gpus_per_node=process.local_world_size
    )
    found += data.problems(args) + output_problems(args) + tracking.problems(args)
    if found:
        raise ConfigError(*found)
    has_hub = not needs_hub(args) or runtime.settle_hub()
    try:
        return find_everything(args, process)
    except ConfigError as error:
        if has_hub or not any(re.search(r"\bhub\b|to be had", problem) for problem in error.problems):
            raise
        raise ConfigError(*error.problems, WITHOUT_HUB) from None


def find_everything(args: TrainArgs, process: Runtime) -> tuple[Job, Any]:
    """Return the job and its tokenizer, read from local files, the hub or its cache."""
    import checkpoint
    import data
    import model
    import recorder

    source = model.find_model(args)
    tokenizer = model.load_tokenizer(args, source)
    shape = model.shape_of(source)
    choice, args = resolve(args, process, source, shape)
    resume = None
    if args.resume_from_checkpoint:
        resume = checkpoint.find(args.resume_from_checkpoint, Path(args.output_dir or ""))
        if found := checkpoint.resume_problems(resume.manifest, args, process.world_size):
            raise ConfigError(*found)
    rows = data.prepare(
        args,
        tokenizer=tokenizer,
        vocab_size=source.config.vocab_size,
        max_positions=shape.max_positions,
        global_batch_size=args.global_batch_size(process.world_size),
    )
    return recorder.Job(args, process, source, shape, rows, choice, resume), tokenizer


def export(args: TrainArgs, folder: Path) -> int:
    """Write the model of the checkpoint `folder` to `--output_dir`."""
    import checkpoint
    import runtime

    if not args.output_dir:
        raise ConfigError("--export: needs --output_dir, the folder to write")
    target = Path(args.output_dir)
    if target.exists() and not args.overwrite_output_dir:
        raise ConfigError(f"--output_dir {target}: is there; choose another, or add --overwrite_output_dir")
    if in_use := runtime.lock_problem(target):
        raise ConfigError(in_use)
    if target.exists() and not checkpoint.is_export(target):
        raise ConfigError(f"--output_dir {target}: holds more than an exported model, which --export would remove")
    checkpoint.export_checkpoint(folder, target, args.export_dtype)
    runtime.log.info(f"exported {folder} to {args.output_dir}")
    return runtime.EXIT_OK


def needs_hub(args: TrainArgs) -> bool:
    """Return whether model, tokenizer or data are named by a hub id."""
    has_own_model = (args.model_size and args.random_weights) or Path(args.model_name_or_path).is_dir()
    has_own_data = args.dataset == "synthetic" or args.train_file or (args.eval_only and args.validation_file)
    is_tokenized = args.dataset != "synthetic" or args.tokenizer_name
    return (
        not has_own_model
        or not has_own_data
        or bool(is_tokenized and not Path(args.tokenizer_name or args.model_name_or_path).is_dir())
    )


def output_problems(args: TrainArgs) -> list[str]:
    """Return what is wrong with the flags about results."""
    import runtime

    found = []
    folder = Path(args.output_dir) if args.output_dir else None
    if folder and folder.is_file():
        found.append(f"--output_dir {folder}: is a file")
    elif folder and not _can_write(folder):
        found.append(f"--output_dir {folder}: cannot be written; choose another")
    elif folder and (in_use := runtime.lock_problem(folder)):
        found.append(in_use)
    elif folder and _holds_a_run(folder) and not (args.overwrite_output_dir or args.resume_from_checkpoint):
        found.append(f"--output_dir {folder}: already holds a run; choose another, or add --overwrite_output_dir")
    if args.resume_from_checkpoint in ("last", "auto") and not folder:
        found.append(f"--resume_from_checkpoint {args.resume_from_checkpoint}: needs --output_dir, the run's folder")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not folder:
        found.append("MAX_RESTARTS: needs --output_dir, the folder that a restart goes on in")
    if args.resume_from_checkpoint and args.eval_only:
        found.append("--eval_only: evaluates a model folder; use --export on the checkpoint first")
    wants_text = bool(args.prompt or args.num_samples)
    if wants_text and args.dataset == "synthetic" and not args.tokenizer_name:
        found.append("--prompt and --num_samples: need a tokenizer; give --tokenizer_name")
    if wants_text and args.eval_only and args.random_weights:
        found.append("--prompt and --num_samples: random weights have nothing to say; leave --eval_only away")
    if wants_text and not args.save_final and not args.eval_only:
        found.append("--no-save_final: --prompt and --num_samples generate from final/, so keep it")
    return found


def _can_write(folder: Path) -> bool:
    """Return whether files can be made in the folder, or it in the nearest folder above that exists."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("result.json", "metrics.jsonl", "checkpoints", "final"))


def resolve(args: TrainArgs, process: Runtime, source: ModelSource, shape: ModelShape) -> tuple[Choice, TrainArgs]:
    """Return what `auto` became, and the settings with nothing left to choose.

    Raises:
        ConfigError: ranks could not share the model so, with every reason.
    """
    import chooser
    import hardware
    import model
    import planner
    import strategy

    args = replace(args, compile=strategy.resolve_compile(args, on_cpu=process.on_cpu))
    choice = chooser.resolve_auto(
        args,
        shape,
        world_size=process.world_size,
        gpu_gib=process.device_memory_gib,
        host_gib=hardware.host_memory_gib(),
        processes_per_host=process.local_world_size,
        has_bf16=process.has_bf16,
        dropout=getattr(source.config, "dropout", 0.0) > 0,
    )
    default_stage = {"low_level_zero": 1, "hybrid_parallel": 0}.get(choice.plugin)
    args = replace(
        args,
        **chooser.chosen_flags(choice)
        | {
            "precision": choice.precision,
            "step_in_backward": "on" if choice.step_in_backward else "off",
            "zero_stage": default_stage if args.zero_stage is None else args.zero_stage,
            "max_prefetch": choice.max_prefetch,
            "cuda_graphs": "on" if choice.cuda_graphs else "off",
        },
    )
    found = graph_problems(choice) + model.layerdrop_problems(source, process.world_size)
    if found := found + planner.layout_problems(args, source.name, shape):
        raise ConfigError(*found)
    return choice, args


def graph_problems(choice: Choice) -> list[str]:
    """Return that CUDA graphs were asked for and the setting, given or chosen, lacks something for them."""
    if not choice.graph_obstacles:
        return []
    return [f"--cuda_graphs on: needs {', '.join(choice.graph_obstacles)}; give flags that meet this, or leave it away"]


def require_same_choice(args: TrainArgs, process: Runtime) -> None:
    """See that what is `auto` came out on this rank as on rank 0; they would wait for each other. A collective.

    Raises:
        RankFailure: it did not.
    """
    import torch.distributed as dist

    from chooser import AUTO_FLAGS
    from runtime import RankFailure

    flags = (*AUTO_FLAGS, "precision", "compile", "cuda_graphs")
    ours = {flag: getattr(args, flag) for flag in flags}
    choices = [ours]
    dist.broadcast_object_list(choices, src=0, device=process.device)
    theirs = choices[0]
    if ours != theirs:
        other = [f"--{flag} {ours[flag]} and not {theirs[flag]}" for flag in flags if ours[flag] != theirs[flag]]
        raise RankFailure(
            f"chose {', '.join(other)}, as rank 0: its GPU, or its host's memory or C compiler, is another; give the flags"
        )


def agree_on_folder(args: TrainArgs, process: Runtime) -> Path:
    """Return the output folder: the flag, or a name with rank 0's time. A collective."""
    import torch.distributed as dist

    name = args.output_dir or f"outputs/{args.model_slug}-{args.plugin}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [name]
    dist.broadcast_object_list(names, src=0, device=process.device)
    return Path(names[0])


@contextmanager
def locked(folder: Path, process: Runtime) -> Iterator[None]:
    """Keep other runs out of the output folder for as long as the block, or this process, lasts. A collective.

    Raises:
        ConfigError: on every rank: another run has it.
    """
    import torch.distributed as dist

    import runtime

    problem = [""]
    with ExitStack() as stack:
        if process.is_main:
            try:
                stack.enter_context(runtime.folder_lock(folder))
            except ConfigError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=0, device=process.device)
        if problem[0]:
            raise ConfigError(problem[0])
        yield


def guarded(asked: TrainArgs, job: Job, book: Recorder, tokenizer: Any, pulse: Pulse) -> int:
    """Run the job, leave result.json however it ends, and return the exit code.

    Args:
        asked: the flags as the user gave them, for advice.
    """
    import torch

    import report
    import runtime
    import trainer

    stop = runtime.StopSignal()
    try:
        engine, interrupted = train(job, book, stop, tokenizer, pulse)
        if not interrupted and not job.args.eval_only and job.args.save_final:
            export_final(job, engine, book.folder / "final", tokenizer)
    except trainer.NonFiniteLoss as error:
        if job.process.is_main:
            runtime.log.error(f"error: {error}: try a lower --learning_rate")
        book.write("nan")
        return runtime.EXIT_NAN
    except Exception as error:
        if runtime.is_out_of_memory(error):
            book.write("oom", alone=True)
            advice = out_of_memory_advice(asked, job)
            where = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
            head = f"error: out of {where} ({str(error).splitlines()[0]}). Try, in this order:"
            print("\n  ".join([head, *advice]), file=sys.stderr, flush=True)
        elif job.process.is_main:
            with suppress(Exception):  # the disk may be full, or the GPU gone: what ended the run is to be told
                book.write("error", alone=True)
        raise
    result = book.write("interrupted" if interrupted else "ok")
    engine.close()
    for line in report.summary(result):
        runtime.log.info(line)
    return stop.exit_code if interrupted else runtime.EXIT_OK


def out_of_memory_advice(asked: TrainArgs, job: Job) -> list[str]:
    """Return the flags to try next, in order: first, if there are any, those of the fastest setting predicted to fit."""
    import adviser
    import hardware

    process = job.process
    fitting = adviser.fitting_flags(
        asked,
        job.args,
        job.shape,
        process.world_size,
        process.device_memory_gib,
        hardware.host_memory_gib(),
        processes_per_host=process.local_world_size,
        has_bf16=process.has_bf16,
        dropout=getattr(job.source.config, "dropout", 0.0) > 0,
    )
    others = adviser.oom_advice(
        asked, job.args, num_layers=job.shape.num_layers, world_size=process.world_size, on_cpu=process.on_cpu
    )
    return [fitting, *(line for line in others if line != fitting)] if fitting else others


def train(
    job: Job, book: Recorder, stop: StopSignal, tokenizer: Any, pulse: Pulse | None = None
) -> tuple[Engine, bool]:
    """Build everything, then train and evaluate, or with --eval_only just evaluate.

    Returns:
        The engine, and whether a signal ended the training early.
    """
    import checkpoint
    import data
    import model
    import planner
    import strategy
    import trainer

    args, rows = job.args, job.data
    where = planner.weights_place(
        args.plugin, args.precision, job.shape.num_params, job.process.world_size, job.choice.plan.limit_bytes
    )
    module = model.build_model(
        job.source, seed=args.seed, device=job.process.device, place=strategy.placing(where, args, job.process)
    )
    model.recompute_layers(module, int(args.gradient_checkpointing))
    engine = strategy.Engine(args, job.process, strategy.workload(module, varying_length=not args.packs_text))
    train_batches, eval_batches = (
        split and data.loader(split, engine.plugin, **loader_options(job, is_training=split is rows.train))
        for split in (rows.train, rows.validation)
    )

    def evaluate(step: int = 0, ended: str = "") -> None:
        if eval_batches:
            book.on_evaluation(trainer.evaluate(engine, eval_batches), step, ended)

    def save(progress: checkpoint.Progress) -> None:
        folder = book.folder / "checkpoints"
        book.on_checkpoint(checkpoint.save(engine, job.source, tokenizer, progress, folder, keep=args.save_total_limit))

    if not train_batches:
        engine.boost(module, None, None)
        evaluate()
        return engine, False
    schedule = trainer.plan_schedule(len(train_batches), args)
    book.start(schedule.num_steps)
    optimizer = strategy.make_optimizer(
        model.parameter_groups(module, args.weight_decay), args, model.learning_rate(args, job.source)
    )
    scheduler = strategy.make_scheduler(optimizer, args, schedule.num_steps)
    draws_again = where == "cast" and not job.source.pretrained
    engine.boost(
        module,
        optimizer,
        scheduler,
        resumes=job.resume is not None,
        drawn_again=model.DrawnAgain(job.source.config, args.seed, job.process.device) if draws_again else None,
    )
    engine.seed_dropout(args.seed)
    progress = checkpoint.load(engine, job.resume) if job.resume else checkpoint.Progress()
    hooks = trainer.Hooks(
        on_step=book.on_step,
        at_first_loss=lambda loss: model.check_first_loss(loss, job.source),
        evaluate=evaluate,
        save=save,
    )
    loop = trainer.Trainer(engine, stop, hooks, progress, pulse)
    loop.train(train_batches, schedule)
    return engine, loop.interrupted


def loader_options(job: Job, *, is_training: bool) -> dict[str, Any]:
    """Return how a split is cut into batches."""
    args = job.args
    return {
        "batch_size": args.train_batch_size if is_training else args.eval_batch_size,
        "shuffle": is_training,
        "seed": args.seed,
        "pad_token_id": getattr(job.source.config, "pad_token_id", None) or 0,
        "global_batch_size": args.global_batch_size(job.process.world_size) if is_training else None,
        "num_workers": args.dataloader_num_workers,
    }


def export_final(job: Job, engine: Engine, folder: Path, tokenizer: Any) -> None:
    """Write the trained model. A collective."""
    import checkpoint
    import runtime

    checkpoint.export(engine, job.source, tokenizer, folder)
    dtype = checkpoint.export_dtype(job.args.export_dtype, trained_in=job.args.precision)
    runtime.log.info(f"exported {folder}, {dtype} weights")


def print_texts(job: Job, folder: Path, tokenizer: Any) -> None:
    """Print the texts that were asked for, by the model of a run's folder or the one that it evaluated."""
    import checkpoint
    import runtime

    args = job.args
    if not (args.prompt or args.num_samples):
        return
    source = job.source if args.eval_only else replace(job.source, weights=str(folder / "final"))
    for text in checkpoint.generate(source, tokenizer, args):
        runtime.log.info(f"generated: {text}")


if __name__ == "__main__":
    main()
