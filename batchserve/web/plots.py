"""Plots as SVG, from numbers. Colours come from classes, so that they follow the page into the dark."""

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

__all__ = ["bars", "histogram", "line"]

_WIDTH = 640
_LABEL, _COUNT = 170, 110
_ROW = 24
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 220, 64, 8, 12, 34
_LONGEST = 24
_STEPS = (1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10, 12)
"""Of which a half is a round number as well."""

_PLOT = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img"><title>{}</title>{}</svg>')
_WORD = Markup('<text class="value" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
_RULE = Markup('<line class="axis" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
_LINE = Markup('<polyline class="line" points="{}"/>')
_BIN = Markup(
    "<g><title>{told}</title>"
    '<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/></g>'
)
_ROW_OF_BARS = Markup(
    '<g><title>{name}: {told}</title><text class="name" x="{before}" y="{base}" text-anchor="end">{short}</text>'
    '<rect class="bar" x="{left}" y="{top}" width="{width:.1f}" height="{height}" rx="2"/>'
    '<text class="value" x="{behind:.1f}" y="{base}">{told}</text></g>'
)


def bars(title: str, counts: Sequence[tuple[str, int]], total: int) -> Markup:
    """A bar for each name, with its count and its share of `total`."""
    most = max((count for _, count in counts), default=0) or 1
    parts = []
    for row, (name, count) in enumerate(counts):
        length = (_WIDTH - _LABEL - _COUNT) * count / most
        told = f"{count:,} ({count / total:.1%})" if total else f"{count:,}"
        parts.append(
            _ROW_OF_BARS.format(
                told=told,
                name=name,
                short=_short(name),
                left=_LABEL,
                top=row * _ROW + 3,
                width=length,
                height=_ROW - 6,
                base=row * _ROW + 16,
                before=_LABEL - 8,
                behind=_LABEL + length + 6,
            )
        )
    told = ", ".join(f"{name} {count:,}" for name, count in counts)
    return _svg(f"{title}: {told}", max(1, len(counts)) * _ROW, parts)


def histogram(title: str, counts: Sequence[int], low: float, high: float) -> Markup:
    """A bar for each of the bins of one width from `low` to `high`."""
    most = _top(max(counts, default=0))
    step, size = (_WIDTH - _LEFT - _RIGHT) / max(1, len(counts)), (high - low) / max(1, len(counts))
    parts = [*_axes(most, "records"), *_ticks(low, high)]
    for place, count in enumerate(counts):
        tall = (_HEIGHT - _TOP - _BOTTOM) * count / most
        told = f"{_number(low + place * size)} to {_number(low + (place + 1) * size)}: {count:,}"
        left, width = _LEFT + place * step + 0.5, max(1.0, step - 1)
        parts.append(_BIN.format(told=told, left=left, top=_HEIGHT - _BOTTOM - tall, width=width, height=tall))
    peak = counts.index(max(counts)) if counts else 0
    most_of = f"{_number(low + peak * size)} to {_number(low + (peak + 1) * size)}"
    told = f"{title}: from {_number(low)} to {_number(high)}, most of them from {most_of}"
    return _svg(told, _HEIGHT, parts)


def line(title: str, points: Sequence[tuple[float, float]], unit: str) -> Markup:
    """A line through points in the order of their first coordinates, from 0 up."""
    highest = max((y for _, y in points), default=0.0)
    most = _top(highest)
    low, high = (points[0][0], points[-1][0]) if points else (0.0, 1.0)
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    places = " ".join(
        f"{_LEFT + wide * (x - low) / ((high - low) or 1.0):.1f},{_HEIGHT - _BOTTOM - tall * y / most:.1f}"
        for x, y in points
    )
    told = f"{title}: {_number(min((y for _, y in points), default=0))} to {_number(highest)} {unit}"
    return _svg(told, _HEIGHT, [*_axes(most, unit), *_ticks(low, high), _LINE.format(places)])


def _svg(title: str, height: int, parts: Iterable[Markup]) -> Markup:
    return _PLOT.format(_WIDTH, height, title, Markup("").join(parts))


def _axes(most: float, unit: str) -> list[Markup]:
    """The ground line, and a line at the top and in the middle with their values."""
    floor = _HEIGHT - _BOTTOM
    parts = [_WORD.format(_WIDTH - _RIGHT, _HEIGHT - 2, "end", unit)]
    for share in (0.0, 0.5, 1.0):
        y = floor - (floor - _TOP) * share
        parts.append(_RULE.format(left=_LEFT, right=_WIDTH - _RIGHT, y=y))
        parts.append(_WORD.format(_LEFT - 6, y + 4, "end", _number(most * share)))
    return parts


def _top(highest: float) -> float:
    """A round number at this or above it, for the top of an axis."""
    if highest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(highest))
    return next(unit * step for step in _STEPS if unit * step >= highest)


def _ticks(low: float, high: float) -> list[Markup]:
    wide, y = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM + 15
    return [
        _WORD.format(_LEFT + wide * share, y, anchor, _number(low + (high - low) * share))
        for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    ]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
