"""Rendering of templates and tables, as Markdown and as HTML."""

from __future__ import annotations

import re
from html import escape
from typing import Any

Table = list[list[str]]
"""Rows of cells; the first row holds the column names."""


def render(template: str, **values: Any) -> str:
    """Render a template of job/runs/templates: HTML escapes every value, Markdown those that pass its filter."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("job.runs"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=template.endswith(".html.jinja"),
    )
    templates.filters |= {"markdown": escape_markdown, "code": code_span}
    templates.filters["table"] = lambda rows: "\n".join(markdown_table(rows))
    return templates.get_template(template).render(**values)


def markdown_table(rows: Table) -> list[str]:
    """Render a table as lines of Markdown."""
    header, *body = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
    return [header, "|---" * len(rows[0]) + "|", *body]


def plain_table(rows: Table) -> list[str]:
    """Render a table as lines with aligned columns, for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def code_span(text: str, *, in_table: bool = False) -> str:
    """Render a text as code in a line of Markdown, whatever it holds; what cannot be printed is shown as an escape."""
    if not text:
        return ""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    # a renderer strips one space on each side
    padding = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{padding}{shown.replace('|', chr(92) + '|') if in_table else shown}{padding}{fence}"


def escape_markdown(text: str) -> str:
    """Escape a text for one line of Markdown; underscores within words need no escape."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(printable.split()), quote=False))
