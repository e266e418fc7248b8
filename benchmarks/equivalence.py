"""Train the same tiny OPT under every plugin, compare each run with a plain PyTorch loop, and write one table.

Called by tests/equivalence.sh, whose `-h` tells more. The loop stands in reference.py, the cases in
equivalence_cases.py, what a rank does in equivalence_worker.py, the verdicts and the table in equivalence_report.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from benchmarks.equivalence_cases import (
    EPSILON,
    GLOBAL_BATCH_SIZE,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NUM_EPOCHS,
    NUM_TRAIN_ROWS,
    NUM_TRAIN_ROWS_DROPOUT,
    NUM_VALIDATION_ROWS,
    NUM_WARMUP_STEPS,
    ROW_LENGTH,
    SEED,
    WEIGHT_DECAY,
    Case,
    Reference,
    all_cases,
    compiled,
    possible,
    quick_cases,
    strategies,
)
from benchmarks.equivalence_report import (
    NOT_RUN,
    Circumstances,
    Differences,
    Found,
    Numbers,
    Report,
    Row,
    compare_evaluation,
    compare_training,
    failure,
    judge,
)

if TYPE_CHECKING:
    from benchmarks.reference import Recipe, Trained

ROOT = Path(__file__).resolve().parent.parent
TOKEN_OFFSET, VOCAB_SIZE = 4, 512  # a token a byte, above OPT's special ones; the vocabulary divides among ranks
# A process group that reports nothing for so long is taken for a deadlock; the slowest case takes half a minute.
SILENCE_S = 150.0
PROGRESS_S = 15.0  # between two lines that say how many cases have an answer
# A collective's kernel spins until the other rank's runs too. Of groups that share GPUs without MPS one has the GPU at a
# time, some 2 ms long, and each GPU takes its own turns: with many groups nearly every turn is spent on spinning.
MOST_GROUPS_A_GPU = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return 1 where a case differs or was not run, else 0."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # `run_cases` ends the ranks
    # What torch and the hub read when they are imported, in this process and in the ranks.
    os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import torch

    if args.ranks_per_gpu > 1:
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    num_ranks = args.ranks_per_gpu * torch.cuda.device_count()
    cases = possible(quick_cases() if args.quick else all_cases(), num_ranks)
    cases = [case for case in cases if re.search(args.only, case.name)]
    cases = compiled(cases) if args.compile else cases
    if not cases:
        raise SystemExit(f"--only {args.only}: no case is named like this")
    with tempfile.TemporaryDirectory(prefix="equivalence-") as folder:
        report = make_report(cases, args.train_file, Path(folder), args.jobs, args.ranks_per_gpu)
    table = args.output if args.output.suffix == ".md" else args.output / "equivalence.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(report.as_markdown(), encoding="utf-8")
    table.with_suffix(".json").write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    print(f"\n{report.summary()}\n\nwritten: {table} and .json")
    return 0 if report.holds else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="equivalence.sh", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a slice: most strategies once, under three minutes")
    parser.add_argument("--only", default="", metavar="REGEX", help="the cases whose name matches; off: all")
    parser.add_argument("--compile", action="store_true", help="only those with packed rows, layers and loss compiled")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="process groups at a time (default: 1)")
    parser.add_argument(
        "--ranks_per_gpu", type=positive, default=1, metavar="N", help="ranks that share a GPU (default: 1); NCCL 2.30"
    )
    parser.add_argument("--train_file", type=Path, default=ROOT / "LICENSE", help="text to train on, 7 kB or more")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/equivalence"), help="folder of the tables, or the .md file"
    )
    return parser.parse_args(argv)


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise ValueError("argparse says it better")
    return number


def make_report(cases: Sequence[Case], text: Path, folder: Path, jobs: int, ranks_per_gpu: int) -> Report:
    """Run the plain loop and the cases, and compare them.

    Args:
        folder: takes weights, rows and results.
        jobs: process groups at a time.
        ranks_per_gpu: ranks of a process group that share a GPU.
    """
    started = time.monotonic()
    quiet()
    write_weights(folder / "weights")
    write_texts(text, folder)
    plain = {reference: train_reference(reference, folder) for reference in {case.reference: None for case in cases}}
    found = run_cases(cases, folder, jobs, ranks_per_gpu)
    rows = [make_row(case, found.get(case.name), plain[case.reference], folder) for case in cases]
    rounding = measure_rounding(folder)
    return Report(circumstances(text, ranks_per_gpu, started, rounding), rows)


def quiet() -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)  # as in the ranks; the model is too small for more


def circumstances(text: Path, ranks_per_gpu: int, started: float, rounding: Differences) -> Circumstances:
    """Return what the reader of the table must know."""
    import torch

    import report

    num_gpus = torch.cuda.device_count()
    device = f"{num_gpus} x {torch.cuda.get_device_name()}, NCCL" if num_gpus else f"{os.cpu_count()} CPU cores, gloo"
    if num_gpus and ranks_per_gpu > 1:
        device += f", up to {ranks_per_gpu} ranks a GPU,"
    return Circumstances(
        command=shlex.join(["bash", "tests/equivalence.sh", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
        device=device,
        versions=report.versions(),
        commit=report.git_commit(),
        text=f"{text.name}, a token a byte",
        minutes=(time.monotonic() - started) / 60,
        rounding=rounding,
    )


# --- weights, rows and the plain runs ---------------------------------------------------------------------------------


def write_weights(folder: Path) -> None:
    """Write the random weights that all runs of a shape start from. No bias or LayerNorm is left at 0 or 1."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    for shape in ("pre-norm", "350m"):
        config = OPTConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=256,
            max_position_embeddings=64,
            word_embed_proj_dim=64 if shape == "pre-norm" else 32,
            do_layer_norm_before=shape == "pre-norm",
            dropout=0.0,
        )
        torch.manual_seed(SEED)
        model = OPTForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(folder / shape)


