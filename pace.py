"""How long each rank works in a step before it has to wait for the others, and which one is slow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

# A rank is slow when its own work takes this much longer than the median of the others, and the excess is this share
# of the step, in so many logged intervals in a row.
SLOW_RATIO = 1.5
SLOW_SHARE = 0.1
SLOW_INTERVALS = 3
# Compilation and the allocator's growth differ between ranks; and a step's times are known in the one after it.
FIRST_STEPS = 3


class Stopwatch:
    """This rank's own work in a step: loading its rows, and the first forward pass, up to the loss.

    The ranks have met just before both, so that neither holds another rank's delay. On a GPU the forward pass is timed
    by two events, of which nobody waits.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        self._on_cpu = on_cpu
        self._is_local = False
        self._loading_s = self._forward_s = 0.0
        self._loading_since = self._forward_since = time.perf_counter()
        self._events: list[torch.cuda.Event] = []

    def start_loading(self) -> None:
        """Begin a step."""
        self._loading_since = time.perf_counter()

    def end_loading(self) -> None:
        """Reach the first collective."""
        self._loading_s = time.perf_counter() - self._loading_since

    def start_forward(self, *, is_local: bool) -> None:
        """Come out of it.

        Args:
            is_local: whether this forward pass has no collective of its own; else that of an earlier step counts.
        """
        self._is_local = is_local
        self._forward_since = time.perf_counter()
        self._events = [_recorded_event()] if is_local and not self._on_cpu else []

    def end_forward(self) -> None:
        """Reach the loss, and what is exchanged after it."""
        if self._is_local:
            self._forward_s = time.perf_counter() - self._forward_since
        if self._events:
            self._events.append(_recorded_event())

    def seconds(self) -> float:
        """Return the step's own work. The device must have got past the loss, or the call waits for it."""
        if self._events:
            self._events[1].synchronize()
            self._forward_s = self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._loading_s + self._forward_s


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class SlowRanks:
    """Names a rank that the others have to wait for.

    Args:
        warn: gets the sentence, once for each time that a rank becomes slow.
        logging_steps: length of an interval.
    """

    def __init__(self, warn: Callable[[str], None], logging_steps: int) -> None:
        self._warn, self._logging_steps = warn, logging_steps
        self._num_seen = 0
        self._own_s: list[float] = []
        self._step_s = 0.0
        self._slow_intervals: dict[int, int] = {}

    def add(self, own_s: Sequence[float], step_s: float) -> None:
        """Take in a step: the own work of every rank, and the wall time."""
        self._num_seen += 1
        if self._num_seen <= FIRST_STEPS or len(own_s) < 2:
            return
        self._own_s = [total + own for total, own in zip(self._own_s or [0.0] * len(own_s), own_s, strict=True)]
        self._step_s += step_s
        if (self._num_seen - FIRST_STEPS) % self._logging_steps == 0:
            self._judge()
            self._own_s, self._step_s = [], 0.0

    def _judge(self) -> None:
        rank = max(range(len(self._own_s)), key=lambda each: self._own_s[each])
        own, others = self._own_s[rank], statistics.median(self._own_s[:rank] + self._own_s[rank + 1 :])
        is_slow = own > SLOW_RATIO * others and own - others > SLOW_SHARE * self._step_s
        in_a_row = self._slow_intervals.get(rank, 0) + 1
        self._slow_intervals = {rank: in_a_row} if is_slow else {}
        if is_slow and in_a_row == SLOW_INTERVALS:
            steps = self._logging_steps
            self._warn(
                f"rank {rank} of {len(self._own_s)} is slow: loading and the forward pass take it "
                f"{1e3 * own / steps:,.1f} ms a step, the others {1e3 * others / steps:,.1f} ms (median); "
                "all wait for it"
            )
