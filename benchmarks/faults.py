"""Break real runs of `tiny` on two processes in every way we could think of, and write the table of what was lost.

    python -m benchmarks.faults                    # every fault, 20 of them a SIGKILL: 18 to 31 minutes on two cores
    python -m benchmarks.faults --only sigkill     # the faults whose name contains a word
    python -m benchmarks.faults --ranks 4 --times 1  # on a machine with GPUs: on four of them, each fault once

Each run starts through run_clm_synthetic.sh, as a user starts it. After a fault the run is resumed from `last`, and its
remaining losses must be bit for bit those of a run that nobody disturbed. Needs Linux (/proc); a full disk and a
read-only folder are small tmpfs mounts, which take root: without it the first is skipped, with the reason.

Writes outputs/faults/faults.md and faults.json; exit code 1 where a run lost more than it may.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent

NUM_STEPS, SAVE_STEPS = 32, 4
KILLS_A_RUN = 5
FLAGS = (
    f"--block_size 32 --max_train_steps {NUM_STEPS} --save_strategy steps --save_steps {SAVE_STEPS} "
    "--logging_steps 1 --no-save_final"
)
PLUGINS = (
    "--plugin torch_ddp --dropout 0.1",
    "--plugin low_level_zero --precision bf16",
    "--plugin gemini",
    "--plugin hybrid_parallel --tp 2",
)
LIMIT_S = 60.0  # from a fault until no process of the run is left
START_LIMIT_S = 180.0  # until the event a fault waits for
MARK = "CLM_FAULT_RUN"  # in the environment of every process of a run, so that none is overlooked
CHECKPOINT_MIB = 41  # of tiny in fp32 with its two moments

BAD_STEP = 2 * SAVE_STEPS
# Planted through sitecustomize.py into rank 1, in the embeddings of tokens and positions. A schedule counts its making as a
# step, so that the first step is the one between its first and second.
HARM_MODULE = """import os
if os.environ.get("RANK") == "1":
    import torch

    advance, forward, steps = torch.optim.lr_scheduler.LRScheduler.step, torch.nn.Embedding.forward, []

    def counted(self, *epoch):
        steps.append(1)
        return advance(self, *epoch)

    def harmed(self, *tokens):
        if len(steps) {when}:
            {harm}
        return forward(self, *tokens)

    torch.optim.lr_scheduler.LRScheduler.step, torch.nn.Embedding.forward = counted, harmed
"""
RAISE = 'raise RuntimeError("planted")'
NAN_GRADIENT = """output = forward(self, *tokens)
            output.register_hook(lambda gradient: gradient * float("nan"))
            return output"""
NAN = 'return forward(self, *tokens) * float("nan")'
STAND_STILL = "__import__('time').sleep(3600)"
SLOW = "__import__('time').sleep(0.5)"  # long beside a step of a machine that is busy, too
SLOW_STEPS = 10  # three left out, three in a row that are slow, told a step later; and some more
HANG_TIMEOUT_S = 6


def harm_in_step(harm: str, step: int = BAD_STEP) -> str:
    """Return the module that does harm to rank 1, in the embeddings of a step."""
    return HARM_MODULE.format(when=f"== {step}", harm=harm)


def harm_in_all_steps(harm: str) -> str:
    return HARM_MODULE.format(when="> 0", harm=harm)


class NotPossible(Exception):
    """This machine does not let us inject the fault."""


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Args:
        code: of the launcher; None where it had to be killed after LIMIT_S.
        seconds: from the fault until no process was left.
        orphans: processes still there LIMIT_S after the fault.
    """

    code: int | None
    seconds: float
    orphans: int
    output: str