def write_texts(text: Path, folder: Path) -> None:
    """Write the rows of each kind as `{split: rows of token ids}`, a file for each number of training rows."""
    for rows, num_train in itertools.product(("packed", "padded"), (NUM_TRAIN_ROWS, NUM_TRAIN_ROWS_DROPOUT)):
        cut = cut_rows(text.read_bytes(), num_train + NUM_VALIDATION_ROWS, uneven=rows == "padded")
        splits = {"train": cut[:num_train], "validation": cut[num_train:]}
        (folder / f"{rows}-{num_train}.json").write_text(json.dumps(splits))


def cut_rows(text: bytes, num_rows: int, *, uneven: bool) -> list[list[int]]:
    """Return consecutive pieces of the text, a token a byte: of ROW_LENGTH, or of 1 to ROW_LENGTH tokens.

    Raises:
        SystemExit: the text is too short.
    """
    lengths = random.Random(SEED)
    rows = []
    for _ in range(num_rows):
        length = lengths.randint(1, ROW_LENGTH) if uneven else ROW_LENGTH
        if len(text) < length:
            raise SystemExit(f"--train_file: too short; {num_rows * ROW_LENGTH} bytes are enough")
        rows.append([byte + TOKEN_OFFSET for byte in text[:length]])
        text = text[length:]
    return rows


def train_reference(reference: Reference, folder: Path, *, dtype: str = "float32") -> Trained:
    """Run the plain loop, and write its weights to `references/<name>`, in fp64 to `<dtype>/<name>`."""
    import torch

    from benchmarks.reference import train

    texts = json.loads((folder / reference.texts).read_text())
    return train(
        folder / "weights" / reference.shape,
        ordered(texts["train"]),
        [torch.tensor(row) for row in texts["validation"]],
        recipe(reference, dtype),
        folder / ("references" if dtype == "float32" else dtype) / reference.name,
    )


def recipe(reference: Reference, dtype: str) -> Recipe:
    from benchmarks.reference import Recipe

    return Recipe(
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        epsilon=EPSILON,
        num_warmup_steps=NUM_WARMUP_STEPS,
        max_grad_norm=MAX_GRAD_NORM if reference.clips else 0.0,
        dropout=reference.dropout,
        micro_batch_size=GLOBAL_BATCH_SIZE // reference.accumulation,
        seed=SEED + 1,  # train_clm.py's seed + 1 + the data-parallel rank, for its masks
        dtype=dtype,
    )


