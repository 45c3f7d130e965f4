"""The run on a page: the same content in both forms, whatever the tags are called."""

from xml.etree import ElementTree

from job.runs import markup, plots

NASTY = "<script>alert(1)</script> | & 'x'"
SVG = "{http://www.w3.org/2000/svg}"


def test_what_texts_and_tags_hold_is_shown_and_never_run() -> None:
    blocks: list[markup.Block] = [NASTY, [["tag", "F1"], [NASTY, "0.5"]], markup.Picture("<svg></svg>")]
    html = markup.html(NASTY, blocks)
    assert "<script>" not in html and html.count("&lt;script&gt;") == 4  # title, heading, text, cell
    assert "<svg></svg>" in html and "<th>F1</th>" in html and "<td>0.5</td>" in html


def test_a_cell_of_a_markdown_table_stays_one_cell() -> None:
    [header, rule, row] = markup.markdown_table([["tag", "F1"], ["a|b\nc", "0.5"]])
    assert (header, rule, row) == ("| tag | F1 |", "|---|---|", "| a\\|b c | 0.5 |")
    [_, _, row] = markup.markdown_table([["tag"], ["<img src=x> ![](y) `z` *w*"]])
    assert row == r"| &lt;img src=x&gt; !\[\](y) \`z\` \*w\* |"
    assert "svg" not in markup.markdown("title", [markup.Picture("<svg></svg>"), "text"])


def test_a_curve_goes_through_its_values() -> None:
    svg = ElementTree.fromstring(plots.curve("loss", [1, 25, 50], [4.0, 2.0, 0.0]))
    line = svg.find(f"{SVG}polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    floor = plots.HEIGHT - plots.MARGIN
    assert points[2] == (plots.WIDTH - plots.MARGIN, floor)
    assert [round((floor - y) / (floor - points[0][1]), 2) for _, y in points] == [1.0, 0.5, 0.0]
    ElementTree.fromstring(plots.curve("of one step", [1], [0.0]))  # raises if it is no XML


def test_a_bar_is_as_long_as_its_value_with_its_interval_over_it() -> None:
    svg = ElementTree.fromstring(plots.bars("F1", [NASTY, "b"], [0.25, 0.5], [(0.2, 0.3), (0.4, 0.6)]))
    _, first, second = svg.findall(f"{SVG}rect")
    assert float(second.attrib["width"]) == 2 * float(first.attrib["width"])
    for bar, line, (low, high), value in zip(
        (first, second), svg.findall(f"{SVG}line"), ((0.2, 0.3), (0.4, 0.6)), (0.25, 0.5), strict=True
    ):
        unit = float(bar.attrib["width"]) / value
        ends = [(float(line.attrib[x]) - plots.LABELS) / unit for x in ("x1", "x2")]
        assert [round(end, 2) for end in ends] == [low, high]
    ElementTree.fromstring(plots.bars("none", [], [], []))
