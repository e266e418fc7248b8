"""report.html: table and pictures of a sweep in one file, which opens from disk without a network."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import Field
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.table import COLUMNS, Row, common_line, hardware_line, peaks_line, split_columns, text

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1500px; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; margin: 0; }
.about { color: #444; margin: .3rem 0 1rem; }
.controls { display: flex; flex-wrap: wrap; gap: .8rem 1.2rem; align-items: center; margin-bottom: .6rem; }
.controls input[type=search], .controls select { font: inherit; padding: .25rem .4rem; }
.controls input[type=search] { width: 19rem; max-width: 100%; }
.scroll { overflow-x: auto; border: 1px solid #ccc; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th.words, td.words { text-align: left; }
td.long { white-space: normal; min-width: 16rem; }
th { background: #f2f2f2; vertical-align: bottom; white-space: normal; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0072b2; }
th button::after { content: " \\2195"; color: #999; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: #000; }
th[aria-sort=descending] button::after { content: " \\2193"; color: #000; }
tbody tr:hover { background: #f7f7f7; }
tr[data-status=oom] td, tr[data-status=nan] td, tr[data-status=error] td, tr[data-status=timeout] td { background: #fbeeee; }
tr[data-status=skipped] td { color: #666; }
table:not(.all) .more { display: none; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 660px), 1fr)); gap: 1rem; margin-top: 1.2rem; }
.pictures img { width: 100%; border: 1px solid #e4e4e4; }
"""

SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0], rows = [...body.rows];
const words = document.getElementById("words"), choices = [...document.querySelectorAll("select")];
function filter() {
  const wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const content = row.textContent.toLowerCase();
    row.hidden = !wanted.every(word => content.includes(word))
      || !choices.every(choice => !choice.value || row.dataset[choice.name] === choice.value);
    shown += !row.hidden;
  }
  document.getElementById("count").textContent = `${shown} of ${rows.length} cells`;
}
function sort(head) {
  const index = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const isNumber = !head.classList.contains("words"), sign = down ? -1 : 1;
  const value = row => row.cells[index].dataset.value;
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // what is not known stands last either way
    return sign * (isNumber ? x - y : x.localeCompare(y));
  });
  body.append(...rows);
}
for (const head of table.tHead.rows[0].cells) head.querySelector("button").addEventListener("click", () => sort(head));
for (const control of [words, ...choices]) control.addEventListener("input", filter);
document.getElementById("all").addEventListener("input", event => table.classList.toggle("all", event.target.checked));
filter();
"""


def write(rows: Sequence[Row], pictures: Sequence[Path], folder: Path, *, num_cells: int) -> None:
    """Write report.html.

    Args:
        pictures: SVG files, taken into the page.
        num_cells: cells of the sweep, of which those not yet measured have no row.
    """
    classes, (same, _) = _classes(rows), split_columns(rows)
    about = f"{hardware_line(rows)}, {time.strftime('%Y-%m-%d')}; {common_line(rows, same)}; {len(rows)} of {num_cells} cells"
    choices = " ".join(_choice(name, rows) for name in ("model", "plugin", "status"))
    html = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Benchmark: {escape(hardware_line(rows))}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Throughput and memory</h1>
<p class="about">{escape(about)}. Speeds are medians of synchronised steps after the warm-up; memory is the largest
rank's. {escape(peaks_line(rows))} Click a heading to sort; hover it for its meaning.</p>
<div class="controls">
<input type="search" id="words" placeholder="filter: words that a row must have" aria-label="filter">
{choices}
<label><input type="checkbox" id="all"> all columns</label>
<span id="count" aria-live="polite"></span>
</div>
<div class="scroll"><table>
<thead><tr>{"".join(_head(spec, classes[spec.name]) for spec in COLUMNS)}</tr></thead>
<tbody>
{chr(10).join(_row(row, classes) for row in rows)}
</tbody>
</table></div>
<div class="pictures">
{chr(10).join(_picture(path) for path in pictures)}
</div>
<script>{SCRIPT}</script>
</body>
</html>
"""
    (folder / "report.html").write_text(html, encoding="utf-8")


def _choice(name: str, rows: Sequence[Row]) -> str:
    values = dict.fromkeys(str(getattr(row, name)) for row in rows)
    options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
    return f'<label>{name} <select name="{name}"><option value="">all</option>{options}</select></label>'


def _classes(rows: Sequence[Row]) -> dict[str, str]:
    """Return the class of each column: words or numbers, shown at first or on demand."""
    shown = {spec.name for spec in split_columns(rows)[1]}
    shown |= {"reason"} if any(row.reason for row in rows) else set()
    found = {}
    for spec in COLUMNS:
        kinds = {"words": not spec.metadata["form"], "long": spec.name == "reason", "more": spec.name not in shown}
        found[spec.name] = " ".join(kind for kind, is_so in kinds.items() if is_so)
    return found


def _head(spec: Field[Any], kind: str) -> str:
    title = escape(spec.metadata["help"] or spec.metadata["label"])
    label = escape(spec.metadata["label"])
    return f'<th scope="col" class="{kind}" title="{title}" data-name="{spec.name}"><button>{label}</button></th>'


def _row(row: Row, classes: Mapping[str, str]) -> str:
    cells = []
    for spec in COLUMNS:
        value = getattr(row, spec.name)
        exact = "" if value is None else escape(str(value))
        shown = escape(text(value, spec.metadata["form"]))
        cells.append(f'<td class="{classes[spec.name]}" data-value="{exact}">{shown}</td>')
    data = " ".join(f'data-{name}="{escape(str(getattr(row, name)))}"' for name in ("model", "plugin", "status"))
    return f"<tr {data}>{''.join(cells)}</tr>"


def _picture(path: Path) -> str:
    # As an image each SVG keeps its ids and styles to itself.
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(path.stem.replace("-", " "))}" src="data:image/svg+xml;base64,{content}">'
