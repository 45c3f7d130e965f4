"""Plots show their values, no text of them is clipped or overlaps another, and they are the same everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from job.runs import plots
from job.types import ThresholdScores

ROOT = Path(__file__).parents[1]
NASTY_NAMES = [
    "<script>alert(1)</script> & $x^2$",
    "W" * 40,
    "a\n\tb\x00\u2028c",
    "生活在別處的人們很多很多很多",
    "العربية",
    "",
]
CURVE = [ThresholdScores(n / 100, 200 - 2 * n, n / 100, 1 - n / 100, 0.5) for n in range(100)]
FIGURES: dict[str, Callable[[], Any]] = {
    "many steps": lambda: plots.curve("Training loss", range(1, 2_000_000, 10_000), [9.87654] * 200),
    "one step": lambda: plots.curve("Training loss", [1], [0.0]),
    "small values": lambda: plots.curve("Learning rate", [1, 200], [0.0, 2.5e-06]),
    "large values": lambda: plots.curve("Training loss", [1, 2], [123456.7, float("nan")]),
    "thresholds": lambda: plots.by_threshold("Scores at other thresholds", CURVE, 0.07),
    "highest threshold": lambda: plots.by_threshold("Scores at other thresholds", CURVE, 0.99),
    "nothing predicted": lambda: plots.by_threshold("Scores", [ThresholdScores(0.0, 0, 0.0, 0.0, 0.0)], 0.0),
    "nasty names": lambda: plots.intervals(
        "F1 of tags with 95% intervals", [(name, 0.5, (0.0, 1.0)) for name in NASTY_NAMES]
    ),
    "low values": lambda: plots.intervals("F1", [("a", 0.0, (0.0, 0.0))] * 15),
    "no names": lambda: plots.intervals("F1 of tags with 95% intervals", []),
}


def texts(figure: Any) -> Iterator[tuple[str, Any]]:
    """Yield each text that a figure shows, and its box."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    axes = figure.axes[0]
    hidden = set()
    for axis in (axes.xaxis, axes.yaxis):  # matplotlib has ticks just outside of an axis, and draws none of them
        low, high = sorted(axis.get_view_interval())
        outside = [tick for tick in axis.get_major_ticks() if not low - 1e-9 <= tick.get_loc() <= high + 1e-9]
        hidden |= {label for tick in outside for label in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and text not in hidden:
            yield text.get_text(), text.get_window_extent()


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_clipped_or_overlaps_another(name: str) -> None:
    with plots.style():
        figure = FIGURES[name]()
        boxes = list(texts(figure))
        assert len(boxes) >= 3, "an empty plot would pass"
        for text, box in boxes:
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert inside, f"{text!r} is clipped: {box} of {figure.bbox}"
        for (first, box), (second, other) in combinations(boxes, 2):
            assert not box.overlaps(other), f"{first!r} overlaps {second!r}"


def test_the_check_finds_clipped_and_overlapping_text() -> None:
    with plots.style():
        figure = plots.curve("A title that is much too long for a picture of this width, as everyone can see", [1], [1])
        assert any(box.x1 > figure.bbox.x1 for _, box in texts(figure))
        figure = plots.curve("Loss", [1], [1.0])
        figure.text(0.05, 0.95, "over the title")
        assert any(one.overlaps(other) for (_, one), (_, other) in combinations(texts(figure), 2))


def test_names_that_the_font_lacks_have_room_for_wide_characters() -> None:
    with plots.style():
        figure = plots.intervals("F1", [("生" * 40, 0.5, (0.4, 0.6))])
        [label] = figure.axes[0].get_yticklabels()
        size = label.get_fontsize() * figure.dpi / 72
        assert label.get_window_extent().x1 >= len(label.get_text()) * size * 0.95


def test_every_value_is_within_the_axes() -> None:
    ElementTree.fromstring(plots.NO_PICTURE)
    with plots.style():
        ticks = plots.curve("loss", [1, 2, 3], [1.0, 1.0, 1.0]).axes[0].get_xticks().tolist()
        assert ticks == [1, 2, 3], "there are no fractions of steps"
        for name, draw in FIGURES.items():
            axes = draw().axes[0]
            (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
            for x, y in (point for line in axes.lines for point in line.get_xydata()):
                assert left <= x <= right and not (y < bottom or y > top), name
        assert plots.curve("loss", [1, 25, 50], [4.0, 2.0, 0.0]).axes[0].lines[0].get_ydata().tolist() == [4, 2, 0]
        rows = plots.intervals("F1", [("a", 0.25, (0.2, 0.3)), ("b", 0.5, (0.4, 0.6))]).axes[0].lines
        assert [list(line.get_xdata()) for line in rows] == [[0.2, 0.3], [0.25], [0.4, 0.6], [0.5]]


def test_pictures_are_plain_svg_with_ids_of_their_own() -> None:
    ids: list[str] = []
    for name, draw in FIGURES.items():
        with plots.style():
            page = plots.svg(draw(), name.replace(" ", "-"))
            file = plots.svg(draw(), "file", on_page=False)
        root = ElementTree.fromstring(page)
        assert {element.tag for element in root.iter()} <= {
            "svg",
            "g",
            "defs",
            "path",
            "use",
            "text",
            "clipPath",
            "rect",
        }
        assert not re.search(r"<(script|style|metadata)|xlink|https?:|font-family", page)
        assert set(re.findall(r"#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", page))) == set()
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert "var(" not in file and ElementTree.fromstring(file).tag == "{http://www.w3.org/2000/svg}svg"
    assert len(ids) == len(set(ids)) > 0


def test_names_are_shortened_by_their_width() -> None:
    assert plots.shortened("a\n\tb\x00\u2028c") == "a b c"
    assert plots.shortened("x" * plots.LABEL_COLUMNS) == "x" * plots.LABEL_COLUMNS
    assert plots.shortened("x" * 99) == "x" * (plots.LABEL_COLUMNS - 1) + "…"
    assert plots.shortened("生" * 99) == "生" * (plots.LABEL_COLUMNS // 2 - 1) + "…"


def test_a_picture_is_the_same_without_display_home_or_the_users_style() -> None:
    Path("matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 40\nsvg.fonttype: path\n")
    code = (
        "from job.system import logging_setup; logging_setup.configure()\n"
        "from job.runs import plots\n"
        "with plots.style(): print(plots.svg(plots.curve('loss', [1, 2], [4.0, 2.0]), 'loss'), end='')"
    )
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/proc/nowhere", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    with plots.style():
        assert done.stdout == plots.svg(plots.curve("loss", [1, 2], [4.0, 2.0]), "loss")
    assert done.stderr == ""


def test_nothing_loads_matplotlib_before_a_picture_is_drawn() -> None:
    code = "import sys, job.cli, job.preflight, job.report; sys.exit('matplotlib' in sys.modules)"
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/proc/nowhere"}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True)
