"""Names a rank that hangs, shows where every rank stands, and ends the run: a thread beside each rank's training loop.

Several times within `--hang_timeout` each rank's thread writes where its loop stands into the process group's store, and
looks at the next rank's. A rank that falls silent (stopped, swapped out, its machine gone) is found by the rank before
it; a loop that stands still while its thread lives, by any rank that waits for it. The first finding is written into
the store. All threads that read it print their rank's stacks and end their process, so that torchrun ends the others.

The thread has its own connection to the store; the loop only leaves a mark of where it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist
from torch.distributed import distributed_c10d

from runtime import EXIT_ERROR, Runtime, leave_now

# A step goes through these in turn. Compilation, saving and evaluation take as long as they take.
STEP_PHASES = ("data", "forward", "backward", "update")
FIRST = "first "
PATIENCE = 3  # a phase may take this many times as long as the longest before it, on a slow machine beyond the timeout
BEATS = 10  # within the timeout
LONGEST_INTERVAL_S = 5.0
STACK_SIGNAL = signal.SIGUSR2
STACK_WAIT_S = 3.0
STACK_PAUSE_S = 0.3  # a file of stacks that has not grown for so long is whole
STACK_POLL_S = 0.002
OUTERMOST = (" in <module>\n", " in _run_module_as_main\n")  # frames that start a main thread's stack
HANG_KEY = "hang"


class Pulse:
    """Where this rank's loop is. The loop writes it, a plain assignment, and the watchdog reads it.

    Args:
        longest_s: the longest phase of a step so far. The first step compiles, and counts only until the third begins.
    """

    def __init__(self) -> None:
        self.place = ("start", 0, time.monotonic())
        self.longest_s = 0.0
        self._longest_later_s = 0.0
        self._first_step: int | None = None

    def mark(self, phase: str, step: int) -> None:
        """Note that the loop enters a phase of a step."""
        now = time.monotonic()
        self._first_step = step if self._first_step is None else self._first_step
        self._take_time(now)
        if step == self._first_step + 2:
            self.longest_s = self._longest_later_s
        # Nobody can say how long the first step may take.
        phase = f"{FIRST}{phase}" if step == self._first_step and phase in STEP_PHASES else phase
        self.place = (phase, step, now)

    def _take_time(self, now: float) -> None:
        phase, _, since = self.place
        if phase.removeprefix(FIRST) in STEP_PHASES:
            self.longest_s = max(self.longest_s, now - since)
        if phase in STEP_PHASES:
            self._longest_later_s = max(self._longest_later_s, now - since)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Args:
        number: of this beat, so that two can be told apart.
        idle_s: since the loop's last mark.
        stack_file: descriptor, in its process, of the file where STACK_SIGNAL writes its stacks.
        done: the run has ended there; it will not be heard again.
    """

    rank: int
    host: str
    pid: int
    local_rank: int
    number: int
    phase: str
    step: int
    idle_s: float
    stack_file: int
    done: bool = False

    @property
    def where(self) -> str:
        return f"at step {self.step} in {self.phase}" if self.step else f"in {self.phase}"

    @property
    def progress(self) -> tuple[int, int]:
        """A number that grows as the loop goes on through the phases of a step."""
        return self.step, STEP_PHASES.index(self.phase)


@dataclass(frozen=True)
class Finding:
    """A hang, as the rank that noticed it wrote it into the store.

    Args:
        found_by: that rank.
        text: the sentence for the user.
        silent: the rank that no longer answers, by its last beat; None: all do.
    """

    found_by: int
    text: str
    silent: Beat | None


@contextmanager
def watching(runtime: Runtime, timeout_s: float) -> Iterator[Pulse]:
    """Give the loop its pulse, and watch over all ranks while the block lasts.

    Args:
        timeout_s: 0: nobody watches.
    """
    pulse = Pulse()
    if not timeout_s or runtime.world_size == 1:
        yield pulse
        return
    with stacks_on_signal() as stack_file:
        watchdog = Watchdog(runtime, pulse, timeout_s, stack_file)
        watchdog.start()
        try:
            yield pulse
        finally:
            watchdog.end()


