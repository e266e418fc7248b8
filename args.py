"""Command line -> one frozen `TrainArgs`. No torch import: `--help` and a bad flag answer at once."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NoReturn

from opt_sizes import OPT_SHAPES, size_name

PLUGINS = ("auto", "torch_ddp", "torch_ddp_fp16", "low_level_zero", "gemini", "hybrid_parallel")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


class ConfigError(ValueError):
    """A setting that cannot work. Printed once, by rank 0, without a traceback; the run exits with 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    @property
    def lines(self) -> str:
        """The problems as a user reads them, one a line."""
        return "\n".join(f"error: {problem}" for problem in self.problems)


def flag(group: str, default: Any, help: str, **options: Any) -> Any:
    """Return a dataclass field that is also a command-line flag (`options` go to argparse)."""
    return field(default=default, metadata={"group": group, "help": help, **options})


@dataclass(frozen=True)
class TrainArgs:
    """Every setting of a run. The flag of a field is `--<field name>`; nothing changes one after parsing."""

    # fmt: off
    model_name_or_path: str = flag("model", "125m", f"one of {' '.join(OPT_SHAPES)} (6.7 means 6.7b), a local folder, or a hub id")
    tokenizer_name: str | None = flag("model", None, "folder or hub id of the tokenizer; off: the model's own (a size word: facebook/opt-<size>)")
    from_scratch: bool = flag("model", False, "random weights instead of pretrained ones")
    dropout: float | None = flag("model", None, "dropout probability, 0 to 1; off: the model config's value", type=float)
    cache_dir: str | None = flag("model", None, "folder for downloaded models and prepared data; off: the Hugging Face cache")

    dataset: str = flag("data", "wikitext", "wikitext: packed text; netflix: one description a row; synthetic: random tokens", choices=("wikitext", "netflix", "synthetic"))
    train_file: str | None = flag("data", None, "local .txt .raw .tokens .csv .json .jsonl .parquet instead of the hub's data")
    validation_file: str | None = flag("data", None, "the same for evaluation; off: a part of the training data")
    validation_split_percentage: float = flag("data", 5.0, "percent of the training data held out where there is no validation data; 0: no evaluation", type=float)
    text_column: str | None = flag("data", None, "column that holds the text; off: description for netflix, else text")
    block_size: int = flag("data", 1024, "tokens a row at most; cut to what the model can address", type=int)
    max_train_samples: int | None = flag("data", None, "use only the first N training rows; off: all", type=int)
    max_eval_samples: int | None = flag("data", None, "use only the first N evaluation rows; off: all", type=int)
    dataloader_num_workers: int = flag("data", 0, "loader processes a rank; 0: load in the training process", type=int)

    per_device_train_batch_size: int = flag("training", 16, "rows of one micro-batch for each GPU, whatever the plugin: a replica of tp x pp GPUs takes tp x pp times as many", type=int)
    per_device_eval_batch_size: int | None = flag("training", None, "the same in evaluation; off: as in training", type=int)
    gradient_accumulation_steps: int = flag("training", 1, "micro-batches a step", type=int)
    learning_rate: float | None = flag("training", None, "peak learning rate; off: 5e-5 for pretrained weights, the OPT paper's for random ones", type=float)
    weight_decay: float = flag("training", 0.01, "decoupled weight decay of all matrices; biases and LayerNorm have none; 0: off", type=float)
    adam_beta1: float = flag("training", 0.9, "decay of Adam's first moment", type=float)
    adam_beta2: float = flag("training", 0.999, "decay of Adam's second moment", type=float)
    adam_epsilon: float = flag("training", 1e-8, "Adam's epsilon", type=float)
    lr_scheduler_type: str = flag("training", "linear", "learning-rate schedule, as in transformers.get_scheduler", choices=SCHEDULES)
    num_warmup_steps: int = flag("training", 0, "steps of linear warm-up; 0: off", type=int)
    warmup_ratio: float = flag("training", 0.0, "warm-up as a share of all steps; 0: off", type=float)
    max_grad_norm: float = flag("training", 0.0, "clip the global gradient norm to this; 0: off", type=float)
    num_train_epochs: int = flag("training", 1, "passes over the training data", type=int)
    max_train_steps: int | None = flag("training", None, "stop after this many steps, overrides epochs; off: epochs decide", type=int)
    logging_steps: int = flag("training", 10, "steps between two log lines, at which several ranks are also compared for a slow one", type=int)
    eval_strategy: str = flag("training", "epoch", "evaluate after each epoch and at the end (epoch), only at the end and as --eval_steps says (steps), or never (no)", choices=("epoch", "steps", "no"))
    eval_steps: int = flag("training", 0, "steps between two evaluations, unless --eval_strategy no; 0: off; none is made at a step that a signal ends", type=int)
    seed: int = flag("training", 42, "seed of weights, dropout and data order", type=int)
    deterministic: bool = flag("training", False, "ask for GPU kernels that repeat every bit, as a CPU does; attention may be slower")

    plugin: str = flag("parallelism", "auto", "ColossalAI strategy; auto: the fastest that is predicted to fit", choices=PLUGINS)
    precision: str = flag("parallelism", "auto", "arithmetic; auto: bf16 on a GPU, fp32 on a CPU where the plugin has it", choices=("auto", "bf16", "fp16", "fp32"))
    gradient_checkpointing: str = flag("parallelism", "auto", "recompute activations: on, off, N (the first N layers), auto: where memory needs it", metavar="{auto,on,off,N}")
    compile: str = flag("parallelism", "auto", "torch.compile; auto: on a GPU, where rows have one length", choices=("auto", "on", "off"))
    cuda_graphs: str = flag("parallelism", "auto", "record the kernels of compiled layers and replay them at once: on, or refused; off; auto: of small layers, whose launches take as long as they do, where that is possible", choices=("auto", "on", "off"))
    mem_cap: float = flag("parallelism", 0.0, "memory cap of each GPU in GB (10^9 bytes); 0: none", type=float)
    zero_stage: int | None = flag("parallelism", None, "ZeRO stage: 1, 2 (low_level_zero; off: 1; 2 matters to gradients that accumulate) or 0, 1, 2 (hybrid_parallel; off: 0)", type=int, choices=(0, 1, 2))
    tp: int = flag("parallelism", 1, "hybrid_parallel: GPUs that share each layer", type=int)
    pp: int = flag("parallelism", 1, "hybrid_parallel: pipeline stages", type=int)
    num_microbatches: int = flag("parallelism", 0, "hybrid_parallel: pieces the pipeline cuts a replica's micro-batch into; 0: the fastest, by expectation, of 1 to 4 a stage", type=int)
    pp_schedule: str = flag("parallelism", "1f1b", "hybrid_parallel: pipeline schedule", choices=("1f1b", "interleaved"))
    num_model_chunks: int = flag("parallelism", 0, "hybrid_parallel, interleaved: parts of the model on each stage, 2 or more; 0: the fastest, by expectation, of two layers or more", type=int)
    placement: str = flag("parallelism", "static", "gemini: static fractions, or auto placement by memory use (GPU only)", choices=("static", "auto"))
    offload_optim_frac: float = flag("parallelism", 0.0, "low_level_zero and gemini: share of optimizer states kept on the host, 0 to 1", type=float)
    offload_param_frac: float = flag("parallelism", 0.0, "gemini: share of parameters kept on the host; needs --offload_optim_frac 1", type=float)
    max_prefetch: str = flag("parallelism", "auto", "gemini: chunks that are fetched before the layer that needs them; 0: none; auto: those of a layer and one more on several ranks, none on one or with --placement auto", metavar="{auto,N}")
    step_in_backward: str = flag("parallelism", "auto", "low_level_zero: update each parameter as soon as its gradient is there; needs bf16 or fp32 and no clipping; auto: with optimizer states on the host", choices=("auto", "on", "off"))
    ddp_timeout: int = flag("parallelism", 1800, "seconds a collective may wait for another rank", type=int)
    hang_timeout: float = flag("parallelism", 300.0, "seconds without a sign of life until a rank is reported as hung, with stacks, and the run ends; the same for a step after the first that does not get on, but at least three times its longest phase so far; 0: off", type=float)
    allow_cpu_fp16: bool = flag("parallelism", False, "rehearse fp16 on a CPU (slow; for tests)")

    output_dir: str | None = flag("output", None, "folder for results; off: outputs/<model>-<plugin>-<time>")
    overwrite_output_dir: bool = flag("output", False, "allow an output folder that already holds a run; its checkpoints and numbers are removed")
    save_strategy: str = flag("output", "epoch", "checkpoints: at the end of each epoch (epoch), only as --save_steps and signals say (steps), or never (no)", choices=("epoch", "steps", "no"))
    save_steps: int = flag("output", 0, "steps between two checkpoints, unless --save_strategy no; 0: off", type=int)
    save_total_limit: int | None = flag("output", None, "newest checkpoints to keep; off: all", type=int)
    resume_from_checkpoint: str | None = flag("output", None, "go on from this checkpoint folder, or `last`: the newest whole one in --output_dir, or `auto`: the same if there is one, else start anew; off: start anew", metavar="{DIR,last,auto}")
    export: str | None = flag("output", None, "only write the model of this checkpoint to --output_dir as a Hugging Face folder; off: train", metavar="CHECKPOINT")
    save_final: bool = flag("output", True, "write final/, a Hugging Face folder with the trained model", negatable=True)
    export_dtype: str = flag("output", "auto", "type of the weights in final/ and in what --export writes; auto: 16 bits, the run's own type, bf16 after an fp32 run", choices=("auto", "bf16", "fp16", "fp32"))
    report_to: str = flag("output", "none", "also give the logged numbers to TensorBoard (in the output folder) or Weights & Biases; its package must be installed", choices=("none", "tensorboard", "wandb"))
    plan: bool = flag("output", False, "only print what auto takes and, on one machine, the predicted memory of every plugin's main settings; touches no GPU; without one, --mem_cap says how much it has; with --output_dir also as plan.json")
    gpus: int | None = flag("output", None, "--plan: GPUs of a machine, though none is here; off: those of this run", type=int)
    nodes: int = flag("output", 1, "--plan: machines of --gpus each; with either, step time, tokens/s and MFU are predicted too", type=int)
    eval_only: bool = flag("output", False, "only print the perplexity of the model, train nothing")
    prompt: tuple[str, ...] = flag("output", (), "continue this text with the trained model; repeatable", action="append", metavar="TEXT")
    num_samples: int = flag("output", 0, "texts to generate from the start token after training; 0: off", type=int)
    max_new_tokens: int = flag("output", 60, "length of a generated text in tokens", type=int)
    # fmt: on

    @property
    def model_size(self) -> str | None:
        """The size word in the OPT table, or None where the model is a folder or a hub id."""
        return size_name(self.model_name_or_path)

    @property
    def random_weights(self) -> bool:
        """Whether the weights are drawn, not loaded; `tiny` has none to load."""
        return self.from_scratch or self.model_size == "tiny"

    @property
    def model_slug(self) -> str:
        """A short name for folders and tables: `6.7b`, or the last part of a path."""
        return self.model_size or self.model_name_or_path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def replica_size(self) -> int:
        """GPUs that hold one copy of the model together."""
        return self.tp * self.pp if self.plugin == "hybrid_parallel" else 1

    @property
    def train_batch_size(self) -> int:
        """Rows of one micro-batch of a replica."""
        return self.per_device_train_batch_size * self.replica_size

    @property
    def eval_batch_size(self) -> int:
        """The same in evaluation."""
        return (self.per_device_eval_batch_size or self.per_device_train_batch_size) * self.replica_size

    def global_batch_size(self, world_size: int) -> int:
        """Return the rows of one step, over all GPUs and micro-batches: the same for every plugin."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    @property
    def packs_text(self) -> bool:
        """Whether text is packed into blocks of one length; otherwise a row is a text."""
        return self.dataset != "netflix"


class _Parser(argparse.ArgumentParser):
    """A parser that names the flags which an unknown one may stand for."""

    def error(self, message: str) -> NoReturn:
        known = self._option_string_actions
        for word in re.findall(r"--\w+", message.partition("unrecognized arguments: ")[2]):
            meant = {"--lr": "--learning_rate"}.get(word, word)
            near = [flag for flag in known if meant[2:] in flag] or difflib.get_close_matches(meant, known, n=1)
            message += f"; for {word} did you mean {' or '.join(near)}?" if len(near) in (1, 2) else ""
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: one flag a field, defaults and help from the dataclass."""
    parser = _Parser(
        prog="train_clm.py",
        usage="python train_clm.py [flags]; --help lists them",
        description="Train OPT, or any causal language model, with ColossalAI.",
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for spec in fields(TrainArgs):
        options = dict(spec.metadata)
        title = options.pop("group")
        group = groups.setdefault(title, parser.add_argument_group(title))
        default = None if options.get("action") == "append" else spec.default
        assert default is not MISSING, f"--{spec.name} has no default"
        if isinstance(default, bool):
            negatable = options.pop("negatable", False)
            options["action"] = argparse.BooleanOptionalAction if negatable else "store_true"
        elif default is not None:
            options["help"] += " (default: %(default)s)"
        group.add_argument(f"--{spec.name}", default=default, **options)
    return parser


PATH_FLAGS = (
    "model_name_or_path", "tokenizer_name", "cache_dir", "train_file", "validation_file", "output_dir",
    "resume_from_checkpoint", "export",
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> TrainArgs:
    """Return the settings of `argv` (default: the process's own).

    Raises:
        SystemExit: code 2 for an unknown flag or a word that is no number, 0 after `--help`.
    """
    values = vars(build_parser().parse_args(sys.argv[1:] if argv is None else argv))
    values["prompt"] = tuple(values["prompt"] or ())
    for name in PATH_FLAGS:
        if values[name] is not None:
            values[name] = os.path.expanduser(values[name])  # bash leaves the ~ of --output_dir=~/run
    return TrainArgs(**values)


def problems(args: TrainArgs, *, world_size: int, num_gpus: int, gpus_per_node: int) -> list[str]:
    """Return everything wrong with `args` that needs neither torch nor a file: one sentence each.

    Args:
        world_size: processes of the whole run.
        num_gpus: GPUs of this machine; 0 for a CPU rehearsal.
        gpus_per_node: processes torchrun started on this machine.
    """
    return [
        *_number_problems(args),
        *_plugin_problems(args, on_cpu=num_gpus == 0),
        *_layout_problems(args, world_size, num_gpus, gpus_per_node),
    ]


def _number_problems(args: TrainArgs) -> list[str]:
    at_least = {
        "block_size": 2, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1, "num_train_epochs": 1, "max_train_steps": 1, "logging_steps": 1,
        "tp": 1, "pp": 1, "gpus": 1, "nodes": 1, "max_train_samples": 1, "max_eval_samples": 1,
        "num_microbatches": 0, "num_model_chunks": 0,
        "num_warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "mem_cap": 0, "num_samples": 0,
        "max_new_tokens": 1, "dataloader_num_workers": 0, "learning_rate": 0, "ddp_timeout": 1, "hang_timeout": 0, "seed": 0,
        "eval_steps": 0, "save_steps": 0, "save_total_limit": 1, "adam_epsilon": 0,
    }  # fmt: skip
    between = {
        "dropout": (0, 1), "warmup_ratio": (0, 1), "offload_optim_frac": (0, 1), "offload_param_frac": (0, 1),
        "validation_split_percentage": (0, 99), "adam_beta1": (0, 1), "adam_beta2": (0, 1),
    }  # fmt: skip
    found = [
        f"--{name} {value}: must be at least {low}"
        for name, low in at_least.items()
        if (value := getattr(args, name)) is not None and not low <= value < math.inf
    ]
    found += [f"--{name} 1.0: must be below 1" for name in ("adam_beta1", "adam_beta2") if getattr(args, name) == 1]
    found += [
        f"--{name} {value}: must be between {low} and {high}"
        for name, (low, high) in between.items()
        if (value := getattr(args, name)) is not None and not low <= value <= high
    ]
    checkpointing = args.gradient_checkpointing
    if checkpointing not in ("auto", "on", "off") and not checkpointing.isdecimal():
        found.append(f"--gradient_checkpointing {checkpointing}: must be auto, on, off or a number of layers")
    if args.max_prefetch != "auto" and not args.max_prefetch.isdecimal():
        found.append(f"--max_prefetch {args.max_prefetch}: must be auto or a number of chunks")
    if (args.num_warmup_steps or args.warmup_ratio) and args.lr_scheduler_type == "constant":
        found.append("--lr_scheduler_type constant: has no warm-up; use constant_with_warmup")
    if not args.plan and (args.gpus or args.nodes != 1):
        found.append("--gpus and --nodes: need --plan; a run takes its processes from the launcher")
    if args.num_warmup_steps and args.warmup_ratio:
        found.append("--num_warmup_steps and --warmup_ratio: give one of them")
    return found


def _plugin_problems(args: TrainArgs, *, on_cpu: bool) -> list[str]:
    found = []
    plugin, precision = args.plugin, args.precision
    if on_cpu and not args.allow_cpu_fp16 and "fp16" in (precision, plugin[-4:]):
        flag_given = "--precision fp16" if precision == "fp16" else f"--plugin {plugin}"
        found.append(f"{flag_given}: fp16 needs a GPU; here use bf16 or fp32 (--allow_cpu_fp16 rehearses it, slowly)")
    if plugin == "torch_ddp_fp16" and precision not in ("auto", "fp16"):
        found.append(f"--precision {precision}: torch_ddp_fp16 is fp16; use --plugin torch_ddp for bf16 and fp32")
    if plugin == "torch_ddp" and precision == "fp16":
        found.append("--precision fp16: use --plugin torch_ddp_fp16, which scales the loss")
    if plugin == "gemini" and precision == "fp32":
        found.append("--precision fp32: gemini trains in bf16 or fp16 (its master weights are fp32)")
    if plugin == "hybrid_parallel" and args.zero_stage and precision == "fp32":
        found.append(f"--precision fp32: hybrid_parallel with --zero_stage {args.zero_stage} needs bf16 or fp16")
    if plugin == "hybrid_parallel" and args.zero_stage == 2 and args.pp > 1:
        found.append("--zero_stage 2: not with --pp above 1; use --zero_stage 1")
    if plugin == "low_level_zero" and args.zero_stage == 0:
        found.append("--zero_stage 0: low_level_zero has stages 1 and 2; stage 0 is --plugin torch_ddp")
    if args.step_in_backward == "on" and (args.max_grad_norm or precision == "fp16"):
        found.append("--step_in_backward on: not with --max_grad_norm or fp16, which need all gradients first")
    if args.offload_param_frac and args.offload_optim_frac != 1:
        found.append("--offload_param_frac: needs --offload_optim_frac 1")
    if on_cpu and args.placement == "auto":
        found.append("--placement auto: reads GPU memory statistics; use static on a CPU")
    if args.placement == "auto" and (args.offload_optim_frac or args.offload_param_frac):
        found.append("--placement auto: places states itself; leave --offload_optim_frac and --offload_param_frac away")
    if args.placement == "auto" and args.max_prefetch not in ("auto", "0"):
        found.append(
            "--placement auto: fetches as much ahead as each rank has room for, not alike; leave --max_prefetch away"
        )
    if plugin == "hybrid_parallel" and args.pp == 1 and (args.num_microbatches or args.pp_schedule != "1f1b"):
        found.append("--num_microbatches and --pp_schedule: need --pp above 1")
    if plugin == "hybrid_parallel" and args.num_model_chunks and args.pp_schedule != "interleaved":
        found.append("--num_model_chunks: needs --pp_schedule interleaved")
    if args.compile == "on" and not args.packs_text:
        found.append("--compile on: not with --dataset netflix, whose batches differ in length; use off or auto")
    if args.cuda_graphs == "on" and args.eval_only:
        found.append("--cuda_graphs on: not with --eval_only, whose layers are not recorded")
    found += _unused_problems(args)
    return found


def _unused_problems(args: TrainArgs) -> list[str]:
    """Return a problem for each flag that the named plugin has no use for."""
    users = {
        "tp": ("hybrid_parallel",), "pp": ("hybrid_parallel",), "num_microbatches": ("hybrid_parallel",),
        "pp_schedule": ("hybrid_parallel",), "num_model_chunks": ("hybrid_parallel",),
        "zero_stage": ("low_level_zero", "hybrid_parallel"),
        "placement": ("gemini",), "offload_optim_frac": ("gemini", "low_level_zero"), "offload_param_frac": ("gemini",),
        "max_prefetch": ("gemini",),
        "step_in_backward": ("low_level_zero",),
    }  # fmt: skip
    defaults = TrainArgs()
    return [
        f"--{name} {getattr(args, name)}: needs --plugin {' or '.join(plugins)}, got {args.plugin}"
        for name, plugins in users.items()
        if getattr(args, name) != getattr(defaults, name) and args.plugin not in plugins
    ]


def _layout_problems(args: TrainArgs, world_size: int, num_gpus: int, gpus_per_node: int) -> list[str]:
    found = []
    if num_gpus and gpus_per_node > num_gpus:
        found.append(f"{gpus_per_node} GPUs asked for, {num_gpus} here: start with {num_gpus} or fewer")
    if args.plugin == "low_level_zero" and world_size > 1:
        found += _sharded_zero_problems(args)
    if args.plugin != "hybrid_parallel" or min(args.tp, args.pp) < 1:
        return found
    if world_size % (args.tp * args.pp):
        found.append(f"--tp {args.tp} x --pp {args.pp}: must divide the {world_size} processes of this run")
    if args.pp > 1:
        found += _pipeline_problems(args)
    return found


def _sharded_zero_problems(args: TrainArgs) -> list[str]:
    if args.step_in_backward == "on" and args.zero_stage == 2 and args.gradient_accumulation_steps > 1:
        return ["--step_in_backward on: not with --zero_stage 2 and accumulation, which divide the gradients before"]
    return []


def _pipeline_problems(args: TrainArgs) -> list[str]:
    found = []
    batch, num_microbatches = args.train_batch_size, pipeline_microbatches(args)
    if batch % num_microbatches:
        found.append(
            f"--num_microbatches {num_microbatches}: must divide the {batch} rows of a replica "
            f"(--per_device_train_batch_size {args.per_device_train_batch_size} x {args.replica_size} GPUs)"
        )
    elif num_microbatches < args.pp:
        found.append(f"--num_microbatches {num_microbatches}: must be at least --pp {args.pp}")
    elif args.pp_schedule == "interleaved" and num_microbatches % args.pp:
        found.append(f"--num_microbatches {num_microbatches}: interleaved needs a multiple of --pp {args.pp}")
    if args.num_model_chunks == 1:
        found.append("--num_model_chunks 1: must be 2 or more; one part a stage is --pp_schedule 1f1b")
    if args.eval_batch_size != batch:
        found.append("--per_device_eval_batch_size: must equal the training batch with --pp above 1")
    return found


def pipeline_microbatches(args: TrainArgs) -> int:
    """Return the pipeline's micro-batches a batch: the flag, or the most of `microbatch_choices`."""
    return microbatch_choices(args)[-1]


def model_chunks(args: TrainArgs) -> int:
    """Return the parts of the model on each stage: 1 but for an interleaved pipeline, there the flag, or 2."""
    return args.num_model_chunks or 2 if args.pp_schedule == "interleaved" else 1


def microbatch_choices(args: TrainArgs) -> list[int]:
    """Return the numbers of micro-batches open to choice: the flag alone, or what divides the batch, 1 to 4 a stage."""
    if args.num_microbatches:
        return [args.num_microbatches]
    return microbatch_numbers(args.train_batch_size, args.pp, interleaved=args.pp_schedule == "interleaved")


def microbatch_numbers(rows: int, pp: int, *, interleaved: bool = False) -> list[int]:
    """Return what divides the rows of a batch, 1 to 4 micro-batches a stage; interleaved: multiples of the stages."""
    return [number for number in range(pp, 4 * pp + 1, pp if interleaved else 1) if rows % number == 0]
