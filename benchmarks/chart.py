"""A bar chart as plain SVG."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, LABEL, BAR, GAP = 860, 220, 16, 4
COLOURS = ("#1f6feb", "#8b949e", "#d29922", "#bf8700", "#2da44e", "#8250df")


def bars(title: str, groups: Mapping[str, Mapping[str, float]], series: Sequence[str]) -> str:
    """Horizontal bars: one block for every group, one bar for each of `series` that the group has."""
    largest = max((value for group in groups.values() for value in group.values()), default=1.0)
    colours = dict(zip(series, COLOURS, strict=False))
    drawn: list[str] = []
    top = 40
    for name, group in groups.items():
        drawn.append(_text(8, top + BAR, name, weight="bold"))
        top += BAR + 2 * GAP
        for label in series:
            if label not in group:
                continue
            width = max(1.0, (WIDTH - LABEL - 80) * group[label] / largest)
            drawn.append(_text(LABEL - 8, top + BAR - GAP, label, anchor="end"))
            drawn.append(f'<rect x="{LABEL}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{colours[label]}"/>')
            drawn.append(_text(LABEL + width + 6, top + BAR - GAP, f"{group[label]:.2f}"))
            top += BAR + GAP
        top += 2 * GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + GAP}" width="{WIDTH}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return "\n".join([head, _text(8, 24, title, weight="bold"), *drawn, "</svg>"]) + "\n"


def _text(x: float, y: float, content: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(content)}</text>'
