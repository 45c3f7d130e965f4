"""Pictures of a run, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN = 640, 320, 48


def loss_curve(steps: Sequence[int], losses: Sequence[float]) -> str:
    """An SVG with the loss at each logged step."""
    left, right = min(steps), max(max(steps), min(steps) + 1)
    top = max(losses) * 1.05 or 1.0
    points = [
        (
            MARGIN + (step - left) / (right - left) * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - loss / top * (HEIGHT - 2 * MARGIN),
        )
        for step, loss in zip(steps, losses, strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    floor, ceiling = HEIGHT - MARGIN, MARGIN
    texts = [
        (WIDTH / 2, HEIGHT - 12, "middle", "optimizer step"),
        (MARGIN, floor + 18, "middle", str(left)),
        (WIDTH - MARGIN, floor + 18, "middle", str(right)),
        (MARGIN - 6, floor, "end", "0"),
        (MARGIN - 6, ceiling + 4, "end", f"{top:.2f}"),
        (WIDTH / 2, 24, "middle", "training loss"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="13">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<path d="M{MARGIN},{ceiling} V{floor} H{WIDTH - MARGIN}" fill="none" stroke="gray"/>',
            f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="2"/>',
            *(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in texts),
            "</svg>\n",
        ]
    )
