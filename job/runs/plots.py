"""Plots of a run, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 640, 320, 48
LABELS, ROW = 180, 22
COLOUR = "#1f77b4"

_Text = tuple[float, float, str, str]
"""x, y, the SVG text-anchor (start, middle or end), the text."""


def curve(title: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """Draw a line through the values, none negative, at their optimizer steps."""
    left, right = min(steps), max(max(steps), min(steps) + 1)
    top = max(values) * 1.05 or 1.0
    points = [
        (
            MARGIN + (step - left) / (right - left) * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - value / top * (HEIGHT - 2 * MARGIN),
        )
        for step, value in zip(steps, values, strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    floor, ceiling = HEIGHT - MARGIN, MARGIN
    shapes = [
        f'<path d="M{MARGIN},{ceiling} V{floor} H{WIDTH - MARGIN}" fill="none" stroke="gray"/>',
        f'<polyline points="{line}" fill="none" stroke="{COLOUR}" stroke-width="2"/>',
    ]
    texts: list[_Text] = [
        (WIDTH / 2, HEIGHT - 12, "middle", "optimizer step"),
        (MARGIN, floor + 18, "middle", str(left)),
        (WIDTH - MARGIN, floor + 18, "middle", str(right)),
        (MARGIN - 6, floor, "end", "0"),
        (MARGIN - 6, ceiling + 4, "end", f"{top:.3g}"),
        (WIDTH / 2, 24, "middle", title),
    ]
    return _svg(HEIGHT, shapes, texts)


def bars(title: str, names: Sequence[str], values: Sequence[float], intervals: Sequence[Sequence[float]]) -> str:
    """Draw a bar for each name, its value between 0 and 1, and over it a line for its interval."""
    scale = WIDTH - MARGIN - LABELS
    shapes: list[str] = []
    texts: list[_Text] = [(WIDTH / 2, 24, "middle", title)]
    for number, (name, value, (low, high)) in enumerate(zip(names, values, intervals, strict=True)):
        y = MARGIN + number * ROW
        shapes.append(f'<rect x="{LABELS}" y="{y}" width="{value * scale:.1f}" height="{ROW - 6}" fill="{COLOUR}"/>')
        middle = y + (ROW - 6) / 2
        line = f'x1="{LABELS + low * scale:.1f}" x2="{LABELS + high * scale:.1f}" y1="{middle:g}" y2="{middle:g}"'
        shapes.append(f'<line {line} stroke="black"/>')
        texts.append((LABELS - 8, middle + 5, "end", name if len(name) <= 24 else f"{name[:23]}…"))
        texts.append((WIDTH - 8, middle + 5, "end", f"{value:.2f}"))
    return _svg(MARGIN + len(names) * ROW + 8, shapes, texts)


def _svg(height: int, shapes: Sequence[str], texts: Sequence[_Text]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="13">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *shapes,
            *(
                f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
                for x, y, anchor, text in texts
            ),
            "</svg>\n",
        ]
    )
