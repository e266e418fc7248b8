"""What equivalence.py compares: the strategies, the factors that are varied under each, the cases. No torch import."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

GLOBAL_BATCH_SIZE, NUM_EPOCHS, SEED = 16, 2, 7
# Two epochs of ten steps. 151 is a prime: the last step of an epoch is short, under any batch and number of ranks.
# Filler rows would shift the dropout masks, so those cases get full batches.
NUM_TRAIN_ROWS, NUM_TRAIN_ROWS_DROPOUT, NUM_VALIDATION_ROWS = 151, 160, 29
ROW_LENGTH = 33
LEARNING_RATE, WEIGHT_DECAY, NUM_WARMUP_STEPS = 5e-3, 0.1, 2
# Of the gradients' own size: with Adam's usual 1e-8 the update hardly depends on the scale of a gradient, and a loss
# divided by the wrong number or a missing clip would not show. It also keeps rounding out of gradients near zero.
EPSILON = 1e-2
MAX_GRAD_NORM = 0.5
EVALUATION_BATCH_SIZES = (1, 3, 8)
WORLD_SIZES = (1, 2, 4)
# What `--quick` trains, by number of ranks.
QUICK_STRATEGIES = {
    1: ("DDP",),
    2: (
        *("DDP", "DDP fp16", "ZeRO 1", "ZeRO 2, optimizer on host", "Gemini", "Gemini, all on host"),
        *("tp 2", "pp 2", "pp 2, interleaved"),
    ),
    4: ("ZeRO 2", "tp 2 x dp 2, ZeRO 1", "pp 2 x dp 2"),
}

Factors = dict[str, Any]


@dataclass(frozen=True)
class Strategy:
    """A plugin, the flags that shape it, and the ranks it runs on."""

    name: str
    world_size: int
    flags: str
    precisions: tuple[str, ...]

    @property
    def plugin(self) -> str:
        """What stands after `--plugin`."""
        return self.flags.split()[1]

    @property
    def has_stages(self) -> bool:
        return "--pp" in self.flags

    @property
    def sees_whole_batch(self) -> bool:
        """Whether each rank's model sees what that of a single process sees, so that dropout masks can be the same."""
        return self.world_size == 1 or self.name == "tp 2"