class Run:
    """A launcher, and by their environment all processes below it.

    Args:
        folder: its --output_dir.
        planted: source of a sitecustomize.py for every Python of the run.
        max_restarts: how often torchrun may start the ranks again.

    Attributes:
        num_ranks: of every run.
    """

    num_ranks: ClassVar[int] = 2

    def __init__(self, folder: Path, *flags: str, planted: str = "", max_restarts: int = 0) -> None:
        self.folder = folder
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        # Beside the folder: the disk under it may be full.
        self._scratch = Path(tempfile.mkdtemp(prefix="faults-"))
        (self._scratch / "sitecustomize.py").write_text(planted)
        launcher = ["bash", str(ROOT / "run_clm_synthetic.sh"), "2", "0", "tiny", str(self.num_ranks)]
        command = [*launcher, *FLAGS.split(), *flags]
        with open(self._scratch / "output", "w") as output:
            self.process = subprocess.Popen(
                [*command, "--output_dir", str(folder)],
                env=self._environment(bool(planted)) | {"MAX_RESTARTS": str(max_restarts)},
                stdout=output,
                stderr=subprocess.STDOUT,
                # A shell cannot trap what it was started to ignore, as in `python -m benchmarks.faults &`.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.since = time.monotonic()
        atexit.register(self._kill)  # where we are stopped ourselves

    def _environment(self, is_planted: bool) -> dict[str, str]:
        name, value = self._mark.split("=")
        own = {"SKIP_SETUP": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", name: value}
        if is_planted:
            own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self._scratch), os.environ.get("PYTHONPATH")]))
        return os.environ | own

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the environment of each process of this run that is alive."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").split("\0")
                if self._mark in words:
                    found[int(path.parent.name)] = dict(word.split("=", 1) for word in words if "=" in word)
        return found

    def rank(self, rank: int) -> int:
        """Return the process id of a rank."""
        return next(pid for pid, env in self.processes().items() if env.get("RANK") == str(rank))

    def torchrun(self) -> int:
        """Return the process id of torchrun."""
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.processes()}
        return next(pid for pid, command in commands.items() if b"torch.distributed.run" in command.split(b"\0"))

    def wait_for(self, event: Callable[[], bool]) -> None:
        """Wait until the event, and take its time as that of the fault."""
        end = time.monotonic() + START_LIMIT_S
        while not event():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the run ended before its fault:\n{self.finish().output}")
            time.sleep(0.001)
        self.since = time.monotonic()

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged."""
        self.wait_for(lambda: last_step(self.folder) >= step)

    def wait_for_more_than(self, num_lines: int) -> None:
        """Wait until more steps than `num_lines` are logged."""
        self.wait_for(lambda: len(logged_losses(self.folder)) > num_lines)

    def wait_for_save(self, step: int | None = None) -> None:
        """Wait until a checkpoint, of this step if one is given, is being written."""
        pattern = ".step-*.tmp" if step is None else f".step-{step:08d}.tmp"
        self.wait_for(lambda: any((self.folder / "checkpoints").glob(pattern)))

    def finish(self, limit_s: float = LIMIT_S) -> Ended:
        """Wait for the launcher and everything below it; what is left after the limit is counted and killed."""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout=limit_s)
        while (left := self.processes()) and time.monotonic() < self.since + limit_s:
            time.sleep(0.01)
        seconds = time.monotonic() - self.since
        self._kill()
        self.process.wait()
        atexit.unregister(self._kill)
        output = (self._scratch / "output").read_text(errors="replace")
        shutil.rmtree(self._scratch)
        return Ended(code, seconds, len(left), output)

    def _kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def logged_losses(folder: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of each step in metrics.jsonl, those of all runs into the folder."""
    path = folder / "metrics.jsonl"
    whole_lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(line["step"], line["loss"]) for line in map(json.loads, whole_lines) if "loss" in line]


def last_step(folder: Path) -> int:
    """Return the last step that was logged, 0 without one."""
    logged = logged_losses(folder)
    return logged[-1][0] if logged else 0


def checkpoints(folder: Path) -> list[int]:
    """Return the steps of the checkpoints, oldest first."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


# --- one trial --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A fault injected once.

    Args:
        fault: row of the table.
        how: plugin, and where the fault hit.
        lost: steps that the resumed run had to repeat; None where nothing was resumed.
        problems: what should not have happened.
    """

    fault: str
    how: str
    code: int | None
    seconds: float
    orphans: int
    lost: int | None
    problems: tuple[str, ...]

    def with_problems(self, problems: Iterable[str]) -> Trial:
        """Return the trial with more problems."""
        return replace(self, problems=(*self.problems, *problems))


