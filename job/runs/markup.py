"""Rendering of a page (texts, tables, pictures) as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .2em .8em .2em 0; text-align: left; border-bottom: 1px solid #ddd }
svg { width: 100%; max-width: 640px; display: block }
"""

Table = list[list[str]]
"""Rows of cells; the first row holds the column names."""


@dataclass(frozen=True)
class Picture:
    """An SVG; Markdown leaves it out."""

    svg: str


Block = str | Table | Picture


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Render the page as Markdown, without its pictures."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, str):
            parts.append(_escape_markdown(block))
        elif not isinstance(block, Picture):
            parts.append("\n".join(markdown_table(block)))
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Table) -> list[str]:
    """Render a table as lines of Markdown."""
    header, *body = ["| " + " | ".join(map(_escape_markdown, row)) + " |" for row in rows]
    return [header, "|---" * len(rows[0]) + "|", *body]


def _escape_markdown(text: str) -> str:
    """Escape a text for one line of Markdown; underscores within words need no escape."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False))


def html(title: str, blocks: Sequence[Block]) -> str:
    """Render the page as one self-contained HTML file without scripts."""
    body = "\n".join(line for block in blocks for line in _html_lines(block))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def _html_lines(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield f"<p>{escape(block)}</p>"
    elif isinstance(block, Picture):
        yield block.svg
    else:
        yield "<table>"
        for number, row in enumerate(block):
            element = "td" if number else "th"
            yield "<tr>" + "".join(f"<{element}>{escape(cell)}</{element}>" for cell in row) + "</tr>"
        yield "</table>"
