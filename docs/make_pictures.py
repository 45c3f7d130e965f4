"""Make docs/images/run.svg (a terminal recording) and docs/images/report.svg from a real run.

`make pictures` runs the recipe offline in a temporary folder, about 2 minutes on two CPU cores.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path
from typing import Any

from job.runs import plots

IMAGES = Path(__file__).parent / "images"
PLAYBACK_SECONDS = 12.0
"""The recording is played this fast, however long the run took."""
COLUMNS, LINE_HEIGHT, CHARACTER_WIDTH, PADDING = 112, 18, 7.83, 16
MONOSPACE = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"

Recording = list[tuple[float, str]]
"""Lines of a terminal, each with the seconds since the start."""


def record(folder: Path) -> Recording:
    """Run the recipe offline in `folder` and record what it prints."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TAGGER_", "HF_TOKEN"))}
    environ |= {"TAGGER_RUN_DIR": "runs", "TAGGER_HUB_PUSH": "never", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "job", "--recipe", "offline", "run"]
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = [(time.monotonic() - started, line.rstrip("\n")) for line in process.stdout]
    if process.returncode:
        raise SystemExit("\n".join(line for _, line in lines[-20:]))
    return lines


def terminal(recording: Recording, command: str) -> str:
    """Return an animated SVG in which each line appears at its time."""
    rows = [(0.0, f"$ {command}")]
    for seconds, line in recording:
        rows += [(seconds, part) for part in re.findall(f".{{1,{COLUMNS}}}", line) or [""]]
    scale = PLAYBACK_SECONDS / max(seconds for seconds, _ in rows)
    width, height = COLUMNS * CHARACTER_WIDTH + 2 * PADDING, len(rows) * LINE_HEIGHT + 2 * PADDING
    texts = [
        f'<text x="{PADDING}" y="{PADDING + LINE_HEIGHT * number + 13}" style="animation-delay:{seconds * scale:.2f}s">'
        f"{escape(line)}</text>"
        for number, (seconds, line) in enumerate(rows)
    ]
    style = (
        f"text {{ font: 13px {MONOSPACE}; fill: #e6e6e6; white-space: pre; opacity: 0;"
        " animation: appear .01s forwards }"
        " @keyframes appear { to { opacity: 1 } }"
        " @media (prefers-reduced-motion: reduce) { text { animation-duration: 0s; animation-delay: 0s !important } }"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img">\n'
        f"<title>A terminal that runs {escape(command)}</title>\n<style>{style}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#1e1e2e"/>\n' + "\n".join(texts) + "\n</svg>\n"
    )


def report(run: Path) -> str:
    """Return an SVG of the report's content: verdict, scores, the loss curve and the F1 of the tags."""
    found: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    history = _json_lines(run / "log.jsonl")
    tags = _json_lines(run / "tags.jsonl")[:10]
    header = ("", "n", "precision", "recall", "micro-F1", "95%", "macro-F1")
    rows = [header, *(_score_row(name, scores) for name, scores in found["scores"].items())]
    columns = (PADDING, 200, 260, 350, 440, 530, 680)
    y = 34
    parts = [f'<text x="{PADDING}" y="{y}" font-size="20" font-weight="600">{escape(found["run_id"])}</text>']
    for text in (f"{found['outcome']}; gate: {found['gate']['verdict']}", f"split {found['split']['sha256'][:16]}"):
        y += 24
        parts.append(f'<text x="{PADDING}" y="{y}">{escape(text)}</text>')
    for number, row in enumerate(rows):
        y += 26
        weight = "400" if number else "600"
        parts += [
            f'<text x="{x}" y="{y}" font-weight="{weight}">{escape(cell)}</text>'
            for x, cell in zip(columns, row, strict=True)
        ]
        parts.append(f'<line x1="{PADDING}" x2="760" y1="{y + 8}" y2="{y + 8}" stroke="#ddd"/>')
    y += 30
    with plots.style():
        loss = plots.curve("Training loss", [e["step"] for e in history], [e["loss"] for e in history])
        rows_of_tags = [(tag["tag"], tag["f1"], tag["f1_interval"]) for tag in tags]
        bars = plots.intervals("F1 of tags with 95% intervals", rows_of_tags)
        pictures = [plots.svg(figure, name, on_page=False) for name, figure in (("loss", loss), ("tags", bars))]
    heights = [float(re.search(r'viewBox="0 0 \S+ (\S+)"', picture)[1]) for picture in pictures]  # type: ignore[index]
    for x, height, picture in zip((PADDING, 400), heights, pictures, strict=True):
        parts.append(picture.replace("<svg ", f'<svg x="{x}" y="{y}" width="364" height="{height * 1.1:.0f}" ', 1))
    y += round(1.1 * max(heights))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {y + PADDING}" role="img" font-size="14"'
        ' font-family="system-ui, sans-serif" fill="#222">\n<title>The report of a run</title>\n'
        '<rect width="100%" height="100%" fill="white" stroke="#ccc"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _score_row(name: str, scores: dict[str, Any]) -> tuple[str, ...]:
    low, high = scores["intervals"]["f1"]
    figures = (f"{scores[key]:.3f}" for key in ("precision", "recall", "f1"))
    return (name, str(scores["n"]), *figures, f"{low:.3f} to {high:.3f}", f"{scores['macro_f1']:.3f}")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def main() -> None:
    """Record a run and write both pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        recording = record(Path(folder))
        [run] = Path(folder, "runs").iterdir()
        (IMAGES / "run.svg").write_text(terminal(recording, "make run"), encoding="utf-8")
        (IMAGES / "report.svg").write_text(report(run), encoding="utf-8")


if __name__ == "__main__":
    main()