@dataclass
class Bench:
    """Where the runs are, the draw of random moments, and the losses of undisturbed runs by plugin."""

    folder: Path
    draw: random.Random
    references: dict[str, Path] = field(default_factory=dict)
    number: int = 0

    def new_folder(self) -> Path:
        self.number += 1
        return self.folder / f"run-{self.number:03d}"

    def reference(self, plugin: str) -> Path:
        """Return the folder of the plugin's undisturbed run."""
        if plugin not in self.references:
            folder = self.new_folder()
            ended = Run(folder, *plugin.split()).finish(START_LIMIT_S)
            assert ended.code == 0, ended.output
            self.references[plugin] = folder
        return self.references[plugin]

    def judge(
        self,
        fault: str,
        how: str,
        plugin: str,
        folder: Path,
        ended: Ended,
        *,
        codes: Sequence[int],
        says: str = "",
        may_lose: int = SAVE_STEPS,
    ) -> Trial:
        """Check the end of a disturbed run, and resume it."""
        problems = list(end_problems(ended, codes, says))
        done = last_step(folder)
        lost, found = self.resume(plugin, folder, done)
        if lost is None or lost > may_lose:
            found.append(f"{lost} steps lost")
        return Trial(fault, how, ended.code, ended.seconds, ended.orphans, lost, (*problems, *found))

    def resume(self, plugin: str, folder: Path, done: int, *, says: str = "") -> tuple[int | None, list[str]]:
        """Run the rest from `last`.

        Args:
            done: steps the disturbed run had logged.

        Returns:
            The steps it had to repeat, and what is wrong with them.
        """
        ended = Run(folder, *plugin.split(), "--resume_from_checkpoint", "last").finish(START_LIMIT_S)
        if problems := list(end_problems(ended, [0], says)):
            return None, problems
        again = result(folder)
        expected = result(self.reference(plugin))["train_loss"][again["resumed_from"] :]
        if again["train_loss"] != expected:
            problems.append("the resumed losses differ")
        if again["resumed_from"] == NUM_STEPS:
            problems.append("nothing was left to resume")
        if left := list((folder / "checkpoints").glob(".*")):
            problems.append(f"left behind: {left}")
        return max(0, done - again["resumed_from"]), problems


def end_problems(ended: Ended, codes: Sequence[int], says: str = "") -> Iterator[str]:
    """Yield what is wrong with the end of a run, its output with it."""
    if ended.code not in codes:
        yield f"exit code {ended.code}, expected {codes}:\n{ended.output}"
    if ended.seconds > LIMIT_S and ended.code != 0:
        yield f"ended after {ended.seconds:.0f} s"
    if ended.orphans:
        yield f"{ended.orphans} orphans"
    if says not in ended.output:
        yield f"does not say {says!r}:\n{ended.output}"


# --- the faults -------------------------------------------------------------------------------------------------------


def sigkills(bench: Bench, plugin: str, number: int, times: int) -> list[Trial]:
    """Kill a run, resume it, kill that one too, and so on; the last one is left to end.

    Kills in training and in a save take turns, each at a random moment.

    Args:
        number: of the plugin, so that every plugin and rank meets both kinds.
    """
    folder, trials = bench.new_folder(), []
    run = Run(folder, *plugin.split())
    for index in range(times):
        fault, how = sigkill(bench, run, index, in_training=(index + number) % 2 == 0)
        ended, before = run.finish(), logged_losses(folder)
        run = Run(folder, *plugin.split(), "--resume_from_checkpoint", "last")
        run.wait_for_more_than(len(before))
        first_step = logged_losses(folder)[len(before)][0]
        lost, problems = before[-1][0] - first_step + 1, list(end_problems(ended, [1]))
        if not 0 <= lost <= SAVE_STEPS:
            problems.append(f"{lost} steps lost")
        trials.append(Trial(fault, f"{plugin}, {how}", ended.code, ended.seconds, ended.orphans, lost, tuple(problems)))
    problems = [*end_problems(run.finish(START_LIMIT_S), [0]), *differences(folder, bench.reference(plugin))]
    return [*trials[:-1], trials[-1].with_problems(problems)]


