"""Plots of a run, drawn by matplotlib as SVG whose text is text."""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from job.types import ThresholdScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 330
"""Points of every plot: on a phone, a point is about a pixel, so that text keeps its size there."""
HEIGHT, ROW = 220, 19
LABEL_COLUMNS = 22
"""Longer names are shortened; a character of an East Asian script takes two columns."""
COLOURS = {
    "#1b1f24": "ink",
    "#59636e": "muted",
    "#d1d9e0": "line",
    "#0b62c4": "first",
    "#b35900": "second",
    "#57606a": "third",
}
"""The colours for light pages, and the CSS variables by which a page can replace them for dark ones."""
INK, MUTED, LINE, FIRST, SECOND, THIRD = COLOURS
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib, so that texts have the same extents everywhere
    "font.size": 9.5,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a tag may have dollar signs
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "tagger-job",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw with STYLE and otherwise matplotlib's own defaults, whatever a file of the user says."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # a page has fonts for the scripts that DejaVu Sans does not have
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def curve(title: str, steps: Sequence[int], values: Sequence[float]) -> Figure:
    """Draw a line through the values, none negative, at their optimizer steps."""
    figure, axes = _axes(title, HEIGHT)
    dots = 3 if len(steps) <= 30 else 0
    axes.plot(steps, values, color=FIRST, linewidth=1.8, marker="o", markersize=dots, clip_on=False)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(min(steps), max(max(steps), min(steps) + 1))
    axes.set_ylim(0, max((value for value in values if math.isfinite(value)), default=0.0) * 1.06 or 1.0)
    _plain_numbers(axes, whole_x=True)
    return figure


def by_threshold(title: str, points: Sequence[ThresholdScores], chosen: float) -> Figure:
    """Draw precision, recall and F1 over the threshold, and a line at the chosen one."""
    figure, axes = _axes(title, HEIGHT + 30)
    shown = [point for point in points if point.predicted] or list(points[:1])
    thresholds = [point.threshold for point in shown]
    for name, colour, dashes in (("precision", FIRST, "-"), ("recall", SECOND, "--"), ("f1", INK, "-.")):
        values = [getattr(point, name) for point in shown]
        axes.plot(thresholds, values, color=colour, linestyle=dashes, linewidth=1.8, label=name.replace("f1", "F1"))
    axes.axvline(chosen, color=THIRD, linewidth=1.2, linestyle=":", label=f"chosen: {chosen:g}")
    axes.set_xlabel("threshold")
    axes.set_xlim(0, max(*thresholds, chosen, 0.05))
    axes.set_ylim(0, 1)
    _plain_numbers(axes)
    figure.legend(loc="outside lower center", ncols=4, handlelength=1.6, columnspacing=1.2, handletextpad=0.5)
    return figure


def intervals(title: str, rows: Sequence[tuple[str, float, Sequence[float]]]) -> Figure:
    """Draw a row for each name: a dot at its value, between 0 and 1, on a line for its interval."""
    figure, axes = _axes(title, 62 + ROW * max(1, len(rows)))
    for row, (_, value, (low, high)) in enumerate(rows):
        axes.plot([low, high], [row, row], color=FIRST, linewidth=2, alpha=0.45, solid_capstyle="butt")
        axes.plot([value], [row], color=FIRST, marker="o", markersize=5, clip_on=False)
        axes.annotate(f"{value:.2f}", (1, row), (4, 0), ("axes fraction", "data"), "offset points", va="center")
    axes.set_xlim(0, min(1.0, max((high for _, _, (_, high) in rows), default=0.0) * 1.1 or 1.0))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    _plain_numbers(axes)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    labels = [shortened(name) for name, _, _ in rows]
    # DejaVu Sans does not know how wide the characters are that it does not have: reserve the width of a W for each
    measured = ["".join("W" if is_wide(character) else character for character in label) for label in labels]
    axes.set_yticks(range(len(rows)), measured)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    axes.set_yticks(range(len(rows)), labels)
    return figure


NO_PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 330 40" role="img">'
    '<text x="8" y="24" font-size="11">This picture could not be drawn.</text></svg>\n'
)
"""For a file that a page shows, where drawing has failed."""


def svg(figure: Figure, name: str, *, on_page: bool = True) -> str:
    """Return a figure as an SVG element, to be used within `style`.

    On a page it takes the page's fonts, and its colours are CSS variables with the page's names. Otherwise it is a
    file of its own, on white. `name` keeps its ids apart from those of other pictures on the page.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="none" if on_page else "white")
    root = ElementTree.fromstring(file.getvalue())
    _simplify(root, name if on_page else None)
    attributes = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": figure.get_suptitle()}
    if not on_page:
        attributes |= {"xmlns": "http://www.w3.org/2000/svg", "font-family": "'DejaVu Sans', Verdana, sans-serif"}
    root.attrib = attributes | {"stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def shortened(name: str) -> str:
    """Return a name on one line, without control characters, in at most LABEL_COLUMNS columns."""
    text = "".join(c for c in " ".join(name.split()) if unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn"))
    columns = 0
    for number, character in enumerate(text):
        columns += 1 + is_wide(character)
        if columns > LABEL_COLUMNS:
            return f"{text[: max(1, number - 1)].rstrip()}…"
    return text


def is_wide(character: str) -> bool:
    """Return whether a character is about as wide as it is high."""
    return unicodedata.east_asian_width(character) in "WF"


def _axes(title: str, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    return figure, axes


def _plain_numbers(axes: Axes, *, whole_x: bool = False) -> None:
    """Write each number at the axes in full: a common factor would stand where the title is."""
    from matplotlib.ticker import MaxNLocator

    for axis, whole in ((axes.xaxis, whole_x), (axes.yaxis, False)):
        axis.set_major_locator(MaxNLocator(5, integer=whole))
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _simplify(root: ElementTree.Element, page_name: str | None) -> None:
    """Keep of matplotlib's SVG what is seen: no metadata, no style sheet, only ids that are used.

    With `page_name`, ids start with it, and colours are variables of the page.
    """
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(
        re.findall(r"#([\w-]+)", " ".join(value for element in root.iter() for value in element.attrib.values()))
    )
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if attributes.get("transform", "").startswith("rotate(-0 "):
            del attributes["transform"]
        element.attrib = {key: _renamed(key, value, page_name) for key, value in attributes.items()}


def _renamed(key: str, value: str, page_name: str | None) -> str:
    """Return the value of an attribute without fonts and, with `page_name`, in the names of the page."""
    if key == "style":
        value = re.sub(
            r"font: (?:\w+ )*([\d.]+px) [^;]*", r"font-size: \1", re.sub(r"font-family: [^;]*;? ?", "", value)
        )
        return re.sub(r"#[0-9a-f]{6}", lambda found: _css_colour(found[0]), value) if page_name else value
    if page_name and key == "id":
        return f"{page_name}-{value}"
    if page_name and key in ("href", "clip-path"):
        return re.sub(r"^(url\()?#", rf"\g<1>#{page_name}-", value)
    return value


def _css_colour(colour: str) -> str:
    return f"var(--{COLOURS[colour]}, {colour})" if colour in COLOURS else colour
