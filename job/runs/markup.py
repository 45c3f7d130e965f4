"""A page of texts, tables and pictures, once as Markdown and once as HTML."""

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
"""Rows of cells, the first of them the columns' names."""


@dataclass(frozen=True)
class Picture:
    """An SVG, which Markdown leaves out."""

    svg: str


Block = str | Table | Picture


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page in Markdown."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, str):
            parts.append(_plain(block))
        elif not isinstance(block, Picture):
            parts.append("\n".join(markdown_table(block)))
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Table) -> list[str]:
    """Lines of a Markdown table."""
    header, *others = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    return [header, "|---" * len(rows[0]) + "|", *others]


def _plain(text: str) -> str:
    """A text in a line of Markdown where nothing of it means anything but itself; underscores in words do not."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False))


def html(title: str, blocks: Sequence[Block]) -> str:
    """The page in HTML: one file that needs no other, and runs nothing."""
    body = "\n".join(line for block in blocks for line in _html(block))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def _html(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield f"<p>{escape(block)}</p>"
    elif isinstance(block, Picture):
        yield block.svg
    else:
        yield "<table>"
        for number, row in enumerate(block):
            kind = "td" if number else "th"
            yield "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) + "</tr>"
        yield "</table>"
