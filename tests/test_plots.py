"""Plots show their values at the right places, as valid SVG."""

from xml.etree import ElementTree

from job.runs import plots

NASTY_NAME = "<script>alert(1)</script> | & 'x'"
SVG = "{http://www.w3.org/2000/svg}"


def test_a_curve_passes_through_its_values() -> None:
    svg = ElementTree.fromstring(plots.curve("loss", [1, 25, 50], [4.0, 2.0, 0.0]))
    line = svg.find(f"{SVG}polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    floor = plots.HEIGHT - plots.MARGIN
    assert points[2] == (plots.WIDTH - plots.MARGIN, floor)
    assert [round((floor - y) / (floor - points[0][1]), 2) for _, y in points] == [1.0, 0.5, 0.0]
    ElementTree.fromstring(plots.curve("one step", [1], [0.0]))  # raises for invalid XML


def test_bars_and_intervals_have_the_length_of_their_values() -> None:
    svg = ElementTree.fromstring(plots.bars("F1", [NASTY_NAME, "b"], [0.25, 0.5], [(0.2, 0.3), (0.4, 0.6)]))
    _, first, second = svg.findall(f"{SVG}rect")
    assert float(second.attrib["width"]) == 2 * float(first.attrib["width"])
    for bar, line, (low, high), value in zip(
        (first, second), svg.findall(f"{SVG}line"), ((0.2, 0.3), (0.4, 0.6)), (0.25, 0.5), strict=True
    ):
        unit = float(bar.attrib["width"]) / value
        ends = [(float(line.attrib[x]) - plots.LABELS) / unit for x in ("x1", "x2")]
        assert [round(end, 2) for end in ends] == [low, high]
    ElementTree.fromstring(plots.bars("none", [], [], []))
