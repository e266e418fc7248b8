"""Ours and other ways to train the same model, in turn on the same devices, and the table of their speeds with ratios.

    python -m benchmarks.side_by_side --case speed        # one GPU: every plugin and every peer, 125m, 1.3b and 6.7b
    python -m benchmarks.side_by_side --case offload      # one GPU under a memory cap: DeepSpeed's ZeRO-Offload and ours
    python -m benchmarks.side_by_side --case gpus         # 1, 2, 4, ... GPUs of a machine: every plugin, FSDP2, DeepSpeed
    python -m benchmarks.side_by_side --case cpu          # a few minutes on two cores: `tiny`
    python -m benchmarks.side_by_side --case ranks        # the same on one and on two gloo ranks: FSDP2 and ours

A run is a process of its own with a time limit, and a round of all contestants is made `--rounds` times. Ours are runs
of train_clm.py, read from its result.json; peers are the scripts of benchmarks/peers. `table.md` and `table.json` are
written after each run; called again with the same settings, only what is missing or failed is run. DeepSpeed builds its
optimizer at its first use: allow that run a minute or two more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

import hardware
import report
from benchmarks.sweep import end

ROOT = Path(__file__).resolve().parent.parent
EXIT_STATUS = {2: "refused", 3: "oom", 4: "nan", -signal.SIGKILL: "killed"}


@dataclass(frozen=True)
class Setting:
    """The job that every contestant of a table is given.

    Args:
        recompute: activations of every layer, for the contestants that do not choose themselves.
        mem_cap_gb: in 10^9 bytes; 0: none.
        max_grad_norm: 0: no clipping.
        gpus: processes, one a GPU; the batch is that of each.
    """

    model: str
    batch_size: int
    block_size: int = 1024
    recompute: bool = False
    mem_cap_gb: float = 0.0
    max_grad_norm: float = 1.0
    gpus: int = 1

    def __str__(self) -> str:
        parts = [
            self.model,
            *[f"{self.gpus} GPUs"] * (self.gpus > 1),
            f"batch {self.batch_size}",
            f"length {self.block_size}",
        ]
        parts += ["recompute"] if self.recompute else []
        parts += [f"cap {self.mem_cap_gb:g} GB"] if self.mem_cap_gb else []
        parts += [f"clipped at {self.max_grad_norm:g}" if self.max_grad_norm else "no clipping"]
        return ", ".join(parts)

    def flags(self) -> list[str]:
        """Return the flags that train_clm.py and the peers share."""
        return [
            "--model_name_or_path", self.model, "--per_device_train_batch_size", str(self.batch_size),
            "--block_size", str(self.block_size), "--mem_cap", f"{self.mem_cap_gb:g}",
            "--max_grad_norm", f"{self.max_grad_norm:g}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Args:
        peer: the module in benchmarks/peers; None: ours.
        flags: its own, after the shared ones.
        chooses_recompute: the setting's `recompute` is not forced on it: it may spend free memory as it likes.
        min_gpus: fewer are not enough for it.
    """

    name: str
    peer: str | None
    flags: tuple[str, ...] = ()
    chooses_recompute: bool = False
    min_gpus: int = 1


def _ours(plugin: str, *flags: str, name: str = "", chooses_recompute: bool = False, min_gpus: int = 1) -> Contestant:
    return Contestant(name or plugin, None, ("--plugin", plugin, *flags), chooses_recompute, min_gpus)


def _deepspeed(name: str, *flags: str) -> Contestant:
    return Contestant(name, "deepspeed_zero", ("--name", name, *flags))


PLAIN, PLAIN_COMPILE = Contestant("plain", "plain"), Contestant("plain_compile", "plain", ("--compile",))
OFFLOAD_PEERS = (
    _deepspeed("deepspeed_zero2_offload", "--stage", "2", "--offload"),
    _deepspeed("deepspeed_zero2_offload_compile", "--stage", "2", "--offload", "--compile"),
)
# Where 12 bytes of states a parameter hardly fit on the host: without page-locked copies, and with a share on the GPU.
LARGE_OFFLOAD_PEERS = (
    _deepspeed("deepspeed_zero2_offload_unpinned", "--stage", "2", "--offload", "--no-pin_memory"),
    _deepspeed("deepspeed_zero3_offload_60", "--stage", "3", "--offload", "--ratio", "0.6"),
)
OFFLOAD_OURS = (
    _ours("low_level_zero", "--offload_optim_frac", "1", name="low_level_zero_offload"),
    _ours("gemini", "--offload_optim_frac", "1", name="gemini_offload"),
    _ours("auto", chooses_recompute=True),
)