@dataclass(frozen=True)
class Reference:
    """A run of the plain loop (reference.py)."""

    shape: str
    rows: str
    clips: bool
    dropout: float
    accumulation: int

    @property
    def name(self) -> str:
        return "-".join(map(str, astuple(self)))

    @property
    def texts(self) -> str:
        """The file of its rows."""
        return f"{self.rows}-{NUM_TRAIN_ROWS_DROPOUT if self.dropout else NUM_TRAIN_ROWS}.json"


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        shape: pre-norm, or 350m: post-norm with a narrower embedding.
        rows: packed, all of one length, or padded to the longest of a batch.
        evaluates: 0: train; else only evaluate the reference's trained weights with this batch on each GPU.
        fault: what is done wrong on purpose (equivalence_worker.FAULTS): the comparison has to notice.
        compiled: the decoder layers and the loss.
    """

    strategy: Strategy
    precision: str
    shape: str = "pre-norm"
    rows: str = "padded"
    accumulation: int = 1
    clips: bool = True
    recompute: bool = False
    dropout: float = 0.0
    evaluates: int = 0
    fault: str = ""
    compiled: bool = False

    @property
    def name(self) -> str:
        """What identifies the case, in files and tests."""
        words = [self.strategy.name, f"{self.strategy.world_size} ranks", *self.factors.values(), self.fault]
        return re.sub(r"[^\w.]+", "-", " ".join(filter(None, words)))

    @property
    def factors(self) -> dict[str, str]:
        """The settings as the words of the table; an empty one is off."""
        factors = {"precision": self.precision, "shape": self.shape, "rows": self.rows}
        if self.evaluates:
            return factors | {"evaluates": f"batch {self.evaluates}"}
        return factors | {
            "accumulation": f"x{self.accumulation}",
            "clipping": "clip" if self.clips else "",
            "recompute": "recompute" if self.recompute else "",
            "dropout": f"dropout {self.dropout}" if self.dropout else "",
            "compiled": "compiled" if self.compiled else "",
        }

    @property
    def reference(self) -> Reference:
        """The plain run that this one must equal: it knows no ranks, no precision and no recomputation.

        Nor does it accumulate, but for dropout, whose masks depend on the micro-batch.
        """
        if self.evaluates:
            return Reference(self.shape, self.rows, clips=True, dropout=0.0, accumulation=1)
        return Reference(self.shape, self.rows, self.clips, self.dropout, self.accumulation if self.dropout else 1)

    def flags(self, folder: Path) -> list[str]:
        """Return the command line of train_clm.py, for weights that lie in `folder`."""
        start = folder / "weights" / self.shape
        weights = folder / "references" / self.reference.name if self.evaluates else start
        batch_size = self.evaluates or GLOBAL_BATCH_SIZE // (self.strategy.world_size * self.accumulation)
        # A pipeline evaluates with the batch it was trained with.
        evaluation_batch_size = batch_size if self.strategy.has_stages or self.evaluates else 3
        flags = f"""{self.strategy.flags} --precision {self.precision} --allow_cpu_fp16 --compile {"on" if self.compiled else "off"}
            --dataset {"wikitext" if self.rows == "packed" else "netflix"} --block_size {ROW_LENGTH}
            --per_device_train_batch_size {batch_size} --per_device_eval_batch_size {evaluation_batch_size}
            --gradient_accumulation_steps {self.accumulation} --num_train_epochs {NUM_EPOCHS}
            --learning_rate {LEARNING_RATE} --num_warmup_steps {NUM_WARMUP_STEPS} --weight_decay {WEIGHT_DECAY}
            --adam_epsilon {EPSILON} --max_grad_norm {MAX_GRAD_NORM if self.clips else 0} --dropout {self.dropout}
            --gradient_checkpointing {"on" if self.recompute else "off"} --save_strategy no --export_dtype fp32
            --seed {SEED}"""
        evaluation = ["--eval_only"] if self.evaluates else []
        return [*flags.split(), *evaluation, "--model_name_or_path", str(weights)]


def strategies() -> Iterator[Strategy]:
    """Yield every strategy, by number of ranks."""
    for world_size in WORLD_SIZES:
        for name, flags, precisions in _strategies(world_size):
            yield Strategy(name, world_size, flags, precisions)


def _strategies(world_size: int) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    full, half = ("fp32", "bf16", "fp16"), ("bf16", "fp16")
    hybrid = "--plugin hybrid_parallel"
    if world_size < 4:
        yield "DDP", "--plugin torch_ddp", ("fp32", "bf16")
        yield "DDP fp16", "--plugin torch_ddp_fp16", ("fp16",)
    for stage in (1, 2):
        zero = f"--plugin low_level_zero --zero_stage {stage}"
        yield f"ZeRO {stage}", zero, full
        yield f"ZeRO {stage}, optimizer on host", f"{zero} --offload_optim_frac 1", full
    if world_size < 4:
        gemini = "--plugin gemini"
        yield "Gemini", gemini, half
        yield "Gemini, optimizer on host", f"{gemini} --offload_optim_frac 1", half
        yield "Gemini, all on host", f"{gemini} --offload_optim_frac 1 --offload_param_frac 1", half
    if world_size == 1:
        yield "tp 1", hybrid, full
    if world_size == 2:
        yield "dp 2", hybrid, full
        yield "tp 2", f"{hybrid} --tp 2", full
        yield "pp 2", f"{hybrid} --pp 2", full
        yield "pp 2, interleaved", f"{hybrid} --pp 2 --pp_schedule interleaved", full
    if world_size == 4:
        yield "tp 2 x pp 2", f"{hybrid} --tp 2 --pp 2", full
        yield "pp 4", f"{hybrid} --pp 4", full
        yield "tp 2 x dp 2", f"{hybrid} --tp 2", full
        yield "tp 2 x dp 2, ZeRO 1", f"{hybrid} --tp 2 --zero_stage 1", half
        yield "pp 2 x dp 2", f"{hybrid} --pp 2", full


def factors_of(strategy: Strategy) -> dict[str, tuple[Any, ...]]:
    """Return what is varied under a strategy, and the values."""
    return {
        "precision": strategy.precisions,
        "shape": ("pre-norm", "350m"),
        "rows": ("packed", "padded"),
        "accumulation": (1, 4),
        "clips": (False, True),
        "recompute": (False, True),
        "dropout": (0.0, 0.1) if strategy.sees_whole_batch else (0.0,),
    }


def covering(factors: Mapping[str, Sequence[Any]], seed: str) -> list[Factors]:
    """Return few combinations of factors, among which every pair of values of two factors stands.

    Greedy: always the combination with the most pairs that are new. `seed` decides between equals, so that strategies
    differ in the triples they meet.
    """
    candidates = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    random.Random(seed).shuffle(candidates)
    missing = set().union(*map(pairs, candidates))
    chosen = []
    while missing:
        best = max(candidates, key=lambda candidate: len(pairs(candidate) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairs(combination: Factors) -> set[Any]:
    """Return the pairs of (factor, value) that stand in a combination."""
    return set(itertools.combinations(combination.items(), 2))


def all_cases() -> list[Case]:
    """Return the whole matrix."""
    trained = [
        Case(strategy, **factors)
        for strategy in strategies()
        for factors in covering(factors_of(strategy), f"{strategy.name} {strategy.world_size}")
    ]
    return [*trained, *itertools.chain.from_iterable(map(evaluations, strategies())), *faults()]


def evaluations(strategy: Strategy) -> list[Case]:
    """Return a strategy's evaluations of the same weights, with different batches."""
    return [Case(strategy, strategy.precisions[0], evaluates=batch_size) for batch_size in EVALUATION_BATCH_SIZES]


