"""An animated SVG of terminals, without scripts: its frames lie side by side, and one step moves to the next."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from pictures.terminals import COLUMNS, Row

LETTER, LINE, MARGIN, TITLE = 7.83, 18, 14, 26
WIDTH = round(2 * MARGIN + COLUMNS * LETTER)
SPEED = 3
"""How much faster than what happened."""
LEAST, MOST, END = 0.12, 0.6, 4.0
"""Seconds for which a picture is shown: at least, at most, and the last one."""
COLOURS = {
    "default": "#d8dee4", "red": "#ff938a", "green": "#7ee2a8", "brown": "#f0c36d", "blue": "#8cc4ee",
    "magenta": "#e3a6e8", "cyan": "#7fd6dd", "white": "#ffffff", "brightblack": "#8b949e",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Frame:
    """What the terminals showed at a moment."""

    moment: float
    screens: tuple[tuple[Row, ...], ...]


def film(frames: Sequence[Frame], titles: Sequence[str]) -> str:
    """The SVG, which repeats itself; where motion is not wanted it shows its end."""
    shown = list(_shortened(frames))
    seconds = sum(duration for _, duration in shown)
    heights = [TITLE + LINE * len(screen) + MARGIN for screen in shown[0][0].screens]
    height = sum(heights)
    rows = {row: number for number, row in enumerate(dict.fromkeys(_rows(frame for frame, _ in shown)))}
    moves, passed = [], 0.0
    for number, (_, duration) in enumerate(shown):
        moves.append(f"{100 * passed / seconds:.2f}%{{transform:translateX({-number * WIDTH}px)}}")
        passed += duration
    tops = [sum(heights[:number]) for number in range(len(heights))]
    pictures = "".join(
        f'<g transform="translate({number * WIDTH})">{"".join(_picture(frame, tops, rows))}</g>'
        for number, (frame, _) in enumerate(shown)
    )
    panes = "".join(
        f'<rect y="{top}" width="{WIDTH}" height="{TITLE - 4}" fill="#2b3238"/>'
        f'<text x="{MARGIN}" y="{top + 16}" fill="#a5b0b8">{escape(title)}</text>'
        for top, title in zip(tops, titles, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">\n'
        f"<style>text{{font:13px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}}"
        f".film{{animation:film {seconds:.1f}s step-end infinite}}@keyframes film{{{''.join(moves)}}}"
        f"@media (prefers-reduced-motion:reduce){{.film{{animation:none;"
        f"transform:translateX({-(len(shown) - 1) * WIDTH}px)}}}}</style>\n"
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#15181b"/>\n'
        f"<defs>{''.join(_defined(row, number) for row, number in rows.items() if row)}</defs>\n"
        f'{panes}\n<g class="film">{pictures}</g>\n</svg>\n'
    )


def _shortened(frames: Sequence[Frame]) -> Iterator[tuple[Frame, float]]:
    """Pictures that differ from the one before, and the seconds for which each is shown."""
    changed = [frames[0]]
    for frame in frames[1:]:
        if frame.screens != changed[-1].screens and frame.moment - changed[-1].moment >= SPEED * LEAST:
            changed.append(frame)
    for frame, following in pairwise(changed):
        yield frame, min((following.moment - frame.moment) / SPEED, MOST)
    yield frames[-1], END


def _rows(frames: Iterable[Frame]) -> Iterator[Row]:
    for frame in frames:
        for screen in frame.screens:
            yield from screen


def _defined(row: Row, number: int) -> str:
    runs = "".join(
        f'<tspan x="{MARGIN + run.column * LETTER:.1f}" textLength="{len(run.text) * LETTER:.1f}" '
        f'fill="{_colour(run.colour)}"{" font-weight=" + chr(34) + "bold" + chr(34) if run.bold else ""}>'
        f"{escape(run.text)}</tspan>"
        for run in row
    )
    return f'<text id="r{number}">{runs}</text>'


def _colour(name: str) -> str:
    return COLOURS.get(name) or (f"#{name}" if len(name) == 6 else COLOURS["default"])


def _picture(frame: Frame, tops: Sequence[int], rows: dict[Row, int]) -> Iterator[str]:
    for top, screen in zip(tops, frame.screens, strict=True):
        for line, row in enumerate(screen):
            if row:
                yield f'<use href="#r{rows[row]}" y="{top + TITLE + LINE * line + 12}"/>'
