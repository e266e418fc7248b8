"""The picture of timeline.py, as PNG and SVG. Greys and hatches tell the kinds apart without colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.plots import DPI, STYLE, WIDTH_IN
from benchmarks.timeline_trace import COMPUTE, CPU_COMPUTE, Timeline, joined

# Face and hatch by kind. Forward, backward and optimizer are light, dark and hatched.
LOOKS = {
    "forward": ("#8ecbee", ""),
    "backward": ("#0072b2", ""),
    "optimizer": ("#e69f00", "////"),
    "other": ("#b0b0b0", ""),
    "side kernels": ("#707070", ""),
    "pinned copy": ("#009e73", ""),
    "pageable copy": ("#a8dccb", "xxxx"),
    "Adam": ("#d55e00", ""),
    "cast, copy": ("#f4c7a8", "...."),
    "for the host": ("#ffffff", "\\\\\\\\"),
    "for the GPU": ("#d8d8d8", ""),
}
LABELS = {
    "backward": "backward, recompute",
    "other": "other compute",
    "Adam": "Adam on the host",
    "cast, copy": "cast, copy on the host",
    "for the host": "wait for the host",
    "for the GPU": "wait for the GPU",
}
LANE_IN, HEAD_IN, BETWEEN_IN = 0.34, 0.95, 0.42
BAR_HEIGHT = 0.74
# More bars a lane than pixels show nothing more and make the SVG large.
MAX_BARS = 1000


def draw(timelines: Sequence[Timeline], folder: Path) -> None:
    """Write timeline.png and timeline.svg: the runs one above the other, on the same axis of time."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "timeline"}):
        figure = picture(timelines)
        figure.savefig(folder / "timeline.png", dpi=DPI)
        figure.savefig(folder / "timeline.svg", metadata={"Date": None})


def picture(timelines: Sequence[Timeline]) -> Figure:
    """Return the figure."""
    heights = [len(timeline.lanes) * LANE_IN for timeline in timelines]
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + len(heights) * BETWEEN_IN + HEAD_IN + 0.25), layout="constrained")
    longest = max(timeline.step_ms for timeline in timelines)
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, timeline in zip(panels[:, 0], timelines, strict=True):
        draw_run(axes, timeline, longest)
    panels[-1, 0].set_xlabel("ms from the step's first kernel" if _on_gpu(timelines) else "ms from the step's start")
    figure.suptitle("One training step: what ran when\n", fontweight="bold", fontsize=12, x=0.01, ha="left")
    figure.text(0.01, 1 - 0.34 / figure.get_figheight(), facts_line(timelines), fontsize=8.5, va="top")
    figure.legend(
        handles=[_key(kind) for kind in kinds_of(timelines)],
        loc="outside lower center", ncols=4, fontsize=8.5, handlelength=2.2, columnspacing=1.3,
    )  # fmt: skip
    return figure


def draw_run(axes: Axes, timeline: Timeline, longest_ms: float) -> None:
    """Draw the lanes of a run, from top to bottom as it names them, each with its busy time at the right."""
    for row, lane in enumerate(timeline.lanes.values()):
        bars = joined(lane.intervals, longest_ms, MAX_BARS)
        for kind in lane.kinds_ms:
            spans = [(start, end - start) for start, end, of in bars if of == kind]
            axes.broken_barh(spans, (row - BAR_HEIGHT / 2, BAR_HEIGHT), **_look(kind))
        axes.annotate(
            f"{lane.busy_ms:,.0f} ms, {lane.busy_ms / timeline.step_ms:.0%}", (1.01, row),
            xycoords=("axes fraction", "data"), va="center", fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
    axes.axvline(timeline.step_ms, color="black", linewidth=1.1, linestyle=(0, (4, 2)))
    axes.set_title(headline(timeline), loc="left")
    axes.set_yticks(range(len(timeline.lanes)), list(timeline.lanes))
    axes.set_ylim(len(timeline.lanes) - 0.4, -0.6)
    axes.set_xlim(0, longest_ms * 1.005)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def headline(timeline: Timeline) -> str:
    """Return a run's name, its step, and how much of it the GPU stood still."""
    idle = timeline.idle_ms
    still = "" if idle is None else f", GPU idle {idle:,.0f} ms ({idle / timeline.step_ms:.0%})"
    return f"{timeline.name}: {timeline.step_ms:,.0f} ms{still}"


def facts_line(timelines: Sequence[Timeline]) -> str:
    """Return hardware, versions and dates of the runs."""
    devices = dict.fromkeys(timeline.device for timeline in timelines)
    torch = dict.fromkeys(str(timeline.versions.get("torch")) for timeline in timelines)
    dates = dict.fromkeys(timeline.date for timeline in timelines)
    return f"{' and '.join(devices)}, torch {' and '.join(torch)}, profiled {' and '.join(dates)}; right: busy time of each lane"


def kinds_of(timelines: Sequence[Timeline]) -> list[str]:
    """Return the kinds that any run shows, in the order of the legend."""
    shown = {kind for timeline in timelines for lane in timeline.lanes.values() for kind in lane.kinds_ms}
    return [kind for kind in LOOKS if kind in shown]


def _on_gpu(timelines: Sequence[Timeline]) -> bool:
    return all(COMPUTE in timeline.lanes and CPU_COMPUTE not in timeline.lanes for timeline in timelines)


def _look(kind: str) -> dict[str, Any]:
    face, hatch = LOOKS[kind]
    # An outline would make a bar of less than a pixel a full one.
    outline = {"linewidth": 0.6, "edgecolor": "#505050"} if face == "#ffffff" else {"linewidth": 0}
    return {"facecolor": face, "hatch": hatch, "edgecolor": "black", **outline}


def _key(kind: str) -> Patch:
    return Patch(**_look(kind), label=LABELS.get(kind, kind))
