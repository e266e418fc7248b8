"""Pictures of a sweep, as PNG and SVG. Markers, dashes and hatches tell the plugins apart without colour."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from args import PLUGINS
from benchmarks.table import Row, hardware_line

# Okabe and Ito's colours, in an order whose greys differ; marker, dash and hatch by plugin say the same.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("D", "o", "s", "^", "v", "P")
DASHES = ("-", "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "", "///", "...", "xxx", "\\\\\\")

# At README width, about 880 pixels, a point is 1.4 pixels.
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#d8d8d8",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "svg.hashsalt": "sweep",
}
WIDTH_IN, PANEL_HEIGHT_IN, HEAD_IN, COLUMNS, DPI = 8.8, 2.9, 1.15, 3, 200


def style_of(plugin: str) -> dict[str, Any]:
    """Return how a plugin's line looks, the same in every picture."""
    i = PLUGINS.index(plugin)
    return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i]}


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every picture that the rows have points for, and return the SVG files; the PNG lie beside them."""
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            for suffix in ("svg", "png"):  # an old picture is none of these rows
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
            figure = draw(rows)
            if figure is not None:
                figure.savefig(folder / f"{name}.png", dpi=DPI)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                drawn.append(folder / f"{name}.svg")
    return drawn


def throughput(rows: Sequence[Row]) -> Figure | None:
    """Draw tokens/s against the batch, a line a plugin; a cell that ran out of memory is a mark on the axis."""
    ok = [row for row in rows if row.tokens_per_s]
    if not ok:
        return None
    figure, panels = grid(rows, "Throughput by batch", Setting("batch_size"))
    for axes, group in panels:
        for plugin, line in by_plugin(group):
            points = sorted(line, key=lambda row: row.batch_size)
            axes.errorbar(
                [row.batch_size for row in points],
                [row.tokens_per_s or math.nan for row in points],  # a missing point is a gap in the line
                yerr=spreads(points),
                capsize=3,
                label=plugin,
                markersize=5.5,
                **style_of(plugin),
            )
        batches = sorted({row.batch_size for row in group})
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        pad = 1.25
        axes.set_xlim(batches[0] / pad, batches[-1] * pad)
        axes.set_ylim(bottom=0)
        mark_lost(axes, group, batches)
        axes.set_xlabel("batch (rows a GPU)")
        axes.set_ylabel("tokens/s, all GPUs")
        axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    return finish(figure, rows)


def mark_lost(axes: Axes, group: Sequence[Row], batches: Sequence[int]) -> None:
    """Mark, above the axis, what ran out of memory at a batch: the plugins' markers one above the other."""
    for batch in batches:
        lost = [row for row in group if row.batch_size == batch and row.status == "oom"]
        for height, row in enumerate(lost):
            at = 0.045 + 0.07 * height
            mark: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            look = style_of(row.plugin) | {"linestyle": "none"}
            axes.plot([batch], [at], markersize=5.5, fillstyle="none", **look, **mark)
            axes.annotate(
                "OOM", (batch, at), xycoords=axes.get_xaxis_transform(), xytext=(-6, 0), textcoords="offset points",
                ha="right", va="center", fontsize=7.5,
            )  # fmt: skip


