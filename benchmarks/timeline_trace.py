"""From a chrome trace of torch.profiler to lanes of one training step: what was busy when, and with what.

Times are milliseconds. The trace's CPU events carry the thread's native id, its GPU events the stream; a kernel is tied
to its launch by a correlation id, and so to the phase that the launching thread was in.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Ranges that the worker marks, on the thread that was in them.
STEP, FORWARD, BACKWARD, UPDATE = "timeline.step", "timeline.forward", "timeline.backward", "timeline.update"
HOST_ADAM, WAIT = "timeline.host_adam", "timeline.wait"

COMPUTE, OTHER_STREAMS, DOWN, UP = "GPU compute", "GPU other streams", "GPU to host", "host to GPU"
CPU_COMPUTE, ADAM, WAITS = "CPU compute", "Adam on the host", "launcher waits"

# Stored intervals a lane; neighbours that are nearer than a fraction of a pixel are joined.
MAX_INTERVALS = 3000
# A copy call that returns later than this has waited for the device, ms.
BLOCKING_COPY_MS = 0.05

Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """One event of the trace.

    Args:
        place: thread of a CPU event, stream of a GPU event.
        correlation: of a launch and of what it launched; None where there is none.
    """

    name: str
    start: float
    end: float
    place: int
    correlation: int | None

    @property
    def interval(self) -> Interval:
        return self.start, self.end


@dataclass
class Lane:
    """What one resource did in the step.

    Args:
        busy_ms: time in which it did anything.
        kinds_ms: the same by kind.
        overlap: share of the busy time in which the compute lane was busy too; None for that lane itself.
        idle_gpu_ms: busy time in which no kernel ran on the GPU; None on a CPU.
        intervals: (start, end, kind) from the start of the step; joined, so that they may sum up to more than busy_ms.
    """

    busy_ms: float
    kinds_ms: dict[str, float]
    overlap: float | None
    idle_gpu_ms: float | None
    intervals: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Kernel:
    """Time in one kernel, or on a CPU in one operator without those it calls; ms in the step."""

    name: str
    count: int
    total_ms: float


@dataclass
class Timeline:
    """One step of one run.

    Args:
        step_ms: of the step in the picture, profiled.
        plain_step_ms: median of the steps before, without the profiler.
        idle_ms: time in which no kernel ran on the GPU; None on a CPU.
    """

    name: str
    command: str
    device: str
    date: str
    versions: dict[str, str | None]
    step_ms: float
    plain_step_ms: float | None
    idle_ms: float | None
    lanes: dict[str, Lane]
    kernels: list[Kernel] = field(default_factory=list)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Timeline:
        """Return what `dataclasses.asdict` took apart."""
        lanes = {name: Lane(**lane) for name, lane in fields["lanes"].items()}
        return cls(**{**fields, "lanes": lanes, "kernels": [Kernel(**kernel) for kernel in fields["kernels"]]})


class Trace:
    """The events of a chrome trace by category.

    Args:
        content: of the trace file.
        main_thread: native id of the thread that runs the loop.
        host_threads: native ids of the threads that only serve Adam on the host.
    """

    def __init__(self, content: Mapping[str, Any], main_thread: int, host_threads: Iterable[int]) -> None:
        self.main_thread, self.host_threads = main_thread, frozenset(host_threads)
        self._spans: dict[str, list[Span]] = defaultdict(list)
        events = [event for event in content["traceEvents"] if event.get("ph") == "X"]
        origin = min((event["ts"] for event in events), default=0.0)
        for event in events:
            self._spans[event.get("cat", "")].append(_span(event, origin))
        for spans in self._spans.values():
            spans.sort(key=lambda span: (span.start, -span.end))
        self.calls = sorted(self["cuda_runtime"] + self["cuda_driver"], key=lambda span: span.start)
        self.launches = {call.correlation: call for call in self.calls if call.correlation is not None}
        self.kernels, self.copies, self.operators = self["kernel"], self["gpu_memcpy"], self["cpu_op"]
        self.on_gpu = bool(self.kernels)

    def __getitem__(self, category: str) -> list[Span]:
        return self._spans.get(category, [])

    def ranges(self, name: str) -> list[Span]:
        """Return the marked ranges of a name, on any thread."""
        return [span for span in self["user_annotation"] if span.name == name]

    @property
    def compute_stream(self) -> int:
        """The stream with the most kernel time."""
        totals: dict[int, float] = defaultdict(float)
        for kernel in self.kernels:
            totals[kernel.place] += kernel.end - kernel.start
        return max(totals, key=lambda stream: totals[stream])

    def launch_of(self, span: Span) -> Span | None:
        return None if span.correlation is None else self.launches.get(span.correlation)


def _span(event: Mapping[str, Any], origin: float) -> Span:
    args = event.get("args", {})
    place = args.get("stream", event.get("tid"))
    start = (event["ts"] - origin) / 1e3
    where = place if isinstance(place, int) else -1
    return Span(event["name"], start, start + event.get("dur", 0) / 1e3, where, args.get("correlation"))


# ---------------------------------------------------------------------------- one step


def lanes_of(trace: Trace) -> tuple[Interval, dict[str, dict[str, list[Interval]]]]:
    """Return the step's start and end, and for every lane that did something its intervals by kind.

    Raises:
        ValueError: the trace holds no whole step.
    """
    step = window(trace)
    found = _gpu_lanes(trace) if trace.on_gpu else {CPU_COMPUTE: _cpu_compute(trace)}
    found |= {ADAM: _host_adam(trace), WAITS: _waits(trace)}
    clipped = {
        name: {kind: clip(intervals, step) for kind, intervals in layered(kinds).items()}
        for name, kinds in found.items()
    }
    return step, {name: kinds for name, kinds in clipped.items() if any(kinds.values())}


def window(trace: Trace) -> Interval:
    """Return start and end of the middle recorded step.

    On a GPU they are the first kernels of this step and of the next, so that work of the step that the launching
    thread did not wait for counts in it.
    """
    steps = trace.ranges(STEP)
    if len(steps) < 2:
        raise ValueError(f"the trace holds {len(steps)} steps, needed are two")
    at = (len(steps) - 1) // 2
    start, end = steps[at].start, steps[at + 1].start
    if trace.on_gpu:
        start, end = _first_kernel(trace, start), _first_kernel(trace, end)
    if end <= start:
        raise ValueError("the trace's steps launched no kernel of their own")
    return start, end


def _first_kernel(trace: Trace, launched_after: float) -> float:
    stream = trace.compute_stream
    for kernel in trace.kernels:
        launch = trace.launch_of(kernel)
        if kernel.place == stream and launch and launch.start >= launched_after:
            return kernel.start
    return trace.kernels[-1].end


class Phases:
    """Tells which phase the loop was in at a time."""

    def __init__(self, trace: Trace) -> None:
        names = {FORWARD: "forward", BACKWARD: "backward", UPDATE: "optimizer"}
        found = [(span, kind) for name, kind in names.items() for span in trace.ranges(name)]
        self._ranges = sorted(found, key=lambda pair: pair[0].start)
        self._starts = [span.start for span, _ in self._ranges]

    def at(self, time: float) -> str:
        """Return forward, backward, optimizer, or other."""
        last = bisect_right(self._starts, time) - 1
        if last >= 0 and time <= self._ranges[last][0].end:
            return self._ranges[last][1]
        return "other"


def _gpu_lanes(trace: Trace) -> dict[str, dict[str, list[Interval]]]:
    phases, stream = Phases(trace), trace.compute_stream
    lanes: dict[str, dict[str, list[Interval]]] = {
        COMPUTE: {kind: [] for kind in ("optimizer", "forward", "backward", "other")},
        OTHER_STREAMS: {"side kernels": []},
        DOWN: {"pinned copy": [], "pageable copy": []},
        UP: {"pinned copy": [], "pageable copy": []},
    }
    on_device = [copy for copy in trace.copies if "DtoD" in copy.name]
    for span in trace.kernels + on_device + trace["gpu_memset"]:
        if span.place == stream:
            lanes[COMPUTE][_kernel_kind(trace, phases, span)].append(span.interval)
        else:
            lanes[OTHER_STREAMS]["side kernels"].append(span.interval)
    for copy in trace.copies:
        name = DOWN if "DtoH" in copy.name else UP if "HtoD" in copy.name else None
        if name:
            lanes[name]["pageable copy" if "Pageable" in copy.name else "pinned copy"].append(copy.interval)
    return lanes


def _kernel_kind(trace: Trace, phases: Phases, span: Span) -> str:
    """Return the phase of a kernel's launch; Adam is told by its name, since it may run in the backward pass."""
    launch = trace.launch_of(span)
    if "adam" in span.name.lower() or (launch and launch.place in trace.host_threads):
        return "optimizer"
    return phases.at(launch.start) if launch else "other"


