"""Write the table of modules in docs/architecture.md from the first lines of their docstrings.

`make docs` runs it; tests/test_docs.py fails when the table is out of date.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules -->\n", "<!-- /modules -->"


def with_modules(page: str) -> str:
    """Return the page with the table between its two marks made again."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = ["| file | |", "|---|---|", *(f"| {_shown(name)} | {line} |" for name, line in modules())]
    return before + BEGIN + "\n".join(rows) + "\n" + END + after


def modules() -> list[tuple[str, str]]:
    """Return path and first docstring line of every module: the top level in pipeline order, then the packages."""
    job = ROOT / "job"
    top = ("__init__", "__main__", "cli", "pipeline", "settings", "types", "errors")
    chapters = (
        *("preflight", "estimate", "data", "quantize", "freeze", "lora", "train", "evaluate", "gate"),
        *("merge", "push", "promote", "sample", "results", "report", "compare", "model_card"),
    )
    order = {name: number for number, name in enumerate((*top, *chapters))}
    on_top = sorted(job.glob("*.py"), key=lambda path: (order.get(path.stem, len(order)), path.stem))
    return [(str(path.relative_to(ROOT)), _summary(path)) for path in (*on_top, *sorted(job.glob("*/*.py")))]


def _shown(path: str) -> str:
    """Return the link to a module; a package stands for its __init__.py."""
    package = path.removesuffix("__init__.py")
    return f"**[{package}](../{package})**" if package != path else f"[{path}](../{path})"


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(with_modules(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