def sigkill(bench: Bench, run: Run, index: int, *, in_training: bool) -> tuple[str, str]:
    """Kill a random rank at a random moment of the `index`-th window of steps; return the fault, and where it hit."""
    # After the first save: a run without any checkpoint starts anew.
    first, rank = SAVE_STEPS + 5 * index, bench.draw.randrange(Run.num_ranks)
    steps = range(first, first + 5)
    if in_training:
        step = bench.draw.choice(steps[1:])
        run.wait_for_step(step)
        delay_s = kill(run, rank, bench.draw.uniform(0, 0.03))
        return "SIGKILL of a rank in training", f"rank {rank}, {1e3 * delay_s:.0f} ms after step {step}"
    step = bench.draw.choice([step for step in steps if step % SAVE_STEPS == 0 and step > SAVE_STEPS])
    run.wait_for_save(step)
    delay_s = kill(run, rank, bench.draw.uniform(0, 0.15))
    where = "after" if step in checkpoints(run.folder) else "before"
    how = f"rank {rank}, {1e3 * delay_s:.0f} ms into the save of step {step}, {where} its rename"
    return "SIGKILL of a rank during a save", how


def differences(folder: Path, reference: Path) -> Iterator[str]:
    """Yield what differs between all losses ever logged in a folder and those of the undisturbed run."""
    if not (folder / "result.json").exists():
        yield "no result"
        return
    expected = dict(logged_losses(reference))
    logged = logged_losses(folder)
    if wrong := [step for step, loss in logged if loss != expected[step]]:
        yield f"the losses differ at steps {wrong}"
    if {step for step, _ in logged} != set(expected):
        yield "steps are missing"
    if result(folder)["eval"] != result(reference)["eval"]:
        yield "the evaluation differs"
    if left := list((folder / "checkpoints").glob(".*")):
        yield f"left behind: {left}"


def kill(run: Run, rank: int, delay_s: float) -> float:
    """SIGKILL a rank after a delay, and return the time since the event in seconds."""
    pid, started = run.rank(rank), run.since
    time.sleep(max(0.0, started + delay_s - time.monotonic()))
    run.since = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return run.since - started


def sigkill_with_restart(bench: Bench, number: int) -> Trial:
    """Kill a rank of a run that may be restarted: it goes on by itself."""
    plugin, rank = PLUGINS[number % len(PLUGINS)], bench.draw.randrange(Run.num_ranks)
    run = Run(bench.new_folder(), *plugin.split(), max_restarts=1)
    run.wait_for_step(SAVE_STEPS + 2)
    kill(run, rank, bench.draw.uniform(0, 0.03))
    ended = run.finish(START_LIMIT_S)
    problems = [*end_problems(ended, [0]), *differences(run.folder, bench.reference(plugin))]
    lost = len(logged_losses(run.folder)) - NUM_STEPS
    if not 0 <= lost <= SAVE_STEPS:
        problems.append(f"{lost} steps lost")
    fault, how = "SIGKILL of a rank, MAX_RESTARTS=1", f"{plugin}, rank {rank}"
    return Trial(fault, how, ended.code, ended.seconds, ended.orphans, lost, tuple(problems))


def sigterm_to_the_launcher(bench: Bench, number: int) -> Trial:
    return signalled(bench, "SIGTERM to the launcher", lambda run: run.process.pid)


def sigterm_to_torchrun(bench: Bench, number: int) -> Trial:
    return signalled(bench, "SIGTERM to torchrun", lambda run: run.torchrun())