def _cpu_compute(trace: Trace) -> dict[str, list[Interval]]:
    phases = Phases(trace)
    kinds: dict[str, list[Interval]] = {kind: [] for kind in ("optimizer", "forward", "backward", "other")}
    for span in trace.operators:
        if span.place not in trace.host_threads:
            kinds["optimizer" if "adam" in span.name.lower() else phases.at(span.start)].append(span.interval)
    adam = [span.interval for span in trace.ranges(HOST_ADAM) if span.place not in trace.host_threads]
    return {**kinds, "optimizer": kinds["optimizer"] + adam}


def _host_adam(trace: Trace) -> dict[str, list[Interval]]:
    """Return the work of Adam's own threads, and beside a GPU Adam on the host in any thread."""
    own = [span for span in trace.operators if span.place in trace.host_threads]
    adam = [span for span in own + trace.ranges(HOST_ADAM) if "adam" in span.name.lower()]
    if trace.on_gpu:
        launched = _starts_by_thread(trace.calls)
        adam += [span for span in trace.operators if "_fused_adam" in span.name and not _launches(span, launched)]
    else:
        adam = [span for span in adam if span.place in trace.host_threads]
    return {"Adam": [span.interval for span in adam], "cast, copy": [span.interval for span in own]}


def _starts_by_thread(spans: Iterable[Span]) -> dict[int, list[float]]:
    starts: dict[int, list[float]] = defaultdict(list)
    for span in spans:
        starts[span.place].append(span.start)
    return starts


