"""The cells of a sweep: every combination of the environment's lists, and which of them cannot run here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import chooser
import hardware
import planner
from args import PLUGINS, ConfigError, TrainArgs, parse_args, problems
from opt_sizes import OPT_SHAPES

GPU_DEFAULTS = {
    "MODELS": "125m",
    "PLUGINS": "torch_ddp torch_ddp_fp16 low_level_zero gemini hybrid_parallel",
    "BATCH_SIZES": "8 32 128",
    "SEQ_LENS": "1024",
    "STEPS": "30",
}
CPU_DEFAULTS = {
    "MODELS": "tiny",
    "PLUGINS": "torch_ddp low_level_zero gemini",
    "BATCH_SIZES": "2 8",
    "GPUS": "1",
    "SEQ_LENS": "64",
    "STEPS": "12",
}
DEFAULTS = {
    "PRECISIONS": "auto",
    "MEM_CAPS": "0",
    "REPEATS": "1",
    "CELL_TIMEOUT": "600",
    "SKIP_ABOVE": "1.5",
    "FORCE": "",
    "OUT": "outputs/benchmark",
}
STATES = ("ok", "oom", "timeout", "error", "nan", "skipped")


@dataclass(frozen=True)
class Cell:
    """One combination of settings.

    Args:
        precision: as asked for; `auto` is what train_clm.py takes for the plugin.
        mem_cap_gb: of each GPU, in GB of 10^9 bytes; 0: none.
    """

    model: str
    plugin: str
    batch_size: int
    num_gpus: int
    seq_len: int
    precision: str
    mem_cap_gb: float

    @property
    def name(self) -> str:
        """The folder's name, and what two sweeps are compared by."""
        model, plugin, *numbers, precision, cap = astuple(self)
        batch_size, num_gpus, seq_len = numbers
        name = (
            f"{model.strip('/').replace('/', '_')}-{plugin}-{precision}-batch{batch_size}-gpus{num_gpus}-len{seq_len}"
        )
        return f"{name}-cap{cap:g}" if cap else name

    def flags(self, steps: int) -> list[str]:
        """Return the arguments of run_clm_synthetic.sh, without an output folder."""
        positions = [str(self.batch_size), f"{self.mem_cap_gb:g}", self.model, str(self.num_gpus)]
        own = ["--plugin", self.plugin, "--precision", self.precision, "--block_size", str(self.seq_len)]
        return [
            *(*positions, *own, "--max_train_steps", str(steps)),
            *("--eval_strategy", "no", "--save_strategy", "no", "--no-save_final"),
        ]

    def train_args(self, flags: Sequence[str]) -> TrainArgs:
        """Return what train_clm.py will parse: the launcher's own flags, then the user's."""
        synthetic = ["--dataset", "synthetic", "--from_scratch", "--plugin", self.plugin, "--precision", self.precision]
        sizes = ["--per_device_train_batch_size", str(self.batch_size), "--block_size", str(self.seq_len)]
        cap = ["--mem_cap", f"{self.mem_cap_gb:g}", "--model_name_or_path", self.model]
        return parse_args([*synthetic, *sizes, *cap, *flags])


@dataclass(frozen=True)
class Settings:
    """What run_benchmark.sh was asked for.

    Args:
        repeats: runs a cell.
        timeout_s: limit of one run.
        skip_above: a cell predicted to need more than this many times a GPU's memory is not tried; 0: all are.
        force: states whose cells are measured again.
        flags: passed on to train_clm.py.
    """

    cells: tuple[Cell, ...]
    steps: int
    repeats: int
    timeout_s: float
    skip_above: float
    force: frozenset[str]
    folder: Path
    flags: tuple[str, ...]

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], gpus: Sequence[hardware.Gpu], flags: Sequence[str]
    ) -> Settings:
        """Return the settings; what is not set or empty takes the default of this machine.

        Raises:
            ConfigError: every word that is no number, plugin or state.
        """
        lists = Lists(environment, gpus)
        combinations = itertools.product(
            lists.words("MODELS"),
            lists.words("PLUGINS", PLUGINS),
            lists.integers("BATCH_SIZES"),
            lists.integers("GPUS"),
            lists.integers("SEQ_LENS"),
            lists.words("PRECISIONS", ("auto", "bf16", "fp16", "fp32")),
            lists.numbers("MEM_CAPS"),
        )
        force = lists.words("FORCE", ("1", *STATES)) if lists.text("FORCE") else []
        settings = cls(
            cells=tuple(dict.fromkeys(Cell(*combination) for combination in combinations)),
            steps=lists.integers("STEPS")[0],
            repeats=lists.integers("REPEATS")[0],
            timeout_s=lists.numbers("CELL_TIMEOUT")[0],
            skip_above=lists.numbers("SKIP_ABOVE")[0],
            force=frozenset(STATES if "1" in force else force),
            folder=Path(lists.text("OUT")),
            flags=tuple(flags),
        )
        if lists.problems:
            raise ConfigError(*lists.problems)
        return settings