def signalled(bench: Bench, fault: str, target: Callable[[Run], int]) -> Trial:
    """Ask a run to end at a random step: it loses nothing."""
    plugin, step = bench.draw.choice(PLUGINS), bench.draw.randint(1, NUM_STEPS // 2)
    run = Run(bench.new_folder(), *plugin.split())
    run.wait_for_step(step)
    os.kill(target(run), signal.SIGTERM)
    how = f"{plugin}, after step {step}"
    return bench.judge(fault, how, plugin, run.folder, run.finish(), codes=[143], may_lose=0)


def sigterm_again_during_the_save(bench: Bench, number: int) -> Trial:
    """Ask to end, and once more while the checkpoint of that end is written."""
    plugin = bench.draw.choice(PLUGINS)
    run = Run(bench.new_folder(), *plugin.split())
    run.wait_for_step(SAVE_STEPS + 1)
    run.process.terminate()
    run.wait_for_save()
    run.process.terminate()
    fault = "SIGTERM again during the save"
    return bench.judge(fault, plugin, plugin, run.folder, run.finish(), codes=[143], may_lose=0)


def ctrl_c_twice(bench: Bench, number: int) -> Trial:
    """Send SIGINT to the launcher twice; a terminal sends it to no one else, torchrun has its own process group."""
    plugin, gap_s = bench.draw.choice(PLUGINS), bench.draw.uniform(0, 0.1)
    run = Run(bench.new_folder(), *plugin.split())
    run.wait_for_step(SAVE_STEPS + 2)
    run.process.send_signal(signal.SIGINT)
    time.sleep(gap_s)
    with contextlib.suppress(ProcessLookupError):
        run.process.send_signal(signal.SIGINT)
    how = f"{plugin}, {1e3 * gap_s:.0f} ms apart"
    return bench.judge("Ctrl-C twice", how, plugin, run.folder, run.finish(), codes=[130])


def full_disk(bench: Bench, number: int) -> Trial:
    """Train onto a disk that holds two checkpoints and a half, then give it room."""
    plugin = PLUGINS[number % len(PLUGINS)]
    with tmpfs(bench.new_folder(), size_mib=int(2.5 * CHECKPOINT_MIB)) as disk:
        run = Run(disk / "run", *plugin.split())
        run.wait_for_save(3 * SAVE_STEPS)
        ended = run.finish()
        left = [f"half-written: {path}" for path in (disk / "run" / "checkpoints").glob(".*")]
        remount(disk, f"size={2 * NUM_STEPS * CHECKPOINT_MIB}m")
        says = f"step-{3 * SAVE_STEPS:08d} could not be written"
        trial = bench.judge("full disk", plugin, plugin, disk / "run", ended, codes=[1], says=says)
        told = [f"told {count} times" for count in [ended.output.count("could not be written")] if count != 1]
        return trial.with_problems([*left, *told])


def read_only_folder(bench: Bench, number: int) -> Trial:
    """Refuse to start where nothing can be written."""
    with unwritable(bench.new_folder()) as (folder, how):
        ended = Run(folder / "run").finish(START_LIMIT_S)
    return refused("read-only output folder", how, ended, "cannot be written")


def folder_turns_read_only(bench: Bench, number: int) -> Trial:
    """Take the right to write checkpoints away while the run trains; its other files stay open for writing."""
    plugin, folder = PLUGINS[0], bench.new_folder()
    with tmpfs(folder / "checkpoints", size_mib=2 * NUM_STEPS * CHECKPOINT_MIB) as disk:
        run = Run(folder, *plugin.split(), "--overwrite_output_dir")
        run.wait_for_step(SAVE_STEPS + 1)
        while not remount(disk, "ro"):  # a file is open for writing just now
            assert run.process.poll() is None, run.finish().output
            time.sleep(0.001)
        run.since = time.monotonic()
        ended = run.finish()
        remount(disk, "rw")
        fault = "checkpoint folder turns read-only while training"
        return bench.judge(fault, plugin, plugin, folder, ended, codes=[1], says="could not be written")


def folder_in_use(bench: Bench, number: int) -> Trial:
    """Start a second run in the folder of one that trains: as if it were new, to go on from it, to write over it."""
    endless = ("--save_total_limit", "1", "--max_train_steps", "100000")
    intruder = ((), ("--resume_from_checkpoint", "last"), ("--overwrite_output_dir",))[number % 3]
    first = Run(bench.new_folder(), *endless)
    first.wait_for_step(SAVE_STEPS + 1)
    second = Run(first.folder, *endless, *intruder).finish(START_LIMIT_S)
    problems = [] if first.process.poll() is None else ["the first run ended"]
    first.process.terminate()
    problems += end_problems(first.finish(), [143])
    how = f"while the other trains; {' '.join(intruder) or 'no flag'}"
    trial = refused("output folder in use by another run", how, second, "in use by a run that is still alive")
    return trial.with_problems(problems)


def folder_overwritten(bench: Bench, number: int) -> Trial:
    """With --overwrite_output_dir nothing of the run before may be taken for this one's."""
    folder = bench.new_folder()
    shutil.copytree(bench.reference(PLUGINS[0]), folder)
    fewer = ("--max_train_steps", str(SAVE_STEPS + 1), "--overwrite_output_dir")
    ended = Run(folder, *PLUGINS[0].split(), *fewer).finish(START_LIMIT_S)
    problems = list(end_problems(ended, [0]))
    if checkpoints(folder) != [SAVE_STEPS] or len((folder / "metrics.jsonl").read_text().splitlines()) > SAVE_STEPS + 2:
        problems.append(f"what is left is not this run's: {checkpoints(folder)}")
    fault, how = "output folder of another run, --overwrite_output_dir", "after the other ended"
    return Trial(fault, how, ended.code, ended.seconds, ended.orphans, None, tuple(problems))


def refused(fault: str, how: str, ended: Ended, says: str) -> Trial:
    problems = tuple(end_problems(ended, [2], says))
    if "Traceback" in ended.output:
        problems = (*problems, f"a traceback:\n{ended.output}")
    return Trial(fault, how, ended.code, ended.seconds, ended.orphans, None, problems)


def flipped_bit(bench: Bench, number: int) -> Trial:
    def flip(path: Path) -> str:
        content = bytearray(path.read_bytes())
        position, bit = bench.draw.randrange(len(content)), bench.draw.randrange(8)
        content[position] ^= 1 << bit
        path.write_bytes(content)
        return f"bit {bit} of byte {position:,}"

    return damaged(bench, "one bit of a shard flipped", PLUGINS[number % len(PLUGINS)], flip)


def truncated_shard(bench: Bench, number: int) -> Trial:
    def truncate(path: Path) -> str:
        size = bench.draw.randrange(path.stat().st_size)
        os.truncate(path, size)
        return f"after {size:,} bytes"

    return damaged(bench, "a shard truncated", PLUGINS[number % len(PLUGINS)], truncate)


def damaged(bench: Bench, fault: str, plugin: str, harm: Callable[[Path], str]) -> Trial:
    """Damage the newest checkpoint: by name it is refused, and `last` falls back to the one before."""
    folder = bench.new_folder()
    shutil.copytree(bench.reference(plugin), folder)
    newest = folder / "checkpoints" / f"step-{NUM_STEPS:08d}"
    shard = bench.draw.choice(sorted(newest.glob("states-*.safetensors")))
    how = f"{plugin}, {shard.name} {harm(shard)}"
    named = Run(folder, *plugin.split(), "--resume_from_checkpoint", str(newest)).finish(START_LIMIT_S)
    lost, problems = bench.resume(plugin, folder, NUM_STEPS, says="skipped a damaged checkpoint")
    problems += end_problems(named, [2], f"{shard.name} is missing or damaged")
    if lost != SAVE_STEPS:
        problems.append(f"{lost} steps lost")
    return Trial(fault, how, named.code, named.seconds, named.orphans, lost, tuple(problems))


def rank_raises(bench: Bench, number: int) -> Trial:
    """An exception in one rank's forward pass, while the other waits for it in a collective."""
    plugin = PLUGINS[number % len(PLUGINS)]
    run = Run(bench.new_folder(), *plugin.split(), planted=harm_in_step(RAISE))
    run.wait_for_step(BAD_STEP - 1)
    how = f"{plugin}, rank 1 in step {BAD_STEP}"
    return bench.judge("a rank raises", how, plugin, run.folder, run.finish(), codes=[1], says="RuntimeError: planted")


def sigstop_of_a_rank(bench: Bench, number: int) -> Trial:
    """Stop a rank at a random moment: it neither works nor dies, nor does SIGTERM reach it."""
    plugin, rank = PLUGINS[number % len(PLUGINS)], bench.draw.randrange(Run.num_ranks)
    run = Run(bench.new_folder(), *plugin.split(), "--hang_timeout", str(HANG_TIMEOUT_S))
    run.wait_for_step(SAVE_STEPS + 2)
    pid = run.rank(rank)
    run.since = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    ended = run.finish()
    says = (
        f"error: rank {rank} of {Run.num_ranks} (host ",
        f"pid {pid}) has not answered for {HANG_TIMEOUT_S} s",
        "T (stopped)",
    )
    problems = [f"does not say {text!r}:\n{ended.output}" for text in says if text not in ended.output]
    if ended.output.count(", line ") < 2:
        problems.append(f"shows no stacks:\n{ended.output}")
    fault, how = "SIGSTOP of a rank", f"{plugin}, rank {rank}, --hang_timeout {HANG_TIMEOUT_S}"
    return bench.judge(fault, how, plugin, run.folder, ended, codes=[1]).with_problems(problems)


def rank_stands_still(bench: Bench, number: int) -> Trial:
    """A rank's loop sleeps in its forward pass, while its threads live."""
    plugin = PLUGINS[number % 3]
    hang = "--hang_timeout", str(HANG_TIMEOUT_S)
    run = Run(bench.new_folder(), *plugin.split(), *hang, planted=harm_in_step(STAND_STILL))
    run.wait_for_step(BAD_STEP - 1)
    ended = run.finish()
    problems = [] if "in harmed" in ended.output else [f"does not show the place:\n{ended.output}"]
    fault, how = "a rank stands still", f"{plugin}, rank 1 in step {BAD_STEP}, --hang_timeout {HANG_TIMEOUT_S}"
    says = f"has been at step {BAD_STEP} in forward"
    return bench.judge(fault, how, plugin, run.folder, ended, codes=[1], says=says).with_problems(problems)


def slow_rank(bench: Bench, number: int) -> Trial:
    """A rank takes long over each forward pass: the run goes on, and says which one."""
    plugin = PLUGINS[number % 2]
    short = "--max_train_steps", str(SLOW_STEPS), "--save_strategy", "no", "--eval_strategy", "no"
    run = Run(bench.new_folder(), *plugin.split(), *short, planted=harm_in_all_steps(SLOW))
    ended = run.finish(START_LIMIT_S)
    problems = list(end_problems(ended, [0], f"rank 1 of {Run.num_ranks} is slow: "))
    if ended.output.count(" is slow: ") != 1:
        problems.append(f"does not say so once:\n{ended.output}")
    fault, how = "a slow rank", f"{plugin}, rank 1"
    return Trial(fault, how, ended.code, ended.seconds, ended.orphans, None, tuple(problems))


def planted_nan(bench: Bench, number: int) -> Trial:
    """One micro-batch of one rank turns into NaN, in a step that would be saved."""
    return not_finite(bench, "a NaN in the data path", PLUGINS[number % 3], NAN, f"the loss of step {BAD_STEP} is nan")


def planted_nan_gradient(bench: Bench, number: int) -> Trial:
    """The loss is fine and its gradient is NaN, in a step that would be saved."""
    return not_finite(
        bench,
        "a NaN in a gradient",
        PLUGINS[number % 3],
        NAN_GRADIENT,
        f"the weights after step {BAD_STEP} are not finite",
    )


def not_finite(bench: Bench, fault: str, plugin: str, harm: str, says: str) -> Trial:
    """The checkpoint before is the last. `plugin` has whole embeddings: tensor parallelism brings its own."""
    run = Run(bench.new_folder(), *plugin.split(), planted=harm_in_step(harm))
    run.wait_for_step(BAD_STEP - 1)
    ended = run.finish()
    problems = [] if checkpoints(run.folder) == [SAVE_STEPS] else [f"checkpoints {checkpoints(run.folder)}"]
    if result(run.folder)["status"] != "nan":
        problems.append("result.json does not say nan")
    how = f"{plugin}, rank 1 in step {BAD_STEP}"
    trial = bench.judge(fault, how, plugin, run.folder, ended, codes=[4], says=says)
    return trial.with_problems(problems)


# --- disks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tmpfs(folder: Path, *, size_mib: int) -> Iterator[Path]:
    """Mount a small disk in memory.

    Raises:
        NotPossible: without the right to mount.
    """
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotPossible(f"no right to mount a tmpfs ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> bool:
    """Change the options of a mount, and return whether that was possible."""
    return subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], capture_output=True).returncode == 0


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[tuple[Path, str]]:
    """Give a folder nobody may write to, and how that was done: permission bits do not bind root."""
    if os.geteuid():
        folder.mkdir(parents=True, mode=0o555)
        yield folder, "mode 0555"
        return
    with tmpfs(folder, size_mib=1):
        if not remount(folder, "ro"):
            raise NotPossible("no right to mount read-only")
        yield folder, "mounted read-only"


