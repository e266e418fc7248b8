"""The pictures: that each is there, says what it must, and can be told apart without colour."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -r requirements.txt")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from args import PLUGINS
from benchmarks import plots
from sweep_rows import example_rows


def words_of(figure: Figure | None) -> list[str]:
    assert figure is not None
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
    return found


def test_a_sweep_over_gpus_gives_four_pictures_as_png_and_svg(tmp_path: Path) -> None:
    drawn = plots.draw_all(example_rows(num_gpus=(1, 4)), tmp_path)
    assert [path.stem for path in drawn] == ["throughput", "memory", "memory-and-speed", "scaling"]
    for path in drawn:
        assert path.read_text().startswith("<?xml")
        assert imread(path.with_suffix(".png")).shape[1] == 1760  # twice README width


def test_what_cannot_be_drawn_is_left_out_and_an_old_file_removed(tmp_path: Path) -> None:
    (tmp_path / "scaling.png").touch()
    drawn = plots.draw_all(example_rows(), tmp_path)
    assert "scaling" not in [path.stem for path in drawn]
    assert not (tmp_path / "scaling.png").exists()
    assert plots.draw_all([row for row in example_rows() if not row.tokens_per_s], tmp_path) == []


@pytest.mark.parametrize("draw", plots.PICTURES.values(), ids=plots.PICTURES.keys())
def test_each_picture_names_the_hardware_and_has_units_on_its_axes(draw) -> None:
    words = words_of(draw(example_rows(num_gpus=(1, 4))))
    assert any("NVIDIA Fake 80GB" in word and "torch 2.13.0" in word for word in words)
    assert any("tokens/s" in word or word == "GiB" for word in words)


def test_memory_shows_the_cap_and_what_ran_out_of_it() -> None:
    words = words_of(plots.memory(example_rows(cap=20.0)))
    assert "cap 20 GB: 18.6 GiB" in words
    assert [word for word in words if word in ("OOM", "timeout")] == ["OOM", "timeout"]
    assert "memory of a GPU: 79.0 GiB" in words_of(plots.memory(example_rows()))


def test_the_states_of_cells_without_a_bar_lie_inside_the_picture() -> None:
    figure = plots.memory(example_rows())
    assert figure is not None
    (left, right), words = figure.axes[0].get_xlim(), figure.axes[0].texts
    places = {word.get_text(): word.get_position()[0] for word in words if word.get_text() in ("OOM", "timeout")}
    assert set(places) == {"OOM", "timeout"}
    assert all(left < x < right for x in places.values())


def test_on_a_cpu_the_memory_is_the_hosts() -> None:
    words = words_of(plots.memory(example_rows(gib=None)))
    assert any(word.startswith("Peak host memory") for word in words)


def test_a_cell_that_failed_is_a_gap_in_the_line_and_a_mark() -> None:
    figure = plots.throughput(example_rows())
    assert words_of(figure).count("OOM") == 1
    assert figure is not None
    line = next(line for line in figure.axes[0].lines if line.get_color() == plots.style_of("gemini")["color"])
    assert str(line.get_ydata()[1]) == "nan"


def test_scaling_has_an_ideal_line_through_each_plugins_first_point() -> None:
    figure = plots.scaling(example_rows(num_gpus=(1, 4)))
    assert figure is not None
    ends = [[float(y) for y in line.get_ydata()] for line in figure.axes[0].lines if line.get_linewidth() == 0.7]
    assert ends == [[24000, 96000], [16000, 64000], [8000, 32000]]


def test_settings_that_differ_get_a_panel_each_named_by_the_difference() -> None:
    figure = plots.throughput(example_rows(num_gpus=(1, 4)))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["tiny, 1 GPU", "tiny, 4 GPUs"]


def test_plugins_differ_by_more_than_colour_and_no_line_is_too_pale_for_print() -> None:
    looks = [plots.style_of(plugin) for plugin in PLUGINS]
    assert len({look["marker"] for look in looks}) == len(PLUGINS)
    for look in looks:
        red, green, blue = to_rgb(look["color"])
        assert 0.299 * red + 0.587 * green + 0.114 * blue < 0.75
