"""Texts and tags cannot break the Markdown or the HTML of a page."""

from job.runs import markup

NASTY_TEXT = "<script>alert(1)</script> | & 'x'"


def test_html_escapes_titles_texts_and_cells() -> None:
    blocks: list[markup.Block] = [NASTY_TEXT, [["tag", "F1"], [NASTY_TEXT, "0.5"]], markup.Picture("<svg></svg>")]
    html = markup.html(NASTY_TEXT, blocks)
    assert "<script>" not in html and html.count("&lt;script&gt;") == 4  # title, heading, text, cell
    assert "<svg></svg>" in html and "<th>F1</th>" in html and "<td>0.5</td>" in html


def test_markdown_escapes_cells() -> None:
    [header, rule, row] = markup.markdown_table([["tag", "F1"], ["a|b\nc", "0.5"]])
    assert (header, rule, row) == ("| tag | F1 |", "|---|---|", "| a\\|b c | 0.5 |")
    [_, _, row] = markup.markdown_table([["tag"], ["<img src=x> ![](y) `z` *w*"]])
    assert row == r"| &lt;img src=x&gt; !\[\](y) \`z\` \*w\* |"


def test_markdown_leaves_out_pictures() -> None:
    assert markup.markdown("title", [markup.Picture("<svg></svg>"), "text"]) == "# title\n\ntext\n"