# --- the table --------------------------------------------------------------------------------------------------------

# How often each is tried.
FAULTS: dict[Callable[[Bench, int], Trial], int] = {
    sigkill_with_restart: 2,
    sigterm_to_the_launcher: 1,
    sigterm_to_torchrun: 1,
    sigterm_again_during_the_save: 1,
    ctrl_c_twice: 2,
    full_disk: 1,
    read_only_folder: 1,
    folder_turns_read_only: 1,
    folder_in_use: 3,
    folder_overwritten: 1,
    flipped_bit: 1,
    truncated_shard: 1,
    rank_raises: 1,
    sigstop_of_a_rank: 4,
    rank_stands_still: 1,
    slow_rank: 1,
    planted_nan: 1,
    planted_nan_gradient: 1,
}


def table(trials: Sequence[Trial], skipped: dict[str, str]) -> str:
    """Return the Markdown table, one row a fault."""
    head = "| fault | tried | exit code | all processes gone after | orphans | steps lost | as promised |"
    rows = [
        row([trial for trial in trials if trial.fault == fault]) for fault in dict.fromkeys(t.fault for t in trials)
    ]
    rows += [f"| {name} | skipped: {reason} | | | | | |" for name, reason in skipped.items()]
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|---|", *rows])


def row(trials: Sequence[Trial]) -> str:
    codes = ", ".join(sorted({str(trial.code) for trial in trials}))
    slowest_s = max(trial.seconds for trial in trials)
    orphans, lost = sum(trial.orphans for trial in trials), [t.lost for t in trials if t.lost is not None]
    num_good = sum(not trial.problems for trial in trials)
    kept = f"{num_good} of {len(trials)}"
    most = f"{min(lost)} to {max(lost)}" if len(set(lost)) > 1 else str(lost[0]) if lost else "-"
    return f"| {trials[0].fault} | {len(trials)} | {codes} | {slowest_s:.1f} s | {orphans} | {most} | {kept} |"


