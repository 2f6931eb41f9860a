"""The figures of all runs, as lines of JSON, to compare them over time on each machine."""

import json
import os
import platform
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from benchmarks.results import Measurement, Results

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).with_name("history.jsonl")


@dataclass(frozen=True, slots=True)
class Past:
    """The ratios of one figure in all runs that were recorded."""

    runs: int
    machines: int
    least: float
    greatest: float
    newest: float
    at: str
    """The date of the newest."""

    @classmethod
    def of(cls, lines: list[dict[str, Any]]) -> Self:
        """From the lines of one figure, the newest at the end."""
        ratios = [line["ratio"] for line in lines]
        machines = len({line["machine"] for line in lines})
        return cls(len(lines), machines, min(ratios), max(ratios), ratios[-1], lines[-1]["at"])


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def append(results: Results, path: Path) -> None:
    """Adds a line for each measurement. Ratios compare across machines; seconds only on one of the same name."""
    run = {
        "at": f"{datetime.now(UTC):%Y-%m-%d}",
        "revision": _revision(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }
    with path.open("a") as file:
        for entry in results.entries.values():
            if isinstance(entry, Measurement):
                figures = entry.as_json()
                line = run | {name: figures[name] for name in ("name", "ours", "reference", "ratio", "unit")}
                file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, Past]:
    """What was recorded of each figure, by its name; nothing if there is no such file."""
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        lines[entry["name"]].append(entry)
    return {name: Past.of(entries) for name, entries in lines.items()}


def _revision() -> str:
    """The revision of the measured code, marked if it has uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