@dataclass(frozen=True)
class Entry:
    """A setting and who takes part in it.

    Args:
        min_gpus: fewer are not enough for any contestant.
    """

    setting: Setting
    contestants: tuple[Contestant, ...]
    min_gpus: int = 1


@dataclass(frozen=True)
class Case:
    """A family of tables.

    Args:
        baseline: the contestant that ratios are taken to.
        num_workers: loader processes of every contestant.
        device_init: peers draw their weights on the GPU: large models are minutes in the making otherwise.
        needs_gb: GPU memory below which a model is left out, unless --models names it.
        scales: every setting is run on each number of GPUs that --gpus names.
    """

    baseline: str
    entries: tuple[Entry, ...]
    num_workers: int = 0
    device_init: bool = False
    needs_gb: dict[str, float] = field(default_factory=dict)
    scales: bool = False


TP2_PP2 = ("--tp", "2", "--pp", "2")
INTERLEAVED = ("--pp_schedule", "interleaved", "--num_model_chunks")


def _scaling_contestants(*, peers: Sequence[Contestant]) -> tuple[Contestant, ...]:
    return (
        *peers,
        _ours("torch_ddp"),
        _ours("low_level_zero"),
        _ours("gemini"),
        _ours("hybrid_parallel", "--tp", "2", name="hybrid_tp2", min_gpus=2),
        _ours("hybrid_parallel", *TP2_PP2, name="hybrid_tp2_pp2", min_gpus=4),
        _ours("hybrid_parallel", *TP2_PP2, *INTERLEAVED, "2", name="hybrid_interleaved", min_gpus=4),
    )