def run_kills(bench: Bench, times: int) -> list[Trial]:
    """Return the trials of every plugin's run that was killed as often."""
    trials: list[Trial] = []
    for number, plugin in enumerate(PLUGINS):
        trials += sigkills(bench, plugin, number, times)
        for trial in trials[-times:]:
            print_trial(trial)
    return trials


def run_all(bench: Bench, faults: dict[Callable[[Bench, int], Trial], int]) -> tuple[list[Trial], dict[str, str]]:
    """Return every trial, and the faults this machine cannot have with the reason."""
    trials: list[Trial] = []
    skipped: dict[str, str] = {}
    for fault, times in faults.items():
        for number in range(times):
            try:
                trials.append(fault(bench, number))
            except NotPossible as error:
                skipped[fault.__name__.replace("_", " ")] = str(error)
                break
            print_trial(trials[-1])
    return trials, skipped


def print_trial(trial: Trial) -> None:
    lost = "" if trial.lost is None else f", {trial.lost} steps lost"
    print(f"{trial.fault} ({trial.how}): exit {trial.code}, gone after {trial.seconds:.1f} s{lost}", flush=True)
    for problem in trial.problems:
        print(f"  PROBLEM: {problem}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose name contains this; off: all")
    ranks = (2, 4, 8)  # tp 2 divides them
    parser.add_argument("--ranks", type=int, choices=ranks, default=2, help="of every run, one a GPU or on the CPU")
    parser.add_argument("--times", type=int, help="how often each fault is tried at most; off: as planned")
    parser.add_argument("--seed", type=int, default=0, help="decides the random moments")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "faults", help="folder of the table")
    return parser.parse_args()


def main() -> int:
    """Inject the faults, write the table, and return the exit code."""
    args, started = parse_args(), time.monotonic()
    Run.num_ranks = args.ranks

    def at_most(times: int) -> int:
        return min(times, args.times or times)

    chosen = {fault: at_most(times) for fault, times in FAULTS.items() if args.only in fault.__name__}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), random.Random(args.seed))
        trials = run_kills(bench, at_most(KILLS_A_RUN)) if args.only in "sigkill" else []
        others, skipped = run_all(bench, chosen)
        trials += others
    seconds = time.monotonic() - started
    args.output_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "seconds": seconds,
        "ranks": args.ranks,
        "seed": args.seed,
        "skipped": skipped,
        "trials": [asdict(trial) for trial in trials],
    }
    (args.output_dir / "faults.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.output_dir / "faults.md").write_text(table(trials, skipped) + "\n")
    print(f"\n{table(trials, skipped)}\n\n{len(trials)} faults in {seconds / 60:.0f} minutes")
    return int(any(trial.problems for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