def faults() -> Iterator[Case]:
    """Yield runs with a fault that the comparison must notice, to show that it can."""
    by_name = {(strategy.name, strategy.world_size): strategy for strategy in strategies()}
    one, two = by_name["ZeRO 1", 1], by_name["ZeRO 1", 2]
    for precision in ("fp32", "bf16"):
        yield Case(one, precision, accumulation=4, fault="mean of means")
        yield Case(one, precision, fault="no clipping")
    yield Case(two, "fp32", fault="mean of means")
    yield Case(one, "fp32", dropout=0.1, fault="other masks")
    yield Case(by_name["pp 2", 2], "fp32", fault="untied stages")


def quick_cases() -> list[Case]:
    """Return a slice: most strategies once, with all that is known to go wrong, some evaluations, all faults."""
    found = [strategy for strategy in strategies() if strategy.name in QUICK_STRATEGIES[strategy.world_size]]
    trained = [
        Case(strategy, strategy.precisions[0], shape, accumulation=2, recompute=shape == "350m")
        for strategy, shape in zip(found, itertools.cycle(("pre-norm", "350m")))
    ]
    trained += [Case(strategy, "bf16") for strategy in strategies() if strategy.name == "tp 2 x pp 2"]
    evaluated = [strategy for strategy in found if strategy.name in ("DDP", "pp 2", "pp 2 x dp 2")]
    return [*trained, *itertools.chain.from_iterable(map(evaluations, evaluated)), *faults()]


def compiled(cases: Sequence[Case]) -> list[Case]:
    """Return the cases whose layers and loss can be compiled, with that: training on rows of one length.

    Dropout is left out: a compiled graph draws other masks.
    """
    fitting = (case for case in cases if case.rows == "packed" and not case.evaluates)
    return list(dict.fromkeys(replace(case, compiled=True, dropout=0.0) for case in fitting))


def possible(cases: Sequence[Case], num_ranks: int) -> list[Case]:
    """Return the cases that a machine can run, each once.

    On GPUs dropout is left to fp32: CUDA draws other masks for other element sizes.

    Args:
        num_ranks: that have a GPU, or part of one; 0: the machine has none, and runs all cases on CPUs.
    """
    if num_ranks == 0:
        return list(cases)
    fitting = [case for case in cases if case.strategy.world_size <= num_ranks]
    return list(dict.fromkeys(case if case.precision == "fp32" else replace(case, dropout=0.0) for case in fitting))