GPUS_CONTESTANTS = (
    *_scaling_contestants(
        peers=(
            Contestant("fsdp2_compile", "fsdp2"),
            _deepspeed("deepspeed_zero2", "--stage", "2"),
            _deepspeed("deepspeed_zero3", "--stage", "3"),
        )
    ),
    _ours("hybrid_parallel", "--pp", "4", *INTERLEAVED, "2", name="hybrid_pp4_interleaved", min_gpus=4),
    _ours("hybrid_parallel", *TP2_PP2, *INTERLEAVED, "4", name="hybrid_interleaved_4", min_gpus=4),
)
TEN_PARTS = (*TP2_PP2, *INTERLEAVED, "10", "--num_microbatches", "2")  # of two layers each, of 13b
LARGEST_CONTESTANTS = (
    *(each for each in GPUS_CONTESTANTS if each.name not in ("torch_ddp", "low_level_zero")),
    _ours("low_level_zero", "--offload_optim_frac", "0.3", name="low_level_zero_offload"),
    _ours("auto", chooses_recompute=True),
)
SPEED_CONTESTANTS = (
    PLAIN,
    PLAIN_COMPILE,
    Contestant("hf_trainer", "hf_trainer"),
    _deepspeed("deepspeed_zero1", "--stage", "1"),
    _deepspeed("deepspeed_zero2", "--stage", "2"),
    _deepspeed("deepspeed_zero2_compile", "--stage", "2", "--compile"),
    Contestant("fsdp2_compile", "fsdp2"),
    *(_ours(plugin) for plugin in ("torch_ddp", "low_level_zero", "gemini", "hybrid_parallel")),
)
# Where launches take longer than the kernels, what CUDA graphs gain.
LAUNCHED_CONTESTANTS = tuple(
    _ours(plugin, "--cuda_graphs", "off", name=f"{plugin}_launched")
    for plugin in ("torch_ddp", "low_level_zero", "hybrid_parallel")
)
CASES = {
    "speed": Case(
        "plain_compile",
        (
            Entry(Setting("125m", 8), (*SPEED_CONTESTANTS, *LAUNCHED_CONTESTANTS)),
            *(Entry(Setting(*size), SPEED_CONTESTANTS) for size in (("125m", 32), ("1.3b", 8), ("6.7b", 4))),
        ),
        num_workers=2,
        device_init=True,
        needs_gb={"6.7b": 130},  # 16 bytes a parameter, and activations
    ),
    "offload": Case(
        "deepspeed_zero2_offload",
        (
            Entry(Setting("2.7b", 16, recompute=True, mem_cap_gb=24, max_grad_norm=0), (*OFFLOAD_PEERS, *OFFLOAD_OURS)),
            Entry(
                Setting("6.7b", 16, recompute=True, mem_cap_gb=80, max_grad_norm=0),
                (*OFFLOAD_PEERS, *LARGE_OFFLOAD_PEERS, *OFFLOAD_OURS),
            ),
        ),
        device_init=True,
        needs_gb={"6.7b": 79},
    ),
    # An H200 has room for all activations up to 13b; an H100 needs --recompute.
    "gpus": Case(
        "fsdp2_compile",
        (
            Entry(Setting("1.3b", 8, max_grad_norm=0), GPUS_CONTESTANTS),
            Entry(Setting("6.7b", 4, max_grad_norm=0), GPUS_CONTESTANTS),
            Entry(
                Setting("13b", 4, max_grad_norm=0),
                (*GPUS_CONTESTANTS, _ours("hybrid_parallel", *TEN_PARTS, name="hybrid_interleaved_10", min_gpus=4)),
                min_gpus=2,
            ),
            Entry(Setting("30b", 4, recompute=True, max_grad_norm=0), LARGEST_CONTESTANTS, min_gpus=4),
        ),
        num_workers=2,
        device_init=True,
        needs_gb={"1.3b": 39, "6.7b": 130, "13b": 139, "30b": 139},
        scales=True,
    ),
    "ranks": Case(
        "fsdp2",
        (
            Entry(
                Setting("tiny", 4, block_size=128),
                _scaling_contestants(peers=[Contestant("fsdp2", "fsdp2", ("--no-compile",))]),
            ),
        ),
        scales=True,
    ),
    "cpu": Case(
        "plain",
        (
            Entry(
                Setting("tiny", 4, block_size=128),
                (
                    PLAIN,
                    Contestant("hf_trainer", "hf_trainer", ("--no-compile",)),
                    *(_ours(plugin) for plugin in ("torch_ddp", "low_level_zero", "hybrid_parallel")),
                ),
            ),
        ),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """One run: how it ended, and what it measured. None where it did not get that far.

    Args:
        status: ok, skipped, oom, nan, refused, killed, timeout or error.
        seconds: of the whole process.
        ready_s: from the command to the end of the first step.
        gpus: of this run; `alone` is the setting on one of them.
    """

    setting: str
    name: str
    is_ours: bool
    round: int
    status: str
    command: str
    seconds: float
    notes: str = ""
    device: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    tokens_per_s: float | None = None
    step_ms: tuple[float, float, float] | None = None
    model_tflops: float | None = None
    mfu: float | None = None
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None
    host_gib: float | None = None
    first_step_s: float | None = None
    ready_s: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    gpus: int = 1
    alone: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the tables after each run, and print them."""
    options = parse(argv)
    case = CASES[options.case]
    entries = chosen_entries(case, options)
    baseline = options.baseline or case.baseline
    folder = Path(options.output or f"outputs/side-by-side-{options.case}")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the run in progress on the way out
    done = read_outcomes(folder / "table.json")
    for entry, contestant, round_ in planned(entries, options.rounds):
        setting = entry.setting
        recomputed = "-recompute" if setting.recompute else ""
        stem = f"{setting.model}-{setting.batch_size}{recomputed}-{setting.gpus}-{contestant.name}"
        command = command_of(contestant, setting, case, options, folder / "runs" / stem)
        key = (str(setting), contestant.name, round_)
        if any(_key(each) == key and each.status == "ok" and each.command == command for each in done):
            continue
        print(f"{setting}: {contestant.name}, round {round_}", file=sys.stderr, flush=True)
        log = folder / "logs" / f"{stem}-{round_}.txt"
        outcome = run(command, log, limit_s=options.limit_seconds, gpus=setting.gpus)
        alone = str(replace(setting, gpus=1))
        outcome = replace(outcome, setting=key[0], name=contestant.name, is_ours=contestant.peer is None, round=round_)
        outcome = replace(outcome, gpus=setting.gpus, alone=alone)
        print(f"  {_line(outcome)}", file=sys.stderr, flush=True)
        done = [each for each in done if _key(each) != key] + [outcome]
        write(folder, done, baseline)
    write(folder, done, baseline)
    print((folder / "table.md").read_text(), end="")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; an unknown contestant or model is refused."""
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--case", choices=tuple(CASES), required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants; off: all of the case")
    parser.add_argument(
        "--models", nargs="+", metavar="SIZE", help="sizes; off: those of the case that the GPU can hold"
    )
    parser.add_argument(
        "--gpus",
        nargs="+",
        type=int,
        metavar="N",
        help="processes of a case that scales; off: 1, 2, 4, ... as there are",
    )
    parser.add_argument("--steps", type=int, default=20, help="steps a run, of which 5 are warm-up (default: 20)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contestant, in turn (default: 1)")
    parser.add_argument("--limit-seconds", type=float, default=300, help="seconds a run may take (default: 300)")
    parser.add_argument("--max-grad-norm", type=float, help="clip at this, 0: not at all; off: as the case says")
    parser.add_argument(
        "--recompute", action=argparse.BooleanOptionalAction, help="activations of every layer; off: as the case says"
    )
    parser.add_argument("--baseline", metavar="NAME", help="contestant that ratios are taken to; off: the case's")
    parser.add_argument("--output", metavar="DIR", help="folder of the results; off: outputs/side-by-side-<case>")
    options = parser.parse_args(argv)
    entries = CASES[options.case].entries
    names = {contestant.name for entry in entries for contestant in entry.contestants}
    models = {entry.setting.model for entry in entries}
    if unknown := {*(options.only or ()), *([options.baseline] if options.baseline else [])} - names:
        parser.error(f"{', '.join(sorted(unknown))}: not in this case; its contestants are {', '.join(sorted(names))}")
    if unknown := set(options.models or ()) - models:
        parser.error(f"--models {' '.join(sorted(unknown))}: this case has {', '.join(sorted(models))}")
    return options


def chosen_entries(case: Case, options: argparse.Namespace) -> list[Entry]:
    """Return the case's entries for these options, without the models that the GPU cannot hold."""
    memory_gb = gpu_memory_gb() if case.needs_gb else 0.0
    chosen = []
    for entry in scaled(case, options.gpus):
        setting = entry.setting
        if options.models is None and memory_gb < case.needs_gb.get(setting.model, 0):
            print(f"{setting}: left out, the GPU has {memory_gb:.0f} GB; --models takes it in", file=sys.stderr)
            continue
        if options.models is not None and setting.model not in options.models:
            continue
        if options.max_grad_norm is not None:
            setting = replace(setting, max_grad_norm=options.max_grad_norm)
        if options.recompute is not None:
            setting = replace(setting, recompute=options.recompute)
        contestants = tuple(each for each in entry.contestants if not options.only or each.name in options.only)
        chosen.append(Entry(setting, contestants))
    return chosen


def scaled(case: Case, numbers: Sequence[int] | None) -> Iterator[Entry]:
    """Yield the entries of a case on each number of GPUs, with those contestants that it is enough for."""
    if not case.scales:
        yield from case.entries
        return
    for entry in case.entries:
        for gpus in numbers or powers_of_two(len(gpu_memories_gb()) or 2):
            if gpus < entry.min_gpus:
                continue
            contestants = tuple(each for each in entry.contestants if each.min_gpus <= gpus)
            yield Entry(replace(entry.setting, gpus=gpus), contestants)


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`."""
    return [2**exponent for exponent in range(most.bit_length())]


def gpu_memory_gb() -> float:
    """Return the memory of the first GPU in 10^9 bytes, 0 without one."""
    return next(iter(gpu_memories_gb()), 0.0)


def gpu_memories_gb() -> list[float]:
    """Return the memory of each GPU that CUDA_VISIBLE_DEVICES leaves, in 10^9 bytes."""
    return [gpu.memory_gib * 2**30 / 1e9 for gpu in hardware.visible_gpus() if gpu.memory_gib]


def planned(entries: Sequence[Entry], rounds: int) -> Iterator[tuple[Entry, Contestant, int]]:
    """Yield every run, the contestants of a round side by side in time."""
    for entry in entries:
        for round_ in range(1, rounds + 1):
            for contestant in entry.contestants:
                yield entry, contestant, round_


def command_of(contestant: Contestant, setting: Setting, case: Case, options: argparse.Namespace, folder: Path) -> str:
    """Return the shell line of a run. Ours and the peers get the same flags for the job."""
    shared = [*setting.flags(), "--max_train_steps", str(options.steps)]
    shared += ["--dataloader_num_workers", str(case.num_workers)]
    python = [sys.executable]
    if setting.gpus > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setting.gpus)]
    if contestant.peer:
        start = [*python, "-m", f"benchmarks.peers.{contestant.peer}", *shared]
        start += ["--recompute"] * setting.recompute + ["--device_init"] * case.device_init
        return shlex.join([*start, *contestant.flags])
    start = [*python, str(ROOT / "train_clm.py"), "--dataset", "synthetic", "--from_scratch", *shared]
    start += ["--logging_steps", str(options.steps), "--eval_strategy", "no", "--save_strategy", "no"]
    start += ["--no-save_final", "--overwrite_output_dir", "--output_dir", str(folder.resolve())]
    if not contestant.chooses_recompute:
        start += ["--gradient_checkpointing", "on" if setting.recompute else "off"]
    return shlex.join([*start, *contestant.flags])


def run(command: str, log: Path, *, limit_s: float, gpus: int = 1) -> Outcome:
    """Run a command on the first GPUs and return what it measured; the caller fills in who it was."""
    arguments = shlex.split(command)
    folder = Path(arguments[arguments.index("--output_dir") + 1]) if "--output_dir" in arguments else None
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    if gpu_memory_gb():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:gpus])
    if folder:
        (folder / "result.json").unlink(missing_ok=True)
    started = time.time()
    with open(log, "w", encoding="utf-8") as file:
        code = run_group(arguments, file, environment, limit_s=limit_s)
    result = read_ours(folder) if folder else read_peer(log)
    outcome = outcome_of(result, started)
    status = status_of(code, result.get("status"))
    notes = outcome.notes or ("" if status == "ok" else last_line(log))
    return replace(outcome, status=status, command=command, seconds=time.time() - started, notes=notes)


def status_of(code: int | None, told: str | None) -> str:
    """Return how a run ended.

    Args:
        code: None: it ran out of time. torchrun makes 1 of every code but 0.
        told: what its result says.
    """
    if code is None:
        return "timeout"
    if code == 0:
        return told or "error"
    return EXIT_STATUS.get(code) or (told if told and told != "ok" else "error")


def run_group(command: Sequence[str], log: Any, environment: dict[str, str], *, limit_s: float) -> int | None:
    """Return the exit code of `command`, or None after `limit_s`; none of its processes is left behind."""
    with subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
    ) as process:
        with contextlib.suppress(OSError):  # where the host's memory ends, the run shall die and not we
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        launcher = psutil.Process(process.pid)
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # torchrun's ranks have sessions of their own, which a signal to this one's group does not reach.
            end(launcher, grace_s=0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def read_ours(folder: Path) -> dict[str, Any]:
    """Return result.json of a run of train_clm.py, with the time of its first step; empty where it left none."""
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return {}
    times = [line["time_s"] for line in lines if line["step"] == 1]
    return {**result, "first_step_time_s": times[0] if times else None, "notes": plan_of(result)}


def plan_of(result: dict[str, Any]) -> str:
    """Return what the plugin was set to, where it had a choice."""
    args = result["args"]
    offload = [f"{args[name]:g} {name[8:13]} on the host" for name in ("offload_optim_frac", "offload_param_frac")]
    parts = [text for text in offload if not text.startswith("0 ")]
    parts += [f"{args['gradient_checkpointing']} layers recomputed"] * (args["gradient_checkpointing"] != "0")
    micro_batches, rows = args["gradient_accumulation_steps"], args["per_device_train_batch_size"]
    parts += [f"{micro_batches} micro-batches of {rows}"] * (micro_batches > 1)
    kinds = {"compiled": args["compile"], "CUDA graphs": args.get("cuda_graphs")}  # which older results lack
    return ", ".join([result["plugin"], *parts, *(kind for kind, is_on in kinds.items() if is_on == "on")])


def read_peer(log: Path) -> dict[str, Any]:
    """Return the closing JSON line of a peer; empty where it left none."""
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if line.startswith('{"status"'):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def last_line(log: Path) -> str:
    """Return the line that says why a run failed: the last error of its log, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][:160]


def outcome_of(result: dict[str, Any], started: float) -> Outcome:
    """Return the numbers of a result."""
    speed, memory = result.get("throughput") or {}, result.get("memory") or {}
    losses = [loss for _, loss in result.get("train_loss", [])]
    first_step_ms, first_time_s = speed.get("first_step_ms"), result.get("first_step_time_s")
    return Outcome(
        "", "", False, 0, result.get("status", "error"), "", 0.0,
        notes=result.get("notes", ""),
        device=result["device"]["name"] if "device" in result else None,
        versions=result.get("versions", {}),
        tokens_per_s=speed.get("tokens_per_s"),
        step_ms=(speed["step_ms_median"], speed["step_ms_p10"], speed["step_ms_p90"]) if speed else None,
        model_tflops=speed.get("model_tflops_per_device"),
        mfu=speed.get("mfu"),
        peak_allocated_gib=memory.get("peak_allocated_gib"),
        peak_reserved_gib=memory.get("peak_reserved_gib"),
        host_gib=memory.get("host_peak_rss_gib"),
        first_step_s=first_step_ms / 1e3 if first_step_ms else None,
        ready_s=first_time_s - started if first_time_s else None,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
    )  # fmt: skip


# ---------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    """A contestant's line: the outcome of its median round, and its ratios.

    Args:
        to_baseline, to_best_peer: its tokens/s over the other's in the same round, median over rounds; None where one
            of the two has no speed.
        scaling: its tokens/s over those of as many runs on one GPU.
    """

    outcome: Outcome
    to_baseline: float | None
    to_best_peer: float | None
    scaling: float | None = None


def make_rows(outcomes: Sequence[Outcome], baseline: str, on_one_gpu: Sequence[Outcome] = ()) -> list[Row]:
    """Return a line for each contestant of one setting, in the order of their first run.

    Args:
        on_one_gpu: outcomes of the same setting there.
    """
    by_name: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_name.setdefault(outcome.name, []).append(outcome)
    peers = {name: each for name, each in by_name.items() if not each[0].is_ours and typical(each).tokens_per_s}
    best = max(peers, key=lambda name: typical(peers[name]).tokens_per_s or 0.0, default=None)
    return [
        Row(
            typical(each),
            ratio(each, by_name.get(baseline, ())),
            ratio(each, by_name[best] if best else ()),
            scaling(each, [other for other in on_one_gpu if other.name == each[0].name]),
        )
        for each in by_name.values()
    ]


def scaling(rounds: Sequence[Outcome], on_one_gpu: Sequence[Outcome]) -> float | None:
    """Return the share of perfect scaling that several GPUs reach; None for one, or without a run on one."""
    speedup = ratio(rounds, on_one_gpu)
    return None if speedup is None or rounds[0].gpus == 1 else speedup / rounds[0].gpus


def typical(rounds: Sequence[Outcome]) -> Outcome:
    """Return the round of median speed (of an even number the slower), or the last one where none has a speed."""
    measured = sorted(_measured(rounds).values(), key=lambda outcome: outcome.tokens_per_s or 0.0)
    return measured[(len(measured) - 1) // 2] if measured else rounds[-1]


def ratio(rounds: Sequence[Outcome], to: Sequence[Outcome]) -> float | None:
    """Return the median of the speed ratios of the rounds that both have finished."""
    ours, others = _measured(rounds), _measured(to)
    ratios = [(ours[r].tokens_per_s or 0.0) / (others[r].tokens_per_s or 1.0) for r in ours.keys() & others.keys()]
    return statistics.median(ratios) if ratios else None


def _measured(rounds: Sequence[Outcome]) -> dict[int, Outcome]:
    return {each.round: each for each in rounds if each.status == "ok" and each.tokens_per_s}


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("contestant", lambda row: f"**{row.outcome.name}**" if row.outcome.is_ours else row.outcome.name),
    ("status", lambda row: row.outcome.status),
    ("tokens/s", lambda row: _number(row.outcome.tokens_per_s, ",.0f")),
    ("x baseline", lambda row: _number(row.to_baseline, ".2f")),
    ("x best peer", lambda row: _number(row.to_best_peer, ".2f")),
    ("scaling", lambda row: _number(row.scaling, ".1%")),
    ("step ms, median (p10, p90)", lambda row: _step(row.outcome.step_ms)),
    ("model TFLOP/s", lambda row: _number(row.outcome.model_tflops, ".3g")),
    ("GPU GiB allocated", lambda row: _number(row.outcome.peak_allocated_gib, ".1f")),
    ("reserved", lambda row: _number(row.outcome.peak_reserved_gib, ".1f")),
    ("host GiB", lambda row: _number(row.outcome.host_gib, ".1f")),
    ("first step s", lambda row: _number(row.outcome.first_step_s, ".1f")),
    ("from command to first step s", lambda row: _number(row.outcome.ready_s, ".0f")),
    ("loss, first to last", lambda row: _losses(row.outcome)),
    ("notes", lambda row: row.outcome.notes.replace("|", "/")),
)


def by_setting(outcomes: Sequence[Outcome], baseline: str) -> dict[str, list[Row]]:
    """Return the rows of each table, in the order in which the settings were first run."""
    settings: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        settings.setdefault(outcome.setting, []).append(outcome)
    return {setting: make_rows(each, baseline, settings.get(each[0].alone, ())) for setting, each in settings.items()}


def markdown(tables: dict[str, list[Row]], baseline: str, *, head: str) -> str:
    """Return the page: a table a setting."""
    parts = [head]
    for setting, rows in tables.items():
        lines = ["| " + " | ".join(title for title, _ in COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        lines += ["| " + " | ".join(text(row) for _, text in COLUMNS) + " |" for row in rows]
        parts.append(f"**{setting}** (baseline: {baseline}; ours in bold)\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def heading(outcomes: Sequence[Outcome]) -> str:
    """Return the line on hardware, date, versions, commit and command."""
    devices = sorted({each.device for each in outcomes if each.device})
    versions: dict[str, str] = {}
    for outcome in outcomes:
        versions |= {name: version for name, version in outcome.versions.items() if version}
    parts = [time.strftime("%Y-%m-%d"), *devices, *(f"{name} {version}" for name, version in versions.items())]
    command = shlex.join(["python", "-m", "benchmarks.side_by_side", *sys.argv[1:]])
    return f"{', '.join(parts)}, commit {report.git_commit() or 'unknown'}.\n\n    {command}"


def write(folder: Path, outcomes: Sequence[Outcome], baseline: str) -> None:
    """Write table.md and table.json, each in one step."""
    tables = by_setting(outcomes, baseline)
    page = markdown(tables, baseline, head=heading(outcomes))
    rows = [
        {
            **asdict(row.outcome),
            "to_baseline": row.to_baseline,
            "to_best_peer": row.to_best_peer,
            "scaling": row.scaling,
        }
        for table_rows in tables.values()
        for row in table_rows
    ]
    table = {"baseline": baseline, "rows": rows, "outcomes": [asdict(each) for each in outcomes]}
    for name, text in (("table.md", page), ("table.json", json.dumps(table, indent=1) + "\n")):
        temporary = folder / f".{name}"
        temporary.write_text(text)
        os.replace(temporary, folder / name)


def read_outcomes(path: Path) -> list[Outcome]:
    """Return the outcomes that an earlier call left, none without one."""
    if not path.exists():
        return []
    return [Outcome(**each) for each in json.loads(path.read_text())["outcomes"]]


def _key(outcome: Outcome) -> tuple[str, str, int]:
    return outcome.setting, outcome.name, outcome.round


def _line(outcome: Outcome) -> str:
    if outcome.status != "ok":
        return f"{outcome.status}: {outcome.notes}"
    return f"ok: {_number(outcome.tokens_per_s, ',.0f')} tokens/s, {outcome.seconds:.0f} s in all"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _step(step_ms: Sequence[float] | None) -> str:
    return "-" if step_ms is None else "{:,.1f} ({:,.1f}, {:,.1f})".format(*step_ms)


def _losses(outcome: Outcome) -> str:
    if outcome.first_loss is None or outcome.last_loss is None:
        return "-"
    return f"{outcome.first_loss:.3f} to {outcome.last_loss:.3f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