def ordered(rows: list[list[int]]) -> list[list[Any]]:
    """Return the rows of each step of each epoch: the project's order for one process."""
    from benchmarks.equivalence_worker import FixedRows
    from data import FILLER, EpochSampler, batches

    texts = FixedRows(rows, "train")
    uneven = texts.lengths is not None
    sampler = EpochSampler(texts, 1, 0, True, seed=SEED, batch_size=GLOBAL_BATCH_SIZE, group_by_length=uneven)
    epochs = []
    for epoch in range(NUM_EPOCHS):
        sampler.set_epoch(epoch)
        order = [texts[index] for index in sampler if index != FILLER]
        epochs.append(list(batches(order, GLOBAL_BATCH_SIZE)))
    return epochs


def measure_rounding(folder: Path) -> Differences:
    """Return how far the plain loop in fp64 is from that in fp32."""
    reference = Reference("pre-norm", "padded", clips=True, dropout=0.0, accumulation=1)
    single, double = (numbers(train_reference(reference, folder, dtype=dtype)) for dtype in ("float32", "float64"))
    weights = compare_weights(folder / "float64" / reference.name, folder / "references" / reference.name)
    return compare_training(Case(next(strategies()), "fp32"), double, single, weights)


# --- the processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Cases of one world size that process groups work off one after the other.

    Args:
        number: of the share among those of its world size.
        environment: of its processes: which GPUs they see.
        ranks_per_gpu: ranks that share a GPU.
    """

    cases: list[Case]
    number: int
    environment: dict[str, str]
    ranks_per_gpu: int = 1

    @property
    def world_size(self) -> int:
        return self.cases[0].strategy.world_size

    @property
    def name(self) -> str:
        return f"{self.world_size}-ranks-{self.number}"


def deal(cases: Sequence[Case], jobs: int, gpus: Sequence[str], ranks_per_gpu: int = 1) -> list[Share]:
    """Return the cases as shares, up to `jobs` a world size, the slowest first: those of many ranks.

    Args:
        gpus: what CUDA_VISIBLE_DEVICES calls the GPUs; each process group gets as many as it needs, in turn.
        ranks_per_gpu: ranks of a group that share one.
    """
    shares = []
    for world_size in sorted({case.strategy.world_size for case in cases}, reverse=True):
        own = [case for case in cases if case.strategy.world_size == world_size]
        limit = jobs
        width = -(-world_size // ranks_per_gpu)  # GPUs of a group
        if gpus and world_size > 1:
            limit = min(jobs, MOST_GROUPS_A_GPU * (len(gpus) // width))
        for number in range(min(limit, len(own))):
            taken = [gpus[(number * width + index) % len(gpus)] for index in range(width)] if gpus else []
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(taken)} if gpus else {}
            shares.append(Share(own[number::limit], number, environment, ranks_per_gpu))
    return shares


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls the GPUs that this process sees."""
    import torch

    numbers = [str(number) for number in range(torch.cuda.device_count())]
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[: len(numbers)] or numbers


def run_cases(cases: Sequence[Case], folder: Path, jobs: int, ranks_per_gpu: int = 1) -> dict[str, Found]:
    """Return what each case left, by name: numbers, or an `error`; nothing of those that Ctrl-C or SIGTERM cut off.

    Args:
        jobs: process groups at a time.
        ranks_per_gpu: ranks of a process group that share a GPU.
    """
    stop, shares = Event(), deal(cases, jobs, visible_gpus(), ranks_per_gpu)
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run_share, share, folder, stop) for share in shares]
        try:
            while wait(running, PROGRESS_S, FIRST_EXCEPTION).not_done and not any(map(failed, running)):
                print(f"{num_answers(folder)} of {len(cases)} cases", file=sys.stderr, flush=True)
        except (KeyboardInterrupt, SystemExit):
            print("interrupted: ending the ranks; the table will lack cases", file=sys.stderr, flush=True)
        finally:
            stop.set()
    return {name: answer for share in running for name, answer in share.result().items()}


def failed(share: Future[dict[str, Found]]) -> bool:
    return share.done() and share.exception() is not None


def num_answers(folder: Path) -> int:
    """Return how many cases have left an answer so far."""
    lines = [line for file in folder.glob("groups/*/found.jsonl") for line in file.read_text().splitlines()]
    return len({json.loads(line)["name"] for line in lines if line.endswith("}")})