def _launches(span: Span, launched: Mapping[int, Sequence[float]]) -> bool:
    starts = launched.get(span.place, [])
    return bisect_left(starts, span.start) < bisect_right(starts, span.end)


def _waits(trace: Trace) -> dict[str, list[Interval]]:
    """Return when a thread that feeds the device stood still: the loop's, or autograd's."""
    feeding = {trace.main_thread}
    if trace.on_gpu:
        feeding |= {launch.place for kernel in trace.kernels if (launch := trace.launch_of(kernel))}
    feeding -= trace.host_threads
    calls = [call for call in trace.calls if call.place in feeding]
    return {
        "for the host": [span.interval for span in trace.ranges(WAIT) if span.place in feeding],
        "for the GPU": [call.interval for call in calls if _blocks(call)],
    }


def _blocks(call: Span) -> bool:
    return "Synchronize" in call.name or ("emcpy" in call.name and call.end - call.start > BLOCKING_COPY_MS)


# ---------------------------------------------------------------------------- numbers


def measure(trace: Trace, **facts: Any) -> Timeline:
    """Return the middle step of a trace with its numbers; `facts` are the fields that no trace holds."""
    (start, end), lanes = lanes_of(trace)
    compute = COMPUTE if trace.on_gpu else CPU_COMPUTE
    computing = union(_all_of(lanes.get(compute, {})))
    gpu_busy = union(computing + _all_of(lanes.get(OTHER_STREAMS, {})))
    idle = subtract([(start, end)], gpu_busy) if trace.on_gpu else None
    return Timeline(
        step_ms=end - start,
        idle_ms=None if idle is None else total(idle),
        lanes={
            name: _lane(kinds, (start, end), None if name == compute else computing, idle)
            for name, kinds in lanes.items()
        },
        kernels=top_kernels(trace, (start, end)),
        **facts,
    )


def _lane(
    kinds: Mapping[str, list[Interval]], step: Interval, computing: list[Interval] | None, idle: list[Interval] | None
) -> Lane:
    busy = union(_all_of(kinds))
    busy_ms = total(busy)
    with_kinds = sorted((first - step[0], last - step[0], kind) for kind, all_ in kinds.items() for first, last in all_)
    return Lane(
        busy_ms=busy_ms,
        kinds_ms={kind: total(intervals) for kind, intervals in kinds.items() if intervals},
        overlap=None if computing is None else total(intersect(busy, computing)) / busy_ms,
        idle_gpu_ms=None if idle is None else total(intersect(busy, idle)),
        intervals=joined(with_kinds, step[1] - step[0], MAX_INTERVALS),
    )


