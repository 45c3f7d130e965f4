"""Texts and tags cannot break the Markdown of a page. tests/test_report.py has the same for HTML."""

import pytest
from jinja2 import UndefinedError

from job.runs import markup


def test_markdown_escapes_cells() -> None:
    [header, rule, row] = markup.markdown_table([["tag", "F1"], ["a|b\nc", "0.5"]])
    assert (header, rule, row) == ("| tag | F1 |", "|---|---|", "| a\\|b c | 0.5 |")
    [_, _, row] = markup.markdown_table([["tag"], ["<img src=x> ![](y) `z` *w*"]])
    assert row == r"| &lt;img src=x&gt; !\[\](y) \`z\` \*w\* |"


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        markup.render("report.md.jinja")