def run_share(share: Share, folder: Path, stop: Event) -> dict[str, Found]:
    """Run the cases of a share: in one process group if all goes well, else in another one after each failure."""
    found: dict[str, Found] = {}
    left, attempts = share.cases, itertools.count()
    while left and not stop.is_set():
        group = folder / "groups" / f"{share.name}-{next(attempts)}"
        found |= run_group(replace(share, cases=left), folder, group, stop)
        left = [case for case in left if case.name not in found]
        if left and not stop.is_set():
            print(f"{group.name}: a case failed, {len(left)} left for another group", file=sys.stderr, flush=True)
    return found


def run_group(share: Share, folder: Path, group: Path, stop: Event) -> dict[str, Found]:
    """Run cases one after the other, up to the first that fails or falls silent, which gets an `error`.

    Args:
        group: the folder of this process group's orders, answers and log.
    """
    orders = [
        {"name": case.name, "flags": case.flags(folder), "texts": case.reference.texts, "fault": case.fault}
        for case in share.cases
    ]
    group.mkdir(parents=True)
    (group / "orders.json").write_text(json.dumps(orders))
    results, log = group / "found.jsonl", group / "log.txt"
    results.touch()
    words = (share.world_size, share.ranks_per_gpu, folder, group)
    command = [sys.executable, "-m", "benchmarks.equivalence_worker", *map(str, words)]
    with open(log, "w", encoding="utf-8") as output:
        end = watch(command, results, output, share.environment, stop)
    found: dict[str, Found] = {}
    for line in results.read_text().splitlines():
        # The first rank to fail knows why; the others only lost their connection.
        found.setdefault(json.loads(line)["name"], json.loads(line))
    nobody_failed = not any("error" in entry for entry in found.values())
    if len(found) < len(share.cases) and nobody_failed and not stop.is_set():
        running = share.cases[len(found)].name
        found[running] = {"name": running, "error": f"{log.read_text(errors='replace')[-2000:]}\n{end}"}
    return found


def watch(command: list[str], results: Path, output: Any, environment: dict[str, str], stop: Event) -> str:
    """Run a command, and end it and its ranks at `stop`, or when the file `results` has not grown for SILENCE_S.

    Returns:
        How it ended, in words.
    """
    # NVML counts the GPUs: CUDA's own answer would keep forked ranks from using them.
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    environment = os.environ | fixed | environment
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
    ) as process:
        try:
            size, since = 0, time.monotonic()
            while process.poll() is None:
                if stop.wait(0.2):
                    return "interrupted"
                if results.stat().st_size > size:
                    size, since = results.stat().st_size, time.monotonic()
                elif time.monotonic() - since > SILENCE_S:
                    return f"deadlock: no answer for {SILENCE_S:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ranks that hang outlive the process that forked them
    return f"the process group ended with {process.returncode}"


# --- the comparison ---------------------------------------------------------------------------------------------------


def make_row(case: Case, found: Found | None, plain: Trained, folder: Path) -> Row:
    """Return what a case has come to; None: it was interrupted."""
    if found is None:
        return Row(case, Differences(), NOT_RUN)
    if "error" in found:
        return failure(case, found["error"])
    if case.evaluates:
        differences = compare_evaluation(found["evaluations"][-1], plain.evaluations[-1])
    else:
        weights = compare_weights(folder / "finals" / case.name, folder / "references" / case.reference.name)
        own = Numbers(found["losses"], found["grad_norms"], found["evaluations"], found["num_skipped"])
        differences = compare_training(case, own, numbers(plain), weights)
    return Row(case, differences, judge(case, differences, found["chunk_shares"]), found["seconds"])


def numbers(trained: Trained) -> Numbers:
    return Numbers(trained.losses, trained.grad_norms, trained.evaluations)


def compare_weights(final: Path, expected: Path) -> tuple[float, str]:
    """Return the largest relative difference between the tensors of two Hugging Face folders, and that tensor."""
    from transformers import OPTForCausalLM

    weights, others = (OPTForCausalLM.from_pretrained(path).state_dict() for path in (final, expected))
    differences = {
        name: ((weights[name].double() - other.double()).abs().max() / other.double().abs().max()).item()
        for name, other in others.items()
    }
    tensor = max(differences, key=lambda name: differences[name])
    return differences[tensor], tensor


if __name__ == "__main__":
    sys.exit(main())