def _all_of(kinds: Mapping[str, list[Interval]]) -> list[Interval]:
    return [interval for intervals in kinds.values() for interval in intervals]


def joined(intervals: Sequence[tuple[float, float, str]], length: float, limit: int) -> list[tuple[float, float, str]]:
    """Return at most about `limit` intervals: neighbours of a kind are joined, the nearest first.

    Gaps up to 1/500 of the length are closed; where kinds take turns more often than `limit`, more remain.
    """
    gap, result = length / 1e6, list(intervals)
    while len(result) > limit and gap < length / 500:
        result, gap = _join(result, gap), 2 * gap
    return [(round(first, 4), round(last, 4), kind) for first, last, kind in result]


def _join(intervals: Sequence[tuple[float, float, str]], gap: float) -> list[tuple[float, float, str]]:
    result: list[tuple[float, float, str]] = []
    for first, last, kind in intervals:
        if result and result[-1][2] == kind and first - result[-1][1] <= gap:
            result[-1] = result[-1][0], max(last, result[-1][1]), kind
        else:
            result.append((first, last, kind))
    return result


def top_kernels(trace: Trace, step: Interval, limit: int = 15) -> list[Kernel]:
    """Return where the compute time of the step went, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    spans = [(span, span.end - span.start) for span in trace.kernels] if trace.on_gpu else _own_times(trace.operators)
    for span, spent in spans:
        if step[0] <= span.start < step[1]:
            found[span.name].append(spent)
    kernels = [Kernel(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel.total_ms)[:limit]


def _own_times(operators: Sequence[Span]) -> list[tuple[Span, float]]:
    """Return each operator with its time less that of the operators it calls."""
    own = [span.end - span.start for span in operators]
    open_: dict[int, list[int]] = defaultdict(list)
    for number, span in enumerate(operators):
        stack = open_[span.place]
        while stack and operators[stack[-1]].end <= span.start:
            stack.pop()
        if stack:
            own[stack[-1]] -= span.end - span.start
        stack.append(number)
    return list(zip(operators, own, strict=True))


def short_name(name: str, width: int = 72) -> str:
    """Return a kernel's name without the words that all have, cut in the middle to `width` characters."""
    name = re.sub(r"^void |at::native::|\(anonymous namespace\)::|cutlass::|std::", "", name)
    name = re.sub(r"\([^()]*\)$", "", name)
    half = (width - 1) // 2
    return name if len(name) <= width else f"{name[:half]}…{name[-half:]}"


# ---------------------------------------------------------------------------- intervals: sorted lists without overlap


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the intervals sorted, those that touch joined."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        elif end > start:
            result.append((start, end))
    return result


def subtract(intervals: Sequence[Interval], holes: Sequence[Interval]) -> list[Interval]:
    """Return what of the intervals lies in none of the holes; both as `union` returns them."""
    result, at = [], 0
    for start, end in intervals:
        while at < len(holes) and holes[at][1] <= start:
            at += 1
        number = at
        while number < len(holes) and holes[number][0] < end:
            if holes[number][0] > start:
                result.append((start, holes[number][0]))
            start = max(start, holes[number][1])
            number += 1
        if start < end:
            result.append((start, end))
    return result


def intersect(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """Return what lies in both; both as `union` returns them."""
    return subtract(one, subtract(one, other))


def layered(kinds: Mapping[str, Sequence[Interval]]) -> dict[str, list[Interval]]:
    """Return the kinds without overlap: where two did something at a time, the first named stays."""
    result: dict[str, list[Interval]] = {}
    taken: list[Interval] = []
    for kind, intervals in kinds.items():
        result[kind] = subtract(union(intervals), taken)
        taken = union([*taken, *result[kind]])
    return result


def clip(intervals: Iterable[Interval], step: Interval) -> list[Interval]:
    """Return the part of the intervals within the step."""
    return [(max(a, step[0]), min(b, step[1])) for a, b in intervals if a < step[1] and b > step[0]]


def total(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
