"""What was measured, as a table, as bench.json and as docs/benchmarks.md."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.goals import Goal, goal_of

MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """Ours and the reference of one run, in the same unit; with the peak memory of each in bytes, if watched."""

    name: str
    ours: float
    reference: float
    unit: str
    our_peak: int | None = None
    reference_peak: int | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.reference

    @property
    def goal(self) -> Goal | None:
        return goal_of(self.name)

    @property
    def met(self) -> bool | None:
        """None without a goal."""
        return None if self.goal is None else self.goal.met(self.ratio)

    @property
    def missed(self) -> bool:
        return self.goal is not None and not self.goal.stretch and not self.met

    def as_json(self) -> dict[str, Any]:
        goal = None if self.goal is None else self.goal.ratio
        figures = {"ours": self.ours, "reference": self.reference, "ratio": self.ratio}
        rounded = {name: float(f"{figure:.4g}") for name, figure in figures.items()}
        return {"name": self.name, **rounded, "goal": goal, "met": self.met}

    def cells(self) -> list[str]:
        peaks = [f"{peak / MB:.0f}" if peak else "" for peak in (self.our_peak, self.reference_peak)]
        figures = [f"{_figure(self.ours)} {self.unit}", f"{_figure(self.reference)} {self.unit}", f"{self.ratio:.2f}"]
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return [self.name, *figures, str(self.goal or ""), met, *peaks]


HEADINGS = ("", "ours", "reference", "ratio", "goal", "met", "our peak MB", "its peak MB")


def as_table(measurements: Iterable[Measurement]) -> Table:
    table = Table(*HEADINGS)
    for measurement in measurements:
        style = "red" if measurement.missed else None
        table.add_row(*(cell.replace("**", "") for cell in measurement.cells()), style=style)
    return table


def as_markdown(measurements: Iterable[Measurement]) -> str:
    lines = ["|".join(("", *HEADINGS, "")), "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    lines += [f"| {' | '.join(measurement.cells())} |" for measurement in measurements]
    return "\n".join(lines)


def write_json(path: Path, measurements: Sequence[Measurement]) -> None:
    path.write_text(json.dumps([measurement.as_json() for measurement in measurements], indent=2) + "\n")


def _figure(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
