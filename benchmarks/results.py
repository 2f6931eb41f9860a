"""The measurements, as a table and as bench.json."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.table import Table

from benchmarks.goals import Goal, goal_of

MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of batchserve and of the reference in one run, in the same unit.

    With the peak memory of each in bytes, if measured, and the number of repeats of which each figure is the median.
    """

    name: str
    ours: float
    reference: float
    unit: str
    our_peak: int | None = None
    reference_peak: int | None = None
    our_repeats: int = 1
    reference_repeats: int = 1

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
        more = {name: getattr(self, name) for name in MORE}
        return {"name": self.name, **rounded, "goal": goal, "met": self.met, **more}

    def cells(self) -> list[str]:
        peaks = [f"{peak / MB:.0f}" if peak else "" for peak in (self.our_peak, self.reference_peak)]
        ratio = ratio_text(self.ratio)
        figures = [f"{figure(self.ours)} {self.unit}", f"{figure(self.reference)} {self.unit}", ratio]
        met = {None: "", True: "yes", False: "no"}[self.met]
        return [self.name, *figures, str(self.goal or ""), met, *peaks]


MORE = ("unit", "our_peak", "reference_peak", "our_repeats", "reference_repeats")


@dataclass(frozen=True, slots=True)
class Gap:
    """A measurement that failed, and the reason. With `ours` the service itself failed, which is a missed goal."""

    name: str
    error: str
    ours: bool = False

    @property
    def missed(self) -> bool:
        return self.ours

    def as_json(self) -> dict[str, Any]:
        """As that of a measurement, without figures."""
        goal = goal_of(self.name)
        figures = dict.fromkeys(("ours", "reference", "ratio"))
        met = False if self.ours else None
        return {"name": self.name, **figures, "goal": goal.ratio if goal else None, "met": met, "error": self.error}

    def cells(self) -> list[str]:
        return [self.name, "", "", "", str(goal_of(self.name) or ""), "no" if self.ours else "", "", ""]


@dataclass
class Results:
    """Measurements and gaps by name; a later one replaces an earlier one."""

    entries: dict[str, Measurement | Gap] = field(default_factory=dict)

    def add(self, entries: Iterable[Measurement | Gap]) -> None:
        """Adds them one by one, so that those before an error are kept."""
        for entry in entries:
            self.entries[entry.name] = entry

    @property
    def measured(self) -> list[Measurement]:
        return [entry for entry in self.entries.values() if isinstance(entry, Measurement)]

    @property
    def gaps(self) -> list[Gap]:
        return [entry for entry in self.entries.values() if isinstance(entry, Gap)]

    @property
    def missed(self) -> list[Measurement | Gap]:
        return [entry for entry in self.entries.values() if entry.missed]

    def write(self, path: Path) -> None:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps([entry.as_json() for entry in self.entries.values()], indent=2) + "\n")
        partial.replace(path)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Self:
        """Reads the files that `write` wrote in one or several runs."""
        results = cls()
        for path in paths:
            results.add(map(_entry, json.loads(path.read_text())))
        return results

    def as_table(self) -> Table:
        table = Table("", "ours", "reference", "ratio", "goal", "met", "our peak MB", "its peak MB")
        for entry in self.entries.values():
            table.add_row(*entry.cells(), style="red" if entry.missed else None)
        return table


def _entry(written: dict[str, Any]) -> Measurement | Gap:
    if "error" in written:
        return Gap(written["name"], written["error"], written["met"] is False)
    figures = {name: written[name] for name in ("name", "ours", "reference", *MORE)}
    return Measurement(**figures)


def ratio_text(ratio: float) -> str:
    """Two decimals, or three significant digits of small ratios."""
    return f"{ratio:.2f}" if ratio >= 0.1 else figure(ratio)


def figure(number: float) -> str:
    """Three significant digits."""
    return f"{float(f'{number:.3g}'):,.0f}" if abs(number) >= 100 else f"{number:.3g}"
