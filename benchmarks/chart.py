"""A bar chart as plain SVG, for light and dark pages."""

from collections.abc import Callable, Mapping
from html import escape

WIDTH, LABEL, FIGURE, BAR, GAP = 860, 190, 130, 16, 5
STYLE = """
.card { fill: #ffffff } text { fill: #1f2328 } .quiet { fill: #59636e }
.ours { fill: #1f6feb } .theirs { fill: #afb8c1 }
@media (prefers-color-scheme: dark) {
  .card { fill: #0d1117 } text { fill: #e6edf3 } .quiet { fill: #9198a1 }
  .ours { fill: #4493f8 } .theirs { fill: #484f58 }
}
"""


def bars(
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    ours: str,
    shown: Callable[[float], str] = "{:.2f}".format,
) -> str:
    """Horizontal bars: one block for every group, each with its own scale; the bar named `ours` is highlighted."""
    drawn: list[str] = []
    top = 52
    for name, group in groups.items():
        largest = max(group.values())
        drawn.append(_text(16, top + 12, name, weight="bold"))
        top += BAR + 2 * GAP
        for label, value in group.items():
            own = label == ours
            weight = "bold" if own else "normal"
            width = max(1.0, (WIDTH - LABEL - FIGURE) * value / largest)
            drawn.append(_text(LABEL - 8, top + 12, label, anchor="end", weight=weight))
            drawn.append(
                f'<rect class="{"ours" if own else "theirs"}" x="{LABEL}" y="{top}" width="{width:.1f}" '
                f'height="{BAR}" rx="2"/>'
            )
            drawn.append(_text(LABEL + width + 8, top + 12, shown(value), weight=weight, kind="" if own else "quiet"))
            top += BAR + GAP
        top += 3 * GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="13"><title>{escape(title)}</title>'
        f'<style>{STYLE}</style><rect class="card" width="100%" height="100%" rx="6"/>'
    )
    return "\n".join([head, _text(16, 28, title, weight="bold"), *drawn, "</svg>"]) + "\n"


def _text(x: float, y: float, content: str, *, anchor: str = "start", weight: str = "normal", kind: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" class="{kind}">'
        f"{escape(content)}</text>"
    )