@contextmanager
def stacks_on_signal() -> Iterator[int]:
    """Write this process's stacks into a file at STACK_SIGNAL, from C, whatever Python is doing; give its descriptor."""
    with tempfile.TemporaryFile() as file:
        faulthandler.register(STACK_SIGNAL, file=file, all_threads=True)
        try:
            yield file.fileno()
        finally:
            faulthandler.unregister(STACK_SIGNAL)


class Watchdog(threading.Thread):
    """Writes this rank's beats and looks at those of the others."""

    def __init__(self, runtime: Runtime, pulse: Pulse, timeout_s: float, stack_file: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.runtime, self.pulse, self.timeout_s, self.stack_file = runtime, pulse, timeout_s, stack_file
        self.interval_s = min(LONGEST_INTERVAL_S, timeout_s / BEATS)
        # A clone is a connection of its own: a call of the loop's that waits would hold ours up.
        self.store = dist.PrefixStore("watchdog", distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
        self._ended = threading.Event()
        self._found = False
        self._number = 0
        self._next_rank = (runtime.rank + 1) % runtime.world_size
        self._heard = (-1, time.monotonic())
        # Where this loop stood when all seemed to stand still, and the numbers of the beats that were there then.
        self._suspect: tuple[tuple[str, int, float], dict[int, int]] = (pulse.place, {})

    def run(self) -> None:
        """Beat and look until the run ends, or the process that holds the store."""
        with contextlib.suppress(RuntimeError):
            self._beat()
            while not self._ended.wait(self.interval_s):
                self._beat()
                finding = self._published() or self._publish(self._silence() or self._standstill())
                if finding:
                    self._end_run(finding)

    def end(self) -> None:
        """Say that this rank will not be heard again. Where the store does not answer, nobody waits for it."""
        self._ended.set()
        self.join(None if self._found else self.interval_s)  # a finding stands, though the loop got loose after it
        if not self.is_alive():
            with contextlib.suppress(RuntimeError):
                self._beat(done=True)

    def _beat(self, *, done: bool = False) -> None:
        phase, step, since = self.pulse.place
        self._number += 1
        beat = Beat(
            self.runtime.rank, socket.gethostname(), os.getpid(), self.runtime.local_rank, self._number, phase, step,
            time.monotonic() - since, self.stack_file, done,
        )  # fmt: skip
        self.store.set(_key(beat.rank), json.dumps(asdict(beat)))

    def _read(self, rank: int) -> Beat | None:
        key = _key(rank)
        return Beat(**json.loads(self.store.get(key))) if self.store.check([key]) else None

    def _silence(self) -> Finding | None:
        """Return the finding that the next rank has not been heard for too long."""
        beat, now = self._read(self._next_rank), time.monotonic()
        if beat is None or beat.done:
            return None
        if beat.number != self._heard[0]:
            self._heard = (beat.number, now)
        silent_s = now - self._heard[1]
        if silent_s < self.timeout_s:
            return None
        text = f"{self._title(beat)} has not answered for {silent_s:.0f} s; last seen {beat.where}"
        return Finding(self.runtime.rank, text, beat)

    def _standstill(self) -> Finding | None:
        """Return the finding that the loops stand still, once every thread was heard again since that was first seen.

        A silent rank stops the others too: `_silence` tells of it.
        """
        phase, _, since = place = self.pulse.place
        patience_s = max(self.timeout_s, PATIENCE * self.pulse.longest_s) + 2 * self.interval_s
        if phase not in STEP_PHASES or time.monotonic() - since < patience_s:
            return None
        beats = [beat for rank in range(self.runtime.world_size) if (beat := self._read(rank)) and not beat.done]
        if self._suspect[0] != place:
            self._suspect = place, {beat.rank: beat.number for beat in beats}
        first = self._suspect[1]
        if any(beat.phase not in STEP_PHASES or beat.number <= first.get(beat.rank, -1) for beat in beats):
            return None
        return Finding(self.runtime.rank, standstill_text(beats, self._title), None)

    def _title(self, beat: Beat) -> str:
        return f"rank {beat.rank} of {self.runtime.world_size} (host {beat.host}, pid {beat.pid})"

    def _published(self) -> Finding | None:
        return _finding(self.store.get(HANG_KEY)) if self.store.check([HANG_KEY]) else None

    def _publish(self, finding: Finding | None) -> Finding | None:
        """Write a finding unless another rank was first, and return the one that counts."""
        return finding and _finding(self.store.compare_set(HANG_KEY, "", json.dumps(asdict(finding))))

    def _end_run(self, finding: Finding) -> None:
        """Print what there is to say, give the other threads time to do so, and end the process."""
        self._found = True
        if finding.found_by == self.runtime.rank:
            _print(f"error: {finding.text}; the run ends")
        silent = finding.silent if finding.silent and self._answers_for(finding.silent) else None
        own = own_stacks()  # before the silent rank is let go for a moment, and this one with it
        if silent:
            _print(f"[rank {silent.rank}] {stacks_of(silent)}")
        _print(f"[rank {self.runtime.rank}] {own}")
        time.sleep(2 * self.interval_s + STACK_WAIT_S)
        if silent:  # torchrun's SIGTERM does not reach a stopped process, and its SIGKILL comes 30 s later
            with contextlib.suppress(ProcessLookupError):
                os.kill(silent.pid, signal.SIGKILL)
        leave_now(EXIT_ERROR)

    def _answers_for(self, silent: Beat) -> bool:
        """Return whether this rank is the one that looks into a silent process: one of the same torchrun."""
        is_first = self.runtime.local_rank == (1 if silent.local_rank == 0 else 0)
        return is_first and silent.host == socket.gethostname() and parent_of(silent.pid) == os.getppid()


def standstill_text(beats: Sequence[Beat], name: Any) -> str:
    """Return the sentence on loops that stand still: the rank that is furthest behind keeps the others waiting."""
    last = min(beats, key=lambda beat: beat.progress)
    idle_s = min(beat.idle_s for beat in beats)
    if all(beat.progress == last.progress for beat in beats):
        return f"no rank has got any further for {idle_s:.0f} s; all {len(beats)} are {last.where}"
    return f"{name(last)} has been {last.where} for {last.idle_s:.0f} s, and the others wait for it"


def _key(rank: int) -> str:
    return f"beat-{rank}"


def _finding(text: bytes) -> Finding:
    content: Mapping[str, Any] = json.loads(text)
    silent = content["silent"]
    return Finding(content["found_by"], content["text"], Beat(**silent) if silent else None)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # one write: ranks do not cut each other's lines


# ---------------------------------------------------------------------------- stacks


def own_stacks() -> str:
    """Return where every other thread of this process stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "".join(parts).rstrip()


def stacks_of(silent: Beat) -> str:
    """Return state and stacks of a silent process of this machine: it is let go for a moment, to write them itself."""
    state = state_of(silent.pid)
    try:
        # Opened before: let go, the process may close it.
        with open(f"/proc/{silent.pid}/fd/{silent.stack_file}", errors="replace") as file:
            _kill_main_thread(silent.pid, STACK_SIGNAL)
            os.kill(silent.pid, signal.SIGCONT)
            stacks = _await_stacks(file)
        with contextlib.suppress(ProcessLookupError):
            os.kill(silent.pid, signal.SIGSTOP)
    except OSError as error:
        stacks = f"its stacks cannot be read ({error})"
    return f"process {silent.pid} is in state {state}:\n{stacks or 'it does not write its stacks'}"


def _kill_main_thread(pid: int, number: int) -> None:
    """Signal a process's main thread: it writes the stacks before it does anything else once the process is let go.

    `os.kill` signals whichever thread runs first, and the main thread would meanwhile go on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "tgkill"):  # glibc before 2.30
        os.kill(pid, number)
    elif libc.tgkill(pid, pid, number):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _await_stacks(file: TextIO) -> str:
    """Return what the file holds once it is whole. Of all threads the main thread, the oldest, comes last."""
    end = time.monotonic() + STACK_WAIT_S
    text, since = "", time.monotonic()
    while (now := time.monotonic()) < end and not text.endswith(OUTERMOST):
        if more := file.read():
            text, since = text + more, now
        elif text and now - since > STACK_PAUSE_S:
            break
        time.sleep(STACK_POLL_S)
    return text.rstrip()


def state_of(pid: int) -> str:
    """Return Linux's word for what a process does, such as `T (stopped)`."""
    return _status(pid).get("State", "unknown")


def parent_of(pid: int) -> int | None:
    """Return the parent's process id; None where there is no such process, or no /proc."""
    parent = _status(pid).get("PPid")
    return int(parent) if parent else None


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
