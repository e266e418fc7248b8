"""report.html: as text, and in a real browser where there is one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import page
from sweep_rows import example_rows

PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><rect width="4" height="4"/></svg>'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Table(HTMLParser):
    """What a page shows of its table: the words of each column, by name, of the rows that are not hidden."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.shown = True
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "th":
            self.names.append(given["data-name"] or "")
        if tag == "tr":
            self.shown = "hidden" not in given
            if self.shown and "data-status" in given:
                self.rows.append([])
        if tag == "td" and self.shown:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data

    def column(self, name: str) -> list[str]:
        return [row[self.names.index(name)] for row in self.rows]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A page of six cells and one picture."""
    (tmp_path / "throughput.svg").write_text(PICTURE)
    page.write(example_rows(), [tmp_path / "throughput.svg"], tmp_path, num_cells=8)
    return tmp_path / "report.html"


def test_the_page_holds_all_it_needs(written: Path) -> None:
    shown = Table(written.read_text())
    assert all(source.startswith("data:") for source in shown.sources)
    assert len(shown.sources) == 2  # the empty icon and the picture
    assert not re.search(r"@import|url\(|fetch\(|<link(?! rel=\"icon\")|<script src", written.read_text())
    assert "6 of 8 cells" in written.read_text()
    assert "MFU stands against: a sheet." in written.read_text()


def test_the_page_has_every_row_and_column_and_takes_no_word_for_html(written: Path) -> None:
    shown = Table(written.read_text())
    assert shown.column("tokens_per_s") == ["24,000", "96,000", "16,000", "-", "8,000", "-"]
    assert shown.column("reason")[3] == "no <room>"
    assert {"driver", "link", "commit", "step_ms_p90", "prediction_error_percent"} <= set(shown.names)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., Table]:
    """A function (page, script) -> the table after Chromium has opened the page from disk and run the script."""
    browser = os.environ.get("BROWSER_FOR_TESTS") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in BROWSER_FOR_TESTS")

    def run(path: Path, script: str) -> Table:
        # The script stands behind the page's own and clicks as a user does.
        acted = tmp_path / "acted.html"
        acted.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [browser, *flags, "--dump-dom", acted.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return Table(done.stdout)

    return run


CLICK = 'document.querySelector("th[data-name={}] button").click();'


def test_a_click_sorts_numbers_as_numbers_and_leaves_the_unknown_last(written: Path, browse) -> None:
    click = CLICK.format("tokens_per_s")
    assert browse(written, click).column("tokens_per_s") == ["8,000", "16,000", "24,000", "96,000", "-", "-"]
    assert browse(written, click * 2).column("tokens_per_s") == ["96,000", "24,000", "16,000", "8,000", "-", "-"]


def test_a_click_sorts_words_and_rows_stay_whole(written: Path, browse) -> None:
    shown = browse(written, CLICK.format("plugin"))
    assert shown.column("plugin") == ["gemini"] * 2 + ["low_level_zero"] * 2 + ["torch_ddp"] * 2
    assert shown.column("tokens_per_s") == ["8,000", "-", "16,000", "-", "24,000", "96,000"]


def test_words_and_choices_filter_the_rows(written: Path, browse) -> None:
    act = """
      words.value = "tiny"; choices.find(choice => choice.name === "status").value = "ok";
      words.dispatchEvent(new Event("input"));
    """
    assert browse(written, act).column("status") == ["ok"] * 4
    assert browse(written, 'words.value = "ROOM"; filter();').column("status") == ["oom"]


def test_the_page_runs_without_an_error_or_a_request(written: Path, browse) -> None:
    act = """
      document.title = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length + " "
        + document.querySelector("img").naturalWidth + " " + document.getElementById("count").textContent;
      document.querySelector("tbody td").textContent = document.title;
    """
    told = browse(written, f'addEventListener("load", () => {{ {act} }});').column("model")[0]
    requests, width, count = told.split(" ", 2)
    assert (requests, count) == ("0", "6 of 6 cells")
    assert int(width) > 0
