"""The measurements, as a table and as bench.json."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Self

from rich.table import Table

from benchmarks.goals import Goal, goal_of

MB = 1_000_000
USED = ("our CPU s", "its CPU s", "our peak MB", "its peak MB")
"""The headings of the last cells."""


@dataclass
class Runs:
    """One value for each run of a program, and what its processes used."""

    values: list[float] = field(default_factory=list)
    peak: int = 0
    """The peak memory of all processes together, in bytes."""
    largest: int = 0
    """The peak memory of the largest process, in bytes."""
    cpu: list[float] = field(default_factory=list)
    """User and system seconds of all processes, of the runs in which they were measured."""
    middle: float | None = None
    """Given if it is not the median of the values."""

    def add(self, value: float, *, peak: int = 0, largest: int = 0, cpu: float | None = None) -> None:
        self.values.append(value)
        self.peak = max(self.peak, peak)
        self.largest = max(self.largest, largest)
        self.cpu += [] if cpu is None else [cpu]

    @property
    def median(self) -> float:
        return median(self.values) if self.middle is None else self.middle

    @property
    def median_cpu(self) -> float | None:
        return median(self.cpu) if self.cpu else None

    def each(self, changed: Callable[[float], float]) -> "Runs":
        """The same runs with other values, such as a speed for each time; that of the median remains the figure."""
        return replace(self, values=[changed(value) for value in self.values], middle=changed(self.median))


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of batchserve and of the reference in one run of the harness, in the same unit.

    With the peak memory of each in bytes and its CPU seconds, if measured, and the values of the single runs of which
    each figure is the median.
    """

    name: str
    ours: float
    reference: float
    unit: str
    our_peak: int | None = None
    reference_peak: int | None = None
    our_cpu: float | None = None
    reference_cpu: float | None = None
    our_runs: tuple[float, ...] = ()
    reference_runs: tuple[float, ...] = ()

    @classmethod
    def of(cls, name: str, ours: Runs, reference: Runs | float, unit: str) -> Self:
        """From the runs of both; a reference that is a number is a fixed one."""
        theirs = reference if isinstance(reference, Runs) else Runs([reference])
        return cls(
            name, ours.median, theirs.median, unit, ours.peak or None, theirs.peak or None,
            ours.median_cpu, theirs.median_cpu, tuple(ours.values), tuple(theirs.values) if theirs is reference else (),
        )  # fmt: skip

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
        rounded = {name: _rounded(figure) for name, figure in figures.items()}
        more = {name: getattr(self, name) for name in MORE}
        runs = {name: list(map(_rounded, getattr(self, name))) for name in RUNS}
        return {"name": self.name, **rounded, "goal": goal, "met": self.met, **more, **runs}

    def cells(self) -> list[str]:
        peaks = [f"{peak / MB:.0f}" if peak else "" for peak in (self.our_peak, self.reference_peak)]
        used = ["" if cpu is None else figure(cpu) for cpu in (self.our_cpu, self.reference_cpu)]
        sides = (self.ours, self.our_runs), (self.reference, self.reference_runs)
        shown = [" ".join(filter(None, (figure(value), self.unit, _in_brackets(runs)))) for value, runs in sides]
        met = {None: "", True: "yes", False: "no"}[self.met]
        return [self.name, *shown, ratio_text(self.ratio), str(self.goal or ""), met, *used, *peaks]


MORE = ("unit", "our_peak", "reference_peak", "our_cpu", "reference_cpu")
RUNS = ("our_runs", "reference_runs")


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
        return [self.name, "", "", "", str(goal_of(self.name) or ""), "no" if self.ours else "", "", "", "", ""]


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
        table = Table("", "ours", "reference", "ratio", "goal", "met", *USED)
        for entry in self.entries.values():
            table.add_row(*entry.cells(), style="red" if entry.missed else None)
        return table


def _entry(written: dict[str, Any]) -> Measurement | Gap:
    if "error" in written:
        return Gap(written["name"], written["error"], written["met"] is False)
    figures = {name: written[name] for name in ("name", "ours", "reference", *MORE)}
    figures |= {name: tuple(written[name]) for name in RUNS}
    return Measurement(**figures)


def spread(values: Sequence[float]) -> str:
    """The least and the greatest value; empty if there are fewer than two."""
    return " … ".join(figure(value) for value in (min(values), max(values))) if len(values) > 1 else ""


def _in_brackets(values: Sequence[float]) -> str:
    return f"({found})" if (found := spread(values)) else ""


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def ratio_text(ratio: float) -> str:
    """Two decimals, or three significant digits of small ratios."""
    return f"{ratio:.2f}" if ratio >= 0.1 else figure(ratio)


def figure(number: float) -> str:
    """Three significant digits."""
    return f"{float(f'{number:.3g}'):,.0f}" if abs(number) >= 100 else f"{number:.3g}"