def memory(rows: Sequence[Row]) -> Figure | None:
    """Draw the peak memory of each cell as bars, under the line of the cap; a cell that ran out of it is marked."""
    measure = gpu_memory if any(row.peak_gpu_gib for row in rows) else host_memory
    if not any(measure(row) for row in rows):
        return None
    where = (
        "GPU memory (with CUDA context and NCCL, largest rank)"
        if measure is gpu_memory
        else "host memory (largest rank)"
    )
    figure, panels = grid(rows, f"Peak {where}", Setting("batch_size"))
    for axes, group in panels:
        batches = sorted({row.batch_size for row in group})
        plugins = [plugin for plugin, _ in by_plugin(group)]
        width = 0.84 / len(plugins)
        limit = next((row.memory_limit_gib for row in group if row.memory_limit_gib), None)
        top = max([*(measure(row) or 0 for row in group), *(row.predicted_gib or 0 for row in group if measure(row))])
        top = max(top, limit or 0) * 1.12
        for row in group:
            x = batches.index(row.batch_size) + (plugins.index(row.plugin) - (len(plugins) - 1) / 2) * width
            draw_memory(axes, row, x, width, height=measure(row), top=top, is_gpu=measure is gpu_memory)
        if limit:
            name = f"cap {group[0].mem_cap_gb:g} GB" if group[0].mem_cap_gb else "memory of a GPU"
            axes.axhline(limit, color="black", linestyle=(0, (6, 3)), linewidth=1.1)
            axes.annotate(
                f"{name}: {limit:.1f} GiB", (0.01, limit), xycoords=axes.get_yaxis_transform(), xytext=(0, 3),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set_xlim(-0.5, len(batches) - 0.5)  # a word in place of a bar does not widen the axis
        axes.set_ylim(0, top)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("batch (rows a GPU)")
        axes.set_ylabel("GiB")
    return finish(figure, rows, bars=True)


def draw_memory(
    axes: Axes, row: Row, x: float, width: float, *, height: float | None, top: float, is_gpu: bool
) -> None:
    """Draw one cell: a bar with the prediction as a tick, or its state in words."""
    i = PLUGINS.index(row.plugin)
    if height is None:
        if row.status == "oom":
            axes.plot([x], [0.03 * top], marker="x", color="black", markersize=6, markeredgewidth=1.6)
        said = "OOM" if row.status == "oom" else row.status
        axes.annotate(
            said, (x, 0.07 * top), rotation=90, ha="center", va="bottom", fontsize=8,
            fontweight="bold" if row.status == "oom" else "normal",
        )  # fmt: skip
        return
    look: dict[str, Any] = {
        "facecolor": COLOURS[i] if not HATCHES[i] else "white",
        "edgecolor": COLOURS[i],
        "hatch": HATCHES[i],
    }
    axes.bar([x], [height], width=0.9 * width, linewidth=1, **look)
    if is_gpu and row.predicted_gib:
        half = 0.5 * width
        axes.plot([x - half, x + half], [row.predicted_gib] * 2, color="#d00000", linewidth=1.8, solid_capstyle="butt")


def gpu_memory(row: Row) -> float | None:
    """Return the peak that was allocated, with what lies beside the allocator."""
    return row.peak_gpu_gib


def host_memory(row: Row) -> float | None:
    """Return the peak resident memory: all there is on a CPU."""
    return row.host_gib


def memory_and_speed(rows: Sequence[Row]) -> Figure | None:
    """Draw each cell's speed over its memory: up and left is better. Numbers beside the marks are batches."""
    measure = gpu_memory if any(row.peak_gpu_gib for row in rows) else host_memory
    if not any(measure(row) and row.tokens_per_s_per_gpu for row in rows):
        return None
    figure, panels = grid(rows, "Memory against speed (numbers: batch)", Setting("batch_size"))
    for axes, group in panels:
        for plugin, line in by_plugin(group):
            points = sorted(line, key=lambda row: row.batch_size)
            x, y = ([get(row) or math.nan for row in points] for get in (measure, gpu_speed))
            axes.plot(x, y, label=plugin, linewidth=0.9, markersize=6, **style_of(plugin))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        name_batches(
            axes, [(measure(row) or 0, gpu_speed(row) or 0, row.batch_size) for row in group if gpu_speed(row)]
        )
        axes.set_xlabel("peak GiB a GPU" if measure is gpu_memory else "peak GiB of host memory a process")
        axes.set_ylabel("tokens/s a GPU")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    return finish(figure, rows)


def name_batches(axes: Axes, points: Sequence[tuple[float, float, int]]) -> None:
    """Write the batch beside each (x, y, batch), once where marks of one batch lie together."""
    named: list[tuple[float, float, int]] = []
    for x, y, batch in sorted(points, key=lambda point: -point[1]):
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        if any(batch == other and abs(across - a) < 0.05 and abs(up - u) < 0.055 for a, u, other in named):
            continue
        named.append((across, up, batch))
        axes.annotate(str(batch), (x, y), xytext=(6, -3), textcoords="offset points", fontsize=8)


def gpu_speed(row: Row) -> float | None:
    """Return tokens/s of one GPU."""
    return row.tokens_per_s_per_gpu


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Draw tokens/s over the number of GPUs with the ideal line of each plugin; None for a single number of GPUs."""
    ok = [row for row in rows if row.tokens_per_s]
    if len({row.num_gpus for row in ok}) < 2:
        return None
    figure, panels = grid(ok, "Scaling over GPUs (thin: ideal)", Setting("num_gpus"))
    for axes, group in panels:
        counts = sorted({row.num_gpus for row in group})
        for plugin, line in by_plugin(group):
            points = sorted(line, key=lambda row: row.num_gpus)
            look, first = style_of(plugin), points[0]
            x, y = [row.num_gpus for row in points], [row.tokens_per_s or 0 for row in points]
            axes.errorbar(x, y, yerr=spreads(points), capsize=3, label=plugin, markersize=5.5, **look)
            one = (first.tokens_per_s or 0) / first.num_gpus
            ends = [first.num_gpus, counts[-1]]
            axes.plot(ends, [one * end for end in ends], color=look["color"], linewidth=0.7, alpha=0.8)
        axes.set_xticks(counts)
        axes.margins(x=0.08)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("GPUs")
        axes.set_ylabel("tokens/s, all GPUs")
        axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    return finish(figure, rows)


PICTURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "throughput": throughput,
    "memory": memory,
    "memory-and-speed": memory_and_speed,
    "scaling": scaling,
}


# ---------------------------------------------------------------------------- what they share


SETTINGS = ("model", "num_gpus", "batch_size", "seq_len", "mem_cap_gb")
SETTING_TEXTS = {
    "model": "{}",
    "num_gpus": "{} GPU",
    "batch_size": "batch {}",
    "seq_len": "length {}",
    "mem_cap_gb": "cap {:g} GB",
}


@dataclass(frozen=True)
class Setting:
    """What the rows of one panel share: all that is asked for but the plugin and what varies along the axis."""

    varied: str

    @property
    def names(self) -> list[str]:
        return [name for name in SETTINGS if name != self.varied]

    def of(self, row: Row) -> tuple[Any, ...]:
        """Return a row's values, the precision asked for last: `auto`, which differs by plugin, is one setting."""
        asked = row.cell.split(f"-{row.plugin}-", 1)[1].split("-")[0]
        return (*(getattr(row, name) for name in self.names), asked)


def grid(rows: Sequence[Row], title: str, setting: Setting) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """Return a figure with a panel a setting, named by what differs between the panels."""
    settings = list(dict.fromkeys(map(setting.of, rows)))
    num_columns = 2 if len(settings) == 4 else min(COLUMNS, len(settings))
    num_rows = math.ceil(len(settings) / num_columns)
    figure = Figure(figsize=(WIDTH_IN, PANEL_HEIGHT_IN * num_rows + HEAD_IN), layout="constrained")
    figure.suptitle(title, fontweight="bold", fontsize=12, x=0.01, ha="left")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten().tolist()
    for empty in axes[len(settings) :]:
        empty.set_visible(False)
    panels = []
    for place, values in zip(axes, settings, strict=False):
        group = [row for row in rows if setting.of(row) == values]
        place.set_title(panel_title(group[0], rows, setting), loc="left")
        panels.append((place, group))
    return figure, panels


def panel_title(row: Row, rows: Sequence[Row], setting: Setting) -> str:
    """Return the settings of a panel that are not obvious: the model, the GPUs, and what differs between panels."""
    shown = [name for name in setting.names if name == "model" or len({getattr(other, name) for other in rows}) > 1]
    parts = [SETTING_TEXTS[name].format(getattr(row, name)) for name in shown if getattr(row, name)]
    parts = [f"{part}s" if part.endswith(" GPU") and row.num_gpus > 1 else part for part in parts]
    asked = {setting.of(other)[-1] for other in rows}
    return ", ".join([*parts, *([setting.of(row)[-1]] if len(asked) > 1 else [])])


def by_plugin(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield each plugin with its rows, in the order of the table."""
    for plugin in dict.fromkeys(row.plugin for row in rows):
        yield plugin, [row for row in rows if row.plugin == plugin]


def spreads(rows: Sequence[Row]) -> list[list[float]] | None:
    """Return how far the slowest and the fastest run lie from the median; None where no cell was repeated."""
    if not any(row.num_runs > 1 for row in rows):
        return None
    triples = [(row.tokens_per_s_min or 0, row.tokens_per_s or 0, row.tokens_per_s_max or 0) for row in rows]
    return [[middle - low for low, middle, _ in triples], [high - middle for _, middle, high in triples]]


def thousands(value: float, position: int | None = None) -> str:
    """Return a tick's text: 0, 250, 1.5k, 320k, 1.2M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:g}" if abs(value) < 1000 else f"{value / 1000:g}k"


def finish(figure: Figure, rows: Sequence[Row], *, bars: bool = False) -> Figure:
    """Add the hardware to the title, and one legend for all panels."""
    title = figure.get_suptitle()
    figure.suptitle(f"{title}\n", fontweight="bold", fontsize=12, x=0.01, ha="left")
    figure.text(0.01, 1 - 0.34 / figure.get_figheight(), f"{hardware_line(rows)}, {time.strftime('%Y-%m-%d')}",
                fontsize=8.5, va="top")  # fmt: skip
    plugins = list(dict.fromkeys(row.plugin for row in rows))
    handles: list[Any] = [_bar_key(plugin) if bars else _line_key(plugin) for plugin in plugins]
    if bars and any(row.peak_gpu_gib for row in rows):
        handles.append(Line2D([], [], color="#d00000", linewidth=1.8, label="predicted"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(6, len(handles)),
        handlelength=2.6,
        columnspacing=1.3,
        fontsize=9,
    )
    return figure


def _bar_key(plugin: str) -> Patch:
    i = PLUGINS.index(plugin)
    face = COLOURS[i] if not HATCHES[i] else "white"
    return Patch(facecolor=face, edgecolor=COLOURS[i], hatch=HATCHES[i], label=plugin)


def _line_key(plugin: str) -> Any:
    return Line2D([], [], label=plugin, markersize=5.5, **style_of(plugin))