class Lists:
    """Reads the environment's lists, and collects what is wrong with them."""

    def __init__(self, environment: Mapping[str, str], gpus: Sequence[hardware.Gpu]) -> None:
        # 1 and 4, as the original's sweep, cut to what is there.
        counts = {"GPUS": "1" if len(gpus) < 2 else f"1 {min(4, len(gpus))}"}
        self.values = {**DEFAULTS, **counts, **(GPU_DEFAULTS if gpus else CPU_DEFAULTS)}
        self.values |= {name: environment[name] for name in self.values if environment.get(name, "").strip()}
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        """Return a value as it stands."""
        return self.values[name]

    def words(self, name: str, allowed: Sequence[str] | None = None) -> list[str]:
        """Return the words of a list, all of them among those allowed."""
        words = self.values[name].split()
        wrong = [word for word in words if allowed is not None and word not in allowed]
        self.problems += [f"{name}: got '{word}', needs one of {' '.join(allowed or ())}" for word in wrong]
        return words

    def integers(self, name: str) -> list[int]:
        """Return whole numbers from 1."""
        words = self.values[name].split()
        wrong = [word for word in words if not word.isdecimal() or int(word) < 1]
        self.problems += [f"{name}: got '{word}', needs whole numbers from 1" for word in wrong]
        return [int(word) for word in words if word not in wrong] or [1]

    def numbers(self, name: str) -> list[float]:
        """Return numbers from 0."""
        found = []
        for word in self.values[name].split():
            if word.replace(".", "", 1).isdecimal():
                found.append(float(word))
            else:
                self.problems.append(f"{name}: got '{word}', needs numbers from 0")
        return found or [0.0]


@dataclass(frozen=True)
class Forecast:
    """What is known of a cell before it runs.

    Args:
        refusal: why it is not tried, None where it is.
        predicted_gib: of one device, None for a model whose shape is not in the OPT table.
    """

    refusal: str | None
    predicted_gib: float | None = None


def forecast(cell: Cell, settings: Settings, gpus: Sequence[hardware.Gpu]) -> Forecast:
    """Return whether a cell can run on these GPUs (none: a CPU), by the checks and the planner of train_clm.py."""
    args = cell.train_args(settings.flags)
    if found := problems(args, world_size=cell.num_gpus, num_gpus=len(gpus), gpus_per_node=cell.num_gpus):
        return Forecast("; ".join(found))
    if args.model_size is None:
        return Forecast(None)
    shape = OPT_SHAPES[args.model_size]
    choice = chooser.resolve_auto(
        args,
        planner.model_shape(shape),
        world_size=cell.num_gpus,
        gpu_gib=gpus[0].memory_gib if gpus else None,
        host_gib=hardware.host_memory_gib(),
        has_bf16=not gpus or (gpus[0].compute_capability or 8.0) >= 8.0,
        dropout=(shape.dropout if args.dropout is None else args.dropout) > 0,
    )
    return Forecast(plan_refusal(choice.plan, settings.skip_above), choice.plan.total_bytes / planner.GIB)


def plan_refusal(plan: planner.Plan, skip_above: float) -> str | None:
    """Return why a predicted memory rules a cell out.

    A GPU that overflows costs one cell, so only what is far beyond it is left out; a full host takes the machine down.
    """
    total, limit = plan.total_bytes / planner.GIB, (plan.limit_bytes or 0) / planner.GIB
    host, host_limit = plan.host_bytes / planner.GIB, (plan.host_limit_bytes or 0) / planner.GIB
    if host_limit and host > host_limit:
        return f"predicted to need {host:.1f} GiB of host memory, {host_limit:.1f} GiB are there"
    if limit and skip_above and total > skip_above * limit:
        return f"predicted to need {total:.2f} GiB, more than {skip_above:g} x the {limit:.2f} GiB (SKIP_ABOVE)"
    return None


def pretty_name(cell: Cell) -> str:
    """Return the cell in words, for the progress bar."""
    parts = [cell.model, cell.plugin, f"batch {cell.batch_size}", f"{cell.num_gpus} GPU{'s' * (cell.num_gpus > 1)}"]
    if cell.precision != "auto":
        parts.append(cell.precision)
    if cell.mem_cap_gb:
        parts.append(f"cap {cell.mem_cap_gb:g} GB")
    return " ".join(parts)
